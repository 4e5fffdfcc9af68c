//! Reads where images lie from their maps (`FIEMAP`), and who else shares their blocks from the reverse map, if there is one.
//!
//! XFS counts references block by block. An extent of the facts is therefore a range of adjacent blocks that are alike: in their groups,
//! and in whether they may be freed. Its ends must not depend on the number of references to its blocks: a plan must be able to tell which
//! extents it leaves behind.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::Xfs;
use crate::block::{BLOCK_BYTES, bytes};
use crate::error::{Error, Result};
use crate::facts::{Class, Collector, Compression, Extent, Facts, Mapping, PinReason, SharedList};
use crate::fs::opened::OpenImage;
use crate::fs::{BeyondEnd, Filesystem, PoolMap, blocks};
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::spill::{Budget, SpillVec};
use crate::sys::fiemap::fiemap;
use crate::sys::fsmap::{SharedBlocks, shared_blocks};

/// Extents are cut at addresses that are multiples of this, 16 MiB, so that one change does not change all extents.
const EXTENT_BLOCKS_MAX: u64 = 4096;

/// A range of an image and its place on disk, in blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct MappedRange {
    block: u64,
    file_block: u32,
    blocks: u32,
    preallocated: bool,
    /// Whether the filesystem reports other references to the blocks.
    shared: bool,
    pinned: Option<PinReason>,
    /// Whether it lies before the end of the image, where calls can reach it.
    reachable: bool,
}

impl MappedRange {
    /// Splits the range after its first `blocks` blocks, and returns the rest.
    fn split_off(&mut self, blocks: u32) -> Self {
        let rest = Self {
            file_block: self.file_block.saturating_add(blocks),
            block: self.block + u64::from(blocks),
            blocks: self.blocks - blocks,
            ..*self
        };
        self.blocks = blocks;
        rest
    }
}

/// Returns the mapped ranges of one image.
fn ranges_of(image: &OpenImage) -> Result<Vec<MappedRange>> {
    let io = |errno| Error::io("read the extent map of", &image.known.path)(errno);
    let mut found = Vec::new();
    fiemap(&*image.file, |mapping| found.push(mapping)).map_err(io)?;
    let whole_blocks = blocks(image.known.size)?;
    let image_blocks = blocks(image.known.size.next_multiple_of(BLOCK_BYTES))?;
    let mut ranges = Vec::new();
    for mapping in found {
        let aligned = [mapping.offset, mapping.address, mapping.length]
            .iter()
            .all(|number| number.is_multiple_of(BLOCK_BYTES));
        if !aligned {
            return Err(Error::Metadata {
                path: image.known.path.clone(),
                problem: format!("a range that is not in whole blocks at byte {}", mapping.offset),
            });
        }
        // The offset of a range beyond the end of a file may exceed the limits; where exactly it lies does not matter.
        let file_block = blocks(mapping.offset.min(image.known.size.next_multiple_of(BLOCK_BYTES)))?;
        let mut range = MappedRange {
            file_block,
            block: mapping.address / BLOCK_BYTES,
            blocks: blocks(mapping.length)?,
            preallocated: mapping.unwritten,
            shared: mapping.shared,
            pinned: image.fixed.map(|_| PinReason::Fixed),
            reachable: true,
        };
        let end = range.file_block.saturating_add(range.blocks);
        // No call can reach what is allocated beyond the end of a file.
        if end > image_blocks {
            let mut beyond = range.split_off(image_blocks - range.file_block);
            beyond.reachable = false;
            beyond.pinned = beyond.pinned.or(Some(PinReason::Preallocated));
            ranges.push(beyond);
        }
        // `FIDEDUPERANGE` shares the last, partial block of a file only with the last block of another.
        if image_blocks > whole_blocks && end >= image_blocks && range.blocks > 0 {
            let mut tail = range.split_off(range.blocks - 1);
            tail.pinned = tail.pinned.or(Some(PinReason::UnalignedTail));
            ranges.push(tail);
        }
        ranges.push(range);
    }
    ranges.retain(|range| range.blocks > 0);
    Ok(ranges)
}

/// The common properties of the blocks at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct BlockState {
    groups: u32,
    pinned: Option<PinReason>,
    preallocated: bool,
}

/// Properties of the images that map the same range.
#[derive(Debug, Clone, Copy)]
struct Members {
    count: u32,
    /// The least of their age ranks: that of the image that is unchanged for longest.
    age: usize,
    /// Their groups, as bits.
    groups: u32,
}

impl Members {
    fn of(numbers: &[ImageId], images: &[OpenImage], ages: &[usize]) -> Self {
        let ages = numbers.iter().map(|image| ages[image.index()]);
        Self {
            count: u32::try_from(numbers.len()).unwrap_or(u32::MAX),
            age: ages.min().unwrap_or(usize::MAX),
            groups: numbers
                .iter()
                .fold(0, |groups, image| groups | 1 << images[image.index()].group),
        }
    }
}

/// The references to the blocks at the current address of the sweep.
#[derive(Debug, Default)]
struct Active {
    /// References by the least age rank of their images.
    ages: BTreeMap<usize, u32>,
    groups: BTreeMap<u32, u32>,
    pinned: BTreeMap<PinReason, u32>,
    references: u32,
    preallocated: u32,
    shared: u32,
    /// References by files outside the pool.
    others: u32,
}

impl Active {
    fn enter(&mut self, range: &MappedRange, members: Members) {
        *self.ages.entry(members.age).or_default() += 1;
        *self.groups.entry(members.groups).or_default() += 1;
        if let Some(pinned) = range.pinned {
            *self.pinned.entry(pinned).or_default() += 1;
        }
        self.references += members.count;
        self.preallocated += u32::from(range.preallocated);
        self.shared += members.count * u32::from(range.shared);
    }

    fn leave(&mut self, range: &MappedRange, members: Members) {
        decrement(&mut self.ages, members.age);
        decrement(&mut self.groups, members.groups);
        if let Some(pinned) = range.pinned {
            decrement(&mut self.pinned, pinned);
        }
        self.references -= members.count;
        self.preallocated -= u32::from(range.preallocated);
        self.shared -= members.count * u32::from(range.shared);
    }

    /// Returns the properties of the blocks; `None` if no image refers to them.
    fn state(&self, reverse_map: bool) -> Option<BlockState> {
        let held = if reverse_map {
            self.others > 0
        } else {
            // There is one reference in the pool, and more than one in all. If the pool has several, XFS does not tell whether there are
            // others.
            self.references == 1 && self.shared == 1
        };
        (self.references > 0).then(|| BlockState {
            groups: self.groups.keys().fold(0, |all, groups| all | groups),
            pinned: held
                .then_some(PinReason::HeldByOthers)
                .or_else(|| self.pinned.keys().next().copied()),
            preallocated: self.preallocated > 0,
        })
    }
}

fn decrement<K: Ord>(counts: &mut BTreeMap<K, u32>, key: K) {
    if let std::collections::btree_map::Entry::Occupied(mut entry) = counts.entry(key) {
        *entry.get_mut() -= 1;
        if *entry.get() == 0 {
            entry.remove();
        }
    }
}

/// The ranks of images by the time since their last change, longest first.
struct Ages {
    /// The rank of each image.
    ranks: Vec<usize>,
    /// The state hashes of images, by rank.
    state_hashes: Vec<u64>,
}

impl Ages {
    fn of(images: &[OpenImage]) -> Self {
        let mut order: Vec<usize> = (0..images.len()).collect();
        order.sort_by_key(|image| (images[*image].changed_at(), *image));
        let mut ranks = vec![0; images.len()];
        for (rank, image) in order.iter().enumerate() {
            ranks[*image] = rank;
        }
        Self {
            ranks,
            state_hashes: order.iter().map(|image| images[*image].state_hash()).collect(),
        }
    }
}

/// The beginning or the end of a range, where the sweep over block addresses stops. Boundaries are ordered by address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Boundary {
    /// The block's address.
    at: u64,
    kind: BoundaryKind,
}

/// What begins or ends at a [`Boundary`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum BoundaryKind {
    /// A range of an image begins.
    Begin(u32),
    /// A range of an image ends.
    End(u32),
    /// A range begins that a file outside the pool refers to.
    BeginOther,
    /// A range ends that a file outside the pool refers to.
    EndOther,
}

/// Sweeps over all blocks that images refer to, and cuts them into ranges of blocks that are alike.
fn cut(
    ranges: &SharedList<MappedRange>,
    others: &[SharedBlocks],
    images: &[OpenImage],
    reverse_map: bool,
) -> Result<SpillVec<Extent>> {
    let ages = Ages::of(images);
    let range_and_members = |number: u32| {
        let (range, numbers) = ranges.get(number as usize);
        (range, Members::of(numbers, images, &ages.ranks))
    };
    let mut active = Active::default();
    let mut cutter = Cutter {
        state_hashes: &ages.state_hashes,
        extents: SpillVec::new_in(ranges.budget()),
        run: None,
        slot: Slot::default(),
        eldest: Vec::new(),
    };
    let mut boundaries = boundaries(ranges, others).into_iter().peekable();
    while let Some(Boundary { at, kind }) = boundaries.next() {
        match kind {
            BoundaryKind::Begin(number) => {
                let (range, members) = range_and_members(number);
                active.enter(range, members);
            }
            BoundaryKind::End(number) => {
                let (range, members) = range_and_members(number);
                active.leave(range, members);
            }
            BoundaryKind::BeginOther => active.others += 1,
            BoundaryKind::EndOther => active.others -= 1,
        }
        if boundaries.peek().is_some_and(|next| next.at == at) {
            continue;
        }
        cutter.go_on(at, active.state(reverse_map), active.ages.keys().next().copied())?;
    }
    Ok(cutter.extents)
}

/// Returns the beginnings and ends of all ranges, in the order of their addresses.
fn boundaries(ranges: &SharedList<MappedRange>, others: &[SharedBlocks]) -> SpillVec<Boundary> {
    let mut boundaries = SpillVec::with_capacity_in(2 * (ranges.iter().len() + others.len()), ranges.budget());
    let mut push = |at, kind| boundaries.push(Boundary { at, kind });
    for (number, (range, _)) in (0u32..).zip(ranges.iter()) {
        let end = range.block + u64::from(range.blocks);
        push(range.block, BoundaryKind::Begin(number));
        push(end, BoundaryKind::End(number));
    }
    for other in others {
        push(other.address / BLOCK_BYTES, BoundaryKind::BeginOther);
        push((other.address + other.length) / BLOCK_BYTES, BoundaryKind::EndOther);
    }
    boundaries.sort_unstable();
    boundaries
}

/// A run of blocks that are alike.
#[derive(Debug, Clone, Copy)]
struct BlockRun {
    /// The address of its first block.
    begin: u64,
    state: BlockState,
}

/// The image that is unchanged for longest among those that refer to a block.
#[derive(Debug, Clone, Copy)]
struct Eldest {
    /// The address from which it applies.
    begin: u64,
    /// The age rank of the image.
    rank: usize,
}

/// Makes extents of runs of blocks that are alike.
struct Cutter<'a> {
    /// The state hashes of images, by age rank.
    state_hashes: &'a [u64],
    extents: SpillVec<Extent>,
    /// The current run.
    run: Option<BlockRun>,
    /// The first slot of the next extent.
    slot: Slot,
    /// Blocks are unchanged if one image that refers to them is: the one that is unchanged for longest. These are those images for
    /// the blocks of the current run, in the order of addresses.
    eldest: Vec<Eldest>,
}

impl Cutter<'_> {
    /// Continues at a block: from it on, blocks have these properties, and this is the age rank of the image that is unchanged for longest.
    fn go_on(&mut self, at: u64, state: Option<BlockState>, eldest: Option<usize>) -> Result<()> {
        if self.run.map(|run| run.state) != state {
            self.close(at)?;
            self.eldest.clear();
            self.run = state.map(|state| BlockRun { begin: at, state });
        }
        if let Some(rank) = eldest
            && self.eldest.last().is_none_or(|last| last.rank != rank)
        {
            self.eldest.push(Eldest { begin: at, rank });
        }
        Ok(())
    }

    /// Ends the current run before a block, and makes extents of it.
    fn close(&mut self, end: u64) -> Result<()> {
        let Some(BlockRun { begin: mut from, state }) = self.run.take() else {
            return Ok(());
        };
        while from < end {
            let length = (end - from).min(EXTENT_BLOCKS_MAX - from % EXTENT_BLOCKS_MAX);
            let blocks = u32::try_from(length).map_err(|_| Error::TooLarge)?;
            let generation = self.generation(from, from + length);
            self.extents.push(Extent {
                address: from * BLOCK_BYTES,
                disk_bytes: length * BLOCK_BYTES,
                generation,
                first_slot: self.slot,
                blocks,
                class: Class {
                    checksummed: true,
                    compression: Compression::None,
                    groups: state.groups,
                },
                pinned: state.pinned,
                compression_goal: None,
            });
            self.slot = self.slot.checked_add(blocks).ok_or(Error::TooLarge)?;
            from += length;
        }
        Ok(())
    }

    /// Returns the generation of the blocks from `from` to `end`, which tells them from later blocks at the same addresses.
    fn generation(&self, from: u64, end: u64) -> u64 {
        let eldest = &self.eldest;
        let first = eldest.partition_point(|eldest| eldest.begin <= from).saturating_sub(1);
        let overlapping = eldest[first..].iter().take_while(|eldest| eldest.begin < end);
        let ranks: BTreeSet<usize> = overlapping.map(|eldest| eldest.rank).collect();
        let mut generation = xxhash_rust::xxh3::Xxh3Default::new();
        for rank in ranks {
            generation.update(&self.state_hashes[rank].to_le_bytes());
        }
        generation.digest()
    }
}

impl Xfs {
    pub(super) fn read_map(&self, budget: &Budget) -> Result<PoolMap> {
        let mut ranges = Collector::new_in(budget);
        let mut beyond = Vec::new();
        for (number, image) in ImageId::numbered(&self.opened.images) {
            for range in ranges_of(image)? {
                if !range.reachable && !range.shared {
                    beyond.push(BeyondEnd {
                        image: number,
                        disk_bytes: bytes(range.blocks),
                    });
                }
                ranges.push(range, number);
            }
        }
        let ranges = ranges.finish();
        let others = if self.reverse_map { self.others(budget)? } else { None };
        let _ = self.names_owners.set(others.is_some());
        let extents = cut(
            &ranges,
            others.as_ref().map_or(&[][..], |others| &others[..]),
            &self.opened.images,
            others.is_some(),
        )?;
        let mappings = ranges.flat_map(|range| {
            let end = range.block + u64::from(range.blocks);
            let block_of = |extent: &Extent| extent.address / BLOCK_BYTES;
            let first = extents.partition_point(|extent| block_of(extent) + u64::from(extent.blocks) <= range.block);
            let overlapping = (first..extents.len()).take_while({
                let extents = &extents;
                move |place| range.reachable && block_of(&extents[*place]) < end
            });
            overlapping.map({
                let extents = &extents;
                move |place| {
                    let extent = &extents[place];
                    let (from, to) = (
                        block_of(extent).max(range.block),
                        (block_of(extent) + u64::from(extent.blocks)).min(end),
                    );
                    // All of these are below the lengths of an extent and a range.
                    let to_u32 = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
                    Mapping {
                        file_block: range.file_block + to_u32(from - range.block),
                        slot: extent.first_slot + to_u32(from - block_of(extent)),
                        blocks: to_u32(to - from),
                        extent: ExtentId::at(place),
                        preallocated: range.preallocated,
                    }
                }
            })
        });
        let mut facts = Facts::new(extents, mappings, self.function().of_zeros());
        facts.machines = self.opened.images.iter().map(|image| image.machine).collect();
        facts.partial_blocks = self.opened.partial_blocks();
        facts.frees_blocks = true;
        Ok(PoolMap {
            facts,
            inline_bytes: 0,
            inline: Vec::new(),
            beyond,
        })
    }

    /// Returns the blocks that files outside the pool share; `None` if the kernel does not name owners to this process.
    pub(super) fn others(&self, budget: &Budget) -> Result<Option<SpillVec<SharedBlocks>>> {
        let own_inodes: HashSet<u64> = self.opened.images.iter().map(|image| image.inode).collect();
        let mut others = SpillVec::new_in(budget);
        let result = shared_blocks(self.opened.scratch.folder(), |blocks| {
            if !own_inodes.contains(&blocks.inode) {
                others.push(blocks);
            }
        });
        match result {
            Ok(()) => Ok(Some(others)),
            Err(rustix::io::Errno::PERM) => Ok(None),
            Err(errno) => Err(Error::io("read the reverse map of", self.opened.scratch.path())(errno)),
        }
    }
}
