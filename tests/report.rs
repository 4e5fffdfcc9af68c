//! What `report` says of an image, against what deleting it frees.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};

use common::{Mounted, Random, build_pool, can_mount, reflink, sh};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// Images of all kinds: neighbours on disk that share nothing, revisions, a copy held from outside, blocks beyond an end.
fn build(fs: &Mounted) {
    let pool = fs.pool();
    build_pool(&pool, 77);
    let mut random = Random(78);
    // Written in turns, so that they lie side by side.
    let files: Vec<std::fs::File> = ["x.img", "y.img"]
        .iter()
        .map(|name| std::fs::File::create(pool.join(name)).unwrap())
        .collect();
    for n in 0..4 {
        for file in &files {
            let content = random.data(MIB);
            std::os::unix::fs::FileExt::write_all_at(file, &content, n * MIB as u64).unwrap();
            file.sync_all().unwrap();
        }
    }
    drop(files);
    std::fs::write(pool.join("held.img"), random.data(2 * MIB)).unwrap();
    reflink(&pool.join("held.img"), &fs.mount.join("elsewhere"));
    std::fs::write(pool.join("long.img"), random.data(MIB)).unwrap();
    sh(&format!("fallocate -n -o 1M -l 2M {}", pool.join("long.img").display()));
    // Blocks of one place twice in one image.
    std::fs::write(pool.join("twice.img"), random.data(MIB)).unwrap();
    sh(&format!(
        "xfs_io -c 'reflink {0} 0 1m 1m' {0}; sync -f {0}",
        pool.join("twice.img").display()
    ));
}

/// Bytes that the filesystem has given to files, metadata aside.
fn used(fs: &Mounted, kind: &str) -> i64 {
    if kind == "btrfs" {
        return i64::try_from(fs.used()).unwrap();
    }
    let mount = fs.mount.display();
    // What was deleted is freed in the background, blocks are reserved for what is written next to shared ones, and some of the free
    // ones do not count as such. All of that ends when it is unmounted.
    common::unmount(&fs.mount);
    let device = fs.device();
    let device = device.display();
    let free = sh(&format!(
        "xfs_db -r -c 'freesp -s' {device} | sed -n 's/^total free blocks //p'; mount -o loop {device} {mount}"
    ));
    -4096 * free.trim().parse::<i64>().unwrap()
}

fn images(fs: &Mounted) -> Vec<(PathBuf, i64)> {
    let report = fs.vmfold_json("report");
    let images = report["images"].as_array().unwrap().iter();
    let bytes = |image: &Value| image["exclusive_bytes"].as_i64().unwrap();
    let paths = images.map(|image| (PathBuf::from(image["path"].as_str().unwrap()), bytes(image)));
    paths.collect()
}

fn names_of(image: &Path, pool: &Path) -> Vec<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let inode = image.metadata().unwrap().ino();
    let files = walkdir::WalkDir::new(pool).into_iter().map(Result::unwrap);
    let files = files.filter(|entry| entry.file_type().is_file() && entry.metadata().unwrap().ino() == inode);
    files.map(walkdir::DirEntry::into_path).collect()
}

/// Deletes one image after the other, each time with a report before.
fn check(fs: &Mounted, kind: &str, slack: i64) {
    build(fs);
    let mut last = 0;
    used(fs, kind);
    loop {
        let images = images(fs);
        // In an order that has nothing to do with that of the report.
        let Some((image, exclusive)) = images.get((last * 7 + 3) % images.len().max(1)) else {
            break;
        };
        let before = used(fs, kind);
        for name in names_of(image, &fs.pool()) {
            std::fs::remove_file(name).unwrap();
        }
        let freed = before - used(fs, kind);
        assert!(
            (freed - exclusive).abs() <= slack,
            "{kind}: {} was to free {exclusive} bytes and freed {freed}",
            image.display()
        );
        last += 1;
        if images.len() == 1 {
            break;
        }
    }
    assert!(last >= 10, "{last} images");
}

#[test]
fn what_it_calls_exclusive_is_what_deleting_frees_on_btrfs() {
    if can_mount() {
        check(&Mounted::btrfs(), "btrfs", 0);
    }
}

#[test]
fn what_it_calls_exclusive_is_what_deleting_frees_on_xfs() {
    if !can_mount() {
        return;
    }
    for reverse_map in [1, 0] {
        let options = format!("mkfs.xfs -q -m reflink=1,rmapbt={reverse_map}");
        // Trees of extents, of shared blocks and of free space shrink too; here, by some blocks.
        check(&Mounted::new(&options, "", 1024), "xfs", 16 * 4096);
    }
}
