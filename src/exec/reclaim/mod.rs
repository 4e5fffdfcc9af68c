//! Carries out a reclaim's plan: writes donors and shares ranges, batch by batch. Every range is shared as planned, or skipped and
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

/// Bytes that one call compares at most: btrfs splits longer ones (kernel: `BTRFS_MAX_DEDUPE_LEN`), and both files are locked.
pub const CALL_BYTES: u64 = 16 << 20;

/// What a run did, range by range.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct ReclaimCounts {
    /// System calls made.
    pub calls: u64,
    /// Bytes of images that now share what they were to share.
    pub shared_bytes: u64,
    /// Bytes found to differ, and left alone.
    pub differing_bytes: u64,
    /// Bytes that the filesystem refused to share, by the name of the error.
    pub refused_bytes: BTreeMap<String, u64>,
    /// Bytes of donors written.
    pub written_bytes: u64,
    /// Bytes not looked at because someone opened the image meanwhile.
    pub abandoned_bytes: u64,
    /// Extents that still were held after everything planned was shared, so that what held them was relocated.
    pub second_round_extents: u64,
    /// Extents that are still held after that.
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

/// What the user chose of how a plan is run.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReclaimSettings {
    /// Bytes that stay free on the filesystem.
    pub reserve_bytes: u64,
    /// How compressed donors are made.
    pub packer: Packer,
    /// Calls on different images that may be made at the same time. With 0 or 1, all are made one after the other.
    pub threads: usize,
}

/// How a run ended.
#[derive(Debug, Default)]
pub struct ReclaimOutcome {
    /// What was done.
    pub counts: ReclaimCounts,
    /// Images that someone opened during the run; they were left alone from then on.
    pub opened_meanwhile: BTreeSet<ImageId>,
    /// Images that the filesystem refused to touch, and why; they were left alone from then on.
    pub refused: BTreeMap<ImageId, Skip>,
    /// What could not be read. Extents that needed it stay; everything else was done.
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

/// Runs a plan to its end, or until the user asks to stop. `ran` tells what was done in either case, and after an error.
/// No donor is written that would leave less than the reserve free.
///
/// # Errors
/// Writing a donor, a full filesystem. Ranges that differ, cannot be read or are refused are no errors.
pub fn run(
    facts: &Facts,
    plan: &ReclaimPlan,
    settings: ReclaimSettings,
    fs: &dyn Filesystem,
    monitor: &dyn Monitor,
    ran: &mut ReclaimOutcome,
) -> Result<()> {
    let compared: u64 = plan.batches.iter().map(|batch| batch.compared_bytes).sum();
    let written: u64 = plan.layout.donors().iter().map(|donor| bytes(donor.blocks)).sum();
    monitor.phase("Sharing", compared + written);
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
        ran,
    };
    let shared = SharedBatches::default();
    std::thread::scope(|scope| {
        // However this ends, the writer must not wait for it.
        let _end = shared.end();
        let shared = &shared;
        // The donors of the next batch are written while one is shared; a rendezvous, so that it is never more than one.
        let (written, batches) = std::sync::mpsc::sync_channel(0);
        scope.spawn(move || {
            let mut donor_files = vec![None; plan.donor_files.len()];
            for (number, batch) in plan.batches.iter().enumerate() {
                let space = DonorSpace {
                    reserve_bytes: settings.reserve_bytes,
                    before: || shared.wait_for(number),
                };
                let (made, failed) = write_batch(writer, batch, &space, &mut donor_files);
                if written.send((batch, made, failed, donor_files.clone())).is_err() {
                    return;
                }
            }
        });
        let mut failed = None;
        for (batch, made, problem, donor_files) in batches {
            run.ran.counts.written_bytes += made.bytes;
            run.ran.unreadable.extend(made.unreadable);
            failed = failed.or(problem);
            run.batch(batch, &donor_files)?;
            shared.one_more();
            if run.ran.interrupted {
                break;
            }
        }
        failed.map_or(Ok(()), Err)
    })
}

/// Writes the donors of a batch. One that cannot be written keeps no other from being written: what does not need it can go all the same, and
/// may make the space that the next one takes. Of the errors, the first is returned.
fn write_batch(
    writer: DonorWriter<'_>,
    batch: &Batch,
    space: &DonorSpace<impl Fn()>,
    donor_files: &mut [Option<WrittenDonor>],
) -> (WrittenDonors, Option<Error>) {
    let (mut made, mut failed) = (WrittenDonors::default(), None);
    for file in range::each(batch.donor_files.clone()) {
        let donor_file = &writer.plan.donor_files[file.index()];
        let kept = space.keep(writer.plan, donor_file, writer.fs);
        match kept.and_then(|()| writer.write(donor_file, &mut made)) {
            Ok(donor) => donor_files[file.index()] = Some(donor),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    (made, failed)
}

/// How many batches were shared: what they freed is free only then.
#[derive(Default)]
struct SharedBatches {
    batches: Mutex<usize>,
    changed: Condvar,
}

impl SharedBatches {
    fn set(&self, change: impl FnOnce(&mut usize)) {
        change(&mut self.batches.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn one_more(&self) {
        self.set(|batches| *batches += 1);
    }

    fn wait_for(&self, number: usize) {
        let batches = self.batches.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(batches, |batches| *batches < number));
    }

    /// Whoever waits goes on when this is dropped.
    fn end(&self) -> impl Drop + '_ {
        struct End<'a>(&'a SharedBatches);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.set(|batches| *batches = usize::MAX);
            }
        }
        End(self)
    }
}

/// The space that donors may take.
struct DonorSpace<W> {
    /// What they must leave.
    reserve_bytes: u64,
    /// Waits until everything that comes before was shared.
    before: W,
}

impl<W: Fn()> DonorSpace<W> {
    /// Refuses a donor for which there is no space, even once everything before it was shared.
    fn keep(&self, plan: &ReclaimPlan, file: &DonorFile, fs: &dyn Filesystem) -> Result<()> {
        let donors = file.extents.iter().map(|extent| &plan.layout.donors()[extent.index()]);
        let needed = donors.map(|donor| bytes(donor.blocks)).sum::<u64>();
        let fits = || Ok(fs.free_bytes()? >= needed.saturating_add(self.reserve_bytes));
        if fits()? {
            return Ok(());
        }
        (self.before)();
        // What was freed since the last commit is not available before the next.
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

struct ReclaimRun<'a> {
    facts: &'a Facts,
    plan: &'a ReclaimPlan,
    fs: &'a dyn Filesystem,
    monitor: &'a dyn Monitor,
    writer: DonorWriter<'a>,
    threads: usize,
    ran: &'a mut ReclaimOutcome,
}

/// A range to share, in bytes and with its files resolved.
#[derive(Debug, Clone, Copy)]
struct ShareCall {
    source: SourceFile,
    source_offset: u64,
    image: ImageId,
    offset: u64,
    length: u64,
}

impl ReclaimRun<'_> {
    /// Shares what a batch is about; `donor_files` are the donors that were made for the plan's donor files.
    fn batch(&mut self, batch: &Batch, donor_files: &[Option<WrittenDonor>]) -> Result<()> {
        if self.stop() {
            return Ok(());
        }
        let (fs, monitor, plan, facts) = (self.fs, self.monitor, self.plan, self.facts);
        // What needs a donor that is not there, or an image that someone opened, stays as it is: moving the rest of it would free
        // nothing.
        let has_all = |extent: &ExtentId| plan.ops(facts, *extent).all(|op| call(fs, donor_files, &op).is_some());
        let calls = |extent| plan.ops(facts, extent).filter_map(|op| call(fs, donor_files, &op));
        let is_free = |extent: &ExtentId| {
            let is_free = calls(*extent).all(|call| opened(fs, &call).next().is_none());
            if !is_free {
                calls(*extent).for_each(|call| abandon(fs, &call, self.ran));
            }
            is_free
        };
        let extents = plan.eliminations[batch.eliminations.clone()]
            .iter()
            .map(|one| one.extent);
        let extents: SpillVec<ExtentId> =
            SpillVec::from_iter_in(extents.filter(has_all).filter(is_free), facts.budget());
        let ops = extents.iter().flat_map(|extent| plan.ops(facts, *extent));
        let calls = ops.filter_map(|op| call(fs, donor_files, &op));
        let caller = Caller {
            fs,
            monitor,
            threads: self.threads,
        };
        let ran = &mut *self.ran;
        prefetch::ahead(fs, self.threads, calls.flat_map(split), |window| {
            caller.share_all(window, ran)?;
            Ok(!ran.interrupted)
        })?;
        self.fs.commit()?;
        if self.ran.interrupted {
            return Ok(());
        }
        relocation::relocate_rest(self, &extents)
    }

    fn stop(&mut self) -> bool {
        self.ran.interrupted |= self.monitor.interrupted();
        self.ran.interrupted
    }
}

/// The range to share for an op; none if its donor does not hold it.
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

/// Cuts a range into calls of at most [`CALL_BYTES`].
fn split(call: ShareCall) -> impl Iterator<Item = ShareCall> {
    (0..call.length.div_ceil(CALL_BYTES)).map(move |n| ShareCall {
        source_offset: call.source_offset + n * CALL_BYTES,
        offset: call.offset + n * CALL_BYTES,
        length: CALL_BYTES.min(call.length - n * CALL_BYTES),
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

/// Counts a call that is not made.
fn abandon(fs: &dyn Filesystem, call: &ShareCall, ran: &mut ReclaimOutcome) {
    log_skipped(fs, call, &"someone opened an image that it needs");
    ran.counts.abandoned_bytes += call.length;
    ran.opened_meanwhile.extend(opened(fs, call));
}

/// Makes one call. Where the bytes differ somewhere, the blocks that are equal are shared all the same.
fn share(fs: &dyn Filesystem, call: ShareCall, ran: &mut ReclaimOutcome) -> Result<()> {
    if opened(fs, &call).next().is_some() {
        abandon(fs, &call, ran);
        return Ok(());
    }
    if ran
        .refused
        .get(&call.image)
        .is_some_and(|reason| *reason != Skip::Refused)
    {
        log_skipped(fs, &call, &"the filesystem refuses to touch the image");
        ran.counts.abandoned_bytes += call.length;
        return Ok(());
    }
    ran.counts.calls += 1;
    let try_it = || fs.share(call.source, call.source_offset, call.image, call.offset, call.length);
    let mut outcome = try_it();
    if is_full(outcome) {
        // What was freed since the last commit is not available before the next.
        fs.commit()?;
        outcome = try_it();
    }
    match outcome {
        ShareOutcome::Shared => ran.counts.shared_bytes += call.length,
        ShareOutcome::Differs if call.length > BLOCK_BYTES => share_equal_blocks(fs, call, ran),
        ShareOutcome::Differs => differs(fs, &call, ran),
        ShareOutcome::Refused(errno) if is_full(outcome) => {
            return Err(Error::writing("share blocks of", fs.path(call.image))(errno));
        }
        ShareOutcome::Refused(errno) => refused(fs, call, errno, ran),
    }
    Ok(())
}

/// Logs that a range is not shared, and why.
fn log_skipped(fs: &dyn Filesystem, call: &ShareCall, why: &dyn std::fmt::Display) {
    let (start, length) = (call.offset, call.length);
    tracing::debug!(image = %shown(fs.path(call.image)), start, length, "not shared: {why}");
}

/// Counts a range whose bytes are not those of its source.
fn differs(fs: &dyn Filesystem, call: &ShareCall, ran: &mut ReclaimOutcome) {
    log_skipped(fs, call, &"the bytes differ");
    ran.counts.differing_bytes += call.length;
}

/// Remembers what was refused, and why as far as can be told.
fn refused(fs: &dyn Filesystem, call: ShareCall, errno: Errno, ran: &mut ReclaimOutcome) {
    log_skipped(fs, &call, &errno);
    *ran.counts.refused_bytes.entry(name_of(errno)).or_default() += call.length;
    // What `remap_file_range` and btrfs answer for a whole file (kernel: fs/remap_range.c, fs/btrfs/reflink.c).
    let whole = match errno {
        Errno::AGAIN => Some(Skip::BeingSent),
        Errno::TXTBSY => Some(Skip::SwapFile),
        Errno::PERM => Some(Skip::Immutable),
        Errno::ROFS => Some(Skip::ReadOnlyMount),
        _ => None,
    };
    if let Some(reason) = whole {
        ran.refused.insert(call.image, reason);
        return;
    }
    let sides = [
        (call.source, call.source_offset),
        (SourceFile::Image(call.image), call.offset),
    ];
    let mut sides = sides.into_iter().filter(|_| errno == Errno::IO);
    match sides.find_map(|(file, offset)| first_unreadable(fs, file, offset, call.length)) {
        Some(error) => ran.unreadable.push(error),
        None => {
            ran.refused.entry(call.image).or_insert(Skip::Refused);
        }
    }
}

/// The error of the first block of a range that cannot be read.
fn first_unreadable(fs: &dyn Filesystem, file: SourceFile, offset: u64, length: u64) -> Option<Error> {
    let mut block = [0; BLOCK_LEN];
    (offset..offset + length)
        .step_by(BLOCK_LEN)
        .find_map(|at| fs.read(file, at, &mut block).err())
}

fn is_full(outcome: ShareOutcome) -> bool {
    matches!(outcome, ShareOutcome::Refused(errno) if Exhausted::of(errno.kind()).is_some())
}

/// Shares the runs of blocks of a range that are equal, and counts those that are not.
fn share_equal_blocks(fs: &dyn Filesystem, call: ShareCall, ran: &mut ReclaimOutcome) {
    /// Bytes compared at a time.
    const WINDOW_BYTES: u64 = 1 << 20;
    let (mut theirs, mut ours) = (Vec::new(), Vec::new());
    let mut equal: Option<ShareCall> = None;
    let flush = |equal: &mut Option<ShareCall>, ran: &mut ReclaimOutcome| {
        let Some(call) = equal.take() else { return };
        ran.counts.calls += 1;
        match fs.share(call.source, call.source_offset, call.image, call.offset, call.length) {
            ShareOutcome::Shared => ran.counts.shared_bytes += call.length,
            // It changed since it was read a moment ago. Whatever holds the extent is relocated.
            ShareOutcome::Differs => differs(fs, &call, ran),
            ShareOutcome::Refused(errno) => refused(fs, call, errno, ran),
        }
    };
    let mut done = 0;
    while done < call.length {
        let length = WINDOW_BYTES.min(call.length - done);
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        theirs.resize(size, 0);
        ours.resize(size, 0);
        let read = fs
            .read(call.source, call.source_offset + done, &mut theirs)
            .and_then(|()| fs.read(SourceFile::Image(call.image), call.offset + done, &mut ours));
        if let Err(error) = read {
            // Of what cannot be read nothing is known to be equal.
            let offset = call.offset + done;
            log_skipped(fs, &ShareCall { offset, length, ..call }, &describe(&error));
            ran.unreadable.push(error);
            flush(&mut equal, ran);
            ran.counts.differing_bytes += length;
            done += length;
            continue;
        }
        for (block, at) in theirs
            .chunks(BLOCK_LEN)
            .zip(ours.chunks(BLOCK_LEN))
            .zip((done..).step_by(BLOCK_LEN))
        {
            if block.0 == block.1 {
                let grown = equal.get_or_insert(ShareCall {
                    source_offset: call.source_offset + at,
                    offset: call.offset + at,
                    length: 0,
                    ..call
                });
                grown.length += BLOCK_BYTES;
            } else {
                flush(&mut equal, ran);
                let (offset, length) = (call.offset + at, BLOCK_BYTES);
                differs(fs, &ShareCall { offset, length, ..call }, ran);
            }
        }
        done += length;
    }
    flush(&mut equal, ran);
}

fn name_of(errno: Errno) -> String {
    std::io::Error::from(errno).to_string()
}
