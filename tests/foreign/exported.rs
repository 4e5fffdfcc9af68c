//! Backups that are exported: each is a commit of its own, and shares blocks with all others and with images.

use std::process::Output;

use super::*;

/// Bytes of a backup of the next month: the second machine was changed, and the clusters come in another order.
fn next_month() -> VmaMaker<'static> {
    let base = content(1, 24 << 20);
    let mut other = base.clone();
    other[1 << 20..2 << 20].copy_from_slice(&content(2, 1 << 20));
    other[7 << 20..8 << 20].copy_from_slice(&content(6, 1 << 20));
    other.truncate((20 << 20) + 512);
    VmaMaker {
        devices: vec![(b"drive-scsi0", base), (b"drive-scsi1", other)],
        order: 7,
        per_extent: 33,
        ..some_vma(0, 0)
    }
}

/// A backup of several PACKs.
fn incompressible() -> VmaMaker<'static> {
    VmaMaker {
        devices: vec![(b"drive-scsi0", Random(8).data(32 << 20))],
        per_extent: 58,
        ..some_vma(0, 0)
    }
}

fn run(scene: &Scene, arguments: &str) -> Output {
    let mut command = scene.fs.command();
    command.args(arguments.split_whitespace()).output().unwrap()
}

/// Runs the command, and returns its report.
fn report(scene: &Scene, arguments: &str) -> serde_json::Value {
    let output = run(scene, &format!("{arguments} --json"));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments}: {text}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn export(scene: &Scene, arguments: &str) -> serde_json::Value {
    report(
        scene,
        &format!("export {arguments} --index {}", scene.fs.index().display()),
    )
}

/// The blocks of some images that are not zeros, by hash.
fn blocks_of(images: &BTreeMap<PathBuf, Vec<u8>>) -> std::collections::HashSet<[u8; 32]> {
    let blocks = images.values().flat_map(|content| content.chunks(4096));
    let stored = blocks.filter(|block| block.iter().any(|byte| *byte != 0));
    let whole = stored.map(|block| {
        let mut block = block.to_vec();
        block.resize(4096, 0);
        *blake3::hash(&block).as_bytes()
    });
    whole.collect()
}

#[test]
fn full_backups_of_each_month_take_little_more_than_one() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let later = next_month();
    std::fs::write(scene.fs.mount.join("b.vma"), later.make()).unwrap();
    let first = export(&scene, "x.vmf --from a.vma");
    assert_eq!(first["new_bytes"], scene.distinct_bytes(), "{first}");
    let (old, new) = (blocks_of(&scene.expected), blocks_of(&expected_of(&later)));
    let added = new.difference(&old).count() as u64 * 4096;
    assert!(added >= 200 * 4096);
    let second = export(&scene, "x.vmf --from b.vma --label february");
    assert_eq!(second["new_bytes"], added, "{second}");
    let third = export(&scene, "x.vmf --from a.vma.zst");
    assert_eq!(third["new_bytes"], 0, "{third}");

    let listed = report(&scene, "list x.vmf");
    let commits = listed["commits"].as_array().unwrap();
    let labels: Vec<&str> = commits.iter().map(|commit| commit["label"].as_str().unwrap()).collect();
    assert_eq!(labels, ["a.vma", "february", "a.vma.zst"]);
    // The backup tells when it was made.
    assert!(
        commits.iter().all(|commit| commit["time"] == commits[0]["time"]),
        "{commits:?}"
    );
    assert_eq!(run(&scene, "verify x.vmf").status.code(), Some(0));
    for (commit, to, expected) in [
        ("1", "to1", &scene.expected),
        ("february", "to2", &expected_of(&later)),
        ("3", "to3", &scene.expected),
    ] {
        scene.import_json(&format!("x.vmf --commit {commit} --to {to}"));
        for (path, content) in expected {
            let restored = std::fs::read(scene.fs.mount.join(to).join(path)).unwrap();
            assert!(restored == *content, "{commit}: {}", path.display());
        }
    }
}

#[test]
fn images_and_their_backups_share_blocks_in_an_archive() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    scene.import_json("a.vma --to pool/machines");
    let images = export(&scene, "x.vmf pool/machines");
    // Zeros that lie in a block with something else, and files in metadata, are counted differently.
    assert!(
        images["new_bytes"].as_u64().unwrap() <= scene.distinct_bytes(),
        "{images}"
    );
    let backup = export(&scene, "x.vmf --from a.vma");
    assert!(backup["new_bytes"].as_u64().unwrap() <= 4096, "{backup}");
    export(&scene, "y.vmf --from a.vma");
    let images = export(&scene, "y.vmf pool/machines");
    assert_eq!(images["new_bytes"], 0, "{images}");
    assert_eq!(run(&scene, "verify x.vmf").status.code(), Some(0));
    assert_eq!(run(&scene, "verify y.vmf").status.code(), Some(0));
}

#[test]
fn a_backup_becomes_an_archive_in_a_pipe() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let (binary, mount, index) = (
        env!("CARGO_BIN_EXE_vmfold"),
        scene.fs.mount.display(),
        scene.fs.index().display().to_string(),
    );
    let pipe = |to: &str, options: &str| {
        sh(&format!(
            "bash -c \"set -eo pipefail; cd '{mount}'; {binary} export - --from - --index '{index}' <a.vma.zst \
             | {binary} import - {options} --to {to} --index '{index}'\""
        ))
    };
    pipe("to", "");
    scene.assert_restored("to");
    let before = scene.fs.used();
    pipe("seeded", "--seed to");
    scene.assert_restored("seeded");
    let used = scene.fs.used() - before;
    assert!(used <= 3 * 4096, "{used} bytes for what is there already");
    pipe("one", "drive-scsi1.raw");
    let names: Vec<_> = std::fs::read_dir(scene.fs.mount.join("one")).unwrap().collect();
    assert_eq!(names.len(), 1);
    assert!(
        std::fs::read(scene.fs.mount.join("one/drive-scsi1.raw")).unwrap()
            == scene.expected[Path::new("drive-scsi1.raw")]
    );
}

#[test]
fn of_a_damaged_backup_nothing_is_exported() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let archive = std::fs::read(scene.fs.mount.join("a.vma")).unwrap();
    std::fs::write(scene.fs.mount.join("cut.vma"), &archive[..archive.len() / 2]).unwrap();
    let index = scene.fs.index().display().to_string();
    let output = run(&scene, &format!("export x.vmf --from cut.vma --index {index}"));
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(!scene.fs.mount.join("x.vmf").exists());
    export(&scene, "x.vmf --from a.vma");
    let before = std::fs::read(scene.fs.mount.join("x.vmf")).unwrap();
    for (arguments, code) in [
        ("--from cut.vma", 4),
        ("--from x.vmf", 1),
        ("--from pool", 2),
        ("--from a.vma --only nothing", 2),
        ("--from a.vma pool", 2),
    ] {
        let output = run(&scene, &format!("export x.vmf {arguments} --index {index}"));
        assert_eq!(output.status.code(), Some(code), "{arguments}: {output:?}");
        assert!(
            std::fs::read(scene.fs.mount.join("x.vmf")).unwrap() == before,
            "{arguments}"
        );
    }
}

#[test]
fn what_the_archive_has_lost_is_stored_anew() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    std::fs::write(scene.fs.mount.join("a.vma"), incompressible().make()).unwrap();
    export(&scene, "x.vmf --from a.vma");
    let path = scene.fs.mount.join("x.vmf");
    let mut archive = std::fs::read(&path).unwrap();
    let middle = archive.len() / 2;
    archive[middle..middle + 100].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::write(&path, archive).unwrap();
    let trusting = export(&scene, "x.vmf --from a.vma --trust-archive");
    assert_eq!(trusting["new_bytes"], 0, "{trusting}");
    let careful = export(&scene, "x.vmf --from a.vma");
    let stored = careful["new_bytes"].as_u64().unwrap();
    assert!(stored > 0 && stored < 24 << 20, "{careful}");
    scene.import_json("x.vmf --to to");
    for (path, content) in expected_of(&incompressible()) {
        assert!(std::fs::read(scene.fs.mount.join("to").join(path)).unwrap() == content);
    }
    assert_eq!(run(&scene, "import x.vmf --commit 2 --to two").status.code(), Some(4));
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn an_archive_that_does_not_fit_stays_as_it_was() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    std::fs::write(scene.fs.mount.join("a.vma"), incompressible().make()).unwrap();
    let small = nearly_full(8);
    let archive = small.mount.join("x.vmf").display().to_string();
    let index = scene.fs.index().display().to_string();
    let output = run(&scene, &format!("export {archive} --from a.vma --index {index}"));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("No space left"),
        "{output:?}"
    );
    assert!(!small.mount.join("x.vmf").exists());
}

#[test]
fn backups_are_compared_with_commits_and_images_and_each_other() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    std::fs::write(scene.fs.mount.join("b.vma"), next_month().make()).unwrap();
    export(&scene, "x.vmf --from a.vma");
    scene.import_json("a.vma --to pool/machines");
    let differing = |arguments: &str, code: i32| {
        let output = run(&scene, &format!("diff {arguments} --json"));
        assert_eq!(output.status.code(), Some(code), "{arguments}: {output:?}");
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        report["differing_bytes"].as_u64().unwrap()
    };
    for same in [
        "x.vmf --backup a.vma",
        "a.vma --backup a.vma.zst",
        "a.vma --pool pool/machines",
        "x.vmf 1 --pool pool/machines",
    ] {
        assert_eq!(differing(same, 0), 0, "{same}");
    }
    let (old, new) = (&scene.expected, expected_of(&next_month()));
    let blocks = old
        .iter()
        .flat_map(|(path, old)| old.chunks(4096).zip(new[path].chunks(4096)));
    let expected: u64 = blocks
        .filter(|(old, new)| old != new)
        .map(|(old, _)| old.len() as u64)
        .sum();
    for other in [
        "x.vmf --backup b.vma",
        "a.vma --backup b.vma",
        "b.vma --pool pool/machines",
    ] {
        assert_eq!(differing(other, 5), expected, "{other}");
    }
    for (refused, code) in [("a.vma 1 --backup b.vma", 2), ("a.vma", 2), ("x.vmf --backup x.vmf", 1)] {
        let output = run(&scene, &format!("diff {refused}"));
        assert_eq!(output.status.code(), Some(code), "{refused}: {output:?}");
    }
}
