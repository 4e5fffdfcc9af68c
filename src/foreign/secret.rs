//! Passphrases. They are wiped from memory when they are dropped.

use std::io::Read;
use std::path::Path;

use zeroize::Zeroizing;

use crate::error::{Error, Result};
use crate::shown::shown;

/// A passphrase, as bytes.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

impl Passphrase {
    /// Takes the bytes of a passphrase.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passphrase")
    }
}

impl Passphrase {
    /// Reads the passphrase from a file: its first line, of 4096 bytes at most.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Usage`] if there is none.
    pub fn read(path: &Path) -> Result<Self> {
        const BYTES_MAX: u64 = 4096;
        let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        let mut bytes = Vec::with_capacity(4098);
        let mut limited = file.take(BYTES_MAX + 1);
        limited.read_to_end(&mut bytes).map_err(Error::io("read", path))?;
        let read = Zeroizing::new(bytes);
        let line = read.split(|byte| *byte == b'\n').next().unwrap_or_default();
        if line.is_empty() || line.len() as u64 > BYTES_MAX || line.contains(&0) {
            let path = shown(path);
            return Err(Error::Usage(format!(
                "`{path}` holds no passphrase: its first line is it, of 4096 bytes at most"
            )));
        }
        Ok(Self(Zeroizing::new(line.to_vec())))
    }
}

/// Returns the passphrase of a backup. It is called once a backup has shown that it needs one.
pub type AskPassphrase<'a> = dyn Fn() -> Result<Passphrase> + 'a;
