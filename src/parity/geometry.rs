//! What a group is, and where its parity lies: all of it follows from the geometry that stands at both ends of each of its PARITY records. So none of
//! them is needed as long as one is left.

use std::ops::Range;

use super::tables::{self, HeaderPlace, SUM_BYTES};
use super::{CELL_BYTES, CODE_ROWS, COLUMNS, ROW_BYTES, ROWS_MAX};
use crate::codec::{Decoded, Decoder, Malformed};

/// Bytes of a geometry.
pub const GEOMETRY_BYTES: usize = 136;
/// The version of what a PARITY record holds.
const VERSION: u8 = 1;
/// A COMMIT and a TAIL follow the group's last PARITY record.
const FLAG_ENDS: u8 = 1;
/// Bytes of a geometry before its checksum.
const SUMMED_BYTES: usize = GEOMETRY_BYTES - 4;
/// Percent of a group that heal, at most.
pub const PERCENT_MAX: u8 = 100;
/// PARITY records of a group, where it has as many rows of parity.
const RECORDS: usize = 4;
/// PARITY records of a group that are read.
const RECORDS_MAX: u8 = 64;
/// Headers that are noted in a group: those of the first records in it.
pub const HEADERS_MAX: usize = 1 << 16;
/// Offsets are below this: adding lengths to them never overflows.
const OFFSETS: u64 = 1 << 62;
/// Bytes of a PARITY record's body at most.
const BODY_BYTES_MAX: u64 = 33 << 20;
/// Bytes of a COMMIT with its header at most.
const COMMIT_BYTES_MAX: u64 = 96 + (128 << 10);

/// Bytes of a group at most that heals so many percent of itself.
pub fn group_bytes_max(percent: u8) -> u64 {
    let rows = (CODE_ROWS - 1) * 100 / usize::from(percent.max(1));
    (rows.min(ROWS_MAX) * ROW_BYTES) as u64
}

/// Rows of parity that a group of `rows` rows stores: with one more than its percentage, any stretch of that length heals wherever it begins.
pub fn stored_rows(rows: usize, percent: u8) -> usize {
    ((rows * usize::from(percent)).div_ceil(100) + 1).min(CODE_ROWS)
}

/// A group and its parity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Percent of the group that heal.
    pub percent: u8,
    /// The number of its PARITY records.
    pub records: u8,
    /// Where the group begins, in bytes from the beginning of the archive: a multiple of [`CELL_BYTES`].
    pub offset: u64,
    /// Bytes of the group, at least one.
    pub length: u64,
    /// Where the first PARITY record begins. The others follow directly.
    pub place: u64,
    /// The number of that record in its lane.
    pub sequence: u64,
    /// Rows of parity that are stored.
    pub stored: u32,
    /// Headers of records that are noted.
    pub headers: u32,
    /// The lane of the PARITY records.
    pub lane: [u8; 16],
    /// Their epoch.
    pub epoch: u64,
    /// The COMMIT of which a copy follows the last PARITY record, and then a TAIL; none within an export.
    pub commit: Option<CommitPlace>,
}

/// Where a COMMIT is, as a TAIL says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CommitPlace {
    /// Where it begins.
    pub offset: u64,
    /// Bytes, header included.
    pub length: u64,
    /// The hash of its body.
    pub body_hash: [u8; 32],
}

/// Where the parts of a PARITY record lie, in bytes from the beginning of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordLayout {
    /// Where its header begins.
    pub start: u64,
    /// Where its tables begin: that of the cells, and that of the headers.
    pub tables: u64,
    /// Where its first row of parity begins.
    pub parity: u64,
    /// Its rows of parity.
    pub rows: Range<usize>,
    /// Where the geometry is that ends it.
    pub trailer: u64,
    /// Where it ends.
    pub end: u64,
}

impl Geometry {
    /// Returns the number of PARITY records for so many rows of parity.
    pub fn records_for(stored: usize) -> u8 {
        u8::try_from(stored.clamp(1, RECORDS)).unwrap_or(1)
    }

    /// Returns where the group ends.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Returns the cells of the group. The last one may be shorter than others.
    pub fn cells(&self) -> usize {
        usize::try_from(self.length.div_ceil(CELL_BYTES as u64)).unwrap_or(usize::MAX)
    }

    /// Returns the rows of the group. The last one may have fewer cells than others.
    pub fn rows(&self) -> usize {
        self.cells().div_ceil(COLUMNS)
    }

    /// Returns the rows of parity that are stored.
    pub fn stored(&self) -> usize {
        self.stored as usize
    }

    /// Returns the entries of the table of cells: those of the group, and then those of its parity.
    pub fn sums(&self) -> usize {
        self.cells() + self.stored() * COLUMNS
    }

    /// Returns the blocks of the table of cells.
    pub fn sum_blocks(&self) -> usize {
        tables::blocks(self.sums(), SUM_BYTES)
    }

    /// Returns the blocks of the table of headers.
    pub fn header_blocks(&self) -> usize {
        tables::blocks(self.headers as usize, HeaderPlace::BYTES)
    }

    /// Returns where the parts of all of its PARITY records lie. `header_bytes` is the length of a record's header.
    pub fn layouts(&self, header_bytes: u64) -> Vec<RecordLayout> {
        let (records, stored) = (usize::from(self.records), self.stored());
        let cell = CELL_BYTES as u64;
        let table_bytes = (self.sum_blocks() + self.header_blocks()) as u64 * cell;
        let mut start = self.place;
        let layouts = (0..records).map(|number| {
            let rows = number * stored / records..(number + 1) * stored / records;
            let first = (start + header_bytes + GEOMETRY_BYTES as u64).next_multiple_of(cell);
            let rows_bytes = (rows.len() * ROW_BYTES) as u64;
            // A stretch that takes all but the end of the last record leaves the tables there.
            let (tables, parity) = if number > 0 && number + 1 == records {
                (first + rows_bytes, first)
            } else {
                (first, first + table_bytes)
            };
            let trailer = first + table_bytes + rows_bytes;
            let layout = RecordLayout {
                start,
                tables,
                parity,
                rows,
                trailer,
                end: trailer + GEOMETRY_BYTES as u64,
            };
            start = layout.end;
            layout
        });
        layouts.collect()
    }

    /// Appends its bytes, for the PARITY record with a number.
    pub fn put(&self, number: u8, out: &mut Vec<u8>) {
        let start = out.len();
        let flags = if self.commit.is_some() { FLAG_ENDS } else { 0 };
        out.extend([VERSION, self.percent, flags, self.records, number, 0, 0, 0]);
        for field in [self.offset, self.length, self.place, self.sequence] {
            out.extend(field.to_le_bytes());
        }
        out.extend(u32::try_from(self.rows()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(u32::try_from(CODE_ROWS).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(self.stored.to_le_bytes());
        out.extend(self.headers.to_le_bytes());
        out.extend(self.lane);
        out.extend(self.epoch.to_le_bytes());
        let (offset, length, hash) = match self.commit {
            Some(commit) => (commit.offset, commit.length, commit.body_hash),
            None => (0, 0, [0; 32]),
        };
        out.extend(offset.to_le_bytes());
        out.extend(length.to_le_bytes());
        out.extend(hash);
        out.extend([0; 4]);
        let sum = crc32c::crc32c(&out[start..]);
        out.extend(sum.to_le_bytes());
    }

    /// Decodes one that begins some bytes. Returns it and the number of its record. Everything that [`Geometry::layouts`] says of it lies below
    /// 2^63.
    ///
    /// # Errors
    /// Says that there is none, or that it exceeds a limit. Another version is refused.
    pub fn decode(bytes: &[u8]) -> Decoded<(Self, u8)> {
        let bytes: &[u8; GEOMETRY_BYTES] = bytes.first_chunk().ok_or("it ends too early")?;
        let (summed, sum) = bytes.split_at(SUMMED_BYTES);
        // What is most likely to be wrong comes first: this is tried at many places.
        if bytes[3] == 0 || crc32c::crc32c(summed).to_le_bytes() != sum {
            return Err("a geometry does not match its checksum".into());
        }
        let mut decoder = Decoder::new(summed);
        let [version, percent, flags, records, number] = decoder.array()?;
        if version != VERSION || flags & !FLAG_ENDS != 0 {
            return Err(Malformed::Unsupported("it has parity that this version does not know"));
        }
        decoder.zeros(3)?;
        let (offset, length) = (decoder.u64()?, decoder.u64()?);
        let (place, sequence) = (decoder.u64()?, decoder.u64()?);
        let (rows, code_rows) = (decoder.u32()?, decoder.u32()?);
        let (stored, headers) = (decoder.u32()?, decoder.u32()?);
        let (lane, epoch) = (decoder.array()?, decoder.u64()?);
        let commit = CommitPlace {
            offset: decoder.u64()?,
            length: decoder.u64()?,
            body_hash: decoder.array()?,
        };
        decoder.zeros(4)?;
        let geometry = Self {
            percent,
            records,
            offset,
            length,
            place,
            sequence,
            stored,
            headers,
            lane,
            epoch,
            commit: (flags & FLAG_ENDS != 0).then_some(commit),
        };
        geometry.check(number)?;
        if geometry.rows() != rows as usize || code_rows as usize != CODE_ROWS {
            return Err("a geometry has another code than it should have".into());
        }
        Ok((geometry, number))
    }

    fn check(&self, number: u8) -> Decoded<()> {
        let is_placed = self.offset < OFFSETS && self.length < OFFSETS && self.place < OFFSETS;
        if !is_placed || self.length == 0 || !self.offset.is_multiple_of(CELL_BYTES as u64) || self.end() > self.place {
            return Err("a geometry has places that cannot be".into());
        }
        let has_percent = (1..=PERCENT_MAX).contains(&self.percent);
        let has_rows = self.rows() <= ROWS_MAX && (1..=CODE_ROWS).contains(&self.stored());
        let has_records =
            self.records <= RECORDS_MAX && u32::from(self.records) <= self.stored && number < self.records;
        if !has_percent || !has_rows || !has_records || self.headers as usize > HEADERS_MAX || self.sequence >= OFFSETS
        {
            return Err("a geometry has more than allowed".into());
        }
        let rows_bytes = self.stored().div_ceil(usize::from(self.records)) * ROW_BYTES;
        let tables_bytes = (self.sum_blocks() + self.header_blocks() + 1) * CELL_BYTES;
        if (rows_bytes + tables_bytes + 2 * GEOMETRY_BYTES) as u64 > BODY_BYTES_MAX {
            return Err("a geometry has longer records than allowed".into());
        }
        let holds = |commit: CommitPlace| commit.length <= COMMIT_BYTES_MAX && commit.offset < OFFSETS;
        if !self.commit.is_none_or(holds) {
            return Err("a geometry has a COMMIT that cannot be".into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry {
            percent: 5,
            records: 4,
            offset: 8192,
            length: 40 << 20,
            place: (40 << 20) + 9000,
            sequence: 17,
            stored: 129,
            headers: 12,
            lane: [3; 16],
            epoch: 5,
            commit: Some(CommitPlace {
                offset: 4,
                length: 500,
                body_hash: [9; 32],
            }),
        }
    }

    fn bytes_of(geometry: &Geometry) -> Vec<u8> {
        let mut bytes = Vec::new();
        geometry.put(1, &mut bytes);
        bytes
    }

    #[test]
    fn a_geometry_comes_back_and_no_bit_may_flip() {
        for geometry in [
            geometry(),
            Geometry {
                commit: None,
                ..geometry()
            },
        ] {
            let bytes = bytes_of(&geometry);
            assert_eq!(bytes.len(), GEOMETRY_BYTES);
            assert_eq!(Geometry::decode(&bytes), Ok((geometry, 1)));
            for bit in 0..bytes.len() * 8 {
                let mut bad = bytes.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(Geometry::decode(&bad).is_err());
            }
            assert!(Geometry::decode(&bytes[1..]).is_err());
        }
    }

    #[test]
    fn numbers_of_a_geometry_have_limits() {
        let good = geometry();
        let bad = [
            Geometry { percent: 0, ..good },
            Geometry { percent: 101, ..good },
            Geometry { records: 65, ..good },
            Geometry {
                records: 4,
                stored: 3,
                ..good
            },
            Geometry { offset: 100, ..good },
            Geometry {
                offset: u64::MAX - 4095,
                ..good
            },
            Geometry { length: 0, ..good },
            Geometry {
                length: u64::MAX,
                ..good
            },
            Geometry {
                length: 1 << 40,
                place: 1 << 41,
                ..good
            },
            Geometry { place: 0, ..good },
            Geometry {
                place: u64::MAX,
                ..good
            },
            Geometry {
                sequence: u64::MAX,
                ..good
            },
            Geometry { stored: 2049, ..good },
            Geometry {
                stored: 2048,
                records: 1,
                headers: 1 << 16,
                ..good
            },
            Geometry {
                headers: (1 << 16) + 1,
                ..good
            },
            Geometry {
                commit: Some(CommitPlace {
                    offset: u64::MAX,
                    length: 1,
                    body_hash: [0; 32],
                }),
                ..good
            },
            Geometry {
                commit: Some(CommitPlace {
                    offset: 0,
                    length: 1 << 40,
                    body_hash: [0; 32],
                }),
                ..good
            },
        ];
        for (number, bad) in bad.into_iter().enumerate() {
            assert!(Geometry::decode(&bytes_of(&bad)).is_err(), "{number}");
        }
    }

    #[test]
    fn the_parts_of_records_follow_each_other_and_lie_on_sectors() {
        let layouts = geometry().layouts(96);
        assert_eq!(layouts.len(), 4);
        let (mut end, mut row) = (geometry().place, 0);
        for layout in &layouts {
            assert_eq!((layout.start, layout.rows.start), (end, row));
            assert_eq!((layout.tables % 4096, layout.parity % 4096), (0, 0));
            let (first, second) = (layout.tables.min(layout.parity), layout.tables.max(layout.parity));
            assert!(first >= layout.start + 96 + GEOMETRY_BYTES as u64 && first < layout.start + 96 + 8192);
            assert_eq!(
                first == layout.parity,
                layout.rows.end == 129,
                "tables come last in the last record"
            );
            let rows_bytes = (layout.rows.len() * ROW_BYTES) as u64;
            let table_bytes = (geometry().sum_blocks() + geometry().header_blocks()) as u64 * 4096;
            assert_eq!(layout.trailer - first, rows_bytes + table_bytes);
            assert_eq!(
                second - first,
                if first == layout.parity {
                    rows_bytes
                } else {
                    table_bytes
                }
            );
            (end, row) = (layout.end, layout.rows.end);
        }
        assert_eq!(row, 129);
    }

    #[test]
    fn a_group_heals_its_percentage_wherever_that_begins() {
        for percent in 1..=PERCENT_MAX {
            let bytes = group_bytes_max(percent);
            let rows = usize::try_from(bytes).unwrap() / ROW_BYTES;
            let stored = stored_rows(rows, percent);
            assert!(stored <= CODE_ROWS && rows <= ROWS_MAX);
            // A stretch of so many rows that begins within a cell touches one cell more of one column.
            assert!(
                (stored - 1) * ROW_BYTES * 100 >= rows * ROW_BYTES * usize::from(percent),
                "{percent} %"
            );
        }
        assert_eq!(group_bytes_max(5), 40_940 * 16_384);
    }

    proptest! {
        #[test]
        fn nothing_is_too_strange(bytes: Vec<u8>, fields: [u64; 4], small: [u32; 3], head: [u8; 4]) {
            let _ = Geometry::decode(&bytes);
            let strange = Geometry {
                percent: head[0],
                records: head[1],
                offset: fields[0],
                length: fields[1] % (1 << 40),
                place: fields[2],
                sequence: fields[3],
                stored: small[0] % 4096,
                headers: small[1],
                ..geometry()
            };
            let mut encoded = Vec::new();
            if fields[0].checked_add(strange.length).is_some() {
                strange.put(head[2], &mut encoded);
                if let Ok((decoded, _)) = Geometry::decode(&encoded) {
                    decoded.layouts(96);
                }
            }
        }
    }
}
