//! `FS_IOC_FIEMAP`: tells where the ranges of a file lie on disk. XFS answers exactly, and splits ranges where sharing begins or ends;
//! btrfs does neither.

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
/// `FIEMAP_FLAG_SYNC`: the kernel writes dirty data to disk before it answers.
const SYNC: u32 = 1;
const LAST: u32 = 0x1;
const UNKNOWN: u32 = 0x2;
const DELALLOC: u32 = 0x4;
const ENCODED: u32 = 0x8;
const NOT_ALIGNED: u32 = 0x100;
const INLINE: u32 = 0x200;
const UNWRITTEN: u32 = 0x800;
const SHARED: u32 = 0x2000;

/// A range of a file that is contiguous on disk. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileMapping {
    /// Its offset in the file.
    pub offset: u64,
    /// Its address on the device.
    pub address: u64,
    /// Its length.
    pub length: u64,
    /// Whether it was preallocated and never written, so that it reads as zeros.
    pub unwritten: bool,
    /// Whether another reference to the same blocks exists.
    pub shared: bool,
}

/// Calls `visit` with each range of a file that has blocks, in order.
///
/// # Errors
/// Returns the error of the call, and `EUCLEAN` if the answer makes no sense: a range that is not in blocks of its own, or one that
/// overlaps an earlier one.
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
            let has_own_blocks = entry.flags & (UNKNOWN | DELALLOC | ENCODED | NOT_ALIGNED | INLINE) == 0;
            if !has_own_blocks || entry.length == 0 || entry.logical < start {
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
