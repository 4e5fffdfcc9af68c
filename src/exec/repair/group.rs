//! A group in a damaged archive: which of its cells are lost, and computing them.

use std::ops::Range;

use super::view::{Moved, View};
use crate::archive::parity::Group as NewGroup;
use crate::archive::record::{EpochId, HEADER_BYTES, LaneId, RecordHeader, RecordKind};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::parity::code::{ColumnCell, restore};
use crate::parity::geometry::{Geometry, RecordLayout};
use crate::parity::tables::{self, HeaderPlace, SUM_BYTES, sum_of};
use crate::parity::{CELL_BYTES, COLUMNS, ROW_BYTES};
use crate::store::Store;

/// Cells that are read at a time.
const CELLS_AT_ONCE: usize = 256;

/// A group, and where its PARITY records lie.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) geometry: Geometry,
    pub(super) layouts: Vec<RecordLayout>,
}

/// What was found of the cells of a group.
#[derive(Debug, Default)]
pub(super) struct Look {
    /// The checksums of all cells, those of the parity last, as far as they are known.
    sums: Vec<Option<u32>>,
    /// Lost cells of each column, by their rows.
    lost: [Vec<usize>; COLUMNS],
    /// Intact cells of parity of each column.
    parity: [Vec<usize>; COLUMNS],
    /// Cells of the group that stood elsewhere in the file, or were taken from another.
    pub(super) found_elsewhere: usize,
}

impl Look {
    /// Returns how many cells of the group are lost.
    pub(super) fn lost(&self) -> usize {
        self.lost.iter().map(Vec::len).sum()
    }

    /// Returns how many more cells of the column that can lose least may be lost; none if a column has lost too much.
    pub(super) fn spare_rows(&self) -> Option<usize> {
        let spare = self.lost.iter().zip(&self.parity);
        spare.map(|(lost, parity)| parity.len().checked_sub(lost.len())).min()?
    }
}

impl Group {
    pub(super) fn new(geometry: Geometry) -> Self {
        Self {
            layouts: geometry.layouts(HEADER_BYTES as u64),
            geometry,
        }
    }

    /// Where a cell of the group lies.
    fn cell(&self, cell: usize) -> Range<u64> {
        let start = self.geometry.offset + (cell * CELL_BYTES) as u64;
        start..self.geometry.end().min(start + CELL_BYTES as u64)
    }

    /// Where a cell of parity begins, and the number of its record.
    fn parity_cell(&self, row: usize, column: usize) -> (u64, usize) {
        let number = self.layouts.partition_point(|layout| layout.rows.end <= row);
        let layout = &self.layouts[number.min(self.layouts.len() - 1)];
        let at = layout.parity + ((row - layout.rows.start) * ROW_BYTES + column * CELL_BYTES) as u64;
        (at, number)
    }

    /// The headers of PARITY records whose bodies have a mask.
    fn masks(&self, store: &dyn Store) -> Vec<Option<RecordHeader>> {
        let header = |layout: &RecordLayout| {
            let mut bytes = [0; HEADER_BYTES];
            store.read_exact_at(layout.start, &mut bytes).ok()?;
            let header = RecordHeader::decode(&bytes).ok()?;
            (header.kind == RecordKind::Parity && header.mask != 0).then_some(header)
        };
        self.layouts.iter().map(header).collect()
    }

    /// Takes the mask off bytes of a PARITY record.
    fn unmask(&self, masks: &[Option<RecordHeader>], number: usize, origin: u64, bytes: &mut [u8]) {
        if let (Some(Some(header)), Some(layout)) = (masks.get(number), self.layouts.get(number)) {
            header.apply_mask(origin - layout.start - HEADER_BYTES as u64, bytes);
        }
    }

    /// Reads a table of the group, of which each block may come from any of its records. `first` is its first block among those of all
    /// tables. Calls `take` with the number of each block that is found, and its entries.
    fn read_table(
        &self,
        (stores, moved): (&[&dyn Store], &[&Moved]),
        blocks: Range<usize>,
        entry_bytes: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> std::io::Result<()> {
        let masks: Vec<Vec<_>> = stores.iter().map(|store| self.masks(*store)).collect();
        let mut block = [0; CELL_BYTES];
        let is_right = |block: &[u8]| tables::entries(block, entry_bytes).is_some();
        for (number, place) in blocks.enumerate() {
            'found: for (record, layout) in self.layouts.iter().enumerate() {
                let origin = layout.tables + (place * CELL_BYTES) as u64;
                for (store, masks) in stores.iter().zip(&masks) {
                    // What lies behind the end of a store is not there.
                    if store.read_exact_at(origin, &mut block).is_ok() {
                        self.unmask(masks, record, origin, &mut block);
                        if is_right(&block) {
                            break 'found;
                        }
                    }
                }
                for file in moved {
                    if file.find(origin, &mut block, is_right)? {
                        break 'found;
                    }
                }
            }
            if let Some(entries) = tables::entries(&block, entry_bytes) {
                take(number, entries);
            }
            block.fill(0);
        }
        Ok(())
    }

    /// Reads which headers stood in the group, as far as the file tells: where each begins in the archive, and its hash.
    pub(super) fn headers(&self, file: &Moved) -> std::io::Result<Vec<(u64, [u8; 8])>> {
        let first = self.geometry.sum_blocks();
        let blocks = first..first + self.geometry.header_blocks();
        let of_block = tables::entries_of_block(HeaderPlace::BYTES);
        let mut headers = Vec::new();
        self.read_table((&[], &[file]), blocks, HeaderPlace::BYTES, |number, entries| {
            let count = (self.geometry.headers as usize)
                .saturating_sub(number * of_block)
                .min(of_block);
            let mut decoder = crate::codec::Decoder::new(entries);
            for _ in 0..count {
                if let Ok(place) = HeaderPlace::decode(&mut decoder) {
                    headers.push((self.geometry.offset + u64::from(place.at), place.hash));
                }
            }
        })?;
        Ok(headers)
    }

    fn sums(&self, view: &View) -> std::io::Result<Vec<Option<u32>>> {
        let mut sums = vec![None; self.geometry.sums()];
        let of_block = tables::entries_of_block(SUM_BYTES);
        let blocks = 0..self.geometry.sum_blocks();
        self.read_table((&[view], &[view.file()]), blocks, SUM_BYTES, |number, entries| {
            let places = sums[number * of_block..].iter_mut();
            for (place, sum) in places.zip(entries.as_chunks::<SUM_BYTES>().0) {
                *place = Some(u32::from_le_bytes(*sum));
            }
        })?;
        Ok(sums)
    }

    /// Looks which cells are lost. Those that stand elsewhere in the file, or in another copy of the archive, are put where they belong.
    ///
    /// # Errors
    /// Returns the error of reading; [`Error::Interrupted`].
    pub(super) fn look(&self, view: &View, others: &[&Moved], monitor: &dyn Monitor) -> Result<Look> {
        let failed = |error| Error::io("read", view.path())(error);
        let mut look = Look {
            sums: self.sums(view).map_err(failed)?,
            ..Look::default()
        };
        let sources: Vec<&Moved> = std::iter::once(view.file()).chain(others.iter().copied()).collect();
        let cells = self.geometry.cells();
        let mut buffer = vec![0; CELLS_AT_ONCE * CELL_BYTES];
        for first in (0..cells).step_by(CELLS_AT_ONCE) {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let last = cells.min(first + CELLS_AT_ONCE);
            let (start, end) = (self.cell(first).start, self.cell(last - 1).end);
            let part = &mut buffer[..usize::try_from(end - start).unwrap_or(0)];
            Self::read_part(view, start, part).map_err(failed)?;
            monitor.advance(part.len() as u64);
            for (cell, content) in (first..last).zip(part.chunks_mut(CELL_BYTES)) {
                if !self
                    .is_intact(&mut look, (view, &sources), cell, content)
                    .map_err(failed)?
                {
                    look.lost[cell % COLUMNS].push(cell / COLUMNS);
                }
            }
        }
        self.look_at_parity(&mut look, view, &sources).map_err(failed)?;
        Ok(look)
    }

    /// Reads a part of the archive, with zeros in place of what lies behind its end.
    fn read_part(view: &View, start: u64, part: &mut [u8]) -> std::io::Result<()> {
        let there = usize::try_from(view.length().saturating_sub(start))
            .unwrap_or(usize::MAX)
            .min(part.len());
        part[there..].fill(0);
        view.read_exact_at(start, &mut part[..there])
    }

    /// Whether a cell is intact. If it stands elsewhere, it is put where it belongs.
    fn is_intact(
        &self,
        look: &mut Look,
        (view, sources): (&View, &[&Moved]),
        cell: usize,
        content: &mut [u8],
    ) -> std::io::Result<bool> {
        let range = self.cell(cell);
        let Some(sum) = look.sums[cell] else {
            // Without a checksum, only a record's own hash proves it.
            return Ok(view.keeps(range.start, range.end));
        };
        if sum_of(content) == sum {
            return Ok(true);
        }
        if view.keeps(range.start, range.end) {
            return Ok(false);
        }
        for source in sources {
            if source.find(range.start, content, |bytes| sum_of(bytes) == sum)? {
                view.write(range.start, content)?;
                look.found_elsewhere += 1;
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn look_at_parity(&self, look: &mut Look, view: &View, sources: &[&Moved]) -> std::io::Result<()> {
        let masks = self.masks(view);
        let mut content = [0; CELL_BYTES];
        for row in 0..self.geometry.stored() {
            for column in 0..COLUMNS {
                let Some(sum) = look.sums[self.geometry.cells() + row * COLUMNS + column] else {
                    continue;
                };
                let (origin, number) = self.parity_cell(row, column);
                Self::read_part(view, origin, &mut content)?;
                self.unmask(&masks, number, origin, &mut content);
                let mut is_intact = sum_of(&content) == sum;
                for source in sources {
                    if !is_intact && source.find(origin, &mut content, |bytes| sum_of(bytes) == sum)? {
                        view.write(origin, &content)?;
                        is_intact = true;
                    }
                }
                if is_intact {
                    look.parity[column].push(row);
                }
            }
        }
        Ok(())
    }

    /// Computes the cells that are lost, column by column. Returns how many it healed.
    ///
    /// # Errors
    /// Returns the error of reading, or of writing what was computed; [`Error::Interrupted`].
    pub(super) fn heal(&self, look: &Look, view: &View, monitor: &dyn Monitor) -> Result<usize> {
        let masks = self.masks(view);
        let mut healed = 0;
        for (column, (lost, parity)) in look.lost.iter().zip(&look.parity).enumerate() {
            if lost.is_empty() || lost.len() > parity.len() {
                continue;
            }
            let read = |which, range: Range<usize>, part: &mut [u8]| {
                if monitor.interrupted() {
                    return Err(Error::Interrupted);
                }
                let read = self.read_cell((view, &masks), column, which, range, part);
                read.map_err(Error::io("read", view.path()))
            };
            if let Some(cells) = restore(self.geometry.rows(), lost, parity, read)? {
                let cells = lost
                    .iter()
                    .map(|row| row * COLUMNS + column)
                    .zip(cells.chunks(CELL_BYTES));
                healed += self.put_healed(look, view, &cells.collect::<Vec<_>>())?;
            }
        }
        Ok(healed)
    }

    fn read_cell(
        &self,
        (view, masks): (&View, &[Option<RecordHeader>]),
        column: usize,
        which: ColumnCell,
        range: Range<usize>,
        part: &mut [u8],
    ) -> std::io::Result<()> {
        match which {
            ColumnCell::Row(row) => {
                let cell = self.cell(row * COLUMNS + column);
                let start = cell.start + range.start as u64;
                let there = usize::try_from(cell.end.saturating_sub(start))
                    .unwrap_or(0)
                    .min(part.len());
                part[there..].fill(0);
                Self::read_part(view, start, &mut part[..there])
            }
            ColumnCell::Parity(row) => {
                let (origin, number) = self.parity_cell(row, column);
                let origin = origin + range.start as u64;
                Self::read_part(view, origin, part)?;
                self.unmask(masks, number, origin, part);
                Ok(())
            }
        }
    }

    /// Puts computed cells into the archive. If the checksum of any is another, what they were computed from was wrong.
    fn put_healed(&self, look: &Look, view: &View, cells: &[(usize, &[u8])]) -> Result<usize> {
        let own = |cell: usize, content: &'_ [u8]| {
            let range = self.cell(cell);
            content
                .len()
                .min(usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(0))
        };
        let is_right = |(cell, content): &(usize, &[u8])| {
            let sum = look.sums[*cell];
            sum.is_none_or(|sum| sum_of(&content[..own(*cell, content)]) == sum)
        };
        if !cells.iter().all(is_right) {
            return Ok(0);
        }
        for (cell, content) in cells {
            let content = &content[..own(*cell, content)];
            let written = view.write(self.cell(*cell).start, content);
            written.map_err(Error::writing("write what was computed for", view.path()))?;
        }
        Ok(cells.len())
    }

    /// Returns whether all PARITY records are what they should be.
    pub(super) fn has_whole_parity(&self, view: &View) -> bool {
        (0..).zip(&self.layouts).all(|(number, layout)| {
            let record = record_at(view, layout.start);
            record.is_some_and(|(header, _)| {
                let sequence = self.geometry.sequence + number;
                let of_group = (header.lane.0, header.epoch.0) == (self.geometry.lane, self.geometry.epoch);
                let length = layout.start + HEADER_BYTES as u64 + header.body_bytes;
                header.kind == RecordKind::Parity && of_group && (header.sequence, length) == (sequence, layout.end)
            })
        })
    }

    /// Makes the PARITY records of the group again, of which all cells are intact. Returns whether it could.
    ///
    /// # Errors
    /// Returns the error of reading, or of writing what was made; [`Error::Interrupted`].
    pub(super) fn remake_parity(&self, view: &View, monitor: &dyn Monitor) -> Result<bool> {
        let mut group = NewGroup::of(&self.geometry);
        let mut buffer = vec![0; CELLS_AT_ONCE * CELL_BYTES];
        let mut at = self.geometry.offset;
        while at < self.geometry.end() {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let left = usize::try_from(self.geometry.end() - at).unwrap_or(usize::MAX);
            let part = &mut buffer[..left.min(CELLS_AT_ONCE * CELL_BYTES)];
            Self::read_part(view, at, part).map_err(Error::io("read", view.path()))?;
            group.push(part);
            at += part.len() as u64;
        }
        let Some(full) = group
            .finish(Some(self.geometry.stored()))
            .filter(|full| full.is_of(&self.geometry))
        else {
            return Ok(false);
        };
        for (number, layout) in (0..).zip(&self.layouts) {
            let mut body = full.body(&self.geometry, number);
            let sequence = self.geometry.sequence + u64::from(number);
            let (lane, epoch) = (LaneId(self.geometry.lane), EpochId(self.geometry.epoch));
            let Ok(header) = RecordHeader::of_body(RecordKind::Parity, lane, epoch, sequence, &mut body) else {
                return Ok(false);
            };
            put_record(view, layout.start, &header, &body)?;
        }
        Ok(true)
    }
}

/// Puts a record into the archive.
///
/// # Errors
/// Returns the error of writing what was computed.
pub(super) fn put_record(view: &View, origin: u64, header: &RecordHeader, body: &[u8]) -> Result<()> {
    let written = view.write(origin, &header.encode());
    let written = written.and_then(|()| view.write(origin + HEADER_BYTES as u64, body));
    written.map_err(Error::writing("write what was computed for", view.path()))
}

/// Reads the record at a place, without its mask, if it is intact.
pub(super) fn record_at(view: &View, origin: u64) -> Option<(RecordHeader, Vec<u8>)> {
    let mut bytes = [0; HEADER_BYTES];
    view.read_exact_at(origin, &mut bytes).ok()?;
    let header = RecordHeader::decode(&bytes).ok()?;
    let start = origin + HEADER_BYTES as u64;
    if header.body_bytes > view.length().saturating_sub(start) {
        return None;
    }
    let mut body = vec![0; usize::try_from(header.body_bytes).ok()?];
    view.read_exact_at(start, &mut body).ok()?;
    header.apply_mask(0, &mut body);
    (crate::archive::record::hash_of(&body) == header.body_hash).then_some((header, body))
}
