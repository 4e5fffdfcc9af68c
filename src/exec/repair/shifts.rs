//! Where the bytes of an archive stand in a file in which some are missing, or stand twice.

use super::scan::Anchor;

/// By how much bytes are moved, from places on.
#[derive(Debug, Clone, Default)]
pub(super) struct Shifts {
    /// Where each stretch begins in the archive as it was, ascending, and how many bytes later it stands in the file.
    runs: Vec<(u64, i64)>,
}

impl Shifts {
    /// Makes them of places that are known.
    pub(super) fn new(mut anchors: Vec<Anchor>) -> Self {
        anchors.sort_unstable();
        let mut runs: Vec<(u64, i64)> = Vec::new();
        for same in anchors.chunk_by(|one, other| one.origin == other.origin) {
            let shifts = || same.iter().filter_map(shift_of);
            let last = runs.last().map(|(_, shift)| *shift);
            // What stands twice belongs to what stands before it.
            let chosen = shifts().find(|shift| Some(*shift) == last).or_else(|| shifts().next());
            if let Some(shift) = chosen.filter(|shift| Some(*shift) != last) {
                runs.push((same[0].origin, shift));
            }
        }
        Self { runs }
    }

    /// Returns by how much the byte at a place is moved, as far as it is known, and where the next stretch begins.
    pub(super) fn at(&self, origin: u64) -> (i64, u64) {
        let next = self.runs.partition_point(|(start, _)| *start <= origin);
        let before = next.checked_sub(1).map(|before| self.runs[before].1);
        let end = self.runs.get(next).map_or(u64::MAX, |(start, _)| *start);
        // What stands before all that is known is moved as the first of that.
        let first = self.runs.first().map_or(0, |(_, shift)| *shift);
        (before.unwrap_or(first), end)
    }

    /// Returns by how much the bytes about a place may be moved, the likeliest first.
    pub(super) fn about(&self, origin: u64) -> Vec<i64> {
        let next = self.runs.partition_point(|(start, _)| *start <= origin);
        let places = [next.checked_sub(1), Some(next), next.checked_sub(2), Some(next + 1)];
        let near = places.into_iter().flatten().filter_map(|place| self.runs.get(place));
        let mut shifts = Vec::with_capacity(places.len() + 1);
        for shift in near.map(|(_, shift)| *shift).chain([0]) {
            if !shifts.contains(&shift) {
                shifts.push(shift);
            }
        }
        shifts
    }

    /// Returns by how much the end of the archive is moved.
    pub(super) fn last(&self) -> i64 {
        self.runs.last().map_or(0, |(_, shift)| *shift)
    }

    /// Returns whether nothing is moved.
    pub(super) fn are_none(&self) -> bool {
        self.runs.iter().all(|(_, shift)| *shift == 0)
    }

    /// Adds a stretch behind all others.
    pub(super) fn push(&mut self, origin: u64, shift: i64) {
        self.runs.retain(|(start, _)| *start < origin);
        self.runs.push((origin, shift));
    }
}

fn shift_of(anchor: &Anchor) -> Option<i64> {
    anchor.at.checked_signed_diff(anchor.origin)
}

/// Returns a place moved by so many bytes; none if nothing can stand there.
pub(super) fn moved(origin: u64, shift: i64) -> Option<u64> {
    origin.checked_add_signed(shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shifts(anchors: &[(u64, u64)]) -> Shifts {
        Shifts::new(
            anchors
                .iter()
                .map(|(origin, at)| Anchor {
                    origin: *origin,
                    at: *at,
                })
                .collect(),
        )
    }

    #[test]
    fn stretches_follow_from_what_is_known() {
        // 10 bytes are missing before 100, and 25 stand twice before 500; what stands at 600 does so, too.
        let shifts = shifts(&[
            (0, 0),
            (50, 50),
            (100, 90),
            (200, 190),
            (500, 515),
            (600, 590),
            (600, 615),
            (700, 715),
        ]);
        assert_eq!(shifts.at(0), (0, 100));
        assert_eq!(shifts.at(99), (0, 100));
        assert_eq!(shifts.at(100), (-10, 500));
        assert_eq!(shifts.at(650), (15, u64::MAX));
        assert_eq!(shifts.about(99), [0, -10, 15]);
        assert_eq!(shifts.about(300), [-10, 15, 0]);
        assert_eq!(shifts.last(), 15);
        assert_eq!(moved(5, -6), None);
    }

    #[test]
    fn where_nothing_is_known_nothing_is_moved() {
        let none = shifts(&[]);
        assert!(none.are_none());
        assert_eq!((none.at(7), none.about(7), none.last()), ((0, u64::MAX), vec![0], 0));
        assert_eq!(shifts(&[(10, 5)]).at(0), (-5, 10));
    }
}
