//! Plans that compress: samples of extents are compressed to find out which gain by it.

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

/// What the user asked for; what becomes of each extent by it is its [`CompressionGoal`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressionRequest {
    /// Compress what gains by it.
    Zstd {
        /// How frames are made.
        packer: Packer,
        /// Whether what is compressed already is compressed again where that gains.
        recompress: bool,
    },
    /// Undo compression.
    Undo,
}

/// What samples of an extent became, in bytes.
#[derive(Debug, Clone, Copy, Default)]
struct SampledBytes {
    content: u64,
    /// Expected on disk, amid other content of the kind.
    expected: u64,
    /// On disk as frames of their own.
    alone: u64,
}

impl SampledBytes {
    fn and(self, other: Self) -> Self {
        Self {
            content: self.content + other.content,
            expected: self.expected + other.expected,
            alone: self.alone + other.alone,
        }
    }

    fn share(self) -> u16 {
        let share = u128::from(self.expected) * u128::from(CompressionGoal::WHOLE) / u128::from(self.content.max(1));
        u16::try_from(share)
            .unwrap_or(CompressionGoal::WHOLE)
            .min(CompressionGoal::WHOLE)
    }
}

/// Makes a plan that compresses extents that are candidates, or undoes that, as it is asked for; `go_on` and `prove` as in
/// [`plan_proved`].
///
/// # Errors
/// Whatever `go_on` or `prove` fails with.
pub fn plan_compressing<E>(
    request: Option<CompressionRequest>,
    facts: &mut Facts,
    options: &PlanOptions,
    go_on: &dyn Fn() -> Result<(), E>,
    mut prove: impl FnMut(&Facts, &[Slot]) -> Result<SpillVec<(Slot, Proof)>, E>,
    is_candidate: impl Fn(&Facts, ExtentId) -> bool,
    (fs, monitor): (&dyn Filesystem, &dyn Monitor),
) -> Result<ReclaimPlan, E> {
    /// Each plan may keep other extents than the one before, which are tried in turn; two or three are usual.
    const TRIALS_MAX: usize = 8;
    if request == Some(CompressionRequest::Undo) {
        undo(facts);
    }
    monitor.phase("Planning", 0);
    let mut plan = plan_proved(facts, options, go_on, &mut prove)?;
    if let Some(CompressionRequest::Zstd { packer, recompress }) = request {
        let mut trial = Trial::new(packer, recompress, facts.budget());
        for _ in 0..TRIALS_MAX {
            if !trial.look_at(facts, &plan.layout, &is_candidate, fs, monitor) {
                break;
            }
            monitor.phase("Planning", 0);
            plan = plan_proved(facts, options, go_on, &mut prove)?;
        }
    }
    Ok(plan)
}

/// Has extents that are compressed written as they are.
fn undo(facts: &mut Facts) {
    let plain = CompressionGoal {
        compression: Compression::None,
        share: CompressionGoal::WHOLE,
        rewrites: true,
    };
    for extent in &mut facts.extents {
        extent.compression_goal = (extent.class.compression != Compression::None).then_some(plain);
    }
}

/// Finds out what compression would make of extents.
#[derive(Debug)]
struct Trial {
    packer: Packer,
    recompress: bool,
    /// For each extent, a hash of the sample that was tried; 0 if none was.
    tried: SpillVec<u64>,
    pool: SampledBytes,
}

impl Trial {
    /// One that knows nothing yet. Unless it is to `recompress`, what is compressed already stays.
    fn new(packer: Packer, recompress: bool, budget: &Budget) -> Self {
        Self {
            packer,
            recompress,
            tried: SpillVec::new_in(budget),
            pool: SampledBytes::default(),
        }
    }

    /// Fills in how candidates are to lie on disk, by compressing samples of what a layout leaves of them. What cannot be read
    /// stays as it is. Says whether a plan is due that knows it: where this layout rewrites something without knowing, or keeps
    /// what is to be rewritten.
    fn look_at(
        &mut self,
        facts: &mut Facts,
        layout: &Layout,
        is_candidate: impl Fn(&Facts, ExtentId) -> bool,
        fs: &dyn Filesystem,
        monitor: &dyn Monitor,
    ) -> bool {
        /// Extents whose samples are compressed before the next are chosen.
        const AT_ONCE: usize = 4096;
        self.tried.resize(facts.extents.len(), 0);
        let wanted = |facts: &Facts, place: ExtentId| {
            let extent = &facts.extents[place.index()];
            let may = self.recompress || extent.class.compression == Compression::None;
            extent.class.checksummed && extent.pinned.is_none() && may && is_candidate(facts, place)
        };
        let places = ExtentId::numbered(&facts.extents).map(|(place, _)| place);
        let candidates = SpillVec::from_iter_in(places.filter(|place| wanted(facts, *place)), facts.budget());
        let all = |facts: &Facts, places: &[ExtentId]| -> u64 {
            let blocks = places.iter().map(|place| facts.extents[place.index()].blocks);
            blocks.map(bytes).sum()
        };
        monitor.phase("Trying compression", all(facts, &candidates));
        let mut is_new = false;
        for some in candidates.chunks(AT_ONCE) {
            if monitor.interrupted() {
                return false;
            }
            let chosen: Vec<(Sample, u64)> = samples(facts, layout, some.iter().copied())
                .map(|sample| (hash_of(&sample), sample))
                .filter(|(hash, sample)| {
                    let tried = self.tried[sample.extent.index()];
                    tried == 0 || (tried != *hash && !layout.is_gone(sample.extent))
                })
                .map(|(hash, sample)| (sample, hash))
                .collect();
            let sampled = self.compress(facts, &chosen, fs);
            monitor.advance(all(facts, some));
            for ((sample, hash), sampled) in chosen.iter().zip(sampled) {
                let Some(sampled) = sampled.filter(|sampled| sampled.content > 0) else {
                    continue;
                };
                self.tried[sample.extent.index()] = *hash;
                is_new |= self.learn(facts, layout, sample.extent, sampled);
            }
        }
        // What is found elsewhere altogether was not sampled. Should something of it be left over, it is like the rest.
        for place in candidates.into_iter().filter(|_| self.pool.content > 0) {
            let goal = &mut facts.extents[place.index()].compression_goal;
            goal.get_or_insert(CompressionGoal {
                compression: Compression::Zstd,
                share: self.pool.share(),
                rewrites: false,
            });
        }
        is_new
    }

    /// Fills in how an extent is to lie on disk, of which a sample was compressed. Says whether a plan is due that knows it.
    fn learn(&mut self, facts: &mut Facts, layout: &Layout, place: ExtentId, sampled: SampledBytes) -> bool {
        self.pool = self.pool.and(sampled);
        let extent = &mut facts.extents[place.index()];
        let blocks = u32::try_from(sampled.content / BLOCK_BYTES).unwrap_or(u32::MAX);
        let rewrites = self.packer.is_worth(sampled.alone, extent.disk_share(blocks));
        let is_new = if layout.is_gone(place) {
            extent.compression_goal.is_none()
        } else {
            rewrites && !extent.is_always_rewritten()
        };
        extent.compression_goal = Some(CompressionGoal {
            compression: Compression::Zstd,
            share: sampled.share(),
            rewrites,
        });
        is_new
    }

    /// Compresses samples on all cores; nothing becomes of what cannot be read.
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

/// A hash of what is in a sample; never 0.
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

/// What a window becomes; nothing if it cannot be read.
fn try_window(
    facts: &Facts,
    fs: &dyn Filesystem,
    packer: Packer,
    compressor: &mut Compressor<'_>,
    window: &[std::ops::Range<Slot>],
) -> Option<SampledBytes> {
    let content = read_slots(facts, fs, window).ok()?;
    let frame = compressor.compress(&content).ok()?.len();
    let whole = content.len() as u64;
    let alone = Some(on_disk(frame))
        .filter(|alone| packer.is_worth(*alone, whole))
        .unwrap_or(whole);
    let is_full = content.len() == COMPRESSED_BLOCKS_MAX as usize * BLOCK_LEN;
    // Less than a frame goes into one with others, whose last block is half full on average.
    let part = frame as u64 + whole * BLOCK_BYTES / 2 / bytes(COMPRESSED_BLOCKS_MAX);
    Some(SampledBytes {
        content: whole,
        expected: if is_full { alone } else { part.min(whole) },
        alone,
    })
}
