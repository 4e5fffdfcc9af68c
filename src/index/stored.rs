//! What an archive holds of a filesystem's extents, so that an export need not read what did not change. A cache as the rest:
//! an entry counts only for the very extent, with the very checksums, and for an archive that has the very commit.
//!
//! Specified in `formats/index-v1.md`.

use super::Index;
use crate::archive::reader::Committed;
use crate::codec::{Decoded, Decoder};
use crate::content::{Content, KnownSlots, StoreBlock};
use crate::error::Result;
use crate::facts::{Extent, Facts};
use crate::shown::hex;
use crate::spill::SpillVec;

/// What the names of these trees begin with.
const TREE_PREFIX: &str = "archive-v1-";
/// Entries read or written at a time.
const AT_ONCE: usize = 1024;
/// Stands for zeros where a store address stands else.
const ZEROS: StoreBlock = StoreBlock::MAX;

/// A range of an extent and what it is in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    block: u32,
    blocks: u32,
    store: StoreBlock,
}

/// The name of the tree of an archive.
fn tree_of(archive: &[u8; 16]) -> Vec<u8> {
    format!("{TREE_PREFIX}{}", hex(archive)).into_bytes()
}

fn key(extent: &Extent) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&extent.address.to_be_bytes());
    key[8..].copy_from_slice(&extent.generation.to_be_bytes());
    key
}

fn encode(digest: u128, committed: &Committed, parts: &[Part]) -> Vec<u8> {
    let mut out = digest.to_le_bytes().to_vec();
    out.extend(committed.commit.number.to_le_bytes());
    out.extend(committed.location.body_hash);
    for part in parts {
        for number in [part.block, part.blocks, part.store] {
            out.extend(number.to_le_bytes());
        }
    }
    let hash = xxhash_rust::xxh3::xxh3_64(&out);
    out.extend(hash.to_le_bytes());
    out
}

/// What an entry says, if it is for an extent with this digest and for one of these commits.
fn decode(entry: &[u8], digest: u128, commits: &[Committed]) -> Option<Vec<Part>> {
    let (content, hash) = entry.split_last_chunk::<8>()?;
    if xxhash_rust::xxh3::xxh3_64(content).to_le_bytes() != *hash {
        return None;
    }
    let fields = || -> Decoded<Option<Vec<Part>>> {
        let mut decoder = Decoder::new(content);
        if decoder.array()? != digest.to_le_bytes() {
            return Ok(None);
        }
        let (number, commit_hash) = (decoder.u32()?, decoder.array::<32>()?);
        let mut commits = commits.iter();
        let Some(commit) = commits.find(|one| one.commit.number == number && one.location.body_hash == commit_hash)
        else {
            return Ok(None);
        };
        let mut parts = Vec::new();
        while decoder.left() > 0 {
            let part = Part {
                block: decoder.u32()?,
                blocks: decoder.u32()?,
                store: decoder.u32()?,
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

/// The parts of an extent in the order of their slots; none if they do not make sense.
fn slots_of(extent: &Extent, parts: &[Part]) -> Vec<KnownSlots> {
    let inside = |part: &Part| {
        let end = part.block.checked_add(part.blocks);
        end.is_some_and(|end| end <= extent.blocks)
    };
    let in_order = |pair: &[Part]| pair[0].block + pair[0].blocks <= pair[1].block;
    if !parts.iter().all(inside) || !parts.windows(2).all(in_order) {
        return Vec::new();
    }
    let known = |part: &Part| KnownSlots {
        slot: extent.first_slot + part.block,
        blocks: part.blocks,
        content: match part.store {
            ZEROS => Content::Zeros,
            store => Content::Stored(store),
        },
    };
    parts.iter().map(known).collect()
}

impl Index {
    /// What an archive with these commits is known to hold of a pool: extents whose live blocks it has all, in order.
    ///
    /// # Errors
    /// Those of the index.
    pub fn stored(
        &self,
        archive: &[u8; 16],
        commits: &[Committed],
        facts: &Facts,
        digests: &[Option<u128>],
    ) -> Result<SpillVec<KnownSlots>> {
        let mut known = SpillVec::new_in(facts.budget());
        let extents = facts.extents.iter().zip(digests);
        let mut extents =
            extents.filter_map(|(extent, digest)| Some((extent, digest.filter(|_| extent.class.checksummed)?)));
        loop {
            let some: Vec<(&Extent, u128)> = extents.by_ref().take(AT_ONCE).collect();
            if some.is_empty() {
                return Ok(known);
            }
            let keys = some.iter().map(|(extent, _)| key(extent).to_vec()).collect();
            let entries = self.database.get(&tree_of(archive), keys);
            let entries = entries.map_err(|problem| self.error(problem))?;
            for ((extent, digest), entry) in some.into_iter().zip(entries) {
                let Some(parts) = entry.and_then(|entry| decode(&entry, digest, commits)) else {
                    continue;
                };
                known.extend(slots_of(extent, &parts));
            }
        }
    }

    /// Remembers what a commit made an archive hold of a pool: ascending ranges of slots, each with whether that is news.
    ///
    /// # Errors
    /// Those of the index.
    pub fn remember_stored(
        &self,
        archive: &[u8; 16],
        committed: &Committed,
        facts: &Facts,
        digests: &[Option<u128>],
        known: impl Iterator<Item = (KnownSlots, bool)>,
    ) -> Result<()> {
        let tree = tree_of(archive);
        let put = |batch| self.database.put(&tree, batch).map_err(|problem| self.error(problem));
        let mut known = known.peekable();
        let mut batch = Vec::new();
        for (extent, digest) in facts.extents.iter().zip(digests) {
            let (mut parts, mut is_new) = (Vec::new(), false);
            while let Some((slots, is_news)) = known.peek().filter(|(slots, _)| slots.slot < extent.slots().end) {
                let start = slots.slot.max(extent.first_slot);
                is_new |= is_news;
                parts.push(Part {
                    block: start - extent.first_slot,
                    blocks: slots.end().min(extent.slots().end) - start,
                    store: match slots.content_at(start) {
                        Content::Stored(store) => store,
                        _ => ZEROS,
                    },
                });
                if slots.end() > extent.slots().end {
                    break;
                }
                known.next();
            }
            if let Some(digest) = digest.filter(|_| is_new && extent.class.checksummed) {
                batch.push((key(extent).to_vec(), encode(digest, committed, &parts)));
            }
            if batch.len() == AT_ONCE {
                put(std::mem::take(&mut batch))?;
            }
        }
        put(batch)?;
        self.database.flush().map_err(|problem| self.error(problem))
    }
}
