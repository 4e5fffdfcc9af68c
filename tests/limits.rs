//! Goal: where a limit of the user, the process or the disk is met, a run ends with a message that names the way out, nothing that was
//! there is changed, and the next run goes on. Method: `RLIMIT_FSIZE`, quotas and full disks on a real btrfs.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Mounted, Random, build_pool, can_mount, sh, state_of};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs vmfold after a command of the shell.
fn after(shell: &str, fs: &Mounted, arguments: &str) -> Output {
    Command::new("bash")
        .args([
            "-c",
            &format!(
                "{shell}; cd {}; exec {} {arguments} --index {}",
                fs.mount.display(),
                env!("CARGO_BIN_EXE_vmfold"),
                fs.index().display()
            ),
        ])
        .output()
        .unwrap()
}

/// The state of what is below a folder, but for what an interrupted import keeps to go on with.
fn images(folder: &Path) -> BTreeMap<PathBuf, String> {
    let is_kept = |path: &Path| path.to_string_lossy().contains("/.vmfold-import");
    let all = state_of(folder).into_iter();
    all.filter(|(path, _)| !is_kept(path)).collect()
}

#[test]
fn an_import_that_meets_a_limit_changes_nothing_and_is_gone_on_with() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let mut random = Random(9);
    for n in 0..4 {
        std::fs::write(fs.pool().join(format!("{n}.img")), random.data(2 << 20)).unwrap();
    }
    let exported = after("true", &fs, "export a.vmfold pool");
    assert!(exported.status.success(), "{}", text(&exported));
    let wanted = sh(&format!("cd {}; sha256sum *", fs.pool().display()));
    // Each is there in another state, and stays in it if not all can be replaced.
    let to = fs.mount.join("to");
    let mount = fs.mount.display();
    sh(&format!(
        "btrfs subvolume create {}; btrfs quota enable {mount}; btrfs quota rescan -w {mount}",
        to.display()
    ));
    for n in 0..4 {
        std::fs::write(to.join(format!("{n}.img")), random.data(1 << 20)).unwrap();
    }
    sh(&format!("sync -f {mount}"));
    let state = images(&to);
    let full = format!(
        "avail=$(df --output=avail -B1M {mount} | tail -1); fallocate -l $((avail - 3))M {mount}/filler; sync -f {mount}"
    );
    let limits = [
        ("ulimit -f 1024".to_owned(), "ulimit -f", "true".to_owned()),
        (
            format!("btrfs qgroup limit 6M {}", to.display()),
            "quota",
            format!("btrfs qgroup limit none {}", to.display()),
        ),
        (full, "free some space", format!("rm {mount}/filler; sync -f {mount}")),
    ];
    for (limit, hint, lift) in limits {
        let failed = after(&limit, &fs, "import a.vmfold --to to --replace --resume");
        assert_eq!(
            failed.status.code(),
            Some(1),
            "{limit}: {:?} {}",
            failed.status,
            text(&failed)
        );
        assert!(text(&failed).contains(hint), "{limit}: {}", text(&failed));
        assert_eq!(images(&to), state, "{limit}");
        sh(&lift);
    }
    let done = after("true", &fs, "import a.vmfold --to to --replace --resume");
    assert!(done.status.success(), "{}", text(&done));
    assert_eq!(sh(&format!("cd {}; sha256sum *", to.display())), wanted);
    assert_eq!(sh(&format!("find {} -name '.vmfold*'", to.display())), "");
}

#[test]
fn donors_that_may_not_be_written_are_done_without() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 44);
    let state = state_of(&fs.pool());
    let limited = after("ulimit -f 64", &fs, "reclaim --json --compress zstd pool");
    assert!(
        matches!(limited.status.code(), Some(0 | 1 | 3)),
        "{:?} {}",
        limited.status,
        text(&limited)
    );
    assert_eq!(state_of(&fs.pool()), state);
    let rest = after("true", &fs, "reclaim --json --compress zstd pool");
    assert_eq!(rest.status.code(), Some(0), "{}", text(&rest));
    assert_eq!(state_of(&fs.pool()), state);
    let again: serde_json::Value =
        serde_json::from_slice(&after("true", &fs, "reclaim --json --compress zstd pool").stdout).unwrap();
    assert_eq!(again["planned"]["freed_bytes"], 0, "{again}");
    fs.check();
}
