//! Paths below the folder that is restored to, opened component by component: no name in an archive, and no symbolic link that
//! stands there, leads out of it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::pool::{self, users};
use crate::shown::shown;
use crate::sys::lease::{self, Lease};

/// The folder that is restored to.
#[derive(Debug)]
pub struct Root {
    file: File,
    path: PathBuf,
}

/// A name in a folder below the root.
#[derive(Debug)]
pub struct Place {
    folder: OwnedFd,
    name: OsString,
    /// Its whole path, for messages.
    pub path: PathBuf,
}

const FOLDER: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::RDONLY);

impl Root {
    /// Opens the folder, which must exist.
    ///
    /// # Errors
    /// Those of opening.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self {
            file: File::open(path).map_err(Error::io("open", path))?,
            path: path.to_owned(),
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open folder.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Opens a folder below; none if it does not exist and is not to be made. Calls `made` with each folder that was made.
    ///
    /// # Errors
    /// If a component is no folder: a symbolic link is none.
    pub fn folder(&self, relative: &Path, make: bool, mut made: impl FnMut(&Path)) -> Result<Option<OwnedFd>> {
        let mut folder: OwnedFd = self.file.try_clone().map_err(Error::io("open", &self.path))?.into();
        let mut so_far = PathBuf::new();
        for component in relative.components() {
            let Component::Normal(name) = component else {
                return Err(Error::Usage(format!(
                    "`{}` leads out of the folder",
                    crate::shown::shown(relative)
                )));
            };
            so_far.push(name);
            let path = self.path.join(&so_far);
            let open = |folder: &OwnedFd| rustix::fs::openat(folder, name, FOLDER, Mode::empty());
            folder = match open(&folder) {
                Ok(next) => next,
                Err(Errno::NOENT) if !make => return Ok(None),
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) => made(&so_far),
                        Err(Errno::EXIST) => {}
                        Err(errno) => return Err(Error::io("make the folder", &path)(errno)),
                    }
                    open(&folder).map_err(Error::io("open", &path))?
                }
                Err(Errno::LOOP | Errno::NOTDIR) => {
                    return Err(Error::Usage(format!(
                        "`{}` is a symbolic link or no folder: nothing is restored through it",
                        crate::shown::shown(&path)
                    )));
                }
                Err(errno) => return Err(Error::io("open", &path)(errno)),
            };
        }
        Ok(Some(folder))
    }

    /// A name below; none if its folder does not exist and is not to be made.
    ///
    /// # Errors
    /// As [`Root::folder`].
    pub fn place(&self, relative: &Path, make: bool, made: impl FnMut(&Path)) -> Result<Option<Place>> {
        let parent = relative.parent().unwrap_or(Path::new(""));
        let name = relative.file_name().unwrap_or_default().to_owned();
        let folder = self.folder(parent, make, made)?;
        Ok(folder.map(|folder| Place {
            folder,
            name,
            path: self.path.join(relative),
        }))
    }
}

impl Place {
    /// Whether anything stands there, a dangling link included.
    pub fn exists(&self) -> bool {
        rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Whether a folder stands there.
    pub fn is_folder(&self) -> bool {
        let stat = rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory)
    }

    /// Refuses an image that is in use: whoever uses it would go on with what is replaced, and lose it.
    ///
    /// # Errors
    /// [`Error::InUse`].
    pub fn refuse_if_in_use(&self) -> Result<()> {
        let in_use = |by: String| {
            Err(Error::InUse {
                path: self.path.clone(),
                by,
            })
        };
        if !self.exists() {
            return Ok(());
        }
        if let Some((_, sign)) = pool::sign_of(&self.path) {
            return in_use(shown(&sign).to_string());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&self.folder, &self.name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            // Someone has a lease on it: another vmfold, or a file server.
            Err(Errno::AGAIN) => return in_use("leased".into()),
            // A link, or what is not ours to read: nobody runs from it through this name.
            Err(_) => return Ok(()),
        };
        if lease::take(&file, Lease::All) != Err(Errno::AGAIN) {
            return Ok(());
        }
        let id = users::file_id(&file.metadata().map_err(Error::io("look at", &self.path))?);
        let users = users::users_of(&[id].into()).into_values().flatten();
        let users: Vec<String> = users.chain(users::locked_by(&file).map(str::to_owned)).collect();
        // As a seed it is open here too, and the kernel does not tell us from others.
        if users.is_empty() && users::times_open_here(id) > 1 {
            return Ok(());
        }
        in_use(users.join(", "))
    }

    /// Size and time of change of the regular file there.
    pub fn size_and_mtime(&self) -> Option<(u64, (i64, u32))> {
        let stat = rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile;
        let size = u64::try_from(stat.st_size).ok()?;
        is_file.then(|| (size, (stat.st_mtime, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))))
    }

    /// Names in its folder.
    ///
    /// # Errors
    /// Those of reading it.
    pub fn siblings(&self) -> Result<Vec<OsString>> {
        let io = |errno: Errno| Error::io("look into the folder of", &self.path)(errno);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            names.push(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        }
        Ok(names)
    }

    /// The place of a temporary file beside it.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn temporary(&self, tag: &str) -> Result<Self> {
        /// Bytes of a name at most, less those of what is put around it.
        const NAME_BYTES: usize = 200;
        let name = self.name.to_string_lossy();
        let end = (0..=name.len().min(NAME_BYTES))
            .rev()
            .find(|at| name.is_char_boundary(*at));
        let name = OsString::from(format!(".{}.vmfold-{tag}", &name[..end.unwrap_or(0)]));
        Ok(Self {
            folder: self
                .folder
                .try_clone()
                .map_err(Error::io("open the folder of", &self.path))?,
            path: self.path.with_file_name(&name),
            name,
        })
    }

    /// Makes a new, empty file there, for reading and writing by its owner only.
    ///
    /// # Errors
    /// Also if something stands there.
    pub fn create(&self) -> Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(&self.folder, &self.name, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(Error::io("make", &self.path))
    }

    /// Removes what stands there, if anything does.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn remove(&self) -> Result<()> {
        match rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io("remove", &self.path)(errno)),
        }
    }

    /// Gives what stands here the name `to`; over what stands there only if `replace`.
    ///
    /// # Errors
    /// [`Error::Exists`] among others.
    pub fn rename(&self, to: &Self, replace: bool) -> Result<()> {
        let flags = if replace {
            RenameFlags::empty()
        } else {
            RenameFlags::NOREPLACE
        };
        let mut renamed = rustix::fs::renameat_with(&self.folder, &self.name, &to.folder, &to.name, flags);
        if renamed == Err(Errno::INVAL) && !replace {
            // A filesystem without RENAME_NOREPLACE: a link does not replace either.
            renamed = rustix::fs::linkat(&self.folder, &self.name, &to.folder, &to.name, AtFlags::empty())
                .and_then(|()| rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()));
        }
        match renamed {
            Ok(()) => Ok(()),
            Err(Errno::EXIST) => Err(Error::Exists {
                paths: vec![to.path.clone()],
            }),
            Err(errno) => Err(Error::io("rename to", &to.path)(errno)),
        }
    }

    /// Makes a link here to what stands at `other`.
    ///
    /// # Errors
    /// Also if something stands here.
    pub fn link_to(&self, other: &Self) -> Result<()> {
        rustix::fs::linkat(&other.folder, &other.name, &self.folder, &self.name, AtFlags::empty())
            .map_err(Error::io("link", &self.path))
    }

    /// Makes its folder's entries durable.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn sync_folder(&self) -> Result<()> {
        rustix::fs::fsync(&self.folder).map_err(Error::io("sync the folder of", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leads_out() {
        let (outside, inside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink(outside.path(), inside.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("file"), inside.path().join("dangling")).unwrap();
        let root = Root::open(inside.path()).unwrap();
        for bad in ["link/x", "../x", "/etc/x", "link/deeper/x"] {
            assert!(root.place(Path::new(bad), true, |_| {}).is_err(), "{bad}");
        }
        let dangling = root.place(Path::new("dangling"), true, |_| {}).unwrap().unwrap();
        assert!(dangling.exists());
        assert!(dangling.create().is_err());
        let mut made = Vec::new();
        let place = root
            .place(Path::new("a/b/c"), true, |path| made.push(path.to_owned()))
            .unwrap()
            .unwrap();
        assert_eq!(made, [PathBuf::from("a"), PathBuf::from("a/b")]);
        place.create().unwrap();
        let other = root.place(Path::new("a/d"), true, |_| {}).unwrap().unwrap();
        other.create().unwrap();
        assert!(matches!(place.rename(&other, false), Err(Error::Exists { .. })));
        place.rename(&other, true).unwrap();
        assert!(!place.exists());
        assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none());
        assert!(root.place(Path::new("absent/x"), false, |_| {}).unwrap().is_none());
    }
}
