//! Formats file names and sizes for people. Guests and users choose names, so no name may break a line or send a command to a terminal.

use std::fmt::{Display, Formatter, Result, Write};
use std::path::{Path, PathBuf};

/// Shows a path on one line: control characters and bidirectional overrides are escaped, and invalid UTF-8 is replaced.
pub fn shown(path: &Path) -> impl Display + '_ {
    Shown(path)
}

struct Shown<'a>(&'a Path);

impl Display for Shown<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        for c in self.0.to_string_lossy().chars() {
            // Bidirectional overrides and isolates: Unicode Standard Annex 9.
            if c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
                write!(f, "{}", c.escape_default())?;
            } else {
                f.write_char(c)?;
            }
        }
        Ok(())
    }
}

/// Formats a number of bytes with an IEC unit, such as `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// Formats bytes of an identifier or a hash as hexadecimal digits.
pub fn hex(id: &[u8]) -> String {
    id.iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// Serialises a path as a string. Invalid UTF-8 is replaced, since JSON cannot hold it.
///
/// # Errors
/// Returns the error of the serializer.
pub fn serialize<S: serde::Serializer>(path: &Path, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(&path.to_string_lossy())
}

/// Serialises a path that may be absent, as [`serialize`] does.
///
/// # Errors
/// Returns the error of the serializer.
pub fn serialize_some<S: serde::Serializer>(
    path: &Option<PathBuf>,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    match path {
        Some(path) => serializer.serialize_some(&path.to_string_lossy()),
        None => serializer.serialize_none(),
    }
}

/// Serialises a list of paths, as [`serialize`] does.
///
/// # Errors
/// Returns the error of the serializer.
pub fn serialize_all<S: serde::Serializer>(paths: &[PathBuf], serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| path.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn names_stay_on_their_line() {
        let text = |bytes: &[u8]| shown(Path::new(std::ffi::OsStr::from_bytes(bytes))).to_string();
        assert_eq!(text("ä b.img".as_bytes()), "ä b.img");
        assert_eq!(text(b"a\nb\x1b[31m\xff.img"), "a\\nb\\u{1b}[31m\u{fffd}.img");
        assert_eq!(text("a\u{202e}gmi".as_bytes()), "a\\u{202e}gmi");
    }
}
