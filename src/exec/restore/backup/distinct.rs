//! The distinct blocks of a backup: which blocks came before, by hash.

use std::path::PathBuf;

use hashbrown::HashTable;

use crate::archive::record::Hash;
use crate::error::{Error, Result};
use crate::exec::hashes::HashLog;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::range;

/// Blocks that are entered at most: of 28 GiB. They take 75 MiB of memory, and half as much again while the table grows.
const ENTRIES_MAX: usize = 7 << 20;
/// Blocks with the same tag that are looked at, at most. Others can choose blocks so that their hashes begin alike.
const CANDIDATES_MAX: usize = 16;
/// Hashes that are read from the log together, because the blocks after one that was found are looked for next.
const PAGE_BLOCKS: u32 = 256;
/// Earlier blocks whose hashes are read together.
const EARLIER_BLOCKS: u32 = 1 << 16;

/// Where a block of a backup is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Placed {
    /// It is zeros, and is put nowhere.
    Zeros,
    /// It came before, and has this store address.
    Known(StoreBlock),
    /// It did not come before. New blocks have consecutive addresses.
    New(StoreBlock),
}

/// Blocks that are there before a backup comes: those of an archive that it is added to. Their addresses come before those of new blocks.
pub trait EarlierBlocks {
    /// The address after the last of them.
    fn end(&self) -> StoreBlock;

    /// The hashes of so many blocks from one on. That of a block that is lost is `None`.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be read.
    fn hashes(&self, first: StoreBlock, blocks: u32) -> Result<Vec<Option<Hash>>>;

    /// Whether a block can be referred to, because what it holds can be read.
    ///
    /// # Errors
    /// [`Error::Io`] if that cannot be found out; [`Error::Interrupted`].
    fn is_intact(&self, block: StoreBlock) -> Result<bool>;
}

/// No earlier blocks.
#[derive(Debug)]
pub struct NoEarlierBlocks;

impl EarlierBlocks for NoEarlierBlocks {
    fn end(&self) -> StoreBlock {
        StoreBlock(0)
    }

    fn hashes(&self, _: StoreBlock, blocks: u32) -> Result<Vec<Option<Hash>>> {
        Ok(vec![None; blocks as usize])
    }

    fn is_intact(&self, _: StoreBlock) -> Result<bool> {
        Ok(false)
    }
}

/// The blocks that came so far. Each is entered in a table by its hash. Where there are more than the table may hold, only those are entered
/// whose hashes begin with zeros. What follows one that is found is compared with what followed it before, and so is what comes before it.
pub(super) struct DistinctBlocks<'a> {
    earlier: Box<dyn EarlierBlocks + 'a>,
    /// The hashes of new blocks, by store address.
    log: HashLog,
    /// The tags and addresses of blocks.
    table: HashTable<(u32, StoreBlock)>,
    entries_max: usize,
    /// A block is entered if so many upper bits of its tag are zero.
    sample_bits: u32,
    /// The page of the log that was read last.
    page: (StoreBlock, Vec<Hash>),
}

impl<'a> DistinctBlocks<'a> {
    /// None yet but the earlier ones. `folder` is for a file of hashes, see [`HashLog::new`].
    pub(super) fn new(earlier: Box<dyn EarlierBlocks + 'a>, folder: PathBuf) -> Self {
        Self::with_entries_max(earlier, folder, ENTRIES_MAX)
    }

    fn with_entries_max(earlier: Box<dyn EarlierBlocks + 'a>, folder: PathBuf, entries_max: usize) -> Self {
        Self {
            log: HashLog::new(earlier.end(), folder),
            earlier,
            table: HashTable::new(),
            entries_max,
            sample_bits: 0,
            page: (StoreBlock(0), Vec::new()),
        }
    }

    /// Enters the earlier blocks. Without that, they are not found.
    ///
    /// # Errors
    /// Those of [`EarlierBlocks::hashes`]; [`Error::Interrupted`].
    pub(super) fn enter_earlier(&mut self, monitor: &dyn Monitor) -> Result<()> {
        for part in range::parts(StoreBlock(0)..self.earlier.end(), EARLIER_BLOCKS) {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let hashes = self.earlier.hashes(part.start, range::length(&part))?;
            for (block, hash) in range::from(part.start).zip(hashes) {
                if let Some(hash) = hash {
                    self.enter(&hash, block);
                }
            }
        }
        Ok(())
    }

    /// The hashes of new blocks, by store address.
    pub(super) fn log(&self) -> &HashLog {
        &self.log
    }

    /// The hashes of new blocks, and nothing else.
    pub(super) fn into_log(self) -> HashLog {
        self.log
    }

    /// The hashes of blocks, which all have addresses.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be read.
    pub(super) fn hashes(&self, first: StoreBlock, blocks: u32) -> Result<Vec<Option<Hash>>> {
        let earlier = self.earlier.end().saturating_sub(first).min(blocks);
        let mut hashes = if earlier > 0 {
            self.earlier.hashes(first, earlier)?
        } else {
            Vec::new()
        };
        if earlier < blocks {
            let new = self.log.read(first + earlier, blocks - earlier)?;
            hashes.extend(new.into_iter().map(Some));
        }
        Ok(hashes)
    }

    /// Whether as many blocks can still be entered.
    pub(super) fn has_room(&self, blocks: usize) -> bool {
        let left = StoreBlock::END_MAX.0.saturating_sub(self.log.end().0);
        blocks <= left as usize
    }

    /// Finds a place for consecutive blocks with these hashes. `None` is a block of zeros.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the file of hashes cannot be written or read.
    pub(super) fn place(&mut self, hashes: &[Option<Hash>]) -> Result<Vec<Placed>> {
        let known = self.find(hashes)?;
        let mut placed = Vec::with_capacity(hashes.len());
        let mut new = Vec::new();
        for (hash, known) in hashes.iter().zip(known) {
            placed.push(match (hash, known) {
                (None, _) => Placed::Zeros,
                (Some(_), Some(block)) => Placed::Known(block),
                (Some(hash), None) => {
                    if let Some(block) = self.among_new(hash, &new) {
                        Placed::Known(block)
                    } else {
                        let block = self.log.end() + u32::try_from(new.len()).unwrap_or(u32::MAX);
                        new.push(*hash);
                        self.enter(hash, block);
                        Placed::New(block)
                    }
                }
            });
        }
        self.log.extend(&new)?;
        Ok(placed)
    }

    /// The addresses of blocks that came before these.
    fn find(&mut self, hashes: &[Option<Hash>]) -> Result<Vec<Option<StoreBlock>>> {
        let mut known: Vec<Option<StoreBlock>> = vec![None; hashes.len()];
        let mut follows: Option<StoreBlock> = None;
        for (at, hash) in hashes.iter().enumerate() {
            let Some(hash) = hash else {
                follows = None;
                continue;
            };
            let found = match follows {
                Some(block) if self.has(block, hash)? => Some(block),
                _ => self.look_up(hash)?,
            };
            known[at] = found;
            follows = found.and_then(|block| block.checked_add(1));
            if self.sample_bits > 0
                && let Some(block) = found
            {
                self.find_before(hashes, &mut known, at, block)?;
            }
        }
        Ok(known)
    }

    /// Goes back from a block that was found, as long as the blocks before it are those that came before.
    fn find_before(
        &mut self,
        hashes: &[Option<Hash>],
        known: &mut [Option<StoreBlock>],
        at: usize,
        block: StoreBlock,
    ) -> Result<()> {
        let mut before = block.previous();
        for at in (0..at).rev() {
            match (before, &hashes[at], known[at]) {
                (Some(block), Some(hash), None) if self.has(block, hash)? => known[at] = Some(block),
                _ => break,
            }
            before = before.and_then(StoreBlock::previous);
        }
        Ok(())
    }

    /// Whether a block in the log has this hash.
    fn has(&mut self, block: StoreBlock, hash: &Hash) -> Result<bool> {
        if block >= self.log.end() {
            return Ok(false);
        }
        if block < self.earlier.end() {
            return self.is_earlier(block, hash);
        }
        let (first, page) = &self.page;
        let at = block.checked_sub(*first).map(|at| at as usize);
        if let Some(known) = at.and_then(|at| page.get(at)) {
            return Ok(known == hash);
        }
        let blocks = PAGE_BLOCKS.min(self.log.end() - block);
        self.page = (block, self.log.read(block, blocks)?);
        Ok(self.page.1.first() == Some(hash))
    }

    /// Whether an earlier block has this hash and can be referred to.
    fn is_earlier(&self, block: StoreBlock, hash: &Hash) -> Result<bool> {
        let known = self.earlier.hashes(block, 1)?;
        Ok(known.first() == Some(&Some(*hash)) && self.earlier.is_intact(block)?)
    }

    fn look_up(&self, hash: &Hash) -> Result<Option<StoreBlock>> {
        let tag = tag(hash);
        if !self.is_sampled(tag) {
            return Ok(None);
        }
        let candidates = self.table.iter_hash(spread(tag)).filter(|(other, _)| *other == tag);
        for (_, block) in candidates.take(CANDIDATES_MAX) {
            let is_it = if *block < self.earlier.end() {
                self.is_earlier(*block, hash)?
            } else {
                *block < self.log.end() && self.log.read(*block, 1)?.first() == Some(hash)
            };
            if is_it {
                return Ok(Some(*block));
            }
        }
        Ok(None)
    }

    /// The address of a block that is among those that are not in the log yet.
    fn among_new(&self, hash: &Hash, new: &[Hash]) -> Option<StoreBlock> {
        let (tag, end) = (tag(hash), self.log.end());
        let candidates = self.table.iter_hash(spread(tag)).filter(|(other, _)| *other == tag);
        let mut blocks = candidates.take(CANDIDATES_MAX).map(|(_, block)| *block);
        blocks.find(|block| {
            let at = block.checked_sub(end).map(|at| at as usize);
            at.and_then(|at| new.get(at)) == Some(hash)
        })
    }

    fn is_sampled(&self, tag: u32) -> bool {
        tag.leading_zeros() >= self.sample_bits
    }

    fn enter(&mut self, hash: &Hash, block: StoreBlock) {
        let tag = tag(hash);
        if !self.is_sampled(tag) {
            return;
        }
        if self.table.len() >= self.entries_max {
            self.sample_bits += 1;
            let bits = self.sample_bits;
            self.table.retain(|(tag, _)| tag.leading_zeros() >= bits);
            if !self.is_sampled(tag) {
                return;
            }
        }
        self.table
            .insert_unique(spread(tag), (tag, block), |(tag, _)| spread(*tag));
    }
}

/// The bits of a hash by which a block is entered.
fn tag(hash: &Hash) -> u32 {
    let [a, b, c, d, ..] = *hash;
    u32::from_be_bytes([a, b, c, d])
}

/// Spreads a tag over the bits that a table uses (Fibonacci hashing).
fn spread(tag: u32) -> u64 {
    u64::from(tag).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

impl std::fmt::Debug for DistinctBlocks<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DistinctBlocks")
            .field("end", &self.log.end())
            .finish_non_exhaustive()
    }
}

/// The parts of blocks that were placed, each of one kind and with consecutive addresses.
pub(super) fn runs(placed: &[Placed]) -> Vec<(u32, Option<std::ops::Range<StoreBlock>>)> {
    let mut runs: Vec<(u32, Option<std::ops::Range<StoreBlock>>)> = Vec::new();
    for one in placed {
        let block = match one {
            Placed::Zeros => None,
            Placed::Known(block) | Placed::New(block) => Some(*block),
        };
        match (runs.last_mut(), block) {
            (Some((blocks, None)), None) => *blocks += 1,
            (Some((blocks, Some(range))), Some(block)) if range.end == block => {
                *blocks += 1;
                range.end = block + 1;
            }
            _ => runs.push((1, block.map(|block| block..block + 1))),
        }
    }
    debug_assert!(
        runs.iter()
            .all(|(blocks, range)| { range.as_ref().is_none_or(|range| range::length(range) == *blocks) })
    );
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(number: u32) -> Option<Hash> {
        (number > 0).then(|| *blake3::hash(&number.to_le_bytes()).as_bytes())
    }

    /// What each block reads as, by the number that it was made of.
    fn read(placed: &[Placed], distinct: &DistinctBlocks<'_>) -> Vec<Option<Hash>> {
        let of = |block: StoreBlock| distinct.log().read(block, 1).unwrap().first().copied();
        placed
            .iter()
            .map(|placed| match placed {
                Placed::Zeros => None,
                Placed::Known(block) | Placed::New(block) => of(*block),
            })
            .collect()
    }

    proptest! {
        /// Whatever comes, each block is put where its hash is, and new addresses follow each other.
        #[test]
        fn blocks_are_put_where_their_hashes_are(
            batches in prop::collection::vec(prop::collection::vec(0u32..200, 0..60), 1..12),
            entries_max in prop::sample::select(vec![4usize, 16, 1 << 20]),
        ) {
            let mut distinct = DistinctBlocks::with_entries_max(Box::new(NoEarlierBlocks), std::env::temp_dir(), entries_max);
            for batch in &batches {
                let hashes: Vec<_> = batch.iter().map(|number| hash(*number)).collect();
                let before = distinct.log().end();
                let placed = distinct.place(&hashes).unwrap();
                prop_assert_eq!(read(&placed, &distinct), hashes);
                let new: Vec<u32> = placed.iter().filter_map(|one| match one {
                    Placed::New(block) => Some(block.0),
                    _ => None,
                }).collect();
                prop_assert_eq!(new, (before.0..distinct.log().end().0).collect::<Vec<_>>());
            }
            if entries_max > 1000 {
                let numbers: std::collections::BTreeSet<u32> = batches.concat().into_iter().filter(|n| *n > 0).collect();
                prop_assert_eq!(distinct.log().end().index(), numbers.len());
            }
        }
    }

    #[test]
    fn a_stretch_that_came_before_is_found_by_a_sample_of_it() {
        let mut distinct = DistinctBlocks::with_entries_max(Box::new(NoEarlierBlocks), std::env::temp_dir(), 256);
        let all: Vec<_> = (1..=4096).map(hash).collect();
        distinct.place(&all).unwrap();
        assert!(distinct.sample_bits >= 4, "{}", distinct.sample_bits);
        let again = distinct.place(&all[100..2100]).unwrap();
        let expected: Vec<_> = (100..2100).map(|block| Placed::Known(StoreBlock(block))).collect();
        let found = again.iter().zip(&expected).filter(|(a, b)| a == b).count();
        assert_eq!(found, expected.len());
        assert_eq!(distinct.log().end(), StoreBlock(4096));
    }
}
