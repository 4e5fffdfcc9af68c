//! Lists that may be longer than memory: what is known of each extent, and of each range that images map. A large and fragmented pool has
//! tens of millions of them, and a host has a few gigabytes of memory. What exceeds a budget lies in unnamed files beside the index.

use std::ops::{Deref, DerefMut};

use allocator_api2::vec::{IntoIter, Vec};

pub use crate::sys::spill::Budget;

/// A vector that may lie in a file, as its [`Budget`] decides. Without a budget ([`SpillVec::default`], or one that is collected without)
/// it is in memory, whatever its length.
#[derive(Clone, PartialEq, Eq)]
pub struct SpillVec<T>(Vec<T, Budget>);

/// A hash map that may lie in a file, as its [`Budget`] decides.
pub type SpillMap<K, V> = hashbrown::HashMap<K, V, hashbrown::DefaultHashBuilder, Budget>;

impl<T> SpillVec<T> {
    /// Makes an empty vector.
    pub fn new_in(budget: &Budget) -> Self {
        Self(Vec::new_in(budget.clone()))
    }

    /// Makes an empty vector with capacity for `count` items.
    pub fn with_capacity_in(count: usize, budget: &Budget) -> Self {
        Self(Vec::with_capacity_in(count, budget.clone()))
    }

    /// Collects items into a vector.
    pub fn from_iter_in(items: impl IntoIterator<Item = T>, budget: &Budget) -> Self {
        let mut list = Self::new_in(budget);
        list.extend(items);
        list
    }

    /// Returns the budget that the vector was made from.
    pub fn budget(&self) -> &Budget {
        self.0.allocator()
    }
}

impl<T: Clone> SpillVec<T> {
    /// Makes a vector of `count` copies of `value`.
    pub fn of_in(value: T, count: usize, budget: &Budget) -> Self {
        let mut list = Self::with_capacity_in(count, budget);
        list.resize(count, value);
        list
    }
}

impl<T> Default for SpillVec<T> {
    fn default() -> Self {
        Self::new_in(&Budget::default())
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for SpillVec<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl<T> Deref for SpillVec<T> {
    type Target = Vec<T, Budget>;

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
        Self::from_iter_in(items, &Budget::default())
    }
}

impl<T> IntoIterator for SpillVec<T> {
    type Item = T;
    type IntoIter = IntoIter<T, Budget>;

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
