//! Who else holds extents of the images, by names that the user knows: for messages.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Btrfs, ROOT_TREE};
use crate::facts::{Extent, Facts, PinReason};
use crate::fs::opened::name_of_holder;
use crate::pool::users::FileId;
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

impl Btrfs {
    /// Names of files that hold extents and are none of the images that are worked on, the largest extents first, with the bytes
    /// they hold.
    pub(super) fn find_names_of_holders(&self, facts: &Facts) -> BTreeMap<String, u64> {
        /// Extents asked for: enough to name who matters.
        const EXTENTS_MAX: usize = 64;
        let mut held: Vec<&Extent> = facts
            .extents
            .iter()
            .filter(|extent| extent.pinned == Some(PinReason::HeldByOthers))
            .collect();
        held.sort_by_key(|extent| std::cmp::Reverse(extent.disk_bytes));
        let mine: HashSet<(u64, u64)> = self
            .opened
            .images
            .iter()
            .map(|image| (image.root, image.inode))
            .collect();
        let mut bytes = BTreeMap::new();
        for extent in held.into_iter().take(EXTENTS_MAX) {
            let holders = holders(self.opened.scratch.folder(), extent.address)
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
        let (Some(subvolume), Ok(inside)) = (
            subvolume,
            logical_ino::path_in_subvolume(self.opened.scratch.folder(), root, inode),
        ) else {
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
        let is_left_alone = there.is_some_and(|there| self.opened.left_alone.contains_key(&FileId::from(&there)));
        name_of_holder(&path, is_left_alone)
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
            tree_search::<FEW>(
                self.opened.scratch.folder(),
                ROOT_TREE,
                key(0),
                key(u64::MAX),
                |found, data| {
                    if found.object == at && found.kind == ROOT_BACKREF && place.is_none() {
                        place = back_reference(data).map(|(folder, name)| (found.offset, folder, name));
                    }
                    None
                },
            )
            .ok()?;
            let (around, folder, name) = place?;
            let folder = logical_ino::path_of_folder(self.opened.scratch.folder(), around, folder).ok()?;
            names.push(folder.join(name));
            at = around;
        }
        Some(Path::new("/").join(names.into_iter().rev().collect::<PathBuf>()))
    }
}

/// The folder and the name in a back reference.
fn back_reference(data: &[u8]) -> Option<(u64, PathBuf)> {
    use std::os::unix::ffi::OsStrExt;
    let folder = u64::from_le_bytes(data.get(..8)?.try_into().ok()?);
    let length = usize::from(u16::from_le_bytes(data.get(16..18)?.try_into().ok()?));
    let name = std::ffi::OsStr::from_bytes(data.get(18..18 + length)?);
    Some((folder, name.into()))
}
