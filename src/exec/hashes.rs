//! Hashes of the blocks of a store, by store address. Those of earlier commits are read from the archive. Those of the commit that is
//! being written or read are collected as they come. Also digests of images, which are made of these hashes.

use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{BlockHasher, Hash};
use crate::block::BLOCK_LEN;
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::range;
use crate::sys::spill::SpillFile;

/// Hashes that a [`HashLog`] keeps in memory: 32 MiB, for 4 GiB of distinct blocks. Older ones go to an unnamed file.
const IN_MEMORY_MAX: usize = 1 << 20;
const HASH_BYTES: usize = size_of::<Hash>();

/// The hashes of consecutive blocks of a store, which are only appended to.
#[derive(Debug)]
pub struct HashLog {
    /// The store address of the first hash.
    first: StoreBlock,
    /// The number of hashes that are in the file: the oldest ones.
    in_file: usize,
    /// The hashes after those, in memory.
    recent: Vec<Hash>,
    file: Option<SpillFile>,
    /// The folder that the file is made in.
    folder: PathBuf,
}

impl HashLog {
    /// Makes an empty log whose first hash will be that of the block `first`. If a file is needed, it is made in `folder`, or in the folder
    /// for temporary files if `folder` takes none.
    pub fn new(first: StoreBlock, folder: PathBuf) -> Self {
        Self {
            first,
            in_file: 0,
            recent: Vec::new(),
            file: None,
            folder,
        }
    }

    /// The store address after that of the last hash.
    pub fn end(&self) -> StoreBlock {
        self.first + u32::try_from(self.in_file + self.recent.len()).unwrap_or(u32::MAX)
    }

    /// Appends hashes.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the file cannot be made or written.
    pub fn extend(&mut self, hashes: &[Hash]) -> Result<()> {
        if self.recent.len() + hashes.len() > IN_MEMORY_MAX {
            self.spill()
                .map_err(Error::writing("keep hashes in a file in", &self.folder))?;
        }
        self.recent.extend_from_slice(hashes);
        Ok(())
    }

    /// Moves the hashes that are in memory to the file.
    fn spill(&mut self) -> io::Result<()> {
        let mut file = match self.file.take() {
            Some(file) => file,
            None => SpillFile::new(&self.folder).or_else(|_| SpillFile::new(&std::env::temp_dir()))?,
        };
        file.write_all_at(self.recent.as_flattened(), (self.in_file * HASH_BYTES) as u64)?;
        self.in_file += self.recent.len();
        self.recent.clear();
        self.file = Some(file);
        Ok(())
    }

    /// The hashes of some blocks. All of them must be in the log.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be read.
    pub fn read(&self, first: StoreBlock, blocks: u32) -> Result<Vec<Hash>> {
        let (start, blocks) = ((first - self.first) as usize, blocks as usize);
        let from_file = self.in_file.saturating_sub(start).min(blocks);
        let mut hashes = vec![[0; HASH_BYTES]; from_file];
        if let Some(file) = &self.file {
            file.read_exact_at(hashes.as_flattened_mut(), (start * HASH_BYTES) as u64)
                .map_err(Error::io("read hashes from a file in", &self.folder))?;
        }
        let start = (start + from_file).saturating_sub(self.in_file);
        hashes.extend_from_slice(&self.recent[start..start + blocks - from_file]);
        Ok(hashes)
    }
}

/// The hashes of the blocks that a commit of an archive can refer to. They are read page by page, and the pages that were used last stay in
/// memory.
#[derive(Debug)]
pub struct StoredHashes<'a> {
    commit: Option<(&'a Archive, &'a Committed)>,
    end: StoreBlock,
    /// Pages in memory, each with the store address of its first block. The page that was used last comes last.
    pages: Vec<(StoreBlock, Vec<Option<Hash>>)>,
    /// Hashes that no INDEX has any more, made of the blocks.
    remade: HashMap<StoreBlock, Hash>,
    /// Such hashes that were made before, in the order of the blocks.
    made: &'a [(StoreBlock, Hash)],
}

impl<'a> StoredHashes<'a> {
    /// Blocks of a page, which takes 2 MiB.
    const PAGE_BLOCKS: u32 = 1 << 16;
    /// Pages that are kept in memory.
    const PAGES_MAX: usize = 8;
    /// Hashes made of blocks that are kept: 64 MiB with what a map takes.
    const REMADE_MAX: usize = 1 << 20;

    /// The hashes of a commit's blocks before `end`. Without a commit there are none.
    pub fn new(commit: Option<(&'a Archive, &'a Committed)>, end: StoreBlock) -> Self {
        Self {
            commit,
            end,
            pages: Vec::new(),
            remade: HashMap::new(),
            made: &[],
        }
    }

    /// Uses hashes that were made of blocks, in the order of the blocks, where no INDEX has one.
    #[must_use]
    pub fn with_made(mut self, made: &'a [(StoreBlock, Hash)]) -> Self {
        self.made = made;
        self
    }

    /// The store address after the last block.
    pub fn end(&self) -> StoreBlock {
        self.end
    }

    /// Remembers hashes that were made of blocks which their commit proves. Where there are too many, they stay unknown.
    pub fn remember(&mut self, hashes: impl IntoIterator<Item = (StoreBlock, Hash)>) {
        for (block, hash) in hashes {
            if self.remade.len() >= Self::REMADE_MAX {
                return;
            }
            self.remade.insert(block, hash);
            let first = page_of(block);
            if let Some((_, page)) = self.pages.iter_mut().find(|(page, _)| *page == first)
                && let Some(known) = page.get_mut((block - first) as usize)
            {
                known.get_or_insert(hash);
            }
        }
    }

    /// The hash of a block. It is `None` if the archive has lost it, or if there is no such block.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read.
    pub fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        Ok(self.page_from(block)?.first().copied().flatten())
    }

    /// The hashes of so many blocks from one on. One that the archive has lost, or of a block that is not there, is `None`.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read.
    pub fn read(&mut self, first: StoreBlock, blocks: u32) -> Result<Vec<Option<Hash>>> {
        let mut read = Vec::with_capacity(blocks as usize);
        while read.len() < blocks as usize {
            let left = blocks as usize - read.len();
            let page = self.page_from(first + u32::try_from(read.len()).unwrap_or(u32::MAX))?;
            if page.is_empty() {
                read.resize(blocks as usize, None);
            } else {
                read.extend_from_slice(&page[..page.len().min(left)]);
            }
        }
        Ok(read)
    }

    /// The hashes from a block on to the end of its page. There are none from `end` on.
    fn page_from(&mut self, block: StoreBlock) -> Result<&[Option<Hash>]> {
        let Some((archive, committed)) = self.commit.filter(|_| block < self.end) else {
            return Ok(&[]);
        };
        let first = page_of(block);
        if let Some(place) = self.pages.iter().position(|(page, _)| *page == first) {
            self.pages[place..].rotate_left(1);
        } else {
            let end = self.end.min(first.saturating_add(Self::PAGE_BLOCKS));
            let mut page = archive.hashes(committed, first..end)?;
            let from = self.made.partition_point(|(block, _)| *block < first);
            for (block, hash) in self.made[from..].iter().take_while(|(block, _)| *block < end) {
                page[(*block - first) as usize].get_or_insert(*hash);
            }
            if !self.remade.is_empty() {
                for (block, known) in range::from(first).zip(&mut page).filter(|(_, known)| known.is_none()) {
                    *known = self.remade.get(&block).copied();
                }
            }
            if self.pages.len() >= Self::PAGES_MAX {
                self.pages.remove(0);
            }
            self.pages.push((first, page));
        }
        let page = self.pages.last().map(|(_, page)| &page[..]).unwrap_or_default();
        Ok(page.get((block - first) as usize..).unwrap_or_default())
    }

    /// Returns the ranges of a list of which the archive has lost a hash, page by page.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read.
    pub fn lost(&mut self, wanted: &[Range<StoreBlock>]) -> Result<Vec<Range<StoreBlock>>> {
        let mut lost = Vec::new();
        for range in wanted {
            let mut at = range.start;
            while at < range.end {
                let left = range.end - at;
                let hashes = self.page_from(at)?;
                let count = u32::try_from(hashes.len()).unwrap_or(u32::MAX).min(left);
                let missing =
                    range::where_true(range::from(at).zip(hashes[..count as usize].iter().map(Option::is_none)));
                for range in missing {
                    range::push(&mut lost, range);
                }
                if count == 0 {
                    range::push(&mut lost, at..range.end);
                    break;
                }
                at += count;
            }
        }
        Ok(lost)
    }

    /// Adds the hashes of a range of blocks to a digest. Returns whether the archive has all of them. If it does not, the digest is of no
    /// use.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read; [`Error::Interrupted`].
    pub fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool> {
        let (mut at, mut left, mut has_all) = (first, blocks, true);
        while left > 0 {
            let hashes = self.page_from(at)?;
            let count = u32::try_from(hashes.len()).unwrap_or(u32::MAX).min(left);
            if count == 0 {
                return Ok(false);
            }
            for hash in &hashes[..count as usize] {
                match hash {
                    Some(hash) => digest.update(std::slice::from_ref(hash))?,
                    None => has_all = false,
                }
            }
            at = at.saturating_add(count);
            left -= count;
        }
        Ok(has_all)
    }
}

fn page_of(block: StoreBlock) -> StoreBlock {
    StoreBlock(block.0 - block.0 % StoredHashes::PAGE_BLOCKS)
}

/// The digest of an image of `size` bytes with these runs. `stored` adds the hashes of a range of the store to it.
///
/// # Errors
/// Those of `stored`; [`Error::Interrupted`].
pub fn digest(
    runs: &[Run],
    size: u64,
    (hasher, monitor): (&BlockHasher, &dyn Monitor),
    mut stored: impl FnMut(StoreBlock, u32, &mut Digest<'_>) -> Result<()>,
) -> Result<Hash> {
    let mut digest = Digest::of(hasher, monitor);
    for run in runs {
        match run.content {
            Content::Stored(first) => stored(first, run.blocks, &mut digest)?,
            _ => digest.zeros(run.blocks),
        }
    }
    Ok(digest.finish(size))
}

/// The hash of a block of zeros, which an archive may hold like any other.
pub fn zero_hash(hasher: &BlockHasher) -> Hash {
    hasher.of(&[0; BLOCK_LEN])
}

/// Makes the digest of an image, as the format defines it (`formats/archive-v1.md`, LIST). It depends on the content alone, and takes no time
/// for zeros. Items are collected to large pieces, which BLAKE3 hashes several times as fast as single ones.
#[expect(missing_debug_implementations, reason = "a monitor has none")]
pub struct Digest<'a> {
    hasher: blake3::Hasher,
    /// Items that are not in the hasher yet.
    pending: Vec<u8>,
    /// The blocks of zeros at the end so far.
    zeros: u64,
    zero_hash: Hash,
    monitor: &'a dyn Monitor,
}

impl<'a> Digest<'a> {
    /// Bytes of items that go into the hasher at a time. All cores hash them together.
    const PIECE_BYTES: usize = 4 << 20;

    /// Begins the digest of an image in an archive that is not sealed, without blocks so far.
    pub fn new(monitor: &'a dyn Monitor) -> Self {
        Self::of(&BlockHasher::default(), monitor)
    }

    /// Begins the digest of an image in an archive whose blocks this hashes.
    pub fn of(blocks: &BlockHasher, monitor: &'a dyn Monitor) -> Self {
        Self {
            hasher: blake3::Hasher::new(),
            pending: Vec::new(),
            zeros: 0,
            zero_hash: zero_hash(blocks),
            monitor,
        }
    }

    /// Adds the hashes of blocks that are stored.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn update(&mut self, hashes: &[Hash]) -> Result<()> {
        for hash in hashes {
            if *hash == self.zero_hash {
                self.zeros += 1;
            } else {
                self.end_zeros();
                self.pending.extend_from_slice(hash);
            }
        }
        if self.pending.len() >= Self::PIECE_BYTES {
            self.hash_pending()?;
        }
        Ok(())
    }

    /// Adds blocks that read as zeros.
    pub fn zeros(&mut self, blocks: u32) {
        self.zeros += u64::from(blocks);
    }

    /// Adds the item of the zeros so far.
    fn end_zeros(&mut self) {
        if self.zeros > 0 {
            self.pending.extend_from_slice(&[0; HASH_BYTES - 8]);
            self.pending.extend(self.zeros.to_le_bytes());
            self.zeros = 0;
        }
    }

    /// Moves the pending items to the hasher.
    fn hash_pending(&mut self) -> Result<()> {
        if self.monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        self.hasher.update_rayon(&self.pending);
        self.pending.clear();
        Ok(())
    }

    /// Returns the digest of all blocks that were added, as those of an image of `size` bytes.
    pub fn finish(mut self, size: u64) -> Hash {
        self.end_zeros();
        self.hasher.update(&self.pending);
        self.hasher.update(&size.to_le_bytes());
        *self.hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::record::hash_of;
    use crate::monitor::Silent;

    #[test]
    fn a_log_that_outgrows_memory_is_the_same() {
        let hash = |n: u32| *blake3::hash(&n.to_le_bytes()).as_bytes();
        let folder = tempfile::tempdir().unwrap();
        let mut log = HashLog::new(StoreBlock(10), folder.path().to_owned());
        let all: Vec<Hash> = (0..u32::try_from(IN_MEMORY_MAX).unwrap() * 2 + 500).map(hash).collect();
        for part in all.chunks(1000) {
            log.extend(part).unwrap();
        }
        assert!(log.file.is_some());
        assert_eq!(log.end().index(), 10 + all.len());
        let in_file = u32::try_from(log.in_file).unwrap();
        for (first, blocks) in [
            (0, 3),
            (in_file - 5, 5),
            (in_file - 5, 10),
            (in_file, 10),
            (in_file + 3, 0),
        ] {
            let expected = &all[first as usize..(first + blocks) as usize];
            assert_eq!(log.read(StoreBlock(10 + first), blocks).unwrap(), expected);
        }
    }

    #[test]
    fn a_digest_depends_on_content_alone() {
        let monitor = Silent::default();
        let of = |parts: &[(u8, u32)]| {
            let mut digest = Digest::new(&monitor);
            for (number, blocks) in parts {
                match number {
                    0 => digest.zeros(*blocks),
                    1 => digest
                        .update(&vec![hash_of(&[0; BLOCK_LEN]); *blocks as usize])
                        .unwrap(),
                    number => digest.update(&vec![[*number; 32]; *blocks as usize]).unwrap(),
                }
            }
            digest.finish(9)
        };
        let mut plain = blake3::Hasher::new();
        plain.update(&vec![7; 32 * 300_000]);
        plain.update(&[&[0; 24][..], &(u64::from(u32::MAX) + 5).to_le_bytes()].concat());
        plain.update(&[[8; 32], [9; 32]].concat());
        plain.update(&9u64.to_le_bytes());
        let expected = *plain.finalize().as_bytes();
        assert_eq!(
            of(&[
                (7, 200_000),
                (7, 100_000),
                (0, u32::MAX),
                (1, 3),
                (0, 2),
                (8, 1),
                (9, 1)
            ]),
            expected
        );
        assert_eq!(
            of(&[(7, 300_000), (1, 2), (0, u32::MAX), (1, 3), (8, 1), (9, 1)]),
            expected
        );
        assert_ne!(of(&[(7, 300_000), (0, u32::MAX), (1, 4), (8, 1), (9, 1)]), expected);
        monitor.stop();
        let mut stopped = Digest::new(&monitor);
        assert!(matches!(
            stopped.update(&vec![[7; 32]; 1 << 18]),
            Err(Error::Interrupted)
        ));
    }
}
