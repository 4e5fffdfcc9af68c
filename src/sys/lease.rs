//! `F_SETLEASE`: a lease tells whether anyone else has an image open, and whether someone wants to open it during a run.

use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general::{F_OWNER_TID, F_SETOWN_EX, f_owner_ex};
use rustix::io::Errno;

use super::signals::ignore_sigio;

/// Whom a lease keeps waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// Those who open the file for writing. The lease is granted only if nobody has it open for writing.
    Writers,
    /// Those who open the file at all. The lease is granted only if this descriptor is the only one open on the inode, loop devices
    /// included.
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

/// Makes the process ignore the signal by which the kernel reports an opener. [`take`] does so too; a caller that installs a handler must
/// call this before.
pub fn prepare() {
    ignore_sigio();
}

/// Takes a lease on a file, or changes the one that this descriptor has. Openers whom it concerns then wait until [`release`], or until
/// `/proc/sys/fs/lease-break-time` has passed.
///
/// # Errors
/// Returns `EAGAIN` if someone has the file open, and `EINVAL` if the filesystem has no leases.
pub fn take(fd: impl AsFd, lease: Lease) -> Result<(), Errno> {
    ignore_sigio();
    set(fd, lease.kind())
}

/// Gives the lease back, so that a waiting opener continues.
///
/// # Errors
/// Returns `EAGAIN` if there was no lease.
pub fn release(fd: impl AsFd) -> Result<(), Errno> {
    set(fd, libc::F_UNLCK)
}

/// Whether the lease is still in full force: once someone waits, `F_GETLEASE` returns the type that the lease must become.
pub fn is_held(fd: impl AsFd, lease: Lease) -> bool {
    // SAFETY: F_GETLEASE takes no argument.
    unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETLEASE) == lease.kind() }
}

/// Makes the kernel signal one thread when someone waits for the lease on a file. Any other thread may not get the processor for long.
///
/// # Errors
/// Returns `ESRCH` if the thread does not exist.
pub fn tell(fd: impl AsFd, thread: rustix::thread::Pid) -> Result<(), Errno> {
    let owner = f_owner_ex {
        type_: F_OWNER_TID.cast_signed(),
        pid: thread.as_raw_nonzero().get(),
    };
    // SAFETY: the kernel reads the structure, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), F_SETOWN_EX.cast_signed(), &raw const owner) };
    if result == 0 { Ok(()) } else { Err(last_error()) }
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
