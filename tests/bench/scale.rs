//! Planning at a size that no test machine has: `cargo bench --bench scale -- GIB REVISIONS CHANGED EXTENT_KIB [MEMORY_MIB]`. Prints the
//! time it took and the greatest memory of the process. The pool is made up: extents of 1 MiB unless you say otherwise, every fourth
//! like the one before but for some blocks, and each revision maps all of them but for half of every hundredth.
//! Nothing here decides a test.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark that prints, and cannot go on has nothing to say"
)]

use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vmfold::block::bytes;
use vmfold::exec::fingerprints::allocate;
use vmfold::facts::{Extent, Facts, Reference, SharedList};
use vmfold::numbers::{ExtentId, ImageId, Slot};
use vmfold::plan::{PlanOptions, lists_bytes, memory_bytes, plan_proved};
use vmfold::spill::{Budget, SpillVec};
use vmfold::testing::simulated::PLAIN;

/// Every fourth extent of so many blocks is like the one before but for some.
fn number_of(slot: u32, blocks: u32, changed: u32) -> u32 {
    let (number, block) = (slot / blocks, slot % blocks);
    let apart = blocks / changed;
    (number - u32::from(number % 4 == 3 && block % apart != apart / 2)) * blocks + block
}

/// A number of `/proc/self/status`, in MiB.
fn mib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() >> 10
}

/// The greatest memory of the process so far, but for pages of files: the kernel keeps no such number.
static PEAK: AtomicU64 = AtomicU64::new(0);

fn watch() {
    loop {
        PEAK.fetch_max(mib("RssAnon:"), Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn main() {
    vmfold::sys::allocator::give_back_early();
    std::thread::spawn(watch);
    // `cargo bench` adds an argument of its own.
    let mut numbers = std::env::args()
        .skip(1)
        .filter_map(|argument| argument.parse::<u32>().ok());
    let gib = numbers.next().unwrap_or(100);
    let revisions = numbers.next().unwrap_or(1);
    let changed = numbers.next().unwrap_or(1);
    let blocks = numbers.next().unwrap_or(1024) / 4;
    let memory_mib = numbers.next();
    let extents = (gib << 18) / blocks;
    let slots = gib << 18;
    let memory_bytes = memory_mib.map_or_else(|| memory_bytes(slots), |mib| u64::from(mib) << 20);
    let folder = std::env::var_os("SPILL").map_or_else(std::env::temp_dir, Into::into);
    let lists = usize::try_from(lists_bytes(memory_bytes)).unwrap();
    let budget = Budget::new(lists, folder.clone());
    let begin = Instant::now();
    let all = (0..extents).map(|number| Extent {
        address: u64::from(number) * bytes(blocks),
        disk_bytes: bytes(blocks),
        generation: 1,
        first_slot: Slot(number * blocks),
        blocks,
        class: PLAIN,
        pinned: None,
        compression_goal: None,
    });
    // Image by image, as they are read. One in a hundred extents is half replaced in each revision but the first.
    let references = (0..revisions).flat_map(|image| {
        (0..extents).map(move |number| {
            let gone = if image > 0 && number % 100 == image {
                blocks / 2
            } else {
                0
            };
            Reference {
                image: ImageId(image),
                file_block: number * blocks + gone,
                slot: Slot(number * blocks + gone),
                blocks: blocks - gone,
                extent: ExtentId(number),
                preallocated: false,
            }
        })
    });
    let mappings = SharedList::from_references_in(references, &budget);
    let mut facts = Facts::new(SpillVec::from_iter_in(all, &budget), mappings, 0);
    allocate(&mut facts, memory_bytes, &folder).unwrap();
    for extent in 0..extents {
        let first = extent * blocks;
        let of: Vec<u32> = (first..first + blocks)
            .map(|slot| (number_of(slot, blocks, changed) + 1).wrapping_mul(0x9e37_79b9))
            .collect();
        facts.fingerprints.write(Slot(first), &of);
    }
    let (made, known) = (begin.elapsed(), PEAK.load(Ordering::Relaxed));
    let begin = Instant::now();
    let plan = plan_proved(&mut facts, &PlanOptions::default(), &|| Ok(()), |facts, slots| {
        let proof = |slot: &Slot| (*slot, u64::from(number_of(slot.0, blocks, changed)).to_le_bytes());
        Ok::<_, Infallible>(SpillVec::from_iter_in(slots.iter().map(proof), facts.budget()))
    })
    .unwrap();
    println!(
        "{gib} GiB, {revisions} references to each extent: {} MiB for tables of blocks; facts {:.1} s, {known} MiB; plan {:.1} s; {} of {} MiB would be freed; {} MiB of memory at most, {} MiB with pages of files",
        memory_bytes >> 20,
        made.as_secs_f64(),
        begin.elapsed().as_secs_f64(),
        plan.freed_bytes() >> 20,
        u64::from(gib) << 8,
        PEAK.load(Ordering::Relaxed),
        mib("VmHWM:")
    );
}
