// Goal: archives with parity are read as those without, go on as they were begun, and are whole at every moment.

use std::sync::Arc;

use vmfold::archive::record::RecordKind;
use vmfold::error::Error;
use vmfold::monitor::Silent;
use vmfold::ops::export::{ExportOptions, export_on};
use vmfold::ops::protect::{ProtectOptions, protect_on};
use vmfold::report::Protected;
use vmfold::store::{MemoryStore, OutputPipe, Store};
use vmfold::testing::faulty_store::{FaultyStore, StoreCall, StoreFault};

use crate::common::readers::agree_on_archives_below;
use crate::scene::{Scene, WAYS, check_commit, is_intact, records, restore, two_commits, verify};

/// Exports behind what an archive holds, with parity as it is asked for.
fn export(scene: &Scene, before: &[u8], parity: Option<u8>) -> Vec<u8> {
    let store = Arc::new(MemoryStore::of(before.to_vec()));
    let options = ExportOptions {
        parity,
        ..scene.options()
    };
    let exported = export_on(scene.pool(false), &options, Arc::clone(&store) as _, &Silent::default()).unwrap();
    let archive = store.to_vec();
    assert_eq!(exported.archive_bytes, archive.len() as u64);
    assert_eq!(u64::from(exported.commit.0), verify(&archive).unwrap().commits);
    assert!(exported.new_bytes > 0 || !before.is_empty(), "{exported:?}");
    // What an export left that did not end is cut off before.
    let written = usize::try_from(exported.written_bytes).unwrap();
    assert_eq!(exported.parity_bytes, parity_bytes(&archive[archive.len() - written..]));
    archive
}

fn protect(before: &[u8], percent: u8, again: bool) -> (Vec<u8>, Result<Protected, Error>) {
    let store = Arc::new(MemoryStore::of(before.to_vec()));
    let options = ProtectOptions {
        sealing: vmfold::ops::export::Sealing::default(),
        archive: "memory".into(),
        percent,
        again,
    };
    let report = protect_on(Arc::clone(&store) as _, &options, &Silent::default());
    (store.to_vec(), report)
}

fn kinds(bytes: &[u8]) -> Vec<RecordKind> {
    records(bytes).iter().map(|record| record.header.kind).collect()
}

fn parity_bytes(bytes: &[u8]) -> u64 {
    let parity = records(bytes)
        .into_iter()
        .filter(|record| record.header.kind == RecordKind::Parity);
    parity.map(|record| record.range.len() as u64).sum()
}

fn ends_with_parity(bytes: &[u8]) -> bool {
    kinds(bytes).ends_with(&[RecordKind::Parity, RecordKind::Commit, RecordKind::Tail])
}

#[test]
fn exports_have_the_parity_that_is_asked_for_and_go_on_with_it() {
    let scene = Scene::new();
    let (first, content) = (export(&scene, &[], Some(5)), scene.content());
    assert!(ends_with_parity(&first));
    scene.grow();
    let second = export(&scene, &first, None);
    assert!(ends_with_parity(&second), "it goes on as the last commit has it");
    let third = export(&scene, &second, Some(0));
    assert!(!ends_with_parity(&third));
    let fourth = export(&scene, &third, None);
    assert!(!ends_with_parity(&fourth));
    let fifth = export(&scene, &fourth, Some(10));
    assert!(ends_with_parity(&fifth));
    for (commits, archive) in (1..).zip([&first, &second, &third, &fourth, &fifth]) {
        let verified = verify(archive).unwrap();
        assert!(is_intact(&verified) && verified.is_ended, "{verified:?}");
        assert_eq!(verified.commits, commits);
        check_commit(archive, "1", &content, "with parity");
        for way in WAYS {
            assert!(restore(archive, way, None, false).is_whole(), "{way:?}");
        }
    }
    let none = export(&scene, &[], None);
    assert_eq!(parity_bytes(&none), 0, "without it, there is none");
    assert_eq!(none.len(), export(&scene, &[], Some(0)).len());
}

#[test]
fn an_archive_gets_parity_later() {
    let (bytes, content) = two_commits();
    let (protected, report) = protect(&bytes, 5, false);
    let report = report.unwrap();
    assert!(protected.starts_with(&bytes) && ends_with_parity(&protected));
    assert_eq!(
        (report.protected_bytes, report.was_protected),
        (bytes.len() as u64, false)
    );
    assert_eq!(report.parity_bytes, parity_bytes(&protected));
    assert!(is_intact(&verify(&protected).unwrap()));
    check_commit(&protected, "1", &content[0], "protected");
    check_commit(&protected, "2", &content[1], "protected");
    // A second time there is nothing to do, unless it is asked for.
    let (same, report) = protect(&protected, 5, false);
    assert!(same == protected && report.unwrap().was_protected);
    let (again, report) = protect(&protected, 20, true);
    assert_eq!(report.unwrap().protected_bytes, protected.len() as u64);
    assert!(is_intact(&verify(&again).unwrap()));
    // An export goes on with the last percentage.
    let scene = Scene::new();
    let third = export(&scene, &again, None);
    assert!(ends_with_parity(&third) && is_intact(&verify(&third).unwrap()));
    let folder = tempfile::tempdir().unwrap();
    for (name, archive) in [("protected", &protected), ("again", &again), ("third", &third)] {
        std::fs::write(folder.path().join(format!("{name}.vmfold")), archive).unwrap();
    }
    agree_on_archives_below(folder.path());
}

#[test]
fn damage_gets_no_parity() {
    let (mut bytes, _) = two_commits();
    bytes[5000] ^= 1;
    let (after, report) = protect(&bytes, 5, false);
    assert!(
        matches!(report, Err(Error::Damaged { .. })) && after == bytes,
        "{report:?}"
    );
}

/// Wherever parity is cut, the commit before it stays, and an export goes on.
#[test]
fn parity_that_did_not_end_costs_nothing() {
    let scene = Scene::new();
    let (archive, content) = (export(&scene, &[], Some(5)), scene.content());
    let records = records(&archive);
    let first_parity = records
        .iter()
        .find(|record| record.header.kind == RecordKind::Parity)
        .unwrap();
    let committed = first_parity.range.start;
    for end in records
        .iter()
        .flat_map(|record| [record.range.start + 50, record.range.end])
    {
        if end < committed || end == archive.len() {
            continue;
        }
        let verified = verify(&archive[..end]).unwrap();
        assert!(is_intact(&verified), "{end}: {verified:?}");
        check_commit(&archive[..end], "1", &content, "cut");
        let grown = export(&scene, &archive[..end], Some(5));
        assert!(is_intact(&verify(&grown).unwrap()) && ends_with_parity(&grown), "{end}");
    }
}

/// Whatever call of the store fails, there is the archive as it was, or one with the commit. An error after the commit is told, and the commit stays.
#[test]
fn errors_while_parity_is_written_leave_the_commit() {
    let scene = Scene::new();
    let options = ExportOptions {
        parity: Some(5),
        ..scene.options()
    };
    let run = |at, fault| {
        let store = Arc::new(FaultyStore::new(MemoryStore::default(), at, fault));
        let result = export_on(scene.pool(false), &options, Arc::clone(&store) as _, &Silent::default());
        (store, result)
    };
    let (whole, result) = run(u64::MAX, StoreFault::Dies);
    assert!(result.unwrap().failed.is_none());
    let calls = whole.calls();
    let mut after_commit = 0;
    for (at, call) in (0..).zip(&calls) {
        if !matches!(call, StoreCall::Append(_) | StoreCall::Settle) {
            continue;
        }
        let (store, result) = run(at, StoreFault::Tears(libc::ENOSPC));
        let archive = store.inner().to_vec();
        match result {
            Err(_) => assert!(archive.is_empty(), "call {at}: {call:?}"),
            Ok(exported) => {
                after_commit += 1;
                assert!(exported.failed.is_some(), "call {at}");
                assert_eq!(archive.len() as u64, exported.archive_bytes);
                let verified = verify(&archive).unwrap();
                assert!(is_intact(&verified) && verified.is_ended, "call {at}: {verified:?}");
            }
        }
    }
    // Two PARITY records, the COMMIT, the TAIL, and what settles them.
    assert_eq!(after_commit, 6);
}

#[test]
fn a_pipe_gets_the_same_parity() {
    let scene = Scene::new();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.vmfold");
    let pipe = Arc::new(OutputPipe::of(std::fs::File::create(&path).unwrap()));
    let options = ExportOptions {
        parity: Some(5),
        ..scene.options()
    };
    assert_eq!(pipe.length().unwrap(), None);
    export_on(scene.pool(false), &options, pipe, &Silent::default()).unwrap();
    let archive = std::fs::read(&path).unwrap();
    assert!(ends_with_parity(&archive) && is_intact(&verify(&archive).unwrap()));
    let (same, report) = protect(&archive, 5, false);
    assert!(report.unwrap().was_protected && same == archive);
}
