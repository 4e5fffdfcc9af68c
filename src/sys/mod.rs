//! Every system call that the standard library does not offer, one file per call, each behind a safe function.
//!
//! This is the only folder with `unsafe` code. A function makes its call and returns the kernel's answer; only [`spill`] decides anything.
#![expect(unsafe_code, reason = "ioctl and fcntl are made here and nowhere else")]

pub mod allocator;
pub mod beneath;
pub mod byte_locks;
pub mod clone;
pub mod commit;
pub mod dedupe;
pub mod descriptor;
pub mod encoded_write;
pub mod existing;
pub mod fiemap;
pub mod fs_info;
pub mod fsmap;
pub mod inode_flags;
pub mod lease;
pub mod logical_ino;
pub mod loop_status;
pub mod memory;
pub mod memory_lock;
pub mod open_files;
pub mod priority;
pub mod random;
pub mod readahead;
pub mod signals;
pub mod spill;
pub mod stdout;
pub mod tree_search;
