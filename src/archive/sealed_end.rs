//! The end of a sealed archive, which can be read without a key: the newest KEY record, and the last copy of the last COMMIT.

use std::sync::Arc;

use super::commit::{CommitLocation, decode_tail};
use super::keys::{KEY_BODY_BYTES, KeyRecord, Wraps, wraps_of};
use super::parity::geometry_in;
use super::reader::RecordReader;
use super::record::{EpochId, HEADER_BYTES, MAGIC, RecordHeader, RecordKind};
use super::writer::EpochBase;
use crate::error::{Error, Result};
use crate::parity::geometry::GEOMETRY_BYTES;
use crate::store::Store;

/// Bytes of a TAIL.
const TAIL_BYTES: u64 = HEADER_BYTES as u64 + 96;
const NO_KEY_RECORD: &str = "no KEY record stands before its last COMMIT";

/// What a sealed archive ends with, where its last export or change of keys has ended.
#[derive(Debug)]
pub struct SealedEnd {
    /// The newest KEY record.
    pub keys: KeyRecord,
    /// The keys of the last epoch, wrapped.
    pub wraps: Wraps,
    /// The last epoch.
    pub epoch: EpochId,
    /// Its COMMIT: the header, and the body as it is stored.
    pub commit: (RecordHeader, Vec<u8>),
    /// What is appended behind it. It has no counts of records or blocks.
    pub base: EpochBase,
    /// Whether PARITY records stand at the end.
    pub has_parity: bool,
}

impl SealedEnd {
    /// Reads it.
    ///
    /// # Errors
    /// [`Error::Damaged`] if the archive does not end as it should; [`Error::NotSealed`]; [`Error::Unsupported`]; the error of reading.
    pub fn read(store: Arc<dyn Store>) -> Result<Self> {
        let reader = RecordReader::new(store)?;
        let mut start = [0; MAGIC.len()];
        if reader.read_exact(0, &mut start).is_err() || start != MAGIC {
            return Err(reader.nothing_intact());
        }
        let at = reader
            .length()
            .checked_sub(TAIL_BYTES)
            .ok_or_else(|| reader.problem(0, "it is too short"))?;
        let tail = reader.header_at(at)?;
        if tail.kind != RecordKind::Tail {
            return Err(reader.problem(at, "it does not end with a TAIL"));
        }
        let last = decode_tail(&reader.stored_body_of(at, &tail)?).map_err(|problem| reader.malformed(at, problem))?;
        let copy = at
            .checked_sub(last.length)
            .ok_or_else(|| reader.problem(at, "its TAIL names no COMMIT"))?;
        let header = reader.header_of(copy, &last.sought())?;
        if header.seal.is_none() {
            return Err(Error::NotSealed {
                path: reader.path().to_owned(),
            });
        }
        let commit = reader.stored_body_of(copy, &header)?;
        let wraps = wraps_of(&commit).map_err(|problem| reader.malformed(copy, problem))?;
        let (key, key_header) = key_record_before(&reader, copy, last.length)?;
        let keys = KeyRecord::decode(&reader.stored_body_of(key, &key_header)?)
            .map_err(|problem| reader.malformed(key, problem))?;
        Ok(Self {
            keys,
            wraps,
            epoch: header.epoch,
            commit: (header, commit),
            base: EpochBase {
                lane: header.lane,
                last: CommitLocation { ..last },
                sequence: tail.sequence + 1,
                length: reader.length(),
                ..EpochBase::default()
            },
            has_parity: parity_before(&reader, copy)?.is_some(),
        })
    }
}

/// Finds the KEY record that stands before the last copy of a COMMIT of so many bytes: directly before it or, where PARITY records do, before
/// the copy that stands before those. Returns where it begins, and its header.
///
/// # Errors
/// [`Error::Damaged`] where there is none; the error of reading.
pub(super) fn key_record_before(reader: &RecordReader, commit: u64, commit_bytes: u64) -> Result<(u64, RecordHeader)> {
    let mut first_parity = None;
    while let Some(parity) = parity_before(reader, first_parity.unwrap_or(commit))? {
        first_parity = Some(parity);
    }
    let end = match first_parity {
        Some(parity) => parity.checked_sub(TAIL_BYTES.saturating_add(commit_bytes)),
        None => Some(commit),
    };
    let end = end.ok_or_else(|| reader.problem(commit, NO_KEY_RECORD))?;
    directly_before(reader, end)?.ok_or_else(|| reader.problem(end, NO_KEY_RECORD))
}

/// Returns where the KEY record begins that ends at an offset, and its header, if there is one.
fn directly_before(reader: &RecordReader, end: u64) -> Result<Option<(u64, RecordHeader)>> {
    for body_bytes in KEY_BODY_BYTES {
        let Some(at) = end.checked_sub((HEADER_BYTES + body_bytes) as u64) else {
            break;
        };
        match reader.header_at(at) {
            Ok(header) if header.kind == RecordKind::Key && header.body_bytes == body_bytes as u64 => {
                return Ok(Some((at, header)));
            }
            Ok(_) | Err(Error::Damaged { .. } | Error::Unsupported { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// Returns where the end of an archive was before its keys were changed: the last copy of the COMMIT before the KEY record that stands before this
/// one. None if the keys were not changed since the last export.
///
/// # Errors
/// The error of reading.
pub(super) fn end_before_keys(reader: &RecordReader, commit: u64, commit_bytes: u64) -> Result<Option<u64>> {
    let Some((key, _)) = directly_before(reader, commit)? else {
        return Ok(None);
    };
    let Some(tail) = key.checked_sub(TAIL_BYTES) else {
        return Ok(None);
    };
    match reader.header_at(tail) {
        Ok(header) if header.kind == RecordKind::Tail => Ok(tail.checked_sub(commit_bytes)),
        Ok(_) | Err(Error::Damaged { .. } | Error::Unsupported { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns where the PARITY records begin that end at an offset, if there are any.
fn parity_before(reader: &RecordReader, end: u64) -> Result<Option<u64>> {
    let Some(trailer) = end.checked_sub(GEOMETRY_BYTES as u64) else {
        return Ok(None);
    };
    let mut bytes = [0; GEOMETRY_BYTES];
    reader.read_exact(trailer, &mut bytes)?;
    let layouts = geometry_in(&bytes).map(|(geometry, _)| geometry.layouts(HEADER_BYTES as u64));
    let ends_here = layouts.filter(|layouts| layouts.last().is_some_and(|last| last.end == end));
    let first = ends_here.and_then(|layouts| layouts.first().map(|first| first.start));
    // What says that it begins behind its end leads in a circle.
    Ok(first.filter(|first| *first < end))
}
