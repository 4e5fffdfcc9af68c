//! Fingerprints of many blocks: in memory while they are few, or else in an unnamed file with a page cache.

use std::io::Result;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::numbers::Number;
use crate::sys::spill::{Budget, SpillFile, lost};

/// Fingerprints of a page.
const PAGE: usize = 1024;
/// Pages in the cache, which takes 4 MiB.
const FRAMES: usize = 512;

/// A fingerprint for each block, by the block's number: its slot in a pool, or its store address. It is 0 until it is written.
#[derive(Debug)]
pub struct Fingerprints<N> {
    blocks: usize,
    kept: Kept,
    numbers: PhantomData<N>,
}

#[derive(Debug)]
enum Kept {
    Memory(Vec<u32>),
    File {
        file: SpillFile,
        budget: Budget,
        pages: Pages,
    },
}

/// The cache: each page of the file has one frame. It is direct-mapped, since the planner compares two or three places at a time.
///
/// Each cell says which page its fingerprint is of, so that reading one takes no lock: of two threads that load pages into the same frame,
/// neither takes the other's fingerprints for its own.
#[derive(Debug)]
struct Pages {
    /// Each has a fingerprint in its lower half, and the [`mark`] of its page in the upper one.
    cells: Vec<AtomicU64>,
}

impl<N> Default for Fingerprints<N> {
    fn default() -> Self {
        Self::from(Vec::new())
    }
}

impl<N> From<Vec<u32>> for Fingerprints<N> {
    fn from(fingerprints: Vec<u32>) -> Self {
        Self {
            blocks: fingerprints.len(),
            kept: Kept::Memory(fingerprints),
            numbers: PhantomData,
        }
    }
}

impl<N: Number> Fingerprints<N> {
    /// Makes fingerprints that take four bytes of memory each.
    pub fn in_memory(blocks: usize) -> Self {
        vec![0; blocks].into()
    }

    /// Makes fingerprints that take four bytes of disk each, in an unnamed file in the budget's folder, and 4 MiB of memory in all. If the
    /// file cannot be read or written later, the process ends ([`lost`]).
    ///
    /// # Errors
    /// Returns `ENOSPC` or `EDQUOT` if there is too little space, and otherwise the error of making the file.
    pub fn in_file(blocks: usize, budget: &Budget) -> Result<Self> {
        let file = budget.file(blocks.next_multiple_of(PAGE) as u64 * 4)?;
        Ok(Self {
            blocks,
            kept: Kept::File {
                file,
                budget: budget.clone(),
                pages: Pages::new(),
            },
            numbers: PhantomData,
        })
    }

    /// Makes fingerprints of `blocks` blocks that are kept where these are. If a file cannot be made, they are kept in memory.
    #[must_use]
    pub fn alike<M: Number>(&self, blocks: usize) -> Fingerprints<M> {
        match &self.kept {
            Kept::Memory(_) => Fingerprints::in_memory(blocks),
            Kept::File { budget, .. } => {
                Fingerprints::in_file(blocks, budget).unwrap_or_else(|_| Fingerprints::in_memory(blocks))
            }
        }
    }

    /// Returns the number of fingerprints.
    pub fn len(&self) -> usize {
        self.blocks
    }

    /// Whether there are no fingerprints.
    pub fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Returns the fingerprint of a block.
    #[inline]
    pub fn get(&self, block: N) -> u32 {
        let at = block.bare() as usize;
        match &self.kept {
            Kept::Memory(all) => all[at],
            Kept::File { file, pages, .. } => pages.get(file, at),
        }
    }

    /// Returns the fingerprints of a range of blocks.
    pub fn range(&self, blocks: Range<N>) -> Vec<u32> {
        let (start, end) = (blocks.start.bare(), blocks.end.bare());
        match &self.kept {
            Kept::Memory(all) => all[start as usize..end as usize].to_vec(),
            Kept::File { .. } => (start..end).map(|block| self.get(N::of(block))).collect(),
        }
    }

    /// Writes fingerprints from a block on.
    pub fn write(&mut self, first: N, fingerprints: &[u32]) {
        let first = first.bare() as usize;
        match &mut self.kept {
            Kept::Memory(all) => all[first..first + fingerprints.len()].copy_from_slice(fingerprints),
            Kept::File { file, pages, .. } => {
                let bytes: Vec<u8> = fingerprints
                    .iter()
                    .flat_map(|fingerprint| fingerprint.to_le_bytes())
                    .collect();
                file.write_all_at(&bytes, first as u64 * 4).unwrap_or_else(|_| lost());
                for (at, fingerprint) in (first..).zip(fingerprints) {
                    pages.put(at, *fingerprint);
                }
            }
        }
    }
}

impl Pages {
    /// Makes a cache that has no page.
    fn new() -> Self {
        Self {
            cells: std::iter::repeat_with(AtomicU64::default).take(FRAMES * PAGE).collect(),
        }
    }

    /// Returns the cell for a place of the file.
    #[inline]
    fn cell(&self, at: usize) -> &AtomicU64 {
        &self.cells[at % (FRAMES * PAGE)]
    }

    /// Puts the fingerprint of a place into its cell.
    #[inline]
    fn put(&self, at: usize, fingerprint: u32) {
        self.cell(at)
            .store(mark(at) << 32 | u64::from(fingerprint), Ordering::Relaxed);
    }

    /// Returns the fingerprint at a place of the file, and reads its page if the cell has another one.
    #[inline]
    fn get(&self, file: &SpillFile, at: usize) -> u32 {
        let cell = self.cell(at).load(Ordering::Relaxed);
        if cell >> 32 == mark(at) {
            let [a, b, c, d, ..] = cell.to_le_bytes();
            u32::from_le_bytes([a, b, c, d])
        } else {
            self.load(file, at)
        }
    }

    /// Reads the page of a place into the cache, and returns the fingerprint at the place.
    #[cold]
    fn load(&self, file: &SpillFile, at: usize) -> u32 {
        let first = at - at % PAGE;
        let mut bytes = [0; PAGE * 4];
        let read = file.read_exact_at(&mut bytes, first as u64 * 4);
        read.unwrap_or_else(|_| lost());
        let (fingerprints, _) = bytes.as_chunks();
        for (at, fingerprint) in (first..).zip(fingerprints) {
            self.put(at, u32::from_le_bytes(*fingerprint));
        }
        u32::from_le_bytes(fingerprints[at % PAGE])
    }
}

/// Returns the upper half of the cell for a place: the number of the page, plus one, since cells are 0 at first.
#[inline]
fn mark(at: usize) -> u64 {
    at as u64 / PAGE as u64 + 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_file_keeps_what_memory_keeps(
            writes in prop::collection::vec((0u32..20_000_000, prop::collection::vec(any::<u32>(), 1..3000)), 1..6),
            reads in prop::collection::vec(0u32..20_000_000, 1..50),
        ) {
            const SLOTS: usize = 20_003_000;
            let folder = tempfile::tempdir().unwrap();
            let mut file = Fingerprints::<u32>::in_file(SLOTS, &Budget::new(0, folder.path().to_owned())).unwrap();
            let mut memory = Fingerprints::in_memory(SLOTS);
            for (slot, fingerprints) in &writes {
                prop_assert_eq!(file.get(*slot), memory.get(*slot));
                file.write(*slot, fingerprints);
                memory.write(*slot, fingerprints);
            }
            for slot in reads.into_iter().chain(writes.iter().map(|write| write.0)) {
                prop_assert_eq!(file.range(slot..slot + 10), memory.range(slot..slot + 10));
            }
        }
    }

    #[test]
    fn threads_that_load_pages_into_the_same_frame_read_their_own() {
        const PAGES: u32 = 3;
        let at = |page: u32, n: u32| page * u32::try_from(FRAMES * PAGE).unwrap() + n;
        let folder = tempfile::tempdir().unwrap();
        let budget = Budget::new(0, folder.path().to_owned());
        let mut file = Fingerprints::<u32>::in_file(at(PAGES, 0) as usize, &budget).unwrap();
        for page in 0..PAGES {
            let numbers: Vec<u32> = (0..100).map(|n| at(page, n)).collect();
            file.write(at(page, 0), &numbers);
        }
        std::thread::scope(|scope| {
            for page in 0..PAGES {
                let file = &file;
                scope.spawn(move || {
                    for n in (0..100).cycle().take(20_000) {
                        assert_eq!(file.get(at(page, n)), at(page, n));
                    }
                });
            }
        });
    }
}
