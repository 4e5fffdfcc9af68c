//! The port that a restore takes blocks from. An archive in a file has its commit and its hashes before the blocks are read; an archive that
//! comes through a pipe has them behind the blocks. The restore is the same for both.
//!
//! To add a source, implement [`BlockSource`] in a file of this folder. A source numbers its blocks (their store addresses), offers images
//! before it hands over their blocks, and then hands the blocks over.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::archive::announced::AnnouncedBlocks;
use crate::archive::record::{BlockHasher, Hash, LaneId};
use crate::error::{Error, Result};
use crate::exec::hashes::Digest;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::Contents;

/// Images whose blocks a source can hand over.
#[derive(Debug)]
pub struct Offer {
    /// The images, as far as they are known before their blocks come.
    pub contents: Arc<Contents>,
    /// Fingerprints of the blocks, by which seeds are searched for them.
    pub announced: Vec<AnnouncedBlocks>,
    /// The contents refer to no block from this store address on. Such blocks may be needed all the same, for corrections that come later.
    pub known_end: StoreBlock,
}

/// The end of an offer, after its blocks were handed over.
#[derive(Debug)]
pub struct Delivered {
    /// The images with all corrections. It is `None` if another commit was asked for, or if the images were not committed.
    pub committed: Option<Arc<Contents>>,
    /// Whether no later offer can be of the commit that was asked for.
    pub is_last: bool,
}

/// Why a source handed over less than it has.
#[derive(Debug)]
pub struct Stopped {
    /// The error that stopped it.
    pub error: Error,
    /// The images that are not restored for that, as far as they are known.
    pub left_out: Vec<PathBuf>,
}

/// The hashes of blocks, as far as a source has them.
pub trait BlockHashes {
    /// Returns what makes the hashes of blocks.
    fn hasher(&self) -> BlockHasher;

    /// The hash of a block. It is `None` if it is lost, or did not come yet.
    ///
    /// # Errors
    /// [`Error::Io`] if the source or its file of hashes cannot be read.
    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>>;

    /// Adds the hashes of a range of blocks to the digest of an image. Returns whether the source has all of them. If it does not, the
    /// digest is of no use.
    ///
    /// # Errors
    /// [`Error::Io`] if the source or its file of hashes cannot be read; [`Error::Interrupted`].
    fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool>;
}

/// Consecutive blocks that a source keeps together, such as a compressed frame.
pub struct SourceFrame<'a> {
    /// The store addresses of the blocks.
    pub blocks: Range<StoreBlock>,
    /// Makes the content of the blocks, and compares it with their hashes if the source has them. Several threads call those of several
    /// frames at once.
    pub content: Box<dyn Fn() -> Result<Vec<u8>> + Sync + Send + 'a>,
}

/// What takes the blocks that a source hands over.
pub trait BlockSink {
    /// The parts of a range that are wanted and that the sink does not have yet.
    fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>>;

    /// Takes the missing blocks of some frames. For a frame whose content cannot be made, its place in `frames` is returned with the error.
    /// The other frames are taken.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the blocks cannot be written; [`Error::Interrupted`].
    fn take(&mut self, frames: &[SourceFrame<'_>]) -> Result<Vec<(usize, Error)>>;

    /// Compares blocks that the sink took with hashes that came after them, and drops the blocks that differ. Returns whether none
    /// differs.
    ///
    /// # Errors
    /// [`Error::Io`] if the blocks cannot be read back.
    fn prove(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<bool>;
}

/// A source that a restore takes blocks from.
pub trait BlockSource {
    /// The path of the source, for messages.
    fn path(&self) -> &Path;

    /// The identifier of the archive. It is zeros until something of the archive was read.
    fn id(&self) -> LaneId;

    /// The number of a commit, which is part of the work folder's name. An interrupted restore of the same commit goes on in that folder.
    fn work_number(&self) -> CommitNumber;

    /// The next images whose blocks it can hand over, or `None` if there are no more.
    ///
    /// # Errors
    /// [`Error::Damaged`] where the source does not go on after damage; [`Error::Unsupported`] if a newer version made the archive;
    /// [`Error::Io`] if the source cannot be read; [`Error::Interrupted`].
    fn offer(&mut self) -> Result<Option<Offer>>;

    /// Hands over the blocks of the last offer: those of the ranges `wanted`, or more. Blocks that are damaged are noted to the monitor, and
    /// left out.
    ///
    /// # Errors
    /// Those of [`BlockSource::offer`] and of the sink.
    fn deliver(&mut self, wanted: &[Range<StoreBlock>], sink: &mut dyn BlockSink) -> Result<Delivered>;

    /// The hashes of its blocks. Those of a pipe come behind the blocks.
    fn hashes(&mut self) -> &mut dyn BlockHashes;

    /// Whether the source has the hashes before it hands over the blocks.
    fn knows_hashes(&self) -> bool;

    /// Whether offers announce fingerprints of blocks, by which seeds are searched. If they do not, seeds are searched by the blocks themselves.
    fn announces(&self) -> bool {
        true
    }

    /// The error that tells why there is nothing to restore, once there are no more offers.
    fn nothing_committed(&self) -> Error;

    /// Whether blocks were handed over that nothing proves to be those of the commit. Then digests must prove each image.
    fn has_unproved_blocks(&self) -> bool {
        false
    }

    /// Whether it is not known that an image of the last delivery is the one that was stored, although all of it came.
    fn is_doubtful(&self, path: &Path) -> bool {
        let _ = path;
        false
    }

    /// Why it handed over less than it has, although it committed images.
    fn stopped(&mut self) -> Option<Stopped> {
        None
    }

    /// Whether the archive is damaged behind the commit that was delivered last, so that a later commit may be lost.
    fn has_later_damage(&self) -> bool;
}
