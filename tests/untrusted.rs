//! Goal: archives give nobody more than there was before, exports give nothing to other users, and what could not be said or read is
//! never passed off as done. Method: real filesystems, a second user, pipes, full devices, closed descriptors.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags};

use common::{Mounted, Random, can_mount, sh};

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/archive-v1.vmfold");
const USER: u32 = 12345;

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs vmfold with an index beside the filesystem.
fn vmfold(fs: &Mounted, arguments: &[&str]) -> Output {
    let mut command = fs.command();
    command.args(arguments);
    if matches!(arguments.first(), Some(&("export" | "import"))) {
        command.arg("--index").arg(fs.index());
    }
    command.output().unwrap()
}

fn done(output: &Output) {
    assert_eq!(output.status.code(), Some(0), "{}", text(output));
}

fn as_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Waits for a process that has to end soon: it ends by itself, or the test fails.
fn ended(mut child: Child) -> Option<i32> {
    const SOON: Duration = Duration::from_secs(30);
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status.code();
        }
        if begun.elapsed() > SOON {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// `user::rw-,user:2000:rw-,group::r--,mask::rw-,other::---`, as the kernel has it in an attribute.
const LIST: &str = "0x0200000001000600ffffffff02000600d007000004000400ffffffff10000600ffffffff20000000ffffffff";

fn attribute(path: &Path, name: &str) -> Option<String> {
    let output = Command::new("getfattr")
        .args(["--absolute-names", "--only-values", "-e", "hex", "-n", name])
        .arg(path)
        .output()
        .unwrap();
    output.status.success().then(|| {
        output
            .stdout
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    })
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().mode() & 0o7777
}

fn has_nodatacow(path: &Path) -> bool {
    sh(&format!("lsattr -d '{}'", path.display()))
        .split(' ')
        .next()
        .unwrap()
        .contains('C')
}

#[test]
fn an_archive_gives_no_privileges_and_takes_no_access_list_away() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let pool = fs.pool();
    let folder = pool.join("machine");
    std::fs::create_dir(&folder).unwrap();
    let (tool, listed, plain) = (
        folder.join("tool.img"),
        folder.join("listed.img"),
        folder.join("plain.img"),
    );
    let contents: BTreeMap<&PathBuf, Vec<u8>> = [&tool, &listed, &plain]
        .into_iter()
        .zip(1..)
        .map(|(path, seed)| (path, Random(seed).data(300_000)))
        .collect();
    sh(&format!("touch '{0}'; chattr +C '{0}'", plain.display()));
    for (path, content) in &contents {
        std::fs::write(path, content).unwrap();
    }
    assert!(has_nodatacow(&plain));
    sh(&format!(
        "chown 2000:2000 '{tool}' '{listed}'; chmod 6755 '{tool}'; chmod 2770 '{folder}'
        setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 '{tool}'
        setfattr -n user.note -v kept '{tool}'; setfattr -n trusted.note -v secret '{tool}'
        setfattr -n system.posix_acl_access -v {LIST} '{listed}'
        setfattr -n system.posix_acl_default -v {LIST} '{folder}'",
        tool = tool.display(),
        listed = listed.display(),
        folder = folder.display()
    ));
    assert_eq!(mode(&listed), 0o660, "the mask is where the group was");
    done(&vmfold(&fs, &["export", "a.vmfold", as_str(&pool)]));

    let restored = |to: &Path, arguments: &[&str]| {
        let output = vmfold(&fs, &[&["import", "a.vmfold", "--to", as_str(to)], arguments].concat());
        done(&output);
        for (path, content) in &contents {
            let path = to.join(path.strip_prefix(&pool).unwrap());
            assert!(std::fs::read(&path).unwrap() == *content, "{}", path.display());
        }
        text(&output)
    };
    let to = fs.mount.join("to");
    let said = restored(&to, &[]);
    let at = |name: &str| to.join("machine").join(name);
    assert_eq!((mode(&at("tool.img")), mode(&to.join("machine"))), (0o755, 0o770));
    assert_eq!(attribute(&at("tool.img"), "user.note").as_deref(), Some("6b657074"));
    for name in ["security.capability", "trusted.note"] {
        assert_eq!(attribute(&at("tool.img"), name), None);
        assert!(said.contains(name), "{said}");
    }
    assert!(
        said.contains("mode bits 6000") && said.contains("--preserve-special"),
        "{said}"
    );
    assert_eq!(mode(&at("listed.img")), 0o660);
    assert_eq!(
        attribute(&at("listed.img"), "system.posix_acl_access").as_deref(),
        Some(&LIST[2..])
    );
    assert_eq!(
        attribute(&to.join("machine"), "system.posix_acl_default").as_deref(),
        Some(&LIST[2..])
    );
    assert_eq!(attribute(&at("plain.img"), "system.posix_acl_access"), None);
    assert!(has_nodatacow(&at("plain.img")) && !has_nodatacow(&at("tool.img")));
    // From a pipe it is the same.
    let piped = fs.mount.join("piped");
    let mut command = fs.command();
    command
        .args(["import", "-", "--to", as_str(&piped), "--index"])
        .arg(fs.index());
    command.stdin(std::fs::File::open(fs.mount.join("a.vmfold")).unwrap());
    done(&command.output().unwrap());
    // It has the archive open.
    drop(command);
    assert_eq!(mode(&piped.join("machine/tool.img")), 0o755);
    assert!(has_nodatacow(&piped.join("machine/plain.img")));

    let special = fs.mount.join("special");
    restored(&special, &["--preserve-special"]);
    let at = |name: &str| special.join("machine").join(name);
    assert_eq!(
        (mode(&at("tool.img")), mode(&special.join("machine"))),
        (0o6755, 0o2770)
    );
    assert!(attribute(&at("tool.img"), "security.capability").is_some());
    assert!(attribute(&at("tool.img"), "trusted.note").is_some());

    // A list that the folder has for what is made there does not add to what the archive says.
    let inheriting = fs.mount.join("inheriting");
    sh(&format!(
        "mkdir '{0}'; setfattr -n system.posix_acl_default -v {LIST} '{0}'",
        inheriting.display()
    ));
    restored(&inheriting, &[]);
    assert_eq!(
        attribute(&inheriting.join("machine/plain.img"), "system.posix_acl_access"),
        None
    );
    fs.check();
}

/// Images without copy on write share their blocks with each other when they come back.
#[test]
fn images_without_checksums_come_back_shared() {
    if !can_mount() {
        return;
    }
    let (fs, target) = (Mounted::btrfs(), Mounted::btrfs());
    let image = fs.pool().join("a.img");
    sh(&format!("touch '{0}'; chattr +C '{0}'", image.display()));
    std::fs::write(&image, Random(8).data(32 << 20)).unwrap();
    for n in 1..5 {
        let revision = fs.pool().join(format!("a.img.{n}@2026-01-01T00:00:00Z"));
        sh(&format!(
            "touch '{0}'; chattr +C '{0}'; cp --reflink=always '{1}' '{0}'",
            revision.display(),
            image.display()
        ));
    }
    // One with checksums has the same blocks.
    std::fs::copy(&image, fs.pool().join("b.img")).unwrap();
    done(&vmfold(&fs, &["export", "a.vmfold", as_str(&fs.pool())]));
    let (to, before) = (target.mount.join("to"), target.used());
    done(&vmfold(&fs, &["import", "a.vmfold", "--to", as_str(&to)]));
    let mut count = 0;
    for entry in std::fs::read_dir(fs.pool()).unwrap().flatten() {
        let path = to.join(entry.file_name());
        assert!(std::fs::read(&path).unwrap() == std::fs::read(entry.path()).unwrap());
        assert_eq!(has_nodatacow(&path), has_nodatacow(&entry.path()), "{}", path.display());
        count += 1;
    }
    assert_eq!(count, 6);
    let grown = target.used() - before;
    assert!(
        grown < 66 << 20,
        "{grown} bytes for 32 MiB with checksums and 32 without"
    );
    target.check();
}

/// Where there are no access lists, the group gets what the list gave it, not what the mask let others have.
#[test]
fn without_access_lists_modes_are_narrowed() {
    if !can_mount() {
        return;
    }
    let (fs, other) = (Mounted::btrfs(), Mounted::new("mkfs.btrfs -q", ",noacl", 512));
    let image = fs.pool().join("a.img");
    std::fs::write(&image, Random(3).data(100_000)).unwrap();
    sh(&format!(
        "chown 0:2000 '{0}'; setfattr -n system.posix_acl_access -v {LIST} '{0}'",
        image.display()
    ));
    assert_eq!(mode(&image), 0o660);
    done(&vmfold(&fs, &["export", "a.vmfold", as_str(&fs.pool())]));
    let to = other.mount.join("to");
    let output = vmfold(&fs, &["import", "a.vmfold", "--to", as_str(&to)]);
    done(&output);
    assert_eq!(mode(&to.join("a.img")), 0o640);
    assert!(text(&output).contains("posix_acl_access"), "{}", text(&output));
}

/// Has the other thread end, also where the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The owner of a folder in the pool puts a link to another's images in its place, again and again, while root exports.
#[test]
fn an_export_takes_owner_and_content_from_one_file() {
    const ROUNDS: u32 = 25;
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let (own, secret) = (fs.pool().join("user"), fs.mount.join("secret"));
    std::fs::create_dir_all(own.join("x")).unwrap();
    std::fs::create_dir(&secret).unwrap();
    let (mine, others) = (Random(4).data(64 << 10), Random(5).data(64 << 10));
    std::fs::write(own.join("x/a.img"), &mine).unwrap();
    std::fs::write(secret.join("a.img"), &others).unwrap();
    sh(&format!(
        "chown -R {USER}:{USER} '{0}'; chmod 600 '{1}/a.img'; chmod 700 '{1}'",
        own.display(),
        secret.display()
    ));
    symlink(&secret, own.join("link")).unwrap();
    lchown(own.join("link"), Some(USER), Some(USER)).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random(7);
            let (one, other) = (own.join("x"), own.join("link"));
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &one, CWD, &other, RenameFlags::EXCHANGE).unwrap();
                std::thread::sleep(Duration::from_micros(random.below(3000)));
            }
        });
        let _stop = Stop(&stop);
        for round in 0..ROUNDS {
            let (archive, to) = (fs.mount.join("a.vmfold"), fs.mount.join(format!("to{round}")));
            let output = vmfold(&fs, &["export", as_str(&archive), as_str(&fs.pool())]);
            let code = output.status.code();
            assert!(matches!(code, Some(0..=3)), "{code:?}: {}", text(&output));
            if !archive.exists()
                || !vmfold(&fs, &["import", as_str(&archive), "--to", as_str(&to)])
                    .status
                    .success()
            {
                continue;
            }
            for entry in walkdir::WalkDir::new(to.join("user"))
                .min_depth(1)
                .into_iter()
                .flatten()
            {
                let metadata = entry.metadata().unwrap();
                assert_eq!(metadata.uid(), USER, "{}", entry.path().display());
                if metadata.is_file() {
                    assert!(
                        std::fs::read(entry.path()).unwrap() == mine,
                        "{}",
                        entry.path().display()
                    );
                }
            }
            std::fs::remove_file(&archive).unwrap();
        }
    });
}

/// An archive is for who writes it: another user's file or link under its name would have them read along.
#[test]
fn an_archive_that_another_user_put_there_is_not_written_to() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    std::fs::write(fs.pool().join("a.img"), Random(6).data(100_000)).unwrap();
    let folder = fs.mount.join("theirs");
    std::fs::create_dir(&folder).unwrap();
    let export = |name: &str| vmfold(&fs, &["export", as_str(&folder.join(name)), as_str(&fs.pool())]);
    std::fs::write(folder.join("empty"), "").unwrap();
    std::fs::copy(GOLDEN, folder.join("whole")).unwrap();
    std::fs::write(fs.mount.join("target"), "").unwrap();
    symlink(fs.mount.join("target"), folder.join("link")).unwrap();
    symlink(fs.mount.join("absent"), folder.join("dangling")).unwrap();
    for name in ["", "empty", "whole", "link", "dangling"] {
        lchown(folder.join(name), Some(USER), Some(USER)).unwrap();
    }
    for name in ["empty", "whole", "link", "dangling"] {
        let output = export(name);
        assert_eq!(output.status.code(), Some(1), "{name}: {}", text(&output));
        assert!(text(&output).contains("another user"), "{name}: {}", text(&output));
    }
    assert_eq!(
        std::fs::read(folder.join("whole")).unwrap(),
        std::fs::read(GOLDEN).unwrap()
    );
    assert!(std::fs::read(folder.join("empty")).unwrap().is_empty());
    assert!(!fs.mount.join("absent").exists() && std::fs::read(fs.mount.join("target")).unwrap().is_empty());
    // A new one is made, for the user alone, also there; and one's own is appended to, through one's own link.
    done(&export("new"));
    let metadata = folder.join("new").metadata().unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o777), (0, 0o600));
    symlink(folder.join("new"), fs.mount.join("mine")).unwrap();
    done(&vmfold(
        &fs,
        &["export", as_str(&fs.mount.join("mine")), as_str(&fs.pool())],
    ));
    let output = vmfold(&fs, &["list", as_str(&folder.join("new")), "2"]);
    done(&output);
}

/// What fails leaves nothing of a new archive, and an old one as it was.
#[test]
fn an_export_that_fails_leaves_no_empty_archive() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    for n in 0..40u32 {
        std::fs::write(fs.pool().join(format!("{n}.img")), Random(n.into()).data(100_000)).unwrap();
    }
    let old = fs.mount.join("old.vmfold");
    std::fs::copy(GOLDEN, &old).unwrap();
    let new = fs.mount.join("new.vmfold");
    // Too few files may be open; no file may be longer than 64 KiB.
    for limit in ["-n 30", "-f 64"] {
        for archive in [&old, &new] {
            let binary = env!("CARGO_BIN_EXE_vmfold");
            let output = Command::new("bash")
                .args([
                    "-c",
                    &format!(
                        "ulimit {limit}; exec {binary} export '{}' '{}' --index '{}'",
                        archive.display(),
                        fs.pool().display(),
                        fs.index().display()
                    ),
                ])
                .output()
                .unwrap();
            assert_eq!(
                output.status.code(),
                Some(1),
                "{limit}: {:?} {}",
                output.status,
                text(&output)
            );
        }
        assert!(!new.exists(), "{limit}");
        assert!(
            std::fs::read(&old).unwrap() == std::fs::read(GOLDEN).unwrap(),
            "{limit}"
        );
    }
}

#[test]
fn what_is_no_file_is_no_archive() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("fifo");
    sh(&format!("mkfifo '{}'", fifo.display()));
    let pool = folder.path().join("a.img");
    std::fs::write(&pool, "x").unwrap();
    for archive in [fifo.as_path(), Path::new("/dev/zero"), folder.path()] {
        for (verb, rest) in [
            ("list", vec![]),
            ("verify", vec![]),
            ("diff", vec![]),
            ("import", vec!["--to", "x"]),
            ("import", vec!["--to", "x", "--partial"]),
        ] {
            let child = Command::new(env!("CARGO_BIN_EXE_vmfold"))
                .arg(verb)
                .arg(archive)
                .args(rest)
                .current_dir(folder.path())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            assert_eq!(ended(child), Some(2), "{verb} {}", archive.display());
        }
    }
}

/// A pipe that delivers nothing is waited for until the user ends it, with the first signal.
#[test]
fn a_pipe_that_delivers_nothing_can_be_interrupted() {
    for begun in [0, 30, 300] {
        let folder = tempfile::tempdir().unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_vmfold"))
            .args(["import", "-", "--to"])
            .arg(folder.path().join("to"))
            .arg("--index")
            .arg(folder.path().join("index"))
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = child.stdin.take().unwrap();
        std::io::Write::write_all(&mut input, &std::fs::read(GOLDEN).unwrap()[..begun]).unwrap();
        std::thread::sleep(Duration::from_millis(500));
        sh(&format!("kill -TERM {}", child.id()));
        assert_eq!(ended(child), Some(130), "after {begun} bytes");
        drop(input);
    }
}

/// Exit code 0 says that what was found was said.
#[test]
fn what_cannot_be_printed_is_no_success() {
    let folder = tempfile::tempdir().unwrap();
    let binary = env!("CARGO_BIN_EXE_vmfold");
    let run = |command: &str| {
        let output = Command::new("sh")
            .args(["-c", command])
            .current_dir(folder.path())
            .output()
            .unwrap();
        (output.status.code(), text(&output))
    };
    for verb in ["list", "verify", "--json list", "diff"] {
        for to in [">&-", ">/dev/full"] {
            let (code, said) = run(&format!("{binary} {verb} '{GOLDEN}' {to}"));
            assert_eq!(code, Some(1), "{verb} {to}: {said}");
            assert!(said.contains("stdout"), "{verb} {to}: {said}");
        }
    }
    for to in [">&-", ">/dev/full"] {
        let (code, said) = run(&format!("{binary} --help {to}"));
        assert_eq!(code, Some(1), "{to}: {said}");
    }
    assert_eq!(run(&format!("{binary} list '{GOLDEN}' >/dev/null")).0, Some(0));
    assert_eq!(run(&format!("{binary} --help >/dev/null")).0, Some(0));
    assert_eq!(run(&format!("{binary} --nonsense >/dev/null")).0, Some(2));
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    std::fs::write(fs.pool().join("a.img"), Random(9).data(100_000)).unwrap();
    for to in [">&-", ">/dev/full"] {
        let (code, said) = run(&format!(
            "{binary} export - '{}' --index '{}' {to}",
            fs.pool().display(),
            fs.index().display()
        ));
        assert_eq!(code, Some(1), "{to}: {said}");
    }
}
