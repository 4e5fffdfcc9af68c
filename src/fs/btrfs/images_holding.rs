//! Finds the files of a subvolume that hold given extents, by name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

use crate::fs::HoldingImage;
use crate::sys::existing::existing;
use crate::sys::logical_ino;

/// Returns the files of the subvolume that `path` is or will be in that hold extents at these addresses.
pub(in crate::fs) fn images_holding(path: &Path, folder: &File, addresses: &[u64]) -> Option<Vec<HoldingImage>> {
    let subvolume = logical_ino::subvolume_of(folder).ok()?;
    let top = top_of_subvolume(path)?;
    let mut held: BTreeMap<u64, usize> = BTreeMap::new();
    for address in addresses {
        // An extent that was freed since has no holders.
        let Ok(Some(found)) = logical_ino::holders(folder, *address) else {
            continue;
        };
        let inodes: BTreeSet<u64> = found
            .iter()
            .filter(|holder| holder.root == subvolume)
            .map(|holder| holder.inode)
            .collect();
        for inode in inodes {
            *held.entry(inode).or_default() += 1;
        }
    }
    let paths = held.into_iter().filter_map(|(inode, extents)| {
        let path = logical_ino::path_in_subvolume(folder, subvolume, inode).ok()?;
        let path = top.join(path);
        path.is_file().then_some(HoldingImage { extents, path })
    });
    Some(paths.collect())
}

/// Returns the root folder of the subvolume that a path is or will be in.
fn top_of_subvolume(path: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    /// `BTRFS_FIRST_FREE_OBJECTID`: the inode number of the root folder of every subvolume.
    const TOP: u64 = 256;
    let existing = existing(path).canonicalize().ok()?;
    let top = existing
        .ancestors()
        .find(|folder| folder.metadata().is_ok_and(|metadata| metadata.ino() == TOP));
    top.map(Path::to_owned)
}
