//! Goal: on a real btrfs, reclaim frees what it predicted and changes nothing else, whatever the filesystem is like and
//! whatever happens meanwhile. Method: loop devices, a small pool with templates, revisions and a restored copy, and the
//! filesystem's own tools to count and check.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::time::Duration;

use common::{Mounted, Random, build_pool, can_mount, population, reflink, sh, state_of, write_image};
use serde_json::Value;
use vmfold::exec::fingerprints::{allocate, fingerprint};
use vmfold::exec::reclaim::{ReclaimOutcome, ReclaimSettings, run};
use vmfold::facts::Facts;
use vmfold::fs::{Filesystem, Purpose, open, prove_slots};
use vmfold::monitor::Silent;
use vmfold::numbers::Slot;
use vmfold::plan;
use vmfold::spill::Budget;

/// Runs reclaim and checks everything that must hold of it; `tolerance` is what a prediction may be off by, in parts of 100.
fn reclaim_and_check(fs: &Mounted, arguments: &str, tolerance: f64) -> Value {
    let (state, used) = (state_of(&fs.pool()), fs.used());
    let predicted = &fs.vmfold_json(&format!("reclaim --dry-run {arguments}"))["planned"];
    assert_eq!(fs.used(), used, "a dry run changes nothing");
    let done = fs.vmfold_json(&format!("reclaim {arguments}"));
    assert_eq!(state_of(&fs.pool()), state);
    let freed = used.checked_sub(fs.used()).expect("the pool did not grow");
    assert_eq!(&done["planned"]["freed_bytes"], &predicted["freed_bytes"]);
    assert_eq!(
        done["done"]["freed_bytes"].as_u64().unwrap(),
        freed,
        "what is reported is what the filesystem counts"
    );
    let predicted = predicted["freed_bytes"].as_u64().unwrap();
    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    let off = (predicted as f64 - freed as f64).abs() * 100.0 / freed.max(1) as f64;
    assert!(off <= tolerance, "predicted {predicted}, freed {freed}");
    let again = fs.vmfold_json(&format!("reclaim {arguments}"));
    assert_eq!(again["done"]["freed_bytes"], 0, "a second run frees nothing: {again}");
    assert_eq!(
        again["planned"]["extents"], 0,
        "a second run has nothing to do: {again}"
    );
    assert_eq!(fs.used(), used - freed);
    done
}

fn freed(done: &Value) -> u64 {
    done["done"]["freed_bytes"].as_u64().unwrap()
}

#[test]
fn reclaim_on_plain_btrfs() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 1);
    let done = reclaim_and_check(&fs, "", 0.0);
    assert!(freed(&done) > 40 << 20, "{done}");
    assert_eq!(done["fingerprinted"]["read"], 0, "checksums serve: {done}");
    fs.check();
}

/// Runs a plan through the library, since how many calls are made at the same time depends on the machine otherwise.
#[test]
fn reclaim_with_calls_on_several_images_at_the_same_time() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 12);
    // Pairs that have nothing in common with each other, in small extents that lie next to each other on the disk.
    let mut random = Random(13);
    for pair in 0..8 {
        let content = random.data(1 << 20);
        for name in ["one", "other"] {
            std::fs::write(fs.pool().join(format!("{name}-{pair}.img")), &content).unwrap();
        }
    }
    sh(&format!("sync -f {}", fs.mount.display()));
    let (state, used) = (state_of(&fs.pool()), fs.used());
    let monitor = Silent::default();
    let found = vmfold::pool::discover(&[fs.pool()], &[]).unwrap();
    let (opened, skipped) = open(&found.images, &found.named, Purpose::Change, &monitor).unwrap();
    let volume: &dyn Filesystem = &*opened;
    assert_eq!(skipped, []);
    let mut facts = volume.map(&Budget::default()).unwrap().facts;
    let memory_bytes = plan::memory_bytes(facts.slots());
    allocate(&mut facts, memory_bytes, &fs.index()).unwrap();
    let (_, unreadable) = fingerprint(volume, &mut facts, None, &monitor).unwrap();
    assert!(unreadable.is_empty());
    let prove = |facts: &Facts, slots: &[Slot]| prove_slots(volume, facts, slots, &monitor);
    let plan = plan::plan_proved(&mut facts, &plan::PlanOptions::default(), &|| Ok(()), prove).unwrap();
    let settings = ReclaimSettings {
        threads: 4,
        ..ReclaimSettings::default()
    };
    let mut ran = ReclaimOutcome::default();
    run(&facts, &plan, settings, volume, &monitor, &mut ran).unwrap();
    volume.close_donors().unwrap();
    drop((opened, found));
    let counts = &ran.counts;
    assert_eq!((counts.differing_bytes, counts.extents_still_held), (0, 0), "{ran:?}");
    assert!(
        counts.refused_bytes.is_empty() && ran.opened_meanwhile.is_empty(),
        "{ran:?}"
    );
    let compared: u64 = plan.batches.iter().map(|batch| batch.compared_bytes).sum();
    assert_eq!(counts.shared_bytes, compared);
    assert_eq!(state_of(&fs.pool()), state);
    let freed = i64::try_from(used).unwrap() - i64::try_from(fs.used()).unwrap();
    assert_eq!(freed, plan.freed_bytes());
    assert!(freed > 40 << 20);
    let again = fs.vmfold_json("reclaim -n");
    assert_eq!(again["planned"]["extents"], 0, "{again}");
    fs.check();
}

/// Parts one after the other, in whatever order they are named, then all: the same in the end, within a hundredth.
#[test]
fn parts_come_to_the_same_as_all() {
    if !can_mount() {
        return;
    }
    let taken_after = |runs: &[&[&str]]| {
        let fs = Mounted::btrfs();
        build_pool(&fs.pool(), 9);
        let state = state_of(&fs.pool());
        for folders in runs {
            let mut command = fs.command();
            let _ = command.args(["reclaim", "--index"]).arg(fs.index());
            let output = command
                .args(folders.iter().map(|folder| fs.pool().join(folder)))
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        assert_eq!(state_of(&fs.pool()), state);
        let again = fs.vmfold_json("reclaim -n");
        assert_eq!(again["planned"]["extents"], 0, "{again}");
        fs.used()
    };
    let all = taken_after(&[&[""]]);
    let others: [&[&[&str]]; 3] = [
        &[&["vm-templates", "standalones", "appvms"]],
        &[&["appvms", "standalones", "vm-templates"]],
        &[&["appvms"], &["vm-templates/b", "standalones"], &[""]],
    ];
    for other in others {
        let taken = taken_after(other);
        assert!(taken.abs_diff(all) <= all / 100, "{other:?}: {taken} in place of {all}");
    }
}

#[test]
fn reclaim_down_to_single_blocks() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 2);
    let coarse = fs.vmfold_json("reclaim --dry-run --min-run 64K")["planned"]["freed_bytes"]
        .as_u64()
        .unwrap();
    let done = reclaim_and_check(&fs, "--min-run 4K", 0.0);
    assert!(freed(&done) > coarse);
    fs.check();
}

#[test]
fn reclaim_of_compressed_images() {
    if !can_mount() {
        return;
    }
    // Donors are made of frames where that is zstd, and compressed by the filesystem where it is not.
    for compression in ["zstd", "zlib", "lzo"] {
        let fs = Mounted::new("mkfs.btrfs -q", &format!(",compress={compression}"), 2048);
        build_pool(&fs.pool(), 3);
        let done = reclaim_and_check(&fs, "", 2.0);
        assert!(freed(&done) > 20 << 20, "{done}");
        assert!(
            done["fingerprinted"]["from_index"].as_u64().unwrap() > 0,
            "what was read once is remembered: {done}"
        );
        fs.check();
    }
}

#[test]
fn reclaim_with_other_checksums() {
    if !can_mount() {
        return;
    }
    for (checksum, reads) in [("xxhash", false), ("sha256", true)] {
        let fs = Mounted::new(&format!("mkfs.btrfs -q --checksum {checksum}"), "", 2048);
        build_pool(&fs.pool(), 4);
        std::fs::remove_dir_all(fs.index()).ok();
        let scanned = fs.vmfold_json("scan");
        assert_eq!(
            scanned["fingerprinted"]["read"].as_u64().unwrap() > 0,
            reads,
            "{scanned}"
        );
        assert!(freed(&reclaim_and_check(&fs, "", 0.0)) > 40 << 20);
        fs.check();
    }
}

#[test]
fn reclaim_matches_nodatacow_images_among_themselves() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 5);
    let folder = fs.pool().join("nocow");
    std::fs::create_dir(&folder).unwrap();
    sh(&format!("chattr +C {}", folder.display()));
    let (mut random, restored) = (Random(6), fs.pool().join("standalones/restored.img"));
    for name in ["one.img", "two.img"] {
        let to = folder.join(name);
        sh(&format!(
            "cp --reflink=never --sparse=always {} {}",
            restored.display(),
            to.display()
        ));
    }
    write_image(&folder.join("own.img"), &mut random, &population(&mut Random(5)), 16);
    let before = fs.vmfold_json("report");
    let done = reclaim_and_check(&fs, "", 0.0);
    assert!(freed(&done) > 80 << 20, "{done}\n{before}");
    assert!(
        done["done"]["counts"]["refused_bytes"].as_object().unwrap().is_empty(),
        "{done}"
    );
    fs.check();
}

#[test]
fn zeros_and_preallocated_ranges_become_holes_unless_they_are_to_stay() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let image = fs.pool().join("disk.raw");
    let mut content = Random(7).data(8 << 20);
    content[1 << 20..5 << 20].fill(0);
    std::fs::write(&image, &content).unwrap();
    sh(&format!(
        "fallocate -o 8388608 -l 8388608 {0}; truncate -s 32M {0}; sync -f {0}",
        image.display()
    ));
    let kept = fs.vmfold_json("reclaim --keep-zeros --keep-prealloc");
    assert_eq!(kept["done"]["freed_bytes"], 0, "{kept}");
    let done = reclaim_and_check(&fs, "", 0.0);
    assert_eq!(freed(&done), (4 << 20) + (8 << 20));
    fs.check();
}

#[test]
fn bookends_are_collected() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let image = fs.pool().join("disk.raw");
    let file = File::create(&image).unwrap();
    let mut random = Random(8);
    file.write_all_at(&random.data(16 << 20), 0).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&random.data(15 << 20), 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let report = fs.vmfold_json("report");
    assert_eq!(report["images"][0]["unreachable_bytes"], 15 << 20, "{report}");
    let done = reclaim_and_check(&fs, "", 0.0);
    assert_eq!(freed(&done), 15 << 20);
    assert_eq!(done["planned"]["freed_by_reason"]["unreachable"], 15 << 20, "{done}");
}

#[test]
fn snapshots_and_other_files_that_hold_extents_are_told() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let (mount, pool) = (fs.mount.display().to_string(), fs.pool());
    std::fs::remove_dir(&pool).unwrap();
    sh(&format!("btrfs subvolume create {mount}/pool"));
    let mut random = Random(9);
    let population = population(&mut random);
    write_image(&pool.join("a.img"), &mut random, &population, 24);
    sh(&format!(
        "cp --reflink=never {0}/a.img {0}/b.img; sync -f {0}",
        pool.display()
    ));
    reflink(&pool.join("b.img"), &fs.mount.join("elsewhere"));
    // One of the two copies can go, whichever is not held.
    let report = fs.vmfold_json("report");
    assert!(
        report["held_by"]
            .as_object()
            .unwrap()
            .keys()
            .any(|name| *name == fs.mount.join("elsewhere").display().to_string()),
        "{report}"
    );
    sh(&format!("btrfs subvolume snapshot -r {mount}/pool {mount}/snapshot"));
    let state = state_of(&fs.mount);
    let held = fs.vmfold_json("reclaim");
    assert_eq!(held["done"]["freed_bytes"], 0, "a snapshot holds everything: {held}");
    let not_freed = held["planned"]["pinned"]["held-by-others"].as_u64().unwrap();
    assert!(not_freed > 10 << 20, "{held}");
    let names = held["held_by"].as_object().unwrap();
    let in_snapshot = fs.mount.join("snapshot/a.img").display().to_string();
    assert!(names.contains_key(&in_snapshot), "{held}");
    // With the snapshot among the paths, its references move too, although it is read-only.
    let used = fs.used();
    let output = fs
        .command()
        .args(["--json", "reclaim", "--index"])
        .arg(fs.index())
        .arg(&pool)
        .arg(fs.mount.join("snapshot"))
        .output()
        .unwrap();
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(freed(&done) > 10 << 20, "{done}");
    assert_eq!(used - fs.used(), freed(&done));
    // Whoever keeps read-only snapshots may send them.
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--min-run 64K"), "{said}");
    assert_eq!(state_of(&fs.mount), state);
    fs.check();
}

#[test]
fn snapshots_may_come_first_and_other_filesystems_lie_below() {
    if !can_mount() {
        return;
    }
    let (fs, other) = (Mounted::btrfs(), Mounted::new("mkfs.ext4 -q", "", 64));
    let (mount, pool) = (fs.mount.display().to_string(), fs.pool());
    std::fs::remove_dir(&pool).unwrap();
    sh(&format!("btrfs subvolume create {mount}/pool"));
    let mut random = Random(20);
    let population = population(&mut random);
    write_image(&pool.join("a.img"), &mut random, &population, 24);
    sh(&format!(
        "cp --reflink=never {0}/a.img {0}/b.img; sync -f {0}; mkdir {0}/below",
        pool.display()
    ));
    sh(&format!("btrfs subvolume snapshot -r {mount}/pool {mount}/.snapshot"));
    std::fs::write(other.pool().join("z.img"), random.data(1 << 20)).unwrap();
    sh(&format!(
        "mount --bind {} {}/below",
        other.pool().display(),
        pool.display()
    ));
    let (state, used) = (state_of(&pool), fs.used());
    let output = fs
        .command()
        .args(["--json", "reclaim", "--index"])
        .arg(fs.index())
        .arg(&fs.mount)
        .output()
        .unwrap();
    sh(&format!("umount {}/below", pool.display()));
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{done}");
    assert_eq!(done["skipped"][0]["reason"], "other-filesystem", "{done}");
    assert!(freed(&done) > 10 << 20, "{done}");
    assert_eq!(used - fs.used(), freed(&done));
    let kept: Vec<_> = state
        .into_iter()
        .filter(|(path, _)| !path.ends_with("below/z.img"))
        .collect();
    assert_eq!(state_of(&pool).into_iter().collect::<Vec<_>>(), kept);
    fs.check();
}

#[test]
fn what_is_overwritten_in_place_is_read_again() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    sh(&format!("chattr +C {}", fs.pool().display()));
    let (one, two) = (fs.pool().join("one.img"), fs.pool().join("two.img"));
    let mut random = Random(21);
    for path in [&one, &two] {
        std::fs::write(path, random.data(8 << 20)).unwrap();
        sh(&format!("sync -f {}", path.display()));
    }
    let _ = fs.vmfold_json("scan");
    sh(&format!(
        "dd if={} of={} bs=1M conv=notrunc status=none; sync -f {0}",
        one.display(),
        two.display()
    ));
    assert_eq!(freed(&reclaim_and_check(&fs, "", 0.0)), 8 << 20);
}

#[test]
fn no_index_is_no_obstacle() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 22);
    std::fs::write(fs.index(), "a file where the folder should be").unwrap();
    let output = fs.vmfold("--json reclaim");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.starts_with("note: Going on without an index: "), "{error}");
    assert_eq!(output.status.code(), Some(0));
    assert!(freed(&serde_json::from_slice(&output.stdout).unwrap()) > 40 << 20);
}

#[test]
fn images_in_use_are_left_alone() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 10);
    let used = fs.pool().join("appvms/work/private-precache.img");
    let device = sh(&format!("losetup -f --show {}", used.display()));
    let open = File::open(fs.pool().join("vm-templates/b/root.img")).unwrap();
    let before = sh(&format!(
        "filefrag -v {0}/appvms/work/* {0}/vm-templates/b/root.img",
        fs.pool().display()
    ));
    let output = fs.vmfold("-v reclaim");
    sh(&format!("losetup -d {device}"));
    drop(open);
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.ends_with("7 images of 2 running machines left alone (work, b/root.img)\n"),
        "{text}"
    );
    // The log names each of them.
    let text = String::from_utf8(output.stderr).unwrap();
    for name in ["private-precache.img", "b/root.img"] {
        let is_named = |line: &str| line.contains(name) && line.contains("in use: shut the machine down");
        assert!(text.lines().any(is_named), "{text}");
    }
    assert_eq!(
        text.matches("another image of its machine is in use").count(),
        5,
        "a template that it has a link to as well: {text}"
    );
    let after = sh(&format!(
        "filefrag -v {0}/appvms/work/* {0}/vm-templates/b/root.img",
        fs.pool().display()
    ));
    let places = |text: &str| text.lines().map(|line| line.replace(",shared", "")).collect::<Vec<_>>();
    assert_eq!(places(&after), places(&before), "no extent of theirs was moved");
    reclaim_and_check(&fs, "", 0.0);
}

#[test]
fn whoever_opens_an_image_does_not_wait() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 11);
    let state = state_of(&fs.pool());
    let mut child = fs
        .command()
        .args(["reclaim", "--min-run", "4K", "--index"])
        .arg(fs.index())
        .arg(fs.pool())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let started = std::time::Instant::now();
    let mut opened = None;
    while child.try_wait().unwrap().is_none() {
        if started.elapsed() > Duration::from_millis(60) && opened.is_none() {
            let asked = std::time::Instant::now();
            opened = Some((
                File::open(fs.pool().join("standalones/restored.img")).unwrap(),
                asked.elapsed(),
            ));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let output = child.wait_with_output().unwrap();
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    // Without the lease given back, the kernel makes an opener wait for 45 seconds.
    let (_, waited) = opened.expect("the run takes longer than that");
    assert!(waited < Duration::from_secs(20), "{waited:?}");
    assert_eq!(state_of(&fs.pool()), state);
    reclaim_and_check(&fs, "", 0.0);
}

#[test]
fn killed_at_any_moment_images_are_intact_and_the_next_run_completes() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 12);
    let state = state_of(&fs.pool());
    let unharmed = fs.used();
    for moment in 0..24u64 {
        let mut child = fs
            .command()
            .args(["reclaim", "--work-space", "8M", "--index"])
            .arg(fs.index())
            .arg(fs.pool())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(moment * 15));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(state_of(&fs.pool()), state, "killed after {} ms", moment * 15);
        assert!(fs.used() <= unharmed, "a killed run leaves nothing behind");
    }
    let names: Vec<_> = walkdir::WalkDir::new(&fs.mount)
        .into_iter()
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.is_file())
        .collect();
    assert_eq!(names.len(), state.len(), "{names:?}");
    reclaim_and_check(&fs, "", 0.0);
    fs.check();
}

#[test]
fn a_full_filesystem_is_an_error_and_no_harm() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.btrfs -q", "", 400);
    build_pool(&fs.pool(), 13);
    let mut ballast = File::create(fs.mount.join("ballast")).unwrap();
    let block = vec![7; 64 << 10];
    while ballast.write_all(&block).is_ok() {}
    // What was allowed into memory may still not fit the disk; that is the point here.
    let _ = ballast.sync_all();
    drop(ballast);
    let (state, full) = (state_of(&fs.pool()), fs.used());
    let output = fs.vmfold("reclaim");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert!(error.contains("free beyond the reserve of 128.0 MiB"), "{error}");
    assert_eq!(state_of(&fs.pool()), state);
    assert!(fs.used() < full, "what needs no space is freed all the same");
    std::fs::remove_file(fs.mount.join("ballast")).unwrap();
    reclaim_and_check(&fs, "", 0.0);
    fs.check();
}

#[test]
fn a_damaged_or_deleted_index_costs_time_only() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.btrfs -q", ",compress=zstd", 2048);
    build_pool(&fs.pool(), 14);
    let planned = |fs: &Mounted| {
        fs.vmfold_json("reclaim --dry-run")["planned"]["freed_bytes"]
            .as_u64()
            .unwrap()
    };
    let expected = planned(&fs);
    let mut random = Random(15);
    let mut told = 0;
    for _ in 0..40 {
        let files: Vec<_> = walkdir::WalkDir::new(fs.index())
            .sort_by_file_name()
            .into_iter()
            .map(|entry| entry.unwrap().into_path())
            .filter(|path| path.is_file() && path.metadata().unwrap().len() > 0)
            .collect();
        let path = &files[usize::try_from(random.below(files.len() as u64)).unwrap()];
        let file = File::options().write(true).open(path).unwrap();
        let length = file.metadata().unwrap().len();
        match random.below(3) {
            0 => file.set_len(random.below(length)).unwrap(),
            1 => file.write_all_at(&random.data(64), random.below(length)).unwrap(),
            _ => file.write_all_at(&vec![0; 512], random.below(length)).unwrap(),
        }
        let output = fs.vmfold("--json reclaim --dry-run");
        let error = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{}: {error}", path.display());
        told += u32::from(error.contains("is damaged and is made anew"));
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(found["planned"]["freed_bytes"], expected);
    }
    assert!(told > 0, "some damage shows at once");
    std::fs::remove_dir_all(fs.index()).unwrap();
    assert_eq!(planned(&fs), expected);
}

#[test]
fn an_image_with_a_bad_block_is_named_with_a_message() {
    if !can_mount() {
        return;
    }
    // Without checksums in the tree that serve, data is read, and a bad checksum shows.
    let fs = Mounted::new("mkfs.btrfs -q --checksum sha256", "", 2048);
    build_pool(&fs.pool(), 16);
    let bad = fs.pool().join("standalones/bad.img");
    std::fs::write(&bad, Random(17).data(8 << 20)).unwrap();
    sh(&format!("sync -f {}", bad.display()));
    fs.corrupt(&bad);
    let output = fs.vmfold("reclaim");
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(3), "{text}");
    assert!(
        text.contains("bad.img: what of it cannot be read stays as it is (bytes ")
            && text.contains("Input/output error"),
        "{text}"
    );
}

#[test]
fn interrupted_runs_say_what_they_did() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 18);
    let state = state_of(&fs.pool());
    let mut interrupted = 0;
    for moment in [20u64, 60, 100, 150, 200, 300] {
        let child = fs
            .command()
            .args(["reclaim", "--work-space", "4M", "--min-run", "4K", "--index"])
            .arg(fs.index())
            .arg(fs.pool())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(moment));
        sh(&format!("kill -INT {} 2>/dev/null || true", child.id()));
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        match output.status.code() {
            Some(130) => {
                interrupted += 1;
                assert!(
                    text.is_empty() || text.contains("Stopped before the end: every image is intact"),
                    "{text}"
                );
            }
            // Before the handler stands, the signal ends the process; after the end, there is nothing to stop.
            Some(0) | None => {}
            other => panic!("{other:?} {text}"),
        }
        assert_eq!(state_of(&fs.pool()), state);
    }
    assert!(interrupted > 0);
    reclaim_and_check(&fs, "", 0.0);
}

#[test]
fn odd_images_are_no_trouble() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let mut random = Random(19);
    let data = random.data(4 << 20);
    let write = |name: &str, content: &[u8]| {
        let path = fs.pool().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    write("tiny.img", b"inline");
    write("empty.img", b"");
    let unaligned = write("unaligned.qcow2", &data[..(3 << 20) + 1000]);
    write("unaligned-copy.qcow2", &data[..(3 << 20) + 1000]);
    write("aligned.raw", &data);
    let holes = File::create(fs.pool().join("holes.raw")).unwrap();
    holes.set_len(1 << 40).unwrap();
    holes.write_all_at(&data, (1 << 40) - (8 << 20)).unwrap();
    drop(holes);
    let immutable = write("immutable.raw", &data);
    std::os::unix::fs::symlink(&unaligned, fs.pool().join("link.img")).unwrap();
    sh(&format!(
        "sync -f {0}; chattr +i {1}; fallocate -n -o 4194304 -l 1048576 {0}/aligned.raw",
        fs.pool().display(),
        immutable.display()
    ));
    let output = fs.vmfold("--json reclaim");
    sh(&format!("chattr -i {}", immutable.display()));
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3), "{done}");
    assert_eq!(done["skipped"][0]["reason"], "immutable");
    // One of the two whole copies, and nothing of extents that hold an unaligned tail.
    assert!(freed(&done) >= 4 << 20, "{done}");
    assert_eq!(std::fs::read(&unaligned).unwrap(), data[..(3 << 20) + 1000]);
    // A terabyte of hole takes too long to hash.
    std::fs::remove_file(fs.pool().join("holes.raw")).unwrap();
    reclaim_and_check(&fs, "", 0.0);
    fs.check();
}
