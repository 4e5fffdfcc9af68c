//! `protect`: gives an archive parity, from which lost bytes of it can be computed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::open_archive::{OpenArchive, Sealing};
use crate::archive::parity::ParityMaker;
use crate::archive::reader::Archive;
use crate::archive::stream::{Stream, StreamEvent};
use crate::archive::writer::ArchiveWriter;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::report::Protected;
use crate::store::{FileStore, Store, StoreReader};

/// Which archive gets parity, and how much.
#[derive(Debug, Clone)]
pub struct ProtectOptions {
    /// The archive.
    pub archive: PathBuf,
    /// Percent of the archive that can be lost and still heal, from 1 to 100.
    pub percent: u8,
    /// Whether all of the archive gets it, also what has parity already.
    pub again: bool,
    /// How the archive is sealed, if it is.
    pub sealing: Sealing,
}

/// Gives an archive parity.
///
/// # Errors
/// Those of [`FileStore::append_to`]; [`Error::Damaged`] if the archive is damaged where it is to get parity, or has no commit;
/// [`Error::NoSpace`] or [`Error::Io`] if it cannot be read or written; [`Error::Interrupted`]. Whatever the error, the archive is as it was.
pub fn protect(options: &ProtectOptions, monitor: &dyn Monitor) -> Result<Protected> {
    // What does not exist must not be made.
    drop(FileStore::open(&options.archive)?);
    protect_on(Arc::new(FileStore::append_to(&options.archive)?), options, monitor)
}

/// Gives the archive in a store parity. [`ProtectOptions::archive`] is not used.
///
/// # Errors
/// Those of [`protect`].
pub fn protect_on(store: Arc<dyn Store>, options: &ProtectOptions, monitor: &dyn Monitor) -> Result<Protected> {
    let mut opened = OpenArchive::new(Arc::clone(&store), &options.sealing)?;
    let Some((archive, last)) = opened.last() else {
        return Archive::open(store).and_then(|archive| Err(no_commit(archive.path(), archive.length())));
    };
    let (known, end) = (archive.last_parity()?, opened.base.length);
    let mut report = Protected {
        archive: archive.path().to_owned(),
        percent: options.percent,
        archive_bytes: end,
        ..Protected::default()
    };
    if known.percent > 0 && !options.again && archive.is_ended() {
        report.percent = known.percent;
        report.was_protected = true;
        return Ok(report);
    }
    let from = match options.again {
        true => 0,
        false if known.percent > 0 => known.end,
        false => archive.searched_parity()?.end,
    };
    check_intact(archive, from, end, monitor)?;
    let commit = archive.commit_record(last)?;
    let mut writer = ArchiveWriter::resume(Arc::clone(&opened.store), opened.base, commit);
    opened.begin(monitor)?;
    monitor.phase("Writing parity", end - from);
    let parity = ParityMaker::new(options.percent, from);
    let written = writer.protect(Some(parity), &mut |read| {
        monitor.advance(read.len() as u64);
        if monitor.interrupted() {
            return Err(std::io::Error::other("interrupted"));
        }
        Ok(())
    });
    match written {
        Ok(base) => opened.base = base.unwrap_or(opened.base),
        Err(error) => {
            opened.undo(monitor);
            return Err(if monitor.interrupted() {
                Error::Interrupted
            } else {
                Error::io("write to", opened.store.path())(error)
            });
        }
    }
    report.protected_bytes = end - from;
    report.parity_bytes = writer.parity_bytes();
    report.archive_bytes = opened.base.length;
    Ok(report)
}

fn no_commit(path: &Path, length: u64) -> Error {
    Error::damaged(path, 0, length, "it has no commit: there is nothing to protect")
}

/// Checks that every record of a range is what was written: parity of damage would keep it for ever.
fn check_intact(archive: &Archive, from: u64, end: u64, monitor: &dyn Monitor) -> Result<()> {
    monitor.phase("Checking the archive", end - from);
    let reader = StoreReader::new(archive.store(), from);
    let mut stream = Stream::new(std::io::Read::take(reader, end - from), from);
    let mut before = from;
    while let Some(event) = stream.next_event().map_err(Error::io("read", archive.path()))? {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        monitor.advance(stream.offset() - before);
        before = stream.offset();
        match event {
            StreamEvent::Record { .. } | StreamEvent::Unsupported(_) => {}
            // A group may end within a record, whose rest is read here.
            StreamEvent::Damage { range, .. } if range.start == from && from > 0 => {}
            StreamEvent::Damage { range, problem, .. } => {
                return Err(Error::damaged(archive.path(), range.start, range.length, problem));
            }
        }
    }
    Ok(())
}
