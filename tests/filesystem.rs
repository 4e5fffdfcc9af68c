//! Goal: every filesystem does what [`Filesystem`] says, so that a verb need not know which it is. Method: one conformance suite, on a
//! real btrfs and XFS on loop devices, on the filesystem of the temporary folder as a plain one, and on the simulated one.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use common::{Mounted, can_mount};
use rustix::io::Errno;
use vmfold::block::{BLOCK_BYTES, BLOCK_LEN, SlotSet};
use vmfold::facts::{Class, Compression, Facts};
use vmfold::frame::Packer;
use vmfold::fs::{Filesystem, Plain, Purpose, ShareOutcome, SourceFile, freed_bytes, images, open, physical_bytes};
use vmfold::monitor::Silent;
use vmfold::numbers::{DonorId, ExtentId, ImageId};
use vmfold::pool;
use vmfold::range;
use vmfold::spill::Budget;
use vmfold::testing::simulated::{BlockContent, INCOMPRESSIBLE, PLAIN, Simulated, block_of};

const BLOCKS: usize = 64;
const BYTES: u64 = BLOCKS as u64 * BLOCK_BYTES;
/// Images by their numbers.
const FIRST: ImageId = ImageId(0);
const SAME: ImageId = ImageId(1);
const OTHER: ImageId = ImageId(2);
const NEARLY: ImageId = ImageId(3);
const ZEROS: ImageId = ImageId(4);
const REPEATS: ImageId = ImageId(5);

/// What the images hold; none for holes.
fn contents() -> Vec<Vec<Option<BlockContent>>> {
    let data = |from: u64| (0..BLOCKS as u64).map(move |n| Some(INCOMPRESSIBLE + from + n));
    let first: Vec<_> = data(0).chain([None; 16]).chain(data(100).take(16)).collect();
    let mut nearly: Vec<_> = data(0).collect();
    nearly[10] = Some(INCOMPRESSIBLE + 5000);
    vec![
        first.clone(),
        first,
        data(1000).collect(),
        nearly,
        [vec![Some(0); 16], data(2000).collect()].concat(),
        vec![Some(7); 32],
    ]
}

/// Ranges of an image that hold data: the first block, and what they hold.
fn data_of(image: &[Option<BlockContent>]) -> Vec<(usize, Vec<BlockContent>)> {
    let mut ranges: Vec<(usize, Vec<BlockContent>)> = Vec::new();
    for (at, content) in image.iter().enumerate() {
        let Some(content) = content else { continue };
        match ranges.last_mut() {
            Some((first, last)) if *first + last.len() == at => last.push(*content),
            _ => ranges.push((at, vec![*content])),
        }
    }
    ranges
}

fn bytes_of(image: &[Option<BlockContent>]) -> Vec<u8> {
    image
        .iter()
        .flat_map(|content| block_of(content.unwrap_or(0)))
        .collect()
}

/// Writes the images to a folder, by names in the order of their numbers.
fn write_to(folder: &Path) {
    for (number, image) in contents().iter().enumerate() {
        let file = File::create_new(folder.join(format!("image-{number}.img"))).unwrap();
        file.set_len(image.len() as u64 * BLOCK_BYTES).unwrap();
        for (first, content) in data_of(image) {
            let bytes: Vec<u8> = content.into_iter().flat_map(block_of).collect();
            file.write_all_at(&bytes, first as u64 * BLOCK_BYTES).unwrap();
            file.sync_all().unwrap();
        }
    }
}

fn simulated(frees_blocks: bool) -> Simulated {
    let mut fs = Simulated::default();
    fs.frees_blocks = frees_blocks;
    for image in contents() {
        let number = fs.add_image(true, image.len());
        for (first, content) in data_of(&image) {
            let blocks = content.len() as u32;
            let extent = fs.allocate(PLAIN, content);
            fs.map(number, first as u32, extent, 0, blocks, false);
        }
    }
    fs
}

fn read(fs: &dyn Filesystem, image: ImageId) -> Vec<u8> {
    let mut content = vec![0xee; fs.image(image).size as usize];
    fs.read(SourceFile::Image(image), 0, &mut content).unwrap();
    content
}

fn all_is_as_it_was(fs: &dyn Filesystem) {
    for (number, image) in ImageId::numbered(contents()) {
        assert!(read(fs, number) == bytes_of(&image), "image {number}");
        assert!(fs.may_touch(number));
        assert!(fs.is_unchanged(number));
    }
}

fn map(fs: &dyn Filesystem) -> Facts {
    fs.commit().unwrap();
    fs.map(&Budget::default()).unwrap().facts
}

fn images_are_known(fs: &dyn Filesystem) {
    let contents = contents();
    assert_eq!(fs.image_count() as usize, contents.len());
    let paths: BTreeSet<&Path> = images(fs).map(|image| image.path.as_path()).collect();
    assert_eq!(paths.len(), contents.len());
    for (number, (image, content)) in ImageId::numbered(images(fs).zip(&contents)) {
        assert_eq!(image.size, content.len() as u64 * BLOCK_BYTES);
        assert_eq!(image.path, fs.path(number));
        assert!(image.checksummed && !image.stays_uncompressed);
        assert_eq!(fs.attributes(number).unwrap().mode & 0o600, 0o600);
    }
    assert!(!fs.has_read_only_snapshots().unwrap());
    assert!(fs.free_bytes().unwrap() > 0);
}

fn what_was_written_is_read(fs: &dyn Filesystem) {
    all_is_as_it_was(fs);
    let image = bytes_of(&contents()[0]);
    let mut blocks = vec![0xee; 3 * BLOCK_LEN];
    for at in [0, 5, BLOCKS - 1, BLOCKS + 3] {
        let offset = (at * BLOCK_LEN) as u64;
        fs.read_ahead(SourceFile::Image(FIRST), offset, 3 * BLOCK_BYTES);
        fs.read(SourceFile::Image(FIRST), offset, &mut blocks).unwrap();
        assert!(blocks == image[at * BLOCK_LEN..][..3 * BLOCK_LEN], "block {at}");
        fs.drop_behind(SourceFile::Image(FIRST), offset, 3 * BLOCK_BYTES);
    }
    // Beyond the end there are zeros.
    fs.read(SourceFile::Image(FIRST), image.len() as u64 - BLOCK_BYTES, &mut blocks)
        .unwrap();
    assert!(blocks[..BLOCK_LEN] == image[image.len() - BLOCK_LEN..]);
    assert!(blocks[BLOCK_LEN..] == [0; 2 * BLOCK_LEN]);
}

/// The blocks of each image that lie in extents.
fn mapped_blocks(facts: &Facts, image: ImageId) -> BTreeSet<u32> {
    let mappings = facts.mappings_of(image);
    mappings
        .iter()
        .flat_map(|mapping| mapping.file_block..mapping.file_block + mapping.blocks)
        .collect()
}

fn the_map_covers_the_data(fs: &dyn Filesystem) {
    let mut facts = map(fs);
    let mut data_blocks = 0;
    for (number, image) in ImageId::numbered(contents()) {
        let data = (0u32..).zip(&image).filter(|(_, content)| content.is_some());
        let data: BTreeSet<u32> = data.map(|(block, _)| block).collect();
        data_blocks += data.len() as u64;
        assert_eq!(mapped_blocks(&facts, number), data, "image {number}");
    }
    assert_eq!(physical_bytes(&facts), data_blocks * BLOCK_BYTES);
    assert_eq!(facts.frees_blocks, fs.frees_blocks());
    assert!(fs.sees_all_holders());
    assert!(fs.names_of_holders(&facts).unwrap().is_empty());
    assert_eq!(fs.checksum_digests(&facts).unwrap().len(), facts.extents.len());
    assert_eq!(facts.zero_fingerprint, fs.function().of_zeros());
    if fs.has_usable_checksums() {
        let mut known = SlotSet::new(facts.slots() as usize);
        facts.fingerprints = vec![0; facts.slots() as usize].into();
        fs.fingerprints_from_checksums(&mut facts, &mut known).unwrap();
        for slot in range::each(facts.all_slots()) {
            let place = facts.place_of(slot..slot + 1).unwrap();
            let mut block = vec![0; BLOCK_LEN];
            let offset = u64::from(place.file_block) * BLOCK_BYTES;
            fs.read(SourceFile::Image(place.image), offset, &mut block).unwrap();
            assert!(known.contains(slot));
            assert_eq!(facts.fingerprints.get(slot), fs.function().of(&block));
        }
    }
    if !fs.frees_blocks() {
        for extent in &facts.extents {
            assert!(fs.is_allocated(extent.address, extent.generation).unwrap());
        }
        let addresses = facts.extents.iter().map(|extent| extent.address).collect();
        let held = fs.ranges_in(FIRST, &addresses).unwrap();
        let held: BTreeSet<u32> = held
            .iter()
            .map(|reference| reference.range)
            .flat_map(|range| range.file_block..range.file_block + range.blocks)
            .collect();
        assert_eq!(held, mapped_blocks(&facts, FIRST));
    }
}

fn what_differs_stays(fs: &dyn Filesystem) {
    let before = physical_bytes(&map(fs));
    for image in [OTHER, NEARLY] {
        let shared = fs.share(SourceFile::Image(FIRST), 0, image, 0, BYTES);
        assert_eq!(shared, ShareOutcome::Differs, "image {image}");
    }
    let hole = SourceFile::Hole { checksummed: true };
    assert_eq!(fs.share(hole, 0, ZEROS, 0, BYTES), ShareOutcome::Differs);
    assert_eq!(physical_bytes(&map(fs)), before);
    all_is_as_it_was(fs);
}

/// What a share of some ranges with another file frees, as it is counted.
fn freed_by(fs: &dyn Filesystem, source: SourceFile, image: ImageId, ranges: &[(u64, u64)]) -> u64 {
    let before = map(fs);
    let free = fs.free_bytes().unwrap();
    for (offset, length) in ranges {
        let shared = fs.share(source, *offset, image, *offset, *length);
        assert_eq!(shared, ShareOutcome::Shared, "image {image} at {offset}");
    }
    fs.commit().unwrap();
    let (freed, after) = freed_bytes(fs, &before, free).unwrap();
    let counted = physical_bytes(&before).cast_signed() - physical_bytes(&after.facts).cast_signed();
    assert_eq!(freed, counted, "freed bytes and the maps disagree");
    all_is_as_it_was(fs);
    u64::try_from(freed).unwrap()
}

fn what_is_equal_is_shared(fs: &dyn Filesystem) {
    let (whole, tail) = ((0, BYTES), (BYTES + 16 * BLOCK_BYTES, 16 * BLOCK_BYTES));
    let freed = freed_by(fs, SourceFile::Image(FIRST), SAME, &[whole, tail]);
    assert_eq!(freed, BYTES + 16 * BLOCK_BYTES);
    let facts = map(fs);
    for place in 0..facts.extents.len() as u32 {
        let images = |of: ImageId| {
            facts
                .references_to(ExtentId(place))
                .filter(|one| one.image == of)
                .count()
        };
        assert_eq!(images(FIRST), images(SAME));
    }
    // Once more, nothing is left to free.
    assert_eq!(freed_by(fs, SourceFile::Image(FIRST), SAME, &[whole, tail]), 0);
}

fn zeros_become_a_hole(fs: &dyn Filesystem) {
    let freed = freed_by(
        fs,
        SourceFile::Hole { checksummed: true },
        ZEROS,
        &[(0, 16 * BLOCK_BYTES)],
    );
    // An extent that is freed as a whole only stays for its other blocks.
    assert_eq!(freed, if fs.frees_blocks() { 16 * BLOCK_BYTES } else { 0 });
    assert_eq!(mapped_blocks(&map(fs), ZEROS), (16..16 + BLOCKS as u32).collect());
}

fn donors_vanish_but_for_what_is_shared(fs: &dyn Filesystem) {
    let before = physical_bytes(&map(fs));
    let content = bytes_of(&contents()[OTHER.index()]);
    let donors: Vec<DonorId> = (0..3).map(|_| fs.create_donor(PLAIN).unwrap()).collect();
    for donor in &donors[..2] {
        for part in content.chunks(content.len() / 2) {
            fs.append_to_donor(*donor, part, None).unwrap();
        }
        fs.settle_donor(*donor).unwrap();
    }
    fs.append_to_donor(donors[2], &content, None).unwrap();
    fs.discard_donor(donors[2]);
    let mut copy = vec![0; content.len()];
    fs.read(SourceFile::Donor(donors[0]), 0, &mut copy).unwrap();
    assert!(copy == content);
    let extents = |facts: &Facts| -> BTreeSet<u64> {
        let mappings = facts.mappings_of(OTHER);
        let places = mappings.iter().map(|mapping| mapping.extent.index());
        places.map(|place| facts.extents[place].address).collect()
    };
    let held = extents(&map(fs));
    assert_eq!(freed_by(fs, SourceFile::Donor(donors[0]), OTHER, &[(0, BYTES)]), 0);
    fs.close_donors().unwrap();
    let facts = map(fs);
    assert_eq!(physical_bytes(&facts), before);
    assert!(
        held.is_disjoint(&extents(&facts)),
        "it lies where its donor was written"
    );
    all_is_as_it_was(fs);
}

fn frames_are_taken_as_they_are(fs: &dyn Filesystem) {
    if !fs.compresses() || !fs.takes_frames() {
        return;
    }
    let content = bytes_of(&contents()[REPEATS.index()]);
    let packer = Packer::default();
    let frame = packer
        .pack(&mut packer.compressor().unwrap(), &content)
        .unwrap()
        .unwrap();
    let donor = fs
        .create_donor(Class {
            compression: Compression::Zstd,
            ..PLAIN
        })
        .unwrap();
    fs.append_to_donor(donor, &content, Some(&frame)).unwrap();
    fs.settle_donor(donor).unwrap();
    let whole = [(0, content.len() as u64)];
    let freed = freed_by(fs, SourceFile::Donor(donor), REPEATS, &whole);
    let on_disk = (frame.len() as u64).next_multiple_of(BLOCK_BYTES);
    assert_eq!(freed, content.len() as u64 - on_disk);
    fs.close_donors().unwrap();
    let facts = map(fs);
    let compressed = facts
        .extents
        .iter()
        .filter(|one| one.class.compression == Compression::Zstd);
    assert_eq!(compressed.map(|one| one.disk_bytes).collect::<Vec<_>>(), [on_disk]);
}

/// Clones ranges of an image to a new file in a folder on the same filesystem.
fn ranges_are_cloned(fs: &dyn Filesystem, folder: &Path) {
    let image = bytes_of(&contents()[0]);
    let file = tempfile::tempfile_in(folder).unwrap();
    for (from, to, blocks) in [(0, 0, 8), (20, 100, 1), (60, 40, 12)] {
        let at = |block: u64| block * BLOCK_BYTES;
        fs.clone_range(FIRST, at(from), &file, at(to), at(blocks)).unwrap();
        let mut copy = vec![0; at(blocks) as usize];
        file.read_exact_at(&mut copy, at(to)).unwrap();
        assert!(copy == image[at(from) as usize..at(from + blocks) as usize]);
    }
    all_is_as_it_was(fs);
}

/// What every filesystem that shares does; new files can be made in `folder`.
fn conforms(fs: &dyn Filesystem, folder: &Path) {
    let names = || -> BTreeMap<_, _> {
        let entries = std::fs::read_dir(folder).unwrap().map(Result::unwrap);
        entries
            .map(|entry| (entry.file_name(), entry.metadata().unwrap().len()))
            .collect()
    };
    let before = names();
    images_are_known(fs);
    what_was_written_is_read(fs);
    the_map_covers_the_data(fs);
    what_differs_stays(fs);
    what_is_equal_is_shared(fs);
    zeros_become_a_hole(fs);
    donors_vanish_but_for_what_is_shared(fs);
    frames_are_taken_as_they_are(fs);
    ranges_are_cloned(fs, folder);
    assert_eq!(names(), before);
}

/// What one does that shares nothing: the same as far as it only reads, and no harm.
fn conforms_without_sharing(fs: &dyn Filesystem, folder: &Path) {
    images_are_known(fs);
    what_was_written_is_read(fs);
    the_map_covers_the_data(fs);
    let before = map(fs);
    let refused = ShareOutcome::Refused(Errno::OPNOTSUPP);
    for (source, image) in [
        (SourceFile::Image(FIRST), SAME),
        (SourceFile::Image(FIRST), OTHER),
        (SourceFile::Hole { checksummed: true }, ZEROS),
    ] {
        assert_eq!(fs.share(source, 0, image, 0, 16 * BLOCK_BYTES), refused);
    }
    assert!(fs.create_donor(PLAIN).is_err());
    fs.close_donors().unwrap();
    let file = tempfile::tempfile_in(folder).unwrap();
    let cloned = fs.clone_range(FIRST, 0, &file, 0, BLOCK_BYTES);
    assert_eq!(cloned, Err(Errno::OPNOTSUPP));
    assert_eq!(file.metadata().unwrap().len(), 0);
    assert_eq!(freed_bytes(fs, &before, fs.free_bytes().unwrap()).unwrap().0, 0);
    all_is_as_it_was(fs);
}

#[test]
fn simulated_ones_conform() {
    let folder = tempfile::tempdir().unwrap();
    for frees_blocks in [false, true] {
        conforms(&simulated(frees_blocks), folder.path());
    }
}

#[test]
fn btrfs_and_xfs_conform() {
    if !can_mount() {
        return;
    }
    for mounted in [
        Mounted::btrfs(),
        Mounted::new("mkfs.btrfs -q --csum xxhash", "", 512),
        Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512),
    ] {
        write_to(&mounted.pool());
        let found = pool::discover(&[mounted.pool()], &[]).unwrap();
        let (fs, skipped) = open(&found.images, &found.named, Purpose::Change, &Silent::default()).unwrap();
        assert_eq!(skipped, []);
        conforms(&*fs, &mounted.pool());
    }
}

#[test]
fn a_plain_one_conforms() {
    let folder = tempfile::tempdir().unwrap();
    write_to(folder.path());
    for purpose in [Purpose::Look, Purpose::Read] {
        let found = pool::discover(&[folder.path().to_owned()], &[]).unwrap();
        let (fs, skipped) = Plain::open(&found.images, &found.named, purpose).unwrap();
        assert_eq!(skipped, []);
        conforms_without_sharing(&fs, folder.path());
    }
}

#[test]
fn what_cannot_share_is_only_read() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    write_to(folder.path());
    let found = pool::discover(&[folder.path().to_owned()], &[]).unwrap();
    let opened = open(&found.images, &found.named, Purpose::Look, &Silent::default());
    let error = opened.map(|_| ()).unwrap_err();
    assert!(matches!(error, vmfold::error::Error::NoSharing { .. }), "{error:?}");
    let (fs, skipped) = open(&found.images, &found.named, Purpose::Read, &Silent::default()).unwrap();
    assert_eq!(skipped, []);
    conforms_without_sharing(&*fs, folder.path());
}
