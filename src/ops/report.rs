//! `report`: shows what each image holds. It reads extent maps, and no data of images.

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
/// Those of finding and opening images; those of [`report_on`].
pub fn report(scope: &Scope, monitor: &dyn Monitor) -> Result<Reported> {
    let (fs, skipped) = open_pool(discover(scope, monitor)?, Purpose::Look, monitor)?;
    report_on(OpenPool::of(&*fs, skipped, scope, monitor))
}

/// Reports on a pool that is open. It needs no index.
///
/// # Errors
/// [`crate::error::Error::Io`] if metadata cannot be read.
pub fn report_on(pool: OpenPool<'_>) -> Result<Reported> {
    let OpenPool {
        fs, skipped, budget, ..
    } = pool;
    let mapped = fs.map(&budget)?;
    let mut report: Vec<ImageBytes> = images(fs)
        .map(|image| ImageBytes {
            path: image.path.clone(),
            size: image.size,
            ..ImageBytes::default()
        })
        .collect();
    let mut unreachable_bytes = 0;
    for (number, extent) in ExtentId::numbered(&mapped.facts.extents) {
        let unreachable = unreachable_in(&mapped.facts, number);
        unreachable_bytes += unreachable;
        for (image, blocks) in by_image(&mapped.facts, number) {
            let image = &mut report[image.index()];
            image.data_bytes += bytes(blocks);
            image.unreachable_bytes += unreachable;
            if extent.class.compression != Compression::None {
                image.compressed_bytes += extent.disk_bytes;
                image.uncompressed_bytes += bytes(extent.blocks);
            }
        }
        let held = held_blocks(&mapped.facts, number, fs.frees_blocks());
        for (image, blocks) in held.exclusive {
            report[image.index()].exclusive_bytes += extent.disk_share(blocks);
        }
        for (image, blocks) in held.shared {
            report[image.index()].shared_bytes += extent.disk_share(blocks);
        }
    }
    for beyond in &mapped.beyond {
        report[beyond.image.index()].exclusive_bytes += beyond.disk_bytes;
    }
    Ok(Reported {
        pool: PoolBytes::of(fs, &mapped.facts),
        unreachable_bytes,
        inline_bytes: mapped.inline_bytes,
        held_by: fs.names_of_holders(&mapped.facts)?,
        images: report,
        skipped,
    })
}

/// The blocks of an extent that images hold.
#[derive(Default)]
struct HeldBlocks {
    /// How many blocks the deletion of each image would free.
    exclusive: BTreeMap<ImageId, u32>,
    /// How many blocks each image has in common with others.
    shared: BTreeMap<ImageId, u32>,
}

/// The blocks of an extent that images hold. Without `frees_blocks`, all of its blocks are held by each image that maps any of them.
fn held_blocks(facts: &Facts, number: ExtentId, frees_blocks: bool) -> HeldBlocks {
    let extent = &facts.extents[number.index()];
    let is_held_by_others = extent.pinned == Some(PinReason::HeldByOthers);
    let mut held = HeldBlocks::default();
    let mut hold = |images: &BTreeSet<ImageId>, blocks: u32| {
        let is_exclusive = images.len() == 1 && !is_held_by_others;
        let counts = if is_exclusive {
            &mut held.exclusive
        } else {
            &mut held.shared
        };
        for image in images {
            *counts.entry(*image).or_default() += blocks;
        }
    };
    if !frees_blocks {
        let images: BTreeSet<_> = facts
            .mappings_to(number)
            .flat_map(|(_, images)| images.to_vec())
            .collect();
        hold(&images, extent.blocks);
        return held;
    }
    // The images of which a mapping begins or ends at a slot, in the order of slots.
    let mut events: BTreeMap<Slot, (Vec<ImageId>, Vec<ImageId>)> = BTreeMap::new();
    for (mapping, images) in facts.mappings_to(number) {
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
            // An image may refer to a block several times.
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

/// The number of blocks of an extent that each image maps, each reference counted.
fn by_image(facts: &Facts, extent: ExtentId) -> BTreeMap<ImageId, u32> {
    let mut blocks = BTreeMap::new();
    for reference in facts.references_to(extent) {
        *blocks.entry(reference.image).or_default() += reference.blocks;
    }
    blocks
}

/// The bytes on disk of those blocks of an extent that nothing maps. It is 0 for an extent that files outside the pool hold, because they may
/// map any of its blocks.
fn unreachable_in(facts: &Facts, number: ExtentId) -> u64 {
    let extent = &facts.extents[number.index()];
    if extent.pinned == Some(PinReason::HeldByOthers) {
        return 0;
    }
    let mut mapped: Vec<_> = facts.mappings_to(number).map(|(mapping, _)| mapping.slots()).collect();
    mapped.sort_unstable_by_key(|slots| slots.start);
    let (mut end, mut unmapped_blocks) = (extent.first_slot, 0);
    for slots in mapped {
        unmapped_blocks += slots.start.saturating_sub(end);
        end = end.max(slots.end);
    }
    extent.disk_share(unmapped_blocks + (extent.slots().end - end))
}
