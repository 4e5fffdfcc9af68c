// Goal: a small archive takes no more memory than the limits of the format allow, whatever it says.

use std::path::Path;
use std::process::{Command, Stdio};

use vmfold::archive::commit::Commit;
use vmfold::archive::manifest::{self, PlanPart};
use vmfold::archive::record::{EpochId, HEADER_BYTES, LaneId, RecordHeader, RecordKind, hash_of};
use vmfold::codec::{payload_body, put_entry, put_string, put_varint};
use vmfold::numbers::CommitNumber;
use vmfold::testing::raw_archive::RawArchive;

use crate::scene::{last_of, records, scratch, two_commits, with};

/// Address space for a whole process: all limits together, lists that lie in files, what an allocator keeps, and threads.
const LIMIT_KIB: u64 = 1536 << 10;

const FOLDER: u8 = 0x81;
const IMAGE: u8 = 0x82;
const RUNS: u8 = 0x83;

/// An archive of one commit, whose PLANs of both parts have these contents.
fn archive_of(contents: &[Vec<u8>]) -> Vec<u8> {
    let plans = [PlanPart::Planned, PlanPart::Final].into_iter().flat_map(|part| {
        (1..).zip(contents).map(move |(number, content)| {
            let body = manifest::encode(CommitNumber(1), part, number == contents.len(), content);
            (part.number(), body.unwrap())
        })
    });
    let commit = Commit {
        number: CommitNumber(1),
        ..Commit::default()
    };
    RawArchive::of_plans(plans.collect(), &[], commit).sealed()
}

/// Contents of PLANs of 4 MiB, each full of entries.
fn full_of(plans: u32, tag: u8, mut fields: impl FnMut(u32, &mut Vec<u8>)) -> Vec<Vec<u8>> {
    let mut number = 0;
    let mut content = || {
        let mut content = Vec::new();
        while content.len() < (4 << 20) - (1 << 19) {
            put_entry(&mut content, tag, |encoded| fields(number, encoded));
            number += 1;
        }
        content
    };
    (0..plans).map(|_| content()).collect()
}

fn put_image(encoded: &mut Vec<u8>, number: u32, size: u64, names: u64, attributes: u64) {
    put_varint(encoded, number.into());
    put_varint(encoded, size);
    put_varint(encoded, names);
    for _ in 0..names {
        put_string(encoded, b"a");
    }
    put_varint(encoded, attributes);
    for _ in 0..attributes {
        put_entry(encoded, 4, |attribute| put_string(attribute, b"u"));
    }
}

/// An archive with another record in it, behind the HEAD of its last epoch.
fn with_record(kind: RecordKind, body_bytes: u64, body: &[u8]) -> Vec<u8> {
    let (bytes, _) = two_commits();
    let head = last_of(&bytes, RecordKind::Head);
    let header = RecordHeader {
        kind,
        sequence: 1 << 20,
        body_bytes,
        body_hash: hash_of(body),
        ..head.header
    };
    with(
        &bytes,
        head.range.end..head.range.end,
        &[&header.encode()[..], body].concat(),
    )
}

/// An archive with LISTs of images before its last COMMIT, of which that names none.
fn with_lists(lists: u8) -> Vec<u8> {
    let (bytes, _) = two_commits();
    let head = last_of(&bytes, RecordKind::Head);
    let mut entries = Vec::new();
    while entries.len() < (4 << 20) - 100 {
        put_entry(&mut entries, 0x81, |fields| {
            fields.extend([0; 4 + 32]);
            put_string(fields, b"a");
        });
    }
    let mut more = Vec::new();
    for number in 0..lists {
        entries[2] = number % 0x80;
        entries[3] = number / 0x80;
        let mut record = head.clone();
        record.header.kind = RecordKind::List;
        record.header.sequence = (1 << 20) + u64::from(number);
        more.extend(record.with_body(payload_body([1, 0, 0], &entries).unwrap()));
    }
    with(&bytes, head.range.end..head.range.end, &more)
}

/// An archive whose last epoch has LISTs of many used ranges and of many records, and no COMMIT: what is salvaged of it is bounded too.
fn with_lists_and_no_commit(lists: u8) -> Vec<u8> {
    let (bytes, _) = two_commits();
    let last = last_of(&bytes, RecordKind::Tail).header.epoch;
    let mut uses = Vec::new();
    put_entry(&mut uses, 4, |fields| {
        put_varint(fields, 1 << 20);
        fields.extend(std::iter::repeat_n([0, 1], 1 << 20).flatten());
    });
    let mut listed = Vec::new();
    while listed.len() < (4 << 20) - 100 {
        put_entry(&mut listed, 0x81, |fields| {
            fields.extend([4, 0, 0, 1, 0, 0, 0, 0]);
            fields.extend([7; 32]);
        });
    }
    let mut more = Vec::new();
    for number in 0..lists {
        for entries in [&mut uses, &mut listed] {
            // Each has another body.
            let end = entries.len() - 1;
            entries[end] = number % 0x80;
            let mut record = last_of(&bytes, RecordKind::Head);
            record.header.kind = RecordKind::List;
            record.header.sequence = (1 << 20) + 2 * u64::from(number) + entries.len() as u64 % 2;
            more.extend(record.with_body(payload_body([0, 0, 0], entries).unwrap()));
        }
    }
    let kept = records(&bytes).into_iter().filter(|record| {
        let is_commit = matches!(record.header.kind, RecordKind::Commit | RecordKind::List);
        record.header.epoch != last || !is_commit
    });
    let mut archive: Vec<u8> = Vec::new();
    for record in kept {
        archive.extend(&bytes[record.range.clone()]);
        if record.header.epoch == last && record.header.kind == RecordKind::Head {
            archive.extend(&more);
        }
    }
    archive
}

fn cases() -> Vec<(&'static str, Vec<u8>)> {
    let path = |_: u32, encoded: &mut Vec<u8>| {
        put_string(encoded, &[b'x'; 255]);
        put_varint(encoded, 0);
    };
    let runs = |number: u32, encoded: &mut Vec<u8>| {
        const COUNT: u32 = 1 << 16;
        put_varint(encoded, 0);
        put_varint(encoded, (number * COUNT).into());
        put_varint(encoded, COUNT.into());
        // Holes and zeros in turn, of a block each.
        (0..COUNT).for_each(|run| encoded.push(4 + u8::try_from(run % 2).unwrap()));
    };
    let mut image_of_runs = Vec::new();
    put_entry(&mut image_of_runs, IMAGE, |encoded| {
        put_image(encoded, 0, 1 << 40, 1, 0);
    });
    let mut fragmented = vec![image_of_runs];
    fragmented.extend(full_of(5, RUNS, runs));
    let zeros = vec![0; 33 << 20];
    vec![
        (
            "names",
            archive_of(&full_of(24, IMAGE, |number, encoded| {
                put_image(encoded, number, 0, 60_000, 0);
            })),
        ),
        (
            "attributes",
            archive_of(&full_of(24, IMAGE, |number, encoded| {
                put_image(encoded, number, 0, 1, 60_000);
            })),
        ),
        (
            "images",
            archive_of(&full_of(24, IMAGE, |number, encoded| {
                put_image(encoded, number, 0, 1, 0);
            })),
        ),
        ("folders", archive_of(&full_of(24, FOLDER, path))),
        ("runs", archive_of(&fragmented)),
        ("LISTs", with_lists(200)),
        ("LISTs without COMMIT", with_lists_and_no_commit(100)),
        (
            "a NOTE that is too long",
            with_record(RecordKind::Note, 1 << 20, &vec![0; 1 << 20]),
        ),
        ("a NOTE without end", with_record(RecordKind::Note, u64::MAX, &[])),
        (
            "a record of a kind not known",
            with_record(RecordKind::Other(77), zeros.len() as u64, &zeros),
        ),
        (
            "one that says to be longer",
            with_record(RecordKind::Other(77), 1 << 40, &zeros),
        ),
        (
            "one that is not there",
            with_record(RecordKind::Other(77), 33 << 20, &[]),
        ),
    ]
}

/// Runs a verb with a limit of memory, which it must not need: it ends with an answer.
fn run_limited(case: &str, archive: &Path, verb: &str) {
    let to = archive.with_extension("to");
    let script = match verb {
        "pipe" | "pipe --partial" => format!("import - --to \"$2\" --index \"$2.index\" {} < \"$1\"", &verb[4..]),
        "import" | "import --partial" => format!("{verb} \"$1\" --to \"$2\" --index \"$2.index\""),
        verb => format!("{verb} \"$1\""),
    };
    let script = format!("ulimit -v {LIMIT_KIB}; exec \"$0\" {script}");
    let mut command = Command::new("sh");
    command
        .args(["-c", &script, env!("CARGO_BIN_EXE_vmfold")])
        .arg(archive)
        .arg(&to);
    // Arenas of threads take address space, and no memory.
    let output = command
        .env("MALLOC_ARENA_MAX", "1")
        .stdout(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let code = output.status.code();
    assert!(
        matches!(code, Some(0..=5)) && !text.contains("panicked"),
        "{case}: {verb}: {code:?} {text}"
    );
    let _ = std::fs::remove_dir_all(to);
}

#[test]
fn hostile_archives_take_bounded_memory() {
    let folder = scratch();
    for (case, bytes) in cases() {
        let archive = folder.path().join("a.vmfold");
        std::fs::write(&archive, &bytes).unwrap();
        // Runs are decoded alike everywhere, and very many take their time.
        let verbs: &[&str] = match case {
            "runs" => &["pipe --partial"],
            _ => &["list", "verify", "import --partial", "pipe", "pipe --partial"],
        };
        for verb in verbs {
            run_limited(case, &archive, verb);
        }
    }
}

/// The same where the limit is that of records: very many that say nothing.
#[test]
fn very_many_records_take_bounded_memory() {
    const NOTES: u64 = 200_000;
    let (bytes, _) = two_commits();
    let head = last_of(&bytes, RecordKind::Head);
    let (lane, epoch) = (LaneId(head.header.lane.0), EpochId(head.header.epoch.0));
    let mut notes = Vec::with_capacity(usize::try_from(NOTES).unwrap() * HEADER_BYTES);
    for number in 0..NOTES {
        let header = RecordHeader::of_body(RecordKind::Note, lane, epoch, (1 << 20) + number, &mut []).unwrap();
        notes.extend(header.encode());
    }
    let folder = scratch();
    let archive = folder.path().join("a.vmfold");
    std::fs::write(&archive, with(&bytes, head.range.end..head.range.end, &notes)).unwrap();
    for verb in ["list", "verify", "import", "pipe"] {
        run_limited("NOTEs", &archive, verb);
    }
}
