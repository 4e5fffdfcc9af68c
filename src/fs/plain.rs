//! Any filesystem without reflinks: its images can be read and mapped, and nothing is shared. [`super::open()`] opens it for a verb that
//! only reads, such as an export of an old backup on ext4, NTFS or NFS.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::opened::{Leases, OpenImage, Opened, Specifics, reads_opened};
use super::{Filesystem, ImageInfo, PoolMap, Purpose, ShareOutcome, SourceFile, blocks, kernel};
use crate::block::{BLOCK_BYTES, bytes};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::facts::{Class, Collector, Compression, Extent, Facts, Mapping, PinReason};
use crate::numbers::{DonorId, ExtentId, ImageId, Slot};
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::spill::{Budget, SpillVec};
use crate::sys::beneath::Folder;

/// Data is cut into extents at multiples of this offset in the image, 16 MiB, so that records of the index have a bounded length.
const EXTENT_BLOCKS_MAX: u64 = 4096;

/// The open images of a pool on a filesystem that is only read.
#[derive(Debug)]
pub struct Plain {
    device: u64,
    opened: Opened,
}

impl Plain {
    /// Opens the images of a pool for reading, and returns which of them are left alone.
    ///
    /// # Errors
    /// Returns [`Error::Usage`] if nothing is named, [`Error::Busy`] if another vmfold works on the filesystem, and [`Error::Io`] if a
    /// system call fails for a reason that does not lie in one image.
    pub fn open(found: &[FoundImage], named: &[NamedPath], purpose: Purpose) -> Result<(Self, Vec<Skipped>)> {
        let first = named
            .first()
            .ok_or_else(|| Error::Usage("name at least one path".into()))?;
        let stat = rustix::fs::fstat(&first.folder).map_err(Error::io("look at", &first.root))?;
        let device = stat.st_dev;
        let specifics = Specifics {
            uuid: uuid_of(device),
            verdict: kernel::Verdict::Fine,
            contains: &|file| rustix::fs::fstat(file).is_ok_and(|stat| stat.st_dev == device),
            root_of: |_| Ok(Some(0)),
            is_checksummed: |_, _| Ok(true),
            set_up: |_, _| Err(Errno::OPNOTSUPP),
            leases: Leases::of(&first.folder),
        };
        let (opened, skipped) = Opened::open(found, first, purpose, &specifics, |_| ())?;
        Ok((Self { device, opened }, skipped))
    }

    fn cannot(&self, operation: &'static str) -> Error {
        Error::io(operation, self.folder())(Errno::OPNOTSUPP)
    }
}

impl Leases {
    /// The leases of a plain filesystem. A network filesystem (`NFS_SUPER_MAGIC`, `SMB_SUPER_MAGIC`, `SMB2_SUPER_MAGIC`, `CIFS_SUPER_MAGIC`)
    /// refuses them as if the file were in use.
    fn of(folder: &Folder) -> Self {
        const NETWORK: [i64; 4] = [0x6969, 0x517b, 0xfe53_4d42, 0xff53_4d42];
        let magic = rustix::fs::fstatfs(folder).map(|found| found.f_type);
        if magic.is_ok_and(|magic| NETWORK.contains(&magic)) {
            Self::None
        } else {
            Self::WherePossible
        }
    }
}

/// Returns the device number as a UUID. The number may change at the next boot; what an index holds under the old one is then not found.
fn uuid_of(device: u64) -> [u8; 16] {
    u128::from(device).to_le_bytes()
}

/// Calls `visit` with the ranges of an image that hold data, in whole blocks: the first block, and the length.
fn data_of(image: &OpenImage, mut visit: impl FnMut(u64, u64)) -> Result<()> {
    let failed = Error::io("look for data of", &image.known.path);
    let end = image.known.size.div_ceil(BLOCK_BYTES);
    let mut at = 0;
    while at < end {
        let data_and_hole = rustix::fs::seek(&*image.file, SeekFrom::Data(at * BLOCK_BYTES))
            .and_then(|data| Ok((data, rustix::fs::seek(&*image.file, SeekFrom::Hole(data))?)));
        let (data, hole) = match data_and_hole {
            Ok(found) => found,
            // There is no more data, or the file was truncated meanwhile.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(failed(errno)),
        };
        // Neither need be a multiple of the block size, and the file may have grown meanwhile.
        let (from, to) = (data / BLOCK_BYTES, hole.div_ceil(BLOCK_BYTES).min(end));
        if from < to {
            visit(from, to - from);
        }
        at = to.max(from + 1);
    }
    Ok(())
}

impl Filesystem for Plain {
    reads_opened!();

    fn uuid(&self) -> [u8; 16] {
        uuid_of(self.device)
    }

    fn frees_blocks(&self) -> bool {
        true
    }

    /// Maps data at made-up addresses: where it lies on disk is unknown, and an address only identifies an image and an offset in it.
    fn map(&self, budget: &Budget) -> Result<PoolMap> {
        let mut extents: SpillVec<Extent> = SpillVec::new_in(budget);
        let mut mappings = Collector::new_in(budget);
        let (mut slot, mut base) = (Slot::default(), 0u64);
        for (number, image) in ImageId::numbered(&self.opened.images) {
            let mut ranges = Vec::new();
            data_of(image, |mut from, length| {
                let end = from + length;
                while from < end {
                    let length = (end - from).min(EXTENT_BLOCKS_MAX - from % EXTENT_BLOCKS_MAX);
                    ranges.push((from, length));
                    from += length;
                }
            })?;
            for (from, length) in ranges {
                let (file_block, length) = (blocks(from * BLOCK_BYTES)?, blocks(length * BLOCK_BYTES)?);
                let mut generation = xxhash_rust::xxh3::Xxh3Default::new();
                generation.update(&image.state_hash().to_le_bytes());
                generation.update(&from.to_le_bytes());
                mappings.push(
                    Mapping {
                        file_block,
                        slot,
                        blocks: length,
                        extent: ExtentId(u32::try_from(extents.len()).map_err(|_| Error::TooLarge)?),
                        preallocated: false,
                    },
                    number,
                );
                extents.push(Extent {
                    address: base + bytes(file_block),
                    disk_bytes: bytes(length),
                    generation: generation.digest(),
                    first_slot: slot,
                    blocks: length,
                    class: Class {
                        checksummed: true,
                        compression: Compression::None,
                        groups: 1 << image.group,
                    },
                    pinned: Some(PinReason::Fixed),
                    compression_goal: None,
                });
                slot = slot.checked_add(length).ok_or(Error::TooLarge)?;
            }
            base += image.known.size.next_multiple_of(BLOCK_BYTES * EXTENT_BLOCKS_MAX);
        }
        let mut facts = Facts::new(extents, mappings.finish(), self.function().of_zeros());
        facts.machines = self.opened.images.iter().map(|image| image.machine).collect();
        facts.frees_blocks = true;
        Ok(PoolMap {
            facts,
            inline_bytes: 0,
            inline: Vec::new(),
            beyond: Vec::new(),
        })
    }

    fn sees_all_holders(&self) -> bool {
        true
    }

    fn names_of_holders(&self, _: &Facts) -> Result<BTreeMap<String, u64>> {
        Ok(BTreeMap::new())
    }

    fn create_donor(&self, _: Class) -> Result<DonorId> {
        Err(self.cannot("make a donor in"))
    }

    fn append_to_donor(&self, _: DonorId, _: &[u8], _: Option<&[u8]>) -> Result<()> {
        Err(self.cannot("write a donor in"))
    }

    fn discard_donor(&self, _: DonorId) {}

    fn settle_donor(&self, _: DonorId) -> Result<()> {
        Err(self.cannot("write a donor in"))
    }

    fn close_donors(&self) -> Result<()> {
        Ok(())
    }

    fn share(&self, _: SourceFile, _: u64, _: ImageId, _: u64, _: u64) -> ShareOutcome {
        ShareOutcome::Refused(Errno::OPNOTSUPP)
    }

    fn clone_range(&self, _: ImageId, _: u64, _: &File, _: u64, _: u64) -> rustix::io::Result<()> {
        Err(Errno::OPNOTSUPP)
    }
}
