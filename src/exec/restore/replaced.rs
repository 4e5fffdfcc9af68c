//! What stands where images are to go. Whether anyone uses it, the kernel says by a lease: one that is granted proves that nobody else has
//! the file open, in whichever namespace, mapped, as a loop device or registered with `io_uring`. What cannot be found out counts as in use.

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

/// Files that are to be replaced, each leased for as long as this lives: whoever opens one waits until then.
#[derive(Debug, Default)]
pub struct ReplacedFiles {
    names: BTreeMap<PathBuf, FoundFile>,
    leased: Vec<LeasedFile>,
}

/// What a name stood for when it was looked at.
#[derive(Debug)]
struct FoundFile {
    /// The file, or the symbolic link.
    id: FileId,
    /// Which of the leased files it is or leads to; none for a link that leads nowhere.
    leased: Option<usize>,
}

#[derive(Debug)]
struct LeasedFile {
    file: File,
    id: FileId,
    path: PathBuf,
}

impl ReplacedFiles {
    /// Takes leases on all that stands at some places. A file of several names is leased once. No other descriptor of this process may
    /// be open on any of them.
    ///
    /// # Errors
    /// [`Error::InUse`] for the first that someone uses, or of which that cannot be found out; [`Error::FolderInTheWay`].
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

    /// Leases what stands at a place, or what the link there leads to: whoever uses that would go on with what the name no longer means.
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
        // What is opened so is not used, and breaks nobody's lease.
        let there = match place.open(flags) {
            Ok(there) => there,
            Err(Errno::NOENT) if is_link => return Ok(None),
            Err(errno) => return Err(unknown(&place.path, "it cannot be opened", errno)),
        };
        let stat = rustix::fs::fstat(&there).map_err(Error::io("look at", &place.path))?;
        let id = FileId::from(&stat);
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || (!is_link && id != found) {
            return Err(in_use(&place.path, "it is no file, or changes at this moment"));
        }
        if let Some(at) = known.get(&id) {
            return Ok(Some(*at));
        }
        let file = match reopen(&there, OFlags::RDONLY | OFlags::NONBLOCK) {
            Ok(file) => file,
            Err(Errno::AGAIN) => return Err(in_use(&place.path, "leased")),
            Err(errno) => return Err(unknown(&place.path, "it cannot be opened", errno)),
        };
        drop(there);
        match lease::take(&file, Lease::All) {
            Ok(()) => {}
            Err(Errno::AGAIN) => return Err(in_use(&place.path, &who(&file, id))),
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

    /// Which file, or link, stood at a place; none if nothing did.
    pub fn at(&self, place: &Place) -> Option<FileId> {
        self.names.get(&place.path).map(|name| name.id)
    }

    /// Refuses to go on if someone waits to open what stood at a place.
    ///
    /// # Errors
    /// [`Error::InUse`].
    pub fn check(&self, place: &Place) -> Result<()> {
        let leased = self.names.get(&place.path).and_then(|name| name.leased);
        leased.map_or(Ok(()), |at| self.leased[at].check())
    }

    /// The same for all of them.
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

/// Who has a file open that cannot be leased.
fn who(file: &File, id: FileId) -> String {
    let here = (users::times_open_here(id) > 1).then(|| "open in this vmfold".to_owned());
    users_of(file, id)
        .or(here)
        .unwrap_or_else(|| "open somewhere that /proc does not show: in another namespace, or in the kernel".into())
}

fn users_of(file: impl AsFd, id: FileId) -> Option<String> {
    let users = users::users_of(&[id].into()).into_values().flatten();
    let users: Vec<String> = users.chain(users::locked_by(&file).map(str::to_owned)).collect();
    (!users.is_empty()).then(|| users.join(", "))
}

fn in_use(path: &Path, by: &str) -> Error {
    Error::InUse {
        path: path.to_owned(),
        by: by.to_owned(),
    }
}

/// What cannot be found out counts as in use.
fn unknown(path: &Path, what: &str, errno: Errno) -> Error {
    in_use(
        path,
        &format!("whether anyone uses it is not known, since {what}: {errno}"),
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
