//! Code that only tests use: a filesystem in memory, and filesystems and stores that fail. It is not in the binary.

pub mod faulty_filesystem;
pub mod faulty_store;
pub mod fixed_keys;
pub mod raw_archive;
pub mod simulated;
