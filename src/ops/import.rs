//! `import`: images out of an archive, sharing what they have in common with each other and with the disk.

mod seeds;
mod stream;
mod target;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

pub use stream::import_in_order;
pub use target::Target;

use crate::archive::commit::{Summary, by_path};
use crate::archive::manifest::{Announced, ImageRuns, Manifest};
use crate::archive::pack::FrameInfo;
use crate::archive::reader::{Archive, Committed, Damage};
use crate::archive::record::{Hash, hash_of};
use crate::block::{BLOCK_LEN, ByteRange, bytes};
use crate::content::{Content, StoreBlock};
use crate::error::{Error, Result};
use crate::exec::hashes::{Digest, StoredHashes, digest};
use crate::exec::restore::folder::Root;
use crate::exec::restore::place::{self, can_share};
use crate::exec::restore::staging::{Noted, Staging};
use crate::fs::attributes;
use crate::monitor::Monitor;
use crate::plan::METADATA_BYTES_PER_REFERENCE;
use crate::plan::import::{lost_ranges, wanted};
use crate::pool::patterns;
use crate::range;
use crate::report::{Imported, LostImage, PlannedImport, Restored};
use crate::shown::shown;
use crate::store::{FileStore, Store};
use seeds::Seeds;

/// Blocks fetched at a time.
const BATCH_BLOCKS: u32 = 4096;
/// Blocks whose hashes are compared at a time.
const PROVED_BLOCKS: u32 = 1024;
/// Bytes that a restore leaves free for the filesystem's own needs.
const RESERVE_BYTES: u64 = 16 << 20;

/// Where an archive is read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// Standard input.
    Pipe,
}

/// What to import, and how.
#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub struct Options {
    /// The archive.
    pub source: Source,
    /// The folder to restore to.
    pub to: PathBuf,
    /// Patterns of images to choose; none means all.
    pub only: Vec<String>,
    /// Which commit; none means the last.
    pub commit: Option<String>,
    /// Images and folders of images on the same filesystem that may have blocks in common with what is restored.
    pub seeds: Vec<PathBuf>,
    /// Where indexes are kept.
    pub index: PathBuf,
    /// Memory for fingerprints of seeds, in bytes, as in [`super::Scope`].
    pub memory_bytes: Option<u64>,
    /// Put images in the place of existing ones.
    pub replace: bool,
    /// Go on with an import that was interrupted.
    pub resume: bool,
    /// Restore what is intact of a damaged archive.
    pub partial: bool,
    /// Only say what would be done.
    pub dry_run: bool,
    /// Restore images as revisions of Qubes OS.
    pub as_revision: bool,
    /// Take owners by number even where their names are known here.
    pub numeric_owner: bool,
    /// Restore set-user-ID, set-group-ID and sticky bits, and attributes of `security.*` and `trusted.*`.
    pub preserve_special: bool,
}

/// Imports images.
///
/// # Errors
/// Before anything is written: if something exists already, or does not fit. Later: those of reading the archive and of writing; what
/// was restored so far is kept for `resume`.
pub fn import(options: &Options, monitor: &dyn Monitor) -> Result<Imported> {
    match &options.source {
        Source::File(path) => import_from(Arc::new(FileStore::open(path)?), options, monitor),
        Source::Pipe => stream::from_pipe(options, monitor),
    }
}

/// Imports from a store that is read anywhere; [`Options::source`] is not looked at.
///
/// # Errors
/// As for [`import`].
pub fn import_from(store: Arc<dyn Store>, options: &Options, monitor: &dyn Monitor) -> Result<Imported> {
    monitor.phase("Reading the archive", 0);
    let path = store.path().to_owned();
    let path = path.as_path();
    let mut archive = if options.partial {
        Archive::open_any(store)?
    } else {
        Archive::open(store)?
    };
    if options.partial {
        archive.salvage()?;
    }
    let committed = archive.commit(options.commit.as_deref())?;
    if committed.salvaged {
        monitor.note("The COMMIT of what is restored is lost: its images are as the rest of the archive has them");
    }
    let (manifest, damage) = archive.manifest(committed)?;
    for one in archive.damage().iter().chain(&damage) {
        monitor.note(&format!("The archive is damaged at {}: {}", one.range, one.problem));
    }
    if let Some(one) = damage.first()
        && manifest.images.is_empty()
        && committed.commit.images.is_empty()
    {
        return Err(Error::damaged(
            path,
            one.range.start,
            one.range.length,
            one.problem.clone(),
        ));
    }
    let (id, number) = (archive.id(), committed.commit.number);
    let folder = work_folder(options, &id, number);
    let mut restore = Restore::new(options, manifest, &committed.commit.images, (None, &folder), monitor)?;
    restore.identify(&committed.location.body_hash);
    let wanted = wanted(restore.chosen().flat_map(|image| &image.runs));
    let work = Work::prepare(&restore, folder)?;
    target::check_names(&restore, work.noted.as_ref())?;
    // Before seeds are opened, which an image that is to be replaced may be one of.
    target::check_use(&restore, work.noted.as_ref())?;
    let mut hashes = StoredHashes::new(Some(&archive), committed.commit.store_end);
    let mut announced: Vec<Announced> = Vec::new();
    if restore.shares && seeds::are_possible(options) {
        // Each block is announced once: more than that is not of our making.
        let mut left = u64::from(committed.commit.store_end);
        for one in archive.commits().iter().map(|one| archive.announced(one)) {
            for one in one? {
                let blocks = one.fingerprints.len() as u64;
                if blocks <= left {
                    left -= blocks;
                    announced.push(one);
                }
            }
        }
    }
    let seeds = Seeds::open(options, restore.shares, &wanted, announced.iter(), monitor)?;
    let seeded = match &seeds {
        Some(seeds) => {
            let found = seeds.find(&wanted, announced.iter(), monitor)?;
            seeds.prove(&found, &mut hashes, monitor)?
        }
        None => Vec::new(),
    };
    drop(announced);
    let seeded_ranges: Vec<Range<StoreBlock>> = seeded.iter().map(|one| one.first..one.first + one.blocks).collect();
    let mut imported = restore.imported(path, number, committed.id());
    imported.planned = restore.planned(&wanted, &seeded_ranges, work.staged_bytes());
    imported.later_damage = later_damage(&archive, committed, options);
    if options.dry_run {
        return Ok(imported);
    }
    restore.check_space(&imported.planned)?;
    let mut work = work.open(wanted.last().map_or(0, |range| range.end))?;
    let done = (|| -> Result<()> {
        let mut lost = restore_blocks(
            &archive,
            &mut work.staging,
            &work.claimed,
            &wanted,
            seeds.as_ref().zip(Some(&*seeded)),
            &mut hashes,
            &mut imported,
            monitor,
        )?;
        // What is open here cannot be told from what others use.
        drop(seeds);
        let doubtful = !damage.is_empty();
        let mixed_up = restore.mixed_up(&committed.commit.images, doubtful, &mut hashes, monitor)?;
        lost.sort_unstable_by_key(|range| range.start);
        restore.finish(
            &mut work,
            &lost,
            &mixed_up,
            &committed.commit.images,
            &mut imported,
            monitor,
        )
    })();
    work.end(done, imported, monitor)
}

/// Whether behind the commit that was taken for the last one something is damaged that could have been a later one.
fn later_damage(archive: &Archive, committed: &Committed, options: &Options) -> bool {
    /// Bytes of a TAIL; a COMMIT with its epoch has more.
    const TAIL_BYTES: u64 = 192;
    let end = committed.location.offset + committed.location.length;
    let is_later = |damage: &Damage| damage.range.start >= end && damage.range.length > TAIL_BYTES;
    let is_last = options.commit.as_deref().is_none_or(|name| name == "latest");
    is_last && !committed.salvaged && archive.damage().iter().any(is_later)
}

/// Gets every wanted block into the staging file: from an earlier attempt, from seeds, from the archive. Returns what is lost.
#[expect(clippy::too_many_arguments, reason = "the three sources of blocks and where they go")]
fn restore_blocks(
    archive: &Archive,
    staging: &mut Staging,
    claimed: &[Range<StoreBlock>],
    wanted: &[Range<StoreBlock>],
    seeds: Option<(&Seeds, &[crate::plan::import::SeedMatch])>,
    hashes: &mut StoredHashes<'_>,
    imported: &mut Imported,
    monitor: &dyn Monitor,
) -> Result<Vec<Range<StoreBlock>>> {
    let total = range::count(wanted) * bytes(1);
    monitor.phase("Restoring blocks", total);
    let mut done = Restored::default();
    for range in claimed {
        for part in range::parts(range.clone(), PROVED_BLOCKS) {
            let proved = prove(staging, part, hashes)?;
            for range in proved {
                done.resumed_bytes += bytes(range.end - range.start);
                monitor.advance(bytes(range.end - range.start));
                staging.confirm(range);
            }
        }
    }
    if let Some((seeds, seeded)) = seeds {
        for one in seeded {
            done.seeded_bytes += seeds.clone_into(one, staging, hashes, monitor)?;
        }
    }
    let mut lost = Vec::new();
    let missing: Vec<Range<StoreBlock>> = wanted.iter().flat_map(|range| staging.missing(range.clone())).collect();
    lost.extend(range::without(&missing, &covered(archive, &missing)));
    let mut batch = Batch::default();
    for pack in packs_of(archive, &missing) {
        let frames = match archive.frames(pack) {
            Ok(frames) => frames,
            Err(error @ Error::Damaged { .. }) => {
                monitor.note(&crate::error::describe(&error));
                lost.extend(range::overlap(&missing, pack.first..pack.first + pack.blocks));
                continue;
            }
            Err(error) => return Err(error),
        };
        for (offset, frame) in frames {
            let end = frame.first + u32::from(frame.blocks);
            let needed = range::overlap(&missing, frame.first..end);
            if needed.is_empty() {
                continue;
            }
            batch.blocks += u32::from(frame.blocks);
            batch.frames.push(Fetch { offset, frame, needed });
            if batch.blocks >= BATCH_BLOCKS {
                batch.fetch(archive, staging, hashes, &mut lost, &mut done, monitor)?;
            }
        }
    }
    batch.fetch(archive, staging, hashes, &mut lost, &mut done, monitor)?;
    staging.settle()?;
    imported.done = Some(done);
    Ok(lost)
}

/// The PACKs that hold any of some ranges, each once.
fn packs_of<'a>(
    archive: &'a Archive,
    ranges: &'a [Range<StoreBlock>],
) -> impl Iterator<Item = &'a crate::archive::commit::Location> {
    let mut last = None;
    let packs = ranges.iter().flat_map(|range| archive.packs(range.start, range.end));
    packs.filter(move |pack| last.replace(pack.sequence) != Some(pack.sequence))
}

/// The ranges that PACKs say they hold.
fn covered(archive: &Archive, ranges: &[Range<StoreBlock>]) -> Vec<Range<StoreBlock>> {
    let mut covered: Vec<Range<StoreBlock>> = packs_of(archive, ranges)
        .map(|pack| pack.first..pack.first + pack.blocks)
        .collect();
    covered.sort_unstable_by_key(|range| range.start);
    covered
}

/// The ranges of what is staged whose hashes are those of the archive.
fn prove(staging: &Staging, range: Range<StoreBlock>, hashes: &mut StoredHashes<'_>) -> Result<Vec<Range<StoreBlock>>> {
    let mut content = vec![0; (range.end - range.start) as usize * BLOCK_LEN];
    // What cannot be read back is fetched again.
    if staging.read(range.start, &mut content).is_err() {
        return Ok(Vec::new());
    }
    proved(range, &content, hashes)
}

/// The ranges of some content whose hashes are those of the archive.
fn proved(range: Range<StoreBlock>, content: &[u8], hashes: &mut StoredHashes<'_>) -> Result<Vec<Range<StoreBlock>>> {
    let found: Vec<Hash> = content.par_chunks_exact(BLOCK_LEN).map(hash_of).collect();
    let mut proved = Vec::new();
    for (block, found) in range.zip(found) {
        if hashes.get(block)? == Some(found) {
            range::push(&mut proved, block..block + 1);
        }
    }
    Ok(proved)
}

/// A frame to be fetched, and what of it is needed.
struct Fetch {
    offset: u64,
    frame: FrameInfo,
    needed: Vec<Range<StoreBlock>>,
}

/// Frames fetched together.
#[derive(Default)]
struct Batch {
    frames: Vec<Fetch>,
    blocks: u32,
}

impl Batch {
    fn fetch(
        &mut self,
        archive: &Archive,
        staging: &mut Staging,
        hashes: &mut StoredHashes<'_>,
        lost: &mut Vec<Range<StoreBlock>>,
        done: &mut Restored,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let frames = std::mem::take(&mut self.frames);
        self.blocks = 0;
        let mut expected: Vec<Vec<Option<Hash>>> = Vec::with_capacity(frames.len());
        for fetch in &frames {
            let blocks = fetch.frame.first..fetch.frame.first + u32::from(fetch.frame.blocks);
            expected.push(blocks.map(|block| hashes.get(block)).collect::<Result<_>>()?);
        }
        let to = &*staging;
        let fetched: Vec<Result<()>> = frames
            .par_iter()
            .zip(&expected)
            .map(|(fetch, expected)| {
                let content = archive.frame(fetch.offset, &fetch.frame)?;
                for (block, expected) in content.chunks_exact(BLOCK_LEN).zip(expected) {
                    if expected.is_some_and(|expected| expected != hash_of(block)) {
                        let length = u64::from(fetch.frame.stored_bytes);
                        let problem = "a block is not the one that the INDEX says";
                        return Err(Error::damaged(archive.path(), fetch.offset, length, problem));
                    }
                }
                for range in &fetch.needed {
                    let at = (range.start - fetch.frame.first) as usize * BLOCK_LEN;
                    let length = (range.end - range.start) as usize * BLOCK_LEN;
                    to.write(range.start, &content[at..at + length])?;
                    monitor.advance(length as u64);
                }
                Ok(())
            })
            .collect();
        for (fetch, fetched) in frames.iter().zip(fetched) {
            match fetched {
                Ok(()) => {
                    for range in &fetch.needed {
                        done.written_bytes += bytes(range.end - range.start);
                        staging.added(range.clone())?;
                    }
                }
                Err(error @ Error::Damaged { .. }) => {
                    monitor.note(&crate::error::describe(&error));
                    lost.extend(fetch.needed.iter().cloned());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A restore: what is chosen, and where it goes.
struct Restore<'a> {
    options: &'a Options,
    manifest: Manifest,
    targets: Vec<Target>,
    /// Images of the commit that the manifest does not have any more.
    missing: Vec<PathBuf>,
    root: Arc<Root>,
    shares: bool,
    /// Tells this restore from others with the same work folder, once its commit is known.
    identity: Option<String>,
}

impl<'a> Restore<'a> {
    /// With the folder, if it is open already: it is locked once; and with the work folder, in which an interrupted restore has noted
    /// what names it gave.
    fn new(
        options: &'a Options,
        manifest: Manifest,
        summaries: &[Summary],
        (root, work_folder): (Option<Arc<Root>>, &Path),
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let chooser = Chooser::new(&options.only)?;
        let chosen: Vec<usize> = (0..manifest.images.len())
            .filter(|place| {
                manifest.images[*place]
                    .image
                    .names
                    .iter()
                    .any(|name| chooser.takes(name))
            })
            .collect();
        let known: BTreeSet<&Path> = manifest.images.iter().map(|image| image.image.path()).collect();
        let missing: Vec<PathBuf> = summaries
            .iter()
            .map(|summary| summary.path.as_path())
            .filter(|path| !known.contains(path) && chooser.takes(path))
            .map(Path::to_owned)
            .collect();
        if chosen.is_empty() && missing.is_empty() {
            return Err(Error::Usage(
                "no image of this commit matches: vmfold list shows what there is".into(),
            ));
        }
        let root = match root {
            Some(root) => root,
            None if options.dry_run => Arc::new(Root::look(&options.to, seeds::existing(&options.to))?),
            None => Arc::new(Root::lock(&options.to)?),
        };
        let noted = Noted::read(root.file(), work_folder).filter(|_| options.resume);
        let targets = target::targets(&manifest, &chosen, &root, options, noted.as_ref())?;
        let shares = can_share(root.file());
        if !shares {
            monitor.note("The filesystem cannot share extents: images are restored as plain sparse files, each with its own blocks");
        }
        Ok(Self {
            options,
            manifest,
            targets,
            missing,
            root,
            shares,
            identity: None,
        })
    }

    /// Says which commit is restored, by the hash of its record. It is not the number: copies of an archive go on in different ways.
    fn identify(&mut self, commit: &Hash) {
        let naming = if self.options.as_revision { "revision" } else { "" };
        let digits = commit.iter().map(|byte| format!("{byte:02x}"));
        self.identity = Some(digits.chain([naming.to_owned()]).collect());
    }

    fn chosen(&self) -> impl Iterator<Item = &ImageRuns> {
        self.targets.iter().map(|target| &self.manifest.images[target.image])
    }

    /// What the chosen images without copy on write refer to.
    fn nodatacow_blocks(&self) -> Vec<Range<StoreBlock>> {
        let images = self.chosen();
        let without = images.filter(|image| attributes::is_nodatacow(&image.image.metadata));
        wanted(without.flat_map(|image| &image.runs))
    }

    fn imported(&self, archive: &Path, commit: u32, id: String) -> Imported {
        Imported {
            archive: archive.to_owned(),
            commit,
            id,
            to: self.options.to.clone(),
            dry_run: self.options.dry_run,
            ..Imported::default()
        }
    }

    fn planned(&self, wanted: &[Range<StoreBlock>], seeded: &[Range<StoreBlock>], staged_bytes: u64) -> PlannedImport {
        let images = || self.chosen();
        let runs: u64 = images()
            .flat_map(|image| &image.runs)
            .filter(|run| matches!(run.content, Content::Stored(_)))
            .count() as u64;
        let data_bytes: u64 = images()
            .flat_map(|image| &image.runs)
            .filter(|run| matches!(run.content, Content::Stored(_)))
            .map(|run| bytes(run.blocks))
            .sum();
        let distinct_bytes = range::count(wanted) * bytes(1);
        let seeded_bytes = range::count(seeded) * bytes(1);
        let new_bytes = distinct_bytes - seeded_bytes;
        let copies = if self.shares {
            range::count(&self.nodatacow_blocks()) * bytes(1)
        } else {
            data_bytes
        };
        let metadata_bytes = runs * METADATA_BYTES_PER_REFERENCE + images().count() as u64 * bytes(1);
        let free_bytes =
            rustix::fs::fstatvfs(self.root.file()).map_or(u64::MAX, |found| found.f_bavail * found.f_frsize);
        PlannedImport {
            images: images().count() as u64,
            logical_bytes: images().map(|image| image.image.size).sum(),
            data_bytes,
            distinct_bytes,
            seeded_bytes,
            new_bytes,
            needed_bytes: (new_bytes + copies + metadata_bytes).saturating_sub(staged_bytes),
            free_bytes,
            shares: self.shares,
        }
    }

    fn check_space(&self, planned: &PlannedImport) -> Result<()> {
        if planned.needed_bytes.saturating_add(RESERVE_BYTES) > planned.free_bytes {
            return Err(Error::DoesNotFit {
                path: self.options.to.clone(),
                needed_bytes: planned.needed_bytes + RESERVE_BYTES,
                free_bytes: planned.free_bytes,
            });
        }
        Ok(())
    }

    /// The chosen images whose manifest, corrections and hashes do not go together any more.
    fn mixed_up(
        &self,
        summaries: &[Summary],
        doubtful: bool,
        hashes: &mut StoredHashes<'_>,
        monitor: &dyn Monitor,
    ) -> Result<BTreeSet<usize>> {
        self.mixed_up_by(summaries, doubtful, monitor, |first, blocks, digest| {
            hashes.add_to(digest, first, blocks)
        })
    }

    /// The same with hashes from elsewhere; `stored` tells whether it had them all. Where it had not, an image is taken to be well,
    /// unless it is `doubtful` because corrections may be lost.
    fn mixed_up_by(
        &self,
        summaries: &[Summary],
        doubtful: bool,
        monitor: &dyn Monitor,
        mut stored: impl FnMut(StoreBlock, u32, &mut Digest<'_>) -> Result<bool>,
    ) -> Result<BTreeSet<usize>> {
        let mut mixed_up = BTreeSet::new();
        let summaries = by_path(summaries);
        for target in &self.targets {
            let image = &self.manifest.images[target.image];
            let Some(summary) = summaries.get(image.image.path()) else {
                continue;
            };
            let has_gaps = image.runs.iter().any(|run| run.content == Content::Lost);
            let mut all = true;
            let found = digest(&image.runs, monitor, |first, blocks, digest| {
                all &= stored(first, blocks, digest)?;
                Ok(())
            })?;
            let is_wrong = all && !has_gaps && (found != summary.digest || image.image.size != summary.size);
            if is_wrong || (doubtful && (!all || has_gaps)) {
                mixed_up.insert(target.image);
            }
        }
        Ok(mixed_up)
    }

    /// Says what is lost, and places the rest.
    fn finish(
        &self,
        work: &mut Open,
        lost: &[Range<StoreBlock>],
        mixed_up: &BTreeSet<usize>,
        summaries: &[Summary],
        imported: &mut Imported,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        let lost_blocks = range::joined(lost.iter().cloned());
        let whole = |size| ByteRange { start: 0, length: size };
        let mut damaged = BTreeSet::new();
        for path in &self.missing {
            let size = summaries.iter().find(|one| one.path == *path).map_or(0, |one| one.size);
            imported.lost.push(LostImage {
                path: path.clone(),
                restored_as: None,
                ranges: vec![whole(size)],
            });
        }
        for target in &self.targets {
            let image = &self.manifest.images[target.image];
            let ranges = if mixed_up.contains(&target.image) {
                vec![whole(image.image.size)]
            } else {
                lost_ranges(&image.runs, image.image.size, &lost_blocks)
            };
            if !ranges.is_empty() {
                damaged.insert(target.image);
                imported.lost.push(LostImage {
                    path: image.image.path().to_owned(),
                    restored_as: None,
                    ranges,
                });
            }
        }
        if !imported.lost.is_empty() && !self.options.partial {
            imported.done = None;
            return Ok(());
        }
        let counts = target::place(self, work, &damaged, mixed_up, &lost_blocks, monitor)?;
        for lost in &mut imported.lost {
            let target = self.targets.iter().find(|target| {
                damaged.contains(&target.image) && self.manifest.images[target.image].image.path() == lost.path
            });
            lost.restored_as = target
                .filter(|target| !mixed_up.contains(&target.image))
                .map(Target::partial_name);
        }
        let done = imported.done.get_or_insert_default();
        done.images = (self.targets.len() - damaged.len()) as u64;
        (done.clones, done.shared_bytes, done.copied_bytes) = (counts.clones, counts.cloned_bytes, counts.copied_bytes);
        Ok(())
    }
}

/// Which images are asked for.
struct Chooser {
    patterns: Option<globset::GlobSet>,
}

impl Chooser {
    fn new(only: &[String]) -> Result<Self> {
        if only.is_empty() {
            return Ok(Self { patterns: None });
        }
        // A folder means everything in it.
        let trimmed = only.iter().map(|pattern| pattern.trim_end_matches('/'));
        let all: Vec<String> = trimmed
            .flat_map(|pattern| [pattern.to_owned(), format!("{pattern}/**")])
            .collect();
        Ok(Self {
            patterns: Some(patterns(&all)?),
        })
    }

    fn takes(&self, path: &Path) -> bool {
        self.patterns.as_ref().is_none_or(|patterns| patterns.is_match(path))
    }
}

/// Where what is needed on the way is kept for a commit of an archive; of a pipe, whose commits are not known, for all of them.
fn work_folder(options: &Options, archive: &[u8; 16], commit: u32) -> PathBuf {
    let tag = crate::shown::hex(archive);
    options.to.join(format!(".vmfold-import-{}-{commit}", &tag[..8]))
}

/// The work folder of a restore, before it is made.
struct Work {
    root: Arc<Root>,
    folder: PathBuf,
    /// What the restore that is continued has noted; none if there is none.
    noted: Option<Noted>,
}

impl Work {
    /// Looks for what an interrupted restore has left. None goes on here: the folder that is restored to is locked, but for a dry run.
    fn prepare(restore: &Restore<'_>, folder: PathBuf) -> Result<Self> {
        let noted = Noted::read(restore.root.file(), &folder);
        if noted.is_some() && !restore.options.resume && !restore.options.dry_run {
            return Err(Error::Usage(format!(
                "an import was interrupted here: --resume goes on with it, and deleting `{}` begins anew",
                shown(&folder)
            )));
        }
        Ok(Self {
            root: Arc::clone(&restore.root),
            folder,
            noted,
        })
    }

    /// Bytes that an interrupted restore has on disk already.
    fn staged_bytes(&self) -> u64 {
        self.noted.as_ref().map_or(0, Noted::staged_bytes)
    }

    fn open(self, end: StoreBlock) -> Result<Open> {
        let mut staging = Staging::open(self.root.file(), &self.folder)?;
        staging.make_room(end)?;
        let claimed = staging.noted().claimed().iter();
        let claimed = claimed.filter(|range| range.end <= end).cloned().collect();
        Ok(Open {
            folder: self.folder,
            staging,
            claimed,
        })
    }
}

/// The work folder, open.
struct Open {
    folder: PathBuf,
    staging: Staging,
    claimed: Vec<Range<StoreBlock>>,
}

impl Open {
    /// Bytes that are staged.
    fn staged_bytes(&self) -> u64 {
        self.staging.staged_bytes()
    }

    /// Removes the folder after a restore that ended, and says what is kept after one that did not.
    fn end(self, done: Result<()>, imported: Imported, monitor: &dyn Monitor) -> Result<Imported> {
        match done {
            Ok(()) => {
                self.staging.remove()?;
                Ok(imported)
            }
            Err(error) => {
                monitor.note(&format!(
                    "What was restored so far is kept in `{}`: --resume goes on from there",
                    shown(&self.folder)
                ));
                Err(error)
            }
        }
    }
}

/// Sets what an image or folder has beside its content, and notes what could not be set.
fn apply(
    file: &std::fs::File,
    path: &Path,
    metadata: &crate::content::Metadata,
    options: &Options,
    monitor: &dyn Monitor,
) -> Result<()> {
    let how = attributes::How {
        numeric_owner: options.numeric_owner,
        preserve_special: options.preserve_special,
    };
    let not = attributes::apply(file, path, metadata, how)?;
    if !not.problems.is_empty() {
        let problems = some_of(&not.problems);
        monitor.note(&format!("`{}`: could not set {problems}", shown(path)));
    }
    if !not.left_out.is_empty() {
        let left_out = some_of(&not.left_out);
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

/// What `place::fill` counts, added up.
fn add(one: place::Counts, other: place::Counts) -> place::Counts {
    place::Counts {
        clones: one.clones + other.clones,
        cloned_bytes: one.cloned_bytes + other.cloned_bytes,
        copied_bytes: one.copied_bytes + other.copied_bytes,
    }
}
