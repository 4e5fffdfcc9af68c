//! What an import that is refused leaves, and what it says. It takes neither root nor a filesystem that shares.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

struct Refused {
    folder: tempfile::TempDir,
}

impl Refused {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("pool")).unwrap();
        Self { folder }
    }

    fn write(&self, name: &str, content: &[u8]) {
        std::fs::write(self.folder.path().join(name), content).unwrap();
    }

    fn sh(&self, command: &str) -> String {
        let mut bash = Command::new("bash");
        let output = bash
            .args(["-ec", command])
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{command}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn run(&self, shell: &str, arguments: &str) -> Output {
        let binary = env!("CARGO_BIN_EXE_vmfold");
        let command = format!("{shell}; exec {binary} {arguments}");
        let mut bash = Command::new("bash");
        bash.args(["-c", &command]).current_dir(self.folder.path());
        bash.stdin(std::process::Stdio::null()).output().unwrap()
    }

    /// Runs an import, which must end with a code. Returns what it prints.
    fn ends(&self, code: i32, arguments: &str) -> String {
        let output = self.run("true", arguments);
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments}: {text}");
        text
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join(folder)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn exists(&self, name: &str) -> bool {
        self.folder.path().join(name).symlink_metadata().is_ok()
    }
}

#[test]
fn what_no_other_run_can_use_is_not_left() {
    let scene = Refused::new();
    scene.write("pool/x.img", b"content");
    scene.sh("tar -cf good.tar -C pool x.img; cp good.tar twice.tar; tar -rf twice.tar -C pool x.img");
    scene.sh("(cat good.tar; echo more) >followed.tar; head -c 600 good.tar >cut.tar");
    for (code, arguments, said) in [
        (2, "import good.tar nosuch", "no image of this backup matches"),
        (1, "import twice.tar", "it has `x.img` twice"),
        (1, "import twice.tar --partial", "it has `x.img` twice"),
        (4, "import followed.tar", "something follows its end"),
        (4, "import cut.tar", "it ends too early"),
    ] {
        let text = scene.ends(code, &format!("{arguments} --to new/deeper"));
        assert!(text.contains(said) && !text.contains("kept"), "{arguments}: {text}");
        assert!(!scene.exists("new"), "{arguments}");
        // A folder that was there before stays.
        scene.sh("mkdir -p there");
        scene.ends(code, &format!("{arguments} --to there"));
        assert!(scene.names("there").is_empty(), "{arguments}");
    }
    scene.ends(0, "import good.tar x.img --to new/deeper");
    assert_eq!(scene.names("new/deeper"), ["x.img"]);
}

#[test]
fn names_of_a_tar_archive_stay() {
    let scene = Refused::new();
    let long = format!("{}.img", "n".repeat(240));
    let mut names = ["disk (1).img", "naïve.img", "100%.img", "-a.img", " b .img", &long];
    for name in names {
        scene.write(&format!("pool/{name}"), name.as_bytes());
    }
    scene.sh("tar -cf a.tar -C pool .");
    let text = scene.ends(0, "import a.tar --to new");
    assert!(
        !text.contains("another name") && !text.contains("longer name"),
        "{text}"
    );
    names.sort_unstable();
    assert_eq!(scene.names("new"), names);
    scene.sh("diff -r pool new");
    // What cannot stay is said.
    scene.sh("touch $'pool/a\\nb.img'; tar -cf b.tar -C pool $'a\\nb.img'");
    let text = scene.ends(0, "import b.tar --to other");
    assert!(text.contains("`a%0ab.img` has another name in the backup"), "{text}");
    assert_eq!(scene.names("other"), ["a%0ab.img"]);
}

#[test]
fn more_images_are_restored_than_files_can_be_open() {
    let scene = Refused::new();
    for number in 0..1500 {
        scene.write(&format!("pool/{number}.img"), format!("{number}").as_bytes());
    }
    scene.sh("tar -cf many.tar -C pool .");
    let output = scene.run("ulimit -n 300", "import many.tar --to new");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    scene.sh("diff -r pool new");
}

#[test]
fn holes_of_a_raw_image_are_not_read() {
    let scene = Refused::new();
    scene.sh("truncate -s 200G sparse.img; echo a | dd of=sparse.img bs=1M seek=5000 conv=notrunc status=none");
    scene.sh("echo b | dd of=sparse.img bs=1 seek=200000000001 conv=notrunc status=none");
    let begun = Instant::now();
    scene.ends(0, "import sparse.img --raw --to new");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    let (is, was) = [Path::new("new/sparse.img"), Path::new("sparse.img")]
        .map(|path| scene.folder.path().join(path).metadata().unwrap())
        .into();
    assert_eq!(is.size(), was.size());
    assert!(is.blocks() * 512 <= 1 << 20, "{}", is.blocks());
    let read = |name: &str, at: u64| scene.sh(&format!("dd if={name} bs=1 skip={at} count=2 status=none"));
    for at in [5000 << 20, 200_000_000_001] {
        assert_eq!(read("new/sparse.img", at), read("sparse.img", at));
    }
}

#[test]
fn what_is_wrong_with_a_file_or_an_option_is_said() {
    let scene = Refused::new();
    scene.write("raw.img", &[7; 8192]);
    scene.write("disk.qed", b"QED\0 and so on");
    scene.write("there", b"");
    scene.sh("mkfifo fifo; tar -cf a.tar raw.img");
    for (code, arguments, said) in [
        (2, "import raw.img --to new", "--raw"),
        (2, "import fifo --to new", "not a regular file"),
        (2, "import pool --to new", "not a regular file"),
        (1, "import disk.qed --to new", "QED"),
        (2, "import raw.img --backing a.tar --to new", "--backing"),
        (2, "import a.tar --qubes --skeleton there", ""),
        (2, "import a.tar --skeleton new", "--qubes"),
        (2, "import a.tar $'[\\e' --to new", "is no pattern"),
    ] {
        let text = scene.ends(code, arguments);
        assert!(text.contains(said), "{arguments}: {text}");
        assert!(
            !text.contains("--replace") && !text.contains('\x1b'),
            "{arguments}: {text}"
        );
        assert!(!scene.exists("new"), "{arguments}");
    }
    let text = scene.ends(2, "import a.tar --skeleton new");
    assert!(!text.contains("--to"), "{text}");
}
