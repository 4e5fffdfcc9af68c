//! `FS_IOC_FIEMAP`: where the ranges of a file lie on disk. XFS answers exactly, split where sharing begins or ends; btrfs does not.

use std::os::fd::AsFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `struct fiemap` and `struct fiemap_extent` (uapi/linux/fiemap.h).
#[repr(C)]
struct FiemapHeader {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const ENTRIES: u32 = 1024;

#[repr(C)]
struct FiemapRequest {
    header: FiemapHeader,
    entries: [FiemapExtent; ENTRIES as usize],
}

const FS_IOC_FIEMAP: Opcode = opcode::read_write::<FiemapHeader>(b'f', 11);
/// `FIEMAP_FLAG_SYNC`: what is not on disk yet is put there first.
const SYNC: u32 = 1;
const LAST: u32 = 0x1;
const UNKNOWN: u32 = 0x2;
const DELALLOC: u32 = 0x4;
const ENCODED: u32 = 0x8;
const NOT_ALIGNED: u32 = 0x100;
const INLINE: u32 = 0x200;
const UNWRITTEN: u32 = 0x800;
const SHARED: u32 = 0x2000;

/// A range of a file that lies in one piece on disk. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMapping {
    /// Where it begins in the file.
    pub offset: u64,
    /// Where it begins on the device.
    pub address: u64,
    /// Its length.
    pub length: u64,
    /// Whether it was allocated and never written, so that it reads as zeros.
    pub unwritten: bool,
    /// Whether something else refers to the same blocks.
    pub shared: bool,
}

/// Calls `visit` with each range of a file that has blocks, in order.
///
/// # Errors
/// Those of the system call; `EUCLEAN` if the answer makes no sense: a range that is not in blocks of its own, or one that was
/// answered before.
pub fn fiemap(fd: impl AsFd, mut visit: impl FnMut(FileMapping)) -> Result<()> {
    // SAFETY: the structure is plain integers, for which all zeros are valid.
    let mut request: Box<FiemapRequest> = unsafe { Box::new(std::mem::zeroed()) };
    let mut start = 0;
    loop {
        request.header = FiemapHeader {
            start,
            length: u64::MAX - start,
            flags: SYNC,
            mapped_extents: 0,
            extent_count: ENTRIES,
            reserved: 0,
        };
        // SAFETY: the opcode takes a pointer to the header, and writes at most `extent_count` entries behind it.
        unsafe { ioctl(&fd, Updater::<FS_IOC_FIEMAP, _>::new(&mut *request)) }?;
        let answered = request.header.mapped_extents.min(ENTRIES) as usize;
        for entry in &request.entries[..answered] {
            let end = entry.logical.checked_add(entry.length).ok_or(Errno::UCLEAN)?;
            let understood = entry.flags & (UNKNOWN | DELALLOC | ENCODED | NOT_ALIGNED | INLINE) == 0;
            if !understood || entry.length == 0 || entry.logical < start {
                return Err(Errno::UCLEAN);
            }
            start = end;
            visit(FileMapping {
                offset: entry.logical,
                address: entry.physical,
                length: entry.length,
                unwritten: entry.flags & UNWRITTEN != 0,
                shared: entry.flags & SHARED != 0,
            });
            if entry.flags & LAST != 0 {
                return Ok(());
            }
        }
        if answered == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_kernels() {
        assert_eq!((size_of::<FiemapHeader>(), size_of::<FiemapExtent>()), (32, 56));
        assert_eq!(FS_IOC_FIEMAP, 0xc020_660b);
    }
}
