//! `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`: the inode flags that `lsattr` shows.

use std::os::fd::AsFd;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Result;

/// Returns the inode's flags.
///
/// # Errors
/// Returns `ENOTTY` or `EOPNOTSUPP` if the filesystem has no inode flags.
pub fn inode_flags(fd: impl AsFd) -> Result<IFlags> {
    ioctl_getflags(fd)
}

/// Sets flags of a new, empty file. `NOCOW` has an effect on no other.
///
/// # Errors
/// Returns `EOPNOTSUPP` or `EINVAL` if the filesystem does not support the flags.
pub fn add_inode_flags(fd: impl AsFd, flags: IFlags) -> Result<()> {
    let present = ioctl_getflags(&fd)?;
    ioctl_setflags(fd, present | flags)
}

/// Clears flags of a new, empty file.
///
/// # Errors
/// Fails as [`add_inode_flags`] does.
pub fn remove_inode_flags(fd: impl AsFd, flags: IFlags) -> Result<()> {
    let present = ioctl_getflags(&fd)?;
    ioctl_setflags(fd, present - flags)
}
