//! Writes records one after the other.

use std::io;
use std::sync::Arc;

use super::commit::{Commit, CommitLocation, RecordLocation, encode_tail};
use super::head::Head;
use super::record::{HEADER_BYTES, RecordHeader, RecordKind, SEQUENCES};
use crate::numbers::{CommitNumber, StoreBlock};
use crate::store::Store;

/// Bytes of a body that is written together with its header.
const AT_ONCE_BYTES_MAX: usize = 16 << 20;

/// What a new epoch continues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpochBase {
    /// The archive.
    pub archive: [u8; 16],
    /// The number of its last commit.
    pub last_number: CommitNumber,
    /// Where that is.
    pub last: CommitLocation,
    /// The next record's number.
    pub sequence: u64,
    /// Bytes so far.
    pub length: u64,
    /// Blocks of the store so far.
    pub store_end: StoreBlock,
}

/// Writes one epoch.
#[derive(Debug)]
pub struct ArchiveWriter {
    store: Arc<dyn Store>,
    base: EpochBase,
    epoch: u64,
    sequence: u64,
    offset: u64,
    records: Vec<RecordLocation>,
}

impl ArchiveWriter {
    /// Begins an epoch, with its HEAD.
    ///
    /// # Errors
    /// Those of writing.
    pub fn begin(store: Arc<dyn Store>, base: EpochBase, epoch: u64) -> io::Result<Self> {
        if base.last_number >= CommitNumber::LAST {
            return Err(io::Error::other("the archive has used up the numbers of its commits"));
        }
        let mut writer = Self {
            store,
            base,
            epoch,
            sequence: base.sequence,
            offset: base.length,
            records: Vec::new(),
        };
        writer.put(RecordKind::Head, 0, (StoreBlock(0), 0), &Head::current().encode())?;
        Ok(writer)
    }

    /// The number of the commit that this epoch makes.
    pub fn commit_number(&self) -> CommitNumber {
        // A reader refuses a commit with the last number.
        self.base.last_number.next()
    }

    /// Bytes written in this epoch.
    pub fn written_bytes(&self) -> u64 {
        self.offset - self.base.length
    }

    /// Writes a record; `store` is the first store address and the count of what it is about.
    ///
    /// # Errors
    /// Those of writing, or a body longer than the format allows.
    pub fn put(&mut self, kind: RecordKind, part: u8, store: (StoreBlock, u32), body: &[u8]) -> io::Result<()> {
        let location = self.write(kind, part, store, body)?;
        self.records.push(location);
        Ok(())
    }

    fn write(
        &mut self,
        kind: RecordKind,
        part: u8,
        store: (StoreBlock, u32),
        body: &[u8],
    ) -> io::Result<RecordLocation> {
        if body.len() as u64 > kind.body_bytes_max() {
            return Err(io::Error::other(format!(
                "a {} record would be longer than the format allows",
                kind.name()
            )));
        }
        if self.sequence >= SEQUENCES {
            return Err(io::Error::other("the archive has used up the numbers of its records"));
        }
        let header = RecordHeader::of(kind, self.base.archive, self.epoch, self.sequence, body);
        if body.len() > AT_ONCE_BYTES_MAX {
            self.store.append(&header.encode())?;
            self.store.append(body)?;
        } else {
            // In one call, so that whoever is killed leaves no COMMIT without its body.
            self.store.append(&[&header.encode()[..], body].concat())?;
        }
        let location = RecordLocation {
            kind,
            part,
            sequence: self.sequence,
            offset: self.offset,
            length: HEADER_BYTES as u64 + body.len() as u64,
            first: store.0,
            blocks: store.1,
            body_hash: header.body_hash,
        };
        self.sequence += 1;
        self.offset += location.length;
        Ok(location)
    }

    /// Ends the epoch. `commit` lacks its number, what it follows, and its records. Everything is on disk before the COMMIT is
    /// written, and the COMMIT when this returns. Returns what a next epoch would continue.
    ///
    /// # Errors
    /// Those of writing.
    pub fn finish(mut self, mut commit: Commit) -> io::Result<(EpochBase, Commit)> {
        self.store.settle()?;
        commit.number = self.commit_number();
        commit.previous = self.base.last;
        commit.records = std::mem::take(&mut self.records);
        let body = commit.encode()?;
        // Nothing is called done that a reader would refuse.
        if Commit::decode(&body).as_ref() != Ok(&commit) || commit.span().is_err() {
            return Err(io::Error::other(
                "the commit has more images, longer names or a longer label than the format allows",
            ));
        }
        let location = self.write(RecordKind::Commit, 0, (StoreBlock(0), 0), &body)?;
        let last = CommitLocation {
            offset: location.offset,
            length: location.length,
            body_hash: location.body_hash,
        };
        self.write(RecordKind::Tail, 0, (StoreBlock(0), 0), &encode_tail(&last))?;
        self.store.settle()?;
        let base = EpochBase {
            archive: self.base.archive,
            last_number: commit.number,
            last,
            sequence: self.sequence,
            length: self.offset,
            store_end: commit.store_end,
        };
        Ok((base, commit))
    }
}
