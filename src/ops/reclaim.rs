//! `reclaim`: shares what images have in common, and counts what that freed.

use std::collections::BTreeSet;
use std::time::Duration;

use super::{OpenPool, Scope, Survey, data_of, discover, log_skipped, open_pool, survey, unreadable};
use crate::block::bytes;
use crate::error::{Error, Result};
use crate::exec::compression::{CompressionRequest, plan_compressing};
use crate::exec::fingerprints::remember;
use crate::exec::reclaim::{ReclaimOutcome, ReclaimSettings, run};
use crate::facts::Facts;
use crate::frame::Packer;
use crate::fs::{Filesystem, ImageInfo, Purpose, freed_bytes, images, prove_slots};
use crate::index::ChunkIndex;
use crate::monitor::{Deadline, Monitor};
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::plan::{self, ReclaimPlan, plan_proved};
use crate::pool::{self, Skip, Skipped, machine_of};
use crate::report::{Done, Planned, PoolBytes, Reclaimed};
use crate::shown::size;

/// What the user chose.
#[derive(Debug, Clone)]
pub struct ReclaimOptions {
    /// What to work on.
    pub scope: Scope,
    /// Patterns of images that share among themselves only.
    pub groups: Vec<String>,
    /// How to plan.
    pub plan: plan::PlanOptions,
    /// What compression is asked for.
    pub compress: Option<CompressionRequest>,
    /// Stop after planning.
    pub dry_run: bool,
    /// Bytes that stay free on the filesystem whatever donors would take.
    pub reserve_bytes: u64,
    /// Stop in order after so long; the next run goes on from there.
    pub time: Option<Duration>,
}

/// Shortest runs, in blocks, from which on sending and copying images takes at most some twice as long as before: 64 KiB.
const FEW_FRAGMENTS_BLOCKS: u32 = 16;

/// Reclaims a pool, or says what that would do.
///
/// # Errors
/// Everything but images that have to be left alone: those are listed in the result. Where the run itself fails, what it
/// did until then is in the result, with the error.
pub fn reclaim(options: &ReclaimOptions, monitor: &dyn Monitor) -> Result<Reclaimed> {
    in_time(options, monitor, |deadline| {
        let (scope, mut found) = (&options.scope, discover(&options.scope, deadline)?);
        pool::group(&mut found.images, &options.groups)?;
        let purpose = if options.dry_run {
            Purpose::Plan
        } else {
            Purpose::Change
        };
        let (fs, skipped) = open_pool(data_of(found), purpose, deadline)?;
        reclaim_until(OpenPool::of(&*fs, skipped, scope, deadline), options, deadline)
    })
}

/// Reclaims a pool that is open, or says what that would do. Paths and groups are not looked at.
///
/// # Errors
/// As for [`reclaim`].
pub fn reclaim_on(pool: OpenPool<'_>, options: &ReclaimOptions, monitor: &dyn Monitor) -> Result<Reclaimed> {
    in_time(options, monitor, |deadline| reclaim_until(pool, options, deadline))
}

/// Stops a run when its time is over, and says whether that was why.
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

fn reclaim_until(pool: OpenPool<'_>, options: &ReclaimOptions, monitor: &Deadline<'_>) -> Result<Reclaimed> {
    let fs = pool.fs;
    let Survey {
        mut facts,
        skipped,
        fingerprinted,
        inline,
        index,
    } = survey(pool, &options.scope, true, monitor)?;
    let free_before = fs.free_bytes()?;
    let without = images(fs).filter(|image| !image.checksummed).count() as u64;
    let count = u64::from(fs.image_count());
    let mut result = Reclaimed {
        images: count,
        pool: PoolBytes::of(fs, &facts),
        fingerprinted,
        machines_in_use: machines_in_use(&skipped),
        skipped,
        inline_images: inline.len() as u64,
        unchecksummed_images: if without < count { without } else { 0 },
        dry_run: options.dry_run,
        interrupted: monitor.interrupted(),
        ..Reclaimed::default()
    };
    if result.interrupted {
        return Ok(result);
    }
    fs.shortcomings().iter().for_each(|one| monitor.note(one));
    let (plan, proved) = match make_plan(options, fs, &mut facts, monitor) {
        Err(Error::Interrupted) => {
            result.interrupted = true;
            return Ok(result);
        }
        made => made?,
    };
    recommend_longer_runs(fs, options, &plan, monitor)?;
    result.planned = Planned::of(&plan, proved);
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

/// How many machines are running, or were when their host stopped.
fn machines_in_use(skipped: &[Skipped]) -> u64 {
    let in_use = |one: &&Skipped| matches!(one.reason, Skip::InUse | Skip::Dirty | Skip::Running);
    // Kernels' modules are attached to many machines, and are none.
    let is_machine = |one: &&Skipped| !one.path.ends_with("modules.img");
    let used = skipped.iter().filter(in_use).filter(is_machine);
    let machines: BTreeSet<_> = used.map(|one| machine_of(&one.path)).collect();
    machines.len() as u64
}

/// Says what keeps images quick to send and to copy, where that seems to matter.
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

/// Carries a plan out, and counts what was freed.
fn carry_out(
    (fs, mut index): (&dyn Filesystem, Option<Box<dyn ChunkIndex>>),
    facts: &Facts,
    plan: &ReclaimPlan,
    free_before: u64,
    options: &ReclaimOptions,
    result: &mut Reclaimed,
    monitor: &dyn Monitor,
) -> Result<()> {
    let mut ran = ReclaimOutcome::default();
    let outcome = if plan.eliminations.is_empty() {
        Ok(())
    } else {
        run(facts, plan, settings(options), fs, monitor, &mut ran)
    };
    monitor.phase("Counting", 0);
    fs.close_donors()?;
    result.interrupted = ran.interrupted;
    let counted = freed_bytes(fs, facts, free_before);
    let left = left_meanwhile(fs, &ran);
    log_skipped(&left);
    result.skipped.extend(left);
    result.failed = outcome.err();
    match counted {
        Ok((freed_bytes, mut mapped)) => {
            // It is only a cache, and the next run does without.
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
                counts: ran.counts,
            });
        }
        Err(error) => result.failed = result.failed.take().or(Some(error)),
    }
    Ok(())
}

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

/// How many calls may be made at the same time on so many cores. One core is left for reading ahead, writing donors, and the filesystem's
/// own work.
fn threads(cores: usize) -> usize {
    /// All calls change the same trees of the filesystem, whose locks they have in common: many more threads would mostly wait.
    const THREADS_MAX: usize = 8;
    if cores <= 2 { 1 } else { (cores - 1).min(THREADS_MAX) }
}

/// Checks that compression can be as it is asked for, and notes what of it cannot.
fn check_compression(request: CompressionRequest, fs: &dyn Filesystem, monitor: &dyn Monitor) -> Result<()> {
    if !fs.compresses() {
        return Err(Error::NoCompression {
            path: fs.folder().to_owned(),
        });
    }
    let count = |is: fn(&ImageInfo) -> bool| images(fs).filter(|image| is(image)).count();
    if matches!(request, CompressionRequest::Zstd { .. }) {
        let notes = [
            (
                count(|image| image.stays_uncompressed),
                "are marked not to be compressed (property `compression=none`)",
            ),
            (
                count(|image| !image.checksummed),
                "have no checksums (nodatacow), without which btrfs compresses nothing",
            ),
        ];
        for (images, why) in notes.into_iter().filter(|(images, _)| *images > 0) {
            monitor.note(&format!("{images} images {why}: they stay as they are"));
        }
        if !fs.takes_frames() {
            monitor.note(
                "This kernel does not take extents that were compressed beforehand (Linux 5.18): the filesystem compresses them \
                 itself, at its own level",
            );
        }
    }
    Ok(())
}

/// Fails once the user asked to stop.
fn go_on(monitor: &dyn Monitor) -> Result<()> {
    if monitor.interrupted() {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

/// Makes a plan that fits into what is free, and says how many bytes were read for it.
fn make_plan(
    options: &ReclaimOptions,
    fs: &dyn Filesystem,
    facts: &mut Facts,
    monitor: &dyn Monitor,
) -> Result<(ReclaimPlan, u64)> {
    if let Some(request) = options.compress {
        check_compression(request, fs, monitor)?;
    }
    let mut proved = 0;
    let mut prove = |facts: &Facts, slots: &[Slot]| {
        proved += bytes(u32::try_from(slots.len()).unwrap_or(u32::MAX));
        prove_slots(fs, facts, slots, monitor)
    };
    let go_on = || go_on(monitor);
    let is_candidate = |facts: &Facts, extent: ExtentId| {
        let mut references = facts.references_to(extent);
        references.all(|reference| !fs.image(reference.image).stays_uncompressed)
    };
    let mut plan = plan_compressing(
        options.compress,
        facts,
        &options.plan,
        &go_on,
        &mut prove,
        is_candidate,
        (fs, monitor),
    )?;
    let all_free = fs.free_bytes()?;
    let free = all_free.saturating_sub(options.reserve_bytes);
    // Where less is free than is to stay, what is freed on the way makes up for that first.
    let is_short = |plan: &ReclaimPlan| {
        plan.needed_bytes > free || (all_free < options.reserve_bytes && plan.rewritten_bytes() > 0)
    };
    let grows = u64::try_from(-plan.freed_bytes()).unwrap_or(0);
    if grows > free {
        return Err(Error::Grows {
            path: fs.folder().to_owned(),
            grows_bytes: grows,
            free_bytes: free,
        });
    }
    if is_short(&plan) {
        // In small steps, each makes room for the next.
        let small = plan::PlanOptions {
            batch_bytes: free / 2,
            ..options.plan
        };
        plan = plan_proved(facts, &small, &go_on, &mut prove)?;
        if is_short(&plan) {
            monitor.note(&format!(
                "Only {} are free beyond the reserve of {}: what would take more on the way waits for the next run",
                size(free),
                size(options.reserve_bytes)
            ));
            let smaller = plan::PlanOptions {
                work_space_bytes: free,
                ..small
            };
            plan = plan_proved(facts, &smaller, &go_on, &mut prove)?;
        }
    }
    // What its file takes is free again before anybody counts what is.
    facts.planned_fingerprints = None;
    Ok((plan, proved))
}

/// Logs what is planned, extent by extent.
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
    for one in &plan.eliminations {
        let extent = &facts.extents[one.extent.index()];
        tracing::debug!(
            address = extent.address,
            bytes = bytes(extent.blocks),
            references = facts.reference_count(one.extent),
            freed_bytes = one.freed_bytes,
            rewritten_bytes = one.rewritten_bytes,
            "extent goes: {:?}",
            one.reason
        );
    }
}

/// Images that had to be left alone in the middle of the run.
fn left_meanwhile(fs: &dyn Filesystem, ran: &ReclaimOutcome) -> Vec<Skipped> {
    let one = |image: ImageId, reason| Skipped::new(fs.path(image), reason);
    let opened = ran
        .opened_meanwhile
        .iter()
        .map(|image| one(*image, Skip::OpenedMeanwhile));
    let refused = ran.refused.iter().map(|(image, reason)| one(*image, *reason));
    let unreadable: BTreeSet<_> = ran.unreadable.iter().filter_map(unreadable).collect();
    let changed = ImageId::first(fs.image_count()).filter(|image| fs.may_touch(*image) && !fs.is_unchanged(*image));
    let changed = changed.map(|image| one(image, Skip::Changed));
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
