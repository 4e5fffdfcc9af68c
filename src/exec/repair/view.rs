//! A damaged archive as it is healed: the bytes of the file, each where it belongs, and what was computed in the place of others. It is a store that can
//! be read like any other, so that all of it is proved before anything is written.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use super::shifts::{Shifts, moved};
use crate::error::Exhausted;
use crate::parity::CELL_BYTES;
use crate::store::Store;

/// Bytes of a cell.
const CELL: u64 = CELL_BYTES as u64;

/// A store in which bytes that cannot be read are zeros. These are lost; what else the disk holds is read.
#[derive(Debug)]
pub(super) struct Readable(pub(super) Arc<dyn Store>);

impl Store for Readable {
    fn path(&self) -> &Path {
        self.0.path()
    }

    fn length(&self) -> io::Result<Option<u64>> {
        self.0.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read_at(offset, buffer) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {}
            other => return other,
        }
        // A sector is tried alone, so that no other is lost with it.
        let in_sector = usize::try_from(CELL - offset % CELL).unwrap_or(CELL_BYTES);
        let end = self.0.length()?.unwrap_or(u64::MAX);
        let left = usize::try_from(end.saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = buffer.len().min(in_sector).min(left);
        let part = &mut buffer[..length];
        match self.0.read_at(offset, part) {
            Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                part.fill(0);
                Ok(part.len())
            }
            other => other,
        }
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        self.0.append(bytes)
    }

    fn settle(&self) -> io::Result<()> {
        self.0.settle()
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.0.truncate(length)
    }
}

/// A file, and where in it what belongs to places of the archive stands.
#[derive(Debug)]
pub(super) struct Moved {
    pub(super) store: Arc<dyn Store>,
    /// Bytes of the file.
    pub(super) length: u64,
    pub(super) shifts: Shifts,
}

impl Moved {
    /// Reads bytes that belong to a place of the archive and are moved by so many bytes, zeros where there are none.
    pub(super) fn read(&self, origin: u64, shift: i64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.fill(0);
        let before = usize::try_from(shift.unsigned_abs().saturating_sub(origin)).unwrap_or(usize::MAX);
        let skipped = if shift < 0 { before.min(buffer.len()) } else { 0 };
        let Some(at) = moved(origin + skipped as u64, shift) else {
            return Ok(());
        };
        let there = usize::try_from(self.length.saturating_sub(at)).unwrap_or(usize::MAX);
        let end = buffer.len().min(skipped.saturating_add(there));
        self.store.read_exact_at(at, &mut buffer[skipped..end.max(skipped)])
    }

    /// Looks for bytes that belong to a place, wherever they may be moved to. Returns whether they are in the buffer then.
    pub(super) fn find(&self, origin: u64, buffer: &mut [u8], is_it: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
        for shift in self.shifts.about(origin) {
            self.read(origin, shift, buffer)?;
            if is_it(buffer) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// A stretch of the archive that is as it was, and stays whatever is computed: a record that matches its hash.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Kept {
    /// Where it stands in the archive as it was.
    pub(super) origin: u64,
    /// Its length.
    pub(super) length: u64,
    /// Where it stands in the file.
    pub(super) at: u64,
}

/// What a healed archive is made of.
#[derive(Debug)]
pub struct View {
    file: Moved,
    length: u64,
    kept: Vec<Kept>,
    /// The cells that are others than in the file, and their places among those.
    slots: RwLock<HashMap<u64, u32>>,
    /// Their bytes.
    cells: File,
}

impl View {
    /// Makes a view of a file in which nothing is computed yet. `kept` is in order; `cells` is an empty file for cells.
    pub(super) fn new(file: Moved, length: u64, kept: Vec<Kept>, cells: File) -> Self {
        Self {
            file,
            length,
            kept,
            slots: RwLock::default(),
            cells,
        }
    }

    /// Makes a view of the same file in which nothing is moved and nothing is computed yet.
    pub(super) fn unmoved(&self, kept: Vec<Kept>) -> io::Result<Self> {
        let file = Moved {
            store: Arc::clone(&self.file.store),
            length: self.file.length,
            shifts: Shifts::default(),
        };
        let cells = self.cells.try_clone()?;
        cells.set_len(0)?;
        Ok(Self::new(file, self.file.length, kept, cells))
    }

    /// Returns the length of the healed archive in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Returns whether the archive is the file as it is.
    pub(super) fn is_the_file(&self) -> bool {
        self.length == self.file.length && self.file.shifts.are_none() && self.with_slots(HashMap::is_empty)
    }

    /// Returns the file.
    pub(super) fn file(&self) -> &Moved {
        &self.file
    }

    /// Returns the cells that are others than in the file, in the order of their places in the file for cells.
    pub(super) fn cells_by_slot(&self) -> Vec<u64> {
        let mut cells: Vec<(u32, u64)> =
            self.with_slots(|slots| slots.iter().map(|(cell, slot)| (*slot, *cell)).collect());
        cells.sort_unstable();
        cells.into_iter().map(|(_, cell)| cell).collect()
    }

    /// Puts what is moved into the file for cells, so that these are all that the file lacks. Returns false if they would be more than a number.
    pub(super) fn hold_moved(&self, cells_max: usize) -> io::Result<bool> {
        let mut at = 0;
        while at < self.length {
            let (shift, end) = self.file.shifts.at(at);
            if shift == 0 {
                at = end;
                continue;
            }
            for cell in at / CELL..end.min(self.length).div_ceil(CELL) {
                if self.with_slots(HashMap::len) >= cells_max {
                    return Ok(false);
                }
                let mut content = [0; CELL_BYTES];
                self.read_cell(cell, &mut content)?;
                self.put_cell(cell, &content)?;
            }
            at = end;
        }
        Ok(self.with_slots(HashMap::len) <= cells_max)
    }

    /// Returns whether the file becomes another one once it has the cells that were computed. Some may have come back to what they were.
    pub(super) fn changes_the_file(&self) -> io::Result<bool> {
        if self.length != self.file.length {
            return Ok(true);
        }
        let (mut healed, mut stored) = ([0; CELL_BYTES], [0; CELL_BYTES]);
        for cell in self.cells_by_slot() {
            self.read_cell(cell, &mut healed)?;
            let start = cell * CELL;
            let left = usize::try_from(self.length.saturating_sub(start)).unwrap_or(usize::MAX);
            let count = left.min(CELL_BYTES);
            self.file.store.read_exact_at(start, &mut stored[..count])?;
            if healed[..count] != stored[..count] {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn with_slots<T>(&self, read: impl FnOnce(&HashMap<u64, u32>) -> T) -> T {
        read(&self.slots.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Puts bytes into the archive. What is kept stays.
    pub(super) fn write(&self, origin: u64, bytes: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let at = origin + done as u64;
            let (cell, within) = (at / CELL, usize::try_from(at % CELL).unwrap_or(0));
            let count = (CELL_BYTES - within).min(bytes.len() - done);
            let mut content = [0; CELL_BYTES];
            self.read_cell(cell, &mut content)?;
            let before = content;
            content[within..within + count].copy_from_slice(&bytes[done..done + count]);
            self.restore_kept(cell, &mut content)?;
            if content != before {
                self.put_cell(cell, &content)?;
            }
            done += count;
        }
        Ok(())
    }

    /// Reads a cell, with zeros behind the archive's end.
    pub(super) fn read_cell(&self, cell: u64, content: &mut [u8; CELL_BYTES]) -> io::Result<()> {
        content.fill(0);
        let left = usize::try_from(self.length.saturating_sub(cell * CELL)).unwrap_or(usize::MAX);
        self.read_exact_at(cell * CELL, &mut content[..left.min(CELL_BYTES)])
    }

    fn put_cell(&self, cell: u64, content: &[u8; CELL_BYTES]) -> io::Result<()> {
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let next =
            u32::try_from(slots.len()).map_err(|_| io::Error::other("more is damaged than can be healed at once"))?;
        let slot = *slots.entry(cell).or_insert(next);
        let written = self.cells.write_all_at(content, u64::from(slot) * CELL);
        if written.is_err() && slot == next {
            slots.remove(&cell);
        }
        written.map_err(|error| match Exhausted::of(error.kind()) {
            Some(_) => io::Error::new(error.kind(), "there is no space for what was computed"),
            None => error,
        })
    }

    /// Puts the bytes of kept stretches back into a cell.
    fn restore_kept(&self, cell: u64, content: &mut [u8; CELL_BYTES]) -> io::Result<()> {
        let (start, end) = (cell * CELL, (cell + 1) * CELL);
        let first = self.kept.partition_point(|kept| kept.origin + kept.length <= start);
        for kept in self.kept[first..].iter().take_while(|kept| kept.origin < end) {
            let (from, to) = (kept.origin.max(start), (kept.origin + kept.length).min(end));
            if from < to {
                let range = usize::try_from(from - start).unwrap_or(0)..usize::try_from(to - start).unwrap_or(0);
                self.file
                    .store
                    .read_exact_at(kept.at + (from - kept.origin), &mut content[range])?;
            }
        }
        Ok(())
    }

    /// Returns whether all of a range is kept.
    pub(super) fn keeps(&self, mut start: u64, end: u64) -> bool {
        let first = self.kept.partition_point(|kept| kept.origin + kept.length <= start);
        for kept in &self.kept[first..] {
            if start >= end || kept.origin > start {
                break;
            }
            start = start.max(kept.origin + kept.length);
        }
        start >= end
    }
}

impl Store for View {
    fn path(&self) -> &Path {
        self.file.store.path()
    }

    fn length(&self) -> io::Result<Option<u64>> {
        Ok(Some(self.length))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = offset.saturating_add(buffer.len() as u64).min(self.length);
        if offset >= limit {
            return Ok(0);
        }
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let part = |end: u64| usize::try_from(end.min(limit) - offset).unwrap_or(0);
        if let Some(slot) = slots.get(&(offset / CELL)) {
            let count = part((offset / CELL + 1) * CELL);
            let at = u64::from(*slot) * CELL + offset % CELL;
            self.cells.read_exact_at(&mut buffer[..count], at)?;
            return Ok(count);
        }
        let (shift, run_end) = self.file.shifts.at(offset);
        let mut end = limit.min(run_end);
        if !slots.is_empty() {
            let cells = offset / CELL + 1..end.div_ceil(CELL);
            let next = cells.into_iter().find(|cell| slots.contains_key(cell));
            end = next.map_or(end, |cell| cell * CELL);
        }
        let count = part(end);
        self.file.read(offset, shift, &mut buffer[..count])?;
        Ok(count)
    }

    fn append(&self, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use super::super::scan::Anchor;
    use super::*;
    use crate::store::MemoryStore;

    fn bytes_of(view: &View) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(view.length()).unwrap()];
        view.read_exact_at(0, &mut bytes).unwrap();
        bytes
    }

    fn view(file: &[u8], length: u64, anchors: &[(u64, u64)], kept: Vec<Kept>) -> View {
        let anchors = anchors.iter().map(|(origin, at)| Anchor {
            origin: *origin,
            at: *at,
        });
        let moved = Moved {
            store: Arc::new(MemoryStore::of(file.to_vec())),
            length: file.len() as u64,
            shifts: Shifts::new(anchors.collect()),
        };
        View::new(moved, length, kept, tempfile::tempfile().unwrap())
    }

    #[test]
    fn bytes_stand_where_they_belong() {
        let was: Vec<u8> = (0..20_000u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
        let mut file = was.clone();
        file.drain(5000..5100);
        let view = view(&file, 20_000, &[(0, 0), (6000, 5900)], Vec::new());
        let read = bytes_of(&view);
        assert!(read[..5000] == was[..5000] && read[6000..] == was[6000..]);
        view.write(5000, &was[5000..6000]).unwrap();
        assert!(bytes_of(&view) == was);
        assert_eq!(view.cells_by_slot(), [1]);
        assert!(!view.is_the_file());
        assert!(view.hold_moved(5).unwrap() && bytes_of(&view) == was);
        assert_eq!(view.cells_by_slot(), [1, 2, 3, 4]);
    }

    #[test]
    fn what_the_file_lacks_is_zeros() {
        let view = view(&[7; 5000], 9000, &[(100, 0)], Vec::new());
        let read = bytes_of(&view);
        assert!(read[..100] == [0; 100] && read[100..5100] == [7; 5000] && read[5100..] == [0; 3900]);
    }

    #[test]
    fn what_is_kept_stays() {
        let file: Vec<u8> = (0..10_000u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
        let kept = vec![Kept {
            origin: 1000,
            length: 5000,
            at: 1000,
        }];
        let view = view(&file, 10_000, &[], kept);
        view.write(0, &[9; 9000]).unwrap();
        let read = bytes_of(&view);
        assert!(read[..1000] == [9; 1000] && read[1000..6000] == file[1000..6000]);
        assert!(read[6000..9000] == [9; 3000] && read[9000..] == file[9000..]);
        assert!(view.keeps(1000, 6000) && !view.keeps(999, 1001) && !view.keeps(5000, 6001));
    }
}
