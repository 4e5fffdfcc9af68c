//! Encodes and decodes numbers and strings as `formats/archive-v1.md` defines them. A decoder trusts nothing: it checks every length
//! against the bytes that are left before it allocates anything.

/// Says why bytes cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Malformed {
    /// They do not keep to the format.
    Damaged(&'static str),
    /// They keep to the format, and need what this version does not know: it must not go on.
    Unsupported(&'static str),
}

impl From<&'static str> for Malformed {
    fn from(problem: &'static str) -> Self {
        Self::Damaged(problem)
    }
}

impl Malformed {
    /// Returns what is wrong, as a clause without a subject of its own.
    pub fn problem(self) -> &'static str {
        match self {
            Self::Damaged(problem) | Self::Unsupported(problem) => problem,
        }
    }
}

/// The result of decoding.
pub type Decoded<T> = Result<T, Malformed>;

const SHORT: &str = "it ends too early";

/// Decodes fields one after the other.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    bytes: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Makes a decoder that begins at the first of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Returns the number of bytes that were not decoded yet.
    pub fn left(&self) -> usize {
        self.bytes.len()
    }

    /// Takes the next `length` bytes.
    pub fn take(&mut self, length: usize) -> Decoded<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(SHORT)?;
        self.bytes = rest;
        Ok(taken)
    }

    /// Takes the next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Decoded<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(SHORT)?;
        self.bytes = rest;
        Ok(*taken)
    }

    /// Decodes a number of one byte.
    pub fn u8(&mut self) -> Decoded<u8> {
        self.array().map(|[byte]| byte)
    }

    /// Decodes a little-endian number of two bytes.
    pub fn u16(&mut self) -> Decoded<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// Decodes a little-endian number of four bytes.
    pub fn u32(&mut self) -> Decoded<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// Decodes a little-endian number of eight bytes.
    pub fn u64(&mut self) -> Decoded<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Decodes an unsigned LEB128 number of 64 bits at most.
    pub fn varint(&mut self) -> Decoded<u64> {
        let mut number = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7f);
            if shift == 63 && part > 1 {
                break;
            }
            number |= part << shift;
            if byte & 0x80 == 0 {
                return match part {
                    0 if shift > 0 => Err("a number is longer than it has to be".into()),
                    _ => Ok(number),
                };
            }
        }
        Err("a number is longer than 64 bits".into())
    }

    /// Decodes an unsigned LEB128 number of 32 bits at most.
    pub fn varint32(&mut self) -> Decoded<u32> {
        let number = self.varint()?;
        Ok(u32::try_from(number).map_err(|_| "a number is longer than 32 bits")?)
    }

    /// Decodes a signed number, which is an LEB128 number in zigzag encoding.
    pub fn zigzag(&mut self) -> Decoded<i64> {
        let number = self.varint()?;
        Ok((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    /// Decodes a string of at most `limit` bytes: its length as LEB128, then its bytes.
    pub fn string(&mut self, limit: usize) -> Decoded<&'a [u8]> {
        let length = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if length > limit {
            return Err("a string is longer than allowed".into());
        }
        self.take(length)
    }

    /// Decodes a string of at most `limit` bytes as text. Invalid UTF-8 is replaced.
    pub fn text(&mut self, limit: usize) -> Decoded<String> {
        Ok(String::from_utf8_lossy(self.string(limit)?).into_owned())
    }

    /// Decodes the number of items that follow, each of which takes `least` bytes or more. It is checked against the bytes that are left.
    pub fn count(&mut self, least: usize) -> Decoded<usize> {
        let count = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        match count.checked_mul(least.max(1)) {
            Some(bytes) if bytes <= self.left() => Ok(count),
            _ => Err("a count exceeds what follows".into()),
        }
    }

    /// Takes `length` reserved bytes, which must be 0.
    pub fn zeros(&mut self, length: usize) -> Decoded<()> {
        if self.take(length)?.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err("a reserved field is not 0".into())
        }
    }

    /// Checks that no bytes are left.
    pub fn end(&self) -> Decoded<()> {
        match self.left() {
            0 => Ok(()),
            _ => Err("bytes follow its end".into()),
        }
    }
}

/// Appends an unsigned LEB128 number.
pub fn put_varint(encoded: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        encoded.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    encoded.push((number & 0x7f) as u8);
}

/// Appends a signed number in zigzag encoding.
pub fn put_zigzag(encoded: &mut Vec<u8>, number: i64) {
    put_varint(encoded, ((number << 1) ^ (number >> 63)).cast_unsigned());
}

/// Appends a string: its length as LEB128, then its bytes.
pub fn put_string(encoded: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(encoded, bytes.len() as u64);
    encoded.extend_from_slice(bytes);
}

/// Encoding of bytes that are stored as they are.
pub const RAW: u8 = 0;
/// Encoding of bytes that are stored as one zstd frame.
pub const ZSTD: u8 = 1;
/// The zstd level of payloads: they are small, and a reader needs them first.
const PAYLOAD_LEVEL: i32 = 9;
/// What a payload's record says of it beside its encoding and length.
pub type PayloadKind = [u8; 3];

/// Makes the body of a record that is one payload. It is compressed, unless that does not make it smaller.
///
/// # Errors
/// Returns the error that zstd gave.
pub fn payload_body(kind: PayloadKind, plain: &[u8]) -> std::io::Result<Vec<u8>> {
    let packed = zstd::bulk::compress(plain, PAYLOAD_LEVEL)?;
    let (encoding, stored) = if packed.len() < plain.len() {
        (ZSTD, &packed[..])
    } else {
        (RAW, plain)
    };
    let mut body = vec![encoding];
    body.extend(kind);
    body.extend(u32::try_from(plain.len()).unwrap_or(u32::MAX).to_le_bytes());
    body.extend_from_slice(stored);
    Ok(body)
}

/// Decodes the body of a record that is one payload, of at most `limit` bytes. Returns what the record says of it, and its bytes.
///
/// # Errors
/// Returns what is malformed.
pub fn payload_of(body: &[u8], limit: usize) -> Decoded<(PayloadKind, Vec<u8>)> {
    let mut decoder = Decoder::new(body);
    let (encoding, kind) = (decoder.u8()?, decoder.array()?);
    let plain_length = usize::try_from(decoder.u32()?).unwrap_or(usize::MAX);
    if plain_length > limit {
        return Err("its payload is longer than allowed".into());
    }
    Ok((kind, unpack(encoding, decoder.take(decoder.left())?, plain_length)?))
}

/// Undoes an encoding. `plain_length` was checked against a limit: so many bytes are allocated.
///
/// # Errors
/// Returns what is malformed: another length, another encoding, or not exactly one zstd frame that says its content size.
pub fn unpack(encoding: u8, stored: &[u8], plain_length: usize) -> Decoded<Vec<u8>> {
    let plain = match encoding {
        RAW => stored.to_vec(),
        ZSTD => {
            check_zstd_frame(stored, plain_length)?;
            zstd::bulk::decompress(stored, plain_length).map_err(|_| "it cannot be decompressed")?
        }
        _ => return Err("it has an encoding not known".into()),
    };
    if plain.len() == plain_length {
        Ok(plain)
    } else {
        Err("it has another length than it says".into())
    }
}

/// Checks that bytes are one zstd frame (RFC 8878) with its content size, a bearable window and no dictionary, and nothing behind it.
fn check_zstd_frame(stored: &[u8], plain_length: usize) -> Decoded<()> {
    use zstd::zstd_safe;
    const MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
    const SINGLE_SEGMENT: u8 = 1 << 5;
    const WINDOW_BYTES_MAX: u64 = 8 << 20;
    let (Some(descriptor), Some(window)) = (stored.get(4), stored.get(5)) else {
        return Err("it is no zstd frame".into());
    };
    if !stored.starts_with(&MAGIC) || zstd_safe::find_frame_compressed_size(stored) != Ok(stored.len()) {
        return Err("it is not exactly one zstd frame".into());
    }
    if !matches!(zstd_safe::get_frame_content_size(stored), Ok(Some(size)) if size == plain_length as u64) {
        return Err("its zstd frame has another content size than it should have".into());
    }
    // RFC 8878, 3.1.1.1.2: a frame of a single segment has no window descriptor.
    let base = 1u64 << (10 + (window >> 3));
    if descriptor & SINGLE_SEGMENT == 0 && base + base / 8 * u64::from(window & 7) > WINDOW_BYTES_MAX {
        return Err("its zstd frame has a larger window than allowed".into());
    }
    if zstd_safe::get_dict_id_from_frame(stored).is_some() {
        return Err("its zstd frame needs a dictionary".into());
    }
    Ok(())
}

/// Bit of a tag: a reader that does not know it must refuse.
pub const CRITICAL: u8 = 0x80;

/// Appends an entry: a tag, a length, and the fields that `put` writes.
pub fn put_entry(encoded: &mut Vec<u8>, tag: u8, put: impl FnOnce(&mut Vec<u8>)) {
    let mut fields = Vec::new();
    put(&mut fields);
    encoded.push(tag);
    put_string(encoded, &fields);
}

/// Takes the next entry: its tag, and a decoder of its fields. Returns none at the end.
///
/// # Errors
/// Returns what is malformed.
pub fn next_entry<'a>(decoder: &mut Decoder<'a>) -> Decoded<Option<(u8, Decoder<'a>)>> {
    if decoder.left() == 0 {
        return Ok(None);
    }
    let tag = decoder.u8()?;
    let fields = decoder.string(usize::MAX)?;
    Ok(Some((tag, Decoder::new(fields))))
}

/// Skips an entry with a tag that is not known.
///
/// # Errors
/// Returns [`Malformed::Unsupported`] if the tag is critical.
pub fn skip_entry(tag: u8) -> Decoded<()> {
    if tag & CRITICAL == 0 {
        Ok(())
    } else {
        Err(Malformed::Unsupported(
            "it has entries of a kind that this version does not know",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn numbers_come_back(number: u64, signed: i64, text: Vec<u8>) {
            let mut encoded = Vec::new();
            put_varint(&mut encoded, number);
            put_zigzag(&mut encoded, signed);
            put_string(&mut encoded, &text);
            let mut decoder = Decoder::new(&encoded);
            prop_assert_eq!(decoder.varint(), Ok(number));
            prop_assert_eq!(decoder.zigzag(), Ok(signed));
            prop_assert_eq!(decoder.string(text.len()), Ok(&text[..]));
            prop_assert_eq!(decoder.end(), Ok(()));
        }
    }

    #[test]
    fn counts_and_lengths_are_not_believed() {
        assert!(Decoder::new(&[0xff; 12]).varint().is_err());
        assert!(
            Decoder::new(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02])
                .varint()
                .is_err()
        );
        assert!(Decoder::new(&[200, 1, 0]).string(1 << 20).is_err());
        assert!(Decoder::new(&[4, 0, 0, 0]).count(1).is_err());
        // 0 in two bytes.
        assert!(Decoder::new(&[0x80, 0x00]).varint().is_err());
        let body = payload_body([1, 2, 3], &vec![0; 100_000]).unwrap();
        assert_eq!(payload_of(&body, 100_000).unwrap(), ([1, 2, 3], vec![0; 100_000]));
        assert!(payload_of(&body, 99_999).is_err());
        for length in [50_000u32, 200_000] {
            let mut other = body.clone();
            other[4..8].copy_from_slice(&length.to_le_bytes());
            assert!(payload_of(&other, 1 << 20).is_err());
        }
    }

    #[test]
    fn a_zstd_frame_stands_alone() {
        let frame = zstd::bulk::compress(&[7; 5000], 3).unwrap();
        assert!(unpack(ZSTD, &frame, 5000).is_ok());
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 9];
        assert!(unpack(ZSTD, &[&frame[..], &skippable].concat(), 5000).is_err());
        assert!(unpack(ZSTD, &[&skippable[..], &frame].concat(), 5000).is_err());
        assert!(unpack(ZSTD, &frame.repeat(2), 10_000).is_err());
        let unsized_frame = zstd::stream::encode_all(&[7; 5000][..], 3).unwrap();
        assert!(unpack(ZSTD, &unsized_frame, 5000).is_err());
        assert!(unpack(2, &[7; 5000], 5000).is_err());
    }

    #[test]
    fn entries_that_are_not_known_are_skipped_unless_they_are_critical() {
        let mut encoded = Vec::new();
        put_entry(&mut encoded, 9, |fields| put_varint(fields, 300));
        put_entry(&mut encoded, CRITICAL | 9, |_| ());
        let mut decoder = Decoder::new(&encoded);
        let (tag, mut fields) = next_entry(&mut decoder).unwrap().unwrap();
        assert_eq!((tag, fields.varint(), fields.end()), (9, Ok(300), Ok(())));
        assert_eq!(skip_entry(tag), Ok(()));
        let (tag, _) = next_entry(&mut decoder).unwrap().unwrap();
        assert!(matches!(skip_entry(tag), Err(Malformed::Unsupported(_))));
        assert!(next_entry(&mut decoder).unwrap().is_none());
        assert!(next_entry(&mut Decoder::new(&[1, 5, 0])).is_err());
    }
}
