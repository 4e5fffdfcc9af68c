//! What people do with the keys of an archive: list, add, remove and rotate them, and print a recovery sheet.
//!
//! Each function reads the keyring of a place, opens it, and puts the changed one back. Its caller keeps other writers off the place meanwhile.

use std::fmt::{Display, Formatter};
use std::io::Read;
use std::path::{Path, PathBuf};

use super::KeyringPlace;
use super::access::{KeyAccess, ask_twice};
use super::age::Recipient;
use super::host::HostCredentials;
use super::keyring::{Keyring, LABEL_BYTES_MAX, Pair, Signer, Slot, SlotKind};
use super::passphrase::Passphrase;
use super::sealed::{Lock, NewSlot, SealedKeyring, Unlocked};
use super::secret::Secret;
use super::sheet::{SHEET_LABEL, Sheet, SheetPlace, date_of};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::new_file::NewFile;
use crate::shown::shown;

/// Keys that are to be made, as the user named them.
#[derive(Debug, Clone, Default)]
pub struct NewKeys {
    /// Recipients of `age`.
    pub recipients: Vec<String>,
    /// Files of recipients, one a line.
    pub recipients_files: Vec<PathBuf>,
    /// The file whose first line is the new passphrase, if a key is added to others.
    pub passphrase_file: Option<PathBuf>,
    /// What people call the key, if it is one.
    pub label: Option<String>,
}

impl NewKeys {
    /// The keys of a keyring that is made: all recipients, and a passphrase if one was given or there is no recipient. `now` is in seconds since
    /// 1970.
    fn of_creation(&self, access: &KeyAccess, now: u64, monitor: &dyn Monitor) -> Result<Vec<NewSlot>> {
        let mut locks = self.recipients()?;
        if locks.is_empty() || access.gives_passphrase() {
            let passphrase = access.new_passphrase(monitor)?.clone();
            locks.insert(0, Lock::Passphrase(passphrase, access.given().work_factor));
        }
        self.labelled(locks, now)
    }

    /// The keys that are added to others: all recipients, and a new passphrase if one was given or there is no recipient.
    fn of_addition(&self, access: &KeyAccess, now: u64, monitor: &dyn Monitor) -> Result<Vec<NewSlot>> {
        let mut locks = self.recipients()?;
        let passphrase = match &self.passphrase_file {
            Some(path) => Some(Passphrase::read(path)?),
            None if locks.is_empty() => Some(ask_twice(access.given().prompt, monitor)?),
            None => None,
        };
        locks.extend(passphrase.map(|passphrase| Lock::Passphrase(passphrase, access.given().work_factor)));
        self.labelled(locks, now)
    }

    fn labelled(&self, locks: Vec<Lock>, now: u64) -> Result<Vec<NewSlot>> {
        if locks.len() > 1 && self.label.is_some() {
            return Err(Error::Usage("one name serves one key: add them one by one".into()));
        }
        let slot = |lock: Lock| NewSlot {
            label: self.label.clone().unwrap_or_else(|| label_of(&lock)),
            lock,
            added: now,
        };
        Ok(locks.into_iter().map(slot).collect())
    }

    fn recipients(&self) -> Result<Vec<Lock>> {
        let mut locks = Vec::new();
        for text in &self.recipients {
            locks.push(lock_of(text)?);
        }
        for path in &self.recipients_files {
            let before = locks.len();
            let text = text_of(path)?;
            let lines = text.lines().map(str::trim);
            for line in lines.filter(|line| !line.is_empty() && !line.starts_with('#')) {
                locks.push(lock_of(line)?);
            }
            if locks.len() == before {
                return Err(Error::Usage(format!("`{}` names no recipient", shown(path))));
            }
        }
        Ok(locks)
    }
}

fn lock_of(text: &str) -> Result<Lock> {
    let recipient = Recipient::parse(text);
    // What is wrong may be a secret, which must not stand in a message.
    let parsed = recipient.map_err(|problem| match text.trim().get(..4) {
        Some("age1") => Error::Usage(format!("`{}` {problem}", shown(Path::new(text.trim())))),
        _ => Error::Usage(format!("what was given as a recipient {problem}")),
    });
    parsed.map(Lock::Recipient)
}

/// What a key is called of which people say nothing.
fn label_of(lock: &Lock) -> String {
    const CHARACTERS: usize = 16;
    match lock {
        Lock::Passphrase(..) => "passphrase".into(),
        Lock::Recipient(recipient) => recipient.to_string().chars().take(CHARACTERS).collect(),
    }
}

/// Reads a file of recipients, of 64 KiB at most.
fn text_of(path: &Path) -> Result<String> {
    const BYTES_MAX: u64 = 64 << 10;
    let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
    let mut text = String::new();
    let read = file.take(BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(Error::io("read", path))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(Error::Usage(format!(
            "`{}` is too long to name recipients",
            shown(path)
        )));
    }
    Ok(text)
}

/// Makes the keyring of a new archive, whose path is for messages. Says plainly if there is one key only. `now` is in seconds since 1970.
///
/// # Errors
/// [`Error::Usage`] if a recipient is malformed, or there is nobody to ask for a passphrase; those of [`SealedKeyring::create`].
pub fn create(
    path: &Path,
    new: &NewKeys,
    access: &KeyAccess,
    now: u64,
    monitor: &dyn Monitor,
) -> Result<(SealedKeyring, Unlocked)> {
    super::forbid_core_dumps();
    let slots = new.of_creation(access, now, monitor)?;
    let made = SealedKeyring::create(path, Keyring::new(now)?, &slots, access, monitor)?;
    if slots.len() == 1 {
        monitor.note(&format!(
            "`{}` has one key. If it is lost, everything in the archive is lost: nobody can restore it then. Add another key with vmfold key \
             add, or print one with vmfold key sheet",
            shown(path)
        ));
    }
    Ok(made)
}

/// A key of an archive, for people.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ShownKey {
    /// Its number, from 1.
    pub number: usize,
    /// What people call it; none if the keyring was not opened.
    pub label: Option<String>,
    /// What kind of key it is.
    pub kind: SlotKind,
    /// To whom it is written.
    pub recipient: Option<String>,
    /// The day on which it was added, in UTC.
    pub added: Option<String>,
}

impl ShownKey {
    fn of(number: usize, slot: &Slot) -> Self {
        Self {
            number,
            label: Some(slot.label.clone()),
            kind: slot.kind,
            recipient: slot.recipient.clone(),
            added: Some(date_of(slot.added)),
        }
    }
}

impl Display for ShownKey {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let kind = match self.kind {
            SlotKind::Passphrase => "a passphrase",
            SlotKind::Recipient => "an identity of age",
            SlotKind::Plugin => "an identity of a plugin of age",
        };
        write!(f, "{}: {kind}", self.number)?;
        if let Some(label) = &self.label {
            write!(f, ", `{}`", shown(Path::new(label)))?;
        }
        if let Some(added) = &self.added {
            write!(f, ", added on {added}")?;
        }
        match &self.recipient {
            Some(recipient) => write!(f, ", {}", shown(Path::new(recipient))),
            None => Ok(()),
        }
    }
}

/// The keys of an archive.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct KeyList {
    /// Them.
    pub keys: Vec<ShownKey>,
    /// How often the keyring was changed; none if it was not opened.
    pub number: Option<u32>,
    /// How often keys were rotated.
    pub rotations: Option<usize>,
}

impl Display for KeyList {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for key in &self.keys {
            writeln!(f, "{key}")?;
        }
        match self.rotations {
            None => writeln!(f, "Give one of these keys to see what they are called"),
            Some(0) => Ok(()),
            Some(rotations) => writeln!(f, "Keys were rotated {rotations} times"),
        }
    }
}

/// Lists the keys of an archive. Without a key, it tells what kinds they are; nobody is asked for one.
///
/// # Errors
/// Those of the place, of [`SealedKeyring::decode`], and of [`SealedKeyring::unlock`] if a key was given.
pub fn list(place: &dyn KeyringPlace, access: &KeyAccess, monitor: &dyn Monitor) -> Result<KeyList> {
    let sealed = SealedKeyring::decode(place.path(), &place.read()?)?;
    if !access.gives_passphrase() && access.given().identities.is_empty() {
        let key = |(place, kind)| ShownKey {
            number: place + 1,
            label: None,
            kind,
            recipient: None,
            added: None,
        };
        return Ok(KeyList {
            keys: sealed.slot_kinds().enumerate().map(key).collect(),
            number: None,
            rotations: None,
        });
    }
    let keyring = sealed.unlock(access, monitor)?.keyring;
    let slots = keyring.slots.iter().enumerate();
    Ok(KeyList {
        keys: slots.map(|(place, slot)| ShownKey::of(place + 1, slot)).collect(),
        number: Some(keyring.number),
        rotations: Some(keyring.pairs.len() - 1),
    })
}

/// What became of the keys of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize)]
pub struct KeyChange {
    /// Keys that were added, with the numbers that they have now.
    pub added: Vec<ShownKey>,
    /// Keys that were removed, with the numbers that they had.
    pub removed: Vec<ShownKey>,
    /// Whether new keys protect what is written from now on.
    pub rotated: bool,
    /// The host for which credentials were made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The number of keys that there are now.
    pub keys: usize,
}

impl Display for KeyChange {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for key in &self.added {
            writeln!(f, "Added key {key}")?;
        }
        for key in &self.removed {
            writeln!(f, "Removed key {key}")?;
        }
        if let Some(host) = &self.host {
            writeln!(
                f,
                "Made credentials of the host `{}`. With them, it adds to the archive by vmfold export --write-only. It cannot read what is in it, \
                 not even what it exported itself. Whoever steals them can add commits, and can tell whether a block that he knows is in the \
                 archive.",
                shown(Path::new(host))
            )?;
            return Ok(());
        }
        if self.rotated {
            writeln!(
                f,
                "What is exported from now on is protected by new keys. What was exported before stays as it is: whoever had a key until now \
                 can still read that in any copy of the archive, and can still tell whether a block that he knows is in it."
            )?;
            if !self.removed.is_empty() {
                writeln!(
                    f,
                    "A passphrase that was not given could not be kept: add it again with vmfold key add"
                )?;
            }
        } else if !self.removed.is_empty() {
            writeln!(
                f,
                "Whoever had it can still read what is in the archive now, in any copy of it. If he kept what it opened, he can read what is \
                 exported later, too: vmfold key rotate ends that."
            )?;
        }
        match self.keys {
            1 => writeln!(
                f,
                "There is one key now. If it is lost, everything in the archive is lost."
            ),
            keys => writeln!(f, "There are {keys} keys now."),
        }
    }
}

/// Opens the keyring of a place, has it changed, and puts it back.
fn change(
    place: &mut dyn KeyringPlace,
    access: &KeyAccess,
    monitor: &dyn Monitor,
    change: impl FnOnce(&mut SealedKeyring, &mut Unlocked) -> Result<KeyChange>,
) -> Result<KeyChange> {
    super::forbid_core_dumps();
    let mut sealed = SealedKeyring::decode(place.path(), &place.read()?)?;
    let mut unlocked = sealed.unlock(access, monitor)?;
    let mut changed = change(&mut sealed, &mut unlocked)?;
    place.replace(&unlocked.keyring, &sealed.encode())?;
    changed.keys = unlocked.keyring.slots.len();
    Ok(changed)
}

/// Adds keys to an archive: recipients, or a new passphrase. `now` is in seconds since 1970.
///
/// # Errors
/// As [`SealedKeyring::unlock`] and [`SealedKeyring::add_slot`]; [`Error::Usage`] if a recipient is malformed, or there already; those of the
/// place.
pub fn add(
    place: &mut dyn KeyringPlace,
    new: &NewKeys,
    access: &KeyAccess,
    now: u64,
    monitor: &dyn Monitor,
) -> Result<KeyChange> {
    change(place, access, monitor, |sealed, unlocked| {
        let mut changed = KeyChange::default();
        for slot in new.of_addition(access, now, monitor)? {
            add_slot(sealed, unlocked, &slot, access, monitor, &mut changed)?;
        }
        Ok(changed)
    })
}

fn add_slot(
    sealed: &mut SealedKeyring,
    unlocked: &mut Unlocked,
    slot: &NewSlot,
    access: &KeyAccess,
    monitor: &dyn Monitor,
    changed: &mut KeyChange,
) -> Result<()> {
    if let Lock::Recipient(recipient) = &slot.lock {
        let text = Some(recipient.to_string());
        if let Some(same) = unlocked.keyring.slots.iter().find(|slot| slot.recipient == text) {
            return Err(Error::Usage(format!(
                "this recipient has a key already: `{}`",
                same.label
            )));
        }
    }
    sealed.add_slot(unlocked, slot, access, monitor)?;
    let slots = &unlocked.keyring.slots;
    changed
        .added
        .extend(slots.last().map(|slot| ShownKey::of(slots.len(), slot)));
    Ok(())
}

/// Removes a key of an archive, by its number, its name or its recipient.
///
/// # Errors
/// As [`SealedKeyring::unlock`] and [`SealedKeyring::remove_slot`]; [`Error::Usage`] if there is none, or more than one; those of the place.
pub fn remove(
    place: &mut dyn KeyringPlace,
    which: &str,
    access: &KeyAccess,
    monitor: &dyn Monitor,
) -> Result<KeyChange> {
    change(place, access, monitor, |sealed, unlocked| {
        let found = find(&unlocked.keyring.slots, which)?;
        let removed = sealed.remove_slot(unlocked, found)?;
        Ok(KeyChange {
            removed: vec![ShownKey::of(found + 1, &removed)],
            ..KeyChange::default()
        })
    })
}

/// Finds a slot. A number is one before it is a name.
fn find(slots: &[Slot], which: &str) -> Result<usize> {
    if let Some(place) = which.parse::<usize>().ok().and_then(|number| number.checked_sub(1))
        && place < slots.len()
    {
        return Ok(place);
    }
    let is_it = |slot: &Slot| slot.label == which || slot.recipient.as_deref() == Some(which);
    let mut found = (0..slots.len()).filter(|place| is_it(&slots[*place]));
    let named = shown(Path::new(which));
    match (found.next(), found.next()) {
        (Some(place), None) => Ok(place),
        (None, _) => Err(Error::Usage(format!(
            "there is no key `{named}`: vmfold key list shows what there is"
        ))),
        _ => Err(Error::Usage(format!(
            "several keys are called `{named}`: say its number"
        ))),
    }
}

/// Protects what is written from now on by new keys. Passphrases stay that are at hand; recipients all stay.
///
/// # Errors
/// As [`SealedKeyring::unlock`] and [`SealedKeyring::rotate`]; those of the place.
pub fn rotate(place: &mut dyn KeyringPlace, access: &KeyAccess, monitor: &dyn Monitor) -> Result<KeyChange> {
    change(place, access, monitor, |sealed, unlocked| {
        let before = unlocked.keyring.slots.clone();
        let dropped = sealed.rotate(unlocked, Pair::random()?, access, monitor)?;
        let number = |slot| before.iter().position(|one| one == slot).map_or(0, |place| place + 1);
        Ok(KeyChange {
            removed: dropped.iter().map(|slot| ShownKey::of(number(slot), slot)).collect(),
            rotated: true,
            ..KeyChange::default()
        })
    })
}

/// Makes credentials by which a host adds to an archive, and cannot read it: writes them to a new file, and then has the archive trust what the host
/// signs. `make` makes them of the keyring and of the seed that the host signs with. The archive trusts it from then on for good: it holds commits that it signed.
///
/// # Errors
/// As [`SealedKeyring::unlock`] and [`HostCredentials::write`]; [`Error::Usage`] if the name is too long, or there are too many hosts; those of the
/// place.
pub fn add_host(
    place: &mut dyn KeyringPlace,
    (name, to): (&str, &Path),
    make: impl FnOnce(&Keyring, Secret<32>) -> Result<HostCredentials>,
    access: &KeyAccess,
    monitor: &dyn Monitor,
) -> Result<KeyChange> {
    if name.is_empty() || name.len() > LABEL_BYTES_MAX {
        let problem = format!("a host has a name of at most {LABEL_BYTES_MAX} bytes");
        return Err(Error::Usage(problem));
    }
    let mut written = None;
    let changed = change(place, access, monitor, |sealed, unlocked| {
        let seed = Secret::<32>::random()?;
        unlocked.keyring.signers.push(Signer {
            name: name.to_owned(),
            public: ed25519_dalek::SigningKey::from_bytes(seed.bytes())
                .verifying_key()
                .to_bytes(),
        });
        sealed.reseal(unlocked)?;
        written = Some(make(&unlocked.keyring, seed)?.write(to)?);
        Ok(KeyChange {
            host: Some(name.to_owned()),
            ..KeyChange::default()
        })
    });
    if changed.is_err() {
        // The archive does not trust it.
        written.into_iter().for_each(NewFile::remove);
    }
    changed
}

/// Adds a key to an archive that stands on paper only. `about` is what tells the archive from others, such as the id of its lane. The sheet is
/// written before its key is added: if that fails, the sheet is of no use. `now` is in seconds since 1970.
///
/// # Errors
/// As [`add`] and [`Sheet::write`].
pub fn sheet(
    place: &mut dyn KeyringPlace,
    to: &SheetPlace,
    about: &str,
    access: &KeyAccess,
    now: u64,
    monitor: &dyn Monitor,
) -> Result<KeyChange> {
    let sheet = Sheet::new(place.path(), about, now)?;
    let mut written = None;
    let changed = change(place, access, monitor, |sealed, unlocked| {
        let slot = NewSlot {
            label: SHEET_LABEL.into(),
            lock: Lock::Recipient(sheet.recipient().clone()),
            added: now,
        };
        let mut changed = KeyChange::default();
        add_slot(sealed, unlocked, &slot, access, monitor, &mut changed)?;
        written = Some(sheet.write(to)?);
        Ok(changed)
    });
    match written {
        Some(None) if changed.is_err() => {
            monitor.note("the sheet that was printed is of no use: its key was not added");
        }
        // It opens nothing, and whoever found it would believe that it does.
        Some(Some(file)) if changed.is_err() => file.remove(),
        _ => {}
    }
    changed
}
