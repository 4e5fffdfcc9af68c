//! A store for tests that records every call, and fails, tears or delays one of them.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::store::Store;

/// A call that was made to a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreCall {
    /// [`Store::length`].
    Length,
    /// [`Store::read_at`], with the offset and the length of the buffer.
    Read(u64, usize),
    /// [`Store::append`], with the number of bytes.
    Append(usize),
    /// [`Store::settle`].
    Settle,
    /// [`Store::truncate`], with the new length.
    Truncate(u64),
}

/// What goes wrong with a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The call fails with this error number, and does nothing.
    Fails(i32),
    /// The call fails with this error number after half of the bytes were appended.
    Tears(i32),
    /// The call takes this much longer.
    Delays(Duration),
    /// This call and all later ones fail: the host of the store is gone.
    Dies,
}

/// A store of whose calls one goes wrong.
#[derive(Debug)]
pub struct FaultyStore<S> {
    inner: S,
    /// The number of the faulty call, from 0.
    at: u64,
    fault: StoreFault,
    next: AtomicU64,
    calls: Mutex<Vec<StoreCall>>,
}

impl<S: Store> FaultyStore<S> {
    /// Makes the call with number `at`, counted from 0, go wrong. `u64::MAX` makes none go wrong, and only records calls.
    pub fn new(inner: S, at: u64, fault: StoreFault) -> Self {
        Self {
            inner,
            at,
            fault,
            next: AtomicU64::new(0),
            calls: Mutex::default(),
        }
    }

    /// Returns the calls so far.
    pub fn calls(&self) -> Vec<StoreCall> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the wrapped store.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn call<T>(
        &self,
        call: StoreCall,
        whole: impl FnOnce() -> io::Result<T>,
        half: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<T> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
        match self.fault {
            StoreFault::Fails(error) if number == self.at => Err(io::Error::from_raw_os_error(error)),
            StoreFault::Tears(error) if number == self.at => {
                half()?;
                Err(io::Error::from_raw_os_error(error))
            }
            StoreFault::Dies if number >= self.at => Err(io::Error::from_raw_os_error(libc::EIO)),
            StoreFault::Delays(time) if number == self.at => {
                std::thread::sleep(time);
                whole()
            }
            _ => whole(),
        }
    }
}

impl<S: Store> Store for FaultyStore<S> {
    fn path(&self) -> &Path {
        self.inner.path()
    }

    fn length(&self) -> io::Result<Option<u64>> {
        self.call(StoreCall::Length, || self.inner.length(), || Ok(()))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let call = StoreCall::Read(offset, buffer.len());
        self.call(call, || self.inner.read_at(offset, buffer), || Ok(()))
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        let half = || self.inner.append(&bytes[..bytes.len() / 2]);
        self.call(StoreCall::Append(bytes.len()), || self.inner.append(bytes), half)
    }

    fn settle(&self) -> io::Result<()> {
        self.call(StoreCall::Settle, || self.inner.settle(), || Ok(()))
    }

    fn truncate(&self, length: u64) -> io::Result<()> {
        self.call(StoreCall::Truncate(length), || self.inner.truncate(length), || Ok(()))
    }
}
