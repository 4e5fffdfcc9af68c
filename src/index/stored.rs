//! What an archive holds of a filesystem's extents, so that an export need not read unchanged extents. It is a cache like the rest: an
//! entry counts only for the same extent with the same checksums, and for an archive that has the same commit.
//!
//! The format is specified in `formats/index-v2.md`.

use crate::archive::reader::Committed;
use crate::codec::{Decoded, Decoder};
use crate::content::{Content, KnownSlots};
use crate::facts::Extent;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::shown::hex;

/// The prefix of the tables' names.
const TREE_PREFIX: &str = "archive-v1-";
/// Entries that are read or written at a time.
pub(super) const AT_ONCE: usize = 1024;
/// Marks a range of zeros in place of a store address.
pub(super) const ZEROS: StoreBlock = StoreBlock(u32::MAX);

/// A range of an extent, and the store blocks that an archive has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StoredRange {
    pub(super) block: u32,
    pub(super) blocks: u32,
    pub(super) store: StoreBlock,
}

/// Returns the name of an archive's table.
pub(super) fn tree_of(archive: &[u8; 16]) -> Vec<u8> {
    format!("{TREE_PREFIX}{}", hex(archive)).into_bytes()
}

pub(super) fn key(extent: &Extent) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&extent.address.to_be_bytes());
    key[8..].copy_from_slice(&extent.generation.to_be_bytes());
    key
}

pub(super) fn encode(digest: u128, committed: &Committed, parts: &[StoredRange]) -> Vec<u8> {
    let mut entry = digest.to_le_bytes().to_vec();
    entry.extend(committed.commit.number.0.to_le_bytes());
    entry.extend(committed.location.body_hash);
    for part in parts {
        for number in [part.block, part.blocks, part.store.0] {
            entry.extend(number.to_le_bytes());
        }
    }
    let hash = xxhash_rust::xxh3::xxh3_64(&entry);
    entry.extend(hash.to_le_bytes());
    entry
}

/// Decodes an entry; `None` if it is damaged, or not for an extent with this digest and one of these commits.
pub(super) fn decode(entry: &[u8], digest: u128, commits: &[Committed]) -> Option<Vec<StoredRange>> {
    let (content, hash) = entry.split_last_chunk::<8>()?;
    if xxhash_rust::xxh3::xxh3_64(content).to_le_bytes() != *hash {
        return None;
    }
    let fields = || -> Decoded<Option<Vec<StoredRange>>> {
        let mut decoder = Decoder::new(content);
        if decoder.array()? != digest.to_le_bytes() {
            return Ok(None);
        }
        let (number, commit_hash) = (CommitNumber(decoder.u32()?), decoder.array::<32>()?);
        let mut commits = commits.iter();
        let Some(commit) =
            commits.find(|committed| committed.commit.number == number && committed.location.body_hash == commit_hash)
        else {
            return Ok(None);
        };
        let mut parts = Vec::new();
        while decoder.left() > 0 {
            let part = StoredRange {
                block: decoder.u32()?,
                blocks: decoder.u32()?,
                store: StoreBlock(decoder.u32()?),
            };
            let end = part.store.checked_add(part.blocks);
            if part.store != ZEROS && end.is_none_or(|end| end > commit.commit.store_end) {
                return Ok(None);
            }
            parts.push(part);
        }
        Ok(Some(parts))
    };
    fields().ok().flatten()
}

/// Returns the parts of an extent in the order of their slots; none if they make no sense.
pub(super) fn slots_of(extent: &Extent, parts: &[StoredRange]) -> Vec<KnownSlots> {
    let inside = |part: &StoredRange| {
        let end = part.block.checked_add(part.blocks);
        end.is_some_and(|end| end <= extent.blocks)
    };
    let in_order = |pair: &[StoredRange]| pair[0].block + pair[0].blocks <= pair[1].block;
    if !parts.iter().all(inside) || !parts.windows(2).all(in_order) {
        return Vec::new();
    }
    let known = |part: &StoredRange| KnownSlots {
        slot: extent.first_slot + part.block,
        blocks: part.blocks,
        content: match part.store {
            ZEROS => Content::Zeros,
            store => Content::Stored(store),
        },
    };
    parts.iter().map(known).collect()
}
