//! One pass over all extents: it decides which stay, and where the blocks of the others are found. A *home* is a slot whose
//! content stays where it is for the rest of the pass.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::layout::{DedupRun, DedupTarget};
use super::table::BlockTable;
use super::{METADATA_BYTES_PER_REFERENCE, PlanOptions, UNPROVED_BLOCKS, UNPROVED_BLOCKS_ALIKE};
use crate::block::{BLOCK_BYTES, SlotSet, bytes};
use crate::facts::{Compression, Extent, Facts, PinReason};
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::range;
use crate::spill::{Budget, SpillVec};

/// What a pass decided.
#[derive(Debug)]
pub(super) struct Decisions {
    /// Extents that are to be eliminated, in the order in which that was decided.
    pub(super) gone: SpillVec<ExtentId>,
    /// Where their blocks are found. A live block that no run covers is left over.
    pub(super) runs: SpillVec<DedupRun>,
    pub(super) unproved: SpillVec<Slot>,
    pub(super) pinned: BTreeMap<PinReason, u64>,
}

impl Decisions {
    fn new_in(budget: &Budget) -> Self {
        Self {
            gone: SpillVec::new_in(budget),
            runs: SpillVec::new_in(budget),
            unproved: SpillVec::new_in(budget),
            pinned: BTreeMap::new(),
        }
    }
}

/// Runs of one repeated block are cut no shorter: a few blocks that a whole extent refers to thousands of times
/// would make every later look at them slow.
const REPEATED_RUN_BLOCKS: u32 = 32;

/// References to a place that count when a run is weighed, apart from the metadata that each takes. More of them are of
/// revisions, which users keep rather than run, so that fragments in them cost little.
const REFERENCES_COUNTED_MAX: u64 = 3;

/// The longest gap between two runs, in blocks, that is looked up once more.
const GAP_BLOCKS_MAX: u32 = 32;

/// Comparisons of two blocks that matching may take, for each block of an extent. Honest content takes far fewer. The limit is
/// for guests, who choose the checksums of their blocks and can make long stretches look alike that are no match.
const STEPS_PER_BLOCK: u64 = 1024;

/// Decides for every extent whether it is eliminated. If `ask` is true, runs may rest on blocks that were not read, and those
/// blocks are listed in [`Decisions::unproved`]. `rewritten_anyway` tells which extents are donors that exist only in the plan:
/// writing them differently costs nothing. `go_on` is called before each extent, and its error ends the pass.
pub(super) fn decide<E>(
    facts: &Facts,
    options: &PlanOptions,
    ask: bool,
    rewritten_anyway: impl Fn(ExtentId) -> bool,
    go_on: &dyn Fn() -> Result<(), E>,
) -> Result<Decisions, E> {
    // The order is made before the tables, since making it takes memory of its own.
    let order = order(facts, options);
    let mut pass = Pass::new(facts, options, ask);
    for extent in order {
        go_on()?;
        pass.look_at(extent, rewritten_anyway(extent));
    }
    Ok(pass.found)
}

/// The order in which extents are looked at: pinned extents first, then those that most images use on average, then image by
/// image in the order of their blocks. An extent that is looked at early is likely to stay. So one of several images that are
/// alike stays as it is, and the others refer to it in long runs; an order that mixes them would cut all of them into pieces.
/// Addresses do not count, since they differ between a plan and the pool that it leads to.
fn order(facts: &Facts, options: &PlanOptions) -> SpillVec<ExtentId> {
    /// An extent of which more than this share is unreachable, in 1/16, makes a bad home: it is likely to go.
    const UNREACHABLE_SIXTEENTHS: u32 = 1;
    /// So does an extent of fewer blocks than this: runs end where extents do.
    const SMALL_BLOCKS: u32 = 16;
    const USE_MAX: u64 = (1 << 29) - 1;
    let rank = |(place, extent): (ExtentId, &Extent)| {
        let live: u32 = facts.live_runs(extent.slots()).map(|run| range::length(&run)).sum();
        let unreachable = extent.blocks - live;
        let is_wasteful = u64::from(unreachable) * 16 > u64::from(extent.blocks * UNREACHABLE_SIXTEENTHS);
        let mappings = facts.mappings_to(place);
        let used: u64 = mappings
            .map(|(mapping, images)| u64::from(mapping.blocks) * images.len() as u64)
            .sum();
        // The average is rounded to halves: revisions differ by a few blocks, which must not separate extents that lie side by
        // side.
        let halves = (used * 2 / u64::from(live).max(1)).min(USE_MAX);
        let class = u64::from(is_pinned(facts, options, place).is_none()) << 31
            | u64::from(is_wasteful) << 30
            | u64::from(extent.blocks < SMALL_BLOCKS) << 29
            | (USE_MAX - halves);
        let first = facts.references_to(place).next();
        // The rank is packed into one number, which takes less memory than its parts.
        let image = class << 32 | u64::from(first.map_or(u32::MAX, |reference| reference.image.0));
        (image, first.map_or(0, |reference| reference.file_block), place)
    };
    let ranked = ExtentId::numbered(&facts.extents).map(rank);
    let mut order: SpillVec<_> = SpillVec::from_iter_in(ranked, facts.budget());
    order.sort_unstable();
    SpillVec::from_iter_in(order.into_iter().map(|(_, _, place)| place), facts.budget())
}

/// Why an extent must stay, if it must.
fn is_pinned(facts: &Facts, options: &PlanOptions, extent: ExtentId) -> Option<PinReason> {
    facts.extents[extent.index()].pinned.or_else(|| {
        let preallocated =
            options.keep_preallocated && facts.mappings_to(extent).any(|(mapping, _)| mapping.preallocated);
        preallocated.then_some(PinReason::Preallocated)
    })
}

struct Pass<'a> {
    facts: &'a Facts,
    options: &'a PlanOptions,
    /// Whether runs that must be proved count, and are listed, before they are.
    ask: bool,
    table: BlockTable<Slot>,
    /// Homes: live slots of extents that stay, and slots that are left over from extents that go.
    homes: SlotSet,
    /// Slots that are no homes, whatever extent they are in.
    partial: BTreeSet<Slot>,
    limits: ReferenceLimits,
    current: CurrentExtent,
    found: Decisions,
}

/// The extent that the pass is at.
#[derive(Default)]
struct CurrentExtent {
    first_slot: Slot,
    references: u32,
    /// A copy of its fingerprints: they are read many times, and may be on disk.
    fingerprints: Vec<u32>,
    /// Comparisons of two blocks that matching it may still take.
    steps_left: Cell<u64>,
}

/// How many references each extent and each image has, and may have.
struct ReferenceLimits {
    /// For each extent, its references as decided so far.
    extents: SpillVec<u32>,
    /// For other extents, the references that they would get from the current one.
    added: BTreeMap<ExtentId, u32>,
    images: Vec<ImageReferences>,
}

/// The number of references that an image has, and its limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct ImageReferences {
    /// The number after what was decided so far.
    now: u64,
    /// The number that the image may have at most.
    max: u64,
}

impl ReferenceLimits {
    fn new(facts: &Facts, options: &PlanOptions) -> Self {
        const GIB_BLOCKS: u64 = (1 << 30) / BLOCK_BYTES;
        let last = facts.mappings().iter().filter_map(|(_, images)| images.last()).max();
        let images = last.map_or(0, |last| last.index() + 1);
        let (mut images, mut blocks) = (vec![ImageReferences::default(); images], vec![0u64; images]);
        for reference in facts.references() {
            images[reference.image.index()].now += 1;
            blocks[reference.image.index()] += u64::from(reference.blocks);
        }
        for (image, blocks) in images.iter_mut().zip(blocks) {
            image.max = blocks
                .saturating_mul(u64::from(options.references_per_gib_max))
                .div_ceil(GIB_BLOCKS)
                .max(image.now);
        }
        let extents = ExtentId::numbered(&facts.extents).map(|(extent, _)| facts.reference_count(extent));
        Self {
            extents: SpillVec::from_iter_in(extents, facts.budget()),
            added: BTreeMap::new(),
            images,
        }
    }

    /// References that an extent would have if the current extent went, without those of the run under consideration.
    fn of_extent(&self, extent: ExtentId) -> u32 {
        self.extents[extent.index()] + self.added.get(&extent).copied().unwrap_or(0)
    }

    /// Whether each image may get so many more references.
    fn allow(&self, images: &BTreeMap<ImageId, i64>) -> bool {
        images.iter().all(|(image, more)| {
            let image = &self.images[image.index()];
            image.now.saturating_add_signed(*more) <= image.max
        })
    }

    /// Counts the references that the current extent adds for good, since it goes.
    fn accept(&mut self, images: &BTreeMap<ImageId, i64>) {
        for (extent, more) in &self.added {
            self.extents[extent.index()] += more;
        }
        for (image, more) in images {
            let references = &mut self.images[image.index()].now;
            *references = references.saturating_add_signed(*more);
        }
    }
}

/// Where the blocks of one extent are found.
struct ExtentMatch {
    runs: Vec<DedupRun>,
    left_over: u32,
    unproved: Vec<Slot>,
}

impl ExtentMatch {
    /// Blocks that are found in homes or are zeros.
    fn matched(&self) -> u32 {
        self.runs.iter().map(|run| run.blocks).sum()
    }
}

impl<'a> Pass<'a> {
    fn new(facts: &'a Facts, options: &'a PlanOptions, ask: bool) -> Self {
        let slots = facts.slots() as usize;
        Self {
            facts,
            options,
            ask,
            table: BlockTable::new(slots, facts.table_slots_max),
            homes: SlotSet::new(slots),
            partial: facts.partial_slots(),
            limits: ReferenceLimits::new(facts, options),
            current: CurrentExtent::default(),
            found: Decisions::new_in(facts.budget()),
        }
    }

    /// Makes an extent the current one.
    fn begin(&mut self, extent: ExtentId) -> &'a Extent {
        let this = &self.facts.extents[extent.index()];
        self.current = CurrentExtent {
            first_slot: this.first_slot,
            references: self.facts.reference_count(extent),
            fingerprints: self.facts.fingerprints.range(this.slots()),
            steps_left: Cell::new(STEPS_PER_BLOCK * u64::from(this.blocks)),
        };
        this
    }

    fn look_at(&mut self, extent: ExtentId, rewritten_anyway: bool) {
        let facts = self.facts;
        let pinned = is_pinned(facts, self.options, extent);
        let this = self.begin(extent);
        let mut found = self.match_extent(this);
        let mut more = self.new_references(extent, &found.runs);
        // An image near its limit of references may still have room for the long runs.
        let mut least = self.options.min_run_blocks;
        while pinned.is_none() && !found.runs.is_empty() && !self.limits.allow(&more) {
            least = least.saturating_mul(2);
            self.leave_short_runs(&mut found, least);
            more = self.new_references(extent, &found.runs);
        }
        let frees = this.disk_bytes.saturating_sub(this.donor_bytes(found.left_over));
        let new_references = u64::try_from(more.values().sum::<i64>()).unwrap_or(0);
        let goes =
            pinned.is_none() && self.pays(extent, new_references, &found, rewritten_anyway) && self.limits.allow(&more);
        if goes {
            self.limits.accept(&more);
            self.found.unproved.extend(found.unproved);
            self.found.gone.push(extent);
            self.found.runs.extend(found.runs);
            return;
        }
        if let Some(why) = pinned.filter(|_| frees > 0 && (!found.runs.is_empty() || this.pinned.is_none())) {
            *self.found.pinned.entry(why).or_default() += frees;
        }
        for run in facts.live_runs(this.slots()) {
            self.homes.insert_range(run.clone());
            self.partial.range(run).for_each(|slot| self.homes.remove(*slot));
        }
        // Blocks that are left over are in the table already.
        for run in &found.runs {
            range::each(run.slots()).for_each(|slot| self.enter(slot));
        }
        if pinned.is_none()
            && this.is_always_rewritten()
            && this.donor_bytes(this.blocks) <= self.options.work_space_bytes / 2
        {
            self.found.gone.push(extent);
        }
    }

    /// Enters a home into the table. Zeros are not entered: they become holes, or stay, and are shared only as part of a longer
    /// run.
    fn enter(&mut self, slot: Slot) {
        let (facts, fingerprint) = (self.facts, self.fingerprint(slot));
        if fingerprint != facts.zero_fingerprint {
            self.table
                .enter(slot, fingerprint, &facts.fingerprints, |slot| facts.machine_of(slot));
        }
    }

    fn fingerprint(&self, slot: Slot) -> u32 {
        let current = &self.current;
        let known = slot
            .checked_sub(current.first_slot)
            .and_then(|n| current.fingerprints.get(n as usize));
        known.copied().unwrap_or_else(|| self.facts.fingerprints.get(slot))
    }

    /// Whether the block at `slot` reads as zeros, as far as fingerprints tell.
    fn is_zero(&self, slot: Slot) -> bool {
        self.fingerprint(slot) == self.facts.zero_fingerprint
    }

    /// Whether two blocks may be equal: alike in fingerprint, and not known to differ.
    fn may_be_equal(&self, slot: Slot, home: Slot) -> bool {
        self.fingerprint(slot) == self.fingerprint(home) && self.facts.proved_equal(slot, home).unwrap_or(true)
    }

    /// Whether eliminating `extent` as `found` frees at least what it costs.
    fn pays(&self, extent: ExtentId, new_references: u64, found: &ExtentMatch, rewritten_anyway: bool) -> bool {
        let this = &self.facts.extents[extent.index()];
        let left_over = this.donor_bytes(found.left_over);
        let others = this.blocks - found.left_over;
        let frees = if rewritten_anyway {
            // A donor will be an ordinary extent after the run. What pays then must pay now, or a second run would find it.
            bytes(others)
        } else if this.is_always_rewritten() {
            // It is rewritten in any case, so only the bytes that need not be written count.
            this.donor_bytes(found.left_over + found.matched()) - left_over
        } else if this.class.compression == Compression::None {
            // What is left over may take less in a donor, but that does not count for sharing.
            this.disk_bytes - bytes(found.left_over)
        } else {
            // How many bytes its donor takes is known only once it was written. A plan must not depend on that, so half of the
            // blocks count.
            bytes(others) / 2
        };
        let rewritten_anyway = rewritten_anyway || this.is_always_rewritten();
        // Where the filesystem frees single blocks, the blocks that are left over stay where they are.
        let rewritten = if self.facts.frees_blocks { 0 } else { left_over };
        let rewriting = if rewritten_anyway {
            0
        } else {
            rewritten / 256 * self.options.rewrite_weight()
        };
        frees > 0
            && rewritten <= self.options.work_space_bytes / 2
            && frees >= rewriting + METADATA_BYTES_PER_REFERENCE * new_references
    }

    /// How many more references each image would have if an extent with these runs went; holes take no reference.
    fn new_references(&self, extent: ExtentId, runs: &[DedupRun]) -> BTreeMap<ImageId, i64> {
        let mut edges: Vec<Slot> = runs.iter().flat_map(|run| [run.slot, run.slot + run.blocks]).collect();
        edges.dedup();
        let holes = runs.iter().filter(|run| matches!(run.target, DedupTarget::Hole));
        let holes: Vec<Range<Slot>> = holes.map(DedupRun::slots).collect();
        let mappings = self.facts.mappings_to(extent);
        let mut more = BTreeMap::new();
        for (mapping, images) in mappings.filter(|(mapping, _)| !mapping.preallocated) {
            let inside = mapping.slots();
            let first = edges.partition_point(|edge| *edge <= inside.start);
            let last = edges.partition_point(|edge| *edge < inside.end);
            let first_hole = holes.partition_point(|hole| hole.end <= inside.start);
            let last_hole = holes.partition_point(|hole| hole.start < inside.end);
            let signed = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
            let each = signed(last.saturating_sub(first)) - signed(last_hole.saturating_sub(first_hole));
            for image in images {
                *more.entry(*image).or_default() += each;
            }
        }
        more
    }

    /// Finds the blocks of an extent in homes, earlier blocks of the same extent included. A block that is left over becomes a
    /// home at once.
    fn match_extent(&mut self, extent: &Extent) -> ExtentMatch {
        self.limits.added.clear();
        let mut found = ExtentMatch {
            runs: Vec::new(),
            left_over: 0,
            unproved: Vec::new(),
        };
        for segment in self.facts.live_runs(extent.slots()) {
            let mut at = segment.start;
            // Blocks from here to `at` are left over so far.
            let mut gap = at;
            while at < segment.end {
                let run = self
                    .zeros(at, &segment, gap)
                    .or_else(|| self.longest(extent, at, &segment, gap));
                if let Some(run) = run {
                    range::each(run.slot..at).for_each(|slot| self.homes.remove(slot));
                    found.left_over -= at - run.slot;
                    self.close_gap(extent, gap..run.slot, Some(&run), &mut found);
                    self.accept(run, &mut found);
                    at = run.slot + run.blocks;
                    gap = at;
                } else {
                    self.homes.insert(at);
                    self.enter(at);
                    found.left_over += 1;
                    at += 1;
                }
            }
            self.close_gap(extent, gap..at, None, &mut found);
        }
        found
    }

    fn accept(&mut self, run: DedupRun, found: &mut ExtentMatch) {
        if let DedupTarget::Home(home) = run.target {
            let added = self.limits.added.entry(self.facts.extent_of(home)).or_default();
            *added += self.facts.references_over(run.slots());
        }
        self.question(&run, &mut found.unproved);
        found.runs.push(run);
    }

    /// Gives up runs of fewer than `least` blocks, or of fewer than half of that if they are zeros, since a hole takes one
    /// reference less. Their blocks are left over.
    fn leave_short_runs(&mut self, found: &mut ExtentMatch, least: u32) {
        let is_long = |run: &DedupRun| match run.target {
            DedupTarget::Hole => run.blocks >= least / 2,
            DedupTarget::Home(_) => run.blocks >= least,
        };
        let (stay, short) = std::mem::take(&mut found.runs).into_iter().partition(is_long);
        found.runs = stay;
        for run in short {
            let slots = run.slots();
            if let DedupTarget::Home(home) = run.target
                && let Some(added) = self.limits.added.get_mut(&self.facts.extent_of(home))
            {
                *added = added.saturating_sub(self.facts.references_over(slots.clone()));
            }
            found.left_over += run.blocks;
            self.homes.insert_range(slots.clone());
            range::each(slots).for_each(|slot| self.enter(slot));
        }
    }

    /// Looks up once more a few blocks that are left over between runs. They need a reference of their own in any case, so that
    /// sharing all of them costs nothing, however few they are.
    fn close_gap(&mut self, extent: &Extent, gap: Range<Slot>, next: Option<&DedupRun>, found: &mut ExtentMatch) {
        let blocks = gap.end - gap.start;
        let is_used = |run: &DedupRun| matches!(run.target, DedupTarget::Home(home) if home < gap.end && gap.start < home + run.blocks);
        if blocks == 0 || blocks > GAP_BLOCKS_MAX || next.is_some_and(is_used) {
            return;
        }
        range::each(gap.clone()).for_each(|slot| self.homes.remove(slot));
        let run = self
            .zeros(gap.start, &gap, gap.start)
            .or_else(|| self.longest(extent, gap.start, &gap, gap.start));
        if let Some(run) = run.filter(|run| run.blocks == blocks) {
            found.left_over -= blocks;
            self.accept(run, found);
        } else {
            self.homes.insert_range(gap);
        }
    }

    /// The run of zeros that begins at `at`, if it is worth a hole. Blocks from `gap` to `at` are left over so far.
    fn zeros(&self, at: Slot, segment: &Range<Slot>, gap: Slot) -> Option<DedupRun> {
        if self.options.keep_zeros || !self.is_zero(at) {
            return None;
        }
        let end = range::each(at..segment.end)
            .find(|slot| !self.is_zero(*slot))
            .unwrap_or(segment.end);
        let run = DedupRun {
            slot: at,
            blocks: end - at,
            target: DedupTarget::Hole,
        };
        (self.is_long_enough(&run, segment, gap, false) && self.may_count(&run)).then_some(run)
    }

    /// The longest run around `at` that is found in homes, if it is worth its references. It may begin before `at`, in blocks
    /// from `gap` on that are left over so far: those may be outside the table's sample.
    fn longest(&self, extent: &Extent, at: Slot, segment: &Range<Slot>, gap: Slot) -> Option<DedupRun> {
        let facts = self.facts;
        let fingerprint = self.fingerprint(at);
        // An upper bound for the references over one block, which take longer to count.
        let all = self.current.references;
        let mut best: Option<DedupRun> = None;
        for home in self.table.candidates(fingerprint, &facts.fingerprints) {
            if self.current.steps_left.get() == 0 {
                break;
            }
            if !self.homes.contains(home) || home == at {
                continue;
            }
            let number = facts.extent_of(home);
            let other = &facts.extents[number.index()];
            if !other.class.shares_with(extent.class) {
                continue;
            }
            // A run that is found within its own extent adds no references to it.
            if other.first_slot != extent.first_slot
                && self.limits.of_extent(number) + all > self.options.references_max
                && self.limits.of_extent(number) + facts.references_over(at..at + 1) > self.options.references_max
            {
                continue;
            }
            let blocks_max = (segment.end - at).min(other.slots().end - home);
            let blocks = (0..blocks_max)
                .take_while(|n| self.homes.contains(home + *n) && self.may_be_equal(at + *n, home + *n))
                .count();
            let mut blocks = u32::try_from(blocks).unwrap_or(blocks_max);
            let before = (at - gap).min(home - other.first_slot);
            let back =
                (1..=before).take_while(|n| self.homes.contains(home - *n) && self.may_be_equal(at - *n, home - *n));
            let mut back = u32::try_from(back.count()).unwrap_or(0);
            let steps = self.current.steps_left.get();
            self.current
                .steps_left
                .set(steps.saturating_sub(u64::from(blocks + back)));
            // Blocks that the run covers are homes no longer than until it is accepted, so the run must not be found in them.
            if home - back < at && at - back < home + blocks {
                back = 0;
            }
            blocks += back;
            let run = DedupRun {
                slot: at - back,
                blocks,
                target: DedupTarget::Home(home - back),
            };
            if blocks > best.map_or(0, |best| best.blocks)
                && self.is_long_enough(&run, segment, gap, self.is_repeated(&run, segment))
                && self.may_count(&run)
            {
                best = Some(run);
            }
        }
        best
    }

    /// Whether a run is part of a repetition of one block. A run that ends with its segment is judged by what lies beside its
    /// home: otherwise donors would end at other places within a repetition from one plan to the next.
    fn is_repeated(&self, run: &DedupRun, segment: &Range<Slot>) -> bool {
        let around =
            run.slot.previous().unwrap_or_default().max(segment.start)..(run.slot + run.blocks + 1).min(segment.end);
        let fingerprint = |slot| self.fingerprint(slot);
        let first = fingerprint(run.slot);
        let is_first = |slot: &Slot| slot.0 < self.facts.slots() && fingerprint(*slot) == first;
        let goes_on = || match run.target {
            DedupTarget::Home(home) if run.slot == segment.start || run.slot + run.blocks == segment.end => {
                // Either side counts: the run may be the beginning or the end of a repetition.
                home.previous().iter().chain(&Some(home + run.blocks)).any(is_first)
            }
            _ => false,
        };
        range::each(run.slots()).all(|slot| is_first(&slot))
            && (range::each(around).filter(is_first).take(2).count() > 1 || goes_on())
    }

    /// Whether a run is worth the references that it adds: two, or one where it follows another, a hole one less, and that for each
    /// reference to the place. All there is adds none. At an end of its extent it would add less, too, but where donors end changes
    /// with all that goes before: what such an end makes worth while, the next round would find at another, and so on.
    fn is_long_enough(&self, run: &DedupRun, segment: &Range<Slot>, gap: Slot, repeated: bool) -> bool {
        if run.blocks == range::length(segment) {
            return true;
        }
        if repeated && run.blocks < self.options.min_run_blocks.max(REPEATED_RUN_BLOCKS) {
            return false;
        }
        let slots = run.slots();
        let follows_a_run = slots.start == gap && gap > segment.start;
        let ends: u64 = if follows_a_run { 1 } else { 2 };
        let new = match run.target {
            DedupTarget::Home(_) => ends,
            DedupTarget::Hole => ends - 1,
        };
        if new == 0 {
            return true;
        }
        let each = bytes(run.blocks) / new;
        let mut most = each / METADATA_BYTES_PER_REFERENCE;
        let weight = self.options.bytes_per_reference();
        if each < weight * REFERENCES_COUNTED_MAX {
            most = most.min(each / weight);
        }
        let most = usize::try_from(most).unwrap_or(usize::MAX);
        // The references over the run are counted only if those of the whole extent do not decide: counting takes time where
        // there are many.
        self.current.references as usize <= most || !self.facts.has_references_over(slots, most + 1)
    }

    /// Whether a run is proved as far as it must be, or may count until it is.
    fn may_count(&self, run: &DedupRun) -> bool {
        self.must_be_proved(run).all(|n| {
            let known = match run.target {
                DedupTarget::Home(home) => self.facts.proved_equal(run.slot + n, home + n),
                DedupTarget::Hole => self.facts.proved_zero(run.slot + n),
            };
            known.unwrap_or(self.ask)
        })
    }

    /// The blocks of a run that must be proved: all of a short one, and one of a long one that is found in other data. Checksums prove
    /// long runs unless someone forged them, and then not those of every block: whoever is matched with a forgery is to be matched with
    /// something else instead. Zeros are nobody else's.
    fn must_be_proved(&self, run: &DedupRun) -> Range<u32> {
        match run.target {
            _ if run.blocks <= UNPROVED_BLOCKS => 0..run.blocks,
            DedupTarget::Hole => 0..0,
            DedupTarget::Home(_) if run.blocks <= UNPROVED_BLOCKS_ALIKE && self.has_blocks_alike(run) => 0..run.blocks,
            DedupTarget::Home(_) => {
                // Which block it is follows from the run, so that the next round asks for the same one.
                let n = run.slot.0.wrapping_mul(0x9e37_79b9) % run.blocks;
                n..n + 1
            }
        }
    }

    /// Whether two blocks of a short run have the same fingerprint.
    fn has_blocks_alike(&self, run: &DedupRun) -> bool {
        let mut fingerprints: Vec<u32> = range::each(run.slots()).map(|slot| self.fingerprint(slot)).collect();
        fingerprints.sort_unstable();
        fingerprints.windows(2).any(|pair| pair[0] == pair[1])
    }

    /// Lists the slots that must be read before a run counts: some of its blocks, and all candidates that look like them, since
    /// another candidate may be the equal one.
    fn question(&self, run: &DedupRun, unproved: &mut Vec<Slot>) {
        let fingerprints = &self.facts.fingerprints;
        for n in self.must_be_proved(run) {
            let slot = run.slot + n;
            let alike = self.table.candidates(self.fingerprint(slot), fingerprints);
            let home = match run.target {
                DedupTarget::Home(home) => Some(home + n),
                DedupTarget::Hole => None,
            };
            let slots = alike.filter(|_| home.is_some()).chain(home).chain([slot]);
            unproved.extend(slots.filter(|slot| !self.facts.proofs.contains_key(slot)));
        }
    }
}

/// Counts of the blocks that runs share, by what the blocks become.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct MatchedBlocks {
    /// Blocks that become holes.
    pub(super) zeros: u32,
    /// Blocks that become references to their homes.
    pub(super) duplicates: u32,
}

impl MatchedBlocks {
    pub(super) fn of(runs: &[DedupRun]) -> Self {
        let mut matched = Self::default();
        for run in runs {
            match run.target {
                DedupTarget::Hole => matched.zeros += run.blocks,
                DedupTarget::Home(_) => matched.duplicates += run.blocks,
            }
        }
        matched
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::tests::notation::{Pool, options, pools};
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::convert::Infallible;

    fn decided(facts: &Facts, options: &PlanOptions, ask: bool) -> Decisions {
        let Ok(decisions) = decide(facts, options, ask, |_| false, &|| Ok::<_, Infallible>(()));
        decisions
    }

    fn slots_of(runs: &[DedupRun]) -> Vec<Slot> {
        runs.iter().flat_map(|run| range::each(run.slots())).collect()
    }

    fn home(slot: u32, blocks: u32, home: u32) -> DedupRun {
        DedupRun {
            slot: Slot(slot),
            blocks,
            target: DedupTarget::Home(Slot(home)),
        }
    }

    fn hole(slot: u32, blocks: u32) -> DedupRun {
        DedupRun {
            slot: Slot(slot),
            blocks,
            target: DedupTarget::Hole,
        }
    }

    /// A pool of which `images` images map the first extent, and one the second.
    fn revisions(images: usize, extents: &str) -> Pool {
        let revisions = "revision A\n".repeat(images);
        Pool::of(&format!("{extents}\n{revisions}other B"))
    }

    /// What is written in one pass about the extents of a pool.
    #[derive(Debug, PartialEq, Eq)]
    struct Named {
        gone: BTreeSet<String>,
        pinned: BTreeMap<PinReason, u64>,
    }

    proptest! {
        /// What goes is found in blocks that are equal, may be shared, and stay where they are; each block is found once.
        #[test]
        fn what_goes_is_found_in_what_stays(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            pool.prove_all();
            let facts = &pool.facts;
            let decisions = decided(facts, &options, true);
            prop_assert!(decisions.unproved.is_empty());
            let gone: BTreeSet<ExtentId> = decisions.gone.iter().copied().collect();
            prop_assert_eq!(gone.len(), decisions.gone.len());
            prop_assert!(gone.iter().all(|extent| is_pinned(facts, &options, *extent).is_none()));
            let moved = slots_of(&decisions.runs);
            let covered: BTreeSet<Slot> = moved.iter().copied().collect();
            prop_assert_eq!(covered.len(), moved.len());
            for run in &decisions.runs {
                let extent = facts.extent_of(run.slot);
                prop_assert!(gone.contains(&extent) && run.blocks > 0);
                for n in 0..run.blocks {
                    prop_assert_eq!(facts.live_runs(run.slot + n..run.slot + n + 1).count(), 1);
                    let content = pool.content[(run.slot + n).index()];
                    match run.target {
                        DedupTarget::Hole => prop_assert!(content == '0' && !options.keep_zeros),
                        DedupTarget::Home(home) => {
                            prop_assert_eq!(content, pool.content[(home + n).index()]);
                            prop_assert!(!covered.contains(&(home + n)));
                            prop_assert_eq!(facts.live_runs(home + n..home + n + 1).count(), 1);
                            let other = facts.extent_of(home + n);
                            prop_assert!(facts.extents[other.index()].class.shares_with(facts.extents[extent.index()].class));
                        }
                    }
                }
            }
        }

        /// What is decided does not depend on where extents lie.
        #[test]
        fn addresses_decide_nothing(text in pools(), options in options()) {
            let lines: Vec<&str> = text.lines().collect();
            let (extents, images): (Vec<&str>, Vec<&str>) = lines.iter().partition(|line| line.starts_with(|c: char| c.is_ascii_uppercase()));
            let last = u8::try_from(extents.len()).unwrap() - 1;
            // Whether a repetition goes on is seen at what lies beside its home, even if that is another extent.
            let ends = |line: &str| {
                let content = line.split_whitespace().nth(1).unwrap().to_ascii_lowercase();
                (content.chars().next(), content.chars().last())
            };
            let goes_on = |pair: &[&str]| ends(pair[0]).1 == ends(pair[1]).0 || ends(pair[1]).1 == ends(pair[0]).0;
            prop_assume!(!extents.windows(2).any(goes_on));
            let other_name = |c: char| char::from(b'A' + last - (c as u8 - b'A'));
            // The same extents with the last address first, and images that map them by their other names.
            let mirrored = extents.iter().rev().map(|line| format!("{}{}", other_name(line.chars().next().unwrap()), &line[1..]));
            let renamed = images.iter().map(|line| {
                let (name, pieces) = line.split_once(' ').unwrap();
                format!("{name} {}", pieces.chars().map(|c| if c.is_ascii_uppercase() { other_name(c) } else { c }).collect::<String>())
            });
            let mirrored = mirrored.chain(renamed).collect::<Vec<_>>().join("\n");
            let decide = |text: &str, is_mirrored: bool| {
                let mut pool = Pool::of(text);
                pool.prove_all();
                // What nobody refers to has no place in any order but its own.
                let referred = |extent: &ExtentId| pool.facts.reference_count(*extent) > 0;
                let name = |extent: ExtentId| if is_mirrored { u32::from(last) - extent.0 } else { extent.0 }.to_string();
                let decisions = decided(&pool.facts, &options, true);
                let gone = decisions.gone.iter().copied().filter(referred).map(name).collect();
                Named { gone, pinned: decisions.pinned }
            };
            prop_assert_eq!(decide(&text, false), decide(&mirrored, true));
        }

        /// Unless it may ask, a pass counts on nothing that it would have to ask about; if it may, it lists all of it.
        #[test]
        fn what_is_not_proved_counts_only_while_it_is_asked_about(text in pools(), options in options()) {
            let pool = Pool::of(&text);
            let silent = decided(&pool.facts, &options, false);
            prop_assert!(silent.unproved.is_empty());
            for run in &silent.runs {
                prop_assert!(run.target == DedupTarget::Hole && run.blocks > UNPROVED_BLOCKS);
            }
            let asking = decided(&pool.facts, &options, true);
            let pass = Pass::new(&pool.facts, &options, true);
            let unproved: BTreeSet<Slot> = asking.unproved.iter().copied().collect();
            for run in &asking.runs {
                for n in pass.must_be_proved(run) {
                    prop_assert!(unproved.contains(&(run.slot + n)));
                    if let DedupTarget::Home(home) = run.target {
                        prop_assert!(unproved.contains(&(home + n)));
                    }
                }
            }
        }

        /// Every live block of an extent is either found or left over, and a home just if it is left over; also after short runs are left.
        #[test]
        fn what_is_not_found_is_left_over_and_a_home(text in pools(), options in options(), least in 2u32..12) {
            let mut pool = Pool::of(&text);
            pool.prove_all();
            let mut pass = Pass::new(&pool.facts, &options, true);
            for place in 0..u32::try_from(pool.facts.extents.len()).unwrap() {
                let extent = pass.begin(ExtentId(place));
                let live: BTreeSet<Slot> = pool.facts.live_runs(extent.slots()).flat_map(range::each).collect();
                let mut found = pass.match_extent(extent);
                for least in [None, Some(least)] {
                    if let Some(least) = least {
                        pass.leave_short_runs(&mut found, least);
                        let is_long = |run: &DedupRun| run.blocks >= if run.target == DedupTarget::Hole { least / 2 } else { least };
                        prop_assert!(found.runs.iter().all(is_long));
                    }
                    prop_assert_eq!((found.matched() + found.left_over) as usize, live.len());
                    let covered: BTreeSet<Slot> = slots_of(&found.runs).into_iter().collect();
                    let homes: BTreeSet<Slot> = pass.homes.runs(extent.slots()).flat_map(range::each).collect();
                    prop_assert_eq!(&homes, &live.difference(&covered).copied().collect());
                    // Of each extent that runs are found in, the references that these would add.
                    let mut added = BTreeMap::new();
                    for run in &found.runs {
                        if let DedupTarget::Home(home) = run.target {
                            *added.entry(pool.facts.extent_of(home)).or_default() += pool.facts.references_over(run.slots());
                        }
                    }
                    pass.limits.added.retain(|_, more| *more > 0);
                    prop_assert_eq!(&pass.limits.added, &added);
                }
            }
        }

        /// References are counted piece by piece: each run takes one in each image that maps some of it, what is between runs too, and
        /// holes none.
        #[test]
        fn new_references_are_the_pieces_that_are_left(text in pools(), cuts in prop::collection::vec((1u32..6, 0u8..3), 1..12)) {
            let pool = Pool::of(&text);
            let options = PlanOptions::default();
            let pass = Pass::new(&pool.facts, &options, true);
            for (place, extent) in (0..).zip(&pool.facts.extents) {
                // What becomes of each block (0 for holes, 1 for homes, 2 if it is left over), and whether a piece begins with it: what is
                // found in homes side by side are two pieces, everything else one.
                let mut each: Vec<(u8, bool)> = Vec::new();
                for (blocks, kind) in &cuts {
                    let begins = *kind == 1 || each.last().is_none_or(|(before, _)| before != kind);
                    each.push((*kind, begins));
                    each.resize(each.len() + *blocks as usize - 1, (*kind, false));
                }
                let begins = each.last().is_none_or(|(before, _)| *before != 2);
                each.push((2, begins));
                each.resize(extent.blocks as usize, (2, false));
                let mut runs: Vec<DedupRun> = Vec::new();
                for (slot, (kind, begins)) in range::each(extent.slots()).zip(&each) {
                    match (kind, begins) {
                        (0, true) => runs.push(hole(slot.0, 1)),
                        (1, true) => runs.push(home(slot.0, 1, 0)),
                        (0 | 1, false) => runs.last_mut().unwrap().blocks += 1,
                        _ => {}
                    }
                }
                let mut expected: BTreeMap<ImageId, i64> = BTreeMap::new();
                for reference in pool.facts.references_to(ExtentId(place)).filter(|one| !one.preallocated) {
                    let first = (reference.slot - extent.first_slot) as usize;
                    let inside = each[first..first + reference.blocks as usize].iter().enumerate();
                    let pieces = inside.filter(|(n, (kind, begins))| *kind != 0 && (*n == 0 || *begins)).count();
                    *expected.entry(reference.image).or_default() += i64::try_from(pieces).unwrap() - 1;
                }
                prop_assert_eq!(pass.new_references(ExtentId(place), &runs), expected);
            }
        }
    }

    #[test]
    fn extents_that_stay_anyhow_and_those_that_most_use_come_first() {
        let order_of = |text: &str| -> String {
            let pool = Pool::of(text);
            let order = order(&pool.facts, &PlanOptions::default()).into_iter();
            order
                .map(|extent| char::from(b'A' + u8::try_from(extent.0).unwrap()))
                .collect()
        };
        let long = |extra: &str| format!("{}{extra}", "abcdefghijklmnopqrst");
        let text = |extents: [String; 4], images: &str| {
            let lines = extents
                .iter()
                .zip('A'..)
                .map(|(extent, name)| format!("{name} {extent}\n"));
            format!("{}{images}", lines.collect::<String>())
        };
        let plain = || [long(""), long(""), long(""), long("")];
        // As the first image maps them, whatever their addresses are.
        assert_eq!(order_of(&text(plain(), "one D B\ntwo A C")), "DBAC");
        // What two images use, and what is held, whoever maps it.
        assert_eq!(order_of(&text(plain(), "one D B\ntwo A C A")), "ADBC");
        assert_eq!(order_of(&text(plain(), "one D B\ntwo A C\nthree C[3..20]")), "CDBA");
        let held = [long(""), long(""), long(" held"), long("")];
        assert_eq!(order_of(&text(held, "one D B D\ntwo A C")), "CDBA");
        // Small ones are not built upon, and those of which much is unreachable neither.
        let small = [long(""), "abc".to_owned(), long(""), long("")];
        assert_eq!(order_of(&text(small, "one D B\ntwo A C")), "DACB");
        assert_eq!(order_of(&text(plain(), "one D[0..18] B\ntwo A[1..20] C")), "BACD");
    }

    #[test]
    fn images_that_are_beyond_their_limit_keep_what_they_have() {
        // Eight blocks in one reference, and eight in four.
        let pool = Pool::of(
            "
            A  abcdefgh
            one  A
            two  A[0..2] A[4..6] A[2..4] A[0..2]",
        );
        let limits = |references_per_gib_max: u32| {
            let options = PlanOptions {
                references_per_gib_max,
                ..PlanOptions::default()
            };
            ReferenceLimits::new(&pool.facts, &options)
        };
        let per_gib = |references: u32| references * (1 << 18) / 8;
        let limited = limits(per_gib(3));
        assert_eq!(
            limited.images,
            [(1, 3), (4, 4)].map(|(now, max)| ImageReferences { now, max })
        );
        let allowed = |image: ImageId, more: i64| limited.allow(&BTreeMap::from([(image, more)]));
        assert_eq!([allowed(ImageId(0), 2), allowed(ImageId(0), 3)], [true, false]);
        assert_eq!(
            [allowed(ImageId(1), 0), allowed(ImageId(1), 1), allowed(ImageId(1), -1)],
            [true, false, true]
        );
        // Part of a reference is one.
        assert_eq!(limits(per_gib(3) + 1).images[0].max, 4);
        assert_eq!(limits(u32::MAX).images[0].max, u64::from(u32::MAX / (1 << 15)) + 1);
    }

    #[test]
    fn what_an_extent_would_add_counts_until_the_next_and_for_good_if_it_goes() {
        let pool = Pool::of("A abcd\nB abcd\none A B");
        let mut limits = ReferenceLimits::new(&pool.facts, &PlanOptions::default());
        limits.added.insert(ExtentId(0), 3);
        assert_eq!([limits.of_extent(ExtentId(0)), limits.of_extent(ExtentId(1))], [4, 1]);
        limits.accept(&BTreeMap::from([(ImageId(0), -1)]));
        limits.added.clear();
        assert_eq!([limits.of_extent(ExtentId(0)), limits.of_extent(ExtentId(1))], [4, 1]);
        assert_eq!(limits.images[0].now, 1);
    }

    #[test]
    fn a_run_is_as_long_as_the_references_that_it_adds_are_worth() {
        /// The shortest run from `from` on that counts.
        fn shortest(images: usize, run: impl Fn(u32) -> DedupRun, gap: u32, repeated: bool) -> u32 {
            let content: String = ('1'..='9').chain('a'..='z').chain('1'..='9').collect();
            let pool = revisions(images, &format!("A {content}\nB a"));
            let options = PlanOptions::default();
            let mut pass = Pass::new(&pool.facts, &options, true);
            let segment = pass.begin(ExtentId(0)).slots();
            let counts = |blocks: &u32| pass.is_long_enough(&run(*blocks), &segment, Slot(gap), repeated);
            (1..=35).find(counts).unwrap_or(u32::MAX)
        }
        // Amid other data, half of the least for one reference, all for two, half as much again for three and more.
        assert_eq!(
            [1, 2, 3, 4].map(|images| shortest(images, |n| home(4, n, 44), 2, false)),
            [1, 2, 3, 3]
        );
        // Each reference's metadata is to be worth it, too: sixteen a block for one, and half of that here for two.
        assert_eq!(shortest(24, |n| home(4, n, 44), 2, false), 3);
        assert_eq!(shortest(25, |n| home(4, n, 44), 2, false), 4);
        // Behind another run, half of that.
        assert_eq!(
            [2, 4].map(|images| shortest(images, |n| home(4, n, 44), 4, false)),
            [1, 2]
        );
        // Holes take none of their own: half of it amid other data, and behind a run all there is.
        assert_eq!([2, 4].map(|images| shortest(images, |n| hole(4, n), 2, false)), [1, 2]);
        assert_eq!(shortest(100, |n| hole(4, n), 4, false), 1);
        // A repetition of one block is cut no shorter than this.
        assert_eq!(shortest(1, |n| home(4, n, 44), 2, true), REPEATED_RUN_BLOCKS);
    }

    #[test]
    fn all_there_is_adds_no_reference() {
        let pool = revisions(100, "A ab\nB ab");
        let options = PlanOptions {
            min_run_blocks: 8,
            ..PlanOptions::default()
        };
        let mut pass = Pass::new(&pool.facts, &options, true);
        let segment = pass.begin(ExtentId(0)).slots();
        assert!(pass.is_long_enough(&home(0, 2, 2), &segment, Slot(0), true));
        assert!(!pass.is_long_enough(&home(0, 1, 2), &segment, Slot(0), false));
    }

    #[test]
    fn references_beside_a_run_do_not_count() {
        let pool = Pool::of("A abcdefghijklmnop\nB ab\none A\ntwo A\nthree A[4..16]\nfour B");
        let options = PlanOptions::default();
        let mut pass = Pass::new(&pool.facts, &options, true);
        let segment = pass.begin(ExtentId(0)).slots();
        let counts = |slot| pass.is_long_enough(&home(slot, 2, 16), &segment, Slot(0), false);
        // Two map the place, three the extent.
        assert_eq!([counts(1), counts(3), counts(8)], [true, false, false]);
    }

    #[test]
    fn short_runs_are_proved_and_of_long_ones_a_block() {
        let pool = Pool::of(&format!("A {0}\nB {0}\none A\ntwo B", "abcdefghijklmnopqrstaaaa0000"));
        let options = PlanOptions::default();
        let pass = Pass::new(&pool.facts, &options, true);
        let proved = |run: DedupRun| pass.must_be_proved(&run);
        assert_eq!([proved(home(28, 1, 0)), proved(home(28, 2, 0))], [0..1, 0..2]);
        for blocks in [3, 16, 17, 20] {
            let one = proved(home(28, blocks, 0));
            assert_eq!((one.len(), one.end <= blocks), (1, true));
        }
        // Up to a length, runs with two blocks alike are as suspect as short ones.
        assert_eq!(proved(home(47, UNPROVED_BLOCKS_ALIKE.min(4), 19)).len(), 4);
        assert_eq!(proved(home(36, 16, 8)).len(), 16);
        assert_eq!(proved(home(35, 17, 7)).len(), 1);
        // Zeros need no other block.
        assert_eq!([proved(hole(52, 2)), proved(hole(52, 3))], [0..2, 0..0]);
    }

    #[test]
    fn a_repetition_is_known_by_what_is_around_it() {
        let pool = Pool::of("A xaaay\nB aaaz\nC bca\nD cac\none A B C D");
        let options = PlanOptions::default();
        let mut pass = Pass::new(&pool.facts, &options, true);
        let mut is_repeated = |extent: ExtentId, run: DedupRun| {
            let segment = pass.begin(extent).slots();
            pass.is_repeated(&run, &segment)
        };
        assert!(is_repeated(ExtentId(0), home(1, 3, 5)), "it is one");
        assert!(is_repeated(ExtentId(0), home(2, 1, 5)), "it is amid one");
        assert!(!is_repeated(ExtentId(0), home(0, 2, 5)), "it has two contents");
        assert!(!is_repeated(ExtentId(0), home(4, 1, 8)), "it is one block");
        // One block at the end of its extent is like what goes on at its home.
        assert!(is_repeated(ExtentId(1), home(5, 3, 1)));
        assert!(is_repeated(ExtentId(2), home(11, 1, 1)));
        assert!(
            !is_repeated(ExtentId(2), home(11, 1, 13)),
            "its home has other neighbours"
        );
    }

    #[test]
    fn looking_ends_when_its_steps_are_used_up() {
        let pool = Pool::of("A abcdefgh\nB abcdefgh\none A\ntwo B");
        let options = PlanOptions::default();
        let mut pass = Pass::new(&pool.facts, &options, true);
        pass.look_at(ExtentId(0), false);
        let extent = pass.begin(ExtentId(1));
        assert_eq!(pass.current.steps_left.get(), 8 * STEPS_PER_BLOCK);
        let segment = extent.slots();
        let longest = |pass: &Pass<'_>| pass.longest(extent, Slot(8), &segment, Slot(8));
        assert_eq!(longest(&pass), Some(home(8, 8, 0)));
        assert_eq!(pass.current.steps_left.get(), 8 * STEPS_PER_BLOCK - 8);
        pass.current.steps_left.set(0);
        assert_eq!(longest(&pass), None);
    }

    /// The kernel shares the last, partial block of a file only with the last block of another.
    #[test]
    fn a_partial_block_is_no_home() {
        let mut pool = Pool::of("A abcdefgh\nB abcdefgh\none A\ntwo B");
        pool.facts.extents[0].pinned = Some(PinReason::UnalignedTail);
        pool.facts.partial_blocks = [(ImageId(0), 7)].into();
        let options = PlanOptions::default();
        let mut pass = Pass::new(&pool.facts, &options, true);
        pass.look_at(ExtentId(0), false);
        let homes: Vec<bool> = range::each(Slot::range(0..8))
            .map(|slot| pass.homes.contains(slot))
            .collect();
        assert_eq!(homes, [true, true, true, true, true, true, true, false]);
    }

    #[test]
    fn a_run_begins_before_what_it_was_found_by() {
        let mut pool = Pool::of("A abcdefgh\nB xabcdefg\none A\ntwo B");
        // Of both, `d` alone is in the table's sample.
        pool.facts.table_slots_max = usize::MAX;
        let options = PlanOptions::default();
        let mut pass = Pass::new(&pool.facts, &options, true);
        pass.begin(ExtentId(0));
        pass.homes.insert_range(Slot::range(0..8));
        pass.enter(Slot(3));
        let extent = pass.begin(ExtentId(1));
        pass.homes.insert_range(Slot::range(8..12));
        assert_eq!(
            pass.longest(extent, Slot(12), &extent.slots(), Slot(8)),
            Some(home(9, 7, 0))
        );
        // What is no home any more is not gone back over.
        assert_eq!(
            pass.longest(extent, Slot(12), &extent.slots(), Slot(11)),
            Some(home(11, 5, 2))
        );
    }

    #[test]
    fn blocks_between_runs_that_a_run_is_found_in_stay() {
        // What three images map is too short to share where it is first; what one maps is found in it, though it is in A, too.
        let pool = Pool::of("A abxyzuvw\nB abab\none A\ntwo B\nthree B[0..2]\nfour B[0..2]");
        let options = PlanOptions::default();
        let mut pass = Pass::new(&pool.facts, &options, true);
        pass.look_at(ExtentId(0), false);
        let extent = pass.begin(ExtentId(1));
        let found = pass.match_extent(extent);
        assert_eq!((&found.runs[..], found.left_over), ([home(10, 2, 8)].as_slice(), 2));
    }

    #[test]
    fn what_frees_less_than_it_costs_stays() {
        let pool = Pool::of("A abcdefgh\nB abcdxyzu\none A\ntwo B");
        let options = PlanOptions::default();
        let pass = Pass::new(&pool.facts, &options, true);
        let found = |left_over: u32| ExtentMatch {
            runs: vec![home(8, 8 - left_over, 0)],
            left_over,
            unproved: Vec::new(),
        };
        let pays = |left_over, references| pass.pays(ExtentId(1), references, &found(left_over), false);
        // Half of it freed: a 32nd of the rest for rewriting it, and the rest for metadata.
        let frees = 4 * 4096 - 4 * 4096 / 32;
        let references = frees / METADATA_BYTES_PER_REFERENCE;
        assert_eq!([pays(4, references), pays(4, references + 1)], [true, false]);
        assert_eq!([pays(8, 0), pays(0, 0)], [false, true]);
        // What is planned only is written anyway.
        assert!(pass.pays(ExtentId(1), references + 2, &found(4), true));
        // No more is left over than half of the work space.
        let options = PlanOptions {
            work_space_bytes: 7 * 4096,
            ..options
        };
        let pass = Pass::new(&pool.facts, &options, true);
        let pays = |left_over| pass.pays(ExtentId(1), 0, &found(left_over), false);
        assert_eq!([pays(3), pays(4)], [true, false]);
    }

    #[test]
    fn matched_blocks_are_zeros_and_others() {
        let matched = MatchedBlocks::of(&[hole(0, 2), home(2, 4, 9), hole(7, 1)]);
        assert_eq!((matched.zeros, matched.duplicates), (3, 4));
    }
}
