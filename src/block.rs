//! Blocks and slots: the arithmetic everything else is written in. No I/O.

/// Bytes of a block, the unit of sharing: what guests allocate and btrfs maps.
pub const BLOCK_BYTES: u64 = 4096;

/// [`BLOCK_BYTES`] as a length in memory.
pub const BLOCK_LEN: usize = 4096;

/// A block of an extent, numbered across all extents of a pool: extent after extent, in the order of their addresses.
///
/// 32 bits number 16 TiB of distinct extents; a pool with more is refused ([`crate::error::Error::TooLarge`]).
pub type Slot = u32;

/// Bytes of `blocks` blocks.
pub const fn bytes(blocks: u32) -> u64 {
    blocks as u64 * BLOCK_BYTES
}

/// A half-open range of bytes of a file, for messages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct ByteRange {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
}

impl std::fmt::Display for ByteRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "bytes {}..{}", self.start, self.start.saturating_add(self.length))
    }
}

/// A set of slots, or of other small numbers, one bit each.
#[derive(Debug, Clone, Default)]
pub struct SlotSet {
    words: Vec<u64>,
}

impl SlotSet {
    /// An empty set with room for `slots` slots.
    pub fn new(slots: usize) -> Self {
        Self {
            words: vec![0; slots.div_ceil(64)],
        }
    }

    /// Makes room for `slots` slots, if there is less.
    pub fn grow(&mut self, slots: usize) {
        let words = slots.div_ceil(64);
        if words > self.words.len() {
            self.words.resize(words, 0);
        }
    }

    /// Whether `slot` is in the set.
    pub fn contains(&self, slot: Slot) -> bool {
        self.words
            .get(slot as usize / 64)
            .is_some_and(|word| word >> (slot % 64) & 1 == 1)
    }

    /// Puts `slot` in.
    pub fn insert(&mut self, slot: Slot) {
        self.words[slot as usize / 64] |= 1 << (slot % 64);
    }

    /// Takes `slot` out.
    pub fn remove(&mut self, slot: Slot) {
        self.words[slot as usize / 64] &= !(1 << (slot % 64));
    }

    /// Puts a range of slots in.
    pub fn insert_range(&mut self, slots: std::ops::Range<Slot>) {
        for slot in slots {
            self.insert(slot);
        }
    }

    /// The maximal runs of slots of `within` that are in the set, in order.
    pub fn runs(&self, within: std::ops::Range<Slot>) -> impl Iterator<Item = std::ops::Range<Slot>> + '_ {
        let mut at = within.start;
        std::iter::from_fn(move || {
            while at < within.end && !self.contains(at) {
                at += 1;
            }
            let start = at;
            while at < within.end && self.contains(at) {
                at += 1;
            }
            (start < at).then_some(start..at)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_maximal_and_clipped() {
        let mut set = SlotSet::new(200);
        set.insert_range(3..70);
        set.insert_range(71..72);
        set.insert_range(90..130);
        set.remove(100);
        assert_eq!(set.runs(5..110).collect::<Vec<_>>(), [5..70, 71..72, 90..100, 101..110]);
        assert_eq!(set.runs(72..90).count(), 0);
    }
}
