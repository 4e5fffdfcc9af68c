//! Opens folders that no other user can write to, so that vmfold may trust the files in them and write to them by name.

use std::fs::File;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::error::{Error, Result};
use crate::named_folder;
use crate::sys::beneath::Folder;

/// Opens a folder that only this user can write to, and makes it if it does not exist. In a folder where everybody may make folders,
/// another user may have made this one, or a symbolic link in its place.
///
/// # Errors
/// Returns [`Error::NotOurs`] if another user owns the folder or can write to it, or if the path is a symbolic link or no folder, and
/// [`Error::Io`] if a system call fails; those of [`named_folder::open`].
pub fn own_folder(path: &Path) -> Result<Folder> {
    let io = |errno| Error::io("open the folder", path)(errno);
    let name = path.file_name().ok_or(Errno::INVAL).map_err(io)?;
    let parent = named_folder::open_parent(path)?;
    match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(Error::io("make the folder", path)(errno)),
    }
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let not_ours = || Error::NotOurs { path: path.to_owned() };
    let folder = match rustix::fs::openat(&parent, name, flags, Mode::empty()) {
        Ok(folder) => File::from(folder),
        Err(Errno::LOOP | Errno::NOTDIR | Errno::ACCESS) => return Err(not_ours()),
        Err(errno) => return Err(io(errno)),
    };
    let stat = rustix::fs::fstat(&folder).map_err(io)?;
    let others = Mode::from_raw_mode(stat.st_mode) & (Mode::WGRP | Mode::WOTH);
    let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if !is_folder || stat.st_uid != geteuid().as_raw() || !others.is_empty() {
        return Err(not_ours());
    }
    Ok(Folder::from(folder))
}

#[cfg(test)]
mod tests {
    use std::fs::DirBuilder;
    use std::os::unix::fs::DirBuilderExt;

    use super::*;

    #[test]
    fn only_a_folder_of_ours_serves() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        assert!(own_folder(&path("new")).is_ok());
        assert!(own_folder(&path("new")).is_ok());
        std::os::unix::fs::symlink(path("new"), path("link")).unwrap();
        std::fs::write(path("file"), "").unwrap();
        DirBuilder::new().create(path("open")).unwrap();
        rustix::fs::chmod(path("open"), Mode::from_raw_mode(0o777)).unwrap();
        for bad in ["link", "file", "open"] {
            assert!(matches!(own_folder(&path(bad)), Err(Error::NotOurs { .. })), "{bad}");
        }
        if geteuid().is_root() {
            DirBuilder::new().mode(0o700).create(path("another's")).unwrap();
            std::os::unix::fs::chown(path("another's"), Some(1234), None).unwrap();
            assert!(matches!(own_folder(&path("another's")), Err(Error::NotOurs { .. })));
        }
    }
}
