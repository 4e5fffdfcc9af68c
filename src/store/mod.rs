//! Where the bytes of an archive live. Reading and writing archives knows nothing else of files, pipes and what comes after them.
//!
//! To add a store, implement [`Store`] in a file here and run it through the conformance suite in `tests/store.rs`.

mod file;
mod memory;
mod pipe;

use std::fmt::Debug;
use std::io;
use std::path::Path;

pub use file::FileStore;
pub use memory::MemoryStore;
pub use pipe::{InputPipe, OutputPipe};

/// A sequence of bytes that is read anywhere and only ever grows, but for what an append that failed wrote.
///
/// What a store cannot do, it refuses with [`io::ErrorKind::Unsupported`]: a pipe is read once and in order, or appended to.
pub trait Store: Debug + Send + Sync {
    /// What messages call it.
    fn path(&self) -> &Path;

    /// Bytes that there are; none where only reading to the end tells.
    ///
    /// # Errors
    /// Those of the system.
    fn length(&self) -> io::Result<Option<u64>>;

    /// Reads from an offset on into a buffer, and returns how many bytes: 0 only at the end, or for an empty buffer.
    ///
    /// # Errors
    /// Those of the system; [`io::ErrorKind::Unsupported`] where bytes cannot be read in this order.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes all of some bytes behind the last. What of them is there after an error is not known: see [`Store::truncate`].
    ///
    /// # Errors
    /// Those of the system.
    fn append(&self, bytes: &[u8]) -> io::Result<()>;

    /// Returns once everything appended outlasts a power cut, as far as the store can tell.
    ///
    /// # Errors
    /// Those of the system.
    fn settle(&self) -> io::Result<()>;

    /// Cuts off what lies behind so many bytes: what an append that failed may have left.
    ///
    /// # Errors
    /// Those of the system; [`io::ErrorKind::Unsupported`] where nothing can be taken back.
    fn truncate(&self, length: u64) -> io::Result<()>;

    /// Fills a buffer from an offset on.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] where there is less; otherwise those of [`Store::read_at`].
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

/// A store from an offset on, in order.
#[derive(Debug)]
pub struct StoreReader<'a> {
    store: &'a dyn Store,
    offset: u64,
}

impl<'a> StoreReader<'a> {
    /// Begins at an offset.
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

fn unsupported(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, what)
}
