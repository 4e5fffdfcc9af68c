//! The newest KEY record of a sealed archive. Readers take the one at the end. Who writes must not: whoever can write to where an archive lies
//! can put an older one behind the newest, and what is sealed with that can be read by those who were removed since.

use super::keys::KeyRecord;
use super::open::search;
use super::reader::RecordReader;
use super::record::{DecodedHeader, HEADER_BYTES, RecordHeader, RecordKind};
use crate::codec::Malformed;
use crate::error::{Error, Result};

/// A KEY record, and where it stands.
#[derive(Debug, Clone)]
pub struct PlacedKeys {
    /// Where it begins, in bytes from the beginning of the archive.
    pub offset: u64,
    /// Its header.
    pub header: RecordHeader,
    /// What it holds.
    pub record: KeyRecord,
}

/// Finds the KEY record with the greatest number, and the last of those that have it. It reads all headers and, where one does not lead to the next,
/// the whole archive.
///
/// # Errors
/// [`Error::Damaged`] where a KEY record does not match its hash: it may be the newest; [`Error::Unsupported`]; the error of reading.
pub fn newest(reader: &RecordReader) -> Result<Option<PlacedKeys>> {
    let placed = match walked(reader) {
        Err(Error::Damaged { .. }) => {
            let searched = search(reader)?;
            searched.check_keys_intact(reader)?;
            searched.keys().collect()
        }
        other => other?,
    };
    newest_of(reader, placed)
}

/// Returns the newest of some KEY records, which are in the order in which they stand.
///
/// # Errors
/// Those of [`newest`].
pub(super) fn newest_of(
    reader: &RecordReader,
    placed: impl IntoIterator<Item = (RecordHeader, u64)>,
) -> Result<Option<PlacedKeys>> {
    let mut newest: Option<PlacedKeys> = None;
    for (header, offset) in placed {
        let record = match KeyRecord::decode(&reader.stored_body_of(offset, &header)?) {
            Ok(record) => record,
            Err(problem @ Malformed::Unsupported(_)) => return Err(reader.malformed(offset, problem)),
            // No writer made it.
            Err(Malformed::Damaged(_)) => continue,
        };
        if newest.as_ref().is_none_or(|known| known.record.number <= record.number) {
            newest = Some(PlacedKeys { offset, header, record });
        }
    }
    Ok(newest)
}

/// The KEY records that are met from one header to the next, with where they begin.
fn walked(reader: &RecordReader) -> Result<Vec<(RecordHeader, u64)>> {
    let (mut keys, mut at) = (Vec::new(), 0);
    while at < reader.length() {
        let (header, problem) = match reader.any_header_at(at)? {
            DecodedHeader::Known(header) => (header, None),
            DecodedHeader::Unsupported(record) => (record.header, Some(record.problem)),
        };
        if header.kind == RecordKind::Key {
            if let Some(problem) = problem {
                return Err(reader.unsupported(problem));
            }
            keys.push((header, at));
        }
        let next = (at + HEADER_BYTES as u64).checked_add(header.body_bytes);
        at = next.ok_or_else(|| reader.problem(at, "it ends in the middle of a record"))?;
    }
    if at > reader.length() {
        return Err(reader.problem(reader.length(), "it ends in the middle of a record"));
    }
    Ok(keys)
}
