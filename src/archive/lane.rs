//! What a lane's commits say of its store: which PACKs and INDEXes hold which addresses.

use std::collections::HashSet;
use std::ops::Range;

use super::limits::{FRAME_BLOCKS_MAX, LAYERS_MAX};
use super::list::RecordLocation;
use super::pack;
use super::reader::Committed;
use super::record::RecordKind;
use crate::codec::Decoded;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::range;

/// A record, and the commit that lists it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListedRecord {
    /// The commit's number.
    pub commit: CommitNumber,
    /// The record.
    pub location: RecordLocation,
}

/// The store of a lane.
#[derive(Debug, Default)]
pub struct LaneStore {
    packs: Layers,
    indexes: Layers,
    /// Addresses that no PACK need hold, a list.
    dead: Vec<Range<StoreBlock>>,
}

impl LaneStore {
    /// Puts together what commits of one lane list, in a file of a length in bytes.
    ///
    /// # Errors
    /// Says that an address has more records than allowed, that a PACK is listed twice, or that there are more addresses than the file can
    /// hold: what is kept of each takes memory.
    pub fn new(commits: &[&Committed], length: u64) -> Decoded<Self> {
        let mut bodies = HashSet::new();
        let placed = |record: &&RecordLocation| record.kind == RecordKind::Pack;
        let all = commits.iter().flat_map(|committed| &committed.listed.records);
        // One large record could otherwise be read a million times.
        if !all.filter(placed).all(|record| bodies.insert(record.body_hash)) {
            return Err("a PACK is listed twice".into());
        }
        let of = |kind| {
            let listed = commits.iter().flat_map(move |committed| {
                let records = committed.listed.records.iter().filter(move |one| one.kind == kind);
                records.map(|location| ListedRecord {
                    commit: committed.commit.number,
                    location: *location,
                })
            });
            Layers::new(listed.collect())
        };
        let dead = range::joined(commits.iter().flat_map(|committed| committed.listed.dead.clone()));
        let store_end = commits.iter().map(|committed| committed.commit.store_end).max();
        let alive = u64::from(store_end.unwrap_or_default().0).saturating_sub(range::count(&dead));
        if alive / u64::from(FRAME_BLOCKS_MAX) > length / pack::LINE_BYTES as u64 {
            return Err("its commits have more blocks than the archive can hold".into());
        }
        Ok(Self {
            packs: of(RecordKind::Pack)?,
            indexes: of(RecordKind::Index)?,
            dead,
        })
    }

    /// Returns the PACKs that have addresses of a range, the newest commit's first and those of one commit in order.
    pub fn packs(&self, wanted: Range<StoreBlock>) -> Vec<&ListedRecord> {
        self.packs.overlapping(wanted)
    }

    /// Returns the INDEXes that have addresses of a range, in the same order.
    pub fn indexes(&self, wanted: Range<StoreBlock>) -> Vec<&ListedRecord> {
        self.indexes.overlapping(wanted)
    }

    /// Returns whether no PACK need hold any address of a range.
    pub fn is_dead(&self, wanted: &Range<StoreBlock>) -> bool {
        wanted.is_empty() || range::overlap(&self.dead, wanted.clone()) == [wanted.clone()]
    }
}

/// Records by address, in as many layers as it takes for those of one layer to have no address in common.
#[derive(Debug, Default)]
struct Layers(Vec<Vec<ListedRecord>>);

impl Layers {
    fn new(mut records: Vec<ListedRecord>) -> Decoded<Self> {
        records.retain(|record| record.location.blocks > 0);
        records.sort_by_key(|record| (record.location.first, record.commit));
        let mut layers: Vec<Vec<ListedRecord>> = Vec::new();
        for record in records {
            let fits = |layer: &Vec<ListedRecord>| {
                let last = layer.last();
                last.is_none_or(|last| last.location.end() <= record.location.first)
            };
            match layers.iter().position(fits) {
                Some(layer) => layers[layer].push(record),
                None if layers.len() < LAYERS_MAX => layers.push(vec![record]),
                None => return Err("more records than allowed have one store address".into()),
            }
        }
        Ok(Self(layers))
    }

    fn overlapping(&self, wanted: Range<StoreBlock>) -> Vec<&ListedRecord> {
        let mut found: Vec<&ListedRecord> = Vec::new();
        for layer in &self.0 {
            let from = layer.partition_point(|record| record.location.end() <= wanted.start);
            found.extend(
                layer[from..]
                    .iter()
                    .take_while(|record| record.location.first < wanted.end),
            );
        }
        found.sort_by_key(|record| (std::cmp::Reverse(record.commit), record.location.first));
        found
    }
}
