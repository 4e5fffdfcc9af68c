//! Reads both sides of every comparison ahead of it: the kernel compares page by page and waits for each.

use std::sync::mpsc;

use super::Call;
use crate::error::Result;
use crate::fs::{Sharing, SourceFile};

/// Bytes of images in a window. One is worked on while the next is being read.
const WINDOW_BYTES: u64 = 32 << 20;
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
            for call in window {
                if !work(call)? {
                    return Ok(());
                }
            }
        }
        Ok(())
    })
}

/// Asks for both sides of each call, joining what lies next to each other.
fn read_ahead(fs: &dyn Sharing, window: &[Call]) {
    let mut pending: Option<(SourceFile, u64, u64)> = None;
    let sources = window.iter().map(|call| (call.source, call.source_offset, call.length));
    let images = window.iter().map(|call| (SourceFile::Image(call.image), call.offset, call.length));
    for (file, offset, length) in images.chain(sources) {
        if matches!(file, SourceFile::Hole { .. }) {
            continue;
        }
        match &mut pending {
            Some((same, start, so_far)) if *same == file && *start + *so_far == offset => *so_far += length,
            _ => {
                if let Some((file, offset, length)) = pending.replace((file, offset, length)) {
                    fs.read_ahead(file, offset, length);
                }
            }
        }
    }
    if let Some((file, offset, length)) = pending {
        fs.read_ahead(file, offset, length);
    }
}
