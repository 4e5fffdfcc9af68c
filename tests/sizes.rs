//! Images as large as their blocks can be numbered, and larger ones.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Output;

use common::{Mounted, Random, can_mount, sh, state_of};
use serde_json::Value;

const TIB_16: u64 = 16 << 40;

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

/// An image with data in its first and in its last block.
fn write(path: &Path, size: u64, block: &[u8]) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    file.write_all_at(block, 0).unwrap();
    file.write_all_at(block, size - block.len() as u64).unwrap();
    file.sync_all().unwrap();
}

fn left_alone(done: &Value) -> Vec<(&str, &str)> {
    let skipped = done["skipped"].as_array().unwrap().iter();
    let name = |one: &Value| one["path"].as_str().unwrap().rsplit('/').next().unwrap().len();
    let names = skipped.map(|one| {
        let path = one["path"].as_str().unwrap();
        (&path[path.len() - name(one)..], one["reason"].as_str().unwrap())
    });
    names.collect()
}

fn check(fs: &Mounted) {
    let content = Random(90).data(1 << 20);
    for (name, size) in [
        ("last.img", TIB_16 - 4096),
        ("odd.img", TIB_16 - 4096 - 100),
        ("just.img", TIB_16 - 4095),
        ("whole.img", TIB_16),
        ("more.img", TIB_16 + (1 << 40)),
    ] {
        write(&fs.pool().join(name), size, &content);
    }
    // Space that is allocated beyond the end of a small one, farther than its blocks can be numbered.
    std::fs::write(fs.pool().join("small.img"), &content).unwrap();
    let far = fs.pool().join("small.img");
    sh(&format!("fallocate -n -o 20T -l 1M {}", far.display()));
    sh(&format!("sync -f {}", fs.mount.display()));
    let too_large = [
        ("just.img", "too-large"),
        ("more.img", "too-large"),
        ("whole.img", "too-large"),
    ];
    for verb in ["report", "scan", "reclaim --dry-run", "reclaim", "reclaim"] {
        let output = fs.vmfold(&format!("--json {verb}"));
        let done = json(&output);
        assert_eq!(output.status.code(), Some(3), "{verb}: {done}");
        assert_eq!(left_alone(&done), too_large, "{verb}");
    }
    let archive = fs.mount.join("archive");
    let command = format!("--json export {} --exclude odd.img", archive.display());
    let output = fs.vmfold(&command);
    let done = json(&output);
    assert_eq!(
        (output.status.code(), &done["images"]),
        (Some(3), &Value::from(2)),
        "{done}"
    );
    assert_eq!(left_alone(&done), too_large);
    // What was shared is still what it was.
    let mut last = vec![0; content.len()];
    let file = File::open(fs.pool().join("last.img")).unwrap();
    file.read_exact_at(&mut last, TIB_16 - 4096 - content.len() as u64)
        .unwrap();
    assert!(last == content);
    // An export of nothing but what is left alone leaves nothing behind.
    let output = fs
        .command()
        .args(["export", "--index"])
        .arg(fs.index())
        .arg(fs.mount.join("empty"))
        .arg(fs.pool().join("whole.img"))
        .output()
        .unwrap();
    assert_ne!(output.status.code(), Some(0));
    assert!(
        fs.mount.join("empty").metadata().map_or(0, |archive| archive.len()) != 0 || !fs.mount.join("empty").exists()
    );
}

/// Goal: what a dry run promises is what is freed where an image ends within a block. Method: a second image has the bytes of the first and
/// goes on with zeros, so that its block is equal to a last, partial one, with which the kernel shares no other; a third has what follows.
fn check_partial_blocks(fs: &Mounted) {
    let (odd, more) = (Random(92).data(1_000_001), Random(93).data(1 << 20));
    let mut longer = odd.clone();
    longer.resize(1 << 20, 0);
    longer.extend(&more);
    for (name, content) in [("a.img", &odd), ("b.img", &longer), ("c.img", &more)] {
        std::fs::write(fs.pool().join(name), content).unwrap();
    }
    sh(&format!("sync -f {}", fs.mount.display()));
    let before = state_of(&fs.pool());
    let planned = json(&fs.vmfold("--json reclaim --dry-run"));
    let output = fs.vmfold("--json reclaim");
    let done = json(&output);
    assert_eq!(output.status.code(), Some(0), "{done}");
    assert!(done["done"]["freed_bytes"].as_u64().unwrap() >= 1 << 20, "{done}");
    assert_eq!(
        done["done"]["freed_bytes"], planned["planned"]["freed_bytes"],
        "{planned} {done}"
    );
    assert_eq!(state_of(&fs.pool()), before);
    let second = json(&fs.vmfold("--json reclaim"));
    assert_eq!(second["planned"]["freed_bytes"], 0, "{second}");
    assert_eq!(second["done"]["freed_bytes"], 0, "{second}");
}

#[test]
fn images_that_end_within_a_block() {
    if can_mount() {
        check_partial_blocks(&Mounted::btrfs());
        check_partial_blocks(&Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512));
    }
}

#[test]
fn images_of_16_tib_on_btrfs() {
    if can_mount() {
        check(&Mounted::btrfs());
    }
}

#[test]
fn images_of_16_tib_on_xfs() {
    if can_mount() {
        check(&Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512));
    }
}

#[test]
fn xfs_without_an_image_that_is_free() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.xfs -q -m reflink=1", "", 512);
    let image = fs.pool().join("a.img");
    std::fs::write(&image, Random(91).data(1 << 20)).unwrap();
    let _open = File::open(&image).unwrap();
    for arguments in ["", "--compress zstd", "--compress none"] {
        let output = fs.vmfold(&format!("--json reclaim {arguments}"));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("panicked"), "{said}");
        assert!(matches!(output.status.code(), Some(1 | 3)), "{arguments}: {said}");
    }
}
