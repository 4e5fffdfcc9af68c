//! Asks for a passphrase on the terminal, which does not show it.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

use crate::error::{Error, Result};
use crate::keys::Passphrase;
use crate::monitor::Monitor;
use crate::store::{InputPipe, StoreReader};

const TERMINAL: &str = "/dev/tty";
/// What stands for a key that does nothing: `_POSIX_VDISABLE`.
const NO_KEY: u8 = 0;

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
        // Ctrl-C ends the question, and the terminal is as before. Keys that would stop or kill this process leave it as it is: they are typed.
        for key in [SpecialCodeIndex::VQUIT, SpecialCodeIndex::VSUSP] {
            hidden.special_codes[key] = NO_KEY;
        }
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
    ask(monitor, "Passphrase of the backup: ")?.ok_or_else(|| {
        Error::Usage("the backup needs a passphrase, and there is no terminal to ask: see --passphrase-file".into())
    })
}

/// Asks for a passphrase by a question. Returns none if there is no terminal.
///
/// # Errors
/// [`Error::Usage`] if nothing is typed; [`Error::Interrupted`]; [`Error::Io`].
pub(super) fn ask(monitor: &dyn Monitor, question: &str) -> Result<Option<Passphrase>> {
    let path = Path::new(TERMINAL);
    let failed = |error: std::io::Error| Error::io("read", path)(error);
    let Ok(terminal) = File::options().read(true).write(true).open(path) else {
        return Ok(None);
    };
    let input = InputPipe::of(terminal.try_clone().map_err(failed)?, monitor);
    let mut hidden = Hidden::new(terminal).map_err(|errno| failed(errno.into()))?;
    hidden.terminal.write_all(question.as_bytes()).map_err(failed)?;
    match Passphrase::of_line(&mut StoreReader::new(&input, 0)) {
        Ok(Some(typed)) => Ok(Some(typed)),
        Ok(None) => Err(Error::Usage("no passphrase was given".into())),
        Err(_) if monitor.interrupted() => Err(Error::Interrupted),
        Err(error) => Err(failed(error)),
    }
}
