//! What vmfold does, one verb a file.

pub mod reclaim;
pub mod report;
pub mod scan;

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::facts::Facts;
use crate::fs::btrfs::{Btrfs, Fingerprinted, Purpose, fingerprint};
use crate::index::Index;
use crate::monitor::Monitor;
use crate::pool::{self, Found, Skip, Skipped};

/// What a verb works on.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Files and folders.
    pub paths: Vec<PathBuf>,
    /// Patterns of what to leave out in folders.
    pub exclude: Vec<String>,
    /// Where indexes are kept.
    pub index: PathBuf,
}

/// A pool that was opened and read.
struct Prepared {
    fs: Btrfs,
    facts: Facts,
    skipped: Vec<Skipped>,
    fingerprinted: Fingerprinted,
}

/// Opens a pool and fingerprints it. An image that cannot be read is left alone, with a note.
fn prepare(scope: &Scope, purpose: Purpose, monitor: &dyn Monitor) -> Result<Prepared> {
    let found = discover(scope, monitor)?;
    let mut images = found.images;
    let mut left_alone = found.skipped;
    loop {
        match prepare_images(scope, &images, purpose, monitor) {
            Ok(mut prepared) => {
                prepared.skipped.append(&mut left_alone);
                prepared.skipped.sort_by(|a, b| a.path.cmp(&b.path));
                return Ok(prepared);
            }
            Err(error) => {
                let Error::Io {
                    operation: "read",
                    path,
                    ..
                } = &error
                else {
                    return Err(error);
                };
                let Some(at) = images.iter().position(|image: &Found| image.path == *path) else {
                    return Err(error);
                };
                monitor.note(&describe(&error));
                left_alone.push(Skipped {
                    path: images.remove(at).path,
                    reason: Skip::Unreadable,
                });
            }
        }
    }
}

fn prepare_images(scope: &Scope, images: &[Found], purpose: Purpose, monitor: &dyn Monitor) -> Result<Prepared> {
    monitor.phase("Reading extent maps", 0);
    let (fs, skipped) = Btrfs::open(images, &scope.paths, purpose)?;
    let mapped = fs.map()?;
    let mut facts = mapped.facts;
    let fingerprinted = {
        let mut index = Index::open(&scope.index, fs.uuid(), Some(fs.function()), monitor)?;
        fingerprint(&fs, &mut facts, &mut index, monitor)?
    };
    Ok(Prepared {
        fs,
        facts,
        skipped,
        fingerprinted,
    })
}

/// Looks for images, and notes what could not be looked at.
fn discover(scope: &Scope, monitor: &dyn Monitor) -> Result<pool::Pool> {
    let found = pool::discover(&scope.paths, &scope.exclude)?;
    for (path, problem) in &found.unreadable {
        monitor.note(&format!("Cannot look into `{}`: {problem}", path.display()));
    }
    Ok(found)
}

/// An error with its causes, in one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
