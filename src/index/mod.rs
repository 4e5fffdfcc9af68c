//! The index: fingerprints and chunks of extents, remembered across runs in sled. A cache and nothing more.
//!
//! Fingerprints serve the next run. Chunks are entered for looking content up across runs and pools, which archives need; a
//! reclaim does not look them up, since the block table covers whatever is in its pool.
//!
//! What it holds is specified in `formats/index-v1.md`. An entry is keyed by an extent's address *and* the transaction that
//! wrote it, so that it is never taken for a later extent at the same place; every record carries its own hash. A damaged
//! index is thrown away and filled again; deleting it costs time and nothing else.

mod database;
mod record;
pub mod stored;

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use database::{Database, Problem};
use record::Entry;

use crate::block::{BLOCK_BYTES, SlotSet};
use crate::chunk::{self, Chunker};
use crate::error::{Error, Result};
use crate::facts::{Extent, Facts};
use crate::fingerprint::Function;
use crate::monitor::Monitor;
use crate::own_folder::own_folder;
use crate::shown::{hex, shown};
use crate::spill::SpillVec;

/// Address space that one record covers: one record for each extent would cost more than what it holds.
const SEGMENT_BYTES: u64 = 32 << 20;

/// What the names of trees begin with.
const TREE_PREFIX: &str = "extents-";

/// Where indexes are kept unless the user names a folder.
pub const DEFAULT_FOLDER: &str = "/var/cache/vmfold";

/// An index of one filesystem.
#[derive(Debug)]
pub struct Index {
    folder: PathBuf,
    database: Database,
    /// The name of the tree of extents.
    tree: Vec<u8>,
    /// Extents, by place in the facts last looked up, whose entry is as it should be.
    current: SpillVec<bool>,
    /// Whether fingerprints of uncompressed extents are remembered too: the filesystem's checksums do not serve.
    keep_plain: bool,
}

/// What an index knows.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Status {
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

impl Index {
    /// Opens the index of the filesystem with this UUID, or makes it, for fingerprints of a function; without one, whatever it
    /// holds. What is damaged is thrown away, with a note.
    ///
    /// # Errors
    /// If another process uses it, or the folder cannot be written.
    pub fn open(folder: &Path, uuid: [u8; 16], function: Option<Function>, monitor: &dyn Monitor) -> Result<Self> {
        let folder = folder_of(folder, &uuid)?;
        let problem = match Self::open_in(&folder, function) {
            Err(Problem::Damaged(problem)) => problem,
            opened => return opened.map_err(|problem| error_of(&folder, problem)),
        };
        monitor.note(&format!(
            "The index `{}` is damaged and is made anew: {problem}",
            shown(&folder)
        ));
        std::fs::remove_dir_all(&folder).map_err(Error::io("remove the damaged index", &folder))?;
        own_folder(&folder)?;
        Self::open_in(&folder, function).map_err(|problem| error_of(&folder, problem))
    }

    /// Without a function, opens whatever tree is there.
    fn open_in(folder: &Path, function: Option<Function>) -> std::result::Result<Self, Problem> {
        // Chunks cut in another way are of no use any more.
        let keep = function.map(|function| tree_name(function).into_bytes());
        let database = Database::open(folder, TREE_PREFIX, keep.clone())?;
        let tree = if let Some(tree) = keep {
            tree
        } else {
            let mut trees = database.trees()?.into_iter();
            let present = trees.find(|name| name.starts_with(TREE_PREFIX.as_bytes()));
            present.unwrap_or_else(|| TREE_PREFIX.into())
        };
        Ok(Self {
            folder: folder.to_owned(),
            database,
            tree,
            current: SpillVec::default(),
            keep_plain: false,
        })
    }

    /// Whether it still answers: it is done without after its first error.
    pub fn is_usable(&self) -> bool {
        self.database.is_usable()
    }

    /// Fills in fingerprints that are remembered and not `known` yet.
    ///
    /// # Errors
    /// Those of the index.
    pub fn look_up(&mut self, facts: &mut Facts, known: &mut SlotSet) -> Result<()> {
        self.current = SpillVec::of_in(false, facts.extents.len(), facts.budget());
        let mut at = 0;
        while at < facts.extents.len() {
            let segment = facts.extents[at].address / SEGMENT_BYTES;
            let end = at + facts.extents[at..].partition_point(|extent| extent.address / SEGMENT_BYTES == segment);
            let entries: HashMap<(u64, u64), Entry> = self
                .read(segment)?
                .into_iter()
                .map(|entry| ((entry.address, entry.generation), entry))
                .collect();
            for place in at..end {
                let extent = &facts.extents[place];
                let Some(entry) = entries.get(&(extent.address, extent.generation)) else {
                    continue;
                };
                if entry.blocks != extent.blocks || !extent.class.checksummed {
                    continue;
                }
                let first = extent.first_slot;
                for (run, fingerprints) in entry.fingerprints() {
                    for (block, fingerprint) in run.zip(fingerprints) {
                        if !known.contains(first + block) {
                            facts
                                .fingerprints
                                .write(first + block, std::slice::from_ref(fingerprint));
                            known.insert(first + block);
                        }
                    }
                }
                let slots = extent.slots();
                self.current[place] = facts
                    .live_runs(slots)
                    .all(|mut run| run.all(|slot| known.contains(slot)))
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

    /// Remembers fingerprints of uncompressed extents too.
    pub fn keep_plain(&mut self) {
        self.keep_plain = true;
    }

    /// Leaves extents out of the next [`Index::update`]: what was read may not be what they held.
    pub fn forget(&mut self, extents: impl IntoIterator<Item = u32>) {
        for extent in extents {
            if let Some(current) = self.current.get_mut(extent as usize) {
                *current = true;
            }
        }
    }

    /// Enters what is not remembered yet. Entries of earlier extents at the same place go; others stay, since they may belong to
    /// images that this run does not look at.
    ///
    /// # Errors
    /// Those of the index.
    pub fn update(&mut self, facts: &Facts) -> Result<()> {
        let segment_of = |extent: &Extent| extent.address / SEGMENT_BYTES;
        let mut chunker = Chunker::default();
        let mut next = 0;
        for extents in facts
            .extents
            .chunk_by(|one, other| segment_of(one) == segment_of(other))
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
            // By their addresses, without overlap.
            let new = changed.iter();
            let new: Vec<Entry> = new
                .map(|place| Entry::of(facts, *place, self.keep_plain, &mut chunker))
                .collect();
            entries.retain(|old| {
                let after = new.partition_point(|new| new.end() <= old.address);
                new.get(after).is_none_or(|new| old.end() <= new.address)
            });
            entries.extend(new);
            entries.sort_by_key(|entry| entry.address);
            let record = (segment.to_be_bytes().to_vec(), record::encode(&entries));
            self.database
                .put(&self.tree, vec![record])
                .map_err(|problem| self.error(problem))?;
        }
        self.database.flush().map_err(|problem| self.error(problem))
    }

    /// The addresses of extents that hold chunks which `is_wanted` takes by their weak ids.
    ///
    /// # Errors
    /// Those of the index.
    pub fn extents_with(&self, is_wanted: impl Fn(u64) -> bool) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        self.for_each(|entry| {
            if entry.chunks.iter().any(|chunk| is_wanted(chunk.weak_id)) {
                found.push(entry.address);
            }
        })?;
        Ok(found)
    }

    /// Calls `visit` with every entry; records that are damaged have none.
    fn for_each(&self, mut visit: impl FnMut(&Entry)) -> Result<()> {
        /// Records fetched at a time.
        const AT_ONCE: usize = 64;
        let mut last = None;
        loop {
            let records = self.database.after(&self.tree, last.take(), AT_ONCE);
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

    /// Whether there is an index of the filesystem with this UUID.
    pub fn exists(folder: &Path, uuid: [u8; 16]) -> bool {
        folder.join(hex(&uuid)).join("sled").is_dir()
    }

    /// The entries of a segment; none if its record is missing or damaged, for then it is made anew.
    fn read(&self, segment: u64) -> Result<Vec<Entry>> {
        let records = self.database.get(&self.tree, vec![segment.to_be_bytes().to_vec()]);
        let record = records.map_err(|problem| self.error(problem))?.pop().flatten();
        Ok(record.and_then(|record| record::decode(&record)).unwrap_or_default())
    }

    fn error(&self, problem: Problem) -> Error {
        error_of(&self.folder, problem)
    }

    /// What it knows.
    ///
    /// # Errors
    /// Those of the index.
    pub fn status(&self) -> Result<Status> {
        /// One id in so many is remembered to count different ones.
        const SAMPLE: u64 = 64;
        let disk_bytes = self.database.disk_bytes().map_err(|problem| self.error(problem))?;
        let mut status = Status {
            folder: self.folder.clone(),
            name: String::from_utf8_lossy(&self.tree).into_owned(),
            extents: 0,
            bytes: 0,
            fingerprint_bytes: 0,
            chunks: 0,
            distinct_chunks: 0,
            disk_bytes,
        };
        let mut seen = std::collections::HashSet::new();
        self.for_each(|entry| {
            let blocks = entry.chunks.iter().map(|chunk| u64::from(chunk.blocks));
            status.extents += 1;
            status.bytes += blocks.sum::<u64>() * BLOCK_BYTES;
            let remembered = entry.fingerprints().map(|(run, _)| u64::from(run.end - run.start));
            status.fingerprint_bytes += remembered.sum::<u64>() * BLOCK_BYTES;
            status.chunks += entry.chunks.len() as u64;
            let ids = entry.chunks.iter().map(|chunk| chunk.weak_id);
            seen.extend(ids.filter(|id| id % SAMPLE == 0));
        })?;
        status.distinct_chunks = (seen.len() as u64 * SAMPLE).min(status.chunks);
        Ok(status)
    }
}

fn error_of(folder: &Path, problem: Problem) -> Error {
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

/// The tree for fingerprints of a function and the chunking of this version.
fn tree_name(function: Function) -> String {
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

/// Finds the indexes in a folder.
///
/// # Errors
/// If the folder cannot be read.
pub fn all_in(folder: &Path, monitor: &dyn Monitor) -> Result<Vec<Status>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(Error::io("look into", folder)(error)),
    };
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for name in names {
        let Some(uuid) = parse_hex(&name) else { continue };
        found.push(Index::open(folder, uuid, None, monitor)?.status()?);
    }
    Ok(found)
}

/// The folder of the index of a filesystem, which is made if it does not exist. What is in it is believed, and written to by its name:
/// so nobody else may be able to put anything there, or another folder in its place.
fn folder_of(indexes: &Path, uuid: &[u8; 16]) -> Result<PathBuf> {
    let failed = Error::io("look at", indexes);
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(indexes)
        .map_err(Error::io("make the folder", indexes))?;
    let stat = rustix::fs::stat(indexes).map_err(failed)?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    let is_mine = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    let others_move = mode.intersects(Mode::WGRP | Mode::WOTH) && !mode.contains(Mode::SVTX);
    if !is_mine || others_move {
        return Err(Error::NotOurs {
            path: indexes.to_owned(),
        });
    }
    let folder = indexes.join(hex(uuid));
    own_folder(&folder)?;
    Ok(folder)
}

fn parse_hex(name: &str) -> Option<[u8; 16]> {
    let mut uuid = [0; 16];
    if name.len() != 32 || !name.is_ascii() {
        return None;
    }
    for (at, byte) in uuid.iter_mut().enumerate() {
        *byte = u8::from_str_radix(name.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    use crate::fs::simulated::one_image;

    const EXTENT_BLOCKS: u32 = 32 << 10;
    const EXTENTS: u32 = 100;

    fn facts(fingerprints: Vec<u32>) -> Facts {
        let extent = |number| number * EXTENT_BLOCKS..(number + 1) * EXTENT_BLOCKS;
        let mut facts = one_image((0..EXTENTS).map(extent), 1);
        facts.fingerprints = fingerprints.into();
        facts
    }

    fn open(folder: &Path) -> Index {
        Index::open(
            folder,
            [1; 16],
            Some(Function::Crc32c),
            &crate::monitor::Silent::default(),
        )
        .unwrap()
    }

    #[test]
    fn what_lies_where_an_extent_was_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let mut index = open(folder.path());
        index.keep_plain();
        let mut enter = |places: &[Range<u32>]| {
            let slots: u32 = places.iter().map(|place| place.end - place.start).sum();
            let mut facts = one_image(places.iter().cloned(), 1);
            facts.fingerprints = (0..slots).collect::<Vec<_>>().into();
            index.look_up(&mut facts, &mut SlotSet::new(slots as usize)).unwrap();
            index.update(&facts).unwrap();
            let entries = index.read(0).unwrap().into_iter();
            entries.map(|entry| entry.address / BLOCK_BYTES).collect::<Vec<_>>()
        };
        assert_eq!(enter(&[0..8, 8..16, 16..24, 40..48]), [0, 8, 16, 40]);
        assert_eq!(enter(&[4..12, 24..32]), [4, 16, 24, 40]);
        assert_eq!(enter(&[12..16, 20..44]), [4, 12, 20]);
    }

    #[test]
    fn nothing_is_lost_when_it_is_closed_and_opened_again_on_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let open = || open(folder.path());
        let all: Vec<u32> = (0..EXTENTS * EXTENT_BLOCKS)
            .map(|slot| slot.wrapping_mul(0x9e37_79b9))
            .collect();
        assert!(all.len() * 4 > database::OPEN_BYTES, "or it is never closed");
        let known = || SlotSet::new(all.len());
        {
            let mut index = open();
            index.keep_plain();
            let mut facts = facts(all.clone());
            index.look_up(&mut facts, &mut known()).unwrap();
            index.update(&facts).unwrap();
        }
        let mut found = facts(vec![0; all.len()]);
        let mut known = known();
        open().look_up(&mut found, &mut known).unwrap();
        assert!((0..found.slots()).all(|slot| known.contains(slot)));
        assert_eq!(found.fingerprints.range(0..found.slots()), all);
    }
}
