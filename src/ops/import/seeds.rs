//! Finds the images on the disk that restored images may share blocks with: those that were named, or those that the index knows.

use std::path::{Path, PathBuf};

use super::ImportOptions;
use crate::error::{Error, Result, describe};
use crate::exec::restore::seed::{PoolSeed, Seed};
use crate::exec::restore::{OpenSeed, Sought};
use crate::fs::{Purpose, images_holding, may_find_holders, uuid_at};
use crate::index;
use crate::monitor::Monitor;
use crate::ops::{Scope, prepare};
use crate::plan::seeds::weak_ids;

/// Returns what opens the seeds. They are the images that were named, or else images that hold wanted blocks according to the index; and the
/// files that blocks of the source lie in as they are, if they are on the filesystem that is restored to.
pub(super) fn opener<'a>(
    options: &'a ImportOptions,
    in_place: &'a [&Path],
    monitor: &'a dyn Monitor,
) -> Box<OpenSeed<'a>> {
    Box::new(move |sought| {
        let paths = if options.seeds.is_empty() {
            known_images(options, sought, monitor).unwrap_or_default()
        } else {
            options.seeds.clone()
        };
        let uuid = uuid_at(&options.restore.to);
        let near = in_place.iter().filter(|path| uuid.is_some() && uuid_at(path) == uuid);
        let near: Vec<PathBuf> = near.map(|path| (*path).to_owned()).collect();
        if !near.is_empty() {
            match open(options, [paths.clone(), near].concat(), monitor) {
                Ok(seed) => return Ok(Some(Box::new(seed) as Box<dyn Seed>)),
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => monitor.note(&format!("Blocks of the image are copied: {}", describe(&error))),
            }
        }
        if paths.is_empty() {
            return Ok(None);
        }
        match open(options, paths, monitor) {
            Err(error) if options.seeds.is_empty() => {
                monitor.note(&format!("Going on without what is here already: {}", describe(&error)));
                Ok(None)
            }
            other => other.map(|seed| Some(Box::new(seed) as Box<dyn Seed>)),
        }
    })
}

/// Opens and surveys images as seeds.
///
/// # Errors
/// [`Error::TwoFilesystems`] if they are not on the filesystem that is restored to; those of [`prepare`].
fn open(options: &ImportOptions, paths: Vec<PathBuf>, monitor: &dyn Monitor) -> Result<PoolSeed> {
    let scope = Scope {
        paths,
        exclude: Vec::new(),
        index: options.index.clone(),
        memory_bytes: options.memory_bytes,
    };
    let prepared = prepare(&scope, Purpose::Look, monitor)?;
    if uuid_at(&options.restore.to) != Some(prepared.fs.uuid()) {
        return Err(Error::TwoFilesystems {
            first: options.restore.to.clone(),
            second: scope.paths.first().cloned().unwrap_or_default(),
        });
    }
    Ok(PoolSeed::new(prepared.fs, prepared.facts))
}

/// Whether there can be any seeds, because some are named or there is an index of the filesystem.
pub(super) fn are_possible(options: &ImportOptions) -> bool {
    let has_index = || uuid_at(&options.restore.to).is_some_and(|uuid| index::exists(&options.index, uuid));
    !options.seeds.is_empty() || has_index()
}

/// The images that hold the most wanted chunks according to the index, or the most chunks if nothing is known of what is wanted. They lie in the subvolume that is restored to, or anywhere on an XFS. It
/// returns `None` if the index or the filesystem cannot tell.
fn known_images(options: &ImportOptions, sought: Sought<'_>, monitor: &dyn Monitor) -> Option<Vec<PathBuf>> {
    /// Images that are used at most. More of them would bring little.
    const IMAGES_MAX: usize = 64;
    let to = &options.restore.to;
    let uuid = uuid_at(to)?;
    if !index::exists(&options.index, uuid) || !may_find_holders(to) {
        return None;
    }
    let ids = match sought {
        Sought::Announced(wanted, announced) => Some(weak_ids(wanted, announced.iter())),
        Sought::Unknown => None,
    };
    let index = index::open(&options.index, uuid, None, monitor).ok()?;
    let is_sought = |id| ids.as_ref().is_none_or(|ids| ids.contains(&id));
    let addresses = index.extents_with(&is_sought).ok()?;
    drop(index);
    let mut holders = images_holding(to, addresses, monitor)?;
    holders.sort_unstable_by(|a, b| b.cmp(a));
    holders.truncate(IMAGES_MAX);
    Some(holders.into_iter().map(|holder| holder.path).collect())
}
