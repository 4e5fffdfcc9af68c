//! Finds the other holders of images' extents, by names that the user knows, for messages.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{Btrfs, ROOT_TREE};
use crate::facts::{Extent, Facts, PinReason};
use crate::fs::opened::name_of_holder;
use crate::pool::users::FileId;
use crate::pool::{MountedAt, mounted_at};
use crate::sys::logical_ino::{self, Holder, holders};
use crate::sys::tree_search::{FEW, Key, tree_search};

/// `BTRFS_FS_TREE_OBJECTID`: the top-level subvolume, which all others lie in.
const TOP: u64 = 5;
/// `BTRFS_ROOT_BACKREF_KEY`: the place of a subvolume. The key's offset is the subvolume around it; the data has the inode of the folder
/// there (u64), a sequence number (u64), a length (u16) and the name.
const ROOT_BACKREF: u8 = 144;
/// The most nested subvolumes that a path leads through.
const DEPTH_MAX: usize = 64;

/// A file of a btrfs. An inode number means one file in each subvolume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SubvolumeFile {
    /// The tree id of the subvolume.
    root: u64,
    /// The inode number in it.
    inode: u64,
}

impl From<&Holder> for SubvolumeFile {
    fn from(holder: &Holder) -> Self {
        Self {
            root: holder.root,
            inode: holder.inode,
        }
    }
}

impl Btrfs {
    /// Returns the files of the images.
    pub(super) fn own_files(&self) -> HashSet<SubvolumeFile> {
        let images = self.opened.images.iter();
        images
            .map(|image| SubvolumeFile {
                root: image.root,
                inode: image.inode,
            })
            .collect()
    }

    /// Returns the files outside the pool that hold extents of it, by name, with the bytes that they hold.
    pub(super) fn find_names_of_holders(&self, facts: &Facts) -> BTreeMap<String, u64> {
        /// Extents that the kernel is asked about, the largest first: enough to name the files that matter.
        const EXTENTS_MAX: usize = 64;
        let mut held: Vec<&Extent> = facts
            .extents
            .iter()
            .filter(|extent| extent.pinned == Some(PinReason::HeldByOthers))
            .collect();
        held.sort_by_key(|extent| std::cmp::Reverse(extent.disk_bytes));
        let own_files = self.own_files();
        let mut bytes = BTreeMap::new();
        for extent in held.into_iter().take(EXTENTS_MAX) {
            let holders = holders(self.opened.scratch.folder(), extent.address)
                .ok()
                .flatten()
                .unwrap_or_default();
            let others: HashSet<_> = holders
                .iter()
                .map(SubvolumeFile::from)
                .filter(|file| !own_files.contains(file))
                .collect();
            for other in others {
                *bytes.entry(other).or_insert(0u64) += extent.disk_bytes;
            }
        }
        let mounts = mounted_at("btrfs", |folder| {
            crate::sys::fs_info::fs_info(folder).is_ok_and(|found| found == self.info)
        });
        let mut folders = BTreeMap::new();
        let mut names = BTreeMap::new();
        for (file, bytes) in bytes {
            let folder = folders
                .entry(file.root)
                .or_insert_with(|| self.path_of_subvolume(file.root));
            let name = self.name_of(folder.as_deref(), file, &mounts);
            *names.entry(name).or_insert(0) += bytes;
        }
        names
    }

    /// Returns the path of a file from a mount point, or as much of it as is known.
    fn name_of(&self, subvolume: Option<&Path>, file: SubvolumeFile, mounts: &[MountedAt]) -> String {
        let SubvolumeFile { root, inode } = file;
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
        // Another filesystem may be mounted over the path.
        let metadata = path.symlink_metadata().ok().filter(|metadata| metadata.ino() == inode);
        let is_left_alone =
            metadata.is_some_and(|metadata| self.opened.left_alone.contains_key(&FileId::from(&metadata)));
        name_of_holder(&path, is_left_alone)
    }

    /// Returns the path of a subvolume from the filesystem's top; `None` if the subvolume was deleted, or is nested deeper than
    /// [`DEPTH_MAX`].
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

/// Returns the folder's inode and the name in a back reference.
fn back_reference(data: &[u8]) -> Option<(u64, PathBuf)> {
    use std::os::unix::ffi::OsStrExt;
    let folder = u64::from_le_bytes(data.get(..8)?.try_into().ok()?);
    let length = usize::from(u16::from_le_bytes(data.get(16..18)?.try_into().ok()?));
    let name = std::ffi::OsStr::from_bytes(data.get(18..18 + length)?);
    Some((folder, name.into()))
}
