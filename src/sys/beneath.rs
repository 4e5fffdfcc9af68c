//! `openat2`: opens files and folders below an open folder. No symbolic link is followed and nothing outside the folder is reached: the
//! owner of a folder in between can move things, but cannot lead out of what the user named.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::{Errno, Result};

/// The flags that folders are opened with, which fail for anything but a folder.
const FOLDER: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::RDONLY);

/// An open folder. Clones share the descriptor.
#[derive(Debug, Clone)]
pub struct Folder {
    fd: Arc<OwnedFd>,
}

impl Folder {
    /// Opens a folder that the user named. Symbolic links in its path are followed.
    ///
    /// # Errors
    /// Returns the error of `open`: `ENOTDIR` if the path is no folder.
    pub fn open(path: &Path) -> Result<Self> {
        let fd = rustix::fs::open(path, FOLDER - OFlags::NOFOLLOW, Mode::empty())?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// Opens a folder below this one.
    ///
    /// # Errors
    /// Fails as [`Folder::open_file`] does, and with `ENOTDIR` if the path is no folder.
    pub fn folder(&self, relative: &Path) -> Result<Self> {
        let fd = self.open_below(relative, FOLDER)?;
        Ok(Self { fd: Arc::new(fd) })
    }

    /// Opens a file below this folder. `flags` are added to those that confine the path and close the file on `exec`.
    ///
    /// # Errors
    /// Returns `ELOOP` if a component is a symbolic link, `EXDEV` if the path leads out of the folder, and otherwise the error of
    /// `openat2`.
    pub fn open_file(&self, relative: &Path, flags: OFlags) -> Result<File> {
        self.open_below(relative, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC)
            .map(File::from)
    }

    fn open_below(&self, relative: &Path, flags: OFlags) -> Result<OwnedFd> {
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        match rustix::fs::openat2(&*self.fd, relative, flags, Mode::empty(), resolve) {
            // Linux before 5.6 does not know the call, and a seccomp filter may not.
            Err(Errno::NOSYS | Errno::PERM) => self.open_by_components(relative, flags),
            opened => opened,
        }
    }

    /// Opens a path component by component, where `openat2` is missing.
    fn open_by_components(&self, relative: &Path, flags: OFlags) -> Result<OwnedFd> {
        let mut folder: Option<OwnedFd> = None;
        let mut components = relative.components().peekable();
        while let Some(component) = components.next() {
            let name = match component {
                Component::Normal(name) => name,
                Component::CurDir => OsStr::new("."),
                _ => return Err(Errno::XDEV),
            };
            let flags = if components.peek().is_some() { FOLDER } else { flags };
            let opened = match &folder {
                Some(folder) => rustix::fs::openat(folder, name, flags, Mode::empty()),
                None => rustix::fs::openat(&*self.fd, name, flags, Mode::empty()),
            };
            folder = Some(opened?);
        }
        folder.ok_or(Errno::NOENT)
    }

    /// Returns the status of an entry of this folder. A symbolic link is not followed.
    ///
    /// # Errors
    /// Returns the error of `fstatat`.
    pub fn stat(&self, name: &OsStr) -> Result<Stat> {
        rustix::fs::statat(&*self.fd, name, AtFlags::SYMLINK_NOFOLLOW)
    }

    /// Returns the names of the entries, sorted, without `.` and `..`.
    ///
    /// # Errors
    /// Returns the error of reading the folder.
    pub fn names(&self) -> Result<Vec<OsString>> {
        // Reading moves the position of the descriptor, so that it needs its own.
        let own_descriptor = rustix::fs::openat(&*self.fd, ".", FOLDER, Mode::empty())?;
        let mut names = Vec::new();
        for entry in Dir::new(own_descriptor)? {
            let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// Opens an open file again with other flags. It is the same file, even if another has taken its name. `/proc` must be mounted.
///
/// # Errors
/// Returns the error of `open`.
pub fn reopen(file: impl AsFd, flags: OFlags) -> Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
}

impl From<File> for Folder {
    /// Makes a folder of a file that is an open folder.
    fn from(folder: File) -> Self {
        Self {
            fd: Arc::new(folder.into()),
        }
    }
}

impl AsFd for Folder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    type Open = fn(&Folder, &Path, OFlags) -> Result<OwnedFd>;

    #[test]
    fn nothing_leads_out() {
        let (outside, inside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir_all(inside.path().join("a/b")).unwrap();
        std::fs::write(inside.path().join("a/b/c"), "c").unwrap();
        std::fs::write(outside.path().join("c"), "other").unwrap();
        symlink(outside.path(), inside.path().join("link")).unwrap();
        symlink(outside.path().join("c"), inside.path().join("a/file")).unwrap();
        symlink("b", inside.path().join("a/inner")).unwrap();
        let root = Folder::open(inside.path()).unwrap();
        for open in [Folder::open_below as Open, Folder::open_by_components] {
            let opens = |path: &str| open(&root, Path::new(path), OFlags::RDONLY | OFlags::NOFOLLOW).is_ok();
            assert!(opens("a/b/c") && opens("a") && opens("./a/b"));
            for bad in ["link/c", "a/file", "a/inner/c", "../x", "/etc/passwd", "absent"] {
                assert!(!opens(bad), "{bad}");
            }
        }
        assert_eq!(root.names().unwrap(), ["a", "link"]);
        let deeper = root.folder(Path::new("a/b")).unwrap();
        assert_eq!(deeper.stat(OsStr::new("c")).unwrap().st_size, 1);
        assert!(root.folder(Path::new("link")).is_err());
        assert!(root.folder(Path::new("a/b/c")).is_err());
    }

    #[test]
    fn a_folder_that_is_moved_stays_the_one_that_was_opened() {
        let root = tempfile::tempdir().unwrap();
        let (original, moved) = (root.path().join("original"), root.path().join("moved"));
        std::fs::create_dir(&original).unwrap();
        std::fs::write(original.join("x"), "mine").unwrap();
        let folder = Folder::open(&original).unwrap();
        std::fs::rename(&original, &moved).unwrap();
        std::fs::create_dir(&original).unwrap();
        std::fs::write(original.join("x"), "another's").unwrap();
        let opened = folder.open_file(Path::new("x"), OFlags::RDONLY).unwrap();
        assert_eq!(std::io::read_to_string(opened).unwrap(), "mine");
    }
}
