//! The verbs, one a file. A verb finds images, makes a plan, carries it out, and reports. This file has the steps that several verbs share.

pub mod backup;
pub mod diff;
pub mod export;
pub mod import;
pub mod key;
pub mod list;
mod open_archive;
pub mod planning;
pub mod protect;
pub mod reclaim;
pub mod repair;
pub mod report;
pub mod scan;
pub mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::archive::keys::{ArchiveKeys, Remember, Unlock};
use crate::block::{ByteRange, bytes};
use crate::error::{Error, Result, describe};
use crate::exec::fingerprints::{Fingerprinted, Unreadable, allocate, fingerprint};
use crate::facts::Facts;
use crate::foreign;
use crate::fs::{self, Filesystem, Purpose};
use crate::index::{self, ChunkIndex};
use crate::keys::KeyAccess;
use crate::keys::Passphrase;
use crate::monitor::Monitor;
use crate::numbers::ImageId;
use crate::plan;
use crate::pool::{self, Skip, Skipped};
use crate::shown::shown;
use crate::spill::Budget;
use crate::store::{FileStore, PeekedStore, Store};

/// The images that a verb works on, and what it may use for that.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Image files, and folders that are searched for images.
    pub paths: Vec<PathBuf>,
    /// Patterns of files and folders that are left out of the search.
    pub exclude: Vec<String>,
    /// The folder of the indexes.
    pub index: PathBuf,
    /// Memory for fingerprints and the block table, in bytes. The default is [`plan::memory_bytes`]. A pool that needs more keeps its
    /// fingerprints in a file beside the index, and one that needs still more looks up only a sample of its blocks.
    pub memory_bytes: Option<u64>,
}

impl Scope {
    /// The budget of lists. The size of the pool is not known until extent maps were read, so the budget is that of a small pool until then.
    fn budget(&self) -> Budget {
        Budget::new(lists_bytes(self.memory_bytes(0)), self.index.clone())
    }

    /// Memory for the block table of a pool with so many slots, in bytes.
    fn memory_bytes(&self, slots: u32) -> u64 {
        self.memory_bytes.unwrap_or_else(|| plan::memory_bytes(slots))
    }
}

/// The place of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ArchivePlace {
    /// A file.
    File(PathBuf),
    /// Standard output of an export, or standard input of an import.
    Pipe,
}

/// How sealed archives, and backups of other programs, are opened.
#[derive(Debug, Clone)]
pub struct BackupAccess {
    /// What opens the keyring of a sealed archive; none if no key was given.
    pub unlock: Option<Arc<dyn Unlock>>,
    /// What remembers sealed archives, if anything does.
    pub memory: Option<Arc<dyn Remember>>,
    /// What gives the passphrase of a backup, if it is given otherwise than by typing it.
    pub given: Option<Arc<KeyAccess>>,
    /// Asks the user for a passphrase where no file is named.
    pub prompt: fn(&dyn Monitor) -> Result<Passphrase>,
    /// What they must not exceed.
    pub limits: foreign::Limits,
    /// Whether they are raw images, whatever they begin with.
    pub is_raw: bool,
    /// The backing file of a qcow2 image, the backing file of that, and so on.
    pub backing: Vec<PathBuf>,
}

impl BackupAccess {
    /// Returns the keys of an archive, which are opened once they are needed.
    pub fn keys(&self) -> Arc<ArchiveKeys> {
        let Some(unlock) = self.unlock.clone() else {
            return Arc::default();
        };
        Arc::new(ArchiveKeys::opened_by(unlock).remembered_by(self.memory.clone()))
    }

    /// Opens the backing files.
    ///
    /// # Errors
    /// [`Error::Usage`] if one is no regular file; those of [`FileStore::open_without_link`].
    fn open_backing(&self) -> Result<Vec<Box<dyn Store>>> {
        let open = |path: &PathBuf| -> Result<Box<dyn Store>> {
            match FileStore::open_without_link(path) {
                Ok(store) => Ok(Box::new(store)),
                Err(Error::NotAFile { path }) => Err(Error::Usage(format!(
                    "`{}` is no regular file, which a backing file must be",
                    shown(&path)
                ))),
                Err(error) => Err(error),
            }
        };
        self.backing.iter().map(open).collect()
    }

    /// The passphrase of a backup.
    fn passphrase(&self, backup: &Path, monitor: &dyn Monitor) -> Result<Passphrase> {
        let given = match &self.given {
            Some(access) => access.passphrase_at_hand(monitor)?.cloned(),
            None => None,
        };
        let Some(passphrase) = given else {
            return (self.prompt)(monitor).map_err(|error| match error {
                Error::Usage(problem) => Error::Usage(format!("`{}`: {problem}", shown(backup))),
                other => other,
            });
        };
        Ok(passphrase)
    }
}

impl Default for BackupAccess {
    fn default() -> Self {
        Self {
            unlock: None,
            memory: None,
            given: None,
            prompt: |_| {
                Err(Error::Usage(
                    "the backup needs a passphrase: name a file that holds it by --passphrase-file".into(),
                ))
            },
            limits: foreign::Limits::default(),
            is_raw: false,
            backing: Vec::new(),
        }
    }
}

/// Whether a store holds a backup of another program.
///
/// # Errors
/// [`Error::Usage`] if it holds none, and a backing file is named; [`Error::Io`].
fn is_backup(store: &PeekedStore<'_>, access: &BackupAccess) -> Result<bool> {
    let is_backup = access.is_raw || foreign::is_backup(store.head(), &foreign::last_bytes(store)?);
    if !is_backup && !access.backing.is_empty() {
        return Err(Error::Usage(format!(
            "--backing names a file, and `{}` is no qcow2 image, which alone has a backing file",
            shown(store.path())
        )));
    }
    Ok(is_backup)
}

/// Opens a backup of another program. `backing` is from [`BackupAccess::open_backing`]. `checks_all` says whether what is not handed out is
/// checked as well.
fn open_backup<'a>(
    store: &'a PeekedStore<'_>,
    backing: &'a [Box<dyn Store>],
    access: &BackupAccess,
    checks_all: bool,
    monitor: &'a dyn Monitor,
) -> Result<Box<dyn foreign::Backup + 'a>> {
    let ask_passphrase = || access.passphrase(store.path(), monitor);
    let options = foreign::OpenOptions {
        checks_all,
        backing,
        ..open_options(access, &ask_passphrase)
    };
    foreign::open(store, &options, monitor)
}

/// How a backup is opened of which only that is checked which is handed out.
fn open_options<'a>(
    access: &BackupAccess,
    ask_passphrase: &'a foreign::AskPassphrase<'a>,
) -> foreign::OpenOptions<'a, 'static> {
    foreign::OpenOptions {
        limits: access.limits,
        ask_passphrase,
        checks_all: false,
        is_raw: access.is_raw,
        backing: &[],
    }
}

/// Opens an index once it is needed. It returns `None` if the verb does without.
type OpenIndex<'a> = Box<dyn FnOnce() -> Result<Option<Box<dyn ChunkIndex>>> + 'a>;

/// A pool that is open.
pub struct OpenPool<'a> {
    fs: &'a dyn Filesystem,
    /// Opens the index after extent maps were read, so that the memory of both is not taken at the same time.
    index: OpenIndex<'a>,
    /// The budget of lists.
    budget: Budget,
    /// Images that were found and are left alone.
    skipped: Vec<Skipped>,
}

impl<'a> OpenPool<'a> {
    /// A pool of all images of a filesystem, with an index if there is one. All lists are kept in memory.
    pub fn new(fs: &'a dyn Filesystem, index: Option<Box<dyn ChunkIndex>>) -> Self {
        Self {
            fs,
            index: Box::new(move || Ok(index)),
            budget: Budget::default(),
            skipped: Vec::new(),
        }
    }

    /// A pool with the index and the memory of a scope, and with images that are left alone.
    fn of(fs: &'a dyn Filesystem, skipped: Vec<Skipped>, scope: &'a Scope, monitor: &'a dyn Monitor) -> Self {
        Self {
            fs,
            index: Box::new(move || open_index(fs, scope, monitor)),
            budget: scope.budget(),
            skipped,
        }
    }
}

/// Memory for the runs of an archive's images. What is more of them lies in a file in `folder`; without one, where temporary files outlast
/// memory.
fn runs_budget(folder: Option<&Path>) -> Budget {
    const BYTES: usize = 64 << 20;
    let folder = folder.map_or_else(
        || {
            Some(PathBuf::from("/var/tmp"))
                .filter(|folder| folder.is_dir())
                .unwrap_or_else(std::env::temp_dir)
        },
        Path::to_owned,
    );
    Budget::new(BYTES, folder)
}

/// What is known of a pool after its extent maps and fingerprints were read.
struct Survey {
    facts: Facts,
    /// Images whose first block lies in metadata.
    inline: Vec<ImageId>,
    /// The index, if it can be used.
    index: Option<Box<dyn ChunkIndex>>,
    skipped: Vec<Skipped>,
    fingerprinted: Fingerprinted,
}

/// A pool that was opened and surveyed.
struct Prepared {
    fs: Box<dyn Filesystem>,
    facts: Facts,
}

/// Finds images, opens them and surveys them. Images that cannot be read are named in the log.
fn prepare(scope: &Scope, purpose: Purpose, monitor: &dyn Monitor) -> Result<Prepared> {
    let (fs, skipped) = open_pool(without_empty(discover(scope, monitor)?), purpose, monitor)?;
    let survey = survey(OpenPool::of(&*fs, skipped, scope, monitor), scope, true, monitor)?;
    Ok(Prepared {
        facts: survey.facts,
        fs,
    })
}

/// The images that are not empty.
fn without_empty(mut found: pool::Pool) -> pool::Pool {
    found.images.retain(|image| image.size > 0);
    found
}

/// Opens images that were found, and returns those that are left alone as well.
fn open_pool(
    found: pool::Pool,
    purpose: Purpose,
    monitor: &dyn Monitor,
) -> Result<(Box<dyn Filesystem>, Vec<Skipped>)> {
    monitor.phase("Reading extent maps", 0);
    let (fs, mut skipped) = fs::open(&found.images, &found.named, purpose, monitor)?;
    skipped.extend(found.skipped);
    Ok((fs, skipped))
}

/// Reads the extent maps and the fingerprints of a pool. An image with blocks that cannot be read is added to the skipped ones. Without
/// `skip_unreadable`, such a block is an error.
fn survey(pool: OpenPool<'_>, scope: &Scope, skip_unreadable: bool, monitor: &dyn Monitor) -> Result<Survey> {
    let fs = pool.fs;
    let mapped = fs.map(&pool.budget)?;
    let mut facts = mapped.facts;
    divide_memory(&mut facts, scope)?;
    let mut index = (pool.index)()?;
    let (fingerprinted, unreadable) = fingerprint(fs, &mut facts, index.as_deref_mut(), monitor)?;
    let mut skipped = pool.skipped;
    skipped.extend(unreadable_images(fs, &facts, &unreadable));
    skipped.sort();
    log_images(fs, &skipped, fingerprinted);
    if !skip_unreadable && let Some(Unreadable { error, .. }) = unreadable.into_iter().next() {
        return Err(error);
    }
    Ok(Survey {
        facts,
        inline: mapped.inline,
        index,
        skipped,
        fingerprinted,
    })
}

/// Logs what is decided about each image.
fn log_images(fs: &dyn Filesystem, skipped: &[Skipped], fingerprinted: Fingerprinted) {
    for image in fs::images(fs) {
        tracing::info!(image = %shown(&image.path), bytes = image.size, checksummed = image.checksummed, "worked on");
    }
    log_skipped(skipped);
    tracing::info!(
        from_checksums_bytes = fingerprinted.from_checksums,
        from_index_bytes = fingerprinted.from_index,
        read_bytes = fingerprinted.read,
        "fingerprinted"
    );
}

/// Logs which images are left alone, and why.
fn log_skipped(skipped: &[Skipped]) {
    for image in skipped {
        let detail = image.detail.as_deref().unwrap_or_default();
        tracing::info!(image = %shown(&image.path), reason = image.reason.reason(), detail, "left alone");
    }
}

/// Opens the index of a filesystem. If that fails, the verb goes on without an index, unless another run uses it.
fn open_index(fs: &dyn Filesystem, scope: &Scope, monitor: &dyn Monitor) -> Result<Option<Box<dyn ChunkIndex>>> {
    match index::open(&scope.index, fs.uuid(), Some(fs.function()), monitor) {
        Ok(index) => Ok(Some(index)),
        Err(error @ Error::Busy { .. }) => Err(error),
        Err(error) => {
            monitor.note(&format!("Going on without an index: {}", describe(&error)));
            Ok(None)
        }
    }
}

/// The image of an [`Error::Unreadable`], with the range and the cause. It is `None` for other errors.
fn unreadable_image(error: &Error) -> Option<Skipped> {
    let Error::Unreadable { path, range, source } = error else {
        return None;
    };
    Some(Skipped {
        detail: Some(format!("{range}: {source}")),
        ..Skipped::new(path, Skip::Unreadable)
    })
}

/// The images that have blocks which cannot be read, each with the first of these ranges and the cause.
fn unreadable_images(fs: &dyn Filesystem, facts: &Facts, unreadable: &[Unreadable]) -> Vec<Skipped> {
    let mut first_ranges: BTreeMap<ImageId, (ByteRange, &Error)> = BTreeMap::new();
    for Unreadable { slots, error } in unreadable {
        for (mapping, images) in facts.mappings_to(facts.extent_of(slots.start)) {
            let mapped = mapping.slots();
            let (start, end) = (mapped.start.max(slots.start), mapped.end.min(slots.end));
            if start >= end {
                continue;
            }
            let range = ByteRange {
                start: bytes(mapping.file_block + (start - mapped.start)),
                length: bytes(end - start),
            };
            for image in images {
                let first = first_ranges.entry(*image).or_insert((range, error));
                if range.start < first.0.start {
                    *first = (range, error);
                }
            }
        }
    }
    let skipped = first_ranges.into_iter().map(|(image, (range, error))| {
        let cause = std::error::Error::source(error)
            .map(ToString::to_string)
            .unwrap_or_default();
        Skipped {
            detail: Some(format!("{range}: {cause}")),
            ..Skipped::new(fs.path(image), Skip::Unreadable)
        }
    });
    skipped.collect()
}

/// The bytes of lists that stay in memory if the block table may take `memory_bytes`.
fn lists_bytes(memory_bytes: u64) -> usize {
    usize::try_from(plan::lists_bytes(memory_bytes)).unwrap_or(usize::MAX)
}

/// Divides the memory of a scope among lists, fingerprints and the block table.
fn divide_memory(facts: &mut Facts, scope: &Scope) -> Result<()> {
    let memory_bytes = scope.memory_bytes(facts.slots());
    facts.budget().set_bytes(lists_bytes(memory_bytes));
    allocate(facts, memory_bytes, &scope.index)
}

/// Finds images, and notes the folders that could not be read.
fn discover(scope: &Scope, monitor: &dyn Monitor) -> Result<pool::Pool> {
    let found = pool::discover(&scope.paths, &scope.exclude)?;
    for (path, problem) in &found.unreadable {
        monitor.note(&format!("Cannot look into `{}`: {problem}", shown(path)));
    }
    Ok(found)
}

/// The deepest folder that all of these lie in.
fn common_folder<'a>(mut folders: impl Iterator<Item = &'a Path>) -> PathBuf {
    let common = |common: PathBuf, folder: &Path| -> PathBuf {
        let pairs = common.components().zip(folder.components());
        pairs
            .take_while(|(component, other)| component == other)
            .map(|(component, _)| component)
            .collect()
    };
    let first = folders.next().unwrap_or(Path::new("")).to_owned();
    folders.fold(first, common)
}
