//! Plans a restore and carries it out. First every wanted block is put once into one file, the *staging file*. Then the images are made from
//! it, and share its extents if the filesystem can do that. The staging file is removed at the end. Its extents stay as long as images refer
//! to them.
//!
//! Blocks come from a [`source::BlockSource`], or from a [`seed::Seed`] if the disk holds them already.

pub mod archive;
pub mod backup;
mod destination;
pub mod fill;
pub mod folder;
mod images;
pub mod names;
pub mod pipe;
pub mod replaced;
pub mod seed;
mod sink;
pub mod source;
pub mod staging;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;

use self::destination::Interrupted;
use self::folder::Root;
use self::images::{Losses, RestoreSite, make_images};
use self::seed::{PROVED_BLOCKS, Seed};
use self::sink::{CountingSink, SeedUse, StagingSink};
use self::source::{BlockHashes, BlockSink, BlockSource, Offer, Stopped};
use self::staging::{Journal, Staging};
use crate::archive::announced::AnnouncedBlocks;
use crate::archive::list::by_path;
use crate::archive::manifest::ImageRuns;
use crate::block::{BLOCK_LEN, bytes};
use crate::content::Content;
use crate::error::{Error, Result, describe};
use crate::exec::hashes::{Digest, digest};
use crate::fs::compresses_files;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::restore::{
    Contents, Destination, LostImage, RESERVE_BYTES, RestorePlan, Selected, lost_ranges, name_as_revisions,
    partial_names, revisions_to_name, select, wanted_by,
};
use crate::range;
use crate::shown::{hex, shown};

/// Which images are restored, where to, and how.
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub struct RestoreOptions {
    /// The folder that is restored to.
    pub to: PathBuf,
    /// Patterns that choose images. If it is empty, all are restored.
    pub only: Vec<String>,
    /// Whether images may replace existing ones.
    pub replace: bool,
    /// Whether an interrupted restore may be resumed.
    pub resume: bool,
    /// Whether the intact parts of a damaged source are restored.
    pub partial: bool,
    /// Whether images are restored as revisions of Qubes OS.
    pub as_revision: bool,
    /// Whether owners are taken by number, even if their names are known on this host.
    pub numeric_owner: bool,
    /// Whether set-user-ID, set-group-ID and sticky bits, and attributes of `security.*` and `trusted.*`, are restored.
    pub preserve_special: bool,
    /// Whether the filesystem is told to compress what is written.
    pub compress: bool,
    /// Bytes that may be written at most. `None` means as many as are free.
    pub work_space_bytes: Option<u64>,
}

/// The counts of a restore.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// Images that were restored as a whole and have their names.
    pub images: u64,
    /// Bytes of blocks that were written from the source.
    pub written_bytes: u64,
    /// Bytes of blocks that were shared with images on the disk.
    pub seeded_bytes: u64,
    /// Bytes of blocks that an interrupted restore had staged.
    pub resumed_bytes: u64,
    /// Ranges of images that share extents of the staging file.
    pub clones: u64,
    /// Bytes of these ranges.
    pub shared_bytes: u64,
    /// Bytes of images that were copied because they could not be shared.
    pub copied_bytes: u64,
}

/// How a restore ended.
#[derive(Debug)]
pub struct RestoreOutcome {
    /// The plan.
    pub plan: RestorePlan,
    /// The counts of what was done. It is `None` if the plan was not carried out, or if images are lost and only whole ones were asked for.
    pub restored: Option<Restored>,
    /// Images that cannot be restored as a whole.
    pub lost: Vec<LostImage>,
    /// Whether the archive is damaged behind the commit, so that a later one may be lost.
    pub later_damage: bool,
    /// Why the source did not hand over all that it has.
    pub stopped: Option<Stopped>,
}

/// The blocks that seeds are opened for.
#[derive(Debug, Clone, Copy)]
pub enum Sought<'a> {
    /// Wanted blocks, and fingerprints of blocks.
    Announced(&'a [Range<StoreBlock>], &'a [AnnouncedBlocks]),
    /// Blocks of which nothing is known before they come.
    Unknown,
}

/// Opens the images on the disk that may hold some of the blocks. It returns `None` if there are no such images.
pub type OpenSeed<'a> = dyn Fn(Sought<'_>) -> Result<Option<Box<dyn Seed>>> + 'a;

/// A plan, and what its execution needs beside it.
struct PreparedRestore {
    plan: RestorePlan,
    /// The [`Offer::known_end`] of the offer that the plan is for.
    known_end: StoreBlock,
}

/// A restore. [`Restore::plan`] makes a plan, and [`Restore::execute`] carries it out.
pub struct Restore<'a> {
    options: &'a RestoreOptions,
    source: &'a mut dyn BlockSource,
    open_seed: &'a OpenSeed<'a>,
    /// The images on the disk that blocks are shared with. They are opened for the first plan, if there are any.
    seed: Option<Box<dyn Seed>>,
    /// Whether `open_seed` was called.
    is_seed_opened: bool,
    /// The folder that is restored to.
    root: Root,
    /// The plan that is carried out next.
    planned: Option<PreparedRestore>,
    monitor: &'a dyn Monitor,
}

impl<'a> Restore<'a> {
    /// Makes a restore from a source to a folder, which may not exist yet.
    pub fn new(
        options: &'a RestoreOptions,
        root: Root,
        source: &'a mut dyn BlockSource,
        open_seed: &'a OpenSeed<'a>,
        monitor: &'a dyn Monitor,
    ) -> Self {
        Self {
            options,
            source,
            open_seed,
            seed: None,
            is_seed_opened: false,
            root,
            planned: None,
            monitor,
        }
    }

    /// Plans the restore. It makes and changes nothing. The last commit of a pipe is not known before its end, so the plan is for its first
    /// commit.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::FolderInTheWay`] or [`Error::InUse`] if a name is taken; [`Error::Usage`] if no image is chosen;
    /// [`Error::NoSuchCommit`]; the errors of [`BlockSource::offer`] and of `open_seed`; [`Error::Io`] if the folder cannot be read.
    pub fn plan(&mut self) -> Result<()> {
        let Some(offer) = self.source.offer()? else {
            return Err(self.source.nothing_committed());
        };
        let journal = Journal::read(self.root.file(), &self.work_folder());
        self.planned = Some(self.plan_offer(offer, journal.as_ref())?);
        Ok(())
    }

    /// Returns the plan without carrying it out, and makes it first if [`Restore::plan`] was not called.
    ///
    /// # Errors
    /// Those of [`Restore::plan`].
    pub fn into_plan(mut self) -> Result<RestoreOutcome> {
        let mut plan = self.take_plan()?.plan;
        let mut losses = Losses::default();
        if !self.source.announces() {
            plan = self.survey()?;
        }
        Ok(RestoreOutcome {
            restored: None,
            lost: lost_images(&plan, &mut losses, self.source),
            later_damage: self.source.has_later_damage(),
            stopped: self.source.stopped(),
            plan,
        })
    }

    /// Reads a source that announces nothing to its end, and keeps nothing of it. Returns the plan for all that it holds.
    fn survey(&mut self) -> Result<RestorePlan> {
        let seed = self.seed.take();
        let (options, root) = (self.options, &self.root);
        let look = |offer: &Offer| {
            let selected = select(&offer.contents, &options.only)?;
            destination::look(root, &selected.images, Interrupted::default())?
                .check_names(options.replace, options.as_revision)
        };
        let (contents, counts) = read_all(self.source, seed.as_deref(), look, self.monitor)?;
        self.plan_committed(contents, &Journal::default(), &counts)
    }

    /// Takes the plan, and makes it first if there is none.
    fn take_plan(&mut self) -> Result<PreparedRestore> {
        if self.planned.is_none() {
            self.plan()?;
        }
        self.planned.take().ok_or_else(|| self.source.nothing_committed())
    }

    /// Carries the plan out. For a pipe, it goes on with the commits that follow.
    ///
    /// # Errors
    /// Before anything is written: [`Error::Usage`] if an interrupted restore lies there and is not resumed, and [`Error::DoesNotFit`].
    /// Later: those of the source, [`Error::NoSpace`] or [`Error::Io`] if the folder cannot be written, and [`Error::Interrupted`]. The
    /// blocks that were staged until then are kept if a later run can use them, which takes a source that [knows](BlockSource::knows_hashes)
    /// their hashes. Otherwise nothing is left.
    pub fn execute(mut self) -> Result<RestoreOutcome> {
        let planned = self.take_plan()?;
        let folder = self.work_folder();
        if !self.options.resume && Journal::read(self.root.file(), &folder).is_some() {
            return Err(Error::Usage(format!(
                "an import was interrupted here: --resume goes on with it, and deleting `{}` begins anew",
                shown(&folder)
            )));
        }
        if self.options.compress && !compresses_files(self.root.file()) {
            return Err(Error::Usage(format!(
                "--compress takes btrfs, and `{}` is on another filesystem",
                shown(&self.options.to)
            )));
        }
        self.check_space(&planned.plan)?;
        self.root.make()?;
        let mut staging = Staging::open(self.root.file(), &folder)?;
        let result = self.run(planned, &mut staging);
        if result.is_ok() {
            staging.remove()?;
        } else if self.source.knows_hashes() || staging.has_images() {
            // A run that was told to resume, or that always does, is repeated as it was.
            let how = if self.options.resume {
                "running the same again"
            } else {
                "--resume"
            };
            let folder = shown(&folder);
            self.monitor.note(&format!(
                "What was restored so far is kept in `{folder}`: {how} goes on from there"
            ));
        } else {
            // The blocks serve no later run, which could not tell which blocks of the source they are. The error is what the user must learn.
            let _ = staging.remove();
            self.root.remove_made();
        }
        result
    }

    /// Refuses a plan that does not fit. What is compressed may fit all the same, which shows when it is written.
    fn check_space(&self, plan: &RestorePlan) -> Result<()> {
        if let Some(allowed_bytes) = self.options.work_space_bytes.filter(|_| self.source.announces())
            && plan.bytes.needed_bytes > allowed_bytes
        {
            return Err(Error::WorkSpace {
                path: self.options.to.clone(),
                allowed_bytes,
            });
        }
        match plan.check_space(&self.options.to) {
            Err(error @ Error::DoesNotFit { .. }) if self.options.compress => {
                self.monitor
                    .note(&format!("Goes on since it is compressed: {}", describe(&error)));
                Ok(())
            }
            other => other,
        }
    }

    /// The path of the work folder for this commit of the archive. It holds the staging file and the journal.
    fn work_folder(&self) -> PathBuf {
        let tag = hex(&self.source.id().0);
        let name = format!(".vmfold-import-{}-{}", &tag[..8], self.source.work_number());
        self.options.to.join(name)
    }

    /// Plans the restore of the images of an offer. `journal` is that of an interrupted restore, if there is one.
    fn plan_offer(&mut self, offer: Offer, journal: Option<&Journal>) -> Result<PreparedRestore> {
        let Offer {
            contents,
            announced,
            known_end,
        } = offer;
        let selected = self.select(&contents, journal)?;
        let identity = crate::plan::restore::identity_of(&contents, self.options.as_revision);
        let interrupted = Interrupted {
            journal,
            identity: identity.as_deref(),
        };
        let destination = destination::look(&self.root, &selected.images, interrupted)?;
        if !destination.shares && !self.is_seed_opened {
            self.monitor.note(
                "The filesystem cannot share extents: images are restored as plain sparse files, each with its own blocks",
            );
        }
        destination.check_names(self.options.replace, self.options.as_revision)?;
        let wanted = wanted_by(&contents, &selected.images);
        if !std::mem::replace(&mut self.is_seed_opened, true) {
            // This comes before seeds are opened, because an image that is replaced may be a seed.
            destination::check_use(&self.root, &selected.images, &destination, self.options.replace)?;
            if destination.shares {
                self.seed = (self.open_seed)(if self.source.announces() {
                    Sought::Announced(&wanted, &announced)
                } else {
                    Sought::Unknown
                })?;
            }
        }
        let seeded = match self.seed.as_ref().filter(|_| self.source.announces()) {
            Some(seed) => {
                self.monitor.phase("Looking for blocks that are here already", 0);
                let matches = seed.find(&wanted, &announced);
                if self.source.knows_hashes() {
                    seed::prove(&**seed, &matches, self.source.hashes(), self.monitor)?
                } else {
                    matches
                }
            }
            None => Vec::new(),
        };
        let plan = RestorePlan::new(contents, selected, seeded, &destination);
        log_plan(&plan, &destination);
        Ok(PreparedRestore { plan, known_end })
    }

    /// The images that were chosen, with the names that they get.
    fn select(&self, contents: &Contents, journal: Option<&Journal>) -> Result<Selected> {
        let mut selected = select(contents, &self.options.only)?;
        if self.options.as_revision {
            if self.options.only.is_empty() {
                selected.leave_revisions_out();
            }
            let order = revisions_to_name(contents, &selected.images)?;
            let journal = journal.filter(|_| self.options.resume);
            let revisions = destination::revisions(&self.root, &order, &selected.images, journal)?;
            name_as_revisions(&mut selected.images, &order, &revisions)?;
        }
        Ok(selected)
    }

    /// Stages the blocks of all offers, and makes the images that were committed last.
    fn run(&mut self, first: PreparedRestore, staging: &mut Staging) -> Result<RestoreOutcome> {
        if self.options.compress {
            staging.compress()?;
        }
        let journal = staging.journal_at_start().clone();
        let mut restored = Restored::default();
        let (mut planned, mut committed) = (first, None);
        loop {
            let is_last = self.fetch(&planned, staging, &mut restored, &mut committed)?;
            if is_last {
                break;
            }
            let Some(offer) = self.source.offer()? else { break };
            planned = self.plan_offer(offer, Some(&journal))?;
            self.check_space(&planned.plan)?;
        }
        let contents = committed.ok_or_else(|| self.source.nothing_committed())?;
        // Images that this process has open look as if others used them.
        self.seed = None;
        staging.settle()?;
        let mut plan = planned.plan;
        if !Arc::ptr_eq(&contents, &plan.contents) {
            plan = self.plan_committed(contents, &journal, &restored)?;
        }
        self.finish(plan, staging, restored)
    }

    /// The plan for the contents that a pipe committed in the end. All blocks that came are staged by then.
    fn plan_committed(&self, contents: Arc<Contents>, journal: &Journal, restored: &Restored) -> Result<RestorePlan> {
        let selected = self.select(&contents, Some(journal))?;
        let destination = destination::look(&self.root, &selected.images, Interrupted::default())?;
        let plan = RestorePlan::new(contents, selected, Vec::new(), &destination);
        Ok(plan.with_seeded_bytes(restored.seeded_bytes))
    }

    /// Puts the wanted blocks of a plan into the staging file: from an interrupted restore, from seeds, and from the source. Returns whether
    /// no later offer counts, and sets `committed` if the images were committed.
    fn fetch(
        &mut self,
        planned: &PreparedRestore,
        staging: &mut Staging,
        restored: &mut Restored,
        committed: &mut Option<Arc<Contents>>,
    ) -> Result<bool> {
        let PreparedRestore { plan, known_end } = planned;
        let end = plan.wanted.last().map_or(StoreBlock(0), |range| range.end);
        self.monitor.phase("Restoring blocks", plan.bytes.distinct_bytes);
        let knows_hashes = self.source.knows_hashes();
        if knows_hashes {
            staging.make_room(end)?;
            self.resume(end, staging, restored)?;
            if let Some(seed) = &self.seed {
                for seeded in &plan.seeded {
                    restored.seeded_bytes +=
                        seed::clone_into(&**seed, seeded, staging, self.source.hashes(), self.monitor)?;
                }
            }
        }
        let hasher = self.source.hashes().hasher();
        let mut sink = StagingSink {
            staging,
            hasher,
            // The blocks of a pipe come once, and a later commit may want those that this one does not. If images were chosen, only their
            // blocks are kept.
            wanted: (knows_hashes || !self.options.only.is_empty()).then_some(&plan.wanted),
            known_end: *known_end,
            seeds: match self.seed.as_deref().filter(|_| !knows_hashes) {
                None => SeedUse::None,
                Some(seed) if self.source.announces() => SeedUse::Announced(seed, &plan.seeded),
                Some(seed) => SeedUse::ByContent(seed),
            },
            // A plan that knows what comes has been checked.
            reserve_bytes: if self.source.announces() && !self.options.compress {
                0
            } else {
                RESERVE_BYTES
            },
            work_space_bytes: self.options.work_space_bytes,
            restored,
            monitor: self.monitor,
        };
        let delivered = self.source.deliver(&plan.wanted, &mut sink)?;
        if delivered.committed.is_some() {
            *committed = delivered.committed;
        }
        Ok(delivered.is_last)
    }

    /// Takes the blocks that an interrupted restore has staged, as far as they have the hashes of the source.
    fn resume(&mut self, end: StoreBlock, staging: &mut Staging, restored: &mut Restored) -> Result<()> {
        let claimed = staging.journal_at_start().claimed().iter();
        let claimed: Vec<Range<StoreBlock>> = claimed.filter(|range| range.end <= end).cloned().collect();
        for range in claimed {
            for part in range::parts(range, PROVED_BLOCKS) {
                for range in seed::staged_proved(staging, part, self.source.hashes())? {
                    restored.resumed_bytes += bytes(range.end - range.start);
                    self.monitor.advance(bytes(range.end - range.start));
                    staging.confirm(range);
                }
            }
        }
        Ok(())
    }

    /// Finds out which images are lost, and makes the others. Nothing is made if any is lost, unless intact parts were asked for.
    fn finish(&mut self, plan: RestorePlan, staging: &mut Staging, mut restored: Restored) -> Result<RestoreOutcome> {
        let wanted = plan.wanted.iter().cloned();
        let blocks: Vec<Range<StoreBlock>> = wanted.flat_map(|range| staging.missing(range)).collect();
        if !blocks.is_empty() && !self.source.knows_hashes() && !self.options.only.is_empty() && !self.options.partial {
            return Err(Error::Usage(
                "a later commit needs blocks that an earlier one did not: save the archive to a file and restore from there"
                    .into(),
            ));
        }
        let mixed_up = self.mixed_up(&plan, staging)?;
        let mut losses = Losses {
            blocks,
            left_out: mixed_up,
            ..Losses::default()
        };
        let mut lost = lost_images(&plan, &mut losses, self.source);
        let later_damage = self.source.has_later_damage();
        for image in &lost {
            tracing::info!(image = %shown(&image.path), "lost in part or as a whole");
            for range in &image.ranges {
                tracing::debug!(image = %shown(&image.path), start = range.start, length = range.length, "lost");
            }
        }
        if !lost.is_empty() && !self.options.partial {
            return Ok(RestoreOutcome {
                plan,
                restored: None,
                lost,
                later_damage,
                stopped: self.source.stopped(),
            });
        }
        let site = RestoreSite {
            plan: &plan,
            options: self.options,
            root: &self.root,
            monitor: self.monitor,
        };
        let counts = make_images(site, staging, &losses)?;
        let partial = partial_names(&plan.images, &losses.damaged);
        for lost in &mut lost {
            let image = plan.images.iter().find(|image| {
                losses.damaged.contains(&image.image)
                    && !losses.left_out.contains(&image.image)
                    && image.path == lost.path
            });
            lost.restored_as = image.and_then(|image| partial.get(&image.image).cloned());
        }
        restored.images = (plan.images.len() - losses.damaged.len()) as u64;
        restored.clones = counts.clones;
        restored.shared_bytes = counts.cloned_bytes;
        restored.copied_bytes = counts.copied_bytes;
        let stopped = self.source.stopped();
        if stopped.is_some() {
            note_whole(&plan, self.monitor);
        }
        Ok(RestoreOutcome {
            plan,
            restored: Some(restored),
            lost,
            later_damage,
            stopped,
        })
    }

    /// The chosen images whose manifest, corrections and hashes contradict each other, by their places in the manifest. Hashes that the source
    /// does not have are made of the blocks. If blocks are missing, an image is taken to be well, unless corrections may be lost.
    fn mixed_up(&mut self, plan: &RestorePlan, staging: &Staging) -> Result<BTreeSet<usize>> {
        let mut mixed_up = BTreeSet::new();
        let summaries = by_path(&plan.contents.summaries);
        let is_doubtful = plan.contents.doubtful || self.source.has_unproved_blocks();
        for restored in &plan.images {
            let image = plan.runs_of(restored);
            let Some(summary) = summaries.get(image.image.path()) else {
                // The LIST that may have it is lost: whether it is part of the commit, and what it must be, is not known. Sources that have
                // no digests at all have none of any image.
                if !self.options.partial && !plan.contents.summaries.is_empty() {
                    mixed_up.insert(restored.image);
                }
                continue;
            };
            let has_gaps = image.runs.iter().any(|run| run.content == Content::Lost);
            let mut has_all = true;
            let hashes = self.source.hashes();
            let hasher = hashes.hasher();
            let made_with = (&hasher, self.monitor);
            let mut image_digest = digest(&image.runs, image.image.size, made_with, |first, blocks, digest| {
                has_all &= hashes.add_to(digest, first, blocks)?;
                Ok(())
            })?;
            if !has_all && !has_gaps {
                has_all = true;
                image_digest = digest(&image.runs, image.image.size, made_with, |first, blocks, digest| {
                    has_all = has_all && add_staged(digest, first..first.saturating_add(blocks), hashes, staging)?;
                    Ok(())
                })?;
            }
            let is_other = image_digest != summary.digest
                || image.image.size != summary.size
                || image.image.number != summary.number;
            let is_wrong = has_all && !has_gaps && is_other;
            if is_wrong || !ends_in_zeros(image, staging)? || (is_doubtful && (!has_all || has_gaps)) {
                mixed_up.insert(restored.image);
            }
        }
        Ok(mixed_up)
    }
}

/// Reads a source that announces nothing from where it is to its end, and keeps nothing of it. `look` is called with each offer. Returns what the
/// source holds, and what of it would be written and shared.
///
/// # Errors
/// Those of [`deliver_all`].
pub fn read_all(
    source: &mut dyn BlockSource,
    seed: Option<&dyn Seed>,
    look: impl Fn(&Offer) -> Result<()>,
    monitor: &dyn Monitor,
) -> Result<(Arc<Contents>, Restored)> {
    let mut restored = Restored::default();
    let mut sink = CountingSink {
        seed,
        restored: &mut restored,
        monitor,
    };
    let contents = deliver_all(source, &mut sink, look, monitor)?;
    Ok((contents, restored))
}

/// Hands over to a sink all that a source has, from where it is to its end. `look` is called with each offer. Returns what the source holds.
///
/// # Errors
/// Those of [`BlockSource::offer`], [`BlockSource::deliver`] and `look`.
pub fn deliver_all(
    source: &mut dyn BlockSource,
    sink: &mut dyn BlockSink,
    look: impl Fn(&Offer) -> Result<()>,
    monitor: &dyn Monitor,
) -> Result<Arc<Contents>> {
    monitor.phase("Reading the backup", 0);
    let mut committed = None;
    while let Some(offer) = source.offer()? {
        look(&offer)?;
        let delivered = source.deliver(&[], sink)?;
        committed = delivered.committed.or(committed);
        if delivered.is_last {
            break;
        }
    }
    committed.ok_or_else(|| source.nothing_committed())
}

/// Adds the hashes of a range of blocks to a digest: those that a source has, and otherwise those of what is staged. Returns whether there are
/// all of them.
fn add_staged(
    digest: &mut Digest<'_>,
    wanted: Range<StoreBlock>,
    hashes: &mut dyn BlockHashes,
    staging: &Staging,
) -> Result<bool> {
    let hasher = hashes.hasher();
    for part in range::parts(wanted, PROVED_BLOCKS) {
        let mut staged = vec![None; (part.end - part.start) as usize];
        for present in staging.present(part.clone()) {
            let mut content = vec![0; (present.end - present.start) as usize * BLOCK_LEN];
            staging.read(present.start, &mut content)?;
            let made = staged[(present.start - part.start) as usize..].iter_mut();
            made.zip(content.chunks_exact(BLOCK_LEN))
                .for_each(|(staged, block)| *staged = Some(hasher.of(block)));
        }
        for (block, staged) in range::each(part).zip(staged) {
            match staged.map_or_else(|| hashes.get(block), |hash| Ok(Some(hash)))? {
                Some(hash) => digest.update(&[hash])?,
                None => return Ok(false),
            }
        }
    }
    Ok(true)
}

/// Whether what an image's last block holds behind its end is zeros, as far as that is staged.
fn ends_in_zeros(image: &ImageRuns, staging: &Staging) -> Result<bool> {
    let Some((block, from)) = image.partial_block().filter(|(block, _)| staging.has(*block)) else {
        return Ok(true);
    };
    let mut content = [0; BLOCK_LEN];
    staging.read(block, &mut content)?;
    Ok(content[from..].iter().all(|byte| *byte == 0))
}

/// Tells the user which images were restored of a source that stopped, and how the others are.
fn note_whole(plan: &RestorePlan, monitor: &dyn Monitor) {
    const SHOWN_MAX: usize = 20;
    let mut names: Vec<String> = plan
        .images
        .iter()
        .map(|image| format!("`{}`", shown(&image.path)))
        .collect();
    let others = names.len().saturating_sub(SHOWN_MAX);
    names.truncate(SHOWN_MAX);
    let more = if others > 0 {
        format!(" and {others} more")
    } else {
        String::new()
    };
    monitor.note(&format!(
        "Restored as a whole: {}{more}. Another run does not go on from there: choose the other images by patterns, or restore all of them to another \
         folder or with --replace",
        names.join(", ")
    ));
}

/// Logs the plan, image by image.
fn log_plan(plan: &RestorePlan, destination: &Destination) {
    for image in &plan.images {
        for name in &image.names {
            let in_its_place = destination.names.get(name).map_or("nothing", |state| state.text());
            tracing::info!(
                image = %shown(&image.path),
                name = %shown(name),
                bytes = image.size,
                in_its_place,
                "to be restored"
            );
        }
    }
    for path in &plan.missing {
        tracing::info!(image = %shown(path), "lost: the manifest does not have it");
    }
    let (new_bytes, seeded_bytes) = (plan.bytes.new_bytes, plan.bytes.seeded_bytes);
    tracing::info!(
        new_bytes,
        seeded_bytes,
        needed_bytes = plan.bytes.needed_bytes,
        "planned"
    );
    for seeded in &plan.seeded {
        tracing::debug!(first = seeded.first.0, blocks = seeded.blocks, "on this disk already");
    }
}

/// The images that cannot be restored as a whole, with the ranges that are lost. They are added to `losses.damaged`.
fn lost_images(plan: &RestorePlan, losses: &mut Losses, source: &dyn BlockSource) -> Vec<LostImage> {
    let mut lost = Vec::new();
    for path in &plan.missing {
        let mut summaries = plan.contents.summaries.iter();
        let summary = summaries.find(|summary| summary.path == *path);
        let size = summary.map_or(0, |summary| summary.size);
        lost.push(LostImage::whole(path.clone(), size));
    }
    for restored in &plan.images {
        let whole = LostImage::whole(restored.path.clone(), restored.size);
        if losses.left_out.contains(&restored.image) {
            losses.damaged.insert(restored.image);
            lost.push(whole);
            continue;
        }
        let mut ranges = lost_ranges(&plan.runs_of(restored).runs, restored.size, &losses.blocks);
        if ranges.is_empty() && source.is_doubtful(&restored.path) {
            ranges.clone_from(&whole.ranges);
        }
        if !ranges.is_empty() {
            losses.damaged.insert(restored.image);
            lost.push(LostImage { ranges, ..whole });
        }
    }
    lost
}
