//! `report`: tells what takes space, what a reclaim would free, and what deleting would free. On btrfs it reads no data of images.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::planning::{PlanSettings, make_plan};
use super::{OpenPool, Scope, common_folder, discover, open_pool, survey, without_empty};
use crate::block::bytes;
use crate::error::{Error, Result};
use crate::facts::{Compression, Facts, PinReason};
use crate::fs::{Filesystem, PoolMap, Purpose, images};
use crate::monitor::Monitor;
use crate::numbers::{ExtentId, ImageId};
use crate::plan::{Holdings, Layers, apply};
use crate::pool::{self, Covering, FoundImage, Pool, Skipped};
use crate::report::families::{Machines, Views, all_revisions, families, if_deleted};
use crate::report::{ImageBytes, Planned, PoolBytes, ReportView, Reported};

/// What is reported, and how.
#[derive(Debug, Clone)]
pub struct ReportOptions {
    /// The images, and the index.
    pub scope: Scope,
    /// Whether a reclaim is planned.
    pub plans: bool,
    /// Patterns of images; it is told what deleting them would free.
    pub if_deleted: Vec<String>,
    /// Where dom0's root filesystem is mounted.
    pub qubes_root: PathBuf,
    /// What the text shows.
    pub view: ReportView,
    /// The command that reclaims these images, word by word.
    pub reclaim_command: Vec<String>,
}

/// Reports on a pool.
///
/// # Errors
/// Those of finding and opening images; those of planning, as [`super::reclaim::reclaim`] has them; those of [`report_on`];
/// [`Error::Interrupted`].
pub fn report(options: &ReportOptions, monitor: &dyn Monitor) -> Result<Reported> {
    let patterns = options.if_deleted.iter();
    let patterns = patterns.map(|pattern| Ok((pattern.clone(), Covering::new(pattern)?)));
    let patterns: Vec<(String, Covering)> = patterns.collect::<Result<_>>()?;
    let found = discover(&options.scope, monitor)?;
    let planned = if options.plans {
        plan_reclaim(&found, &options.scope, monitor)?
    } else {
        None
    };
    let looked_at = found.clone();
    let (fs, skipped) = open_pool(looked_at, Purpose::Look, monitor)?;
    let pool = OpenPool::of(&*fs, skipped, &options.scope, monitor);
    let Looked {
        mut reported,
        mapped,
        now,
        skipped,
    } = look(pool, &found.images)?;
    let mut after = planned.as_ref().map(|planned| planned.after(&*fs, &mapped.facts));
    if let Some(after) = &mut after {
        add_beyond(after, &mapped);
        after.keep(&images_with_names_elsewhere(&*fs, &found.images));
        let shares = after.shares(|image| vec![image]);
        for (number, image) in ImageId::numbered(&mut reported.images) {
            image.exclusive_after_reclaim_bytes = Some(shares.get(&number).map_or(0, |share| share.freed_bytes));
        }
    }
    let machines = Machines::of(names_of(&*fs, &found.images));
    let views = Views {
        now: &now,
        after: after.as_ref(),
    };
    let templates = pool::templates(&options.qubes_root);
    reported.root = common_folder(found.named.iter().map(|named| named.root.as_path()));
    reported.families = families(&machines, views, &reported.root, &templates);
    reported.machine_count = machines.count();
    reported.revisions = all_revisions(&machines, views);
    reported.if_deleted = if_deleted(&machines, views, &patterns);
    if let Some(planned) = planned {
        let left_out: BTreeSet<&PathBuf> = skipped.iter().map(|image| &image.path).collect();
        let more = planned
            .skipped
            .into_iter()
            .filter(|image| !left_out.contains(&image.path));
        reported.left_alone = more.collect();
        reported.planned = Some(planned.summary);
    }
    reported.skipped = skipped;
    reported.view = options.view.clone();
    reported.reclaim_command.clone_from(&options.reclaim_command);
    Ok(reported)
}

/// Reports on a pool that is open, image by image, without a plan. It needs no index.
///
/// # Errors
/// [`Error::Io`] if metadata cannot be read.
pub fn report_on(pool: OpenPool<'_>) -> Result<Reported> {
    let looked = look(pool, &[])?;
    Ok(Reported {
        skipped: looked.skipped,
        ..looked.reported
    })
}

/// A reclaim that was planned and is not carried out.
struct PlannedReclaim {
    summary: Planned,
    /// What the images of the plan hold after it.
    layers: Layers,
    /// The paths of these images, by their numbers in the plan.
    paths: Vec<PathBuf>,
    /// The images that it would leave alone.
    skipped: Vec<Skipped>,
}

impl PlannedReclaim {
    /// What all images hold after it. `fs` and `facts` are those of all images.
    fn after(&self, fs: &dyn Filesystem, facts: &Facts) -> Holdings {
        let numbers: BTreeMap<&Path, ImageId> = ImageId::numbered(images(fs))
            .map(|(number, image)| (image.path.as_path(), number))
            .collect();
        let numbers: Vec<Option<ImageId>> = self
            .paths
            .iter()
            .map(|path| numbers.get(path.as_path()).copied())
            .collect();
        self.layers.beside(&numbers, &Layers::of(facts))
    }
}

/// Plans a reclaim as a dry run does. It is `None` if another run works on the filesystem or on its index.
fn plan_reclaim(found: &Pool, scope: &Scope, monitor: &dyn Monitor) -> Result<Option<PlannedReclaim>> {
    match try_plan(found, scope, monitor) {
        Ok(planned) => Ok(Some(planned)),
        Err(Error::Busy { .. }) => {
            monitor.note("Another vmfold works on this filesystem, so that it is not told what a reclaim would free");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

fn try_plan(found: &Pool, scope: &Scope, monitor: &dyn Monitor) -> Result<PlannedReclaim> {
    let (fs, skipped) = open_pool(without_empty(found.clone()), Purpose::Plan, monitor)?;
    let survey = survey(OpenPool::of(&*fs, skipped, scope, monitor), scope, true, monitor)?;
    if monitor.interrupted() {
        return Err(Error::Interrupted);
    }
    fs.shortcomings()
        .iter()
        .for_each(|shortcoming| monitor.note(shortcoming));
    let mut facts = survey.facts;
    monitor.phase("Planning", 0);
    let (plan, proved_bytes) = make_plan(&PlanSettings::default(), &*fs, &mut facts, monitor)?;
    let summary = Planned::of(&plan, proved_bytes);
    let applied = apply(&mut facts, &plan.layout);
    Ok(PlannedReclaim {
        summary,
        layers: Layers::of(&applied.facts),
        paths: images(&*fs).map(|image| image.path.clone()).collect(),
        skipped: survey.skipped,
    })
}

/// What looking at a pool tells.
struct Looked {
    /// What is told of the pool and of each image.
    reported: Reported,
    mapped: PoolMap,
    /// What sets of images hold.
    now: Holdings,
    /// Images that were left out.
    skipped: Vec<Skipped>,
}

/// Looks at a pool that is open.
fn look(pool: OpenPool<'_>, found: &[FoundImage]) -> Result<Looked> {
    let OpenPool {
        fs, skipped, budget, ..
    } = pool;
    let mapped = fs.map(&budget)?;
    let mut report: Vec<ImageBytes> = images(fs)
        .map(|image| ImageBytes {
            path: image.path.clone(),
            size: image.size,
            ..ImageBytes::default()
        })
        .collect();
    let mut unreachable_bytes = 0;
    for (number, extent) in ExtentId::numbered(&mapped.facts.extents) {
        let unreachable = unreachable_in(&mapped.facts, number);
        unreachable_bytes += unreachable;
        for (image, blocks) in by_image(&mapped.facts, number) {
            let image = &mut report[image.index()];
            image.data_bytes += bytes(blocks);
            image.unreachable_bytes += unreachable;
            if extent.class.compression != Compression::None {
                image.compressed_bytes += extent.disk_bytes;
                image.uncompressed_bytes += bytes(extent.blocks);
            }
        }
    }
    let mut now = Holdings::of(&mapped.facts);
    add_beyond(&mut now, &mapped);
    let held_bytes = now.held_bytes();
    now.keep(&images_with_names_elsewhere(fs, found));
    for (image, share) in now.shares(|image| vec![image]) {
        let image = &mut report[image.index()];
        image.exclusive_bytes = share.freed_bytes;
        image.shared_bytes = share.on_disk_bytes - share.freed_bytes;
    }
    let reported = Reported {
        pool: PoolBytes::of(fs, &mapped.facts),
        filesystem: fs.kind_name(),
        image_count: report.len() as u64,
        unreachable_bytes,
        inline_bytes: mapped.inline_bytes,
        held_bytes,
        held_by: fs.names_of_holders(&mapped.facts)?,
        images: report,
        ..Reported::default()
    };
    Ok(Looked {
        reported,
        mapped,
        now,
        skipped,
    })
}

/// Adds the space beyond the ends of images that only they use.
fn add_beyond(holdings: &mut Holdings, mapped: &PoolMap) {
    for beyond in &mapped.beyond {
        holdings.add(&[beyond.image], beyond.disk_bytes, false);
    }
}

/// The names of each image below the named paths.
fn names_of(fs: &dyn Filesystem, found: &[FoundImage]) -> Vec<BTreeSet<PathBuf>> {
    let names: BTreeMap<&Path, &BTreeSet<PathBuf>> =
        found.iter().map(|image| (image.path.as_path(), &image.names)).collect();
    let names_of = |path: &PathBuf| names.get(path.as_path()).copied().cloned();
    images(fs)
        .map(|image| names_of(&image.path).unwrap_or_else(|| BTreeSet::from([image.path.clone()])))
        .collect()
}

/// The images that stay when all their names below the named paths are deleted.
fn images_with_names_elsewhere(fs: &dyn Filesystem, found: &[FoundImage]) -> BTreeSet<ImageId> {
    let elsewhere = found.iter().filter(|image| image.has_names_elsewhere());
    let elsewhere: BTreeSet<&PathBuf> = elsewhere.map(|image| &image.path).collect();
    let numbered = ImageId::numbered(images(fs));
    numbered
        .filter(|(_, image)| elsewhere.contains(&image.path))
        .map(|(number, _)| number)
        .collect()
}

/// The number of blocks of an extent that each image maps, each reference counted.
fn by_image(facts: &Facts, extent: ExtentId) -> BTreeMap<ImageId, u32> {
    let mut blocks = BTreeMap::new();
    for reference in facts.references_to(extent) {
        *blocks.entry(reference.image).or_default() += reference.blocks;
    }
    blocks
}

/// The bytes on disk of those blocks of an extent that nothing maps. It is 0 for an extent that files outside the pool hold, because they may
/// map any of its blocks.
fn unreachable_in(facts: &Facts, number: ExtentId) -> u64 {
    let extent = &facts.extents[number.index()];
    if extent.pinned == Some(PinReason::HeldByOthers) {
        return 0;
    }
    let mut mapped: Vec<_> = facts.mappings_to(number).map(|(mapping, _)| mapping.slots()).collect();
    mapped.sort_unstable_by_key(|slots| slots.start);
    let (mut end, mut unmapped_blocks) = (extent.first_slot, 0);
    for slots in mapped {
        unmapped_blocks += slots.start.saturating_sub(end);
        end = end.max(slots.end);
    }
    extent.disk_share(unmapped_blocks + (extent.slots().end - end))
}
