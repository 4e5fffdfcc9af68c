//! `scan`: fills the index, so that the next run need not read.

use super::{Prepared, Scope, prepare};
use crate::error::Result;
use crate::fs::volume::Purpose;
use crate::monitor::Monitor;
use crate::report::{PoolBytes, Scanned};

/// Scans a pool.
///
/// # Errors
/// Those of reading.
pub fn scan(scope: &Scope, monitor: &dyn Monitor) -> Result<Scanned> {
    let Prepared {
        fs,
        facts,
        skipped,
        fingerprinted,
        ..
    } = prepare(scope, Purpose::Look, monitor)?;
    Ok(Scanned {
        images: fs.images().len() as u64,
        pool: PoolBytes::of(&fs, &facts),
        fingerprinted,
        skipped,
        interrupted: monitor.interrupted(),
    })
}
