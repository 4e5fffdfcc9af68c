//! Fingerprints of blocks: 32-bit hashes. Equal fingerprints suggest that blocks are equal, and prove nothing.
//!
//! On btrfs they are the filesystem's own checksums, truncated to 32 bits, so that most of a pool need not be read. Where there is no
//! usable checksum (compressed extents, files without checksums), the same function is computed from the data. Checksum types: btrfs-progs,
//! `Documentation/Checksumming.rst`; on disk, checksums are little-endian.

mod store;

pub use store::Fingerprints;

use crate::block::BLOCK_LEN;

/// The function that computes a block's fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FingerprintFunction {
    /// CRC32C, the default of btrfs.
    Crc32c,
    /// The low 32 bits of xxhash64 with seed 0.
    Xxhash64,
}

impl FingerprintFunction {
    /// Returns the fingerprint of a block.
    pub fn of(self, block: &[u8]) -> u32 {
        match self {
            Self::Crc32c => crc32c::crc32c(block),
            #[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
            Self::Xxhash64 => xxhash_rust::xxh64::xxh64(block, 0) as u32,
        }
    }

    /// Returns the fingerprint of a block of zeros.
    pub fn of_zeros(self) -> u32 {
        self.of(&[0; BLOCK_LEN])
    }

    /// Returns the name of the function, for messages and the index.
    pub fn name(self) -> &'static str {
        match self {
            Self::Crc32c => "crc32c",
            Self::Xxhash64 => "xxhash64",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        // RFC 3720's successor tables have the CRC32C of "123456789", and any btrfs checksum tree that of 4 KiB of zeros.
        assert_eq!(FingerprintFunction::Crc32c.of(b"123456789"), 0xe306_9283);
        assert_eq!(FingerprintFunction::Crc32c.of_zeros(), 0x98f9_4189);
        // The reference implementation gives ef46db3751d8e999 for the xxhash64 of an empty string.
        assert_eq!(FingerprintFunction::Xxhash64.of(b""), 0x51d8_e999);
    }
}
