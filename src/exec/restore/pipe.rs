//! An archive that is read once and in order, as a source. Images are offered when the first PACK of their epoch comes. Every block is handed
//! over as it comes, and the hashes that follow prove it. Memory holds the manifest of one epoch, one record, and hashes of at most 2^20 blocks.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::source::{BlockHashes, BlockSink, BlockSource, Delivered, Offer, SourceFrame};
use crate::archive::announced::AnnouncedBlocks;
use crate::archive::commit::{ChainPlace, Commit, CommitLocation, FOLLOWS_NOT};
use crate::archive::head::Head;
use crate::archive::index;
use crate::archive::limits::{
    FRAME_BLOCKS_MAX, IMAGES_MAX, LISTS_MAX, RECORDS_MAX, TEXT_BYTES_MAX, TEXT_OVERHEAD, USES_MAX,
};
use crate::archive::list::{self, ImageSummary, Listed};
use crate::archive::manifest::{Manifest, ManifestBuilder, PlanPart, PlanRecord};
use crate::archive::pack::{self, FrameInfo};
use crate::archive::reader::{Committed, find_commit};
use crate::archive::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind, hash_of};
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

/// Blocks that seeds are searched for: 256 MiB of fingerprints, for 256 GiB of blocks. Those of later PLAN records are not searched for.
const ANNOUNCED_BLOCKS_MAX: usize = 1 << 26;
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
}

/// An archive that comes through a pipe.
pub struct PipeSource<'a> {
    stream: Stream<StoreReader<'a>>,
    path: PathBuf,
    options: PipeOptions,
    /// The archive's lane, once a record was read.
    lane: Option<LaneId>,
    /// The epoch that the last record belongs to.
    epoch: Epoch,
    /// The epoch whose images were offered last.
    offered: Option<EpochId>,
    /// A record that was read and is not used yet.
    pending: Option<ReadRecord>,
    hashes: PipeHashes,
    /// The kind of the last record; none at the beginning, and once its end was noted.
    last_kind: Option<RecordKind>,
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

/// What the records of an epoch said so far.
struct Epoch {
    id: Option<EpochId>,
    /// The commit that its PLANs are for.
    planned_for: Option<CommitNumber>,
    /// Images as they were planned.
    planned: ManifestBuilder,
    /// Images as they are.
    last: ManifestBuilder,
    /// Fingerprints of the blocks, [`ANNOUNCED_BLOCKS_MAX`] at most, if anyone uses them.
    announced: Vec<AnnouncedBlocks>,
    /// The number of blocks that were announced.
    announced_blocks: usize,
    /// The store address after the last block that was announced.
    announced_end: StoreBlock,
    /// Records of kinds that a COMMIT lists, by their numbers.
    came: BTreeMap<u64, CameRecord>,
    /// LISTs, by the hashes of their bodies.
    lists: HashMap<Hash, CameList>,
    /// How much these have.
    listed: CameTotal,
    /// Whether a PLAN may be damaged.
    doubtful: bool,
}

/// How much all LISTs of an epoch have. A COMMIT may list as much.
#[derive(Default)]
struct CameTotal {
    records: usize,
    uses: usize,
    images: usize,
    text_bytes: usize,
}

impl CameTotal {
    fn add(&mut self, listed: &Listed, images: &[ImageSummary]) -> Decoded<()> {
        self.records += listed.records.len() + listed.forgotten.len() + listed.dead.len();
        self.uses += listed.uses.len();
        self.images += images.len();
        let text_of = |image: &ImageSummary| image.path.as_os_str().len() + TEXT_OVERHEAD;
        self.text_bytes += images.iter().map(text_of).sum::<usize>();
        if self.records > RECORDS_MAX
            || self.uses > USES_MAX
            || self.images > IMAGES_MAX
            || self.text_bytes > TEXT_BYTES_MAX
        {
            return Err("its LISTs have more than allowed".into());
        }
        Ok(())
    }
}

/// A LIST that came.
struct CameList {
    /// Bytes, header included.
    length: u64,
    part: u8,
    listed: Listed,
    images: Vec<ImageSummary>,
}

/// A record that came, to be compared with what its COMMIT lists.
struct CameRecord {
    kind: RecordKind,
    /// Bytes, header included.
    length: u64,
    body_hash: Hash,
    content: CameContent,
}

/// What a record that came holds, as a COMMIT lists it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CameContent {
    /// The part of a PLAN.
    part: u8,
    /// The store address that the blocks of a PACK or an INDEX were taken for.
    first: StoreBlock,
    /// Its blocks.
    blocks: u32,
    /// The hash of a PACK's table.
    table_hash: Hash,
}

impl<'a> PipeSource<'a> {
    /// Makes a source of a store, which is read from its beginning on.
    pub fn new(store: &'a dyn Store, options: PipeOptions, monitor: &'a dyn Monitor) -> Self {
        Self {
            stream: Stream::new(StoreReader::new(store, 0), 0),
            path: store.path().to_owned(),
            lane: None,
            epoch: Epoch::new(None, &options.budget),
            offered: None,
            pending: None,
            last_kind: None,
            hashes: PipeHashes {
                log: HashLog::new(StoreBlock(0), options.folder.clone()),
                unknown: Vec::new(),
                made: BTreeMap::new(),
                made_blocks: 0,
                received: 0,
            },
            last_commit: [0; 32],
            last_place: ChainPlace::default(),
            has_unproved: false,
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
                    if Some(header.epoch) != self.epoch.id {
                        self.has_unproved |= self.epoch.has_packs();
                        self.epoch = Epoch::new(Some(header.epoch), &self.options.budget);
                    }
                    return Ok(Some(ReadRecord { header, offset, body }));
                }
                Some(StreamEvent::Damage { range, problem, header }) => {
                    self.epoch.doubtful |= header.is_none_or(|header| header.kind == RecordKind::Plan);
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
    fn take(&mut self, record: &ReadRecord, mut sink: Option<&mut dyn BlockSink>) -> Result<()> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        let epoch = &mut self.epoch;
        match record.header.kind {
            RecordKind::Head => {
                Head::decode(&record.body).map_err(malformed)?;
                epoch.note(record, CameContent::default()).map_err(malformed)?;
            }
            RecordKind::Plan => {
                let plan = PlanRecord::decode(&record.body).map_err(malformed)?;
                if *epoch.planned_for.get_or_insert(plan.commit) != plan.commit {
                    return Err(malformed("PLANs of two commits are in one epoch".into()));
                }
                match plan.part {
                    PlanPart::Blocks => {
                        epoch.announce(plan.announced().map_err(malformed)?, self.options.announces);
                    }
                    PlanPart::Planned => epoch.planned.add(plan.content()).map_err(malformed)?,
                    PlanPart::Final => epoch.last.add(plan.content()).map_err(malformed)?,
                }
                let content = CameContent {
                    part: plan.part.number(),
                    ..CameContent::default()
                };
                epoch.note(record, content).map_err(malformed)?;
            }
            RecordKind::Index => {
                let (first, hashes) = index::decode(&record.body).map_err(malformed)?;
                let content = CameContent {
                    first,
                    blocks: u32::try_from(hashes.len()).unwrap_or(u32::MAX),
                    ..CameContent::default()
                };
                epoch.note(record, content).map_err(malformed)?;
                let unproved = self.hashes.add(first, hashes)?;
                self.has_unproved |= unproved.is_err();
                let unproved = unproved.map_err(malformed)?;
                for range in &unproved {
                    let hashes = &hashes[(range.start - first) as usize..(range.end - first) as usize];
                    if let Some(sink) = sink.as_deref_mut()
                        && !sink.prove(range.start, hashes)?
                    {
                        self.has_unproved = true;
                        return Err(malformed("a block is not the one that the INDEX says".into()));
                    }
                }
            }
            RecordKind::List => epoch.take_list(record).map_err(malformed)?,
            // PACKs and COMMITs have methods of their own. All other records say nothing of images.
            _ => {}
        }
        Ok(())
    }

    /// The offer of the current epoch, whose first PACK or COMMIT is this record.
    fn offer_of(&self, record: &ReadRecord) -> Result<Option<Offer>> {
        let malformed = |problem: Malformed| record.malformed(&self.path, problem);
        let manifest = self.epoch.planned.clone().finish().map_err(malformed)?;
        if manifest.images.is_empty() && self.epoch.doubtful {
            return Err(malformed("what says which images its blocks are for is lost".into()));
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
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        let table = pack::decode_table(&record.body, record.body.len() as u64, None).map_err(malformed)?;
        pack::check_padding(&record.body, &table).map_err(malformed)?;
        if table.first.saturating_add(table.blocks) > self.end_max() {
            return Err(malformed("it has blocks beyond what the archive can hold".into()));
        }
        let content = CameContent {
            part: 0,
            first: table.first,
            blocks: table.blocks,
            table_hash: table.hash,
        };
        self.epoch.note(record, content).map_err(malformed)?;
        let mut first_error = None;
        let made: Mutex<Vec<(StoreBlock, Vec<Hash>)>> = Mutex::new(Vec::new());
        let mut taken: Vec<Range<StoreBlock>> = Vec::new();
        for frames in table.frames.chunks(FRAMES_AT_ONCE) {
            let mut batch = Vec::with_capacity(frames.len());
            taken.extend(frames.iter().flat_map(|frame| sink.missing(frame.first..frame.end())));
            for frame in frames {
                let blocks = frame.first..frame.end();
                let expected = self.hashes.known_each(blocks.clone())?;
                let (malformed, made) = (&malformed, &made);
                batch.push(SourceFrame {
                    blocks,
                    content: Box::new(move || content_of(frame, &record.body, &expected, made).map_err(malformed)),
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
    fn check_commit(&mut self, record: &ReadRecord) -> Result<(Commit, Listed, Vec<ImageSummary>, Epoch)> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        // Until it shows that what came is what it lists.
        let has_unproved = std::mem::replace(&mut self.has_unproved, true);
        let before = std::mem::take(&mut self.last_commit);
        let commit = Commit::decode_of(&record.body, &record.header).map_err(malformed)?;
        let place_before = std::mem::replace(&mut self.last_place, ChainPlace::of(&commit));
        let (listed, summaries) = self.epoch.listed(&commit).map_err(malformed)?;
        listed.check_below(commit.store_end).map_err(malformed)?;
        if self.epoch.planned_for.is_some_and(|number| number != commit.number) {
            return Err(malformed("a PLAN is of another commit".into()));
        }
        let missing = self.epoch.compare(&listed, record.header.lane).map_err(malformed)?;
        let mut epoch = std::mem::replace(
            &mut self.epoch,
            Epoch::new(Some(record.header.epoch), &self.options.budget),
        );
        if let Some(missing) = missing {
            epoch.doubtful |= missing.kind == RecordKind::Plan;
            let problem = format!("a {} record that its COMMIT lists did not come", missing.kind.name());
            self.note_damage(missing.offset, missing.length, &problem)?;
        }
        self.last_commit = record.header.body_hash;
        if commit.previous.body_hash != before {
            let problem = "the COMMIT that this one follows did not come";
            self.note_damage(record.offset, record.header.body_bytes, problem)?;
        } else if before != [0; 32] && !place_before.is_followed_by(ChainPlace::of(&commit)) {
            let problem = format!("a COMMIT {FOLLOWS_NOT}");
            self.note_damage(record.offset, record.header.body_bytes, &problem)?;
        } else {
            self.has_unproved = has_unproved;
        }
        Ok((commit, listed, summaries, epoch))
    }

    /// The end of the offer by its COMMIT, which says whether its commit is the one that was asked for.
    fn take_commit(&mut self, record: &ReadRecord) -> Result<Option<Delivered>> {
        let path = self.path.clone();
        let malformed = |problem: Malformed| record.malformed(&path, problem);
        let (commit, listed, summaries, epoch) = self.check_commit(record)?;
        self.hashes.fill_up_to(commit.store_end)?;
        let doubtful = epoch.doubtful;
        let mut manifest = epoch.into_manifest(&summaries, commit.store_end).map_err(malformed)?;
        manifest.keep_listed(&summaries);
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
        };
        Ok(Some(Delivered {
            committed: Some(Arc::new(contents)),
            is_last,
        }))
    }
}

impl Epoch {
    fn new(id: Option<EpochId>, budget: &Budget) -> Self {
        Self {
            id,
            planned_for: None,
            planned: ManifestBuilder::new(budget),
            last: ManifestBuilder::new(budget),
            announced: Vec::new(),
            announced_blocks: 0,
            announced_end: StoreBlock(0),
            came: BTreeMap::new(),
            lists: HashMap::new(),
            listed: CameTotal::default(),
            doubtful: false,
        }
    }

    fn has_packs(&self) -> bool {
        self.came.values().any(|came| came.kind == RecordKind::Pack)
    }

    /// Counts announced blocks. Their fingerprints are kept if `keeps` says so and there is room for them.
    fn announce(&mut self, announced: AnnouncedBlocks, keeps: bool) {
        self.announced_end = self.announced_end.max(announced.end());
        self.announced_blocks += announced.fingerprints.len();
        if keeps && self.announced_blocks <= ANNOUNCED_BLOCKS_MAX {
            self.announced.push(announced);
        }
    }

    /// The images as they are; as they were planned, where records are lost.
    fn into_manifest(self, summaries: &[ImageSummary], store_end: StoreBlock) -> Decoded<Manifest> {
        let mut manifest = self.last.finish()?;
        if self.doubtful
            && let Ok(mut planned) = self.planned.finish()
        {
            manifest.keep_as_listed(summaries, store_end);
            planned.keep_as_listed(summaries, store_end);
            manifest.complete_from(planned);
            manifest.check_names()?;
        }
        manifest.check_below(store_end)?;
        Ok(manifest)
    }

    /// Notes a record that its COMMIT should list.
    fn note(&mut self, record: &ReadRecord, content: CameContent) -> Decoded<()> {
        let came = CameRecord {
            kind: record.header.kind,
            length: record.header.body_bytes + HEADER_BYTES as u64,
            body_hash: record.header.body_hash,
            content,
        };
        if self.came.len() >= RECORDS_MAX {
            return Err("an epoch has more records than allowed".into());
        }
        if self.came.insert(record.header.sequence, came).is_some() {
            return Err("two records have one number".into());
        }
        Ok(())
    }

    fn take_list(&mut self, record: &ReadRecord) -> Decoded<()> {
        if self.lists.len() >= LISTS_MAX {
            return Err("it has more LISTs than allowed".into());
        }
        if let Entry::Vacant(place) = self.lists.entry(record.header.body_hash) {
            let (mut listed, mut images) = (Listed::default(), Vec::new());
            let part = list::add_any(&mut listed, &mut images, &record.body, record.header.lane)?;
            self.listed.add(&listed, &images)?;
            let length = record.header.body_bytes + HEADER_BYTES as u64;
            place.insert(CameList {
                length,
                part,
                listed,
                images,
            });
        }
        Ok(())
    }

    /// What a COMMIT lists.
    fn listed(&mut self, commit: &Commit) -> Decoded<(Listed, Vec<ImageSummary>)> {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        for list in &commit.lists {
            let mut came = self
                .lists
                .remove(&list.body_hash)
                .ok_or("a LIST that its COMMIT names did not come")?;
            if (came.length, came.part) != (list.length, list.part) {
                return Err("a LIST came that is not the one that its COMMIT names".into());
            }
            listed.append(&mut came.listed);
            images.append(&mut came.images);
        }
        Ok((listed, images))
    }

    /// Compares what a COMMIT lists with what came. Returns a record that did not come, if there is one.
    ///
    /// # Errors
    /// Says that something came that the COMMIT does not list: it may have been used, and is not what was committed.
    fn compare(&mut self, listed: &Listed, lane: LaneId) -> Decoded<Option<list::RecordLocation>> {
        let mut missing = None;
        for record in &listed.records {
            let came = if record.lane == lane {
                self.came.remove(&record.sequence)
            } else {
                None
            };
            match came {
                Some(came) => {
                    let is_placed = record.kind.has_addresses();
                    let content = CameContent {
                        part: record.part,
                        first: if is_placed { record.first } else { StoreBlock(0) },
                        blocks: if is_placed { record.blocks } else { 0 },
                        table_hash: record.table_hash,
                    };
                    let what = (record.kind, record.length, record.body_hash);
                    if (came.kind, came.length, came.body_hash) != what || came.content != content {
                        return Err("a record came that is not the one that its COMMIT lists".into());
                    }
                }
                _ if matches!(record.kind, RecordKind::Other(_) | RecordKind::Note) => {}
                _ => missing = Some(*record),
            }
        }
        if self.came.is_empty() {
            Ok(missing)
        } else {
            Err("a record came that its COMMIT does not list".into())
        }
    }
}

/// The content of a frame of a PACK, compared with the hashes that are known of it. Hashes that are not are added to `made`.
fn content_of(
    frame: &FrameInfo,
    body: &[u8],
    expected: &[Option<Hash>],
    made: &Mutex<Vec<(StoreBlock, Vec<Hash>)>>,
) -> Decoded<Vec<u8>> {
    let content = frame.slice(body).and_then(|stored| frame.decode(stored))?;
    let hashes: Vec<Hash> = content.chunks_exact(BLOCK_LEN).map(hash_of).collect();
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
