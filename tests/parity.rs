//! Goal: a repair in place that is killed at any moment, or a disk that is full, costs nothing. Method: the program is killed at random moments while it
//! repairs an archive in place, and run again; files may not get longer than a limit.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const VMFOLD: &str = env!("CARGO_BIN_EXE_vmfold");

fn vmfold(arguments: &[&str]) -> Output {
    Command::new(VMFOLD).args(arguments).output().unwrap()
}

/// Bytes that repeat nowhere.
fn noise(length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    bytes
}

/// An archive with parity in a folder, and its bytes.
fn archive(folder: &Path, mib: usize) -> Vec<u8> {
    std::fs::create_dir(folder.join("pool")).unwrap();
    std::fs::write(folder.join("pool/a.img"), noise(mib << 20)).unwrap();
    let (index, pool) = (folder.join("index"), folder.join("pool"));
    let path = folder.join("a.vmfold");
    let names = [&path, &index, &pool].map(|path| path.to_str().unwrap().to_owned());
    let output = vmfold(&["export", &names[0], "--parity", "10", "--index", &names[1], &names[2]]);
    assert!(output.status.success(), "{output:?}");
    std::fs::remove_dir_all(pool).unwrap();
    std::fs::read(path).unwrap()
}

fn damage(bytes: &[u8]) -> Vec<u8> {
    let mut bad = bytes.to_vec();
    for at in (5000..bytes.len() - 5000).step_by(200_000) {
        bad[at..at + 300].fill(0x11);
    }
    bad.truncate(bytes.len() - 50);
    bad
}

#[test]
fn a_repair_in_place_may_be_killed_at_any_moment() {
    let folder = tempfile::tempdir().unwrap();
    let was = archive(folder.path(), 12);
    let path = folder.path().join("a.vmfold");
    let arguments = ["repair", "--in-place", path.to_str().unwrap()];
    let bad = damage(&was);
    std::fs::write(&path, &bad).unwrap();
    let start = Instant::now();
    assert!(vmfold(&arguments).status.success());
    let whole = start.elapsed();
    assert!(std::fs::read(&path).unwrap() == was);
    for number in 0..30u32 {
        std::fs::write(&path, &bad).unwrap();
        let mut child = Command::new(VMFOLD).args(arguments).spawn().unwrap();
        // Late moments are those at which anything is written.
        std::thread::sleep(
            whole.mul_f64(0.5 + f64::from(number) / 50.0) + Duration::from_micros(u64::from(number) * 37),
        );
        child.kill().unwrap();
        child.wait().unwrap();
        let output = vmfold(&arguments);
        assert!(output.status.success(), "{number}: {output:?}");
        assert!(std::fs::read(&path).unwrap() == was, "{number}");
        let names: Vec<_> = std::fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert!(
            names.iter().all(|name| !name.to_string_lossy().contains("repair")),
            "{names:?}"
        );
    }
}

#[test]
fn a_disk_that_is_full_costs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let was = archive(folder.path(), 3);
    let path = folder.path().join("a.vmfold");
    let bad = damage(&was);
    std::fs::write(&path, &bad).unwrap();
    let copy = folder.path().join("copy");
    let limited = |kib: u32, arguments: &str| {
        let command = format!("ulimit -f {kib}; exec \"{VMFOLD}\" {arguments}");
        Command::new("bash").args(["-c", &command]).output().unwrap()
    };
    let to = format!("repair {} --to {}", path.display(), copy.display());
    let in_place = format!("repair {} --in-place", path.display());
    for kib in [0, 4, 40, 1000] {
        let output = limited(kib, &to);
        assert_eq!(output.status.code(), Some(1), "{kib}: {output:?}");
        assert!(!copy.exists());
    }
    for kib in [0, 4, 40] {
        let output = limited(kib, &in_place);
        assert_eq!(output.status.code(), Some(1), "{kib}: {output:?}");
        assert!(std::fs::read(&path).unwrap() == bad, "{kib}");
    }
    assert!(
        vmfold(&["repair", path.to_str().unwrap(), "--in-place"])
            .status
            .success()
    );
    assert!(std::fs::read(&path).unwrap() == was);
}
