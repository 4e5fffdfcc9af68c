//! `BTRFS_IOC_SYNC`: commits, and wakes the kernel's thread that cleans away what was deleted.

use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{NoArg, Opcode, ioctl};

const BTRFS_IOC_SYNC: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_SYNC as Opcode;

/// Commits the btrfs that `fd` lies on.
///
/// # Errors
/// Those of the system call; `ENOTTY` off btrfs.
pub fn commit(fd: impl AsFd) -> Result<()> {
    // SAFETY: the opcode takes no argument.
    unsafe { ioctl(fd, NoArg::<BTRFS_IOC_SYNC>::new()) }
}
