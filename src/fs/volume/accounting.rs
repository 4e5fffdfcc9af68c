//! What a pool takes on disk, counted from the trees.

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
/// refers to, but something else does, is not free. Negative if the pool grew.
///
/// # Errors
/// Those of reading metadata.
pub fn freed_bytes(fs: &Volume, before: &Physical) -> Result<(i64, Mapped)> {
    let mapped = fs.map()?;
    let after = Physical::of(&mapped.facts);
    let mut freed = 0i64;
    let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
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
