//! What an OVA has beyond other tar archives (DMTF DSP0243): its first file describes machines, disks are streams of compressed grains, and a
//! manifest has the hashes of the files.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Read};
use std::rc::Rc;

use sha2::{Digest, Sha256};

use super::container::vmdk;
use super::tar::{Entry, EntryKind, Tar};
use super::{Compression, Input, hand_out};
use crate::error::{Error, Result};

/// Bytes of all manifests. What is known of them takes about ten times as much.
pub(super) const MANIFEST_BYTES_MAX: u64 = 1 << 20;
/// Bytes that tell what a member is. Those of a compressed one tell it after decompression.
const FIRST_BYTES: usize = 4096;
/// Bytes that are read of a member at a time.
const READ_BYTES: u64 = 1 << 16;

/// Whether an archive is an OVA, by its first entry.
pub(super) fn is_ova(first: &Entry) -> bool {
    first.kind == EntryKind::File && ends_with(&first.name, b".ovf")
}

/// Whether an entry is a manifest.
pub(super) fn is_manifest(name: &[u8]) -> bool {
    ends_with(name, b".mf")
}

fn ends_with(name: &[u8], suffix: &[u8]) -> bool {
    let at = name.len().checked_sub(suffix.len());
    at.is_some_and(|at| at > 0 && name[at..].eq_ignore_ascii_case(suffix))
}

/// An archive, and the hash of what was read of its current member.
pub(super) struct Members<'a> {
    pub(super) tar: Tar<'a>,
    hash: Sha256,
}

impl<'a> Members<'a> {
    pub(super) fn new(tar: Tar<'a>) -> Self {
        Self {
            tar,
            hash: Sha256::new(),
        }
    }

    /// Reads the next bytes of the current member, as [`Tar::content`] does.
    pub(super) fn hashed(&mut self, buffer: &mut Vec<u8>, length: u64) -> Result<()> {
        self.tar.content(buffer, length)?;
        self.hash.update(&buffer[..]);
        Ok(())
    }

    /// The hash of what was read since the last call.
    pub(super) fn take_hash(&mut self) -> Hash {
        self.hash.finalize_reset().into()
    }
}

pub(super) type Hash = [u8; 32];

/// Reads the content of the current member.
pub(super) struct MemberReader<'a> {
    members: Rc<RefCell<Members<'a>>>,
    buffer: Vec<u8>,
    at: usize,
}

impl<'a> MemberReader<'a> {
    pub(super) fn new(members: &Rc<RefCell<Members<'a>>>) -> Self {
        Self {
            members: Rc::clone(members),
            buffer: Vec::new(),
            at: 0,
        }
    }
}

impl Read for MemberReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.buffer.len() {
            self.at = 0;
            let read = self.members.borrow_mut().hashed(&mut self.buffer, READ_BYTES);
            read.map_err(io::Error::other)?;
        }
        Ok(hand_out(&self.buffer, &mut self.at, buffer))
    }
}

/// How a member holds a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DiskForm {
    Plain,
    Compressed(Compression),
}

/// Whether a member holds a disk that is read as a stream, and how. Nothing is taken of it.
pub(super) fn disk_form(member: &mut Input<'_>) -> Result<Option<DiskForm>> {
    let window_bytes = member.limits().window_bytes;
    let first = member.peek(FIRST_BYTES)?;
    if vmdk::is_stream(first) {
        return Ok(Some(DiskForm::Plain));
    }
    let Some(compression) = Compression::of(first).filter(|compression| *compression == Compression::Gzip) else {
        return Ok(None);
    };
    let mut inside = [0; 12];
    let decoder = compression.decoder(Box::new(first), window_bytes);
    let is_disk = decoder.is_ok_and(|mut decoder| decoder.read_exact(&mut inside).is_ok()) && vmdk::is_stream(&inside);
    Ok(is_disk.then_some(DiskForm::Compressed(compression)))
}

/// The name of the image that a disk of this name becomes.
pub(super) fn image_name(name: &[u8], form: DiskForm) -> Vec<u8> {
    let without = |name: &[u8], suffix: &[u8]| {
        let length = name.len() - if ends_with(name, suffix) { suffix.len() } else { 0 };
        name[..length].to_vec()
    };
    let name = match form {
        DiskForm::Plain => name.to_vec(),
        DiskForm::Compressed(_) => without(name, b".gz"),
    };
    [&without(&name, b".vmdk")[..], b".img"].concat()
}

/// What manifests say of files, by name.
#[derive(Debug, Default)]
pub(super) struct Manifest {
    hashes: HashMap<Vec<u8>, Option<Hash>>,
}

impl Manifest {
    /// Reads a manifest: lines such as `SHA256(disk.vmdk)= ` with the hash. Returns the name of another hash that it has, if there is one.
    pub(super) fn take(&mut self, text: &[u8]) -> std::result::Result<Option<String>, &'static str> {
        let mut other = None;
        for line in text
            .split(|byte| *byte == b'\n')
            .map(<[u8]>::trim_ascii)
            .filter(|line| !line.is_empty())
        {
            let wrong = "its manifest has a line that makes no sense";
            let open = line.iter().position(|byte| *byte == b'(').ok_or(wrong)?;
            let close = line
                .iter()
                .rposition(|byte| *byte == b')')
                .filter(|close| *close > open)
                .ok_or(wrong)?;
            let (kind, name) = (line[..open].trim_ascii(), line[open + 1..close].trim_ascii());
            let digits = line[close + 1..]
                .trim_ascii()
                .strip_prefix(b"=")
                .ok_or(wrong)?
                .trim_ascii();
            let is_sha256 = kind.eq_ignore_ascii_case(b"SHA256");
            if !is_sha256 {
                other = Some(String::from_utf8_lossy(&kind[..kind.len().min(20)]).into_owned());
            }
            let hash = is_sha256.then(|| hash_of(digits).ok_or(wrong)).transpose()?;
            if self
                .hashes
                .insert(name.to_vec(), hash)
                .is_some_and(|before| before != hash)
            {
                return Err("its manifest has two hashes of a file");
            }
        }
        Ok(other)
    }

    /// Whether a file has the hash that it must have, if there is one of it.
    pub(super) fn allows(&self, name: &[u8], hash: &Hash) -> bool {
        let told = self
            .hashes
            .get(name)
            .or_else(|| self.hashes.get(name.strip_prefix(b"./")?));
        told.and_then(Option::as_ref).is_none_or(|told| told == hash)
    }

    /// A file that is named, and is not among these.
    pub(super) fn missing(&self, is_there: impl Fn(&[u8]) -> bool) -> Option<&[u8]> {
        let names = self.hashes.keys().map(Vec::as_slice);
        names
            .filter(|name| !is_there(name) && !is_there(&[b"./", *name].concat()))
            .min()
    }
}

/// A hash from its hexadecimal digits.
fn hash_of(digits: &[u8]) -> Option<Hash> {
    let digit = |digit: u8| u8::try_from(char::from(digit).to_digit(16)?).ok();
    let mut hash = [0; 32];
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.len() != hash.len() || !rest.is_empty() {
        return None;
    }
    for (byte, [high, low]) in hash.iter_mut().zip(pairs) {
        *byte = digit(*high)? << 4 | digit(*low)?;
    }
    Some(hash)
}

/// The error of a member whose hash is another one.
pub(super) fn has_other_hash(tar: &Tar<'_>, at: u64, name: &[u8]) -> Error {
    let name = String::from_utf8_lossy(&name[..name.len().min(200)]).into_owned();
    tar.damaged(
        at,
        &format!(
            "`{}` has another hash than its manifest says",
            crate::shown::shown(std::path::Path::new(&name))
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifests_are_read_as_openssl_and_others_write_them() {
        let mut manifest = Manifest::default();
        let digits = "0F".repeat(32);
        let text = format!(
            "SHA256(a (1).vmdk)= {digits}\r\nsha256 (b)={}\n\nSHA1(c)= 12\n",
            digits.to_lowercase()
        );
        assert_eq!(manifest.take(text.as_bytes()), Ok(Some("SHA1".into())));
        for (name, hash, is_allowed) in [
            (&b"a (1).vmdk"[..], [15; 32], true),
            (b"a (1).vmdk", [14; 32], false),
            (b"./b", [15; 32], true),
            (b"./b", [14; 32], false),
            (b"c", [14; 32], true),
            (b"d", [14; 32], true),
        ] {
            assert_eq!(manifest.allows(name, &hash), is_allowed, "{name:?}");
        }
        assert_eq!(manifest.missing(|name| name != b"c" && name != b"./c"), Some(&b"c"[..]));
        assert_eq!(manifest.missing(|name| name.starts_with(b"./")), None);
        for wrong in [
            "SHA256(a)= 12",
            "SHA256 a = 12",
            "SHA256)a(= 12",
            &format!("SHA256(b)= {}", "00".repeat(32)),
        ] {
            assert!(manifest.take(wrong.as_bytes()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn disks_are_called_as_images() {
        let gzip = DiskForm::Compressed(Compression::Gzip);
        for (name, form, expected) in [
            (&b"a/disk.vmdk"[..], DiskForm::Plain, &b"a/disk.img"[..]),
            (b"disk.VMDK.gz", gzip, b"disk.img"),
            (b"disk", DiskForm::Plain, b"disk.img"),
            (b".vmdk", DiskForm::Plain, b".vmdk.img"),
        ] {
            assert_eq!(image_name(name, form), expected);
        }
    }
}
