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

use crate::block::{ByteRange, Slot, bytes};
use crate::error::{Error, Result, describe};
use crate::exec::fingerprints::{Fingerprinted, Unreadable, allocate, fingerprint};
use crate::facts::{Facts, ImageId};
use crate::fs::Sharing;
use crate::fs::volume::{Purpose, Volume};
use crate::index::Index;
use crate::monitor::Monitor;
use crate::plan;
use crate::pool::{self, Found, Named, Skip, Skipped};
use crate::shown::shown;
use crate::spill::limit_lists;

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

/// A pool that was opened and read.
struct Prepared {
    fs: Volume,
    facts: Facts,
    /// Images whose first block lies in metadata.
    inline: Vec<ImageId>,
    /// None if it cannot be used.
    index: Option<Index>,
    skipped: Vec<Skipped>,
    fingerprinted: Fingerprinted,
}

/// Opens a pool and fingerprints it. What of an image cannot be read stays as it is, and the image is named.
fn prepare(scope: &Scope, purpose: Purpose, monitor: &dyn Monitor) -> Result<Prepared> {
    prepare_groups(scope, purpose, &[], monitor)
}

/// The same, with images that are to be kept apart.
fn prepare_groups(scope: &Scope, purpose: Purpose, groups: &[String], monitor: &dyn Monitor) -> Result<Prepared> {
    let mut found = discover(scope, monitor)?;
    pool::group(&mut found.images, groups)?;
    found.images.retain(|image| image.size > 0);
    prepare_found(scope, found, purpose, true, monitor)
}

/// The same for images that were found already; without `skip_unreadable`, one that cannot be read is an error.
fn prepare_found(
    scope: &Scope,
    found: pool::Pool,
    purpose: Purpose,
    skip_unreadable: bool,
    monitor: &dyn Monitor,
) -> Result<Prepared> {
    let (mut prepared, unreadable) = prepare_images(scope, &found.images, &found.named, purpose, monitor)?;
    if !skip_unreadable && let Some(one) = unreadable.into_iter().next() {
        return Err(one.error);
    }
    prepared.skipped.extend(found.skipped);
    prepared.skipped.sort();
    Ok(prepared)
}

/// The image that could not be read, with the range and the cause, if that is what an error is about.
fn unreadable(error: &Error) -> Option<Skipped> {
    let Error::Io {
        path,
        range: Some(range),
        source,
        ..
    } = error
    else {
        return None;
    };
    error.is_read().then(|| Skipped {
        detail: Some(format!("{range}: {source}")),
        ..Skipped::new(path, Skip::Unreadable)
    })
}

fn prepare_images(
    scope: &Scope,
    images: &[Found],
    named: &[Named],
    purpose: Purpose,
    monitor: &dyn Monitor,
) -> Result<(Prepared, Vec<Unreadable>)> {
    monitor.phase("Reading extent maps", 0);
    // How large the pool is, is known once its lists were made.
    divide_memory(scope, 0);
    let (fs, mut skipped) = Volume::open(images, named, purpose, monitor)?;
    let mapped = fs.map()?;
    let mut facts = mapped.facts;
    make_room(&mut facts, scope)?;
    let mut index = match Index::open(&scope.index, fs.uuid(), Some(fs.function()), monitor) {
        Ok(index) => Some(index),
        Err(error @ Error::Busy { .. }) => return Err(error),
        Err(error) => {
            monitor.note(&format!("Going on without an index: {}", describe(&error)));
            None
        }
    };
    let (fingerprinted, unreadable) = fingerprint(&fs, &mut facts, index.as_mut(), monitor)?;
    skipped.extend(images_with(&fs, &facts, &unreadable));
    let prepared = Prepared {
        fs,
        facts,
        inline: mapped.inline,
        index,
        skipped,
        fingerprinted,
    };
    Ok((prepared, unreadable))
}

/// The images that have blocks which cannot be read, each with the first place.
fn images_with(fs: &Volume, facts: &Facts, unreadable: &[Unreadable]) -> Vec<Skipped> {
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

/// Decides how many bytes of lists are in memory, for a pool of so many slots, and how many tables of blocks may take.
fn divide_memory(scope: &Scope, slots: Slot) -> u64 {
    let memory_bytes = scope.memory_bytes.unwrap_or_else(|| plan::memory_bytes(slots));
    limit_lists(plan::lists_bytes(memory_bytes), &scope.index);
    memory_bytes
}

/// Decides where fingerprints are kept and how large a block table may be.
fn make_room(facts: &mut Facts, scope: &Scope) -> Result<()> {
    let memory_bytes = divide_memory(scope, facts.slots());
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

/// The folder that names in the archive are relative to: the deepest that holds everything that was named.
fn root_of(named: &[Named]) -> PathBuf {
    let common = |one: PathBuf, other: &Path| -> PathBuf {
        let pairs = one.components().zip(other.components());
        pairs
            .take_while(|(one, other)| one == other)
            .map(|(one, _)| one)
            .collect()
    };
    let mut roots = named.iter().map(|one| one.root.as_path());
    let first = roots.next().unwrap_or(Path::new("")).to_owned();
    roots.fold(first, common)
}
