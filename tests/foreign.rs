//! Goal: a backup that another program made is restored byte for byte, each distinct block once; whatever of it is missing, damaged or hostile is
//! said, and nothing wrong gets a name. Method: backups that the usual tools compress, and such as are written here from published layouts, read
//! by the library alone, and by the command on a real btrfs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;
#[path = "foreign/compressed.rs"]
mod compressed;
#[path = "foreign/containers.rs"]
mod containers;
#[path = "foreign/damaged.rs"]
mod damaged;
#[path = "foreign/disks.rs"]
mod disks;
#[path = "foreign/exported.rs"]
mod exported;
#[path = "foreign/listed.rs"]
mod listed;
#[path = "foreign/made.rs"]
mod made;
#[path = "foreign/qvm.rs"]
mod qvm;
#[path = "foreign/qvm3.rs"]
mod qvm3;
#[path = "foreign/qvm3_maker.rs"]
mod qvm3_maker;
#[path = "foreign/qvm4.rs"]
mod qvm4;
#[path = "foreign/qvm_pipe.rs"]
mod qvm_pipe;
#[path = "foreign/refused.rs"]
mod refused;
#[path = "foreign/restored.rs"]
mod restored;
#[path = "foreign/tars.rs"]
mod tars;
#[path = "foreign/vma.rs"]
mod vma;
#[path = "foreign/vmas.rs"]
mod vmas;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use common::{Mounted, Random, can_mount, sh};
use qvm::Machine;
use vma::VmaMaker;
use vmfold::error::{Error, ErrorKind, Result};
use vmfold::foreign::{self, AskPassphrase, Event, Limits, OpenOptions, Passphrase};
use vmfold::monitor::{Monitor, Silent};
use vmfold::store::{MemoryStore, Store};

fn open_options<'a>(ask_passphrase: &'a AskPassphrase<'a>) -> OpenOptions<'a, 'static> {
    OpenOptions {
        limits: Limits::default(),
        ask_passphrase,
        checks_all: false,
        is_raw: false,
        backing: &[],
    }
}

/// A monitor that keeps what it is told.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Monitor for Notes {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
    fn interrupted(&self) -> bool {
        false
    }
}

impl Notes {
    /// What was noted when a backup was read, which must come whole.
    fn of(store: &dyn Store) -> Vec<String> {
        let notes = Self::default();
        read_store(store, &[], &notes, &mut BTreeMap::new()).unwrap();
        notes.0.into_inner().unwrap()
    }
}

fn is_backup(bytes: &[u8]) -> bool {
    foreign::is_backup(bytes, &bytes[bytes.len().saturating_sub(512)..])
}

/// What came whole of a backup, by path, and how reading it ended.
fn read(bytes: &[u8]) -> (BTreeMap<PathBuf, Vec<u8>>, Result<()>) {
    let mut whole = BTreeMap::new();
    let result = read_into(bytes, &mut whole);
    (whole, result)
}

fn read_into(bytes: &[u8], whole: &mut BTreeMap<PathBuf, Vec<u8>>) -> Result<()> {
    read_store(&MemoryStore::of(bytes.to_vec()), &[], &Silent::default(), whole)
}

fn read_store(
    store: &dyn Store,
    backing: &[Box<dyn Store>],
    monitor: &dyn Monitor,
    whole: &mut BTreeMap<PathBuf, Vec<u8>>,
) -> Result<()> {
    let ask = || Ok(Passphrase::new(b"secret".to_vec()));
    let options = OpenOptions {
        backing,
        ..open_options(&ask)
    };
    let mut backup = foreign::open(store, &options, monitor)?;
    let mut volumes: Vec<(PathBuf, Vec<u8>)> = Vec::new();
    let mut buffer = Vec::new();
    while let Some(event) = backup.next(&mut buffer)? {
        match event {
            Event::Volume(volume) => volumes.push((volume.path, Vec::new())),
            Event::Data { volume, offset } => {
                let content = &mut volumes[volume].1;
                let (start, end) = (
                    usize::try_from(offset).unwrap(),
                    usize::try_from(offset).unwrap() + buffer.len(),
                );
                content.resize(content.len().max(end), 0);
                content[start..end].copy_from_slice(&buffer);
            }
            Event::Link { volume, path } => {
                let content = whole[&volumes[volume].0].clone();
                whole.insert(path, content);
            }
            Event::End { volume, size } => {
                let (path, content) = &mut volumes[volume];
                content.resize(usize::try_from(size).unwrap(), 0);
                whole.insert(path.clone(), std::mem::take(content));
            }
        }
    }
    Ok(())
}

/// Content of a volume: some blocks that can be compressed, some that cannot, some zeros.
fn content(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut content = Vec::with_capacity(length);
    while content.len() < length {
        let block = match random.below(4) {
            0 => vec![0; 4096],
            1 => random.data(4096),
            _ => format!("line {} of {seed}\n", random.below(50))
                .into_bytes()
                .repeat(300),
        };
        content.extend(block);
    }
    content.truncate(length);
    content
}

/// The archive that most tests use: an odd size, a size of a few bytes, a machine's memory, and a configuration.
fn some_vma(order: u64, per_extent: usize) -> VmaMaker<'static> {
    VmaMaker {
        devices: vec![
            (b"drive-scsi0", content(1, 500_000)),
            (b"drive-efidisk0", content(2, 540_672)),
            (b"vmstate", content(3, 131_072)),
            (b"drive-tpmstate0-backup", content(4, 17)),
        ],
        configs: vec![(b"qemu-server.conf", b"name: work\n".to_vec())],
        order,
        per_extent,
        ..VmaMaker::default()
    }
}

fn expected_of(maker: &VmaMaker<'_>) -> BTreeMap<PathBuf, Vec<u8>> {
    let text = |name: &[u8]| String::from_utf8(name.to_vec()).unwrap();
    let volumes = maker.devices.iter().filter(|(name, _)| *name != b"vmstate");
    volumes
        .map(|(name, content)| (PathBuf::from(text(name) + ".raw"), content.clone()))
        .chain(
            maker
                .configs
                .iter()
                .map(|(name, content)| (PathBuf::from(text(name)), content.clone())),
        )
        .collect()
}

/// Runs a command on some bytes, and returns what it writes.
fn piped(command: &str, bytes: &[u8]) -> Vec<u8> {
    let mut child = Command::new("bash")
        .args(["-c", command])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || std::io::Write::write_all(&mut stdin, bytes));
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{command}");
    output.stdout
}

/// Reads a backup to its end, and looks at what is told.
fn events(bytes: &[u8]) -> Result<()> {
    let (store, monitor) = (MemoryStore::of(bytes.to_vec()), Silent::default());
    let mut backup = foreign::open(
        &store,
        &open_options(&|| Ok(Passphrase::new(b"secret".to_vec()))),
        &monitor,
    )?;
    let (mut sizes, mut buffer) = (Vec::new(), Vec::new());
    while let Some(event) = backup.next(&mut buffer)? {
        match event {
            Event::Volume(volume) => {
                let mut components = volume.path.components();
                assert!(components.all(|component| matches!(component, std::path::Component::Normal(_))));
                sizes.push(volume.size.unwrap());
            }
            Event::Data { volume, offset } => assert!(offset + buffer.len() as u64 <= sizes[volume]),
            Event::End { volume, size } => assert_eq!(size, sizes[volume]),
            Event::Link { volume, .. } => assert!(volume < sizes.len()),
        }
    }
    Ok(())
}

/// Damage is found: what came whole before it is what was written, and the error says where it is.
fn assert_nothing_wrong(bytes: &[u8], expected: &BTreeMap<PathBuf, Vec<u8>>, what: &str) {
    let (whole, result) = read(bytes);
    for (path, content) in &whole {
        // The configuration comes out of the header, before anything shows that the rest is damaged.
        assert!(expected.get(path) == Some(content), "{what}: {}", path.display());
    }
    match result {
        Ok(()) => assert_eq!(whole.len(), expected.len(), "{what}: something is missing"),
        Err(error) => assert!(
            matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
            "{what}: {error:?}"
        ),
    }
}

/// Three machines that have much in common, in an archive on a filesystem of its own, and the images that it must become.
struct Scene {
    fs: Mounted,
    expected: BTreeMap<PathBuf, Vec<u8>>,
}

impl Scene {
    fn new() -> Self {
        let fs = Mounted::btrfs();
        let base = content(1, 24 << 20);
        let mut other = base.clone();
        other[1 << 20..2 << 20].copy_from_slice(&content(2, 1 << 20));
        other.truncate((20 << 20) + 512);
        let maker = VmaMaker {
            devices: vec![(b"drive-scsi0", base), (b"drive-scsi1", other)],
            order: 3,
            per_extent: 58,
            ..some_vma(0, 0)
        };
        std::fs::write(fs.mount.join("a.vma"), maker.make()).unwrap();
        sh(&format!("cd '{}' && zstd -q a.vma -o a.vma.zst", fs.mount.display()));
        let expected = expected_of(&maker);
        Self { fs, expected }
    }

    fn import(&self, arguments: &str) -> std::process::Output {
        let mut command = self.fs.command();
        command.arg("import").args(arguments.split_whitespace());
        command.arg("--index").arg(self.fs.index());
        command.output().unwrap()
    }

    fn import_json(&self, arguments: &str) -> serde_json::Value {
        let output = self.import(&format!("{arguments} --json"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments}: {text}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn assert_restored(&self, to: &str) {
        let folder = self.fs.mount.join(to);
        let names: Vec<PathBuf> = std::fs::read_dir(&folder)
            .unwrap()
            .map(|entry| PathBuf::from(entry.unwrap().file_name()))
            .collect();
        assert_eq!(names.len(), self.expected.len(), "{names:?}");
        for (path, content) in &self.expected {
            assert!(
                std::fs::read(folder.join(path)).unwrap() == *content,
                "{}",
                path.display()
            );
        }
    }

    /// The distinct blocks that are not zeros, in bytes.
    fn distinct_bytes(&self) -> u64 {
        let mut seen = std::collections::HashSet::new();
        for content in self.expected.values() {
            for block in content.chunks(4096) {
                let mut block = block.to_vec();
                block.resize(4096, 0);
                if block.iter().any(|byte| *byte != 0) {
                    seen.insert(*blake3::hash(&block).as_bytes());
                }
            }
        }
        seen.len() as u64 * 4096
    }
}

/// A filesystem on which so many bytes, and not many more, are free.
fn nearly_full(free_mib: u64) -> Mounted {
    let small = Mounted::new("mkfs.btrfs -q", "", 128);
    let other = small.mount.join("other");
    let avail = || {
        sh(&format!("btrfs filesystem sync '{}'", small.mount.display()));
        let space = rustix::fs::statvfs(&small.mount).unwrap();
        space.f_bavail * space.f_frsize
    };
    let filler = Random(9).data(1 << 20);
    let mut file = std::fs::File::create(&other).unwrap();
    while avail() > free_mib << 20 {
        std::io::Write::write_all(&mut file, &filler).unwrap();
    }
    small
}
