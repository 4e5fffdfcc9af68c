//! What must hold in a sealed archive of every KEY record, of the wrapped keys in every COMMIT, and of what stands in clear. Who reads needs one of each
//! that opens; who verifies looks at all, since the others are what is left when that one is lost.

use std::collections::HashSet;
use std::path::Path;

use super::keys::{ArchiveKeys, IS_CLEAR, KEYS_LOST, KeyRecord};
use super::reader::{Archive, Damage, note_damage};
use super::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind};
use super::seal::KeySlot;
use crate::block::ByteRange;
use crate::codec::Malformed;
use crate::error::{Error, Result};

/// Keyrings with the number of the open one that are tried: each may take a second, and more than one are rare.
const TRIED_MAX: usize = 16;

/// What to say of a KEY record whose number is greater than that of the last one.
pub const NEWER: &str = "its keyring is newer than that at the end of the archive";

/// Returns what is wrong with a sealed archive whose keyring is open. Of another one it returns nothing.
///
/// # Errors
/// [`Error::Unsupported`] if a newer version made a KEY record; what opens keyrings may fail for a reason that is no damage; the error of reading.
pub fn check(archive: &Archive) -> Result<Vec<Damage>> {
    if archive.keys().ring().is_none() {
        return Ok(Vec::new());
    }
    let mut checked = Checked {
        archive,
        wraps: HashSet::new(),
        tried: HashSet::new(),
    };
    let mut damage = Vec::new();
    for (header, offset) in archive.records_found()? {
        let range = ByteRange {
            start: *offset,
            length: HEADER_BYTES as u64 + header.body_bytes,
        };
        note_damage(checked.record(header, *offset), range, &mut damage)?;
    }
    Ok(damage)
}

/// Fails if a record of a sealed archive is clear that must be sealed.
///
/// # Errors
/// [`Error::Damaged`].
pub fn check_is_sealed(archive: &Path, header: &RecordHeader, offset: u64) -> Result<()> {
    if header.seal.is_some() || KeySlot::of(header.kind).is_none() {
        return Ok(());
    }
    Err(damaged(archive, header, offset, IS_CLEAR))
}

/// Decodes a KEY record, and checks all of it that can be checked without opening it.
///
/// # Errors
/// [`Error::Damaged`]; [`Error::Unsupported`] if a newer version made it.
pub fn closed(
    keys: &ArchiveKeys,
    archive: &Path,
    (header, offset): (&RecordHeader, u64),
    body: &[u8],
) -> Result<KeyRecord> {
    let record = KeyRecord::decode(body).map_err(|problem| malformed(archive, header, offset, problem))?;
    let checked = keys.check_closed(archive, &record);
    checked.map_err(|error| placed(error, archive, header, offset))?;
    Ok(record)
}

/// Returns the damage of a sealed archive of so many bytes none of whose KEY records is intact.
pub fn all_lost(length: u64) -> Damage {
    Damage::at(ByteRange { start: 0, length }, KEYS_LOST)
}

/// What was checked of an archive.
struct Checked<'a> {
    archive: &'a Archive,
    /// Bodies of KEY records and COMMITs whose wrapped keys were tried. Copies need no second try.
    wraps: HashSet<(LaneId, EpochId, Hash)>,
    /// Hashes of the keyrings that were tried.
    tried: HashSet<[u8; 32]>,
}

impl Checked<'_> {
    fn record(&mut self, header: &RecordHeader, offset: u64) -> Result<()> {
        check_is_sealed(self.archive.path(), header, offset)?;
        match header.kind {
            RecordKind::Key | RecordKind::Commit => {}
            _ => return Ok(()),
        }
        if !self.wraps.insert((header.lane, header.epoch, header.body_hash)) {
            return Ok(());
        }
        let (keys, path) = (self.archive.keys(), self.archive.path());
        let body = self.archive.record_reader().stored_body_of(offset, header)?;
        let wrong = |problem| malformed(path, header, offset, problem);
        let wraps = if header.kind == RecordKind::Key {
            let record = closed(keys, path, (header, offset), &body)?;
            self.keyring(&record, (header, offset))?;
            record.wraps
        } else {
            keys.prove_commit(header, &body).map_err(wrong)?;
            super::keys::wraps_of(&body).map_err(wrong)?
        };
        let opened = keys.check_wraps(header.lane, header.epoch, &wraps);
        opened.map_err(wrong)
    }

    /// Checks a keyring against the open one. One with a lower number need not open: it may be for others.
    fn keyring(&mut self, record: &KeyRecord, (header, offset): (&RecordHeader, u64)) -> Result<()> {
        let (keys, path) = (self.archive.keys(), self.archive.path());
        let Some(open) = keys.key_record() else { return Ok(()) };
        if record.number > open.number {
            return Err(damaged(path, header, offset, NEWER));
        }
        if record.number < open.number || record.keyring == open.keyring {
            return Ok(());
        }
        if self.tried.len() == TRIED_MAX {
            return Err(damaged(path, header, offset, "too many keyrings have one number"));
        }
        if self.tried.insert(*blake3::hash(&record.keyring).as_bytes()) {
            let opened = keys.check_opens(path, record);
            opened.map_err(|error| placed(error, path, header, offset))?;
        }
        Ok(())
    }
}

fn damaged(archive: &Path, header: &RecordHeader, offset: u64, problem: &str) -> Error {
    let problem = format!("{} record: {problem}", header.kind.name());
    Error::damaged(archive, offset, HEADER_BYTES as u64 + header.body_bytes, &problem)
}

fn malformed(archive: &Path, header: &RecordHeader, offset: u64, malformed: Malformed) -> Error {
    match malformed {
        Malformed::Damaged(problem) => damaged(archive, header, offset, problem),
        Malformed::Unsupported(problem) => Error::Unsupported {
            path: archive.to_owned(),
            problem,
        },
    }
}

/// What is wrong with a keyring as damage of its KEY record.
fn placed(error: Error, archive: &Path, header: &RecordHeader, offset: u64) -> Error {
    match error {
        Error::DamagedKeyring { problem, .. } => {
            damaged(archive, header, offset, &format!("its keyring is damaged: {problem}"))
        }
        Error::Damaged { problem, .. } => damaged(archive, header, offset, &problem),
        Error::WrongKey { .. } => damaged(
            archive,
            header,
            offset,
            "its keyring does not open with the key that opens another one with its number",
        ),
        other => other,
    }
}
