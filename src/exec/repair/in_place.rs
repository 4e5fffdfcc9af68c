//! Writes what was healed into the archive itself. All of it is proved and lies in a journal beside the archive before the first byte is written, and a
//! repair that was killed meanwhile is ended by the next one: whatever of it was written, writing it again gives the same.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::copy::place_of;
use super::view::View;
use crate::error::{Error, Result};
use crate::exec::restore::folder::Place;
use crate::monitor::Monitor;
use crate::parity::CELL_BYTES;
use crate::store::{FileStore, Store};

/// What the end of a journal begins with.
const MAGIC: [u8; 16] = *b"vmfold repair 1\n";
/// Bytes of the end of a journal: the magic; cells, new length, old length, device and inode of the archive, u64 each; BLAKE3 of all before.
const END_BYTES: usize = 16 + 5 * 8 + 32;
/// Bytes of the number of a cell.
const NUMBER_BYTES: usize = 8;
/// Cells that are written at most: 16 GiB. More are moved only where bytes are missing, or stand twice, near the beginning of a large archive.
const CELLS_MAX: usize = 1 << 22;

/// An archive that is repaired in place, locked against other writers, and its journal.
pub struct InPlace {
    store: Arc<FileStore>,
    journal: Place,
    cells: File,
    /// Whether an interrupted repair was ended first.
    was_pending: bool,
    /// Whether the journal is complete, so that it must stay until all of it is written.
    is_complete: bool,
}

/// A journal that is complete: a repair in place was interrupted.
struct Pending {
    cells: Vec<u64>,
    new_length: u64,
}

/// The name of the journal of an archive, in its open folder.
fn journal_of(path: &Path) -> Result<Place> {
    let real = std::fs::canonicalize(path).map_err(Error::io("look at", path))?;
    let mut name = OsString::from(".");
    name.push(real.file_name().unwrap_or_default());
    name.push(".vmfold-repair");
    place_of(&real.with_file_name(name))
}

/// Opens a journal, if there is one. One that another user put there is refused.
fn open_journal(place: &Place) -> Result<Option<File>> {
    let failed = Error::io("open", &place.path);
    let file = match place.open(OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    let metadata = file.metadata().map_err(Error::io("look at", &place.path))?;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own || !metadata.is_file() {
        return Err(Error::OfAnother {
            path: place.path.clone(),
            uid: metadata.uid(),
        });
    }
    Ok(Some(file))
}

/// Refuses an archive whose repair in place was interrupted, but for another repair in place.
///
/// # Errors
/// [`Error::Usage`] if there is a journal of it; [`Error::Io`] if that cannot be read.
pub fn refuse_pending(path: &Path) -> Result<()> {
    let journal = journal_of(path)?;
    let Some(file) = open_journal(&journal)? else {
        return Ok(());
    };
    let archive = FileStore::open(path)?;
    match read_journal(&file, &archive).map_err(Error::io("read", &journal.path))? {
        Some(_) => Err(Error::Usage(format!(
            "a repair in place of `{}` was interrupted: run vmfold repair --in-place, which ends it",
            crate::shown::shown(path)
        ))),
        None => Ok(()),
    }
}

/// Reads a journal. Returns none if it is not complete, or is that of another file.
fn read_journal(file: &File, archive: &FileStore) -> io::Result<Option<Pending>> {
    let length = file.metadata()?.len();
    let Some(end_at) = length.checked_sub(END_BYTES as u64) else {
        return Ok(None);
    };
    let mut end = [0; END_BYTES];
    file.read_exact_at(&mut end, end_at)?;
    let field = |number: usize| {
        let start = MAGIC.len() + number * 8;
        end[start..start + 8]
            .iter()
            .rev()
            .fold(0, |number: u64, byte| number << 8 | u64::from(*byte))
    };
    let [count, new_length, _, device, inode] = [0, 1, 2, 3, 4].map(field);
    let expected = count.checked_mul((CELL_BYTES + NUMBER_BYTES) as u64);
    if !end.starts_with(&MAGIC) || expected != Some(end_at) || archive.identity()? != (device, inode) {
        return Ok(None);
    }
    let (summed, hash) = end.split_at(END_BYTES - 32);
    if hash_of(file, end_at, summed)? != *hash {
        return Ok(None);
    }
    let count = usize::try_from(count).unwrap_or(usize::MAX).min(CELLS_MAX);
    let mut numbers = vec![0; count * NUMBER_BYTES];
    file.read_exact_at(&mut numbers, (count * CELL_BYTES) as u64)?;
    let cells = numbers.as_chunks::<NUMBER_BYTES>().0.iter();
    Ok(Some(Pending {
        cells: cells.map(|number| u64::from_le_bytes(*number)).collect(),
        new_length,
    }))
}

/// BLAKE3 of the first bytes of a file, and some more.
fn hash_of(file: &File, length: u64, more: &[u8]) -> io::Result<[u8; 32]> {
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < length {
        let count = usize::try_from(length - at).unwrap_or(usize::MAX).min(buffer.len());
        file.read_exact_at(&mut buffer[..count], at)?;
        hasher.update(&buffer[..count]);
        at += count as u64;
    }
    Ok(*hasher.update(more).finalize().as_bytes())
}

impl InPlace {
    /// Opens an archive, and ends a repair of it that was interrupted.
    ///
    /// # Errors
    /// Those of [`FileStore::append_to`]; [`Error::OfAnother`] if another user put something in the place of the journal; [`Error::Io`].
    pub fn begin(path: &Path, monitor: &dyn Monitor) -> Result<Self> {
        // What does not exist must not be made.
        drop(FileStore::open(path)?);
        let store = Arc::new(FileStore::append_to(path)?);
        let journal = journal_of(path)?;
        let mut was_pending = false;
        if let Some(file) = open_journal(&journal)? {
            let pending = read_journal(&file, &store).map_err(Error::io("read", &journal.path))?;
            if let Some(pending) = pending {
                monitor.note("A repair in place was interrupted, and is ended first");
                write_all(&store, &file, &pending)?;
                was_pending = true;
            }
            journal.remove()?;
            journal.sync_folder()?;
        }
        let cells = journal.create()?;
        Ok(Self {
            store,
            journal,
            cells,
            was_pending,
            is_complete: false,
        })
    }

    /// Returns the archive.
    pub fn store(&self) -> Arc<dyn Store> {
        Arc::clone(&self.store) as _
    }

    /// Returns the file for what is computed, which becomes the journal.
    ///
    /// # Errors
    /// [`Error::Io`] if there are too many open files.
    pub fn cells(&self) -> Result<File> {
        self.cells.try_clone().map_err(Error::io("open", &self.journal.path))
    }

    /// Returns whether an interrupted repair was ended first.
    pub fn was_pending(&self) -> bool {
        self.was_pending
    }

    /// Writes the healed archive in the place of the damaged one. Returns whether that changed it.
    ///
    /// # Errors
    /// [`Error::Usage`] if more is to be moved than a journal takes; [`Error::NoSpace`] or [`Error::Io`] if the journal or the archive cannot be
    /// written. If the journal is complete, the next repair in place ends it.
    pub fn write(mut self, view: &View) -> Result<bool> {
        if view.is_the_file() {
            return Ok(false);
        }
        let failed = |error: io::Error| Error::writing("write", &self.journal.path)(error);
        if !view.hold_moved(CELLS_MAX).map_err(failed)? {
            return Err(Error::Usage(
                "bytes are missing or stand twice, so that more than 16 GiB would move: repair it into a copy, with --to".into(),
            ));
        }
        if !view.changes_the_file().map_err(failed)? {
            return Ok(false);
        }
        let pending = Pending {
            cells: view.cells_by_slot(),
            new_length: view.length(),
        };
        self.complete(&pending).map_err(failed)?;
        self.journal.sync_folder()?;
        self.is_complete = true;
        write_all(&self.store, &self.cells, &pending)?;
        self.journal.remove()?;
        self.journal.sync_folder()?;
        Ok(true)
    }

    /// Ends the journal. From here on, it counts.
    fn complete(&self, pending: &Pending) -> io::Result<()> {
        let mut at = (pending.cells.len() * CELL_BYTES) as u64;
        let numbers: Vec<u8> = pending.cells.iter().flat_map(|cell| cell.to_le_bytes()).collect();
        self.cells.write_all_at(&numbers, at)?;
        at += numbers.len() as u64;
        let (device, inode) = self.store.identity()?;
        let old_length = self.store.length()?.unwrap_or(0);
        let mut end = MAGIC.to_vec();
        for field in [
            pending.cells.len() as u64,
            pending.new_length,
            old_length,
            device,
            inode,
        ] {
            end.extend(field.to_le_bytes());
        }
        let hash = hash_of(&self.cells, at, &end)?;
        end.extend(hash);
        self.cells.write_all_at(&end, at)?;
        self.cells.sync_all()
    }
}

impl Drop for InPlace {
    fn drop(&mut self) {
        // A journal that is not complete is of no use. If it stays, the next repair removes it.
        if !self.is_complete {
            let _ = self.journal.remove();
        }
    }
}

/// Writes all cells of a journal into the archive, and has them on the disk.
fn write_all(store: &FileStore, journal: &File, pending: &Pending) -> Result<()> {
    let path: PathBuf = store.path().to_owned();
    let write = || -> io::Result<()> {
        let mut content = [0; CELL_BYTES];
        for (slot, cell) in (0u64..).zip(&pending.cells) {
            journal.read_exact_at(&mut content, slot * CELL_BYTES as u64)?;
            let start = cell.saturating_mul(CELL_BYTES as u64);
            let count = usize::try_from(pending.new_length.saturating_sub(start)).unwrap_or(usize::MAX);
            store.overwrite(start, &content[..count.min(CELL_BYTES)])?;
        }
        store.resize(pending.new_length)?;
        store.settle()
    };
    write().map_err(|error| Error::writing("write", &path)(error))
}
