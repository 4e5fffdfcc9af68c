//! Tables in blocks of 4 KiB, each with a checksum of its own: so a bad sector takes one block of them, and another copy of that block serves.

use super::CELL_BYTES;
use crate::codec::{Decoded, Decoder};

/// Bytes of the checksum at the end of a block.
const CHECKSUM_BYTES: usize = 4;

/// Returns how many blocks a table takes.
pub fn blocks(entries: usize, entry_bytes: usize) -> usize {
    entries.div_ceil(entries_of_block(entry_bytes))
}

/// Returns how many entries a block has.
pub fn entries_of_block(entry_bytes: usize) -> usize {
    (CELL_BYTES - CHECKSUM_BYTES) / entry_bytes
}

/// Appends a table, whose entries follow each other in `entries`. What a block has left is zeros.
pub fn put(entries: &[u8], entry_bytes: usize, out: &mut Vec<u8>) {
    for part in entries.chunks(entries_of_block(entry_bytes) * entry_bytes) {
        let start = out.len();
        out.extend(part);
        out.resize(start + CELL_BYTES - CHECKSUM_BYTES, 0);
        let checksum = crc32c::crc32c(&out[start..]);
        out.extend(checksum.to_le_bytes());
    }
}

/// Returns the entries of a block, if its checksum is right. Those of the last block of a table are followed by zeros.
pub fn entries(block: &[u8], entry_bytes: usize) -> Option<&[u8]> {
    let (content, checksum) = block.split_last_chunk::<CHECKSUM_BYTES>()?;
    let is_right = block.len() == CELL_BYTES && crc32c::crc32c(content).to_le_bytes() == *checksum;
    is_right.then(|| &content[..entries_of_block(entry_bytes) * entry_bytes])
}

/// Bytes of a checksum of a cell.
pub const SUM_BYTES: usize = 4;

/// Returns the checksum of a cell. The last one of a group counts as if zeros followed it.
pub fn sum_of(cell: &[u8]) -> u32 {
    const ZEROS: [u8; CELL_BYTES] = [0; CELL_BYTES];
    let sum = crc32c::crc32c(cell);
    match ZEROS.get(cell.len()..) {
        Some(zeros) if !zeros.is_empty() => crc32c::crc32c_append(sum, zeros),
        _ => sum,
    }
}

/// A header of a record: where it begins, counted from the beginning of the group, and its own hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeaderPlace {
    /// Where.
    pub at: u32,
    /// The hash that ends the header.
    pub hash: [u8; 8],
}

impl HeaderPlace {
    /// Bytes of one.
    pub const BYTES: usize = 12;

    /// Appends its bytes.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.at.to_le_bytes());
        out.extend(self.hash);
    }

    /// Decodes one.
    ///
    /// # Errors
    /// Says that there is too little.
    pub fn decode(decoder: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            at: decoder.u32()?,
            hash: decoder.array()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_come_back_block_by_block() {
        for (count, entry_bytes) in [(0, 4), (1, 4), (1023, 4), (1024, 4), (341, 12), (342, 12)] {
            let bytes: Vec<u8> = (0..count * entry_bytes)
                .map(|n| u8::try_from(n % 251).unwrap())
                .collect();
            let mut table = Vec::new();
            put(&bytes, entry_bytes, &mut table);
            assert_eq!(table.len(), blocks(count, entry_bytes) * CELL_BYTES);
            let read: Vec<u8> = table
                .chunks(CELL_BYTES)
                .flat_map(|block| entries(block, entry_bytes).unwrap().to_vec())
                .collect();
            assert_eq!(read[..bytes.len()], bytes);
            assert!(read[bytes.len()..].iter().all(|byte| *byte == 0));
            for place in [0, 2000, 4095] {
                if let Some(block) = table.chunks_mut(CELL_BYTES).next() {
                    block[place] ^= 1;
                    assert_eq!(entries(block, entry_bytes), None);
                    block[place] ^= 1;
                }
            }
        }
        assert_eq!(entries(&[0; 100], 4), None);
    }

    #[test]
    fn a_short_cell_counts_as_if_zeros_followed() {
        let mut cell = vec![7; 100];
        let sum = sum_of(&cell);
        cell.resize(CELL_BYTES, 0);
        assert_eq!(sum, sum_of(&cell));
    }
}
