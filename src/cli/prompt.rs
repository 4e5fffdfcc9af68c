//! Asks for a passphrase on the terminal, which does not show it.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};
use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::keys::Passphrase;
use crate::monitor::Monitor;
use crate::store::{InputPipe, StoreReader};

const TERMINAL: &str = "/dev/tty";
const BYTES_MAX: usize = 4096;

/// A terminal that does not show what is typed, until it is dropped.
struct Hidden {
    terminal: File,
    before: Termios,
}

impl Hidden {
    fn new(terminal: File) -> rustix::io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let mut hidden = before.clone();
        hidden.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&terminal, OptionalActions::Flush, &hidden)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = tcsetattr(&self.terminal, OptionalActions::Flush, &self.before);
        let _ = self.terminal.write_all(b"\n");
    }
}

/// Asks for the passphrase of a backup.
///
/// # Errors
/// [`Error::Usage`] if there is no terminal, or nothing is typed; [`Error::Interrupted`]; [`Error::Io`].
pub(super) fn passphrase(monitor: &dyn Monitor) -> Result<Passphrase> {
    let path = Path::new(TERMINAL);
    let failed = |error: std::io::Error| Error::io("read", path)(error);
    let terminal = File::options().read(true).write(true).open(path).map_err(|_| {
        Error::Usage("the backup needs a passphrase, and there is no terminal to ask: see --passphrase-file".into())
    })?;
    let input = InputPipe::of(terminal.try_clone().map_err(failed)?, monitor);
    let mut hidden = Hidden::new(terminal).map_err(|errno| failed(errno.into()))?;
    hidden
        .terminal
        .write_all(b"Passphrase of the backup: ")
        .map_err(failed)?;
    let mut reader = StoreReader::new(&input, 0);
    let mut line = Zeroizing::new(Vec::with_capacity(BYTES_MAX));
    let mut byte = [0];
    while line.len() < BYTES_MAX {
        match reader.read(&mut byte) {
            Ok(0) => break,
            Ok(_) if byte == *b"\n" => break,
            Ok(_) => line.push(byte[0]),
            Err(_) if monitor.interrupted() => return Err(Error::Interrupted),
            Err(error) => return Err(failed(error)),
        }
    }
    if line.is_empty() {
        return Err(Error::Usage("no passphrase was given".into()));
    }
    Ok(Passphrase::new(line.to_vec()))
}
