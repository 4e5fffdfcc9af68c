//! Plans a reclaim. `reclaim`, its dry run and `report` all plan here, so that they say the same.

use crate::block::bytes;
use crate::error::{Error, Result};
use crate::exec::compression::{CompressionRequest, plan_compressing};
use crate::facts::Facts;
use crate::fs::{Filesystem, ImageInfo, images, prove_slots};
use crate::monitor::Monitor;
use crate::numbers::{ExtentId, Slot};
use crate::plan::{self, ReclaimPlan, plan_proved};
use crate::shown::{counted, size};

/// Bytes that stay free on the filesystem if the user does not say otherwise.
pub const RESERVE_BYTES: u64 = 128 << 20;

/// What a plan follows from, beside the pool.
#[derive(Debug, Clone, Copy)]
pub(super) struct PlanSettings {
    /// The limits of the plan.
    pub(super) plan: plan::PlanOptions,
    /// The compression that is asked for, if any.
    pub(super) compress: Option<CompressionRequest>,
    /// Bytes that stay free on the filesystem.
    pub(super) reserve_bytes: u64,
}

impl Default for PlanSettings {
    fn default() -> Self {
        Self {
            plan: plan::PlanOptions::default(),
            compress: None,
            reserve_bytes: RESERVE_BYTES,
        }
    }
}

/// Checks that the filesystem compresses, and notes how many images cannot be compressed.
///
/// # Errors
/// [`Error::NoCompression`].
fn check_compression(request: CompressionRequest, fs: &dyn Filesystem, monitor: &dyn Monitor) -> Result<()> {
    if !fs.compresses() {
        return Err(Error::NoCompression {
            path: fs.folder().to_owned(),
        });
    }
    let count = |matches: fn(&ImageInfo) -> bool| images(fs).filter(|image| matches(image)).count();
    if matches!(request, CompressionRequest::Zstd { .. }) {
        let notes = [
            (
                count(|image| image.stays_uncompressed),
                "marked not to be compressed (property `compression=none`)",
            ),
            (
                count(|image| !image.checksummed),
                "without checksums (nodatacow), which btrfs does not compress",
            ),
        ];
        for (images, reason) in notes.into_iter().filter(|(images, _)| *images > 0) {
            let images = counted(images as u64, "image");
            monitor.note(&format!("Not compressed: {images} {reason}"));
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

/// Returns [`Error::Interrupted`] once the user has asked to stop.
fn go_on(monitor: &dyn Monitor) -> Result<()> {
    if monitor.interrupted() {
        Err(Error::Interrupted)
    } else {
        Ok(())
    }
}

/// Makes a plan that fits into the free space, and returns how many bytes were read to prove that blocks are equal.
///
/// # Errors
/// [`Error::NoCompression`]; [`Error::Grows`] if undoing compression takes more than is free; [`Error::Interrupted`]; [`Error::Io`].
pub(super) fn make_plan(
    settings: &PlanSettings,
    fs: &dyn Filesystem,
    facts: &mut Facts,
    monitor: &dyn Monitor,
) -> Result<(ReclaimPlan, u64)> {
    if let Some(request) = settings.compress {
        check_compression(request, fs, monitor)?;
    }
    let mut proved_bytes = 0;
    let mut prove = |facts: &Facts, slots: &[Slot]| {
        proved_bytes += bytes(u32::try_from(slots.len()).unwrap_or(u32::MAX));
        prove_slots(fs, facts, slots, monitor)
    };
    let go_on = || go_on(monitor);
    let is_candidate = |facts: &Facts, extent: ExtentId| {
        let mut references = facts.references_to(extent);
        references.all(|reference| !fs.image(reference.image).stays_uncompressed)
    };
    let mut plan = plan_compressing(
        settings.compress,
        facts,
        &settings.plan,
        &go_on,
        &mut prove,
        is_candidate,
        (fs, monitor),
    )?;
    let free_bytes = fs.free_bytes()?;
    let usable_bytes = free_bytes.saturating_sub(settings.reserve_bytes);
    // If less is free than the reserve, the first bytes that are freed go to the reserve.
    let is_short = |plan: &ReclaimPlan| {
        plan.needed_bytes > usable_bytes || (free_bytes < settings.reserve_bytes && plan.rewritten_bytes() > 0)
    };
    let grows_bytes = u64::try_from(-plan.freed_bytes()).unwrap_or(0);
    if grows_bytes > usable_bytes {
        return Err(Error::Grows {
            path: fs.folder().to_owned(),
            grows_bytes,
            free_bytes: usable_bytes,
        });
    }
    if is_short(&plan) {
        // With small batches, each frees space for the next one.
        let small_batches = plan::PlanOptions {
            batch_bytes: usable_bytes / 2,
            ..settings.plan
        };
        plan = plan_proved(facts, &small_batches, &go_on, &mut prove)?;
        if is_short(&plan) {
            monitor.note(&format!(
                "Only {} are free beyond the reserve of {}: what would take more on the way waits for the next run",
                size(usable_bytes),
                size(settings.reserve_bytes)
            ));
            let little_space = plan::PlanOptions {
                work_space_bytes: usable_bytes,
                ..small_batches
            };
            plan = plan_proved(facts, &little_space, &go_on, &mut prove)?;
        }
    }
    // This removes the file of these fingerprints, so that its space counts as free.
    facts.planned_fingerprints = None;
    Ok((plan, proved_bytes))
}
