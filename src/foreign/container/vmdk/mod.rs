//! VMDK ("Virtual Disk Format 5.0"): disks in one file, sparse or as a stream of compressed grains. Disks in several files are
//! refused: no file that a descriptor names is opened.

mod descriptor;
mod sparse;
mod stream;

pub(in crate::foreign) use descriptor::{is_descriptor, why_not_a_disk};
pub(super) use sparse::Sparse;
pub(in crate::foreign) use stream::{Stream, open_stream};

use crate::foreign::array;

pub(super) const KIND: &str = "a VMDK image";
pub(super) const MAGIC: &[u8] = b"KDMV";
/// What names of such files end with, behind a dot.
pub(in crate::foreign) const SUFFIXES: [&str; 1] = ["vmdk"];
const SECTOR: u64 = 512;
const SECTOR_LEN: usize = 512;
/// Entries of a grain table, and its sectors.
const TABLE_ENTRIES: u64 = 512;
const TABLE_SECTORS: u64 = 4;
/// Sectors of a grain: 4 KiB to 1 MiB.
const GRAIN_SECTORS_MIN: u64 = 8;
const GRAIN_SECTORS_MAX: u64 = (1 << 20) / SECTOR;
/// Bytes of a descriptor.
const DESCRIPTOR_BYTES_MAX: u64 = 2 << 20;
/// Where the directory lies if only a footer tells.
const AT_END: u64 = u64::MAX;
/// The entry of a grain of zeros, where a flag says so. Otherwise it is a place that no grain has.
const ZERO_GRAIN: u32 = 1;

/// Flags of a header.
const CHECKS_LINE_ENDS: u32 = 1;
const HAS_ZERO_GRAINS: u32 = 1 << 2;
const IS_COMPRESSED: u32 = 1 << 16;
const HAS_MARKERS: u32 = 1 << 17;

/// Whether a file that begins with these bytes is a stream of compressed grains.
pub(in crate::foreign) fn is_stream(first: &[u8]) -> bool {
    let flags = first.get(8..12).and_then(|rest| rest.first_chunk());
    first.starts_with(MAGIC)
        && flags.is_some_and(|flags| u32::from_le_bytes(*flags) & (IS_COMPRESSED | HAS_MARKERS) != 0)
}

/// What is wrong with a header.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Wrong {
    Damaged(&'static str),
    Refused(String),
}

/// A header. Places and lengths are in sectors.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Header {
    flags: u32,
    capacity: u64,
    grain: u64,
    descriptor: u64,
    descriptor_sectors: u64,
    directory: u64,
    /// What lies before the grains.
    overhead: u64,
    is_deflated: bool,
}

impl Header {
    /// Reads a header, of a disk of `bytes_max` bytes at most.
    fn parse(bytes: &[u8; SECTOR_LEN], bytes_max: u64) -> Result<Self, Wrong> {
        let number = |at: usize| u64::from_le_bytes(array(bytes, at));
        let small = |at: usize| u32::from_le_bytes(array(bytes, at));
        if !bytes.starts_with(MAGIC) {
            return Err(Wrong::Damaged("a header should be here"));
        }
        if !(1..=3).contains(&small(4)) {
            return Err(Wrong::Refused("it is a VMDK of a version that is not known".into()));
        }
        let header = Self {
            flags: small(8),
            capacity: number(12),
            grain: number(20),
            descriptor: number(28),
            descriptor_sectors: number(36),
            directory: number(56),
            overhead: number(64),
            is_deflated: u16::from_le_bytes(array(bytes, 77)) == 1,
        };
        if header.flags & CHECKS_LINE_ENDS != 0 && bytes[73..77] != *b"\n \r\n" {
            return Err(Wrong::Damaged("its line ends were changed, as if it were a text"));
        }
        if small(44) != 512 {
            return Err(Wrong::Refused(
                "its grain tables have another length than they always have".into(),
            ));
        }
        if !header.grain.is_power_of_two() || !(GRAIN_SECTORS_MIN..=GRAIN_SECTORS_MAX).contains(&header.grain) {
            return Err(Wrong::Refused("its grains have a length that is not allowed".into()));
        }
        if header.descriptor_sectors > DESCRIPTOR_BYTES_MAX / SECTOR {
            return Err(Wrong::Refused("its descriptor is longer than allowed".into()));
        }
        if header.capacity > bytes_max / SECTOR {
            let problem = format!(
                "its disk has {} sectors, which is more than vmfold takes",
                header.capacity
            );
            return Err(Wrong::Refused(problem));
        }
        Ok(header)
    }

    /// The length of the disk in bytes.
    fn size(&self) -> u64 {
        self.capacity * SECTOR
    }

    fn grains(&self) -> u64 {
        self.capacity.div_ceil(self.grain)
    }

    /// How many grain tables there are, and entries of the directory.
    fn tables(&self) -> u64 {
        self.grains().div_ceil(TABLE_ENTRIES)
    }

    /// Whether an entry of a grain table says that the grain lies somewhere.
    fn is_stored(&self, entry: u32) -> bool {
        entry > ZERO_GRAIN || entry == ZERO_GRAIN && self.flags & HAS_ZERO_GRAINS == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header of a disk of 4 MiB.
    fn bytes() -> [u8; SECTOR_LEN] {
        let mut bytes = [0; SECTOR_LEN];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = 1;
        bytes[8] = 1;
        bytes[12..20].copy_from_slice(&8192u64.to_le_bytes());
        bytes[20..28].copy_from_slice(&128u64.to_le_bytes());
        bytes[44..48].copy_from_slice(&512u32.to_le_bytes());
        bytes[73..77].copy_from_slice(b"\n \r\n");
        bytes
    }

    #[test]
    fn headers_that_ask_for_too_much_are_refused() {
        let with = |at: usize, value: &[u8]| {
            let mut bytes = bytes();
            bytes[at..at + value.len()].copy_from_slice(value);
            Header::parse(&bytes, 32 << 40)
        };
        assert_eq!(
            with(0, MAGIC).map(|header| (header.size(), header.tables())),
            Ok((4 << 20, 1))
        );
        for (at, value) in [
            (4, &4u32.to_le_bytes()[..]),
            (12, &u64::MAX.to_le_bytes()),
            (12, &((64u64 << 40) / 512 + 1).to_le_bytes()),
            (20, &0u64.to_le_bytes()),
            (20, &4u64.to_le_bytes()),
            (20, &4096u64.to_le_bytes()),
            (20, &129u64.to_le_bytes()),
            (36, &u64::MAX.to_le_bytes()),
            (44, &1u32.to_le_bytes()),
        ] {
            assert!(matches!(with(at, value), Err(Wrong::Refused(_))), "{at}");
        }
        assert!(matches!(with(75, b"\n"), Err(Wrong::Damaged(_))));
    }
}
