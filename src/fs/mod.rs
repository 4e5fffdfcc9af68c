//! What a filesystem can do for a run: read, share, write donors. btrfs, and a simulated one for tests.

pub mod acl;
pub mod attributes;
pub mod simulated;
pub mod simulated_faults;
pub mod volume;

use std::collections::BTreeSet;
use std::path::Path;

use rustix::io::Errno;

use crate::block::{BLOCK_LEN, Slot, bytes};
use crate::error::Result;
use crate::facts::{Class, Facts, ImageId};

/// A file that blocks can be shared from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceFile {
    /// An image.
    Image(ImageId),
    /// A donor, by the number [`Sharing::create_donor`] gave it.
    Donor(usize),
    /// A file without data, checksummed or not, as large as the largest image.
    Hole {
        /// Whether its inode has checksums; both sides of a call must agree.
        checksummed: bool,
    },
}

/// What one call did with one range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
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

/// Everything a run does to a filesystem.
///
/// The byte ranges of [`Sharing::share`] are multiples of a block.
pub trait Sharing: Sync {
    /// Whether an image may still be touched: false once someone else wants it.
    fn may_touch(&self, image: ImageId) -> bool;

    /// Whether an image's blocks have checksums.
    fn is_checksummed(&self, image: ImageId) -> bool;

    /// Reads all of `buffer` from an image.
    ///
    /// # Errors
    /// With the path and the range; `EIO` where a checksum fails.
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
    fn create_donor(&self, class: Class) -> Result<usize>;

    /// Whether donors of class [`crate::facts::Compression::Zstd`] take frames; if not, the filesystem compresses them itself.
    fn takes_frames(&self) -> bool;

    /// Appends one extent to a donor. What there is a zstd `frame` of is stored as that, if the filesystem takes frames; what there
    /// is none of is then stored as it is.
    ///
    /// # Errors
    /// [`crate::error::Error::NoSpace`] among others.
    fn append_to_donor(&self, donor: usize, content: &[u8], frame: Option<&[u8]>) -> Result<()>;

    /// Gives up a donor that could not be written.
    fn discard_donor(&self, donor: usize);

    /// Waits until all of a donor is on disk.
    ///
    /// # Errors
    /// [`crate::error::Error::NoSpace`] among others.
    fn settle_donor(&self, donor: usize) -> Result<()>;

    /// Makes a range of an image share a range of another file, if the bytes are equal. One system call.
    fn share(&self, source: SourceFile, source_offset: u64, image: ImageId, offset: u64, length: u64) -> Outcome;

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
    fn ranges_in(&self, image: ImageId, addresses: &BTreeSet<u64>) -> Result<Vec<(u64, HeldRange)>>;

    /// Where an image lies, for messages.
    fn path(&self, image: ImageId) -> &Path;
}

/// Reads slots, one range after the other.
///
/// # Errors
/// Those of reading.
pub fn read_slots(facts: &Facts, fs: &dyn Sharing, slots: &[std::ops::Range<Slot>]) -> Result<Vec<u8>> {
    let blocks: usize = slots.iter().map(ExactSizeIterator::len).sum();
    let mut content = vec![0; blocks * BLOCK_LEN];
    let mut rest = &mut content[..];
    for (_, place) in slots.iter().flat_map(|range| facts.places_of(range.clone())) {
        let (part, after) = rest.split_at_mut(place.blocks as usize * BLOCK_LEN);
        fs.read(SourceFile::Image(place.image), bytes(place.file_block), part)?;
        rest = after;
    }
    Ok(content)
}
