//! `reclaim`: shares the blocks that images have in common, frees the rest, and counts how much that freed.

use std::collections::BTreeSet;
use std::time::Duration;

use super::planning::{PlanSettings, make_plan};
use super::{OpenPool, Scope, Survey, discover, log_skipped, open_pool, survey, unreadable_image, without_empty};
use crate::block::bytes;
use crate::error::{Error, Result};
use crate::exec::compression::CompressionRequest;
use crate::exec::fingerprints::remember;
use crate::exec::reclaim::{ReclaimOutcome, ReclaimSettings, run};
use crate::facts::Facts;
use crate::frame::Packer;
use crate::fs::{Filesystem, Purpose, freed_bytes, images};
use crate::index::ChunkIndex;
use crate::monitor::{Deadline, Monitor};
use crate::numbers::ImageId;
use crate::plan::{self, ReclaimPlan};
use crate::pool::{self, Skip, Skipped, machine_of};
use crate::report::{Done, Planned, PoolBytes, Reclaimed};

/// What is reclaimed, and how.
#[derive(Debug, Clone)]
pub struct ReclaimOptions {
    /// The images, and the index.
    pub scope: Scope,
    /// Patterns of images that share only among themselves, one for each group.
    pub groups: Vec<String>,
    /// The limits of the plan.
    pub plan: plan::PlanOptions,
    /// The compression that is asked for, if any.
    pub compress: Option<CompressionRequest>,
    /// Whether only a plan is made.
    pub dry_run: bool,
    /// Bytes that stay free on the filesystem. A donor that would take of them is not written.
    pub reserve_bytes: u64,
    /// The time after which the run stops in order. The next run goes on from there.
    pub time: Option<Duration>,
}

impl ReclaimOptions {
    /// What the plan follows from, beside the pool.
    fn settings(&self) -> PlanSettings {
        PlanSettings {
            plan: self.plan,
            compress: self.compress,
            reserve_bytes: self.reserve_bytes,
        }
    }
}

/// The shortest runs, in blocks, with which sending and copying images takes about twice as long as before at most: 64 KiB.
const FEW_FRAGMENTS_BLOCKS: u32 = 16;

/// Reclaims a pool, or makes a plan only.
///
/// # Errors
/// Those of finding and opening images; [`Error::Busy`] if another run uses the index; [`Error::NoCompression`] and [`Error::Grows`];
/// [`Error::Io`] if metadata cannot be read. Images that are left alone are not errors: the result lists them. If the plan fails while it is
/// carried out, the error is in the result, with what was done until then.
pub fn reclaim(options: &ReclaimOptions, monitor: &dyn Monitor) -> Result<Reclaimed> {
    in_time(options, monitor, |deadline| {
        let (scope, mut found) = (&options.scope, discover(&options.scope, deadline)?);
        pool::group(&mut found.images, &options.groups)?;
        let purpose = if options.dry_run {
            Purpose::Plan
        } else {
            Purpose::Change
        };
        let (fs, skipped) = open_pool(without_empty(found), purpose, deadline)?;
        reclaim_until(OpenPool::of(&*fs, skipped, scope, deadline), options, deadline)
    })
}

/// Reclaims a pool that is open, or makes a plan only. The paths and groups of the options are not used.
///
/// # Errors
/// Those of [`reclaim`].
pub fn reclaim_on(pool: OpenPool<'_>, options: &ReclaimOptions, monitor: &dyn Monitor) -> Result<Reclaimed> {
    in_time(options, monitor, |deadline| reclaim_until(pool, options, deadline))
}

/// Stops a run when its time is over, and notes in the result that this was the reason.
fn in_time(
    options: &ReclaimOptions,
    monitor: &dyn Monitor,
    run: impl FnOnce(&Deadline<'_>) -> Result<Reclaimed>,
) -> Result<Reclaimed> {
    let deadline = Deadline::new(monitor, options.time);
    let mut result = run(&deadline)?;
    if result.interrupted && !monitor.interrupted() {
        (result.interrupted, result.out_of_time) = (false, true);
    }
    Ok(result)
}

/// Surveys the pool, makes a plan, and carries it out unless it is a dry run.
fn reclaim_until(pool: OpenPool<'_>, options: &ReclaimOptions, monitor: &Deadline<'_>) -> Result<Reclaimed> {
    let fs = pool.fs;
    let Survey {
        mut facts,
        skipped,
        fingerprinted,
        inline,
        index,
        ..
    } = survey(pool, &options.scope, true, monitor)?;
    let free_before = fs.free_bytes()?;
    let unchecksummed = images(fs).filter(|image| !image.checksummed).count() as u64;
    let count = u64::from(fs.image_count());
    let mut result = Reclaimed {
        images: count,
        pool: PoolBytes::of(fs, &facts),
        fingerprinted,
        machines_in_use: machines_in_use(&skipped),
        skipped,
        inline_images: inline.len() as u64,
        unchecksummed_images: if unchecksummed < count { unchecksummed } else { 0 },
        dry_run: options.dry_run,
        interrupted: monitor.interrupted(),
        ..Reclaimed::default()
    };
    if result.interrupted {
        return Ok(result);
    }
    fs.shortcomings()
        .iter()
        .for_each(|shortcoming| monitor.note(shortcoming));
    let (plan, proved_bytes) = match make_plan(&options.settings(), fs, &mut facts, monitor) {
        Err(Error::Interrupted) => {
            result.interrupted = true;
            return Ok(result);
        }
        result => result?,
    };
    recommend_longer_runs(fs, options, &plan, monitor)?;
    result.planned = Planned::of(&plan, proved_bytes);
    log_plan(&facts, &plan);
    if !plan.pinned.is_empty() {
        result.held_by = fs.names_of_holders(&facts)?;
    }
    if options.dry_run {
        return Ok(result);
    }
    carry_out((fs, index), &facts, &plan, free_before, options, &mut result, monitor)?;
    Ok(result)
}

/// The number of machines that are running, or were running when their host stopped.
fn machines_in_use(skipped: &[Skipped]) -> u64 {
    let in_use = |image: &&Skipped| matches!(image.reason, Skip::InUse | Skip::Dirty | Skip::Running);
    // An image of kernel modules is attached to many machines, and is none of its own.
    let is_machine = |image: &&Skipped| !image.path.ends_with("modules.img");
    let used = skipped.iter().filter(in_use).filter(is_machine);
    let machines: BTreeSet<_> = used.map(|image| machine_of(&image.path)).collect();
    machines.len() as u64
}

/// Recommends longer runs if there are read-only snapshots of the images, because short runs make these slow to send and to copy.
fn recommend_longer_runs(
    fs: &dyn Filesystem,
    options: &ReclaimOptions,
    plan: &ReclaimPlan,
    monitor: &dyn Monitor,
) -> Result<()> {
    let makes_fragments = options.plan.min_run_blocks < FEW_FRAGMENTS_BLOCKS && !plan.eliminations.is_empty();
    if makes_fragments && fs.has_read_only_snapshots()? {
        monitor.note(
            "There are read-only snapshots of these images. If you send or copy them often, --min-run 64K keeps that several \
             times faster, and frees somewhat less",
        );
    }
    Ok(())
}

/// Carries a plan out, counts how much was freed, and enters the new extents into the index.
fn carry_out(
    (fs, mut index): (&dyn Filesystem, Option<Box<dyn ChunkIndex>>),
    facts: &Facts,
    plan: &ReclaimPlan,
    free_before: u64,
    options: &ReclaimOptions,
    result: &mut Reclaimed,
    monitor: &dyn Monitor,
) -> Result<()> {
    let mut outcome = ReclaimOutcome::default();
    let run_result = if plan.eliminations.is_empty() {
        Ok(())
    } else {
        run(facts, plan, settings(options), fs, monitor, &mut outcome)
    };
    monitor.phase("Counting", 0);
    fs.close_donors()?;
    result.interrupted = outcome.interrupted;
    let counted = freed_bytes(fs, facts, free_before);
    let left_alone = left_meanwhile(fs, &outcome);
    log_skipped(&left_alone);
    result.skipped.extend(left_alone);
    result.failed = run_result.err();
    match counted {
        Ok((freed_bytes, mut mapped)) => {
            // The index is a cache: if it cannot be updated, the next run reads more.
            let remembered = index
                .as_deref_mut()
                .filter(|index| index.is_usable())
                .map(|index| remember(fs, facts, &mut mapped.facts, index));
            if let Some(Err(error)) = remembered {
                monitor.note(&crate::error::describe(&error));
            }
            result.done = Some(Done {
                freed_bytes,
                after: PoolBytes::of(fs, &mapped.facts),
                counts: outcome.counts,
            });
        }
        Err(error) => result.failed = result.failed.take().or(Some(error)),
    }
    Ok(())
}

/// The settings for [`run`].
fn settings(options: &ReclaimOptions) -> ReclaimSettings {
    let packer = match options.compress {
        Some(CompressionRequest::Zstd { packer, .. }) => packer,
        _ => Packer::default(),
    };
    ReclaimSettings {
        reserve_bytes: options.reserve_bytes,
        packer,
        threads: threads(std::thread::available_parallelism().map_or(1, usize::from)),
    }
}

/// The number of threads that make calls on so many cores. One core is left for reading ahead, for writing donors, and for the filesystem.
fn threads(cores: usize) -> usize {
    /// Threads at most. All calls lock the same trees of the filesystem, so many more threads would mostly wait.
    const THREADS_MAX: usize = 8;
    if cores <= 2 { 1 } else { (cores - 1).min(THREADS_MAX) }
}

/// Logs the plan, extent by extent.
fn log_plan(facts: &Facts, plan: &ReclaimPlan) {
    tracing::info!(
        extents = plan.eliminations.len(),
        freed_bytes = plan.freed_bytes(),
        rewritten_bytes = plan.rewritten_bytes(),
        "planned"
    );
    for (reason, bytes) in &plan.pinned {
        tracing::info!(bytes, "stays: {reason:?}");
    }
    if !tracing::enabled!(tracing::Level::DEBUG) {
        return;
    }
    for elimination in &plan.eliminations {
        let extent = &facts.extents[elimination.extent.index()];
        tracing::debug!(
            address = extent.address,
            bytes = bytes(extent.blocks),
            references = facts.reference_count(elimination.extent),
            freed_bytes = elimination.freed_bytes,
            rewritten_bytes = elimination.rewritten_bytes,
            "extent goes: {:?}",
            elimination.reason
        );
    }
}

/// The images that were left alone from some moment of the run on, or that were written to meanwhile.
fn left_meanwhile(fs: &dyn Filesystem, outcome: &ReclaimOutcome) -> Vec<Skipped> {
    let skipped = |image: ImageId, reason| Skipped::new(fs.path(image), reason);
    let opened = outcome
        .opened_meanwhile
        .iter()
        .map(|image| skipped(*image, Skip::OpenedMeanwhile));
    let refused = outcome.refused.iter().map(|(image, reason)| skipped(*image, *reason));
    let unreadable: BTreeSet<_> = outcome.unreadable.iter().filter_map(unreadable_image).collect();
    let changed = ImageId::first(fs.image_count()).filter(|image| fs.may_touch(*image) && !fs.is_unchanged(*image));
    let changed = changed.map(|image| skipped(image, Skip::Changed));
    opened.chain(refused).chain(unreadable).chain(changed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_left_for_reading() {
        assert_eq!([0, 1, 2, 3, 4, 8, 9, 64].map(threads), [1, 1, 1, 2, 3, 7, 8, 8]);
    }
}
