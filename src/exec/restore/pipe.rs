//! An archive that is read once and in order, as a source. Images are offered when the first PACK of their epoch comes. Every block is handed
//! over as it comes, and the hashes that follow prove it. Memory holds the manifest of one epoch and one record.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::source::{BlockHashes, BlockSink, BlockSource, Delivered, Offer, SourceFrame};
use crate::archive::commit::{Commit, CommitLocation};
use crate::archive::head::Head;
use crate::archive::index;
use crate::archive::manifest::{self, AnnouncedBlocks, ManifestBuilder, PlanPart};
use crate::archive::pack::{self, FrameInfo};
use crate::archive::reader::{Committed, find_commit};
use crate::archive::record::{Hash, RecordHeader, RecordKind, hash_of};
use crate::archive::stream::{Stream, StreamEvent};
use crate::block::{BLOCK_LEN, ByteRange};
use crate::error::{Error, Result, describe};
use crate::exec::hashes::{Digest, HashLog};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::{CommitName, Contents};
use crate::range;
use crate::store::{Store, StoreReader};

/// Blocks that seeds are searched for: 256 MiB of fingerprints, for 256 GiB of blocks. Those of later PLAN records are not searched for.
const ANNOUNCED_BLOCKS_MAX: usize = 1 << 26;
/// Frames of a PACK that are handed over together.
const FRAMES_AT_ONCE: usize = 8;
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
}

/// An archive that comes through a pipe.
pub struct PipeSource<'a> {
    stream: Stream<StoreReader<'a>>,
    path: PathBuf,
    options: PipeOptions,
    /// The identifier of the archive, once a record was read.
    archive: Option<[u8; 16]>,
    /// The epoch that the last record belongs to.
    epoch: Epoch,
    /// The number of the epoch whose images were offered last.
    offered: Option<u64>,
    /// A record that was read and is not used yet.
    pending: Option<ReadRecord>,
    hashes: PipeHashes,
    /// Whether anything was damaged.
    is_damaged: bool,
    /// Whether anything was damaged since the commit that was delivered last.
    is_damaged_since: bool,
    monitor: &'a dyn Monitor,
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
    fn malformed(&self, path: &Path, problem: &str) -> Error {
        Error::damaged(path, self.offset, self.header.body_bytes, problem)
    }
}

/// What the PLAN records of an epoch said so far.
#[derive(Default)]
struct Epoch {
    /// The random number that tells the epoch from others.
    number: u64,
    builder: ManifestBuilder,
    /// Fingerprints of the blocks, [`ANNOUNCED_BLOCKS_MAX`] at most, if anyone uses them.
    announced: Vec<AnnouncedBlocks>,
    /// The number of blocks that were announced.
    announced_blocks: usize,
    /// The store address after the last block that was announced.
    announced_end: StoreBlock,
    /// Whether a PLAN may be damaged.
    doubtful: bool,
}

impl<'a> PipeSource<'a> {
    /// Makes a source of a store, which is read from its beginning on.
    pub fn new(store: &'a dyn Store, options: PipeOptions, monitor: &'a dyn Monitor) -> Self {
        Self {
            stream: Stream::new(StoreReader::new(store, 0), 0),
            path: store.path().to_owned(),
            archive: None,
            epoch: Epoch::default(),
            offered: None,
            pending: None,
            hashes: PipeHashes {
                log: HashLog::new(StoreBlock(0), options.folder.clone()),
                has_all: true,
            },
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
                None => return Ok(None),
                Some(StreamEvent::Record { header, offset, body }) => {
                    if *self.archive.get_or_insert(header.archive) != header.archive {
                        self.note_damage(offset, 0, "a record of another archive")?;
                        continue;
                    }
                    if header.epoch != self.epoch.number {
                        self.epoch = Epoch {
                            number: header.epoch,
                            ..Epoch::default()
                        };
                    }
                    return Ok(Some(ReadRecord { header, offset, body }));
                }
                Some(StreamEvent::Damage { range, problem, header }) => {
                    self.epoch.doubtful |= header.is_none_or(|header| header.kind == RecordKind::Plan);
                    self.note_damage(range.start, range.length, problem)?;
                }
                Some(StreamEvent::Unsupported(problem)) => {
                    return Err(Error::Unsupported {
                        path: self.path.clone(),
                        problem,
                    });
                }
            }
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

    /// Takes what a record says that is neither a PACK nor a COMMIT.
    fn take(&mut self, record: &ReadRecord, sink: Option<&mut dyn BlockSink>) -> Result<()> {
        let path = self.path.clone();
        let malformed = |problem: &str| record.malformed(&path, problem);
        match record.header.kind {
            RecordKind::Head => {
                Head::decode(&record.body).map_err(|problem| Error::Unsupported {
                    path: path.clone(),
                    problem,
                })?;
            }
            RecordKind::Plan => match manifest::decode(&record.body).map_err(malformed)?.part {
                PlanPart::Blocks(announced) => self.epoch.announce(announced, self.options.announces),
                part => self.epoch.builder.add(part).map_err(malformed)?,
            },
            RecordKind::Index => {
                let (first, hashes) = index::decode(&record.body).map_err(malformed)?;
                self.hashes.add(first, hashes)?;
                if let Some(sink) = sink
                    && !sink.prove(first, hashes)?
                {
                    return Err(malformed("a block is not the one that the INDEX says"));
                }
            }
            // PACKs and COMMITs have methods of their own. All other records say nothing of images.
            _ => {}
        }
        Ok(())
    }

    /// The offer of the current epoch, whose first PACK or COMMIT is this record.
    fn offer_of(&self, record: &ReadRecord) -> Result<Option<Offer>> {
        let malformed = |problem: &str| record.malformed(&self.path, problem);
        let manifest = self.epoch.builder.clone().finish().map_err(malformed)?;
        if manifest.images.is_empty() && self.epoch.doubtful {
            return Err(malformed("what says which images its blocks are for is lost"));
        }
        let contents = Contents {
            manifest,
            doubtful: self.epoch.doubtful,
            ..Contents::default()
        };
        Ok(Some(Offer {
            contents: Arc::new(contents),
            announced: self.epoch.announced.clone(),
            known_end: self.epoch.announced_end,
        }))
    }

    /// Hands over the frames of a PACK. Damaged frames are left out, and the first of their errors is returned.
    fn take_pack(&mut self, record: &ReadRecord, sink: &mut dyn BlockSink) -> Result<()> {
        let path = self.path.clone();
        let malformed = |problem: &str| record.malformed(&path, problem);
        let frames = pack::decode_table(&record.body, record.body.len() as u64).map_err(malformed)?;
        let mut first_error = None;
        for frames in frames.chunks(FRAMES_AT_ONCE) {
            let mut batch = Vec::with_capacity(frames.len());
            for frame in frames {
                let blocks = frame.first..frame.first + u32::from(frame.blocks);
                let expected = self.hashes.known(blocks.start, u32::from(frame.blocks))?;
                let malformed = &malformed;
                batch.push(SourceFrame {
                    blocks,
                    content: Box::new(move || content_of(frame, &record.body, &expected).map_err(malformed)),
                });
            }
            for (_, error) in sink.take(&batch)? {
                first_error.get_or_insert(error);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// The end of the offer by its COMMIT, which says whether its commit is the one that was asked for.
    fn take_commit(&mut self, record: &ReadRecord) -> Result<Option<Delivered>> {
        let path = self.path.clone();
        let malformed = |problem: &str| record.malformed(&path, problem);
        let commit = Commit::decode(&record.body).map_err(malformed)?;
        let manifest = std::mem::take(&mut self.epoch.builder).finish().map_err(malformed)?;
        let location = CommitLocation {
            offset: record.offset,
            length: 0,
            body_hash: record.header.body_hash,
        };
        let committed = Committed {
            commit,
            location,
            salvaged: false,
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
                hash: location.body_hash,
            }),
            summaries: committed.commit.images,
            doubtful: self.epoch.doubtful,
        };
        Ok(Some(Delivered {
            committed: Some(Arc::new(contents)),
            is_last,
        }))
    }
}

impl Epoch {
    /// Counts announced blocks. Their fingerprints are kept if `keeps` says so and there is room for them.
    fn announce(&mut self, announced: AnnouncedBlocks, keeps: bool) {
        self.announced_end = self.announced_end.max(announced.end());
        self.announced_blocks += announced.fingerprints.len();
        if keeps && self.announced_blocks <= ANNOUNCED_BLOCKS_MAX {
            self.announced.push(announced);
        }
    }
}

/// The content of a frame of a PACK. It is compared with the hashes of its blocks, if these came before it.
fn content_of(frame: &FrameInfo, body: &[u8], expected: &[Hash]) -> std::result::Result<Vec<u8>, &'static str> {
    let content = frame.slice(body).and_then(|stored| frame.decode(stored))?;
    let mut pairs = content.chunks_exact(BLOCK_LEN).zip(expected);
    if pairs.any(|(block, expected)| *expected != hash_of(block)) {
        return Err("a block is not the one that the INDEX says");
    }
    Ok(content)
}

impl BlockSource for PipeSource<'_> {
    fn path(&self) -> &Path {
        &self.path
    }

    fn id(&self) -> [u8; 16] {
        self.archive.unwrap_or_default()
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
                RecordKind::Pack | RecordKind::Commit if self.offered == Some(epoch) => Ok(None),
                RecordKind::Pack | RecordKind::Commit => self.offer_of(&record),
                _ => self.take(&record, None).map(|()| None),
            };
            if let Some(offer) = self.unless_damaged(offset, result)? {
                self.offered = Some(epoch);
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
            let is_offered = self.offered == Some(record.header.epoch);
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

    fn nothing_committed(&self) -> Error {
        let path = self.path.clone();
        match (&self.options.commit, self.archive) {
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

    fn has_later_damage(&self) -> bool {
        let is_latest = self.options.commit.as_deref().is_none_or(|name| name == "latest");
        is_latest && self.is_damaged_since
    }
}

/// The hashes that came so far.
struct PipeHashes {
    log: HashLog,
    /// Whether all hashes came in order, without gaps.
    has_all: bool,
}

impl PipeHashes {
    /// Adds the hashes of an INDEX. Those that do not follow the last one are not kept.
    fn add(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<()> {
        if self.log.end() == first {
            return self.log.extend(hashes);
        }
        self.has_all = false;
        Ok(())
    }

    /// The hashes of some blocks. It is empty unless all of them came.
    fn known(&self, first: StoreBlock, blocks: u32) -> Result<Vec<Hash>> {
        if first.saturating_add(blocks) > self.log.end() {
            return Ok(Vec::new());
        }
        self.log.read(first, blocks)
    }
}

impl BlockHashes for PipeHashes {
    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        Ok(self.known(block, 1)?.first().copied())
    }

    fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool> {
        if !self.has_all || first.saturating_add(blocks) > self.log.end() {
            return Ok(false);
        }
        for part in range::parts(first..first + blocks, HASHES_AT_ONCE) {
            digest.update(self.log.read(part.start, part.end - part.start)?.as_flattened())?;
        }
        Ok(true)
    }
}
