//! Goal: every store does what [`Store`] says, and whatever call of one fails, archives and images are intact and the next try succeeds.
//! Method: one conformance suite for all stores; a fault at every call of an export, an append, an import and a verification.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Mounted, Random, can_mount, state_of};
use vmfold::error::Error;
use vmfold::exec::restore::RestoreOptions;
use vmfold::monitor::Silent;
use vmfold::ops::export::{ExportOptions, Revisions, Sealing, export_to};
use vmfold::ops::import::{ImportOptions, import_from, import_in_order};
use vmfold::ops::verify::verify_store;
use vmfold::ops::{ArchivePlace, BackupAccess, Scope};
use vmfold::report::{Exported, Imported, Verified};
use vmfold::store::{FileStore, InputPipe, MemoryStore, OutputPipe, PeekedStore, Store, StoreReader};
use vmfold::testing::faulty_store::{FaultyStore, StoreCall, StoreFault};

/// What every store that is read anywhere and appended to does. It is empty at first.
fn conforms(store: &dyn Store) {
    let mut buffer = [0xee; 16];
    assert_eq!(store.length().unwrap(), Some(0));
    assert_eq!(store.read_at(0, &mut buffer).unwrap(), 0);
    store.append(b"").unwrap();
    store.append(b"hello ").unwrap();
    store.append(b"world").unwrap();
    store.settle().unwrap();
    assert_eq!(store.length().unwrap(), Some(11));
    assert_eq!(store.read_at(0, &mut []).unwrap(), 0);
    store.read_exact_at(6, &mut buffer[..5]).unwrap();
    assert_eq!(&buffer[..6], b"world\xee");
    let error = store.read_exact_at(8, &mut buffer[..4]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    for beyond in [11, 12, u64::MAX / 2] {
        assert_eq!(store.read_at(beyond, &mut buffer).unwrap(), 0, "{beyond}");
    }
    // What is appended after something was cut off follows what is left.
    store.truncate(5).unwrap();
    assert_eq!(store.length().unwrap(), Some(5));
    store.append(b"!").unwrap();
    let mut all = [0; 6];
    store.read_exact_at(0, &mut all).unwrap();
    assert_eq!(&all, b"hello!");
    assert!(!store.path().as_os_str().is_empty());
}

#[test]
fn stores_conform() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    conforms(&MemoryStore::default());
    conforms(&FileStore::append_to(&path).unwrap());
    conforms(&FaultyStore::new(MemoryStore::default(), u64::MAX, StoreFault::Dies));
    conforms(&FaultyStore::new(
        MemoryStore::default(),
        3,
        StoreFault::Delays(Duration::from_millis(1)),
    ));
    // What is opened for reading is not written to, and holds what was written.
    let file = FileStore::open(&path).unwrap();
    assert_eq!(file.length().unwrap(), Some(6));
    assert_eq!(file.append(b"x").unwrap_err().kind(), ErrorKind::Unsupported);
    assert_eq!(file.truncate(0).unwrap_err().kind(), ErrorKind::Unsupported);
    let both = [FileStore::append_to(&path), FileStore::append_to(&path)];
    assert!(matches!(both, [Ok(_), Err(Error::Appending { .. })]), "{both:?}");
}

#[test]
fn pipes_are_read_once_and_in_order() {
    let (read, write) = std::io::pipe().unwrap();
    let silent = Silent::default();
    let input = InputPipe::of(File::from(OwnedFd::from(read)), &silent);
    let output = OutputPipe::of(File::from(OwnedFd::from(write)));
    output.append(b"hello ").unwrap();
    output.append(b"world").unwrap();
    output.settle().unwrap();
    let unsupported = |result: std::io::Result<()>| assert_eq!(result.unwrap_err().kind(), ErrorKind::Unsupported);
    unsupported(output.truncate(0));
    unsupported(output.read_at(0, &mut [0]).map(drop));
    unsupported(input.append(b"x"));
    drop(output);
    assert_eq!(input.length().unwrap(), None);
    let mut buffer = [0; 8];
    input.read_exact_at(0, &mut buffer).unwrap();
    assert_eq!(&buffer, b"hello wo");
    unsupported(input.read_at(0, &mut buffer).map(drop));
    unsupported(input.read_at(9, &mut buffer).map(drop));
    assert_eq!(input.read_at(8, &mut buffer).unwrap(), 3);
    assert_eq!(input.read_at(11, &mut buffer).unwrap(), 0);
}

#[test]
fn the_first_bytes_of_a_pipe_can_be_read_again() {
    for length in [0, 5, 4096, 10_000] {
        let all: Vec<u8> = (0..length).map(|at| u8::try_from(at % 251).unwrap()).collect();
        let (read, mut write) = std::io::pipe().unwrap();
        let silent = Silent::default();
        let input = InputPipe::of(File::from(OwnedFd::from(read)), &silent);
        std::thread::scope(|scope| {
            let bytes = &all;
            scope.spawn(move || {
                // The head comes in more than one piece.
                for part in bytes.chunks(3000) {
                    write.write_all(part).unwrap();
                }
                drop(write);
            });
            let peeked = PeekedStore::new(&input).unwrap();
            assert_eq!(peeked.head(), &all[..all.len().min(4096)]);
            let mut found = Vec::new();
            StoreReader::new(&peeked, 0).read_to_end(&mut found).unwrap();
            assert!(found == all, "{length}");
            assert_eq!(peeked.append(b"x").unwrap_err().kind(), ErrorKind::Unsupported);
        });
    }
}

/// Every fault that is tried at every call.
const FAULTS: [StoreFault; 4] = [
    StoreFault::Fails(libc::EIO),
    StoreFault::Fails(libc::ENOSPC),
    StoreFault::Tears(libc::ENOSPC),
    StoreFault::Dies,
];

struct Scene {
    fs: Mounted,
}

impl Scene {
    fn new() -> Self {
        let fs = Mounted::btrfs();
        let mut random = Random(11);
        for name in ["a.img", "b.img", "c.img"] {
            std::fs::write(fs.pool().join(name), random.data(200 << 10)).unwrap();
        }
        Self { fs }
    }

    fn export(&self, store: Arc<dyn Store>) -> Result<Exported, Error> {
        let options = ExportOptions {
            sealing: Sealing::default(),
            scope: Scope {
                paths: vec![self.fs.pool()],
                exclude: Vec::new(),
                index: self.fs.index(),
                memory_bytes: None,
            },
            only: Vec::new(),
            revisions: Revisions::All,
            archive: ArchivePlace::Pipe,
            level: 3,
            trusts_archive: false,
            label: String::new(),
            parity: None,
        };
        export_to(&options, || Ok(store), &Silent::default())
    }
}

fn options(to: &Path, commit: Option<&str>, resume: bool) -> ImportOptions {
    ImportOptions {
        archive: ArchivePlace::Pipe,
        commit: commit.map(str::to_owned),
        restore: RestoreOptions {
            to: to.to_owned(),
            resume,
            ..RestoreOptions::default()
        },
        seeds: Vec::new(),
        index: to.with_extension("index"),
        memory_bytes: None,
        dry_run: false,
        access: BackupAccess::default(),
    }
}

fn import(store: Arc<dyn Store>, to: &Path, commit: Option<&str>, resume: bool) -> Result<Imported, Error> {
    import_from(store, &options(to, commit, resume), &Silent::default())
}

type Content = BTreeMap<PathBuf, blake3::Hash>;

fn content(folder: &Path) -> Content {
    let entries = walkdir::WalkDir::new(folder).into_iter().filter_map(Result::ok);
    let files = entries.filter(|entry| entry.file_type().is_file());
    files
        .map(|entry| {
            let below = entry.path().strip_prefix(folder).unwrap().to_owned();
            (below, blake3::hash(&std::fs::read(entry.path()).unwrap()))
        })
        .collect()
}

/// Restores a commit, which must be what it was.
fn check_commit(bytes: &[u8], commit: &str, expected: &Content, context: &str) {
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    let imported = import(Arc::new(MemoryStore::of(bytes.to_vec())), &to, Some(commit), false);
    imported.unwrap_or_else(|error| panic!("{context}: {error}"));
    assert_eq!(content(&to), *expected, "{context}");
}

fn is_intact(verified: &Verified) -> bool {
    verified.damage.is_empty() && verified.lost.is_empty()
}

/// An error of a store names it, and a cause.
fn check_error(error: &Error, context: &str) {
    let text = vmfold::error::describe(error);
    assert!(text.contains("memory"), "{context}: {text}");
    assert!(
        text.contains("Input/output") || text.contains("No space") || text.contains("no space"),
        "{context}: {text}"
    );
}

/// Exports with a fault at each call, to a store that holds `before`, of which the first commits are those with these contents.
fn export_with_faults(scene: &Scene, before: &[u8], commits: &[Content], now: &Content) -> u32 {
    let mut hit = 0;
    for fault in FAULTS {
        for at in 0.. {
            let context = format!("{fault:?} at call {at}");
            let store = Arc::new(FaultyStore::new(MemoryStore::of(before.to_vec()), at, fault));
            let done = scene.export(Arc::clone(&store) as Arc<dyn Store>);
            let bytes = store.inner().to_vec();
            if store.calls().len() as u64 <= at {
                done.unwrap_or_else(|error| panic!("{context}: {error}"));
                break;
            }
            hit += 1;
            for (number, expected) in (1..).zip(commits) {
                check_commit(&bytes, &number.to_string(), expected, &context);
            }
            if let Err(error) = &done {
                check_error(error, &context);
                if !matches!(fault, StoreFault::Dies)
                    && !matches!(store.calls()[usize::try_from(at).unwrap()], StoreCall::Truncate(_))
                {
                    assert_eq!(bytes, before, "{context}: what was written was taken back");
                }
            }
            // The next try succeeds, whatever was left.
            let again = Arc::new(MemoryStore::of(bytes));
            let made = scene.export(Arc::clone(&again) as Arc<dyn Store>);
            let made = made.unwrap_or_else(|error| panic!("{context}: {error}"));
            let bytes = again.to_vec();
            check_commit(&bytes, &made.commit.to_string(), now, &context);
            let verified = verify_store(Arc::new(MemoryStore::of(bytes)), &Silent::default()).unwrap();
            assert!(is_intact(&verified), "{context}");
        }
    }
    hit
}

#[test]
fn whatever_call_of_an_export_fails_the_archive_is_intact() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let first = content(&scene.fs.pool());
    let state = state_of(&scene.fs.pool());
    let hit = export_with_faults(&scene, &[], &[], &first);
    assert!(hit > 40, "{hit}");
    assert_eq!(state_of(&scene.fs.pool()), state);
    let archive = Arc::new(MemoryStore::default());
    scene.export(Arc::clone(&archive) as Arc<dyn Store>).unwrap();
    std::fs::write(scene.fs.pool().join("b.img"), Random(12).data(300 << 10)).unwrap();
    let second = content(&scene.fs.pool());
    let hit = export_with_faults(&scene, &archive.to_vec(), &[first], &second);
    assert!(hit > 40, "{hit}");
}

#[test]
fn whatever_call_of_an_import_or_a_verification_fails_nothing_wrong_is_restored() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    let expected = content(&scene.fs.pool());
    let archive = Arc::new(MemoryStore::default());
    scene.export(Arc::clone(&archive) as Arc<dyn Store>).unwrap();
    let bytes = archive.to_vec();
    let faulty = |at, fault| Arc::new(FaultyStore::new(MemoryStore::of(bytes.clone()), at, fault));
    let folder = tempfile::tempdir_in(&scene.fs.mount).unwrap();
    let mut hit = [0; 3];
    for fault in FAULTS {
        for at in 0.. {
            let context = format!("{fault:?} at call {at}");
            let to = folder.path().join("to");
            let store = faulty(at, fault);
            let done = import(Arc::clone(&store) as Arc<dyn Store>, &to, None, false);
            let is_over = store.calls().len() as u64 <= at;
            match done {
                Ok(_) => assert_eq!(content(&to), expected, "{context}"),
                Err(error) => {
                    check_error(&error, &context);
                    let images = content(&to)
                        .into_keys()
                        .filter(|path| path.extension().is_some_and(|end| end == "img"));
                    assert_eq!(images.count(), 0, "{context}");
                    import(faulty(u64::MAX, fault), &to, None, true)
                        .unwrap_or_else(|error| panic!("{context}: {error}"));
                    assert_eq!(content(&to), expected, "{context}");
                }
            }
            let _ = std::fs::remove_dir_all(&to);
            if is_over {
                break;
            }
            hit[0] += 1;
        }
        for at in 0.. {
            let context = format!("{fault:?} at call {at}, in order");
            let to = folder.path().join("to");
            let store = faulty(at, fault);
            let done = import_in_order(&*store, &options(&to, None, false), &Silent::default());
            match done {
                Ok(_) => assert_eq!(content(&to), expected, "{context}"),
                Err(error) => {
                    let text = vmfold::error::describe(&error);
                    assert!(text.contains("memory"), "{context}: {text}");
                }
            }
            let _ = std::fs::remove_dir_all(&to);
            if store.calls().len() as u64 <= at {
                break;
            }
            hit[1] += 1;
        }
        for at in 0.. {
            let context = format!("{fault:?} at call {at}");
            let store = faulty(at, fault);
            let verified = verify_store(Arc::clone(&store) as Arc<dyn Store>, &Silent::default());
            if store.calls().len() as u64 <= at {
                assert!(is_intact(&verified.unwrap()), "{context}");
                break;
            }
            match verified {
                // After one call that failed, everything may have been read in another way.
                Ok(verified) => assert!(
                    fault != StoreFault::Dies || !is_intact(&verified),
                    "{context}: what was not read is not intact"
                ),
                Err(error) => check_error(&error, &context),
            }
            hit[2] += 1;
        }
    }
    assert!(hit.iter().all(|hit| *hit > 20), "{hit:?}");
}
