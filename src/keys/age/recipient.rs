//! Recipients: to whom a file is written.

use std::fmt::{Display, Formatter};

use x25519_dalek::{PublicKey, StaticSecret};

use super::header::Stanza;
use super::{Failure, FileKey, base64, bech32, derive, plugin, wrap};
use crate::keys::access::Interaction;
use crate::keys::keyring::RECIPIENT_BYTES_MAX;
use crate::keys::secret::Secret;

/// The type of a stanza for such a recipient.
pub(super) const X25519: &str = "X25519";
/// The name under which recipients are written.
const NAME: &str = "age";
/// What the name of a recipient of a plugin begins with.
const PLUGIN: &str = "age1";

/// To whom a file is written: `age1...`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipient {
    /// The holder of an X25519 identity.
    X25519([u8; 32]),
    /// The holder of an identity of a plugin.
    Plugin {
        /// The name of the plugin.
        name: String,
        /// The recipient as it was given.
        text: String,
    },
}

impl Display for Recipient {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::X25519(public) => f.write_str(&bech32::encode(NAME, public)),
            Self::Plugin { text, .. } => f.write_str(text),
        }
    }
}

impl Recipient {
    /// Parses a recipient. Space around it does not count.
    ///
    /// # Errors
    /// Says what is wrong with it, as a clause without a subject of its own.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let text = text.trim();
        if text.starts_with("AGE-SECRET-KEY-") {
            return Err("is a secret key: its recipient begins with age1");
        }
        let (name, bytes) =
            bech32::decode(text).ok_or("is not a recipient: it begins with age1, and it has a checksum")?;
        if text.len() > RECIPIENT_BYTES_MAX {
            return Err("is a recipient that is too long");
        }
        if let Some(plugin) = name.strip_prefix(PLUGIN).filter(|plugin| plugin::is_name(plugin)) {
            return Ok(Self::Plugin {
                name: plugin.to_owned(),
                text: text.to_owned(),
            });
        }
        if name != NAME {
            return Err("is a recipient of a kind that is not known");
        }
        let public = bytes[..].try_into().map_err(|_| "is a recipient of another length")?;
        Ok(Self::X25519(public))
    }

    /// Wraps the key of a file.
    pub(super) fn wrap(&self, key: &FileKey, with: &Interaction<'_>) -> Result<Vec<Stanza>, Failure> {
        match self {
            Self::Plugin { name, text } => plugin::wrap(name, text, key, with),
            Self::X25519(public) => {
                let once = Secret::random().map_err(|_| super::NO_RANDOM)?;
                let once = StaticSecret::from(*once.bytes());
                let share = PublicKey::from(&once);
                let wrapping = agreed(&once, &PublicKey::from(*public), share.as_bytes(), public)
                    .ok_or(Failure::Malformed("a recipient is no point that can be used"))?;
                let arguments = [X25519, &base64::encode(share.as_bytes())];
                Ok(vec![Stanza::new(&arguments, &wrap(&wrapping, key)?)])
            }
        }
    }
}

/// The key that both sides agree on. Returns none if the other side chose a point that gives the same one to everybody.
pub(super) fn agreed(own: &StaticSecret, other: &PublicKey, share: &[u8; 32], public: &[u8; 32]) -> Option<Secret<32>> {
    let shared = own.diffie_hellman(other);
    let salt = [&share[..], public].concat();
    let is_good = shared.was_contributory();
    is_good.then(|| derive(shared.as_bytes(), &salt, b"age-encryption.org/v1/X25519"))
}
