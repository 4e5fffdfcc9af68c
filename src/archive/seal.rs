//! Seals of record bodies, as `formats/encryption-v1.md` specifies them: encryption that also proves that nothing was changed, and that the
//! record belongs to its epoch. Hashes of records are of sealed bodies: so whoever has no key can verify and repair them.

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, Key, KeyInit, Nonce, Tag};
use zeroize::Zeroizing;

use super::manifest::PlanPart;
use super::pack;
use super::record::{EpochId, Hash, LaneId, RecordHeader, RecordKind, hash_of};
use crate::codec::{Decoded, Decoder};

/// A key of 32 bytes, which is overwritten when it is dropped.
pub type SecretKey = Zeroizing<[u8; 32]>;

/// Bytes of a salt, with which the body of a sealed record begins.
pub const SALT_BYTES: usize = 16;
/// Bytes that a segment is longer than its plain bytes.
pub const TAG_BYTES: usize = 16;
/// Bytes of a COMMIT's clear part of which the length of that part is read.
pub(super) const CLEAR_LENGTH: std::ops::Range<usize> = 72..76;
/// The signature in the clear part of a COMMIT. Its seal is made before it, as if this were zeros.
pub(super) const SIGNATURE: std::ops::Range<usize> = 116..180;
/// Where the body of a PLAN has its part.
const PART_AT: usize = 1;
/// What record keys are derived for.
const RECORD_CONTEXT: &str = "vmfold 2026 record v1";
/// What to say of a body that its key does not open.
const WRONG_SEAL: &str = "a sealed record does not open with its key: it was changed, or is of another epoch";

/// The cipher of a sealed record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Suite {
    /// AES-256-GCM.
    Aes256Gcm,
}

impl Suite {
    /// Returns its number in the format.
    pub fn number(self) -> u8 {
        match self {
            Self::Aes256Gcm => 1,
        }
    }
}

/// Which key of an epoch a record is sealed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KeySlot {
    /// The key of the blocks' content.
    Data,
    /// The key of what is known of images: names, sizes, runs.
    Metadata,
    /// The key of hashes, which the archive has for all of its epochs.
    Index,
}

impl KeySlot {
    /// Returns its number in the format.
    pub fn number(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Metadata => 2,
            Self::Index => 3,
        }
    }

    /// Returns the slot that records of a kind are sealed with; none if they stay clear. A PLAN that announces blocks has [`KeySlot::Index`].
    pub fn of(kind: RecordKind) -> Option<Self> {
        match kind {
            RecordKind::Pack => Some(Self::Data),
            RecordKind::Plan | RecordKind::List | RecordKind::Commit => Some(Self::Metadata),
            RecordKind::Index => Some(Self::Index),
            _ => None,
        }
    }

    /// Returns the slot of a record as its header has it: the one of its kind, unless that may have the other.
    pub(super) fn in_header(kind: RecordKind, number: u8) -> Option<Self> {
        let announces = kind == RecordKind::Plan && number == Self::Index.number();
        if announces { Some(Self::Index) } else { Self::of(kind) }
    }
}

/// The seal of a record, as its header tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Seal {
    /// The cipher.
    pub suite: Suite,
    /// The key.
    pub slot: KeySlot,
}

impl Seal {
    /// Returns the seal that this version makes with the key of a slot.
    pub fn with(slot: KeySlot) -> Self {
        Self {
            suite: Suite::Aes256Gcm,
            slot,
        }
    }
}

/// The keys that records of an epoch are sealed with.
#[derive(Clone)]
pub struct EpochKeys {
    /// That of [`KeySlot::Data`].
    pub data: SecretKey,
    /// That of [`KeySlot::Metadata`].
    pub metadata: SecretKey,
    /// That of [`KeySlot::Index`].
    pub index: SecretKey,
}

impl std::fmt::Debug for EpochKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EpochKeys").finish_non_exhaustive()
    }
}

impl EpochKeys {
    fn of(&self, slot: KeySlot) -> &SecretKey {
        match slot {
            KeySlot::Data => &self.data,
            KeySlot::Metadata => &self.metadata,
            KeySlot::Index => &self.index,
        }
    }
}

/// What a seal is bound to beside its key: a record of another kind, lane or epoch does not open. The sequence number is not part of it, since
/// a record may stand in an archive more than once.
#[derive(Debug, Clone, Copy)]
pub struct SealedPlace {
    bytes: [u8; 30],
}

impl SealedPlace {
    /// Returns its bytes, as a seal proves them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns that of a record.
    pub fn of(header: &RecordHeader) -> Self {
        const FIRST: std::ops::Range<usize> = 8..14;
        const SECOND: std::ops::Range<usize> = 16..40;
        let encoded = header.encode();
        let mut bytes = [0; 30];
        bytes[..FIRST.len()].copy_from_slice(&encoded[FIRST]);
        bytes[FIRST.len()..].copy_from_slice(&encoded[SECOND]);
        Self { bytes }
    }

    /// Returns that of a record which has no header yet.
    pub fn of_new(kind: RecordKind, seal: Seal, lane: LaneId, epoch: EpochId) -> Self {
        Self::of(&RecordHeader {
            kind,
            seal: Some(seal),
            mask: 0,
            lane,
            epoch,
            sequence: 0,
            body_bytes: 0,
            body_hash: [0; 32],
        })
    }
}

/// Seals and opens the segments of a record with one of its keys.
struct RecordCipher {
    cipher: Aes256Gcm,
    place: SealedPlace,
}

impl RecordCipher {
    fn new(key: &SecretKey, salt: &[u8; SALT_BYTES], place: SealedPlace) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(RECORD_CONTEXT);
        hasher.update(&**key);
        hasher.update(salt);
        let derived = SecretKey::new(*hasher.finalize().as_bytes());
        let cipher = Aes256Gcm::new(&Key::<Aes256Gcm>::from(*derived));
        Self { cipher, place }
    }

    fn nonce(segment: Segment) -> Nonce<aes_gcm::aead::consts::U12> {
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&segment.number.to_le_bytes());
        nonce[11] = u8::from(segment.is_last);
        nonce.into()
    }

    /// Seals a segment in its place, and returns its tag. `clear` is what stands in the record beside it, which it proves too.
    fn seal(&self, segment: Segment, clear: &[u8], plain: &mut [u8]) -> Decoded<[u8; TAG_BYTES]> {
        let known = [&self.place.bytes[..], clear].concat();
        let sealed = self
            .cipher
            .encrypt_inout_detached(&Self::nonce(segment), &known, plain.into());
        Ok(sealed.map_err(|_| "a record is too long to be sealed")?.into())
    }

    /// Opens a segment in its place.
    fn open(&self, segment: Segment, clear: &[u8], sealed: &mut [u8], tag: &[u8]) -> Decoded<()> {
        let known = [&self.place.bytes[..], clear].concat();
        let tag: [u8; TAG_BYTES] = tag.try_into().map_err(|_| WRONG_SEAL)?;
        let opened = self
            .cipher
            .decrypt_inout_detached(&Self::nonce(segment), &known, sealed.into(), &Tag::from(tag));
        Ok(opened.map_err(|_| WRONG_SEAL)?)
    }

    /// Opens a segment with its tag behind it. Returns its plain bytes.
    fn open_whole(&self, segment: Segment, clear: &[u8], mut sealed: Vec<u8>) -> Decoded<Vec<u8>> {
        let end = sealed
            .len()
            .checked_sub(TAG_BYTES)
            .ok_or("a sealed record ends too early")?;
        let (body, tag) = sealed.split_at_mut(end);
        self.open(segment, clear, body, tag)?;
        sealed.truncate(end);
        Ok(sealed)
    }
}

/// Which segment of a record: each is sealed under a nonce of its own.
#[derive(Debug, Clone, Copy)]
struct Segment {
    number: u64,
    is_last: bool,
}

impl Segment {
    const ONLY: Self = Self {
        number: 0,
        is_last: true,
    };

    fn inner(number: u64) -> Self {
        Self { number, is_last: false }
    }

    fn last(number: u64) -> Self {
        Self { number, is_last: true }
    }
}

/// The segments of a PACK: what its table begins with, the lines of the table, each frame, and the padding.
const PACK_FIXED: u64 = 0;
const PACK_LINES: u64 = 1;
const PACK_FRAMES: u64 = 2;
/// Where the lines of a sealed PACK's table begin in its body.
const PACK_LINES_AT: usize = SALT_BYTES + pack::FIXED_BYTES + TAG_BYTES;

/// Bytes of the body of a PACK in a sealed archive that has as many frames as fit. All of one length tell nothing of what is in them.
pub const PACK_BYTES: usize = 32 << 20;

/// Makes the salts of an epoch's records. Each depends on what is sealed: where a machine is set back to a snapshot, and the same random bytes
/// come again, one key never seals two contents.
pub struct Salts {
    seed: SecretKey,
    count: u64,
}

impl std::fmt::Debug for Salts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Salts")
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

impl Salts {
    /// Begins with a random seed.
    pub fn new(seed: SecretKey) -> Self {
        Self { seed, count: 0 }
    }

    /// Returns the next one, for a body with this hash.
    fn next(&mut self, plain: &Hash) -> [u8; SALT_BYTES] {
        let mut hasher = blake3::Hasher::new_keyed(&self.seed);
        hasher.update(&self.count.to_le_bytes());
        hasher.update(plain);
        self.count += 1;
        let mut salt = [0; SALT_BYTES];
        hasher.finalize_xof().fill(&mut salt);
        salt
    }
}

/// Returns a length that tells little of another one, which is no longer: of its bits only those are kept that Padmé keeps, so that at most 12 %
/// are added, and to long ones much less (Nikitin et al., "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs", 2019).
pub fn padme(length: usize) -> usize {
    if length < 2 {
        return length;
    }
    let exponent = length.ilog2();
    let kept = exponent.ilog2() + 1;
    let mask = (1usize << exponent.saturating_sub(kept)) - 1;
    length.saturating_add(mask) & !mask
}

/// Seals the body of a PLAN, LIST or INDEX.
///
/// # Errors
/// Says that it is too long.
pub fn seal_body(keys: &EpochKeys, seal: Seal, place: SealedPlace, salts: &mut Salts, body: &[u8]) -> Decoded<Vec<u8>> {
    seal_behind(keys, seal, place, salts, &[], body)
}

/// Seals a COMMIT behind its clear part, which the seal proves.
///
/// # Errors
/// Says that it is too long.
pub fn seal_behind(
    keys: &EpochKeys,
    seal: Seal,
    place: SealedPlace,
    salts: &mut Salts,
    clear: &[u8],
    body: &[u8],
) -> Decoded<Vec<u8>> {
    let length = u32::try_from(body.len()).map_err(|_| "a record is too long to be sealed")?;
    let plain_bytes = padme(size_of::<u32>() + body.len());
    let salt = salts.next(&hash_of(body));
    let mut out = Vec::with_capacity(clear.len() + SALT_BYTES + plain_bytes + TAG_BYTES);
    out.extend(clear);
    out.extend(salt);
    let start = out.len();
    out.extend(length.to_le_bytes());
    out.extend(body);
    out.resize(start + plain_bytes, 0);
    let cipher = RecordCipher::new(keys.of(seal.slot), &salt, place);
    let tag = cipher.seal(Segment::ONLY, clear, &mut out[start..])?;
    out.extend(tag);
    Ok(out)
}

/// Returns how many bytes a sealed PACK takes whose frames have `stored_bytes` in all, without padding.
pub fn pack_bytes(frames: usize, stored_bytes: usize) -> usize {
    PACK_LINES_AT + frames * (pack::LINE_BYTES + TAG_BYTES) + TAG_BYTES + stored_bytes + TAG_BYTES
}

/// Returns how many bytes a sealed PACK is padded to: to [`PACK_BYTES`] if it is full, and otherwise so that its length tells little.
pub fn padded_pack_bytes(frames: usize, stored_bytes: usize, is_full: bool) -> usize {
    let length = pack_bytes(frames, stored_bytes);
    if is_full { length.max(PACK_BYTES) } else { padme(length) }
}

/// Seals a PACK, whose plain body is given in its parts, and pads it to `length` bytes.
///
/// # Errors
/// Says that it is too long.
pub fn seal_pack<'f>(
    keys: &EpochKeys,
    place: SealedPlace,
    salts: &mut Salts,
    table: &[u8],
    frames: impl Iterator<Item = &'f [u8]>,
    length: usize,
) -> Decoded<Vec<u8>> {
    // The table has the hashes of all frames.
    let salt = salts.next(&hash_of(table));
    let about = RecordCipher::new(&keys.metadata, &salt, place);
    let content = RecordCipher::new(&keys.data, &salt, place);
    let mut out = Vec::with_capacity(length);
    out.extend(salt);
    let put = |cipher: &RecordCipher, segment, plain: &[u8], out: &mut Vec<u8>| -> Decoded<()> {
        let start = out.len();
        out.extend(plain);
        let tag = cipher.seal(segment, &[], &mut out[start..])?;
        out.extend(tag);
        Ok(())
    };
    let (fixed, lines) = table.split_at(pack::FIXED_BYTES);
    put(&about, Segment::inner(PACK_FIXED), fixed, &mut out)?;
    put(&about, Segment::inner(PACK_LINES), lines, &mut out)?;
    let mut number = PACK_FRAMES;
    for frame in frames {
        put(&content, Segment::inner(number), frame, &mut out)?;
        number += 1;
    }
    let padding = length.saturating_sub(out.len() + TAG_BYTES);
    put(&content, Segment::last(number), &vec![0; padding], &mut out)?;
    Ok(out)
}

/// Opens a sealed body. Returns it as it is in an archive that is not sealed.
///
/// # Errors
/// Says that it was changed, or is not of its epoch.
pub fn open_body(keys: &EpochKeys, header: &RecordHeader, seal: Seal, stored: Vec<u8>) -> Decoded<Vec<u8>> {
    match header.kind {
        RecordKind::Pack => open_pack(keys, header, &stored),
        RecordKind::Commit => {
            let clear_bytes = clear_bytes(&stored)?;
            let mut clear = stored;
            let sealed = clear.split_off(clear_bytes);
            let mut unsigned = clear.clone();
            unsigned
                .get_mut(SIGNATURE)
                .ok_or("a sealed COMMIT ends too early")?
                .fill(0);
            let mut body = open_single(keys.of(seal.slot), header, &unsigned, sealed)?;
            clear.append(&mut body);
            Ok(clear)
        }
        _ => open_single(keys.of(seal.slot), header, &[], stored),
    }
}

/// Opens the body of a record that the index key seals.
///
/// # Errors
/// Says that it was changed, or is none that this key seals.
pub fn open_indexed(index_key: &SecretKey, header: &RecordHeader, stored: Vec<u8>) -> Decoded<Vec<u8>> {
    let body = open_single(index_key, header, &[], stored)?;
    let announces = || body.get(PART_AT) == Some(&PlanPart::Blocks.number());
    if header.kind == RecordKind::Plan && !announces() {
        return Err("a PLAN of images is sealed with the index key".into());
    }
    Ok(body)
}

/// Returns how many bytes of a COMMIT are clear.
///
/// # Errors
/// Says that it ends before.
pub fn clear_bytes(commit: &[u8]) -> Decoded<usize> {
    let length = commit.get(CLEAR_LENGTH).ok_or("it ends too early")?;
    let length = Decoder::new(length).u32()? as usize;
    Ok(Some(length)
        .filter(|length| *length <= commit.len())
        .ok_or("it ends too early")?)
}

fn salt_of(stored: &[u8]) -> Decoded<[u8; SALT_BYTES]> {
    Ok(*stored.first_chunk().ok_or("a sealed record ends too early")?)
}

fn open_single(key: &SecretKey, header: &RecordHeader, clear: &[u8], mut stored: Vec<u8>) -> Decoded<Vec<u8>> {
    let salt = salt_of(&stored)?;
    let cipher = RecordCipher::new(key, &salt, SealedPlace::of(header));
    let plain = cipher.open_whole(Segment::ONLY, clear, stored.split_off(SALT_BYTES))?;
    let mut decoder = Decoder::new(&plain);
    let length = decoder.u32()? as usize;
    let body = decoder.take(length)?.to_vec();
    decoder.zeros(decoder.left())?;
    Ok(body)
}

fn open_pack(keys: &EpochKeys, header: &RecordHeader, stored: &[u8]) -> Decoded<Vec<u8>> {
    let opener = PackOpener::new(keys, header, stored)?;
    let mut body = opener.fixed(stored)?;
    let lines = opener.lines(&body)?;
    body.append(&mut opener.open_lines(part(stored, lines)?)?);
    let count = (body.len() - pack::FIXED_BYTES) / pack::LINE_BYTES;
    let lengths: Vec<usize> = (0..count).map(|frame| stored_bytes(&body, frame)).collect();
    let mut at = PackOpener::frames_at(count);
    for (number, length) in (PACK_FRAMES..).zip(lengths) {
        let end = at + length + TAG_BYTES;
        body.append(&mut opener.open_frame(number - PACK_FRAMES, part(stored, at..end)?)?);
        at = end;
    }
    let last = Segment::last(PACK_FRAMES + count as u64);
    body.append(&mut opener.content.open_whole(last, &[], part(stored, at..stored.len())?)?);
    Ok(body)
}

/// Returns what a line of a PACK's table says of how many bytes its frame has.
fn stored_bytes(table: &[u8], frame: usize) -> usize {
    const AT: usize = 4;
    let at = pack::FIXED_BYTES + frame * pack::LINE_BYTES + AT;
    table
        .get(at..at + size_of::<u32>())
        .and_then(|bytes| Decoder::new(bytes).u32().ok())
        .map_or(0, |length| length as usize)
}

fn part(stored: &[u8], range: std::ops::Range<usize>) -> Decoded<Vec<u8>> {
    Ok(stored.get(range).ok_or("a sealed record ends too early")?.to_vec())
}

/// Opens parts of a sealed PACK.
pub struct PackOpener {
    about: RecordCipher,
    content: RecordCipher,
}

impl PackOpener {
    /// Bytes of a body from its beginning that are needed first.
    pub const BEGINNING: usize = PACK_LINES_AT;

    /// Begins with the first bytes of a body, without the mask.
    ///
    /// # Errors
    /// Says that there are too few.
    pub fn new(keys: &EpochKeys, header: &RecordHeader, beginning: &[u8]) -> Decoded<Self> {
        let (salt, place) = (salt_of(beginning)?, SealedPlace::of(header));
        Ok(Self {
            about: RecordCipher::new(&keys.metadata, &salt, place),
            content: RecordCipher::new(&keys.data, &salt, place),
        })
    }

    /// Returns what the table begins with: [`pack::FIXED_BYTES`].
    ///
    /// # Errors
    /// Says that it does not open.
    pub fn fixed(&self, beginning: &[u8]) -> Decoded<Vec<u8>> {
        let sealed = part(beginning, SALT_BYTES..PACK_LINES_AT)?;
        self.about.open_whole(Segment::inner(PACK_FIXED), &[], sealed)
    }

    /// Returns where the lines of the table are in the body, sealed, given what the table begins with.
    ///
    /// # Errors
    /// Says that there are too many frames.
    pub fn lines(&self, fixed: &[u8]) -> Decoded<std::ops::Range<usize>> {
        let lines = pack::table_bytes(fixed)? - pack::FIXED_BYTES;
        Ok(PACK_LINES_AT..PACK_LINES_AT + lines + TAG_BYTES)
    }

    /// Opens the lines of the table.
    ///
    /// # Errors
    /// Says that they do not open.
    pub fn open_lines(&self, sealed: Vec<u8>) -> Decoded<Vec<u8>> {
        self.about.open_whole(Segment::inner(PACK_LINES), &[], sealed)
    }

    fn frames_at(count: usize) -> usize {
        PACK_LINES_AT + count * pack::LINE_BYTES + TAG_BYTES
    }

    /// Returns how many bytes further in the body a frame stands than in a body that is not sealed.
    pub fn shift_of(frame: usize) -> u64 {
        (SALT_BYTES + 2 * TAG_BYTES + frame * TAG_BYTES) as u64
    }

    /// Returns how many bytes a sealed body is longer than it is without the seal.
    pub fn overhead(frames: usize) -> u64 {
        (SALT_BYTES + 3 * TAG_BYTES + frames * TAG_BYTES) as u64
    }

    /// Opens a frame, by its place in the table.
    ///
    /// # Errors
    /// Says that it does not open.
    pub fn open_frame(&self, frame: u64, sealed: Vec<u8>) -> Decoded<Vec<u8>> {
        self.content
            .open_whole(Segment::inner(PACK_FRAMES + frame), &[], sealed)
    }
}
