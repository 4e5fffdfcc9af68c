//! Any filesystem without reflinks: its images can be read and mapped, and nothing is shared. [`super::open()`] does not open it: verbs
//! refuse filesystems that cannot share.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::opened::{OpenImage, Opened, Specifics, reads_opened};
use super::{ExtentReference, Filesystem, ImageInfo, PoolMap, Purpose, ShareOutcome, SourceFile, blocks, kernel};
use crate::block::{BLOCK_BYTES, SlotSet, bytes};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::facts::{Class, Collector, Compression, Extent, Facts, Mapping, PinReason};
use crate::fingerprint::FingerprintFunction;
use crate::numbers::{DonorId, ExtentId, ImageId, Slot};
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::spill::{Budget, SpillVec};

/// Data is cut into extents at multiples of this in its image, 16 MiB, so that an index holds records of bounded length.
const EXTENT_BLOCKS_MAX: u64 = 4096;

/// Images on a filesystem that is only read.
#[derive(Debug)]
pub struct Plain {
    device: u64,
    opened: Opened,
}

impl Plain {
    /// Opens the images of a pool for reading, and says which it leaves alone.
    ///
    /// # Errors
    /// [`Error::Usage`] if nothing is named; [`Error::Busy`], and those of system calls that say nothing of one image.
    pub fn open(found: &[FoundImage], named: &[NamedPath], purpose: Purpose) -> Result<(Self, Vec<Skipped>)> {
        let first = named
            .first()
            .ok_or_else(|| Error::Usage("name at least one path".into()))?;
        let stat = rustix::fs::fstat(&first.folder).map_err(Error::io("look at", &first.root))?;
        let device = stat.st_dev;
        let specifics = Specifics {
            uuid: uuid_of(device),
            verdict: kernel::Verdict::Fine,
            is_here: &|file| rustix::fs::fstat(file).is_ok_and(|stat| stat.st_dev == device),
            root_of: |_| Ok(Some(0)),
            is_checksummed: |_, _| Ok(true),
            set_up: |_, _| Err(Errno::OPNOTSUPP),
        };
        let (opened, skipped) = Opened::open(found, first, purpose, &specifics, |_| ())?;
        Ok((Self { device, opened }, skipped))
    }

    fn cannot(&self, operation: &'static str) -> Error {
        Error::io(operation, self.folder())(Errno::OPNOTSUPP)
    }
}

/// A filesystem's number, as long as a UUID. It is another one after a restart: what an index knows by it is then found no more.
fn uuid_of(device: u64) -> [u8; 16] {
    u128::from(device).to_le_bytes()
}

/// Calls `visit` with the ranges of an image that hold data, in whole blocks: the first block, and how many.
fn data_of(image: &OpenImage, mut visit: impl FnMut(u64, u64)) -> Result<()> {
    let failed = Error::io("look for data of", &image.known.path);
    let end = image.known.size.div_ceil(BLOCK_BYTES);
    let mut at = 0;
    while at < end {
        let found = rustix::fs::seek(&*image.file, SeekFrom::Data(at * BLOCK_BYTES))
            .and_then(|data| Ok((data, rustix::fs::seek(&*image.file, SeekFrom::Hole(data))?)));
        let (data, hole) = match found {
            Ok(found) => found,
            // There is no data behind, or the file was cut off meanwhile.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(failed(errno)),
        };
        // Neither need lie at a multiple of a block, and a file may have grown meanwhile.
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

    fn function(&self) -> FingerprintFunction {
        FingerprintFunction::Crc32c
    }

    fn frees_blocks(&self) -> bool {
        true
    }

    fn compresses(&self) -> bool {
        false
    }

    fn shortcomings(&self) -> Vec<String> {
        Vec::new()
    }

    fn has_read_only_snapshots(&self) -> Result<bool> {
        Ok(false)
    }

    /// Each image's data is its own: where it lies on disk is not known, and an address tells only one image and place from others.
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

    fn has_usable_checksums(&self) -> bool {
        false
    }

    fn fingerprints_from_checksums(&self, _: &mut Facts, _: &mut SlotSet) -> Result<()> {
        Ok(())
    }

    fn checksum_digests(&self, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
        Ok(SpillVec::of_in(None, facts.extents.len(), facts.budget()))
    }

    fn create_donor(&self, _: Class) -> Result<DonorId> {
        Err(self.cannot("make a donor in"))
    }

    fn takes_frames(&self) -> bool {
        false
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

    fn is_allocated(&self, _: u64, _: u64) -> Result<bool> {
        Ok(false)
    }

    fn ranges_in(&self, _: ImageId, _: &BTreeSet<u64>) -> Result<Vec<ExtentReference>> {
        Ok(Vec::new())
    }
}
