//! Repairs an archive from its parity: finds what is lost, puts where it belongs what stands elsewhere, computes the rest, and proves all of it by the
//! hashes of records before anything is written. Whatever PARITY records say, every record that is intact stays intact.
//!
//! `scan` reads the file once; `shifts` says where bytes stand that were moved; `view` is the archive as it is healed; `group` heals a group; `second` takes
//! what parity cannot heal from another copy of the archive; `copy` and `in_place` write what was healed.

mod copy;
mod group;
mod in_place;
mod scan;
mod second;
mod shifts;
mod view;

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::Arc;

pub use self::copy::write_copy;
pub use self::in_place::{InPlace, refuse_pending};
pub use self::view::View;

use self::group::{Group, Look, put_record, record_at};
use self::scan::{Anchor, FoundRecord, HeaderHash, Scan};
use self::second::SecondCopy;
use self::shifts::Shifts;
use self::view::{Kept, Moved, Readable};
use crate::archive::commit::{CommitLocation, encode_tail};
use crate::archive::record::{DecodedHeader, EpochId, HEADER_BYTES, LaneId, RecordHeader, RecordKind};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::parity::CELL_BYTES;
use crate::parity::geometry::{CommitPlace, Geometry};
use crate::store::Store;

/// Bytes of a TAIL with its header.
const TAIL_BYTES: u64 = HEADER_BYTES as u64 + 96;
/// Times that groups are healed anew because what was healed made more of another group heal.
const ROUNDS: usize = 3;
/// Times the length of the file that groups are together, with their parity, at most: a reader may stop there.
const LENGTHS: u64 = 16;
/// What groups may have beside that.
const LENGTH_SPARED: u64 = 256 << 20;
/// Places of headers that are known, at most.
const ANCHORS_MAX: usize = 1 << 22;

/// What was found of an archive's parity, and healed by it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Healing {
    /// Groups that have parity.
    pub groups: usize,
    /// Percent of the last one that heal.
    pub percent: u8,
    /// Bytes of the archive that have parity.
    pub protected_bytes: u64,
    /// Bytes of the archive, as it was.
    pub length: u64,
    /// Bytes of groups that are lost in the file, in whole cells.
    pub lost_bytes: u64,
    /// Bytes that stood elsewhere, because others are missing or stand twice.
    pub moved_bytes: u64,
    /// Bytes that were computed.
    pub healed_bytes: u64,
    /// Bytes of records that were taken from another copy.
    pub taken_bytes: u64,
    /// Bytes of any one stretch of each group that may be lost beside what is, and still heal; none if a group has lost too much.
    pub spare_bytes: Option<u64>,
}

/// A damaged archive that is to be healed.
pub struct Healer<'a> {
    view: Arc<View>,
    /// In the order in which they heal: those whose PARITY records stand last come first.
    groups: Vec<State>,
    second: Option<SecondCopy>,
    /// The records of the file that are intact.
    records: Vec<FoundRecord>,
    healing: Healing,
    monitor: &'a dyn Monitor,
}

/// A group, and what was found of it last.
struct State {
    group: Group,
    look: Look,
}

impl<'a> Healer<'a> {
    /// Reads a damaged archive. `cells` is an empty file for what is computed; `second` is another copy of the archive.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Damaged`] if it has more records than allowed; [`Error::Interrupted`].
    pub fn new(
        store: Arc<dyn Store>,
        second: Option<Arc<dyn Store>>,
        cells: File,
        monitor: &'a dyn Monitor,
    ) -> Result<Self> {
        let store: Arc<dyn Store> = Arc::new(Readable(store));
        let length = length_of(&*store)?;
        let scan = Scan::new(&*store, length, monitor)?;
        let mut file = Moved {
            store,
            length,
            shifts: Shifts::default(),
        };
        let groups = usable_groups(&scan);
        let anchors = anchors_of(&scan, &groups, &mut file)?;
        file.shifts = Shifts::new(anchors.clone());
        let second = second
            .map(|second| SecondCopy::new(second, &groups, &file, monitor))
            .transpose()?;
        let mut length = end_of(&groups).unwrap_or(length);
        if let Some(tail) = unprotected_tail(&scan, &groups, &anchors, &file, length)? {
            let shift = tail.checked_signed_diff(length).unwrap_or(0);
            file.shifts.push(length, shift);
            length = length.saturating_add(scan.length.saturating_sub(tail));
        }
        let kept = kept_of(&scan, &anchors, &file.shifts);
        let view = Arc::new(View::new(file, length, kept, cells));
        let states = groups.into_iter().map(|group| State {
            group,
            look: Look::default(),
        });
        Ok(Self {
            view,
            groups: states.collect(),
            second,
            records: scan.records,
            healing: Healing::default(),
            monitor,
        })
    }

    /// Looks at all groups, and heals nothing.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Interrupted`].
    pub fn look(&mut self) -> Result<Healing> {
        let total: u64 = self.groups.iter().map(|state| state.group.geometry.length).sum();
        self.monitor.phase("Checking parity", total);
        for place in 0..self.groups.len() {
            self.look_at(place)?;
            self.healing.lost_bytes += (self.groups[place].look.lost() * CELL_BYTES) as u64;
        }
        Ok(self.healing_so_far())
    }

    /// Heals what can be healed. Returns the healed archive, and what was done.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NoSpace`] if there is no space for what is computed; [`Error::Interrupted`].
    pub fn heal(mut self) -> Result<(Arc<View>, Healing)> {
        self.heal_groups()?;
        if !self.view.is_the_file() && self.loses_records()? {
            // What PARITY records say of places is wrong. Without that, all that is intact stays where it is.
            let kept = self.records.iter().map(|record| Kept {
                origin: record.at,
                length: record.length,
                at: record.at,
            });
            let unmoved = self.view.unmoved(kept.collect());
            self.view = Arc::new(unmoved.map_err(Error::io("make a file for", self.view.path()))?);
            self.healing = Healing::default();
            self.heal_groups()?;
        }
        let mut healing = self.healing_so_far();
        if let Some(second) = &self.second {
            healing.taken_bytes = second.fill(&self.view, self.monitor)?;
        }
        Ok((self.view, healing))
    }

    /// Returns whether a record that is intact in the file is not in the archive as it is healed so far.
    fn loses_records(&self) -> Result<bool> {
        let healed = Scan::new(&*self.view, self.view.length(), self.monitor)?;
        let intact: HashSet<HeaderHash> = healed.records.iter().map(|record| record.hash).collect();
        Ok(self.records.iter().any(|record| !intact.contains(&record.hash)))
    }

    fn heal_groups(&mut self) -> Result<()> {
        let total: u64 = self.groups.iter().map(|state| state.group.geometry.length).sum();
        for round in 0..ROUNDS {
            self.monitor.phase("Healing", total);
            let mut is_changed = false;
            for place in 0..self.groups.len() {
                let is_first = round == 0;
                if is_first || self.groups[place].look.lost() > 0 {
                    is_changed |= self.heal_group(place, is_first)?;
                }
            }
            for place in (0..self.groups.len()).rev() {
                is_changed |= self.end_group(place)?;
            }
            let has_lost = self.groups.iter().any(|state| state.look.lost() > 0);
            if !has_lost || !is_changed {
                break;
            }
        }
        Ok(())
    }

    fn look_at(&mut self, place: usize) -> Result<()> {
        let others: Vec<&Moved> = self.second.iter().map(SecondCopy::moved).collect();
        let state = &mut self.groups[place];
        state.look = state.group.look(&self.view, &others, self.monitor)?;
        Ok(())
    }

    /// Returns whether anything of a group was healed.
    fn heal_group(&mut self, place: usize, is_first: bool) -> Result<bool> {
        self.look_at(place)?;
        let cell = CELL_BYTES as u64;
        let (lost, moved) = (self.groups[place].look.lost(), self.groups[place].look.found_elsewhere);
        self.healing.moved_bytes += moved as u64 * cell;
        if is_first {
            self.healing.lost_bytes += lost as u64 * cell;
        }
        if lost == 0 {
            return Ok(moved > 0);
        }
        let state = &self.groups[place];
        let healed = state.group.heal(&state.look, &self.view, self.monitor)?;
        self.healing.healed_bytes += healed as u64 * cell;
        if healed > 0 {
            self.look_at(place)?;
        }
        Ok(healed + moved > 0)
    }

    /// Makes the PARITY records of a group again, and the COMMIT and TAIL that follow them, if they are not what they should be. Returns whether it
    /// did.
    fn end_group(&mut self, place: usize) -> Result<bool> {
        let view = &self.view;
        let State { group, look } = &self.groups[place];
        let mut is_changed = false;
        if look.lost() == 0 && !group.has_whole_parity(view) {
            is_changed |= group.remake_parity(view, self.monitor)?;
        }
        if let (Some(commit), Some(last)) = (group.geometry.commit, group.layouts.last()) {
            is_changed |= end_archive(view, &group.geometry, &commit, last.end)?;
        }
        Ok(is_changed)
    }

    fn healing_so_far(&self) -> Healing {
        let mut covered: Vec<(u64, u64)> = self
            .groups
            .iter()
            .map(|state| (state.group.geometry.offset, state.group.geometry.end()))
            .collect();
        covered.sort_unstable();
        let (mut protected, mut end) = (0, 0);
        for (from, to) in covered {
            protected += to.saturating_sub(from.max(end));
            end = end.max(to);
        }
        let spare = self.groups.iter().map(|state| state.look.spare_rows()).min();
        // A stretch that begins within a cell touches one more.
        let stretch = |rows: usize| (rows.saturating_sub(1) * crate::parity::ROW_BYTES) as u64;
        Healing {
            groups: self.groups.len(),
            percent: self.groups.first().map_or(0, |state| state.group.geometry.percent),
            protected_bytes: protected,
            length: self.view.length(),
            spare_bytes: spare.flatten().map(stretch),
            ..self.healing
        }
    }
}

fn length_of(store: &dyn Store) -> Result<u64> {
    let length = store.length().map_err(Error::io("look at", store.path()))?;
    length.ok_or_else(|| Error::io("look at", store.path())(std::io::ErrorKind::Unsupported))
}

/// The groups that can be those of a file, those whose PARITY records stand last first. What there is of them is in proportion to the file.
fn usable_groups(scan: &Scan) -> Vec<Group> {
    let mut groups: Vec<Group> = scan.groups.keys().map(|geometry| Group::new(*geometry)).collect();
    let order = |group: &Group| {
        let Geometry {
            place,
            offset,
            length,
            sequence,
            ..
        } = group.geometry;
        (
            place,
            offset,
            length,
            sequence,
            group.geometry.stored,
            group.geometry.headers,
        )
    };
    groups.sort_by_key(|group| std::cmp::Reverse(order(group)));
    let end_max = scan.length.saturating_mul(2).saturating_add(LENGTH_SPARED);
    let total_max = scan.length.saturating_mul(LENGTHS).saturating_add(LENGTH_SPARED);
    let mut total = 0u64;
    groups.retain(|group| {
        let end = end_of_group(group);
        let takes = group.geometry.length.saturating_add(end - group.geometry.place);
        let fits = end <= end_max && total.saturating_add(takes) <= total_max;
        if fits {
            total += takes;
        }
        fits
    });
    groups
}

/// Where the PARITY records of a group end, with the COMMIT and the TAIL that follow them.
fn end_of_group(group: &Group) -> u64 {
    let end = group.layouts.last().map_or(0, |layout| layout.end);
    end + group.geometry.commit.map_or(0, |commit| commit.length + TAIL_BYTES)
}

fn end_of(groups: &[Group]) -> Option<u64> {
    groups.iter().map(end_of_group).max()
}

/// Finds where what stands in the file belongs, by the tables of headers of all groups.
fn anchors_of(scan: &Scan, groups: &[Group], file: &mut Moved) -> Result<Vec<Anchor>> {
    let failed = |error| Error::io("read", file.store.path())(error);
    let of_group = |group: &Group| scan.groups.get(&group.geometry).cloned().unwrap_or_default();
    let mut anchors: Vec<Anchor> = groups.iter().flat_map(of_group).collect();
    // The tables stand in PARITY records, and these are moved too.
    let shifts = Shifts::new(anchors.clone());
    let tables = Moved {
        store: Arc::clone(&file.store),
        length: file.length,
        shifts,
    };
    for group in groups {
        for (origin, hash) in group.headers(&tables).map_err(failed)? {
            anchors.extend(scan.places_of(hash).map(|at| Anchor { origin, at }));
            if anchors.len() > ANCHORS_MAX {
                return Ok(anchors);
            }
        }
    }
    anchors.sort_unstable();
    anchors.dedup();
    Ok(anchors)
}

/// The records of the file that are intact, where they belong in the archive.
fn kept_of(scan: &Scan, anchors: &[Anchor], shifts: &Shifts) -> Vec<Kept> {
    let origins: HashMap<u64, u64> = anchors.iter().map(|anchor| (anchor.at, anchor.origin)).collect();
    // What stands between places that are not moved is not moved either.
    let last = anchors
        .iter()
        .map(|anchor| anchor.at)
        .max()
        .filter(|_| shifts.are_none());
    let kept = scan.records.iter().filter_map(|record| {
        let known = origins.get(&record.at).copied();
        let origin = known.or_else(|| last.filter(|last| record.at < *last).map(|_| record.at))?;
        Some(Kept {
            origin,
            length: record.length,
            at: record.at,
        })
    });
    let mut kept: Vec<Kept> = kept.collect();
    kept.sort_unstable();
    // Records do not overlap; what does so contradicts the rest.
    let mut end = 0;
    kept.retain(|one| {
        let follows = one.origin >= end;
        if follows {
            end = one.origin + one.length;
        }
        follows
    });
    kept
}

/// Where in the file something begins that stands behind everything that has parity: a later export without parity, or what one left that did not end.
fn unprotected_tail(scan: &Scan, groups: &[Group], anchors: &[Anchor], file: &Moved, end: u64) -> Result<Option<u64>> {
    let Some(last) = groups.iter().max_by_key(|group| end_of_group(group)) else {
        return Ok(None);
    };
    let expected = shifts::moved(end, file.shifts.last()).unwrap_or(end);
    if last.geometry.commit.is_none() {
        return Ok((expected < scan.length).then_some(expected));
    }
    let known: HashSet<HeaderHash> = known_hashes(scan, anchors);
    let last_known = anchors.iter().map(|anchor| anchor.at).max().unwrap_or(0);
    let mut behind: Vec<(u64, HeaderHash)> = scan.headers.iter().map(|(hash, at)| (*at, *hash)).collect();
    behind.retain(|(at, hash)| *at > last_known && !known.contains(hash));
    behind.sort_unstable();
    for (at, _) in behind {
        if !is_end_of(last, file, at)? {
            return Ok(Some(expected.min(at)));
        }
    }
    Ok(None)
}

/// The hashes of headers whose places are known.
fn known_hashes(scan: &Scan, anchors: &[Anchor]) -> HashSet<HeaderHash> {
    let places: HashSet<u64> = anchors.iter().map(|anchor| anchor.at).collect();
    let known = scan.headers.iter().filter(|(_, at)| places.contains(at));
    known.map(|(hash, _)| *hash).collect()
}

/// Whether the header at a place of the file is that of a PARITY record of a group, or of the COMMIT or the TAIL behind these.
fn is_end_of(group: &Group, file: &Moved, at: u64) -> Result<bool> {
    let mut bytes = [0; HEADER_BYTES];
    let read = file.store.read_exact_at(at, &mut bytes);
    read.map_err(Error::io("read", file.store.path()))?;
    let header = match RecordHeader::decode_any(&bytes) {
        Ok(DecodedHeader::Known(header)) => header,
        Ok(DecodedHeader::Unsupported(record)) => record.header,
        Err(_) => return Ok(false),
    };
    let first = group.geometry.sequence;
    let of_group = (header.lane.0, header.epoch.0) == (group.geometry.lane, group.geometry.epoch);
    let count = u64::from(group.geometry.records) + 2;
    Ok(of_group && (first..first + count).contains(&header.sequence))
}

/// Makes the last copy of the COMMIT and the TAIL again, if they are not what they should be. Returns whether it did.
fn end_archive(view: &View, geometry: &Geometry, commit: &CommitPlace, at: u64) -> Result<bool> {
    let tail_at = at + commit.length;
    let sequence = geometry.sequence + u64::from(geometry.records);
    let is_there = |origin, kind, sequence| {
        record_at(view, origin).is_some_and(|(header, _)| (header.kind, header.sequence) == (kind, sequence))
    };
    if is_there(at, RecordKind::Commit, sequence) && is_there(tail_at, RecordKind::Tail, sequence + 1) {
        return Ok(false);
    }
    let Some((first, mut body)) = record_at(view, commit.offset).filter(|(header, body)| {
        let length = (HEADER_BYTES + body.len()) as u64;
        header.kind == RecordKind::Commit && (header.body_hash, length) == (commit.body_hash, commit.length)
    }) else {
        return Ok(false);
    };
    let mut tail = encode_tail(&CommitLocation {
        offset: commit.offset,
        length: commit.length,
        body_hash: commit.body_hash,
    });
    let (lane, epoch) = (LaneId(geometry.lane), EpochId(geometry.epoch));
    let copied = first.copied(sequence, &mut body);
    let sealed = RecordHeader::of_body(RecordKind::Tail, lane, epoch, sequence + 1, &mut tail);
    let (Ok(copy), Ok(tail_header)) = (copied, sealed) else {
        return Ok(false);
    };
    put_record(view, at, &copy, &body)?;
    put_record(view, tail_at, &tail_header, &tail)?;
    Ok(true)
}
