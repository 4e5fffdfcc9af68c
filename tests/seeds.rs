//! Goal: whatever a restore finds blocks in that the disk holds already, it finds, reads and shares the same ones. Method: one suite for the images
//! of a pool and for blocks in memory; and a restore onto a real btrfs that takes everything from the simulated filesystem.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{Mounted, can_mount};
use vmfold::archive::announced::AnnouncedBlocks;
use vmfold::archive::reader::Archive;
use vmfold::block::{BLOCK_LEN, bytes};
use vmfold::error::Result;
use vmfold::exec::fingerprints::{allocate, fingerprint};
use vmfold::exec::restore::archive::ArchiveSource;
use vmfold::exec::restore::folder::Root;
use vmfold::exec::restore::seed::{PoolSeed, Seed};
use vmfold::exec::restore::{Restore, RestoreOptions, Sought};
use vmfold::fingerprint::FingerprintFunction;
use vmfold::fs::Filesystem;
use vmfold::index::MemoryIndex;
use vmfold::monitor::Silent;
use vmfold::numbers::{Slot, StoreBlock};
use vmfold::ops::export::{ExportOptions, Revisions, Sealing, export_on};
use vmfold::ops::{ArchivePlace, OpenPool, Scope};
use vmfold::plan;
use vmfold::plan::seeds::SeedMatch;
use vmfold::range;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;
use vmfold::testing::simulated::{BlockContent, INCOMPRESSIBLE, PLAIN, Simulated, block_of};

type MakeSeed = fn() -> Box<dyn Seed>;

/// Blocks of an image of the scene.
const BLOCKS: u64 = 100;

/// Two images that have most blocks in common.
fn simulated() -> Simulated {
    let fs = Simulated::default();
    for number in 0..2u64 {
        let content = (0..BLOCKS).map(|n| INCOMPRESSIBLE + if n < 80 { n } else { 1000 * (number + 1) + n });
        let image = fs.add_image(true, usize::try_from(BLOCKS).unwrap());
        let extent = fs.allocate(PLAIN, content.collect());
        fs.map(image, 0, extent, 0, u32::try_from(BLOCKS).unwrap(), false);
    }
    fs
}

/// An archive of the images.
fn archive(folder: &Path) -> Archive {
    let fs = simulated();
    let options = ExportOptions {
        sealing: Sealing::default(),
        scope: Scope {
            paths: Vec::new(),
            exclude: Vec::new(),
            index: folder.to_owned(),
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
    let pool = OpenPool::new(&fs, Some(MemoryIndex::default().open(FingerprintFunction::Crc32c)));
    let store = Arc::new(MemoryStore::default());
    export_on(pool, &options, Arc::clone(&store) as _, &Silent::default()).unwrap();
    Archive::open(store).unwrap()
}

/// The images as seeds.
fn pool_seed() -> PoolSeed {
    let fs = simulated();
    let mut facts = Filesystem::map(&fs, &Budget::default()).unwrap().facts;
    let memory_bytes = plan::memory_bytes(facts.slots());
    allocate(&mut facts, memory_bytes, Path::new("nowhere")).unwrap();
    fingerprint(&fs, &mut facts, None, &Silent::default()).unwrap();
    PoolSeed::new(Box::new(fs), facts)
}

/// Blocks in memory as seeds.
struct MemorySeed(Vec<Vec<u8>>);

impl MemorySeed {
    fn new() -> Self {
        let contents = simulated().contents().concat();
        Self(contents.into_iter().map(|content| block_of(content).to_vec()).collect())
    }
}

impl Seed for MemorySeed {
    fn find(&self, wanted: &[Range<StoreBlock>], announced: &[AnnouncedBlocks]) -> Vec<SeedMatch> {
        let slots = range::from(Slot(0)).zip(&self.0);
        let slots: HashMap<u32, Slot> = slots
            .map(|(slot, block)| (FingerprintFunction::Crc32c.of(block), slot))
            .collect();
        let known = announced
            .iter()
            .filter(|one| one.function == FingerprintFunction::Crc32c);
        let known = known.flat_map(|one| range::from(one.first).zip(&one.fingerprints));
        let known = known.filter(|(block, _)| range::contains(wanted, *block));
        let found = known.filter_map(|(first, fingerprint)| {
            let slot = *slots.get(fingerprint)?;
            Some(SeedMatch { first, blocks: 1, slot })
        });
        found.collect()
    }

    fn find_content(&self, first: StoreBlock, content: &[u8]) -> Vec<SeedMatch> {
        let blocks = range::from(first).zip(content.chunks(BLOCK_LEN));
        let found = blocks.filter_map(|(first, block)| {
            let slot = Slot(u32::try_from(self.0.iter().position(|own| own == block)?).unwrap());
            Some(SeedMatch { first, blocks: 1, slot })
        });
        found.collect()
    }

    fn content(&self, slot: Slot, blocks: u32) -> Result<Vec<u8>> {
        Ok(self.0[slot.index()..(slot + blocks).index()].concat())
    }

    fn share(&self, slot: Slot, blocks: u32, file: &File, offset: u64) -> bool {
        let content = self.content(slot, blocks).unwrap();
        file.write_all_at(&content, offset).is_ok()
    }
}

/// What every seed does: see [`Seed`]. `stored` is what the store holds, block by block; the seed has all of it.
fn conforms(seed: &dyn Seed, announced: &[AnnouncedBlocks], stored: &BTreeMap<StoreBlock, Vec<u8>>, context: &str) {
    let all = range::where_true(stored.keys().map(|block| (*block, true)));
    let found = seed.find(&all, announced);
    let mut seen = Vec::new();
    let file = tempfile::tempfile().unwrap();
    for one in &found {
        let content = seed.content(one.slot, one.blocks).unwrap();
        assert_eq!(content.len(), one.blocks as usize * BLOCK_LEN, "{context}");
        for (block, content) in range::each(one.range()).zip(content.chunks(BLOCK_LEN)) {
            assert_eq!(content, stored[&block], "{context}: block {block}");
            seen.push(block);
        }
        assert!(seed.share(one.slot, one.blocks, &file, bytes(one.first.0)), "{context}");
        let mut shared = vec![0; content.len()];
        file.read_exact_at(&mut shared, bytes(one.first.0)).unwrap();
        assert_eq!(shared, content, "{context}");
    }
    seen.sort_unstable();
    assert_eq!(
        seen,
        stored.keys().copied().collect::<Vec<_>>(),
        "{context}: each block is found once"
    );
    // Nothing is found that is not wanted, or not announced.
    let some = seed.find(&[3..5, 7..8].map(StoreBlock::range), announced);
    let blocks: u32 = some.iter().map(|one| one.blocks).sum();
    assert!(
        blocks == 3
            && some
                .iter()
                .all(|one| range::each(one.range()).all(|block| [3, 4, 7].contains(&block.0)))
    );
    assert_eq!(seed.find(&all, &[]), []);
    assert_eq!(seed.find(&[], announced), []);
    // Blocks are found by their content too, wherever they are to go, and others are not.
    let other = vec![0x5a; BLOCK_LEN];
    let content = [stored.values().flatten().copied().collect(), other].concat();
    let first = StoreBlock(1000);
    let mut found = Vec::new();
    for one in seed.find_content(first, &content) {
        let from = (one.first - first) as usize * BLOCK_LEN;
        let its = seed.content(one.slot, one.blocks).unwrap();
        assert!(its == content[from..from + its.len()], "{context}");
        found.extend(range::each(one.range()));
    }
    assert_eq!(
        found,
        range::from(first).take(stored.len()).collect::<Vec<_>>(),
        "{context}"
    );
    assert_eq!(seed.find_content(first, &[]), []);
}

#[test]
fn seeds_conform() {
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path());
    let commit = archive.commit(None).unwrap();
    let announced = archive.announced(commit).unwrap();
    let mut stored = BTreeMap::new();
    for pack in archive.packs(commit, StoreBlock(0)..commit.commit.store_end) {
        for located in archive.frames(&pack.location).unwrap() {
            let content = archive.frame(&located).unwrap();
            stored.extend(range::from(located.frame.first).zip(content.chunks(BLOCK_LEN).map(<[u8]>::to_vec)));
        }
    }
    assert_eq!(stored.len(), 120);
    conforms(&pool_seed(), &announced, &stored, "pool");
    conforms(&MemorySeed::new(), &announced, &stored, "memory");
}

#[test]
fn a_restore_takes_what_there_is_from_whatever_seed() {
    if !can_mount() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let archive = archive(folder.path());
    let fs = Mounted::btrfs();
    let contents: Vec<Vec<BlockContent>> = simulated().contents();
    let monitor = Silent::default();
    let seeds: [(&str, MakeSeed); 2] = [
        ("pool", || Box::new(pool_seed())),
        ("memory", || Box::new(MemorySeed::new())),
    ];
    for (name, make) in seeds {
        let options = RestoreOptions {
            to: fs.mount.join(name),
            ..RestoreOptions::default()
        };
        let mut source = ArchiveSource::open(&archive, None, true, &Budget::default(), &monitor).unwrap();
        let open = |_: Sought<'_>| Ok(Some(make()));
        let restore = Restore::new(&options, Root::look(&options.to).unwrap(), &mut source, &open, &monitor);
        let done = restore.execute().unwrap();
        let restored = done.restored.unwrap();
        assert_eq!((restored.images, restored.written_bytes), (2, 0), "{name}");
        assert_eq!(restored.seeded_bytes, bytes(120), "{name}");
        let images = walkdir::WalkDir::new(&options.to).sort_by_file_name().into_iter();
        let images = images
            .map(std::result::Result::unwrap)
            .filter(|entry| entry.file_type().is_file());
        let images: Vec<Vec<u8>> = images.map(|entry| std::fs::read(entry.path()).unwrap()).collect();
        let expected: Vec<Vec<u8>> = contents
            .iter()
            .map(|image| image.iter().flat_map(|content| block_of(*content)).collect())
            .collect();
        assert!(images == expected, "{name}");
    }
}
