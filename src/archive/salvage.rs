//! What can be told of epochs whose COMMIT is lost.

use std::collections::{BTreeMap, HashSet};

use super::commit::{Commit, CommitLocation, ListLocation};
use super::head::Head;
use super::index;
use super::limits::LISTS_MAX;
use super::list::{self, Listed, RecordLocation};
use super::manifest::{PlanPart, PlanRecord};
use super::open::{ListedTotal, Searched};
use super::pack;
use super::reader::{Committed, RecordReader};
use super::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind};
use crate::codec::Malformed;
use crate::error::Result;
use crate::numbers::StoreBlock;

/// Returns what can be told of epochs that are not `known`: of those whose final images are all there. An epoch at the end of an archive counts
/// only if something tells that it was committed: a TAIL, a later epoch, or damage behind it. Records from `end` on are those of an export that
/// did not end. An epoch is left out if it has something that this version does not know and must not skip.
///
/// # Errors
/// Returns the error of reading.
pub(super) fn salvage(
    reader: &RecordReader,
    searched: &Searched,
    known: &HashSet<EpochId>,
    end: u64,
) -> Result<Vec<Committed>> {
    let mut epochs: BTreeMap<(LaneId, EpochId), Vec<(RecordHeader, u64)>> = BTreeMap::new();
    for (header, offset) in &searched.records {
        if !known.contains(&header.epoch) && *offset < end {
            epochs
                .entry((header.lane, header.epoch))
                .or_default()
                .push((*header, *offset));
        }
    }
    let last_record = searched.records.last().map_or(0, |(_, offset)| *offset);
    let last_damage = searched
        .damage
        .iter()
        .map(|damage| damage.range.start)
        .max()
        .unwrap_or(0);
    let unsupported: HashSet<(LaneId, EpochId)> = searched
        .unsupported
        .iter()
        .map(|record| (record.header.lane, record.header.epoch))
        .collect();
    let (mut found, mut total) = (Vec::new(), ListedTotal::default());
    for ((lane, epoch), records) in epochs {
        if unsupported.contains(&(lane, epoch)) {
            continue;
        }
        let end = records.last().map_or(0, |(_, offset)| *offset);
        let has_tail = records.iter().any(|(header, _)| header.kind == RecordKind::Tail);
        if !has_tail && last_record <= end && last_damage <= end {
            continue;
        }
        if let Some(committed) = salvage_epoch(reader, lane, epoch, records, &mut total)? {
            found.push(committed);
        }
    }
    Ok(found)
}

/// What the records of an epoch say. None if its final images may be incomplete: a block could be taken for another.
fn salvage_epoch(
    reader: &RecordReader,
    lane: LaneId,
    epoch: EpochId,
    mut records: Vec<(RecordHeader, u64)>,
    total: &mut ListedTotal,
) -> Result<Option<Committed>> {
    records.sort_by_key(|(header, _)| header.sequence);
    records.dedup_by_key(|(header, _)| header.sequence);
    let mut found = Salvaged::default();
    for (header, offset) in &records {
        let body = reader.body_of(*offset, header)?;
        if header.kind == RecordKind::Head && matches!(Head::decode(&body), Err(Malformed::Unsupported(_))) {
            return Ok(None);
        }
        if header.kind == RecordKind::List {
            found.add_list(header, &body, *offset, (total, reader.length()));
        } else {
            found.add(header, &body, *offset);
        }
    }
    // Its LIST says more: where PACKs of other lanes stand.
    let listed = if found.from_lists.records.is_empty() {
        found.listed
    } else {
        found.from_lists
    };
    let ends = listed.records.iter().map(RecordLocation::end);
    let commit = Commit {
        store_end: ends.max().unwrap_or(StoreBlock(0)),
        lane,
        epoch,
        ..found.commit
    };
    let is_complete = found.is_final && !found.has_gap && commit.number.is_allowed();
    let location = CommitLocation {
        offset: records.last().map_or(0, |(_, offset)| *offset),
        ..CommitLocation::default()
    };
    Ok(is_complete.then(|| Committed {
        commit,
        location,
        lane,
        epoch,
        listed,
        salvaged: true,
        ..Committed::default()
    }))
}

/// An epoch without COMMIT, as far as its records tell.
#[derive(Default)]
struct Salvaged {
    commit: Commit,
    /// What the records themselves say.
    listed: Listed,
    /// What LISTs say of them.
    from_lists: Listed,
    lists_seen: HashSet<Hash>,
    /// Whether the last record of the final images is there.
    is_final: bool,
    /// Whether a record before one of the final images is missing: it may be one of them.
    has_gap: bool,
    /// The number of the record before.
    before: Option<u64>,
}

impl Salvaged {
    /// Adds a record. One that cannot be decoded is left out.
    fn add(&mut self, header: &RecordHeader, body: &[u8], offset: u64) {
        let mut location = location_of(header, offset);
        let follows = self.before.is_some_and(|before| before + 1 == header.sequence);
        self.before = Some(header.sequence);
        match header.kind {
            RecordKind::Plan => {
                let Ok(plan) = PlanRecord::decode(body) else { return };
                self.commit.number = plan.commit;
                location.part = plan.part.number();
                if plan.part == PlanPart::Final {
                    self.has_gap |= !follows;
                    self.is_final = plan.last;
                }
                if let (PlanPart::Blocks, Ok(announced)) = (plan.part, plan.announced()) {
                    location.first = announced.first;
                    location.blocks = announced.end() - announced.first;
                }
            }
            RecordKind::Pack => {
                let Ok(table) = pack::decode_table(body, header.body_bytes, None) else {
                    return;
                };
                location.first = table.first;
                location.blocks = table.blocks;
                location.table_hash = table.hash;
            }
            RecordKind::Index => {
                let Ok((first, hashes)) = index::decode(body) else {
                    return;
                };
                location.first = first;
                location.blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
            }
            _ => return,
        }
        self.listed.records.push(location);
    }

    /// Adds a LIST. Of one that cannot be decoded to its end, or has more than commits of a file of `length` bytes may list, nothing is
    /// believed.
    fn add_list(&mut self, header: &RecordHeader, body: &[u8], offset: u64, (total, length): (&mut ListedTotal, u64)) {
        self.before = Some(header.sequence);
        if self.commit.lists.len() >= LISTS_MAX || !self.lists_seen.insert(header.body_hash) {
            return;
        }
        let mut listed = Listed::default();
        let Ok(part) = list::add_any(&mut listed, &mut Vec::new(), body, header.lane) else {
            return;
        };
        // What is salvaged is not asked which addresses it uses.
        listed.uses = Vec::new();
        if total.check(&listed, length).is_err() {
            return;
        }
        total.count(&listed);
        self.from_lists.append(&mut listed);
        let location = location_of(header, offset);
        self.commit.lists.push(ListLocation {
            part,
            sequence: location.sequence,
            offset: location.offset,
            length: location.length,
            body_hash: location.body_hash,
        });
    }
}

/// Where a record is, and nothing of what it holds.
fn location_of(header: &RecordHeader, offset: u64) -> RecordLocation {
    RecordLocation {
        kind: header.kind,
        part: 0,
        lane: header.lane,
        sequence: header.sequence,
        offset,
        length: HEADER_BYTES as u64 + header.body_bytes,
        first: StoreBlock(0),
        blocks: 0,
        body_hash: header.body_hash,
        table_hash: [0; 32],
    }
}
