//! Opens a sealed archive for a host that may only write. What COMMITs list is sealed for it: it goes from one header to the next, and takes hashes of
//! blocks only from epochs whose COMMIT its ring proves. What another host wrote is not referred to: nobody without a key can tell whether the blocks
//! are what their hashes say.

use std::collections::{BTreeMap, HashMap};

use super::commit::{ClearCommit, Commit, CommitLocation};
use super::head::Head;
use super::index;
use super::keys::{KeyRecord, Ring, index_hash};
use super::list::{Listed, RecordLocation};
use super::manifest::PlanRecord;
use super::newest_keys;
use super::open::{End, Opened};
use super::reader::{Committed, RecordReader};
use super::record::{DecodedHeader, EpochId, HEADER_BYTES, LaneId, RecordHeader, RecordKind};
use super::seal::KeySlot;
use crate::error::{Error, Result};

/// A sealed archive as such a host sees it.
pub struct OpenedToAdd {
    /// Its commits. They have no images, and list only records by which blocks are found again.
    pub opened: Opened,
    /// The newest KEY record.
    pub keys: KeyRecord,
}

/// Opens it.
///
/// # Errors
/// [`Error::Damaged`] if it has no commit, its chain of commits is broken, or its keys are not those that the ring was made of or came after these;
/// [`Error::Usage`] if its keys were rotated since; [`Error::NotSealed`]; [`Error::Unsupported`]; the error of reading.
pub fn open(reader: &RecordReader, ring: &Ring) -> Result<OpenedToAdd> {
    let walked = Walked::new(reader)?;
    let (tail, end) = walked.end(reader)?;
    let mut commits = Vec::new();
    for (header, offset) in walked.commits() {
        if header.seal.is_none() {
            return Err(Error::NotSealed {
                path: reader.path().to_owned(),
            });
        }
        commits.push(walked.committed(reader, ring, &header, offset)?);
    }
    check_chain(reader, tail.lane, &commits)?;
    commits.sort_by_key(|one| (one.lane == tail.lane, one.lane, one.commit.number));
    Ok(OpenedToAdd {
        keys: keys_of(reader, ring)?,
        opened: Opened {
            commits,
            main: tail.lane,
            end,
            may_append: walked.may_append,
            damage: Vec::new(),
        },
    })
}

/// Finds the newest KEY record, and checks that it names the pair that the ring has: whoever was removed by a rotation has the one before.
fn keys_of(reader: &RecordReader, ring: &Ring) -> Result<KeyRecord> {
    let newest = newest_keys::newest(reader)?.ok_or_else(|| reader.problem(0, "it has no KEY record"))?;
    if newest.record.number < ring.number() {
        let problem = "its keyring is older than the credentials of this host: a part of the archive is gone";
        return Err(reader.problem(newest.offset, problem));
    }
    if newest.record.wraps.pair != ring.newest_pair() {
        return Err(Error::Usage(format!(
            "the keys of `{}` were rotated since the credentials of this host were made: make new ones with vmfold key host",
            crate::shown::shown(reader.path())
        )));
    }
    Ok(newest.record)
}

/// Checks that the commits of a lane follow each other.
fn check_chain(reader: &RecordReader, lane: LaneId, commits: &[Committed]) -> Result<()> {
    let mut last: Option<&Committed> = None;
    for committed in commits.iter().filter(|one| one.lane == lane) {
        let follows = match last {
            Some(last) => {
                committed.commit.number == last.commit.number.next()
                    && committed.commit.previous.body_hash == last.location.body_hash
                    && committed.commit.store_end >= last.commit.store_end
            }
            None => committed.commit.previous.is_none(),
        };
        if !follows {
            let problem = "a COMMIT does not follow the one before it: who has the key can tell what is lost";
            return Err(reader.problem(committed.location.offset, problem));
        }
        last = Some(committed);
    }
    match last {
        Some(_) => Ok(()),
        None => Err(reader.problem(0, "it has no commit")),
    }
}

/// The headers of an archive, up to where one does not lead to the next.
struct Walked {
    records: Vec<(RecordHeader, u64)>,
    may_append: bool,
}

impl Walked {
    fn new(reader: &RecordReader) -> Result<Self> {
        let (mut records, mut may_append, mut at) = (Vec::new(), true, 0);
        while at < reader.length() {
            let header = match reader.any_header_at(at) {
                Ok(DecodedHeader::Known(header)) => header,
                Ok(DecodedHeader::Unsupported(record)) => return Err(reader.unsupported(record.problem)),
                // It may be what an export left that did not end.
                Err(Error::Damaged { .. }) => break,
                Err(error) => return Err(error),
            };
            let end = (at + HEADER_BYTES as u64).saturating_add(header.body_bytes);
            if end > reader.length() {
                break;
            }
            if header.kind == RecordKind::Head {
                let head = Head::decode(&reader.stored_body_of(at, &header)?);
                may_append &= head.map_err(|problem| reader.malformed(at, problem))?.may_append();
            }
            if is_needed(&header) {
                records.push((header, at));
            }
            at = end;
        }
        Ok(Self { records, may_append })
    }

    /// Returns the last TAIL, and where it ends.
    fn end(&self, reader: &RecordReader) -> Result<(RecordHeader, End)> {
        let tail = self.records.iter().rfind(|(header, _)| header.kind == RecordKind::Tail);
        let (tail, at) = *tail.ok_or_else(|| reader.problem(0, "it has no commit"))?;
        let end = End {
            offset: at + HEADER_BYTES as u64 + tail.body_bytes,
            sequence: tail.sequence + 1,
            records: usize::try_from(tail.sequence).unwrap_or(usize::MAX).saturating_add(1),
            has_tail: true,
        };
        Ok((tail, end))
    }

    /// The first copy of each COMMIT.
    fn commits(&self) -> Vec<(RecordHeader, u64)> {
        let mut first = BTreeMap::new();
        for (header, offset) in self
            .records
            .iter()
            .filter(|(header, _)| header.kind == RecordKind::Commit)
        {
            first.entry(header.body_hash).or_insert((*header, *offset));
        }
        let mut commits: Vec<_> = first.into_values().collect();
        commits.sort_by_key(|(_, offset)| *offset);
        commits
    }

    /// Reads the clear part of a COMMIT, and finds the records of its epoch that are of use.
    fn committed(&self, reader: &RecordReader, ring: &Ring, header: &RecordHeader, offset: u64) -> Result<Committed> {
        let stored = reader.stored_body_of(offset, header)?;
        let clear = ClearCommit::decode(&stored).map_err(|problem| reader.malformed(offset, problem))?;
        let proved = ring.signed_index(header, &stored);
        let mut records = Vec::new();
        if proved.is_some() {
            records = self.indexed(reader, (header.lane, header.epoch))?;
        }
        if proved != Some(index_hash(records.iter())) {
            records.clear();
        }
        Ok(Committed {
            commit: Commit {
                number: clear.number,
                lane: header.lane,
                epoch: header.epoch,
                previous: clear.previous,
                store_end: clear.store_end,
                features_append: clear.features_append,
                ..Commit::default()
            },
            location: CommitLocation {
                offset,
                length: HEADER_BYTES as u64 + header.body_bytes,
                body_hash: header.body_hash,
            },
            lane: header.lane,
            epoch: header.epoch,
            listed: Listed {
                records,
                ..Listed::default()
            },
            ..Committed::default()
        })
    }

    /// The records of an epoch that the index key seals. What they are about stands in their bodies.
    fn indexed(&self, reader: &RecordReader, (lane, epoch): (LaneId, EpochId)) -> Result<Vec<RecordLocation>> {
        let mut found = HashMap::new();
        for (header, offset) in &self.records {
            let is_indexed = header.seal.is_some_and(|seal| seal.slot == KeySlot::Index);
            if !is_indexed || (header.lane, header.epoch) != (lane, epoch) || found.contains_key(&header.sequence) {
                continue;
            }
            let body = match reader.body_of(*offset, header) {
                Ok(body) => body,
                // The hash of them all tells whether it was needed.
                Err(Error::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            };
            let placed = match header.kind {
                RecordKind::Index => index::decode(&body).map(|(first, hashes)| {
                    let blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
                    (0, first, blocks)
                }),
                _ => PlanRecord::decode(&body).and_then(|plan| {
                    let announced = plan.announced()?;
                    Ok((plan.part.number(), announced.first, announced.end() - announced.first))
                }),
            };
            let Ok((part, first, blocks)) = placed else { continue };
            let location = RecordLocation {
                kind: header.kind,
                part,
                lane,
                sequence: header.sequence,
                offset: *offset,
                length: HEADER_BYTES as u64 + header.body_bytes,
                first,
                blocks,
                body_hash: header.body_hash,
                table_hash: [0; 32],
            };
            found.insert(header.sequence, location);
        }
        let mut records: Vec<RecordLocation> = found.into_values().collect();
        records.sort_by_key(|record| record.sequence);
        Ok(records)
    }
}

/// Whether a record tells anything to a host that may only write.
fn is_needed(header: &RecordHeader) -> bool {
    let is_indexed = header.seal.is_some_and(|seal| seal.slot == KeySlot::Index);
    is_indexed || matches!(header.kind, RecordKind::Commit | RecordKind::Tail)
}
