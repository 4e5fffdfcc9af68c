//! What becomes of a run whose index fails: it goes on without, says so, and ends.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Mounted, build_pool, can_mount, sh, state_of};
use serde_json::Value;
use vmfold::block::SlotSet;
use vmfold::fingerprint::FingerprintFunction;
use vmfold::index;
use vmfold::monitor::Silent;
use vmfold::testing::simulated::one_image;

/// Far more than any of these runs takes, and far less than for ever.
const LIMIT: Duration = Duration::from_secs(150);

/// Waits for a command, which must end by itself.
fn ended(mut child: Child) -> Output {
    let since = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if since.elapsed() > LIMIT {
            child.kill().unwrap();
            panic!("it did not end: {:?}", child.wait_with_output().unwrap());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

fn run(fs: &Mounted, shell: &str, index: &Path, arguments: &str) -> Output {
    let command = format!(
        "{shell} exec '{}' --json {arguments} --index '{}' '{}'",
        env!("CARGO_BIN_EXE_vmfold"),
        index.display(),
        fs.pool().display()
    );
    let child = Command::new("bash")
        .args(["-c", &command])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    ended(child.unwrap())
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// What a run did, which must have gone as well as one without an index.
fn done(output: &Output) -> Value {
    let done: Value = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {} {}", output.status, text(output)));
    assert_eq!(output.status.code(), Some(0), "{}", text(output));
    assert!(!text(output).contains("panicked"), "{}", text(output));
    done
}

/// A small filesystem of its own for the index.
struct Small(tempfile::TempDir);

impl Small {
    fn new(kib: u64) -> Self {
        let small = Self(tempfile::tempdir().unwrap());
        sh(&format!(
            "mount -t tmpfs -o size={kib}k none {}",
            small.path().display()
        ));
        small
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_run_ends_when_the_disk_of_its_index_is_full() {
    if !can_mount() {
        return;
    }
    let mut failed = 0;
    // Where the disk is full before there is an index, while it is made, and while it is written.
    for kib in [4, 32, 64, 96, 256] {
        let fs = Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512);
        build_pool(&fs.pool(), 40);
        let state = state_of(&fs.pool());
        let small = Small::new(kib);
        let output = run(&fs, "", small.path(), "reclaim");
        let first = done(&output);
        failed += u32::from(text(&output).contains("index"));
        assert!(first["done"]["freed_bytes"].as_i64().unwrap() > 10 << 20, "{first}");
        assert_eq!(first["done"]["freed_bytes"], first["planned"]["freed_bytes"]);
        assert_eq!(state_of(&fs.pool()), state);
        // The next run goes on with what is there.
        let again = done(&run(&fs, "", small.path(), "reclaim"));
        assert_eq!(again["done"]["freed_bytes"], 0, "{kib} KiB: {again}");
        for verb in ["scan", "report"] {
            done(&run(&fs, "", small.path(), verb));
        }
        let archive = fs.mount.join("archive");
        done(&run(&fs, "", small.path(), &format!("export '{}'", archive.display())));
        assert_eq!(state_of(&fs.pool()), state);
    }
    assert!(failed > 2, "the index had room each time but {failed}");
}

#[test]
fn a_large_index_ends_when_its_disk_is_full() {
    const EXTENT_BLOCKS: u32 = 32 << 10;
    if !can_mount() {
        return;
    }
    // Fingerprints of 4 MiB, of which sled has much to write when it finds that it cannot.
    for kib in [600, 1024, 1500, 2048, 3000] {
        let small = Small::new(kib);
        let folder = small.path().to_owned();
        let (ended, ends) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let extents = (0..32).map(|number| number * EXTENT_BLOCKS..(number + 1) * EXTENT_BLOCKS);
            let mut facts = one_image(extents, 1);
            let fingerprints = (0..facts.slots()).map(|slot| slot.wrapping_mul(0x9e37_79b9));
            facts.fingerprints = fingerprints.collect::<Vec<u32>>().into();
            let index = index::open(&folder, [1; 16], Some(FingerprintFunction::Crc32c), &Silent::default());
            let mut index = index.unwrap();
            index.keep_plain();
            let mut known = SlotSet::new(facts.slots() as usize);
            index.look_up(&mut facts, &[], &mut known).unwrap();
            let failed = index.update(&facts, &[]).is_err();
            drop(index);
            ended.send(failed).unwrap();
        });
        assert_eq!(
            ends.recv_timeout(LIMIT),
            Ok(true),
            "{kib} KiB: it had room, or did not end"
        );
    }
}

#[test]
fn an_index_that_cannot_be_written_is_done_without() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512);
    build_pool(&fs.pool(), 41);
    let state = state_of(&fs.pool());
    // Files of the index may not grow: the kernel sends a signal then, which ends a process by default.
    let limited = tempfile::tempdir().unwrap();
    for blocks in [0, 64, 600] {
        done(&run(
            &fs,
            &format!("ulimit -f {blocks};"),
            limited.path(),
            "reclaim --dry-run",
        ));
    }
    let read_only = Small::new(1 << 14);
    sh(&format!("mount -o remount,ro {}", read_only.path().display()));
    let output = run(&fs, "", read_only.path(), "reclaim");
    done(&output);
    assert!(text(&output).contains("without an index"), "{}", text(&output));
    assert_eq!(state_of(&fs.pool()), state);
}
