//! `FS_IOC_GETFSMAP`: tells which file owns which blocks of an XFS that keeps a reverse map (`rmapbt`). It requires `CAP_SYS_ADMIN`.

use std::os::fd::AsFd;

use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// `struct fsmap` (uapi/linux/fsmap.h).
#[repr(C)]
#[derive(Clone, Copy)]
struct FsmapRecord {
    device: u32,
    flags: u32,
    physical: u64,
    owner: u64,
    offset: u64,
    length: u64,
    reserved: [u64; 3],
}

/// `struct fsmap_head`.
#[repr(C)]
struct FsmapHeader {
    flags_in: u32,
    flags_out: u32,
    count: u32,
    entries: u32,
    reserved: [u64; 6],
    keys: [FsmapRecord; 2],
}

const RECORDS: u32 = 1024;

#[repr(C)]
struct FsmapRequest {
    header: FsmapHeader,
    records: [FsmapRecord; RECORDS as usize],
}

const FS_IOC_GETFSMAP: Opcode = opcode::read_write::<FsmapHeader>(b'X', 59);
const OF_SHARED: u32 = 0x8;
const OF_SPECIAL_OWNER: u32 = 0x10;
const OF_LAST: u32 = 0x20;
/// `FMR_OWN_FREE` and `FMR_OWN_UNKNOWN`: the only owners that the kernel reports where it does not want to name any.
const NO_OWNERS: [u64; 2] = [1, 2];

/// Data blocks of a file that other files refer to as well. All numbers are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedBlocks {
    /// Their address on the device.
    pub address: u64,
    /// Their length.
    pub length: u64,
    /// The inode number of one of the files that refer to them.
    pub inode: u64,
}

/// Calls `visit` with all shared blocks on the filesystem's first device, once for each file that refers to them.
///
/// # Errors
/// Returns the error of the call: `EOPNOTSUPP` or `ENOTTY` where the filesystem does not know it. Returns `EPERM` if the kernel names no
/// owners: without `CAP_SYS_ADMIN` it answers from the map of free space (kernel: `xfs_getfsmap`).
pub fn shared_blocks(fd: impl AsFd, mut visit: impl FnMut(SharedBlocks)) -> Result<()> {
    // SAFETY: the structure is plain integers, for which all zeros are valid.
    let mut request: Box<FsmapRequest> = unsafe { Box::new(std::mem::zeroed()) };
    request.header.keys[1] = FsmapRecord {
        device: u32::MAX,
        flags: u32::MAX,
        physical: u64::MAX,
        owner: u64::MAX,
        offset: u64::MAX,
        length: 0,
        reserved: [0; 3],
    };
    let (mut device, mut has_owners) = (None, false);
    loop {
        request.header.count = RECORDS;
        // SAFETY: the opcode takes a pointer to the header, and writes at most `count` records behind it.
        unsafe { ioctl(&fd, Updater::<FS_IOC_GETFSMAP, _>::new(&mut *request)) }?;
        let answered = request.header.entries.min(RECORDS) as usize;
        let Some(last) = request.records[..answered].last().copied() else {
            return if has_owners { Ok(()) } else { Err(Errno::PERM) };
        };
        for record in &request.records[..answered] {
            // With owners, the filesystem's own headers are always among the answers.
            has_owners |= record.flags & OF_SPECIAL_OWNER == 0 || !NO_OWNERS.contains(&record.owner);
            // A log or real-time device comes after the one that data lies on.
            if *device.get_or_insert(record.device) == record.device
                && record.flags & (OF_SHARED | OF_SPECIAL_OWNER) == OF_SHARED
            {
                visit(SharedBlocks {
                    address: record.physical,
                    length: record.length,
                    inode: record.owner,
                });
            }
        }
        if last.flags & OF_LAST != 0 {
            return if has_owners { Ok(()) } else { Err(Errno::PERM) };
        }
        // The kernel continues after a record that it is given back as the lower key.
        let key = |record: &FsmapRecord| (record.device, record.physical, record.owner, record.offset);
        if key(&last) < key(&request.header.keys[0]) {
            return Err(Errno::UCLEAN);
        }
        request.header.keys[0] = last;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout_is_the_kernels() {
        assert_eq!((size_of::<FsmapHeader>(), size_of::<FsmapRecord>()), (192, 64));
        assert_eq!(FS_IOC_GETFSMAP, 0xc0c0_583b);
    }
}
