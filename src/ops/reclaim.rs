//! `reclaim`: shares what images have in common, and counts what that freed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::{Prepared, Scope, prepare_groups, unreadable};
use crate::block::{Slot, bytes};
use crate::error::{Error, Result};
use crate::exec::compression::{Wish, plan_wished};
use crate::exec::fingerprints::remember;
use crate::exec::{self, Ran};
use crate::facts::{Facts, ImageId};
use crate::frame::Packer;
use crate::fs::Sharing;
use crate::fs::volume::{Image, Purpose, Volume, freed_bytes};
use crate::monitor::{Deadline, Monitor};
use crate::plan::{self, ReclaimPlan, plan_proved};
use crate::pool::{Skip, Skipped, machine_of};
use crate::report::{Done, Planned, PoolBytes, Reclaimed};
use crate::shown::size;

/// What the user chose.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to work on.
    pub scope: Scope,
    /// Patterns of images that share among themselves only.
    pub groups: Vec<String>,
    /// How to plan.
    pub plan: plan::ReclaimOptions,
    /// What compression is wished.
    pub compress: Option<Wish>,
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
pub fn reclaim(options: &Options, monitor: &dyn Monitor) -> Result<Reclaimed> {
    let deadline = Deadline::new(monitor, options.time);
    let mut result = reclaim_until(options, &deadline)?;
    if result.interrupted && !monitor.interrupted() {
        (result.interrupted, result.out_of_time) = (false, true);
    }
    Ok(result)
}

fn reclaim_until(options: &Options, monitor: &Deadline<'_>) -> Result<Reclaimed> {
    let purpose = if options.dry_run {
        Purpose::Plan
    } else {
        Purpose::Change
    };
    let Prepared {
        fs,
        mut facts,
        skipped,
        fingerprinted,
        inline,
        mut index,
    } = prepare_groups(&options.scope, purpose, &options.groups, monitor)?;
    let free_before = fs.free_bytes()?;
    let in_use = |one: &&Skipped| matches!(one.reason, Skip::InUse | Skip::Dirty | Skip::Running);
    // Kernels' modules are attached to many machines, and are none.
    let is_machine = |one: &&Skipped| !one.path.ends_with("modules.img");
    let used = skipped.iter().filter(in_use).filter(is_machine);
    let machines: BTreeSet<_> = used.map(|one| machine_of(&one.path)).collect();
    let without = fs.images().iter().filter(|image| !image.checksummed).count();
    let mut result = Reclaimed {
        images: fs.images().len() as u64,
        pool: PoolBytes::of(&fs, &facts),
        fingerprinted,
        skipped,
        machines_in_use: machines.len() as u64,
        inline_images: inline.len() as u64,
        unchecksummed_images: if without < fs.images().len() { without as u64 } else { 0 },
        dry_run: options.dry_run,
        interrupted: monitor.interrupted(),
        ..Reclaimed::default()
    };
    if result.interrupted {
        return Ok(result);
    }
    fs.shortcomings().iter().for_each(|one| monitor.note(one));
    let (plan, proved) = match make_plan(options, &fs, &mut facts, monitor) {
        Err(Error::Interrupted) => {
            result.interrupted = true;
            return Ok(result);
        }
        made => made?,
    };
    if options.plan.min_run_blocks < FEW_FRAGMENTS_BLOCKS && !plan.eliminations.is_empty() && fs.may_be_sent()? {
        monitor.note(
            "There are read-only snapshots of these images. If you send or copy them often, --min-run 64K keeps that several \
             times faster, and frees somewhat less",
        );
    }
    result.planned = Planned::of(&plan, proved);
    result.held_by = if plan.pinned.is_empty() {
        BTreeMap::new()
    } else {
        fs.names_of_holders(&facts)?
    };
    if options.dry_run {
        return Ok(result);
    }
    let mut ran = Ran::default();
    let outcome = if plan.eliminations.is_empty() {
        Ok(())
    } else {
        exec::run(&facts, &plan, settings(options), &fs, monitor, &mut ran)
    };
    monitor.phase("Counting", 0);
    fs.close_donors()?;
    result.interrupted = ran.interrupted;
    let counted = freed_bytes(&fs, &facts, free_before);
    result.skipped.extend(left_meanwhile(&fs, &ran));
    result.failed = outcome.err();
    match counted {
        Ok((freed_bytes, mut mapped)) => {
            // It is only a cache, and the next run does without.
            let remembered = index
                .as_mut()
                .filter(|index| index.is_usable())
                .map(|index| remember(&fs, &facts, &mut mapped.facts, index));
            if let Some(Err(error)) = remembered {
                monitor.note(&crate::error::describe(&error));
            }
            result.done = Some(Done {
                freed_bytes,
                after: PoolBytes::of(&fs, &mapped.facts),
                counts: ran.counts,
            });
        }
        Err(error) => result.failed = result.failed.or(Some(error)),
    }
    Ok(result)
}

fn settings(options: &Options) -> exec::Settings {
    let packer = match options.compress {
        Some(Wish::Zstd { packer, .. }) => packer,
        _ => Packer::default(),
    };
    exec::Settings {
        reserve_bytes: options.reserve_bytes,
        packer,
    }
}

/// Checks that compression can be as it is wished, and notes what of it cannot.
fn check_compression(wish: Wish, fs: &Volume, monitor: &dyn Monitor) -> Result<()> {
    if fs.frees_blocks() {
        return Err(Error::NoCompression {
            path: fs.folder().to_owned(),
        });
    }
    let images = fs.images();
    let count = |is: fn(&Image) -> bool| images.iter().filter(|image| is(image)).count();
    if matches!(wish, Wish::Zstd { .. }) {
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

/// Makes a plan that fits into what is free, and says how many bytes were read for it.
fn make_plan(options: &Options, fs: &Volume, facts: &mut Facts, monitor: &dyn Monitor) -> Result<(ReclaimPlan, u64)> {
    if let Some(wish) = options.compress {
        check_compression(wish, fs, monitor)?;
    }
    let mut proved = 0;
    let mut prove = |facts: &Facts, slots: &[Slot]| {
        proved += bytes(u32::try_from(slots.len()).unwrap_or(u32::MAX));
        fs.prove(facts, slots, monitor)
    };
    let go_on = || {
        if monitor.interrupted() {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    };
    let is_candidate = |facts: &Facts, extent: u32| {
        let mut references = facts.references_to(extent);
        references.all(|reference| !fs.images()[reference.image as usize].stays_uncompressed)
    };
    let wish = options.compress;
    let mut plan = plan_wished(
        wish,
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
        let small = plan::ReclaimOptions {
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
            let smaller = plan::ReclaimOptions {
                work_space_bytes: free,
                ..small
            };
            plan = plan_proved(facts, &smaller, &go_on, &mut prove)?;
        }
    }
    // What its file takes is free again before anybody counts what is.
    let planned_fingerprints = facts.planned_fingerprints.take();
    for all in [Some(&facts.fingerprints), planned_fingerprints.as_ref()]
        .into_iter()
        .flatten()
    {
        all.check()
            .map_err(Error::io("use the file of fingerprints in", &options.scope.index))?;
    }
    Ok((plan, proved))
}

/// Images that had to be left alone in the middle of the run.
fn left_meanwhile(fs: &Volume, ran: &Ran) -> Vec<Skipped> {
    let one = |image: ImageId, reason| Skipped::new(fs.path(image), reason);
    let opened = ran
        .opened_meanwhile
        .iter()
        .map(|image| one(*image, Skip::OpenedMeanwhile));
    let refused = ran.refused.iter().map(|(image, reason)| one(*image, *reason));
    let unreadable: BTreeSet<_> = ran.unreadable.iter().filter_map(unreadable).collect();
    let changed = fs.images().iter();
    let changed = changed.filter(|image| image.may_touch() && !image.is_unchanged());
    let changed = changed.map(|image| Skipped::new(&image.path, Skip::Changed));
    opened.chain(refused).chain(unreadable).chain(changed).collect()
}
