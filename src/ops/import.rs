//! `import`: images out of an archive, sharing what they have in common with each other and with the disk.

mod seeds;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ArchivePlace;
use crate::archive::reader::Archive;
use crate::error::{Error, Result};
use crate::exec::restore::archive::ArchiveSource;
use crate::exec::restore::folder::Root;
use crate::exec::restore::pipe::{PipeOptions, PipeSource};
use crate::exec::restore::source::BlockSource;
use crate::exec::restore::{Restore, RestoreOptions};
use crate::monitor::Monitor;
use crate::report::Imported;
use crate::store::{FileStore, InputPipe, Store};

/// What to import, and how.
#[derive(Debug, Clone)]
pub struct ImportOptions {
    /// The archive.
    pub archive: ArchivePlace,
    /// Which commit; none means the last.
    pub commit: Option<String>,
    /// Which of its images, where to, and how.
    pub restore: RestoreOptions,
    /// Images and folders of images on the same filesystem that may have blocks in common with what is restored.
    pub seeds: Vec<PathBuf>,
    /// Where indexes are kept.
    pub index: PathBuf,
    /// Memory for fingerprints of seeds, in bytes, as in [`super::Scope`].
    pub memory_bytes: Option<u64>,
    /// Only say what would be done.
    pub dry_run: bool,
}

/// Imports images.
///
/// # Errors
/// Before anything is written: if something exists already, or does not fit. Later: those of reading the archive and of writing; what
/// was restored so far is kept for [`RestoreOptions::resume`].
pub fn import(options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    match &options.archive {
        ArchivePlace::File(path) => import_from(Arc::new(FileStore::open(path)?), options, monitor),
        ArchivePlace::Pipe => {
            let pipe = InputPipe::new(monitor).map_err(Error::io("read", Path::new("stdin")))?;
            import_in_order(&pipe, options, monitor)
        }
    }
}

/// Imports from a store that is read anywhere; [`ImportOptions::archive`] is not looked at.
///
/// # Errors
/// As for [`import`].
pub fn import_from(store: Arc<dyn Store>, options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    monitor.phase("Reading the archive", 0);
    let mut archive = if options.restore.partial {
        Archive::open_any(store)?
    } else {
        Archive::open(store)?
    };
    if options.restore.partial {
        archive.salvage()?;
    }
    let announces = seeds::are_possible(options);
    let mut source = ArchiveSource::open(&archive, options.commit.as_deref(), announces, monitor)?;
    restore(&mut source, options, monitor)
}

/// Imports from a store that is read once and in order; [`ImportOptions::archive`] is not looked at.
///
/// # Errors
/// As for [`import`].
pub fn import_in_order(store: &dyn Store, options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    let asked = PipeOptions {
        commit: options.commit.clone(),
        partial: options.restore.partial,
        announces: seeds::are_possible(options),
        folder: options.restore.to.clone(),
    };
    let mut source = PipeSource::new(store, asked, monitor);
    let imported = restore(&mut source, options, monitor)?;
    // Whoever writes to the pipe shall not fail because of what is not needed.
    let _ = std::io::copy(source.rest(), &mut std::io::sink());
    Ok(imported)
}

/// Plans, and does it unless a plan is all that is wanted.
fn restore(source: &mut dyn BlockSource, options: &ImportOptions, monitor: &dyn Monitor) -> Result<Imported> {
    let (archive, to) = (source.path().to_owned(), options.restore.to.clone());
    let root = Root::look(&to)?;
    if !options.dry_run {
        root.keep_others_off()?;
    }
    let open_seed = seeds::opener(options, monitor);
    let mut restore = Restore::new(&options.restore, root, source, &*open_seed, monitor);
    restore.plan()?;
    if options.dry_run {
        return Ok(Imported::planned(archive, to, restore.into_plan()?));
    }
    Ok(Imported::of(archive, to, restore.execute()?))
}
