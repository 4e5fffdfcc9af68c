//! INDEX: the hashes of stored blocks.

use super::limits::INDEX_BLOCKS_MAX;
use super::manifest::store_block;
use super::record::Hash;
use crate::codec::{Decoded, Decoder};
use crate::numbers::StoreBlock;

/// Bytes before the hashes.
pub const FIXED_BYTES: u64 = 16;
/// Bytes of a hash.
pub const HASH_BYTES: u64 = 32;

/// Writes the body of an INDEX.
pub fn encode(first: StoreBlock, hashes: &[Hash]) -> Vec<u8> {
    let mut out = u64::from(first.0).to_le_bytes().to_vec();
    out.extend(u32::try_from(hashes.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend([0; 4]);
    out.extend(hashes.as_flattened());
    out
}

/// Reads the body of an INDEX, which stands in its lane's store where it says.
///
/// # Errors
/// Where it is not as the format says.
pub fn decode(body: &[u8]) -> Decoded<(StoreBlock, &[Hash])> {
    let hashes = hashes(body)?;
    let first = store_block(Decoder::new(body).u64()?)?;
    if first.index() + hashes.len() > StoreBlock::END_MAX.index() {
        return Err("it covers more blocks than allowed".into());
    }
    Ok((first, hashes))
}

/// Reads the hashes of an INDEX that stands where its COMMIT says, wherever it says itself.
///
/// # Errors
/// Where it is not as the format says.
pub fn hashes(body: &[u8]) -> Decoded<&[Hash]> {
    let mut decoder = Decoder::new(body);
    decoder.u64()?;
    let count = decoder.u32()? as usize;
    decoder.zeros(4)?;
    if count > INDEX_BLOCKS_MAX {
        return Err("it covers more blocks than allowed".into());
    }
    let hashes = decoder.take(count * size_of::<Hash>())?.as_chunks().0;
    decoder.end()?;
    Ok(hashes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn hashes_come_back(hashes: Vec<Hash>, first in 0u32..1 << 20, strange: Vec<u8>) {
            let body = encode(StoreBlock(first), &hashes);
            prop_assert_eq!(decode(&body), Ok((StoreBlock(first), &hashes[..])));
            let _ = decode(&strange);
        }
    }
}
