//! Bytes that a pool takes on disk, and bytes that a run freed, counted from the filesystem's own metadata.

use super::{Filesystem, PoolMap};
use crate::error::Result;
use crate::facts::{Extent, Facts};

/// Returns the bytes on disk of the distinct extents that a pool refers to.
pub fn physical_bytes(facts: &Facts) -> u64 {
    facts.extents.iter().map(|extent| extent.disk_bytes).sum()
}

/// Whether `facts` have this very extent, and not a later one at its address.
fn has(facts: &Facts, extent: &Extent) -> bool {
    let extents = &facts.extents;
    let found = extents.binary_search_by_key(&extent.address, |other| other.address);
    found.is_ok_and(|at| extents[at].generation == extent.generation)
}

/// Returns the bytes that a run freed, and the map of the pool after it. Freed bytes are those of extents that no longer exist, less those
/// of new ones: an extent that the pool dropped, but something else still refers to, is not freed. The number is negative if the pool grew.
/// `free_before` is the filesystem's free space before the run.
///
/// # Errors
/// Returns the errors of [`Filesystem::map`], [`Filesystem::free_bytes`] and [`Filesystem::is_allocated`].
pub fn freed_bytes(fs: &dyn Filesystem, before: &Facts, free_before: u64) -> Result<(i64, PoolMap)> {
    let mapped = fs.map(before.budget())?;
    let after = &mapped.facts;
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    if fs.frees_blocks() {
        let counted = signed(physical_bytes(before)) - signed(physical_bytes(after));
        // Sharing blocks never moves data on such a filesystem, so that every block in use after the run was in use before.
        if fs.sees_all_holders() {
            return Ok((counted, mapped));
        }
        // Blocks that something outside the pool shares with several images look as if they were freed. Then the filesystem has less free
        // space than counted, by more than the metadata of new references takes, and the spill files that may lie on it.
        let free = signed(fs.free_bytes()?) - signed(free_before);
        let slack = counted / 64 + (1 << 20) + signed(before.budget().bytes_in_files() as u64);
        return Ok((if free + slack < counted { free } else { counted }, mapped));
    }
    let mut freed = 0i64;
    for extent in before.extents.iter().filter(|extent| !has(after, extent)) {
        if !fs.is_allocated(extent.address, extent.generation)? {
            freed += signed(extent.disk_bytes);
        }
    }
    for extent in after.extents.iter().filter(|extent| !has(before, extent)) {
        freed -= signed(extent.disk_bytes);
    }
    Ok((freed, mapped))
}
