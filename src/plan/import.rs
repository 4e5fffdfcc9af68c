//! What a restore needs: which blocks of the store, and which of them are on the disk already. Pure.

use std::ops::Range;

use super::table::BlockTable;
use crate::block::{ByteRange, Slot, bytes};
use crate::content::{Content, Run, StoreBlock};
use crate::facts::Facts;
use crate::fingerprint::Fingerprints;
use crate::range;

/// The store addresses that the runs of images refer to.
pub fn wanted<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Vec<Range<StoreBlock>> {
    range::joined(runs.into_iter().filter_map(|run| match run.content {
        Content::Stored(first) => Some(first..first + run.blocks),
        _ => None,
    }))
}

/// The ranges of an image of so many bytes with these runs that are lost, in bytes. `lost` are blocks of the store.
pub fn lost_ranges(runs: &[Run], size: u64, lost: &[Range<StoreBlock>]) -> Vec<ByteRange> {
    let mut ranges: Vec<ByteRange> = Vec::new();
    let mut at = 0u64;
    let mut add = |start: u64, blocks: u32| {
        let end = (start + bytes(blocks)).min(size);
        match ranges.last_mut() {
            Some(last) if last.start + last.length == start => last.length = end - last.start,
            _ => ranges.push(ByteRange {
                start,
                length: end.saturating_sub(start),
            }),
        }
    };
    for run in runs {
        match run.content {
            Content::Lost => add(at, run.blocks),
            Content::Stored(first) => {
                for range in range::overlap(lost, first..first + run.blocks) {
                    add(at + bytes(range.start - first), range.end - range.start);
                }
            }
            _ => {}
        }
        at += bytes(run.blocks);
    }
    ranges
}

/// A range of the store that seeds seem to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeedMatch {
    /// First store address.
    pub first: StoreBlock,
    /// Length in blocks.
    pub blocks: u32,
    /// First slot of the seeds' facts.
    pub slot: Slot,
}

/// Looks for wanted blocks in seeds, by fingerprint. `fingerprints` are those of the store, of which `known` says which are.
/// Whoever carries it out proves each block.
pub fn find_seeds(
    facts: &Facts,
    wanted: &[Range<StoreBlock>],
    fingerprints: &Fingerprints,
    known: impl Fn(StoreBlock) -> bool,
) -> Vec<SeedMatch> {
    let mut table = BlockTable::new(facts.slots() as usize, facts.table_slots_max);
    for extent in &facts.extents {
        for run in facts.live_runs(extent.slots()) {
            for (slot, fingerprint) in run.clone().zip(facts.fingerprints.range(run)) {
                table.enter(slot, fingerprint, &facts.fingerprints, |slot| facts.machine_of(slot));
            }
        }
    }
    // A match ends with its live run: no image reaches the blocks behind it.
    let live_end = |slot: Slot| {
        let extent = &facts.extents[facts.extent_of(slot) as usize];
        facts
            .live_runs(slot..extent.slots().end)
            .next()
            .map_or(slot, |run| run.end)
    };
    let mut found: Vec<SeedMatch> = Vec::new();
    for range in wanted {
        let mut at = range.start;
        let mut follows = None;
        while at < range.end {
            let length = |slot: Slot| {
                let limit = (live_end(slot) - slot).min(range.end - at);
                let pairs = (0..limit)
                    .take_while(|n| known(at + n) && fingerprints.get(at + n) == facts.fingerprints.get(slot + n));
                u32::try_from(pairs.count()).unwrap_or(u32::MAX)
            };
            let candidates: Vec<Slot> = if known(at) {
                table.candidates(fingerprints.get(at), &facts.fingerprints).collect()
            } else {
                Vec::new()
            };
            let follow = follows
                .take()
                .filter(|slot| *slot < facts.slots() && facts.place_of(*slot..slot + 1).is_some());
            let best = follow
                .into_iter()
                .chain(candidates)
                .map(|slot| (length(slot), slot))
                // Of equally long matches the first is taken: it follows what was found before.
                .reduce(|best, next| if next.0 > best.0 { next } else { best });
            match best {
                Some((blocks, slot)) if blocks > 0 => {
                    found.push(SeedMatch {
                        first: at,
                        blocks,
                        slot,
                    });
                    at += blocks;
                    follows = slot.checked_add(blocks);
                }
                _ => at += 1,
            }
        }
    }
    found
}
