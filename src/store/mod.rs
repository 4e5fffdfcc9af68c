//! Stores: where the bytes of archives live. Reading and writing archives uses nothing else of files and pipes.
//!
//! To add a store, implement [`Store`] in a file here and run it through the conformance suite in `tests/store.rs`.

mod file;
mod memory;
mod peeked;
mod pipe;

use std::fmt::Debug;
use std::io;
use std::path::Path;

pub use file::FileStore;
pub use memory::MemoryStore;
pub use peeked::PeekedStore;
pub use pipe::{InputPipe, OutputPipe};

/// A sequence of bytes that can be read at any offset and only grows, except that the remains of a failed append are cut off.
///
/// A store refuses what it cannot do with [`io::ErrorKind::Unsupported`]: a pipe is read once and in order, or appended to.
pub trait Store: Debug + Send + Sync {
    /// Returns its name for messages.
    fn path(&self) -> &Path;

    /// Returns the length in bytes; `None` if it shows only at the end of the stream.
    ///
    /// # Errors
    /// Returns the error of the system.
    fn length(&self) -> io::Result<Option<u64>>;

    /// Reads bytes at an offset into a buffer, and returns how many it read. That is 0 only at the end, or for an empty buffer.
    ///
    /// # Errors
    /// Returns [`io::ErrorKind::Unsupported`] if bytes cannot be read in this order, and otherwise the error of the system.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Appends all of the bytes. After an error it is unknown how many of them were written: see [`Store::truncate`].
    ///
    /// # Errors
    /// Returns [`io::ErrorKind::Unsupported`] if the store is read-only, and otherwise the error of the system.
    fn append(&self, bytes: &[u8]) -> io::Result<()>;

    /// Returns once everything that was appended survives a power failure, as far as the store can ensure that.
    ///
    /// # Errors
    /// Returns the error of the system.
    fn settle(&self) -> io::Result<()>;

    /// Truncates the store to `length` bytes, to remove the remains of a failed append.
    ///
    /// # Errors
    /// Returns [`io::ErrorKind::Unsupported`] if nothing can be taken back, and otherwise the error of the system.
    fn truncate(&self, length: u64) -> io::Result<()>;

    /// Returns where the first byte from an offset on lies that may be no zero, or the end of the store. Without a file that can have holes, that
    /// is the offset.
    fn data_from(&self, offset: u64) -> u64 {
        offset
    }

    /// Fills a buffer with the bytes at an offset.
    ///
    /// # Errors
    /// Returns [`io::ErrorKind::UnexpectedEof`] if the store ends before the buffer is full, and otherwise the error of [`Store::read_at`].
    fn read_exact_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_at(offset.saturating_add(done as u64), &mut buffer[done..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Reads a store in order from an offset on.
#[derive(Debug)]
pub struct StoreReader<'a> {
    store: &'a dyn Store,
    offset: u64,
}

impl<'a> StoreReader<'a> {
    /// Makes a reader that begins at `offset`.
    pub fn new(store: &'a dyn Store, offset: u64) -> Self {
        Self { store, offset }
    }
}

impl io::Read for StoreReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.store.read_at(self.offset, buffer)?;
        self.offset += read as u64;
        Ok(read)
    }
}

fn unsupported(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, problem)
}
