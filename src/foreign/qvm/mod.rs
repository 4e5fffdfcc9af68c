//! Backups of Qubes OS: those in version 4, and in `v3` those in version 3. Version 4 is what `qvm-backup` of R4.0 and later writes (qubes-core-admin,
//! `qubes/backup.py`; qubes-core-admin-client, `qubesadmin/backup/restore.py`). Beyond what that reader checks, this one proves that nothing is
//! missing: each machine that `qubes.xml` names has its images, each member has all of its parts, and each compressed stream and each tar archive
//! has its end.

mod header;
mod machines;
mod parts;
mod scrypt_file;
mod skeleton;
mod stream;
mod v3;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::io::BufReader;
use std::path::PathBuf;
use std::rc::Rc;

pub use self::machines::{Machine, is_name, machines_of};
use self::parts::{MemberReader, Parts};
pub(super) use self::parts::{begins_with_header, begins_without_header};
pub use self::skeleton::Skeleton;
use self::skeleton::{IS_SKELETON, is_skeleton};
use super::tar::{Entry, EntryKind, Stored, Tar};
use super::{Backup, Compression, Event, Input, Origin, Volume, volume_name};
use crate::error::{Error, Result};
use crate::foreign::AskPassphrase;
use crate::monitor::Monitor;
use crate::store::Store;

/// Bytes that are handed over at a time.
const PART_BYTES: u64 = 1 << 20;
/// Bytes of a `qubes.xml`.
const XML_BYTES_MAX: u64 = 8 << 20;
/// Bytes that a backup begins with, by which its version is known.
const HEAD_BYTES: usize = 4096;
/// What a machine has that nothing else was backed up of.
const EMPTY: &str = "empty";

/// A member that is being read.
struct Member<'a> {
    name: String,
    /// Its volume's number and path.
    volume: usize,
    path: PathBuf,
    /// Its archive; `None` until its first part is to be opened.
    tar: Option<Tar<'a>>,
    size: u64,
    /// What of it is to come, the first last.
    stored: Vec<Stored>,
}

/// A backup of Qubes OS.
pub(super) struct Qvm<'a> {
    parts: Rc<RefCell<Parts<'a>>>,
    compression: Option<Compression>,
    /// Its identifier, and when its list of machines was written.
    origin: Origin,
    machines: Vec<Machine>,
    member: Option<Member<'a>>,
    /// Members that came.
    seen: HashSet<String>,
    volumes: Vec<String>,
    left_out: BTreeSet<usize>,
    checks_all: bool,
    is_ended: bool,
    /// Whether it has the home folder of dom0, as far as it was read.
    has_home: bool,
    monitor: &'a dyn Monitor,
}

/// What a backup is opened with.
pub(super) struct QvmOptions<'a, 'b> {
    /// Where the backup is, if it can be read anywhere.
    pub(super) store: Option<&'a dyn Store>,
    pub(super) ask_passphrase: &'b AskPassphrase<'b>,
    /// Memory for deriving keys, in bytes.
    pub(super) kdf_memory_bytes: u64,
    /// Whether parts are authenticated that are not restored.
    pub(super) checks_all: bool,
    /// Whether a skeleton is made of it.
    pub(super) keeps: bool,
    pub(super) monitor: &'a dyn Monitor,
}

/// Opens a backup, whose first file is its header.
pub(super) fn open<'a>(mut input: Input<'a>, options: &QvmOptions<'a, '_>) -> Result<Box<dyn Backup + 'a>> {
    match version(&mut input)?.as_deref() {
        Some("3") => Ok(Box::new(v3::Qvm3::open(input, options)?)),
        _ => Ok(Box::new(Qvm::open(input, options)?)),
    }
}

/// Makes a skeleton of a backup, whose first file is its header.
pub(super) fn skeleton<'a>(mut input: Input<'a>, options: &QvmOptions<'a, '_>) -> Result<Skeleton> {
    match version(&mut input)?.as_deref() {
        Some("3") => v3::Qvm3::open(input, options)?.into_skeleton(),
        _ => Qvm::open(input, options)?.into_skeleton(options.kdf_memory_bytes),
    }
}

/// The version that the header of a backup tells, before anything is authenticated.
fn version(input: &mut Input<'_>) -> Result<Option<String>> {
    let files = stream::first_files(input.peek(HEAD_BYTES)?);
    let mut headers = files.filter(|(name, _)| name == b"backup-header");
    Ok(headers.find_map(|(_, content)| header::version_of(content).map(str::to_owned)))
}

/// What an entry of an archive holds, all of it. The caller has found that it is not too long.
fn whole(tar: &mut Tar<'_>, entry: &Entry) -> Result<Vec<u8>> {
    let mut content = vec![0; usize::try_from(entry.size).unwrap_or(0)];
    let mut buffer = Vec::new();
    for range in &entry.stored {
        tar.content(&mut buffer, range.length)?;
        let at = usize::try_from(range.offset).unwrap_or(usize::MAX);
        content[at..at + buffer.len()].copy_from_slice(&buffer);
    }
    Ok(content)
}

impl<'a> Qvm<'a> {
    /// Reads the header, and what machines there are.
    pub(super) fn open(mut input: Input<'a>, options: &QvmOptions<'a, '_>) -> Result<Self> {
        if let Some(other) = version(&mut input)?.filter(|version| version != "4") {
            return Err(input.refused(header::other_version(&other)));
        }
        let passphrase = (options.ask_passphrase)()?;
        let mut parts = Parts::new(input, options.store, passphrase, options.kdf_memory_bytes);
        if options.keeps {
            parts.keep();
        }
        let bytes = parts.header()?;
        let header = header::parse(&bytes).map_err(|problem| parts.input().refused(problem))?;
        parts.begin(header.id.clone())?;
        let mut backup = Self {
            parts: Rc::new(RefCell::new(parts)),
            compression: header.compression,
            origin: Origin {
                name: Some(header.id),
                time: None,
            },
            machines: Vec::new(),
            member: None,
            seen: HashSet::new(),
            volumes: Vec::new(),
            left_out: BTreeSet::new(),
            checks_all: options.checks_all,
            is_ended: false,
            has_home: false,
            monitor: options.monitor,
        };
        backup.take_machines()?;
        Ok(backup)
    }

    /// Reads `qubes.xml`, which comes first.
    fn take_machines(&mut self) -> Result<()> {
        const NAME: &str = "qubes.xml";
        let is_first = self.parts.borrow_mut().peek()?.is_some_and(|part| part.member == NAME);
        if !is_first {
            return Err(self.damaged(None, "qubes.xml is missing, or in another place"));
        }
        self.seen.insert(NAME.into());
        let mut tar = self.archive_of(NAME, None)?;
        let entry = self.only_entry(&mut tar, NAME, None)?;
        if entry.size > XML_BYTES_MAX {
            return Err(self
                .parts
                .borrow_mut()
                .input()
                .refused("its qubes.xml is larger than vmfold takes"));
        }
        self.origin.time = entry.time;
        let xml = whole(&mut tar, &entry)?;
        Self::end_archive(&mut tar)?;
        let refused = |problem: String| self.parts.borrow_mut().input().refused(problem);
        let xml = String::from_utf8(xml).map_err(|_| refused("its qubes.xml is no text".into()))?;
        self.machines = machines_of(&xml).map_err(refused)?;
        let known = self.parts.borrow().known_members();
        match known {
            Some(members) => self.check_images(|member| members.contains(member)),
            None => Ok(()),
        }
    }

    /// Checks that each image is there that the machines must have.
    fn check_images(&self, is_there: impl Fn(&str) -> bool) -> Result<()> {
        let has_image = |machine: &Machine, image: &str| is_there(&format!("{}/{image}", machine.folder));
        if is_skeleton(&self.machines, has_image, &is_there) {
            return Err(self.parts.borrow_mut().input().refused(IS_SKELETON));
        }
        for machine in &self.machines {
            for image in &machine.images {
                if !has_image(machine, image) {
                    let path = machine.path.join(image);
                    return Err(self.damaged(Some(&path), "it is not there, and its machine was backed up"));
                }
            }
        }
        Ok(())
    }

    /// The archive that a member is, whose first part comes next.
    fn archive_of(&self, member: &str, volume: Option<PathBuf>) -> Result<Tar<'a>> {
        let (path, limits) = {
            let mut parts = self.parts.borrow_mut();
            (parts.input().path().to_owned(), *parts.input().limits())
        };
        let reader = MemberReader::new(&self.parts, member.to_owned(), volume.clone());
        let reader = BufReader::with_capacity(1 << 16, reader);
        let input = Input::of_member(&path, Box::new(reader), volume, limits, self.monitor);
        let input = match self.compression {
            Some(compression) => input.decompressed(compression)?,
            None => input,
        };
        Ok(Tar::new(input))
    }

    /// The only entry of a member, which is a file of the member's name.
    fn only_entry(&self, tar: &mut Tar<'a>, member: &str, volume: Option<&PathBuf>) -> Result<Entry> {
        match tar.next_entry()? {
            Some(entry) if entry.kind == EntryKind::File && entry.name == member.as_bytes() => {
                if entry.size > tar.input().limits().volume_bytes {
                    return Err(tar.input().refused("an image is larger than vmfold takes"));
                }
                Ok(entry)
            }
            _ => Err(self.damaged(volume, "a member holds something else than its image")),
        }
    }

    /// Checks that nothing follows the only entry of a member, to the end of its last part.
    fn end_archive(tar: &mut Tar<'a>) -> Result<()> {
        if tar.next_entry()?.is_some() {
            let start = tar.input().offset();
            return Err(tar.damaged(start, "a member holds more than its image"));
        }
        tar.input().zeros_to_end()
    }

    /// Begins the next member. Returns the volume that it is, or `None` if it is passed over.
    fn begin(&mut self, name: String) -> Result<Option<Event>> {
        if !self.seen.insert(name.clone()) {
            return Err(self.damaged(None, "it has a member twice"));
        }
        let (folder, file) = name.split_once('/').unwrap_or((&name, ""));
        let machine = self.machines.iter().find(|machine| machine.folder == folder);
        let path = match machine {
            Some(machine) if file != EMPTY => machine.path.join(volume_name::component(file.as_bytes())),
            Some(_) => {
                self.pass_over(&name)?;
                return Ok(None);
            }
            None if folder == "dom0-home" => {
                if !std::mem::replace(&mut self.has_home, true) {
                    self.monitor
                        .note("The home folder of dom0 is in the backup, and is left out");
                }
                self.pass_over(&name)?;
                return Ok(None);
            }
            None => return Err(self.damaged(None, "it has a member of a machine that its qubes.xml does not have")),
        };
        let volume = self.volumes.len();
        self.volumes.push(name.clone());
        self.member = Some(Member {
            name,
            volume,
            path: path.clone(),
            tar: None,
            size: 0,
            stored: Vec::new(),
        });
        Ok(Some(Event::Volume(Volume {
            path,
            size: None,
            time: None,
        })))
    }

    /// Passes over the parts of a member. They are authenticated if all are checked.
    fn pass_over(&mut self, name: &str) -> Result<()> {
        if self.checks_all {
            let mut reader = MemberReader::new(&self.parts, name.to_owned(), None);
            let read = std::io::copy(&mut reader, &mut std::io::sink());
            return read.map(drop).map_err(|error| match error.downcast::<Error>() {
                Ok(error) => error,
                Err(error) => Error::io("read", self.parts.borrow_mut().input().path())(error),
            });
        }
        let mut parts = self.parts.borrow_mut();
        parts.skipped.insert(name.to_owned());
        while parts.peek()?.is_some_and(|part| part.member == name) {
            parts.skip()?;
        }
        Ok(())
    }

    /// The next content of the member, or its end.
    fn content(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        let Some(mut member) = self.member.take() else {
            return Ok(None);
        };
        let volume = member.volume;
        if self.left_out.contains(&volume) {
            self.pass_over(&member.name)?;
            return Ok(None);
        }
        if member.tar.is_none() {
            let mut tar = self.archive_of(&member.name, Some(member.path.clone()))?;
            let entry = self.only_entry(&mut tar, &member.name, Some(&member.path))?;
            (member.size, member.stored) = (entry.size, entry.stored);
            member.stored.reverse();
            member.tar = Some(tar);
        }
        let Some(tar) = &mut member.tar else {
            return Ok(None);
        };
        let Some(range) = member.stored.last_mut() else {
            Self::end_archive(tar)?;
            return Ok(Some(Event::End {
                volume,
                size: member.size,
            }));
        };
        let (offset, length) = (range.offset, range.length.min(PART_BYTES));
        range.offset += length;
        range.length -= length;
        if range.length == 0 {
            member.stored.pop();
        }
        tar.content(buffer, length)?;
        self.member = Some(member);
        Ok(Some(Event::Data { volume, offset }))
    }

    fn damaged(&self, volume: Option<&PathBuf>, problem: &str) -> Error {
        let parts = self.parts.borrow();
        parts.damaged(parts.position(), volume, problem)
    }
}

impl Backup for Qvm<'_> {
    fn kind(&self) -> &'static str {
        "a backup of Qubes OS"
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        self.parts.borrow_mut().read_ahead();
        while !self.is_ended {
            if let Some(event) = self.content(buffer)? {
                return Ok(Some(event));
            }
            let next = self.parts.borrow_mut().peek()?.map(|part| part.member.clone());
            match next {
                Some(member) => {
                    if let Some(event) = self.begin(member)? {
                        return Ok(Some(event));
                    }
                }
                None => self.is_ended = true,
            }
        }
        self.check_images(|member| self.seen.contains(member))?;
        Ok(None)
    }

    fn origin(&self) -> Origin {
        self.origin.clone()
    }

    fn proves_each_volume(&self) -> bool {
        true
    }

    fn machines(&self) -> &[Machine] {
        &self.machines
    }

    fn leave_out(&mut self, volume: usize) {
        self.left_out.insert(volume);
        if let (Some(name), false) = (self.volumes.get(volume), self.checks_all) {
            self.parts.borrow_mut().skipped.insert(name.clone());
        }
    }
}
