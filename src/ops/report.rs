//! `report`: what each image holds. Reads no image data.

use std::collections::{BTreeMap, BTreeSet};

use super::{OpenPool, Scope, discover, open_pool};
use crate::block::bytes;
use crate::error::Result;
use crate::facts::{Compression, Facts, PinReason};
use crate::fs::{Purpose, images};
use crate::monitor::Monitor;
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::report::{ImageBytes, PoolBytes, Reported};

/// Reports on a pool.
///
/// # Errors
/// Those of reading metadata.
pub fn report(scope: &Scope, monitor: &dyn Monitor) -> Result<Reported> {
    let (fs, skipped) = open_pool(discover(scope, monitor)?, Purpose::Look, monitor)?;
    report_on(OpenPool::of(&*fs, skipped, scope, monitor))
}

/// Reports on a pool that is open. Needs no index.
///
/// # Errors
/// Those of reading metadata.
pub fn report_on(pool: OpenPool<'_>) -> Result<Reported> {
    let OpenPool {
        fs, skipped, budget, ..
    } = pool;
    let mapped = fs.map(&budget)?;
    let mut found: Vec<ImageBytes> = images(fs)
        .map(|image| ImageBytes {
            path: image.path.clone(),
            size: image.size,
            ..ImageBytes::default()
        })
        .collect();
    let mut unreachable = 0;
    for (place, extent) in ExtentId::numbered(&mapped.facts.extents) {
        let dead = dead_bytes(&mapped.facts, place);
        unreachable += dead;
        for (image, blocks) in by_image(&mapped.facts, place) {
            let of = &mut found[image.index()];
            of.data_bytes += bytes(blocks);
            of.unreachable_bytes += dead;
            if extent.class.compression != Compression::None {
                of.compressed_bytes += extent.disk_bytes;
                of.uncompressed_bytes += bytes(extent.blocks);
            }
        }
        let held = held(&mapped.facts, place, fs.frees_blocks());
        for (image, blocks) in held.exclusive {
            found[image.index()].exclusive_bytes += extent.disk_share(blocks);
        }
        for (image, blocks) in held.shared {
            found[image.index()].shared_bytes += extent.disk_share(blocks);
        }
    }
    for beyond in &mapped.beyond {
        found[beyond.image.index()].exclusive_bytes += beyond.disk_bytes;
    }
    Ok(Reported {
        pool: PoolBytes::of(fs, &mapped.facts),
        unreachable_bytes: unreachable,
        inline_bytes: mapped.inline_bytes,
        held_by: fs.names_of_holders(&mapped.facts)?,
        images: found,
        skipped,
    })
}

/// Blocks of an extent that go with each image, and those that stay when it is deleted.
#[derive(Default)]
struct Held {
    exclusive: BTreeMap<ImageId, u32>,
    shared: BTreeMap<ImageId, u32>,
}

/// Who holds an extent: as a whole, or block by block where blocks are freed so.
fn held(facts: &Facts, extent: ExtentId, by_blocks: bool) -> Held {
    let this = &facts.extents[extent.index()];
    let is_held_by_others = this.pinned == Some(PinReason::HeldByOthers);
    let mut held = Held::default();
    let mut hold = |images: &BTreeSet<ImageId>, blocks: u32| {
        let is_exclusive = images.len() == 1 && !is_held_by_others;
        let held = if is_exclusive {
            &mut held.exclusive
        } else {
            &mut held.shared
        };
        for image in images {
            *held.entry(*image).or_default() += blocks;
        }
    };
    if !by_blocks {
        let images: BTreeSet<_> = facts
            .mappings_to(extent)
            .flat_map(|(_, images)| images.to_vec())
            .collect();
        hold(&images, this.blocks);
        return held;
    }
    // What begins and ends at a slot, in the order of slots.
    let mut events: BTreeMap<Slot, (Vec<ImageId>, Vec<ImageId>)> = BTreeMap::new();
    for (mapping, images) in facts.mappings_to(extent) {
        let slots = mapping.slots();
        events.entry(slots.start).or_default().0.extend(images);
        events.entry(slots.end).or_default().1.extend(images);
    }
    let (mut references, mut from): (BTreeMap<ImageId, u32>, Slot) = (BTreeMap::new(), Slot(0));
    for (at, (begin, end)) in events {
        hold(&references.keys().copied().collect(), at - from);
        for image in begin {
            *references.entry(image).or_default() += 1;
        }
        for image in end {
            // One image may refer to a block twice.
            let count = references.entry(image).or_default();
            *count -= 1;
            if *count == 0 {
                references.remove(&image);
            }
        }
        from = at;
    }
    held
}

/// The images that refer to an extent, with the blocks they map.
fn by_image(facts: &Facts, extent: ExtentId) -> BTreeMap<ImageId, u32> {
    let mut blocks = BTreeMap::new();
    for reference in facts.references_to(extent) {
        *blocks.entry(reference.image).or_default() += reference.blocks;
    }
    blocks
}

/// Bytes on disk of an extent that nothing reaches. Of one that others hold, nobody here can tell.
fn dead_bytes(facts: &Facts, extent: ExtentId) -> u64 {
    let this = &facts.extents[extent.index()];
    if this.pinned == Some(PinReason::HeldByOthers) {
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
