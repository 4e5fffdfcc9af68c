//! Descriptors that the caller of this process left open, by their number.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

/// Duplicates a descriptor that is known by its number only. The duplicate is closed in programs that this process runs.
///
/// # Errors
/// Returns the error of the call: `EBADF` if it is not open.
pub fn duplicate(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes plain integers, and fails with EBADF if the descriptor is not open.
    match unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) } {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        copy => Ok(unsafe { OwnedFd::from_raw_fd(copy) }),
    }
}
