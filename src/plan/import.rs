//! What a restore needs: which blocks of the store, and which of them are on the disk already. Pure.

use std::ops::Range;

use super::table::Table;
use crate::archive::StoreBlock;
use crate::archive::manifest::{Content, ImageRuns};
use crate::block::Slot;
use crate::facts::Facts;
use crate::fingerprint::Fingerprints;

/// The store addresses that images refer to: ascending, none empty, none touching the next.
pub fn wanted<'a>(images: impl IntoIterator<Item = &'a ImageRuns>) -> Vec<Range<StoreBlock>> {
    let runs = images.into_iter().flat_map(|image| &image.runs);
    let mut ranges: Vec<Range<StoreBlock>> = runs
        .filter_map(|run| match run.content {
            Content::Stored(first) => Some(first..first + run.blocks),
            _ => None,
        })
        .collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<StoreBlock>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

/// Blocks in some ranges.
pub fn length_of(ranges: &[Range<StoreBlock>]) -> u64 {
    ranges.iter().map(|range| u64::from(range.end - range.start)).sum()
}

/// A range of the store that seeds seem to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seeded {
    /// First store address.
    pub first: StoreBlock,
    /// Blocks.
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
) -> Vec<Seeded> {
    let mut table = Table::new(facts.slots() as usize, facts.table_slots_max);
    for extent in &facts.extents {
        for run in facts.live_runs(extent.slots()) {
            for (slot, fingerprint) in run.clone().zip(facts.fingerprints.range(run)) {
                table.enter(slot, fingerprint, &facts.fingerprints, |slot| facts.machine_of(slot));
            }
        }
    }
    // Nobody reaches the blocks between two live runs: a match ends with its own.
    let live_end = |slot: Slot| {
        let extent = &facts.extents[facts.extent_of(slot) as usize];
        facts
            .live_runs(slot..extent.slots().end)
            .next()
            .map_or(slot, |run| run.end)
    };
    let mut found: Vec<Seeded> = Vec::new();
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
                // Of equal ones the first: it follows what was found before.
                .reduce(|best, next| if next.0 > best.0 { next } else { best });
            match best {
                Some((blocks, slot)) if blocks > 0 => {
                    found.push(Seeded {
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

/// What is left of some ranges without others; both ascending.
pub fn without(ranges: &[Range<StoreBlock>], others: &[Range<StoreBlock>]) -> Vec<Range<StoreBlock>> {
    let mut left = Vec::new();
    let mut others = others.iter().peekable();
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            while others.next_if(|other| other.end <= at).is_some() {}
            let (end, next) = match others.peek() {
                Some(other) if other.start <= at => (at, other.end),
                Some(other) => (other.start.min(range.end), other.start.min(range.end)),
                None => (range.end, range.end),
            };
            if at < end {
                left.push(at..end);
            }
            at = next.max(end);
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn ranges() -> impl Strategy<Value = Vec<Range<StoreBlock>>> {
        prop::collection::vec((1u32..9, 1u32..9), 0..12).prop_map(|gaps| {
            let mut at = 0;
            gaps.into_iter()
                .map(|(gap, length)| {
                    let start = at + gap;
                    at = start + length;
                    start..at
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_is_left_is_the_difference(ranges in ranges(), others in ranges()) {
            let set = |ranges: &[Range<StoreBlock>]| ranges.iter().cloned().flatten().collect::<BTreeSet<_>>();
            let expected: BTreeSet<_> = set(&ranges).difference(&set(&others)).copied().collect();
            let left = without(&ranges, &others);
            prop_assert_eq!(set(&left), expected);
            prop_assert!(left.iter().all(|range| range.start < range.end));
        }
    }
}
