//! The layout as a list of ops: which blocks are copied to donors, and which range of which image is to share with which source.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::greedy::MatchedBlocks;
use super::layout::BlockDestination;
use super::{Elimination, EliminationReason, METADATA_BYTES_PER_REFERENCE, ReclaimPlan};
use crate::block::bytes;
use crate::facts::{Class, Facts, Mapping};
use crate::numbers::{DonorExtentId, DonorFileId, ExtentId, ImageId, Slot};
use crate::range;
use crate::spill::SpillVec;

/// A file that holds the donor extents of one batch and class, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DonorFile {
    /// The number of the batch that it is written in.
    pub batch: u32,
    /// What the file must have in common with the images that will share with it.
    pub class: Class,
    /// Its extents, in order.
    pub extents: Vec<DonorExtentId>,
}

/// The place of a donor extent in a donor file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct DonorPlace {
    /// The donor file that holds it.
    file: DonorFileId,
    /// First block in that file.
    block: u32,
}

/// Extents that are eliminated together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Their places in [`ReclaimPlan::eliminations`].
    pub eliminations: Range<usize>,
    /// The donor files to write first.
    pub donor_files: Range<DonorFileId>,
    /// Bytes of images that the kernel will compare.
    pub compared_bytes: u64,
}

/// What a range of an image is to share with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ShareSource {
    /// A range of an image that stays as it is.
    Image {
        /// The image.
        image: ImageId,
        /// First block in the image.
        block: u32,
    },
    /// A range of a donor file.
    Donor {
        /// The donor file.
        file: DonorFileId,
        /// First block in the donor file.
        block: u32,
    },
    /// No data at all.
    Hole,
}

impl ShareSource {
    /// Returns the source that lies `blocks` blocks further on.
    fn beyond(self, blocks: u32) -> Self {
        match self {
            Self::Image { image, block } => Self::Image {
                image,
                block: block + blocks,
            },
            Self::Donor { file, block } => Self::Donor {
                file,
                block: block + blocks,
            },
            Self::Hole => Self::Hole,
        }
    }
}

/// One range of an image that is to share another's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// The image whose range changes its blocks.
    pub image: ImageId,
    /// First block of the range.
    pub file_block: u32,
    /// Length of the range in blocks.
    pub blocks: u32,
    /// What it is to share with.
    pub source: ShareSource,
    /// The extent that the range refers to before the op.
    pub extent: ExtentId,
}

/// Puts the extents that go into batches, in an order in which the donors of an extent are written when its turn comes, and
/// counts what is freed and what space that takes.
pub(super) fn schedule(facts: &Facts, plan: &mut ReclaimPlan) {
    place_donors(facts, plan);
    let layout = &plan.layout;
    // Extents that need no donor come first: they take no space, and free some.
    let mut by_batch = SpillVec::with_capacity_in(layout.gone().len(), facts.budget());
    for (turn, extent) in (0u32..).zip(layout.gone()) {
        let eliminated = eliminate(facts, plan, extent);
        for (reason, bytes) in eliminated.freed {
            *plan.freed.entry(reason).or_default() += bytes;
        }
        by_batch.push((eliminated.batch, turn, eliminated.elimination));
    }
    by_batch.sort_unstable_by_key(|(batch, turn, _)| (*batch, *turn));
    let mut by_batch = by_batch.into_iter().peekable();
    let last = plan.donor_files.last().map(|file| file.batch);
    let mut space = WorkSpace::default();
    for number in std::iter::once(None).chain((0..last.map_or(0, |last| last + 1)).map(Some)) {
        let first = plan.eliminations.len();
        while let Some((.., elimination)) = by_batch.next_if(|(batch, ..)| *batch == number) {
            plan.eliminations.push(elimination);
        }
        let batch = batch_of(facts, plan, number, first);
        space.pass(plan, &batch);
        plan.batches.push(batch);
    }
    plan.peak_bytes = space.peak_bytes;
    plan.needed_bytes = space.needed_bytes;
}

/// Puts donor extents into files, batch by batch.
fn place_donors(facts: &Facts, plan: &mut ReclaimPlan) {
    let layout = &plan.layout;
    let mut files: BTreeMap<(u32, Class), Vec<DonorExtentId>> = BTreeMap::new();
    for (extent, donor) in DonorExtentId::numbered(layout.donors()) {
        files.entry((donor.batch, donor.class)).or_default().push(extent);
    }
    plan.donor_files = files
        .into_iter()
        .map(|((batch, class), extents)| DonorFile { batch, class, extents })
        .collect();
    plan.donor_places = SpillVec::of_in(DonorPlace::default(), layout.donors().len(), facts.budget());
    for (file, DonorFile { extents, .. }) in DonorFileId::numbered(&plan.donor_files) {
        let mut block = 0;
        for extent in extents {
            plan.donor_places[extent.index()] = DonorPlace { file, block };
            block += layout.donors()[extent.index()].blocks;
        }
    }
}

/// The batch of the donors of that number, or of no donors, whose eliminations are those from `first` on.
fn batch_of(facts: &Facts, plan: &ReclaimPlan, number: Option<u32>, first: usize) -> Batch {
    let from = plan
        .batches
        .last()
        .map_or(DonorFileId(0), |before| before.donor_files.end);
    let files = plan.donor_files[from.index()..].iter();
    let files = files.take_while(|file| Some(file.batch) == number).count();
    let compared = plan.eliminations[first..]
        .iter()
        .flat_map(|one| facts.references_to(one.extent))
        .map(|reference| bytes(reference.blocks))
        .sum();
    Batch {
        eliminations: first..plan.eliminations.len(),
        donor_files: from..DonorFileId::at(from.index() + files),
        compared_bytes: compared,
    }
}

/// Counts the bytes that donors take on the way, batch after batch.
#[derive(Default)]
struct WorkSpace {
    /// What donors hold before what they replace is freed.
    held: u64,
    /// What the batch before frees.
    released: u64,
    /// All that donors took until now.
    taken: u64,
    /// All that was freed until now.
    given: u64,
    peak_bytes: u64,
    needed_bytes: u64,
}

impl WorkSpace {
    /// Counts the next batch.
    fn pass(&mut self, plan: &ReclaimPlan, batch: &Batch) {
        let donors = range::each(batch.donor_files.clone())
            .flat_map(|file| &plan.donor_files[file.index()].extents)
            .map(|extent| &plan.layout.donors()[extent.index()]);
        let written: u64 = donors.map(|donor| donor.disk_bytes).sum();
        // The donors of a batch are written while the one before is shared.
        self.peak_bytes = self.peak_bytes.max(self.held + written);
        self.taken += written;
        // Where nothing else is free, they wait until that one freed its extents.
        self.given += self.released;
        self.needed_bytes = self.needed_bytes.max(self.taken.saturating_sub(self.given));
        self.held = (self.held + written).saturating_sub(self.released);
        self.released = plan.eliminations[batch.eliminations.clone()]
            .iter()
            .map(|one| one.freed_bytes + one.rewritten_bytes - one.grown_bytes)
            .sum();
    }
}

/// The elimination of one extent, with its gain and its needs.
struct Eliminated {
    elimination: Elimination,
    /// The bytes on disk that it frees, each with the reason why they are freed.
    freed: Vec<(EliminationReason, u64)>,
    /// The batch of the last donor that it needs; `None` if it needs no donor.
    batch: Option<u32>,
}

/// Works out what the elimination of one extent frees, and which batch it belongs to.
fn eliminate(facts: &Facts, plan: &ReclaimPlan, extent: ExtentId) -> Eliminated {
    let (layout, this) = (&plan.layout, &facts.extents[extent.index()]);
    let runs = layout.runs_of(facts, extent);
    let pieces = layout.rest_of(facts, extent);
    let left_over_blocks: u32 = pieces.iter().map(|piece| piece.end - piece.start).sum();
    let left_over_bytes = this.donor_bytes(left_over_blocks);
    let freed_bytes = this.disk_bytes.saturating_sub(left_over_bytes);
    let rewritten_bytes = if facts.frees_blocks { 0 } else { left_over_bytes };

    // The shares are rounded down, and the remainder counts as unreachable, so that the sum is exact.
    let matched = MatchedBlocks::of(runs);
    let zeros = this.disk_share(matched.zeros).min(freed_bytes);
    let duplicates = this.disk_share(matched.duplicates).min(freed_bytes - zeros);
    // Blocks that are not compressed anew are expected to take in a donor what they took before.
    let compressed = this.disk_share(left_over_blocks).saturating_sub(left_over_bytes);
    let compressed = compressed.min(freed_bytes - zeros - duplicates);
    let nothing = freed_bytes - zeros - duplicates - compressed;
    let preallocated = facts.mappings_to(extent).any(|(mapping, _)| mapping.preallocated);
    let nothing = (
        if preallocated {
            EliminationReason::Preallocated
        } else {
            EliminationReason::Unreachable
        },
        nothing,
    );
    let mut freed = vec![
        (EliminationReason::Zeros, zeros),
        (EliminationReason::Duplicate, duplicates),
        (EliminationReason::Compressed, compressed),
        nothing,
    ];
    let reason = freed
        .iter()
        .max_by_key(|(_, bytes)| *bytes)
        .map_or(EliminationReason::Unreachable, |(reason, _)| *reason);
    freed.retain(|(_, bytes)| *bytes > 0);

    let (mut batch, mut ops) = (None, 0);
    for op in plan.ops(facts, extent) {
        if let ShareSource::Donor { file, block } = op.source {
            batch = batch.max(Some(plan.donor_files[file.index()].batch));
            ops += plan.donor_extents_over(file, block..block + op.blocks);
        } else {
            ops += 1;
        }
    }
    let metadata_bytes =
        u64::saturating_sub(ops, u64::from(facts.reference_count(extent))) * METADATA_BYTES_PER_REFERENCE;
    let elimination = Elimination {
        extent,
        reason,
        freed_bytes,
        grown_bytes: left_over_bytes.saturating_sub(this.disk_bytes),
        rewritten_bytes,
        metadata_bytes,
    };
    Eliminated {
        elimination,
        freed,
        batch,
    }
}

impl ReclaimPlan {
    /// How many extents of a donor file a range of it overlaps: a reference is needed for each.
    fn donor_extents_over(&self, file: DonorFileId, range: Range<u32>) -> u64 {
        let extents = &self.donor_files[file.index()].extents;
        let begin_before = |block| extents.partition_point(|extent| self.donor_places[extent.index()].block < block);
        (begin_before(range.end) - begin_before(range.start + 1)) as u64 + 1
    }

    /// The ops that eliminate one extent, reference by reference.
    pub fn ops<'a>(&'a self, facts: &'a Facts, extent: ExtentId) -> impl Iterator<Item = Op> + 'a {
        let ops = facts.mappings_to(extent).flat_map(move |(mapping, images)| {
            let ops: Arc<[Op]> = self.ops_of(facts, mapping).into();
            images.iter().flat_map(move |image| {
                let ops = Arc::clone(&ops);
                (0..ops.len()).map(move |n| Op {
                    image: *image,
                    ..ops[n]
                })
            })
        });
        join(ops)
    }

    /// The ops for one of the images that map some of an extent.
    fn ops_of(&self, facts: &Facts, mapping: &Mapping) -> Vec<Op> {
        let op = |slot: Slot, blocks, source| Op {
            image: ImageId(0),
            file_block: mapping.file_block + (slot - mapping.slot),
            blocks,
            source,
            extent: mapping.extent,
        };
        if mapping.preallocated {
            return vec![op(mapping.slot, mapping.blocks, ShareSource::Hole)];
        }
        let pieces = self.layout.resolve_all(facts, mapping.slots());
        pieces
            .flat_map(|(piece, found)| match found {
                BlockDestination::Hole => vec![op(piece.start, piece.end - piece.start, ShareSource::Hole)],
                BlockDestination::Donor { extent, block } => {
                    let place = self.donor_places[extent.index()];
                    let source = ShareSource::Donor {
                        file: place.file,
                        block: place.block + block,
                    };
                    vec![op(piece.start, piece.end - piece.start, source)]
                }
                BlockDestination::Kept(home) if home == piece.start => Vec::new(),
                BlockDestination::Kept(home) => facts
                    .places_of(home..home + (piece.end - piece.start))
                    .map(|(slot, place)| {
                        let source = ShareSource::Image {
                            image: place.image,
                            block: place.file_block,
                        };
                        op(piece.start + (slot - home), place.blocks, source)
                    })
                    .collect(),
            })
            .collect()
    }
}

/// Joins ops whose ranges and sources follow each other.
fn join(ops: impl Iterator<Item = Op>) -> impl Iterator<Item = Op> {
    let mut ops = ops.peekable();
    std::iter::from_fn(move || {
        let mut op = ops.next()?;
        while let Some(next) = ops.next_if(|next| follows(&op, next)) {
            op.blocks += next.blocks;
        }
        Some(op)
    })
}

fn follows(op: &Op, next: &Op) -> bool {
    next.image == op.image && next.file_block == op.file_block + op.blocks && next.source == op.source.beyond(op.blocks)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PlanOptions;
    use crate::plan::tests::notation::{Pool, options, pools};
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// What a block of an image maps while a plan is carried out.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Mapped {
        Slot(Slot),
        Preallocated(ExtentId),
        Donor(DonorFileId, u32),
        Nothing,
    }

    fn mapped(facts: &Facts, image: ImageId, blocks: usize) -> Vec<Mapped> {
        let mut all = vec![Mapped::Nothing; blocks];
        for mapping in &facts.mappings_of(image) {
            for n in 0..mapping.blocks {
                all[(mapping.file_block + n) as usize] = if mapping.preallocated {
                    Mapped::Preallocated(mapping.extent)
                } else {
                    Mapped::Slot(mapping.slot + n)
                };
            }
        }
        all
    }

    /// A plan that is carried out on paper, op after op.
    struct Paper<'a> {
        pool: &'a Pool,
        plan: &'a ReclaimPlan,
        images: Vec<Vec<Mapped>>,
        donors: Vec<Vec<char>>,
    }

    impl Paper<'_> {
        fn extent_of(&self, block: Mapped) -> Option<ExtentId> {
            match block {
                Mapped::Slot(slot) => Some(self.pool.facts.extent_of(slot)),
                Mapped::Preallocated(extent) => Some(extent),
                _ => None,
            }
        }

        fn content(&self, block: Mapped) -> char {
            match block {
                Mapped::Slot(slot) => self.pool.content[slot.index()],
                Mapped::Donor(file, at) => self.donors[file.index()][at as usize],
                _ => '0',
            }
        }

        /// Carries out one op, and checks that it takes references from its extent, and that its source is there and equal.
        fn carry_out(&mut self, op: &Op) {
            for n in 0..op.blocks {
                let source = match op.source {
                    ShareSource::Hole => Mapped::Nothing,
                    ShareSource::Donor { file, block } => Mapped::Donor(file, block + n),
                    ShareSource::Image { image, block } => {
                        let source = self.images[image.index()][(block + n) as usize];
                        let slot = match source {
                            Mapped::Slot(slot) => slot,
                            other => panic!("{op:?} counts on {other:?}"),
                        };
                        let stays = self.plan.layout.resolve(&self.pool.facts, slot..slot + 1);
                        assert_eq!(
                            stays.destination,
                            BlockDestination::Kept(slot),
                            "{op:?} counts on what goes"
                        );
                        source
                    }
                };
                let target = self.images[op.image.index()][(op.file_block + n) as usize];
                assert_eq!(self.extent_of(target), Some(op.extent), "{op:?} is about {target:?}");
                assert_eq!(self.content(source), self.content(target), "{op:?}");
                self.images[op.image.index()][(op.file_block + n) as usize] = source;
            }
        }

        fn texts(&self) -> Vec<String> {
            let text = |image: &Vec<Mapped>| image.iter().map(|block| self.content(*block)).collect();
            self.images.iter().map(text).collect()
        }

        /// The extents that images refer to.
        fn held(&self) -> BTreeSet<ExtentId> {
            let blocks = self.images.iter().flatten();
            blocks.filter_map(|block| self.extent_of(*block)).collect()
        }
    }

    proptest! {
        /// Batch by batch, each op finds its source, images keep their content, extents that go are held by nobody, and no more is taken
        /// on the way than was said.
        #[test]
        fn a_plan_can_be_carried_out_in_its_order(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            pool.prove_all();
            let plan = pool.plan(&options);
            let blocks = pool.image_blocks();
            let images = pool.images().map(|image| mapped(&pool.facts, image, blocks)).collect();
            let mut paper = Paper { pool: &pool, plan: &plan, images, donors: Vec::new() };
            // Bytes that donors took, and that were freed, after each batch.
            let (mut taken, mut freed) = (vec![0u64], vec![0u64]);
            for batch in &plan.batches {
                let files = batch.donor_files.clone();
                prop_assert_eq!(files.start.index(), paper.donors.len());
                paper.donors.extend(range::each(files).map(|file| pool.donor(&plan, file).replace(' ', "").chars().collect::<Vec<_>>()));
                let (mut compared, mut given) = (0, 0);
                for one in &plan.eliminations[batch.eliminations.clone()] {
                    for op in plan.ops(&pool.facts, one.extent) {
                        paper.carry_out(&op);
                    }
                    if !frees_blocks {
                        prop_assert!(!paper.held().contains(&one.extent));
                    }
                    compared += pool.facts.references_to(one.extent).map(|one| bytes(one.blocks)).sum::<u64>();
                    given += if frees_blocks { one.freed_bytes } else { pool.facts.extents[one.extent.index()].disk_bytes };
                }
                prop_assert_eq!(batch.compared_bytes, compared);
                let donors = range::each(batch.donor_files.clone()).flat_map(|file| &plan.donor_files[file.index()].extents);
                let written: u64 = donors.map(|extent| plan.layout.donors()[extent.index()].disk_bytes).sum();
                // Donors are written while the batch before is shared, or, where there is no room, after that.
                let (before, n) = (taken[taken.len() - 1] + written, freed.len());
                prop_assert!(before.saturating_sub(freed[n.saturating_sub(2)]) <= plan.peak_bytes);
                prop_assert!(before.saturating_sub(freed[n - 1]) <= plan.needed_bytes);
                taken.push(before);
                freed.push(freed[n - 1] + given);
            }
            prop_assert_eq!(paper.texts(), pool.texts());
            prop_assert_eq!(i64::try_from(freed[freed.len() - 1]).unwrap() - i64::try_from(taken[taken.len() - 1]).unwrap(), plan.freed_bytes());
        }

        /// Everything an extent takes on disk is either freed, for one reason or another, or rewritten.
        #[test]
        fn what_is_freed_adds_up(text in pools(), options in options()) {
            let mut pool = Pool::of(&text);
            let plan = pool.plan(&options);
            prop_assert_eq!(plan.eliminations.len(), plan.layout.gone().len());
            for one in &plan.eliminations {
                let Eliminated { elimination, freed, .. } = eliminate(&pool.facts, &plan, one.extent);
                prop_assert_eq!(&elimination, one);
                prop_assert_eq!(freed.iter().map(|(_, bytes)| bytes).sum::<u64>(), one.freed_bytes);
                let disk_bytes = pool.facts.extents[one.extent.index()].disk_bytes;
                prop_assert_eq!(one.freed_bytes + one.rewritten_bytes, disk_bytes + one.grown_bytes);
                let most = freed.iter().map(|(_, bytes)| *bytes).max();
                prop_assert!(freed.is_empty() || freed.contains(&(one.reason, most.unwrap())));
            }
            let freed: u64 = plan.freed.values().sum();
            prop_assert_eq!(freed, plan.eliminations.iter().map(|one| one.freed_bytes).sum::<u64>());
        }

        /// What needs no donor comes first, and what does comes with the last of those it needs.
        #[test]
        fn extents_wait_for_their_donors_and_no_longer(text in pools(), options in options()) {
            let mut pool = Pool::of(&text);
            let plan = pool.plan(&options);
            for (number, batch) in plan.batches.iter().enumerate() {
                prop_assert!(number > 0 || batch.donor_files.is_empty());
                for one in &plan.eliminations[batch.eliminations.clone()] {
                    let donors = plan.ops(&pool.facts, one.extent).filter_map(|op| match op.source {
                        ShareSource::Donor { file, .. } => Some(file),
                        _ => None,
                    });
                    let last = donors.max();
                    prop_assert_eq!(last.is_some(), number > 0);
                    prop_assert!(last.is_none_or(|file| batch.donor_files.contains(&file)));
                }
            }
        }

        /// Joined or not, ops say the same of every block, and neighbours that could be one are.
        #[test]
        fn joining_ops_changes_nothing(ops in prop::collection::vec((0u32..2, 0u32..3, 1u32..3, 0u32..3, 0u32..4), 0..12)) {
            let mut at = 0;
            let ops: Vec<Op> = ops.into_iter().map(|(gap, image, blocks, kind, from)| {
                let file_block = at + gap;
                at = file_block + blocks;
                let source = match kind {
                    0 => ShareSource::Hole,
                    1 => ShareSource::Image { image: ImageId(from % 2), block: file_block + from / 2 },
                    _ => ShareSource::Donor { file: DonorFileId(from % 2), block: file_block + from / 2 },
                };
                Op { image: ImageId(image / 2), file_block, blocks, source, extent: ExtentId(0) }
            }).collect();
            let each = |ops: &[Op]| -> Vec<(ImageId, u32, ShareSource)> {
                let each = |op: &Op| {
                    let op = *op;
                    (0..op.blocks).map(move |n| (op.image, op.file_block + n, op.source.beyond(n)))
                };
                ops.iter().flat_map(each).collect()
            };
            let joined: Vec<Op> = join(ops.iter().copied()).collect();
            prop_assert_eq!(each(&joined), each(&ops));
            prop_assert!(!joined.windows(2).any(|pair| follows(&pair[0], &pair[1])));
        }
    }

    #[test]
    fn a_reference_into_two_donor_extents_counts_twice() {
        // An extent may have two references: what is left over of four extents takes two of a donor file.
        let mut pool = Pool::of(
            "
            A  abcd0000
            B  efgh0000
            C  ijkl0000
            D  mnop0000
            one  A B C D",
        );
        let options = PlanOptions {
            references_max: 2,
            references_per_gib_max: u32::MAX,
            ..PlanOptions::default()
        };
        let plan = pool.plan(&options);
        assert_eq!(pool.donor(&plan, DonorFileId(0)), "abcdefgh ijklmnop");
        let over = |range| plan.donor_extents_over(DonorFileId(0), range);
        assert_eq!(
            [over(0..8), over(7..8), over(8..9), over(7..9), over(0..16)],
            [1, 1, 1, 2, 2]
        );
        // Each leaves a range with data and a hole in place of one reference, and holes take none.
        let metadata: Vec<u64> = plan.eliminations.iter().map(|one| one.metadata_bytes).collect();
        assert_eq!(metadata, [METADATA_BYTES_PER_REFERENCE; 4]);
    }
}
