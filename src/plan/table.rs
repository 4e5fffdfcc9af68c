//! The block table: from a fingerprint to the slots that hold such a block.

use crate::block::{Slot, SlotSet};

const NONE: u32 = u32::MAX;

/// Slots by fingerprint, chained: four bytes for each slot and four to eight for its bucket.
#[derive(Debug)]
pub(super) struct Table {
    heads: Vec<u32>,
    next: Vec<u32>,
    /// What was entered; nothing is ever taken out, the caller checks what a candidate is worth.
    entered: SlotSet,
}

impl Table {
    /// Slots entered for one fingerprint. One that more blocks share says too little: guests keep blocks whose checksums are
    /// alike though they differ, and long stretches of one pattern.
    const SLOTS_PER_FINGERPRINT: usize = 16;
    /// Entries looked at for one question, other fingerprints of the same bucket included.
    const STEPS_MAX: usize = 64;

    pub(super) fn new(slots: usize) -> Self {
        let buckets = slots.max(16).next_power_of_two();
        Self {
            heads: vec![NONE; buckets],
            next: vec![NONE; slots],
            entered: SlotSet::new(slots),
        }
    }

    fn bucket(&self, fingerprint: u32) -> usize {
        (fingerprint.wrapping_mul(0x9e37_79b1) as usize) & (self.heads.len() - 1)
    }

    /// The slots entered for a fingerprint, latest first.
    pub(super) fn candidates<'a>(
        &'a self,
        fingerprint: u32,
        fingerprints: &'a [u32],
    ) -> impl Iterator<Item = Slot> + 'a {
        let mut at = self.heads[self.bucket(fingerprint)];
        std::iter::from_fn(move || {
            let slot = (at != NONE).then_some(at)?;
            at = self.next[slot as usize];
            Some(slot)
        })
        .take(Self::STEPS_MAX)
        .filter(move |slot| fingerprints[*slot as usize] == fingerprint)
    }

    /// Enters a slot, unless its fingerprint has enough of them.
    pub(super) fn enter(&mut self, slot: Slot, fingerprints: &[u32]) {
        let fingerprint = fingerprints[slot as usize];
        if self.entered.contains(slot)
            || self.candidates(fingerprint, fingerprints).count() >= Self::SLOTS_PER_FINGERPRINT
        {
            return;
        }
        let bucket = self.bucket(fingerprint);
        self.next[slot as usize] = self.heads[bucket];
        self.heads[bucket] = slot;
        self.entered.insert(slot);
    }
}
