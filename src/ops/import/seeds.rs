//! Images on the disk that have blocks in common with what is restored.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use walkdir::WalkDir;

use super::{Options, PROVED_BLOCKS, prove, proved};
use crate::archive::manifest::Announced;
use crate::block::{BLOCK_BYTES, BLOCK_LEN, SlotSet, bytes};
use crate::chunk::weak_id;
use crate::content::StoreBlock;
use crate::error::{Error, Result};
use crate::exec::hashes::StoredHashes;
use crate::exec::restore::staging::Staging;
use crate::fs::volume::{Purpose, Volume};
use crate::fs::{Sharing, SourceFile};
use crate::index::Index;
use crate::monitor::Monitor;
use crate::ops::{Prepared, Scope, prepare};
use crate::plan::import::{SeedMatch, find_seeds};
use crate::pool;
use crate::range;
use crate::sys::beneath::Folder;
use crate::sys::fiemap::fiemap;
use crate::sys::fs_info::{FsInfo, Kind, fs_info};
use crate::sys::logical_ino;

/// Seeds that were opened and fingerprinted.
pub(super) struct Seeds {
    prepared: Prepared,
    /// The folder of indexes, where lists may lie.
    index: PathBuf,
}

impl Seeds {
    /// Opens the seeds that were named, or else images that the index knows to have wanted blocks; none if there are none, or
    /// extents cannot be shared.
    pub(super) fn open<'a>(
        options: &Options,
        shares: bool,
        wanted: &[Range<StoreBlock>],
        announced: impl Iterator<Item = &'a Announced>,
        monitor: &dyn Monitor,
    ) -> Result<Option<Self>> {
        if !shares {
            return Ok(None);
        }
        let paths = if options.seeds.is_empty() {
            known_images(options, wanted, announced, monitor).unwrap_or_default()
        } else {
            options.seeds.clone()
        };
        if paths.is_empty() {
            return Ok(None);
        }
        match Self::open_paths(options, &paths, monitor) {
            Err(error) if options.seeds.is_empty() => {
                monitor.note(&format!(
                    "Going on without what is here already: {}",
                    crate::error::describe(&error)
                ));
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn open_paths(options: &Options, paths: &[PathBuf], monitor: &dyn Monitor) -> Result<Self> {
        let scope = Scope {
            paths: paths.to_owned(),
            exclude: Vec::new(),
            index: options.index.clone(),
            memory_bytes: options.memory_bytes,
        };
        let prepared = prepare(&scope, Purpose::Look, monitor)?;
        let here = filesystem_of(options).map(|(_, info)| info.uuid);
        if here != Some(prepared.fs.uuid()) {
            return Err(Error::TwoFilesystems {
                first: options.to.clone(),
                second: paths.first().cloned().unwrap_or_default(),
            });
        }
        Ok(Self {
            prepared,
            index: options.index.clone(),
        })
    }

    fn fs(&self) -> &Volume {
        &self.prepared.fs
    }

    /// Looks for wanted blocks by the fingerprints that the archive announces.
    pub(super) fn find<'a>(
        &self,
        wanted: &[Range<StoreBlock>],
        announced: impl Iterator<Item = &'a Announced>,
        monitor: &dyn Monitor,
    ) -> Result<Vec<SeedMatch>> {
        monitor.phase("Looking for blocks that are here already", 0);
        let end = wanted.last().map_or(0, |range| range.end) as usize;
        let facts = &self.prepared.facts;
        let (mut fingerprints, mut known) = (facts.fingerprints.alike(end), SlotSet::new(end));
        for one in announced.filter(|one| one.function == self.fs().function() && (one.first as usize) < end) {
            let length = end.saturating_sub(one.first as usize).min(one.fingerprints.len());
            fingerprints.write(one.first, &one.fingerprints[..length]);
            known.insert_range(one.first..one.first + u32::try_from(length).unwrap_or(0));
        }
        let found = find_seeds(facts, wanted, &fingerprints, |block| known.contains(block));
        for all in [&fingerprints, &facts.fingerprints] {
            all.check()
                .map_err(Error::io("use the file of fingerprints in", &self.index))?;
        }
        Ok(found.iter().flat_map(|seeded| self.without_tails(seeded)).collect())
    }

    /// What of a match can be cloned: the kernel clones the last, partial block of a file to the end of another only.
    fn without_tails(&self, seeded: &SeedMatch) -> Vec<SeedMatch> {
        let mut parts: Vec<SeedMatch> = Vec::new();
        for (slot, place) in self.prepared.facts.places_of(seeded.slot..seeded.slot + seeded.blocks) {
            let whole = self.fs().images()[place.image as usize].size / BLOCK_BYTES;
            let blocks = whole.saturating_sub(u64::from(place.file_block));
            let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).min(place.blocks);
            match parts.last_mut() {
                Some(last) if last.slot + last.blocks == slot => last.blocks += blocks,
                _ => parts.push(SeedMatch {
                    first: seeded.first + (slot - seeded.slot),
                    blocks,
                    slot,
                }),
            }
        }
        parts.retain(|part| part.blocks > 0);
        parts
    }

    /// Reads what was found and keeps what has the hashes of the archive.
    pub(super) fn prove(
        &self,
        found: &[SeedMatch],
        hashes: &mut StoredHashes<'_>,
        monitor: &dyn Monitor,
    ) -> Result<Vec<SeedMatch>> {
        monitor.phase(
            "Checking blocks that are here already",
            found.iter().map(|one| bytes(one.blocks)).sum(),
        );
        let mut kept = Vec::new();
        for one in found {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            for part in range::parts(one.first..one.first + one.blocks, PROVED_BLOCKS) {
                let slot = one.slot + (part.start - one.first);
                let length = bytes(part.end - part.start);
                if let Ok(content) = self.content(slot, part.end - part.start) {
                    for range in proved(part.clone(), &content, hashes)? {
                        kept.push(SeedMatch {
                            first: range.start,
                            blocks: range.end - range.start,
                            slot: slot + (range.start - part.start),
                        });
                    }
                }
                monitor.advance(length);
            }
        }
        Ok(kept)
    }

    /// The content of some slots.
    pub(super) fn content(&self, slot: u32, blocks: u32) -> Result<Vec<u8>> {
        let mut content = vec![0; blocks as usize * BLOCK_LEN];
        let mut rest = &mut content[..];
        for (_, place) in self.prepared.facts.places_of(slot..slot + blocks) {
            let (part, after) = rest.split_at_mut(place.blocks as usize * BLOCK_LEN);
            let (file, offset) = (SourceFile::Image(place.image), bytes(place.file_block));
            self.fs().read_ahead(file, offset, part.len() as u64);
            self.fs().read(file, offset, part)?;
            self.fs().drop_behind(file, offset, part.len() as u64);
            rest = after;
        }
        Ok(content)
    }

    /// Makes the staging file share what was found, and proves it once more there. Returns the bytes that hold.
    pub(super) fn clone_into(
        &self,
        seeded: &SeedMatch,
        staging: &mut Staging,
        hashes: &mut StoredHashes<'_>,
        monitor: &dyn Monitor,
    ) -> Result<u64> {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let mut kept = 0;
        for part in range::parts(seeded.first..seeded.first + seeded.blocks, PROVED_BLOCKS) {
            if part.clone().all(|block| staging.has(block)) {
                continue;
            }
            let slot = seeded.slot + (part.start - seeded.first);
            if !self.share(slot, part.clone(), staging) {
                continue;
            }
            for range in prove(staging, part, hashes)? {
                kept += bytes(range.end - range.start);
                monitor.advance(bytes(range.end - range.start));
                staging.added(range)?;
            }
        }
        Ok(kept)
    }

    /// Makes a range of the staging file share some slots. False if the filesystem refuses: then the blocks are fetched.
    pub(super) fn share(&self, slot: u32, range: Range<StoreBlock>, staging: &Staging) -> bool {
        let slots = slot..slot + (range.end - range.start);
        self.prepared.facts.places_of(slots).all(|(at, place)| {
            let to = bytes(range.start + (at - slot));
            let (offset, length) = (bytes(place.file_block), bytes(place.blocks));
            self.fs()
                .clone_from_image(place.image, offset, staging.file(), to, length)
                .is_ok()
        })
    }
}

/// Whether there can be any seeds: some are named, or there is an index of the filesystem.
pub(super) fn are_possible(options: &Options) -> bool {
    let knows = |(_, info): (File, FsInfo)| Index::exists(&options.index, info.uuid);
    !options.seeds.is_empty() || filesystem_of(options).is_some_and(knows)
}

/// The folder that is restored to, or what exists of the way to it, and its filesystem, if extents can be shared there.
fn filesystem_of(options: &Options) -> Option<(File, FsInfo)> {
    let folder = File::open(existing(&options.to)).ok()?;
    let info = fs_info(&folder).ok()?;
    Some((folder, info))
}

/// What exists of the way to a folder.
pub(super) fn existing(to: &Path) -> &Path {
    // A path without folders lies in the current one.
    let exists = to
        .ancestors()
        .find(|folder| !folder.as_os_str().is_empty() && folder.exists());
    exists.unwrap_or(Path::new("."))
}

/// Images that the index knows to hold wanted chunks, those with most of them: of the subvolume that is restored to, or of the XFS. None
/// where the index or the filesystem cannot tell.
fn known_images<'a>(
    options: &Options,
    wanted: &[Range<StoreBlock>],
    announced: impl Iterator<Item = &'a Announced>,
    monitor: &dyn Monitor,
) -> Option<Vec<PathBuf>> {
    /// More of them would bring little.
    const IMAGES_MAX: usize = 64;
    let (folder, info) = filesystem_of(options)?;
    let is_btrfs = matches!(info.kind, Kind::Btrfs { .. });
    // Only root may ask btrfs who holds an extent.
    if !Index::exists(&options.index, info.uuid) || (is_btrfs && !rustix::process::geteuid().is_root()) {
        return None;
    }
    let ids = weak_ids(wanted, announced);
    let index = Index::open(&options.index, info.uuid, None, monitor).ok()?;
    let addresses = index.extents_with(|id| ids.contains(&id)).ok()?;
    drop(index);
    let mut chosen = if is_btrfs {
        holders_on_btrfs(&options.to, &folder, &addresses)?
    } else {
        holders_on_xfs(&options.to, addresses, monitor)?
    };
    chosen.sort_unstable_by(|a, b| b.cmp(a));
    chosen.truncate(IMAGES_MAX);
    Some(chosen.into_iter().map(|(_, path)| path).collect())
}

/// Files of the subvolume that hold extents, with how many of them.
fn holders_on_btrfs(to: &Path, folder: &File, addresses: &[u64]) -> Option<Vec<(usize, PathBuf)>> {
    let here = logical_ino::subvolume_of(folder).ok()?;
    let top = top_of_subvolume(to)?;
    let mut held: BTreeMap<u64, usize> = BTreeMap::new();
    for address in addresses {
        // An extent that is gone has none.
        let Ok(Some(found)) = logical_ino::holders(folder, *address) else {
            continue;
        };
        let inodes: BTreeSet<u64> = found
            .iter()
            .filter(|one| one.root == here)
            .map(|one| one.inode)
            .collect();
        for inode in inodes {
            *held.entry(inode).or_default() += 1;
        }
    }
    let paths = held.into_iter().filter_map(|(inode, extents)| {
        let path = logical_ino::path_in_subvolume(folder, here, inode).ok()?;
        Some((extents, top.join(path))).filter(|(_, path)| path.is_file())
    });
    Some(paths.collect())
}

/// Images on the XFS that map the addresses where extents begin, with how many of them. XFS cannot be asked who holds an extent: its images
/// are looked for, by their names, and their maps are read.
fn holders_on_xfs(to: &Path, mut addresses: Vec<u64>, monitor: &dyn Monitor) -> Option<Vec<(usize, PathBuf)>> {
    /// Files and folders looked at: a filesystem that has more is one of much else.
    const ENTRIES_MAX: usize = 1 << 20;
    if addresses.is_empty() {
        return Some(Vec::new());
    }
    addresses.sort_unstable();
    addresses.dedup();
    let top = top_of_mount(to)?;
    let folder = Folder::open(&top).ok()?;
    let mut found = Vec::new();
    let entries = WalkDir::new(&top).same_file_system(true).into_iter();
    for entry in entries.take(ENTRIES_MAX).filter_map(std::result::Result::ok) {
        if monitor.interrupted() {
            return None;
        }
        let is_image = entry.file_type().is_file()
            && pool::kind_of(entry.path()) == pool::Kind::Image
            && entry
                .metadata()
                .is_ok_and(|metadata| pool::looks_like_image(entry.path(), metadata.len()));
        let Ok(below) = entry.path().strip_prefix(&top) else {
            continue;
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let Some(file) = is_image.then(|| folder.open_file(below, flags).ok()).flatten() else {
            continue;
        };
        let mut held = 0;
        let mapped = fiemap(&file, |mapping| {
            if !mapping.unwritten {
                let end = mapping.address.saturating_add(mapping.length);
                let from = addresses.partition_point(|address| *address < mapping.address);
                held += addresses[from..].partition_point(|address| *address < end);
            }
        });
        if mapped.is_ok() && held > 0 {
            found.push((held, entry.into_path()));
        }
    }
    Some(found)
}

/// The weak ids of the chunks that have wanted blocks.
fn weak_ids<'a>(wanted: &[Range<StoreBlock>], announced: impl Iterator<Item = &'a Announced>) -> HashSet<u64> {
    let mut ids = HashSet::new();
    for one in announced {
        let mut at = 0;
        for blocks in &one.chunks {
            let (start, end) = (at, at + usize::from(*blocks));
            at = end;
            let first = one.first + u32::try_from(start).unwrap_or(0);
            let from = wanted.partition_point(|range| range.end <= first);
            if wanted
                .get(from)
                .is_some_and(|range| range.start < first + u32::from(*blocks))
            {
                ids.extend(one.fingerprints.get(start..end).map(weak_id));
            }
        }
    }
    ids
}

/// The top folder of the subvolume that a path is or will be in.
fn top_of_subvolume(path: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    /// `BTRFS_FIRST_FREE_OBJECTID`: the inode of the top folder of every subvolume.
    const TOP: u64 = 256;
    let existing = existing(path).canonicalize().ok()?;
    let top = existing
        .ancestors()
        .find(|folder| folder.metadata().is_ok_and(|metadata| metadata.ino() == TOP));
    top.map(Path::to_owned)
}

/// The highest folder above a path, or what exists of it, on the same filesystem.
fn top_of_mount(path: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let existing = existing(path).canonicalize().ok()?;
    let device = existing.metadata().ok()?.dev();
    let here = existing
        .ancestors()
        .take_while(|folder| folder.metadata().is_ok_and(|metadata| metadata.dev() == device));
    here.last().map(Path::to_owned)
}
