//! `scan`: fills the index, so that the next run need not read.

use super::{Prepared, Scope, prepare};
use crate::error::Result;
use crate::fs::Purpose;
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
        images: u64::from(fs.image_count()),
        pool: PoolBytes::of(&*fs, &facts),
        fingerprinted,
        skipped,
        interrupted: monitor.interrupted(),
    })
}
