//! The log of a VHDX: what was written to it, and perhaps not to its place yet. Nothing is written here. What the log has is put in the place of
//! what the file has, whenever that is read.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use super::{Guid, Header, MIB, not_replayed};
use crate::error::Result;
use crate::foreign::array;
use crate::foreign::random::RandomInput;

/// The unit of the log.
const SECTOR: u64 = 4096;
const SECTOR_LEN: usize = 4096;
/// Bytes of a log, of which 4 for each sector are kept. Logs have 1 MiB, or a few more for very large disks.
const LOG_BYTES_MAX: u64 = 256 * MIB;
/// Changes of an active log. They take less than 8 MiB while they are kept.
const CHANGES_MAX: usize = 1 << 16;
/// Bytes behind the end of the file up to which a log may have content. Content goes to its place, and the log has tables only.
const BEHIND_BYTES_MAX: u64 = 256 * MIB;
/// Length of a file that a log may ask for. Sums of places and of lengths of tables stay far below what a number has room for.
const LENGTH_MAX: u64 = 1 << 62;
const ENTRY_HEADER_BYTES: u64 = 64;
const DESCRIPTOR_BYTES: u64 = 32;

/// An entry of the log. Places are in sectors of the log.
#[derive(Debug, Clone, Copy)]
struct Entry {
    at: u64,
    sectors: u64,
    /// Where the oldest entry lies that must be replayed with this one.
    tail: u64,
    sequence: u64,
    descriptors: u64,
    /// The length that the file had, at least, and the one that it must have.
    flushed_bytes: u64,
    file_bytes: u64,
}

/// What a range of the file holds in truth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Zeros,
    /// A sector that lies in the log at this place. Its ends are kept apart, because the log has its own marks there.
    Sector {
        at: u64,
        first: [u8; 8],
        last: [u8; 4],
    },
}

/// Ranges of the file, by their first byte: the end of each, and what it holds. They do not overlap.
#[derive(Debug, Default)]
struct Changes(BTreeMap<u64, (u64, Content)>);

impl Changes {
    /// Notes what a range holds, in the place of what was noted before.
    fn set(&mut self, start: u64, end: u64, content: Content) {
        if let Some((before, (its_end, its))) = self.0.range(..start).next_back().map(|(at, range)| (*at, *range))
            && its_end > start
        {
            self.0.insert(before, (start, its));
            if its_end > end {
                self.0.insert(end, (its_end, its));
            }
        }
        while let Some((at, (its_end, its))) = self.0.range(start..end).next().map(|(at, range)| (*at, *range)) {
            self.0.remove(&at);
            if its_end > end {
                self.0.insert(end, (its_end, its));
            }
        }
        self.0.insert(start, (end, content));
    }

    /// The ranges that have bytes of `start..end`.
    fn within(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, Content)> + '_ {
        let before = self
            .0
            .range(..start)
            .next_back()
            .filter(move |(_, (its_end, _))| *its_end > start);
        let ranges = before.into_iter().chain(self.0.range(start..end));
        ranges.map(|(start, (end, content))| (*start, *end, *content))
    }
}

/// A file as it is once its log is replayed.
pub(super) struct Logged<'a> {
    input: RandomInput<'a>,
    length: u64,
    /// Where content ends. What lies behind that is zeros.
    content_end: u64,
    changes: Changes,
}

impl<'a> Logged<'a> {
    /// Reads the log, if there is one that must be replayed.
    pub(super) fn open(input: RandomInput<'a>, header: &Header) -> Result<Self> {
        let mut file = Self {
            length: input.length(),
            content_end: input.length(),
            changes: Changes::default(),
            input,
        };
        if header.log_guid == [0; 16] || header.log_bytes == 0 {
            return Ok(file);
        }
        let is_aligned = header.log_bytes.is_multiple_of(MIB) && header.log.is_multiple_of(MIB);
        let end = header.log.checked_add(header.log_bytes);
        if !is_aligned || header.log < MIB || end.is_none_or(|end| end > input.length()) {
            return Err(input.damaged(header.log, header.log_bytes, None, "its log is not in the file"));
        }
        if header.log_bytes > LOG_BYTES_MAX {
            return Err(not_replayed(&input, "it is longer than vmfold takes"));
        }
        let log = Log {
            input,
            start: header.log,
            sectors: header.log_bytes / SECTOR,
            guid: header.log_guid,
        };
        for entry in log.active()? {
            log.replay(&entry, &mut file)?;
        }
        Ok(file)
    }

    pub(super) fn input(&self) -> &RandomInput<'a> {
        &self.input
    }

    /// Its length in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Where its content ends. What lies behind that is zeros.
    pub(super) fn content_end(&self) -> u64 {
        self.content_end
    }

    /// Fills a buffer with the bytes at an offset, as [`RandomInput::exact_at`] does.
    pub(super) fn exact_at(&self, offset: u64, buffer: &mut [u8], volume: Option<&Path>) -> Result<()> {
        let end = offset
            .checked_add(buffer.len() as u64)
            .filter(|end| *end <= self.length);
        let Some(end) = end else {
            return self.input.exact_at(offset, buffer, volume);
        };
        // The log may say that the file is longer than it is.
        let there = self.input.length().saturating_sub(offset).min(end - offset);
        let (there, behind) = buffer.split_at_mut(usize::try_from(there).unwrap_or(usize::MAX));
        self.input.exact_at(offset.min(self.input.length()), there, volume)?;
        behind.fill(0);
        for (start, its_end, content) in self.changes.within(offset, end) {
            let (from, to) = (start.max(offset), its_end.min(end));
            let length = usize::try_from(to - from).unwrap_or(usize::MAX);
            let at = usize::try_from(from - offset).unwrap_or(usize::MAX);
            match content {
                Content::Zeros => buffer[at..at + length].fill(0),
                Content::Sector { at: place, first, last } => {
                    let mut sector = [0; SECTOR_LEN];
                    self.input.exact_at(place, &mut sector, volume)?;
                    sector[..8].copy_from_slice(&first);
                    sector[SECTOR_LEN - 4..].copy_from_slice(&last);
                    let skipped = usize::try_from(from - start).unwrap_or(usize::MAX);
                    buffer[at..at + length].copy_from_slice(&sector[skipped..skipped + length]);
                }
            }
        }
        Ok(())
    }
}

/// A log, which is a ring of sectors.
struct Log<'a> {
    input: RandomInput<'a>,
    start: u64,
    sectors: u64,
    guid: Guid,
}

impl Log<'_> {
    /// Where a sector lies in the file.
    fn place(&self, sector: u64) -> u64 {
        self.start + sector % self.sectors * SECTOR
    }

    fn sector(&self, sector: u64) -> Result<[u8; SECTOR_LEN]> {
        let mut bytes = [0; SECTOR_LEN];
        self.input.exact_at(self.place(sector), &mut bytes, None)?;
        Ok(bytes)
    }

    /// The entries that must be replayed, the oldest first: those of the sequence that was written last.
    fn active(&self) -> Result<Vec<Entry>> {
        let (entries, has_more) = self.entries()?;
        let by_end: HashMap<u64, usize> = entries
            .iter()
            .enumerate()
            .map(|(number, entry)| ((entry.at + entry.sectors) % self.sectors, number))
            .collect();
        let by_start: HashMap<u64, &Entry> = entries.iter().map(|entry| (entry.at, entry)).collect();
        let follows = |one: &Entry, next: &Entry| one.sequence.checked_add(1) == Some(next.sequence);
        let mut active: Vec<Entry> = Vec::new();
        for head in &entries {
            let next = by_start.get(&((head.at + head.sectors) % self.sectors));
            if next.is_some_and(|next| follows(head, next)) {
                continue;
            }
            // From the last entry back to the one that it names.
            let mut sequence = vec![*head];
            let mut first = head;
            while first.at != head.tail {
                let before = by_end.get(&first.at).map(|number| &entries[*number]);
                let Some(before) = before.filter(|before| follows(before, first)) else {
                    break;
                };
                first = before;
                sequence.push(*first);
            }
            let is_later = active.last().is_none_or(|last| last.sequence < head.sequence);
            if first.at == head.tail && is_later {
                sequence.reverse();
                active = sequence;
            }
        }
        let length = self.sectors * SECTOR;
        let damaged = |problem| self.input.damaged(self.start, length, None, problem);
        match active.last() {
            None if has_more || !entries.is_empty() => {
                Err(damaged("its log has entries, and none that can be replayed"))
            }
            Some(last) if last.flushed_bytes > self.input.length() => Err(damaged("it is shorter than its log says")),
            _ => Ok(active),
        }
    }

    /// All entries that are whole, and whether there are others.
    fn entries(&self) -> Result<(Vec<Entry>, bool)> {
        let mut begins = Vec::new();
        for sector in 0..self.sectors {
            let mut mark = [0; 4];
            self.input.exact_at(self.place(sector), &mut mark, None)?;
            begins.push(mark == *b"loge");
        }
        let (mut entries, mut has_more) = (Vec::new(), false);
        for sector in 0..self.sectors {
            if !begins[usize::try_from(sector).unwrap_or(usize::MAX)] {
                continue;
            }
            let bytes = self.sector(sector)?;
            if array(&bytes, 32) != self.guid {
                continue;
            }
            // No entry has the beginning of another one inside, so that no sector is looked at twice.
            let is_alone = |entry: &Entry| {
                let inside = (1..entry.sectors).map(|sector| (entry.at + sector) % self.sectors);
                inside
                    .map(|sector| usize::try_from(sector).unwrap_or(usize::MAX))
                    .all(|sector| !begins[sector])
            };
            match self.entry(sector, &bytes).filter(is_alone) {
                Some(entry) if self.has_checksum(&entry, &bytes)? => entries.push(entry),
                _ => has_more = true,
            }
        }
        Ok((entries, has_more))
    }

    /// The entry whose first sector this is, if its numbers make sense.
    fn entry(&self, at: u64, bytes: &[u8; SECTOR_LEN]) -> Option<Entry> {
        let (length, tail) = (
            u64::from(u32::from_le_bytes(array(bytes, 8))),
            u64::from(u32::from_le_bytes(array(bytes, 12))),
        );
        let entry = Entry {
            at,
            sectors: length / SECTOR,
            tail: tail / SECTOR,
            sequence: u64::from_le_bytes(array(bytes, 16)),
            descriptors: u32::from_le_bytes(array(bytes, 24)).into(),
            flushed_bytes: u64::from_le_bytes(array(bytes, 48)),
            file_bytes: u64::from_le_bytes(array(bytes, 56)),
        };
        let is_aligned = length.is_multiple_of(SECTOR) && tail.is_multiple_of(SECTOR);
        let has_room = (1..=self.sectors).contains(&entry.sectors) && entry.tail < self.sectors;
        let has_descriptors = entry.descriptor_sectors() <= entry.sectors;
        (is_aligned && has_room && has_descriptors && entry.sequence > 0).then_some(entry)
    }

    /// Whether an entry has the CRC32C that it tells, made with zeros in its place.
    fn has_checksum(&self, entry: &Entry, first: &[u8; SECTOR_LEN]) -> Result<bool> {
        let told = u32::from_le_bytes(array(first, 4));
        let mut bytes = *first;
        bytes[4..8].fill(0);
        let mut checksum = crc32c::crc32c(&bytes);
        for sector in 1..entry.sectors {
            checksum = crc32c::crc32c_append(checksum, &self.sector(entry.at + sector)?);
        }
        Ok(checksum == told)
    }

    /// Puts what an entry says in the place of what the file has.
    fn replay(&self, entry: &Entry, file: &mut Logged<'_>) -> Result<()> {
        let damaged = |problem| {
            self.input
                .damaged(self.place(entry.at), entry.sectors * SECTOR, None, problem)
        };
        let mut data = entry.at + entry.descriptor_sectors();
        let end = entry.at + entry.sectors;
        let mut bytes = self.sector(entry.at)?;
        for number in 0..entry.descriptors {
            let at = ENTRY_HEADER_BYTES + number * DESCRIPTOR_BYTES;
            if number > 0 && at.is_multiple_of(SECTOR) {
                bytes = self.sector(entry.at + at / SECTOR)?;
            }
            let from = usize::try_from(at % SECTOR).unwrap_or(usize::MAX);
            let descriptor: [u8; 32] = array(&bytes, from);
            let (length, start) = (
                u64::from_le_bytes(array(&descriptor, 8)),
                u64::from_le_bytes(array(&descriptor, 16)),
            );
            let is_zeros = descriptor.starts_with(b"zero");
            let length = if is_zeros { length } else { SECTOR };
            let range_end = start.checked_add(length);
            let is_aligned = start.is_multiple_of(SECTOR) && length.is_multiple_of(SECTOR);
            let is_known = is_zeros || descriptor.starts_with(b"desc");
            let is_of_entry = u64::from_le_bytes(array(&descriptor, 24)) == entry.sequence;
            let (Some(range_end), true) = (range_end, is_aligned && is_known && is_of_entry) else {
                return Err(damaged("an entry of its log makes no sense"));
            };
            let content = if is_zeros {
                Content::Zeros
            } else {
                let sector = self.sector(data)?;
                let [high, low] = [array(&sector, 4), array(&sector, SECTOR_LEN - 4)].map(u32::from_le_bytes);
                let sequence = u64::from(high) << 32 | u64::from(low);
                if data >= end || !sector.starts_with(b"data") || sequence != entry.sequence {
                    return Err(damaged("an entry of its log has less data than it says"));
                }
                data += 1;
                Content::Sector {
                    at: self.place(data - 1),
                    first: array(&descriptor, 8),
                    last: array(&descriptor, 4),
                }
            };
            if !is_zeros {
                file.content_end = file.content_end.max(range_end);
            }
            if file.content_end - self.input.length() > BEHIND_BYTES_MAX {
                return Err(damaged("its log has content far behind its end"));
            }
            if length > 0 {
                file.changes.set(start, range_end, content);
                file.length = file.length.max(range_end);
            }
            if file.changes.0.len() > CHANGES_MAX {
                return Err(not_replayed(&self.input, "it has more changes than vmfold takes"));
            }
        }
        file.length = file.length.max(entry.file_bytes);
        if file.length > LENGTH_MAX {
            return Err(damaged("its log makes it longer than any file may be"));
        }
        Ok(())
    }
}

impl Entry {
    /// Sectors of its header and its descriptors, which come before its data.
    fn descriptor_sectors(&self) -> u64 {
        (ENTRY_HEADER_BYTES + self.descriptors * DESCRIPTOR_BYTES).div_ceil(SECTOR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn later_changes_win(ranges in prop::collection::vec((0u64..40, 1u64..12), 0..30)) {
            let mut changes = Changes::default();
            let mut expected = [None; 64];
            for (number, (start, length)) in ranges.into_iter().enumerate() {
                let content = Content::Sector { at: number as u64, first: [0; 8], last: [0; 4] };
                changes.set(start, start + length, content);
                for at in start..start + length {
                    expected[usize::try_from(at).unwrap()] = Some(content);
                }
            }
            for at in 0..64u64 {
                let found: Vec<_> = changes.within(at, at + 1).map(|(_, _, content)| content).collect();
                prop_assert_eq!(found, Vec::from_iter(expected[usize::try_from(at).unwrap()]));
            }
        }
    }
}
