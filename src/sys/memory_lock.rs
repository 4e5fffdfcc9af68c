//! `mlock`: memory that is not swapped out.

use std::io;

/// Locks the pages that hold these bytes. They stay locked until they are unmapped: locks do not nest, and another secret may lie on the
/// same page.
///
/// # Errors
/// Returns the error of the call: `ENOMEM` or `EPERM` beyond `RLIMIT_MEMLOCK`.
pub fn lock(bytes: &[u8]) -> io::Result<()> {
    // SAFETY: the range is that of a valid reference. Locking changes nothing that is in it.
    match unsafe { libc::mlock(bytes.as_ptr().cast(), bytes.len()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
