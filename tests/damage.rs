//! Goal: whatever happens to an archive, what is restored is what was stored, or an error that names what is lost; never a wrong
//! byte. Method: a golden archive, each of its records damaged in each way, restored whole and as far as possible, and compared
//! with what it holds undamaged.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use vmfold::archive::commit::Commit;
use vmfold::archive::list::{self, ImageSummary, Listed};
use vmfold::archive::record::{EpochId, HEADER_BYTES, LaneId, RecordHeader, RecordKind};
use vmfold::error::Error;
use vmfold::exec::hashes::Digest;
use vmfold::exec::restore::RestoreOptions;
use vmfold::monitor::Silent;
use vmfold::numbers::CommitNumber;
use vmfold::ops::import::{ImportOptions, import};
use vmfold::ops::verify::verify;
use vmfold::ops::{ArchivePlace, BackupAccess};
use vmfold::report::Imported;
use vmfold::testing::raw_archive::RawArchive;

const GOLDEN: &[u8] = include_bytes!("../testdata/archive-v1.vmfold");

/// Where each record of an archive is, and what it is.
fn records(bytes: &[u8]) -> Vec<(std::ops::Range<usize>, RecordKind)> {
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let header = RecordHeader::decode(bytes[at..].first_chunk().unwrap()).unwrap();
        let end = at + HEADER_BYTES + usize::try_from(header.body_bytes).unwrap();
        found.push((at..end, header.kind));
        at = end;
    }
    found
}

/// A folder in memory, where there is one: everything is synced often.
fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn restore(archive: &Path, to: &Path, commit: Option<&str>, partial: bool) -> Result<Imported, Error> {
    let options = ImportOptions {
        archive: ArchivePlace::File(archive.to_owned()),
        commit: commit.map(str::to_owned),
        restore: RestoreOptions {
            to: to.to_owned(),
            partial,
            ..RestoreOptions::default()
        },
        seeds: Vec::new(),
        index: to.join("index"),
        memory_bytes: Some(64 << 20),
        dry_run: false,
        access: BackupAccess::default(),
    };
    import(&options, &Silent::default())
}

type Content = BTreeMap<PathBuf, Vec<u8>>;

fn content_of(folder: &Path) -> Content {
    let files = walkdir::WalkDir::new(folder).into_iter().filter_map(Result::ok);
    files
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| {
            let name = entry.path().strip_prefix(folder).unwrap().to_owned();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// What the commits of the undamaged archive hold.
fn intact() -> Vec<Content> {
    let folder = scratch();
    let archive = folder.path().join("a.vmfold");
    std::fs::write(&archive, GOLDEN).unwrap();
    let restored = ["1", "2"].map(|commit| {
        let to = folder.path().join(commit);
        let done = restore(&archive, &to, Some(commit), false).unwrap();
        assert!(done.lost.is_empty());
        content_of(&to)
    });
    restored.to_vec()
}

/// What became of one damaged archive.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Outcome {
    /// Files restored whole.
    whole: usize,
    /// Images of which a part was restored.
    parts: usize,
    /// Images that are named as lost.
    lost: usize,
    /// Verification found something.
    noticed: bool,
}

/// Restores a damaged archive and checks that nothing of it is wrong.
fn check(case: &str, bytes: &[u8], intact: &[Content]) -> Outcome {
    let folder = scratch();
    let archive = folder.path().join("a.vmfold");
    std::fs::write(&archive, bytes).unwrap();
    let to = folder.path().join("whole");
    match restore(&archive, &to, None, false) {
        Ok(done) if done.lost.is_empty() => {
            let expected = if done.later_damage { &intact[0] } else { &intact[1] };
            let expected = if done.commit == CommitNumber(1) {
                &intact[0]
            } else {
                expected
            };
            assert!(content_of(&to) == *expected, "{case}: restored as if it were whole");
        }
        Ok(done) => {
            let files = content_of(&to);
            assert!(
                files.is_empty(),
                "{case}: {:?} lost, but {:?} restored",
                done.lost,
                files.keys()
            );
        }
        Err(error) => assert!(error.to_string().contains('`'), "{case}: {error} names nothing"),
    }
    let noticed = match verify(&archive, &Silent::default()) {
        Ok(verified) => !verified.damage.is_empty() || !verified.lost.is_empty() || !verified.is_ended,
        Err(error) => {
            assert!(error.to_string().contains("a.vmfold"), "{case}: {error}");
            true
        }
    };
    let to = folder.path().join("parts");
    let mut outcome = Outcome {
        noticed,
        ..Outcome::default()
    };
    let Ok(done) = restore(&archive, &to, None, true) else {
        return outcome;
    };
    let expected = &intact[done.commit.0.min(2) as usize - 1];
    for (name, content) in content_of(&to) {
        let text = name.to_str().unwrap();
        let Some(whole) = text.strip_suffix(".vmfold-partial") else {
            assert!(content == expected[&name], "{case}: `{text}` is not what was stored");
            outcome.whole += 1;
            continue;
        };
        let expected = &expected[Path::new(whole)];
        let lost = done.lost.iter().find(|lost| lost.path == Path::new(whole)).unwrap();
        assert_eq!(content.len(), expected.len(), "{case}: `{text}`");
        for (at, (found, expected)) in (0u64..).zip(content.iter().zip(expected)) {
            let is_lost = lost
                .ranges
                .iter()
                .any(|range| range.start <= at && at < range.start + range.length);
            assert!(
                found == expected || (is_lost && *found == 0),
                "{case}: byte {at} of `{text}`"
            );
        }
        outcome.parts += 1;
    }
    outcome.lost = done.lost.len();
    let images = 3;
    assert!(
        outcome.whole + outcome.lost >= images,
        "{case}: {outcome:?} does not account for every image"
    );
    outcome
}

/// Each record, damaged in each way.
#[test]
fn damage_never_makes_a_wrong_byte() {
    let intact = intact();
    assert_eq!(
        check("none", GOLDEN, &intact),
        Outcome {
            whole: 4,
            ..Outcome::default()
        }
    );
    let records = records(GOLDEN);
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    for (n, (range, kind)) in records.iter().enumerate() {
        let name = |what: &str| format!("{} {n}: {what}", kind.name());
        for (what, at) in [
            ("magic", range.start),
            ("kind", range.start + 8),
            ("length", range.start + 50),
            ("first byte", range.start + HEADER_BYTES),
            ("middle", range.start + HEADER_BYTES + (range.len() - HEADER_BYTES) / 2),
            ("last byte", range.end - 1),
        ] {
            let mut bytes = GOLDEN.to_vec();
            bytes[at] ^= 0x10;
            cases.push((name(&format!("{what} flipped")), bytes));
        }
        let mut zeroed = GOLDEN.to_vec();
        let end = range.end.min(range.start + 512);
        zeroed[range.start..end].fill(0);
        cases.push((name("first sector zeroed"), zeroed));
        let mut zeroed = GOLDEN.to_vec();
        zeroed[range.end.saturating_sub(512).max(range.start + HEADER_BYTES)..range.end].fill(0);
        cases.push((name("last sector zeroed"), zeroed));
        for (what, end) in [
            ("before", range.start),
            ("in its header", range.start + 50),
            ("in its body", range.end - 1),
        ] {
            cases.push((name(&format!("truncated {what}")), GOLDEN[..end].to_vec()));
        }
        let record = &GOLDEN[range.clone()];
        cases.push((name("missing"), [&GOLDEN[..range.start], &GOLDEN[range.end..]].concat()));
        cases.push((
            name("twice"),
            [&GOLDEN[..range.end], record, &GOLDEN[range.end..]].concat(),
        ));
        if let Some((next, _)) = records.get(n + 1) {
            let swapped = [
                &GOLDEN[..range.start],
                &GOLDEN[next.clone()],
                record,
                &GOLDEN[next.end..],
            ];
            cases.push((name("after the next one"), swapped.concat()));
        }
        let cut = [
            &GOLDEN[..range.start + range.len() / 2],
            &GOLDEN[range.start + range.len() / 2 + 7..],
        ];
        cases.push((name("seven bytes cut out"), cut.concat()));
        let (last, _) = records.last().unwrap();
        if range == last {
            continue;
        }
        let moved = [
            &GOLDEN[..range.start],
            &GOLDEN[range.end..last.start],
            record,
            &GOLDEN[last.clone()],
        ];
        cases.push((name("moved to the end"), moved.concat()));
    }
    assert!(cases.len() > 200);
    let mut unnoticed = Vec::new();
    for (case, bytes) in &cases {
        let outcome = check(case, bytes, &intact);
        if !outcome.noticed {
            unnoticed.push(case.clone());
        }
    }
    // What verification calls intact has every record whole, only in another order or twice, or is the archive as it was before
    // the second commit. A HEAD says the same in each epoch.
    // Zeros in the place of a short record are as if it were missing: a write that did not end leaves them.
    let is_missing = |case: &str| case.ends_with("missing") || case.ends_with("first sector zeroed");
    let harmless = |case: &String| {
        let elsewhere = ["twice", "after the next one", "moved to the end"];
        elsewhere.iter().any(|what| case.ends_with(what))
            // What is there twice may be missing once.
            || (is_missing(case) && ["LIST", "NOTE", "COMMIT", "TAIL"].iter().any(|kind| case.starts_with(kind)))
            || case == "HEAD 17: truncated before"
            || (case.starts_with("HEAD") && is_missing(case))
            // It holds nothing but zeros.
            || (case.starts_with("NOTE") && case.contains("zeroed"))
    };
    unnoticed.retain(|case| !harmless(case));
    assert!(unnoticed.is_empty(), "{unnoticed:?}");
}

/// One record in the place of another archive's.
#[test]
fn records_of_another_archive_do_not_count() {
    let intact = intact();
    // The same archive under another name: every record is whole, and none belongs.
    let mut other = GOLDEN.to_vec();
    for (range, _) in records(GOLDEN) {
        let header = RecordHeader::decode(other[range.start..].first_chunk().unwrap()).unwrap();
        let renamed = RecordHeader {
            lane: LaneId([9; 16]),
            ..header
        };
        other[range.start..range.start + HEADER_BYTES].copy_from_slice(&renamed.encode());
    }
    for (n, (range, kind)) in records(GOLDEN).into_iter().enumerate() {
        if n == 0 {
            continue;
        }
        let mut bytes = GOLDEN.to_vec();
        bytes[range.clone()].copy_from_slice(&other[range]);
        check(&format!("{} {n} of another archive", kind.name()), &bytes, &intact);
    }
}

/// A frame's damage is confined to the images and ranges that it holds.
#[test]
fn what_is_intact_is_restored_and_what_is_lost_is_named() {
    let intact = intact();
    let records = records(GOLDEN);
    let packs: Vec<_> = records.iter().filter(|(_, kind)| *kind == RecordKind::Pack).collect();
    // The last PACK holds what the second commit brought: one small image.
    let mut bytes = GOLDEN.to_vec();
    bytes[packs.last().unwrap().0.end - 3] ^= 1;
    let outcome = check("the last pack", &bytes, &intact);
    assert_eq!(
        outcome,
        Outcome {
            whole: 3,
            parts: 1,
            lost: 1,
            noticed: true
        }
    );
    // Without any INDEX and without the TAIL, everything can be restored.
    let kept = records
        .iter()
        .filter(|(_, kind)| !matches!(kind, RecordKind::Index | RecordKind::Tail));
    let bytes: Vec<u8> = kept.flat_map(|(range, _)| &GOLDEN[range.clone()]).copied().collect();
    let outcome = check("no INDEX and no TAIL", &bytes, &intact);
    assert_eq!((outcome.whole, outcome.lost), (4, 0));
    // Without any COMMIT, what the records themselves say.
    let kept = records.iter().filter(|(_, kind)| *kind != RecordKind::Commit);
    let bytes: Vec<u8> = kept.flat_map(|(range, _)| &GOLDEN[range.clone()]).copied().collect();
    let outcome = check("no COMMIT", &bytes, &intact);
    assert_eq!((outcome.whole, outcome.lost), (4, 0));
}

/// The same from a pipe: either everything is right, or it fails and leaves no image.
#[test]
fn a_damaged_pipe_makes_no_wrong_byte() {
    let intact = intact();
    let records = records(GOLDEN);
    let mut restored = 0;
    for (n, (range, kind)) in records.iter().enumerate() {
        for at in [range.start + 20, range.start + HEADER_BYTES, range.end - 1] {
            let folder = scratch();
            let mut bytes = GOLDEN.to_vec();
            bytes[at] ^= 4;
            let archive = folder.path().join("a.vmfold");
            std::fs::write(&archive, bytes).unwrap();
            for partial in [false, true] {
                let to = folder.path().join(if partial { "parts" } else { "whole" });
                let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
                command
                    .args(["import", "-", "--to"])
                    .arg(&to)
                    .stdin(Stdio::from(std::fs::File::open(&archive).unwrap()));
                command.arg("--index").arg(folder.path().join("index"));
                if partial {
                    command.arg("--partial");
                }
                let output = command.output().unwrap();
                let case = format!(
                    "{} {n} at {at}: {}",
                    kind.name(),
                    String::from_utf8_lossy(&output.stderr)
                );
                let code = output.status.code();
                assert!(matches!(code, Some(0 | 4)), "{case}: {code:?}");
                assert!(
                    partial || code != Some(0) || *kind == RecordKind::Tail,
                    "{case}: it was not noticed"
                );
                for (name, content) in content_of(&to) {
                    let text = name.to_str().unwrap();
                    if text.contains(".vmfold-") {
                        continue;
                    }
                    assert!(
                        intact.iter().any(|commit| commit.get(&name) == Some(&content)),
                        "{case}: `{text}`"
                    );
                    restored += 1;
                }
            }
        }
    }
    assert!(restored > 50, "{restored}");
}

/// An archive of small images of zeros with these names, as nothing but a hostile writer makes it.
fn archive_of<'a>(names: impl Iterator<Item = &'a [u8]>, path: &Path) {
    use std::os::unix::ffi::OsStrExt;
    use vmfold::archive::manifest::{self, ArchivedImage, PlanContents, PlanPart};
    use vmfold::content::{Content as Holds, Metadata, Run};
    let monitor = Silent::default();
    let mut digest = Digest::new(&monitor);
    digest.zeros(1);
    let digest = digest.finish(4096);
    let mut contents = PlanContents::default();
    let mut summaries = Vec::new();
    for (number, name) in (0..).zip(names) {
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(name));
        summaries.push(ImageSummary {
            number,
            path: path.clone(),
            size: 4096,
            data_blocks: 0,
            new_blocks: 0,
            digest,
        });
        contents.image(&ArchivedImage {
            number,
            names: vec![path],
            size: 4096,
            metadata: Metadata::default(),
        });
        let run = Run {
            blocks: 1,
            content: Holds::Zeros,
        };
        contents.runs(number, 0, &[run]);
    }
    let contents = contents.finish();
    let of = |part: PlanPart| {
        let count = contents.len();
        let body = move |(n, content): (usize, &Vec<u8>)| {
            (
                part.number(),
                manifest::encode(CommitNumber(1), part, n == count, content).unwrap(),
            )
        };
        (1..).zip(&contents).map(body).collect::<Vec<_>>()
    };
    let plans = [of(PlanPart::Planned), of(PlanPart::Final)].concat();
    let commit = Commit {
        number: CommitNumber(1),
        ..Commit::default()
    };
    std::fs::write(path, RawArchive::of_plans(plans, &summaries, commit).sealed()).unwrap();
}

fn named(name: &[u8], path: &Path) {
    archive_of(std::iter::once(name), path);
}

/// A record with another header, whose hash is right.
fn with_header(record: &[u8], change: impl Fn(&mut RecordHeader)) -> Vec<u8> {
    let mut header = RecordHeader::decode(record.first_chunk().unwrap()).unwrap();
    change(&mut header);
    [&header.encode()[..], &record[HEADER_BYTES..]].concat()
}

/// Lists, compares and appends to: all must end with an answer.
fn use_otherwise(case: &str, bytes: &[u8]) {
    let folder = scratch();
    let archive = folder.path().join("a.vmfold");
    std::fs::write(&archive, bytes).unwrap();
    for arguments in [&["list"][..], &["diff"]] {
        let output = Command::new(env!("CARGO_BIN_EXE_vmfold"))
            .args(arguments)
            .arg(&archive)
            .output()
            .unwrap();
        let code = output.status.code();
        let text = String::from_utf8_lossy(&output.stderr);
        // `diff` of the only commit that is left has nothing to compare it with.
        assert!(
            matches!(code, Some(0 | 2 | 4 | 5)),
            "{case}: {arguments:?}: {code:?} {text}"
        );
        assert!(!text.contains("panicked"), "{case}: {text}");
    }
}

/// Numbers that no writer writes, in headers whose hashes are right.
#[test]
fn numbers_of_hostile_headers_are_not_believed() {
    let intact = intact();
    let records = records(GOLDEN);
    for (n, (range, kind)) in records.iter().enumerate() {
        let put = |what: &str, record: Vec<u8>, instead: bool| {
            let rest = if instead { range.end } else { range.start };
            let bytes = [&GOLDEN[..range.start], &record, &GOLDEN[rest..]].concat();
            let case = format!("{} {n}: {what}", kind.name());
            check(&case, &bytes, &intact);
            use_otherwise(&case, &bytes);
        };
        let record = &GOLDEN[range.clone()];
        for number in [u64::MAX, u64::MAX - 1, 1 << 63] {
            put(
                &format!("sequence {number}"),
                with_header(record, |header| header.sequence = number),
                true,
            );
        }
        put(
            "length",
            with_header(record, |header| header.body_bytes = u64::MAX),
            true,
        );
        let unknown = |length| {
            let (lane, epoch) = (LaneId([0; 16]), EpochId(u64::MAX));
            let mut header = RecordHeader::of_body(RecordKind::Other(77), lane, epoch, u64::MAX - 1, &mut []).unwrap();
            header.body_bytes = length;
            header.encode().to_vec()
        };
        for length in [u64::MAX, u64::MAX - 96, u64::MAX / 2, 1 << 40] {
            put(
                &format!("a kind not known of {length} bytes before it"),
                unknown(length),
                false,
            );
        }
    }
}

/// The golden archive with another last COMMIT.
fn with_commit(change: fn(&mut Commit)) -> Vec<u8> {
    let mut archive = RawArchive::read(GOLDEN);
    archive.keeps_previous = true;
    let copies = archive.records.iter_mut().rev();
    for record in copies.filter(|one| one.kind == RecordKind::Commit).take(2) {
        let mut commit = Commit::decode(&record.body).unwrap();
        change(&mut commit);
        record.body = commit.encode().unwrap();
    }
    archive.sealed()
}

/// The golden archive with another last LIST of records.
fn with_list(change: fn(&mut Listed)) -> Vec<u8> {
    let mut archive = RawArchive::read(GOLDEN);
    let last = archive.records.last().unwrap().epoch;
    let lists = archive
        .records
        .iter_mut()
        .filter(|one| one.epoch == last && one.kind == RecordKind::List);
    for record in lists {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        if list::add_any(&mut listed, &mut images, &record.body, record.lane).unwrap() == list::PART_RECORDS {
            change(&mut listed);
            record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
        }
    }
    archive.sealed()
}

/// A COMMIT that says what cannot be, with hashes that are right all the way from the TAIL.
#[test]
fn commits_that_contradict_themselves_are_damage() {
    let golden = RawArchive::read(GOLDEN);
    let changes = [
        (
            "the last number",
            with_commit(|commit| commit.number = CommitNumber(u32::MAX)),
        ),
        ("no number", with_commit(|commit| commit.number = CommitNumber(0))),
        ("another number", with_commit(|commit| commit.number = CommitNumber(7))),
        (
            "a lane that is not its own",
            with_commit(|commit| commit.lane = LaneId([3; 16])),
        ),
        (
            "an epoch that is not its own",
            with_commit(|commit| commit.epoch = EpochId(3)),
        ),
        (
            "no commit before it",
            with_commit(|commit| commit.previous = vmfold::archive::commit::CommitLocation::default()),
        ),
        (
            "a commit before it of any length",
            with_commit(|commit| commit.previous.length = u64::MAX),
        ),
        (
            "a commit before it anywhere",
            with_commit(|commit| commit.previous.offset = u64::MAX - 5),
        ),
        (
            "a list a thousand times",
            with_commit(|commit| {
                let list = commit.lists[0];
                commit.lists.extend(std::iter::repeat_n(list, 1000));
            }),
        ),
        (
            "one record a thousand times",
            with_list(|listed| {
                let record = listed.records[3];
                listed.records.extend(std::iter::repeat_n(record, 1000));
            }),
        ),
        (
            "a record of the commit before",
            with_list(|listed| listed.records[2].sequence = 0),
        ),
        (
            "a record that is not there",
            with_list(|listed| {
                listed.records[2].sequence = 1 << 40;
                listed.records[2].body_hash = [9; 32];
            }),
        ),
        (
            "blocks that no PACK has",
            with_list(|listed| {
                listed.records.retain(|record| record.kind != RecordKind::Pack);
            }),
        ),
        (
            "an INDEX that has more than it is listed for",
            with_list(|listed| {
                let mut indexes = listed.records.iter_mut();
                indexes.find(|record| record.kind == RecordKind::Index).unwrap().blocks -= 1;
            }),
        ),
        (
            "blocks that are not listed as used",
            with_list(|listed| listed.uses[0].start = listed.uses[0].end - 1),
        ),
    ];
    let intact = intact();
    check("unchanged", &golden.sealed(), &intact);
    for (case, bytes) in changes {
        let outcome = check(case, &bytes, &intact);
        assert!(outcome.noticed, "{case}");
        use_otherwise(case, &bytes);
        let folder = scratch();
        let archive = folder.path().join("a.vmfold");
        std::fs::write(&archive, &bytes).unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_vmfold"))
            .arg("verify")
            .arg(&archive)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(4),
            "{case}: {}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
}

/// Each damage of an archive has the same exit code, whatever is done with it.
#[test]
fn damage_has_one_exit_code() {
    let records = records(GOLDEN);
    // Each is there twice: this is the first one of the second epoch.
    let (last, _) = records
        .iter()
        .filter(|(_, kind)| *kind == RecordKind::Commit)
        .nth(2)
        .unwrap();
    let mut no_commit = GOLDEN.to_vec();
    for (range, _) in records.iter().filter(|(_, kind)| *kind == RecordKind::Commit) {
        no_commit[range.end - 1] ^= 1;
    }
    let mut lost_commit = GOLDEN.to_vec();
    for (range, _) in records.iter().filter(|(_, kind)| *kind == RecordKind::Commit).skip(2) {
        lost_commit[range.end - 1] ^= 1;
    }
    let mut first_header = GOLDEN[..60].to_vec();
    first_header[30] ^= 1;
    // Two images with one name, and one that lies in the other.
    let contradictory = |names: &[&[u8]]| {
        let folder = scratch();
        let path = folder.path().join("a.vmfold");
        archive_of(names.iter().copied(), &path);
        std::fs::read(path).unwrap()
    };
    let twice = contradictory(&[b"a.img", b"a.img"]);
    let inside = contradictory(&[b"a.img", b"a.img/b.img"]);
    let cut = &GOLDEN[..last.start - 10];
    let all: &[&str] = &[
        "list",
        "verify",
        "diff",
        "import",
        "import --partial",
        "pipe",
        "pipe --partial",
    ];
    let manifests: &[&str] = &["verify", "diff 1 1", "import", "import --partial", "pipe"];
    for (case, bytes, verbs) in [
        (
            "no commit",
            &no_commit[..],
            &["list", "verify", "diff", "import", "pipe", "pipe --partial"][..],
        ),
        ("one record, torn", &first_header[..], all),
        (
            "the commit that is asked for",
            &lost_commit[..],
            &["list 2", "diff 2", "import --commit 2"][..],
        ),
        ("two images with one name", &twice[..], manifests),
        ("an image in an image", &inside[..], manifests),
        (
            "cut short, from a pipe",
            cut,
            &["pipe", "pipe --commit 2", "pipe --commit 2 --partial"][..],
        ),
    ] {
        let folder = scratch();
        let archive = folder.path().join("a.vmfold");
        std::fs::write(&archive, bytes).unwrap();
        for verb in verbs {
            let mut words = verb.split(' ');
            let name = words.next().unwrap();
            let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
            if name == "pipe" {
                command
                    .args(["import", "-"])
                    .stdin(std::fs::File::open(&archive).unwrap());
            } else {
                command.arg(name).arg(&archive);
            }
            if name == "pipe" || name == "import" {
                command.arg("--to").arg(folder.path().join("to"));
                command.arg("--index").arg(folder.path().join("index"));
            }
            let output = command.args(words).output().unwrap();
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(4), "{case}: {verb}: {text}");
            let _ = std::fs::remove_dir_all(folder.path().join("to"));
        }
    }
}

/// Each image is looked at once, not once for each other.
#[test]
fn archives_of_very_many_images_are_verified_in_bearable_time() {
    const IMAGES: u32 = 20_000;
    let folder = scratch();
    let archive = folder.path().join("a.vmfold");
    let names: Vec<Vec<u8>> = (0..IMAGES)
        .map(|n| format!("f{}/{n}.img", n % 100).into_bytes())
        .collect();
    archive_of(names.iter().map(Vec::as_slice), &archive);
    let found = verify(&archive, &Silent::default()).unwrap();
    assert_eq!(found.damage, []);
    assert_eq!((found.images, found.lost.len()), (u64::from(IMAGES), 0));
}

#[test]
fn names_that_lead_out_are_refused() {
    let long = [b'x'; 256];
    let bad: [&[u8]; 9] = [
        b"../evil",
        b"/tmp/evil",
        b"a/../../evil",
        b"a/./b",
        b"a//b",
        b"..",
        b"",
        b"a\0b",
        &long,
    ];
    for name in bad {
        let folder = scratch();
        let archive = folder.path().join("a.vmfold");
        named(name, &archive);
        let to = folder.path().join("deep/to");
        for partial in [false, true] {
            assert!(
                !matches!(restore(&archive, &to, None, partial), Ok(done) if done.lost.is_empty()),
                "{name:?}"
            );
        }
        let files = content_of(folder.path());
        assert_eq!(files.keys().collect::<Vec<_>>(), [Path::new("a.vmfold")], "{name:?}");
    }
    // A link that stands where an image goes leads nowhere.
    let folder = scratch();
    let (archive, to, outside) = (
        folder.path().join("a.vmfold"),
        folder.path().join("to"),
        folder.path().join("outside"),
    );
    named(b"link/x.img", &archive);
    std::fs::create_dir_all(&to).unwrap();
    std::fs::create_dir(&outside).unwrap();
    std::os::unix::fs::symlink(&outside, to.join("link")).unwrap();
    let error = restore(&archive, &to, None, false).unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
    assert!(std::fs::read_dir(&outside).unwrap().next().is_none());
    std::fs::remove_file(to.join("link")).unwrap();
    assert!(restore(&archive, &to, None, false).unwrap().lost.is_empty());
    assert_eq!(std::fs::read(to.join("link/x.img")).unwrap(), vec![0; 4096]);
}
