//! Reads blocks and proves what they hold, where a fingerprint is not proof enough.

use super::{Filesystem, SourceFile};
use crate::block::{BLOCK_LEN, bytes};
use crate::error::{Error, Result};
use crate::facts::{Facts, Proof, proof_of};
use crate::monitor::Monitor;
use crate::numbers::{ImageId, Slot};
use crate::spill::SpillVec;

/// Blocks to read that lie near each other in an image, in the order of their slots.
struct Stretch<'a> {
    image: ImageId,
    /// The image's block at the first slot.
    first_block: u32,
    /// The slots to read, at least one.
    slots: &'a [Slot],
}

impl Stretch<'_> {
    fn file(&self) -> SourceFile {
        SourceFile::Image(self.image)
    }

    fn last_slot(&self) -> Slot {
        self.slots[self.slots.len() - 1]
    }

    /// Its length in blocks, those between wanted ones included.
    fn blocks(&self) -> u32 {
        self.last_slot() - self.slots[0] + 1
    }

    fn offset(&self) -> u64 {
        bytes(self.first_block)
    }

    fn length(&self) -> u64 {
        bytes(self.blocks())
    }
}

/// Reads blocks and returns a proof of the content of each. Blocks that lie near each other are read together.
///
/// # Errors
/// Returns [`Error::Metadata`] if no image reaches a block, and [`Error::Interrupted`] if the user stopped the run.
pub fn prove_slots(
    fs: &dyn Filesystem,
    facts: &Facts,
    slots: &[Slot],
    monitor: &dyn Monitor,
) -> Result<SpillVec<(Slot, Proof)>> {
    use rayon::prelude::*;
    /// Blocks that one thread asks for before it reads the first: a device reads scattered blocks best if it knows of many.
    const AHEAD: usize = 512;
    /// Blocks whose proofs are in memory before they go to the list, which may lie in a file.
    const AT_ONCE: usize = 128 * AHEAD;
    let read_all = |slots: &[Slot]| -> Result<Vec<(Slot, Proof)>> {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let stretches = stretches(fs, facts, slots)?;
        for stretch in &stretches {
            fs.read_ahead(stretch.file(), stretch.offset(), stretch.length());
        }
        let mut proofs = Vec::with_capacity(slots.len());
        let mut buffer = Vec::new();
        for stretch in &stretches {
            prove_stretch(fs, stretch, &mut buffer, &mut proofs);
        }
        Ok(proofs)
    };
    let mut proofs = SpillVec::with_capacity_in(slots.len(), facts.budget());
    for slots in slots.chunks(AT_ONCE) {
        let read: Result<Vec<Vec<_>>> = slots.par_chunks(AHEAD).map(read_all).collect();
        proofs.extend(read?.into_iter().flatten());
    }
    Ok(proofs)
}

/// Joins the places of blocks to stretches.
fn stretches<'a>(fs: &dyn Filesystem, facts: &Facts, slots: &'a [Slot]) -> Result<Vec<Stretch<'a>>> {
    /// Unwanted blocks between two wanted ones at most: reading more takes longer than another call.
    const GAP_BLOCKS_MAX: u32 = 8;
    /// Blocks of a stretch at most, 1 MiB.
    const BLOCKS_MAX: u32 = 256;
    let mut stretches: Vec<Stretch<'a>> = Vec::new();
    for (at, slot) in slots.iter().enumerate() {
        let place = facts.place_of(*slot..*slot + 1).ok_or_else(|| Error::Metadata {
            path: fs.folder().to_owned(),
            problem: format!("no image reaches block {slot}"),
        })?;
        if let Some(last) = stretches.last_mut() {
            let end = last.first_block + last.blocks();
            let is_near = last.image == place.image
                && *slot > last.last_slot()
                && place.file_block.checked_sub(last.first_block) == slot.checked_sub(last.slots[0])
                && place.file_block - end <= GAP_BLOCKS_MAX
                && place.file_block - last.first_block < BLOCKS_MAX;
            if is_near {
                last.slots = &slots[at - last.slots.len()..=at];
                continue;
            }
        }
        stretches.push(Stretch {
            image: place.image,
            first_block: place.file_block,
            slots: &slots[at..=at],
        });
    }
    Ok(stretches)
}

fn prove_stretch(fs: &dyn Filesystem, stretch: &Stretch<'_>, buffer: &mut Vec<u8>, proofs: &mut Vec<(Slot, Proof)>) {
    let blocks = stretch.blocks() as usize;
    buffer.resize(blocks * BLOCK_LEN, 0);
    let first = stretch.slots[0];
    if fs.read(stretch.file(), stretch.offset(), buffer).is_ok() {
        proofs.extend(stretch.slots.iter().map(|slot| {
            let at = (*slot - first) as usize * BLOCK_LEN;
            (*slot, proof_of(&buffer[at..at + BLOCK_LEN]))
        }));
        return;
    }
    for slot in stretch.slots {
        let block = &mut buffer[..BLOCK_LEN];
        let read = fs.read(stretch.file(), stretch.offset() + bytes(*slot - first), block);
        // A block that cannot be read gets a proof that equals no other.
        proofs.push((
            *slot,
            read.map_or_else(|_| proof_of(&slot.0.to_le_bytes()), |()| proof_of(block)),
        ));
    }
}
