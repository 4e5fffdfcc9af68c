//! `FICLONERANGE`: makes a range of one file share the extents of another. It is called on files that an import has created itself, and
//! never on an existing image.

use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general::file_clone_range;
use rustix::io::Result;
use rustix::ioctl::{Opcode, Setter, ioctl};

const FICLONERANGE: Opcode = linux_raw_sys::ioctl::FICLONERANGE as Opcode;

/// Makes `length` bytes of `destination` share those of `source`. Offsets must be multiples of the filesystem's block size, and so must
/// `length`, unless the source range ends at the end of its file. A length of 0, which the kernel would take for "to the end", does nothing
/// here.
///
/// # Errors
/// Returns `EOPNOTSUPP`, `ENOTTY`, `EXDEV` or `EINVAL` if the filesystem cannot share the two files, and `ENOSPC` or `EIO` if sharing
/// fails.
pub fn clone_range(
    source: impl AsFd,
    source_offset: u64,
    destination: impl AsFd,
    destination_offset: u64,
    length: u64,
) -> Result<()> {
    if length == 0 {
        return Ok(());
    }
    let range = file_clone_range {
        src_fd: i64::from(source.as_fd().as_raw_fd()),
        src_offset: source_offset,
        src_length: length,
        dest_offset: destination_offset,
    };
    // SAFETY: the opcode takes a pointer to exactly this structure, which it only reads.
    unsafe { ioctl(destination, Setter::<FICLONERANGE, _>::new(range)) }
}

#[cfg(test)]
mod tests {
    use rustix::ioctl::opcode;

    use super::*;

    #[test]
    fn opcode_is_the_kernels() {
        // _IOW(0x94, 13, struct file_clone_range) in linux/fs.h.
        assert_eq!(FICLONERANGE, opcode::write::<file_clone_range>(0x94, 13));
    }
}
