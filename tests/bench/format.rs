//! Opening and reading archives of many images and runs, and exporting what takes next to nothing: `cargo bench --bench format`. Prints the
//! times, and the greatest memory of the process. Nothing here decides a test.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    dead_code,
    missing_docs,
    reason = "a benchmark that prints, and has what it needs in common with tests"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmfold::archive::manifest::ArchivedImage;
use vmfold::archive::reader::Archive;
use vmfold::content::{Content, Run};
use vmfold::numbers::StoreBlock;
use vmfold::ops::list::list;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;

use scene::{Scene, WAYS, restore, scratch, verify};
use writing::{image, written};

#[path = "../common/mod.rs"]
mod common;

#[path = "../format/scene.rs"]
mod scene;

#[path = "../format/writing.rs"]
mod writing;

fn main() {
    opening_an_archive_of_a_million_runs();
    reading_takes_time_in_proportion();
    exporting_what_takes_next_to_nothing();
}

/// Images whose runs are blocks of the store and holes in turn.
fn images(count: u32, runs: u32) -> Vec<(ArchivedImage, Vec<Run>)> {
    let content = |at: u32| {
        if at.is_multiple_of(2) {
            Content::Stored(StoreBlock(at / 2 % 2))
        } else {
            Content::Hole
        }
    };
    let runs: Vec<Run> = (0..runs)
        .map(|at| Run {
            blocks: 1,
            content: content(at),
        })
        .collect();
    let blocks = u32::try_from(runs.len()).unwrap();
    (0..count).map(|number| (image(number, blocks), runs.clone())).collect()
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let start = Instant::now();
    let done = work();
    (start.elapsed(), done)
}

fn opening_an_archive_of_a_million_runs() {
    for (count, runs) in [(1, 1_000_000), (100, 10_000)] {
        let bytes = written(&images(count, runs), &[1, 2], |_| ());
        let store = Arc::new(MemoryStore::of(bytes.clone()));
        let (open, archive) = timed(|| Archive::open(store).unwrap());
        let committed = archive.commit(None).unwrap();
        let (listed, _) = timed(|| archive.images(committed).unwrap());
        let (manifest, _) = timed(|| archive.manifest(committed, &Budget::default()).unwrap());
        println!(
            "{count} images of {runs} runs, {} bytes: open {open:?}, images {listed:?}, manifest {manifest:?}",
            bytes.len()
        );
    }
}

fn reading_takes_time_in_proportion() {
    let folder = scratch();
    let path = folder.path().join("a.vmfold");
    for count in [300, 3000, 30_000] {
        let bytes = written(&images(count, 20), &[1, 2], |_| ());
        std::fs::write(&path, &bytes).unwrap();
        let (listed, _) = timed(|| list(&path, None).unwrap());
        let (verified, _) = timed(|| verify(&bytes).unwrap());
        let imported = WAYS.map(|way| timed(|| assert!(restore(&bytes, way, None, false).is_whole())).0);
        println!("{count} images: list {listed:?}, verify {verified:?}, import {imported:?}");
    }
}

fn exporting_what_takes_next_to_nothing() {
    const GIB: u64 = 1 << 18;
    for gib in [1, 2, 4] {
        let scene = Scene::empty();
        scene.add_image((1..=gib * GIB).collect());
        let status = || std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = |status: String| {
            status
                .lines()
                .find(|line| line.starts_with("VmHWM"))
                .unwrap()
                .to_owned()
        };
        let before = peak(status());
        let (exported, bytes) = timed(|| scene.export(&[]));
        println!(
            "{gib} GiB in {} bytes: {exported:?}, before {before}, after {}",
            bytes.len(),
            peak(status())
        );
    }
}
