//! Writes a healed archive to a new file, which gets its name once all of it is on the disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::view::View;
use crate::error::{Error, Result};
use crate::exec::restore::folder::{Place, Root};
use crate::exec::restore::names::{NewImage, TemporaryNames, UnnamedFile, give_names};
use crate::exec::restore::replaced::ReplacedFiles;
use crate::monitor::Monitor;
use crate::store::{FileStore, Store};

/// Bytes that are copied at a time.
const PART_BYTES: usize = 4 << 20;

/// Writes a healed archive to a file that does not exist yet. It can be read by its user alone. `check` gets it before it has its name.
///
/// # Errors
/// [`Error::Exists`] if there is such a file; [`Error::NoSpace`] or [`Error::Io`] if it cannot be written; [`Error::Interrupted`]; those of `check`. Then there is no
/// file of this name.
pub fn write_copy(
    view: &View,
    to: &Path,
    check: &mut dyn FnMut(Arc<dyn Store>) -> Result<()>,
    monitor: &dyn Monitor,
) -> Result<()> {
    let place = place_of(to)?;
    if place.stat()?.is_some() {
        return Err(Error::Exists {
            paths: vec![to.to_owned()],
        });
    }
    monitor.phase("Writing", view.length());
    let temporaries = TemporaryNames::random()?;
    let (new, _) = UnnamedFile::make(&place, &temporaries, true, |file| {
        fill(view, file, to, monitor)?;
        let written = file.try_clone().map_err(Error::io("open", to))?;
        check(Arc::new(FileStore::of(written, to)))
    })?;
    let image = NewImage {
        new,
        places: vec![place.clone()],
    };
    give_names(&[image], &ReplacedFiles::default(), &temporaries, |_| Ok(()))?;
    place.sync_folder()
}

/// The name of a new file, in its open folder.
pub(super) fn place_of(to: &Path) -> Result<Place> {
    let parent = to
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let not_there = || Error::NoSuchPath {
        path: parent.to_owned(),
    };
    let name = to
        .file_name()
        .ok_or_else(|| Error::Usage(format!("`{}` is no name of a file", to.display())))?;
    if !parent.is_dir() {
        return Err(not_there());
    }
    let root = Root::look(parent)?;
    root.place(Path::new(name), false, |_| {})?.ok_or_else(not_there)
}

fn fill(view: &View, file: &File, to: &Path, monitor: &dyn Monitor) -> Result<()> {
    let failed = |error| Error::writing("write", to)(error);
    let mut buffer = vec![0; PART_BYTES];
    let mut at = 0;
    while at < view.length() {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let left = usize::try_from(view.length() - at).unwrap_or(usize::MAX);
        let part = &mut buffer[..left.min(PART_BYTES)];
        view.read_exact_at(at, part).map_err(Error::io("read", view.path()))?;
        file.write_all_at(part, at).map_err(failed)?;
        at += part.len() as u64;
        monitor.advance(part.len() as u64);
    }
    file.sync_all().map_err(failed)
}
