//! Goal: whoever asks is told each decision about an image, and nobody else is told anything. Method: runs of the binary with and without a log.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::fs::File;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::process::Output;

use common::{Mounted, Random, can_mount, sh};

/// A pool of two equal images and one that is open.
fn pool() -> (Mounted, File) {
    let fs = Mounted::btrfs();
    std::fs::create_dir_all(fs.pool()).unwrap();
    let content = Random(5).data(1 << 20);
    for name in ["a.img", "b.img"] {
        std::fs::write(fs.pool().join(name), &content).unwrap();
    }
    std::fs::write(fs.pool().join("used.img"), Random(6).data(1 << 20)).unwrap();
    sh(&format!("sync -f {}", fs.mount.display()));
    let used = File::open(fs.pool().join("used.img")).unwrap();
    (fs, used)
}

fn run(fs: &Mounted, options: &[&str]) -> Output {
    let mut command = fs.command();
    let _ = command.args(["reclaim", "--dry-run", "--index"]).arg(fs.index());
    command.args(options).arg(fs.pool()).output().unwrap()
}

fn stderr(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn decisions_are_told_to_whoever_asks() {
    if !can_mount() {
        return;
    }
    let (fs, _used) = pool();
    assert_eq!(stderr(&run(&fs, &[])), "");
    let told = stderr(&run(&fs, &["-v"]));
    assert_eq!(told.matches("worked on").count(), 2, "{told}");
    let left_alone = told.lines().find(|line| line.contains("left alone")).unwrap();
    assert!(
        left_alone.contains("used.img") && left_alone.contains("in use"),
        "{told}"
    );
    assert!(told.contains("planned") && !told.contains("DEBUG"), "{told}");
    let output = run(&fs, &["-vv", "--json"]);
    assert!(stderr(&output).contains("extent goes"), "{output:?}");
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["planned"]["extents"], 1);
}

#[test]
fn a_log_file_is_added_to_and_is_its_users_alone() {
    if !can_mount() {
        return;
    }
    let (fs, _used) = pool();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let log = |path: &Path| run(&fs, &["--log-json", "--log-file", path.to_str().unwrap()]);
    assert_eq!(stderr(&log(&path)), "");
    let first = std::fs::read_to_string(&path).unwrap();
    assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    assert_eq!(stderr(&log(&path)), "");
    let both = std::fs::read_to_string(&path).unwrap();
    assert!(both.starts_with(&first) && both.len() > first.len());
    for line in both.lines() {
        let event: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(event["message"].is_string() && event["timestamp"].is_string(), "{line}");
    }
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    let another = folder.path().join("another");
    std::fs::write(&another, "").unwrap();
    std::os::unix::fs::chown(&another, Some(1234), None).unwrap();
    for refused in [&link, &another, &folder.path().to_owned()] {
        let output = log(refused);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(output.stdout.is_empty(), "nothing was begun");
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap(), both);
    assert_eq!(another.metadata().unwrap().len(), 0);
}
