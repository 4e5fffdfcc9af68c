//! `export`: writes images and revisions to an archive, each distinct block once.

mod from_backup;
mod images;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

pub use self::from_backup::{BackupExportOptions, export_backup};
use self::images::{Summarizer, corrected, put_images, with_inline};
use super::open_archive::OpenArchive;
pub use super::open_archive::{MakeKeyring, NewKeyring, Sealing};
use super::{ArchivePlace, OpenPool, Scope, Survey, common_folder, discover, open_pool, survey};
use crate::archive::commit::Commit;
use crate::archive::limits::{LABEL_BYTES_MAX, RUNS_MAX};
use crate::archive::list::ImageSummary;
use crate::archive::manifest::{self, ArchivedFolder, ArchivedImage, PlanPart};
use crate::archive::reader::Committed;
use crate::archive::record::{BlockHasher, LaneId};
use crate::archive::writer::EpochBase;
use crate::block::{BLOCK_BYTES, bytes};
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::exec::export::{ExportOutcome, ExportSettings, RecordWriter, announce, store_blocks};
use crate::exec::hashes::{HashLog, StoredHashes};
use crate::fs::{Filesystem, Purpose, attributes, images};
use crate::index::{ChunkIndex, StoredSlots};
use crate::monitor::Monitor;
use crate::numbers::{ImageId, StoreBlock};
use crate::plan::export::{self, ExportPiece, ExportPlan, plan_export, too_fragmented};
use crate::pool::{FoundImage, NamedPath, Revision, Skip, Skipped, patterns, revision_of};
use crate::range;
use crate::report::Exported;
use crate::spill::SpillVec;
use crate::store::{FileStore, OutputPipe, Store};
use crate::sys::beneath;

/// Which images and revisions are exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revisions {
    /// Images with all of their revisions.
    All,
    /// Images with so many of the newest revisions of each.
    Newest(usize),
    /// Revisions, and nothing else.
    Only,
}

/// What is exported, where to, and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// The paths to search for images, and the index.
    pub scope: Scope,
    /// Patterns that choose images. If it is empty, all are exported.
    pub only: Vec<String>,
    /// Which images and revisions are exported.
    pub revisions: Revisions,
    /// The archive. A file is made if it does not exist, and appended to otherwise.
    pub archive: ArchivePlace,
    /// The compression level of zstd.
    pub level: i32,
    /// Whether what the archive holds is referred to without being read first.
    pub trusts_archive: bool,
    /// The label of the commit, which may be empty.
    pub label: String,
    /// How the archive is sealed.
    pub sealing: Sealing,
    /// Percent of the archive that can be lost and still heal; 0 for none. Without it, the archive stays as it is: with the parity of its last
    /// commit, or without.
    pub parity: Option<u8>,
}

/// Exports a pool.
///
/// # Errors
/// [`Error::NoImages`] if no image is chosen; [`Error::Unreadable`] if an image cannot be read; [`Error::ChangedMeanwhile`] if one was
/// written to meanwhile; [`Error::Damaged`] or [`Error::Unsupported`] if the archive cannot be appended to; [`Error::NoSpace`] or
/// [`Error::Io`] if it cannot be written; [`Error::Interrupted`]. Whatever the error, the archive keeps the commits it had, and a
/// file is no longer than before.
pub fn export(options: &ExportOptions, monitor: &dyn Monitor) -> Result<Exported> {
    to_place(&options.archive, |open| export_to(options, open, monitor), monitor)
}

/// Runs an export to a place. It opens the archive once there is something to export. A file that it made and leaves empty is removed.
fn to_place(
    place: &ArchivePlace,
    run: impl FnOnce(&mut dyn FnMut() -> Result<Arc<dyn Store>>) -> Result<Exported>,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    match place {
        ArchivePlace::Pipe => run(&mut || {
            let pipe = OutputPipe::new().map_err(Error::io("write to", Path::new("stdout")))?;
            Ok(Arc::new(pipe))
        }),
        ArchivePlace::File(path) => {
            let mut opened = None;
            let result = run(&mut || {
                let file = Arc::new(FileStore::append_to(path)?);
                opened = Some(Arc::clone(&file));
                Ok(file as Arc<dyn Store>)
            });
            if let Some(file) = opened.filter(|_| result.is_err())
                && let Err(error) = file.remove_if_unused()
            {
                monitor.note(&format!("The archive, which is empty, could not be removed: {error}"));
            }
            result
        }
    }
}

/// Refuses a label that is too long.
fn check_label(label: &str) -> Result<()> {
    if label.len() > LABEL_BYTES_MAX {
        return Err(Error::Usage(format!(
            "the label is longer than {LABEL_BYTES_MAX} bytes"
        )));
    }
    Ok(())
}

/// Exports a pool to a store, which is opened once there is something to export. [`ExportOptions::archive`] is not used.
///
/// # Errors
/// Those of [`export()`].
pub fn export_to(
    options: &ExportOptions,
    open: impl FnOnce() -> Result<Arc<dyn Store>>,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    check_label(&options.label)?;
    let mut found = discover(&options.scope, monitor)?;
    let mut origin = ImageOrigins {
        root: common_folder(found.named.iter().map(|named| named.root.as_path())),
        named: found.named.clone(),
        names: BTreeMap::new(),
    };
    found.images = choose(found.images, options, &origin.root)?;
    if found.images.is_empty() && found.skipped.is_empty() {
        return Err(Error::NoImages {
            paths: options.scope.paths.clone(),
        });
    }
    let names = found.images.iter();
    origin.names = names.map(|image| (image.path.clone(), image.names.clone())).collect();
    let scope = &options.scope;
    let mut opened = OpenArchive::new(open()?, &options.sealing)?;
    let result = open_pool(found, Purpose::Read, monitor).and_then(|(fs, skipped)| {
        let pool = OpenPool::of(&*fs, skipped, scope, monitor);
        write(RUNS_MAX, pool, (&origin, options), &mut opened, monitor)
    });
    if result.is_err() {
        opened.undo(monitor);
    }
    result
}

/// Exports all images of an open pool to a store. [`ExportOptions::only`], `revisions` and `archive` are not used.
///
/// # Errors
/// Those of [`export()`].
pub fn export_on(
    pool: OpenPool<'_>,
    options: &ExportOptions,
    store: Arc<dyn Store>,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    export_within(RUNS_MAX, pool, options, store, monitor)
}

/// Exports as [`export_on`] does, with at most `runs_max` runs in the commit. Images that would be too many are left out, by name.
///
/// # Errors
/// Those of [`export()`].
pub fn export_within(
    runs_max: usize,
    pool: OpenPool<'_>,
    options: &ExportOptions,
    store: Arc<dyn Store>,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    let folders = images(pool.fs).filter_map(|image| image.path.parent());
    let origin = ImageOrigins {
        root: common_folder(folders),
        ..ImageOrigins::default()
    };
    let mut opened = OpenArchive::new(store, &options.sealing)?;
    let result = write(runs_max, pool, (&origin, options), &mut opened, monitor);
    if result.is_err() {
        opened.undo(monitor);
    }
    result
}

/// Surveys the pool and exports it to an archive that is open.
fn write(
    runs_max: usize,
    pool: OpenPool<'_>,
    (origin, options): (&ImageOrigins, &ExportOptions),
    opened: &mut OpenArchive,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    let fs = pool.fs;
    let survey = survey(pool, &options.scope, false, monitor)?;
    if monitor.interrupted() {
        return Err(Error::Interrupted);
    }
    let exporter = Exporter {
        runs_max,
        options,
        fs,
        survey: &survey,
        origin,
        monitor,
    };
    exporter.run(opened)
}

/// Where the images lie, from which their names in the archive follow.
#[derive(Default)]
struct ImageOrigins {
    /// The folder that names in the archive are relative to. It is the deepest one that holds all paths that were named.
    root: PathBuf,
    /// The paths that were named.
    named: Vec<NamedPath>,
    /// All names of each image, by its path. An image that is not in it has its path as its only name.
    names: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
}

/// Keeps the images that the options choose, by pattern and by revision.
fn choose(images: Vec<FoundImage>, options: &ExportOptions, root: &Path) -> Result<Vec<FoundImage>> {
    let only = patterns(&options.only)?;
    let relative = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_owned();
    let mut chosen = images;
    if !options.only.is_empty() {
        chosen.retain(|image| {
            image
                .names
                .iter()
                .any(|name| only.is_match(relative(name)) || only.is_match(name))
        });
    }
    let mut revisions_of: BTreeMap<PathBuf, Vec<(Option<u64>, String, PathBuf)>> = BTreeMap::new();
    for image in &chosen {
        if let Some(Revision {
            image: image_path,
            number,
            time,
        }) = revision_of(&image.path)
        {
            revisions_of
                .entry(image_path)
                .or_default()
                .push((number, time, image.path.clone()));
        }
    }
    let kept: BTreeSet<PathBuf> = revisions_of
        .into_values()
        .flat_map(|mut revisions| {
            revisions.sort();
            let count = match options.revisions {
                Revisions::Newest(count) => count.min(revisions.len()),
                Revisions::All | Revisions::Only => revisions.len(),
            };
            revisions.split_off(revisions.len() - count)
        })
        .map(|(_, _, path)| path)
        .collect();
    chosen.retain(|image| match revision_of(&image.path) {
        Some(_) => kept.contains(&image.path),
        None => options.revisions != Revisions::Only,
    });
    Ok(chosen)
}

/// One export, from the plan to the commit.
struct Exporter<'a> {
    /// The most runs that the commit may have.
    runs_max: usize,
    options: &'a ExportOptions,
    fs: &'a dyn Filesystem,
    survey: &'a Survey,
    origin: &'a ImageOrigins,
    monitor: &'a dyn Monitor,
}

impl Exporter<'_> {
    /// Plans the export, writes all records, and commits.
    fn run(&self, opened: &mut OpenArchive) -> Result<Exported> {
        let (fs, facts) = (self.fs, &self.survey.facts);
        let path = opened.store.path().to_owned();
        let failed = |error: std::io::Error| Error::io("write to", &path)(error);
        let index = self.index_for(&*opened.store);
        let digests = match index {
            Some(_) => fs.checksum_digests(facts)?,
            None => SpillVec::default(),
        };
        let plan = self.plan_without_lost(opened, index, &digests)?;
        let (folders, images) = self.images()?;
        let runs_of = |place: usize, pieces: &[ExportPiece]| {
            export::runs_of(facts, pieces, ImageId::at(place), images[place].blocks())
        };
        let mut left_out = self.too_many_runs(images.len(), |place| runs_of(place, &plan.pieces).len());
        let mut writer = opened.begin_epoch(self.options.parity, facts.budget(), self.monitor)?;
        let mut records = RecordWriter {
            writer: &mut writer,
            failed: &failed,
        };
        let entries = (&folders[..], &images[..]);
        let planned = |place| runs_of(place, &plan.pieces);
        put_images(PlanPart::Planned, entries, &left_out, planned, &mut records)?;
        let fingerprints = |first, blocks| plan.fingerprints.range(first..first + blocks);
        announce(fs.function(), plan.first_new, &plan.chunks, fingerprints, &mut records)?;
        let old_hashes = || StoredHashes::new(opened.last(), plan.first_new);
        let hasher = opened.hasher();
        let log = HashLog::new(plan.first_new, self.options.scope.index.clone());
        let outcome = store_blocks(
            (fs, facts),
            &plan,
            self.settings(&hasher),
            (old_hashes(), log),
            &mut records,
            self.monitor,
        )?;
        self.check_unchanged()?;
        let pieces = corrected(&plan, &outcome.corrections);
        let last_runs = |place| with_inline(runs_of(place, &pieces), place, &outcome);
        let is_kept = |place: &usize| !left_out.contains(place);
        let kept_runs = |place| Some(place).filter(is_kept).map_or(0, |place| last_runs(place).len());
        let mut too_many = self.too_many_runs(images.len(), kept_runs);
        left_out.append(&mut too_many);
        put_images(PlanPart::Final, entries, &left_out, last_runs, &mut records)?;
        self.monitor.phase("Committing", 0);
        let summarizer = Summarizer::new(&outcome.hashes, old_hashes(), &path, (&hasher, self.monitor));
        let (summaries, uses) = summarizer.all(&images, &left_out, last_runs)?;
        let listed = opened.listed(uses);
        let (label, root) = (self.options.label.clone(), self.origin.root.clone());
        let commit = commit_of(label, root, outcome.hashes.end());
        let (base, committed) = writer.finish(commit, listed, &summaries).map_err(failed)?;
        // The archive has the commit: an error that follows does not undo it.
        let old_base = opened.base;
        opened.committed(base, &committed, self.monitor);
        self.remember(index, (base.lane, &committed), &digests, &pieces);
        let parity = opened.protect(&mut writer, self.monitor);
        let bases = (old_base, opened.base);
        let mut exported = self.exported(path, (&committed, &summaries), bases, &plan, &outcome);
        (exported.parity_bytes, exported.failed) = (writer.parity_bytes(), parity.err());
        let fragmented = |place| Skipped::new(fs.path(ImageId::at(place)), Skip::TooFragmented);
        exported.skipped.extend(left_out.into_iter().map(fragmented));
        Ok(exported)
    }

    /// The images that the commit leaves out because it would have too many runs, given how many each has.
    fn too_many_runs(&self, images: usize, runs: impl Fn(usize) -> usize) -> BTreeSet<usize> {
        let counts: Vec<usize> = (0..images).map(runs).collect();
        too_fragmented(&counts, self.runs_max)
    }

    /// Plans which blocks are new, until none of those that the plan refers to is lost.
    fn plan_without_lost(
        &self,
        opened: &OpenArchive,
        index: Option<&dyn ChunkIndex>,
        digests: &[Option<u128>],
    ) -> Result<ExportPlan> {
        let (mut checked, mut lost) = (Vec::new(), Vec::new());
        loop {
            let plan = self.plan(opened, index, digests, &lost)?;
            let unchecked = range::without(&plan.used_before(), &checked);
            let found = opened.lost(&unchecked, self.options.trusts_archive, self.monitor)?;
            if found.is_empty() {
                return Ok(plan);
            }
            let blocks = range::count(&found);
            self.monitor.note(&format!(
                "The archive is damaged: {} that it has lost are stored anew; vmfold verify says what else is lost",
                crate::shown::size(blocks.saturating_mul(BLOCK_BYTES))
            ));
            checked = range::joined(checked.into_iter().chain(unchecked));
            lost = range::joined(lost.into_iter().chain(found));
        }
    }

    /// The index, if there is one and the archive can be appended to later. No later export meets an archive that went to a pipe.
    fn index_for(&self, store: &dyn Store) -> Option<&dyn ChunkIndex> {
        let can_be_appended_to = store.length().is_ok_and(|length| length.is_some());
        self.survey.index.as_deref().filter(|_| can_be_appended_to)
    }

    /// Enters into the index which extents the archive holds. The index is a cache: if that fails, the next export reads more.
    fn remember(
        &self,
        index: Option<&dyn ChunkIndex>,
        (lane, committed): (LaneId, &Committed),
        digests: &[Option<u128>],
        pieces: &[ExportPiece],
    ) {
        let Some(index) = index.filter(|index| index.is_usable()) else {
            return;
        };
        let mut known = pieces.iter().map(|piece| StoredSlots {
            slots: piece.known(),
            is_news: piece.source.is_read(),
        });
        let facts = &self.survey.facts;
        if let Err(error) = index.remember_stored(&lane.0, committed, facts, digests, &mut known) {
            self.monitor.note(&crate::error::describe(&error));
        }
    }

    /// The report of the export.
    fn exported(
        &self,
        path: PathBuf,
        (committed, images): (&Committed, &[ImageSummary]),
        (old_base, new_base): (EpochBase, EpochBase),
        plan: &ExportPlan,
        outcome: &ExportOutcome,
    ) -> Exported {
        let known = plan.pieces.iter().filter(|piece| !piece.source.is_read());
        Exported {
            archive: path,
            commit: committed.commit.number,
            id: committed.id(),
            images: images.len() as u64,
            logical_bytes: images.iter().map(|image| image.size).sum(),
            data_bytes: images.iter().map(|image| image.data_blocks * BLOCK_BYTES).sum(),
            read_bytes: outcome.read_bytes,
            known_bytes: known.map(|piece| bytes(piece.blocks)).sum(),
            new_bytes: bytes(new_base.store_end - old_base.store_end),
            written_bytes: new_base.length - old_base.length,
            corrected_bytes: outcome.corrections.len() as u64 * BLOCK_BYTES,
            archive_bytes: new_base.length,
            skipped: self.survey.skipped.clone(),
            ..Exported::default()
        }
    }

    /// Plans which blocks are new to the archive.
    fn plan(
        &self,
        opened: &OpenArchive,
        index: Option<&dyn ChunkIndex>,
        digests: &[Option<u128>],
        lost: &[Range<StoreBlock>],
    ) -> Result<ExportPlan> {
        let (fs, facts) = (self.fs, &self.survey.facts);
        self.monitor.phase("Planning", 0);
        let known = match (index, &opened.archive) {
            (Some(index), Some(archive)) => index
                .stored(&archive.id().0, archive.main_commits(), facts, digests)
                .unwrap_or_else(|error| {
                    // The index is a cache: without it, every extent is read.
                    self.monitor.note(&crate::error::describe(&error));
                    SpillVec::default()
                }),
            _ => SpillVec::default(),
        };
        let first_new = opened.base.store_end;
        let end_max = first_new.checked_add(facts.slots()).ok_or(Error::TooLarge)?;
        let mut fingerprints = facts.fingerprints.alike(end_max.index());
        if let Some(archive) = &opened.archive {
            for committed in archive.main_commits() {
                let parts = archive.announced(committed)?.into_iter();
                for announced in parts.filter(|part| part.function == fs.function() && part.end() <= first_new) {
                    fingerprints.write(announced.first, &announced.fingerprints);
                }
            }
        }
        plan_export(facts, &known, first_new, fingerprints, lost).ok_or(Error::TooLarge)
    }

    /// The settings for [`store_blocks`].
    fn settings<'s>(&'s self, hasher: &'s BlockHasher) -> ExportSettings<'s> {
        ExportSettings {
            function: self.fs.function(),
            level: self.options.level,
            inline: &self.survey.inline,
            hasher,
        }
    }

    /// Checks that no image was written to since it was opened.
    fn check_unchanged(&self) -> Result<()> {
        let fs = self.fs;
        let changed: Vec<PathBuf> = ImageId::first(fs.image_count())
            .filter(|image| !fs.may_touch(*image) || !fs.is_unchanged(*image))
            .map(|image| fs.path(image).to_owned())
            .collect();
        if changed.is_empty() {
            return Ok(());
        }
        Err(Error::ChangedMeanwhile { paths: changed })
    }

    /// The folders and the images of the pool, with their names and attributes in the archive.
    fn images(&self) -> Result<(Vec<ArchivedFolder>, Vec<ArchivedImage>)> {
        let relative = |path: &Path| path.strip_prefix(&self.origin.root).unwrap_or(path).to_owned();
        let (mut folders, mut archived) = (BTreeSet::new(), Vec::new());
        for (number, image) in ImageId::numbered(images(self.fs)) {
            let names = self.origin.names.get(&image.path).cloned();
            let names = names.unwrap_or_else(|| BTreeSet::from([image.path.clone()]));
            for name in &names {
                let path = relative(name);
                if !manifest::is_safe(path.as_os_str().as_bytes()) {
                    return Err(Error::Usage(format!(
                        "`{}` has too long a name",
                        crate::shown::shown(name)
                    )));
                }
                folders.extend(
                    path.ancestors()
                        .skip(1)
                        .filter(|folder| folder.parent().is_some())
                        .map(Path::to_owned),
                );
            }
            let metadata = self.fs.attributes(number)?;
            let xattrs_bytes: usize = metadata
                .xattrs
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum();
            let names_bytes: usize = names.iter().map(|name| name.as_os_str().len()).sum();
            if xattrs_bytes + names_bytes > manifest::ENTRY_BYTES_MAX / 2 {
                return Err(Error::Usage(format!(
                    "`{}` has more names or attributes than an archive can hold",
                    crate::shown::shown(&image.path)
                )));
            }
            archived.push(ArchivedImage {
                number: number.0,
                names: names.iter().map(|name| relative(name)).collect(),
                size: image.size,
                metadata,
            });
        }
        let folders = folders.into_iter().map(|path| {
            let full_path = self.origin.root.join(&path);
            let folder = self.folder(&full_path).map_err(Error::io("open", &full_path))?;
            let metadata = attributes::read(&folder, &full_path)?;
            Ok(ArchivedFolder { path, metadata })
        });
        Ok((folders.collect::<Result<_>>()?, archived))
    }

    /// Opens a folder that images lie in, below a path that was named and without following links: another user who owns a folder on the way
    /// can put a link in its place.
    fn folder(&self, full_path: &Path) -> rustix::io::Result<beneath::Folder> {
        let below = |named: &NamedPath| Some(named.folder.folder(full_path.strip_prefix(&named.root).ok()?));
        self.origin.named.iter().find_map(below).unwrap_or_else(|| {
            // The folder lies above the paths that were named, and below the folder that they have in common.
            let relative = full_path.strip_prefix(&self.origin.root).unwrap_or(full_path);
            beneath::Folder::open(&self.origin.root)?.folder(relative)
        })
    }
}

/// A commit of this host and this time, to which [`ArchiveWriter::finish`] adds its number, its predecessor and its lists.
fn commit_of(label: String, root: PathBuf, store_end: StoreBlock) -> Commit {
    let name = rustix::system::uname();
    Commit {
        time: now(),
        label,
        root,
        host: name.nodename().to_string_lossy().into_owned(),
        writer: concat!("vmfold ", env!("CARGO_PKG_VERSION")).into(),
        store_end,
        ..Commit::default()
    }
}

/// The time of the system's clock.
fn now() -> FileTime {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    FileTime {
        seconds: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: since_epoch.subsec_nanos(),
    }
}
