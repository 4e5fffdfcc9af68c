//! The sealed keyring: what stands in an archive. `formats/encryption-v1.md` specifies its bytes.

use std::path::{Path, PathBuf};

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};
use zeroize::Zeroizing;

use super::access::{Interaction, KeyAccess};
use super::age::{self, Failure, FileKind, Recipient, WorkFactor};
use super::keyring::{Keyring, LABEL_BYTES_MAX, Pair, SLOTS_MAX, Slot, SlotKind};
use super::passphrase::Passphrase;
use super::secret::Secret;
use crate::codec::{Decoded, Decoder, Malformed};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::sys::random;

/// The most bytes of a sealed keyring.
pub const SEALED_BYTES_MAX: usize = 48 << 10;
/// The most bytes of a slot.
const SLOT_BYTES_MAX: usize = 8 << 10;
/// The most slots for passphrases: trying one of them takes about a second.
const PASSPHRASES_MAX: usize = 8;
/// The version of its encoding.
const VERSION: u8 = 1;
/// The number of bytes of the hash at its end, which tells damage from a wrong key.
const CHECK: usize = 16;
/// From what the key of the keyring makes the key of its seal.
const CONTEXT: &str = "vmfold 2026 keyring v1";
/// What opens the keyring, and stands in each slot.
type KeyringKey = Secret<32>;

/// By what a new slot is opened.
#[derive(Debug, Clone)]
pub enum Lock {
    /// A passphrase, and how much work it is to try one.
    Passphrase(Passphrase, WorkFactor),
    /// The identity of a recipient.
    Recipient(Recipient),
}

/// A slot that is to be added.
#[derive(Debug, Clone)]
pub struct NewSlot {
    /// What people call it, of 128 bytes at most.
    pub label: String,
    /// By what it is opened.
    pub lock: Lock,
    /// When it is added: seconds since 1970.
    pub added: u64,
}

impl NewSlot {
    /// Makes the slot for the key of a keyring, and what the keyring notes of it.
    fn make(&self, key: &KeyringKey, with: &Interaction<'_>) -> Result<(Vec<u8>, Slot)> {
        let failed = |failure: Failure| {
            error_of(failure, |problem| {
                Error::Usage(format!("cannot add the key `{}`: {problem}", self.label))
            })
        };
        let (file, kind, recipient) = match &self.lock {
            Lock::Passphrase(passphrase, work) => {
                let file = age::seal_with(key.bytes(), passphrase, *work).map_err(failed)?;
                (file, SlotKind::Passphrase, None)
            }
            Lock::Recipient(recipient) => {
                let file = age::seal_to(key.bytes(), recipient, with).map_err(failed)?;
                let kind = match recipient {
                    Recipient::X25519(_) => SlotKind::Recipient,
                    Recipient::Plugin { .. } => SlotKind::Plugin,
                };
                (file, kind, Some(recipient.to_string()))
            }
        };
        if self.label.len() > LABEL_BYTES_MAX {
            return Err(Error::Usage(format!("a label has {LABEL_BYTES_MAX} bytes at most")));
        }
        let slot = Slot {
            label: self.label.clone(),
            kind,
            recipient,
            added: self.added,
        };
        Ok((file, slot))
    }
}

/// A keyring that was opened.
#[derive(Debug, Clone)]
pub struct Unlocked {
    /// It.
    pub keyring: Keyring,
    key: KeyringKey,
}

/// What stands in an archive: the keyring, sealed, and its key once for each slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SealedKeyring {
    /// What people call the archive, for messages.
    path: PathBuf,
    slots: Vec<Vec<u8>>,
    salt: [u8; 16],
    sealed: Vec<u8>,
}

impl SealedKeyring {
    /// Seals a new keyring. It gets the slots that are given, and number 1. `path` is what people call the archive. `access` says how plugins are
    /// found.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no slot, or too many, or one cannot be made; [`Error::KeyProgram`]; [`Error::Io`].
    pub fn create(
        path: &Path,
        keyring: Keyring,
        slots: &[NewSlot],
        access: &KeyAccess,
        monitor: &dyn Monitor,
    ) -> Result<(Self, Unlocked)> {
        let mut sealed = Self {
            path: path.to_owned(),
            slots: Vec::new(),
            salt: [0; 16],
            sealed: Vec::new(),
        };
        let mut unlocked = Unlocked {
            keyring,
            key: Secret::random()?,
        };
        unlocked.keyring.slots.clear();
        for slot in slots {
            sealed.push(&mut unlocked, slot, &access.interaction(monitor))?;
        }
        sealed.seal(&mut unlocked)?;
        Ok((sealed, unlocked))
    }

    /// Decodes a sealed keyring. `path` is what people call the archive.
    ///
    /// # Errors
    /// [`Error::DamagedKeyring`] if it is malformed, or not what was written; [`Error::Unsupported`].
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Self> {
        Self::parse(path, bytes).map_err(|malformed| match malformed {
            Malformed::Damaged(problem) => damaged(path, problem),
            Malformed::Unsupported(problem) => Error::Unsupported {
                path: path.to_owned(),
                problem,
            },
        })
    }

    fn parse(path: &Path, bytes: &[u8]) -> Decoded<Self> {
        if bytes.len() > SEALED_BYTES_MAX {
            return Err("it is longer than allowed".into());
        }
        let (content, check) = bytes.split_last_chunk::<CHECK>().ok_or("it ends too early")?;
        if check_of(content) != *check {
            return Err("it is not what was written".into());
        }
        let mut decoder = Decoder::new(content);
        if decoder.u8()? != VERSION {
            return Err(Malformed::Unsupported("its keyring is of a later version"));
        }
        let count = usize::from(decoder.u8()?);
        if !(1..=SLOTS_MAX).contains(&count) {
            return Err("it has no slots, or more than allowed".into());
        }
        let mut slots = Vec::with_capacity(count);
        for _ in 0..count {
            let length = usize::from(decoder.u16()?);
            if length > SLOT_BYTES_MAX {
                return Err("a slot is longer than allowed".into());
            }
            slots.push(decoder.take(length)?.to_vec());
        }
        let sealed = Self {
            path: path.to_owned(),
            slots,
            salt: decoder.array()?,
            sealed: decoder.take(decoder.left())?.to_vec(),
        };
        if sealed.kinds().filter(|kind| *kind == Ok(FileKind::Passphrase)).count() > PASSPHRASES_MAX {
            return Err("it has more passphrases than allowed".into());
        }
        Ok(sealed)
    }

    /// Encodes it: at most [`SEALED_BYTES_MAX`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.covered();
        bytes.extend(self.salt);
        bytes.extend_from_slice(&self.sealed);
        let check = check_of(&bytes);
        bytes.extend(check);
        bytes
    }

    /// What the seal covers beside the keyring: the version and all slots, as they are encoded.
    fn covered(&self) -> Vec<u8> {
        let mut bytes = vec![VERSION, u8::try_from(self.slots.len()).unwrap_or(u8::MAX)];
        for slot in &self.slots {
            bytes.extend(u16::try_from(slot.len()).unwrap_or(u16::MAX).to_le_bytes());
            bytes.extend_from_slice(slot);
        }
        bytes
    }

    fn kinds(&self) -> impl Iterator<Item = std::result::Result<FileKind, Failure>> + '_ {
        self.slots.iter().map(|slot| age::kind_of(slot))
    }

    /// Checks that every slot can be parsed.
    ///
    /// # Errors
    /// [`Error::DamagedKeyring`] names the first that cannot.
    pub fn check_slots(&self) -> Result<()> {
        for (number, kind) in (1..).zip(self.kinds()) {
            kind.map_err(|failure| damaged(&self.path, &format!("its slot {number} is damaged: {failure}")))?;
        }
        Ok(())
    }

    /// What kinds of keys open its slots, without opening it. A slot that is malformed is left out.
    pub fn slot_kinds(&self) -> impl Iterator<Item = SlotKind> + '_ {
        self.kinds().filter_map(|kind| {
            Some(match kind.ok()? {
                FileKind::Passphrase => SlotKind::Passphrase,
                FileKind::X25519 => SlotKind::Recipient,
                FileKind::Other => SlotKind::Plugin,
            })
        })
    }

    /// Opens it by what the user gave. The user is asked for a passphrase only if nothing else was given, and there is a slot for one.
    ///
    /// # Errors
    /// [`Error::NoKey`] if the user gave none, and cannot be asked; [`Error::WrongKey`] if no slot opens with what was given;
    /// [`Error::DamagedKeyring`]; those of [`KeyAccess`].
    pub fn unlock(&self, access: &KeyAccess, monitor: &dyn Monitor) -> Result<Unlocked> {
        let mut problems = Problems::default();
        for identity in access.identities(monitor)? {
            let with = access.interaction(monitor);
            match age::open_one_of(&self.slots, identity, &with, |failure| problems.note(failure)) {
                Ok(Some(content)) => return self.open(&content),
                Ok(None) => {}
                Err(Failure::Interrupted) => return Err(Error::Interrupted),
                Err(failure) => problems.note(failure),
            }
        }
        if let Some(passphrase) = self.passphrase(access, monitor)? {
            for slot in &self.slots {
                match age::open_with(slot, passphrase, access.given().work_factor_max) {
                    Ok(content) => return self.open(&content),
                    Err(failure) => problems.note(failure),
                }
                if monitor.interrupted() {
                    return Err(Error::Interrupted);
                }
            }
        } else if access.identities(monitor)?.is_empty() {
            return Err(Error::NoKey {
                path: self.path.clone(),
                slots: self.described(),
            });
        }
        Err(problems.error(&self.path, self.described()))
    }

    /// The passphrase to try. Where nothing was given and there is a slot for one, the user is asked.
    fn passphrase<'a>(&self, access: &'a KeyAccess, monitor: &dyn Monitor) -> Result<Option<&'a Passphrase>> {
        let has_slot = self.kinds().any(|kind| kind == Ok(FileKind::Passphrase));
        let question = || format!("Passphrase of `{}`: ", crate::shown::shown(&self.path));
        if access.gives_passphrase() || has_slot && access.identities(monitor)?.is_empty() {
            access.passphrase(&question(), monitor)
        } else {
            Ok(None)
        }
    }

    /// Opens the keyring by what stood in a slot.
    fn open(&self, content: &[u8]) -> Result<Unlocked> {
        let key = content.try_into().map(KeyringKey::of);
        self.open_by(key.map_err(|_| damaged(&self.path, "one of its slots holds no key"))?)
    }

    /// Opens the keyring by its key.
    fn open_by(&self, key: KeyringKey) -> Result<Unlocked> {
        let sealed = Payload {
            msg: &self.sealed,
            aad: &self.covered(),
        };
        let opened = cipher(&key, &self.salt).decrypt(&Nonce::default(), sealed);
        let opened = opened.map_err(|_| damaged(&self.path, "its seal does not fit its key"))?;
        let opened = Zeroizing::new(opened);
        let keyring = Keyring::decode(&opened).map_err(|malformed| match malformed {
            Malformed::Damaged(problem) => damaged(&self.path, problem),
            Malformed::Unsupported(problem) => Error::Unsupported {
                path: self.path.clone(),
                problem,
            },
        })?;
        if keyring.slots.len() != self.slots.len() {
            return Err(damaged(&self.path, "it does not say whom each slot is for"));
        }
        Ok(Unlocked { keyring, key })
    }

    /// Adds a slot. Nobody else's passphrase is needed.
    ///
    /// # Errors
    /// [`Error::Usage`] if there are too many, or it cannot be made; [`Error::KeyProgram`]; [`Error::Io`]. Both keyrings are then as they were.
    pub fn add_slot(
        &mut self,
        unlocked: &mut Unlocked,
        slot: &NewSlot,
        access: &KeyAccess,
        monitor: &dyn Monitor,
    ) -> Result<()> {
        self.change(unlocked, |sealed, unlocked| {
            sealed.push(unlocked, slot, &access.interaction(monitor))
        })
    }

    /// Removes the slot at a place, counted from 0. Whoever could open it can still read what the archive holds, if he kept a copy of it or of
    /// the keys; and what is added later, if he kept the keys. [`SealedKeyring::rotate`] ends the latter.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no such slot, or no other; [`Error::Io`]. Both keyrings are then as they were.
    pub fn remove_slot(&mut self, unlocked: &mut Unlocked, place: usize) -> Result<Slot> {
        let slot = unlocked.keyring.slots.get(place).cloned();
        let slot = slot.ok_or_else(|| Error::Usage(format!("there is no key number {}", place + 1)))?;
        if self.slots.len() == 1 {
            return Err(Error::Usage(
                "this is the only key: without it, nobody could read the archive; add another one first".into(),
            ));
        }
        self.change(unlocked, |sealed, unlocked| {
            sealed.slots.remove(place);
            unlocked.keyring.slots.remove(place);
            Ok(())
        })?;
        Ok(slot)
    }

    /// Gives the keyring a new key and a new pair of seeds, for what is written from now on. Older pairs stay. Recipients keep their slots. A slot
    /// of a passphrase stays if the one at hand opens it; other ones are dropped, and returned.
    ///
    /// The key of ids, the key of indexes and the signing seed stay: whoever had the keyring can still tell whether a block that he knows is in
    /// the archive, and can sign. A caller who wants another signing seed puts it into [`Unlocked::keyring`] before.
    ///
    /// # Errors
    /// [`Error::Usage`] if no slot would be left, or too many seeds; [`Error::Io`]. Both keyrings are then as they were.
    pub fn rotate(
        &mut self,
        unlocked: &mut Unlocked,
        pair: Pair,
        access: &KeyAccess,
        monitor: &dyn Monitor,
    ) -> Result<Vec<Slot>> {
        let passphrase = access.passphrase_at_hand(monitor)?;
        let with = access.interaction(monitor);
        let mut dropped = Vec::new();
        self.change(unlocked, |sealed, unlocked| {
            let files = std::mem::take(&mut sealed.slots);
            let slots = std::mem::take(&mut unlocked.keyring.slots);
            unlocked.key = Secret::random()?;
            unlocked.keyring.pairs.insert(0, pair);
            for (file, slot) in files.iter().zip(slots) {
                match lock_of(&slot, file, passphrase, access)? {
                    Some(lock) => sealed.push(
                        unlocked,
                        &NewSlot {
                            label: slot.label,
                            lock,
                            added: slot.added,
                        },
                        &with,
                    )?,
                    None => dropped.push(slot),
                }
            }
            if sealed.slots.is_empty() {
                return Err(Error::Usage(
                    "no key would be left: give the passphrase of one that shall stay, or add a recipient first".into(),
                ));
            }
            Ok(())
        })?;
        Ok(dropped)
    }

    /// Seals the keyring anew after its caller changed [`Unlocked::keyring`]: signers, or the signing seed. Slots must be as they were.
    ///
    /// # Errors
    /// [`Error::Usage`] if it holds more than allowed; [`Error::Io`]. Both keyrings are then as they were.
    pub fn reseal(&mut self, unlocked: &mut Unlocked) -> Result<()> {
        self.change(unlocked, |_, _| Ok(()))
    }

    /// Changes both keyrings, or none.
    fn change(
        &mut self,
        unlocked: &mut Unlocked,
        change: impl FnOnce(&mut Self, &mut Unlocked) -> Result<()>,
    ) -> Result<()> {
        let (mut sealed, mut open) = (self.clone(), unlocked.clone());
        change(&mut sealed, &mut open)?;
        sealed.seal(&mut open)?;
        *self = sealed;
        *unlocked = open;
        Ok(())
    }

    fn push(&mut self, unlocked: &mut Unlocked, slot: &NewSlot, with: &Interaction<'_>) -> Result<()> {
        let (file, noted) = slot.make(&unlocked.key, with)?;
        self.slots.push(file);
        unlocked.keyring.slots.push(noted);
        Ok(())
    }

    /// Counts the keyring up and seals it. A reader must accept what it made.
    fn seal(&mut self, unlocked: &mut Unlocked) -> Result<()> {
        let next = unlocked.keyring.number.checked_add(1);
        unlocked.keyring.number = next.ok_or_else(|| Error::Usage("the keyring was changed too often".into()))?;
        random::fill(&mut self.salt).map_err(Error::io("get random bytes from", Path::new("/dev/urandom")))?;
        let plain = unlocked.keyring.encode();
        let payload = Payload {
            msg: &plain[..],
            aad: &self.covered(),
        };
        let too_much = |problem: &str| Error::Usage(format!("the keyring would hold more than it can: {problem}"));
        let sealed = cipher(&unlocked.key, &self.salt).encrypt(&Nonce::default(), payload);
        self.sealed = sealed.map_err(|_| too_much("it cannot be sealed"))?;
        let decoded = Self::parse(&self.path, &self.encode()).map_err(|malformed| too_much(malformed.problem()))?;
        let opened = decoded
            .open_by(unlocked.key.clone())
            .map_err(|error| too_much(&error.to_string()))?;
        if decoded != *self || opened.keyring != unlocked.keyring {
            return Err(too_much("it would not come back"));
        }
        Ok(())
    }

    /// Says what opens it: `2 passphrases, 1 recipient`.
    fn described(&self) -> String {
        let count = |wanted: &[FileKind]| {
            let kinds = self.kinds().filter_map(std::result::Result::ok);
            kinds.filter(|kind| wanted.contains(kind)).count()
        };
        let parts = [
            (count(&[FileKind::Passphrase]), "a passphrase", "passphrases"),
            (count(&[FileKind::X25519]), "an identity of age", "identities of age"),
            (
                count(&[FileKind::Other]),
                "an identity of a plugin of age",
                "identities of plugins of age",
            ),
        ];
        let parts = parts.iter().filter(|(count, _, _)| *count > 0);
        let parts: Vec<String> = parts
            .map(|(count, one, several)| match count {
                1 => (*one).to_owned(),
                _ => format!("any of {count} {several}"),
            })
            .collect();
        parts.join(", or ")
    }
}

/// What was wrong with slots that did not open.
#[derive(Debug, Default)]
struct Problems {
    damage: Option<String>,
    too_much: Option<String>,
    program: Option<(String, String)>,
}

impl Problems {
    fn note(&mut self, failure: Failure) {
        match failure {
            Failure::OtherKey | Failure::Interrupted => {}
            Failure::TooMuchWork { .. } => self.too_much = Some(failure.to_string()),
            Failure::Malformed(_) | Failure::Damaged(_) => self.damage = Some(failure.to_string()),
            Failure::Program { name, problem } => self.program = Some((name, problem)),
        }
    }

    /// The error if no slot opened. Whoever holds the key of a damaged slot would look for another key in vain, and so would whoever has a
    /// plugin that failed.
    fn error(self, path: &Path, slots: String) -> Error {
        match self {
            Self {
                damage: Some(problem), ..
            } => damaged(path, &format!("one of its slots is damaged: {problem}")),
            Self {
                program: Some((program, problem)),
                ..
            } => Error::KeyProgram { program, problem },
            Self { too_much, .. } => Error::WrongKey {
                path: path.to_owned(),
                slots,
                problem: too_much,
            },
        }
    }
}

/// The error for a file that is not made.
fn error_of(failure: Failure, other: impl FnOnce(String) -> Error) -> Error {
    match failure {
        Failure::Interrupted => Error::Interrupted,
        Failure::Program { name, problem } => Error::KeyProgram { program: name, problem },
        failure => other(failure.to_string()),
    }
}

/// By what a slot is opened after a rotation; none if that is not at hand.
fn lock_of(slot: &Slot, file: &[u8], passphrase: Option<&Passphrase>, access: &KeyAccess) -> Result<Option<Lock>> {
    let Some(recipient) = &slot.recipient else {
        let fits = |passphrase: &&Passphrase| age::open_with(file, passphrase, access.given().work_factor_max).is_ok();
        let passphrase = passphrase.filter(fits).cloned();
        return Ok(passphrase.map(|passphrase| Lock::Passphrase(passphrase, access.given().work_factor)));
    };
    let recipient = Recipient::parse(recipient)
        .map_err(|problem| Error::Usage(format!("the recipient of the key `{}` {problem}", slot.label)))?;
    Ok(Some(Lock::Recipient(recipient)))
}

fn damaged(path: &Path, problem: &str) -> Error {
    Error::DamagedKeyring {
        path: path.to_owned(),
        problem: problem.to_owned(),
    }
}

/// The hash at the end of a sealed keyring.
fn check_of(content: &[u8]) -> [u8; CHECK] {
    let mut check = [0; CHECK];
    check.copy_from_slice(&blake3::hash(content).as_bytes()[..CHECK]);
    check
}

/// What seals a keyring. Each seal has a salt of its own, and so a key of its own: the nonce is 0.
fn cipher(key: &KeyringKey, salt: &[u8; 16]) -> Aes256Gcm {
    let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
    hasher.update(key.bytes());
    hasher.update(salt);
    let derived = Zeroizing::new(*hasher.finalize().as_bytes());
    Aes256Gcm::new((&*derived).into())
}
