//! What other users of the machine can do to a run: links, swapped folders, files that are not ours to read.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use std::collections::HashSet;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};

use common::{Mounted, Random, can_mount, reflink, sh, state_of};
use serde_json::Value;
use vmfold::sys::lease::{self, Lease};

const USER: u32 = 12345;
const OTHER: u32 = 12346;

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn chown(path: &Path, user: u32) {
    std::os::unix::fs::lchown(path, Some(user), Some(user)).unwrap();
}

fn set_mode(path: &Path, mode: u32) {
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// An XFS whose pool and index belong to a user, and the binary where that user can run it.
fn xfs_of_user() -> (Mounted, PathBuf) {
    let fs = Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512);
    set_mode(fs.mount.parent().unwrap(), 0o755);
    std::fs::create_dir(fs.mount.join("index")).unwrap();
    let binary = fs.mount.join("vmfold");
    std::fs::copy(env!("CARGO_BIN_EXE_vmfold"), &binary).unwrap();
    (fs, binary)
}

/// Runs vmfold as the user, with nothing of this process's environment.
fn as_user(fs: &Mounted, binary: &Path, temporary: &Path, arguments: &[&str]) -> Output {
    let pool = fs.pool();
    sh(&format!("chown {USER}:{USER} {0} {0}/../index", pool.display()));
    Command::new("setpriv")
        .args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups"])
        .arg(binary)
        .args(arguments)
        .arg("--index")
        .arg(fs.mount.join("index"))
        .arg(pool)
        .env_clear()
        .env("TMPDIR", temporary)
        .output()
        .unwrap()
}

#[test]
fn a_lock_that_another_user_made_is_not_followed() {
    if !can_mount() {
        return;
    }
    let (fs, binary) = xfs_of_user();
    let image = fs.pool().join("a.img");
    std::fs::write(&image, Random(1).data(1 << 20)).unwrap();
    chown(&image, USER);
    let temporary = fs.mount.join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    set_mode(&temporary, 0o1777);
    let uuid = sh(&format!("findmnt -no UUID {}", fs.mount.display()));
    let uuid = uuid.trim().replace('-', "");
    let state = state_of(&fs.pool());
    // The other user has made the folder, with a link where the lock is to be.
    let locks = temporary.join(format!("vmfold-{USER}"));
    std::fs::create_dir(&locks).unwrap();
    set_mode(&locks, 0o777);
    symlink(&image, locks.join(&uuid)).unwrap();
    chown(&locks, OTHER);
    for verb in [&["reclaim", "--dry-run"][..], &["report"]] {
        let output = as_user(&fs, &binary, &temporary, verb);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(text(&output).contains("you alone"), "{}", text(&output));
    }
    // Or a link to a folder of the victim's in its place.
    std::fs::remove_dir_all(&locks).unwrap();
    let own = fs.mount.join("own");
    std::fs::create_dir(&own).unwrap();
    set_mode(&own, 0o700);
    symlink(&image, own.join(&uuid)).unwrap();
    chown(&own, USER);
    symlink(&own, &locks).unwrap();
    chown(&locks, OTHER);
    let output = as_user(&fs, &binary, &temporary, &["report"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    // Even in a folder of one's own, a link is none.
    std::fs::remove_file(&locks).unwrap();
    std::fs::rename(&own, &locks).unwrap();
    let output = as_user(&fs, &binary, &temporary, &["report"]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    std::fs::remove_file(locks.join(&uuid)).unwrap();
    let output = as_user(&fs, &binary, &temporary, &["report"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(state_of(&fs.pool()), state);
}

#[test]
fn images_that_cannot_be_opened_are_left_alone_by_name() {
    if !can_mount() {
        return;
    }
    let (fs, binary) = xfs_of_user();
    let content = Random(2).data(4 << 20);
    for (name, user, mode) in [
        ("a.img", USER, 0o600),
        ("b.img", USER, 0o600),
        ("mine-without-rights.img", USER, 0o000),
        ("theirs.img", OTHER, 0o600),
        ("theirs-readable.img", OTHER, 0o644),
    ] {
        let path = fs.pool().join(name);
        std::fs::write(&path, &content).unwrap();
        set_mode(&path, mode);
        chown(&path, user);
    }
    sh(&format!("sync -f {}", fs.mount.display()));
    let state = state_of(&fs.pool());
    let temporary = fs.mount.join("tmp");
    std::fs::create_dir(&temporary).unwrap();
    set_mode(&temporary, 0o1777);
    let left = |output: &Output| -> Vec<String> {
        assert_eq!(output.status.code(), Some(3), "{}", text(output));
        let done = json(output);
        let names = done["skipped"].as_array().unwrap().iter().map(|one| {
            assert_eq!(one["reason"], "unreadable", "{one}");
            assert!(!one["detail"].is_null(), "{one}");
            Path::new(one["path"].as_str().unwrap())
                .file_name()
                .unwrap()
                .to_str()
                .unwrap()
                .to_owned()
        });
        names.collect()
    };
    let report = as_user(&fs, &binary, &temporary, &["--json", "report"]);
    assert_eq!(left(&report), ["mine-without-rights.img", "theirs.img"]);
    assert_eq!(json(&report)["images"].as_array().unwrap().len(), 3);
    let scan = as_user(&fs, &binary, &temporary, &["--json", "scan"]);
    assert_eq!(left(&scan), ["mine-without-rights.img", "theirs.img"]);
    // Who may read an image may still not share its extents.
    let reclaim = as_user(&fs, &binary, &temporary, &["--json", "reclaim"]);
    assert_eq!(
        left(&reclaim),
        ["mine-without-rights.img", "theirs-readable.img", "theirs.img"]
    );
    assert_eq!(state_of(&fs.pool()), state);
    assert_eq!(
        json(&as_user(&fs, &binary, &temporary, &["--json", "report"]))["pool"]["physical_bytes"],
        8 << 20
    );
}

/// Swaps what two names stand for, over and over, until `work` is done.
fn while_swapping<T>(one: &Path, other: &Path, work: impl FnOnce() -> T) -> T {
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    let ends = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = Ends(&ends);
        scope.spawn(|| {
            while !ends.load(Ordering::Acquire) {
                let swapped = rustix::fs::renameat_with(
                    rustix::fs::CWD,
                    one,
                    rustix::fs::CWD,
                    other,
                    rustix::fs::RenameFlags::EXCHANGE,
                );
                swapped.unwrap();
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        work()
    })
}

/// Hashes of all blocks of a file that are not zeros.
fn blocks_of(path: &Path) -> HashSet<[u8; 32]> {
    let content = std::fs::read(path).unwrap();
    let blocks = content.chunks(4096).filter(|block| block.iter().any(|byte| *byte != 0));
    blocks.map(|block| *blake3::hash(block).as_bytes()).collect()
}

#[test]
fn a_folder_swapped_for_a_link_gives_nothing_away() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let (pool, secrets) = (fs.pool(), fs.mount.join("secrets"));
    for folder in [pool.join("theirs"), pool.join("inner"), secrets.clone()] {
        std::fs::create_dir_all(folder).unwrap();
    }
    let (open, secret) = (Random(3).data(1 << 20), Random(4).data(1 << 20));
    std::fs::write(pool.join("theirs/a.img"), &open).unwrap();
    std::fs::write(pool.join("mine.img"), Random(5).data(1 << 20)).unwrap();
    std::fs::write(secrets.join("a.img"), &secret).unwrap();
    set_mode(&secrets.join("a.img"), 0o600);
    symlink(&secrets, pool.join("link")).unwrap();
    std::fs::create_dir(fs.mount.join("archives")).unwrap();
    let mut exported = 0;
    while_swapping(&pool.join("theirs"), &pool.join("link"), || {
        for round in 0..60 {
            let archive = fs.mount.join(format!("archives/{round}"));
            let output = fs
                .command()
                .args(["export", "--index"])
                .arg(fs.index())
                .arg(&archive)
                .arg(&pool)
                .output()
                .unwrap();
            // It may tell that things moved; what it says it did, must be so.
            if output.status.code() == Some(0) {
                exported += 1;
            }
        }
    });
    assert!(exported > 0, "no export ever succeeded");
    for archive in std::fs::read_dir(fs.mount.join("archives")).unwrap() {
        let archive = archive.unwrap().path();
        if std::fs::metadata(&archive).unwrap().len() == 0 {
            continue;
        }
        let to = fs.mount.join("restored");
        let output = fs
            .command()
            .args(["import", "--index", "/nonexistent"])
            .arg(&archive)
            .arg("--to")
            .arg(&to)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output));
        for entry in walkdir::WalkDir::new(&to) {
            let entry = entry.unwrap();
            if entry.file_type().is_file() {
                assert!(
                    std::fs::read(entry.path()).unwrap() != secret,
                    "{} has what lay behind the link",
                    archive.display()
                );
            }
        }
        std::fs::remove_dir_all(&to).unwrap();
    }
}

#[test]
fn donors_stay_on_the_filesystem_of_the_images() {
    const ROUNDS: u64 = 16;
    if !can_mount() {
        return;
    }
    let (fs, others) = (Mounted::btrfs(), Mounted::btrfs());
    let pool = fs.pool();
    // Donors are made in the folder of the first image.
    let (theirs, link) = (pool.join("a-theirs"), fs.mount.join("link"));
    std::fs::create_dir(&theirs).unwrap();
    symlink(others.pool(), &link).unwrap();
    std::fs::write(theirs.join("a.img"), Random(9).data(1 << 20)).unwrap();
    let common = Random(10).data(2 << 20);
    std::fs::write(pool.join("first.img"), &common).unwrap();
    let mut rewritten = 0;
    while_swapping(&theirs, &link, || {
        for round in 0..ROUNDS {
            // Half of it is known, so that the other half moves to a donor.
            let content = [common.clone(), Random(100 + round).data(2 << 20)].concat();
            std::fs::write(pool.join(format!("image{round}.img")), content).unwrap();
            sh(&format!("sync -f {}", pool.display()));
            let before = state_of(&pool.join("first.img"));
            let output = fs.vmfold("--json reclaim --min-run 4K");
            let done = json(&output);
            assert!(matches!(output.status.code(), Some(0 | 3)), "{done} {}", text(&output));
            rewritten += done["done"]["counts"]["written_bytes"].as_u64().unwrap();
            assert_eq!(state_of(&pool.join("first.img")), before);
        }
    });
    assert!(rewritten > ROUNDS << 20, "{rewritten} bytes were rewritten");
    let mut mine = HashSet::new();
    for round in 0..ROUNDS {
        mine.extend(blocks_of(&pool.join(format!("image{round}.img"))));
    }
    common::unmount(&others.mount);
    let found = blocks_of(&others.device());
    assert_eq!(
        found.intersection(&mine).count(),
        0,
        "blocks of images lie on the other filesystem"
    );
}

#[test]
fn a_run_that_has_to_wait_disturbs_no_other() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let image = fs.pool().join("a.img");
    std::fs::write(&image, Random(6).data(1 << 20)).unwrap();
    // What another run has: the lock of the filesystem, and leases on images.
    assert!(fs.vmfold("report").status.success());
    let uuid = sh(&format!("findmnt -no UUID {}", fs.mount.display()));
    let lock = Path::new("/run/vmfold").join(uuid.trim().replace('-', ""));
    let lock = std::fs::File::options().read(true).write(true).open(lock).unwrap();
    lock.lock().unwrap();
    let leased = std::fs::File::open(&image).unwrap();
    lease::take(&leased, Lease::All).unwrap();
    for verb in ["reclaim", "reclaim --dry-run", "report", "scan"] {
        let output = fs
            .command()
            .args(verb.split(' '))
            .arg("--index")
            .arg(fs.index())
            .arg(&image)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{verb}: {}", text(&output));
        assert!(text(&output).contains("another vmfold"), "{verb}: {}", text(&output));
        assert!(lease::is_held(&leased, Lease::All), "{verb} broke the lease");
    }
}

#[test]
fn a_machine_that_keeps_a_template_out_is_named() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let pool = fs.pool();
    for folder in ["vm-templates/t", "appvms/work", "standalones"] {
        std::fs::create_dir_all(pool.join(folder)).unwrap();
    }
    let content = Random(7).data(4 << 20);
    std::fs::write(pool.join("vm-templates/t/root.img"), &content).unwrap();
    std::fs::hard_link(pool.join("vm-templates/t/root.img"), pool.join("appvms/work/root.img")).unwrap();
    std::fs::write(pool.join("appvms/work/private.img"), &content).unwrap();
    std::fs::write(pool.join("appvms/work/private-dirty.img"), Random(8).data(1 << 20)).unwrap();
    reflink(&pool.join("vm-templates/t/root.img"), &pool.join("standalones/s.img"));
    reflink(&pool.join("appvms/work/private.img"), &pool.join("standalones/t.img"));
    sh(&format!("sync -f {}", pool.display()));
    let output = fs.vmfold("--json reclaim");
    assert_eq!(output.status.code(), Some(3));
    let done = json(&output);
    let template = done["skipped"].as_array().unwrap().iter().find(|one| {
        let path = one["path"].as_str().unwrap();
        path.ends_with("root.img")
    });
    let detail = template.unwrap()["detail"].as_str().unwrap();
    assert!(
        detail.contains("private-dirty.img") || detail.starts_with("work: "),
        "{done}"
    );
    // What it holds is not called something outside of the pool.
    let held = done["held_by"].as_object().unwrap();
    let by_template = held.keys().find(|name| name.contains("root.img"));
    assert!(by_template.is_some_and(|name| name.ends_with("(left alone)")), "{done}");
    assert!(held.keys().all(|name| Path::new(name).starts_with(&fs.mount)), "{done}");
}

/// The paths of everything in a folder.
fn all_in(folder: &Path) -> Vec<PathBuf> {
    let entries = walkdir::WalkDir::new(folder).min_depth(1).into_iter();
    entries.map(|entry| entry.unwrap().into_path()).collect()
}

/// A folder of another user's beside a folder of root's that the other user leads to, and a backup of one image.
fn folders_of_two() -> (tempfile::TempDir, PathBuf, PathBuf, PathBuf) {
    let root = tempfile::tempdir().unwrap();
    set_mode(root.path(), 0o755);
    let path = |name: &str| root.path().join(name);
    for folder in ["theirs", "victim", "backup"] {
        std::fs::create_dir(path(folder)).unwrap();
    }
    chown(&path("theirs"), OTHER);
    std::fs::write(path("backup/x.img"), Random(7).data(4095)).unwrap();
    let (backup, folder) = (path("backup.tar"), path("backup"));
    sh(&format!("tar -cf {} -C {} x.img", backup.display(), folder.display()));
    let (theirs, victim) = (path("theirs"), path("victim"));
    (root, theirs, victim, backup)
}

fn vmfold(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .args(arguments)
        .output()
        .unwrap()
}

#[test]
fn what_root_writes_goes_through_no_link_of_another_user() {
    if !can_mount() {
        return;
    }
    let (root, theirs, victim, backup) = folders_of_two();
    let link = theirs.join("link");
    symlink(&victim, &link).unwrap();
    chown(&link, OTHER);
    let (backup, image) = (backup.to_str().unwrap(), root.path().join("backup/x.img"));
    let below = |name: &str| link.join(name).to_str().unwrap().to_owned();
    let (here, sub, index, log) = (below(""), below("sub"), below("index"), below("log"));
    let own_index = root.path().join("index").to_str().unwrap().to_owned();
    for arguments in [
        &["import", backup, "--to", here.trim_end_matches('/')][..],
        &["import", backup, "--to", &here],
        &["import", backup, "--to", &sub],
        &["import", backup, "--to", &sub, "--dry-run"],
        &[
            "export",
            &below("a.vmfold"),
            image.to_str().unwrap(),
            "--index",
            &own_index,
        ],
        &["list", backup, "--log-file", &log],
        &["man", &sub],
        &["man", &here],
    ] {
        let output = vmfold(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", text(&output));
        let problem = format!("`{}` belongs to another user (uid {OTHER})", link.display());
        assert!(text(&output).contains(&problem), "{arguments:?}: {}", text(&output));
    }
    let output = vmfold(&["scan", "--index", &index, image.to_str().unwrap()]);
    assert_ne!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(all_in(&victim), Vec::<PathBuf>::new());
    // A folder of theirs serves, if root names it, and so does a link of root's own.
    let own = root.path().join("own");
    symlink(theirs.join("restored"), &own).unwrap();
    std::fs::create_dir(theirs.join("restored")).unwrap();
    let output = vmfold(&["import", backup, "--to", own.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(theirs.join("restored/x.img").exists());
}

#[test]
fn a_link_that_comes_and_goes_is_never_followed() {
    if !can_mount() {
        return;
    }
    let (_root, theirs, victim, backup) = folders_of_two();
    let racing = format!(
        "cd {} && while :; do ln -s {} new; rm -rf new; done",
        theirs.display(),
        victim.display()
    );
    let mut other = Command::new("setpriv")
        .args([
            &format!("--reuid={OTHER}"),
            &format!("--regid={OTHER}"),
            "--clear-groups",
        ])
        .args(["sh", "-c", &racing])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let (new, sub) = (theirs.join("new"), theirs.join("new/sub"));
    let mut ends = HashSet::new();
    for round in 0..60 {
        let to = if round % 2 == 0 { &new } else { &sub };
        let output = vmfold(&["import", backup.to_str().unwrap(), "--to", to.to_str().unwrap()]);
        ends.insert(output.status.code());
        let _ = std::fs::remove_dir_all(&new);
    }
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(all_in(&victim), Vec::<PathBuf>::new(), "{ends:?}");
    assert!(ends.contains(&Some(1)), "the link was there at times: {ends:?}");
}
