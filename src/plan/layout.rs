//! Where every block is to be: which extents go, where their blocks are found, and which donors take what is left over.

use std::collections::BTreeMap;
use std::ops::Range;

use super::PlanOptions;
use super::apply::Origins;
use crate::block::NumberSet;
use crate::facts::{Class, Compression, Facts};
use crate::numbers::{DonorExtentId, ExtentId, Slot};
use crate::spill::{Budget, SpillVec};

/// Blocks of a compressed extent at most (kernel: `BTRFS_MAX_UNCOMPRESSED`, 128 KiB).
pub const COMPRESSED_BLOCKS_MAX: u32 = 32;

/// Where the blocks of a run are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DedupTarget {
    /// In the slots from this one on. A later round may move those in turn, which [`Layout::resolve`] follows.
    Home(Slot),
    /// Nowhere, since they are zeros: they become a hole.
    Hole,
}

/// A run of blocks of an extent that goes, and where they are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DedupRun {
    pub(super) slot: Slot,
    pub(super) blocks: u32,
    pub(super) target: DedupTarget,
}

impl DedupRun {
    /// The slots of its blocks.
    pub(super) fn slots(&self) -> Range<Slot> {
        self.slot..self.slot + self.blocks
    }

    /// Whether two of its blocks that should be equal are known to differ. Only pairs with a slot in `known`, which is in order,
    /// are looked at. `origin` tells which slot of `facts` a slot stands for.
    pub(super) fn is_refuted(&self, facts: &Facts, known: &[Slot], origin: impl Fn(Slot) -> Slot) -> bool {
        let among = |from: Slot| {
            let first = known.partition_point(|slot| *slot < from);
            let inside = known[first..]
                .iter()
                .take_while(move |slot| **slot < from + self.blocks);
            inside.map(move |slot| *slot - from)
        };
        let mut ours = among(self.slot);
        match self.target {
            DedupTarget::Hole => ours.any(|n| facts.proved_zero(origin(self.slot + n)) == Some(false)),
            DedupTarget::Home(home) => ours
                .chain(among(home))
                .any(|n| facts.proved_equal(origin(self.slot + n), origin(home + n)) == Some(false)),
        }
    }
}

/// Where blocks are after the plan was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockDestination {
    /// Nowhere: the image has a hole there.
    Hole,
    /// In an extent of the pool, from this slot on.
    Kept(Slot),
    /// In a donor extent.
    Donor {
        /// The donor extent.
        extent: DonorExtentId,
        /// First block in the donor extent.
        block: u32,
    },
}

/// An extent of a donor. It is written in one go, so that the filesystem allocates it as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DonorExtent {
    /// What it must have in common with the extents whose blocks it takes over.
    pub class: Class,
    /// The slots that it takes over, as places in the list of pieces that [`Layout::pieces_of`] reads.
    pieces: Range<u32>,
    /// Its length in blocks.
    pub blocks: u32,
    /// Bytes that it is expected to take on disk. They are exact if it is not compressed.
    pub disk_bytes: u64,
    /// The number of the batch that it is written in.
    pub batch: u32,
}

/// A range of slots that is left over, and its place in a donor.
#[derive(Debug, Clone, Copy)]
struct Leftover {
    slot: Slot,
    blocks: u32,
    donor: DonorExtentId,
    /// The first block in the donor.
    at: u32,
}

/// A donor extent that is being filled.
#[derive(Debug, Clone, Copy)]
struct OpenDonor {
    extent: DonorExtentId,
    /// The references that it will have.
    references: u32,
}

/// The destination of the first blocks of a range of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resolved {
    /// The number of blocks that lie there one after the other.
    pub blocks: u32,
    /// The destination of the first of these blocks.
    pub destination: BlockDestination,
}

/// An extent that goes.
#[derive(Debug, Clone, Copy)]
struct EliminatedExtent {
    extent: ExtentId,
    /// Blocks of it that were left over when its elimination was decided. Batches are cut by this number: a block that a later
    /// round finds must not move other extents to another batch, away from their neighbours in the images.
    left_over: u32,
}

/// Where every block of the pool is to be.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    /// Extents that go, in the order in which that was decided.
    order: SpillVec<EliminatedExtent>,
    /// The same extents as a set.
    gone: NumberSet<ExtentId>,
    /// Their blocks that are found elsewhere, by slot. Runs do not overlap, and each lies within one extent.
    runs: SpillVec<DedupRun>,
    leftovers: SpillVec<Leftover>,
    /// The slots of the leftovers, donor by donor.
    pieces: SpillVec<Range<Slot>>,
    donors: SpillVec<DonorExtent>,
}

impl Layout {
    /// A layout in which every block stays, with lists that are made from a budget.
    pub(super) fn new_in(budget: &Budget) -> Self {
        Self {
            order: SpillVec::new_in(budget),
            gone: NumberSet::default(),
            runs: SpillVec::new_in(budget),
            leftovers: SpillVec::new_in(budget),
            pieces: SpillVec::new_in(budget),
            donors: SpillVec::new_in(budget),
        }
    }

    /// The extents that go, in the order in which that was decided.
    pub fn gone(&self) -> impl ExactSizeIterator<Item = ExtentId> {
        self.order.iter().map(|gone| gone.extent)
    }

    /// Whether an extent goes.
    pub fn is_gone(&self, extent: ExtentId) -> bool {
        self.gone.contains(extent)
    }

    /// The donors to write.
    pub fn donors(&self) -> &[DonorExtent] {
        &self.donors
    }

    /// The slots that a donor's extent takes over, in order.
    pub fn pieces_of(&self, donor: &DonorExtent) -> &[Range<Slot>] {
        &self.pieces[donor.pieces.start as usize..donor.pieces.end as usize]
    }

    /// The slots of an extent that goes which stay where they are: those that no run covers, if the filesystem frees single
    /// blocks, and otherwise none.
    pub(super) fn stays_of(&self, facts: &Facts, extent: ExtentId) -> Vec<Range<Slot>> {
        if facts.frees_blocks {
            self.rest_of(facts, extent)
        } else {
            Vec::new()
        }
    }

    /// The live slots of an extent that no run covers.
    pub(super) fn rest_of(&self, facts: &Facts, extent: ExtentId) -> Vec<Range<Slot>> {
        left_over(
            facts,
            facts.extents[extent.index()].slots(),
            self.runs_of(facts, extent),
        )
    }

    pub(super) fn runs_of(&self, facts: &Facts, extent: ExtentId) -> &[DedupRun] {
        let slots = facts.extents[extent.index()].slots();
        let from = self.runs.partition_point(|run| run.slot < slots.start);
        let count = self.runs[from..].partition_point(|run| run.slot < slots.end);
        &self.runs[from..from + count]
    }

    /// Whether a run is refuted by what was read of the slots `known`, which are in order.
    pub(super) fn is_refuted(&self, facts: &Facts, known: &[Slot]) -> bool {
        self.runs.iter().any(|run| run.is_refuted(facts, known, |slot| slot))
    }

    /// Adds decisions of a pass. `origins` tells where the slots of the planned pool come from that the pass looked at; it is
    /// none if the pass looked at the pool as it is.
    pub(super) fn compose(&mut self, facts: &Facts, gone: &[ExtentId], runs: &[DedupRun], origins: Option<&Origins>) {
        let origin = |slot| origins.map_or(slot, |origins| origins.slot(slot));
        let kept = |extent| origins.map_or(Some(extent), |origins| origins.extent(extent));
        self.gone.grow(facts.extents.len());
        for extent in gone.iter().filter_map(|extent| kept(*extent)) {
            self.gone.insert(extent);
        }
        for run in runs {
            let mut done = 0;
            while done < run.blocks {
                let slot = origin(run.slot + done);
                let target = |n| match run.target {
                    DedupTarget::Home(home) => DedupTarget::Home(origin(home + n)),
                    DedupTarget::Hole => DedupTarget::Hole,
                };
                let first = target(done);
                let follows = |n: u32| {
                    origin(run.slot + done + n) == slot + n
                        && match (first, target(done + n)) {
                            (DedupTarget::Home(first), DedupTarget::Home(this)) => this == first + n,
                            _ => true,
                        }
                };
                let extent = facts.extent_of(slot);
                let blocks_max = (run.blocks - done).min(facts.extents[extent.index()].slots().end - slot);
                let blocks = (1..blocks_max).find(|n| !follows(*n)).unwrap_or(blocks_max);
                self.runs.push(DedupRun {
                    slot,
                    blocks,
                    target: first,
                });
                done += blocks;
            }
        }
        self.runs.sort_unstable_by_key(|run| run.slot);
        for extent in gone.iter().filter_map(|extent| kept(*extent)) {
            let rest = self.rest_of(facts, extent);
            let left_over = rest.iter().map(|piece| piece.end - piece.start).sum();
            self.order.push(EliminatedExtent { extent, left_over });
        }
    }

    /// Moves extents to the front, in the order of the images, that are rewritten although nothing of them is found elsewhere:
    /// they need no other extent, and others may need them. Without such extents the order stays.
    fn order_for_donors(&mut self, facts: &Facts) {
        let extent = |place: ExtentId| &facts.extents[place.index()];
        if !self.gone().any(|place| extent(place).is_always_rewritten()) {
            return;
        }
        let order = std::mem::take(&mut self.order);
        let key = |place: ExtentId| {
            let references = facts.references_to(place);
            let first = references
                .map(|reference| (reference.image, reference.file_block))
                .min();
            first.filter(|_| self.runs_of(facts, place).is_empty()).ok_or(())
        };
        let keyed = (0u32..).zip(&order).map(|(at, gone)| (key(gone.extent), at));
        let mut keyed: SpillVec<_> = SpillVec::from_iter_in(keyed, facts.budget());
        keyed.sort_unstable();
        let ordered = keyed.iter().map(|(_, at)| order[*at as usize]);
        self.order = SpillVec::from_iter_in(ordered, facts.budget());
    }

    /// Lays out the donors for the blocks that are left over, batch by batch.
    pub(super) fn place_leftovers(&mut self, facts: &Facts, options: &PlanOptions) {
        self.leftovers.clear();
        self.pieces.clear();
        self.donors.clear();
        if facts.frees_blocks {
            return;
        }
        self.order_for_donors(facts);
        let batch_bytes_max = (options.work_space_bytes / 2).min(options.batch_bytes);
        let (mut batch, mut batch_bytes, mut pieces) = (0, 0, Vec::new());
        let order = std::mem::take(&mut self.order);
        for EliminatedExtent { extent, left_over } in order.iter().copied() {
            let rest = self.rest_of(facts, extent);
            let share = facts.extents[extent.index()].donor_bytes(left_over);
            if batch_bytes > 0 && batch_bytes + share > batch_bytes_max {
                self.place_batch(facts, options, batch, std::mem::take(&mut pieces));
                (batch, batch_bytes) = (batch + 1, 0);
            }
            batch_bytes += share;
            pieces.extend(rest.into_iter().map(|piece| (extent, piece)));
        }
        self.place_batch(facts, options, batch, pieces);
        self.order = order;
        self.list_pieces();
        self.leftovers.sort_unstable_by_key(|leftover| leftover.slot);
    }

    /// Lists the slots that each donor extent takes over.
    fn list_pieces(&mut self) {
        self.leftovers
            .sort_unstable_by_key(|leftover| (leftover.donor, leftover.at));
        self.pieces.clear();
        for of_donor in self.leftovers.chunk_by(|one, other| one.donor == other.donor) {
            let place = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let first = place(self.pieces.len());
            self.pieces
                .extend(of_donor.iter().map(|one| one.slot..one.slot + one.blocks));
            self.donors[of_donor[0].donor.index()].pieces = first..place(self.pieces.len());
        }
    }

    /// Lays out the donors of one batch, in the order in which images are read.
    fn place_batch(
        &mut self,
        facts: &Facts,
        options: &PlanOptions,
        batch: u32,
        mut pieces: Vec<(ExtentId, Range<Slot>)>,
    ) {
        pieces.sort_by_cached_key(|(_, piece)| {
            let place = facts.place_of(piece.clone());
            place.map(|place| (place.image, place.file_block))
        });
        let mut open: BTreeMap<Class, OpenDonor> = BTreeMap::new();
        for (extent, piece) in pieces {
            let this = &facts.extents[extent.index()];
            let class = this.donor_class();
            let references = facts.references_over(piece.clone());
            if open
                .get(&class)
                .is_some_and(|donor| donor.references + references > options.references_max)
            {
                open.remove(&class);
            }
            let mut from = piece.start;
            while from < piece.end {
                let donor = open.entry(class).or_insert_with(|| {
                    let empty = DonorExtent {
                        class,
                        pieces: 0..0,
                        blocks: 0,
                        disk_bytes: 0,
                        batch,
                    };
                    self.donors.push(empty);
                    OpenDonor {
                        extent: DonorExtentId::at(self.donors.len() - 1),
                        references: 0,
                    }
                });
                donor.references += references;
                let donor = donor.extent;
                let filled = &mut self.donors[donor.index()];
                let blocks = (piece.end - from).min(extent_blocks_max(class) - filled.blocks);
                self.leftovers.push(Leftover {
                    slot: from,
                    blocks,
                    donor,
                    at: filled.blocks,
                });
                filled.blocks += blocks;
                filled.disk_bytes += this.donor_bytes(blocks);
                if filled.blocks == extent_blocks_max(class) {
                    open.remove(&class);
                }
                from += blocks;
            }
        }
    }

    /// Returns the destination of the first blocks of a range of live slots.
    pub fn resolve(&self, facts: &Facts, slots: Range<Slot>) -> Resolved {
        let resolved = |blocks, destination| Resolved { blocks, destination };
        let (mut slot, mut blocks) = (slots.start, slots.end - slots.start);
        // This ends: each step leads to a slot that was a home when the run was decided, so only runs of later rounds can lead
        // on.
        loop {
            let after = self.runs.partition_point(|run| run.slot <= slot);
            if let Some(run) = after
                .checked_sub(1)
                .map(|at| self.runs[at])
                .filter(|run| slot < run.slot + run.blocks)
            {
                blocks = blocks.min(run.slot + run.blocks - slot);
                match run.target {
                    DedupTarget::Hole => return resolved(blocks, BlockDestination::Hole),
                    DedupTarget::Home(home) => slot = home + (slot - run.slot),
                }
                continue;
            }
            let extent = facts.extent_of(slot);
            let end = facts.extents[extent.index()].slots().end;
            if !self.is_gone(extent) {
                return resolved(blocks.min(end - slot), BlockDestination::Kept(slot));
            }
            if facts.frees_blocks {
                let end = self.runs.get(after).map_or(end, |next| next.slot.min(end));
                return resolved(blocks.min(end - slot), BlockDestination::Kept(slot));
            }
            let place = self.leftovers.partition_point(|leftover| leftover.slot <= slot);
            let leftover = self.leftovers[place - 1];
            debug_assert!(slot < leftover.slot + leftover.blocks, "every live slot has a place");
            blocks = blocks.min(leftover.slot + leftover.blocks - slot);
            let donor = BlockDestination::Donor {
                extent: leftover.donor,
                block: leftover.at + (slot - leftover.slot),
            };
            return resolved(blocks, donor);
        }
    }

    /// Where each piece of a range of live slots ends up, in order. The pieces cover the range.
    pub fn resolve_all<'a>(
        &'a self,
        facts: &'a Facts,
        slots: Range<Slot>,
    ) -> impl Iterator<Item = (Range<Slot>, BlockDestination)> + 'a {
        let mut at = slots.start;
        std::iter::from_fn(move || {
            (at < slots.end).then(|| {
                let found = self.resolve(facts, at..slots.end);
                let piece = at..at + found.blocks;
                at = piece.end;
                (piece, found.destination)
            })
        })
    }
}

/// Greatest length of a donor extent in blocks. It is small enough that the deletion of one image does not leave much of it
/// unreachable.
pub(super) fn extent_blocks_max(class: Class) -> u32 {
    match class.compression {
        Compression::None => 4096,
        _ => COMPRESSED_BLOCKS_MAX,
    }
}

/// The live slots among `slots` that no run covers, in order; `runs` are those of the same slots, in order.
pub(super) fn left_over(facts: &Facts, slots: Range<Slot>, runs: &[DedupRun]) -> Vec<Range<Slot>> {
    let mut pieces = Vec::new();
    let mut runs = runs.iter().peekable();
    for live in facts.live_runs(slots) {
        let mut from = live.start;
        while from < live.end {
            while runs.peek().is_some_and(|run| run.slot + run.blocks <= from) {
                let _ = runs.next();
            }
            let next = runs.peek().map_or(live.end, |run| run.slot.min(live.end));
            if from < next {
                pieces.push(from..next);
                from = next;
            } else {
                from = runs
                    .peek()
                    .map_or(live.end, |run| (run.slot + run.blocks).min(live.end));
            }
        }
    }
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::bytes;
    use crate::facts::CompressionGoal;
    use crate::numbers::DonorFileId;
    use crate::plan::METADATA_BYTES_PER_REFERENCE;
    use crate::plan::tests::notation::{Pool, options, pools};
    use crate::range;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// Disjoint runs within some slots, in order.
    fn runs_in(slots: &Range<Slot>, cuts: &[(prop::sample::Index, bool)]) -> Vec<DedupRun> {
        let mut at: Vec<(Slot, bool)> = cuts
            .iter()
            .map(|(cut, is_run)| {
                (
                    slots.start + u32::try_from(cut.index(range::length(slots) as usize)).unwrap(),
                    *is_run,
                )
            })
            .collect();
        at.sort_unstable();
        at.dedup_by_key(|(slot, _)| *slot);
        let ends = at.iter().skip(1).map(|(slot, _)| *slot).chain([slots.end]);
        let runs = at.iter().zip(ends).filter(|((_, is_run), _)| *is_run);
        runs.map(|((slot, _), end)| DedupRun {
            slot: *slot,
            blocks: end - *slot,
            target: DedupTarget::Hole,
        })
        .collect()
    }

    fn live(facts: &Facts, slots: Range<Slot>) -> BTreeSet<Slot> {
        facts.live_runs(slots).flat_map(range::each).collect()
    }

    proptest! {
        /// What is left over is what images reach and no run covers, in order.
        #[test]
        fn left_over_is_what_no_run_covers(
            text in pools(),
            cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 1..8),
        ) {
            let facts = Pool::of(&text).facts;
            for extent in &facts.extents {
                let runs = runs_in(&extent.slots(), &cuts);
                let covered: BTreeSet<Slot> = runs.iter().flat_map(|run| range::each(run.slots())).collect();
                let pieces = left_over(&facts, extent.slots(), &runs);
                prop_assert!(pieces.iter().all(|piece| !piece.is_empty()));
                let found: Vec<Slot> = pieces.into_iter().flat_map(range::each).collect();
                let expected = live(&facts, extent.slots());
                prop_assert_eq!(found, expected.difference(&covered).copied().collect::<Vec<_>>());
            }
        }

        /// A run is refuted if a pair of its blocks differs of which one is among those that were read.
        #[test]
        fn a_run_is_refuted_by_a_pair_that_differs(
            blocks in prop::collection::vec((0u8..3, any::<bool>()), 2..16),
            at in any::<[prop::sample::Index; 3]>(),
            is_hole: bool,
        ) {
            let mut facts = Facts::default();
            let proof = |content: u8| if content == 0 { crate::facts::proof_of(&[0; 4096]) } else { [content; 8] };
            facts.add_proofs(range::from(Slot(0)).zip(&blocks).map(|(slot, (content, _))| (slot, proof(*content))));
            let known: Vec<Slot> = range::from(Slot(0)).zip(&blocks).filter(|(_, (_, known))| *known).map(|(slot, _)| slot).collect();
            let [slot, home] = [at[0], at[1]].map(|at| at.index(blocks.len()));
            let slot_at = |at: usize| Slot(u32::try_from(at).unwrap());
            let length = 1 + at[2].index(blocks.len() - slot.max(home));
            let target = if is_hole { DedupTarget::Hole } else { DedupTarget::Home(slot_at(home)) };
            let run = DedupRun { slot: slot_at(slot), blocks: u32::try_from(length).unwrap(), target };
            let differs = |n: usize| {
                let (ours, theirs) = (blocks[slot + n], if is_hole { (0, false) } else { blocks[home + n] });
                ours.0 != theirs.0 && (ours.1 || theirs.1)
            };
            prop_assert_eq!(run.is_refuted(&facts, &known, |slot| slot), (0..length).any(differs));
        }

        /// Every block that an image reaches ends up in a hole, an extent that stays, or a donor that holds just it.
        #[test]
        fn every_live_block_ends_up_where_its_content_is(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            pool.prove_all();
            let plan = pool.plan(&options);
            let (facts, layout, content) = (&pool.facts, &plan.layout, &pool.content);
            for live in facts.live_runs(facts.all_slots()) {
                let mut at = live.start;
                for (piece, found) in layout.resolve_all(facts, live.clone()) {
                    prop_assert_eq!(piece.start, at);
                    prop_assert!(!piece.is_empty());
                    at = piece.end;
                    for (n, slot) in (0..).zip(range::each(piece.clone())) {
                        let end = match found {
                            BlockDestination::Hole => '0',
                            BlockDestination::Kept(first) => {
                                let covered = layout.runs.iter().any(|run| run.slots().contains(&(first + n)));
                                prop_assert!(!covered && (frees_blocks || !layout.is_gone(facts.extent_of(first + n))));
                                prop_assert_eq!(facts.extent_of(first + n), facts.extent_of(first));
                                content[(first + n).index()]
                            }
                            BlockDestination::Donor { extent, block } => {
                                let slots = layout.pieces_of(&layout.donors()[extent.index()]).iter().cloned().flat_map(range::each);
                                content[slots.collect::<Vec<_>>()[(block + n) as usize].index()]
                            }
                        };
                        prop_assert_eq!(end, content[slot.index()]);
                    }
                }
                prop_assert_eq!(at, live.end);
            }
        }

        /// Each block that is left over is in one donor once; donors are as long as their pieces, and no longer than they may be.
        #[test]
        fn donors_hold_what_is_left_over_once(text in pools(), options in options()) {
            let mut pool = Pool::of(&text);
            let plan = pool.plan(&options);
            let (facts, layout) = (&pool.facts, &plan.layout);
            let mut held: Vec<Slot> = Vec::new();
            for donor in layout.donors() {
                let pieces = layout.pieces_of(donor);
                let blocks: u32 = pieces.iter().map(range::length).sum();
                prop_assert_eq!(blocks, donor.blocks);
                prop_assert!((1..=extent_blocks_max(donor.class)).contains(&donor.blocks));
                prop_assert_eq!(donor.disk_bytes, bytes(donor.blocks));
                let references: u32 = pieces.iter().map(|piece| facts.references_over(piece.clone())).sum();
                prop_assert!(references <= options.references_max || pieces.len() == 1);
                for piece in pieces {
                    let from = &facts.extents[facts.extent_of(piece.start).index()];
                    prop_assert_eq!(from.donor_class(), donor.class);
                    prop_assert!(piece.end <= from.slots().end);
                }
                held.extend(pieces.iter().cloned().flat_map(range::each));
            }
            held.sort_unstable();
            let left_over: BTreeSet<Slot> = layout.gone().flat_map(|extent| layout.rest_of(facts, extent)).flat_map(range::each).collect();
            prop_assert_eq!(held, left_over.into_iter().collect::<Vec<_>>());
        }

        /// A batch takes what it may, unless one extent alone leaves more.
        #[test]
        fn batches_of_donors_fit(text in pools(), options in options()) {
            let mut pool = Pool::of(&text);
            let plan = pool.plan(&options);
            let layout = &plan.layout;
            let most = options.batch_bytes.min(options.work_space_bytes / 2);
            let last = layout.donors().last().map_or(0, |donor| donor.batch);
            for batch in 0..=last {
                let donors: Vec<&DonorExtent> = layout.donors().iter().filter(|donor| donor.batch == batch).collect();
                let taken: u64 = donors.iter().map(|donor| donor.disk_bytes).sum();
                let pieces = donors.iter().flat_map(|donor| layout.pieces_of(donor));
                let extents: BTreeSet<ExtentId> = pieces.map(|piece| pool.facts.extent_of(piece.start)).collect();
                prop_assert!(taken <= most || extents.len() == 1);
            }
        }

        /// Runs are in order, apart from each other, and each within one extent, which goes.
        #[test]
        fn runs_are_of_one_extent_each(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            let plan = pool.plan(&options);
            let layout = &plan.layout;
            prop_assert!(layout.runs.is_sorted_by(|one, other| one.slot + one.blocks <= other.slot));
            for run in &layout.runs {
                let extent = pool.facts.extent_of(run.slot);
                prop_assert!(layout.is_gone(extent));
                prop_assert_eq!(extent, pool.facts.extent_of(run.slot + run.blocks - 1));
                prop_assert!(layout.runs_of(&pool.facts, extent).contains(run));
            }
        }
    }

    /// A pool of which two extents go to one donor, as a plan would leave it: the first extent, at slots 16 to 23 of the pool there is, and
    /// from slot 8 on the donor. What the donor begins with is of the one that comes first in the images.
    fn planned(images: &str) -> (Pool, Layout, Origins) {
        let extents = "A abcdefgh\nB ijklmnop\nC abcdmnop";
        let mut pool = Pool::of(&format!("{extents}\n{images}\nthree C"));
        let mut layout = Layout::default();
        layout.compose(&pool.facts, &[ExtentId(0), ExtentId(1)], &[], None);
        layout.place_leftovers(&pool.facts, &PlanOptions::default());
        let applied = super::super::apply(&mut pool.facts, &layout);
        let origins = applied.undo(&mut pool.facts);
        (pool, layout, origins)
    }

    fn home(slot: u32, blocks: u32, home: u32) -> DedupRun {
        DedupRun {
            slot: Slot(slot),
            blocks,
            target: DedupTarget::Home(Slot(home)),
        }
    }

    #[test]
    fn decisions_on_a_planned_pool_become_decisions_on_the_one_there_is() {
        let (pool, mut layout, origins) = planned("one A\ntwo B");
        layout.compose(
            &pool.facts,
            &[ExtentId(0)],
            &[home(0, 4, 8), home(4, 4, 20)],
            Some(&origins),
        );
        assert_eq!(&layout.runs[..], [home(16, 4, 0), home(20, 4, 12)]);
        assert_eq!(layout.gone().collect::<Vec<_>>(), [0, 1, 2].map(ExtentId));
    }

    #[test]
    fn a_run_is_cut_where_its_home_was_put_together() {
        let (pool, mut layout, origins) = planned("one B\ntwo A");
        layout.compose(&pool.facts, &[ExtentId(0)], &[home(0, 8, 12)], Some(&origins));
        assert_eq!(&layout.runs[..], [home(16, 4, 12), home(20, 4, 0)]);
    }

    #[test]
    fn a_run_is_cut_where_its_extents_were_put_together() {
        // Of the donor that goes in turn, both parts; their slots follow each other in one pool as in the other.
        let (pool, mut layout, origins) = planned("one A\ntwo B");
        layout.compose(&pool.facts, &[ExtentId(1)], &[home(12, 8, 0)], Some(&origins));
        assert_eq!(&layout.runs[..], [home(4, 4, 16), home(8, 4, 20)]);
        // The same if they are apart.
        let (pool, mut layout, origins) = planned("one B\ntwo A");
        layout.compose(&pool.facts, &[ExtentId(1)], &[home(12, 8, 0)], Some(&origins));
        assert_eq!(&layout.runs[..], [home(0, 4, 20), home(12, 4, 16)]);
    }

    #[test]
    fn what_is_rewritten_alone_comes_first_in_the_order_of_images() {
        let mut pool = Pool::of(
            "
            A  abcd0000
            B  efgh
            C  ijkl
            one  C A
            two  B",
        );
        for extent in 1..3 {
            pool.facts.extents[extent].compression_goal = Some(CompressionGoal {
                compression: Compression::Zstd,
                share: CompressionGoal::WHOLE / 2,
                rewrites: true,
            });
        }
        let plan = pool.plan(&PlanOptions::default());
        assert_eq!(plan.layout.gone().collect::<Vec<_>>(), [2, 1, 0].map(ExtentId));
        let donors: Vec<_> = DonorFileId::numbered(&plan.donor_files)
            .map(|(file, _)| pool.donor(&plan, file))
            .collect();
        assert_eq!(donors, ["abcd", "ijklefgh"]);
        // What is compressed is expected to take half.
        let taken: Vec<u64> = plan.layout.donors().iter().map(|donor| donor.disk_bytes).collect();
        assert_eq!(taken, [bytes(4), bytes(4)]);
    }

    #[test]
    fn donors_of_compressed_extents_are_as_long_as_a_frame() {
        let live: String = ('1'..='9').chain('a'..='z').collect();
        let mut pool = Pool::of(&format!("A {live}{} zstd\none A[0..35]", "z".repeat(40)));
        let plan = pool.plan(&PlanOptions::default());
        assert_eq!(
            pool.donor(&plan, DonorFileId(0)),
            format!("{} {}", &live[..32], &live[32..])
        );
        let taken: u64 = plan.layout.donors().iter().map(|donor| donor.disk_bytes).sum();
        assert_eq!(taken, 38 * 4096 * 32 / 75 + 38 * 4096 * 3 / 75);
        // The image's one reference becomes one to each.
        assert_eq!(plan.eliminations[0].metadata_bytes, METADATA_BYTES_PER_REFERENCE);
    }
}
