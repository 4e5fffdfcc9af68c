//! A disk as a stream of compressed grains (streamOptimized), which is read in order. Tables say which grains there are: before the grains, as
//! qemu-img writes them, or behind them, where a footer says where they are. Each grain that they name must come, and none else.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::path::PathBuf;

use flate2::{Decompress, FlushDecompress, Status};

use super::{AT_END, Header, KIND, SECTOR, SECTOR_LEN, SUFFIXES, TABLE_ENTRIES, TABLE_SECTORS, Wrong, descriptor};
use crate::block::NumberSet;
use crate::error::{Error, Result};
use crate::foreign::container::image_name;
use crate::foreign::{Backup, Compression, Event, Input, Volume, array};

/// Bytes of a marker that come before the content of a grain.
const MARKER_LEN: usize = 12;
/// Bytes of a grain for each of which the limits allow a bit.
const GRAIN_BYTES_MIN: u64 = 1 << 16;
/// What markers stand for that are not of a grain.
const END: u32 = 0;
const TABLE: u32 = 1;
const DIRECTORY: u32 = 2;
const FOOTER: u32 = 3;

/// What lies before the grains and is read, in the order of places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Descriptor,
    Directory,
    /// A table, by its number.
    Table(u64),
}

/// A table that came behind the grains: its place, in sectors, and a bit for each of its grains.
struct Table {
    place: u64,
    stored: [u64; 8],
}

/// A disk as a stream.
pub(in crate::foreign) struct Stream<'a> {
    input: Input<'a>,
    /// The path of its volume.
    path: PathBuf,
    header: Header,
    /// Where the directory is or comes, in sectors, as far as it is known.
    directory: Option<u64>,
    /// Where the directory came.
    directory_came: Option<u64>,
    tables: Vec<Table>,
    /// The grains that tables name, and how many these are.
    named: NumberSet<u32>,
    named_count: u64,
    /// The grains that came.
    came: NumberSet<u32>,
    came_count: u64,
}

impl<'a> Stream<'a> {
    /// Reads what lies before the grains. `path` is that of the volume.
    pub(in crate::foreign) fn open(mut input: Input<'a>, path: PathBuf) -> Result<Self> {
        let start = input.offset();
        let mut bytes = [0; SECTOR_LEN];
        input.exact(&mut bytes, Some(&path))?;
        let header = Header::parse(&bytes, input.limits().volume_bytes).map_err(|wrong| match wrong {
            Wrong::Damaged(problem) => input.damaged(start, SECTOR, Some(path.clone()), problem),
            Wrong::Refused(problem) => input.refused(problem),
        })?;
        if header.flags & super::IS_COMPRESSED == 0 || header.flags & super::HAS_MARKERS == 0 || !header.is_deflated {
            return Err(input.refused("it is a VMDK whose grains are compressed in a way that is not known"));
        }
        if header.grains() > input.limits().volume_bytes / GRAIN_BYTES_MIN {
            return Err(input.refused("it is a VMDK of more grains than vmfold takes"));
        }
        let grains = usize::try_from(header.grains()).unwrap_or(usize::MAX);
        let mut stream = Self {
            path,
            directory: (header.directory != AT_END).then_some(header.directory),
            directory_came: None,
            tables: Vec::new(),
            named: NumberSet::new(grains),
            named_count: 0,
            came: NumberSet::new(grains),
            came_count: 0,
            header,
            input,
        };
        stream.front()?;
        Ok(stream)
    }

    /// The length of the disk in bytes.
    pub(in crate::foreign) fn size(&self) -> u64 {
        self.header.size()
    }

    /// Whether the tables lie before the grains.
    fn has_tables_in_front(&self) -> bool {
        self.header.directory < self.header.overhead
    }

    /// Reads what lies before the grains: the descriptor, and tables if they are there.
    fn front(&mut self) -> Result<()> {
        let header = self.header.clone();
        let mut parts = BinaryHeap::new();
        if header.descriptor != 0 && header.descriptor_sectors != 0 {
            parts.push(Reverse((header.descriptor, Part::Descriptor)));
        }
        if self.has_tables_in_front() {
            parts.push(Reverse((header.directory, Part::Directory)));
        }
        let mut at = 1;
        while let Some(Reverse((place, part))) = parts.pop() {
            let sectors = match part {
                Part::Descriptor => header.descriptor_sectors,
                Part::Directory => (header.tables() * 4).div_ceil(SECTOR),
                Part::Table(_) => TABLE_SECTORS,
            };
            let end = place.checked_add(sectors).filter(|end| *end <= header.overhead);
            let (true, Some(end)) = (place >= at, end) else {
                let problem = "its descriptor and its tables overlap, or lie elsewhere";
                return Err(self.damaged(self.input.offset(), SECTOR, problem));
            };
            self.input.skip((place - at).saturating_mul(SECTOR))?;
            let bytes = self.sectors(sectors)?;
            match part {
                Part::Descriptor => {
                    if let Some(problem) = descriptor::why_not_alone(&bytes) {
                        return Err(self.input.refused(problem));
                    }
                }
                Part::Directory => {
                    let tables = entries(&bytes).zip(0..header.tables()).filter(|(place, _)| *place != 0);
                    parts.extend(tables.map(|(place, table)| Reverse((place.into(), Part::Table(table)))));
                    self.directory_came = Some(place);
                }
                Part::Table(table) => self.name_grains(table, &self.stored_of(&bytes))?,
            }
            at = end;
        }
        let rest = header
            .overhead
            .checked_sub(at)
            .and_then(|rest| rest.checked_mul(SECTOR));
        let rest = rest.ok_or_else(|| self.damaged(0, SECTOR, "its header says that grains begin elsewhere"))?;
        self.input.skip(rest)
    }

    /// Takes the next sectors.
    fn sectors(&mut self, count: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; usize::try_from(count * SECTOR).unwrap_or(usize::MAX)];
        self.input.exact(&mut bytes, Some(&self.path))?;
        Ok(bytes)
    }

    /// A bit for each entry of a table that names a grain.
    fn stored_of(&self, bytes: &[u8]) -> [u64; 8] {
        let mut stored = [0; 8];
        for (at, entry) in entries(bytes).take(512).enumerate() {
            stored[at / 64] |= u64::from(self.header.is_stored(entry)) << (at % 64);
        }
        stored
    }

    /// Notes the grains that a table names.
    fn name_grains(&mut self, table: u64, stored: &[u64; 8]) -> Result<()> {
        for at in (0..512u16).filter(|at| stored[usize::from(at / 64)] >> (at % 64) & 1 == 1) {
            let grain = table * TABLE_ENTRIES + u64::from(at);
            match u32::try_from(grain).ok().filter(|_| grain < self.header.grains()) {
                Some(grain) if !self.named.contains(grain) => self.named.insert(grain),
                _ => {
                    return Err(self.damaged(self.input.offset(), 0, "a table has a grain behind the end of the disk"));
                }
            }
            self.named_count += 1;
        }
        Ok(())
    }

    /// Puts the next grain into the buffer, and returns its offset in the disk. It is `None` at the end, once all grains have come.
    ///
    /// # Errors
    /// Those of [`Backup::next`].
    pub(in crate::foreign) fn next_grain(&mut self, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        loop {
            let start = self.input.offset();
            let mut first = [0; SECTOR_LEN];
            match self.input.fill(&mut first)? {
                0 if self.has_tables_in_front() => return self.end(start),
                SECTOR_LEN => {}
                _ => return Err(self.damaged(start, SECTOR, "it ends too early")),
            }
            let (sectors, size) = (
                u64::from_le_bytes(array(&first, 0)),
                u32::from_le_bytes(array(&first, 8)),
            );
            if size > 0 {
                return self.grain(sectors, size, &first, start, buffer).map(Some);
            }
            match u32::from_le_bytes(array(&first, 12)) {
                END => {
                    self.input.zeros_to_end()?;
                    return self.end(start);
                }
                TABLE => self.table(sectors, start)?,
                DIRECTORY => self.directory(sectors, start)?,
                FOOTER => self.footer(sectors, start)?,
                _ => return Err(self.damaged(start, SECTOR, "a marker is of no kind that is known")),
            }
        }
    }

    /// Reads a grain, whose first sector came already.
    fn grain(
        &mut self,
        lba: u64,
        size: u32,
        first: &[u8; SECTOR_LEN],
        start: u64,
        buffer: &mut Vec<u8>,
    ) -> Result<u64> {
        let grain_bytes = self.header.grain * SECTOR;
        let damaged = |stream: &Self, problem| stream.damaged(start, u64::from(size) + MARKER_LEN as u64, problem);
        let number = u32::try_from(lba / self.header.grain)
            .ok()
            .filter(|_| lba < self.header.capacity && lba.is_multiple_of(self.header.grain));
        let number = number.ok_or_else(|| damaged(self, "a grain lies behind the end of the disk, or between two"))?;
        if self.came.contains(number) {
            return Err(damaged(self, "a grain came before"));
        }
        if self.directory_came.is_some() && !self.named.contains(number) {
            return Err(damaged(self, "a grain comes that no table names"));
        }
        if u64::from(size) > grain_bytes * 2 + SECTOR {
            return Err(damaged(self, "a grain is longer than allowed"));
        }
        let size = size as usize;
        let mut compressed = first[MARKER_LEN..].to_vec();
        compressed.resize((MARKER_LEN + size).next_multiple_of(SECTOR_LEN) - MARKER_LEN, 0);
        self.input
            .exact(&mut compressed[SECTOR_LEN - MARKER_LEN..], Some(&self.path))?;
        // One byte more shows that there is more.
        let grain_len = usize::try_from(grain_bytes).unwrap_or(usize::MAX);
        buffer.resize(grain_len + 1, 0);
        let mut inflate = Decompress::new(true);
        let status = inflate.decompress(&compressed[..size], buffer, FlushDecompress::Finish);
        let rest = (self.header.capacity - lba).saturating_mul(SECTOR).min(grain_bytes);
        let is_whole = matches!(status, Ok(Status::StreamEnd)) && inflate.total_in() == size as u64;
        if !is_whole || !(rest..=grain_bytes).contains(&inflate.total_out()) {
            return Err(damaged(self, "a grain cannot be decompressed"));
        }
        buffer.truncate(usize::try_from(rest).unwrap_or(usize::MAX));
        self.came.insert(number);
        self.came_count += 1;
        Ok(lba * SECTOR)
    }

    /// Takes a table that came behind grains.
    fn table(&mut self, sectors: u64, start: u64) -> Result<()> {
        if sectors != TABLE_SECTORS || self.tables.len() as u64 >= self.header.tables() || self.has_tables_in_front() {
            return Err(self.damaged(start, SECTOR, "a table is longer than it may be, or one too many"));
        }
        let bytes = self.sectors(sectors)?;
        self.tables.push(Table {
            place: start / SECTOR + 1,
            stored: self.stored_of(&bytes),
        });
        Ok(())
    }

    /// Takes the directory, which came behind all tables.
    fn directory(&mut self, sectors: u64, start: u64) -> Result<()> {
        let needed = (self.header.tables() * 4).div_ceil(SECTOR);
        let is_allowed = (needed..needed + 128).contains(&sectors);
        if !is_allowed || self.directory_came.is_some() {
            return Err(self.damaged(
                start,
                SECTOR,
                "a directory has another length than it must have, or is one too many",
            ));
        }
        let bytes = self.sectors(sectors)?;
        for (place, table) in entries(&bytes)
            .zip(0..self.header.tables())
            .filter(|(place, _)| *place != 0)
        {
            let at = self.tables.binary_search_by_key(&u64::from(place), |table| table.place);
            let at = at.map_err(|_| self.damaged(start, SECTOR, "a table is missing that the directory names"))?;
            let stored = self.tables[at].stored;
            self.name_grains(table, &stored)?;
        }
        self.directory_came = Some(start / SECTOR + 1);
        Ok(())
    }

    /// Takes the footer, which is the header once more, with the place of the directory.
    fn footer(&mut self, sectors: u64, start: u64) -> Result<()> {
        let bytes = self.sectors(1)?;
        let footer = Header::parse(&array(&bytes, 0), self.input.limits().volume_bytes);
        match footer {
            Ok(footer)
                if sectors == 1
                    && self.directory.is_none_or(|place| place == footer.directory)
                    && (footer.capacity, footer.grain, footer.flags)
                        == (self.header.capacity, self.header.grain, self.header.flags) =>
            {
                self.directory = Some(footer.directory);
                Ok(())
            }
            _ => Err(self.damaged(start, 2 * SECTOR, "its footer is not that of its header")),
        }
    }

    /// Checks at the end that each grain came that tables name, and that no other did.
    fn end(&self, at: u64) -> Result<Option<u64>> {
        if self.directory_came.is_none() || self.directory_came != self.directory {
            return Err(self.damaged(at, 0, "its directory or its footer is missing"));
        }
        let grains = u32::try_from(self.header.grains()).unwrap_or(u32::MAX);
        if self.named_count == self.came_count
            && self
                .came
                .runs(0..grains)
                .all(|run| self.named.runs(run.clone()).eq([run]))
        {
            return Ok(None);
        }
        let missing = (0..grains).find(|grain| self.named.contains(*grain) && !self.came.contains(*grain));
        let problem = match missing {
            Some(grain) => {
                let offset = u64::from(grain) * self.header.grain * SECTOR;
                format!("grains are missing, the first at byte {offset} of the disk")
            }
            None => "it has grains that no table names".into(),
        };
        Err(self.damaged(at, 0, problem))
    }

    fn damaged(&self, start: u64, length: u64, problem: impl Into<String>) -> Error {
        self.input.damaged(start, length, Some(self.path.clone()), problem)
    }
}

/// The entries of a table or of the directory.
fn entries(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|entry| u32::from_le_bytes(*entry))
}

/// Opens a backup that is such a stream. `compression` is the one that the input had.
///
/// # Errors
/// Those of [`Stream::open`].
pub(in crate::foreign) fn open_stream(
    input: Input<'_>,
    compression: Option<Compression>,
) -> Result<Box<dyn Backup + '_>> {
    Ok(Box::new(StreamBackup::open(input, compression)?))
}

/// A backup that is such a stream.
struct StreamBackup<'a> {
    stream: Stream<'a>,
    /// The volume, until it was told.
    volume: Option<Volume>,
    is_ended: bool,
}

impl<'a> StreamBackup<'a> {
    /// Reads what lies before the grains. `compression` is the one that the input had.
    fn open(input: Input<'a>, compression: Option<Compression>) -> Result<Self> {
        let is_suffix = |suffix: &str| compression.is_some_and(|one| one.suffixes().contains(&suffix));
        let suffix = input.path().extension().and_then(|suffix| suffix.to_str());
        let path = match suffix.map(str::to_ascii_lowercase) {
            Some(suffix) if is_suffix(&suffix) => image_name(&input.path().with_extension(""), &SUFFIXES),
            _ => image_name(input.path(), &SUFFIXES),
        };
        let stream = Stream::open(input, path.clone())?;
        let volume = Volume {
            path,
            size: Some(stream.size()),
            time: None,
        };
        Ok(Self {
            stream,
            volume: Some(volume),
            is_ended: false,
        })
    }
}

impl Backup for StreamBackup<'_> {
    fn kind(&self) -> &'static str {
        KIND
    }

    fn proves_each_volume(&self) -> bool {
        !self.stream.input.is_decompressed()
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        if let Some(volume) = self.volume.take() {
            return Ok(Some(Event::Volume(volume)));
        }
        if self.is_ended {
            return Ok(None);
        }
        if let Some(offset) = self.stream.next_grain(buffer)? {
            return Ok(Some(Event::Data { volume: 0, offset }));
        }
        self.is_ended = true;
        let size = self.stream.size();
        Ok(Some(Event::End { volume: 0, size }))
    }

    fn leave_out(&mut self, _: usize) {
        // Nothing else is in it.
        self.is_ended = true;
    }
}
