//! Blocks that a source hands over go into the staging file: shared from the disk where it holds the same, written where it does not.

use std::ops::Range;

use rayon::prelude::*;

use super::Restored;
use super::seed::{PROVED_BLOCKS, Seed};
use super::source::{BlockSink, SourceFrame};
use super::staging::Staging;
use crate::archive::record::{Hash, hash_of};
use crate::block::{BLOCK_LEN, bytes};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::seeds::SeedMatch;
use crate::range;

/// The staging file as a sink.
pub(super) struct StagingSink<'a> {
    pub(super) staging: &'a mut Staging,
    /// The blocks that are wanted, a list; none means all, since what is offered later may refer to them.
    pub(super) wanted: Option<&'a [Range<StoreBlock>]>,
    /// Blocks from this address on are wanted whatever the list says.
    pub(super) known_end: StoreBlock,
    /// What the disk seems to hold: compared with what comes before it is shared.
    pub(super) seeds: Option<(&'a dyn Seed, &'a [SeedMatch])>,
    pub(super) done: &'a mut Restored,
    pub(super) monitor: &'a dyn Monitor,
}

/// What came of one frame.
struct FrameOutcome {
    written: Vec<Range<StoreBlock>>,
    shared: Vec<Range<StoreBlock>>,
}

impl StagingSink<'_> {
    fn wanted_of(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        match self.wanted {
            Some(wanted) if range.end <= self.known_end => range::overlap(wanted, range),
            _ => vec![range],
        }
    }

    /// Puts the parts of a frame that are missing where they belong.
    fn place(&self, frame: &SourceFrame<'_>) -> Result<FrameOutcome> {
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
        if let Some((seed, seeded)) = self.seeds {
            for range in &missing {
                share_equal(seed, seeded, range, part(range), self.staging, &mut shared);
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
        self.staging.make_room(end)?;
        let this = &*self;
        let placed: Vec<Result<FrameOutcome>> = frames.par_iter().map(|frame| this.place(frame)).collect();
        let mut failed = Vec::new();
        for (at, placed) in placed.into_iter().enumerate() {
            let FrameOutcome { written, shared } = match placed {
                Ok(taken) => taken,
                Err(error @ Error::Damaged { .. }) => {
                    failed.push((at, error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.done.written_bytes += range::count(&written) * bytes(1);
            self.done.seeded_bytes += range::count(&shared) * bytes(1);
            for range in written.into_iter().chain(shared) {
                self.staging.added(range)?;
            }
        }
        Ok(failed)
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
                let differs: Vec<bool> = blocks.map(|(block, hash)| hash_of(block) != *hash).collect();
                differing.extend(range::where_true(range::each(present).zip(differs)));
            }
        }
        for range in &differing {
            self.staging.forget(range.clone());
        }
        Ok(differing.is_empty())
    }
}

/// Shares the parts of a range that seeds hold, each compared with what came, before and after.
fn share_equal(
    seed: &dyn Seed,
    seeded: &[SeedMatch],
    range: &Range<StoreBlock>,
    content: &[u8],
    staging: &Staging,
    shared: &mut Vec<Range<StoreBlock>>,
) {
    let of = |part: &Range<StoreBlock>| {
        let at = (part.start - range.start) as usize * BLOCK_LEN;
        &content[at..at + (part.end - part.start) as usize * BLOCK_LEN]
    };
    let from = seeded.partition_point(|one| one.first + one.blocks <= range.start);
    for one in seeded[from..].iter().take_while(|one| one.first < range.end) {
        let part = one.first.max(range.start)..(one.first + one.blocks).min(range.end);
        let slot = one.slot + (part.start - one.first);
        let Ok(found) = seed.content(slot, part.end - part.start) else {
            continue;
        };
        for same in equal_blocks(part.start, &found, of(&part)) {
            let slot = slot + (same.start - part.start);
            if !seed.share(slot, same.end - same.start, staging.file(), bytes(same.start.0)) {
                continue;
            }
            let mut now = vec![0; (same.end - same.start) as usize * BLOCK_LEN];
            if staging.read(same.start, &mut now).is_ok() && now == of(&same) {
                shared.push(same);
            }
        }
    }
}

/// The maximal ranges of blocks, the first of which is `first`, in which two contents are equal.
fn equal_blocks(first: StoreBlock, one: &[u8], other: &[u8]) -> Vec<Range<StoreBlock>> {
    let pairs = one.chunks_exact(BLOCK_LEN).zip(other.chunks_exact(BLOCK_LEN));
    range::where_true(range::from(first).zip(pairs.map(|(one, other)| one == other)))
}
