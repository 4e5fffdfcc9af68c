//! Fills images from the staging file, sharing its extents where the filesystem can.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{IFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::block::bytes;
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::range;
use crate::sys::clone::clone_range;
use crate::sys::inode_flags::{add_inode_flags, inode_flags};

/// Bytes copied at a time where extents cannot be shared.
const COPY_BYTES: u64 = 1 << 20;

/// What filling images took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillCounts {
    /// Ranges that share extents.
    pub clones: u64,
    /// Bytes that share extents.
    pub cloned_bytes: u64,
    /// Bytes that had to be copied.
    pub copied_bytes: u64,
}

impl std::ops::AddAssign for FillCounts {
    fn add_assign(&mut self, more: Self) {
        self.clones += more.clones;
        self.cloned_bytes += more.cloned_bytes;
        self.copied_bytes += more.copied_bytes;
    }
}

/// Fills an empty file with what runs say. Blocks of the store that are lost, a list of ranges, stay holes.
///
/// # Errors
/// [`Error::NoSpace`] among others.
pub fn fill(
    (staging, staging_path): (&File, &Path),
    (image, path): (&File, &Path),
    (runs, size): (&[Run], u64),
    lost: &[Range<StoreBlock>],
    shares: bool,
    monitor: &dyn Monitor,
) -> Result<FillCounts> {
    let failed = Error::writing("write to", path);
    let mut counts = FillCounts::default();
    let mut at = 0u64;
    let mut buffer = Vec::new();
    image.set_len(size).map_err(&failed)?;
    for run in runs {
        let length = bytes(run.blocks);
        if let Content::Stored(first) = run.content {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let all = first..first + run.blocks;
            for part in range::without(std::slice::from_ref(&all), &range::overlap(lost, all.clone())) {
                let (from, to, length) = (
                    bytes(part.start.0),
                    at + bytes(part.start - first),
                    bytes(part.end - part.start),
                );
                if shares {
                    match clone_range(staging, from, image, to, length) {
                        Ok(()) => {
                            counts.clones += 1;
                            counts.cloned_bytes += length;
                            monitor.advance(length);
                            continue;
                        }
                        // One range that cannot be shared, for a limit or a mark of a file, can still be copied.
                        Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::XDEV | Errno::MLINK) => {}
                        Err(errno) => return Err(failed(errno.into())),
                    }
                }
                let mut done = 0;
                while done < length {
                    let piece = COPY_BYTES.min(length - done);
                    buffer.resize(usize::try_from(piece).unwrap_or(usize::MAX), 0);
                    staging.read_exact_at(&mut buffer, from + done).map_err(Error::io_at(
                        "read",
                        staging_path,
                        from + done,
                        piece,
                    ))?;
                    image.write_all_at(&buffer, to + done).map_err(&failed)?;
                    done += piece;
                    monitor.advance(piece);
                }
                counts.copied_bytes += length;
            }
        }
        at += length;
    }
    // The last block of an image may be a partial one.
    if image.metadata().map_err(&failed)?.len() != size {
        image.set_len(size).map_err(&failed)?;
    }
    Ok(counts)
}

/// A copy of ranges of the staging file without copy on write, for images that have none: the filesystem lets those share blocks with no
/// others. It has no name, and is gone with its descriptor. None where there can be none, or the staging file is of that kind.
///
/// # Errors
/// [`Error::NoSpace`] among others.
pub fn without_checksums(
    (staging, path): (&File, &Path),
    folder: &File,
    ranges: Vec<Range<StoreBlock>>,
    monitor: &dyn Monitor,
) -> Result<Option<File>> {
    let is_alike = inode_flags(staging).is_ok_and(|flags| flags.contains(IFlags::NOCOW));
    let Some(copy) = unnamed(folder).ok().filter(|_| !is_alike) else {
        return Ok(None);
    };
    if add_inode_flags(&copy, IFlags::NOCOW).is_err() {
        return Ok(None);
    }
    let failed = Error::writing("write to", path);
    let length = staging.metadata().map_err(Error::io("look at", path))?.len();
    copy.set_len(length).map_err(&failed)?;
    let mut buffer = Vec::new();
    for range in ranges {
        let (mut at, end) = (bytes(range.start.0), bytes(range.end.0));
        while at < end {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let piece = COPY_BYTES.min(end - at);
            buffer.resize(usize::try_from(piece).unwrap_or(usize::MAX), 0);
            let read = staging.read_exact_at(&mut buffer, at);
            read.map_err(Error::io_at("read", path, at, piece))?;
            copy.write_all_at(&buffer, at).map_err(&failed)?;
            at += piece;
        }
    }
    Ok(Some(copy))
}

/// A new file without a name, on the filesystem of a folder.
fn unnamed(folder: &File) -> rustix::io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(folder, ".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

/// Whether files in a folder can share extents: tried out on two that have no name.
pub fn can_share(folder: &File) -> bool {
    let make = || unnamed(folder);
    let tried = || -> std::io::Result<()> {
        let (one, other) = (make()?, make()?);
        one.write_all_at(&[1; 4096], 0)?;
        clone_range(&one, 0, &other, 0, 4096)?;
        Ok(())
    };
    tried().is_ok()
}
