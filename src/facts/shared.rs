//! Lists of what images have in common: each item once, with the set of images that have it. Revisions of a machine mostly map
//! the same blocks at the same places, so that such a list does not grow with their number.

use std::collections::HashMap;

use crate::numbers::{ImageId, ImageSetId};
use crate::spill::{Budget, SpillVec};

/// Sets of images, by number.
#[derive(Debug, Clone, Default)]
pub(crate) struct ImageSets {
    members: Vec<ImageId>,
    /// Where each set's members end.
    ends: Vec<usize>,
}

impl ImageSets {
    /// The members of one, ascending.
    pub(crate) fn get(&self, set: ImageSetId) -> &[ImageId] {
        let set = set.index();
        let start = set.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.members[start..self.ends[set]]
    }

    /// How many sets there are.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    fn push(&mut self, members: &[ImageId]) -> ImageSetId {
        self.members.extend(members);
        self.ends.push(self.members.len());
        ImageSetId::at(self.ends.len() - 1)
    }
}

/// Numbers sets of images; equal sets get the same number.
#[derive(Debug, Default)]
struct Numbering {
    sets: ImageSets,
    numbers: HashMap<Box<[ImageId]>, ImageSetId>,
}

impl Numbering {
    /// The number of a set, given its members in order.
    fn of(&mut self, members: &[ImageId]) -> ImageSetId {
        if let Some(number) = self.numbers.get(members) {
            return *number;
        }
        let number = self.sets.push(members);
        self.numbers.insert(members.into(), number);
        number
    }
}

/// A list of items, each with the number of the set of images that have it.
#[derive(Debug)]
pub struct SharedList<T> {
    pub(super) list: SpillVec<(T, ImageSetId)>,
    pub(super) sets: ImageSets,
}

impl<T> Default for SharedList<T> {
    fn default() -> Self {
        Self {
            list: SpillVec::default(),
            sets: ImageSets::default(),
        }
    }
}

impl<T> SharedList<T> {
    /// The budget that the list is made from.
    pub(crate) fn budget(&self) -> &Budget {
        self.list.budget()
    }

    /// The items, each with the images that have it, ascending.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (&T, &[ImageId])> {
        self.list.iter().map(|(item, set)| (item, self.sets.get(*set)))
    }

    /// The item at a place of the list.
    pub(crate) fn get(&self, place: usize) -> (&T, &[ImageId]) {
        let (item, set) = &self.list[place];
        (item, self.sets.get(*set))
    }

    /// Replaces each item by others, for the same images.
    pub(crate) fn flat_map<U, I: IntoIterator<Item = U>>(self, mut becomes: impl FnMut(T) -> I) -> SharedList<U> {
        let budget = self.budget().clone();
        let list = self.list.into_iter();
        let list = list.flat_map(|(item, set)| becomes(item).into_iter().map(move |item| (item, set)));
        SharedList {
            list: SpillVec::from_iter_in(list, &budget),
            sets: self.sets,
        }
    }
}

/// Builds a [`SharedList`] from items that arrive image by image. Equal items are united on the way, so that memory does not grow
/// with the number of images.
#[derive(Debug)]
pub(crate) struct Collector<T> {
    list: SpillVec<(T, ImageSetId)>,
    numbering: Numbering,
    unite_at: usize,
}

impl<T: Ord + Copy> Collector<T> {
    /// Items that may wait to be united.
    const WAITING_MIN: usize = 1 << 16;

    /// An empty one, whose list is made from a budget.
    pub(crate) fn new_in(budget: &Budget) -> Self {
        Self {
            list: SpillVec::new_in(budget),
            numbering: Numbering::default(),
            unite_at: Self::WAITING_MIN,
        }
    }

    /// Adds what one image has.
    pub(crate) fn push(&mut self, item: T, image: ImageId) {
        if self.list.len() >= self.unite_at {
            self.unite();
            self.unite_at = Self::WAITING_MIN.max(2 * self.list.len());
        }
        let set = self.numbering.of(&[image]);
        self.list.push((item, set));
    }

    /// The list of all items, in order.
    pub(crate) fn finish(mut self) -> SharedList<T> {
        self.unite();
        self.list.shrink_to_fit();
        SharedList {
            list: self.list,
            sets: self.numbering.sets,
        }
    }

    /// Unites equal items. Sets that no item has after that are dropped.
    fn unite(&mut self) {
        let old = std::mem::take(&mut self.numbering).sets;
        unite(&mut self.list, &old, &mut self.numbering);
    }
}

/// Unites equal items of a list, with all their images. The list refers to sets in `old` before, and to sets in `new` after.
fn unite<T: Ord + Copy>(list: &mut SpillVec<(T, ImageSetId)>, old: &ImageSets, new: &mut Numbering) {
    list.sort_unstable_by_key(|(item, _)| *item);
    let mut renumbered = vec![None; old.len()];
    let (mut from, mut kept, mut members) = (0, 0, Vec::new());
    while from < list.len() {
        let (item, set) = list[from];
        let same = list[from..].iter().take_while(|(other, _)| *other == item).count();
        let number = if same == 1 {
            *renumbered[set.index()].get_or_insert_with(|| new.of(old.get(set)))
        } else {
            members.clear();
            members.extend(list[from..from + same].iter().flat_map(|(_, set)| old.get(*set)));
            members.sort_unstable();
            members.dedup();
            new.of(&members)
        };
        list[kept] = (item, number);
        kept += 1;
        from += same;
    }
    list.truncate(kept);
}

impl<T: Ord + Copy> SharedList<T> {
    /// Replaces some items by what `rework` makes of them, image by image. `is_same_part` cuts the ordered list into parts that
    /// are independent of each other; `needs` tells which of the parts are to be reworked.
    pub(super) fn rework(
        &mut self,
        is_same_part: impl Fn(&T, &T) -> bool,
        needs: impl Fn(&[(T, ImageSetId)], &ImageSets) -> bool,
        rework: impl Fn(&mut Vec<(ImageId, T)>),
    ) {
        let mut numbering = Numbering::default();
        let old = std::mem::take(&mut self.sets);
        unite(&mut self.list, &old, &mut numbering);
        let (mut from, mut kept, mut added, mut each, mut members) = (0, 0, Vec::new(), Vec::new(), Vec::new());
        while from < self.list.len() {
            let rest = &self.list[from..];
            let end = from + rest.partition_point(|(other, _)| is_same_part(&rest[0].0, other));
            if needs(&self.list[from..end], &numbering.sets) {
                each.clear();
                for (item, set) in &self.list[from..end] {
                    each.extend(numbering.sets.get(*set).iter().map(|image| (*image, *item)));
                }
                rework(&mut each);
                each.sort_unstable_by_key(|(image, item)| (*item, *image));
                each.dedup();
                for same in each.chunk_by(|one, other| one.1 == other.1) {
                    members.clear();
                    members.extend(same.iter().map(|(image, _)| *image));
                    added.push((same[0].1, numbering.of(&members)));
                }
            } else {
                self.list.copy_within(from..end, kept);
                kept += end - from;
            }
            from = end;
        }
        self.list.truncate(kept);
        self.list.extend(added);
        self.sets = numbering.sets;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever order items come in and however often they are united on the way, each is there once with all its images.
        #[test]
        fn each_thing_is_kept_once(
            all in prop::collection::vec((0u8..8, 0u32..6), 0..60),
            waiting in 1usize..10,
        ) {
            let mut collector = Collector::new_in(&Budget::default());
            for (item, image) in &all {
                if collector.list.len() >= waiting {
                    collector.unite();
                }
                collector.push(*item, ImageId(*image));
            }
            let shared = collector.finish();
            let mut expected: std::collections::BTreeMap<u8, std::collections::BTreeSet<ImageId>> = std::collections::BTreeMap::new();
            for (item, image) in all {
                expected.entry(item).or_default().insert(ImageId(image));
            }
            let found: Vec<(u8, Vec<ImageId>)> = shared.iter().map(|(item, images)| (*item, images.to_vec())).collect();
            let expected: Vec<(u8, Vec<ImageId>)> = expected.into_iter().map(|(item, images)| (item, images.into_iter().collect())).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(shared.sets.len() <= shared.list.len());
        }
    }
}
