//! Fills images from the staging file. They share its extents if the filesystem can do that, and get copies otherwise.

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

/// Bytes that are copied at a time if extents cannot be shared.
const COPY_BYTES: u64 = 1 << 20;

/// The counts of filling images.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillCounts {
    /// Ranges that share extents.
    pub clones: u64,
    /// Bytes of these ranges.
    pub cloned_bytes: u64,
    /// Bytes that were copied.
    pub copied_bytes: u64,
}

impl std::ops::AddAssign for FillCounts {
    fn add_assign(&mut self, more: Self) {
        self.clones += more.clones;
        self.cloned_bytes += more.cloned_bytes;
        self.copied_bytes += more.copied_bytes;
    }
}

/// Fills an empty file with the content of runs, up to `size` bytes. Blocks of the store in the ranges `lost` stay holes.
///
/// # Errors
/// [`Error::NoSpace`] or [`Error::Io`] if the image cannot be written; [`Error::Io`] if the staging file cannot be read;
/// [`Error::Interrupted`].
pub fn fill(
    (staging, staging_path): (&File, &Path),
    (image, path): (&File, &Path),
    (runs, size): (&[Run], u64),
    lost: &[Range<StoreBlock>],
    shares: bool,
    monitor: &dyn Monitor,
) -> Result<FillCounts> {
    let failed = Error::writing("write to", path);
    let mut filler = Filler {
        staging,
        staging_path,
        image,
        path,
        shares,
        buffer: Vec::new(),
        counts: FillCounts::default(),
        monitor,
    };
    let mut at = 0u64;
    image.set_len(size).map_err(&failed)?;
    for run in runs {
        if let Content::Stored(first) = run.content {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let blocks = first..first + run.blocks;
            for part in range::without(std::slice::from_ref(&blocks), &range::overlap(lost, blocks.clone())) {
                filler.put(
                    bytes(part.start.0),
                    at + bytes(part.start - first),
                    bytes(part.end - part.start),
                )?;
            }
        }
        at += bytes(run.blocks);
    }
    // The last run may go beyond the end of an image whose size is not a multiple of a block.
    if image.metadata().map_err(&failed)?.len() != size {
        image.set_len(size).map_err(&failed)?;
    }
    Ok(filler.counts)
}

/// Puts ranges of the staging file into an image.
struct Filler<'a> {
    staging: &'a File,
    staging_path: &'a Path,
    image: &'a File,
    path: &'a Path,
    /// Whether the filesystem can share extents.
    shares: bool,
    buffer: Vec<u8>,
    counts: FillCounts,
    monitor: &'a dyn Monitor,
}

impl Filler<'_> {
    /// Shares a range of the staging file with the image. Copies it if it cannot be shared.
    fn put(&mut self, from: u64, to: u64, length: u64) -> Result<()> {
        if !self.shares {
            return self.copy(from, to, length);
        }
        match clone_range(self.staging, from, self.image, to, length) {
            Ok(()) => {
                self.counts.clones += 1;
                self.counts.cloned_bytes += length;
                self.monitor.advance(length);
                Ok(())
            }
            // A limit of the filesystem, or an attribute of the file, keeps this range from being shared.
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::XDEV | Errno::MLINK) => self.copy(from, to, length),
            Err(errno) => Err(Error::writing("write to", self.path)(errno)),
        }
    }

    fn copy(&mut self, from: u64, to: u64, length: u64) -> Result<()> {
        let failed = Error::writing("write to", self.path);
        let mut done = 0;
        while done < length {
            let piece = COPY_BYTES.min(length - done);
            self.buffer.resize(usize::try_from(piece).unwrap_or(usize::MAX), 0);
            let read = self.staging.read_exact_at(&mut self.buffer, from + done);
            read.map_err(Error::io_at("read", self.staging_path, from + done, piece))?;
            self.image.write_all_at(&self.buffer, to + done).map_err(&failed)?;
            done += piece;
            self.monitor.advance(piece);
        }
        self.counts.copied_bytes += length;
        Ok(())
    }
}

/// Copies ranges of the staging file to a file without checksums (`nodatacow`), for images that have none: the filesystem lets such files
/// share only with each other. The copy has no name, and is gone once it is closed. It returns `None` if there can be no such file, or the
/// staging file is one itself.
///
/// # Errors
/// [`Error::NoSpace`] or [`Error::Io`] if the copy cannot be written; [`Error::Io`] if the staging file cannot be read;
/// [`Error::Interrupted`].
pub fn without_checksums(
    (staging, path): (&File, &Path),
    folder: &File,
    ranges: Vec<Range<StoreBlock>>,
    monitor: &dyn Monitor,
) -> Result<Option<File>> {
    let is_nodatacow = inode_flags(staging).is_ok_and(|flags| flags.contains(IFlags::NOCOW));
    let Some(copy) = unnamed(folder).ok().filter(|_| !is_nodatacow) else {
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

/// Makes a file without a name, on the filesystem of a folder.
fn unnamed(folder: &File) -> rustix::io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(folder, ".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
}

/// Whether files in a folder can share extents. This is tried with two files that have no name.
pub fn can_share(folder: &File) -> bool {
    let make = || unnamed(folder);
    let try_clone = || -> std::io::Result<()> {
        let (source, destination) = (make()?, make()?);
        source.write_all_at(&[1; 4096], 0)?;
        clone_range(&source, 0, &destination, 0, 4096)?;
        Ok(())
    };
    try_clone().is_ok()
}
