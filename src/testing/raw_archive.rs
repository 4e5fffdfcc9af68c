//! Archives as lists of records that can be changed at will and sealed again: with hashes that are right from each frame to the COMMIT, whatever
//! the records say. No writer makes such archives, and readers must stand them.

use std::collections::HashMap;

use crate::archive::commit::{Commit, CommitLocation, encode_tail};
use crate::archive::head::Head;
use crate::archive::list::{self, ImageSummary, Listed, RecordLocation};
use crate::archive::pack;
use crate::archive::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind};
use crate::numbers::StoreBlock;

/// A record before it is sealed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawRecord {
    /// What it says it is.
    pub kind: RecordKind,
    /// Its lane.
    pub lane: LaneId,
    /// Its epoch.
    pub epoch: EpochId,
    /// Its number in the lane.
    pub sequence: u64,
    /// Its body, without a mask.
    pub body: Vec<u8>,
}

/// The records of an archive, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RawArchive {
    /// The records.
    pub records: Vec<RawRecord>,
    /// Whether COMMITs keep what they say of the one before them.
    pub keeps_previous: bool,
}

/// Where a record was put.
struct Placed {
    offset: u64,
    length: u64,
    body_hash: Hash,
    table_hash: Hash,
}

impl RawArchive {
    /// Takes an archive apart. It ends at the first bytes that are no record.
    pub fn read(bytes: &[u8]) -> Self {
        let (mut records, mut at) = (Vec::new(), 0);
        while let Some(header) = bytes[at..]
            .first_chunk()
            .and_then(|header| RecordHeader::decode(header).ok())
        {
            let start = at + HEADER_BYTES;
            let end = start + usize::try_from(header.body_bytes).unwrap_or(usize::MAX);
            let Some(stored) = bytes.get(start..end) else { break };
            let mut body = stored.to_vec();
            header.apply_mask(0, &mut body);
            records.push(RawRecord {
                kind: header.kind,
                lane: header.lane,
                epoch: header.epoch,
                sequence: header.sequence,
                body,
            });
            at = end;
        }
        Self {
            records,
            keeps_previous: false,
        }
    }

    /// Makes an archive of one commit whose PLANs are these, each with its part, and whose LIST has these images.
    pub fn of_plans(plans: Vec<(u8, Vec<u8>)>, images: &[ImageSummary], commit: Commit) -> Self {
        let (lane, epoch) = (LaneId([1; 16]), EpochId(5));
        let mut archive = Self::default();
        let mut listed = Listed::default();
        archive.push(RecordKind::Head, Head::current().encode(), lane, epoch);
        listed.records.push(entry_of(RecordKind::Head, 0, 0, lane));
        for (sequence, (part, body)) in (1..).zip(plans) {
            archive.push(RecordKind::Plan, body, lane, epoch);
            listed.records.push(entry_of(RecordKind::Plan, part, sequence, lane));
        }
        let bodies = list::encode(&listed, images, lane).unwrap_or_default();
        let mut commit = Commit { lane, epoch, ..commit };
        for (part, body) in bodies {
            commit.lists.push(crate::archive::commit::ListLocation {
                part,
                sequence: archive.records.len() as u64,
                offset: 0,
                length: 0,
                body_hash: [0; 32],
            });
            archive.push(RecordKind::List, body, lane, epoch);
        }
        let body = commit.encode().unwrap_or_default();
        archive.push(RecordKind::Commit, body.clone(), lane, epoch);
        archive.push(RecordKind::Commit, body, lane, epoch);
        archive.push(RecordKind::Tail, encode_tail(&CommitLocation::default()), lane, epoch);
        archive
    }

    fn push(&mut self, kind: RecordKind, body: Vec<u8>, lane: LaneId, epoch: EpochId) {
        self.records.push(RawRecord {
            kind,
            lane,
            epoch,
            sequence: self.records.len() as u64,
            body,
        });
    }

    /// Returns the bytes of the archive. Each LIST, COMMIT and TAIL that can be decoded names the records as they are; those that cannot
    /// are left as they are.
    pub fn sealed(&self) -> Vec<u8> {
        self.sealed_with(|_, _| {})
    }

    /// Returns the bytes of the archive, as [`RawArchive::sealed`] does. Each body may be changed at last, when all that it names is right; its
    /// own hash is made after that.
    pub fn sealed_with(&self, mut change: impl FnMut(RecordKind, &mut Vec<u8>)) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut placed: HashMap<(LaneId, u64), Placed> = HashMap::new();
        let mut commits: HashMap<(LaneId, u32), CommitLocation> = HashMap::new();
        let mut last = CommitLocation::default();
        for record in &self.records {
            let mut body = match record.kind {
                RecordKind::List => with_right_records(record, &placed),
                RecordKind::Commit => with_right_lists(record, &placed, (!self.keeps_previous).then_some(&commits)),
                RecordKind::Tail => encode_tail(&last),
                _ => record.body.clone(),
            };
            change(record.kind, &mut body);
            let table_hash = pack::decode_table(&body, body.len() as u64, None).map_or([0; 32], |table| table.hash);
            let number = Commit::decode(&body).map(|commit| commit.number.0);
            let Ok(header) = RecordHeader::of_body(record.kind, record.lane, record.epoch, record.sequence, &mut body)
            else {
                continue;
            };
            let place = Placed {
                offset: bytes.len() as u64,
                length: (HEADER_BYTES + body.len()) as u64,
                body_hash: header.body_hash,
                table_hash,
            };
            if record.kind == RecordKind::Commit
                && let Ok(number) = number
            {
                let location = CommitLocation {
                    offset: place.offset,
                    length: place.length,
                    body_hash: place.body_hash,
                };
                last = *commits.entry((record.lane, number)).or_insert(location);
            }
            bytes.extend(header.encode());
            bytes.extend(body);
            placed.insert((record.lane, record.sequence), place);
        }
        bytes
    }
}

fn entry_of(kind: RecordKind, part: u8, sequence: u64, lane: LaneId) -> RecordLocation {
    RecordLocation {
        kind,
        part,
        lane,
        sequence,
        offset: 0,
        length: 0,
        first: StoreBlock(0),
        blocks: 0,
        body_hash: [0; 32],
        table_hash: [0; 32],
    }
}

fn with_right_records(record: &RawRecord, placed: &HashMap<(LaneId, u64), Placed>) -> Vec<u8> {
    let (mut listed, mut images) = (Listed::default(), Vec::new());
    let Ok(list::PART_RECORDS) = list::add_any(&mut listed, &mut images, &record.body, record.lane) else {
        return record.body.clone();
    };
    for entry in &mut listed.records {
        if let Some(place) = placed.get(&(entry.lane, entry.sequence)) {
            (entry.offset, entry.length) = (place.offset, place.length);
            entry.body_hash = place.body_hash;
            entry.table_hash = if entry.kind == RecordKind::Pack {
                place.table_hash
            } else {
                [0; 32]
            };
        }
    }
    match list::encode(&listed, &[], record.lane) {
        Ok(mut bodies) if bodies.len() == 1 => bodies.remove(0).1,
        _ => record.body.clone(),
    }
}

fn with_right_lists(
    record: &RawRecord,
    placed: &HashMap<(LaneId, u64), Placed>,
    commits: Option<&HashMap<(LaneId, u32), CommitLocation>>,
) -> Vec<u8> {
    let Ok(mut commit) = Commit::decode(&record.body) else {
        return record.body.clone();
    };
    for list in &mut commit.lists {
        if let Some(place) = placed.get(&(record.lane, list.sequence)) {
            (list.offset, list.length, list.body_hash) = (place.offset, place.length, place.body_hash);
        }
    }
    if let Some(previous) = commits.and_then(|commits| commits.get(&(record.lane, commit.number.previous().0))) {
        commit.previous = *previous;
    }
    commit.encode().unwrap_or_else(|_| record.body.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_that_is_not_changed_stays_what_it_is() {
        let golden = include_bytes!("../../testdata/archive-v1.vmfold");
        assert_eq!(RawArchive::read(golden).sealed(), golden);
    }
}
