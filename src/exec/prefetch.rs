//! Reads both sides of every comparison ahead of it: the kernel compares page by page and waits for each.

use std::collections::VecDeque;
use std::sync::mpsc;

use super::Call;
use crate::error::Result;
use crate::fs::{Sharing, SourceFile};

/// Bytes of images in a window. One is worked on while the next is being read.
const WINDOW_BYTES: u64 = 32 << 20;
/// Bytes of sources that stay in memory after they were compared.
const BEHIND_BYTES: u64 = 256 << 20;
/// Calls in a window, where they are short.
const WINDOW_CALLS: usize = 4096;

/// Calls `work` with each call in order, each read ahead by a window, until it says false.
pub(super) fn ahead(
    fs: &dyn Sharing,
    mut calls: impl Iterator<Item = Call>,
    mut work: impl FnMut(Call) -> Result<bool>,
) -> Result<()> {
    std::thread::scope(|scope| {
        // A window waits in the channel while one is being worked on: so much is read ahead, and no more.
        let (windows, ready) = mpsc::sync_channel::<Vec<Call>>(0);
        let (requests, to_read) = mpsc::sync_channel::<Vec<Call>>(0);
        scope.spawn(move || {
            for window in to_read {
                read_ahead(fs, &window);
                if windows.send(window).is_err() {
                    return;
                }
            }
        });
        let mut next_window = || {
            let (mut window, mut bytes) = (Vec::new(), 0);
            while bytes < WINDOW_BYTES && window.len() < WINDOW_CALLS {
                let Some(call) = calls.next() else { break };
                bytes += call.length;
                window.push(call);
            }
            window
        };
        let mut behind = Behind::default();
        let mut outstanding = 0;
        let first = next_window();
        if !first.is_empty() && requests.send(first).is_ok() {
            outstanding += 1;
        }
        while outstanding > 0 {
            let Ok(window) = ready.recv() else { break };
            outstanding -= 1;
            let next = next_window();
            if !next.is_empty() && requests.send(next).is_ok() {
                outstanding += 1;
            }
            for call in &window {
                if !work(*call)? {
                    return Ok(());
                }
            }
            behind.done(fs, &window);
        }
        Ok(())
    })
}

/// Drops what was compared from memory, so that a run takes no more of it than a few windows. Sources stay for a while: the
/// next revision of an image is compared with the same ones.
#[derive(Default)]
struct Behind {
    ranges: VecDeque<(SourceFile, u64, u64)>,
    bytes: u64,
}

impl Behind {
    fn done(&mut self, fs: &dyn Sharing, window: &[Call]) {
        for (file, offset, length) in joined(window.iter().map(|call| (SourceFile::Image(call.image), call.offset, call.length))) {
            fs.drop_behind(file, offset, length);
        }
        for call in window.iter().filter(|call| !matches!(call.source, SourceFile::Hole { .. })) {
            self.ranges.push_back((call.source, call.source_offset, call.length));
            self.bytes += call.length;
        }
        while self.bytes > BEHIND_BYTES {
            let Some((file, offset, length)) = self.ranges.pop_front() else { break };
            fs.drop_behind(file, offset, length);
            self.bytes -= length;
        }
    }
}

/// Asks for both sides of each call.
fn read_ahead(fs: &dyn Sharing, window: &[Call]) {
    let sources = window.iter().map(|call| (call.source, call.source_offset, call.length));
    let images = window.iter().map(|call| (SourceFile::Image(call.image), call.offset, call.length));
    for (file, offset, length) in joined(images.chain(sources)) {
        fs.read_ahead(file, offset, length);
    }
}

/// Joins ranges of files that lie next to each other; holes have nothing to read.
fn joined(ranges: impl Iterator<Item = (SourceFile, u64, u64)>) -> impl Iterator<Item = (SourceFile, u64, u64)> {
    let mut ranges = ranges.filter(|(file, ..)| !matches!(file, SourceFile::Hole { .. })).peekable();
    std::iter::from_fn(move || {
        let (file, offset, mut length) = ranges.next()?;
        while let Some((_, _, more)) = ranges.next_if(|next| next.0 == file && next.1 == offset + length) {
            length += more;
        }
        Some((file, offset, length))
    })
}
