//! Keys that are always the same, for archives that tests seal.

use std::path::Path;
use std::sync::Arc;

use crate::archive::keys::{KeyringSecrets, PairSeeds, Unlock};
use crate::archive::seal::SecretKey;
use crate::error::{Error, Result};
use crate::ops::export::{MakeKeyring, NewKeyring, Sealing};

/// A keyring that opens as a whole. In an archive it is named by a byte, and no other opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedKeys {
    /// What all of its secrets are made of.
    pub name: u8,
    /// Its number.
    pub number: u32,
}

impl FixedKeys {
    /// Returns what it holds.
    pub fn secrets(self) -> KeyringSecrets {
        let secret = |what: u8| SecretKey::new([self.name.wrapping_mul(16).wrapping_add(what); 32]);
        KeyringSecrets {
            number: self.number,
            pairs: vec![PairSeeds {
                data: secret(0),
                metadata: secret(1),
            }],
            index_key: secret(2),
            id_key: secret(3),
            signing_seed: secret(4),
            signers: Vec::new(),
        }
    }

    /// Returns how it seals an archive, and opens one that is sealed with it.
    pub fn sealing(self) -> Sealing {
        Sealing {
            unlock: Some(Arc::new(self)),
            new: Some(Arc::new(self)),
            ..Sealing::default()
        }
    }
}

impl Unlock for FixedKeys {
    fn is_given(&self) -> bool {
        true
    }

    fn check(&self, archive: &Path, keyring: &[u8]) -> Result<()> {
        if keyring.len() == 2 {
            return Ok(());
        }
        Err(Error::DamagedKeyring {
            path: archive.to_owned(),
            problem: "it has not two bytes".to_owned(),
        })
    }

    fn unlock(&self, archive: &Path, keyring: &[u8]) -> Result<KeyringSecrets> {
        match keyring {
            [name, number] if *name == self.name => Ok(Self {
                name: self.name,
                number: (*number).into(),
            }
            .secrets()),
            _ => Err(Error::WrongKey {
                path: archive.to_owned(),
                slots: "fixed keys".to_owned(),
                problem: None,
            }),
        }
    }
}

impl MakeKeyring for FixedKeys {
    fn make(&self) -> Result<NewKeyring> {
        Ok(NewKeyring {
            secrets: self.secrets(),
            keyring: vec![self.name, u8::try_from(self.number).unwrap_or(u8::MAX)],
        })
    }
}
