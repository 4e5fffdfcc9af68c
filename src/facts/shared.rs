//! What images have in common: each thing once, with the set of images that have it. Revisions of a machine mostly map the same
//! blocks from the same place, so that what is known of them does not grow with their number.

use std::collections::HashMap;

use super::ImageId;
use crate::spill::SpillVec;

/// Sets of images, by number.
#[derive(Debug, Clone, Default)]
pub(crate) struct ImageSets {
    members: Vec<ImageId>,
    /// Where each set's members end.
    ends: Vec<usize>,
}

impl ImageSets {
    /// The members of one, ascending.
    pub(crate) fn get(&self, set: u32) -> &[ImageId] {
        let set = set as usize;
        let start = set.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.members[start..self.ends[set]]
    }

    /// How many sets there are.
    pub(crate) fn len(&self) -> usize {
        self.ends.len()
    }

    fn push(&mut self, members: &[ImageId]) -> u32 {
        self.members.extend(members);
        self.ends.push(self.members.len());
        u32::try_from(self.ends.len() - 1).unwrap_or(u32::MAX)
    }
}

/// Numbers sets, the same ones the same.
#[derive(Debug, Default)]
struct Numbering {
    sets: ImageSets,
    numbers: HashMap<Box<[ImageId]>, u32>,
}

impl Numbering {
    /// The number of a set, given its members in order.
    fn of(&mut self, members: &[ImageId]) -> u32 {
        if let Some(number) = self.numbers.get(members) {
            return *number;
        }
        let number = self.sets.push(members);
        self.numbers.insert(members.into(), number);
        number
    }
}

/// Things, each with the set of images that have it.
#[derive(Debug)]
pub struct SharedList<T> {
    pub(super) list: SpillVec<(T, u32)>,
    pub(super) sets: ImageSets,
}

impl<T> Default for SharedList<T> {
    fn default() -> Self {
        Self {
            list: SpillVec::new(),
            sets: ImageSets::default(),
        }
    }
}

impl<T> SharedList<T> {
    /// The things, each with the images that have it, ascending.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = (&T, &[ImageId])> {
        self.list.iter().map(|(thing, set)| (thing, self.sets.get(*set)))
    }

    /// One of them.
    pub(crate) fn get(&self, place: usize) -> (&T, &[ImageId]) {
        let (thing, set) = &self.list[place];
        (thing, self.sets.get(*set))
    }

    /// What becomes of each, for the same images.
    pub(crate) fn flat_map<U, I: IntoIterator<Item = U>>(self, mut becomes: impl FnMut(T) -> I) -> SharedList<U> {
        let list = self.list.into_iter();
        SharedList {
            list: list
                .flat_map(|(thing, set)| becomes(thing).into_iter().map(move |thing| (thing, set)))
                .collect(),
            sets: self.sets,
        }
    }
}

/// Finds out what images have in common, while it comes in image by image: what all have is kept once from the beginning.
#[derive(Debug)]
pub(crate) struct Collector<T> {
    list: SpillVec<(T, u32)>,
    numbering: Numbering,
    unite_at: usize,
}

impl<T: Ord + Copy> Collector<T> {
    /// Things that may wait to be united.
    const WAITING_MIN: usize = 1 << 16;

    /// With nothing in it.
    pub(crate) fn new() -> Self {
        Self {
            list: SpillVec::new(),
            numbering: Numbering::default(),
            unite_at: Self::WAITING_MIN,
        }
    }

    /// Adds what one image has.
    pub(crate) fn push(&mut self, thing: T, image: ImageId) {
        if self.list.len() >= self.unite_at {
            self.unite();
            self.unite_at = Self::WAITING_MIN.max(2 * self.list.len());
        }
        let set = self.numbering.of(&[image]);
        self.list.push((thing, set));
    }

    /// All that came in, in order.
    pub(crate) fn finish(mut self) -> SharedList<T> {
        self.unite();
        self.list.shrink_to_fit();
        SharedList {
            list: self.list,
            sets: self.numbering.sets,
        }
    }

    /// Makes one of what is the same. Sets that nothing has any more are gone after that.
    fn unite(&mut self) {
        let old = std::mem::take(&mut self.numbering).sets;
        unite(&mut self.list, &old, &mut self.numbering);
    }
}

/// Makes one of each thing that is in the list several times, with all its images. `old` are the sets the list speaks of; of those, the ones
/// that are still needed are numbered anew in `new`.
fn unite<T: Ord + Copy>(list: &mut SpillVec<(T, u32)>, old: &ImageSets, new: &mut Numbering) {
    list.sort_unstable_by_key(|(thing, _)| *thing);
    let mut renumbered = vec![None; old.len()];
    let (mut from, mut kept, mut members) = (0, 0, Vec::new());
    while from < list.len() {
        let (thing, set) = list[from];
        let same = list[from..].iter().take_while(|(other, _)| *other == thing).count();
        let number = if same == 1 {
            *renumbered[set as usize].get_or_insert_with(|| new.of(old.get(set)))
        } else {
            members.clear();
            members.extend(list[from..from + same].iter().flat_map(|(_, set)| old.get(*set)));
            members.sort_unstable();
            members.dedup();
            new.of(&members)
        };
        list[kept] = (thing, number);
        kept += 1;
        from += same;
    }
    list.truncate(kept);
}

impl<T: Ord + Copy> SharedList<T> {
    /// Takes some things apart, image by image, and puts what `rework` makes of them in their place. `is_same_part` cuts them, in order,
    /// into parts that have nothing to do with each other; `needs` tells of which parts that is to be done.
    pub(super) fn rework(
        &mut self,
        is_same_part: impl Fn(&T, &T) -> bool,
        needs: impl Fn(&[(T, u32)], &ImageSets) -> bool,
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
                for (thing, set) in &self.list[from..end] {
                    each.extend(numbering.sets.get(*set).iter().map(|image| (*image, *thing)));
                }
                rework(&mut each);
                each.sort_unstable_by_key(|(image, thing)| (*thing, *image));
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
        /// Whatever order things come in and however often they are united on the way, each is there once with all its images.
        #[test]
        fn each_thing_is_kept_once(
            all in prop::collection::vec((0u8..8, 0u32..6), 0..60),
            waiting in 1usize..10,
        ) {
            let mut collector = Collector::new();
            for (thing, image) in &all {
                if collector.list.len() >= waiting {
                    collector.unite();
                }
                collector.push(*thing, *image);
            }
            let shared = collector.finish();
            let mut expected: std::collections::BTreeMap<u8, std::collections::BTreeSet<u32>> = std::collections::BTreeMap::new();
            for (thing, image) in all {
                expected.entry(thing).or_default().insert(image);
            }
            let found: Vec<(u8, Vec<u32>)> = shared.iter().map(|(thing, images)| (*thing, images.to_vec())).collect();
            let expected: Vec<(u8, Vec<u32>)> = expected.into_iter().map(|(thing, images)| (thing, images.into_iter().collect())).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(shared.sets.len() <= shared.list.len());
        }
    }
}
