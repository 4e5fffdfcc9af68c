//! The keys of a sealed archive: KEY records, what opens them, and the keys of each epoch, as `formats/encryption-v1.md` specifies them.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use aes_gcm::aead::AeadInOut;
use aes_gcm::{Aes256Gcm, Key, KeyInit, Nonce, Tag};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use x_wing::kem::KeyExport;
use x_wing::{Ciphertext, Decapsulate, DecapsulationKey, Decapsulator, EncapsulationKey};

use super::list::RecordLocation;
use super::manifest::PlanPart;
use super::record::{BlockHasher, EpochId, Hash, LaneId, RecordHeader, RecordKind};
use super::seal::{CLEAR_LENGTH, EpochKeys, KeySlot, SIGNATURE, Salts, Seal, SealedPlace, SecretKey, TAG_BYTES};
use crate::codec::{Decoded, Decoder};
use crate::error::{Error, Result};

/// Bytes that a wrapped key takes: the ciphertext of X-Wing, the key sealed with what that carries, and the tag.
const WRAP_BYTES: usize = x_wing::CIPHERTEXT_SIZE + 32 + TAG_BYTES;
/// Random bytes that wrapping a key takes.
pub const WRAP_RANDOM_BYTES: usize = x_wing::ENCAPSULATION_RANDOMNESS_SIZE;
/// What to say of a sealed record in an archive that is not sealed.
pub(super) const SEALED_IN_PART: &str = "it has sealed records, and is not sealed as a whole";
/// What to say of a record in clear that a sealed archive would have sealed.
pub(super) const IS_CLEAR: &str = "a record of a sealed archive is not sealed";
/// What to say of a sealed archive that has no KEY record which is intact.
pub const KEYS_LOST: &str = "its KEY records are lost, so that no key opens it any more";
/// What keys are derived for.
const WRAP_CONTEXT: &str = "vmfold 2026 epoch key v1";
const COMMIT_CONTEXT: &str = "vmfold 2026 commit v1";
/// The only version of KEY records and of the clear part of sealed COMMITs.
const VERSION: u8 = 1;
/// The way in which epoch keys are wrapped: X-Wing.
const KEM_X_WING: u8 = 1;
/// Bytes of a body of a KEY record, of which it has the least that it fits into: whoever reads from the end finds it.
pub const KEY_BODY_BYTES: [usize; 3] = [16 << 10, 32 << 10, 64 << 10];
const SIGNATURE_BYTES: usize = 64;

/// What only those know whom a sealed archive is for.
#[derive(Clone)]
pub struct KeyringSecrets {
    /// The number of the keyring. It counts up whenever that changes.
    pub number: u32,
    /// The seeds of key pairs, the newest first. Old ones open old epochs.
    pub pairs: Vec<PairSeeds>,
    /// The key of INDEX records.
    pub index_key: SecretKey,
    /// The key of block hashes.
    pub id_key: SecretKey,
    /// The seed of the key that commits are signed with by who has the keyring.
    pub signing_seed: SecretKey,
    /// Others who may sign commits: their Ed25519 keys.
    pub signers: Vec<[u8; 32]>,
}

impl std::fmt::Debug for KeyringSecrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyringSecrets")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

/// The seeds of the X-Wing keys that epoch keys are wrapped to.
#[derive(Clone)]
pub struct PairSeeds {
    /// That of the key for what blocks hold.
    pub data: SecretKey,
    /// That of the key for what is known of images.
    pub metadata: SecretKey,
}

/// Opens keyrings: asks for a passphrase, or reads a key from a file.
pub trait Unlock: std::fmt::Debug + Send + Sync {
    /// Returns whether the user named a key, so that an archive which is not sealed is not the one that he means.
    fn is_given(&self) -> bool;

    /// Checks all of a keyring that can be checked without opening it.
    ///
    /// # Errors
    /// [`Error::DamagedKeyring`]; [`Error::Unsupported`] if a newer version made it.
    fn check(&self, archive: &Path, keyring: &[u8]) -> Result<()>;

    /// Opens the keyring of an archive.
    ///
    /// # Errors
    /// Says that there is no key, that it is the wrong one, or that the keyring is damaged.
    fn unlock(&self, archive: &Path, keyring: &[u8]) -> Result<KeyringSecrets>;
}

/// What tells a sealed archive that was opened, or written, from earlier states of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchiveState {
    /// The archive.
    pub archive: LaneId,
    /// What tells its keyring from others, and says nothing else of it.
    pub keyring: [u8; 16],
    /// The number of its keyring.
    pub keyring_number: u32,
    /// The names of its pairs, the newest first; none where they are not known, as to a host that may only write.
    pub pairs: Vec<PairId>,
    /// Numbers and hashes of commits, ascending, the last one among them.
    pub commits: Vec<(u32, Hash)>,
    /// Whether it was made just now.
    pub is_new: bool,
}

/// Remembers sealed archives.
pub trait Remember: std::fmt::Debug + Send + Sync {
    /// Is told of each archive that is opened with a key, and of each commit that is made.
    ///
    /// # Errors
    /// [`Error::RolledBack`] if the archive is older than it was, or another one, and must not be.
    fn met(&self, archive: &Path, state: &ArchiveState) -> Result<()>;

    /// Is told of an archive that is not sealed, before it is written to.
    ///
    /// # Errors
    /// [`Error::RolledBack`] if a sealed one was in its place, and the user does not accept it.
    fn met_in_clear(&self, archive: &Path) -> Result<()>;
}

/// A keyring that was opened.
pub struct Ring {
    number: u32,
    /// What epoch keys are wrapped to.
    newest: PublicPair,
    /// What opens epochs; nothing if it is that of a host which may only write.
    pairs: Vec<OpenPair>,
    index_key: SecretKey,
    hasher: BlockHasher,
    signing: SigningKey,
    signers: Vec<VerifyingKey>,
}

struct OpenPair {
    id: PairId,
    data: DecapsulationKey,
    metadata: DecapsulationKey,
}

/// What names a pair.
pub type PairId = [u8; 8];

/// The public keys of a pair.
struct PublicPair {
    id: PairId,
    data: EncapsulationKey,
    metadata: EncapsulationKey,
}

/// What a host has that may add to a sealed archive, and not read it.
pub struct HostKeys {
    /// The number of the keyring when it was made.
    pub number: u32,
    /// The public keys of the newest pair, of 1216 bytes each: that for what blocks hold, and that for what is known of images.
    pub pair: [Vec<u8>; 2],
    /// The key of INDEX records.
    pub index_key: SecretKey,
    /// The key of block hashes.
    pub id_key: SecretKey,
    /// The seed of the key that the host signs commits with.
    pub signing_seed: SecretKey,
    /// The key by which those sign who have the keyring.
    pub signer: [u8; 32],
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("number", &self.number)
            .finish_non_exhaustive()
    }
}

impl Ring {
    /// Makes the keys of what a keyring holds.
    ///
    /// # Errors
    /// Says that it has no pair of keys.
    pub fn new(secrets: &KeyringSecrets) -> Decoded<Self> {
        let pairs = secrets.pairs.iter().map(|pair| {
            let (data, metadata) = (
                DecapsulationKey::from(*pair.data),
                DecapsulationKey::from(*pair.metadata),
            );
            OpenPair {
                id: pair_id(data.encapsulation_key(), metadata.encapsulation_key()),
                data,
                metadata,
            }
        });
        let pairs: Vec<OpenPair> = pairs.collect();
        let newest = pairs.first().ok_or("its keyring has no keys")?;
        let signing = SigningKey::from_bytes(&secrets.signing_seed);
        let others = secrets
            .signers
            .iter()
            .filter_map(|key| VerifyingKey::from_bytes(key).ok());
        Ok(Self {
            number: secrets.number,
            newest: PublicPair {
                id: newest.id,
                data: newest.data.encapsulation_key().clone(),
                metadata: newest.metadata.encapsulation_key().clone(),
            },
            pairs,
            index_key: secrets.index_key.clone(),
            hasher: BlockHasher::keyed(secrets.id_key.clone()),
            signers: std::iter::once(signing.verifying_key()).chain(others).collect(),
            signing,
        })
    }

    /// Makes the keys of a host that may only write.
    ///
    /// # Errors
    /// Says that a key makes no sense.
    pub fn of_host(keys: &HostKeys) -> Decoded<Self> {
        let public = |bytes: &[u8]| EncapsulationKey::try_from(bytes).map_err(|_| "a public key makes no sense");
        let (data, metadata) = (public(&keys.pair[0])?, public(&keys.pair[1])?);
        let signing = SigningKey::from_bytes(&keys.signing_seed);
        let owner = VerifyingKey::from_bytes(&keys.signer).map_err(|_| "a public key makes no sense")?;
        Ok(Self {
            number: keys.number,
            newest: PublicPair {
                id: pair_id(&data, &metadata),
                data,
                metadata,
            },
            pairs: Vec::new(),
            index_key: keys.index_key.clone(),
            hasher: BlockHasher::keyed(keys.id_key.clone()),
            signers: vec![signing.verifying_key(), owner],
            signing,
        })
    }

    /// Returns the public keys of the newest pair: that for what blocks hold, and that for what is known of images.
    pub fn newest_public(&self) -> [Vec<u8>; 2] {
        [&self.newest.data, &self.newest.metadata].map(|key| key.to_bytes().to_vec())
    }

    /// Returns the key that those sign with who have the ring.
    pub fn signer(&self) -> [u8; 32] {
        self.signing.verifying_key().to_bytes()
    }

    /// Returns what tells it from others, and says nothing else of it: the first bytes of the hash of nothing under its id key.
    pub fn mark(&self) -> [u8; 16] {
        let mut mark = [0; 16];
        mark.copy_from_slice(&self.hasher.of(b"")[..16]);
        mark
    }

    /// Returns its number.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Returns what names the pair that epoch keys are wrapped to.
    pub fn newest_pair(&self) -> PairId {
        self.newest.id
    }

    /// Returns what hashes blocks.
    pub fn hasher(&self) -> BlockHasher {
        self.hasher.clone()
    }

    /// Returns the hash that the clear part of a COMMIT has of what the index key seals in its epoch: see [`index_hash`]. None if the signature is not of
    /// somebody whom this ring names, or if a former version made it.
    pub(super) fn signed_index(&self, header: &RecordHeader, stored: &[u8]) -> Option<Hash> {
        self.check_signature(header, stored).ok()?.index
    }

    /// Checks who signed a COMMIT, and returns what its clear part says of that.
    fn check_signature(&self, header: &RecordHeader, stored: &[u8]) -> Decoded<CommitSeal> {
        let seal = CommitSeal::decode(stored)?;
        let signer = self.signers.iter().find(|key| signer_id(key) == seal.signer);
        let signer = signer.ok_or("a COMMIT is signed by somebody whom its keyring does not name")?;
        let message = signed(SealedPlace::of(header).as_bytes(), stored);
        signer
            .verify_strict(&message, &Signature::from_bytes(&seal.signature))
            .map_err(|_| "the signature of a COMMIT is wrong: it was forged or changed")?;
        Ok(seal)
    }

    /// Wraps the keys of an epoch anew, to the newest pair, with random bytes.
    ///
    /// # Errors
    /// Says that they do not open, or that a key cannot be wrapped.
    pub fn wrap_anew(
        &self,
        (lane, epoch): (LaneId, EpochId),
        wraps: &Wraps,
        random: &[u8; 2 * WRAP_RANDOM_BYTES],
    ) -> Decoded<Wraps> {
        let keys = self.unwrap(lane, epoch, wraps)?;
        self.wrap((lane, epoch), &keys, random)
    }

    /// Wraps the keys of an epoch to the newest pair.
    fn wrap(
        &self,
        (lane, epoch): (LaneId, EpochId),
        keys: &EpochKeys,
        random: &[u8; 2 * WRAP_RANDOM_BYTES],
    ) -> Decoded<Wraps> {
        let pair = &self.newest;
        let mut decoder = Decoder::new(random);
        let mut wrap = |slot, public: &EncapsulationKey, key: &SecretKey| {
            let random: [u8; WRAP_RANDOM_BYTES] = decoder.array()?;
            wrap_key(public, &random, &wrapped_for(slot, lane, epoch), key)
        };
        Ok(Wraps {
            pair: pair.id,
            data: wrap(KeySlot::Data, &pair.data, &keys.data)?,
            metadata: wrap(KeySlot::Metadata, &pair.metadata, &keys.metadata)?,
        })
    }

    /// Returns the keys of an epoch.
    fn unwrap(&self, lane: LaneId, epoch: EpochId, wraps: &Wraps) -> Decoded<EpochKeys> {
        let pair = self.pairs.iter().find(|pair| pair.id == wraps.pair);
        let pair = pair.ok_or("its keyring lacks the key of an epoch")?;
        let open = |slot, key: &DecapsulationKey, wrap: &[u8; WRAP_BYTES]| {
            let (ciphertext, sealed) = wrap.split_at(x_wing::CIPHERTEXT_SIZE);
            let ciphertext = Ciphertext::try_from(ciphertext).map_err(|_| "a wrapped key makes no sense")?;
            let shared = SecretKey::new(key.decapsulate(&ciphertext).into());
            let (sealed, tag) = sealed.split_at(32);
            let tag: [u8; TAG_BYTES] = tag.try_into().map_err(|_| "a wrapped key makes no sense")?;
            let mut plain = SecretKey::default();
            plain.copy_from_slice(sealed);
            let opened = wrap_cipher(&shared).decrypt_inout_detached(
                &Nonce::default(),
                &wrapped_for(slot, lane, epoch),
                plain.as_mut_slice().into(),
                &Tag::from(tag),
            );
            opened.map_err(|_| "the keys of an epoch do not open: they were changed, or are of another epoch")?;
            Decoded::Ok(plain)
        };
        Ok(EpochKeys {
            data: open(KeySlot::Data, &pair.data, &wraps.data)?,
            metadata: open(KeySlot::Metadata, &pair.metadata, &wraps.metadata)?,
            index: self.index_key.clone(),
        })
    }
}

fn pair_id(data: &EncapsulationKey, metadata: &EncapsulationKey) -> PairId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&data.to_bytes());
    hasher.update(&metadata.to_bytes());
    let mut id = [0; 8];
    hasher.finalize_xof().fill(&mut id);
    id
}

fn wrap_cipher(shared: &SecretKey) -> Aes256Gcm {
    let derived = SecretKey::new(blake3::derive_key(WRAP_CONTEXT, &**shared));
    Aes256Gcm::new(&Key::<Aes256Gcm>::from(*derived))
}

fn wrapped_for(slot: KeySlot, lane: LaneId, epoch: EpochId) -> [u8; 25] {
    let mut place = [0; 25];
    place[0] = slot.number();
    place[1..17].copy_from_slice(&lane.0);
    place[17..].copy_from_slice(&epoch.0.to_le_bytes());
    place
}

/// The keys of an epoch, each wrapped to a public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wraps {
    /// The pair that both are wrapped to.
    pub pair: PairId,
    data: Box<[u8; WRAP_BYTES]>,
    metadata: Box<[u8; WRAP_BYTES]>,
}

impl Wraps {
    /// Bytes of them.
    pub const BYTES: usize = 8 + 2 * WRAP_BYTES;

    fn put(&self, out: &mut Vec<u8>) {
        out.extend(self.pair);
        out.extend(&self.data[..]);
        out.extend(&self.metadata[..]);
    }

    fn decode(decoder: &mut Decoder<'_>) -> Decoded<Self> {
        Ok(Self {
            pair: decoder.array()?,
            data: Box::new(decoder.array()?),
            metadata: Box::new(decoder.array()?),
        })
    }
}

/// What a KEY record holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// The number of its keyring, which is proved once that is opened.
    pub number: u32,
    /// The keys of its epoch.
    pub wraps: Wraps,
    /// The keyring, sealed for those whom the archive is for.
    pub keyring: Vec<u8>,
}

impl KeyRecord {
    /// Returns its body.
    ///
    /// # Errors
    /// Says that the keyring is too long.
    pub fn encode(&self) -> Decoded<Vec<u8>> {
        let mut body = vec![VERSION, KEM_X_WING, 0, 0];
        body.extend(self.number.to_le_bytes());
        body.extend(u32::try_from(self.keyring.len()).unwrap_or(u32::MAX).to_le_bytes());
        self.wraps.put(&mut body);
        body.extend(&self.keyring);
        let length = KEY_BODY_BYTES.into_iter().find(|length| body.len() <= *length);
        body.resize(length.ok_or("its keyring is longer than allowed")?, 0);
        Ok(body)
    }

    /// Decodes a body.
    ///
    /// # Errors
    /// Returns what is malformed, or what this version does not know.
    pub fn decode(body: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(body);
        check_version(&mut decoder)?;
        let number = Some(decoder.u32()?).filter(|number| *number > 0);
        let number = number.ok_or("a keyring has the number 0")?;
        let length = decoder.u32()? as usize;
        let wraps = Wraps::decode(&mut decoder)?;
        let keyring = decoder.take(length)?.to_vec();
        decoder.zeros(decoder.left())?;
        Ok(Self { number, wraps, keyring })
    }
}

fn check_version(decoder: &mut Decoder<'_>) -> Decoded<()> {
    let (version, kem) = (decoder.u8()?, decoder.u8()?);
    if (version, kem) != (VERSION, KEM_X_WING) {
        return Err(crate::codec::Malformed::Unsupported(
            "its keys are wrapped in a way that this version does not know",
        ));
    }
    decoder.zeros(2)
}

/// What a sealed COMMIT has in its clear part beyond what another has: who signed it, and the keys of its epoch.
struct CommitSeal {
    signer: [u8; 8],
    signature: [u8; SIGNATURE_BYTES],
    wraps: Wraps,
    /// The [`index_hash`] of its epoch; none where a former version made it.
    index: Option<Hash>,
}

const _: () = assert!(
    SIGNATURE.start == super::commit::CLEAR_BYTES + 4 + 8 && SIGNATURE.end - SIGNATURE.start == SIGNATURE_BYTES
);

impl CommitSeal {
    fn put(&self, clear: &mut Vec<u8>) {
        clear.extend([VERSION, KEM_X_WING, 0, 0]);
        clear.extend(self.signer);
        clear.extend(self.signature);
        self.wraps.put(clear);
        clear.extend(self.index.iter().flatten());
    }

    fn decode(commit: &[u8]) -> Decoded<Self> {
        let clear = commit.get(..super::seal::clear_bytes(commit)?).unwrap_or_default();
        let mut decoder = Decoder::new(clear);
        decoder.take(super::commit::CLEAR_BYTES)?;
        check_version(&mut decoder)?;
        Ok(Self {
            signer: decoder.array()?,
            signature: decoder.array()?,
            wraps: Wraps::decode(&mut decoder)?,
            index: decoder.array().ok(),
        })
    }
}

/// Returns the hash that the clear part of a COMMIT has of the records of its epoch which the index key seals. By it, whoever may only write tells them
/// from records that somebody else who has that key put there: what the COMMIT lists is sealed for him.
pub fn index_hash<'a>(records: impl Iterator<Item = &'a RecordLocation>) -> Hash {
    let mut hasher = blake3::Hasher::new();
    let is_indexed = |record: &&RecordLocation| {
        let announces = record.kind == RecordKind::Plan && record.part == PlanPart::Blocks.number();
        record.kind == RecordKind::Index || announces
    };
    for record in records.filter(is_indexed) {
        hasher.update(&record.body_hash);
    }
    *hasher.finalize().as_bytes()
}

/// Returns the keys of its epoch that a sealed COMMIT has in its clear part.
///
/// # Errors
/// Returns what is malformed.
pub fn wraps_of(stored_commit: &[u8]) -> Decoded<Wraps> {
    Ok(CommitSeal::decode(stored_commit)?.wraps)
}

fn signer_id(key: &VerifyingKey) -> [u8; 8] {
    let mut id = [0; 8];
    id.copy_from_slice(&blake3::hash(key.as_bytes()).as_bytes()[..8]);
    id
}

/// What the signature of a COMMIT is of: its place, and the whole body as it is stored, with zeros for the signature.
fn signed(place: &[u8], stored: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(COMMIT_CONTEXT);
    hasher.update(place);
    let (before, rest) = stored.split_at(SIGNATURE.start.min(stored.len()));
    hasher.update(before);
    hasher.update(&[0; SIGNATURE_BYTES]);
    hasher.update(rest.get(SIGNATURE_BYTES..).unwrap_or_default());
    *hasher.finalize().as_bytes()
}

/// The keys of an archive that is read. Without a keyring, only what is clear can be read.
#[derive(Debug, Default)]
pub struct ArchiveKeys {
    unlock: Option<Arc<dyn Unlock>>,
    memory: Option<Arc<dyn Remember>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ring: Option<Arc<Ring>>,
    /// The KEY record that the ring is of.
    keyring: Option<Arc<KeyRecord>>,
    epochs: HashMap<(LaneId, EpochId), Arc<EpochKeys>>,
}

impl ArchiveKeys {
    /// Makes keys that something opens once they are needed.
    pub fn opened_by(unlock: Arc<dyn Unlock>) -> Self {
        Self {
            unlock: Some(unlock),
            ..Self::default()
        }
    }

    /// Tells something of each archive that is opened with these keys.
    #[must_use]
    pub fn remembered_by(self, memory: Option<Arc<dyn Remember>>) -> Self {
        Self { memory, ..self }
    }

    /// Tells what remembers archives of commits of a lane, ascending, the last one among them; of the number of the keyring that the archive has, if it is not
    /// the one that is open; and whether the archive is new.
    ///
    /// # Errors
    /// Those of [`Remember::met`].
    pub fn met(
        &self,
        archive: &Path,
        commits: &[super::reader::Committed],
        (number, is_new): (Option<u32>, bool),
    ) -> Result<()> {
        let (Some(memory), Some(ring), Some(last)) = (&self.memory, self.ring(), commits.last()) else {
            return Ok(());
        };
        let commits = commits.iter();
        let state = ArchiveState {
            archive: last.lane,
            keyring: ring.mark(),
            keyring_number: number.unwrap_or(ring.number),
            pairs: ring.pairs.iter().map(|pair| pair.id).collect(),
            commits: commits
                .map(|one| (one.commit.number.0, one.location.body_hash))
                .collect(),
            is_new,
        };
        memory.met(archive, &state)
    }

    /// Makes keys of a keyring that is open.
    pub fn of_ring(ring: Arc<Ring>) -> Self {
        Self {
            state: Mutex::new(State {
                ring: Some(ring),
                ..State::default()
            }),
            ..Self::default()
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns whether the user named no key, so that only what is clear can be read.
    pub fn is_missing(&self) -> bool {
        !self.unlock.as_ref().is_some_and(|unlock| unlock.is_given())
    }

    /// Fails if the user named a key, and none of the records so far was sealed: whoever can write to where archives lie could otherwise put one of
    /// his own there.
    ///
    /// # Errors
    /// [`Error::NotSealed`].
    pub fn check_sealed(&self, archive: &Path) -> Result<()> {
        if self.ring().is_none() && self.unlock.as_ref().is_some_and(|unlock| unlock.is_given()) {
            return Err(Error::NotSealed {
                path: archive.to_owned(),
            });
        }
        Ok(())
    }

    /// Fails if the keyring is older than a commit says that it was.
    ///
    /// # Errors
    /// Says so.
    pub fn check_current(&self, commit: &super::commit::Commit) -> Decoded<()> {
        let number = self.ring().map(|ring| ring.number);
        if commit.keyring > number {
            return Err("its keyring is older than a commit: another KEY record was there when that was made".into());
        }
        Ok(())
    }

    /// Returns the keyring, once it is open.
    pub fn ring(&self) -> Option<Arc<Ring>> {
        self.state().ring.clone()
    }

    /// Returns the KEY record that the keyring is of, once it is open.
    pub fn key_record(&self) -> Option<Arc<KeyRecord>> {
        self.state().keyring.clone()
    }

    /// Returns what hashes blocks in this archive.
    pub fn hasher(&self) -> BlockHasher {
        self.state()
            .ring
            .as_ref()
            .map_or_else(BlockHasher::default, |ring| ring.hasher.clone())
    }

    /// Opens the keyring of a KEY record, unless one with this number or a later one is open.
    ///
    /// # Errors
    /// [`Error::NoKey`] if there is no key; those of [`Unlock::unlock`]; [`Error::Damaged`] where the number is another.
    pub fn open(&self, archive: &Path, record: &KeyRecord) -> Result<()> {
        if self
            .state()
            .ring
            .as_ref()
            .is_some_and(|ring| ring.number >= record.number)
        {
            return Ok(());
        }
        let unlock = self.unlock.as_ref().ok_or_else(|| no_key(archive))?;
        let secrets = unlock.unlock(archive, &record.keyring)?;
        let damaged = |problem: &str| Error::Damaged {
            path: archive.to_owned(),
            range: None,
            problem: problem.to_owned(),
        };
        check_number(archive, &secrets, record)?;
        let ring = Ring::new(&secrets).map_err(|malformed| damaged(malformed.problem()))?;
        let mut state = self.state();
        state.ring = Some(Arc::new(ring));
        state.keyring = Some(Arc::new(record.clone()));
        Ok(())
    }

    /// Keeps the keys of an epoch, which a KEY record of it wraps.
    ///
    /// # Errors
    /// Says that they do not open.
    pub fn learn(&self, lane: LaneId, epoch: EpochId, wraps: &Wraps) -> Decoded<()> {
        let Some(ring) = self.ring() else { return Ok(()) };
        if self.epoch(lane, epoch).is_none() {
            let keys = ring.unwrap(lane, epoch, wraps)?;
            self.state().epochs.insert((lane, epoch), Arc::new(keys));
        }
        Ok(())
    }

    /// Checks that the wrapped keys of an epoch open, and are those that its records open with.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check_wraps(&self, lane: LaneId, epoch: EpochId, wraps: &Wraps) -> Decoded<()> {
        let Some(ring) = self.ring() else { return Ok(()) };
        let keys = ring.unwrap(lane, epoch, wraps)?;
        match self.epoch(lane, epoch) {
            Some(known) if known.data != keys.data || known.metadata != keys.metadata => {
                Err("it has other keys than another record of its epoch".into())
            }
            _ => Ok(()),
        }
    }

    /// Checks all of a keyring that can be checked without opening it, if what opens keyrings is known.
    ///
    /// # Errors
    /// Those of [`Unlock::check`].
    pub fn check_closed(&self, archive: &Path, record: &KeyRecord) -> Result<()> {
        let unlock = self.unlock.as_ref();
        unlock.map_or(Ok(()), |unlock| unlock.check(archive, &record.keyring))
    }

    /// Checks that a keyring opens as well as the open one, which has the same number.
    ///
    /// # Errors
    /// Those of [`Unlock::unlock`]; [`Error::Damaged`] where it has another number.
    pub fn check_opens(&self, archive: &Path, record: &KeyRecord) -> Result<()> {
        let Some(unlock) = &self.unlock else { return Ok(()) };
        let secrets = unlock.unlock(archive, &record.keyring)?;
        check_number(archive, &secrets, record)
    }

    /// Returns the keys of an epoch, if they are known.
    pub fn epoch(&self, lane: LaneId, epoch: EpochId) -> Option<Arc<EpochKeys>> {
        self.state().epochs.get(&(lane, epoch)).cloned()
    }

    /// Checks who signed a COMMIT, and keeps the keys of its epoch.
    ///
    /// # Errors
    /// Says that nobody signed it who may, or that its keys do not open.
    pub fn learn_commit(&self, header: &RecordHeader, stored: &[u8]) -> Decoded<()> {
        let Some(ring) = self.ring() else { return Ok(()) };
        let seal = ring.check_signature(header, stored)?;
        self.learn(header.lane, header.epoch, &seal.wraps)
    }

    /// Checks that the keyring which is open now is one of the archive's: that it names who signed a COMMIT, and opens the keys of its epoch. Whoever
    /// knows only recipients cannot make one that does.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn prove_commit(&self, header: &RecordHeader, stored: &[u8]) -> Decoded<()> {
        let Some(ring) = self.ring() else { return Ok(()) };
        let seal = ring.check_signature(header, stored)?;
        ring.unwrap(header.lane, header.epoch, &seal.wraps).map(drop)
    }

    /// Opens a body. A record that its archive would have sealed is refused if it is not.
    ///
    /// # Errors
    /// [`Error::NoKey`] if there is no key; [`Error::Damaged`] where it does not open.
    pub fn open_body(&self, archive: &Path, offset: u64, header: &RecordHeader, stored: Vec<u8>) -> Result<Vec<u8>> {
        let damaged = |malformed: crate::codec::Malformed| {
            Error::damaged(archive, offset, header.body_bytes, malformed.problem())
        };
        let Some(seal) = header.seal else {
            let is_forged = KeySlot::of(header.kind).is_some() && self.ring().is_some();
            return if is_forged {
                Err(damaged(IS_CLEAR.into()))
            } else {
                Ok(stored)
            };
        };
        if self.ring().is_none() {
            // Whoever meets a sealed COMMIT has looked for KEY records, and had the first that there was opened.
            return Err(if header.kind == RecordKind::Commit {
                damaged(KEYS_LOST.into())
            } else {
                Error::Unsupported {
                    path: archive.to_owned(),
                    problem: SEALED_IN_PART,
                }
            });
        }
        if header.kind == RecordKind::Commit {
            self.learn_commit(header, &stored).map_err(damaged)?;
        }
        if let Some(ring) = self.ring().filter(|_| seal.slot == KeySlot::Index) {
            return super::seal::open_indexed(&ring.index_key, header, stored).map_err(damaged);
        }
        let keys = self.epoch(header.lane, header.epoch);
        let keys = keys.ok_or_else(|| damaged("the keys of its epoch are lost".into()))?;
        super::seal::open_body(&keys, header, seal, stored).map_err(damaged)
    }
}

fn check_number(archive: &Path, secrets: &KeyringSecrets, record: &KeyRecord) -> Result<()> {
    if secrets.number == record.number {
        return Ok(());
    }
    Err(Error::Damaged {
        path: archive.to_owned(),
        range: None,
        problem: "its keyring has another number than its KEY record says".to_owned(),
    })
}

fn no_key(archive: &Path) -> Error {
    Error::NoKey {
        path: archive.to_owned(),
        slots: "a passphrase or an identity".to_owned(),
    }
}

/// Seals the records of one epoch.
pub struct EpochSealer {
    keys: EpochKeys,
    salts: Salts,
    record: KeyRecord,
    signing: SigningKey,
}

impl std::fmt::Debug for EpochSealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EpochSealer").finish_non_exhaustive()
    }
}

impl EpochSealer {
    /// Random bytes that an epoch takes.
    pub const RANDOM_BYTES: usize = 3 * 32 + 2 * WRAP_RANDOM_BYTES;

    /// Makes the keys of an epoch from random bytes, and wraps them to the newest pair of a keyring. The keyring has a number, and stands in KEY records
    /// as these bytes.
    ///
    /// # Errors
    /// Says that a key cannot be wrapped.
    pub fn new(
        ring: &Ring,
        (number, keyring): (u32, Vec<u8>),
        (lane, epoch): (LaneId, EpochId),
        random: &zeroize::Zeroizing<[u8; Self::RANDOM_BYTES]>,
    ) -> Decoded<Self> {
        let mut decoder = Decoder::new(&random[..]);
        let mut key = || Decoded::Ok(SecretKey::new(decoder.array()?));
        let (data, metadata, seed) = (key()?, key()?, key()?);
        let keys = EpochKeys {
            data,
            metadata,
            index: ring.index_key.clone(),
        };
        let wraps = ring.wrap((lane, epoch), &keys, &decoder.array()?)?;
        Ok(Self {
            keys,
            salts: Salts::new(seed),
            record: KeyRecord { number, wraps, keyring },
            signing: ring.signing.clone(),
        })
    }

    /// Returns the number of the keyring.
    pub fn keyring_number(&self) -> u32 {
        self.record.number
    }

    /// Returns the body of the epoch's KEY record.
    ///
    /// # Errors
    /// Says that its keyring is too long.
    pub fn key_body(&self) -> Decoded<Vec<u8>> {
        self.record.encode()
    }

    /// Seals the body of a PLAN, LIST or INDEX with the key of a slot.
    ///
    /// # Errors
    /// Says that it is too long.
    pub fn seal(
        &mut self,
        (kind, slot): (RecordKind, KeySlot),
        (lane, epoch): (LaneId, EpochId),
        body: &[u8],
    ) -> Decoded<Vec<u8>> {
        let seal = Seal::with(slot);
        let place = SealedPlace::of_new(kind, seal, lane, epoch);
        super::seal::seal_body(&self.keys, seal, place, &mut self.salts, body)
    }

    /// Seals a PACK of these parts to so many bytes.
    ///
    /// # Errors
    /// Says that it is too long.
    pub fn seal_pack<'f>(
        &mut self,
        (lane, epoch): (LaneId, EpochId),
        table: &[u8],
        frames: impl Iterator<Item = &'f [u8]>,
        length: usize,
    ) -> Decoded<Vec<u8>> {
        let seal = Seal::with(KeySlot::Data);
        let place = SealedPlace::of_new(RecordKind::Pack, seal, lane, epoch);
        super::seal::seal_pack(&self.keys, place, &mut self.salts, table, frames, length)
    }

    /// Seals and signs a COMMIT. `index` is the [`index_hash`] of what its epoch has.
    ///
    /// # Errors
    /// Says that it is too long.
    pub fn seal_commit(&mut self, (lane, epoch): (LaneId, EpochId), body: &[u8], index: &Hash) -> Decoded<Vec<u8>> {
        let clear_bytes = super::seal::clear_bytes(body)?;
        let (clear, payload) = body.split_at(clear_bytes);
        let mut clear = clear.to_vec();
        let commit_seal = CommitSeal {
            signer: signer_id(&self.signing.verifying_key()),
            signature: [0; SIGNATURE_BYTES],
            wraps: self.record.wraps.clone(),
            index: Some(*index),
        };
        commit_seal.put(&mut clear);
        let length = u32::try_from(clear.len()).map_err(|_| "a COMMIT is too long")?;
        clear[CLEAR_LENGTH].copy_from_slice(&length.to_le_bytes());
        let seal = Seal::with(KeySlot::Metadata);
        let place = SealedPlace::of_new(RecordKind::Commit, seal, lane, epoch);
        let mut stored = super::seal::seal_behind(&self.keys, seal, place, &mut self.salts, &clear, payload)?;
        let signature = self.signing.sign(&signed(place.as_bytes(), &stored));
        stored[SIGNATURE].copy_from_slice(&signature.to_bytes());
        Ok(stored)
    }
}

fn wrap_key(
    public: &EncapsulationKey,
    random: &[u8; WRAP_RANDOM_BYTES],
    place: &[u8],
    key: &SecretKey,
) -> Decoded<Box<[u8; WRAP_BYTES]>> {
    let (ciphertext, shared) = public.encapsulate_deterministic(&(*random).into());
    let shared = SecretKey::new(shared.into());
    let mut wrap = Box::new([0; WRAP_BYTES]);
    let (kem, rest) = wrap.split_at_mut(x_wing::CIPHERTEXT_SIZE);
    kem.copy_from_slice(&ciphertext);
    let (sealed, tag) = rest.split_at_mut(32);
    sealed.copy_from_slice(&**key);
    let made = wrap_cipher(&shared).encrypt_inout_detached(&Nonce::default(), place, sealed.into());
    let made: [u8; TAG_BYTES] = made.map_err(|_| "a key cannot be wrapped")?.into();
    tag.copy_from_slice(&made);
    Ok(wrap)
}
