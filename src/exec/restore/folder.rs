//! Paths below the folder that is restored to. They are opened component by component, so that no name in an archive and no symbolic link in
//! the folder leads out of it.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, Stat, Statx, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::named_folder::NamedFolder;
use crate::pool::users::FileId;
use crate::sys::beneath::Folder;

/// The folder that is restored to.
#[derive(Debug)]
pub struct Root {
    /// The folder, as far as it exists.
    named: NamedFolder,
    /// The open folder. While it does not exist, this is the deepest folder above it that does.
    file: File,
    path: PathBuf,
    /// Whether the folder exists.
    is_there: bool,
    /// The folders that were made, each with the one above it.
    made: Vec<(Folder, OsString)>,
}

/// The identity and the state of a file. As long as nothing of it changes, the content is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileState {
    /// Device and inode.
    pub id: FileId,
    /// The time when the inode was made, which tells it from a later inode of the same number. It is 0 if the filesystem does not keep it.
    pub born: FileTime,
    /// The size in bytes.
    pub size: u64,
    /// The time of the last change of the content.
    pub mtime: FileTime,
    /// The time of the last change of content, attributes or names.
    pub ctime: FileTime,
}

/// A name in a folder below the root.
#[derive(Debug, Clone)]
pub struct Place {
    /// The open folder. Places in the same folder share its descriptor.
    folder: Arc<OwnedFd>,
    /// The name in the folder.
    name: OsString,
    /// The whole path, for messages.
    pub path: PathBuf,
}

/// Opens places below a [`Root`] so that those in the same folder share its descriptor: there may be more images than files can be open.
#[derive(Debug, Default)]
pub struct Places {
    folders: BTreeMap<PathBuf, Arc<OwnedFd>>,
}

impl Places {
    /// A name below. If its folder does not exist, it is made with `make`, and otherwise the result is `None`.
    ///
    /// # Errors
    /// Those of [`Root::folder`].
    pub fn place(
        &mut self,
        root: &Root,
        relative: &Path,
        make: bool,
        made: impl FnMut(&Path),
    ) -> Result<Option<Place>> {
        let parent = relative.parent().unwrap_or(Path::new(""));
        let folder = if let Some(folder) = self.folders.get(parent) {
            Arc::clone(folder)
        } else {
            let Some(folder) = root.folder(parent, make, made)?.map(Arc::new) else {
                return Ok(None);
            };
            self.folders.insert(parent.to_owned(), Arc::clone(&folder));
            folder
        };
        Ok(Some(root.place_in(folder, relative)))
    }

    /// The number of folders that are open.
    pub fn open_folders(&self) -> usize {
        self.folders.len()
    }
}

/// The flags that folders are opened with.
const FOLDER: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::RDONLY);

/// The fields of `statx` that a [`FileState`] is made of.
const STATE: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

impl Root {
    /// Opens the folder that is restored to, or the deepest folder above it that exists. It makes nothing.
    ///
    /// # Errors
    /// Those of [`NamedFolder::look`].
    pub fn look(path: &Path) -> Result<Self> {
        let named = NamedFolder::look(path)?;
        Ok(Self {
            file: file_of(named.nearest(), path)?,
            path: path.to_owned(),
            is_there: named.exists(),
            made: Vec::new(),
            named,
        })
    }

    /// Opens the folder, makes it if it does not exist, and keeps other imports off it.
    ///
    /// # Errors
    /// Those of [`Root::look`] and [`Root::make`].
    pub fn lock(path: &Path) -> Result<Self> {
        let mut root = Self::look(path)?;
        root.keep_others_off()?;
        root.make()?;
        Ok(root)
    }

    /// Keeps other imports off the folder, if it exists, for as long as it is open.
    ///
    /// # Errors
    /// [`Error::Restoring`] if another import has it; [`Error::Io`] if it cannot be locked.
    pub fn keep_others_off(&self) -> Result<()> {
        if !self.is_there {
            return Ok(());
        }
        let path = &self.path;
        match self.file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(Error::Restoring { path: path.clone() }),
            Err(TryLockError::Error(error)) => match error.raw_os_error() {
                // Some network filesystems cannot lock folders. Two imports still do not write to the same file: each makes new ones.
                Some(libc::EBADF | libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::EISDIR) => Ok(()),
                _ => Err(Error::io("lock", path)(error)),
            },
        }
    }

    /// Makes the folder if it does not exist, and then keeps other imports off it.
    ///
    /// # Errors
    /// Those of [`NamedFolder::make`] and [`Root::keep_others_off`].
    pub fn make(&mut self) -> Result<()> {
        if self.is_there {
            return Ok(());
        }
        let note = |above: &Folder, name: &OsStr| self.made.push((above.clone(), name.to_owned()));
        let made = self.named.make(Mode::RWXU | Mode::RWXG | Mode::RWXO, note)?;
        self.file = file_of(&made, &self.path)?;
        self.is_there = true;
        self.keep_others_off()
    }

    /// Removes the folders that [`Root::make`] made, if nothing is in them.
    pub fn remove_made(&self) {
        for (above, name) in self.made.iter().rev() {
            // An empty folder that stays does no harm.
            let _ = rustix::fs::unlinkat(above, name, AtFlags::REMOVEDIR);
        }
    }

    /// The path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open folder. While it does not exist, this is the deepest folder above it, which is on the same filesystem.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Opens a folder below. If it does not exist, it is made with `make`, and otherwise the result is `None`. Calls `made` with the relative
    /// path of each folder that was made.
    ///
    /// # Errors
    /// [`Error::Usage`] if the path leads out, or a component is a symbolic link or no folder; [`Error::Io`] if a folder cannot be opened or
    /// made.
    pub fn folder(&self, relative: &Path, make: bool, mut made: impl FnMut(&Path)) -> Result<Option<OwnedFd>> {
        if !self.is_there && !make {
            return Ok(None);
        }
        let mut folder: OwnedFd = self.file.try_clone().map_err(Error::io("open", &self.path))?.into();
        let mut opened_path = PathBuf::new();
        for component in relative.components() {
            let Component::Normal(name) = component else {
                return Err(Error::Usage(format!(
                    "`{}` leads out of the folder",
                    crate::shown::shown(relative)
                )));
            };
            opened_path.push(name);
            let path = self.path.join(&opened_path);
            let open = |folder: &OwnedFd| rustix::fs::openat(folder, name, FOLDER, Mode::empty());
            folder = match open(&folder) {
                Ok(next) => next,
                Err(Errno::NOENT) if !make => return Ok(None),
                Err(Errno::NOENT) => {
                    match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) => made(&opened_path),
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

    /// A name below. If its folder does not exist, it is made with `make`, and otherwise the result is `None`.
    ///
    /// # Errors
    /// Those of [`Root::folder`].
    pub fn place(&self, relative: &Path, make: bool, made: impl FnMut(&Path)) -> Result<Option<Place>> {
        Places::default().place(self, relative, make, made)
    }

    /// A name below, in a folder that is open already.
    fn place_in(&self, folder: Arc<OwnedFd>, relative: &Path) -> Place {
        Place {
            folder,
            name: relative.file_name().unwrap_or_default().to_owned(),
            path: self.path.join(relative),
        }
    }
}

/// An open folder as a file.
fn file_of(folder: &Folder, path: &Path) -> Result<File> {
    let file = folder.as_fd().try_clone_to_owned();
    file.map(File::from).map_err(Error::io("open", path))
}

impl FileState {
    /// The state of an open file.
    ///
    /// # Errors
    /// [`Error::Io`] if `statx` fails.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, STATE);
        statx
            .map(|statx| Self::from(&statx))
            .map_err(Error::io("look at", path))
    }

    /// Whether it is the same file with the same content, even if its names or attributes changed.
    pub fn is_same_file(&self, other: &Self) -> bool {
        let ctime = self.ctime;
        *self == Self { ctime, ..*other }
    }
}

fn time_of(time: StatxTimestamp) -> FileTime {
    FileTime {
        seconds: time.tv_sec,
        nanoseconds: time.tv_nsec,
    }
}

impl From<&Statx> for FileState {
    fn from(statx: &Statx) -> Self {
        Self {
            id: FileId {
                device: rustix::fs::makedev(statx.stx_dev_major, statx.stx_dev_minor),
                inode: statx.stx_ino,
            },
            born: time_of(statx.stx_btime),
            size: statx.stx_size,
            mtime: time_of(statx.stx_mtime),
            ctime: time_of(statx.stx_ctime),
        }
    }
}

impl Place {
    /// The attributes of the file with this name, or `None` if there is none. A symbolic link is not followed.
    ///
    /// # Errors
    /// [`Error::Io`] if `fstatat` fails.
    pub fn stat(&self) -> Result<Option<Stat>> {
        match rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::io("look at", &self.path)(errno)),
        }
    }

    /// Device and inode of the file with this name, or `None` if there is none.
    ///
    /// # Errors
    /// Those of [`Place::stat`].
    pub fn id(&self) -> Result<Option<FileId>> {
        Ok(self.stat()?.map(|stat| FileId::from(&stat)))
    }

    /// The state of the regular file with this name. It is `None` if there is no such file, or if `statx` fails.
    pub fn state(&self) -> Option<FileState> {
        let statx = rustix::fs::statx(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW, STATE).ok()?;
        let is_file = rustix::fs::FileType::from_raw_mode(statx.stx_mode.into()) == rustix::fs::FileType::RegularFile;
        is_file.then(|| FileState::from(&statx))
    }

    /// Opens the file with this name, with these flags and `O_CLOEXEC`.
    ///
    /// # Errors
    /// Those of `openat`.
    pub fn open(&self, flags: OFlags) -> rustix::io::Result<File> {
        rustix::fs::openat(&self.folder, &self.name, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
    }

    /// All names in the folder.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read.
    pub fn siblings(&self) -> Result<Vec<OsString>> {
        let io = |errno: Errno| Error::io("look into the folder of", &self.path)(errno);
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            names.push(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
        }
        Ok(names)
    }

    /// Another name in the same folder.
    #[must_use]
    pub fn beside(&self, name: OsString) -> Self {
        Self {
            folder: Arc::clone(&self.folder),
            path: self.path.with_file_name(&name),
            name,
        }
    }

    /// The name in the folder.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The open folder.
    pub fn folder(&self) -> &Arc<OwnedFd> {
        &self.folder
    }

    /// Makes an empty file without a name in the folder. Only its owner can read and write it.
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EISDIR` if the filesystem has no such files; others of `openat`.
    pub fn create_unnamed(&self) -> rustix::io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, ".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
    }

    /// Makes an empty file with this name. Only its owner can read and write it.
    ///
    /// # Errors
    /// [`Error::Io`], with `EEXIST` if the name is taken.
    pub fn create(&self) -> Result<File> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        rustix::fs::openat(&self.folder, &self.name, flags, Mode::RUSR | Mode::WUSR)
            .map(File::from)
            .map_err(Error::io("make", &self.path))
    }

    /// Removes the file with this name, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be removed.
    pub fn remove(&self) -> Result<()> {
        match rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io("remove", &self.path)(errno)),
        }
    }

    /// Gives an open file this name, which must be free.
    ///
    /// # Errors
    /// `EEXIST` if the name is taken; others of `linkat`.
    pub fn link(&self, file: &File) -> rustix::io::Result<()> {
        match rustix::fs::linkat(file, "", &self.folder, &self.name, AtFlags::EMPTY_PATH) {
            // Without CAP_DAC_READ_SEARCH, `AT_EMPTY_PATH` is refused.
            Err(Errno::NOENT | Errno::PERM) => {
                let open = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::linkat(CWD, open, &self.folder, &self.name, AtFlags::SYMLINK_FOLLOW)
            }
            linked => linked,
        }
    }

    /// Renames the file with this name to `to`, which must be free.
    ///
    /// # Errors
    /// `EEXIST` if that name is taken; others of `renameat2` and `linkat`.
    pub fn move_to(&self, to: &Self) -> rustix::io::Result<()> {
        match rustix::fs::renameat_with(&self.folder, &self.name, &to.folder, &to.name, RenameFlags::NOREPLACE) {
            // The filesystem has no RENAME_NOREPLACE. A link does not replace anything either.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(&self.folder, &self.name, &to.folder, &to.name, AtFlags::empty())?;
                rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty())
            }
            renamed => renamed,
        }
    }

    /// Exchanges the files with this name and with the name `to`, in one step.
    ///
    /// # Errors
    /// `EINVAL` or `ENOSYS` if the filesystem cannot do that; others of `renameat2`.
    pub fn exchange(&self, to: &Self) -> rustix::io::Result<()> {
        rustix::fs::renameat_with(&self.folder, &self.name, &to.folder, &to.name, RenameFlags::EXCHANGE)
    }

    /// Renames the file with this name to `to`, and replaces the file with that name.
    ///
    /// # Errors
    /// Those of `renameat`.
    pub fn replace(&self, to: &Self) -> rustix::io::Result<()> {
        rustix::fs::renameat(&self.folder, &self.name, &to.folder, &to.name)
    }

    /// Makes the entries of the folder durable.
    ///
    /// # Errors
    /// [`Error::Io`] if `fsync` fails.
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
        let root = Root::lock(inside.path()).unwrap();
        for bad in ["link/x", "../x", "/etc/x", "link/deeper/x"] {
            assert!(root.place(Path::new(bad), true, |_| {}).is_err(), "{bad}");
        }
        let dangling = root.place(Path::new("dangling"), true, |_| {}).unwrap().unwrap();
        assert!(dangling.stat().unwrap().is_some());
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
        assert_eq!(place.move_to(&other), Err(Errno::EXIST));
        place.replace(&other).unwrap();
        assert!(place.stat().unwrap().is_none());
        assert!(std::fs::read_dir(outside.path()).unwrap().next().is_none());
        assert!(root.place(Path::new("absent/x"), false, |_| {}).unwrap().is_none());
    }

    #[test]
    fn one_import_at_a_time_has_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("a/b");
        let root = Root::lock(&to).unwrap();
        assert!(matches!(Root::lock(&to), Err(Error::Restoring { .. })));
        drop(root);
        Root::lock(&to).unwrap();
    }

    #[test]
    fn of_a_folder_that_is_not_there_no_name_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("x.img"), "x").unwrap();
        let root = Root::look(&folder.path().join("absent")).unwrap();
        assert!(root.place(Path::new("x.img"), false, |_| {}).unwrap().is_none());
        let root = Root::look(folder.path()).unwrap();
        let place = root.place(Path::new("x.img"), false, |_| {}).unwrap().unwrap();
        assert!(place.state().is_some_and(|state| state.size == 1));
    }
}
