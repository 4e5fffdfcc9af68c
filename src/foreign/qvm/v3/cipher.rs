//! What `openssl enc -aes-256-cbc -md MD5` writes: `Salted__`, a salt, and the encrypted content. Key and initial vector are a chain of MD5 hashes of
//! the passphrase and the salt, of one round. Nothing here authenticates: who reads this has done so.

use std::io::{self, Read};

use aes::Aes256;
use cbc::Decryptor;
use cbc::cipher::array::Array;
use cbc::cipher::{BlockModeDecrypt, KeyIvInit};
use md5::{Digest, Md5};
use zeroize::Zeroizing;

use crate::foreign::{array, hand_out};
use crate::keys::Passphrase;

const MAGIC: &[u8] = b"Salted__";
/// Bytes before the content: the magic and a salt.
const HEAD_BYTES: usize = 16;
/// Bytes of a block of the cipher.
const BLOCK_BYTES: usize = 16;
/// Bytes that are decrypted at a time.
const CHUNK_BYTES: usize = 1 << 16;

/// What an encrypted stream holds.
pub(super) struct Decrypting<R> {
    input: R,
    passphrase: Passphrase,
    /// `None` until the head was read.
    decryptor: Option<Decryptor<Aes256>>,
    /// Bytes that are not decrypted yet. The last block stays here until it is known to be the last.
    held: Vec<u8>,
    plain: Vec<u8>,
    at: usize,
    is_ended: bool,
}

impl<R: Read> Decrypting<R> {
    pub(super) fn new(input: R, passphrase: Passphrase) -> Self {
        Self {
            input,
            passphrase,
            decryptor: None,
            held: Vec::new(),
            plain: Vec::new(),
            at: 0,
            is_ended: false,
        }
    }

    /// Decrypts more of the stream.
    fn decrypt(&mut self) -> io::Result<()> {
        self.fill(if self.decryptor.is_none() {
            HEAD_BYTES
        } else {
            CHUNK_BYTES
        })?;
        let Some(decryptor) = &mut self.decryptor else {
            let head = self.held.first_chunk::<HEAD_BYTES>();
            let head = head.filter(|head| head.starts_with(MAGIC));
            let head = head.ok_or_else(|| wrong("it is not encrypted as its header says"))?;
            self.decryptor = Some(decryptor_of(self.passphrase.bytes(), array(head, MAGIC.len())));
            self.held.clear();
            return Ok(());
        };
        self.is_ended = self.held.len() < CHUNK_BYTES;
        let ready = if self.is_ended {
            self.held.len()
        } else {
            CHUNK_BYTES - BLOCK_BYTES
        };
        let rest = self.held.split_off(ready);
        (self.plain, self.at) = (std::mem::replace(&mut self.held, rest), 0);
        let (blocks, partial) = self.plain.as_chunks_mut::<BLOCK_BYTES>();
        if !partial.is_empty() {
            return Err(wrong("its encrypted content is cut off"));
        }
        decryptor.decrypt_blocks(Array::cast_slice_from_core_mut(blocks));
        if self.is_ended {
            let length = unpadded(&self.plain).ok_or_else(|| wrong("its encrypted content does not end as it must"))?;
            self.plain.truncate(length);
        }
        Ok(())
    }

    /// Reads on until so many bytes are held, or all there are.
    fn fill(&mut self, length: usize) -> io::Result<()> {
        let wanted = length.saturating_sub(self.held.len());
        (&mut self.input).take(wanted as u64).read_to_end(&mut self.held)?;
        Ok(())
    }
}

impl<R: Read> Read for Decrypting<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.plain.len() && !self.is_ended && !buffer.is_empty() {
            self.decrypt()?;
        }
        Ok(hand_out(&self.plain, &mut self.at, buffer))
    }
}

/// The error for content that is not as it must be. It tells no system error, so that whoever reads names the place.
fn wrong(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

/// Derives the key and the initial vector.
fn decryptor_of(passphrase: &[u8], salt: [u8; 8]) -> Decryptor<Aes256> {
    const HASHES: usize = 3;
    let mut derived = Zeroizing::new([0; 16 * HASHES]);
    for at in 0..HASHES {
        let mut hasher = Md5::new();
        if at > 0 {
            hasher.update(&derived[(at - 1) * 16..at * 16]);
        }
        hasher.update(passphrase);
        hasher.update(salt);
        derived[at * 16..(at + 1) * 16].copy_from_slice(&hasher.finalize());
    }
    let key: Zeroizing<[u8; 32]> = Zeroizing::new(array(&*derived, 0));
    let vector: Zeroizing<[u8; 16]> = Zeroizing::new(array(&*derived, 32));
    Decryptor::new(&(*key).into(), &(*vector).into())
}

/// The length of a content without the padding of PKCS #7, which there always is.
fn unpadded(content: &[u8]) -> Option<usize> {
    let count = *content.last()?;
    let length = content.len().checked_sub(count.into())?;
    let is_padding = (1..=16).contains(&count) && content[length..].iter().all(|byte| *byte == count);
    is_padding.then_some(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `printf 'what it holds, in two blocks\n' | openssl enc -aes-256-cbc -md MD5 -pass pass:secret -S 0102030405060708`, which leaves out the head.
    #[test]
    fn what_openssl_encrypted_comes_back() {
        let head = [MAGIC, &[1, 2, 3, 4, 5, 6, 7, 8]].concat();
        let body: [u8; 32] = [
            0x92, 0xa4, 0x0a, 0x2b, 0x8b, 0x4a, 0x3c, 0x5e, 0x81, 0xcb, 0x86, 0x20, 0x7f, 0x4d, 0xfb, 0x34, 0xd4, 0xa4,
            0xee, 0x72, 0xe1, 0x82, 0x8c, 0x6a, 0xca, 0xb0, 0x25, 0xcc, 0xd0, 0x31, 0xa6, 0x75,
        ];
        let decrypt = |passphrase: &str, body: &[u8]| {
            let stream = [&head, body].concat();
            let mut plain = Vec::new();
            let mut reader = Decrypting::new(&stream[..], Passphrase::new(passphrase.into()));
            reader.read_to_end(&mut plain).map(|_| plain)
        };
        assert_eq!(decrypt("secret", &body).unwrap(), b"what it holds, in two blocks\n");
        assert!(decrypt("Secret", &body).is_err());
        assert!(decrypt("secret", &body[..16]).is_err());
        assert!(decrypt("secret", &body[..31]).is_err());
    }

    #[test]
    fn padding_is_checked() {
        assert_eq!(unpadded(&[16; 16]), Some(0));
        assert_eq!(unpadded(b"abc\x02\x02"), Some(3));
        assert_eq!(unpadded(b"abc\x01"), Some(3));
        for wrong in [&b""[..], b"abc\x00", b"abc\x01\x02", b"\x11", &[17; 17], b"\x02"] {
            assert_eq!(unpadded(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_not_encrypted_or_is_cut_off_is_an_error() {
        for wrong in [
            &b""[..],
            b"Salted__",
            b"salted__12345678",
            b"Salted__12345678",
            b"Salted__12345678abc",
        ] {
            let mut reader = Decrypting::new(wrong, Passphrase::new(b"secret".to_vec()));
            assert!(reader.read_to_end(&mut Vec::new()).is_err(), "{wrong:?}");
        }
    }
}
