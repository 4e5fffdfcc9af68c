//! How much of an archive has parity.

use super::parity::geometry_in;
use super::reader::Archive;
use super::record::{HEADER_BYTES, RecordKind};
use super::sealed_end;
use crate::error::Result;
use crate::parity::geometry::{GEOMETRY_BYTES, Geometry};

/// The parity that an archive has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Protected {
    /// Percent of a group that heal, as the last commit has it; 0 if that has no parity.
    pub percent: u8,
    /// Where the groups end that cover the archive from its beginning without a gap.
    pub end: u64,
}

impl Archive {
    /// Returns whether a search finds PARITY records, intact or not.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn has_parity(&self) -> Result<bool> {
        let is_parity = |kind: RecordKind| kind == RecordKind::Parity;
        let is_found = self.records_found()?.iter().any(|(header, _)| is_parity(header.kind));
        Ok(is_found || self.broken_kinds()?.any(is_parity))
    }

    /// Returns the parity that the last commit has: from the archive's end, or from a search if one was made.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn last_parity(&self) -> Result<Protected> {
        if let Some(geometry) = self.parity_at_end()? {
            return Ok(Protected {
                percent: geometry.percent,
                end: geometry.end(),
            });
        }
        if !self.was_searched() {
            return Ok(Protected::default());
        }
        self.searched_parity()
    }

    /// Returns the parity of the archive, which is searched for it.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn searched_parity(&self) -> Result<Protected> {
        let (end, last) = (self.base().length, self.last_of_main().map(|last| last.epoch));
        let mut protected = Protected::default();
        let mut groups = Vec::new();
        let reader = self.record_reader();
        let found = self.records_found()?.iter();
        for (header, offset) in found.filter(|(header, _)| header.kind == RecordKind::Parity) {
            let mut bytes = [0; GEOMETRY_BYTES];
            if header.body_bytes < GEOMETRY_BYTES as u64 {
                continue;
            }
            reader.read_exact(offset + HEADER_BYTES as u64, &mut bytes)?;
            header.apply_mask(0, &mut bytes);
            let Some((geometry, _)) = geometry_in(&bytes) else {
                continue;
            };
            if *offset >= end || Some(header.epoch) == last {
                protected.percent = geometry.percent;
            }
            if *offset < end {
                groups.push((geometry.offset, geometry.end()));
            }
        }
        groups.sort_unstable();
        for (start, end) in groups {
            if start <= protected.end {
                protected.end = protected.end.max(end);
            }
        }
        Ok(protected)
    }

    /// The group whose PARITY records stand before the last copy of the last COMMIT, and that before the TAIL that ends the archive.
    fn parity_at_end(&self) -> Result<Option<Geometry>> {
        let Some(last) = self.last_of_main().filter(|_| self.has_tail()) else {
            return Ok(None);
        };
        let behind = (HEADER_BYTES as u64 + RecordKind::Tail.body_bytes_max()).saturating_add(last.location.length);
        let mut parity_end = self.base().length.saturating_sub(behind);
        while let Some(before) = sealed_end::end_before_keys(self.record_reader(), parity_end, last.location.length)? {
            parity_end = before;
        }
        let Some(trailer) = parity_end.checked_sub(GEOMETRY_BYTES as u64) else {
            return Ok(None);
        };
        let mut bytes = [0; GEOMETRY_BYTES];
        self.record_reader().read_exact(trailer, &mut bytes)?;
        let found = geometry_in(&bytes).map(|(geometry, _)| geometry);
        let ends_here = |geometry: &Geometry| {
            let layouts = geometry.layouts(HEADER_BYTES as u64);
            let commit = geometry.commit.map(|commit| commit.body_hash);
            layouts.last().is_some_and(|layout| layout.end == parity_end) && commit == Some(last.location.body_hash)
        };
        Ok(found.filter(ends_here))
    }
}
