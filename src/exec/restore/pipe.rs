//! An archive that is read once and in order, as a source. Images are offered when the first PACK of their epoch comes. Every block is handed
//! over as it comes, and the hashes that follow prove it. Memory holds the manifest of one epoch, one record, and hashes of at most 2^20 blocks.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::source::{BlockHashes, BlockSink, BlockSource, Delivered, Offer, SourceFrame};
use crate::archive::commit::{ChainPlace, CommitLocation, FOLLOWS_NOT};
use crate::archive::epoch::{EndedEpoch, Epoch, ProvedBlocks};
use crate::archive::head::Head;
use crate::archive::keys::{ArchiveKeys, KEYS_LOST, KeyRecord};
use crate::archive::limits::FRAME_BLOCKS_MAX;
use crate::archive::pack::{self, FrameInfo};
use crate::archive::reader::{Committed, find_commit};
use crate::archive::record::{BlockHasher, EpochId, Hash, LaneId, RecordHeader, RecordKind};
use crate::archive::stream::{Stream, StreamEvent};
use crate::block::{BLOCK_LEN, ByteRange};
use crate::codec::{Decoded, Malformed};
use crate::error::{Error, Result, describe};
use crate::exec::hashes::{Digest, HashLog};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::{CommitName, Contents};
use crate::range;
use crate::spill::Budget;
use crate::store::{Store, StoreReader};

/// Frames of a PACK that are handed over together.
const FRAMES_AT_ONCE: usize = 8;
/// Hashes made of blocks that wait for their INDEX: 32 MiB.
const MADE_BLOCKS_MAX: usize = 1 << 20;
/// Hashes that are read together from the log.
const HASHES_AT_ONCE: u32 = 1024;

/// What is restored from an archive that comes through a pipe, and how.
#[derive(Debug, Clone)]
pub struct PipeOptions {
    /// The commit, by its number, label or name. `None` and `latest` mean the last one.
    pub commit: Option<String>,
    /// Whether the restore goes on after damage, with what is intact.
    pub partial: bool,
    /// Whether offers have fingerprints, by which seeds are searched.
    pub announces: bool,
    /// The folder for a file of hashes, if they need more memory than a [`HashLog`] takes.
    pub folder: PathBuf,
    /// Memory for runs.
    pub budget: Budget,
    /// The keys of the archive, if it is sealed.
    pub keys: Arc<ArchiveKeys>,
}

/// An archive that comes through a pipe.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct PipeSource<'a> {
    stream: Stream<StoreReader<'a>>,
    path: PathBuf,
    options: PipeOptions,
    /// The archive's lane, once a record was read.
    lane: Option<LaneId>,
    /// The epoch that the last record belongs to.
    epoch: Epoch,
    /// What was damaged since the last whole header, so that it is not known which epoch it belonged to.
    lost_before: Option<ByteRange>,
    /// The epoch whose images were offered last.
    offered: Option<OfferedEpoch>,
    /// A record that was read and is not used yet.
    pending: Option<ReadRecord>,
    hashes: PipeHashes,
    /// The kind of the last record; none at the beginning, and once its end was noted.
    last_kind: Option<RecordKind>,
    /// Whether a HEAD says that the archive is sealed.
    is_sealed: bool,
    /// Whether anything was damaged.
    is_damaged: bool,
    /// The COMMIT that came last, if all that it lists came: 0 for none.
    last_commit: Hash,
    /// Its place in the chain of commits.
    last_place: ChainPlace,
    /// Whether blocks came that no COMMIT lists, or only one that the commit after it does not follow.
    has_unproved: bool,
    /// Whether anything was damaged since the commit that was delivered last.
    is_damaged_since: bool,
    monitor: &'a dyn Monitor,
}

/// An epoch whose images were offered.
#[derive(Debug, Clone, Copy)]
struct OfferedEpoch {
    id: EpochId,
    /// Whether it says before its blocks which images these are for. A backup of another program that was exported does not.
    is_planned: bool,
}

/// A whole record. Its hash was compared with its body.
struct ReadRecord {
    header: RecordHeader,
    /// The place of the record in the archive, in bytes.
    offset: u64,
    body: Vec<u8>,
}

impl ReadRecord {
    /// The error for a record whose hash is right and whose body makes no sense.
    fn malformed(&self, path: &Path, malformed: Malformed) -> Error {
        match malformed {
            Malformed::Damaged(problem) => Error::damaged(path, self.offset, self.header.body_bytes, problem),
            Malformed::Unsupported(problem) => Error::Unsupported {
                path: path.to_owned(),
                problem,
            },
        }
    }
}

impl<'a> PipeSource<'a> {
    /// Makes a source of a store, which is read from its beginning on.
    pub fn new(store: &'a dyn Store, options: PipeOptions, monitor: &'a dyn Monitor) -> Self {
        Self {
            stream: Stream::new(StoreReader::new(store, 0), 0),
            path: store.path().to_owned(),
            lane: None,
            epoch: Epoch::new(None, options.announces, &options.budget),
            lost_before: None,
            offered: None,
            pending: None,
            last_kind: None,
            hashes: PipeHashes {
                keys: Arc::clone(&options.keys),
                log: HashLog::new(StoreBlock(0), options.folder.clone()),
                unknown: Vec::new(),
                made: BTreeMap::new(),
                made_blocks: 0,
                received: 0,
            },
            last_commit: [0; 32],
            last_place: ChainPlace::default(),
            has_unproved: false,
            is_sealed: false,
            is_damaged: false,
            is_damaged_since: false,
            options,
            monitor,
        }
    }

    /// The rest of the store, which was not read yet.
    pub fn rest(&mut self) -> &mut impl std::io::Read {
        self.stream.input()
    }

    /// The next record of the archive, or `None` at its end.
    fn next_record(&mut self) -> Result<Option<ReadRecord>> {
        if let Some(record) = self.pending.take() {
            return Ok(Some(record));
        }
        loop {
            let event = self.stream.next_event().map_err(|error| {
                if self.monitor.interrupted() {
                    Error::Interrupted
                } else {
                    Error::io("read", &self.path)(error)
                }
            })?;
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            match event {
                None => {
                    self.note_end();
                    return Ok(None);
                }
                Some(StreamEvent::Record { header, offset, body }) => {
                    self.last_kind = Some(header.kind);
                    if *self.lane.get_or_insert(header.lane) != header.lane {
                        return Err(Error::Unsupported {
                            path: self.path.clone(),
                            problem: "it has several lanes, which can only be restored from a file",
                        });
                    }
                    self.go_on_with(header.epoch);
                    if let Some(body) = self.opened(&header, offset, body)? {
                        return Ok(Some(ReadRecord { header, offset, body }));
                    }
                }
                Some(StreamEvent::Damage { range, problem, header }) => {
                    if let Some(header) = header {
                        self.go_on_with(header.epoch);
                    } else {
                        self.lost_before = Some(range);
                    }
                    self.epoch.lose(header.as_ref());
                    self.note_damage(range.start, range.length, problem)?;
                }
                Some(StreamEvent::Unsupported(record)) => {
                    return Err(Error::Unsupported {
                        path: self.path.clone(),
                        problem: record.problem,
                    });
                }
            }
        }
    }

    /// The body of a record without its seal. A KEY record opens the seals of its epoch. None for a record that does not open, where the
    /// restore goes on after damage.
    fn opened(&mut self, header: &RecordHeader, offset: u64, body: Vec<u8>) -> Result<Option<Vec<u8>>> {
        if header.kind == RecordKind::Key {
            let path = self.path.clone();
            let malformed = |problem: Malformed| match problem {
                Malformed::Damaged(problem) => Error::damaged(&path, offset, header.body_bytes, problem),
                Malformed::Unsupported(problem) => Error::Unsupported {
                    path: path.clone(),
                    problem,
                },
            };
            let record = KeyRecord::decode(&body).map_err(malformed)?;
            self.options.keys.open(&self.path, &record)?;
            let learned = self.options.keys.learn(header.lane, header.epoch, &record.wraps);
            learned.map_err(malformed)?;
        }
        if header.kind == RecordKind::Head {
            self.is_sealed |= Head::decode(&body).is_ok_and(|head| head.is_sealed);
        }
        if !matches!(header.kind, RecordKind::Head | RecordKind::Key) {
            if self.is_sealed && self.options.keys.ring().is_none() {
                return Err(Error::damaged(&self.path, offset, header.body_bytes, KEYS_LOST));
            }
            self.options.keys.check_sealed(&self.path)?;
        }
        match self.options.keys.open_body(&self.path, offset, header, body) {
            Err(Error::Damaged { problem, .. }) => {
                self.epoch.lose(Some(header));
                self.note_damage(offset, header.body_bytes, &problem)?;
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    /// Begins another epoch, unless it is the one that records came of. What was lost before its first record may have been part of it.
    fn go_on_with(&mut self, epoch: EpochId) {
        let lost_before = self.lost_before.take();
        if Some(epoch) == self.epoch.id() {
            return;
        }
        self.has_unproved |= self.epoch.has_packs();
        self.epoch = Epoch::new(Some(epoch), self.options.announces, &self.options.budget);
        if lost_before.is_some() {
            self.epoch.lose(None);
        }
    }

    /// Notes damage. It is an error unless the restore goes on after damage.
    fn note_damage(&mut self, start: u64, length: u64, problem: &str) -> Result<()> {
        let error = Error::damaged(&self.path, start, length, problem);
        self.is_damaged = true;
        self.is_damaged_since = true;
        if self.options.partial {
            self.monitor.note(&describe(&error));
            Ok(())
        } else {
            Err(error)
        }
    }

    /// Makes a note of [`Error::Damaged`], and then returns the default value. Other results stay as they are.
    fn unless_damaged<T: Default>(&mut self, offset: u64, result: Result<T>) -> Result<T> {
        match result {
            Err(Error::Damaged { range, problem, .. }) => {
                let range = range.unwrap_or(ByteRange {
                    start: offset,
                    length: 0,
                });
                self.note_damage(range.start, range.length, &problem)?;
                Ok(T::default())
            }
            other => other,
        }
    }

    /// Says that the archive ends in the middle of an epoch, if it does.
    fn note_end(&mut self) {
        let is_cut = self.last_kind.take().is_some_and(|kind| kind != RecordKind::Tail);
        if is_cut && !self.is_damaged {
            self.monitor
                .note("The archive does not end with a commit: an export did not end, or it was cut off");
        }
    }

    /// Takes what a record says that is neither a PACK nor a COMMIT.
    fn take(&mut self, record: &ReadRecord, sink: Option<&mut dyn BlockSink>) -> Result<()> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        let proved = self.epoch.take(&record.header, &record.body).map_err(malformed)?;
        let Some(ProvedBlocks { first, hashes }) = proved else {
            return Ok(());
        };
        let unproved = self.hashes.add(first, hashes)?;
        self.has_unproved |= unproved.is_err();
        let unproved = unproved.map_err(malformed)?;
        let Some(sink) = sink else { return Ok(()) };
        for range in &unproved {
            let hashes = &hashes[(range.start - first) as usize..(range.end - first) as usize];
            if !sink.prove(range.start, hashes)? {
                self.has_unproved = true;
                return Err(malformed("a block is not the one that the INDEX says".into()));
            }
        }
        Ok(())
    }

    /// The offer of the current epoch, whose first PACK or COMMIT is this record.
    fn offer_of(&self, record: &ReadRecord) -> Result<Option<Offer>> {
        let malformed = |problem: Malformed| record.malformed(&self.path, problem);
        let manifest = self.epoch.planned().map_err(malformed)?;
        if manifest.images.is_empty() && self.epoch.is_doubtful() {
            return Err(malformed("what says which images its blocks are for is lost".into()));
        }
        let is_planned = !manifest.images.is_empty();
        let contents = Contents {
            manifest,
            doubtful: self.epoch.is_doubtful(),
            grows: !is_planned,
            ..Contents::default()
        };
        let (announced, announced_end) = self.epoch.announced();
        Ok(Some(Offer {
            contents: Arc::new(contents),
            announced: if is_planned { announced.to_vec() } else { Vec::new() },
            known_end: if is_planned { announced_end } else { StoreBlock(0) },
        }))
    }

    /// Whether the images of an epoch were offered last.
    fn has_offered(&self, epoch: EpochId) -> bool {
        self.offered.is_some_and(|offered| offered.id == epoch)
    }

    /// Hands over the frames of a PACK. Damaged frames are left out, and the first of their errors is returned.
    fn take_pack(&mut self, record: &ReadRecord, sink: &mut dyn BlockSink) -> Result<()> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        let end_max = self.end_max();
        let table = self.epoch.take_pack(&record.header, &record.body, end_max);
        let table = table.map_err(malformed)?;
        let hasher = self.options.keys.hasher();
        let mut first_error = None;
        let made: Mutex<Vec<(StoreBlock, Vec<Hash>)>> = Mutex::new(Vec::new());
        let mut taken: Vec<Range<StoreBlock>> = Vec::new();
        for frames in table.frames.chunks(FRAMES_AT_ONCE) {
            let hasher = &hasher;
            let mut batch = Vec::with_capacity(frames.len());
            taken.extend(frames.iter().flat_map(|frame| sink.missing(frame.first..frame.end())));
            for frame in frames {
                let blocks = frame.first..frame.end();
                let expected = self.hashes.known_each(blocks.clone())?;
                let (malformed, made) = (&malformed, &made);
                batch.push(SourceFrame {
                    blocks,
                    content: Box::new(move || {
                        content_of(frame, &record.body, (&expected, hasher), made).map_err(malformed)
                    }),
                });
            }
            for (_, error) in sink.take(&batch)? {
                first_error.get_or_insert(error);
            }
        }
        self.hashes.received += table.frames.iter().map(|frame| u64::from(frame.blocks)).sum::<u64>();
        self.hashes.remember(made.into_inner().unwrap_or_default(), &taken);
        first_error.map_or(Ok(()), Err)
    }

    /// The store address that no block can lie behind, given the bytes so far: memory holds a bit for each below.
    fn end_max(&self) -> StoreBlock {
        /// 64 MiB of bits, for 2 TiB: of large archives most may be dead.
        const ALWAYS: u64 = 1 << 29;
        let held = self.stream.offset() / pack::LINE_BYTES as u64 * u64::from(FRAME_BLOCKS_MAX);
        StoreBlock(u32::try_from(held.max(ALWAYS)).unwrap_or(u32::MAX))
    }

    /// What a COMMIT says, once what came is compared with what it lists and with the commit that it follows; and the epoch that it ends.
    fn check_commit(&mut self, record: &ReadRecord) -> Result<EndedEpoch> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        // Until it shows that what came is what it lists.
        let has_unproved = std::mem::replace(&mut self.has_unproved, true);
        let before = std::mem::take(&mut self.last_commit);
        let ended = self.epoch.end(&record.header, &record.body).map_err(malformed)?;
        self.options.keys.check_current(&ended.commit).map_err(malformed)?;
        self.epoch = Epoch::new(Some(record.header.epoch), self.options.announces, &self.options.budget);
        let place_before = std::mem::replace(&mut self.last_place, ChainPlace::of(&ended.commit));
        if let Some(missing) = &ended.missing {
            let problem = format!("a {} record that its COMMIT lists did not come", missing.kind.name());
            self.note_damage(missing.offset, missing.length, &problem)?;
        }
        self.last_commit = record.header.body_hash;
        if ended.commit.previous.body_hash != before {
            let problem = "the COMMIT that this one follows did not come";
            self.note_damage(record.offset, record.header.body_bytes, problem)?;
        } else if before != [0; 32] && !place_before.is_followed_by(ChainPlace::of(&ended.commit)) {
            let problem = format!("a COMMIT {FOLLOWS_NOT}");
            self.note_damage(record.offset, record.header.body_bytes, &problem)?;
        } else {
            self.has_unproved = has_unproved;
        }
        Ok(ended)
    }

    /// The end of the offer by its COMMIT, which says whether its commit is the one that was asked for.
    fn take_commit(&mut self, record: &ReadRecord) -> Result<Option<Delivered>> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        let EndedEpoch {
            commit,
            listed,
            summaries,
            manifest,
            doubtful,
            missing: _,
        } = self.check_commit(record)?;
        self.hashes.fill_up_to(commit.store_end)?;
        let manifest = manifest.map_err(malformed)?;
        let committed = Committed {
            commit,
            location: CommitLocation {
                offset: record.offset,
                length: 0,
                body_hash: record.header.body_hash,
            },
            lane: record.header.lane,
            epoch: record.header.epoch,
            listed,
            ..Committed::default()
        };
        let is_last = match self.options.commit.as_deref() {
            None | Some("latest") => false,
            Some(name) if find_commit(std::slice::from_ref(&committed), name).is_some() => true,
            Some(_) => {
                return Ok(Some(Delivered {
                    committed: None,
                    is_last: false,
                }));
            }
        };
        self.is_damaged_since = false;
        let contents = Contents {
            manifest,
            commit: Some(CommitName {
                number: committed.commit.number,
                id: committed.id(),
                hash: committed.location.body_hash,
            }),
            summaries,
            doubtful,
            ..Contents::default()
        };
        Ok(Some(Delivered {
            committed: Some(Arc::new(contents)),
            is_last,
        }))
    }
}

/// The content of a frame of a PACK, compared with the hashes that are known of it. Hashes that are not are added to `made`.
fn content_of(
    frame: &FrameInfo,
    body: &[u8],
    (expected, hasher): (&[Option<Hash>], &BlockHasher),
    made: &Mutex<Vec<(StoreBlock, Vec<Hash>)>>,
) -> Decoded<Vec<u8>> {
    let content = frame.slice(body).and_then(|stored| frame.decode(stored))?;
    let hashes: Vec<Hash> = content.chunks_exact(BLOCK_LEN).map(|block| hasher.of(block)).collect();
    let mut pairs = hashes.iter().zip(expected);
    if pairs.any(|(hash, expected)| expected.is_some_and(|expected| expected != *hash)) {
        return Err("a block is not the one that the INDEX says".into());
    }
    if let (true, Ok(mut made)) = (expected.iter().any(Option::is_none), made.lock()) {
        made.push((frame.first, hashes));
    }
    Ok(content)
}

impl BlockSource for PipeSource<'_> {
    fn path(&self) -> &Path {
        &self.path
    }

    fn id(&self) -> LaneId {
        self.lane.unwrap_or_default()
    }

    /// Always the first one. Which commits there are is not known before they come, so one work folder serves for all of them.
    fn work_number(&self) -> CommitNumber {
        CommitNumber::FIRST
    }

    fn offer(&mut self) -> Result<Option<Offer>> {
        while let Some(record) = self.next_record()? {
            let (epoch, offset) = (record.header.epoch, record.offset);
            let result = match record.header.kind {
                // These follow the COMMIT of their epoch. They say nothing that is used.
                RecordKind::Pack | RecordKind::Commit if self.has_offered(epoch) => Ok(None),
                RecordKind::Pack | RecordKind::Commit => self.offer_of(&record),
                _ => self.take(&record, None).map(|()| None),
            };
            if let Some(offer) = self.unless_damaged(offset, result)? {
                self.offered = Some(OfferedEpoch {
                    id: epoch,
                    is_planned: !offer.contents.grows,
                });
                self.pending = Some(record);
                return Ok(Some(offer));
            }
        }
        Ok(None)
    }

    /// Hands over every block that comes, whatever is wanted, because it does not come again.
    fn deliver(&mut self, _: &[std::ops::Range<StoreBlock>], sink: &mut dyn BlockSink) -> Result<Delivered> {
        while let Some(record) = self.next_record()? {
            let offset = record.offset;
            let is_offered = self.has_offered(record.header.epoch);
            let result = match record.header.kind {
                RecordKind::Pack | RecordKind::Commit if !is_offered => {
                    self.pending = Some(record);
                    return Ok(Delivered {
                        committed: None,
                        is_last: false,
                    });
                }
                RecordKind::Pack => self.take_pack(&record, sink).map(|()| None),
                RecordKind::Commit => self.take_commit(&record),
                _ => self.take(&record, Some(&mut *sink)).map(|()| None),
            };
            if let Some(delivered) = self.unless_damaged(offset, result)? {
                return Ok(delivered);
            }
        }
        Ok(Delivered {
            committed: None,
            is_last: true,
        })
    }

    fn hashes(&mut self) -> &mut dyn BlockHashes {
        &mut self.hashes
    }

    fn knows_hashes(&self) -> bool {
        false
    }

    fn announces(&self) -> bool {
        self.offered.is_none_or(|offered| offered.is_planned)
    }

    fn nothing_committed(&self) -> Error {
        let path = self.path.clone();
        match (&self.options.commit, self.lane) {
            (Some(commit), Some(_)) if !self.is_damaged => Error::NoSuchCommit {
                path,
                commit: commit.clone(),
            },
            (_, None) if !self.is_damaged => Error::NotAnArchive { path },
            _ => Error::Damaged {
                path,
                range: None,
                problem: "it ends before its COMMIT".into(),
            },
        }
    }

    fn has_unproved_blocks(&self) -> bool {
        self.has_unproved || self.epoch.has_packs()
    }

    fn has_later_damage(&self) -> bool {
        let is_latest = self.options.commit.as_deref().is_none_or(|name| name == "latest");
        is_latest && self.is_damaged_since
    }
}

/// The hashes of the blocks that came so far: those of INDEXes and, until these come, those made of the blocks.
struct PipeHashes {
    keys: Arc<ArchiveKeys>,
    /// Of the blocks from 0 on.
    log: HashLog,
    /// Blocks before the end of the log whose hashes are not known, a list.
    unknown: Vec<Range<StoreBlock>>,
    /// The hashes of the blocks of frames, by the first block of each.
    made: BTreeMap<StoreBlock, Vec<Hash>>,
    /// How many hashes these are.
    made_blocks: usize,
    /// Blocks that came.
    received: u64,
}

impl PipeHashes {
    /// Remembers hashes of the blocks of frames, but only of those that were `taken`, a list: in place of the others stand blocks that came
    /// before them. Beyond [`MADE_BLOCKS_MAX`] they stay unknown, and what they would prove is read back.
    fn remember(&mut self, made: Vec<(StoreBlock, Vec<Hash>)>, taken: &[Range<StoreBlock>]) {
        for (first, hashes) in made {
            let end = first + u32::try_from(hashes.len()).unwrap_or(u32::MAX);
            for range in range::overlap(taken, first..end) {
                let its = &hashes[(range.start - first) as usize..(range.end - first) as usize];
                if self.made_blocks + its.len() > MADE_BLOCKS_MAX {
                    return;
                }
                let replaced = self.made.insert(range.start, its.to_vec());
                self.made_blocks += its.len();
                self.made_blocks -= replaced.map_or(0, |hashes| hashes.len());
            }
        }
    }

    fn made_of(&self, block: StoreBlock) -> Option<&Hash> {
        let (first, hashes) = self.made.range(..=block).next_back()?;
        hashes.get((block - *first) as usize)
    }

    /// Adds the hashes of an INDEX. Returns the blocks of which it proves what came no hash was made of, a list.
    ///
    /// # Errors
    /// Says that a block that came is another one than the INDEX has.
    fn add(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<Decoded<Vec<Range<StoreBlock>>>> {
        let pairs = || range::from(first).zip(hashes);
        if pairs().any(|(block, hash)| self.made_of(block).is_some_and(|made| made != hash)) {
            return Ok(Err("a block is not the one that the INDEX says".into()));
        }
        let unproved = range::where_true(pairs().map(|(block, _)| (block, self.made_of(block).is_none())));
        self.fill_up_to(first)?;
        if self.log.end() >= first
            && let Some(more) = hashes.get((self.log.end() - first) as usize..)
        {
            self.log.extend(more)?;
        }
        let end = self.log.end();
        self.made
            .retain(|first, hashes| *first + u32::try_from(hashes.len()).unwrap_or(u32::MAX) > end);
        self.made_blocks = self.made.values().map(Vec::len).sum();
        Ok(Ok(unproved))
    }

    /// Goes on to a store address with hashes that were made, as far as blocks came at all.
    fn fill_up_to(&mut self, end: StoreBlock) -> Result<()> {
        /// Hashes added at a time.
        const PART_BLOCKS: u32 = 4096;
        let first = self.log.end();
        if first >= end || u64::from(end - first) > self.received {
            return Ok(());
        }
        for part in range::parts(first..end, PART_BLOCKS) {
            let made: Vec<Option<Hash>> = range::each(part.clone())
                .map(|block| self.made_of(block).copied())
                .collect();
            let unknown = range::where_true(range::each(part).zip(made.iter().map(Option::is_none)));
            for range in unknown {
                range::push(&mut self.unknown, range);
            }
            self.log
                .extend(&made.into_iter().map(Option::unwrap_or_default).collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// The hashes of some blocks, as far as they are known.
    fn known_each(&self, blocks: Range<StoreBlock>) -> Result<Vec<Option<Hash>>> {
        let end = blocks.end.min(self.log.end());
        let mut hashes = Vec::new();
        if blocks.start < end {
            hashes.extend(self.log.read(blocks.start, end - blocks.start)?.into_iter().map(Some));
        }
        hashes.resize((blocks.end - blocks.start) as usize, None);
        for unknown in range::overlap(&self.unknown, blocks.clone()) {
            hashes[(unknown.start - blocks.start) as usize..(unknown.end - blocks.start) as usize].fill(None);
        }
        Ok(hashes)
    }

    /// The hashes of some blocks. It is empty unless all of them are known.
    fn known(&self, first: StoreBlock, blocks: u32) -> Result<Vec<Hash>> {
        let end = first.saturating_add(blocks);
        if end > self.log.end() || !range::overlap(&self.unknown, first..end).is_empty() {
            return Ok(Vec::new());
        }
        self.log.read(first, blocks)
    }
}

impl BlockHashes for PipeHashes {
    fn hasher(&self) -> BlockHasher {
        self.keys.hasher()
    }

    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        Ok(self.known(block, 1)?.first().copied())
    }

    fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool> {
        let end = first.saturating_add(blocks);
        if end > self.log.end() || !range::overlap(&self.unknown, first..end).is_empty() {
            return Ok(false);
        }
        for part in range::parts(first..end, HASHES_AT_ONCE) {
            digest.update(&self.log.read(part.start, part.end - part.start)?)?;
        }
        Ok(true)
    }
}
