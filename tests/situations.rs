//! What vmfold does on a real host: images in use, unusual, on damaged disks, without space. `tests/README.md` lists these tests.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, reason = "tests")]

mod common;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Mounted, Random, build_pool, can_mount, reflink, sh, state_of};
use serde_json::Value;

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Runs vmfold with arguments that may hold anything.
fn run(fs: &Mounted, arguments: &[&str]) -> Output {
    let mut command = fs.command();
    command.args(arguments).arg("--index").arg(fs.index());
    command.output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(output)))
}

fn str_of(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The reason why an image was left alone, and the detail.
fn skipped(done: &Value, image: &Path) -> Option<(String, String)> {
    let skipped = done["skipped"].as_array().unwrap();
    let one = skipped.iter().find(|one| one["path"] == str_of(image))?;
    Some((
        one["reason"].as_str().unwrap().to_owned(),
        one["detail"].as_str().unwrap_or_default().to_owned(),
    ))
}

/// Two images of the same content, written twice, and a third.
fn twins(fs: &Mounted) -> [PathBuf; 3] {
    let content = Random(40).data(8 << 20);
    let paths = ["a.img", "b.img", "c.img"].map(|name| fs.pool().join(name));
    for path in &paths {
        std::fs::write(path, &content).unwrap();
    }
    sh(&format!("sync -f {}", fs.pool().display()));
    paths
}

/// While something holds the second of three equal images, the other two are shared and it is left alone; afterwards it is not.
fn is_respected(fs: &Mounted, images: &[PathBuf; 3], reason: &str, detail: &str, release: impl FnOnce()) {
    let state = state_of(&fs.pool());
    for _ in 0..2 {
        let output = fs.vmfold("--json reclaim");
        let done = json(&output);
        assert_eq!(output.status.code(), Some(3), "{done}");
        let (found, said) = skipped(&done, &images[1]).unwrap_or_else(|| panic!("it was not left alone: {done}"));
        assert_eq!(found, reason, "{done}");
        assert!(said.contains(detail), "{said} in place of {detail}");
    }
    assert_eq!(state_of(&fs.pool()), state);
    release();
    let done = json(&fs.vmfold("--json reclaim"));
    assert_eq!(done["skipped"].as_array().unwrap().len(), 0, "{done}");
    assert_eq!(done["done"]["after"]["physical_bytes"], 8 << 20, "{done}");
    assert_eq!(state_of(&fs.pool()), state);
}

/// A process that holds something until it is dropped.
struct Held(Child);

impl Held {
    /// Starts a command and waits until `is_ready`.
    fn start(command: &str, is_ready: impl Fn() -> bool) -> Self {
        let child = Command::new("sh")
            .args(["-c", &format!("exec {command}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (held, since) = (Self(child), Instant::now());
        while !is_ready() {
            assert!(since.elapsed() < Duration::from_secs(20), "{command} never got ready");
            std::thread::sleep(Duration::from_millis(20));
        }
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a process has a file open.
fn is_open_in(process: u32, path: &Path) -> bool {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten();
    links
        .flatten()
        .any(|link| std::fs::read_link(link.path()).is_ok_and(|target| target == path))
}

#[test]
fn in_use_by_a_process() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let open = |flags: &str| {
        let child = Command::new("sh")
            .args(["-c", &format!("exec sleep 600 {flags}'{}'", images[1].display())])
            .spawn()
            .unwrap();
        let held = Held(child);
        while !is_open_in(held.0.id(), &images[1]) {
            std::thread::sleep(Duration::from_millis(5));
        }
        held
    };
    let writer = open(">>");
    let number = writer.0.id();
    is_respected(&fs, &images, "in-use", &format!("({number})"), move || drop(writer));
    // A reader is someone else too: it may be a machine's read-only disk.
    let reader = open("<");
    let done = json(&fs.vmfold("--json reclaim --dry-run"));
    assert_eq!(skipped(&done, &images[1]).unwrap().0, "in-use");
    drop(reader);
}

#[test]
fn in_use_from_the_middle_of_the_run_on() {
    if !can_mount() {
        return;
    }
    let mut told = 0;
    for moment in 1..=12u64 {
        let fs = Mounted::btrfs();
        build_pool(&fs.pool(), 40);
        let state = state_of(&fs.pool());
        let image = fs.pool().join("appvms/work/private.img");
        let child = fs
            .command()
            .args(["--json", "reclaim", "--work-space", "4M", "--min-run", "4K", "--index"])
            .arg(fs.index())
            .arg(fs.pool())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(moment * 60));
        let started = Instant::now();
        let file = File::options().read(true).write(true).open(&image).unwrap();
        let waited = started.elapsed();
        let done = json(&child.wait_with_output().unwrap());
        drop(file);
        assert!(waited < Duration::from_secs(5), "whoever opens it waits for {waited:?}");
        assert_eq!(state_of(&fs.pool()), state);
        told += u32::from(skipped(&done, &image).is_some_and(|(reason, _)| reason == "opened-meanwhile"));
        if told > 1 {
            return;
        }
    }
    assert!(told > 0, "it was never opened in the middle");
}

#[test]
fn in_use_mapped_by_a_process() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let file = File::options().read(true).write(true).open(&images[1]).unwrap();
    // SAFETY: nothing changes or shortens the file while it is mapped, and nothing reads the mapping.
    #[expect(unsafe_code, reason = "mapping a file is the situation")]
    let mapped = unsafe { memmap2::MmapMut::map_mut(&file) }.unwrap();
    drop(file);
    let me = format!("({})", std::process::id());
    is_respected(&fs, &images, "in-use", &me, move || drop(mapped));
}

#[test]
fn in_use_by_a_loop_device_and_mounted() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let device = sh(&format!("losetup --find --show '{}'", images[1].display()));
    let device = device.trim().to_owned();
    is_respected(&fs, &images, "in-use", &device.clone(), move || {
        sh(&format!("losetup -d {device}"));
        std::thread::sleep(Duration::from_millis(200));
    });
    let (disk, mount) = (fs.pool().join("disk.img"), fs.mount.join("inner"));
    std::fs::create_dir(&mount).unwrap();
    sh(&format!(
        "truncate -s 16M {0}; mkfs.ext4 -q {0}; mount -o loop {0} {1}",
        disk.display(),
        mount.display()
    ));
    let done = json(&fs.vmfold("--json reclaim"));
    sh(&format!("umount {}", mount.display()));
    let (reason, detail) = skipped(&done, &disk).unwrap();
    assert_eq!(reason, "in-use");
    assert!(
        detail.contains("/dev/loop") && detail.contains(&format!("mounted on {}", mount.display())),
        "{detail}"
    );
}

#[test]
fn in_use_by_qemu() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let image = images[1].clone();
    let holds = move || {
        let locks = std::fs::read_to_string("/proc/locks").unwrap();
        let inode = format!(":{} ", image.metadata().unwrap().ino());
        locks
            .lines()
            .any(|line| line.contains("OFDLCK") && line.contains(&inode))
    };
    // It reads commands from its standard input, which stays open.
    let qemu = Held::start(&format!("qemu-io -f raw '{}'", images[1].display()), holds);
    is_respected(&fs, &images, "in-use", "locked as QEMU does", move || drop(qemu));
}

#[test]
fn in_use_for_swapping() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let swap = fs.pool().join("swap.img");
    sh(&format!(
        "touch {0}; chattr +C {0}; chmod 600 {0}; dd if=/dev/zero of={0} bs=1M count=16 status=none; mkswap -q {0}; sync -f {0}; swapon {0}",
        swap.display()
    ));
    let output = fs.vmfold("--json reclaim");
    sh(&format!("swapoff {}", swap.display()));
    let done = json(&output);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        skipped(&done, &swap).unwrap(),
        ("in-use".into(), "used for swapping".into())
    );
    assert_eq!(done["skipped"].as_array().unwrap().len(), 1, "{done}");
    assert!(images.iter().all(|image| image.exists()));
}

#[test]
fn machines_that_files_say_run() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let content = Random(41).data(4 << 20);
    let write = |name: &str| {
        let path = fs.pool().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, &content).unwrap();
        path
    };
    let [idle, copy] = ["appvms/idle/private.img", "appvms/copy/private.img"].map(write);
    let [halted, revision, dirty] = [
        "appvms/halted/private.img",
        "appvms/halted/root.img.2@2026-01-01T00:00:00Z",
        "appvms/halted/private-dirty.img",
    ]
    .map(write);
    let [importing, import] = ["appvms/new/private.img", "appvms/new/private-import.img"].map(write);
    let volatile = write("appvms/halted/volatile-dirty.img");
    let noted = write("appvms/no-ted/private.img");
    let state_file = Path::new("/run/qubes/volume-running-vmfold-test:appvms-no--ted-private");
    let made = !Path::new("/run/qubes").exists();
    std::fs::create_dir_all("/run/qubes").unwrap();
    std::fs::write(state_file, "").unwrap();
    sh(&format!("sync -f {}", fs.pool().display()));
    let state = state_of(&fs.pool());
    let output = fs.vmfold("--json reclaim");
    // Named alone, an image is known to belong to its machine all the same.
    let alone = run(&fs, &["--json", "reclaim", "-n", str_of(&halted)]);
    std::fs::remove_file(state_file).unwrap();
    if made {
        std::fs::remove_dir("/run/qubes").unwrap();
    }
    let done = json(&output);
    assert_eq!(output.status.code(), Some(3));
    for (image, reason) in [
        (&halted, "dirty"),
        (&revision, "dirty"),
        (&dirty, "dirty"),
        (&importing, "import-in-progress"),
        (&import, "import-in-progress"),
        (&volatile, "volatile"),
        (&noted, "running"),
    ] {
        assert_eq!(
            skipped(&done, image).map(|(reason, _)| reason).as_deref(),
            Some(reason),
            "{image:?}"
        );
    }
    assert_eq!(skipped(&json(&alone), &halted).unwrap().0, "dirty");
    for image in [&idle, &copy] {
        assert_eq!(skipped(&done, image), None);
    }
    assert_eq!(done["machines_in_use"], 2);
    // Of two idle machines one copy went; what a halted machine left is where it was.
    assert_eq!(done["done"]["freed_bytes"], 4 << 20, "{done}");
    assert_eq!(state_of(&fs.pool()), state);
}

#[test]
fn a_snapshot_that_is_being_sent() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    std::fs::remove_dir(fs.pool()).unwrap();
    sh(&format!("btrfs subvolume create {}", fs.pool().display()));
    let mut random = Random(42);
    let content = random.data(16 << 20);
    std::fs::write(fs.pool().join("a.img"), &content).unwrap();
    let snapshot = fs.mount.join("snapshot");
    sh(&format!(
        "btrfs subvolume snapshot -r {} {}",
        fs.pool().display(),
        snapshot.display()
    ));
    let twin = fs.mount.join("twin.img");
    std::fs::write(&twin, &content).unwrap();
    sh(&format!("sync -f {}", twin.display()));
    let state = state_of(&fs.mount);
    // A pipe that nobody reads from stops it in the middle.
    let mut send = Held(
        Command::new("btrfs")
            .args(["send", "-q", str_of(&snapshot)])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    );
    let mut first = [0];
    std::io::Read::read_exact(send.0.stdout.as_mut().unwrap(), &mut first).unwrap();
    let all = [str_of(&twin), str_of(&snapshot), str_of(&fs.pool())].map(str::to_owned);
    let all: Vec<&str> = ["--json", "reclaim"]
        .into_iter()
        .chain(all.iter().map(String::as_str))
        .collect();
    let output = run(&fs, &all);
    let done = json(&output);
    drop(send);
    assert_eq!(state_of(&fs.mount), state);
    let reasons: Vec<_> = done["skipped"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["reason"].clone())
        .collect();
    assert!(
        reasons
            .iter()
            .all(|reason| reason == "being-sent" || reason == "in-use"),
        "{done}"
    );
    // Either it was in nobody's way, or it says so and the next run does the rest.
    if reasons.is_empty() {
        assert_eq!(done["done"]["freed_bytes"], 16 << 20);
    } else {
        assert_eq!(output.status.code(), Some(3));
        let done = json(&run(&fs, &all));
        assert_eq!(done["done"]["freed_bytes"], 16 << 20, "{done}");
    }
    assert_eq!(state_of(&fs.mount), state);
}

#[test]
fn immutable_and_append_only_images_lend_their_extents() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let append = fs.pool().join("d.img");
    std::fs::write(&append, std::fs::read(&images[0]).unwrap()).unwrap();
    sh(&format!(
        "sync -f {0}; chattr +i {0}; chattr +a {1}",
        images[1].display(),
        append.display()
    ));
    let state = state_of(&fs.pool());
    let predicted = json(&fs.vmfold("--json reclaim -n"))["planned"]["freed_bytes"].clone();
    let output = fs.vmfold("--json reclaim");
    let again = json(&fs.vmfold("--json reclaim"));
    let after = state_of(&fs.pool());
    sh(&format!(
        "chattr -i {}; chattr -a {}",
        images[1].display(),
        append.display()
    ));
    let done = json(&output);
    assert_eq!(after, state);
    assert_eq!(output.status.code(), Some(3));
    for image in [&images[1], &append] {
        assert_eq!(skipped(&done, image).unwrap().0, "immutable");
    }
    assert_eq!(done["done"]["freed_bytes"], 16 << 20, "{done}");
    assert_eq!(predicted, 16 << 20);
    assert_eq!(again["done"]["freed_bytes"], 0);
}

#[test]
fn other_filesystems_and_read_only_mounts() {
    if !can_mount() {
        return;
    }
    let (fs, other) = (Mounted::btrfs(), Mounted::btrfs());
    let images = twins(&fs);
    let below = fs.pool().join("below");
    std::fs::create_dir(&below).unwrap();
    std::fs::copy(&images[0], other.mount.join("x.img")).unwrap();
    sh(&format!("mount --bind {} {}", other.mount.display(), below.display()));
    let output = fs.vmfold("--json reclaim");
    let two = run(&fs, &["reclaim", str_of(&images[0]), str_of(&other.mount)]);
    sh(&format!("umount {}", below.display()));
    let done = json(&output);
    assert_eq!(skipped(&done, &below.join("x.img")).unwrap().0, "other-filesystem");
    assert_eq!(done["done"]["freed_bytes"], 16 << 20, "{done}");
    assert_eq!(two.status.code(), Some(2));
    assert!(text(&two).contains("are on two filesystems"), "{}", text(&two));
    sh(&format!("mount -o remount,ro {}", fs.mount.display()));
    let output = fs.vmfold("reclaim");
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("mounted read-only"), "{}", text(&output));
    assert_eq!(
        fs.vmfold("reclaim -n").status.code(),
        Some(0),
        "a dry run changes nothing"
    );
}

#[test]
fn quotas_of_btrfs() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    std::fs::remove_dir(fs.pool()).unwrap();
    sh(&format!("btrfs subvolume create {}", fs.pool().display()));
    build_pool(&fs.pool(), 43);
    sh(&format!(
        "btrfs quota enable {0}; btrfs quota rescan -w {0}",
        fs.mount.display()
    ));
    let state = state_of(&fs.pool());
    // So low that few donors fit.
    let limit = fs.used() + (2 << 20);
    sh(&format!("btrfs qgroup limit {limit} {}", fs.pool().display()));
    let output = fs.vmfold("--json reclaim");
    assert_eq!(state_of(&fs.pool()), state);
    assert!(matches!(output.status.code(), Some(0 | 1 | 3)), "{}", text(&output));
    sh(&format!("btrfs qgroup limit none {}", fs.pool().display()));
    let output = fs.vmfold("--json reclaim");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let again = json(&fs.vmfold("--json reclaim"));
    assert_eq!(again["planned"]["freed_bytes"], 0);
    assert_eq!(state_of(&fs.pool()), state);
    fs.check();
}

#[test]
fn a_filesystem_named_by_mount_point_device_or_uuid() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let content = Random(44).data(4 << 20);
    let mount = fs.mount.display();
    sh(&format!(
        "btrfs subvolume create {mount}/one; btrfs subvolume create {mount}/two"
    ));
    for name in ["one/a.img", "two/b.img"] {
        std::fs::write(fs.mount.join(name), &content).unwrap();
    }
    sh(&format!(
        "btrfs subvolume snapshot -r {mount}/two {mount}/two@snap; sync -f {mount}"
    ));
    let device = sh(&format!("findmnt -n -o SOURCE {mount}")).trim().to_owned();
    let uuid = sh(&format!("btrfs filesystem show {mount}"));
    let uuid = uuid
        .split("uuid: ")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    for name in [mount.to_string(), device.clone(), uuid.clone(), format!("UUID={uuid}")] {
        let done = json(&run(&fs, &["--json", "reclaim", "-n", &name]));
        assert_eq!(done["images"], 3, "{name}");
        assert_eq!(done["planned"]["freed_bytes"], 4 << 20, "{name}");
    }
    let state = state_of(&fs.mount);
    let done = json(&run(&fs, &["--json", "reclaim", &device]));
    assert_eq!(done["done"]["freed_bytes"], 4 << 20, "read-only snapshots too: {done}");
    assert_eq!(state_of(&fs.mount), state);
    let absent = run(&fs, &["reclaim", "UUID=01234567-89ab-cdef-0123-456789abcdef"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(text(&absent).contains("is not mounted"), "{}", text(&absent));
}

#[test]
fn lists_of_paths() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let odd = fs.pool().join("od\nd.img");
    std::fs::copy(&images[0], &odd).unwrap();
    let list = fs.mount.join("list");
    std::fs::write(&list, format!("{}\n\n{}\n", images[0].display(), images[2].display())).unwrap();
    let done = json(&run(&fs, &["--json", "reclaim", "-n", "--files-from", str_of(&list)]));
    assert_eq!(done["images"], 2);
    std::fs::write(&list, format!("{}\0{}\0", images[0].display(), odd.display())).unwrap();
    let mut command = fs.command();
    command
        .args(["--json", "reclaim", "-n", "--files-from", "-", "--index"])
        .arg(fs.index())
        .stdin(File::open(&list).unwrap());
    assert_eq!(json(&command.output().unwrap())["images"], 2);
    std::fs::write(&list, "").unwrap();
    assert_eq!(
        run(&fs, &["reclaim", "--files-from", str_of(&list)]).status.code(),
        Some(2)
    );
}

#[test]
fn pools_of_qubes() {
    if !can_mount() {
        return;
    }
    // A rescue system: dom0's root is mounted somewhere, its second pool on a disk of its own.
    let (fs, second) = (Mounted::btrfs(), Mounted::btrfs());
    let content = Random(45).data(4 << 20);
    let dom0 = fs.mount.join("dom0");
    sh(&format!(
        "mkdir -p {0}/var/lib/qubes/appvms/w {0}/mnt/second; mount --bind {1} {0}/mnt/second",
        dom0.display(),
        second.mount.display()
    ));
    for name in ["var/lib/qubes/appvms/w", "mnt/second/vm-templates/t"] {
        std::fs::create_dir_all(dom0.join(name)).unwrap();
        for image in ["root.img", "private.img"] {
            std::fs::write(dom0.join(name).join(image), &content).unwrap();
        }
    }
    std::fs::write(
        dom0.join("var/lib/qubes/qubes.xml"),
        r#"<qubes><pools>
            <pool driver="file-reflink" dir_path="/var/lib/qubes" name="varlibqubes"/>
            <pool driver="file-reflink" dir_path="/mnt/second" name="second"/>
            <pool driver="lvm_thin" name="lvm"/></pools></qubes>"#,
    )
    .unwrap();
    std::fs::write(dom0.join("var/lib/qubes/appvms/w/private-dirty.img"), &content).unwrap();
    sh(&format!(
        "sync -f {}; sync -f {}",
        fs.mount.display(),
        second.mount.display()
    ));
    let output = run(&fs, &["reclaim", "--qubes", "--qubes-root", str_of(&dom0)]);
    let none = run(&fs, &["reclaim", "--qubes", "--qubes-root", str_of(&fs.pool())]);
    sh(&format!("umount {}/mnt/second", dom0.display()));
    let text_of = text(&output);
    assert_eq!(output.status.code(), Some(3), "{text_of}");
    assert!(text_of.contains("Freed 4.0 MiB"), "the second pool: {text_of}");
    assert!(
        text_of.contains("3 images of 1 running machine left alone (w)"),
        "{text_of}"
    );
    assert_eq!(none.status.code(), Some(2));
    assert!(text(&none).contains("qubes.xml"), "{}", text(&none));
}

#[test]
fn a_bad_block_is_skipped_and_the_rest_is_done() {
    if can_mount() {
        with_a_bad_block("");
    }
}

#[test]
fn a_bad_block_is_skipped_and_the_rest_is_compressed() {
    if can_mount() {
        let done = with_a_bad_block("--compress zstd");
        let compressed = &done["done"]["after"]["compressed_bytes"];
        assert!(compressed.as_u64().unwrap() > 10 << 20, "{done}");
    }
}

#[test]
fn an_extent_that_cannot_be_read_stays_and_its_images_are_worked_on() {
    if !can_mount() {
        return;
    }
    // With these checksums, everything is read for its fingerprints.
    let fs = Mounted::new("mkfs.btrfs -q --csum sha256", "", 2048);
    let (bad, common) = (Random(60).data(1 << 20), Random(61).data(8 << 20));
    let path = |name: &str| fs.pool().join(name);
    std::fs::write(path("bad.img"), &bad).unwrap();
    sh(&format!("sync -f {}", fs.mount.display()));
    // What follows lies in extents of its own.
    let file = File::options().append(true).open(path("bad.img")).unwrap();
    std::io::Write::write_all(&mut &file, &common).unwrap();
    drop(file);
    std::fs::write(path("good.img"), &common).unwrap();
    sh(&format!("sync -f {}", fs.mount.display()));
    for number in 1..=30 {
        reflink(
            &path("bad.img"),
            &path(&format!("bad.img.{number}@2026-01-01T00:00:00Z")),
        );
    }
    fs.corrupt(&path("bad.img"));
    let rest_of = |name: &str| {
        let mut rest = vec![0; common.len()];
        File::open(path(name))
            .unwrap()
            .read_exact_at(&mut rest, 1 << 20)
            .unwrap();
        rest
    };
    let output = fs.vmfold("--json reclaim");
    let done = json(&output);
    assert_eq!(output.status.code(), Some(3), "{done}");
    let named = done["skipped"].as_array().unwrap();
    assert_eq!(named.len(), 31, "{done}");
    for one in named {
        assert_eq!(one["reason"], "unreadable");
        let detail = one["detail"].as_str().unwrap();
        assert!(detail.starts_with("bytes 0..") && detail.contains("error"), "{detail}");
    }
    assert_eq!(done["images"], 32);
    // Only the extent that is bad stays: what else the images hold is shared.
    assert_eq!(done["done"]["freed_bytes"], 8 << 20, "{done}");
    assert_eq!(done["planned"]["freed_bytes"], 8 << 20, "{done}");
    for name in ["bad.img", "bad.img.30@2026-01-01T00:00:00Z"] {
        assert!(rest_of(name) == common);
    }
    assert_eq!(std::fs::read(path("good.img")).unwrap(), common);
    let again = json(&fs.vmfold("--json reclaim"));
    assert_eq!(
        (
            &again["done"]["freed_bytes"],
            again["skipped"].as_array().unwrap().len()
        ),
        (&0.into(), 31)
    );
    // An archive has no image of which a part is missing.
    let archive = fs.mount.join("archive");
    let output = fs.vmfold(&format!("export {}", archive.display()));
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    assert!(text(&output).contains("bad.img"), "{}", text(&output));
    assert!(!archive.exists());
}

/// Runs reclaim on a pool with a block that cannot be read.
fn with_a_bad_block(arguments: &str) -> Value {
    // The filesystem's checksums serve as fingerprints, so that nothing is read before the run itself.
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 46);
    let twins = ["bad.img", "twin.img"].map(|name| fs.pool().join("standalones").join(name));
    let content = Random(47).data(8 << 20);
    for path in &twins {
        std::fs::write(path, &content).unwrap();
    }
    sh(&format!("sync -f {}", fs.mount.display()));
    fs.corrupt(&twins[0]);
    let reads = |path: &PathBuf| File::open(path).unwrap().read_exact_at(&mut [0; 4096], 4096).is_ok();
    let (good, bad): (Vec<_>, Vec<_>) = twins.iter().partition(|path| reads(path));
    let ([good], [bad]) = (&good[..], &bad[..]) else {
        panic!("one of them is damaged");
    };
    sh("echo 3 > /proc/sys/vm/drop_caches");
    let others = |fs: &Mounted| {
        let mut all = Vec::new();
        for folder in ["vm-templates", "appvms"] {
            all.extend(state_of(&fs.pool().join(folder)));
        }
        all
    };
    let (state, used) = (others(&fs), fs.used());
    let output = fs.vmfold(&format!("--json reclaim {arguments}"));
    let done = json(&output);
    assert_eq!(output.status.code(), Some(3), "{done}");
    let (reason, detail) = skipped(&done, bad).unwrap_or_else(|| panic!("{done}"));
    assert_eq!(reason, "unreadable");
    assert!(detail.contains("bytes 4096..8192"), "{detail}");
    let freed = done["done"]["freed_bytes"].as_u64().unwrap();
    assert!(freed > 40 << 20, "{done}");
    assert_eq!(used - fs.used(), freed);
    assert_eq!(others(&fs), state);
    assert!(std::fs::read(good).unwrap() == content);
    // Everything around the bad block is as it was.
    let file = File::open(bad).unwrap();
    let mut rest = vec![0; content.len() - 8192];
    file.read_exact_at(&mut rest, 8192).unwrap();
    assert!(rest == content[8192..]);
    assert!(file.read_exact_at(&mut [0; 4096], 4096).is_err());
    done
}

#[test]
fn a_disk_that_fills_up_during_the_run() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.btrfs -q", "", 600);
    build_pool(&fs.pool(), 49);
    let state = state_of(&fs.pool());
    let mut child = fs
        .command()
        .args(["reclaim", "--work-space", "4M", "--reserve", "0", "--index"])
        .arg(fs.index())
        .arg(fs.pool())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ballast = File::create(fs.mount.join("ballast")).unwrap();
    let block = Random(50).data(1 << 20);
    let mut at = 0;
    while child.try_wait().unwrap().is_none() {
        if ballast.write_all_at(&block, at).is_ok() {
            at += 1 << 20;
        }
    }
    let output = child.wait_with_output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{}", text(&output));
    if output.status.code() == Some(1) {
        let error = text(&output);
        assert!(
            error.contains("no space is left") || error.contains("is nearly full"),
            "{error}"
        );
    }
    assert_eq!(state_of(&fs.pool()), state);
    drop(ballast);
    std::fs::remove_file(fs.mount.join("ballast")).unwrap();
    sh(&format!("btrfs filesystem sync {}", fs.mount.display()));
    let output = fs.vmfold("--json reclaim");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(json(&fs.vmfold("--json reclaim"))["planned"]["freed_bytes"], 0);
    assert_eq!(state_of(&fs.pool()), state);
    fs.check();
}

#[test]
fn a_nearly_full_filesystem_is_reclaimed_in_one_run() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::new("mkfs.btrfs -q", "", 700);
    build_pool(&fs.pool(), 56);
    // What the first extents free makes room for the donors of the next.
    let free = || {
        fs.used();
        let stat = rustix::fs::statvfs(&fs.mount).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let ballast = File::create(fs.mount.join("ballast")).unwrap();
    let block = Random(57).data(1 << 20);
    let mut at = 0;
    while free() > (128 + 6) << 20 {
        ballast.write_all_at(&block, at).unwrap();
        at += 1 << 20;
    }
    drop(ballast);
    let room = free().saturating_sub(128 << 20);
    let (state, used) = (state_of(&fs.pool()), fs.used());
    let predicted = json(&fs.vmfold("--json reclaim -n"));
    let output = fs.vmfold("--json reclaim");
    let done = json(&output);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(done["planned"]["rewritten_bytes"].as_u64().unwrap() > room, "{done}");
    assert_eq!(done["done"]["freed_bytes"], predicted["planned"]["freed_bytes"]);
    assert_eq!(done["done"]["freed_bytes"].as_u64().unwrap(), used - fs.used());
    assert_eq!(json(&fs.vmfold("--json reclaim"))["planned"]["extents"], 0);
    assert_eq!(state_of(&fs.pool()), state);
    fs.check();
}

#[test]
fn a_reserve_and_a_time_limit_are_kept() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 51);
    let state = state_of(&fs.pool());
    let whole = json(&fs.vmfold("--json reclaim -n"));
    assert!(whole["planned"]["rewritten_bytes"].as_u64().unwrap() > 0);
    // With everything in reserve nothing may be rewritten; what needs no space is done.
    let output = fs.vmfold("--json reclaim --reserve 1TiB");
    let kept = json(&output);
    assert_eq!(kept["planned"]["rewritten_bytes"], 0, "{kept}");
    assert_eq!(kept["done"]["freed_bytes"], kept["planned"]["freed_bytes"]);
    assert!(
        text(&output).contains("free beyond the reserve of 1.0 TiB"),
        "{}",
        text(&output)
    );
    assert_eq!(state_of(&fs.pool()), state);
    let output = fs.vmfold("reclaim --max-seconds 0");
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    assert!(text(&output).contains("the time being over"), "{}", text(&output));
    let output = fs.vmfold("--json --nice reclaim --max-seconds 600");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let after = json(&output)["done"]["after"]["physical_bytes"].as_u64().unwrap();
    let goal = whole["pool"]["physical_bytes"].as_u64().unwrap() - whole["planned"]["freed_bytes"].as_u64().unwrap();
    assert!(after <= goal + goal / 50, "{after} in place of {goal}");
    assert_eq!(state_of(&fs.pool()), state);
}

#[test]
fn limits_of_references_are_kept() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 52);
    let state = state_of(&fs.pool());
    let before = json(&fs.vmfold("--json reclaim -n --min-run 4K"));
    let done = json(&fs.vmfold("--json reclaim --min-run 4K --max-references 20 --max-extents 20000"));
    assert!(done["done"]["freed_bytes"].as_u64() < before["planned"]["freed_bytes"].as_u64());
    assert_eq!(done["done"]["freed_bytes"], done["planned"]["freed_bytes"]);
    assert_eq!(state_of(&fs.pool()), state);
    let again = json(&fs.vmfold("--json reclaim --min-run 4K --max-references 20 --max-extents 20000"));
    assert_eq!(again["planned"]["freed_bytes"], 0, "{again}");
}

#[test]
fn groups_share_among_themselves_only() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let content = Random(53).data(4 << 20);
    for machine in ["vault-1", "vault-2", "work", "web"] {
        let folder = fs.pool().join("appvms").join(machine);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("private.img"), &content).unwrap();
    }
    sh(&format!("sync -f {}", fs.pool().display()));
    let state = state_of(&fs.pool());
    let done = json(&fs.vmfold("--json reclaim --group vault-*"));
    assert_eq!(done["done"]["freed_bytes"], 8 << 20, "{done}");
    assert_eq!(done["done"]["after"]["extents"], 2);
    let again = json(&fs.vmfold("--json reclaim --group appvms/vault-*"));
    assert_eq!(again["planned"]["freed_bytes"], 0);
    let done = json(&fs.vmfold("--json reclaim"));
    assert_eq!(done["done"]["freed_bytes"], 4 << 20, "without groups all share: {done}");
    assert_eq!(state_of(&fs.pool()), state);
}

/// Gives blocks the checksum of the attacker's choice by their last four bytes: CRC32C is linear, and those reach every value.
struct Forger {
    /// What each of their bits changes.
    changes: Vec<u32>,
}

impl Forger {
    fn new() -> Self {
        let mut block = vec![0; 4096];
        let base = crc32c::crc32c(&block);
        let changes = (0..32).map(|bit| {
            block[4092 + bit / 8] ^= 1 << (bit % 8);
            let change = crc32c::crc32c(&block) ^ base;
            block[4092 + bit / 8] = 0;
            change
        });
        Self {
            changes: changes.collect(),
        }
    }

    fn forge(&self, block: &mut [u8], wanted: u32) {
        block[4092..].fill(0);
        let mut rows: Vec<(u32, u32)> = self.changes.iter().copied().zip((0..32).map(|bit| 1 << bit)).collect();
        let (mut rest, mut solution) = (wanted ^ crc32c::crc32c(block), 0);
        for bit in (0..32).rev() {
            let Some(at) = rows.iter().position(|(change, _)| change >> bit & 1 == 1) else {
                continue;
            };
            let (change, bits) = rows.swap_remove(at);
            for row in rows.iter_mut().filter(|row| row.0 >> bit & 1 == 1) {
                *row = (row.0 ^ change, row.1 ^ bits);
            }
            if rest >> bit & 1 == 1 {
                (rest, solution) = (rest ^ change, solution ^ bits);
            }
        }
        block[4092..].copy_from_slice(&u32::to_le_bytes(solution));
        assert_eq!(crc32c::crc32c(block), wanted);
    }
}

#[test]
fn a_guest_that_floods_checksums_hides_nothing_of_others() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let write = |machine: &str, name: &str, content: &[u8]| {
        let folder = fs.pool().join("appvms").join(machine);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(name), content).unwrap();
    };
    let content = Random(58).data(1 << 20);
    write("one", "private.img", &content);
    write("two", "private.img", &content);
    // For each block of the others, so many blocks with its checksum that they would fill every place where it could be found.
    let forger = Forger::new();
    for image in 0..3 {
        let mut flood = Random(59 + image).data(25 << 20);
        for (mine, theirs) in flood.chunks_mut(4096).zip(content.chunks(4096).cycle()) {
            forger.forge(mine, crc32c::crc32c(theirs));
        }
        write("hostile", &format!("private.img.{image}@2026-01-01T00:00:00Z"), &flood);
    }
    sh(&format!("sync -f {}", fs.pool().display()));
    let state = state_of(&fs.pool());
    let one = fs.pool().join("appvms/one/private.img");
    let done = json(&fs.vmfold("--json reclaim"));
    assert_eq!(state_of(&fs.pool()), state);
    let report = json(&fs.vmfold("--json report"));
    let images = report["images"].as_array().unwrap();
    let shown = images.iter().find(|image| image["path"] == str_of(&one)).unwrap();
    assert_eq!(shown["exclusive_bytes"], 0, "the others share: {done}");
    assert_eq!(shown["shared_bytes"], 1 << 20);
}

#[test]
fn a_guest_that_forges_checksums_harms_only_itself() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let content = std::fs::read(&images[0]).unwrap();
    // Each block of the attacker's image has the checksum of the victim's block at that place, and other content.
    let mut hostile = Random(54).data(content.len());
    let forger = Forger::new();
    for (mine, theirs) in hostile.chunks_mut(4096).zip(content.chunks(4096)) {
        forger.forge(mine, crc32c::crc32c(theirs));
    }
    let attacker = fs.pool().join("attacker.img");
    std::fs::write(&attacker, &hostile).unwrap();
    sh(&format!("sync -f {}", attacker.display()));
    let state = state_of(&fs.pool());
    let output = fs.vmfold("--json reclaim --min-run 4K");
    let done = json(&output);
    assert_eq!(state_of(&fs.pool()), state, "equal checksums are no equal bytes");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert_eq!(
        done["done"]["freed_bytes"],
        16 << 20,
        "what the victims have in common is freed: {done}"
    );
    assert_eq!(done["planned"]["freed_bytes"], 16 << 20, "and no more was promised");
    let again = json(&fs.vmfold("--json reclaim --min-run 4K"));
    assert_eq!(again["planned"]["freed_bytes"], 0);
    assert_eq!(std::fs::read(&attacker).unwrap(), hostile);
}

#[test]
fn what_vmfold_makes_is_for_its_user_alone() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    twins(&fs);
    let archive = fs.mount.join("a.vmfold");
    assert!(
        run(&fs, &["export", str_of(&archive), str_of(&fs.pool())])
            .status
            .success()
    );
    assert!(fs.vmfold("reclaim").status.success());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&archive), 0o600);
    assert_eq!(mode(&fs.index()), 0o700);
    for entry in walkdir::WalkDir::new(fs.index()).into_iter().map(Result::unwrap) {
        assert_eq!(mode(entry.path()) & 0o077, 0, "{:?}", entry.path());
    }
}

#[test]
fn an_image_in_use_is_not_replaced() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let images = twins(&fs);
    let archive = fs.mount.join("a.vmfold");
    assert!(
        run(&fs, &["export", str_of(&archive), str_of(&fs.pool())])
            .status
            .success()
    );
    let state = state_of(&fs.pool());
    let import = || {
        run(
            &fs,
            &["import", str_of(&archive), "--to", str_of(&fs.pool()), "--replace"],
        )
    };
    let held = File::open(&images[1]).unwrap();
    let output = import();
    assert_eq!(output.status.code(), Some(2));
    assert!(
        text(&output).contains("in use, and not to be replaced"),
        "{}",
        text(&output)
    );
    drop(held);
    assert_eq!(state_of(&fs.pool()), state);
    let output = import();
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn a_snapshot_taken_during_the_run_is_told() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    std::fs::remove_dir(fs.pool()).unwrap();
    sh(&format!("btrfs subvolume create {}", fs.pool().display()));
    build_pool(&fs.pool(), 55);
    let state = state_of(&fs.pool());
    let mut child = fs
        .command()
        .args(["reclaim", "--json", "--work-space", "4M", "--index"])
        .arg(fs.index())
        .arg(fs.pool())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut snapshots = 0;
    while child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(50));
        sh(&format!(
            "btrfs subvolume snapshot -r {} {}/snapshot{snapshots}",
            fs.pool().display(),
            fs.mount.display()
        ));
        snapshots += 1;
    }
    let output = child.wait_with_output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 3)), "{}", text(&output));
    assert_eq!(state_of(&fs.pool()), state);
    // Snapshots hold what they hold: named with the pool, they give it up too.
    let all = run(&fs, &["--json", "reclaim", str_of(&fs.mount)]);
    assert_eq!(all.status.code(), Some(0), "{}", text(&all));
    let again = json(&run(&fs, &["--json", "reclaim", str_of(&fs.mount)]));
    assert_eq!(again["planned"]["freed_bytes"], 0);
    assert_eq!(state_of(&fs.pool()), state);
}

#[test]
fn what_a_deleted_snapshot_holds_is_freed_or_said() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    std::fs::remove_dir(fs.pool()).unwrap();
    sh(&format!("btrfs subvolume create {}", fs.pool().display()));
    twins(&fs);
    let state = state_of(&fs.pool());
    let snapshot = fs.mount.join("snapshot");
    for _ in 0..5 {
        sh(&format!(
            "btrfs subvolume snapshot {0} {1}; sync -f {1}; btrfs subvolume delete {1}",
            fs.pool().display(),
            snapshot.display()
        ));
    }
    let done = json(&fs.vmfold("--json reclaim"));
    assert_eq!(done["done"]["freed_bytes"], 16 << 20, "{done}");
    assert_eq!(state_of(&fs.pool()), state);
    // Where nothing is cleaned away, it is said.
    sh(&format!(
        "btrfs subvolume snapshot {0} {1}; sync -f {1}; btrfs subvolume delete {1}; mount -o remount,ro {2}",
        fs.pool().display(),
        snapshot.display(),
        fs.mount.display()
    ));
    let dry = text(&fs.vmfold("reclaim --dry-run"));
    assert!(dry.contains("not all cleaned away yet (1 are left)"), "{dry}");
}

#[test]
fn a_balance_is_said() {
    const TRIES: u32 = 50;
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    build_pool(&fs.pool(), 56);
    let state = state_of(&fs.pool());
    let mut balances = Command::new("sh")
        .args(["-c", "while :; do btrfs balance start --full-balance \"$0\"; done"])
        .arg(&fs.mount)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let is_said = (0..TRIES).any(|_| {
        let output = fs.vmfold("reclaim --dry-run");
        text(&output).contains("`balance` runs on this filesystem")
    });
    // What is reported is what was counted, balance or not.
    let before = fs.vmfold_json("reclaim")["done"]["freed_bytes"].as_i64().unwrap();
    let _ = balances.kill();
    balances.wait().unwrap();
    sh(&format!(
        "btrfs balance cancel {} 2>/dev/null || true",
        fs.mount.display()
    ));
    assert!(is_said, "in {TRIES} runs");
    assert!(before >= 0);
    assert_eq!(state_of(&fs.pool()), state);
    let rest = fs.vmfold_json("reclaim");
    assert_eq!(rest["done"]["freed_bytes"], rest["planned"]["freed_bytes"], "{rest}");
    assert_eq!(fs.vmfold_json("reclaim")["done"]["freed_bytes"], 0);
    assert_eq!(state_of(&fs.pool()), state);
    fs.check();
}

#[test]
fn an_image_without_checksums_is_known_before_it_is_on_disk() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let content = Random(41).data(2 << 20);
    let (with, without) = (fs.pool().join("with.img"), fs.pool().join("without.img"));
    std::fs::write(&with, &content).unwrap();
    sh(&format!(
        "sync -f {0}; touch {1}; chattr +C {1}",
        fs.pool().display(),
        without.display()
    ));
    std::fs::OpenOptions::new()
        .write(true)
        .open(&without)
        .unwrap()
        .write_all_at(&content, 0)
        .unwrap();
    let done = json(&fs.vmfold("--json reclaim"));
    // Only images alike in that share.
    assert_eq!(done["planned"]["freed_bytes"], 0, "{done}");
    assert_eq!(done["done"]["freed_bytes"], 0, "{done}");
    assert_eq!(done["unchecksummed_images"], 1, "{done}");
}
