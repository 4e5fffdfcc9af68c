//! Long lists: what is known of each extent and of each range that images map. There are tens of millions of them in a pool that is
//! large and fragmented, and a host has a few gigabytes of memory: what goes beyond a budget lies in unnamed files beside the index.

use std::ops::{Deref, DerefMut};
use std::path::Path;

use allocator_api2::vec::{IntoIter, Vec};

pub use crate::sys::spill::bytes_in_files;
use crate::sys::spill::{Spill, limit};

/// A vector that may lie in a file: [`limit_lists`] says from which size on.
#[derive(Clone, PartialEq, Eq)]
pub struct SpillVec<T>(Vec<T, Spill>);

/// A map that may lie in a file, too.
pub type SpillMap<K, V> = hashbrown::HashMap<K, V, hashbrown::DefaultHashBuilder, Spill>;

/// Says how many bytes of lists are in memory, from now on. Where there can be no files in `folder`, or it has too little room, lists stay
/// in memory.
pub fn limit_lists(bytes: u64, folder: &Path) {
    limit(usize::try_from(bytes).unwrap_or(usize::MAX), folder.to_owned());
}

impl<T> SpillVec<T> {
    /// An empty one.
    pub fn new() -> Self {
        Self(Vec::new_in(Spill))
    }

    /// An empty one with room for so many.
    pub fn with_capacity(count: usize) -> Self {
        Self(Vec::with_capacity_in(count, Spill))
    }
}

impl<T: Clone> SpillVec<T> {
    /// So many times the same.
    pub fn of(value: T, count: usize) -> Self {
        let mut all = Self::with_capacity(count);
        all.resize(count, value);
        all
    }
}

impl<T> Default for SpillVec<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for SpillVec<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> Deref for SpillVec<T> {
    type Target = Vec<T, Spill>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T> DerefMut for SpillVec<T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<T> FromIterator<T> for SpillVec<T> {
    fn from_iter<I: IntoIterator<Item = T>>(items: I) -> Self {
        let mut all = Self::new();
        all.extend(items);
        all
    }
}

impl<T> IntoIterator for SpillVec<T> {
    type Item = T;
    type IntoIter = IntoIter<T, Spill>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

impl<'a, T> IntoIterator for &'a SpillVec<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter()
    }
}

impl<'a, T> IntoIterator for &'a mut SpillVec<T> {
    type Item = &'a mut T;
    type IntoIter = std::slice::IterMut<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter_mut()
    }
}
