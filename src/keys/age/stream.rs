//! The payload of a file of `age`: segments of 64 KiB, each sealed by ChaCha20-Poly1305 under a nonce that counts them and marks the last.

use chacha20poly1305::aead::{Aead, KeyInit};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use zeroize::Zeroizing;

use super::{Failure, FileKey, derive};
use crate::sys::random;

const SEGMENT: usize = 64 << 10;
const TAG: usize = 16;
/// The number of bytes in front of the segments, from which their key is derived.
const SALT: usize = 16;

/// The nonce of a segment: eleven bytes that count from 0, and one that is 1 in the last.
fn nonce(number: usize, is_last: bool) -> Nonce {
    let mut nonce = [0; 12];
    nonce[3..11].copy_from_slice(&(number as u64).to_be_bytes());
    nonce[11] = u8::from(is_last);
    nonce.into()
}

fn cipher(key: &FileKey, salt: &[u8]) -> ChaCha20Poly1305 {
    ChaCha20Poly1305::new(derive(key.bytes(), salt, b"payload").bytes().into())
}

/// Opens a payload.
pub(super) fn open(payload: &[u8], key: &FileKey) -> Result<Zeroizing<Vec<u8>>, Failure> {
    const DAMAGED: Failure = Failure::Damaged("its payload is damaged");
    let parts = payload.split_at_checked(SALT);
    let (salt, sealed) = parts.ok_or(Failure::Malformed("its payload ends too early"))?;
    let cipher = cipher(key, salt);
    let mut plain = Zeroizing::new(Vec::with_capacity(sealed.len()));
    let last = sealed.len().div_ceil(SEGMENT + TAG).checked_sub(1).ok_or(DAMAGED)?;
    for (number, segment) in sealed.chunks(SEGMENT + TAG).enumerate() {
        let opened = cipher
            .decrypt(&nonce(number, number == last), segment)
            .map_err(|_| DAMAGED)?;
        let opened = Zeroizing::new(opened);
        // Only a payload without content has an empty segment.
        if opened.is_empty() && number > 0 {
            return Err(DAMAGED);
        }
        plain.extend_from_slice(&opened);
    }
    Ok(plain)
}

/// Makes a payload of one segment.
pub(super) fn seal(plain: &[u8], key: &FileKey) -> Result<Vec<u8>, Failure> {
    const FAILED: Failure = Failure::Malformed("its payload cannot be sealed");
    if plain.len() > SEGMENT {
        return Err(FAILED);
    }
    let mut payload = vec![0; SALT];
    random::fill(&mut payload).map_err(|_| Failure::Malformed("the system gives no random bytes"))?;
    let sealed = cipher(key, &payload).encrypt(&nonce(0, true), plain);
    payload.extend(sealed.map_err(|_| FAILED)?);
    Ok(payload)
}
