//! `export`: writes images and revisions to an archive, each distinct block once.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::{ArchivePlace, OpenPool, Scope, Survey, common_folder, discover, open_pool, survey};
use crate::archive::commit::{Commit, CommitLocation, ImageSummary};
use crate::archive::head::Head;
use crate::archive::manifest::{
    self, ArchivedFolder, ArchivedImage, ManifestEntry, PART_BLOCKS, PART_CORRECTIONS, PART_IMAGES, Payloads,
};
use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{HEADER_BYTES, MAGIC};
use crate::archive::writer::{ArchiveWriter, EpochBase};
use crate::block::{BLOCK_BYTES, NumberSet, bytes};
use crate::content::{Content, FileTime, Run, push_run};
use crate::error::{Error, Result};
use crate::exec::export::{ExportOutcome, ExportSettings, InlineBlock, RecordWriter, announce, store_blocks};
use crate::exec::hashes::{HashLog, StoredHashes, digest};
use crate::fs::{Filesystem, Purpose, attributes, images};
use crate::index::{ChunkIndex, StoredSlots};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, ImageId, Slot, StoreBlock};
use crate::plan::export::{self, ExportPiece, ExportPlan, ExportSource, plan_export};
use crate::pool::{FoundImage, NamedPath, Revision, patterns, revision_of};
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
    /// The label of the commit, which may be empty.
    pub label: String,
}

/// Exports a pool.
///
/// # Errors
/// [`Error::NoImages`] if no image is chosen; [`Error::Unreadable`] if an image cannot be read; [`Error::ChangedMeanwhile`] if one was
/// written to meanwhile; [`Error::Damaged`] or [`Error::Unsupported`] if the archive cannot be appended to; [`Error::NoSpace`] or
/// [`Error::Io`] if it cannot be written; [`Error::Interrupted`]. Whatever the error, the archive keeps the commits it had, and a
/// file is no longer than before.
pub fn export(options: &ExportOptions, monitor: &dyn Monitor) -> Result<Exported> {
    match &options.archive {
        ArchivePlace::Pipe => {
            let pipe = OutputPipe::new().map_err(Error::io("write to", Path::new("stdout")))?;
            export_to(options, || Ok(Arc::new(pipe)), monitor)
        }
        ArchivePlace::File(path) => {
            let mut opened = None;
            let open = || {
                let file = Arc::new(FileStore::append_to(path)?);
                opened = Some(Arc::clone(&file));
                Ok(file as Arc<dyn Store>)
            };
            let result = export_to(options, open, monitor);
            if let Some(file) = opened.filter(|_| result.is_err())
                && let Err(error) = file.remove_if_unused()
            {
                monitor.note(&format!("The archive, which is empty, could not be removed: {error}"));
            }
            result
        }
    }
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
    let mut opened = OpenArchive::new(open()?)?;
    let result = open_pool(found, Purpose::Read, monitor).and_then(|(fs, skipped)| {
        let pool = OpenPool::of(&*fs, skipped, scope, monitor);
        write(pool, &origin, options, &mut opened, monitor)
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
    let folders = images(pool.fs).filter_map(|image| image.path.parent());
    let origin = ImageOrigins {
        root: common_folder(folders),
        ..ImageOrigins::default()
    };
    let mut opened = OpenArchive::new(store)?;
    let result = write(pool, &origin, options, &mut opened, monitor);
    if result.is_err() {
        opened.undo(monitor);
    }
    result
}

/// Surveys the pool and exports it to an archive that is open.
fn write(
    pool: OpenPool<'_>,
    origin: &ImageOrigins,
    options: &ExportOptions,
    opened: &mut OpenArchive,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    let fs = pool.fs;
    let survey = survey(pool, &options.scope, false, monitor)?;
    if monitor.interrupted() {
        return Err(Error::Interrupted);
    }
    let exporter = Exporter {
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

/// The archive that is written to.
struct OpenArchive {
    store: Arc<dyn Store>,
    /// The archive as it is read. It is `None` if there is no commit in it yet.
    archive: Option<Archive>,
    /// The end of the archive, which the export continues.
    base: EpochBase,
}

impl OpenArchive {
    /// Opens the archive in a store, and removes from its end what an export that did not end left there.
    fn new(store: Arc<dyn Store>) -> Result<Self> {
        let path = store.path().to_owned();
        let failed = Error::io("write to", &path);
        let mut opened = Self {
            store: Arc::clone(&store),
            archive: None,
            base: EpochBase {
                archive: random()?,
                ..EpochBase::default()
            },
        };
        let length = store.length().map_err(Error::io("look at", &path))?.unwrap_or(0);
        if length == 0 {
            return Ok(opened);
        }
        if is_torn_beginning(&*store, length).map_err(Error::io("read", &path))? {
            store.truncate(0).map_err(failed)?;
            return Ok(opened);
        }
        let archive = Archive::open_any(store)?;
        if !archive.head().may_append() {
            return Err(Error::Unsupported {
                path: path.clone(),
                problem: "it was made by another version, which cuts chunks in another way or knows more features",
            });
        }
        opened.base = archive.base();
        if opened.base.length < archive.length() {
            if !archive.ends_in_leftovers_only()? {
                let length = archive.length() - opened.base.length;
                let problem = "what follows its last intact commit is not just an export that did not end";
                return Err(Error::damaged(&path, opened.base.length, length, problem));
            }
            opened.store.truncate(opened.base.length).map_err(failed)?;
        }
        opened.archive = (!archive.commits().is_empty()).then_some(archive);
        Ok(opened)
    }

    /// Truncates the archive to its last commit. What an export wrote after it is of no use without a commit.
    fn undo(&self, monitor: &dyn Monitor) {
        match self.store.truncate(self.base.length) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(error) => monitor.note(&format!("What was written so far could not be taken back: {error}")),
        }
    }
}

/// Whether a store holds nothing but the beginning of an archive's first record. That is what an export leaves that was killed at once.
fn is_torn_beginning(store: &dyn Store, length: u64) -> std::io::Result<bool> {
    let record_bytes = HEADER_BYTES as u64 + Head::current().encode().len() as u64;
    if length == 0 || length >= record_bytes {
        return Ok(false);
    }
    let mut start = [0; MAGIC.len()];
    let count = MAGIC.len().min(usize::try_from(length).unwrap_or(MAGIC.len()));
    store.read_exact_at(0, &mut start[..count])?;
    Ok(MAGIC.starts_with(&start[..count]))
}

/// Random bytes of the kernel.
fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(Error::io("get random bytes from", Path::new("/dev/urandom")))?;
    }
    Ok(bytes)
}

/// The runs of an image. If its data lies in metadata, its first block is put into them.
fn with_inline(mut runs: Vec<Run>, place: usize, outcome: &ExportOutcome) -> Vec<Run> {
    let image = ImageId::at(place);
    if let Some(inline) = outcome.inline.iter().find(|inline| inline.image == image) {
        replace_first(&mut runs, inline.block);
    }
    runs
}

/// One export, from the plan to the commit.
struct Exporter<'a> {
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
        let plan = self.plan(opened, index, &digests)?;
        let first_new = plan.first_new;
        let (folders, images) = self.images()?;
        let epoch = u64::from_le_bytes(random()?);
        let mut writer = ArchiveWriter::begin(Arc::clone(&opened.store), opened.base, epoch).map_err(failed)?;
        let mut records = RecordWriter {
            writer: &mut writer,
            failed: &failed,
        };
        let runs_of = |place: usize, pieces: &[ExportPiece]| {
            export::runs_of(facts, pieces, ImageId::at(place), images[place].blocks())
        };
        put_images(&folders, &images, |place| runs_of(place, &plan.pieces), &mut records)?;
        announce(
            fs.function(),
            plan.first_new,
            &plan.chunks,
            |first, blocks| plan.fingerprints.range(first..first + blocks),
            &mut records,
        )?;
        let old_hashes = |archive| StoredHashes::new(archive, first_new);
        let archive = opened.archive.as_ref();
        let log = HashLog::new(first_new, self.options.scope.index.clone());
        let outcome = store_blocks(
            (fs, facts),
            &plan,
            self.settings(),
            (old_hashes(archive), log),
            &mut records,
            self.monitor,
        )?;
        self.check_unchanged()?;
        let pieces = corrected(&plan, &outcome.corrections);
        self.put_corrections(&outcome, &mut records)?;
        self.monitor.phase("Committing", 0);
        let summaries = summaries(
            &images,
            |place| with_inline(runs_of(place, &pieces), place, &outcome),
            &outcome.hashes,
            (&mut old_hashes(archive), &path),
            self.monitor,
        )?;
        let store_end = outcome.hashes.end();
        let commit = self.commit(summaries, store_end);
        let old_base = opened.base;
        let (base, commit) = writer.finish(commit).map_err(failed)?;
        let committed = Committed {
            commit,
            location: base.last,
            salvaged: false,
        };
        // The archive has the commit: an error that follows does not undo it.
        opened.base = base;
        self.remember(index, (&base.archive, &committed), &digests, &pieces);
        Ok(self.exported(path, &committed, (old_base, base), &plan, &outcome))
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
        (archive, committed): (&[u8; 16], &Committed),
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
        if let Err(error) = index.remember_stored(archive, committed, facts, digests, &mut known) {
            self.monitor.note(&crate::error::describe(&error));
        }
    }

    /// The report of the export.
    fn exported(
        &self,
        path: PathBuf,
        committed: &Committed,
        (old_base, new_base): (EpochBase, EpochBase),
        plan: &ExportPlan,
        outcome: &ExportOutcome,
    ) -> Exported {
        let images = &committed.commit.images;
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
        }
    }

    /// Plans which blocks are new to the archive.
    fn plan(
        &self,
        opened: &OpenArchive,
        index: Option<&dyn ChunkIndex>,
        digests: &[Option<u128>],
    ) -> Result<ExportPlan> {
        let (fs, facts) = (self.fs, &self.survey.facts);
        self.monitor.phase("Planning", 0);
        let known = match (index, &opened.archive) {
            (Some(index), Some(archive)) => index
                .stored(&archive.id(), archive.commits(), facts, digests)
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
            for committed in archive.commits() {
                let parts = archive.announced(committed)?.into_iter();
                for announced in parts.filter(|part| part.function == fs.function() && part.end() <= first_new) {
                    fingerprints.write(announced.first, &announced.fingerprints);
                }
            }
        }
        plan_export(facts, &known, first_new, fingerprints).ok_or(Error::TooLarge)
    }

    /// The settings for [`store_blocks`].
    fn settings(&self) -> ExportSettings<'_> {
        ExportSettings {
            function: self.fs.function(),
            level: self.options.level,
            inline: &self.survey.inline,
        }
    }

    /// A commit of these images. [`ArchiveWriter::finish`] sets its number, its predecessor and its records.
    fn commit(&self, images: Vec<ImageSummary>, store_end: StoreBlock) -> Commit {
        Commit {
            number: CommitNumber::default(),
            time: now(),
            label: self.options.label.clone(),
            root: self.origin.root.clone(),
            previous: CommitLocation::default(),
            store_end,
            images,
            records: Vec::new(),
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

    /// Writes the runs of images whose blocks are not those that the plan supposed. Without any, it writes a record without entries.
    fn put_corrections(&self, outcome: &ExportOutcome, records: &mut RecordWriter<'_>) -> Result<()> {
        let facts = &self.survey.facts;
        let mut payloads = Payloads::default();
        if !outcome.corrections.is_empty() {
            let pieces = outcome.corrections.iter().map(|piece| (piece.slot, piece));
            let by_slot: BTreeMap<Slot, &ExportPiece> = pieces.collect();
            let images = ImageId::first(self.fs.image_count());
            let mappings = images.flat_map(|image| {
                facts
                    .mappings_of(image)
                    .into_iter()
                    .map(move |mapping| (image, mapping))
            });
            for (image, mapping) in mappings.filter(|(_, mapping)| !mapping.preallocated) {
                for (slot, piece) in by_slot.range(mapping.slots()) {
                    payloads.push(&ManifestEntry::Runs {
                        image: image.0,
                        first_block: mapping.file_block + (*slot - mapping.slot),
                        runs: vec![Run {
                            blocks: 1,
                            content: piece.content_at(*slot),
                        }],
                    });
                }
            }
        }
        for InlineBlock { image, block } in &outcome.inline {
            let content = block.map_or(Content::Zeros, Content::Stored);
            payloads.push(&ManifestEntry::Runs {
                image: image.0,
                first_block: 0,
                runs: vec![Run { blocks: 1, content }],
            });
        }
        put_payloads(PART_CORRECTIONS, payloads, records)
    }
}

/// Writes the PLAN records that describe folders and images, with the runs of each image as they are planned.
fn put_images(
    folders: &[ArchivedFolder],
    images: &[ArchivedImage],
    runs: impl Fn(usize) -> Vec<Run>,
    records: &mut RecordWriter<'_>,
) -> Result<()> {
    let mut payloads = Payloads::default();
    for folder in folders {
        payloads.push(&ManifestEntry::Folder(folder.clone()));
    }
    let mut runs_count = 0;
    for (place, image) in images.iter().enumerate() {
        let runs = runs(place);
        runs_count += runs.len();
        if runs_count > manifest::RUNS_MAX / 2 {
            return Err(Error::Usage(
                "the images are too fragmented for one commit: export them in several".into(),
            ));
        }
        payloads.push(&ManifestEntry::Image(image.clone()));
        payloads.push(&ManifestEntry::Runs {
            image: image.number,
            first_block: 0,
            runs,
        });
    }
    put_payloads(PART_IMAGES, payloads, records)
}

/// Writes one PLAN record for each payload, and one without entries if there is none.
fn put_payloads(part: u8, payloads: Payloads, records: &mut RecordWriter<'_>) -> Result<()> {
    let mut payloads = payloads.finish();
    if payloads.is_empty() {
        payloads.push(Vec::new());
    }
    let count = payloads.len();
    for (number, payload) in (1..).zip(payloads) {
        records.put_plan(part, number == count, (StoreBlock(0), 0), &payload)?;
    }
    debug_assert_ne!(part, PART_BLOCKS);
    Ok(())
}

/// The plan's pieces, with corrections in the place of what the plan supposed.
fn corrected(plan: &ExportPlan, corrections: &[ExportPiece]) -> SpillVec<ExportPiece> {
    let mut corrections = corrections.iter().peekable();
    let mut pieces = SpillVec::with_capacity_in(plan.pieces.len(), plan.pieces.budget());
    for piece in &plan.pieces {
        let mut at = piece.slot;
        let part = |from: Slot, to: Slot| ExportPiece {
            slot: from,
            blocks: to - from,
            source: match (piece.source, piece.content_at(from)) {
                (ExportSource::Known(_), Content::Stored(first)) => ExportSource::Known(first),
                (ExportSource::Same(_), Content::Stored(first)) => ExportSource::Same(first),
                (ExportSource::New(_), Content::Stored(first)) => ExportSource::New(first),
                (other, _) => other,
            },
        };
        while let Some(correction) = corrections.next_if(|correction| correction.slot < piece.end()) {
            if correction.slot > at {
                pieces.push(part(at, correction.slot));
            }
            pieces.push(*correction);
            at = correction.end();
        }
        if at < piece.end() {
            pieces.push(part(at, piece.end()));
        }
    }
    pieces
}

/// Replaces the first block in the runs of an image by a block of the store, or by zeros.
fn replace_first(runs: &mut Vec<Run>, block: Option<StoreBlock>) {
    let content = block.map_or(Content::Zeros, Content::Stored);
    let mut replaced = vec![Run { blocks: 1, content }];
    let mut rest = runs.iter();
    if let Some(first) = rest.next() {
        push_run(
            &mut replaced,
            first.part(1.min(first.blocks), first.blocks.saturating_sub(1)),
        );
    }
    rest.for_each(|run| push_run(&mut replaced, *run));
    *runs = replaced;
}

/// The summary of each image for the COMMIT: how much data it has, how much of that is new to the archive, and its digest.
fn summaries(
    images: &[ArchivedImage],
    runs: impl Fn(usize) -> Vec<Run>,
    log: &HashLog,
    (old_hashes, archive): (&mut StoredHashes<'_>, &Path),
    monitor: &dyn Monitor,
) -> Result<Vec<ImageSummary>> {
    /// Hashes that are read at a time, because a run may be as long as the image.
    const PART_BLOCKS: u32 = 1 << 16;
    let first_new = old_hashes.end();
    let mut counted = NumberSet::new((log.end() - first_new) as usize);
    let mut summaries = Vec::new();
    for (place, image) in images.iter().enumerate() {
        let (mut data_blocks, mut new_blocks) = (0u64, 0u64);
        let runs = runs(place);
        for run in &runs {
            let Content::Stored(first) = run.content else {
                continue;
            };
            data_blocks += u64::from(run.blocks);
            for block in range::each(first.max(first_new)..first + run.blocks) {
                if !counted.contains(block - first_new) {
                    counted.insert(block - first_new);
                    new_blocks += 1;
                }
            }
        }
        let digest = digest(&runs, monitor, |first, blocks, digest| {
            let old_blocks = first_new.saturating_sub(first).min(blocks);
            if !old_hashes.add_to(digest, first, old_blocks)? {
                return Err(Error::Damaged {
                    path: archive.to_owned(),
                    range: None,
                    problem: "hashes of blocks that its images refer to are lost".into(),
                });
            }
            let mut at = first + old_blocks;
            while at < first + blocks {
                let part = PART_BLOCKS.min(first + blocks - at);
                digest.update(log.read(at, part)?.as_flattened())?;
                at += part;
            }
            Ok(())
        })?;
        summaries.push(ImageSummary {
            path: image.path().to_owned(),
            size: image.size,
            data_blocks,
            new_blocks,
            digest,
        });
    }
    Ok(summaries)
}

/// The time of the system's clock.
fn now() -> FileTime {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    FileTime {
        seconds: i64::try_from(since_epoch.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: since_epoch.subsec_nanos(),
    }
}
