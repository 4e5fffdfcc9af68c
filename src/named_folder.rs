//! Folders that the user named, and that vmfold writes to. A path may lead through a folder of another user, who can put a link there at any
//! moment. So a path is walked component by component, and no link is followed that another user can have put there.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{getegid, geteuid};

use crate::error::{Error, Result};
use crate::sys::beneath::Folder;

/// Links that are followed in one path, as the kernel has it (`path_resolution(7)`).
const LINKS_MAX: u32 = 40;
/// The flags that a component is opened with, which take no permission to read it.
const COMPONENT: OFlags = OFlags::PATH.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A folder that the user named, as far as it exists.
#[derive(Debug)]
pub struct NamedFolder {
    /// The folder, or the deepest one above it that exists.
    nearest: Folder,
    /// The path of `nearest`, for messages.
    nearest_path: PathBuf,
    /// The names of the folders below it that do not exist.
    missing: Vec<OsString>,
    is_ours_all_the_way: bool,
}

impl NamedFolder {
    /// Walks a path, and makes nothing.
    ///
    /// # Errors
    /// [`Error::OfAnother`] if the path leads through a link of another user, [`Error::SharedLink`] if through one that another user can have
    /// put there; [`Error::Io`] if a folder cannot be opened, or if a component is no folder.
    pub fn look(path: &Path) -> Result<Self> {
        let mut walk = Walk::begin(path)?;
        while let Some(name) = walk.ahead.pop_front() {
            walk.step(&name)?;
        }
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let nearest = rustix::fs::openat(walk.innermost(), ".", flags, Mode::empty());
        let nearest = nearest.map_err(Error::io("open", &walk.passed))?;
        Ok(Self {
            nearest: Folder::from(File::from(nearest)),
            nearest_path: walk.passed,
            missing: walk.missing,
            is_ours_all_the_way: walk.is_ours_all_the_way,
        })
    }

    /// Whether the folder exists.
    pub fn exists(&self) -> bool {
        self.missing.is_empty()
    }

    /// Whether nobody but root and this user can make the path lead elsewhere, so that it may be used by name.
    pub fn is_ours_all_the_way(&self) -> bool {
        self.is_ours_all_the_way
    }

    /// The folder, or the deepest one above it that exists.
    pub fn nearest(&self) -> &Folder {
        &self.nearest
    }

    /// Makes what is missing of the folder with a mode, which the umask restricts, and opens it. Calls `made` with the name of each folder that
    /// was made, and with the folder that it lies in.
    ///
    /// # Errors
    /// [`Error::Io`] if a folder cannot be made, or if another user puts something else in its place.
    pub fn make(&self, mode: Mode, mut made: impl FnMut(&Folder, &OsStr)) -> Result<Folder> {
        let (mut folder, mut path) = (self.nearest.clone(), self.nearest_path.clone());
        for name in &self.missing {
            path.push(name);
            match rustix::fs::mkdirat(&folder, name, mode) {
                Ok(()) => made(&folder, name),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(Error::io("make the folder", &path)(errno)),
            }
            folder = folder
                .folder(Path::new(name))
                .map_err(Error::io("open the folder", &path))?;
        }
        Ok(folder)
    }
}

/// Opens a folder that the user named.
///
/// # Errors
/// Those of [`NamedFolder::look`]; [`Error::Io`] if it does not exist.
pub fn open(path: &Path) -> Result<Folder> {
    let named = NamedFolder::look(path)?;
    if named.exists() {
        Ok(named.nearest)
    } else {
        Err(Error::io("open", path)(Errno::NOENT))
    }
}

/// Opens the folder that a path lies in.
///
/// # Errors
/// Those of [`open`].
pub fn open_parent(path: &Path) -> Result<Folder> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    open(parent.unwrap_or(Path::new(".")))
}

/// Refuses a file or symbolic link that neither the user of this process nor root owns, in a folder where others can put one. A filesystem
/// that stores no owners, or those of another host, cannot tell. `path` is that of the file or link.
///
/// # Errors
/// [`Error::OfAnother`]; [`Error::Io`] if the folder cannot be looked at.
pub fn refuse_if_of_another(folder: impl AsFd, stat: &Stat, path: &Path) -> Result<()> {
    /// The magic numbers of vfat, exfat, ntfs3, cifs, smb2, nfs, 9p and fuse (linux/magic.h).
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
    if is_mine(stat) {
        return Ok(());
    }
    let of_folder = rustix::fs::fstat(&folder).map_err(Error::io("look at the folder of", path))?;
    let others_write = Mode::from_raw_mode(of_folder.st_mode).intersects(Mode::WGRP | Mode::WOTH);
    let magic = rustix::fs::fstatfs(&folder).map_or(0, |found| found.f_type);
    if (is_mine(&of_folder) && !others_write) || WITHOUT_OWNERS.contains(&magic) {
        return Ok(());
    }
    Err(Error::OfAnother {
        path: path.to_owned(),
        uid: stat.st_uid,
    })
}

/// Refuses to follow a link that another user can have put into a folder. In a folder of theirs, that can be a link of root's which they moved
/// there.
///
/// # Errors
/// [`Error::OfAnother`] if another user owns the link, and [`Error::SharedLink`] if another user can have moved it there; [`Error::Io`] if the
/// folder cannot be looked at.
pub fn refuse_link_of_another(folder: impl AsFd, link: &Stat, path: &Path) -> Result<()> {
    refuse_if_of_another(&folder, link, path)?;
    let of_folder = rustix::fs::fstat(&folder).map_err(Error::io("look at the folder of", path))?;
    if is_kept(&of_folder, link) {
        Ok(())
    } else {
        Err(Error::SharedLink { path: path.to_owned() })
    }
}

/// Whether root or the user of this process owns something.
fn is_mine(stat: &Stat) -> bool {
    stat.st_uid == 0 || stat.st_uid == geteuid().as_raw()
}

/// Whether nobody but root and this user can put another thing in the place of one in a folder. In a folder with the sticky bit, only the owner
/// of a thing can.
fn is_kept(folder: &Stat, one: &Stat) -> bool {
    let mode = Mode::from_raw_mode(folder.st_mode);
    // On many systems every user has a group of their own, and folders that the group can write to.
    let group_writes = mode.contains(Mode::WGRP) && folder.st_gid != getegid().as_raw();
    let others_write = group_writes || mode.contains(Mode::WOTH);
    is_mine(folder) && (!others_write || (mode.contains(Mode::SVTX) && is_mine(one)))
}

/// A path that is being walked.
struct Walk {
    /// The folders that were entered and not left again, the innermost one last. So `..` leads back to where the walk came from, even if
    /// another user moves a folder meanwhile.
    folders: Vec<OwnedFd>,
    /// The path of the innermost one, for messages.
    passed: PathBuf,
    /// The components that are still to be walked.
    ahead: VecDeque<OsString>,
    /// How many of them are those of links.
    linked: usize,
    /// Components that do not exist.
    missing: Vec<OsString>,
    links: u32,
    is_ours_all_the_way: bool,
}

impl Walk {
    fn begin(path: &Path) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return Err(Error::io("open", path)(Errno::NOENT));
        }
        let first = if path.is_absolute() { "/" } else { "." };
        Ok(Self {
            folders: vec![open_first(first)?],
            passed: PathBuf::from(if path.is_absolute() { "/" } else { "" }),
            ahead: components_of(path).collect(),
            linked: 0,
            missing: Vec::new(),
            links: 0,
            is_ours_all_the_way: true,
        })
    }

    fn innermost(&self) -> impl AsFd + '_ {
        self.folders.last().map_or(CWD, AsFd::as_fd)
    }

    /// Walks one component.
    fn step(&mut self, name: &OsStr) -> Result<()> {
        let is_linked = self.linked > 0;
        self.linked = self.linked.saturating_sub(1);
        if name == ".." {
            return self.step_back();
        }
        if !self.missing.is_empty() {
            self.missing.push(name.to_owned());
            return Ok(());
        }
        let path = self.passed.join(name);
        let failed = |errno: Errno| Error::io("open", &path)(errno);
        let flags = COMPONENT | OFlags::DIRECTORY;
        match rustix::fs::openat(self.innermost(), name, flags, Mode::empty()) {
            Ok(folder) => {
                self.note_kept(&rustix::fs::fstat(&folder).map_err(failed)?, &path)?;
                self.folders.push(folder);
                self.passed = path;
                Ok(())
            }
            // What a link leads to is not made: it may be a disk that is not mounted.
            Err(Errno::NOENT) if !is_linked => {
                self.missing.push(name.to_owned());
                Ok(())
            }
            Err(Errno::NOTDIR | Errno::LOOP) => self.follow(name, &path),
            Err(errno) => Err(failed(errno)),
        }
    }

    /// Leaves the innermost folder.
    fn step_back(&mut self) -> Result<()> {
        if self.missing.pop().is_some() {
            return Ok(());
        }
        self.passed.push("..");
        if self.folders.len() > 1 {
            self.folders.pop();
        } else {
            let above = rustix::fs::openat(self.innermost(), "..", COMPONENT | OFlags::DIRECTORY, Mode::empty());
            self.folders = vec![above.map_err(Error::io("open", &self.passed))?];
        }
        Ok(())
    }

    /// Puts the components of a link in front of those that are still to be walked.
    fn follow(&mut self, name: &OsStr, path: &Path) -> Result<()> {
        let failed = |errno: Errno| Error::io("open", path)(errno);
        let link = rustix::fs::openat(self.innermost(), name, COMPONENT, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&link).map_err(failed)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
            return Err(failed(Errno::NOTDIR));
        }
        refuse_link_of_another(self.innermost(), &stat, path)?;
        self.note_kept(&stat, path)?;
        self.links += 1;
        if self.links > LINKS_MAX {
            return Err(failed(Errno::LOOP));
        }
        let target = rustix::fs::readlinkat(&link, "", Vec::new()).map_err(failed)?;
        let target = Path::new(OsStr::from_bytes(target.to_bytes()));
        if target.is_absolute() {
            self.folders = vec![open_first("/")?];
            self.passed = PathBuf::from("/");
        }
        let components: Vec<OsString> = components_of(target).collect();
        self.linked += components.len();
        for component in components.into_iter().rev() {
            self.ahead.push_front(component);
        }
        Ok(())
    }

    /// Notes whether something in the innermost folder stays there.
    fn note_kept(&mut self, one: &Stat, path: &Path) -> Result<()> {
        let folder = rustix::fs::fstat(self.innermost()).map_err(Error::io("look at the folder of", path))?;
        self.is_ours_all_the_way &= is_kept(&folder, one);
        Ok(())
    }
}

fn open_first(path: &str) -> Result<OwnedFd> {
    let flags = COMPONENT | OFlags::DIRECTORY;
    rustix::fs::open(path, flags, Mode::empty()).map_err(Error::io("open", Path::new(path)))
}

/// The components of a path, without the root.
fn components_of(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some("..".into()),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    use super::*;

    const OTHER: u32 = 12345;

    fn make(path: &Path) -> Result<Folder> {
        NamedFolder::look(path)?.make(Mode::RWXU, |_, _| {})
    }

    fn is_same(folder: &Folder, path: &Path) -> bool {
        let (one, other) = (rustix::fs::fstat(folder).unwrap(), rustix::fs::stat(path).unwrap());
        (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
    }

    #[test]
    fn a_path_leads_where_the_kernel_would_go() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        std::fs::create_dir_all(path("a/b")).unwrap();
        std::fs::create_dir_all(path("c/d")).unwrap();
        std::fs::write(path("file"), "").unwrap();
        symlink("../c/d", path("a/relative")).unwrap();
        symlink(path("a"), path("absolute")).unwrap();
        symlink("loop", path("loop")).unwrap();
        symlink("nowhere/deeper", path("dangling")).unwrap();
        for there in [
            "",
            "a/b",
            "a/b/../b/.",
            "a/relative",
            "a/relative/..",
            "absolute/relative/../d",
            "a/b/",
        ] {
            let named = NamedFolder::look(&path(there)).unwrap();
            assert!(named.exists() && is_same(named.nearest(), &path(there)), "{there}");
        }
        for bad in ["file", "file/x", "loop", "dangling", "dangling/x"] {
            assert!(matches!(NamedFolder::look(&path(bad)), Err(Error::Io { .. })), "{bad}");
        }
        assert!(NamedFolder::look(Path::new("")).is_err());
        assert!(is_same(&open(Path::new("..")).unwrap(), Path::new("..")));
        assert!(is_same(&open(Path::new("/../..")).unwrap(), Path::new("/")));
    }

    #[test]
    fn what_is_missing_is_made_once_asked_for() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        std::fs::create_dir(path("a")).unwrap();
        symlink("a", path("link")).unwrap();
        let named = NamedFolder::look(&path("link/x/../y/z")).unwrap();
        assert!(!named.exists() && is_same(named.nearest(), &path("a")) && !path("a/y").exists());
        assert!(is_same(&named.make(Mode::RWXU, |_, _| {}).unwrap(), &path("a/y/z")));
        assert!(!path("a/x").exists());
        // Someone was faster: a folder serves, and a link does not.
        let (folder, link) = (path("new/x"), path("newer/x"));
        let looked = [&folder, &link].map(|path| NamedFolder::look(path).unwrap());
        std::fs::create_dir_all(&folder).unwrap();
        symlink("a", path("newer")).unwrap();
        assert!(looked[0].make(Mode::RWXU, |_, _| {}).is_ok());
        assert!(looked[1].make(Mode::RWXU, |_, _| {}).is_err());
        assert!(!path("a/x").exists());
    }

    #[test]
    #[expect(clippy::print_stdout, reason = "a test that does not run says so")]
    fn no_link_is_followed_that_another_user_can_have_put_there() {
        if !geteuid().is_root() {
            println!("NOT RUN: it takes root to make files of other users");
            return;
        }
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        for (folder, owner, mode) in [
            ("victim", 0, 0o755),
            ("ours", 0, 0o755),
            ("theirs", OTHER, 0o755),
            ("shared", 0, 0o777),
            ("sticky", 0, 0o1777),
            ("group", 0, 0o775),
        ] {
            std::fs::create_dir(path(folder)).unwrap();
            std::fs::set_permissions(path(folder), PermissionsExt::from_mode(mode)).unwrap();
            let group = if folder == "group" { OTHER } else { owner };
            chown(path(folder), Some(owner), Some(group)).unwrap();
            for (name, owner) in [("root", 0), ("other", OTHER)] {
                let link = path(folder).join(name);
                symlink(path("victim"), &link).unwrap();
                lchown(&link, Some(owner), None).unwrap();
            }
            std::fs::create_dir(path(folder).join("folder")).unwrap();
        }
        for good in [
            "ours/root",
            "ours/other",
            "sticky/root",
            "theirs/folder",
            "shared/folder",
        ] {
            assert!(make(&path(good)).is_ok(), "{good}");
        }
        for (bad, is_another) in [
            ("theirs/other", true),
            ("shared/other", true),
            ("sticky/other", true),
            ("group/other", true),
            ("theirs/root", false),
            ("shared/root", false),
            ("group/root", false),
        ] {
            for below in ["", "sub", "sub/deeper", "../victim"] {
                let refused = make(&path(bad).join(below)).unwrap_err();
                assert_eq!(
                    matches!(refused, Error::OfAnother { uid: OTHER, .. }),
                    is_another,
                    "{refused}"
                );
                assert_eq!(matches!(refused, Error::SharedLink { .. }), !is_another, "{refused}");
            }
        }
        let names = std::fs::read_dir(path("victim")).unwrap();
        assert_eq!(names.count(), 3, "nothing was made there");
        for (name, is) in [
            ("ours/root", true),
            ("sticky/root", true),
            ("theirs/folder", false),
            ("shared/folder", false),
        ] {
            assert_eq!(
                NamedFolder::look(&path(name)).unwrap().is_ours_all_the_way(),
                is,
                "{name}"
            );
        }
    }
}
