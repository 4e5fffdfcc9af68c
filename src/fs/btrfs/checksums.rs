//! Reads the checksums that btrfs keeps of data.

use super::{Btrfs, CHECKSUM_OBJECT, CHECKSUM_TREE, EXTENT_CSUM};
use crate::block::{BLOCK_BYTES, SlotSet};
use crate::error::Result;
use crate::facts::{Compression, Facts};
use crate::numbers::ExtentId;
use crate::spill::SpillVec;
use crate::sys::tree_search::Key;

/// Fills in the fingerprints of uncompressed extents from their checksums, and adds their slots to `known`.
///
/// # Errors
/// Returns [`crate::error::Error::Io`] if the checksum tree cannot be read.
pub(super) fn fingerprints_from_checksums(fs: &Btrfs, facts: &mut Facts, known: &mut SlotSet) -> Result<()> {
    let width = usize::from(fs.checksum_bytes);
    let mut sums = std::mem::take(&mut facts.fingerprints);
    let mut found_sums = Vec::new();
    let visited = visit_checksums(fs, facts, |extent, block, item| {
        let extent = &facts.extents[extent.index()];
        if extent.class.compression == Compression::None {
            found_sums.clear();
            let words = item.chunks_exact(width).filter_map(|sum| sum.first_chunk());
            found_sums.extend(words.map(|word| u32::from_le_bytes(*word)));
            let slot = extent.first_slot + block;
            sums.write(slot, &found_sums);
            known.insert_range(slot..slot + u32::try_from(found_sums.len()).unwrap_or(0));
        }
    });
    facts.fingerprints = sums;
    visited
}

/// Returns a digest of the checksums of each extent's bytes on disk; `None` for an extent without checksums.
///
/// # Errors
/// Returns [`crate::error::Error::Io`] if the checksum tree cannot be read.
pub(super) fn checksum_digests(fs: &Btrfs, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
    let width = usize::from(fs.checksum_bytes).max(1);
    let mut digests = SpillVec::of_in(None, facts.extents.len(), facts.budget());
    let mut hasher = xxhash_rust::xxh3::Xxh3Default::new();
    let (mut current, mut next_block) = (None, 0);
    visit_checksums(fs, facts, |extent, block, item| {
        if current != Some(extent) {
            if let Some(finished) = current.replace(extent) {
                digests[finished.index()] = Some(hasher.digest128());
            }
            hasher.reset();
            next_block = 0;
        }
        // The digest covers which blocks have no checksum, and not how checksums are cut into items.
        if block != next_block {
            hasher.update(&block.to_le_bytes());
        }
        hasher.update(item);
        next_block = block + u32::try_from(item.len() / width).unwrap_or(0);
    })?;
    if let Some(finished) = current {
        digests[finished.index()] = Some(hasher.digest128());
    }
    Ok(digests)
}

/// Calls `visit` with the checksums of extents, in order: the extent, its block on disk that the first checksum belongs to, and the
/// checksums of consecutive blocks from there. It may call several times for an extent.
fn visit_checksums(fs: &Btrfs, facts: &Facts, mut visit: impl FnMut(ExtentId, u32, &[u8])) -> Result<()> {
    /// Bytes of data that one item covers at most: those of a 64 KiB leaf full of the shortest checksums.
    const ITEM_COVERS_MAX: u64 = 64 << 20;
    let width = usize::from(fs.checksum_bytes).max(1);
    let key = |offset| Key {
        object: CHECKSUM_OBJECT,
        kind: EXTENT_CSUM,
        offset,
    };
    let (Some(first), Some(last)) = (facts.extents.first(), facts.extents.last()) else {
        return Ok(());
    };
    let from = key(first.address.saturating_sub(ITEM_COVERS_MAX));
    let last = key(last.address + last.disk_bytes);
    let end_of = |extent: &crate::facts::Extent| extent.address + extent.disk_bytes;
    let mut place = 0;
    fs.search(CHECKSUM_TREE, from, last, |found, item| {
        let start = found.offset;
        let end = start + (item.len() / width) as u64 * BLOCK_BYTES;
        let extent_at = |place: usize| facts.extents.get(place);
        while extent_at(place).is_some_and(|extent| end_of(extent) <= start) {
            place += 1;
        }
        let mut at = place;
        while let Some(extent) = extent_at(at).filter(|extent| extent.address < end) {
            let (from, to) = (extent.address.max(start), end_of(extent).min(end));
            let byte = |address: u64| usize::try_from((address - start) / BLOCK_BYTES).unwrap_or(usize::MAX) * width;
            let block = u32::try_from((from - extent.address) / BLOCK_BYTES).unwrap_or(u32::MAX);
            if from < to {
                visit(
                    ExtentId::at(at),
                    block,
                    item.get(byte(from)..byte(to)).unwrap_or_default(),
                );
            }
            at += 1;
        }
        // Much data of other files may lie between two extents.
        let next = extent_at(place).map_or(u64::MAX, |extent| extent.address);
        (next > end.saturating_add(ITEM_COVERS_MAX)).then(|| key(next.saturating_sub(ITEM_COVERS_MAX)))
    })
}
