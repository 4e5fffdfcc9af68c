//! Extents and mappings in packed form, which takes a fifth of their memory or less, while a plan looks at the planned pool.

use std::collections::HashMap;

use super::shared::ImageSets;
use super::{Class, CompressionGoal, Extent, Facts, Mapping, PinReason, SharedList};
use crate::block::bytes;
use crate::codec::{Decoder, put_varint, put_zigzag};
use crate::numbers::{ExtentId, ImageSetId, Slot};
use crate::spill::SpillVec;

/// The properties that many extents have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct ExtentKind {
    class: Class,
    pinned: Option<PinReason>,
    compression_goal: Option<CompressionGoal>,
}

/// Extents as differences from the one before. They never leave memory, so that nothing in them can be wrong.
#[derive(Debug)]
pub(crate) struct PackedExtents {
    packed: SpillVec<u8>,
    count: usize,
    kinds: Vec<ExtentKind>,
}

/// Mappings as differences from the one before, and from their extents.
#[derive(Debug)]
pub(crate) struct PackedMappings {
    packed: SpillVec<u8>,
    count: usize,
    sets: ImageSets,
}

impl Facts {
    /// Takes out all mappings and packs them. Until [`Facts::unpack`] there are none.
    pub(crate) fn pack_mappings(&mut self) -> PackedMappings {
        let packed = PackedMappings::of(std::mem::take(&mut self.mappings), &self.extents);
        self.first_mapping = SpillVec::default();
        self.cover = SpillVec::default();
        packed
    }

    /// Takes out all extents and packs them, after [`Facts::pack_mappings`].
    pub(crate) fn pack_extents(&mut self) -> PackedExtents {
        let packed = PackedExtents::of(&self.extents);
        self.extents = SpillVec::new_in(self.budget());
        packed
    }

    /// Puts back what was packed.
    pub(crate) fn unpack(&mut self, extents: &PackedExtents, mappings: PackedMappings) {
        self.extents = extents.unpack();
        self.mappings.list = SpillVec::with_capacity_in(mappings.count, self.budget());
        self.mappings.list.extend(mappings.unpack(&self.extents));
        self.mappings.sets = mappings.sets;
        self.arrange();
    }
}

impl PackedExtents {
    fn of(extents: &SpillVec<Extent>) -> Self {
        let (mut packed, mut record, mut kinds) = (SpillVec::new_in(extents.budget()), Vec::new(), Vec::new());
        let mut numbers: HashMap<ExtentKind, usize> = HashMap::new();
        let (mut address, mut generation, mut slot) = (0, 0, Slot(0));
        for extent in extents {
            let kind = ExtentKind {
                class: extent.class,
                pinned: extent.pinned,
                compression_goal: extent.compression_goal,
            };
            let number = *numbers.entry(kind).or_insert_with(|| {
                kinds.push(kind);
                kinds.len() - 1
            });
            record.clear();
            put_varint(&mut record, number as u64);
            put_varint(&mut record, u64::from(extent.blocks));
            put_zigzag(&mut record, extent.address.wrapping_sub(address).cast_signed());
            let usual = bytes(extent.blocks);
            put_zigzag(&mut record, extent.disk_bytes.wrapping_sub(usual).cast_signed());
            put_zigzag(&mut record, extent.generation.wrapping_sub(generation).cast_signed());
            put_zigzag(&mut record, difference(extent.first_slot.0, slot.0));
            packed.extend_from_slice(&record);
            address = extent.address.wrapping_add(extent.disk_bytes);
            generation = extent.generation;
            slot = extent.slots().end;
        }
        packed.shrink_to_fit();
        Self {
            packed,
            count: extents.len(),
            kinds,
        }
    }

    fn unpack(&self) -> SpillVec<Extent> {
        let mut packed = Unpacker(Decoder::new(&self.packed));
        let (mut address, mut generation, mut slot) = (0u64, 0u64, Slot(0));
        let next = |_| {
            let ExtentKind {
                class,
                pinned,
                compression_goal,
            } = self.kinds[packed.number() as usize];
            let blocks = packed.number();
            address = address.wrapping_add_signed(packed.signed());
            let disk_bytes = bytes(blocks).wrapping_add_signed(packed.signed());
            generation = generation.wrapping_add_signed(packed.signed());
            let extent = Extent {
                address,
                disk_bytes,
                generation,
                first_slot: Slot(packed.after(slot.0)),
                blocks,
                class,
                pinned,
                compression_goal,
            };
            address = address.wrapping_add(disk_bytes);
            slot = extent.slots().end;
            extent
        };
        SpillVec::from_iter_in((0..self.count).map(next), self.packed.budget())
    }
}

impl PackedMappings {
    fn of(mappings: SharedList<Mapping>, extents: &[Extent]) -> Self {
        let (mut packed, mut record) = (SpillVec::new_in(mappings.budget()), Vec::new());
        let (mut last, mut last_set) = (Mapping::default(), ImageSetId(0));
        for (mapping, set) in &mappings.list {
            let extent = &extents[mapping.extent.index()];
            record.clear();
            put_varint(&mut record, u64::from(mapping.preallocated));
            put_varint(&mut record, u64::from(mapping.extent.0 - last.extent.0));
            put_zigzag(&mut record, difference(set.0, last_set.0));
            put_zigzag(&mut record, difference(mapping.file_block, last.file_block));
            put_varint(&mut record, u64::from(mapping.slot - extent.first_slot));
            put_zigzag(&mut record, difference(mapping.blocks, extent.blocks));
            packed.extend_from_slice(&record);
            (last, last_set) = (*mapping, *set);
        }
        packed.shrink_to_fit();
        Self {
            packed,
            count: mappings.list.len(),
            sets: mappings.sets,
        }
    }

    /// Makes a list in which each mapping is replaced by others, for the same images; `extents` are those that the mappings were
    /// packed with.
    pub(crate) fn flat_map<I: IntoIterator<Item = Mapping>>(
        &self,
        extents: &[Extent],
        mut becomes: impl FnMut(Mapping) -> I,
    ) -> SharedList<Mapping> {
        let mut list = SpillVec::with_capacity_in(self.count, self.packed.budget());
        for (mapping, set) in self.unpack(extents) {
            list.extend(becomes(mapping).into_iter().map(|mapping| (mapping, set)));
        }
        SharedList {
            list,
            sets: self.sets.clone(),
        }
    }

    /// The mappings and the numbers of their sets, in order.
    fn unpack<'a>(&'a self, extents: &'a [Extent]) -> impl Iterator<Item = (Mapping, ImageSetId)> + 'a {
        let mut packed = Unpacker(Decoder::new(&self.packed));
        let (mut last, mut last_set) = (Mapping::default(), ImageSetId(0));
        (0..self.count).map(move |_| {
            let preallocated = packed.number() == 1;
            let extent = ExtentId(last.extent.0 + packed.number());
            last_set = ImageSetId(packed.after(last_set.0));
            let of = &extents[extent.index()];
            last = Mapping {
                extent,
                preallocated,
                file_block: packed.after(last.file_block),
                slot: of.first_slot + packed.number(),
                blocks: packed.after(of.blocks),
            };
            (last, last_set)
        })
    }
}

/// The difference of two numbers.
fn difference(number: u32, from: u32) -> i64 {
    i64::from(number) - i64::from(from)
}

/// Reads packed numbers.
struct Unpacker<'a>(Decoder<'a>);

impl Unpacker<'_> {
    fn signed(&mut self) -> i64 {
        self.0.zigzag().unwrap_or_default()
    }

    fn number(&mut self) -> u32 {
        self.0.varint32().unwrap_or_default()
    }

    /// The number that differs from another by what is read.
    fn after(&mut self, from: u32) -> u32 {
        u32::try_from(i64::from(from) + self.signed()).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{Compression, Reference};
    use crate::numbers::ImageId;
    use proptest::prelude::*;

    fn extent() -> impl Strategy<Value = (Extent, u64)> {
        let compression_goal = (any::<u16>(), any::<bool>()).prop_map(|(share, rewrites)| CompressionGoal {
            compression: Compression::Zstd,
            share,
            rewrites,
        });
        let numbers = (0u64..1 << 60, 0u64..1 << 40, any::<u64>(), 1u32..100_000, 0u32..3);
        let kind = (
            any::<bool>(),
            any::<u32>(),
            any::<bool>(),
            prop::option::of(compression_goal),
        );
        (numbers, kind).prop_map(
            |((gap, disk_bytes, generation, blocks, skipped), (checksummed, groups, pinned, compression_goal))| {
                let extent = Extent {
                    address: 0,
                    disk_bytes,
                    generation,
                    first_slot: Slot(skipped),
                    blocks,
                    class: Class {
                        checksummed,
                        compression: Compression::Lzo,
                        groups,
                    },
                    pinned: pinned.then_some(PinReason::HeldByOthers),
                    compression_goal,
                };
                (extent, gap >> 8)
            },
        )
    }

    proptest! {
        #[test]
        fn what_was_set_aside_comes_back(
            made in prop::collection::vec(extent(), 1..20),
            references in prop::collection::vec((any::<u32>(), any::<u32>(), any::<prop::sample::Index>(), any::<bool>()), 0..40),
        ) {
            let (mut extents, mut address, mut slot) = (SpillVec::default(), 0u64, Slot(0));
            for (mut extent, gap) in made {
                extent.address = address + gap;
                extent.first_slot = slot + extent.first_slot.0;
                address = extent.address + extent.disk_bytes;
                slot = extent.slots().end;
                extents.push(extent);
            }
            let references = references.into_iter().map(|(image, file_block, extent, preallocated)| {
                let place = extent.index(extents.len());
                let of = &extents[place];
                let skipped = image % of.blocks;
                Reference {
                    image: ImageId(image),
                    file_block: file_block / 2,
                    slot: of.first_slot + skipped,
                    blocks: of.blocks - skipped,
                    extent: ExtentId::at(place),
                    preallocated,
                }
            });
            let mut facts = Facts::new(extents.clone(), references.collect(), 0);
            let before = format!("{facts:?}");
            let mappings = facts.pack_mappings();
            let packed = facts.pack_extents();
            prop_assert!(facts.extents.is_empty() && facts.references().next().is_none());
            facts.unpack(&packed, mappings);
            prop_assert_eq!(before, format!("{facts:?}"));
        }
    }
}
