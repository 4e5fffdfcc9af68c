//! The keyring: the secrets of an archive, and who may have them. `formats/encryption-v1.md` specifies its bytes.

use zeroize::Zeroizing;

use super::secret::Secret;
use crate::codec::{Decoded, Decoder, Malformed, put_string, put_varint};
use crate::error::Result;

/// The version of its encoding.
const VERSION: u8 = 1;
/// The most pairs: each rotation adds one.
pub(super) const PAIRS_MAX: usize = 64;
/// The most hosts that are trusted.
pub(super) const SIGNERS_MAX: usize = 256;
/// The most slots.
pub(super) const SLOTS_MAX: usize = 64;
/// The most bytes of a name or label.
pub(super) const LABEL_BYTES_MAX: usize = 128;
/// The most bytes of a recipient. One that resists quantum computers has about 2000.
pub(super) const RECIPIENT_BYTES_MAX: usize = 4096;

/// From what the keys of epochs are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The seed of the key pair for what images hold.
    pub data_seed: Secret<32>,
    /// The seed of the key pair for what describes them.
    pub meta_seed: Secret<32>,
}

impl Pair {
    /// Makes a new pair.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`] if the system gives no random bytes.
    pub fn random() -> Result<Self> {
        Ok(Self {
            data_seed: Secret::random()?,
            meta_seed: Secret::random()?,
        })
    }
}

/// A host whose signatures are trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signer {
    /// Its name.
    pub name: String,
    /// Its public key of Ed25519.
    pub public: [u8; 32],
}

/// What kind of key opens a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SlotKind {
    /// A passphrase.
    Passphrase,
    /// A recipient of `age`: X25519.
    Recipient,
    /// A recipient of a plugin of `age`.
    Plugin,
}

/// What the keyring notes of a slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slot {
    /// What people call it.
    pub label: String,
    /// What kind of key opens it.
    pub kind: SlotKind,
    /// To whom it is written; none for a passphrase.
    pub recipient: Option<String>,
    /// When it was added: seconds since 1970.
    pub added: u64,
}

/// The secrets of an archive, and who may have them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyring {
    /// Counts up with each change, from 1.
    pub number: u32,
    /// When it was made: seconds since 1970. It stays when the keyring is changed.
    pub created: u64,
    /// Pairs of seeds, the newest first. Older ones stay, so that what was written before a rotation can be read. There is one at least.
    pub pairs: Vec<Pair>,
    /// The key of indexes.
    pub index_key: Secret<32>,
    /// The key of block ids.
    pub id_key: Secret<32>,
    /// The seed of the Ed25519 key by which whoever holds the keyring signs.
    pub signing_seed: Secret<32>,
    /// Hosts that are trusted besides.
    pub signers: Vec<Signer>,
    /// Who can open the keyring, in the order of the slots of the sealed one.
    pub slots: Vec<Slot>,
}

impl Keyring {
    /// Makes a keyring with new secrets, and without slots. `created` is in seconds since 1970.
    ///
    /// # Errors
    /// [`crate::error::Error::Io`] if the system gives no random bytes.
    pub fn new(created: u64) -> Result<Self> {
        Ok(Self {
            number: 0,
            created,
            pairs: vec![Pair::random()?],
            index_key: Secret::random()?,
            id_key: Secret::random()?,
            signing_seed: Secret::random()?,
            signers: Vec::new(),
            slots: Vec::new(),
        })
    }

    /// Encodes it. Nothing here checks the limits: who seals it decodes it again.
    pub(super) fn encode(&self) -> Zeroizing<Vec<u8>> {
        const FIXED: usize = 256;
        let text = self.signers.iter().map(|signer| signer.name.len() + 40);
        let slots = self.slots.iter();
        let slots = slots.map(|slot| slot.label.len() + slot.recipient.as_ref().map_or(0, String::len) + 40);
        // A vector that grew would leave copies of secrets behind.
        let capacity = FIXED + 64 * self.pairs.len() + text.chain(slots).sum::<usize>();
        let mut bytes = Zeroizing::new(Vec::with_capacity(capacity));
        bytes.push(VERSION);
        bytes.extend(self.number.to_le_bytes());
        bytes.extend(self.created.to_le_bytes());
        for secret in [&self.index_key, &self.id_key, &self.signing_seed] {
            bytes.extend_from_slice(secret.bytes());
        }
        put_varint(&mut bytes, self.pairs.len() as u64);
        for pair in &self.pairs {
            bytes.extend_from_slice(pair.data_seed.bytes());
            bytes.extend_from_slice(pair.meta_seed.bytes());
        }
        put_varint(&mut bytes, self.signers.len() as u64);
        for signer in &self.signers {
            put_string(&mut bytes, signer.name.as_bytes());
            bytes.extend_from_slice(&signer.public);
        }
        put_varint(&mut bytes, self.slots.len() as u64);
        for slot in &self.slots {
            put_string(&mut bytes, slot.label.as_bytes());
            bytes.push(slot.kind as u8);
            put_string(&mut bytes, slot.recipient.as_deref().unwrap_or_default().as_bytes());
            bytes.extend(slot.added.to_le_bytes());
        }
        bytes
    }

    /// Decodes it.
    pub(super) fn decode(bytes: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(bytes);
        if decoder.u8()? != VERSION {
            return Err(Malformed::Unsupported("its keyring is of a later version"));
        }
        let keyring = Self {
            number: decoder.u32()?,
            created: decoder.u64()?,
            index_key: secret(&mut decoder)?,
            id_key: secret(&mut decoder)?,
            signing_seed: secret(&mut decoder)?,
            pairs: items(&mut decoder, 64, PAIRS_MAX, |decoder| {
                Ok(Pair {
                    data_seed: secret(decoder)?,
                    meta_seed: secret(decoder)?,
                })
            })?,
            signers: items(&mut decoder, 33, SIGNERS_MAX, |decoder| {
                Ok(Signer {
                    name: text(decoder, LABEL_BYTES_MAX)?,
                    public: decoder.array()?,
                })
            })?,
            slots: items(&mut decoder, 11, SLOTS_MAX, slot)?,
        };
        decoder.end()?;
        if keyring.pairs.is_empty() {
            return Err("it has no seeds".into());
        }
        Ok(keyring)
    }
}

fn slot(decoder: &mut Decoder<'_>) -> Decoded<Slot> {
    let label = text(decoder, LABEL_BYTES_MAX)?;
    let kind = match decoder.u8()? {
        0 => SlotKind::Passphrase,
        1 => SlotKind::Recipient,
        2 => SlotKind::Plugin,
        _ => {
            return Err(Malformed::Unsupported(
                "its keyring has a slot of a kind that is not known",
            ));
        }
    };
    let recipient = text(decoder, RECIPIENT_BYTES_MAX)?;
    if recipient.is_empty() != (kind == SlotKind::Passphrase) {
        return Err("a slot has a recipient that does not fit its kind".into());
    }
    Ok(Slot {
        label,
        kind,
        recipient: Some(recipient).filter(|recipient| !recipient.is_empty()),
        added: decoder.u64()?,
    })
}

fn secret(decoder: &mut Decoder<'_>) -> Decoded<Secret<32>> {
    let bytes = decoder.take(32)?;
    Secret::filled(|secret| {
        secret.copy_from_slice(bytes);
        Ok(())
    })
}

fn text(decoder: &mut Decoder<'_>, limit: usize) -> Decoded<String> {
    let text = std::str::from_utf8(decoder.string(limit)?).map_err(|_| "a text in it is no UTF-8")?;
    Ok(text.to_owned())
}

/// Decodes a list of at most `most` items, each of which takes `least` bytes or more.
fn items<'a, T>(
    decoder: &mut Decoder<'a>,
    least: usize,
    most: usize,
    item: impl Fn(&mut Decoder<'a>) -> Decoded<T>,
) -> Decoded<Vec<T>> {
    let count = decoder.count(least)?;
    if count > most {
        return Err("it has more items than allowed".into());
    }
    (0..count).map(|_| item(decoder)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Keyring {
        let slot = |label: &str, kind, recipient: Option<&str>| Slot {
            label: label.into(),
            kind,
            recipient: recipient.map(str::to_owned),
            added: 1_700_000_000,
        };
        Keyring {
            number: 3,
            pairs: vec![Pair::random().unwrap(), Pair::random().unwrap()],
            signers: vec![Signer {
                name: "höst".into(),
                public: [5; 32],
            }],
            slots: vec![
                slot("", SlotKind::Passphrase, None),
                slot("on paper", SlotKind::Recipient, Some("age1a")),
                slot("token", SlotKind::Plugin, Some("age1b1a")),
            ],
            ..Keyring::new(1_800_000_000).unwrap()
        }
    }

    #[test]
    fn a_keyring_comes_back() {
        let keyring = sample();
        let bytes = keyring.encode();
        assert_eq!(Keyring::decode(&bytes).unwrap(), keyring);
        // No reallocation has left a copy of secrets behind.
        assert!(bytes.len() <= bytes.capacity() && bytes.capacity() < bytes.len() + 512);
        for end in 0..bytes.len() {
            assert!(Keyring::decode(&bytes[..end]).is_err(), "{end}");
        }
        assert!(Keyring::decode(&[&bytes[..], b"\0"].concat()).is_err());
        assert!(!format!("{keyring:?}").contains(&format!("{:?}", keyring.id_key.bytes())));
    }

    #[test]
    fn counts_and_lengths_have_limits() {
        let fixed = &sample().encode()[..1 + 4 + 8 + 96];
        let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        let with = |rest: &[&[u8]]| Keyring::decode(&[&[fixed][..], rest].concat().concat()).err();
        let pair = [7; 64];
        assert!(with(&[&[0, 0, 0]]).is_some(), "no pair");
        assert!(with(&[&[1], &pair, &[0, 0]]).is_none());
        assert!(with(&[&huge]).is_some());
        assert!(with(&[&[65], &pair.repeat(65), &[0, 0]]).is_some(), "too many pairs");
        assert!(with(&[&[1], &pair, &huge]).is_some());
        assert!(with(&[&[1], &pair, &[0], &huge]).is_some());
        assert!(
            with(&[&[1], &pair, &[0, 65], &[0; 11].repeat(65)]).is_some(),
            "too many slots"
        );
        let slot = |kind: u8, recipient: &[u8]| {
            let length = u8::try_from(recipient.len()).unwrap();
            with(&[&[1], &pair, &[0, 1, 1, b'a', kind, length], recipient, &[0; 8]])
        };
        assert_eq!(slot(0, b""), None);
        assert_eq!(slot(1, b"age1"), None);
        assert!(slot(0, b"age1").is_some() && slot(1, b"").is_some() && slot(1, b"\xff").is_some());
        assert!(matches!(slot(3, b"age1"), Some(Malformed::Unsupported(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, flips in proptest::collection::vec((0..400usize, 0..8u8), 1..4)) {
            let _ = Keyring::decode(&bytes);
            let mut changed = sample().encode();
            for (place, bit) in flips {
                let place = place % changed.len();
                changed[place] ^= 1 << bit;
            }
            if let Ok(keyring) = Keyring::decode(&changed) {
                prop_assert_eq!(&keyring.encode()[..], &changed[..]);
            }
        }
    }
}
