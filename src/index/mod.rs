//! The index: fingerprints and chunks of extents, remembered across runs. A cache and nothing more.
//!
//! Fingerprints serve the next run. Chunks are entered for looking content up across runs and pools, which archives need; a
//! reclaim does not look them up, since the block table covers whatever is in its pool.
//!
//! What it holds is specified in `formats/index-v1.md`. An entry is keyed by an extent's address *and* the transaction that
//! wrote it, so that it is never taken for a later extent at the same place; every record carries its own hash. A damaged
//! index is thrown away and filled again; deleting it costs time and nothing else.
//!
//! Verbs know [`ChunkIndex`] and nothing of where it lies: in sled, or in memory. To put it elsewhere, implement the few calls of
//! `tables::Tables`, and run the index through the conformance suite in `tests/chunk_index.rs`.

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

/// Where indexes are kept unless the user names a folder.
pub const DEFAULT_FOLDER: &str = "/var/cache/vmfold";

/// A range of slots that an archive has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredSlots {
    /// Which, and what they are there.
    pub slots: KnownSlots,
    /// Whether that is news: it was not known before.
    pub is_news: bool,
}

/// An index of one filesystem.
pub trait ChunkIndex: Debug + Send + Sync {
    /// Whether it still answers: it is done without after its first error.
    fn is_usable(&self) -> bool;

    /// Remembers fingerprints of uncompressed extents too.
    fn keep_plain(&mut self);

    /// Fills in fingerprints that are remembered and not `known` yet.
    ///
    /// # Errors
    /// Those of the index.
    fn look_up(&mut self, facts: &mut Facts, known: &mut SlotSet) -> Result<()>;

    /// Leaves extents, by their places, out of the next [`ChunkIndex::update`]: what was read may not be what they held.
    fn forget(&mut self, extents: &mut dyn Iterator<Item = ExtentId>);

    /// Enters what is not remembered yet. Entries of earlier extents at the same place go; others stay, since they may belong to
    /// images that this run does not look at.
    ///
    /// # Errors
    /// Those of the index.
    fn update(&mut self, facts: &Facts) -> Result<()>;

    /// The addresses of extents that hold chunks which `is_wanted` takes by their weak ids.
    ///
    /// # Errors
    /// Those of the index.
    fn extents_with(&self, is_wanted: &dyn Fn(u64) -> bool) -> Result<Vec<u64>>;

    /// What an archive with these commits is known to hold of a pool: extents whose live blocks it has all, in order.
    ///
    /// # Errors
    /// Those of the index.
    fn stored(
        &self,
        archive: &[u8; 16],
        commits: &[Committed],
        facts: &Facts,
        digests: &[Option<u128>],
    ) -> Result<SpillVec<KnownSlots>>;

    /// Remembers what a commit made an archive hold of a pool: ascending ranges of slots.
    ///
    /// # Errors
    /// Those of the index.
    fn remember_stored(
        &self,
        archive: &[u8; 16],
        committed: &Committed,
        facts: &Facts,
        digests: &[Option<u128>],
        known: &mut dyn Iterator<Item = StoredSlots>,
    ) -> Result<()>;
}

/// What an index knows.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct IndexStatus {
    /// Its folder.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub folder: PathBuf,
    /// What it holds, by the function and the chunking it was made with.
    pub name: String,
    /// Extents in it.
    pub extents: u64,
    /// Bytes of their blocks.
    pub bytes: u64,
    /// Bytes of blocks whose fingerprint had to be read and is remembered.
    pub fingerprint_bytes: u64,
    /// Chunks in it.
    pub chunks: u64,
    /// Different chunks, estimated from one in sixty-four.
    pub distinct_chunks: u64,
    /// Bytes it takes on disk.
    pub disk_bytes: u64,
}
