//! Images on the disk that hold blocks which are restored. Such blocks are shared from there, and not written.

use std::fs::File;
use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::source::BlockHashes;
use super::staging::Staging;
use crate::archive::announced::AnnouncedBlocks;
use crate::archive::record::Hash;
use crate::block::{BLOCK_BYTES, BLOCK_LEN, NumberSet, bytes};
use crate::error::{Error, Result};
use crate::facts::Facts;
use crate::fs::{Filesystem, drop_slots_behind, read_slots, read_slots_ahead};
use crate::monitor::Monitor;
use crate::numbers::{Slot, StoreBlock};
use crate::plan::seeds::{SeedMatch, SeedTable, find_seeds};
use crate::range;

/// Blocks that are read and compared with their hashes at a time.
pub const PROVED_BLOCKS: u32 = 1024;

/// Blocks on the disk that a restore can share, numbered by slots. It finds blocks by fingerprints, which do not prove that they are equal:
/// the caller has to.
pub trait Seed: Sync {
    /// Finds wanted blocks by the fingerprints that are announced of them. `wanted` is ascending and disjoint, and so are the matches.
    fn find(&self, wanted: &[Range<StoreBlock>], announced: &[AnnouncedBlocks]) -> Vec<SeedMatch>;

    /// Finds blocks by their content, whose first has the address `first`. The matches are ascending and disjoint. Several threads call it at
    /// once.
    fn find_content(&self, first: StoreBlock, content: &[u8]) -> Vec<SeedMatch>;

    /// Reads the content of some slots.
    ///
    /// # Errors
    /// [`Error::Unreadable`] or [`Error::Io`].
    fn content(&self, slot: Slot, blocks: u32) -> Result<Vec<u8>>;

    /// Makes a file share some slots, from an offset in bytes on, which is a multiple of the block size. Returns false if the filesystem
    /// refuses.
    fn share(&self, slot: Slot, blocks: u32, file: &File, offset: u64) -> bool;
}

/// The images of a pool as seeds.
pub struct PoolSeed {
    fs: Box<dyn Filesystem>,
    facts: Facts,
    /// Its blocks by fingerprint, once content was looked for.
    table: OnceLock<SeedTable>,
}

impl PoolSeed {
    /// Makes seeds of a pool that was opened and fingerprinted.
    pub fn new(fs: Box<dyn Filesystem>, facts: Facts) -> Self {
        let table = OnceLock::new();
        Self { fs, facts, table }
    }

    /// The parts of wanted blocks that seeds hold, by fingerprint.
    fn matches(
        &self,
        table: &SeedTable,
        wanted: &[Range<StoreBlock>],
        fingerprint_of: impl Fn(StoreBlock) -> Option<u32>,
    ) -> Vec<SeedMatch> {
        let matches = find_seeds(&self.facts, table, wanted, fingerprint_of);
        matches.iter().flat_map(|seeded| self.without_tails(seeded)).collect()
    }

    /// The parts of a match that can be cloned. The kernel clones a partial block, the last one of a file, only to the end of another file.
    fn without_tails(&self, seeded: &SeedMatch) -> Vec<SeedMatch> {
        let mut parts: Vec<SeedMatch> = Vec::new();
        for (slot, place) in self.facts.places_of(seeded.slot..seeded.slot + seeded.blocks) {
            let whole_blocks = self.fs.image(place.image).size / BLOCK_BYTES;
            let blocks = whole_blocks.saturating_sub(u64::from(place.file_block));
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
        let parts = announced.iter();
        for part in parts.filter(|part| part.function == self.fs.function() && part.first.index() < end) {
            let length = end.saturating_sub(part.first.index()).min(part.fingerprints.len());
            fingerprints.write(part.first, &part.fingerprints[..length]);
            known.insert_range(part.first..part.first + u32::try_from(length).unwrap_or(0));
        }
        let fingerprint_of = |block| known.contains(block).then(|| fingerprints.get(block));
        self.matches(&SeedTable::new(facts), wanted, fingerprint_of)
    }

    fn find_content(&self, first: StoreBlock, content: &[u8]) -> Vec<SeedMatch> {
        let function = self.fs.function();
        let fingerprints: Vec<u32> = content
            .chunks_exact(BLOCK_LEN)
            .map(|block| function.of(block))
            .collect();
        let end = first + u32::try_from(fingerprints.len()).unwrap_or(u32::MAX);
        let table = self.table.get_or_init(|| SeedTable::new(&self.facts));
        self.matches(table, std::slice::from_ref(&(first..end)), |block| {
            let at = block.checked_sub(first).map(|at| at as usize);
            at.and_then(|at| fingerprints.get(at)).copied()
        })
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

/// The ranges of blocks whose content has the hashes of the source.
///
/// # Errors
/// Those of [`BlockHashes::get`].
pub(super) fn proved(
    range: Range<StoreBlock>,
    content: &[u8],
    hashes: &mut dyn BlockHashes,
) -> Result<Vec<Range<StoreBlock>>> {
    let hasher = hashes.hasher();
    let content_hashes: Vec<Hash> = content
        .par_chunks_exact(BLOCK_LEN)
        .map(|block| hasher.of(block))
        .collect();
    let mut proved = Vec::new();
    for (block, hash) in range::each(range).zip(content_hashes) {
        if hashes.get(block)? == Some(hash) {
            range::push(&mut proved, block..block + 1);
        }
    }
    Ok(proved)
}

/// Reads the blocks of matches, and returns the parts that have the hashes of the source. Blocks that cannot be read are left out.
///
/// # Errors
/// Those of [`BlockHashes::get`]; [`Error::Interrupted`].
pub fn prove(
    seed: &dyn Seed,
    matches: &[SeedMatch],
    hashes: &mut dyn BlockHashes,
    monitor: &dyn Monitor,
) -> Result<Vec<SeedMatch>> {
    monitor.phase(
        "Checking blocks that are here already",
        matches.iter().map(|seeded| bytes(seeded.blocks)).sum(),
    );
    let mut proved_matches = Vec::new();
    for seeded in matches {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        for part in range::parts(seeded.range(), PROVED_BLOCKS) {
            let slot = seeded.slot + (part.start - seeded.first);
            let blocks = part.end - part.start;
            if let Ok(content) = seed.content(slot, blocks) {
                for range in proved(part.clone(), &content, hashes)? {
                    proved_matches.push(SeedMatch {
                        first: range.start,
                        blocks: range.end - range.start,
                        slot: slot + (range.start - part.start),
                    });
                }
            }
            monitor.advance(bytes(blocks));
        }
    }
    Ok(proved_matches)
}

/// Makes the staging file share the blocks of a match, and compares them with their hashes there. Returns the bytes that were shared and have
/// the right hashes.
///
/// # Errors
/// Those of [`BlockHashes::get`] and [`Staging::added`]; [`Error::Interrupted`].
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
    let mut shared_bytes = 0;
    for part in range::parts(seeded.range(), PROVED_BLOCKS) {
        if range::each(part.clone()).all(|block| staging.has(block)) {
            continue;
        }
        let slot = seeded.slot + (part.start - seeded.first);
        if !seed.share(slot, part.end - part.start, staging.file(), bytes(part.start.0)) {
            continue;
        }
        for range in staged_proved(staging, part, hashes)? {
            shared_bytes += bytes(range.end - range.start);
            monitor.advance(bytes(range.end - range.start));
            staging.added(range)?;
        }
    }
    Ok(shared_bytes)
}

/// The ranges of staged blocks that have the hashes of the source.
///
/// # Errors
/// Those of [`BlockHashes::get`].
pub(super) fn staged_proved(
    staging: &Staging,
    range: Range<StoreBlock>,
    hashes: &mut dyn BlockHashes,
) -> Result<Vec<Range<StoreBlock>>> {
    let mut content = vec![0; (range.end - range.start) as usize * BLOCK_LEN];
    // Blocks that cannot be read back are taken from the source again.
    if staging.read(range.start, &mut content).is_err() {
        return Ok(Vec::new());
    }
    proved(range, &content, hashes)
}
