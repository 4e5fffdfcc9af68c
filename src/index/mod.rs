//! The index: fingerprints and chunks of extents, remembered across runs in sled. A cache and nothing more.
//!
//! Fingerprints serve the next run. Chunks are entered for looking content up across runs and pools, which archives need; a
//! reclaim does not look them up, since the block table covers whatever is in its pool.
//!
//! What it holds is specified in `formats/index-v1.md`. An entry is keyed by an extent's address *and* the transaction that
//! wrote it, so that it is never taken for a later extent at the same place; every record carries its own hash. A damaged
//! index is thrown away and filled again; deleting it costs time and nothing else.

mod record;
pub mod stored;

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use record::Entry;

use crate::block::SlotSet;
use crate::chunk::{self, Chunker};
use crate::error::{Error, Result};
use crate::facts::{Extent, Facts};
use crate::fingerprint::Function;
use crate::monitor::Monitor;
use crate::shown::shown;
use crate::spill::SpillVec;

/// Memory that sled may use for its pages.
const CACHE_BYTES: u64 = 8 << 20;
/// Bytes of records after which sled is closed and opened again: only so does it give back what its pages take, of which it keeps a
/// hundred megabytes and more whatever its cache is to take.
const OPEN_BYTES: usize = 8 << 20;
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
    /// None only after it could not be opened again.
    sled: Option<Sled>,
    /// Bytes of records read and written since it was opened.
    touched_bytes: usize,
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

/// An open database, and the tree of extents in it.
#[derive(Debug)]
struct Sled {
    db: sled::Db,
    tree: sled::Tree,
}

impl Sled {
    fn open_db(folder: &Path) -> sled::Result<sled::Db> {
        sled::Config::new()
            .path(folder.join("sled"))
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .mode(sled::Mode::LowSpace)
            .open()
    }

    /// Opens a database that was open until now: threads of its own may have it open for a moment yet.
    fn open_db_again(folder: &Path) -> sled::Result<sled::Db> {
        const TRIES: u32 = 1000;
        const BETWEEN: Duration = Duration::from_millis(10);
        for _ in 0..TRIES {
            match Self::open_db(folder) {
                Err(error) if is_locked(&error) => std::thread::sleep(BETWEEN),
                opened => return opened,
            }
        }
        Self::open_db(folder)
    }

    /// Closes it and opens it again, without what it kept in memory.
    fn again(self, folder: &Path) -> sled::Result<Self> {
        let name = self.tree.name();
        self.db.flush()?;
        drop(self);
        let db = Self::open_db_again(folder)?;
        let tree = db.open_tree(name)?;
        Ok(Self { db, tree })
    }
}

impl Index {
    /// Opens the index of the filesystem with this UUID, or makes it, for fingerprints of a function; without one, whatever it
    /// holds. What is damaged is thrown away, with a note.
    ///
    /// # Errors
    /// If another process uses it, or the folder cannot be written.
    pub fn open(folder: &Path, uuid: [u8; 16], function: Option<Function>, monitor: &dyn Monitor) -> Result<Self> {
        let folder = folder.join(hex(&uuid));
        std::fs::create_dir_all(&folder).map_err(Error::io("make the folder", &folder))?;
        let problem = match open_sled(&folder, function) {
            Ok(index) => return Ok(index),
            Err(Opening::Busy) => {
                return Err(Error::Busy { path: folder });
            }
            Err(Opening::Io(error)) => return Err(Error::io("open the index", &folder)(error)),
            Err(Opening::Damaged(problem)) => problem,
        };
        monitor.note(&format!(
            "The index `{}` is damaged and is made anew: {problem}",
            shown(&folder)
        ));
        std::fs::remove_dir_all(&folder).map_err(Error::io("remove the damaged index", &folder))?;
        std::fs::create_dir_all(&folder).map_err(Error::io("make the folder", &folder))?;
        open_sled(&folder, function).map_err(|_| Error::Index {
            path: folder,
            problem: "it cannot be made anew".into(),
        })
    }

    /// Fills in fingerprints that are remembered and not `known` yet.
    ///
    /// # Errors
    /// Those of the index.
    pub fn look_up(&mut self, facts: &mut Facts, known: &mut SlotSet) -> Result<()> {
        self.current = SpillVec::of(false, facts.extents.len());
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
            let record = record::encode(&entries);
            let bytes = record.len();
            self.sled()?
                .tree
                .insert(segment.to_be_bytes(), record)
                .map_err(|error| self.error(&error))?;
            self.touched(bytes)?;
        }
        self.sled()?.db.flush().map_err(|error| self.error(&error))?;
        self.touched(0)
    }

    /// The addresses of extents that hold chunks which `is_wanted` takes by their weak ids.
    ///
    /// # Errors
    /// Those of the index.
    pub fn extents_with(&self, is_wanted: impl Fn(u64) -> bool) -> Result<Vec<u64>> {
        let mut found = Vec::new();
        for record in &self.sled()?.tree {
            let (_, record) = record.map_err(|error| self.error(&error))?;
            let entries = record::decode(&record).unwrap_or_default();
            let holding = entries
                .iter()
                .filter(|entry| entry.chunks.iter().any(|chunk| is_wanted(chunk.weak_id)));
            found.extend(holding.map(|entry| entry.address));
        }
        Ok(found)
    }

    /// Whether there is an index of the filesystem with this UUID.
    pub fn exists(folder: &Path, uuid: [u8; 16]) -> bool {
        folder.join(hex(&uuid)).join("sled").is_dir()
    }

    /// The entries of a segment; none if its record is missing or damaged, for then it is made anew.
    fn read(&mut self, segment: u64) -> Result<Vec<Entry>> {
        let record = self
            .sled()?
            .tree
            .get(segment.to_be_bytes())
            .map_err(|error| self.error(&error))?;
        self.touched(record.as_ref().map_or(0, |record| record.len()))?;
        Ok(record.and_then(|record| record::decode(&record)).unwrap_or_default())
    }

    fn sled(&self) -> Result<&Sled> {
        self.sled.as_ref().ok_or_else(|| Error::Index {
            path: self.folder.clone(),
            problem: "it could not be opened again".into(),
        })
    }

    /// Counts what was read or written, and has sled forget it when that is much.
    fn touched(&mut self, bytes: usize) -> Result<()> {
        self.touched_bytes += bytes;
        if self.touched_bytes > OPEN_BYTES
            && let Some(sled) = self.sled.take()
        {
            self.sled = Some(sled.again(&self.folder).map_err(|error| self.error(&error))?);
            self.touched_bytes = 0;
        }
        Ok(())
    }

    fn error(&self, error: &sled::Error) -> Error {
        Error::Index {
            path: self.folder.clone(),
            problem: error.to_string(),
        }
    }

    /// What it knows.
    ///
    /// # Errors
    /// Those of the index.
    pub fn status(&self) -> Result<Status> {
        /// One id in so many is remembered to count different ones.
        const SAMPLE: u64 = 64;
        let mut status = Status {
            folder: self.folder.clone(),
            name: String::from_utf8_lossy(&self.sled()?.tree.name()).into_owned(),
            extents: 0,
            bytes: 0,
            fingerprint_bytes: 0,
            chunks: 0,
            distinct_chunks: 0,
            disk_bytes: self.sled()?.db.size_on_disk().map_err(|error| self.error(&error))?,
        };
        let mut seen = std::collections::HashSet::new();
        for record in &self.sled()?.tree {
            let (_, record) = record.map_err(|error| self.error(&error))?;
            for entry in record::decode(&record).unwrap_or_default() {
                status.extents += 1;
                status.bytes += entry
                    .chunks
                    .iter()
                    .map(|chunk| crate::block::bytes(chunk.blocks.into()))
                    .sum::<u64>();
                status.fingerprint_bytes += entry
                    .fingerprints()
                    .map(|(run, _)| crate::block::bytes(run.end - run.start))
                    .sum::<u64>();
                status.chunks += entry.chunks.len() as u64;
                seen.extend(
                    entry
                        .chunks
                        .iter()
                        .map(|chunk| chunk.weak_id)
                        .filter(|id| id % SAMPLE == 0),
                );
            }
        }
        status.distinct_chunks = (seen.len() as u64 * SAMPLE).min(status.chunks);
        Ok(status)
    }
}

/// Whether someone else has it open.
fn is_locked(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("could not acquire lock"))
}

enum Opening {
    Busy,
    Io(std::io::Error),
    Damaged(String),
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

/// Opens sled, whose own checks are partly panics. Without a function, whatever tree is there.
fn open_sled(folder: &Path, function: Option<Function>) -> std::result::Result<Index, Opening> {
    let open = || -> std::result::Result<Index, sled::Error> {
        let db = Sled::open_db(folder)?;
        let is_extents = |name: &sled::IVec| name.starts_with(TREE_PREFIX.as_bytes());
        let present = db.tree_names().into_iter().find(is_extents).map(|name| name.to_vec());
        let name = function
            .map(|function| tree_name(function).into_bytes())
            .or(present)
            .unwrap_or(TREE_PREFIX.into());
        // Chunks cut in another way are of no use any more.
        for other in db
            .tree_names()
            .iter()
            .filter(|other| is_extents(other) && other[..] != name[..])
        {
            db.drop_tree(other)?;
        }
        let tree = db.open_tree(&name)?;
        // Every record is read once: a damaged page shows now, not in the middle of a run.
        let mut read_bytes = 0;
        for record in &tree {
            read_bytes += record?.1.len();
        }
        let mut sled = Sled { db, tree };
        if read_bytes > OPEN_BYTES {
            sled = sled.again(folder)?;
        }
        Ok(Index {
            folder: folder.to_owned(),
            sled: Some(sled),
            touched_bytes: 0,
            current: SpillVec::new(),
            keep_plain: false,
        })
    };
    let quiet = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let opened = catch_unwind(AssertUnwindSafe(open));
    std::panic::set_hook(quiet);
    match opened {
        Ok(Ok(index)) => Ok(index),
        Ok(Err(error)) if is_locked(&error) => Err(Opening::Busy),
        Ok(Err(sled::Error::Io(error)))
            if matches!(
                error.kind(),
                std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::StorageFull
                    | std::io::ErrorKind::ReadOnlyFilesystem
            ) =>
        {
            Err(Opening::Io(error))
        }
        Ok(Err(error)) => Err(Opening::Damaged(error.to_string())),
        Err(_) => Err(Opening::Damaged("its pages make no sense".into())),
    }
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

/// A UUID in hexadecimal digits.
pub(crate) fn hex(uuid: &[u8; 16]) -> String {
    uuid.iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
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

    use crate::block::BLOCK_BYTES;
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
    fn it_waits_until_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let open = Sled::open_db(folder.path()).unwrap();
        assert!(Sled::open_db(folder.path()).is_err_and(|error| is_locked(&error)));
        std::thread::scope(|scope| {
            let again = scope.spawn(|| Sled::open_db_again(folder.path()).map(drop));
            std::thread::sleep(Duration::from_millis(50));
            drop(open);
            again.join().unwrap().unwrap();
        });
    }

    #[test]
    fn nothing_is_lost_when_it_is_closed_and_opened_again_on_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let open = || open(folder.path());
        let all: Vec<u32> = (0..EXTENTS * EXTENT_BLOCKS)
            .map(|slot| slot.wrapping_mul(0x9e37_79b9))
            .collect();
        assert!(all.len() * 4 > OPEN_BYTES, "or it is never closed");
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
