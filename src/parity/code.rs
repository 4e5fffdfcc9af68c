//! The code: Reed-Solomon codes over a field of 2^16 elements, as the crate `reed-solomon-simd` has them for a high rate. It takes time in proportion to
//! the bytes and to the logarithm of the rows.
//!
//! A code of 64-byte pieces stands for itself, whatever the length of a cell. So strips of rows are worked on one by one, which keeps memory small and
//! what is worked on in the caches of the processor.

use std::ops::Range;

use rayon::prelude::*;
use reed_solomon_simd::engine::{DefaultEngine, Engine, ShardsRefMut, utils};
use reed_solomon_simd::rate::{HighRateDecoder, RateDecoder};

use super::{CELL_BYTES, CODE_ROWS, ROW_BYTES, ROWS_MAX};

/// The bytes that the engine works on at a time.
type Piece = [u8; 64];

/// Bytes of a row that make a strip of an encoder: that of 2048 rows takes 1 MiB.
const STRIP_BYTES: usize = 512;
/// Pieces of a row in a strip.
const STRIP_PIECES: usize = STRIP_BYTES / size_of::<Piece>();
/// Pieces of all rows in a strip.
const STRIP_ROWS_PIECES: usize = CODE_ROWS * STRIP_PIECES;
/// Strips of a row.
const STRIPS: usize = ROW_BYTES / STRIP_BYTES;
/// Bytes of [`CODE_ROWS`] rows.
const FILL_BYTES: usize = CODE_ROWS * ROW_BYTES;

/// Computes the parity of rows that come one after the other. It takes at most 64 MiB of memory, however many rows there are.
///
/// The code of a high rate is a sum over chunks of [`CODE_ROWS`] rows: each is transformed with a skew that tells where it stands, and the sum is
/// transformed back once. So no chunk is kept.
#[derive(Debug, Default)]
pub struct Encoder {
    /// The rows of the chunk that is being filled, strip by strip. It is empty before the first byte of a chunk.
    fill: Vec<Piece>,
    /// Bytes of it so far.
    filled: usize,
    /// Rows of the chunks before it.
    rows_before: usize,
    /// The sum of these, strip by strip. It is empty before the first.
    sum: Vec<Piece>,
}

impl Encoder {
    /// Takes bytes, of which there may be [`ROWS_MAX`] rows in all.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.fill.is_empty() {
                self.fill = vec![[0; size_of::<Piece>()]; STRIPS * STRIP_ROWS_PIECES];
            }
            let (row, at) = (self.filled / ROW_BYTES, self.filled % ROW_BYTES);
            let (strip, within) = (at / STRIP_BYTES, at % STRIP_BYTES);
            let (taken, rest) = bytes.split_at(bytes.len().min(STRIP_BYTES - within));
            let place = strip * STRIP_ROWS_PIECES + row * STRIP_PIECES;
            let pieces = self.fill[place..place + STRIP_PIECES].as_flattened_mut();
            pieces[within..within + taken.len()].copy_from_slice(taken);
            self.filled += taken.len();
            bytes = rest;
            if self.filled == FILL_BYTES {
                self.add_chunk();
            }
        }
    }

    /// Adds the rows of the chunk to the sum. Those that it lacks are zeros.
    fn add_chunk(&mut self) {
        let (rows, skew) = (self.filled.div_ceil(ROW_BYTES), self.rows_before + CODE_ROWS);
        let engine = DefaultEngine::new();
        let transform = |strip: &mut [Piece]| {
            engine.ifft(&mut shards(strip), 0, CODE_ROWS, rows, skew);
        };
        if self.sum.is_empty() {
            self.sum = std::mem::take(&mut self.fill);
            self.sum.par_chunks_mut(STRIP_ROWS_PIECES).for_each(transform);
        } else {
            let sums = self.sum.par_chunks_mut(STRIP_ROWS_PIECES);
            let strips = self.fill.par_chunks_mut(STRIP_ROWS_PIECES);
            sums.zip(strips).for_each(|(sum, strip)| {
                transform(strip);
                utils::xor(sum, strip);
                strip.fill([0; size_of::<Piece>()]);
            });
        }
        self.rows_before += rows;
        self.filled = 0;
    }

    /// Returns the first rows of parity, [`CODE_ROWS`] at most. The last row that was pushed counts as if zeros followed its last byte.
    pub fn finish(mut self, stored: usize) -> ParityRows {
        if self.filled > 0 {
            self.add_chunk();
        }
        self.fill = Vec::new();
        let (engine, stored) = (DefaultEngine::new(), stored.min(CODE_ROWS));
        self.sum.par_chunks_mut(STRIP_ROWS_PIECES).for_each(|strip| {
            engine.fft(&mut shards(strip), 0, CODE_ROWS, stored, 0);
        });
        ParityRows {
            strips: self.sum,
            rows: stored,
        }
    }
}

fn shards(strip: &mut [Piece]) -> ShardsRefMut<'_> {
    ShardsRefMut::new(CODE_ROWS, STRIP_PIECES, strip)
}

/// Rows of parity.
#[derive(Debug)]
pub struct ParityRows {
    /// Strip by strip; empty if nothing was pushed.
    strips: Vec<Piece>,
    rows: usize,
}

impl ParityRows {
    /// Returns how many there are.
    pub fn count(&self) -> usize {
        self.rows
    }

    /// Appends the bytes of a row.
    pub fn put(&self, row: usize, out: &mut Vec<u8>) {
        for strip in self.strips.chunks(STRIP_ROWS_PIECES) {
            out.extend(strip[row * STRIP_PIECES..(row + 1) * STRIP_PIECES].as_flattened());
        }
    }
}

/// A cell of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ColumnCell {
    /// One of a row of the group.
    Row(usize),
    /// One of a row of parity.
    Parity(usize),
}

/// Bytes of a cell that a decoder works on at a time.
const DECODED_BYTES: usize = 256;
/// Memory that decoders take beside what they return.
const DECODERS_BYTES: usize = 128 << 20;

/// Computes the lost cells of a column of `rows` rows. `lost` are their rows, ascending, and `parity` rows of parity whose cells are intact; those
/// that are read are as many as lost ones. Returns the cells one after the other; none if there is too little parity.
///
/// `read` reads a part of an intact cell. Cells are read in parts, as large as memory of 128 MiB allows: halves at least.
///
/// # Errors
/// Returns the error of `read`.
pub fn restore<E>(
    rows: usize,
    lost: &[usize],
    parity: &[usize],
    mut read: impl FnMut(ColumnCell, Range<usize>, &mut [u8]) -> Result<(), E>,
) -> Result<Option<Vec<u8>>, E> {
    let Some(parity) = parity.get(..lost.len()).filter(|_| rows <= ROWS_MAX) else {
        return Ok(None);
    };
    let shards = (CODE_ROWS + rows).next_power_of_two();
    let part_bytes = (DECODERS_BYTES / shards / DECODED_BYTES * DECODED_BYTES).min(CELL_BYTES);
    let Some(mut decoders) = decoders(rows, part_bytes / DECODED_BYTES) else {
        return Ok(None);
    };
    let mut restored = vec![0; lost.len() * CELL_BYTES];
    let mut buffer = vec![0; part_bytes];
    for start in (0..CELL_BYTES).step_by(part_bytes) {
        let range = start..CELL_BYTES.min(start + part_bytes);
        let part = &mut buffer[..range.len()];
        let count = range.len() / DECODED_BYTES;
        let mut next_lost = lost.iter().peekable();
        for row in 0..rows {
            if next_lost.next_if(|lost| **lost == row).is_none() {
                read(ColumnCell::Row(row), range.clone(), part)?;
                for (decoder, bytes) in decoders.iter_mut().zip(part.chunks(DECODED_BYTES)) {
                    decoder.take(|decoder| decoder.add_original_shard(row, bytes));
                }
            }
        }
        for row in parity {
            read(ColumnCell::Parity(*row), range.clone(), part)?;
            for (decoder, bytes) in decoders.iter_mut().zip(part.chunks(DECODED_BYTES)) {
                decoder.take(|decoder| decoder.add_recovery_shard(*row, bytes));
            }
        }
        let decoded: Vec<Option<Vec<u8>>> = decoders[..count]
            .par_iter_mut()
            .map(|decoder| decoder.decode(rows, lost))
            .collect();
        for (place, decoded) in (start..).step_by(DECODED_BYTES).zip(decoded) {
            let Some(decoded) = decoded else { return Ok(None) };
            let cells = restored.chunks_mut(CELL_BYTES).zip(decoded.chunks(DECODED_BYTES));
            cells.for_each(|(cell, bytes)| cell[place..place + DECODED_BYTES].copy_from_slice(bytes));
        }
    }
    Ok(Some(restored))
}

/// A decoder, and whether it took all that it was given.
struct PartDecoder {
    decoder: HighRateDecoder<DefaultEngine>,
    has_failed: bool,
}

fn decoders(rows: usize, count: usize) -> Option<Vec<PartDecoder>> {
    let new = |_| {
        let decoder = HighRateDecoder::new(rows, CODE_ROWS, DECODED_BYTES, DefaultEngine::new(), None);
        decoder.ok().map(|decoder| PartDecoder {
            decoder,
            has_failed: false,
        })
    };
    (0..count).map(new).collect()
}

impl PartDecoder {
    fn take(&mut self, give: impl FnOnce(&mut HighRateDecoder<DefaultEngine>) -> Result<(), reed_solomon_simd::Error>) {
        self.has_failed |= give(&mut self.decoder).is_err();
    }

    /// Returns the parts of the lost cells, and makes ready for the next ones.
    fn decode(&mut self, rows: usize, lost: &[usize]) -> Option<Vec<u8>> {
        let mut parts = Vec::with_capacity(lost.len() * DECODED_BYTES);
        let result = self.decoder.decode().ok().filter(|_| !self.has_failed)?;
        for row in lost {
            parts.extend(result.restored_original(*row)?);
        }
        drop(result);
        self.decoder.reset(rows, CODE_ROWS, DECODED_BYTES).ok()?;
        Some(parts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parity::COLUMNS;
    use proptest::prelude::*;
    use reed_solomon_simd::rate::{HighRateEncoder, RateEncoder};

    /// Bytes that repeat nowhere.
    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new()
            .update(&seed.to_le_bytes())
            .finalize_xof()
            .fill(&mut bytes);
        bytes
    }

    fn encoded(bytes: &[u8], stored: usize, cuts: &[usize]) -> ParityRows {
        let mut encoder = Encoder::default();
        let mut rest = bytes;
        for cut in cuts {
            let (part, after) = rest.split_at((*cut).min(rest.len()));
            encoder.push(part);
            rest = after;
        }
        encoder.push(rest);
        encoder.finish(stored)
    }

    fn row_of(parity: &ParityRows, row: usize) -> Vec<u8> {
        let mut out = Vec::new();
        parity.put(row, &mut out);
        out
    }

    fn cell(bytes: &[u8], row: usize, column: usize) -> [u8; CELL_BYTES] {
        let mut cell = [0; CELL_BYTES];
        let start = (row * ROW_BYTES + column * CELL_BYTES).min(bytes.len());
        let part = &bytes[start..bytes.len().min(start + CELL_BYTES)];
        cell[..part.len()].copy_from_slice(part);
        cell
    }

    /// What the crate's own encoder makes of some bytes, whose shards are whole rows.
    fn by_crate(bytes: &[u8], rows: usize) -> Vec<Vec<u8>> {
        let mut encoder = HighRateEncoder::new(rows, CODE_ROWS, ROW_BYTES, DefaultEngine::new(), None).unwrap();
        for row in 0..rows {
            let cells: Vec<u8> = (0..COLUMNS).flat_map(|column| cell(bytes, row, column)).collect();
            encoder.add_original_shard(&cells).unwrap();
        }
        let result = encoder.encode().unwrap();
        result.recovery_iter().map(<[u8]>::to_vec).collect()
    }

    #[test]
    fn rows_that_come_one_by_one_have_the_parity_that_the_crate_gives_all_of_them() {
        for (rows, cut) in [(1, 1), (3, 100), (2047, 0), (2048, 7), (2049, 5000), (4097, 16384)] {
            let bytes = noise(rows * ROW_BYTES - cut.min(ROW_BYTES - 1), rows as u64);
            let parity = encoded(&bytes, CODE_ROWS, &[cut, 1, 70_000, 3]);
            let expected = by_crate(&bytes, rows);
            for (row, expected) in expected.iter().enumerate() {
                assert_eq!(
                    &row_of(&parity, row),
                    expected,
                    "row {row} of the parity of {rows} rows"
                );
            }
        }
    }

    #[test]
    fn fewer_rows_of_parity_are_the_first_ones() {
        let bytes = noise(100 * ROW_BYTES, 1);
        let (all, some) = (encoded(&bytes, CODE_ROWS, &[]), encoded(&bytes, 7, &[]));
        assert_eq!((all.count(), some.count()), (CODE_ROWS, 7));
        for row in 0..7 {
            assert_eq!(row_of(&all, row), row_of(&some, row));
        }
    }

    fn restored(bytes: &[u8], parity: &ParityRows, column: usize, lost: &[usize], intact: &[usize]) -> Option<Vec<u8>> {
        let rows = bytes.len().div_ceil(ROW_BYTES);
        let read = |which, range: Range<usize>, part: &mut [u8]| {
            match which {
                ColumnCell::Row(row) => {
                    assert!(!lost.contains(&row), "a lost cell is read");
                    part.copy_from_slice(&cell(bytes, row, column)[range]);
                }
                ColumnCell::Parity(row) => {
                    let row = row_of(parity, row);
                    part.copy_from_slice(&row[column * CELL_BYTES..][..CELL_BYTES][range]);
                }
            }
            Ok::<(), ()>(())
        };
        restore(rows, lost, intact, read).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]

        /// Whatever cells are lost, as many cells of parity heal them, and one less does not.
        #[test]
        fn lost_cells_come_back(rows in 1usize..2500, stored in 1usize..60, losses in prop::collection::vec(any::<prop::sample::Index>(), 1..50), column in 0..COLUMNS, parity_lost in prop::collection::vec(any::<prop::sample::Index>(), 0..20)) {
            let bytes = noise(rows * ROW_BYTES - 5, rows as u64);
            let parity = encoded(&bytes, stored, &[]);
            let mut lost: Vec<usize> = losses.iter().map(|index| index.index(rows)).collect();
            lost.sort_unstable();
            lost.dedup();
            let gone: Vec<usize> = parity_lost.iter().map(|index| index.index(stored)).collect();
            let intact: Vec<usize> = (0..stored).filter(|row| !gone.contains(row)).collect();
            let healed = restored(&bytes, &parity, column, &lost, &intact);
            prop_assert_eq!(healed.is_some(), intact.len() >= lost.len());
            if let Some(healed) = healed {
                let expected: Vec<u8> = lost.iter().flat_map(|row| cell(&bytes, *row, column)).collect();
                prop_assert!(healed == expected);
            }
        }
    }

    #[test]
    fn the_longest_group_heals() {
        let rows = ROWS_MAX;
        let bytes = noise(ROW_BYTES, 3).repeat(rows);
        let parity = encoded(&bytes, 10, &[]);
        let lost = [0, 1, 2047, 2048, 30_000, rows - 1];
        let healed = restored(&bytes, &parity, 2, &lost, &[0, 1, 2, 3, 5, 9]).unwrap();
        let expected: Vec<u8> = lost.iter().flat_map(|row| cell(&bytes, *row, 2)).collect();
        assert!(healed == expected);
    }
}
