//! `BTRFS_IOC_SYNC`: commits the transaction of a btrfs, and wakes the kernel thread that cleans deleted subvolumes up.

use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{NoArg, Opcode, ioctl};

const BTRFS_IOC_SYNC: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_SYNC as Opcode;

/// Commits the btrfs that `fd` lies on.
///
/// # Errors
/// Returns the error of the call: `ENOTTY` on other filesystems.
pub fn commit(fd: impl AsFd) -> Result<()> {
    // SAFETY: the opcode takes no argument.
    unsafe { ioctl(fd, NoArg::<BTRFS_IOC_SYNC>::new()) }
}
