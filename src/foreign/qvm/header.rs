//! The header of a backup of Qubes OS: lines of `key=value` (qubes-core-admin, `qubes/backup.py`).

use std::collections::BTreeMap;

use crate::foreign::Compression;

/// Bytes of a key or a value. Messages show some of them.
const VALUE_BYTES_MAX: usize = 200;

/// What the header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BackupHeader {
    /// How the content of members is compressed.
    pub(super) compression: Option<Compression>,
    /// What is part of each passphrase.
    pub(super) id: String,
}

/// The values of a header, by their keys.
pub(super) struct Values<'t>(BTreeMap<&'t str, &'t str>);

impl<'t> Values<'t> {
    /// Reads the lines of a header.
    ///
    /// # Errors
    /// Says what makes no sense.
    pub(super) fn read(bytes: &'t [u8]) -> Result<Self, String> {
        let text = std::str::from_utf8(bytes).map_err(|_| "its header is no text")?;
        let mut values = BTreeMap::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            let (key, value) = line.split_once('=').ok_or("its header has a line without a value")?;
            if !is_plain(key) || !is_plain(value) || values.insert(key, value).is_some() {
                return Err("its header has a line that makes no sense".into());
            }
        }
        Ok(Self(values))
    }

    /// The value of a key; empty if there is none.
    pub(super) fn of(&self, key: &str) -> &'t str {
        self.0.get(key).copied().unwrap_or_default()
    }

    /// Whether the value of a key means yes.
    pub(super) fn is(&self, key: &str) -> bool {
        matches!(self.of(key).to_ascii_lowercase().as_str(), "true" | "yes" | "1")
    }
}

/// Whether a text is what keys and values are.
fn is_plain(text: &str) -> bool {
    text.len() <= VALUE_BYTES_MAX && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
}

/// What version a header is of that begins with these bytes, as far as they tell. Nothing is authenticated yet, and messages show it.
pub(super) fn version_of(first: &[u8]) -> Option<&str> {
    let mut lines = first.split(|byte| *byte == b'\n');
    let version = lines.find_map(|line| line.strip_prefix(b"version="))?;
    std::str::from_utf8(version).ok().filter(|version| is_plain(version))
}

/// Why a backup is not read that is of such a version.
pub(super) fn other_version(version: &str) -> String {
    format!(
        "it is a backup of Qubes OS in version `{version}`, which is not read: see the emergency procedure of Qubes OS"
    )
}

/// Reads a header.
///
/// # Errors
/// Says what is not read, or makes no sense.
pub(super) fn parse(bytes: &[u8]) -> Result<BackupHeader, String> {
    let values = Values::read(bytes)?;
    if values.of("version") != "4" {
        return Err(other_version(values.of("version")));
    }
    if values.of("hmac-algorithm") != "scrypt" || !values.is("encrypted") {
        return Err("it is protected in a way that is not known".into());
    }
    let id = values.of("backup-id");
    if id.is_empty() || id.starts_with('-') {
        return Err("its header has no proper backup-id".into());
    }
    Ok(BackupHeader {
        compression: values
            .is("compressed")
            .then(|| filter(values.of("compression-filter")))
            .transpose()?,
        id: id.to_owned(),
    })
}

/// The compression of a filter, which is the name of a program. No program is run.
pub(super) fn filter(name: &str) -> Result<Compression, String> {
    Ok(match name {
        "gzip" | "pigz" => Compression::Gzip,
        "bzip2" | "pbzip2" => Compression::Bzip2,
        "xz" => Compression::Xz,
        "lzma" => Compression::Lzma,
        "zstd" | "zstdmt" => Compression::Zstd,
        other => return Err(format!("it is compressed by `{other}`, which is not known")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_known_is_taken() {
        let header = |lines: &str| {
            parse(
                format!("version=4\nencrypted=True\nhmac-algorithm=scrypt\nbackup-id=20260101T000000-1\n{lines}")
                    .as_bytes(),
            )
        };
        assert_eq!(
            header("compressed=False\ncompression-filter=gzip\n")
                .unwrap()
                .compression,
            None
        );
        assert_eq!(
            header("compressed=True\ncompression-filter=zstdmt\n")
                .unwrap()
                .compression,
            Some(Compression::Zstd)
        );
        assert_eq!(
            header("compressed=True\ncompression-filter=lzma\nnew-key=1\n")
                .unwrap()
                .id,
            "20260101T000000-1"
        );
        for wrong in [
            "compressed=True\ncompression-filter=sh\n",
            "compressed=True\n",
            "compressed=True\ncompression-filter=gzip;id\n",
            "version=4\n",
            "a=b=c\n",
            &format!("compressed=True\ncompression-filter={}\n", "x".repeat(201)),
            "nothing\n",
        ] {
            assert!(header(wrong).is_err(), "{wrong}");
        }
        for version in ["", "1", "2", "3", "5"] {
            let problem = parse(format!("version={version}\n").as_bytes()).unwrap_err();
            assert!(problem.contains("version"), "{problem}");
        }
    }

    #[test]
    fn the_version_is_found_among_the_first_bytes() {
        assert_eq!(
            version_of(b"encrypted=True\nversion=3\nhmac-algorithm=SHA512\n"),
            Some("3")
        );
        assert_eq!(version_of(b"version=4"), Some("4"));
        assert_eq!(version_of(b"encrypted=True\n"), None);
        for damaged in [&b"version=\xff\n"[..], b"version=\x1b[31m\n", b"version=4\x002\n"] {
            assert_eq!(version_of(damaged), None, "{damaged:?}");
        }
        assert_eq!(version_of(&[&b"version="[..], &[b'3'; 201]].concat()), None);
        assert!(other_version("2").contains("emergency procedure"));
    }
}
