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

/// Bytes on disk that are freed when files are deleted. Everything is as before afterwards.
fn freed_by_deleting(fs: &Mounted, kind: &str, files: &[PathBuf]) -> i64 {
    let (device, mount) = (fs.device(), fs.mount.clone());
    let (device, mount) = (device.display(), mount.display());
    let before = used(fs, kind);
    common::unmount(&fs.mount);
    sh(&format!(
        "cp --sparse=always {device} {device}.before; mount -o loop {device} {mount}"
    ));
    for file in files {
        std::fs::remove_file(file).unwrap();
    }
    let freed = before - used(fs, kind);
    common::unmount(&fs.mount);
    sh(&format!("mv {device}.before {device}; mount -o loop {device} {mount}"));
    freed
}

/// Some sets of images, each with all names of its images.
fn random_sets(report: &Value, pool: &Path, random: &mut Random, count: u64) -> Vec<Vec<PathBuf>> {
    let images: Vec<PathBuf> = report["images"]
        .as_array()
        .unwrap()
        .iter()
        .map(|image| PathBuf::from(image["path"].as_str().unwrap()))
        .collect();
    let set = |_| {
        let chosen = images.iter().filter(|_| random.below(2) == 0);
        let names: Vec<PathBuf> = chosen.flat_map(|image| names_of(image, pool)).collect();
        names
    };
    let sets: Vec<Vec<PathBuf>> = (0..count).map(set).collect();
    sets.into_iter().filter(|set| !set.is_empty()).collect()
}

/// All names of a machine's images, by its path in the report.
fn names_of_machine(machine: &Value, pool: &Path) -> Vec<PathBuf> {
    let path = machine["path"].as_str().unwrap();
    let files = walkdir::WalkDir::new(pool).into_iter().map(Result::unwrap);
    let files = files
        .filter(|entry| entry.file_type().is_file())
        .map(walkdir::DirEntry::into_path);
    let is_of = |file: &PathBuf| {
        let name = file.to_str().unwrap();
        file.starts_with(path)
            || name
                .strip_prefix(path)
                .is_some_and(|rest| rest.starts_with('.') && rest.contains('@'))
    };
    files.filter(is_of).collect()
}

/// What the report says that deleting a set frees, now and after a reclaim.
fn told(fs: &Mounted, set: &[PathBuf]) -> (i64, i64) {
    let options = set.iter().map(|name| format!(" --if-deleted {}", name.display()));
    let options = options.collect::<Vec<_>>().concat();
    let report = fs.vmfold_json(&format!("report{options}"));
    let told = report["if_deleted"].as_array().unwrap().last().unwrap();
    let number = |name: &str| told[name].as_i64().unwrap();
    (number("frees_bytes"), number("frees_after_reclaim_bytes"))
}

/// The name of each machine and family, its files, and what the report says that deleting it frees, now and after a reclaim.
fn told_of_machines(report: &Value, pool: &Path) -> Vec<(String, Vec<PathBuf>, i64, i64)> {
    let row = |of: &Value, files: Vec<PathBuf>| {
        let number = |name: &str| of[name].as_i64().unwrap();
        let name = of["name"].as_str().unwrap().to_owned();
        (name, files, number("frees_bytes"), number("frees_after_reclaim_bytes"))
    };
    let mut all = Vec::new();
    for family in report["families"].as_array().unwrap() {
        let machines = family["machines"].as_array().unwrap();
        let files = machines.iter().flat_map(|machine| names_of_machine(machine, pool));
        let mut files: Vec<PathBuf> = files.collect();
        files.sort();
        files.dedup();
        all.push(row(family, files));
        all.extend(
            machines
                .iter()
                .map(|machine| row(machine, names_of_machine(machine, pool))),
        );
    }
    all
}

/// Deletes sets of images, machines and families, before and after a reclaim. Each time the state before is put back.
fn check_sets(fs: &Mounted, kind: &str, slack: i64) {
    let count = std::env::var("VMFOLD_REPORT_SETS").map_or(3, |count| count.parse().unwrap());
    build(fs);
    used(fs, kind);
    let mut random = Random(79);
    let first = fs.vmfold_json("report");
    let dry = fs.vmfold_json("reclaim --dry-run");
    assert_eq!(first["planned"]["freed_bytes"], dry["planned"]["freed_bytes"]);
    assert_eq!(first["planned"]["freed_by_reason"], dry["planned"]["freed_by_reason"]);
    let sets = random_sets(&first, &fs.pool(), &mut random, count);
    let told_first: Vec<(i64, i64)> = sets.iter().map(|set| told(fs, set)).collect();
    let machines = told_of_machines(&first, &fs.pool());
    let is_right = |what: &dyn std::fmt::Debug, files: &[PathBuf], told: i64| {
        let freed = freed_by_deleting(fs, kind, files);
        assert!(
            (freed - told).abs() <= slack,
            "{kind}: {what:?} was to free {told} bytes and freed {freed}"
        );
    };
    for (set, (now, _)) in sets.iter().zip(&told_first) {
        is_right(set, set, *now);
    }
    for (name, files, now, _) in &machines {
        is_right(name, files, *now);
    }
    let done = fs.vmfold_json("reclaim");
    assert_eq!(done["done"]["freed_bytes"], first["planned"]["freed_bytes"]);
    used(fs, kind);
    let second = fs.vmfold_json("report");
    for (set, (_, after)) in sets.iter().zip(&told_first) {
        assert_eq!(told(fs, set).0, *after, "{kind}: {set:?}");
        is_right(set, set, *after);
    }
    let after: Vec<_> = machines
        .iter()
        .map(|(name, _, _, after)| (name.clone(), *after))
        .collect();
    let is_machine = |name: &str| {
        told_of_machines(&second, &fs.pool())
            .into_iter()
            .find(|one| one.0 == name)
    };
    for ((name, files, ..), (_, after)) in machines.iter().zip(&after) {
        // Families may be others now, and have the name of one of their machines.
        if is_machine(name).is_some_and(|one| one.1 == *files) {
            is_right(name, files, *after);
        }
    }
}

#[test]
fn what_deleting_a_set_frees_is_told_before_and_after_a_reclaim_on_btrfs() {
    if can_mount() {
        check_sets(&Mounted::btrfs(), "btrfs", 0);
    }
}

#[test]
fn what_deleting_a_set_frees_is_told_before_and_after_a_reclaim_on_xfs() {
    if can_mount() {
        // Trees of extents, of shared blocks and of free space shrink too; here, by some blocks.
        check_sets(
            &Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 1024),
            "xfs",
            32 * 4096,
        );
    }
}

#[test]
fn images_in_use_count_with_what_they_hold() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build(&fs);
    let home = fs.pool().join("appvms/work/private.img");
    let open = std::fs::File::open(&home).unwrap();
    let (report, dry) = (fs.vmfold_json("report"), fs.vmfold_json("reclaim --dry-run"));
    assert_eq!(report["planned"]["freed_bytes"], dry["planned"]["freed_bytes"]);
    assert_eq!(
        report["left_alone"].as_array().unwrap().len(),
        dry["skipped"].as_array().unwrap().len()
    );
    assert_eq!(report["skipped"], serde_json::json!([]));
    let set = names_of(&home, &fs.pool());
    let (_, after) = told(&fs, &set);
    let text = fs.vmfold("report");
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(
        text.contains("1 in use") && text.contains("private.img: open in "),
        "{text}"
    );
    fs.vmfold_json("reclaim");
    assert_eq!(told(&fs, &set).0, after);
    drop(open);
}

#[test]
fn what_has_a_name_elsewhere_stays() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build(&fs);
    std::fs::hard_link(fs.pool().join("x.img"), fs.mount.join("elsewhere-too")).unwrap();
    let set = [fs.pool().join("x.img")];
    let (now, after) = told(&fs, &set);
    assert_eq!((now, after), (0, 0));
    assert_eq!(freed_by_deleting(&fs, "btrfs", &set), 0);
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
