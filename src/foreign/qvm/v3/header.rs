//! The header of a backup in version 3, and what authenticates it and each part: a hash with the passphrase as its key, as `openssl dgst -hmac`
//! writes it.

use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use sha2::{Sha256, Sha384, Sha512};

use crate::foreign::Compression;
use crate::foreign::qvm::header::{Values, filter, other_version};
use crate::shown::hex;

/// Bytes of a file that holds a hash.
pub(super) const HASH_FILE_BYTES_MAX: u64 = 4096;

/// What the header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BackupHeader {
    pub(super) algorithm: HashAlgorithm,
    /// Whether members are encrypted.
    pub(super) is_encrypted: bool,
    /// How the content of members is compressed.
    pub(super) compression: Option<Compression>,
}

/// Reads a header. Its algorithm is known before anything is authenticated.
///
/// # Errors
/// Says what is not read, or makes no sense.
pub(super) fn parse(bytes: &[u8]) -> Result<BackupHeader, String> {
    let values = Values::read(bytes)?;
    if values.of("version") != "3" {
        return Err(other_version(values.of("version")));
    }
    let hash = values.of("hmac-algorithm").to_ascii_lowercase();
    let algorithm = match hash.as_str() {
        "sha256" => HashAlgorithm::Sha256,
        "sha384" => HashAlgorithm::Sha384,
        "sha512" => HashAlgorithm::Sha512,
        other => return Err(format!("it is protected by `{other}`, which is not read")),
    };
    let is_encrypted = values.is("encrypted");
    let cipher = values.of("crypto-algorithm");
    if is_encrypted && !cipher.eq_ignore_ascii_case("aes-256-cbc") {
        return Err(format!("it is encrypted by `{cipher}`, which is not read"));
    }
    let compression = match values.of("compression-filter") {
        _ if !values.is("compressed") => None,
        // Before there was a choice, it was this one.
        "" => Some(Compression::Gzip),
        name => Some(filter(name)?),
    };
    Ok(BackupHeader {
        algorithm,
        is_encrypted,
        compression,
    })
}

/// What hashes are made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HashAlgorithm {
    /// SHA-256.
    Sha256,
    /// SHA-384.
    Sha384,
    /// SHA-512, which is chosen if the user does not.
    Sha512,
}

impl HashAlgorithm {
    /// Whether a content has this hash under a passphrase. The comparison takes the same time for all hashes.
    pub(super) fn is_hash_of(self, hash: &[u8], content: &[u8], passphrase: &[u8]) -> bool {
        match self {
            Self::Sha256 => has_hash::<Hmac<Sha256>>(hash, content, passphrase),
            Self::Sha384 => has_hash::<Hmac<Sha384>>(hash, content, passphrase),
            Self::Sha512 => has_hash::<Hmac<Sha512>>(hash, content, passphrase),
        }
    }

    /// The hash of a content under a passphrase, as OpenSSL tells it.
    pub(super) fn hash_text(self, content: &[u8], passphrase: &[u8]) -> Vec<u8> {
        let hash = match self {
            Self::Sha256 => hash_of_content::<Hmac<Sha256>>(content, passphrase),
            Self::Sha384 => hash_of_content::<Hmac<Sha384>>(content, passphrase),
            Self::Sha512 => hash_of_content::<Hmac<Sha512>>(content, passphrase),
        };
        format!("(stdin)= {}\n", hex(&hash)).into_bytes()
    }
}

fn hash_of_content<M: Mac + KeyInit>(content: &[u8], passphrase: &[u8]) -> Vec<u8> {
    let Ok(mut mac) = <M as KeyInit>::new_from_slice(passphrase) else {
        return Vec::new();
    };
    mac.update(content);
    mac.finalize().into_bytes().to_vec()
}

fn has_hash<M: Mac + KeyInit>(hash: &[u8], content: &[u8], passphrase: &[u8]) -> bool {
    let Ok(mut mac) = <M as KeyInit>::new_from_slice(passphrase) else {
        return false;
    };
    mac.update(content);
    mac.verify_slice(hash).is_ok()
}

/// The hash in a text such as `(stdin)= 5b26…`. What comes before it depends on the version of OpenSSL.
pub(super) fn hash_of(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?.trim_ascii();
    let (_, digits) = text.rsplit_once('=').unwrap_or(("", text));
    let (pairs, rest) = digits.trim_ascii().as_bytes().as_chunks::<2>();
    if !rest.is_empty() || pairs.is_empty() {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    pairs
        .iter()
        .map(|[upper, lower]| Some(digit(*upper)? << 4 | digit(*lower)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let header = |lines: &str| parse(format!("version=3\n{lines}").as_bytes());
        let default = "hmac-algorithm=SHA512\ncrypto-algorithm=aes-256-cbc\nencrypted=True\ncompressed=True\n";
        let expected = BackupHeader {
            algorithm: HashAlgorithm::Sha512,
            is_encrypted: true,
            compression: Some(Compression::Gzip),
        };
        assert_eq!(header(default), Ok(expected));
        assert_eq!(
            header(&format!("{default}compression-filter=bzip2\n"))
                .unwrap()
                .compression,
            Some(Compression::Bzip2)
        );
        // A cipher that is not used does not matter.
        assert!(
            !header("hmac-algorithm=sha256\ncrypto-algorithm=bf-cbc\nencrypted=False\n")
                .unwrap()
                .is_encrypted
        );
        for (lines, problem) in [
            ("hmac-algorithm=whirlpool\n", "`whirlpool`"),
            (
                "hmac-algorithm=sha512\nencrypted=True\ncrypto-algorithm=bf-cbc\n",
                "`bf-cbc`",
            ),
            ("hmac-algorithm=sha512\nencrypted=True\n", "``"),
            ("hmac-algorithm=scrypt\n", "`scrypt`"),
            (
                "hmac-algorithm=sha512\ncompressed=True\ncompression-filter=sh\n",
                "`sh`",
            ),
            ("version=3\n", "makes no sense"),
        ] {
            let text = header(lines).unwrap_err();
            assert!(text.contains(problem), "{text}");
        }
        assert!(parse(b"version=2\n").unwrap_err().contains("version `2`"));
    }

    #[test]
    fn a_hash_is_found_behind_whatever_stands_before_it() {
        for text in [
            "(stdin)= 0aFf\n",
            "HMAC-SHA512(backup-header)= 0aff",
            "SHA2-512(stdin)= 0aff\n",
            "0aff\n",
        ] {
            assert_eq!(hash_of(text.as_bytes()), Some(vec![0x0a, 0xff]), "{text}");
        }
        for text in [
            &b""[..],
            b"(stdin)= ",
            b"(stdin)= 0af",
            b"(stdin)= 0agf",
            b"\xff= 0a",
            b"= 0a 0b",
        ] {
            assert_eq!(hash_of(text), None);
        }
    }

    /// Test case 2 of RFC 4231.
    #[test]
    fn hashes_are_those_of_the_standard() {
        let (key, content) = (b"Jefe", b"what do ya want for nothing?");
        for (algorithm, hash) in [
            (
                HashAlgorithm::Sha256,
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                HashAlgorithm::Sha384,
                "af45d2e376484031617f78d2b58a6b1b9c7ef464f5a01b47e42ec3736322445e8e2240ca5e69e2c78b3239ecfab21649",
            ),
            (
                HashAlgorithm::Sha512,
                "164b7a7bfcf819e2e395fbe73b56e0a387bd64222e831fd610270cd7ea2505549758bf75c05a994a6d034f65f8f0e6fdcaeab1a34d4a6b4b636e070a38bce737",
            ),
        ] {
            let hash = hash_of(hash.as_bytes()).unwrap();
            assert!(algorithm.is_hash_of(&hash, content, key));
            assert_eq!(hash_of(&algorithm.hash_text(content, key)), Some(hash.clone()));
            assert!(!algorithm.is_hash_of(&hash, content, b"jefe"));
            assert!(!algorithm.is_hash_of(&hash[1..], content, key));
            assert!(!algorithm.is_hash_of(&[], content, key));
        }
    }
}
