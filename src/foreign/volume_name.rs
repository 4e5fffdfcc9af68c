//! Names of volumes, from names that others chose.

use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Bytes of a name (`NAME_MAX` of linux/limits.h), less what a restore may append to it.
const NAME_BYTES_MAX: usize = 200;

/// Hexadecimal digits that tell long names from each other.
const HASH_DIGITS: usize = 16;

/// Returns one component of a path for a name of any bytes. Letters, digits and `.`, `-`, `_`, `+`, `@`, `:` and spaces inside stay as they are;
/// every other byte becomes `%` and two hexadecimal digits, and so does a dot or a dash at the beginning. A long name is cut, and ends with digits
/// of its hash.
pub(super) fn component(name: &[u8]) -> PathBuf {
    let mut text = String::new();
    for (at, byte) in name.iter().enumerate() {
        let is_inside = at > 0 && at + 1 < name.len();
        let is_plain = match byte {
            b'.' | b'-' => at > 0,
            b' ' => is_inside,
            b'_' | b'+' | b'@' | b':' => true,
            byte => byte.is_ascii_alphanumeric(),
        };
        if is_plain {
            text.push(char::from(*byte));
        } else {
            let _ = write!(text, "%{byte:02x}");
        }
        if text.len() > NAME_BYTES_MAX {
            text.truncate(NAME_BYTES_MAX - HASH_DIGITS - 1);
            let hash = blake3::hash(name).to_hex();
            let _ = write!(text, ".{}", &hash[..HASH_DIGITS]);
            break;
        }
    }
    if text.is_empty() {
        text.push('%');
    }
    PathBuf::from(text)
}

/// Whether a component of a path looks as [`component`] makes it of a name that is too long. A suffix may have been appended.
pub(super) fn is_shortened(path: &Path) -> bool {
    path.iter().any(|name| {
        let end = name
            .as_encoded_bytes()
            .get(NAME_BYTES_MAX - HASH_DIGITS - 1..NAME_BYTES_MAX);
        let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        end.is_some_and(|end| end[0] == b'.' && end[1..].iter().all(is_digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Component;

    #[test]
    fn names_that_lead_elsewhere_are_escaped() {
        for (name, expected) in [
            (&b"drive-scsi0"[..], "drive-scsi0"),
            (b"..", "%2e."),
            (b".", "%2e"),
            (b"", "%"),
            (b"../../etc/shadow", "%2e.%2f..%2fetc%2fshadow"),
            (b"-rf", "%2drf"),
            (b"a\0b", "a%00b"),
            (b" a b ", "%20a b%20"),
            (b"100%", "100%25"),
        ] {
            assert_eq!(component(name), PathBuf::from(expected));
        }
    }

    #[test]
    fn long_names_that_begin_alike_stay_apart() {
        let name = |end: u8| component(&[&[b'x'; 254][..], &[end]].concat());
        assert_ne!(name(b'1'), name(b'2'));
        assert_eq!(component(&[b'x'; 200]).as_os_str().len(), 200);
    }

    #[test]
    fn names_that_were_shortened_are_known() {
        let long = component(&[b'\n'; 70]);
        assert!(is_shortened(&long) && is_shortened(&Path::new("folder").join(&long)));
        let mut with_suffix = long.into_os_string();
        with_suffix.push(".img");
        assert!(is_shortened(Path::new(&with_suffix)));
        for whole in [vec![b'x'; 200], vec![b'a'; 199], b"a.img".to_vec(), Vec::new()] {
            assert!(!is_shortened(&component(&whole)), "{whole:?}");
        }
    }

    proptest! {
        #[test]
        fn a_name_is_one_component(name: Vec<u8>) {
            let path = component(&name);
            let components: Vec<_> = path.components().collect();
            prop_assert!(matches!(components[..], [Component::Normal(_)]));
            prop_assert!(path.as_os_str().len() <= NAME_BYTES_MAX);
        }

        #[test]
        fn only_long_names_are_shortened(name in proptest::collection::vec(b'a'..=b'z', 150..300)) {
            prop_assert_eq!(is_shortened(&component(&name)), name.len() > NAME_BYTES_MAX);
        }
    }
}
