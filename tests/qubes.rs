//! Goal: a backup of Qubes OS gets into a running one, byte for byte and shared, and no volume is touched that the user did not name; whatever fails
//! on the way, a second run goes on. Method: backups that the usual tools make, a stand-in for `qubesd` that speaks its published protocol and fails
//! at any call, and a real btrfs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;
#[allow(dead_code, reason = "the tests of foreign backups use the rest")]
#[path = "foreign/qvm.rs"]
mod qvm;
#[path = "foreign/qvm3_maker.rs"]
mod qvm3_maker;
#[path = "qubes/stand_in.rs"]
mod stand_in;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::time::Duration;

use common::{Mounted, Random, can_mount, sh};
use qvm::Machine;
use qvm3_maker::Maker;
use stand_in::{Fault, StandIn};
use vmfold::error::{Error, ErrorKind, Result};
use vmfold::exec::restore::RestoreOptions;
use vmfold::foreign::Passphrase;
use vmfold::monitor::{Monitor, Silent};
use vmfold::ops::import::ImportOptions;
use vmfold::ops::import::qubes::{QubesOptions, import};
use vmfold::ops::{ArchivePlace, BackupAccess};
use vmfold::qubes::{RESTORE_TAG, SocketQubesd, Timeouts};
use vmfold::report::QubesImport;

const MIB: usize = 1 << 20;
const TEMPLATE: &str = "TemplateVM";

/// The machines of the backup: two have the same blocks, and two have nothing beside images.
fn machines() -> Vec<Machine> {
    let mut random = Random(7);
    let common = random.data(3 * MIB);
    let few = random.data(4096);
    let mut with = |own: usize| [&random.data(own)[..], &common, &vec![0; MIB]].concat();
    vec![
        Machine {
            folder: "vm3",
            class: TEMPLATE,
            name: "debian-12",
            files: vec![
                ("root.img", with(MIB)),
                ("private.img", [vec![0; MIB], few, vec![0; MIB]].concat()),
            ],
        },
        Machine {
            folder: "vm7",
            class: "AppVM",
            name: "work",
            files: vec![
                ("private.img", with(MIB + 512)),
                ("firewall.xml", b"<firewall/>".to_vec()),
                ("notes.txt", b"of work\n".to_vec()),
            ],
        },
        Machine {
            folder: "vm9",
            class: "AppVM",
            name: "vault",
            files: vec![("private.img", with(4096))],
        },
    ]
}

/// Bytes of the distinct blocks of all images, without zeros.
fn distinct_bytes(machines: &[Machine]) -> u64 {
    let files = machines.iter().flat_map(|machine| &machine.files);
    let images = files.filter(|(name, _)| Path::new(name).extension().is_some_and(|one| one == "img"));
    let blocks = images.flat_map(|(_, content)| content.chunks(4096).map(<[u8]>::to_vec));
    let distinct: BTreeSet<Vec<u8>> = blocks.filter(|block| block.iter().any(|byte| *byte != 0)).collect();
    distinct.len() as u64 * 4096
}

fn make(folder: &Path, filter: &str) -> PathBuf {
    let (machines_folder, backup) = (folder.join("machines"), folder.join("backup"));
    qvm::write_machines(&machines_folder, &machines());
    qvm::make_backup(&machines_folder, &backup, filter, 300_000, "--sparse");
    std::fs::write(folder.join("pass"), "secret\n").unwrap();
    backup
}

/// Makes a backup of the same machines in version 3.
fn make_3(folder: &Path, filter: &'static str, is_encrypted: bool) -> PathBuf {
    let told = |machine: Machine| match machine.class {
        TEMPLATE => (
            "vm-templates/debian-12",
            "QubesTemplateVm",
            3,
            "template_qid=\"none\"",
            machine.files,
        ),
        _ if machine.name == "work" => {
            let files = machine.files.into_iter().filter(|(name, _)| *name != "notes.txt");
            ("appvms/work", "QubesAppVm", 7, "template_qid=\"3\"", files.collect())
        }
        _ => ("appvms/vault", "QubesAppVm", 8, "template_qid=\"3\"", machine.files),
    };
    let machines: Vec<qvm3_maker::Machine> = machines().into_iter().map(told).collect();
    let backup = folder.join("backup");
    std::fs::write(&backup, Maker::new(filter, 300_000, is_encrypted).make(&machines)).unwrap();
    std::fs::write(folder.join("pass"), "secret\n").unwrap();
    backup
}

/// The files of a stream of archives, each with its name and content.
fn files_of(stream: &[u8]) -> Vec<(String, Vec<u8>)> {
    let text = |field: &[u8]| String::from_utf8_lossy(field.split(|byte| *byte == 0).next().unwrap()).into_owned();
    let (mut files, mut at) = (Vec::new(), 0);
    while at < stream.len() {
        let header = &stream[at..at + 512];
        at += 512;
        if header.iter().all(|byte| *byte == 0) {
            continue;
        }
        let size = usize::from_str_radix(text(&header[124..136]).trim(), 8).unwrap();
        if header[156] == b'0' {
            files.push((text(&header[..100]), stream[at..at + size].to_vec()));
        }
        at += size.next_multiple_of(512);
    }
    files
}

fn vmfold(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
    command
        .env_clear()
        .current_dir(folder)
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn a_skeleton_is_the_backup_without_its_images() {
    for filter in ["none", "gzip", "bzip2", "xz", "zstd"] {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let backup = make(at, filter);
        // The home folder of dom0 is left out.
        sh(&format!(
            "cd '{0}'; mkdir dom0-home; echo home > dom0-home/user.000.enc; tar -cO --posix dom0-home/user.000.enc >> backup",
            at.display()
        ));
        let arguments = [
            "import",
            "backup",
            "--qubes",
            "--skeleton",
            "new skeleton",
            "--passphrase-file",
            "pass",
        ];
        let output = vmfold(at, &arguments);
        assert_eq!(output.status.code(), Some(0), "{filter}: {}", text(&output.stderr));
        let printed = text(&output.stdout);
        let command = "qvm-backup-restore --ignore-missing --skip-dom0-home 'new skeleton'\n";
        assert!(printed.contains(command), "{printed}");
        let skeleton = at.join("new skeleton");
        assert_eq!(skeleton.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        let mut found = files_of(&std::fs::read(&skeleton).unwrap());
        let made = found.split_off(found.len() - 2);
        let mut expected = files_of(&std::fs::read(&backup).unwrap());
        expected.retain(|(name, _)| !name.contains(".img.") && !name.starts_with("dom0-home/"));
        assert!(found == expected, "{filter}");
        let names: Vec<&str> = made.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["vm3/empty.000.enc", "vm9/empty.000.enc"]);
        assert_ne!(made[0].1[16..48], made[1].1[16..48], "the salts are the same");
        // Upstream's own tools read each part, as its reader runs them.
        let decompress = if filter == "none" {
            String::new()
        } else {
            format!("--use-compress-program={filter}")
        };
        let listed = sh(&format!(
            "cd '{0}'; mkdir out; tar -ixf 'new skeleton' -C out; cd out
             printf %s 'backup-header!secret' | scrypt dec -P backup-header.hmac | cmp - backup-header
             for part in $(find . -name '*.enc' | sort); do
               name=${{part#./}}; name=${{name%.enc}}
               printf %s \"20260101T000000-4242!$name!secret\" | scrypt dec -P $name.enc $name
             done
             cat qubes.xml.0?? | tar {decompress} -xO | cmp - ../machines/qubes.xml
             for n in 3 9; do tar {decompress} -tvf vm$n/empty.000; done | awk '{{ print $1, $3, $6 }}'
             tar {decompress} -xOf vm7/notes.txt.000",
            at.display()
        ));
        assert_eq!(
            listed, "-rw------- 0 vm3/empty\n-rw------- 0 vm9/empty\nof work\n",
            "{filter}"
        );
        // Nothing is overwritten.
        let again = vmfold(at, &arguments);
        assert_eq!(again.status.code(), Some(2), "{}", text(&again.stderr));
        assert_eq!(
            std::fs::read(&skeleton).unwrap().len() as u64,
            skeleton.metadata().unwrap().size()
        );
        assert_no_backup(at, "new skeleton");
    }
}

/// Checks that a skeleton is called what it is, from a file and a pipe, and that nothing is restored of it.
fn assert_no_backup(folder: &Path, skeleton: &str) {
    for command in [
        "vmfold list SKELETON",
        "vmfold verify SKELETON",
        "vmfold import SKELETON --to of-file",
        "cat SKELETON | vmfold import - --to of-pipe",
        "vmfold import SKELETON --to in-part --partial",
        "vmfold import SKELETON --qubes --skeleton another",
    ] {
        let line = command
            .replace("SKELETON", &format!("'{skeleton}'"))
            .replace("vmfold", env!("CARGO_BIN_EXE_vmfold"));
        let output = Command::new("bash")
            .current_dir(folder)
            .args(["-c", &format!("{line} --passphrase-file pass")])
            .output()
            .unwrap();
        let text = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{command}: {text}");
        assert!(text.contains("it is a skeleton"), "{command}: {text}");
    }
    assert!(!folder.join("another").exists());
    for to in ["of-file", "of-pipe", "in-part"] {
        // What was staged may stay.
        let is_work = |entry: &std::fs::DirEntry| entry.file_name().to_str().unwrap().starts_with(".vmfold-import-");
        let mut entries = std::fs::read_dir(folder.join(to)).into_iter().flatten();
        assert!(entries.all(|entry| is_work(&entry.unwrap())), "{to}");
    }
}

#[test]
fn a_skeleton_of_version_3_is_the_backup_without_its_images_as_well() {
    for (filter, is_encrypted) in [("gzip", true), ("gzip", false), ("none", true), ("bzip2", true)] {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let backup = make_3(at, filter, is_encrypted);
        let output = vmfold(
            at,
            &[
                "import",
                "backup",
                "--qubes",
                "--skeleton",
                "s",
                "--passphrase-file",
                "pass",
            ],
        );
        assert_eq!(output.status.code(), Some(0), "{filter}: {}", text(&output.stderr));
        let command = "qvm-backup-restore --ignore-missing --skip-dom0-home s\n";
        assert!(text(&output.stdout).contains(command), "{}", text(&output.stdout));
        assert!(text(&output.stderr).contains("someone exchanged parts"));
        let mut found = files_of(&std::fs::read(at.join("s")).unwrap());
        let made = found.split_off(found.len() - 4);
        let mut expected = files_of(&std::fs::read(&backup).unwrap());
        expected
            .retain(|(name, _)| !name.contains(".img.") && !name.contains("/..") && !name.starts_with("dom0-home/"));
        assert!(found == expected, "{filter}");
        assert!(
            expected
                .iter()
                .any(|(name, _)| name.ends_with("/firewall.xml.000.hmac"))
        );
        let [template, vault] = if is_encrypted {
            ["vm3", "vm8"]
        } else {
            ["vm-templates/debian-12", "appvms/vault"]
        };
        let names: Vec<&str> = made.iter().map(|(name, _)| name.as_str()).collect();
        let expected = [template, vault].map(|folder| [".000", ".000.hmac"].map(|end| format!("{folder}/empty{end}")));
        assert_eq!(names, expected.concat());
        // The tools of upstream's reader find each hash right.
        sh(&format!(
            "set -e; cd '{}'; mkdir out; tar -ixf s -C out; cd out
             for hash in $(find . -name '*.hmac'); do
               [ \"$(openssl dgst -sha512 -hmac secret < ${{hash%.hmac}} | sed 's/.*= *//')\" = \"$(sed 's/.*= *//' < $hash)\" ]
             done",
            at.display()
        ));
        assert_no_backup(at, "s");
    }
}

#[test]
fn a_skeleton_from_a_pipe_names_the_machines_that_were_chosen() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    make(at, "gzip");
    let vmfold = env!("CARGO_BIN_EXE_vmfold");
    let printed = sh(&format!(
        "cd '{}'; cat backup | {vmfold} import - --qubes --skeleton s --passphrase-file pass 'v*' work --json",
        at.display()
    ));
    let json: serde_json::Value = serde_json::from_str(&printed).unwrap();
    assert_eq!(json["machines"], serde_json::json!(["vault", "work"]));
    assert_eq!(
        json["command"],
        serde_json::json!(["qvm-backup-restore", "--ignore-missing", "s", "vault", "work"])
    );
    check_schema(&json);
    // All machines are in it, so that none is made without what it has.
    let names: Vec<String> = files_of(&std::fs::read(at.join("s")).unwrap())
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.contains(&"vm3/empty.000.enc".to_owned()), "{names:?}");
}

/// What upstream's reader makes of a skeleton: machines, whether something was imported into their volumes, and how many errors there were.
fn restored_by_upstream(client: &std::ffi::OsStr, skeleton: &Path) -> (String, String) {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/qubes/restore-upstream.py");
    let mut command = Command::new("python3");
    let output = command.arg(script).arg(client).arg(skeleton).output().unwrap();
    (text(&output.stdout), text(&output.stderr))
}

/// What upstream's reader makes of a skeleton: `VMFOLD_QUBES_CLIENT` names a checkout of qubes-core-admin-client, and its Python has lxml.
#[test]
fn upstream_makes_machines_of_a_skeleton() {
    let Some(client) = std::env::var_os("VMFOLD_QUBES_CLIENT") else {
        println!("NOT RUN: VMFOLD_QUBES_CLIENT names no checkout of qubes-core-admin-client");
        return;
    };
    for filter in ["none", "gzip", "zstd"] {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let machines_folder = at.join("machines");
        qvm::write_machines(&machines_folder, &machines());
        // What its reader wants of a description, and vmfold does not read.
        let label = "<property name=\"label\">label-1</property></properties>";
        let dom0 = "<properties/><labels><label id=\"label-1\">red</label></labels><domains><domain class=\"AdminVM\"><properties></properties></domain>";
        let xml = std::fs::read_to_string(machines_folder.join("qubes.xml")).unwrap();
        let xml = xml.replacen("<domains>", dom0, 1).replace("</properties>", label);
        std::fs::write(machines_folder.join("qubes.xml"), xml).unwrap();
        qvm::make_backup(&machines_folder, &at.join("backup"), filter, 300_000, "--sparse");
        std::fs::write(at.join("pass"), "secret\n").unwrap();
        let arguments = [
            "import",
            "backup",
            "--qubes",
            "--skeleton",
            "s",
            "--passphrase-file",
            "pass",
        ];
        assert_eq!(vmfold(at, &arguments).status.code(), Some(0));
        let restore = |name: &str| restored_by_upstream(&client, &at.join(name));
        let (made, problems) = restore("s");
        let expected =
            "debian-12 TemplateVM: root False, private False\nwork AppVM: private False\nvault AppVM: private False\n";
        assert_eq!(made, format!("{expected}errors: 0\n"), "{problems}");
        // It fails if nothing is there of a machine.
        let mut members = qvm::members(&std::fs::read(at.join("s")).unwrap());
        members.retain(|(name, _)| name != "vm9/empty.000.enc");
        std::fs::write(at.join("without"), qvm::stream(&members)).unwrap();
        let (made, problems) = restore("without");
        assert_eq!(made, format!("{expected}errors: 1\n"));
        assert!(problems.contains("Not found in archive"), "{problems}");
    }
    for (filter, is_encrypted) in [("gzip", true), ("gzip", false), ("none", true)] {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        make_3(at, filter, is_encrypted);
        let arguments = [
            "import",
            "backup",
            "--qubes",
            "--skeleton",
            "s",
            "--passphrase-file",
            "pass",
        ];
        assert_eq!(vmfold(at, &arguments).status.code(), Some(0));
        let (made, problems) = restored_by_upstream(&client, &at.join("s"));
        let expected = "debian-12 TemplateVM: root False, private False\nwork AppVM: private False\nvault AppVM: private False\nerrors: 0\n";
        assert_eq!(made, expected, "{problems}");
    }
}

#[test]
fn what_is_damaged_or_of_another_kind_gives_no_skeleton() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let backup = std::fs::read(make(at, "gzip")).unwrap();
    let members = qvm::members(&backup);
    let without = |name: &str| {
        let kept = members.iter().filter(|(one, _)| one != name).cloned();
        qvm::stream(&kept.collect::<Vec<_>>())
    };
    let mut flipped = backup.clone();
    let hmac = members
        .iter()
        .position(|(name, _)| name == "backup-header.hmac")
        .unwrap();
    let start: usize = qvm::stream(&members[..hmac]).len();
    flipped[start + members[hmac].1.len() - 512 + 100] ^= 1;
    let (cut, other) = (backup[..backup.len() - 700].to_vec(), b"\x1f\x8b\x08nothing".to_vec());
    for (what, bytes, code) in [
        ("flipped", flipped, 4),
        ("cut", cut, 4),
        ("no-header", without("backup-header.hmac"), 4),
        ("no-xml", without("qubes.xml.000.enc"), 4),
        ("no-firewall", [without("x"), members[2].1.clone()].concat(), 4),
        ("other", other, 1),
        ("text", b"nothing at all".to_vec(), 2),
    ] {
        std::fs::write(at.join(what), bytes).unwrap();
        let arguments = [
            "import",
            what,
            "--qubes",
            "--skeleton",
            "s",
            "--passphrase-file",
            "pass",
        ];
        let output = vmfold(at, &arguments);
        let code_is = output.status.code();
        assert!(
            code_is == Some(code) || (what == "other" && code_is == Some(4)),
            "{what}: {code_is:?} {}",
            text(&output.stderr)
        );
        assert!(!at.join("s").exists(), "{what}");
    }
    std::fs::write(at.join("pass"), "wrong").unwrap();
    let output = vmfold(
        at,
        &[
            "import",
            "backup",
            "--qubes",
            "--skeleton",
            "s",
            "--passphrase-file",
            "pass",
        ],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("the passphrase is another one"));
    assert!(!at.join("s").exists());
}

fn check_schema(document: &serde_json::Value) {
    let schema = serde_json::from_str(include_str!("../formats/report-v1.schema.json")).unwrap();
    let schema = jsonschema::validator_for(&schema).unwrap();
    let problems: Vec<_> = schema.iter_errors(document).map(|error| error.to_string()).collect();
    assert!(problems.is_empty(), "{problems:?} in {document}");
}

/// A monitor that keeps what it was told.
#[derive(Default)]
struct Notes {
    notes: Mutex<Vec<String>>,
    silent: Silent,
}

impl Monitor for Notes {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, message: &str) {
        self.notes.lock().unwrap().push(message.to_owned());
    }
    fn interrupted(&self) -> bool {
        self.silent.interrupted()
    }
}

/// A pool with the machines of the backup, which are blank.
struct Scene {
    fs: Mounted,
    folder: tempfile::TempDir,
    qubesd: StandIn,
    notes: Notes,
}

impl Scene {
    fn new() -> Self {
        Self::on(Mounted::btrfs())
    }

    fn on(fs: Mounted) -> Self {
        Self::of(fs, |folder| {
            make(folder, "zstd");
        })
    }

    /// A pool on a filesystem, beside a backup that is made in a folder.
    fn of(fs: Mounted, make: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        make(folder.path());
        let qubesd = StandIn::new(&fs.mount.join("qubes"));
        qubesd.add("debian-12", TEMPLATE, &["root", "private"]);
        qubesd.add("work", "AppVM", &["private"]);
        qubesd.add("vault", "AppVM", &["private"]);
        Self {
            fs,
            folder,
            qubesd,
            notes: Notes::default(),
        }
    }

    fn run(&self, only: &[&str], renamed: &[(&str, &str)], replace: bool) -> Result<QubesImport> {
        let timeouts = Timeouts {
            answer: Duration::from_secs(1),
            commit: Duration::from_secs(1),
        };
        let owned = |text: &&str| (*text).to_owned();
        let options = QubesOptions {
            import: ImportOptions {
                archive: ArchivePlace::File(self.folder.path().join("backup")),
                commit: None,
                restore: RestoreOptions {
                    only: only.iter().map(owned).collect(),
                    replace,
                    ..RestoreOptions::default()
                },
                seeds: Vec::new(),
                index: self.fs.index(),
                memory_bytes: None,
                dry_run: false,
                access: BackupAccess {
                    prompt: |_| Ok(Passphrase::new(b"secret".to_vec())),
                    ..BackupAccess::default()
                },
            },
            renamed: renamed.iter().map(|(old, new)| (owned(old), owned(new))).collect(),
            daemon: &SocketQubesd::new(self.qubesd.sockets.path(), timeouts),
        };
        let mut report = import(&options, &self.notes)?;
        match report.failed.take() {
            Some(error) => Err(error),
            None => Ok(report),
        }
    }

    fn notes(&self) -> String {
        std::mem::take(&mut *self.notes.notes.lock().unwrap()).join("\n")
    }

    /// The images of the pool, and what the backup has for them.
    fn images(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let machines = machines();
        let images = machines.iter().flat_map(|machine| {
            let of = machine
                .files
                .iter()
                .filter_map(|(name, content)| Some((name.strip_suffix(".img")?, content)));
            of.map(|(volume, content)| (self.qubesd.image(machine.name, machine.class, volume), content.clone()))
        });
        images.collect()
    }

    /// How many images of the pool are those of the backup.
    fn restored(&self) -> usize {
        let is_whole = |(path, content): &(PathBuf, Vec<u8>)| std::fs::read(path).unwrap() == *content;
        self.images().iter().filter(|one| is_whole(one)).count()
    }

    /// The files of the pool, with what each takes on the disk.
    fn files(&self) -> BTreeMap<PathBuf, u64> {
        let entries = walkdir::WalkDir::new(&self.qubesd.pool)
            .into_iter()
            .map(|entry| entry.unwrap());
        let files = entries.filter(|entry| entry.file_type().is_file());
        files
            .map(|entry| {
                let path = entry.path().strip_prefix(&self.qubesd.pool).unwrap().to_owned();
                (path, entry.metadata().unwrap().blocks())
            })
            .collect()
    }

    /// The folder of an unfinished run.
    fn work(&self) -> Option<PathBuf> {
        let entries = std::fs::read_dir(&self.qubesd.pool).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        let mut found: Vec<PathBuf> = paths
            .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with(".vmfold"))
            .collect();
        assert!(found.len() < 2, "{found:?}");
        found.pop()
    }

    /// Checks that all is restored, and nothing of a run is left.
    fn check_done(&self) {
        assert_eq!(self.restored(), 4);
        assert_eq!(self.qubesd.tags(), 0);
        assert_eq!(self.work(), None);
        assert!(
            self.files()
                .keys()
                .all(|path| !path.to_str().unwrap().contains("-import"))
        );
    }
}

#[test]
fn machines_come_back_whole_and_shared() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let before = scene.fs.used();
    let sockets = scene.qubesd.sockets.path().display().to_string();
    let index = scene.fs.index().display().to_string();
    let run = |more: &[&str]| {
        let begin = ["import", "backup", "--passphrase-file", "pass", "--qubes", "--json"];
        let end = ["--qubesd-socket", &sockets, "--index", &index];
        vmfold(scene.folder.path(), &[&begin, more, &end].concat())
    };
    let dry = run(&["-n"]);
    assert_eq!(dry.status.code(), Some(0), "{}", text(&dry.stderr));
    check_schema(&serde_json::from_slice(&dry.stdout).unwrap());
    assert_eq!((scene.restored(), scene.work()), (0, None));
    assert!(scene.qubesd.orders().is_empty(), "a dry run orders nothing");
    let output = run(&[]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    check_schema(&json);
    assert_eq!(json["filled"].as_array().unwrap().len(), 4);
    assert_eq!(json["filled"][2]["machine"], "work");
    scene.check_done();
    let orders = scene.qubesd.orders();
    let size = std::fs::metadata(scene.qubesd.image("debian-12", TEMPLATE, "root"))
        .unwrap()
        .len();
    assert_eq!(
        orders[..6],
        [
            format!("admin.vm.tag.Set debian-12 {RESTORE_TAG}"),
            format!("internal.vm.volume.ImportBegin debian-12 root {size}"),
            "internal.vm.volume.ImportEnd debian-12 root ok".into(),
            format!("internal.vm.volume.ImportBegin debian-12 private {}", 2 * MIB + 4096),
            "internal.vm.volume.ImportEnd debian-12 private ok".into(),
            format!("admin.vm.tag.Remove debian-12 {RESTORE_TAG}"),
        ]
    );
    // Blocks are there once, whoever has them, in spite of a copy before a start and of the blank revision.
    let (taken, distinct) = (scene.fs.used() - before, distinct_bytes(&machines()));
    assert!(
        taken >= distinct && taken < distinct + MIB as u64,
        "{taken} for {distinct}"
    );
    let revision = scene.qubesd.pool.join("appvms/work/private.img.1@2026-01-01T00:00:00Z");
    assert_eq!(revision.metadata().unwrap().blocks(), 0);
    // A second run finds volumes that are not blank, and leaves them.
    let state = common::state_of(&scene.qubesd.pool);
    let again = run(&[]);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again.stderr).contains("not blank"), "{}", text(&again.stderr));
    assert_eq!(common::state_of(&scene.qubesd.pool), state);
    assert!(scene.qubesd.orders().is_empty());
    scene.fs.check();
}

#[test]
fn they_come_back_on_xfs_as_well() {
    if !can_mount() {
        return;
    }
    let scene = Scene::on(Mounted::new("mkfs.xfs -q -m reflink=1", "", 512));
    scene.run(&[], &[], false).unwrap();
    scene.check_done();
    let image = scene.qubesd.image("vault", "AppVM", "private");
    let extents = sh(&format!("filefrag -v '{}'", image.display()));
    assert!(extents.contains("shared"), "{extents}");
}

#[test]
fn they_come_back_from_a_backup_in_version_3_as_well() {
    if !can_mount() {
        return;
    }
    for is_encrypted in [true, false] {
        let scene = Scene::of(Mounted::btrfs(), |folder| {
            make_3(folder, "gzip", is_encrypted);
        });
        let report = scene
            .run(&["work", "vm-templates/debian-12/private.img"], &[], false)
            .unwrap();
        let filled: Vec<String> = report
            .filled
            .iter()
            .map(|filled| format!("{}:{}", filled.machine, filled.volume))
            .collect();
        assert_eq!(filled, ["debian-12:private", "work:private"]);
        scene
            .run(&["vault", "vm-templates/debian-12/root.img"], &[], false)
            .unwrap();
        scene.check_done();
        scene.fs.check();
    }
}

fn refuses_without_daemon(scene: &Scene) {
    let output = vmfold(
        scene.folder.path(),
        &["import", "backup", "--qubes", "--qubesd-socket", "/nowhere"],
    );
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("nobody answers at `/nowhere/qubesd.sock`"));
}

#[test]
fn what_the_user_did_not_name_is_not_touched() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let taken = scene.qubesd.image("work", "AppVM", "private");
    std::fs::write(&taken, b"what the user has").unwrap();
    sh(&format!("sync -f '{}'", taken.display()));
    let refuses = |only: &[&str], renamed: &[(&str, &str)], replace, words: &str| {
        let state = common::state_of(&scene.qubesd.pool);
        let error = scene.run(only, renamed, replace).expect_err(words);
        assert!(matches!(error.kind(), ErrorKind::Usage | ErrorKind::InUse), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(common::state_of(&scene.qubesd.pool), state, "{words}");
        assert!(scene.qubesd.orders().is_empty(), "{words}");
        assert_eq!(scene.work(), None);
    };
    refuses(&[], &[], false, "`work:private`");
    refuses(&["work"], &[], false, "not blank");
    refuses(&[], &[], true, "not blank");
    refuses(&["w*"], &[], true, "not blank");
    refuses(&["vault"], &[("vault", "work")], false, "not blank");
    refuses(&["vault", "work"], &[("vault", "work")], true, "two machines");
    refuses(&["vault"], &[("vault", "new")], false, "do not exist here: new");
    refuses(&["none"], &[], false, "no machine");
    scene
        .qubesd
        .state
        .lock()
        .unwrap()
        .machines
        .get_mut("vault")
        .unwrap()
        .state = "Running";
    refuses(&["vault"], &[], false, "its state is Running");
    scene
        .qubesd
        .state
        .lock()
        .unwrap()
        .machines
        .get_mut("vault")
        .unwrap()
        .state = "Halted";
    std::fs::write(scene.qubesd.pool.join("appvms/vault/private-dirty.img"), b"newest").unwrap();
    refuses(&["vault"], &[], false, "not shut down in order");
    std::fs::remove_file(scene.qubesd.pool.join("appvms/vault/private-dirty.img")).unwrap();
    let tags = || scene.qubesd.state.lock().unwrap();
    tags()
        .machines
        .get_mut("vault")
        .unwrap()
        .tags
        .insert(RESTORE_TAG.into());
    refuses(&["vault"], &[], false, "another program");
    tags().machines.get_mut("vault").unwrap().tags.clear();
    let removed = tags().machines.get_mut("vault").unwrap().volumes.remove("private");
    refuses(&["vault"], &[], false, "is not kept when its machine stops");
    tags()
        .machines
        .get_mut("vault")
        .unwrap()
        .volumes
        .insert("private", removed.unwrap());
    tags().is_lvm = true;
    refuses(&["vault"], &[], false, "no file-reflink pool");
    tags().is_lvm = false;
    refuses_without_daemon(&scene);
    // What is named is replaced, and becomes a revision.
    let report = scene.run(&["work"], &[], true).unwrap();
    assert!(report.filled[0].replaced);
    let revision = scene.qubesd.pool.join("appvms/work/private.img.1@2026-01-01T00:00:00Z");
    assert_eq!(std::fs::read(revision).unwrap(), b"what the user has");
    assert_eq!(scene.notes(), "");
    // Where no revisions are kept, that is said.
    tags().machines.get_mut("work").unwrap().volumes.insert("private", 0);
    scene.run(&["appvms/work"], &[], true).unwrap();
    assert!(scene.notes().contains("`work:private` held before is gone"));
    // A machine may have another name here.
    scene.qubesd.add("vault-1", "AppVM", &["private"]);
    scene.run(&["vault"], &[("vault", "vault-1")], false).unwrap();
    let content = |name: &str| std::fs::read(scene.qubesd.image(name, "AppVM", "private")).unwrap();
    assert_eq!(content("vault-1"), machines()[2].files[0].1);
    assert!(content("vault").iter().all(|byte| *byte == 0));
}

/// Calls that fail in turn.
const CALLS: [&str; 6] = [
    "vm.List",
    "CurrentState",
    "tag.Set",
    "ImportBegin",
    "ImportEnd",
    "tag.Remove",
];

#[test]
fn whatever_call_fails_a_second_run_goes_on() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let blank = || {
        for machine in machines() {
            let volumes: Vec<&'static str> = machine
                .files
                .iter()
                .filter_map(|(name, _)| name.strip_suffix(".img"))
                .collect();
            let folder = scene.qubesd.image(machine.name, machine.class, "x");
            std::fs::remove_dir_all(folder.parent().unwrap()).unwrap();
            scene.qubesd.add(machine.name, machine.class, &volumes);
        }
    };
    for call in CALLS {
        for (after, fault) in [
            (0, Fault::Refuse),
            (1, Fault::Refuse),
            (0, Fault::Close { is_done: false }),
            (1, Fault::Close { is_done: true }),
            (0, Fault::Say(b"2".to_vec())),
            (0, Fault::Say(b"0\0\xff\xfe".to_vec())),
            (1, Fault::Hang),
            (0, Fault::Flood),
        ] {
            if call == "vm.List" && after > 0 {
                continue;
            }
            let what = format!("{call} {after} {fault:?}");
            scene.qubesd.fail(call, after, fault);
            let error = scene.run(&[], &[], false).expect_err(&what);
            assert!(matches!(error, Error::Qubesd { .. }), "{what}: {error:?}");
            let is_begun = call != "vm.List";
            assert_eq!(scene.work().is_some(), is_begun, "{what}");
            if call != "tag.Remove" {
                assert_eq!(scene.qubesd.tags(), 0, "{what}");
            } else if scene.qubesd.tags() > 0 {
                assert!(scene.notes().contains("qvm-tags"), "{what}");
            }
            scene.qubesd.heal();
            let report = scene
                .run(&[], &[], false)
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(
                report.imported.is_none(),
                is_begun,
                "{what}: images are not restored twice"
            );
            scene.check_done();
            blank();
            scene.notes();
        }
    }
    scene.fs.check();
}

#[test]
fn a_path_that_is_no_new_file_of_the_volume_is_not_written_to() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let folder = scene.qubesd.pool.join("appvms/work");
    let size = machines()[1].files[0].1.len();
    let at = |name: &str| folder.join(name);
    let victim = scene.fs.mount.join("victim");
    for path in [&victim, &at("full-import.img"), &at("linked-import.img")] {
        std::fs::write(path, vec![7; size]).unwrap();
    }
    std::fs::hard_link(at("linked-import.img"), at("other")).unwrap();
    std::os::unix::fs::symlink(&victim, at("link-import.img")).unwrap();
    sh(&format!("mkfifo '{}'", at("fifo-import.img").display()));
    std::fs::create_dir(at("folder-import.img")).unwrap();
    std::fs::File::create(at("short-import.img"))
        .unwrap()
        .set_len(4096)
        .unwrap();
    std::fs::File::create(scene.fs.mount.join("outside"))
        .unwrap()
        .set_len(size as u64)
        .unwrap();
    sh(&format!("sync -f '{}'", folder.display()));
    let state = common::state_of(&scene.fs.mount);
    let shown = |path: PathBuf| path.display().to_string();
    let paths = [
        "/etc/passwd".to_owned(),
        "/dev/null".to_owned(),
        "/".to_owned(),
        "relative".to_owned(),
        String::new(),
        shown(victim),
        shown(scene.fs.mount.join("outside")),
        shown(at("full-import.img")),
        shown(at("linked-import.img")),
        shown(at("link-import.img")),
        shown(at("fifo-import.img")),
        shown(at("folder-import.img")),
        shown(at("short-import.img")),
        shown(at("private.img")) + "/../full-import.img",
        shown(at("..")),
        shown(scene.qubesd.image("work", "AppVM", "none")),
    ];
    for path in paths {
        let answer = format!("0\0{size} {path}").into_bytes();
        scene.qubesd.fail("ImportBegin", 0, Fault::Say(answer));
        let error = scene.run(&["work"], &[], false).expect_err(&path);
        assert!(
            matches!(error, Error::Qubesd { .. } | Error::Io { .. }),
            "{path}: {error:?}"
        );
        assert_eq!(scene.qubesd.tags(), 0, "{path}");
        let now = common::state_of(&scene.fs.mount);
        let is_work = |path: &&PathBuf| path.to_str().unwrap().contains("/.vmfold-qubes-");
        assert_eq!(now.len() - now.keys().filter(is_work).count(), state.len(), "{path}");
        assert!(state.iter().all(|(one, is)| now.get(one) == Some(is)), "{path}");
    }
    scene.qubesd.heal();
    scene.run(&["work"], &[], false).unwrap();
    assert_eq!(scene.restored(), 1);
}

#[test]
fn a_volume_that_was_written_to_after_an_unclear_end_is_left_as_it_is() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    scene.qubesd.fail("ImportEnd", 0, Fault::Close { is_done: true });
    assert!(scene.run(&["work"], &[], false).is_err());
    let image = scene.qubesd.image("work", "AppVM", "private");
    let mut content = std::fs::read(&image).unwrap();
    assert!(content == machines()[1].files[0].1, "it was done");
    content[70_000] ^= 1;
    std::fs::write(&image, &content).unwrap();
    scene.qubesd.heal();
    let error = scene.run(&["work"], &[], false).err().unwrap();
    assert!(error.to_string().contains("not blank"), "{error}");
    assert!(std::fs::read(&image).unwrap() == content);
    // Unless the user says so.
    scene.run(&["work"], &[], true).unwrap();
    assert_eq!(scene.restored(), 1);
    assert_eq!(scene.work(), None);
}

#[test]
fn a_machine_that_was_started_meanwhile_keeps_what_it_has() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let image = scene.qubesd.image("vault", "AppVM", "private");
    scene.qubesd.fail("tag.Set", 2, Fault::Started(image.clone()));
    let error = scene.run(&[], &[], false).expect_err("it was started");
    assert!(error.to_string().contains("is not any more"), "{error}");
    assert_eq!((scene.restored(), scene.qubesd.tags()), (3, 0));
    assert_eq!(std::fs::read(&image).unwrap(), b"what the user has");
    let again = scene.run(&[], &[], false).expect_err("it is not blank");
    assert!(
        again.to_string().contains("are left as they are: `vault:private`"),
        "{again}"
    );
    assert_eq!(std::fs::read(&image).unwrap(), b"what the user has");
}

#[test]
fn a_run_that_could_not_restore_all_images_leaves_nothing() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let path = scene.folder.path().join("backup");
    let backup = std::fs::read(&path).unwrap();
    let mut damaged = backup.clone();
    let at = backup.iter().rposition(|byte| *byte != 0).unwrap();
    damaged[at] ^= 1;
    std::fs::write(&path, damaged).unwrap();
    let error = scene.run(&[], &[], false).expect_err("it is damaged");
    assert!(matches!(error, Error::DamagedBackup { .. }), "{error:?}");
    assert!(scene.qubesd.orders().is_empty());
    // Blocks of a backup that is read in order serve no other run.
    let notes = scene.notes();
    assert!(!notes.contains("kept") && !notes.contains("--resume"), "{notes}");
    assert_eq!(scene.work(), None);
    std::fs::write(&path, backup).unwrap();
    scene.run(&[], &[], false).unwrap();
    scene.check_done();
}

#[test]
fn a_run_that_is_killed_or_interrupted_is_gone_on_with() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let sockets = scene.qubesd.sockets.path().display().to_string();
    let index = scene.fs.index().display().to_string();
    let spawn = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(scene.folder.path());
        let arguments = [
            "import",
            "backup",
            "--passphrase-file",
            "pass",
            "--qubes",
            "--index",
            &index,
        ];
        command
            .args(arguments)
            .args(["--qubesd-socket", &sockets])
            .spawn()
            .unwrap()
    };
    let wait_for = |call: &str| {
        let deadline = std::time::Instant::now() + Duration::from_mins(1);
        let is_there = || {
            scene
                .qubesd
                .state
                .lock()
                .unwrap()
                .calls
                .iter()
                .any(|one| one.contains(call))
        };
        while !is_there() {
            assert!(std::time::Instant::now() < deadline, "{call}");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    // Between the beginning of an import and its end.
    scene.qubesd.fail("ImportEnd", 1, Fault::Hang);
    let mut child = spawn();
    wait_for("ImportEnd debian-12 private");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!((scene.qubesd.tags(), scene.restored()), (1, 1));
    assert!(
        scene
            .qubesd
            .pool
            .join("vm-templates/debian-12/private-import.img")
            .exists()
    );
    assert!(!scene.qubesd.orders().is_empty());
    // A second run is kept off as long as one goes on.
    scene.qubesd.fail("ImportEnd", 0, Fault::Hang);
    let mut child = spawn();
    wait_for("ImportEnd debian-12 private");
    let error = scene.run(&[], &[], false).err().unwrap();
    assert!(matches!(error, Error::Restoring { .. }), "{error:?}");
    child.kill().unwrap();
    child.wait().unwrap();
    // The user stops a run.
    scene.qubesd.heal();
    scene.notes.silent.stop();
    let error = scene.run(&[], &[], false).err().unwrap();
    assert!(matches!(error, Error::Interrupted), "{error:?}");
    let output = spawn().wait().unwrap();
    assert_eq!(output.code(), Some(0));
    scene.check_done();
}
