//! Relocates ranges that still hold an extent after everything planned was shared. Their blocks are copied to a donor, and the references move
//! there. So one block that turned out to differ does not pin a whole extent.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::{ReclaimRun, ShareCall, share, split};
use crate::block::{BLOCK_LEN, bytes};
use crate::error::Result;
use crate::facts::Extent;
use crate::fs::{ExtentReference, HeldRange, SourceFile};
use crate::numbers::{DonorId, ExtentId, ImageId};

/// Blocks of one extent that are copied at most. If more are left over, the cause is not a few blocks that differ, and the extent stays.
const RELOCATED_BLOCKS_MAX: usize = 16 << 10;

/// Relocates the ranges that still hold extents of a batch, after everything planned was shared.
pub(super) fn relocate_rest(run: &mut ReclaimRun<'_>, extents: &[ExtentId]) -> Result<()> {
    let mut held = Vec::new();
    let facts = run.facts;
    for extent in extents {
        let known = &facts.extents[extent.index()];
        if run.fs.is_allocated(known.address, known.generation)? {
            held.push(*extent);
        }
    }
    if held.is_empty() {
        return Ok(());
    }
    run.outcome.counts.second_round_extents += held.len() as u64;
    // The map of an image may be long, so it is read once for all extents.
    let address = |extent: &ExtentId| facts.extents[extent.index()].address;
    let addresses: BTreeSet<u64> = held.iter().map(address).collect();
    let references = held.iter().flat_map(|extent| facts.references_to(*extent));
    let images: BTreeSet<ImageId> = references.map(|reference| reference.image).collect();
    let mut rest: BTreeMap<u64, Vec<(ImageId, HeldRange)>> = BTreeMap::new();
    for image in images {
        for ExtentReference { address, range } in run.fs.ranges_in(image, &addresses)? {
            rest.entry(address).or_default().push((image, range));
        }
    }
    for extent in &held {
        if run.stop() {
            return Ok(());
        }
        // If no image holds the extent, a file outside the pool has referred to it since the plan was made.
        if let Some(rest) = rest.remove(&address(extent)) {
            relocate_extent(run, *extent, rest)?;
        }
    }
    run.fs.commit()?;
    for extent in held {
        let known = &facts.extents[extent.index()];
        run.outcome.counts.extents_still_held += u64::from(run.fs.is_allocated(known.address, known.generation)?);
    }
    Ok(())
}

/// Relocates the ranges of images that still refer to an extent.
fn relocate_extent(run: &mut ReclaimRun<'_>, extent: ExtentId, rest: Vec<(ImageId, HeldRange)>) -> Result<()> {
    let extent = &run.facts.extents[extent.index()];
    if rest.iter().any(|(image, _)| !run.fs.may_touch(*image)) {
        return Ok(());
    }
    let Some(copies) = copy_blocks(run, extent, &rest) else {
        return Ok(());
    };
    let donor = run.fs.create_donor(extent.class)?;
    if !copies.content.is_empty() {
        run.writer.append(donor, extent.class, &copies.content)?;
        run.fs.settle_donor(donor)?;
        run.outcome.counts.written_bytes += copies.content.len() as u64;
    }
    for (image, range) in rest {
        move_range(run, image, range, donor, &copies)?;
    }
    Ok(())
}

/// Blocks of an extent that are copied to a donor.
#[derive(Default)]
struct CopiedBlocks {
    /// The offset of each block in the content, in bytes, by its place in the extent. A block is copied once, however many images refer to it.
    offsets: BTreeMap<u32, u64>,
    content: Vec<u8>,
}

/// Reads the blocks of an extent that images still refer to. It returns `None`, so that the extent stays, if a block cannot be read, or if
/// there are more blocks than are relocated.
fn copy_blocks(run: &mut ReclaimRun<'_>, extent: &Extent, rest: &[(ImageId, HeldRange)]) -> Option<CopiedBlocks> {
    let mut copies = CopiedBlocks::default();
    for (image, range) in rest.iter().filter(|(_, range)| !range.preallocated) {
        for number in 0..range.blocks {
            let Entry::Vacant(copy) = copies.offsets.entry(range.extent_block + number) else {
                continue;
            };
            let at = copies.content.len();
            copy.insert(at as u64);
            copies.content.resize(at + BLOCK_LEN, 0);
            let (file, offset) = (SourceFile::Image(*image), bytes(range.file_block + number));
            if let Err(error) = run.fs.read(file, offset, &mut copies.content[at..]) {
                run.outcome.unreadable.push(error);
                return None;
            }
        }
        if copies.offsets.len() > RELOCATED_BLOCKS_MAX || copies.offsets.len() >= extent.blocks as usize {
            return None;
        }
    }
    Some(copies)
}

/// Shares a range of an image with the copies of its blocks in a donor. A preallocated range becomes a hole.
fn move_range(
    run: &mut ReclaimRun<'_>,
    image: ImageId,
    range: HeldRange,
    donor: DonorId,
    copies: &CopiedBlocks,
) -> Result<()> {
    let call = |skipped, source, source_offset, length| ShareCall {
        source,
        source_offset,
        image,
        offset: bytes(range.file_block + skipped),
        length,
    };
    if range.preallocated {
        let hole = SourceFile::Hole {
            checksummed: run.fs.image(image).checksummed,
        };
        for call in split(call(0, hole, bytes(range.file_block), bytes(range.blocks))) {
            share(run.fs, call, run.outcome)?;
        }
        return Ok(());
    }
    let offset_of = |number: u32| copies.offsets[&(range.extent_block + number)];
    let mut done = 0;
    while done < range.blocks {
        let at = offset_of(done);
        let follows = |more: &u32| offset_of(done + more) == at + bytes(*more);
        let blocks = u32::try_from((0..range.blocks - done).take_while(follows).count()).unwrap_or(1);
        for call in split(call(done, SourceFile::Donor(donor), at, bytes(blocks))) {
            share(run.fs, call, run.outcome)?;
        }
        done += blocks;
    }
    Ok(())
}
