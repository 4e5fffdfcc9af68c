//! Passphrases, and how they are read. They are wiped from memory when they are dropped.

use std::io::{self, Read};
use std::path::Path;

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::shown::shown;

/// The most bytes that a passphrase may have.
pub const PASSPHRASE_BYTES_MAX: usize = 4096;

/// A passphrase, as bytes.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase")
    }
}

impl Passphrase {
    /// Takes the bytes of a passphrase.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// Reads the passphrase from a file: its first line, of 4096 bytes at most.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Usage`] if there is none.
    pub fn read(path: &Path) -> Result<Self> {
        let mut file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        let line = Self::of_line(&mut file).map_err(Error::io("read", path))?;
        line.ok_or_else(|| {
            let path = shown(path);
            Error::Usage(format!(
                "`{path}` holds no passphrase: its first line is it, of {PASSPHRASE_BYTES_MAX} bytes at most"
            ))
        })
    }

    /// Reads the passphrase from what is left of a line, and nothing behind that line. Its end is no part of it. Returns none if the line is
    /// empty, longer than [`PASSPHRASE_BYTES_MAX`], or has a byte 0 in it.
    ///
    /// # Errors
    /// Returns the error of the reader.
    pub fn of_line(reader: &mut dyn Read) -> io::Result<Option<Self>> {
        // A vector that grew would leave copies behind.
        let mut line = Zeroizing::new(Vec::with_capacity(PASSPHRASE_BYTES_MAX));
        let mut byte = Zeroizing::new([0]);
        loop {
            match reader.read(&mut *byte) {
                Ok(0) => break,
                Ok(_) if byte[0] == b'\n' => break,
                Ok(_) if line.len() == PASSPHRASE_BYTES_MAX => return Ok(None),
                Ok(_) => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok((!line.is_empty() && !line.contains(&0)).then_some(Self(line)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_a_passphrase() {
        let of = |bytes: &[u8]| {
            let mut rest = bytes;
            let passphrase = Passphrase::of_line(&mut rest).unwrap();
            (passphrase.map(|one| one.bytes().to_vec()), rest.to_vec())
        };
        let longest = vec![b'a'; PASSPHRASE_BYTES_MAX];
        assert_eq!(of(b"pass"), (Some(b"pass".to_vec()), vec![]));
        assert_eq!(of(b" p\xffs \nmore"), (Some(b" p\xffs ".to_vec()), b"more".to_vec()));
        assert_eq!(of(&longest).0, Some(longest.clone()));
        assert_eq!(of(&[&longest[..], b"\n"].concat()).0, Some(longest.clone()));
        for bad in [&b""[..], b"\n", b"\npass", b"a\0b\n", &[&longest[..], b"a"].concat()] {
            assert_eq!(of(bad).0, None, "{bad:?}");
        }
        // What never ends is not read to its end.
        assert!(Passphrase::of_line(&mut io::repeat(b'a')).unwrap().is_none());
    }
}
