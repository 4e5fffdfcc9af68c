//! `diff`: compares two commits of an archive, or a commit and the images of a pool, by the hashes of their blocks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::fs::{OFlags, SeekFrom};

use super::{Scope, common_folder};
use crate::archive::manifest::ImageRuns;
use crate::archive::reader::{Archive, Committed, Damage};
use crate::archive::record::{Hash, hash_of};
use crate::block::{BLOCK_BYTES, BLOCK_LEN, ByteRange, bytes};
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::exec::hashes::{StoredHashes, zero_hash};
use crate::monitor::Monitor;
use crate::pool::{self, FoundImage};
use crate::report::{Change, Diffed, DiffedImage};
use crate::store::FileStore;

/// What a commit of an archive is compared with.
#[derive(Debug, Clone)]
pub enum ComparedWith {
    /// Another commit of the archive. `None` means the last one.
    Commit(Option<String>),
    /// Images on disk.
    Pool(Scope),
}

/// Compares a commit with another one, or with images on disk.
///
/// # Errors
/// [`Error::NoSuchCommit`]; [`Error::Damaged`] if a manifest or a hash that is compared is lost; [`Error::Unreadable`] if an image cannot be
/// read; [`Error::Io`] if the archive cannot be read; [`Error::Interrupted`].
pub fn diff(path: &Path, commit: Option<&str>, with: &ComparedWith, monitor: &dyn Monitor) -> Result<Diffed> {
    let archive = Archive::open(std::sync::Arc::new(FileStore::open(path)?))?;
    let first = archive.commit(commit)?;
    let mut result = Diffed {
        archive: path.to_owned(),
        first: format!("commit {} ({})", first.commit.number, first.id()),
        ..Diffed::default()
    };
    match with {
        ComparedWith::Commit(name) => {
            let second = archive.commit(name.as_deref())?;
            result.second = format!("commit {} ({})", second.commit.number, second.id());
            result.images = diff_commits(&archive, first, second, monitor)?;
        }
        ComparedWith::Pool(scope) => {
            result.second = "the images on disk".into();
            result.images = diff_pool(&archive, first, scope, monitor)?;
        }
    }
    result.differing_bytes = result.images.iter().map(|image| image.differing_bytes).sum();
    Ok(result)
}

/// The images of a commit, by their paths. A damaged manifest is an error, since its images may be incomplete.
fn manifest_of(archive: &Archive, committed: &Committed) -> Result<BTreeMap<PathBuf, ImageRuns>> {
    let (manifest, damage) = archive.manifest(committed, &super::runs_budget(None))?;
    if let Some(Damage { range, problem, .. }) = damage.first() {
        return Err(Error::damaged(
            archive.path(),
            range.start,
            range.length,
            problem.clone(),
        ));
    }
    let by_path = manifest
        .images
        .into_iter()
        .map(|image| (image.image.path().to_owned(), image));
    Ok(by_path.collect())
}

/// Blocks after which a comparison checks whether the user has stopped it.
const CHECK_EVERY_BLOCKS: u32 = 1 << 16;

/// Compares the images of two commits.
fn diff_commits(
    archive: &Archive,
    first: &Committed,
    second: &Committed,
    monitor: &dyn Monitor,
) -> Result<Vec<DiffedImage>> {
    monitor.phase("Comparing", 0);
    let hashes = |committed| StoredHashes::new(Some((archive, committed)), committed.commit.store_end);
    let mut hashes = HashesOfBoth {
        first: hashes(first),
        second: hashes(second),
        has_one_store: first.lane == second.lane,
    };
    let (first, second) = (manifest_of(archive, first)?, manifest_of(archive, second)?);
    let paths: BTreeSet<&PathBuf> = first.keys().chain(second.keys()).collect();
    let mut images = Vec::new();
    for path in paths {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        images.push(match (first.get(path), second.get(path)) {
            (Some(first), Some(second)) => diff_images(archive, first, second, &mut hashes, monitor)?.into_image(path),
            (Some(image), None) => only(path, Change::OnlyInFirst, image.image.size),
            (None, Some(image)) => only(path, Change::OnlyInSecond, image.image.size),
            (None, None) => continue,
        });
    }
    Ok(images)
}

/// The hashes of the blocks of two commits.
struct HashesOfBoth<'a> {
    first: StoredHashes<'a>,
    second: StoredHashes<'a>,
    /// Whether the commits are of one lane, so that a store address is the same block in both.
    has_one_store: bool,
}

/// Compares an image with the image of the same path in another commit.
fn diff_images(
    archive: &Archive,
    first: &ImageRuns,
    second: &ImageRuns,
    hashes: &mut HashesOfBoth<'_>,
    monitor: &dyn Monitor,
) -> Result<DifferingRanges> {
    let mut ranges = DifferingRanges::new(first.image.size, second.image.size);
    let is_stored = |content| matches!(content, Content::Stored(_));
    for (first_block, blocks, (first, second)) in side_by_side(&first.runs, &second.runs) {
        if (first == second && hashes.has_one_store) || (!is_stored(first) && !is_stored(second)) {
            continue;
        }
        for skipped in 0..blocks {
            if skipped % CHECK_EVERY_BLOCKS == 0 && monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let first_hash = hash_at(first, skipped, &mut hashes.first, archive)?;
            if first_hash != hash_at(second, skipped, &mut hashes.second, archive)? {
                ranges.add(bytes(first_block + skipped), BLOCK_BYTES);
            }
        }
    }
    Ok(ranges)
}

/// The hash of the block that is `skipped` blocks behind the first one of a run. It is `None` for zeros, stored ones too.
fn hash_at(content: Content, skipped: u32, hashes: &mut StoredHashes<'_>, archive: &Archive) -> Result<Option<Hash>> {
    let Content::Stored(first) = content else {
        return Ok(None);
    };
    let hash = hashes.get(first + skipped)?;
    hash.map(|hash| Some(hash).filter(|hash| *hash != zero_hash()))
        .ok_or_else(|| Error::Damaged {
            path: archive.path().to_owned(),
            range: None,
            problem: "hashes of its blocks are lost".into(),
        })
}

/// Two lists of runs, cut at the same blocks: the first block of each part, its length in blocks, and its content in both lists. It ends
/// with the shorter list.
fn side_by_side<'a>(first: &'a [Run], second: &'a [Run]) -> impl Iterator<Item = (u32, u32, (Content, Content))> + 'a {
    let (mut first_runs, mut second_runs) = (first.iter().copied(), second.iter().copied());
    let (mut first, mut second) = (first_runs.next(), second_runs.next());
    let mut at = 0;
    std::iter::from_fn(move || {
        let (first_run, second_run) = (first?, second?);
        let blocks = first_run.blocks.min(second_run.blocks);
        let part = (at, blocks, (first_run.content, second_run.content));
        let rest = |run: Run, runs: &mut dyn Iterator<Item = Run>| match run.blocks - blocks {
            0 => runs.next(),
            left => Some(run.part(blocks, left)),
        };
        first = rest(first_run, &mut first_runs);
        second = rest(second_run, &mut second_runs);
        at += blocks;
        Some(part)
    })
}

/// Compares the images of a commit with those on disk.
fn diff_pool(
    archive: &Archive,
    committed: &Committed,
    scope: &Scope,
    monitor: &dyn Monitor,
) -> Result<Vec<DiffedImage>> {
    let manifest = manifest_of(archive, committed)?;
    let found = pool::discover(&scope.paths, &scope.exclude)?;
    let root = common_folder(found.named.iter().map(|named| named.root.as_path()));
    let on_disk: BTreeMap<PathBuf, &FoundImage> = found
        .images
        .iter()
        .flat_map(|image| image.names.iter().map(move |name| (name, image)))
        .map(|(name, image)| (name.strip_prefix(&root).unwrap_or(name).to_owned(), image))
        .collect();
    let names: BTreeSet<&PathBuf> = manifest.values().flat_map(|image| &image.image.names).collect();
    let mut images: Vec<DiffedImage> = Vec::new();
    for (path, found) in &on_disk {
        if !names.contains(path) {
            images.push(only(path, Change::OnlyInSecond, found.size));
        }
    }
    monitor.phase("Comparing", manifest.values().map(|image| image.image.size).sum());
    for (path, image) in &manifest {
        match on_disk.get(path) {
            Some(found) => images.push(diff_file(archive, committed, image, found, monitor)?.into_image(path)),
            None => images.push(only(path, Change::OnlyInFirst, image.image.size)),
        }
    }
    images.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(images)
}

/// Compares an image of a commit with a file. It reads the data of the file, and takes holes for zeros.
fn diff_file(
    archive: &Archive,
    committed: &Committed,
    image: &ImageRuns,
    found: &FoundImage,
    monitor: &dyn Monitor,
) -> Result<DifferingRanges> {
    /// Blocks that are read at a time.
    const PART_BLOCKS: u32 = 1024;
    let path = found.path.as_path();
    let file = found
        .open(OFlags::RDONLY | OFlags::NONBLOCK)
        .map_err(Error::io("open", path))?;
    let size = file.metadata().map_err(Error::io("look at", path))?.len();
    let mut hashes = StoredHashes::new(Some((archive, committed)), committed.commit.store_end);
    let mut ranges = DifferingRanges::new(image.image.size, size);
    let mut at = 0u32;
    let mut buffer = Vec::new();
    let mut data = DataRanges {
        file: &file,
        known: 0..0,
    };
    for run in &image.runs {
        for skipped in (0..run.blocks).step_by(PART_BLOCKS as usize) {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let part = run.part(skipped, PART_BLOCKS.min(run.blocks - skipped));
            let start = bytes(at + skipped);
            monitor.advance(bytes(part.blocks));
            let is_data = data.has(start, bytes(part.blocks), size);
            if !is_data && !matches!(part.content, Content::Stored(_)) {
                continue;
            }
            buffer.clear();
            buffer.resize(part.blocks as usize * BLOCK_LEN, 0);
            if is_data {
                read_at(&file, path, &mut buffer, start)?;
            }
            let file_hashes: Vec<Option<Hash>> = buffer
                .par_chunks_exact(BLOCK_LEN)
                .map(|block| block.iter().any(|byte| *byte != 0).then(|| hash_of(block)))
                .collect();
            for (number, file_hash) in (0u32..).zip(file_hashes) {
                if file_hash != hash_at(part.content, number, &mut hashes, archive)? {
                    ranges.add(start + bytes(number), BLOCK_BYTES);
                }
            }
        }
        at += run.blocks;
    }
    Ok(ranges)
}

/// Reads a range of a file, as far as the file goes. The rest of the buffer stays as it is.
fn read_at(file: &File, path: &Path, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
    while !buffer.is_empty() {
        match file.read_at(buffer, offset) {
            Ok(0) => return Ok(()),
            Ok(read) => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::unreadable(path, offset, buffer.len() as u64)(error)),
        }
    }
    Ok(())
}

/// The ranges of a file that hold data.
struct DataRanges<'a> {
    file: &'a File,
    /// The range of data that was found last, in bytes.
    known: std::ops::Range<u64>,
}

impl DataRanges<'_> {
    /// Whether a range of the file holds any data. Calls have to be in ascending order of their ranges.
    fn has(&mut self, start: u64, length: u64, size: u64) -> bool {
        if start >= size {
            return false;
        }
        if self.known.end <= start {
            let data_start = rustix::fs::seek(self.file, SeekFrom::Data(start));
            self.known = match data_start {
                Ok(data_start) => data_start..rustix::fs::seek(self.file, SeekFrom::Hole(data_start)).unwrap_or(size),
                Err(rustix::io::Errno::NXIO) => size..size,
                // On a filesystem that cannot tell, the rest of the file counts as data.
                Err(_) => start..size,
            };
        }
        self.known.start < start + length && start < self.known.end
    }
}

/// The ranges of an image that differ, joined where they touch.
struct DifferingRanges {
    ranges: Vec<ByteRange>,
    /// The size of the image on the first side, in bytes.
    first_size: u64,
    /// Its size on the second side.
    second_size: u64,
}

impl DifferingRanges {
    fn new(first_size: u64, second_size: u64) -> Self {
        Self {
            ranges: Vec::new(),
            first_size,
            second_size,
        }
    }

    /// Adds a range, which has to lie behind those before.
    fn add(&mut self, start: u64, length: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.start + last.length == start => last.length += length,
            _ => self.ranges.push(ByteRange { start, length }),
        }
    }

    /// The report on the image.
    fn into_image(mut self, path: &Path) -> DiffedImage {
        let common_size = self.first_size.min(self.second_size);
        // All bytes behind the end of the shorter side differ, whatever they are.
        self.ranges.retain(|range| range.start < common_size);
        for range in &mut self.ranges {
            range.length = range.length.min(common_size - range.start);
        }
        if self.first_size != self.second_size {
            self.add(common_size, self.first_size.max(self.second_size) - common_size);
        }
        DiffedImage {
            path: path.to_owned(),
            change: if self.ranges.is_empty() {
                Change::Same
            } else {
                Change::Differs
            },
            differing_bytes: self.ranges.iter().map(|range| range.length).sum(),
            ranges: self.ranges,
        }
    }
}

/// The report on an image that only one side has: all of it differs.
fn only(path: &Path, change: Change, size: u64) -> DiffedImage {
    DiffedImage {
        path: path.to_owned(),
        change,
        differing_bytes: size,
        ranges: vec![ByteRange { start: 0, length: size }],
    }
}
