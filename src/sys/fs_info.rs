//! Information that a filesystem gives about itself: `BTRFS_IOC_FS_INFO`, `XFS_IOC_FSGEOMETRY`, `FS_IOC_FSGETXATTR`.

use std::os::fd::AsFd;

use linux_raw_sys::btrfs::btrfs_ioctl_fs_info_args;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

const BTRFS_IOC_FS_INFO: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_FS_INFO as Opcode;
/// `BTRFS_FS_INFO_FLAG_CSUM_INFO` (uapi/linux/btrfs.h): asks for the type and size of checksums; Linux 5.9 and later answer.
const FLAG_CSUM_INFO: u64 = 1;

/// The kind of a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilesystemKind {
    /// btrfs frees an extent once nothing refers to any part of it, and keeps checksums of data.
    Btrfs {
        /// `csum_type` of the superblock: 0 is CRC32C, 1 xxhash64, 2 SHA-256, 3 `BLAKE2b`. It is `None` if the kernel is too old to tell.
        checksum_type: Option<u16>,
        /// Bytes of one block's checksum; 0 if the kernel is too old to tell.
        checksum_bytes: u16,
    },
    /// XFS frees each block on its own, and keeps no checksums of data.
    Xfs {
        /// Whether files can share blocks.
        reflinks: bool,
        /// Whether it keeps a reverse map (`rmapbt`), which tells the files that share a block.
        reverse_map: bool,
    },
}

/// What vmfold needs to know about a filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsInfo {
    /// Its kind.
    pub kind: FilesystemKind,
    /// The filesystem's UUID.
    pub uuid: [u8; 16],
    /// The device number of an XFS, since two copies of one may be mounted. It is 0 for a btrfs, whose subvolumes have device numbers of
    /// their own.
    pub device: u64,
    /// Bytes of a data block.
    pub block_bytes: u32,
}

/// Returns information about the filesystem that `fd` lies on.
///
/// # Errors
/// Returns `ENOTTY` if the filesystem is neither btrfs nor XFS, and otherwise the error of the call.
pub fn fs_info(fd: impl AsFd) -> Result<FsInfo> {
    match btrfs_info(&fd) {
        Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP) => xfs_info(fd),
        answered => answered,
    }
}

fn btrfs_info(fd: impl AsFd) -> Result<FsInfo> {
    // SAFETY: the structure is plain integers, for which all zeros are valid.
    let mut args: btrfs_ioctl_fs_info_args = unsafe { std::mem::zeroed() };
    args.flags = FLAG_CSUM_INFO;
    // SAFETY: the opcode takes a pointer to exactly this structure.
    unsafe { ioctl(fd, Updater::<BTRFS_IOC_FS_INFO, _>::new(&mut args)) }?;
    let answered = args.flags & FLAG_CSUM_INFO != 0;
    Ok(FsInfo {
        kind: FilesystemKind::Btrfs {
            checksum_type: answered.then_some(args.csum_type),
            checksum_bytes: if answered { args.csum_size } else { 0 },
        },
        uuid: args.fsid,
        device: 0,
        block_bytes: args.sectorsize,
    })
}

/// `struct xfs_fsop_geom_v4` (xfsprogs, `libxfs/xfs_fs.h`), as kernels of all ages answer it.
#[repr(C)]
#[derive(Default)]
struct Geometry {
    block_bytes: u32,
    sizes: [u32; 7],
    counts: [u64; 4],
    uuid: [u8; 16],
    stripe: [u32; 2],
    version: i32,
    flags: u32,
    others: [u32; 4],
}

const XFS_IOC_FSGEOMETRY_V4: Opcode = opcode::read::<Geometry>(b'X', 124);
const XFS_FSOP_GEOM_FLAGS_RMAPBT: u32 = 1 << 19;
const XFS_FSOP_GEOM_FLAGS_REFLINK: u32 = 1 << 20;

fn xfs_info(fd: impl AsFd) -> Result<FsInfo> {
    let mut geometry = Geometry::default();
    // SAFETY: the opcode takes a pointer to exactly this structure, plain integers all of them.
    unsafe { ioctl(&fd, Updater::<XFS_IOC_FSGEOMETRY_V4, _>::new(&mut geometry)) }?;
    Ok(FsInfo {
        kind: FilesystemKind::Xfs {
            reflinks: geometry.flags & XFS_FSOP_GEOM_FLAGS_REFLINK != 0,
            reverse_map: geometry.flags & XFS_FSOP_GEOM_FLAGS_RMAPBT != 0,
        },
        uuid: geometry.uuid,
        device: rustix::fs::fstat(fd)?.st_dev,
        block_bytes: geometry.block_bytes,
    })
}

/// `struct fsxattr` (uapi/linux/fs.h).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    others: [u32; 4],
    padding: [u8; 8],
}

const FS_IOC_FSGETXATTR: Opcode = opcode::read::<Attributes>(b'X', 31);
const FS_XFLAG_REALTIME: u32 = 1;

/// Whether a file's data lies on the real-time device of its XFS, which has an address space of its own.
///
/// # Errors
/// Returns the error of the call.
pub fn is_realtime(fd: impl AsFd) -> Result<bool> {
    let mut attributes = Attributes::default();
    // SAFETY: the opcode takes a pointer to exactly this structure, plain integers all of them.
    unsafe { ioctl(fd, Updater::<FS_IOC_FSGETXATTR, _>::new(&mut attributes)) }?;
    Ok(attributes.flags & FS_XFLAG_REALTIME != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!((size_of::<Geometry>(), size_of::<Attributes>()), (112, 28));
        assert_eq!((XFS_IOC_FSGEOMETRY_V4, FS_IOC_FSGETXATTR), (0x8070_587c, 0x801c_581f));
    }
}
