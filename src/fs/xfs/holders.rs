//! Finds the other holders of images' blocks, for messages.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::Xfs;
use crate::error::Result;
use crate::facts::Facts;
use crate::fs::opened::name_of_holder;

impl Xfs {
    /// Returns the bytes that each other file holds of the images' extents. XFS has no call that returns names, so that files are named by
    /// inode, and images that are left alone by path.
    pub(super) fn find_names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>> {
        if !self.reverse_map {
            return Ok(BTreeMap::new());
        }
        let mut held = BTreeMap::new();
        for other in self.others(facts.budget())?.unwrap_or_default() {
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
            .opened
            .left_alone
            .iter()
            .filter(|(file, _)| file.device == self.info.device)
            .map(|(file, path)| (file.inode, path))
            .collect();
        let name = |inode| match left_alone.get(&inode) {
            Some(path) => name_of_holder(path, true),
            None => format!("inode {inode}"),
        };
        Ok(held.into_iter().map(|(inode, bytes)| (name(inode), bytes)).collect())
    }
}
