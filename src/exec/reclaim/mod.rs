//! Carries out a [`ReclaimPlan`] batch by batch: writes its donors, and shares its ranges. Every range is shared as planned, or skipped and
//! counted.

mod donors;
mod parallel;
mod prefetch;
mod relocation;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, PoisonError};

use rustix::io::Errno;

use donors::{DonorWriter, WrittenDonor, WrittenDonors};
use parallel::Caller;

use crate::block::{BLOCK_BYTES, BLOCK_LEN, bytes};
use crate::error::{Error, Exhausted, Result, describe};
use crate::facts::Facts;
use crate::frame::Packer;
use crate::fs::{Filesystem, ShareOutcome, SourceFile};
use crate::monitor::Monitor;
use crate::numbers::{ExtentId, ImageId};
use crate::plan::{Batch, DonorFile, Op, ReclaimPlan, ShareSource};
use crate::pool::Skip;
use crate::range;
use crate::shown::shown;
use crate::spill::SpillVec;

/// Bytes that one call compares at most. The kernel locks both files meanwhile, and btrfs splits longer calls (kernel:
/// `BTRFS_MAX_DEDUPE_LEN`).
pub const CALL_BYTES: u64 = 16 << 20;

/// The counts of a run. Bytes are those of image ranges, if not said otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct ReclaimCounts {
    /// System calls that share ranges.
    pub calls: u64,
    /// Bytes that were shared as planned.
    pub shared_bytes: u64,
    /// Bytes that differ from those that they were to share, or could not be read to compare them.
    pub differing_bytes: u64,
    /// Bytes that the filesystem refused to share, by the text of the error.
    pub refused_bytes: BTreeMap<String, u64>,
    /// Bytes that were written to donors, uncompressed.
    pub written_bytes: u64,
    /// Bytes that were not compared, because someone opened an image that they need, or the filesystem refused the image before.
    pub abandoned_bytes: u64,
    /// Extents that were still held after all planned ranges were shared. The ranges that held them were relocated.
    pub second_round_extents: u64,
    /// Extents that were still held after the relocation.
    pub extents_still_held: u64,
}

impl ReclaimCounts {
    fn add(&mut self, more: Self) {
        let Self {
            calls,
            shared_bytes,
            differing_bytes,
            refused_bytes,
            written_bytes,
            abandoned_bytes,
            second_round_extents,
            extents_still_held,
        } = more;
        self.calls += calls;
        self.shared_bytes += shared_bytes;
        self.differing_bytes += differing_bytes;
        for (error, bytes) in refused_bytes {
            *self.refused_bytes.entry(error).or_default() += bytes;
        }
        self.written_bytes += written_bytes;
        self.abandoned_bytes += abandoned_bytes;
        self.second_round_extents += second_round_extents;
        self.extents_still_held += extents_still_held;
    }
}

/// How a plan is carried out.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReclaimSettings {
    /// Bytes that stay free on the filesystem.
    pub reserve_bytes: u64,
    /// Makes the frames of compressed donors.
    pub packer: Packer,
    /// Threads that make calls at the same time, on files that they do not have in common. With 0 or 1, calls are made one after the other.
    pub threads: usize,
}

/// How a run ended.
#[derive(Debug, Default)]
pub struct ReclaimOutcome {
    /// The counts of what was done.
    pub counts: ReclaimCounts,
    /// Images that someone opened during the run. They were left alone from then on.
    pub opened_meanwhile: BTreeSet<ImageId>,
    /// Images of which the filesystem refused a range, with the reason. Unless the reason is [`Skip::Refused`], which stands for a single
    /// range, the image was left alone from then on.
    pub refused: BTreeMap<ImageId, Skip>,
    /// The errors of blocks that could not be read. Extents that needed such a block stay, and everything else was done.
    pub unreadable: Vec<Error>,
    /// Whether the user asked to stop before the end.
    pub interrupted: bool,
}

impl ReclaimOutcome {
    fn add(&mut self, more: Self) {
        let Self {
            counts,
            opened_meanwhile,
            refused,
            unreadable,
            interrupted,
        } = more;
        self.counts.add(counts);
        self.opened_meanwhile.extend(opened_meanwhile);
        self.refused.extend(refused);
        self.unreadable.extend(unreadable);
        self.interrupted |= interrupted;
    }
}

/// Carries a plan out to its end, or until the user asks to stop. What was done is added to `outcome`, also before an error. No donor is
/// written that would leave less than the reserve free.
///
/// # Errors
/// [`Error::Reserve`] if a donor does not fit; [`Error::NoSpace`] or [`Error::Io`] if a donor cannot be written or the filesystem is full.
/// Ranges that differ, cannot be read or are refused are not errors.
pub fn run(
    facts: &Facts,
    plan: &ReclaimPlan,
    settings: ReclaimSettings,
    fs: &dyn Filesystem,
    monitor: &dyn Monitor,
    outcome: &mut ReclaimOutcome,
) -> Result<()> {
    let compared_bytes: u64 = plan.batches.iter().map(|batch| batch.compared_bytes).sum();
    let written_bytes: u64 = plan.layout.donors().iter().map(|donor| bytes(donor.blocks)).sum();
    monitor.phase("Sharing", compared_bytes + written_bytes);
    let writer = DonorWriter {
        facts,
        plan,
        packer: settings.packer,
        fs,
        monitor,
    };
    let mut run = ReclaimRun {
        facts,
        plan,
        fs,
        monitor,
        writer,
        threads: settings.threads,
        outcome,
    };
    let shared = SharedBatches::default();
    std::thread::scope(|scope| {
        // The thread that writes donors must not wait for batches that are never shared, however this ends.
        let _end = shared.end();
        let shared = &shared;
        // The donors of the next batch are written while one is shared. The channel has no room, so there is never more than one ahead.
        let (ready, batches) = std::sync::mpsc::sync_channel(0);
        scope.spawn(move || {
            let mut donor_files = vec![None; plan.donor_files.len()];
            for (number, batch) in plan.batches.iter().enumerate() {
                let space = DonorSpace {
                    reserve_bytes: settings.reserve_bytes,
                    wait_for_shared: || shared.wait_for(number),
                };
                let (donors, first_error) = write_batch(writer, batch, &space, &mut donor_files);
                if ready.send((batch, donors, first_error, donor_files.clone())).is_err() {
                    return;
                }
            }
        });
        let mut first_error = None;
        for (batch, donors, error, donor_files) in batches {
            run.outcome.counts.written_bytes += donors.bytes;
            run.outcome.unreadable.extend(donors.unreadable);
            first_error = first_error.or(error);
            run.share_batch(batch, &donor_files)?;
            shared.add_one();
            if run.outcome.interrupted {
                break;
            }
        }
        first_error.map_or(Ok(()), Err)
    })
}

/// Writes the donors of a batch, and returns the first error. If one cannot be written, the others are written all the same: extents that do not
/// need it can go, and may make the space that the next donor takes.
fn write_batch(
    writer: DonorWriter<'_>,
    batch: &Batch,
    space: &DonorSpace<impl Fn()>,
    donor_files: &mut [Option<WrittenDonor>],
) -> (WrittenDonors, Option<Error>) {
    let (mut donors, mut first_error) = (WrittenDonors::default(), None);
    for file in range::each(batch.donor_files.clone()) {
        let donor_file = &writer.plan.donor_files[file.index()];
        let fits = space.check(writer.plan, donor_file, writer.fs);
        match fits.and_then(|()| writer.write(donor_file, &mut donors)) {
            Ok(donor) => donor_files[file.index()] = Some(donor),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    (donors, first_error)
}

/// Counts the batches that were shared. Only then is the space that they free available.
#[derive(Default)]
struct SharedBatches {
    count: Mutex<usize>,
    changed: Condvar,
}

impl SharedBatches {
    fn set(&self, change: impl FnOnce(&mut usize)) {
        change(&mut self.count.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn add_one(&self) {
        self.set(|count| *count += 1);
    }

    fn wait_for(&self, number: usize) {
        let count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(count, |count| *count < number));
    }

    /// Returns a guard. When it is dropped, nobody waits any longer.
    fn end(&self) -> impl Drop + '_ {
        struct End<'a>(&'a SharedBatches);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.set(|count| *count = usize::MAX);
            }
        }
        End(self)
    }
}

/// The free space that donors may take.
struct DonorSpace<W> {
    /// Bytes that have to stay free.
    reserve_bytes: u64,
    /// Waits until all batches before the current one were shared.
    wait_for_shared: W,
}

impl<W: Fn()> DonorSpace<W> {
    /// Checks that a donor fits. If it does not, this waits for the batches before it, commits, and checks once more.
    fn check(&self, plan: &ReclaimPlan, file: &DonorFile, fs: &dyn Filesystem) -> Result<()> {
        let donors = file.extents.iter().map(|extent| &plan.layout.donors()[extent.index()]);
        let needed_bytes = donors.map(|donor| bytes(donor.blocks)).sum::<u64>();
        let fits = || Ok(fs.free_bytes()? >= needed_bytes.saturating_add(self.reserve_bytes));
        if fits()? {
            return Ok(());
        }
        (self.wait_for_shared)();
        // Space that was freed since the last commit is available only after the next one.
        fs.commit()?;
        if fits()? {
            return Ok(());
        }
        Err(Error::Reserve {
            path: fs.path(ImageId(0)).to_owned(),
            reserve_bytes: self.reserve_bytes,
        })
    }
}

/// A plan that is being carried out.
struct ReclaimRun<'a> {
    facts: &'a Facts,
    plan: &'a ReclaimPlan,
    fs: &'a dyn Filesystem,
    monitor: &'a dyn Monitor,
    writer: DonorWriter<'a>,
    threads: usize,
    outcome: &'a mut ReclaimOutcome,
}

/// A range of an image that is to be shared with a range of another file. Offsets and the length are in bytes.
#[derive(Debug, Clone, Copy)]
struct ShareCall {
    source: SourceFile,
    source_offset: u64,
    image: ImageId,
    offset: u64,
    length: u64,
}

impl ReclaimRun<'_> {
    /// Shares the ranges of a batch. `donor_files` has the donors that were written, by the number of the plan's donor file.
    fn share_batch(&mut self, batch: &Batch, donor_files: &[Option<WrittenDonor>]) -> Result<()> {
        if self.stop() {
            return Ok(());
        }
        let (fs, monitor, plan, facts) = (self.fs, self.monitor, self.plan, self.facts);
        // An extent stays if it needs a donor that is not there, or an image that someone opened. Moving the rest of its references would
        // free nothing.
        let has_all = |extent: &ExtentId| plan.ops(facts, *extent).all(|op| call(fs, donor_files, &op).is_some());
        let calls = |extent| plan.ops(facts, extent).filter_map(|op| call(fs, donor_files, &op));
        let is_free = |extent: &ExtentId| {
            let is_free = calls(*extent).all(|call| opened(fs, &call).next().is_none());
            if !is_free {
                calls(*extent).for_each(|call| abandon(fs, &call, self.outcome));
            }
            is_free
        };
        let extents = plan.eliminations[batch.eliminations.clone()]
            .iter()
            .map(|elimination| elimination.extent);
        let extents: SpillVec<ExtentId> =
            SpillVec::from_iter_in(extents.filter(has_all).filter(is_free), facts.budget());
        let ops = extents.iter().flat_map(|extent| plan.ops(facts, *extent));
        let calls = ops.filter_map(|op| call(fs, donor_files, &op));
        let caller = Caller {
            fs,
            monitor,
            threads: self.threads,
        };
        let outcome = &mut *self.outcome;
        prefetch::ahead(fs, self.threads, calls.flat_map(split), |window| {
            caller.share_all(window, outcome)?;
            Ok(!outcome.interrupted)
        })?;
        self.fs.commit()?;
        if self.outcome.interrupted {
            return Ok(());
        }
        relocation::relocate_rest(self, &extents)
    }

    /// Whether the user has asked to stop, which is noted in the outcome.
    fn stop(&mut self) -> bool {
        self.outcome.interrupted |= self.monitor.interrupted();
        self.outcome.interrupted
    }
}

/// The call for an op. It is `None` if the op's donor does not hold the blocks.
fn call(fs: &dyn Filesystem, donor_files: &[Option<WrittenDonor>], op: &Op) -> Option<ShareCall> {
    let (source, source_block) = match op.source {
        ShareSource::Image { image, block } => (SourceFile::Image(image), block),
        ShareSource::Donor { file, block } => {
            let donor = donor_files[file.index()].as_ref();
            let donor = donor.filter(|donor| donor.has(&(block..block + op.blocks)))?;
            (SourceFile::Donor(donor.id), block)
        }
        ShareSource::Hole => (
            SourceFile::Hole {
                checksummed: fs.image(op.image).checksummed,
            },
            op.file_block,
        ),
    };
    Some(ShareCall {
        source,
        source_offset: bytes(source_block),
        image: op.image,
        offset: bytes(op.file_block),
        length: bytes(op.blocks),
    })
}

/// Splits a call into calls of [`CALL_BYTES`] at most.
fn split(call: ShareCall) -> impl Iterator<Item = ShareCall> {
    (0..call.length.div_ceil(CALL_BYTES)).map(move |number| ShareCall {
        source_offset: call.source_offset + number * CALL_BYTES,
        offset: call.offset + number * CALL_BYTES,
        length: CALL_BYTES.min(call.length - number * CALL_BYTES),
        ..call
    })
}

/// The images of a call that someone opened meanwhile.
fn opened(fs: &dyn Filesystem, call: &ShareCall) -> impl Iterator<Item = ImageId> {
    let source = match call.source {
        SourceFile::Image(source) => Some(source),
        _ => None,
    };
    let images = [Some(call.image), source].into_iter().flatten();
    images.filter(|image| !fs.may_touch(*image))
}

/// Counts a call that is not made because someone opened one of its images.
fn abandon(fs: &dyn Filesystem, call: &ShareCall, outcome: &mut ReclaimOutcome) {
    log_skipped(fs, call, &"someone opened an image that it needs");
    outcome.counts.abandoned_bytes += call.length;
    outcome.opened_meanwhile.extend(opened(fs, call));
}

/// Makes one call. If only some of the blocks differ, the others are shared all the same.
fn share(fs: &dyn Filesystem, call: ShareCall, outcome: &mut ReclaimOutcome) -> Result<()> {
    if opened(fs, &call).next().is_some() {
        abandon(fs, &call, outcome);
        return Ok(());
    }
    if outcome
        .refused
        .get(&call.image)
        .is_some_and(|reason| *reason != Skip::Refused)
    {
        log_skipped(fs, &call, &"the filesystem refuses to touch the image");
        outcome.counts.abandoned_bytes += call.length;
        return Ok(());
    }
    outcome.counts.calls += 1;
    let try_share = || fs.share(call.source, call.source_offset, call.image, call.offset, call.length);
    let mut shared = try_share();
    if is_full(shared) {
        // Space that was freed since the last commit is available only after the next one.
        fs.commit()?;
        shared = try_share();
    }
    match shared {
        ShareOutcome::Shared => outcome.counts.shared_bytes += call.length,
        ShareOutcome::Differs if call.length > BLOCK_BYTES => share_equal_blocks(fs, call, outcome),
        ShareOutcome::Differs => count_differing(fs, &call, outcome),
        ShareOutcome::Refused(errno) if is_full(shared) => {
            return Err(Error::writing("share blocks of", fs.path(call.image))(errno));
        }
        ShareOutcome::Refused(errno) => count_refused(fs, call, errno, outcome),
    }
    Ok(())
}

/// Logs that a range is not shared, and why.
fn log_skipped(fs: &dyn Filesystem, call: &ShareCall, why: &dyn std::fmt::Display) {
    let (start, length) = (call.offset, call.length);
    tracing::debug!(image = %shown(fs.path(call.image)), start, length, "not shared: {why}");
}

/// Counts a range whose bytes differ from those of its source.
fn count_differing(fs: &dyn Filesystem, call: &ShareCall, outcome: &mut ReclaimOutcome) {
    log_skipped(fs, call, &"the bytes differ");
    outcome.counts.differing_bytes += call.length;
}

/// Counts a range that the filesystem refused, and notes the reason: that of the whole image, a block that cannot be read, or an unknown
/// one.
fn count_refused(fs: &dyn Filesystem, call: ShareCall, errno: Errno, outcome: &mut ReclaimOutcome) {
    log_skipped(fs, &call, &errno);
    *outcome.counts.refused_bytes.entry(name_of(errno)).or_default() += call.length;
    // The errors by which the kernel refuses a whole file (kernel: fs/remap_range.c, fs/btrfs/reflink.c).
    let reason_of_image = match errno {
        Errno::AGAIN => Some(Skip::BeingSent),
        Errno::TXTBSY => Some(Skip::SwapFile),
        Errno::PERM => Some(Skip::Immutable),
        Errno::ROFS => Some(Skip::ReadOnlyMount),
        _ => None,
    };
    if let Some(reason) = reason_of_image {
        outcome.refused.insert(call.image, reason);
        return;
    }
    let sides = [
        (call.source, call.source_offset),
        (SourceFile::Image(call.image), call.offset),
    ];
    let mut sides = sides.into_iter().filter(|_| errno == Errno::IO);
    match sides.find_map(|(file, offset)| first_unreadable(fs, file, offset, call.length)) {
        Some(error) => outcome.unreadable.push(error),
        None => {
            outcome.refused.entry(call.image).or_insert(Skip::Refused);
        }
    }
}

/// The error of reading the first block of a range that cannot be read.
fn first_unreadable(fs: &dyn Filesystem, file: SourceFile, offset: u64, length: u64) -> Option<Error> {
    let mut block = [0; BLOCK_LEN];
    (offset..offset + length)
        .step_by(BLOCK_LEN)
        .find_map(|at| fs.read(file, at, &mut block).err())
}

/// Whether a call was refused because space or a quota is used up.
fn is_full(shared: ShareOutcome) -> bool {
    matches!(shared, ShareOutcome::Refused(errno) if Exhausted::of(errno.kind()).is_some())
}

/// Compares a range block by block, shares the runs of equal blocks, and counts the others.
fn share_equal_blocks(fs: &dyn Filesystem, call: ShareCall, outcome: &mut ReclaimOutcome) {
    /// Bytes that are read at a time.
    const WINDOW_BYTES: u64 = 1 << 20;
    let (mut source_content, mut image_content) = (Vec::new(), Vec::new());
    let mut equal: Option<ShareCall> = None;
    let flush = |equal: &mut Option<ShareCall>, outcome: &mut ReclaimOutcome| {
        let Some(call) = equal.take() else { return };
        outcome.counts.calls += 1;
        match fs.share(call.source, call.source_offset, call.image, call.offset, call.length) {
            ShareOutcome::Shared => outcome.counts.shared_bytes += call.length,
            // The blocks changed since they were read. What still holds the extent is relocated later.
            ShareOutcome::Differs => count_differing(fs, &call, outcome),
            ShareOutcome::Refused(errno) => count_refused(fs, call, errno, outcome),
        }
    };
    let mut done = 0;
    while done < call.length {
        let length = WINDOW_BYTES.min(call.length - done);
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        source_content.resize(size, 0);
        image_content.resize(size, 0);
        let read = fs
            .read(call.source, call.source_offset + done, &mut source_content)
            .and_then(|()| fs.read(SourceFile::Image(call.image), call.offset + done, &mut image_content));
        if let Err(error) = read {
            // Blocks that cannot be read are not known to be equal.
            let offset = call.offset + done;
            log_skipped(fs, &ShareCall { offset, length, ..call }, &describe(&error));
            outcome.unreadable.push(error);
            flush(&mut equal, outcome);
            outcome.counts.differing_bytes += length;
            done += length;
            continue;
        }
        for (blocks, at) in source_content
            .chunks(BLOCK_LEN)
            .zip(image_content.chunks(BLOCK_LEN))
            .zip((done..).step_by(BLOCK_LEN))
        {
            if blocks.0 == blocks.1 {
                let run = equal.get_or_insert(ShareCall {
                    source_offset: call.source_offset + at,
                    offset: call.offset + at,
                    length: 0,
                    ..call
                });
                run.length += BLOCK_BYTES;
            } else {
                flush(&mut equal, outcome);
                let (offset, length) = (call.offset + at, BLOCK_BYTES);
                count_differing(fs, &ShareCall { offset, length, ..call }, outcome);
            }
        }
        done += length;
    }
    flush(&mut equal, outcome);
}

fn name_of(errno: Errno) -> String {
    std::io::Error::from(errno).to_string()
}
