//! The bytes of a backup in order, and the errors that name their places.

use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::compression::Compression;
use super::limits::Limits;
use crate::block::ByteRange;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::shown::size;
use crate::store::{Store, StoreReader};

/// Bytes that are read from a store at a time.
const READ_BYTES: usize = 1 << 18;
/// What a stream may decompress to, for each byte of content that its limits allow.
const DECOMPRESSED_FACTOR: u64 = 2;

/// The bytes of a backup, which are read once and in order, after decompression.
pub struct Input<'a> {
    path: PathBuf,
    reader: Box<dyn Read + 'a>,
    /// What was read to recognise the backup, and is not taken yet.
    peeked: Vec<u8>,
    /// Bytes that were taken.
    offset: u64,
    compression: Option<Compression>,
    /// The volume that all of it belongs to, and is not the whole backup.
    volume: Option<PathBuf>,
    is_member: bool,
    limits: Limits,
    monitor: &'a dyn Monitor,
}

impl std::fmt::Debug for Input<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Input")
            .field("path", &self.path)
            .field("offset", &self.offset)
            .finish_non_exhaustive()
    }
}

impl<'a> Input<'a> {
    /// The bytes of a store from its beginning on.
    pub fn of_store(store: &'a dyn Store, limits: Limits, monitor: &'a dyn Monitor) -> Self {
        let reader = BufReader::with_capacity(READ_BYTES, StoreReader::new(store, 0));
        Self::new(store.path(), Box::new(reader), limits, monitor)
    }

    /// The bytes of a member of a backup, of which `volume` is made. An [`Error`] that the reader gives as the reason of its own stays what it is.
    pub fn of_member(
        path: &Path,
        reader: Box<dyn Read + 'a>,
        volume: Option<PathBuf>,
        limits: Limits,
        monitor: &'a dyn Monitor,
    ) -> Self {
        Self {
            volume,
            is_member: true,
            ..Self::new(path, reader, limits, monitor)
        }
    }

    fn new(path: &Path, reader: Box<dyn Read + 'a>, limits: Limits, monitor: &'a dyn Monitor) -> Self {
        Self {
            path: path.to_owned(),
            reader,
            peeked: Vec::new(),
            offset: 0,
            compression: None,
            volume: None,
            is_member: false,
            limits,
            monitor,
        }
    }

    /// Its path, for messages and names.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The limits of the backup.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Whether it is decompressed.
    pub fn is_decompressed(&self) -> bool {
        self.compression.is_some()
    }

    /// Tells the user something that is no error.
    pub fn note(&self, message: &str) {
        self.monitor.note(message);
    }

    /// Whether the user asked to stop.
    pub fn interrupted(&self) -> bool {
        self.monitor.interrupted()
    }

    /// The offset of the next byte, after decompression.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// What decompressing the rest gives.
    ///
    /// # Errors
    /// [`Error::Io`] if no decompressor can be made.
    pub fn decompressed(self, compression: Compression) -> Result<Self> {
        let rest = io::Cursor::new(self.peeked).chain(self.reader);
        let rest = Box::new(BufReader::with_capacity(READ_BYTES, rest));
        let mut input = Self {
            compression: Some(compression),
            volume: self.volume,
            is_member: self.is_member,
            ..Self::new(&self.path, Box::new(io::empty()), self.limits, self.monitor)
        };
        input.reader = compression
            .decoder(rest, self.limits.window_bytes)
            .map_err(|error| input.failed(error, 0))?;
        Ok(input)
    }

    /// The next bytes, `length` of them or as many as there are. They are not taken.
    ///
    /// # Errors
    /// Those of [`Input::fill`].
    pub fn peek(&mut self, length: usize) -> Result<&[u8]> {
        let have = self.peeked.len();
        if have < length {
            self.peeked.resize(length, 0);
            let read = self.read_up_to(have);
            self.peeked.truncate(have + *read.as_ref().unwrap_or(&0));
            read?;
        }
        Ok(&self.peeked[..length.min(self.peeked.len())])
    }

    /// Fills what was peeked from `from` on, and returns how many bytes there were.
    fn read_up_to(&mut self, from: usize) -> Result<usize> {
        let mut peeked = std::mem::take(&mut self.peeked);
        let read = self.read_full(&mut peeked[from..]);
        self.peeked = peeked;
        read
    }

    /// Takes the next bytes: as many as the buffer has, or fewer at the end.
    ///
    /// # Errors
    /// [`Error::DamagedBackup`] if the bytes cannot be decompressed; [`Error::Io`]; [`Error::Interrupted`].
    pub fn fill(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let ready = self.peeked.len().min(buffer.len());
        buffer[..ready].copy_from_slice(&self.peeked[..ready]);
        self.peeked.drain(..ready);
        let read = ready + self.read_full(&mut buffer[ready..])?;
        self.offset += read as u64;
        // What is not content grows as well: padding, and what is skipped.
        if self.compression.is_some() && self.offset / DECOMPRESSED_FACTOR > self.limits.volume_bytes {
            return Err(self.refused("it decompresses to more than vmfold takes"));
        }
        Ok(read)
    }

    /// Takes as many bytes as the buffer has. `volume` is what they belong to, for the error.
    ///
    /// # Errors
    /// Those of [`Input::fill`]; [`Error::DamagedBackup`] if there are fewer.
    pub fn exact(&mut self, buffer: &mut [u8], volume: Option<&Path>) -> Result<()> {
        let start = self.offset;
        let length = buffer.len() as u64;
        if self.fill(buffer)? < buffer.len() {
            return Err(self.damaged(start, length, volume.map(Path::to_owned), "it ends too early"));
        }
        Ok(())
    }

    /// Takes and drops the next bytes.
    ///
    /// # Errors
    /// Those of [`Input::exact`].
    pub fn skip(&mut self, length: u64) -> Result<()> {
        const AT_ONCE: u64 = 1 << 16;
        let mut left = length;
        let mut buffer = Vec::new();
        while left > 0 {
            let piece = left.min(AT_ONCE);
            buffer.resize(usize::try_from(piece).unwrap_or(usize::MAX), 0);
            self.exact(&mut buffer, None)?;
            left -= piece;
        }
        Ok(())
    }

    /// Takes the rest, which must be zeros.
    ///
    /// # Errors
    /// Those of [`Input::fill`]; [`Error::DamagedBackup`] if there is anything else.
    pub fn zeros_to_end(&mut self) -> Result<()> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let start = self.offset;
            let read = self.fill(&mut buffer)?;
            if buffer[..read].iter().any(|byte| *byte != 0) {
                return Err(self.damaged(start, read as u64, None, "something follows its end"));
            }
            if read == 0 {
                return Ok(());
            }
        }
    }

    fn read_full(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            match self.reader.read(&mut buffer[done..]) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) if self.monitor.interrupted() => return Err(Error::Interrupted),
                Err(error) => return Err(self.failed(error, done)),
            }
        }
        Ok(done)
    }

    /// The error for a read that failed. What the system did not say, the decompressor did.
    fn failed(&self, error: io::Error, done: usize) -> Error {
        let error = match error.downcast::<Error>() {
            Ok(error) => return error,
            Err(error) => error,
        };
        match self.compression {
            Some(compression) if needs_memory(&error) => self.refused(format!(
                "decompressing its {} needs more memory than vmfold takes, which is {}",
                compression.name(),
                size(self.limits.window_bytes)
            )),
            Some(compression) if error.raw_os_error().is_none() => {
                let problem = format!("its {} does not go on: {error}", compression.name());
                self.damaged(self.offset + done as u64, 0, None, problem)
            }
            _ => Error::io("read", &self.path)(error),
        }
    }

    /// The error for bytes that are not as they must be.
    pub fn damaged(&self, start: u64, length: u64, volume: Option<PathBuf>, problem: impl Into<String>) -> Error {
        Error::DamagedBackup {
            path: self.path.clone(),
            range: ByteRange { start, length },
            decompressed: self.compression.is_some() || self.is_member,
            volume: volume.or_else(|| self.volume.clone()),
            problem: problem.into(),
        }
    }

    /// The error for a backup that is whole, as far as one can tell, and is not read.
    pub fn refused(&self, problem: impl Into<String>) -> Error {
        Error::RefusedBackup {
            path: self.path.clone(),
            problem: problem.into(),
        }
    }
}

/// Whether a decompressor gave up because its window or dictionary has more bytes than it may. zstd has only a text for that.
fn needs_memory(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::OutOfMemory || error.to_string() == "Frame requires too much memory for decoding"
}
