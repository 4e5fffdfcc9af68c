//! VHD, Microsoft's older format ("Virtual Hard Disk Image Format Specification" 1.0): a footer at the end of the file says what it is. A fixed
//! disk lies before it as it is. A dynamic one has a copy of the footer at its beginning, and a table of blocks.
//!
//! Each block has a bitmap of the sectors that were written. It is not looked at, as qemu does not: others are zeros, because writers make blocks
//! of zeros.

use super::one_disk::{OneDisk, Page, Piece, Pieces};
use crate::error::Result;
use crate::foreign::array;
use crate::foreign::random::RandomInput;

pub(super) const KIND: &str = "a VHD image";
pub(super) const MAGIC: &[u8] = b"conectix";
const SUFFIXES: [&str; 2] = ["vhd", "vpc"];
const HEADER_MAGIC: &[u8] = b"cxsparse";
const SECTOR: u64 = 512;
pub(super) const FOOTER_LEN: usize = 512;
const FOOTER_BYTES: u64 = 512;
const HEADER_LEN: usize = 1024;
/// An entry of the table that stands for a block of zeros.
const NONE: u32 = u32::MAX;
/// Kinds of disks.
const FIXED: u32 = 2;
const DYNAMIC: u32 = 3;
const DIFFERENCING: u32 = 4;
/// The largest number of sectors that a geometry has. Disks that have it may be larger.
const GEOMETRY_SECTORS_MAX: u64 = 65_535 * 16 * 255;
/// Programs whose disks have the size that the footer tells. Those of others, such as Virtual PC, have the one that the geometry gives. qemu
/// takes disks of `VirtualBox` for such, which does not itself.
const CREATORS_BY_SIZE: [&[u8; 4]; 7] = [b"win ", b"d2v ", b"tap\0", b"CTXS", b"qem2", b"wa\0\0", b"vbox"];

/// What a footer tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Footer {
    kind: u32,
    /// Where the header of a dynamic disk lies.
    header: u64,
    size: u64,
}

impl Footer {
    /// Reads a footer. It is `None` if these bytes are none, or if their checksum is another one.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; FOOTER_LEN] = bytes.try_into().ok()?;
        if !bytes.starts_with(MAGIC) || !has_checksum(bytes, 64) {
            return None;
        }
        let told = u64::from_be_bytes(array(bytes, 48));
        let cylinders = u64::from(u16::from_be_bytes(array(bytes, 56)));
        let sectors = cylinders * u64::from(bytes[58]) * u64::from(bytes[59]);
        let creator: [u8; 4] = array(bytes, 28);
        let is_told = CREATORS_BY_SIZE.contains(&&creator) || sectors == GEOMETRY_SECTORS_MAX;
        Some(Self {
            kind: u32::from_be_bytes(array(bytes, 60)),
            header: u64::from_be_bytes(array(bytes, 16)),
            // What is no whole sector at the end is nothing that a guest sees.
            size: if is_told {
                told / SECTOR * SECTOR
            } else {
                sectors * SECTOR
            },
        })
    }
}

/// Whether a file that ends with these bytes is a fixed disk. The end of a raw image is a guest's to choose, and so is the beginning of a fixed
/// disk. So this says something only of a file that nothing else is known of.
pub(in crate::foreign) fn is_fixed(last: &[u8]) -> bool {
    Footer::parse(last).is_some_and(|footer| footer.kind == FIXED)
}

/// Whether bytes have the checksum that they tell at `at`: the complement of the sum of all others.
fn has_checksum(bytes: &[u8], at: usize) -> bool {
    let sum = |bytes: &[u8]| bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    let others = sum(&bytes[..at]).wrapping_add(sum(&bytes[at + 4..]));
    u32::from_be_bytes(array(bytes, at)) == !others
}

/// Where the blocks of a dynamic disk lie.
struct Blocks {
    /// Where the table lies, and how many entries it has.
    table: u64,
    entries: u64,
    /// Bytes of a block, and of the bitmap before it.
    bytes: u64,
    bitmap_bytes: u64,
}

/// A VHD image.
pub(super) struct Vhd<'a> {
    input: RandomInput<'a>,
    size: u64,
    /// Bytes before the footer.
    content_bytes: u64,
    /// Of a dynamic disk.
    blocks: Option<Blocks>,
    page: Page,
}

impl<'a> Vhd<'a> {
    /// Reads the footer, its copy, and the header of a dynamic disk.
    pub(super) fn open(input: RandomInput<'a>) -> Result<OneDisk<Self>> {
        let content_bytes = input.length().saturating_sub(FOOTER_BYTES);
        let mut bytes = [0; FOOTER_LEN];
        input.exact_at(content_bytes, &mut bytes, None)?;
        let footer = Footer::parse(&bytes);
        let footer = footer.ok_or_else(|| {
            input.damaged(
                content_bytes,
                FOOTER_BYTES,
                None,
                "its footer is not at its end, or has another checksum",
            )
        })?;
        if footer.size > input.limits().volume_bytes {
            let problem = format!("its disk has {} bytes, which is more than vmfold takes", footer.size);
            return Err(input.refused(problem));
        }
        let blocks = match footer.kind {
            FIXED if footer.size > content_bytes => {
                let problem = "it has less content than its footer says";
                return Err(input.damaged(content_bytes, FOOTER_BYTES, None, problem));
            }
            FIXED => None,
            DYNAMIC => Some(Blocks::of(&input, &footer)?),
            DIFFERENCING => {
                let problem = "it holds only what changed since another image, its parent: merge the two first";
                return Err(input.refused(problem));
            }
            _ => return Err(input.refused("it is a VHD of a type that is not known")),
        };
        let disk = Self {
            size: footer.size,
            content_bytes,
            blocks,
            page: Page::default(),
            input,
        };
        Ok(OneDisk::new(KIND, &SUFFIXES, disk))
    }
}

impl Blocks {
    /// Reads the header that a footer leads to.
    fn of(input: &RandomInput<'_>, footer: &Footer) -> Result<Self> {
        let mut copy = [0; FOOTER_LEN];
        input.exact_at(0, &mut copy, None)?;
        if Footer::parse(&copy) != Some(*footer) {
            return Err(input.damaged(0, FOOTER_BYTES, None, "it begins with another footer than it ends with"));
        }
        let mut header = [0; HEADER_LEN];
        input.exact_at(footer.header, &mut header, None)?;
        let damaged = |problem| input.damaged(footer.header, HEADER_LEN as u64, None, problem);
        if !header.starts_with(HEADER_MAGIC) || !has_checksum(&header, 36) {
            return Err(damaged("its header is another one, or has another checksum"));
        }
        let blocks = Self {
            table: u64::from_be_bytes(array(&header, 16)),
            entries: u32::from_be_bytes(array(&header, 28)).into(),
            bytes: u32::from_be_bytes(array(&header, 32)).into(),
            bitmap_bytes: 0,
        };
        if !blocks.bytes.is_power_of_two() || blocks.bytes < SECTOR {
            return Err(input.refused("its blocks have a length that is not allowed"));
        }
        if footer.size.div_ceil(blocks.bytes) > blocks.entries {
            return Err(damaged("its table has fewer blocks than the disk"));
        }
        let end = blocks.table.checked_add(blocks.entries * 4);
        if end.is_none_or(|end| end > input.length()) {
            return Err(damaged("its table is not in the file"));
        }
        Ok(Self {
            bitmap_bytes: (blocks.bytes / SECTOR).div_ceil(8).next_multiple_of(SECTOR),
            ..blocks
        })
    }
}

impl<'a> Pieces<'a> for Vhd<'a> {
    fn input(&self) -> &RandomInput<'a> {
        &self.input
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn piece(&mut self, at: u64) -> Result<Piece> {
        let Some(blocks) = &self.blocks else {
            return Ok(Piece {
                end: self.size,
                place: Some(at),
            });
        };
        let input = &self.input;
        let read = |at: u64, buffer: &mut [u8]| input.exact_at(at, buffer, None);
        let block = at / blocks.bytes;
        let (entry, end) = (blocks.table + block * 4, blocks.table + blocks.entries * 4);
        let (entries, _) = self.page.bytes_at(entry, end, input.length(), read)?.as_chunks::<4>();
        let none = entries.iter().take_while(|entry| **entry == NONE.to_be_bytes()).count() as u64;
        let Some(first) = entries.first().filter(|_| none == 0) else {
            return Ok(Piece {
                end: (block + none.max(1)) * blocks.bytes,
                place: None,
            });
        };
        let place = u64::from(u32::from_be_bytes(*first)) * SECTOR + blocks.bitmap_bytes;
        if place + blocks.bytes > self.content_bytes {
            let problem = "its table places a block behind the end of the file";
            return Err(input.damaged(entry, 4, None, problem));
        }
        Ok(Piece {
            end: (block + 1) * blocks.bytes,
            place: Some(place + at % blocks.bytes),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A footer of a program, with a geometry and a size.
    fn footer(creator: [u8; 4], cylinders: u16, size: u64) -> [u8; FOOTER_LEN] {
        let mut bytes = [0; FOOTER_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[28..32].copy_from_slice(&creator);
        bytes[48..56].copy_from_slice(&size.to_be_bytes());
        bytes[56..58].copy_from_slice(&cylinders.to_be_bytes());
        bytes[58..60].copy_from_slice(&[16, 255]);
        bytes[63] = 2;
        let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
        bytes[64..68].copy_from_slice(&(!sum).to_be_bytes());
        bytes
    }

    #[test]
    fn the_size_is_what_its_writer_means() {
        let size = |creator: &[u8; 4], cylinders| {
            Footer::parse(&footer(*creator, cylinders, 5_000_000)).map(|footer| footer.size)
        };
        let geometry = Some(2 * 16 * 255 * 512);
        for (creator, cylinders, expected) in [
            (b"vpc ", 2, geometry),
            (b"qemu", 2, geometry),
            (b"what", 2, geometry),
            (b"qem2", 2, Some(4_999_680)),
            (b"win ", 2, Some(4_999_680)),
            (b"vbox", 2, Some(4_999_680)),
            (b"vpc ", u16::MAX, Some(4_999_680)),
        ] {
            assert_eq!(size(creator, cylinders), expected);
        }
        let mut bytes = footer(*b"qem2", 2, 512);
        assert!(is_fixed(&bytes) && !is_fixed(&bytes[1..]) && !is_fixed(&[]));
        bytes[100] ^= 1;
        assert!(!is_fixed(&bytes));
    }
}
