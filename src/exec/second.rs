//! The second turn: whatever still holds an extent that was to go is copied to a donor and moved there, so that one block
//! that turned out different never pins a whole extent.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use super::{Call, Run, share, split};
use crate::block::{BLOCK_LEN, bytes};
use crate::error::Result;
use crate::facts::ImageId;
use crate::fs::SourceFile;

/// Blocks copied in one round at most: what is left over by chance is little, and what is much has another cause.
const ROUND_BLOCKS_MAX: usize = 16 << 10;

/// Gives the extents of a batch their second turn.
pub(super) fn round(run: &mut Run<'_>, extents: &[u32]) -> Result<()> {
    let mut held = Vec::new();
    for extent in extents {
        let this = &run.facts.extents[*extent as usize];
        if run.fs.is_allocated(this.address, this.generation)? {
            held.push(*extent);
        }
    }
    run.ran.counts.second_round_extents += held.len() as u64;
    for extent in &held {
        if run.stop() {
            return Ok(());
        }
        move_rest(run, *extent)?;
    }
    if held.is_empty() {
        return Ok(());
    }
    run.fs.commit()?;
    for extent in held {
        let this = &run.facts.extents[extent as usize];
        run.ran.counts.extents_still_held += u64::from(run.fs.is_allocated(this.address, this.generation)?);
    }
    Ok(())
}

/// Moves what images still refer to of one extent.
fn move_rest(run: &mut Run<'_>, extent: u32) -> Result<()> {
    let this = &run.facts.extents[extent as usize];
    let images: BTreeSet<ImageId> = run
        .facts
        .references_to(extent)
        .iter()
        .map(|reference| reference.image)
        .collect();
    let mut rest = Vec::new();
    for image in images {
        if !run.fs.may_touch(image) {
            return Ok(());
        }
        rest.extend(
            run.fs
                .ranges_in(image, this.address)?
                .into_iter()
                .map(|range| (image, range)),
        );
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
                run.fs.read(
                    SourceFile::Image(*image),
                    bytes(range.file_block + n),
                    &mut content[at..],
                )?;
            }
        }
        if copies.len() > ROUND_BLOCKS_MAX || copies.len() >= this.blocks as usize {
            return Ok(());
        }
    }
    let donor = run.fs.create_donor(this.class)?;
    if !content.is_empty() {
        run.fs.append_to_donor(donor, &content)?;
        run.fs.settle_donor(donor)?;
        run.ran.counts.written_bytes += content.len() as u64;
    }
    for (image, range) in rest {
        let call = |n, source, source_offset, length| Call {
            source,
            source_offset,
            image,
            offset: bytes(range.file_block + n),
            length,
        };
        if range.preallocated {
            let hole = SourceFile::Hole {
                checksummed: run.fs.is_checksummed(image),
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
