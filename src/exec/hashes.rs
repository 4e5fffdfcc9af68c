//! Hashes of the blocks of a store, by store address. Those of earlier commits are read from the archive. Those of the commit that is
//! being written or read are collected as they come. Also digests of images, which are made of these hashes.

use std::io;
use std::path::PathBuf;

use crate::archive::reader::Archive;
use crate::archive::record::Hash;
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
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

/// The hashes of the blocks of an archive. They are read page by page, and the pages that were used last stay in memory.
#[derive(Debug)]
pub struct StoredHashes<'a> {
    archive: Option<&'a Archive>,
    end: StoreBlock,
    /// Pages in memory, each with the store address of its first block. The page that was used last comes last.
    pages: Vec<(StoreBlock, Vec<Option<Hash>>)>,
}

impl<'a> StoredHashes<'a> {
    /// Blocks of a page, which takes 2 MiB.
    const PAGE_BLOCKS: u32 = 1 << 16;
    /// Pages that are kept in memory.
    const PAGES_MAX: usize = 8;

    /// The hashes of an archive's blocks before `end`. Without an archive there are none.
    pub fn new(archive: Option<&'a Archive>, end: StoreBlock) -> Self {
        Self {
            archive,
            end,
            pages: Vec::new(),
        }
    }

    /// The store address after the last block.
    pub fn end(&self) -> StoreBlock {
        self.end
    }

    /// The hash of a block. It is `None` if the archive has lost it, or if there is no such block.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read.
    pub fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        Ok(self.page_from(block)?.first().copied().flatten())
    }

    /// The hashes from a block on to the end of its page. There are none from `end` on.
    fn page_from(&mut self, block: StoreBlock) -> Result<&[Option<Hash>]> {
        let Some(archive) = self.archive.filter(|_| block < self.end) else {
            return Ok(&[]);
        };
        let first = StoreBlock(block.0 - block.0 % Self::PAGE_BLOCKS);
        if let Some(place) = self.pages.iter().position(|(page, _)| *page == first) {
            self.pages[place..].rotate_left(1);
        } else {
            let end = self.end.min(first.saturating_add(Self::PAGE_BLOCKS));
            let page = archive.hashes(first, end)?;
            if self.pages.len() >= Self::PAGES_MAX {
                self.pages.remove(0);
            }
            self.pages.push((first, page));
        }
        let page = self.pages.last().map(|(_, page)| &page[..]).unwrap_or_default();
        Ok(page.get((block - first) as usize..).unwrap_or_default())
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
                    Some(hash) => digest.update(hash)?,
                    None => has_all = false,
                }
            }
            at = at.saturating_add(count);
            left -= count;
        }
        Ok(has_all)
    }
}

/// The digest of an image with these runs. `stored` adds the hashes of a range of the store to it.
///
/// # Errors
/// Those of `stored`; [`Error::Interrupted`].
pub fn digest(
    runs: &[Run],
    monitor: &dyn Monitor,
    mut stored: impl FnMut(StoreBlock, u32, &mut Digest<'_>) -> Result<()>,
) -> Result<Hash> {
    let mut digest = Digest::new(monitor);
    for run in runs {
        match run.content {
            Content::Stored(first) => stored(first, run.blocks, &mut digest)?,
            _ => digest.zeros(run.blocks)?,
        }
    }
    Ok(digest.finish())
}

/// Makes the digest of an image: the BLAKE3 hash of the hashes of its blocks, in their order. Blocks that read as zeros have a hash of
/// zeros. Hashes are collected to large pieces, which BLAKE3 hashes several times as fast as single ones.
#[expect(missing_debug_implementations, reason = "a monitor has none")]
pub struct Digest<'a> {
    hasher: blake3::Hasher,
    /// Hashes that are not in the hasher yet.
    pending: Vec<u8>,
    /// A piece of zeros, which is empty until it is needed.
    zeros: Vec<u8>,
    monitor: &'a dyn Monitor,
}

impl<'a> Digest<'a> {
    /// Bytes of hashes that go into the hasher at a time. All cores hash them together.
    const PIECE_BYTES: usize = 4 << 20;

    /// Begins the digest of an image, without blocks so far.
    pub fn new(monitor: &'a dyn Monitor) -> Self {
        Self {
            hasher: blake3::Hasher::new(),
            pending: Vec::new(),
            zeros: Vec::new(),
            monitor,
        }
    }

    /// Adds hashes, given as bytes.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn update(&mut self, hashes: &[u8]) -> Result<()> {
        self.pending.extend_from_slice(hashes);
        if self.pending.len() >= Self::PIECE_BYTES {
            self.hash_pending()?;
        }
        Ok(())
    }

    /// Moves the pending hashes to the hasher.
    fn hash_pending(&mut self) -> Result<()> {
        if self.monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        self.hasher.update_rayon(&self.pending);
        self.pending.clear();
        Ok(())
    }

    /// Adds blocks that read as zeros.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn zeros(&mut self, blocks: u32) -> Result<()> {
        let mut left = u64::from(blocks) * HASH_BYTES as u64;
        if left < Self::PIECE_BYTES as u64 {
            let length = self.pending.len() + usize::try_from(left).unwrap_or(0);
            self.pending.resize(length, 0);
            return self.update(&[]);
        }
        self.hash_pending()?;
        self.zeros.resize(Self::PIECE_BYTES, 0);
        while left > 0 {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let part = usize::try_from(left).unwrap_or(usize::MAX).min(Self::PIECE_BYTES);
            self.hasher.update_rayon(&self.zeros[..part]);
            left -= part as u64;
        }
        Ok(())
    }

    /// Returns the digest of all blocks that were added.
    pub fn finish(mut self) -> Hash {
        self.hasher.update(&self.pending);
        *self.hasher.finalize().as_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn a_digest_is_the_same_in_pieces_of_any_size() {
        let monitor = Silent::default();
        let (mut digest, mut plain) = (Digest::new(&monitor), blake3::Hasher::new());
        for (n, zeros) in [0u32, 1, 7, 1 << 17, (1 << 17) + 3, 5].into_iter().enumerate() {
            let hashes = vec![u8::try_from(n).unwrap() + 1; 32 * n * 1000];
            digest.update(&hashes).unwrap();
            digest.zeros(zeros).unwrap();
            plain.update(&hashes);
            plain.update(&vec![0; 32 * zeros as usize]);
        }
        assert_eq!(digest.finish(), *plain.finalize().as_bytes());
        monitor.stop();
        assert!(matches!(Digest::new(&monitor).zeros(u32::MAX), Err(Error::Interrupted)));
    }
}
