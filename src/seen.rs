//! What this host has seen of sealed archives. An older copy of an archive opens as well as the newest, and so does one that somebody else made for a
//! recipient that he knows: only who remembers can tell. Who reads is told so; who writes is refused, since what he writes could be for others.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::archive::keys::{ArchiveState, Remember};
use crate::error::{Error, Result, describe};
use crate::monitor::Monitor;
use crate::own_folder::own_folder;
use crate::shown::shown;

/// The folder of root's memory, unless the user names another one.
const DEFAULT_FOLDER: &str = "/var/lib/vmfold";
/// The file in it.
const FILE: &str = "seen.json";
/// The file that is locked while the other is changed.
const LOCK: &str = "seen.lock";
/// The most archives that are remembered. Beyond, the one that was not met for the longest time is forgotten.
const ARCHIVES_MAX: usize = 1000;
/// The most bytes of the file.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Returns the folder that a user's memory is in, unless he names another one: `/var/lib/vmfold` for root, and otherwise that of XDG. None if he has no
/// home.
pub fn default_folder() -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Some(DEFAULT_FOLDER.into());
    }
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(".local/state")))?;
    Some(state.join("vmfold"))
}

/// What is done where an archive is not what was seen last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// The user is told, as who only reads.
    Tell,
    /// The archive is refused, as by who writes.
    Refuse,
    /// The archive is accepted as it is, and remembered.
    Accept,
}

/// The memory of a host, in a folder.
pub struct SeenArchives {
    folder: PathBuf,
    strictness: Strictness,
    /// Seconds since 1970.
    now: u64,
    monitor: Arc<dyn Monitor + Send + Sync>,
}

impl std::fmt::Debug for SeenArchives {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SeenArchives")
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// All that is remembered.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Memory {
    version: u32,
    archives: Vec<Seen>,
}

/// An archive as it was seen last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Seen {
    /// Its identity, in hexadecimal digits.
    archive: String,
    /// The path that it had.
    path: PathBuf,
    /// What tells its keyring from others, in hexadecimal digits.
    keyring: String,
    /// The greatest number of its keyring.
    keyring_number: u32,
    /// The name of its newest pair, in hexadecimal digits; empty where that is not known.
    pair: String,
    /// The number of its last commit.
    commit: u32,
    /// The hash of that, in hexadecimal digits.
    commit_hash: String,
    /// Seconds since 1970 when it was met.
    met: u64,
}

impl Seen {
    fn of(path: &Path, state: &ArchiveState, now: u64) -> Self {
        let (commit, hash) = state.commits.last().copied().unwrap_or_default();
        Self {
            archive: hex(&state.archive.0),
            path: path.to_owned(),
            keyring: hex(&state.keyring),
            keyring_number: state.keyring_number,
            pair: state.pairs.first().map(|pair| hex(pair)).unwrap_or_default(),
            commit,
            commit_hash: hex(&hash),
            met: now,
        }
    }

    /// Says why a state cannot come after this one; none if it can.
    fn contradicts(&self, state: &ArchiveState) -> Option<String> {
        let last = state.commits.last().map_or(0, |(number, _)| *number);
        // Pairs stay when others are added. Who had the keyring before a rotation can make a later one, and not with the pair that he does not have.
        let lacks_pair = !self.pair.is_empty() && !state.pairs.is_empty();
        let lacks_pair = lacks_pair && !state.pairs.iter().any(|pair| hex(pair) == self.pair);
        let same = state.commits.iter().find(|(number, _)| *number == self.commit);
        if self.keyring != hex(&state.keyring) {
            Some(
                "its keyring is not the one that it had when this host saw it last: somebody else may have made it"
                    .into(),
            )
        } else if last < self.commit {
            Some(format!(
                "it ends with commit {last}, and this host has seen commit {}",
                self.commit
            ))
        } else if same.is_some_and(|(_, hash)| hex(hash) != self.commit_hash) {
            Some(format!(
                "its commit {} is another than the one that this host has seen",
                self.commit
            ))
        } else if lacks_pair {
            Some("its keyring does not come from the one that this host has seen: somebody who had an older one may have made it".into())
        } else if state.keyring_number < self.keyring_number {
            Some(
                "its keyring is older than the one that this host has seen: keys that were removed since are back"
                    .into(),
            )
        } else {
            None
        }
    }
}

impl Memory {
    /// Takes a state of an archive. Returns what is wrong with it, and does not take it then unless it is accepted.
    fn meet(&mut self, path: &Path, state: &ArchiveState, (now, accepts): (u64, bool)) -> Option<String> {
        let mut seen = Seen::of(path, state, now);
        let known = self.archives.iter().position(|one| one.archive == seen.archive);
        let problem = match known {
            Some(place) => self.archives[place].contradicts(state),
            None if state.is_new => None,
            None => self.archives.iter().find(|one| one.path == path).map(|_| {
                "this host has seen another archive in its place: somebody else may have put this one there".into()
            }),
        };
        if problem.is_some() && !accepts {
            return problem;
        }
        if let Some(place) = known.filter(|_| seen.pair.is_empty()) {
            seen.pair.clone_from(&self.archives[place].pair);
        }
        // What is in its place now is the archive of that path.
        self.archives
            .retain(|one| one.archive != seen.archive && one.path != seen.path);
        self.archives.push(seen);
        if self.archives.len() > ARCHIVES_MAX {
            self.archives.sort_by_key(|one| one.met);
            self.archives.remove(0);
        }
        None
    }
}

impl SeenArchives {
    /// Remembers in a folder, which is made when there is something to remember. `now` is in seconds since 1970.
    pub fn new(folder: PathBuf, strictness: Strictness, now: u64, monitor: Arc<dyn Monitor + Send + Sync>) -> Self {
        Self {
            folder,
            strictness,
            now,
            monitor,
        }
    }

    /// Reads the memory. One that is damaged is none: it is no more than a help.
    fn read(&self) -> Memory {
        let path = self.folder.join(FILE);
        let read = || -> std::io::Result<Memory> {
            let file = File::open(&path)?;
            let bytes = std::io::Read::take(file, FILE_BYTES_MAX);
            Ok(serde_json::from_reader(std::io::BufReader::new(bytes))?)
        };
        match read() {
            Ok(memory) => memory,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Memory::default(),
            Err(error) => {
                self.monitor.note(&format!(
                    "What this host has seen of archives cannot be read: `{}`: {error}",
                    shown(&path)
                ));
                Memory::default()
            }
        }
    }

    fn write(&self, memory: &Memory) -> Result<()> {
        let path = self.folder.join(FILE);
        let failed = |error: std::io::Error| Error::writing("write to", &path)(error);
        let mut file = tempfile::NamedTempFile::new_in(&self.folder).map_err(failed)?;
        let text = serde_json::to_vec_pretty(memory).map_err(|error| failed(error.into()))?;
        file.write_all(&text).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        File::open(&self.folder)
            .and_then(|folder| folder.sync_all())
            .map_err(failed)
    }

    /// Opens the folder, and keeps other runs off it until the result is dropped.
    fn locked(&self) -> Result<File> {
        if let Some(parent) = self.folder.parent() {
            std::fs::create_dir_all(parent).map_err(Error::io("make the folder", parent))?;
        }
        own_folder(&self.folder)?;
        let path = self.folder.join(LOCK);
        let failed = |error: std::io::Error| Error::io("lock", &path)(error);
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(failed)?;
        lock.lock().map_err(failed)?;
        Ok(lock)
    }
}

impl Remember for SeenArchives {
    fn met_in_clear(&self, path: &Path) -> Result<()> {
        let path = place_of(path);
        let is_known = |one: &Seen| one.path == path;
        if self.strictness != Strictness::Refuse || !self.read().archives.iter().any(is_known) {
            return Ok(());
        }
        let problem = "this host has seen an encrypted archive in its place, and this one is not encrypted";
        Err(Error::RolledBack {
            path,
            problem: problem.into(),
        })
    }

    fn met(&self, path: &Path, state: &ArchiveState) -> Result<()> {
        let path = place_of(path);
        let lock = self.locked();
        let mut memory = self.read();
        let before = memory.archives.clone();
        let accepts = self.strictness == Strictness::Accept;
        if let Some(problem) = memory.meet(&path, state, (self.now, accepts)) {
            if self.strictness == Strictness::Refuse {
                return Err(Error::RolledBack { path, problem });
            }
            self.monitor.note(&format!("`{}`: {problem}", shown(&path)));
            return Ok(());
        }
        let is_news = before != memory.archives;
        memory.version = 1;
        let remembered = lock.and_then(|_lock| if is_news { self.write(&memory) } else { Ok(()) });
        if let Err(error) = remembered {
            // Who cannot remember can still read and write.
            self.monitor.note(&format!(
                "This host will not notice if an older copy of the archive takes its place: {}",
                describe(&error)
            ));
        }
        Ok(())
    }
}

/// The path by which an archive is remembered: without links and dots.
fn place_of(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
