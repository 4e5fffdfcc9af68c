//! What a filesystem can do for vmfold, behind one trait: [`Filesystem`]. Only [`open()`] and its neighbours look at the kind of
//! filesystem.
//!
//! To add a filesystem, implement the trait in a folder here, make [`open()`] open it, and run it through the conformance suite in
//! `tests/filesystem.rs`. What filesystems have in common whose images are open files is in `opened`.

mod accounting;
pub mod acl;
pub mod attributes;
mod btrfs;
mod kernel;
mod open;
mod opened;
mod plain;
mod prove;
mod xfs;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::block::{BLOCK_BYTES, BLOCK_LEN, SlotSet, bytes};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::facts::{Class, Facts};
use crate::fingerprint::FingerprintFunction;
use crate::numbers::{DonorId, ImageId, Slot};
use crate::range;
use crate::spill::{Budget, SpillVec};

pub use accounting::{freed_bytes, physical_bytes};
pub use open::{HoldingImage, compresses_files, images_holding, may_find_holders, open, uuid_at};
pub use plain::Plain;
pub use prove::prove_slots;

/// A file that blocks can be shared from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceFile {
    /// An image.
    Image(ImageId),
    /// A donor, by the number that [`Filesystem::create_donor`] returned.
    Donor(DonorId),
    /// A file without data that is as large as the largest image.
    Hole {
        /// Whether its inode has checksums. Source and destination of a call must agree in this.
        checksummed: bool,
    },
}

/// The outcome of one call for one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareOutcome {
    /// The range maps the source's blocks, possibly already before the call.
    Shared,
    /// The bytes differ, and nothing was changed.
    Differs,
    /// The filesystem refused the call with this errno.
    Refused(Errno),
}

/// A range of an image that refers to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldRange {
    /// First block in the image.
    pub file_block: u32,
    /// First block in the extent.
    pub extent_block: u32,
    /// Length in blocks.
    pub blocks: u32,
    /// Whether it is preallocated, and reads as zeros whatever the extent holds.
    pub preallocated: bool,
}

/// A range of an image, and the address of the extent that it refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExtentReference {
    /// The address of the extent in bytes.
    pub address: u64,
    /// The range.
    pub range: HeldRange,
}

/// A range of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileRange {
    /// The file.
    pub file: SourceFile,
    /// First byte.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// The purpose that images are opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Reads extent maps and data. Images may be in use.
    Look,
    /// Reads images as a whole. Images that someone has open for writing are left alone.
    Read,
    /// Tells what sharing extents would do. Images that anyone else has open are left alone.
    Plan,
    /// Shares extents, on a filesystem that is writable. Images that anyone else has open are left alone.
    Change,
}

/// The properties of an open image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its path.
    pub path: PathBuf,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Whether the filesystem keeps checksums of its data. On a filesystem that keeps none of any file, this is true for all files.
    pub checksummed: bool,
    /// Whether its owner does not want it compressed (`btrfs.compression` is `none`).
    pub stays_uncompressed: bool,
}

/// Where the images of a pool lie on disk.
#[derive(Debug)]
pub struct PoolMap {
    /// Extents and references.
    pub facts: Facts,
    /// Bytes of inline data: data that lies in metadata, beside the inodes.
    pub inline_bytes: u64,
    /// The images that have inline data, which is in their first block.
    pub inline: Vec<ImageId>,
    /// Space beyond the ends of images that only they use.
    pub beyond: Vec<BeyondEnd>,
}

/// Space beyond the end of an image that only this image uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeyondEnd {
    /// The image.
    pub image: ImageId,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// The open images of a pool on one filesystem, and everything that vmfold does there.
///
/// Images are numbered from 0. The byte ranges of [`Filesystem::share`] and [`Filesystem::clone_range`] are multiples of a block.
///
/// The default methods are right for a filesystem that keeps no checksums of data, does not compress and frees each block on its own.
pub trait Filesystem: std::fmt::Debug + Send + Sync {
    /// Returns the number of open images.
    fn image_count(&self) -> u32;

    /// Returns the properties of an image.
    fn image(&self, image: ImageId) -> &ImageInfo;

    /// Whether an image may still be touched. It is false once someone else has opened, or waits to open, the image.
    fn may_touch(&self, image: ImageId) -> bool;

    /// Whether an image's size, times, links, mode and owner are unchanged since it was opened.
    fn is_unchanged(&self, image: ImageId) -> bool;

    /// Reads the metadata of an image.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a system call fails.
    fn attributes(&self, image: ImageId) -> Result<Metadata>;

    /// Returns a folder on the filesystem, for messages.
    fn folder(&self) -> &Path;

    /// Returns the UUID of the filesystem.
    fn uuid(&self) -> [u8; 16];

    /// Returns the name of its kind, for messages.
    fn kind_name(&self) -> &'static str {
        "filesystem"
    }

    /// Returns the function that fingerprints are made with.
    fn function(&self) -> FingerprintFunction {
        FingerprintFunction::Crc32c
    }

    /// Whether the filesystem frees each block on its own, rather than an extent once nothing refers to any part of it.
    fn frees_blocks(&self) -> bool;

    /// Whether the filesystem can store extents compressed.
    fn compresses(&self) -> bool {
        false
    }

    /// Returns notes for the user about faults of the running kernel, and about what this process cannot see.
    fn shortcomings(&self) -> Vec<String> {
        Vec::new()
    }

    /// Whether there are read-only snapshots of subvolumes that images lie in. They may be sources of `btrfs send`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the filesystem's metadata cannot be read.
    fn has_read_only_snapshots(&self) -> Result<bool> {
        Ok(false)
    }

    /// Reads the extent maps of all images into lists that are made from `budget`.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the filesystem's metadata cannot be read, [`Error::Metadata`] if it makes no sense, and [`Error::TooLarge`]
    /// if there are more blocks than slots.
    fn map(&self, budget: &Budget) -> Result<PoolMap>;

    /// Whether the filesystem tells for every block whether something outside the pool refers to it. XFS knows only after
    /// [`Filesystem::map`].
    fn sees_all_holders(&self) -> bool;

    /// Returns the files outside the pool that hold its extents, by name, with the bytes that they hold. A filesystem may limit the search
    /// to the largest extents.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the filesystem's metadata cannot be read.
    fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>>;

    /// Whether the filesystem's own checksums begin with the fingerprints of [`Filesystem::function`].
    fn has_usable_checksums(&self) -> bool {
        false
    }

    /// Fills in the fingerprints of uncompressed extents from the filesystem's checksums, and adds their slots to `known`. It is called
    /// only if [`Filesystem::has_usable_checksums`].
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the filesystem's metadata cannot be read.
    fn fingerprints_from_checksums(&self, _facts: &mut Facts, _known: &mut SlotSet) -> Result<()> {
        Ok(())
    }

    /// Returns for each extent a digest of all checksums of its bytes on disk, compressed or not; `None` where the filesystem keeps none.
    /// With address and generation, the digest tells whether an extent is still the one that was read, even on a copy of the filesystem.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the filesystem's metadata cannot be read.
    fn checksum_digests(&self, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
        Ok(SpillVec::of_in(None, facts.extents.len(), facts.budget()))
    }

    /// Fills `buffer` from a file. Beyond the end of the file it reads zeros.
    ///
    /// # Errors
    /// Returns [`Error::Unreadable`] with the path and the range: `EIO` where a checksum fails.
    fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Starts reading a range into the page cache. It is a hint.
    fn read_ahead(&self, file: SourceFile, offset: u64, length: u64);

    /// Drops a range from the page cache. It is a hint.
    fn drop_behind(&self, file: SourceFile, offset: u64, length: u64);

    /// Returns the bytes that are free.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the system call fails.
    fn free_bytes(&self) -> Result<u64>;

    /// Makes an empty donor and returns its number. The file has no name and vanishes with the process; blocks stay only where an image
    /// shares them.
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::NoSpace`] if the file cannot be made.
    fn create_donor(&self, class: Class) -> Result<DonorId>;

    /// Whether donors of class [`crate::facts::Compression::Zstd`] take frames. If not, the filesystem compresses their content itself.
    fn takes_frames(&self) -> bool {
        false
    }

    /// Appends one extent to a donor. If the filesystem takes frames, it stores `frame`, or the content uncompressed if there is no frame.
    ///
    /// # Errors
    /// Returns [`Error::NoSpace`] if the filesystem is full or a quota is used up, and otherwise [`Error::Io`].
    fn append_to_donor(&self, donor: DonorId, content: &[u8], frame: Option<&[u8]>) -> Result<()>;

    /// Frees the blocks of a donor that could not be written.
    fn discard_donor(&self, donor: DonorId);

    /// Waits until a donor is on disk.
    ///
    /// # Errors
    /// Returns [`Error::NoSpace`] if the filesystem is full or a quota is used up, and otherwise [`Error::Io`].
    fn settle_donor(&self, donor: DonorId) -> Result<()>;

    /// Closes all donors and commits. The commit frees those of their blocks that no image shares.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the commit fails.
    fn close_donors(&self) -> Result<()>;

    /// Makes a range of an image share a range of another file if the bytes are equal, by one system call.
    fn share(&self, source: SourceFile, source_offset: u64, image: ImageId, offset: u64, length: u64) -> ShareOutcome;

    /// Makes a range of a new file share a range of an image.
    ///
    /// # Errors
    /// Returns `EOPNOTSUPP` if the filesystem cannot share blocks, and `EXDEV` if the file lies on another filesystem.
    fn clone_range(
        &self,
        image: ImageId,
        offset: u64,
        file: &File,
        file_offset: u64,
        length: u64,
    ) -> rustix::io::Result<()>;

    /// Commits: makes everything durable, and makes freed blocks available.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the system call fails.
    fn commit(&self) -> Result<()>;

    /// Whether the extent that was at `address` when the facts were read still exists. It is false if each block is freed on its own,
    /// since no block then keeps the rest of an extent allocated.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the filesystem's metadata cannot be read.
    fn is_allocated(&self, _address: u64, _generation: u64) -> Result<bool> {
        Ok(false)
    }

    /// Returns the ranges of an image that refer to any of the extents at `addresses`, each with that address. There are none if each
    /// block is freed on its own.
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::Metadata`] if the filesystem's metadata cannot be read or makes no sense.
    fn ranges_in(&self, _image: ImageId, _addresses: &BTreeSet<u64>) -> Result<Vec<ExtentReference>> {
        Ok(Vec::new())
    }

    /// Returns the path of an image.
    fn path(&self, image: ImageId) -> &Path {
        &self.image(image).path
    }
}

/// Returns the open images in the order of their numbers.
pub fn images(fs: &dyn Filesystem) -> impl ExactSizeIterator<Item = &ImageInfo> {
    ImageId::first(fs.image_count()).map(|image| fs.image(image))
}

/// Reads ranges of slots, one after the other.
///
/// # Errors
/// Returns the error of [`Filesystem::read`].
pub fn read_slots(facts: &Facts, fs: &dyn Filesystem, slots: &[std::ops::Range<Slot>]) -> Result<Vec<u8>> {
    let blocks: u32 = slots.iter().map(range::length).sum();
    let mut content = vec![0; blocks as usize * BLOCK_LEN];
    read_slots_into(facts, fs, slots, &mut content)?;
    Ok(content)
}

/// Reads ranges of slots, one after the other, into a buffer of their length. Slots that no image maps are left out, and the end of the
/// buffer is filled with zeros instead.
///
/// # Errors
/// Returns the error of [`Filesystem::read`].
pub fn read_slots_into(
    facts: &Facts,
    fs: &dyn Filesystem,
    slots: &[std::ops::Range<Slot>],
    buffer: &mut [u8],
) -> Result<()> {
    let mut rest = buffer;
    for range in places(facts, slots) {
        let (part, after) = rest.split_at_mut(usize::try_from(range.length).unwrap_or(usize::MAX));
        fs.read(range.file, range.offset, part)?;
        rest = after;
    }
    rest.fill(0);
    Ok(())
}

/// Starts reading slots into the page cache. It is a hint.
pub fn read_slots_ahead(facts: &Facts, fs: &dyn Filesystem, slots: &[std::ops::Range<Slot>]) {
    for range in places(facts, slots) {
        fs.read_ahead(range.file, range.offset, range.length);
    }
}

/// Drops slots from the page cache. It is a hint.
pub fn drop_slots_behind(facts: &Facts, fs: &dyn Filesystem, slots: &[std::ops::Range<Slot>]) {
    for range in places(facts, slots) {
        fs.drop_behind(range.file, range.offset, range.length);
    }
}

/// Returns where slots can be read, piece after piece.
fn places<'a>(facts: &'a Facts, slots: &'a [std::ops::Range<Slot>]) -> impl Iterator<Item = FileRange> + 'a {
    let places = slots.iter().flat_map(|range| facts.places_of(range.clone()));
    places.map(|(_, place)| FileRange {
        file: SourceFile::Image(place.image),
        offset: bytes(place.file_block),
        length: bytes(place.blocks),
    })
}

/// Returns a number of bytes in blocks. 32 bits hold the blocks of files and extents below 16 TiB; larger images are left alone.
fn blocks(bytes: u64) -> Result<u32> {
    u32::try_from(bytes / BLOCK_BYTES).map_err(|_| Error::TooLarge)
}
