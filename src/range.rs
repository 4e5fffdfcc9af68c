//! Arithmetic of half-open ranges of numbers: blocks of a store, slots of extents. A *list* is ascending, and its ranges are not empty and
//! do not overlap. Nothing here does I/O.

use std::ops::Range;

use crate::numbers::Number;

/// Appends a range to a list that ends at or before its start. It is merged with a last range that it touches.
pub fn push<N: Number>(list: &mut Vec<Range<N>>, range: Range<N>) {
    match list.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ if range.is_empty() => {}
        _ => list.push(range),
    }
}

/// Returns the list of all numbers in some ranges, which may overlap and have any order. Ranges that touch are merged.
pub fn joined<N: Number>(ranges: impl IntoIterator<Item = Range<N>>) -> Vec<Range<N>> {
    let mut ranges: Vec<Range<N>> = ranges.into_iter().filter(|range| !range.is_empty()).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut list: Vec<Range<N>> = Vec::new();
    for range in ranges {
        match list.last_mut() {
            Some(last) if last.end >= range.start => last.end = last.end.max(range.end),
            _ => list.push(range),
        }
    }
    list
}

/// Returns the list of the numbers that are marked true. The numbers must be ascending.
pub fn where_true<N: Number>(numbers: impl IntoIterator<Item = (N, bool)>) -> Vec<Range<N>> {
    let mut list = Vec::new();
    for (number, is_true) in numbers {
        if is_true {
            push(&mut list, number..N::of(number.bare() + 1));
        }
    }
    list
}

/// Returns how many numbers a list holds.
pub fn count<N: Number>(list: &[Range<N>]) -> u64 {
    list.iter()
        .map(|range| u64::from(range.end.bare() - range.start.bare()))
        .sum()
}

/// Returns how many numbers a range holds.
pub fn length<N: Number>(range: &Range<N>) -> u32 {
    range.end.bare().saturating_sub(range.start.bare())
}

/// Returns the numbers of a range, in ascending order.
pub fn each<N: Number>(range: Range<N>) -> impl ExactSizeIterator<Item = N> + DoubleEndedIterator + Clone {
    (range.start.bare()..range.end.bare()).map(N::of)
}

/// Returns the numbers from `first` on, in ascending order.
pub fn from<N: Number>(first: N) -> impl Iterator<Item = N> + Clone {
    (first.bare()..).map(N::of)
}

/// Whether a list holds a number.
pub fn contains<N: Number>(list: &[Range<N>], number: N) -> bool {
    let at = list.partition_point(|range| range.end <= number);
    list.get(at).is_some_and(|range| range.start <= number)
}

/// Returns the parts of a list that lie within a range.
pub fn overlap<N: Number>(list: &[Range<N>], within: Range<N>) -> Vec<Range<N>> {
    let from = list.partition_point(|range| range.end <= within.start);
    list[from..]
        .iter()
        .take_while(|range| range.start < within.end)
        .map(|range| range.start.max(within.start)..range.end.min(within.end))
        .collect()
}

/// Returns the list of the numbers that are in `list` and not in `other`.
pub fn without<N: Number>(list: &[Range<N>], other: &[Range<N>]) -> Vec<Range<N>> {
    let mut left = Vec::new();
    let mut others = other.iter().peekable();
    for range in list {
        let mut at = range.start;
        while at < range.end {
            while others.next_if(|other| other.end <= at).is_some() {}
            let (end, next) = match others.peek() {
                Some(other) if other.start <= at => (at, other.end),
                Some(other) => (other.start.min(range.end), other.start.min(range.end)),
                None => (range.end, range.end),
            };
            if at < end {
                left.push(at..end);
            }
            at = next.max(end);
        }
    }
    left
}

/// Cuts a range into parts of at most `most` numbers, which must not be 0.
pub fn parts<N: Number>(range: Range<N>, most: u32) -> impl Iterator<Item = Range<N>> {
    let end = range.end.bare();
    (range.start.bare()..end)
        .step_by(most as usize)
        .map(move |start| N::of(start)..N::of(end.min(start.saturating_add(most))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn any_ranges() -> impl Strategy<Value = Vec<Range<u32>>> {
        prop::collection::vec((0u32..90, 0u32..9), 0..12).prop_map(|ranges| {
            ranges
                .into_iter()
                .map(|(start, length)| start..start + length)
                .collect()
        })
    }

    fn set(ranges: &[Range<u32>]) -> BTreeSet<u32> {
        ranges.iter().cloned().flatten().collect()
    }

    fn check(list: &[Range<u32>]) {
        assert!(list.iter().all(|range| !range.is_empty()), "{list:?}");
        assert!(list.windows(2).all(|pair| pair[0].end <= pair[1].start), "{list:?}");
    }

    proptest! {
        #[test]
        fn lists_hold_what_sets_hold(ranges in any_ranges(), others in any_ranges(), number in 0u32..99) {
            let (list, other) = (joined(ranges.clone()), joined(others.clone()));
            let (numbers, other_numbers) = (set(&ranges), set(&others));
            prop_assert_eq!(set(&list), numbers.clone());
            prop_assert_eq!(count(&list), numbers.len() as u64);
            prop_assert_eq!(contains(&list, number), numbers.contains(&number));
            let left = without(&list, &other);
            prop_assert_eq!(set(&left), numbers.difference(&other_numbers).copied().collect::<BTreeSet<_>>());
            let within = number..number + 7;
            let inside = overlap(&list, within.clone());
            prop_assert_eq!(set(&inside), numbers.iter().copied().filter(|n| within.contains(n)).collect::<BTreeSet<_>>());
            let found = where_true((0..99).map(|n| (n, numbers.contains(&n))));
            prop_assert_eq!(&found, &list);
            let cut: Vec<_> = list.iter().cloned().flat_map(|range| parts(range, 3)).collect();
            prop_assert_eq!(set(&cut), numbers);
            prop_assert!(cut.iter().all(|part| part.len() <= 3));
            for list in [&list, &left, &inside, &found, &cut] {
                check(list);
            }
        }
    }
}
