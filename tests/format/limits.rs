// Goal: writers keep the limits of readers, and say success of nothing that no reader takes.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use vmfold::archive::announced::AnnouncedBlocks;
use vmfold::archive::commit::Commit;
use vmfold::archive::limits::{FRAMES_MAX, LABEL_BYTES_MAX, PACK_BLOCKS_MAX, RUNS_MAX, TEXT_BYTES_MAX};
use vmfold::archive::manifest::{ArchivedImage, PlanContents, PlanPart};
use vmfold::archive::pack;
use vmfold::archive::reader::Archive;
use vmfold::archive::record::RecordKind;
use vmfold::block::{BLOCK_BYTES, BLOCK_LEN};
use vmfold::content::{Content as Holds, Metadata, Run};
use vmfold::error::Error;
use vmfold::fingerprint::FingerprintFunction;
use vmfold::fs::{Filesystem, Plain, Purpose};
use vmfold::monitor::Silent;
use vmfold::numbers::StoreBlock;
use vmfold::ops::OpenPool;
use vmfold::ops::export::{ExportOptions, Revisions, Sealing, export_on, export_to, export_within};
use vmfold::plan::export::too_fragmented;
use vmfold::pool::{self, Skip};
use vmfold::report::Exported;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;
use vmfold::testing::simulated::{INCOMPRESSIBLE, PLAIN, block_of};

use crate::common::{Mounted, can_mount};
use crate::scene::{Scene, WAYS, Way, check_commit, is_intact, records, restore, scratch, verify};
use crate::writing::{Writing, image, written};

proptest! {
    /// As few images as possible are left out: those with the most runs.
    #[test]
    fn the_most_fragmented_images_are_left_out(runs in prop::collection::vec(0usize..1000, 0..20), most in 0usize..4000) {
        let left_out = too_fragmented(&runs, most);
        let kept = |place: &usize| !left_out.contains(place);
        let total: usize = (0..runs.len()).filter(kept).map(|place| runs[place]).sum();
        prop_assert!(total <= most);
        let fewest = left_out.iter().map(|place| runs[*place]).min().unwrap_or(0);
        prop_assert!(left_out.is_empty() || total + fewest > most, "one more would fit");
        prop_assert!((0..runs.len()).filter(kept).all(|place| left_out.is_empty() || runs[place] <= fewest));
    }
}

/// Bytes that change the checksum of no block: checksums are linear, and short enough for two of many to be alike.
fn invisible() -> [u8; 8] {
    let mut seen = HashMap::new();
    let found = (1u64..).find_map(|n| {
        let number = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut block = [0; BLOCK_LEN];
        block[..8].copy_from_slice(&number.to_le_bytes());
        let other = seen.insert(FingerprintFunction::Crc32c.of(&block), number)?;
        Some(other ^ number)
    });
    found.unwrap().to_le_bytes()
}

/// Exports the images of a folder with at most so many runs.
fn export_folder(folder: &Path, runs_max: usize, store: &Arc<MemoryStore>) -> Result<Exported, Error> {
    let found = pool::discover(&[folder.to_owned()], &[]).unwrap();
    let (fs, in_use) = Plain::open(&found.images, &found.named, Purpose::Read).unwrap();
    assert_eq!(in_use, []);
    assert_eq!(fs.function(), FingerprintFunction::Crc32c);
    let options = Scene::empty().options();
    export_within(
        runs_max,
        OpenPool::new(&fs, None),
        &options,
        Arc::clone(store) as _,
        &Silent::default(),
    )
}

#[test]
fn an_image_in_too_many_pieces_is_left_out_by_name() {
    const BLOCKS: u64 = 300;
    let folder = scratch();
    let plain: Vec<u8> = (0..BLOCKS).flat_map(|n| block_of(INCOMPRESSIBLE + n)).collect();
    std::fs::write(folder.path().join("a.img"), &plain).unwrap();
    // In pieces only once every second block turns out to be another one than its checksum says.
    let (mut forged, invisible) = (plain.clone(), invisible());
    for block in forged.chunks_exact_mut(BLOCK_LEN).step_by(2) {
        block.iter_mut().zip(invisible).for_each(|(byte, bits)| *byte ^= bits);
    }
    std::fs::write(folder.path().join("b.img"), &forged).unwrap();
    // In pieces as it lies there.
    let sparse = std::fs::File::create(folder.path().join("c.img")).unwrap();
    sparse.set_len(BLOCKS * BLOCK_BYTES).unwrap();
    for block in (0..BLOCKS).step_by(2) {
        sparse
            .write_all_at(&block_of(INCOMPRESSIBLE), block * BLOCK_BYTES)
            .unwrap();
    }
    drop(sparse);
    let store = Arc::new(MemoryStore::default());
    let made = export_folder(folder.path(), 100, &store).unwrap();
    assert_eq!(made.corrected_bytes, BLOCKS / 2 * BLOCK_BYTES);
    let skipped: Vec<_> = made
        .skipped
        .iter()
        .map(|skipped| skipped.path.file_name().unwrap())
        .collect();
    assert_eq!(skipped, ["b.img", "c.img"]);
    assert!(made.skipped.iter().all(|skipped| skipped.reason == Skip::TooFragmented));
    for way in WAYS {
        let restored = restore(&store.to_vec(), way, None, false);
        assert!(
            restored.is_whole() && restored.content == [("a.img".into(), plain.clone())].into(),
            "{way:?}"
        );
    }
    assert!(is_intact(&verify(&store.to_vec()).unwrap()));
    // With more runs, all of them are there; where nothing fits, nothing is committed.
    let store = Arc::new(MemoryStore::default());
    export_folder(folder.path(), RUNS_MAX, &store).unwrap();
    let restored = restore(&store.to_vec(), Way::Pipe, None, false);
    assert!(restored.is_whole() && restored.content[Path::new("b.img")] == forged);
    let store = Arc::new(MemoryStore::default());
    export_folder(folder.path(), 0, &store).unwrap_err();
    assert!(store.to_vec().is_empty());
}

#[test]
fn the_writer_refuses_what_a_reader_would_refuse() {
    let mut writing = Writing::new(&Budget::new(16 << 20, std::env::temp_dir()));
    // Holes and zeros in turn take a byte each.
    let runs: Vec<Run> = [Holds::Hole, Holds::Zeros]
        .map(|content| Run { blocks: 1, content })
        .repeat(1 << 19);
    let (mut number, mut total) = (0, 0);
    let refused = loop {
        let mut contents = PlanContents::default();
        contents.image(&image(number, u32::try_from(runs.len()).unwrap()));
        contents.runs(number, 0, &runs);
        let parts = contents.finish();
        let done: std::io::Result<()> = parts
            .iter()
            .try_for_each(|part| writing.writer.put_images(PlanPart::Final, false, part));
        if let Err(error) = done {
            break error;
        }
        total += runs.len();
        number += 1;
    };
    assert!(refused.to_string().contains("more runs than allowed"), "{refused}");
    assert_eq!(total, RUNS_MAX);
}

#[test]
fn the_writer_refuses_names_and_attributes_beyond_their_limit() {
    let mut writing = Writing::new(&Budget::default());
    let value = vec![7; 60 << 10];
    let metadata = Metadata {
        xattrs: (0..16)
            .map(|n| (format!("user.{n:02}").into_bytes(), value.clone()))
            .collect(),
        ..Metadata::default()
    };
    let mut bytes = 0;
    let refused = (0..).find_map(|number| {
        let mut contents = PlanContents::default();
        contents.image(&ArchivedImage {
            metadata: metadata.clone(),
            ..image(number, 0)
        });
        bytes += 16 * value.len();
        let parts = contents.finish();
        parts
            .iter()
            .find_map(|part| writing.writer.put_images(PlanPart::Final, false, part).err())
    });
    assert!(refused.unwrap().to_string().contains("names and attributes"));
    assert!((TEXT_BYTES_MAX..TEXT_BYTES_MAX + (2 << 20)).contains(&bytes), "{bytes}");
}

/// An archive with images that a reader would refuse, or a commit that it could not read, gets no COMMIT.
#[test]
fn nothing_is_committed_that_contradicts_itself() {
    let run = |first| vec![stored(first)];
    let named = |number, name: &str| ArchivedImage {
        names: vec![PathBuf::from(name)],
        ..image(number, 1)
    };
    let good = [(named(0, "a.img"), run(0)), (named(1, "b.img"), run(1))];
    let commit = |label: usize| Commit {
        label: "x".repeat(label),
        store_end: StoreBlock(2),
        ..Commit::default()
    };
    let finish = |images: &[(ArchivedImage, Vec<Run>)], listed: usize, commit: Commit| {
        let mut writing = Writing::new(&Budget::default());
        let hashes = writing.put_blocks(&[1, 2]);
        writing.put_images(PlanPart::Final, images);
        let store = Arc::clone(&writing.store);
        let done = writing.finish(commit, &images[..listed], &hashes);
        let is_committed = records(&store.to_vec())
            .iter()
            .any(|record| record.header.kind == RecordKind::Commit);
        assert_eq!(done.is_ok(), is_committed);
        done
    };
    let bytes = finish(&good, 2, commit(LABEL_BYTES_MAX)).unwrap();
    assert!(is_intact(&verify(&bytes).unwrap()));
    finish(&good, 2, commit(LABEL_BYTES_MAX + 1)).unwrap_err();
    let first = good[0].clone();
    for second in [
        (named(1, "a.img"), run(1)),
        (named(1, "a.img/b.img"), run(1)),
        (named(1, "b.img"), run(2)),
    ] {
        finish(&[first.clone(), second], 2, commit(0)).unwrap_err();
    }
    let beyond = Commit {
        store_end: StoreBlock(1),
        ..commit(0)
    };
    finish(&good, 2, beyond).unwrap_err();
}

#[test]
fn very_many_equal_revisions_are_exported_and_read() {
    const REVISIONS: usize = 3000;
    let scene = Scene::empty();
    // Each is 64 blocks, and all of them together are two in the archive.
    let first = scene.fs.add_image(true, 64);
    let extent = scene.fs.allocate(PLAIN, (0..64).map(|n| 5 + n % 2).collect());
    scene.fs.map(first, 0, extent, 0, 64, false);
    for _ in 1..REVISIONS {
        scene.fs.reflink(first);
    }
    let bytes = scene.export(&[]);
    let verified = verify(&bytes).unwrap();
    assert!(
        is_intact(&verified) && verified.images == REVISIONS as u64,
        "{verified:?}"
    );
    check_commit(&bytes, "1", &scene.content(), "equal revisions");
}

#[test]
fn a_label_that_is_too_long_is_refused_before_anything_is_read() {
    let scene = Scene::new();
    let options = |length: usize| ExportOptions {
        sealing: Sealing::default(),
        label: "x".repeat(length),
        parity: None,
        scope: vmfold::ops::Scope {
            paths: vec!["/nowhere".into()],
            ..scene.options().scope
        },
        revisions: Revisions::All,
        ..scene.options()
    };
    let store = Arc::new(MemoryStore::default());
    let open = || -> Result<Arc<dyn vmfold::store::Store>, Error> { panic!("the archive is opened") };
    let refused = export_to(&options(LABEL_BYTES_MAX + 1), open, &Silent::default());
    assert!(
        matches!(&refused, Err(Error::Usage(problem)) if problem.contains("label")),
        "{refused:?}"
    );
    let refused = export_to(&options(LABEL_BYTES_MAX), open, &Silent::default());
    assert!(matches!(refused, Err(Error::NoSuchPath { .. })), "{refused:?}");
    let made = |length| {
        export_on(
            scene.pool(false),
            &options(length),
            Arc::clone(&store) as _,
            &Silent::default(),
        )
    };
    made(LABEL_BYTES_MAX + 1).unwrap_err();
    assert!(store.to_vec().is_empty());
    made(LABEL_BYTES_MAX).unwrap();
    check_commit(
        &store.to_vec(),
        &"x".repeat(LABEL_BYTES_MAX),
        &scene.content(),
        "the longest label",
    );
}

/// The tables of all PACKs of an archive.
fn packs(bytes: &[u8]) -> Vec<pack::PackTable> {
    let packs = records(bytes)
        .into_iter()
        .filter(|record| record.header.kind == RecordKind::Pack);
    packs
        .map(|pack| pack::decode_table(&pack.body, pack.body.len() as u64, None).unwrap())
        .collect()
}

/// Data that takes next to nothing fills a PACK by its blocks and frames, not by its bytes.
#[test]
fn packs_of_compressible_data_keep_their_limits() {
    const BLOCKS: u32 = 280_000;
    let scene = Scene::empty();
    scene.add_image((1..=BLOCKS.into()).collect());
    let bytes = scene.export(&[]);
    let tables = packs(&bytes);
    assert!(tables.len() > 1);
    for table in &tables {
        assert!(
            table.frames.len() <= FRAMES_MAX && table.blocks <= PACK_BLOCKS_MAX,
            "{}",
            table.blocks
        );
    }
    assert_eq!(tables.iter().map(|table| table.blocks).sum::<u32>(), BLOCKS);
    assert!(is_intact(&verify(&bytes).unwrap()));
}

/// A block of the store.
fn stored(first: u32) -> Run {
    Run {
        blocks: 1,
        content: Holds::Stored(StoreBlock(first)),
    }
}

/// A commit with so many records that what it lists takes several LISTs.
#[test]
fn a_commit_may_list_more_than_one_record_holds() {
    const RECORDS: usize = 60_000;
    let images = [(image(0, 1), vec![stored(0)])];
    let bytes = written(&images, &[1], |writer| {
        for number in 0..u32::try_from(RECORDS).unwrap() {
            let announced = AnnouncedBlocks {
                first: StoreBlock(0),
                function: FingerprintFunction::Crc32c,
                chunks: vec![1],
                fingerprints: vec![number],
            };
            writer.put_announced(&announced).unwrap();
        }
    });
    let all = records(&bytes);
    let lists = all.iter().filter(|record| record.header.kind == RecordKind::List);
    assert!(lists.count() > 4);
    let archive = Archive::open(Arc::new(MemoryStore::of(bytes.clone()))).unwrap();
    assert!(archive.commits()[0].listed.records.len() > RECORDS);
    for way in WAYS {
        let restored = restore(&bytes, way, None, false);
        let is_right = restored.is_whole() && restored.content[images[0].0.path()] == block_of(1);
        assert!(is_right, "{way:?}: {:?}", restored.done);
    }
}

#[test]
fn an_image_may_have_more_than_a_thousand_names_and_attributes() {
    const COUNT: usize = 1500;
    let one = ArchivedImage {
        names: (0..COUNT).map(|n| PathBuf::from(format!("links/{n:04}.img"))).collect(),
        metadata: Metadata {
            xattrs: (0..COUNT)
                .map(|n| (format!("user.{n:04}").into_bytes(), vec![7; n % 40]))
                .collect(),
            mode: 0o600,
            ..Metadata::default()
        },
        ..image(0, 1)
    };
    let bytes = written(&[(one.clone(), vec![stored(0)])], &[1], |_| ());
    assert!(is_intact(&verify(&bytes).unwrap()));
    let archive = Archive::open(Arc::new(MemoryStore::of(bytes.clone()))).unwrap();
    let (manifest, damage) = archive.manifest(&archive.commits()[0], &Budget::default()).unwrap();
    assert!(damage.is_empty() && manifest.images[0].image == one);
    for way in WAYS {
        let restored = restore(&bytes, way, None, false);
        assert!(
            restored.is_whole() && restored.content.len() == COUNT,
            "{way:?}: {:?}",
            restored.done
        );
    }
}

/// The same from a real filesystem, and back to it.
#[test]
fn a_file_may_have_more_than_a_thousand_links_and_attributes() {
    use std::os::unix::fs::MetadataExt;
    const COUNT: usize = 1500;
    if !can_mount() {
        return;
    }
    let fs = Mounted::btrfs();
    let first = fs.pool().join("0000.img");
    std::fs::write(&first, block_of(INCOMPRESSIBLE)).unwrap();
    for n in 1..COUNT {
        std::fs::hard_link(&first, fs.pool().join(format!("{n:04}.img"))).unwrap();
    }
    for n in 0..COUNT {
        rustix::fs::setxattr(&first, format!("user.{n:04}"), b"value", rustix::fs::XattrFlags::CREATE).unwrap();
    }
    let archive = fs.mount.join("a.vmfold");
    let run = |arguments: &str| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vmfold"));
        let output = command.args(arguments.split(' ')).output().unwrap();
        assert!(
            output.status.success(),
            "{arguments}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    let index = fs.index();
    run(&format!(
        "export {} {} --index {}",
        archive.display(),
        fs.pool().display(),
        index.display()
    ));
    run(&format!("verify {}", archive.display()));
    let to = fs.mount.join("to");
    run(&format!(
        "import {} --to {} --index {}",
        archive.display(),
        to.display(),
        index.display()
    ));
    let restored = to.join("1499.img");
    assert_eq!(std::fs::metadata(&restored).unwrap().nlink(), COUNT as u64);
    let mut names = vec![0u8; 64 << 10];
    let length = rustix::fs::listxattr(&restored, &mut names[..]).unwrap();
    assert_eq!(
        names[..length]
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
            .count(),
        COUNT
    );
    assert_eq!(std::fs::read(restored).unwrap(), block_of(INCOMPRESSIBLE));
}
