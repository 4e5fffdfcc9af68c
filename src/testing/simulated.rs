//! A btrfs in memory: extents with reference counts that are freed as a whole, files that map parts of them, and faults on demand. It keeps
//! the rules of btrfs (comparison before sharing, no sharing between files with and without checksums, whole extents), so that tests can
//! plan and execute thousands of pools.

mod filesystem;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::io::Errno;

pub use filesystem::block_of;

use crate::block::{BLOCK_BYTES, BLOCK_LEN, SlotSet, bytes};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::facts::{Class, Compression, Extent, Facts, PinReason, Reference};
use crate::fingerprint::FingerprintFunction;
use crate::fs::{self, ExtentReference, Filesystem, HeldRange, ImageInfo, ShareOutcome, SourceFile};
use crate::numbers::{DonorId, ExtentId, ImageId, Slot};
use crate::spill::{Budget, SpillVec};

/// A block's content: the number that the block begins with. Its other bytes repeat the number, or are derived from it if the block is to
/// be incompressible. 0 is a block of zeros.
pub type BlockContent = u64;

/// Content from this number on is incompressible. Fingerprints have only 32 bits of the number.
pub const INCOMPRESSIBLE: BlockContent = 1 << 31;

fn fill(block: &mut [u8], content: BlockContent) {
    let mut number = content;
    for bytes in block.chunks_mut(8) {
        bytes.copy_from_slice(&number.to_le_bytes()[..bytes.len()]);
        if content >= INCOMPRESSIBLE {
            number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).rotate_left(29) ^ 0x1405_7b7e_f767_814f;
        }
    }
}

/// What a block of a file maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct MappedBlock {
    extent: usize,
    at: u32,
    preallocated: bool,
}

#[derive(Debug, Clone)]
struct File {
    checksummed: bool,
    blocks: Vec<Option<MappedBlock>>,
}

#[derive(Debug, Clone)]
struct Allocation {
    content: Vec<BlockContent>,
    class: Class,
    outside: bool,
    /// The length of its frame in bytes; `None` if it is not compressed.
    packed_bytes: Option<u64>,
}

impl Allocation {
    /// Returns its size on disk in bytes.
    fn bytes(&self) -> u64 {
        let whole = self.content.len() as u64 * BLOCK_BYTES;
        self.packed_bytes
            .map_or(whole, |packed| packed.next_multiple_of(BLOCK_BYTES))
    }
}

#[derive(Debug, Clone, Default)]
struct DiskState {
    allocations: Vec<Allocation>,
    images: Vec<File>,
    donors: Vec<(Class, File)>,
    opened: BTreeSet<ImageId>,
    calls: u64,
    peak_bytes: u64,
}

/// The simulated filesystem.
#[derive(Debug, Default)]
pub struct Simulated {
    state: Mutex<DiskState>,
    /// The faults to inject.
    pub faults: Faults,
    /// Whether it frees each block on its own, as XFS does, rather than whole extents.
    pub frees_blocks: bool,
    path: PathBuf,
    known: filesystem::Known,
}

/// The faults of a simulated filesystem.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// The number of bits of a block's content that its fingerprint depends on. With fewer bits, different blocks have the same
    /// fingerprint. 0 stands for all.
    pub fingerprint_bits: u32,
    /// The most slots that a block table may hold.
    pub table_slots_max: Option<usize>,
    /// From this call on, someone else has this image open.
    pub opened: Option<(u64, ImageId)>,
    /// From this call on, nothing works, as if the process was killed.
    pub killed_at: Option<u64>,
    /// The filesystem refuses every n-th call.
    pub refuse_every: Option<u64>,
    /// The size of the disk in bytes, beyond which donors cannot be written.
    pub space_bytes: Option<u64>,
}

impl Simulated {
    /// Adds an extent with this content, and returns its number.
    pub fn allocate(&self, class: Class, content: Vec<BlockContent>) -> usize {
        self.with(|state| {
            state.allocations.push(Allocation {
                content,
                class,
                outside: false,
                packed_bytes: None,
            });
            state.allocations.len() - 1
        })
    }

    /// Makes something outside the images refer to an extent.
    pub fn hold_from_outside(&self, extent: usize) {
        self.with(|state| state.allocations[extent].outside = true);
    }

    /// Adds an image without data.
    pub fn add_image(&self, checksummed: bool, blocks: usize) -> ImageId {
        self.with(|state| {
            state.images.push(File {
                checksummed,
                blocks: vec![None; blocks],
            });
            ImageId::at(state.images.len() - 1)
        })
    }

    /// Makes a range of an image map part of an extent.
    pub fn map(&self, image: ImageId, file_block: u32, extent: usize, at: u32, blocks: u32, preallocated: bool) {
        self.with(|state| {
            for n in 0..blocks {
                let mapped = MappedBlock {
                    extent,
                    at: at + n,
                    preallocated,
                };
                state.images[image.index()].blocks[(file_block + n) as usize] = Some(mapped);
            }
        });
    }

    /// Adds an image that shares all its data with another.
    pub fn reflink(&self, image: ImageId) -> ImageId {
        self.with(|state| {
            state.images.push(state.images[image.index()].clone());
            ImageId::at(state.images.len() - 1)
        })
    }

    /// Removes a range of an image's data.
    pub fn punch(&self, image: ImageId, file_block: u32, blocks: u32) {
        self.with(|state| state.images[image.index()].blocks[file_block as usize..][..blocks as usize].fill(None));
    }

    /// Returns how many extents were ever allocated.
    pub fn extents(&self) -> usize {
        self.with(|state| state.allocations.len())
    }

    /// Makes everyone else close the images they have open.
    pub fn close_everyone_else(&self) {
        self.with(|state| state.opened.clear());
    }

    /// Returns the content of each image.
    pub fn contents(&self) -> Vec<Vec<BlockContent>> {
        self.with(|state| {
            let read = |file: &File| (0..file.blocks.len()).map(|at| state.content(file, at)).collect();
            state.images.iter().map(read).collect()
        })
    }

    /// Returns the bytes of extents that anything refers to, donors included.
    pub fn allocated_bytes(&self) -> u64 {
        self.with(|state| {
            if !self.frees_blocks {
                return state.allocated_bytes();
            }
            let ranges = (0..state.allocations.len()).flat_map(|number| self.ranges_in_use(state, number));
            ranges.map(|range| bytes(range.end - range.start)).sum()
        })
    }

    /// Returns the ranges of an allocation that are not free: the whole allocation if anything refers to it, or only the blocks in use if
    /// blocks are freed one by one.
    fn ranges_in_use(&self, state: &DiskState, number: usize) -> Vec<Range<u32>> {
        let length = u32::try_from(state.allocations[number].content.len()).unwrap_or(u32::MAX);
        let mut mapped = vec![state.allocations[number].outside; length as usize];
        for block in state.files().flat_map(|file| file.blocks.iter().flatten()) {
            if block.extent == number {
                mapped[block.at as usize] = true;
            }
        }
        if !self.frees_blocks {
            return mapped.contains(&true).then_some(0..length).into_iter().collect();
        }
        crate::range::where_true((0..length).map(|at| (at, mapped[at as usize])))
    }

    /// Returns the extent that a block of a file lies in, and the block's place in it.
    pub fn sector_of(&self, file: SourceFile, block: usize) -> Option<(usize, u32)> {
        self.with(|state| {
            let mapped = state.file(file)?.blocks.get(block).copied().flatten()?;
            Some((mapped.extent, mapped.at))
        })
    }

    /// Returns the most bytes that were allocated after any append to a donor.
    pub fn peak_bytes(&self) -> u64 {
        self.with(|state| state.peak_bytes)
    }

    /// Closes all donors, as the end of the process does.
    pub fn close_donors(&self) {
        self.with(|state| state.donors.clear());
    }

    /// Returns what mapping a pool finds, with all fingerprints.
    pub fn facts(&self) -> Facts {
        self.with(|state| {
            let mut in_use = Vec::new();
            let (mut extents, mut fingerprints, mut slot) = (Vec::new(), Vec::new(), Slot::default());
            for (number, allocation) in state.allocations.iter().enumerate() {
                for range in self.ranges_in_use(state, number) {
                    let blocks = range.end - range.start;
                    in_use.push(RangeInUse {
                        allocation: number,
                        start: range.start,
                        extent: ExtentId::at(extents.len()),
                        first_slot: slot,
                    });
                    extents.push(Extent {
                        address: DiskState::address(number) + bytes(range.start),
                        disk_bytes: if self.frees_blocks {
                            bytes(blocks)
                        } else {
                            allocation.bytes()
                        },
                        generation: 1,
                        first_slot: slot,
                        blocks,
                        class: allocation.class,
                        pinned: allocation.outside.then_some(PinReason::HeldByOthers),
                        compression_goal: None,
                    });
                    slot += blocks;
                    let content = &allocation.content[range.start as usize..range.end as usize];
                    fingerprints.extend(content.iter().map(|content| self.fingerprint(*content)));
                }
            }
            let references = state.references(&in_use);
            let mut facts = Facts::new(
                extents.into_iter().collect(),
                references.into_iter().collect(),
                self.fingerprint(0),
            );
            facts.fingerprints = fingerprints.into();
            facts.frees_blocks = self.frees_blocks;
            facts.table_slots_max = self.faults.table_slots_max.unwrap_or(usize::MAX);
            facts
        })
    }

    fn fingerprint(&self, content: BlockContent) -> u32 {
        let bits = if self.faults.fingerprint_bits == 0 {
            32
        } else {
            self.faults.fingerprint_bits
        };
        u32::try_from(content & ((1 << bits) - 1)).unwrap_or(u32::MAX)
    }

    fn with<T>(&self, work: impl FnOnce(&mut DiskState) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        work(&mut state)
    }

    fn is_dead(&self, state: &DiskState) -> bool {
        self.faults.killed_at.is_some_and(|at| state.calls >= at)
    }
}

/// A range of an allocation that is in use, which the facts have an extent for.
struct RangeInUse {
    allocation: usize,
    /// Its first block in the allocation.
    start: u32,
    extent: ExtentId,
    first_slot: Slot,
}

impl DiskState {
    fn address(number: usize) -> u64 {
        (number as u64 + 1) << 30
    }

    fn content(&self, file: &File, at: usize) -> BlockContent {
        match file.blocks.get(at).copied().flatten() {
            Some(mapped) if !mapped.preallocated => self.allocations[mapped.extent].content[mapped.at as usize],
            _ => 0,
        }
    }

    /// Returns the references of images. `in_use` has all ranges in use, in the order of their allocations and blocks.
    fn references(&self, in_use: &[RangeInUse]) -> Vec<Reference> {
        let mut references = Vec::new();
        for (image, file) in ImageId::numbered(&self.images) {
            for (number, range) in Self::ranges(file) {
                let after =
                    in_use.partition_point(|found| (found.allocation, found.start) <= (number, range.extent_block));
                let Some(found) = in_use[..after].last() else {
                    continue;
                };
                references.push(Reference {
                    image,
                    file_block: range.file_block,
                    slot: found.first_slot + (range.extent_block - found.start),
                    blocks: range.blocks,
                    extent: found.extent,
                    preallocated: range.preallocated,
                });
            }
        }
        references
    }

    fn files(&self) -> impl Iterator<Item = &File> {
        self.images.iter().chain(self.donors.iter().map(|(_, file)| file))
    }

    fn used(&self) -> BTreeSet<usize> {
        let mut used: BTreeSet<usize> = self
            .files()
            .flat_map(|file| file.blocks.iter().flatten().map(|mapped| mapped.extent))
            .collect();
        used.extend((0..self.allocations.len()).filter(|number| self.allocations[*number].outside));
        used
    }

    fn allocated_bytes(&self) -> u64 {
        self.used().iter().map(|number| self.allocations[*number].bytes()).sum()
    }

    fn ranges(file: &File) -> Vec<(usize, HeldRange)> {
        let mut ranges: Vec<(usize, HeldRange)> = Vec::new();
        for (file_block, mapped) in (0u32..).zip(&file.blocks) {
            let Some(mapped) = mapped else { continue };
            match ranges.last_mut() {
                Some((extent, last))
                    if *extent == mapped.extent
                        && last.preallocated == mapped.preallocated
                        && last.file_block + last.blocks == file_block
                        && last.extent_block + last.blocks == mapped.at =>
                {
                    last.blocks += 1;
                }
                _ => ranges.push((
                    mapped.extent,
                    HeldRange {
                        file_block,
                        extent_block: mapped.at,
                        blocks: 1,
                        preallocated: mapped.preallocated,
                    },
                )),
            }
        }
        ranges
    }

    fn file(&self, file: SourceFile) -> Option<&File> {
        match file {
            SourceFile::Image(image) => self.images.get(image.index()),
            SourceFile::Donor(donor) => self.donors.get(donor.index()).map(|(_, file)| file),
            SourceFile::Hole { .. } => None,
        }
    }
}

fn block_at(offset: u64) -> usize {
    usize::try_from(offset / BLOCK_BYTES).unwrap_or(usize::MAX)
}

impl Filesystem for Simulated {
    fn may_touch(&self, image: ImageId) -> bool {
        self.with(|state| {
            if let Some((at, opened)) = self.faults.opened
                && state.calls >= at
            {
                state.opened.insert(opened);
            }
            !state.opened.contains(&image)
        })
    }

    fn image_count(&self) -> u32 {
        self.count_images()
    }

    fn image(&self, image: ImageId) -> &ImageInfo {
        self.known_image(image)
    }

    fn is_unchanged(&self, _: ImageId) -> bool {
        true
    }

    fn attributes(&self, _: ImageId) -> Result<Metadata> {
        Ok(Self::plain_attributes())
    }

    fn folder(&self) -> &Path {
        &self.path
    }

    fn uuid(&self) -> [u8; 16] {
        [0x5a; 16]
    }

    fn function(&self) -> FingerprintFunction {
        filesystem::FUNCTION
    }

    fn frees_blocks(&self) -> bool {
        self.frees_blocks
    }

    fn compresses(&self) -> bool {
        !self.frees_blocks
    }

    fn shortcomings(&self) -> Vec<String> {
        Vec::new()
    }

    fn has_read_only_snapshots(&self) -> Result<bool> {
        Ok(false)
    }

    fn map(&self, _: &Budget) -> Result<fs::PoolMap> {
        Ok(self.mapped())
    }

    fn sees_all_holders(&self) -> bool {
        true
    }

    fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>> {
        Ok(Self::holders_of(facts))
    }

    fn has_usable_checksums(&self) -> bool {
        !self.frees_blocks
    }

    fn fingerprints_from_checksums(&self, facts: &mut Facts, known: &mut SlotSet) -> Result<()> {
        self.fill_in_fingerprints(facts, known);
        Ok(())
    }

    fn checksum_digests(&self, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
        Ok(self.digests(facts))
    }

    fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.with(|state| {
            for (n, block) in buffer.chunks_mut(BLOCK_LEN).enumerate() {
                let content = state
                    .file(file)
                    .map_or(0, |file| state.content(file, block_at(offset) + n));
                fill(block, content);
            }
        });
        Ok(())
    }

    fn read_ahead(&self, _: SourceFile, _: u64, _: u64) {}

    fn drop_behind(&self, _: SourceFile, _: u64, _: u64) {}

    fn free_bytes(&self) -> Result<u64> {
        Ok(u64::MAX)
    }

    fn create_donor(&self, class: Class) -> Result<DonorId> {
        self.with(|state| {
            state.donors.push((
                class,
                File {
                    checksummed: class.checksummed,
                    blocks: Vec::new(),
                },
            ));
            Ok(DonorId::at(state.donors.len() - 1))
        })
    }

    fn takes_frames(&self) -> bool {
        true
    }

    fn append_to_donor(&self, donor: DonorId, content: &[u8], frame: Option<&[u8]>) -> Result<()> {
        self.with(|state| {
            state.calls += 1;
            let full = self
                .faults
                .space_bytes
                .is_some_and(|space| state.allocated_bytes() + content.len() as u64 > space);
            if full || self.is_dead(state) {
                return Err(Error::NoSpace {
                    is_quota: false,
                    operation: "write a donor in",
                    path: self.path.clone(),
                });
            }
            let content: Vec<BlockContent> = content
                .chunks(BLOCK_LEN)
                .map(|block| {
                    let mut number = [0; 8];
                    number.copy_from_slice(&block[..8]);
                    BlockContent::from_le_bytes(number)
                })
                .collect();
            let (extent, blocks) = (
                state.allocations.len(),
                u32::try_from(content.len()).unwrap_or(u32::MAX),
            );
            let mut class = state.donors[donor.index()].0;
            if frame.is_none() {
                class.compression = Compression::None;
            }
            state.allocations.push(Allocation {
                content,
                class,
                outside: false,
                packed_bytes: frame.map(|frame| frame.len() as u64),
            });
            state.donors[donor.index()].1.blocks.extend((0..blocks).map(|at| {
                Some(MappedBlock {
                    extent,
                    at,
                    preallocated: false,
                })
            }));
            state.peak_bytes = state.peak_bytes.max(state.allocated_bytes());
            Ok(())
        })
    }

    fn discard_donor(&self, donor: DonorId) {
        self.with(|state| state.donors[donor.index()].1.blocks.clear());
    }

    fn settle_donor(&self, _: DonorId) -> Result<()> {
        Ok(())
    }

    fn close_donors(&self) -> Result<()> {
        self.close_donors();
        Ok(())
    }

    fn share(&self, source: SourceFile, source_offset: u64, image: ImageId, offset: u64, length: u64) -> ShareOutcome {
        self.with(|state| {
            state.calls += 1;
            if self.is_dead(state) {
                return ShareOutcome::Refused(Errno::IO);
            }
            if self
                .faults
                .refuse_every
                .is_some_and(|every| state.calls.is_multiple_of(every))
            {
                return ShareOutcome::Refused(Errno::AGAIN);
            }
            let checksummed = match source {
                SourceFile::Hole { checksummed } => checksummed,
                file => state.file(file).is_some_and(|file| file.checksummed),
            };
            let aligned = [source_offset, offset, length]
                .iter()
                .all(|number| number.is_multiple_of(BLOCK_BYTES));
            if !aligned || checksummed != state.images[image.index()].checksummed {
                return ShareOutcome::Refused(Errno::INVAL);
            }
            let at = |n: usize| (block_at(source_offset) + n, block_at(offset) + n);
            let blocks = block_at(length);
            let read = |state: &DiskState, n| state.file(source).map_or(0, |file| state.content(file, n));
            let image = image.index();
            if (0..blocks).any(|n| read(state, at(n).0) != state.content(&state.images[image], at(n).1)) {
                return ShareOutcome::Differs;
            }
            for n in 0..blocks {
                let mapped = state
                    .file(source)
                    .and_then(|file| file.blocks.get(at(n).0).copied().flatten());
                state.images[image].blocks[at(n).1] = mapped;
            }
            ShareOutcome::Shared
        })
    }

    fn clone_range(
        &self,
        image: ImageId,
        offset: u64,
        file: &std::fs::File,
        file_offset: u64,
        length: u64,
    ) -> rustix::io::Result<()> {
        self.copy_to(image, offset, file, file_offset, length)
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }

    fn is_allocated(&self, address: u64, _: u64) -> Result<bool> {
        Ok(!self.frees_blocks
            && self.with(|state| state.used().iter().any(|number| DiskState::address(*number) == address)))
    }

    fn ranges_in(&self, image: ImageId, addresses: &BTreeSet<u64>) -> Result<Vec<ExtentReference>> {
        Ok(self.with(|state| {
            let ranges = DiskState::ranges(&state.images[image.index()]).into_iter();
            let references = ranges.map(|(extent, range)| ExtentReference {
                address: DiskState::address(extent),
                range,
            });
            references
                .filter(|reference| addresses.contains(&reference.address))
                .collect()
        }))
    }
}

/// The class of an uncompressed extent with checksums and without groups.
pub const PLAIN: Class = Class {
    checksummed: true,
    compression: Compression::None,
    groups: 0,
};

/// Returns the facts of one image whose extents lie at these blocks of the disk. In the image, each extent lies `apart` times as far from
/// the beginning as the extents before it are long. Fingerprints are not filled in.
pub fn one_image(places: impl IntoIterator<Item = Range<u32>>, apart: u32) -> Facts {
    let (mut extents, mut references, mut slot) = (SpillVec::default(), Vec::new(), Slot::default());
    for (number, place) in (0u32..).zip(places) {
        let blocks = place.end - place.start;
        extents.push(Extent {
            address: bytes(place.start),
            disk_bytes: bytes(blocks),
            generation: 7,
            first_slot: slot,
            blocks,
            class: PLAIN,
            pinned: None,
            compression_goal: None,
        });
        references.push(Reference {
            image: ImageId(0),
            file_block: slot.0 * apart,
            slot,
            blocks,
            extent: ExtentId(number),
            preallocated: false,
        });
        slot += blocks;
    }
    Facts::new(extents, references.into_iter().collect(), 0)
}
