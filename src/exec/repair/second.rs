//! Another copy of a damaged archive, from which records are taken that parity cannot heal.

use std::collections::HashMap;
use std::sync::Arc;

use super::group::Group;
use super::scan::{Anchor, FoundRecord, HeaderHash, Scan};
use super::shifts::Shifts;
use super::view::{Moved, Readable, View};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::store::Store;

/// Another copy, which may be damaged too, and may have fewer or other commits at its end.
pub(super) struct SecondCopy {
    moved: Moved,
    /// Its intact records, in order.
    records: Vec<FoundRecord>,
}

impl SecondCopy {
    /// Reads a copy. Where its records belong follows from the tables of headers of the archive's groups, which `file` has.
    pub(super) fn new(store: Arc<dyn Store>, groups: &[Group], file: &Moved, monitor: &dyn Monitor) -> Result<Self> {
        let store: Arc<dyn Store> = Arc::new(Readable(store));
        let length = super::length_of(&*store)?;
        let scan = Scan::new(&*store, length, monitor)?;
        let mut anchors = Vec::new();
        for group in groups {
            let headers = group.headers(file).map_err(Error::io("read", file.store.path()))?;
            for (origin, hash) in headers {
                anchors.extend(scan.places_of(hash).map(|at| Anchor { origin, at }));
            }
        }
        Ok(Self {
            moved: Moved {
                store,
                length,
                shifts: Shifts::new(anchors),
            },
            records: scan.records,
        })
    }

    /// The copy as a source of cells.
    pub(super) fn moved(&self) -> &Moved {
        &self.moved
    }

    /// Puts records of the copy where they are lost in the archive: behind the record that stands before them in the copy. Returns how many bytes
    /// that were.
    ///
    /// # Errors
    /// Returns the error of reading, or of writing what was taken; [`Error::Interrupted`].
    pub(super) fn fill(&self, view: &View, monitor: &dyn Monitor) -> Result<u64> {
        let intact = Scan::new(view, view.length(), monitor)?;
        let places: HashMap<HeaderHash, u64> = intact.records.iter().map(|record| (record.hash, record.at)).collect();
        let starts: Vec<(u64, u64)> = intact.records.iter().map(|record| (record.at, record.length)).collect();
        // Whether an intact record of the archive lies in a range.
        let is_taken = |from: u64, to: u64| {
            let first = starts.partition_point(|(at, length)| at + length <= from);
            starts.get(first).is_some_and(|(at, _)| *at < to)
        };
        let (mut next, mut taken) = (Some(0), 0);
        for record in &self.records {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            if let Some(at) = places.get(&record.hash) {
                next = Some(at + record.length);
                continue;
            }
            let Some(at) = next.filter(|at| at + record.length <= view.length() && !is_taken(*at, at + record.length))
            else {
                next = None;
                continue;
            };
            let mut bytes = vec![0; usize::try_from(record.length).unwrap_or(0)];
            let read = self.moved.store.read_exact_at(record.at, &mut bytes);
            read.map_err(Error::io("read", self.moved.store.path()))?;
            let written = view.write(at, &bytes);
            written.map_err(Error::writing("write what was computed for", view.path()))?;
            taken += record.length;
            next = Some(at + record.length);
        }
        Ok(taken)
    }
}
