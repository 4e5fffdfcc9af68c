//! Tar, entry by entry: ustar and pax (POSIX.1-2001), and what GNU tar adds: long names, large numbers, and sparse files in its four forms (GNU tar
//! manual, "Tar Internals"). Only what is needed to read files is kept.

use super::{Input, array};
use crate::content::FileTime;
use crate::error::Result;

/// Bytes of a block. Headers and content are padded to whole ones.
pub(super) const BLOCK: usize = 512;
/// Bytes of a name, a link, or what else pax and GNU headers have beside maps.
const RECORDS_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a sparse map as text.
const MAP_BYTES_MAX: u64 = 64 << 20;
/// Ranges of a sparse map. They take 64 MiB while they are read.
const MAP_RANGES_MAX: usize = 2 << 20;
/// Bytes of a name.
const NAME_BYTES_MAX: usize = 4096;
/// Headers that may come before an entry's own.
const EXTRA_HEADERS_MAX: usize = 16;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// A file, sparse or not.
    File,
    /// Another name of a file that came before.
    HardLink,
    /// A folder.
    Folder,
    /// Anything else, by its letter.
    Other(u8),
}

/// A range of a file that an entry has content of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) kind: EntryKind,
    /// Its name, as it stands there.
    pub(super) name: Vec<u8>,
    /// What a link leads to.
    pub(super) link: Vec<u8>,
    /// The length of the file.
    pub(super) size: u64,
    /// What of the file is there, ascending and disjoint.
    pub(super) stored: Vec<Stored>,
    pub(super) time: Option<FileTime>,
}

/// What pax and GNU headers say of the entry that follows.
#[derive(Debug, Default)]
struct Extra {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    time: Option<FileTime>,
    sparse_major: Option<u64>,
    sparse_minor: Option<u64>,
    real_size: Option<u64>,
    /// The numbers of a map in pax records.
    map: Vec<u64>,
    has_map: bool,
}

/// A tar archive that is read in order.
pub(super) struct Tar<'a> {
    input: Input<'a>,
    /// Bytes of the current entry's content that were not read.
    left: u64,
    /// Bytes behind it, up to a whole block.
    padding: u64,
}

impl<'a> Tar<'a> {
    pub(super) fn new(input: Input<'a>) -> Self {
        Self {
            input,
            left: 0,
            padding: 0,
        }
    }

    pub(super) fn input(&mut self) -> &mut Input<'a> {
        &mut self.input
    }

    /// Skips the rest of the current entry, and reads the header of the next. Returns `None` at the end, which is two blocks of zeros. What
    /// follows those is not read.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip_rest()?;
        let mut extra = Extra::default();
        for _ in 0..EXTRA_HEADERS_MAX {
            let start = self.input.offset();
            let mut header = [0; BLOCK];
            self.input.exact(&mut header, None)?;
            if header == [0; BLOCK] {
                self.input.exact(&mut header, None)?;
                if header != [0; BLOCK] {
                    return Err(self.damaged(start, "a single block of zeros stands between entries"));
                }
                return Ok(None);
            }
            if !has_checksum(&header) {
                return Err(self.damaged(start, "the header of an entry has another checksum"));
            }
            let size = number(&header[124..136]).ok_or_else(|| self.damaged(start, "an entry has no proper size"))?;
            match header[156] {
                kind @ (b'x' | b'X') => self.take_pax(kind, size, &mut extra)?,
                b'g' => self.skip_global(size)?,
                b'L' => extra.name = Some(self.text(size)?),
                b'K' => extra.link = Some(self.text(size)?),
                _ => return self.entry(&header, start, extra).map(Some),
            }
        }
        Err(self.damaged(self.input.offset(), "an entry has more headers than allowed"))
    }

    /// Reads the next bytes of an entry's content into a buffer, `length` of them at most. There are none at the end.
    pub(super) fn content(&mut self, buffer: &mut Vec<u8>, length: u64) -> Result<()> {
        let length = self.left.min(length);
        buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        self.input.exact(buffer, None)?;
        self.left -= length;
        Ok(())
    }

    /// The error for an entry that is not as it must be.
    pub(super) fn damaged(&self, start: u64, problem: &str) -> crate::error::Error {
        self.input.damaged(start, BLOCK as u64, None, problem)
    }

    /// Skips what was not read of the current entry.
    pub(super) fn skip_rest(&mut self) -> Result<()> {
        let length = self.left.saturating_add(self.padding);
        (self.left, self.padding) = (0, 0);
        self.input.skip(length)
    }

    /// Begins the content of an entry or of a header: so many bytes.
    fn begin(&mut self, bytes: u64) {
        self.left = bytes;
        self.padding = bytes.wrapping_neg() % BLOCK as u64;
    }

    fn records(&mut self, size: u64, bytes_max: u64) -> Result<Vec<u8>> {
        if size > bytes_max {
            return Err(self.damaged(self.input.offset(), "a header is longer than allowed"));
        }
        self.begin(size);
        let mut records = Vec::new();
        self.content(&mut records, size)?;
        self.skip_rest()?;
        Ok(records)
    }

    /// Skips records that hold for all entries that follow. They must not say what these are.
    fn skip_global(&mut self, size: u64) -> Result<()> {
        let start = self.input.offset();
        let records = self.records(size, RECORDS_BYTES_MAX)?;
        let mut rest = &records[..];
        while !rest.is_empty() {
            let ((key, _), after) =
                pax_record(rest).ok_or_else(|| self.damaged(start, "a pax header has a record that makes no sense"))?;
            rest = after;
            if [&b"path"[..], b"linkpath", b"size"].contains(&key) || key.starts_with(b"GNU.sparse.") {
                return Err(self.damaged(start, "a header gives all files the same name or size"));
            }
        }
        Ok(())
    }

    /// A name in a header of GNU tar.
    fn text(&mut self, size: u64) -> Result<Vec<u8>> {
        let text = self.records(size, NAME_BYTES_MAX as u64 + 1)?;
        Ok(until_nul(&text).to_vec())
    }

    fn take_pax(&mut self, kind: u8, size: u64, extra: &mut Extra) -> Result<()> {
        let start = self.input.offset();
        let records = self.records(size, MAP_BYTES_MAX)?;
        let mut others_bytes = 0;
        let mut rest = &records[..];
        while !rest.is_empty() {
            let (record, after) =
                pax_record(rest).ok_or_else(|| self.damaged(start, "a pax header has a record that makes no sense"))?;
            rest = after;
            let is_map = record.0.starts_with(b"GNU.sparse.");
            others_bytes += if is_map { 0 } else { record.0.len() + record.1.len() };
            if others_bytes as u64 > RECORDS_BYTES_MAX {
                return Err(self.damaged(start, "a header is longer than allowed"));
            }
            // Solaris' own kind has the same records, of which only these are common.
            if kind == b'x' || !is_map {
                extra.take(record).map_err(|problem| self.damaged(start, problem))?;
            }
        }
        Ok(())
    }

    /// Makes the entry of a header, and of what came before it.
    fn entry(&mut self, header: &[u8; BLOCK], start: u64, extra: Extra) -> Result<Entry> {
        let damaged = |tar: &Self, problem| tar.damaged(start, problem);
        let stored_bytes = match extra.size {
            Some(size) => size,
            None => number(&header[124..136]).ok_or_else(|| damaged(self, "an entry has no proper size"))?,
        };
        let kind = match header[156] {
            b'0' | 0 | b'7' | b'S' => EntryKind::File,
            b'1' => EntryKind::HardLink,
            b'5' => EntryKind::Folder,
            other => EntryKind::Other(other),
        };
        let name = extra.name.clone().unwrap_or_else(|| ustar_name(header));
        if name.len() > NAME_BYTES_MAX {
            return Err(damaged(self, "a name is longer than allowed"));
        }
        let link = extra
            .link
            .clone()
            .unwrap_or_else(|| until_nul(&header[157..257]).to_vec());
        let seconds = number(&header[136..148]).and_then(|seconds| i64::try_from(seconds).ok());
        let time = extra.time.or(seconds.map(|seconds| FileTime {
            seconds,
            nanoseconds: 0,
        }));
        // Only files have content. A hard link may tell the size of what it leads to.
        self.begin(if kind == EntryKind::File {
            stored_bytes
        } else {
            other_bytes(kind, stored_bytes)
        });
        let (size, numbers) = if kind != EntryKind::File {
            (0, Vec::new())
        } else if header[156] == b'S' {
            self.left = stored_bytes;
            self.old_map(header, start)?
        } else if extra.sparse_major == Some(1) {
            if extra.sparse_minor != Some(0) {
                return Err(damaged(self, "a sparse file is of a form that is not known"));
            }
            (
                extra
                    .real_size
                    .ok_or_else(|| damaged(self, "a sparse file has no size"))?,
                self.text_map(start)?,
            )
        } else if extra.has_map {
            (
                extra
                    .real_size
                    .ok_or_else(|| damaged(self, "a sparse file has no size"))?,
                extra.map,
            )
        } else {
            (stored_bytes, vec![0, stored_bytes])
        };
        // What else has content is skipped.
        let left = if kind == EntryKind::File { self.left } else { 0 };
        let stored = map_of(&numbers, left, size).map_err(|problem| damaged(self, problem))?;
        Ok(Entry {
            kind,
            name,
            link,
            size,
            stored,
            time,
        })
    }

    /// The map of a sparse file in GNU tar's own form: in the header, and in blocks that follow it.
    fn old_map(&mut self, header: &[u8; BLOCK], start: u64) -> Result<(u64, Vec<u64>)> {
        let damaged = |tar: &Self| tar.damaged(start, "the map of a sparse file makes no sense");
        let mut numbers = Vec::new();
        let size = number(&header[483..495]).ok_or_else(|| damaged(self))?;
        let mut take = |entries: &[u8]| -> Option<()> {
            for entry in entries.chunks_exact(24).take_while(|entry| entry[0] != 0) {
                numbers.extend([number(&entry[..12])?, number(&entry[12..])?]);
            }
            Some(())
        };
        take(&header[386..482]).ok_or_else(|| damaged(self))?;
        let mut has_more = header[482] != 0;
        let mut blocks = 0;
        while has_more {
            let mut block = [0; BLOCK];
            self.input.exact(&mut block, None)?;
            take(&block[..504]).ok_or_else(|| damaged(self))?;
            has_more = block[504] != 0;
            blocks += 1;
            if blocks * 21 > MAP_RANGES_MAX {
                return Err(self.damaged(start, "the map of a sparse file is longer than allowed"));
            }
        }
        Ok((size, numbers))
    }

    /// The map of a sparse file in the form 1.0: decimal numbers on lines, before the content.
    fn text_map(&mut self, start: u64) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        let mut expected = None;
        let mut digits = Vec::new();
        let mut block = Vec::new();
        while expected.is_none_or(|expected| numbers.len() < expected) {
            self.content(&mut block, BLOCK as u64)?;
            if block.len() < BLOCK {
                return Err(self.damaged(start, "a sparse file has no map"));
            }
            for byte in &block {
                if expected.is_some_and(|expected| numbers.len() == expected) {
                    break;
                }
                if *byte != b'\n' {
                    digits.push(*byte);
                    if digits.len() <= 20 {
                        continue;
                    }
                }
                let value =
                    decimal(&digits).ok_or_else(|| self.damaged(start, "the map of a sparse file makes no sense"))?;
                digits.clear();
                if expected.is_some() {
                    numbers.push(value);
                } else if value <= MAP_RANGES_MAX as u64 {
                    expected = Some(usize::try_from(value).unwrap_or(usize::MAX) * 2);
                } else {
                    return Err(self.damaged(start, "the map of a sparse file is longer than allowed"));
                }
            }
        }
        Ok(numbers)
    }
}

/// Bytes of the content of what is no file.
fn other_bytes(kind: EntryKind, size: u64) -> u64 {
    match kind {
        // GNU tar writes the size of links and folders as 0, and others that of what the link leads to.
        EntryKind::HardLink | EntryKind::Folder | EntryKind::Other(b'2'..=b'6') => 0,
        _ => size,
    }
}

impl Extra {
    /// Takes a record of a pax header.
    fn take(&mut self, (key, value): PaxRecord<'_>) -> std::result::Result<(), &'static str> {
        let wrong = "a number in a pax header makes no sense";
        let parsed = || decimal(value).ok_or(wrong);
        match key {
            // GNU tar keeps the name of a sparse file apart from that which other programs show.
            b"GNU.sparse.name" => self.name = Some(value.to_vec()),
            b"path" if self.name.is_none() || !self.is_sparse() => self.name = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(parsed()?),
            b"mtime" => self.time = time(value),
            b"GNU.sparse.major" => self.sparse_major = Some(parsed()?),
            b"GNU.sparse.minor" => self.sparse_minor = Some(parsed()?),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => {
                self.real_size = Some(parsed()?);
                self.has_map |= key == b"GNU.sparse.size";
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                self.map.push(parsed()?);
                self.has_map = true;
            }
            b"GNU.sparse.map" => {
                self.map.clear();
                for digits in value.split(|byte| *byte == b',').filter(|digits| !digits.is_empty()) {
                    self.map.push(decimal(digits).ok_or(wrong)?);
                    if self.map.len() > MAP_RANGES_MAX * 2 {
                        break;
                    }
                }
                self.has_map = true;
            }
            _ => {}
        }
        if self.map.len() > MAP_RANGES_MAX * 2 {
            return Err("the map of a sparse file is longer than allowed");
        }
        Ok(())
    }

    fn is_sparse(&self) -> bool {
        self.has_map || self.sparse_major.is_some()
    }
}

/// The ranges of a map, whose numbers are offsets and lengths in turn. `left` bytes of content are there, of a file of `size` bytes.
fn map_of(numbers: &[u64], left: u64, size: u64) -> std::result::Result<Vec<Stored>, &'static str> {
    let (pairs, rest) = numbers.as_chunks::<2>();
    let (mut stored, mut end, mut sum) = (Vec::new(), 0u64, 0u64);
    for [offset, length] in pairs {
        let next = offset
            .checked_add(*length)
            .filter(|next| *offset >= end && *next <= size);
        end = next.ok_or("the map of a sparse file has ranges that overlap, or that lie behind its end")?;
        sum += length;
        if *length > 0 {
            stored.push(Stored {
                offset: *offset,
                length: *length,
            });
        }
    }
    if !rest.is_empty() || sum != left {
        return Err("a file has more or less content than its header says");
    }
    Ok(stored)
}

pub(super) fn has_checksum(header: &[u8; BLOCK]) -> bool {
    let sum = |header: &[u8]| header.iter().map(|byte| u64::from(*byte)).sum::<u64>();
    let without = sum(&header[..148]) + sum(&[b' '; 8]) + sum(&header[156..]);
    number(&header[148..156]) == Some(without)
}

/// A number of a header: octal digits, or from the second bit on, big-endian.
pub(super) fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (first, rest) = (field[0] & 0x7f, &field[1..]);
        let (upper, lower) = rest.split_at(rest.len() - rest.len().min(8));
        if first != 0 || upper.iter().any(|byte| *byte != 0) {
            return None;
        }
        return Some(lower.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)));
    }
    let text = field.trim_ascii_start();
    let end = text
        .iter()
        .position(|byte| matches!(byte, 0 | b' '))
        .unwrap_or(text.len());
    if text[end..].iter().any(|byte| !matches!(byte, 0 | b' ')) {
        return None;
    }
    text[..end].iter().try_fold(0u64, |value, digit| {
        let digit = digit.checked_sub(b'0').filter(|digit| *digit < 8)?;
        value.checked_mul(8)?.checked_add(digit.into())
    })
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// A time of a pax header: seconds with a fraction, which may be negative.
fn time(value: &[u8]) -> Option<FileTime> {
    let text = std::str::from_utf8(value).ok()?;
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.map(char::from).collect::<String>().parse::<u32>().ok()?;
    let whole = seconds.parse::<i64>().ok()?;
    Some(if seconds.starts_with('-') && nanoseconds > 0 {
        FileTime {
            seconds: whole.checked_sub(1)?,
            nanoseconds: 1_000_000_000 - nanoseconds,
        }
    } else {
        FileTime {
            seconds: whole,
            nanoseconds,
        }
    })
}

/// The key and the value of a record of a pax header.
pub(super) type PaxRecord<'a> = (&'a [u8], &'a [u8]);

/// The first record of a pax header, as its key and its value, and what follows it: a decimal length, a space, key, `=`, value, a line's end.
pub(super) fn pax_record(bytes: &[u8]) -> Option<(PaxRecord<'_>, &[u8])> {
    let space = bytes.iter().take(21).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(&bytes[..space])?).ok()?;
    let record = bytes.get(space + 1..length)?;
    let record = record.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some(((&record[..equals], &record[equals + 1..]), &bytes[length..]))
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// The name of a header without pax: with its prefix, if it is one of ustar. GNU tar has other things in that place.
pub(super) fn ustar_name(header: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&header[..100]);
    let prefix = until_nul(&header[345..500]);
    if array::<8>(header, 257) != *b"ustar\x0000" || prefix.is_empty() {
        return name.to_vec();
    }
    [prefix, b"/", name].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn numbers_are_octal_or_large() {
        for (field, expected) in [
            (&b"00000001750\0"[..], Some(1000)),
            (b"   1750 \0\0\0\0", Some(1000)),
            (b"\0\0\0\0\0\0\0\0\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(8 << 30)),
            (b"\x80\0\0\x01\0\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"00000001758\0", None),
            (b"12 34\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(number(field), expected, "{field:?}");
        }
    }

    #[test]
    fn times_have_fractions_and_may_lie_before_1970() {
        let of = |text: &str| time(text.as_bytes()).map(|time| (time.seconds, time.nanoseconds));
        assert_eq!(of("1700000000"), Some((1_700_000_000, 0)));
        assert_eq!(of("1700000000.25"), Some((1_700_000_000, 250_000_000)));
        assert_eq!(of("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(of("-0.5"), Some((-1, 500_000_000)));
        assert_eq!(of("x"), None);
        assert_eq!(of("1.x"), None);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes: Vec<u8>, numbers: Vec<u64>, left: u64, size: u64) {
            let _ = pax_record(&bytes);
            let _ = time(&bytes);
            let _ = map_of(&numbers, left, size);
            bytes.resize(12, 0);
            let _ = number(&bytes);
        }

        #[test]
        fn a_pax_record_comes_back(key in "[a-z.]{1,9}", value: Vec<u8>, after: Vec<u8>) {
            let rest = [b" ", key.as_bytes(), b"=", &value, b"\n"].concat();
            let length = (1..6).map(|digits| rest.len() + digits).find(|length| length.to_string().len() + rest.len() == *length);
            let record = [length.unwrap().to_string().as_bytes(), &rest, &after].concat();
            prop_assert_eq!(pax_record(&record), Some(((key.as_bytes(), &value[..]), &after[..])));
        }
    }
}
