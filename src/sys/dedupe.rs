//! `FIDEDUPERANGE`: the only call that ever changes what an image maps.

use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::general::file_dedupe_range_info;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl};

/// `struct file_dedupe_range` (uapi/linux/fs.h) with room for one destination.
#[repr(C)]
struct OneDestination {
    src_offset: u64,
    src_length: u64,
    dest_count: u16,
    reserved1: u16,
    reserved2: u32,
    info: file_dedupe_range_info,
}

const FIDEDUPERANGE: Opcode = linux_raw_sys::ioctl::FIDEDUPERANGE as Opcode;

/// The kernel's answer for one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deduped {
    /// The bytes were equal, and the destination now maps the source's extents. The count is the kernel's claim, which may
    /// exceed what it did (Linux 4.19 and later report the length asked for); it proves progress only when it is not zero.
    Same(u64),
    /// The bytes differ; nothing was changed.
    Differs,
    /// The kernel refused this destination.
    Refused(Errno),
}

/// Compares `length` bytes of two files under lock and, if equal, makes the destination share the source's extents.
///
/// Offsets must be multiples of the filesystem's block size; so must `length`, unless both ranges end at their file's end.
/// Content, times, inode, links and mode of both files stay as they are.
///
/// # Errors
/// Returns the errno of the call itself, such as `ENOTTY` or `EOPNOTSUPP` where the filesystem cannot share extents. An errno that concerns
/// the destination alone is [`Deduped::Refused`].
pub fn dedupe_range(
    source: impl AsFd,
    source_offset: u64,
    destination: impl AsFd,
    destination_offset: u64,
    length: u64,
) -> Result<Deduped> {
    let mut range = OneDestination {
        src_offset: source_offset,
        src_length: length,
        dest_count: 1,
        reserved1: 0,
        reserved2: 0,
        info: file_dedupe_range_info {
            dest_fd: i64::from(destination.as_fd().as_raw_fd()),
            dest_offset: destination_offset,
            bytes_deduped: 0,
            status: 0,
            reserved: 0,
        },
    };
    // SAFETY: the structure is laid out as linux/fs.h has it, with `dest_count` destinations behind the header.
    unsafe { ioctl(source, Updater::<FIDEDUPERANGE, _>::new(&mut range)) }?;
    Ok(match range.info.status {
        0 => Deduped::Same(range.info.bytes_deduped),
        status if status < 0 => Deduped::Refused(Errno::from_raw_os_error(-status)),
        _ => Deduped::Differs,
    })
}

#[cfg(test)]
mod tests {
    use rustix::ioctl::opcode;

    use super::*;

    #[test]
    fn opcode_encodes_the_header_that_we_send() {
        let header = size_of::<OneDestination>() - size_of::<file_dedupe_range_info>();
        let expected = opcode::read_write::<[u8; 24]>(0x94, 54);
        assert_eq!((FIDEDUPERANGE, header), (expected, 24));
    }
}
