//! Fingerprints of many blocks: in memory while they are few, or else in an unnamed file with a page cache.

use std::io::Result;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::block::Slot;
use crate::sys::spill::{Budget, SpillFile, lost};

/// Fingerprints of a page.
const PAGE: usize = 1024;
/// Pages in the cache, which takes 4 MiB.
const FRAMES: usize = 1024;

/// A fingerprint for each slot, which is 0 until it is written.
#[derive(Debug)]
pub struct Fingerprints {
    slots: usize,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Memory(Vec<u32>),
    File {
        file: SpillFile,
        budget: Budget,
        pages: Mutex<Pages>,
    },
}

/// The cache: each page of the file has one frame. It is direct-mapped, since the planner compares two or three places at a time.
#[derive(Debug)]
struct Pages {
    /// The number of the page in each frame, plus one; 0 for none.
    tags: Vec<u32>,
    data: Vec<u32>,
}

impl Default for Fingerprints {
    fn default() -> Self {
        Self::from(Vec::new())
    }
}

impl From<Vec<u32>> for Fingerprints {
    fn from(fingerprints: Vec<u32>) -> Self {
        Self {
            slots: fingerprints.len(),
            kept: Kept::Memory(fingerprints),
        }
    }
}

impl Fingerprints {
    /// Makes fingerprints that take four bytes of memory each.
    pub fn in_memory(slots: usize) -> Self {
        vec![0; slots].into()
    }

    /// Makes fingerprints that take four bytes of disk each, in an unnamed file in the budget's folder, and 4 MiB of memory in all. If the
    /// file cannot be read or written later, the process ends ([`lost`]).
    ///
    /// # Errors
    /// Returns `ENOSPC` or `EDQUOT` if there is too little space, and otherwise the error of making the file.
    pub fn in_file(slots: usize, budget: &Budget) -> Result<Self> {
        let file = budget.file(slots.next_multiple_of(PAGE) as u64 * 4)?;
        let pages = Pages {
            tags: vec![0; FRAMES],
            data: vec![0; FRAMES * PAGE],
        };
        Ok(Self {
            slots,
            kept: Kept::File {
                file,
                budget: budget.clone(),
                pages: Mutex::new(pages),
            },
        })
    }

    /// Makes `slots` fingerprints that are kept where these are. If a file cannot be made, they are kept in memory.
    #[must_use]
    pub fn alike(&self, slots: usize) -> Self {
        match &self.kept {
            Kept::Memory(_) => Self::in_memory(slots),
            Kept::File { budget, .. } => Self::in_file(slots, budget).unwrap_or_else(|_| Self::in_memory(slots)),
        }
    }

    /// Returns the number of fingerprints.
    pub fn len(&self) -> usize {
        self.slots
    }

    /// Whether there are no fingerprints.
    pub fn is_empty(&self) -> bool {
        self.slots == 0
    }

    /// Returns the fingerprint of a slot.
    pub fn get(&self, slot: Slot) -> u32 {
        let slot = slot as usize;
        match &self.kept {
            Kept::Memory(all) => all[slot],
            Kept::File { file, pages, .. } => {
                let mut pages = lock(pages);
                let frame = pages.load(file, slot / PAGE);
                pages.data[frame * PAGE + slot % PAGE]
            }
        }
    }

    /// Returns the fingerprints of a range of slots.
    pub fn range(&self, slots: Range<Slot>) -> Vec<u32> {
        match &self.kept {
            Kept::Memory(all) => all[slots.start as usize..slots.end as usize].to_vec(),
            Kept::File { .. } => slots.map(|slot| self.get(slot)).collect(),
        }
    }

    /// Writes fingerprints from `slot` on.
    pub fn write(&mut self, slot: Slot, fingerprints: &[u32]) {
        let first = slot as usize;
        match &mut self.kept {
            Kept::Memory(all) => all[first..first + fingerprints.len()].copy_from_slice(fingerprints),
            Kept::File { file, pages, .. } => {
                let bytes: Vec<u8> = fingerprints
                    .iter()
                    .flat_map(|fingerprint| fingerprint.to_le_bytes())
                    .collect();
                let mut pages = lock(pages);
                file.write_all_at(&bytes, first as u64 * 4).unwrap_or_else(|_| lost());
                for (at, fingerprint) in (first..).zip(fingerprints) {
                    let (page, frame) = (at / PAGE, at / PAGE % FRAMES);
                    if pages.tags[frame] as usize == page + 1 {
                        pages.data[frame * PAGE + at % PAGE] = *fingerprint;
                    }
                }
            }
        }
    }
}

impl Pages {
    /// Loads a page into its frame unless it is there, and returns the frame.
    fn load(&mut self, file: &SpillFile, page: usize) -> usize {
        let frame = page % FRAMES;
        let tag = u32::try_from(page + 1).unwrap_or(u32::MAX);
        if self.tags[frame] != tag {
            let mut bytes = [0; PAGE * 4];
            let read = file.read_exact_at(&mut bytes, (page * PAGE) as u64 * 4);
            read.unwrap_or_else(|_| lost());
            for (fingerprint, bytes) in self.data[frame * PAGE..].iter_mut().zip(bytes.as_chunks().0) {
                *fingerprint = u32::from_le_bytes(*bytes);
            }
            self.tags[frame] = tag;
        }
        frame
    }
}

fn lock(pages: &Mutex<Pages>) -> MutexGuard<'_, Pages> {
    pages.lock().unwrap_or_else(PoisonError::into_inner)
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
            let mut file = Fingerprints::in_file(SLOTS, &Budget::new(0, folder.path().to_owned())).unwrap();
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
}
