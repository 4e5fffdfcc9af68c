//! The *planned pool*: the pool as it would be once a layout was carried out.

use super::layout::{BlockDestination, Layout};
use crate::block::bytes;
use crate::facts::{Extent, Facts, Mapping, PackedExtents, PackedMappings, Proof, Proofs};
use crate::fingerprint::Fingerprints;
use crate::numbers::{ExtentId, Slot};
use crate::spill::SpillVec;

/// A planned pool, where its slots and extents come from, and what was packed of the pool as it is so that both fit into memory.
#[derive(Debug)]
pub struct PlannedPool {
    /// Its facts. Donors have addresses beyond those of all other extents.
    pub facts: Facts,
    origins: Origins,
    extents: PackedExtents,
    mappings: PackedMappings,
    proofs: SpillVec<(Slot, Proof)>,
    /// Whether its fingerprints lie in [`Facts::planned_fingerprints`] of the pool as it is.
    has_file: bool,
}

/// Where the slots and extents of a planned pool come from.
#[derive(Debug)]
pub struct Origins {
    slots: SlotOrigins,
    /// For each extent of the planned pool, its place in the pool as it is, or [`Origins::NEW`].
    kept: SpillVec<ExtentId>,
}

impl Origins {
    /// Stands for no extent of the pool as it is.
    const NEW: ExtentId = ExtentId(u32::MAX);

    /// The slot of the pool as it is that a slot stands for: for a donor, the slot that its block is copied from.
    pub fn slot(&self, slot: Slot) -> Slot {
        self.slots.of(slot)
    }

    /// The extent of the pool as it is that an extent stands for. None for donors, and for the parts that stay of an extent of
    /// which another part goes.
    pub fn extent(&self, extent: ExtentId) -> Option<ExtentId> {
        Some(self.kept[extent.index()]).filter(|extent| *extent != Self::NEW)
    }
}

impl PlannedPool {
    /// Where its slots and extents come from.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }

    /// Gives back to `facts` all that [`apply`] took from it.
    pub fn undo(self, facts: &mut Facts) -> Origins {
        let Facts { fingerprints, .. } = self.facts;
        facts.planned_fingerprints = self.has_file.then_some(fingerprints);
        facts.unpack(&self.extents, self.mappings);
        facts.add_proofs(self.proofs);
        self.origins
    }
}

/// Where slots come from, range by range.
#[derive(Debug)]
struct SlotOrigins {
    /// They cover the slots of the planned pool, and are in the order of these.
    runs: SpillVec<SlotOrigin>,
}

/// A range of slots of the planned pool, and the slots of the present pool whose content it has.
#[derive(Debug, Clone, Copy)]
struct SlotOrigin {
    /// First slot in the planned pool.
    new: Slot,
    /// First slot in the present pool.
    old: Slot,
    blocks: u32,
}

impl SlotOrigins {
    fn push(&mut self, old: std::ops::Range<Slot>) {
        let blocks = old.end - old.start;
        if let Some(last) = self.runs.last_mut()
            && last.old + last.blocks == old.start
        {
            last.blocks += blocks;
            return;
        }
        let new = self.runs.last().map_or(Slot(0), |last| last.new + last.blocks);
        let old = old.start;
        self.runs.push(SlotOrigin { new, old, blocks });
    }

    /// The slot that `slot` stands for.
    fn of(&self, slot: Slot) -> Slot {
        let after = self.runs.partition_point(|run| run.new <= slot);
        let SlotOrigin { new, old, .. } = self.runs[after - 1];
        old + (slot - new)
    }

    /// A function that finds the new slot for an old one; none if there is none. Making it takes time, calling it takes little.
    fn inverse(&self) -> impl Fn(Slot) -> Option<Slot> + use<> {
        let mut by_old = self.runs.clone();
        by_old.sort_unstable_by_key(|run| run.old);
        move |slot| {
            let after = by_old.partition_point(|run| run.old <= slot);
            let SlotOrigin { new, old, blocks } = by_old[after.checked_sub(1)?];
            (slot < old + blocks).then(|| new + (slot - old))
        }
    }
}

/// The extents of a planned pool.
struct PlannedExtents {
    extents: SpillVec<Extent>,
    origin: SlotOrigins,
    kept: SpillVec<ExtentId>,
    /// For each extent of the pool as it is, its place in the planned pool; [`Origins::NEW`] if it goes.
    new_place: SpillVec<ExtentId>,
    /// The place of the first donor; the others follow it.
    first_donor: ExtentId,
}

impl PlannedExtents {
    fn of(facts: &Facts, layout: &Layout) -> Self {
        let budget = facts.budget();
        let mut all = Self {
            extents: SpillVec::with_capacity_in(facts.extents.len(), budget),
            kept: SpillVec::with_capacity_in(facts.extents.len(), budget),
            new_place: SpillVec::with_capacity_in(facts.extents.len(), budget),
            origin: SlotOrigins {
                runs: SpillVec::new_in(budget),
            },
            first_donor: ExtentId::default(),
        };
        let mut slot = Slot(0);
        for (old, extent) in ExtentId::numbered(&facts.extents) {
            if layout.is_gone(old) {
                all.new_place.push(Origins::NEW);
                for piece in layout.stays_of(facts, old) {
                    let blocks = piece.end - piece.start;
                    let stays = Extent {
                        address: extent.address + bytes(piece.start - extent.first_slot),
                        disk_bytes: bytes(blocks),
                        first_slot: slot,
                        blocks,
                        ..extent.clone()
                    };
                    all.push(stays, Origins::NEW, std::slice::from_ref(&piece));
                    slot += blocks;
                }
                continue;
            }
            let place = all.next();
            all.new_place.push(place);
            let moved = Extent {
                first_slot: slot,
                ..extent.clone()
            };
            all.push(moved, old, &[extent.slots()]);
            slot += extent.blocks;
        }
        all.first_donor = all.next();
        let mut address = facts.extents.last().map_or(0, |last| last.address + last.disk_bytes);
        for donor in layout.donors() {
            let disk_bytes = donor.disk_bytes;
            let written = Extent {
                address,
                disk_bytes,
                generation: super::PLANNED_GENERATION,
                first_slot: slot,
                blocks: donor.blocks,
                class: donor.class,
                pinned: None,
                compression_goal: None,
            };
            all.push(written, Origins::NEW, layout.pieces_of(donor));
            address += disk_bytes;
            slot += donor.blocks;
        }
        all
    }

    /// The mappings that take the place of one: the same range of an extent that stays, or, of an extent that goes, where each
    /// piece ends up. `new_of` finds the new slot for an old one.
    fn mapped(
        &self,
        facts: &Facts,
        layout: &Layout,
        new_of: &impl Fn(Slot) -> Option<Slot>,
        mapping: Mapping,
    ) -> Vec<Mapping> {
        let first_slot = |extent: ExtentId| self.extents[extent.index()].first_slot;
        if let Some(extent) = Some(self.new_place[mapping.extent.index()]).filter(|extent| *extent != Origins::NEW) {
            let offset = mapping.slot - facts.extents[mapping.extent.index()].first_slot;
            return vec![Mapping {
                extent,
                slot: first_slot(extent) + offset,
                ..mapping
            }];
        }
        if mapping.preallocated {
            return Vec::new();
        }
        let pieces = layout.resolve_all(facts, mapping.slots());
        let pieces = pieces.filter_map(|(piece, found)| {
            let (extent, slot) = match found {
                BlockDestination::Hole => return None,
                BlockDestination::Kept(slot) => {
                    let new = new_of(slot)?;
                    let extent = self.extents.partition_point(|extent| extent.first_slot <= new) - 1;
                    (ExtentId::at(extent), new)
                }
                BlockDestination::Donor { extent, block } => {
                    let extent = ExtentId(self.first_donor.0 + extent.0);
                    (extent, first_slot(extent) + block)
                }
            };
            Some(Mapping {
                file_block: mapping.file_block + (piece.start - mapping.slot),
                slot,
                blocks: piece.end - piece.start,
                extent,
                preallocated: false,
            })
        });
        pieces.collect()
    }

    /// The place of the next extent.
    fn next(&self) -> ExtentId {
        ExtentId::at(self.extents.len())
    }

    fn push(&mut self, extent: Extent, kept: ExtentId, pieces: &[std::ops::Range<Slot>]) {
        self.extents.push(extent);
        self.kept.push(kept);
        for piece in pieces {
            self.origin.push(piece.clone());
        }
    }
}

/// Makes the planned pool of a layout. There is memory for one pool only: the extents, mappings and proofs of `facts` are packed
/// and missing from it until [`PlannedPool::undo`].
pub fn apply(facts: &mut Facts, layout: &Layout) -> PlannedPool {
    let all = PlannedExtents::of(facts, layout);
    let new_of = all.origin.inverse();
    let packed_mappings = facts.pack_mappings();
    let facts_then = &*facts;
    let moved = packed_mappings.flat_map(&facts.extents, |mapping| {
        all.mapped(facts_then, layout, &new_of, mapping)
    });
    let packed_extents = facts.pack_extents();
    let PlannedExtents {
        extents,
        origin,
        kept,
        new_place,
        first_donor: _,
    } = all;
    drop(new_place);
    let mut after = Facts::new(extents, moved, facts.zero_fingerprint);
    after.frees_blocks = facts.frees_blocks;
    let file = facts.planned_fingerprints.take();
    let has_file = file.is_some();
    after.fingerprints = file.unwrap_or_else(|| Fingerprints::in_memory(after.slots() as usize));
    after.table_slots_max = facts.table_slots_max;
    after.machines.clone_from(&facts.machines);
    after.partial_blocks.clone_from(&facts.partial_blocks);
    for SlotOrigin { new, old, blocks } in origin.runs.iter().copied() {
        after
            .fingerprints
            .write(new, &facts.fingerprints.range(old..old + blocks));
    }
    let none = Proofs::new_in(facts.budget().clone());
    let proofs = std::mem::replace(&mut facts.proofs, none);
    let proofs: SpillVec<_> = SpillVec::from_iter_in(proofs, facts.budget());
    after.add_proofs(proofs.iter().filter_map(|(old, proof)| Some((new_of(*old)?, *proof))));
    PlannedPool {
        facts: after,
        origins: Origins { slots: origin, kept },
        extents: packed_extents,
        mappings: packed_mappings,
        proofs,
        has_file,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::ImageId;
    use crate::plan::tests::notation::{Pool, options, pools};
    use crate::range;
    use proptest::prelude::*;

    /// Disjoint ranges of slots in any order.
    fn ranges() -> impl Strategy<Value = Vec<std::ops::Range<Slot>>> {
        let lengths = prop::collection::vec((0u32..3, 1u32..5), 1..10);
        let ranges = lengths.prop_map(|lengths| {
            let mut end = 0;
            let mut next = |(gap, blocks)| {
                let start = end + gap;
                end = start + blocks;
                Slot::range(start..end)
            };
            lengths.into_iter().map(&mut next).collect::<Vec<_>>()
        });
        ranges.prop_shuffle()
    }

    fn disk_bytes(facts: &Facts) -> i64 {
        let bytes: u64 = facts.extents.iter().map(|extent| extent.disk_bytes).sum();
        i64::try_from(bytes).unwrap()
    }

    proptest! {
        /// Slots follow each other in the order in which ranges were put in, and each is found again by what it was.
        #[test]
        fn origins_lead_back(ranges in ranges()) {
            let mut origin = SlotOrigins {
                runs: SpillVec::default(),
            };
            for range in &ranges {
                origin.push(range.clone());
            }
            let slots: Vec<Slot> = ranges.into_iter().flat_map(range::each).collect();
            let new_of = origin.inverse();
            for (new, old) in range::from(Slot(0)).zip(&slots) {
                prop_assert_eq!((origin.of(new), new_of(*old)), (*old, Some(new)));
            }
            for old in (0..80).map(Slot).filter(|old| !slots.contains(old)) {
                prop_assert_eq!(new_of(old), None);
            }
        }

        /// A pool as it would be holds what it holds, in as many bytes less as the plan says.
        #[test]
        fn a_pool_as_it_would_be_reads_the_same(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            pool.prove_all();
            let plan = pool.plan(&options);
            let (texts, blocks, before) = (pool.texts(), pool.image_blocks(), disk_bytes(&pool.facts));
            let applied = apply(&mut pool.facts, &plan.layout);
            prop_assert_eq!(before - disk_bytes(&applied.facts), plan.freed_bytes());
            let mut slot = Slot(0);
            for extent in &applied.facts.extents {
                prop_assert_eq!(extent.first_slot, slot);
                slot = extent.slots().end;
            }
            prop_assert!(applied.facts.extents.is_sorted_by(|one, other| one.address < other.address));
            let content = |slot: Slot| pool.content[applied.origins().slot(slot).index()];
            for (image, text) in ImageId::numbered(texts) {
                let mapped = Pool::mapped(&applied.facts, image, blocks).into_iter();
                let text_after: String = mapped.map(|slot| slot.map_or('0', content)).collect();
                prop_assert_eq!(text_after, text);
            }
            for slot in range::each(applied.facts.all_slots()) {
                let origin = applied.origins().slot(slot);
                let fingerprint = if content(slot) == '0' { 0 } else { u32::from(content(slot).to_ascii_lowercase()) };
                prop_assert_eq!(applied.facts.fingerprints.get(slot), fingerprint);
                prop_assert_eq!(applied.facts.proofs.get(&slot).is_some(), true, "{} was {}", slot, origin);
            }
        }

        /// What an extent was is known of those that stay whole, and of no others.
        #[test]
        fn extents_that_stay_are_known_again(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            let plan = pool.plan(&options);
            let addresses: Vec<u64> = pool.facts.extents.iter().map(|extent| extent.address).collect();
            let stay: Vec<ExtentId> = ExtentId::numbered(&addresses).map(|(extent, _)| extent).filter(|extent| !plan.layout.is_gone(*extent)).collect();
            let applied = apply(&mut pool.facts, &plan.layout);
            let mut known = Vec::new();
            for (place, extent) in (0..).zip(&applied.facts.extents) {
                if let Some(was) = applied.origins().extent(ExtentId(place)) {
                    prop_assert_eq!(addresses[was.index()], extent.address);
                    known.push(was);
                }
            }
            prop_assert_eq!(known, stay);
        }

        #[test]
        fn undoing_leaves_everything_as_it_was(text in pools(), options in options(), frees_blocks: bool) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            pool.prove_all();
            let plan = pool.plan(&options);
            let state = |facts: &Facts| {
                let mut proofs: Vec<_> = facts.proofs.iter().collect();
                proofs.sort();
                let references: Vec<_> = facts.references().collect();
                format!("{:?} {references:?} {proofs:?} {:?}", facts.extents, facts.fingerprints)
            };
            let before = state(&pool.facts);
            let applied = apply(&mut pool.facts, &plan.layout);
            prop_assert!(pool.facts.extents.is_empty() && pool.facts.proofs.is_empty());
            applied.undo(&mut pool.facts);
            prop_assert_eq!(state(&pool.facts), before);
        }
    }

    #[test]
    fn where_there_is_a_file_for_fingerprints_it_is_used_again() {
        let text = "
            A  abcdefgh
            B  klmnabcdefgh
            C  opklmnabcdefghop
            one    A
            two    B
            three  C C";
        let planned = |pool: &mut Pool| format!("{:?}", pool.plan(&crate::plan::PlanOptions::default()));
        let expected = planned(&mut Pool::of(text));
        let folder = tempfile::tempdir().unwrap();
        let budget = crate::spill::Budget::new(0, folder.path().to_owned());
        let mut pool = Pool::of(text);
        let slots = pool.facts.slots() as usize;
        pool.facts.planned_fingerprints = Some(Fingerprints::in_file(slots, &budget).unwrap());
        assert_eq!(planned(&mut pool), expected);
        let file = pool.facts.planned_fingerprints.unwrap();
        // What was looked at last lies in it.
        assert_eq!(file.len(), slots);
        assert!(
            file.range(Slot::range(0..4))
                .iter()
                .any(|fingerprint| *fingerprint != 0)
        );
    }
}
