//! Goal: XFS is served as btrfs is: what was predicted is freed, nothing else changes, archives go both ways. Method: a real XFS on
//! a loop device, with and without a reverse map, and the filesystem's own count and check.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Output;
use std::time::Duration;

use common::{Mounted, Random, build_pool, can_mount, reflink, sh, state_of, unmount};
use serde_json::Value;

fn xfs(reverse_map: u8) -> Mounted {
    Mounted::new(&format!("mkfs.xfs -q -m reflink=1,rmapbt={reverse_map}"), "", 2048)
}

/// Bytes in use, metadata included.
fn used(fs: &Mounted) -> u64 {
    let mount = fs.mount.display();
    let text = sh(&format!("sync -f {mount}; df -B1 --output=used {mount}"));
    text.lines().nth(1).unwrap().trim().parse().unwrap()
}

fn freed(done: &Value) -> u64 {
    done["done"]["freed_bytes"].as_u64().unwrap()
}

/// Unmounts and checks that the filesystem is sound.
fn check(fs: &Mounted) {
    unmount(&fs.mount);
    sh(&format!("xfs_repair -n {} 2>&1", fs.device().display()));
}

/// Runs reclaim and checks everything that must hold of it. The filesystem counts metadata too, which takes a little.
fn reclaim_and_check(fs: &Mounted, arguments: &str) -> Value {
    const METADATA: u64 = 2 << 20;
    let (state, before) = (state_of(&fs.pool()), used(fs));
    let predicted = fs.vmfold_json(&format!("reclaim --dry-run {arguments}"))["planned"]["freed_bytes"].clone();
    let done = fs.vmfold_json(&format!("reclaim {arguments}"));
    assert_eq!(state_of(&fs.pool()), state);
    assert_eq!(done["planned"]["freed_bytes"], predicted);
    assert_eq!(done["done"]["freed_bytes"], predicted, "{done}");
    let counted = before.checked_sub(used(fs)).expect("the pool did not grow");
    assert!(
        counted <= freed(&done) && counted + METADATA >= freed(&done),
        "the filesystem counts {counted}: {done}"
    );
    let again = fs.vmfold_json(&format!("reclaim {arguments}"));
    assert_eq!(
        again["planned"]["extents"], 0,
        "a second run has nothing to do: {again}"
    );
    assert_eq!(freed(&again), 0);
    assert_eq!(again["fingerprinted"]["read"], 0, "nothing is read twice: {again}");
    done
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn reclaim_on_xfs() {
    if !can_mount() {
        return;
    }
    for (reverse_map, arguments) in [(0, ""), (1, ""), (1, "--min-run 4K"), (0, "--keep-zeros --min-run 64K")] {
        let fs = xfs(reverse_map);
        build_pool(&fs.pool(), 60 + u64::from(reverse_map));
        let done = reclaim_and_check(&fs, arguments);
        assert!(freed(&done) > 30 << 20, "{done}");
        assert_eq!(
            done["done"]["counts"]["written_bytes"], 0,
            "there are no donors: {done}"
        );
        check(&fs);
    }
}

#[test]
fn only_what_changed_is_read_again() {
    if !can_mount() {
        return;
    }
    let fs = xfs(0);
    build_pool(&fs.pool(), 62);
    let first = fs.vmfold_json("reclaim -n");
    assert!(first["fingerprinted"]["read"].as_u64().unwrap() > 40 << 20, "{first}");
    let second = fs.vmfold_json("reclaim -n");
    assert_eq!(second["fingerprinted"]["read"], 0, "{second}");
    // The home changes; its revisions do not, and what it shares with them is known by them.
    let home = fs.pool().join("appvms/work/private.img");
    let file = std::fs::File::options().write(true).open(&home).unwrap();
    file.write_all_at(&Random(1).data(1 << 20), 5 << 20).unwrap();
    file.sync_all().unwrap();
    drop(file);
    let third = fs.vmfold_json("reclaim -n");
    let (read, size) = (
        third["fingerprinted"]["read"].as_u64().unwrap(),
        home.metadata().unwrap().size(),
    );
    assert!(read >= 1 << 20 && read <= size, "{third}");
    // Parts of the pool one by one, then all: the same in the end.
    let mut part = fs.command();
    let _ = part
        .args(["reclaim", "--index"])
        .arg(fs.index())
        .arg(fs.pool().join("appvms"));
    let output = part.output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    let _ = reclaim_and_check(&fs, "");
}

#[test]
fn what_others_share_stays() {
    if !can_mount() {
        return;
    }
    let content = Random(5).data(8 << 20);
    let build = |reverse_map| {
        let fs = xfs(reverse_map);
        for name in ["a.img", "b.img"] {
            std::fs::write(fs.pool().join(name), &content).unwrap();
        }
        reflink(
            &fs.pool().join("b.img"),
            &fs.pool().join("b.img.1@2026-01-01T00:00:00Z"),
        );
        reflink(&fs.pool().join("b.img"), &fs.mount.join("outside"));
        reflink(&fs.pool().join("a.img"), &fs.mount.join("outside too"));
        sh(&format!("sync -f {}", fs.mount.display()));
        fs
    };
    // With a reverse map it is known who holds what, and nothing is planned that would free nothing.
    let fs = build(1);
    let inode = fs.mount.join("outside").metadata().unwrap().ino();
    let state = state_of(&fs.mount);
    let done = fs.vmfold_json("reclaim");
    assert_eq!(
        (freed(&done), &done["planned"]["freed_bytes"]),
        (0, &Value::from(0)),
        "{done}"
    );
    assert!(
        done["planned"]["pinned"]["held-by-others"].as_u64().unwrap() > 0,
        "{done}"
    );
    assert!(done["held_by"][format!("inode {inode}")].as_u64().is_some(), "{done}");
    assert_eq!(state_of(&fs.mount), state);
    // Without one, or where the kernel does not tell, what is reported as freed is what the filesystem has free.
    for (reverse_map, runner, why) in [
        (0, &["env"][..], "no reverse map"),
        (1, &["setpriv", "--bounding-set=-sys_admin"], "Without the capability"),
    ] {
        let fs = build(reverse_map);
        let (state, before) = (state_of(&fs.mount), used(&fs));
        let mut command = std::process::Command::new(runner[0]);
        command.args(&runner[1..]).arg(env!("CARGO_BIN_EXE_vmfold"));
        command
            .args(["--json", "reclaim", "--index"])
            .arg(fs.index())
            .arg(fs.pool());
        let output = command.output().unwrap();
        assert!(text(&output).contains(why), "{}", text(&output));
        let done: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(
            done["done"]["freed_bytes"].as_i64().unwrap() <= i64::try_from(before.saturating_sub(used(&fs))).unwrap(),
            "{done}"
        );
        assert_eq!(state_of(&fs.mount), state);
        check(&fs);
    }
}

#[test]
fn archives_of_an_xfs() {
    if !can_mount() {
        return;
    }
    let fs = xfs(1);
    build_pool(&fs.pool(), 63);
    let archive = fs.mount.join("a.vmfold");
    let run = |arguments: &[&str]| {
        let output = fs
            .command()
            .args(arguments)
            .arg("--index")
            .arg(fs.index())
            .output()
            .unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        output
    };
    let path = archive.display().to_string();
    let pool = fs.pool().display().to_string();
    let _ = run(&["export", &path, &pool]);
    let stored = archive.metadata().unwrap().size();
    let _ = run(&["export", &path, &pool]);
    let again = archive.metadata().unwrap().size();
    assert!(again - stored < 1 << 20, "nothing is stored twice: {stored}, {again}");
    let verified = fs.command().args(["verify", &path]).output().unwrap();
    assert!(verified.status.success(), "{}", text(&verified));
    let copy = fs.mount.join("copy");
    let restored = run(&[
        "--json",
        "import",
        &path,
        "--to",
        &copy.display().to_string(),
        "--seed",
        &pool,
    ]);
    let restored: Value = serde_json::from_slice(&restored.stdout).unwrap();
    let content = |folder| -> Vec<String> {
        let sums = sh(&format!("cd {folder}; find . -type f -exec sha256sum {{}} + | sort"));
        sums.lines().map(str::to_owned).collect()
    };
    assert_eq!(content(copy.display().to_string()), content(pool));
    assert_eq!(
        restored["written_bytes"].as_u64().unwrap_or(0),
        0,
        "all of it is here: {restored}"
    );
    check(&fs);
}

#[test]
fn images_in_use_and_kills() {
    if !can_mount() {
        return;
    }
    let fs = xfs(1);
    build_pool(&fs.pool(), 64);
    let state = state_of(&fs.pool());
    let open = std::fs::File::options()
        .write(true)
        .open(fs.pool().join("standalones/restored.img"))
        .unwrap();
    let done = fs.vmfold_json("reclaim -n");
    assert_eq!(done["skipped"][0]["reason"], "in-use", "{done}");
    drop(open);
    let mut random = Random(64);
    for _ in 0..20 {
        let mut child = fs
            .command()
            .args(["reclaim", "--min-run", "4K", "--index"])
            .arg(fs.index())
            .arg(fs.pool())
            .stderr(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(random.below(400)));
        child.kill().unwrap();
        let _ = child.wait().unwrap();
        assert_eq!(state_of(&fs.pool()), state);
    }
    let output = fs.vmfold("reclaim --min-run 4K");
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(state_of(&fs.pool()), state);
    assert_eq!(fs.vmfold_json("reclaim -n --min-run 4K")["planned"]["extents"], 0);
    check(&fs);
}

/// A user who owns the images needs no root.
#[test]
fn without_root() {
    if !can_mount() {
        return;
    }
    let fs = xfs(1);
    build_pool(&fs.pool(), 65);
    let (folder, index) = (fs.mount.parent().unwrap(), fs.mount.join("index"));
    std::fs::create_dir(&index).unwrap();
    sh(&format!(
        "chown -R 12345:12345 {} {}; chmod 755 {}",
        fs.pool().display(),
        index.display(),
        folder.display()
    ));
    let state = state_of(&fs.pool());
    // The binary may lie where only root looks.
    let binary = fs.mount.join("vmfold");
    std::fs::copy(env!("CARGO_BIN_EXE_vmfold"), &binary).unwrap();
    let output = std::process::Command::new("setpriv")
        .args(["--reuid=12345", "--regid=12345", "--clear-groups"])
        .arg(&binary)
        .args(["--json", "reclaim", "--index"])
        .arg(&index)
        .arg(fs.pool())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert!(text(&output).contains("Without the capability"), "{}", text(&output));
    let done: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(freed(&done) > 30 << 20, "{done}");
    assert_eq!(done["done"]["freed_bytes"], done["planned"]["freed_bytes"]);
    assert_eq!(state_of(&fs.pool()), state);
    check(&fs);
}

/// Images that the index knows serve as seeds, as on btrfs, whether or not the filesystem can tell who holds a block.
#[test]
fn images_that_are_here_are_shared_with_what_is_imported() {
    if !can_mount() {
        return;
    }
    for reverse_map in [0, 1] {
        let fs = xfs(reverse_map);
        let (held, image) = (fs.pool().join("held.img"), fs.pool().join("deep/in/other.img"));
        let mut random = Random(11);
        let content = random.data(24 << 20);
        std::fs::create_dir_all(image.parent().unwrap()).unwrap();
        std::fs::write(&held, &content[..16 << 20]).unwrap();
        std::fs::write(&image, &content).unwrap();
        let archive = fs.device().with_file_name("a.vmfold");
        let run = |arguments: &[&str]| {
            let mut command = fs.command();
            let output = command
                .arg("--json")
                .args(arguments)
                .arg("--index")
                .arg(fs.index())
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            serde_json::from_slice::<Value>(&output.stdout).unwrap()
        };
        let (archive, pool) = (archive.to_str().unwrap(), fs.pool());
        run(&["export", archive, image.to_str().unwrap()]);
        std::fs::remove_file(&image).unwrap();
        run(&["scan", pool.to_str().unwrap()]);
        let (to, before) = (fs.mount.join("to"), used(&fs));
        let done = run(&["import", archive, "--to", to.to_str().unwrap()]);
        let number = |key: &str| done["done"][key].as_u64().unwrap();
        assert!(std::fs::read(to.join("other.img")).unwrap() == content);
        // Found by whole chunks, which are not cut alike everywhere.
        assert!(number("seeded_bytes") > (16 << 20) * 9 / 10, "{done}");
        assert!(
            used(&fs) - before < 11 << 20,
            "{} more in use: {done}",
            used(&fs) - before
        );
        check(&fs);
    }
}
