//! VHDX, Microsoft's newer format (MS-VHDX): two headers, a table of regions, metadata, and a table of blocks. A log holds what was not written to
//! its place yet. It is read as if it had been.

mod log;

use self::log::Logged;
use super::one_disk::{OneDisk, Page, Piece, Pieces};
use crate::error::{Error, Result};
use crate::foreign::random::RandomInput;
use crate::foreign::{Volume, array};

pub(super) const KIND: &str = "a VHDX image";
pub(super) const MAGIC: &[u8] = b"vhdxfile";
const SUFFIXES: [&str; 1] = ["vhdx"];
const MIB: u64 = 1 << 20;
/// Where headers lie, and their bytes.
const HEADERS: [u64; 2] = [64 << 10, 128 << 10];
const HEADER_LEN: usize = 4096;
/// Where tables of regions lie, and the bytes of such a table or of one of metadata.
const REGION_TABLES: [u64; 2] = [192 << 10, 256 << 10];
const TABLE_LEN: usize = 64 << 10;
const TABLE_BYTES: u64 = 64 << 10;
const ENTRIES_MAX: usize = 2047;

type Guid = [u8; 16];

/// A GUID from the groups that it is written in.
const fn guid(a: u32, b: u16, c: u16, d: [u8; 8]) -> Guid {
    let ([a0, a1, a2, a3], [b0, b1], [c0, c1]) = (a.to_le_bytes(), b.to_le_bytes(), c.to_le_bytes());
    let [d0, d1, d2, d3, d4, d5, d6, d7] = d;
    [a0, a1, a2, a3, b0, b1, c0, c1, d0, d1, d2, d3, d4, d5, d6, d7]
}

const BLOCK_TABLE: Guid = guid(
    0x2dc2_7766,
    0xf623,
    0x4200,
    [0x9d, 0x64, 0x11, 0x5e, 0x9b, 0xfd, 0x4a, 0x08],
);
const METADATA: Guid = guid(
    0x8b7c_a206,
    0x4790,
    0x4b9a,
    [0xb8, 0xfe, 0x57, 0x5f, 0x05, 0x0f, 0x88, 0x6e],
);
const FILE_PARAMETERS: Guid = guid(
    0xcaa1_6737,
    0xfa36,
    0x4d43,
    [0xb3, 0xb6, 0x33, 0xf0, 0xaa, 0x44, 0xe7, 0x6b],
);
const DISK_SIZE: Guid = guid(
    0x2fa5_4224,
    0xcd1b,
    0x4876,
    [0xb2, 0x11, 0x5d, 0xbe, 0xd8, 0x3b, 0xf4, 0xb8],
);
const SECTOR_SIZE: Guid = guid(
    0x8141_bf1d,
    0xa96f,
    0x4709,
    [0xba, 0x47, 0xf2, 0x33, 0xa8, 0xfa, 0xab, 0x5f],
);
/// Items that are known, and change nothing of the content.
const OTHERS: [Guid; 2] = [
    guid(
        0xbeca_12ab,
        0xb2e6,
        0x4523,
        [0x93, 0xef, 0xc3, 0x09, 0xe0, 0x00, 0xc7, 0x46],
    ),
    guid(
        0xcda3_48c7,
        0x445d,
        0x4471,
        [0x9c, 0xc9, 0xe9, 0x88, 0x52, 0x51, 0xc5, 0x56],
    ),
];

/// States of a block.
const NOT_PRESENT: u64 = 0;
const UNDEFINED: u64 = 1;
const ZERO: u64 = 2;
const UNMAPPED: u64 = 3;
/// The same, as it was before the format was published.
const UNMAPPED_BEFORE: u64 = 5;
const PRESENT: u64 = 6;
const PARTIALLY_PRESENT: u64 = 7;

/// What one of the two headers tells.
#[derive(Debug, Clone, Copy)]
struct Header {
    sequence: u64,
    log_guid: Guid,
    log: u64,
    log_bytes: u64,
}

/// Where something lies in the file.
#[derive(Debug, Clone, Copy)]
struct Region {
    start: u64,
    bytes: u64,
}

/// What the metadata tell.
#[derive(Debug, Clone, Copy)]
struct Metadata {
    size: u64,
    block_bytes: u64,
    sector_bytes: u64,
}

/// A VHDX image.
pub(super) struct Vhdx<'a> {
    file: Logged<'a>,
    size: u64,
    block_bytes: u64,
    /// Blocks that the table has one behind the other, before an entry of another kind.
    together: u64,
    table: Region,
    page: Page,
}

impl<'a> Vhdx<'a> {
    /// Reads all but the table of blocks.
    pub(super) fn open(input: RandomInput<'a>) -> Result<OneDisk<Self>> {
        let header = header_of(&input)?;
        let file = Logged::open(input, &header)?;
        let (table, metadata) = regions_of(&file)?;
        let metadata = metadata_of(&file, metadata)?;
        let together = ((1 << 23) * metadata.sector_bytes) / metadata.block_bytes;
        let blocks = metadata.size.div_ceil(metadata.block_bytes);
        // Each group of blocks is followed by an entry of a bitmap, except for the last.
        let entries = blocks + blocks.saturating_sub(1) / together;
        if table.bytes / 8 < entries {
            let problem = "its table has fewer blocks than the disk";
            return Err(input.damaged(table.start, table.bytes, None, problem));
        }
        let disk = Self {
            file,
            size: metadata.size,
            block_bytes: metadata.block_bytes,
            together,
            table,
            page: Page::default(),
        };
        Ok(OneDisk::new(KIND, &SUFFIXES, disk))
    }
}

/// The header that counts: of those that are whole, the one that was written last.
fn header_of(input: &RandomInput<'_>) -> Result<Header> {
    let mut last: Option<Header> = None;
    let mut bytes = vec![0; HEADER_LEN];
    for at in HEADERS {
        input.exact_at(at, &mut bytes, None)?;
        if !bytes.starts_with(b"head") || !has_checksum(&mut bytes) {
            continue;
        }
        if u16::from_le_bytes(array(&bytes, 66)) != 1 {
            return Err(input.refused("it is a VHDX of a version that is not known"));
        }
        let header = Header {
            sequence: u64::from_le_bytes(array(&bytes, 8)),
            log_guid: array(&bytes, 48),
            log: u64::from_le_bytes(array(&bytes, 72)),
            log_bytes: u32::from_le_bytes(array(&bytes, 68)).into(),
        };
        if header.log_guid != [0; 16] && u16::from_le_bytes(array(&bytes, 64)) != 0 {
            return Err(input.refused("its log is of a version that is not known"));
        }
        if last.is_none_or(|last| last.sequence < header.sequence) {
            last = Some(header);
        }
    }
    last.ok_or_else(|| input.damaged(HEADERS[0], 2 * TABLE_BYTES, None, "none of its two headers is whole"))
}

/// Whether bytes have the CRC32C that they tell at 4, made with zeros in its place. These stay there.
fn has_checksum(bytes: &mut [u8]) -> bool {
    let told = u32::from_le_bytes(array(bytes, 4));
    bytes[4..8].fill(0);
    crc32c::crc32c(bytes) == told
}

/// The regions of the table of blocks and of the metadata.
fn regions_of(file: &Logged<'_>) -> Result<(Region, Region)> {
    let mut bytes = vec![0; TABLE_LEN];
    for at in REGION_TABLES {
        file.exact_at(at, &mut bytes, None)?;
        if !bytes.starts_with(b"regi") || !has_checksum(&mut bytes) {
            continue;
        }
        let damaged = |problem| file.input().damaged(at, TABLE_BYTES, None, problem);
        let count = u32::from_le_bytes(array(&bytes, 8)) as usize;
        if count > ENTRIES_MAX {
            return Err(damaged("it has more regions than allowed"));
        }
        let (mut table, mut metadata) = (None, None);
        for entry in bytes[16..].chunks_exact(32).take(count) {
            let region = Region {
                start: u64::from_le_bytes(array(entry, 16)),
                bytes: u32::from_le_bytes(array(entry, 24)).into(),
            };
            if region.start < MIB
                || region
                    .start
                    .checked_add(region.bytes)
                    .is_none_or(|end| end > file.length())
            {
                return Err(damaged("a region is not in the file"));
            }
            match array(entry, 0) {
                BLOCK_TABLE => table = Some(region),
                METADATA => metadata = Some(region),
                _ if entry[28] & 1 == 1 => {
                    return Err(file
                        .input()
                        .refused("it has a region of a kind that is not known, and that must be"));
                }
                _ => {}
            }
        }
        return table
            .zip(metadata)
            .ok_or_else(|| damaged("it has no table of blocks, or no metadata"));
    }
    Err(file.input().damaged(
        REGION_TABLES[0],
        2 * TABLE_BYTES,
        None,
        "none of its two tables of regions is whole",
    ))
}

/// What the metadata tell.
fn metadata_of(file: &Logged<'_>, region: Region) -> Result<Metadata> {
    let mut bytes = vec![0; TABLE_LEN];
    file.exact_at(region.start, &mut bytes, None)?;
    let damaged = |problem| file.input().damaged(region.start, TABLE_BYTES, None, problem);
    let refused = |problem: &str| file.input().refused(problem);
    let count = usize::from(u16::from_le_bytes(array(&bytes, 10)));
    if !bytes.starts_with(b"metadata") || count > ENTRIES_MAX {
        return Err(damaged("its metadata are not there"));
    }
    let (mut parameters, mut size, mut sector_bytes) = (None, None, None);
    for entry in bytes[32..].chunks_exact(32).take(count) {
        let item = |length: u64| item_of(file, region, entry, length);
        match array(entry, 0) {
            FILE_PARAMETERS => parameters = Some(item(8)?),
            DISK_SIZE => size = Some(item(8)?),
            SECTOR_SIZE => sector_bytes = Some(item(4)?),
            other if entry[24] & 4 != 0 && !OTHERS.contains(&other) && !is_parent(parameters) => {
                return Err(refused("it has metadata of a kind that is not known, and that must be"));
            }
            _ => {}
        }
    }
    let (Some(parameters), Some(size), Some(sector_bytes)) = (parameters, size, sector_bytes) else {
        return Err(damaged("its metadata do not have all that they must have"));
    };
    if is_parent(Some(parameters)) {
        return Err(refused(
            "it holds only what changed since another image, its parent: merge the two first",
        ));
    }
    let block_bytes = parameters & u64::from(u32::MAX);
    if !block_bytes.is_power_of_two() || !(MIB..=256 * MIB).contains(&block_bytes) {
        return Err(refused("its blocks have a length that is not allowed"));
    }
    if ![512, 4096].contains(&sector_bytes) || !size.is_multiple_of(sector_bytes) {
        return Err(refused("its sectors have a length that is not allowed"));
    }
    if size > file.input().limits().volume_bytes {
        return Err(refused(&format!(
            "its disk has {size} bytes, which is more than vmfold takes"
        )));
    }
    Ok(Metadata {
        size,
        block_bytes,
        sector_bytes,
    })
}

/// Whether the parameters of a file say that it has a parent.
fn is_parent(parameters: Option<u64>) -> bool {
    parameters.is_some_and(|parameters| parameters >> 33 & 1 == 1)
}

/// The value of an item of the metadata, which has a fixed length.
fn item_of(file: &Logged<'_>, region: Region, entry: &[u8], length: u64) -> Result<u64> {
    let (at, told) = (
        u64::from(u32::from_le_bytes(array(entry, 16))),
        u64::from(u32::from_le_bytes(array(entry, 20))),
    );
    if told != length || at < TABLE_BYTES || at + told > region.bytes {
        return Err(file.input().damaged(
            region.start,
            TABLE_BYTES,
            None,
            "an item of its metadata lies elsewhere",
        ));
    }
    let mut value = [0; 8];
    file.exact_at(region.start + at, &mut value[..if length == 4 { 4 } else { 8 }], None)?;
    Ok(u64::from_le_bytes(value))
}

impl<'a> Pieces<'a> for Vhdx<'a> {
    fn input(&self) -> &RandomInput<'a> {
        self.file.input()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn bytes_max(&self) -> u64 {
        self.file.content_end()
    }

    fn piece(&mut self, at: u64) -> Result<Piece> {
        let file = &self.file;
        let read = |at: u64, buffer: &mut [u8]| file.exact_at(at, buffer, None);
        let block = at / self.block_bytes;
        let (group, of_group) = (block / self.together, block % self.together);
        let entry = self.table.start + (block + group) * 8;
        let end = entry + (self.together - of_group) * 8;
        let end = end.min(self.table.start + self.table.bytes);
        let (entries, _) = self.page.bytes_at(entry, end, file.length(), read)?.as_chunks::<8>();
        let is_absent = |entry: &[u8; 8]| (u64::from_le_bytes(*entry) & 7) <= UNMAPPED;
        let absent = entries.iter().take_while(|entry| is_absent(entry)).count() as u64;
        let zeros_to = |block: u64| Piece {
            end: block * self.block_bytes,
            place: None,
        };
        let Some(first) = entries.first().filter(|_| absent == 0) else {
            return Ok(zeros_to(block + absent.max(1)));
        };
        let (state, place) = (u64::from_le_bytes(*first) & 7, u64::from_le_bytes(*first) / MIB * MIB);
        let damaged = |problem| file.input().damaged(entry, 8, None, problem);
        match state {
            NOT_PRESENT | UNDEFINED | ZERO | UNMAPPED | UNMAPPED_BEFORE => Ok(zeros_to(block + 1)),
            // The log says that the file is longer than it is, and zeros are there.
            PRESENT if place >= file.content_end() && place < file.length() => Ok(zeros_to(block + 1)),
            PRESENT if place >= MIB => Ok(Piece {
                end: (block + 1) * self.block_bytes,
                place: Some(place.saturating_add(at % self.block_bytes)),
            }),
            PRESENT => Err(damaged("a block lies where the headers do")),
            PARTIALLY_PRESENT => Err(damaged("part of a block is in a parent, and there is none")),
            _ => Err(damaged("a block has a state that is not known")),
        }
    }

    fn read(&self, place: u64, buffer: &mut [u8], volume: &Volume) -> Result<()> {
        self.file.exact_at(place, buffer, Some(&volume.path))
    }
}

/// The error for a log that is not replayed.
fn not_replayed(input: &RandomInput<'_>, why: &str) -> Error {
    input.refused(format!(
        "its log was not replayed, and {why}: attach it once where its machine runs"
    ))
}
