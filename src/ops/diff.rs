//! `diff`: compares two commits of an archive, or a commit or a backup with the images of a pool or with another backup, by the hashes of their
//! blocks.

mod side;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rayon::prelude::*;
use rustix::fs::{OFlags, SeekFrom};

use self::side::Side;
use super::{BackupAccess, Scope, common_folder, is_backup};
use crate::archive::manifest::ImageRuns;
use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{BlockHasher, Hash};
use crate::block::{BLOCK_BYTES, BLOCK_LEN, ByteRange, bytes};
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::pool::{self, FoundImage};
use crate::report::{Change, Diffed, DiffedImage};
use crate::shown::shown;
use crate::store::{FileStore, PeekedStore};

/// What a commit of an archive, or a backup that another program made, is compared with.
#[derive(Debug, Clone)]
pub enum ComparedWith {
    /// Another commit of the archive. `None` means the last one.
    Commit(Option<String>),
    /// Images on disk.
    Pool(Scope),
    /// A backup that another program made.
    Backup(PathBuf),
}

/// Compares a commit with another one, or either that or a backup with images on disk or with a backup. `access` is for backups.
///
/// # Errors
/// [`Error::NoSuchCommit`]; [`Error::Usage`] if a backup is asked for a commit; [`Error::Damaged`] if a manifest or a hash that is compared is
/// lost; [`Error::DamagedBackup`] and [`Error::RefusedBackup`]; [`Error::Unreadable`] if an image cannot be read; [`Error::Io`] if the archive
/// cannot be read; [`Error::Interrupted`].
pub fn diff(
    path: &Path,
    commit: Option<&str>,
    with: &ComparedWith,
    access: &BackupAccess,
    monitor: &dyn Monitor,
) -> Result<Diffed> {
    let store = FileStore::open(path)?;
    let is_backup = {
        let peeked = PeekedStore::new(&store).map_err(Error::io("read", path))?;
        is_backup(&peeked, access)?
    };
    let mut result = Diffed {
        archive: path.to_owned(),
        ..Diffed::default()
    };
    if is_backup {
        if commit.is_some() || matches!(with, ComparedWith::Commit(_)) {
            let problem = "a backup that another program made has no commits: compare it with --pool or --backup";
            return Err(Error::Usage(problem.into()));
        }
        result.first = "the backup".into();
        let first = Side::of_backup(&store, access, BlockHasher::default(), monitor)?;
        compare(first, with, access, &mut result, monitor)?;
        return Ok(result);
    }
    let archive = Archive::open_with(std::sync::Arc::new(store), access.keys())?;
    let name_of = |committed: &Committed| format!("commit {} ({})", committed.commit.number, committed.id());
    let committed = archive.commit(commit)?;
    result.first = name_of(committed);
    let first = Side::of_commit(&archive, committed)?;
    if let ComparedWith::Commit(name) = with {
        let second = archive.commit(name.as_deref())?;
        result.second = name_of(second);
        result.images = diff_sides(first, Side::of_commit(&archive, second)?, monitor)?;
    } else {
        compare(first, with, access, &mut result, monitor)?;
    }
    result.differing_bytes = differing_bytes(&result.images);
    Ok(result)
}

/// Compares a side with images on disk, or with a backup.
fn compare(
    first: Side<'_>,
    with: &ComparedWith,
    access: &BackupAccess,
    result: &mut Diffed,
    monitor: &dyn Monitor,
) -> Result<()> {
    match with {
        ComparedWith::Commit(_) => {}
        ComparedWith::Pool(scope) => {
            result.second = "the images on disk".into();
            result.images = diff_pool(first, scope, monitor)?;
        }
        ComparedWith::Backup(path) => {
            result.second = format!("`{}`", shown(path));
            let second = Side::of_backup(&FileStore::open(path)?, access, first.hasher.clone(), monitor)?;
            result.images = diff_sides(first, second, monitor)?;
        }
    }
    result.differing_bytes = differing_bytes(&result.images);
    Ok(())
}

fn differing_bytes(images: &[DiffedImage]) -> u64 {
    images.iter().map(|image| image.differing_bytes).sum()
}

/// Blocks after which a comparison checks whether the user has stopped it.
const CHECK_EVERY_BLOCKS: u32 = 1 << 16;

/// Compares the images of two sides.
fn diff_sides(mut first: Side<'_>, mut second: Side<'_>, monitor: &dyn Monitor) -> Result<Vec<DiffedImage>> {
    monitor.phase("Comparing", 0);
    let (first_images, second_images) = (std::mem::take(&mut first.images), std::mem::take(&mut second.images));
    let paths: BTreeSet<&PathBuf> = first_images.keys().chain(second_images.keys()).collect();
    let mut images = Vec::new();
    for path in paths {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        images.push(match (first_images.get(path), second_images.get(path)) {
            (Some(one), Some(other)) => diff_images((&mut first, one), (&mut second, other), monitor)?.into_image(path),
            (Some(image), None) => only(path, Change::OnlyInFirst, image.image.size),
            (None, Some(image)) => only(path, Change::OnlyInSecond, image.image.size),
            (None, None) => continue,
        });
    }
    Ok(images)
}

/// Compares an image with the image of the same path on the other side.
fn diff_images(
    (first_side, first): (&mut Side<'_>, &ImageRuns),
    (second_side, second): (&mut Side<'_>, &ImageRuns),
    monitor: &dyn Monitor,
) -> Result<DifferingRanges> {
    let mut ranges = DifferingRanges::new(first.image.size, second.image.size);
    let has_one_store = first_side.lane.is_some() && first_side.lane == second_side.lane;
    let is_stored = |content| matches!(content, Content::Stored(_));
    for (first_block, blocks, (first, second)) in side_by_side(&first.runs, &second.runs) {
        if (first == second && has_one_store) || (!is_stored(first) && !is_stored(second)) {
            continue;
        }
        for skipped in 0..blocks {
            if skipped % CHECK_EVERY_BLOCKS == 0 && monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            if first_side.hash_at(first, skipped)? != second_side.hash_at(second, skipped)? {
                ranges.add(bytes(first_block + skipped), BLOCK_BYTES);
            }
        }
    }
    Ok(ranges)
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

/// Compares the images of a side with those on disk.
fn diff_pool(mut side: Side<'_>, scope: &Scope, monitor: &dyn Monitor) -> Result<Vec<DiffedImage>> {
    let mut manifest = std::mem::take(&mut side.images);
    let found = pool::discover(&scope.paths, &scope.exclude)?;
    let named = common_folder(found.named.iter().map(|named| named.root.as_path()));
    let root = base_of(&named, &found.images, &manifest).to_owned();
    if let Ok(below) = named.strip_prefix(&root)
        && root != named
    {
        manifest.retain(|path, _| path.starts_with(below));
        monitor.note(&format!(
            "`{}` is `{}` of what was exported: only that is compared",
            shown(&named),
            shown(below)
        ));
    }
    let mut on_disk = by_relative_name(found.images, &root);
    // A backup has files that do not look like images, such as a configuration. A file that is named counts whatever it looks like.
    let is_file = |path: &PathBuf| path.symlink_metadata().is_ok_and(|metadata| metadata.is_file());
    let others = manifest.keys().filter(|path| !on_disk.contains_key(*path));
    let others: Vec<PathBuf> = others.map(|path| root.join(path)).filter(is_file).collect();
    if !others.is_empty() {
        on_disk.extend(by_relative_name(pool::discover(&others, &[])?.images, &root));
    }
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
            Some(found) => images.push(diff_file(&mut side, image, found, monitor)?.into_image(path)),
            None => images.push(only(path, Change::OnlyInFirst, image.image.size)),
        }
    }
    images.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(images)
}

/// The folder that names of a side are relative to: the one that was named, or, where that is a part of what was exported, one around it.
fn base_of<'a>(named: &'a Path, found: &[FoundImage], manifest: &BTreeMap<PathBuf, ImageRuns>) -> &'a Path {
    let known: BTreeSet<&Path> = manifest
        .values()
        .flat_map(|image| image.image.names.iter().map(PathBuf::as_path))
        .collect();
    let is_base = |base: &&Path| {
        let mut names = found.iter().flat_map(|image| &image.names);
        names.any(|name| name.strip_prefix(base).is_ok_and(|name| known.contains(name)))
    };
    named.ancestors().find(is_base).unwrap_or(named)
}

/// Images by all of their names, relative to a folder.
fn by_relative_name(images: Vec<FoundImage>, root: &Path) -> BTreeMap<PathBuf, Rc<FoundImage>> {
    let images = images.into_iter().map(Rc::new);
    let named = images.flat_map(|image| {
        let names: Vec<PathBuf> = image.names.iter().cloned().collect();
        names.into_iter().map(move |name| (name, Rc::clone(&image)))
    });
    named
        .map(|(name, image)| (name.strip_prefix(root).map_or(name.clone(), Path::to_owned), image))
        .collect()
}

/// Compares an image of a side with a file. It reads the data of the file, and takes holes for zeros.
fn diff_file(
    side: &mut Side<'_>,
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
    let mut ranges = DifferingRanges::new(image.image.size, size);
    let mut at = 0u32;
    let mut buffer = Vec::new();
    let mut data = DataRanges {
        file: &file,
        known: 0..0,
    };
    let hasher = side.hasher.clone();
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
                .map(|block| block.iter().any(|byte| *byte != 0).then(|| hasher.of(block)))
                .collect();
            for (number, file_hash) in (0u32..).zip(file_hashes) {
                if file_hash != side.hash_at(part.content, number)? {
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
