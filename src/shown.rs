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

/// The unit that all sizes of a text are given in, so that they compare at a glance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeUnit {
    /// Its name.
    pub name: &'static str,
    bytes: u64,
}

impl SizeUnit {
    /// The unit for sizes up to a number of bytes.
    pub fn for_total(bytes: u64) -> Self {
        // So many of a unit are still told in it.
        const MOST: u64 = 16 << 10;
        let unit = |name, bytes| Self { name, bytes };
        match bytes {
            0..0x10_0000 => unit("KiB", 1 << 10),
            _ if bytes < MOST << 20 => unit("MiB", 1 << 20),
            _ if bytes < MOST << 30 => unit("GiB", 1 << 30),
            _ => unit("TiB", 1 << 40),
        }
    }

    /// Formats a number of bytes in this unit, without its name, with one decimal.
    pub fn number(self, bytes: u64) -> String {
        let unit = u128::from(self.bytes);
        match (u128::from(bytes) * 10 + unit / 2) / unit {
            0 if bytes == 0 => "0".to_owned(),
            0 => "<0.1".to_owned(),
            tenths => format!("{}.{}", tenths / 10, tenths % 10),
        }
    }

    /// Formats a number of bytes in this unit, with its name.
    pub fn size(self, bytes: u64) -> String {
        format!("{} {}", self.number(bytes), self.name)
    }
}

/// Formats a number of things, such as `1 image` and `2 images`.
pub fn counted(count: u64, thing: &str) -> String {
    match (count, thing.strip_suffix('y')) {
        (1, _) => format!("1 {thing}"),
        (_, Some(stem)) => format!("{count} {stem}ies"),
        _ => format!("{count} {thing}s"),
    }
}

/// The number of columns that a text takes on a terminal.
pub fn columns(text: &str) -> usize {
    unicode_width::UnicodeWidthStr::width(text)
}

/// Shortens a name to a number of columns, by leaving out its middle: both ends tell names apart.
pub fn shortened(name: &str, columns_max: usize) -> String {
    if columns(name) <= columns_max {
        return name.to_owned();
    }
    let rest = columns_max.saturating_sub(1);
    let (before, after) = (rest.div_ceil(2), rest / 2);
    let take = |chars: &mut dyn Iterator<Item = char>, columns_max: usize| {
        let mut taken = 0;
        let fits = |c: &char| {
            taken += unicode_width::UnicodeWidthChar::width(*c).unwrap_or(0);
            taken <= columns_max
        };
        chars.take_while(fits).collect::<Vec<char>>()
    };
    let start: String = take(&mut name.chars(), before).into_iter().collect();
    let end: String = take(&mut name.chars().rev(), after).into_iter().rev().collect();
    format!("{start}\u{2026}{end}")
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
    fn sizes_have_one_unit() {
        let number = |total: u64, bytes: u64| SizeUnit::for_total(total).size(bytes);
        assert_eq!(number(649 << 20, 649 << 20), "649.0 MiB");
        assert_eq!(number(649 << 20, 1), "<0.1 MiB");
        assert_eq!(number(649 << 20, 0), "0 MiB");
        assert_eq!(number(1 << 40, 1 << 40), "1024.0 GiB");
        assert_eq!(number(1000, 1536), "1.5 KiB");
        assert_eq!(number(u64::MAX, u64::MAX), "16777216.0 TiB");
    }

    #[test]
    fn things_are_counted() {
        let all = [counted(1, "image"), counted(0, "image"), counted(2, "family")];
        assert_eq!(all, ["1 image", "0 images", "2 families"]);
    }

    #[test]
    fn long_names_lose_their_middle() {
        assert_eq!(shortened("private.img", 11), "private.img");
        assert_eq!(
            shortened("private.img.7@2026-01-02T03:04:05Z", 12),
            "privat\u{2026}4:05Z"
        );
        let wide = shortened(&"\u{65e5}\u{672c}".repeat(10), 9);
        assert!(columns(&wide) <= 9, "{wide}");
    }

    #[test]
    fn names_stay_on_their_line() {
        let text = |bytes: &[u8]| shown(Path::new(std::ffi::OsStr::from_bytes(bytes))).to_string();
        assert_eq!(text("ä b.img".as_bytes()), "ä b.img");
        assert_eq!(text(b"a\nb\x1b[31m\xff.img"), "a\\nb\\u{1b}[31m\u{fffd}.img");
        assert_eq!(text("a\u{202e}gmi".as_bytes()), "a\\u{202e}gmi");
    }
}
