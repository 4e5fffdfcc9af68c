//! Encodes and decodes numbers and strings as `formats/archive-v1.md` defines them. A decoder trusts nothing: it checks every length
//! against the bytes that are left before it allocates anything.

/// Says why bytes do not keep to the format.
pub type Malformed = &'static str;

/// The result of decoding.
pub type Decoded<T> = Result<T, Malformed>;

const SHORT: Malformed = "it ends too early";

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
                return Ok(number);
            }
        }
        Err("a number is longer than 64 bits")
    }

    /// Decodes an unsigned LEB128 number of 32 bits at most.
    pub fn varint32(&mut self) -> Decoded<u32> {
        self.varint()?.try_into().map_err(|_| "a number is longer than 32 bits")
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
            return Err("a string is longer than allowed");
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
            _ => Err("a count exceeds what follows"),
        }
    }

    /// Takes `length` reserved bytes, which must be 0.
    pub fn zeros(&mut self, length: usize) -> Decoded<()> {
        if self.take(length)?.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err("a reserved field is not 0")
        }
    }

    /// Checks that no bytes are left.
    pub fn end(&self) -> Decoded<()> {
        match self.left() {
            0 => Ok(()),
            _ => Err("bytes follow its end"),
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

/// Encoding of a payload that is stored as it is.
pub(super) const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// The zstd level of payloads: they are small, and a reader needs them first.
const PAYLOAD_LEVEL: i32 = 9;

/// Compresses a payload, unless that does not make it smaller. Returns the encoding and the stored bytes.
///
/// # Errors
/// Returns the error that zstd gave.
pub fn pack_payload(plain: &[u8]) -> std::io::Result<(u8, Vec<u8>)> {
    let packed = zstd::bulk::compress(plain, PAYLOAD_LEVEL)?;
    Ok(if packed.len() < plain.len() {
        (ZSTD, packed)
    } else {
        (RAW, plain.to_vec())
    })
}

/// Undoes [`pack_payload`] for a payload that its header says has `plain_length` bytes, of which `limit` are allowed.
pub fn unpack_payload(encoding: u8, stored: &[u8], plain_length: usize, limit: usize) -> Decoded<Vec<u8>> {
    if plain_length > limit {
        return Err("its payload is longer than allowed");
    }
    let plain = match encoding {
        RAW => stored.to_vec(),
        ZSTD => zstd::bulk::decompress(stored, plain_length).map_err(|_| "its payload cannot be decompressed")?,
        _ => return Err("its payload has an unknown encoding"),
    };
    if plain.len() == plain_length {
        Ok(plain)
    } else {
        Err("its payload has another length than it says")
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
        let (_, stored) = pack_payload(&vec![0; 100_000]).unwrap();
        assert!(unpack_payload(ZSTD, &stored, 50_000, 1 << 20).is_err());
        assert!(unpack_payload(ZSTD, &stored, 200_000, 1 << 20).is_err());
        assert!(unpack_payload(ZSTD, &stored, 100_000, 1 << 16).is_err());
    }
}
