//! `import`: restores images from an archive, or from a backup that another program made. They share blocks with each other and with images on
//! the disk.

pub mod qubes;
mod seeds;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{ArchivePlace, BackupAccess, is_backup, open_backup};
use crate::archive::reader::Archive;
use crate::archive::record::{BlockHasher, LaneId, hash_of};
use crate::error::{Error, Result};
use crate::exec::restore::archive::ArchiveSource;
use crate::exec::restore::backup::{BackupOptions, BackupSource, NoEarlierBlocks};
use crate::exec::restore::folder::Root;
use crate::exec::restore::pipe::{PipeOptions, PipeSource};
use crate::exec::restore::source::BlockSource;
use crate::exec::restore::{Restore, RestoreOptions};
use crate::foreign::Backup;
use crate::monitor::Monitor;
use crate::plan::restore::{RestoredImage, chooser};
use crate::pool::{machine_of, revision_of};
use crate::report::{Imported, RestoredRevision};
use crate::store::{FileStore, InputPipe, PeekedStore, Store};

/// What is imported, where to, and how.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The archive.
    pub archive: ArchivePlace,
    /// The commit, by its number, label or name. `None` means the last one.
    pub commit: Option<String>,
    /// Which of its images are restored, where to, and how.
    pub restore: RestoreOptions,
    /// Images, and folders of images, on the same filesystem that restored images may share blocks with.
    pub seeds: Vec<PathBuf>,
    /// The folder of the indexes.
    pub index: PathBuf,
    /// Memory for the fingerprints of seeds, in bytes, as in [`super::Scope`].
    pub memory_bytes: Option<u64>,
    /// Whether only a plan is made.
    pub dry_run: bool,
    /// How backups of other programs are opened.
    pub access: BackupAccess,
}

/// Imports images.
///
/// # Errors
/// Those of opening the archive; those of [`Restore::plan`] and [`Restore::execute`]. The blocks that were staged until then are kept for
/// [`RestoreOptions::resume`].
pub fn import(options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    match &options.archive {
        ArchivePlace::File(path) => {
            let store = FileStore::open(path)?;
            let peeked = PeekedStore::new(&store).map_err(Error::io("read", path))?;
            if is_backup(&peeked, &options.access)? {
                return import_backup(&peeked, options, monitor);
            }
            drop(peeked);
            import_from(Arc::new(store), options, monitor)
        }
        ArchivePlace::Pipe => {
            let path = Path::new("stdin");
            let pipe = InputPipe::new(monitor).map_err(Error::io("read", path))?;
            let peeked = PeekedStore::new(&pipe).map_err(|error| {
                if monitor.interrupted() {
                    Error::Interrupted
                } else {
                    Error::io("read", path)(error)
                }
            })?;
            if is_backup(&peeked, &options.access)? {
                return import_backup(&peeked, options, monitor);
            }
            import_in_order(&peeked, options, monitor)
        }
    }
}

/// Imports from a backup that another program made, and that is read in order. [`ImportOptions::archive`] is not used.
///
/// # Errors
/// [`Error::Usage`] if a commit is named; [`Error::DamagedBackup`] and [`Error::RefusedBackup`]; those of [`import`].
pub fn import_backup(store: &PeekedStore<'_>, options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    if options.commit.is_some() {
        let problem = "--commit names a commit of an archive, and this is a backup that another program made";
        return Err(Error::Usage(problem.into()));
    }
    let backing = options.access.open_backing()?;
    let backup = open_backup(store, &backing, &options.access, false, monitor)?;
    let in_place = if backup.holds_blocks_in_place() {
        [store.path()]
            .into_iter()
            .chain(backing.iter().map(|one| one.path()))
            .collect()
    } else {
        Vec::new()
    };
    import_opened(backup, store, &in_place, options, monitor)
}

/// What tells a backup from others: a hash of its first bytes.
fn id_of(store: &PeekedStore<'_>) -> LaneId {
    let hash = hash_of(store.head());
    let mut id = LaneId::default();
    let length = id.0.len();
    id.0.copy_from_slice(&hash[..length]);
    id
}

/// Imports from a backup that was opened, and of which nothing was read yet. Images may share blocks with the files `in_place`.
fn import_opened(
    backup: Box<dyn Backup + '_>,
    store: &PeekedStore<'_>,
    in_place: &[&Path],
    options: &ImportOptions,
    monitor: &dyn Monitor,
) -> Result<Imported> {
    let backup_options = BackupOptions {
        takes: Box::new(chooser(&options.restore.only)?),
        partial: options.restore.partial,
        id: id_of(store),
        folder: options.restore.to.clone(),
        budget: super::runs_budget(Some(&options.index)),
        earlier: Box::new(NoEarlierBlocks),
        hasher: BlockHasher::default(),
    };
    let mut source = BackupSource::new(backup, store.path(), backup_options, monitor);
    restore(&mut source, in_place, options, monitor)
}

/// Imports from a store that can be read at any offset. [`ImportOptions::archive`] is not used.
///
/// # Errors
/// Those of [`import`].
pub fn import_from(store: Arc<dyn Store>, options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    monitor.phase("Reading the archive", 0);
    let mut archive = if options.restore.partial {
        Archive::open_any_with(store, options.access.keys())?
    } else {
        Archive::open_with(store, options.access.keys())?
    };
    if options.restore.partial && !archive.has_leftovers_only()? {
        archive.salvage()?;
    }
    let announces = seeds::are_possible(options);
    let budget = super::runs_budget(Some(&options.index));
    let mut source = ArchiveSource::open(&archive, options.commit.as_deref(), announces, &budget, monitor)?;
    match restore(&mut source, &[], options, monitor) {
        Err(Error::NoMatch { whole, .. }) => {
            let others = commits_with(&archive, &options.restore.only)?;
            Err(Error::NoMatch { whole, others })
        }
        result => result,
    }
}

/// The commits of an archive that have images which patterns choose, in words.
fn commits_with(archive: &Archive, only: &[String]) -> Result<Vec<String>> {
    let takes = chooser(only)?;
    let mut found = Vec::new();
    for committed in archive.commits() {
        let (summaries, _) = archive.images(committed)?;
        if summaries.iter().any(|image| takes(&image.path)) {
            found.push(format!("commit {} ({})", committed.commit.number, committed.id()));
        }
    }
    Ok(found)
}

/// Imports from a store that is read once and in order. [`ImportOptions::archive`] is not used.
///
/// # Errors
/// Those of [`import`].
pub fn import_in_order(store: &dyn Store, options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    let pipe_options = PipeOptions {
        commit: options.commit.clone(),
        partial: options.restore.partial,
        announces: seeds::are_possible(options),
        folder: options.restore.to.clone(),
        budget: super::runs_budget(Some(&options.index)),
        keys: options.access.keys(),
    };
    let mut source = PipeSource::new(store, pipe_options, monitor);
    let imported = restore(&mut source, &[], options, monitor)?;
    // The rest of the pipe is read, so that the program that writes to it does not fail.
    let _ = std::io::copy(source.rest(), &mut std::io::sink());
    Ok(imported)
}

/// The names that images get which become revisions, and how Qubes OS makes them current.
fn restored_revisions(images: &[RestoredImage], to: &Path) -> Vec<RestoredRevision> {
    let revisions = images.iter().filter_map(|image| {
        let name = image.names.first()?.clone();
        let path = to.join(&name);
        let command = revision_of(&path).and_then(|revision| {
            let machine = machine_of(&revision.image);
            let is_of_qubes = ["appvms", "vm-templates"]
                .iter()
                .any(|folder| machine.parent().is_some_and(|above| above.ends_with(folder)));
            let volume = revision.image.file_stem()?.to_string_lossy().into_owned();
            let machine = machine.file_name()?.to_string_lossy().into_owned();
            let words = [
                "qvm-volume".into(),
                "revert".into(),
                format!("{machine}:{volume}"),
                revision.number?.to_string(),
            ];
            is_of_qubes.then(|| words.to_vec())
        });
        Some(RestoredRevision {
            path: image.path.clone(),
            name,
            command: command.unwrap_or_default(),
        })
    });
    revisions.collect()
}

/// Plans a restore, and carries it out unless it is a dry run. `in_place` are the files that hold blocks of the source as they are.
fn restore(
    source: &mut dyn BlockSource,
    in_place: &[&Path],
    options: &ImportOptions,
    monitor: &dyn Monitor,
) -> Result<Imported> {
    let (archive, to) = (source.path().to_owned(), options.restore.to.clone());
    let root = Root::look(&to)?;
    if !options.dry_run {
        root.keep_others_off()?;
    }
    let open_seed = seeds::opener(options, in_place, monitor);
    let mut restore = Restore::new(&options.restore, root, source, &*open_seed, monitor);
    restore.plan()?;
    let outcome = if options.dry_run {
        restore.into_plan()?
    } else {
        restore.execute()?
    };
    let revisions = if options.restore.as_revision {
        restored_revisions(&outcome.plan.images, &to)
    } else {
        Vec::new()
    };
    let imported = if options.dry_run {
        Imported::planned(archive, to, outcome)
    } else {
        Imported::of(archive, to, outcome)
    };
    Ok(Imported { revisions, ..imported })
}
