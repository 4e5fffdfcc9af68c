//! A store whose first bytes are known before it is read.

use std::io;
use std::path::Path;

use super::{Store, unsupported};

/// Bytes that are kept.
const HEAD_BYTES: usize = 4096;

/// A store, and its first bytes. These can be read again, also if the store can be read only once.
#[derive(Debug)]
pub struct PeekedStore<'a> {
    store: &'a dyn Store,
    head: Vec<u8>,
}

impl<'a> PeekedStore<'a> {
    /// Reads the first 4 KiB of a store, or all of it if it is shorter.
    ///
    /// # Errors
    /// Returns the error of [`Store::read_at`].
    pub fn new(store: &'a dyn Store) -> io::Result<Self> {
        let mut head = vec![0; HEAD_BYTES];
        let mut length = 0;
        while length < HEAD_BYTES {
            match store.read_at(length as u64, &mut head[length..]) {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        head.truncate(length);
        Ok(Self { store, head })
    }

    /// The first bytes.
    pub fn head(&self) -> &[u8] {
        &self.head
    }
}

impl Store for PeekedStore<'_> {
    fn path(&self) -> &Path {
        self.store.path()
    }

    fn length(&self) -> io::Result<Option<u64>> {
        self.store.length()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let ready = usize::try_from(offset).ok().and_then(|offset| self.head.get(offset..));
        match ready.filter(|ready| !ready.is_empty()) {
            Some(ready) => {
                let length = ready.len().min(buffer.len());
                buffer[..length].copy_from_slice(&ready[..length]);
                Ok(length)
            }
            None => self.store.read_at(offset, buffer),
        }
    }

    fn data_from(&self, offset: u64) -> u64 {
        self.store.data_from(offset)
    }

    fn append(&self, _: &[u8]) -> io::Result<()> {
        Err(unsupported("it is only read"))
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, _: u64) -> io::Result<()> {
        Err(unsupported("it is only read"))
    }
}
