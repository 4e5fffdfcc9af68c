//! The parts of a backup of Qubes OS: members of a tar stream, each a scrypt file of its own. Only headers of the stream are parsed before a part
//! is authenticated.

mod ahead;
mod located;
mod member;

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use self::ahead::ReadAhead;
use self::located::{Located, walk};
pub(super) use self::member::MemberReader;
use super::scrypt_file::{HEADER_BYTES, Header, Keys, Parameters, SALT_BYTES, TAG_BYTES, Wrong, encrypt};
use super::stream::{content, first_files, next_file};
use crate::error::{Error, Result};
use crate::foreign::Input;
use crate::foreign::tar::BLOCK;
use crate::keys::Passphrase;
use crate::store::Store;

/// Bytes of a part before it is encrypted: where the writer cuts. A part of this length is never the last of a member.
const PART_BYTES: usize = 100 << 20;
const PART_STORED_BYTES_MAX: u64 = (PART_BYTES + HEADER_BYTES + TAG_BYTES) as u64;
/// A later part may cost so many times what the header cost, which was authenticated.
const COST_FACTOR: u64 = 8;
/// Parts of a backup: of 25 TB. What is known of them takes 64 MiB.
const PARTS_MAX: usize = 1 << 18;

/// A part, as its header in the stream tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// The member that it is a part of, such as `vm7/root.img`.
    pub(super) member: String,
    /// Its number in the member, from 0.
    pub(super) number: u32,
    /// Its name without `.enc`, which is part of its passphrase.
    name: String,
    /// Bytes of its content in the stream.
    stored_bytes: u64,
}

/// Reads the name of a part: a member, a number of three digits or more, and `.enc`.
fn part_of(name: &str, stored_bytes: u64) -> Option<Part> {
    let whole = name.strip_suffix(".enc")?;
    let (member, digits) = whole.rsplit_once('.')?;
    let is_number = digits.len() >= 3 && digits.len() <= 9 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let file = match member.split_once('/') {
        None => (member == "qubes.xml").then_some(member),
        Some((folder, file)) => {
            let machine = folder.strip_prefix("vm").filter(|number| !number.is_empty());
            let is_machine = machine.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()));
            (is_machine || folder == "dom0-home").then_some(file)
        }
    }?;
    let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    if !is_number || file.is_empty() || file.starts_with('.') || !file.bytes().all(is_plain) {
        return None;
    }
    Some(Part {
        member: member.to_owned(),
        number: digits.parse().ok()?,
        name: whole.to_owned(),
        stored_bytes,
    })
}

/// The stream of parts, and what opens them.
pub(super) struct Parts<'a> {
    input: Input<'a>,
    /// The part whose content comes next.
    next: Option<Part>,
    passphrase: Passphrase,
    /// What is part of each passphrase; empty until the header was read.
    backup_id: String,
    kdf_memory_bytes: u64,
    /// How the header's key was derived; `None` until it was.
    header_parameters: Option<Parameters>,
    /// The store, if it can be read anywhere, and its parts, the first last.
    ahead: Option<(&'a dyn Store, Vec<Located>)>,
    /// Keys that were derived ahead, by the names of their parts.
    keys: BTreeMap<String, (Header, Keys)>,
    /// Members that are not read.
    pub(super) skipped: HashSet<String>,
    /// Whether the last block of the stream was one of zeros.
    ends_in_zeros: bool,
    count: usize,
    /// The files that were opened, each with its name and as it was stored, if they are kept.
    kept: Option<Vec<(String, Vec<u8>)>>,
    /// What of a pipe was read ahead.
    pipe: ReadAhead,
}

impl<'a> Parts<'a> {
    /// Makes a stream of parts. `store` is where the input comes from, if it can be read anywhere.
    pub(super) fn new(
        input: Input<'a>,
        store: Option<&'a dyn Store>,
        passphrase: Passphrase,
        kdf_memory_bytes: u64,
    ) -> Self {
        Self {
            input,
            next: None,
            passphrase,
            backup_id: String::new(),
            kdf_memory_bytes,
            header_parameters: None,
            ahead: store.map(|store| (store, Vec::new())),
            keys: BTreeMap::new(),
            skipped: HashSet::new(),
            ends_in_zeros: false,
            count: 0,
            kept: None,
            pipe: ReadAhead::default(),
        }
    }

    /// Keeps the files that are opened from now on, as they are stored.
    pub(super) fn keep(&mut self) {
        self.kept = Some(Vec::new());
    }

    /// Returns the files that were kept, in their order.
    pub(super) fn take_kept(&mut self) -> Vec<(String, Vec<u8>)> {
        self.kept.take().unwrap_or_default()
    }

    pub(super) fn input(&mut self) -> &mut Input<'a> {
        &mut self.input
    }

    /// Where the part lies that comes next.
    pub(super) fn position(&self) -> u64 {
        self.pipe.start().unwrap_or_else(|| self.input.offset())
    }

    /// The next file of the stream: its name and length. What of it is not a part is for the caller to judge.
    fn file(&mut self) -> Result<Option<(String, u64)>> {
        next_file(&mut self.input, &mut self.ends_in_zeros)
    }

    /// Reads the backup's header and the copy of it that is authenticated. Returns its bytes.
    pub(super) fn header(&mut self) -> Result<Vec<u8>> {
        const HEADER_BYTES_MAX: u64 = 64 << 10;
        const COPY_BYTES_MAX: u64 = HEADER_BYTES_MAX + 4096;
        let mut contents = Vec::new();
        for (expected, bytes_max) in [
            ("backup-header", HEADER_BYTES_MAX),
            ("backup-header.hmac", COPY_BYTES_MAX),
        ] {
            let start = self.input.offset();
            match self.file()? {
                Some((name, bytes)) if name == expected && bytes <= bytes_max => {
                    let content = self.stored(bytes)?;
                    if let Some(kept) = &mut self.kept {
                        kept.push((name, content.clone()));
                    }
                    contents.push(content);
                }
                _ => return Err(self.damaged(start, None, "its header is missing, or in another place")),
            }
        }
        let start = self.input.offset();
        let damaged = |parts: &Self| parts.damaged(start, None, "its header is not the one that was protected");
        let (Some(mut copy), Some(plain)) = (contents.pop(), contents.pop()) else {
            return Err(damaged(self));
        };
        let Some((bytes, _)) = copy.split_first_chunk::<HEADER_BYTES>() else {
            return Err(damaged(self));
        };
        let header = Header::read(bytes, self.kdf_memory_bytes).map_err(|wrong| self.wrong(start, None, wrong))?;
        let passphrase = self.full_passphrase("backup-header", true);
        let keys = header.keys(&passphrase).map_err(|wrong| match wrong {
            Wrong::Passphrase => self.input.refused("the passphrase is another one"),
            other => self.wrong(start, None, other),
        })?;
        copy.drain(..HEADER_BYTES);
        header
            .open(&keys, &mut copy)
            .map_err(|wrong| self.wrong(start, None, wrong))?;
        self.header_parameters = Some(header.parameters);
        if copy != plain {
            return Err(damaged(self));
        }
        Ok(copy)
    }

    /// Sets what is part of each passphrase from now on, and looks at all headers of the stream if it can be read anywhere.
    pub(super) fn begin(&mut self, backup_id: String) -> Result<()> {
        self.backup_id = backup_id;
        if let Some((store, _)) = self.ahead {
            let mut located = walk(store, &self.input)?;
            located.reverse();
            self.ahead = Some((store, located));
        }
        Ok(())
    }

    /// The members of the stream, if it can be read anywhere.
    pub(super) fn known_members(&self) -> Option<HashSet<String>> {
        let (_, located) = self.ahead.as_ref()?;
        Some(located.iter().map(|one| one.part.member.clone()).collect())
    }

    /// What decrypts a part, or the header.
    fn full_passphrase(&self, name: &str, is_header: bool) -> Zeroizing<Vec<u8>> {
        full_passphrase((!is_header).then_some(&self.backup_id), name, &self.passphrase)
    }

    /// The part whose content comes next, or `None` at the end of the stream.
    pub(super) fn peek(&mut self) -> Result<Option<&Part>> {
        if self.pipe.first().is_some() {
            return Ok(self.pipe.first());
        }
        match self.pipe.take_error() {
            Some(error) => Err(error),
            None => self.peek_stream(),
        }
    }

    /// The part behind all that was read, or `None` at the end of the stream.
    fn peek_stream(&mut self) -> Result<Option<&Part>> {
        if self.next.is_none() {
            let start = self.input.offset();
            let Some((name, bytes)) = self.file()? else {
                return Ok(None);
            };
            let part = part_of(&name, bytes).filter(|_| bytes <= PART_STORED_BYTES_MAX);
            let part = part
                .ok_or_else(|| self.damaged(start, None, "it has a part with a name or a size that is not allowed"))?;
            self.count += 1;
            if self.count > PARTS_MAX {
                return Err(self.input.refused("it has more parts than vmfold takes"));
            }
            self.next = Some(part);
        }
        Ok(self.next.as_ref())
    }

    /// Drops the next part.
    pub(super) fn skip(&mut self) -> Result<()> {
        if self.skip_ahead()? {
            return Ok(());
        }
        if let Some(part) = self.next.take() {
            self.keys.remove(&part.name);
            self.input.skip(part.stored_bytes.next_multiple_of(BLOCK as u64))?;
        }
        Ok(())
    }

    /// Takes the next part as it is stored, with its whole name. Nothing of it is checked.
    pub(super) fn take_stored(&mut self) -> Result<Option<(String, Vec<u8>)>> {
        let Some(part) = self.next.take() else {
            return Ok(None);
        };
        let content = self.stored(part.stored_bytes)?;
        Ok(Some((format!("{}.enc", part.name), content)))
    }

    /// What encrypts parts of this backup, as its header was encrypted.
    pub(super) fn encryptor(&self) -> Result<Encryptor> {
        match self.header_parameters {
            Some(parameters) => Ok(Encryptor {
                parameters,
                passphrase: self.passphrase.clone(),
                backup_id: self.backup_id.clone(),
                path: self.input.path().to_owned(),
            }),
            None => Err(self.input.refused("its header was not read yet")),
        }
    }

    /// How many keys may be derived at once, in so much memory.
    pub(super) fn keys_at_once(&self, memory_bytes: u64) -> usize {
        let one = self.header_parameters.map_or(1, Parameters::memory_bytes).max(1);
        let fit = usize::try_from(memory_bytes / one).unwrap_or(usize::MAX);
        fit.clamp(1, rayon::current_num_threads())
    }

    /// The path of the backup.
    pub(super) fn path(&self) -> &Path {
        self.input.path()
    }

    /// The content of a file of the stream.
    fn stored(&mut self, bytes: u64) -> Result<Vec<u8>> {
        content(&mut self.input, bytes)
    }

    /// What the next part holds, once all of it is authenticated. `volume` is what it belongs to, for errors.
    pub(super) fn open(&mut self, volume: Option<&PathBuf>) -> Result<Vec<u8>> {
        let Some(part) = self.next.take() else {
            return Ok(Vec::new());
        };
        let start = self.input.offset();
        let (header, keys) = if let Some(known) = self.key_of(&part) {
            self.input.skip(HEADER_BYTES as u64)?;
            known
        } else {
            let mut bytes = [0; HEADER_BYTES];
            if part.stored_bytes < (HEADER_BYTES + TAG_BYTES) as u64 {
                return Err(self.damaged(start, volume, "a part is too short"));
            }
            self.input.exact(&mut bytes, volume.map(PathBuf::as_path))?;
            let header = self
                .part_header(&bytes)
                .map_err(|wrong| self.wrong(start, volume, wrong))?;
            let keys = header.keys(&self.full_passphrase(&part.name, false));
            let keys = keys.map_err(|wrong| self.wrong(start, volume, wrong))?;
            (header, keys)
        };
        let rest = part.stored_bytes - HEADER_BYTES as u64;
        let mut body = vec![0; usize::try_from(rest).unwrap_or(usize::MAX)];
        self.input.exact(&mut body, volume.map(PathBuf::as_path))?;
        self.input.skip(part.stored_bytes.wrapping_neg() % BLOCK as u64)?;
        if let Some(kept) = &mut self.kept {
            kept.push((format!("{}.enc", part.name), [header.bytes(), &body].concat()));
        }
        header
            .open(&keys, &mut body)
            .map_err(|wrong| self.wrong(start, volume, wrong))?;
        Ok(body)
    }

    fn part_header(&self, bytes: &[u8; HEADER_BYTES]) -> std::result::Result<Header, Wrong> {
        let header = Header::read(bytes, self.kdf_memory_bytes)?;
        if !self.is_cost_allowed(&header) {
            return Err(Wrong::Refused(
                "the key of a part takes far longer than that of its header".into(),
            ));
        }
        Ok(header)
    }

    fn is_cost_allowed(&self, header: &Header) -> bool {
        let header_cost = self.header_parameters.map_or(u64::MAX, Parameters::cost);
        header.parameters.cost() <= header_cost.saturating_mul(COST_FACTOR)
    }

    /// The error for what is wrong with a part.
    fn wrong(&self, start: u64, volume: Option<&PathBuf>, wrong: Wrong) -> Error {
        match wrong {
            Wrong::Damaged(problem) => self.damaged(start, volume, problem),
            Wrong::Refused(problem) => self.input.refused(problem),
            Wrong::Passphrase => self.damaged(
                start,
                volume,
                "a part is not the one of its name, or its header is damaged",
            ),
        }
    }

    pub(super) fn damaged(&self, start: u64, volume: Option<&PathBuf>, problem: &str) -> Error {
        let length = self.position().saturating_sub(start);
        self.input.damaged(start, length, volume.cloned(), problem)
    }
}

/// What decrypts a part: `BACKUP-ID!NAME!PASSPHRASE`, or for the header, only its name and the passphrase.
fn full_passphrase(backup_id: Option<&String>, name: &str, passphrase: &Passphrase) -> Zeroizing<Vec<u8>> {
    let before = match backup_id {
        Some(id) => format!("{id}!{name}!"),
        None => format!("{name}!"),
    };
    Zeroizing::new([before.as_bytes(), passphrase.bytes()].concat())
}

/// What encrypts parts of a backup.
pub(super) struct Encryptor {
    parameters: Parameters,
    passphrase: Passphrase,
    backup_id: String,
    path: PathBuf,
}

impl Encryptor {
    /// Encrypts a part, by the name that it has without `.enc`. It has a salt of its own.
    pub(super) fn encrypt(&self, name: &str, content: &[u8]) -> Result<Vec<u8>> {
        let mut salt = [0; SALT_BYTES];
        crate::sys::random::fill(&mut salt).map_err(Error::io("read", Path::new("/dev/urandom")))?;
        let passphrase = full_passphrase(Some(&self.backup_id), name, &self.passphrase);
        encrypt(self.parameters, &salt, &passphrase, content).map_err(|_| Error::RefusedBackup {
            path: self.path.clone(),
            problem: "its keys cannot be derived".into(),
        })
    }
}

/// Whether a stream begins with the header of a backup: behind a pax header, or at once.
pub(in crate::foreign) fn begins_with_header(first: &[u8]) -> bool {
    first_files(first).any(|(name, _)| name == b"backup-header")
}

/// Whether a stream begins with something else of a backup, whose header is lost.
pub(in crate::foreign) fn begins_without_header(first: &[u8]) -> bool {
    first_files(first).any(|(name, _)| {
        let is_part = std::str::from_utf8(&name).is_ok_and(|name| part_of(name, 0).is_some());
        is_part || name == b"backup-header.hmac" || name == b"qubes.xml.000"
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_of_one_form() {
        let part = part_of("vm7/root.img.012.enc", 500).unwrap();
        assert_eq!(
            (part.member.as_str(), part.number, part.name.as_str()),
            ("vm7/root.img", 12, "vm7/root.img.012")
        );
        assert_eq!(part_of("vm7/root.img.1000.enc", 1).unwrap().number, 1000);
        assert!(part_of("dom0-home/user.000.enc", 1).is_some());
        assert!(part_of("qubes.xml.000.enc", 1).is_some());
        for wrong in [
            "vm7/root.img.000",
            "vm7/root.img.01.enc",
            "vm7/root.img.enc",
            "vm/root.img.000.enc",
            "vm7/../root.img.000.enc",
            "vm7/.000.enc",
            "vm7/a/b.000.enc",
            "../qubes.xml.000.enc",
            "/vm7/root.img.000.enc",
            "other.xml.000.enc",
            "vm7/root.img.+01.enc",
            "vm7/root.img.9999999999.enc",
        ] {
            assert_eq!(part_of(wrong, 1), None, "{wrong}");
        }
    }
}
