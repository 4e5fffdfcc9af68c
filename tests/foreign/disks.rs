//! Disks of hypervisors: made by qemu-img, and by writers here from published layouts.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::made::{Fault, LogMaker, SECTOR, crc_at, footer_stream, sum_at, with_log};
use super::{Notes, content, events, is_backup, open_options, piped, read};
use crate::common::Random;
use vmfold::error::{Error, ErrorKind};
use vmfold::foreign::{self, Event, Passphrase};
use vmfold::monitor::Silent;
use vmfold::store::{FileStore, MemoryStore};

/// Runs qemu-img in a folder.
fn qemu(folder: &Path, arguments: &str) {
    let mut command = Command::new("qemu-img");
    command.current_dir(folder).args(arguments.split_whitespace());
    let output = command.output().expect("qemu-img, of the package qemu-utils");
    assert!(output.status.success(), "{arguments}: {output:?}");
}

/// The image in another format, with the options of qemu-img.
fn converted(image: &[u8], options: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("raw"), image).unwrap();
    qemu(folder.path(), &format!("convert -f raw -O {options} raw disk"));
    std::fs::read(folder.path().join("disk")).unwrap()
}

/// What qemu-img makes of a disk.
fn raw_by_qemu(disk: &[u8], format: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("disk"), disk).unwrap();
    qemu(folder.path(), &format!("convert -f {format} -O raw disk raw"));
    std::fs::read(folder.path().join("raw")).unwrap()
}

/// The only volume of a backup.
fn only_volume(bytes: &[u8], what: &str) -> Vec<u8> {
    assert!(is_backup(bytes), "{what}");
    let (whole, result) = read(bytes);
    result.unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(whole.len(), 1, "{what}");
    whole.into_values().next().unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    assert!(is_backup(bytes));
    let error = read(bytes).1.unwrap_err();
    assert!(matches!(error, Error::RefusedBackup { .. }), "{error:?}");
    error.to_string()
}

/// An image with some content, a large hole, and some content at its end.
fn image(seed: u64, length: usize) -> Vec<u8> {
    let mut image = content(seed, length);
    let hole = length / 4..length / 4 * 3;
    image[hole].fill(0);
    image
}

const VMDK: [&str; 2] = [
    "vmdk -o subformat=monolithicSparse",
    "vmdk -o subformat=streamOptimized",
];
const VHD: [&str; 2] = ["vpc -o force_size=on", "vpc -o subformat=fixed,force_size=on"];
const VHDX: [&str; 5] = [
    "vhdx",
    "vhdx -o block_size=1M",
    "vhdx -o block_size=256M",
    "vhdx -o subformat=fixed,block_size=1M",
    "vhdx -o block_state_zero=off",
];

#[test]
fn disks_that_qemu_makes_come_back_whatever_their_size() {
    for length in [512, 65_024, 1_000_448, 5 << 20, (33 << 20) + 1536] {
        let image = image(41, length);
        for options in VMDK.iter().chain(&VHD).chain(&VHDX) {
            let disk = converted(&image, options);
            assert!(only_volume(&disk, options) == image, "{options}, {length} bytes");
        }
        // Without a size that is forced, an image grows to whole cylinders.
        for options in ["vpc", "vpc -o subformat=fixed"] {
            let disk = converted(&image, options);
            let ours = only_volume(&disk, options);
            assert!(ours == raw_by_qemu(&disk, "vpc"), "{options}, {length} bytes");
            assert!(ours.starts_with(&image) && ours.len() >= length);
        }
    }
}

#[test]
fn an_image_is_called_as_its_disk_and_what_it_is_shows() {
    let folder = tempfile::tempdir().unwrap();
    for (name, options, kind) in [
        ("a.vmdk", VMDK[0], "a VMDK image"),
        ("b.VMDK", VMDK[1], "a VMDK image"),
        ("e.vmdk.GZ", VMDK[1], "a VMDK image"),
        ("c.vhd", VHD[1], "a VHD image"),
        ("d.vhdx", VHDX[0], "a VHDX image"),
    ] {
        let path = folder.path().join(name);
        let disk = converted(&image(42, 300_032), options);
        let command = if name.ends_with("GZ") { "gzip" } else { "cat" };
        std::fs::write(&path, piped(command, &disk)).unwrap();
        let (store, monitor) = (FileStore::open(&path).unwrap(), Silent::default());
        let mut backup = foreign::open(&store, &open_options(&|| Ok(Passphrase::new(Vec::new()))), &monitor).unwrap();
        let Some(Event::Volume(volume)) = backup.next(&mut Vec::new()).unwrap() else {
            panic!("{name}")
        };
        assert_eq!(volume.path, PathBuf::from(format!("{}.img", &name[..1])));
        assert_eq!((volume.size, backup.kind()), (Some(300_032), kind));
    }
}

#[test]
fn streams_of_grains_are_read_in_order_from_files_pipes_and_compressions() {
    for (length, grain, order) in [
        (512, 128, 0),
        (1_000_448, 128, 0),
        (1_000_448, 128, 5),
        (1_000_448, 8, 6),
        (1_000_448, 2048, 7),
        (40 << 20, 128, 8),
        (3 << 20, 16, 9),
    ] {
        let image = image(43, length);
        let stream = footer_stream(&image, grain, order, Fault::None);
        assert!(raw_by_qemu(&stream, "vmdk") == image, "the writer here makes no sense");
        for bytes in [stream, converted(&image, VMDK[1])] {
            assert!(only_volume(&bytes, "plain") == image, "{length} {grain} {order}");
            for command in ["gzip -1", "zstd -q"] {
                assert!(only_volume(&piped(command, &bytes), command) == image, "{command}");
            }
        }
    }
    let empty = vec![0; 1 << 20];
    assert!(only_volume(&footer_stream(&empty, 128, 0, Fault::None), "empty") == empty);
    assert!(only_volume(&converted(&empty, VMDK[1]), "empty") == empty);
}

#[test]
fn what_is_missing_of_a_stream_of_grains_is_found() {
    let image = image(44, 3_000_320);
    for (fault, part) in [
        (Fault::WithoutEnd, "it ends too early"),
        (Fault::WithoutFooter, "its directory or its footer is missing"),
        (Fault::WithoutDirectory, "its directory or its footer is missing"),
        (Fault::WithoutTable, "a table is missing"),
        (Fault::Dropped, "grains are missing, the first at byte"),
        (Fault::Doubled, "a grain came before"),
        (Fault::Moved, "or between two"),
    ] {
        let text = read(&footer_stream(&image, 128, 0, fault)).1.unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    // qemu's tables come first, so that a cut between two grains shows as well.
    let stream = converted(&image, VMDK[1]);
    let mut at = 128 * SECTOR;
    let mut cuts = 0;
    while stream[at + 8..at + 12] != [0; 4] {
        let text = read(&stream[..at]).1.unwrap_err().to_string();
        assert!(text.contains("grains are missing"), "{text}");
        let size = u32::from_le_bytes(stream[at + 8..at + 12].try_into().unwrap()) as usize;
        at = (at + 12 + size).next_multiple_of(SECTOR);
        cuts += 1;
    }
    assert!(cuts > 5 && read(&stream[..at]).1.is_ok(), "{cuts}");
}

#[test]
fn disks_that_are_not_alone_are_refused_and_nothing_that_they_name_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let in_folder = |arguments: &str, name: &str| {
        qemu(folder.path(), arguments);
        std::fs::read(folder.path().join(name)).unwrap()
    };
    let flat = in_folder("create -f vmdk -o subformat=monolithicFlat flat.vmdk 1M", "flat.vmdk");
    let split = in_folder(
        "create -f vmdk -o subformat=twoGbMaxExtentSparse split.vmdk 1M",
        "split.vmdk",
    );
    let part = std::fs::read(folder.path().join("split-s001.vmdk")).unwrap();
    qemu(folder.path(), "create -f vmdk base.vmdk 1M");
    let delta = in_folder("create -f vmdk -b base.vmdk -F vmdk delta.vmdk", "delta.vmdk");
    let stream = footer_stream(&image(45, 100_352), 128, 0, Fault::None);
    let mut path = stream.clone();
    let at = path.windows(6).position(|window| window == b"x.vmdk").unwrap();
    path[at..at + 6].copy_from_slice(b"/etc/a");
    let mut difference = converted(&image(45, 100_352), VHD[0]);
    let end = difference.len() - SECTOR;
    for at in [0, end] {
        difference[at + 63] = 4;
        sum_at(&mut difference[at..at + SECTOR], 64);
    }
    let mut child = converted(&image(45, 100_352), VHDX[0]);
    let guid = [0x37, 0x67, 0xa1, 0xca, 0x36, 0xfa, 0x43, 0x4d];
    let at = child.windows(8).position(|window| window == guid).unwrap();
    let item = u32::from_le_bytes(child[at + 16..at + 20].try_into().unwrap()) as usize;
    child[at / 65_536 * 65_536 + item + 4] |= 2;
    for (bytes, part) in [
        (flat, "what it names is not opened. A `-flat` file is a raw image"),
        (
            split,
            "a VMDK in several files (twoGbMaxExtent): convert it into one file first",
        ),
        (
            part,
            "it is part of a VMDK in several files, whose descriptor is another file",
        ),
        (delta, "its parent: merge the two first"),
        (path, "or names other files"),
        (difference, "its parent: merge the two first"),
        (child, "its parent: merge the two first"),
        (b"\xbe\xba\xfe\xca\0\0\0\0\x01".to_vec(), "of the type seSparse"),
        (b"COWD\x01\0\0\0".to_vec(), "of the type vmfsSparse"),
    ] {
        let text = refusal(&bytes);
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_fixed_disk_that_begins_as_something_else_is_refused() {
    let mut image = image(46, 300_032);
    for begin in [
        &b"\x1f\x8b\x08"[..],
        b"KDMV",
        b"QFI\xfb",
        b"conectix",
        b"vhdxfile",
        b"VMA\0",
        b"\x89vmfold\n",
        b"# Disk DescriptorFile",
    ] {
        image[..begin.len()].copy_from_slice(begin);
        let text = refusal(&converted(&image, VHD[1]));
        assert!(
            text.contains("it begins as one kind of backup and ends as another"),
            "{text}"
        );
    }
    // Whoever forges the end of something else gets no further.
    let mut forged = converted(&image, VMDK[0]);
    let fixed = converted(&image, VHD[1]);
    forged.extend(&fixed[fixed.len() - SECTOR..]);
    assert!(refusal(&forged).contains("it begins as one kind of backup"));
    assert!(!is_backup(&fixed[30..300_000]) && !foreign::is_backup(&fixed[30..], &[]));
}

/// The text of a manifest.
fn manifest(files: &[(&str, &[u8])]) -> String {
    let line = |(name, content): &(&str, &[u8])| {
        let hash = Sha256::digest(content);
        let hash = hash
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        format!("SHA256({name})= {hash}\n")
    };
    files.iter().map(line).collect()
}

/// A tar archive of files in this order.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).unwrap();
    }
    piped(
        &format!(
            "tar -C '{}' --format=ustar -cf - {}",
            folder.path().display(),
            names.join(" ")
        ),
        b"",
    )
}

#[test]
fn an_ova_gives_its_disks_and_another_tar_archive_its_files() {
    let (one, two) = (image(47, 1_000_448), image(48, 400_384));
    let (first, second) = (
        footer_stream(&one, 128, 3, Fault::None),
        piped("gzip", &converted(&two, VMDK[1])),
    );
    let sparse = converted(&two, VMDK[0]);
    let ovf = b"<Envelope/>".to_vec();
    let disks: [(&str, &[u8]); 4] = [
        ("a.ovf", &ovf),
        ("disk1.vmdk", &first),
        ("disk2.vmdk.gz", &second),
        ("other.vmdk", &sparse),
    ];
    let text = manifest(&disks);
    let manifest_file = ("a.mf", text.as_bytes());
    let expected: [(&str, &[u8]); 5] = [
        ("a.mf", text.as_bytes()),
        ("a.ovf", &ovf),
        ("disk1.img", &one),
        ("disk2.img", &two),
        ("other.vmdk", &sparse),
    ];
    let expected = expected.map(|(name, content)| (PathBuf::from(name), content.to_vec()));
    let [ovf_file, one_file, two_file, other_file] = disks;
    for files in [
        [ovf_file, manifest_file, one_file, two_file, other_file],
        [ovf_file, one_file, two_file, other_file, manifest_file],
    ] {
        let ova = tar_of(&files);
        for bytes in [ova.clone(), piped("gzip -1", &ova), piped("zstd -q", &ova)] {
            let (whole, result) = read(&bytes);
            result.unwrap();
            assert!(whole.into_iter().eq(expected.clone()));
        }
        let (store, monitor) = (MemoryStore::of(ova), Silent::default());
        let backup = foreign::open(&store, &open_options(&|| Ok(Passphrase::new(Vec::new()))), &monitor).unwrap();
        assert_eq!(backup.kind(), "an OVA");
    }
    // An archive of other files has disks in the same form, and they stay what they are.
    let (whole, result) = read(&tar_of(&[one_file, two_file, ovf_file]));
    result.unwrap();
    assert!(whole[Path::new("disk1.vmdk")] == first && whole[Path::new("disk2.vmdk.gz")] == second);
}

#[test]
fn a_manifest_proves_the_files_of_an_ova() {
    let disk = footer_stream(&image(49, 300_032), 128, 0, Fault::None);
    let files: [(&str, &[u8]); 2] = [("a.ovf", b"<Envelope/>"), ("disk.vmdk", &disk)];
    let text = manifest(&files);
    let wrong = text.replace("disk.vmdk)= ", "disk.vmdk)= 0");
    let other = manifest(&[files[0], ("disk.vmdk", b"other")]);
    let more = text.clone() + &manifest(&[("more.vmdk", b"")]);
    for (text, part) in [
        (other, "`disk.vmdk` has another hash than its manifest says"),
        (more, "`more.vmdk` is missing, which its manifest names"),
        (wrong, "its manifest has a line that makes no sense"),
    ] {
        for is_first in [true, false] {
            let file = ("a.mf", text.as_bytes());
            let ova = if is_first {
                tar_of(&[files[0], file, files[1]])
            } else {
                tar_of(&[files[0], files[1], file])
            };
            let error = read(&ova).1.unwrap_err();
            assert!(
                matches!(error, Error::DamagedBackup { .. }) && error.to_string().contains(part),
                "{error}"
            );
        }
    }
    let sha1 = "SHA1(a.ovf)= 00\nSHA1(disk.vmdk)= 00\n";
    assert!(
        read(&tar_of(&[files[0], files[1], ("a.mf", sha1.as_bytes())]))
            .1
            .is_ok()
    );
    // Whatever is flipped in a disk is found, also what its own checksums do not cover.
    let ova = tar_of(&[files[0], ("a.mf", text.as_bytes()), files[1]]);
    let start = ova.windows(4).position(|window| window == b"KDMV").unwrap();
    let mut random = Random(50);
    for _ in 0..300 {
        let mut flipped = ova.clone();
        let at = start + usize::try_from(random.below(disk.len() as u64)).unwrap();
        flipped[at] ^= 1 << random.below(8);
        let (whole, result) = read(&flipped);
        assert!(result.is_err() && whole.len() <= 2, "byte {at}");
    }
}

/// Fixtures of all formats, small ones, and what they hold.
fn fixtures() -> Vec<(String, Vec<u8>, Vec<u8>)> {
    let image = image(51, 200_192);
    let options = VMDK.iter().chain(&VHD).chain(&VHDX[1..2]);
    let mut fixtures: Vec<(String, Vec<u8>)> = options
        .map(|options| ((*options).to_owned(), converted(&image, options)))
        .collect();
    fixtures.push(("footer".into(), footer_stream(&image, 128, 2, Fault::None)));
    fixtures.push((
        "log".into(),
        with_log(&converted(&image, VHDX[1]), |log| vec![log.entry(0, 0, 7, &log.table)]),
    ));
    let ova = tar_of(&[("a.ovf", b"<Envelope/>"), ("disk.vmdk", &converted(&image, VMDK[1]))]);
    fixtures.push(("ova".into(), ova));
    fixtures
        .into_iter()
        .map(|(name, bytes)| (name, bytes, image.clone()))
        .collect()
}

#[test]
fn a_disk_that_is_cut_off_is_damaged_unless_nothing_of_it_is_missing() {
    let mut random = Random(52);
    for (name, bytes, image) in fixtures() {
        let mut errors = 0;
        for round in 0..100 {
            let at = if round < 10 {
                round * SECTOR
            } else {
                usize::try_from(random.below(bytes.len() as u64)).unwrap()
            };
            let cut = &bytes[..at];
            if !is_backup(cut) {
                errors += 1;
                continue;
            }
            let (whole, result) = read(cut);
            if let Err(error) = result {
                assert!(
                    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
                    "{name}: {error:?}"
                );
                errors += 1;
            } else {
                assert!(
                    whole.values().any(|content| *content == image),
                    "{name}: cut at {at} of {}",
                    bytes.len()
                );
            }
        }
        // A fixed VHD without its footer is not known.
        assert!(errors > 30, "{name}: {errors}");
    }
}

#[test]
fn a_flipped_bit_of_a_disk_ends_in_an_error_or_in_some_content() {
    let mut random = Random(53);
    for (name, bytes, _) in fixtures() {
        let begin = Instant::now();
        // What is not zeros, so that not all flips are in a large file's holes.
        let places: Vec<usize> = (0..bytes.len())
            .filter(|at| {
                bytes[at / 64 * 64..][..64.min(bytes.len() - at / 64 * 64)]
                    .iter()
                    .any(|byte| *byte != 0)
            })
            .collect();
        let first = places.len().min(4096) as u64;
        for round in 0..1000u64 {
            let mut flipped = bytes.clone();
            let below = if round % 2 == 0 { first } else { places.len() as u64 };
            let at = places[usize::try_from(random.below(below)).unwrap()];
            flipped[at] ^= 1 << random.below(8);
            if is_backup(&flipped)
                && let Err(error) = events(&flipped)
            {
                assert!(
                    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
                    "{name}: {error:?}"
                );
            }
        }
        assert!(
            begin.elapsed() < Duration::from_secs(100),
            "{name}: {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn hostile_numbers_in_headers_end_in_errors() {
    let mut random = Random(54);
    let values = [
        0u64,
        1,
        2,
        0x7fff_ffff,
        0xffff_ffff,
        u64::MAX,
        u64::MAX / 2,
        u64::MAX / 512,
        1 << 40,
        1 << 20,
        512,
    ];
    for (name, bytes, _) in fixtures() {
        let is_vhd = name.starts_with("vpc");
        for _ in 0..1000 {
            let mut hostile = bytes.clone();
            // Headers, tables and the like, wherever they are in the first 3 MiB, or at the end.
            let begin = match random.below(4) {
                0 => 0,
                1 => hostile.len() - SECTOR,
                _ => usize::try_from(random.below(hostile.len().min(3 << 20) as u64)).unwrap() / 512 * 512,
            };
            for _ in 0..=random.below(2) {
                let value = values[usize::try_from(random.below(values.len() as u64)).unwrap()];
                let at = begin + usize::try_from(random.below(28)).unwrap() * 4;
                let value = if is_vhd {
                    value.to_be_bytes()
                } else {
                    value.to_le_bytes()
                };
                if let Some(place) = hostile.get_mut(at..at + 8) {
                    place.copy_from_slice(&value);
                }
            }
            if is_vhd {
                let end = hostile.len() - SECTOR;
                let footer: Vec<u8> = hostile[begin..begin + SECTOR].to_vec();
                if footer.starts_with(b"conectix") {
                    hostile[..SECTOR].copy_from_slice(&footer);
                    hostile[end..].copy_from_slice(&footer);
                    sum_at(&mut hostile[..SECTOR], 64);
                    sum_at(&mut hostile[end..], 64);
                } else if footer.starts_with(b"cxsparse") {
                    sum_at(&mut hostile[begin..begin + 1024], 36);
                }
            } else {
                for at in [65_536, 131_072]
                    .into_iter()
                    .filter(|_| name.contains("vhdx") || name == "log")
                {
                    crc_at(&mut hostile[at..at + 4096]);
                }
                for at in [196_608, 262_144]
                    .into_iter()
                    .filter(|_| name.contains("vhdx") || name == "log")
                {
                    crc_at(&mut hostile[at..at + 65_536]);
                }
            }
            if is_backup(&hostile)
                && let Err(error) = events(&hostile)
            {
                assert!(
                    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
                    "{name}: {error:?}"
                );
            }
        }
    }
}

#[test]
fn pieces_in_the_same_place_are_damage() {
    let image = content(55, 8 << 20);
    let mut disk = converted(&image, VMDK[0]);
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let directory = usize::try_from(number(&disk, 56)).unwrap() * SECTOR;
    let table = u32::from_le_bytes(disk[directory..directory + 4].try_into().unwrap()) as usize * SECTOR;
    let first = disk[table..table + 4].to_vec();
    disk[12..20].copy_from_slice(&65_536u64.to_le_bytes());
    for entry in 0..512 {
        disk[table + entry * 4..][..4].copy_from_slice(&first);
    }
    let text = read(&disk).1.unwrap_err().to_string();
    assert!(text.contains("several pieces of the disk in the same place"), "{text}");
}

#[test]
fn huge_disks_with_nothing_inside_are_read_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let make = |options: &str, size: &str| {
        qemu(folder.path(), &format!("create -f {options} disk {size}"));
        let bytes = std::fs::read(folder.path().join("disk")).unwrap();
        std::fs::remove_file(folder.path().join("disk")).unwrap();
        bytes
    };
    let capacity = (32u64 << 40) / 512;
    let mut sparse = converted(&image(56, 100_352), VMDK[0]);
    let place = (sparse.len() / SECTOR) as u64;
    sparse.resize(sparse.len() + (4 << 20), 0);
    sparse[12..20].copy_from_slice(&capacity.to_le_bytes());
    sparse[56..64].copy_from_slice(&place.to_le_bytes());
    let stream = footer_stream(&image(56, 131_072), 128, 0, Fault::Capacity(capacity));
    for (bytes, what) in [
        (make("vpc -o force_size=on", "2040G"), "VHD"),
        (make("vhdx", "32T"), "VHDX"),
        (sparse, "VMDK"),
        (stream, "VMDK, a stream"),
    ] {
        let begin = Instant::now();
        events(&bytes).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(
            begin.elapsed() < Duration::from_secs(3),
            "{what}: {:?}",
            begin.elapsed()
        );
    }
}

/// What qemu-img makes of a VHDX whose log it replays.
fn replayed_by_qemu(disk: &[u8]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("disk"), disk).unwrap();
    let mut command = Command::new("qemu-img");
    command
        .current_dir(folder.path())
        .args(["check", "-q", "-f", "vhdx", "-r", "all", "disk"]);
    command.output().unwrap();
    qemu(folder.path(), "convert -f vhdx -O raw disk raw");
    std::fs::read(folder.path().join("raw")).unwrap()
}

/// Makes the entries of a log.
type Make<'a> = &'a dyn Fn(&LogMaker) -> Vec<(usize, Vec<u8>)>;

#[test]
fn the_log_of_a_vhdx_is_replayed() {
    let image = image(57, (6 << 20) + 512);
    let disk = converted(&image, VHDX[1]);
    let wrong = |log: &LogMaker| vec![(log.table[0].0, vec![0x16; 4096])];
    let zeros = |log: &LogMaker| vec![(log.table[0].0, vec![0; 8192])];
    let cases: [(&str, Make<'_>); 5] = [
        ("a single entry", &|log| vec![log.entry(0, 0, 7, &log.table)]),
        ("a later entry wins", &|log| {
            vec![
                log.entry(0, 0, 7, &wrong(log)),
                log.entry(8192, 0, 8, &zeros(log)),
                log.entry(12_288, 0, 9, &log.table),
            ]
        }),
        ("a ring", &|log| {
            vec![log.entry(log.bytes - 4096, log.bytes - 4096, 1 << 40, &log.table)]
        }),
        ("what came before is over", &|log| {
            vec![
                log.entry(0, 0, 9, &log.table),
                log.entry(65_536, 65_536, 3, &wrong(log)),
                log.entry(73_728, 65_536, 4, &wrong(log)),
            ]
        }),
        ("the last entry was not written to its end", &|log| {
            let mut torn = log.entry(8192, 0, 10, &wrong(log));
            torn.1[5000] ^= 1;
            vec![log.entry(0, 0, 9, &log.table), torn]
        }),
    ];
    for (what, make) in cases {
        let dirty = with_log(&disk, make);
        assert!(only_volume(&dirty, what) == image, "{what}");
        assert!(replayed_by_qemu(&dirty) == image, "qemu: {what}");
    }
    let problem = |make: Make<'_>| read(&with_log(&disk, make)).1.unwrap_err().to_string();
    for (text, part) in [
        (
            problem(&|log| {
                let mut entry = log.entry(0, 0, 7, &log.table);
                entry.1[4200] ^= 1;
                vec![entry]
            }),
            "its log has entries, and none that can be replayed",
        ),
        (
            problem(&|log| vec![log.entry(0, 4096, 7, &log.table)]),
            "none that can be replayed",
        ),
        (
            problem(&|log| {
                let longer = LogMaker {
                    file_bytes: 1 << 40,
                    table: Vec::new(),
                    ..*log
                };
                vec![longer.entry(0, 0, 7, &log.table)]
            }),
            "it is shorter than its log says",
        ),
        (
            problem(&|log| vec![log.entry(0, 0, 7, &[(5, vec![1; 4096])])]),
            "an entry of its log makes no sense",
        ),
    ] {
        assert!(text.contains(part), "{text}");
    }
}

/// Nothing of a compressed disk is cut off, since the end of a raw image is its guest's to choose.
#[test]
fn the_footer_of_a_compressed_disk_is_noted_and_kept() {
    for length in [512, 65_024, 1 << 20, (1 << 20) + 512, (5 << 20) - 512] {
        let disk = converted(&image(61, length), VHD[1]);
        let compressed = piped("gzip", &disk);
        assert!(only_volume(&compressed, "compressed") == disk);
        let notes = Notes::of(&MemoryStore::of(compressed));
        assert!(
            matches!(&notes[..], [note] if note.contains("ends with the footer of a fixed VHD")),
            "{length} bytes: {notes:?}"
        );
        assert_eq!(Notes::of(&MemoryStore::of(disk.clone())), [""; 0]);
        let cut = piped("gzip", &disk[..disk.len() - 1]);
        assert_eq!(Notes::of(&MemoryStore::of(cut)), [""; 0]);
    }
}
