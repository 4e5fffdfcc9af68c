//! Goal: what an archive holds comes back byte for byte with everything that belongs to it, and takes as little on disk as it can;
//! whatever is damaged, interrupted or hostile, nothing wrong is restored. Method: the command on real btrfs (and ext4, XFS) on
//! loop devices, a golden archive of each released version, and damage of every kind to every record.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use common::{Mounted, Random, build_pool, can_mount, churn, population, reflink, sh, sha256_of};
use serde_json::Value;

/// Runs vmfold; the index is that of the scratch folder.
fn vmfold(scratch: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
    command.env_clear().args(arguments).current_dir(scratch);
    if matches!(arguments[0], "export" | "import") {
        command.arg("--index").arg(scratch.join("index"));
    }
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    let of = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}{}", of(&output.stdout), of(&output.stderr))
}

/// Runs vmfold, which must succeed, and returns its JSON document.
fn json(scratch: &Path, arguments: &[&str]) -> Value {
    let mut all = arguments.to_vec();
    all.push("--json");
    let output = vmfold(scratch, &all);
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Everything that must come back, by name. Inodes are told by which names share one.
fn kept(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut inodes: BTreeMap<u64, PathBuf> = BTreeMap::new();
    let mut found = BTreeMap::new();
    for entry in walkdir::WalkDir::new(folder)
        .sort_by_file_name()
        .into_iter()
        .map(Result::unwrap)
    {
        let (path, metadata) = (entry.path(), entry.metadata().unwrap());
        let name = path.strip_prefix(folder).unwrap().to_owned();
        if !metadata.is_file() || name.to_string_lossy().ends_with(".xml") {
            continue;
        }
        let first = inodes.entry(metadata.ino()).or_insert_with(|| name.clone()).clone();
        let xattrs = sh(&format!(
            "cd '{}'; getfattr -d -m '^user' -- '{}' 2>/dev/null || true",
            folder.display(),
            name.display()
        ));
        let digest = sha256_of(path);
        found.insert(
            name,
            format!(
                "{digest} size {} mtime {}.{} mode {:o} owner {}:{} inode of {} {xattrs}",
                metadata.len(),
                metadata.mtime(),
                metadata.mtime_nsec(),
                metadata.mode(),
                metadata.uid(),
                metadata.gid(),
                first.display()
            ),
        );
    }
    found
}

/// The distinct blocks of all files in a folder that are not zeros, in bytes.
fn distinct_bytes(folder: &Path) -> u64 {
    let mut seen = std::collections::HashSet::new();
    for entry in walkdir::WalkDir::new(folder).into_iter().map(Result::unwrap) {
        if entry.file_type().is_file() {
            let mut content = std::fs::read(entry.path()).unwrap();
            content.resize(content.len().next_multiple_of(4096), 0);
            let blocks = content.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0));
            seen.extend(blocks.map(|block| *blake3::hash(block).as_bytes()));
        }
    }
    seen.len() as u64 * 4096
}

/// A pool with what a manifest can hold: revisions, hard links, attributes, preallocated ranges, odd sizes, tiny images.
fn rich_pool(fs: &Mounted, seed: u64) -> PathBuf {
    let pool = fs.pool();
    build_pool(&pool, seed);
    let mut random = Random(seed + 100);
    std::fs::write(pool.join("appvms/work/tiny.img"), random.data(800)).unwrap();
    std::fs::write(pool.join("odd.img"), random.data(50_008)).unwrap();
    File::create(pool.join("hole.img")).unwrap().set_len(5 << 20).unwrap();
    std::fs::write(pool.join("appvms/work/firewall.xml"), "not an image").unwrap();
    std::fs::set_permissions(pool.join("odd.img"), std::fs::Permissions::from_mode(0o640)).unwrap();
    sh(&format!(
        "cd '{}'; setfattr -n user.kept -v yes odd.img; chown 12:34 odd.img; touch -d 2026-01-02T03:04:05.123456789Z odd.img; sync -f .",
        pool.display()
    ));
    pool
}

struct Scratch {
    folder: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        vmfold(self.folder.path(), arguments)
    }

    fn json(&self, arguments: &[&str]) -> Value {
        json(self.folder.path(), arguments)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            common::readers::check_archives_below(self.folder.path());
        }
    }
}

fn number(document: &Value, keys: &[&str]) -> u64 {
    let found = keys.iter().fold(document, |document, key| &document[*key]);
    found.as_u64().unwrap_or_else(|| panic!("{keys:?} in {document}"))
}

#[test]
fn a_folder_on_any_filesystem_is_exported() {
    if !can_mount() {
        return;
    }
    for mkfs in ["mkfs.ext4 -q", "mkfs.xfs -q -m reflink=0,crc=1"] {
        let (fs, target, scratch) = (Mounted::new(mkfs, "", 512), Mounted::btrfs(), Scratch::new());
        let pool = fs.pool();
        let mut random = Random(5);
        let base = random.data(6 << 20);
        let mut clone = base.clone();
        clone[..4096].fill(7);
        std::fs::write(pool.join("a.img"), &base).unwrap();
        std::fs::write(pool.join("b.img"), &clone).unwrap();
        std::fs::write(pool.join("odd.img"), random.data(50_008)).unwrap();
        File::create(pool.join("hole.img")).unwrap().set_len(5 << 20).unwrap();
        let before = kept(&pool);
        let exported = scratch.json(&["export", "a.vmfold", as_str(&pool)]);
        assert_eq!(number(&exported, &["images"]), 4, "{mkfs}");
        assert_eq!(number(&exported, &["new_bytes"]), distinct_bytes(&pool), "{mkfs}");
        assert_eq!(kept(&pool), before, "{mkfs}");
        let again = scratch.json(&["export", "a.vmfold", as_str(&pool)]);
        assert_eq!(number(&again, &["new_bytes"]), 0, "{mkfs}");
        let to = target.mount.join("restored");
        scratch.json(&["import", "a.vmfold", "--to", as_str(&to)]);
        for name in ["a.img", "b.img", "odd.img", "hole.img"] {
            assert!(
                std::fs::read(to.join(name)).unwrap() == std::fs::read(pool.join(name)).unwrap(),
                "{mkfs} {name}"
            );
        }
        // Nothing else works there.
        assert_eq!(scratch.run(&["reclaim", as_str(&pool)]).status.code(), Some(1));
    }
}

#[test]
fn of_paths_on_two_filesystems_nothing_is_exported() {
    if !can_mount() {
        return;
    }
    let (one, other, scratch) = (
        Mounted::new("mkfs.ext4 -q", "", 64),
        Mounted::new("mkfs.ext4 -q", "", 64),
        Scratch::new(),
    );
    for fs in [&one, &other] {
        std::fs::write(fs.pool().join("a.img"), [1; 10_000]).unwrap();
    }
    let output = scratch.run(&["export", "a.vmfold", as_str(&one.pool()), as_str(&other.pool())]);
    assert_eq!(output.status.code(), Some(2), "{}", text(&output));
    assert!(!scratch.path("a.vmfold").exists());
}

#[test]
fn what_is_exported_comes_back_already_shared() {
    if !can_mount() {
        return;
    }
    let (fs, target, scratch) = (Mounted::btrfs(), Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 1);
    let before = kept(&pool);
    let exported = scratch.json(&["export", "a.vmfold", as_str(&pool)]);
    let distinct = distinct_bytes(&pool);
    assert!(
        number(&exported, &["new_bytes"]) <= distinct + distinct / 50,
        "{exported} {distinct}"
    );
    assert_eq!(kept(&pool), before);
    let verified = scratch.json(&["verify", "a.vmfold"]);
    assert_eq!(
        number(&verified, &["verified_bytes"]),
        number(&exported, &["new_bytes"])
    );
    let to = target.mount.join("restored");
    let planned = scratch.json(&["import", "a.vmfold", "--to", as_str(&to), "--dry-run"]);
    assert!(!to.exists(), "a dry run makes nothing");
    let used = target.used();
    let done = scratch.json(&["import", "a.vmfold", "--to", as_str(&to)]);
    assert_eq!(planned["planned"], done["planned"]);
    assert_eq!(
        number(&done, &["done", "written_bytes"]),
        number(&planned, &["planned", "new_bytes"])
    );
    assert_eq!(kept(&to), before);
    let grown = target.used() - used;
    assert!(
        grown <= distinct + distinct / 20,
        "{grown} bytes on disk for {distinct} distinct ones"
    );
    let blocks = |path: &Path| path.metadata().unwrap().blocks();
    assert_eq!(blocks(&to.join("hole.img")), 0, "holes stay holes");
    assert_eq!(to.join("odd.img").metadata().unwrap().mode() & 0o7777, 0o640);
    assert!(!to.join("appvms/work/firewall.xml").exists());
    // Again, over what is there: refused, then replaced.
    let again = scratch.run(&["import", "a.vmfold", "--to", as_str(&to)]);
    assert_eq!(again.status.code(), Some(2), "{}", text(&again));
    std::fs::write(to.join("odd.img"), "changed").unwrap();
    scratch.json(&["import", "a.vmfold", "--to", as_str(&to), "--replace"]);
    assert_eq!(kept(&to), before);
    let leftovers = sh(&format!("find '{}' -name '.*vmfold*'", to.display()));
    assert_eq!(leftovers, "");
    let diff = scratch.json(&["diff", "a.vmfold", "--pool", as_str(&to)]);
    assert_eq!(number(&diff, &["differing_bytes"]), 0);
    target.check();
}

#[test]
fn images_of_odd_sizes_come_back_and_serve_as_seeds() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = fs.pool();
    for (name, size) in [("empty.img", 0), ("inline.img", 3000), ("odd.img", 20_000_001)] {
        std::fs::write(pool.join(name), Random(7 + size as u64).data(size)).unwrap();
    }
    let before = kept(&pool);
    scratch.json(&["export", "a.vmfold", as_str(&pool)]);
    let to = fs.mount.join("to");
    let done = scratch.json(&["import", "a.vmfold", "--to", as_str(&to), "--seed", as_str(&pool)]);
    assert_eq!(kept(&to), before);
    std::fs::remove_file(to.join("odd.img")).unwrap();
    std::fs::create_dir(to.join("odd.img")).unwrap();
    let output = scratch.run(&["import", "a.vmfold", "--to", as_str(&to), "--replace"]);
    assert!(
        output.status.code() == Some(2) && text(&output).contains("folder in the way"),
        "{}",
        text(&output)
    );
    // Only blocks at the end of a file that are not whole cannot be shared with the staging file.
    assert_eq!(number(&done, &["done", "written_bytes"]), 8192, "{done}");
    assert_eq!(number(&done, &["planned", "new_bytes"]), 8192, "{done}");
}

#[test]
fn what_the_disk_holds_is_not_written() {
    if !can_mount() {
        return;
    }
    let (fs, target, scratch) = (Mounted::btrfs(), Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 2);
    let before = kept(&pool);
    scratch.json(&["export", "a.vmfold", as_str(&pool)]);
    let (seeds, seed_pool) = (target.mount.join("seeds"), target.mount.join("seeds/vm-templates"));
    scratch.json(&["import", "a.vmfold", "vm-templates/a", "--to", as_str(&seeds)]);
    let distinct = distinct_bytes(&pool);
    let held = distinct_bytes(&seed_pool);
    let mut archive = File::open(scratch.path("a.vmfold")).unwrap();
    for (name, piped) in [("one", false), ("two", true)] {
        let (to, used) = (target.mount.join(name), target.used());
        let arguments = [
            "import",
            if piped { "-" } else { "a.vmfold" },
            "--to",
            as_str(&to),
            "--seed",
            as_str(&seed_pool),
            "--json",
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command
            .args(arguments)
            .arg("--index")
            .arg(scratch.path("index"))
            .current_dir(scratch.folder.path());
        std::io::Seek::rewind(&mut archive).unwrap();
        let output = command.stdin(archive.try_clone().unwrap()).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        let done: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(kept(&to), before);
        let missing = distinct - held;
        let written = number(&done, &["done", "written_bytes"]);
        assert!(
            written <= missing + missing / 20,
            "{written} written, {missing} missing: {done}"
        );
        assert_eq!(written, number(&done, &["planned", "new_bytes"]));
        let grown = target.used() - used;
        assert!(grown <= missing + missing / 10, "{grown} on disk, {missing} missing");
    }
    // Without seeds named, images that the index knows serve.
    let none = target.mount.join("none");
    let done = scratch.json(&["import", "a.vmfold", "vm-templates/a", "--to", as_str(&none)]);
    let known = number(&done, &["done", "seeded_bytes"]);
    // Found by whole chunks, which are not cut alike everywhere.
    assert!(known > held * 8 / 10, "{held} are here: {done}");
    assert_eq!(known + number(&done, &["done", "written_bytes"]), held);
    // A seed whose blocks were changed behind the archive's back gives only what is still there.
    let seed = seed_pool.join("a/root.img");
    let file = File::options().write(true).open(&seed).unwrap();
    for at in (0..400).map(|n| n * 7 * 4096) {
        file.write_all_at(&[0xee; 4096], at).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let to = target.mount.join("three");
    scratch.json(&["import", "a.vmfold", "--to", as_str(&to), "--seed", as_str(&seed_pool)]);
    assert_eq!(kept(&to), before);
    target.check();
}

#[test]
fn a_later_commit_adds_what_changed_and_reads_no_more() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 3);
    scratch.json(&["export", "a.vmfold", as_str(&pool), "--label", "before"]);
    let first = kept(&pool);
    let home = pool.join("appvms/work/private.img");
    let mut random = Random(33);
    reflink(&home, &pool.join("appvms/work/private.img.9@2026-01-09T00:00:00Z"));
    let file = File::options().write(true).open(&home).unwrap();
    let changed = 40 * 4096u64;
    for n in 0..40 {
        file.write_all_at(&random.data(4096), n * 200 * 4096).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let second = kept(&pool);
    let length = scratch.path("a.vmfold").metadata().unwrap().len();
    let old = std::fs::read(scratch.path("a.vmfold")).unwrap();
    let appended = scratch.json(&["export", "a.vmfold", as_str(&pool)]);
    assert_eq!(number(&appended, &["commit"]), 2);
    assert!(number(&appended, &["read_bytes"]) <= 2 * changed, "{appended}");
    assert!(number(&appended, &["new_bytes"]) <= changed * 13 / 10, "{appended}");
    let now = std::fs::read(scratch.path("a.vmfold")).unwrap();
    assert!(now.starts_with(&old), "nothing before is changed");
    assert_eq!(number(&appended, &["written_bytes"]), now.len() as u64 - length);
    // Without the index everything is read, and nothing is stored twice.
    std::fs::remove_dir_all(scratch.path("index")).unwrap();
    let third = scratch.json(&["export", "a.vmfold", as_str(&pool), "--label", "third"]);
    assert!(number(&third, &["read_bytes"]) > 20 << 20, "{third}");
    assert!(number(&third, &["new_bytes"]) <= 8 * 4096, "{third}");
    for (commit, expected) in [("before", &first), ("1", &first), ("2", &second), ("latest", &second)] {
        let to = scratch.path(&format!("to-{commit}"));
        scratch.json(&["import", "a.vmfold", "--to", as_str(&to), "--commit", commit]);
        assert_eq!(&kept(&to), expected, "{commit}");
    }
    let listed = scratch.json(&["list", "a.vmfold"]);
    assert_eq!(listed["commits"].as_array().unwrap().len(), 3);
    let diff = scratch.run(&["diff", "a.vmfold", "1", "2", "--json"]);
    assert_eq!(diff.status.code(), Some(5));
    let diff: Value = serde_json::from_slice(&diff.stdout).unwrap();
    let images = diff["images"].as_array().unwrap();
    let of = |path: &str| images.iter().find(|image| image["path"] == path).unwrap();
    assert_eq!(number(of("appvms/work/private.img"), &["differing_bytes"]), changed);
    assert_eq!(
        of("appvms/work/private.img.9@2026-01-09T00:00:00Z")["change"],
        "only-in-second"
    );
    assert_eq!(of("odd.img")["change"], "same");
    let diff = scratch.run(&["diff", "a.vmfold", "2", "third"]);
    assert_eq!(diff.status.code(), Some(0), "{}", text(&diff));
    scratch.json(&["verify", "a.vmfold"]);
    // Through a pipe the last commit is restored, too.
    let to = scratch.path("piped");
    let output = Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .args([
            "import",
            "-",
            "--to",
            as_str(&to),
            "--index",
            as_str(&scratch.path("index")),
        ])
        .stdin(File::open(scratch.path("a.vmfold")).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(kept(&to), second);
}

#[test]
fn a_copy_of_the_filesystem_that_went_its_own_way_is_read() {
    if !can_mount() {
        return;
    }
    // Same UUID, same addresses, same generations, other content: only the checksums tell.
    let (fs, scratch) = (Mounted::new("mkfs.btrfs -q", "", 512), Scratch::new());
    let image = fs.pool().join("a.img");
    std::fs::write(&image, Random(1).data(4 << 20)).unwrap();
    sh(&format!("sync -f '{}'", image.display()));
    let copy = scratch.path("copy.fsimg");
    let mount = fs.mount.display();
    sh(&format!(
        "umount {mount}; cp --sparse=always '{}' '{}'",
        fs.device().display(),
        copy.display()
    ));
    let write = |device: &Path, seed: u64| {
        sh(&format!("mount -o loop '{}' {mount}", device.display()));
        std::fs::write(&image, Random(seed).data(4 << 20)).unwrap();
        sh(&format!("sync -f '{}'", image.display()));
        scratch.json(&["export", "a.vmfold", as_str(&fs.pool())]);
        let to = scratch.path(&format!("to-{seed}"));
        scratch.json(&["import", "a.vmfold", "--to", as_str(&to)]);
        assert_eq!(std::fs::read(to.join("a.img")).unwrap(), Random(seed).data(4 << 20));
        sh(&format!("umount {mount}"));
    };
    write(&fs.device(), 2);
    write(&copy, 3);
}

#[test]
fn chosen_images_and_revisions() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = fs.pool();
    build_pool(&pool, 4);
    let paths = |arguments: &[&str]| -> Vec<String> {
        let _ = std::fs::remove_file(scratch.path("c.vmfold"));
        let mut all = vec!["export", "c.vmfold", as_str(&pool)];
        all.extend(arguments);
        scratch.json(&all);
        let listed = scratch.json(&["list", "c.vmfold"]);
        let images = listed["commits"][0]["images"].as_array().unwrap();
        images
            .iter()
            .map(|image| image["path"].as_str().unwrap().to_owned())
            .collect()
    };
    assert!(paths(&["--revisions", "none"]).iter().all(|path| !path.contains('@')));
    assert_eq!(
        paths(&["--revisions", "only", "--only", "appvms/**"]),
        ["1", "2", "3"].map(|n| format!("appvms/work/private.img.{n}@2026-01-0{n}T00:00:00Z"))
    );
    let newest = paths(&["--revisions", "1", "--exclude", "*precache*"]);
    assert!(
        newest.contains(&"appvms/work/private.img.3@2026-01-03T00:00:00Z".into()),
        "{newest:?}"
    );
    assert!(
        newest
            .iter()
            .all(|path| !path.contains("precache") && !path.contains(".1@")),
        "{newest:?}"
    );
    let none = scratch.run(&["export", "c.vmfold", as_str(&pool), "--only", "absent*"]);
    assert_eq!(none.status.code(), Some(2), "{}", text(&none));
    // A revision goes back beside others, under a name that the driver takes.
    let _ = std::fs::remove_file(scratch.path("c.vmfold"));
    scratch.json(&["export", "c.vmfold", as_str(&pool)]);
    scratch.json(&[
        "import",
        "c.vmfold",
        "appvms/work/private.img.2@*",
        "--to",
        as_str(&pool),
        "--as-revision",
    ]);
    let (two, four) = (
        "appvms/work/private.img.2@2026-01-02T00:00:00Z",
        "appvms/work/private.img.4@2026-01-02T00:00:00Z",
    );
    let content = |name: &str| std::fs::read(pool.join(name)).unwrap();
    assert!(content(two) == content(four));
    scratch.json(&[
        "import",
        "c.vmfold",
        "vm-templates/b/root.img",
        "--to",
        as_str(&pool),
        "--as-revision",
    ]);
    let names: Vec<_> = std::fs::read_dir(pool.join("vm-templates/b"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(
        names
            .iter()
            .any(|name| name.starts_with("root.img.1@2") && name.ends_with('Z')),
        "{names:?}"
    );
}

#[test]
fn without_reflinks_images_are_plain_and_sparse() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 5);
    let before = kept(&pool);
    scratch.json(&["export", "a.vmfold", as_str(&pool)]);
    for (mkfs, shares) in [("mkfs.ext4 -q -F", false), ("mkfs.xfs -q", true)] {
        let target = Mounted::new(mkfs, "", 2048);
        let to = target.mount.join("restored");
        let output = scratch.run(&["import", "a.vmfold", "--to", as_str(&to)]);
        assert!(output.status.success(), "{mkfs}: {}", text(&output));
        assert_eq!(
            text(&output).contains("plain sparse files"),
            !shares,
            "{mkfs}: {}",
            text(&output)
        );
        assert_eq!(kept(&to), before, "{mkfs}");
        assert_eq!(to.join("hole.img").metadata().unwrap().blocks(), 0);
    }
}

#[test]
fn an_image_in_use_is_left_out_and_one_that_changes_fails_the_export() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = fs.pool();
    build_pool(&pool, 6);
    let home = pool.join("appvms/work/private.img");
    let writer = File::options().append(true).open(&home).unwrap();
    let output = scratch.run(&["export", "a.vmfold", as_str(&pool)]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(
        text(&output).contains("1 image of 1 running machine left alone (work/private.img): open in "),
        "{}",
        text(&output)
    );
    drop(writer);
    let length = scratch.path("a.vmfold").metadata().unwrap().len();
    // Someone opens one for writing in the middle: the pipe that the archive goes to is held up until then.
    let mut export = Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .args(["export", "-", as_str(&pool), "--index", as_str(&scratch.path("index"))])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = export.stdout.take().unwrap();
    std::io::Read::read_exact(&mut stdout, &mut [0; 1000]).unwrap();
    let file = File::options().write(true).open(&home).unwrap();
    file.write_all_at(b"changed", 100).unwrap();
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    let output = export.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(
        text(&output).contains("changed while it was read") && text(&output).contains("private.img"),
        "{}",
        text(&output)
    );
    assert_eq!(scratch.path("a.vmfold").metadata().unwrap().len(), length);
}

#[test]
fn a_full_disk_ends_with_an_error_and_nothing_half_done() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 7);
    scratch.json(&["export", "a.vmfold", as_str(&pool)]);
    // Too small for what is to be restored: refused before anything is written.
    let small = Mounted::new("mkfs.ext4 -q -F", "", 64);
    let to = small.mount.join("restored");
    let output = scratch.run(&["import", "a.vmfold", "--to", as_str(&to)]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("restoring takes"), "{}", text(&output));
    assert!(!to.exists(), "not even the folder is made");
    // Full in the middle of an export, new and appending.
    let archive = small.mount.join("b.vmfold");
    sh(&format!(
        "cd '{}'; fallocate -l $(($(df --output=avail -B1 . | tail -1) - 5000000)) filler",
        small.mount.display()
    ));
    let output = scratch.run(&["export", as_str(&archive), as_str(&pool)]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("No space left"), "{}", text(&output));
    assert!(!archive.exists());
    scratch.json(&["export", as_str(&archive), as_str(&pool), "--only", "odd.img"]);
    let before = std::fs::read(&archive).unwrap();
    assert_eq!(
        scratch.run(&["export", as_str(&archive), as_str(&pool)]).status.code(),
        Some(1)
    );
    assert!(std::fs::read(&archive).unwrap() == before);
    // Full in the middle of an import: the space is taken by someone else after it was looked at.
    let target = Mounted::new("mkfs.btrfs -q --mixed", "", 200);
    let to = target.mount.join("restored");
    let filler = target.mount.join("filler");
    let mut import = Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .args([
            "import",
            "-",
            "--to",
            as_str(&to),
            "--index",
            as_str(&scratch.path("index")),
        ])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let bytes = std::fs::read(scratch.path("a.vmfold")).unwrap();
    let mut stdin = import.stdin.take().unwrap();
    let half = bytes.len() / 2;
    std::io::Write::write_all(&mut stdin, &bytes[..half]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    sh(&format!(
        "dd if=/dev/zero of='{}' bs=1M 2>/dev/null || true; sync -f '{}'",
        filler.display(),
        target.mount.display()
    ));
    let _ = std::io::Write::write_all(&mut stdin, &bytes[half..]);
    drop(stdin);
    let output = import.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("space"), "{}", text(&output));
    assert!(!to.join("odd.img").exists());
    std::fs::remove_file(&filler).unwrap();
    sh(&format!("btrfs filesystem sync '{}'", target.mount.display()));
    scratch.json(&["import", "a.vmfold", "--to", as_str(&to), "--resume"]);
    assert_eq!(kept(&to), kept(&pool));
}

/// Kills vmfold after a while; false if it had ended.
fn kill_after(mut command: Command, wait: Duration) -> bool {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(wait);

    child.kill().is_ok() && !child.wait().unwrap().success()
}

#[test]
fn killed_at_any_moment_nothing_is_lost() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 8);
    let before = kept(&pool);
    let command = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command
            .args(arguments)
            .arg("--index")
            .arg(scratch.path("index"))
            .current_dir(scratch.folder.path());
        command
    };
    let mut random = Random(8);
    let mut kills = 0;
    let started = std::time::Instant::now();
    assert!(
        command(&["export", "whole.vmfold", as_str(&pool)])
            .output()
            .unwrap()
            .status
            .success()
    );
    let takes = u64::try_from(started.elapsed().as_micros()).unwrap();
    // A new archive, and one that is appended to: either the commit is there or it is not.
    let (mut round, mut within) = (0, takes);
    while kills < 30 {
        assert!(round < 150, "{kills} of {round} were killed in time");
        let archive = format!("k{}.vmfold", round / 4);
        round += 1;
        let commits = || {
            let listed = scratch.run(&["list", &archive, "--json"]);
            let listed: Option<Value> = serde_json::from_slice(&listed.stdout).ok();
            listed.map_or(0, |listed| listed["commits"].as_array().unwrap().len())
        };
        let had = if scratch.path(&archive).exists() { commits() } else { 0 };
        std::fs::remove_dir_all(scratch.path("index")).ok();
        let killed = kill_after(
            command(&["export", &archive, as_str(&pool)]),
            Duration::from_micros(random.below(within)),
        );
        kills += u32::from(killed);
        // Appending what is there already is over sooner than the first export.
        within = if killed {
            takes.min(within * 5 / 4)
        } else {
            2000.max(within * 3 / 4)
        };
        if scratch.path(&archive).exists() && had > 0 {
            assert!((had..=had + 1).contains(&commits()));
        }
        let output = command(&["export", &archive, as_str(&pool)]).output().unwrap();
        assert!(output.status.success(), "{}", text(&output));
        assert_eq!(scratch.run(&["verify", &archive]).status.code(), Some(0));
    }
    let to = scratch.path("to");
    scratch.json(&["import", "k0.vmfold", "--to", as_str(&to)]);
    assert_eq!(kept(&to), before);
    // An import goes on where it was, whenever it was killed, on btrfs and without reflinks.
    for (target, wanted) in [(Mounted::btrfs(), 20), (Mounted::new("mkfs.ext4 -q -F", "", 2048), 10)] {
        let to = target.mount.join("restored");
        let started = std::time::Instant::now();
        assert!(
            command(&["import", "whole.vmfold", "--to", as_str(&to)])
                .output()
                .unwrap()
                .status
                .success()
        );
        let takes = u64::try_from(started.elapsed().as_micros()).unwrap();
        let (mut kills, mut round, mut within) = (0, 0, takes);
        while kills < wanted {
            assert!(round < 150, "{kills} of {round} were killed in time");
            std::fs::remove_dir_all(&to).unwrap();
            for _ in 0..=(round % 3) {
                let killed = kill_after(
                    command(&["import", "whole.vmfold", "--to", as_str(&to), "--resume"]),
                    Duration::from_micros(random.below(within)),
                );
                kills += u32::from(killed);
                within = if killed {
                    takes.min(within * 5 / 4)
                } else {
                    2000.max(within * 3 / 4)
                };
            }
            round += 1;
            let output = command(&["import", "whole.vmfold", "--to", as_str(&to), "--resume"])
                .output()
                .unwrap();
            let ended_before = text(&output).contains("exists already");
            assert!(output.status.success() || ended_before, "{}", text(&output));
            assert_eq!(kept(&to), before);
            assert_eq!(sh(&format!("find '{}' -name '.*vmfold*'", to.display())), "");
        }
    }
    assert_eq!(kept(&pool), before);
}

#[test]
fn through_pipes_both_ways() {
    if !can_mount() {
        return;
    }
    let (fs, target, scratch) = (Mounted::btrfs(), Mounted::btrfs(), Scratch::new());
    let pool = rich_pool(&fs, 9);
    let before = kept(&pool);
    let (exe, index) = (env!("CARGO_BIN_EXE_vmfold"), scratch.path("index"));
    let to = target.mount.join("other");
    let used = target.used();
    sh(&format!(
        "'{exe}' export - --index '{index}' '{}' | '{exe}' import - --index '{index}2' --to '{}'",
        pool.display(),
        to.display(),
        index = index.display()
    ));
    assert_eq!(kept(&to), before);
    let distinct = distinct_bytes(&pool);
    assert!(target.used() - used <= distinct + distinct / 20);
    // What a pipe carried is an archive as any other.
    sh(&format!(
        "'{exe}' export - --index '{}' '{}' | cat > '{}'",
        index.display(),
        pool.display(),
        scratch.path("p.vmfold").display()
    ));
    scratch.json(&["verify", "p.vmfold"]);
    scratch.json(&["export", "p.vmfold", as_str(&pool)]);
    scratch.json(&["verify", "p.vmfold"]);
    target.check();
}

#[test]
fn blocks_that_only_look_alike_are_told_apart() {
    if !can_mount() {
        return;
    }
    // A block that ends in its own CRC32C has the same CRC32C as any other such block.
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let mut random = Random(10);
    let mut alike = || {
        let mut block = random.data(4096);
        let sum = crc32c(&block[..4092]);
        block[4092..].copy_from_slice(&sum.to_le_bytes());
        block
    };
    let mut content: Vec<u8> = (0..50).flat_map(|_| alike()).collect();
    content.extend(Random(11).data(1 << 20));
    std::fs::write(fs.pool().join("one.img"), &content).unwrap();
    // And one whose checksum is that of zeros: found by changing its last four bytes.
    let mut like_zeros = Random(12).data(4096);
    like_zeros[4092..].fill(0);
    let wanted = crc32c(&[0; 4096]);
    let base = crc32c(&like_zeros);
    like_zeros[4092..].copy_from_slice(&last_bytes_for(base ^ wanted).to_le_bytes());
    assert_eq!(crc32c(&like_zeros), wanted);
    like_zeros.extend(Random(13).data(1 << 20));
    std::fs::write(fs.pool().join("two.img"), &like_zeros).unwrap();
    sh(&format!("sync -f '{}'", fs.mount.display()));
    let exported = scratch.json(&["export", "a.vmfold", as_str(&fs.pool())]);
    assert!(number(&exported, &["corrected_bytes"]) >= 50 * 4096, "{exported}");
    let to = scratch.path("to");
    scratch.json(&["import", "a.vmfold", "--to", as_str(&to)]);
    assert_eq!(kept(&to), kept(&fs.pool()));
    scratch.json(&["verify", "a.vmfold"]);
    // As seeds they are told apart, too.
    let target = fs.mount.join("again");
    scratch.json(&[
        "import",
        "a.vmfold",
        "--to",
        as_str(&target),
        "--seed",
        as_str(&fs.pool()),
    ]);
    assert_eq!(kept(&target), kept(&fs.pool()));
}

/// CRC32C (Castagnoli, reflected), bit by bit: for 4 KiB that is fast enough.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| feed(sum ^ u32::from(*byte), 8))
}

fn feed(mut sum: u32, bits: u32) -> u32 {
    for _ in 0..bits {
        sum = if sum & 1 == 1 {
            (sum >> 1) ^ 0x82f6_3b78
        } else {
            sum >> 1
        };
    }
    sum
}

/// The four last bytes that change a checksum by `change`: the state before them, run backwards.
fn last_bytes_for(change: u32) -> u32 {
    let mut state = change;
    for _ in 0..32 {
        state = if state >> 31 == 1 {
            ((state ^ 0x82f6_3b78) << 1) | 1
        } else {
            state << 1
        };
    }
    state
}

#[test]
fn metadata_that_a_manifest_cannot_hold_is_no_reason_to_fail() {
    if !can_mount() {
        return;
    }
    let (fs, scratch) = (Mounted::btrfs(), Scratch::new());
    let mut random = Random(14);
    let population = population(&mut random);
    build_pool(&fs.pool(), 14);
    churn(&fs.pool().join("appvms/work/private.img"), &mut random, &population, 5);
    // An unreadable archive, no archive, an absent one, a folder.
    std::fs::write(scratch.path("text"), "not an archive at all").unwrap();
    for (arguments, code) in [
        (vec!["list", "text"], 2),
        (vec!["verify", "text"], 2),
        (vec!["import", "absent", "--to", "x"], 2),
        (vec!["import", ".", "--to", "x"], 2),
        (vec!["export", "text", as_str(&fs.pool())], 2),
    ] {
        let output = scratch.run(&arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", text(&output));
    }
    assert_eq!(std::fs::read(scratch.path("text")).unwrap(), b"not an archive at all");
}
