//! `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`: what `lsattr` shows.

use std::os::fd::AsFd;

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Result;

/// The inode's attributes.
///
/// # Errors
/// `ENOTTY` where the filesystem has none.
pub fn inode_flags(fd: impl AsFd) -> Result<IFlags> {
    ioctl_getflags(fd)
}

/// Adds attributes to a new, empty file (`NOCOW` has an effect on no other).
///
/// # Errors
/// `EOPNOTSUPP` or `EINVAL` where the filesystem does not have them.
pub fn add_inode_flags(fd: impl AsFd, flags: IFlags) -> Result<()> {
    let present = ioctl_getflags(&fd)?;
    ioctl_setflags(fd, present | flags)
}

/// Takes attributes away from a new, empty file.
///
/// # Errors
/// As for [`add_inode_flags`].
pub fn remove_inode_flags(fd: impl AsFd, flags: IFlags) -> Result<()> {
    let present = ioctl_getflags(&fd)?;
    ioctl_setflags(fd, present - flags)
}
