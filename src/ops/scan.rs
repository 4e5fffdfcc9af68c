//! `scan`: fills the index, so that the next run need not read blocks.

use super::{OpenPool, Scope, discover, open_pool, survey, without_empty};
use crate::error::Result;
use crate::fs::Purpose;
use crate::monitor::Monitor;
use crate::report::{PoolBytes, Scanned};

/// Scans a pool.
///
/// # Errors
/// Those of finding and opening images; those of [`scan_on`].
pub fn scan(scope: &Scope, monitor: &dyn Monitor) -> Result<Scanned> {
    let (fs, skipped) = open_pool(without_empty(discover(scope, monitor)?), Purpose::Look, monitor)?;
    scan_on(OpenPool::of(&*fs, skipped, scope, monitor), scope, monitor)
}

/// Scans a pool that is open. The paths of the scope are not used.
///
/// # Errors
/// [`crate::error::Error::Busy`] if another run uses the index; [`crate::error::Error::Io`] if metadata cannot be read. Blocks that cannot be
/// read are not errors: their images are listed as skipped.
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
