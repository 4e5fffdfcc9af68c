//! Goal: on a real btrfs, compression frees what was predicted, within a twentieth, unshares nothing, changes no image, and can be
//! undone. Method: loop devices and the pool of the other tests; the filesystem's own tools count and check.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::process::Stdio;
use std::time::Duration;

use common::{Mounted, Random, build_pool, can_mount, reflink, sh, state_of};
use serde_json::Value;

fn freed(done: &Value) -> i64 {
    done["done"]["freed_bytes"].as_i64().unwrap()
}

/// Runs reclaim and checks everything that must hold of it. What is predicted may be off by `tolerance` parts of 100.
fn reclaim_and_check(fs: &Mounted, arguments: &str, tolerance: i64) -> Value {
    let signed = |bytes: u64| i64::try_from(bytes).unwrap();
    let (state, used) = (state_of(&fs.pool()), fs.used());
    let predicted = fs.vmfold_json(&format!("reclaim --dry-run {arguments}"));
    assert_eq!(fs.used(), used, "a dry run changes nothing");
    let done = fs.vmfold_json(&format!("reclaim {arguments}"));
    assert_eq!(state_of(&fs.pool()), state);
    assert_eq!(freed(&done), signed(used) - signed(fs.used()), "{done}");
    let predicted = predicted["planned"]["freed_bytes"].as_i64().unwrap();
    let off = (predicted - freed(&done)).abs();
    assert!(
        off * 100 <= freed(&done).abs() * tolerance,
        "predicted {predicted}, freed {}",
        freed(&done)
    );
    let again = fs.vmfold_json(&format!("reclaim {arguments}"));
    assert_eq!(
        again["planned"]["extents"], 0,
        "a second run has nothing to do: {again}"
    );
    assert_eq!(again["fingerprinted"]["read"], 0, "what was written is known: {again}");
    done
}

#[test]
fn each_extent_is_compressed_once_and_back() {
    if !can_mount() {
        return;
    }
    let (fs, plain) = (Mounted::btrfs(), Mounted::btrfs());
    for fs in [&fs, &plain] {
        build_pool(&fs.pool(), 70);
    }
    let shared = reclaim_and_check(&plain, "", 0);
    let done = reclaim_and_check(&fs, "--compress zstd", 5);
    assert!(freed(&done) > freed(&shared) + (10 << 20), "{done}");
    assert!(
        done["planned"]["freed_by_reason"]["compressed"].as_u64().unwrap() > 10 << 20,
        "{done}"
    );
    // Without it, nothing is to do either; what is compressed stays so.
    let again = fs.vmfold_json("reclaim");
    assert_eq!(again["planned"]["extents"], 0, "{again}");
    let report = fs.vmfold_json("report");
    let image = &report["images"][0];
    assert!(image["compressed_bytes"].as_u64().unwrap() * 4 < image["uncompressed_bytes"].as_u64().unwrap() * 3);
    sh(&format!("btrfs scrub start -B {}", fs.mount.display()));
    let undone = reclaim_and_check(&fs, "--compress none", 0);
    assert!(freed(&undone) < -(10 << 20), "{undone}");
    let report = fs.vmfold_json("report");
    for image in report["images"].as_array().unwrap() {
        assert_eq!(image["compressed_bytes"], 0, "{report}");
    }
    assert!(
        fs.used().abs_diff(plain.used()) < plain.used() / 50,
        "{} and {}",
        fs.used(),
        plain.used()
    );
    fs.check();
}

#[test]
fn levels_and_once_more() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 71);
    reclaim_and_check(&fs, "--compress zstd:1", 5);
    // The level of what is there is not known; only what gains as much again is worth it.
    let same = fs.vmfold_json("reclaim --compress zstd:19");
    assert_eq!(same["planned"]["extents"], 0, "{same}");
    let image = fs.pool().join("text.img");
    let words: Vec<u8> = (0..2_000_000u32)
        .flat_map(|n| {
            (u64::from(n).wrapping_mul(0x9e37_79b9) >> 20 & 0xffff)
                .to_string()
                .into_bytes()
        })
        .collect();
    std::fs::write(&image, &words[..8 << 20]).unwrap();
    sh(&format!("sync -f {}", image.display()));
    let low = reclaim_and_check(&fs, "--compress zstd:1", 5);
    assert!(freed(&low) > 2 << 20, "{low}");
    let high = reclaim_and_check(&fs, "--compress zstd:19 --recompress --min-gain 5", 5);
    assert!(freed(&high) > 100 << 10, "{high}");
    fs.check();
}

#[test]
fn what_does_not_gain_stays_where_it_is() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let mut random = Random(72);
    let content: Vec<u8> = (0..1 << 20).flat_map(|_| random.next().to_le_bytes()).collect();
    std::fs::write(fs.pool().join("noise.img"), content).unwrap();
    std::fs::write(fs.pool().join("half.img"), random.data(8 << 20)).unwrap();
    sh(&format!("sync -f {}", fs.pool().display()));
    let too_much = fs.vmfold_json("reclaim --compress zstd --min-gain 70");
    assert_eq!(too_much["planned"]["extents"], 0, "{too_much}");
    let done = reclaim_and_check(&fs, "--compress zstd", 5);
    assert!((3 << 20..5 << 20).contains(&freed(&done)), "{done}");
    assert_eq!(done["done"]["counts"]["written_bytes"], 8 << 20, "noise stays: {done}");
}

#[test]
fn marks_of_the_owner_count_and_those_of_the_filesystem_do_not() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let mut random = Random(73);
    for (name, mark) in [
        ("property.img", "btrfs property set {} compression none"),
        ("flag.img", "chattr +m {}"),
        ("nodatacow.img", "chattr +C {}"),
    ] {
        let path = fs.pool().join(name).display().to_string();
        sh(&format!("touch {path}; {}", mark.replace("{}", &path)));
        std::fs::write(&path, random.data(4 << 20)).unwrap();
    }
    // Data that a marked image has in common with others stays as well.
    reflink(&fs.pool().join("property.img"), &fs.pool().join("unmarked.img"));
    sh(&format!("sync -f {}", fs.pool().display()));
    let output = fs.vmfold("reclaim --compress zstd --json");
    let notes = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        notes.contains("Not compressed: 1 image marked not to be compressed"),
        "{notes}"
    );
    assert!(
        notes.contains("Not compressed: 1 image without checksums (nodatacow)"),
        "{notes}"
    );
    let report = fs.vmfold_json("report");
    for image in report["images"].as_array().unwrap() {
        let is_compressed = image["compressed_bytes"].as_u64().unwrap() > 0;
        assert_eq!(
            is_compressed,
            image["path"].as_str().unwrap().ends_with("flag.img"),
            "{report}"
        );
    }
}

#[test]
fn compressed_and_plain_copies_are_shared() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let content = Random(74).data(16 << 20);
    let packed = fs.pool().join("packed.img").display().to_string();
    sh(&format!("touch {packed}; btrfs property set {packed} compression zstd"));
    std::fs::write(&packed, &content).unwrap();
    std::fs::write(fs.pool().join("plain.img"), &content).unwrap();
    sh(&format!("sync -f {}", fs.pool().display()));
    let packed_bytes = fs.vmfold_json("report")["images"][0]["exclusive_bytes"]
        .as_i64()
        .unwrap();
    let done = reclaim_and_check(&fs, "", 2);
    assert!(
        freed(&done) == 16 << 20 || freed(&done) == packed_bytes,
        "one of the two goes: {done}"
    );
    fs.check();
}

#[test]
fn space_on_the_way_is_bounded() {
    const WORK_SPACE: u64 = 16 << 20;
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 75);
    let used = fs.used();
    let now = || {
        let text = sh(&format!("btrfs filesystem df -b {}", fs.mount.display()));
        let data = text.lines().find(|line| line.starts_with("Data")).unwrap();
        data.split("used=").nth(1).unwrap().trim().parse::<u64>().unwrap()
    };
    for compress in ["zstd", "none"] {
        let start = now();
        let mut run = fs
            .command()
            .args(["reclaim", "--work-space", "16MiB", "--compress", compress, "--index"])
            .arg(fs.index())
            .arg(fs.pool())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut peak = 0;
        while run.try_wait().unwrap().is_none() {
            peak = peak.max(now());
            std::thread::sleep(Duration::from_millis(2));
        }
        // Undoing compression ends with more than it began with.
        let most = start.max(fs.used()) + WORK_SPACE;
        assert!(peak <= most, "{compress}: {peak} of {most}");
    }
    assert!(fs.used() < used);
}

#[test]
fn undoing_that_does_not_fit_is_refused() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.btrfs -q", ",compress-force=zstd", 512);
    let mut content = vec![b'x'; 900 << 20];
    for (number, block) in (0u64..).zip(content.chunks_mut(4096)) {
        block[..8].copy_from_slice(&number.to_le_bytes());
    }
    std::fs::write(fs.pool().join("text.img"), content).unwrap();
    sh(&format!("sync -f {}", fs.pool().display()));
    let state = state_of(&fs.pool());
    let output = fs.vmfold("reclaim --compress none");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(
        error.contains("takes") && error.contains("more when it is not"),
        "{error}"
    );
    assert_eq!(state_of(&fs.pool()), state);
}

#[test]
fn xfs_does_not_compress() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.xfs -q", "", 512);
    std::fs::write(fs.pool().join("a.img"), Random(76).data(1 << 20)).unwrap();
    let output = fs.vmfold("reclaim --compress zstd");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("on XFS, which cannot compress"), "{error}");
}
