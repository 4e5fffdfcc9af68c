//! Who else holds extents of the images, by names that the user knows: for messages.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{ROOT_TREE, Volume};
use crate::error::Result;
use crate::facts::{Extent, Facts, PinReason};
use crate::pool::{MountedAt, mounted_at};
use crate::sys::logical_ino::{self, holders};
use crate::sys::tree_search::{FEW, Key, tree_search};

/// `BTRFS_FS_TREE_OBJECTID`: the subvolume that all others lie in.
const TOP: u64 = 5;
/// `BTRFS_ROOT_BACKREF_KEY`: where a subvolume lies. Its offset is the subvolume around it; its data a folder there (u64), a number
/// (u64), a length (u16) and the name.
const ROOT_BACKREF: u8 = 144;
/// Subvolumes in each other that a path goes through at most.
const DEPTH_MAX: usize = 64;

impl Volume {
    /// Names of files that hold extents and are none of the images that are worked on, the largest extents first, with the bytes
    /// they hold.
    pub(super) fn names_of_holders_btrfs(&self, facts: &Facts) -> BTreeMap<String, u64> {
        /// Extents asked for: enough to name who matters.
        const EXTENTS_MAX: usize = 64;
        let mut held: Vec<&Extent> = facts
            .extents
            .iter()
            .filter(|extent| extent.pinned == Some(PinReason::HeldByOthers))
            .collect();
        held.sort_by_key(|extent| std::cmp::Reverse(extent.disk_bytes));
        let mine: HashSet<(u64, u64)> = self.images.iter().map(|image| (image.root, image.inode)).collect();
        let mut bytes = BTreeMap::new();
        for extent in held.into_iter().take(EXTENTS_MAX) {
            let holders = holders(&self.scratch, extent.address)
                .ok()
                .flatten()
                .unwrap_or_default();
            let others: HashSet<_> = holders
                .iter()
                .map(|holder| (holder.root, holder.inode))
                .filter(|one| !mine.contains(one))
                .collect();
            for other in others {
                *bytes.entry(other).or_insert(0u64) += extent.disk_bytes;
            }
        }
        let mounts = mounted_at("btrfs", |folder| {
            crate::sys::fs_info::fs_info(folder).is_ok_and(|its| its == self.info)
        });
        let mut folders = BTreeMap::new();
        let mut names = BTreeMap::new();
        for ((root, inode), bytes) in bytes {
            let folder = folders.entry(root).or_insert_with(|| self.path_of_subvolume(root));
            let name = self.name_of(folder.as_deref(), root, inode, &mounts);
            *names.entry(name).or_insert(0) += bytes;
        }
        names
    }

    /// The path of a file from a mount point, or as much as can be told.
    fn name_of(&self, subvolume: Option<&Path>, root: u64, inode: u64, mounts: &[MountedAt]) -> String {
        let (Some(subvolume), Ok(inside)) = (subvolume, logical_ino::path_in_subvolume(&self.scratch, root, inode))
        else {
            return format!("inode {inode} of subvolume {root}");
        };
        let path = subvolume.join(inside);
        let mounted = mounts
            .iter()
            .filter_map(|mount| Some((mount, path.strip_prefix(&mount.root).ok()?)))
            .max_by_key(|(mount, _)| mount.root.components().count());
        let Some((mount, below)) = mounted else {
            let path = path.strip_prefix("/").unwrap_or(&path);
            return format!("{} (in a subvolume that is not mounted)", path.to_string_lossy());
        };
        let path = mount.folder.join(below);
        // Another filesystem may be mounted over it.
        let there = path.symlink_metadata().ok().filter(|metadata| metadata.ino() == inode);
        let is_left_alone = there.is_some_and(|there| self.left_alone.contains_key(&(there.dev(), there.ino())));
        named(&path, is_left_alone)
    }

    /// The path of a subvolume from the filesystem's top. None if it was deleted, or lies deeper than makes sense.
    fn path_of_subvolume(&self, root: u64) -> Option<PathBuf> {
        let mut names = Vec::new();
        let mut at = root;
        while at != TOP {
            if names.len() == DEPTH_MAX {
                return None;
            }
            let key = |offset| Key {
                object: at,
                kind: ROOT_BACKREF,
                offset,
            };
            let mut place = None;
            tree_search::<FEW>(&self.scratch, ROOT_TREE, key(0), key(u64::MAX), |found, data| {
                if found.object == at && found.kind == ROOT_BACKREF && place.is_none() {
                    place = back_reference(data).map(|(folder, name)| (found.offset, folder, name));
                }
                None
            })
            .ok()?;
            let (around, folder, name) = place?;
            let folder = logical_ino::path_of_folder(&self.scratch, around, folder).ok()?;
            names.push(folder.join(name));
            at = around;
        }
        Some(Path::new("/").join(names.into_iter().rev().collect::<PathBuf>()))
    }

    /// The same on XFS, by inodes: it has no call that tells names. Images that are left alone are known by theirs.
    pub(super) fn names_of_holders_xfs(&self, facts: &Facts, reverse_map: bool) -> Result<BTreeMap<String, u64>> {
        if !reverse_map {
            return Ok(BTreeMap::new());
        }
        let mut held = BTreeMap::new();
        for other in self.others()?.unwrap_or_default() {
            let end = other.address + other.length;
            let extents = &facts.extents;
            let first = extents.partition_point(|extent| extent.address + extent.disk_bytes <= other.address);
            let over = extents[first..].iter().take_while(|extent| extent.address < end);
            let shared: u64 = over
                .map(|extent| (extent.address + extent.disk_bytes).min(end) - extent.address.max(other.address))
                .sum();
            if shared > 0 {
                *held.entry(other.inode).or_insert(0u64) += shared;
            }
        }
        let left_alone: BTreeMap<u64, &PathBuf> = self
            .left_alone
            .iter()
            .filter(|((device, _), _)| *device == self.info.device)
            .map(|((_, inode), path)| (*inode, path))
            .collect();
        let name = |inode| match left_alone.get(&inode) {
            Some(path) => named(path, true),
            None => format!("inode {inode}"),
        };
        Ok(held.into_iter().map(|(inode, bytes)| (name(inode), bytes)).collect())
    }
}

fn named(path: &Path, is_left_alone: bool) -> String {
    let note = if is_left_alone { " (left alone)" } else { "" };
    format!("{}{note}", path.to_string_lossy())
}

/// The folder and the name in a back reference.
fn back_reference(data: &[u8]) -> Option<(u64, PathBuf)> {
    use std::os::unix::ffi::OsStrExt;
    let folder = u64::from_le_bytes(data.get(..8)?.try_into().ok()?);
    let length = usize::from(u16::from_le_bytes(data.get(16..18)?.try_into().ok()?));
    let name = std::ffi::OsStr::from_bytes(data.get(18..18 + length)?);
    Some((folder, name.into()))
}
