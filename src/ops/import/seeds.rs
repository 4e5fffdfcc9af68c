//! Images on the disk that may have blocks in common with what is restored: those that were named, or that the index knows.

use std::ops::Range;
use std::path::PathBuf;

use super::ImportOptions;
use crate::archive::manifest::AnnouncedBlocks;
use crate::error::{Error, Result, describe};
use crate::exec::restore::OpenSeed;
use crate::exec::restore::seed::{PoolSeed, Seed};
use crate::fs::{Purpose, images_holding, may_find_holders, uuid_at};
use crate::index;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::ops::{Scope, prepare};
use crate::plan::seeds::weak_ids;

/// Opens the seeds that were named, or else images that the index knows to have wanted blocks; none if there are none.
pub(super) fn opener<'a>(options: &'a ImportOptions, monitor: &'a dyn Monitor) -> Box<OpenSeed<'a>> {
    Box::new(move |wanted, announced| {
        let paths = if options.seeds.is_empty() {
            known_images(options, wanted, announced, monitor).unwrap_or_default()
        } else {
            options.seeds.clone()
        };
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

/// Whether there can be any seeds: some are named, or there is an index of the filesystem.
pub(super) fn are_possible(options: &ImportOptions) -> bool {
    let has_index = || uuid_at(&options.restore.to).is_some_and(|uuid| index::exists(&options.index, uuid));
    !options.seeds.is_empty() || has_index()
}

/// Images that the index knows to hold wanted chunks, those with most of them: of the subvolume that is restored to, or of the XFS. None
/// where the index or the filesystem cannot tell.
fn known_images(
    options: &ImportOptions,
    wanted: &[Range<StoreBlock>],
    announced: &[AnnouncedBlocks],
    monitor: &dyn Monitor,
) -> Option<Vec<PathBuf>> {
    /// More of them would bring little.
    const IMAGES_MAX: usize = 64;
    let to = &options.restore.to;
    let uuid = uuid_at(to)?;
    if !index::exists(&options.index, uuid) || !may_find_holders(to) {
        return None;
    }
    let ids = weak_ids(wanted, announced.iter());
    let index = index::open(&options.index, uuid, None, monitor).ok()?;
    let addresses = index.extents_with(&|id| ids.contains(&id)).ok()?;
    drop(index);
    let mut chosen = images_holding(to, addresses, monitor)?;
    chosen.sort_unstable_by(|a, b| b.cmp(a));
    chosen.truncate(IMAGES_MAX);
    Some(chosen.into_iter().map(|image| image.path).collect())
}
