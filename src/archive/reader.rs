//! Reads an archive that lies in a store: its commits, manifests, frames and hashes. Where its end or its directories are damaged, it is
//! searched from the beginning.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::commit::{Commit, CommitLocation, RecordLocation, decode_tail};
use super::head::Head;
use super::index;
use super::manifest::{self, AnnouncedBlocks, Manifest, ManifestBuilder, PlanPart};
use super::pack::{self, FrameInfo};
use super::record::{BadHeader, HEADER_BYTES, Hash, MAGIC, RecordHeader, RecordKind, hash_of};
use super::stream::{Stream, StreamEvent};
use super::writer::EpochBase;
use crate::block::ByteRange;
use crate::codec::Decoded;
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::numbers::{CommitNumber, StoreBlock};
use crate::range;
use crate::store::{Store, StoreReader};

const TOO_MANY_BLOCKS: &str = "a commit has more blocks than the archive can hold";

/// A commit and where it is.
#[derive(Debug, Clone)]
pub struct Committed {
    /// What it says. Of an epoch whose COMMIT is lost: what could be found out.
    pub commit: Commit,
    /// Where it is.
    pub location: CommitLocation,
    /// Whether its COMMIT is lost, and only what its records say is known.
    pub salvaged: bool,
}

impl Committed {
    /// The name it can be asked for by: the first digits of its hash.
    pub fn id(&self) -> String {
        self.location.body_hash[..4]
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }
}

/// A place in an archive that is not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Where.
    pub range: ByteRange,
    /// What.
    pub problem: String,
}

/// A frame, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocatedFrame {
    /// Where its bytes begin, in bytes from the archive's beginning.
    pub offset: u64,
    /// What its PACK says of it.
    pub frame: FrameInfo,
}

/// An archive.
#[derive(Debug)]
pub struct Archive {
    store: Arc<dyn Store>,
    length: u64,
    head: Head,
    id: [u8; 16],
    commits: Vec<Committed>,
    /// PACKs, by store address.
    packs: Vec<RecordLocation>,
    /// INDEXes, by store address.
    indexes: Vec<RecordLocation>,
    /// Behind the last commit's TAIL.
    end: (u64, u64),
    /// Whole records by the hash of their body, once the archive had to be searched.
    searched: OnceLock<Searched>,
}

/// What a search from the beginning found.
#[derive(Debug, Default)]
struct Searched {
    records: Vec<(RecordHeader, u64)>,
    by_hash: HashMap<Hash, u64>,
    damage: Vec<Damage>,
}

impl Archive {
    /// Opens an archive.
    ///
    /// # Errors
    /// If it is none, has no commit left, or needs a later version.
    pub fn open(store: Arc<dyn Store>) -> Result<Self> {
        let archive = Self::open_any(store)?;
        if archive.commits.is_empty() {
            let problem = if archive.damage().is_empty() {
                "it has no commit: the export that wrote it did not end"
            } else {
                "none of its commits is intact"
            };
            return Err(Error::damaged(archive.path(), 0, archive.length, problem));
        }
        Ok(archive)
    }

    /// The same, but an archive without a commit is none the worse.
    ///
    /// # Errors
    /// If it is no archive, or needs a later version.
    pub fn open_any(store: Arc<dyn Store>) -> Result<Self> {
        let failed = |error| Error::io("look at", store.path())(error);
        let length = store.length().map_err(failed)?;
        let length = length.ok_or_else(|| failed(std::io::ErrorKind::Unsupported.into()))?;
        Self::of(store, length)
    }

    fn of(store: Arc<dyn Store>, length: u64) -> Result<Self> {
        let mut archive = Self {
            store,
            length,
            head: Head::current(),
            id: [0; 16],
            commits: Vec::new(),
            packs: Vec::new(),
            indexes: Vec::new(),
            end: (0, 0),
            searched: OnceLock::new(),
        };
        match archive.open_from_tail() {
            Ok(()) => {}
            Err(error @ Error::Unsupported { .. }) => return Err(error),
            Err(_) => archive.open_by_searching()?,
        }
        let mut located: Vec<RecordLocation> = archive
            .commits
            .iter()
            .flat_map(|committed| committed.commit.records.iter().copied())
            .collect();
        located.sort_by_key(|location| location.first);
        archive.packs = located
            .iter()
            .filter(|one| one.kind == RecordKind::Pack)
            .copied()
            .collect();
        archive.indexes = located
            .iter()
            .filter(|one| one.kind == RecordKind::Index)
            .copied()
            .collect();
        Ok(archive)
    }

    /// From the TAIL along the chain of commits.
    fn open_from_tail(&mut self) -> Result<()> {
        let first = self.header_at(0)?;
        if first.kind != RecordKind::Head {
            return Err(self.problem(0, "it does not begin with a HEAD"));
        }
        self.id = first.archive;
        let body = self.body_of(0, &first)?;
        self.head = Head::decode(&body).map_err(|problem| self.unsupported(problem))?;
        let tail_length = HEADER_BYTES as u64 + RecordKind::Tail.body_bytes_max();
        let at = self
            .length
            .checked_sub(tail_length)
            .ok_or_else(|| self.problem(0, "it is too short"))?;
        let tail = self.header_at(at)?;
        if tail.kind != RecordKind::Tail || tail.archive != self.id {
            return Err(self.problem(at, "it does not end with its TAIL"));
        }
        let mut next = decode_tail(&self.body_of(at, &tail)?).map_err(|problem| self.problem(at, problem))?;
        self.end = (self.length, tail.sequence + 1);
        while next.length > 0 {
            let header = self.header_at(next.offset)?;
            if next.length != HEADER_BYTES as u64 + header.body_bytes {
                return Err(self.problem(next.offset, "a COMMIT has another length than it should have"));
            }
            if header.kind != RecordKind::Commit || header.body_hash != next.body_hash || header.archive != self.id {
                return Err(self.problem(next.offset, "a COMMIT is not where it should be"));
            }
            let commit = Commit::decode(&self.body_of(next.offset, &header)?)
                .map_err(|problem| self.problem(next.offset, problem))?;
            let previous = commit.previous;
            // Each begins before the one that follows it, so that this ends.
            if previous.length > 0 && previous.offset >= next.offset {
                return Err(self.problem(next.offset, "the chain of commits leads in a circle"));
            }
            if !self.can_hold(commit.store_end) {
                return Err(self.problem(next.offset, TOO_MANY_BLOCKS));
            }
            let span = commit.span().map_err(|problem| self.problem(next.offset, problem))?;
            if span.end > next.offset {
                return Err(self.problem(next.offset, "a record lies behind its COMMIT"));
            }
            self.commits.push(Committed {
                commit,
                location: next,
                salvaged: false,
            });
            next = previous;
        }
        self.commits.reverse();
        if (1u32..).zip(&self.commits).any(|(n, one)| one.commit.number.0 != n) || self.commits.is_empty() {
            return Err(self.problem(0, "its commits are not all there"));
        }
        Ok(())
    }

    /// From the beginning, record by record.
    fn open_by_searching(&mut self) -> Result<()> {
        self.commits.clear();
        let searched = self.searched()?;
        let Some((first, _)) = searched.records.first() else {
            return Err(self.nothing_intact());
        };
        let id = first.archive;
        let (mut commits, mut refused) = (Vec::new(), Vec::new());
        let (mut end, mut head) = ((0, 0), None);
        for (header, offset) in searched.records.iter().filter(|(header, _)| header.archive == id) {
            match header.kind {
                RecordKind::Head => {
                    let decoded = Head::decode(&self.body_of(*offset, header)?);
                    head = Some(decoded.map_err(|problem| self.unsupported(problem))?);
                }
                RecordKind::Commit => {
                    let location = CommitLocation {
                        offset: *offset,
                        length: HEADER_BYTES as u64 + header.body_bytes,
                        body_hash: header.body_hash,
                    };
                    match self.decode_commit(&self.body_of(*offset, header)?, location) {
                        Ok(found) => {
                            end = (location.offset + location.length, header.sequence + 1);
                            commits.push(found);
                        }
                        Err(problem) => refused.push((location, problem)),
                    }
                }
                RecordKind::Tail if end.0 == *offset => {
                    end = (offset + HEADER_BYTES as u64 + header.body_bytes, header.sequence + 1);
                }
                _ => {}
            }
        }
        commits.sort_by_key(|(committed, _)| committed.commit.number);
        // One that stands there twice counts once.
        commits.dedup_by_key(|(committed, _)| committed.commit.number);
        let mut before = 0;
        commits.retain(|(committed, span)| {
            let follows = before <= span.start;
            if follows {
                before = span.end;
            } else {
                refused.push((committed.location, "a commit takes records of another for its own"));
            }
            follows
        });
        self.id = id;
        self.head = head.unwrap_or_else(Head::current);
        self.commits = commits.into_iter().map(|(committed, _)| committed).collect();
        self.end = end;
        if let Some(searched) = self.searched.get_mut() {
            let refused = refused.into_iter().map(|(location, problem)| Damage {
                range: ByteRange {
                    start: location.offset,
                    length: location.length,
                },
                problem: problem.to_owned(),
            });
            searched.damage.extend(refused);
        }
        Ok(())
    }

    /// What to say of a store in which no record is intact.
    fn nothing_intact(&self) -> Error {
        let mut start = [0; MAGIC.len()];
        if self.read_at(0, &mut start).is_ok() && start == MAGIC {
            return Error::damaged(self.path(), 0, self.length, "none of its records is intact");
        }
        Error::NotAnArchive {
            path: self.path().to_owned(),
        }
    }

    /// A COMMIT that makes sense, with the bytes of the archive that its records span.
    fn decode_commit(&self, body: &[u8], location: CommitLocation) -> Decoded<(Committed, Range<u64>)> {
        let commit = Commit::decode(body)?;
        let span = commit.span()?;
        if !self.can_hold(commit.store_end) {
            return Err(TOO_MANY_BLOCKS);
        }
        let committed = Committed {
            commit,
            location,
            salvaged: false,
        };
        Ok((committed, span))
    }

    /// Adds what can be told of exports whose COMMIT is lost: of those that end with all of their corrections.
    ///
    /// # Errors
    /// Those of reading.
    pub fn salvage(&mut self) -> Result<()> {
        let mut epochs: HashMap<u64, Vec<(RecordHeader, u64)>> = HashMap::new();
        for (header, offset) in &self.searched()?.records {
            if header.archive == self.id {
                epochs.entry(header.epoch).or_default().push((*header, *offset));
            }
        }
        let known: HashSet<u64> = self
            .commits
            .iter()
            .filter_map(|committed| self.epoch_of(&committed.location))
            .collect();
        let mut numbers: HashSet<CommitNumber> = self.commits.iter().map(|committed| committed.commit.number).collect();
        let mut found = Vec::new();
        for (epoch, records) in epochs {
            if !known.contains(&epoch)
                && let Some(committed) = self.salvage_epoch(records)?
            {
                found.push(committed);
            }
        }
        for committed in found {
            for location in &committed.commit.records {
                let list = match location.kind {
                    RecordKind::Pack => &mut self.packs,
                    RecordKind::Index => &mut self.indexes,
                    _ => continue,
                };
                list.push(*location);
            }
            if numbers.insert(committed.commit.number) {
                self.commits.push(committed);
            }
        }
        self.commits.sort_by_key(|committed| committed.commit.number);
        self.packs.sort_by_key(|location| location.first);
        self.indexes.sort_by_key(|location| location.first);
        Ok(())
    }

    /// Whether so many blocks can be in an archive of this length: each frame takes a line of its PACK's table.
    fn can_hold(&self, blocks: StoreBlock) -> bool {
        const LINE_BYTES: u64 = 40;
        self.length / LINE_BYTES >= u64::from(blocks.0) / u64::from(pack::FRAME_BLOCKS_MAX)
    }

    fn epoch_of(&self, commit: &CommitLocation) -> Option<u64> {
        self.header_at(commit.offset).ok().map(|header| header.epoch)
    }

    /// What the records of an epoch without COMMIT say. None if its corrections may be incomplete: a block could be taken
    /// for another.
    fn salvage_epoch(&self, mut records: Vec<(RecordHeader, u64)>) -> Result<Option<Committed>> {
        records.sort_by_key(|(header, _)| header.sequence);
        records.dedup_by_key(|(header, _)| header.sequence);
        let mut commit = Commit {
            number: CommitNumber::default(),
            time: FileTime::default(),
            label: String::new(),
            root: PathBuf::new(),
            previous: CommitLocation::default(),
            store_end: StoreBlock(0),
            images: Vec::new(),
            records: Vec::new(),
        };
        let (mut corrected, mut before) = (false, None);
        for (header, offset) in &records {
            let body = self.body_of(*offset, header)?;
            let mut location = location_of(header, *offset);
            match header.kind {
                RecordKind::Plan => {
                    let Ok(plan) = manifest::decode(&body) else { continue };
                    commit.number = plan.commit;
                    location.part = plan.part.number();
                    if let PlanPart::Corrections(_) = plan.part {
                        let follows = before.is_some_and(|before| before + 1 == header.sequence);
                        corrected = plan.last && follows;
                        if !follows {
                            return Ok(None);
                        }
                    }
                    if let PlanPart::Blocks(announced) = plan.part {
                        location.first = announced.first;
                        location.blocks = u32::try_from(announced.fingerprints.len()).unwrap_or(u32::MAX);
                    }
                }
                RecordKind::Pack => {
                    let Ok(frames) = pack::decode_table(&body, header.body_bytes) else {
                        continue;
                    };
                    location.first = frames.first().map_or(StoreBlock(0), |frame| frame.first);
                    location.blocks = frames.iter().map(|frame| u32::from(frame.blocks)).sum();
                }
                RecordKind::Index => {
                    let Ok((first, hashes)) = index::decode(&body) else {
                        continue;
                    };
                    location.first = first;
                    location.blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
                }
                _ => {}
            }
            before = Some(header.sequence);
            commit.store_end = commit.store_end.max(location.first + location.blocks);
            commit.records.push(location);
        }
        let is_numbered = commit.number.is_allowed();
        Ok((corrected && is_numbered).then(|| Committed {
            commit,
            location: CommitLocation::default(),
            salvaged: true,
        }))
    }

    fn searched(&self) -> Result<&Searched> {
        if self.searched.get().is_none() {
            let searched = self.search()?;
            return Ok(self.searched.get_or_init(|| searched));
        }
        Ok(self.searched.get_or_init(Searched::default))
    }

    fn search(&self) -> Result<Searched> {
        let mut searched = Searched::default();
        let mut stream = Stream::new(StoreReader::new(&*self.store, 0), 0);
        while let Some(event) = stream.next_event().map_err(Error::io("read", self.path()))? {
            match event {
                StreamEvent::Record { header, offset, .. } => {
                    searched.by_hash.entry(header.body_hash).or_insert(offset);
                    searched.records.push((header, offset));
                }
                StreamEvent::Damage { range, problem, .. } => searched.damage.push(Damage {
                    range,
                    problem: problem.to_owned(),
                }),
                StreamEvent::Unsupported(problem) => return Err(self.unsupported(problem)),
            }
        }
        Ok(searched)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// Its identity.
    pub fn id(&self) -> [u8; 16] {
        self.id
    }

    /// Its length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// What the HEAD says.
    pub fn head(&self) -> &Head {
        &self.head
    }

    /// The commits, in order.
    pub fn commits(&self) -> &[Committed] {
        &self.commits
    }

    /// The places that a search found damaged; none if the archive did not have to be searched.
    pub fn damage(&self) -> &[Damage] {
        self.searched.get().map_or(&[], |searched| &searched.damage)
    }

    /// Searches the archive for damage, if that was not done yet.
    ///
    /// # Errors
    /// Those of reading.
    pub fn look_for_damage(&self) -> Result<&[Damage]> {
        Ok(&self.searched()?.damage)
    }

    /// Where a next epoch goes on.
    pub fn base(&self) -> EpochBase {
        let last = self.commits.last();
        EpochBase {
            archive: self.id,
            last_number: last.map_or_else(CommitNumber::default, |last| last.commit.number),
            last: last.map_or_else(CommitLocation::default, |last| last.location),
            sequence: self.end.1,
            length: self.end.0,
            store_end: last.map_or(StoreBlock(0), |last| last.commit.store_end),
        }
    }

    /// Whether what stands behind the last commit is nothing but the beginning of an epoch that did not end.
    ///
    /// # Errors
    /// Those of reading.
    pub fn ends_in_leftovers_only(&self) -> Result<bool> {
        let mut stream = Stream::new(StoreReader::new(&*self.store, self.end.0), self.end.0);
        let mut sequence = self.end.1;
        let mut broken = false;
        while let Some(event) = stream.next_event().map_err(Error::io("read", self.path()))? {
            let follows = match event {
                StreamEvent::Record { header, .. } => {
                    let follows = header.archive == self.id && header.sequence == sequence;
                    sequence += 1;
                    follows && header.kind != RecordKind::Commit && header.kind != RecordKind::Tail
                }
                // A torn record is the last thing there.
                StreamEvent::Damage { header, .. } => {
                    let last = !broken;
                    broken = true;
                    last && header.is_none_or(|header| header.kind != RecordKind::Commit)
                }
                StreamEvent::Unsupported(_) => false,
            };
            if !follows || (broken && stream.offset() < self.length) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The commit that `name` means: its number, its label, the first digits of its hash, or the last one if there is none;
    /// `latest` is the last one, `previous` the one before.
    ///
    /// # Errors
    /// [`Error::NoSuchCommit`], or [`Error::Damaged`] where it may have been there.
    pub fn commit(&self, name: Option<&str>) -> Result<&Committed> {
        let found = match name {
            None | Some("latest") => self.commits.last(),
            Some("previous") => self.commits.iter().nth_back(1),
            Some(name) => find_commit(&self.commits, name),
        };
        found.ok_or_else(|| {
            let commit = name.unwrap_or("latest").to_owned();
            match self.damage().first() {
                Some(damage) => Error::Damaged {
                    path: self.path().to_owned(),
                    range: Some(damage.range),
                    problem: format!("{}, and of what is intact nothing is commit `{commit}`", damage.problem),
                },
                None => Error::NoSuchCommit {
                    path: self.path().to_owned(),
                    commit,
                },
            }
        })
    }

    /// The manifest of a commit, and the places where records of it are damaged.
    ///
    /// # Errors
    /// Where what is intact contradicts itself.
    pub fn manifest(&self, committed: &Committed) -> Result<(Manifest, Vec<Damage>)> {
        let (mut builder, mut damage) = (ManifestBuilder::default(), Vec::new());
        for location in plans(committed).filter(|location| location.part != manifest::PART_BLOCKS) {
            match self.plan(location) {
                Ok(part) => builder
                    .add(part)
                    .map_err(|problem| self.problem(location.offset, problem))?,
                Err(Error::Damaged { range, problem, .. }) => damage.push(Damage {
                    range: range.unwrap_or(range_of(location)),
                    problem,
                }),
                Err(error) => return Err(error),
            }
        }
        let manifest = builder
            .finish()
            .map_err(|problem| self.problem(committed.location.offset, problem))?;
        let end = committed.commit.store_end;
        let beyond = |run: &crate::content::Run| matches!(run.content, crate::content::Content::Stored(first) if first.checked_add(run.blocks).is_none_or(|last| last > end));
        if manifest.images.iter().flat_map(|image| &image.runs).any(beyond) {
            return Err(self.problem(committed.location.offset, "a run refers to blocks that are not there"));
        }
        Ok((manifest, damage))
    }

    /// What is announced of the blocks of a commit's epoch. What is damaged is left out: it is only a help.
    ///
    /// # Errors
    /// Those of reading.
    pub fn announced(&self, committed: &Committed) -> Result<Vec<AnnouncedBlocks>> {
        let mut found = Vec::new();
        for location in plans(committed).filter(|location| location.part == manifest::PART_BLOCKS) {
            match self.plan(location) {
                Ok(PlanPart::Blocks(announced)) => found.push(announced),
                Ok(_) | Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn plan(&self, location: &RecordLocation) -> Result<PlanPart> {
        let body = self.body(location)?;
        let plan = manifest::decode(&body).map_err(|problem| self.problem(location.offset, problem))?;
        if plan.part.number() != location.part {
            return Err(self.problem(location.offset, "a PLAN is of another part than its COMMIT says"));
        }
        Ok(plan.part)
    }

    /// The PACKs that hold any of the store's addresses `first..end`, in order.
    pub fn packs(&self, first: StoreBlock, end: StoreBlock) -> impl Iterator<Item = &RecordLocation> {
        overlapping(&self.packs, first, end)
    }

    /// The frames of a PACK.
    ///
    /// # Errors
    /// [`Error::Damaged`] among others.
    pub fn frames(&self, pack: &RecordLocation) -> Result<Vec<LocatedFrame>> {
        let read = |offset: u64| -> Result<Vec<LocatedFrame>> {
            let header = self.header_at(offset)?;
            if header.body_hash != pack.body_hash {
                return Err(self.problem(offset, "another record stands in its place"));
            }
            let body = offset + HEADER_BYTES as u64;
            let mut fixed = [0; pack::FIXED_BYTES];
            self.read_at(body, &mut fixed)?;
            let length = pack::table_bytes(&fixed).map_err(|problem| self.problem(offset, problem))?;
            let mut table = vec![0; length];
            self.read_at(body, &mut table)?;
            let frames =
                pack::decode_table(&table, header.body_bytes).map_err(|problem| self.problem(offset, problem))?;
            let (first, blocks) = (
                frames.first().map(|frame| frame.first),
                frames.iter().map(|frame| u32::from(frame.blocks)).sum::<u32>(),
            );
            if first != Some(pack.first) || blocks != pack.blocks {
                return Err(self.problem(offset, "a PACK holds other blocks than its COMMIT says"));
            }
            let located = frames.into_iter().map(|frame| LocatedFrame {
                offset: body + frame.offset,
                frame,
            });
            Ok(located.collect())
        };
        self.with_search(pack, read)
    }

    /// The content of a frame.
    ///
    /// # Errors
    /// [`Error::Damaged`] among others.
    pub fn frame(&self, located: &LocatedFrame) -> Result<Vec<u8>> {
        let LocatedFrame { offset, frame } = located;
        let mut stored = vec![0; frame.stored_bytes as usize];
        self.read_at(*offset, &mut stored)?;
        frame
            .decode(&stored)
            .map_err(|problem| Error::damaged(self.path(), *offset, frame.stored_bytes.into(), problem))
    }

    /// The hashes of the blocks from `first` to `end`, as far as INDEXes have them intact.
    ///
    /// # Errors
    /// Those of reading.
    pub fn hashes(&self, first: StoreBlock, end: StoreBlock) -> Result<Vec<Option<Hash>>> {
        let mut hashes = vec![None; (end - first) as usize];
        for location in overlapping(&self.indexes, first, end) {
            let body = match self.body(location) {
                Ok(body) => body,
                Err(Error::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            let Ok((its_first, found)) = index::decode(&body) else {
                continue;
            };
            for (block, hash) in range::from(its_first)
                .zip(found)
                .filter(|(block, _)| (first..end).contains(block))
            {
                hashes[(block - first) as usize] = Some(*hash);
            }
        }
        Ok(hashes)
    }

    /// The body of a record that a COMMIT names.
    ///
    /// # Errors
    /// [`Error::Damaged`] among others.
    pub fn body(&self, location: &RecordLocation) -> Result<Vec<u8>> {
        self.with_search(location, |offset| {
            let header = self.header_at(offset)?;
            if header.body_hash != location.body_hash || header.kind != location.kind {
                return Err(self.problem(offset, "another record stands in its place"));
            }
            self.body_of(offset, &header)
        })
    }

    /// Reads a record where it should be or, if it is not there, where a search finds it.
    fn with_search<T>(&self, location: &RecordLocation, read: impl Fn(u64) -> Result<T>) -> Result<T> {
        let error = match read(location.offset) {
            Err(error @ Error::Damaged { .. }) => error,
            other => return other,
        };
        match self.searched()?.by_hash.get(&location.body_hash) {
            Some(offset) if *offset != location.offset => read(*offset),
            _ => Err(match error {
                Error::Damaged { problem, .. } => Error::Damaged {
                    path: self.path().to_owned(),
                    range: Some(range_of(location)),
                    problem: format!("{} record: {problem}", location.kind.name()),
                },
                other => other,
            }),
        }
    }

    fn header_at(&self, offset: u64) -> Result<RecordHeader> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_at(offset, &mut bytes)?;
        RecordHeader::decode(&bytes).map_err(|bad| match bad {
            BadHeader::Damaged(problem) => Error::damaged(self.path(), offset, HEADER_BYTES as u64, problem),
            BadHeader::Unsupported(problem) => self.unsupported(problem),
        })
    }

    fn body_of(&self, offset: u64, header: &RecordHeader) -> Result<Vec<u8>> {
        let start = offset + HEADER_BYTES as u64;
        if header.body_bytes > self.length.saturating_sub(start) {
            return Err(self.problem(offset, "it ends in the middle of a record"));
        }
        let mut body = vec![0; usize::try_from(header.body_bytes).unwrap_or(usize::MAX)];
        self.read_at(start, &mut body)?;
        if hash_of(&body) != header.body_hash {
            return Err(self.problem(offset, "a record does not match its hash"));
        }
        Ok(body)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        if offset.saturating_add(buffer.len() as u64) > self.length {
            return Err(self.problem(offset, "it ends too early"));
        }
        match self.store.read_exact_at(offset, buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                Err(self.problem(offset, "it ends too early"))
            }
            other => other.map_err(Error::io_at("read", self.path(), offset, buffer.len() as u64)),
        }
    }

    fn problem(&self, offset: u64, problem: &str) -> Error {
        Error::damaged(
            self.path(),
            offset,
            self.length.saturating_sub(offset).min(HEADER_BYTES as u64),
            problem,
        )
    }

    fn unsupported(&self, problem: &'static str) -> Error {
        Error::Unsupported {
            path: self.path().to_owned(),
            problem,
        }
    }
}

/// Where a record is, and nothing of what it holds.
fn location_of(header: &RecordHeader, offset: u64) -> RecordLocation {
    RecordLocation {
        kind: header.kind,
        part: 0,
        sequence: header.sequence,
        offset,
        length: HEADER_BYTES as u64 + header.body_bytes,
        first: StoreBlock(0),
        blocks: 0,
        body_hash: header.body_hash,
    }
}

/// Where a record stands.
pub fn range_of(location: &RecordLocation) -> ByteRange {
    ByteRange {
        start: location.offset,
        length: location.length,
    }
}

fn plans(committed: &Committed) -> impl Iterator<Item = &RecordLocation> {
    committed
        .commit
        .records
        .iter()
        .filter(|location| location.kind == RecordKind::Plan)
}

fn overlapping(sorted: &[RecordLocation], first: StoreBlock, end: StoreBlock) -> impl Iterator<Item = &RecordLocation> {
    // A hostile archive may have records that overlap; then this starts too late, and blocks are missing.
    let from = sorted.partition_point(|location| location.first + location.blocks <= first);
    sorted[from..]
        .iter()
        .take_while(move |location| location.first < end)
        .filter(move |location| location.first + location.blocks > first)
}

/// The commit that a name means: its number, its label, or the first digits of its hash; of several, the last.
pub fn find_commit<'a>(commits: &'a [Committed], name: &str) -> Option<&'a Committed> {
    /// Fewer digits could be meant as a number.
    const DIGITS_MIN: usize = 4;
    let by = |test: &dyn Fn(&Committed) -> bool| commits.iter().rev().find(|committed| test(committed));
    by(&|committed| name.parse() == Ok(committed.commit.number.0))
        .or_else(|| by(&|committed| committed.commit.label == name))
        .or_else(|| by(&|committed| name.len() >= DIGITS_MIN && committed.id().starts_with(name)))
}
