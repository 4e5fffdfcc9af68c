//! The block table: from a fingerprint to the slots that hold such a block.

use crate::block::Slot;
use crate::fingerprint::Fingerprints;

const NONE: u32 = u32::MAX;

/// Slots by fingerprint, chained: 13 to 17 bytes for each.
///
/// Where a pool has more slots than the table may hold, only fingerprints of a sample are entered and looked up. The sample is
/// chosen by the fingerprint itself, so that of two equal runs the same blocks are in it; matches grow from there in both
/// directions, block by block.
#[derive(Debug)]
pub(super) struct Table {
    heads: Vec<u32>,
    /// The slots, each with the entry that follows it in its chain. Nothing is ever taken out: the caller checks what a candidate
    /// is worth.
    entries: Vec<(Slot, u32)>,
    entries_max: usize,
    /// A bit for each of the fingerprints entered, shared with others: eight for each bucket. Most blocks are like no other, and
    /// this small table says so without a walk through the large ones.
    entered: Vec<u8>,
    /// Fingerprints are in the sample if so many bits of their hash are zero.
    sample_bits: u32,
}

impl Table {
    /// Slots entered for one fingerprint. One that more blocks share says too little: guests keep blocks whose checksums are
    /// alike though they differ, and long stretches of one pattern.
    const SLOTS_PER_FINGERPRINT: usize = 16;
    /// Slots of one machine that are entered beyond that: a guest that forges checksums of another's blocks fills the places that
    /// all share, and no more.
    const SLOTS_PER_MACHINE: usize = 2;
    /// Slots looked at for one question.
    const CANDIDATES_MAX: usize = 64;
    /// Entries looked at for one question, other fingerprints of the same bucket included: guests can fill buckets, too.
    const STEPS_MAX: usize = 1024;

    /// An empty table for so many slots, that holds so many of them at most.
    pub(super) fn new(slots: usize, slots_max: usize) -> Self {
        let entries_max = slots_max.clamp(16, NONE as usize - 1);
        let sample_bits = (0..20).find(|bits| slots >> bits <= entries_max).unwrap_or(20);
        let buckets = (slots >> sample_bits).clamp(16, entries_max).next_power_of_two();
        Self {
            heads: vec![NONE; buckets],
            entries: Vec::new(),
            entries_max,
            entered: vec![0; buckets],
            sample_bits,
        }
    }

    /// One fingerprint in so many can be looked up.
    pub(super) fn sampled(&self) -> u32 {
        1 << self.sample_bits
    }

    /// Whether blocks with this fingerprint are entered and looked up.
    pub(super) fn has(&self, fingerprint: u32) -> bool {
        self.sample_bits == 0 || hash(fingerprint) >> (32 - self.sample_bits) == 0
    }

    fn bucket(&self, fingerprint: u32) -> usize {
        hash(fingerprint) as usize & (self.heads.len() - 1)
    }

    /// The bit of a fingerprint: which byte, and its value there.
    fn bit(&self, fingerprint: u32) -> (usize, u8) {
        // Other bits of the hash than those that choose the bucket and the sample.
        let hash = hash(fingerprint.rotate_left(16)) as usize;
        ((hash >> 3) & (self.entered.len() - 1), 1 << (hash & 7))
    }

    fn may_have(&self, fingerprint: u32) -> bool {
        let (byte, bit) = self.bit(fingerprint);
        self.entered[byte] & bit != 0
    }

    /// The slots entered for a fingerprint, latest first.
    pub(super) fn candidates<'a>(
        &'a self,
        fingerprint: u32,
        fingerprints: &'a Fingerprints,
    ) -> impl Iterator<Item = Slot> + 'a {
        let mut at = if self.has(fingerprint) && self.may_have(fingerprint) {
            self.heads[self.bucket(fingerprint)]
        } else {
            NONE
        };
        std::iter::from_fn(move || {
            let (slot, next) = *self.entries.get(at as usize)?;
            at = next;
            Some(slot)
        })
        .take(Self::STEPS_MAX)
        .filter(move |slot| fingerprints.get(*slot) == fingerprint)
        .take(Self::CANDIDATES_MAX)
    }

    /// Enters a slot, unless its fingerprint has enough of them.
    pub(super) fn enter<M: PartialEq>(
        &mut self,
        slot: Slot,
        fingerprints: &Fingerprints,
        machine_of: impl Fn(Slot) -> M,
    ) {
        let fingerprint = fingerprints.get(slot);
        if !self.has(fingerprint) || self.entries.len() >= self.entries_max {
            return;
        }
        let mut alike = 0;
        for candidate in self.candidates(fingerprint, fingerprints) {
            if candidate == slot {
                return;
            }
            alike += 1;
        }
        if alike >= Self::SLOTS_PER_FINGERPRINT {
            let machine = machine_of(slot);
            let of_it = self
                .candidates(fingerprint, fingerprints)
                .filter(|other| machine_of(*other) == machine);
            if alike >= Self::CANDIDATES_MAX || of_it.take(Self::SLOTS_PER_MACHINE).count() == Self::SLOTS_PER_MACHINE {
                return;
            }
        }
        let (byte, bit) = self.bit(fingerprint);
        self.entered[byte] |= bit;
        let bucket = self.bucket(fingerprint);
        let entry = u32::try_from(self.entries.len()).unwrap_or(NONE);
        self.entries.push((slot, self.heads[bucket]));
        self.heads[bucket] = entry;
    }
}

/// Spreads a fingerprint over 32 bits (the finalizer of `MurmurHash3`): the upper bits choose the sample, the lower the bucket.
fn hash(fingerprint: u32) -> u32 {
    let h = (fingerprint ^ (fingerprint >> 16)).wrapping_mul(0x85eb_ca6b);
    let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}
