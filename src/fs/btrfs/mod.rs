//! btrfs: it frees extents as a whole, and keeps checksums of data. Both are read from its trees.

mod background;
mod checksums;
mod holders;
mod images_holding;
mod map;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::{IFlags, XattrFlags};
use rustix::io::Errno;

pub(super) use images_holding::images_holding;

use super::opened::{Leases, Opened, Specifics, reads_opened, shares_opened};
use super::{ExtentReference, Filesystem, ImageInfo, PoolMap, Purpose, ShareOutcome, SourceFile, kernel};
use crate::block::{BLOCK_LEN, SlotSet};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::facts::{Class, Compression, Facts};
use crate::fingerprint::FingerprintFunction;
use crate::monitor::Monitor;
use crate::numbers::{DonorId, ImageId};
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::spill::{Budget, SpillVec};
use crate::sys::encoded_write::write_frame;
use crate::sys::fs_info::{FsInfo, fs_info};
use crate::sys::inode_flags::{add_inode_flags, inode_flags, remove_inode_flags};
use crate::sys::logical_ino;
use crate::sys::tree_search::{FEW, Key, MANY, tree_search};

/// Tree ids and item types (btrfs-progs, `Documentation/dev/On-disk-format.rst`).
const EXTENT_TREE: u64 = 2;
const CHECKSUM_TREE: u64 = 7;
const ROOT_TREE: u64 = 1;
const INODE_ITEM: u8 = 1;
const EXTENT_DATA: u8 = 108;
const EXTENT_CSUM: u8 = 128;
const ROOT_ITEM: u8 = 132;
const EXTENT_ITEM: u8 = 168;
/// `BTRFS_EXTENT_CSUM_OBJECTID`: -10.
const CHECKSUM_OBJECT: u64 = u64::MAX - 9;

/// The open images of a pool on a btrfs.
#[derive(Debug)]
pub(super) struct Btrfs {
    info: FsInfo,
    /// `csum_type` of the superblock; `None` if the kernel does not tell.
    checksum_type: Option<u16>,
    /// Bytes of a block's checksum; 0 if the kernel does not tell.
    checksum_bytes: u16,
    opened: Opened,
    /// Whether the kernel takes compressed extents as they are; it is tried when the first one is to be written.
    takes_frames: OnceLock<bool>,
}

impl Btrfs {
    /// Opens the images of a pool, and returns which of them are left alone. Where the kernel does not tell the type of checksums, it is
    /// `None` and their size is 0.
    ///
    /// # Errors
    /// Returns [`Error::NotRoot`] without root, and the errors of [`Opened::open`].
    pub(super) fn open(
        found: &[FoundImage],
        first: &NamedPath,
        info: FsInfo,
        purpose: Purpose,
        (checksum_type, checksum_bytes): (Option<u16>, u16),
        monitor: &dyn Monitor,
    ) -> Result<(Self, Vec<Skipped>)> {
        if !rustix::process::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        let specifics = Specifics {
            uuid: info.uuid,
            verdict: kernel::with_btrfs(kernel::release()),
            contains: &|file| fs_info(file).is_ok_and(|found| found == info),
            root_of: |file| logical_ino::subvolume_of(file).map(Some),
            is_checksummed: |file, inode| Ok(!has_no_checksums(file, inode)?),
            set_up: set_class,
            leases: Leases::Always,
        };
        let settle = |is_writable| background::settle(&first.folder, info.uuid, is_writable, monitor);
        let (opened, skipped) = Opened::open(found, first, purpose, &specifics, settle)?;
        let fs = Self {
            info,
            checksum_type,
            checksum_bytes,
            opened,
            takes_frames: OnceLock::new(),
        };
        Ok((fs, skipped))
    }

    fn search(&self, tree: u64, first: Key, last: Key, visit: impl FnMut(Key, &[u8]) -> Option<Key>) -> Result<()> {
        let scratch = &self.opened.scratch;
        tree_search::<MANY>(scratch.folder(), tree, first, last, visit)
            .map_err(Error::io("read the extent map of", scratch.path()))
    }

    /// Tries to write a frame to a file that vanishes at once.
    fn try_frame(&self) -> Result<()> {
        let packer = crate::frame::Packer::default();
        let content = [0; 2 * BLOCK_LEN];
        let frame = packer
            .compressor()
            .and_then(|mut compressor| packer.pack(&mut compressor, &content));
        let frame = frame.ok().flatten().unwrap_or_default();
        let scratch = &self.opened.scratch;
        let written = write_frame(&scratch.unnamed_file()?, 0, &frame, content.len() as u64);
        written.map_err(|errno| scratch.donor_error(errno.into()))
    }
}

impl Filesystem for Btrfs {
    reads_opened!();

    shares_opened!();

    fn kind_name(&self) -> &'static str {
        "btrfs"
    }

    fn uuid(&self) -> [u8; 16] {
        self.info.uuid
    }

    fn function(&self) -> FingerprintFunction {
        match self.checksum_type {
            Some(1) => FingerprintFunction::Xxhash64,
            _ => FingerprintFunction::Crc32c,
        }
    }

    fn frees_blocks(&self) -> bool {
        false
    }

    fn compresses(&self) -> bool {
        true
    }

    fn shortcomings(&self) -> Vec<String> {
        kernel::with_btrfs(kernel::release()).note().into_iter().collect()
    }

    fn has_read_only_snapshots(&self) -> Result<bool> {
        self.have_read_only_snapshots()
    }

    fn map(&self, budget: &Budget) -> Result<PoolMap> {
        self.read_map(budget)
    }

    fn sees_all_holders(&self) -> bool {
        true
    }

    fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>> {
        Ok(self.find_names_of_holders(facts))
    }

    fn has_usable_checksums(&self) -> bool {
        matches!((self.checksum_type, self.checksum_bytes), (Some(0), 4) | (Some(1), 8))
    }

    fn fingerprints_from_checksums(&self, facts: &mut Facts, known: &mut SlotSet) -> Result<()> {
        checksums::fingerprints_from_checksums(self, facts, known)
    }

    fn checksum_digests(&self, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
        checksums::checksum_digests(self, facts)
    }

    fn takes_frames(&self) -> bool {
        *self.takes_frames.get_or_init(|| self.try_frame().is_ok())
    }

    fn is_allocated(&self, address: u64, generation: u64) -> Result<bool> {
        let mut found = false;
        let key = |offset| Key {
            object: address,
            kind: EXTENT_ITEM,
            offset,
        };
        let scratch = &self.opened.scratch;
        tree_search::<FEW>(scratch.folder(), EXTENT_TREE, key(0), key(u64::MAX), |key, item| {
            found |=
                key.object == address && map::extent_item(item).is_some_and(|extent| extent.generation == generation);
            None
        })
        .map_err(Error::io("read the extent tree of", scratch.path()))?;
        Ok(found)
    }

    fn ranges_in(&self, image: ImageId, addresses: &BTreeSet<u64>) -> Result<Vec<ExtentReference>> {
        map::ranges_in(self.opened.image(image), addresses)
    }
}

/// `FS_NOCOMP_FL` (uapi/linux/fs.h): the filesystem does not compress this file.
const NOCOMP: IFlags = IFlags::from_bits_retain(0x400);

/// Sets up a new, empty file so that its blocks can be shared with files of a class, and are stored alike.
fn set_class(file: &File, class: Class) -> rustix::io::Result<()> {
    if !class.checksummed {
        return add_inode_flags(file, IFlags::NOCOW);
    }
    // A new file inherits NOCOW and the compression of its folder.
    if inode_flags(file)?.contains(IFlags::NOCOW) {
        remove_inode_flags(file, IFlags::NOCOW)?;
    }
    let property: &[u8] = match class.compression {
        Compression::None => return add_inode_flags(file, NOCOMP),
        Compression::Zlib => b"zlib",
        Compression::Lzo => b"lzo",
        Compression::Zstd => b"zstd",
    };
    rustix::fs::fsetxattr(file, "btrfs.compression", property, XattrFlags::empty())
}

/// Whether the inode has `BTRFS_INODE_NODATASUM`: bit 0 of the flags of the inode item, at byte 64.
///
/// # Errors
/// Returns the error of the tree search, and `EUCLEAN` if the tree has no inode item.
fn has_no_checksums(file: &File, inode: u64) -> rustix::io::Result<bool> {
    const FLAGS_AT: usize = 64;
    let key = Key {
        object: inode,
        kind: INODE_ITEM,
        offset: 0,
    };
    let mut flags = None;
    tree_search::<FEW>(file, 0, key, key, |_, item| {
        flags = item
            .get(FLAGS_AT..FLAGS_AT + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_le_bytes);
        None
    })?;
    flags.map(|flags| flags & 1 != 0).ok_or(Errno::UCLEAN)
}
