//! What images hold, as archives record it: the content of each range, and a file's metadata.

use crate::numbers::{Slot, StoreBlock};
use crate::spill::SpillVec;

/// What a range of an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// A hole: no blocks are allocated there, and it reads as zeros.
    Hole,
    /// Allocated blocks that hold zeros.
    Zeros,
    /// Preallocated blocks that were never written. They read as zeros.
    Unwritten,
    /// Consecutive blocks of the store, of which this is the first.
    Stored(StoreBlock),
    /// Unknown, because the record of this range is damaged. A reader makes this up; it is never written.
    Lost,
}

/// A range of an image, and its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Length in blocks.
    pub blocks: u32,
    /// Its content.
    pub content: Content,
}

impl Run {
    /// Extends this run by `next` if their contents are contiguous and the length stays within 32 bits. Returns whether it did.
    pub fn absorb(&mut self, next: Self) -> bool {
        let follows = match (self.content, next.content) {
            (Content::Stored(first), Content::Stored(following)) => first.checked_add(self.blocks) == Some(following),
            (content, following) => content == following,
        };
        match self.blocks.checked_add(next.blocks) {
            Some(blocks) if follows => {
                self.blocks = blocks;
                true
            }
            _ => false,
        }
    }

    /// Returns the part of `blocks` blocks that begins after `skip` blocks.
    #[must_use]
    pub fn part(self, skip: u32, blocks: u32) -> Self {
        let content = match self.content {
            Content::Stored(first) => Content::Stored(first + skip),
            other => other,
        };
        Self { blocks, content }
    }
}

/// Appends a run to a list, and merges it with the last run where their contents are contiguous. An empty run is dropped.
pub fn push_run(runs: &mut SpillVec<Run>, run: Run) {
    if run.blocks > 0 && !runs.last_mut().is_some_and(|last| last.absorb(run)) {
        runs.push(run);
    }
}

/// A range of slots whose content in an archive is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownSlots {
    /// First slot.
    pub slot: Slot,
    /// Length in blocks.
    pub blocks: u32,
    /// Their content.
    pub content: Content,
}

impl KnownSlots {
    /// Returns the slot after the last.
    pub fn end(&self) -> Slot {
        self.slot + self.blocks
    }

    /// Returns the content from `slot` on, which must be in the range.
    pub fn content_at(&self, slot: Slot) -> Content {
        match self.content {
            Content::Stored(first) => Content::Stored(first + (slot - self.slot)),
            other => other,
        }
    }
}

/// The name under which archives keep `FS_NOCOW_FL` (linux/fs.h) among extended attributes. It is no extended attribute: no kernel accepts
/// the namespace `vmfold`.
pub const NODATACOW: &[u8] = b"vmfold.nodatacow";

/// A timestamp of a file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileTime {
    /// Seconds since 1970, negative before.
    pub seconds: i64,
    /// Nanoseconds after the second, below 10⁹.
    pub nanoseconds: u32,
}

/// The metadata of a file or folder.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits.
    pub mode: u32,
    /// The owner's user id.
    pub uid: u32,
    /// The group id.
    pub gid: u32,
    /// The owner's name; empty if it is unknown.
    pub user: String,
    /// The group's name; empty if it is unknown.
    pub group: String,
    /// Time of the last change of content.
    pub mtime: FileTime,
    /// Extended attributes, each with its name and value.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Metadata {
    /// Whether the file is restored as `nodatacow`, and therefore without checksums. Its blocks cannot be shared with files that have
    /// checksums.
    pub fn is_nodatacow(&self) -> bool {
        self.xattrs.iter().any(|(name, _)| name == NODATACOW)
    }
}
