//! Memory for long lists: anonymous mappings up to a budget, and mappings of unnamed files beyond it.
//!
//! The pages of a file belong to the page cache: where memory gets short, the kernel writes them to disk and reclaims them. It can do so
//! with anonymous pages only on a host that has swap. This is the one file of this folder that decides anything, since an allocator cannot
//! ask its caller.

use std::fs::File;
use std::io::{ErrorKind, Result};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use allocator_api2::alloc::{AllocError, Allocator, Global, Layout};
use memmap2::{Advice, MmapOptions, MmapRaw, RemapOptions};
use rustix::fs::{FallocateFlags, IFlags, fallocate, fstatvfs};
use rustix::io::Errno;

use super::existing::existing;
use super::inode_flags::add_inode_flags;

/// Size from which an allocation counts as large; smaller ones are left to the global allocator.
const LARGE_BYTES: usize = 1 << 20;
/// The largest alignment that a mapping guarantees: no machine has smaller pages.
const ALIGNMENT_MAX: usize = 4096;
/// One list takes at most this fraction (one in four) of the free space where spill files are made.
const FREE_SHARE: u64 = 4;

/// The memory budget of a run's lists, and the folder of the files for what exceeds it: an allocator for lists that may get long. Clones
/// are the same budget, which lasts as long as any list that was made from it. The default has no budget: everything is in memory.
#[derive(Debug, Clone, Default)]
pub struct Budget(Option<Arc<Mutex<LargeBlocks>>>);

impl Budget {
    /// Makes a budget of `bytes` bytes in memory, whose files are made in `folder`.
    pub fn new(bytes: usize, folder: PathBuf) -> Self {
        let space = LargeBlocks {
            limit: bytes,
            folder,
            mappings: Vec::new(),
        };
        Self(Some(Arc::new(Mutex::new(space))))
    }

    /// Changes the limit of bytes in memory, for allocations from now on.
    pub fn set_bytes(&self, bytes: usize) {
        if let Some(space) = &self.0 {
            lock(space).limit = bytes;
        }
    }

    /// Returns how many bytes of its lists are in files.
    pub fn bytes_in_files(&self) -> usize {
        let Some(space) = &self.0 else { return 0 };
        let space = lock(space);
        let in_files = space.mappings.iter().filter(|block| block.file.is_some());
        in_files.map(|block| block.map.len()).sum()
    }

    /// Makes a spill file of `bytes` zeros in the budget's folder. Its blocks are allocated at once, unless the filesystem cannot
    /// preallocate.
    ///
    /// # Errors
    /// Returns `ENOSPC` or `EDQUOT` if there is too little space, [`ErrorKind::Unsupported`] without a budget, and otherwise the error of
    /// making the file.
    pub fn file(&self, bytes: u64) -> Result<SpillFile> {
        let space = self.0.as_deref().ok_or(ErrorKind::Unsupported)?;
        let folder = lock(space).folder.clone();
        let mut file = SpillFile::new(&folder)?;
        file.allocate_blocks_if_possible(bytes)?;
        file.file.set_len(bytes)?;
        Ok(file)
    }

    /// Returns the large blocks among which a block of this layout is; `None` if it is the global allocator's.
    fn space_of(&self, layout: Layout) -> Option<&Mutex<LargeBlocks>> {
        let is_small = layout.size() < LARGE_BYTES || layout.align() > ALIGNMENT_MAX;
        self.0.as_deref().filter(|_| !is_small)
    }
}

fn lock(space: &Mutex<LargeBlocks>) -> MutexGuard<'_, LargeBlocks> {
    space.lock().unwrap_or_else(PoisonError::into_inner)
}

// SAFETY: the size and alignment alone decide whether a block is the global allocator's or one of the mappings. Both stay valid until they
// are freed, wherever the allocator is moved, and all its clones are equal. A mapping is as long as what was asked for, and begins at a
// page.
unsafe impl Allocator for Budget {
    fn allocate(&self, layout: Layout) -> std::result::Result<NonNull<[u8]>, AllocError> {
        match self.space_of(layout) {
            Some(space) => lock(space).map(layout.size()).map_err(|_| AllocError),
            None => Global.allocate(layout),
        }
    }

    unsafe fn deallocate(&self, at: NonNull<u8>, layout: Layout) {
        match self.space_of(layout) {
            Some(space) => lock(space).unmap(at),
            // SAFETY: the layout is the one that it was allocated with, so that it came from the global allocator.
            None => unsafe { Global.deallocate(at, layout) },
        }
    }

    unsafe fn grow(&self, at: NonNull<u8>, old: Layout, new: Layout) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's promises for growing are those that `resize` asks for.
        unsafe { self.resize(at, old, new) }
    }

    unsafe fn shrink(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: the caller's promises for shrinking are those that `resize` asks for.
        unsafe { self.resize(at, old, new) }
    }
}

impl Budget {
    /// Changes the length of a block.
    ///
    /// # Safety
    /// `at` must be a block of this allocator with the layout `old`.
    unsafe fn resize(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        match (self.space_of(old), self.space_of(new)) {
            (Some(space), Some(_)) => lock(space).remap(at, new.size()).map_err(|_| AllocError),
            (None, None) if new.size() >= old.size() => {
                // SAFETY: neither layout belongs to a mapping, so that the block came from the global allocator.
                unsafe { Global.grow(at, old, new) }
            }
            (None, None) => {
                // SAFETY: neither layout belongs to a mapping, so that the block came from the global allocator.
                unsafe { Global.shrink(at, old, new) }
            }
            _ => {
                let moved = self.allocate(new)?;
                // SAFETY: both blocks have at least `bytes` bytes, and they do not overlap, since the old one is still allocated.
                unsafe {
                    let bytes = old.size().min(new.size());
                    moved.cast::<u8>().copy_from_nonoverlapping(at, bytes);
                    self.deallocate(at, old);
                }
                Ok(moved)
            }
        }
    }
}

/// A large block, which is a mapping of its own.
#[derive(Debug)]
struct LargeBlock {
    map: MmapRaw,
    /// The file that it maps; `None` if it is anonymous memory.
    file: Option<SpillFile>,
}

impl LargeBlock {
    fn in_memory(bytes: usize) -> Result<Self> {
        let map = MmapOptions::new().len(bytes).map_anon()?.into();
        Ok(Self { map, file: None })
    }

    /// Maps a new file whose blocks are all allocated: a later write to a page without a block would end the process by a signal if the
    /// disk was full. The file takes at most one in `share` of the free space.
    fn in_file(bytes: usize, folder: &Path, share: u64) -> Result<Self> {
        let mut file = SpillFile::new(folder)?;
        file.allocate_blocks(bytes as u64, share)?;
        let map = MmapOptions::new().len(bytes).map_raw(&file.file)?;
        // Where memory is short, reading ahead would evict pages that are worth more.
        let _ = map.advise(Advice::Random);
        Ok(Self { map, file: Some(file) })
    }

    /// Changes the length of the mapping, which may move.
    fn resize(&mut self, bytes: usize) -> Result<()> {
        if let Some(file) = &mut self.file {
            file.allocate_blocks(bytes as u64, FREE_SHARE)?;
        }
        // SAFETY: the only pointer into the mapping is the caller's, which the returned block replaces.
        unsafe { self.map.remap(bytes, RemapOptions::new().may_move(true)) }?;
        if let Some(file) = &mut self.file {
            file.cut(bytes as u64);
        }
        Ok(())
    }

    fn block(&self) -> Result<NonNull<[u8]>> {
        let at = NonNull::new(self.map.as_mut_ptr()).ok_or(ErrorKind::OutOfMemory)?;
        Ok(NonNull::slice_from_raw_parts(at, self.map.len()))
    }
}

/// An unnamed file for what exceeds memory. Its blocks are allocated before anything is written, so that a full disk is reported at once.
#[derive(Debug)]
pub struct SpillFile {
    file: File,
    /// Bytes from its beginning whose blocks are allocated.
    bytes: u64,
}

impl SpillFile {
    /// Makes an empty file in a folder, or in the deepest folder above it that exists.
    ///
    /// # Errors
    /// Returns the error of making an unnamed file in the folder.
    pub fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(existing(folder))?;
        // With copy on write, btrfs would allocate new blocks on each write, for which there may be no space. Other filesystems do not know
        // the flag.
        let _ = add_inode_flags(&file, IFlags::NOCOW);
        Ok(Self { file, bytes: 0 })
    }

    /// Allocates blocks up to `bytes` bytes, unless that takes more than one in `share` of the free space.
    fn allocate_blocks(&mut self, bytes: u64, share: u64) -> Result<()> {
        let more = bytes.saturating_sub(self.bytes);
        if more == 0 {
            return Ok(());
        }
        let stat = fstatvfs(&self.file)?;
        if more > stat.f_bavail.saturating_mul(stat.f_frsize) / share {
            return Err(Errno::NOSPC.into());
        }
        fallocate(&self.file, FallocateFlags::empty(), self.bytes, more)?;
        self.bytes = bytes;
        Ok(())
    }

    /// Allocates blocks up to `bytes` bytes if the filesystem can preallocate. Otherwise a write reports that there is no space.
    fn allocate_blocks_if_possible(&mut self, bytes: u64) -> Result<()> {
        match self.allocate_blocks(bytes, 1) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.bytes = bytes;
                Ok(())
            }
            made => made,
        }
    }

    /// Frees the blocks beyond `bytes` bytes. If that fails, they are freed when the file is closed.
    fn cut(&mut self, bytes: u64) {
        if bytes < self.bytes && self.file.set_len(bytes).is_ok() {
            self.bytes = bytes;
        }
    }

    /// Writes bytes at an offset.
    ///
    /// # Errors
    /// Returns the error of writing, such as `ENOSPC`, `EDQUOT` or `EIO`.
    pub fn write_all_at(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.allocate_blocks_if_possible(at.saturating_add(bytes.len() as u64))?;
        self.file.write_all_at(bytes, at)
    }

    /// Reads bytes that were written before.
    ///
    /// # Errors
    /// Returns the error of reading, such as `EIO`.
    pub fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(bytes, at)
    }
}

/// Ends the process as the kernel does if a page of a mapped file cannot be read or written, with the message of
/// [`super::signals::explain_sigbus`]. It is for reads and writes of a spill file that cannot return an error.
pub fn lost() -> ! {
    // SAFETY: raising a signal has no conditions.
    unsafe { libc::raise(libc::SIGBUS) };
    std::process::abort();
}

/// All large blocks of a budget.
#[derive(Debug)]
struct LargeBlocks {
    /// The limit of bytes in memory.
    limit: usize,
    /// The folder that files are made in.
    folder: PathBuf,
    mappings: Vec<LargeBlock>,
}

impl LargeBlocks {
    fn map(&mut self, bytes: usize) -> Result<NonNull<[u8]>> {
        let mapping = self.make(bytes, 0)?;
        let block = mapping.block()?;
        self.mappings.push(mapping);
        Ok(block)
    }

    fn unmap(&mut self, at: NonNull<u8>) {
        if let Some(index) = self.index_of(at) {
            self.mappings.swap_remove(index);
        }
    }

    fn remap(&mut self, at: NonNull<u8>, bytes: usize) -> Result<NonNull<[u8]>> {
        let index = self.index_of(at).ok_or(ErrorKind::NotFound)?;
        let old = &self.mappings[index];
        let length = old.map.len();
        let in_memory = if old.file.is_none() { length } else { 0 };
        let fits_resized = in_memory == 0 || bytes <= length || self.fits(bytes - length);
        if !fits_resized || self.mappings[index].resize(bytes).is_err() {
            let new = self.make(bytes, in_memory)?;
            let from = self.mappings[index].block()?.cast::<u8>();
            // SAFETY: both blocks have at least that many bytes, and they do not overlap, since both are mapped.
            unsafe {
                let to = new.block()?.cast::<u8>();
                to.copy_from_nonoverlapping(from, length.min(bytes));
            }
            self.mappings[index] = new;
        }
        self.mappings[index].block()
    }

    /// Makes a new mapping. It replaces one that has `replaced` bytes in memory.
    fn make(&self, bytes: usize, replaced: usize) -> Result<LargeBlock> {
        if !self.fits(bytes.saturating_sub(replaced))
            && let Ok(mapping) = LargeBlock::in_file(bytes, &self.folder, FREE_SHARE)
        {
            return Ok(mapping);
        }
        LargeBlock::in_memory(bytes)
    }

    /// Whether `more` bytes fit into the limit in addition to those in memory.
    fn fits(&self, more: usize) -> bool {
        let in_memory = self.mappings.iter().filter(|block| block.file.is_none());
        let in_memory: usize = in_memory.map(|block| block.map.len()).sum();
        in_memory + more <= self.limit
    }

    fn index_of(&self, at: NonNull<u8>) -> Option<usize> {
        self.mappings
            .iter()
            .position(|block| block.map.as_mut_ptr() == at.as_ptr())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_finds_no_room_fails_where_it_is_written() {
        const FAR: u64 = 1 << 60;
        let folder = tempfile::tempdir().unwrap();
        let mut file = SpillFile::new(folder.path()).unwrap();
        file.write_all_at(b"some", 4096).unwrap();
        assert_eq!(
            file.write_all_at(b"more", FAR).unwrap_err().kind(),
            ErrorKind::StorageFull
        );
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        assert_eq!(&bytes, b"some");
        let budget = Budget::new(0, folder.path().to_owned());
        assert_eq!(budget.file(FAR).unwrap_err().kind(), ErrorKind::StorageFull);
        budget.file(4096).unwrap().read_exact_at(&mut bytes, 4092).unwrap();
        assert_eq!(bytes, [0; 4]);
    }
}
