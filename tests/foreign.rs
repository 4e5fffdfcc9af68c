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
#[path = "foreign/containers.rs"]
mod containers;
#[path = "foreign/disks.rs"]
mod disks;
#[path = "foreign/exported.rs"]
mod exported;
#[path = "foreign/made.rs"]
mod made;
#[path = "foreign/qvm.rs"]
mod qvm;
#[path = "foreign/qvm3.rs"]
mod qvm3;
#[path = "foreign/qvm3_maker.rs"]
mod qvm3_maker;
#[path = "foreign/qvm_pipe.rs"]
mod qvm_pipe;
#[path = "foreign/vma.rs"]
mod vma;

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

#[test]
fn a_vma_archive_comes_back_whatever_the_order_of_its_clusters() {
    for order in [0, 3, 7] {
        for per_extent in [1, 2, 58, 59] {
            let maker = some_vma(order, per_extent);
            let (whole, result) = read(&maker.make());
            result.unwrap();
            assert!(
                whole == expected_of(&maker),
                "order {order}, {per_extent} clusters an extent"
            );
        }
    }
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

/// How tools compress, with what they put into the stream that not all of them do.
const COMPRESSORS: [&str; 17] = [
    "zstd -q",
    "zstd -q -19 --long=27",
    "(head -c 200000 | zstd -q; zstd -q --no-check)",
    "gzip -n",
    "gzip -9 -N",
    "(head -c 200000 | gzip; gzip)",
    "bzip2",
    "(head -c 200000 | bzip2; bzip2)",
    "xz",
    "xz --check=sha256 --x86 --lzma2=dict=1MiB",
    "(head -c 200000 | xz --block-size=65536; xz)",
    "lz4 -q",
    "lz4 -q -B4 -BD -BX --content-size",
    "(head -c 200000 | lz4 -q -9 -B5; lz4 -q --no-frame-crc)",
    "lzop",
    "lzop -9 --crc32 -C",
    "(head -c 200000 | lzop; lzop -F)",
];

#[test]
fn what_tools_compress_is_read_and_so_is_what_they_wrote_one_after_the_other() {
    let maker = some_vma(5, 40);
    let (archive, expected) = (maker.make(), expected_of(&maker));
    let image = content(9, 300_001);
    for command in COMPRESSORS {
        let (whole, result) = read(&piped(command, &archive));
        result.unwrap_or_else(|error| panic!("{command}: {error}"));
        assert!(whole == expected, "{command}");
        let (whole, result) = read(&piped(command, &image));
        result.unwrap_or_else(|error| panic!("{command}: {error}"));
        let paths: Vec<&PathBuf> = whole.keys().collect();
        assert_eq!(whole.values().collect::<Vec<_>>(), [&image], "{command}: {paths:?}");
    }
}

/// How tar writes files, sparse or not.
const TAR_FORMS: [&str; 9] = [
    "--format=gnu --sparse",
    "--format=oldgnu --sparse",
    "--format=posix --sparse --sparse-version=0.0",
    "--format=posix --sparse --sparse-version=0.1",
    "--format=posix --sparse --sparse-version=1.0",
    "--format=posix",
    "--format=gnu",
    "--format=ustar",
    "--format=v7",
];

/// A folder of images as a pool has them: holes at either end and in between, pieces of any length, long names, hard links, nothing at all.
fn pool_of_files() -> (tempfile::TempDir, BTreeMap<PathBuf, Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let long = "n".repeat(90);
    let mut random = Random(21);
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for (name, length, pieces) in [
        ("appvms/work/root.img", 1 << 20, 60),
        ("appvms/work/private.img", 300_000 + 512, 5),
        ("hole.img", 1 << 20, 0),
        ("empty.img", 0, 0),
        ("small.conf", 777, 1),
    ] {
        let mut content = vec![0; length];
        for _ in 0..pieces {
            let at = usize::try_from(random.below(length as u64)).unwrap() / 4096 * 4096;
            let piece = random.data((length - at).min(6000));
            content[at..at + piece.len()].copy_from_slice(&piece);
        }
        let name = PathBuf::from(if name == "hole.img" {
            format!("{long}/{long}.img")
        } else {
            name.to_owned()
        });
        files.insert(name, content);
    }
    for (name, content) in &files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        qvm::write_sparse(&path, content);
    }
    std::fs::hard_link(
        folder.path().join("appvms/work/root.img"),
        folder.path().join("z-link.img"),
    )
    .unwrap();
    std::os::unix::fs::symlink("root.img", folder.path().join("appvms/work/link.img")).unwrap();
    let root = files[Path::new("appvms/work/root.img")].clone();
    files.insert(PathBuf::from("z-link.img"), root);
    (folder, files)
}

#[test]
fn a_tar_archive_comes_back_in_whatever_form_sparse_files_are_in_it() {
    let (folder, files) = pool_of_files();
    for form in TAR_FORMS {
        // Old forms have no room for such names.
        let without = if form.contains("v7") || form.contains("ustar") {
            "--exclude=nnn*"
        } else {
            ""
        };
        let bytes = piped(
            &format!(
                "cd '{}'; tar -c {form} {without} -f - --sort=name .",
                folder.path().display()
            ),
            b"",
        );
        if form.contains("v7") {
            assert!(!is_backup(&bytes), "nothing tells it from other bytes");
            continue;
        }
        let (whole, result) = read(&bytes);
        result.unwrap_or_else(|error| panic!("{form}: {error}"));
        let mut expected = files.clone();
        expected.retain(|path, _| without.is_empty() || !path.starts_with("n".repeat(90)));
        assert!(whole == expected, "{form}: {:?}", whole.keys().collect::<Vec<_>>());
        assert!(whole.len() > 4, "{form}");
        // Cut anywhere, it is damaged.
        let mut random = Random(22);
        // Two blocks of zeros are the end, and what tar puts behind them is no part of the archive.
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap().next_multiple_of(512) as u64 + 1024;
        for _ in 0..100 {
            let at = usize::try_from(random.below(end)).unwrap();
            let cut = &bytes[..at];
            if is_backup(cut) {
                let (whole, result) = read(cut);
                assert!(result.is_err(), "{form}: cut at {at}");
                assert!(
                    whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
                    "{form}"
                );
            }
        }
    }
}

#[test]
fn hostile_tar_archives_end_in_errors() {
    let (folder, _) = pool_of_files();
    let mut random = Random(23);
    for form in TAR_FORMS.iter().filter(|form| !form.contains("v7")) {
        let files = "appvms small.conf empty.img";
        let bytes = piped(
            &format!("cd '{}'; tar -c {form} -f - {files}", folder.path().display()),
            b"",
        );
        let headers: Vec<usize> = (0..bytes.len() / 512)
            .map(|block| block * 512)
            .filter(|at| bytes[at + 257..].starts_with(b"ustar"))
            .collect();
        for round in 0..2000 {
            let mut changed = bytes.clone();
            let at = headers[usize::try_from(random.below(headers.len() as u64)).unwrap()];
            // A header, what follows it (maps and pax records), or both.
            for _ in 0..=random.below(3) {
                let byte = usize::try_from(random.below(if round % 2 == 0 { 512 } else { 1536 })).unwrap();
                let value = match random.below(4) {
                    0 => 0x80,
                    1 => 0xff,
                    2 => b'9',
                    _ => u8::try_from(random.below(256)).unwrap(),
                };
                if let Some(place) = changed.get_mut(at + byte) {
                    *place = value;
                }
            }
            let sum: u32 = changed[at..at + 512]
                .iter()
                .enumerate()
                .map(|(place, byte)| {
                    if (148..156).contains(&place) {
                        32
                    } else {
                        u32::from(*byte)
                    }
                })
                .sum();
            changed[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            if is_backup(&changed)
                && let Err(error) = events(&changed)
            {
                assert!(
                    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
                    "{error:?}"
                );
            }
        }
    }
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

#[test]
fn more_files_or_longer_names_than_memory_has_room_for_are_refused() {
    let header = |name: &str, bytes: usize, kind: u8| {
        let mut header = [0u8; 512];
        header[..name.len().min(100)].copy_from_slice(&name.as_bytes()[..name.len().min(100)]);
        header[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar  \0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    };
    let files = |count: usize, name_bytes: usize| {
        let mut archive = Vec::new();
        for number in 0..count {
            let mut name = format!("{number:08}").into_bytes();
            name.resize(name_bytes.max(8), b'x');
            if name_bytes > 100 {
                archive.extend(header("././@LongLink", name.len(), b'L'));
                archive.extend(&name);
                archive.resize(archive.len().next_multiple_of(512), 0);
            }
            archive.extend(header(std::str::from_utf8(&name[..8]).unwrap(), 0, b'0'));
        }
        archive.extend([0; 1024]);
        archive
    };
    assert_eq!(read(&files(2000, 200)).0.len(), 2000);
    for (count, name_bytes) in [((1 << 16) + 1, 8), (2100, 4096)] {
        let text = read(&files(count, name_bytes)).1.unwrap_err().to_string();
        assert!(
            text.contains("it has more files than vmfold takes, or longer names"),
            "{text}"
        );
    }
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

#[test]
fn a_backup_that_is_cut_off_anywhere_is_damaged() {
    let maker = some_vma(5, 40);
    let (archive, expected) = (maker.make(), expected_of(&maker));
    let mut random = Random(11);
    for command in ["cat", "zstd -q", "gzip", "bzip2", "xz", "lz4 -q", "lzop"] {
        let bytes = piped(command, &archive);
        for round in 0..100 {
            let at = if round < 20 {
                round
            } else {
                usize::try_from(random.below(bytes.len() as u64)).unwrap()
            };
            let (whole, result) = read(&bytes[..at]);
            let error = result.expect_err(&format!("{command}: cut at {at} of {}", bytes.len()));
            assert!(
                matches!(error, Error::DamagedBackup { .. } | Error::RefusedBackup { .. }),
                "{command}: {error:?}"
            );
            assert!(
                whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
                "{command}: cut at {at}"
            );
        }
    }
}

#[test]
fn a_flipped_bit_is_found_or_changes_nothing() {
    let maker = VmaMaker {
        devices: vec![(b"drive-scsi0", content(1, 100_000)), (b"drive-scsi1", content(4, 17))],
        ..some_vma(5, 40)
    };
    let (archive, expected) = (maker.make(), expected_of(&maker));
    let mut random = Random(12);
    for command in ["zstd -q", "gzip", "bzip2", "xz", "lz4 -q", "lzop"] {
        let bytes = piped(command, &archive);
        for round in 0..1000 {
            let mut damaged = bytes.clone();
            let at = if round < 200 {
                round / 8
            } else {
                usize::try_from(random.below(bytes.len() as u64)).unwrap()
            };
            let bit = if round < 200 {
                round % 8
            } else {
                usize::try_from(random.below(8)).unwrap()
            };
            damaged[at] ^= 1 << bit;
            if is_backup(&damaged) {
                assert_nothing_wrong(&damaged, &expected, &format!("{command}: bit {bit} of byte {at}"));
            }
        }
    }
    // Without a compression around it, only the headers of a VMA archive are protected.
    for at in 0..12_288 + 512 {
        let mut damaged = archive.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(
            !is_backup(&damaged) || read(&damaged).1.is_err(),
            "byte {at} of the header"
        );
    }
}

#[test]
fn what_is_missing_or_there_twice_is_named() {
    let problem = |maker: VmaMaker<'_>| read(&maker.make()).1.unwrap_err().to_string();
    let with = |change: fn(&mut VmaMaker<'static>)| {
        let mut maker = some_vma(0, 5);
        change(&mut maker);
        problem(maker)
    };
    for (text, part) in [
        (
            with(|maker| maker.dropped = Some((1, 3))),
            "in `drive-efidisk0.raw`: 1 of its clusters are missing, the first at byte 196608",
        ),
        (with(|maker| maker.doubled = Some((0, 2))), "a cluster that came before"),
        (
            with(|maker| maker.sizes = vec![(0, 600_000)]),
            "in `drive-scsi0.raw`: 2 of its clusters are missing",
        ),
        (
            with(|maker| maker.sizes = vec![(0, 4096)]),
            "a cluster behind the end of its device",
        ),
        (
            with(|maker| maker.sizes = vec![(0, u64::MAX)]),
            "more than vmfold takes",
        ),
        (
            with(|maker| maker.change = Some(|header| header[7] = 2)),
            "a version that is not known",
        ),
        (
            with(|maker| maker.change = Some(|header| header[56] = 0xff)),
            "a length that is not allowed",
        ),
        (
            with(|maker| maker.change = Some(|header| header[48] = 0xff)),
            "texts that lie elsewhere",
        ),
        (
            with(|maker| maker.change = Some(|header| header[4128] = 0xff)),
            "a device has no name",
        ),
        (
            with(|maker| maker.change = Some(|header| header[3068] = 0xff)),
            "a configuration lies elsewhere",
        ),
        (
            with(|maker| maker.change_extent = Some(|header| header[7] ^= 1)),
            "another number of blocks",
        ),
        (
            with(|maker| maker.change_extent = Some(|header| header[8] ^= 1)),
            "an extent of this archive should begin here",
        ),
        (
            with(|maker| maker.change_extent = Some(|header| header[43] = 200)),
            "a device that is not there",
        ),
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn names_lead_nowhere() {
    let name = |name: &'static [u8]| {
        let maker = VmaMaker {
            devices: vec![(name, content(1, 5000))],
            per_extent: 5,
            ..VmaMaker::default()
        };
        read(&maker.make()).0.into_keys().next().unwrap()
    };
    assert_eq!(name(b"../../etc/shadow"), Path::new("%2e.%2f..%2fetc%2fshadow.raw"));
    assert_eq!(name(b"\xff\x1b[31m"), Path::new("%ff%1b%5b31m.raw"));
    assert!(name(&[b'x'; 255]).as_os_str().len() <= 255);
}

#[test]
fn names_that_are_shortened_are_noted_up_to_twenty_times() {
    let archive = |files: usize| {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..files {
            std::fs::write(folder.path().join(format!("{}{number}.img", "x".repeat(200))), b"a").unwrap();
        }
        std::fs::write(folder.path().join("short.img"), b"a").unwrap();
        piped(&format!("tar -cO -C '{}' .", folder.path().display()), b"")
    };
    for (files, notes) in [(0, 0), (1, 1), (20, 20), (30, 21)] {
        let noted = Notes::of(&MemoryStore::of(archive(files)));
        assert_eq!(noted.len(), notes, "{noted:?}");
        assert!(
            noted
                .iter()
                .take(20)
                .all(|note| note.contains("has a longer name in the backup"))
        );
    }
}

#[test]
fn what_asks_for_too_much_memory_or_is_no_image_is_refused() {
    let image = content(9, 300_000);
    let huge_window = piped(
        "zstd -q --ultra -22 --long=31",
        &[image.clone(), vec![1; 200 << 20]].concat(),
    );
    let huge_dictionary = piped("xz --lzma2=preset=0,dict=1GiB", &image);
    for (bytes, part) in [
        (huge_window, "its zstd does not go on"),
        (huge_dictionary, "its xz does not go on"),
        (piped("gzip | gzip", &image), "it is compressed twice"),
        (piped("gzip", b"\x89vmfold\nand so on"), "an archive of vmfold"),
        (piped("gzip", b"LUKS\xba\xbe and so on"), "an encrypted volume"),
    ] {
        let text = read(&bytes).1.unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
}

/// Two machines and a template, with something that is no image.
fn qubes_machines() -> Vec<Machine> {
    let mut private = vec![0; 700_000];
    private[300_000..400_000].copy_from_slice(&content(31, 100_000));
    vec![
        Machine {
            folder: "vm3",
            class: "TemplateVM",
            name: "debian-12",
            files: vec![("root.img", content(32, 400_000)), ("private.img", vec![0; 50_000])],
        },
        Machine {
            folder: "vm7",
            class: "AppVM",
            name: "work",
            files: vec![("private.img", private), ("firewall.xml", b"<firewall/>".to_vec())],
        },
    ]
}

fn qubes_expected() -> BTreeMap<PathBuf, Vec<u8>> {
    let machines = qubes_machines().into_iter().flat_map(|machine| {
        let parent = if machine.class == "TemplateVM" {
            "vm-templates"
        } else {
            "appvms"
        };
        let path = move |file: &str| Path::new(parent).join(machine.name).join(file);
        machine
            .files
            .into_iter()
            .map(move |(file, content)| (path(file), content))
    });
    machines.collect()
}

/// A backup of these machines.
fn qubes_backup(filter: &str, bytes: u64, tar_options: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    qvm::write_machines(folder.path(), &qubes_machines());
    let out = folder.path().join("backup");
    qvm::make_backup(folder.path(), &out, filter, bytes, tar_options);
    std::fs::read(out).unwrap()
}

#[test]
fn a_backup_of_qubes_comes_back_whatever_its_filter_and_its_parts() {
    for (filter, bytes, tar_options) in [
        ("gzip", 20_000, "--sparse"),
        ("none", 20_000, "--sparse"),
        ("zstd", 104_857_600, "--sparse"),
        ("xz", 5000, "--sparse"),
        ("bzip2", 50_000, "--sparse"),
        ("lzma", 50_000, "--sparse"),
        // Pools on LVM.
        ("gzip", 20_000, "--format=posix --sparse"),
        ("gzip", 20_000, "--format=gnu"),
    ] {
        let backup = qubes_backup(filter, bytes, tar_options);
        let (whole, result) = read(&backup);
        result.unwrap_or_else(|error| panic!("{filter}: {error}"));
        assert!(
            whole == qubes_expected(),
            "{filter}: {:?}",
            whole.keys().collect::<Vec<_>>()
        );
    }
}

#[test]
fn what_is_missing_of_a_backup_of_qubes_is_found_and_named() {
    let backup = qubes_backup("gzip", 5000, "--sparse");
    let all = qvm::members(&backup);
    assert!(read(&qvm::stream(&all)).1.is_ok());
    let named = |name: &str| all.iter().position(|(one, _)| one == name).unwrap();
    let last_of = |member: &str| all.iter().rposition(|(one, _)| one.starts_with(member)).unwrap();
    let without = |at: &[usize]| {
        let kept = all.iter().enumerate().filter(|(place, _)| !at.contains(place));
        qvm::stream(&kept.map(|(_, one)| one.clone()).collect::<Vec<_>>())
    };
    let swapped = |one: usize, other: usize| {
        let mut members = all.clone();
        // The content changes places, and the headers do not.
        let (a, b) = (members[one].1.clone(), members[other].1.clone());
        let header = |bytes: &[u8]| {
            let at = bytes.windows(6).position(|window| window == b"scrypt").unwrap();
            bytes[..at].to_vec()
        };
        let body = |bytes: &[u8]| bytes[header(bytes).len()..].to_vec();
        members[one].1 = [header(&a), body(&b)].concat();
        members[other].1 = [header(&b), body(&a)].concat();
        qvm::stream(&members)
    };
    let root = "vm3/root.img.";
    let parts = all.iter().filter(|(name, _)| name.starts_with(root)).count();
    assert!(parts > 3, "{parts}");
    let all_of: Vec<usize> = (0..all.len()).filter(|at| all[*at].0.starts_with(root)).collect();
    for (what, bytes, part) in [
        (
            "the last part",
            without(&[last_of(root)]),
            "in `vm-templates/debian-12/root.img`",
        ),
        (
            "a middle part",
            without(&[named("vm3/root.img.001.enc")]),
            "part 001 is missing, and 002 is there",
        ),
        (
            "the first part",
            without(&[named("vm3/root.img.000.enc")]),
            "part 000 is missing, and 001 is there",
        ),
        (
            "all parts",
            without(&all_of),
            "in `vm-templates/debian-12/root.img`: it is not there, and its machine was backed up",
        ),
        (
            "the header",
            without(&[named("backup-header")]),
            "its backup-header is missing",
        ),
        (
            "qubes.xml",
            without(&[named("qubes.xml.000.enc")]),
            "qubes.xml is missing",
        ),
        (
            "the header's copy",
            without(&[named("backup-header.hmac")]),
            "its header is missing",
        ),
        (
            "parts in another order",
            swapped(named("vm3/root.img.000.enc"), named("vm3/root.img.001.enc")),
            "a part is not the one of its name",
        ),
        (
            "parts of two machines",
            swapped(named("vm3/root.img.000.enc"), named("vm7/private.img.000.enc")),
            "a part is not the one of its name",
        ),
        (
            "a member twice",
            qvm::stream(&[all.clone(), vec![all[last_of("vm7/firewall")].clone()]].concat()),
            "",
        ),
    ] {
        let (whole, result) = read(&bytes);
        let text = result.expect_err(what).to_string();
        assert!(text.contains(part), "{what}: {text}");
        let expected = qubes_expected();
        assert!(
            whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
            "{what}"
        );
    }
}

#[test]
fn a_damaged_backup_of_qubes_never_gives_a_wrong_byte() {
    let backup = qubes_backup("gzip", 60_000, "--sparse");
    let expected = qubes_expected();
    let mut random = Random(33);
    // Zeros at the end that belong to no part may be missing.
    let end = backup.iter().rposition(|byte| *byte != 0).unwrap();
    for round in 0..100 {
        let at = usize::try_from(random.below(end as u64)).unwrap();
        let cut = &backup[..at];
        if is_backup(cut) {
            let (whole, result) = read(cut);
            assert!(result.is_err(), "round {round}: cut at {at}");
            assert!(
                whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
                "cut at {at}"
            );
        }
    }
    for round in 0..1000 {
        let mut damaged = backup.clone();
        let at = usize::try_from(random.below(end as u64)).unwrap();
        damaged[at] ^= 1 << random.below(8);
        if is_backup(&damaged) {
            assert_nothing_wrong(&damaged, &expected, &format!("round {round}: byte {at}"));
        }
    }
}

#[test]
fn a_wrong_passphrase_is_told_from_damage_and_forged_parameters_are_refused() {
    let backup = qubes_backup("gzip", 60_000, "--sparse");
    let open = |bytes: &[u8], passphrase: &'static str, kdf_memory_bytes: u64| {
        let (store, monitor) = (MemoryStore::of(bytes.to_vec()), Silent::default());
        let ask = || Ok(Passphrase::new(passphrase.into()));
        let mut options = open_options(&ask);
        options.limits.kdf_memory_bytes = Some(kdf_memory_bytes);
        foreign::open(&store, &options, &monitor).map(drop)
    };
    assert!(open(&backup, "secret", 1 << 30).is_ok());
    let text = open(&backup, "Secret", 1 << 30).unwrap_err().to_string();
    assert!(text.contains("the passphrase is another one"), "{text}");
    let text = open(&backup, "secret", 1 << 19).unwrap_err().to_string();
    assert!(
        text.contains("deriving its keys takes 1.0 MiB of memory, and 512.0 KiB are allowed: see --kdf-memory"),
        "{text}"
    );
    // The header's hash needs no key, so that anyone can forge it.
    let headers: Vec<usize> = (0..backup.len() - 6)
        .filter(|at| backup[*at..].starts_with(b"scrypt\0"))
        .collect();
    assert!(headers.len() > 5);
    for at in headers.into_iter().take(4) {
        for (log_n, r, p) in [
            (63u8, 8u32, 1u32),
            (10, 0x10000, 0x10000),
            (14, 8, 1 << 20),
            (22, 32, 1024),
            (10, 0, 0),
            (18, 8, 8),
        ] {
            let mut forged = backup.clone();
            forged[at + 7] = log_n;
            forged[at + 8..at + 12].copy_from_slice(&r.to_be_bytes());
            forged[at + 12..at + 16].copy_from_slice(&p.to_be_bytes());
            let hash = <sha2::Sha256 as sha2::Digest>::digest(&forged[at..at + 48]);
            forged[at + 48..at + 64].copy_from_slice(&hash[..16]);
            let (_, result) = read(&forged);
            assert!(result.is_err(), "{log_n} {r} {p}");
        }
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

#[test]
fn a_restore_takes_the_distinct_blocks_and_what_the_disk_holds_is_shared() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let distinct = scene.distinct_bytes();
    for (number, source) in ["a.vma", "a.vma.zst"].into_iter().enumerate() {
        let to = format!("to{number}");
        let planned = scene.import_json(&format!("{source} --to {to} --dry-run"));
        assert!(!scene.fs.mount.join(&to).exists());
        let before = scene.fs.used();
        let done = scene.import_json(&format!("{source} --to {to}"));
        let used = scene.fs.used() - before;
        assert_eq!(planned["planned"]["new_bytes"], distinct, "{planned}");
        assert_eq!(done["planned"]["new_bytes"], planned["planned"]["new_bytes"]);
        assert_eq!(done["done"]["written_bytes"], distinct);
        // What btrfs keeps in its metadata, such as a file of a few bytes, is not counted.
        assert!(
            used <= distinct && used + 8192 >= distinct,
            "{used} bytes for {distinct}"
        );
        scene.assert_restored(&to);
    }
    let mut pipe = scene.fs.command();
    pipe.args(["import", "-", "--to", "piped", "--seed", "to0", "--json", "--index"])
        .arg(scene.fs.index());
    let archive = std::fs::File::open(scene.fs.mount.join("a.vma.zst")).unwrap();
    let before = scene.fs.used();
    let output = pipe.stdin(archive).output().unwrap();
    drop(pipe);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    scene.assert_restored("piped");
    // The last block of a file that is not whole cannot be shared.
    let tails = 3 * 4096;
    assert!(done["done"]["written_bytes"].as_u64().unwrap() <= tails, "{done}");
    assert!(scene.fs.used() - before <= tails);
    scene.fs.check();
}

#[test]
fn of_a_damaged_backup_only_what_came_whole_gets_its_name() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let archive = std::fs::read(scene.fs.mount.join("a.vma")).unwrap();
    std::fs::write(scene.fs.mount.join("cut.vma"), &archive[..archive.len() / 2]).unwrap();
    let output = scene.import("cut.vma --to to");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("the backup `cut.vma` is damaged at bytes"), "{text}");
    let names = |to: &str| {
        let entries = std::fs::read_dir(scene.fs.mount.join(to)).unwrap();
        let mut names: Vec<String> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with(".vmfold-import-"))
            .collect();
        names.sort();
        names
    };
    assert!(
        !scene.fs.mount.join("to").exists(),
        "nothing is left that serves no later run"
    );
    let output = scene.import("cut.vma --to part --partial");
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert_eq!(
        names("part"),
        [
            "drive-scsi0.raw.vmfold-partial",
            "drive-scsi1.raw.vmfold-partial",
            "qemu-server.conf"
        ]
    );
    let part = std::fs::read(scene.fs.mount.join("part/drive-scsi0.raw.vmfold-partial")).unwrap();
    let whole = &scene.expected[Path::new("drive-scsi0.raw")];
    assert_eq!(part.len(), whole.len());
    let blocks = part.chunks(4096).zip(whole.chunks(4096));
    assert!(
        blocks
            .clone()
            .all(|(part, whole)| part == whole || part.iter().all(|byte| *byte == 0))
    );
    assert!(blocks.filter(|(part, whole)| part != whole).count() > 0);
}

#[test]
fn what_is_left_of_a_file_gets_no_name_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let files = folder.path().join("files");
    std::fs::create_dir(&files).unwrap();
    std::fs::write(files.join("a.img.vmfold-partial"), content(1, 10_000)).unwrap();
    std::fs::write(files.join("a.img"), content(2, 3 << 20)).unwrap();
    let command = format!("tar -cO -C '{}' a.img.vmfold-partial a.img", files.display());
    let archive = piped(&command, b"");
    std::fs::write(folder.path().join("cut.tar"), &archive[..5 << 19]).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_vmfold"))
        .current_dir(folder.path())
        .args(["import", "cut.tar", "--to", "to", "--partial"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("the rest of it is `a.img.2.vmfold-partial`"), "{text}");
    let read = |name: &str| std::fs::read(folder.path().join("to").join(name)).unwrap();
    assert!(read("a.img.vmfold-partial") == content(1, 10_000));
    assert!(read("a.img.2.vmfold-partial")[..1 << 20] == content(2, 3 << 20)[..1 << 20]);
    assert!(!folder.path().join("to/a.img").exists());
}

#[test]
fn of_a_compressed_backup_that_is_damaged_nothing_is_taken_for_whole() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mut compressed = piped("gzip", &some_vma(0, 5).make());
    let end = compressed.len();
    compressed[end - 6] ^= 1;
    std::fs::write(scene.fs.mount.join("flipped"), compressed).unwrap();
    let output = scene.import("flipped --to to --partial");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    let entries = std::fs::read_dir(scene.fs.mount.join("to")).unwrap();
    let names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert!(names.iter().all(|name| name.ends_with(".vmfold-partial")), "{names:?}");
}

#[test]
fn a_name_of_a_file_that_is_not_chosen_is_not_left_out_silently() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mount = scene.fs.mount.display();
    sh(&format!(
        "cd '{mount}'; mkdir t; echo 1 > t/a; ln t/a t/b; echo 2 > t/c; tar -cf t.tar -C t a b c"
    ));
    let output = scene.import("t.tar b c --to to");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("`b` is another name of `a`"), "{text}");
    let output = scene.import("t.tar a b --to other");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(std::fs::read(scene.fs.mount.join("other/b")).unwrap(), b"1\n");
}

#[test]
fn a_name_that_is_taken_is_refused_before_anything_is_written() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    std::fs::create_dir(scene.fs.mount.join("to")).unwrap();
    std::fs::write(scene.fs.mount.join("to/drive-scsi1.raw"), "mine").unwrap();
    for dry_run in ["", "--dry-run"] {
        let output = scene.import(&format!("a.vma --to to {dry_run}"));
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert_eq!(std::fs::read_dir(scene.fs.mount.join("to")).unwrap().count(), 1);
    }
    let output = scene.import("a.vma drive-scsi0.raw *.conf --to to");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(
        std::fs::read(scene.fs.mount.join("to/drive-scsi1.raw")).unwrap(),
        b"mine"
    );
    assert_eq!(std::fs::read_dir(scene.fs.mount.join("to")).unwrap().count(), 3);
    for wrong in ["a.vma nothing* --to other", "a.vma --to other --commit 1"] {
        let output = scene.import(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong}: {output:?}");
    }
    let output = scene.import("a.vma --to to --replace");
    assert!(output.status.success(), "{output:?}");
    scene.assert_restored("to");
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

#[test]
fn on_a_disk_that_is_too_small_what_came_whole_is_kept() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let restore =
        |fs: &Mounted, arguments: &str| scene.import(&format!("{arguments} --to {}", fs.mount.join("to").display()));
    let names = |fs: &Mounted| {
        let entries = std::fs::read_dir(fs.mount.join("to")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    // The configuration comes first, and is whole.
    let small = nearly_full(34);
    let output = restore(&small, "a.vma");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(names(&small), ["qemu-server.conf"], "{text}");
    for part in [
        "Left out for lack of space: `drive-scsi0.raw`",
        "Restored 1 images",
        "no space is left",
    ] {
        assert!(text.contains(part), "{text}");
    }
    // If nothing is proved to be whole, nothing is left: a checksum of what is compressed comes at its end.
    let small = nearly_full(34);
    let output = restore(&small, "a.vma.zst");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!small.mount.join("to").exists());
    std::fs::remove_file(small.mount.join("other")).unwrap();
    sh(&format!("btrfs filesystem sync '{}'", small.mount.display()));
    let output = restore(&small, "a.vma.zst");
    assert!(output.status.success(), "{output:?}");
    scene.assert_restored(small.mount.join("to").to_str().unwrap());
}

/// Distinct blocks that can be compressed well.
fn compressible(length: usize) -> Vec<u8> {
    let block = |number: usize| {
        let mut block = format!("{number} is the number of this block; ")
            .into_bytes()
            .repeat(150);
        block.truncate(4096);
        block
    };
    (0..length / 4096).flat_map(block).collect()
}

#[test]
fn what_fits_only_compressed_fits() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let maker = VmaMaker {
        devices: vec![(b"drive-scsi0", compressible(90 << 20))],
        per_extent: 58,
        ..some_vma(0, 0)
    };
    std::fs::write(scene.fs.mount.join("big.vma"), maker.make()).unwrap();
    let mut export = scene.fs.command();
    export.args(["export", "big.vmf", "--from", "big.vma", "--index"]);
    assert!(export.arg(scene.fs.index()).output().unwrap().status.success());
    for source in ["big.vma", "big.vmf"] {
        let small = nearly_full(45);
        let to = small.mount.join("to");
        let output = scene.import(&format!("{source} --to {}", to.display()));
        assert_eq!(output.status.code(), Some(1), "{source}: {output:?}");
        let _ = std::fs::remove_dir_all(&to);
        let output = scene.import(&format!("{source} --to {} --compress zstd", to.display()));
        assert!(output.status.success(), "{source}: {output:?}");
        for (path, content) in expected_of(&maker) {
            assert!(std::fs::read(to.join(path)).unwrap() == content, "{source}");
        }
    }
    let other = Mounted::new("mkfs.ext4 -q", "", 256);
    let to = other.mount.join("to");
    let output = scene.import(&format!("big.vma --to {} --compress zstd", to.display()));
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(!to.exists());
}

#[test]
fn an_import_takes_no_more_than_it_was_allowed() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let mut export = scene.fs.command();
    export.args(["export", "a.vmf", "--from", "a.vma", "--index"]);
    assert!(export.arg(scene.fs.index()).output().unwrap().status.success());
    let names = |to: &str| {
        let entries = std::fs::read_dir(scene.fs.mount.join(to)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    // An archive tells what it takes, so that nothing is begun.
    let output = scene.import("a.vmf --to archived --work-space 8M");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!scene.fs.mount.join("archived").exists());
    // What came whole of a backup is kept.
    let output = scene.import("a.vma --to read --work-space 8M");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert_eq!(names("read"), ["qemu-server.conf"], "{text}");
    assert!(
        text.contains("takes more than --work-space allows, which is 8.0 MiB"),
        "{text}"
    );
    for source in ["a.vmf", "a.vma"] {
        let to = format!("whole-{source}");
        scene.import_json(&format!("{source} --to {to} --work-space 64M"));
        scene.assert_restored(&to);
    }
}

#[test]
fn a_raw_image_is_one_whatever_its_guest_wrote_to_its_beginning() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    // A guest made its disk look like an archive of Proxmox VE.
    sh(&format!(
        "cd '{}' && cp a.vma disk.raw && truncate -s +100K disk.raw && gzip -k disk.raw",
        scene.fs.mount.display()
    ));
    let expected = std::fs::read(scene.fs.mount.join("disk.raw")).unwrap();
    for source in ["disk.raw", "disk.raw.gz"] {
        let output = scene.import(&format!("{source} --to wrong-{source}"));
        assert_eq!(output.status.code(), Some(4), "{source}: {output:?}");
        scene.import_json(&format!("{source} --raw --to right-{source}"));
        let restored = scene.fs.mount.join(format!("right-{source}")).join("disk.raw");
        assert!(std::fs::read(restored).unwrap() == expected, "{source}");
    }
    let mut pipe = scene.fs.command();
    pipe.args(["import", "-", "--raw", "--to", "piped", "--index"])
        .arg(scene.fs.index());
    let image = std::fs::File::open(scene.fs.mount.join("disk.raw")).unwrap();
    let output = pipe.stdin(image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(std::fs::read(scene.fs.mount.join("piped/stdin.img")).unwrap() == expected);
}

#[test]
fn backups_are_listed_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("q"), qubes_backup("gzip", 5000, "--sparse")).unwrap();
    std::fs::write(path("v"), some_vma(3, 50).make()).unwrap();
    std::fs::write(path("i"), piped("gzip", &content(9, 300_000))).unwrap();
    std::fs::write(path("pass"), "secret\n").unwrap();
    std::fs::write(path("wrong"), "other\n").unwrap();
    let run = |arguments: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(folder.path()).stdin(Stdio::null());
        let output = command.args(arguments.split_whitespace()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap();
        format!(
            "{}--- stderr\n{}--- exit {code}",
            text(&output.stdout),
            text(&output.stderr)
        )
    };
    insta::assert_snapshot!(run("list q --passphrase-file pass"), @r#"
           Size         Data  Image
              -            -  vm-templates/debian-12/private.img
              -            -  vm-templates/debian-12/root.img
              -            -  appvms/work/firewall.xml
              -            -  appvms/work/private.img
    `q`, a backup of Qubes OS: 4 images in 180.0 KiB
    --- stderr
    --- exit 0
    "#);
    insta::assert_snapshot!(run("verify q --passphrase-file pass"), @r#"
           Size         Data  Image
       48.8 KiB          0 B  vm-templates/debian-12/private.img
      390.6 KiB    356.0 KiB  vm-templates/debian-12/root.img
           11 B      4.0 KiB  appvms/work/firewall.xml
      683.6 KiB     92.0 KiB  appvms/work/private.img
    `q`, a backup of Qubes OS: 4 images in 180.0 KiB, 444.0 KiB distinct: whole, as far as its format tells
    --- stderr
    --- exit 0
    "#);
    insta::assert_snapshot!(run("verify q --passphrase-file wrong"), @r#"
    --- stderr
    error: the backup `q` cannot be read: the passphrase is another one
    --- exit 1
    "#);
    insta::assert_snapshot!(run("verify q --passphrase-file v"), @r#"
    --- stderr
    error: `v` holds no passphrase: its first line is it, of 4096 bytes at most
    --- exit 2
    "#);
    insta::assert_snapshot!(run("list v"), @r#"
           Size         Data  Image
      488.3 KiB            -  drive-scsi0.raw
      528.0 KiB            -  drive-efidisk0.raw
           17 B            -  drive-tpmstate0-backup.raw
           11 B            -  qemu-server.conf
    `v`, an archive of Proxmox VE: 4 images in 1.0 MiB
    --- stderr
    --- exit 0
    "#);
    insta::assert_snapshot!(run("verify v"), @r#"
           Size         Data  Image
      488.3 KiB    432.0 KiB  drive-scsi0.raw
      528.0 KiB    508.0 KiB  drive-efidisk0.raw
           17 B      4.0 KiB  drive-tpmstate0-backup.raw
           11 B      4.0 KiB  qemu-server.conf
    `v`, an archive of Proxmox VE: 4 images in 1.0 MiB, 944.0 KiB distinct: whole, as far as its format tells
    --- stderr
    --- exit 0
    "#);
    insta::assert_snapshot!(run("verify i"), @r#"
           Size         Data  Image
      293.0 KiB    280.0 KiB  i.img
    `i`, a compressed raw image: 1 images in 48.4 KiB, 280.0 KiB distinct: whole, as far as its format tells
    --- stderr
    --- exit 0
    "#);
    insta::assert_snapshot!(run("list v 1"), @r#"
    --- stderr
    error: a backup that another program made has no commits: leave the commit out
    --- exit 2
    "#);
}

#[test]
fn verify_finds_that_the_last_part_of_an_image_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let whole = qubes_backup("gzip", 5000, "--sparse");
    let members = qvm::members(&whole);
    let last = members
        .iter()
        .rposition(|(name, _)| name.starts_with("vm3/root"))
        .unwrap();
    let kept = members
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != last)
        .map(|(_, one)| one.clone());
    std::fs::write(folder.path().join("cut"), qvm::stream(&kept.collect::<Vec<_>>())).unwrap();
    std::fs::write(folder.path().join("pass"), "secret").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
    command.env_clear().current_dir(folder.path());
    let output = command
        .args(["verify", "cut", "--passphrase-file", "pass"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("in `vm-templates/debian-12/root.img`"), "{text}");
}
