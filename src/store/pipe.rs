//! Archives that are read from standard input or written to standard output.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{Store, unsupported};
use crate::monitor::Monitor;

/// Standard input, which is read once and in order. The user can interrupt a read that waits for the writer.
pub struct InputPipe<'a> {
    /// The file, and the offset of its next byte.
    file: Mutex<(File, u64)>,
    monitor: &'a dyn Monitor,
}

impl std::fmt::Debug for InputPipe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("InputPipe")
            .field("file", &self.file)
            .finish_non_exhaustive()
    }
}

impl<'a> InputPipe<'a> {
    /// Duplicates the descriptor of standard input, which is then read without a buffer.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn new(monitor: &'a dyn Monitor) -> io::Result<Self> {
        let file = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 0)?;
        Ok(Self::of(file.into(), monitor))
    }

    /// Reads another descriptor in place of standard input.
    pub fn of(file: File, monitor: &'a dyn Monitor) -> Self {
        Self {
            file: Mutex::new((file, 0)),
            monitor,
        }
    }

    fn read(&self, file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
        const LOOK_EVERY: Timespec = Timespec {
            tv_sec: 0,
            tv_nsec: 200_000_000,
        };
        loop {
            if self.monitor.interrupted() {
                // The kind must not be `Interrupted`: a caller that reads to the end would try again.
                return Err(io::Error::other("interrupted"));
            }
            match poll(&mut [PollFd::new(&*file, PollFlags::IN)], Some(&LOOK_EVERY)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => match file.read(buffer) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    read => return read,
                },
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Store for InputPipe<'_> {
    fn path(&self) -> &Path {
        Path::new("stdin")
    }

    fn length(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut file = lock(&self.file);
        if offset != file.1 {
            return Err(unsupported("a pipe is read once and in order"));
        }
        let read = self.read(&mut file.0, buffer)?;
        file.1 += read as u64;
        Ok(read)
    }

    fn append(&self, _: &[u8]) -> io::Result<()> {
        Err(unsupported("standard input is not written to"))
    }

    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    fn truncate(&self, _: u64) -> io::Result<()> {
        Err(unsupported("standard input is not written to"))
    }
}

/// Standard output, which may be a pipe or a file.
#[derive(Debug)]
pub struct OutputPipe {
    /// A duplicate of the descriptor. Rust's own handle would ignore a closed descriptor without an error.
    file: Mutex<File>,
}

impl OutputPipe {
    /// Duplicates the descriptor of standard output.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub fn new() -> io::Result<Self> {
        let file = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 0)?;
        Ok(Self::of(file.into()))
    }

    /// Writes to another descriptor in place of standard output.
    pub fn of(file: File) -> Self {
        Self { file: Mutex::new(file) }
    }
}

impl Store for OutputPipe {
    fn path(&self) -> &Path {
        Path::new("stdout")
    }

    fn length(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<usize> {
        Err(unsupported("standard output is not read"))
    }

    fn append(&self, bytes: &[u8]) -> io::Result<()> {
        lock(&self.file).write_all(bytes)
    }

    fn settle(&self) -> io::Result<()> {
        let file = lock(&self.file);
        if file.metadata()?.is_file() {
            file.sync_data()?;
        }
        Ok(())
    }

    fn truncate(&self, _: u64) -> io::Result<()> {
        Err(unsupported("what went through a pipe cannot be taken back"))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
