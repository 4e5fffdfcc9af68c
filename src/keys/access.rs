//! What the user gave to open a keyring. It is read once it is needed, and once only.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use zeroize::Zeroizing;

use super::age::{self, Identity, WorkFactor};
use super::passphrase::{PASSPHRASE_BYTES_MAX, Passphrase};
use super::program::Running;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::shown::shown;
use crate::store::{InputPipe, StoreReader};
use crate::sys::descriptor;

/// Asks the user for a passphrase by a question. Returns none if there is nobody to ask.
///
/// # Errors
/// [`Error::Usage`] if nothing is typed; [`Error::Interrupted`]; [`Error::Io`].
pub type Prompt = fn(&dyn Monitor, &str) -> Result<Option<Passphrase>>;

/// How plugins are found, and what they ask the user.
pub(super) struct Interaction<'a> {
    pub(super) prompt: Prompt,
    pub(super) plugin_folders: &'a [PathBuf],
    pub(super) monitor: &'a dyn Monitor,
}

/// What the user gave to open a keyring.
#[derive(Debug, Clone)]
pub struct GivenKeys {
    /// The file whose first line is the passphrase.
    pub passphrase_file: Option<PathBuf>,
    /// The descriptor from which the passphrase is read, up to the end of a line.
    pub passphrase_fd: Option<i32>,
    /// The command that prints the passphrase.
    pub passphrase_command: Option<String>,
    /// Files of identities of `age`.
    pub identities: Vec<PathBuf>,
    /// Asks the user where nothing else is given.
    pub prompt: Prompt,
    /// Where the programs of plugins are looked for: the absolute ones of these folders.
    pub plugin_folders: Vec<PathBuf>,
    /// The work of trying a passphrase, for slots that are made.
    pub work_factor: WorkFactor,
    /// The most work that a slot may ask for.
    pub work_factor_max: WorkFactor,
}

impl Default for GivenKeys {
    fn default() -> Self {
        Self {
            passphrase_file: None,
            passphrase_fd: None,
            passphrase_command: None,
            identities: Vec::new(),
            prompt: |_, _| Ok(None),
            plugin_folders: std::env::var_os("PATH")
                .map_or_else(Vec::new, |path| std::env::split_paths(&path).collect()),
            work_factor: WorkFactor::OF_NEW,
            work_factor_max: WorkFactor::DEFAULT,
        }
    }
}

/// What the user gave to open a keyring, and what was read of it.
#[derive(Debug, Clone, Default)]
pub struct KeyAccess {
    given: GivenKeys,
    /// The passphrase, once it was read. None if there is nobody to ask.
    passphrase: OnceLock<Option<Passphrase>>,
    /// The identities, once they were read.
    identities: OnceLock<Vec<Identity>>,
}

impl KeyAccess {
    /// Takes what the user gave. Nothing of it is read yet.
    pub fn new(given: GivenKeys) -> Self {
        Self {
            given,
            ..Self::default()
        }
    }

    /// What the user gave.
    pub fn given(&self) -> &GivenKeys {
        &self.given
    }

    /// How plugins are found, and what they ask the user.
    pub(super) fn interaction<'a>(&'a self, monitor: &'a dyn Monitor) -> Interaction<'a> {
        Interaction {
            prompt: self.given.prompt,
            plugin_folders: &self.given.plugin_folders,
            monitor,
        }
    }

    /// Whether a passphrase was given otherwise than by typing it.
    pub fn gives_passphrase(&self) -> bool {
        self.given.passphrase_file.is_some()
            || self.given.passphrase_fd.is_some()
            || self.given.passphrase_command.is_some()
    }

    /// The passphrase. If none was given, the user is asked by a question. Returns none if there is nobody to ask.
    ///
    /// # Errors
    /// [`Error::Usage`] if what was given holds none; [`Error::KeyProgram`] if the command fails; [`Error::Interrupted`]; [`Error::Io`].
    pub fn passphrase(&self, question: &str, monitor: &dyn Monitor) -> Result<Option<&Passphrase>> {
        once(&self.passphrase, || self.read_passphrase(question, monitor)).map(Option::as_ref)
    }

    /// The passphrase of a keyring that is made. If none was given, the user types it twice.
    ///
    /// # Errors
    /// As [`KeyAccess::passphrase`]; [`Error::Usage`] if there is nobody to ask, or what is typed differs.
    pub fn new_passphrase(&self, monitor: &dyn Monitor) -> Result<&Passphrase> {
        let asked = once(&self.passphrase, || {
            if self.gives_passphrase() {
                return self.read_passphrase("", monitor);
            }
            ask_twice(self.given.prompt, monitor).map(Some)
        })?;
        asked.as_ref().ok_or_else(nobody_to_ask)
    }

    /// The passphrase that was read already, or was given otherwise than by typing it. The user is not asked.
    ///
    /// # Errors
    /// As [`KeyAccess::passphrase`].
    pub fn passphrase_at_hand(&self, monitor: &dyn Monitor) -> Result<Option<&Passphrase>> {
        match self.passphrase.get() {
            Some(passphrase) => Ok(passphrase.as_ref()),
            None if self.gives_passphrase() => self.passphrase("", monitor),
            None => Ok(None),
        }
    }

    fn read_passphrase(&self, question: &str, monitor: &dyn Monitor) -> Result<Option<Passphrase>> {
        super::secret::forbid_core_dumps();
        if let Some(path) = &self.given.passphrase_file {
            return Passphrase::read(path).map(Some);
        }
        if let Some(number) = self.given.passphrase_fd {
            return of_descriptor(number, monitor).map(Some);
        }
        if let Some(command) = &self.given.passphrase_command {
            return of_command(command, monitor).map(Some);
        }
        (self.given.prompt)(monitor, question)
    }

    /// The identities of all files. One that is encrypted with a passphrase is decrypted by the one that was given, or that the user types.
    ///
    /// # Errors
    /// [`Error::Usage`] if a file holds none; [`Error::Io`]; as [`KeyAccess::passphrase`].
    pub fn identities(&self, monitor: &dyn Monitor) -> Result<&[Identity]> {
        let read = once(&self.identities, || {
            let mut identities = Vec::new();
            for path in &self.given.identities {
                identities.extend(self.read_identities_of(path, monitor)?);
            }
            Ok(identities)
        })?;
        Ok(read)
    }

    fn read_identities_of(&self, path: &Path, monitor: &dyn Monitor) -> Result<Vec<Identity>> {
        const BYTES_MAX: usize = 64 << 10;
        super::secret::forbid_core_dumps();
        let wrong = |problem: &str| Error::Usage(format!("`{}` {problem}", shown(path)));
        let file = File::open(path).map_err(Error::io("open", path))?;
        let mut content = Zeroizing::new(Vec::with_capacity(BYTES_MAX + 1));
        let mut limited = file.take(BYTES_MAX as u64 + 1);
        limited.read_to_end(&mut content).map_err(Error::io("read", path))?;
        if content.len() > BYTES_MAX {
            return Err(wrong("holds no identities: it is longer than 64 KiB"));
        }
        if age::is_file(&content) {
            let question = format!("Passphrase of `{}`: ", shown(path));
            let passphrase = self.passphrase(&question, monitor)?.ok_or_else(nobody_to_ask)?;
            let opened = age::open_with(&content, passphrase, self.given.work_factor_max);
            content = opened.map_err(|failure| wrong(&format!("cannot be opened: {failure}")))?;
        }
        let text = std::str::from_utf8(&content).map_err(|_| wrong("holds no identities: it is no text"))?;
        Identity::parse_all(text).map_err(wrong)
    }
}

/// Asks for a new passphrase, twice.
pub(super) fn ask_twice(prompt: Prompt, monitor: &dyn Monitor) -> Result<Passphrase> {
    super::secret::forbid_core_dumps();
    let first = prompt(monitor, "New passphrase: ")?.ok_or_else(nobody_to_ask)?;
    let second = prompt(monitor, "The same once more: ")?.ok_or_else(nobody_to_ask)?;
    if first.bytes() == second.bytes() {
        Ok(first)
    } else {
        Err(Error::Usage("what was typed first is not what was typed then".into()))
    }
}

fn nobody_to_ask() -> Error {
    Error::Usage(
        "a passphrase is needed, and there is no terminal to ask: see --passphrase-file, --passphrase-fd and --passphrase-command"
            .into(),
    )
}

/// What a cell holds. What makes it may fail, and is then tried again.
fn once<T>(cell: &OnceLock<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(made) = cell.get() {
        return Ok(made);
    }
    let made = make()?;
    Ok(cell.get_or_init(|| made))
}

/// Reads a passphrase from a descriptor that whoever runs vmfold left open.
fn of_descriptor(number: i32, monitor: &dyn Monitor) -> Result<Passphrase> {
    let path = PathBuf::from(format!("/dev/fd/{number}"));
    let file = descriptor::duplicate(number).map_err(Error::io("open", &path))?;
    let input = InputPipe::of(File::from(file), monitor);
    let line =
        Passphrase::of_line(&mut StoreReader::new(&input, 0)).map_err(|error| interrupted(monitor, error, &path))?;
    line.ok_or_else(|| {
        Error::Usage(format!(
            "descriptor {number} gave no passphrase: its first line is it, of {PASSPHRASE_BYTES_MAX} bytes at most"
        ))
    })
}

fn interrupted(monitor: &dyn Monitor, error: io::Error, path: &Path) -> Error {
    if monitor.interrupted() {
        Error::Interrupted
    } else {
        Error::io("read", path)(error)
    }
}

/// Runs a command that the user named, and takes the first line that it prints for the passphrase.
fn of_command(command: &str, monitor: &dyn Monitor) -> Result<Passphrase> {
    let failed = |problem: String| Error::KeyProgram {
        program: command.to_owned(),
        problem,
    };
    let child = Command::new("sh")
        .args(["-c", command])
        // Standard input may be an archive. What asks the user opens the terminal itself.
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn();
    let mut running = Running(child.map_err(|error| failed(format!("it cannot be run: {error}")))?);
    let Some(stdout) = running.0.stdout.take() else {
        return Err(failed("its output cannot be read".into()));
    };
    let input = InputPipe::of(File::from(std::os::fd::OwnedFd::from(stdout)), monitor);
    let mut printed = Zeroizing::new(Vec::with_capacity(PASSPHRASE_BYTES_MAX + 2));
    StoreReader::new(&input, 0)
        .take(PASSPHRASE_BYTES_MAX as u64 + 2)
        .read_to_end(&mut printed)
        .map_err(|error| interrupted(monitor, error, Path::new("sh")))?;
    if printed.len() > PASSPHRASE_BYTES_MAX + 1 {
        return Err(failed(format!("it printed more than {PASSPHRASE_BYTES_MAX} bytes")));
    }
    // It has closed its output, and is about to end.
    let status = running.0.wait().map_err(|error| failed(error.to_string()))?;
    if !status.success() {
        return Err(failed(format!("it failed: {status}")));
    }
    let line = Passphrase::of_line(&mut &printed[..]).map_err(|error| failed(error.to_string()))?;
    line.ok_or_else(|| failed("it printed no passphrase: its first line is it".into()))
}
