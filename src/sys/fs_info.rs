//! `BTRFS_IOC_FS_INFO`: identity and geometry of a mounted btrfs.

use std::os::fd::AsFd;

use linux_raw_sys::btrfs::btrfs_ioctl_fs_info_args;
use rustix::io::Result;
use rustix::ioctl::{Opcode, Updater, ioctl};

const BTRFS_IOC_FS_INFO: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_FS_INFO as Opcode;
/// `BTRFS_FS_INFO_FLAG_CSUM_INFO` (uapi/linux/btrfs.h): asks for the type and size of checksums; Linux 5.9 and later answer.
const FLAG_CSUM_INFO: u64 = 1;

/// What vmfold needs to know about a btrfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsInfo {
    /// The filesystem's UUID.
    pub uuid: [u8; 16],
    /// Bytes of a data block.
    pub sector_bytes: u32,
    /// `csum_type` of the superblock: 0 CRC32C, 1 xxhash64, 2 SHA-256, 3 `BLAKE2b`; none if the kernel is too old to say.
    pub checksum_type: Option<u16>,
    /// Bytes of one block's checksum.
    pub checksum_bytes: u16,
}

/// Asks the btrfs that `fd` lies on about itself.
///
/// # Errors
/// `ENOTTY` if it is not btrfs.
pub fn fs_info(fd: impl AsFd) -> Result<FsInfo> {
    // SAFETY: the structure is plain integers, for which all zeros are valid.
    let mut args: btrfs_ioctl_fs_info_args = unsafe { std::mem::zeroed() };
    args.flags = FLAG_CSUM_INFO;
    // SAFETY: the opcode takes a pointer to exactly this structure.
    unsafe { ioctl(fd, Updater::<BTRFS_IOC_FS_INFO, _>::new(&mut args)) }?;
    let answered = args.flags & FLAG_CSUM_INFO != 0;
    Ok(FsInfo {
        uuid: args.fsid,
        sector_bytes: args.sectorsize,
        checksum_type: answered.then_some(args.csum_type),
        checksum_bytes: if answered { args.csum_size } else { 0 },
    })
}
