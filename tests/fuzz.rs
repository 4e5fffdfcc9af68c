//! Goal: no archive makes a reader panic, hang, take unbounded memory, restore a wrong byte or say of what is lost that it is intact.
//! Method: golden archives that are changed below their hashes, which are made right again, and damaged ones; every verb is run on each, under
//! an allocator that counts. `VMFOLD_FUZZ_ROUNDS` makes it long. Fuzzers in `tests/fuzz` do the same without end.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    unsafe_code,
    reason = "a test that cannot go on has failed; an allocator is unsafe by its trait"
)]

#[path = "fuzz/backup_seeds.rs"]
mod backup_seeds;
#[path = "fuzz/backups.rs"]
mod backups;
#[path = "common/mod.rs"]
mod common;
#[path = "fuzz/harness.rs"]
#[allow(dead_code, reason = "fuzzers use another part")]
mod harness;
#[path = "fuzz/hostile_backups.rs"]
mod hostile_backups;
#[path = "foreign/made.rs"]
#[allow(dead_code, reason = "other tests use another part")]
mod made;
#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "fuzz/mutate_backups.rs"]
mod mutate_backups;
#[path = "foreign/qvm.rs"]
#[allow(dead_code, reason = "other tests use another part")]
mod qvm;
#[path = "foreign/qvm3_maker.rs"]
mod qvm3_maker;
#[path = "fuzz/qvm_maker.rs"]
mod qvm_maker;
#[path = "foreign/vma.rs"]
mod vma;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::Random;
use harness::{Harness, Verb};
use vmfold::archive::commit::{Commit, CommitLocation};
use vmfold::archive::keys::ArchiveKeys;
use vmfold::archive::list::{self, ImageSummary, Listed, OtherLane, RecordLocation};
use vmfold::archive::manifest::{self, ImageRuns, ManifestBuilder, PlanContents, PlanPart, PlanRecord};
use vmfold::archive::reader::Archive;
use vmfold::archive::record::{EpochId, LaneId, RecordKind, hash_of};
use vmfold::block::bytes;
use vmfold::content::{Content, Run};
use vmfold::keys::manage::NewKeys;
use vmfold::keys::{GivenKeys, KeyAccess};
use vmfold::monitor::Silent;
use vmfold::numbers::{CommitNumber, StoreBlock};
use vmfold::ops::import::import_in_order;
use vmfold::ops::key::UserKeys;
use vmfold::ops::verify::verify_store;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;
use vmfold::testing::raw_archive::{RawArchive, RawRecord};

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(),
            Ordering::Relaxed,
        );
        // SAFETY: the caller keeps the contract of the trait.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(),
            Ordering::Relaxed,
        );
        // SAFETY: the caller keeps the contract of the trait.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of the trait.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The count is of the whole process: one test at a time.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes that were taken since this was asked last.
fn peak_bytes() -> usize {
    static BEFORE: AtomicUsize = AtomicUsize::new(0);
    let peak = PEAK.load(Ordering::Relaxed);
    let now = NOW.load(Ordering::Relaxed);
    PEAK.store(now, Ordering::Relaxed);
    peak.saturating_sub(BEFORE.swap(now, Ordering::Relaxed))
}

fn golden_archives() -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/testdata");
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut paths: Vec<_> = entries
        .filter(|path| path.extension().is_some_and(|end| end == "vmfold"))
        .collect();
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

/// An archive of simulated images, with the same bytes each time.
fn simulated_archive(folder: &std::path::Path) -> Vec<u8> {
    let mut archive = RawArchive::read(&harness::simulated_archive(folder));
    let epochs: Vec<EpochId> = archive.records.iter().map(|record| record.epoch).collect();
    for record in &mut archive.records {
        let epoch = epochs.iter().position(|epoch| *epoch == record.epoch).unwrap();
        (record.lane, record.epoch) = (LaneId([8; 16]), EpochId(epoch as u64));
        if record.kind == RecordKind::Commit {
            let commit = Commit::decode(&record.body).unwrap();
            let fixed = Commit {
                time: vmfold::content::FileTime::default(),
                host: "host".into(),
                lane: record.lane,
                epoch: record.epoch,
                ..commit
            };
            record.body = fixed.encode().unwrap();
        }
    }
    archive.sealed()
}

fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

/// The verbs that `VMFOLD_FUZZ_VERBS` names, as they are called in [`Verb`]; all of them if it is not set.
fn verbs() -> Vec<Verb> {
    let Ok(text) = std::env::var("VMFOLD_FUZZ_VERBS") else {
        return harness::ALL.to_vec();
    };
    let named = |verb: &&Verb| {
        text.split(',')
            .any(|name| name.eq_ignore_ascii_case(&format!("{verb:?}")))
    };
    harness::ALL.iter().filter(named).copied().collect()
}

/// A golden archive that is changed.
struct Base {
    bytes: Vec<u8>,
    archive: RawArchive,
    is_readable: bool,
}

impl Base {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            archive: RawArchive::read(&bytes),
            is_readable: Archive::open(Arc::new(MemoryStore::of(bytes.clone()))).is_ok(),
            bytes,
        }
    }
}

fn mutated(bases: &[Base], others: &[RawArchive], random: &mut Random) -> Vec<u8> {
    // Most of what is made of archives that are refused is refused.
    let takes_all = random.below(10) == 0;
    let chosen: Vec<&Base> = bases.iter().filter(|base| base.is_readable || takes_all).collect();
    let Base { bytes, archive, .. } = chosen[usize::try_from(random.below(chosen.len() as u64)).unwrap()];
    match random.below(10) {
        0 => {
            let mut bytes = bytes.clone();
            mutate::damage(&mut bytes, random);
            bytes
        }
        1 | 2 => {
            let mut bytes = mutate::sealed(archive, others, random);
            mutate::damage(&mut bytes, random);
            bytes
        }
        _ => mutate::sealed(archive, others, random),
    }
}

/// Does everything with the archive of each round that `VMFOLD_FUZZ_VERBS` names, and fails if anything is wrong with what came of it.
fn run_rounds(harness: &mut Harness<'_>, rounds: std::ops::Range<u64>, make: impl Fn(u64) -> Vec<u8>) {
    let (verbs, mut failed) = (verbs(), 0);
    for round in rounds {
        let bytes = make(round);
        let problems = harness.check(&bytes, &verbs);
        if !problems.is_empty() {
            failed += 1;
            println!("round {round}: {problems:#?}");
            if let Some(kept) = std::env::var_os("VMFOLD_FUZZ_KEEP") {
                let kept = std::path::Path::new(&kept);
                std::fs::write(kept.join(format!("{round}.vmfold")), &bytes).unwrap();
                let exported = harness.folder.join("exported.vmfold");
                let _ = std::fs::copy(&exported, kept.join(format!("{round}-exported.vmfold")));
                let _ = std::fs::remove_file(exported);
            }
            assert!(failed < 20, "too many rounds failed");
        }
    }
    for (verb, (runs, successes, longest)) in &harness.counts {
        println!("{verb:?}: {runs} runs, {successes} without an error, the longest took {longest:?}");
    }
    assert_eq!(failed, 0);
}

#[test]
fn hostile_archives_end_in_errors() {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let (rounds, first) = (
        from_environment("VMFOLD_FUZZ_ROUNDS", 60),
        from_environment("VMFOLD_FUZZ_FIRST", 1),
    );
    let mut goldens = golden_archives();
    goldens.push(simulated_archive(folder.path()));
    let mut harness = Harness::new(folder.path(), &peak_bytes);
    for bytes in &goldens {
        harness.trust(bytes);
        let problems = harness.check(bytes, &harness::ALL);
        assert!(problems.is_empty(), "{problems:?}");
    }
    let bases: Vec<Base> = goldens.into_iter().map(Base::new).collect();
    let others: Vec<RawArchive> = bases.iter().map(|base| base.archive.clone()).collect();
    // Each round can be run alone.
    run_rounds(&mut harness, first..first + rounds, |round| {
        mutated(&bases, &others, &mut Random(round.wrapping_mul(0x9e37)))
    });
}

/// The golden sealed archive with its key at hand: damaged, and changed by somebody who has no key and makes all hashes right.
#[test]
fn hostile_sealed_archives_end_in_errors() {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let (rounds, first) = (
        from_environment("VMFOLD_FUZZ_ROUNDS", 15),
        from_environment("VMFOLD_FUZZ_FIRST", 1),
    );
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/encryption-v1");
    let bytes = std::fs::read(golden.join("archive.vmfold")).unwrap();
    let access = KeyAccess::new(GivenKeys {
        identities: vec![golden.join("identity")],
        ..GivenKeys::default()
    });
    let monitor = Arc::new(Silent::default());
    let user = Arc::new(UserKeys::new(access, NewKeys::default(), ("a".into(), 0), monitor));
    let keys = Arc::new(ArchiveKeys::opened_by(Arc::clone(&user) as _));
    let archive = Archive::open_with(Arc::new(MemoryStore::of(bytes.clone())), keys).unwrap();
    let mut harness = Harness::new(folder.path(), &peak_bytes);
    harness.unlock = Some(user);
    harness.hasher = archive.hasher();
    harness.trust(&bytes);
    assert_eq!(harness.genuine.len(), 3);
    let problems = harness.check(&bytes, &harness::ALL);
    assert!(problems.is_empty(), "{problems:?}");
    run_rounds(&mut harness, first..first + rounds, |round| {
        let mut random = Random(round.wrapping_mul(0x9e37));
        let mut bad = match random.below(4) {
            0 => bytes.clone(),
            _ => mutate::stored_records(&bytes, &mut random),
        };
        if random.below(3) == 0 || bad == bytes {
            mutate::damage(&mut bad, &mut random);
        }
        bad
    });
}

#[test]
fn hostile_bodies_end_in_errors() {
    const LIMIT_BYTES: usize = 256 << 20;
    let _turn = TURN.lock();
    let rounds = from_environment("VMFOLD_FUZZ_ROUNDS", 4000);
    let mut random = Random(from_environment("VMFOLD_FUZZ_FIRST", 2027));
    let archives: Vec<RawArchive> = golden_archives().iter().map(|bytes| RawArchive::read(bytes)).collect();
    let records: Vec<_> = archives.iter().flat_map(|archive| &archive.records).collect();
    for round in 0..rounds {
        let record = records[usize::try_from(random.below(records.len() as u64)).unwrap()];
        let mut body = record.body.clone();
        for _ in 0..=random.below(3) {
            mutate::change_body(record.kind, &mut body, &mut random);
        }
        peak_bytes();
        harness::decoders(&body);
        harness::stream(&body);
        let took = peak_bytes();
        assert!(took < LIMIT_BYTES, "round {round} took {took} bytes");
    }
}

/// The formats that `VMFOLD_FUZZ_FORMATS` names; all of them if it is not set.
fn formats() -> Vec<&'static str> {
    let chosen = std::env::var("VMFOLD_FUZZ_FORMATS").unwrap_or_else(|_| backup_seeds::FORMATS.join(","));
    let is_chosen = |name: &&&str| chosen.split(',').any(|one| one == **name);
    backup_seeds::FORMATS.iter().filter(is_chosen).copied().collect()
}

#[test]
fn hostile_backups_of_other_programs_end_in_errors() {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let (rounds, first) = (
        from_environment("VMFOLD_FUZZ_ROUNDS", 15),
        from_environment("VMFOLD_FUZZ_FIRST", 1),
    );
    let kept = std::env::var_os("VMFOLD_FUZZ_KEEP").map(std::path::PathBuf::from);
    let mut harness = backups::Backups::new(folder.path(), &peak_bytes);
    let mut failed = 0;
    for name in formats() {
        let made = folder.path().join(name);
        std::fs::create_dir(&made).unwrap();
        let mut format = backup_seeds::seeds(name, &made);
        for seed in &mut format.seeds {
            seed.expected = harness.trust(name, &seed.bytes, &seed.backing);
        }
        for round in first..first + rounds {
            // Each round can be run alone.
            let random = &mut Random(round.wrapping_mul(0x9e37));
            let case = mutate_backups::mutated(&format, random);
            if let Some(kept) = &kept {
                std::fs::write(kept.join("last"), format!("{name} {round}")).unwrap();
            }
            let problems = harness.check(name, &case, random.below(16) == 0, random.below(4) == 0);
            if !problems.is_empty() {
                failed += 1;
                println!("{name}, round {round}: {problems:#?}");
                if let Some(kept) = &kept {
                    std::fs::write(kept.join(format!("{name}-{round}")), &case.bytes).unwrap();
                }
                assert!(failed < 20, "too many rounds failed");
            }
        }
    }
    for (name, (runs, successes, longest)) in &harness.counts {
        println!("{name}: {runs} runs, {successes} without an error, the longest took {longest:?}");
    }
    assert_eq!(failed, 0);
}

/// What the runs above found once, made by hand: nothing is wrong with what comes of these any more. Returns whether `verify` calls it intact.
fn check_by_hand(case: &str, bytes: &[u8]) -> bool {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let mut harness = Harness::new(folder.path(), &peak_bytes);
    let problems = harness.check(bytes, &harness::ALL);
    assert!(problems.is_empty(), "{case}: {problems:?}");
    let verified = verify_store(Arc::new(MemoryStore::of(bytes.to_vec())), &Silent::default());
    verified.is_ok_and(|verified| verified.damage.is_empty() && verified.lost.is_empty())
}

fn simulated() -> RawArchive {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir().unwrap();
    RawArchive::read(&simulated_archive(folder.path()))
}

/// The places of the records of a kind.
fn places(archive: &RawArchive, kind: RecordKind) -> Vec<usize> {
    let records = archive.records.iter().enumerate();
    records
        .filter(|(_, record)| record.kind == kind)
        .map(|(place, _)| place)
        .collect()
}

/// Changes what a commit lists, in all copies of its LISTs. Commits are counted from 0.
fn with_listed(archive: &mut RawArchive, commit: usize, change: impl Fn(&mut Listed, &mut Vec<ImageSummary>)) {
    let epoch = archive.records[places(archive, RecordKind::Commit)[2 * commit]].epoch;
    for record in &mut archive.records {
        if (record.kind, record.epoch) == (RecordKind::List, epoch) {
            let (mut listed, mut images) = (Listed::default(), Vec::new());
            list::add_any(&mut listed, &mut images, &record.body, record.lane).unwrap();
            change(&mut listed, &mut images);
            record.body = list::encode(&listed, &images, record.lane).unwrap().remove(0).1;
        }
    }
}

#[test]
fn images_that_no_list_names_are_not_restored() {
    let mut archive = simulated();
    with_listed(&mut archive, 1, |_, images| images.truncate(1));
    assert!(check_by_hand("an image less", &archive.sealed()));
}

#[test]
fn a_pipe_tells_which_of_two_packs_it_took_a_block_from() {
    let mut archive = simulated();
    let (pack, index) = (
        places(&archive, RecordKind::Pack)[1],
        places(&archive, RecordKind::Index)[1],
    );
    let sequence = archive.records[pack].sequence;
    let other = RawRecord {
        sequence: 1000,
        body: mutate::with_first_block_changed(&archive.records[pack].body),
        ..archive.records[pack].clone()
    };
    let dropped = archive.records.remove(index).sequence;
    archive.records.insert(pack, other);
    with_listed(&mut archive, 1, |listed, _| {
        listed.records.retain(|record| record.sequence != dropped);
        let own = listed
            .records
            .iter()
            .find(|record| record.sequence == sequence)
            .copied();
        let added = own.map(|own| RecordLocation {
            sequence: 1000,
            blocks: 1,
            ..own
        });
        listed.records.extend(added);
    });
    assert!(!check_by_hand("two packs of a block", &archive.sealed()));
}

#[test]
fn a_commit_whose_first_copy_has_another_header_is_damage_and_counts() {
    let mut archive = simulated();
    let commits = places(&archive, RecordKind::Commit);
    archive.records[commits[2]].epoch = archive.records[commits[0]].epoch;
    assert!(!check_by_hand("another epoch", &archive.sealed()));
}

#[test]
fn an_export_refers_to_no_block_that_its_index_does_not_prove() {
    let mut archive = simulated();
    let index = places(&archive, RecordKind::Index)[1];
    archive.records[index].body[20] ^= 1;
    assert!(!check_by_hand("another hash", &archive.sealed()));
}

#[test]
fn an_export_to_an_archive_that_lost_some_bytes_keeps_what_it_has() {
    let archive = simulated();
    let note = places(&archive, RecordKind::Note)[0];
    let mut bytes = archive.sealed();
    let before = RawArchive {
        records: archive.records[..note].to_vec(),
        ..archive.clone()
    };
    let start = before.sealed().len();
    bytes.drain(start + 200..start + 3000);
    assert!(!check_by_hand("bytes less", &bytes));
}

#[test]
fn what_only_a_later_commit_lists_is_intact_only_if_the_earlier_one_can_use_it() {
    let mut archive = simulated();
    let moved = |record: &RecordLocation| matches!(record.kind, RecordKind::Pack | RecordKind::Index);
    let mut taken = Vec::new();
    let list = archive.records[places(&archive, RecordKind::List)[0]].clone();
    let mut listed = Listed::default();
    listed.add(&list.body, list.lane).unwrap();
    taken.extend(listed.records.iter().filter(|record| moved(record)).copied());
    with_listed(&mut archive, 0, |listed, _| {
        listed.records.retain(|record| !moved(record));
    });
    with_listed(&mut archive, 1, |listed, images| {
        if images.is_empty() {
            listed.records.extend(taken.iter().copied());
        }
    });
    // The digests of the earlier commit's images prove what these hold.
    assert!(check_by_hand("listed by the next commit", &archive.sealed()));
}

/// What an image's last block holds behind its end is zeros: no file that is restored could have anything else there.
#[test]
fn an_image_with_something_behind_its_end_is_lost() {
    let mut archive = simulated();
    for place in places(&archive, RecordKind::Plan) {
        let plan = PlanRecord::decode(&archive.records[place].body).unwrap();
        let mut builder = ManifestBuilder::new(&Budget::default());
        if plan.part == PlanPart::Blocks || builder.add(plan.content()).is_err() {
            continue;
        }
        let (manifest, mut contents) = (builder.finish().unwrap(), PlanContents::default());
        for ImageRuns { mut image, runs } in manifest.images {
            // Behind its last block that is stored there is a hole.
            let runs: Vec<Run> = runs.into_iter().filter(|run| run.content != Content::Hole).collect();
            image.size = bytes(runs.iter().map(|run| run.blocks).sum()) - 100;
            contents.image(&image);
            contents.runs(image.number, 0, &runs);
        }
        let content = contents.finish().remove(0);
        archive.records[place].body = manifest::encode(plan.commit, plan.part, plan.last, &content).unwrap();
    }
    mutate::with_right_digests(&mut archive);
    assert!(!check_by_hand("something behind the end", &archive.sealed()));
}

#[test]
fn a_record_behind_the_last_commit_is_lost() {
    let mut archive = simulated();
    let (plan, tail) = (places(&archive, RecordKind::Plan)[1], archive.records.len() - 1);
    archive.records.swap(plan, tail);
    assert!(!check_by_hand("a PLAN at the end", &archive.sealed()));
}

/// A genuine commit does not vouch for blocks of another that stands before it in a pipe.
#[test]
fn blocks_of_a_forged_commit_are_not_taken_for_those_of_the_next_one() {
    let genuine = simulated();
    let mut archive = genuine.clone();
    let (pack, index) = (
        places(&archive, RecordKind::Pack)[0],
        places(&archive, RecordKind::Index)[0],
    );
    let body = mutate::with_content_changed(&archive.records[pack].body);
    archive.records[pack].body = body;
    archive.records.remove(index);
    let start = places(&archive, RecordKind::Head)[1];
    let forged = archive.records[..start].to_vec();
    let mut bytes = RawArchive {
        records: forged,
        ..genuine.clone()
    }
    .sealed();
    let of_genuine = genuine.sealed();
    let second = places(&genuine, RecordKind::Head)[1];
    let first = RawArchive {
        records: genuine.records[..second].to_vec(),
        ..genuine.clone()
    };
    bytes.extend(&of_genuine[first.sealed().len()..]);
    // A frame is lost, so that no digest can be made.
    let pack = bytes
        .windows(8)
        .rposition(|window| window == 127u64.to_le_bytes())
        .unwrap();
    bytes[pack + 70] ^= 1;
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    let options = harness::import_options(&to, folder.path(), true);
    let done = import_in_order(&MemoryStore::of(bytes), &options, &Silent::default());
    for entry in std::fs::read_dir(&to).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        assert!(!name.contains(".img"), "{name} of {done:?}");
    }
}

/// What an INDEX says of some blocks of a frame is compared with them, though of the others nothing is known yet.
#[test]
fn a_frame_of_known_and_unknown_blocks_is_compared_with_what_is_known() {
    let mut archive = simulated();
    let (first, pack) = (
        places(&archive, RecordKind::Pack)[0],
        places(&archive, RecordKind::Pack)[1],
    );
    let sequence = archive.records[pack].sequence;
    let moved = mutate::with_home(&archive.records[pack].body, StoreBlock(113));
    archive.records[pack].body = moved;
    with_listed(&mut archive, 1, |listed, _| {
        let its = listed.records.iter_mut().filter(|record| record.sequence == sequence);
        its.for_each(|record| record.first = StoreBlock(113));
    });
    let dropped = archive.records.remove(first).sequence;
    with_listed(&mut archive, 0, |listed, _| {
        listed.records.retain(|record| record.sequence != dropped);
    });
    assert!(!check_by_hand(
        "a pack at both sides of the end of a commit",
        &archive.sealed()
    ));
}

/// With `--partial` too, an export that did not end is none.
#[test]
fn an_epoch_that_never_committed_is_not_restored() {
    let archive = simulated();
    let (pack, list) = (
        places(&archive, RecordKind::Pack)[1],
        places(&archive, RecordKind::List)[5],
    );
    let up_to = |end: usize| {
        let records = archive.records[..end].to_vec();
        RawArchive {
            records,
            ..archive.clone()
        }
        .sealed()
        .len()
    };
    let mut bytes = archive.sealed();
    bytes[up_to(pack) + 300] ^= 1;
    bytes.truncate(up_to(list) + 100);
    assert!(check_by_hand("cut before its COMMIT", &bytes));
}

/// Another lane's last commit is found, whichever commit of this one names which of them.
#[test]
fn all_commits_of_another_lane_are_found() {
    let golden = RawArchive::read(include_bytes!("../testdata/archive-v1.vmfold"));
    let (first, second) = (simulated(), golden);
    let epochs = |archive: &RawArchive| {
        let start = places(archive, RecordKind::Head)[1];
        (archive.records[..start].to_vec(), archive.records[start..].to_vec())
    };
    let ((x1, x2), (y1, y2)) = (epochs(&first), epochs(&second));
    let mut both = RawArchive {
        records: [x1, y1, x2, y2].concat(),
        keeps_previous: false,
    };
    let lane = both.records[0].lane;
    let own = both.records.last().unwrap().lane;
    let named_by: Vec<EpochId> = {
        let commits = places(&both, RecordKind::Commit).into_iter();
        let own = commits.filter(|place| both.records[*place].lane == own);
        let mut named: Vec<EpochId> = own.map(|place| both.records[place].epoch).collect();
        named.dedup();
        named
    };
    // What a LIST says of where COMMITs are changes where they are, until it does not.
    for _ in 0..8 {
        let sealed = both.sealed();
        let placed = RawArchive::read(&sealed);
        for (number, epoch) in (1..).zip(&named_by) {
            let mut offset = 0;
            let mut location = None;
            for record in &placed.records {
                let is_it = (record.kind, record.lane) == (RecordKind::Commit, lane)
                    && Commit::decode(&record.body).is_ok_and(|commit| commit.number.0 == number);
                if is_it && location.is_none() {
                    location = Some(CommitLocation {
                        offset,
                        length: (96 + record.body.len()) as u64,
                        body_hash: hash_of(&record.body),
                    });
                }
                offset += (96 + record.body.len()) as u64;
            }
            let other = OtherLane {
                lane,
                number: CommitNumber(number),
                location: location.unwrap(),
            };
            for record in &mut both.records {
                let mut listed = Listed::default();
                if (record.kind, record.epoch) == (RecordKind::List, *epoch)
                    && listed.add(&record.body, record.lane).is_ok()
                {
                    listed.other_lanes = vec![other];
                    record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
                }
            }
        }
    }
    let bytes = both.sealed();
    let archive = Archive::open(Arc::new(MemoryStore::of(bytes.clone()))).unwrap();
    assert_eq!(archive.commits().len(), 4);
    assert!(check_by_hand("two lanes", &bytes));
}

/// A COMMIT that another one names is lost, also where it should stand behind the last one: an export that did not end has left no such name.
#[test]
fn a_named_commit_that_should_stand_behind_the_last_one_is_lost() {
    let mut archive = RawArchive::read(include_bytes!("../testdata/archive-v1.vmfold"));
    let last = archive.records.last().unwrap().epoch;
    let other = OtherLane {
        lane: simulated().records[0].lane,
        number: CommitNumber(1),
        location: CommitLocation {
            offset: archive.sealed().len() as u64 + 1000,
            length: 332,
            body_hash: [7; 32],
        },
    };
    for record in archive.records.iter_mut().filter(|record| record.epoch == last) {
        let mut listed = Listed::default();
        if record.kind == RecordKind::List && listed.add(&record.body, record.lane).is_ok() {
            listed.other_lanes = vec![other];
            record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
        }
    }
    let mut bytes = archive.sealed();
    bytes.extend_from_within(..50);
    let verified = verify_store(Arc::new(MemoryStore::of(bytes)), &Silent::default()).unwrap();
    assert!(
        verified
            .damage
            .iter()
            .any(|damage| damage.problem.contains("another lane")),
        "{verified:?}"
    );
}

/// What commits list as used is large once it is decompressed.
#[test]
fn lists_that_decompress_to_much_take_bounded_memory() {
    let mut archive = simulated();
    let start = places(&archive, RecordKind::Head)[1];
    let epoch = archive.records.split_off(start);
    let uses = vec![StoreBlock(0)..StoreBlock(0); 300_000];
    for number in 2..40u32 {
        let kept = epoch
            .iter()
            .filter(|record| !matches!(record.kind, RecordKind::Pack | RecordKind::Index));
        for record in kept {
            let mut record = RawRecord {
                epoch: EpochId(number.into()),
                sequence: archive.records.len() as u64 + 100,
                ..record.clone()
            };
            if let Ok(mut commit) = Commit::decode(&record.body)
                && record.kind == RecordKind::Commit
            {
                commit.number = CommitNumber(number);
                commit.epoch = record.epoch;
                let lists = archive.records.iter().filter(|one| one.kind == RecordKind::List);
                let own: Vec<u64> = lists
                    .filter(|one| one.epoch == record.epoch)
                    .map(|one| one.sequence)
                    .collect();
                commit
                    .lists
                    .iter_mut()
                    .zip(&own)
                    .for_each(|(list, own)| list.sequence = *own);
                record.body = commit.encode().unwrap();
            }
            let mut listed = Listed::default();
            if record.kind == RecordKind::List && listed.add(&record.body, record.lane).is_ok() {
                listed.records.clear();
                listed.uses.clone_from(&uses);
                record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
            }
            archive.records.push(record);
        }
    }
    let bytes = archive.sealed();
    let opened = Archive::open(Arc::new(MemoryStore::of(bytes.clone()))).unwrap();
    assert_eq!(opened.commits().len(), 39);
    drop(opened);
    let _turn = TURN.lock();
    peak_bytes();
    drop(Archive::open(Arc::new(MemoryStore::of(bytes.clone()))));
    let _ = verify_store(Arc::new(MemoryStore::of(bytes)), &Silent::default());
    let took = peak_bytes();
    assert!(took < 48 << 20, "{took}");
}
