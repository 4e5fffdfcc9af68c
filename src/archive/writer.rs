//! Writes records one after the other, and checks each with the decoders and limits of a reader.

use std::io;
use std::sync::Arc;

use super::announced::AnnouncedBlocks;
use super::commit::{Commit, CommitLocation, ListLocation, encode_tail};
use super::head::Head;
use super::index;
use super::keys::{self, EpochSealer, KeyRecord};
use super::limits::{LISTS_MAX, RECORDS_MAX};
use super::list::{self, ImageSummary, Listed, RecordLocation};
use super::manifest::{self, ManifestBuilder, PlanPart, PlanRecord};
use super::pack::{self, PlacedFrame};
use super::parity::{FullGroup, ParityMaker, ParityPlace};
use super::reader::Committed;
use super::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind, SEQUENCES};
use super::seal::{self, KeySlot, Seal};
use crate::codec::Malformed;
use crate::content::Content;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::spill::Budget;
use crate::store::Store;

/// Bytes of a body that is written together with its header.
const AT_ONCE_BYTES_MAX: usize = 16 << 20;
/// Bytes between the two copies of a COMMIT at least: one bad sector does not take both.
const COPY_DISTANCE: usize = 4 << 10;
/// Bytes behind a COMMIT that its epoch has beside copies: the NOTE and the TAIL.
pub const COPIES_BYTES: u64 = (3 * HEADER_BYTES + 96 + COPY_DISTANCE) as u64;

/// What a new epoch continues.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EpochBase {
    /// The lane.
    pub lane: LaneId,
    /// The number of its last commit.
    pub last_number: CommitNumber,
    /// Where that is.
    pub last: CommitLocation,
    /// The next record's number.
    pub sequence: u64,
    /// Bytes of the file so far.
    pub length: u64,
    /// Records of the file so far.
    pub records: usize,
    /// The end of the lane's store so far.
    pub store_end: StoreBlock,
}

/// What an epoch has beside what it stores.
#[derive(Debug, Default)]
pub struct EpochOptions {
    /// What seals its records; none if they stay clear.
    pub sealer: Option<EpochSealer>,
    /// What makes its parity, if any is made.
    pub parity: Option<ParityMaker>,
}

/// Writes one epoch.
#[derive(Debug)]
pub struct ArchiveWriter {
    store: Arc<dyn Store>,
    base: EpochBase,
    epoch: EpochId,
    sequence: u64,
    offset: u64,
    records: Vec<RecordLocation>,
    /// What seals bodies; none if nothing is sealed any more.
    sealer: Option<EpochSealer>,
    /// Whether the archive is sealed.
    is_sealed: bool,
    /// What a reader makes of the final images.
    images: ManifestBuilder,
    /// What makes the parity of the archive, if any is made.
    parity: Option<ParityMaker>,
    /// Bytes of PARITY records so far.
    parity_bytes: u64,
    /// The header of the record that was written last.
    last_header: Option<RecordHeader>,
    /// The COMMIT once it is written, its header, and its body.
    committed: Option<(CommitLocation, RecordHeader, Vec<u8>)>,
}

fn too_large(problem: Malformed) -> io::Error {
    io::Error::other(format!("a reader would refuse it: {}", problem.problem()))
}

impl ArchiveWriter {
    /// Begins an epoch, with its HEAD.
    ///
    /// # Errors
    /// Returns the error of the store, or says that the archive has used up the numbers of its commits.
    pub fn begin(store: Arc<dyn Store>, base: EpochBase, epoch: EpochId, budget: &Budget) -> io::Result<Self> {
        Self::begin_with(store, base, epoch, EpochOptions::default(), budget)
    }

    /// Begins an epoch as [`ArchiveWriter::begin`] does, in an archive that is sealed or gets parity. What was written since the last parity gets it
    /// first.
    ///
    /// # Errors
    /// Those of [`ArchiveWriter::begin`], and the error of reading.
    pub fn begin_with(
        store: Arc<dyn Store>,
        base: EpochBase,
        epoch: EpochId,
        EpochOptions { sealer, parity }: EpochOptions,
        budget: &Budget,
    ) -> io::Result<Self> {
        if base.last_number >= CommitNumber::LAST {
            return Err(io::Error::other("the archive has used up the numbers of its commits"));
        }
        let is_sealed = sealer.is_some();
        let mut writer = Self {
            sealer,
            is_sealed,
            parity,
            ..Self::new(store, base, epoch, budget)
        };
        let head = if is_sealed { Head::sealed() } else { Head::current() };
        writer.put(RecordKind::Head, head.encode(), |_| ())?;
        writer.write_keys()?;
        writer.catch_up(&mut |_| Ok(()))?;
        Ok(writer)
    }

    /// Goes on with the epoch of the last commit, whose COMMIT this is as it is stored: for what no COMMIT lists.
    pub fn resume(store: Arc<dyn Store>, base: EpochBase, (header, body): (RecordHeader, Vec<u8>)) -> Self {
        Self {
            committed: Some((base.last, header, body)),
            is_sealed: header.seal.is_some(),
            ..Self::new(store, base, header.epoch, &Budget::default())
        }
    }

    fn new(store: Arc<dyn Store>, base: EpochBase, epoch: EpochId, budget: &Budget) -> Self {
        Self {
            store,
            base,
            epoch,
            sequence: base.sequence,
            offset: base.length,
            records: Vec::new(),
            sealer: None,
            is_sealed: false,
            images: ManifestBuilder::new(budget),
            parity: None,
            parity_bytes: 0,
            last_header: None,
            committed: None,
        }
    }

    /// Returns the number of the commit that this epoch makes.
    pub fn commit_number(&self) -> CommitNumber {
        // A reader refuses a commit with the last number.
        self.base.last_number.next()
    }

    /// Returns how many bytes were written in this epoch.
    pub fn written_bytes(&self) -> u64 {
        self.offset - self.base.length
    }

    /// Writes a PLAN of images. `last` says that it is the last one of its part.
    ///
    /// # Errors
    /// Returns the error of the store, or says what a reader would refuse.
    pub fn put_images(&mut self, part: PlanPart, last: bool, content: &[u8]) -> io::Result<()> {
        let body = manifest::encode(self.commit_number(), part, last, content)?;
        let decoded = PlanRecord::decode(&body).map_err(too_large)?;
        if part == PlanPart::Final {
            self.images.add(decoded.content()).map_err(too_large)?;
        }
        self.put(RecordKind::Plan, body, |location| location.part = part.number())
    }

    /// Writes a PLAN that announces blocks.
    ///
    /// # Errors
    /// Returns the error of the store, or says what a reader would refuse.
    pub fn put_announced(&mut self, announced: &AnnouncedBlocks) -> io::Result<()> {
        let mut content = Vec::new();
        announced.put(&mut content);
        let body = manifest::encode(self.commit_number(), PlanPart::Blocks, false, &content)?;
        let decoded = PlanRecord::decode(&body).and_then(|record| record.announced());
        decoded.map_err(too_large)?;
        // Whoever may only write finds blocks by it.
        self.put_sealed((RecordKind::Plan, Some(KeySlot::Index)), body, |location| {
            location.part = PlanPart::Blocks.number();
            location.first = announced.first;
            location.blocks = announced.end() - announced.first;
        })
    }

    /// Writes a PACK of some frames, which are in order; none if there are none. A sealed one is padded: to the length of all others if it is
    /// full, and otherwise so that its length tells little.
    ///
    /// # Errors
    /// Returns the error of the store, or says what a reader would refuse.
    pub fn put_pack(&mut self, frames: &[PlacedFrame], is_full: bool) -> io::Result<()> {
        let Some(first) = frames.first().map(|placed| placed.first) else {
            return Ok(());
        };
        let (mut body, table_hash) = pack::encode_table(frames);
        let stored_bytes = frames.iter().map(|placed| placed.frame.stored_bytes()).sum::<usize>();
        let table = pack::decode_table(&body, (body.len() + stored_bytes) as u64, None).map_err(too_large)?;
        if (table.hash, table.first) != (table_hash, first) {
            return Err(too_large("a PACK is not what it should be".into()));
        }
        let place = (self.base.lane, self.epoch);
        let stored = if let Some(sealer) = &mut self.sealer {
            let contents = frames.iter().map(|placed| placed.frame.stored());
            let length = seal::padded_pack_bytes(frames.len(), stored_bytes, is_full);
            sealer.seal_pack(place, &body, contents, length).map_err(too_large)?
        } else {
            body.reserve_exact(stored_bytes);
            for placed in frames {
                body.extend_from_slice(placed.frame.stored());
            }
            body
        };
        let mut location = self.write(RecordKind::Pack, stored)?;
        location.first = first;
        location.blocks = table.blocks;
        location.table_hash = table_hash;
        self.records.push(location);
        Ok(())
    }

    /// Returns whether a PACK of so many frames would be longer with another one of `more_bytes` than the PACKs of a sealed archive are.
    pub fn is_pack_full(&self, frames: usize, stored_bytes: usize, more_bytes: usize) -> bool {
        self.is_sealed && seal::pack_bytes(frames + 1, stored_bytes + more_bytes) > seal::PACK_BYTES
    }

    /// Returns whether records are sealed.
    pub fn is_sealed(&self) -> bool {
        self.is_sealed
    }

    /// Writes an INDEX of the blocks from `first` on.
    ///
    /// # Errors
    /// Returns the error of the store, or says what a reader would refuse.
    pub fn put_index(&mut self, first: StoreBlock, hashes: &[Hash]) -> io::Result<()> {
        let body = index::encode(first, hashes);
        index::decode(&body).map_err(too_large)?;
        self.put(RecordKind::Index, body, |location| {
            location.first = first;
            location.blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
        })
    }

    fn put(&mut self, kind: RecordKind, body: Vec<u8>, describe: impl FnOnce(&mut RecordLocation)) -> io::Result<()> {
        self.put_sealed((kind, KeySlot::of(kind)), body, describe)
    }

    /// Writes a record that is sealed with the key of a slot.
    fn put_sealed(
        &mut self,
        (kind, slot): (RecordKind, Option<KeySlot>),
        body: Vec<u8>,
        describe: impl FnOnce(&mut RecordLocation),
    ) -> io::Result<()> {
        let stored = self.seal((kind, slot), body)?;
        let mut location = self.write_one_sealed((kind, slot), stored)?;
        self.write_full_groups()?;
        describe(&mut location);
        self.records.push(location);
        Ok(())
    }

    /// Seals a body with the key of a slot.
    fn seal(&mut self, (kind, slot): (RecordKind, Option<KeySlot>), body: Vec<u8>) -> io::Result<Vec<u8>> {
        let place = (self.base.lane, self.epoch);
        match (&mut self.sealer, slot) {
            (Some(sealer), Some(slot)) => sealer.seal((kind, slot), place, &body).map_err(too_large),
            _ => Ok(body),
        }
    }

    /// Writes the KEY record of a sealed epoch.
    fn write_keys(&mut self) -> io::Result<()> {
        let Some(sealer) = &self.sealer else { return Ok(()) };
        let body = sealer.key_body().map_err(too_large)?;
        self.write(RecordKind::Key, body)?;
        Ok(())
    }

    /// Writes a record whose body is as it is stored, and the PARITY records of groups that are full with it.
    fn write(&mut self, kind: RecordKind, body: Vec<u8>) -> io::Result<RecordLocation> {
        let location = self.write_one(kind, body)?;
        self.write_full_groups()?;
        Ok(location)
    }

    fn write_one(&mut self, kind: RecordKind, body: Vec<u8>) -> io::Result<RecordLocation> {
        self.write_one_sealed((kind, KeySlot::of(kind)), body)
    }

    fn write_one_sealed(
        &mut self,
        (kind, slot): (RecordKind, Option<KeySlot>),
        mut body: Vec<u8>,
    ) -> io::Result<RecordLocation> {
        let seal = slot.map(Seal::with).filter(|_| self.is_sealed);
        let header = RecordHeader::of_stored((kind, seal), self.base.lane, self.epoch, self.sequence, &mut body)
            .map_err(too_large)?;
        self.write_stored(&header, &body)
    }

    /// Writes a record as it is stored.
    fn write_stored(&mut self, header: &RecordHeader, body: &[u8]) -> io::Result<RecordLocation> {
        RecordHeader::decode(&header.encode()).map_err(too_large)?;
        if self.sequence >= SEQUENCES || self.records_so_far() + 2 * LISTS_MAX >= RECORDS_MAX {
            return Err(io::Error::other("the archive would have more records than allowed"));
        }
        if body.len() > AT_ONCE_BYTES_MAX {
            self.store.append(&header.encode())?;
            self.store.append(body)?;
        } else {
            self.store.append(&[&header.encode()[..], body].concat())?;
        }
        let location = RecordLocation {
            kind: header.kind,
            part: 0,
            lane: self.base.lane,
            sequence: self.sequence,
            offset: self.offset,
            length: HEADER_BYTES as u64 + body.len() as u64,
            first: StoreBlock(0),
            blocks: 0,
            body_hash: header.body_hash,
            table_hash: [0; 32],
        };
        // Until all that is in the archive is read, it is read with that.
        if let Some(parity) = self.parity.as_mut().filter(|parity| parity.position() == self.offset) {
            parity.push(&header.encode());
            parity.push(body);
        }
        self.last_header = Some(*header);
        self.sequence += 1;
        self.offset += location.length;
        Ok(location)
    }

    /// Writes the PARITY records of all groups that are full. Their own bytes are part of the next group.
    fn write_full_groups(&mut self) -> io::Result<()> {
        while let Some(full) = self.parity.as_mut().and_then(ParityMaker::next_full) {
            self.write_parity(&full, None)?;
        }
        Ok(())
    }

    fn write_parity(&mut self, full: &FullGroup, commit: Option<CommitLocation>) -> io::Result<()> {
        let geometry = full.geometry(&ParityPlace {
            offset: self.offset,
            sequence: self.sequence,
            lane: self.base.lane,
            epoch: self.epoch,
            commit,
        });
        for number in 0..geometry.records {
            let location = self.write_one(RecordKind::Parity, full.body(&geometry, number))?;
            self.parity_bytes += location.length;
        }
        Ok(())
    }

    /// Reads what stands in the archive and has no parity yet, and writes the PARITY records of groups that are full with it. Calls `read` with
    /// the bytes that it has read each time.
    fn catch_up(&mut self, read: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        const PART_BYTES: usize = 4 << 20;
        let mut buffer = vec![0; PART_BYTES];
        while let Some(parity) = self.parity.as_mut()
            && parity.position() < self.offset
        {
            let left = usize::try_from(self.offset - parity.position()).unwrap_or(usize::MAX);
            let part = &mut buffer[..left.min(PART_BYTES)];
            self.store.read_exact_at(parity.position(), part)?;
            parity.push(part);
            read(part)?;
            self.write_full_groups()?;
        }
        Ok(())
    }

    /// Gives the archive parity, once an epoch was ended: PARITY records for all that has none, and then one more copy of the COMMIT and a TAIL. Calls
    /// `read` with what it reads of the archive. If it fails, the archive is as it should be up to the length of [`ArchiveWriter::finish`]. Returns
    /// what a next epoch would continue; none if there is no parity to be made.
    ///
    /// # Errors
    /// Returns the error of the store, or of `read`.
    pub fn protect(
        &mut self,
        parity: Option<ParityMaker>,
        read: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Option<EpochBase>> {
        self.parity = self.parity.take().or(parity);
        self.catch_up(read)?;
        let (Some(rest), Some((commit, header, body))) =
            (self.parity.take().and_then(ParityMaker::finish), self.committed.take())
        else {
            return Ok(None);
        };
        self.write_parity(&rest, Some(commit))?;
        drop(rest);
        // The copy leads to an end of the archive, whose parity is on disk then.
        self.store.settle()?;
        self.end_again(commit, &header, body).map(Some)
    }

    /// Appends other keys to an archive whose writer was resumed: a KEY record, and behind it one more copy of the COMMIT and a TAIL. Returns what
    /// a next epoch would continue.
    ///
    /// # Errors
    /// Returns the error of the store, or says what a reader would refuse. The archive then ends before what was written.
    pub fn put_keys(&mut self, keys: &KeyRecord) -> io::Result<EpochBase> {
        let Some((commit, header, body)) = self.committed.take() else {
            return Err(io::Error::other("keys are appended behind a commit"));
        };
        self.write_one(RecordKind::Key, keys.encode().map_err(too_large)?)?;
        self.store.settle()?;
        self.end_again(commit, &header, body)
    }

    /// Writes one more copy of the COMMIT, and a TAIL.
    fn end_again(&mut self, commit: CommitLocation, header: &RecordHeader, mut body: Vec<u8>) -> io::Result<EpochBase> {
        let copy = header.copied(self.sequence, &mut body).map_err(too_large)?;
        self.write_stored(&copy, &body)?;
        self.write_one(RecordKind::Tail, encode_tail(&commit))?;
        self.store.settle()?;
        Ok(EpochBase {
            sequence: self.sequence,
            length: self.offset,
            records: self.records_so_far(),
            ..self.base
        })
    }

    /// Returns the bytes of the PARITY records that were written.
    pub fn parity_bytes(&self) -> u64 {
        self.parity_bytes
    }

    /// Records of the file so far.
    fn records_so_far(&self) -> usize {
        self.base.records + usize::try_from(self.sequence - self.base.sequence).unwrap_or(0)
    }

    /// Ends the epoch. `commit` lacks its number, what it follows, and what it lists; `listed` lacks its records. Everything that the COMMIT
    /// lists is on disk before it is written, and the COMMIT when this returns. Returns what a next epoch would continue, and what was
    /// committed.
    ///
    /// # Errors
    /// Returns the error of the store, or says what a reader would refuse.
    pub fn finish(
        &mut self,
        mut commit: Commit,
        mut listed: Listed,
        images: &[ImageSummary],
    ) -> io::Result<(EpochBase, Committed)> {
        commit.number = self.commit_number();
        commit.previous = self.base.last;
        (commit.lane, commit.epoch) = (self.base.lane, self.epoch);
        listed.records = std::mem::take(&mut self.records);
        self.check_images(images, commit.store_end)?;
        let stored_lists = self.write_lists(&mut commit, &listed, images)?;
        let body = self.stored_commit(&mut commit, &keys::index_hash(listed.records.iter()))?;
        self.store.settle()?;
        let location = self.write_one(RecordKind::Commit, body.clone())?;
        let header = self.last_header;
        self.write_full_groups()?;
        self.store.settle()?;
        for list in stored_lists {
            self.write(RecordKind::List, list)?;
        }
        if self.sealer.is_some() {
            self.write_keys()?;
        } else {
            self.write(RecordKind::Note, vec![0; COPY_DISTANCE])?;
        }
        self.write(RecordKind::Commit, body.clone())?;
        let last = CommitLocation {
            offset: location.offset,
            length: location.length,
            body_hash: location.body_hash,
        };
        self.write(RecordKind::Tail, encode_tail(&last))?;
        self.store.settle()?;
        let base = EpochBase {
            lane: self.base.lane,
            last_number: commit.number,
            last,
            sequence: self.sequence,
            length: self.offset,
            records: self.records_so_far(),
            store_end: commit.store_end,
        };
        self.committed = header.map(|header| (last, header, body));
        self.base = EpochBase {
            last_number: base.last_number,
            last,
            store_end: base.store_end,
            ..self.base
        };
        let committed = Committed {
            commit,
            location: last,
            lane: self.base.lane,
            epoch: self.epoch,
            listed,
            ..Committed::default()
        };
        Ok((base, committed))
    }

    /// Returns the body of a COMMIT as it is stored.
    fn stored_commit(&mut self, commit: &mut Commit, index_hash: &Hash) -> io::Result<Vec<u8>> {
        commit.keyring = self.sealer.as_ref().map(EpochSealer::keyring_number);
        let body = commit.encode()?;
        if Commit::decode(&body).as_ref() != Ok(commit) {
            return Err(io::Error::other(
                "the commit has a longer label or more lists than the format allows",
            ));
        }
        let place = (self.base.lane, self.epoch);
        match &mut self.sealer {
            Some(sealer) => sealer.seal_commit(place, &body, index_hash).map_err(too_large),
            None => Ok(body),
        }
    }

    /// Writes what a COMMIT lists, and tells the COMMIT where. Returns the bodies as they are stored.
    fn write_lists(
        &mut self,
        commit: &mut Commit,
        listed: &Listed,
        images: &[ImageSummary],
    ) -> io::Result<Vec<Vec<u8>>> {
        let bodies = list::encode(listed, images, self.base.lane)?;
        check_lists(&bodies, listed, images, self.base.lane)?;
        let mut stored_lists = Vec::new();
        for (part, body) in bodies {
            let stored = self.seal((RecordKind::List, KeySlot::of(RecordKind::List)), body)?;
            let location = self.write(RecordKind::List, stored.clone())?;
            stored_lists.push(stored);
            commit.lists.push(ListLocation {
                part,
                sequence: location.sequence,
                offset: location.offset,
                length: location.length,
                body_hash: location.body_hash,
            });
        }
        Ok(stored_lists)
    }

    /// Checks that the final images are what a reader takes, and are all there.
    fn check_images(&mut self, images: &[ImageSummary], store_end: StoreBlock) -> io::Result<()> {
        let empty = ManifestBuilder::new(&Budget::default());
        let manifest = std::mem::replace(&mut self.images, empty).finish().map_err(too_large)?;
        let summaries = list::by_number(images);
        let is_there = |image: &manifest::ImageRuns| {
            let summary = summaries.get(&image.image.number);
            summary.is_none_or(|summary| summary.path == image.image.path() && summary.size == image.image.size)
        };
        let is_stored = |image: &manifest::ImageRuns| {
            image.runs.iter().all(|run| match run.content {
                Content::Stored(first) => first.checked_add(run.blocks).is_some_and(|end| end <= store_end),
                Content::Lost => false,
                _ => true,
            })
        };
        let listed = manifest
            .images
            .iter()
            .filter(|image| summaries.contains_key(&image.image.number));
        if listed.count() != images.len() || !manifest.images.iter().all(|image| is_there(image) && is_stored(image)) {
            return Err(too_large("the images are not all there".into()));
        }
        Ok(())
    }
}

fn check_lists(bodies: &[(u8, Vec<u8>)], listed: &Listed, images: &[ImageSummary], lane: LaneId) -> io::Result<()> {
    let (mut read, mut summaries) = (Listed::default(), Vec::new());
    for (part, body) in bodies {
        match *part {
            list::PART_RECORDS => read.add(body, lane),
            _ => list::add_images(&mut summaries, body),
        }
        .map_err(too_large)?;
    }
    if read == *listed && summaries == images && bodies.len() <= LISTS_MAX {
        Ok(())
    } else {
        Err(too_large("what a COMMIT lists is not what it should be".into()))
    }
}
