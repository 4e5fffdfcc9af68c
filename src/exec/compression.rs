//! Makes plans that compress. Samples of extents are read and compressed, to estimate which extents shrink enough.

use std::io;

use rayon::prelude::*;
use zstd::bulk::Compressor;

use crate::block::{BLOCK_BYTES, BLOCK_LEN, bytes};
use crate::facts::{Compression, CompressionGoal, Facts, Proof};
use crate::frame::{Packer, on_disk};
use crate::fs::{Filesystem, read_slots};
use crate::monitor::Monitor;
use crate::numbers::{ExtentId, Slot};
use crate::plan::sample::{Sample, samples};
use crate::plan::{COMPRESSED_BLOCKS_MAX, Layout, PlanOptions, ReclaimPlan, plan_proved};
use crate::spill::{Budget, SpillVec};

/// The compression that the user asked for. The [`CompressionGoal`] of each extent follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionRequest {
    /// Compress extents that shrink enough.
    Zstd {
        /// Makes the frames, and says how much they have to shrink.
        packer: Packer,
        /// Whether extents that are compressed already are compressed again if they shrink enough.
        recompress: bool,
    },
    /// Decompress all extents.
    Undo,
}

/// The sizes of samples before and after compression, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct SampledBytes {
    /// Their content, uncompressed.
    content: u64,
    /// What they are expected to take on disk in frames that hold other content as well.
    expected: u64,
    /// What they take on disk if each window is a frame of its own.
    alone: u64,
}

impl SampledBytes {
    /// The sum of both.
    fn and(self, other: Self) -> Self {
        Self {
            content: self.content + other.content,
            expected: self.expected + other.expected,
            alone: self.alone + other.alone,
        }
    }

    /// The expected size on disk as a part of the content, as in [`CompressionGoal::share`].
    fn share(self) -> u16 {
        let share = u128::from(self.expected) * u128::from(CompressionGoal::WHOLE) / u128::from(self.content.max(1));
        u16::try_from(share)
            .unwrap_or(CompressionGoal::WHOLE)
            .min(CompressionGoal::WHOLE)
    }
}

/// Makes a plan that compresses those extents that `is_candidate` accepts, or decompresses all, as requested. `go_on` and `prove` are those
/// of [`plan_proved`].
///
/// # Errors
/// Those of `go_on` and `prove`.
pub fn plan_compressing<E>(
    request: Option<CompressionRequest>,
    facts: &mut Facts,
    options: &PlanOptions,
    go_on: &dyn Fn() -> Result<(), E>,
    mut prove: impl FnMut(&Facts, &[Slot]) -> Result<SpillVec<(Slot, Proof)>, E>,
    is_candidate: impl Fn(&Facts, ExtentId) -> bool,
    (fs, monitor): (&dyn Filesystem, &dyn Monitor),
) -> Result<ReclaimPlan, E> {
    /// Plans that are made at most. Each may keep other extents than the one before, and these are then tried. Two or three are usual.
    const TRIALS_MAX: usize = 8;
    if request == Some(CompressionRequest::Undo) {
        decompress_all(facts);
    }
    monitor.phase("Planning", 0);
    let mut plan = plan_proved(facts, options, go_on, &mut prove)?;
    if let Some(CompressionRequest::Zstd { packer, recompress }) = request {
        let mut trial = Trial::new(packer, recompress, facts.budget());
        for _ in 0..TRIALS_MAX {
            if !trial.try_candidates(facts, &plan.layout, &is_candidate, fs, monitor) {
                break;
            }
            monitor.phase("Planning", 0);
            plan = plan_proved(facts, options, go_on, &mut prove)?;
        }
    }
    Ok(plan)
}

/// Sets the goal that each compressed extent is rewritten uncompressed.
fn decompress_all(facts: &mut Facts) {
    let uncompressed = CompressionGoal {
        compression: Compression::None,
        share: CompressionGoal::WHOLE,
        rewrites: true,
    };
    for extent in &mut facts.extents {
        extent.compression_goal = (extent.class.compression != Compression::None).then_some(uncompressed);
    }
}

/// Tries how much extents shrink by compression.
#[derive(Debug)]
struct Trial {
    packer: Packer,
    /// Whether extents that are compressed already are tried as well.
    recompress: bool,
    /// The hash of the sample of each extent that was tried last. It is 0 if none was.
    tried: SpillVec<u64>,
    /// The sum of all samples.
    pool: SampledBytes,
}

impl Trial {
    /// Makes a trial without any samples so far.
    fn new(packer: Packer, recompress: bool, budget: &Budget) -> Self {
        Self {
            packer,
            recompress,
            tried: SpillVec::new_in(budget),
            pool: SampledBytes::default(),
        }
    }

    /// Compresses samples of those parts of candidates that a layout keeps or rewrites, and sets their goals. Extents that cannot be read get
    /// none. Returns whether a new plan is needed: this layout rewrites an extent that had no goal, or keeps one that is to be rewritten.
    fn try_candidates(
        &mut self,
        facts: &mut Facts,
        layout: &Layout,
        is_candidate: impl Fn(&Facts, ExtentId) -> bool,
        fs: &dyn Filesystem,
        monitor: &dyn Monitor,
    ) -> bool {
        /// Extents whose samples are in memory together.
        const EXTENTS_AT_ONCE: usize = 4096;
        self.tried.resize(facts.extents.len(), 0);
        let may_compress = |facts: &Facts, place: ExtentId| {
            let extent = &facts.extents[place.index()];
            let may_recompress = self.recompress || extent.class.compression == Compression::None;
            extent.class.checksummed && extent.pinned.is_none() && may_recompress && is_candidate(facts, place)
        };
        let places = ExtentId::numbered(&facts.extents).map(|(place, _)| place);
        let candidates = SpillVec::from_iter_in(places.filter(|place| may_compress(facts, *place)), facts.budget());
        let total_bytes = |facts: &Facts, places: &[ExtentId]| -> u64 {
            let blocks = places.iter().map(|place| facts.extents[place.index()].blocks);
            blocks.map(bytes).sum()
        };
        monitor.phase("Trying compression", total_bytes(facts, &candidates));
        let mut needs_plan = false;
        for group in candidates.chunks(EXTENTS_AT_ONCE) {
            if monitor.interrupted() {
                return false;
            }
            let chosen: Vec<(Sample, u64)> = samples(facts, layout, group.iter().copied())
                .map(|sample| (hash_of(&sample), sample))
                .filter(|(hash, sample)| {
                    let tried = self.tried[sample.extent.index()];
                    tried == 0 || (tried != *hash && !layout.is_gone(sample.extent))
                })
                .map(|(hash, sample)| (sample, hash))
                .collect();
            let sampled = self.compress(facts, &chosen, fs);
            monitor.advance(total_bytes(facts, group));
            for ((sample, hash), sampled) in chosen.iter().zip(sampled) {
                let Some(sampled) = sampled.filter(|sampled| sampled.content > 0) else {
                    continue;
                };
                self.tried[sample.extent.index()] = *hash;
                needs_plan |= self.learn(facts, layout, sample.extent, sampled);
            }
        }
        // An extent whose blocks are all found elsewhere has no sample. If some of them are left over all the same, they are expected to
        // shrink as the rest of the pool does.
        for place in candidates.into_iter().filter(|_| self.pool.content > 0) {
            let goal = &mut facts.extents[place.index()].compression_goal;
            goal.get_or_insert(CompressionGoal {
                compression: Compression::Zstd,
                share: self.pool.share(),
                rewrites: false,
            });
        }
        needs_plan
    }

    /// Sets the goal of an extent by its sample. Returns whether a new plan is needed.
    fn learn(&mut self, facts: &mut Facts, layout: &Layout, place: ExtentId, sampled: SampledBytes) -> bool {
        self.pool = self.pool.and(sampled);
        let extent = &mut facts.extents[place.index()];
        let blocks = u32::try_from(sampled.content / BLOCK_BYTES).unwrap_or(u32::MAX);
        let rewrites = self.packer.is_worth(sampled.alone, extent.disk_share(blocks));
        let needs_plan = if layout.is_gone(place) {
            extent.compression_goal.is_none()
        } else {
            rewrites && !extent.is_always_rewritten()
        };
        extent.compression_goal = Some(CompressionGoal {
            compression: Compression::Zstd,
            share: sampled.share(),
            rewrites,
        });
        needs_plan
    }

    /// Compresses samples on all cores. The result is `None` for a sample that cannot be read.
    fn compress(&self, facts: &Facts, chosen: &[(Sample, u64)], fs: &dyn Filesystem) -> Vec<Option<SampledBytes>> {
        let compressor = || self.packer.compressor();
        let compress = |compressor: &mut io::Result<Compressor<'_>>, (sample, _): &(Sample, u64)| {
            let compressor = compressor.as_mut().ok()?;
            let windows = sample.windows.iter();
            windows
                .map(|window| try_window(facts, fs, self.packer, compressor, window))
                .sum()
        };
        chosen.par_iter().map_init(compressor, compress).collect()
    }
}

/// A hash of the slots that a sample consists of. It is never 0.
fn hash_of(sample: &Sample) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    for piece in sample.windows.iter().flatten() {
        hash.update(&piece.start.0.to_le_bytes());
        hash.update(&piece.end.0.to_le_bytes());
    }
    hash.digest().max(1)
}

impl std::iter::Sum for SampledBytes {
    fn sum<I: Iterator<Item = Self>>(windows: I) -> Self {
        windows.fold(Self::default(), Self::and)
    }
}

/// Compresses one window of a sample. The result is `None` if it cannot be read.
fn try_window(
    facts: &Facts,
    fs: &dyn Filesystem,
    packer: Packer,
    compressor: &mut Compressor<'_>,
    window: &[std::ops::Range<Slot>],
) -> Option<SampledBytes> {
    let content = read_slots(facts, fs, window).ok()?;
    let frame_bytes = compressor.compress(&content).ok()?.len();
    let content_bytes = content.len() as u64;
    let alone = Some(on_disk(frame_bytes))
        .filter(|alone| packer.is_worth(*alone, content_bytes))
        .unwrap_or(content_bytes);
    let is_full = content.len() == COMPRESSED_BLOCKS_MAX as usize * BLOCK_LEN;
    // A window that does not fill a frame shares one with other content. The last block of a frame is half full on average, and the window
    // bears its part of that loss.
    let part = frame_bytes as u64 + content_bytes * BLOCK_BYTES / 2 / bytes(COMPRESSED_BLOCKS_MAX);
    Some(SampledBytes {
        content: content_bytes,
        expected: if is_full { alone } else { part.min(content_bytes) },
        alone,
    })
}
