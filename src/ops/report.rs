//! `report`: what each image holds. Reads no image data.

use std::collections::BTreeMap;

use super::{Scope, discover, divide_memory};
use crate::block::bytes;
use crate::error::Result;
use crate::facts::{Compression, Facts, ImageId, Pinned};
use crate::fs::volume::{Purpose, Volume};
use crate::monitor::Monitor;
use crate::report::{ImageBytes, PoolBytes, Reported};

/// Reports on a pool.
///
/// # Errors
/// Those of reading metadata.
pub fn report(scope: &Scope, monitor: &dyn Monitor) -> Result<Reported> {
    let found = discover(scope, monitor)?;
    monitor.phase("Reading extent maps", 0);
    divide_memory(scope, 0);
    let (fs, mut skipped) = Volume::open(&found.images, &found.named, Purpose::Look)?;
    skipped.extend(found.skipped);
    let mapped = fs.map()?;
    let mut images: Vec<ImageBytes> = fs
        .images()
        .iter()
        .map(|image| ImageBytes {
            path: image.path.clone(),
            size: image.size,
            ..ImageBytes::default()
        })
        .collect();
    let mut unreachable = 0;
    for (place, extent) in (0u32..).zip(&mapped.facts.extents) {
        let (by_image, dead) = (by_image(&mapped.facts, place), dead_bytes(&mapped.facts, place));
        unreachable += dead;
        let exclusive = by_image.len() == 1 && extent.pinned != Some(Pinned::HeldByOthers);
        for (image, blocks) in by_image {
            let of = &mut images[image as usize];
            of.data_bytes += bytes(blocks);
            of.unreachable_bytes += dead;
            if extent.class.compression != Compression::None {
                of.compressed_bytes += extent.disk_bytes;
                of.uncompressed_bytes += bytes(extent.blocks);
            }
            if exclusive {
                of.exclusive_bytes += extent.disk_bytes;
            } else {
                of.shared_bytes += extent.disk_bytes;
            }
        }
    }
    Ok(Reported {
        pool: PoolBytes::of(&fs, &mapped.facts),
        unreachable_bytes: unreachable,
        inline_bytes: mapped.inline_bytes,
        held_by: fs.names_of_holders(&mapped.facts)?,
        images,
        skipped,
    })
}

/// The images that refer to an extent, with the blocks they map.
fn by_image(facts: &Facts, extent: u32) -> BTreeMap<ImageId, u32> {
    let mut blocks = BTreeMap::new();
    for reference in facts.references_to(extent) {
        *blocks.entry(reference.image).or_default() += reference.blocks;
    }
    blocks
}

/// Bytes on disk of an extent that nothing reaches. Of one that others hold, nobody here can tell.
fn dead_bytes(facts: &Facts, extent: u32) -> u64 {
    let this = &facts.extents[extent as usize];
    if this.pinned == Some(Pinned::HeldByOthers) {
        return 0;
    }
    let mut reached: Vec<_> = facts.mappings_to(extent).map(|(mapping, _)| mapping.slots()).collect();
    reached.sort_unstable_by_key(|slots| slots.start);
    let (mut end, mut dead) = (this.first_slot, 0);
    for slots in reached {
        dead += slots.start.saturating_sub(end);
        end = end.max(slots.end);
    }
    this.disk_share(dead + (this.slots().end - end))
}
