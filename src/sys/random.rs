//! `getrandom`: random bytes of the kernel.

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills a buffer with random bytes.
///
/// # Errors
/// Returns the error of the call.
pub fn fill(bytes: &mut [u8]) -> rustix::io::Result<()> {
    let mut filled = 0;
    while filled < bytes.len() {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())?;
    }
    Ok(())
}
