//! What deleting images frees. It follows from who holds each byte on disk: a range is freed once the last of its holders is deleted.
//! Bytes of single images do not add up to those of a set, so each set is looked up here and never summed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::block::bytes;
use crate::facts::{Extent, Facts, PinReason};
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::spill::SpillVec;

/// The bytes on disk that one set of images holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HeldBytes {
    /// Bytes that nothing but these images holds.
    pub alone_bytes: u64,
    /// Bytes that something outside the pool holds as well.
    pub held_bytes: u64,
}

/// What a set of images takes on disk, and what its deletion frees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Bytes on disk of all that any image of the set holds.
    pub on_disk_bytes: u64,
    /// Bytes on disk that nothing else holds.
    pub freed_bytes: u64,
}

/// The bytes on disk of a pool, by the set of images that hold them.
#[derive(Debug, Clone, Default)]
pub struct Holdings {
    /// By the members of the set, ascending.
    sets: BTreeMap<Box<[ImageId]>, HeldBytes>,
}

impl Holdings {
    /// Adds up what the images of a pool hold.
    pub fn of(facts: &Facts) -> Self {
        let mut holdings = Self::default();
        for_each_range(facts, |range, images, is_held| {
            holdings.add(images, range.end - range.start, is_held);
        });
        holdings
    }

    /// Adds bytes on disk that some images hold, ascending. `is_held` says that something else does, too.
    pub fn add(&mut self, images: &[ImageId], disk_bytes: u64, is_held: bool) {
        let found = match self.sets.get_mut(images) {
            Some(found) => found,
            None => self.sets.entry(images.into()).or_default(),
        };
        let bytes = if is_held {
            &mut found.held_bytes
        } else {
            &mut found.alone_bytes
        };
        *bytes += disk_bytes;
    }

    /// Notes that deleting some images frees nothing, because they have names that are not among those that are deleted.
    pub fn keep(&mut self, images: &BTreeSet<ImageId>) {
        for (members, bytes) in &mut self.sets {
            if members.iter().any(|member| images.contains(member)) {
                bytes.held_bytes += std::mem::take(&mut bytes.alone_bytes);
            }
        }
    }

    /// The sets of images that hold anything together, each with what it holds. Each byte is in one set only.
    pub fn sets(&self) -> impl Iterator<Item = (&[ImageId], HeldBytes)> {
        self.sets.iter().map(|(members, bytes)| (&**members, *bytes))
    }

    /// Bytes on disk that something outside the pool holds as well.
    pub fn held_bytes(&self) -> u64 {
        self.sets.values().map(|bytes| bytes.held_bytes).sum()
    }

    /// What one set of images takes, and what its deletion frees.
    pub fn share(&self, is_in: impl Fn(ImageId) -> bool) -> Share {
        let mut share = Share::default();
        for (members, bytes) in &self.sets {
            let count = members.iter().filter(|member| is_in(**member)).count();
            if count > 0 {
                share.on_disk_bytes += bytes.alone_bytes + bytes.held_bytes;
            }
            if count == members.len() {
                share.freed_bytes += bytes.alone_bytes;
            }
        }
        share
    }

    /// What each owner's images take, and what the deletion of all of them frees. `owners_of` tells the owners of an image, ascending. An
    /// image of several owners stays until all of them are deleted, and one without an owner stays.
    pub fn shares<O: Ord + Copy>(&self, owners_of: impl Fn(ImageId) -> Vec<O>) -> BTreeMap<O, Share> {
        let mut owners: BTreeMap<ImageId, Vec<O>> = BTreeMap::new();
        let mut shares: BTreeMap<O, Share> = BTreeMap::new();
        let mut all = Vec::new();
        for (members, bytes) in &self.sets {
            all.clear();
            let mut has_others = false;
            for member in members {
                let of_member = owners.entry(*member).or_insert_with(|| owners_of(*member));
                has_others |= of_member.is_empty();
                all.extend_from_slice(of_member);
            }
            all.sort_unstable();
            all.dedup();
            for owner in &all {
                shares.entry(*owner).or_default().on_disk_bytes += bytes.alone_bytes + bytes.held_bytes;
            }
            if let [owner] = all[..]
                && !has_others
            {
                shares.entry(owner).or_default().freed_bytes += bytes.alone_bytes;
            }
        }
        shares
    }
}

/// A range on disk, and the set of images that hold it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct HeldRange {
    /// The first byte, and the byte after the last one.
    start: u64,
    end: u64,
    set: u32,
    is_held: bool,
}

/// The ranges on disk of a pool, each with the images that hold it.
#[derive(Debug)]
pub struct Layers {
    /// They are ascending and do not overlap.
    ranges: SpillVec<HeldRange>,
    sets: Vec<Box<[ImageId]>>,
}

impl Layers {
    /// The ranges that the images of a pool hold.
    pub fn of(facts: &Facts) -> Self {
        let mut numbers: BTreeMap<Box<[ImageId]>, u32> = BTreeMap::new();
        let mut sets = Vec::new();
        let mut ranges = SpillVec::with_capacity_in(facts.extents.len(), facts.budget());
        for_each_range(facts, |range, images, is_held| {
            let set = numbers.get(images).copied().unwrap_or_else(|| {
                let number = u32::try_from(sets.len()).unwrap_or(u32::MAX);
                sets.push(Box::from(images));
                numbers.insert(images.into(), number);
                number
            });
            ranges.push(HeldRange {
                start: range.start,
                end: range.end,
                set,
                is_held,
            });
        });
        Self { ranges, sets }
    }

    /// What images hold after a plan was carried out that some of them have no part in. `self` is the planned pool of the others, and
    /// `numbers` tells their numbers in `now`, which is the pool of all images; `None` if an image is not there any more. Images that are not
    /// in `numbers` hold what they do now.
    pub fn beside(&self, numbers: &[Option<ImageId>], now: &Self) -> Holdings {
        let planned: BTreeSet<ImageId> = numbers.iter().copied().flatten().collect();
        let mut holdings = Holdings::default();
        let mut images = Vec::new();
        for (bytes, mine, others) in overlaid(&self.ranges, &now.ranges) {
            images.clear();
            if let Some(range) = mine {
                let members = self.sets[range.set as usize].iter();
                images.extend(members.filter_map(|image| numbers.get(image.index()).copied().flatten()));
            }
            if let Some(range) = others {
                let members = now.sets[range.set as usize].iter();
                images.extend(members.filter(|image| !planned.contains(image)));
            }
            images.sort_unstable();
            images.dedup();
            // To the pool of the others, an image that has no part counts as something outside.
            let is_held = others.or(mine).is_some_and(|range| range.is_held);
            if !images.is_empty() {
                holdings.add(&images, bytes, is_held);
            }
        }
        holdings
    }
}

/// Cuts two lists of ranges at the same places: the bytes of each part, and the range of each list that it lies in.
fn overlaid<'a>(
    one: &'a [HeldRange],
    other: &'a [HeldRange],
) -> impl Iterator<Item = (u64, Option<&'a HeldRange>, Option<&'a HeldRange>)> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut at = 0;
    std::iter::from_fn(move || {
        while one.next_if(|range| range.end <= at).is_some() {}
        while other.next_if(|range| range.end <= at).is_some() {}
        let next = [one.peek().copied(), other.peek().copied()];
        let start = next.iter().flatten().map(|range| range.start.max(at)).min()?;
        let inside = next.map(|range| range.filter(|range| range.start <= start));
        let edges = next.iter().flatten().flat_map(|range| [range.start, range.end]);
        at = edges.filter(|edge| *edge > start).min()?;
        Some((at - start, inside[0], inside[1]))
    })
}

/// Donors of a plan lie beyond this address, and nothing else does. Two plans may give the same address to different donors.
const DONORS_FROM: u64 = 1 << 62;

/// Calls `each` with each range on disk that images hold, with these images, ascending, and with whether something outside the pool holds it.
/// Ranges come in the order of their addresses.
fn for_each_range(facts: &Facts, mut each: impl FnMut(Range<u64>, &[ImageId], bool)) {
    let mut images = Vec::new();
    for (number, extent) in ExtentId::numbered(&facts.extents) {
        let is_held = extent.pinned == Some(PinReason::HeldByOthers);
        let address = match extent.generation {
            super::PLANNED_GENERATION => extent.address | DONORS_FROM,
            _ => extent.address,
        };
        if facts.frees_blocks {
            for_each_part(facts, number, |slots, images| {
                let start = address + part_bytes(extent, slots.start);
                each(start..address + part_bytes(extent, slots.end), images, is_held);
            });
            continue;
        }
        images.clear();
        for (_, members) in facts.mappings_to(number) {
            if images != members {
                images.extend_from_slice(members);
            }
        }
        images.sort_unstable();
        images.dedup();
        if !images.is_empty() {
            each(address..address + extent.disk_bytes, &images, is_held);
        }
    }
}

/// Bytes from the beginning of an extent to a slot of it, where each block is freed on its own.
fn part_bytes(extent: &Extent, slot: Slot) -> u64 {
    bytes(slot - extent.first_slot)
}

/// Calls `each` with each part of an extent whose blocks the same images map, in order.
fn for_each_part(facts: &Facts, number: ExtentId, mut each: impl FnMut(Range<Slot>, &[ImageId])) {
    // The images of which a mapping begins or ends at a slot, in the order of slots.
    let mut events: BTreeMap<Slot, (Vec<ImageId>, Vec<ImageId>)> = BTreeMap::new();
    for (mapping, images) in facts.mappings_to(number) {
        let slots = mapping.slots();
        events.entry(slots.start).or_default().0.extend(images);
        events.entry(slots.end).or_default().1.extend(images);
    }
    let (mut references, mut from): (BTreeMap<ImageId, u32>, Slot) = (BTreeMap::new(), Slot(0));
    for (at, (begin, end)) in events {
        if !references.is_empty() {
            let images: Vec<ImageId> = references.keys().copied().collect();
            each(from..at, &images);
        }
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BLOCK_BYTES;
    use crate::plan::tests::notation::{Pool, options, pools};
    use crate::plan::{PlanOptions, apply};
    use proptest::prelude::*;

    /// Bytes on disk that a set of images holds, and those that nothing else does: extent by extent, or block by block.
    fn counted(facts: &Facts, is_in: impl Fn(ImageId) -> bool) -> Share {
        let mut share = Share::default();
        for (number, extent) in ExtentId::numbered(&facts.extents) {
            let is_held = extent.pinned == Some(PinReason::HeldByOthers);
            let mut count = |holders: BTreeSet<ImageId>, bytes: u64| {
                if holders.iter().any(|image| is_in(*image)) {
                    share.on_disk_bytes += bytes;
                    if !is_held && holders.iter().all(|image| is_in(*image)) {
                        share.freed_bytes += bytes;
                    }
                }
            };
            let references: Vec<_> = facts.references_to(number).collect();
            if !facts.frees_blocks {
                count(references.iter().map(|one| one.image).collect(), extent.disk_bytes);
                continue;
            }
            for slot in crate::range::each(extent.slots()) {
                let over = references.iter().filter(|one| one.slots().contains(&slot));
                count(over.map(|one| one.image).collect(), BLOCK_BYTES);
            }
        }
        share
    }

    proptest! {
        /// Every set of images frees what counting says, before a plan and after it.
        #[test]
        fn sets_free_what_is_counted(text in pools(), options in options(), frees_blocks: bool, of_owner in prop::collection::vec(0u8..3, 5)) {
            let mut pool = Pool::of(&text);
            pool.facts.frees_blocks = frees_blocks;
            let plan = pool.plan(&options);
            let images = u32::try_from(pool.images().len()).unwrap();
            let check = |facts: &Facts| -> Result<(), TestCaseError> {
                let holdings = Holdings::of(facts);
                for set in 0..1u32 << images {
                    let is_in = |image: ImageId| set >> image.0 & 1 == 1;
                    prop_assert_eq!(holdings.share(is_in), counted(facts, is_in));
                }
                let shares = holdings.shares(|image| vec![of_owner[image.index()]]);
                for (owner, share) in shares {
                    prop_assert_eq!(share, counted(facts, |image| of_owner[image.index()] == owner));
                }
                let all: u64 = holdings.sets().map(|(_, bytes)| bytes.alone_bytes + bytes.held_bytes).sum();
                prop_assert_eq!(all, holdings.share(|_| true).on_disk_bytes);
                Ok(())
            };
            check(&pool.facts)?;
            let applied = apply(&mut pool.facts, &plan.layout);
            check(&applied.facts)?;
        }

        /// Where some images have no part in a plan, the others hold what they would without them, and these hold what they do now.
        #[test]
        fn images_that_have_no_part_keep_what_they_hold(text in pools(), frees_blocks: bool, left in prop::collection::vec(any::<bool>(), 5)) {
            let mut all = Pool::of(&text);
            all.facts.frees_blocks = frees_blocks;
            let numbers: Vec<Option<ImageId>> = all.images().filter(|image| !left[image.index()]).map(Some).collect();
            let mut idle = Pool::of(&text);
            idle.facts.frees_blocks = frees_blocks;
            idle.leave_out(|image| left[image.index()]);
            let plan = idle.plan(&PlanOptions::default());
            let applied = apply(&mut idle.facts, &plan.layout);
            let after = Layers::of(&applied.facts).beside(&numbers, &Layers::of(&all.facts));
            let before = Holdings::of(&all.facts);
            let everything = |holdings: &Holdings| holdings.share(|_| true).on_disk_bytes;
            let freed = u64::try_from(plan.freed_bytes()).unwrap();
            prop_assert_eq!(everything(&before) - everything(&after), freed);
            let stay = |image: ImageId| left[image.index()];
            prop_assert_eq!(before.share(stay).on_disk_bytes, after.share(stay).on_disk_bytes);
        }
    }

    #[test]
    fn an_image_with_names_elsewhere_keeps_what_it_holds() {
        let pool = Pool::of(
            "
            A  abcd
            B  efgh
            one  A
            two  A B",
        );
        let mut holdings = Holdings::of(&pool.facts);
        assert_eq!(holdings.share(|_| true).freed_bytes, 8 * BLOCK_BYTES);
        holdings.keep(&BTreeSet::from([ImageId(0)]));
        assert_eq!(holdings.share(|_| true).freed_bytes, 4 * BLOCK_BYTES);
        assert_eq!(holdings.share(|_| true).on_disk_bytes, 8 * BLOCK_BYTES);
        assert_eq!(holdings.held_bytes(), 4 * BLOCK_BYTES);
        let of_both = holdings.shares(|image| if image == ImageId(1) { vec![1, 2] } else { vec![1] });
        assert_eq!(of_both[&2].freed_bytes, 0);
    }
}
