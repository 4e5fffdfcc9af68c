//! `readahead`: fills the page cache before the kernel's compare asks for it page by page.

use std::os::fd::{AsFd, AsRawFd};

/// Bytes of one call. The kernel silently cuts a longer one to the device's readahead size or largest request, whichever is more
/// (`force_page_cache_ra` in mm/readahead.c); 512 KiB is below both on nearly every device.
const PIECE_BYTES: u64 = 512 << 10;

/// Starts reading `length` bytes from `offset` into the page cache. It is a hint: an error occurs again, and is reported, where the data is
/// read.
pub fn readahead(fd: impl AsFd, offset: u64, length: u64) {
    let fd = fd.as_fd().as_raw_fd();
    for piece in (0..length.div_ceil(PIECE_BYTES)).map(|n| n * PIECE_BYTES) {
        let (Ok(at), Ok(bytes)) = (
            i64::try_from(offset + piece),
            usize::try_from(PIECE_BYTES.min(length - piece)),
        ) else {
            return;
        };
        // SAFETY: the call takes plain integers and an open descriptor.
        unsafe { libc::readahead(fd, at, bytes) };
    }
}

/// Starts writing dirty pages of the range to disk and, if `wait`, waits for them, so that the filesystem allocates the range as an extent
/// of its own.
///
/// # Errors
/// Returns the error of writing, such as `ENOSPC` or `EIO`.
pub fn write_out(fd: impl AsFd, offset: u64, length: u64, wait: bool) -> std::io::Result<()> {
    let (Ok(offset), Ok(length)) = (i64::try_from(offset), i64::try_from(length)) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let mut flags = libc::SYNC_FILE_RANGE_WRITE;
    if wait {
        flags |= libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    }
    // SAFETY: the call takes plain integers and an open descriptor.
    match unsafe { libc::sync_file_range(fd.as_fd().as_raw_fd(), offset, length, flags) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}
