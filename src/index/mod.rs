//! The index: fingerprints and chunks of extents, remembered across runs. It is only a cache.
//!
//! Fingerprints spare the next run reading. Chunks are looked up across runs and pools, for archives; a reclaim does not look them up,
//! since its block table covers its whole pool.
//!
//! Its format is specified in `formats/index-v2.md`. An entry has an extent's address, the transaction that wrote it, and a digest
//! of its checksums, so that it is never taken for a later extent at the same address, nor for one on a copy of the filesystem. Every record has a hash of its own. A damaged index is removed and filled
//! again; deleting it costs time and nothing else.
//!
//! Verbs use [`ChunkIndex`] and do not know whether it is in sled or in memory. To store it elsewhere, implement `tables::Tables`, and run
//! the index through the conformance suite in `tests/chunk_index.rs`.

mod memory;
mod record;
mod recorded;
mod sled;
mod stored;
mod tables;

use std::fmt::Debug;
use std::path::PathBuf;

use crate::archive::reader::Committed;
use crate::block::SlotSet;
use crate::content::KnownSlots;
use crate::error::Result;
use crate::facts::Facts;
use crate::numbers::ExtentId;
use crate::spill::SpillVec;

pub use self::memory::MemoryIndex;
pub use self::sled::{all_in, exists, open};

/// The folder of indexes, unless the user names another one.
pub const DEFAULT_FOLDER: &str = "/var/cache/vmfold";

/// A range of slots that an archive has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredSlots {
    /// The range, and what its slots are in the archive.
    pub slots: KnownSlots,
    /// Whether the index does not know it yet.
    pub is_news: bool,
}

/// The index of one filesystem.
pub trait ChunkIndex: Debug + Send + Sync {
    /// Whether the index can still be used. It cannot after its first error; runs then do without it.
    fn is_usable(&self) -> bool;

    /// Makes the index remember fingerprints of uncompressed extents too.
    fn keep_plain(&mut self);

    /// Fills in the fingerprints that are remembered and whose slots are not in `known` yet, and adds their slots. `digests` has the
    /// checksum digest of each extent ([`crate::fs::Filesystem::checksum_digests`]): what is remembered of an extent with another digest
    /// is not believed, since it comes from a copy of the filesystem, or from before a power cut that took back its last transactions. It
    /// may be empty where no fingerprints are remembered.
    ///
    /// # Errors
    /// Returns [`crate::error::Error::Index`] or [`crate::error::Error::Io`] if the index cannot be read.
    fn look_up(&mut self, facts: &mut Facts, digests: &[Option<u128>], known: &mut SlotSet) -> Result<()>;

    /// Leaves extents out of the next [`ChunkIndex::update`], because what was read of them may not be what they hold.
    fn forget(&mut self, extents: &mut dyn Iterator<Item = ExtentId>);

    /// Adds the extents that are not remembered yet, and removes entries of earlier extents that overlap them. Other entries stay, since
    /// they may belong to images that this run does not cover. `digests` has the checksum digest of each extent, as for
    /// [`ChunkIndex::look_up`].
    ///
    /// # Errors
    /// Returns [`crate::error::Error::Index`] or [`crate::error::Error::Io`] if the index cannot be read or written.
    fn update(&mut self, facts: &Facts, digests: &[Option<u128>]) -> Result<()>;

    /// Returns the addresses of extents with a chunk for whose weak id `is_wanted` is true.
    ///
    /// # Errors
    /// Returns [`crate::error::Error::Index`] or [`crate::error::Error::Io`] if the index cannot be read.
    fn extents_with(&self, is_wanted: &dyn Fn(u64) -> bool) -> Result<Vec<u64>>;

    /// Returns what an archive with these commits is known to hold of a pool, in the order of slots. It covers extents whose live blocks
    /// the archive has all. `digests` has the checksum digest of each extent.
    ///
    /// # Errors
    /// Returns [`crate::error::Error::Index`] or [`crate::error::Error::Io`] if the index cannot be read.
    fn stored(
        &self,
        archive: &[u8; 16],
        commits: &[Committed],
        facts: &Facts,
        digests: &[Option<u128>],
    ) -> Result<SpillVec<KnownSlots>>;

    /// Remembers what an archive holds of a pool since a commit. `known` has ascending ranges of slots.
    ///
    /// # Errors
    /// Returns [`crate::error::Error::Index`] or [`crate::error::Error::Io`] if the index cannot be written.
    fn remember_stored(
        &self,
        archive: &[u8; 16],
        committed: &Committed,
        facts: &Facts,
        digests: &[Option<u128>],
        known: &mut dyn Iterator<Item = StoredSlots>,
    ) -> Result<()>;
}

/// Statistics of an index.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct IndexStatus {
    /// Its folder.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub folder: PathBuf,
    /// The name of its table, from the fingerprint function and the chunk parameters that it was made with.
    pub name: String,
    /// The number of extents.
    pub extents: u64,
    /// The bytes of their blocks.
    pub bytes: u64,
    /// The bytes of blocks whose fingerprints are remembered, because they had to be computed.
    pub fingerprint_bytes: u64,
    /// The number of chunks.
    pub chunks: u64,
    /// The number of distinct chunks, estimated from one in 64.
    pub distinct_chunks: u64,
    /// Its size on disk in bytes.
    pub disk_bytes: u64,
}
