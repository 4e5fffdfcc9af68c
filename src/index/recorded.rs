//! The index over any tables.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::record::{self, ExtentRecord};
use super::stored::{self, AT_ONCE, StoredRange, ZEROS};
use super::tables::{Problem, Tables};
use super::{ChunkIndex, StoredSlots};
use crate::archive::reader::Committed;
use crate::block::SlotSet;
use crate::chunk::{self, Chunker};
use crate::content::{Content, KnownSlots};
use crate::error::{Error, Result};
use crate::facts::{Extent, Facts};
use crate::fingerprint::FingerprintFunction;
use crate::numbers::ExtentId;
use crate::range;
use crate::spill::SpillVec;

/// Address space of one record: a record for each extent would cost more than its content.
const SEGMENT_BYTES: u64 = 32 << 20;

/// The prefix of the names of extents' tables.
pub(super) const TREE_PREFIX: &str = "extents-";

/// An index whose records lie in tables.
#[derive(Debug)]
pub(super) struct Recorded<T> {
    /// The folder that it lies in, for messages.
    folder: PathBuf,
    tables: T,
    /// The name of the table of extents.
    tree: Vec<u8>,
    /// For each extent of the facts that were looked up last, whether its entry is up to date.
    current: SpillVec<bool>,
    /// Whether fingerprints of uncompressed extents are remembered too, because the filesystem's checksums are not usable.
    keep_plain: bool,
}

impl<T: Tables> Recorded<T> {
    /// Makes the index over a table of extents.
    pub(super) fn new(folder: &Path, tables: T, tree: Vec<u8>) -> Self {
        Self {
            folder: folder.to_owned(),
            tables,
            tree,
            current: SpillVec::default(),
            keep_plain: false,
        }
    }

    /// Returns the tables.
    pub(super) fn tables(&self) -> &T {
        &self.tables
    }

    /// Returns the folder, and the name of the table of extents.
    pub(super) fn name(&self) -> (&Path, &[u8]) {
        (&self.folder, &self.tree)
    }

    /// Calls `visit` with every entry, except those of damaged records.
    pub(super) fn for_each(&self, mut visit: impl FnMut(&ExtentRecord)) -> Result<()> {
        /// Records that are fetched at a time.
        const AT_ONCE: usize = 64;
        let mut last = None;
        loop {
            let records = self.tables.after(&self.tree, last.take(), AT_ONCE);
            let records = records.map_err(|problem| self.error(problem))?;
            for (_, record) in &records {
                record::decode(record).unwrap_or_default().iter().for_each(&mut visit);
            }
            match records.into_iter().next_back() {
                Some((key, _)) => last = Some(key),
                None => return Ok(()),
            }
        }
    }

    /// Returns the entries of a segment; none if its record is missing or damaged, which is then replaced.
    pub(super) fn read(&self, segment: u64) -> Result<Vec<ExtentRecord>> {
        let records = self.tables.get(&self.tree, vec![segment.to_be_bytes().to_vec()]);
        let record = records.map_err(|problem| self.error(problem))?.pop().flatten();
        Ok(record.and_then(|record| record::decode(&record)).unwrap_or_default())
    }

    pub(super) fn error(&self, problem: Problem) -> Error {
        error_of(&self.folder, problem)
    }
}

impl<T: Tables> ChunkIndex for Recorded<T> {
    fn is_usable(&self) -> bool {
        self.tables.is_usable()
    }

    fn keep_plain(&mut self) {
        self.keep_plain = true;
    }

    fn look_up(&mut self, facts: &mut Facts, digests: &[Option<u128>], known: &mut SlotSet) -> Result<()> {
        self.current = SpillVec::of_in(false, facts.extents.len(), facts.budget());
        let mut at = 0;
        while at < facts.extents.len() {
            let segment = facts.extents[at].address / SEGMENT_BYTES;
            let end = at + facts.extents[at..].partition_point(|extent| extent.address / SEGMENT_BYTES == segment);
            let entries: HashMap<(u64, u64), ExtentRecord> = self
                .read(segment)?
                .into_iter()
                .map(|entry| ((entry.address, entry.generation), entry))
                .collect();
            for place in at..end {
                let extent = &facts.extents[place];
                let Some(entry) = entries.get(&(extent.address, extent.generation)) else {
                    continue;
                };
                let is_another = entry.has_fingerprints() && entry.digest != digest_at(digests, place);
                if is_another || entry.blocks != extent.blocks || !extent.class.checksummed {
                    continue;
                }
                let first = extent.first_slot;
                let remembered = entry.fingerprints();
                let remembered = remembered.flat_map(|(run, fingerprints)| run.zip(fingerprints));
                for (block, fingerprint) in remembered {
                    if !known.contains(first + block) {
                        facts.fingerprints.write(first + block, &[*fingerprint]);
                        known.insert(first + block);
                    }
                }
                let slots = extent.slots();
                self.current[place] = facts
                    .live_runs(slots)
                    .all(|run| range::each(run).all(|slot| known.contains(slot)))
                    && entry.covers(
                        facts
                            .live_runs(extent.slots())
                            .map(|run| run.start - first..run.end - first),
                    );
            }
            at = end;
        }
        Ok(())
    }

    fn forget(&mut self, extents: &mut dyn Iterator<Item = ExtentId>) {
        for extent in extents {
            if let Some(current) = self.current.get_mut(extent.index()) {
                *current = true;
            }
        }
    }

    fn update(&mut self, facts: &Facts, digests: &[Option<u128>]) -> Result<()> {
        let segment_of = |extent: &Extent| extent.address / SEGMENT_BYTES;
        let mut chunker = Chunker::default();
        let mut next = 0;
        for extents in facts
            .extents
            .chunk_by(|left, right| segment_of(left) == segment_of(right))
        {
            let places = next..next + extents.len();
            next = places.end;
            let is_current = |place: usize| self.current.get(place).copied().unwrap_or(false);
            let changed: Vec<usize> = places.filter(|place| !is_current(*place)).collect();
            if changed.is_empty() {
                continue;
            }
            let segment = segment_of(&extents[0]);
            let mut entries = self.read(segment)?;
            // The entries are in the order of their addresses, and do not overlap.
            let new = changed.iter();
            let new: Vec<ExtentRecord> = new
                .map(|place| {
                    let digest = digest_at(digests, *place);
                    ExtentRecord::of(facts, *place, digest, self.keep_plain, &mut chunker)
                })
                .collect();
            entries.retain(|old| {
                let after = new.partition_point(|new| new.end() <= old.address);
                new.get(after).is_none_or(|new| old.end() <= new.address)
            });
            entries.extend(new);
            entries.sort_by_key(|entry| entry.address);
            let record = (segment.to_be_bytes().to_vec(), record::encode(&entries));
            self.tables
                .put(&self.tree, vec![record])
                .map_err(|problem| self.error(problem))?;
        }
        self.tables.flush().map_err(|problem| self.error(problem))
    }

    fn extents_with(&self, is_wanted: &dyn Fn(u64) -> bool) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        self.for_each(|entry| {
            if entry.chunks.iter().any(|chunk| is_wanted(chunk.weak_id)) {
                found.push(entry.address);
            }
        })?;
        Ok(found)
    }

    fn stored(
        &self,
        archive: &[u8; 16],
        commits: &[Committed],
        facts: &Facts,
        digests: &[Option<u128>],
    ) -> Result<SpillVec<KnownSlots>> {
        let mut known = SpillVec::new_in(facts.budget());
        let extents = facts.extents.iter().zip(digests);
        let mut extents =
            extents.filter_map(|(extent, digest)| Some((extent, digest.filter(|_| extent.class.checksummed)?)));
        loop {
            let batch: Vec<(&Extent, u128)> = extents.by_ref().take(AT_ONCE).collect();
            if batch.is_empty() {
                return Ok(known);
            }
            let keys = batch.iter().map(|(extent, _)| stored::key(extent).to_vec()).collect();
            let entries = self.tables.get(&stored::tree_of(archive), keys);
            let entries = entries.map_err(|problem| self.error(problem))?;
            for ((extent, digest), entry) in batch.into_iter().zip(entries) {
                let Some(parts) = entry.and_then(|entry| stored::decode(&entry, digest, commits)) else {
                    continue;
                };
                known.extend(stored::slots_of(extent, &parts));
            }
        }
    }

    fn remember_stored(
        &self,
        archive: &[u8; 16],
        committed: &Committed,
        facts: &Facts,
        digests: &[Option<u128>],
        known: &mut dyn Iterator<Item = StoredSlots>,
    ) -> Result<()> {
        let tree = stored::tree_of(archive);
        let put = |batch| self.tables.put(&tree, batch).map_err(|problem| self.error(problem));
        let mut known = known.peekable();
        let mut batch = Vec::new();
        for (extent, digest) in facts.extents.iter().zip(digests) {
            let (mut parts, mut is_new) = (Vec::new(), false);
            while let Some(StoredSlots { slots, is_news }) =
                known.peek().filter(|one| one.slots.slot < extent.slots().end)
            {
                let start = slots.slot.max(extent.first_slot);
                is_new |= is_news;
                parts.push(StoredRange {
                    block: start - extent.first_slot,
                    blocks: slots.end().min(extent.slots().end) - start,
                    store: match slots.content_at(start) {
                        Content::Stored(store) => store,
                        _ => ZEROS,
                    },
                });
                if slots.end() > extent.slots().end {
                    break;
                }
                known.next();
            }
            if let Some(digest) = digest.filter(|_| is_new && extent.class.checksummed) {
                batch.push((stored::key(extent).to_vec(), stored::encode(digest, committed, &parts)));
            }
            if batch.len() == AT_ONCE {
                put(std::mem::take(&mut batch))?;
            }
        }
        put(batch)?;
        self.tables.flush().map_err(|problem| self.error(problem))
    }
}

/// Returns the digest of an extent's checksums; `None` without digests too.
fn digest_at(digests: &[Option<u128>], place: usize) -> Option<u128> {
    digests.get(place).copied().flatten()
}

pub(super) fn error_of(folder: &Path, problem: Problem) -> Error {
    match problem {
        Problem::Busy => Error::Busy {
            path: folder.to_owned(),
        },
        Problem::Io(error) => Error::io("use the index", folder)(error),
        problem => Error::Index {
            path: folder.to_owned(),
            problem: problem.to_string(),
        },
    }
}

/// Returns the name of the table for fingerprints of a function, and for this version's chunk parameters.
pub(super) fn tree_name(function: FingerprintFunction) -> String {
    let parameters = chunk::PARAMETERS;
    format!(
        "{TREE_PREFIX}v{}-{}-{}-{}-{}-cuts-v{}",
        record::VERSION,
        function.name(),
        parameters.min_blocks,
        parameters.average_blocks,
        parameters.max_blocks,
        chunk::VERSION
    )
}
