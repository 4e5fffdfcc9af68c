//! Goal: whatever a restore takes blocks from, it is told of images in the same way and gets the same blocks. Method: one suite that all
//! sources pass, an archive that is read anywhere, one that comes through a pipe, and a backup of another kind; and restores from each of them.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmfold::archive::reader::Archive;
use vmfold::archive::record::{BlockHasher, Hash, LaneId, hash_of};
use vmfold::block::{BLOCK_LEN, bytes};
use vmfold::content::Content;
use vmfold::error::{Error, Result};
use vmfold::exec::hashes::digest;
use vmfold::exec::restore::archive::ArchiveSource;
use vmfold::exec::restore::backup::{BackupOptions, BackupSource, NoEarlierBlocks};
use vmfold::exec::restore::folder::Root;
use vmfold::exec::restore::pipe::{PipeOptions, PipeSource};
use vmfold::exec::restore::source::{BlockSink, BlockSource, SourceFrame};
use vmfold::exec::restore::{Restore, RestoreOptions, RestoreOutcome};
use vmfold::foreign::{Backup, Event, Volume};
use vmfold::monitor::Silent;
use vmfold::numbers::StoreBlock;
use vmfold::plan::restore::{Contents, wanted};
use vmfold::range;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;

const GOLDEN: &[u8] = include_bytes!("../testdata/archive-v1.vmfold");
const GOLDEN_SUMS: &str = include_str!("../testdata/archive-v1.sha256");

/// Images in memory, as a reader of others' backups tells them: in pieces of odd lengths, the last first, and of two images in turn.
struct MemoryBackup {
    images: Vec<(&'static str, Vec<u8>)>,
    /// What is to come, the first last.
    events: Vec<(Event, Vec<u8>)>,
}

impl MemoryBackup {
    fn new(images: Vec<(&'static str, Vec<u8>)>) -> Self {
        let mut backup = Self {
            images,
            events: Vec::new(),
        };
        let count = backup.images.len();
        for volumes in [0..count - 1, count - 1..count] {
            for volume in volumes.clone() {
                let path = PathBuf::from(backup.images[volume].0);
                let (size, time) = (None, None);
                backup
                    .events
                    .push((Event::Volume(Volume { path, size, time }), Vec::new()));
            }
            let pieces = volumes.clone().flat_map(|volume| {
                let pieces = backup.images[volume].1.chunks(3001).enumerate();
                pieces.map(move |(at, piece)| (at, volume, piece.to_vec()))
            });
            let mut pieces: Vec<(usize, usize, Vec<u8>)> = pieces.collect();
            pieces.sort_by_key(|(at, volume, _)| (std::cmp::Reverse(*at), *volume));
            for (at, volume, piece) in pieces {
                let offset = at as u64 * 3001;
                backup.events.push((Event::Data { volume, offset }, piece));
            }
            for volume in volumes {
                let size = backup.images[volume].1.len() as u64;
                backup.events.push((Event::End { volume, size }, Vec::new()));
            }
        }
        backup.events.reverse();
        backup
    }
}

impl Backup for MemoryBackup {
    fn kind(&self) -> &'static str {
        "images in memory"
    }
    fn proves_each_volume(&self) -> bool {
        true
    }
    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        Ok(self.events.pop().map(|(event, content)| {
            *buffer = content;
            event
        }))
    }
}

/// A backup as a source.
fn backup_source<'a>(backup: MemoryBackup, folder: &Path, monitor: &'a Silent) -> BackupSource<'a> {
    let options = BackupOptions {
        hasher: BlockHasher::default(),
        takes: Box::new(|_| true),
        partial: false,
        id: LaneId([7; 16]),
        folder: folder.to_owned(),
        budget: Budget::default(),
        earlier: Box::new(NoEarlierBlocks),
    };
    BackupSource::new(Box::new(backup), Path::new("memory"), options, monitor)
}

/// Keeps what it takes.
#[derive(Default)]
struct Kept {
    wanted: Vec<Range<StoreBlock>>,
    blocks: BTreeMap<StoreBlock, Vec<u8>>,
    proved: u64,
}

impl BlockSink for Kept {
    fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        let is_missing = |block| range::contains(&self.wanted, block) && !self.blocks.contains_key(&block);
        range::where_true(range::each(range).map(|block| (block, is_missing(block))))
    }
    fn take(&mut self, frames: &[SourceFrame<'_>]) -> Result<Vec<(usize, Error)>> {
        for frame in frames {
            let content = (frame.content)()?;
            assert_eq!(
                content.len(),
                range::length(&frame.blocks) as usize * BLOCK_LEN,
                "whole blocks"
            );
            for (block, content) in range::each(frame.blocks.clone()).zip(content.chunks(BLOCK_LEN)) {
                let before = self.blocks.insert(block, content.to_vec());
                assert!(
                    before.is_none_or(|before| before == content),
                    "{block} came twice, and differs"
                );
            }
        }
        Ok(Vec::new())
    }
    fn prove(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<bool> {
        for (block, hash) in range::from(first).zip(hashes) {
            if let Some(content) = self.blocks.get(&block) {
                assert_eq!(hash_of(content), *hash);
                self.proved += 1;
            }
        }
        Ok(true)
    }
}

type Sums = BTreeMap<PathBuf, blake3::Hash>;

/// What every source does: see [`BlockSource`]. Returns what its last images hold.
fn conforms(source: &mut dyn BlockSource, context: &str) -> Sums {
    assert!(!source.path().as_os_str().is_empty(), "{context}");
    let mut kept = Kept::default();
    let (mut committed, mut offers) = (None, 0);
    while let Some(offer) = source.offer().unwrap() {
        offers += 1;
        let runs = offer.contents.manifest.images.iter().flat_map(|image| &image.runs);
        kept.wanted = range::joined(kept.wanted.iter().cloned().chain(wanted(runs)));
        let delivered = source.deliver(&kept.wanted.clone(), &mut kept).unwrap();
        committed = delivered.committed.or(committed);
        if delivered.is_last {
            break;
        }
    }
    assert!(offers > 0, "{context}: nothing was offered");
    assert_ne!(source.id(), LaneId::default(), "{context}");
    assert!(!source.has_later_damage(), "{context}");
    assert!(!source.nothing_committed().to_string().is_empty(), "{context}");
    let contents: Arc<Contents> = committed.unwrap_or_else(|| panic!("{context}: nothing was committed"));
    assert!(contents.commit.is_some() && !contents.doubtful, "{context}");
    let hashes = source.hashes();
    let images = contents.manifest.images.iter().map(|image| {
        let mut content = Vec::new();
        for run in &image.runs {
            for n in 0..run.blocks {
                match run.content {
                    Content::Stored(first) => content.extend(
                        kept.blocks
                            .get(&(first + n))
                            .unwrap_or_else(|| panic!("{context}: block {} did not come", first + n)),
                    ),
                    _ => content.resize(content.len() + BLOCK_LEN, 0),
                }
            }
        }
        content.resize(usize::try_from(image.image.size).unwrap(), 0);
        let mut has_all = true;
        let found = digest(
            &image.runs,
            image.image.size,
            (&BlockHasher::default(), &Silent::default()),
            |first, blocks, digest| {
                has_all &= hashes.add_to(digest, first, blocks)?;
                Ok(())
            },
        );
        let mut summaries = contents.summaries.iter();
        if let Some(summary) = summaries.find(|summary| summary.path == image.image.path()) {
            assert!(has_all, "{context}: hashes are there in the end");
            assert_eq!(found.unwrap(), summary.digest, "{context}");
        }
        (image.image.path().to_owned(), blake3::hash(&content))
    });
    images.collect()
}

fn archive() -> Archive {
    Archive::open(Arc::new(MemoryStore::of(GOLDEN.to_vec()))).unwrap()
}

fn pipe_options(commit: Option<&str>, folder: &Path) -> PipeOptions {
    PipeOptions {
        keys: Arc::default(),
        commit: commit.map(str::to_owned),
        partial: false,
        announces: true,
        folder: folder.to_owned(),
        budget: Budget::default(),
    }
}

fn memory_images() -> Vec<(&'static str, Vec<u8>)> {
    let content = |seed: u8, length: usize| {
        (0..length)
            .map(|at| u8::try_from(at / 700 % 256).unwrap() ^ seed)
            .collect()
    };
    vec![
        ("a.img", content(1, 50_000)),
        ("folder/b.img", content(2, 4096)),
        ("empty.img", Vec::new()),
    ]
}

#[test]
fn sources_conform() {
    let monitor = Silent::default();
    let (archive, folder) = (archive(), tempfile::tempdir().unwrap());
    let store = MemoryStore::of(GOLDEN.to_vec());
    for commit in [None, Some("1"), Some("second"), Some("latest")] {
        let mut from_file = ArchiveSource::open(&archive, commit, true, &Budget::default(), &monitor).unwrap();
        let mut from_pipe = PipeSource::new(&store, pipe_options(commit, folder.path()), &monitor);
        let one = conforms(&mut from_file, "archive");
        let other = conforms(&mut from_pipe, "pipe");
        assert_eq!(one.len(), 3);
        assert_eq!(one, other, "{commit:?}");
    }
    let sums = conforms(
        &mut backup_source(MemoryBackup::new(memory_images()), folder.path(), &monitor),
        "memory",
    );
    for (name, content) in memory_images() {
        assert_eq!(sums[Path::new(name)], blake3::hash(&content), "{name}");
    }
}

#[test]
fn a_source_hands_over_what_is_asked_for() {
    let monitor = Silent::default();
    let (archive, folder) = (archive(), tempfile::tempdir().unwrap());
    let store = MemoryStore::of(GOLDEN.to_vec());
    let mut memory = backup_source(MemoryBackup::new(memory_images()), folder.path(), &monitor);
    let mut from_file = ArchiveSource::open(&archive, None, false, &Budget::default(), &monitor).unwrap();
    let mut from_pipe = PipeSource::new(&store, pipe_options(None, folder.path()), &monitor);
    let sources: [&mut dyn BlockSource; 3] = [&mut memory, &mut from_file, &mut from_pipe];
    for source in sources {
        let wanted = [1..3, 5..6].map(StoreBlock::range);
        let mut kept = Kept {
            wanted: wanted.to_vec(),
            ..Kept::default()
        };
        while source.offer().unwrap().is_some() && !source.deliver(&wanted, &mut kept).unwrap().is_last {}
        assert!(
            [1, 2, 5]
                .iter()
                .all(|block| kept.blocks.contains_key(&StoreBlock(*block)))
        );
    }
}

#[test]
fn what_does_not_exist_is_said() {
    let monitor = Silent::default();
    let (archive, folder) = (archive(), tempfile::tempdir().unwrap());
    let missing = ArchiveSource::open(&archive, Some("third"), false, &Budget::default(), &monitor)
        .err()
        .unwrap();
    assert!(matches!(missing, Error::NoSuchCommit { .. }), "{missing}");
    let run = |bytes: &[u8], commit: Option<&str>| {
        let store = MemoryStore::of(bytes.to_vec());
        let mut source = PipeSource::new(&store, pipe_options(commit, folder.path()), &monitor);
        restore(&mut source, &folder.path().join("to")).unwrap_err()
    };
    assert!(matches!(run(GOLDEN, Some("third")), Error::NoSuchCommit { .. }));
    assert!(matches!(run(b"", None), Error::NotAnArchive { .. }));
    assert!(matches!(run(&GOLDEN[..GOLDEN.len() / 4], None), Error::Damaged { .. }));
}

fn restore(source: &mut dyn BlockSource, to: &Path) -> Result<RestoreOutcome> {
    let options = RestoreOptions {
        to: to.to_owned(),
        ..RestoreOptions::default()
    };
    let monitor = Silent::default();
    let mut restore = Restore::new(&options, Root::look(to)?, source, &|_| Ok(None), &monitor);
    restore.plan()?;
    assert!(!to.exists(), "a plan makes nothing");
    restore.execute()
}

#[test]
fn a_restore_is_the_same_from_each() {
    let monitor = Silent::default();
    let (archive, folder) = (archive(), tempfile::tempdir().unwrap());
    let store = MemoryStore::of(GOLDEN.to_vec());
    let mut from_file = ArchiveSource::open(&archive, None, true, &Budget::default(), &monitor).unwrap();
    let mut from_pipe = PipeSource::new(&store, pipe_options(None, folder.path()), &monitor);
    let sources: [(&str, &mut dyn BlockSource); 2] = [("file", &mut from_file), ("pipe", &mut from_pipe)];
    for (name, source) in sources {
        let to = folder.path().join(name);
        let outcome = restore(source, &to).unwrap();
        assert!(outcome.lost.is_empty() && !outcome.later_damage, "{name}");
        assert_eq!(outcome.restored.unwrap().images, 3, "{name}");
        let sums = std::process::Command::new("sha256sum")
            .args([
                "--quiet",
                "-c",
                concat!(env!("CARGO_MANIFEST_DIR"), "/testdata/archive-v1.sha256"),
            ])
            .current_dir(&to)
            .status();
        assert!(sums.unwrap().success(), "{name}");
        let made = walkdir::WalkDir::new(&to)
            .into_iter()
            .filter_map(std::result::Result::ok);
        let files = made.filter(|entry| entry.file_type().is_file()).count();
        assert_eq!(files, GOLDEN_SUMS.lines().count(), "{name}: nothing else is left");
    }
    let to = folder.path().join("memory");
    let outcome = restore(
        &mut backup_source(MemoryBackup::new(memory_images()), folder.path(), &monitor),
        &to,
    )
    .unwrap();
    let written: u64 = memory_images()
        .iter()
        .map(|(_, content)| bytes(u32::try_from(content.len().div_ceil(BLOCK_LEN)).unwrap()))
        .sum();
    assert_eq!(outcome.restored.unwrap().written_bytes, written);
    for (name, content) in memory_images() {
        assert_eq!(std::fs::read(to.join(name)).unwrap(), content, "{name}");
    }
}
