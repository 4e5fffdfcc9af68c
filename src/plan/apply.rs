//! What a pool would be once a layout is carried out.

use super::donor_bytes;
use super::layout::{Final, Layout};
use crate::block::Slot;
use crate::facts::{Extent, Facts, Reference};

/// A pool as it would be, and where its parts come from.
#[derive(Debug)]
pub struct Applied {
    /// What would be known of it. Donors have addresses beyond all others.
    pub facts: Facts,
    /// For each slot, which slot it was: of a donor's block, the one it is copied from.
    pub origin: Vec<Slot>,
    /// For each extent but the donors', which follow, which extent it was.
    pub kept: Vec<u32>,
}

/// Carries a layout out on paper.
pub fn apply(facts: &Facts, layout: &Layout) -> Applied {
    let (mut extents, mut origin, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    let mut new_place = vec![u32::MAX; facts.extents.len()];
    let mut slot = 0;
    for (old, extent) in (0u32..).zip(&facts.extents).filter(|(old, _)| !layout.is_gone(*old)) {
        new_place[old as usize] = u32::try_from(kept.len()).unwrap_or(u32::MAX);
        kept.push(old);
        origin.extend(extent.slots());
        extents.push(Extent {
            first_slot: slot,
            ..extent.clone()
        });
        slot += extent.blocks;
    }
    let mut address = facts.extents.last().map_or(0, |last| last.address + last.disk_bytes);
    let first_donor = extents.len();
    for donor in layout.donors() {
        let disk_bytes = donor_bytes(donor.class, donor.blocks, donor.share_bytes);
        extents.push(Extent {
            address,
            disk_bytes,
            generation: u64::MAX,
            first_slot: slot,
            blocks: donor.blocks,
            class: donor.class,
            pinned: None,
        });
        origin.extend(donor.pieces.iter().cloned().flatten());
        address += disk_bytes;
        slot += donor.blocks;
    }
    let references = facts.references.iter().flat_map(|reference| {
        if let Some(extent) = Some(new_place[reference.extent as usize]).filter(|extent| *extent != u32::MAX) {
            let slot = extents[extent as usize].first_slot
                + (reference.slot - facts.extents[reference.extent as usize].first_slot);
            return vec![Reference {
                slot,
                extent,
                ..*reference
            }];
        }
        if reference.preallocated {
            return Vec::new();
        }
        let pieces = layout
            .resolve_all(facts, reference.slots())
            .filter_map(|(piece, found)| {
                let (extent, offset) = match found {
                    Final::Hole => return None,
                    Final::Kept(slot) => {
                        let old = facts.extent_of(slot);
                        (new_place[old as usize], slot - facts.extents[old as usize].first_slot)
                    }
                    Final::Donor(donor, at) => (u32::try_from(first_donor).unwrap_or(u32::MAX) + donor, at),
                };
                Some(Reference {
                    image: reference.image,
                    file_block: reference.file_block + (piece.start - reference.slot),
                    slot: extents[extent as usize].first_slot + offset,
                    blocks: piece.end - piece.start,
                    extent,
                    preallocated: false,
                })
            });
        pieces.collect()
    });
    let references = references.collect();
    let mut after = Facts::new(extents, references, facts.zero_fingerprint);
    for (slot, old) in origin.iter().enumerate() {
        after.fingerprints[slot] = facts.fingerprints[*old as usize];
    }
    if !facts.proofs.is_empty() {
        let proved = (0u32..)
            .zip(&origin)
            .filter_map(|(slot, old)| Some((slot, *facts.proofs.get(old)?)));
        let proved: Vec<_> = proved.collect();
        after.add_proofs(proved);
    }
    Applied {
        facts: after,
        origin,
        kept,
    }
}
