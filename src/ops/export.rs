//! `export`: images and revisions into an archive, each distinct block once.

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
use crate::exec::export::{ExportSettings, InlineBlock, RecordWriter, Stored, announce, store_blocks};
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

/// Which revisions to export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revisions {
    /// All.
    All,
    /// So many of each image, the newest.
    Newest(usize),
    /// Revisions and nothing else.
    Only,
}

/// What to export, and how.
#[derive(Debug, Clone)]
pub struct ExportOptions {
    /// What to look at.
    pub scope: Scope,
    /// Patterns of images to choose; none means all.
    pub only: Vec<String>,
    /// Which revisions.
    pub revisions: Revisions,
    /// Where to: if a file, it is new or an archive to append to.
    pub archive: ArchivePlace,
    /// Compression level of zstd.
    pub level: i32,
    /// What the commit is called.
    pub label: String,
}

/// Exports a pool.
///
/// # Errors
/// Those of reading and writing; [`Error::ChangedMeanwhile`] if an image changed. Whatever the error, the archive has the commits
/// it had before, and no more bytes.
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
            let done = export_to(options, open, monitor);
            if let Some(file) = opened.filter(|_| done.is_err())
                && let Err(error) = file.remove_if_unused()
            {
                monitor.note(&format!("The archive, which is empty, could not be removed: {error}"));
            }
            done
        }
    }
}

/// Exports a pool to a store, which is opened once it is known that there is something to export. [`ExportOptions::archive`] is not
/// looked at.
///
/// # Errors
/// As for [`export()`].
pub fn export_to(
    options: &ExportOptions,
    open: impl FnOnce() -> Result<Arc<dyn Store>>,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    let mut found = discover(&options.scope, monitor)?;
    let mut origin = ImageOrigins {
        root: common_folder(found.named.iter().map(|one| one.root.as_path())),
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
    let done = open_pool(found, Purpose::Read, monitor).and_then(|(fs, skipped)| {
        let pool = OpenPool::of(&*fs, skipped, scope, monitor);
        write(pool, &origin, options, &mut opened, monitor)
    });
    if done.is_err() {
        opened.undo(monitor);
    }
    done
}

/// Exports a pool that is open to a store: all of its images, whatever the options choose.
///
/// # Errors
/// As for [`export()`].
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
    let done = write(pool, &origin, options, &mut opened, monitor);
    if done.is_err() {
        opened.undo(monitor);
    }
    done
}

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

/// Where images come from, for the names that an archive has them by.
#[derive(Default)]
struct ImageOrigins {
    /// The folder that names in the archive are relative to: the deepest that holds everything that was named.
    root: PathBuf,
    /// What was named.
    named: Vec<NamedPath>,
    /// All names of images, by their paths; one that is not here has its path only.
    names: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
}

/// The images that the options choose.
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
    let mut newest: BTreeMap<PathBuf, Vec<(Option<u64>, String, PathBuf)>> = BTreeMap::new();
    for image in &chosen {
        if let Some(Revision {
            image: of,
            number,
            time,
        }) = revision_of(&image.path)
        {
            newest.entry(of).or_default().push((number, time, image.path.clone()));
        }
    }
    let kept: BTreeSet<PathBuf> = newest
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
    /// What is in it already; none if there is no commit.
    archive: Option<Archive>,
    base: EpochBase,
}

impl OpenArchive {
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
        let found = Archive::open_any(store)?;
        if !found.head().may_append() {
            return Err(Error::Unsupported {
                path: path.clone(),
                problem: "it was made by another version, which cuts chunks in another way or knows more features",
            });
        }
        opened.base = found.base();
        if opened.base.length < found.length() {
            if !found.ends_in_leftovers_only()? {
                let length = found.length() - opened.base.length;
                let problem = "what follows its last intact commit is not just an export that did not end";
                return Err(Error::damaged(&path, opened.base.length, length, problem));
            }
            opened.store.truncate(opened.base.length).map_err(failed)?;
        }
        opened.archive = (!found.commits().is_empty()).then_some(found);
        Ok(opened)
    }

    /// Takes back what was written: nothing of it counts without a commit.
    fn undo(&self, monitor: &dyn Monitor) {
        match self.store.truncate(self.base.length) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(error) => monitor.note(&format!("What was written so far could not be taken back: {error}")),
        }
    }
}

/// Whether a store holds nothing but the beginning of the first record of an archive: what an export leaves that was killed at once.
fn is_torn_beginning(store: &dyn Store, length: u64) -> std::io::Result<bool> {
    let whole = HEADER_BYTES as u64 + Head::current().encode().len() as u64;
    if length == 0 || length >= whole {
        return Ok(false);
    }
    let mut start = [0; MAGIC.len()];
    let count = MAGIC.len().min(usize::try_from(length).unwrap_or(MAGIC.len()));
    store.read_exact_at(0, &mut start[..count])?;
    Ok(MAGIC.starts_with(&start[..count]))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(Error::io("get random bytes from", Path::new("/dev/urandom")))?;
    }
    Ok(bytes)
}

/// The runs of an image, with its first block where that lies in metadata.
fn with_inline(mut runs: Vec<Run>, place: usize, stored: &Stored) -> Vec<Run> {
    let image = ImageId::at(place);
    if let Some(inline) = stored.inline.iter().find(|one| one.image == image) {
        replace_first(&mut runs, inline.block);
    }
    runs
}

struct Exporter<'a> {
    options: &'a ExportOptions,
    fs: &'a dyn Filesystem,
    survey: &'a Survey,
    origin: &'a ImageOrigins,
    monitor: &'a dyn Monitor,
}

impl Exporter<'_> {
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
        let mut out = RecordWriter {
            writer: &mut writer,
            failed: &failed,
        };
        let runs_of = |place: usize, pieces: &[ExportPiece]| {
            export::runs_of(facts, pieces, ImageId::at(place), images[place].blocks())
        };
        put_images(&folders, &images, |place| runs_of(place, &plan.pieces), &mut out)?;
        announce(
            fs.function(),
            plan.first_new,
            &plan.chunks,
            |first, blocks| plan.fingerprints.range(first..first + blocks),
            &mut out,
        )?;
        let old = |archive| StoredHashes::new(archive, first_new);
        let archive = opened.archive.as_ref();
        let log = HashLog::new(first_new, self.options.scope.index.clone());
        let stored = store_blocks(
            (fs, facts),
            &plan,
            self.settings(),
            (old(archive), log),
            &mut out,
            self.monitor,
        )?;
        self.check_unchanged()?;
        let pieces = corrected(&plan, &stored.corrections);
        self.put_corrections(&stored, &mut out)?;
        self.monitor.phase("Committing", 0);
        let summaries = summaries(
            &images,
            |place| with_inline(runs_of(place, &pieces), place, &stored),
            &stored.hashes,
            (&mut old(archive), &path),
            self.monitor,
        )?;
        let store_end = stored.hashes.end();
        let commit = self.commit(summaries, store_end);
        let before = opened.base;
        let (base, commit) = writer.finish(commit).map_err(failed)?;
        let committed = Committed {
            commit,
            location: base.last,
            salvaged: false,
        };
        // From here on the archive has the commit, whatever comes.
        opened.base = base;
        self.remember(index, (&base.archive, &committed), &digests, &pieces);
        Ok(self.exported(path, &committed, (before, base), &plan, &stored))
    }

    /// The index, if there is one and the archive can be appended to later: what only passes by is not met again.
    fn index_for(&self, store: &dyn Store) -> Option<&dyn ChunkIndex> {
        let can_be_appended_to = store.length().is_ok_and(|length| length.is_some());
        self.survey.index.as_deref().filter(|_| can_be_appended_to)
    }

    /// Enters into the index what the archive holds of the pool. It is only a cache: where that fails, the next export reads more.
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

    fn exported(
        &self,
        path: PathBuf,
        committed: &Committed,
        (before, after): (EpochBase, EpochBase),
        plan: &ExportPlan,
        stored: &Stored,
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
            read_bytes: stored.read_bytes,
            known_bytes: known.map(|piece| bytes(piece.blocks)).sum(),
            new_bytes: bytes(after.store_end - before.store_end),
            written_bytes: after.length - before.length,
            corrected_bytes: stored.corrections.len() as u64 * BLOCK_BYTES,
            archive_bytes: after.length,
            skipped: self.survey.skipped.clone(),
        }
    }

    /// Which blocks are new to the archive.
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
                    // It is only a cache: then everything is read.
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
                let usable = archive.announced(committed)?.into_iter();
                for announced in usable.filter(|one| one.function == fs.function() && one.end() <= first_new) {
                    fingerprints.write(announced.first, &announced.fingerprints);
                }
            }
        }
        plan_export(facts, &known, first_new, fingerprints).ok_or(Error::TooLarge)
    }

    fn settings(&self) -> ExportSettings<'_> {
        ExportSettings {
            function: self.fs.function(),
            level: self.options.level,
            inline: &self.survey.inline,
        }
    }

    /// A commit of these images; its writer adds the rest.
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

    fn check_unchanged(&self) -> Result<()> {
        let fs = self.fs;
        let changed: Vec<PathBuf> = ImageId::first(fs.image_count())
            .filter(|image| !fs.may_touch(*image) || !fs.is_unchanged(*image))
            .map(|image| fs.path(image).to_owned())
            .collect();
        match changed.len() {
            0 => Ok(()),
            _ => Err(Error::ChangedMeanwhile { paths: changed }),
        }
    }

    /// The images of the pool as the archive will have them, and the folders they lie in.
    fn images(&self) -> Result<(Vec<ArchivedFolder>, Vec<ArchivedImage>)> {
        let relative = |path: &Path| path.strip_prefix(&self.origin.root).unwrap_or(path).to_owned();
        let (mut folders, mut found) = (BTreeSet::new(), Vec::new());
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
            let attributes: usize = metadata
                .xattrs
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum();
            let names_bytes: usize = names.iter().map(|name| name.as_os_str().len()).sum();
            if attributes + names_bytes > manifest::ENTRY_BYTES_MAX / 2 {
                return Err(Error::Usage(format!(
                    "`{}` has more names or attributes than an archive can hold",
                    crate::shown::shown(&image.path)
                )));
            }
            found.push(ArchivedImage {
                number: number.0,
                names: names.iter().map(|name| relative(name)).collect(),
                size: image.size,
                metadata,
            });
        }
        let folders = folders.into_iter().map(|path| {
            let full = self.origin.root.join(&path);
            let folder = self.folder(&full).map_err(Error::io("open", &full))?;
            let metadata = attributes::read(&folder, &full)?;
            Ok(ArchivedFolder { path, metadata })
        });
        Ok((folders.collect::<Result<_>>()?, found))
    }

    /// Opens a folder that images lie in: through what was named, for whoever owns a folder below can put a link in its place.
    fn folder(&self, full: &Path) -> rustix::io::Result<beneath::Folder> {
        let below = |one: &NamedPath| Some(one.folder.folder(full.strip_prefix(&one.root).ok()?));
        match self.origin.named.iter().find_map(below) {
            Some(opened) => opened,
            // It lies between what several that were named have in common and one of them.
            None => {
                beneath::Folder::open(&self.origin.root)?.folder(full.strip_prefix(&self.origin.root).unwrap_or(full))
            }
        }
    }

    /// Writes what turned out otherwise than planned; a record without entries if nothing did.
    fn put_corrections(&self, stored: &Stored, out: &mut RecordWriter<'_>) -> Result<()> {
        let facts = &self.survey.facts;
        let mut payloads = Payloads::default();
        if !stored.corrections.is_empty() {
            let slots: BTreeMap<Slot, &ExportPiece> =
                stored.corrections.iter().map(|piece| (piece.slot, piece)).collect();
            let images = ImageId::first(self.fs.image_count());
            let mappings = images.flat_map(|image| facts.mappings_of(image).into_iter().map(move |one| (image, one)));
            for (image, mapping) in mappings.filter(|(_, mapping)| !mapping.preallocated) {
                for (slot, piece) in slots.range(mapping.slots()) {
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
        for InlineBlock { image, block } in &stored.inline {
            let content = block.map_or(Content::Zeros, Content::Stored);
            payloads.push(&ManifestEntry::Runs {
                image: image.0,
                first_block: 0,
                runs: vec![Run { blocks: 1, content }],
            });
        }
        put_payloads(PART_CORRECTIONS, payloads, out)
    }
}

fn put_images(
    folders: &[ArchivedFolder],
    images: &[ArchivedImage],
    runs: impl Fn(usize) -> Vec<Run>,
    out: &mut RecordWriter<'_>,
) -> Result<()> {
    let mut payloads = Payloads::default();
    for folder in folders {
        payloads.push(&ManifestEntry::Folder(folder.clone()));
    }
    let mut count = 0;
    for (place, image) in images.iter().enumerate() {
        let runs = runs(place);
        count += runs.len();
        if count > manifest::RUNS_MAX / 2 {
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
    put_payloads(PART_IMAGES, payloads, out)
}

fn put_payloads(part: u8, payloads: Payloads, out: &mut RecordWriter<'_>) -> Result<()> {
    let mut payloads = payloads.finish();
    if payloads.is_empty() {
        payloads.push(Vec::new());
    }
    let count = payloads.len();
    for (n, payload) in (1..).zip(payloads) {
        out.put_plan(part, n == count, (StoreBlock(0), 0), &payload)?;
    }
    debug_assert_ne!(part, PART_BLOCKS);
    Ok(())
}

/// The plan's pieces with what turned out otherwise.
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

/// Makes the first block of an image what lies in its metadata.
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

fn summaries(
    images: &[ArchivedImage],
    runs: impl Fn(usize) -> Vec<Run>,
    log: &HashLog,
    (old, archive): (&mut StoredHashes<'_>, &Path),
    monitor: &dyn Monitor,
) -> Result<Vec<ImageSummary>> {
    /// Hashes read at a time: a run may be as long as the image.
    const PART: u32 = 1 << 16;
    let first_new = old.end();
    let mut counted = NumberSet::new((log.end() - first_new) as usize);
    let mut summaries = Vec::new();
    for (place, image) in images.iter().enumerate() {
        let (mut data, mut new) = (0u64, 0u64);
        let runs = runs(place);
        for run in &runs {
            if let Content::Stored(first) = run.content {
                data += u64::from(run.blocks);
                for block in range::each(first.max(first_new)..first + run.blocks) {
                    if !counted.contains(block - first_new) {
                        counted.insert(block - first_new);
                        new += 1;
                    }
                }
            }
        }
        let digest = digest(&runs, monitor, |first, blocks, digest| {
            let before = first_new.saturating_sub(first).min(blocks);
            if !old.add_to(digest, first, before)? {
                return Err(Error::Damaged {
                    path: archive.to_owned(),
                    range: None,
                    problem: "hashes of blocks that its images refer to are lost".into(),
                });
            }
            let mut at = first + before;
            while at < first + blocks {
                let part = PART.min(first + blocks - at);
                digest.update(log.read(at, part)?.as_flattened())?;
                at += part;
            }
            Ok(())
        })?;
        summaries.push(ImageSummary {
            path: image.path().to_owned(),
            size: image.size,
            data_blocks: data,
            new_blocks: new,
            digest,
        });
    }
    Ok(summaries)
}

fn now() -> FileTime {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    FileTime {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanoseconds: since.subsec_nanos(),
    }
}
