//! What a restore takes blocks from. Reading an archive that lies in a file and one that comes through a pipe differ in what is known when;
//! a restore is the same for both.
//!
//! To add a source, implement [`BlockSource`] in a file here: it numbers the blocks that it brings (their store addresses), offers what can be
//! restored before the blocks come, and hands them over.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::archive::manifest::AnnouncedBlocks;
use crate::archive::record::Hash;
use crate::error::{Error, Result};
use crate::exec::hashes::Digest;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::Contents;

/// Images whose blocks a source can hand over.
#[derive(Debug)]
pub struct Offer {
    /// The images, as far as they are known before their blocks.
    pub contents: Arc<Contents>,
    /// Fingerprints of blocks, by which they can be found on the disk.
    pub announced: Vec<AnnouncedBlocks>,
    /// Blocks from this address on are none of those that the contents refer to so far, but may be needed all the same.
    pub known_end: StoreBlock,
}

/// What became of an offer.
#[derive(Debug)]
pub struct Delivered {
    /// The images as they are to be restored; none if they are not those that were asked for, or were not committed.
    pub committed: Option<Arc<Contents>>,
    /// Whether nothing after them can be what was asked for.
    pub is_last: bool,
}

/// Hashes of blocks, as far as a source knows them.
pub trait BlockHashes {
    /// The hash of a block, if it is known and intact.
    ///
    /// # Errors
    /// Those of reading.
    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>>;

    /// Adds the hashes of a range of blocks to the digest of an image, and tells whether all of them are known.
    ///
    /// # Errors
    /// Those of reading; [`Error::Interrupted`].
    fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool>;
}

/// Blocks that a source has together, in whichever form.
pub struct SourceFrame<'a> {
    /// Their store addresses.
    pub blocks: Range<StoreBlock>,
    /// Makes their content, whole blocks, and proves it as far as the source can. Several threads make those of several frames.
    pub content: Box<dyn Fn() -> Result<Vec<u8>> + Sync + Send + 'a>,
}

/// Where blocks go that a source hands over.
pub trait BlockSink {
    /// The parts of a range that are wanted and not there yet.
    fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>>;

    /// Takes what is missing of some frames. A frame whose content cannot be made is returned with the error, and the others are taken.
    ///
    /// # Errors
    /// Those of writing; [`Error::Interrupted`].
    fn take(&mut self, frames: &[SourceFrame<'_>]) -> Result<Vec<(usize, Error)>>;

    /// Compares what is there of some blocks with hashes that came after them, and forgets those that differ. Returns whether all are as
    /// they should be.
    ///
    /// # Errors
    /// Those of reading back.
    fn prove(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<bool>;
}

/// What a restore takes blocks from.
pub trait BlockSource {
    /// What messages call it.
    fn path(&self) -> &Path;

    /// The identity of the archive; zeros before anything of it was read.
    fn id(&self) -> [u8; 16];

    /// The number of the commit by which the work folder is called: an interrupted restore of the same commit goes on there.
    fn work_number(&self) -> CommitNumber;

    /// The next images whose blocks it can hand over; none if there are no more.
    ///
    /// # Errors
    /// [`Error::Damaged`] and [`Error::Unsupported`] among others.
    fn offer(&mut self) -> Result<Option<Offer>>;

    /// Hands over blocks of the last offer: those of `wanted`, a list, or more. What it cannot hand over it says to whoever listens, and
    /// leaves out.
    ///
    /// # Errors
    /// Those of reading and of the sink; [`Error::Damaged`] where the source does not go on after damage.
    fn deliver(&mut self, wanted: &[Range<StoreBlock>], sink: &mut dyn BlockSink) -> Result<Delivered>;

    /// The hashes of its blocks. Of a pipe they come behind the blocks.
    fn hashes(&mut self) -> &mut dyn BlockHashes;

    /// Whether hashes are known before blocks are handed over.
    fn knows_hashes(&self) -> bool;

    /// Why there is nothing to restore, after the last offer.
    fn nothing_committed(&self) -> Error;

    /// Whether images later than those that were delivered last may be lost.
    fn has_later_damage(&self) -> bool;
}
