//! What an archive needs of a pool: which blocks are new to it, and where it has the others. Pure.
//!
//! Fingerprints propose; whoever carries the plan out hashes every block that it reads, and stores what was taken for another.

use std::collections::BTreeSet;
use std::ops::Range;

use super::table::BlockTable;
use crate::block::NumberSet;
use crate::chunk::Chunker;
use crate::content::{Content, KnownSlots, Run, push_run};
use crate::facts::Facts;
use crate::fingerprint::Fingerprints;
use crate::numbers::{ImageId, Slot, StoreBlock};
use crate::range;
use crate::spill::SpillVec;

/// What a range of slots is in the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExportSource {
    /// Stored by an earlier commit, as is known of its extent: it is not read again.
    Known(StoreBlock),
    /// Zeros, as is known of its extent.
    KnownZeros,
    /// Zeros, to be proved.
    Zeros,
    /// Equal to these blocks of the store, to be proved.
    Same(StoreBlock),
    /// To be stored here.
    New(StoreBlock),
}

impl ExportSource {
    fn content(self) -> Content {
        match self {
            Self::Known(first) | Self::Same(first) | Self::New(first) => Content::Stored(first),
            Self::KnownZeros | Self::Zeros => Content::Zeros,
        }
    }

    /// Whether its blocks have to be read.
    pub fn is_read(self) -> bool {
        !matches!(self, Self::Known(_) | Self::KnownZeros)
    }
}

/// A range of slots and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportPiece {
    /// First slot.
    pub slot: Slot,
    /// Length in blocks.
    pub blocks: u32,
    /// What they are in the archive.
    pub source: ExportSource,
}

impl ExportPiece {
    /// The slot after its last.
    pub fn end(&self) -> Slot {
        self.slot + self.blocks
    }

    /// What it is from one of its slots on.
    pub fn content_at(&self, slot: Slot) -> Content {
        self.known().content_at(slot)
    }

    /// What it is in the archive, once the plan was carried out.
    pub fn known(&self) -> KnownSlots {
        KnownSlots {
            slot: self.slot,
            blocks: self.blocks,
            content: self.source.content(),
        }
    }
}

/// What an export is to store, and what it may refer to instead.
#[derive(Debug, Default)]
pub struct ExportPlan {
    /// All live slots, in order.
    pub pieces: SpillVec<ExportPiece>,
    /// Lengths of the chunks of new blocks, in order.
    pub chunks: SpillVec<u8>,
    /// Store address of the first new block.
    pub first_new: StoreBlock,
    /// Store address after the last new block.
    pub end: StoreBlock,
    /// Fingerprints by store address.
    pub fingerprints: Fingerprints<StoreBlock>,
}

/// Blocks of a granule, in which addresses that are used are counted together.
const GRANULE_BLOCKS: u32 = 1024;

/// Store addresses that some images refer to, a granule at a time. It takes half a megabyte at most.
#[derive(Debug, Clone)]
pub struct UsedBlocks {
    granules: NumberSet<u32>,
    end: StoreBlock,
}

impl UsedBlocks {
    /// Begins without any, for a store that ends at `end`.
    pub fn new(end: StoreBlock) -> Self {
        Self {
            granules: NumberSet::new(end.index() / GRANULE_BLOCKS as usize + 1),
            end,
        }
    }

    /// Adds a range; what lies beyond the end is left out.
    pub fn add(&mut self, range: Range<StoreBlock>) {
        let end = range.end.min(self.end);
        if range.start < end {
            (range.start.0 / GRANULE_BLOCKS..=(end.0 - 1) / GRANULE_BLOCKS)
                .for_each(|granule| self.granules.insert(granule));
        }
    }

    /// Returns the ranges, a list. Each may hold more than was added.
    pub fn ranges(&self) -> Vec<Range<StoreBlock>> {
        let count = self.end.0.div_ceil(GRANULE_BLOCKS);
        let used = range::where_true((0..count).map(|granule| (granule, self.granules.contains(granule))));
        let as_blocks = used.into_iter().map(|granules| {
            let end = granules.end.saturating_mul(GRANULE_BLOCKS).min(self.end.0);
            StoreBlock(granules.start * GRANULE_BLOCKS)..StoreBlock(end)
        });
        as_blocks.collect()
    }
}

impl ExportPlan {
    /// Returns the addresses of earlier commits that the plan refers to, or more.
    pub fn used_before(&self) -> Vec<Range<StoreBlock>> {
        let mut used = UsedBlocks::new(self.first_new);
        for piece in &self.pieces {
            if let ExportSource::Known(first) | ExportSource::Same(first) = piece.source {
                used.add(first..first + piece.blocks);
            }
        }
        used.ranges()
    }
}

/// Chooses the images that a commit leaves out so that it has at most `most` runs, given how many each has: those with the most runs. So one
/// image that its machine has broken into pieces does not keep others from being exported.
pub fn too_fragmented(runs: &[usize], most: usize) -> BTreeSet<usize> {
    let mut left_out = BTreeSet::new();
    let mut total: usize = runs.iter().sum();
    let mut by_runs: Vec<usize> = (0..runs.len()).collect();
    by_runs.sort_by_key(|place| std::cmp::Reverse(runs[*place]));
    for place in by_runs {
        if total <= most {
            break;
        }
        total -= runs[place];
        left_out.insert(place);
    }
    left_out
}

/// Plans an export. `known` are pieces of extents that the archive has, in order; `stored` holds the fingerprints of the
/// `first_new` blocks that are in the store already, with room for all slots behind them. Addresses of `lost`, a list, are not referred to.
/// None if the store would be larger than allowed.
pub fn plan_export(
    facts: &Facts,
    known: &[KnownSlots],
    first_new: StoreBlock,
    stored: Fingerprints<StoreBlock>,
    lost: &[Range<StoreBlock>],
) -> Option<ExportPlan> {
    let mut planner = Planner {
        facts,
        table: BlockTable::new(stored.len(), facts.table_slots_max),
        plan: ExportPlan {
            pieces: SpillVec::new_in(facts.budget()),
            chunks: SpillVec::new_in(facts.budget()),
            first_new,
            end: first_new,
            fingerprints: stored,
        },
        chunker: Chunker::default(),
        lost,
    };
    let stored = range::without(std::slice::from_ref(&(StoreBlock(0)..first_new)), lost);
    for block in stored.into_iter().flat_map(range::each) {
        let fingerprint = planner.plan.fingerprints.get(block);
        planner
            .table
            .enter(block, fingerprint, &planner.plan.fingerprints, |_| ());
    }
    let is_there = |piece: &&KnownSlots| match piece.content {
        Content::Stored(first) => range::overlap(lost, first..first + piece.blocks).is_empty(),
        _ => true,
    };
    let mut known = known.iter().filter(is_there).peekable();
    let live = facts.extents.iter().flat_map(|extent| facts.live_runs(extent.slots()));
    for live in live {
        let mut at = live.start;
        while at < live.end {
            while known.next_if(|piece| piece.end() <= at).is_some() {}
            at = planner.plan_up_to(at, live.end, known.peek().copied())?;
        }
    }
    Some(planner.plan)
}

/// Consecutive blocks of the store that have the fingerprints of wanted blocks.
#[derive(Debug, Clone, Copy)]
struct StoredRun {
    first: StoreBlock,
    blocks: usize,
}

struct Planner<'a> {
    facts: &'a Facts,
    table: BlockTable<StoreBlock>,
    plan: ExportPlan,
    chunker: Chunker,
    /// Addresses that must not be referred to, a list.
    lost: &'a [Range<StoreBlock>],
}

impl Planner<'_> {
    fn push(&mut self, slot: Slot, blocks: u32, source: ExportSource) {
        if let Some(last) = self.plan.pieces.last_mut()
            && last.end() == slot
            && std::mem::discriminant(&last.source) == std::mem::discriminant(&source)
            && last.content_at(slot) == source.content()
        {
            last.blocks += blocks;
            return;
        }
        self.plan.pieces.push(ExportPiece { slot, blocks, source });
    }

    /// Plans live slots from `at` on, and says up to which: to where the next known piece begins, or to where it ends if that is here.
    fn plan_up_to(&mut self, at: Slot, end: Slot, known: Option<&KnownSlots>) -> Option<Slot> {
        let Some(piece) = known.filter(|piece| piece.slot <= at) else {
            let end = known.map_or(end, |next| next.slot.min(end));
            self.plan_run(at, end)?;
            return Some(end);
        };
        let end = piece.end().min(end);
        let source = match piece.content_at(at) {
            Content::Stored(first) => ExportSource::Known(first),
            _ => ExportSource::KnownZeros,
        };
        self.push(at, end - at, source);
        Some(end)
    }

    fn plan_run(&mut self, start: Slot, end: Slot) -> Option<()> {
        let fingerprints = self.facts.fingerprints.range(start..end);
        let zero = self.facts.zero_fingerprint;
        let mut at = 0usize;
        let mut new_from = None;
        // The blocks behind the last match are tried first, since longer runs are fewer.
        let mut follows = None;
        while at < fingerprints.len() {
            let zeros = fingerprints[at..].iter().take_while(|one| **one == zero).count();
            let found = if zeros > 0 {
                Some((zeros, ExportSource::Zeros))
            } else {
                self.longest(&fingerprints[at..], follows)
                    .map(|run| (run.blocks, ExportSource::Same(run.first)))
            };
            let Some((length, source)) = found else {
                let block = self.plan.end;
                if block >= StoreBlock::END_MAX {
                    return None;
                }
                self.plan.fingerprints.write(block, &fingerprints[at..=at]);
                let fingerprint = self.plan.fingerprints.get(block);
                self.table.enter(block, fingerprint, &self.plan.fingerprints, |_| ());
                self.push(start + as_blocks(at), 1, ExportSource::New(block));
                self.plan.end += 1;
                new_from.get_or_insert(at);
                at += 1;
                continue;
            };
            self.cut(new_from.take().map(|from| &fingerprints[from..at]));
            self.push(start + as_blocks(at), as_blocks(length), source);
            if let ExportSource::Same(first) = source {
                follows = Some(first + as_blocks(length));
            }
            at += length;
        }
        self.cut(new_from.map(|from| &fingerprints[from..at]));
        Some(())
    }

    /// Cuts consecutive new blocks into chunks.
    fn cut(&mut self, new: Option<&[u32]>) {
        if let Some(new) = new {
            let chunks = &mut self.plan.chunks;
            self.chunker
                .cut(new, |chunk| chunks.push(u8::try_from(chunk.blocks).unwrap_or(u8::MAX)));
        }
    }

    /// Where the blocks end that may be referred to from `first` on.
    fn usable_end(&self, first: StoreBlock) -> StoreBlock {
        let at = self.lost.partition_point(|range| range.end <= first);
        self.lost.get(at).map_or(self.plan.end, |range| range.start.max(first))
    }

    /// The longest range of the store with these fingerprints; of several, the one that follows.
    fn longest(&self, wanted: &[u32], follows: Option<StoreBlock>) -> Option<StoredRun> {
        /// Blocks compared to choose between candidates; the chosen one is followed to its end.
        const LOOK: usize = 256;
        let stored = &self.plan.fingerprints;
        let length = |first: StoreBlock, limit: usize| {
            let pairs = range::each(first..self.usable_end(first)).zip(&wanted[..limit.min(wanted.len())]);
            pairs.take_while(|(block, one)| stored.get(*block) == **one).count()
        };
        let mut best: Option<StoredRun> = None;
        let candidates = self.table.candidates(wanted[0], stored);
        for candidate in follows.into_iter().chain(candidates) {
            let blocks = length(candidate, LOOK);
            if blocks > best.map_or(0, |best| best.blocks) {
                best = Some(StoredRun {
                    first: candidate,
                    blocks,
                });
            }
            if blocks == LOOK.min(wanted.len()) {
                break;
            }
        }
        let mut best = best?;
        if best.blocks >= LOOK {
            best.blocks = length(best.first, usize::MAX);
        }
        Some(best)
    }
}

fn as_blocks(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// What each range of an image of so many blocks holds, given what the slots of its pool are.
pub fn runs_of(facts: &Facts, pieces: &[ExportPiece], image: ImageId, blocks: u32) -> SpillVec<Run> {
    let hole = |blocks| Run {
        blocks,
        content: Content::Hole,
    };
    let mut runs = SpillVec::new_in(facts.budget());
    let mut at = 0;
    for mapping in facts.mappings_of(image) {
        push_run(&mut runs, hole(mapping.file_block.saturating_sub(at)));
        at = mapping.file_block + mapping.blocks;
        if mapping.preallocated {
            let unwritten = Run {
                blocks: mapping.blocks,
                content: Content::Unwritten,
            };
            push_run(&mut runs, unwritten);
            continue;
        }
        let slots = mapping.slots();
        let first = pieces.partition_point(|piece| piece.end() <= slots.start);
        for piece in pieces[first..].iter().take_while(|piece| piece.slot < slots.end) {
            let start = piece.slot.max(slots.start);
            let run = Run {
                blocks: piece.end().min(slots.end) - start,
                content: piece.content_at(start),
            };
            push_run(&mut runs, run);
        }
    }
    push_run(&mut runs, hole(blocks.saturating_sub(at)));
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::simulated::one_image;
    use proptest::prelude::*;

    /// Extents of one image, one after the other, with these fingerprints; 0 stands for zeros.
    fn facts(extents: &[Vec<u32>]) -> Facts {
        let place = |(number, fingerprints): (u32, &Vec<u32>)| {
            let first = number << 18;
            first..first + as_blocks(fingerprints.len())
        };
        let mut facts = one_image((0u32..).zip(extents).map(place), 2);
        facts.fingerprints = extents.concat().into();
        facts
    }

    fn fingerprints(stored: &[u32], facts: &Facts) -> Fingerprints<StoreBlock> {
        let mut fingerprints = Fingerprints::in_memory(stored.len() + facts.slots() as usize);
        fingerprints.write(StoreBlock(0), stored);
        fingerprints
    }

    proptest! {
        /// Every block is where its fingerprint says, each fingerprint is stored once, and known blocks are not read.
        #[test]
        fn every_block_is_found_once(
            extents in prop::collection::vec(prop::collection::vec(0u32..30, 1..40), 1..6),
            stored in prop::collection::vec(1u32..30, 0..20),
            known in any::<prop::sample::Index>(),
        ) {
            let facts = facts(&extents);
            let stored: Vec<u32> = { let mut seen = std::collections::HashSet::new(); stored.into_iter().filter(|one| seen.insert(*one)).collect() };
            let first_new = as_blocks(stored.len());
            let extent = &facts.extents[known.index(facts.extents.len())];
            let known: Vec<KnownSlots> = range::each(extent.slots())
                .map(|slot| (slot, facts.fingerprints.get(slot)))
                .filter_map(|(slot, fingerprint)| {
                    let at = stored.iter().position(|one| *one == fingerprint)?;
                    Some(KnownSlots { slot, blocks: 1, content: Content::Stored(StoreBlock(as_blocks(at))) })
                })
                .collect();
            let plan = plan_export(&facts, &known, StoreBlock(first_new), fingerprints(&stored, &facts), &[]).unwrap();
            let (mut slot, mut next, mut new) = (Slot(0), first_new, std::collections::HashSet::new());
            for piece in &plan.pieces {
                prop_assert_eq!(piece.slot, slot);
                for n in 0..piece.blocks {
                    let fingerprint = facts.fingerprints.get(slot + n);
                    match piece.source {
                        ExportSource::Zeros | ExportSource::KnownZeros => prop_assert_eq!(fingerprint, 0),
                        ExportSource::Same(first) => prop_assert_eq!(plan.fingerprints.get(first + n), fingerprint),
                        ExportSource::Known(first) => {
                            prop_assert!(extent.slots().contains(&(slot + n)));
                            prop_assert_eq!(plan.fingerprints.get(first + n), fingerprint);
                        }
                        ExportSource::New(first) => {
                            prop_assert_eq!(first + n, StoreBlock(next));
                            next += 1;
                            prop_assert!(new.insert(fingerprint) && !stored.contains(&fingerprint));
                        }
                    }
                }
                slot = piece.end();
            }
            prop_assert_eq!((slot, StoreBlock(next)), (facts.all_slots().end, plan.end));
            prop_assert_eq!(plan.chunks.iter().map(|n| u32::from(*n)).sum::<u32>(), plan.end - StoreBlock(first_new));
            let runs = runs_of(&facts, &plan.pieces, ImageId(0), facts.slots() * 2);
            let each: Vec<Content> = runs.iter().flat_map(|run| (0..run.blocks).map(|n| run.part(n, 1).content)).collect();
            prop_assert_eq!(each.len(), facts.slots() as usize * 2);
            for reference in facts.references() {
                for n in 0..reference.blocks {
                    let fingerprint = facts.fingerprints.get(reference.slot + n);
                    match each[(reference.file_block + n) as usize] {
                        Content::Stored(at) => prop_assert_eq!(plan.fingerprints.get(at), fingerprint),
                        other => prop_assert_eq!((other, fingerprint), (Content::Zeros, 0)),
                    }
                }
            }
        }
    }

    #[test]
    fn long_runs_are_one_piece() {
        let one: Vec<u32> = (1..2000).collect();
        let facts = facts(&[one.clone(), one]);
        let plan = plan_export(&facts, &[], StoreBlock(0), fingerprints(&[], &facts), &[]).unwrap();
        assert_eq!(
            plan.pieces.iter().map(|piece| piece.source).collect::<Vec<_>>(),
            [ExportSource::New(StoreBlock(0)), ExportSource::Same(StoreBlock(0))]
        );
    }

    #[test]
    fn lost_blocks_are_stored_anew() {
        let one: Vec<u32> = (1..100).collect();
        let facts = facts(std::slice::from_ref(&one));
        let known = [KnownSlots {
            slot: facts.extents[0].slots().start,
            blocks: 30,
            content: Content::Stored(StoreBlock(0)),
        }];
        let lost = [StoreBlock(20)..StoreBlock(40)];
        let plan = plan_export(&facts, &known, StoreBlock(99), fingerprints(&one, &facts), &lost).unwrap();
        let sources: Vec<_> = plan.pieces.iter().map(|piece| (piece.blocks, piece.source)).collect();
        let (same, new) = (ExportSource::Same, ExportSource::New);
        assert_eq!(
            sources,
            [
                (20, same(StoreBlock(0))),
                (20, new(StoreBlock(99))),
                (59, same(StoreBlock(40)))
            ]
        );
        assert_eq!(plan.used_before(), [StoreBlock(0)..StoreBlock(99)]);
    }

    #[test]
    fn used_blocks_are_counted_by_granules() {
        let mut used = UsedBlocks::new(StoreBlock(5000));
        for (first, end) in [(1, 2), (1023, 1025), (4099, 4100), (4999, 9000), (6000, 7000), (3, 3)] {
            used.add(StoreBlock(first)..StoreBlock(end));
        }
        assert_eq!(
            used.ranges(),
            [StoreBlock(0)..StoreBlock(2048), StoreBlock(4096)..StoreBlock(5000)]
        );
    }

    #[test]
    fn the_most_fragmented_images_are_left_out() {
        assert!(too_fragmented(&[5, 7, 3], 15).is_empty());
        assert_eq!(too_fragmented(&[5, 7, 3], 14), BTreeSet::from([1]));
        assert_eq!(too_fragmented(&[5, 7, 3], 4), BTreeSet::from([0, 1]));
    }
}
