//! PARITY: what is stored so that lost bytes of an archive can be computed. A group of bytes makes its records, and nothing else does: whoever has the
//! bytes again can make the records again, byte for byte.

use std::collections::VecDeque;

use super::commit::CommitLocation;
use super::record::{EpochId, HEADER_BYTES, LaneId, MAGIC, find_magic, hash_of};
use crate::parity::code::{Encoder, ParityRows};
use crate::parity::geometry::{CommitPlace, GEOMETRY_BYTES, Geometry, HEADERS_MAX, group_bytes_max, stored_rows};
use crate::parity::tables::{self, HeaderPlace, SUM_BYTES, sum_of};
use crate::parity::{CELL_BYTES, COLUMNS, ROW_BYTES};

/// Bytes of a header that its own hash covers.
const HASHED_BYTES: usize = HEADER_BYTES - size_of::<[u8; 8]>();

/// Returns the hash of a header that begins some bytes, if it is right, whatever else the header says.
pub fn header_hash(bytes: &[u8]) -> Option<[u8; 8]> {
    let header: &[u8; HEADER_BYTES] = bytes.first_chunk()?;
    let (hashed, hash) = header.split_at(HASHED_BYTES);
    let is_right = header.starts_with(&MAGIC) && hash_of(hashed)[..hash.len()] == *hash;
    is_right.then(|| hash.try_into().ok())?
}

/// Finds the headers of records in bytes that come part by part.
#[derive(Debug, Default)]
struct HeaderFinder {
    /// The last bytes that came, in which a header may begin that does not end there.
    last: Vec<u8>,
    /// Bytes that came before those.
    before: u64,
    found: Vec<HeaderPlace>,
}

impl HeaderFinder {
    fn push(&mut self, bytes: &[u8]) {
        const KEPT: usize = HEADER_BYTES - 1;
        let kept = self.last.len();
        self.last.extend(&bytes[..bytes.len().min(KEPT)]);
        let joined = std::mem::take(&mut self.last);
        self.find(&joined, self.before, kept);
        let start = self.before + kept as u64;
        self.find(bytes, start, bytes.len());
        let all_end = start + bytes.len() as u64;
        self.last = match bytes.len().checked_sub(KEPT) {
            Some(from) => bytes[from..].to_vec(),
            None => joined[joined.len().saturating_sub(KEPT)..].to_vec(),
        };
        self.before = all_end - self.last.len() as u64;
    }

    /// Finds headers that are whole and begin before `end` in some bytes.
    fn find(&mut self, bytes: &[u8], start: u64, end: usize) {
        let mut at = 0;
        while let Some(found) = bytes.get(at..).and_then(find_magic).filter(|found| at + found < end) {
            at += found;
            if let (Some(hash), Ok(place)) = (header_hash(&bytes[at..]), u32::try_from(start + at as u64))
                && self.found.len() < HEADERS_MAX
            {
                self.found.push(HeaderPlace { at: place, hash });
            }
            at += 1;
        }
    }
}

/// A group whose bytes come one after the other.
#[derive(Debug)]
pub struct Group {
    percent: u8,
    offset: u64,
    length: u64,
    length_max: u64,
    encoder: Encoder,
    /// The checksums of whole cells.
    sums: Vec<u8>,
    /// The bytes of the cell that is not whole yet.
    cell: Vec<u8>,
    headers: HeaderFinder,
}

impl Group {
    /// Makes a group that heals so many percent of itself and begins at an offset, which is a multiple of [`CELL_BYTES`].
    pub fn new(percent: u8, offset: u64) -> Self {
        Self {
            percent,
            offset,
            length: 0,
            length_max: group_bytes_max(percent),
            encoder: Encoder::default(),
            sums: Vec::new(),
            cell: Vec::new(),
            headers: HeaderFinder::default(),
        }
    }

    /// Makes the group that a geometry tells, whose bytes are to come.
    pub fn of(geometry: &Geometry) -> Self {
        Self {
            length_max: geometry.length,
            ..Self::new(geometry.percent, geometry.offset)
        }
    }

    /// Returns where it ends so far.
    pub fn end(&self) -> u64 {
        self.offset + self.length
    }

    /// Returns whether it takes no more bytes.
    pub fn is_full(&self) -> bool {
        self.length >= self.length_max
    }

    /// Takes bytes, until it is full. Returns how many it took.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let left = usize::try_from(self.length_max - self.length).unwrap_or(usize::MAX);
        let bytes = &bytes[..bytes.len().min(left)];
        self.encoder.push(bytes);
        self.headers.push(bytes);
        let mut rest = bytes;
        if !self.cell.is_empty() {
            let (part, after) = rest.split_at(rest.len().min(CELL_BYTES - self.cell.len()));
            self.cell.extend(part);
            rest = after;
            if self.cell.len() == CELL_BYTES {
                self.sums.extend(sum_of(&self.cell).to_le_bytes());
                self.cell.clear();
            }
        }
        let (cells, after) = rest.as_chunks::<CELL_BYTES>();
        for cell in cells {
            self.sums.extend(sum_of(cell).to_le_bytes());
        }
        self.cell.extend(after);
        self.length += bytes.len() as u64;
        bytes.len()
    }

    /// Computes its parity: `stored` rows of it, or as many as its percentage asks for. Returns none if the group has no bytes.
    pub fn finish(mut self, stored: Option<usize>) -> Option<FullGroup> {
        if self.length == 0 {
            return None;
        }
        if !self.cell.is_empty() {
            self.sums.extend(sum_of(&self.cell).to_le_bytes());
        }
        let rows = (self.sums.len() / SUM_BYTES).div_ceil(COLUMNS);
        let parity = self
            .encoder
            .finish(stored.unwrap_or_else(|| stored_rows(rows, self.percent)));
        let mut row = Vec::with_capacity(ROW_BYTES);
        for number in 0..parity.count() {
            row.clear();
            parity.put(number, &mut row);
            for cell in row.chunks(CELL_BYTES) {
                self.sums.extend(sum_of(cell).to_le_bytes());
            }
        }
        Some(FullGroup {
            percent: self.percent,
            offset: self.offset,
            length: self.length,
            sums: self.sums,
            headers: self.headers.found,
            parity,
        })
    }
}

/// Where PARITY records are put, and what they say of themselves.
#[derive(Debug, Clone, Copy)]
pub struct ParityPlace {
    /// Where the first one begins.
    pub offset: u64,
    /// Its number.
    pub sequence: u64,
    /// The lane.
    pub lane: LaneId,
    /// The epoch.
    pub epoch: EpochId,
    /// The COMMIT of which a copy follows them; none within an export.
    pub commit: Option<CommitLocation>,
}

/// A group with its parity. It takes 32 MiB and 0.4 % of the group's length.
#[derive(Debug)]
pub struct FullGroup {
    percent: u8,
    offset: u64,
    length: u64,
    sums: Vec<u8>,
    headers: Vec<HeaderPlace>,
    parity: ParityRows,
}

impl FullGroup {
    /// Returns where its PARITY records lie if they are put to a place.
    pub fn geometry(&self, place: &ParityPlace) -> Geometry {
        Geometry {
            percent: self.percent,
            records: Geometry::records_for(self.parity.count()),
            offset: self.offset,
            length: self.length,
            place: place.offset,
            sequence: place.sequence,
            stored: u32::try_from(self.parity.count()).unwrap_or(u32::MAX),
            headers: u32::try_from(self.headers.len()).unwrap_or(u32::MAX),
            lane: place.lane.0,
            epoch: place.epoch.0,
            commit: place.commit.map(|commit| CommitPlace {
                offset: commit.offset,
                length: commit.length,
                body_hash: commit.body_hash,
            }),
        }
    }

    /// Returns whether a geometry is that of the group, wherever its parity lies.
    pub fn is_of(&self, geometry: &Geometry) -> bool {
        let counts = (self.parity.count(), self.headers.len());
        (self.offset, self.length) == (geometry.offset, geometry.length)
            && counts == (geometry.stored(), geometry.headers as usize)
    }

    /// Returns the body of the PARITY record with a number, from 0.
    pub fn body(&self, geometry: &Geometry, number: u8) -> Vec<u8> {
        let layouts = geometry.layouts(HEADER_BYTES as u64);
        let Some(layout) = layouts.get(usize::from(number)) else {
            return Vec::new();
        };
        let body_start = layout.start + HEADER_BYTES as u64;
        let length = usize::try_from(layout.end - body_start).unwrap_or(0);
        let mut body = Vec::with_capacity(length);
        geometry.put(number, &mut body);
        let first = layout.tables.min(layout.parity);
        body.resize(usize::try_from(first - body_start).unwrap_or(0), 0);
        if layout.tables < layout.parity {
            self.put_tables(&mut body);
        }
        for row in layout.rows.clone() {
            self.parity.put(row, &mut body);
        }
        if layout.tables > layout.parity {
            self.put_tables(&mut body);
        }
        geometry.put(number, &mut body);
        body
    }

    fn put_tables(&self, body: &mut Vec<u8>) {
        tables::put(&self.sums, SUM_BYTES, body);
        let mut headers = Vec::with_capacity(self.headers.len() * HeaderPlace::BYTES);
        self.headers.iter().for_each(|header| header.put(&mut headers));
        tables::put(&headers, HeaderPlace::BYTES, body);
    }
}

/// Makes the parity of an archive while it is written: group after group.
#[derive(Debug)]
pub struct ParityMaker {
    percent: u8,
    group: Group,
    /// Groups whose records are to be written.
    full: VecDeque<FullGroup>,
}

impl ParityMaker {
    /// Begins with a group at an offset, or at the last multiple of [`CELL_BYTES`] before it.
    pub fn new(percent: u8, offset: u64) -> Self {
        Self {
            percent,
            group: Group::new(percent, offset / CELL_BYTES as u64 * CELL_BYTES as u64),
            full: VecDeque::new(),
        }
    }

    /// Returns the offset of the next byte that it takes.
    pub fn position(&self) -> u64 {
        self.group.end()
    }

    /// Takes bytes.
    pub fn push(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let taken = self.group.push(bytes);
            bytes = &bytes[taken..];
            if self.group.is_full() {
                let next = Group::new(self.percent, self.group.end());
                let full = std::mem::replace(&mut self.group, next).finish(None);
                self.full.extend(full);
            }
        }
    }

    /// Returns a group that is full, the first one of them.
    pub fn next_full(&mut self) -> Option<FullGroup> {
        self.full.pop_front()
    }

    /// Ends the last group.
    pub fn finish(self) -> Option<FullGroup> {
        self.group.finish(None)
    }
}

/// Returns the geometry at the beginning of a PARITY record's body, or at the end of it.
pub fn geometry_in(bytes: &[u8]) -> Option<(Geometry, u8)> {
    Geometry::decode(bytes.get(..GEOMETRY_BYTES)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::record::{RecordHeader, RecordKind};
    use proptest::prelude::*;

    fn place() -> ParityPlace {
        ParityPlace {
            offset: 5_000_001,
            sequence: 9,
            lane: LaneId([4; 16]),
            epoch: EpochId(6),
            commit: None,
        }
    }

    fn record(sequence: u64, length: usize) -> Vec<u8> {
        let mut body = vec![u8::try_from(sequence % 200).unwrap(); length];
        let header = RecordHeader::of_body(RecordKind::Note, LaneId([1; 16]), EpochId(2), sequence, &mut body).unwrap();
        [&header.encode()[..], &body].concat()
    }

    fn group_of(bytes: &[u8], cuts: &[usize]) -> FullGroup {
        let mut group = Group::new(5, 4096);
        let mut rest = bytes;
        for cut in cuts {
            let (part, after) = rest.split_at((*cut).min(rest.len()));
            assert_eq!(group.push(part), part.len());
            rest = after;
        }
        group.push(rest);
        group.finish(None).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(30))]

        /// However bytes come, the records are the same, and all headers are noted.
        #[test]
        fn records_follow_from_the_bytes(lengths in prop::collection::vec(0usize..9000, 1..40), cuts in prop::collection::vec(0usize..20_000, 0..30)) {
            let (mut bytes, mut places) = (vec![7; 100], Vec::new());
            for (sequence, length) in (0..).zip(&lengths) {
                places.push(u32::try_from(bytes.len()).unwrap());
                bytes.extend(record(sequence, *length));
            }
            let (whole, parts) = (group_of(&bytes, &[]), group_of(&bytes, &cuts));
            prop_assert_eq!(whole.headers.iter().map(|header| header.at).collect::<Vec<_>>(), places);
            let geometry = whole.geometry(&place());
            prop_assert_eq!(geometry, parts.geometry(&place()));
            let layouts = geometry.layouts(HEADER_BYTES as u64);
            for (number, layout) in (0..).zip(&layouts) {
                let body = whole.body(&geometry, number);
                prop_assert!(body == parts.body(&geometry, number));
                prop_assert_eq!(layout.start + (HEADER_BYTES + body.len()) as u64, layout.end);
                prop_assert_eq!(geometry_in(&body), Some((geometry, number)));
                let trailer = usize::try_from(layout.trailer - layout.start).unwrap() - HEADER_BYTES;
                prop_assert_eq!(geometry_in(&body[trailer..]), Some((geometry, number)));
            }
        }
    }

    #[test]
    fn full_groups_follow_each_other() {
        // At 100 %, a group is of 2047 rows.
        let bytes_max = usize::try_from(group_bytes_max(100)).unwrap();
        let bytes = vec![3; bytes_max + 10_000];
        let mut maker = ParityMaker::new(100, 5000);
        assert_eq!(maker.position(), 4096);
        bytes.chunks(1 << 20).for_each(|part| maker.push(part));
        assert_eq!(maker.position(), 4096 + bytes.len() as u64);
        let first = maker.next_full().unwrap();
        assert!(maker.next_full().is_none());
        let last = maker.finish().unwrap();
        assert_eq!((first.offset, first.length), (4096, bytes_max as u64));
        assert_eq!((last.offset, last.length), (4096 + bytes_max as u64, 10_000));
        assert_eq!(first.parity.count(), 2048);
        assert!(ParityMaker::new(5, 0).finish().is_none());
    }
}
