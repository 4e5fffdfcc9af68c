//! `F_SETLEASE`: finds out whether anyone else has an image open, and whether someone wants it while we work on it.

use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general::{F_OWNER_TID, F_SETOWN_EX, f_owner_ex};
use rustix::io::Errno;

use super::signals::ignore_sigio;

/// What a lease keeps off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// Whoever opens the file for writing. Granted only while nobody has.
    Writers,
    /// Whoever opens the file. Granted only while this descriptor is the only one open on the inode, loop devices included.
    All,
}

impl Lease {
    fn kind(self) -> i32 {
        match self {
            Self::Writers => libc::F_RDLCK,
            Self::All => libc::F_WRLCK,
        }
    }
}

/// Has the signal that tells of openers end nothing. Taking a lease does this, too; who handles the signal calls it before.
pub fn prepare() {
    ignore_sigio();
}

/// Takes a lease on a file, or changes the one that this descriptor has. From then on whomever it keeps off waits until [`release`] or
/// `/proc/sys/fs/lease-break-time`. The signal that the kernel sends then ends nothing.
///
/// # Errors
/// `EAGAIN` if someone has the file open; `EINVAL` where the filesystem has no leases.
pub fn take(fd: impl AsFd, lease: Lease) -> Result<(), Errno> {
    ignore_sigio();
    set(fd, lease.kind())
}

/// Gives the lease back and lets a waiting opener go on.
///
/// # Errors
/// `EAGAIN` if there was no lease.
pub fn release(fd: impl AsFd) -> Result<(), Errno> {
    set(fd, libc::F_UNLCK)
}

/// Whether the lease is still wholly ours: the kernel answers with the type it is to become once someone waits.
pub fn is_held(fd: impl AsFd, lease: Lease) -> bool {
    // SAFETY: F_GETLEASE takes no argument.
    unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETLEASE) == lease.kind() }
}

/// Has the kernel tell one thread, and no other, when someone waits for the lease on a file: another may not get the processor for long.
///
/// # Errors
/// `ESRCH` if there is no such thread.
pub fn tell(fd: impl AsFd, thread: rustix::thread::Pid) -> Result<(), Errno> {
    let owner = f_owner_ex {
        type_: F_OWNER_TID.cast_signed(),
        pid: thread.as_raw_nonzero().get(),
    };
    // SAFETY: the kernel reads the structure, which outlives the call.
    let told = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX.cast_signed(), &raw const owner) };
    if told == 0 { Ok(()) } else { Err(last_error()) }
}

fn last_error() -> Errno {
    let error = std::io::Error::last_os_error().raw_os_error();
    error.map_or(Errno::IO, Errno::from_raw_os_error)
}

fn set(fd: impl AsFd, kind: i32) -> Result<(), Errno> {
    // SAFETY: F_SETLEASE takes the lease type as an integer.
    match unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETLEASE, kind) } {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}
