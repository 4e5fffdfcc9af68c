//! `key`: who can open a sealed archive. The keys of an archive are read and appended without reading what is in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::open_archive::{MakeKeyring, NewKeyring};
use crate::archive::keys::{KeyRecord, KeyringSecrets, PairSeeds, Unlock};
use crate::archive::record::LaneId;
use crate::archive::seal::SecretKey;
use crate::archive::sealed_end::SealedEnd;
use crate::archive::writer::ArchiveWriter;
use crate::error::{Error, Result};
use crate::keys::manage::{self, NewKeys};
use crate::keys::{KeyAccess, Keyring, KeyringPlace, SealedKeyring, Secret};
use crate::monitor::Monitor;
use crate::store::{FileStore, Store};

/// The keyring of an archive in a file.
#[derive(Debug)]
pub struct ArchiveKeyring {
    store: Arc<FileStore>,
    path: PathBuf,
}

impl ArchiveKeyring {
    /// Opens an archive to look at its keys.
    ///
    /// # Errors
    /// Those of [`FileStore::open`].
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self::of(FileStore::open(path)?, path))
    }

    /// Opens an archive to change its keys. No other process appends to it meanwhile.
    ///
    /// # Errors
    /// Those of [`FileStore::append_to`]; [`Error::NoSuchPath`] if there is none.
    pub fn open_to_change(path: &Path) -> Result<Self> {
        // What does not exist must not be made.
        drop(FileStore::open(path)?);
        Ok(Self::of(FileStore::append_to(path)?, path))
    }

    fn of(store: FileStore, path: &Path) -> Self {
        Self {
            store: Arc::new(store),
            path: path.to_owned(),
        }
    }

    /// Returns the identity of the archive.
    ///
    /// # Errors
    /// Those of [`SealedEnd::read`].
    pub fn lane(&self) -> Result<LaneId> {
        Ok(self.end()?.base.lane)
    }

    fn end(&self) -> Result<SealedEnd> {
        SealedEnd::read(Arc::clone(&self.store) as _)
    }
}

impl KeyringPlace for ArchiveKeyring {
    fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self) -> Result<Vec<u8>> {
        Ok(self.end()?.keys.keyring)
    }

    fn replace(&mut self, number: u32, bytes: &[u8]) -> Result<()> {
        let end = self.end()?;
        let failed = |error| Error::io("write to", &self.path)(error);
        let mut writer = ArchiveWriter::resume(Arc::clone(&self.store) as _, end.base, end.commit);
        let appended = writer.put_keys(&KeyRecord {
            number,
            wraps: end.wraps,
            keyring: bytes.to_vec(),
        });
        if let Err(error) = appended {
            // The keys that were there are the newest again. If that fails too, what was written is left behind the last commit.
            let _ = self.store.truncate(end.base.length);
            return Err(failed(error));
        }
        Ok(())
    }
}

/// What the user gave to open keyrings, and to make them.
pub struct UserKeys {
    access: KeyAccess,
    new: NewKeys,
    /// The path of the archive, for messages.
    archive: PathBuf,
    /// Seconds since 1970.
    now: u64,
    monitor: Arc<dyn Monitor + Send + Sync>,
}

impl std::fmt::Debug for UserKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserKeys")
            .field("archive", &self.archive)
            .finish_non_exhaustive()
    }
}

impl UserKeys {
    /// Takes what the user gave. `archive` is for messages, and `now` in seconds since 1970.
    pub fn new(
        access: KeyAccess,
        new: NewKeys,
        (archive, now): (PathBuf, u64),
        monitor: Arc<dyn Monitor + Send + Sync>,
    ) -> Self {
        Self {
            access,
            new,
            archive,
            now,
            monitor,
        }
    }
}

impl Unlock for UserKeys {
    fn is_given(&self) -> bool {
        self.access.gives_passphrase() || !self.access.given().identities.is_empty()
    }

    fn unlock(&self, archive: &Path, keyring: &[u8]) -> Result<KeyringSecrets> {
        let sealed = SealedKeyring::decode(archive, keyring)?;
        let unlocked = sealed.unlock(&self.access, &*self.monitor)?;
        Ok(secrets_of(&unlocked.keyring))
    }
}

impl MakeKeyring for UserKeys {
    fn make(&self) -> Result<NewKeyring> {
        let (sealed, unlocked) = manage::create(&self.archive, &self.new, &self.access, self.now, &*self.monitor)?;
        Ok(NewKeyring {
            secrets: secrets_of(&unlocked.keyring),
            keyring: sealed.encode(),
        })
    }
}

fn secrets_of(keyring: &Keyring) -> KeyringSecrets {
    let key = |secret: &Secret<32>| SecretKey::new(*secret.bytes());
    KeyringSecrets {
        number: keyring.number,
        pairs: (keyring.pairs.iter())
            .map(|pair| PairSeeds {
                data: key(&pair.data_seed),
                metadata: key(&pair.meta_seed),
            })
            .collect(),
        index_key: key(&keyring.index_key),
        id_key: key(&keyring.id_key),
        signing_seed: key(&keyring.signing_seed),
        signers: keyring.signers.iter().map(|signer| signer.public).collect(),
    }
}
