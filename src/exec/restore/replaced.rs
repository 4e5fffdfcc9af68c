//! Files that are replaced by images. A lease tells whether anyone uses such a file: the kernel grants it only if nobody else has the file
//! open, in any namespace, mapped, as a loop device, or registered with `io_uring`. If that cannot be found out, the file counts as in use.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;

use super::folder::Place;
use crate::error::{Error, Result};
use crate::pool::users::{self, FileId};
use crate::sys::beneath::reopen;
use crate::sys::lease::{self, Lease};

/// Files that are to be replaced. Each is leased as long as this value lives, and a process that opens one waits until then.
#[derive(Debug, Default)]
pub struct ReplacedFiles {
    /// The file that each name stands for, by path.
    names: BTreeMap<PathBuf, FoundFile>,
    leased: Vec<LeasedFile>,
}

/// The file that a name stood for when the leases were taken.
#[derive(Debug)]
struct FoundFile {
    /// Device and inode of the file or of the symbolic link.
    id: FileId,
    /// The place in `leased` of the file, or of the one that the link leads to. It is `None` for a link that leads nowhere.
    leased: Option<usize>,
}

/// A file with a lease on it.
#[derive(Debug)]
struct LeasedFile {
    file: File,
    id: FileId,
    path: PathBuf,
}

impl ReplacedFiles {
    /// Takes leases on all files at some places. A file with several names is leased once. This process may not have any of them open.
    ///
    /// # Errors
    /// [`Error::InUse`] for the first file that someone uses, or of which that cannot be found out; [`Error::FolderInTheWay`]; [`Error::Io`] if
    /// a place cannot be looked at.
    pub fn lease<'a>(places: impl Iterator<Item = &'a Place>) -> Result<Self> {
        let mut to_replace = Self::default();
        let mut known = BTreeMap::new();
        for place in places {
            let Some(stat) = place.stat()? else { continue };
            let is_link = match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => {
                    return Err(Error::FolderInTheWay {
                        path: place.path.clone(),
                    });
                }
                FileType::RegularFile => false,
                FileType::Symlink => true,
                _ => return Err(in_use(&place.path, "it is no file")),
            };
            let id = FileId::from(&stat);
            let leased = to_replace.lease_one(place, is_link, id, &mut known)?;
            to_replace.names.insert(place.path.clone(), FoundFile { id, leased });
        }
        Ok(to_replace)
    }

    /// Leases the file at a place, or the one that a link there leads to. A process that uses it would otherwise keep using the old file under
    /// the name.
    fn lease_one(
        &mut self,
        place: &Place,
        is_link: bool,
        found: FileId,
        known: &mut BTreeMap<FileId, usize>,
    ) -> Result<Option<usize>> {
        let flags = if is_link {
            OFlags::PATH
        } else {
            OFlags::PATH | OFlags::NOFOLLOW
        };
        // Opening with O_PATH is no use of the file, and breaks nobody's lease.
        let opened = match place.open(flags) {
            Ok(opened) => opened,
            Err(Errno::NOENT) if is_link => return Ok(None),
            Err(errno) => return Err(unknown(&place.path, "it cannot be opened", errno)),
        };
        let stat = rustix::fs::fstat(&opened).map_err(Error::io("look at", &place.path))?;
        let id = FileId::from(&stat);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || (!is_link && id != found) {
            return Err(in_use(&place.path, "it is no file, or changes at this moment"));
        }
        if let Some(number) = known.get(&id) {
            return Ok(Some(*number));
        }
        let file = match reopen(&opened, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(file) => file,
            Err(Errno::AGAIN) => return Err(in_use(&place.path, "leased")),
            Err(errno) => return Err(unknown(&place.path, "it cannot be opened", errno)),
        };
        drop(opened);
        match lease::take(&file, Lease::All) {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Err(in_use(&place.path, &describe_users(&file, id))),
            Err(errno) => return Err(unknown(&place.path, "it cannot be leased", errno)),
        }
        known.insert(id, self.leased.len());
        self.leased.push(LeasedFile {
            file,
            id,
            path: place.path.clone(),
        });
        Ok(Some(self.leased.len() - 1))
    }

    /// The file or link that stood at a place, or `None` if nothing did.
    pub fn at(&self, place: &Place) -> Option<FileId> {
        self.names.get(&place.path).map(|name| name.id)
    }

    /// Checks that nobody waits to open the file that stood at a place.
    ///
    /// # Errors
    /// [`Error::InUse`].
    pub fn check(&self, place: &Place) -> Result<()> {
        let leased = self.names.get(&place.path).and_then(|name| name.leased);
        leased.map_or(Ok(()), |number| self.leased[number].check())
    }

    /// Checks that nobody waits to open any of the files.
    ///
    /// # Errors
    /// [`Error::InUse`].
    pub fn check_all(&self) -> Result<()> {
        self.leased.iter().try_for_each(LeasedFile::check)
    }
}

impl LeasedFile {
    fn check(&self) -> Result<()> {
        if lease::is_held(&self.file, Lease::All) {
            return Ok(());
        }
        let users = users_of(&self.file, self.id);
        let by = users.unwrap_or_else(|| "someone opens it at this moment".into());
        Err(in_use(&self.path, &by))
    }
}

/// Describes who uses a file that cannot be leased.
fn describe_users(file: &File, id: FileId) -> String {
    let this_process = (users::times_open_here(id) > 1).then(|| "open in this vmfold".to_owned());
    users_of(file, id)
        .or(this_process)
        .unwrap_or_else(|| "open somewhere that /proc does not show: in another namespace, or in the kernel".into())
}

/// The processes that use a file, as far as `/proc` and locks show them.
fn users_of(file: impl AsFd, id: FileId) -> Option<String> {
    let users = users::users_of(&[id].into()).into_values().flatten();
    let users: Vec<String> = users.chain(users::locked_by(&file).map(str::to_owned)).collect();
    (!users.is_empty()).then(|| users.join(", "))
}

/// The error for a file that is in use.
fn in_use(path: &Path, by: &str) -> Error {
    Error::InUse {
        path: path.to_owned(),
        by: by.to_owned(),
    }
}

/// The error for a file of which it cannot be found out whether anyone uses it.
fn unknown(path: &Path, reason: &str, errno: Errno) -> Error {
    in_use(
        path,
        &format!("whether anyone uses it is not known, since {reason}: {errno}"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::folder::Root;
    use super::*;

    #[test]
    fn a_file_is_free_only_if_nobody_has_it() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["one", "two"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::fs::hard_link(folder.path().join("one"), folder.path().join("three")).unwrap();
        std::os::unix::fs::symlink("nowhere", folder.path().join("dangling")).unwrap();
        std::os::unix::fs::symlink("two", folder.path().join("link")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, folder.path().join("fifo"), 0o600.into()).unwrap();
        std::os::unix::fs::symlink("fifo", folder.path().join("to-fifo")).unwrap();
        let root = Root::lock(folder.path()).unwrap();
        let lease = |names: &[&str]| {
            let place = |name: &&str| root.place(Path::new(name), false, |_| {}).unwrap().unwrap();
            ReplacedFiles::lease(names.iter().map(place).collect::<Vec<_>>().iter())
        };
        let all = ["one", "three", "dangling", "link", "absent"];
        let to_replace = lease(&all).unwrap();
        assert_eq!((to_replace.names.len(), to_replace.leased.len()), (4, 2));
        assert!(to_replace.check_all().is_ok());
        assert!(matches!(lease(&all), Err(Error::InUse { .. })), "it is leased");
        drop(to_replace);
        for (open, names) in [("one", ["three"]), ("two", ["link"])] {
            let held = File::open(folder.path().join(open)).unwrap();
            let refused = lease(&names).unwrap_err();
            assert!(refused.to_string().contains("open in this vmfold"), "{refused}");
            drop(held);
            lease(&names).unwrap();
        }
        for bad in ["fifo", "to-fifo"] {
            assert!(matches!(lease(&[bad]), Err(Error::InUse { .. })), "{bad}");
        }
        let to_replace = lease(&["two"]).unwrap();
        let path = folder.path().join("two");
        let opener = std::thread::spawn(move || File::open(path).map(drop));
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while to_replace.check_all().is_ok() {
            assert!(std::time::Instant::now() < deadline, "whoever opens it is noticed");
            std::thread::yield_now();
        }
        drop(to_replace);
        opener.join().unwrap().unwrap();
    }
}
