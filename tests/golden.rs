//! Goal: every archive that the format allows is read, and what this version must not read is refused by name. Method: golden archives
//! that were written from the specification alone (`tests/format/make_archives.py`), with what they hold.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

mod common;

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmfold::archive::reader::Archive;
use vmfold::error::Error;
use vmfold::exec::restore::RestoreOptions;
use vmfold::monitor::Silent;
use vmfold::ops::import::{ImportOptions, import, import_from, import_in_order};
use vmfold::ops::list::list;
use vmfold::ops::verify::{verify, verify_store};
use vmfold::ops::{ArchivePlace, BackupAccess};
use vmfold::report::Imported;
use vmfold::store::MemoryStore;

const READ: [&str; 6] = ["plain", "lanes", "forgotten", "relocated", "skippable", "unchanged"];

fn path_of(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join(format!("testdata/archive-v1-{name}.vmfold"))
}

/// The hashes of the images of each commit, by the order of commits in the file.
fn expected(name: &str) -> BTreeMap<usize, BTreeMap<PathBuf, String>> {
    let text = std::fs::read_to_string(path_of(name).with_extension("sha256")).unwrap();
    let mut commits: BTreeMap<usize, BTreeMap<PathBuf, String>> = BTreeMap::new();
    for line in text.lines() {
        let (hash, path) = line.split_once("  ").unwrap();
        let (commit, path) = path.split_once('/').unwrap();
        let images = commits.entry(commit.parse().unwrap()).or_default();
        images.insert(path.into(), hash.to_owned());
    }
    commits
}

fn options(name: &str, commit: &str, to: &Path) -> ImportOptions {
    ImportOptions {
        archive: ArchivePlace::File(path_of(name)),
        commit: Some(commit.to_owned()),
        restore: RestoreOptions {
            to: to.to_owned(),
            ..RestoreOptions::default()
        },
        seeds: Vec::new(),
        index: to.join("index"),
        memory_bytes: Some(64 << 20),
        dry_run: false,
        access: BackupAccess::default(),
    }
}

fn hashes_of(folder: &Path) -> BTreeMap<PathBuf, String> {
    let files = walkdir::WalkDir::new(folder).into_iter().map(Result::unwrap);
    let is_image = |entry: &walkdir::DirEntry| !entry.path().to_string_lossy().contains("/.vmfold-");
    let images = files.filter(|entry| entry.file_type().is_file() && is_image(entry));
    let hashes = images.map(|entry| {
        let name = entry.path().strip_prefix(folder).unwrap().to_owned();
        (name, common::sha256_of(entry.path()))
    });
    hashes.collect()
}

/// All names of the images; the sums have those of the generator.
fn check(case: &str, done: Result<Imported, Error>, to: &Path, expected: &BTreeMap<PathBuf, String>) {
    let done = done.unwrap_or_else(|error| panic!("{case}: {error}"));
    assert!(done.lost.is_empty(), "{case}: {:?}", done.lost);
    let found = hashes_of(to);
    for (path, hash) in expected {
        assert_eq!(found.get(path), Some(hash), "{case}: {}", path.display());
    }
}

#[test]
fn what_the_format_allows_is_read() {
    for name in READ {
        let archive = Archive::open(Arc::new(MemoryStore::of(std::fs::read(path_of(name)).unwrap()))).unwrap();
        let mut commits: Vec<_> = archive.commits().iter().collect();
        commits.sort_by_key(|committed| committed.location.offset);
        let expected = expected(name);
        let verified = verify(&path_of(name), &Silent::default()).unwrap();
        assert_eq!((verified.damage, verified.lost.len()), (Vec::new(), 0), "{name}");
        assert!(verified.is_ended, "{name}");
        // A forgotten commit has a place in the file, and no images.
        let skipped = expected.keys().next().unwrap() - 1;
        assert_eq!(commits.len(), expected.len(), "{name}");
        for (number, committed) in (skipped + 1..).zip(commits) {
            let folder = tempfile::tempdir().unwrap();
            let case = format!("{name}: commit {number}");
            let to = folder.path().join("file");
            let done = import(&options(name, &committed.id(), &to), &Silent::default());
            check(&case, done, &to, &expected[&number]);
            let to = folder.path().join("pipe");
            let store = MemoryStore::of(std::fs::read(path_of(name)).unwrap());
            let done = import_in_order(&store, &options(name, &committed.id(), &to), &Silent::default());
            match (name, &done) {
                // What comes before the second lane can be restored.
                ("lanes", Err(error)) => assert!(matches!(error, Error::Unsupported { .. }), "{case}"),
                // A pipe cannot know that a PACK which is damaged is needed by nothing.
                ("forgotten" | "relocated", Err(error)) => {
                    assert!(matches!(error, Error::Damaged { .. }), "{case}");
                }
                _ => check(&case, done, &to, &expected[&number]),
            }
        }
    }
}

#[test]
fn what_must_not_be_skipped_is_refused_by_name() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata");
    let names = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let critical: Vec<String> = names
        .filter_map(|name| {
            let name = std::str::from_utf8(name.as_bytes()).unwrap().to_owned();
            Some(name.strip_prefix("archive-v1-")?.strip_suffix(".vmfold")?.to_owned())
        })
        .filter(|name| name.starts_with("critical-"))
        .collect();
    assert_eq!(critical.len(), 13);
    for name in critical {
        let folder = tempfile::tempdir().unwrap();
        let to = folder.path().join("to");
        let is_refused = |done: Result<(), Error>| matches!(done, Err(Error::Unsupported { .. }));
        let options = options(&name, "latest", &to);
        // What stands in the images alone concerns those who read them.
        assert!(
            is_refused(verify(&path_of(&name), &Silent::default()).map(|_| ())),
            "{name}: verify"
        );
        assert!(
            is_refused(import(&options, &Silent::default()).map(|_| ())),
            "{name}: import"
        );
        let store = MemoryStore::of(std::fs::read(path_of(&name)).unwrap());
        let done = import_in_order(&store, &options, &Silent::default()).map(|_| ());
        assert!(is_refused(done), "{name}: pipe");
        if !["attribute", "plan", "sealed", "header-flag"]
            .map(|what| format!("critical-{what}"))
            .contains(&name)
        {
            assert!(is_refused(list(&path_of(&name), None).map(|_| ())), "{name}: list");
        }
        assert!(!to.exists() || hashes_of(&to).is_empty(), "{name}: nothing is restored");
    }
}

#[test]
fn a_copy_serves_where_frames_of_a_pack_are_damaged() {
    let mut bytes = std::fs::read(path_of("plain")).unwrap();
    let start = bytes.windows(9).position(|part| part == b"\x89vmfold\n\x03").unwrap();
    let end = start + 96 + usize::try_from(u64::from_le_bytes(bytes[start + 48..][..8].try_into().unwrap())).unwrap();
    let mut damaged = bytes[start..end].to_vec();
    let last = damaged.len() - 1000;
    damaged[last] ^= 1;
    bytes.splice(start..start, damaged);
    let folder = tempfile::tempdir().unwrap();
    let to = folder.path().join("to");
    let done = import_from(
        Arc::new(MemoryStore::of(bytes)),
        &options("plain", "1", &to),
        &Silent::default(),
    );
    check("a damaged copy in front", done, &to, &expected("plain")[&1]);
}

/// Also where it is in what nobody reads, as in the padding of a PACK.
#[test]
fn a_flipped_byte_is_told_wherever_it_is() {
    for name in ["plain", "unchanged"] {
        let bytes = std::fs::read(path_of(name)).unwrap();
        for place in (0..bytes.len()).step_by(29) {
            let mut flipped = bytes.clone();
            flipped[place] ^= 0x10;
            if let Ok(verified) = verify_store(Arc::new(MemoryStore::of(flipped)), &Silent::default()) {
                assert!(!verified.damage.is_empty(), "{name}: byte {place}");
            }
        }
    }
}

/// `formats/read_archive.py` reads the golden archives, no mutation of them makes it restore a wrong byte, and what `verify` finds intact is
/// intact for it.
#[test]
fn the_independent_reader_agrees() {
    for (script, arguments) in [
        ("check.py", vec!["300", "1"]),
        ("differential.py", vec![env!("CARGO_BIN_EXE_vmfold"), "300", "1"]),
    ] {
        if let Some((is_right, text)) = common::readers::python(script, &arguments) {
            assert!(is_right, "{script}: {text}");
        }
    }
}
