//! Identities: what opens files that were written to a recipient.

use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::{Zeroize, Zeroizing};

use super::header::Stanza;
use super::recipient::{Recipient, X25519, agreed};
use super::{Failure, FileKey, base64, bech32, plugin};
use crate::error::Result as CrateResult;
use crate::keys::secret::Secret;

/// The name under which secrets are written, in capital letters.
const NAME: &str = "age-secret-key-";
/// What the name of an identity of a plugin begins with.
const PLUGIN: &str = "age-plugin-";
/// What a secret begins with, when all hyphens are left out.
const BEGIN: &str = "AGESECRETKEY1";
/// The number of characters that follow: 32 bytes, and the checksum.
const CHARACTERS: usize = 58;

/// What opens files that were written to its recipient.
#[derive(Debug, Clone)]
pub enum Identity {
    /// The secret of an X25519 recipient.
    X25519(Secret<32>),
    /// What a plugin knows a key of its own by.
    Plugin {
        /// The name of the plugin.
        name: String,
        /// The identity as it was given.
        text: Zeroizing<String>,
    },
}

impl Identity {
    /// Parses the identities of a file. Lines that begin with `#` say something about them. Secrets may be typed from paper: in small letters,
    /// with spaces and line breaks anywhere, without the hyphens, and with digits and letters that look alike (`0` and `O`, `1`, `I` and `L`, `8`
    /// and `B`) in the place of each other.
    ///
    /// # Errors
    /// Says what is wrong, as a clause without a subject of its own.
    pub fn parse_all(text: &str) -> Result<Vec<Self>, &'static str> {
        const NONE: &str = "holds no identity: one begins with AGE-SECRET-KEY-1";
        let mut typed = Zeroizing::new(String::with_capacity(text.len()));
        let mut identities = Vec::new();
        for line in text.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
            if line.to_ascii_lowercase().starts_with(PLUGIN) {
                identities.push(Self::of_plugin(line).ok_or("holds an identity of a plugin that is malformed")?);
                continue;
            }
            let characters = line.chars().filter(|c| !c.is_whitespace() && *c != '-');
            typed.extend(characters.map(|c| c.to_ascii_uppercase()));
        }
        let mut rest = typed.as_str();
        while !rest.is_empty() {
            let data = rest.strip_prefix(BEGIN).ok_or(if identities.is_empty() {
                NONE
            } else {
                "holds something behind an identity that is none"
            })?;
            let (data, behind) = data
                .split_at_checked(CHARACTERS)
                .ok_or("holds an identity that is too short: characters are missing")?;
            identities.push(
                Self::typed(data).ok_or("holds an identity with a wrong character: its checksum is another one")?,
            );
            rest = behind;
        }
        if identities.is_empty() {
            Err(NONE)
        } else {
            Ok(identities)
        }
    }

    /// Parses an identity of a plugin, which stands in a line of its own.
    fn of_plugin(line: &str) -> Option<Self> {
        let (name, _) = bech32::decode(line)?;
        let name = name.strip_prefix(PLUGIN)?.strip_suffix('-')?;
        plugin::is_name(name).then(|| Self::Plugin {
            name: name.to_owned(),
            text: Zeroizing::new(line.to_owned()),
        })
    }

    /// Decodes what follows [`BEGIN`].
    fn typed(data: &str) -> Option<Self> {
        let mut text = Zeroizing::new(String::with_capacity(NAME.len() + 1 + CHARACTERS));
        text.push_str(NAME);
        text.push('1');
        // The letters that the alphabet has none of look like those that it has.
        text.extend(data.chars().map(|c| match c.to_ascii_lowercase() {
            'o' => '0',
            'i' | '1' => 'l',
            'b' => '8',
            other => other,
        }));
        let (_, bytes) = bech32::decode(&text)?;
        let mut secret: [u8; 32] = bytes[..].try_into().ok()?;
        let identity = Self::X25519(Secret::of(&secret));
        secret.zeroize();
        Some(identity)
    }
}

/// Makes a new secret of X25519, and who can be written to for it to open that.
///
/// # Errors
/// [`crate::error::Error::Io`] if the system gives no random bytes.
pub(in crate::keys) fn generate() -> CrateResult<(Zeroizing<String>, Recipient)> {
    let secret = Secret::random()?;
    let public = PublicKey::from(&StaticSecret::from(*secret.bytes()));
    let mut text = bech32::encode(NAME, secret.bytes());
    text.make_ascii_uppercase();
    Ok((text, Recipient::X25519(*public.as_bytes())))
}

/// Unwraps the key of a file from a stanza; none if that is for somebody else.
pub(super) fn unwrap(secret: &Secret<32>, stanza: &Stanza) -> Result<Option<FileKey>, Failure> {
    const MALFORMED: Failure = Failure::Malformed("a stanza of X25519 is malformed");
    if stanza.kind() != X25519 {
        return Ok(None);
    }
    let [_, share] = &stanza.arguments[..] else {
        return Err(MALFORMED);
    };
    let share = base64::decode(share.as_bytes()).ok_or(MALFORMED)?;
    let share: [u8; 32] = share[..].try_into().map_err(|_| MALFORMED)?;
    let secret = StaticSecret::from(*secret.bytes());
    let public = PublicKey::from(&secret);
    let wrapping = agreed(&secret, &PublicKey::from(share), &share, public.as_bytes());
    super::unwrap(&wrapping.ok_or(MALFORMED)?, &stanza.body)
}
