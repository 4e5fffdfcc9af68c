//! `BTRFS_IOC_ENCODED_WRITE`: stores data that is already compressed as a compressed extent.

use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

/// `struct iovec`.
#[repr(C)]
struct Iovec {
    address: u64,
    length: u64,
}

/// `struct btrfs_ioctl_encoded_io_args` (uapi/linux/btrfs.h).
#[repr(C)]
struct EncodedIo {
    pieces: u64,
    piece_count: u64,
    offset: i64,
    flags: u64,
    length: u64,
    unencoded_length: u64,
    unencoded_offset: u64,
    compression: u32,
    encryption: u32,
    reserved: [u8; 64],
}

/// `BTRFS_IOC_ENCODED_WRITE`.
const ENCODED_WRITE: Opcode = opcode::write::<EncodedIo>(0x94, 64);
/// `BTRFS_ENCODED_IO_COMPRESSION_ZSTD`.
const ZSTD: u32 = 2;

/// Writes a zstd frame to `offset` of a file as one compressed extent; it stands for `content_bytes` of content.
///
/// The offset and `content_bytes` must be multiples of the filesystem's block size. The content is at most 128 KiB, and the frame must be
/// shorter than it. The frame's window must be at most 128 KiB: the kernel stores any frame, but cannot read one with a larger window. The
/// call requires `CAP_SYS_ADMIN` and Linux 5.18.
///
/// # Errors
/// Returns the error of the call: `ENOTTY` before Linux 5.18, `EINVAL` if the frame or its content exceeds the kernel's limits, and
/// `ENOSPC`.
pub fn write_frame(file: impl AsFd, offset: u64, frame: &[u8], content_bytes: u64) -> Result<()> {
    let piece = Iovec {
        address: frame.as_ptr().addr() as u64,
        length: frame.len() as u64,
    };
    let io = EncodedIo {
        pieces: (&raw const piece).addr() as u64,
        piece_count: 1,
        offset: i64::try_from(offset).map_err(|_| rustix::io::Errno::FBIG)?,
        flags: 0,
        length: content_bytes,
        unencoded_length: content_bytes,
        unencoded_offset: 0,
        compression: ZSTD,
        encryption: 0,
        reserved: [0; 64],
    };
    // SAFETY: the structure is laid out as uapi/linux/btrfs.h has it. The kernel reads one piece, which outlives the call, and of
    // it only the frame.
    unsafe { ioctl(file, Setter::<ENCODED_WRITE, _>::new(io)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structure_is_as_long_as_the_kernel_has_it() {
        assert_eq!(size_of::<EncodedIo>(), 128);
        assert_eq!(ENCODED_WRITE, 0x4080_9440);
    }
}
