//! Goal: whole verbs run on any filesystem that is open, as they do on paths. Method: reclaim, report, scan and export on the simulated
//! filesystem, which frees extents whole or block by block, with an index and an archive in memory; what they report is compared with
//! what the filesystem holds.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use vmfold::block::BLOCK_BYTES;
use vmfold::error::Error;
use vmfold::exec::compression::CompressionRequest;
use vmfold::fingerprint::FingerprintFunction;
use vmfold::frame::Packer;
use vmfold::index::MemoryIndex;
use vmfold::monitor::Silent;
use vmfold::numbers::ImageId;
use vmfold::ops::export::{ExportOptions, Revisions, Sealing, export_on};
use vmfold::ops::reclaim::{ReclaimOptions, reclaim_on};
use vmfold::ops::report::report_on;
use vmfold::ops::scan::scan_on;
use vmfold::ops::verify::verify_store;
use vmfold::ops::{ArchivePlace, OpenPool, Scope};
use vmfold::plan;
use vmfold::pool::Skip;
use vmfold::report::{Exported, Reclaimed};
use vmfold::store::{MemoryStore, Store};
use vmfold::testing::faulty_store::{FaultyStore, StoreFault};
use vmfold::testing::simulated::{BlockContent, Faults, INCOMPRESSIBLE, PLAIN, Simulated};

/// A simulated filesystem with what a user has beside it.
struct Scene {
    fs: Simulated,
    index: MemoryIndex,
    /// For lists that take more memory than there is.
    folder: tempfile::TempDir,
}

impl Scene {
    /// Some images that have much in common, in extents of their own, and a revision of one of them.
    fn new(frees_blocks: bool) -> Self {
        let mut fs = Simulated::default();
        fs.frees_blocks = frees_blocks;
        let common: Vec<BlockContent> = (1..200).map(|n| INCOMPRESSIBLE + n).collect();
        for number in 0..4u64 {
            let own = (0..40).map(|n| INCOMPRESSIBLE + 10_000 * (number + 1) + n);
            let content: Vec<BlockContent> = common.iter().copied().chain(own).chain([0; 16]).collect();
            let image = fs.add_image(true, 300);
            for (first, part) in (0u32..).step_by(64).zip(content.chunks(64)) {
                let extent = fs.allocate(PLAIN, part.to_vec());
                fs.map(image, first, extent, 0, u32::try_from(part.len()).unwrap(), false);
            }
        }
        fs.reflink(ImageId(2));
        Self {
            fs,
            index: MemoryIndex::default(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    fn pool(&self) -> OpenPool<'_> {
        OpenPool::new(&self.fs, Some(self.index.open(FingerprintFunction::Crc32c)))
    }

    fn scope(&self) -> Scope {
        Scope {
            paths: Vec::new(),
            exclude: Vec::new(),
            index: self.folder.path().to_owned(),
            memory_bytes: None,
        }
    }

    fn reclaim_as(&self, dry_run: bool, compress: Option<CompressionRequest>) -> Result<Reclaimed, Error> {
        let options = ReclaimOptions {
            scope: self.scope(),
            groups: Vec::new(),
            plan: plan::PlanOptions::default(),
            compress,
            dry_run,
            reserve_bytes: 0,
            time: None,
        };
        reclaim_on(self.pool(), &options, &Silent::default())
    }

    fn reclaim(&self, dry_run: bool) -> Reclaimed {
        let done = self.reclaim_as(dry_run, None).unwrap();
        assert!(done.failed.is_none() && !done.interrupted, "{done:?}");
        done
    }

    fn export(&self, store: Arc<dyn Store>) -> Result<Exported, Error> {
        let options = ExportOptions {
            sealing: Sealing::default(),
            scope: self.scope(),
            only: Vec::new(),
            revisions: Revisions::All,
            archive: ArchivePlace::Pipe,
            level: 3,
            trusts_archive: false,
            label: String::new(),
            parity: None,
        };
        export_on(self.pool(), &options, store, &Silent::default())
    }

    /// Different blocks of all images that are not zeros.
    fn distinct_bytes(&self) -> u64 {
        let contents = self.fs.contents();
        let distinct: BTreeSet<BlockContent> = contents.into_iter().flatten().filter(|content| *content != 0).collect();
        distinct.len() as u64 * BLOCK_BYTES
    }
}

#[test]
fn reclaim_frees_what_a_dry_run_says() {
    for frees_blocks in [false, true] {
        let scene = Scene::new(frees_blocks);
        let (contents, before) = (scene.fs.contents(), scene.fs.allocated_bytes());
        let dry = scene.reclaim(true);
        assert!(dry.done.is_none() && dry.dry_run);
        assert_eq!(scene.fs.allocated_bytes(), before, "a dry run changes nothing");
        assert_eq!((dry.images, dry.pool.physical_bytes), (5, before));
        assert!(dry.planned.freed_bytes > 0);
        let wet = scene.reclaim(false);
        assert_eq!(wet.planned, dry.planned);
        let done = wet.done.unwrap();
        assert_eq!(done.freed_bytes, wet.planned.freed_bytes);
        let after = scene.fs.allocated_bytes();
        assert_eq!(done.freed_bytes, before.cast_signed() - after.cast_signed());
        assert_eq!(done.after.physical_bytes, after);
        assert_eq!(
            after,
            scene.distinct_bytes(),
            "zeros became holes, and nothing is there twice"
        );
        assert_eq!(scene.fs.contents(), contents);
        assert!(wet.skipped.is_empty() && wet.held_by.is_empty());
        let again = scene.reclaim(false);
        assert_eq!((again.planned.extents, again.fingerprinted.read), (0, 0));
        assert_eq!(again.done.unwrap().freed_bytes, 0);
    }
}

#[test]
fn reclaim_names_what_it_had_to_leave_alone() {
    let mut scene = Scene::new(false);
    // The beginnings of two images, which are equal.
    for extent in [0, 4] {
        scene.fs.hold_from_outside(extent);
    }
    scene.fs.faults.opened = Some((0, ImageId(1)));
    let contents = scene.fs.contents();
    let done = scene.reclaim(false);
    assert_eq!(scene.fs.contents(), contents);
    assert!(done.held_by.contains_key("outside"), "{:?}", done.held_by);
    let skipped: Vec<(&Path, Skip)> = done
        .skipped
        .iter()
        .map(|one| (one.path.as_path(), one.reason))
        .collect();
    assert_eq!(skipped, [(Path::new("image-1.img"), Skip::OpenedMeanwhile)]);
    // Where donors cannot be written, what was done until then is told, with the error.
    let mut full = Scene::new(false);
    full.fs.faults.space_bytes = Some(0);
    let failed = full.reclaim_as(false, None).unwrap();
    assert!(matches!(failed.failed, Some(Error::NoSpace { .. })), "{failed:?}");
    assert!(failed.done.is_some());
    full.fs.faults = Faults::default();
    assert_eq!(full.fs.contents(), contents);
    full.reclaim(false);
    assert_eq!(full.fs.allocated_bytes(), full.distinct_bytes());
}

#[test]
fn what_is_compressed_is_read_only_once() {
    let request = || {
        Some(CompressionRequest::Zstd {
            packer: Packer::default(),
            recompress: false,
        })
    };
    let refused = Scene::new(true).reclaim_as(false, request());
    assert!(matches!(refused, Err(Error::NoCompression { .. })), "{refused:?}");
    let scene = Scene::new(false);
    let image = scene.fs.add_image(true, 64);
    let extent = scene.fs.allocate(PLAIN, (1..65).collect());
    scene.fs.map(image, 0, extent, 0, 64, false);
    let contents = scene.fs.contents();
    let done = scene.reclaim_as(false, request()).unwrap();
    assert!(done.planned.uncompressed_bytes > done.planned.compressed_bytes);
    let after = done.done.unwrap().after;
    assert_eq!(after.physical_bytes, scene.fs.allocated_bytes());
    assert!(after.uncompressed_bytes >= 64 * BLOCK_BYTES);
    assert_eq!(scene.fs.contents(), contents);
    // Checksums are those of compressed bytes: the index knows what this run wrote.
    let again = scene.reclaim(false);
    assert_eq!(again.fingerprinted.from_index, after.uncompressed_bytes);
    assert_eq!((again.fingerprinted.read, again.planned.extents), (0, 0));
}

#[test]
fn scan_fills_the_index_and_report_reads_nothing() {
    for frees_blocks in [false, true] {
        let scene = Scene::new(frees_blocks);
        let scan = || scan_on(scene.pool(), &scene.scope(), &Silent::default()).unwrap();
        let (first, second) = (scan(), scan());
        let all = first.pool.physical_bytes;
        let of = |done: &vmfold::report::Scanned| {
            let found = done.fingerprinted;
            (found.from_checksums, found.from_index, found.read)
        };
        // Without checksums everything is read once, and known from then on.
        assert_eq!(of(&first), if frees_blocks { (0, 0, all) } else { (all, 0, 0) });
        assert_eq!(of(&second), if frees_blocks { (0, all, 0) } else { (all, 0, 0) });
        let report = report_on(OpenPool::new(&scene.fs, None)).unwrap();
        assert_eq!(report.pool, first.pool);
        assert_eq!(report.pool.physical_bytes, scene.fs.allocated_bytes());
        let exclusive: Vec<u64> = report.images.iter().map(|image| image.exclusive_bytes).collect();
        let whole = 255 * BLOCK_BYTES;
        assert_eq!(
            exclusive,
            [whole, whole, 0, whole, 0],
            "a revision shares all with its image"
        );
        assert_eq!(report.images[2].shared_bytes, whole);
        assert_eq!(report.unreachable_bytes, 0);
    }
}

#[test]
fn export_writes_each_block_once_and_knows_it_the_next_time() {
    for frees_blocks in [false, true] {
        let scene = Scene::new(frees_blocks);
        let (contents, store) = (scene.fs.contents(), Arc::new(MemoryStore::default()));
        let verify = || {
            let verified = verify_store(store.clone(), &Silent::default()).unwrap();
            assert!(verified.damage.is_empty() && verified.lost.is_empty(), "{verified:?}");
            (verified.commits, verified.images)
        };
        let first = scene.export(store.clone()).unwrap();
        assert_eq!((first.images, first.new_bytes), (5, scene.distinct_bytes()));
        assert_eq!(verify(), (1, 5));
        let second = scene.export(store.clone()).unwrap();
        assert_eq!(second.new_bytes, 0);
        assert_eq!(
            second.read_bytes == 0,
            !frees_blocks,
            "checksums tell what was read before"
        );
        assert_eq!(verify(), (2, 10));
        // Images are what they were, wherever their blocks lie now.
        scene.reclaim(false);
        let third = scene.export(store.clone()).unwrap();
        assert_eq!((third.new_bytes, third.data_bytes), (0, first.data_bytes));
        assert_eq!(verify(), (3, 15));
        assert_eq!(scene.fs.contents(), contents);
    }
}

#[test]
fn an_export_that_fails_leaves_the_archive_as_it_was() {
    let scene = Scene::new(false);
    let whole = MemoryStore::default();
    let calls = Arc::new(FaultyStore::new(whole, u64::MAX, StoreFault::Dies));
    scene.export(calls.clone()).unwrap();
    let count = calls.calls().len() as u64;
    for at in 0..count {
        let store = Arc::new(FaultyStore::new(
            MemoryStore::default(),
            at,
            StoreFault::Fails(libc::ENOSPC),
        ));
        if scene.export(store.clone()).is_err() {
            assert!(store.inner().to_vec().is_empty(), "the call of number {at} failed");
        }
        scene.export(store.clone()).unwrap();
        let verified = verify_store(Arc::new(MemoryStore::of(store.inner().to_vec())), &Silent::default());
        assert!(verified.unwrap().damage.is_empty());
    }
}
