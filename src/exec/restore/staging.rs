//! The staging file: wanted blocks at their store addresses, and a journal of which are there, so that an interrupted restore
//! goes on.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::archive::StoreBlock;
use crate::block::{SlotSet, bytes};
use crate::error::{Error, Result};
use crate::sys::readahead::write_out;

/// Bytes written before they are made durable and entered in the journal.
const SETTLE_BYTES: u64 = 512 << 20;
/// Bytes after which writing to disk is begun.
const WRITE_OUT_BYTES: u64 = 32 << 20;

/// A restore's work folder: staging file and journal.
#[derive(Debug)]
pub struct Staging {
    folder: PathBuf,
    path: PathBuf,
    file: File,
    journal: File,
    present: SlotSet,
    /// Ranges not in the journal yet.
    pending: Vec<Range<StoreBlock>>,
    pending_bytes: u64,
    /// Where writing to disk is to begin next.
    dirty: Option<Range<u64>>,
    /// Whether images began to get their names in the restore that is continued.
    pub was_placing: bool,
}

impl Staging {
    /// Whether a restore that did not end left its folder.
    pub fn is_there(folder: &Path) -> bool {
        folder.symlink_metadata().is_ok()
    }

    /// Bytes on disk of what a folder has staged.
    pub fn staged_bytes(folder: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let staged = folder.join("blocks").symlink_metadata();
        staged.map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Makes the folder, or opens the one that is there. Returns the ranges that its journal says are present; they are not
    /// believed until [`Staging::confirm`].
    ///
    /// # Errors
    /// Those of the system calls, or if another import uses it.
    pub fn open(folder: &Path) -> Result<(Self, Vec<Range<StoreBlock>>)> {
        use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
        match std::fs::DirBuilder::new().mode(0o700).create(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io("make the folder", folder)(error));
            }
            _ => {}
        }
        let open = |name: &str| {
            let path = folder.join(name);
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.custom_flags(libc::O_NOFOLLOW);
            options.open(&path).map_err(Error::io("make", &path))
        };
        let (file, mut journal) = (open("blocks")?, open("journal")?);
        if journal.try_lock().is_err() {
            return Err(Error::Usage(format!(
                "another vmfold restores to `{}`",
                crate::shown::shown(folder)
            )));
        }
        let mut text = String::new();
        let path = folder.join("journal");
        // What is not text is torn: nothing of it counts.
        if let Err(error) = (&mut journal).take(1 << 30).read_to_string(&mut text)
            && error.kind() != std::io::ErrorKind::InvalidData
        {
            return Err(Error::io("read", &path)(error));
        }
        let (mut claimed, mut was_placing) = (Vec::new(), false);
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            match line.split_once(' ') {
                Some((first, blocks)) => {
                    if let (Ok(first), Ok(blocks)) = (first.parse::<u32>(), blocks.parse::<u32>())
                        && let Some(end) = first.checked_add(blocks)
                    {
                        claimed.push(first..end);
                    }
                }
                None => was_placing |= line == "placing",
            }
        }
        claimed.sort_unstable_by_key(|range| range.start);
        let staging = Self {
            path: folder.join("blocks"),
            folder: folder.to_owned(),
            file,
            journal,
            present: SlotSet::default(),
            pending: Vec::new(),
            pending_bytes: 0,
            dirty: None,
            was_placing,
        };
        Ok((staging, claimed))
    }

    /// Makes room for so many blocks.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn make_room(&mut self, end: StoreBlock) -> Result<()> {
        self.present.grow(end as usize);
        let length = self.file.metadata().map_err(Error::io("look at", &self.path))?.len();
        if length < bytes(end) {
            self.file
                .set_len(bytes(end))
                .map_err(Error::io("make room in", &self.path))?;
        }
        Ok(())
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a block is there.
    pub fn has(&self, block: StoreBlock) -> bool {
        self.present.contains(block)
    }

    /// The parts of a range that are there.
    pub fn present(&self, range: Range<StoreBlock>) -> impl Iterator<Item = Range<StoreBlock>> + '_ {
        self.present.runs(range)
    }

    /// The parts of a range that are not there.
    pub fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        let (mut missing, mut at) = (Vec::new(), range.start);
        for present in self
            .present
            .runs(range.clone())
            .chain(std::iter::once(range.end..range.end))
        {
            if at < present.start {
                missing.push(at..present.start);
            }
            at = present.end;
        }
        missing
    }

    /// Says that blocks are there, as the journal said.
    pub fn confirm(&mut self, range: Range<StoreBlock>) {
        self.present.insert_range(range);
    }

    /// Reads blocks back.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read(&self, first: StoreBlock, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        self.file
            .read_exact_at(buffer, bytes(first))
            .map_err(Error::io_at("read", &self.path, bytes(first), length))
    }

    /// Writes blocks. May be called by several threads; [`Staging::added`] is called for them afterwards.
    ///
    /// # Errors
    /// [`Error::NoSpace`] among others.
    pub fn write(&self, first: StoreBlock, content: &[u8]) -> Result<()> {
        let written = self.file.write_all_at(content, bytes(first));
        written.map_err(|error| self.no_space(error))
    }

    fn no_space(&self, error: std::io::Error) -> Error {
        match error.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => Error::NoSpace {
                doing: "restoring",
                path: self.folder.clone(),
            },
            _ => Error::io("write to", &self.path)(error),
        }
    }

    /// Says that blocks were written or cloned, and now and then makes them durable.
    ///
    /// # Errors
    /// Those of making them durable.
    pub fn added(&mut self, range: Range<StoreBlock>) -> Result<()> {
        let span = bytes(range.start)..bytes(range.end);
        match &mut self.dirty {
            Some(dirty) if dirty.end == span.start => dirty.end = span.end,
            _ => self.dirty = Some(span.clone()),
        }
        if let Some(dirty) = self.dirty.take_if(|dirty| dirty.end - dirty.start >= WRITE_OUT_BYTES) {
            write_out(&self.file, dirty.start, dirty.end - dirty.start, false).map_err(|error| self.no_space(error))?;
        }
        self.pending_bytes += span.end - span.start;
        self.present.insert_range(range.clone());
        match self.pending.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.pending.push(range),
        }
        if self.pending_bytes >= SETTLE_BYTES {
            self.settle()?;
        }
        Ok(())
    }

    /// Makes everything durable and enters it in the journal.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn settle(&mut self) -> Result<()> {
        self.file.sync_data().map_err(|error| self.no_space(error))?;
        let lines = self
            .pending
            .drain(..)
            .map(|range| format!("{} {}\n", range.start, range.end - range.start));
        let lines = lines.collect::<Vec<_>>().concat();
        self.pending_bytes = 0;
        self.note(&lines)
    }

    /// Notes that images are about to get their names.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn note_placing(&mut self) -> Result<()> {
        self.note("placing\n")
    }

    fn note(&mut self, lines: &str) -> Result<()> {
        let noted = std::io::Seek::seek(&mut self.journal, std::io::SeekFrom::End(0))
            .and_then(|_| self.journal.write_all(lines.as_bytes()))
            .and_then(|()| self.journal.sync_data());
        noted.map_err(|error| self.no_space(error))
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn remove(self) -> Result<()> {
        for name in ["blocks", "journal"] {
            let path = self.folder.join(name);
            std::fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        std::fs::remove_dir(&self.folder).map_err(Error::io("remove", &self.folder))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_settled_is_known_after_an_interruption() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("work");
        let (mut staging, claimed) = Staging::open(&path).unwrap();
        assert_eq!((claimed.len(), staging.was_placing), (0, false));
        staging.make_room(100).unwrap();
        for first in [3, 4, 50] {
            staging.write(first, &[7; 4096]).unwrap();
            staging.added(first..first + 1).unwrap();
        }
        staging.settle().unwrap();
        staging.note_placing().unwrap();
        staging.added(60..61).unwrap();
        drop(staging);
        let torn = std::fs::read(path.join("journal")).unwrap();
        std::fs::write(path.join("journal"), [&torn[..], b"99 1"].concat()).unwrap();
        let (staging, claimed) = Staging::open(&path).unwrap();
        assert_eq!((claimed, staging.was_placing), (vec![3..5, 50..51], true));
        assert!(Staging::open(&path).is_err(), "it is locked");
        staging.remove().unwrap();
        assert!(!Staging::is_there(&path));
    }
}
