//! Which of the blocks that a restore needs are on the disk already, as far as fingerprints tell. Pure.

use std::collections::HashSet;
use std::ops::Range;

use serde::Serialize;

use super::table::BlockTable;
use crate::archive::announced::AnnouncedBlocks;
use crate::chunk::weak_id;
use crate::facts::Facts;
use crate::numbers::{Slot, StoreBlock};
use crate::range;

/// A range of the store that seeds seem to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct SeedMatch {
    /// First store address.
    pub first: StoreBlock,
    /// Length in blocks.
    pub blocks: u32,
    /// First slot of the seeds' facts, which are this run's own.
    #[serde(skip)]
    pub slot: Slot,
}

impl SeedMatch {
    /// Its store addresses.
    pub fn range(&self) -> Range<StoreBlock> {
        self.first..self.first + self.blocks
    }
}

/// The blocks of seeds, by fingerprint.
#[derive(Debug)]
pub struct SeedTable(BlockTable<Slot>);

impl SeedTable {
    /// Enters all blocks that seeds map.
    pub fn new(facts: &Facts) -> Self {
        let mut table = BlockTable::new(facts.slots() as usize, facts.table_slots_max);
        for extent in &facts.extents {
            for run in facts.live_runs(extent.slots()) {
                for (slot, fingerprint) in range::each(run.clone()).zip(facts.fingerprints.range(run)) {
                    table.enter(slot, fingerprint, &facts.fingerprints, |slot| facts.machine_of(slot));
                }
            }
        }
        Self(table)
    }
}

/// Looks for wanted blocks in seeds, whose blocks are in a table. `fingerprint_of` is that of a block of the store, as far as it is known.
/// Whoever carries it out proves each block.
pub fn find_seeds(
    facts: &Facts,
    SeedTable(table): &SeedTable,
    wanted: &[Range<StoreBlock>],
    fingerprint_of: impl Fn(StoreBlock) -> Option<u32>,
) -> Vec<SeedMatch> {
    // A match ends with its live run: no image reaches the blocks behind it.
    let live_end = |slot: Slot| {
        let extent = &facts.extents[facts.extent_of(slot).index()];
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
                let pairs =
                    (0..limit).take_while(|n| fingerprint_of(at + *n) == Some(facts.fingerprints.get(slot + *n)));
                u32::try_from(pairs.count()).unwrap_or(u32::MAX)
            };
            let candidates: Vec<Slot> = match fingerprint_of(at) {
                Some(fingerprint) => table.candidates(fingerprint, &facts.fingerprints).collect(),
                None => Vec::new(),
            };
            let follow = follows
                .take()
                .filter(|slot: &Slot| slot.0 < facts.slots() && facts.place_of(*slot..*slot + 1).is_some());
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

/// The weak ids of the chunks that have wanted blocks.
pub fn weak_ids<'a>(
    wanted: &[Range<StoreBlock>],
    announced: impl Iterator<Item = &'a AnnouncedBlocks>,
) -> HashSet<u64> {
    let mut ids = HashSet::new();
    for one in announced {
        let mut at = 0;
        for blocks in &one.chunks {
            let (start, end) = (at, at + usize::from(*blocks));
            at = end;
            let first = one.first + u32::try_from(start).unwrap_or(0);
            let from = wanted.partition_point(|range| range.end <= first);
            if wanted
                .get(from)
                .is_some_and(|range| range.start < first + u32::from(*blocks))
            {
                ids.extend(one.fingerprints.get(start..end).map(weak_id));
            }
        }
    }
    ids
}
