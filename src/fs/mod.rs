//! What a filesystem can do for vmfold, behind one trait: [`Filesystem`]. [`open()`] is the one place that looks at which it is.
//!
//! To add a filesystem, implement the trait in a folder here, have [`open()`] open it, and run it through the conformance suite in
//! `tests/filesystem.rs`. What filesystems whose images are open files have in common is in `opened`.

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
pub use open::{HoldingImage, existing, images_holding, may_find_holders, open, uuid_at};
pub use plain::Plain;
pub use prove::prove_slots;

/// A file that blocks can be shared from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceFile {
    /// An image.
    Image(ImageId),
    /// A donor, by the number [`Filesystem::create_donor`] gave it.
    Donor(DonorId),
    /// A file without data, checksummed or not, as large as the largest image.
    Hole {
        /// Whether its inode has checksums; both sides of a call must agree.
        checksummed: bool,
    },
}

/// What one call did with one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareOutcome {
    /// The range maps the source's blocks now, or did before.
    Shared,
    /// The bytes differ. Nothing was changed.
    Differs,
    /// The filesystem refused.
    Refused(Errno),
}

/// A range of an image that refers to an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HeldRange {
    /// First block in the image.
    pub file_block: u32,
    /// First block in the extent.
    pub extent_block: u32,
    /// Blocks.
    pub blocks: u32,
    /// Whether it reads as zeros, whatever the extent holds.
    pub preallocated: bool,
}

/// A range of an image, and the extent that it refers to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExtentReference {
    /// The extent's address, in bytes.
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
    /// Bytes.
    pub length: u64,
}

/// What images are opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To read extent maps and data only; whoever else uses them does not matter.
    Look,
    /// To read them as a whole: only images that nobody has open for writing.
    Read,
    /// To say what sharing extents would do: only images that nobody else has open.
    Plan,
    /// To share extents: the same, on a filesystem that can be written.
    Change,
}

/// What is known of an open image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Its path.
    pub path: PathBuf,
    /// Bytes, holes included.
    pub size: u64,
    /// Whether the filesystem keeps checksums of its data. Where it keeps none of any file, all are alike, and this is true.
    pub checksummed: bool,
    /// Whether its owner wants it not to be compressed.
    pub stays_uncompressed: bool,
}

/// What is known of where images lie on disk.
#[derive(Debug)]
pub struct PoolMap {
    /// Extents and references.
    pub facts: Facts,
    /// Bytes that lie in metadata, beside their inodes.
    pub inline_bytes: u64,
    /// The images that have such bytes, in their first block.
    pub inline: Vec<ImageId>,
    /// What images have to themselves beyond their ends.
    pub beyond: Vec<BeyondEnd>,
}

/// Space that an image has to itself beyond its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BeyondEnd {
    /// The image.
    pub image: ImageId,
    /// Bytes on disk.
    pub disk_bytes: u64,
}

/// The images of a pool, open, on one filesystem, and all that vmfold does there.
///
/// Images are numbered from 0. The byte ranges of [`Filesystem::share`] and [`Filesystem::clone_range`] are multiples of a block.
pub trait Filesystem: std::fmt::Debug + Send + Sync {
    /// How many images are open.
    fn image_count(&self) -> u32;

    /// What is known of an image.
    fn image(&self, image: ImageId) -> &ImageInfo;

    /// Whether an image may still be touched: false once someone else wants it.
    fn may_touch(&self, image: ImageId) -> bool;

    /// Whether an image's size, times, links, mode and owner are what they were when it was opened.
    fn is_unchanged(&self, image: ImageId) -> bool;

    /// What belongs to an image beside its content.
    ///
    /// # Errors
    /// Those of the system calls.
    fn attributes(&self, image: ImageId) -> Result<Metadata>;

    /// A folder on the filesystem, for messages.
    fn folder(&self) -> &Path;

    /// What tells the filesystem from others.
    fn uuid(&self) -> [u8; 16];

    /// The function that fingerprints are made with.
    fn function(&self) -> FingerprintFunction;

    /// Whether it frees each block on its own, and not only extents as a whole.
    fn frees_blocks(&self) -> bool;

    /// Whether it can keep extents compressed.
    fn compresses(&self) -> bool;

    /// What the user should know of the running kernel and of what cannot be seen here.
    fn shortcomings(&self) -> Vec<String>;

    /// Whether there are read-only snapshots of what images lie in: who makes them may send them.
    ///
    /// # Errors
    /// Those of reading metadata.
    fn has_read_only_snapshots(&self) -> Result<bool>;

    /// Reads the extent maps of all images, into lists that are made from a budget.
    ///
    /// # Errors
    /// Those of reading metadata, or if it makes no sense.
    fn map(&self, budget: &Budget) -> Result<PoolMap>;

    /// Whether it can be told of every block whether something outside the pool refers to it. That may be known only once
    /// [`Filesystem::map`] was called.
    fn sees_all_holders(&self) -> bool;

    /// Names of files that hold extents and are none of the images that are worked on, the largest extents first, with the bytes
    /// they hold.
    ///
    /// # Errors
    /// Those of reading metadata.
    fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>>;

    /// Whether the filesystem's own checksums begin with fingerprints of [`Filesystem::function`].
    fn has_usable_checksums(&self) -> bool;

    /// Takes the checksums of uncompressed extents for their fingerprints, and says of which slots they are known. Only where there
    /// are usable ones.
    ///
    /// # Errors
    /// Those of reading metadata.
    fn fingerprints_from_checksums(&self, facts: &mut Facts, known: &mut SlotSet) -> Result<()>;

    /// A digest of all checksums that the filesystem keeps of each extent's bytes on disk, compressed or not; none where it keeps
    /// none. With address and generation it tells whether an extent is still the one that was read, on copies of the filesystem too.
    ///
    /// # Errors
    /// Those of reading metadata.
    fn checksum_digests(&self, facts: &Facts) -> Result<SpillVec<Option<u128>>>;

    /// Reads all of `buffer` from a file. What lies beyond its end is zeros.
    ///
    /// # Errors
    /// [`crate::error::Error::Unreadable`], with the path and the range: `EIO` where a checksum fails.
    fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Starts reading a range into memory, as a hint.
    fn read_ahead(&self, file: SourceFile, offset: u64, length: u64);

    /// Says that a range is not needed in memory any more.
    fn drop_behind(&self, file: SourceFile, offset: u64, length: u64);

    /// Bytes that can still be written.
    ///
    /// # Errors
    /// Those of the system call.
    fn free_bytes(&self) -> Result<u64>;

    /// Makes an empty donor that vanishes with this process, its blocks staying only where an image shares them.
    ///
    /// # Errors
    /// Where no such file can be made.
    fn create_donor(&self, class: Class) -> Result<DonorId>;

    /// Whether donors of class [`crate::facts::Compression::Zstd`] take frames; if not, the filesystem compresses them itself.
    fn takes_frames(&self) -> bool;

    /// Appends one extent to a donor. What there is a zstd `frame` of is stored as that, if the filesystem takes frames; what there
    /// is none of is then stored as it is.
    ///
    /// # Errors
    /// [`Error::NoSpace`] among others.
    fn append_to_donor(&self, donor: DonorId, content: &[u8], frame: Option<&[u8]>) -> Result<()>;

    /// Gives up a donor that could not be written.
    fn discard_donor(&self, donor: DonorId);

    /// Waits until all of a donor is on disk.
    ///
    /// # Errors
    /// [`Error::NoSpace`] among others.
    fn settle_donor(&self, donor: DonorId) -> Result<()>;

    /// Closes all donors: what of them no image shares is free from the next commit on, which this makes.
    ///
    /// # Errors
    /// Those of the commit.
    fn close_donors(&self) -> Result<()>;

    /// Makes a range of an image share a range of another file, if the bytes are equal. One system call.
    fn share(&self, source: SourceFile, source_offset: u64, image: ImageId, offset: u64, length: u64) -> ShareOutcome;

    /// Makes a range of a new file share a range of an image.
    ///
    /// # Errors
    /// `EOPNOTSUPP` where the filesystem cannot; `EXDEV` if the file lies on another one.
    fn clone_range(
        &self,
        image: ImageId,
        offset: u64,
        file: &File,
        file_offset: u64,
        length: u64,
    ) -> rustix::io::Result<()>;

    /// Makes everything durable and freed blocks available.
    ///
    /// # Errors
    /// Those of the system call.
    fn commit(&self) -> Result<()>;

    /// Whether the extent that was at `address` when the facts were taken is still there.
    ///
    /// # Errors
    /// Those of reading the filesystem's metadata.
    fn is_allocated(&self, address: u64, generation: u64) -> Result<bool>;

    /// The ranges of an image that refer to any of the extents at `addresses`, each with the address.
    ///
    /// # Errors
    /// Those of reading the filesystem's metadata.
    fn ranges_in(&self, image: ImageId, addresses: &BTreeSet<u64>) -> Result<Vec<ExtentReference>>;

    /// Where an image lies.
    fn path(&self, image: ImageId) -> &Path {
        &self.image(image).path
    }
}

/// The images that are open, in the order of their numbers.
pub fn images(fs: &dyn Filesystem) -> impl ExactSizeIterator<Item = &ImageInfo> {
    ImageId::first(fs.image_count()).map(|image| fs.image(image))
}

/// Reads slots, one range after the other.
///
/// # Errors
/// Those of reading.
pub fn read_slots(facts: &Facts, fs: &dyn Filesystem, slots: &[std::ops::Range<Slot>]) -> Result<Vec<u8>> {
    let blocks: u32 = slots.iter().map(range::length).sum();
    let mut content = vec![0; blocks as usize * BLOCK_LEN];
    read_slots_into(facts, fs, slots, &mut content)?;
    Ok(content)
}

/// Reads slots, one range after the other, into a buffer that is as long as they are. Where a slot is none that an image maps, what is
/// left of the buffer is zeros.
///
/// # Errors
/// Those of reading.
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

/// Starts reading slots into memory, as a hint.
pub fn read_slots_ahead(facts: &Facts, fs: &dyn Filesystem, slots: &[std::ops::Range<Slot>]) {
    for range in places(facts, slots) {
        fs.read_ahead(range.file, range.offset, range.length);
    }
}

/// Says that slots are not needed in memory any more.
pub fn drop_slots_behind(facts: &Facts, fs: &dyn Filesystem, slots: &[std::ops::Range<Slot>]) {
    for range in places(facts, slots) {
        fs.drop_behind(range.file, range.offset, range.length);
    }
}

/// Where slots can be read, place after place.
fn places<'a>(facts: &'a Facts, slots: &'a [std::ops::Range<Slot>]) -> impl Iterator<Item = FileRange> + 'a {
    let places = slots.iter().flat_map(|range| facts.places_of(range.clone()));
    places.map(|(_, place)| FileRange {
        file: SourceFile::Image(place.image),
        offset: bytes(place.file_block),
        length: bytes(place.blocks),
    })
}

/// `u32` block numbers hold files and extents of less than 16 TiB; larger images are left alone.
fn blocks(bytes: u64) -> Result<u32> {
    u32::try_from(bytes / BLOCK_BYTES).map_err(|_| Error::TooLarge)
}
