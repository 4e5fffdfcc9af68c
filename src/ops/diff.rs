//! `diff`: what differs between two commits of an archive, or between one and the images of a pool. By hash.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use rustix::fs::{OFlags, SeekFrom};

use super::{Scope, common_folder};
use crate::archive::manifest::ImageRuns;
use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{Hash, hash_of};
use crate::block::{BLOCK_BYTES, BLOCK_LEN, ByteRange, bytes};
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::exec::hashes::StoredHashes;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::pool::{self, FoundImage};
use crate::report::{Change, Diffed, DiffedImage};
use crate::store::FileStore;

/// What an archive's commit is compared with.
#[derive(Debug, Clone)]
pub enum ComparedWith {
    /// Another commit.
    Commit(Option<String>),
    /// Images on disk.
    Pool(Scope),
}

/// Compares.
///
/// # Errors
/// Those of reading, or if there is no such commit.
pub fn diff(path: &Path, commit: Option<&str>, with: &ComparedWith, monitor: &dyn Monitor) -> Result<Diffed> {
    let archive = Archive::open(std::sync::Arc::new(FileStore::open(path)?))?;
    let one = archive.commit(commit)?;
    let mut result = Diffed {
        archive: path.to_owned(),
        first: format!("commit {} ({})", one.commit.number, one.id()),
        ..Diffed::default()
    };
    match with {
        ComparedWith::Commit(other) => {
            let other = archive.commit(other.as_deref())?;
            result.second = format!("commit {} ({})", other.commit.number, other.id());
            result.images = commits(&archive, one, other, monitor)?;
        }
        ComparedWith::Pool(scope) => {
            result.second = "the images on disk".into();
            result.images = with_pool(&archive, one, scope, monitor)?;
        }
    }
    result.differing_bytes = result.images.iter().map(|image| image.differing_bytes).sum();
    Ok(result)
}

fn manifest_of(archive: &Archive, committed: &Committed) -> Result<BTreeMap<PathBuf, ImageRuns>> {
    let (manifest, damage) = archive.manifest(committed)?;
    if let Some(one) = damage.first() {
        return Err(Error::damaged(
            archive.path(),
            one.range.start,
            one.range.length,
            one.problem.clone(),
        ));
    }
    let by_path = manifest
        .images
        .into_iter()
        .map(|image| (image.image.path().to_owned(), image));
    Ok(by_path.collect())
}

/// Blocks compared between two looks at whether the user has stopped it.
const LOOK_EVERY: u32 = 1 << 16;

fn commits(archive: &Archive, one: &Committed, other: &Committed, monitor: &dyn Monitor) -> Result<Vec<DiffedImage>> {
    monitor.phase("Comparing", 0);
    let (one, other) = (manifest_of(archive, one)?, manifest_of(archive, other)?);
    let end = archive
        .commits()
        .iter()
        .map(|committed| committed.commit.store_end)
        .max()
        .unwrap_or(StoreBlock(0));
    let mut hashes = StoredHashes::new(Some(archive), end);
    let paths: BTreeSet<&PathBuf> = one.keys().chain(other.keys()).collect();
    let mut images = Vec::new();
    for path in paths {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        images.push(match (one.get(path), other.get(path)) {
            (Some(one), Some(other)) => {
                let mut ranges = Ranges::new(one.image.size, other.image.size);
                for (at, blocks, pair) in side_by_side(&one.runs, &other.runs) {
                    let (one, other) = pair;
                    let is_stored = |content| matches!(content, Content::Stored(_));
                    if one == other || (!is_stored(one) && !is_stored(other)) {
                        continue;
                    }
                    for n in 0..blocks {
                        if n % LOOK_EVERY == 0 && monitor.interrupted() {
                            return Err(Error::Interrupted);
                        }
                        let of = |content: Content, hashes: &mut StoredHashes<'_>| hash_at(content, n, hashes, archive);
                        if of(one, &mut hashes)? != of(other, &mut hashes)? {
                            ranges.add(bytes(at + n), BLOCK_BYTES);
                        }
                    }
                }
                ranges.into_image(path)
            }
            (Some(image), None) => only(path, Change::OnlyInFirst, image.image.size),
            (None, Some(image)) => only(path, Change::OnlyInSecond, image.image.size),
            (None, None) => continue,
        });
    }
    Ok(images)
}

/// The hash of a block, none for zeros.
fn hash_at(content: Content, n: u32, hashes: &mut StoredHashes<'_>, archive: &Archive) -> Result<Option<Hash>> {
    let Content::Stored(first) = content else {
        return Ok(None);
    };
    let hash = hashes.get(first + n)?;
    hash.map(Some).ok_or_else(|| Error::Damaged {
        path: archive.path().to_owned(),
        range: None,
        problem: "hashes of its blocks are lost".into(),
    })
}

/// Both lists of runs cut at the same places: first block, blocks, and what each holds there; to the end of the shorter one.
fn side_by_side<'a>(one: &'a [Run], other: &'a [Run]) -> impl Iterator<Item = (u32, u32, (Content, Content))> + 'a {
    let (mut ones, mut others) = (one.iter().copied(), other.iter().copied());
    let (mut one, mut other) = (ones.next(), others.next());
    let mut at = 0;
    std::iter::from_fn(move || {
        let (a, b) = (one?, other?);
        let blocks = a.blocks.min(b.blocks);
        let found = (at, blocks, (a.content, b.content));
        let rest = |run: Run, next: &mut dyn Iterator<Item = Run>| match run.blocks - blocks {
            0 => next.next(),
            left => Some(run.part(blocks, left)),
        };
        one = rest(a, &mut ones);
        other = rest(b, &mut others);
        at += blocks;
        Some(found)
    })
}

fn with_pool(archive: &Archive, one: &Committed, scope: &Scope, monitor: &dyn Monitor) -> Result<Vec<DiffedImage>> {
    let manifest = manifest_of(archive, one)?;
    let found = pool::discover(&scope.paths, &scope.exclude)?;
    let root = common_folder(found.named.iter().map(|one| one.root.as_path()));
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
            Some(found) => images.push(with_file(archive, one, image, found, monitor)?.into_image(path)),
            None => images.push(only(path, Change::OnlyInFirst, image.image.size)),
        }
    }
    images.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(images)
}

/// Compares an image with a file: reads its data, and takes holes for zeros.
fn with_file(
    archive: &Archive,
    committed: &Committed,
    image: &ImageRuns,
    found: &FoundImage,
    monitor: &dyn Monitor,
) -> Result<Ranges> {
    /// Blocks read at a time.
    const PART: u32 = 1024;
    let path = found.path.as_path();
    let file = found
        .open(OFlags::RDONLY | OFlags::NONBLOCK)
        .map_err(Error::io("open", path))?;
    let size = file.metadata().map_err(Error::io("look at", path))?.len();
    let mut hashes = StoredHashes::new(Some(archive), committed.commit.store_end);
    let mut ranges = Ranges::new(image.image.size, size);
    let mut at = 0u32;
    let mut buffer = Vec::new();
    let mut data = Data {
        file: &file,
        known: 0..0,
    };
    for run in &image.runs {
        for skip in (0..run.blocks).step_by(PART as usize) {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let part = run.part(skip, PART.min(run.blocks - skip));
            let start = bytes(at + skip);
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
            let found: Vec<Option<Hash>> = buffer
                .par_chunks_exact(BLOCK_LEN)
                .map(|block| block.iter().any(|byte| *byte != 0).then(|| hash_of(block)))
                .collect();
            for (n, found) in (0u32..).zip(found) {
                if found != hash_at(part.content, n, &mut hashes, archive)? {
                    ranges.add(start + bytes(n), BLOCK_BYTES);
                }
            }
        }
        at += run.blocks;
    }
    Ok(ranges)
}

/// Reads what there is; behind the end of a file there are zeros.
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

/// Where a file has data.
struct Data<'a> {
    file: &'a File,
    /// The range of data that was found last.
    known: std::ops::Range<u64>,
}

impl Data<'_> {
    /// Whether there is data in a range. Ranges are asked for in ascending order.
    fn has(&mut self, start: u64, length: u64, size: u64) -> bool {
        if start >= size {
            return false;
        }
        if self.known.end <= start {
            let begin = rustix::fs::seek(self.file, SeekFrom::Data(start));
            self.known = match begin {
                Ok(begin) => begin..rustix::fs::seek(self.file, SeekFrom::Hole(begin)).unwrap_or(size),
                Err(rustix::io::Errno::NXIO) => size..size,
                // A filesystem that cannot tell has data everywhere.
                Err(_) => start..size,
            };
        }
        self.known.start < start + length && start < self.known.end
    }
}

/// Ranges that differ, joined where they touch.
struct Ranges {
    ranges: Vec<ByteRange>,
    sizes: (u64, u64),
}

impl Ranges {
    fn new(one: u64, other: u64) -> Self {
        Self {
            ranges: Vec::new(),
            sizes: (one, other),
        }
    }

    fn add(&mut self, start: u64, length: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.start + last.length == start => last.length += length,
            _ => self.ranges.push(ByteRange { start, length }),
        }
    }

    fn into_image(mut self, path: &Path) -> DiffedImage {
        let (one, other) = self.sizes;
        let common = one.min(other);
        // Blocks behind the end of the shorter one are not compared: all of that differs.
        self.ranges.retain(|range| range.start < common);
        for range in &mut self.ranges {
            range.length = range.length.min(common - range.start);
        }
        if one != other {
            self.add(common, one.max(other) - common);
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

fn only(path: &Path, change: Change, size: u64) -> DiffedImage {
    DiffedImage {
        path: path.to_owned(),
        change,
        differing_bytes: size,
        ranges: vec![ByteRange { start: 0, length: size }],
    }
}
