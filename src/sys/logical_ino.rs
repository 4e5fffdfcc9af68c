//! `BTRFS_IOC_LOGICAL_INO_V2` and `BTRFS_IOC_INO_LOOKUP`: tell which inodes refer to an extent, those in snapshots included, and their
//! paths.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use linux_raw_sys::btrfs::{btrfs_ioctl_ino_lookup_args, btrfs_ioctl_logical_ino_args};
use rustix::io::Result;
use rustix::ioctl::{Opcode, Updater, ioctl};

const BTRFS_IOC_LOGICAL_INO_V2: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_LOGICAL_INO_V2 as Opcode;
const BTRFS_IOC_INO_LOOKUP: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_INO_LOOKUP as Opcode;
/// `BTRFS_LOGICAL_INO_ARGS_IGNORE_OFFSET` (uapi/linux/btrfs.h): the call returns references to any part of the extent, and not only to one
/// block.
const IGNORE_OFFSET: u64 = 1;
/// Sizes of the buffer in words, tried in turn: one is enough for most extents, and one is the most that the kernel fills (16 MiB).
const BUFFER_WORDS: [usize; 2] = [8 << 10, 2 << 20];
/// Words of the header of `struct btrfs_data_container`: two words of counters, before the values.
const CONTAINER_WORDS: usize = 2;

/// One reference to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The tree id of the subvolume.
    pub root: u64,
    /// The inode number in the subvolume.
    pub inode: u64,
    /// Byte offset in the file of the reference.
    pub offset: u64,
}

/// Returns the references to the extent that starts at logical address `address`; `None` if there are more than the largest buffer holds.
///
/// # Errors
/// Returns `ENOENT` if nothing refers to the extent, and `EPERM` without `CAP_SYS_ADMIN`.
pub fn holders(fd: impl AsFd, address: u64) -> Result<Option<Vec<Holder>>> {
    for words in BUFFER_WORDS {
        if let Some(holders) = holders_in(&fd, address, words)? {
            return Ok(Some(holders));
        }
    }
    Ok(None)
}

fn holders_in(fd: impl AsFd, address: u64, words: usize) -> Result<Option<Vec<Holder>>> {
    let mut buffer = vec![0u64; words];
    let mut args = btrfs_ioctl_logical_ino_args {
        logical: address,
        size: (words * 8) as u64,
        reserved: [0; 3],
        flags: IGNORE_OFFSET,
        inodes: buffer.as_mut_ptr() as u64,
    };
    // SAFETY: `inodes` points to `size` writable bytes that outlive the call.
    unsafe { ioctl(fd, Updater::<BTRFS_IOC_LOGICAL_INO_V2, _>::new(&mut args)) }?;
    // struct btrfs_data_container: bytes_left u32, bytes_missing u32, elem_cnt u32, elem_missed u32, val[].
    let [_, counts, values @ ..] = &buffer[..] else {
        return Ok(None);
    };
    let (count, missed) = ((counts & 0xffff_ffff) as usize, counts >> 32);
    if missed != 0 || count > words - CONTAINER_WORDS {
        return Ok(None);
    }
    Ok(Some(
        values[..count]
            .chunks_exact(3)
            .map(|entry| Holder {
                inode: entry[0],
                offset: entry[1],
                root: entry[2],
            })
            .collect(),
    ))
}

/// Returns the tree id of the subvolume that `fd` lies in.
///
/// # Errors
/// Returns `ENOTTY` on other filesystems.
pub fn subvolume_of(fd: impl AsFd) -> Result<u64> {
    /// `BTRFS_FIRST_FREE_OBJECTID`: the inode number of the root folder of every subvolume.
    const FIRST_FREE_OBJECT: u64 = 256;
    let mut args = lookup_args(0, FIRST_FREE_OBJECT);
    // SAFETY: the opcode takes a pointer to exactly this structure.
    unsafe { ioctl(fd, Updater::<BTRFS_IOC_INO_LOOKUP, _>::new(&mut args)) }?;
    Ok(args.treeid)
}

fn lookup_args(treeid: u64, objectid: u64) -> btrfs_ioctl_ino_lookup_args {
    btrfs_ioctl_ino_lookup_args {
        treeid,
        objectid,
        name: [0; 4080],
    }
}

/// Returns a path of `inode` in subvolume `root`, relative to that subvolume.
///
/// # Errors
/// Returns `ENOENT` if there is no such inode or path.
pub fn path_in_subvolume(fd: impl AsFd, root: u64, inode: u64) -> Result<PathBuf> {
    /// `BTRFS_INODE_REF_KEY`: the key's offset is the parent folder's inode. The data has an index (u64), a length (u16) and the name, for
    /// each link.
    const INODE_REF: u8 = 12;
    use super::tree_search::{FEW, Key, tree_search};
    let (mut parent, mut name) = (None, Vec::new());
    let key = |offset| Key {
        object: inode,
        kind: INODE_REF,
        offset,
    };
    tree_search::<FEW>(&fd, root, key(0), key(u64::MAX), |found, data| {
        if parent.is_none() && found.kind == INODE_REF {
            parent = Some(found.offset);
            let length = data
                .get(8..10)
                .map_or(0, |bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])));
            name = data.get(10..10 + length).unwrap_or_default().to_vec();
        }
        None
    })?;
    let parent = parent.ok_or(rustix::io::Errno::NOENT)?;
    Ok(path_of_folder(fd, root, parent)?.join(OsStr::from_bytes(&name)))
}

/// Returns the path of a folder, by its inode in subvolume `root`, relative to that subvolume.
///
/// # Errors
/// Returns `ENOENT` if there is no such inode.
pub fn path_of_folder(fd: impl AsFd, root: u64, inode: u64) -> Result<PathBuf> {
    let mut args = lookup_args(root, inode);
    // SAFETY: the opcode takes a pointer to exactly this structure.
    unsafe { ioctl(fd, Updater::<BTRFS_IOC_INO_LOOKUP, _>::new(&mut args)) }?;
    // The kernel ends the path with a slash.
    let path = args.name.iter().map(|byte| byte.cast_unsigned());
    let path: Vec<u8> = path.take_while(|byte| *byte != 0).collect();
    Ok(PathBuf::from(OsStr::from_bytes(&path)))
}
