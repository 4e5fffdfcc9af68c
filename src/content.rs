//! What images hold, as archives keep it: what each range of one is, and what belongs to a file beside its content.

use crate::numbers::{Slot, StoreBlock};

/// What a range of an image holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Content {
    /// Nothing was ever written there.
    Hole,
    /// Zeros were written.
    Zeros,
    /// Preallocated.
    Unwritten,
    /// Blocks of the store, from this one on.
    Stored(StoreBlock),
    /// Not known: the record that said so is damaged. Never written.
    Lost,
}

/// A range of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its length.
    pub blocks: u32,
    /// What it holds.
    pub content: Content,
}

impl Run {
    /// Takes in a run that follows this one.
    pub fn absorb(&mut self, next: Self) -> bool {
        let follows = match (self.content, next.content) {
            (Content::Stored(mine), Content::Stored(its)) => mine.checked_add(self.blocks) == Some(its),
            (mine, its) => mine == its,
        };
        match self.blocks.checked_add(next.blocks) {
            Some(blocks) if follows => {
                self.blocks = blocks;
                true
            }
            _ => false,
        }
    }

    /// What it holds from `skip` blocks on, for `blocks` blocks.
    #[must_use]
    pub fn part(self, skip: u32, blocks: u32) -> Self {
        let content = match self.content {
            Content::Stored(first) => Content::Stored(first + skip),
            other => other,
        };
        Self { blocks, content }
    }
}

/// Appends a run to others, joined with the last where it follows it.
pub fn push_run(runs: &mut Vec<Run>, run: Run) {
    if run.blocks > 0 && !runs.last_mut().is_some_and(|last| last.absorb(run)) {
        runs.push(run);
    }
}

/// A range of slots of which it is known what they are in an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownSlots {
    /// First slot.
    pub slot: Slot,
    /// Blocks.
    pub blocks: u32,
    /// What they hold.
    pub content: Content,
}

impl KnownSlots {
    /// The slot after its last.
    pub fn end(&self) -> Slot {
        self.slot + self.blocks
    }

    /// What it is from a slot of it on.
    pub fn content_at(&self, slot: Slot) -> Content {
        match self.content {
            Content::Stored(first) => Content::Stored(first + (slot - self.slot)),
            other => other,
        }
    }
}

/// The name that stands among extended attributes for `FS_NOCOW_FL` (linux/fs.h), which is none. No file can have an attribute of this name.
pub const NODATACOW: &[u8] = b"vmfold.nodatacow";

/// A time, as files have it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileTime {
    /// Seconds since 1970; below 0 before.
    pub seconds: i64,
    /// Nanoseconds after the second, fewer than a second of them.
    pub nanoseconds: u32,
}

/// What is kept of a file or folder beside its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Metadata {
    /// Permission bits.
    pub mode: u32,
    /// Owner's number.
    pub uid: u32,
    /// Group's number.
    pub gid: u32,
    /// Owner's name; empty if not known.
    pub user: String,
    /// Group's name; empty if not known.
    pub group: String,
    /// Time of last change of content.
    pub mtime: FileTime,
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Metadata {
    /// Whether a file is to be restored without copy on write, and so without checksums: its blocks can be shared with none that has them.
    pub fn is_nodatacow(&self) -> bool {
        self.xattrs.iter().any(|(name, _)| name == NODATACOW)
    }
}
