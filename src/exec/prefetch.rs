//! Reads both sides of every comparison ahead of it, since the kernel compares page by page and waits for each; and drops them
//! from memory behind it, so that a run takes no more of the page cache than a few windows.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc::sync_channel;

use super::Call;
use crate::error::Result;
use crate::fs::{Filesystem, SourceFile};

/// Bytes of images in a window. One is worked on while the next is being read and the last is dropped.
const WINDOW_BYTES: u64 = 16 << 20;
/// Calls in a window, where they are short.
const WINDOW_CALLS: usize = 4096;
/// Bytes of sources that stay in memory after they were compared: the next revision of an image is compared with the same.
const BEHIND_BYTES: u64 = 256 << 20;

type Range = (SourceFile, u64, u64);

/// Calls `work` with each call in order, each read ahead by a window, until it says false.
pub(super) fn ahead(
    fs: &dyn Filesystem,
    mut calls: impl Iterator<Item = Call> + Send,
    mut work: impl FnMut(Call) -> Result<bool>,
) -> Result<()> {
    std::thread::scope(|scope| {
        // Both channels hold nothing: each side waits for the other, so no more than a window is ever ahead or behind.
        let (read, windows) = sync_channel::<Vec<Call>>(0);
        let (finished, to_drop) = sync_channel::<Vec<Call>>(0);
        scope.spawn(move || {
            loop {
                let window = next_window(&mut calls);
                read_ahead(fs, &window);
                if window.is_empty() || read.send(window).is_err() {
                    return;
                }
            }
        });
        scope.spawn(move || {
            let mut behind = Behind::default();
            for window in to_drop {
                behind.done(fs, &window);
            }
        });
        for window in windows {
            for call in &window {
                if !work(*call)? {
                    return Ok(());
                }
            }
            // Only the thread above could have gone, and it ends after this.
            let _ = finished.send(window);
        }
        Ok(())
    })
}

fn next_window(calls: &mut impl Iterator<Item = Call>) -> Vec<Call> {
    let (mut window, mut bytes) = (Vec::new(), 0);
    while bytes < WINDOW_BYTES && window.len() < WINDOW_CALLS {
        let Some(call) = calls.next() else { break };
        bytes += call.length;
        window.push(call);
    }
    window
}

/// Asks for both sides of each call.
fn read_ahead(fs: &dyn Filesystem, window: &[Call]) {
    let images = window.iter().map(image_range);
    for (file, offset, length) in joined(images).chain(sources(window)) {
        fs.read_ahead(file, offset, length);
    }
}

/// What was compared lately and is still in memory.
#[derive(Default)]
struct Behind {
    sources: VecDeque<Range>,
    bytes: u64,
}

impl Behind {
    fn done(&mut self, fs: &dyn Filesystem, window: &[Call]) {
        for (file, offset, length) in joined(window.iter().map(image_range)) {
            fs.drop_behind(file, offset, length);
        }
        for range in sources(window) {
            self.bytes += range.2;
            self.sources.push_back(range);
        }
        while self.bytes > BEHIND_BYTES {
            let Some((file, offset, length)) = self.sources.pop_front() else {
                break;
            };
            fs.drop_behind(file, offset, length);
            self.bytes -= length;
        }
    }
}

fn image_range(call: &Call) -> Range {
    (SourceFile::Image(call.image), call.offset, call.length)
}

/// The sources of a window, each once, however many images share them. Holes have nothing to read.
fn sources(window: &[Call]) -> impl Iterator<Item = Range> {
    let mut seen = HashSet::new();
    let ranges = window.iter().map(|call| (call.source, call.source_offset, call.length));
    joined(ranges.filter(move |range| !matches!(range.0, SourceFile::Hole { .. }) && seen.insert(*range)))
}

/// Joins ranges of files that lie next to each other.
fn joined(ranges: impl Iterator<Item = Range>) -> impl Iterator<Item = Range> {
    let mut ranges = ranges.peekable();
    std::iter::from_fn(move || {
        let (file, offset, mut length) = ranges.next()?;
        while let Some((_, _, more)) = ranges.next_if(|next| next.0 == file && next.1 == offset + length) {
            length += more;
        }
        Some((file, offset, length))
    })
}
