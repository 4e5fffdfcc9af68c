//! Reads an archive that lies in a store: its commits, manifests, frames and hashes. What is not where it should be is found by its hash.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use super::announced::AnnouncedBlocks;
use super::commit::{Commit, CommitLocation, ListLocation, decode_tail};
use super::index;
use super::keys::{ArchiveKeys, KEYS_LOST, KeyRecord, Remember, Ring};
use super::lane::{LaneStore, ListedRecord};
use super::list::{self, ImageSummary, Listed, PART_IMAGES, PART_RECORDS, RecordLocation};
use super::manifest::{Manifest, ManifestBuilder, PlanPart, PlanRecord};
use super::newest_keys;
use super::open::{self, Opened, Searched};
use super::pack::{self, FrameInfo, PackTable};
use super::record::{
    BlockHasher, DecodedHeader, EpochId, HEADER_BYTES, Hash, LaneId, MAGIC, RecordHeader, RecordKind, SoughtRecord,
    find_magic, hash_of,
};
use super::seal::{EpochKeys, PackOpener, SALT_BYTES, TAG_BYTES};
use super::write_only::{self, OpenedToAdd};
use super::writer::EpochBase;
use crate::block::{BLOCK_LEN, ByteRange};
use crate::codec::Malformed;
use crate::error::{Error, Result};
use crate::numbers::{CommitNumber, StoreBlock};
use crate::range;
use crate::spill::Budget;
use crate::store::Store;

/// What to say where no record is missing, and runs or images are.
pub const MISSING_RUNS: &str = "its images and runs do not fit together, or lie behind its store";

/// A commit and where it is.
#[derive(Debug, Clone, Default)]
pub struct Committed {
    /// What it says. Of an epoch whose COMMIT is lost: what could be found out.
    pub commit: Commit,
    /// Where it is.
    pub location: CommitLocation,
    /// Its lane.
    pub lane: LaneId,
    /// The epoch that made it.
    pub epoch: EpochId,
    /// What it lists, but for its images.
    pub listed: Listed,
    /// Whether its COMMIT is lost, and only what its records say is known.
    pub salvaged: bool,
    /// Whether a later commit says that its images are no longer asked for.
    pub is_forgotten: bool,
}

impl Committed {
    /// Returns the name it can be asked for by: the first digits of its hash.
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
    /// The header of the damaged record, if that is whole.
    pub header: Option<RecordHeader>,
}

impl Damage {
    /// Makes one of a place of which nothing is known.
    pub fn at(range: ByteRange, problem: impl Into<String>) -> Self {
        Self {
            range,
            problem: problem.into(),
            header: None,
        }
    }
}

/// A frame, and where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocatedFrame {
    /// Where its bytes begin, in bytes from the file's beginning.
    pub offset: u64,
    /// What its PACK says of it.
    pub frame: FrameInfo,
    /// The header of its PACK.
    header: RecordHeader,
    /// Its place in the table.
    number: usize,
    /// The salt of its PACK; none if that is not sealed.
    salt: Option<[u8; SALT_BYTES]>,
}

/// The hash of a block, and who says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProvedHash {
    /// The hash that the newest INDEX has.
    pub hash: Hash,
    /// The first commit that lists an INDEX of the block.
    pub since: CommitNumber,
    /// Whether another INDEX has another hash.
    pub is_disputed: bool,
}

/// Reads records from a store, and proves them by their hashes.
#[derive(Debug)]
pub struct RecordReader {
    store: Arc<dyn Store>,
    length: u64,
    keys: Arc<ArchiveKeys>,
}

impl RecordReader {
    /// Makes one without keys.
    ///
    /// # Errors
    /// [`Error::Io`] if the store has no length.
    pub fn new(store: Arc<dyn Store>) -> Result<Self> {
        Self::with_keys(store, Arc::default())
    }

    fn with_keys(store: Arc<dyn Store>, keys: Arc<ArchiveKeys>) -> Result<Self> {
        let failed = |error| Error::io("look at", store.path())(error);
        let length = store.length().map_err(failed)?;
        let length = length.ok_or_else(|| failed(std::io::ErrorKind::Unsupported.into()))?;
        Ok(Self { store, length, keys })
    }

    /// Returns the store.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// Returns its length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Reads a header.
    ///
    /// # Errors
    /// [`Error::Damaged`], [`Error::Unsupported`], or the error of reading.
    pub fn header_at(&self, offset: u64) -> Result<RecordHeader> {
        match self.any_header_at(offset)? {
            DecodedHeader::Known(header) => Ok(header),
            DecodedHeader::Unsupported(record) => Err(self.unsupported(record.problem)),
        }
    }

    /// Reads the header of a record of which it is not known whether it is needed.
    ///
    /// # Errors
    /// [`Error::Damaged`] where there is none, or the error of reading.
    pub(super) fn any_header_at(&self, offset: u64) -> Result<DecodedHeader> {
        let mut bytes = [0; HEADER_BYTES];
        self.read_exact(offset, &mut bytes)?;
        RecordHeader::decode_any(&bytes).map_err(|problem| self.malformed(offset, problem))
    }

    /// Reads the header of a record that should be at a place.
    ///
    /// # Errors
    /// As for [`RecordReader::header_at`]; another record is damage, whatever it is.
    pub fn header_of(&self, offset: u64, sought: &SoughtRecord) -> Result<RecordHeader> {
        match self.any_header_at(offset)? {
            DecodedHeader::Known(header) if sought.is(&header) => Ok(header),
            DecodedHeader::Unsupported(record) if sought.is(&record.header) => Err(self.unsupported(record.problem)),
            _ => Err(self.problem(offset, "another record stands in its place")),
        }
    }

    /// Returns the keys of the archive.
    pub fn keys(&self) -> &ArchiveKeys {
        &self.keys
    }

    /// Reads a body, without its mask and its seal.
    ///
    /// # Errors
    /// [`Error::Damaged`] where it does not match its hash, or does not open; [`Error::NoKey`]; the error of reading.
    pub fn body_of(&self, offset: u64, header: &RecordHeader) -> Result<Vec<u8>> {
        let stored = self.stored_body_of(offset, header)?;
        self.keys.open_body(self.path(), offset, header, stored)
    }

    /// Reads a body as it is stored, without its mask.
    ///
    /// # Errors
    /// [`Error::Damaged`] where it does not match its hash, or the error of reading.
    pub fn stored_body_of(&self, offset: u64, header: &RecordHeader) -> Result<Vec<u8>> {
        let start = offset + HEADER_BYTES as u64;
        if header.body_bytes > self.length.saturating_sub(start) {
            return Err(self.problem(offset, "it ends in the middle of a record"));
        }
        let mut body = vec![0; usize::try_from(header.body_bytes).unwrap_or(usize::MAX)];
        self.read_exact(start, &mut body)?;
        if find_magic(&body).is_some() {
            return Err(self.problem(offset, "a record holds the beginning of another"));
        }
        header.apply_mask(0, &mut body);
        if hash_of(&body) != header.body_hash {
            return Err(self.problem(offset, "a record does not match its hash"));
        }
        Ok(body)
    }

    /// Reads a body where it should be, or, if it is not there, where a search found it.
    /// What stands from `end` on is not looked at: it may be what an export left, and the next one cuts it off.
    ///
    /// # Errors
    /// As for [`RecordReader::body_of`].
    pub fn body_by_hash(&self, sought: &SoughtRecord, (searched, end): (Option<&Searched>, u64)) -> Result<Vec<u8>> {
        let read = |offset| {
            if offset >= end {
                return Err(self.problem(offset, BEHIND));
            }
            self.body_of(offset, &self.header_of(offset, sought)?)
        };
        let error = match read(sought.offset) {
            Err(error @ Error::Damaged { .. }) => error,
            other => return other,
        };
        let Some(searched) = searched else { return Err(error) };
        match searched.place_of(sought.kind, &sought.body_hash) {
            Some(found) if found != sought.offset => read(found),
            _ => searched.check_supported(self, sought).and(Err(error)),
        }
    }

    /// Reads bytes as they are stored.
    ///
    /// # Errors
    /// [`Error::Damaged`] where there are less, or the error of reading.
    pub fn read_exact(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
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

    /// Returns the error of a record that is damaged.
    pub fn problem(&self, offset: u64, problem: &str) -> Error {
        let length = self.length.saturating_sub(offset).min(HEADER_BYTES as u64);
        Error::damaged(self.path(), offset, length, problem)
    }

    /// Returns the error of a record that cannot be decoded.
    pub fn malformed(&self, offset: u64, malformed: Malformed) -> Error {
        match malformed {
            Malformed::Damaged(problem) => self.problem(offset, problem),
            Malformed::Unsupported(problem) => self.unsupported(problem),
        }
    }

    /// Returns the error of an archive that needs what this version does not know.
    pub fn unsupported(&self, problem: &'static str) -> Error {
        Error::Unsupported {
            path: self.path().to_owned(),
            problem,
        }
    }

    /// Returns the error of a store in which no record is intact.
    pub fn nothing_intact(&self) -> Error {
        let mut start = [0; MAGIC.len()];
        if self.read_exact(0, &mut start).is_ok() && start == MAGIC {
            return Error::damaged(self.path(), 0, self.length, "none of its records is intact");
        }
        Error::NotAnArchive {
            path: self.path().to_owned(),
        }
    }
}

/// An archive.
#[derive(Debug)]
pub struct Archive {
    reader: RecordReader,
    opened: Opened,
    commits: Vec<Committed>,
    /// Commits whose images are no longer asked for. Later ones may need their records.
    forgotten: Vec<Committed>,
    lanes: BTreeMap<LaneId, LaneStore>,
    /// What a search from the beginning found, once there was need of one.
    searched: OnceLock<Searched>,
    /// Where records end that belong to commits.
    records_end: u64,
}

const BEHIND: &str = "a record stands behind the last COMMIT";

impl Archive {
    /// Opens an archive.
    ///
    /// # Errors
    /// Says that it is none, has no commit left, or needs a later version.
    pub fn open(store: Arc<dyn Store>) -> Result<Self> {
        Self::open_with(store, Arc::default())
    }

    /// Opens an archive that may be sealed.
    ///
    /// # Errors
    /// Those of [`Archive::open`] and [`Archive::open_any_with`].
    pub fn open_with(store: Arc<dyn Store>, keys: Arc<ArchiveKeys>) -> Result<Self> {
        let archive = Self::open_any_with(store, keys)?;
        if archive.commits().is_empty() {
            archive.searched()?.check_any_supported(&archive.reader)?;
            let problem = if archive.keys().ring().is_none() && archive.has_sealed_commits()? {
                KEYS_LOST
            } else if archive.damage().is_empty() {
                "it has no commit: the export that wrote it did not end"
            } else {
                "none of its commits is intact"
            };
            return Err(Error::damaged(archive.path(), 0, archive.length(), problem));
        }
        Ok(archive)
    }

    /// Opens an archive, which may have no commit.
    ///
    /// # Errors
    /// Says that it is none, or needs a later version.
    pub fn open_any(store: Arc<dyn Store>) -> Result<Self> {
        Self::open_any_with(store, Arc::default())
    }

    /// Opens an archive that may be sealed, and may have no commit.
    ///
    /// # Errors
    /// Those of [`Archive::open_any`]; [`Error::NoKey`] where there is no key, and those of [`super::keys::Unlock::unlock`].
    pub fn open_any_with(store: Arc<dyn Store>, keys: Arc<ArchiveKeys>) -> Result<Self> {
        let reader = RecordReader::with_keys(store, keys)?;
        let searched = OnceLock::new();
        let opened = match open::from_tail(&reader) {
            Err(Error::Damaged { .. }) => {
                let found = open::search(&reader)?;
                let opened = open::from_search(&reader, &found)?;
                searched.get_or_init(|| found);
                opened
            }
            other => other?,
        };
        if !opened.commits.is_empty() {
            reader.keys.check_sealed(reader.path())?;
        }
        open::check_current(&reader, &opened.commits)?;
        let archive = Self::of(reader, opened, searched)?;
        archive.remember()?;
        Ok(archive)
    }

    /// Tells what remembers archives in which state this one is.
    fn remember(&self) -> Result<()> {
        let commits = self.main_commits();
        self.keys().met(self.path(), commits, (None, false))
    }

    /// Opens a sealed archive with the ring of a host that may only write. Returns the newest KEY record as well.
    ///
    /// # Errors
    /// Those of [`write_only::open`].
    pub fn open_to_add(
        store: Arc<dyn Store>,
        ring: &Arc<Ring>,
        memory: Option<Arc<dyn Remember>>,
    ) -> Result<(Self, KeyRecord)> {
        let keys = ArchiveKeys::of_ring(Arc::clone(ring)).remembered_by(memory);
        let reader = RecordReader::with_keys(store, Arc::new(keys))?;
        let OpenedToAdd { opened, keys } = write_only::open(&reader, ring)?;
        let archive = Self::of(reader, opened, OnceLock::new())?;
        let number = (Some(keys.number), false);
        archive.keys().met(archive.path(), archive.main_commits(), number)?;
        Ok((archive, keys))
    }

    fn of(reader: RecordReader, mut opened: Opened, searched: OnceLock<Searched>) -> Result<Self> {
        let lanes = lanes_of(&opened.commits, reader.length).map_err(|problem| reader.malformed(0, problem))?;
        let commits = std::mem::take(&mut opened.commits);
        let (forgotten, commits) = commits.into_iter().partition(|one| one.is_forgotten);
        Ok(Self {
            records_end: opened.end.offset,
            reader,
            opened,
            commits,
            forgotten,
            lanes,
            searched,
        })
    }

    /// Returns whether something stands behind the last commit, and is nothing but what an export left that did not end. Then nothing tells
    /// that there ever was another commit.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn has_leftovers_only(&self) -> Result<bool> {
        let has_any = self.opened.end.offset < self.length() && !self.commits.is_empty();
        Ok(has_any && self.ends_in_leftovers_only()?)
    }

    /// Opens the newest keyring, if the archive is sealed, wherever it stands: what is written from now on is for those that it names. It must open
    /// the last commit: who can write to where the archive lies could otherwise put a keyring of his own there, for a recipient that he knows.
    ///
    /// # Errors
    /// Those of [`newest_keys::newest`] and [`ArchiveKeys::open`]; [`Error::Damaged`] where the last commit does not open.
    pub fn open_newest_keys(&self) -> Result<()> {
        let keys = &self.reader.keys;
        let (Some(_), Some(last)) = (keys.ring(), self.last_of_main()) else {
            return Ok(());
        };
        let Some(newest) = newest_keys::newest(&self.reader)? else {
            return Ok(());
        };
        keys.open(self.path(), &newest.record)?;
        let (header, stored) = self.commit_record(last)?;
        let proved = keys.prove_commit(&header, &stored);
        proved.map_err(|problem| self.reader.malformed(newest.offset, problem))?;
        let current = keys.check_current(&last.commit);
        current.map_err(|problem| self.reader.malformed(newest.offset, problem))?;
        // It may be another one than was open before.
        self.remember()
    }

    /// Adds what can be told of exports whose COMMIT is lost: of those whose final images are all there. What an export left that did not end is
    /// taken for one only where there is nothing else.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn salvage(&mut self) -> Result<()> {
        self.records_end = u64::MAX;
        let known = self.all_commits().map(|one| one.epoch).collect();
        let has_commits = self.all_commits().next().is_some();
        let end = if has_commits && self.ends_in_leftovers_only()? {
            self.opened.end.offset
        } else {
            self.length()
        };
        let found = super::salvage::salvage(&self.reader, self.searched()?, &known, end)?;
        let mut numbers: HashSet<(LaneId, CommitNumber)> =
            self.all_commits().map(|one| (one.lane, one.commit.number)).collect();
        let last = self.last_of_main().map(|last| (last.lane, last.commit.number));
        for committed in found {
            // An epoch that stands before the last commit comes before it, whatever number it says.
            let is_behind = committed.location.offset >= self.opened.end.offset;
            let comes_after =
                last.is_some_and(|(lane, number)| lane == committed.lane && committed.commit.number > number);
            if (is_behind || !comes_after) && numbers.insert((committed.lane, committed.commit.number)) {
                self.commits.push(committed);
            }
        }
        let main = self.opened.main;
        self.commits
            .sort_by_key(|one| (one.lane == main, one.lane, one.commit.number));
        let all: Vec<Committed> = self.all_commits().cloned().collect();
        self.lanes = lanes_of(&all, self.length()).map_err(|problem| self.reader.malformed(0, problem))?;
        Ok(())
    }

    fn all_commits(&self) -> impl Iterator<Item = &Committed> + Clone {
        self.forgotten.iter().chain(&self.commits)
    }

    fn searched(&self) -> Result<&Searched> {
        if self.searched.get().is_none() {
            let searched = open::search(&self.reader)?;
            return Ok(self.searched.get_or_init(|| searched));
        }
        Ok(self.searched.get_or_init(Searched::default))
    }

    /// Whether the archive was searched from its beginning.
    pub fn was_searched(&self) -> bool {
        self.searched.get().is_some()
    }

    /// Returns whether any COMMIT that a search from the beginning finds is sealed.
    fn has_sealed_commits(&self) -> Result<bool> {
        let mut records = self.searched()?.records.iter();
        Ok(records.any(|(header, _)| header.kind == RecordKind::Commit && header.seal.is_some()))
    }

    /// Returns the whole records that a search from the beginning finds, in the order they stand.
    pub(super) fn records_found(&self) -> Result<&[(RecordHeader, u64)]> {
        Ok(&self.searched()?.records)
    }

    /// Returns the kinds of records whose headers a search finds, and whose bodies are damaged.
    pub(super) fn broken_kinds(&self) -> Result<impl Iterator<Item = RecordKind>> {
        Ok(self.searched()?.broken.keys().map(|(kind, _)| *kind))
    }

    /// Returns what reads its records.
    pub(super) fn record_reader(&self) -> &RecordReader {
        &self.reader
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        self.reader.path()
    }

    /// Returns the keys of the archive.
    pub fn keys(&self) -> &Arc<ArchiveKeys> {
        &self.reader.keys
    }

    /// Returns what hashes blocks in this archive.
    pub fn hasher(&self) -> BlockHasher {
        self.reader.keys.hasher()
    }

    /// Returns the store that it lies in.
    pub fn store(&self) -> &dyn Store {
        self.reader.store()
    }

    /// Reads the COMMIT of a commit: its header, and its body as it is stored, without its mask.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn commit_record(&self, committed: &Committed) -> Result<(RecordHeader, Vec<u8>)> {
        let sought = committed.location.sought();
        let read = |offset| {
            let header = self.reader.header_of(offset, &sought)?;
            Ok((header, self.reader.stored_body_of(offset, &header)?))
        };
        match read(sought.offset) {
            Err(Error::Damaged { .. }) => {
                let found = self.searched()?.place_of(sought.kind, &sought.body_hash);
                read(found.unwrap_or(sought.offset))
            }
            other => other,
        }
    }

    /// Returns the lane of the commit that stands last.
    pub fn id(&self) -> LaneId {
        self.opened.main
    }

    /// Returns its length in bytes.
    pub fn length(&self) -> u64 {
        self.reader.length()
    }

    /// Returns whether a writer of this version may append.
    pub fn may_append(&self) -> bool {
        self.opened.may_append
    }

    /// Returns the commits that are not forgotten, by lane and number. The one that stands last in the archive is the last.
    pub fn commits(&self) -> &[Committed] {
        &self.commits
    }

    /// Returns the commits that are forgotten.
    pub fn forgotten(&self) -> &[Committed] {
        &self.forgotten
    }

    /// Returns the COMMITs and TAILs that belong to no commit of the archive, once it was searched.
    ///
    /// # Errors
    /// [`Error::Unsupported`], or the error of reading.
    pub fn stray_commits(&self) -> Result<Vec<Damage>> {
        self.searched()?.check_commits_supported(&self.reader)?;
        let known: HashMap<Hash, (LaneId, EpochId)> = self
            .all_commits()
            .map(|one| (one.location.body_hash, (one.lane, one.epoch)))
            .collect();
        let mut stray = Vec::new();
        let records = self.searched()?.records.iter();
        for (header, offset) in records {
            let is_led_to = match header.kind {
                RecordKind::Commit => known.get(&header.body_hash) == Some(&(header.lane, header.epoch)),
                RecordKind::Tail => {
                    let named = decode_tail(&self.reader.body_of(*offset, header)?);
                    named.is_ok_and(|location| known.contains_key(&location.body_hash))
                }
                _ => true,
            };
            if !is_led_to {
                let range = ByteRange {
                    start: *offset,
                    length: HEADER_BYTES as u64 + header.body_bytes,
                };
                let problem = format!("nothing leads to a {}, or it leads to none", header.kind.name());
                stray.push(Damage::at(range, problem));
            }
        }
        Ok(stray)
    }

    /// Fails if a commit lists a record of which a copy must be refused.
    ///
    /// # Errors
    /// [`Error::Unsupported`]; the error of reading.
    pub fn check_listed_supported(&self) -> Result<()> {
        let searched = self.searched()?;
        let mut listed = self.all_commits().flat_map(|one| {
            let records = one.listed.records.iter().map(RecordLocation::sought);
            records.chain(one.commit.lists.iter().map(ListLocation::sought))
        });
        listed.try_for_each(|sought| searched.check_supported(&self.reader, &sought))
    }

    /// Returns the commits of the lane that a writer goes on with, in order.
    pub fn main_commits(&self) -> &[Committed] {
        let main = self.opened.main;
        let first = self.commits.iter().position(|one| one.lane == main);
        first.map_or(&[], |first| &self.commits[first..])
    }

    /// Returns the last commit of the lane that a writer goes on with, forgotten or not.
    pub fn last_of_main(&self) -> Option<&Committed> {
        let own = self
            .all_commits()
            .filter(|one| one.lane == self.opened.main && !one.salvaged);
        own.max_by_key(|one| one.commit.number)
    }

    /// Returns the places that are known to be damaged. Only a search finds all of them: see [`Archive::look_for_damage`].
    pub fn damage(&self) -> Vec<Damage> {
        let searched = self.searched.get().map_or(&[][..], |searched| &searched.damage);
        let dead = self.dead_packs();
        let forgotten: HashSet<(LaneId, EpochId)> = self.forgotten.iter().map(|one| (one.lane, one.epoch)).collect();
        let may_be_missing = |header: &RecordHeader| match header.kind {
            RecordKind::Pack => dead.contains(&header.body_hash),
            RecordKind::List | RecordKind::Commit | RecordKind::Tail | RecordKind::Note => false,
            // What a forgotten commit lists.
            _ => forgotten.contains(&(header.lane, header.epoch)),
        };
        let all = searched.iter().chain(&self.opened.damage);
        let counts = all.filter(|damage| !damage.header.as_ref().is_some_and(may_be_missing));
        counts.cloned().collect()
    }

    /// Searches the archive for damage, if that was not done yet.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn look_for_damage(&self) -> Result<Vec<Damage>> {
        self.searched()?;
        Ok(self.damage())
    }

    /// The hashes of the PACKs of dead addresses, which need not be there.
    fn dead_packs(&self) -> HashSet<Hash> {
        let listed = self
            .all_commits()
            .flat_map(|one| one.listed.records.iter().map(move |record| (one, record)));
        let packs = listed.filter(|(_, record)| record.kind == RecordKind::Pack);
        let dead = packs.filter(|(committed, record)| self.is_dead(committed, &(record.first..record.end())));
        dead.map(|(_, record)| record.body_hash).collect()
    }

    /// Returns whether no PACK need hold the store addresses of a range, in the lane of a commit.
    pub fn is_dead(&self, committed: &Committed, range: &Range<StoreBlock>) -> bool {
        self.lanes.get(&committed.lane).is_some_and(|lane| lane.is_dead(range))
    }

    /// Returns whether a record stands at its very beginning, and what has no commit is of one epoch. Otherwise it may be a file that holds an
    /// archive.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn begins_with_record(&self) -> Result<bool> {
        let is_whole = match self.reader.header_at(0) {
            Ok(_) => true,
            Err(Error::Damaged { .. }) => false,
            Err(error) => return Err(error),
        };
        let Some(searched) = self.searched.get().filter(|_| self.last_of_main().is_none()) else {
            return Ok(is_whole);
        };
        let mut epochs = searched.records.iter().map(|(header, _)| (header.lane, header.epoch));
        let first = epochs.next();
        let is_one_epoch = epochs.all(|epoch| Some(epoch) == first);
        Ok(is_one_epoch && (is_whole || self.begins_with_torn_head(searched)?))
    }

    /// Whether the first records of the first export were not on disk when the power went, and what followed them was.
    fn begins_with_torn_head(&self, searched: &Searched) -> Result<bool> {
        /// Where more is missing, it is rather the image of a disk, which was named by mistake.
        const ZEROS_MAX: u64 = 1 << 20;
        let first = searched.records.first().map_or(u64::MAX, |(_, offset)| *offset);
        let range = ByteRange {
            start: 0,
            length: first,
        };
        Ok(first <= ZEROS_MAX && open::are_zeros(&self.reader, range)?)
    }

    /// Returns where a next epoch goes on.
    pub fn base(&self) -> EpochBase {
        let last = self.last_of_main();
        EpochBase {
            lane: self.opened.main,
            last_number: last.map_or_else(CommitNumber::default, |last| last.commit.number),
            last: last.map_or_else(CommitLocation::default, |last| last.location),
            sequence: self.opened.end.sequence,
            length: self.opened.end.offset,
            records: self.opened.end.records,
            store_end: last.map_or(StoreBlock(0), |last| last.commit.store_end),
        }
    }

    /// Returns other lanes as a next commit lists them: the last commit of each.
    pub fn other_lanes(&self) -> Vec<super::list::OtherLane> {
        let mut last: BTreeMap<LaneId, &Committed> = BTreeMap::new();
        for committed in self.all_commits().filter(|one| one.lane != self.opened.main) {
            let known = last.entry(committed.lane).or_insert(committed);
            if known.commit.number < committed.commit.number {
                *known = committed;
            }
        }
        let named = last.into_iter().map(|(lane, committed)| super::list::OtherLane {
            lane,
            number: committed.commit.number,
            location: committed.location,
        });
        named.collect()
    }

    /// Returns whether the TAIL of the last commit is there.
    pub fn has_tail(&self) -> bool {
        self.opened.end.has_tail
    }

    /// Returns whether the archive ends as an export that ended leaves it. Otherwise it was cut off, or an export did not end.
    pub fn is_ended(&self) -> bool {
        self.has_tail() && self.opened.end.offset == self.length()
    }

    /// Returns whether what stands behind the last commit is nothing but the beginning of an epoch that did not end. It is more where a
    /// commit names a COMMIT that should stand there.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn ends_in_leftovers_only(&self) -> Result<bool> {
        let end = self.opened.end;
        let is_named = self.opened.damage.iter().any(|lost| lost.range.start >= end.offset);
        Ok(!is_named && open::ends_in_leftovers_only(&self.reader, end)?)
    }

    /// Returns the commit that `name` means: its number, its label, the first digits of its hash, or the last one if there is none;
    /// `latest` is the last one, `previous` the one before in its lane.
    ///
    /// # Errors
    /// [`Error::NoSuchCommit`], or [`Error::Damaged`] where it may have been there.
    pub fn commit(&self, name: Option<&str>) -> Result<&Committed> {
        let found = match name {
            None | Some("latest") => self.commits.last(),
            Some("previous") => {
                let mut newest = self.commits.iter().rev();
                let lane = newest.next().map(|last| last.lane);
                newest.next().filter(|one| Some(one.lane) == lane)
            }
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

    /// Reads the images that a commit lists, and the places where LISTs of it are damaged.
    ///
    /// # Errors
    /// Returns the error of reading, or [`Error::Unsupported`].
    pub fn images(&self, committed: &Committed) -> Result<(Vec<ImageSummary>, Vec<Damage>)> {
        let (mut images, mut damage) = (Vec::new(), Vec::new());
        for list in committed.commit.lists.iter().filter(|list| list.part == PART_IMAGES) {
            let body = self.body_of_sought(&list.sought());
            let added = body.and_then(|body| {
                list::add_images(&mut images, &body).map_err(|problem| self.reader.malformed(list.offset, problem))
            });
            note_damage(added, list.sought().range(), &mut damage)?;
        }
        Ok((images, damage))
    }

    /// Reads the manifest of a commit, and the places where records of it are damaged. Where there are any, its images are as they were
    /// planned, and only those count whose digest is right.
    ///
    /// # Errors
    /// Says that what is intact contradicts itself; returns the error of reading, or [`Error::Unsupported`].
    pub fn manifest(&self, committed: &Committed, budget: &Budget) -> Result<(Manifest, Vec<Damage>)> {
        let mut damage = Vec::new();
        let mut manifest = self.manifest_of(committed, PlanPart::Final, budget, &mut damage)?;
        if !damage.is_empty() {
            let (summaries, lost_lists) = self.images(committed)?;
            let keep_listed = |manifest: &mut Manifest| {
                if lost_lists.is_empty() && !committed.salvaged {
                    manifest.keep_as_listed(&summaries, committed.commit.store_end);
                }
            };
            keep_listed(&mut manifest);
            // What is damaged there is only a help.
            match self.manifest_of(committed, PlanPart::Planned, budget, &mut Vec::new()) {
                Ok(mut planned) => {
                    keep_listed(&mut planned);
                    manifest.complete_from(planned);
                }
                Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let checked = manifest
            .check_names()
            .and_then(|()| manifest.check_below(committed.commit.store_end));
        checked.map_err(|problem| in_commit(self.reader.malformed(0, problem), &committed.location))?;
        Ok((manifest, damage))
    }

    fn manifest_of(
        &self,
        committed: &Committed,
        part: PlanPart,
        budget: &Budget,
        damage: &mut Vec<Damage>,
    ) -> Result<Manifest> {
        let mut builder = ManifestBuilder::new(budget);
        let known_damage = damage.len();
        for location in plans(committed, part) {
            let added = self.plan(committed, location, part).and_then(|plan| {
                let added = builder.add(plan.content());
                added.map_err(|problem| in_record(self.reader.malformed(location.offset, problem), location))
            });
            note_damage(added, location.sought().range(), damage)?;
        }
        let has_orphans = builder.has_orphans();
        let built = builder.finish();
        let is_lossy = |manifest: &Manifest| {
            let end = committed.commit.store_end;
            manifest
                .images
                .iter()
                .any(|image| image.is_incomplete() || !image.is_below(end))
        };
        if damage.len() == known_damage && (has_orphans || built.as_ref().is_ok_and(is_lossy)) {
            damage.push(Damage::at(committed.location.sought().range(), MISSING_RUNS));
        }
        built.map_err(|problem| in_commit(self.reader.malformed(0, problem), &committed.location))
    }

    /// Reads what is announced of the blocks of a commit's epoch. What is damaged is left out: it is only a help.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn announced(&self, committed: &Committed) -> Result<Vec<AnnouncedBlocks>> {
        let mut found = Vec::new();
        for location in plans(committed, PlanPart::Blocks) {
            let announced = self.plan(committed, location, PlanPart::Blocks).and_then(|plan| {
                let announced = plan.announced();
                announced.map_err(|problem| self.reader.malformed(location.offset, problem))
            });
            match announced {
                Ok(announced) => found.push(announced),
                Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    fn plan(&self, committed: &Committed, location: &RecordLocation, part: PlanPart) -> Result<PlanRecord> {
        let body = self.body(location)?;
        let plan = PlanRecord::decode(&body).map_err(|problem| self.reader.malformed(location.offset, problem))?;
        if plan.part != part {
            return Err(self
                .reader
                .problem(location.offset, "a PLAN is of another part than its COMMIT says"));
        }
        if plan.commit != committed.commit.number {
            return Err(self.reader.problem(location.offset, "a PLAN is of another commit"));
        }
        Ok(plan)
    }

    /// Returns the PACKs of a commit's lane that have store addresses of a range, the newest first. Those of later commits serve only
    /// blocks that an INDEX of the commit proves: see [`ListedRecord::commit`].
    pub fn packs(&self, committed: &Committed, wanted: Range<StoreBlock>) -> Vec<&ListedRecord> {
        self.lanes
            .get(&committed.lane)
            .map_or_else(Vec::new, |lane| lane.packs(wanted))
    }

    /// Reads the frames of a PACK, which its commit proves.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn frames(&self, pack: &RecordLocation) -> Result<Vec<LocatedFrame>> {
        let reader = &self.reader;
        let read = |offset: u64| -> Result<Vec<LocatedFrame>> {
            let header = reader.header_of(offset, &pack.sought())?;
            let body = offset + HEADER_BYTES as u64;
            let masked = |length: usize| {
                let mut part = vec![0; length];
                reader.read_exact(body, &mut part)?;
                header.apply_mask(0, &mut part);
                Ok(part)
            };
            let malformed = |problem| reader.malformed(offset, problem);
            let (table, salt) = if header.seal.is_some() {
                self.sealed_table(&header, &masked, &malformed)?
            } else {
                let fixed = masked(pack::FIXED_BYTES)?;
                let length = pack::table_bytes(&fixed).map_err(malformed)?;
                (masked(length)?, None)
            };
            let overhead = salt.map_or(0, |_| {
                PackOpener::overhead((table.len() - pack::FIXED_BYTES) / pack::LINE_BYTES)
            });
            let body_bytes = header.body_bytes.saturating_sub(overhead);
            let table = pack::decode_table(&table, body_bytes, Some(pack.first)).map_err(malformed)?;
            if table.hash != pack.table_hash || table.blocks != pack.blocks {
                return Err(reader.problem(offset, "a PACK is not the one that its COMMIT lists"));
            }
            let located = table
                .frames
                .into_iter()
                .enumerate()
                .map(|(number, frame)| LocatedFrame {
                    offset: body + frame.offset + salt.map_or(0, |_| PackOpener::shift_of(number)),
                    frame,
                    header,
                    number,
                    salt,
                });
            Ok(located.collect())
        };
        self.with_search(pack, read)
    }

    /// Reads the table of a sealed PACK, and the salt of the PACK. `read` reads so many bytes from the beginning of the body.
    fn sealed_table(
        &self,
        header: &RecordHeader,
        read: &dyn Fn(usize) -> Result<Vec<u8>>,
        malformed: &dyn Fn(Malformed) -> Error,
    ) -> Result<(Vec<u8>, Option<[u8; SALT_BYTES]>)> {
        let keys = self.epoch_keys(header).map_err(malformed)?;
        let beginning = read(PackOpener::BEGINNING)?;
        let opener = PackOpener::new(&keys, header, &beginning).map_err(malformed)?;
        let mut table = opener.fixed(&beginning).map_err(malformed)?;
        let lines = opener.lines(&table).map_err(malformed)?;
        let sealed = read(lines.end)?.split_off(lines.start);
        table.append(&mut opener.open_lines(sealed).map_err(malformed)?);
        Ok((table, beginning.first_chunk().copied()))
    }

    fn epoch_keys(&self, header: &RecordHeader) -> std::result::Result<Arc<EpochKeys>, Malformed> {
        if self.reader.keys.ring().is_none() {
            return Err(Malformed::Unsupported(super::keys::SEALED_IN_PART));
        }
        let keys = self.reader.keys.epoch(header.lane, header.epoch);
        keys.ok_or_else(|| "the keys of its epoch are lost".into())
    }

    /// Reads all of a PACK, and returns its body and its table, if it is intact.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn whole_pack(&self, pack: &RecordLocation) -> Result<(Vec<u8>, PackTable)> {
        let body = self.body(pack)?;
        let malformed = |problem| in_record(self.reader.malformed(pack.offset, problem), pack);
        let table = pack::decode_table(&body, body.len() as u64, Some(pack.first)).map_err(malformed)?;
        if table.hash != pack.table_hash || table.blocks != pack.blocks {
            return Err(malformed("a PACK is not the one that its COMMIT lists".into()));
        }
        pack::check_padding(&body, &table).map_err(malformed)?;
        Ok((body, table))
    }

    /// Reads all of a PACK, and returns the store addresses at which it holds what the INDEXes of a commit say. A frame in which they say
    /// something else of a block is no use: import takes frames as a whole.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn held_by(&self, committed: &Committed, pack: &RecordLocation) -> Result<Vec<Range<StoreBlock>>> {
        let (body, table) = self.whole_pack(pack)?;
        let hashes = self.hashes(committed, pack.first..pack.end())?;
        let hasher = self.hasher();
        let mut held = Vec::new();
        for frame in &table.frames {
            let decoded = frame.slice(&body).and_then(|stored| frame.decode(stored));
            let content = decoded.map_err(|problem| in_record(self.reader.malformed(pack.offset, problem), pack))?;
            let expected = &hashes[(frame.first - pack.first) as usize..];
            let pairs = || content.chunks_exact(BLOCK_LEN).zip(expected);
            if pairs().all(|(block, expected)| expected.is_none_or(|expected| expected == hasher.of(block))) {
                let is_known = pairs().map(|(_, expected)| expected.is_some());
                held.extend(range::where_true(range::from(frame.first).zip(is_known)));
            }
        }
        Ok(range::joined(held))
    }

    /// Reads the content of a frame. If it is damaged where it should be, another copy of its PACK serves, if a search finds one.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn frame(&self, located: &LocatedFrame) -> Result<Vec<u8>> {
        let LocatedFrame {
            offset,
            frame,
            header,
            number,
            salt,
        } = located;
        let tag_bytes = salt.map_or(0, |_| TAG_BYTES);
        let in_body = frame.offset + salt.map_or(0, |_| PackOpener::shift_of(*number));
        let read = |offset: u64, header: &RecordHeader| {
            let mut stored = vec![0; frame.stored_bytes as usize + tag_bytes];
            self.reader.read_exact(offset, &mut stored)?;
            header.apply_mask(in_body, &mut stored);
            let content = match salt {
                Some(salt) => self
                    .epoch_keys(header)
                    .and_then(|keys| PackOpener::new(&keys, header, salt))
                    .and_then(|opener| opener.open_frame(*number as u64, stored))
                    .and_then(|stored| frame.decode(&stored)),
                None => frame.decode(&stored),
            };
            content.map_err(|malformed| {
                let problem = malformed.problem();
                Error::damaged(self.path(), offset, frame.stored_bytes.into(), problem)
            })
        };
        let error = match read(*offset, header) {
            Err(error @ Error::Damaged { .. }) => error,
            other => return other,
        };
        match self.searched()?.place_of(header.kind, &header.body_hash) {
            Some(place) if place < self.records_end => {
                read(place + HEADER_BYTES as u64 + in_body, &self.reader.header_at(place)?)
            }
            _ => Err(error),
        }
    }

    /// Reads a block of a commit's lane from the first PACK that has it intact.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn block(&self, committed: &Committed, block: StoreBlock) -> Result<Option<Vec<u8>>> {
        for pack in self.packs(committed, block..block + 1) {
            let read = || -> Result<Option<Vec<u8>>> {
                let frames = self.frames(&pack.location)?;
                let has = |located: &&LocatedFrame| (located.frame.first..located.frame.end()).contains(&block);
                let Some(located) = frames.iter().find(has) else {
                    return Ok(None);
                };
                let content = self.frame(located)?;
                let at = (block - located.frame.first) as usize * BLOCK_LEN;
                Ok(Some(content[at..at + BLOCK_LEN].to_vec()))
            };
            match read() {
                Ok(None) | Err(Error::Damaged { .. }) => {}
                other => return other,
            }
        }
        Ok(None)
    }

    /// Reads the hashes of the blocks of a range of a commit's lane, as far as INDEXes that the commit proves have them intact.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn hashes(&self, committed: &Committed, wanted: Range<StoreBlock>) -> Result<Vec<Option<Hash>>> {
        let mut hashes = vec![None; range::length(&wanted) as usize];
        self.each_hash(committed, wanted, |place, hash, _| {
            hashes[place].get_or_insert(*hash);
        })?;
        Ok(hashes)
    }

    /// Reads the same hashes, and which commit is the first that proves each.
    ///
    /// # Errors
    /// Returns the error of reading.
    pub fn proved_hashes(&self, committed: &Committed, wanted: Range<StoreBlock>) -> Result<Vec<Option<ProvedHash>>> {
        let mut proved: Vec<Option<ProvedHash>> = vec![None; range::length(&wanted) as usize];
        self.each_hash(committed, wanted, |place, hash, since| {
            let known = proved[place].get_or_insert(ProvedHash {
                hash: *hash,
                since,
                is_disputed: false,
            });
            known.since = since;
            known.is_disputed |= known.hash != *hash;
        })?;
        Ok(proved)
    }

    /// Calls something with each hash that INDEXes have of blocks of a range, which a commit proves: with the block's place in the range,
    /// and the commit that lists the INDEX. The newest INDEX comes first.
    fn each_hash(
        &self,
        committed: &Committed,
        wanted: Range<StoreBlock>,
        mut call: impl FnMut(usize, &Hash, CommitNumber),
    ) -> Result<()> {
        let Some(lane) = self.lanes.get(&committed.lane) else {
            return Ok(());
        };
        let indexes = lane.indexes(wanted.clone());
        for listed in indexes
            .into_iter()
            .filter(|listed| listed.commit <= committed.commit.number)
        {
            let body = match self.body(&listed.location) {
                Ok(body) => body,
                Err(Error::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            let blocks = listed.location.first..listed.location.end();
            let Some(found) = index::hashes(&body)
                .ok()
                .filter(|found| found.len() == range::length(&blocks) as usize)
            else {
                continue;
            };
            for (block, hash) in range::each(blocks).zip(found) {
                if wanted.contains(&block) {
                    call((block - wanted.start) as usize, hash, listed.commit);
                }
            }
        }
        Ok(())
    }

    /// Reads the store addresses that a commit lists as used, a list.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn uses(&self, committed: &Committed) -> Result<Vec<Range<StoreBlock>>> {
        let mut uses = Vec::new();
        for list in committed.commit.lists.iter().filter(|list| list.part == PART_RECORDS) {
            let mut listed = Listed::default();
            let added = listed.add(&self.body_of_sought(&list.sought())?, committed.lane);
            added.map_err(|problem| self.reader.malformed(list.offset, problem))?;
            uses.append(&mut listed.uses);
        }
        Ok(range::joined(uses))
    }

    /// Reads the body of a record that a COMMIT lists.
    ///
    /// # Errors
    /// [`Error::Damaged`], or the error of reading.
    pub fn body(&self, location: &RecordLocation) -> Result<Vec<u8>> {
        let body = self.body_of_sought(&location.sought());
        body.map_err(|error| in_record(error, location))
    }

    fn body_of_sought(&self, sought: &SoughtRecord) -> Result<Vec<u8>> {
        let end = self.records_end;
        match self.reader.body_by_hash(sought, (None, end)) {
            Err(Error::Damaged { .. }) => self.reader.body_by_hash(sought, (Some(self.searched()?), end)),
            other => other,
        }
    }

    /// Reads a record where it should be or, if it is not there, where a search finds it.
    fn with_search<T>(&self, location: &RecordLocation, read: impl Fn(u64) -> Result<T>) -> Result<T> {
        let read = |offset| {
            if offset < self.records_end {
                read(offset)
            } else {
                Err(self.reader.problem(offset, BEHIND))
            }
        };
        let error = match read(location.offset) {
            Err(error @ Error::Damaged { .. }) => error,
            other => return other,
        };
        let searched = self.searched()?;
        searched.check_supported(&self.reader, &location.sought())?;
        let broken = searched.broken.get(&(location.kind, location.body_hash)).copied();
        let places = [searched.place_of(location.kind, &location.body_hash), broken];
        match places.into_iter().flatten().find(|offset| *offset != location.offset) {
            Some(offset) => read(offset),
            None => Err(in_record(error, location)),
        }
    }
}

fn lanes_of(commits: &[Committed], length: u64) -> std::result::Result<BTreeMap<LaneId, LaneStore>, Malformed> {
    let mut lanes: BTreeMap<LaneId, Vec<&Committed>> = BTreeMap::new();
    for committed in commits {
        lanes.entry(committed.lane).or_default().push(committed);
    }
    let stores = lanes
        .into_iter()
        .map(|(lane, own)| Ok((lane, LaneStore::new(&own, length)?)));
    stores.collect()
}

/// Damage of a record as damage of its place in the archive.
fn in_record(error: Error, location: &RecordLocation) -> Error {
    match error {
        Error::Damaged { path, problem, .. } => Error::Damaged {
            path,
            range: Some(location.sought().range()),
            problem: format!("{} record: {problem}", location.kind.name()),
        },
        other => other,
    }
}

/// Damage of what several records say as damage of their COMMIT.
fn in_commit(error: Error, location: &CommitLocation) -> Error {
    match error {
        Error::Damaged { path, problem, .. } => Error::Damaged {
            path,
            range: Some(location.sought().range()),
            problem,
        },
        other => other,
    }
}

/// Notes damage; any other error is returned.
///
/// # Errors
/// Returns the error.
pub fn note_damage(done: Result<()>, otherwise: ByteRange, damage: &mut Vec<Damage>) -> Result<()> {
    match done {
        Err(Error::Damaged { range, problem, .. }) => {
            damage.push(Damage::at(range.unwrap_or(otherwise), problem));
            Ok(())
        }
        other => other,
    }
}

/// Returns the damage of a COMMIT.
pub fn damage_of(location: &CommitLocation, problem: String) -> Damage {
    Damage::at(location.sought().range(), problem)
}

/// The PLANs of a part in the order of their numbers, which is that in which they were written.
fn plans(committed: &Committed, part: PlanPart) -> Vec<&RecordLocation> {
    let is_it = |record: &&RecordLocation| record.kind == RecordKind::Plan && record.part == part.number();
    let mut plans: Vec<&RecordLocation> = committed.listed.records.iter().filter(is_it).collect();
    plans.sort_by_key(|location| location.sequence);
    plans
}

/// Returns the commit that a name means: its number, its label, or the first digits of its hash; of several, the last.
pub fn find_commit<'a>(commits: &'a [Committed], name: &str) -> Option<&'a Committed> {
    /// Fewer digits could be meant as a number.
    const DIGITS_MIN: usize = 4;
    let by = |test: &dyn Fn(&Committed) -> bool| commits.iter().rev().find(|committed| test(committed));
    by(&|committed| name.parse() == Ok(committed.commit.number.0))
        .or_else(|| by(&|committed| committed.commit.label == name))
        .or_else(|| by(&|committed| name.len() >= DIGITS_MIN && committed.id().starts_with(name)))
}
