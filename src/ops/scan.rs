//! `scan`: fills the index, so that the next run need not read.

use super::{OpenPool, Scope, data_of, discover, open_pool, survey};
use crate::error::Result;
use crate::fs::Purpose;
use crate::monitor::Monitor;
use crate::report::{PoolBytes, Scanned};

/// Scans a pool.
///
/// # Errors
/// Those of reading.
pub fn scan(scope: &Scope, monitor: &dyn Monitor) -> Result<Scanned> {
    let (fs, skipped) = open_pool(data_of(discover(scope, monitor)?), Purpose::Look, monitor)?;
    scan_on(OpenPool::of(&*fs, skipped, scope, monitor), scope, monitor)
}

/// Scans a pool that is open. The scope's paths are not looked at.
///
/// # Errors
/// Those of reading.
pub fn scan_on(pool: OpenPool<'_>, scope: &Scope, monitor: &dyn Monitor) -> Result<Scanned> {
    let fs = pool.fs;
    let survey = survey(pool, scope, true, monitor)?;
    Ok(Scanned {
        images: fs.image_count().into(),
        pool: PoolBytes::of(fs, &survey.facts),
        fingerprinted: survey.fingerprinted,
        skipped: survey.skipped,
        interrupted: monitor.interrupted(),
    })
}
