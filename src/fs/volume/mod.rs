//! A pool on a mounted filesystem, with its images open: btrfs, with extents and checksums from its trees, or XFS, with extents from
//! its maps. Both share by `FIDEDUPERANGE`.

mod accounting;
mod btrfs;
mod checksums;
mod holders;
mod images;
mod kernel;
mod locks;
mod upheaval;
mod watch;
mod xfs;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{Advice, FallocateFlags, IFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

pub use accounting::{freed_bytes, physical_bytes};
pub use checksums::{checksum_digests, fingerprints_from_checksums};
pub use images::{Image, Purpose};

use kernel::Verdict;

use super::{HeldRange, Outcome, Sharing, SourceFile};
use crate::block::{BLOCK_BYTES, BLOCK_LEN, Slot, bytes};
use crate::error::{Error, Result};
use crate::facts::{Class, Compression, Facts, ImageId, Proof, proof_of};
use crate::fingerprint::Function;
use crate::monitor::Monitor;
use crate::pool::users::FileId;
use crate::pool::{Found, Named, Skipped};
use crate::spill::{Budget, SpillVec};
use crate::sys::beneath::Folder;
use crate::sys::clone::clone_range;
use crate::sys::dedupe::{Deduped, dedupe_range};
use crate::sys::encoded_write::write_frame;
use crate::sys::fs_info::{FsInfo, Kind, fs_info};
use crate::sys::inode_flags::{add_inode_flags, inode_flags, remove_inode_flags};
use crate::sys::readahead::{readahead, write_out};
use crate::sys::tree_search::{FEW, Key, MANY, tree_search};

/// Trees and item types (btrfs-progs, `Documentation/dev/On-disk-format.rst`).
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

/// What is known of where images lie on disk.
#[derive(Debug)]
pub struct Mapped {
    /// Extents and references.
    pub facts: Facts,
    /// Bytes that lie in metadata, beside their inodes.
    pub inline_bytes: u64,
    /// The images that have such bytes, in their first block.
    pub inline: Vec<ImageId>,
    /// Images that have space of their own beyond their ends, with the bytes on disk.
    pub beyond: Vec<(ImageId, u64)>,
}

/// A pool on one filesystem, with its images open.
#[derive(Debug)]
pub struct Volume {
    info: FsInfo,
    images: Vec<Image>,
    /// Files that were found and are left alone.
    left_alone: BTreeMap<FileId, PathBuf>,
    /// A folder on the filesystem where donors are made; they have no name there.
    scratch: Folder,
    /// Its path, for messages.
    scratch_path: PathBuf,
    donors: Mutex<Vec<Donor>>,
    holes: Mutex<[Option<std::sync::Arc<File>>; 2]>,
    /// Whether the kernel takes compressed extents as they are; asked when the first are to be written.
    takes_frames: OnceLock<bool>,
    /// Whether the kernel named the owners of an XFS's blocks; told when it was mapped.
    names_owners: OnceLock<bool>,
    _watch: Option<watch::Watch>,
    _run_lock: File,
}

/// Blocks to be read that lie near each other in an image, in the order of their slots.
struct Stretch<'a> {
    image: ImageId,
    /// Where the first of them lies in the image.
    first_block: u32,
    /// At least one.
    slots: &'a [Slot],
}

impl Stretch<'_> {
    fn file(&self) -> SourceFile {
        SourceFile::Image(self.image)
    }

    fn last_slot(&self) -> Slot {
        self.slots[self.slots.len() - 1]
    }

    /// Blocks, those between them included.
    fn blocks(&self) -> u32 {
        self.last_slot() - self.slots[0] + 1
    }

    fn offset(&self) -> u64 {
        bytes(self.first_block)
    }

    fn length(&self) -> u64 {
        bytes(self.blocks())
    }
}

#[derive(Debug)]
struct Donor {
    file: std::sync::Arc<File>,
    length: u64,
    compression: Compression,
}

impl Volume {
    /// Opens the images of a pool, and says which it leaves alone. Data in flight is on disk afterwards.
    ///
    /// # Errors
    /// Off btrfs and XFS with reflinks, on btrfs without root, or where images lie on two filesystems.
    pub fn open(
        found: &[Found],
        named: &[Named],
        purpose: Purpose,
        monitor: &dyn Monitor,
    ) -> Result<(Self, Vec<Skipped>)> {
        let (info, first) = same_filesystem(named)?;
        if matches!(info.kind, Kind::Btrfs { .. }) && !rustix::process::geteuid().is_root() {
            return Err(Error::NotRoot);
        }
        let mount = rustix::fs::fstatvfs(&first.folder).map_err(Error::io("look at", &first.root))?;
        let is_writable = !mount.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
        if purpose == Purpose::Change {
            let release = kernel::release();
            if kernel::verdict(release, info.kind) == Verdict::Refuse {
                return Err(Error::Kernel { release });
            }
            if !is_writable {
                return Err(Error::ReadOnly {
                    path: first.root.clone(),
                });
            }
        }
        // Before any image is opened, which would break the leases of another run.
        let run_lock = locks::lock_filesystem(&info, purpose, &first.root)?;
        if purpose.shares() && matches!(info.kind, Kind::Btrfs { .. }) {
            upheaval::settle(&first.folder, info.uuid, is_writable, monitor);
        }
        let opened = images::open(found, &info, purpose, || {
            rustix::fs::syncfs(&first.folder).map_err(Error::io("sync the filesystem of", &first.root))
        })?;
        let for_donors = (purpose == Purpose::Change)
            .then(|| folder_for_donors(found, &opened.images, &info))
            .flatten();
        let (scratch, scratch_path) = for_donors.unwrap_or_else(|| (first.folder.clone(), first.root.clone()));
        let volume = Self {
            info,
            images: opened.images,
            left_alone: opened.left_alone,
            scratch,
            scratch_path,
            donors: Mutex::default(),
            holes: Mutex::default(),
            takes_frames: OnceLock::new(),
            names_owners: OnceLock::new(),
            _watch: opened.watch,
            _run_lock: run_lock,
        };
        Ok((volume, opened.skipped))
    }

    /// The images, by their numbers.
    pub fn images(&self) -> &[Image] {
        &self.images
    }

    /// What the user should know of the running kernel and of what cannot be seen here.
    pub fn shortcomings(&self) -> Vec<String> {
        let mut found = Vec::new();
        if let Verdict::Warn(fault) = kernel::verdict(kernel::release(), self.info.kind) {
            found.push(format!("This kernel has a known fault: {fault}"));
        }
        if !self.sees_all_holders() {
            let why = match self.info.kind {
                Kind::Xfs { reverse_map: true, .. } => "Without the capability CAP_SYS_ADMIN (run it as root),",
                _ => "This XFS has no reverse map (mkfs.xfs -m rmapbt=1):",
            };
            found.push(format!(
                "{why} blocks that other files share with several of the images look as if they could be freed; \
                 what was freed is then told by the filesystem's free space"
            ));
        }
        found
    }

    /// Whether there are read-only snapshots of what images lie in, which `btrfs send` may read.
    ///
    /// # Errors
    /// Those of reading metadata.
    pub fn may_be_sent(&self) -> Result<bool> {
        match self.info.kind {
            Kind::Btrfs { .. } => self.have_read_only_snapshots(),
            Kind::Xfs { .. } => Ok(false),
        }
    }

    /// Whether it can be told of every block whether something outside the pool refers to it. Of an XFS that is known once it was mapped.
    pub fn sees_all_holders(&self) -> bool {
        match self.info.kind {
            Kind::Btrfs { .. } => true,
            Kind::Xfs { .. } => self.names_owners.get().is_some_and(|named| *named),
        }
    }

    /// A folder on the filesystem, for messages.
    pub fn folder(&self) -> &Path {
        &self.scratch_path
    }

    /// The filesystem's UUID.
    pub fn uuid(&self) -> [u8; 16] {
        self.info.uuid
    }

    /// The function that fingerprints are made with.
    pub fn function(&self) -> Function {
        match self.info.kind {
            Kind::Btrfs {
                checksum_type: Some(1), ..
            } => Function::Xxhash64,
            _ => Function::Crc32c,
        }
    }

    /// Whether it frees each block on its own, and not only extents as a whole.
    pub fn frees_blocks(&self) -> bool {
        matches!(self.info.kind, Kind::Xfs { .. })
    }

    /// Bytes of the checksum of a block, 0 where there is none.
    fn checksum_bytes(&self) -> usize {
        match self.info.kind {
            Kind::Btrfs { checksum_bytes, .. } => checksum_bytes.into(),
            Kind::Xfs { .. } => 0,
        }
    }

    /// Reads the extent maps of all images, into lists that are made from a budget.
    ///
    /// # Errors
    /// Those of reading metadata, or if it makes no sense.
    pub fn map(&self, budget: &Budget) -> Result<Mapped> {
        match self.info.kind {
            Kind::Btrfs { .. } => self.map_btrfs(budget),
            Kind::Xfs { reverse_map, .. } => self.map_xfs(reverse_map, budget),
        }
    }

    /// Names of files that hold extents and are none of the images that are worked on, the largest extents first, with the bytes
    /// they hold.
    ///
    /// # Errors
    /// Those of reading metadata.
    pub fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>> {
        match self.info.kind {
            Kind::Btrfs { .. } => Ok(self.names_of_holders_btrfs(facts)),
            Kind::Xfs { reverse_map, .. } => self.names_of_holders_xfs(facts, reverse_map),
        }
    }

    /// Whether the filesystem's own checksums begin with that function's fingerprint.
    pub fn has_usable_checksums(&self) -> bool {
        matches!(
            self.info.kind,
            Kind::Btrfs {
                checksum_type: Some(0),
                checksum_bytes: 4
            } | Kind::Btrfs {
                checksum_type: Some(1),
                checksum_bytes: 8
            }
        )
    }

    /// Closes all donors: what of them no image shares is free from the next commit on.
    ///
    /// # Errors
    /// Those of the commit.
    pub fn close_donors(&self) -> Result<()> {
        lock(&self.donors).clear();
        self.sync()
    }

    /// Reads blocks and says what they hold. Those that lie near each other are read together.
    ///
    /// # Errors
    /// If no image reaches one of them, or [`Error::Interrupted`].
    pub fn prove(&self, facts: &Facts, slots: &[Slot], monitor: &dyn Monitor) -> Result<SpillVec<(Slot, Proof)>> {
        use rayon::prelude::*;
        /// Blocks asked for at a time, far from each other, which a device reads best when it knows of many.
        const AHEAD: usize = 512;
        /// Blocks that are read before what they hold is put where there is room for it.
        const AT_ONCE: usize = 128 * AHEAD;
        let read_all = |slots: &[Slot]| -> Result<Vec<(Slot, Proof)>> {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let stretches = self.stretches(facts, slots)?;
            for stretch in &stretches {
                self.read_ahead(stretch.file(), stretch.offset(), stretch.length());
            }
            let mut proofs = Vec::with_capacity(slots.len());
            let mut buffer = Vec::new();
            for stretch in &stretches {
                self.prove_stretch(stretch, &mut buffer, &mut proofs);
            }
            Ok(proofs)
        };
        let mut proofs = SpillVec::with_capacity_in(slots.len(), facts.budget());
        for slots in slots.chunks(AT_ONCE) {
            let read: Result<Vec<Vec<_>>> = slots.par_chunks(AHEAD).map(read_all).collect();
            proofs.extend(read?.into_iter().flatten());
        }
        Ok(proofs)
    }

    /// Where blocks are to be read, as few stretches as it takes.
    fn stretches<'a>(&self, facts: &Facts, slots: &'a [Slot]) -> Result<Vec<Stretch<'a>>> {
        /// Blocks between two wanted ones that take less time to be read than another call does.
        const GAP_BLOCKS_MAX: u32 = 8;
        /// Blocks of a stretch at most, 1 MiB.
        const BLOCKS_MAX: u32 = 256;
        let mut stretches: Vec<Stretch<'a>> = Vec::new();
        for (at, slot) in slots.iter().enumerate() {
            let place = facts.place_of(*slot..slot + 1).ok_or_else(|| Error::Metadata {
                path: self.scratch_path.clone(),
                problem: format!("no image reaches block {slot}"),
            })?;
            if let Some(last) = stretches.last_mut() {
                let end = last.first_block + last.blocks();
                let goes_on = last.image == place.image
                    && *slot > last.last_slot()
                    && place.file_block.checked_sub(last.first_block) == slot.checked_sub(last.slots[0])
                    && place.file_block - end <= GAP_BLOCKS_MAX
                    && place.file_block - last.first_block < BLOCKS_MAX;
                if goes_on {
                    last.slots = &slots[at - last.slots.len()..=at];
                    continue;
                }
            }
            stretches.push(Stretch {
                image: place.image,
                first_block: place.file_block,
                slots: &slots[at..=at],
            });
        }
        Ok(stretches)
    }

    fn prove_stretch(&self, stretch: &Stretch<'_>, buffer: &mut Vec<u8>, proofs: &mut Vec<(Slot, Proof)>) {
        let blocks = stretch.blocks() as usize;
        buffer.resize(blocks * BLOCK_LEN, 0);
        let first = stretch.slots[0];
        if self.read(stretch.file(), stretch.offset(), buffer).is_ok() {
            proofs.extend(stretch.slots.iter().map(|slot| {
                let at = (slot - first) as usize * BLOCK_LEN;
                (*slot, proof_of(&buffer[at..at + BLOCK_LEN]))
            }));
            return;
        }
        for slot in stretch.slots {
            let block = &mut buffer[..BLOCK_LEN];
            let read = self.read(stretch.file(), stretch.offset() + bytes(slot - first), block);
            // A block that cannot be read is proved equal to none.
            proofs.push((
                *slot,
                read.map_or_else(|_| proof_of(&slot.to_le_bytes()), |()| proof_of(block)),
            ));
        }
    }

    /// Makes a range of a new file share a range of an image.
    ///
    /// # Errors
    /// Those of [`clone_range`].
    pub fn clone_from_image(
        &self,
        image: ImageId,
        offset: u64,
        file: &File,
        file_offset: u64,
        length: u64,
    ) -> rustix::io::Result<()> {
        clone_range(&*self.images[image as usize].file, offset, file, file_offset, length)
    }

    fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.scratch).map_err(Error::io("sync the filesystem of", &self.scratch_path))
    }

    fn search(&self, tree: u64, first: Key, last: Key, visit: impl FnMut(Key, &[u8]) -> Option<Key>) -> Result<()> {
        tree_search::<MANY>(&self.scratch, tree, first, last, visit)
            .map_err(Error::io("read the extent map of", &self.scratch_path))
    }

    fn unnamed_file(&self) -> Result<File> {
        unnamed_file_in(&self.scratch).map_err(|errno| self.donor_error(errno.into()))
    }

    /// Writes a frame to a file that vanishes at once.
    fn try_frame(&self) -> Result<()> {
        let packer = crate::frame::Packer::default();
        let content = [0; 2 * BLOCK_LEN];
        let frame = packer
            .compressor()
            .and_then(|mut compressor| packer.pack(&mut compressor, &content));
        let frame = frame.ok().flatten().unwrap_or_default();
        let written = write_frame(&self.unnamed_file()?, 0, &frame, content.len() as u64);
        written.map_err(|errno| self.donor_error(errno.into()))
    }

    /// A file without data, as long as the largest image.
    fn hole(&self, checksummed: bool) -> Result<std::sync::Arc<File>> {
        let mut holes = lock(&self.holes);
        let slot = &mut holes[usize::from(checksummed)];
        if let Some(file) = slot {
            return Ok(file.clone());
        }
        let file = self.unnamed_file()?;
        let plain = Class {
            checksummed,
            compression: Compression::None,
            groups: 0,
        };
        if !self.frees_blocks() {
            set_class(&file, plain).map_err(Error::io("make a donor in", &self.scratch_path))?;
        }
        let size = self
            .images
            .iter()
            .map(|image| image.size)
            .max()
            .unwrap_or(0)
            .next_multiple_of(BLOCK_BYTES);
        file.set_len(size)
            .map_err(Error::io("make a donor in", &self.scratch_path))?;
        Ok(slot.insert(std::sync::Arc::new(file)).clone())
    }

    fn with_file<T>(&self, file: SourceFile, work: impl FnOnce(&File, &Path) -> Result<T>) -> Result<T> {
        match file {
            SourceFile::Image(image) => {
                let image = &self.images[image as usize];
                work(&image.file, &image.path)
            }
            SourceFile::Donor(donor) => {
                let file = lock(&self.donors)[donor].file.clone();
                work(&file, &self.scratch_path)
            }
            SourceFile::Hole { checksummed } => work(&*self.hole(checksummed)?, &self.scratch_path),
        }
    }
}

fn unnamed_file_in(folder: &Folder) -> rustix::io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(folder, ".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

/// The first folder of an image where a donor can be made, with its path: those in read-only snapshots are none.
fn folder_for_donors(found: &[Found], images: &[Image], info: &FsInfo) -> Option<(Folder, PathBuf)> {
    let by_path: BTreeMap<&Path, &Found> = found.iter().map(|found| (found.path.as_path(), found)).collect();
    let mut tried = BTreeSet::new();
    let mut folders = images.iter().filter_map(|image| {
        let path = image.path.parent()?;
        let folder = by_path.get(image.path.as_path())?;
        tried.insert(path.to_owned()).then_some((folder, path))
    });
    folders.find_map(|(found, path)| {
        let folder = found.open_folder().ok()?;
        // What moved since may lie anywhere.
        let is_here = fs_info(&folder).is_ok_and(|its| its == *info);
        (is_here && unnamed_file_in(&folder).is_ok()).then(|| (folder, path.to_owned()))
    })
}

/// `FS_NOCOMP_FL` (uapi/linux/fs.h): the filesystem's own compression is not for this file.
const NOCOMP: IFlags = IFlags::from_bits_retain(0x400);

/// Sets a new, empty file up so that its blocks may be shared with files of a class and lie on disk alike.
fn set_class(file: &File, class: Class) -> rustix::io::Result<()> {
    if !class.checksummed {
        return add_inode_flags(file, IFlags::NOCOW);
    }
    // The folder may be set to NOCOW or to another compression, which a new file takes over.
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

/// `u32` block numbers hold files and extents of less than 16 TiB; larger images are left alone.
fn blocks(bytes: u64) -> Result<u32> {
    u32::try_from(bytes / BLOCK_BYTES).map_err(|_| Error::TooLarge)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Checks that all that was named lies on one filesystem that vmfold can work on.
fn same_filesystem(named: &[Named]) -> Result<(FsInfo, &Named)> {
    let mut first: Option<(&Named, FsInfo)> = None;
    for one in named {
        let path = &one.path;
        let info = match fs_info(&one.folder) {
            Ok(FsInfo {
                kind: Kind::Xfs { reflinks: false, .. },
                ..
            }) => return Err(Error::NoReflinks { path: path.clone() }),
            Ok(info) => info,
            Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP) => {
                let magic = rustix::fs::fstatfs(&one.folder)
                    .map_err(Error::io("look at", path))?
                    .f_type;
                return Err(Error::NoSharing {
                    path: path.clone(),
                    filesystem: name_of_magic(magic),
                });
            }
            Err(errno) => return Err(Error::io("look at the filesystem of", path)(errno)),
        };
        if info.block_bytes != 4096 {
            return Err(Error::SectorSize {
                path: path.clone(),
                block_bytes: info.block_bytes,
            });
        }
        match first {
            Some((other, known)) if known != info => {
                return Err(Error::TwoFilesystems {
                    first: other.path.clone(),
                    second: path.clone(),
                });
            }
            Some(_) => {}
            None => first = Some((one, info)),
        }
    }
    first
        .map(|(named, info)| (info, named))
        .ok_or_else(|| Error::Usage("name at least one path".into()))
}

/// Names of filesystems by their magic number (linux/magic.h), for messages.
fn name_of_magic(magic: i64) -> String {
    match magic {
        0xef53 => "ext4".into(),
        0x0102_1994 => "tmpfs".into(),
        0x2fc1_2fc1 => "ZFS".into(),
        0x6969 => "NFS".into(),
        0x794c_7630 => "overlayfs".into(),
        0xca45_1a4e => "bcachefs".into(),
        other => format!("a filesystem with magic number {other:#x}"),
    }
}

impl Sharing for Volume {
    fn may_touch(&self, image: ImageId) -> bool {
        self.images[image as usize].may_touch()
    }

    fn is_checksummed(&self, image: ImageId) -> bool {
        self.images[image as usize].checksummed
    }

    fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        if let SourceFile::Image(image) = file
            && let Some(direct) = &self.images[image as usize].direct
            && offset.is_multiple_of(BLOCK_BYTES)
            && buffer.as_ptr().addr().is_multiple_of(BLOCK_LEN)
            && direct.read_at(buffer, offset).is_ok_and(|read| read == buffer.len())
        {
            return Ok(());
        }
        // Everything else, and what direct reading cannot do or finds damaged, goes through the page cache.
        self.with_file(file, |file, path| {
            // The last block of an image may be a partial one; what is missing is zeros on disk.
            let mut at = 0;
            while at < buffer.len() {
                let here = offset + at as u64;
                match file.read_at(&mut buffer[at..], here) {
                    Ok(0) => break,
                    Ok(read) => at += read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Error::unreadable(path, here, offset + length - here)(error)),
                }
            }
            buffer[at..].fill(0);
            Ok(())
        })
    }

    fn read_ahead(&self, file: SourceFile, offset: u64, length: u64) {
        if let SourceFile::Image(image) = file
            && self.images[image as usize].direct.is_some()
        {
            return;
        }
        let _ = self.with_file(file, |file, _| {
            readahead(file, offset, length);
            Ok(())
        });
    }

    fn drop_behind(&self, file: SourceFile, offset: u64, length: u64) {
        let _ = self.with_file(file, |file, _| {
            let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
            Ok(())
        });
    }

    fn free_bytes(&self) -> Result<u64> {
        let free = rustix::fs::fstatvfs(&self.scratch).map_err(Error::io("look at", &self.scratch_path))?;
        Ok(free.f_bavail.saturating_mul(free.f_frsize))
    }

    fn create_donor(&self, class: Class) -> Result<usize> {
        let file = self.unnamed_file()?;
        set_class(&file, class).map_err(Error::io("make a donor in", &self.scratch_path))?;
        let mut donors = lock(&self.donors);
        donors.push(Donor {
            file: std::sync::Arc::new(file),
            length: 0,
            compression: class.compression,
        });
        Ok(donors.len() - 1)
    }

    fn takes_frames(&self) -> bool {
        *self.takes_frames.get_or_init(|| self.try_frame().is_ok())
    }

    fn append_to_donor(&self, donor: usize, content: &[u8], frame: Option<&[u8]>) -> Result<()> {
        let length = content.len() as u64;
        let (file, at, compression) = {
            let mut donors = lock(&self.donors);
            let donor = &mut donors[donor];
            let at = donor.length;
            donor.length += length;
            (donor.file.clone(), at, donor.compression)
        };
        let by_frames = compression == Compression::Zstd && self.takes_frames();
        if let Some(frame) = frame.filter(|_| by_frames) {
            return write_frame(&*file, at, frame, length).map_err(|errno| self.donor_error(errno.into()));
        }
        // Another thread may commit at any time, which writes out what there is by then, as an extent of its own. What is
        // preallocated is one extent already, and never compressed.
        if by_frames || compression == Compression::None {
            match rustix::fs::fallocate(&*file, FallocateFlags::empty(), at, length) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(self.donor_error(errno.into())),
            }
        }
        let written = file
            .write_all_at(content, at)
            .and_then(|()| write_out(&*file, at, length, false));
        written.map_err(|error| self.donor_error(error))
    }

    fn discard_donor(&self, donor: usize) {
        // Where this fails the space is free again at the end of the run.
        let _ = lock(&self.donors)[donor].file.set_len(0);
    }

    fn settle_donor(&self, donor: usize) -> Result<()> {
        let file = lock(&self.donors)[donor].file.clone();
        file.sync_data().map_err(|error| self.donor_error(error))
    }

    fn share(&self, source: SourceFile, source_offset: u64, image: ImageId, offset: u64, length: u64) -> Outcome {
        let destination = &self.images[image as usize].file;
        let called = self.with_file(source, |file, path| {
            dedupe_range(file, source_offset, destination, offset, length).map_err(Error::io("share blocks of", path))
        });
        match called {
            // A success without progress is none: the range would be asked for for ever.
            Ok(Deduped::Same(0)) => Outcome::Refused(Errno::IO),
            Ok(Deduped::Same(_)) => Outcome::Shared,
            Ok(Deduped::Differs) => Outcome::Differs,
            Ok(Deduped::Refused(errno)) => Outcome::Refused(errno),
            Err(error) => Outcome::Refused(errno_of(&error)),
        }
    }

    fn commit(&self) -> Result<()> {
        self.sync()
    }

    fn is_allocated(&self, address: u64, generation: u64) -> Result<bool> {
        if self.frees_blocks() {
            // There is no extent whose rest a block that differs could hold.
            return Ok(false);
        }
        let mut found = false;
        let key = |offset| Key {
            object: address,
            kind: EXTENT_ITEM,
            offset,
        };
        tree_search::<FEW>(&self.scratch, EXTENT_TREE, key(0), key(u64::MAX), |key, item| {
            found |=
                key.object == address && btrfs::extent_item(item).is_some_and(|extent| extent.generation == generation);
            None
        })
        .map_err(Error::io("read the extent tree of", &self.scratch_path))?;
        Ok(found)
    }

    fn ranges_in(&self, image: ImageId, addresses: &BTreeSet<u64>) -> Result<Vec<(u64, HeldRange)>> {
        btrfs::ranges_in(&self.images[image as usize], addresses)
    }

    fn path(&self, image: ImageId) -> &Path {
        &self.images[image as usize].path
    }
}

impl Volume {
    fn donor_error(&self, error: std::io::Error) -> Error {
        Error::writing("write a donor in", &self.scratch_path)(error)
    }
}

fn errno_of(error: &Error) -> Errno {
    match error {
        Error::Io { source, .. } => source.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        _ => Errno::IO,
    }
}
