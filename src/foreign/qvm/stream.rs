//! The stream that a backup of Qubes OS is: tar archives of one file each, one after the other. It is all that is parsed of a backup before
//! anything is authenticated.

use crate::error::Result;
use crate::foreign::tar::{BLOCK, has_checksum, number, pax_record, ustar_name};
use crate::foreign::{Input, array};

/// Bytes of a pax header, which has times only.
const PAX_BYTES_MAX: u64 = 4096;

/// A header in the stream.
pub(super) enum StreamHeader {
    /// A block of zeros. It is not the end.
    Zeros,
    /// Times of what follows.
    Pax(u64),
    /// A file.
    File {
        /// Its name.
        name: String,
        /// Bytes of its content.
        bytes: u64,
    },
}

/// Reads a header of the stream. Only what `tar --posix` writes of plain files is taken.
pub(super) fn stream_header(header: &[u8; BLOCK]) -> std::result::Result<StreamHeader, &'static str> {
    if header == &[0; BLOCK] {
        return Ok(StreamHeader::Zeros);
    }
    if !has_checksum(header) {
        return Err("the header of a part has another checksum");
    }
    let bytes = number(&header[124..136]).ok_or("a part has no proper size")?;
    match header[156] {
        b'x' if bytes <= PAX_BYTES_MAX => Ok(StreamHeader::Pax(bytes)),
        b'0' => Ok(StreamHeader::File {
            name: String::from_utf8(ustar_name(header)).map_err(|_| "a part has a name that is not allowed")?,
            bytes,
        }),
        _ => Err("something else than a part stands between parts"),
    }
}

/// Whether a pax header has times only.
fn has_times_only(mut records: &[u8]) -> bool {
    while !records.is_empty() {
        let Some(((key, _), rest)) = pax_record(records) else {
            return false;
        };
        if ![&b"mtime"[..], b"atime", b"ctime"].contains(&key) {
            return false;
        }
        records = rest;
    }
    true
}

/// The next file of a stream: its name and length. `ends_in_zeros` is whether the last block was one of zeros, as it must be at the end.
pub(super) fn next_file(input: &mut Input<'_>, ends_in_zeros: &mut bool) -> Result<Option<(String, u64)>> {
    loop {
        let start = input.offset();
        let damaged = |input: &Input<'_>, problem| input.damaged(start, input.offset() - start, None, problem);
        let mut header = [0; BLOCK];
        match input.fill(&mut header)? {
            0 if *ends_in_zeros => return Ok(None),
            BLOCK => {}
            _ => return Err(damaged(input, "it is cut off")),
        }
        let header = stream_header(&header).map_err(|problem| damaged(input, problem))?;
        *ends_in_zeros = matches!(header, StreamHeader::Zeros);
        match header {
            StreamHeader::Zeros => {}
            StreamHeader::Pax(bytes) => {
                let mut records = vec![0; usize::try_from(bytes).unwrap_or(0).next_multiple_of(BLOCK)];
                input.exact(&mut records, None)?;
                if !has_times_only(&records[..usize::try_from(bytes).unwrap_or(0)]) {
                    return Err(damaged(input, "the header of a part says more than times"));
                }
            }
            StreamHeader::File { name, bytes } => return Ok(Some((name, bytes))),
        }
    }
}

/// The content of a file of the stream. The caller has found that it is not too long.
pub(super) fn content(input: &mut Input<'_>, bytes: u64) -> Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
    input.exact(&mut content, None)?;
    input.skip(bytes.wrapping_neg() % BLOCK as u64)?;
    Ok(content)
}

/// The name of the file that a stream begins with, and what stands where the name stands if the file has a pax header. With each comes what of its
/// content is among these bytes.
pub(super) fn first_files(first: &[u8]) -> impl Iterator<Item = (Vec<u8>, &[u8])> {
    let headers = [0, 2 * BLOCK]
        .into_iter()
        .filter_map(|at| first.get(at..)?.split_first_chunk::<BLOCK>());
    headers
        .filter(|(header, _)| array::<5>(&header[..], 257) == *b"ustar")
        .map(|(header, rest)| {
            let bytes = number(&header[124..136]).and_then(|bytes| usize::try_from(bytes).ok());
            (ustar_name(header), &rest[..rest.len().min(bytes.unwrap_or(0))])
        })
}
