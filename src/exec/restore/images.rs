//! Makes the images of a plan from the staging file, makes them durable, and gives them their names.

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::io::Errno;

use super::RestoreOptions;
use super::destination::{self, Interrupted};
use super::fill::{FillCounts, fill, without_checksums};
use super::folder::{FileState, Place, Places, Root};
use super::names::{NewImage, TemporaryNames, UnnamedFile, give_names};
use super::replaced::ReplacedFiles;
use super::staging::{FileOfImage, Journal, Staging};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::fs::attributes;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::restore::{RestorePlan, RestoredImage, partial_names};
use crate::shown::shown;
use crate::sys::open_files::raise_file_limit;

/// Descriptors that are kept free for other files than images, replaced files and folders.
const OTHER_OPEN_FILES: usize = 256;

/// A plan with its options and the folder that it is carried out in.
#[derive(Clone, Copy)]
pub(super) struct RestoreSite<'a> {
    pub(super) plan: &'a RestorePlan,
    pub(super) options: &'a RestoreOptions,
    pub(super) root: &'a Root,
    pub(super) monitor: &'a dyn Monitor,
}

/// What cannot be restored. Images are given by their places in the manifest.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Images that are not restored as a whole.
    pub(super) damaged: BTreeSet<usize>,
    /// Those of them of which nothing can be trusted.
    pub(super) left_out: BTreeSet<usize>,
    /// Ranges of the store that are lost, ascending and disjoint.
    pub(super) blocks: Vec<Range<StoreBlock>>,
}

/// An image that is to be made.
struct ImageJob<'a> {
    restored: &'a RestoredImage,
    /// The names that it gets.
    places: Vec<Place>,
}

/// The images that are to be made, and their folders.
struct ImageJobs<'a> {
    images: Vec<ImageJob<'a>>,
    /// The number of folders that are open.
    open_folders: usize,
    /// The relative paths of folders that were made.
    made_folders: BTreeSet<PathBuf>,
}

/// An image that was made and has no name yet.
struct MadeImage<'a> {
    restored: &'a RestoredImage,
    /// The state of its file.
    state: FileState,
}

/// Makes all images without names, makes them durable, and gives all of them their names, or none. Damaged images get other names, and those
/// of which nothing can be trusted are left out. No seed may be open.
///
/// # Errors
/// Those of the plan's checks of names and use, which are made once more; those of [`give_names`]; [`Error::NoSpace`] or [`Error::Io`] if the
/// folder cannot be written; [`Error::Interrupted`].
pub(super) fn make_images(site: RestoreSite<'_>, staging: &mut Staging, losses: &Losses) -> Result<FillCounts> {
    let RestoreSite {
        plan,
        options,
        root,
        monitor,
    } = site;
    let journal = staging.journal_at_start().clone();
    let identity = plan.identity(options.as_revision).unwrap_or_default();
    let interrupted = Interrupted {
        journal: Some(&journal),
        identity: Some(&identity),
    };
    let destination = destination::look(root, &plan.images, interrupted)?;
    destination.check_names(options.replace, options.as_revision)?;
    destination::check_use(root, &plan.images, &destination, options.replace)?;
    monitor.phase("Making images", plan.bytes.data_bytes);
    let mut jobs = image_jobs(site, losses)?;
    remove_leftovers(&jobs.images, &journal)?;
    jobs.images.retain(|job| {
        let is_done = |state: FileState| journal.is_done(&identity, job.restored.image, &state);
        !job.places.iter().all(|place| place.state().is_some_and(is_done))
    });
    let names_count: usize = jobs.images.iter().map(|job| job.places.len()).sum();
    let temporaries = TemporaryNames::random()?;
    staging.note_temporaries(temporaries.first(), (jobs.images.len() + names_count) as u64)?;
    // A file that is replaced is leased, and so it is open as well.
    let other_files = (jobs.open_folders + names_count + OTHER_OPEN_FILES) as u64;
    let open_max = raise_file_limit().map_or(u64::MAX, |limit| limit.saturating_sub(other_files));
    let (images, made, counts) = make_all(site, staging, jobs.images, &temporaries, open_max, losses)?;
    monitor.phase("Making everything durable", 0);
    sync_filesystems(&images, &made)?;
    staging.note_restore(&identity)?;
    staging.note_made(made.iter().map(|made| FileOfImage {
        image: made.restored.image,
        state: made.state,
    }))?;
    let may_be_replaced = images.iter().zip(&made).flat_map(|(image, made)| {
        let places = image.places.iter();
        places.filter(|place| options.replace || interrupted.is_ours(made.restored.image, place))
    });
    let to_replace = ReplacedFiles::lease(may_be_replaced)?;
    // A machine may have been started since the restore began.
    destination::check_signs(root, &plan.images, options.as_revision)?;
    give_names(&images, &to_replace, &temporaries, |number| {
        match images[number].places.first().and_then(Place::state) {
            Some(state) => staging.note_placed(made[number].restored.image, &state),
            None => Ok(()),
        }
    })?;
    drop(to_replace);
    set_folders(site, &jobs.made_folders)?;
    let mut places = images.iter().flat_map(|image| &image.places);
    places.try_for_each(Place::sync_folder)?;
    Ok(counts)
}

/// The images that are to be made, with their names. It makes the folders that do not exist.
fn image_jobs<'a>(site: RestoreSite<'a>, losses: &Losses) -> Result<ImageJobs<'a>> {
    let mut folders = Places::default();
    let (mut jobs, mut made_folders) = (Vec::new(), BTreeSet::new());
    let partial = partial_names(&site.plan.images, &losses.damaged);
    let images = site.plan.images.iter();
    for restored in images.filter(|image| !losses.left_out.contains(&image.image)) {
        let names = match partial.get(&restored.image) {
            Some(name) => vec![name.clone()],
            None => restored.names.clone(),
        };
        let mut places = Vec::new();
        for name in names {
            let place = folders.place(site.root, &name, true, |path| {
                made_folders.insert(path.to_owned());
            })?;
            places.extend(place);
        }
        jobs.push(ImageJob { restored, places });
    }
    Ok(ImageJobs {
        images: jobs,
        open_folders: folders.open_folders(),
        made_folders,
    })
}

/// Makes all images on all cores. The first `open_max` of them stay open, and need no temporary names.
fn make_all<'a>(
    site: RestoreSite<'_>,
    staging: &Staging,
    jobs: Vec<ImageJob<'a>>,
    temporaries: &TemporaryNames,
    open_max: u64,
    losses: &Losses,
) -> Result<(Vec<NewImage>, Vec<MadeImage<'a>>, FillCounts)> {
    let nodatacow = staged_without_checksums(site, staging)?;
    let make = |number: usize, job: &ImageJob<'_>| {
        let place = job.places.first().ok_or(Errno::NOENT);
        let place = place.map_err(Error::io("make a file in", site.root.path()))?;
        let mut counts = FillCounts::default();
        let stays_open = (number as u64) < open_max;
        let (new, state) = UnnamedFile::make(place, temporaries, stays_open, |file| {
            counts = fill_image(
                site,
                (staging, nodatacow.as_ref()),
                job.restored,
                (file, &place.path),
                losses,
            )?;
            Ok(())
        })?;
        Ok((new, state, counts))
    };
    let results: Vec<Result<(UnnamedFile, FileState, FillCounts)>> = jobs
        .par_iter()
        .enumerate()
        .map(|(number, job)| make(number, job))
        .collect();
    let (mut counts, mut images, mut made) = (FillCounts::default(), Vec::new(), Vec::new());
    for (result, ImageJob { restored, places }) in results.into_iter().zip(jobs) {
        let (new, state, image_counts) = result?;
        counts += image_counts;
        made.push(MadeImage { restored, state });
        images.push(NewImage { new, places });
    }
    Ok((images, made, counts))
}

/// Gives a new file the content and the attributes of an image.
fn fill_image(
    site: RestoreSite<'_>,
    (staging, nodatacow): (&Staging, Option<&File>),
    restored: &RestoredImage,
    (file, path): (&File, &Path),
    losses: &Losses,
) -> Result<FillCounts> {
    let image = site.plan.runs_of(restored);
    let metadata = &image.image.metadata;
    if let Some(problem) = attributes::prepare(file, metadata) {
        site.monitor
            .note(&format!("`{}`: could not set {problem}", shown(path)));
    }
    let staged = nodatacow.filter(|_| metadata.is_nodatacow());
    let counts = fill(
        (staged.unwrap_or(staging.file()), staging.path()),
        (file, path),
        (&image.runs, image.image.size),
        &losses.blocks,
        site.plan.bytes.shares,
        site.monitor,
    )?;
    apply(file, path, metadata, site)?;
    Ok(counts)
}

/// Removes files with temporary names that an interrupted restore of this commit has left.
fn remove_leftovers(jobs: &[ImageJob<'_>], journal: &Journal) -> Result<()> {
    let mut visited = BTreeSet::new();
    for place in jobs.iter().flat_map(|job| &job.places) {
        if !visited.insert(place.path.parent()) {
            continue;
        }
        for name in place.siblings()? {
            if TemporaryNames::number_of(&name).is_some_and(|number| journal.is_temporary(number)) {
                place.beside(name).remove()?;
            }
        }
    }
    Ok(())
}

/// Makes all filesystems durable that new images are on. There may be several, because others can be mounted below the folder.
fn sync_filesystems(images: &[NewImage], made: &[MadeImage<'_>]) -> Result<()> {
    let mut synced = BTreeSet::new();
    for (image, made) in images.iter().zip(made) {
        let Some(place) = image.places.first().filter(|_| synced.insert(made.state.id.device)) else {
            continue;
        };
        rustix::fs::syncfs(&**place.folder()).map_err(Error::io("sync the filesystem of", &place.path))?;
    }
    Ok(())
}

/// Copies the blocks that `nodatacow` images refer to, for these images to share. It returns `None` if there are no such blocks.
fn staged_without_checksums(site: RestoreSite<'_>, staging: &Staging) -> Result<Option<File>> {
    let blocks = site.plan.nodatacow_blocks();
    let staged: Vec<_> = blocks.into_iter().flat_map(|range| staging.present(range)).collect();
    if staged.is_empty() || !site.plan.bytes.shares {
        return Ok(None);
    }
    without_checksums((staging.file(), staging.path()), site.root.file(), staged, site.monitor)
}

/// Sets modes, owners and times of the folders that were made, the innermost ones first.
fn set_folders(site: RestoreSite<'_>, made: &BTreeSet<PathBuf>) -> Result<()> {
    let folders = site.plan.contents.manifest.folders.iter();
    let mut folders: Vec<_> = folders.filter(|folder| made.contains(&folder.path)).collect();
    folders.sort_by_key(|folder| std::cmp::Reverse(folder.path.components().count()));
    for folder in folders {
        let Some(fd) = site.root.folder(&folder.path, false, |_| {})? else {
            continue;
        };
        let (path, file) = (site.root.path().join(&folder.path), File::from(fd));
        // Files that are made in the folder later inherit these attributes.
        if let Some(problem) = attributes::prepare(&file, &folder.metadata) {
            site.monitor
                .note(&format!("`{}`: could not set {problem}", shown(&path)));
        }
        apply(&file, &path, &folder.metadata, site)?;
    }
    Ok(())
}

/// Sets the attributes of an image or a folder, and notes those that could not be set.
fn apply(file: &File, path: &Path, metadata: &Metadata, site: RestoreSite<'_>) -> Result<()> {
    let RestoreSite { options, monitor, .. } = site;
    let policy = attributes::AttributePolicy {
        numeric_owner: options.numeric_owner,
        preserve_special: options.preserve_special,
    };
    let not_restored = attributes::apply(file, path, metadata, policy)?;
    if !not_restored.problems.is_empty() {
        let problems = first_of(&not_restored.problems);
        monitor.note(&format!("`{}`: could not set {problems}", shown(path)));
    }
    if !not_restored.left_out.is_empty() {
        let left_out = first_of(&not_restored.left_out);
        monitor.note(&format!(
            "`{}`: left out {left_out}; --preserve-special restores it",
            shown(path)
        ));
    }
    Ok(())
}

/// The first items of a list, which a hostile archive can make very long, and the number of the others.
fn first_of(items: &[String]) -> String {
    const SHOWN_MAX: usize = 8;
    let rest = match items.len().saturating_sub(SHOWN_MAX) {
        0 => String::new(),
        count => format!(" and {count} more"),
    };
    items[..items.len().min(SHOWN_MAX)].join(", ") + &rest
}
