//! Plans a restore and carries it out: first every wanted block once into one file, the *staging file*, then the images from there, sharing
//! its extents where the filesystem can. The staging file goes, its extents stay as long as images refer to them.
//!
//! Blocks come from a [`source::BlockSource`] and, where the disk holds them, from a [`seed::Seed`].

pub mod archive;
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
use self::sink::StagingSink;
use self::source::{BlockSource, Offer};
use self::staging::{Journal, Staging};
use crate::archive::commit::by_path;
use crate::archive::manifest::AnnouncedBlocks;
use crate::block::bytes;
use crate::content::Content;
use crate::error::{Error, Result};
use crate::exec::hashes::digest;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::restore::{
    Contents, Destination, LostImage, RestorePlan, Selected, lost_ranges, name_as_revisions, revisions_to_name, select,
    wanted_by,
};
use crate::range;
use crate::shown::{hex, shown};

/// Which images are restored, and how.
#[derive(Debug, Clone, Default)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub struct RestoreOptions {
    /// The folder to restore to.
    pub to: PathBuf,
    /// Patterns of images to choose; none means all.
    pub only: Vec<String>,
    /// Put images in the place of existing ones.
    pub replace: bool,
    /// Go on with a restore that was interrupted.
    pub resume: bool,
    /// Restore what is intact of a damaged source.
    pub partial: bool,
    /// Restore images as revisions of Qubes OS.
    pub as_revision: bool,
    /// Take owners by number even where their names are known here.
    pub numeric_owner: bool,
    /// Restore set-user-ID, set-group-ID and sticky bits, and attributes of `security.*` and `trusted.*`.
    pub preserve_special: bool,
}

/// What a restore did, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Restored {
    /// Images that are whole and in their place.
    pub images: u64,
    /// Blocks written from the source.
    pub written_bytes: u64,
    /// Blocks shared with what was on the disk.
    pub seeded_bytes: u64,
    /// Blocks that an interrupted restore had written.
    pub resumed_bytes: u64,
    /// Ranges of images that were made to share extents.
    pub clones: u64,
    /// Bytes of images that share extents.
    pub shared_bytes: u64,
    /// Bytes of images that had to be copied.
    pub copied_bytes: u64,
}

/// What came of a restore.
#[derive(Debug)]
pub struct RestoreOutcome {
    /// What was carried out, or is to be.
    pub plan: RestorePlan,
    /// What was done; none where nothing was restored: it is only a plan, or some of it is lost.
    pub restored: Option<Restored>,
    /// Images that cannot be restored whole.
    pub lost: Vec<LostImage>,
    /// Whether images later than these may be lost.
    pub later_damage: bool,
}

/// Opens what the disk may hold of some wanted blocks, given the fingerprints that are announced of them. None if there is nothing.
pub type OpenSeed<'a> = dyn Fn(&[Range<StoreBlock>], &[AnnouncedBlocks]) -> Result<Option<Box<dyn Seed>>> + 'a;

/// A plan, and what carrying it out needs beside it.
struct PreparedRestore {
    plan: RestorePlan,
    /// See [`Offer::known_end`].
    known_end: StoreBlock,
}

/// A restore: [`Restore::plan`] says what it does, [`Restore::execute`] does it.
pub struct Restore<'a> {
    options: &'a RestoreOptions,
    source: &'a mut dyn BlockSource,
    open_seed: &'a OpenSeed<'a>,
    /// Opened with the first plan; none before, or if there is none.
    seed: Option<Box<dyn Seed>>,
    is_seed_opened: bool,
    root: Root,
    planned: Option<PreparedRestore>,
    monitor: &'a dyn Monitor,
}

impl<'a> Restore<'a> {
    /// A restore from a source to a folder that is open, or that does not exist yet.
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

    /// Plans the restore. Nothing is made or changed by it. Of a pipe, whose last commit nobody knows yet, it is a plan for the first.
    ///
    /// # Errors
    /// If names are taken or in use, no image is chosen, or the source is damaged.
    pub fn plan(&mut self) -> Result<()> {
        let Some(offer) = self.source.offer()? else {
            return Err(self.source.nothing_committed());
        };
        let noted = Journal::read(self.root.file(), &self.work_folder());
        self.planned = Some(self.plan_offer(offer, noted.as_ref())?);
        Ok(())
    }

    /// The plan, which nobody carries out.
    ///
    /// # Errors
    /// Those of [`Restore::plan`], where that was not called yet.
    pub fn into_plan(mut self) -> Result<RestoreOutcome> {
        let PreparedRestore { plan, .. } = self.take_plan()?;
        Ok(RestoreOutcome {
            plan,
            restored: None,
            lost: Vec::new(),
            later_damage: self.source.has_later_damage(),
        })
    }

    fn take_plan(&mut self) -> Result<PreparedRestore> {
        if self.planned.is_none() {
            self.plan()?;
        }
        self.planned.take().ok_or_else(|| self.source.nothing_committed())
    }

    /// Carries the plan out, and what comes after it of a pipe.
    ///
    /// # Errors
    /// Before anything is written: if an interrupted restore is there and not to be gone on with, or it does not fit. Later: those of
    /// reading the source and of writing; what was restored so far is kept.
    pub fn execute(mut self) -> Result<RestoreOutcome> {
        let planned = self.take_plan()?;
        let folder = self.work_folder();
        if !self.options.resume && Journal::read(self.root.file(), &folder).is_some() {
            return Err(Error::Usage(format!(
                "an import was interrupted here: --resume goes on with it, and deleting `{}` begins anew",
                shown(&folder)
            )));
        }
        planned.plan.check_space(&self.options.to)?;
        self.root.make()?;
        let mut staging = Staging::open(self.root.file(), &folder)?;
        match self.run(planned, &mut staging) {
            Ok(outcome) => {
                staging.remove()?;
                Ok(outcome)
            }
            Err(error) => {
                self.monitor.note(&format!(
                    "What was restored so far is kept in `{}`: --resume goes on from there",
                    shown(&folder)
                ));
                Err(error)
            }
        }
    }

    /// Where what is needed on the way is kept, for a commit of an archive.
    fn work_folder(&self) -> PathBuf {
        let tag = hex(&self.source.id());
        let name = format!(".vmfold-import-{}-{}", &tag[..8], self.source.work_number());
        self.options.to.join(name)
    }

    fn plan_offer(&mut self, offer: Offer, noted: Option<&Journal>) -> Result<PreparedRestore> {
        let Offer {
            contents,
            announced,
            known_end,
        } = offer;
        let selected = self.select(&contents, noted)?;
        let identity = crate::plan::restore::identity_of(&contents, self.options.as_revision);
        let interrupted = Interrupted {
            noted,
            identity: identity.as_deref(),
        };
        let destination = destination::look(&self.root, &selected.images, interrupted)?;
        if !destination.shares {
            self.monitor.note(
                "The filesystem cannot share extents: images are restored as plain sparse files, each with its own blocks",
            );
        }
        destination.check_names(self.options.replace, self.options.as_revision)?;
        let wanted = wanted_by(&contents, &selected.images);
        if !std::mem::replace(&mut self.is_seed_opened, true) {
            // Before seeds are opened, which an image that is to be replaced may be one of.
            destination::check_use(&self.root, &selected.images, &destination, self.options.replace)?;
            if destination.shares {
                self.seed = (self.open_seed)(&wanted, &announced)?;
            }
        }
        let seeded = match &self.seed {
            Some(seed) => {
                self.monitor.phase("Looking for blocks that are here already", 0);
                let found = seed.find(&wanted, &announced);
                if self.source.knows_hashes() {
                    seed::prove(&**seed, &found, self.source.hashes(), self.monitor)?
                } else {
                    found
                }
            }
            None => Vec::new(),
        };
        let plan = RestorePlan::new(contents, selected, seeded, &destination);
        log_plan(&plan, &destination);
        Ok(PreparedRestore { plan, known_end })
    }

    /// The images that were asked for, with their names.
    fn select(&self, contents: &Contents, noted: Option<&Journal>) -> Result<Selected> {
        let mut selected = select(contents, &self.options.only)?;
        if self.options.as_revision {
            let order = revisions_to_name(contents, &selected.images)?;
            let noted = noted.filter(|_| self.options.resume);
            let there = destination::revisions(&self.root, &order, &selected.images, noted)?;
            name_as_revisions(&mut selected.images, &order, &there)?;
        }
        Ok(selected)
    }

    fn run(&mut self, first: PreparedRestore, staging: &mut Staging) -> Result<RestoreOutcome> {
        let noted = staging.noted().clone();
        let mut restored = Restored::default();
        let (mut planned, mut committed) = (first, None);
        loop {
            let is_last = self.fetch(&planned, staging, &mut restored, &mut committed)?;
            if is_last {
                break;
            }
            let Some(offer) = self.source.offer()? else { break };
            planned = self.plan_offer(offer, Some(&noted))?;
            planned.plan.check_space(&self.options.to)?;
        }
        let contents = committed.ok_or_else(|| self.source.nothing_committed())?;
        // What is open here cannot be told from what others use.
        self.seed = None;
        staging.settle()?;
        let mut plan = planned.plan;
        if !Arc::ptr_eq(&contents, &plan.contents) {
            plan = self.plan_committed(contents, &noted, &restored)?;
        }
        self.finish(plan, staging, restored)
    }

    /// A plan for what a pipe committed in the end, of which everything that came is staged.
    fn plan_committed(&self, contents: Arc<Contents>, noted: &Journal, restored: &Restored) -> Result<RestorePlan> {
        let selected = self.select(&contents, Some(noted))?;
        let destination = destination::look(&self.root, &selected.images, Interrupted::default())?;
        let mut plan = RestorePlan::new(contents, selected, Vec::new(), &destination);
        plan.bytes.seeded_bytes = restored.seeded_bytes;
        plan.bytes.new_bytes = plan.bytes.distinct_bytes.saturating_sub(restored.seeded_bytes);
        Ok(plan)
    }

    /// Gets wanted blocks into the staging file: from an earlier attempt, from seeds, from the source. Tells whether what was committed, if
    /// anything was, is the last that counts.
    fn fetch(
        &mut self,
        planned: &PreparedRestore,
        staging: &mut Staging,
        restored: &mut Restored,
        committed: &mut Option<Arc<Contents>>,
    ) -> Result<bool> {
        let PreparedRestore { plan, known_end } = planned;
        let end = plan.wanted.last().map_or(StoreBlock(0), |range| range.end);
        staging.make_room(end)?;
        self.monitor.phase("Restoring blocks", plan.bytes.distinct_bytes);
        let knows_hashes = self.source.knows_hashes();
        if knows_hashes {
            self.resume(end, staging, restored)?;
            for (seed, one) in self
                .seed
                .iter()
                .flat_map(|seed| plan.seeded.iter().map(move |one| (seed, one)))
            {
                restored.seeded_bytes += seed::clone_into(&**seed, one, staging, self.source.hashes(), self.monitor)?;
            }
        }
        let mut sink = StagingSink {
            staging,
            // What comes by once and is not wanted yet may be wanted by a later commit, unless images were chosen.
            wanted: (knows_hashes || !self.options.only.is_empty()).then_some(&plan.wanted),
            known_end: *known_end,
            seeds: self
                .seed
                .as_deref()
                .filter(|_| !knows_hashes)
                .map(|seed| (seed, &*plan.seeded)),
            done: restored,
            monitor: self.monitor,
        };
        let delivered = self.source.deliver(&plan.wanted, &mut sink)?;
        if delivered.committed.is_some() {
            *committed = delivered.committed;
        }
        Ok(delivered.is_last)
    }

    /// Takes what an interrupted restore has staged, if its hashes are right.
    fn resume(&mut self, end: StoreBlock, staging: &mut Staging, restored: &mut Restored) -> Result<()> {
        let claimed = staging.noted().claimed().iter();
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

    /// Says what is lost, and makes the rest.
    fn finish(&mut self, plan: RestorePlan, staging: &mut Staging, mut restored: Restored) -> Result<RestoreOutcome> {
        let wanted = plan.wanted.iter().cloned();
        let blocks: Vec<Range<StoreBlock>> = wanted.flat_map(|range| staging.missing(range)).collect();
        if !blocks.is_empty() && !self.source.knows_hashes() && !self.options.only.is_empty() && !self.options.partial {
            return Err(Error::Usage(
                "a later commit needs blocks that an earlier one did not: save the archive to a file and restore from there"
                    .into(),
            ));
        }
        let mixed_up = self.mixed_up(&plan)?;
        let mut losses = Losses {
            blocks,
            left_out: mixed_up,
            ..Losses::default()
        };
        let mut lost = lost_images(&plan, &mut losses);
        let later_damage = self.source.has_later_damage();
        for one in &lost {
            tracing::info!(image = %shown(&one.path), "lost in part or as a whole");
            for range in &one.ranges {
                tracing::debug!(image = %shown(&one.path), start = range.start, length = range.length, "lost");
            }
        }
        if !lost.is_empty() && !self.options.partial {
            return Ok(RestoreOutcome {
                plan,
                restored: None,
                lost,
                later_damage,
            });
        }
        let site = RestoreSite {
            plan: &plan,
            options: self.options,
            root: &self.root,
            monitor: self.monitor,
        };
        let counts = make_images(site, staging, &losses)?;
        for lost in &mut lost {
            let image = plan.images.iter().find(|image| {
                losses.damaged.contains(&image.image)
                    && !losses.left_out.contains(&image.image)
                    && image.path == lost.path
            });
            lost.restored_as = image.map(crate::plan::restore::RestoredImage::partial_name);
        }
        restored.images = (plan.images.len() - losses.damaged.len()) as u64;
        restored.clones = counts.clones;
        restored.shared_bytes = counts.cloned_bytes;
        restored.copied_bytes = counts.copied_bytes;
        Ok(RestoreOutcome {
            plan,
            restored: Some(restored),
            lost,
            later_damage,
        })
    }

    /// The chosen images whose manifest, corrections and hashes do not go together any more. Where hashes are missing, an image is taken to
    /// be well, unless corrections may be lost.
    fn mixed_up(&mut self, plan: &RestorePlan) -> Result<BTreeSet<usize>> {
        let mut mixed_up = BTreeSet::new();
        let summaries = by_path(&plan.contents.summaries);
        for restored in &plan.images {
            let image = plan.runs_of(restored);
            let Some(summary) = summaries.get(image.image.path()) else {
                continue;
            };
            let has_gaps = image.runs.iter().any(|run| run.content == Content::Lost);
            let mut has_all = true;
            let hashes = self.source.hashes();
            let found = digest(&image.runs, self.monitor, |first, blocks, digest| {
                has_all &= hashes.add_to(digest, first, blocks)?;
                Ok(())
            })?;
            let is_wrong = has_all && !has_gaps && (found != summary.digest || image.image.size != summary.size);
            if is_wrong || (plan.contents.doubtful && (!has_all || has_gaps)) {
                mixed_up.insert(restored.image);
            }
        }
        Ok(mixed_up)
    }
}

/// Logs what is planned, image by image.
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
    for one in &plan.seeded {
        tracing::debug!(first = one.first.0, blocks = one.blocks, "on this disk already");
    }
}

/// What cannot be restored whole, image by image.
fn lost_images(plan: &RestorePlan, losses: &mut Losses) -> Vec<LostImage> {
    let mut lost = Vec::new();
    for path in &plan.missing {
        let mut summaries = plan.contents.summaries.iter();
        let size = summaries.find(|one| one.path == *path).map_or(0, |one| one.size);
        lost.push(LostImage::whole(path.clone(), size));
    }
    for restored in &plan.images {
        let whole = LostImage::whole(restored.path.clone(), restored.size);
        if losses.left_out.contains(&restored.image) {
            losses.damaged.insert(restored.image);
            lost.push(whole);
            continue;
        }
        let ranges = lost_ranges(&plan.runs_of(restored).runs, restored.size, &losses.blocks);
        if !ranges.is_empty() {
            losses.damaged.insert(restored.image);
            lost.push(LostImage { ranges, ..whole });
        }
    }
    lost
}
