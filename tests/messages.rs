//! Goal: messages say what is, and what helps. Method: for each that once misled, the situation, and what is said there now.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use common::{Mounted, Random, can_mount, sh};

/// A folder of images as Qubes OS has them, and an archive of it. The second commit has one machine less.
struct Scene {
    folder: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let scene = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let mut random = Random(21);
        for (name, mib) in [
            ("pool/appvms/work/private.img", 3),
            ("pool/appvms/work/private.img.3@2026-01-01T00:00:00Z", 2),
            ("pool/appvms/vault/private.img", 1),
        ] {
            std::fs::create_dir_all(scene.path(name).parent().unwrap()).unwrap();
            std::fs::write(scene.path(name), random.data(mib << 20)).unwrap();
        }
        assert_eq!(code(&scene.run("export a.vmf pool")), 0);
        std::fs::remove_file(scene.path("pool/appvms/vault/private.img")).unwrap();
        assert_eq!(code(&scene.run("export a.vmf pool")), 0);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(self.folder.path());
        command.args(arguments.split_whitespace());
        if ["export", "import"].iter().any(|verb| arguments.starts_with(verb)) {
            command.args(["--index", "index"]);
        }
        command
    }

    fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs vmfold with a file as standard input.
    fn run_from(&self, file: &str, arguments: &str) -> Output {
        let input = std::fs::File::open(self.path(file)).unwrap();
        self.command(arguments).stdin(Stdio::from(input)).output().unwrap()
    }

    /// Makes the beginning of the archive a file of its own.
    fn cut(&self, bytes: usize) {
        let whole = std::fs::read(self.path("a.vmf")).unwrap();
        std::fs::write(self.path("cut.vmf"), &whole[..bytes]).unwrap();
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

/// All that was printed.
fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .concat()
}

#[test]
fn an_archive_that_is_cut_before_its_first_commit() {
    let scene = Scene::new();
    scene.cut(100_000);
    let verified = text(&scene.run("verify cut.vmf"));
    assert!(verified.starts_with("0 commits with 0 images, "), "{verified}");
    assert!(verified.lines().next().unwrap().ends_with(": damaged"), "{verified}");
    let partial = scene.run("import cut.vmf --partial --to out");
    assert_eq!(code(&partial), 4);
    assert_eq!(
        text(&partial),
        "error: the archive `cut.vmf` is damaged: it ends before its first COMMIT, and nothing of it can be restored\n"
    );
    // What was done is not recommended.
    let piped = scene.run_from("cut.vmf", "import - --partial --to out");
    assert_eq!(code(&piped), 4);
    assert!(!text(&piped).contains("--partial"), "{}", text(&piped));
}

#[test]
fn two_archives_in_one_file() {
    let scene = Scene::new();
    let one = scene.run("export - pool");
    let two = scene.run("export - pool");
    std::fs::write(scene.path("both.vmf"), [one.stdout, two.stdout].concat()).unwrap();
    let listed = text(&scene.run("list both.vmf"));
    assert!(
        listed.contains("holds more than these: vmfold verify tells what"),
        "{listed}"
    );
    let verified = scene.run("verify both.vmf");
    assert_eq!(code(&verified), 4);
    assert!(!text(&verified).contains("all intact"), "{}", text(&verified));
}

#[test]
fn a_part_of_what_was_exported_is_compared_with_that_part() {
    let scene = Scene::new();
    for folder in ["pool/appvms/work", "pool/appvms", "pool"] {
        let same = scene.run(&format!("diff a.vmf --pool {folder}"));
        assert_eq!(code(&same), 0, "{}", text(&same));
        assert!(
            text(&same).starts_with("2 of 2 images are the same in "),
            "{}",
            text(&same)
        );
    }
    let part = text(&scene.run("diff a.vmf 1 --pool pool/appvms/work"));
    assert!(
        part.contains("is `appvms/work` of what was exported: only that is compared"),
        "{part}"
    );
    assert!(part.starts_with("2 of 2 images"), "{part}");
}

#[test]
fn an_image_of_an_older_commit_is_found_there() {
    let scene = Scene::new();
    let older = scene.run("import a.vmf appvms/vault --to out");
    assert_eq!(code(&older), 2);
    let told = text(&older);
    assert!(
        told.contains("no image of commit 2 (") && told.contains("but one of commit 1 ("),
        "{told}"
    );
    assert!(told.contains("name the commit by --commit"), "{told}");
    let nowhere = text(&scene.run("import a.vmf appvms/none --to out"));
    assert!(
        nowhere.ends_with(") matches (vmfold list shows what there is)\n"),
        "{nowhere}"
    );
}

#[test]
fn revisions_are_told_by_name_and_command() {
    let scene = Scene::new();
    for how in ["--dry-run", ""] {
        let done = scene.run(&format!("import a.vmf --as-revision --to out {how}"));
        assert_eq!(code(&done), 0, "{}", text(&done));
        let told = String::from_utf8_lossy(&done.stdout).into_owned();
        let line = told
            .lines()
            .find(|line| line.starts_with("appvms/work/private.img "))
            .unwrap();
        assert!(line.contains("appvms/work/private.img.1@20"), "{line}");
        assert!(
            line.ends_with("; to go back to it: qvm-volume revert work:private 1"),
            "{line}"
        );
        // A revision that is in the archive is not asked for.
        assert!(told.contains("1 image to `out`"), "{told}");
    }
    let asked = scene.run("import a.vmf appvms/work/*@* --as-revision --to out");
    assert!(
        text(&asked).contains("qvm-volume revert work:private 2"),
        "{}",
        text(&asked)
    );
}

#[test]
fn what_does_not_fit_is_told_in_units() {
    let scene = Scene::new();
    let refused = scene.run("import a.vmf --to out --work-space 1M");
    assert_eq!(code(&refused), 1);
    let told = text(&refused);
    let digits = told.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap();
    assert!(digits < 7, "{told}");
}

#[test]
fn a_choice_that_leaves_no_image_is_told() {
    let scene = Scene::new();
    let none = scene.run("export new.vmf pool --only none --revisions 1");
    assert_eq!(code(&none), 2);
    assert_eq!(
        text(&none),
        "error: no image in `pool` matches --only `none` and --revisions: vmfold report --images shows what there is\n"
    );
    assert!(!scene.path("new.vmf").exists(), "an archive of 0 bytes");
    // The same of an export that fails later.
    let failed =
        scene.run("export new.vmf pool/appvms/work/private.img --parity 5 --level 3 --label x --index /dev/null/none");
    assert_eq!(scene.path("new.vmf").exists(), code(&failed) == 0, "{}", text(&failed));
}

#[test]
fn an_archive_is_nothing_for_a_terminal() {
    let scene = Scene::new();
    let binary = env!("CARGO_BIN_EXE_vmfold");
    let terminal = format!("script -qec '{binary} export - pool --index index' /dev/null");
    let output = Command::new("sh")
        .args(["-c", &terminal])
        .current_dir(scene.folder.path())
        .output();
    let printed = text(&output.unwrap());
    assert!(printed.contains("an archive is nothing for a terminal"), "{printed}");
}

#[test]
fn what_reads_a_file_says_so_of_a_pipe() {
    let scene = Scene::new();
    for verb in ["list", "verify", "diff", "protect", "repair --dry-run"] {
        let output = scene.run(&format!("{verb} -"));
        assert_eq!(code(&output), 2, "{verb}");
        assert!(
            text(&output).contains("reads a file, and no pipe: save the archive first"),
            "{}",
            text(&output)
        );
    }
}

#[test]
fn help_names_what_it_is_for() {
    let scene = Scene::new();
    let version = scene.run("version");
    assert_eq!(version.stdout, scene.run("--version").stdout);
    let help = text(&scene.run("--help"));
    assert!(help.contains("btrfs and on XFS"), "{help}");
    // An option that there is not is no path.
    let unknown = text(&scene.run("reclaim -x pool"));
    assert!(!unknown.contains("-- -x"), "{unknown}");
}

#[test]
fn one_is_not_told_as_many() {
    let scene = Scene::new();
    let one = scene.run("export one.vmf pool/appvms/work/private.img");
    let all = [
        one,
        scene.run("verify one.vmf"),
        scene.run("list one.vmf"),
        scene.run("import one.vmf --to one"),
    ];
    for output in &all {
        let told = text(output);
        for wrong in [" 1 images", "1 commits", "1 machines", "(1 extents", "Commit 0 ()"] {
            assert!(!format!(" {told}").contains(wrong), "{told}");
        }
    }
}

#[test]
fn documents_count_images_by_one_name() {
    let scene = Scene::new();
    for arguments in [
        "--json verify a.vmf",
        "--json diff a.vmf 2 2",
        "--json import a.vmf --to out --index index",
    ] {
        let document: serde_json::Value = serde_json::from_slice(&scene.run(arguments).stdout).unwrap();
        let images = &document["images"];
        let count = images.as_array().map(|images| images.len() as u64).or(images.as_u64());
        assert_eq!(document["image_count"].as_u64(), count, "{document}");
    }
    let listed: serde_json::Value = serde_json::from_slice(&scene.run("--json list a.vmf").stdout).unwrap();
    assert_eq!(listed["commits"][0]["image_count"], 3);
}

#[test]
fn quiet_is_one_line() {
    let scene = Scene::new();
    for arguments in [
        "-q list a.vmf",
        "-q verify a.vmf",
        "-q diff a.vmf --pool pool/appvms",
        "-q import a.vmf --to out --index index",
    ] {
        let output = scene.run(arguments);
        assert_eq!(code(&output), 0, "{}", text(&output));
        assert_eq!(
            (text(&output).lines().count(), output.stderr.len()),
            (1, 0),
            "{}",
            text(&output)
        );
    }
}

#[test]
fn running_machines_are_one_line_and_no_failure_for_timers() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let mut open = Vec::new();
    for machine in ["personal", "vault", "work"] {
        let folder = fs.pool().join("appvms").join(machine);
        std::fs::create_dir_all(&folder).unwrap();
        for name in [
            "private.img",
            "root.img",
            "private.img.1@2026-01-01T00:00:00Z",
            "root.img.1@2026-01-01T00:00:00Z",
        ] {
            std::fs::write(folder.join(name), [7; 8192]).unwrap();
        }
        open.push(std::fs::File::open(folder.join("private.img")).unwrap());
    }
    std::fs::write(fs.pool().join("idle.img"), [8; 8192]).unwrap();
    sh(&format!("sync -f {}", fs.pool().display()));
    let output = fs.vmfold("reclaim --dry-run");
    assert_eq!(code(&output), 3);
    let told = text(&output);
    assert!(
        told.contains("12 images of 3 running machines left alone (personal, vault, work)\n"),
        "{told}"
    );
    let named = text(&fs.vmfold("-v reclaim --dry-run"));
    assert!(named.contains("appvms/vault/root.img"), "{named}");
    assert_eq!(code(&fs.vmfold("reclaim --dry-run --ok-if-in-use")), 0);
    assert_eq!(code(&fs.vmfold("report")), 0);
    drop(open);
}

/// The README installs where `sudo` finds it, which is not where `cargo install` does.
#[test]
fn what_is_installed_is_found_by_sudo() {
    let readme = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    assert!(readme.contains("sudo install target/release/vmfold /usr/local/bin/"));
    assert!(!readme.contains("cargo install"));
}
