//! What this host has seen of sealed archives. An older copy of an archive opens as well as the newest, and so does one that somebody else made for a
//! recipient that he knows: only who remembers can tell. Who reads is told so; who writes is refused, since what he writes could be for others.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::archive::keys::{ArchiveState, Remember};
use crate::error::{Error, Result, describe};
use crate::monitor::Monitor;
use crate::named_folder::NamedFolder;
use crate::own_folder::own_folder;
use crate::shown::{hex, shown};
use crate::sys::beneath::Folder;

/// The folder of root's memory, unless the user names another one.
const DEFAULT_FOLDER: &str = "/var/lib/vmfold";
/// The file in it.
const FILE: &str = "seen.json";
/// The file that takes its place.
const NEW_FILE: &str = "seen.json.new";
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

    /// Opens the folder, if it is there.
    fn folder(&self) -> Result<Option<Folder>> {
        if !NamedFolder::look(&self.folder)?.exists() {
            return Ok(None);
        }
        own_folder(&self.folder).map(Some)
    }

    /// Reads the memory. One that is damaged is none: it is no more than a help.
    fn read(&self, folder: &Folder) -> Memory {
        let read = || -> std::io::Result<Memory> {
            let file = folder.open_file(Path::new(FILE), OFlags::RDONLY | OFlags::NONBLOCK)?;
            let bytes = std::io::Read::take(file, FILE_BYTES_MAX);
            Ok(serde_json::from_reader(std::io::BufReader::new(bytes))?)
        };
        match read() {
            Ok(memory) => memory,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Memory::default(),
            Err(error) => {
                self.monitor.note(&format!(
                    "What this host has seen of archives cannot be read: `{}`: {error}",
                    shown(&self.folder.join(FILE))
                ));
                Memory::default()
            }
        }
    }

    /// Puts another memory in the place of the one that is there.
    fn write(&self, folder: &Folder, memory: &Memory) -> Result<()> {
        let path = self.folder.join(FILE);
        let failed = |error: std::io::Error| Error::writing("write to", &path)(error);
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // The lock keeps other runs off it, and a run that was killed may have left it.
        let new = rustix::fs::openat(folder, NEW_FILE, flags, Mode::RUSR | Mode::WUSR);
        let mut new = File::from(new.map_err(|errno| failed(errno.into()))?);
        let text = serde_json::to_vec_pretty(memory).map_err(|error| failed(error.into()))?;
        new.write_all(&text).and_then(|()| new.sync_all()).map_err(failed)?;
        let named = rustix::fs::renameat(folder, NEW_FILE, folder, FILE);
        named
            .and_then(|()| rustix::fs::fsync(folder))
            .map_err(|errno| failed(errno.into()))
    }

    /// Makes the folder if it is not there, and keeps other runs off it until the file is dropped.
    fn locked(&self) -> Result<(Folder, File)> {
        if let Some(parent) = self.folder.parent() {
            NamedFolder::look(parent)?.make(Mode::RWXU, |_, _| {})?;
        }
        let folder = own_folder(&self.folder)?;
        let path = self.folder.join(LOCK);
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let lock = rustix::fs::openat(&folder, LOCK, flags, Mode::RUSR | Mode::WUSR);
        let lock = File::from(lock.map_err(Error::io("open", &path))?);
        lock.lock().map_err(Error::io("lock", &path))?;
        Ok((folder, lock))
    }

    /// Says that nothing can be remembered. Where others can write to the folder, whoever writes to an archive is refused: they could have made this
    /// host forget it.
    fn forgets(&self, error: Error) -> Result<()> {
        let is_of_others = matches!(
            error,
            Error::NotOurs { .. } | Error::OfAnother { .. } | Error::SharedLink { .. }
        );
        if is_of_others && self.strictness == Strictness::Refuse {
            return Err(error);
        }
        self.monitor.note(&format!(
            "This host will not notice if an older copy of the archive takes its place: {}",
            describe(&error)
        ));
        Ok(())
    }
}

impl Remember for SeenArchives {
    fn met_in_clear(&self, path: &Path) -> Result<()> {
        let path = place_of(path);
        let memory = match self.folder() {
            Ok(Some(folder)) => self.read(&folder),
            Ok(None) => return Ok(()),
            Err(error) => return self.forgets(error),
        };
        if self.strictness != Strictness::Refuse || !memory.archives.iter().any(|one| one.path == path) {
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
        let (folder, _lock) = match self.locked() {
            Ok(locked) => locked,
            Err(error) => return self.forgets(error),
        };
        let mut memory = self.read(&folder);
        let before = memory.archives.clone();
        let accepts = self.strictness == Strictness::Accept;
        if let Some(problem) = memory.meet(&path, state, (self.now, accepts)) {
            if self.strictness == Strictness::Refuse {
                return Err(Error::RolledBack { path, problem });
            }
            self.monitor.note(&format!("`{}`: {problem}", shown(&path)));
            return Ok(());
        }
        if before == memory.archives {
            return Ok(());
        }
        memory.version = 1;
        self.write(&folder, &memory).or_else(|error| self.forgets(error))
    }
}

/// The path by which an archive is remembered: without links and dots.
fn place_of(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}
