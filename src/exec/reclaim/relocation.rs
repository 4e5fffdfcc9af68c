//! Relocates what still holds an extent that was to go: its blocks are copied to a donor, and references to them are moved there, so that
//! one block that turned out different never pins a whole extent.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::{ReclaimRun, ShareCall, share, split};
use crate::block::{BLOCK_LEN, bytes};
use crate::error::Result;
use crate::fs::{ExtentReference, HeldRange, SourceFile};
use crate::numbers::{ExtentId, ImageId};

/// Blocks of one extent that are copied at most: what is left over by chance is little, and what is much has another cause.
const RELOCATED_BLOCKS_MAX: usize = 16 << 10;

/// Relocates what still holds the extents of a batch, after everything planned was shared.
pub(super) fn relocate_rest(run: &mut ReclaimRun<'_>, extents: &[ExtentId]) -> Result<()> {
    let mut held = Vec::new();
    for extent in extents {
        let this = &run.facts.extents[extent.index()];
        if run.fs.is_allocated(this.address, this.generation)? {
            held.push(*extent);
        }
    }
    if held.is_empty() {
        return Ok(());
    }
    run.ran.counts.second_round_extents += held.len() as u64;
    // One look at each image for all extents: its map may be long.
    let facts = run.facts;
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
        // Where no image holds an extent any more, someone else does since the plan was made.
        if let Some(rest) = rest.remove(&address(extent)) {
            relocate_extent(run, *extent, rest)?;
        }
    }
    run.fs.commit()?;
    for extent in held {
        let this = &facts.extents[extent.index()];
        run.ran.counts.extents_still_held += u64::from(run.fs.is_allocated(this.address, this.generation)?);
    }
    Ok(())
}

/// Relocates what images still refer to of one extent.
fn relocate_extent(run: &mut ReclaimRun<'_>, extent: ExtentId, rest: Vec<(ImageId, HeldRange)>) -> Result<()> {
    let this = &run.facts.extents[extent.index()];
    if rest.iter().any(|(image, _)| !run.fs.may_touch(*image)) {
        return Ok(());
    }
    // Each block of the extent is copied once, however many images refer to it: where in the donor, by its place in the extent.
    let mut copies: BTreeMap<u32, u64> = BTreeMap::new();
    let mut content = Vec::new();
    for (image, range) in rest.iter().filter(|(_, range)| !range.preallocated) {
        for n in 0..range.blocks {
            if let Entry::Vacant(copy) = copies.entry(range.extent_block + n) {
                let at = content.len();
                copy.insert(at as u64);
                content.resize(at + BLOCK_LEN, 0);
                let (file, offset) = (SourceFile::Image(*image), bytes(range.file_block + n));
                if let Err(error) = run.fs.read(file, offset, &mut content[at..]) {
                    // What cannot be read cannot be moved: the extent stays.
                    run.ran.unreadable.push(error);
                    return Ok(());
                }
            }
        }
        if copies.len() > RELOCATED_BLOCKS_MAX || copies.len() >= this.blocks as usize {
            return Ok(());
        }
    }
    let donor = run.fs.create_donor(this.class)?;
    if !content.is_empty() {
        run.writer.append(donor, this.class, &content)?;
        run.fs.settle_donor(donor)?;
        run.ran.counts.written_bytes += content.len() as u64;
    }
    for (image, range) in rest {
        let call = |n, source, source_offset, length| ShareCall {
            source,
            source_offset,
            image,
            offset: bytes(range.file_block + n),
            length,
        };
        if range.preallocated {
            let hole = SourceFile::Hole {
                checksummed: run.fs.image(image).checksummed,
            };
            for call in split(call(0, hole, bytes(range.file_block), bytes(range.blocks))) {
                share(run.fs, call, run.ran)?;
            }
            continue;
        }
        let mut n = 0;
        while n < range.blocks {
            let at = copies[&(range.extent_block + n)];
            let follows = |more: &u32| copies[&(range.extent_block + n + more)] == at + bytes(*more);
            let blocks = u32::try_from((0..range.blocks - n).take_while(follows).count()).unwrap_or(1);
            for call in split(call(n, SourceFile::Donor(donor), at, bytes(blocks))) {
                share(run.fs, call, run.ran)?;
            }
            n += blocks;
        }
    }
    Ok(())
}
