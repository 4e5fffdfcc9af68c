//! What a pool takes on disk, counted from the filesystem's own records.

use super::{Filesystem, PoolMap};
use crate::error::Result;
use crate::facts::{Extent, Facts};

/// Bytes on disk of the distinct extents that a pool refers to.
pub fn physical_bytes(facts: &Facts) -> u64 {
    facts.extents.iter().map(|extent| extent.disk_bytes).sum()
}

/// Whether there is that very extent, and not a later one at its place.
fn has(facts: &Facts, extent: &Extent) -> bool {
    let extents = &facts.extents;
    let found = extents.binary_search_by_key(&extent.address, |other| other.address);
    found.is_ok_and(|at| extents[at].generation == extent.generation)
}

/// Bytes that are free now and were not: extents that are gone, less those that are new. An extent that the pool no longer
/// refers to, but something else does, is not free. Negative if the pool grew. `free_before` is what the filesystem had free.
///
/// # Errors
/// Those of reading metadata.
pub fn freed_bytes(fs: &dyn Filesystem, before: &Facts, free_before: u64) -> Result<(i64, PoolMap)> {
    let mapped = fs.map(before.budget())?;
    let after = &mapped.facts;
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    if fs.frees_blocks() {
        let counted = signed(physical_bytes(before)) - signed(physical_bytes(after));
        // Sharing blocks never moves data here, so what is referred to now was before.
        if fs.sees_all_holders() {
            return Ok((counted, mapped));
        }
        // Blocks that something outside the pool shares with several images look as if they were freed: then the filesystem has
        // less free than it should, by more than what new references take, and lists that may lie on it.
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
