//! COMMIT and TAIL: what belongs together, and where it is.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::manifest::{file_time, store_block};
use super::record::{HEADER_BYTES, Hash, RecordKind};
use crate::codec::{Decoded, Decoder, RAW, pack_payload, put_string, put_varint, put_zigzag, unpack_payload};
use crate::content::FileTime;
use crate::numbers::{CommitNumber, StoreBlock};

const PAYLOAD_BYTES_MAX: usize = 16 << 20;
/// How much smaller a payload can be stored at most, beside 64 KiB: it is hashes for the most part.
const PAYLOAD_RATIO_MAX: usize = 16;
const TEXT_BYTES_MAX: usize = 4096;

/// Bytes of a payload at most that is stored in so many.
fn limit_of(stored: usize) -> usize {
    PAYLOAD_BYTES_MAX.min(stored * PAYLOAD_RATIO_MAX + (64 << 10))
}

/// Where a record is, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordLocation {
    /// What it holds.
    pub kind: RecordKind,
    /// Of a PLAN: which part.
    pub part: u8,
    /// Its number in the archive.
    pub sequence: u64,
    /// Where it begins, in bytes from the archive's beginning.
    pub offset: u64,
    /// Bytes, header included.
    pub length: u64,
    /// Of a PACK, an INDEX and a PLAN of blocks: the first store address.
    pub first: StoreBlock,
    /// And how many blocks.
    pub blocks: u32,
    /// BLAKE3 of its body.
    pub body_hash: Hash,
}

/// Where a COMMIT is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommitLocation {
    /// Where it begins.
    pub offset: u64,
    /// Bytes, header included; 0 if there is none.
    pub length: u64,
    /// BLAKE3 of its body.
    pub body_hash: Hash,
}

/// An image in a commit, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// The name it is called by.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Blocks that are neither holes nor zeros.
    pub data_blocks: u64,
    /// Blocks that this commit added to the store for it.
    pub new_blocks: u64,
    /// BLAKE3 of the hashes of its blocks, one after the other, 32 zero bytes for each block of zeros.
    pub digest: Hash,
}

/// Images by the names they are called by; of several with one name, the first.
pub fn by_path(images: &[ImageSummary]) -> HashMap<&Path, &ImageSummary> {
    images.iter().rev().map(|image| (image.path.as_path(), image)).collect()
}

/// What a COMMIT says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// Its number in the archive.
    pub number: CommitNumber,
    /// When it was made.
    pub time: FileTime,
    /// What the user called it.
    pub label: String,
    /// The folder that paths are relative to.
    pub root: PathBuf,
    /// The one before.
    pub previous: CommitLocation,
    /// The store's length after it.
    pub store_end: StoreBlock,
    /// Its images.
    pub images: Vec<ImageSummary>,
    /// Its records, but this one and the TAIL.
    pub records: Vec<RecordLocation>,
}

impl Commit {
    /// Writes the body.
    ///
    /// # Errors
    /// Those of zstd.
    pub fn encode(&self) -> std::io::Result<Vec<u8>> {
        let mut plain = Vec::new();
        let out = &mut plain;
        put_varint(out, self.number.0.into());
        put_zigzag(out, self.time.seconds);
        put_varint(out, self.time.nanoseconds.into());
        put_string(out, self.label.as_bytes());
        put_string(out, self.root.as_os_str().as_bytes());
        put_varint(out, self.previous.offset);
        put_varint(out, self.previous.length);
        out.extend(self.previous.body_hash);
        put_varint(out, self.store_end.0.into());
        put_varint(out, self.images.len() as u64);
        for image in &self.images {
            put_string(out, image.path.as_os_str().as_bytes());
            for number in [image.size, image.data_blocks, image.new_blocks] {
                put_varint(out, number);
            }
            out.extend(image.digest);
        }
        put_varint(out, self.records.len() as u64);
        for record in &self.records {
            out.extend([record.kind.number(), record.part]);
            for number in [
                record.sequence,
                record.offset,
                record.length,
                record.first.0.into(),
                record.blocks.into(),
            ] {
                put_varint(out, number);
            }
            out.extend(record.body_hash);
        }
        let (mut encoding, mut stored) = pack_payload(&plain)?;
        if plain.len() > limit_of(stored.len()) {
            // Many images that are alike shrink by more than a reader believes.
            encoding = RAW;
            stored.clone_from(&plain);
        }
        let mut body = vec![encoding, 0, 0, 0];
        body.extend(u32::try_from(plain.len()).unwrap_or(u32::MAX).to_le_bytes());
        body.extend(stored);
        Ok(body)
    }

    /// The bytes of the archive that its records lie in. They follow the commit before, and none lies in another: otherwise a small
    /// archive could have one record read a million times.
    ///
    /// # Errors
    /// Where that is not so.
    pub fn span(&self) -> Decoded<Range<u64>> {
        let end_of = |(offset, length): (u64, u64)| {
            offset
                .checked_add(length)
                .ok_or("a record lies beyond the archive's end")
        };
        let start = end_of((self.previous.offset, self.previous.length))?;
        let mut places: Vec<(u64, u64)> = self.records.iter().map(|one| (one.offset, one.length)).collect();
        places.sort_unstable();
        let mut end = start;
        for (offset, length) in places {
            if offset < end || length < HEADER_BYTES as u64 {
                return Err("records of a commit lie in each other");
            }
            end = end_of((offset, length))?;
        }
        Ok(start..end)
    }

    /// Reads the body.
    ///
    /// # Errors
    /// Where it is not as the format says.
    pub fn decode(body: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(body);
        let encoding = decoder.u8()?;
        decoder.zeros(3)?;
        let plain_length = usize::try_from(decoder.u32()?).unwrap_or(usize::MAX);
        let stored = decoder.take(decoder.left())?;
        let plain = unpack_payload(encoding, stored, plain_length, limit_of(stored.len()))?;
        let mut decoder = Decoder::new(&plain);
        let number = commit_number(decoder.varint32()?)?;
        let time = file_time(&mut decoder)?;
        let label = decoder.text(TEXT_BYTES_MAX)?;
        let root = PathBuf::from(OsStr::from_bytes(decoder.string(TEXT_BYTES_MAX)?));
        let previous = CommitLocation {
            offset: decoder.varint()?,
            length: decoder.varint()?,
            body_hash: decoder.array()?,
        };
        let store_end = store_block(decoder.varint()?)?;
        let count = decoder.count(36)?;
        let mut images = Vec::with_capacity(count);
        for _ in 0..count {
            images.push(ImageSummary {
                path: PathBuf::from(OsStr::from_bytes(decoder.string(TEXT_BYTES_MAX)?)),
                size: decoder.varint()?,
                data_blocks: decoder.varint()?,
                new_blocks: decoder.varint()?,
                digest: decoder.array()?,
            });
        }
        let count = decoder.count(39)?;
        let mut records = Vec::with_capacity(count);
        for _ in 0..count {
            let (kind, part) = (RecordKind::of(decoder.u8()?), decoder.u8()?);
            let record = RecordLocation {
                kind,
                part,
                sequence: decoder.varint()?,
                offset: decoder.varint()?,
                length: decoder.varint()?,
                first: store_block(decoder.varint()?)?,
                blocks: decoder.varint32()?,
                body_hash: decoder.array()?,
            };
            if record.offset.checked_add(record.length).is_none()
                || record
                    .first
                    .checked_add(record.blocks)
                    .is_none_or(|end| end > store_end)
            {
                return Err("a record lies beyond the archive's end");
            }
            records.push(record);
        }
        decoder.end()?;
        Ok(Self {
            number,
            time,
            label,
            root,
            previous,
            store_end,
            images,
            records,
        })
    }
}

fn commit_number(number: u32) -> Decoded<CommitNumber> {
    Some(CommitNumber(number))
        .filter(|number| number.is_allowed())
        .ok_or("a commit has a number that is not allowed")
}

/// Writes the body of a TAIL.
pub fn encode_tail(commit: &CommitLocation) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..2 {
        out.extend(commit.offset.to_le_bytes());
        out.extend(commit.length.to_le_bytes());
        out.extend(commit.body_hash);
    }
    out
}

/// Reads the body of a TAIL.
///
/// # Errors
/// Where its two halves differ.
pub fn decode_tail(body: &[u8]) -> Decoded<CommitLocation> {
    let mut decoder = Decoder::new(body);
    let mut copy = || -> Decoded<CommitLocation> {
        Ok(CommitLocation {
            offset: decoder.u64()?,
            length: decoder.u64()?,
            body_hash: decoder.array()?,
        })
    };
    let (one, other) = (copy()?, copy()?);
    if one == other {
        Ok(one)
    } else {
        Err("its two halves differ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn commits_come_back(label in ".{0,40}", numbers: (u32, i64, u64), paths in prop::collection::vec("[a-z/]{1,20}", 0..5)) {
            let commit = Commit {
                number: CommitNumber(numbers.0).clamp(CommitNumber::FIRST, CommitNumber::LAST),
                time: FileTime { seconds: numbers.1, nanoseconds: 5 },
                label,
                root: "/var/lib/qubes".into(),
                previous: CommitLocation { offset: numbers.2, length: 3, body_hash: [4; 32] },
                store_end: StoreBlock(100),
                images: paths.iter().map(|path| ImageSummary { path: path.into(), size: numbers.2, data_blocks: 4, new_blocks: 3, digest: [9; 32] }).collect(),
                records: vec![RecordLocation { kind: RecordKind::Pack, part: 0, sequence: 4, offset: 3, length: 100, first: StoreBlock(90), blocks: 10, body_hash: [1; 32] }],
            };
            prop_assert_eq!(Commit::decode(&commit.encode().unwrap()), Ok(commit));
        }

        #[test]
        fn nothing_is_too_strange(body: Vec<u8>, payload: Vec<u8>) {
            let _ = Commit::decode(&body);
            let mut whole = vec![0; 4];
            whole.extend(u32::try_from(payload.len()).unwrap().to_le_bytes());
            whole.extend(&payload);
            let _ = Commit::decode(&whole);
            let _ = decode_tail(&body);
        }
    }

    /// They shrink by more than what a reader takes for possible.
    #[test]
    fn a_commit_of_very_many_images_that_are_alike_can_be_read() {
        let image = |n: u32| ImageSummary {
            path: format!("machine/private.img.{n}@2026-01-01T00:00:00Z").into(),
            size: 4096,
            data_blocks: 1,
            new_blocks: 0,
            digest: [7; 32],
        };
        let commit = Commit {
            number: CommitNumber::FIRST,
            time: FileTime::default(),
            label: String::new(),
            root: PathBuf::new(),
            previous: CommitLocation::default(),
            store_end: StoreBlock(10),
            images: (0..20_000).map(image).collect(),
            records: Vec::new(),
        };
        assert_eq!(Commit::decode(&commit.encode().unwrap()), Ok(commit));
    }

    #[test]
    fn records_lie_behind_the_commit_before_and_in_no_other() {
        let record = |offset, length| RecordLocation {
            kind: RecordKind::Pack,
            part: 0,
            sequence: 4,
            offset,
            length,
            first: StoreBlock(0),
            blocks: 1,
            body_hash: [1; 32],
        };
        let commit = |records: Vec<RecordLocation>| Commit {
            number: CommitNumber(2),
            time: FileTime::default(),
            label: String::new(),
            root: PathBuf::new(),
            previous: CommitLocation {
                offset: 300,
                length: 100,
                body_hash: [0; 32],
            },
            store_end: StoreBlock(10),
            images: Vec::new(),
            records,
        };
        assert_eq!(commit(vec![record(600, 100), record(400, 200)]).span(), Ok(400..700));
        for bad in [
            vec![record(399, 100)],
            vec![record(400, 200), record(400, 200)],
            vec![record(400, 200), record(599, 100)],
            vec![record(400, 0)],
            vec![record(u64::MAX - 100, 101)],
        ] {
            assert!(commit(bad).span().is_err());
        }
    }

    #[test]
    fn a_tail_comes_back() {
        let location = CommitLocation {
            offset: 5,
            length: 6,
            body_hash: [7; 32],
        };
        let body = encode_tail(&location);
        assert_eq!(body.len() as u64, RecordKind::Tail.body_bytes_max());
        assert_eq!(decode_tail(&body), Ok(location));
    }
}
