//! What containers of a single disk have in common: pieces of the disk that lie somewhere in the file, and tables that say where.

use super::{Disk, PART_BYTES};
use crate::error::Result;
use crate::foreign::Volume;
use crate::foreign::random::RandomInput;

/// A piece of a disk, from where it was asked for up to `end`. It may reach beyond the end of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) end: u64,
    /// Where it lies in the file. What lies nowhere is zeros.
    pub(super) place: Option<u64>,
}

/// A disk in pieces.
pub(super) trait Pieces<'a> {
    /// The file.
    fn input(&self) -> &RandomInput<'a>;

    /// The length of the disk in bytes.
    fn size(&self) -> u64;

    /// How many bytes the pieces have together, at most: no two of them lie in the same place.
    fn bytes_max(&self) -> u64 {
        self.input().length()
    }

    /// The piece at an offset, which is below the disk's length.
    ///
    /// # Errors
    /// [`crate::error::Error::DamagedBackup`]; those of reading.
    fn piece(&mut self, at: u64) -> Result<Piece>;

    /// Fills a buffer with what lies at a place.
    ///
    /// # Errors
    /// Those of [`RandomInput::exact_at`].
    fn read(&self, place: u64, buffer: &mut [u8], volume: &Volume) -> Result<()> {
        self.input().exact_at(place, buffer, Some(&volume.path))
    }
}

/// A container of a single disk.
pub(super) struct OneDisk<P> {
    kind: &'static str,
    volume: Volume,
    pieces: P,
    /// Bytes that were handed over.
    handed_over: u64,
}

impl<'a, P: Pieces<'a>> OneDisk<P> {
    /// The disk in a file whose name ends with one of these suffixes.
    pub(super) fn new(kind: &'static str, suffixes: &[&str], pieces: P) -> Self {
        let volume = Volume {
            path: super::image_name(pieces.input().path(), suffixes),
            size: Some(pieces.size()),
            time: None,
        };
        Self {
            kind,
            volume,
            pieces,
            handed_over: 0,
        }
    }

    /// How many bytes from `at` on lie one behind the other from `place` on: those of a piece that ends at `end`, and of those that follow.
    fn run(&mut self, at: u64, place: u64, end: u64) -> u64 {
        let (size, most) = (self.pieces.size(), PART_BYTES as u64);
        let mut length = (end.min(size) - at).min(most);
        while length < most && at + length < size {
            // What is wrong with the next piece shows when it is its turn.
            let Ok(next) = self.pieces.piece(at + length) else {
                break;
            };
            if next.place.is_none() || next.place != place.checked_add(length) {
                break;
            }
            length = (next.end.min(size) - at).min(most);
        }
        length
    }
}

impl<'a, P: Pieces<'a>> Disk for OneDisk<P> {
    fn kind(&self) -> &'static str {
        self.kind
    }

    fn volumes(&self) -> Vec<Volume> {
        vec![self.volume.clone()]
    }

    fn content(&mut self, _: usize, from: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        let mut at = from;
        while at < self.pieces.size() {
            let piece = self.pieces.piece(at)?;
            let end = piece.end.max(at + 1);
            let Some(place) = piece.place else {
                at = end;
                continue;
            };
            let length = self.run(at, place, end);
            self.handed_over += length;
            if self.handed_over > self.pieces.bytes_max() {
                let problem = "its tables place several pieces of the disk in the same place";
                let path = Some(self.volume.path.clone());
                return Err(self.pieces.input().damaged(place, length, path, problem));
            }
            buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
            self.pieces.read(place, buffer, &self.volume)?;
            return Ok(Some(at));
        }
        Ok(None)
    }
}

/// The page of a table that was read last. Tables are read from their beginning to their end, so that one page is enough.
#[derive(Default)]
pub(super) struct Page {
    start: u64,
    bytes: Vec<u8>,
}

impl Page {
    /// Bytes of a page.
    const BYTES: u64 = 1 << 16;

    /// The bytes of a table from `at` on, of which there are `file_bytes` in the file before its end: as many as are at hand, none behind
    /// `end`. These are whole entries of up to 8 bytes, one at least, if `at` is where one begins.
    ///
    /// # Errors
    /// Those of `read`.
    pub(super) fn bytes_at(
        &mut self,
        at: u64,
        end: u64,
        file_bytes: u64,
        read: impl FnOnce(u64, &mut [u8]) -> Result<()>,
    ) -> Result<&[u8]> {
        let have = self.start..self.start.saturating_add(self.bytes.len() as u64);
        if !have.contains(&at) {
            let rest = file_bytes.saturating_sub(at).min(Self::BYTES) / 8 * 8;
            let length = if rest == 0 { (end - at).min(Self::BYTES) } else { rest };
            self.bytes.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
            // Nothing is at hand if it cannot be read.
            let mut bytes = std::mem::take(&mut self.bytes);
            read(at, &mut bytes)?;
            (self.start, self.bytes) = (at, bytes);
        }
        let from = usize::try_from(at - self.start).unwrap_or(usize::MAX);
        let to = usize::try_from(end.saturating_sub(self.start)).unwrap_or(usize::MAX);
        Ok(self.bytes.get(from..to.min(self.bytes.len())).unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_read_once_and_ends_with_the_file_or_the_table() {
        let mut page = Page::default();
        let mut lengths = Vec::new();
        for (at, end, file_bytes) in [
            (512, 1024, 100_000),
            (1000, 1024, 100_000),
            (512, 70_000, 70_000),
            (66_048, 70_000, 70_000),
        ] {
            let mut was_read = 0;
            let bytes = page.bytes_at(at, end, file_bytes, |_, buffer| {
                was_read = buffer.len();
                Ok(())
            });
            lengths.push((bytes.unwrap().len(), was_read));
        }
        assert_eq!(lengths, [(512, 65_536), (24, 0), (65_536, 0), (3952, 3952)]);
    }
}
