//! What a pool takes on disk, counted from the filesystem's own records.

use std::collections::BTreeMap;

use super::{Mapped, Volume};
use crate::error::Result;
use crate::facts::Facts;
use crate::fs::Sharing;

/// The distinct extents that a pool refers to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Physical {
    /// Their bytes on disk.
    pub bytes: u64,
    /// By address: generation and bytes.
    extents: BTreeMap<u64, (u64, u64)>,
}

impl Physical {
    /// Counts the extents of a map.
    pub fn of(facts: &Facts) -> Self {
        let extents = facts
            .extents
            .iter()
            .map(|extent| (extent.address, (extent.generation, extent.disk_bytes)));
        let extents: BTreeMap<_, _> = extents.collect();
        Self {
            bytes: extents.values().map(|(_, bytes)| bytes).sum(),
            extents,
        }
    }
}

/// Bytes that are free now and were not: extents that are gone, less those that are new. An extent that the pool no longer
/// refers to, but something else does, is not free. Negative if the pool grew. `free_before` is what the filesystem had free.
///
/// # Errors
/// Those of reading metadata.
pub fn freed_bytes(fs: &Volume, before: &Physical, free_before: u64) -> Result<(i64, Mapped)> {
    let mapped = fs.map()?;
    let after = Physical::of(&mapped.facts);
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    if fs.frees_blocks() {
        let counted = signed(before.bytes) - signed(after.bytes);
        // Sharing blocks never moves data here, so what is referred to now was before.
        if fs.sees_all_holders() {
            return Ok((counted, mapped));
        }
        // Blocks that something outside the pool shares with several images look as if they were freed: then the filesystem has
        // less free than it should, by more than what new references take.
        let free = signed(fs.free_bytes()?) - signed(free_before);
        let slack = counted / 64 + (1 << 20);
        return Ok((if free + slack < counted { free } else { counted }, mapped));
    }
    let mut freed = 0i64;
    for (address, (generation, bytes)) in &before.extents {
        let kept = after.extents.get(address).is_some_and(|(now, _)| now == generation);
        if !kept && !fs.is_allocated(*address, *generation)? {
            freed += signed(*bytes);
        }
    }
    for (address, (generation, bytes)) in &after.extents {
        if before.extents.get(address).is_none_or(|(then, _)| then != generation) {
            freed -= signed(*bytes);
        }
    }
    Ok((freed, mapped))
}
