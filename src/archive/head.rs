//! HEAD: what a reader must know.

use super::record::{Hash, hash_of};
use crate::block::BLOCK_BYTES;
use crate::chunk::{self, Chunker, PARAMETERS};
use crate::codec::{Decoded, Decoder, Malformed};

/// What to say of features that a reader must know and does not.
pub const UNKNOWN_FEATURES: &str = "it uses features that this version does not know";
/// The feature that a reader must know: bodies of records are sealed.
pub const FEATURE_SEALED: u64 = 1;
/// The version of what a HEAD says: what an older reader must know changes this number.
const MAJOR: u16 = 1;
/// What an older reader may ignore changes this one.
const MINOR: u16 = 0;
/// Bytes of a body at least.
const BODY_BYTES: usize = 72;

/// What a HEAD says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Whether bodies of records are sealed.
    pub is_sealed: bool,
    /// Bits of features that a writer that appends must know.
    features_append: u64,
    parameters: (u16, u16, u16),
    cut_version: u16,
    cut_digest: Hash,
}

impl Head {
    /// What this version writes.
    pub fn current() -> Self {
        Self {
            is_sealed: false,
            features_append: 0,
            parameters: (PARAMETERS.min_blocks, PARAMETERS.average_blocks, PARAMETERS.max_blocks),
            cut_version: u16::try_from(chunk::VERSION).unwrap_or(u16::MAX),
            cut_digest: cut_digest(),
        }
    }

    /// What this version writes to a sealed archive.
    pub fn sealed() -> Self {
        Self {
            is_sealed: true,
            ..Self::current()
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAJOR.to_le_bytes());
        out.extend(MINOR.to_le_bytes());
        out.extend(u32::try_from(BLOCK_BYTES).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(if self.is_sealed { FEATURE_SEALED } else { 0 }.to_le_bytes());
        out.extend(self.features_append.to_le_bytes());
        out.extend(0u64.to_le_bytes());
        let (min, average, max) = self.parameters;
        for number in [min, average, max, self.cut_version] {
            out.extend(number.to_le_bytes());
        }
        out.extend(self.cut_digest);
        out
    }

    /// Reads one. What a later minor version adds behind it is ignored.
    ///
    /// # Errors
    /// Where it is too short, or asks for what this version cannot do.
    pub fn decode(body: &[u8]) -> Decoded<Self> {
        // What is cut is damaged, whatever it asks for.
        if body.len() < BODY_BYTES {
            return Err("it ends too early".into());
        }
        let mut decoder = Decoder::new(body);
        let (major, _minor) = (decoder.u16()?, decoder.u16()?);
        if major != MAJOR {
            return Err(Malformed::Unsupported("it has another version of the format"));
        }
        if u64::from(decoder.u32()?) != BLOCK_BYTES {
            return Err(Malformed::Unsupported("its blocks are not of 4096 bytes"));
        }
        let features_read = decoder.u64()?;
        if features_read & !FEATURE_SEALED != 0 {
            return Err(Malformed::Unsupported(UNKNOWN_FEATURES));
        }
        let features_append = decoder.u64()?;
        let _other = decoder.u64()?;
        Ok(Self {
            is_sealed: features_read & FEATURE_SEALED != 0,
            features_append,
            parameters: (decoder.u16()?, decoder.u16()?, decoder.u16()?),
            cut_version: decoder.u16()?,
            cut_digest: decoder.array()?,
        })
    }

    /// Whether this version may append.
    pub fn may_append(&self) -> bool {
        *self == Self::current() || *self == Self::sealed()
    }
}

/// BLAKE3 of the lengths of the chunks of the golden stream (`testdata/cuts-v1.txt`), as this program cuts it.
fn cut_digest() -> Hash {
    let mut lengths = Vec::new();
    Chunker::default().cut(&chunk::golden_stream(), |chunk| {
        lengths.push(u8::try_from(chunk.blocks).unwrap_or(u8::MAX));
    });
    hash_of(&lengths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_comes_back_and_new_features_are_refused() {
        let bytes = Head::current().encode();
        assert_eq!(Head::decode(&bytes), Ok(Head::current()));
        assert!(Head::current().may_append());
        for (at, reads) in [(0, false), (8, false), (16, true), (24, true), (32, true), (45, true)] {
            let mut other = bytes.clone();
            other[at] ^= 4;
            let head = Head::decode(&other);
            assert_eq!(head.is_ok(), reads, "byte {at}");
            assert_eq!(head.is_ok_and(|head| head.may_append()), at == 24, "byte {at}");
        }
    }

    #[test]
    fn the_digest_is_that_of_the_golden_cuts() {
        let lengths: Vec<u8> = include_str!("../../testdata/cuts-v1.txt")
            .split_whitespace()
            .map(|length| length.parse().unwrap())
            .collect();
        assert_eq!(cut_digest(), hash_of(&lengths));
    }
}
