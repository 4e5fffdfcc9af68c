//! Records: the header that each part of an archive begins with, and the mask of its body.

use std::sync::Arc;

use super::seal::{KeySlot, Seal, SecretKey};
use crate::block::ByteRange;
use crate::codec::{Decoded, Decoder, Malformed};

/// The bytes that a record begins with.
pub const MAGIC: [u8; 8] = *b"\x89vmfold\n";
/// Bytes of a header.
pub const HEADER_BYTES: usize = 96;
/// The version of this format, in every header.
const VERSION: u8 = 1;
const FLAG_CRITICAL: u16 = 1;
const FLAG_SEALED: u16 = 2;
/// Numbers of records are below this: counting on from one of them never overflows.
pub const SEQUENCES: u64 = 1 << 63;
/// Bytes of the header that its own hash covers.
const HASHED_BYTES: usize = 88;
/// The part of a header that a mask depends on.
const MASK_SEED: std::ops::Range<usize> = 14..48;

/// A BLAKE3 hash of 32 bytes.
pub type Hash = [u8; 32];

/// Returns BLAKE3 of some bytes.
pub fn hash_of(bytes: &[u8]) -> Hash {
    *blake3::hash(bytes).as_bytes()
}

/// Hashes blocks: with the key of a sealed archive, so that nobody else can tell which blocks it has.
#[derive(Clone, Default)]
pub struct BlockHasher {
    key: Option<Arc<SecretKey>>,
}

impl std::fmt::Debug for BlockHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockHasher").finish_non_exhaustive()
    }
}

impl BlockHasher {
    /// Makes one with a key.
    pub fn keyed(key: SecretKey) -> Self {
        Self {
            key: Some(Arc::new(key)),
        }
    }

    /// Returns the hash of a block.
    pub fn of(&self, block: &[u8]) -> Hash {
        match &self.key {
            Some(key) => *blake3::keyed_hash(key, block).as_bytes(),
            None => hash_of(block),
        }
    }
}

/// The identity of a lane: the commits of one writer, each of which follows the one before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub [u8; 16]);

impl std::fmt::Display for LaneId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The identity of an epoch: the records that one export writes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EpochId(pub u64);

/// What a record holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RecordKind {
    /// What a reader must know.
    Head,
    /// Images and their runs, and blocks that follow.
    Plan,
    /// Frames.
    Pack,
    /// Hashes of blocks.
    Index,
    /// What belongs together.
    Commit,
    /// Where the last COMMIT is.
    Tail,
    /// The keys of a sealed archive, which only those open that it is for.
    Key,
    /// What lost bytes of the archive are computed from.
    Parity,
    /// Anything, which a reader skips.
    Note,
    /// What a COMMIT lists.
    List,
    /// A kind that this version does not know, or that is reserved.
    Other(u8),
}

/// A row of the format's table of kinds.
struct KindRow {
    kind: RecordKind,
    number: u8,
    name: &'static str,
    is_critical: bool,
    body_bytes_max: u64,
}

const KINDS: [KindRow; 11] = {
    const fn row(kind: RecordKind, number: u8, name: &'static str, is_critical: bool, body_bytes_max: u64) -> KindRow {
        KindRow {
            kind,
            number,
            name,
            is_critical,
            body_bytes_max,
        }
    }
    [
        row(RecordKind::Head, 1, "HEAD", true, 4 << 10),
        row(RecordKind::Plan, 2, "PLAN", true, 5 << 20),
        row(RecordKind::Pack, 3, "PACK", true, 33 << 20),
        row(RecordKind::Index, 4, "INDEX", false, 9 << 20),
        row(RecordKind::Commit, 5, "COMMIT", true, 128 << 10),
        row(RecordKind::Tail, 6, "TAIL", false, 96),
        row(RecordKind::Parity, 7, "PARITY", false, 33 << 20),
        row(RecordKind::Key, 8, "KEY", true, 64 << 10),
        row(RecordKind::Note, 9, "NOTE", false, 64 << 10),
        row(RecordKind::List, 10, "LIST", true, 5 << 20),
        row(RecordKind::Other(11), 11, "SIGNATURE", false, 4 << 10),
    ]
};
/// Bytes of the body of a kind that this version does not know. A reader holds one record in memory, whatever it is.
const OTHER_BYTES_MAX: u64 = 33 << 20;

impl RecordKind {
    /// Every kind that this version writes.
    pub const ALL: [Self; 10] = [
        Self::Head,
        Self::Plan,
        Self::Pack,
        Self::Index,
        Self::Commit,
        Self::Tail,
        Self::Key,
        Self::Parity,
        Self::Note,
        Self::List,
    ];

    fn row(self) -> Option<&'static KindRow> {
        KINDS.iter().find(|row| row.kind == self)
    }

    /// Returns its number in the format.
    pub fn number(self) -> u8 {
        match self {
            Self::Other(number) => number,
            known => known.row().map_or(0, |row| row.number),
        }
    }

    /// Returns the kind with a number.
    pub fn of(number: u8) -> Self {
        KINDS
            .iter()
            .find(|row| row.number == number)
            .map_or(Self::Other(number), |row| row.kind)
    }

    /// Returns its name in the format.
    pub fn name(self) -> &'static str {
        self.row().map_or("unknown", |row| row.name)
    }

    /// Returns how many bytes its body has at most.
    pub fn body_bytes_max(self) -> u64 {
        self.row().map_or(OTHER_BYTES_MAX, |row| row.body_bytes_max)
    }

    /// Returns whether a record of it has addresses of a lane's store.
    pub fn has_addresses(self) -> bool {
        matches!(self, Self::Pack | Self::Index)
    }

    /// Returns whether a reader that does not know it must refuse.
    pub fn is_critical(self) -> bool {
        self.row().is_some_and(|row| row.is_critical)
    }
}

/// A record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What the record holds.
    pub kind: RecordKind,
    /// How its body is sealed; none if it is clear.
    pub seal: Option<Seal>,
    /// The number of the body's mask; 0 if it has none.
    pub mask: u16,
    /// The lane it belongs to.
    pub lane: LaneId,
    /// The export that wrote it.
    pub epoch: EpochId,
    /// Its number in the lane.
    pub sequence: u64,
    /// Bytes of its body.
    pub body_bytes: u64,
    /// BLAKE3 of its body without the mask. So a copy under another number stays the same record.
    pub body_hash: Hash,
}

impl RecordHeader {
    /// Makes the header of a record, and masks its body if that holds the magic.
    ///
    /// # Errors
    /// Fails if no mask hides the magic, which does not happen by chance.
    pub fn of_body(kind: RecordKind, lane: LaneId, epoch: EpochId, sequence: u64, body: &mut [u8]) -> Decoded<Self> {
        Self::of_stored((kind, None), lane, epoch, sequence, body)
    }

    /// Makes the header of a record whose body may be sealed, as [`RecordHeader::of_body`] does.
    ///
    /// # Errors
    /// Those of [`RecordHeader::of_body`].
    pub fn of_stored(
        (kind, seal): (RecordKind, Option<Seal>),
        lane: LaneId,
        epoch: EpochId,
        sequence: u64,
        body: &mut [u8],
    ) -> Decoded<Self> {
        let header = Self {
            kind,
            seal,
            mask: 0,
            lane,
            epoch,
            sequence,
            body_bytes: body.len() as u64,
            body_hash: hash_of(body),
        };
        header.masked(body)
    }

    /// Masks a body that has no mask yet, if it holds the magic.
    fn masked(mut self, body: &mut [u8]) -> Decoded<Self> {
        while find_magic(body).is_some() {
            self.apply_mask(0, body);
            self.mask = self.mask.checked_add(1).ok_or("no mask hides the magic in a record")?;
            self.apply_mask(0, body);
        }
        Ok(self)
    }

    /// Makes the header of a copy of the record under another number, and the copy's body out of the one without its mask.
    ///
    /// # Errors
    /// Those of [`RecordHeader::of_body`].
    pub fn copied(&self, sequence: u64, body: &mut [u8]) -> Decoded<Self> {
        let unmasked = Self {
            mask: 0,
            sequence,
            ..*self
        };
        unmasked.masked(body)
    }

    /// Masks a part of the body that begins `from` bytes behind the header, or takes its mask off.
    pub fn apply_mask(&self, from: u64, part: &mut [u8]) {
        if self.mask == 0 {
            return;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.encode()[MASK_SEED]);
        let mut stream = hasher.finalize_xof();
        stream.set_position(from);
        let mut mask = [0; 4096];
        for piece in part.chunks_mut(mask.len()) {
            let mask = &mut mask[..piece.len()];
            stream.fill(mask);
            piece.iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= *mask);
        }
    }

    /// Returns its bytes.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut encoded = Vec::with_capacity(HEADER_BYTES);
        encoded.extend(MAGIC);
        encoded.extend([self.kind.number(), VERSION]);
        let critical = if self.kind.is_critical() { FLAG_CRITICAL } else { 0 };
        let sealed = if self.seal.is_some() { FLAG_SEALED } else { 0 };
        encoded.extend((critical | sealed).to_le_bytes());
        encoded.extend(
            self.seal
                .map_or([0; 2], |seal| [seal.suite.number(), seal.slot.number()]),
        );
        encoded.extend(self.mask.to_le_bytes());
        encoded.extend(self.lane.0);
        encoded.extend(self.epoch.0.to_le_bytes());
        encoded.extend(self.sequence.to_le_bytes());
        encoded.extend(self.body_bytes.to_le_bytes());
        encoded.extend(self.body_hash);
        let hash = hash_of(&encoded);
        let mut header = [0; HEADER_BYTES];
        header[..HASHED_BYTES].copy_from_slice(&encoded);
        header[HASHED_BYTES..].copy_from_slice(&hash[..HEADER_BYTES - HASHED_BYTES]);
        header
    }

    /// Decodes the header of a record that is used.
    ///
    /// # Errors
    /// Returns what is damaged, or what this version does not know and must not skip.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Decoded<Self> {
        match Self::decode_any(bytes)? {
            DecodedHeader::Known(header) => Ok(header),
            DecodedHeader::Unsupported(record) => Err(Malformed::Unsupported(record.problem)),
        }
    }

    /// Decodes a header of which it is not known whether the record is needed.
    ///
    /// # Errors
    /// Returns what is damaged.
    pub fn decode_any(bytes: &[u8; HEADER_BYTES]) -> Decoded<DecodedHeader> {
        let (hashed, hash) = bytes.split_at(HASHED_BYTES);
        if !bytes.starts_with(&MAGIC) {
            return Err("there is no record header".into());
        }
        if hash_of(hashed)[..hash.len()] != *hash {
            return Err("a record header does not match its hash".into());
        }
        let mut decoder = Decoder::new(&hashed[MAGIC.len()..]);
        let (kind, version, flags) = (RecordKind::of(decoder.u8()?), decoder.u8()?, decoder.u16()?);
        let sealed_with: [u8; 2] = decoder.array()?;
        let header = Self {
            kind,
            seal: KeySlot::in_header(kind, sealed_with[1])
                .filter(|_| flags & FLAG_SEALED != 0)
                .map(Seal::with),
            mask: decoder.u16()?,
            lane: LaneId(decoder.array()?),
            epoch: EpochId(decoder.u64()?),
            sequence: decoder.u64()?,
            body_bytes: decoder.u64()?,
            body_hash: decoder.array()?,
        };
        if let Some(problem) = header.unsupported(version, flags, sealed_with) {
            return Ok(DecodedHeader::Unsupported(UnsupportedRecord { header, problem }));
        }
        if (flags & FLAG_SEALED != 0) != header.seal.is_some() {
            return Err("a record is sealed whose kind never is".into());
        }
        if sealed_with
            != header
                .seal
                .map_or([0; 2], |seal| [seal.suite.number(), seal.slot.number()])
        {
            return Err("a record header has another key or cipher than its kind".into());
        }
        if kind.row().is_some() && (flags & FLAG_CRITICAL != 0) != kind.is_critical() {
            return Err("a record has a flag that its kind does not have".into());
        }
        if header.body_bytes > kind.body_bytes_max() {
            return Err("a record is longer than allowed".into());
        }
        if header.sequence >= SEQUENCES {
            return Err("a record has a number larger than allowed".into());
        }
        Ok(DecodedHeader::Known(header))
    }

    /// Whether nothing is known of how records of its kind are sealed.
    fn has_unknown_seal(&self) -> bool {
        self.seal.is_none() && matches!(self.kind, RecordKind::Other(_))
    }

    /// Returns why a record must not be used.
    fn unsupported(&self, version: u8, flags: u16, sealed_with: [u8; 2]) -> Option<&'static str> {
        /// A cipher that the format knows and this version does not.
        const CHACHA20_POLY1305: u8 = 2;
        let is_sealed = flags & FLAG_SEALED != 0;
        if version != VERSION {
            Some("it has another version of the format")
        } else if is_sealed && (self.has_unknown_seal() || sealed_with[0] == CHACHA20_POLY1305) {
            Some("it is sealed in a way that this version cannot read")
        } else if flags & !(FLAG_CRITICAL | FLAG_SEALED) != 0 {
            Some("it has records with flags that this version does not know")
        } else if matches!(self.kind, RecordKind::Other(_)) && flags & FLAG_CRITICAL != 0 {
            Some("it has records of a kind that this version does not know")
        } else {
            None
        }
    }
}

/// A record that something leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SoughtRecord {
    /// What it holds.
    pub kind: RecordKind,
    /// Where it should begin, in bytes from the beginning of the file. A hint.
    pub offset: u64,
    /// Bytes, header included. One that is longer could be read more often than the file's length allows.
    pub length: u64,
    /// BLAKE3 of its body, which is its identity.
    pub body_hash: Hash,
}

impl SoughtRecord {
    /// Returns where it should be.
    pub fn range(&self) -> ByteRange {
        ByteRange {
            start: self.offset,
            length: self.length,
        }
    }

    /// Returns whether a header is that of the record.
    pub fn is(&self, header: &RecordHeader) -> bool {
        header.kind == self.kind
            && header.body_hash == self.body_hash
            && header.body_bytes.checked_add(HEADER_BYTES as u64) == Some(self.length)
    }
}

/// A header whose own hash is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodedHeader {
    /// It is one that this version knows.
    Known(RecordHeader),
    /// Its record must be refused where it is needed.
    Unsupported(UnsupportedRecord),
}

/// A record that this version does not know and must not use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnsupportedRecord {
    /// Its header. Nothing in it has been checked, and in another version the fields may mean something else.
    pub header: RecordHeader,
    /// Why it must not be used.
    pub problem: &'static str,
}

/// Returns where the magic begins first.
pub fn find_magic(bytes: &[u8]) -> Option<usize> {
    memchr::memmem::find(bytes, &MAGIC)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(kind: RecordKind, sequence: u64, body: &[u8]) -> RecordHeader {
        RecordHeader::of_body(kind, LaneId([7; 16]), EpochId(3), sequence, &mut body.to_vec()).unwrap()
    }

    fn with_right_hash(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let hash = hash_of(&bytes[..HASHED_BYTES]);
        bytes[HASHED_BYTES..].copy_from_slice(&hash[..8]);
        bytes
    }

    #[test]
    fn headers_come_back_and_no_bit_may_flip() {
        for kind in RecordKind::ALL {
            let header = header(kind, 4, b"body");
            let bytes = header.encode();
            assert_eq!(RecordHeader::decode(&bytes), Ok(header));
            assert_eq!(RecordKind::of(kind.number()), kind);
            for bit in 0..bytes.len() * 8 {
                let mut bad = bytes;
                bad[bit / 8] ^= 1 << (bit % 8);
                assert!(matches!(RecordHeader::decode(&bad), Err(Malformed::Damaged(_))));
            }
        }
    }

    #[test]
    fn unknown_kinds_are_skipped_or_refused() {
        let bytes = header(RecordKind::Other(30), 0, b"").encode();
        assert!(RecordHeader::decode(&bytes).is_ok());
        for (at, bit, unsupported) in [
            (10, 1, true),
            (10, 2, true),
            (11, 1, true),
            (9, 2, true),
            (12, 1, false),
        ] {
            let mut other = bytes;
            other[at] ^= bit;
            let error = RecordHeader::decode(&with_right_hash(other)).unwrap_err();
            assert_eq!(
                matches!(error, Malformed::Unsupported(_)),
                unsupported,
                "{at}: {error:?}"
            );
        }
    }

    #[test]
    fn numbers_in_headers_have_limits() {
        for (kind, longer) in [
            (RecordKind::Tail, 97),
            (RecordKind::Other(30), OTHER_BYTES_MAX + 1),
            (RecordKind::Other(30), u64::MAX),
        ] {
            let mut long = header(kind, 0, b"");
            long.body_bytes = longer;
            assert!(matches!(
                RecordHeader::decode(&long.encode()),
                Err(Malformed::Damaged(_))
            ));
        }
        let last = header(RecordKind::Tail, u64::MAX, b"");
        assert!(matches!(
            RecordHeader::decode(&last.encode()),
            Err(Malformed::Damaged(_))
        ));
    }

    #[test]
    fn no_body_holds_the_magic() {
        let inner = header(RecordKind::Head, 0, b"").encode();
        let plain = [&[1; 5000][..], &inner, &[2; 100]].concat();
        let mut stored = plain.clone();
        let header = RecordHeader::of_body(RecordKind::Pack, LaneId([7; 16]), EpochId(3), 9, &mut stored).unwrap();
        assert_eq!((header.mask, find_magic(&stored)), (1, None));
        assert_eq!(header.body_hash, hash_of(&plain));
        for range in [0..plain.len(), 10..20, 4090..4100, 4999..5150] {
            let mut part = stored[range.clone()].to_vec();
            header.apply_mask(range.start as u64, &mut part);
            assert_eq!(part, plain[range]);
        }
        assert_eq!(find_magic(&plain), Some(5000));
        assert_eq!(find_magic(&plain[..5007]), None);
    }
}
