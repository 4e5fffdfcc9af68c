//! Records: the header that each part of an archive begins with.

use crate::codec::{Decoded, Decoder};

/// What a record begins with.
pub const MAGIC: [u8; 8] = *b"\x89vmfold\n";
/// Bytes of a header.
pub const HEADER_BYTES: usize = 96;
/// The version of this format, in every header.
const VERSION: u8 = 1;
const FLAG_CRITICAL: u16 = 1;
const FLAG_ENCRYPTED: u16 = 2;
/// Numbers of records are below: what is counted on from one of them never overflows.
pub const SEQUENCES: u64 = 1 << 63;
/// Bytes of the header that its own hash covers.
const HASHED_BYTES: usize = 88;

/// BLAKE3, whole.
pub type Hash = [u8; 32];

/// BLAKE3 of some bytes.
pub fn hash_of(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKind {
    /// What a reader must know.
    Head,
    /// Manifests and what follows.
    Plan,
    /// Frames.
    Pack,
    /// Hashes of blocks.
    Index,
    /// What belongs together.
    Commit,
    /// Where the last commit is.
    Tail,
    /// A kind that this version does not know and may skip.
    Other(u8),
}

impl RecordKind {
    /// Every kind that this version writes.
    pub const ALL: [Self; 6] = [
        Self::Head,
        Self::Plan,
        Self::Pack,
        Self::Index,
        Self::Commit,
        Self::Tail,
    ];

    /// Its number in the format.
    pub fn number(self) -> u8 {
        match self {
            Self::Head => 1,
            Self::Plan => 2,
            Self::Pack => 3,
            Self::Index => 4,
            Self::Commit => 5,
            Self::Tail => 6,
            Self::Other(number) => number,
        }
    }

    pub(super) fn of(number: u8) -> Self {
        Self::ALL
            .into_iter()
            .find(|kind| kind.number() == number)
            .unwrap_or(Self::Other(number))
    }

    /// Its name in the format.
    pub fn name(self) -> &'static str {
        match self {
            Self::Head => "HEAD",
            Self::Plan => "PLAN",
            Self::Pack => "PACK",
            Self::Index => "INDEX",
            Self::Commit => "COMMIT",
            Self::Tail => "TAIL",
            Self::Other(_) => "unknown",
        }
    }

    /// Bytes of its body at most.
    pub fn body_bytes_max(self) -> u64 {
        match self {
            Self::Head => 64 << 10,
            Self::Plan => 5 << 20,
            Self::Pack => 32 << 20,
            Self::Index => 16 << 20,
            Self::Commit => 17 << 20,
            Self::Tail => 96,
            // A reader holds one record in memory, whatever it is.
            Self::Other(_) => 64 << 20,
        }
    }

    fn is_critical(self) -> bool {
        matches!(self, Self::Head | Self::Plan | Self::Pack | Self::Commit)
    }
}

/// A record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What the record holds.
    pub kind: RecordKind,
    /// The archive it belongs to.
    pub archive: [u8; 16],
    /// The export that wrote it.
    pub epoch: u64,
    /// Its number in the archive.
    pub sequence: u64,
    /// Bytes of its body.
    pub body_bytes: u64,
    /// BLAKE3 of its body.
    pub body_hash: Hash,
}

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadHeader {
    /// It is none, or is damaged.
    Damaged(&'static str),
    /// It is whole, and this version must not go on.
    Unsupported(&'static str),
}

impl RecordHeader {
    /// The header of a record with this body.
    pub fn of(kind: RecordKind, archive: [u8; 16], epoch: u64, sequence: u64, body: &[u8]) -> Self {
        Self {
            kind,
            archive,
            epoch,
            sequence,
            body_bytes: body.len() as u64,
            body_hash: hash_of(body),
        }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        out.extend(MAGIC);
        out.extend([self.kind.number(), VERSION]);
        let flags = if self.kind.is_critical() { FLAG_CRITICAL } else { 0 };
        out.extend(flags.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.archive);
        out.extend(self.epoch.to_le_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.body_bytes.to_le_bytes());
        out.extend(self.body_hash);
        let hash = hash_of(&out);
        let mut header = [0; HEADER_BYTES];
        header[..HASHED_BYTES].copy_from_slice(&out);
        header[HASHED_BYTES..].copy_from_slice(&hash[..HEADER_BYTES - HASHED_BYTES]);
        header
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Where it is damaged, or of a version or kind that must not be skipped.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, BadHeader> {
        let (hashed, hash) = bytes.split_at(HASHED_BYTES);
        if !bytes.starts_with(&MAGIC) {
            return Err(BadHeader::Damaged("there is no record header"));
        }
        if hash_of(hashed)[..hash.len()] != *hash {
            return Err(BadHeader::Damaged("a record header does not match its hash"));
        }
        let fields = || -> Decoded<(Self, u8, u16)> {
            let mut decoder = Decoder::new(&hashed[MAGIC.len()..]);
            let (kind, version, flags) = (RecordKind::of(decoder.u8()?), decoder.u8()?, decoder.u16()?);
            decoder.take(4)?;
            let header = Self {
                kind,
                archive: decoder.array()?,
                epoch: decoder.u64()?,
                sequence: decoder.u64()?,
                body_bytes: decoder.u64()?,
                body_hash: decoder.array()?,
            };
            Ok((header, version, flags))
        };
        let (header, version, flags) = fields().map_err(BadHeader::Damaged)?;
        if version != VERSION {
            return Err(BadHeader::Unsupported("it has another version of the format"));
        }
        if flags & FLAG_ENCRYPTED != 0 {
            return Err(BadHeader::Unsupported(
                "it is encrypted, which this version cannot read",
            ));
        }
        let is_known = !matches!(header.kind, RecordKind::Other(_));
        if !is_known && flags & FLAG_CRITICAL != 0 {
            return Err(BadHeader::Unsupported(
                "it has records of a kind that this version does not know",
            ));
        }
        if header.body_bytes > header.kind.body_bytes_max() {
            return Err(BadHeader::Damaged("a record is longer than allowed"));
        }
        if header.sequence >= SEQUENCES {
            return Err(BadHeader::Damaged("a record has a number larger than allowed"));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_and_no_bit_may_flip() {
        for kind in RecordKind::ALL {
            let header = RecordHeader::of(kind, [7; 16], 3, 4, b"body");
            let bytes = header.encode();
            assert_eq!(RecordHeader::decode(&bytes), Ok(header));
            for bit in 0..bytes.len() * 8 {
                let mut bad = bytes;
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(matches!(RecordHeader::decode(&bad), Err(BadHeader::Damaged(_))));
            }
        }
    }

    #[test]
    fn unknown_kinds_are_skipped_or_refused() {
        let seal = |mut bytes: [u8; HEADER_BYTES]| {
            let hash = hash_of(&bytes[..HASHED_BYTES]);
            bytes[HASHED_BYTES..].copy_from_slice(&hash[..8]);
            bytes
        };
        let mut bytes = RecordHeader::of(RecordKind::Other(9), [0; 16], 0, 0, b"").encode();
        assert!(RecordHeader::decode(&bytes).is_ok());
        bytes[10] = 1;
        assert!(matches!(
            RecordHeader::decode(&seal(bytes)),
            Err(BadHeader::Unsupported(_))
        ));
        bytes[10] = 2;
        assert!(matches!(
            RecordHeader::decode(&seal(bytes)),
            Err(BadHeader::Unsupported(_))
        ));
        for (kind, longer) in [
            (RecordKind::Tail, 97),
            (RecordKind::Other(9), (64 << 20) + 1),
            (RecordKind::Other(9), u64::MAX),
        ] {
            let mut long = RecordHeader::of(kind, [0; 16], 0, 0, b"");
            long.body_bytes = longer;
            assert!(matches!(
                RecordHeader::decode(&long.encode()),
                Err(BadHeader::Damaged(_))
            ));
        }
        let last = RecordHeader::of(RecordKind::Tail, [0; 16], 0, u64::MAX, b"");
        assert!(matches!(
            RecordHeader::decode(&last.encode()),
            Err(BadHeader::Damaged(_))
        ));
    }
}
