//! Verifies a sealed archive without its key: that each record is what was written, and that none is missing. What is in them is not looked at.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use crate::archive::commit::{ClearCommit, decode_tail};
use crate::archive::key_check;
use crate::archive::keys::ArchiveKeys;
use crate::archive::limits::RECORDS_MAX;
use crate::archive::open::{self, End};
use crate::archive::reader::{Damage, RecordReader, note_damage};
use crate::archive::record::{HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind};
use crate::archive::stream::{Stream, StreamEvent};
use crate::block::ByteRange;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::report::Verified;
use crate::store::{Store, StoreReader};

use super::{parity_of, places_of};

/// Verifies the records of a sealed archive.
///
/// # Errors
/// [`Error::Unsupported`]; the error of reading; [`Error::Interrupted`]. Damage is not an error.
pub(super) fn verify_records(store: &Arc<dyn Store>, keys: &ArchiveKeys, monitor: &dyn Monitor) -> Result<Verified> {
    let path = store.path().to_owned();
    let failed = |error: std::io::Error| Error::io("read", &path)(error);
    let length = store.length().map_err(failed)?.unwrap_or_default();
    monitor.phase("Reading records", length);
    let mut found = read_all(&**store, length, keys, monitor)?;
    found.check_chains();
    let end = found.end;
    let leftover_bytes = length.saturating_sub(end);
    let reader = RecordReader::new(Arc::clone(store))?;
    let tells_end = End {
        offset: end,
        ..End::default()
    };
    let has_leftovers_only = open::ends_in_leftovers_only(&reader, tells_end)?;
    // What an export left that did not end is no damage.
    found
        .damage
        .retain(|damage| damage.range.start < end || !has_leftovers_only);
    found.check_keys(if has_leftovers_only { end } else { length });
    Ok(Verified {
        archive: path.clone(),
        archive_bytes: length,
        commits: found.commits.len() as u64,
        is_sealed: true,
        is_without_key: true,
        has_lost_keys: found.keys.is_empty(),
        is_ended: leftover_bytes == 0,
        leftover_bytes: if has_leftovers_only { leftover_bytes } else { 0 },
        parity: if found.has_parity {
            parity_of(Arc::clone(store), monitor)?
        } else {
            None
        },
        damage: places_of(found.damage),
        ..Verified::default()
    })
}

/// Reads all records of a sealed archive of so many bytes.
fn read_all(store: &dyn Store, length: u64, keys: &ArchiveKeys, monitor: &dyn Monitor) -> Result<FoundRecords> {
    let path = store.path().to_owned();
    let failed = |error: std::io::Error| Error::io("read", &path)(error);
    let mut stream = Stream::new(StoreReader::new(store, 0).take(length), 0);
    let mut found = FoundRecords::default();
    let mut before = 0;
    while let Some(event) = stream.next_event().map_err(failed)? {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        monitor.advance(stream.offset() - before);
        before = stream.offset();
        match event {
            StreamEvent::Record { header, offset, body } => {
                // Of several problems in one place, the first is told.
                found.check(keys, &path, (&header, offset), &body)?;
                found.add(&header, offset, &body);
                if found.records > RECORDS_MAX {
                    return Err(Error::damaged(
                        &path,
                        offset,
                        header.body_bytes,
                        "it has more records than allowed",
                    ));
                }
            }
            StreamEvent::Damage { range, problem, .. } => {
                found.note(Damage::at(range, problem));
                found.is_behind_damage = true;
            }
            StreamEvent::Unsupported(record) => {
                return Err(Error::Unsupported {
                    path,
                    problem: record.problem,
                });
            }
        }
    }
    Ok(found)
}

/// What was found of the records of an archive.
#[derive(Default)]
struct FoundRecords {
    /// The commits, by the hashes of their COMMITs.
    commits: HashMap<Hash, (ClearCommit, ByteRange)>,
    /// The number that the next record of each lane has at least.
    next: BTreeMap<LaneId, u64>,
    /// Where the last COMMIT or TAIL ends.
    end: u64,
    has_parity: bool,
    /// The numbers of the KEY records that are intact, and where these stand.
    keys: Vec<(u32, ByteRange)>,
    /// Whether what came last was damage.
    is_behind_damage: bool,
    records: usize,
    damage: Vec<Damage>,
}

impl FoundRecords {
    /// Notes damage. Beyond a number of places that nobody reads, it is one place.
    fn note(&mut self, damage: Damage) {
        const PLACES_MAX: usize = 10_000;
        let count = self.damage.len();
        match self.damage.last_mut() {
            Some(last) if count >= PLACES_MAX => {
                last.range.length = (damage.range.start + damage.range.length).saturating_sub(last.range.start);
                "very many places are damaged".clone_into(&mut last.problem);
            }
            _ => self.damage.push(damage),
        }
    }

    fn add(&mut self, header: &RecordHeader, offset: u64, body: &[u8]) {
        let range = ByteRange {
            start: offset,
            length: HEADER_BYTES as u64 + header.body_bytes,
        };
        let after = header.sequence.saturating_add(1);
        let expected = self.next.insert(header.lane, after).unwrap_or(0);
        // What is missing behind damage is the record that was damaged.
        if !std::mem::take(&mut self.is_behind_damage) && expected != header.sequence {
            let problem = format!(
                "records before this {} are missing, or it stands twice",
                header.kind.name()
            );
            self.note(Damage::at(range, problem));
        }
        self.records += 1;
        match header.kind {
            RecordKind::Commit => match ClearCommit::decode(body) {
                Ok(commit) => {
                    self.commits.entry(header.body_hash).or_insert((commit, range));
                    self.end = range.start + range.length;
                }
                Err(problem) => self.note(Damage::at(range, problem.problem())),
            },
            RecordKind::Tail => {
                let named = decode_tail(body);
                if !named.is_ok_and(|named| self.commits.contains_key(&named.body_hash)) {
                    self.note(Damage::at(range, "a TAIL leads to no COMMIT"));
                }
                self.end = range.start + range.length;
            }
            RecordKind::Parity => self.has_parity = true,
            _ => {}
        }
    }

    /// Checks what a sealed archive must have in each record, as far as that can be told without a key.
    fn check(
        &mut self,
        keys: &ArchiveKeys,
        archive: &Path,
        (header, offset): (&RecordHeader, u64),
        body: &[u8],
    ) -> Result<()> {
        let range = ByteRange {
            start: offset,
            length: HEADER_BYTES as u64 + header.body_bytes,
        };
        let mut damage = Vec::new();
        note_damage(key_check::check_is_sealed(archive, header, offset), range, &mut damage)?;
        if header.kind == RecordKind::Key {
            let decoded = key_check::closed(keys, archive, (header, offset), body);
            let noted = decoded.map(|record| self.keys.push((record.number, range)));
            note_damage(noted, range, &mut damage)?;
        }
        for one in damage {
            self.note(one);
        }
        Ok(())
    }

    /// Checks that there is a KEY record, and that the last one before an end is the newest.
    fn check_keys(&mut self, end: u64) {
        self.keys.retain(|(_, range)| range.start < end);
        match self.keys.last().copied() {
            None => self.note(key_check::all_lost(end)),
            Some((last, _)) => {
                let newer = self.keys.iter().filter(|(number, _)| *number > last);
                let newer: Vec<Damage> = newer.map(|(_, range)| Damage::at(*range, key_check::NEWER)).collect();
                for one in newer {
                    self.note(one);
                }
            }
        }
    }

    /// Checks that each COMMIT but the first follows another one.
    fn check_chains(&mut self) {
        let mut damage = Vec::new();
        for (commit, range) in self.commits.values() {
            if commit.previous.is_none() {
                continue;
            }
            let before = self.commits.get(&commit.previous.body_hash);
            if before.is_none_or(|(before, _)| before.number.next() != commit.number) {
                damage.push(Damage::at(*range, "the COMMIT that this one follows is missing"));
            }
        }
        damage.sort_by_key(|damage| damage.range.start);
        self.damage.append(&mut damage);
    }
}
