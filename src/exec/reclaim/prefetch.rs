//! Reads both sides of every comparison ahead. The kernel compares page by page, and waits for each page that is not in memory. Where memory
//! is short, pages are dropped after the comparison, so that a run takes no more of the page cache than a few windows.

use std::collections::{HashSet, VecDeque};
use std::sync::mpsc::sync_channel;

use super::ShareCall;
use crate::error::Result;
use crate::fs::{FileRange, Filesystem, SourceFile};
use crate::sys::memory::{Memory, limits};

/// Bytes of images in a window. One window is worked on, while the next one is read and the one before is dropped.
const WINDOW_BYTES: u64 = 16 << 20;
/// Bytes of images in a window if calls are made on several threads and memory is not short. Several calls of the greatest length fit in.
const WIDE_WINDOW_BYTES: u64 = 64 << 20;
/// Calls in a window at most.
const WINDOW_CALLS_MAX: usize = 4096;
/// Bytes of sources that stay in memory after a comparison, because the next revision of an image is compared with the same source.
const BEHIND_BYTES: u64 = 256 << 20;
/// Bytes of available memory from which on pages may stay. That is more than the dom0 of Qubes OS has in all, which is 1 to 4 GB, and several
/// times what a run reads ahead.
const PLENTY_BYTES: u64 = 4 << 30;
/// One part in so many of all memory must be available, too. Where others use most of it, pages that are read once could make the kernel swap
/// out machines.
const PLENTY_PART: u64 = 4;

/// Calls that are read ahead, made and dropped together.
struct Window {
    calls: Vec<ShareCall>,
    /// Whether memory was short when the window was made.
    memory_is_short: bool,
}

/// Calls `work` with all calls in order, window by window, until it returns false. Each window is read ahead while `work` has the one before.
///
/// # Errors
/// Those of `work`.
pub(super) fn ahead(
    fs: &dyn Filesystem,
    threads: usize,
    mut calls: impl Iterator<Item = ShareCall> + Send,
    mut work: impl FnMut(&[ShareCall]) -> Result<bool>,
) -> Result<()> {
    std::thread::scope(|scope| {
        // Both channels have no room: each side waits for the other, so no more than one window is ahead and one behind.
        let (read, windows) = sync_channel::<Window>(0);
        let (finished, to_drop) = sync_channel::<Window>(0);
        scope.spawn(move || {
            loop {
                let window = next_window(&mut calls, threads);
                read_ahead(fs, &window.calls);
                if window.calls.is_empty() || read.send(window).is_err() {
                    return;
                }
            }
        });
        scope.spawn(move || {
            let mut behind = Behind::default();
            for window in to_drop {
                for range in behind.done(&window) {
                    fs.drop_behind(range.file, range.offset, range.length);
                }
            }
        });
        for window in windows {
            if !work(&window.calls)? {
                return Ok(());
            }
            // This fails only if the thread that drops pages is gone, which ends with this channel.
            let _ = finished.send(window);
        }
        Ok(())
    })
}

/// Takes the calls of the next window.
fn next_window(calls: &mut impl Iterator<Item = ShareCall>, threads: usize) -> Window {
    let memory_is_short = is_short(&limits());
    let bytes_max = if threads > 1 && !memory_is_short {
        WIDE_WINDOW_BYTES
    } else {
        WINDOW_BYTES
    };
    let (mut window, mut bytes) = (Vec::new(), 0);
    while bytes < bytes_max && window.len() < WINDOW_CALLS_MAX {
        let Some(call) = calls.next() else { break };
        bytes += call.length;
        window.push(call);
    }
    Window {
        calls: window,
        memory_is_short,
    }
}

/// Asks the filesystem to read both sides of each call into the page cache.
fn read_ahead(fs: &dyn Filesystem, window: &[ShareCall]) {
    let images = window.iter().map(image_range);
    for range in joined(images).chain(sources(window)) {
        fs.read_ahead(range.file, range.offset, range.length);
    }
}

/// The sources that were compared last and are still in memory.
#[derive(Default)]
struct Behind {
    sources: VecDeque<FileRange>,
    /// Their length in total.
    bytes: u64,
}

impl Behind {
    /// The ranges that are dropped from memory once a window was worked on. There are none unless memory is short.
    ///
    /// Pages that stay belong to the page cache and not to this process. They are clean, and most were read once, so the kernel evicts them
    /// before others when it needs memory. Leaving them saves the time that dropping takes.
    fn done(&mut self, window: &Window) -> Vec<FileRange> {
        let mut dropped: Vec<FileRange> = joined(window.calls.iter().map(image_range)).collect();
        for range in sources(&window.calls) {
            self.bytes += range.length;
            self.sources.push_back(range);
        }
        while self.bytes > BEHIND_BYTES {
            let Some(range) = self.sources.pop_front() else {
                break;
            };
            self.bytes -= range.length;
            dropped.push(range);
        }
        if window.memory_is_short { dropped } else { Vec::new() }
    }
}

/// Whether any limit of memory leaves so little that pages must not stay. Without any known limit, memory counts as short.
fn is_short(limits: &[Memory]) -> bool {
    let leaves_little = |limit: &Memory| limit.available_bytes < PLENTY_BYTES.max(limit.total_bytes / PLENTY_PART);
    limits.is_empty() || limits.iter().any(leaves_little)
}

/// The range of the image that a call changes.
fn image_range(call: &ShareCall) -> FileRange {
    FileRange {
        file: SourceFile::Image(call.image),
        offset: call.offset,
        length: call.length,
    }
}

/// The source ranges of a window, each once, however many images share it. Holes are left out, because nothing of them is read.
fn sources(window: &[ShareCall]) -> impl Iterator<Item = FileRange> {
    let mut seen = HashSet::new();
    let ranges = window.iter().map(|call| FileRange {
        file: call.source,
        offset: call.source_offset,
        length: call.length,
    });
    joined(ranges.filter(move |range| !matches!(range.file, SourceFile::Hole { .. }) && seen.insert(*range)))
}

/// Joins ranges of files that lie next to each other.
fn joined(ranges: impl Iterator<Item = FileRange>) -> impl Iterator<Item = FileRange> {
    let mut ranges = ranges.peekable();
    std::iter::from_fn(move || {
        let mut range = ranges.next()?;
        while let Some(next) =
            ranges.next_if(|next| next.file == range.file && next.offset == range.offset + range.length)
        {
            range.length += next.length;
        }
        Some(range)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::numbers::{DonorId, ImageId};

    fn call(source: u32, source_offset: u64, offset: u64, length: u64) -> ShareCall {
        ShareCall {
            source: SourceFile::Donor(DonorId(source)),
            source_offset,
            image: ImageId(7),
            offset,
            length,
        }
    }

    #[test]
    fn memory_is_short_on_small_hosts_and_where_others_use_most_of_it() {
        const GIB: u64 = 1 << 30;
        let is_short = |total: u64, available: u64| {
            is_short(&[Memory {
                total_bytes: total,
                available_bytes: available,
            }])
        };
        for total in [GIB, 2 * GIB, 4 * GIB - 1] {
            assert!(is_short(total, total), "a dom0 with {total} bytes");
        }
        assert!(is_short(16 * GIB, 4 * GIB - 1) && !is_short(16 * GIB, 4 * GIB));
        assert!(is_short(64 * GIB, 16 * GIB - 1) && !is_short(64 * GIB, 16 * GIB));
    }

    #[test]
    fn memory_is_short_where_any_limit_is_or_none_is_known() {
        let [plenty, little] = [8, 1].map(|gib| Memory {
            total_bytes: 8 << 30,
            available_bytes: gib << 30,
        });
        assert!(is_short(&[]));
        assert!(!is_short(&[plenty, plenty]));
        assert!(is_short(&[plenty, little]) && is_short(&[little, plenty]));
    }

    #[test]
    fn pages_are_dropped_only_where_memory_is_short() {
        const MIB: u64 = 1 << 20;
        let calls = [call(0, 0, 0, MIB), call(0, MIB, MIB, MIB), call(1, 0, 4 * MIB, MIB)];
        let window = |calls: &[ShareCall], memory_is_short| Window {
            calls: calls.into(),
            memory_is_short,
        };
        let range = |file, offset, length| FileRange { file, offset, length };
        let images = [
            range(SourceFile::Image(ImageId(7)), 0, 2 * MIB),
            range(SourceFile::Image(ImageId(7)), 4 * MIB, MIB),
        ];
        let mut behind = Behind::default();
        assert_eq!(behind.done(&window(&calls, true)), images, "sources stay for a while");
        assert_eq!(behind.done(&window(&calls, false)), []);
        // Ranges that stayed while memory was not short are left to the kernel.
        let large = [call(2, 0, 0, BEHIND_BYTES)];
        assert_eq!(behind.done(&window(&large, false)), []);
        assert_eq!((behind.bytes, behind.sources.len()), (BEHIND_BYTES, 1));
        let dropped = behind.done(&window(&calls, true));
        assert_eq!(dropped[2..], [range(SourceFile::Donor(DonorId(2)), 0, BEHIND_BYTES)]);
    }
}
