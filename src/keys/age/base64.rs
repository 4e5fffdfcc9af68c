//! Base64 as `age` uses it (RFC 4648, section 4): without padding, and canonical.

use zeroize::Zeroizing;

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Encodes bytes.
pub(in crate::keys) fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for part in bytes.chunks(3) {
        let bits = part
            .iter()
            .enumerate()
            .fold(0u32, |bits, (place, byte)| bits | u32::from(*byte) << (16 - 8 * place));
        for digit in 0..=part.len() {
            text.push(char::from(DIGITS[(bits >> (18 - 6 * digit)) as usize & 63]));
        }
    }
    text
}

/// Decodes bytes. Returns none if the text is not what [`encode`] makes.
pub(in crate::keys) fn decode(text: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(Vec::with_capacity(text.len() / 4 * 3 + 2));
    for part in text.chunks(4) {
        let mut bits = 0u32;
        for (place, byte) in part.iter().enumerate() {
            bits |= u32::from(value(*byte)?) << (18 - 6 * place);
        }
        let length = match part.len() {
            1 => return None,
            digits => digits - 1,
        };
        let [_, decoded @ ..] = bits.to_be_bytes();
        // Bits behind the last byte must be 0: there is one text for each content.
        if decoded[length..].iter().any(|byte| *byte != 0) {
            return None;
        }
        bytes.extend_from_slice(&decoded[..length]);
    }
    Some(bytes)
}

fn value(digit: u8) -> Option<u8> {
    Some(match digit {
        b'A'..=b'Z' => digit - b'A',
        b'a'..=b'z' => digit - b'a' + 26,
        b'0'..=b'9' => digit - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_come_back(bytes: Vec<u8>) {
            prop_assert_eq!(decode(encode(&bytes).as_bytes()).unwrap().to_vec(), bytes);
        }

        #[test]
        fn each_content_has_one_text(text in "[A-Za-z0-9+/]{0,40}") {
            if let Some(bytes) = decode(text.as_bytes()) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }

    #[test]
    fn the_texts_of_the_rfc_are_made() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg"),
            ("fo", "Zm8"),
            ("foo", "Zm9v"),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(encode(bytes.as_bytes()), text);
            assert_eq!(decode(text.as_bytes()).unwrap()[..], *bytes.as_bytes());
        }
        for bad in ["Z", "Zh", "Zm9", "Zg==", "Zg\n", "Zm 9v", "-_"] {
            assert!(decode(bad.as_bytes()).is_none() || bad == "Zm9", "{bad}");
        }
    }
}
