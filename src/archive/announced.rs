//! The part of a PLAN that announces blocks: how they are cut and what their fingerprints are, so that they can be found on a disk before
//! they come.

use super::limits::{ANNOUNCED_BLOCKS_MAX, CHUNK_BLOCKS_MAX};
use super::manifest::store_block;
use crate::codec::{Decoded, Decoder};
use crate::fingerprint::FingerprintFunction;
use crate::numbers::StoreBlock;

/// Chunks of new blocks, and the fingerprints that they were found by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnouncedBlocks {
    /// The store address of the first.
    pub first: StoreBlock,
    /// What the fingerprints are.
    pub function: FingerprintFunction,
    /// The blocks of each chunk.
    pub chunks: Vec<u8>,
    /// The fingerprint of each block.
    pub fingerprints: Vec<u32>,
}

impl AnnouncedBlocks {
    /// Returns the address after the last.
    pub fn end(&self) -> StoreBlock {
        self.first + u32::try_from(self.fingerprints.len()).unwrap_or(0)
    }

    /// Appends its bytes.
    pub fn put(&self, encoded: &mut Vec<u8>) {
        encoded.extend(u64::from(self.first.0).to_le_bytes());
        let function = match self.function {
            FingerprintFunction::Crc32c => 0,
            FingerprintFunction::Xxhash64 => 1,
        };
        encoded.extend([function, 0, 0, 0]);
        encoded.extend(u32::try_from(self.chunks.len()).unwrap_or(u32::MAX).to_le_bytes());
        encoded.extend(&self.chunks);
        for fingerprint in &self.fingerprints {
            encoded.extend(fingerprint.to_le_bytes());
        }
    }

    /// Decodes it, to the end.
    ///
    /// # Errors
    /// Returns what is malformed.
    pub fn decode(mut decoder: Decoder<'_>) -> Decoded<Self> {
        let first = store_block(decoder.u64()?)?;
        let function = match decoder.u8()? {
            0 => FingerprintFunction::Crc32c,
            1 => FingerprintFunction::Xxhash64,
            _ => return Err("its fingerprints are of a kind not known".into()),
        };
        decoder.zeros(3)?;
        let count = usize::try_from(decoder.u32()?).unwrap_or(usize::MAX);
        let chunks = decoder.take(count)?.to_vec();
        if chunks.iter().any(|blocks| *blocks == 0 || *blocks > CHUNK_BLOCKS_MAX) {
            return Err("a chunk is empty or longer than allowed".into());
        }
        let blocks: usize = chunks.iter().map(|blocks| usize::from(*blocks)).sum();
        if blocks > ANNOUNCED_BLOCKS_MAX || u64::from(first.0) + blocks as u64 > u64::from(StoreBlock::END_MAX.0) {
            return Err("it announces more blocks than allowed".into());
        }
        let fingerprints = decoder.take(blocks * 4)?.as_chunks().0;
        decoder.end()?;
        Ok(Self {
            first,
            function,
            chunks,
            fingerprints: fingerprints.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn blocks_come_back(chunks in prop::collection::vec(1u8..=16, 0..100), first in 0u32..1000, strange: Vec<u8>) {
            let blocks: u32 = chunks.iter().map(|n| u32::from(*n)).sum();
            let announced = AnnouncedBlocks { first: StoreBlock(first), function: FingerprintFunction::Xxhash64, chunks, fingerprints: (0..blocks).collect() };
            let mut encoded = Vec::new();
            announced.put(&mut encoded);
            prop_assert_eq!(AnnouncedBlocks::decode(Decoder::new(&encoded)), Ok(announced));
            let _ = AnnouncedBlocks::decode(Decoder::new(&strange));
        }
    }
}
