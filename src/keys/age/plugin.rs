//! Plugins of `age`: programs that hold keys, such as those on hardware tokens (<https://c2sp.org/age-plugin>).
//!
//! A plugin is run only for a recipient or an identity that the user named. It says what it wants in stanzas, and gets its answers so.

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};

use super::header::Stanza;
use super::{Failure, FileKey};
use crate::keys::access::Interaction;
use crate::keys::program::Running;
use crate::keys::secret::Secret;
use crate::shown::shown;
use crate::store::{InputPipe, Store};

/// The most bytes that a plugin may say in all.
const BYTES_MAX: u64 = 1 << 20;

/// Whether this can be the name of a plugin. It has no slash, so that it names no file elsewhere.
pub(super) fn is_name(name: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"-_.+".contains(&byte);
    !name.is_empty() && name.bytes().all(is_good)
}

/// Has the key of a file wrapped for a recipient.
pub(super) fn wrap(name: &str, recipient: &str, key: &FileKey, with: &Interaction<'_>) -> Result<Vec<Stanza>, Failure> {
    let mut plugin = Plugin::start(name, "recipient-v1", with)?;
    plugin.say(&Stanza::new(&["add-recipient", recipient], &[]))?;
    plugin.say(&Stanza::new(&["wrap-file-key"], key.bytes()))?;
    plugin.say(&Stanza::new(&["done"], &[]))?;
    let mut stanzas = Vec::new();
    plugin.serve(|said| match said.arguments.get(1..) {
        Some([_, kind @ ..]) if said.kind() == "recipient-stanza" && !kind.is_empty() => {
            stanzas.push(Stanza {
                arguments: kind.to_vec(),
                body: said.body.clone(),
            });
            true
        }
        _ => false,
    })?;
    if stanzas.is_empty() {
        return Err(plugin.failed("it wrapped no key"));
    }
    Ok(stanzas)
}

/// Has the key of one of several files unwrapped. Returns the number of the file, and its key; none if all are for somebody else.
pub(super) fn unwrap(
    name: &str,
    identity: &str,
    files: &[Vec<Stanza>],
    with: &Interaction<'_>,
) -> Result<Option<(usize, FileKey)>, Failure> {
    let mut plugin = Plugin::start(name, "identity-v1", with)?;
    plugin.say(&Stanza::new(&["add-identity", identity], &[]))?;
    for (number, stanzas) in files.iter().enumerate() {
        for stanza in stanzas {
            let number = number.to_string();
            let mut arguments = vec!["recipient-stanza", &number];
            arguments.extend(stanza.arguments.iter().map(String::as_str));
            plugin.say(&Stanza::new(&arguments, &stanza.body))?;
        }
    }
    plugin.say(&Stanza::new(&["done"], &[]))?;
    let mut found = None;
    plugin.serve(|said| {
        let [kind, number] = &said.arguments[..] else {
            return false;
        };
        let number = number.parse().ok().filter(|number| *number < files.len());
        match (kind == "file-key", number, <&[u8; 16]>::try_from(&said.body[..])) {
            (true, Some(number), Ok(key)) => {
                found.get_or_insert_with(|| (number, Secret::of(key)));
                true
            }
            _ => false,
        }
    })?;
    Ok(found)
}

/// A plugin that runs.
struct Plugin<'a> {
    name: &'a str,
    with: &'a Interaction<'a>,
    stdin: ChildStdin,
    stdout: InputPipe<'a>,
    /// The number of bytes that it said.
    said: u64,
    _running: Running,
}

impl<'a> Plugin<'a> {
    fn start(name: &'a str, machine: &str, with: &'a Interaction<'a>) -> Result<Self, Failure> {
        let failed = |problem: String| Failure::Program {
            name: program_of(name),
            problem,
        };
        let program = find(name, with.plugin_folders).ok_or_else(|| failed("it is not installed".into()))?;
        let child = Command::new(program)
            .arg(format!("--age-plugin={machine}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut running = Running(child.map_err(|error| failed(format!("it cannot be run: {error}")))?);
        let ends = (running.0.stdin.take(), running.0.stdout.take());
        let (Some(stdin), Some(stdout)) = ends else {
            return Err(failed("nobody can talk to it".into()));
        };
        Ok(Self {
            name,
            with,
            stdin,
            stdout: InputPipe::of(OwnedFd::from(stdout).into(), with.monitor),
            said: 0,
            _running: running,
        })
    }

    fn failed(&self, problem: impl Into<String>) -> Failure {
        if self.with.monitor.interrupted() {
            return Failure::Interrupted;
        }
        Failure::Program {
            name: program_of(self.name),
            problem: problem.into(),
        }
    }

    fn say(&mut self, stanza: &Stanza) -> Result<(), Failure> {
        let mut text = zeroize::Zeroizing::new(Vec::new());
        stanza.put(&mut text);
        let written = self.stdin.write_all(&text).and_then(|()| self.stdin.flush());
        written.map_err(|_| self.failed("it ended too early"))
    }

    fn hear(&mut self) -> Result<Stanza, Failure> {
        let first = self.line()?;
        Stanza::parse(&first, || self.line())
    }

    fn line(&mut self) -> Result<Vec<u8>, Failure> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            let read = self.stdout.read_at(self.said, &mut byte);
            if !matches!(read, Ok(1)) {
                return Err(self.failed("it ended too early"));
            }
            self.said += 1;
            if self.said > BYTES_MAX {
                return Err(self.failed("it says too much"));
            }
            if byte == *b"\n" {
                return Ok(line);
            }
            line.push(byte[0]);
        }
    }

    /// Answers what the plugin asks, until it is done. `take` takes its results, and says whether it knew what was said.
    fn serve(&mut self, mut take: impl FnMut(&Stanza) -> bool) -> Result<(), Failure> {
        let mut error = None;
        loop {
            let said = self.hear()?;
            let text = || shown(Path::new(&*String::from_utf8_lossy(&said.body))).to_string();
            let answer = match said.kind() {
                "done" => break,
                "error" => {
                    error.get_or_insert_with(text);
                    Stanza::new(&["ok"], &[])
                }
                "msg" => {
                    self.with
                        .monitor
                        .note(&format!("{}: {}", program_of(self.name), text()));
                    Stanza::new(&["ok"], &[])
                }
                "request-public" | "request-secret" => {
                    let question = format!("{}: {}: ", program_of(self.name), text());
                    match (self.with.prompt)(self.with.monitor, &question) {
                        Ok(Some(typed)) => Stanza::new(&["ok"], typed.bytes()),
                        _ => Stanza::new(&["fail"], &[]),
                    }
                }
                "confirm" => Stanza::new(&["fail"], &[]),
                _ if take(&said) => Stanza::new(&["ok"], &[]),
                _ => Stanza::new(&["unsupported"], &[]),
            };
            self.say(&answer)?;
        }
        error.map_or(Ok(()), |problem| Err(self.failed(problem)))
    }
}

fn program_of(name: &str) -> String {
    format!("age-plugin-{name}")
}

/// Finds the program of a plugin. Folders are absolute: what lies in the working folder is not run.
fn find(name: &str, folders: &[PathBuf]) -> Option<PathBuf> {
    let programs = folders.iter().filter(|folder| folder.is_absolute());
    let mut programs = programs.map(|folder| folder.join(program_of(name)));
    programs.find(|program| {
        let metadata = std::fs::metadata(program);
        metadata.is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
    })
}
