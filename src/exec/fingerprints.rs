//! Fingerprints of every block: from the checksum tree where it serves, from the index where they are known, and by reading
//! for the rest.

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

/// Where fingerprints came from, in bytes of images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Fingerprinted {
    /// From the filesystem's checksums.
    pub from_checksums: u64,
    /// From the index.
    pub from_index: u64,
    /// By reading.
    pub read: u64,
}

/// Blocks that could not be read.
#[derive(Debug)]
pub struct Unreadable {
    /// Where.
    pub slots: std::ops::Range<Slot>,
    /// What reading the first image that has them led to.
    pub error: Error,
}

/// Decides within `memory_bytes` where the fingerprints of a pool are kept, in memory or in files where its budget has them, and how large a
/// block table may be. `folder` is where those files are, for messages.
///
/// # Errors
/// [`Error::NoSpace`] among others, if they do not fit into memory and there can be no such files.
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
    let (now, planned) = (file()?, file()?);
    facts.fingerprints = now;
    facts.planned_fingerprints = Some(planned);
    Ok(())
}

/// Bytes read by one thread at a time.
const READ_BLOCKS: u32 = 256;

/// Fills in the fingerprints of all live slots, and brings the index up to date, if there is one. What cannot be read is not known, and
/// its extents are pinned; the errors are returned, one for each of these places.
///
/// # Errors
/// Those of reading metadata. A user who stops it is no error: the caller asks the monitor. An index that fails is
/// none either: it is only a cache.
pub fn fingerprint(
    fs: &dyn Filesystem,
    facts: &mut Facts,
    mut index: Option<&mut (dyn ChunkIndex + 'static)>,
    monitor: &dyn Monitor,
) -> Result<(Fingerprinted, Vec<Unreadable>)> {
    let mut found = Fingerprinted::default();
    let mut known = SlotSet::new(facts.slots() as usize);
    if fs.has_usable_checksums() {
        monitor.phase("Reading checksums", 0);
        fs.fingerprints_from_checksums(facts, &mut known)?;
        found.from_checksums = bytes(count(facts, &known));
    } else if let Some(index) = &mut index {
        index.keep_plain();
    }
    let before = count(facts, &known);
    if let Some(Err(error)) = index.as_mut().map(|index| index.look_up(facts, &mut known)) {
        monitor.note(&describe(&error));
    }
    found.from_index = bytes(count(facts, &known) - before);
    let extents = facts.extents.iter();
    let unknown = extents.flat_map(|extent| unknown_runs(facts, &known, extent));
    let unknown: SpillVec<std::ops::Range<Slot>> = SpillVec::from_iter_in(unknown, facts.budget());
    let total: u64 = unknown.iter().map(|run| bytes(run.end - run.start)).sum();
    let mut unreadable = Vec::new();
    if total > 0 {
        monitor.phase("Reading images", total);
        (found.read, unreadable) = by_reading(fs, facts, &unknown, monitor)?;
    }
    if let Some(index) = index.filter(|index| index.is_usable() && !monitor.interrupted()) {
        monitor.phase("Updating the index", 0);
        // An image that was written to since its map was read may have been read elsewhere than in these extents.
        let changed: Vec<bool> = ImageId::first(fs.image_count())
            .map(|image| !fs.is_unchanged(image))
            .collect();
        let touched = unknown.iter().flat_map(|run| facts.places_of(run.clone()));
        let touched = touched.filter(|(_, place)| changed[place.image.index()]);
        index.forget(&mut touched.map(|(slot, _)| facts.extent_of(slot)));
        index.forget(
            &mut unreadable
                .iter()
                .map(|one: &Unreadable| facts.extent_of(one.slots.start)),
        );
        if let Err(error) = index.update(facts) {
            monitor.note(&describe(&error));
        }
    }
    Ok((found, unreadable))
}

/// Slots of an extent that lie side by side in an image.
#[derive(Debug, Clone, Copy)]
struct PlacedSlots {
    place: ImageRange,
    /// The first of them.
    slot: Slot,
    extent: ExtentId,
}

/// Enters the state after a run into the index, so that the next one need not read what this one wrote: each place of an image holds
/// what it held, in whatever extent it lies now.
///
/// # Errors
/// Those of the index.
pub fn remember(fs: &dyn Filesystem, before: &Facts, after: &mut Facts, index: &mut dyn ChunkIndex) -> Result<()> {
    let is_compressed = |extent: &Extent| extent.class.compression != Compression::None;
    if fs.has_usable_checksums() && !after.extents.iter().any(is_compressed) {
        return Ok(());
    }
    let mut known = SlotSet::new(after.slots() as usize);
    after.fingerprints = before.fingerprints.alike(after.slots() as usize);
    index.look_up(after, &mut known)?;
    let unchanged: Vec<bool> = ImageId::first(fs.image_count())
        .map(|image| fs.is_unchanged(image))
        .collect();
    let mut fingerprints = std::mem::take(&mut after.fingerprints);
    let after_then = &*after;
    let extents = ExtentId::numbered(&after.extents);
    let places = extents.flat_map(|(number, extent)| {
        let runs = after_then.live_runs(extent.slots());
        let places = runs.flat_map(|run| after_then.places_of(run));
        places.map(move |(slot, place)| PlacedSlots {
            place,
            slot,
            extent: number,
        })
    });
    let mut places: SpillVec<PlacedSlots> = SpillVec::from_iter_in(places, after.budget());
    places.sort_unstable_by_key(|one| (one.place.image, one.place.file_block));
    let mut unknown = SpillVec::new_in(after.budget());
    for of_image in places.chunk_by(|one, other| one.place.image == other.place.image) {
        let image = of_image[0].place.image;
        let mappings = before.mappings_of(image);
        for PlacedSlots { place, slot, extent } in of_image.iter().copied() {
            let mut is_known = true;
            let found = unchanged[image.index()]
                && copy(&mappings, place, |done, old| {
                    let extent = &before.extents[before.extent_of(old.start).index()];
                    is_known &= extent.pinned != Some(PinReason::Unreadable);
                    fingerprints.write(slot + done, &before.fingerprints.range(old));
                })
                && is_known;
            if !found {
                unknown.push(extent);
            }
        }
    }
    after.fingerprints = fingerprints;
    index.forget(&mut unknown.into_iter());
    index.update(after)
}

/// Calls `copy` with the slots that a range of an image maps: how many blocks into the range, and which. False if it does not map
/// some all the way. `mappings` are those of the image, by the place in it.
fn copy(mappings: &[Mapping], range: ImageRange, mut copy: impl FnMut(u32, std::ops::Range<Slot>)) -> bool {
    let mut done = 0;
    let first = mappings.partition_point(|mapping| mapping.file_block + mapping.blocks <= range.file_block);
    for mapping in mappings[first..].iter().filter(|mapping| !mapping.preallocated) {
        let at = range.file_block + done;
        if done >= range.blocks || mapping.file_block > at {
            break;
        }
        let offset = at - mapping.file_block;
        let blocks = (mapping.blocks - offset).min(range.blocks - done);
        copy(done, mapping.slot + offset..mapping.slot + offset + blocks);
        done += blocks;
    }
    done >= range.blocks
}

fn count(facts: &Facts, known: &SlotSet) -> u32 {
    facts
        .extents
        .iter()
        .flat_map(|extent| facts.live_runs(extent.slots()))
        .map(|run| u32::try_from(range::each(run).filter(|slot| known.contains(*slot)).count()).unwrap_or(u32::MAX))
        .sum()
}

/// Live slots of an extent that have no fingerprint yet, in pieces that one read takes.
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

/// Reads blocks in the order they lie on disk, on all cores. Returns how many bytes, and what could not be read.
fn by_reading(
    fs: &dyn Filesystem,
    facts: &mut Facts,
    runs: &[std::ops::Range<Slot>],
    monitor: &dyn Monitor,
) -> Result<(u64, Vec<Unreadable>)> {
    /// Pieces handed out at a time; between them the user may stop.
    const PIECES: usize = 1024;
    let function = fs.function();
    let read = AtomicU64::new(0);
    let mut sums = std::mem::take(&mut facts.fingerprints);
    let mut unreadable = Vec::new();
    let read_run = |buffer: &mut Vec<u8>, run: &std::ops::Range<Slot>| -> Result<Vec<u32>> {
        buffer.resize((run.end - run.start) as usize * BLOCK_LEN, 0);
        read_slots_into(facts, fs, std::slice::from_ref(run), buffer)?;
        monitor.advance(buffer.len() as u64);
        read.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(buffer.chunks(BLOCK_LEN).map(|block| function.of(block)).collect())
    };
    for runs in runs.chunks(PIECES) {
        if monitor.interrupted() {
            break;
        }
        let pieces: Vec<Result<Vec<u32>>> = runs.par_iter().map_init(Vec::new, read_run).collect();
        for (run, found) in runs.iter().zip(pieces) {
            match found {
                Ok(found) => sums.write(run.start, &found),
                Err(error @ Error::Unreadable { .. }) => {
                    // Something that nothing else is likely to be. Whoever counts on it has the kernel compare, which fails.
                    let unlike = |slot: Slot| xxhash_rust::xxh3::xxh3_64(&slot.0.to_le_bytes()).to_le_bytes();
                    let unlike: Vec<u32> = range::each(run.clone())
                        .map(|slot| unlike(slot).first_chunk().map_or(0, |word| u32::from_le_bytes(*word)))
                        .collect();
                    sums.write(run.start, &unlike);
                    unreadable.push(Unreadable {
                        slots: run.clone(),
                        error,
                    });
                }
                Err(error) => return Err(error),
            }
        }
    }
    facts.fingerprints = sums;
    for one in &unreadable {
        let extent = facts.extent_of(one.slots.start).index();
        let pinned = &mut facts.extents[extent].pinned;
        *pinned = pinned.or(Some(PinReason::Unreadable));
    }
    Ok((read.into_inner(), unreadable))
}
