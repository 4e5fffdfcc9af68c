//! Blocks, byte ranges, and sets of numbers. Nothing here does I/O.

use std::marker::PhantomData;
use std::ops::Range;

use crate::numbers::{Number, Slot};

/// Bytes of a block, the unit of sharing: what guests allocate and btrfs maps.
pub const BLOCK_BYTES: u64 = 4096;

/// [`BLOCK_BYTES`] as a length in memory.
pub const BLOCK_LEN: usize = 4096;

/// Returns the size of `blocks` blocks in bytes.
pub const fn bytes(blocks: u32) -> u64 {
    blocks as u64 * BLOCK_BYTES
}

/// A half-open range of bytes of a file, for messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {}..{}", self.start, self.start.saturating_add(self.length))
    }
}

/// A set of numbers that are small enough for one bit each.
#[derive(Debug, Clone, Default)]
pub struct NumberSet<N> {
    words: Vec<u64>,
    numbers: PhantomData<N>,
}

/// A set of slots.
pub type SlotSet = NumberSet<Slot>;

impl<N: Number> NumberSet<N> {
    /// Makes an empty set for numbers below `numbers`.
    pub fn new(numbers: usize) -> Self {
        Self {
            words: vec![0; numbers.div_ceil(64)],
            numbers: PhantomData,
        }
    }

    /// Grows the set so that it can hold numbers below `numbers`. A set never shrinks.
    pub fn grow(&mut self, numbers: usize) {
        let words = numbers.div_ceil(64);
        if words > self.words.len() {
            self.words.resize(words, 0);
        }
    }

    /// Whether a number is in the set.
    pub fn contains(&self, number: N) -> bool {
        let number = number.bare();
        self.words
            .get(number as usize / 64)
            .is_some_and(|word| word >> (number % 64) & 1 == 1)
    }

    /// Inserts a number. It must be below the limit that the set was made or grown for.
    pub fn insert(&mut self, number: N) {
        let number = number.bare();
        self.words[number as usize / 64] |= 1 << (number % 64);
    }

    /// Removes a number. It must be below the limit that the set was made or grown for.
    pub fn remove(&mut self, number: N) {
        let number = number.bare();
        self.words[number as usize / 64] &= !(1 << (number % 64));
    }

    /// Inserts a range of numbers, each below the limit.
    pub fn insert_range(&mut self, numbers: Range<N>) {
        for number in numbers.start.bare()..numbers.end.bare() {
            self.insert(N::of(number));
        }
    }

    /// Returns the maximal runs of numbers of `within` that are in the set, in ascending order.
    pub fn runs(&self, within: Range<N>) -> impl Iterator<Item = Range<N>> + '_ {
        let (mut at, end) = (within.start.bare(), within.end.bare());
        std::iter::from_fn(move || {
            while at < end && !self.contains(N::of(at)) {
                // Nothing is in a whole word, or behind the last one.
                at = match self.words.get(at as usize / 64) {
                    None => end,
                    Some(0) => end.min((at | 63).saturating_add(1)),
                    Some(_) => at + 1,
                };
            }
            let start = at;
            while at < end && self.contains(N::of(at)) {
                at += 1;
            }
            (start < at).then(|| N::of(start)..N::of(at))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_maximal_and_clipped() {
        let mut set = SlotSet::new(200);
        set.insert_range(Slot::range(3..70));
        set.insert_range(Slot::range(71..72));
        set.insert_range(Slot::range(90..130));
        set.remove(Slot(100));
        let runs = set.runs(Slot::range(5..110)).collect::<Vec<_>>();
        assert_eq!(runs, [5..70, 71..72, 90..100, 101..110].map(Slot::range));
        assert_eq!(set.runs(Slot::range(72..90)).count(), 0);
    }
}
