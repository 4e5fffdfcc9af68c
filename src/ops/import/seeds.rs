//! Images on the disk that may have blocks in common with what is restored: those that were named, or that the index knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use walkdir::WalkDir;

use super::ImportOptions;
use crate::archive::manifest::Announced;
use crate::content::StoreBlock;
use crate::error::{Error, Result, describe};
use crate::exec::restore::OpenSeed;
use crate::exec::restore::folder::existing;
use crate::exec::restore::seed::{PoolSeed, Seed};
use crate::fs::volume::Purpose;
use crate::index::Index;
use crate::monitor::Monitor;
use crate::ops::{Scope, prepare};
use crate::plan::seeds::weak_ids;
use crate::pool;
use crate::sys::beneath::Folder;
use crate::sys::fiemap::fiemap;
use crate::sys::fs_info::{FsInfo, Kind, fs_info};
use crate::sys::logical_ino;

/// Opens the seeds that were named, or else images that the index knows to have wanted blocks; none if there are none.
pub(super) fn opener<'a>(options: &'a ImportOptions, monitor: &'a dyn Monitor) -> Box<OpenSeed<'a>> {
    Box::new(move |wanted, announced| {
        let paths = if options.seeds.is_empty() {
            known_images(options, wanted, announced, monitor).unwrap_or_default()
        } else {
            options.seeds.clone()
        };
        if paths.is_empty() {
            return Ok(None);
        }
        match open(options, paths, monitor) {
            Err(error) if options.seeds.is_empty() => {
                monitor.note(&format!("Going on without what is here already: {}", describe(&error)));
                Ok(None)
            }
            other => other.map(|seed| Some(Box::new(seed) as Box<dyn Seed>)),
        }
    })
}

fn open(options: &ImportOptions, paths: Vec<PathBuf>, monitor: &dyn Monitor) -> Result<PoolSeed> {
    let scope = Scope {
        paths,
        exclude: Vec::new(),
        index: options.index.clone(),
        memory_bytes: options.memory_bytes,
    };
    let prepared = prepare(&scope, Purpose::Look, monitor)?;
    let here = filesystem_of(options).map(|(_, info)| info.uuid);
    if here != Some(prepared.fs.uuid()) {
        return Err(Error::TwoFilesystems {
            first: options.restore.to.clone(),
            second: scope.paths.first().cloned().unwrap_or_default(),
        });
    }
    Ok(PoolSeed::new(prepared.fs, prepared.facts, scope.index))
}

/// Whether there can be any seeds: some are named, or there is an index of the filesystem.
pub(super) fn are_possible(options: &ImportOptions) -> bool {
    let knows = |(_, info): (File, FsInfo)| Index::exists(&options.index, info.uuid);
    !options.seeds.is_empty() || filesystem_of(options).is_some_and(knows)
}

/// The folder that is restored to, or what exists of the way to it, and its filesystem, if extents can be shared there.
fn filesystem_of(options: &ImportOptions) -> Option<(File, FsInfo)> {
    let folder = File::open(existing(&options.restore.to)).ok()?;
    let info = fs_info(&folder).ok()?;
    Some((folder, info))
}

/// Images that the index knows to hold wanted chunks, those with most of them: of the subvolume that is restored to, or of the XFS. None
/// where the index or the filesystem cannot tell.
fn known_images(
    options: &ImportOptions,
    wanted: &[Range<StoreBlock>],
    announced: &[Announced],
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
    let ids = weak_ids(wanted, announced.iter());
    let index = Index::open(&options.index, info.uuid, None, monitor).ok()?;
    let addresses = index.extents_with(|id| ids.contains(&id)).ok()?;
    drop(index);
    let mut chosen = if is_btrfs {
        holders_on_btrfs(&options.restore.to, &folder, &addresses)?
    } else {
        holders_on_xfs(&options.restore.to, addresses, monitor)?
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
