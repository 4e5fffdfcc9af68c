//! Files that `scrypt enc` writes: `FORMAT` of Tarsnap's scrypt. A key is derived from a passphrase; the content is encrypted by AES-256 in counter
//! mode, and authenticated as a whole. Parameters come before anything is authenticated, so they are bounded before they are used.

use std::collections::VecDeque;

use aes::Aes256;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use crate::foreign::array;

/// Bytes before the content.
pub(super) const HEADER_BYTES: usize = 96;
/// Bytes behind the content.
pub(super) const TAG_BYTES: usize = 32;
/// Bytes of a salt.
pub(super) const SALT_BYTES: usize = 32;
const MAGIC: &[u8] = b"scrypt\0";
const LOG_N_MAX: u8 = 22;
const R_MAX: u32 = 32;
const P_MAX: u32 = 1024;
/// The greatest cost of one derivation, as `4 N r p`: about 150 s of one core.
const COST_MAX: u64 = 1 << 30;

/// How a key is derived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Parameters {
    log_n: u8,
    r: u32,
    p: u32,
}

impl Parameters {
    /// Bytes of memory that deriving a key takes.
    pub(super) fn memory_bytes(self) -> u64 {
        (128 * u64::from(self.r)) << self.log_n
    }

    /// How long it takes, in the unit of `COST_MAX`.
    pub(super) fn cost(self) -> u64 {
        (4 * u64::from(self.r) * u64::from(self.p)) << self.log_n
    }
}

/// The header of a file.
#[derive(Debug, Clone)]
pub(super) struct Header {
    bytes: [u8; HEADER_BYTES],
    pub(super) parameters: Parameters,
}

/// The keys of a file.
pub(super) struct Keys(Zeroizing<[u8; 64]>);

/// What is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It is not as it was written.
    Damaged(&'static str),
    /// It asks for more than vmfold gives.
    Refused(String),
    /// The passphrase is another one.
    Passphrase,
}

impl Header {
    /// Reads a header, and refuses parameters that take more than `memory_bytes`, or more time than anyone would choose.
    pub(super) fn read(bytes: &[u8; HEADER_BYTES], memory_bytes: u64) -> Result<Self, Wrong> {
        if !bytes.starts_with(MAGIC) {
            return Err(Wrong::Damaged("a part is not encrypted by scrypt"));
        }
        if Sha256::digest(&bytes[..48])[..16] != bytes[48..64] {
            return Err(Wrong::Damaged("the header of a part has another hash"));
        }
        let (log_n, r, p) = (
            bytes[7],
            u32::from_be_bytes(array(bytes, 8)),
            u32::from_be_bytes(array(bytes, 12)),
        );
        let is_allowed = (1..=LOG_N_MAX).contains(&log_n) && (1..=R_MAX).contains(&r) && (1..=P_MAX).contains(&p);
        let parameters = Parameters { log_n, r, p };
        if !is_allowed || parameters.cost() > COST_MAX {
            return Err(Wrong::Refused(format!(
                "its keys are derived by scrypt with N = 2^{log_n}, r = {r} and p = {p}, which takes longer than vmfold waits"
            )));
        }
        if parameters.memory_bytes() > memory_bytes {
            return Err(Wrong::Refused(format!(
                "deriving its keys takes {} of memory, and {} are allowed: see --kdf-memory",
                crate::shown::size(parameters.memory_bytes()),
                crate::shown::size(memory_bytes)
            )));
        }
        Ok(Self {
            bytes: *bytes,
            parameters,
        })
    }

    /// Derives the keys from a passphrase.
    pub(super) fn keys(&self, passphrase: &[u8]) -> Result<Keys, Wrong> {
        let keys = derive(self.parameters, &self.bytes[16..48], passphrase)?;
        let mut mac = keys.mac();
        mac.update(&self.bytes[..64]);
        if mac.verify_slice(&self.bytes[64..]).is_err() {
            return Err(Wrong::Passphrase);
        }
        Ok(keys)
    }

    /// The bytes that it was read from.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Decrypts what follows the header, in its place, once all of it is authenticated.
    pub(super) fn open(&self, keys: &Keys, body: &mut Vec<u8>) -> Result<(), Wrong> {
        let damaged = || Wrong::Damaged("a part is not what was encrypted");
        let length = body.len().checked_sub(TAG_BYTES).ok_or_else(damaged)?;
        let mut mac = keys.mac();
        mac.update(&self.bytes);
        mac.update(&body[..length]);
        mac.verify_slice(&body[length..]).map_err(|_| damaged())?;
        body.truncate(length);
        keys.apply_keystream(body);
        Ok(())
    }
}

/// Derives the keys of a file from its salt and a passphrase.
fn derive(parameters: Parameters, salt: &[u8], passphrase: &[u8]) -> Result<Keys, Wrong> {
    let wrong = || Wrong::Damaged("a part has wrong parameters");
    let Parameters { log_n, r, p } = parameters;
    let parameters = scrypt::Params::new(log_n, r, p).map_err(|_| wrong())?;
    let mut keys = Zeroizing::new([0; 64]);
    scrypt::scrypt(passphrase, salt, &parameters, &mut *keys).map_err(|_| wrong())?;
    Ok(Keys(keys))
}

/// Makes a file: its header, the encrypted content, and what authenticates both. No other file may have the same salt.
pub(super) fn encrypt(
    parameters: Parameters,
    salt: &[u8; SALT_BYTES],
    passphrase: &[u8],
    content: &[u8],
) -> Result<Vec<u8>, Wrong> {
    let keys = derive(parameters, salt, passphrase)?;
    let mut file = Vec::with_capacity(HEADER_BYTES + content.len() + TAG_BYTES);
    file.extend(MAGIC);
    file.push(parameters.log_n);
    file.extend(parameters.r.to_be_bytes());
    file.extend(parameters.p.to_be_bytes());
    file.extend(salt);
    let hash = Sha256::digest(&file);
    file.extend(&hash[..16]);
    file.extend(keys.tag(&file));
    file.extend(content);
    keys.apply_keystream(&mut file[HEADER_BYTES..]);
    file.extend(keys.tag(&file));
    Ok(file)
}

impl Header {
    /// Decrypts what follows the header, as [`Header::open`] does, of a body that is in pieces.
    pub(super) fn open_pieces(&self, keys: &Keys, pieces: &mut VecDeque<Vec<u8>>) -> Result<(), Wrong> {
        let damaged = || Wrong::Damaged("a part is not what was encrypted");
        let mut tag = Vec::with_capacity(TAG_BYTES);
        while tag.len() < TAG_BYTES {
            let mut last = pieces.pop_back().ok_or_else(damaged)?;
            let from = last.len().saturating_sub(TAG_BYTES - tag.len());
            tag.splice(..0, last.drain(from..));
            if !last.is_empty() {
                pieces.push_back(last);
            }
        }
        let mut mac = keys.mac();
        mac.update(&self.bytes);
        for piece in &*pieces {
            mac.update(piece);
        }
        mac.verify_slice(&tag).map_err(|_| damaged())?;
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(array(&*keys.0, 0));
        let mut cipher = Ctr128BE::<Aes256>::new(&(*key).into(), &[0; 16].into());
        for piece in pieces {
            cipher.apply_keystream(piece);
        }
        Ok(())
    }
}

impl Keys {
    /// Encrypts or decrypts the content of a file.
    fn apply_keystream(&self, content: &mut [u8]) {
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(array(&*self.0, 0));
        Ctr128BE::<Aes256>::new(&(*key).into(), &[0; 16].into()).apply_keystream(content);
    }

    /// What authenticates some bytes.
    fn tag(&self, bytes: &[u8]) -> [u8; TAG_BYTES] {
        let mut mac = self.mac();
        mac.update(bytes);
        mac.finalize().into_bytes().into()
    }

    fn mac(&self) -> Hmac<Sha256> {
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(array(&*self.0, 32));
        let mut block = Zeroizing::new([0; 64]);
        block[..32].copy_from_slice(&*key);
        Hmac::new(&(*block).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(log_n: u8, r: u32, p: u32) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..7].copy_from_slice(MAGIC);
        bytes[7] = log_n;
        bytes[8..12].copy_from_slice(&r.to_be_bytes());
        bytes[12..16].copy_from_slice(&p.to_be_bytes());
        let hash = Sha256::digest(&bytes[..48]);
        bytes[48..64].copy_from_slice(&hash[..16]);
        bytes
    }

    #[test]
    fn what_is_encrypted_comes_back_with_its_passphrase_only() {
        let parameters = Parameters { log_n: 4, r: 8, p: 1 };
        for content in [&b""[..], b"a", &[7; 5000]] {
            let mut file = encrypt(parameters, &[3; SALT_BYTES], b"id!name!pass", content).unwrap();
            assert_eq!(file.len(), content.len() + HEADER_BYTES + TAG_BYTES);
            let header = Header::read(file.first_chunk().unwrap(), 1 << 30).unwrap();
            assert_eq!(header.keys(b"id!other!pass").err(), Some(Wrong::Passphrase));
            file.drain(..HEADER_BYTES);
            header.open(&header.keys(b"id!name!pass").unwrap(), &mut file).unwrap();
            assert_eq!(file, content);
        }
    }

    #[test]
    fn forged_parameters_are_refused_before_they_are_used() {
        let read =
            |log_n, r, p| Header::read(&header(log_n, r, p), 1 << 30).map(|header| header.parameters.memory_bytes());
        assert_eq!(read(20, 8, 1), Ok(1 << 30));
        assert_eq!(read(18, 8, 6), Ok(256 << 20));
        for (log_n, r, p) in [
            (63, 8, 1),
            (255, 8, 1),
            (0, 8, 1),
            (10, 0x10000, 0x10000),
            (10, 0, 1),
            (10, 8, 0),
            (10, u32::MAX, u32::MAX),
            (22, 32, 1024),
            (21, 8, 1),
            (20, 32, 1),
        ] {
            assert!(matches!(read(log_n, r, p), Err(Wrong::Refused(_))), "{log_n} {r} {p}");
        }
        let mut damaged = header(10, 8, 1);
        damaged[20] ^= 1;
        assert!(matches!(Header::read(&damaged, 1 << 30), Err(Wrong::Damaged(_))));
    }
}
