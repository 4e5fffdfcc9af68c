//! Importing from a pipe: records are used as they come, and memory holds the manifests and one pack.
//!
//! Every block that comes goes into the staging file, since a later commit may need it; with patterns, only what the chosen images need.

use std::cell::Cell;
use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;

use super::seeds::Seeds;
use super::{Open, Options, PROVED_BLOCKS, Restore, Work, target, work_folder};
use crate::archive::commit::{Commit, CommitLocation};
use crate::archive::head::Head;
use crate::archive::manifest::{self, Announced, Builder, Manifest, Part};
use crate::archive::reader::{Committed, find_commit};
use crate::archive::record::{Header, Kind, hash_of};
use crate::archive::stream::{Event, Stream};
use crate::archive::{index, pack};
use crate::block::{BLOCK_LEN, ByteRange, bytes};
use crate::content::StoreBlock;
use crate::error::{Error, Result};
use crate::exec::hashes::HashLog;
use crate::exec::restore::folder::Root;
use crate::monitor::Monitor;
use crate::plan::import::{SeedMatch, wanted};
use crate::range;
use crate::report::{Imported, Restored};
use crate::store::{InputPipe, Reader, Store};

/// What messages call the input.
const STDIN: &str = "stdin";

pub(super) fn from_pipe(options: &Options, monitor: &dyn Monitor) -> Result<Imported> {
    let pipe = InputPipe::new(monitor).map_err(Error::io("read", Path::new(STDIN)))?;
    import_in_order(&pipe, options, monitor)
}

/// Imports from a store that is read once and in order; [`Options::source`] is not looked at.
///
/// # Errors
/// As for [`super::import`].
pub fn import_in_order(store: &dyn Store, options: &Options, monitor: &dyn Monitor) -> Result<Imported> {
    let mut input = Reader::new(store, 0);
    let mut importer = Importer {
        options,
        monitor,
        archive: None,
        epoch: Epoch::default(),
        plan: None,
        work: None,
        root: None,
        seeds: None,
        hashes: HashLog::new(0, options.to.clone()),
        has_all_hashes: true,
        wants_seeds: super::seeds::are_possible(options),
        committed: None,
        done: Restored::default(),
        is_damaged: Cell::new(false),
        is_damaged_since: Cell::new(false),
    };
    let read = importer.read(&mut Stream::new(&mut input, 0));
    let ended = match read {
        Ok(Some(planned)) => {
            drain(&mut input);
            return Ok(planned);
        }
        Ok(None) => importer.finish(),
        Err(error) => Err(error),
    };
    // Whoever writes to the pipe shall not fail because of what is not needed.
    if ended.is_ok() {
        drain(&mut input);
    }
    let (done, imported) = match ended {
        Ok(imported) => (Ok(()), imported),
        Err(error) => (Err(error), Imported::default()),
    };
    match importer.work.take() {
        Some(work) => work.end(done, imported, monitor),
        None => done.map(|()| imported),
    }
}

fn drain(input: &mut impl Read) {
    let _ = std::io::copy(input, &mut std::io::sink());
}

/// What an epoch said so far.
#[derive(Default)]
struct Epoch {
    number: u64,
    builder: Builder,
    announced: Vec<Announced>,
    announced_blocks: usize,
    announced_end: StoreBlock,
    /// Whether a PLAN was damaged.
    doubtful: bool,
}

/// What is wanted of the blocks that come.
struct Plan {
    epoch: u64,
    /// None means all.
    wanted: Option<Vec<Range<StoreBlock>>>,
    seeded: Vec<SeedMatch>,
}

struct Importer<'a> {
    options: &'a Options,
    monitor: &'a dyn Monitor,
    archive: Option<[u8; 16]>,
    epoch: Epoch,
    plan: Option<Plan>,
    work: Option<Open>,
    /// The folder that is restored to, locked from the first plan on.
    root: Option<Arc<Root>>,
    seeds: Option<Seeds>,
    hashes: HashLog,
    has_all_hashes: bool,
    wants_seeds: bool,
    committed: Option<(Committed, Manifest, bool)>,
    done: Restored,
    is_damaged: Cell<bool>,
    /// Whether anything was damaged since the commit that counts.
    is_damaged_since: Cell<bool>,
}

impl Importer<'_> {
    /// Reads records to the end, or to the commit that was asked for. Returns the plan alone for a dry run.
    fn read(&mut self, stream: &mut Stream<impl Read>) -> Result<Option<Imported>> {
        let path = Path::new(STDIN);
        let failed = |error| {
            if self.monitor.interrupted() {
                Error::Interrupted
            } else {
                Error::io("read", path)(error)
            }
        };
        while let Some(event) = stream.next_event().map_err(failed)? {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            match event {
                Event::Record { header, offset, body } => {
                    if *self.archive.get_or_insert(header.archive) != header.archive {
                        self.damaged(offset, 0, "a record of another archive")?;
                        continue;
                    }
                    let taken = self.take(&header, offset, &body);
                    let Taken { planned, ended } = match taken {
                        Err(Error::Damaged { range, problem, .. }) => {
                            let range = range.unwrap_or(ByteRange {
                                start: offset,
                                length: 0,
                            });
                            self.damaged(range.start, range.length, &problem)?;
                            Taken::default()
                        }
                        other => other?,
                    };
                    if planned.is_some() || ended {
                        return Ok(planned);
                    }
                }
                Event::Damage { range, problem, header } => {
                    self.epoch.doubtful |= header.is_none_or(|header| header.kind == Kind::Plan);
                    self.damaged(range.start, range.length, problem)?;
                }
                Event::Unsupported(problem) => {
                    return Err(Error::Unsupported {
                        path: path.to_owned(),
                        problem,
                    });
                }
            }
        }
        Ok(None)
    }

    /// Damage ends the import, unless what is intact is wanted.
    fn damaged(&self, start: u64, length: u64, problem: &str) -> Result<()> {
        let error = Error::damaged(Path::new(STDIN), start, length, problem);
        self.is_damaged.set(true);
        self.is_damaged_since.set(true);
        if self.options.partial {
            self.monitor.note(&crate::error::describe(&error));
            Ok(())
        } else {
            Err(error)
        }
    }

    fn take(&mut self, header: &Header, offset: u64, body: &[u8]) -> Result<Taken> {
        let malformed = |problem: &str| Error::damaged(Path::new(STDIN), offset, header.body_bytes, problem);
        let mut taken = Taken::default();
        if header.epoch != self.epoch.number {
            self.epoch = Epoch {
                number: header.epoch,
                ..Epoch::default()
            };
        }
        match header.kind {
            Kind::Head => {
                Head::decode(body).map_err(|problem| Error::Unsupported {
                    path: STDIN.into(),
                    problem,
                })?;
            }
            Kind::Plan => match manifest::decode(body).map_err(malformed)?.part {
                Part::Blocks(announced) => {
                    self.epoch.announced_end = self.epoch.announced_end.max(announced.end());
                    self.epoch.announced_blocks += announced.fingerprints.len();
                    if self.wants_seeds && self.epoch.announced_blocks <= ANNOUNCED_BLOCKS_MAX {
                        self.epoch.announced.push(announced);
                    }
                }
                part => self.epoch.builder.add(part).map_err(malformed)?,
            },
            Kind::Pack => {
                taken.planned = self.plan(header, malformed)?;
                if taken.planned.is_none() {
                    self.take_pack(body, malformed)?;
                }
            }
            Kind::Index => {
                let (first, hashes) = index::decode(body).map_err(malformed)?;
                self.take_index(first, hashes, malformed)?;
            }
            Kind::Commit => {
                taken.planned = self.plan(header, malformed)?;
                if taken.planned.is_none() {
                    taken.ended = self.take_commit(header, offset, body, malformed)?;
                }
            }
            Kind::Tail | Kind::Other(_) => {}
        }
        Ok(taken)
    }

    /// Plans an epoch, once its manifest is known and before its blocks come.
    fn plan(&mut self, header: &Header, malformed: impl Fn(&str) -> Error) -> Result<Option<Imported>> {
        if self.plan.as_ref().is_some_and(|plan| plan.epoch == header.epoch) {
            return Ok(None);
        }
        let manifest = self.epoch.builder.clone().finish().map_err(&malformed)?;
        if manifest.images.is_empty() && self.epoch.doubtful {
            return Err(malformed("what says which images its blocks are for is lost"));
        }
        let folder = work_folder(self.options, &header.archive, 1);
        let root = self.root.clone();
        let restore = Restore::new(self.options, manifest, &[], (root, &folder), self.monitor)?;
        self.root = Some(Arc::clone(&restore.root));
        let ranges = wanted(restore.chosen().flat_map(|image| &image.runs));
        let work = match &self.work {
            Some(_) => None,
            None => Some(Work::prepare(&restore, folder)?),
        };
        let noted = match &self.work {
            Some(open) => Some(open.staging.noted()),
            None => work.as_ref().and_then(|work| work.noted.as_ref()),
        };
        target::check_names(&restore, noted)?;
        if self.seeds.is_none() {
            target::check_use(&restore, noted)?;
            self.seeds = Seeds::open(
                self.options,
                restore.shares,
                &ranges,
                self.epoch.announced.iter(),
                self.monitor,
            )?;
        }
        let seeded = match &self.seeds {
            Some(seeds) => seeds.find(&ranges, self.epoch.announced.iter(), self.monitor)?,
            None => Vec::new(),
        };
        let seeded_ranges: Vec<_> = seeded.iter().map(|one| one.first..one.first + one.blocks).collect();
        let staged = match (&self.work, &work) {
            (Some(open), _) => open.staged_bytes(),
            (None, Some(work)) => work.staged_bytes(),
            (None, None) => 0,
        };
        let planned = restore.planned(&ranges, &seeded_ranges, staged);
        if self.options.dry_run {
            let mut imported = restore.imported(Path::new(STDIN), 0, String::new());
            imported.planned = planned;
            return Ok(Some(imported));
        }
        restore.check_space(&planned)?;
        if let Some(work) = work {
            let mut open = work.open(0)?;
            // Blocks come anyway: what an earlier attempt staged is written once more.
            open.claimed.clear();
            self.work = Some(open);
        }
        self.monitor.phase("Restoring blocks", planned.distinct_bytes);
        self.plan = Some(Plan {
            epoch: header.epoch,
            wanted: (!self.options.only.is_empty()).then_some(ranges),
            seeded,
        });
        Ok(None)
    }

    fn take_pack(&mut self, body: &[u8], malformed: impl Fn(&str) -> Error + Sync) -> Result<()> {
        let (Some(plan), Some(work)) = (&self.plan, &mut self.work) else {
            return Ok(());
        };
        let staging = &mut work.staging;
        let frames = pack::decode_table(body, body.len() as u64).map_err(&malformed)?;
        let end = frames.last().map_or(0, |frame| frame.first + u32::from(frame.blocks));
        staging.make_room(end)?;
        // What corrections bring is not in the plan.
        let announced_end = self.epoch.announced_end;
        for frames in frames.chunks(FRAMES_AT_ONCE) {
            let to = &*staging;
            let written: Result<Vec<Written>> = frames
                .par_iter()
                .map(|frame| {
                    let content = frame
                        .slice(body)
                        .and_then(|stored| frame.decode(stored))
                        .map_err(&malformed)?;
                    let all = frame.first..frame.first + u32::from(frame.blocks);
                    let mut needed = match &plan.wanted {
                        Some(wanted) => range::overlap(wanted, all.clone()),
                        None => vec![all.clone()],
                    };
                    if all.end > announced_end {
                        needed = vec![all.clone()];
                    }
                    let mut shared = Vec::new();
                    if let Some(seeds) = &self.seeds {
                        for range in &needed {
                            share(seeds, &plan.seeded, range, &content, frame.first, to, &mut shared);
                        }
                        needed = range::without(&needed, &shared);
                    }
                    for range in &needed {
                        let at = (range.start - frame.first) as usize * BLOCK_LEN;
                        let length = (range.end - range.start) as usize * BLOCK_LEN;
                        to.write(range.start, &content[at..at + length])?;
                    }
                    Ok(Written { needed, shared })
                })
                .collect();
            for Written { needed, shared } in written? {
                for range in &needed {
                    self.done.written_bytes += bytes(range.end - range.start);
                }
                for range in &shared {
                    self.done.seeded_bytes += bytes(range.end - range.start);
                }
                for range in needed.into_iter().chain(shared) {
                    self.monitor.advance(bytes(range.end - range.start));
                    staging.added(range)?;
                }
            }
        }
        Ok(())
    }

    /// Proves what was staged, and keeps the hashes for the digests of images.
    fn take_index(
        &mut self,
        first: StoreBlock,
        hashes: &[crate::archive::record::Hash],
        malformed: impl Fn(&str) -> Error,
    ) -> Result<()> {
        if self.hashes.end() == first {
            self.hashes.extend(hashes)?;
        } else {
            self.has_all_hashes = false;
        }
        let Some(work) = &self.work else { return Ok(()) };
        let end = first + u32::try_from(hashes.len()).unwrap_or(0);
        for range in range::parts(first..end, PROVED_BLOCKS) {
            for present in work.staging.present(range) {
                let mut content = vec![0; (present.end - present.start) as usize * BLOCK_LEN];
                work.staging.read(present.start, &mut content)?;
                let expected = &hashes[(present.start - first) as usize..];
                let differs = content
                    .par_chunks_exact(BLOCK_LEN)
                    .zip(expected)
                    .any(|(block, hash)| hash_of(block) != *hash);
                if differs {
                    return Err(malformed("a block is not the one that the INDEX says"));
                }
            }
        }
        Ok(())
    }

    /// True if it is the commit that was asked for.
    fn take_commit(
        &mut self,
        header: &Header,
        offset: u64,
        body: &[u8],
        malformed: impl Fn(&str) -> Error,
    ) -> Result<bool> {
        let commit = Commit::decode(body).map_err(&malformed)?;
        let manifest = std::mem::take(&mut self.epoch.builder).finish().map_err(malformed)?;
        let committed = Committed {
            commit,
            location: CommitLocation {
                offset,
                length: 0,
                body_hash: header.body_hash,
            },
            salvaged: false,
        };
        let wanted = match self.options.commit.as_deref() {
            None | Some("latest") => false,
            Some(name) if find_commit(std::slice::from_ref(&committed), name).is_some() => true,
            Some(_) => return Ok(false),
        };
        self.committed = Some((committed, manifest, self.epoch.doubtful));
        self.is_damaged_since.set(false);
        Ok(wanted)
    }

    /// Makes the images of the last commit that came.
    fn finish(&mut self) -> Result<Imported> {
        let path = Path::new(STDIN);
        let Some((committed, manifest, doubtful)) = self.committed.take() else {
            let whole = self.archive.is_some() && !self.is_damaged.get();
            if let Some(commit) = self.options.commit.clone().filter(|_| whole) {
                return Err(Error::NoSuchCommit {
                    path: path.to_owned(),
                    commit,
                });
            }
            return Err(match self.archive {
                None if !self.is_damaged.get() => Error::NotAnArchive { path: path.to_owned() },
                _ => Error::Damaged {
                    path: path.to_owned(),
                    range: None,
                    problem: "it ends before its COMMIT".into(),
                },
            });
        };
        // What is open here cannot be told from what others use.
        self.seeds = None;
        let images = &committed.commit.images;
        let Some(work) = &mut self.work else {
            return Err(Error::Damaged {
                path: path.to_owned(),
                range: None,
                problem: "nothing was intact that says what its blocks are for".into(),
            });
        };
        let root = self.root.clone();
        let mut restore = Restore::new(self.options, manifest, images, (root, &work.folder), self.monitor)?;
        restore.identify(&committed.location.body_hash);
        let ranges = wanted(restore.chosen().flat_map(|image| &image.runs));
        let lost: Vec<_> = ranges
            .iter()
            .flat_map(|range| work.staging.missing(range.clone()))
            .collect();
        if !lost.is_empty() && self.options.only.is_empty() && !self.options.partial {
            return Err(Error::Damaged {
                path: path.to_owned(),
                range: None,
                problem: "blocks that its images refer to did not come".into(),
            });
        }
        if !lost.is_empty() && !self.options.only.is_empty() && !self.options.partial {
            return Err(Error::Usage(
                "a later commit needs blocks that an earlier one did not: save the archive to a file and restore from there".into(),
            ));
        }
        work.staging.settle()?;
        let (log, has_all) = (&self.hashes, self.has_all_hashes);
        let mixed_up = restore.mixed_up_by(
            &committed.commit.images,
            doubtful,
            self.monitor,
            |first, blocks, digest| {
                if !has_all || first + blocks > log.end() {
                    return Ok(false);
                }
                for part in range::parts(first..first + blocks, PROVED_BLOCKS) {
                    digest.update(log.read(part.start, part.end - part.start)?.as_flattened())?;
                }
                Ok(true)
            },
        )?;
        let mut imported = restore.imported(path, committed.commit.number, committed.id());
        let is_last = self.options.commit.as_deref().is_none_or(|name| name == "latest");
        imported.later_damage = is_last && self.is_damaged_since.get();
        imported.planned = restore.planned(&ranges, &[], 0);
        imported.planned.seeded_bytes = self.done.seeded_bytes;
        imported.planned.new_bytes = imported.planned.distinct_bytes.saturating_sub(self.done.seeded_bytes);
        imported.done = Some(self.done.clone());
        restore.finish(
            work,
            &lost,
            &mixed_up,
            &committed.commit.images,
            &mut imported,
            self.monitor,
        )?;
        Ok(imported)
    }
}

/// Blocks of a stream that seeds are looked for at most: 256 MiB of fingerprints, for 256 GiB of blocks.
const ANNOUNCED_BLOCKS_MAX: usize = 1 << 26;

/// Frames of a pack that are decoded together.
const FRAMES_AT_ONCE: usize = 8;

/// What a record led to.
#[derive(Default)]
struct Taken {
    /// The plan, if it is all that was wanted.
    planned: Option<Imported>,
    /// Nothing more is needed.
    ended: bool,
}

struct Written {
    needed: Vec<Range<StoreBlock>>,
    shared: Vec<Range<StoreBlock>>,
}

/// Shares the parts of a range that seeds hold, each compared with what came, before and after.
fn share(
    seeds: &Seeds,
    seeded: &[SeedMatch],
    range: &Range<StoreBlock>,
    content: &[u8],
    content_first: StoreBlock,
    staging: &crate::exec::restore::staging::Staging,
    shared: &mut Vec<Range<StoreBlock>>,
) {
    let from = seeded.partition_point(|one| one.first + one.blocks <= range.start);
    for one in seeded[from..].iter().take_while(|one| one.first < range.end) {
        let part = one.first.max(range.start)..(one.first + one.blocks).min(range.end);
        let slot = one.slot + (part.start - one.first);
        let Ok(found) = seeds.content(slot, part.end - part.start) else {
            continue;
        };
        let expected = &content[(part.start - content_first) as usize * BLOCK_LEN..][..found.len()];
        for same in equal_blocks(part.start, &found, expected) {
            let slot = slot + (same.start - part.start);
            if !seeds.share(slot, same.clone(), staging) {
                continue;
            }
            let mut now = vec![0; (same.end - same.start) as usize * BLOCK_LEN];
            let expected = &content[(same.start - content_first) as usize * BLOCK_LEN..][..now.len()];
            if staging.read(same.start, &mut now).is_ok() && now == expected {
                shared.push(same);
            }
        }
    }
}

/// The maximal ranges of blocks, the first of which is `first`, in which two contents are equal.
fn equal_blocks(first: StoreBlock, one: &[u8], other: &[u8]) -> Vec<Range<StoreBlock>> {
    let pairs = one.chunks_exact(BLOCK_LEN).zip(other.chunks_exact(BLOCK_LEN));
    range::where_true((first..).zip(pairs.map(|(one, other)| one == other)))
}
