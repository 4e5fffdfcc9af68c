//! The bytes of a backup in any order, and the errors that name their places.

use std::io;
use std::path::{Path, PathBuf};

use super::limits::Limits;
use crate::block::ByteRange;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::store::Store;

/// The bytes of a file, which are read in any order and as they are.
#[derive(Clone, Copy)]
pub(super) struct RandomInput<'a> {
    store: &'a dyn Store,
    length: u64,
    limits: Limits,
    monitor: &'a dyn Monitor,
}

impl<'a> RandomInput<'a> {
    /// The bytes of a store. It is `None` if the store is a pipe, which is read in order only.
    pub(super) fn of_store(store: &'a dyn Store, limits: Limits, monitor: &'a dyn Monitor) -> Result<Option<Self>> {
        let length = store.length().map_err(Error::io("look at", store.path()))?;
        Ok(length.map(|length| Self {
            store,
            length,
            limits,
            monitor,
        }))
    }

    /// The bytes of another store, with the same limits.
    pub(super) fn of_other(&self, store: &'a dyn Store) -> Result<Option<Self>> {
        Self::of_store(store, self.limits, self.monitor)
    }

    /// Tells the user something that is no error.
    pub(super) fn note(&self, message: &str) {
        self.monitor.note(message);
    }

    /// Its path, for messages and names.
    pub(super) fn path(&self) -> &'a Path {
        self.store.path()
    }

    /// Its length in bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Where the first byte from an offset on lies that may be no zero, or its end.
    pub(super) fn data_from(&self, offset: u64) -> u64 {
        self.store.data_from(offset).min(self.length)
    }

    /// The limits of the backup.
    pub(super) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Fills a buffer with the bytes at an offset. `volume` is what they belong to, for the error.
    ///
    /// # Errors
    /// [`Error::DamagedBackup`] if the file ends before; [`Error::Io`]; [`Error::Interrupted`].
    pub(super) fn exact_at(&self, offset: u64, buffer: &mut [u8], volume: Option<&Path>) -> Result<()> {
        if self.monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let length = buffer.len() as u64;
        let early = || self.damaged(offset, length, volume.map(Path::to_owned), "it ends too early");
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(early());
        }
        match self.store.read_exact_at(offset, buffer) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(early()),
            Err(error) => Err(Error::io("read", self.path())(error)),
        }
    }

    /// The error for bytes that are not as they must be.
    pub(super) fn damaged(
        &self,
        start: u64,
        length: u64,
        volume: Option<PathBuf>,
        problem: impl Into<String>,
    ) -> Error {
        Error::DamagedBackup {
            path: self.path().to_owned(),
            range: ByteRange { start, length },
            decompressed: false,
            volume,
            problem: problem.into(),
        }
    }

    /// The error for a file that is whole, as far as one can tell, and is not read.
    pub(super) fn refused(&self, problem: impl Into<String>) -> Error {
        Error::RefusedBackup {
            path: self.path().to_owned(),
            problem: problem.into(),
        }
    }
}
