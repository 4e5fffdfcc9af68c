//! The staging file: wanted blocks at their store addresses, and a journal of which are there, so that an interrupted restore
//! goes on.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::folder::FileState;
use crate::block::{NumberSet, bytes};
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::numbers::StoreBlock;
use crate::pool::users::FileId;
use crate::range;
use crate::sys::readahead::write_out;

/// Bytes written before they are made durable and entered in the journal.
const SETTLE_BYTES: u64 = 512 << 20;
/// Bytes after which writing to disk is begun.
const WRITE_OUT_BYTES: u64 = 32 << 20;
/// Bytes of a journal that are read.
const JOURNAL_BYTES_MAX: u64 = 1 << 30;
/// The names of both files.
const BLOCKS: &str = "blocks";
const JOURNAL: &str = "journal";

/// A restore's work folder: staging file and journal. Only its user can read it and write to it.
#[derive(Debug)]
pub struct Staging {
    /// The folder that is restored to, in which the work folder lies.
    root: File,
    folder: OwnedFd,
    folder_path: PathBuf,
    path: PathBuf,
    file: File,
    journal: File,
    present: NumberSet<StoreBlock>,
    /// Ranges not in the journal yet.
    pending: Vec<Range<StoreBlock>>,
    pending_bytes: u64,
    /// Where writing to disk is to begin next.
    dirty: Option<Range<u64>>,
    noted: Journal,
}

/// What a journal says.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    /// Ranges of the staging file that were written, ascending by their beginnings.
    claimed: Vec<Range<StoreBlock>>,
    /// Files that were made, by the number of the image.
    images: BTreeMap<usize, Vec<StagingFile>>,
    /// The restore that the following lines are of.
    restore: String,
    /// Numbers of temporary names: the first, and how many.
    temporaries: Vec<(u64, u64)>,
    /// Bytes on disk of the staging file.
    staged_bytes: u64,
}

/// A file that was made of an image.
#[derive(Debug, Clone, Copy)]
pub struct FileOfImage {
    /// The image, by its place in the commit.
    pub image: usize,
    /// Which file, and in which state.
    pub state: FileState,
}

/// A file that was made.
#[derive(Debug, Clone)]
struct StagingFile {
    /// The restore it was made for: see [`Staging::note_restore`].
    restore: String,
    state: FileState,
    /// Whether it had all of its names then.
    is_placed: bool,
}

impl Journal {
    /// Reads the journal of an interrupted restore to the folder `root`; `path` is the work folder there. None if there is none, or it
    /// cannot be read.
    pub fn read(root: &File, path: &Path) -> Option<Self> {
        let folder = open_folder(root, path).ok()?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let journal = rustix::fs::openat(&folder, JOURNAL, flags, Mode::empty()).ok()?;
        let mut noted = Self::parse(&mut File::from(journal)).ok()?.0;
        let staged = rustix::fs::statat(&folder, BLOCKS, AtFlags::SYMLINK_NOFOLLOW);
        let sectors = staged.map_or(0, |staged| staged.st_blocks);
        noted.staged_bytes = u64::try_from(sectors).unwrap_or(0) * 512;
        Some(noted)
    }

    /// What the whole lines of a journal say, and how many bytes they are: the rest was torn.
    fn parse(journal: &mut File) -> std::io::Result<(Self, u64)> {
        let device = journal.metadata()?.dev();
        let mut text = Vec::new();
        journal.seek(SeekFrom::Start(0))?;
        journal.take(JOURNAL_BYTES_MAX).read_to_end(&mut text)?;
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut noted = Self::default();
        for line in text[..end].split(|byte| *byte == b'\n') {
            // What makes no sense is torn, too.
            let _ = std::str::from_utf8(line).ok().and_then(|line| noted.add(line, device));
        }
        noted.claimed.sort_unstable_by_key(|range| range.start);
        Ok((noted, end as u64))
    }

    fn add(&mut self, line: &str, device: u64) -> Option<()> {
        let fields: Vec<&str> = line.split(' ').collect();
        match *fields.as_slice() {
            ["restore", restore] => restore.clone_into(&mut self.restore),
            ["temporary", first, count] => {
                let first = u64::from_str_radix(first, 16).ok()?;
                self.temporaries.push((first, count.parse().ok()?));
            }
            [kind @ ("made" | "placed"), image, ref state @ ..] => {
                let state = state_of(state, device)?;
                let of_image = self.images.entry(image.parse().ok()?).or_default();
                of_image.push(StagingFile {
                    restore: self.restore.clone(),
                    state,
                    is_placed: kind == "placed",
                });
            }
            [first, blocks] => {
                let first = StoreBlock(first.parse().ok()?);
                let end = first.checked_add(blocks.parse().ok()?)?;
                self.claimed.push(first..end);
            }
            _ => {}
        }
        Some(())
    }

    /// Whether a file is what a restore made of an image, with all of its names, and has not changed in any way since.
    pub fn is_done(&self, restore: &str, image: usize, found: &FileState) -> bool {
        self.of(Some(restore), image)
            .any(|made| made.is_placed && made.state == *found)
    }

    /// Whether a file is what a restore, or any if none is given, made of an image, and has not been written to since.
    pub fn is_ours(&self, restore: Option<&str>, image: usize, found: &FileState) -> bool {
        self.of(restore, image).any(|made| made.state.is_same_file(found))
    }

    fn of(&self, restore: Option<&str>, image: usize) -> impl Iterator<Item = &StagingFile> {
        let made = self.images.get(&image).into_iter().flatten();
        made.filter(move |made| restore.is_none_or(|restore| made.restore == restore))
    }

    /// Whether a temporary name of this number was to be used.
    pub fn is_temporary(&self, number: u64) -> bool {
        let is_in = |(first, count): &(u64, u64)| number.wrapping_sub(*first) < *count;
        self.temporaries.iter().any(is_in)
    }

    /// Bytes that are on disk already.
    pub fn staged_bytes(&self) -> u64 {
        self.staged_bytes
    }

    /// The ranges that were written; nothing of it is proved.
    pub fn claimed(&self) -> &[Range<StoreBlock>] {
        &self.claimed
    }
}

/// A line of the journal: device (`-` for that of the journal, whose number may be another after the next mount), inode, when it was
/// made, size, and the times of the last writing and change.
fn line_of(kind: &str, image: usize, state: &FileState, device: u64) -> String {
    let mut line = format!("{kind} {image} ");
    let _ = match state.id.device {
        same if same == device => write!(line, "-"),
        other => write!(line, "{other}"),
    };
    let FileState {
        id,
        born,
        size,
        mtime,
        ctime,
    } = state;
    let [born, mtime, ctime] = [born, mtime, ctime].map(|time| format!("{} {}", time.seconds, time.nanoseconds));
    let _ = writeln!(line, " {} {born} {size} {mtime} {ctime}", id.inode);
    line
}

fn state_of(fields: &[&str], device: u64) -> Option<FileState> {
    let &[on, inode, born, born_ns, size, mtime, mtime_ns, ctime, ctime_ns] = fields else {
        return None;
    };
    let time = |seconds: &str, nanoseconds: &str| {
        Some(FileTime {
            seconds: seconds.parse().ok()?,
            nanoseconds: nanoseconds.parse().ok()?,
        })
    };
    Some(FileState {
        id: FileId {
            device: if on == "-" { device } else { on.parse().ok()? },
            inode: inode.parse().ok()?,
        },
        born: time(born, born_ns)?,
        size: size.parse().ok()?,
        mtime: time(mtime, mtime_ns)?,
        ctime: time(ctime, ctime_ns)?,
    })
}

/// Opens a work folder, which must be one that only this user can write to: what it says is believed.
fn open_folder(root: &File, path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let name = path.file_name().unwrap_or_default();
    let not_ours = || Error::NotOurs { path: path.to_owned() };
    let folder = match rustix::fs::openat(root, name, flags, Mode::empty()) {
        Ok(folder) => folder,
        Err(Errno::LOOP | Errno::NOTDIR | Errno::ACCESS) => return Err(not_ours()),
        Err(errno) => return Err(Error::io("open the folder", path)(errno)),
    };
    let stat = rustix::fs::fstat(&folder).map_err(Error::io("look at", path))?;
    let others = Mode::from_raw_mode(stat.st_mode) & (Mode::WGRP | Mode::WOTH);
    if stat.st_uid != rustix::process::geteuid().as_raw() || !others.is_empty() {
        return Err(not_ours());
    }
    Ok(folder)
}

impl Staging {
    /// Makes the work folder `path` in the folder `root`, or opens the one that is there. What its journal says of ranges is not believed
    /// until [`Staging::confirm`].
    ///
    /// # Errors
    /// Those of the system calls; [`Error::Restoring`] if another import uses it; [`Error::NotOurs`] if someone else made it.
    pub fn open(root: &File, path: &Path) -> Result<Self> {
        let name = path.file_name().unwrap_or_default();
        match rustix::fs::mkdirat(root, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(Error::io("make the folder", path)(errno)),
        }
        let folder = open_folder(root, path)?;
        let open = |name: &str| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let opened = rustix::fs::openat(&folder, name, flags, Mode::RUSR | Mode::WUSR);
            opened.map(File::from).map_err(Error::io("make", &path.join(name)))
        };
        // Only a folder that has a journal is one of an interrupted restore.
        let mut journal = open(JOURNAL)?;
        if journal.try_lock().is_err() {
            return Err(Error::Restoring { path: path.to_owned() });
        }
        let file = open(BLOCKS)?;
        let journal_path = path.join(JOURNAL);
        let (noted, end) = Journal::parse(&mut journal).map_err(Error::io("read", &journal_path))?;
        // A torn line is not to become one with the next.
        journal.set_len(end).map_err(Error::io("write to", &journal_path))?;
        Ok(Self {
            root: root.try_clone().map_err(Error::io("open the folder of", path))?,
            folder,
            folder_path: path.to_owned(),
            path: path.join(BLOCKS),
            file,
            journal,
            present: NumberSet::default(),
            pending: Vec::new(),
            pending_bytes: 0,
            dirty: None,
            noted,
        })
    }

    /// What the journal said when it was opened.
    pub fn noted(&self) -> &Journal {
        &self.noted
    }

    /// Bytes that are on disk.
    pub fn staged_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Makes room for so many blocks.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn make_room(&mut self, end: StoreBlock) -> Result<()> {
        self.present.grow(end.index());
        let length = self.file.metadata().map_err(Error::io("look at", &self.path))?.len();
        if length < bytes(end.0) {
            self.file
                .set_len(bytes(end.0))
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
        let present: Vec<_> = self.present.runs(range.clone()).collect();
        range::without(std::slice::from_ref(&range), &present)
    }

    /// Says that blocks are there, as the journal said.
    pub fn confirm(&mut self, range: Range<StoreBlock>) {
        self.present.insert_range(range);
    }

    /// Says that blocks are not there after all.
    pub fn forget(&mut self, range: Range<StoreBlock>) {
        for block in range::each(range) {
            self.present.remove(block);
        }
    }

    /// Reads blocks back.
    ///
    /// # Errors
    /// Those of reading.
    pub fn read(&self, first: StoreBlock, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        self.file.read_exact_at(buffer, bytes(first.0)).map_err(Error::io_at(
            "read",
            &self.path,
            bytes(first.0),
            length,
        ))
    }

    /// Writes blocks. May be called by several threads; [`Staging::added`] is called for them afterwards.
    ///
    /// # Errors
    /// [`Error::NoSpace`] among others.
    pub fn write(&self, first: StoreBlock, content: &[u8]) -> Result<()> {
        let written = self.file.write_all_at(content, bytes(first.0));
        written.map_err(Error::writing("write to", &self.folder_path))
    }

    /// Says that blocks were written or cloned, and now and then makes them durable.
    ///
    /// # Errors
    /// Those of making them durable.
    pub fn added(&mut self, range: Range<StoreBlock>) -> Result<()> {
        let span = bytes(range.start.0)..bytes(range.end.0);
        match &mut self.dirty {
            Some(dirty) if dirty.end == span.start => dirty.end = span.end,
            _ => self.dirty = Some(span.clone()),
        }
        if let Some(dirty) = self.dirty.take_if(|dirty| dirty.end - dirty.start >= WRITE_OUT_BYTES) {
            write_out(&self.file, dirty.start, dirty.end - dirty.start, false)
                .map_err(Error::writing("write to", &self.folder_path))?;
        }
        self.pending_bytes += span.end - span.start;
        self.present.insert_range(range.clone());
        range::push(&mut self.pending, range);
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
        self.file
            .sync_data()
            .map_err(Error::writing("write to", &self.folder_path))?;
        let lines = self
            .pending
            .drain(..)
            .map(|range| format!("{} {}\n", range.start, range.end - range.start));
        let lines = lines.collect::<Vec<_>>().concat();
        self.pending_bytes = 0;
        self.note(&lines)
    }

    /// Notes that temporary names are about to be used: so many from a number on.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn note_temporaries(&mut self, first: u64, count: u64) -> Result<()> {
        self.note(&format!("temporary {first:016x} {count}\n"))
    }

    /// Notes files that were made of images and are about to get their names.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn note_made(&mut self, made: impl Iterator<Item = FileOfImage>) -> Result<()> {
        let device = self.device()?;
        let lines: String = made.map(|one| line_of("made", one.image, &one.state, device)).collect();
        self.note(&lines)
    }

    /// Notes which restore the following lines are of: one commit of one archive, under names of one kind. Digits and letters only.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn note_restore(&mut self, restore: &str) -> Result<()> {
        self.note(&format!("restore {restore}\n"))
    }

    /// Notes that a file of an image has all of its names. This may be lost in a power cut: then the image is made anew.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn note_placed(&mut self, image: usize, state: &FileState) -> Result<()> {
        let line = line_of("placed", image, state, self.device()?);
        self.append(&line)
            .map_err(Error::writing("write to", &self.folder_path))
    }

    fn device(&self) -> Result<u64> {
        let metadata = self.journal.metadata();
        Ok(metadata.map_err(Error::io("look at", &self.folder_path))?.dev())
    }

    fn note(&mut self, lines: &str) -> Result<()> {
        let noted = self.append(lines).and_then(|()| self.journal.sync_data());
        noted.map_err(Error::writing("write to", &self.folder_path))
    }

    fn append(&mut self, lines: &str) -> std::io::Result<()> {
        self.journal.seek(SeekFrom::End(0))?;
        self.journal.write_all(lines.as_bytes())
    }

    /// Removes the folder. The journal goes last: as long as it is there, it says what is done.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn remove(self) -> Result<()> {
        for name in [BLOCKS, JOURNAL] {
            let removed = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty());
            removed.map_err(Error::io("remove", &self.folder_path.join(name)))?;
        }
        let name = self.folder_path.file_name().unwrap_or_default();
        let removed = rustix::fs::unlinkat(&self.root, name, AtFlags::REMOVEDIR);
        removed.map_err(Error::io("remove", &self.folder_path))
    }
}

#[cfg(test)]
mod tests {
    use super::super::folder::Root;
    use super::*;

    #[test]
    fn what_is_settled_is_known_after_an_interruption() {
        let folder = tempfile::tempdir().unwrap();
        let (root, path) = (File::open(folder.path()).unwrap(), folder.path().join("work"));
        assert!(Journal::read(&root, &path).is_none());
        let mut staging = Staging::open(&root, &path).unwrap();
        assert!(staging.noted().claimed.is_empty());
        staging.make_room(StoreBlock(100)).unwrap();
        for first in [3, 4, 50] {
            staging.write(StoreBlock(first), &[7; 4096]).unwrap();
            staging.added(StoreBlock::range(first..first + 1)).unwrap();
        }
        staging.settle().unwrap();
        staging.added(StoreBlock::range(60..61)).unwrap();
        drop(staging);
        let torn = std::fs::read(path.join("journal")).unwrap();
        std::fs::write(path.join("journal"), [&torn[..], b"\xff 1\n99 1"].concat()).unwrap();
        assert_eq!(
            Journal::read(&root, &path).unwrap().claimed,
            [3..5, 50..51].map(StoreBlock::range)
        );
        let mut staging = Staging::open(&root, &path).unwrap();
        assert!(matches!(Staging::open(&root, &path), Err(Error::Restoring { .. })));
        staging.make_room(StoreBlock(100)).unwrap();
        staging.added(StoreBlock::range(7..8)).unwrap();
        staging.settle().unwrap();
        assert_eq!(
            Journal::read(&root, &path).unwrap().claimed,
            [3..5, 7..8, 50..51].map(StoreBlock::range)
        );
        staging.remove().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn only_what_was_placed_and_has_not_changed_is_done() {
        let folder = tempfile::tempdir().unwrap();
        let (root, path) = (Root::lock(folder.path()).unwrap(), folder.path().join("work"));
        let name = folder.path().join("x.img");
        std::fs::write(&name, "content").unwrap();
        let place = root.place(Path::new("x.img"), false, |_| {}).unwrap().unwrap();
        let made = place.state().unwrap();
        let mut staging = Staging::open(root.file(), &path).unwrap();
        staging.note_temporaries(u64::MAX - 1, 3).unwrap();
        staging.note_restore("c0ffee").unwrap();
        let file = FileOfImage { image: 5, state: made };
        staging.note_made([file].into_iter()).unwrap();
        let noted = || Journal::read(root.file(), &path).unwrap();
        assert!(
            noted().is_ours(Some("c0ffee"), 5, &made)
                && !noted().is_done("c0ffee", 5, &made)
                && !noted().is_ours(None, 4, &made)
        );
        staging.note_placed(5, &made).unwrap();
        assert!(noted().is_done("c0ffee", 5, &made) && !noted().is_done("c0ffee", 4, &made));
        // What another commit made under the name is not what this one holds.
        assert!(!noted().is_done("decaf", 5, &made) && !noted().is_ours(Some("decaf"), 5, &made));
        assert!(noted().is_ours(None, 5, &made));
        for (number, is) in [(u64::MAX - 2, false), (u64::MAX - 1, true), (0, true), (1, false)] {
            assert_eq!(noted().is_temporary(number), is, "{number}");
        }
        // Another name changes nothing of what is in it; the same size and time alone prove nothing.
        std::fs::hard_link(&name, folder.path().join("y.img")).unwrap();
        let linked = place.state().unwrap();
        assert!(noted().is_ours(Some("c0ffee"), 5, &linked));
        let mtime = name.metadata().unwrap().modified().unwrap();
        let file = File::options().write(true).open(&name).unwrap();
        file.write_all_at(b"C", 0).unwrap();
        file.set_modified(mtime).unwrap();
        let written = place.state().unwrap();
        assert_eq!((written.size, written.mtime), (made.size, made.mtime));
        assert!(!noted().is_done("c0ffee", 5, &written));
        file.write_all_at(b"c", 0).unwrap();
        assert!(!noted().is_ours(Some("c0ffee"), 5, &place.state().unwrap()));
        std::fs::remove_file(&name).unwrap();
        std::fs::write(&name, "content").unwrap();
        assert!(!noted().is_ours(Some("c0ffee"), 5, &place.state().unwrap()));
        // What others could write to is not believed.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(Journal::read(root.file(), &path).is_none());
        assert!(matches!(Staging::open(root.file(), &path), Err(Error::NotOurs { .. })));
    }
}
