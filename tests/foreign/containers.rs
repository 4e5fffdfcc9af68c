//! Disks in containers: qcow2 and VDI images that qemu-img makes, cut, flipped and hostile.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use vmfold::error::{Error, ErrorKind, Result};
use vmfold::monitor::{Monitor, Silent};
use vmfold::store::{FileStore, Store};

use super::common::{Mounted, Random, can_mount, sh};
use super::{Notes, content, events, is_backup, read, read_store};

/// The content of volumes, by path.
type Volumes = BTreeMap<PathBuf, Vec<u8>>;

/// A folder in which images are made.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Runs a command in the folder.
    fn run(&self, command: &str) -> String {
        sh(&format!("cd '{}'; {command}", self.0.path().display()))
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// What qemu-img reads from an image.
    fn raw_of(&self, arguments: &str) -> Vec<u8> {
        self.run(&format!("rm -f read.raw; qemu-img convert -O raw {arguments} read.raw"));
        self.bytes("read.raw")
    }

    /// The volumes of an image, with the backing files that are named.
    fn read(&self, name: &str, backing: &[&str]) -> (Volumes, Result<()>) {
        self.read_with(name, backing, &Silent::default())
    }

    fn read_with(&self, name: &str, backing: &[&str], monitor: &dyn Monitor) -> (Volumes, Result<()>) {
        let store = FileStore::open(&self.path(name)).unwrap();
        let open = |name: &&str| -> Box<dyn Store> { Box::new(FileStore::open(&self.path(name)).unwrap()) };
        let backing: Vec<Box<dyn Store>> = backing.iter().map(open).collect();
        let mut whole = BTreeMap::new();
        let result = read_store(&store, &backing, monitor, &mut whole);
        (whole, result)
    }

    /// The only volume of an image.
    fn disk(&self, name: &str, backing: &[&str]) -> Vec<u8> {
        let (whole, result) = self.read(name, backing);
        result.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(whole.len(), 1, "{name}");
        let (path, content) = whole.into_iter().next().unwrap();
        assert_eq!(path, Path::new(name).with_extension("img"));
        content
    }

    /// Why an image is not read.
    fn problem(&self, name: &str, backing: &[&str]) -> String {
        self.read(name, backing).1.expect_err(name).to_string()
    }
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn get64(bytes: &[u8], at: usize) -> usize {
    usize::try_from(u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap()
}

/// Where the first table of the second level is.
fn first_l2(image: &[u8]) -> usize {
    let l1_at = get64(image, 40);
    get64(image, l1_at) & 0x00ff_ffff_ffff_fe00
}

/// How qemu-img makes qcow2 images.
const QCOW2_FORMS: [&str; 16] = [
    "-o compat=0.10",
    "-o compat=0.10,cluster_size=512",
    "-c -o compat=0.10",
    "-c -o compat=0.10,cluster_size=512",
    "",
    "-o cluster_size=512",
    "-o cluster_size=4096",
    "-o cluster_size=2M",
    "-o preallocation=metadata,lazy_refcounts=on",
    "-c",
    "-c -o cluster_size=4096",
    "-c -o cluster_size=2M",
    "-c -o compression_type=zstd",
    "-c -o compression_type=zstd,cluster_size=2M",
    "-o extended_l2=on",
    "-c -o extended_l2=on,cluster_size=16384",
];

#[test]
fn a_qcow2_image_comes_back_in_whatever_form_it_is() {
    let folder = Folder::new();
    for length in [5 << 20, (3 << 20) + 512, 65_536 * 7 + 4096 + 1536] {
        let expected = content(41, length);
        folder.write("a.raw", &expected);
        for form in QCOW2_FORMS {
            folder.run(&format!(
                "rm -f a.qcow2; qemu-img convert -f raw -O qcow2 {form} a.raw a.qcow2"
            ));
            assert!(folder.disk("a.qcow2", &[]) == expected, "{form}, {length} bytes");
        }
    }
}

#[test]
fn clusters_that_are_written_discarded_and_zeroed_come_back() {
    let folder = Folder::new();
    for form in [
        "compat=0.10",
        "cluster_size=4096",
        "compat=1.1",
        "extended_l2=on",
        "cluster_size=2M",
    ] {
        folder.run(&format!(
            "rm -f a.qcow2; qemu-img create -q -f qcow2 -o '{form}' a.qcow2 9437696"
        ));
        let mut random = Random(42);
        let mut commands = String::new();
        for round in 0..60 {
            let at = random.below(9_437_696 / 512) * 512;
            let length = (random.below(100) * 700 + 512)
                .next_multiple_of(512)
                .min(9_437_696 - at);
            let how = match random.below(5) {
                0 => "write -z".to_owned(),
                1 => "write -z -u".to_owned(),
                2 => "discard".to_owned(),
                _ => format!("write -P {}", round + 1),
            };
            let _ = write!(commands, " -c '{how} {at} {length}'");
        }
        folder.run(&format!("qemu-io -f qcow2 {commands} a.qcow2 >/dev/null"));
        assert!(
            folder.disk("a.qcow2", &[]) == folder.raw_of("-f qcow2 a.qcow2"),
            "{form}"
        );
    }
}

#[test]
fn snapshots_are_revisions_in_the_order_of_their_time() {
    let folder = Folder::new();
    for form in ["compat=0.10,cluster_size=4096", "compat=1.1", "extended_l2=on"] {
        folder.write("a.raw", &content(43, 2 << 20));
        folder.run(&format!(
            "rm -f a.qcow2; qemu-img convert -f raw -O qcow2 -o {form} a.raw a.qcow2"
        ));
        folder.run("qemu-img snapshot -c first a.qcow2; qemu-io -f qcow2 -c 'write -P 7 1M 300k' a.qcow2 >/dev/null");
        let grows = !form.contains("0.10");
        if grows {
            folder.run("qemu-img resize -q a.qcow2 3145728");
        }
        folder
            .run("qemu-img snapshot -c 'b\u{1b}[31m' a.qcow2; qemu-io -f qcow2 -c 'write -z 0 64k' a.qcow2 >/dev/null");
        // The second one gets an earlier time than the first.
        let mut image = folder.bytes("a.qcow2");
        let at = get64(&image, 64);
        put32(&mut image, at + 16, 1_700_000_000);
        let second = image[at + 40..]
            .windows(5)
            .position(|part| part == b"b\x1b[31")
            .unwrap()
            + at;
        // Before the name are the id and what is extra.
        let second = (at..second)
            .rev()
            .find(|at| image[*at + 12..*at + 16] == [0, 1, 0, 6])
            .unwrap();
        put32(&mut image, second + 16, 1_600_000_000);
        folder.write("a.qcow2", &image);
        let notes = Notes::default();
        let (whole, result) = folder.read_with("a.qcow2", &[], &notes);
        result.unwrap();
        let names = ["a.img", "a.img.1@2020-09-13T12:26:40Z", "a.img.2@2023-11-14T22:13:20Z"];
        assert_eq!(whole.keys().collect::<Vec<_>>(), names.map(Path::new));
        assert!(
            whole[Path::new(names[0])] == folder.raw_of("-f qcow2 a.qcow2"),
            "{form}"
        );
        let second = folder.raw_of("-f qcow2 -l snapshot.name=$(printf 'b\\033[31m') a.qcow2");
        assert!(whole[Path::new(names[1])] == second, "{form}");
        // qemu-img gives each snapshot the size of the disk as it is now.
        let mut first = folder.raw_of("-f qcow2 -l snapshot.name=first a.qcow2");
        first.truncate(2 << 20);
        assert!(
            whole[Path::new(names[2])] == first && first == folder.bytes("a.raw"),
            "{form}"
        );
        let notes = notes.0.into_inner().unwrap();
        assert_eq!(
            notes,
            [
                "`a.img.1@2020-09-13T12:26:40Z` is the snapshot `b\\u{1b}[31m`",
                "`a.img.2@2023-11-14T22:13:20Z` is the snapshot `first`"
            ]
        );
    }
}

#[test]
fn what_lies_on_backing_files_is_whole_only_with_those_that_the_user_names() {
    let folder = Folder::new();
    folder.write("base.raw", &content(44, (1 << 20) + 512));
    folder.write("secret", b"secret");
    for form in ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=4096"] {
        folder.run(&format!(
            "rm -f *.qcow2; qemu-img create -q -f qcow2 -o '{form}' -b base.raw -F raw middle.qcow2 2M
             qemu-io -f qcow2 -c 'write -P 3 100k 70k' -c 'write -z 300k 200k' -c 'discard 900k 64k' middle.qcow2 >/dev/null
             qemu-img create -q -f qcow2 -o '{form}' -b middle.qcow2 -F qcow2 top.qcow2 3146240
             qemu-io -f qcow2 -c 'write -P 4 1536 1024' -c 'write -P 5 1000k 80k' -c 'write -z 110k 9k' top.qcow2 >/dev/null
             qemu-img snapshot -c one top.qcow2
             qemu-io -f qcow2 -c 'write -P 6 0 2M' top.qcow2 >/dev/null"
        ));
        let (whole, result) = folder.read("top.qcow2", &["middle.qcow2", "base.raw"]);
        result.unwrap();
        let contents: Vec<&Vec<u8>> = whole.values().collect();
        assert!(*contents[0] == folder.raw_of("-f qcow2 top.qcow2"), "{form}");
        assert!(
            *contents[1] == folder.raw_of("-f qcow2 -l snapshot.name=one top.qcow2"),
            "{form}"
        );
        assert_eq!(contents.len(), 2);
        for (backing, part) in [
            (vec![], "which it calls `middle.qcow2`: name that with --backing FILE"),
            (
                vec!["middle.qcow2"],
                "which it calls `base.raw`: name that with one more --backing FILE",
            ),
            (vec!["middle.qcow2", "base.raw", "base.raw"], "it has no backing file"),
            (
                vec!["base.raw"],
                "says that its backing file is a qcow2 image, and this is none",
            ),
        ] {
            let backing: Vec<&str> = backing;
            // What lies under a raw file is not known to have none below it.
            let text = folder.problem("top.qcow2", &backing);
            assert!(text.contains(part), "{text}");
        }
        // A raw file is raw, whatever a guest writes to its beginning.
        let mut forged = folder.bytes("base.raw");
        folder.run("qemu-img create -q -f qcow2 -b secret -F raw evil.qcow2 1M");
        let evil = folder.bytes("evil.qcow2");
        forged[..evil.len().min(1 << 20)].copy_from_slice(&evil[..evil.len().min(1 << 20)]);
        folder.write("forged.raw", &forged);
        let read = folder.read("middle.qcow2", &["forged.raw"]).0;
        assert_eq!(read[Path::new("middle.img")][..512], forged[..512]);
    }
    folder.run("qemu-img create -q -u -f qcow2 -b /etc/passwd -F raw own.qcow2 1M");
    // An older qemu-img did not ask for the format, which lies in the first extension of the header.
    let mut own = folder.bytes("own.qcow2");
    assert_eq!(own[112..116], 0xe279_2aca_u32.to_be_bytes());
    put32(&mut own, 112, 0x6803_f857);
    folder.write("own.qcow2", &own);
    let text = folder.problem("own.qcow2", &[]);
    assert!(text.contains("which it calls `/etc/passwd`"), "{text}");
    // Where the image does not say what its backing file is, that is raw unless it begins as a qcow2 image.
    assert_eq!(folder.disk("own.qcow2", &["base.raw"]), content(44, 1 << 20));
    folder.run("qemu-img convert -f raw -O qcow2 base.raw base.qcow2");
    assert_eq!(folder.disk("own.qcow2", &["base.qcow2"]), content(44, 1 << 20));
    folder.run("qemu-img convert -f raw -O vdi base.raw base.vdi");
    let text = folder.problem("own.qcow2", &["base.vdi"]);
    assert!(text.contains("only qcow2 and raw backing files are read"), "{text}");
    let text = folder.problem("own.qcow2", &vec!["own.qcow2"; 17]);
    assert!(text.contains("more than 16 backing files"), "{text}");
    let text = folder.problem("base.vdi", &["base.raw"]);
    assert!(text.contains("only a qcow2 image has a backing file"), "{text}");
}

#[test]
fn what_is_not_read_is_refused_by_its_name() {
    let folder = Folder::new();
    folder.run(
        "qemu-img create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 luks.qcow2 1M
         qemu-img create -q -f qcow2 -o data_file=data data.qcow2 1M
         qemu-img create -q -f qcow2 plain.qcow2 1M
         qemu-img create -q -f vdi plain.vdi 1M",
    );
    let plain = folder.bytes("plain.qcow2");
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = plain.clone();
        change(&mut bytes);
        bytes
    };
    let mut vdi = folder.bytes("plain.vdi");
    vdi[76] = 4;
    for (bytes, part) in [
        (folder.bytes("luks.qcow2"), "it is encrypted (LUKS)"),
        (folder.bytes("data.qcow2"), "its data lies in another file"),
        (changed(&|bytes| put32(bytes, 32, 1)), "it is encrypted (AES)"),
        (changed(&|bytes| put32(bytes, 4, 1)), "version 1"),
        (changed(&|bytes| put32(bytes, 4, 4)), "version 4"),
        (changed(&|bytes| put64(bytes, 72, 2)), "marked as corrupt"),
        (changed(&|bytes| put64(bytes, 72, 1 << 40)), "not known (bit 40)"),
        (
            changed(&|bytes| put64(bytes, 72, 8)),
            "two things of how clusters are compressed",
        ),
        (vdi.clone(), "a differencing VDI image"),
    ] {
        let text = read(&bytes).1.unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // What was not closed is read.
    let dirty = changed(&|bytes| put64(bytes, 72, 1));
    read(&dirty).1.unwrap();
    vdi[76] = 3;
    assert!(read(&vdi).1.unwrap_err().to_string().contains("`undo`"));
}

#[test]
fn a_vdi_image_comes_back_whatever_the_order_of_its_blocks() {
    let folder = Folder::new();
    for length in [4 << 20, (5 << 20) + 1536] {
        let mut expected = content(45, length);
        expected[1 << 20..2 << 20].fill(0);
        folder.write("a.raw", &expected);
        for form in ["", "-o static=on"] {
            folder.run(&format!(
                "rm -f a.vdi; qemu-img convert -f raw -O vdi {form} a.raw a.vdi"
            ));
            assert!(folder.disk("a.vdi", &[]) == expected, "{form}");
        }
    }
    folder.run("qemu-img create -q -f vdi b.vdi 6M");
    folder.run("qemu-io -f vdi -c 'write -P 1 5M 1M' -c 'write -P 2 2M 700k' -c 'write -P 3 0 1M' b.vdi >/dev/null");
    assert!(folder.disk("b.vdi", &[]) == folder.raw_of("-f vdi b.vdi"));
    let mut image = folder.bytes("b.vdi");
    let number = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let map = usize::try_from(number(&image, 340)).unwrap();
    assert_eq!(number(&image, map), 2);
    let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = image.clone();
        change(&mut bytes);
        read(&bytes).1.unwrap_err().to_string()
    };
    for (text, part) in [
        (
            damaged(&|bytes| bytes[map] = 0),
            "two blocks of the disk lie in the same place",
        ),
        (damaged(&|bytes| bytes[map + 3] = 1), "a number that is not allowed"),
        (damaged(&|bytes| bytes[map] = 5), "it ends too early"),
        (damaged(&|bytes| bytes[376..380].fill(0)), "a size that is not allowed"),
        (
            damaged(&|bytes| bytes[376..380].fill(0xff)),
            "a size that is not allowed",
        ),
        (damaged(&|bytes| bytes[384..388].fill(0xff)), "more than vmfold takes"),
        (damaged(&|bytes| bytes[374] = 1), "its map is shorter than its disk"),
        (damaged(&|bytes| bytes[340..344].fill(0xff)), "it ends too early"),
        (damaged(&|bytes| bytes[344..348].fill(0xff)), "it ends too early"),
        (damaged(&|bytes| bytes[70] = 9), "version 9.1"),
        (damaged(&|bytes| bytes[380] = 1), "something before their data"),
    ] {
        assert!(text.contains(part), "{text}");
    }
    // An entry that stands for zeros.
    image[map..map + 4].copy_from_slice(&0xffff_fffe_u32.to_le_bytes());
    assert!(
        read(&image).0.values().next().unwrap()[..1 << 20]
            .iter()
            .all(|byte| *byte == 0)
    );
}

/// Small images of every form, with what they hold.
fn small_images() -> Vec<(&'static str, Vec<u8>, Volumes)> {
    let folder = Folder::new();
    folder.write("a.raw", &content(46, 200_192));
    let mut images = Vec::new();
    for form in [
        "qcow2 -o compat=0.10,cluster_size=512",
        "qcow2 -o cluster_size=4096",
        "qcow2 -o cluster_size=4096 -c",
        "qcow2 -o cluster_size=4096,compression_type=zstd -c",
        "qcow2 -o cluster_size=16384,extended_l2=on",
        "vdi",
    ] {
        folder.run(&format!("rm -f a.c; qemu-img convert -f raw -O {form} a.raw a.c"));
        if form.contains("qcow2") {
            folder.run("qemu-img snapshot -c one a.c; qemu-io -f qcow2 -c 'write -P 9 9k 30k' -c 'write -z 50k 20k' a.c >/dev/null");
        }
        let bytes = folder.bytes("a.c");
        let (whole, result) = read(&bytes);
        result.unwrap();
        images.push((form, bytes, whole));
    }
    images
}

#[test]
fn a_container_that_is_cut_off_is_damaged() {
    let mut random = Random(47);
    for (form, bytes, whole) in small_images() {
        for round in 0..100 {
            let at = if round < 20 {
                round * 8
            } else {
                usize::try_from(random.below(bytes.len() as u64)).unwrap()
            };
            if !is_backup(&bytes[..at]) {
                continue;
            }
            let (read, result) = read(&bytes[..at]);
            match result {
                // What was cut belongs to no volume: a count of references, or the rest of the last block.
                Ok(()) => assert!(read == whole, "{form}: cut at {at} of {}", bytes.len()),
                Err(error) => {
                    assert!(matches!(error, Error::DamagedBackup { .. }), "{form}: {error:?}");
                    assert!(
                        read.iter().all(|(path, content)| whole.get(path) == Some(content)),
                        "{form}: cut at {at}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_container_in_which_a_byte_is_wrong_ends() {
    let mut random = Random(48);
    for (form, bytes, _) in small_images() {
        let (l1_at, l2_at) = if form.contains("vdi") {
            (512, 512)
        } else {
            (get64(&bytes, 40), first_l2(&bytes))
        };
        let mut wrong = 0;
        for round in 0..1000 {
            let mut damaged = bytes.clone();
            // Headers and tables more often than the rest.
            let at = match round % 4 {
                0 => random.below(128),
                1 => l1_at as u64 + random.below(64),
                2 => l2_at as u64 + random.below(512),
                _ => random.below(bytes.len() as u64),
            };
            let at = usize::try_from(at).unwrap();
            damaged[at] = match random.below(3) {
                0 => 0xff,
                1 => 0,
                _ => damaged[at] ^ 1 << random.below(8),
            };
            if !is_backup(&damaged) {
                continue;
            }
            // The size may be another one.
            if let Err(error) = events(&damaged) {
                wrong += 1;
                assert!(
                    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
                    "{form}: byte {at}: {error:?}"
                );
            }
        }
        assert!(wrong > 10, "{form}: {wrong} of 1000");
    }
}

#[test]
fn hostile_numbers_in_a_qcow2_image_end_in_errors() {
    let folder = Folder::new();
    folder.write("a.raw", &content(49, 1 << 20));
    folder.run("qemu-img convert -f raw -O qcow2 -c a.raw a.qcow2; qemu-img snapshot -c one a.qcow2");
    let image = folder.bytes("a.qcow2");
    let (l1_at, l2_at, snapshots_at) = (get64(&image, 40), first_l2(&image), get64(&image, 64));
    let problem = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = image.clone();
        change(&mut bytes);
        events(&bytes).expect_err("it was read").to_string()
    };
    let entry = |bytes: &mut Vec<u8>, value: u64| put64(bytes, l2_at, value);
    let end = image.len() as u64;
    for (text, part) in [
        (problem(&|bytes| put32(bytes, 36, u32::MAX)), "longer than any may be"),
        (problem(&|bytes| put32(bytes, 36, 0)), "shorter than the disk"),
        (problem(&|bytes| put64(bytes, 40, u64::MAX - 7)), "it ends too early"),
        (problem(&|bytes| put32(bytes, 20, 8)), "a size that is not allowed"),
        (
            problem(&|bytes| put32(bytes, 20, u32::MAX)),
            "a size that is not allowed",
        ),
        (problem(&|bytes| put64(bytes, 24, u64::MAX)), "more than vmfold takes"),
        (problem(&|bytes| put64(bytes, 24, 1 << 40)), "shorter than the disk"),
        (problem(&|bytes| put32(bytes, 60, u32::MAX)), "4294967295 snapshots"),
        (problem(&|bytes| put32(bytes, 60, 65535)), "damaged at bytes"),
        (problem(&|bytes| put64(bytes, 64, u64::MAX)), "it ends too early"),
        (
            problem(&|bytes| put32(bytes, snapshots_at + 36, 1025)),
            "a snapshot has more beside it",
        ),
        (
            problem(&|bytes| put32(bytes, snapshots_at + 8, u32::MAX)),
            "the table of a snapshot",
        ),
        (
            problem(&|bytes| put64(bytes, snapshots_at, u64::MAX)),
            "it ends too early",
        ),
        (
            problem(&|bytes| put64(bytes, snapshots_at + 48, 1 << 60)),
            "more than vmfold takes",
        ),
        (problem(&|bytes| put32(bytes, 100, 103)), "its header has a length"),
        (problem(&|bytes| put32(bytes, 100, 1 << 30)), "longer than a cluster"),
        (
            problem(&|bytes| {
                put64(bytes, 8, u64::MAX);
                put32(bytes, 16, 5);
            }),
            "the name of its backing file lies elsewhere",
        ),
        (
            problem(&|bytes| {
                put64(bytes, 8, 4096);
                put32(bytes, 16, u32::MAX);
            }),
            "longer than any may be",
        ),
        (
            problem(&|bytes| put64(bytes, l1_at, l2_at as u64 + 512)),
            "in the middle of a cluster",
        ),
        (
            problem(&|bytes| put64(bytes, l1_at, end.next_multiple_of(65536))),
            "it ends too early",
        ),
        (problem(&|bytes| entry(bytes, 512)), "in the middle of another"),
        (
            problem(&|bytes| entry(bytes, end.next_multiple_of(65536))),
            "it ends too early",
        ),
        (problem(&|bytes| entry(bytes, 1 << 62 | end)), "it ends too early"),
        (problem(&|bytes| entry(bytes, u64::MAX)), "it ends too early"),
        (
            problem(&|bytes| entry(bytes, 1 << 62)),
            "does not decompress to a cluster",
        ),
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // A table that is the header, or itself, is only garbage.
    for to in [0, l1_at, l2_at] {
        for at in [l1_at, l2_at] {
            let mut bytes = image.clone();
            put64(&mut bytes, at, to as u64);
            let _ = events(&bytes);
        }
    }
    // Counts of references are not looked at.
    let mut bytes = image.clone();
    let counts = get64(&bytes, 48);
    bytes[counts..counts + 4096].fill(0xff);
    events(&bytes).unwrap();
}

#[test]
fn a_compressed_cluster_gives_a_cluster_and_neither_less_nor_more() {
    let folder = Folder::new();
    for (kind, form) in [("deflate", ""), ("zstd", ",compression_type=zstd")] {
        for (bytes, is_whole) in [(4096, true), (4095, false), (4097, false), (1 << 20, false), (0, false)] {
            folder.write("a.raw", &content(50, 4096));
            folder.run(&format!(
                "rm -f a.qcow2; qemu-img convert -f raw -O qcow2 -c -o cluster_size=4096{form} a.raw a.qcow2"
            ));
            let mut image = folder.bytes("a.qcow2");
            let plain = vec![b'x'; bytes];
            let packed = if kind == "zstd" {
                zstd::encode_all(&plain[..], 3).unwrap()
            } else {
                let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
                std::io::Write::write_all(&mut encoder, &plain).unwrap();
                encoder.finish().unwrap()
            };
            let at = image.len().next_multiple_of(512);
            image.resize(at, 0);
            image.extend(&packed);
            let sectors = (packed.len() as u64).div_ceil(512) - 1;
            let l2_at = first_l2(&image);
            put64(&mut image, l2_at, 1 << 62 | sectors << 58 | at as u64);
            let (whole, result) = read(&image);
            assert_eq!(result.is_ok(), is_whole, "{kind}: {bytes} bytes");
            if is_whole {
                assert_eq!(whole.values().next().unwrap(), &plain);
            } else {
                let text = result.unwrap_err().to_string();
                assert!(text.contains("does not decompress to a cluster"), "{text}");
            }
        }
    }
}

#[test]
fn tables_that_name_the_same_place_again_and_again_come_to_an_end() {
    let folder = Folder::new();
    // All of the disk of 2 TiB in one table of one cluster.
    folder.run("qemu-img create -q -f qcow2 a.qcow2 2T; qemu-io -f qcow2 -c 'write -P 1 0 64k' a.qcow2 >/dev/null");
    let mut image = folder.bytes("a.qcow2");
    let (l1_at, l2_at) = (get64(&image, 40), first_l2(&image));
    for index in 0..4096 {
        put64(&mut image, l1_at + index * 8, l2_at as u64);
    }
    let start = Instant::now();
    let text = events(&image).unwrap_err().to_string();
    assert!(
        text.contains("its tables place more in the file than it has room for"),
        "{text}"
    );
    let data = get64(&image, l2_at);
    for index in 0..8192 {
        put64(&mut image, l2_at + index * 8, data as u64);
    }
    let text = events(&image).unwrap_err().to_string();
    assert!(
        text.contains("its tables place more in the file than it has room for"),
        "{text}"
    );
    assert!(start.elapsed().as_secs() < 20);
}

#[test]
fn more_snapshots_than_a_disk_has_room_for_are_refused() {
    let folder = Folder::new();
    folder.run("qemu-img create -q -f qcow2 -o cluster_size=2M a.qcow2 1T; qemu-img snapshot -c one a.qcow2");
    let mut image = folder.bytes("a.qcow2");
    let at = get64(&image, 64);
    let entry = image[at..at + 56].to_vec();
    let table = image.len().next_multiple_of(8);
    for (count, name, part) in [
        (
            100u32,
            3usize,
            "bytes, which is more than vmfold takes, 35184372088832 at most",
        ),
        (300, 60_000, "the names of its snapshots are longer than vmfold takes"),
    ] {
        image.resize(table, 0);
        for _ in 0..count {
            let mut one = entry[..40].to_vec();
            one[14..16].copy_from_slice(&u16::try_from(name).unwrap().to_be_bytes());
            put32(&mut one, 36, 16);
            one.extend(&entry[40..56]);
            one.resize((56 + 1 + name).next_multiple_of(8), b'n');
            image.extend(one);
        }
        put32(&mut image, 60, count);
        put64(&mut image, 64, table as u64);
        let text = events(&image).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_large_disk_that_is_empty_is_read_at_once() {
    let folder = Folder::new();
    folder.run("qemu-img create -q -f qcow2 a.qcow2 32T; qemu-img create -q -f vdi a.vdi 8T");
    for name in ["a.qcow2", "a.vdi"] {
        let bytes = folder.bytes(name);
        let start = Instant::now();
        events(&bytes).unwrap();
        assert!(start.elapsed().as_secs() < 5, "{name}: {:?}", start.elapsed());
    }
    folder.run("qemu-io -f qcow2 -c 'write -P 1 31T 64k' -c 'write -P 1 7T 64k' a.qcow2 >/dev/null");
    let start = Instant::now();
    events(&folder.bytes("a.qcow2")).unwrap();
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}

#[test]
fn a_disk_of_a_container_shares_the_clusters_of_the_container() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let raw = content(51, (24 << 20) + 512);
    fs::write(fs.mount.join("a.raw"), &raw).unwrap();
    sh(&format!(
        "cd '{}'
         qemu-img convert -f raw -O qcow2 a.raw a.qcow2; qemu-img convert -f raw -O vdi a.raw a.vdi
         qemu-img snapshot -c one a.qcow2; qemu-io -f qcow2 -c 'write -P 9 8M 1M' a.qcow2 >/dev/null
         qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2 -u 24M
         qemu-img convert -f raw -O qcow2 a.raw base.qcow2; ln -s base.qcow2 link.qcow2; rm a.raw",
        fs.mount.display()
    ));
    let mut changed = raw.clone();
    changed[8 << 20..9 << 20].fill(9);
    let import = |arguments: &str| {
        let mut command = fs.command();
        command.arg("import").args(arguments.split_whitespace());
        command.arg("--json").arg("--index").arg(fs.index()).output().unwrap()
    };
    for (arguments, to, images, expected) in [
        ("a.qcow2", "q", 2, &changed),
        ("a.vdi", "v", 1, &raw),
        ("top.qcow2 --backing base.qcow2", "b", 1, &raw),
    ] {
        let planned = import(&format!("{arguments} --to {to} --dry-run"));
        let planned: serde_json::Value = serde_json::from_slice(&planned.stdout).unwrap();
        assert!(planned["planned"]["new_bytes"].as_u64().unwrap() <= 8192, "{planned}");
        let before = fs.used();
        let output = import(&format!("{arguments} --to {to}"));
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments}: {text}");
        let used = fs.used() - before;
        let done: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        // The end of a file that is no whole block cannot be shared.
        assert!(used <= 8192, "{arguments}: {used} bytes: {done}");
        assert!(done["done"]["written_bytes"].as_u64().unwrap() <= 8192, "{done}");
        assert_eq!(done["done"]["images"], images);
        let restored = fs.mount.join(to).join(match to {
            "b" => "top.img",
            _ => "a.img",
        });
        let mut content = fs::read(restored).unwrap();
        content.truncate(expected.len());
        assert!(
            content == expected[..content.len()] && content.len() >= 24 << 20,
            "{arguments}"
        );
    }
    let snapshots = fs::read_dir(fs.mount.join("q"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let snapshot = snapshots
        .into_iter()
        .find(|name| name.to_string_lossy().contains('@'))
        .unwrap();
    assert!(fs::read(fs.mount.join("q").join(snapshot)).unwrap() == raw);
    let output = import("top.qcow2 --to c --backing link.qcow2");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("`link.qcow2` is no regular file"));
    let output = import("top.qcow2 --to c");
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(!fs.mount.join("c").exists());
    // Elsewhere, it is copied.
    let elsewhere = Mounted::btrfs();
    let output = import(&format!("a.qcow2 --to {}", elsewhere.mount.join("to").display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(fs::read(elsewhere.mount.join("to/a.img")).unwrap() == changed);
    // What list and verify say.
    for verb in ["list", "verify"] {
        let output = fs
            .command()
            .args([verb, "top.qcow2", "--backing", "base.qcow2"])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success() && text.contains("top.img"),
            "{verb}: {output:?}"
        );
    }
    fs.check();
}

#[test]
fn a_file_of_which_clusters_lie_on_half_blocks_is_read_all_the_same() {
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let raw = content(52, 1 << 20);
    fs::write(fs.mount.join("a.raw"), &raw).unwrap();
    sh(&format!(
        "cd '{}'; qemu-img convert -f raw -O qcow2 -o cluster_size=512 a.raw a.qcow2; rm a.raw",
        fs.mount.display()
    ));
    let mut command = fs.command();
    let output = command
        .args(["import", "a.qcow2", "--to", "to"])
        .arg("--index")
        .arg(fs.index())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let restored = File::open(fs.mount.join("to/a.img")).unwrap();
    let mut content = vec![0; raw.len()];
    restored.read_exact_at(&mut content, 0).unwrap();
    assert!(content == raw);
}
