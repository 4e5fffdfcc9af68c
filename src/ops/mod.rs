//! What vmfold does, one verb a file.

pub mod diff;
pub mod export;
pub mod import;
pub mod list;
pub mod reclaim;
pub mod report;
pub mod scan;
pub mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::block::{ByteRange, bytes};
use crate::error::{Error, Result, describe};
use crate::exec::fingerprints::{Fingerprinted, Unreadable, allocate, fingerprint};
use crate::facts::Facts;
use crate::fs::{self, Filesystem, Purpose};
use crate::index::{self, ChunkIndex};
use crate::monitor::Monitor;
use crate::numbers::ImageId;
use crate::plan;
use crate::pool::{self, Skip, Skipped};
use crate::shown::shown;
use crate::spill::Budget;

/// What a verb works on.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Patterns of what to leave out in folders.
    pub exclude: Vec<String>,
    /// Where indexes are kept.
    pub index: PathBuf,
    /// Memory for fingerprints and the block table, in bytes, if not [`plan::memory_bytes`]. A pool that needs more keeps its
    /// fingerprints in a file beside the index, and looks up a sample of its blocks.
    pub memory_bytes: Option<u64>,
}

impl Scope {
    /// What lists are made from. How large the pool is, is known once they were made: until then, it is taken for a small one.
    fn budget(&self) -> Budget {
        Budget::new(lists_bytes(self.memory_bytes(0)), self.index.clone())
    }

    /// Memory for the block table of a pool of so many slots, in bytes.
    fn memory_bytes(&self, slots: u32) -> u64 {
        self.memory_bytes.unwrap_or_else(|| plan::memory_bytes(slots))
    }
}

/// Where an archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArchivePlace {
    /// A file.
    File(PathBuf),
    /// Standard output for an export, standard input for an import.
    Pipe,
}

/// Opens an index when it is needed; none if it is to be done without.
type OpenIndex<'a> = Box<dyn FnOnce() -> Result<Option<Box<dyn ChunkIndex>>> + 'a>;

/// A pool that is open, for a verb to work on.
pub struct OpenPool<'a> {
    fs: &'a dyn Filesystem,
    /// The index is opened once extent maps were read: both take memory, and not at the same time.
    index: OpenIndex<'a>,
    /// What lists of it are made from.
    budget: Budget,
    /// Images that were found and are left alone.
    skipped: Vec<Skipped>,
}

impl<'a> OpenPool<'a> {
    /// The images of a filesystem, all of them, with an index of it if there is one. All lists are in memory.
    pub fn new(fs: &'a dyn Filesystem, index: Option<Box<dyn ChunkIndex>>) -> Self {
        Self {
            fs,
            index: Box::new(move || Ok(index)),
            budget: Budget::default(),
            skipped: Vec::new(),
        }
    }

    /// The same with the index of a scope, and with images that are left alone.
    fn of(fs: &'a dyn Filesystem, skipped: Vec<Skipped>, scope: &'a Scope, monitor: &'a dyn Monitor) -> Self {
        Self {
            fs,
            index: Box::new(move || open_index(fs, scope, monitor)),
            budget: scope.budget(),
            skipped,
        }
    }
}

/// What is known of a pool once it was read.
struct Survey {
    facts: Facts,
    /// Images whose first block lies in metadata.
    inline: Vec<ImageId>,
    /// None if it cannot be used.
    index: Option<Box<dyn ChunkIndex>>,
    skipped: Vec<Skipped>,
    fingerprinted: Fingerprinted,
}

/// A pool that was opened and read.
struct Prepared {
    fs: Box<dyn Filesystem>,
    facts: Facts,
}

/// Looks for images, opens them and fingerprints them. What of an image cannot be read stays as it is.
fn prepare(scope: &Scope, purpose: Purpose, monitor: &dyn Monitor) -> Result<Prepared> {
    let (fs, skipped) = open_pool(data_of(discover(scope, monitor)?), purpose, monitor)?;
    let survey = survey(OpenPool::of(&*fs, skipped, scope, monitor), scope, true, monitor)?;
    Ok(Prepared {
        facts: survey.facts,
        fs,
    })
}

/// Those of the images that were found that are not empty.
fn data_of(mut found: pool::Pool) -> pool::Pool {
    found.images.retain(|image| image.size > 0);
    found
}

/// Opens images that were found. Returns those that are left alone, too.
fn open_pool(
    found: pool::Pool,
    purpose: Purpose,
    monitor: &dyn Monitor,
) -> Result<(Box<dyn Filesystem>, Vec<Skipped>)> {
    monitor.phase("Reading extent maps", 0);
    let (fs, mut skipped) = fs::open(&found.images, &found.named, purpose, monitor)?;
    skipped.extend(found.skipped);
    Ok((fs, skipped))
}

/// Reads the maps of a pool and fingerprints it. What of an image cannot be read stays as it is, and the image is named; without
/// `skip_unreadable`, it is an error.
fn survey(pool: OpenPool<'_>, scope: &Scope, skip_unreadable: bool, monitor: &dyn Monitor) -> Result<Survey> {
    let fs = pool.fs;
    let mapped = fs.map(&pool.budget)?;
    let mut facts = mapped.facts;
    divide_memory(&mut facts, scope)?;
    let mut index = (pool.index)()?;
    let (fingerprinted, unreadable) = fingerprint(fs, &mut facts, index.as_deref_mut(), monitor)?;
    let mut skipped = pool.skipped;
    skipped.extend(images_with(fs, &facts, &unreadable));
    skipped.sort();
    log_images(fs, &skipped, fingerprinted);
    if !skip_unreadable && let Some(one) = unreadable.into_iter().next() {
        return Err(one.error);
    }
    Ok(Survey {
        facts,
        inline: mapped.inline,
        index,
        skipped,
        fingerprinted,
    })
}

/// Logs what is decided about each image.
fn log_images(fs: &dyn Filesystem, skipped: &[Skipped], fingerprinted: Fingerprinted) {
    for image in fs::images(fs) {
        tracing::info!(image = %shown(&image.path), bytes = image.size, checksummed = image.checksummed, "worked on");
    }
    log_skipped(skipped);
    tracing::info!(
        from_checksums_bytes = fingerprinted.from_checksums,
        from_index_bytes = fingerprinted.from_index,
        read_bytes = fingerprinted.read,
        "fingerprinted"
    );
}

/// Logs which images are left alone, and why.
fn log_skipped(skipped: &[Skipped]) {
    for one in skipped {
        let detail = one.detail.as_deref().unwrap_or_default();
        tracing::info!(image = %shown(&one.path), reason = one.reason.reason(), detail, "left alone");
    }
}

/// Opens the index of a filesystem. One that fails is done without, but not one that another run uses.
fn open_index(fs: &dyn Filesystem, scope: &Scope, monitor: &dyn Monitor) -> Result<Option<Box<dyn ChunkIndex>>> {
    match index::open(&scope.index, fs.uuid(), Some(fs.function()), monitor) {
        Ok(index) => Ok(Some(index)),
        Err(error @ Error::Busy { .. }) => Err(error),
        Err(error) => {
            monitor.note(&format!("Going on without an index: {}", describe(&error)));
            Ok(None)
        }
    }
}

/// The image that could not be read, with the range and the cause, if that is what an error is about.
fn unreadable(error: &Error) -> Option<Skipped> {
    let Error::Unreadable { path, range, source } = error else {
        return None;
    };
    Some(Skipped {
        detail: Some(format!("{range}: {source}")),
        ..Skipped::new(path, Skip::Unreadable)
    })
}

/// The images that have blocks which cannot be read, each with the first place.
fn images_with(fs: &dyn Filesystem, facts: &Facts, unreadable: &[Unreadable]) -> Vec<Skipped> {
    let mut places: BTreeMap<ImageId, (ByteRange, &Error)> = BTreeMap::new();
    for one in unreadable {
        let mappings = facts.mappings_to(facts.extent_of(one.slots.start));
        for (mapping, images) in mappings {
            let slots = mapping.slots();
            let (start, end) = (slots.start.max(one.slots.start), slots.end.min(one.slots.end));
            if start >= end {
                continue;
            }
            let range = ByteRange {
                start: bytes(mapping.file_block + (start - slots.start)),
                length: bytes(end - start),
            };
            for image in images {
                let first = places.entry(*image).or_insert((range, &one.error));
                if range.start < first.0.start {
                    *first = (range, &one.error);
                }
            }
        }
    }
    let skipped = places.into_iter().map(|(image, (range, error))| {
        let cause = std::error::Error::source(error)
            .map(ToString::to_string)
            .unwrap_or_default();
        Skipped {
            detail: Some(format!("{range}: {cause}")),
            ..Skipped::new(fs.path(image), Skip::Unreadable)
        }
    });
    skipped.collect()
}

/// How many bytes of lists are in memory, where tables of blocks may take so many.
fn lists_bytes(memory_bytes: u64) -> usize {
    usize::try_from(plan::lists_bytes(memory_bytes)).unwrap_or(usize::MAX)
}

/// Decides how many bytes of lists are in memory, where fingerprints are kept, and how large a block table may be.
fn divide_memory(facts: &mut Facts, scope: &Scope) -> Result<()> {
    let memory_bytes = scope.memory_bytes(facts.slots());
    facts.budget().set_bytes(lists_bytes(memory_bytes));
    allocate(facts, memory_bytes, &scope.index)
}

/// Looks for images, and notes what could not be looked at.
fn discover(scope: &Scope, monitor: &dyn Monitor) -> Result<pool::Pool> {
    let found = pool::discover(&scope.paths, &scope.exclude)?;
    for (path, problem) in &found.unreadable {
        monitor.note(&format!("Cannot look into `{}`: {problem}", shown(path)));
    }
    Ok(found)
}

/// The deepest folder that holds all of these.
fn common_folder<'a>(mut folders: impl Iterator<Item = &'a Path>) -> PathBuf {
    let common = |one: PathBuf, other: &Path| -> PathBuf {
        let pairs = one.components().zip(other.components());
        pairs
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one)
            .collect()
    };
    let first = folders.next().unwrap_or(Path::new("")).to_owned();
    folders.fold(first, common)
}
