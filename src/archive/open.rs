//! Finds the commits of an archive: from its TAIL along the chains of commits or, where anything of that is damaged, by searching it.

use std::io::Read;

use std::collections::{BTreeMap, HashMap, HashSet};

use super::commit::{ChainPlace, Commit, CommitLocation, FOLLOWS_NOT, decode_tail};
use super::head::Head;
use super::keys::KeyRecord;
use super::limits::{OTHER_LANES_MAX, RECORDS_MAX};
use super::list::{Listed, OtherLane, PART_RECORDS};
use super::newest_keys::newest_of;
use super::reader::{Committed, Damage, RecordReader, damage_of};
use super::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind, SoughtRecord, UnsupportedRecord};
use super::sealed_end;
use super::stream::{Stream, StreamEvent};
use crate::block::ByteRange;
use crate::codec::{Decoded, Malformed};
use crate::error::{Error, Result};
use crate::numbers::CommitNumber;
use crate::store::StoreReader;

/// Zeros at the beginning or the end of a record by which it may be a write that did not end.
const ZEROS: usize = 8;
/// Bytes that are compared with zeros at a time.
const SEARCH_BYTES: usize = 64 << 10;

/// The commits of an archive, and where they end.
#[derive(Debug)]
pub struct Opened {
    /// By lane, the main one last, and then by number.
    pub commits: Vec<Committed>,
    /// The lane of the commit that stands last.
    pub main: LaneId,
    /// Where the last commit ends.
    pub end: End,
    /// Whether a writer of this version may append.
    pub may_append: bool,
    /// What is wrong with COMMITs and what they list.
    pub damage: Vec<Damage>,
}

/// Where the last commit ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct End {
    /// Bytes of the file up to there.
    pub offset: u64,
    /// The number of the next record of the main lane.
    pub sequence: u64,
    /// Records of the file up to there, at least.
    pub records: usize,
    /// Whether a TAIL stands there, so that nothing of the commit is missing.
    pub has_tail: bool,
}

/// What a search from the beginning found.
#[derive(Debug, Default)]
pub struct Searched {
    /// Whole records, in the order they stand.
    pub records: Vec<(RecordHeader, u64)>,
    /// The records by their kinds and the hashes of their bodies, and those of one hash in the order they stand. A map would take eight times as much.
    by_hash: Vec<u32>,
    /// Where records begin whose header is whole and whose body is not, by their kinds and the hashes that the bodies should have.
    pub broken: HashMap<(RecordKind, Hash), u64>,
    /// Records that must be refused where they are needed, in the order of their kinds and the hashes of their bodies.
    pub unsupported: Vec<UnsupportedRecord>,
    /// What is no record.
    pub damage: Vec<Damage>,
}

/// Reads all of an archive.
///
/// # Errors
/// Returns the error of reading, or says that there are more records than allowed.
pub fn search(reader: &RecordReader) -> Result<Searched> {
    let mut searched = Searched::default();
    let mut stream = Stream::new(StoreReader::new(reader.store(), 0).take(reader.length()), 0);
    // The epoch whose COMMIT came, and zeros since then.
    let (mut committed, mut zeros) = (None, None);
    while let Some(event) = stream.next_event().map_err(Error::io("read", reader.path()))? {
        match event {
            StreamEvent::Record { header, offset, .. } => {
                // Of a commit's copies, those that were not on disk when the power went are zeros.
                searched
                    .damage
                    .extend(zeros.take().filter(|_| committed != Some(header.epoch)));
                if header.kind == RecordKind::Commit {
                    committed = Some(header.epoch);
                } else if committed != Some(header.epoch) {
                    committed = None;
                }
                searched.records.push((header, offset));
            }
            StreamEvent::Damage { range, problem, header } => {
                let damage = Damage {
                    range,
                    problem: problem.to_owned(),
                    header,
                };
                if let Some(header) = header.filter(|_| searched.broken.len() < RECORDS_MAX) {
                    searched.broken.entry(key_of(&header)).or_insert(range.start);
                }
                if header.is_none() && committed.is_some() && are_zeros(reader, range)? {
                    zeros = Some(damage);
                } else {
                    searched.note(damage);
                }
            }
            StreamEvent::Unsupported(record) => searched.unsupported.push(record),
        }
        if searched.records.len() + searched.unsupported.len() > RECORDS_MAX {
            return Err(reader.problem(stream.offset(), "it has more records than allowed"));
        }
    }
    searched.damage.extend(zeros);
    searched.unsupported.sort_by_key(|record| key_of(&record.header));
    let Searched { records, by_hash, .. } = &mut searched;
    by_hash.extend(0..u32::try_from(records.len()).unwrap_or(u32::MAX));
    by_hash.sort_unstable_by_key(|place| (key_of(&records[*place as usize].0), *place));
    Ok(searched)
}

impl Searched {
    /// Returns where the first whole record of a kind with a body of a hash begins.
    pub fn place_of(&self, kind: RecordKind, body_hash: &Hash) -> Option<u64> {
        let key_at = |place: &u32| key_of(&self.records[*place as usize].0);
        let wanted = (kind, *body_hash);
        let at = self.by_hash.partition_point(|place| key_at(place) < wanted);
        let place = self.by_hash.get(at).filter(|place| key_at(place) == wanted)?;
        Some(self.records[*place as usize].1)
    }

    /// Fails if what was looked for is a record that must be refused.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check_supported(&self, reader: &RecordReader, sought: &SoughtRecord) -> Result<()> {
        let wanted = (sought.kind, sought.body_hash);
        let found = self
            .unsupported
            .binary_search_by_key(&wanted, |record| key_of(&record.header));
        found.map_or(Ok(()), |place| Err(reader.unsupported(self.unsupported[place].problem)))
    }

    /// Fails if a record must be refused that tells which commits there are.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check_commits_supported(&self, reader: &RecordReader) -> Result<()> {
        refuse_first(reader, &self.unsupported, tells_of_commit)
    }

    /// Returns the whole KEY records, with where they begin.
    pub fn keys(&self) -> impl Iterator<Item = (RecordHeader, u64)> {
        let is_key = |(header, _): &&(RecordHeader, u64)| header.kind == RecordKind::Key;
        self.records.iter().filter(is_key).copied()
    }

    /// Fails if a KEY record is damaged, or must be refused: it may be the newest.
    ///
    /// # Errors
    /// [`Error::Damaged`]; [`Error::Unsupported`].
    pub fn check_keys_intact(&self, reader: &RecordReader) -> Result<()> {
        refuse_first(reader, &self.unsupported, |kind| kind == RecordKind::Key)?;
        let mut broken = self.broken.iter();
        match broken.find(|((kind, _), _)| *kind == RecordKind::Key) {
            Some((_, offset)) => Err(reader.problem(*offset, "a KEY record is damaged, which may be the newest")),
            None => Ok(()),
        }
    }

    /// Fails if any record must be refused.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check_any_supported(&self, reader: &RecordReader) -> Result<()> {
        refuse_first(reader, &self.unsupported, |_| true)
    }

    /// Notes damage. Beyond a number of places that nobody reads, it is one place.
    fn note(&mut self, damage: Damage) {
        const PLACES_MAX: usize = 10_000;
        let count = self.damage.len();
        match self.damage.last_mut() {
            Some(last) if count >= PLACES_MAX => {
                last.range.length = (damage.range.start + damage.range.length).saturating_sub(last.range.start);
                last.header = None;
                "very many places are damaged".clone_into(&mut last.problem);
            }
            _ => self.damage.push(damage),
        }
    }
}

/// What a record is looked for by.
fn key_of(header: &RecordHeader) -> (RecordKind, Hash) {
    (header.kind, header.body_hash)
}

fn refuse_first(
    reader: &RecordReader,
    records: &[UnsupportedRecord],
    is_needed: impl Fn(RecordKind) -> bool,
) -> Result<()> {
    let first = records.iter().find(|record| is_needed(record.header.kind));
    first.map_or(Ok(()), |record| Err(reader.unsupported(record.problem)))
}

/// Whether a record of a kind tells that there was a commit.
fn tells_of_commit(kind: RecordKind) -> bool {
    matches!(kind, RecordKind::Commit | RecordKind::Tail)
}

/// Returns whether a range holds nothing but zeros.
///
/// # Errors
/// Returns the error of reading.
pub fn are_zeros(reader: &RecordReader, range: ByteRange) -> Result<bool> {
    let mut buffer = vec![0; SEARCH_BYTES];
    let (mut at, end) = (range.start, range.start + range.length);
    while at < end {
        let length = usize::try_from(end - at).unwrap_or(usize::MAX).min(SEARCH_BYTES);
        let part = &mut buffer[..length];
        reader.read_exact(at, part)?;
        if part.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += length as u64;
    }
    Ok(true)
}

/// Opens from the TAIL.
///
/// # Errors
/// Says what is damaged, so that the archive has to be searched; [`Error::Unsupported`]; the error of reading.
pub fn from_tail(reader: &RecordReader) -> Result<Opened> {
    let tail_bytes = HEADER_BYTES as u64 + RecordKind::Tail.body_bytes_max();
    let at = reader
        .length()
        .checked_sub(tail_bytes)
        .ok_or_else(|| reader.problem(0, "it is too short"))?;
    let tail = reader.header_at(at)?;
    if tail.kind != RecordKind::Tail {
        return Err(reader.problem(at, "it does not end with a TAIL"));
    }
    let last = decode_tail(&reader.body_of(at, &tail)?).map_err(|problem| reader.malformed(at, problem))?;
    // A TAIL that does not stand behind its COMMIT is of an earlier end of the archive.
    let copy = at
        .checked_sub(last.length)
        .ok_or_else(|| reader.problem(at, "its TAIL names no COMMIT"))?;
    let header = reader.header_of(copy, &last.sought())?;
    if (header.lane, header.epoch) != (tail.lane, tail.epoch) {
        return Err(reader.problem(copy, "its TAIL does not stand behind a COMMIT"));
    }
    if header.seal.is_some() {
        let (at, header) = sealed_end::key_record_before(reader, copy, last.length)?;
        open_keyring_at(reader, at, &header)?;
    }
    let mut chains = Chains::new(reader);
    // What follows the commit leads to a copy that is intact.
    let first = reader.header_of(last.offset, &last.sought());
    let is_intact = first
        .and_then(|header| reader.stored_body_of(last.offset, &header))
        .is_ok();
    let hint = if is_intact { last.offset } else { copy };
    chains.follow(CommitLocation { offset: copy, ..last }, hint, tail.lane)?;
    let mut lanes_done = HashSet::from([tail.lane]);
    while let Some((lane, other)) = chains.other_lanes.pop_first() {
        if lanes_done.insert(lane) {
            chains.follow(other.location, other.location.offset, lane)?;
        }
    }
    chains.check_named()?;
    let Chains {
        mut commits,
        may_append,
        records,
        ..
    } = chains;
    // Then another KEY record has a greater number, or none is left.
    check_current(reader, &commits)?;
    commits.sort_by_key(|one| (one.lane == tail.lane, one.lane, one.commit.number));
    mark_forgotten(&mut commits);
    Ok(Opened {
        commits,
        main: tail.lane,
        end: End {
            offset: reader.length(),
            sequence: tail.sequence + 1,
            records,
            has_tail: true,
        },
        may_append,
        damage: Vec::new(),
    })
}

/// Fails if the keyring is older than a commit says that it was.
///
/// # Errors
/// [`Error::Damaged`].
pub(super) fn check_current(reader: &RecordReader, commits: &[Committed]) -> Result<()> {
    for committed in commits {
        let checked = reader.keys().check_current(&committed.commit);
        checked.map_err(|problem| reader.malformed(committed.location.offset, problem))?;
    }
    Ok(())
}

fn open_keyring_at(reader: &RecordReader, at: u64, header: &RecordHeader) -> Result<()> {
    let body = reader.stored_body_of(at, header)?;
    let record = KeyRecord::decode(&body).map_err(|problem| reader.malformed(at, problem))?;
    reader.keys().open(reader.path(), &record)
}

/// Opens the newest keyring of the KEY records that a search found, and keeps the keys of their epochs.
///
/// # Errors
/// The error of reading; those of [`ArchiveKeys::open`](super::keys::ArchiveKeys::open).
fn open_found_keyrings(reader: &RecordReader, searched: &Searched) -> Result<()> {
    let Some(newest) = newest_of(reader, searched.keys())? else {
        return Ok(());
    };
    reader.keys().open(reader.path(), &newest.record)?;
    for (header, at) in searched.keys() {
        if let Ok(record) = KeyRecord::decode(&reader.stored_body_of(at, &header)?) {
            // An epoch whose keys do not open is told where they are needed.
            let _ = reader.keys().learn(header.lane, header.epoch, &record.wraps);
        }
    }
    Ok(())
}

/// Follows chains of commits, each of which begins in the file before the one that follows it.
struct Chains<'a> {
    reader: &'a RecordReader,
    commits: Vec<Committed>,
    /// Lanes that are to be followed, each from the greatest number that was named so far.
    other_lanes: BTreeMap<LaneId, OtherLane>,
    may_append: bool,
    records: usize,
    listed: ListedTotal,
}

/// What all commits of a file list so far.
#[derive(Default)]
pub(super) struct ListedTotal {
    records: usize,
    forgotten: usize,
    dead: usize,
    /// The bodies of records and LISTs.
    bodies: HashSet<Hash>,
    /// Bytes of records of a lane whose bodies other commits list too.
    repeated_bytes: u64,
    /// Bytes of records that lanes have of others, but for the first lane that has each.
    shared_bytes: u64,
}

impl ListedTotal {
    /// Checks whether another commit may list so much. A record that is listed, and a commit that is forgotten, has a hash in a LIST, which
    /// no compression makes shorter: so what is kept of them in memory is bounded by the length of the file.
    pub(super) fn check(&self, listed: &Listed, length: u64) -> Decoded<()> {
        let hashed_max = usize::try_from(length / size_of::<Hash>() as u64).unwrap_or(usize::MAX);
        let records = self.records + listed.records.len();
        let forgotten = self.forgotten + listed.forgotten.len();
        if records.max(forgotten) > hashed_max.min(RECORDS_MAX) || self.dead + listed.dead.len() > RECORDS_MAX {
            return Err("its commits list more than allowed".into());
        }
        Ok(())
    }

    /// Counts what LISTs say.
    pub(super) fn count(&mut self, listed: &Listed) {
        self.records += listed.records.len();
        self.forgotten += listed.forgotten.len();
        self.dead += listed.dead.len();
    }

    /// Adds what a commit lists. It lists nothing twice, and what several commits list, which HEADs and LISTs may be, takes no more than the
    /// whole file: a small archive could otherwise have one record read a million times. What lanes share, each of them may have once.
    fn add(&mut self, commit: &Commit, listed: &Listed, length: u64) -> Decoded<()> {
        self.count(listed);
        let records = listed
            .records
            .iter()
            .map(|record| (record.body_hash, record.length, record.lane == commit.lane));
        let lists = commit.lists.iter().map(|list| (list.body_hash, list.length, true));
        let mut own = HashSet::new();
        for (body, bytes, is_own) in records.chain(lists) {
            if !own.insert(body) {
                return Err("a commit lists a record twice".into());
            }
            if !self.bodies.insert(body) {
                let total = if is_own {
                    &mut self.repeated_bytes
                } else {
                    &mut self.shared_bytes
                };
                *total = total.saturating_add(bytes);
            }
        }
        if self.repeated_bytes > length || self.shared_bytes / OTHER_LANES_MAX as u64 > length {
            return Err("its commits list the same records".into());
        }
        Ok(())
    }
}

impl<'a> Chains<'a> {
    fn new(reader: &'a RecordReader) -> Self {
        Self {
            reader,
            commits: Vec::new(),
            other_lanes: BTreeMap::new(),
            may_append: true,
            records: 0,
            listed: ListedTotal::default(),
        }
    }

    /// Checks that each COMMIT of another lane that is named was met.
    fn check_named(&self) -> Result<()> {
        let met: HashSet<Hash> = self.commits.iter().map(|one| one.location.body_hash).collect();
        match named_in_other_lanes(&self.commits).find(|named| !met.contains(&named.body_hash)) {
            Some(named) => Err(self
                .reader
                .problem(named.offset, "a COMMIT of another lane is not where it should be")),
            None => Ok(()),
        }
    }

    /// Follows a lane. The COMMIT is read from `location`; `hint` is where its first copy stands.
    fn follow(&mut self, location: CommitLocation, hint: u64, lane: LaneId) -> Result<()> {
        let reader = self.reader;
        let (mut next, mut hint) = (location, hint);
        let mut follower: Option<ChainPlace> = None;
        loop {
            let header = reader.header_of(next.offset, &next.sought())?;
            if header.lane != lane {
                return Err(reader.problem(next.offset, "a COMMIT is not where it should be"));
            }
            let body = reader.body_of(next.offset, &header)?;
            let commit = Commit::decode_of(&body, &header).map_err(|problem| reader.malformed(next.offset, problem))?;
            if follower.is_some_and(|next| !ChainPlace::of(&commit).is_followed_by(next)) {
                return Err(reader.problem(next.offset, &format!("the COMMIT after it {FOLLOWS_NOT}")));
            }
            let previous = commit.previous;
            if !previous.is_none() && previous.offset >= hint {
                return Err(reader.problem(next.offset, "the chain of commits leads in a circle"));
            }
            let committed = Committed {
                location: CommitLocation { offset: hint, ..next },
                ..committed(reader, commit, &header, (None, reader.length()), &mut self.listed)?
            };
            self.may_append &= check_head(reader, &committed, (None, reader.length()))?;
            self.records += committed.listed.records.len() + 2 * committed.commit.lists.len() + 4;
            for other in &committed.listed.other_lanes {
                let known = self.other_lanes.entry(other.lane).or_insert(*other);
                if known.number < other.number {
                    *known = *other;
                }
            }
            follower = Some(ChainPlace::of(&committed.commit));
            self.commits.push(committed);
            if previous.is_none() {
                return Ok(());
            }
            (next, hint) = (previous, previous.offset);
        }
    }
}

/// Returns the COMMITs of other lanes that some commits name.
fn named_in_other_lanes(commits: &[Committed]) -> impl Iterator<Item = &CommitLocation> {
    commits
        .iter()
        .flat_map(|one| &one.listed.other_lanes)
        .map(|other| &other.location)
}

/// Reads what a COMMIT lists, but for its images.
fn committed(
    reader: &RecordReader,
    commit: Commit,
    header: &RecordHeader,
    searched: (Option<&Searched>, u64),
    total: &mut ListedTotal,
) -> Result<Committed> {
    let mut listed = Listed::default();
    for list in commit.lists.iter().filter(|list| list.part == PART_RECORDS) {
        let body = reader.body_by_hash(&list.sought(), searched)?;
        let added = listed
            .add(&body, header.lane)
            .and_then(|()| total.check(&listed, reader.length()));
        added.map_err(|problem| reader.malformed(list.offset, problem))?;
    }
    total
        .add(&commit, &listed, reader.length())
        .map_err(|problem| reader.malformed(0, problem))?;
    let previous = &commit.previous;
    if previous.offset.checked_add(previous.length).is_none() {
        return Err(reader.problem(0, "a COMMIT lies beyond the archive's end"));
    }
    listed
        .check_below(commit.store_end)
        .map_err(|problem| reader.malformed(0, problem))?;
    // They take more memory than all else, and only verifying needs them.
    listed.uses = Vec::new();
    Ok(Committed {
        commit,
        location: CommitLocation::default(),
        lane: header.lane,
        epoch: header.epoch,
        listed,
        ..Committed::default()
    })
}

/// Checks the HEADs of a commit's epoch. Returns whether this version may append. One that is damaged says nothing.
fn check_head(reader: &RecordReader, committed: &Committed, searched: (Option<&Searched>, u64)) -> Result<bool> {
    let mut may_append = committed.commit.features_append == 0;
    for head in committed
        .listed
        .records
        .iter()
        .filter(|record| record.kind == RecordKind::Head)
    {
        match reader.body_by_hash(&head.sought(), searched) {
            Ok(body) => match Head::decode(&body) {
                Ok(head) => may_append &= head.may_append(),
                Err(Malformed::Unsupported(problem)) => return Err(reader.unsupported(problem)),
                Err(problem) => return Err(reader.malformed(head.offset, problem)),
            },
            Err(error @ Error::Damaged { .. }) if searched.0.is_none() => return Err(error),
            Err(Error::Damaged { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(may_append)
}

fn mark_forgotten(commits: &mut [Committed]) {
    let forgotten: HashSet<(LaneId, Hash)> = commits
        .iter()
        .flat_map(|one| one.listed.forgotten.iter().map(|hash| (one.lane, *hash)))
        .collect();
    for committed in commits {
        committed.is_forgotten = forgotten.contains(&(committed.lane, committed.location.body_hash));
    }
}

/// Opens by what a search found.
///
/// # Errors
/// [`Error::Unsupported`]; the error of reading; [`Error::NotAnArchive`] or [`Error::Damaged`] where no record is intact.
pub fn from_search(reader: &RecordReader, searched: &Searched) -> Result<Opened> {
    searched.check_commits_supported(reader)?;
    open_found_keyrings(reader, searched)?;
    if searched.records.is_empty() {
        searched.check_any_supported(reader)?;
        return Err(reader.nothing_intact());
    }
    let is_end = |(header, _): &&(RecordHeader, u64)| tells_of_commit(header.kind);
    let end = searched.records.iter().rfind(is_end).map_or(0, |(_, offset)| *offset);
    let mut found: BTreeMap<LaneId, Vec<Committed>> = BTreeMap::new();
    let (mut damage, mut seen, mut total) = (Vec::new(), HashSet::new(), ListedTotal::default());
    // Where the last copy of each COMMIT stands.
    let mut copies: HashMap<Hash, u64> = HashMap::new();
    let mut main = searched.records[0].0.lane;
    for (header, offset) in searched
        .records
        .iter()
        .filter(|(header, _)| header.kind == RecordKind::Commit)
    {
        copies.insert(header.body_hash, *offset);
        // A COMMIT that stands there twice counts once.
        if seen.contains(&header.body_hash) {
            main = header.lane;
            continue;
        }
        let location = CommitLocation {
            offset: *offset,
            length: HEADER_BYTES as u64 + header.body_bytes,
            body_hash: header.body_hash,
        };
        let decoded = reader
            .body_of(*offset, header)
            .and_then(|body| Commit::decode_of(&body, header).map_err(|problem| reader.malformed(*offset, problem)));
        if decoded.is_ok() {
            seen.insert(header.body_hash);
            main = header.lane;
        }
        match decoded.and_then(|commit| committed(reader, commit, header, (Some(searched), end), &mut total)) {
            Ok(one) => found
                .entry(header.lane)
                .or_default()
                .push(Committed { location, ..one }),
            Err(Error::Damaged { problem, .. }) => damage.push(damage_of(&location, problem)),
            Err(error) => return Err(error),
        }
    }
    let mut commits = Vec::new();
    for (_, lane) in found {
        commits.append(&mut chain_of(lane, &copies, &mut damage));
    }
    commits.sort_by_key(|one| (one.lane == main, one.lane, one.commit.number));
    mark_forgotten(&mut commits);
    let lost = named_in_other_lanes(&commits).filter(|named| !seen.contains(&named.body_hash));
    damage.extend(lost.map(|named| damage_of(named, "a COMMIT of another lane is lost".into())));
    let mut may_append = true;
    for committed in &commits {
        may_append &= check_head(reader, committed, (Some(searched), end))?;
    }
    Ok(Opened {
        end: end_of(searched, &commits, main),
        commits,
        main,
        may_append,
        damage,
    })
}

/// Of the commits of a lane those that count: the one with the greatest number and what it follows. Where that chain is broken, it goes on with
/// the greatest number below.
fn chain_of(mut commits: Vec<Committed>, copies: &HashMap<Hash, u64>, damage: &mut Vec<Damage>) -> Vec<Committed> {
    // Of two with one number, the one whose last copy stands later is tried first.
    commits.sort_by_key(|one| (one.commit.number, copies.get(&one.location.body_hash).copied()));
    let mut left: HashMap<Hash, ChainPlace> = commits
        .iter()
        .map(|one| (one.location.body_hash, ChainPlace::of(&one.commit)))
        .collect();
    let mut chain: Vec<Committed> = Vec::new();
    let mut wanted = None;
    while let Some(committed) = commits.pop() {
        left.remove(&committed.location.body_hash);
        let is_next = match (wanted, chain.last()) {
            (Some(hash), _) => hash == committed.location.body_hash,
            (None, Some(last)) => committed.commit.number < last.commit.number,
            (None, None) => true,
        };
        if !is_next {
            damage.push(damage_of(
                &committed.location,
                "a COMMIT is none of those that the last one follows".into(),
            ));
            continue;
        }
        let previous = &committed.commit.previous;
        let found = left.get(&previous.body_hash);
        wanted = found
            .filter(|before| before.is_followed_by(ChainPlace::of(&committed.commit)))
            .map(|_| previous.body_hash);
        if wanted.is_none() && committed.commit.number > CommitNumber::FIRST {
            let problem = if found.is_some() {
                format!("commit {} {FOLLOWS_NOT}", committed.commit.number)
            } else {
                format!("the COMMIT of commit {} is lost", committed.commit.number.previous())
            };
            damage.push(damage_of(previous, problem));
        }
        chain.push(committed);
    }
    chain.reverse();
    chain
}

/// Where the last of some commits ends: behind its copies and its TAIL.
fn end_of(searched: &Searched, commits: &[Committed], main: LaneId) -> End {
    let hashes: HashSet<Hash> = commits.iter().map(|one| one.location.body_hash).collect();
    let epochs: HashSet<EpochId> = commits.iter().map(|one| one.epoch).collect();
    let mut end = End::default();
    let mut sequence = 0;
    for (place, (header, offset)) in searched.records.iter().enumerate() {
        let after = offset + HEADER_BYTES as u64 + header.body_bytes;
        if header.lane == main {
            sequence = header.sequence + 1;
        }
        let is_end = match header.kind {
            RecordKind::Commit => hashes.contains(&header.body_hash),
            RecordKind::Tail => epochs.contains(&header.epoch),
            _ => false,
        };
        if is_end {
            end = End {
                offset: after,
                sequence,
                records: place + 1,
                has_tail: header.kind == RecordKind::Tail,
            };
        }
    }
    end
}

/// Whether what stands behind the last commit is nothing but what an export left that did not end: no COMMIT and no TAIL is among it.
///
/// # Errors
/// Returns the error of reading.
pub fn ends_in_leftovers_only(reader: &RecordReader, end: End) -> Result<bool> {
    let mut stream = Stream::new(
        StoreReader::new(reader.store(), end.offset).take(reader.length().saturating_sub(end.offset)),
        end.offset,
    );
    while let Some(event) = stream.next_event().map_err(Error::io("read", reader.path()))? {
        let may_be_left = match event {
            StreamEvent::Record { header, .. } => !tells_of_commit(header.kind),
            StreamEvent::Damage { header, range, .. } => {
                let is_other = header.is_some_and(|header| !tells_of_commit(header.kind));
                is_other || is_torn(reader, range, header)?
            }
            StreamEvent::Unsupported(record) => !tells_of_commit(record.header.kind),
        };
        if !may_be_left {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a range in which there is no whole record may be a write that did not end: it is cut by the end of the file, or begins or ends with
/// zeros.
fn is_torn(reader: &RecordReader, range: ByteRange, header: Option<RecordHeader>) -> Result<bool> {
    let end = range.start + range.length;
    let wanted = header.map_or(0, |header| header.body_bytes) + HEADER_BYTES as u64;
    if range.start.saturating_add(wanted) > reader.length() {
        return Ok(true);
    }
    let mut start = [1; ZEROS];
    reader.read_exact(range.start, &mut start[..bytes_up_to(range.start, end)])?;
    if start == [0; ZEROS] {
        return Ok(true);
    }
    // A tear may lie within the last bytes: then zeros go on behind them, or the file ends there.
    let last = end.min(range.start + wanted);
    let from = last.saturating_sub(ZEROS as u64).max(range.start);
    let (mut before, mut after) = ([1; ZEROS], [1; ZEROS]);
    let (count_before, count_after) = (bytes_up_to(from, last), bytes_up_to(last, reader.length()));
    reader.read_exact(from, &mut before[..count_before])?;
    reader.read_exact(last, &mut after[..count_after])?;
    let zeros_before = before[..count_before]
        .iter()
        .rev()
        .take_while(|byte| **byte == 0)
        .count();
    let zeros_after = after[..count_after].iter().take_while(|byte| **byte == 0).count();
    let is_at_end = last + zeros_after as u64 == reader.length();
    Ok(zeros_before > 0 && (zeros_before + zeros_after >= ZEROS || is_at_end))
}

/// Bytes between two offsets, as many as are looked at.
fn bytes_up_to(from: u64, to: u64) -> usize {
    usize::try_from(to.saturating_sub(from))
        .unwrap_or(usize::MAX)
        .min(ZEROS)
}
