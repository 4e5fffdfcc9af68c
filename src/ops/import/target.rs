//! Where images go, and putting them there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::{Open, Options, Restore, SetOf, add, apply};
use crate::archive::manifest::Manifest;
use crate::error::{Error, Result};
use crate::exec::restore::folder::{Place, Root};
use crate::exec::restore::place::{Counts, fill, without_checksums};
use crate::exec::restore::staging::Staging;
use crate::fs::attributes;
use crate::monitor::Monitor;
use crate::pool::{Revision, revision_of};
use crate::shown::shown;

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
        let mut name = first.file_name().unwrap_or_default().to_owned();
        name.push(".vmfold-partial");
        first.with_file_name(name)
    }
}

/// The names that chosen images get. None of them exists, unless it may be replaced.
pub(super) fn targets(manifest: &Manifest, chosen: &[usize], root: &Root, options: &Options) -> Result<Vec<Target>> {
    let mut targets: Vec<Target> = chosen
        .iter()
        .map(|image| Target {
            image: *image,
            names: manifest.images[*image].image.names.clone(),
        })
        .collect();
    if options.as_revision {
        name_as_revisions(manifest, &mut targets, root)?;
    }
    Ok(targets)
}

/// Gives images the names of revisions of Qubes OS: the next free number, and the time the image was last written.
/// The driver sorts by number and refuses names of any other form (qubes-core-admin, `qubes/storage/reflink.py`).
fn name_as_revisions(manifest: &Manifest, targets: &mut [Target], root: &Root) -> Result<()> {
    let mut next: BTreeMap<PathBuf, u64> = BTreeMap::new();
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
        let number = match next.get(&of) {
            Some(number) => *number,
            None => 1 + greatest_number(root, &of)?,
        };
        let mut name = of.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{number}@{time}"));
        targets[at].names = vec![of.with_file_name(name)];
        next.insert(of, number + 1);
    }
    Ok(())
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

/// Refuses to go on if a name is taken that may not be replaced. What an interrupted restore has put in place already, does not count.
pub(super) fn check_names(restore: &Restore<'_>, was_placing: bool) -> Result<()> {
    let mut taken = Vec::new();
    for target in &restore.targets {
        for name in &target.names {
            let Some(place) = restore.root.place(name, false, |_| {})? else {
                continue;
            };
            if place.is_folder() {
                return Err(Error::FolderInTheWay { path: place.path });
            }
            if restore.options.replace {
                place.refuse_if_in_use()?;
            } else if place.exists() && !(was_placing && is_done(restore, target, &place)) {
                taken.push(place.path);
            }
        }
    }
    if taken.is_empty() {
        Ok(())
    } else {
        Err(Error::Exists { paths: taken })
    }
}

/// Whether what stands there is what a restore that was interrupted has put there.
fn is_done(restore: &Restore<'_>, target: &Target, place: &Place) -> bool {
    let image = &restore.manifest.images[target.image].image;
    place.size_and_mtime() == Some((image.size, image.metadata.mtime))
}

/// An image that is made and has not got its name yet.
struct Made<'a> {
    target: &'a Target,
    temporary: Place,
    places: Vec<Place>,
}

/// Makes all images beside their places, makes them durable, and gives them their names. Damaged ones get another name; ones of
/// which nothing can be trusted are left out.
pub(super) fn place(
    restore: &Restore<'_>,
    work: &mut Open,
    damaged: &BTreeSet<usize>,
    left_out: &BTreeSet<usize>,
    lost: &SetOf,
    monitor: &dyn Monitor,
) -> Result<Counts> {
    let was_placing = work.resumes && work.staging.was_placing;
    check_names(restore, was_placing)?;
    let total = restore
        .chosen()
        .flat_map(|image| &image.runs)
        .map(|run| match run.content {
            crate::archive::manifest::Content::Stored(_) => crate::block::bytes(run.blocks),
            _ => 0,
        });
    monitor.phase("Making images", total.sum());
    let mut made_folders = BTreeSet::new();
    let mut jobs = Vec::new();
    for target in restore
        .targets
        .iter()
        .filter(|target| !left_out.contains(&target.image))
    {
        let names = if damaged.contains(&target.image) {
            vec![target.partial_name()]
        } else {
            target.names.clone()
        };
        let mut places = Vec::new();
        for name in names {
            let place = restore.root.place(&name, true, |path| {
                made_folders.insert(path.to_owned());
            })?;
            places.extend(place);
        }
        let Some(first) = places.first() else { continue };
        if was_placing && places.iter().all(|place| is_done(restore, target, place)) {
            continue;
        }
        let temporary = first.temporary("import")?;
        temporary.remove()?;
        jobs.push(Made {
            target,
            temporary,
            places,
        });
    }
    let staging = &work.staging;
    let without_checksums = staged_without_checksums(restore, staging, monitor)?;
    let made: Vec<Result<Counts>> = jobs
        .par_iter()
        .map(|job| {
            let image = &restore.manifest.images[job.target.image];
            let file = job.temporary.create()?;
            if let Some(problem) = attributes::prepare(&file, &image.image.metadata) {
                monitor.note(&format!("`{}`: could not set {problem}", shown(&job.temporary.path)));
            }
            let apart = without_checksums.as_ref();
            let apart = apart.filter(|_| attributes::is_nodatacow(&image.image.metadata));
            let counts = fill(
                (apart.unwrap_or(staging.file()), staging.path()),
                (&file, &job.temporary.path),
                (&image.runs, image.image.size),
                |block| lost.contains(block),
                restore.shares,
                monitor,
            )?;
            apply(
                &file,
                &job.temporary.path,
                &image.image.metadata,
                restore.options,
                monitor,
            )?;
            Ok(counts)
        })
        .collect();
    let mut counts = Counts::default();
    let mut failed = None;
    for one in made {
        match one {
            Ok(more) => counts = add(counts, more),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    if let Some(error) = failed {
        for job in &jobs {
            // The first error is what counts; what is left behind is removed by the next attempt.
            let _ = job.temporary.remove();
        }
        return Err(error);
    }
    monitor.phase("Making everything durable", 0);
    rustix::fs::syncfs(restore.root.file()).map_err(Error::io("sync the filesystem of", restore.root.path()))?;
    work.staging.note_placing()?;
    let replace = restore.options.replace || was_placing;
    for job in &jobs {
        put(job, replace)?;
    }
    set_folders(restore, &made_folders, monitor)?;
    for job in &jobs {
        for place in &job.places {
            place.sync_folder()?;
        }
    }
    Ok(counts)
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

/// Gives an image its names.
fn put(job: &Made<'_>, replace: bool) -> Result<()> {
    let Some((first, links)) = job.places.split_first() else {
        return Ok(());
    };
    if replace {
        // Its machine may have been started since the restore began.
        first.refuse_if_in_use()?;
    }
    job.temporary.rename(first, replace)?;
    for link in links {
        if replace && link.exists() {
            let temporary = link.temporary("link")?;
            temporary.remove()?;
            temporary.link_to(first)?;
            temporary.rename(link, true)?;
            // Of two names of one inode, renaming one over the other keeps both.
            temporary.remove()?;
        } else {
            link.link_to(first)?;
        }
    }
    Ok(())
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
