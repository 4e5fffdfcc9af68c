//! Planning at a size that no test machine has: `cargo bench --bench scale -- GIB REVISIONS CHANGED [MEMORY_MIB]`. Prints the time it took and the
//! greatest memory of the process. The pool is made up: extents of 1 MiB, every fourth like the one before but for one block,
//! and each revision maps all of them but for half of every hundredth.
//! Nothing here decides a test.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark that prints, and cannot go on has nothing to say"
)]

use std::convert::Infallible;
use std::time::Instant;

use vmfold::facts::{Extent, Facts, Reference};
use vmfold::fs::simulated::PLAIN;
use vmfold::plan::{Options, make_room, memory_bytes, plan_proved};

const MIB_BLOCKS: u32 = 256;

/// Every fourth extent is like the one before but for so many blocks.
fn number_of(slot: u32, changed: u32) -> u32 {
    let (number, block) = (slot / MIB_BLOCKS, slot % MIB_BLOCKS);
    let apart = MIB_BLOCKS / changed;
    (number - u32::from(number % 4 == 3 && block % apart != apart / 2)) * MIB_BLOCKS + block
}

fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

fn main() {
    vmfold::sys::allocator::give_back_early();
    // `cargo bench` adds an argument of its own.
    let mut numbers = std::env::args()
        .skip(1)
        .filter_map(|argument| argument.parse::<u32>().ok());
    let gib = numbers.next().unwrap_or(100);
    let revisions = numbers.next().unwrap_or(1);
    let changed = numbers.next().unwrap_or(1);
    let memory_mib = numbers.next();
    let extents = gib << 10;
    let begin = Instant::now();
    let all = (0..extents).map(|number| Extent {
        address: u64::from(number) << 20,
        disk_bytes: 1 << 20,
        generation: 1,
        first_slot: number * MIB_BLOCKS,
        blocks: MIB_BLOCKS,
        class: PLAIN,
        pinned: None,
        recoding: None,
    });
    // Image by image, as they are read. One in a hundred extents is half replaced in each revision but the first.
    let references = (0..revisions).flat_map(|image| {
        (0..extents).map(move |number| {
            let gone = if image > 0 && number % 100 == image {
                MIB_BLOCKS / 2
            } else {
                0
            };
            Reference {
                image,
                file_block: number * MIB_BLOCKS + gone,
                slot: number * MIB_BLOCKS + gone,
                blocks: MIB_BLOCKS - gone,
                extent: number,
                preallocated: false,
            }
        })
    });
    let mut facts = Facts::new(all.collect(), references.collect(), 0);
    let memory_bytes = memory_mib.map_or_else(|| memory_bytes(&facts), |mib| u64::from(mib) << 20);
    make_room(&mut facts, memory_bytes, &std::env::temp_dir()).unwrap();
    for extent in 0..extents {
        let first = extent * MIB_BLOCKS;
        let of: Vec<u32> = (first..first + MIB_BLOCKS)
            .map(|slot| (number_of(slot, changed) + 1).wrapping_mul(0x9e37_79b9))
            .collect();
        facts.fingerprints.write(first, &of);
    }
    let (made, known) = (begin.elapsed(), peak_mib());
    let begin = Instant::now();
    let plan = plan_proved(&mut facts, &Options::default(), |_, slots| {
        let proof = |slot: &u32| (*slot, u64::from(number_of(*slot, changed)).to_le_bytes());
        Ok::<_, Infallible>(slots.iter().map(proof).collect())
    })
    .unwrap();
    println!(
        "{gib} GiB, {revisions} references to each extent: {} MiB for tables of blocks; facts {:.1} s, {known} MiB; plan {:.1} s; {} of {} MiB would be freed; {} MiB of memory at most",
        memory_bytes >> 20,
        made.as_secs_f64(),
        begin.elapsed().as_secs_f64(),
        plan.freed_bytes() >> 20,
        u64::from(extents) / 4,
        peak_mib()
    );
}
