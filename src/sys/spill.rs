//! Memory for long lists: anonymous mappings as far as a budget goes, mappings of unnamed files beyond it.
//!
//! Pages of a file are the page cache's: where memory gets short, the kernel writes them to the disk and takes them away, which it can
//! do with anonymous ones only on a host that has swap. This is the one place of this folder that decides something: what an
//! allocator does cannot be asked elsewhere.

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

use super::inode_flags::add_inode_flags;

/// Bytes from which an allocation is looked at here; what is smaller is the ordinary allocator's.
const LARGE_BYTES: usize = 1 << 20;
/// The largest alignment that a mapping serves: no machine has smaller pages.
const ALIGNMENT_MAX: usize = 4096;
/// Of what is free where files are made, one of a list takes this share at most.
const FREE_SHARE: u64 = 4;

/// How many bytes of a run's lists are in memory at most, and where files for more of them are made: an allocator for lists that may get
/// long. Copies of it are the same budget, which lasts as long as any list that was made from it. The default is none at all: then
/// everything is in memory.
#[derive(Debug, Clone, Default)]
pub struct Budget(Option<Arc<Mutex<LargeBlocks>>>);

impl Budget {
    /// So many bytes in memory, and files in `folder`.
    pub fn new(bytes: usize, folder: PathBuf) -> Self {
        let space = LargeBlocks {
            limit: bytes,
            folder,
            mappings: Vec::new(),
        };
        Self(Some(Arc::new(Mutex::new(space))))
    }

    /// Changes how many bytes are in memory at most, for what is allocated from now on.
    pub fn set_bytes(&self, bytes: usize) {
        if let Some(space) = &self.0 {
            lock(space).limit = bytes;
        }
    }

    /// Bytes of its lists in files now.
    pub fn bytes_in_files(&self) -> usize {
        let Some(space) = &self.0 else { return 0 };
        let space = lock(space);
        let in_files = space.mappings.iter().filter(|one| one.file.is_some());
        in_files.map(|one| one.map.len()).sum()
    }

    /// A file of so many bytes, which are zeros, where the others are. Its blocks are there, unless the filesystem cannot allocate any
    /// before they are written.
    ///
    /// # Errors
    /// If there can be no such file, or it has too little room: `ENOSPC`, `EDQUOT`. [`ErrorKind::Unsupported`] without a budget.
    pub fn file(&self, bytes: u64) -> Result<SpillFile> {
        let space = self.0.as_deref().ok_or(ErrorKind::Unsupported)?;
        let folder = lock(space).folder.clone();
        std::fs::create_dir_all(&folder)?;
        let mut file = SpillFile::new(&folder)?;
        file.make_room_if_possible(bytes)?;
        file.file.set_len(bytes)?;
        Ok(file)
    }

    /// Where a block of this layout is kept; none if that is where the ordinary allocator has it.
    fn space_of(&self, layout: Layout) -> Option<&Mutex<LargeBlocks>> {
        let is_small = layout.size() < LARGE_BYTES || layout.align() > ALIGNMENT_MAX;
        self.0.as_deref().filter(|_| !is_small)
    }
}

fn lock(space: &Mutex<LargeBlocks>) -> MutexGuard<'_, LargeBlocks> {
    space.lock().unwrap_or_else(PoisonError::into_inner)
}

// SAFETY: blocks are the ordinary allocator's or mappings of the space, by their size alone; both stay valid until they are given
// back, wherever the allocator is moved, and all copies of it are alike. A mapping is as long as what was asked for, and lies at the
// beginning of a page.
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
            // SAFETY: it came from there, since the layout is the same.
            None => unsafe { Global.deallocate(at, layout) },
        }
    }

    unsafe fn grow(&self, at: NonNull<u8>, old: Layout, new: Layout) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: what the caller promises of growing is what this asks for.
        unsafe { self.resize(at, old, new) }
    }

    unsafe fn shrink(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        // SAFETY: what the caller promises of shrinking is what this asks for.
        unsafe { self.resize(at, old, new) }
    }
}

impl Budget {
    /// Makes a block longer or shorter.
    ///
    /// # Safety
    /// `at` is a block of this allocator with the layout `old`.
    unsafe fn resize(
        &self,
        at: NonNull<u8>,
        old: Layout,
        new: Layout,
    ) -> std::result::Result<NonNull<[u8]>, AllocError> {
        match (self.space_of(old), self.space_of(new)) {
            (Some(space), Some(_)) => lock(space).remap(at, new.size()).map_err(|_| AllocError),
            (None, None) if new.size() >= old.size() => {
                // SAFETY: it came from there.
                unsafe { Global.grow(at, old, new) }
            }
            (None, None) => {
                // SAFETY: it came from there.
                unsafe { Global.shrink(at, old, new) }
            }
            _ => {
                let moved = self.allocate(new)?;
                // SAFETY: both are at least as long, and apart: the old one was not given back yet.
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

/// A large block.
#[derive(Debug)]
struct LargeBlock {
    map: MmapRaw,
    /// Whose pages it is.
    file: Option<SpillFile>,
}

impl LargeBlock {
    fn in_memory(bytes: usize) -> Result<Self> {
        let map = MmapOptions::new().len(bytes).map_anon()?.into();
        Ok(Self { map, file: None })
    }

    /// In a file of which every block is there: writing to it later finds room, or the process would get a signal. Of what is free, it
    /// takes one in `share` at most.
    fn in_file(bytes: usize, folder: &Path, share: u64) -> Result<Self> {
        std::fs::create_dir_all(folder)?;
        let mut file = SpillFile::new(folder)?;
        file.make_room(bytes as u64, share)?;
        let map = MmapOptions::new().len(bytes).map_raw(&file.file)?;
        // Where memory is short, what lies around a page is not worth what it takes the place of.
        let _ = map.advise(Advice::Random);
        Ok(Self { map, file: Some(file) })
    }

    /// Makes it longer or shorter, perhaps elsewhere in memory.
    fn resize(&mut self, bytes: usize) -> Result<()> {
        if let Some(file) = &mut self.file {
            file.make_room(bytes as u64, FREE_SHARE)?;
        }
        // SAFETY: nobody has a reference into it, but the one pointer that the new place is returned for.
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

/// An unnamed file for what does not fit into memory. Its blocks are allocated before anything is written to them, so that a disk that is
/// full is told at once.
#[derive(Debug)]
pub struct SpillFile {
    file: File,
    /// Bytes from its beginning that need not be allocated again.
    bytes: u64,
}

impl SpillFile {
    /// An empty one.
    ///
    /// # Errors
    /// If there can be none in that folder.
    pub fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder)?;
        // On btrfs, blocks of other files are written elsewhere each time, where there may be no room. Others know no such flag.
        let _ = add_inode_flags(&file, IFlags::NOCOW);
        Ok(Self { file, bytes: 0 })
    }

    /// Allocates blocks until it has so many bytes, unless that takes more than one in `share` of what is free.
    fn make_room(&mut self, bytes: u64, share: u64) -> Result<()> {
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

    /// The same where writing can tell as well that there is no room: a filesystem may not know how to allocate blocks before.
    fn make_room_if_possible(&mut self, bytes: u64) -> Result<()> {
        match self.make_room(bytes, 1) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.bytes = bytes;
                Ok(())
            }
            made => made,
        }
    }

    /// Gives back what is behind so many bytes. What is not given back is gone with the file.
    fn cut(&mut self, bytes: u64) {
        if bytes < self.bytes && self.file.set_len(bytes).is_ok() {
            self.bytes = bytes;
        }
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// `ENOSPC`, `EDQUOT`, `EIO`.
    pub fn write_all_at(&mut self, bytes: &[u8], at: u64) -> Result<()> {
        self.make_room_if_possible(at.saturating_add(bytes.len() as u64))?;
        self.file.write_all_at(bytes, at)
    }

    /// Reads bytes that were written.
    ///
    /// # Errors
    /// `EIO`.
    pub fn read_exact_at(&self, bytes: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_at(bytes, at)
    }
}

/// Ends the process as the kernel does where a page of a mapped file cannot be read or written, and as it is explained there
/// ([`super::signals::explain_sigbus`]): for what is read from a file where nobody can be told of an error.
pub fn lost() -> ! {
    // SAFETY: raising a signal has no conditions.
    unsafe { libc::raise(libc::SIGBUS) };
    std::process::abort();
}

/// All large blocks of a budget.
#[derive(Debug)]
struct LargeBlocks {
    /// Bytes in memory at most.
    limit: usize,
    /// Where files are made.
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
        if let Some(place) = self.place(at) {
            self.mappings.swap_remove(place);
        }
    }

    fn remap(&mut self, at: NonNull<u8>, bytes: usize) -> Result<NonNull<[u8]>> {
        let place = self.place(at).ok_or(ErrorKind::NotFound)?;
        let old = &self.mappings[place];
        let length = old.map.len();
        let in_memory = if old.file.is_none() { length } else { 0 };
        let may_stay = in_memory == 0 || bytes <= length || self.fits(bytes - length);
        if !may_stay || self.mappings[place].resize(bytes).is_err() {
            let new = self.make(bytes, in_memory)?;
            let from = self.mappings[place].block()?.cast::<u8>();
            // SAFETY: both are at least as long, and apart, since both are mapped.
            unsafe {
                let to = new.block()?.cast::<u8>();
                to.copy_from_nonoverlapping(from, length.min(bytes));
            }
            self.mappings[place] = new;
        }
        self.mappings[place].block()
    }

    /// A new mapping, in place of `instead` bytes that are in memory now.
    fn make(&self, bytes: usize, instead: usize) -> Result<LargeBlock> {
        if !self.fits(bytes.saturating_sub(instead))
            && let Ok(mapping) = LargeBlock::in_file(bytes, &self.folder, FREE_SHARE)
        {
            return Ok(mapping);
        }
        LargeBlock::in_memory(bytes)
    }

    /// Whether so many more bytes are within the limit.
    fn fits(&self, more: usize) -> bool {
        let in_memory = self.mappings.iter().filter(|one| one.file.is_none());
        let in_memory: usize = in_memory.map(|one| one.map.len()).sum();
        in_memory + more <= self.limit
    }

    fn place(&self, at: NonNull<u8>) -> Option<usize> {
        self.mappings.iter().position(|one| one.map.as_mut_ptr() == at.as_ptr())
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
