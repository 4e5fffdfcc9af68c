//! Where images go, and putting them there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use rustix::fs::FileType;

use super::{Open, Options, Restore, add, apply};
use crate::archive::manifest::Manifest;
use crate::content::StoreBlock;
use crate::error::{Error, Result};
use crate::exec::restore::folder::{Place, Root, State};
use crate::exec::restore::names::{Image, New, Temporaries, give_names};
use crate::exec::restore::place::{Counts, fill, without_checksums};
use crate::exec::restore::staging::{Noted, Staging};
use crate::exec::restore::standing::Standing;
use crate::fs::attributes;
use crate::monitor::Monitor;
use crate::pool::{Revision, revision_of, signs_of};
use crate::shown::shown;
use crate::sys::open_files::raise_file_limit;

/// What the names of images end with that are restored in part.
const PARTIAL: &str = ".vmfold-partial";
/// Bytes of a name at most (`NAME_MAX`).
const NAME_BYTES_MAX: usize = 255;
/// Hexadecimal digits that tell long names from each other.
const HASH_DIGITS: usize = 16;

/// An image and the names it gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its place in the manifest.
    pub image: usize,
    /// Its names, relative; the first is made, the others are links to it.
    pub names: Vec<PathBuf>,
}

impl Target {
    /// The name that what is left of it gets, if it is damaged.
    pub(super) fn partial_name(&self) -> PathBuf {
        let first = self.names.first().map_or(Path::new("image"), PathBuf::as_path);
        let name = first.file_name().unwrap_or_default().as_bytes();
        let mut partial = name.to_vec();
        if name.len() + PARTIAL.len() > NAME_BYTES_MAX {
            // Others may begin in the same way.
            let hash = blake3::hash(name).to_hex();
            partial.truncate(NAME_BYTES_MAX - PARTIAL.len() - HASH_DIGITS - 1);
            partial.push(b'.');
            partial.extend_from_slice(&hash.as_bytes()[..HASH_DIGITS]);
        }
        partial.extend_from_slice(PARTIAL.as_bytes());
        first.with_file_name(OsStr::from_bytes(&partial))
    }
}

/// The names that chosen images get. None of them exists, unless it may be replaced.
///
/// What an interrupted restore has `noted` tells the names that revisions got then.
pub(super) fn targets(
    manifest: &Manifest,
    chosen: &[usize],
    root: &Root,
    options: &Options,
    noted: Option<&Noted>,
) -> Result<Vec<Target>> {
    let mut targets: Vec<Target> = chosen
        .iter()
        .map(|image| Target {
            image: *image,
            names: manifest.images[*image].image.names.clone(),
        })
        .collect();
    if options.as_revision {
        name_as_revisions(manifest, &mut targets, root, noted)?;
    }
    Ok(targets)
}

/// Gives images the names of revisions of Qubes OS: the next free number, and the time the image was last written.
/// The driver sorts by number and refuses names of any other form (qubes-core-admin, `qubes/storage/reflink.py`).
fn name_as_revisions(manifest: &Manifest, targets: &mut [Target], root: &Root, noted: Option<&Noted>) -> Result<()> {
    // The greatest number of each that is taken.
    let mut taken: BTreeMap<PathBuf, u64> = BTreeMap::new();
    let mut order: Vec<(PathBuf, Option<u64>, String, usize)> = Vec::new();
    for (at, target) in targets.iter().enumerate() {
        let image = &manifest.images[target.image].image;
        let (of, number, time) = match revision_of(image.path()) {
            Some(Revision { image, number, time }) => (image, number, time),
            None => (image.path().to_owned(), None, time_of(image.metadata.mtime.0)),
        };
        if of.extension().is_none_or(|extension| extension != "img") {
            return Err(Error::Usage(format!(
                "--as-revision names revisions of .img files, and `{}` is none",
                shown(image.path())
            )));
        }
        order.push((of, number, time, at));
    }
    order.sort();
    for (of, _, time, at) in order {
        if let Some(noted) = noted
            && let Some(name) = name_given(root, &of, targets[at].image, noted)?
        {
            targets[at].names = vec![name];
            continue;
        }
        let greatest = match taken.get(&of) {
            Some(number) => *number,
            None => greatest_number(root, &of)?,
        };
        let number = greatest.checked_add(1).ok_or_else(|| {
            Error::Usage(format!(
                "`{}` has a revision of the number {greatest}, and there is no greater one for another",
                shown(&of)
            ))
        })?;
        let mut name = of.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{number}@{time}"));
        targets[at].names = vec![of.with_file_name(name)];
        taken.insert(of, number);
    }
    Ok(())
}

/// The revision of an image that an interrupted restore made of an image of the manifest already.
fn name_given(root: &Root, of: &Path, image: usize, noted: &Noted) -> Result<Option<PathBuf>> {
    let Some(place) = root.place(of, false, |_| {})? else {
        return Ok(None);
    };
    let wanted = of.file_name().map(Path::new);
    let is_it = |name: &std::ffi::OsString| {
        let revision = revision_of(Path::new(name));
        let state = || place.beside(name.clone()).state();
        revision.is_some_and(|revision| Some(revision.image.as_path()) == wanted)
            && state().is_some_and(|state| noted.is_ours(None, image, &state))
    };
    Ok(place
        .siblings()?
        .into_iter()
        .find(is_it)
        .map(|name| of.with_file_name(name)))
}

/// The greatest number of a revision of an image that exists; 0 if there is none.
fn greatest_number(root: &Root, image: &Path) -> Result<u64> {
    let Some(place) = root.place(image, false, |_| {})? else {
        return Ok(0);
    };
    let wanted = image.file_name().map(Path::new);
    let numbers = place.siblings()?.into_iter().filter_map(|name| {
        let revision = revision_of(Path::new(&name))?;
        revision.number.filter(|_| Some(revision.image.as_path()) == wanted)
    });
    Ok(numbers.max().unwrap_or(0))
}

fn time_of(seconds: i64) -> String {
    let time = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// Refuses to go on if a name is taken that may not be replaced, or if a machine runs from what is restored. What an interrupted restore
/// has put in place already does not count.
pub(super) fn check_names(restore: &Restore<'_>, noted: Option<&Noted>) -> Result<()> {
    let mut taken = Vec::new();
    for target in &restore.targets {
        for name in &target.names {
            let Some(place) = restore.root.place(name, false, |_| {})? else {
                continue;
            };
            let Some(stat) = place.stat()? else { continue };
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                return Err(Error::FolderInTheWay { path: place.path });
            }
            if !may_replace(restore, noted, target, &place) {
                taken.push(place.path);
            }
        }
    }
    if !taken.is_empty() {
        return Err(Error::Exists { paths: taken });
    }
    check_signs(restore)
}

/// Refuses to restore what a machine runs from, or would take for its own after a crash: the driver of Qubes OS renames what it finds in a
/// `-dirty.img` over the image, even where there is none yet.
fn check_signs(restore: &Restore<'_>) -> Result<()> {
    if restore.options.as_revision {
        return Ok(());
    }
    let names = || restore.targets.iter().flat_map(|target| &target.names);
    let paths: BTreeSet<PathBuf> = names().map(|name| restore.root.path().join(name)).collect();
    for (path, sign) in signs_of(&paths) {
        // What is restored as a whole replaces the sign as well, unless someone may have written to it already.
        if !paths.contains(&sign) || path.symlink_metadata().is_ok() {
            return Err(Error::InUse {
                path: path.clone(),
                by: shown(&sign).to_string(),
            });
        }
    }
    Ok(())
}

/// Refuses to go on if someone uses what is to be replaced.
pub(super) fn check_use(restore: &Restore<'_>, noted: Option<&Noted>) -> Result<()> {
    raise_file_limit();
    let mut places = Vec::new();
    for target in &restore.targets {
        for name in &target.names {
            let place = restore.root.place(name, false, |_| {})?;
            places.extend(place.filter(|place| may_replace(restore, noted, target, place)));
        }
    }
    Standing::lease(places.iter()).map(drop)
}

/// Whether what stands at a place, if anything does, may be replaced: by the user's wish, or because a restore that was interrupted has put
/// it there.
fn may_replace(restore: &Restore<'_>, noted: Option<&Noted>, target: &Target, place: &Place) -> bool {
    let is_ours = |noted: &Noted| {
        let found = place.state();
        found.is_some_and(|found| noted.is_ours(restore.identity.as_deref(), target.image, &found))
    };
    restore.options.replace || noted.is_some_and(is_ours)
}

/// An image that is to be made.
struct Job<'a> {
    target: &'a Target,
    places: Vec<Place>,
}

/// Makes all images without names, makes them durable, and gives them their names, all or none. Damaged ones get another name; ones of
/// which nothing can be trusted are left out. What was a seed must be closed.
pub(super) fn place(
    restore: &Restore<'_>,
    work: &mut Open,
    damaged: &BTreeSet<usize>,
    left_out: &BTreeSet<usize>,
    lost: &[Range<StoreBlock>],
    monitor: &dyn Monitor,
) -> Result<Counts> {
    let noted = work.staging.noted().clone();
    let identity = restore.identity.as_deref().unwrap_or_default();
    check_names(restore, Some(&noted))?;
    check_use(restore, Some(&noted))?;
    let total = restore
        .chosen()
        .flat_map(|image| &image.runs)
        .map(|run| match run.content {
            crate::content::Content::Stored(_) => crate::block::bytes(run.blocks),
            _ => 0,
        });
    monitor.phase("Making images", total.sum());
    let mut made_folders = BTreeSet::new();
    let targets = restore
        .targets
        .iter()
        .filter(|target| !left_out.contains(&target.image));
    let (mut jobs, folders) = jobs(restore, targets, damaged, &mut made_folders)?;
    let is_done = |job: &Job<'_>| {
        let is_done = |place: &Place| {
            place
                .state()
                .is_some_and(|found| noted.is_done(identity, job.target.image, &found))
        };
        job.places.iter().all(is_done)
    };
    remove_leftovers(&jobs, &noted)?;
    jobs.retain(|job| !is_done(job));
    let names: usize = jobs.iter().map(|job| job.places.len()).sum();
    let temporaries = Temporaries::random()?;
    work.staging
        .note_temporaries(temporaries.first(), (jobs.len() + names) as u64)?;
    // Whatever stands at a name is leased, and so open, too.
    let others = (folders + names + OTHER_OPEN_FILES) as u64;
    let may_be_open = raise_file_limit().map_or(u64::MAX, |limit| limit.saturating_sub(others));
    let staging = &work.staging;
    let apart = staged_without_checksums(restore, staging, monitor)?;
    let make = |at: usize, job: &Job<'_>| {
        make(restore, job, &temporaries, (at as u64) < may_be_open, |file, path| {
            let image = &restore.manifest.images[job.target.image];
            if let Some(problem) = attributes::prepare(file, &image.image.metadata) {
                monitor.note(&format!("`{}`: could not set {problem}", shown(path)));
            }
            let apart = apart.as_ref();
            let apart = apart.filter(|_| attributes::is_nodatacow(&image.image.metadata));
            let counts = fill(
                (apart.unwrap_or(staging.file()), staging.path()),
                (file, path),
                (&image.runs, image.image.size),
                lost,
                restore.shares,
                monitor,
            )?;
            apply(file, path, &image.image.metadata, restore.options, monitor)?;
            Ok(counts)
        })
    };
    let made: Vec<Result<(New, State, Counts)>> = jobs.par_iter().enumerate().map(|(at, job)| make(at, job)).collect();
    let (mut counts, mut images, mut states, mut targets) = (Counts::default(), Vec::new(), Vec::new(), Vec::new());
    for (one, job) in made.into_iter().zip(jobs) {
        let (new, state, more) = one?;
        counts = add(counts, more);
        states.push((job.target.image, state));
        targets.push(job.target);
        images.push(Image {
            new,
            places: job.places,
        });
    }
    monitor.phase("Making everything durable", 0);
    sync_filesystems(&images, &states)?;
    work.staging.note_restore(identity)?;
    work.staging.note_made(states.iter().copied())?;
    let may_be_replaced = images.iter().zip(&targets).flat_map(|(image, target)| {
        let places = image.places.iter();
        places.filter(|place| may_replace(restore, Some(&noted), target, place))
    });
    let standing = Standing::lease(may_be_replaced)?;
    // Its machine may have been started since the restore began.
    check_signs(restore)?;
    give_names(&images, &standing, &temporaries, |at| {
        let state = images[at].places.first().and_then(Place::state);
        match state {
            Some(state) => work.staging.note_placed(targets[at].image, &state),
            None => Ok(()),
        }
    })?;
    drop(standing);
    set_folders(restore, &made_folders, monitor)?;
    for image in &images {
        for place in &image.places {
            place.sync_folder()?;
        }
    }
    Ok(counts)
}

/// Files that are open beside those that images and their names take.
const OTHER_OPEN_FILES: usize = 256;

/// What is to be made, and where, with the number of folders that are open for it.
fn jobs<'a>(
    restore: &Restore<'_>,
    targets: impl Iterator<Item = &'a Target>,
    damaged: &BTreeSet<usize>,
    made_folders: &mut BTreeSet<PathBuf>,
) -> Result<(Vec<Job<'a>>, usize)> {
    let mut folders: BTreeMap<PathBuf, Arc<OwnedFd>> = BTreeMap::new();
    let mut jobs = Vec::new();
    for target in targets {
        let names = if damaged.contains(&target.image) {
            vec![target.partial_name()]
        } else {
            target.names.clone()
        };
        let mut places = Vec::new();
        for name in names {
            let parent = name.parent().unwrap_or(Path::new(""));
            let folder = if let Some(folder) = folders.get(parent) {
                Arc::clone(folder)
            } else {
                let made = restore.root.folder(parent, true, |path| {
                    made_folders.insert(path.to_owned());
                })?;
                let Some(folder) = made.map(Arc::new) else { continue };
                folders.insert(parent.to_owned(), Arc::clone(&folder));
                folder
            };
            places.push(restore.root.place_in(folder, &name));
        }
        jobs.push(Job { target, places });
    }
    Ok((jobs, folders.len()))
}

/// Makes one image.
fn make(
    restore: &Restore<'_>,
    job: &Job<'_>,
    temporaries: &Temporaries,
    stays_open: bool,
    fill: impl FnOnce(&File, &Path) -> Result<Counts>,
) -> Result<(New, State, Counts)> {
    let Some(first) = job.places.first() else {
        return Err(Error::io("make a file in", restore.root.path())(
            rustix::io::Errno::NOENT,
        ));
    };
    let mut counts = Counts::default();
    let (new, state) = New::make(first, temporaries, stays_open, |file| {
        counts = fill(file, &first.path)?;
        Ok(())
    })?;
    Ok((new, state, counts))
}

/// Removes what interrupted restores of this commit have left under temporary names.
fn remove_leftovers(jobs: &[Job<'_>], noted: &Noted) -> Result<()> {
    let mut seen = BTreeSet::new();
    for place in jobs.iter().flat_map(|job| &job.places) {
        if !seen.insert(place.path.parent()) {
            continue;
        }
        for name in place.siblings()? {
            if Temporaries::number_of(&name).is_some_and(|number| noted.is_temporary(number)) {
                place.beside(name).remove()?;
            }
        }
    }
    Ok(())
}

/// Makes durable all filesystems that new images are on: others may be mounted below the folder.
fn sync_filesystems(images: &[Image], states: &[(usize, State)]) -> Result<()> {
    let mut synced = BTreeSet::new();
    for (image, (_, state)) in images.iter().zip(states) {
        let Some(place) = image.places.first().filter(|_| synced.insert(state.id.0)) else {
            continue;
        };
        rustix::fs::syncfs(&**place.folder()).map_err(Error::io("sync the filesystem of", &place.path))?;
    }
    Ok(())
}

/// What images without copy on write refer to, staged once more for them to share.
fn staged_without_checksums(restore: &Restore<'_>, staging: &Staging, monitor: &dyn Monitor) -> Result<Option<File>> {
    let blocks = restore.nodatacow_blocks();
    let staged: Vec<_> = blocks.into_iter().flat_map(|range| staging.present(range)).collect();
    if staged.is_empty() || !restore.shares {
        return Ok(None);
    }
    without_checksums((staging.file(), staging.path()), restore.root.file(), staged, monitor)
}

/// Sets modes, owners and times of folders that were made, the innermost first.
fn set_folders(restore: &Restore<'_>, made: &BTreeSet<PathBuf>, monitor: &dyn Monitor) -> Result<()> {
    let mut folders: Vec<_> = restore
        .manifest
        .folders
        .iter()
        .filter(|folder| made.contains(&folder.path))
        .collect();
    folders.sort_by_key(|folder| std::cmp::Reverse(folder.path.components().count()));
    for folder in folders {
        if let Some(fd) = restore.root.folder(&folder.path, false, |_| {})? {
            let path = restore.root.path().join(&folder.path);
            let folder_file = File::from(fd);
            // What is made there later gets it from the folder.
            if let Some(problem) = attributes::prepare(&folder_file, &folder.metadata) {
                monitor.note(&format!("`{}`: could not set {problem}", shown(&path)));
            }
            apply(&folder_file, &path, &folder.metadata, restore.options, monitor)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_the_driver_writes_them() {
        assert_eq!(time_of(1_767_323_045), "2026-01-02T03:04:05Z");
        assert_eq!(time_of(i64::MAX), "1970-01-01T00:00:00Z");
    }
}
