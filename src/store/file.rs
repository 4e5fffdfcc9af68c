//! An archive in a file.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Store, unsupported};
use crate::error::{Error, Result};
use crate::sys::beneath;

/// A file that is read, or read and appended to. What a new one holds is for who runs vmfold alone.
#[derive(Debug)]
pub struct FileStore {
    file: File,
    path: PathBuf,
    /// Only of one that is appended to.
    writing: Option<Writing>,
}

#[derive(Debug)]
struct Writing {
    /// Where the next bytes go.
    end: Mutex<u64>,
    name: Name,
    is_new: bool,
}

/// Where a file has its name.
#[derive(Debug)]
struct Name {
    folder: beneath::Folder,
    name: OsString,
}

impl FileStore {
    /// Opens a file to read it.
    ///
    /// # Errors
    /// [`Error::NoSuchPath`]; [`Error::NotAnArchive`] for anything but a regular file; those of opening.
    pub fn open(path: &Path) -> Result<Self> {
        match path.metadata() {
            // To open a device can do something, and a pipe may have nobody at its other end.
            Ok(metadata) if !metadata.is_file() => return Err(not_an_archive(path)),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoSuchPath { path: path.to_owned() });
            }
            Err(error) => return Err(Error::io("look at", path)(error)),
        }
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(Error::io("open", path))?;
        if !file.metadata().map_err(Error::io("look at", path))?.is_file() {
            return Err(not_an_archive(path));
        }
        Ok(Self {
            file,
            path: path.to_owned(),
            writing: None,
        })
    }

    /// Opens a file to append to it, which is made if it does not exist, and keeps others from doing so for as long as it is open.
    ///
    /// # Errors
    /// [`Error::Appending`] if another process appends to it; [`Error::NotAnArchive`] for anything but a regular file;
    /// [`Error::OfAnother`] for one that another user put there, who would read along; those of opening.
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

    /// Removes the file if it was made by opening it and has nothing in it.
    ///
    /// # Errors
    /// Those of the system calls.
    pub fn remove_if_unused(&self) -> io::Result<()> {
        let Some(writing) = self.writing.as_ref().filter(|writing| writing.is_new) else {
            return Ok(());
        };
        if self.file.metadata()?.len() == 0 && writing.name.is_of(&self.file)? {
            rustix::fs::unlinkat(&writing.name.folder, &writing.name.name, AtFlags::empty())?;
        }
        Ok(())
    }

    /// Makes the file, or opens the one that is there, if that is no trap: it is a regular file, and was not put there by another user,
    /// who would read along.
    fn find_or_make(path: &Path) -> Result<(File, Name, bool)> {
        /// Links followed to the file.
        const LINKS_MAX: u32 = 8;
        let mut at = path.to_owned();
        for _ in 0..LINKS_MAX {
            let name = at.file_name().ok_or_else(|| not_an_archive(path))?.to_owned();
            let parent = at.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            let folder = beneath::Folder::open(parent).map_err(Error::io("open", parent))?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => {
                    return Ok((file.into(), Name { folder, name }, true));
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(Error::io("make", path)(errno)),
            }
            let failed = |errno: Errno| Error::io("open", path)(errno);
            // What it is, is looked at before it is opened: to open a device can do something.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let there = rustix::fs::openat(&folder, &name, flags, Mode::empty()).map_err(failed)?;
            let stat = rustix::fs::fstat(&there).map_err(failed)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => {
                    refuse_if_of_another(&folder, &stat, path)?;
                    let file = beneath::reopen(&there, OFlags::RDWR | OFlags::NONBLOCK).map_err(failed)?;
                    return Ok((file, Name { folder, name }, false));
                }
                FileType::Symlink => {
                    refuse_if_of_another(&folder, &stat, path)?;
                    let link = rustix::fs::readlinkat(&there, "", Vec::new()).map_err(failed)?;
                    at = parent.join(OsStr::from_bytes(link.to_bytes()));
                }
                _ => return Err(not_an_archive(path)),
            }
        }
        Err(Error::io("open", path)(Errno::LOOP))
    }
}

impl Name {
    /// Whether a file still has this name: else it is gone, or soon will be.
    fn is_of(&self, file: &File) -> rustix::io::Result<bool> {
        let (stat, its) = (self.folder.stat(&self.name)?, rustix::fs::fstat(file)?);
        Ok((stat.st_dev, stat.st_ino) == (its.st_dev, its.st_ino))
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
        // No file reaches there, and the kernel takes the call for a mistake.
        if offset.saturating_add(buffer.len() as u64) > i64::MAX.unsigned_abs() {
            return Ok(0);
        }
        self.file.read_at(buffer, offset)
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

fn not_an_archive(path: &Path) -> Error {
    Error::NotAnArchive { path: path.to_owned() }
}

/// Refuses a file or link that neither the user of this process nor root made, in a folder where others can put one. Filesystems that
/// keep no owners, or have them from another host, cannot tell.
fn refuse_if_of_another(folder: &beneath::Folder, stat: &rustix::fs::Stat, path: &Path) -> Result<()> {
    /// vfat, exfat, ntfs3, cifs, smb2, nfs, 9p, fuse (linux/magic.h).
    const WITHOUT_OWNERS: [i64; 8] = [
        0x4d44,
        0x2011_bab0,
        0x7366_746e,
        0xff53_4d42,
        0xfe53_4d42,
        0x6969,
        0x0102_1997,
        0x6573_5546,
    ];
    let failed = Error::io("look at the folder of", path);
    let is_mine = |uid: u32| uid == 0 || uid == rustix::process::geteuid().as_raw();
    if is_mine(stat.st_uid) {
        return Ok(());
    }
    let of_folder = rustix::fs::fstat(folder).map_err(failed)?;
    let others_write = Mode::from_raw_mode(of_folder.st_mode).intersects(Mode::WGRP | Mode::WOTH);
    let magic = rustix::fs::fstatfs(folder).map_or(0, |found| found.f_type);
    if (is_mine(of_folder.st_uid) && !others_write) || WITHOUT_OWNERS.contains(&magic) {
        return Ok(());
    }
    Err(Error::OfAnother {
        path: path.to_owned(),
        uid: stat.st_uid,
    })
}
