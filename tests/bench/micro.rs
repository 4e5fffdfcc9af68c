//! Micro-benchmarks of what takes processor time beside the kernel: `cargo bench --bench micro`. Nothing here decides a test.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a benchmark that cannot go on has nothing to say"
)]

use std::convert::Infallible;
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use vmfold::archive::pack::Frame;
use vmfold::chunk::{Chunker, golden_stream};
use vmfold::facts::{Extent, Facts, Reference};
use vmfold::fingerprint::FingerprintFunction;
use vmfold::numbers::{ExtentId, ImageId, Slot};
use vmfold::plan::{PlanOptions, plan_proved};
use vmfold::testing::simulated::PLAIN;

const MIB: usize = 1 << 20;
const MIB_BLOCKS: u32 = 256;

/// A pool of `extents` extents of 1 MiB. Of every four, one repeats the one before with a block changed in the middle, and each has
/// `revisions` references.
fn pool(extents: u32, revisions: u32) -> Facts {
    let all = (0..extents).map(|number| Extent {
        address: u64::from(number) << 20,
        disk_bytes: MIB as u64,
        generation: 1,
        first_slot: Slot(number * MIB_BLOCKS),
        blocks: MIB_BLOCKS,
        class: PLAIN,
        pinned: None,
        compression_goal: None,
    });
    let references = (0..extents).flat_map(|number| {
        (0..revisions).map(move |image| Reference {
            image: ImageId(image),
            file_block: number * MIB_BLOCKS,
            slot: Slot(number * MIB_BLOCKS),
            blocks: MIB_BLOCKS,
            extent: ExtentId(number),
            preallocated: false,
        })
    });
    let mut facts = Facts::new(all.collect(), references.collect(), 0);
    let fingerprints = (0..extents * MIB_BLOCKS).map(|slot| {
        let (number, block) = (slot / MIB_BLOCKS, slot % MIB_BLOCKS);
        let same = number - u32::from(number % 4 == 3 && block != MIB_BLOCKS / 2);
        (same * MIB_BLOCKS + block + 1).wrapping_mul(0x9e37_79b9)
    });
    facts.fingerprints = fingerprints.collect::<Vec<_>>().into();
    facts
}

fn benchmarks(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("per MiB of image");
    let _ = group.throughput(Throughput::Bytes(64 * MIB as u64));
    let stream: Vec<u32> = golden_stream().into_iter().cycle().take(64 * MIB / 4096).collect();
    let _ = group.bench_function("cutting chunks", |bencher| {
        bencher.iter(|| {
            Chunker::default().cut(black_box(&stream), |chunk| {
                black_box(chunk);
            });
        });
    });
    let _ = group.throughput(Throughput::Bytes(4096));
    let block: Vec<u8> = (0..4096u32)
        .map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes()[3])
        .collect();
    for function in [FingerprintFunction::Crc32c, FingerprintFunction::Xxhash64] {
        let _ = group.bench_function(format!("fingerprint by {function:?}"), |bencher| {
            bencher.iter(|| function.of(black_box(&block)));
        });
    }
    let _ = group.throughput(Throughput::Bytes(MIB as u64));
    let text: Vec<u8> = (0..MIB)
        .map(|n| b"archives of virtual machines "[n % 29 % (1 + n / 7919 % 29)])
        .collect();
    let _ = group.bench_function("packing a frame with zstd -3", |bencher| {
        let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
        bencher.iter(|| Frame::compress(black_box(&text), &mut compressor).unwrap());
    });
    group.finish();

    let mut group = criterion.benchmark_group("planning a pool of 1 GiB");
    let _ = group.sample_size(10);
    for revisions in [1, 4, 16] {
        let mut facts = pool(1024, revisions);
        let _ = group.throughput(Throughput::Bytes(1 << 30));
        let _ = group.bench_function(format!("{revisions} revisions"), |bencher| {
            bencher.iter(|| {
                let plan = plan_proved(&mut facts, &PlanOptions::default(), &|| Ok(()), |_, slots| {
                    // Blocks that look alike are, in this pool.
                    Ok::<_, Infallible>(slots.iter().map(|slot| (*slot, proof(slot.0))).collect())
                });
                plan.unwrap().freed_bytes()
            });
        });
    }
    group.finish();
}

/// What the block at a slot holds, as [`pool`] makes it.
fn proof(slot: u32) -> [u8; 8] {
    let (number, block) = (slot / MIB_BLOCKS, slot % MIB_BLOCKS);
    let same = number - u32::from(number % 4 == 3 && block != MIB_BLOCKS / 2);
    u64::from(same * MIB_BLOCKS + block).to_le_bytes()
}

criterion_group!(all, benchmarks);
criterion_main!(all);
