//! What is known of a pool before anything is planned: extents, references, fingerprints. Plain data, no I/O.

mod packed;
mod shared;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

pub(crate) use packed::{PackedExtents, PackedMappings};
pub(crate) use shared::Collector;
pub use shared::SharedList;

use crate::block::BLOCK_BYTES;
use crate::fingerprint::Fingerprints;
use crate::numbers::{ExtentId, ImageId, ImageSetId, MachineId, Slot};
use crate::spill::{Budget, SpillMap, SpillVec};

/// How an extent's bytes lie on disk, which decides what a donor that takes them over must be like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Compression {
    /// As they are.
    None,
    /// btrfs compression type 1.
    Zlib,
    /// btrfs compression type 2.
    Lzo,
    /// btrfs compression type 3.
    Zstd,
}

/// What two extents must have in common for the kernel to let a file refer to both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Class {
    /// Whether the filesystem keeps checksums of the data. `FIDEDUPERANGE` refuses two files that differ in it. True for all files
    /// of a filesystem that keeps none.
    pub checksummed: bool,
    /// How the bytes lie on disk. Extents of any compression may share with each other.
    pub compression: Compression,
    /// The groups of the images that refer to it, as bits. What the user wants kept apart shares only within the same groups.
    pub groups: u32,
}

/// One physical allocation of the filesystem. It is freed only as a whole, once nothing refers to any part of it.
#[derive(Debug, Clone)]
pub struct Extent {
    /// Logical address in the filesystem, in bytes.
    pub address: u64,
    /// Bytes it takes on disk.
    pub disk_bytes: u64,
    /// The transaction that wrote it: together with the address it tells an extent from a later one at the same place.
    pub generation: u64,
    /// Its first block's slot.
    pub first_slot: Slot,
    /// Its length in blocks, uncompressed.
    pub blocks: u32,
    /// What may share with it.
    pub class: Class,
    /// Why it must stay where it is, if it must.
    pub pinned: Option<PinReason>,
    /// How its blocks are to lie on disk once they are rewritten, if not as before.
    pub compression_goal: Option<CompressionGoal>,
}

/// How blocks are to lie on disk, where someone asked for compression or for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CompressionGoal {
    /// What their donors are to be like.
    pub compression: Compression,
    /// Bytes on disk that are expected for each [`CompressionGoal::WHOLE`] bytes of content.
    pub share: u16,
    /// Whether an extent is rewritten for that alone. Where it is not, it is known only what its blocks would become.
    pub rewrites: bool,
}

impl CompressionGoal {
    /// The share of what is not compressed.
    pub const WHOLE: u16 = 1 << 15;
}

/// Why an extent cannot be eliminated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum PinReason {
    /// Something outside the given paths (another file, a snapshot) or an image that is left alone refers to it.
    HeldByOthers,
    /// It holds the last block of an image whose size is not a multiple of 4 KiB.
    UnalignedTail,
    /// A part of it is preallocated, and that is to stay so.
    Preallocated,
    /// An image refers to it whose extents cannot change.
    Fixed,
    /// Part of it cannot be read, and is not known.
    Unreadable,
}

impl Class {
    /// Whether extents of two classes may share blocks.
    pub fn shares_with(self, other: Self) -> bool {
        (self.checksummed, self.groups) == (other.checksummed, other.groups)
    }
}

impl Extent {
    /// Its slots.
    pub fn slots(&self) -> Range<Slot> {
        self.first_slot..self.first_slot + self.blocks
    }

    /// Whether it is rewritten even if nothing of it is found elsewhere.
    pub fn is_always_rewritten(&self) -> bool {
        self.compression_goal
            .is_some_and(|compression_goal| compression_goal.rewrites)
    }

    /// What a donor that takes over its blocks must be like.
    pub fn donor_class(&self) -> Class {
        Class {
            compression: self
                .compression_goal
                .map_or(self.class.compression, |compression_goal| compression_goal.compression),
            ..self.class
        }
    }

    /// Bytes on disk that `blocks` of its blocks are expected to take in a donor.
    pub fn donor_bytes(&self, blocks: u32) -> u64 {
        let whole = u64::from(blocks) * BLOCK_BYTES;
        match (self.donor_class().compression, self.compression_goal) {
            (Compression::None, _) => whole,
            (_, Some(compression_goal)) => {
                whole * u64::from(compression_goal.share.min(CompressionGoal::WHOLE))
                    / u64::from(CompressionGoal::WHOLE)
            }
            (_, None) => self.disk_share(blocks).min(whole),
        }
    }

    /// Bytes on disk that `blocks` of its blocks take, as a share of the whole.
    pub fn disk_share(&self, blocks: u32) -> u64 {
        let share = u128::from(self.disk_bytes) * u128::from(blocks) / u128::from(self.blocks.max(1));
        u64::try_from(share).unwrap_or(self.disk_bytes)
    }
}

/// A range of an image that maps part of an extent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reference {
    /// The image.
    pub image: ImageId,
    /// First block of the range in the image.
    pub file_block: u32,
    /// The slot that its first block maps.
    pub slot: Slot,
    /// Length in blocks.
    pub blocks: u32,
    /// The extent.
    pub extent: ExtentId,
    /// Whether the range is preallocated: it reads as zeros, whatever the extent holds there.
    pub preallocated: bool,
}

impl Reference {
    /// The slots it maps.
    pub fn slots(&self) -> Range<Slot> {
        self.slot..self.slot + self.blocks
    }
}

/// A range that images map, each at the same place in it, to the same part of an extent: so many references in one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mapping {
    /// The extent.
    pub extent: ExtentId,
    /// The slot that its first block maps.
    pub slot: Slot,
    /// First block in the images.
    pub file_block: u32,
    /// Length in blocks.
    pub blocks: u32,
    /// Whether the range is preallocated: it reads as zeros, whatever the extent holds there.
    pub preallocated: bool,
}

impl Mapping {
    /// The slots it maps.
    pub fn slots(&self) -> Range<Slot> {
        self.slot..self.slot + self.blocks
    }

    /// The reference of one of the images that have it.
    fn reference(self, image: ImageId) -> Reference {
        Reference {
            image,
            file_block: self.file_block,
            slot: self.slot,
            blocks: self.blocks,
            extent: self.extent,
            preallocated: self.preallocated,
        }
    }

    /// Whether another one follows this one in the extent, and in an image that has both.
    fn is_followed_by(&self, next: &Self) -> bool {
        (next.extent, next.preallocated) == (self.extent, self.preallocated)
            && next.file_block == self.file_block + self.blocks
            && next.slot == self.slots().end
    }
}

impl FromIterator<Reference> for SharedList<Mapping> {
    fn from_iter<I: IntoIterator<Item = Reference>>(references: I) -> Self {
        Self::from_references_in(references, &Budget::default())
    }
}

impl SharedList<Mapping> {
    /// What images map by these references.
    pub fn from_references_in(references: impl IntoIterator<Item = Reference>, budget: &Budget) -> Self {
        let mut all = Collector::new_in(budget);
        for reference in references {
            let mapping = Mapping {
                extent: reference.extent,
                slot: reference.slot,
                file_block: reference.file_block,
                blocks: reference.blocks,
                preallocated: reference.preallocated,
            };
            all.push(mapping, reference.image);
        }
        all.finish()
    }

    /// Makes one of mappings that follow each other in an image and in an extent. Whether the filesystem keeps one item or two for
    /// such a range depends on how it came about, and nothing may depend on that.
    fn join(&mut self) {
        self.rework(
            |one, other| one.extent == other.extent,
            |mappings, sets| {
                let has_next = |(this, set): &(Mapping, ImageSetId)| {
                    let next = (this.slots().end, this.file_block + this.blocks);
                    let from = mappings.partition_point(|(other, _)| (other.slot, other.file_block) < next);
                    let follow = mappings[from..]
                        .iter()
                        .take_while(|(other, _)| (other.slot, other.file_block) == next);
                    let of = |set: ImageSetId| sets.get(set);
                    let meet = |one: ImageSetId, other: ImageSetId| {
                        one == other || of(one).iter().any(|image| of(other).binary_search(image).is_ok())
                    };
                    follow
                        .filter(|(other, _)| this.is_followed_by(other))
                        .any(|(_, other)| meet(*set, *other))
                };
                mappings.iter().any(has_next)
            },
            |each| {
                each.sort_unstable_by_key(|(image, mapping)| (*image, mapping.file_block));
                each.dedup_by(|(next_image, next), (image, mapping)| {
                    let follows = next_image == image && mapping.is_followed_by(next);
                    if follows {
                        mapping.blocks += next.blocks;
                    }
                    follows
                });
            },
        );
    }

    /// In the order of extents, then slots, then the first image and the place in it.
    fn sort(&mut self) {
        let sets = &self.sets;
        self.list.sort_unstable_by_key(|(mapping, set)| {
            let first = sets.get(*set).first().copied();
            (mapping.extent, mapping.slot, first, mapping.file_block)
        });
    }
}

/// Everything that a plan follows from. A plan that was made left all of it as it was but for the proofs, of which there are more.
#[derive(Debug, Default)]
pub struct Facts {
    /// Extents in the order of their addresses; slots are numbered in the same order.
    pub extents: SpillVec<Extent>,
    /// In the order of extents, then slots, then the first image and the place in it.
    mappings: SharedList<Mapping>,
    /// For each extent, and one past the last, where its mappings begin.
    first_mapping: SpillVec<u32>,
    /// Fingerprint of each slot's block; meaningless for slots that no reference reaches.
    pub fingerprints: Fingerprints<Slot>,
    /// A file for the fingerprints of this pool as a plan would leave it, where there is no memory for them; it has as many slots. Whoever
    /// makes a file for [`Facts::fingerprints`] makes this one too: planning makes no files.
    pub planned_fingerprints: Option<Fingerprints<Slot>>,
    /// Fingerprint of a block of zeros.
    pub zero_fingerprint: u32,
    /// Strong hashes of the few blocks that were read because their fingerprint alone does not prove equality.
    pub proofs: Proofs,
    /// How many slots a block table may hold; a pool with more is sampled.
    pub table_slots_max: usize,
    /// The machine that each image belongs to. If the list is empty, each image counts as a machine of its own.
    pub machines: Vec<MachineId>,
    /// Whether the filesystem frees each block on its own (XFS), not only extents as a whole (btrfs): then extents are only ranges
    /// of blocks that are alike in what may be done with them, and what of one is found elsewhere goes without the rest.
    pub frees_blocks: bool,
    /// The last block of each image whose size is not a multiple of 4 KiB. `FIDEDUPERANGE` shares such a block only with the last block of
    /// another file, so that what lies there is no home for anything else.
    pub partial_blocks: BTreeMap<ImageId, u32>,
    /// For each range of slots that an image reaches, a mapping to read it through; in the order of slots, without overlap.
    cover: SpillVec<Cover>,
}

/// The strong hash of a block that was read, as [`proof_of`] makes it.
pub type Proof = [u8; 8];

/// The strong hashes of the blocks that were read.
pub type Proofs = SpillMap<Slot, Proof>;

/// A range of slots and the mapping it is read through.
#[derive(Debug, Clone, Copy)]
struct Cover {
    slot: Slot,
    /// The mapping, by its place in the list; it covers all slots to its end.
    mapping: u32,
}

/// A place in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageRange {
    /// The image.
    pub image: ImageId,
    /// First block in it.
    pub file_block: u32,
    /// Length in blocks: they lie side by side both in the image and in the extent.
    pub blocks: u32,
}

impl Facts {
    /// Puts extents (by address, slots in that order) and what images map of them together; fingerprints are still to be filled in.
    /// All lists are made from the budget of the extents.
    pub fn new(mut extents: SpillVec<Extent>, mut mappings: SharedList<Mapping>, zero_fingerprint: u32) -> Self {
        mappings.join();
        mappings.sort();
        // Both lists grew up to twice what they need, and they stay for long.
        extents.shrink_to_fit();
        mappings.list.shrink_to_fit();
        let proofs = Proofs::new_in(extents.budget().clone());
        let mut facts = Self {
            extents,
            mappings,
            first_mapping: SpillVec::default(),
            fingerprints: Fingerprints::default(),
            planned_fingerprints: None,
            table_slots_max: usize::MAX,
            machines: Vec::new(),
            frees_blocks: false,
            partial_blocks: BTreeMap::new(),
            zero_fingerprint,
            proofs,
            cover: SpillVec::default(),
        };
        facts.arrange();
        facts
    }

    /// Finds out which mappings belong to which extent, and what they cover.
    fn arrange(&mut self) {
        let mut first_mapping = SpillVec::with_capacity_in(self.extents.len() + 1, self.budget());
        let mut cover: SpillVec<Cover> = SpillVec::with_capacity_in(self.extents.len(), self.budget());
        let mut at = 0;
        let number = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        for (extent, this) in ExtentId::numbered(&self.extents) {
            first_mapping.push(number(at));
            let mut covered = this.first_slot;
            while let Some((mapping, _)) = self.mappings.list.get(at).filter(|(one, _)| one.extent == extent) {
                let end = mapping.slots().end;
                if !mapping.preallocated && end > covered {
                    cover.push(Cover {
                        slot: covered.max(mapping.slot),
                        mapping: number(at),
                    });
                    covered = end;
                }
                at += 1;
            }
        }
        first_mapping.push(number(at));
        cover.shrink_to_fit();
        self.first_mapping = first_mapping;
        self.cover = cover;
    }

    /// Returns the slots that hold the last, partial block of an image.
    pub fn partial_slots(&self) -> BTreeSet<Slot> {
        if self.partial_blocks.is_empty() {
            return BTreeSet::new();
        }
        let all = self.mappings_in(0..self.mappings.list.len());
        let partial = all.flat_map(|(mapping, images)| {
            let of = |image| self.partial_blocks.get(image)?.checked_sub(mapping.file_block);
            let inside = images.iter().filter_map(of).filter(|block| *block < mapping.blocks);
            inside.map(|block| mapping.slot + block)
        });
        partial.collect()
    }

    /// The budget that its lists and those that follow from it are made from. It is that of the extents.
    pub fn budget(&self) -> &Budget {
        self.extents.budget()
    }

    /// How many slots the pool has.
    pub fn slots(&self) -> u32 {
        self.extents.last().map_or(0, |last| last.slots().end.0)
    }

    /// The slots of the pool.
    pub fn all_slots(&self) -> Range<Slot> {
        Slot::range(0..self.slots())
    }

    /// What images map of one extent, each with the images that do, ascending.
    pub fn mappings_to(&self, extent: ExtentId) -> impl DoubleEndedIterator<Item = (&Mapping, &[ImageId])> {
        self.mappings_in(self.range_of(extent))
    }

    fn range_of(&self, extent: ExtentId) -> Range<usize> {
        let at = |extent: usize| self.first_mapping.get(extent).copied().unwrap_or_default() as usize;
        at(extent.index())..at(extent.index() + 1)
    }

    fn mappings_in(&self, range: Range<usize>) -> impl DoubleEndedIterator<Item = (&Mapping, &[ImageId])> {
        let sets = &self.mappings.sets;
        self.mappings.list[range]
            .iter()
            .map(|(mapping, set)| (mapping, sets.get(*set)))
    }

    /// The references to one extent.
    pub fn references_to(&self, extent: ExtentId) -> impl Iterator<Item = Reference> {
        self.mappings_to(extent)
            .flat_map(|(mapping, images)| images.iter().map(|image| mapping.reference(*image)))
    }

    /// How many references there are to one extent.
    pub fn reference_count(&self, extent: ExtentId) -> u32 {
        count(self.mappings_to(extent))
    }

    /// All references, by extent.
    pub fn references(&self) -> impl Iterator<Item = Reference> {
        let all = self.mappings.iter();
        all.flat_map(|(mapping, images)| images.iter().map(|image| mapping.reference(*image)))
    }

    /// What images map, each with the images that do, by extent.
    pub(crate) fn mappings(&self) -> &SharedList<Mapping> {
        &self.mappings
    }

    /// What one image maps, by the place in it.
    pub fn mappings_of(&self, image: ImageId) -> SpillVec<Mapping> {
        let sets = &self.mappings.sets;
        let each_set = ImageSetId::first(u32::try_from(sets.len()).unwrap_or(u32::MAX));
        let has: Vec<bool> = each_set
            .map(|set| sets.get(set).binary_search(&image).is_ok())
            .collect();
        let all = self.mappings.list.iter();
        let all = all.filter(|(_, set)| has[set.index()]).map(|(mapping, _)| *mapping);
        let mut mappings: SpillVec<Mapping> = SpillVec::from_iter_in(all, self.budget());
        mappings.sort_unstable_by_key(|mapping| mapping.file_block);
        mappings
    }

    /// How many references map some of the slots, which are of one extent.
    pub fn references_over(&self, slots: Range<Slot>) -> u32 {
        count(self.over(slots))
    }

    /// Whether so many references, or more, map some of the slots, which are of one extent.
    pub fn has_references_over(&self, slots: Range<Slot>, least: usize) -> bool {
        let mut found = 0;
        least == 0
            || self.over(slots).any(|(_, images)| {
                found += images.len();
                found >= least
            })
    }

    /// What images map of the slots, which are of one extent.
    fn over(&self, slots: Range<Slot>) -> impl Iterator<Item = (&Mapping, &[ImageId])> {
        let all = self.range_of(self.extent_of(slots.start));
        // Mappings are in the order of their slots, so that most of those over a range are close before its end.
        let before = self.mappings.list[all.clone()].partition_point(|(mapping, _)| mapping.slot < slots.end);
        self.mappings_in(all.start..all.start + before)
            .rev()
            .filter(move |(mapping, _)| !mapping.preallocated && mapping.slots().end > slots.start)
    }

    /// The extent that `slot` belongs to.
    pub fn extent_of(&self, slot: Slot) -> ExtentId {
        let after = self.extents.partition_point(|extent| extent.first_slot <= slot);
        ExtentId::at(after.saturating_sub(1))
    }

    fn end_of(&self, cover: Cover) -> Slot {
        self.mappings.list[cover.mapping as usize].0.slots().end
    }

    /// The maximal runs of slots of `within` that some image can reach, other than as preallocated, in order.
    pub fn live_runs(&self, within: Range<Slot>) -> impl Iterator<Item = Range<Slot>> + '_ {
        let after = self.cover.partition_point(|cover| cover.slot <= within.start);
        let covers = self.cover[after.saturating_sub(1)..].iter().take_while({
            let end = within.end;
            move |cover| cover.slot < end
        });
        let mut covers = covers
            .map(move |cover| cover.slot.max(within.start)..self.end_of(*cover).min(within.end))
            .filter(|slots| slots.start < slots.end)
            .peekable();
        std::iter::from_fn(move || {
            let mut run = covers.next()?;
            while let Some(next) = covers.next_if(|next| next.start == run.end) {
                run.end = next.end;
            }
            Some(run)
        })
    }

    /// Where a range of live slots can be read or shared from: the place of its beginning, and how far that place holds.
    pub fn place_of(&self, slots: Range<Slot>) -> Option<ImageRange> {
        let after = self.cover.partition_point(|cover| cover.slot <= slots.start);
        let cover = self.cover.get(after.checked_sub(1)?)?;
        let end = self.end_of(*cover).min(slots.end);
        let (mapping, set) = self.mappings.list.get(cover.mapping as usize)?;
        let image = *self.mappings.sets.get(*set).first()?;
        (slots.start < end).then(|| ImageRange {
            image,
            file_block: mapping.file_block + (slots.start - mapping.slot),
            blocks: end - slots.start,
        })
    }

    /// The places of a whole range of live slots, in order, each with its first slot.
    pub fn places_of(&self, slots: Range<Slot>) -> impl Iterator<Item = (Slot, ImageRange)> + '_ {
        let mut at = slots.start;
        std::iter::from_fn(move || {
            let place = self.place_of(at..slots.end)?;
            let slot = at;
            at += place.blocks;
            Some((slot, place))
        })
    }

    /// The machine through whose image a slot is read.
    pub fn machine_of(&self, slot: Slot) -> Option<MachineId> {
        let image = self.place_of(slot..slot + 1)?.image;
        Some(self.machines.get(image.index()).copied().unwrap_or(MachineId(image.0)))
    }
}

/// What is known of single blocks.
impl Facts {
    /// Remembers what blocks were found to hold.
    pub fn add_proofs(&mut self, proofs: impl IntoIterator<Item = (Slot, Proof)>) {
        self.proofs.extend(proofs);
    }

    /// Whether two blocks are equal, if both were read.
    pub fn proved_equal(&self, one: Slot, other: Slot) -> Option<bool> {
        Some(self.proofs.get(&one)? == self.proofs.get(&other)?)
    }

    /// Whether a block is all zeros, if it was read.
    pub fn proved_zero(&self, slot: Slot) -> Option<bool> {
        self.proofs
            .get(&slot)
            .map(|proof| *proof == proof_of(&[0; crate::block::BLOCK_LEN]))
    }
}

/// How many references these mappings are.
fn count<'a>(mappings: impl Iterator<Item = (&'a Mapping, &'a [ImageId])>) -> u32 {
    let count: usize = mappings.map(|(_, images)| images.len()).sum();
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// The strong hash of a block: the beginning of its BLAKE3, 64 bits, since it decides what is planned and not what is shared.
pub fn proof_of(block: &[u8]) -> Proof {
    let mut proof = Proof::default();
    proof.copy_from_slice(&blake3::hash(block).as_bytes()[..size_of::<Proof>()]);
    proof
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    use crate::block::bytes;
    use crate::testing::simulated::PLAIN;

    fn key(reference: &Reference) -> (ExtentId, ImageId, u32, Slot, u32, bool) {
        let Reference {
            image,
            file_block,
            slot,
            blocks,
            extent,
            preallocated,
        } = *reference;
        (extent, image, file_block, slot, blocks, preallocated)
    }

    proptest! {
        /// However items are cut, and whichever images have them in common, references are the longest there are, and each mapping is kept once.
        #[test]
        fn references_are_those_that_were_put_in(
            // What images map, piece by piece: an extent, a place in it, whether it is preallocated.
            images in prop::collection::vec(prop::collection::vec(prop::option::of((0u32..2, 0u32..6, any::<bool>(), 1u32..3)), 0..12), 1..6),
            copies in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            const BLOCKS: u32 = 8;
            let mut images = images;
            for copy in copies {
                images.push(images[copy.index(images.len())].clone());
            }
            let mut pieces = Vec::new();
            for (image, of) in ImageId::numbered(&images) {
                let mut file_block = 0;
                for piece in of {
                    let Some((extent, at, preallocated, blocks)) = *piece else {
                        file_block += 1;
                        continue;
                    };
                    pieces.push(Reference { image, file_block, slot: Slot(extent * BLOCKS + at), blocks, extent: ExtentId(extent), preallocated });
                    file_block += blocks;
                }
            }
            let extent = |number: u32| Extent {
                address: u64::from(number) << 20,
                disk_bytes: bytes(BLOCKS),
                generation: 1,
                first_slot: Slot(number * BLOCKS),
                blocks: BLOCKS,
                class: PLAIN,
                pinned: None,
                compression_goal: None,
            };
            let facts = Facts::new((0..2).map(extent).collect(), pieces.iter().copied().collect(), 0);

            let mut expected = pieces;
            expected.sort_by_key(|one| (one.extent, one.image, one.file_block));
            expected.dedup_by(|next, last| {
                let follows = (next.extent, next.image, next.preallocated) == (last.extent, last.image, last.preallocated)
                    && next.file_block == last.file_block + last.blocks
                    && next.slot == last.slots().end;
                last.blocks += if follows { next.blocks } else { 0 };
                follows
            });
            let expected: BTreeSet<_> = expected.iter().map(key).collect();
            let found: Vec<Reference> = facts.references().collect();
            prop_assert_eq!(found.iter().map(key).collect::<BTreeSet<_>>(), expected);
            let mut mappings = BTreeMap::new();
            for extent in 0..2 {
                let of_extent: Vec<Reference> = facts.references_to(ExtentId(extent)).collect();
                prop_assert_eq!(of_extent.len(), facts.reference_count(ExtentId(extent)) as usize);
                for (mapping, images) in facts.mappings_to(ExtentId(extent)) {
                    prop_assert!(mappings.insert(*mapping, images).is_none());
                    prop_assert!(images.is_sorted() && !images.is_empty());
                }
                for slot in (extent * BLOCKS..(extent + 1) * BLOCKS).map(Slot) {
                    let over = of_extent.iter().filter(|one| !one.preallocated && one.slots().contains(&slot)).count();
                    prop_assert_eq!(facts.references_over(slot..slot + 1) as usize, over);
                    prop_assert!(facts.has_references_over(slot..slot + 1, over));
                    prop_assert!(!facts.has_references_over(slot..slot + 1, over + 1));
                }
            }
            for image in 0..u32::try_from(images.len()).unwrap() {
                let of_image: Vec<Reference> = facts.mappings_of(ImageId(image)).into_iter().map(|mapping| mapping.reference(ImageId(image))).collect();
                prop_assert!(of_image.is_sorted_by_key(|one| one.file_block));
                let expected = found.iter().filter(|one| one.image == ImageId(image));
                prop_assert_eq!(of_image.iter().map(key).collect::<BTreeSet<_>>(), expected.map(key).collect::<BTreeSet<_>>());
            }
        }
    }
}
