//! A disk in one file, whose grains lie in any order: a directory says where tables lie, and these where grains do.

use super::{
    AT_END, DESCRIPTOR_BYTES_MAX, Header, SECTOR, SECTOR_LEN, TABLE_ENTRIES, TABLE_SECTORS, Wrong, descriptor,
};
use crate::error::Result;
use crate::foreign::container::one_disk::{Page, Piece, Pieces};
use crate::foreign::random::RandomInput;

/// A disk in one file.
pub(in crate::foreign::container) struct Sparse<'a> {
    input: RandomInput<'a>,
    header: Header,
    directory: Page,
    tables: Page,
}

impl<'a> Sparse<'a> {
    /// Reads the header and the descriptor.
    pub(in crate::foreign::container) fn open(input: RandomInput<'a>) -> Result<Self> {
        let mut bytes = [0; SECTOR_LEN];
        input.exact_at(0, &mut bytes, None)?;
        let header = Header::parse(&bytes, input.limits().volume_bytes).map_err(|wrong| match wrong {
            Wrong::Damaged(problem) => input.damaged(0, SECTOR, None, problem),
            Wrong::Refused(problem) => input.refused(problem),
        })?;
        if header.descriptor == 0 || header.descriptor_sectors == 0 {
            return Err(input.refused(descriptor::WITHOUT));
        }
        let bytes = (header.descriptor_sectors * SECTOR).min(DESCRIPTOR_BYTES_MAX);
        let mut text = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        input.exact_at(header.descriptor.saturating_mul(SECTOR), &mut text, None)?;
        // Those of several files have room for a descriptor, and none.
        if !descriptor::is_descriptor(&text) {
            return Err(input.refused(descriptor::WITHOUT));
        }
        if let Some(problem) = descriptor::why_not_alone(&text) {
            return Err(input.refused(problem));
        }
        let directory = header.directory.checked_mul(SECTOR);
        let end = directory.and_then(|directory| directory.checked_add(header.tables() * 4));
        if header.directory == 0 || header.directory == AT_END || end.is_none_or(|end| end > input.length()) {
            let start = directory.unwrap_or(u64::MAX);
            return Err(input.damaged(start, header.tables() * 4, None, "its directory is not in the file"));
        }
        Ok(Self {
            input,
            header,
            directory: Page::default(),
            tables: Page::default(),
        })
    }

    /// The first entry, and how many follow each other from it on that stand for zeros. An entry that does not is alone.
    fn entries(bytes: &[u8], is_zeros: impl Fn(u32) -> bool) -> (u32, u64) {
        let (entries, _) = bytes.as_chunks::<4>();
        let mut entries = entries.iter().map(|entry| u32::from_le_bytes(*entry));
        let first = entries.clone().next().unwrap_or_default();
        if !is_zeros(first) {
            return (first, 1);
        }
        let zeros = entries.position(|entry| !is_zeros(entry)).unwrap_or(bytes.len() / 4);
        (first, zeros as u64)
    }
}

impl<'a> Pieces<'a> for Sparse<'a> {
    fn input(&self) -> &RandomInput<'a> {
        &self.input
    }

    fn size(&self) -> u64 {
        self.header.size()
    }

    fn piece(&mut self, at: u64) -> Result<Piece> {
        let (input, header) = (&self.input, &self.header);
        let read = |at: u64, buffer: &mut [u8]| input.exact_at(at, buffer, None);
        let grain = at / SECTOR / header.grain;
        let (table, entry) = (grain / TABLE_ENTRIES, grain % TABLE_ENTRIES);
        let zeros_to = |grain: u64| Piece {
            end: (grain * header.grain).min(header.capacity) * SECTOR,
            place: None,
        };
        let start = header.directory * SECTOR;
        let end = start + header.tables() * 4;
        let bytes = self.directory.bytes_at(start + table * 4, end, input.length(), read)?;
        let (table_at, count) = Self::entries(bytes, |entry| entry == 0);
        if table_at == 0 {
            return Ok(zeros_to((table + count.max(1)) * TABLE_ENTRIES));
        }
        let start = u64::from(table_at) * SECTOR;
        let end = start + TABLE_SECTORS * SECTOR;
        // Tables may lie far from each other, so that no more than this one is read.
        let file_end = end.min(input.length());
        let bytes = self.tables.bytes_at(start + entry * 4, end, file_end, read)?;
        let is_zeros = |entry| !header.is_stored(entry);
        let (place, count) = Self::entries(bytes, is_zeros);
        if is_zeros(place) {
            return Ok(zeros_to(grain + count.max(1)));
        }
        let grain_bytes = header.grain * SECTOR;
        Ok(Piece {
            end: (grain + 1) * grain_bytes,
            place: Some(u64::from(place) * SECTOR + at % grain_bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_that_stand_for_zeros_are_passed_over_together() {
        let entries = |numbers: &[u32]| {
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            Sparse::entries(&bytes, |entry| entry <= 1)
        };
        assert_eq!(entries(&[1, 0, 1, 5, 1]), (1, 3));
        assert_eq!(entries(&[0, 1]), (0, 2));
        assert_eq!(entries(&[5, 0]), (5, 1));
        assert_eq!(entries(&[]), (0, 0));
    }
}
