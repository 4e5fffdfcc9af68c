//! The skeleton of a backup of Qubes OS: the same backup without its images. Its parts are bound to the backup's id and to their names, and not to
//! each other, so that what is left of them is a backup as well. `qvm-backup-restore` makes machines of it that have their settings and blank
//! volumes. Parts are copied as they are. A machine of which nothing is left gets what `qvm-backup` writes of a machine without files: a member
//! `empty`, which holds an empty file. That reader extracts nothing of it, and fails if a machine has no member at all. A machine that must have
//! images has such a member in skeletons only: by that they are told from backups that have lost images.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

use rayon::prelude::*;

use super::machines::Machine;
use super::{EMPTY, Qvm};
use crate::error::{Error, Result};
use crate::foreign::Compression;
use crate::foreign::tar::BLOCK;

/// Bytes of a skeleton. Beside images, machines have a few kilobytes.
const BYTES_MAX: usize = 256 << 20;
/// Bytes of a name in a header that has no other place for one.
const NAME_BYTES_MAX: usize = 100;
/// What archives inside of parts are padded to, as tar does it.
const RECORD_BYTES: usize = 10_240;

/// A backup without its images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skeleton {
    /// All bytes of it.
    pub bytes: Vec<u8>,
    /// The machines that it has.
    pub machines: Vec<Machine>,
    /// Whether the home folder of dom0 was backed up. The skeleton does not have it.
    pub lacks_home: bool,
}

/// What a skeleton is refused with where images are to be read.
pub(super) const IS_SKELETON: &str = "it is a skeleton, which `vmfold import --qubes --skeleton` wrote for qvm-backup-restore: it has no images, and the \
    backup that it was made of has them";

/// Whether a backup is a skeleton. `has_image` tells whether a machine's image is there, and `has_member` whether a member is.
pub(super) fn is_skeleton(
    machines: &[Machine],
    has_image: impl Fn(&Machine, &str) -> bool,
    has_member: impl Fn(&str) -> bool,
) -> bool {
    let has_any = |machine: &Machine| machine.images.iter().any(|image| has_image(machine, image));
    let is_marked = |machine: &Machine| !machine.images.is_empty() && has_member(&empty_of(&machine.folder));
    machines.iter().any(is_marked) && !machines.iter().any(has_any)
}

/// The folders of machines that get a member `empty` in a skeleton: those that have nothing else of what is in `have`, and at least one that must
/// have images. `has_member` tells whether a member is in the backup.
pub(super) fn to_be_marked(
    machines: &[Machine],
    have: &BTreeSet<String>,
    has_member: impl Fn(&str) -> bool,
) -> Vec<String> {
    let is_free = |machine: &&Machine| !has_member(&empty_of(&machine.folder));
    let mut marked: Vec<&Machine> = machines
        .iter()
        .filter(|machine| !have.contains(&machine.folder))
        .collect();
    let mut with_images = machines.iter().filter(|machine| !machine.images.is_empty());
    if marked.iter().all(|machine| machine.images.is_empty()) && with_images.clone().all(|machine| is_free(&machine)) {
        marked.extend(with_images.next());
    }
    marked.iter().map(|machine| machine.folder.clone()).collect()
}

/// The member of a machine without files.
pub(super) fn empty_of(folder: &str) -> String {
    format!("{folder}/{EMPTY}")
}

impl Qvm<'_> {
    /// Reads on to the end, and makes a skeleton. What is copied of it is not decrypted.
    pub(super) fn into_skeleton(mut self, kdf_memory_bytes: u64) -> Result<Skeleton> {
        self.monitor.phase("Reading the backup", 0);
        let mut skeleton = Skeleton {
            bytes: Vec::new(),
            machines: std::mem::take(&mut self.machines),
            lacks_home: false,
        };
        let kept = self.parts.borrow_mut().take_kept();
        for (name, content) in kept {
            self.add(&mut skeleton, &name, &content)?;
        }
        let mut have = BTreeSet::new();
        loop {
            let next = self.parts.borrow_mut().peek()?.map(|part| part.member.clone());
            let Some(member) = next else { break };
            if !self.seen.insert(member.clone()) {
                return Err(self.damaged(None, "it has a member twice"));
            }
            let (folder, file) = member.split_once('/').unwrap_or((&member, ""));
            let is_known = skeleton.machines.iter().any(|machine| machine.folder == folder);
            skeleton.lacks_home |= folder == "dom0-home";
            match is_known {
                true if !is_image(file) => {
                    have.insert(folder.to_owned());
                    self.copy_member(&mut skeleton, &member)?;
                }
                false if folder != "dom0-home" => {
                    return Err(self.damaged(None, "it has a member of a machine that its qubes.xml does not have"));
                }
                _ => {
                    self.checks_all = false;
                    self.pass_over(&member)?;
                }
            }
        }
        self.machines.clone_from(&skeleton.machines);
        self.check_images(|member| self.seen.contains(member))?;
        let marked = to_be_marked(&self.machines, &have, |member| self.seen.contains(member));
        self.add_empty(&mut skeleton, &marked, kdf_memory_bytes)?;
        Ok(skeleton)
    }

    /// Copies the parts of a member.
    fn copy_member(&mut self, skeleton: &mut Skeleton, member: &str) -> Result<()> {
        let mut number = 0;
        loop {
            let next = {
                let mut parts = self.parts.borrow_mut();
                parts
                    .peek()?
                    .filter(|part| part.member == member)
                    .map(|part| part.number)
            };
            let Some(found) = next else { return Ok(()) };
            if found != number {
                return Err(self.damaged(None, "a part of a member is missing"));
            }
            number += 1;
            let stored = self.parts.borrow_mut().take_stored()?;
            if let Some((name, content)) = stored {
                self.add(skeleton, &name, &content)?;
            }
        }
    }

    /// Adds the member of machines without files. Keys are derived on as many cores as memory allows.
    fn add_empty(&self, skeleton: &mut Skeleton, folders: &[String], kdf_memory_bytes: u64) -> Result<()> {
        let at_once = self.parts.borrow().keys_at_once(kdf_memory_bytes);
        for folders in folders.chunks(at_once) {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let mut plain = Vec::new();
            for folder in folders {
                let mut archive = Vec::new();
                let member = empty_of(folder);
                add_file(&mut archive, &member, &[])
                    .map_err(|problem| self.parts.borrow_mut().input().refused(problem))?;
                archive.resize(archive.len().next_multiple_of(RECORD_BYTES), 0);
                let name = format!("{member}.000");
                let content = compressed(&archive, self.compression).map_err(|error| {
                    let parts = self.parts.borrow();
                    Error::io("make a part of", parts.path())(error)
                })?;
                plain.push((name, content));
            }
            let encryptor = self.parts.borrow().encryptor()?;
            let parts: Result<Vec<(String, Vec<u8>)>> = plain
                .into_par_iter()
                .map(|(name, content)| Ok((format!("{name}.enc"), encryptor.encrypt(&name, &content)?)))
                .collect();
            for (name, content) in parts? {
                self.add(skeleton, &name, &content)?;
            }
        }
        Ok(())
    }

    /// Adds a file to a skeleton.
    fn add(&self, skeleton: &mut Skeleton, name: &str, content: &[u8]) -> Result<()> {
        let added = add_file(&mut skeleton.bytes, name, content);
        added.map_err(|problem| self.parts.borrow_mut().input().refused(problem))
    }
}

/// Whether a file of a machine is an image.
pub(super) fn is_image(file: &str) -> bool {
    std::path::Path::new(file)
        .extension()
        .is_some_and(|extension| extension == "img")
}

/// Adds an archive of one file to a stream of them, as `tar --format=ustar` writes it. Returns why that is not possible.
pub(super) fn add_file(stream: &mut Vec<u8>, name: &str, content: &[u8]) -> std::result::Result<(), &'static str> {
    if stream.len() + content.len() > BYTES_MAX {
        return Err("what it has beside images is larger than vmfold takes");
    }
    if name.len() > NAME_BYTES_MAX {
        return Err("it has a part with a longer name than vmfold takes");
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let seconds = now.map_or(1, |time| time.as_secs());
    let mut header = [0; BLOCK];
    let mut put = |at: usize, field: &[u8]| header[at..at + field.len()].copy_from_slice(field);
    put(0, name.as_bytes());
    put(100, b"0000600");
    put(108, b"0000000");
    put(116, b"0000000");
    put(124, format!("{:011o}", content.len()).as_bytes());
    put(136, format!("{seconds:011o}").as_bytes());
    put(148, b"        ");
    put(156, b"0");
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    stream.extend(header);
    stream.extend(content);
    // Padding, and the two blocks of zeros that end an archive.
    stream.resize(stream.len().next_multiple_of(BLOCK) + 2 * BLOCK, 0);
    Ok(())
}

/// Compresses some bytes as the members of a backup are compressed.
fn compressed(bytes: &[u8], compression: Option<Compression>) -> io::Result<Vec<u8>> {
    const LEVEL: u32 = 6;
    match compression {
        None => Ok(bytes.to_vec()),
        Some(Compression::Gzip) => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(LEVEL));
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        Some(Compression::Bzip2) => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::new(LEVEL));
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        Some(Compression::Xz) => {
            let options = lzma_rust2::XzOptions::with_preset(LEVEL);
            let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options)?;
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        Some(Compression::Lzma) => {
            let options = lzma_rust2::LzmaOptions::with_preset(LEVEL);
            let mut encoder = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, Some(bytes.len() as u64))?;
            encoder.write_all(bytes)?;
            encoder.finish()
        }
        Some(Compression::Zstd) => zstd::stream::encode_all(bytes, 0),
        Some(Compression::Lz4 | Compression::Lzop) => Err(io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skeleton_is_known_by_what_no_backup_has() {
        let machine = |folder: &str, images: &[&'static str]| Machine {
            name: folder.into(),
            folder: folder.into(),
            path: folder.into(),
            images: images.to_vec(),
        };
        let machines = [
            machine("vm1", &[]),
            machine("vm2", &["private.img"]),
            machine("vm3", &["root.img"]),
        ];
        let of = |members: &[&str]| {
            let has = |member: &str| members.contains(&member);
            is_skeleton(
                &machines,
                |machine, image| has(&format!("{}/{image}", machine.folder)),
                has,
            )
        };
        assert!(of(&["vm2/empty"]) && of(&["vm1/empty", "vm2/firewall.xml", "vm3/empty"]));
        for members in [
            &[][..],
            &["vm1/empty"],
            &["vm2/firewall.xml"],
            &["vm2/empty", "vm3/root.img"],
            &["vm2/private.img", "vm3/root.img"],
        ] {
            assert!(!of(members), "{members:?}");
        }
        let marked = |have: &[&str], members: &[&str]| {
            let have = have.iter().map(|folder| (*folder).to_owned()).collect();
            to_be_marked(&machines, &have, |member| members.contains(&member)).join(" ")
        };
        for (have, members, expected) in [
            (&[][..], &[][..], "vm1 vm2 vm3"),
            (&["vm1", "vm2"], &[], "vm3"),
            (&["vm2", "vm3"], &[], "vm1 vm2"),
            (&["vm1", "vm2", "vm3"], &[], "vm2"),
            (&["vm1", "vm2", "vm3"], &["vm3/empty"], ""),
        ] {
            assert_eq!(marked(have, members), expected, "{have:?} {members:?}");
        }
    }

    #[test]
    fn what_is_compressed_is_what_the_readers_take() {
        let bytes = vec![0; RECORD_BYTES];
        for compression in [
            Compression::Gzip,
            Compression::Bzip2,
            Compression::Xz,
            Compression::Lzma,
            Compression::Zstd,
        ] {
            let made = compressed(&bytes, Some(compression)).unwrap();
            let mut decoder = compression.decoder(Box::new(io::Cursor::new(made)), 64 << 20).unwrap();
            let mut read = Vec::new();
            io::Read::read_to_end(&mut decoder, &mut read).unwrap();
            assert_eq!(read, bytes, "{compression:?}");
        }
    }
}
