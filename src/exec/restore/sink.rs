//! Puts the blocks that a source hands over into the staging file. Blocks that a seed holds are shared from there, and the others are written.
//! For a dry run, they are only counted.

use std::ops::Range;

use rayon::prelude::*;
use rustix::io::Errno;

use super::Restored;
use super::seed::{PROVED_BLOCKS, Seed};
use super::source::{BlockSink, SourceFrame};
use super::staging::Staging;
use crate::archive::record::{BlockHasher, Hash};
use crate::block::{BLOCK_LEN, bytes};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::seeds::SeedMatch;
use crate::range;

/// Where blocks are looked for that the disk holds already. They are compared with those of the source before they are shared.
#[derive(Clone, Copy)]
pub(super) enum SeedUse<'a> {
    /// Nowhere.
    None,
    /// What a seed seems to hold of the blocks that were announced.
    Announced(&'a dyn Seed, &'a [SeedMatch]),
    /// In a seed, by the content of each block.
    ByContent(&'a dyn Seed),
}

/// The staging file as a sink.
pub(super) struct StagingSink<'a> {
    pub(super) staging: &'a mut Staging,
    /// The ranges of blocks that are wanted, ascending and disjoint. `None` means all, because later offers may refer to them.
    pub(super) wanted: Option<&'a [Range<StoreBlock>]>,
    /// Blocks from this address on are wanted, even if they are not in `wanted`.
    pub(super) known_end: StoreBlock,
    pub(super) seeds: SeedUse<'a>,
    /// Bytes that must stay free on the filesystem. What would leave fewer is not taken.
    pub(super) reserve_bytes: u64,
    /// Bytes that may be written in all. What would exceed it is not taken.
    pub(super) work_space_bytes: Option<u64>,
    /// The counts of the restore.
    pub(super) restored: &'a mut Restored,
    /// What hashes blocks, as the source does.
    pub(super) hasher: BlockHasher,
    pub(super) monitor: &'a dyn Monitor,
}

/// The ranges of a frame's blocks that were put into the staging file.
struct FrameOutcome {
    written: Vec<Range<StoreBlock>>,
    shared: Vec<Range<StoreBlock>>,
}

impl StagingSink<'_> {
    /// The parts of a range that are wanted.
    fn wanted_of(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        match self.wanted {
            Some(wanted) if range.end <= self.known_end => range::overlap(wanted, range),
            _ => vec![range],
        }
    }

    /// Refuses to write so many bytes if too few would stay free. What was written and has no place on disk yet may still count as free.
    fn check_reserve(&mut self, bytes: u64) -> Result<()> {
        let written_bytes = self.restored.written_bytes.saturating_add(bytes);
        if let Some(allowed_bytes) = self.work_space_bytes.filter(|allowed| written_bytes > *allowed) {
            return Err(Error::WorkSpace {
                path: self.staging.path().to_owned(),
                allowed_bytes,
            });
        }
        if self.reserve_bytes == 0 {
            return Ok(());
        }
        let needed_bytes = bytes.saturating_add(self.reserve_bytes);
        let free_bytes = |staging: &Staging| {
            let space = rustix::fs::fstatvfs(staging.file());
            space.map_or(u64::MAX, |space| space.f_bavail.saturating_mul(space.f_frsize))
        };
        if free_bytes(self.staging) < needed_bytes.saturating_add(self.staging.pending_bytes()) {
            self.staging.settle()?;
            // What was removed a moment ago is free once the filesystem has committed that.
            let _ = rustix::fs::syncfs(self.staging.file());
            if free_bytes(self.staging) < needed_bytes {
                return Err(Error::writing("write more to", self.staging.path())(Errno::NOSPC));
            }
        }
        Ok(())
    }

    /// Shares or writes the missing blocks of a frame.
    fn put(&self, frame: &SourceFrame<'_>) -> Result<FrameOutcome> {
        let missing = self.missing(frame.blocks.clone());
        if missing.is_empty() {
            return Ok(FrameOutcome {
                written: missing,
                shared: Vec::new(),
            });
        }
        let content = (frame.content)()?;
        let part = |range: &Range<StoreBlock>| {
            let at = (range.start - frame.blocks.start) as usize * BLOCK_LEN;
            &content[at..at + (range.end - range.start) as usize * BLOCK_LEN]
        };
        let mut shared = Vec::new();
        for range in &missing {
            match self.seeds {
                SeedUse::None => {}
                SeedUse::Announced(seed, matches) => {
                    share_equal(seed, matches, range, part(range), self.staging, &mut shared);
                }
                SeedUse::ByContent(seed) => {
                    let matches = seed.find_content(range.start, part(range));
                    share_equal(seed, &matches, range, part(range), self.staging, &mut shared);
                }
            }
        }
        let written = range::without(&missing, &shared);
        for range in &written {
            self.staging.write(range.start, part(range))?;
        }
        for range in missing {
            self.monitor.advance(bytes(range.end - range.start));
        }
        Ok(FrameOutcome { written, shared })
    }
}

impl BlockSink for StagingSink<'_> {
    fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        let wanted = self.wanted_of(range);
        wanted
            .into_iter()
            .flat_map(|range| self.staging.missing(range))
            .collect()
    }

    fn take(&mut self, frames: &[SourceFrame<'_>]) -> Result<Vec<(usize, Error)>> {
        if self.monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let end = frames
            .iter()
            .map(|frame| frame.blocks.end)
            .max()
            .unwrap_or(StoreBlock(0));
        let all: u64 = frames.iter().map(|frame| bytes(range::length(&frame.blocks))).sum();
        self.check_reserve(all)?;
        self.staging.make_room(end)?;
        let sink = &*self;
        let outcomes: Vec<Result<FrameOutcome>> = frames.par_iter().map(|frame| sink.put(frame)).collect();
        let mut damaged = Vec::new();
        for (number, outcome) in outcomes.into_iter().enumerate() {
            let FrameOutcome { written, shared } = match outcome {
                Ok(outcome) => outcome,
                Err(error @ Error::Damaged { .. }) => {
                    damaged.push((number, error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.restored.written_bytes += range::count(&written) * bytes(1);
            self.restored.seeded_bytes += range::count(&shared) * bytes(1);
            for range in written.into_iter().chain(shared) {
                self.staging.added(range)?;
            }
        }
        Ok(damaged)
    }

    fn prove(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<bool> {
        let end = first.saturating_add(u32::try_from(hashes.len()).unwrap_or(u32::MAX));
        let mut differing = Vec::new();
        for part in range::parts(first..end, PROVED_BLOCKS) {
            for present in self.staging.present(part) {
                let mut content = vec![0; (present.end - present.start) as usize * BLOCK_LEN];
                self.staging.read(present.start, &mut content)?;
                let expected = &hashes[(present.start - first) as usize..];
                let blocks = content.par_chunks_exact(BLOCK_LEN).zip(expected);
                let differs: Vec<bool> = blocks.map(|(block, hash)| self.hasher.of(block) != *hash).collect();
                differing.extend(range::where_true(range::each(present).zip(differs)));
            }
        }
        for range in &differing {
            self.staging.forget(range.clone());
        }
        Ok(differing.is_empty())
    }
}

/// A sink that keeps nothing, and counts what a restore would write and share.
pub(super) struct CountingSink<'a> {
    /// The images on the disk that hold some of the blocks, if there are any.
    pub(super) seed: Option<&'a dyn Seed>,
    /// The counts.
    pub(super) restored: &'a mut Restored,
    pub(super) monitor: &'a dyn Monitor,
}

impl CountingSink<'_> {
    /// The blocks of a frame that a seed holds.
    fn seeded_blocks(&self, frame: &SourceFrame<'_>) -> Result<u64> {
        let Some(seed) = self.seed else { return Ok(0) };
        let (content, first) = ((frame.content)()?, frame.blocks.start);
        let mut blocks = 0;
        for seeded in seed.find_content(first, &content) {
            let from = (seeded.first - first) as usize * BLOCK_LEN;
            if let Ok(seed_content) = seed.content(seeded.slot, seeded.blocks) {
                blocks += range::count(&equal_blocks(seeded.first, &seed_content, &content[from..]));
            }
        }
        Ok(blocks)
    }
}

impl BlockSink for CountingSink<'_> {
    fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        vec![range]
    }

    fn take(&mut self, frames: &[SourceFrame<'_>]) -> Result<Vec<(usize, Error)>> {
        if self.monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let counting = &*self;
        let seeded: Vec<u64> = frames
            .par_iter()
            .map(|frame| counting.seeded_blocks(frame))
            .collect::<Result<_>>()?;
        let all: u64 = frames.iter().map(|frame| u64::from(range::length(&frame.blocks))).sum();
        let seeded: u64 = seeded.iter().sum();
        self.restored.seeded_bytes += seeded * bytes(1);
        self.restored.written_bytes += (all - seeded) * bytes(1);
        self.monitor.advance(all * bytes(1));
        Ok(Vec::new())
    }

    fn prove(&mut self, _: StoreBlock, _: &[Hash]) -> Result<bool> {
        Ok(true)
    }
}

/// Shares the blocks of a range that a seed holds, and adds them to `shared`. They are compared with the content before and after.
fn share_equal(
    seed: &dyn Seed,
    matches: &[SeedMatch],
    range: &Range<StoreBlock>,
    content: &[u8],
    staging: &Staging,
    shared: &mut Vec<Range<StoreBlock>>,
) {
    let content_of = |part: &Range<StoreBlock>| {
        let at = (part.start - range.start) as usize * BLOCK_LEN;
        &content[at..at + (part.end - part.start) as usize * BLOCK_LEN]
    };
    let first = matches.partition_point(|seeded| seeded.first + seeded.blocks <= range.start);
    for seeded in matches[first..].iter().take_while(|seeded| seeded.first < range.end) {
        let part = seeded.first.max(range.start)..(seeded.first + seeded.blocks).min(range.end);
        let slot = seeded.slot + (part.start - seeded.first);
        let Ok(seed_content) = seed.content(slot, part.end - part.start) else {
            continue;
        };
        for same in equal_blocks(part.start, &seed_content, content_of(&part)) {
            let slot = slot + (same.start - part.start);
            if !seed.share(slot, same.end - same.start, staging.file(), bytes(same.start.0)) {
                continue;
            }
            let mut staged = vec![0; (same.end - same.start) as usize * BLOCK_LEN];
            if staging.read(same.start, &mut staged).is_ok() && staged == content_of(&same) {
                shared.push(same);
            }
        }
    }
}

/// The ranges of blocks in which two contents are equal. Both begin with the block `first`.
fn equal_blocks(first: StoreBlock, seed_content: &[u8], content: &[u8]) -> Vec<Range<StoreBlock>> {
    let pairs = seed_content
        .chunks_exact(BLOCK_LEN)
        .zip(content.chunks_exact(BLOCK_LEN));
    range::where_true(range::from(first).zip(pairs.map(|(seed_block, block)| seed_block == block)))
}
