//! Names of volumes, from names that others chose. A name stays what it is if it can be the name of a file: otherwise a restored image could not be
//! found by its name, nor compared with the one that it was.

use std::borrow::Cow;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Bytes of a name (`NAME_MAX` of linux/limits.h).
const NAME_BYTES_MAX: usize = 255;
/// Hexadecimal digits that tell long names from each other.
const HASH_DIGITS: usize = 16;
/// Bytes of a suffix that a name keeps when it is cut, with its dot.
const SUFFIX_BYTES_MAX: usize = 16;
/// What the names of vmfold's own files and folders begin with.
const OWN: &str = ".vmfold-";

/// Returns one component of a path for a name of any bytes. A byte that is no part of a character of UTF-8, or part of a control character, becomes
/// `%` and two hexadecimal digits, and so do NUL and `/`. A `%` before two such digits becomes `%25`, so that names stay apart. So that a name is
/// none of vmfold's own and leads nowhere else, the dot that it begins with may become `%2e`. A long name is cut, and gets digits of its hash
/// before its suffix.
pub(super) fn component(name: &[u8]) -> PathBuf {
    let text = escaped(name);
    if text.len() <= NAME_BYTES_MAX {
        return PathBuf::from(text);
    }
    let suffix = text.rfind('.').map_or("", |at| &text[at..]);
    let suffix = Some(suffix).filter(|suffix| suffix.len() <= SUFFIX_BYTES_MAX);
    let suffix = suffix.unwrap_or_default();
    let mut end = NAME_BYTES_MAX - suffix.len() - HASH_DIGITS - 1;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let hash = blake3::hash(name).to_hex();
    PathBuf::from(format!("{}.{}{suffix}", &text[..end], &hash[..HASH_DIGITS]))
}

/// Escapes what cannot be in a name.
fn escaped(name: &[u8]) -> String {
    let mut text = String::new();
    let escape = |text: &mut String, bytes: &[u8]| {
        for byte in bytes {
            let _ = write!(text, "%{byte:02x}");
        }
    };
    for chunk in name.utf8_chunks() {
        for (at, character) in chunk.valid().char_indices() {
            let rest = &chunk.valid().as_bytes()[at + 1..];
            let is_kept = match character {
                '/' => false,
                '%' => !is_escape_behind(rest),
                other => !other.is_control(),
            };
            if is_kept {
                text.push(character);
            } else {
                escape(&mut text, character.encode_utf8(&mut [0; 4]).as_bytes());
            }
        }
        escape(&mut text, chunk.invalid());
    }
    match &text[..] {
        "" => "%00".into(),
        "." => "%2e".into(),
        ".." => "%2e.".into(),
        own if own.starts_with(OWN) => format!("%2e{}", &own[1..]),
        _ => text,
    }
}

/// Whether these bytes, behind a `%`, make an escape of it.
fn is_escape_behind(rest: &[u8]) -> bool {
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    rest.get(..2).is_some_and(|digits| digits.iter().all(is_digit))
}

/// How a path differs from the one that a backup has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Changed {
    /// A name in it is cut.
    Shortened,
    /// Something in it is escaped.
    Escaped,
}

/// Tells whether components of a path look as [`component`] makes them of names that cannot stay what they are.
pub(super) fn changed(path: &Path) -> Option<Changed> {
    let is_shortened = |name: &str| {
        // A character of UTF-8 has four bytes at most, and is not cut.
        let stem = &name[..name.rfind('.').unwrap_or(0)];
        let ends_in_hash = |text: &str| {
            let end = text.as_bytes().last_chunk::<{ HASH_DIGITS + 1 }>();
            end.is_some_and(|end| end[0] == b'.' && end[1..].chunks(2).all(is_escape_behind))
        };
        name.len() > NAME_BYTES_MAX - 4 && (ends_in_hash(name) || ends_in_hash(stem))
    };
    let is_escaped = |name: &str| {
        let mut signs = name.match_indices('%');
        signs.any(|(at, _)| is_escape_behind(&name.as_bytes()[at + 1..]))
    };
    let names: Vec<Cow<'_, str>> = path.iter().map(|name| name.to_string_lossy()).collect();
    if names.iter().any(|name| is_shortened(name)) {
        Some(Changed::Shortened)
    } else if names.iter().any(|name| is_escaped(name)) {
        Some(Changed::Escaped)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Component;

    #[test]
    fn what_can_be_the_name_of_a_file_stays() {
        for name in [
            "drive-scsi0",
            "disk (1).img",
            "naïve.img",
            "-rf",
            " a b ",
            ".hidden",
            "100%.img",
            "100%2E",
            "%%",
            "a:b@c+d=e,f'g\"h\\i*j?k",
            "...",
            "a.vmfold-partial",
            "日本語",
        ] {
            assert_eq!(
                (component(name.as_bytes()), changed(Path::new(name))),
                (name.into(), None)
            );
        }
    }

    #[test]
    fn names_that_cannot_stay_are_escaped() {
        for (name, expected) in [
            (&b".."[..], "%2e."),
            (b".", "%2e"),
            (b"", "%00"),
            (b"../../etc/shadow", "..%2f..%2fetc%2fshadow"),
            (b"a\0b", "a%00b"),
            (b"a\nb\x7f", "a%0ab%7f"),
            (b"a\xff.img", "a%ff.img"),
            ("a\u{85}b".as_bytes(), "a%c2%85b"),
            (b"a%0ab", "a%250ab"),
            (b".vmfold-import-12345678-1", "%2evmfold-import-12345678-1"),
        ] {
            let made = component(name);
            assert_eq!(made, PathBuf::from(expected));
            assert_eq!(changed(&Path::new("folder").join(made)), Some(Changed::Escaped));
        }
    }

    #[test]
    fn long_names_stay_apart_and_keep_their_suffix() {
        let name = |end: &[u8]| component(&[&[b'x'; 254][..], end].concat());
        assert_ne!(name(b"1.img"), name(b"2.img"));
        assert_eq!(name(b"1").as_os_str().len(), 255);
        assert_eq!(component(&[b'x'; 255]), PathBuf::from("x".repeat(255)));
        for suffix in [".img", ".qcow2", ""] {
            for stem in ["x", "é", "日", "\u{1f600}", "\n"] {
                let long = component(format!("{}{suffix}", stem.repeat(256)).as_bytes());
                let text = long.to_str().unwrap();
                assert!(text.ends_with(suffix) && text.len() <= 255, "{text}");
                assert_eq!(changed(&Path::new("folder").join(&long)), Some(Changed::Shortened));
            }
        }
        let long = component(format!("a.{}", "b".repeat(300)).as_bytes());
        assert_eq!(changed(&long), Some(Changed::Shortened));
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
        fn different_names_stay_different(
            one in proptest::collection::vec(prop::sample::select(&b"%2ef0./\n\xc3\xa9"[..]), 0..5),
            other in proptest::collection::vec(prop::sample::select(&b"%2ef0./\n\xc3\xa9"[..]), 0..5),
        ) {
            prop_assert_eq!(one == other, component(&one) == component(&other));
        }

        #[test]
        fn only_long_names_are_shortened(name in proptest::collection::vec(b'a'..=b'z', 200..300)) {
            prop_assert_eq!(changed(&component(&name)).is_some(), name.len() > NAME_BYTES_MAX);
        }
    }
}
