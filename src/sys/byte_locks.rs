//! `F_OFD_GETLK`: tells whether another open file description holds a lock on a range of bytes of a file.

use std::os::fd::{AsFd, AsRawFd};

/// Whether another open file description holds a lock on any of the `length` bytes from `start` on. An error counts as no lock.
pub fn is_locked(fd: impl AsFd, start: i64, length: i64) -> bool {
    // SAFETY: the structure is plain integers, for which all zeros are valid.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are small numbers of an integer type that differs between C libraries.
    #[expect(clippy::cast_possible_truncation, reason = "0, 1 and 2")]
    {
        lock.l_type = libc::F_WRLCK as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
    }
    (lock.l_start, lock.l_len) = (start, length);
    // SAFETY: the kernel reads and fills the structure, which outlives the call.
    let result = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
    result == 0 && i32::from(lock.l_type) != libc::F_UNLCK
}
