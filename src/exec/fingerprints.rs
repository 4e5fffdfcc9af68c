//! Gets the fingerprints of all blocks: from the filesystem's checksums where it keeps usable ones, then from the index, and by reading the
//! rest.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use crate::block::{BLOCK_LEN, SlotSet, bytes};
use crate::error::{Error, Result, describe};
use crate::facts::{Compression, Extent, Facts, ImageRange, Mapping, PinReason};
use crate::fingerprint::Fingerprints;
use crate::fs::{Filesystem, read_slots_into};
use crate::index::ChunkIndex;
use crate::monitor::Monitor;
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::plan;
use crate::range;
use crate::spill::SpillVec;

/// How many fingerprints came from where, in bytes of the blocks that they stand for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Fingerprinted {
    /// Bytes whose fingerprints are checksums of the filesystem.
    pub from_checksums: u64,
    /// Bytes whose fingerprints the index had.
    pub from_index: u64,
    /// Bytes that were read.
    pub read: u64,
}

/// Blocks that could not be read.
#[derive(Debug)]
pub struct Unreadable {
    /// The blocks.
    pub slots: std::ops::Range<Slot>,
    /// The error of reading the first image that maps them.
    pub error: Error,
}

/// Allocates the fingerprints of a pool, and sets how large a block table may be. The fingerprints are in memory if they fit into
/// `memory_bytes`, and otherwise in files of the facts' budget. `folder` is the folder of these files, for messages.
///
/// # Errors
/// [`Error::NoSpace`] or [`Error::Io`] if such a file is needed and cannot be made.
pub fn allocate(facts: &mut Facts, memory_bytes: u64, folder: &Path) -> Result<()> {
    let slots = facts.slots();
    facts.table_slots_max = plan::table_slots_max(memory_bytes);
    if plan::fingerprints_fit(slots, memory_bytes) {
        facts.fingerprints = Fingerprints::in_memory(slots as usize);
        return Ok(());
    }
    let file = || {
        let file = Fingerprints::in_file(slots as usize, facts.budget());
        file.map_err(Error::writing("make a file for fingerprints in", folder))
    };
    let (fingerprints, planned_fingerprints) = (file()?, file()?);
    facts.fingerprints = fingerprints;
    facts.planned_fingerprints = Some(planned_fingerprints);
    Ok(())
}

/// Blocks that one thread reads at a time.
const READ_BLOCKS: u32 = 256;

/// Sets the fingerprints of all live slots, and updates the index, if there is one. Extents of blocks that cannot be read are pinned, and
/// the errors are returned, one for each range.
///
/// # Errors
/// [`Error::Io`] if the filesystem's metadata cannot be read. If the user stops it, it returns early without an error, and the caller asks
/// the monitor. If the index fails, that is noted: it is only a cache.
pub fn fingerprint(
    fs: &dyn Filesystem,
    facts: &mut Facts,
    mut index: Option<&mut (dyn ChunkIndex + 'static)>,
    monitor: &dyn Monitor,
) -> Result<(Fingerprinted, Vec<Unreadable>)> {
    let mut counts = Fingerprinted::default();
    let mut known = SlotSet::new(facts.slots() as usize);
    if fs.has_usable_checksums() {
        monitor.phase("Reading checksums", 0);
        fs.fingerprints_from_checksums(facts, &mut known)?;
        counts.from_checksums = bytes(count(facts, &known));
    } else if let Some(index) = &mut index {
        index.keep_plain();
    }
    let known_before = count(facts, &known);
    let digests = match &index {
        Some(_) => digests_for_index(fs, facts)?,
        None => SpillVec::new_in(facts.budget()),
    };
    if let Some(Err(error)) = index.as_mut().map(|index| index.look_up(facts, &digests, &mut known)) {
        monitor.note(&describe(&error));
    }
    counts.from_index = bytes(count(facts, &known) - known_before);
    let extents = facts.extents.iter();
    let unknown = extents.flat_map(|extent| unknown_runs(facts, &known, extent));
    let unknown: SpillVec<std::ops::Range<Slot>> = SpillVec::from_iter_in(unknown, facts.budget());
    let total_bytes: u64 = unknown.iter().map(|run| bytes(run.end - run.start)).sum();
    let mut unreadable = Vec::new();
    if total_bytes > 0 {
        monitor.phase("Reading images", total_bytes);
        (counts.read, unreadable) = read_unknown(fs, facts, &unknown, monitor)?;
    }
    if let Some(index) = index.filter(|index| index.is_usable() && !monitor.interrupted()) {
        monitor.phase("Updating the index", 0);
        // The blocks of an image that was written to since its extents were listed may have come from other extents.
        let changed: Vec<bool> = ImageId::first(fs.image_count())
            .map(|image| !fs.is_unchanged(image))
            .collect();
        let touched = unknown.iter().flat_map(|run| facts.places_of(run.clone()));
        let touched = touched.filter(|(_, place)| changed[place.image.index()]);
        index.forget(&mut touched.map(|(slot, _)| facts.extent_of(slot)));
        index.forget(
            &mut unreadable
                .iter()
                .map(|unreadable: &Unreadable| facts.extent_of(unreadable.slots.start)),
        );
        if let Err(error) = index.update(facts, &digests) {
            monitor.note(&describe(&error));
        }
    }
    Ok((counts, unreadable))
}

/// Whether the index remembers fingerprints of any of these extents.
fn is_any_remembered(fs: &dyn Filesystem, facts: &Facts) -> bool {
    let is_compressed = |extent: &Extent| extent.class.compression != Compression::None;
    !fs.has_usable_checksums() || facts.extents.iter().any(is_compressed)
}

/// Returns the digests of extents that the index asks for; none, to save reading checksums again, if it remembers no fingerprints.
fn digests_for_index(fs: &dyn Filesystem, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
    if is_any_remembered(fs, facts) {
        fs.checksum_digests(facts)
    } else {
        Ok(SpillVec::new_in(facts.budget()))
    }
}

/// Slots of an extent that lie side by side in an image.
#[derive(Debug, Clone, Copy)]
struct PlacedSlots {
    /// Where they lie.
    place: ImageRange,
    /// The first of them.
    slot: Slot,
    extent: ExtentId,
}

/// Enters the extents after a run into the index, so that the next run need not read what this one wrote. A run changes no content: each
/// block of an image has the fingerprint that it had before, whichever extent holds it then.
///
/// # Errors
/// Those of [`ChunkIndex::look_up`] and [`ChunkIndex::update`].
pub fn remember(fs: &dyn Filesystem, before: &Facts, after: &mut Facts, index: &mut dyn ChunkIndex) -> Result<()> {
    if !is_any_remembered(fs, after) {
        return Ok(());
    }
    let digests = digests_for_index(fs, after)?;
    let mut known = SlotSet::new(after.slots() as usize);
    after.fingerprints = before.fingerprints.alike(after.slots() as usize);
    index.look_up(after, &digests, &mut known)?;
    let unchanged: Vec<bool> = ImageId::first(fs.image_count())
        .map(|image| fs.is_unchanged(image))
        .collect();
    let mut fingerprints = std::mem::take(&mut after.fingerprints);
    let facts_after = &*after;
    let extents = ExtentId::numbered(&after.extents);
    let places = extents.flat_map(|(number, extent)| {
        let runs = facts_after.live_runs(extent.slots());
        let places = runs.flat_map(|run| facts_after.places_of(run));
        places.map(move |(slot, place)| PlacedSlots {
            place,
            slot,
            extent: number,
        })
    });
    let mut places: SpillVec<PlacedSlots> = SpillVec::from_iter_in(places, after.budget());
    places.sort_unstable_by_key(|placed| (placed.place.image, placed.place.file_block));
    let mut unknown = SpillVec::new_in(after.budget());
    for places_of_image in places.chunk_by(|before, after| before.place.image == after.place.image) {
        let image = places_of_image[0].place.image;
        let mappings = before.mappings_of(image);
        for PlacedSlots { place, slot, extent } in places_of_image.iter().copied() {
            let mut is_known = true;
            let is_copied = unchanged[image.index()]
                && each_mapped_part(&mappings, place, |skipped, old_slots| {
                    let extent = &before.extents[before.extent_of(old_slots.start).index()];
                    is_known &= extent.pinned != Some(PinReason::Unreadable);
                    fingerprints.write(slot + skipped, &before.fingerprints.range(old_slots));
                })
                && is_known;
            if !is_copied {
                unknown.push(extent);
            }
        }
    }
    after.fingerprints = fingerprints;
    index.forget(&mut unknown.into_iter());
    index.update(after, &digests)
}

/// Calls `visit` with the slots of each part of a range of an image, and with the number of blocks before the part. Returns false, with the
/// rest of the range left out, where a block is not mapped or is preallocated. `mappings` are those of the image, in its order.
fn each_mapped_part(
    mappings: &[Mapping],
    range: ImageRange,
    mut visit: impl FnMut(u32, std::ops::Range<Slot>),
) -> bool {
    let mut done = 0;
    let first = mappings.partition_point(|mapping| mapping.file_block + mapping.blocks <= range.file_block);
    for mapping in mappings[first..].iter().filter(|mapping| !mapping.preallocated) {
        let at = range.file_block + done;
        if done >= range.blocks || mapping.file_block > at {
            break;
        }
        let offset = at - mapping.file_block;
        let blocks = (mapping.blocks - offset).min(range.blocks - done);
        visit(done, mapping.slot + offset..mapping.slot + offset + blocks);
        done += blocks;
    }
    done >= range.blocks
}

/// The number of live slots whose fingerprint is known.
fn count(facts: &Facts, known: &SlotSet) -> u32 {
    facts
        .extents
        .iter()
        .flat_map(|extent| facts.live_runs(extent.slots()))
        .map(|run| u32::try_from(range::each(run).filter(|slot| known.contains(*slot)).count()).unwrap_or(u32::MAX))
        .sum()
}

/// The live slots of an extent that have no fingerprint yet, in ranges of [`READ_BLOCKS`] at most.
fn unknown_runs(facts: &Facts, known: &SlotSet, extent: &Extent) -> Vec<std::ops::Range<Slot>> {
    let mut runs: Vec<std::ops::Range<Slot>> = Vec::new();
    for live in facts.live_runs(extent.slots()) {
        for slot in range::each(live).filter(|slot| !known.contains(*slot)) {
            match runs.last_mut() {
                Some(last) if last.end == slot && last.end - last.start < READ_BLOCKS => last.end += 1,
                _ => runs.push(slot..slot + 1),
            }
        }
    }
    runs
}

/// Reads blocks in their order on disk, on all cores. Returns how many bytes it read, and which blocks could not be read.
fn read_unknown(
    fs: &dyn Filesystem,
    facts: &mut Facts,
    runs: &[std::ops::Range<Slot>],
    monitor: &dyn Monitor,
) -> Result<(u64, Vec<Unreadable>)> {
    /// Ranges that are read before it is checked whether the user has stopped it.
    const RUNS_AT_ONCE: usize = 1024;
    let function = fs.function();
    let read_bytes = AtomicU64::new(0);
    let mut fingerprints = std::mem::take(&mut facts.fingerprints);
    let mut unreadable = Vec::new();
    let read_run = |buffer: &mut Vec<u8>, run: &std::ops::Range<Slot>| -> Result<Vec<u32>> {
        buffer.resize((run.end - run.start) as usize * BLOCK_LEN, 0);
        read_slots_into(facts, fs, std::slice::from_ref(run), buffer)?;
        monitor.advance(buffer.len() as u64);
        read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(buffer.chunks(BLOCK_LEN).map(|block| function.of(block)).collect())
    };
    for runs in runs.chunks(RUNS_AT_ONCE) {
        if monitor.interrupted() {
            break;
        }
        let results: Vec<Result<Vec<u32>>> = runs.par_iter().map_init(Vec::new, read_run).collect();
        for (run, result) in runs.iter().zip(results) {
            match result {
                Ok(read) => fingerprints.write(run.start, &read),
                Err(error @ Error::Unreadable { .. }) => {
                    // These fingerprints are likely to match no other block. If one does, the kernel compares the blocks, which fails.
                    let hash = |slot: Slot| xxhash_rust::xxh3::xxh3_64(&slot.0.to_le_bytes()).to_le_bytes();
                    let unlikely: Vec<u32> = range::each(run.clone())
                        .map(|slot| hash(slot).first_chunk().map_or(0, |word| u32::from_le_bytes(*word)))
                        .collect();
                    fingerprints.write(run.start, &unlikely);
                    unreadable.push(Unreadable {
                        slots: run.clone(),
                        error,
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }
    facts.fingerprints = fingerprints;
    for Unreadable { slots, .. } in &unreadable {
        let extent = facts.extent_of(slots.start).index();
        let pinned = &mut facts.extents[extent].pinned;
        *pinned = pinned.or(Some(PinReason::Unreadable));
    }
    Ok((read_bytes.into_inner(), unreadable))
}
