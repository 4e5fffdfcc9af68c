//! Files of `age` (age-encryption.org/v1), as far as a keyring needs them: to recipients of X25519 and of plugins, and for a passphrase.
//!
//! This is the format of <https://c2sp.org/age>. The crate `age` would add more to the program than all else that keys need.

mod armor;
pub(super) mod base64;
mod bech32;
mod header;
mod identity;
mod plugin;
mod recipient;
mod stream;

use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};

use header::{Header, Stanza};
pub use identity::Identity;
pub(super) use identity::generate;
pub use recipient::Recipient;

use super::access::Interaction;
use super::passphrase::Passphrase;
use super::secret::Secret;
use crate::sys::random;

/// The key of one file.
type FileKey = Secret<16>;

/// The number of bytes of a file's key that is wrapped: the key, and a tag.
const WRAPPED: usize = 32;

/// Why a file is not opened or made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Failure {
    /// The header does not keep to the format.
    #[error("{0}")]
    Malformed(&'static str),
    /// None of its stanzas is for this key.
    #[error("it is for another key")]
    OtherKey,
    /// The key fits, and the rest is not what was written.
    #[error("{0}")]
    Damaged(&'static str),
    /// Trying a passphrase takes more work and memory than is allowed.
    #[error("its passphrase asks for a work factor of 2^{asked}, and 2^{allowed} is allowed")]
    TooMuchWork {
        /// The logarithm of what it asks for.
        asked: u8,
        /// The logarithm of what is allowed.
        allowed: u8,
    },
    /// A plugin failed.
    #[error("{name}: {problem}")]
    Program {
        /// The name of its program.
        name: String,
        /// What went wrong.
        problem: String,
    },
    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
}

/// How much work it is to try a passphrase: the logarithm of scrypt's N. Its memory is 1 KiB times N.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WorkFactor(u8);

impl WorkFactor {
    /// What new files ask for: 128 MiB. With what age asks for, exports and imports would take more than 256 MiB while a key is derived.
    pub const OF_NEW: Self = Self(17);
    /// The most that is accepted where nothing else is said, which is what age asks for: 256 MiB.
    pub const DEFAULT: Self = Self(18);
    /// The most that is ever accepted: 1 GiB.
    pub const MAX: Self = Self(20);

    /// Makes a work factor of this logarithm, or of [`WorkFactor::MAX`] if it is less.
    pub fn new(logarithm: u8) -> Self {
        Self(logarithm.clamp(1, Self::MAX.0))
    }
}

/// What kind of key opens a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    /// A passphrase.
    Passphrase,
    /// An X25519 identity.
    X25519,
    /// An identity of a plugin, or of a kind that is not known.
    Other,
}

/// Says what kind of key opens a file.
///
/// # Errors
/// [`Failure::Malformed`].
pub(super) fn kind_of(file: &[u8]) -> Result<FileKind, Failure> {
    let (header, _) = parse(file)?;
    Ok(if header.stanzas.iter().any(|stanza| stanza.kind() == SCRYPT) {
        FileKind::Passphrase
    } else if header.stanzas.iter().any(|stanza| stanza.kind() == recipient::X25519) {
        FileKind::X25519
    } else {
        FileKind::Other
    })
}

/// Whether bytes begin as a file of `age` does, or as one that is text.
pub(super) fn is_file(bytes: &[u8]) -> bool {
    bytes.starts_with(header::VERSION) || armor::is_armored(bytes)
}

/// Makes a file for one recipient. Its content has 64 KiB at most.
///
/// # Errors
/// [`Failure::Malformed`] if a recipient or the content cannot be used; those of plugins.
pub(super) fn seal_to(plain: &[u8], recipient: &Recipient, with: &Interaction<'_>) -> Result<Vec<u8>, Failure> {
    seal(plain, |key| recipient.wrap(key, with))
}

/// Makes a file for a passphrase. Its content has 64 KiB at most.
///
/// # Errors
/// [`Failure::Malformed`] if the content cannot be used.
pub(super) fn seal_with(plain: &[u8], passphrase: &Passphrase, work: WorkFactor) -> Result<Vec<u8>, Failure> {
    seal(plain, |key| {
        let mut salt = [0; SCRYPT_SALT];
        random::fill(&mut salt).map_err(|_| NO_RANDOM)?;
        let wrapping = scrypt_key(passphrase, &salt, work.0)?;
        let arguments = [SCRYPT, &base64::encode(&salt), &work.0.to_string()];
        Ok(vec![Stanza::new(&arguments, &wrap(&wrapping, key)?)])
    })
}

/// Opens the first of several files that an identity opens. Returns none if it opens none of them. `problem` is told why others could not be
/// opened that are for this identity, or malformed.
///
/// # Errors
/// [`Failure::Program`] if a plugin fails; [`Failure::Interrupted`].
pub(super) fn open_one_of(
    files: &[Vec<u8>],
    identity: &Identity,
    with: &Interaction<'_>,
    mut problem: impl FnMut(Failure),
) -> Result<Option<Zeroizing<Vec<u8>>>, Failure> {
    let mut parsed = Vec::new();
    for file in files {
        match parse(file) {
            Ok((header, _)) if header.stanzas.iter().any(|stanza| stanza.kind() == SCRYPT) => {}
            Ok(file) => parsed.push(file),
            Err(failure) => problem(failure),
        }
    }
    match identity {
        Identity::X25519(secret) => {
            for (header, payload) in parsed {
                let key = header
                    .stanzas
                    .iter()
                    .find_map(|stanza| identity::unwrap(secret, stanza).transpose());
                match key.transpose().and_then(|key| finish(&header, payload, key)) {
                    Ok(plain) => return Ok(Some(plain)),
                    Err(Failure::OtherKey) => {}
                    Err(failure) => problem(failure),
                }
            }
            Ok(None)
        }
        Identity::Plugin { name, text } => {
            let stanzas: Vec<_> = parsed.iter().map(|(header, _)| header.stanzas.clone()).collect();
            let found = plugin::unwrap(name, text, &stanzas, with)?;
            let opened = found.map(|(number, key)| finish(&parsed[number].0, parsed[number].1, Some(key)));
            opened.transpose().or_else(|failure| {
                problem(failure);
                Ok(None)
            })
        }
    }
}

/// Opens a file by a passphrase, if that takes no more work than allowed.
///
/// # Errors
/// Says why it is not opened.
pub(super) fn open_with(file: &[u8], passphrase: &Passphrase, most: WorkFactor) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let decoded;
    let file = if armor::is_armored(file) {
        decoded = armor::decode(file)?;
        &decoded
    } else {
        file
    };
    let (header, payload) = parse(file)?;
    let stanza = header.stanzas.iter().find(|stanza| stanza.kind() == SCRYPT);
    let stanza = stanza.ok_or(Failure::OtherKey)?;
    let (salt, logarithm) = scrypt_arguments(stanza)?;
    if logarithm > most.0 {
        return Err(Failure::TooMuchWork {
            asked: logarithm,
            allowed: most.0,
        });
    }
    let key = unwrap(&scrypt_key(passphrase, &salt, logarithm)?, &stanza.body)?;
    finish(&header, payload, key)
}

/// The type of a stanza for a passphrase.
const SCRYPT: &str = "scrypt";
const SCRYPT_SALT: usize = 16;
const NO_RANDOM: Failure = Failure::Malformed("the system gives no random bytes");

/// Parses a file, and checks that a stanza for a passphrase stands alone: otherwise whoever knows another key could make a file that passes
/// for one of somebody who knows the passphrase.
fn parse(file: &[u8]) -> Result<(Header<'_>, &[u8]), Failure> {
    let (header, payload) = Header::parse(file)?;
    let is_passphrase = header.stanzas.iter().any(|stanza| stanza.kind() == SCRYPT);
    if is_passphrase && header.stanzas.len() > 1 {
        return Err(Failure::Malformed("a stanza for a passphrase does not stand alone"));
    }
    Ok((header, payload))
}

fn seal(plain: &[u8], wrap: impl FnOnce(&FileKey) -> Result<Vec<Stanza>, Failure>) -> Result<Vec<u8>, Failure> {
    let key = FileKey::random().map_err(|_| NO_RANDOM)?;
    let mut file = header::make(&wrap(&key)?, &key)?;
    file.extend(stream::seal(plain, &key)?);
    Ok(file)
}

/// Opens what follows a header by the key of the file.
fn finish(header: &Header<'_>, payload: &[u8], key: Option<FileKey>) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let key = key.ok_or(Failure::OtherKey)?;
    header.check(&key)?;
    stream::open(payload, &key)
}

/// Decodes the salt of a stanza for a passphrase, and the logarithm of its work factor.
fn scrypt_arguments(stanza: &Stanza) -> Result<([u8; SCRYPT_SALT], u8), Failure> {
    const MALFORMED: Failure = Failure::Malformed("a stanza for a passphrase is malformed");
    let [_, salt, work] = &stanza.arguments[..] else {
        return Err(MALFORMED);
    };
    let salt = base64::decode(salt.as_bytes()).ok_or(MALFORMED)?;
    let salt = salt[..].try_into().map_err(|_| MALFORMED)?;
    let is_number = work.bytes().all(|byte| byte.is_ascii_digit()) && !work.starts_with('0');
    let logarithm = work.parse().ok().filter(|_| is_number).ok_or(MALFORMED)?;
    if stanza.body.len() != WRAPPED {
        return Err(MALFORMED);
    }
    Ok((salt, logarithm))
}

/// Derives the key that wraps a file's key from a passphrase.
fn scrypt_key(passphrase: &Passphrase, salt: &[u8; SCRYPT_SALT], logarithm: u8) -> Result<Secret<32>, Failure> {
    const LABEL: &[u8] = b"age-encryption.org/v1/scrypt";
    const FAILED: Failure = Failure::Malformed("its work factor is impossible");
    let parameters = scrypt::Params::new(logarithm, 8, 1).map_err(|_| FAILED)?;
    let salt = [LABEL, salt].concat();
    Secret::filled(|key| scrypt::scrypt(passphrase.bytes(), &salt, &parameters, key)).map_err(|_| FAILED)
}

/// Derives a key by HKDF-SHA-256.
fn derive(from: &[u8], salt: &[u8], label: &[u8]) -> Secret<32> {
    let derived = Secret::filled(|key| Hkdf::<Sha256>::new(Some(salt), from).expand(label, key));
    // HKDF makes up to 255 hashes' worth of bytes; this is one.
    derived.unwrap_or_else(|_| unreachable!("32 bytes can be derived"))
}

/// Wraps a file's key.
fn wrap(wrapping: &Secret<32>, key: &FileKey) -> Result<Vec<u8>, Failure> {
    let cipher = ChaCha20Poly1305::new(wrapping.bytes().into());
    let wrapped = cipher.encrypt(&Nonce::default(), &key.bytes()[..]);
    wrapped.map_err(|_| Failure::Malformed("its key cannot be wrapped"))
}

/// Unwraps a file's key; none if it was wrapped by another one.
fn unwrap(wrapping: &Secret<32>, wrapped: &[u8]) -> Result<Option<FileKey>, Failure> {
    if wrapped.len() != WRAPPED {
        return Err(Failure::Malformed("a stanza wraps no key of a file"));
    }
    let cipher = ChaCha20Poly1305::new(wrapping.bytes().into());
    let opened = cipher.decrypt(&Nonce::default(), wrapped).map(Zeroizing::new);
    Ok(opened.ok().and_then(|key| Some(Secret::of(key[..].try_into().ok()?))))
}

/// A recipient and an identity of a plugin.
#[cfg(test)]
pub(super) fn texts_of_plugin(name: &str) -> (String, String) {
    let recipient = bech32::encode(&format!("age1{name}"), &[7; 20]).to_string();
    let identity = bech32::encode(&format!("age-plugin-{name}-"), &[7; 20]).to_uppercase();
    (recipient, identity)
}

#[cfg(test)]
mod tests;
