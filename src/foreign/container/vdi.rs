//! VDI images of version 1.1 (`VirtualBox`, `VDICore.h`): a map says where in the file each block of the disk lies. All numbers are little-endian.

use super::{ContainerKind, Disk, PART_BYTES, image_name};
use crate::block::NumberSet;
use crate::error::Result;
use crate::foreign::random::RandomInput;
use crate::foreign::{Volume, array};
use crate::numbers::StoreBlock;

pub(super) const MAGIC: &[u8] = b"\x7f\x10\xda\xbe";
pub(super) const MAGIC_AT: usize = 64;

/// What names of such files end with.
const SUFFIXES: [&str; 1] = ["vdi"];
/// Length of the header up to the last field that is read.
const HEADER_BYTES: usize = 392;
/// The version that is read.
const VERSION: u32 = 0x0001_0001;
/// Bytes of a block at least and at most. `VirtualBox` makes blocks of 1 MiB.
const BLOCK_BYTES: std::ops::RangeInclusive<u32> = (1 << 20)..=(64 << 20);
/// Entries of the map that are read at a time.
const PART_ENTRIES: u64 = 16 << 10;
/// From here on, an entry stands for no block: for zeros, or for nothing.
const FIRST_WITHOUT_BLOCK: u32 = 0xffff_fffe;

/// A VDI image.
pub(super) struct Vdi<'a> {
    input: RandomInput<'a>,
    volume: Volume,
    size: u64,
    block_bytes: u64,
    blocks: u64,
    map_at: u64,
    data_at: u64,
    /// The part of the map that was read last: its first entry, and its bytes.
    part: (u64, Vec<u8>),
    /// The blocks of the file that were read.
    seen: NumberSet<StoreBlock>,
}

impl<'a> Vdi<'a> {
    /// Opens an image.
    pub(super) fn open(input: RandomInput<'a>) -> Result<Self> {
        let mut head = vec![0; HEADER_BYTES];
        input.exact_at(0, &mut head, None)?;
        let number = |at: usize| u32::from_le_bytes(array(&head, at));
        let wrong = |at: u64, problem: &str| Err(input.damaged(at, 4, None, problem));
        match number(68) {
            VERSION => {}
            other => {
                let (major, minor) = (other >> 16, other & 0xffff);
                return Err(input.refused(format!(
                    "it is a VDI image of version {major}.{minor}, which is not known"
                )));
            }
        }
        match number(76) {
            1 | 2 => {}
            3 => return Err(input.refused("it is a VDI image of the kind `undo`, which is only a part of a disk")),
            4 => {
                let problem = "it is a differencing VDI image, which leaves parts of its disk to another: \
                               VBoxManage clonemedium makes one of both";
                return Err(input.refused(problem));
            }
            other => return Err(input.refused(format!("it is a VDI image of a kind that is not known ({other})"))),
        }
        let size = u64::from_le_bytes(array(&head, 368));
        let (block_bytes, blocks) = (number(376), u64::from(number(384)));
        if !block_bytes.is_power_of_two() || !BLOCK_BYTES.contains(&block_bytes) {
            return wrong(376, "its blocks have a size that is not allowed");
        }
        if number(380) != 0 {
            return Err(input.refused("its blocks have something before their data, which is not read"));
        }
        let block_bytes = u64::from(block_bytes);
        if size.div_ceil(block_bytes) > blocks {
            return wrong(384, "its map is shorter than its disk");
        }
        let map_bytes = blocks.saturating_mul(block_bytes);
        if map_bytes > input.limits().volume_bytes {
            return Err(input.refused(format!(
                "its disk has room for {map_bytes} bytes, which is more than vmfold takes"
            )));
        }
        let data_at = u64::from(number(344));
        Ok(Self {
            volume: Volume {
                path: image_name(input.path(), &SUFFIXES),
                size: Some(size),
                time: None,
            },
            size,
            block_bytes,
            blocks,
            map_at: u64::from(number(340)),
            data_at,
            part: (0, Vec::new()),
            seen: NumberSet::new(usize::try_from(blocks).unwrap_or_default()),
            input,
        })
    }

    /// The entry of a block of the disk in the map.
    fn entry(&mut self, block: u64) -> Result<u32> {
        let first = block / PART_ENTRIES * PART_ENTRIES;
        if self.part.1.is_empty() || self.part.0 != first {
            let count = self.blocks.saturating_sub(first).min(PART_ENTRIES);
            let mut bytes = vec![0; usize::try_from(count * 4).unwrap_or_default()];
            self.input
                .exact_at(self.map_at + first * 4, &mut bytes, Some(&self.volume.path))?;
            self.part = (first, bytes);
        }
        let at = usize::try_from((block - first) * 4).unwrap_or_default();
        Ok(u32::from_le_bytes(array(&self.part.1, at)))
    }

    /// Where in the file a block lies that an entry stands for. Each has one place of its own.
    fn place(&mut self, block: u64, entry: u32, is_new: bool) -> Result<u64> {
        let at = self.data_at + u64::from(entry) * self.block_bytes;
        let wrong = |problem: &str| {
            let path = Some(self.volume.path.clone());
            Err(self.input.damaged(self.map_at + block * 4, 4, path, problem))
        };
        if u64::from(entry) >= self.blocks {
            return wrong("a block of the file has a number that is not allowed");
        }
        let number = StoreBlock(entry);
        if is_new && self.seen.contains(number) {
            return wrong("two blocks of the disk lie in the same place");
        }
        self.seen.insert(number);
        Ok(at)
    }
}

impl Disk for Vdi<'_> {
    fn kind(&self) -> &'static str {
        ContainerKind::Vdi.name()
    }

    fn volumes(&self) -> Vec<Volume> {
        vec![self.volume.clone()]
    }

    fn content(&mut self, _: usize, from: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        let mut at = from;
        while at < self.size {
            let (block, within) = (at / self.block_bytes, at % self.block_bytes);
            let entry = self.entry(block)?;
            if entry >= FIRST_WITHOUT_BLOCK {
                at = (block + 1) * self.block_bytes;
                continue;
            }
            let place = self.place(block, entry, within == 0)?;
            let length = (self.block_bytes - within).min(self.size - at).min(PART_BYTES as u64);
            buffer.resize(usize::try_from(length).unwrap_or_default(), 0);
            self.input.exact_at(place + within, buffer, Some(&self.volume.path))?;
            return Ok(Some(at));
        }
        Ok(None)
    }
}
