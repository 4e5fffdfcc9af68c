//! Restores of backups to a real filesystem: what they share, whose names they give, and what room they take.

use super::*;

#[test]
fn a_restore_takes_the_distinct_blocks_and_what_the_disk_holds_is_shared() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let distinct = scene.distinct_bytes();
    for (number, source) in ["a.vma", "a.vma.zst"].into_iter().enumerate() {
        let to = format!("to{number}");
        let planned = scene.import_json(&format!("{source} --to {to} --dry-run"));
        assert!(!scene.fs.mount.join(&to).exists());
        let before = scene.fs.used();
        let done = scene.import_json(&format!("{source} --to {to}"));
        let used = scene.fs.used() - before;
        assert_eq!(planned["planned"]["new_bytes"], distinct, "{planned}");
        assert_eq!(done["planned"]["new_bytes"], planned["planned"]["new_bytes"]);
        assert_eq!(done["done"]["written_bytes"], distinct);
        // What btrfs keeps in its metadata, such as a file of a few bytes, is not counted.
        assert!(
            used <= distinct && used + 8192 >= distinct,
            "{used} bytes for {distinct}"
        );
        scene.assert_restored(&to);
    }
    let mut pipe = scene.fs.command();
    pipe.args(["import", "-", "--to", "piped", "--seed", "to0", "--json", "--index"])
        .arg(scene.fs.index());
    let archive = std::fs::File::open(scene.fs.mount.join("a.vma.zst")).unwrap();
    let before = scene.fs.used();
    let output = pipe.stdin(archive).output().unwrap();
    drop(pipe);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    scene.assert_restored("piped");
    // The last block of a file that is not whole cannot be shared.
    let tails = 3 * 4096;
    assert!(done["done"]["written_bytes"].as_u64().unwrap() <= tails, "{done}");
    assert!(scene.fs.used() - before <= tails);
    scene.fs.check();
}

#[test]
fn of_a_damaged_backup_only_what_came_whole_gets_its_name() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let archive = std::fs::read(scene.fs.mount.join("a.vma")).unwrap();
    std::fs::write(scene.fs.mount.join("cut.vma"), &archive[..archive.len() / 2]).unwrap();
    let output = scene.import("cut.vma --to to");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("the backup `cut.vma` is damaged at bytes"), "{text}");
    let names = |to: &str| {
        let entries = std::fs::read_dir(scene.fs.mount.join(to)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".vmfold-import-"))
            .collect();
        names.sort();
        names
    };
    assert!(
        !scene.fs.mount.join("to").exists(),
        "nothing is left that serves no later run"
    );
    let output = scene.import("cut.vma --to part --partial");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert_eq!(
        names("part"),
        [
            "drive-scsi0.raw.vmfold-partial",
            "drive-scsi1.raw.vmfold-partial",
            "qemu-server.conf"
        ]
    );
    let part = std::fs::read(scene.fs.mount.join("part/drive-scsi0.raw.vmfold-partial")).unwrap();
    let whole = &scene.expected[Path::new("drive-scsi0.raw")];
    assert_eq!(part.len(), whole.len());
    let blocks = part.chunks(4096).zip(whole.chunks(4096));
    assert!(
        blocks
            .clone()
            .all(|(part, whole)| part == whole || part.iter().all(|byte| *byte == 0))
    );
    assert!(blocks.filter(|(part, whole)| part != whole).count() > 0);
}

#[test]
fn what_is_left_of_a_file_gets_no_name_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("a.img.vmfold-partial"), content(1, 10_000)).unwrap();
    std::fs::write(files.join("a.img"), content(2, 3 << 20)).unwrap();
    let command = format!("tar -cO -C '{}' a.img.vmfold-partial a.img", files.display());
    let archive = piped(&command, b"");
    std::fs::write(folder.path().join("cut.tar"), &archive[..5 << 19]).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .current_dir(folder.path())
        .args(["import", "cut.tar", "--to", "to", "--partial"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("the rest of it is `a.img.2.vmfold-partial`"), "{text}");
    let read = |name: &str| std::fs::read(folder.path().join("to").join(name)).unwrap();
    assert!(read("a.img.vmfold-partial") == content(1, 10_000));
    assert!(read("a.img.2.vmfold-partial")[..1 << 20] == content(2, 3 << 20)[..1 << 20]);
    assert!(!folder.path().join("to/a.img").exists());
}

#[test]
fn of_a_compressed_backup_that_is_damaged_nothing_is_taken_for_whole() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mut compressed = piped("gzip", &some_vma(0, 5).make());
    let end = compressed.len();
    compressed[end - 6] ^= 1;
    std::fs::write(scene.fs.mount.join("flipped"), compressed).unwrap();
    let output = scene.import("flipped --to to --partial");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    let entries = std::fs::read_dir(scene.fs.mount.join("to")).unwrap();
    let names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(names.iter().all(|name| name.ends_with(".vmfold-partial")), "{names:?}");
}

#[test]
fn a_name_of_a_file_that_is_not_chosen_is_not_left_out_silently() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.fs.mount.display();
    sh(&format!(
        "cd '{mount}'; mkdir t; echo 1 > t/a; ln t/a t/b; echo 2 > t/c; tar -cf t.tar -C t a b c"
    ));
    let output = scene.import("t.tar b c --to to");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("`b` is another name of `a`"), "{text}");
    let output = scene.import("t.tar a b --to other");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read(scene.fs.mount.join("other/b")).unwrap(), b"1\n");
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_written() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    std::fs::create_dir(scene.fs.mount.join("to")).unwrap();
    std::fs::write(scene.fs.mount.join("to/drive-scsi1.raw"), "mine").unwrap();
    for dry_run in ["", "--dry-run"] {
        let output = scene.import(&format!("a.vma --to to {dry_run}"));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(std::fs::read_dir(scene.fs.mount.join("to")).unwrap().count(), 1);
    }
    let output = scene.import("a.vma drive-scsi0.raw *.conf --to to");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        std::fs::read(scene.fs.mount.join("to/drive-scsi1.raw")).unwrap(),
        b"mine"
    );
    assert_eq!(std::fs::read_dir(scene.fs.mount.join("to")).unwrap().count(), 3);
    for wrong in ["a.vma nothing* --to other", "a.vma --to other --commit 1"] {
        let output = scene.import(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {output:?}");
    }
    let output = scene.import("a.vma --to to --replace");
    assert!(output.status.success(), "{output:?}");
    scene.assert_restored("to");
}

#[test]
fn on_a_disk_that_is_too_small_what_came_whole_is_kept() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let restore =
        |fs: &Mounted, arguments: &str| scene.import(&format!("{arguments} --to {}", fs.mount.join("to").display()));
    let names = |fs: &Mounted| {
        let entries = std::fs::read_dir(fs.mount.join("to")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    // The configuration comes first, and is whole.
    let small = nearly_full(34);
    let output = restore(&small, "a.vma");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(names(&small), ["qemu-server.conf"], "{text}");
    for part in [
        "Left out for lack of space: `drive-scsi0.raw`",
        "Restored 1 image to",
        "Restored as a whole: `qemu-server.conf`. Another run does not go on from there",
        "no space is left",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // If nothing is proved to be whole, nothing is left: a checksum of what is compressed comes at its end.
    let small = nearly_full(34);
    let output = restore(&small, "a.vma.zst");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!small.mount.join("to").exists());
    std::fs::remove_file(small.mount.join("other")).unwrap();
    sh(&format!("btrfs filesystem sync '{}'", small.mount.display()));
    let output = restore(&small, "a.vma.zst");
    assert!(output.status.success(), "{output:?}");
    scene.assert_restored(small.mount.join("to").to_str().unwrap());
}

/// Distinct blocks that can be compressed well.
fn compressible(length: usize) -> Vec<u8> {
    let block = |number: usize| {
        let mut block = format!("{number} is the number of this block; ")
            .into_bytes()
            .repeat(150);
        block.truncate(4096);
        block
    };
    (0..length / 4096).flat_map(block).collect()
}

#[test]
fn what_fits_only_compressed_fits() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let maker = VmaMaker {
        devices: vec![(b"drive-scsi0", compressible(90 << 20))],
        per_extent: 58,
        ..some_vma(0, 0)
    };
    std::fs::write(scene.fs.mount.join("big.vma"), maker.make()).unwrap();
    let mut export = scene.fs.command();
    export.args(["export", "big.vmf", "--from", "big.vma", "--index"]);
    assert!(export.arg(scene.fs.index()).output().unwrap().status.success());
    for source in ["big.vma", "big.vmf"] {
        let small = nearly_full(45);
        let to = small.mount.join("to");
        let output = scene.import(&format!("{source} --to {}", to.display()));
        assert_eq!(output.status.code(), Some(1), "{source}: {output:?}");
        let _ = std::fs::remove_dir_all(&to);
        let output = scene.import(&format!("{source} --to {} --compress zstd", to.display()));
        assert!(output.status.success(), "{source}: {output:?}");
        for (path, content) in expected_of(&maker) {
            assert!(std::fs::read(to.join(path)).unwrap() == content, "{source}");
        }
    }
    let other = Mounted::new("mkfs.ext4 -q", "", 256);
    let to = other.mount.join("to");
    let output = scene.import(&format!("big.vma --to {} --compress zstd", to.display()));
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!to.exists());
}

#[test]
fn an_import_takes_no_more_than_it_was_allowed() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mut export = scene.fs.command();
    export.args(["export", "a.vmf", "--from", "a.vma", "--index"]);
    assert!(export.arg(scene.fs.index()).output().unwrap().status.success());
    let names = |to: &str| {
        let entries = std::fs::read_dir(scene.fs.mount.join(to)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    // An archive tells what it takes, so that nothing is begun.
    let output = scene.import("a.vmf --to archived --work-space 8M");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!scene.fs.mount.join("archived").exists());
    // What came whole of a backup is kept.
    let output = scene.import("a.vma --to read --work-space 8M");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(names("read"), ["qemu-server.conf"], "{text}");
    assert!(
        text.contains("takes more than --work-space allows, which is 8.0 MiB"),
        "{text}"
    );
    for source in ["a.vmf", "a.vma"] {
        let to = format!("whole-{source}");
        scene.import_json(&format!("{source} --to {to} --work-space 64M"));
        scene.assert_restored(&to);
    }
}
