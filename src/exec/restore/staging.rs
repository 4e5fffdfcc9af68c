//! The staging file holds the wanted blocks at their store addresses. A journal beside it says which blocks it holds, so that an interrupted
//! restore can be resumed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::folder::FileState;
use crate::block::{NumberSet, bytes};
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::numbers::StoreBlock;
use crate::pool::users::FileId;
use crate::range;
use crate::sys::readahead::write_out;

/// Bytes of blocks after which they are made durable and entered in the journal.
const SETTLE_BYTES: u64 = 512 << 20;
/// Bytes of consecutive blocks after which the kernel is asked to write them to the disk.
const WRITE_OUT_BYTES: u64 = 32 << 20;
/// Bytes of a journal that are read at most. The rest of a longer one is ignored.
const JOURNAL_BYTES_MAX: u64 = 1 << 30;
/// The name of the staging file.
const BLOCKS: &str = "blocks";
/// The name of the journal.
const JOURNAL: &str = "journal";

/// The work folder of a restore, with the staging file and the journal. Only its user can read and write it.
#[derive(Debug)]
pub struct Staging {
    /// The folder that is restored to, in which the work folder lies.
    root: File,
    folder: OwnedFd,
    folder_path: PathBuf,
    /// The path of the staging file.
    path: PathBuf,
    /// The staging file.
    file: File,
    journal: File,
    /// The blocks that the staging file holds.
    present: NumberSet<StoreBlock>,
    /// Ranges of blocks that are not in the journal yet.
    pending: Vec<Range<StoreBlock>>,
    pending_bytes: u64,
    /// The last consecutive bytes of which the kernel was not asked yet to write them.
    dirty: Option<Range<u64>>,
    /// What the journal said when it was opened.
    journal_at_start: Journal,
    /// Whether the journal has files of images.
    has_images: bool,
}

/// The content of a journal.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    /// Ranges of blocks that were staged, ascending by their beginnings.
    claimed: Vec<Range<StoreBlock>>,
    /// Files that were made, by the image's place in the manifest.
    images: BTreeMap<usize, Vec<JournaledFile>>,
    /// The restore that the following lines belong to: see [`Staging::note_restore`].
    restore: String,
    /// Temporary names: the number of the first one, and how many follow each other.
    temporaries: Vec<(u64, u64)>,
    /// Bytes that the staging file takes on disk.
    staged_bytes: u64,
}

/// A file that was made of an image.
#[derive(Debug, Clone, Copy)]
pub struct FileOfImage {
    /// The image, by its place in the commit.
    pub image: usize,
    /// The file, and its state.
    pub state: FileState,
}

/// A file that was made, as the journal has it.
#[derive(Debug, Clone)]
struct JournaledFile {
    /// The restore that made it.
    restore: String,
    /// The state of the file.
    state: FileState,
    /// Whether it had all of its names in this state.
    is_placed: bool,
}

impl Journal {
    /// Reads the journal of an interrupted restore to the folder `root`, in which `path` is the work folder. It returns `None` if there is no
    /// journal, if it cannot be read, or if another user can write to the work folder.
    pub fn read(root: &File, path: &Path) -> Option<Self> {
        let folder = open_folder(root, path).ok()?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let journal = rustix::fs::openat(&folder, JOURNAL, flags, Mode::empty()).ok()?;
        let (mut journal, _) = Self::parse(&mut File::from(journal)).ok()?;
        let staged = rustix::fs::statat(&folder, BLOCKS, AtFlags::SYMLINK_NOFOLLOW);
        let sectors = staged.map_or(0, |staged| staged.st_blocks);
        journal.staged_bytes = u64::try_from(sectors).unwrap_or(0) * 512;
        Some(journal)
    }

    /// Reads the whole lines of a journal, and returns their length in bytes. An incomplete last line was torn by an interruption.
    fn parse(file: &mut File) -> std::io::Result<(Self, u64)> {
        let device = file.metadata()?.dev();
        let mut text = Vec::new();
        file.seek(SeekFrom::Start(0))?;
        file.take(JOURNAL_BYTES_MAX).read_to_end(&mut text)?;
        let end = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let mut journal = Self::default();
        for line in text[..end].split(|byte| *byte == b'\n') {
            // A line that makes no sense was torn as well, and is ignored.
            let _ = std::str::from_utf8(line)
                .ok()
                .and_then(|line| journal.add(line, device));
        }
        journal.claimed.sort_unstable_by_key(|range| range.start);
        Ok((journal, end as u64))
    }

    /// Adds what a line says. It returns `None` if the line makes no sense.
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
                of_image.push(JournaledFile {
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

    /// Whether a file is the one that a restore made of an image, has all of its names, and did not change in any way since.
    pub fn is_done(&self, restore: &str, image: usize, state: &FileState) -> bool {
        self.files_of(Some(restore), image)
            .any(|file| file.is_placed && file.state == *state)
    }

    /// Whether a file is the one that a restore made of an image, and was not written to since. Without `restore`, any restore counts.
    pub fn is_ours(&self, restore: Option<&str>, image: usize, state: &FileState) -> bool {
        self.files_of(restore, image).any(|file| file.state.is_same_file(state))
    }

    /// The files that a restore, or any restore, made of an image.
    fn files_of(&self, restore: Option<&str>, image: usize) -> impl Iterator<Item = &JournaledFile> {
        let files = self.images.get(&image).into_iter().flatten();
        files.filter(move |file| restore.is_none_or(|restore| file.restore == restore))
    }

    /// Whether an interrupted restore may have used the temporary name of this number.
    pub fn is_temporary(&self, number: u64) -> bool {
        let is_in = |(first, count): &(u64, u64)| number.wrapping_sub(*first) < *count;
        self.temporaries.iter().any(is_in)
    }

    /// Bytes that the staging file of the interrupted restore takes on disk.
    pub fn staged_bytes(&self) -> u64 {
        self.staged_bytes
    }

    /// The ranges of blocks that were staged according to the journal. They have to be compared with their hashes.
    pub fn claimed(&self) -> &[Range<StoreBlock>] {
        &self.claimed
    }
}

/// A line of the journal on a file: device, inode, the time when the inode was made, size, mtime and ctime. The device is `-` if it is that
/// of the journal, because its number may be another one after the next mount.
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

/// The state that the fields of such a line describe.
fn state_of(fields: &[&str], device: u64) -> Option<FileState> {
    let &[
        file_device,
        inode,
        born,
        born_ns,
        size,
        mtime,
        mtime_ns,
        ctime,
        ctime_ns,
    ] = fields
    else {
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
            device: if file_device == "-" {
                device
            } else {
                file_device.parse().ok()?
            },
            inode: inode.parse().ok()?,
        },
        born: time(born, born_ns)?,
        size: size.parse().ok()?,
        mtime: time(mtime, mtime_ns)?,
        ctime: time(ctime, ctime_ns)?,
    })
}

/// Opens a work folder. Only this user may be able to write to it, because what its journal says of files is believed.
///
/// # Errors
/// [`Error::NotOurs`] if another user can write to it, or it is no folder; [`Error::Io`] if it cannot be opened.
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
    /// Makes the work folder `path` in the folder `root`, or opens it if it exists. Blocks that its journal claims count as missing until
    /// [`Staging::confirm`] is called for them.
    ///
    /// # Errors
    /// [`Error::Restoring`] if another import uses it; [`Error::NotOurs`] if another user can write to it; [`Error::Io`] if it cannot be made
    /// or opened.
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
        // The journal is made first: a folder without one does not count as that of an interrupted restore.
        let mut journal = open(JOURNAL)?;
        if journal.try_lock().is_err() {
            return Err(Error::Restoring { path: path.to_owned() });
        }
        let file = open(BLOCKS)?;
        let journal_path = path.join(JOURNAL);
        let (journal_at_start, end) = Journal::parse(&mut journal).map_err(Error::io("read", &journal_path))?;
        // A torn line is removed, so that the next line does not continue it.
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
            has_images: !journal_at_start.images.is_empty(),
            journal_at_start,
        })
    }

    /// Has the filesystem compress by zstd what is written to the staging file from now on. btrfs does (`btrfs(5)`, the property
    /// `compression`).
    ///
    /// # Errors
    /// [`Error::Usage`] if it cannot.
    pub fn compress(&self) -> Result<()> {
        let set = rustix::fs::fsetxattr(&self.file, "btrfs.compression", b"zstd", XattrFlags::empty());
        set.map_err(|errno| {
            let error = std::io::Error::from(errno);
            Error::Usage(format!(
                "btrfs cannot compress `{}`: {error}",
                crate::shown::shown(&self.path)
            ))
        })
    }

    /// What the journal said when it was opened.
    pub fn journal_at_start(&self) -> &Journal {
        &self.journal_at_start
    }

    /// Whether files were made of images, in this run or in the interrupted one.
    pub fn has_images(&self) -> bool {
        self.has_images
    }

    /// Bytes that the staging file takes on disk.
    pub fn staged_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.blocks() * 512)
    }

    /// Bytes of blocks that were added and are not durable yet.
    pub fn pending_bytes(&self) -> u64 {
        self.pending_bytes
    }

    /// Extends the staging file, as a hole, so that it has room for the blocks before `end`.
    ///
    /// # Errors
    /// [`Error::Io`] if its length cannot be set.
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

    /// The staging file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The path of the staging file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether a block is staged.
    pub fn has(&self, block: StoreBlock) -> bool {
        self.present.contains(block)
    }

    /// The parts of a range that are staged.
    pub fn present(&self, range: Range<StoreBlock>) -> impl Iterator<Item = Range<StoreBlock>> + '_ {
        self.present.runs(range)
    }

    /// The parts of a range that are not staged.
    pub fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        let present: Vec<_> = self.present.runs(range.clone()).collect();
        range::without(std::slice::from_ref(&range), &present)
    }

    /// Marks blocks as staged that the journal claims, after they were compared with their hashes.
    pub fn confirm(&mut self, range: Range<StoreBlock>) {
        self.present.insert_range(range);
    }

    /// Marks blocks as not staged.
    pub fn forget(&mut self, range: Range<StoreBlock>) {
        for block in range::each(range) {
            self.present.remove(block);
        }
    }

    /// Reads staged blocks.
    ///
    /// # Errors
    /// [`Error::Io`] with path and range.
    pub fn read(&self, first: StoreBlock, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        self.file.read_exact_at(buffer, bytes(first.0)).map_err(Error::io_at(
            "read",
            &self.path,
            bytes(first.0),
            length,
        ))
    }

    /// Writes blocks. Several threads may call this at once. [`Staging::added`] has to be called for the blocks afterwards.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`].
    pub fn write(&self, first: StoreBlock, content: &[u8]) -> Result<()> {
        let written = self.file.write_all_at(content, bytes(first.0));
        written.map_err(Error::writing("write to", &self.folder_path))
    }

    /// Marks blocks as staged that were written or cloned. Every `SETTLE_BYTES` it makes them durable.
    ///
    /// # Errors
    /// Those of [`Staging::settle`].
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

    /// Makes all staged blocks durable, and then enters them in the journal.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the staging file or the journal cannot be written.
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

    /// Enters in the journal that temporary names are used from now on: so many from a number on.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the journal cannot be written.
    pub fn note_temporaries(&mut self, first: u64, count: u64) -> Result<()> {
        self.note(&format!("temporary {first:016x} {count}\n"))
    }

    /// Enters files in the journal that were made of images and get their names next.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the journal cannot be written.
    pub fn note_made(&mut self, made: impl Iterator<Item = FileOfImage>) -> Result<()> {
        let device = self.device()?;
        self.has_images = true;
        let lines: String = made.map(|one| line_of("made", one.image, &one.state, device)).collect();
        self.note(&lines)
    }

    /// Enters in the journal which restore the following lines belong to. `restore` identifies the commit of the archive and the kind of
    /// names, and consists of digits and letters.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the journal cannot be written.
    pub fn note_restore(&mut self, restore: &str) -> Result<()> {
        self.note(&format!("restore {restore}\n"))
    }

    /// Enters in the journal that the file of an image has all of its names. The line is not made durable: if a power cut loses it, the image
    /// is made again.
    ///
    /// # Errors
    /// [`Error::NoSpace`] or [`Error::Io`] if the journal cannot be written.
    pub fn note_placed(&mut self, image: usize, state: &FileState) -> Result<()> {
        let line = line_of("placed", image, state, self.device()?);
        self.append(&line)
            .map_err(Error::writing("write to", &self.folder_path))
    }

    /// The device number of the journal.
    fn device(&self) -> Result<u64> {
        let metadata = self.journal.metadata();
        Ok(metadata.map_err(Error::io("look at", &self.folder_path))?.dev())
    }

    /// Appends lines to the journal, and makes them durable.
    fn note(&mut self, lines: &str) -> Result<()> {
        let written = self.append(lines).and_then(|()| self.journal.sync_data());
        written.map_err(Error::writing("write to", &self.folder_path))
    }

    /// Appends lines to the journal.
    fn append(&mut self, lines: &str) -> std::io::Result<()> {
        self.journal.seek(SeekFrom::End(0))?;
        self.journal.write_all(lines.as_bytes())
    }

    /// Removes the work folder. The journal is removed after the staging file, because it says which images are done.
    ///
    /// # Errors
    /// [`Error::Io`] if a file or the folder cannot be removed.
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
        assert!(staging.journal_at_start().claimed.is_empty());
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
        // A file that another commit made under the name is not the one of this commit.
        assert!(!noted().is_done("decaf", 5, &made) && !noted().is_ours(Some("decaf"), 5, &made));
        assert!(noted().is_ours(None, 5, &made));
        for (number, is) in [(u64::MAX - 2, false), (u64::MAX - 1, true), (0, true), (1, false)] {
            assert_eq!(noted().is_temporary(number), is, "{number}");
        }
        // Another name does not change the content. The same size and mtime alone do not prove that it is unchanged.
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
        // A journal that another user can write to is not believed.
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        assert!(Journal::read(root.file(), &path).is_none());
        assert!(matches!(Staging::open(root.file(), &path), Err(Error::NotOurs { .. })));
    }
}
