//! An archive in a file.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Store, unsupported};
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::named_folder;
use crate::sys::beneath;

/// A file that is read, or read and appended to. Only the user who runs vmfold can read a file that it creates.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    path: PathBuf,
    /// The state of appending; `None` if the file is only read.
    writing: Option<Writing>,
}

#[derive(Debug)]
struct Writing {
    /// The offset of the next append.
    end: Mutex<u64>,
    name: Name,
    is_new: bool,
}

/// The name of a file in its folder.
#[derive(Debug)]
struct Name {
    folder: beneath::Folder,
    name: OsString,
}

impl FileStore {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// Returns [`Error::NoSuchPath`] if the path does not exist, [`Error::NotAFile`] if it is not a regular file, and [`Error::Io`] if
    /// it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_as(path, path.metadata(), libc::O_NONBLOCK)
    }

    /// Opens a file for reading, as [`FileStore::open`] does, and refuses a symbolic link in its place.
    ///
    /// # Errors
    /// Those of [`FileStore::open`].
    pub fn open_without_link(path: &Path) -> Result<Self> {
        Self::open_as(path, path.symlink_metadata(), libc::O_NONBLOCK | libc::O_NOFOLLOW)
    }

    /// Makes a store of an open file, which is only read.
    pub fn of(file: File, path: &Path) -> Self {
        Self {
            file,
            path: path.to_owned(),
            writing: None,
        }
    }

    /// Returns the device and the inode of the file.
    ///
    /// # Errors
    /// Returns the error of the system.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        let metadata = self.file.metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }

    /// Writes bytes in the place of others, for a repair.
    ///
    /// # Errors
    /// As for [`Store::append`].
    pub fn overwrite(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.writing.as_ref().ok_or_else(|| unsupported(READ_ONLY))?;
        self.file.write_all_at(bytes, offset)
    }

    /// Makes the file so long, for a repair: what it then has more is zeros.
    ///
    /// # Errors
    /// As for [`Store::append`].
    pub fn resize(&self, length: u64) -> io::Result<()> {
        if self.file.metadata()?.len() == length {
            return Ok(());
        }
        self.truncate(length)
    }

    fn open_as(path: &Path, metadata: io::Result<Metadata>, flags: i32) -> Result<Self> {
        match metadata {
            // Opening a device may have an effect, and opening a pipe without a writer would block.
            Ok(metadata) if !metadata.is_file() => return Err(not_a_file(path)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoSuchPath { path: path.to_owned() });
            }
            Err(error) => return Err(Error::io("look at", path)(error)),
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(flags);
        let file = options.open(path).map_err(Error::io("open", path))?;
        if !file.metadata().map_err(Error::io("look at", path))?.is_file() {
            return Err(not_a_file(path));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            writing: None,
        })
    }

    /// Returns when the file was written last.
    ///
    /// # Errors
    /// Returns the error of the system.
    pub fn modified(&self) -> io::Result<FileTime> {
        let metadata = self.file.metadata()?;
        Ok(FileTime {
            seconds: metadata.mtime(),
            nanoseconds: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
        })
    }

    /// Opens a file for appending, creates it if it does not exist, and locks it against other writers for as long as it is open.
    ///
    /// # Errors
    /// Returns [`Error::Appending`] if another process appends to the file, [`Error::NotAFile`] if it is not a regular file,
    /// [`Error::OfAnother`] if another user put it there, who could read what is written, and [`Error::Io`] if it cannot be opened.
    pub fn append_to(path: &Path) -> Result<Self> {
        let (file, name, is_new) = Self::find_or_make(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::Appending { path: path.to_owned() });
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
        let end = file.metadata().map_err(Error::io("look at", path))?.len();
        Ok(Self {
            file,
            path: path.to_owned(),
            writing: Some(Writing {
                end: Mutex::new(end),
                name,
                is_new,
            }),
        })
    }

    /// Removes the file if opening it has created it and nothing was written.
    ///
    /// # Errors
    /// Returns the error of the system call that failed.
    pub fn remove_if_unused(&self) -> io::Result<()> {
        let Some(writing) = self.writing.as_ref().filter(|writing| writing.is_new) else {
            return Ok(());
        };
        if self.file.metadata()?.len() == 0 && writing.name.is_of(&self.file)? {
            rustix::fs::unlinkat(&writing.name.folder, &writing.name.name, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Creates the file, or opens the one that exists if it is a regular file and no other user put it there, who could read what is
    /// written.
    fn find_or_make(path: &Path) -> Result<(File, Name, bool)> {
        /// Symbolic links that are followed to the file, at most.
        const LINKS_MAX: u32 = 8;
        let mut candidate = path.to_owned();
        for _ in 0..LINKS_MAX {
            let name = candidate.file_name().ok_or_else(|| not_a_file(path))?.to_owned();
            let parent = candidate.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            let folder = named_folder::open(parent)?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => {
                    return Ok((file.into(), Name { folder, name }, true));
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(Error::io("make", path)(errno)),
            }
            let failed = |errno: Errno| Error::io("open", path)(errno);
            // The type is checked before the file is opened, since opening a device may have an effect.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let path_only = rustix::fs::openat(&folder, &name, flags, Mode::empty()).map_err(failed)?;
            let stat = rustix::fs::fstat(&path_only).map_err(failed)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => {
                    named_folder::refuse_if_of_another(&folder, &stat, path)?;
                    let file = beneath::reopen(&path_only, OFlags::RDWR | OFlags::NONBLOCK).map_err(failed)?;
                    return Ok((file, Name { folder, name }, false));
                }
                FileType::Symlink => {
                    named_folder::refuse_link_of_another(&folder, &stat, path)?;
                    let link = rustix::fs::readlinkat(&path_only, "", Vec::new()).map_err(failed)?;
                    candidate = parent.join(OsStr::from_bytes(link.to_bytes()));
                }
                _ => return Err(not_a_file(path)),
            }
        }
        Err(Error::io("open", path)(Errno::LOOP))
    }
}

impl Name {
    /// Whether a file still has this name. If not, it is deleted, or will be once it is closed.
    fn is_of(&self, file: &File) -> rustix::io::Result<bool> {
        let (named, open) = (self.folder.stat(&self.name)?, rustix::fs::fstat(file)?);
        Ok((named.st_dev, named.st_ino) == (open.st_dev, open.st_ino))
    }
}

impl Store for FileStore {
    fn path(&self) -> &Path {
        &self.path
    }

    fn length(&self) -> io::Result<Option<u64>> {
        Ok(Some(self.file.metadata()?.len()))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        // No file can be that long, and the kernel would report an invalid argument.
        if offset.saturating_add(buffer.len() as u64) > i64::MAX.unsigned_abs() {
            return Ok(0);
        }
        self.file.read_at(buffer, offset)
    }

    fn data_from(&self, offset: u64) -> u64 {
        // Nothing else uses the position that this moves.
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(at) => at.max(offset),
            // There is a hole up to the end.
            Err(Errno::NXIO) => self
                .file
                .metadata()
                .map_or(offset, |metadata| metadata.len().max(offset)),
            Err(_) => offset,
        }
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let writing = self.writing.as_ref().ok_or_else(|| unsupported(READ_ONLY))?;
        let mut end = writing.end.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.write_all_at(bytes, *end)?;
        *end += bytes.len() as u64;
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        self.file.sync_data()?;
        let Some(writing) = &self.writing else { return Ok(()) };
        rustix::fs::fsync(&writing.name.folder)?;
        if writing.name.is_of(&self.file)? {
            Ok(())
        } else {
            Err(Errno::STALE.into())
        }
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        let writing = self.writing.as_ref().ok_or_else(|| unsupported(READ_ONLY))?;
        let mut end = writing.end.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.set_len(length)?;
        *end = length;
        Ok(())
    }
}

const READ_ONLY: &str = "it was opened for reading only";

fn not_a_file(path: &Path) -> Error {
    Error::NotAFile { path: path.to_owned() }
}
