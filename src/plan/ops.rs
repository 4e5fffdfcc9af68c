//! The layout as a list of ops: what is copied, and which range of which image is shared with what.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::greedy::matched_blocks;
use super::layout::Final;
use super::{Elimination, METADATA_BYTES_PER_REFERENCE, Plan, Reason};
use crate::block::{Slot, bytes};
use crate::facts::{Class, Facts, ImageId, Mapping};
use crate::spill::SpillVec;

/// A file that holds the donor extents of one batch and class, one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DonorFile {
    /// The batch it is written in.
    pub batch: u32,
    /// What the file must be like.
    pub class: Class,
    /// Its extents, as places in [`super::Layout::donors`].
    pub extents: Vec<u32>,
}

/// Extents that are eliminated together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Their places in [`Plan::eliminations`].
    pub eliminations: Range<usize>,
    /// The donor files to write first, as places in [`Plan::donor_files`].
    pub donor_files: Range<usize>,
    /// Bytes of images that the kernel will compare.
    pub compared_bytes: u64,
}

/// What a range of an image is to share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A range of an image that stays as it is, from this block on.
    Image(ImageId, u32),
    /// A range of a donor file, from this block on.
    Donor(u32, u32),
    /// No data at all.
    Hole,
}

/// One range of an image that is to share another's blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    /// The image.
    pub image: ImageId,
    /// Its first block.
    pub file_block: u32,
    /// Blocks.
    pub blocks: u32,
    /// What it is to share.
    pub source: Source,
    /// The extent that this takes a reference from, as a place in [`Facts::extents`].
    pub extent: u32,
}

/// Puts extents into batches, in an order in which everything an extent needs is there when its turn comes, and counts.
pub(super) fn schedule(facts: &Facts, plan: &mut Plan) {
    let layout = &plan.layout;
    let mut files: BTreeMap<(u32, Class), Vec<u32>> = BTreeMap::new();
    for (place, donor) in (0u32..).zip(layout.donors()) {
        files.entry((donor.batch, donor.class)).or_default().push(place);
    }
    plan.donor_files = files
        .into_iter()
        .map(|((batch, class), extents)| DonorFile { batch, class, extents })
        .collect();
    plan.donor_places = SpillVec::of_in((0, 0), layout.donors().len(), facts.budget());
    for (file, extents) in (0u32..).zip(plan.donor_files.iter().map(|file| &file.extents)) {
        let mut at = 0;
        for donor in extents {
            plan.donor_places[*donor as usize] = (file, at);
            at += layout.donors()[*donor as usize].blocks;
        }
    }
    // What needs no donor comes first: it takes no space, and makes some.
    let mut by_batch = SpillVec::with_capacity_in(layout.gone().len(), facts.budget());
    for (turn, extent) in (0u32..).zip(layout.gone()) {
        let (elimination, freed, batch) = eliminate(facts, plan, extent);
        for (reason, bytes) in freed {
            *plan.freed.entry(reason).or_default() += bytes;
        }
        by_batch.push((batch, turn, elimination));
    }
    by_batch.sort_unstable_by_key(|(batch, turn, _)| (*batch, *turn));
    let mut by_batch = by_batch.into_iter().peekable();
    let last = plan.donor_files.last().map(|file| file.batch);
    let (mut held, mut released, mut file) = (0u64, 0u64, 0);
    // All that donors took, and all that was freed, until now.
    let (mut taken, mut given) = (0u64, 0u64);
    for number in std::iter::once(None).chain((0..last.map_or(0, |last| last + 1)).map(Some)) {
        let first = plan.eliminations.len();
        while let Some((.., elimination)) = by_batch.next_if(|(batch, ..)| *batch == number) {
            plan.eliminations.push(elimination);
        }
        let files = file..file
            + plan.donor_files[file..]
                .iter()
                .take_while(|file| Some(file.batch) == number)
                .count();
        file = files.end;
        let written: u64 = plan.donor_files[files.clone()]
            .iter()
            .flat_map(|file| &file.extents)
            .map(|donor| &layout.donors()[*donor as usize])
            .map(|donor| donor.disk_bytes)
            .sum();
        // The donors of a batch are written while the one before is shared.
        plan.peak_bytes = plan.peak_bytes.max(held + written);
        taken += written;
        // Where there is no other room, they wait for that.
        given += released;
        plan.needed_bytes = plan.needed_bytes.max(taken.saturating_sub(given));
        held = (held + written).saturating_sub(released);
        let batch = &plan.eliminations[first..];
        released = batch
            .iter()
            .map(|one| one.freed_bytes + one.rewritten_bytes - one.grown_bytes)
            .sum();
        let compared = batch
            .iter()
            .flat_map(|one| facts.references_to(one.extent))
            .map(|reference| bytes(reference.blocks))
            .sum();
        plan.batches.push(Batch {
            eliminations: first..plan.eliminations.len(),
            donor_files: files,
            compared_bytes: compared,
        });
    }
}

/// What eliminating one extent frees, why, and the batch of the last donor that it needs, if any.
fn eliminate(facts: &Facts, plan: &Plan, extent: u32) -> (Elimination, Vec<(Reason, u64)>, Option<u32>) {
    let (layout, this) = (&plan.layout, &facts.extents[extent as usize]);
    let runs = layout.runs_of(facts, extent);
    let pieces = layout.rest_of(facts, extent);
    let left_over_blocks: u32 = pieces.iter().map(|piece| piece.end - piece.start).sum();
    let left_over_bytes = this.donor_bytes(left_over_blocks);
    let freed_bytes = this.disk_bytes.saturating_sub(left_over_bytes);
    let rewritten_bytes = if facts.frees_blocks { 0 } else { left_over_bytes };

    // What is found elsewhere is rounded down and the rest given to what nothing reaches, so that the sum is exact.
    let (zeros, duplicates) = matched_blocks(runs);
    let zeros = this.disk_share(zeros).min(freed_bytes);
    let duplicates = this.disk_share(duplicates).min(freed_bytes - zeros);
    // What is not compressed anew takes in a donor what it took before.
    let compressed = this.disk_share(left_over_blocks).saturating_sub(left_over_bytes);
    let compressed = compressed.min(freed_bytes - zeros - duplicates);
    let nothing = freed_bytes - zeros - duplicates - compressed;
    let preallocated = facts.mappings_to(extent).any(|(mapping, _)| mapping.preallocated);
    let nothing = (
        if preallocated {
            Reason::Preallocated
        } else {
            Reason::Unreachable
        },
        nothing,
    );
    let mut freed = vec![
        (Reason::Zeros, zeros),
        (Reason::Duplicate, duplicates),
        (Reason::Compressed, compressed),
        nothing,
    ];
    let reason = freed
        .iter()
        .max_by_key(|(_, bytes)| *bytes)
        .map_or(Reason::Unreachable, |(reason, _)| *reason);
    freed.retain(|(_, bytes)| *bytes > 0);

    let (mut batch, mut ops) = (None, 0);
    for op in plan.ops(facts, extent) {
        if let Source::Donor(file, at) = op.source {
            batch = batch.max(Some(plan.donor_files[file as usize].batch));
            ops += plan.donor_extents_over(file, at..at + op.blocks);
        } else {
            ops += 1;
        }
    }
    let metadata_bytes =
        u64::saturating_sub(ops, u64::from(facts.reference_count(extent))) * METADATA_BYTES_PER_REFERENCE;
    (
        Elimination {
            extent,
            reason,
            freed_bytes,
            grown_bytes: left_over_bytes.saturating_sub(this.disk_bytes),
            rewritten_bytes,
            metadata_bytes,
        },
        freed,
        batch,
    )
}

impl Plan {
    /// How many extents of a donor file a range of it reaches into: a reference is needed for each.
    fn donor_extents_over(&self, file: u32, range: Range<u32>) -> u64 {
        let extents = &self.donor_files[file as usize].extents;
        let begin_before = |block| extents.partition_point(|donor| self.donor_places[*donor as usize].1 < block);
        (begin_before(range.end) - begin_before(range.start + 1)) as u64 + 1
    }

    /// The ops that eliminate one extent, reference by reference.
    pub fn ops<'a>(&'a self, facts: &'a Facts, extent: u32) -> impl Iterator<Item = Op> + 'a {
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
            image: 0,
            file_block: mapping.file_block + (slot - mapping.slot),
            blocks,
            source,
            extent: mapping.extent,
        };
        if mapping.preallocated {
            return vec![op(mapping.slot, mapping.blocks, Source::Hole)];
        }
        let pieces = self.layout.resolve_all(facts, mapping.slots());
        pieces
            .flat_map(|(piece, found)| match found {
                Final::Hole => vec![op(piece.start, piece.end - piece.start, Source::Hole)],
                Final::Donor(donor, at) => {
                    let (file, first) = self.donor_places[donor as usize];
                    vec![op(
                        piece.start,
                        piece.end - piece.start,
                        Source::Donor(file, first + at),
                    )]
                }
                Final::Kept(home) if home == piece.start => Vec::new(),
                Final::Kept(home) => facts
                    .places_of(home..home + (piece.end - piece.start))
                    .map(|(slot, place)| {
                        op(
                            piece.start + (slot - home),
                            place.blocks,
                            Source::Image(place.image, place.file_block),
                        )
                    })
                    .collect(),
            })
            .collect()
    }
}

/// Joins ops that follow each other on both sides.
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
    next.image == op.image
        && next.file_block == op.file_block + op.blocks
        && match (op.source, next.source) {
            (Source::Hole, Source::Hole) => true,
            (Source::Image(a, at), Source::Image(b, to)) | (Source::Donor(a, at), Source::Donor(b, to)) => {
                a == b && to == at + op.blocks
            }
            _ => false,
        }
}
