//! Which parts of extents are compressed to see what the whole would become.

use std::ops::Range;

use super::layout::{COMPRESSED_BLOCKS_MAX, Layout};
use crate::facts::Facts;
use crate::numbers::{ExtentId, Slot};

/// One in so many windows of an extent is compressed, and two at least.
const ONE_IN: usize = 8;

/// The parts of an extent that are compressed on trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The extent.
    pub extent: ExtentId,
    /// Windows of at most [`COMPRESSED_BLOCKS_MAX`] blocks, as btrfs compresses them; each with its slots in order.
    pub windows: Vec<Vec<Range<Slot>>>,
}

/// Samples of what a layout leaves of extents, cut as donors that begin with them would be: what was written as a frame of its own, and
/// was not worth compressing, is tried as that very frame again.
pub fn samples(
    facts: &Facts,
    layout: &Layout,
    extents: impl Iterator<Item = ExtentId>,
) -> impl Iterator<Item = Sample> {
    extents.filter_map(move |extent| {
        let mut windows = cut(layout.rest_of(facts, extent));
        let tried = windows.len().div_ceil(ONE_IN).max(2);
        if windows.len() > tried {
            let step = windows.len();
            windows = (0..tried)
                .map(|n| std::mem::take(&mut windows[(2 * n + 1) * step / (2 * tried)]))
                .collect();
        }
        (!windows.is_empty()).then_some(Sample { extent, windows })
    })
}

/// Cuts ranges of slots into windows.
fn cut(pieces: Vec<Range<Slot>>) -> Vec<Vec<Range<Slot>>> {
    let (mut windows, mut blocks_left) = (Vec::new(), 0);
    for mut piece in pieces {
        while !piece.is_empty() {
            if blocks_left == 0 {
                windows.push(Vec::new());
                blocks_left = COMPRESSED_BLOCKS_MAX;
            }
            let end = piece.end.min(piece.start + blocks_left);
            blocks_left -= end - piece.start;
            if let Some(window) = windows.last_mut() {
                window.push(piece.start..end);
            }
            piece.start = end;
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::range;

    #[test]
    fn windows_are_full_but_the_last() {
        let lengths = |windows: Vec<Vec<Range<Slot>>>| -> Vec<Vec<u32>> {
            let lengths = |window: &Vec<Range<Slot>>| window.iter().map(range::length).collect();
            windows.iter().map(lengths).collect()
        };
        assert_eq!(
            lengths(cut([0..10, 20..60].map(Slot::range).to_vec())),
            [vec![10, 22], vec![18]]
        );
        assert!(cut(vec![]).is_empty());
    }
}
