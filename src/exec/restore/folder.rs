//! Paths below the folder that is restored to, opened component by component: no name in an archive, and no symbolic link that
//! stands there, leads out of it.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, Stat, Statx, StatxFlags, StatxTimestamp};
use rustix::io::Errno;

use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::fs::existing;
use crate::pool::users::FileId;

/// The folder that is restored to.
#[derive(Debug)]
pub struct Root {
    /// The folder, or what exists of the way to it.
    file: File,
    path: PathBuf,
    is_there: bool,
}

/// Which file something is, and in which state: while all of it is the same, so is the content. Times are in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileState {
    /// Device and inode.
    pub id: FileId,
    /// When the inode was made, which tells it from a later one of the same number; 0 where the filesystem does not say.
    pub born: FileTime,
    /// Bytes.
    pub size: u64,
    /// When it was last written.
    pub mtime: FileTime,
    /// When anything of it last changed, its names included.
    pub ctime: FileTime,
}

/// A name in a folder below the root.
#[derive(Debug, Clone)]
pub struct Place {
    /// Names in one folder share its descriptor.
    folder: Arc<OwnedFd>,
    name: OsString,
    /// Its whole path, for messages.
    pub path: PathBuf,
}

const FOLDER: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC)
    .union(OFlags::RDONLY);

/// What is asked of files to tell their states.
const STATE: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::BTIME);

impl Root {
    /// Opens the folder to be restored to, or what exists of the way to it. Nothing is made.
    ///
    /// # Errors
    /// Those of opening.
    pub fn look(path: &Path) -> Result<Self> {
        let existing = existing(path);
        Ok(Self {
            file: File::open(existing).map_err(Error::io("open", existing))?,
            path: path.to_owned(),
            // Looked up once: a folder that someone makes meanwhile is not the one that was opened.
            is_there: existing == path,
        })
    }

    /// Opens the folder, which is made if it does not exist, and keeps other imports off it.
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
    /// [`Error::Restoring`] if another import has it; otherwise those of the system calls.
    pub fn keep_others_off(&self) -> Result<()> {
        if !self.is_there {
            return Ok(());
        }
        let path = &self.path;
        match self.file.try_lock() {
            Ok(()) => Ok(()),
            Err(TryLockError::WouldBlock) => Err(Error::Restoring { path: path.clone() }),
            Err(TryLockError::Error(error)) => match error.raw_os_error() {
                // Some filesystems of the network lock no folders. No import writes to a name that another one has, locked or not.
                Some(libc::EBADF | libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP | libc::EISDIR) => Ok(()),
                _ => Err(Error::io("lock", path)(error)),
            },
        }
    }

    /// Makes the folder if it does not exist, and keeps other imports off it then.
    ///
    /// # Errors
    /// Those of the system calls and of [`Root::keep_others_off`].
    pub fn make(&mut self) -> Result<()> {
        if self.is_there {
            return Ok(());
        }
        std::fs::create_dir_all(&self.path).map_err(Error::io("make the folder", &self.path))?;
        self.file = File::open(&self.path).map_err(Error::io("open", &self.path))?;
        self.is_there = true;
        self.keep_others_off()
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open folder, or what exists of the way to it: what is on the same filesystem.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Opens a folder below; none if it does not exist and is not to be made. Calls `made` with each folder that was made.
    ///
    /// # Errors
    /// If a component is no folder: a symbolic link is none.
    pub fn folder(&self, relative: &Path, make: bool, mut made: impl FnMut(&Path)) -> Result<Option<OwnedFd>> {
        if !self.is_there && !make {
            return Ok(None);
        }
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
        let folder = self.folder(relative.parent().unwrap_or(Path::new("")), make, made)?;
        Ok(folder.map(|folder| self.place_in(Arc::new(folder), relative)))
    }

    /// A name below, in its folder that is open.
    pub fn place_in(&self, folder: Arc<OwnedFd>, relative: &Path) -> Place {
        Place {
            folder,
            name: relative.file_name().unwrap_or_default().to_owned(),
            path: self.path.join(relative),
        }
    }
}

impl FileState {
    /// That of an open file.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn of(file: &File, path: &Path) -> Result<Self> {
        let found = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, STATE);
        found
            .map(|found| Self::from(&found))
            .map_err(Error::io("look at", path))
    }

    /// Whether it is the same file, not written to since, whatever happened to its names.
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
    fn from(found: &Statx) -> Self {
        Self {
            id: FileId {
                device: rustix::fs::makedev(found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
            },
            born: time_of(found.stx_btime),
            size: found.stx_size,
            mtime: time_of(found.stx_mtime),
            ctime: time_of(found.stx_ctime),
        }
    }
}

impl Place {
    /// What stands there; a symbolic link is looked at itself. None if nothing does.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn stat(&self) -> Result<Option<Stat>> {
        match rustix::fs::statat(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(Error::io("look at", &self.path)(errno)),
        }
    }

    /// Device and inode of what stands there.
    ///
    /// # Errors
    /// As [`Place::stat`].
    pub fn id(&self) -> Result<Option<FileId>> {
        Ok(self.stat()?.map(|stat| FileId::from(&stat)))
    }

    /// Which regular file stands there, and in which state. None if there is none, or the kernel does not tell.
    pub fn state(&self) -> Option<FileState> {
        let found = rustix::fs::statx(&self.folder, &self.name, AtFlags::SYMLINK_NOFOLLOW, STATE).ok()?;
        let is_file = rustix::fs::FileType::from_raw_mode(found.stx_mode.into()) == rustix::fs::FileType::RegularFile;
        is_file.then(|| FileState::from(&found))
    }

    /// Opens what stands there, with flags beside those that keep it there and close it when another program is started.
    ///
    /// # Errors
    /// Those of opening.
    pub fn open(&self, flags: OFlags) -> rustix::io::Result<File> {
        rustix::fs::openat(&self.folder, &self.name, flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
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

    /// Another name in the same folder.
    #[must_use]
    pub fn beside(&self, name: OsString) -> Self {
        Self {
            folder: Arc::clone(&self.folder),
            path: self.path.with_file_name(&name),
            name,
        }
    }

    /// Its last component.
    pub fn name(&self) -> &OsStr {
        &self.name
    }

    /// The folder it is in.
    pub fn folder(&self) -> &Arc<OwnedFd> {
        &self.folder
    }

    /// Makes a new, empty file in the folder that has no name yet, for reading and writing by its owner only.
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EISDIR` where the filesystem makes no such files, among others.
    pub fn create_unnamed(&self) -> rustix::io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(&self.folder, ".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
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

    /// Gives an open file this name, where nothing stands.
    ///
    /// # Errors
    /// `EEXIST` if something stands here, among others.
    pub fn link(&self, file: &File) -> rustix::io::Result<()> {
        match rustix::fs::linkat(file, "", &self.folder, &self.name, AtFlags::EMPTY_PATH) {
            // Only with CAP_DAC_READ_SEARCH an open file can be named so.
            Err(Errno::NOENT | Errno::PERM) => {
                let open = format!("/proc/self/fd/{}", file.as_raw_fd());
                rustix::fs::linkat(CWD, open, &self.folder, &self.name, AtFlags::SYMLINK_FOLLOW)
            }
            linked => linked,
        }
    }

    /// Gives what stands here the name `to`, where nothing stands.
    ///
    /// # Errors
    /// `EEXIST` if something stands there, among others.
    pub fn move_to(&self, to: &Self) -> rustix::io::Result<()> {
        match rustix::fs::renameat_with(&self.folder, &self.name, &to.folder, &to.name, RenameFlags::NOREPLACE) {
            // A filesystem without RENAME_NOREPLACE: a link does not replace either.
            Err(Errno::INVAL | Errno::NOSYS) => {
                rustix::fs::linkat(&self.folder, &self.name, &to.folder, &to.name, AtFlags::empty())?;
                rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty())
            }
            renamed => renamed,
        }
    }

    /// Gives what stands here the name `to`, and what stands there this one, at once.
    ///
    /// # Errors
    /// `EINVAL` or `ENOSYS` where the filesystem cannot, among others.
    pub fn exchange(&self, to: &Self) -> rustix::io::Result<()> {
        rustix::fs::renameat_with(&self.folder, &self.name, &to.folder, &to.name, RenameFlags::EXCHANGE)
    }

    /// Gives what stands here the name `to`, in the place of what stands there.
    ///
    /// # Errors
    /// Those of the system call.
    pub fn replace(&self, to: &Self) -> rustix::io::Result<()> {
        rustix::fs::renameat(&self.folder, &self.name, &to.folder, &to.name)
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
