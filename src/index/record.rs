//! Records of the index. A record has the extents that begin in one segment of the address space. The format is specified in
//! `formats/index-v2.md`.

use std::ops::Range;

use crate::chunk::{Chunk, Chunker};
use crate::facts::{Compression, Facts};

/// Version of the record format, which is part of the table's name.
pub(super) const VERSION: u32 = 2;

/// What the index remembers of an extent.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct ExtentRecord {
    pub(super) address: u64,
    pub(super) generation: u64,
    /// Its size on disk in bytes.
    pub(super) disk_bytes: u64,
    pub(super) blocks: u32,
    /// The digest of its checksums. It is kept with fingerprints only, and only where the filesystem has checksums.
    pub(super) digest: Option<u128>,
    /// The ranges of its blocks that images reached when it was entered. Chunks were cut within each.
    pub(super) live: Vec<Range<u32>>,
    /// The fingerprints of those blocks, if they had to be computed; none where the filesystem has checksums.
    pub(super) computed: Vec<u32>,
    pub(super) chunks: Vec<Chunk>,
}

impl ExtentRecord {
    /// Makes the record of an extent. `digest` is the digest of its checksums.
    pub(super) fn of(
        facts: &Facts,
        place: usize,
        digest: Option<u128>,
        keep_plain: bool,
        chunker: &mut Chunker,
    ) -> Self {
        let extent = &facts.extents[place];
        let first = extent.first_slot;
        let mut entry = Self {
            address: extent.address,
            generation: extent.generation,
            disk_bytes: extent.disk_bytes,
            blocks: extent.blocks,
            ..Self::default()
        };
        // Where the filesystem has checksums, reading them is faster than reading the index. Data without checksums is overwritten in
        // place, so that address and generation do not identify its content.
        let has_computed = extent.class.checksummed && (keep_plain || extent.class.compression != Compression::None);
        entry.digest = digest.filter(|_| has_computed);
        for run in facts.live_runs(extent.slots()) {
            let fingerprints = facts.fingerprints.range(run.clone());
            chunker.cut(&fingerprints, |chunk| entry.chunks.push(chunk));
            if has_computed {
                entry.computed.extend(fingerprints);
            }
            entry.live.push(run.start - first..run.end - first);
        }
        entry
    }

    /// Returns the address after the extent, so that a later one that overlaps it is recognised.
    pub(super) fn end(&self) -> u64 {
        self.address.saturating_add(self.disk_bytes)
    }

    /// Whether fingerprints are remembered.
    pub(super) fn has_fingerprints(&self) -> bool {
        !self.computed.is_empty()
    }

    /// Returns the remembered fingerprints of each live range of blocks.
    pub(super) fn fingerprints(&self) -> impl Iterator<Item = (Range<u32>, &[u32])> {
        let mut rest = &self.computed[..];
        self.live
            .iter()
            .filter(|_| self.has_fingerprints())
            .map_while(move |run| {
                let (fingerprints, after) = rest.split_at_checked(run.len())?;
                rest = after;
                Some((run.clone(), fingerprints))
            })
    }

    /// Whether each of these ranges is within a live range.
    pub(super) fn covers(&self, mut ranges: impl Iterator<Item = Range<u32>>) -> bool {
        ranges.all(|range| {
            self.live
                .iter()
                .any(|live| live.start <= range.start && range.end <= live.end)
        })
    }
}

/// Encodes a record.
pub(super) fn encode(entries: &[ExtentRecord]) -> Vec<u8> {
    let mut record = Vec::new();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    record.extend(count(entries.len()));
    for entry in entries {
        record.extend(entry.address.to_le_bytes());
        record.extend(entry.generation.to_le_bytes());
        record.extend(entry.disk_bytes.to_le_bytes());
        record.extend(entry.blocks.to_le_bytes());
        record.extend(entry.digest.unwrap_or(0).to_le_bytes());
        record.extend(count(entry.live.len()));
        for run in &entry.live {
            record.extend(run.start.to_le_bytes());
            record.extend(run.end.to_le_bytes());
        }
        record.extend(count(entry.computed.len()));
        entry
            .computed
            .iter()
            .for_each(|fingerprint| record.extend(fingerprint.to_le_bytes()));
        record.extend(count(entry.chunks.len()));
        for chunk in &entry.chunks {
            record.extend(chunk.blocks.to_le_bytes());
            record.extend(chunk.weak_id.to_le_bytes());
        }
    }
    let hash = xxhash_rust::xxh3::xxh3_64(&record);
    record.extend(hash.to_le_bytes());
    record
}

/// Decodes a record; `None` if its hash is wrong or it makes no sense.
pub(super) fn decode(record: &[u8]) -> Option<Vec<ExtentRecord>> {
    let (payload, hash) = record.split_last_chunk::<8>()?;
    if xxhash_rust::xxh3::xxh3_64(payload) != u64::from_le_bytes(*hash) {
        return None;
    }
    let mut reader = Reader(payload);
    let count = reader.u32()?;
    // BOUND: every count is checked against the bytes that are left before anything is allocated for it.
    let mut entries = Vec::with_capacity(reader.at_most(count, 56)?);
    for _ in 0..count {
        let (address, generation, disk_bytes, blocks) = (reader.u64()?, reader.u64()?, reader.u64()?, reader.u32()?);
        let digest = Some(reader.u128()?).filter(|digest| *digest != 0);
        let (mut live, mut last) = (Vec::new(), 0);
        for _ in 0..reader.u32()? {
            let run = reader.u32()?..reader.u32()?;
            if run.is_empty() || run.start < last || run.end > blocks {
                return None;
            }
            last = run.end;
            live.push(run);
        }
        let computed = reader.u32()?;
        let _ = reader.at_most(computed, 4)?;
        let computed = (0..computed).map(|_| reader.u32()).collect::<Option<Vec<_>>>()?;
        if !computed.is_empty() && computed.len() != live.iter().map(ExactSizeIterator::len).sum::<usize>() {
            return None;
        }
        let chunks = reader.u32()?;
        let _ = reader.at_most(chunks, 10)?;
        let chunks = (0..chunks)
            .map(|_| {
                Some(Chunk {
                    blocks: reader.u16()?,
                    weak_id: reader.u64()?,
                })
            })
            .collect::<Option<Vec<_>>>()?;
        entries.push(ExtentRecord {
            address,
            generation,
            disk_bytes,
            blocks,
            digest,
            live,
            computed,
            chunks,
        });
    }
    reader.0.is_empty().then_some(entries)
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn u128(&mut self) -> Option<u128> {
        self.take().map(u128::from_le_bytes)
    }

    fn at_most(&self, count: u32, bytes_each: usize) -> Option<usize> {
        (count as usize <= self.0.len() / bytes_each).then_some(count as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry() -> impl Strategy<Value = ExtentRecord> {
        let chunks = prop::collection::vec((any::<u16>(), any::<u64>()), 0..5);
        (any::<u32>(), any::<u64>(), 1u32..50, any::<bool>(), 0u128..9, chunks).prop_map(
            |(address, generation, blocks, computed, digest, chunks)| ExtentRecord {
                address: address.into(),
                generation,
                disk_bytes: u64::from(blocks) * 4096,
                blocks,
                digest: Some(digest).filter(|digest| *digest != 0),
                live: std::iter::once(0..blocks).collect(),
                computed: if computed { (0..blocks).collect() } else { Vec::new() },
                chunks: chunks
                    .into_iter()
                    .map(|(blocks, weak_id)| Chunk { blocks, weak_id })
                    .collect(),
            },
        )
    }

    proptest! {
        #[test]
        fn records_come_back_as_they_were(entries in prop::collection::vec(entry(), 0..6)) {
            prop_assert_eq!(decode(&encode(&entries)), Some(entries));
        }

        #[test]
        fn a_damaged_record_is_no_record(entries in prop::collection::vec(entry(), 1..4), at: prop::sample::Index, bit in 0u8..8) {
            let mut record = encode(&entries);
            let at = at.index(record.len());
            record[at] ^= 1 << bit;
            prop_assert_eq!(decode(&record), None);
        }

        #[test]
        fn no_record_is_too_strange(mut bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let hash = xxhash_rust::xxh3::xxh3_64(&bytes);
            bytes.extend(hash.to_le_bytes());
            let _ = decode(&bytes);
        }
    }
}
