//! How restored images get their names: all or none, from files that have no other, and gone on with by what the journal proves.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Mounted, Random, can_mount, sh};

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A filesystem with a pool of small images and an archive of it.
struct Scene {
    fs: Mounted,
}

impl Scene {
    fn new(names: &[&[u8]]) -> Self {
        let scene = Self { fs: Mounted::btrfs() };
        let mut random = Random(3);
        for name in names {
            let path = scene.fs.pool().join(OsStr::from_bytes(name));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, random.data(1 << 20)).unwrap();
        }
        let exported = scene.run(&["export", "a.vmfold", "pool"]);
        assert!(exported.status.success(), "{}", text(&exported));
        scene
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.fs.command();
        command.args(arguments).arg("--index").arg(self.fs.index());
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs what must end with a code, and returns what it said.
    fn ends(&self, code: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output));
        text(&output)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.fs.mount.join(name)
    }

    /// Starts an import that waits for more of the archive in the middle of it, and returns it with its work folder.
    fn begin(&self) -> (Child, PathBuf) {
        let archive = std::fs::read(self.path("a.vmfold")).unwrap();
        let mut command = self.command(&["import", "-", "--to", "to"]);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.as_mut().unwrap();
        stdin.write_all(&archive[..archive.len() - 300]).unwrap();
        let deadline = Instant::now() + Duration::from_mins(1);
        loop {
            assert!(Instant::now() < deadline, "it begins");
            let entries = std::fs::read_dir(self.path("to")).into_iter().flatten();
            let found = entries
                .map(|entry| entry.unwrap().path())
                .find(|path| path.join("journal").exists());
            match found {
                Some(folder) => return (child, folder),
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// The hash of an image's content.
type Content = blake3::Hash;

/// Content and inode of files below a folder.
fn files(folder: &Path) -> BTreeMap<PathBuf, (Content, u64)> {
    let entries = walkdir::WalkDir::new(folder).into_iter().map(Result::unwrap);
    let files = entries.filter(|entry| entry.file_type().is_file());
    let file = |entry: walkdir::DirEntry| {
        let below = entry.path().strip_prefix(folder).unwrap().to_owned();
        (
            below,
            (
                blake3::hash(&std::fs::read(entry.path()).unwrap()),
                entry.metadata().unwrap().ino(),
            ),
        )
    };
    files.map(file).collect()
}

fn contents(folder: &Path) -> BTreeMap<PathBuf, Content> {
    let all = files(folder).into_iter();
    all.map(|(name, (content, _))| (name, content)).collect()
}

#[test]
fn names_that_differ_in_their_last_byte_and_in_no_text_come_back_together() {
    if !can_mount() {
        return;
    }
    let long = |last: u8| [&[b'x'; 250][..], &[last], b".img"].concat();
    let names = [long(b'1'), long(b'2'), b"\xff.img".to_vec(), b"\xfe.img".to_vec()];
    let scene = Scene::new(&names.each_ref().map(Vec::as_slice));
    for more in [&[][..], &["--replace"]] {
        scene.ends(0, &[&["import", "a.vmfold", "--to", "to"], more].concat());
        assert_eq!(contents(&scene.path("to")), contents(&scene.fs.pool()));
    }
}

#[test]
fn what_a_killed_import_left_is_no_image() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"a.img"]);
    let (mut child, work) = scene.begin();
    child.kill().unwrap();
    child.wait().unwrap();
    // What is staged would be as large as an image.
    let staged = File::options().write(true).open(work.join("blocks")).unwrap();
    staged.set_len(64 << 20).unwrap();
    for left in [".a.img.vmfold-import", ".vmfold-0123456789abcdef~"] {
        std::fs::copy(scene.fs.pool().join("a.img"), scene.path("to").join(left)).unwrap();
    }
    std::fs::copy(scene.fs.pool().join("a.img"), scene.path("to/b.img")).unwrap();
    scene.ends(0, &["export", "left.vmfold", "to"]);
    scene.ends(0, &["import", "left.vmfold", "--to", "again"]);
    assert_eq!(
        contents(&scene.path("again")).keys().collect::<Vec<_>>(),
        [Path::new("b.img")]
    );
}

#[test]
fn only_what_the_journal_proves_is_not_made_anew() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"a.img", b"b.img", b"c.img"]);
    let (mut child, work) = scene.begin();
    child.kill().unwrap();
    child.wait().unwrap();
    // A folder from which nothing can be removed: the import ends after the images got their names.
    sh(&format!("chattr +a {}", work.display()));
    let resume = ["import", "a.vmfold", "--to", "to", "--resume"];
    let said = scene.ends(1, &resume);
    assert!(said.contains("cannot remove"), "{said}");
    let images = || {
        let mut images = files(&scene.path("to"));
        images.retain(|name, _| !name.starts_with(work.file_name().unwrap()));
        images
    };
    let (placed, pool) = (images(), contents(&scene.fs.pool()));
    let corrupt = |name: &str, keep_time: bool| {
        let file = File::options().write(true).open(scene.path("to").join(name)).unwrap();
        let time = file.metadata().unwrap().modified().unwrap();
        file.write_all_at(b"corrupted", 5000).unwrap();
        if keep_time {
            file.set_modified(time).unwrap();
        }
    };
    let inode = |name: &str| images()[Path::new(name)].1;
    // Size and time say nothing of content.
    corrupt("b.img", true);
    scene.ends(1, &[&resume[..], &["--replace"]].concat());
    assert_eq!(
        images()
            .into_iter()
            .map(|(name, (content, _))| (name, content))
            .collect::<BTreeMap<_, _>>(),
        pool
    );
    assert_eq!(
        (inode("a.img"), inode("c.img")),
        (placed[Path::new("a.img")].1, placed[Path::new("c.img")].1)
    );
    assert_ne!(inode("b.img"), placed[Path::new("b.img")].1);
    corrupt("a.img", true);
    scene.ends(1, &resume);
    assert_eq!(images()[Path::new("a.img")].0, pool[Path::new("a.img")]);
    // What someone has written to since is not replaced unless that is asked for.
    corrupt("c.img", false);
    let before = images();
    let said = scene.ends(2, &resume);
    assert!(said.contains("exists already: `to/c.img`"), "{said}");
    assert_eq!(images(), before);
    sh(&format!("chattr -a {}", work.display()));
    scene.ends(0, &[&resume[..], &["--replace"]].concat());
    assert_eq!(contents(&scene.path("to")), pool);
}

#[test]
fn an_import_that_cannot_replace_all_replaces_none() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"a.img", b"b.img", b"c.img", b"d.img", b"e/new.img"]);
    scene.ends(0, &["import", "a.vmfold", "--to", "to"]);
    for name in ["a.img", "b.img", "c.img", "d.img"] {
        std::fs::write(scene.path("to").join(name), name).unwrap();
    }
    std::fs::remove_file(scene.path("to/e/new.img")).unwrap();
    let before = files(&scene.path("to"));
    sh(&format!("chattr +i {}", scene.path("to/c.img").display()));
    let said = scene.ends(1, &["import", "a.vmfold", "--to", "to", "--replace"]);
    assert!(said.contains("cannot give its name to `to/c.img`"), "{said}");
    let work = |name: &Path| name.to_str().unwrap().starts_with(".vmfold-import-");
    let mut after = files(&scene.path("to"));
    after.retain(|name, _| !work(name));
    assert_eq!(after, before);
    sh(&format!("chattr -i {}", scene.path("to/c.img").display()));
    scene.ends(0, &["import", "a.vmfold", "--to", "to", "--replace", "--resume"]);
    assert_eq!(contents(&scene.path("to")), contents(&scene.fs.pool()));
}

#[test]
fn an_import_that_runs_is_not_called_interrupted() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"a.img"]);
    let (mut child, _) = scene.begin();
    for more in [&[][..], &["--resume"]] {
        let said = scene.ends(1, &[&["import", "a.vmfold", "--to", "to"], more].concat());
        assert!(said.contains("another import is restoring to `to`"), "{said}");
        assert!(!said.contains("deleting"), "{said}");
    }
    // A dry run looks only.
    scene.ends(0, &["import", "a.vmfold", "--to", "to", "--dry-run"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let said = scene.ends(2, &["import", "a.vmfold", "--to", "to"]);
    assert!(said.contains("was interrupted here"), "{said}");
    scene.ends(0, &["import", "a.vmfold", "--to", "to", "--resume"]);
    assert_eq!(contents(&scene.path("to")), contents(&scene.fs.pool()));
}

#[test]
fn a_dry_run_into_a_folder_that_is_not_there_looks_at_no_other() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"a.img", b"deep/b.img"]);
    scene.ends(2, &["import", "a.vmfold", "--to", "pool", "--dry-run"]);
    for to in ["pool/absent", "pool/absent/deeper", "absent"] {
        scene.ends(0, &["import", "a.vmfold", "--to", to, "--dry-run"]);
        assert!(!scene.path(to).exists());
    }
}

#[test]
fn after_the_last_number_there_is_no_revision() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"private.img"]);
    let to = scene.path("to");
    std::fs::create_dir(&to).unwrap();
    let last = to.join(format!("private.img.{}@2026-01-01T00:00:00Z", u64::MAX));
    std::fs::write(&last, "x").unwrap();
    let said = scene.ends(2, &["import", "a.vmfold", "--to", "to", "--as-revision"]);
    assert!(
        said.contains("private.img") && said.contains("no greater one"),
        "{said}"
    );
    std::fs::rename(&last, to.join("private.img.18446744073709551614@2026-01-01T00:00:00Z")).unwrap();
    scene.ends(0, &["import", "a.vmfold", "--to", "to", "--as-revision"]);
    assert_eq!(std::fs::read_dir(&to).unwrap().count(), 2);
}

#[test]
fn what_lies_on_another_mount_below_is_durable_too() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"a.img", b"inner/b.img"]);
    let inner = scene.path("to/inner");
    std::fs::create_dir_all(&inner).unwrap();
    let device = scene.fs.device().with_file_name("inner.fs");
    sh(&format!(
        "truncate -s 64M {0}; mkfs.ext4 -q {0}; mount -o loop {0} {1}",
        device.display(),
        inner.display()
    ));
    scene.ends(0, &["import", "a.vmfold", "--to", "to"]);
    let map = sh(&format!("filefrag -v {}", inner.join("b.img").display()));
    let same = contents(&inner)[Path::new("b.img")] == contents(&scene.fs.pool())[Path::new("inner/b.img")];
    common::unmount(&inner);
    assert!(same);
    assert!(!map.contains("delalloc"), "{map}");
}

#[test]
fn a_machine_that_runs_without_a_clean_image_keeps_its_image_from_being_restored() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new(&[b"appvms/work/private.img", b"appvms/other/private.img"]);
    let to = scene.path("to/appvms/work");
    std::fs::create_dir_all(&to).unwrap();
    std::fs::write(to.join("private-dirty.img"), Random(4).data(1 << 20)).unwrap();
    let before = contents(&scene.path("to"));
    for more in [&[][..], &["--replace"], &["--replace", "--resume"], &["--dry-run"]] {
        let said = scene.ends(2, &[&["import", "a.vmfold", "--to", "to"], more].concat());
        assert!(said.contains("private-dirty.img"), "{more:?}: {said}");
        assert_eq!(contents(&scene.path("to")), before, "{more:?}");
    }
    // A revision is nothing that the driver takes for the machine's own.
    scene.ends(
        0,
        &[
            "import",
            "a.vmfold",
            "--to",
            "to",
            "--as-revision",
            "appvms/work/private.img",
        ],
    );
    assert_eq!(contents(&scene.path("to")).len(), before.len() + 1);
}

/// Kills imports while they give images their names, until one was in the middle of it: it has left its work folder, and some names.
fn killed_while_naming(scene: &Scene, reset: impl Fn(), start: impl Fn() -> Child) {
    const TRIES: u32 = 200;
    let is_named = || {
        let entries = std::fs::read_dir(scene.path("to")).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name().into_encoded_bytes());
        names.any(|name| name.starts_with(b"new") && !name.ends_with(b"~"))
    };
    for _ in 0..TRIES {
        reset();
        let mut child = start();
        while child.try_wait().unwrap().is_none() && !is_named() {
            std::thread::yield_now();
        }
        let _ = child.kill();
        child.wait().unwrap();
        let journals = sh(&format!(
            "cat {}/.vmfold-import-*/journal 2>/dev/null | grep -c placed || true",
            scene.path("to").display()
        ));
        if is_named() && journals.trim().parse::<u32>().is_ok_and(|placed| placed > 0) {
            return;
        }
    }
    panic!("no import of {TRIES} was killed in the middle");
}

/// Names of images that a test makes many of.
fn many() -> Vec<Vec<u8>> {
    (0..200).map(|n| format!("new{n}.img").into_bytes()).collect()
}

#[test]
fn what_is_gone_on_with_is_the_same_commit() {
    if !can_mount() {
        return;
    }
    let names = many();
    let scene = Scene::new(&names.iter().map(Vec::as_slice).collect::<Vec<_>>());
    for name in &names {
        std::fs::write(scene.fs.pool().join(OsStr::from_bytes(name)), Random(77).data(1 << 20)).unwrap();
    }
    scene.ends(0, &["export", "a.vmfold", "pool"]);
    let archive = || File::open(scene.path("a.vmfold")).unwrap();
    let import = |more: &[&str]| {
        let mut command = scene.command(&[&["import", "-", "--to", "to"], more].concat());
        command.stdin(archive()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let reset = || {
        let _ = std::fs::remove_dir_all(scene.path("to"));
    };
    killed_while_naming(&scene, reset, || import(&["--commit", "1"]));
    let output = import(&["--resume"]).wait_with_output().unwrap();
    // Names that the other commit's images have are not given away; whatever ends well has restored the commit that was asked for.
    let said = text(&output);
    match output.status.code() {
        Some(0) => assert_eq!(contents(&scene.path("to")), contents(&scene.fs.pool())),
        Some(2) => assert!(said.contains("exist"), "{said}"),
        code => panic!("{code:?} {said}"),
    }
    let output = import(&["--resume", "--replace"]).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    assert_eq!(contents(&scene.path("to")), contents(&scene.fs.pool()));
}

#[test]
fn what_was_replaced_by_a_killed_import_does_not_stay() {
    if !can_mount() {
        return;
    }
    let names = many();
    let scene = Scene::new(&names.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let old = scene.path("old");
    std::fs::create_dir(&old).unwrap();
    for name in &names {
        std::fs::write(old.join(OsStr::from_bytes(name)), b"old").unwrap();
    }
    let to = scene.path("to");
    let reset = || {
        sh(&format!("rm -rf {0}; cp -r {1} {0}", to.display(), old.display()));
    };
    let start = || {
        let mut command = scene.command(&["import", "a.vmfold", "--to", "to", "--replace"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        // Old names look like new ones: what tells them apart is that something was placed.
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            let placed = sh(&format!(
                "cat {}/.vmfold-import-*/journal 2>/dev/null | grep -c placed || true",
                to.display()
            ));
            if placed.trim() != "0" {
                break;
            }
        }
        child
    };
    killed_while_naming(&scene, reset, start);
    scene.ends(0, &["import", "a.vmfold", "--to", "to", "--replace", "--resume"]);
    assert_eq!(contents(&to), contents(&scene.fs.pool()));
    assert_eq!(sh(&format!("find {} -name '.vmfold*'", to.display())), "");
}

#[test]
fn revisions_that_a_killed_import_made_are_not_made_twice() {
    if !can_mount() {
        return;
    }
    let names = many();
    let scene = Scene::new(&names.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let reset = || {
        let _ = std::fs::remove_dir_all(scene.path("to"));
    };
    let start = || {
        let mut command = scene.command(&["import", "a.vmfold", "--to", "to", "--as-revision"]);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    killed_while_naming(&scene, reset, start);
    scene.ends(0, &["import", "a.vmfold", "--to", "to", "--as-revision", "--resume"]);
    assert_eq!(contents(&scene.path("to")).len(), names.len());
}
