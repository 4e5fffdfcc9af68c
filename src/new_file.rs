//! New files that only this user can read: secrets, and what is made of backups.

use std::ffi::OsString;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::named_folder::open_parent;
use crate::shown::shown;
use crate::sys::beneath::Folder;

/// A file that was made. It is removed by its name in the folder that it was made in, wherever the path leads by then.
#[derive(Debug)]
pub struct NewFile {
    folder: Folder,
    name: OsString,
}

impl NewFile {
    /// Writes a file that did not exist, all of it or none. Once this returns, it survives a power failure.
    ///
    /// # Errors
    /// [`Error::Usage`] if the file exists; [`Error::NoSpace`]; [`Error::Io`]; those of [`open_parent`].
    pub fn write(path: &Path, content: &[u8]) -> Result<Self> {
        let name = path.file_name().ok_or(Errno::ISDIR).map_err(Error::io("make", path))?;
        let new = Self {
            folder: open_parent(path)?,
            name: name.to_owned(),
        };
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(&new.folder, name, flags, Mode::RUSR | Mode::WUSR);
        let mut file = match opened {
            Err(Errno::EXIST) => return Err(already_there(path)),
            Err(errno) => return Err(Error::writing("make", path)(errno)),
            Ok(file) => File::from(file),
        };
        let written = file.write_all(content).and_then(|()| file.sync_all());
        let named = || rustix::fs::fsync(&new.folder).map_err(std::io::Error::from);
        match written.and_then(|()| named()) {
            Ok(()) => Ok(new),
            Err(error) => {
                new.remove();
                Err(Error::writing("write", path)(error))
            }
        }
    }

    /// Removes it, if it is of no use after all.
    pub fn remove(self) {
        let _ = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
    }
}

/// Says that a file is there that would be made.
pub fn already_there(path: &Path) -> Error {
    Error::Usage(format!("`{}` exists already: name a new file", shown(path)))
}
