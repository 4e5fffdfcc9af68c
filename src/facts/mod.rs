//! What is known of a pool before anything is planned: extents, references, fingerprints. Plain data, no I/O.

mod aside;

use std::collections::HashMap;
use std::ops::Range;

pub(crate) use aside::{PackedExtents, PackedReferences};

use crate::block::{BLOCK_BYTES, Slot};
use crate::fingerprint::Fingerprints;

/// An image, by its place in the list of images a run works on.
pub type ImageId = u32;

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
    pub pinned: Option<Pinned>,
    /// How its blocks are to lie on disk once they are rewritten, if not as before.
    pub recoding: Option<Recoding>,
}

/// How blocks are to lie on disk, where someone asked for compression or for none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Recoding {
    /// What their donors are to be like.
    pub compression: Compression,
    /// Bytes on disk that are expected for each [`Recoding::WHOLE`] bytes of content.
    pub share: u16,
    /// Whether an extent is rewritten for that alone. Where it is not, it is known only what its blocks would become.
    pub rewrites: bool,
}

impl Recoding {
    /// The share of what is not compressed.
    pub const WHOLE: u16 = 1 << 15;
}

/// Why an extent cannot be eliminated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pinned {
    /// Something outside the given paths (another file, a snapshot) or an image that is left alone refers to it.
    HeldByOthers,
    /// It holds the last block of an image whose size is not a multiple of 4 KiB.
    UnalignedTail,
    /// A part of it is preallocated, and that is to stay so.
    Preallocated,
    /// An image refers to it whose extents cannot change.
    Fixed,
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
    pub fn is_recoded(&self) -> bool {
        self.recoding.is_some_and(|recoding| recoding.rewrites)
    }

    /// What a donor that takes over its blocks must be like.
    pub fn donor_class(&self) -> Class {
        Class {
            compression: self
                .recoding
                .map_or(self.class.compression, |recoding| recoding.compression),
            ..self.class
        }
    }

    /// Bytes on disk that `blocks` of its blocks are expected to take in a donor.
    pub fn donor_bytes(&self, blocks: u32) -> u64 {
        let whole = u64::from(blocks) * BLOCK_BYTES;
        match (self.donor_class().compression, self.recoding) {
            (Compression::None, _) => whole,
            (_, Some(recoding)) => whole * u64::from(recoding.share.min(Recoding::WHOLE)) / u64::from(Recoding::WHOLE),
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
    /// First block in the image.
    pub file_block: u32,
    /// First slot it maps.
    pub slot: Slot,
    /// Blocks.
    pub blocks: u32,
    /// Place of the extent in [`Facts::extents`].
    pub extent: u32,
    /// Whether the range is preallocated: it reads as zeros, whatever the extent holds there.
    pub preallocated: bool,
}

impl Reference {
    /// The slots it maps.
    pub fn slots(&self) -> Range<Slot> {
        self.slot..self.slot + self.blocks
    }

    /// Takes in a reference that follows this one in the image and in the extent. Whether the filesystem keeps one item or
    /// two for such a range depends on how it came about, and nothing may depend on that.
    fn absorb(&mut self, next: &Self) -> bool {
        let follows = (next.image, next.extent, next.preallocated) == (self.image, self.extent, self.preallocated)
            && next.file_block == self.file_block + self.blocks
            && next.slot == self.slots().end;
        if follows {
            self.blocks += next.blocks;
        }
        follows
    }
}

/// Everything that a plan follows from.
#[derive(Debug, Default)]
pub struct Facts {
    /// Extents by address; slots follow this order.
    pub extents: Vec<Extent>,
    /// References, by extent, then slot, then image and place in it.
    pub references: Vec<Reference>,
    /// For each extent, and one past the last, where its references begin.
    first_reference: Vec<u32>,
    /// Fingerprint of each slot's block; meaningless for slots that no reference reaches.
    pub fingerprints: Fingerprints,
    /// Fingerprint of a block of zeros.
    pub zero_fingerprint: u32,
    /// Strong hashes of the few blocks that were read because their fingerprint alone does not prove equality.
    pub proofs: HashMap<Slot, Proof>,
    /// How many slots a block table may hold; a pool with more is sampled.
    pub table_slots_max: usize,
    /// For each image, the number of the machine it belongs to; where there is none, each image is on its own.
    pub machines: Vec<u32>,
    /// Whether the filesystem frees each block on its own (XFS), not only extents as a whole (btrfs): then extents are only ranges
    /// of blocks that are alike in what may be done with them, and what of one is found elsewhere goes without the rest.
    pub frees_blocks: bool,
    /// For each slot range that is reachable, a reference to read it through; by slot, without overlap.
    cover: Vec<Cover>,
}

/// What a block was found to hold when it was read.
pub type Proof = [u8; 8];

/// A range of slots and the reference it is read through.
#[derive(Debug, Clone, Copy)]
struct Cover {
    slot: Slot,
    /// It covers to the end of this reference.
    reference: u32,
}

/// A place in an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The image.
    pub image: ImageId,
    /// First block in it.
    pub file_block: u32,
    /// Blocks that follow there and in the extent alike.
    pub blocks: u32,
}

impl Facts {
    /// Puts extents (by address, slots in that order) and references together; fingerprints are still to be filled in.
    pub fn new(mut extents: Vec<Extent>, mut references: Vec<Reference>, zero_fingerprint: u32) -> Self {
        references.sort_unstable_by_key(|r| (r.extent, r.image, r.file_block));
        references.dedup_by(|next, last| last.absorb(next));
        references.sort_unstable_by_key(|r| (r.extent, r.slot, r.image, r.file_block));
        // Both grew piece by piece, up to twice what they need, and stay for long.
        extents.shrink_to_fit();
        references.shrink_to_fit();
        let mut facts = Self {
            extents,
            references,
            first_reference: Vec::new(),
            fingerprints: Fingerprints::default(),
            table_slots_max: usize::MAX,
            machines: Vec::new(),
            frees_blocks: false,
            zero_fingerprint,
            proofs: HashMap::new(),
            cover: Vec::new(),
        };
        facts.arrange();
        facts
    }

    /// Finds out which references belong to which extent, and what they cover.
    fn arrange(&mut self) {
        let mut first_reference = Vec::with_capacity(self.extents.len() + 1);
        let mut cover: Vec<Cover> = Vec::with_capacity(self.extents.len());
        let mut at = 0;
        for (extent, this) in (0u32..).zip(&self.extents) {
            first_reference.push(u32::try_from(at).unwrap_or(u32::MAX));
            let mut covered = this.first_slot;
            while let Some(reference) = self.references.get(at).filter(|r| r.extent == extent) {
                let end = reference.slots().end;
                if !reference.preallocated && end > covered {
                    cover.push(Cover {
                        slot: covered.max(reference.slot),
                        reference: u32::try_from(at).unwrap_or(u32::MAX),
                    });
                    covered = end;
                }
                at += 1;
            }
        }
        first_reference.push(u32::try_from(at).unwrap_or(u32::MAX));
        cover.shrink_to_fit();
        self.first_reference = first_reference;
        self.cover = cover;
    }

    /// Slots in all.
    pub fn slots(&self) -> Slot {
        self.extents.last().map_or(0, |last| last.slots().end)
    }

    /// The references to one extent.
    pub fn references_to(&self, extent: u32) -> &[Reference] {
        let at = |extent: usize| self.first_reference.get(extent).copied().unwrap_or_default() as usize;
        &self.references[at(extent as usize)..at(extent as usize + 1)]
    }

    /// How many references map some of the slots, which are of one extent.
    pub fn references_over(&self, slots: Range<Slot>) -> u32 {
        u32::try_from(self.over(slots).count()).unwrap_or(u32::MAX)
    }

    /// Whether so many references, or more, map some of the slots, which are of one extent.
    pub fn has_references_over(&self, slots: Range<Slot>, count: usize) -> bool {
        self.over(slots).take(count).count() == count
    }

    /// The references that map some of the slots, which are of one extent.
    fn over(&self, slots: Range<Slot>) -> impl Iterator<Item = &Reference> {
        let references = self.references_to(self.extent_of(slots.start));
        // They are in the order of their slots, so that most of those are near the end of them.
        let before = references.partition_point(|reference| reference.slot < slots.end);
        references[..before]
            .iter()
            .rev()
            .filter(move |reference| !reference.preallocated && reference.slots().end > slots.start)
    }

    /// The extent that `slot` belongs to.
    pub fn extent_of(&self, slot: Slot) -> u32 {
        let after = self.extents.partition_point(|extent| extent.first_slot <= slot);
        u32::try_from(after.saturating_sub(1)).unwrap_or(u32::MAX)
    }

    fn end_of(&self, cover: Cover) -> Slot {
        self.references[cover.reference as usize].slots().end
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
    pub fn place_of(&self, slots: Range<Slot>) -> Option<Place> {
        let after = self.cover.partition_point(|cover| cover.slot <= slots.start);
        let cover = self.cover.get(after.checked_sub(1)?)?;
        let end = self.end_of(*cover).min(slots.end);
        let reference = self.references.get(cover.reference as usize)?;
        (slots.start < end).then(|| Place {
            image: reference.image,
            file_block: reference.file_block + (slots.start - reference.slot),
            blocks: end - slots.start,
        })
    }

    /// The same for a whole range, place after place.
    pub fn places_of(&self, slots: Range<Slot>) -> impl Iterator<Item = (Slot, Place)> + '_ {
        let mut at = slots.start;
        std::iter::from_fn(move || {
            let place = self.place_of(at..slots.end)?;
            let slot = at;
            at += place.blocks;
            Some((slot, place))
        })
    }

    /// The machine through whose image a slot is read.
    pub fn machine_of(&self, slot: Slot) -> Option<u32> {
        let image = self.place_of(slot..slot + 1)?.image;
        Some(self.machines.get(image as usize).copied().unwrap_or(image))
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

/// The strong hash of a block: the beginning of its BLAKE3, 64 bits, since it decides what is planned and not what is shared.
pub fn proof_of(block: &[u8]) -> Proof {
    let mut proof = Proof::default();
    proof.copy_from_slice(&blake3::hash(block).as_bytes()[..size_of::<Proof>()]);
    proof
}
