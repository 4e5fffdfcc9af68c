// Backups that ask for far more than they have, made by hand: of time, of memory, or of the user's attention.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use vmfold::foreign::machines_of;

use crate::backup_seeds;
use crate::backups::{Backups, Case, limits};
use crate::made::{LogMaker, crc_at, with_log};
use crate::mutate_backups::seal_header;
use crate::qvm_maker::{Model, compress};
use crate::{TURN, peak_bytes};

/// Without optimisation, there is less to do.
const SCALE: usize = if cfg!(debug_assertions) { 64 } else { 1 };

/// A header of tar, of a kind, with a name and a length, and the content.
fn entry(kind: u8, name: &str, content: &[u8]) -> Vec<u8> {
    let mut entry = vec![0; 512];
    entry[..name.len()].copy_from_slice(name.as_bytes());
    entry[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    entry[156] = kind;
    entry[257..265].copy_from_slice(b"ustar\x0000");
    seal_header(&mut entry);
    entry.extend(content);
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

fn archive(entries: &[Vec<u8>]) -> Vec<u8> {
    [&entries.concat()[..], &[0; 1024]].concat()
}

/// Reads a backup, of which nothing may be wrong but what is expected. Returns the error, and how many notes there were.
fn outcome(what: &str, case: &Case) -> (String, usize) {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir().unwrap();
    let mut harness = Backups::new(folder.path(), &peak_bytes);
    let problems = harness.check(what, case, false, true);
    assert!(problems.is_empty(), "{what}: {problems:?}");
    (harness.last_error, harness.last_notes)
}

fn of(bytes: Vec<u8>) -> Case {
    Case {
        bytes,
        ..Case::default()
    }
}

#[test]
fn what_is_left_out_of_a_tar_archive_is_named_up_to_twenty_times() {
    let pipes: Vec<Vec<u8>> = (0..100)
        .map(|number| entry(b'6', &format!("pipe{number}"), b""))
        .collect();
    assert_eq!(outcome("pipes", &of(archive(&pipes))), (String::new(), 21));
    assert_eq!(outcome("some pipes", &of(archive(&pipes[..20]))), (String::new(), 20));
}

#[test]
fn snapshots_are_named_up_to_twenty_times() {
    let image = |count: u32| {
        let mut image = vec![0; 512 + 40 * count as usize];
        image[..8].copy_from_slice(b"QFI\xfb\0\0\0\x02");
        image[20..24].copy_from_slice(&16u32.to_be_bytes());
        image[60..64].copy_from_slice(&count.to_be_bytes());
        image[64..72].copy_from_slice(&512u64.to_be_bytes());
        of(image)
    };
    for (count, notes) in [(20, 20), (21, 21), (1000, 21)] {
        assert_eq!(outcome("snapshots", &image(count)), (String::new(), notes));
    }
}

#[test]
fn manifests_of_an_ova_are_read_up_to_a_length_and_noted_once() {
    let ovf = entry(b'0', "a.ovf", b"<Envelope/>");
    let other = |number: u32| entry(b'0', &format!("{number}.mf"), b"SHA1(a.ovf)= 00\n");
    let some: Vec<Vec<u8>> = [ovf.clone()].into_iter().chain((0..50).map(other)).collect();
    assert_eq!(outcome("manifests", &of(archive(&some))), (String::new(), 1));
    let line = format!("SHA256(b)= {}\n", "0".repeat(64));
    let long = line.repeat(600_000 / line.len());
    let manifest = |name: &str| entry(b'0', name, long.as_bytes());
    let (error, _) = outcome(
        "long manifests",
        &of(archive(&[ovf, manifest("1.mf"), manifest("2.mf")])),
    );
    assert!(error.contains("its manifest is longer than allowed"), "{error}");
}

/// Of several files that are others, the same one is named each time: reading it again shows that.
#[test]
fn files_of_an_ova_that_have_other_hashes_are_named_in_their_order() {
    let file = |number: u32| entry(b'0', &format!("file{number:02}"), b"some");
    let line = |number: u32| format!("SHA256(file{number:02})= {}\n", "0".repeat(64));
    let lines = (0..20).map(line).collect::<Vec<_>>().concat();
    let mut entries = vec![entry(b'0', "a.ovf", b"<Envelope/>")];
    entries.extend((0..20).rev().map(file));
    entries.push(entry(b'0', "a.mf", lines.as_bytes()));
    let (error, _) = outcome("other hashes", &of(archive(&entries)));
    assert!(error.contains("`file00` has another hash"), "{error}");
}

#[test]
fn the_home_folder_of_dom0_is_noted_once() {
    // Version 3 is noted as well.
    for (format, notes) in [("qvm", 1), ("qvm3", 2)] {
        let mut model = some_model(format);
        for number in 0..30 {
            let archive = model.members[0].1.clone();
            model.members.push((format!("dom0-home/user{number}"), archive));
        }
        model.members.retain(|(name, _)| !name.ends_with("/."));
        assert_eq!(outcome("homes", &of(model.make())).1, notes);
    }
}

#[test]
fn what_is_left_out_of_a_folder_of_qubes_is_named_up_to_twenty_times() {
    let mut model = some_model("qvm3");
    let template = model.members.iter_mut().find(|(name, _)| name == "vm2/.").unwrap();
    template.1 = archive(
        &(0..100)
            .map(|number| entry(b'6', &format!("vm2/./pipe{number}"), b""))
            .chain(["root.img", "private.img"].map(|name| entry(b'0', &format!("vm2/./{name}"), b"")))
            .collect::<Vec<_>>(),
    );
    assert_eq!(outcome("pipes", &of(model.make())), (String::new(), 22));
}

/// What the first backup of a format is made of.
fn some_model(format: &'static str) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let seeds = backup_seeds::seeds(format, folder.path()).seeds;
    seeds.into_iter().find_map(|seed| seed.model).unwrap()
}

/// A part whose header says that it ends behind all that a file may have is damage, and no error of the disk.
#[test]
fn parts_that_end_nowhere_are_damage() {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir().unwrap();
    let format = backup_seeds::seeds("qvm", folder.path());
    let mut bytes = format.seeds[0].bytes.clone();
    let mut part = entry(b'0', "vm7/x.000.enc", b"");
    part[124] = 0x80;
    part[125..136].fill(0);
    part[128..136].copy_from_slice(&(u64::MAX - 4000).to_be_bytes());
    seal_header(&mut part);
    bytes.extend(part);
    let mut harness = Backups::new(folder.path(), &peak_bytes);
    let problems = harness.check("parts", &of(bytes), true, true);
    assert!(problems.is_empty(), "{problems:?}");
    assert!(
        harness.last_error.contains("a size that is not allowed"),
        "{}",
        harness.last_error
    );
}

/// The log of a VHDX says that the file is very long, and that its table lies at the end of that.
#[test]
fn tables_at_the_end_of_all_numbers_are_damage() {
    let folder = tempfile::tempdir().unwrap();
    let plain = backup_seeds::seeds("vhdx", folder.path()).seeds.swap_remove(0).bytes;
    let mut bytes = with_log(&plain, |log| {
        let longest = LogMaker {
            file_bytes: u64::MAX,
            table: Vec::new(),
            ..*log
        };
        let mut entry = longest.entry(0, 0, 7, &[]);
        // The length that the file had is what it has.
        entry.1[48..56].copy_from_slice(&0u64.to_le_bytes());
        crc_at(&mut entry.1);
        vec![entry]
    });
    for at in [196_608, 262_144] {
        let table = at + 16..at + 16 + 64;
        for entry in table.step_by(32) {
            if bytes[entry..].starts_with(&[0x66, 0x77, 0xc2, 0x2d]) {
                bytes[entry + 16..entry + 24].copy_from_slice(&(u64::MAX - 70_000).to_le_bytes());
                bytes[entry + 24..entry + 28].copy_from_slice(&65_536u32.to_le_bytes());
            }
        }
        crc_at(&mut bytes[at..at + 65_536]);
    }
    let (error, _) = outcome("log", &of(bytes));
    assert!(error.contains("longer than any file may be"), "{error}");
}

#[test]
fn what_is_skipped_of_a_compressed_backup_is_bounded_too() {
    let bytes = archive(&[entry(b'V', "label", &vec![0; 8 << 20]), entry(b'0', "a", b"a")]);
    let mut case = of(compress("zstd", &bytes));
    assert_eq!(outcome("skipped", &case).0, "");
    case.limits = Some(vmfold::foreign::Limits {
        volume_bytes: 1 << 20,
        ..limits()
    });
    let (error, _) = outcome("skipped", &case);
    assert!(error.contains("it decompresses to more than vmfold takes"), "{error}");
}

#[test]
fn many_files_of_large_content_are_more_than_the_limits_allow() {
    let files: Vec<Vec<u8>> = (0..5)
        .map(|number| entry(b'0', &format!("{number}"), &[1; 300]))
        .collect();
    let mut case = of(archive(&files));
    case.limits = Some(vmfold::foreign::Limits {
        volume_bytes: 1000,
        ..limits()
    });
    let (error, _) = outcome("content", &case);
    assert!(error.contains("it has more content than vmfold takes"), "{error}");
}

#[test]
fn long_maps_of_sparse_files_are_read_in_bounded_memory() {
    let ranges = (2 << 20) / SCALE;
    let mut records = String::new();
    let pax = |key: &str, value: &str| {
        let rest = key.len() + value.len() + 3;
        let length = (1..4)
            .map(|digits| rest + digits)
            .find(|length| length.to_string().len() + rest == *length);
        format!("{} {key}={value}\n", length.unwrap())
    };
    records += &pax("GNU.sparse.size", &(1u64 << 36).to_string());
    // Each range has one byte, in a block of its own.
    let mut map = String::new();
    for number in 0..ranges {
        let _ = write!(map, "{},1,", number * 8192);
    }
    let rest = "GNU.sparse.map".len() + map.len() + 3;
    let length = (1..12)
        .map(|digits| rest + digits)
        .find(|length| length.to_string().len() + rest == *length);
    let _ = writeln!(records, "{} GNU.sparse.map={map}", length.unwrap());
    let bytes = archive(&[
        entry(b'x', "pax", records.as_bytes()),
        entry(b'0', "a", &vec![7; ranges]),
    ]);
    assert_eq!(outcome("map", &of(bytes)).0, "");
}

#[test]
fn descriptions_of_machines_are_read_soon_whatever_is_in_them() {
    let size = (8 << 20) / SCALE;
    let filled = |text: &str| text.repeat(size / text.len());
    let attribute = |number: u32| format!(" a{number}=\"\"");
    let attributes = (0..1700).map(attribute).collect::<Vec<_>>().concat();
    let domain = |number: usize| {
        format!(
            "<domain><properties><property name=\"name\">a{number}</property></properties><features>\
             <feature name=\"backup-content\">True</feature><feature name=\"backup-path\">vm{number}</feature></features></domain>"
        )
    };
    let domains: String = (0..size / 220).map(domain).collect();
    let cases = [
        ("open", filled("<a>")),
        ("nested", filled("<a>") + &filled("</a>")),
        ("siblings", format!("<a>{}</a>", filled("<b/>"))),
        ("attributes", format!("<a>{}</a>", filled(&format!("<b{attributes}/>")))),
        ("references", format!("<a>{}</a>", filled("&#65;"))),
        ("comments", format!("<a>{}</a>", filled("<!---->"))),
        ("domains", format!("<a>{domains}</a>")),
        (
            "features",
            format!(
                "<a><domain>{}</domain></a>",
                filled("<features><feature name=\"x\"/></features>")
            ),
        ),
        ("nested domains", filled("<domain>") + &filled("</domain>")),
        (
            "volumes",
            format!("<a>{}</a>", filled("<domain><volume-config/></domain>")),
        ),
        ("close", filled("</a>")),
        ("text", format!("<a>{}</a>", filled("a "))),
        ("doctype", format!("<!DOCTYPE a [{}]><a/>", filled("<!ENTITY a \"b\">"))),
        ("instructions", format!("<a>{}</a>", filled("<?a b?>"))),
        ("data", format!("<a>{}</a>", filled("<![CDATA[a]]>"))),
    ];
    for (what, xml) in cases {
        let _turn = TURN.lock();
        peak_bytes();
        let begun = Instant::now();
        let _ = machines_of(&xml);
        let (took, bytes) = (begun.elapsed(), peak_bytes());
        println!("{what}: {took:?}, {} MiB", bytes >> 20);
        assert!(
            took < Duration::from_secs(10) && bytes < 384 << 20,
            "{what}: {took:?}, {bytes} bytes"
        );
    }
}
