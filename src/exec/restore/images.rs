//! Makes the images of a plan from the staging file, and gives them their names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;
use rustix::io::Errno;

use super::RestoreOptions;
use super::destination::{self, Interrupted};
use super::fill::{FillCounts, fill, without_checksums};
use super::folder::{FileState, Place, Root};
use super::names::{NewImage, Temporaries, UnnamedFile, give_names};
use super::replaced::ReplacedFiles;
use super::staging::{FileOfImage, Journal, Staging};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::fs::attributes;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::restore::{RestorePlan, RestoredImage};
use crate::shown::shown;
use crate::sys::open_files::raise_file_limit;

/// Files that are open beside those that images and their names take.
const OTHER_OPEN_FILES: usize = 256;

/// What is made, and where.
#[derive(Clone, Copy)]
pub(super) struct RestoreSite<'a> {
    pub(super) plan: &'a RestorePlan,
    pub(super) options: &'a RestoreOptions,
    pub(super) root: &'a Root,
    pub(super) monitor: &'a dyn Monitor,
}

/// What cannot be restored.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Images, by their places in the manifest, that are restored in part.
    pub(super) damaged: BTreeSet<usize>,
    /// Images of which nothing can be trusted.
    pub(super) left_out: BTreeSet<usize>,
    /// Blocks of the store, a list.
    pub(super) blocks: Vec<Range<StoreBlock>>,
}

/// An image that is to be made.
struct ImageJob<'a> {
    restored: &'a RestoredImage,
    places: Vec<Place>,
}

/// What is to be made, and the folders for it.
struct ImageJobs<'a> {
    images: Vec<ImageJob<'a>>,
    /// Folders that are open for it.
    open_folders: usize,
    /// Folders that did not exist, relative.
    made_folders: BTreeSet<PathBuf>,
}

/// An image that was made and has no name yet.
struct MadeImage<'a> {
    restored: &'a RestoredImage,
    state: FileState,
}

/// Makes all images without names, makes them durable, and gives them their names, all or none. Damaged ones get another name; ones of
/// which nothing can be trusted are left out. What was a seed must be closed.
///
/// # Errors
/// Those of the checks, which are made once more, and of writing; [`Error::Interrupted`].
pub(super) fn make_images(site: RestoreSite<'_>, staging: &mut Staging, losses: &Losses) -> Result<FillCounts> {
    let RestoreSite {
        plan,
        options,
        root,
        monitor,
    } = site;
    let noted = staging.noted().clone();
    let identity = plan.identity(options.as_revision).unwrap_or_default();
    let interrupted = Interrupted {
        noted: Some(&noted),
        identity: Some(&identity),
    };
    let found = destination::look(root, &plan.images, interrupted)?;
    found.check_names(options.replace, options.as_revision)?;
    destination::check_use(root, &plan.images, &found, options.replace)?;
    monitor.phase("Making images", plan.bytes.data_bytes);
    let mut jobs = jobs(site, losses)?;
    remove_leftovers(&jobs.images, &noted)?;
    jobs.images.retain(|job| {
        let is_done = |found: FileState| noted.is_done(&identity, job.restored.image, &found);
        !job.places.iter().all(|place| place.state().is_some_and(is_done))
    });
    let names: usize = jobs.images.iter().map(|job| job.places.len()).sum();
    let temporaries = Temporaries::random()?;
    staging.note_temporaries(temporaries.first(), (jobs.images.len() + names) as u64)?;
    // Whatever stands at a name is leased, and so open, too.
    let others = (jobs.open_folders + names + OTHER_OPEN_FILES) as u64;
    let may_be_open = raise_file_limit().map_or(u64::MAX, |limit| limit.saturating_sub(others));
    let (images, made, counts) = make_all(site, staging, jobs.images, &temporaries, may_be_open, losses)?;
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
    // Its machine may have been started since the restore began.
    destination::check_signs(root, &plan.images, options.as_revision)?;
    give_names(&images, &to_replace, &temporaries, |at| {
        match images[at].places.first().and_then(Place::state) {
            Some(state) => staging.note_placed(made[at].restored.image, &state),
            None => Ok(()),
        }
    })?;
    drop(to_replace);
    set_folders(site, &jobs.made_folders)?;
    let mut places = images.iter().flat_map(|image| &image.places);
    places.try_for_each(Place::sync_folder)?;
    Ok(counts)
}

/// What is to be made, and where. Folders are made on the way.
fn jobs<'a>(site: RestoreSite<'a>, losses: &Losses) -> Result<ImageJobs<'a>> {
    let mut folders: BTreeMap<PathBuf, Arc<OwnedFd>> = BTreeMap::new();
    let (mut jobs, mut made_folders) = (Vec::new(), BTreeSet::new());
    let images = site.plan.images.iter();
    for restored in images.filter(|image| !losses.left_out.contains(&image.image)) {
        let names = if losses.damaged.contains(&restored.image) {
            vec![restored.partial_name()]
        } else {
            restored.names.clone()
        };
        let mut places = Vec::new();
        for name in names {
            let parent = name.parent().unwrap_or(Path::new(""));
            let folder = if let Some(folder) = folders.get(parent) {
                Arc::clone(folder)
            } else {
                let made = site.root.folder(parent, true, |path| {
                    made_folders.insert(path.to_owned());
                })?;
                let Some(folder) = made.map(Arc::new) else { continue };
                folders.insert(parent.to_owned(), Arc::clone(&folder));
                folder
            };
            places.push(site.root.place_in(folder, &name));
        }
        jobs.push(ImageJob { restored, places });
    }
    Ok(ImageJobs {
        images: jobs,
        open_folders: folders.len(),
        made_folders,
    })
}

/// Makes all images, on all cores. The first `may_be_open` of them stay open.
fn make_all<'a>(
    site: RestoreSite<'_>,
    staging: &Staging,
    jobs: Vec<ImageJob<'a>>,
    temporaries: &Temporaries,
    may_be_open: u64,
    losses: &Losses,
) -> Result<(Vec<NewImage>, Vec<MadeImage<'a>>, FillCounts)> {
    let nodatacow = staged_without_checksums(site, staging)?;
    let make = |at: usize, job: &ImageJob<'_>| {
        let first = job.places.first().ok_or(Errno::NOENT);
        let first = first.map_err(Error::io("make a file in", site.root.path()))?;
        let mut counts = FillCounts::default();
        let stays_open = (at as u64) < may_be_open;
        let (new, state) = UnnamedFile::make(first, temporaries, stays_open, |file| {
            counts = fill_one(
                site,
                (staging, nodatacow.as_ref()),
                job.restored,
                (file, &first.path),
                losses,
            )?;
            Ok(())
        })?;
        Ok((new, state, counts))
    };
    let made: Vec<Result<(UnnamedFile, FileState, FillCounts)>> =
        jobs.par_iter().enumerate().map(|(at, job)| make(at, job)).collect();
    let (mut counts, mut images, mut all) = (FillCounts::default(), Vec::new(), Vec::new());
    for (one, ImageJob { restored, places }) in made.into_iter().zip(jobs) {
        let (new, state, more) = one?;
        counts += more;
        all.push(MadeImage { restored, state });
        images.push(NewImage { new, places });
    }
    Ok((images, all, counts))
}

/// Gives a new file its content, and what it has beside that.
fn fill_one(
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

/// Removes what interrupted restores of this commit have left under temporary names.
fn remove_leftovers(jobs: &[ImageJob<'_>], noted: &Journal) -> Result<()> {
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

/// What images without copy on write refer to, staged once more for them to share.
fn staged_without_checksums(site: RestoreSite<'_>, staging: &Staging) -> Result<Option<File>> {
    let blocks = site.plan.nodatacow_blocks();
    let staged: Vec<_> = blocks.into_iter().flat_map(|range| staging.present(range)).collect();
    if staged.is_empty() || !site.plan.bytes.shares {
        return Ok(None);
    }
    without_checksums((staging.file(), staging.path()), site.root.file(), staged, site.monitor)
}

/// Sets modes, owners and times of folders that were made, the innermost first.
fn set_folders(site: RestoreSite<'_>, made: &BTreeSet<PathBuf>) -> Result<()> {
    let folders = site.plan.contents.manifest.folders.iter();
    let mut folders: Vec<_> = folders.filter(|folder| made.contains(&folder.path)).collect();
    folders.sort_by_key(|folder| std::cmp::Reverse(folder.path.components().count()));
    for folder in folders {
        let Some(fd) = site.root.folder(&folder.path, false, |_| {})? else {
            continue;
        };
        let (path, file) = (site.root.path().join(&folder.path), File::from(fd));
        // What is made there later gets it from the folder.
        if let Some(problem) = attributes::prepare(&file, &folder.metadata) {
            site.monitor
                .note(&format!("`{}`: could not set {problem}", shown(&path)));
        }
        apply(&file, &path, &folder.metadata, site)?;
    }
    Ok(())
}

/// Sets what an image or folder has beside its content, and notes what could not be set.
fn apply(file: &File, path: &Path, metadata: &Metadata, site: RestoreSite<'_>) -> Result<()> {
    let RestoreSite { options, monitor, .. } = site;
    let policy = attributes::AttributePolicy {
        numeric_owner: options.numeric_owner,
        preserve_special: options.preserve_special,
    };
    let not_restored = attributes::apply(file, path, metadata, policy)?;
    if !not_restored.problems.is_empty() {
        let problems = some_of(&not_restored.problems);
        monitor.note(&format!("`{}`: could not set {problems}", shown(path)));
    }
    if !not_restored.left_out.is_empty() {
        let left_out = some_of(&not_restored.left_out);
        monitor.note(&format!(
            "`{}`: left out {left_out}; --preserve-special restores it",
            shown(path)
        ));
    }
    Ok(())
}

/// The first of a list, which an archive can make very long.
fn some_of(all: &[String]) -> String {
    const SHOWN: usize = 8;
    let more = match all.len().saturating_sub(SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    all[..all.len().min(SHOWN)].join(", ") + &more
}
