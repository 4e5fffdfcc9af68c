//! Which images on a filesystem hold extents of it, by names: to find again what an index knows.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use walkdir::WalkDir;

use crate::monitor::Monitor;
use crate::pool;
use crate::sys::beneath::Folder;
use crate::sys::fiemap::fiemap;
use crate::sys::fs_info::{FsInfo, Kind, fs_info};
use crate::sys::logical_ino;

/// The UUID of the filesystem that a path is or will be on; none if it is neither btrfs nor XFS.
pub fn uuid_at(path: &Path) -> Option<[u8; 16]> {
    filesystem_at(path).map(|(_, info)| info.uuid)
}

/// Whether this process may look for the images that hold extents of the filesystem that a path is or will be on.
pub fn may_find_holders(path: &Path) -> bool {
    // Only root may ask btrfs who holds an extent.
    filesystem_at(path).is_some_and(|(_, info)| match info.kind {
        Kind::Btrfs { .. } => rustix::process::geteuid().is_root(),
        Kind::Xfs { .. } => true,
    })
}

/// The images that hold extents at these addresses, each with how many of them: of the subvolume that a path is or will be in, or of its
/// XFS. None where the filesystem cannot tell, or the user stops it.
pub fn images_holding(path: &Path, addresses: Vec<u64>, monitor: &dyn Monitor) -> Option<Vec<(usize, PathBuf)>> {
    let (folder, info) = filesystem_at(path)?;
    match info.kind {
        Kind::Btrfs { .. } => holders_on_btrfs(path, &folder, &addresses),
        Kind::Xfs { .. } => holders_on_xfs(path, addresses, monitor),
    }
}

/// What exists of the way to a path, and its filesystem.
fn filesystem_at(path: &Path) -> Option<(File, FsInfo)> {
    let folder = File::open(existing(path)).ok()?;
    let info = fs_info(&folder).ok()?;
    Some((folder, info))
}

/// What exists of the way to a folder.
pub fn existing(to: &Path) -> &Path {
    // A path without folders lies in the current one.
    let exists = to
        .ancestors()
        .find(|folder| !folder.as_os_str().is_empty() && folder.exists());
    exists.unwrap_or(Path::new("."))
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
