//! `key`: who can open a sealed archive. The keys of an archive are read and appended without reading what is in it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zeroize::Zeroizing;

use super::open_archive::{MakeKeyring, NewKeyring, random};
use crate::archive::commit::Commit;
use crate::archive::keys::{ArchiveKeys, HostKeys, KeyRecord, KeyringSecrets, PairSeeds, Remember, Ring, Unlock};
use crate::archive::newest_keys;
use crate::archive::reader::{Committed, RecordReader};
use crate::archive::record::LaneId;
use crate::archive::seal::SecretKey;
use crate::archive::sealed_end::SealedEnd;
use crate::archive::writer::ArchiveWriter;
use crate::codec::Malformed;
use crate::error::{Error, Result};
use crate::keys::manage::{self, KeyChange, NewKeys};
use crate::keys::{HostCredentials, KeyAccess, Keyring, KeyringPlace, SealedKeyring, Secret};
use crate::monitor::Monitor;
use crate::shown::shown;
use crate::store::{FileStore, Store};

/// The keyring of an archive in a file.
#[derive(Debug)]
pub struct ArchiveKeyring {
    store: Arc<FileStore>,
    path: PathBuf,
    memory: Option<Arc<dyn Remember>>,
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
            memory: None,
        }
    }

    /// Tells something of the archive each time that its keys are changed.
    #[must_use]
    pub fn remembered_by(self, memory: Option<Arc<dyn Remember>>) -> Self {
        Self { memory, ..self }
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

    /// Checks that a changed keyring comes from one of this archive, and from none that is older than the last commit, or than what was seen. Returns
    /// that commit.
    fn check(&self, end: &SealedEnd, keyring: &Keyring, keys: &ArchiveKeys) -> Result<Committed> {
        let (header, stored) = &end.commit;
        let body = keys.open_body(&self.path, end.base.last.offset, header, stored.clone())?;
        let commit = Commit::decode_of(&body, header).map_err(|problem| self.malformed(&problem))?;
        if commit.keyring.is_none_or(|number| number >= keyring.number) {
            let problem = "its keyring is older than its last commit: the KEY record that was there then is gone";
            return Err(self.malformed(&problem.into()));
        }
        let committed = Committed {
            commit,
            location: end.base.last,
            lane: header.lane,
            epoch: header.epoch,
            ..Committed::default()
        };
        let before = keyring.number.saturating_sub(1);
        keys.met(&self.path, std::slice::from_ref(&committed), (Some(before), false))?;
        Ok(committed)
    }

    fn malformed(&self, problem: &Malformed) -> Error {
        Error::Damaged {
            path: self.path.clone(),
            range: None,
            problem: problem.problem().into(),
        }
    }
}

impl KeyringPlace for ArchiveKeyring {
    fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self) -> Result<Vec<u8>> {
        let end = self.end()?;
        let newest = newest_keys::newest(&RecordReader::new(Arc::clone(&self.store) as _)?)?;
        Ok(newest.map_or(end.keys, |newest| newest.record).keyring)
    }

    fn replace(&mut self, keyring: &Keyring, bytes: &[u8]) -> Result<()> {
        let end = self.end()?;
        let malformed = |problem| self.malformed(&problem);
        let ring = Arc::new(Ring::new(&secrets_of(keyring)).map_err(malformed)?);
        let keys = ArchiveKeys::of_ring(Arc::clone(&ring)).remembered_by(self.memory.clone());
        let committed = self.check(&end, keyring, &keys)?;
        // Whoever may only write sees by this which pair is the newest.
        let wraps = ring.wrap_anew((end.base.lane, end.epoch), &end.wraps, &Zeroizing::new(random()?));
        let record = KeyRecord {
            number: keyring.number,
            wraps: wraps.map_err(malformed)?,
            keyring: bytes.to_vec(),
        };
        let mut writer = ArchiveWriter::resume(Arc::clone(&self.store) as _, end.base, end.commit);
        if let Err(error) = writer.put_keys(&record) {
            // The keys that were there are the newest again. If that fails too, what was written is left behind the last commit.
            let _ = self.store.truncate(end.base.length);
            return Err(Error::io("write to", &self.path)(error));
        }
        // It was met before, as it had to be.
        keys.met(&self.path, &[committed], (Some(keyring.number), true))
    }
}

/// Makes credentials by which a host adds to an archive, and cannot read it. They are written to a new file.
///
/// # Errors
/// Those of [`manage::add_host`].
pub fn add_host(
    place: &mut ArchiveKeyring,
    (name, to): (&str, &Path),
    access: &KeyAccess,
    monitor: &dyn Monitor,
) -> Result<KeyChange> {
    let archive = place.lane()?.0;
    let make = |keyring: &Keyring, signing_seed: Secret<32>| {
        let ring = Ring::new(&secrets_of(keyring)).map_err(|problem| Error::Usage(problem.problem().into()))?;
        Ok(HostCredentials {
            archive,
            number: keyring.number,
            name: name.to_owned(),
            pair: ring.newest_public(),
            index_key: keyring.index_key.clone(),
            id_key: keyring.id_key.clone(),
            signing_seed,
            signer: ring.signer(),
        })
    };
    manage::add_host(place, (name, to), make, access, monitor)
}

/// Returns what a host with credentials in a file may seal, and the archive that it may add to.
///
/// # Errors
/// Those of [`HostCredentials::read`]; [`Error::Usage`] if a key makes no sense.
pub fn host_of(credentials: &Path) -> Result<(LaneId, Arc<Ring>)> {
    crate::keys::forbid_core_dumps();
    let read = HostCredentials::read(credentials)?;
    let key = |secret: &Secret<32>| SecretKey::new(*secret.bytes());
    let ring = Ring::of_host(&HostKeys {
        number: read.number,
        pair: read.pair,
        index_key: key(&read.index_key),
        id_key: key(&read.id_key),
        signing_seed: key(&read.signing_seed),
        signer: read.signer,
    });
    let ring = ring.map_err(|problem| Error::Usage(format!("`{}`: {}", shown(credentials), problem.problem())))?;
    Ok((LaneId(read.archive), Arc::new(ring)))
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

    fn check(&self, archive: &Path, keyring: &[u8]) -> Result<()> {
        SealedKeyring::decode(archive, keyring)?.check_slots()
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
