//! COMMIT and TAIL: what belongs together, and where it is.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::head::FEATURE_SEALED;
use super::limits::{COMMIT_PAYLOAD_BYTES_MAX, LABEL_BYTES_MAX, LISTS_MAX};
use super::list::PART_IMAGES;
use super::manifest::{file_time, store_block};
use super::record::{EpochId, Hash, LaneId, RecordHeader, RecordKind, SoughtRecord};
use crate::codec::{
    Decoded, Decoder, Malformed, next_entry, payload_body, payload_of, put_entry, put_string, put_varint, put_zigzag,
    skip_entry,
};
use crate::content::FileTime;
use crate::numbers::{CommitNumber, StoreBlock};

/// Bytes of a COMMIT before its payload, as this version writes it.
pub(super) const CLEAR_BYTES: usize = 104;
/// The entry of a sealed COMMIT that has the number of its keyring.
const TAG_KEYRING: u8 = 0x81;

/// Where a LIST is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListLocation {
    /// What it lists: see [`super::list`].
    pub part: u8,
    /// Its number in the lane.
    pub sequence: u64,
    /// Where it begins, in bytes from the beginning of the file. A hint.
    pub offset: u64,
    /// Bytes, header included.
    pub length: u64,
    /// BLAKE3 of its body.
    pub body_hash: Hash,
}

impl ListLocation {
    /// Returns what it is looked for by.
    pub fn sought(&self) -> SoughtRecord {
        SoughtRecord {
            kind: RecordKind::List,
            offset: self.offset,
            length: self.length,
            body_hash: self.body_hash,
        }
    }
}

/// Where a COMMIT is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CommitLocation {
    /// Where it begins, in bytes from the beginning of the file. A hint.
    pub offset: u64,
    /// Bytes, header included; 0 if there is none.
    pub length: u64,
    /// BLAKE3 of its body, which is the commit's identity.
    pub body_hash: Hash,
}

impl CommitLocation {
    /// Returns whether it means no commit.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Returns what it is looked for by.
    pub fn sought(&self) -> SoughtRecord {
        SoughtRecord {
            kind: RecordKind::Commit,
            offset: self.offset,
            length: self.length,
            body_hash: self.body_hash,
        }
    }
}

/// What tells whether a commit can be the one before another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ChainPlace {
    number: CommitNumber,
    store_end: StoreBlock,
}

/// What is wrong with a commit that says it follows another and cannot.
pub const FOLLOWS_NOT: &str = "does not follow the one that it says it does";

impl ChainPlace {
    /// Returns that of a commit.
    pub fn of(commit: &Commit) -> Self {
        Self {
            number: commit.number,
            store_end: commit.store_end,
        }
    }

    /// Returns whether a commit can be the one after it: numbers go up by one, and the end of the store does not go down.
    pub fn is_followed_by(self, next: Self) -> bool {
        self.number.next() == next.number && self.store_end <= next.store_end
    }
}

/// What a COMMIT says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Commit {
    /// Its number in its lane.
    pub number: CommitNumber,
    /// When it was made.
    pub time: FileTime,
    /// What the user called it.
    pub label: String,
    /// The folder that paths are relative to.
    pub root: PathBuf,
    /// The host it was made on.
    pub host: String,
    /// The program that made it, and its version.
    pub writer: String,
    /// Its lane.
    pub lane: LaneId,
    /// The epoch that made it.
    pub epoch: EpochId,
    /// The one before.
    pub previous: CommitLocation,
    /// The end of the lane's store after it.
    pub store_end: StoreBlock,
    /// Features that a writer that appends must know, a bit each.
    pub features_append: u64,
    /// The number of the keyring that the archive had; none if it is not sealed.
    pub keyring: Option<u32>,
    /// Where what it lists is.
    pub lists: Vec<ListLocation>,
}

/// What a COMMIT says in its clear part, which needs no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClearCommit {
    /// Its number in its lane.
    pub number: CommitNumber,
    /// The one before.
    pub previous: CommitLocation,
    /// The end of the lane's store after it.
    pub store_end: StoreBlock,
    /// Features that a writer that appends must know, a bit each.
    pub features_append: u64,
}

impl ClearCommit {
    /// Decodes it from the body as it is stored.
    ///
    /// # Errors
    /// Returns what is malformed.
    pub fn decode(stored: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(stored);
        let (_, features_append) = (decoder.u64()?, decoder.u64()?);
        let number = CommitNumber(decoder.u32()?);
        let store_end = StoreBlock(decoder.u32()?);
        Ok(Self {
            number: Some(number)
                .filter(|number| number.is_allowed())
                .ok_or("a commit has a number that is not allowed")?,
            previous: location(&mut decoder)?,
            store_end,
            features_append,
        })
    }
}

impl Commit {
    /// Decodes the body of a record, which proves the lane and the epoch of its header.
    ///
    /// # Errors
    /// Returns what is malformed, or what this version does not know and must not skip.
    pub fn decode_of(body: &[u8], header: &RecordHeader) -> Decoded<Self> {
        let commit = Self::decode(body)?;
        if commit.keyring.is_some() != header.seal.is_some() {
            return Err("a COMMIT is sealed and does not say so, or the other way round".into());
        }
        if (commit.lane, commit.epoch) == (header.lane, header.epoch) {
            Ok(commit)
        } else {
            Err("a COMMIT has the header of another record".into())
        }
    }

    /// Returns the body.
    ///
    /// # Errors
    /// Returns the error that zstd gave.
    pub fn encode(&self) -> std::io::Result<Vec<u8>> {
        let mut body = Vec::new();
        let features_read = if self.keyring.is_some() { FEATURE_SEALED } else { 0 };
        body.extend(features_read.to_le_bytes());
        body.extend(self.features_append.to_le_bytes());
        body.extend(self.number.0.to_le_bytes());
        body.extend(self.store_end.0.to_le_bytes());
        put_location(&mut body, &self.previous);
        body.extend(u32::try_from(CLEAR_BYTES).unwrap_or(0).to_le_bytes());
        body.extend([0; 4]);
        body.extend(self.lane.0);
        body.extend(self.epoch.0.to_le_bytes());
        let mut plain = Vec::new();
        put_zigzag(&mut plain, self.time.seconds);
        put_varint(&mut plain, self.time.nanoseconds.into());
        let root = self.root.as_os_str().as_bytes();
        for text in [
            self.label.as_bytes(),
            root,
            self.host.as_bytes(),
            self.writer.as_bytes(),
        ] {
            put_string(&mut plain, text);
        }
        put_varint(&mut plain, self.lists.len() as u64);
        for list in &self.lists {
            plain.push(list.part);
            for number in [list.sequence, list.offset, list.length] {
                put_varint(&mut plain, number);
            }
            plain.extend(list.body_hash);
        }
        if let Some(number) = self.keyring {
            put_entry(&mut plain, TAG_KEYRING, |entry| put_varint(entry, number.into()));
        }
        body.extend(payload_body([0; 3], &plain)?);
        Ok(body)
    }

    /// Takes the number of the keyring, which a payload has once.
    fn set_keyring(&mut self, number: u32) -> Decoded<()> {
        if number == 0 {
            return Err("a keyring has the number 0".into());
        }
        match self.keyring.replace(number) {
            None => Ok(()),
            Some(_) => Err("a COMMIT has two numbers of keyrings".into()),
        }
    }

    /// Decodes the body.
    ///
    /// # Errors
    /// Returns what is malformed, or what this version does not know and must not skip.
    pub fn decode(body: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(body);
        let features_read = decoder.u64()?;
        if features_read & !FEATURE_SEALED != 0 {
            return Err(Malformed::Unsupported(super::head::UNKNOWN_FEATURES));
        }
        let features_append = decoder.u64()?;
        let number = Some(CommitNumber(decoder.u32()?))
            .filter(|number| number.is_allowed())
            .ok_or("a commit has a number that is not allowed")?;
        let store_end = store_block(decoder.u32()?.into())?;
        let previous = location(&mut decoder)?;
        if previous.is_none() != (number == CommitNumber::FIRST) {
            return Err("the first commit, and no other, has none before it".into());
        }
        let clear_bytes = usize::try_from(decoder.u32()?).unwrap_or(usize::MAX);
        decoder.zeros(4)?;
        let (lane, epoch) = (LaneId(decoder.array()?), EpochId(decoder.u64()?));
        decoder.take(
            clear_bytes
                .checked_sub(CLEAR_BYTES)
                .ok_or("its payload begins too early")?,
        )?;
        let (kind, plain) = payload_of(decoder.take(decoder.left())?, COMMIT_PAYLOAD_BYTES_MAX)?;
        if kind != [0; 3] {
            return Err("a reserved field is not 0".into());
        }
        let mut decoder = Decoder::new(&plain);
        let mut commit = Self {
            number,
            time: file_time(&mut decoder)?,
            label: decoder.text(LABEL_BYTES_MAX)?,
            root: PathBuf::from(OsStr::from_bytes(decoder.string(LABEL_BYTES_MAX)?)),
            host: decoder.text(LABEL_BYTES_MAX)?,
            writer: decoder.text(LABEL_BYTES_MAX)?,
            lane,
            epoch,
            previous,
            store_end,
            features_append,
            keyring: None,
            lists: lists(&mut decoder)?,
        };
        while let Some((tag, mut entry)) = next_entry(&mut decoder)? {
            match tag {
                TAG_KEYRING => commit.set_keyring(entry.varint32()?)?,
                other => skip_entry(other)?,
            }
        }
        if commit.keyring.is_some() != (features_read & FEATURE_SEALED != 0) {
            return Err("a COMMIT is sealed by its features alone, or by its keyring alone".into());
        }
        Ok(commit)
    }
}

fn lists(decoder: &mut Decoder<'_>) -> Decoded<Vec<ListLocation>> {
    let count = decoder.count(36)?;
    if count > LISTS_MAX {
        return Err("it has more LISTs than allowed".into());
    }
    let mut lists = Vec::with_capacity(count);
    for _ in 0..count {
        let part = decoder.u8()?;
        if part > PART_IMAGES {
            return Err(Malformed::Unsupported("it has LISTs that this version does not know"));
        }
        lists.push(ListLocation {
            part,
            sequence: decoder.varint()?,
            offset: decoder.varint()?,
            length: decoder.varint()?,
            body_hash: decoder.array()?,
        });
    }
    Ok(lists)
}

fn put_location(encoded: &mut Vec<u8>, location: &CommitLocation) {
    encoded.extend(location.offset.to_le_bytes());
    encoded.extend(location.length.to_le_bytes());
    encoded.extend(location.body_hash);
}

fn location(decoder: &mut Decoder<'_>) -> Decoded<CommitLocation> {
    Ok(CommitLocation {
        offset: decoder.u64()?,
        length: decoder.u64()?,
        body_hash: decoder.array()?,
    })
}

/// Returns the body of a TAIL.
pub fn encode_tail(commit: &CommitLocation) -> Vec<u8> {
    let mut body = Vec::new();
    for _ in 0..2 {
        put_location(&mut body, commit);
    }
    body
}

/// Decodes the body of a TAIL.
///
/// # Errors
/// Says that its two halves differ, or that it is too short.
pub fn decode_tail(body: &[u8]) -> Decoded<CommitLocation> {
    let mut decoder = Decoder::new(body);
    let (first, second) = (location(&mut decoder)?, location(&mut decoder)?);
    decoder.end()?;
    if first == second {
        Ok(first)
    } else {
        Err("its two halves differ".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn commits_come_back(label in ".{0,40}", numbers: (u32, i64, u64), lists in 0u8..5) {
            let list = |n| ListLocation { part: n % 2, sequence: numbers.2, offset: 3, length: 100, body_hash: [n; 32] };
            let commit = Commit {
                number: CommitNumber(numbers.0).clamp(CommitNumber::FIRST, CommitNumber::LAST),
                time: FileTime { seconds: numbers.1, nanoseconds: 5 },
                label,
                root: "/var/lib/qubes".into(),
                host: "dom0".into(),
                writer: "vmfold 0".into(),
                lane: LaneId([5; 16]),
                epoch: EpochId(numbers.2),
                previous: if numbers.0 <= 1 { CommitLocation::default() } else { CommitLocation { offset: numbers.2, length: 3, body_hash: [4; 32] } },
                store_end: StoreBlock(100),
                features_append: 0,
                keyring: (lists % 2 == 1).then_some(numbers.0.max(1)),
                lists: (0..lists).map(list).collect(),
            };
            prop_assert_eq!(Commit::decode(&commit.encode().unwrap()), Ok(commit));
        }

        #[test]
        fn nothing_is_too_strange(body: Vec<u8>, clear in prop::collection::vec(any::<u8>(), CLEAR_BYTES), payload: Vec<u8>) {
            let _ = Commit::decode(&body);
            let mut clear = clear;
            clear[..8].fill(0);
            clear[72..80].copy_from_slice(&[104, 0, 0, 0, 0, 0, 0, 0]);
            let _ = Commit::decode(&[clear, payload_body([0; 3], &payload).unwrap()].concat());
            let _ = decode_tail(&body);
        }
    }

    #[test]
    fn a_payload_has_one_number_of_a_keyring_and_none_is_0() {
        let commit = Commit {
            number: CommitNumber::FIRST,
            keyring: Some(3),
            ..Commit::default()
        };
        let body = commit.encode().unwrap();
        let (_, plain) = payload_of(&body[CLEAR_BYTES..], COMMIT_PAYLOAD_BYTES_MAX).unwrap();
        assert_eq!(plain.last(), Some(&3));
        let with = |plain: &[u8]| [&body[..CLEAR_BYTES], &payload_body([0; 3], plain).unwrap()].concat();
        assert_eq!(Commit::decode(&with(&plain)), Ok(commit));
        let mut twice = plain.clone();
        put_entry(&mut twice, TAG_KEYRING, |entry| put_varint(entry, 3));
        assert!(matches!(Commit::decode(&with(&twice)), Err(Malformed::Damaged(_))));
        let mut none = plain;
        *none.last_mut().unwrap() = 0;
        assert!(matches!(Commit::decode(&with(&none)), Err(Malformed::Damaged(_))));
    }

    #[test]
    fn what_is_not_known_is_skipped_or_refused() {
        let commit = Commit {
            number: CommitNumber::FIRST,
            ..Commit::default()
        };
        let body = commit.encode().unwrap();
        let mut longer = body.clone();
        longer[72] = 114;
        longer.splice(CLEAR_BYTES..CLEAR_BYTES, [7; 10]);
        assert_eq!(Commit::decode(&longer), Ok(commit));
        let mut features = body.clone();
        features[0] = 2;
        assert!(matches!(Commit::decode(&features), Err(Malformed::Unsupported(_))));
        // It says that it is sealed, and has no keyring.
        features[0] = 1;
        assert!(matches!(Commit::decode(&features), Err(Malformed::Damaged(_))));
        let mut append = body.clone();
        append[8] = 1;
        assert!(Commit::decode(&append).is_ok());
        let mut early = body;
        early[72] = 103;
        assert!(Commit::decode(&early).is_err());
    }

    #[test]
    fn a_tail_comes_back() {
        let location = CommitLocation {
            offset: 5,
            length: 6,
            body_hash: [7; 32],
        };
        let body = encode_tail(&location);
        assert_eq!(decode_tail(&body), Ok(location));
        assert!(decode_tail(&body[1..]).is_err());
    }
}
