//! What the disk holds already of what is restored: blocks that are shared from there and not written.

use std::fs::File;
use std::ops::Range;

use rayon::prelude::*;

use super::source::BlockHashes;
use super::staging::Staging;
use crate::archive::manifest::AnnouncedBlocks;
use crate::archive::record::{Hash, hash_of};
use crate::block::{BLOCK_BYTES, BLOCK_LEN, NumberSet, bytes};
use crate::error::{Error, Result};
use crate::facts::Facts;
use crate::fs::{Filesystem, drop_slots_behind, read_slots, read_slots_ahead};
use crate::monitor::Monitor;
use crate::numbers::{Slot, StoreBlock};
use crate::plan::seeds::{SeedMatch, find_seeds};
use crate::range;

/// Blocks whose hashes are compared at a time.
pub const PROVED_BLOCKS: u32 = 1024;

/// Blocks on the disk, numbered by slots, that a restore can share. What it finds by fingerprints is proved by whoever uses it.
pub trait Seed: Sync {
    /// Looks for wanted blocks, a list, by the fingerprints that are announced of them. What is found does not overlap.
    fn find(&self, wanted: &[Range<StoreBlock>], announced: &[AnnouncedBlocks]) -> Vec<SeedMatch>;

    /// The content of some slots.
    ///
    /// # Errors
    /// Those of reading.
    fn content(&self, slot: Slot, blocks: u32) -> Result<Vec<u8>>;

    /// Makes a range of a file share some slots, from an offset on, which is a multiple of a block. False if the filesystem refuses.
    fn share(&self, slot: Slot, blocks: u32, file: &File, offset: u64) -> bool;
}

/// The images of a pool as seeds.
pub struct PoolSeed {
    fs: Box<dyn Filesystem>,
    facts: Facts,
}

impl PoolSeed {
    /// Of a pool that was opened and fingerprinted.
    pub fn new(fs: Box<dyn Filesystem>, facts: Facts) -> Self {
        Self { fs, facts }
    }

    /// What of a match can be cloned: the kernel clones the last, partial block of a file to the end of another only.
    fn without_tails(&self, seeded: &SeedMatch) -> Vec<SeedMatch> {
        let mut parts: Vec<SeedMatch> = Vec::new();
        for (slot, place) in self.facts.places_of(seeded.slot..seeded.slot + seeded.blocks) {
            let whole = self.fs.image(place.image).size / BLOCK_BYTES;
            let blocks = whole.saturating_sub(u64::from(place.file_block));
            let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).min(place.blocks);
            match parts.last_mut() {
                Some(last) if last.slot + last.blocks == slot => last.blocks += blocks,
                _ => parts.push(SeedMatch {
                    first: seeded.first + (slot - seeded.slot),
                    blocks,
                    slot,
                }),
            }
        }
        parts.retain(|part| part.blocks > 0);
        parts
    }
}

impl Seed for PoolSeed {
    fn find(&self, wanted: &[Range<StoreBlock>], announced: &[AnnouncedBlocks]) -> Vec<SeedMatch> {
        let end = wanted.last().map_or(0, |range| range.end.index());
        let facts = &self.facts;
        let (mut fingerprints, mut known) = (facts.fingerprints.alike(end), NumberSet::new(end));
        let announced = announced.iter();
        for one in announced.filter(|one| one.function == self.fs.function() && one.first.index() < end) {
            let length = end.saturating_sub(one.first.index()).min(one.fingerprints.len());
            fingerprints.write(one.first, &one.fingerprints[..length]);
            known.insert_range(one.first..one.first + u32::try_from(length).unwrap_or(0));
        }
        let found = find_seeds(facts, wanted, &fingerprints, |block| known.contains(block));
        found.iter().flat_map(|seeded| self.without_tails(seeded)).collect()
    }

    fn content(&self, slot: Slot, blocks: u32) -> Result<Vec<u8>> {
        let (fs, slots) = (&*self.fs, slot..slot + blocks);
        let slots = std::slice::from_ref(&slots);
        read_slots_ahead(&self.facts, fs, slots);
        let content = read_slots(&self.facts, fs, slots)?;
        drop_slots_behind(&self.facts, fs, slots);
        Ok(content)
    }

    fn share(&self, slot: Slot, blocks: u32, file: &File, offset: u64) -> bool {
        self.facts.places_of(slot..slot + blocks).all(|(at, place)| {
            let to = offset + bytes(at - slot);
            let (from, length) = (bytes(place.file_block), bytes(place.blocks));
            self.fs.clone_range(place.image, from, file, to, length).is_ok()
        })
    }
}

/// The ranges of some content whose hashes are those of the source.
pub(super) fn proved(
    range: Range<StoreBlock>,
    content: &[u8],
    hashes: &mut dyn BlockHashes,
) -> Result<Vec<Range<StoreBlock>>> {
    let found: Vec<Hash> = content.par_chunks_exact(BLOCK_LEN).map(hash_of).collect();
    let mut proved = Vec::new();
    for (block, found) in range::each(range).zip(found) {
        if hashes.get(block)? == Some(found) {
            range::push(&mut proved, block..block + 1);
        }
    }
    Ok(proved)
}

/// Reads what was found, and keeps what has the hashes of the source.
///
/// # Errors
/// Those of the hashes; [`Error::Interrupted`]. What cannot be read is not kept.
pub fn prove(
    seed: &dyn Seed,
    found: &[SeedMatch],
    hashes: &mut dyn BlockHashes,
    monitor: &dyn Monitor,
) -> Result<Vec<SeedMatch>> {
    monitor.phase(
        "Checking blocks that are here already",
        found.iter().map(|one| bytes(one.blocks)).sum(),
    );
    let mut kept = Vec::new();
    for one in found {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        for part in range::parts(one.range(), PROVED_BLOCKS) {
            let slot = one.slot + (part.start - one.first);
            let blocks = part.end - part.start;
            if let Ok(content) = seed.content(slot, blocks) {
                for range in proved(part.clone(), &content, hashes)? {
                    kept.push(SeedMatch {
                        first: range.start,
                        blocks: range.end - range.start,
                        slot: slot + (range.start - part.start),
                    });
                }
            }
            monitor.advance(bytes(blocks));
        }
    }
    Ok(kept)
}

/// Makes the staging file share what was found, and proves it once more there. Returns the bytes that hold.
///
/// # Errors
/// Those of the hashes and of the staging file; [`Error::Interrupted`].
pub(super) fn clone_into(
    seed: &dyn Seed,
    seeded: &SeedMatch,
    staging: &mut Staging,
    hashes: &mut dyn BlockHashes,
    monitor: &dyn Monitor,
) -> Result<u64> {
    if monitor.interrupted() {
        return Err(Error::Interrupted);
    }
    let mut kept = 0;
    for part in range::parts(seeded.range(), PROVED_BLOCKS) {
        if range::each(part.clone()).all(|block| staging.has(block)) {
            continue;
        }
        let slot = seeded.slot + (part.start - seeded.first);
        if !seed.share(slot, part.end - part.start, staging.file(), bytes(part.start.0)) {
            continue;
        }
        for range in staged_proved(staging, part, hashes)? {
            kept += bytes(range.end - range.start);
            monitor.advance(bytes(range.end - range.start));
            staging.added(range)?;
        }
    }
    Ok(kept)
}

/// The ranges of what is staged whose hashes are those of the source.
pub(super) fn staged_proved(
    staging: &Staging,
    range: Range<StoreBlock>,
    hashes: &mut dyn BlockHashes,
) -> Result<Vec<Range<StoreBlock>>> {
    let mut content = vec![0; (range.end - range.start) as usize * BLOCK_LEN];
    // What cannot be read back is fetched again.
    if staging.read(range.start, &mut content).is_err() {
        return Ok(Vec::new());
    }
    proved(range, &content, hashes)
}
