//! The parts of a backup in version 3: pieces of a member's stream, each followed by a file with its hash. A part is held in memory until its hash
//! was compared, and used from there: in a file, it could have changed by then.

use std::cell::RefCell;
use std::io::{self, Read};
use std::path::PathBuf;
use std::rc::Rc;

use super::header::{BackupHeader, HASH_FILE_BYTES_MAX, HashAlgorithm, hash_of, parse};
use super::machines::is_folder;
use crate::error::{Error, Result};
use crate::foreign::qvm::skeleton::add_file;
use crate::foreign::qvm::stream::{content, next_file};
use crate::foreign::tar::BLOCK;
use crate::foreign::{Input, hand_out};
use crate::keys::Passphrase;

/// Bytes of a part: where the writer cuts. A part of this length is never the last of a member.
const PART_BYTES: u64 = 100 << 20;
/// Parts of a backup: of 25 TB.
const PARTS_MAX: usize = 1 << 18;
const HEADER_BYTES_MAX: u64 = 64 << 10;

/// A part, as its header in the stream tells it. Nothing protects its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// The member that it is a part of, such as `vm7/private.img`.
    pub(super) member: String,
    /// Its number in the member, from 0.
    pub(super) number: u32,
    /// Its name.
    name: String,
    /// Bytes of its content in the stream.
    bytes: u64,
}

/// The hash of a file, and the text that tells it.
struct FileHash {
    text: Vec<u8>,
    value: Vec<u8>,
}

/// Reads the name of a part: a member, and a number of three digits or more.
fn part_of(name: &str, bytes: u64) -> Option<Part> {
    let (member, digits) = name.rsplit_once('.')?;
    let is_number = digits.len() >= 3 && digits.len() <= 9 && digits.bytes().all(|byte| byte.is_ascii_digit());
    let is_plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/';
    let is_member = match member.rsplit_once('/') {
        None => member == "qubes.xml",
        // The whole folder of a template is a member of the name `.`.
        Some((folder, ".")) => is_folder(folder),
        Some((folder, file)) => {
            let is_file = !file.is_empty() && !file.starts_with('.') && file.bytes().all(is_plain);
            is_file && (folder == "dom0-home" || is_folder(folder))
        }
    };
    if !is_number || !is_member {
        return None;
    }
    Some(Part {
        member: member.to_owned(),
        number: digits.parse().ok()?,
        name: name.to_owned(),
        bytes,
    })
}

/// The stream of parts, and what authenticates them.
pub(super) struct Parts<'a> {
    input: Input<'a>,
    /// The part whose content comes next.
    next: Option<Part>,
    passphrase: Passphrase,
    algorithm: HashAlgorithm,
    /// Whether the last block of the stream was one of zeros.
    ends_in_zeros: bool,
    count: usize,
    /// A stream of all files that were opened, if there is to be one.
    copy: Option<Vec<u8>>,
}

impl<'a> Parts<'a> {
    /// Reads the header of a backup, and authenticates it. With `copies`, what is opened is copied.
    pub(super) fn open(input: Input<'a>, passphrase: Passphrase, copies: bool) -> Result<(Self, BackupHeader)> {
        let mut parts = Self {
            input,
            next: None,
            passphrase,
            algorithm: HashAlgorithm::Sha512,
            ends_in_zeros: false,
            count: 0,
            copy: copies.then(Vec::new),
        };
        let start = parts.input.offset();
        let bytes = match parts.file()? {
            Some((name, bytes)) if name == "backup-header" && bytes <= HEADER_BYTES_MAX => {
                content(&mut parts.input, bytes)?
            }
            _ => return Err(parts.damaged(start, None, "its header is missing, or in another place")),
        };
        let hash = parts.hash("backup-header", None)?;
        parts.copy("backup-header", &bytes, &hash)?;
        let header = parse(&bytes).map_err(|problem| parts.input.refused(problem))?;
        parts.algorithm = header.algorithm;
        if !parts.is_authentic(&hash.value, &bytes) {
            let problem = "the passphrase is another one, or its header is damaged";
            return Err(parts.input.refused(problem));
        }
        Ok((parts, header))
    }

    pub(super) fn input(&mut self) -> &mut Input<'a> {
        &mut self.input
    }

    fn file(&mut self) -> Result<Option<(String, u64)>> {
        next_file(&mut self.input, &mut self.ends_in_zeros)
    }

    fn is_authentic(&self, hash: &[u8], content: &[u8]) -> bool {
        self.algorithm.is_hash_of(hash, content, self.passphrase.bytes())
    }

    /// Adds a file and its hash to the copy.
    fn copy(&mut self, name: &str, content: &[u8], hash: &FileHash) -> Result<()> {
        let Some(copy) = &mut self.copy else { return Ok(()) };
        let added = add_file(copy, name, content).and_then(|()| add_file(copy, &format!("{name}.hmac"), &hash.text));
        added.map_err(|problem| self.input.refused(problem))
    }

    /// Adds a part of these bytes to the copy, with its hash.
    pub(super) fn add_to_copy(&mut self, name: &str, content: &[u8]) -> Result<()> {
        let text = self.algorithm.hash_text(content, self.passphrase.bytes());
        let value = Vec::new();
        self.copy(name, content, &FileHash { text, value })
    }

    /// Returns the copy.
    pub(super) fn take_copy(&mut self) -> Vec<u8> {
        self.copy.take().unwrap_or_default()
    }

    /// The hash of a file, which comes behind it.
    fn hash(&mut self, name: &str, volume: Option<&PathBuf>) -> Result<FileHash> {
        let start = self.input.offset();
        let text = match self.file()? {
            Some((hash_name, bytes))
                if hash_name.strip_suffix(".hmac") == Some(name) && bytes <= HASH_FILE_BYTES_MAX =>
            {
                content(&mut self.input, bytes)?
            }
            _ => return Err(self.damaged(start, volume, "the hash of a part is missing, or in another place")),
        };
        let value = hash_of(&text).ok_or_else(|| self.damaged(start, volume, "the hash of a part makes no sense"))?;
        Ok(FileHash { text, value })
    }

    /// The part whose content comes next, or `None` at the end of the stream.
    pub(super) fn peek(&mut self) -> Result<Option<&Part>> {
        if self.next.is_none() {
            let start = self.input.offset();
            let Some((name, bytes)) = self.file()? else {
                return Ok(None);
            };
            let part = part_of(&name, bytes).filter(|_| bytes <= PART_BYTES);
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

    /// Drops the next part and its hash.
    pub(super) fn skip(&mut self) -> Result<()> {
        if let Some(part) = self.next.take() {
            self.input.skip(part.bytes.next_multiple_of(BLOCK as u64))?;
            self.hash(&part.name, None)?;
        }
        Ok(())
    }

    /// The content of the next part, once all of it is authenticated. `volume` is what it belongs to, for errors.
    fn open_part(&mut self, volume: Option<&PathBuf>) -> Result<Vec<u8>> {
        let Some(part) = self.next.take() else {
            return Ok(Vec::new());
        };
        let start = self.input.offset();
        let stored = content(&mut self.input, part.bytes)?;
        let hash = self.hash(&part.name, volume)?;
        if !self.is_authentic(&hash.value, &stored) {
            return Err(self.damaged(start, volume, "a part has another hash"));
        }
        self.copy(&part.name, &stored, &hash)?;
        Ok(stored)
    }

    pub(super) fn damaged(&self, start: u64, volume: Option<&PathBuf>, problem: &str) -> Error {
        let length = self.input.offset() - start;
        self.input.damaged(start, length, volume.cloned(), problem)
    }
}

/// What the parts of a member hold, one after the other, as it is stored.
pub(super) struct MemberReader<'a> {
    parts: Rc<RefCell<Parts<'a>>>,
    member: String,
    volume: Option<PathBuf>,
    number: u32,
    content: Vec<u8>,
    at: usize,
    /// The length of the first part, which all but the last have. The writer may add empty ones behind that.
    first_bytes: Option<u64>,
    last_bytes: u64,
}

impl<'a> MemberReader<'a> {
    /// The member whose first part comes next.
    pub(super) fn new(parts: &Rc<RefCell<Parts<'a>>>, member: String, volume: Option<PathBuf>) -> Self {
        Self {
            parts: Rc::clone(parts),
            member,
            volume,
            number: 0,
            content: Vec::new(),
            at: 0,
            first_bytes: None,
            last_bytes: 0,
        }
    }

    /// Opens the next part. Returns false at the end of the member.
    fn next_part(&mut self) -> Result<bool> {
        let mut parts = self.parts.borrow_mut();
        let start = parts.input.offset();
        let (number, bytes) = match parts.peek()? {
            Some(part) if part.member == self.member => (part.number, part.bytes),
            _ => {
                // The writer begins another part after a full one, if need be an empty one.
                if self.last_bytes == PART_BYTES {
                    return Err(parts.damaged(start, self.volume.as_ref(), "its last part is missing"));
                }
                return Ok(false);
            }
        };
        if number != self.number {
            let problem = format!("part {:03} is missing, and {number:03} is there", self.number);
            return Err(parts.damaged(start, self.volume.as_ref(), &problem));
        }
        let is_behind_end = self
            .first_bytes
            .is_some_and(|first| self.last_bytes != first || bytes > first);
        if is_behind_end && bytes > 0 {
            return Err(parts.damaged(start, self.volume.as_ref(), "a part follows one that was the last"));
        }
        self.content = Vec::new();
        self.content = parts.open_part(self.volume.as_ref())?;
        self.at = 0;
        self.number += 1;
        self.last_bytes = bytes;
        self.first_bytes.get_or_insert(bytes);
        Ok(true)
    }
}

impl Read for MemberReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.content.len() && !buffer.is_empty() {
            if !self.next_part().map_err(io::Error::other)? {
                return Ok(0);
            }
        }
        Ok(hand_out(&self.content, &mut self.at, buffer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_parts_are_of_one_form() {
        for (name, member, number) in [
            ("qubes.xml.000", "qubes.xml", 0),
            ("vm7/private.img.012", "vm7/private.img", 12),
            ("vm7/private.img.1000", "vm7/private.img", 1000),
            ("vm9/..000", "vm9/.", 0),
            ("appvms/work/root.img.001", "appvms/work/root.img", 1),
            ("vm-templates/fedora-20-x64/..003", "vm-templates/fedora-20-x64/.", 3),
            ("dom0-home/user.000", "dom0-home/user", 0),
        ] {
            let part = part_of(name, 500).unwrap();
            assert_eq!((part.member.as_str(), part.number), (member, number));
        }
        for wrong in [
            "vm7/private.img",
            "vm7/private.img.000.hmac",
            "vm7/private.img.00",
            "vm7/private.img.+01",
            "vm/private.img.000",
            "vm7/../private.img.000",
            "vm7/...000",
            "vm7/.000",
            "vm7/a/b.000",
            "appvms/../private.img.000",
            "appvms/private.img/..000/x",
            "other/work/private.img.000",
            "../qubes.xml.000",
            "other.xml.000",
            "dom0-home/..000",
        ] {
            assert_eq!(part_of(wrong, 1), None, "{wrong}");
        }
    }
}
