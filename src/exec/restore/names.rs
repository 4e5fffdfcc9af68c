//! New files and their names. A file has no name until it is complete and durable. Then it gets all of its names: a free name by a link, and
//! a taken one by an exchange with the file that has it. If anything fails on the way, the exchanges are undone.

use std::ffi::OsString;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::folder::{FileState, Place};
use super::replaced::ReplacedFiles;
use crate::error::{Error, Result};
use crate::pool::users::FileId;

/// Names for files that do not have their own yet. They tell nothing of the image, and nobody can foresee them.
#[derive(Debug)]
pub struct TemporaryNames {
    /// The number of the first name.
    first: u64,
    /// The number of the next name.
    next: AtomicU64,
}

impl TemporaryNames {
    /// Begins with a random number.
    ///
    /// # Errors
    /// [`Error::Io`] if the kernel gives no random bytes.
    pub fn random() -> Result<Self> {
        let mut first = [0; 8];
        let path = PathBuf::from("/dev/urandom");
        rustix::rand::getrandom(&mut first, rustix::rand::GetRandomFlags::empty()).map_err(Error::io("read", &path))?;
        let first = u64::from_le_bytes(first);
        Ok(Self {
            first,
            next: AtomicU64::new(first),
        })
    }

    /// The number of the first name.
    pub fn first(&self) -> u64 {
        self.first
    }

    fn next(&self) -> OsString {
        Self::name(self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn name(number: u64) -> OsString {
        format!(".vmfold-{number:016x}~").into()
    }

    /// The number of a name, or `None` if it is no temporary name.
    pub fn number_of(name: &std::ffi::OsStr) -> Option<u64> {
        let digits = name.to_str()?.strip_prefix(".vmfold-")?.strip_suffix('~')?;
        let number = u64::from_str_radix(digits, 16).ok()?;
        (Self::name(number) == name).then_some(number)
    }
}

/// A file that was made and has none of its names yet. If it gets none, it is gone once this value is dropped.
#[derive(Debug)]
pub struct UnnamedFile {
    /// The open file. It is `None` if more files are made than can be open.
    file: Option<File>,
    /// Its temporary name, if it needs one.
    temporary: Option<Place>,
    /// Device and inode.
    id: FileId,
}

impl UnnamedFile {
    /// Makes a file in the folder of a place, and has `fill` complete it. With `stays_open` it stays open, and gets a temporary name only if
    /// the filesystem has no unnamed files.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be made; those of `fill`.
    pub fn make(
        place: &Place,
        temporaries: &TemporaryNames,
        stays_open: bool,
        fill: impl FnOnce(&File) -> Result<()>,
    ) -> Result<(Self, FileState)> {
        let unnamed = if stays_open {
            match place.create_unnamed() {
                Ok(file) => Some(file),
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS) => None,
                Err(errno) => return Err(Error::io("make a file beside", &place.path)(errno)),
            }
        } else {
            None
        };
        let (file, temporary) = if let Some(file) = unnamed {
            (file, None)
        } else {
            let temporary = place.beside(temporaries.next());
            (temporary.create()?, Some(temporary))
        };
        let id = FileState::of(&file, &place.path)?.id;
        let mut new = Self {
            file: None,
            temporary,
            id,
        };
        fill(&file)?;
        let state = FileState::of(&file, &place.path)?;
        new.file = stays_open.then_some(file);
        Ok((new, state))
    }

    /// The open file, to give it names. It is opened by its temporary name if it did not stay open.
    ///
    /// # Errors
    /// [`Error::Io`], with `ESTALE` if another file has the temporary name.
    fn open(&self, place: &Place) -> Result<File> {
        let failed = |errno: Errno| Error::io("open what is to become", &place.path)(errno);
        match (&self.file, &self.temporary) {
            (Some(file), _) => file.try_clone().map_err(Error::io("open", &place.path)),
            (None, Some(temporary)) => {
                let file = temporary.open(OFlags::PATH | OFlags::NOFOLLOW).map_err(failed)?;
                let id = FileState::of(&file, &temporary.path)?.id;
                if id == self.id {
                    Ok(file)
                } else {
                    Err(failed(Errno::STALE))
                }
            }
            (None, None) => Err(failed(Errno::STALE)),
        }
    }
}

impl Drop for UnnamedFile {
    fn drop(&mut self) {
        if let Some(temporary) = &self.temporary {
            remove_if(temporary, self.id);
        }
    }
}

/// Removes the name of a place if a certain file has it. If that fails, a later restore recognises the leftover by its name.
fn remove_if(place: &Place, id: FileId) -> bool {
    matches!(place.id(), Ok(Some(found)) if found == id) && place.remove().is_ok()
}

/// A new file and the names that it gets.
#[derive(Debug)]
pub struct NewImage {
    /// The file.
    pub new: UnnamedFile,
    /// Its names. The first one is in the folder that the file was made in.
    pub places: Vec<Place>,
}

/// The steps of giving a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The new file has a temporary name.
    Staged,
    /// The new file has the name, which was free.
    Named,
    /// The new file has the name, and the old file has the temporary one.
    Exchanged,
    /// The new file has the name, and the old file does not have it any more.
    Replaced,
}

/// A name that a new file gets.
struct GivenName<'a> {
    place: &'a Place,
    /// The new file.
    new: FileId,
    /// The file that had the name before.
    old: Option<FileId>,
    /// The temporary name, if one was used.
    temporary: Option<Place>,
    step: Step,
}

/// Gives new files their names, all of them or none. A file that has a name already is replaced only if it is the one in `to_replace`. Calls
/// `placed` with the number of each file that has all of its names.
///
/// # Errors
/// [`Error::InUse`] if someone opens a file that is replaced; [`Error::Exists`] if a name was taken meanwhile; [`Error::Io`] if a name cannot
/// be given; those of `placed`. After these errors all names are as before. [`Error::HalfReplaced`] if an error could not be undone.
pub fn give_names(
    images: &[NewImage],
    to_replace: &ReplacedFiles,
    temporaries: &TemporaryNames,
    mut placed: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    let mut given = Vec::new();
    let mut give_all = || -> Result<()> {
        for (number, image) in images.iter().enumerate() {
            let Some(first) = image.places.first() else { continue };
            let file = image.new.open(first)?;
            for (name_number, place) in image.places.iter().enumerate() {
                let temporary = image.new.temporary.as_ref().filter(|_| name_number == 0);
                give_name(
                    &file,
                    (image.new.id, temporary),
                    place,
                    to_replace,
                    temporaries,
                    &mut given,
                )?;
            }
            placed(number)?;
        }
        // A process that opens an old file waits for the lease to end. It shall get the file that had the name when it asked.
        to_replace.check_all()
    };
    match give_all() {
        Ok(()) => given.iter().try_for_each(|name| match (&name.temporary, name.old) {
            (Some(temporary), Some(old)) if name.step == Step::Exchanged && temporary.id()? == Some(old) => {
                temporary.remove()
            }
            _ => Ok(()),
        }),
        Err(error) => Err(take_back(images, &given, to_replace, error)),
    }
}

/// Gives one name to an open file. `own` is the temporary name that the file has in the same folder, if it has one.
fn give_name<'a>(
    file: &File,
    (new, own): (FileId, Option<&Place>),
    place: &'a Place,
    to_replace: &ReplacedFiles,
    temporaries: &TemporaryNames,
    given: &mut Vec<GivenName<'a>>,
) -> Result<()> {
    let failed = |errno| Error::io("give its name to", &place.path)(errno);
    let old = to_replace.at(place);
    let mut name = GivenName {
        place,
        new,
        old,
        temporary: None,
        step: Step::Named,
    };
    let Some(old) = old else {
        // A file with a temporary name is renamed, because a filesystem without unnamed files may have no links either.
        let named = own.map_or_else(|| place.link(file), |own| own.move_to(place));
        match named {
            Ok(()) => given.push(name),
            Err(Errno::EXIST) => {
                return Err(Error::Exists {
                    paths: vec![place.path.clone()],
                });
            }
            Err(errno) => return Err(failed(errno)),
        }
        return check_is(place, new);
    };
    let temporary = place.beside(own.map_or_else(|| temporaries.next(), |own| own.name().to_owned()));
    if own.is_none() {
        temporary.link(file).map_err(failed)?;
    }
    let number = given.len();
    (name.step, name.temporary) = (Step::Staged, Some(temporary.clone()));
    given.push(name);
    check_is(&temporary, new)?;
    to_replace.check(place)?;
    let exchanged = temporary.exchange(place);
    given[number].step = match exchanged {
        Ok(()) => Step::Exchanged,
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            check_is(place, old)?;
            temporary.replace(place).map_err(failed)?;
            Step::Replaced
        }
        Err(errno) => return Err(failed(errno)),
    };
    let is_other_file = given[number].step == Step::Exchanged && temporary.id()? != Some(old);
    if is_other_file {
        return Err(changed(place));
    }
    check_is(place, new)?;
    to_replace.check(place)
}

/// Checks that a certain file has the name of a place.
fn check_is(place: &Place, id: FileId) -> Result<()> {
    if place.id()? == Some(id) {
        Ok(())
    } else {
        Err(changed(place))
    }
}

/// The error for a name that another file has got meanwhile.
fn changed(place: &Place) -> Error {
    Error::InUse {
        path: place.path.clone(),
        by: "someone put another file there meanwhile".into(),
    }
}

/// Takes the names back that were given, the last one first. Returns the error, with the names that could not be taken back.
fn take_back(images: &[NewImage], given: &[GivenName<'_>], to_replace: &ReplacedFiles, error: Error) -> Error {
    let mut replaced = Vec::new();
    for name in given.iter().rev() {
        let is_undone = match (name.step, &name.temporary) {
            (Step::Staged, Some(temporary)) => {
                remove_if(temporary, name.new);
                true
            }
            (Step::Named, _) => remove_if(name.place, name.new),
            (Step::Exchanged, Some(temporary)) => {
                let is_new = matches!(name.place.id(), Ok(Some(id)) if id == name.new);
                let is_back = is_new && temporary.exchange(name.place).is_ok();
                if is_back {
                    remove_if(temporary, name.new);
                }
                is_back
            }
            _ => false,
        };
        if !is_undone {
            replaced.push(name.place.path.clone());
        }
    }
    if replaced.is_empty() {
        return error;
    }
    let places = images.iter().flat_map(|image| &image.places);
    let kept = places.filter(|place| to_replace.at(place).is_some() && !replaced.contains(&place.path));
    Error::HalfReplaced {
        source: Box::new(error),
        kept: kept.map(|place| place.path.clone()).collect(),
        replaced,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::path::Path;

    use super::super::folder::Root;
    use super::*;

    /// The names in a folder, each with the content of its file.
    fn all(folder: &Path) -> Vec<(OsString, String)> {
        let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap());
        let mut all: Vec<_> = entries
            .map(|entry| (entry.file_name(), std::fs::read_to_string(entry.path()).unwrap()))
            .collect();
        all.sort();
        all
    }

    struct Scene {
        folder: tempfile::TempDir,
        root: Root,
        temporaries: TemporaryNames,
    }

    impl Scene {
        fn new(old: &[&str]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            for name in old {
                std::fs::write(folder.path().join(name), format!("old {name}")).unwrap();
            }
            Self {
                root: Root::lock(folder.path()).unwrap(),
                folder,
                temporaries: TemporaryNames::random().unwrap(),
            }
        }

        fn place(&self, name: &str) -> Place {
            self.root.place(Path::new(name), false, |_| {}).unwrap().unwrap()
        }

        fn image(&self, names: &[&str], stays_open: bool) -> NewImage {
            let places: Vec<Place> = names.iter().map(|name| self.place(name)).collect();
            let fill = |mut file: &File| {
                file.write_all(names[0].as_bytes())
                    .map_err(Error::io("write", &places[0].path))
            };
            let (new, state) = UnnamedFile::make(&places[0], &self.temporaries, stays_open, fill).unwrap();
            assert_eq!(state.size, names[0].len() as u64);
            NewImage { new, places }
        }

        fn all(&self) -> Vec<(OsString, String)> {
            all(self.folder.path())
        }
    }

    #[test]
    fn files_get_all_of_their_names_and_nothing_else_stays() {
        for stays_open in [true, false] {
            let scene = Scene::new(&["a", "c"]);
            let images = [
                scene.image(&["a", "b", "c"], stays_open),
                scene.image(&["d", "e"], stays_open),
            ];
            let to_replace = ReplacedFiles::lease(images.iter().flat_map(|image| &image.places)).unwrap();
            let mut placed = Vec::new();
            give_names(&images, &to_replace, &scene.temporaries, |at| {
                placed.push(at);
                Ok(())
            })
            .unwrap();
            drop(images);
            let expected = [("a", "a"), ("b", "a"), ("c", "a"), ("d", "d"), ("e", "d")];
            let expected = expected.map(|(name, content)| (name.into(), content.to_owned()));
            assert_eq!((scene.all(), placed), (expected.to_vec(), vec![0, 1]));
        }
    }

    #[test]
    fn what_fails_in_the_middle_changes_nothing() {
        for stays_open in [true, false] {
            let scene = Scene::new(&["a", "c", "taken"]);
            let before = scene.all();
            let images = || {
                [
                    scene.image(&["a", "b"], stays_open),
                    scene.image(&["c", "taken"], stays_open),
                ]
            };
            let new_images = images();
            let leased = |images: &[NewImage; 2]| {
                let places: Vec<Place> = images.iter().map(|image| image.places[0].clone()).collect();
                ReplacedFiles::lease(places.iter()).unwrap()
            };
            // The name `taken` is not to be replaced.
            let to_replace = leased(&new_images);
            let failed = give_names(&new_images, &to_replace, &scene.temporaries, |_| Ok(()));
            assert!(matches!(failed, Err(Error::Exists { .. })), "{failed:?}");
            drop((new_images, to_replace));
            assert_eq!(scene.all(), before);
            // A process that opens a file which is replaced gets the file that had the name when it asked.
            let new_images = images();
            let to_replace = leased(&new_images);
            let path = scene.folder.path().join("c");
            let mut opener = None;
            let failed = give_names(&new_images, &to_replace, &scene.temporaries, |_| {
                let path = path.clone();
                opener = Some(std::thread::spawn(move || std::fs::read_to_string(path).unwrap()));
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
                while to_replace.check_all().is_ok() {
                    assert!(std::time::Instant::now() < deadline);
                    std::thread::yield_now();
                }
                Ok(())
            });
            assert!(matches!(failed, Err(Error::InUse { .. })), "{failed:?}");
            drop((new_images, to_replace));
            assert_eq!(opener.unwrap().join().unwrap(), "old c");
            assert_eq!(scene.all(), before);
        }
    }

    #[test]
    fn what_cannot_be_undone_is_said() {
        let scene = Scene::new(&["a", "b", "c"]);
        let images = ["a", "b", "c"].map(|name| scene.image(&[name], true));
        let to_replace = ReplacedFiles::lease(images.iter().flat_map(|image| &image.places)).unwrap();
        let failed = give_names(&images, &to_replace, &scene.temporaries, |at| {
            if at == 1 {
                // Someone moves another file to a name that was given already.
                std::fs::write(scene.folder.path().join("other"), "other").unwrap();
                std::fs::rename(scene.folder.path().join("other"), scene.folder.path().join("a")).unwrap();
                return Err(Error::Interrupted);
            }
            Ok(())
        });
        // Reading a leased file would wait until the lease ends.
        drop(to_replace);
        let Err(Error::HalfReplaced { source, replaced, kept }) = failed else {
            panic!("{failed:?}");
        };
        assert!(matches!(*source, Error::Interrupted));
        let paths = |names: &[&str]| {
            names
                .iter()
                .map(|name| scene.folder.path().join(name))
                .collect::<Vec<_>>()
        };
        assert_eq!((replaced, kept), (paths(&["a"]), paths(&["b", "c"])));
        let now = scene.all();
        assert!(now.contains(&("b".into(), "old b".into())) && now.contains(&("c".into(), "old c".into())));
        // The old file is not lost: it has a temporary name.
        assert!(
            now.iter()
                .any(|(name, content)| TemporaryNames::number_of(name).is_some() && content == "old a")
        );
    }

    #[test]
    fn temporary_names_are_known_and_say_nothing() {
        let temporaries = TemporaryNames::random().unwrap();
        let (one, two) = (temporaries.next(), temporaries.next());
        assert_eq!(TemporaryNames::number_of(&one), Some(temporaries.first()));
        assert_eq!(
            TemporaryNames::number_of(&two),
            Some(temporaries.first().wrapping_add(1))
        );
        for other in [
            ".vmfold-1~",
            ".vmfold-+123456789abcdef~",
            ".vmfold-0123456789ABCDEF~",
            "a.img",
        ] {
            assert_eq!(TemporaryNames::number_of(other.as_ref()), None, "{other}");
        }
    }
}
