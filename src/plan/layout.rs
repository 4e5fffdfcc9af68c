//! Where every block is to be: which extents go, where their blocks are found, and which donors take what is left over.

use std::collections::BTreeMap;
use std::ops::Range;

use super::Options;
use super::apply::Origins;
use crate::block::{Slot, SlotSet};
use crate::facts::{Class, Compression, Facts};
use crate::spill::{Budget, SpillVec};

/// Blocks of a compressed extent at most (kernel: `BTRFS_MAX_UNCOMPRESSED`, 128 KiB).
pub const COMPRESSED_BLOCKS_MAX: u32 = 32;

/// Where a run of blocks is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// In the slots from here on. They may move on in turn; [`Layout::resolve`] follows.
    Home(Slot),
    /// Nowhere: they are zeros.
    Hole,
}

/// Blocks of an extent that goes, and where they are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) slot: Slot,
    pub(super) blocks: u32,
    pub(super) target: Target,
}

impl Run {
    /// Whether what is known of some slots, in order, speaks against it. `origin` tells which slot of `facts` a slot is.
    pub(super) fn is_refuted(&self, facts: &Facts, known: &[Slot], origin: impl Fn(Slot) -> Slot) -> bool {
        let among = |from: Slot| {
            let first = known.partition_point(|slot| *slot < from);
            let inside = known[first..]
                .iter()
                .take_while(move |slot| **slot < from + self.blocks);
            inside.map(move |slot| slot - from)
        };
        let mut ours = among(self.slot);
        match self.target {
            Target::Hole => ours.any(|n| facts.proved_zero(origin(self.slot + n)) == Some(false)),
            Target::Home(home) => ours
                .chain(among(home))
                .any(|n| facts.proved_equal(origin(self.slot + n), origin(home + n)) == Some(false)),
        }
    }
}

/// Where blocks end up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Final {
    /// Where no data is.
    Hole,
    /// In an extent that stays, from this slot on.
    Kept(Slot),
    /// In a donor: which donor extent, and from which of its blocks on.
    Donor(u32, u32),
}

/// A donor's extent: written in one go, so that the filesystem allocates it as one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DonorExtent {
    /// Like the extents whose blocks it takes over.
    pub class: Class,
    /// The slots it takes over, as places in what [`Layout::pieces_of`] looks in.
    pieces: Range<u32>,
    /// Its blocks.
    pub blocks: u32,
    /// Bytes that it is expected to take on disk; the sum of blocks if it is not compressed.
    pub disk_bytes: u64,
    /// The batch it is written in.
    pub batch: u32,
}

/// Left over slots and where in the donors they go.
#[derive(Debug, Clone, Copy)]
struct Leftover {
    slot: Slot,
    blocks: u32,
    donor: u32,
    at: u32,
}

/// An extent that goes.
#[derive(Debug, Clone, Copy)]
struct Gone {
    extent: u32,
    /// Its blocks that were left over when that was decided. Batches go by this: what is found of them later must not move others to
    /// another batch, away from what they lie beside in their images.
    left_over: u32,
}

/// Where every block is to be.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    /// Extents that go, in the order in which that was decided.
    order: SpillVec<Gone>,
    /// Which those are.
    gone: SlotSet,
    /// What of them is found elsewhere, by slot.
    runs: SpillVec<Run>,
    leftovers: SpillVec<Leftover>,
    /// The same, donor by donor.
    pieces: SpillVec<Range<Slot>>,
    donors: SpillVec<DonorExtent>,
}

impl Layout {
    /// Where every block stays, with lists that are made from a budget.
    pub(super) fn new_in(budget: &Budget) -> Self {
        Self {
            order: SpillVec::new_in(budget),
            gone: SlotSet::default(),
            runs: SpillVec::new_in(budget),
            leftovers: SpillVec::new_in(budget),
            pieces: SpillVec::new_in(budget),
            donors: SpillVec::new_in(budget),
        }
    }

    /// The extents that go, in the order in which that was decided.
    pub fn gone(&self) -> impl ExactSizeIterator<Item = u32> {
        self.order.iter().map(|gone| gone.extent)
    }

    /// Whether an extent goes.
    pub fn is_gone(&self, extent: u32) -> bool {
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

    /// What stays where it is of an extent that goes: on a filesystem that frees blocks, all that no run covers.
    pub(super) fn stays_of(&self, facts: &Facts, extent: u32) -> Vec<Range<Slot>> {
        if facts.frees_blocks {
            self.rest_of(facts, extent)
        } else {
            Vec::new()
        }
    }

    /// The live slots of an extent that are found nowhere else.
    pub(super) fn rest_of(&self, facts: &Facts, extent: u32) -> Vec<Range<Slot>> {
        left_over(
            facts,
            facts.extents[extent as usize].slots(),
            self.runs_of(facts, extent),
        )
    }

    pub(super) fn runs_of(&self, facts: &Facts, extent: u32) -> &[Run] {
        let slots = facts.extents[extent as usize].slots();
        let from = self.runs.partition_point(|run| run.slot < slots.start);
        let count = self.runs[from..].partition_point(|run| run.slot < slots.end);
        &self.runs[from..from + count]
    }

    /// Whether what is known of some slots, in order, speaks against what is to be shared.
    pub(super) fn is_refuted(&self, facts: &Facts, known: &[Slot]) -> bool {
        self.runs.iter().any(|run| run.is_refuted(facts, known, |slot| slot))
    }

    /// Adds decisions that were made on the pool as this layout would leave it, and where the parts of that come from; none if it
    /// is the pool as it is.
    pub(super) fn compose(&mut self, facts: &Facts, gone: &[u32], runs: &[Run], origins: Option<&Origins>) {
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
                    Target::Home(home) => Target::Home(origin(home + n)),
                    Target::Hole => Target::Hole,
                };
                let first = target(done);
                let follows = |n: u32| {
                    origin(run.slot + done + n) == slot + n
                        && match (first, target(done + n)) {
                            (Target::Home(first), Target::Home(this)) => this == first + n,
                            _ => true,
                        }
                };
                let extent = facts.extent_of(slot);
                let room = (run.blocks - done).min(facts.extents[extent as usize].slots().end - slot);
                let blocks = (1..room).find(|n| !follows(*n)).unwrap_or(room);
                self.runs.push(Run {
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
            self.order.push(Gone { extent, left_over });
        }
    }

    /// Where extents are rewritten though nothing of them is found elsewhere, they come first, in the order of the images: they need
    /// nobody, and what needs them comes after them.
    fn order_for_donors(&mut self, facts: &Facts) {
        let extent = |place: u32| &facts.extents[place as usize];
        if !self.gone().any(|place| extent(place).is_recoded()) {
            return;
        }
        let order = std::mem::take(&mut self.order);
        let key = |place: u32| {
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

    /// Lays out the donors for what no run covers, batch by batch.
    pub(super) fn place_leftovers(&mut self, facts: &Facts, options: &Options) {
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
        for Gone { extent, left_over } in order.iter().copied() {
            let rest = self.rest_of(facts, extent);
            let share = facts.extents[extent as usize].donor_bytes(left_over);
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

    /// Lists what each donor's extent takes over.
    fn list_pieces(&mut self) {
        self.leftovers
            .sort_unstable_by_key(|leftover| (leftover.donor, leftover.at));
        self.pieces.clear();
        for of_donor in self.leftovers.chunk_by(|one, other| one.donor == other.donor) {
            let place = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
            let first = place(self.pieces.len());
            self.pieces
                .extend(of_donor.iter().map(|one| one.slot..one.slot + one.blocks));
            self.donors[of_donor[0].donor as usize].pieces = first..place(self.pieces.len());
        }
    }

    /// Lays out the donors of one batch, in the order in which images are read.
    fn place_batch(&mut self, facts: &Facts, options: &Options, batch: u32, mut pieces: Vec<(u32, Range<Slot>)>) {
        pieces.sort_by_cached_key(|(_, piece)| {
            let place = facts.place_of(piece.clone());
            place.map(|place| (place.image, place.file_block))
        });
        // The donor extent that is being filled, for each class, and the references it will have.
        let mut open: BTreeMap<Class, (u32, u32)> = BTreeMap::new();
        for (extent, piece) in pieces {
            let this = &facts.extents[extent as usize];
            let class = this.donor_class();
            let references = facts.references_over(piece.clone());
            if open
                .get(&class)
                .is_some_and(|(_, held)| held + references > options.references_max)
            {
                open.remove(&class);
            }
            let mut from = piece.start;
            while from < piece.end {
                let (donor, held) = open.entry(class).or_insert_with(|| {
                    let empty = DonorExtent {
                        class,
                        pieces: 0..0,
                        blocks: 0,
                        disk_bytes: 0,
                        batch,
                    };
                    self.donors.push(empty);
                    (u32::try_from(self.donors.len() - 1).unwrap_or(u32::MAX), 0)
                });
                *held += references;
                let donor = *donor;
                let filled = &mut self.donors[donor as usize];
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

    /// Where a range of live slots ends up: the beginning of it, and for how many blocks.
    pub fn resolve(&self, facts: &Facts, slots: Range<Slot>) -> (u32, Final) {
        let (mut slot, mut blocks) = (slots.start, slots.end - slots.start);
        // Each step leads to a slot that was a home when the step was decided and never becomes one again, so this ends.
        loop {
            let after = self.runs.partition_point(|run| run.slot <= slot);
            if let Some(run) = after
                .checked_sub(1)
                .map(|at| self.runs[at])
                .filter(|run| slot < run.slot + run.blocks)
            {
                blocks = blocks.min(run.slot + run.blocks - slot);
                match run.target {
                    Target::Hole => return (blocks, Final::Hole),
                    Target::Home(home) => slot = home + (slot - run.slot),
                }
                continue;
            }
            let extent = facts.extent_of(slot);
            let end = facts.extents[extent as usize].slots().end;
            if !self.is_gone(extent) {
                return (blocks.min(end - slot), Final::Kept(slot));
            }
            if facts.frees_blocks {
                let end = self.runs.get(after).map_or(end, |next| next.slot.min(end));
                return (blocks.min(end - slot), Final::Kept(slot));
            }
            let place = self.leftovers.partition_point(|leftover| leftover.slot <= slot);
            let leftover = self.leftovers[place - 1];
            debug_assert!(slot < leftover.slot + leftover.blocks, "every live slot has a place");
            blocks = blocks.min(leftover.slot + leftover.blocks - slot);
            return (
                blocks,
                Final::Donor(leftover.donor, leftover.at + (slot - leftover.slot)),
            );
        }
    }

    /// The same for a whole range, piece after piece.
    pub fn resolve_all<'a>(
        &'a self,
        facts: &'a Facts,
        slots: Range<Slot>,
    ) -> impl Iterator<Item = (Range<Slot>, Final)> + 'a {
        let mut at = slots.start;
        std::iter::from_fn(move || {
            (at < slots.end).then(|| {
                let (blocks, found) = self.resolve(facts, at..slots.end);
                let piece = at..at + blocks;
                at += blocks;
                (piece, found)
            })
        })
    }
}

/// Blocks of a donor's extent at most. Small enough that one image's deletion does not leave much behind.
pub(super) fn extent_blocks_max(class: Class) -> u32 {
    match class.compression {
        Compression::None => 4096,
        _ => COMPRESSED_BLOCKS_MAX,
    }
}

/// The live slots that no run covers.
pub(super) fn left_over(facts: &Facts, slots: Range<Slot>, runs: &[Run]) -> Vec<Range<Slot>> {
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
