//! Bech32 (BIP 173), by which `age` writes recipients and identities, without its limit on the length.

use zeroize::Zeroizing;

const DIGITS: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
/// The most characters that are decoded. Recipients that resist quantum computers have about 2000.
const LENGTH_MAX: usize = 8192;
/// The number of characters of the checksum.
const CHECKSUM: usize = 6;

/// One step of the checksum.
fn step(sum: u32, value: u8) -> u32 {
    const GENERATOR: [u32; 5] = [0x3b6a_57b2, 0x2650_8e6d, 0x1ea1_19fa, 0x3d42_33dd, 0x2a14_62b3];
    let shifted = (sum & 0x1ff_ffff) << 5 ^ u32::from(value);
    let taps = GENERATOR.iter().enumerate();
    taps.filter(|(bit, _)| sum >> (25 + bit) & 1 == 1)
        .fold(shifted, |sum, (_, tap)| sum ^ tap)
}

/// The checksum of a name and values, as far as they go.
fn checksum(name: &str, values: impl Iterator<Item = u8>) -> u32 {
    let high = name.bytes().map(|byte| byte >> 5);
    let low = name.bytes().map(|byte| byte & 31);
    high.chain([0]).chain(low).chain(values).fold(1, step)
}

/// Encodes bytes under a name in lower case.
pub(super) fn encode(name: &str, bytes: &[u8]) -> Zeroizing<String> {
    let length = (bytes.len() * 8).div_ceil(5);
    let value = |place: usize| {
        let bit = |bit: usize| bytes.get(bit / 8).map_or(0, |byte| byte >> (7 - bit % 8) & 1);
        (0..5).fold(0, |value, one| value << 1 | bit(place * 5 + one))
    };
    let sum = checksum(name, (0..length).map(value).chain([0; CHECKSUM])) ^ 1;
    let sum = (0..CHECKSUM).map(|place| (sum >> (5 * (CHECKSUM - 1 - place)) & 31) as u8);
    // The whole is made in one piece: a string that grew would leave copies behind.
    let mut text = Zeroizing::new(String::with_capacity(name.len() + 1 + length + CHECKSUM));
    text.push_str(name);
    text.push('1');
    text.extend(
        (0..length)
            .map(value)
            .chain(sum)
            .map(|value| char::from(DIGITS[usize::from(value)])),
    );
    text
}

/// Decodes a text in one case. Returns its name in lower case, and its bytes; none if it is malformed.
pub(super) fn decode(text: &str) -> Option<(String, Zeroizing<Vec<u8>>)> {
    let is_upper = text.bytes().any(|byte| byte.is_ascii_uppercase());
    let is_lower = text.bytes().any(|byte| byte.is_ascii_lowercase());
    if is_upper && is_lower || text.len() > LENGTH_MAX || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return None;
    }
    let (name, data) = text.rsplit_once('1')?;
    let name = name.to_ascii_lowercase();
    let mut values = Zeroizing::new(Vec::with_capacity(data.len()));
    for byte in data.bytes() {
        let digit = byte.to_ascii_lowercase();
        values.push(u8::try_from(DIGITS.iter().position(|one| *one == digit)?).ok()?);
    }
    if name.is_empty() || values.len() < CHECKSUM || checksum(&name, values.iter().copied()) != 1 {
        return None;
    }
    let values = &values[..values.len() - CHECKSUM];
    let mut bytes = Zeroizing::new(Vec::with_capacity(values.len() * 5 / 8));
    let (mut bits, mut count) = (Zeroizing::new(0u32), 0);
    for value in values {
        *bits = *bits << 5 | u32::from(*value);
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((*bits >> count & 0xff) as u8);
        }
        *bits &= 0xff;
    }
    // Less than a character is left over, and it is 0.
    (count < 5 && *bits & ((1 << count) - 1) == 0).then_some((name, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_back(name in "[a-z+-]{1,20}", bytes: Vec<u8>) {
            let text = encode(&name, &bytes);
            let (decoded, content) = decode(&text).unwrap();
            prop_assert_eq!((decoded, content.to_vec()), (name.clone(), bytes.clone()));
            let (decoded, content) = decode(&text.to_ascii_uppercase()).unwrap();
            prop_assert_eq!((decoded, content.to_vec()), (name, bytes));
        }

        #[test]
        fn a_wrong_character_is_noticed(bytes: [u8; 32], place in 4..62usize, other in 0..32usize) {
            let text = encode("age", &bytes);
            let mut wrong = text.as_bytes().to_vec();
            wrong[place] = DIGITS[other];
            let wrong = String::from_utf8(wrong).unwrap();
            prop_assert_eq!(decode(&wrong).is_some(), wrong == *text);
        }
    }

    #[test]
    fn the_texts_of_the_standard_are_decoded() {
        for good in ["A12UEL5L", "a12uel5l", "abcdef1qpzry9x8gf2tvdw0s3jn54khce6mua7lmqqqxw"] {
            assert!(decode(good).is_some(), "{good}");
        }
        // Two cases, another checksum (Bech32m), no name, no separator, a character that is none.
        for bad in [
            "a12UEL5L",
            "a1lqfn3a",
            "1qzzfhee",
            "pzry9x0s0muk",
            "x1b4n0q5v",
            "",
            "1",
            "a1",
            "ä12uel5l",
        ] {
            assert!(decode(bad).is_none(), "{bad}");
        }
    }
}
