//! The block table: from a fingerprint to the blocks that have it.

use std::marker::PhantomData;

use crate::fingerprint::Fingerprints;
use crate::numbers::Number;

/// The blocks that have a fingerprint. A block is known by its number, which is its slot in a pool or its store address. The blocks lie
/// in an open-addressed hash table of groups; all tags of a group are compared at once. The table takes [`BYTES_PER_BLOCK`] of memory for
/// each block.
///
/// Where there are more blocks than the table may hold, only a sample of the fingerprints is entered and looked up. A fingerprint
/// itself decides whether it belongs to the sample, so that of two equal runs the same blocks do; matches grow from those in both
/// directions, block by block.
#[derive(Debug)]
pub(super) struct BlockTable<N> {
    /// Eight bits of each fingerprint's hash, or [`EMPTY`]; a group is filled from its first place on. Most blocks are like no
    /// other, and the tags say so without a look at the fingerprints, which may be on disk.
    tags: Vec<[u8; GROUP]>,
    /// The numbers of the blocks, at the places of their tags. None is ever removed: the caller checks what a candidate is worth. They are
    /// bare, since a list of bare zeros takes memory only where it is written to.
    blocks: Vec<[u32; GROUP]>,
    /// A fingerprint belongs to the sample if so many upper bits of its hash are zero.
    sample_bits: u32,
    numbers: PhantomData<N>,
}

/// Places in a group.
const GROUP: usize = 16;
const EMPTY: u8 = 0;
/// Bytes of memory for each block that a table has room for: a number and a tag, and a quarter of the places free.
pub(super) const BYTES_PER_BLOCK: u64 = 7;
/// Blocks entered for one fingerprint. One that more blocks share says too little: guests keep blocks whose checksums are
/// alike though they differ, and long stretches of one pattern.
const BLOCKS_PER_FINGERPRINT: usize = 16;
/// Beyond those, each machine may enter as many: a guest that fills its disk with other guests' checksums keeps out nobody.
const BLOCKS_PER_MACHINE: usize = 2;
/// Greatest number of candidates for one fingerprint.
const CANDIDATES_MAX: usize = 64;
/// Groups that one search looks at, at most. Guests can choose fingerprints that fill one region of the table.
const STEPS_MAX: usize = 1024 / GROUP;

/// Returns 1 if a table with room for `blocks_max` of `blocks` blocks has every fingerprint, and n if it has one of n.
pub(super) fn sampled(blocks: usize, blocks_max: usize) -> u32 {
    1 << sample_bits(blocks, blocks_max)
}

impl<N: Number> BlockTable<N> {
    /// Makes an empty table for `blocks` blocks, which holds `blocks_max` of them at most.
    pub(super) fn new(blocks: usize, blocks_max: usize) -> Self {
        let sample_bits = sample_bits(blocks, blocks_max);
        let capacity = blocks >> sample_bits;
        let groups = (capacity + capacity / 4).div_ceil(GROUP) + 1;
        Self {
            tags: vec![[EMPTY; GROUP]; groups],
            blocks: vec![[0; GROUP]; groups],
            sample_bits,
            numbers: PhantomData,
        }
    }

    /// Whether blocks with this fingerprint are entered and looked up.
    pub(super) fn has(&self, fingerprint: u32) -> bool {
        self.sample_bits == 0 || hash(fingerprint) >> (32 - self.sample_bits) == 0
    }

    /// The group where the search for a fingerprint begins. The sample is chosen by the upper bits, this by the lower.
    fn home(&self, fingerprint: u32) -> usize {
        let spread = u64::from(hash(fingerprint).reverse_bits());
        usize::try_from((spread * self.tags.len() as u64) >> 32).unwrap_or(0)
    }

    /// The group that is so many steps behind `home`, around the end of the table.
    fn group(&self, home: usize, step: usize) -> usize {
        let group = home + step;
        // A subtraction is enough, since there are no more steps than groups; a division would take as long as all the rest.
        group.checked_sub(self.tags.len()).unwrap_or(group)
    }

    /// Returns the number of steps from `home` to the first group that has a free place, which is at most [`STEPS_MAX`] less one.
    fn last_step(&self, home: usize) -> usize {
        let last = STEPS_MAX.min(self.tags.len()) - 1;
        (0..last)
            .find(|step| self.tags[self.group(home, *step)][GROUP - 1] == EMPTY)
            .unwrap_or(last)
    }

    /// Returns the blocks entered for a fingerprint, latest first.
    pub(super) fn candidates<'a>(&'a self, fingerprint: u32, fingerprints: &'a Fingerprints<N>) -> Candidates<'a, N> {
        let home = self.home(fingerprint);
        let steps = if self.has(fingerprint) {
            self.last_step(home) + 1
        } else {
            0
        };
        Candidates {
            table: self,
            fingerprints,
            fingerprint,
            tag: tag(fingerprint),
            home,
            steps,
            group: home,
            places: Places(0),
            left: CANDIDATES_MAX,
        }
    }

    /// Enters a block under its fingerprint, unless enough blocks are entered for it.
    pub(super) fn enter<M: PartialEq>(
        &mut self,
        block: N,
        fingerprint: u32,
        fingerprints: &Fingerprints<N>,
        machine_of: impl Fn(N) -> M,
    ) {
        if !self.has(fingerprint) {
            return;
        }
        let candidates = self.candidates(fingerprint, fingerprints);
        let last_group = self.group(candidates.home, candidates.steps - 1);
        let mut alike = 0;
        for candidate in candidates {
            if candidate == block {
                return;
            }
            alike += 1;
        }
        if alike >= BLOCKS_PER_FINGERPRINT {
            let machine = machine_of(block);
            let of_it = self
                .candidates(fingerprint, fingerprints)
                .filter(|other| machine_of(*other) == machine);
            if alike >= CANDIDATES_MAX || of_it.take(BLOCKS_PER_MACHINE).count() == BLOCKS_PER_MACHINE {
                return;
            }
        }
        if let Some(free) = self.tags[last_group].iter().position(|tag| *tag == EMPTY) {
            self.tags[last_group][free] = tag(fingerprint);
            self.blocks[last_group][free] = block.bare();
        }
    }
}

/// An iterator over the blocks entered for a fingerprint. Planning spends most of its time here. It is one loop rather than a chain of
/// adapters, since the code around a chain decides whether the compiler inlines it.
pub(super) struct Candidates<'a, N> {
    table: &'a BlockTable<N>,
    fingerprints: &'a Fingerprints<N>,
    fingerprint: u32,
    tag: u8,
    home: usize,
    /// The number of groups from `home` on that remain to be looked at. The last of them comes first.
    steps: usize,
    /// The group that is being looked at.
    group: usize,
    /// Its places with the tag that remain to be looked at.
    places: Places,
    /// The number of candidates that may still be returned.
    left: usize,
}

impl<N: Number> Iterator for Candidates<'_, N> {
    type Item = N;

    #[inline]
    fn next(&mut self) -> Option<N> {
        if self.left == 0 {
            return None;
        }
        loop {
            for place in self.places.by_ref() {
                let block = N::of(self.table.blocks[self.group][place]);
                if self.fingerprints.get(block) == self.fingerprint {
                    self.left -= 1;
                    return Some(block);
                }
            }
            self.steps = self.steps.checked_sub(1)?;
            self.group = self.table.group(self.home, self.steps);
            self.places = Places::of(&self.table.tags[self.group], self.tag);
        }
    }
}

/// The places of a group that have a tag, last first. The upper bit of a place's byte is set if the place has the tag.
struct Places(u128);

impl Places {
    #[inline]
    fn of(tags: &[u8; GROUP], tag: u8) -> Self {
        /// The number 1 in each byte.
        const ONES: u128 = u128::MAX / 255;
        // A byte of `other` is 0 if the place has the tag. The upper bit of every other byte is set below, and then inverted.
        let other = u128::from_le_bytes(*tags) ^ (ONES * u128::from(tag));
        let low = ONES * 0x7f;
        Self(!(((other & low) + low) | other | low))
    }
}

impl Iterator for Places {
    type Item = usize;

    #[inline]
    fn next(&mut self) -> Option<usize> {
        let bit = 127u32.checked_sub(self.0.leading_zeros())?;
        self.0 ^= 1 << bit;
        Some(bit as usize / 8)
    }
}

/// Returns how many bits of a fingerprint's hash must be zero so that `blocks_max` of `blocks` blocks are in the sample.
fn sample_bits(blocks: usize, blocks_max: usize) -> u32 {
    const SAMPLE_BITS_MAX: u32 = 20;
    (0..SAMPLE_BITS_MAX)
        .find(|bits| blocks >> bits <= blocks_max.max(16))
        .unwrap_or(SAMPLE_BITS_MAX)
}

/// The tag of a fingerprint: bits that do not depend on those which choose the group and the sample. It is never [`EMPTY`].
fn tag(fingerprint: u32) -> u8 {
    let [tag, ..] = hash(fingerprint.rotate_left(16)).to_le_bytes();
    tag.max(EMPTY + 1)
}

/// Spreads a fingerprint over 32 bits (the finalizer of `MurmurHash3`): the upper bits choose the sample, the lower the place.
fn hash(fingerprint: u32) -> u32 {
    let h = (fingerprint ^ (fingerprint >> 16)).wrapping_mul(0x85eb_ca6b);
    let h = (h ^ (h >> 13)).wrapping_mul(0xc2b2_ae35);
    h ^ (h >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::Slot;
    use crate::range;
    use proptest::prelude::*;
    use std::collections::HashMap;

    /// A table of all these fingerprints, the slot of each its place.
    fn table_of(fingerprints: &[u32], slots_max: usize) -> (BlockTable<Slot>, Fingerprints<Slot>) {
        let mut table = BlockTable::new(fingerprints.len(), slots_max);
        let all: Fingerprints<Slot> = fingerprints.to_vec().into();
        for (slot, fingerprint) in range::from(Slot(0)).zip(fingerprints) {
            table.enter(slot, *fingerprint, &all, |_| ());
        }
        (table, all)
    }

    proptest! {
        /// Each fingerprint leads to the slots that hold it, to no others, and to the latest first; a common one to the first few.
        #[test]
        fn candidates_are_what_was_entered_latest_first(fingerprints in prop::collection::vec(0u32..40, 0..400)) {
            let (table, all) = table_of(&fingerprints, usize::MAX);
            let mut expected: HashMap<u32, Vec<Slot>> = HashMap::new();
            for (slot, fingerprint) in range::from(Slot(0)).zip(&fingerprints) {
                let slots = expected.entry(*fingerprint).or_default();
                if slots.len() < BLOCKS_PER_FINGERPRINT {
                    slots.insert(0, slot);
                }
            }
            for fingerprint in 0..41 {
                let found: Vec<Slot> = table.candidates(fingerprint, &all).collect();
                prop_assert_eq!(&found, expected.entry(fingerprint).or_default());
            }
        }

        /// A slot that is in the table is not entered again.
        #[test]
        fn entering_again_changes_nothing(fingerprints in prop::collection::vec(0u32..9, 1..60)) {
            let (mut table, all) = table_of(&fingerprints, usize::MAX);
            let before = format!("{table:?}");
            let entered: Vec<Slot> = (0..9).flat_map(|one| table.candidates(one, &all).collect::<Vec<_>>()).collect();
            for slot in entered {
                table.enter(slot, fingerprints[slot.index()], &all, |slot| slot);
            }
            prop_assert_eq!(format!("{table:?}"), before);
        }

        #[test]
        fn places_of_a_tag_are_found_last_first(tags in prop::array::uniform16(prop_oneof![0u8..3, 126u8..130, 253u8..=255]), tag: u8) {
            for tag in tags.into_iter().chain([tag]) {
                let expected: Vec<usize> = (0..GROUP).rev().filter(|place| tags[*place] == tag).collect();
                prop_assert_eq!(Places::of(&tags, tag).collect::<Vec<_>>(), expected);
            }
        }

        /// A tag is never taken for a free place.
        #[test]
        fn no_tag_is_empty(fingerprint: u32) {
            prop_assert_ne!(tag(fingerprint), EMPTY);
            // One of 256 would be.
            prop_assert!((0..2000).all(|more: u32| tag(fingerprint.wrapping_add(more)) != EMPTY));
        }
    }

    #[test]
    fn beyond_those_of_all_each_machine_enters_a_few() {
        const MACHINES: u32 = 100;
        let all = Fingerprints::from(vec![7; 1000]);
        let mut table = BlockTable::new(1000, usize::MAX);
        let machine = |slot: Slot| slot.0 % MACHINES;
        // The slots of one machine.
        let of = |machine: u32| (0..10).map(move |n| Slot(n * MACHINES + machine));
        let count = |table: &BlockTable<Slot>| table.candidates(7, &all).count();
        let mut counts = Vec::new();
        for one in [0, 0, 1, 2] {
            // The first fills what all may enter, with more of its own than a machine has after that.
            let slots: Vec<Slot> = if one == 0 {
                of(0).chain(of(3)).collect()
            } else {
                of(one).collect()
            };
            for slot in slots {
                table.enter(slot, 7, &all, machine);
            }
            counts.push(count(&table));
        }
        let common = BLOCKS_PER_FINGERPRINT;
        assert_eq!(counts, [common, common, common + 2, common + 4]);
        (4..MACHINES)
            .flat_map(of)
            .for_each(|slot| table.enter(slot, 7, &all, machine));
        assert_eq!(count(&table), CANDIDATES_MAX);
        // Nor is more entered than is ever looked at.
        let entered = table.tags.as_flattened().iter().filter(|tag| **tag != EMPTY);
        assert_eq!(entered.count(), CANDIDATES_MAX);
    }

    #[test]
    fn of_a_pool_too_large_a_sample_is_entered_and_looked_up() {
        let fingerprints: Vec<u32> = (0..100_000).map(|n: u32| n.wrapping_mul(0x9e37_79b9)).collect();
        let slots_max = 7000;
        let (table, all) = table_of(&fingerprints, slots_max);
        let one_in = sampled(fingerprints.len(), slots_max);
        assert_eq!(one_in, 16);
        let found = |one: &&u32| table.candidates(**one, &all).next().is_some();
        let count = fingerprints.iter().filter(found).count();
        assert!(fingerprints.iter().all(|one| found(&one) == table.has(*one)));
        let expected = fingerprints.len() / one_in as usize;
        assert!(
            (expected * 9 / 10..expected * 11 / 10).contains(&count),
            "{count} were found"
        );
        assert_eq!(sampled(fingerprints.len(), fingerprints.len()), 1);
    }

    #[test]
    fn a_table_takes_the_memory_it_says() {
        for slots in [0, 1, 1000, 100_000] {
            let table = BlockTable::<Slot>::new(slots, usize::MAX);
            let taken = table.tags.len() * GROUP * (size_of::<u8>() + size_of::<Slot>());
            let said = slots as u64 * BYTES_PER_BLOCK;
            assert!(taken as u64 <= said + 200, "{taken} bytes for {slots} slots");
        }
    }

    #[test]
    fn a_full_table_takes_no_more_and_keeps_what_it_has() {
        let fingerprints: Vec<u32> = (0..2000).collect();
        let all = Fingerprints::from(fingerprints.clone());
        let mut table = BlockTable::new(100, usize::MAX);
        let mut found = Vec::new();
        for fingerprint in fingerprints {
            let slot = Slot(fingerprint);
            table.enter(slot, fingerprint, &all, |_| ());
            found.retain(|one: &Slot| table.candidates(one.0, &all).eq([*one]));
            found.extend(table.candidates(fingerprint, &all));
        }
        // Where all places are taken, nothing was lost on the way.
        assert_eq!(found.len(), table.tags.len() * GROUP);
    }
}
