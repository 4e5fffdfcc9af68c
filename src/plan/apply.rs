//! What a pool would be once a layout is carried out.

use super::layout::{Final, Layout};
use crate::block::{Slot, bytes};
use crate::facts::{Extent, Facts, Mapping, PackedExtents, PackedMappings, Proof};
use crate::fingerprint::Fingerprints;
use crate::spill::SpillVec;

/// A pool as it would be, and where its parts come from.
#[derive(Debug)]
pub struct Applied {
    /// What would be known of it. Donors have addresses beyond all others.
    pub facts: Facts,
    origins: Origins,
    extents: PackedExtents,
    mappings: PackedMappings,
    proofs: SpillVec<(Slot, Proof)>,
    /// Whether its fingerprints lie in [`Facts::planned_fingerprints`] of the pool as it is.
    has_file: bool,
}

/// Where the parts of a pool as it would be come from.
#[derive(Debug)]
pub struct Origins {
    slots: Origin,
    /// For each extent, which one it was, or [`Origins::NEW`].
    kept: SpillVec<u32>,
}

impl Origins {
    /// No extent there was.
    const NEW: u32 = u32::MAX;

    /// Which slot a slot was: of a donor's block, the one it is copied from.
    pub fn slot(&self, slot: Slot) -> Slot {
        self.slots.of(slot)
    }

    /// Which extent an extent was. None for donors, and for what stays of extents that part of goes.
    pub fn extent(&self, extent: u32) -> Option<u32> {
        Some(self.kept[extent as usize]).filter(|extent| *extent != Self::NEW)
    }
}

impl Applied {
    /// Where its parts come from.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }

    /// Gives back to `facts` what was taken from it.
    pub fn undo(self, facts: &mut Facts) -> Origins {
        let Facts { fingerprints, .. } = self.facts;
        facts.planned_fingerprints = self.has_file.then_some(fingerprints);
        facts.bring_back(&self.extents, self.mappings);
        facts.add_proofs(self.proofs);
        self.origins
    }
}

/// Where slots come from, run by run.
#[derive(Debug, Default)]
struct Origin {
    /// First slot, first slot there was, blocks; by the first.
    runs: SpillVec<(Slot, Slot, u32)>,
}

impl Origin {
    fn push(&mut self, old: std::ops::Range<Slot>) {
        if let Some((_, first, blocks)) = self.runs.last_mut()
            && *first + *blocks == old.start
        {
            *blocks += old.end - old.start;
            return;
        }
        let new = self.runs.last().map_or(0, |(new, _, blocks)| new + blocks);
        self.runs.push((new, old.start, old.end - old.start));
    }

    /// The slot that `slot` was.
    fn of(&self, slot: Slot) -> Slot {
        let after = self.runs.partition_point(|(new, ..)| *new <= slot);
        let (new, old, _) = self.runs[after - 1];
        old + (slot - new)
    }

    /// The slot that `old` is now, for many of them.
    fn inverse(&self) -> impl Fn(Slot) -> Option<Slot> + use<> {
        let mut by_old = self.runs.clone();
        by_old.sort_unstable_by_key(|(_, old, _)| *old);
        move |slot| {
            let after = by_old.partition_point(|(_, old, _)| *old <= slot);
            let (new, old, blocks) = by_old[after.checked_sub(1)?];
            (slot < old + blocks).then(|| new + (slot - old))
        }
    }
}

/// The extents that there would be.
#[derive(Default)]
struct After {
    extents: SpillVec<Extent>,
    origin: Origin,
    kept: SpillVec<u32>,
    /// For each extent that there was, its new place; `u32::MAX` if it is gone.
    new_place: SpillVec<u32>,
    /// The place of the first donor.
    first_donor: u32,
}

impl After {
    fn of(facts: &Facts, layout: &Layout) -> Self {
        let mut all = Self {
            extents: SpillVec::with_capacity(facts.extents.len()),
            kept: SpillVec::with_capacity(facts.extents.len()),
            new_place: SpillVec::with_capacity(facts.extents.len()),
            ..Self::default()
        };
        let mut slot = 0;
        for (old, extent) in (0u32..).zip(&facts.extents) {
            if layout.is_gone(old) {
                all.new_place.push(u32::MAX);
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
            let place = all.len();
            all.new_place.push(place);
            let moved = Extent {
                first_slot: slot,
                ..extent.clone()
            };
            all.push(moved, old, &[extent.slots()]);
            slot += extent.blocks;
        }
        all.first_donor = all.len();
        let mut address = facts.extents.last().map_or(0, |last| last.address + last.disk_bytes);
        for donor in layout.donors() {
            let disk_bytes = donor.disk_bytes;
            let written = Extent {
                address,
                disk_bytes,
                generation: u64::MAX,
                first_slot: slot,
                blocks: donor.blocks,
                class: donor.class,
                pinned: None,
                recoding: None,
            };
            all.push(written, Origins::NEW, layout.pieces_of(donor));
            address += disk_bytes;
            slot += donor.blocks;
        }
        all
    }

    fn len(&self) -> u32 {
        u32::try_from(self.extents.len()).unwrap_or(u32::MAX)
    }

    fn push(&mut self, extent: Extent, kept: u32, pieces: &[std::ops::Range<Slot>]) {
        self.extents.push(extent);
        self.kept.push(kept);
        for piece in pieces {
            self.origin.push(piece.clone());
        }
    }
}

/// Carries a layout out on paper. There is room for one pool only: of `facts`, the extents, mappings and proofs are gone until
/// [`Applied::undo`].
pub fn apply(facts: &mut Facts, layout: &Layout) -> Applied {
    let After {
        extents,
        origin,
        kept,
        new_place,
        first_donor,
    } = After::of(facts, layout);
    let new_of = origin.inverse();
    let aside = facts.set_mappings_aside();
    let facts_then = &*facts;
    let moved = aside.flat_map(&facts.extents, |mapping| {
        if let Some(extent) = Some(new_place[mapping.extent as usize]).filter(|extent| *extent != u32::MAX) {
            let slot = extents[extent as usize].first_slot
                + (mapping.slot - facts_then.extents[mapping.extent as usize].first_slot);
            return vec![Mapping {
                extent,
                slot,
                ..mapping
            }];
        }
        if mapping.preallocated {
            return Vec::new();
        }
        let pieces = layout
            .resolve_all(facts_then, mapping.slots())
            .filter_map(|(piece, found)| {
                let (extent, offset) = match found {
                    Final::Hole => return None,
                    Final::Kept(slot) => {
                        let new = new_of(slot)?;
                        let extent = extents.partition_point(|extent| extent.first_slot <= new) - 1;
                        (
                            u32::try_from(extent).unwrap_or(u32::MAX),
                            new - extents[extent].first_slot,
                        )
                    }
                    Final::Donor(donor, at) => (first_donor + donor, at),
                };
                Some(Mapping {
                    file_block: mapping.file_block + (piece.start - mapping.slot),
                    slot: extents[extent as usize].first_slot + offset,
                    blocks: piece.end - piece.start,
                    extent,
                    preallocated: false,
                })
            });
        pieces.collect()
    });
    let packed = facts.set_extents_aside();
    drop(new_place);
    let mut after = Facts::new(extents, moved, facts.zero_fingerprint);
    after.frees_blocks = facts.frees_blocks;
    let file = facts.planned_fingerprints.take();
    let has_file = file.is_some();
    after.fingerprints = file.unwrap_or_else(|| Fingerprints::in_memory(after.slots() as usize));
    after.table_slots_max = facts.table_slots_max;
    after.machines.clone_from(&facts.machines);
    for (new, old, blocks) in &origin.runs {
        after
            .fingerprints
            .write(*new, &facts.fingerprints.range(*old..old + blocks));
    }
    let proofs: SpillVec<_> = std::mem::take(&mut facts.proofs).into_iter().collect();
    after.add_proofs(proofs.iter().filter_map(|(old, proof)| Some((new_of(*old)?, *proof))));
    Applied {
        facts: after,
        origins: Origins { slots: origin, kept },
        extents: packed,
        mappings: aside,
        proofs,
        has_file,
    }
}
