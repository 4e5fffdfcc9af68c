//! The credentials of a host that adds to a sealed archive, and cannot read it. `formats/encryption-v1.md` specifies them.

use std::io::Read as _;
use std::path::Path;

use zeroize::Zeroizing;

use super::age::base64;
use super::keyring::LABEL_BYTES_MAX;
use super::secret::Secret;
use crate::codec::{Decoded, Decoder, Malformed, put_string};
use crate::error::{Error, Result};
use crate::new_file::NewFile;
use crate::shown::{hex, shown};

/// With what the line begins that holds them.
const PREFIX: &str = "VMFOLD-WRITE-ONLY-";
/// The version of their encoding.
const VERSION: u8 = 1;
/// Bytes of a public key of a pair.
const PUBLIC_BYTES: usize = 1216;
/// Bytes of the hash at their end, which finds what was cut off or mistyped.
const CHECK_BYTES: usize = 16;
/// The most bytes of a file of them.
const FILE_BYTES_MAX: u64 = 16 << 10;

/// The credentials of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostCredentials {
    /// The archive, by its identity.
    pub archive: [u8; 16],
    /// The number that its keyring had when they were made.
    pub number: u32,
    /// What people call the host; at most 128 bytes.
    pub name: String,
    /// The public keys of the newest pair: that for what images hold, and that for what describes them.
    pub pair: [Vec<u8>; 2],
    /// The key of indexes.
    pub index_key: Secret<32>,
    /// The key of block ids.
    pub id_key: Secret<32>,
    /// The seed of the Ed25519 key by which the host signs.
    pub signing_seed: Secret<32>,
    /// The public Ed25519 key of those who have the keyring.
    pub signer: [u8; 32],
}

impl HostCredentials {
    /// Reads those in a file.
    ///
    /// # Errors
    /// [`Error::Usage`] if it holds none, or is damaged; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
        // One that grew would leave copies of secrets behind.
        let capacity = usize::try_from(FILE_BYTES_MAX).unwrap_or(usize::MAX) + 2;
        let mut text = Zeroizing::new(String::with_capacity(capacity));
        let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
        read.map_err(Error::io("read", path))?;
        Self::parse(&text).map_err(|problem| {
            let problem = problem.problem();
            Error::Usage(format!("`{}` holds no credentials of a host: {problem}", shown(path)))
        })
    }

    /// Writes them to a new file that only its owner can read.
    ///
    /// # Errors
    /// Those of [`NewFile::write`].
    pub fn write(&self, path: &Path) -> Result<NewFile> {
        NewFile::write(path, self.text().as_bytes())
    }

    fn text(&self) -> Zeroizing<String> {
        let bytes = self.encode();
        let encoded = Zeroizing::new(base64::encode(&bytes));
        let mut text = Zeroizing::new(String::with_capacity(encoded.len() + 1024));
        text.push_str("# Credentials of a host that adds to an archive of vmfold, and cannot read it.\n# Host: ");
        text.push_str(&shown(Path::new(&self.name)).to_string());
        text.push_str("\n# Archive: ");
        text.push_str(&hex(&self.archive));
        text.push_str("\n#\n# Use:  vmfold export ARCHIVE FOLDER --write-only THIS-FILE\n");
        text.push_str(PREFIX);
        text.push_str("1 ");
        text.push_str(&encoded);
        text.push('\n');
        text
    }

    fn parse(text: &str) -> Decoded<Self> {
        let lines = text.lines().map(str::trim);
        let mut lines = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
        let (Some(line), None) = (lines.next(), lines.next()) else {
            return Err("it has not just one line beside those that begin with `#`".into());
        };
        let rest = line.strip_prefix(PREFIX).ok_or("a line begins in another way")?;
        let encoded = rest
            .strip_prefix("1 ")
            .ok_or(Malformed::Unsupported("they are of a later version"))?;
        Self::decode(&base64::decode(encoded.as_bytes()).ok_or("they are damaged")?)
    }

    fn encode(&self) -> Zeroizing<Vec<u8>> {
        const CAPACITY: usize = 4096;
        let mut bytes = Zeroizing::new(Vec::with_capacity(CAPACITY));
        bytes.push(VERSION);
        bytes.extend(self.archive);
        bytes.extend(self.number.to_le_bytes());
        put_string(&mut bytes, self.name.as_bytes());
        for key in &self.pair {
            bytes.extend_from_slice(key);
        }
        for secret in [&self.index_key, &self.id_key, &self.signing_seed] {
            bytes.extend_from_slice(secret.bytes());
        }
        bytes.extend(self.signer);
        let check = *blake3::hash(&bytes).as_bytes();
        bytes.extend(&check[..CHECK_BYTES]);
        bytes
    }

    fn decode(bytes: &[u8]) -> Decoded<Self> {
        let (content, check) = bytes
            .split_last_chunk::<CHECK_BYTES>()
            .ok_or("they are damaged")
            .map(|(content, check)| (content, &check[..]))?;
        if blake3::hash(content).as_bytes()[..CHECK_BYTES] != *check {
            return Err("they are damaged".into());
        }
        let mut decoder = Decoder::new(content);
        if decoder.u8()? != VERSION {
            return Err(Malformed::Unsupported("they are of a later version"));
        }
        let secret = |decoder: &mut Decoder<'_>| {
            let bytes = decoder.take(32)?;
            Secret::filled(|secret| {
                secret.copy_from_slice(bytes);
                Decoded::Ok(())
            })
        };
        let archive = decoder.array()?;
        let number = decoder.u32()?;
        let name = std::str::from_utf8(decoder.string(LABEL_BYTES_MAX)?).map_err(|_| "its name is no UTF-8")?;
        let credentials = Self {
            archive,
            number,
            name: name.to_owned(),
            pair: [
                decoder.take(PUBLIC_BYTES)?.to_vec(),
                decoder.take(PUBLIC_BYTES)?.to_vec(),
            ],
            index_key: secret(&mut decoder)?,
            id_key: secret(&mut decoder)?,
            signing_seed: secret(&mut decoder)?,
            signer: decoder.array()?,
        };
        decoder.end()?;
        Ok(credentials)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> HostCredentials {
        HostCredentials {
            archive: [7; 16],
            number: 3,
            name: "höst".into(),
            pair: [vec![1; PUBLIC_BYTES], vec![2; PUBLIC_BYTES]],
            index_key: Secret::of(&[3; 32]),
            id_key: Secret::of(&[4; 32]),
            signing_seed: Secret::of(&[5; 32]),
            signer: [6; 32],
        }
    }

    #[test]
    fn credentials_come_back() {
        let text = sample().text();
        assert_eq!(HostCredentials::parse(&text), Ok(sample()));
        let line = text.lines().last().unwrap();
        for end in 0..line.len() {
            assert!(HostCredentials::parse(&line[..end]).is_err(), "{end}");
        }
        assert!(HostCredentials::parse(&format!("{line}\n{line}")).is_err());
        let later = line.replace("ONLY-1", "ONLY-2");
        assert!(matches!(HostCredentials::parse(&later), Err(Malformed::Unsupported(_))));
        let bytes = sample().encode();
        assert!(bytes.len() < bytes.capacity());
        assert!(!format!("{:?}", sample()).contains("5, 5"));
    }

    #[test]
    fn a_file_of_them_is_private_and_new() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("host");
        sample().write(&path).unwrap();
        assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(HostCredentials::read(&path).unwrap(), sample());
        assert!(matches!(sample().write(&path), Err(Error::Usage(_))));
        std::fs::write(&path, "secret-of-somebody").unwrap();
        let error = HostCredentials::read(&path).unwrap_err().to_string();
        assert!(!error.contains("secret-of-somebody"), "{error}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes: Vec<u8>, place in 0..2600usize, bit in 0..8u8) {
            let _ = HostCredentials::decode(&bytes);
            let mut changed = sample().encode();
            let place = place % changed.len();
            changed[place] ^= 1 << bit;
            prop_assert!(HostCredentials::decode(&changed).is_err());
        }
    }
}
