//! Indexes in memory, for tests. They do not outlast the process.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound::{Excluded, Unbounded};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ChunkIndex;
use super::recorded::{Recorded, tree_name};
use super::tables::{Answer, TableRow, Tables};
use crate::fingerprint::FingerprintFunction;

type Table = BTreeMap<Vec<u8>, Vec<u8>>;

/// The tables of indexes in memory. Like a folder, it can be opened several times.
#[derive(Debug, Clone, Default)]
pub struct MemoryIndex(Arc<Mutex<HashMap<Vec<u8>, Table>>>);

impl MemoryIndex {
    /// Opens the index for fingerprints of a function.
    pub fn open(&self, function: FingerprintFunction) -> Box<dyn ChunkIndex> {
        let tree = tree_name(function).into_bytes();
        Box::new(Recorded::new(Path::new("memory"), self.clone(), tree))
    }

    fn tables(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Table>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tables for MemoryIndex {
    fn get(&self, table: &[u8], keys: Vec<Vec<u8>>) -> Answer<Vec<Option<Vec<u8>>>> {
        let tables = self.tables();
        let table = tables.get(table);
        Ok(keys
            .iter()
            .map(|key| table.and_then(|table| table.get(key)).cloned())
            .collect())
    }

    fn after(&self, table: &[u8], key: Option<Vec<u8>>, count: usize) -> Answer<Vec<TableRow>> {
        let tables = self.tables();
        let start = key.map_or(Unbounded, Excluded);
        let records = tables
            .get(table)
            .into_iter()
            .flat_map(|table| table.range((start.clone(), Unbounded)));
        Ok(records
            .take(count)
            .map(|(key, record)| (key.clone(), record.clone()))
            .collect())
    }

    fn put(&self, table: &[u8], records: Vec<TableRow>) -> Answer<()> {
        self.tables().entry(table.to_vec()).or_default().extend(records);
        Ok(())
    }

    fn flush(&self) -> Answer<()> {
        Ok(())
    }

    fn is_usable(&self) -> bool {
        true
    }
}
