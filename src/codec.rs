//! Numbers and strings as `formats/archive-v1.md` has them. A decoder takes nothing on trust: every length is checked against
//! what is left before anything is allocated.

/// Why bytes are not what the format says.
pub type Malformed = &'static str;

/// Result of decoding.
pub type Decoded<T> = Result<T, Malformed>;

const SHORT: Malformed = "it ends too early";

/// Reads fields one after the other.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    bytes: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Begins at the first of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.bytes.len()
    }

    /// So many bytes as they are.
    pub fn take(&mut self, length: usize) -> Decoded<&'a [u8]> {
        let (taken, rest) = self.bytes.split_at_checked(length).ok_or(SHORT)?;
        self.bytes = rest;
        Ok(taken)
    }

    /// An array of bytes.
    pub fn array<const N: usize>(&mut self) -> Decoded<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(SHORT)?;
        self.bytes = rest;
        Ok(*taken)
    }

    /// One byte.
    pub fn u8(&mut self) -> Decoded<u8> {
        self.array().map(|[byte]| byte)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Decoded<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Decoded<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Decoded<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// An unsigned LEB128 number.
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

    /// The same, of 32 bits at most.
    pub fn varint32(&mut self) -> Decoded<u32> {
        self.varint()?.try_into().map_err(|_| "a number is longer than 32 bits")
    }

    /// A signed number.
    pub fn zigzag(&mut self) -> Decoded<i64> {
        let number = self.varint()?;
        Ok((number >> 1).cast_signed() ^ -(number & 1).cast_signed())
    }

    /// A string of at most `limit` bytes.
    pub fn string(&mut self, limit: usize) -> Decoded<&'a [u8]> {
        let length = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if length > limit {
            return Err("a string is longer than allowed");
        }
        self.take(length)
    }

    /// A string of at most `limit` bytes as text; what is not UTF-8 is replaced.
    pub fn text(&mut self, limit: usize) -> Decoded<String> {
        Ok(String::from_utf8_lossy(self.string(limit)?).into_owned())
    }

    /// A count of things of which each takes `least` bytes or more.
    pub fn count(&mut self, least: usize) -> Decoded<usize> {
        let count = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        match count.checked_mul(least.max(1)) {
            Some(bytes) if bytes <= self.left() => Ok(count),
            _ => Err("a count exceeds what follows"),
        }
    }

    /// Reserved bytes.
    pub fn zeros(&mut self, length: usize) -> Decoded<()> {
        if self.take(length)?.iter().all(|byte| *byte == 0) {
            Ok(())
        } else {
            Err("a reserved field is not 0")
        }
    }

    /// That nothing is left.
    pub fn end(&self) -> Decoded<()> {
        match self.left() {
            0 => Ok(()),
            _ => Err("bytes follow its end"),
        }
    }
}

/// Appends an unsigned LEB128 number.
pub fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

/// Appends a signed number.
pub fn put_zigzag(out: &mut Vec<u8>, number: i64) {
    put_varint(out, ((number << 1) ^ (number >> 63)).cast_unsigned());
}

/// Appends a string.
pub fn put_string(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

/// How a payload is stored.
pub(super) const RAW: u8 = 0;
const ZSTD: u8 = 1;
/// Level for payloads: they are small, and hold what must be read first.
const PAYLOAD_LEVEL: i32 = 9;

/// Compresses a payload, unless that does not make it smaller: its encoding and its bytes.
///
/// # Errors
/// Those of zstd.
pub fn pack_payload(plain: &[u8]) -> std::io::Result<(u8, Vec<u8>)> {
    let packed = zstd::bulk::compress(plain, PAYLOAD_LEVEL)?;
    Ok(if packed.len() < plain.len() {
        (ZSTD, packed)
    } else {
        (RAW, plain.to_vec())
    })
}

/// Undoes [`pack_payload`] for a payload that is said to have `plain_length` bytes, at most `limit`.
pub fn unpack_payload(encoding: u8, stored: &[u8], plain_length: usize, limit: usize) -> Decoded<Vec<u8>> {
    if plain_length > limit {
        return Err("its payload is longer than allowed");
    }
    let plain = match encoding {
        RAW => stored.to_vec(),
        ZSTD => zstd::bulk::decompress(stored, plain_length).map_err(|_| "its payload cannot be decompressed")?,
        _ => return Err("its payload has an encoding not known"),
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
            let mut out = Vec::new();
            put_varint(&mut out, number);
            put_zigzag(&mut out, signed);
            put_string(&mut out, &text);
            let mut decoder = Decoder::new(&out);
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
