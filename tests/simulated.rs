//! Goal: plans and their execution are right for any pool. Method: random images, revisions and extents on a simulated
//! filesystem with reference counts that frees extents whole, as btrfs, or block by block, as XFS, where content, freed bytes and the next plan are compared with what was promised.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use rustix::io::Errno;
use vmfold::exec::compression::{CompressionRequest, plan_compressing};
use vmfold::exec::reclaim::{ReclaimOutcome, ReclaimSettings, run};
use vmfold::facts::{Class, Compression, Facts, proof_of};
use vmfold::frame::Packer;
use vmfold::fs::{Filesystem, SourceFile};
use vmfold::monitor::{Monitor, Silent};
use vmfold::numbers::{ImageId, Slot};
use vmfold::plan::{PlanOptions, ReclaimPlan};
use vmfold::testing::faulty_filesystem::{CHANGED, FaultyFilesystem, FilesystemCall, FilesystemFault};
use vmfold::testing::simulated::{BlockContent, Faults, INCOMPRESSIBLE, PLAIN, Simulated};

/// A step in the life of a pool.
#[derive(Debug, Clone)]
enum Step {
    /// A new image, written in extents of these lengths.
    Write {
        content: Vec<BlockContent>,
        extent_blocks: usize,
        nodatasum: bool,
    },
    /// A reflink of an image.
    Revision { of: prop::sample::Index },
    /// An image is overwritten somewhere.
    Overwrite {
        image: prop::sample::Index,
        at: prop::sample::Index,
        content: Vec<BlockContent>,
    },
    /// A range is preallocated.
    Preallocate {
        image: prop::sample::Index,
        at: prop::sample::Index,
        blocks: u32,
    },
    /// A range is punched out.
    Punch {
        image: prop::sample::Index,
        at: prop::sample::Index,
        blocks: u32,
    },
}

fn content() -> impl Strategy<Value = Vec<BlockContent>> {
    let stretch = prop_oneof![
        // From a common population, in order, so that runs recur.
        6 => (0u64..200, 1u64..40).prop_map(|(from, length)| (from..from + length).map(|n| 1 + n * 0x1_0001).collect::<Vec<_>>()),
        1 => (1usize..20).prop_map(|length| vec![0; length]),
        1 => (1u64..5, 1usize..60).prop_map(|(value, length)| vec![value; length]),
        2 => prop::collection::vec(1_000_000u64..9_000_000, 1..10),
        1 => prop::collection::vec(INCOMPRESSIBLE..INCOMPRESSIBLE + 9_000_000, 1..70),
    ];
    prop::collection::vec(stretch, 1..5).prop_map(|stretches| stretches.concat())
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>;
    prop_oneof![
        3 => (content(), 1usize..80, prop::bool::weighted(0.1))
            .prop_map(|(content, extent_blocks, nodatasum)| Step::Write { content, extent_blocks, nodatasum }),
        2 => index().prop_map(|of| Step::Revision { of }),
        3 => (index(), index(), content()).prop_map(|(image, at, content)| Step::Overwrite { image, at, content }),
        1 => (index(), index(), 1u32..20).prop_map(|(image, at, blocks)| Step::Preallocate { image, at, blocks }),
        1 => (index(), index(), 1u32..20).prop_map(|(image, at, blocks)| Step::Punch { image, at, blocks }),
    ]
}

const IMAGE_BLOCKS: usize = 256;

fn build(steps: &[Step], faults: Faults, frees_blocks: bool) -> Simulated {
    let mut fs = Simulated::default();
    (fs.faults, fs.frees_blocks) = (faults, frees_blocks);
    let mut classes: Vec<Class> = Vec::new();
    for step in steps {
        match step {
            Step::Write {
                content,
                extent_blocks,
                nodatasum,
            } => {
                let class = Class {
                    checksummed: !nodatasum,
                    compression: Compression::None,
                    groups: 0,
                };
                let image = fs.add_image(class.checksummed, IMAGE_BLOCKS);
                classes.push(class);
                let content = &content[..content.len().min(IMAGE_BLOCKS)];
                for (n, piece) in content.chunks(*extent_blocks).enumerate() {
                    let extent = fs.allocate(class, piece.to_vec());
                    fs.map(
                        image,
                        u32::try_from(n * extent_blocks).unwrap(),
                        extent,
                        0,
                        u32::try_from(piece.len()).unwrap(),
                        false,
                    );
                }
            }
            _ if classes.is_empty() => {}
            Step::Revision { of } => {
                let of = of.index(classes.len());
                fs.reflink(ImageId(u32::try_from(of).unwrap()));
                classes.push(classes[of]);
            }
            Step::Overwrite { image, at, content } => {
                let (image, at) = (image.index(classes.len()), at.index(IMAGE_BLOCKS));
                let content = &content[..content.len().min(IMAGE_BLOCKS - at)];
                let extent = fs.allocate(classes[image], content.to_vec());
                fs.map(
                    ImageId(u32::try_from(image).unwrap()),
                    u32::try_from(at).unwrap(),
                    extent,
                    0,
                    u32::try_from(content.len()).unwrap(),
                    false,
                );
            }
            Step::Preallocate { image, at, blocks } => {
                let (image, at) = (image.index(classes.len()), at.index(IMAGE_BLOCKS));
                let blocks = (*blocks).min(u32::try_from(IMAGE_BLOCKS - at).unwrap());
                let extent = fs.allocate(classes[image], vec![0; blocks as usize]);
                fs.map(
                    ImageId(u32::try_from(image).unwrap()),
                    u32::try_from(at).unwrap(),
                    extent,
                    0,
                    blocks,
                    true,
                );
            }
            Step::Punch { image, at, blocks } => {
                let (image, at) = (image.index(classes.len()), at.index(IMAGE_BLOCKS));
                let blocks = (*blocks).min(u32::try_from(IMAGE_BLOCKS - at).unwrap());
                fs.punch(
                    ImageId(u32::try_from(image).unwrap()),
                    u32::try_from(at).unwrap(),
                    blocks,
                );
            }
        }
    }
    fs
}

/// Adds images of one extent each.
fn add_images(fs: &Simulated, contents: impl IntoIterator<Item = Vec<BlockContent>>) {
    for content in contents {
        let (image, blocks) = (fs.add_image(true, IMAGE_BLOCKS), u32::try_from(content.len()).unwrap());
        let extent = fs.allocate(PLAIN, content);
        fs.map(image, 0, extent, 0, blocks, false);
    }
}

fn planned(fs: &Simulated, options: &PlanOptions) -> (Facts, ReclaimPlan) {
    planned_as(fs, options, None)
}

fn planned_as(fs: &Simulated, options: &PlanOptions, request: Option<CompressionRequest>) -> (Facts, ReclaimPlan) {
    let mut facts = fs.facts();
    let prove = |facts: &Facts, slots: &[Slot]| {
        let mut block = vec![0; 4096];
        Ok::<_, vmfold::error::Error>(
            slots
                .iter()
                .map(|slot| {
                    let place = facts.place_of(*slot..*slot + 1).unwrap();
                    fs.read(
                        SourceFile::Image(place.image),
                        u64::from(place.file_block) * 4096,
                        &mut block,
                    )
                    .unwrap();
                    (*slot, proof_of(&block))
                })
                .collect(),
        )
    };
    let plan = plan_compressing(
        request,
        &mut facts,
        options,
        &|| Ok(()),
        prove,
        |_, _| true,
        (fs, &Silent::default()),
    )
    .unwrap();
    (facts, plan)
}

/// One call after the other, and several at the same time.
const THREADS: [usize; 2] = [1, 4];

fn threads() -> impl Strategy<Value = usize> {
    prop::sample::select(&THREADS[..])
}

fn reclaim(fs: &Simulated, options: &PlanOptions, threads: usize) -> (ReclaimPlan, ReclaimOutcome) {
    reclaim_as(fs, options, None, threads)
}

fn reclaim_as(
    fs: &Simulated,
    options: &PlanOptions,
    request: Option<CompressionRequest>,
    threads: usize,
) -> (ReclaimPlan, ReclaimOutcome) {
    reclaim_until(fs, options, request, threads, &Silent::default())
}

fn reclaim_until(
    fs: &Simulated,
    options: &PlanOptions,
    request: Option<CompressionRequest>,
    threads: usize,
    monitor: &dyn Monitor,
) -> (ReclaimPlan, ReclaimOutcome) {
    let (facts, plan) = planned_as(fs, options, request);
    let mut ran = ReclaimOutcome::default();
    let packer = match request {
        Some(CompressionRequest::Zstd { packer, .. }) => packer,
        _ => Packer::default(),
    };
    let settings = ReclaimSettings {
        packer,
        threads,
        ..ReclaimSettings::default()
    };
    let _ = run(&facts, &plan, settings, fs, monitor, &mut ran);
    fs.close_donors();
    (plan, ran)
}

/// By image: references, and the blocks they map.
fn references(facts: &Facts) -> BTreeMap<ImageId, (u64, u64)> {
    let mut images = BTreeMap::new();
    for reference in facts.references() {
        let (references, blocks): &mut (u64, u64) = images.entry(reference.image).or_default();
        *references += 1;
        *blocks += u64::from(reference.blocks);
    }
    images
}

fn options() -> impl Strategy<Value = PlanOptions> {
    (
        1u32..10,
        any::<bool>(),
        any::<bool>(),
        prop_oneof![Just(1u64 << 30), 4096u64..600_000],
        prop_oneof![Just(1000u32), 1u32..6],
        prop_oneof![Just(1u32 << 18), 1000u32..200_000],
    )
        .prop_map(
            |(
                min_run_blocks,
                keep_zeros,
                keep_preallocated,
                work_space_bytes,
                references_max,
                references_per_gib_max,
            )| PlanOptions {
                min_run_blocks,
                keep_zeros,
                keep_preallocated,
                work_space_bytes,
                batch_bytes: work_space_bytes / 3,
                references_max,
                references_per_gib_max,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn reclaim_frees_what_was_predicted_and_nothing_the_second_time(
        steps in prop::collection::vec(step(), 1..12),
        options in options(),
        frees_blocks: bool,
        held in prop::option::of(0usize..20),
        threads in threads(),
    ) {
        let fs = build(&steps, Faults::default(), frees_blocks);
        if let Some(extent) = held.filter(|extent| *extent < fs.extents()) {
            fs.hold_from_outside(extent);
        }
        let held = references(&fs.facts());
        let (content, before) = (fs.contents(), fs.allocated_bytes());
        let (plan, ran) = reclaim(&fs, &options, threads);
        prop_assert_eq!(fs.contents(), content);
        prop_assert_eq!(i64::try_from(before - fs.allocated_bytes()).unwrap(), plan.freed_bytes());
        prop_assert_eq!((ran.counts.differing_bytes, ran.counts.extents_still_held), (0, 0));
        prop_assert!(fs.peak_bytes().saturating_sub(before) <= plan.peak_bytes);
        for (image, (references, _)) in references(&fs.facts()) {
            let (had, blocks) = held[&image];
            let limit = (blocks * u64::from(options.references_per_gib_max)).div_ceil(1 << 18);
            prop_assert!(references <= limit.max(had));
        }
        let (_, again) = planned(&fs, &options);
        prop_assert_eq!(&again.eliminations[..], &[]);
    }

    #[test]
    fn compression_converges_and_can_be_undone(
        steps in prop::collection::vec(step(), 1..12),
        options in options(),
        min_gain in 1u8..60,
        recompress: bool,
        held in prop::option::of(0usize..20),
        threads in threads(),
    ) {
        // How many bytes and references a compressed donor takes is known once it was written: what these limits leave may take
        // another run.
        let options = PlanOptions { references_per_gib_max: u32::MAX, work_space_bytes: 1 << 30, ..options };
        let fs = build(&steps, Faults::default(), false);
        if let Some(extent) = held.filter(|extent| *extent < fs.extents()) {
            fs.hold_from_outside(extent);
        }
        let (content, before) = (fs.contents(), fs.allocated_bytes());
        let request = Some(CompressionRequest::Zstd { packer: Packer { level: 1, min_gain }, recompress });
        let (_, ran) = reclaim_as(&fs, &options, request, threads);
        prop_assert_eq!(fs.contents(), content.clone());
        prop_assert_eq!((ran.counts.differing_bytes, ran.counts.extents_still_held), (0, 0));
        let after = fs.allocated_bytes();
        prop_assert!(after <= before);
        let (_, again) = planned_as(&fs, &options, request);
        prop_assert_eq!(&again.eliminations[..], &[]);
        let (plan, ran) = reclaim_as(&fs, &options, Some(CompressionRequest::Undo), threads);
        prop_assert_eq!(fs.contents(), content);
        prop_assert_eq!((ran.counts.differing_bytes, ran.counts.extents_still_held), (0, 0));
        let signed = |bytes: u64| i64::try_from(bytes).unwrap();
        prop_assert_eq!(signed(after) - signed(fs.allocated_bytes()), plan.freed_bytes());
        let (_, again) = planned_as(&fs, &options, Some(CompressionRequest::Undo));
        prop_assert_eq!(&again.eliminations[..], &[]);
    }

    #[test]
    fn a_pool_larger_than_the_block_table_is_sampled(
        steps in prop::collection::vec(step(), 1..12),
        options in options(),
        frees_blocks: bool,
        slots in 16usize..200,
        threads in threads(),
    ) {
        let fs = build(&steps, Faults { table_slots_max: Some(slots), ..Faults::default() }, frees_blocks);
        let (content, before) = (fs.contents(), fs.allocated_bytes());
        let (plan, _) = reclaim(&fs, &options, threads);
        prop_assert_eq!(fs.contents(), content);
        prop_assert_eq!(i64::try_from(before - fs.allocated_bytes()).unwrap(), plan.freed_bytes());
        let (_, again) = planned(&fs, &options);
        prop_assert_eq!(&again.eliminations[..], &[]);
    }

    #[test]
    fn blocks_that_only_look_alike_cost_nothing_but_time(
        steps in prop::collection::vec(step(), 1..12),
        options in options(),
        frees_blocks: bool,
        bits in 3u32..16,
        threads in threads(),
    ) {
        let fs = build(&steps, Faults { fingerprint_bits: bits, ..Faults::default() }, frees_blocks);
        let (content, before) = (fs.contents(), fs.allocated_bytes());
        let _ = reclaim(&fs, &options, threads);
        prop_assert_eq!(fs.contents(), content);
        prop_assert!(fs.allocated_bytes() <= before);
    }

    #[test]
    fn whatever_goes_wrong_images_stay_as_they_are(
        steps in prop::collection::vec(step(), 1..12),
        options in options(),
        frees_blocks: bool,
        killed_at in prop::option::of(0u64..60),
        refuse_every in prop::option::of(1u64..5),
        opened in prop::option::of((0u64..30, 0u32..4)),
        space in prop::option::of(0u64..2_000_000),
        threads in threads(),
    ) {
        let mut fs = build(&steps, Faults { killed_at, refuse_every, opened: opened.map(|(after, image)| (after, ImageId(image))), space_bytes: space, ..Faults::default() }, frees_blocks);
        let content = fs.contents();
        let _ = reclaim(&fs, &options, threads);
        prop_assert_eq!(&fs.contents(), &content);
        fs.faults = Faults::default();
        fs.close_everyone_else();
        // Once nothing goes wrong any more, a run completes whatever was left.
        let (_, ran) = reclaim(&fs, &options, threads);
        prop_assert_eq!(&fs.contents(), &content);
        prop_assert_eq!(ran.counts.extents_still_held, 0);
        let (_, again) = planned(&fs, &options);
        prop_assert_eq!(&again.eliminations[..], &[]);
    }

    #[test]
    fn calls_at_the_same_time_do_what_they_do_one_after_the_other(
        steps in prop::collection::vec(step(), 1..12),
        options in options(),
        frees_blocks: bool,
        fault in fault_at_any_time(),
    ) {
        let [one_by_one, at_once] = THREADS.map(|threads| {
            let fs = build(&steps, fault.clone(), frees_blocks);
            let (_, ran) = reclaim(&fs, &options, threads);
            (format!("{ran:?}"), fs.contents(), fs.allocated_bytes(), references(&fs.facts()))
        });
        prop_assert_eq!(one_by_one, at_once);
    }
}

/// Faults that do not depend on which call comes when.
fn fault_at_any_time() -> impl Strategy<Value = Faults> {
    prop_oneof![
        Just(Faults::default()),
        (3u32..16).prop_map(|fingerprint_bits| Faults {
            fingerprint_bits,
            ..Faults::default()
        }),
        (0u32..4).prop_map(|image| Faults {
            opened: Some((0, ImageId(image))),
            ..Faults::default()
        }),
        Just(Faults {
            refuse_every: Some(1),
            ..Faults::default()
        }),
    ]
}

#[test]
fn plan_is_the_same_every_time() {
    let fs = Simulated::default();
    let content: Vec<BlockContent> = (1..200).collect();
    for shift in 0..4u32 {
        let image = fs.add_image(true, IMAGE_BLOCKS);
        let extent = fs.allocate(PLAIN, content.clone());
        fs.map(image, shift, extent, 0, 199, false);
    }
    let counts: BTreeMap<i64, usize> = (0..5).fold(BTreeMap::new(), |mut counts, _| {
        *counts
            .entry(planned(&fs, &PlanOptions::default()).1.freed_bytes())
            .or_default() += 1;
        counts
    });
    assert_eq!(counts, BTreeMap::from([(3 * 199 * 4096, 5)]));
}

#[test]
fn an_image_at_its_limit_of_references_frees_what_takes_few() {
    let fs = Simulated::default();
    let known: Vec<BlockContent> = (1..250).collect();
    // Two blocks known and two not, again and again; then many that are known, and zeros.
    let short = (0..20).flat_map(|n| [1 + 4 * n, 2 + 4 * n, 10_000 + n, 20_000 + n]);
    let content: Vec<BlockContent> = short.chain(100..160).chain([0; 60]).collect();
    add_images(&fs, [known, content]);
    let freed_blocks = |references: u32| {
        let options = PlanOptions {
            // The image has 200 blocks, so that the limit is `references`.
            references_per_gib_max: references * (1 << 18) / 200,
            ..PlanOptions::default()
        };
        planned(&fs, &options).1.freed_bytes() / 4096
    };
    assert_eq!([1, 2, 40, 41].map(freed_blocks), [60, 60 + 60, 60 + 60, 60 + 60 + 40]);
}

#[test]
fn a_run_that_takes_more_metadata_than_it_frees_stays() {
    let fs = Simulated::default();
    let known: Vec<BlockContent> = (1..200).collect();
    let content = [1000, 1001, 7, 8, 1002, 1003, 17, 18, 19, 1004, 1005];
    add_images(&fs, [known, content.into_iter().chain(50..150).collect()]);
    // It stays whatever it is used for.
    fs.hold_from_outside(0);
    let freed_blocks = |min_run_blocks| {
        let options = PlanOptions {
            min_run_blocks,
            references_per_gib_max: u32::MAX,
            ..PlanOptions::default()
        };
        planned(&fs, &options).1.freed_bytes() / 4096
    };
    let mut freed = vec![[1, 2].map(freed_blocks)];
    for _ in 1..30 {
        fs.reflink(ImageId(1));
        freed.push([1, 2].map(freed_blocks));
    }
    let [least, default] = [0, 1].map(|n| freed.iter().map(|each| each[n]).collect::<Vec<_>>());
    // Two blocks are worth sixteen pairs of references of 256 bytes, and three are worth twenty-four.
    assert_eq!(least, [vec![105; 16], vec![103; 8], vec![100; 6]].concat());
    // At 8 KiB two are so little that two revisions may share them at most; three are enough.
    assert_eq!(default, [vec![105; 2], vec![103; 22], vec![100; 6]].concat());
}

/// Asks to stop once it was asked so many times, and counts what is done.
struct StopsAt {
    asked: AtomicU64,
    at: u64,
    done_bytes: AtomicU64,
}

impl Monitor for StopsAt {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }
    fn note(&self, _: &str) {}
    fn interrupted(&self) -> bool {
        self.asked.fetch_add(1, Ordering::Relaxed) >= self.at
    }
}

/// Pairs of images that hold the same, in extents of eight blocks: no pair has anything in common with another.
fn pairs(faults: Faults) -> Simulated {
    let mut fs = Simulated::default();
    fs.faults = faults;
    for pair in 0..6 {
        for _ in 0..2 {
            let image = fs.add_image(true, IMAGE_BLOCKS);
            for at in (0..64).step_by(8) {
                let content = (0..8).map(|n| 1 + 1000 * pair + u64::from(at) + n).collect();
                let extent = fs.allocate(PLAIN, content);
                fs.map(image, at, extent, 0, 8, false);
            }
        }
    }
    fs
}

#[test]
fn a_run_that_is_told_to_stop_says_what_it_did() {
    for threads in THREADS {
        for at in [0, 1, 2, 5, 12, 30, 47, 48, 60] {
            let fs = pairs(Faults::default());
            let (content, before) = (fs.contents(), fs.allocated_bytes());
            let monitor = StopsAt {
                asked: AtomicU64::new(0),
                at,
                done_bytes: AtomicU64::new(0),
            };
            let (_, ran) = reclaim_until(&fs, &PlanOptions::default(), None, threads, &monitor);
            assert_eq!(fs.contents(), content);
            assert_eq!(ran.interrupted, at < 50, "{threads} threads, {at}: {ran:?}");
            assert_eq!(ran.counts.shared_bytes, ran.counts.calls * 8 * 4096);
            assert_eq!(ran.counts.shared_bytes, monitor.done_bytes.into_inner());
            assert_eq!(
                before - fs.allocated_bytes(),
                ran.counts.shared_bytes,
                "one extent a call"
            );
            let _ = reclaim(&fs, &PlanOptions::default(), threads);
            assert_eq!(fs.allocated_bytes(), before / 2);
        }
    }
}

/// Keeps every call from ending until another one has, too.
#[derive(Default)]
struct Meeting {
    inside: Mutex<u32>,
    changed: Condvar,
}

impl Monitor for Meeting {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {
        let mut inside = self.inside.lock().unwrap();
        *inside += 1;
        self.changed.notify_all();
        let alone = self
            .changed
            .wait_timeout_while(inside, Duration::from_mins(1), |inside| *inside < 2);
        assert!(!alone.unwrap().1.timed_out(), "no other call is made");
    }
    fn note(&self, _: &str) {}
    fn interrupted(&self) -> bool {
        false
    }
}

#[test]
fn calls_on_different_images_are_made_at_the_same_time() {
    let fs = pairs(Faults::default());
    let before = fs.allocated_bytes();
    let (_, ran) = reclaim_until(&fs, &PlanOptions::default(), None, 4, &Meeting::default());
    assert_eq!((ran.counts.calls, fs.allocated_bytes()), (48, before / 2));
}

#[test]
fn whoever_opens_an_image_meanwhile_has_it_left_alone_whichever_call_is_made() {
    for threads in THREADS {
        for at in 1..48 {
            let fs = pairs(Faults {
                opened: Some((at, ImageId(1))),
                ..Faults::default()
            });
            let content = fs.contents();
            let (plan, ran) = reclaim(&fs, &PlanOptions::default(), threads);
            assert_eq!(fs.contents(), content);
            let counts = &ran.counts;
            assert_eq!(counts.calls * 8 * 4096, counts.shared_bytes);
            let planned: u64 = plan.batches.iter().map(|batch| batch.compared_bytes).sum();
            assert_eq!(
                counts.shared_bytes + counts.abandoned_bytes,
                planned,
                "{threads} threads, {at}"
            );
            // Nothing but that pair is affected.
            assert!(counts.abandoned_bytes <= 8 * 8 * 4096);
            assert_eq!(ran.opened_meanwhile.contains(&ImageId(1)), counts.abandoned_bytes > 0);
            assert!(ran.opened_meanwhile.iter().all(|image| *image == ImageId(1)));
        }
    }
}

#[test]
fn what_needs_an_image_that_someone_opened_is_not_begun() {
    for threads in THREADS {
        what_needs_an_open_image_is_not_begun(threads);
    }
}

fn what_needs_an_open_image_is_not_begun(threads: usize) {
    let mut fs = Simulated::default();
    fs.faults.opened = Some((0, ImageId(0)));
    // Everything that is common lies in the first image; of each other one, a part would go to a donor.
    let common: Vec<BlockContent> = (1..64).collect();
    let others = (1u64..20).map(|n| common.iter().copied().chain(10_000 * n..10_000 * n + 16).collect());
    let images: Vec<Vec<BlockContent>> = std::iter::once(common.iter().copied().chain(5000..5100).collect())
        .chain(others)
        .collect();
    add_images(&fs, images);
    let before = fs.allocated_bytes();
    let (plan, ran) = reclaim(&fs, &PlanOptions::default(), threads);
    assert!(plan.freed_bytes() > 19 * 40 * 4096);
    assert_eq!(fs.allocated_bytes(), before, "what is begun and not ended takes more");
    assert_eq!((ran.counts.calls, ran.counts.second_round_extents), (0, 0));
    assert!(ran.opened_meanwhile.contains(&ImageId(0)) && ran.counts.abandoned_bytes > 0);
    fs.faults = Faults::default();
    fs.close_everyone_else();
    let (plan, _) = reclaim(&fs, &PlanOptions::default(), threads);
    assert_eq!(
        i128::from(before - fs.allocated_bytes()),
        i128::from(plan.freed_bytes())
    );
}

#[test]
fn planning_ends_when_it_is_told_to() {
    let fs = Simulated::default();
    add_images(&fs, (0..40u64).map(|n| (1 + n..100 + n).collect()));
    for allowed in [0u32, 1, 20, 39, 45] {
        let asked = std::cell::Cell::new(0);
        let go_on = || {
            asked.set(asked.get() + 1);
            if asked.get() > allowed { Err("enough") } else { Ok(()) }
        };
        let mut facts = fs.facts();
        let ended = vmfold::plan::plan_proved(&mut facts, &PlanOptions::default(), &go_on, |_, _| Err("enough"));
        assert_eq!(ended.err(), Some("enough"));
        assert!(asked.get() <= allowed + 1);
    }
}

/// A pool with a bit of everything: a template and a clone of which blocks changed, revisions that leave blocks nobody reaches, zeros, a
/// preallocated range, files without checksums, and blocks that look alike and are not.
fn small_pool(frees_blocks: bool, look_alike: bool) -> Simulated {
    let mut fs = Simulated::default();
    fs.frees_blocks = frees_blocks;
    let template: Vec<BlockContent> = (1..=40).collect();
    let mut clone = template.clone();
    (clone[9], clone[30]) = (1000, 1001);
    if look_alike {
        // With the same fingerprint as the block in the template, in a run too long to be read before it is shared.
        clone[23] += 1 << 32;
    }
    add_images(&fs, [template.clone(), clone]);
    // A revision of the template, of which most was written anew, and whose old blocks nobody else reaches.
    let image = fs.add_image(true, IMAGE_BLOCKS);
    let extent = fs.allocate(PLAIN, (2000..2016).collect());
    fs.map(image, 0, extent, 0, 2, false);
    fs.map(image, 14, extent, 14, 2, false);
    let extent = fs.allocate(PLAIN, [[1, 2, 3, 4].as_slice(), &[0; 8], &[3000, 3001]].concat());
    fs.map(image, 16, extent, 0, 14, false);
    let extent = fs.allocate(PLAIN, (4000..4008).collect());
    fs.map(image, 40, extent, 0, 4, false);
    fs.map(image, 44, extent, 4, 4, true);
    fs.reflink(image);
    let bare = Class {
        checksummed: false,
        ..PLAIN
    };
    for _ in 0..2 {
        let (image, extent) = (
            fs.add_image(false, IMAGE_BLOCKS),
            fs.allocate(bare, template[..8].to_vec()),
        );
        fs.map(image, 0, extent, 0, 8, false);
    }
    fs
}

/// Small steps, so that there are batches that wait for others.
const SMALL_STEPS: PlanOptions = PlanOptions {
    min_run_blocks: 2,
    keep_zeros: false,
    keep_preallocated: false,
    work_space_bytes: 1 << 20,
    batch_bytes: 8 << 10,
    references_max: 1000,
    references_per_gib_max: u32::MAX,
};

/// Plans on a filesystem, and runs that while faults are met.
fn run_with(
    fs: &Simulated,
    faulty: &FaultyFilesystem<'_>,
) -> (ReclaimPlan, ReclaimOutcome, Result<(), vmfold::error::Error>) {
    let (facts, plan) = planned(fs, &SMALL_STEPS);
    let mut ran = ReclaimOutcome::default();
    let outcome = run(
        &facts,
        &plan,
        ReclaimSettings::default(),
        faulty,
        &Silent::default(),
        &mut ran,
    );
    fs.close_donors();
    (plan, ran, outcome)
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap()
}

/// Bytes that a pool takes, as a scan of it finds.
fn scanned_bytes(fs: &Simulated) -> u64 {
    fs.facts().extents.iter().map(|extent| extent.disk_bytes).sum()
}

/// A run on a small pool that meets no fault.
struct Undisturbed {
    frees_blocks: bool,
    look_alike: bool,
    /// Bytes that the pool takes after it.
    allocated_bytes: u64,
    calls: BTreeMap<FilesystemCall, u64>,
}

impl Undisturbed {
    fn new(frees_blocks: bool, look_alike: bool) -> Self {
        let fs = small_pool(frees_blocks, look_alike);
        let faulty = FaultyFilesystem::without_fault(&fs);
        run_with(&fs, &faulty).2.unwrap();
        Self {
            frees_blocks,
            look_alike,
            allocated_bytes: fs.allocated_bytes(),
            calls: faulty.calls(),
        }
    }

    /// The pool as it was before.
    fn pool(&self) -> Simulated {
        small_pool(self.frees_blocks, self.look_alike)
    }
}

/// Runs on a small pool with some faults, and again without. Images hold what they held but for what someone else wrote; what was not
/// freed as planned is told; and the next run frees what is left, so that the one after that has nothing to do. Returns whether something
/// was told.
fn faults_leave_nothing_but_work(
    undisturbed: &Undisturbed,
    faults: impl Fn(&Simulated) -> FaultyFilesystem<'_>,
) -> bool {
    let fs = undisturbed.pool();
    let (mut content, before) = (fs.contents(), fs.allocated_bytes());
    let faulty = faults(&fs);
    let (plan, ran, outcome) = run_with(&fs, &faulty);
    let changed = faulty.changed();
    for (image, block) in &changed {
        content[image.index()][*block as usize] = CHANGED;
    }
    assert_eq!(fs.contents(), content, "{faulty:?}");
    assert_eq!(fs.allocated_bytes(), scanned_bytes(&fs), "{faulty:?}");
    let freed = signed(before) - signed(fs.allocated_bytes());
    let counts = &ran.counts;
    let told = outcome.is_err()
        || !ran.unreadable.is_empty()
        || counts.abandoned_bytes + counts.differing_bytes + counts.extents_still_held > 0
        || !counts.refused_bytes.is_empty();
    assert!(
        freed <= plan.freed_bytes() && (told || freed == plan.freed_bytes()),
        "{faulty:?}: {ran:?}"
    );
    // Everything that was begun can be ended.
    let before = fs.allocated_bytes();
    let (plan, ran) = reclaim(&fs, &SMALL_STEPS, 1);
    assert_eq!(fs.contents(), content, "{faulty:?}");
    assert_eq!(ran.counts.extents_still_held, 0, "{faulty:?}");
    if ran.counts.differing_bytes == 0 {
        assert_eq!(
            signed(before) - signed(fs.allocated_bytes()),
            plan.freed_bytes(),
            "{faulty:?}"
        );
    }
    if changed.is_empty() {
        assert_eq!(fs.allocated_bytes(), undisturbed.allocated_bytes, "{faulty:?}");
    }
    assert_eq!(&planned(&fs, &SMALL_STEPS).1.eliminations[..], &[], "{faulty:?}");
    told
}

#[test]
fn every_call_may_go_wrong_once_or_from_then_on() {
    let faults = [
        (FilesystemCall::MayTouch, FilesystemFault::Opened),
        (FilesystemCall::Read, FilesystemFault::Fails(Errno::IO)),
        (FilesystemCall::FreeBytes, FilesystemFault::Fails(Errno::IO)),
        (FilesystemCall::CreateDonor, FilesystemFault::Fails(Errno::NOSPC)),
        (FilesystemCall::AppendToDonor, FilesystemFault::Fails(Errno::NOSPC)),
        (FilesystemCall::AppendToDonor, FilesystemFault::Fails(Errno::DQUOT)),
        (FilesystemCall::SettleDonor, FilesystemFault::Fails(Errno::NOSPC)),
        (FilesystemCall::Share, FilesystemFault::Fails(Errno::NOSPC)),
        (FilesystemCall::Share, FilesystemFault::Fails(Errno::IO)),
        (FilesystemCall::Share, FilesystemFault::Fails(Errno::AGAIN)),
        (FilesystemCall::Share, FilesystemFault::Changed),
        (FilesystemCall::Commit, FilesystemFault::Fails(Errno::IO)),
        (FilesystemCall::IsAllocated, FilesystemFault::Fails(Errno::IO)),
        (FilesystemCall::RangesIn, FilesystemFault::Fails(Errno::IO)),
    ];
    let mut runs: BTreeMap<FilesystemCall, u64> = BTreeMap::new();
    for (frees_blocks, look_alike) in [(false, false), (false, true), (true, false), (true, true)] {
        let undisturbed = Undisturbed::new(frees_blocks, look_alike);
        for (call, fault) in faults {
            let calls = undisturbed.calls.get(&call).copied().unwrap_or_default();
            for (at, lasts) in (0..calls).flat_map(|at| [(at, false), (at, true)]) {
                let told =
                    faults_leave_nothing_but_work(&undisturbed, |fs| FaultyFilesystem::new(fs, call, at, fault, lasts));
                // Of these, what does not matter in the end need not be told.
                let is_forgiven = matches!(
                    call,
                    FilesystemCall::MayTouch | FilesystemCall::Read | FilesystemCall::Share
                );
                assert!(told || is_forgiven, "{call:?} {at}");
                *runs.entry(call).or_default() += 1;
            }
        }
    }
    assert!(faults.iter().all(|(call, _)| runs.contains_key(call)), "{runs:?}");
}

#[test]
fn every_sector_may_be_unreadable() {
    for (frees_blocks, look_alike) in [(false, true), (true, true)] {
        let undisturbed = Undisturbed::new(frees_blocks, look_alike);
        for (extent, this) in undisturbed.pool().facts().extents.iter().enumerate() {
            for block in 0..this.blocks {
                faults_leave_nothing_but_work(&undisturbed, |fs| {
                    let mut faulty = FaultyFilesystem::without_fault(fs);
                    faulty.unreadable.insert((extent, block));
                    faulty
                });
            }
        }
    }
}

#[test]
fn a_disk_may_end_anywhere() {
    for look_alike in [false, true] {
        let undisturbed = Undisturbed::new(false, look_alike);
        let taken = undisturbed.pool().allocated_bytes();
        for free_blocks in 0..12 {
            faults_leave_nothing_but_work(&undisturbed, |fs| {
                let mut faulty = FaultyFilesystem::without_fault(fs);
                faulty.disk_bytes = Some(taken + free_blocks * 4096);
                faulty
            });
        }
    }
}

#[test]
fn what_fits_on_no_disk_is_refused_by_name() {
    let fs = Simulated::default();
    add_images(&fs, [(1..=40).collect(), (1..=20).chain(100..120).collect()]);
    let before = fs.allocated_bytes();
    for (free_blocks, is_enough) in [(0, false), (19, false), (20, true)] {
        let mut faulty = FaultyFilesystem::without_fault(&fs);
        faulty.disk_bytes = Some(before + free_blocks * 4096);
        let (plan, ran, outcome) = run_with(&fs, &faulty);
        let is_refused = matches!(outcome, Err(vmfold::error::Error::Reserve { .. }));
        assert_eq!((is_refused, outcome.is_ok()), (!is_enough, is_enough));
        assert_eq!(ran.counts.written_bytes, if is_enough { 20 * 4096 } else { 0 });
        let freed = signed(before) - signed(fs.allocated_bytes());
        assert_eq!(freed, if is_enough { plan.freed_bytes() } else { 0 });
    }
}
