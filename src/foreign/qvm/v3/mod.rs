//! Backups of Qubes OS in version 3, as `qvm-backup` of R2 to R3.2 writes them (qubes-core-admin, `core/backup.py` of release 3.2). A member is a tar
//! archive of a file or of a folder, compressed and encrypted as a whole, and then cut into parts. Each part has a hash with the passphrase as its
//! key. The hash covers neither the part's name nor its place. That is what this version lacks, and the user is told. What can be proved of
//! completeness is proved as in version 4. What a template has comes as one member, so its images end only with that: a checksum of the
//! compression comes at its end.

mod cipher;
mod header;
mod machines;
mod parts;
mod skeleton;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use self::cipher::Decrypting;
use self::header::BackupHeader;
use self::parts::{MemberReader, Parts};
use super::machines::Machine;
use super::skeleton::{IS_SKELETON, is_skeleton};
use super::{EMPTY, PART_BYTES, QvmOptions, XML_BYTES_MAX, whole};
use crate::error::{Error, Result};
use crate::foreign::tar::{Entry, EntryKind, Stored, Tar};
use crate::foreign::{Backup, Event, Input, Notes, Origin, Volume, volume_name};
use crate::keys::Passphrase;
use crate::monitor::Monitor;

/// What a machine makes anew when it starts.
const VOLATILE: &str = "volatile.img";
/// What the user is told of each backup in this version.
const LACKS: &str = "The backup is in version 3, which protects what parts hold, and neither their names nor their order: that someone exchanged \
    parts shows only where their compression or their archive does not fit";

/// A file of a member whose content comes.
struct Current {
    volume: usize,
    size: u64,
    /// What of it is to come, the first last.
    stored: Vec<Stored>,
}

/// A member that is being read.
struct Member<'a> {
    name: String,
    /// The folder of its machine in a pool.
    path: PathBuf,
    /// What errors name: its image, or the folder of its machine.
    named: PathBuf,
    /// The volume that it is, if that was told before anything was read of it: an image.
    told: Option<usize>,
    /// Its archive, and the same bytes before decompression; `None` until its first part is to be opened.
    tar: Option<(Tar<'a>, StoredBytes<'a>)>,
    /// Whether it is one file, which came.
    is_file: bool,
    current: Option<Current>,
    /// The numbers of its files by the names that they have in the archive.
    files: HashMap<Vec<u8>, usize>,
    /// Its files with their lengths, and their further names, which are told at its end.
    ends: Vec<(usize, u64)>,
    links: Vec<(usize, PathBuf)>,
}

/// A backup of Qubes OS in version 3.
pub(super) struct Qvm3<'a> {
    parts: Rc<RefCell<Parts<'a>>>,
    header: BackupHeader,
    passphrase: Passphrase,
    origin: Origin,
    machines: Vec<Machine>,
    member: Option<Member<'a>>,
    /// Members that came.
    seen: HashSet<String>,
    /// Paths of volumes that came.
    found: HashSet<PathBuf>,
    volumes: usize,
    /// Names that came, and their bytes.
    names: usize,
    name_bytes: usize,
    left_out: BTreeSet<usize>,
    /// What is to be told next.
    events: VecDeque<Event>,
    checks_all: bool,
    is_ended: bool,
    /// Whether it has the home folder of dom0, as far as it was read.
    has_home: bool,
    /// Entries that are neither files nor folders.
    not_taken: Notes,
    monitor: &'a dyn Monitor,
}

impl<'a> Qvm3<'a> {
    /// Reads the header, and what machines there are.
    pub(super) fn open(input: Input<'a>, options: &QvmOptions<'a, '_>) -> Result<Self> {
        let passphrase = (options.ask_passphrase)()?;
        let (parts, header) = Parts::open(input, passphrase.clone(), options.keeps)?;
        options.monitor.note(LACKS);
        let mut backup = Self {
            parts: Rc::new(RefCell::new(parts)),
            header,
            passphrase,
            origin: Origin::default(),
            machines: Vec::new(),
            member: None,
            seen: HashSet::new(),
            found: HashSet::new(),
            volumes: 0,
            names: 0,
            name_bytes: 0,
            left_out: BTreeSet::new(),
            events: VecDeque::new(),
            checks_all: options.checks_all,
            is_ended: false,
            has_home: false,
            not_taken: Notes::default(),
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
        let (mut tar, mut stored) = self.archive_of(NAME, None)?;
        let entry = match tar.next_entry()? {
            Some(entry) if entry.kind == EntryKind::File && entry.name == NAME.as_bytes() => entry,
            _ => return Err(self.damaged(None, "a member holds something else than its file")),
        };
        if entry.size > XML_BYTES_MAX {
            return Err(self.refused("its qubes.xml is larger than vmfold takes"));
        }
        self.origin.time = entry.time;
        let xml = whole(&mut tar, &entry)?;
        if tar.next_entry()?.is_some() {
            return Err(self.damaged(None, "a member holds more than its file"));
        }
        end_archive(&mut tar, &mut stored)?;
        let xml = String::from_utf8(xml).map_err(|_| self.refused("its qubes.xml is no text"))?;
        self.machines = machines::parse(&xml).map_err(|problem| self.refused(problem))?;
        Ok(())
    }

    /// The archive that a member is, whose first part comes next.
    fn archive_of(&self, member: &str, volume: Option<PathBuf>) -> Result<(Tar<'a>, StoredBytes<'a>)> {
        let (path, limits) = {
            let mut parts = self.parts.borrow_mut();
            (parts.input().path().to_owned(), *parts.input().limits())
        };
        let parts = MemberReader::new(&self.parts, member.to_owned(), volume.clone());
        let reader: Box<dyn Read + 'a> = if self.header.is_encrypted {
            Box::new(Decrypting::new(parts, self.passphrase.clone()))
        } else {
            Box::new(parts)
        };
        let stored = StoredBytes {
            reader: Rc::new(RefCell::new(reader)),
            parts: Rc::clone(&self.parts),
            volume: volume.clone(),
        };
        let reader = BufReader::with_capacity(1 << 16, stored.clone());
        let input = Input::of_member(&path, Box::new(reader), volume, limits, self.monitor);
        let input = match self.header.compression {
            Some(compression) => input.decompressed(compression)?,
            None => input,
        };
        Ok((Tar::new(input), stored))
    }

    /// Begins the next member. Returns the volume that it is, if that is known before anything is read of it.
    fn begin(&mut self, name: String) -> Result<Option<Event>> {
        if !self.seen.insert(name.clone()) {
            return Err(self.damaged(None, "it has a member twice"));
        }
        let (folder, file) = name.rsplit_once('/').unwrap_or((&name, ""));
        let machine = self.machines.iter().find(|machine| machine.folder == folder);
        let Some(path) = machine.map(|machine| machine.path.clone()) else {
            if folder != "dom0-home" {
                return Err(self.damaged(None, "it has a member of a machine that its qubes.xml does not have"));
            }
            if !std::mem::replace(&mut self.has_home, true) {
                self.monitor
                    .note("The home folder of dom0 is in the backup, and is left out");
            }
            self.pass_over(&name)?;
            return Ok(None);
        };
        if [VOLATILE, EMPTY].contains(&file) {
            self.pass_over(&name)?;
            return Ok(None);
        }
        let is_image = Path::new(file).extension().is_some_and(|extension| extension == "img");
        let image = is_image.then(|| path.join(volume_name::component(file.as_bytes())));
        let told = match &image {
            Some(image) => Some(self.add_volume(image)?),
            None => None,
        };
        self.member = Some(Member {
            name,
            named: image.clone().unwrap_or_else(|| path.clone()),
            path,
            told,
            tar: None,
            is_file: false,
            current: None,
            files: HashMap::new(),
            ends: Vec::new(),
            links: Vec::new(),
        });
        Ok(image.map(|path| {
            Event::Volume(Volume {
                path,
                size: None,
                time: None,
            })
        }))
    }

    /// Counts a volume, and returns its number.
    fn add_volume(&mut self, path: &Path) -> Result<usize> {
        self.count(path)?;
        if !self.found.insert(path.to_owned()) {
            return Err(self.damaged(Some(path), "it is there twice"));
        }
        self.volumes += 1;
        Ok(self.volumes - 1)
    }

    /// Counts a name, and refuses more than the limits allow.
    fn count(&mut self, path: &Path) -> Result<()> {
        self.names += 1;
        self.name_bytes += path.as_os_str().len();
        let limits = *self.parts.borrow_mut().input().limits();
        if self.names > limits.volumes || self.name_bytes > limits.name_bytes {
            return Err(self.refused("it has more files than vmfold takes, or longer names"));
        }
        Ok(())
    }

    /// Passes over the parts of a member. They are authenticated if all are checked.
    fn pass_over(&mut self, name: &str) -> Result<()> {
        if self.checks_all {
            let mut reader = MemberReader::new(&self.parts, name.to_owned(), None);
            let read = io::copy(&mut reader, &mut io::sink());
            return read.map(drop).map_err(|error| match error.downcast::<Error>() {
                Ok(error) => error,
                Err(error) => Error::io("read", self.parts.borrow_mut().input().path())(error),
            });
        }
        let mut parts = self.parts.borrow_mut();
        while parts.peek()?.is_some_and(|part| part.member == name) {
            parts.skip()?;
        }
        Ok(())
    }

    /// The next content of the member. At its end, all that ends with it is told.
    fn content(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        let Some(mut member) = self.member.take() else {
            return Ok(None);
        };
        if member.tar.is_none() {
            if member.told.is_some_and(|volume| self.left_out.contains(&volume)) {
                self.pass_over(&member.name)?;
                return Ok(None);
            }
            member.tar = Some(self.archive_of(&member.name, Some(member.named.clone()))?);
        }
        let Some((tar, stored)) = &mut member.tar else {
            return Ok(None);
        };
        match member
            .current
            .as_mut()
            .filter(|file| !self.left_out.contains(&file.volume))
        {
            Some(file) => {
                if let Some(event) = next_content(tar, file, buffer)? {
                    self.member = Some(member);
                    return Ok(Some(event));
                }
                member.ends.push((file.volume, file.size));
                member.current = None;
            }
            None => member.current = None,
        }
        if let Some(entry) = tar.next_entry()? {
            let event = self.entry(&mut member, entry)?;
            self.member = Some(member);
            return Ok(event);
        }
        if member.told.is_some() && !member.is_file {
            return Err(self.damaged(Some(&member.named), "a member holds something else than its file"));
        }
        end_archive(tar, stored)?;
        let ends = member
            .ends
            .into_iter()
            .map(|(volume, size)| Event::End { volume, size });
        self.events.extend(ends);
        let links = member
            .links
            .into_iter()
            .map(|(volume, path)| Event::Link { volume, path });
        self.events.extend(links);
        Ok(None)
    }

    /// Takes an entry of a member's archive. It must be the member, or lie below it.
    fn entry(&mut self, member: &mut Member<'a>, entry: Entry) -> Result<Option<Event>> {
        let is_first = member.files.is_empty() && member.links.is_empty();
        let rest = entry.name.strip_prefix(member.name.as_bytes());
        let is_its_own = rest.is_some_and(|rest| match (entry.kind, rest.first()) {
            (EntryKind::File, None) => is_first,
            (EntryKind::Folder, None) => member.told.is_none(),
            (_, first) => first == Some(&b'/') && member.told.is_none(),
        });
        if member.is_file {
            return Err(self.damaged(Some(&member.named), "a member holds more than its file"));
        }
        let Some(rest) = rest.filter(|_| is_its_own) else {
            return Err(self.damaged(Some(&member.named), "a member holds something else than its file"));
        };
        member.is_file = rest.is_empty() && entry.kind == EntryKind::File;
        let components = [file_of(&member.name), rest];
        let components = components.iter().flat_map(|names| names.split(|byte| *byte == b'/'));
        let components = components.filter(|name| !name.is_empty() && *name != b".");
        let below: PathBuf = components.map(volume_name::component).collect();
        match entry.kind {
            EntryKind::Folder => Ok(None),
            EntryKind::File if below == Path::new(VOLATILE) => Ok(None),
            EntryKind::File => self.file(member, entry, &below),
            EntryKind::HardLink => {
                let path = member.path.join(below);
                self.count(&path)?;
                let volume = member.files.get(&entry.link);
                let volume = volume.ok_or_else(|| self.damaged(Some(&path), "a link leads to no file before it"))?;
                member.links.push((*volume, path));
                Ok(None)
            }
            EntryKind::Other(_) => {
                self.not_taken.tell_left_out(self.monitor, &member.path.join(below));
                Ok(None)
            }
        }
    }

    /// Begins a file of a member's archive.
    fn file(&mut self, member: &mut Member<'a>, entry: Entry, below: &Path) -> Result<Option<Event>> {
        if entry.size > self.parts.borrow_mut().input().limits().volume_bytes {
            return Err(self.refused("a file is larger than vmfold takes"));
        }
        let path = member.path.join(below);
        let volume = match member.told {
            Some(volume) => volume,
            None => self.add_volume(&path)?,
        };
        let mut stored = entry.stored;
        stored.reverse();
        member.current = Some(Current {
            volume,
            size: entry.size,
            stored,
        });
        member.files.insert(entry.name, volume);
        let event = Event::Volume(Volume {
            path,
            size: Some(entry.size),
            time: entry.time,
        });
        Ok(member.told.is_none().then_some(event))
    }

    /// Checks that each image came that the machines must have.
    fn check_images(&self) -> Result<()> {
        let has_image = |machine: &Machine, image: &str| self.found.contains(&machine.path.join(image));
        if is_skeleton(&self.machines, has_image, |member| self.seen.contains(member)) {
            return Err(self.refused(IS_SKELETON));
        }
        for machine in &self.machines {
            for image in &machine.images {
                let path = machine.path.join(image);
                if !self.found.contains(&path) {
                    return Err(self.damaged(Some(&path), "it is not there, and its machine was backed up"));
                }
            }
        }
        Ok(())
    }

    fn refused(&self, problem: impl Into<String>) -> Error {
        self.parts.borrow_mut().input().refused(problem)
    }

    fn damaged(&self, volume: Option<&Path>, problem: &str) -> Error {
        let mut parts = self.parts.borrow_mut();
        let start = parts.input().offset();
        parts.damaged(start, volume.map(Path::to_owned).as_ref(), problem)
    }
}

/// The name of a member without that of its folder.
fn file_of(member: &str) -> &[u8] {
    member.rsplit_once('/').map_or(member, |(_, file)| file).as_bytes()
}

/// The next content of a file, or `None` at its end.
fn next_content(tar: &mut Tar<'_>, file: &mut Current, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
    let Some(range) = file.stored.last_mut() else {
        return Ok(None);
    };
    let (offset, length) = (range.offset, range.length.min(PART_BYTES));
    range.offset += length;
    range.length -= length;
    if range.length == 0 {
        file.stored.pop();
    }
    tar.content(buffer, length)?;
    let volume = file.volume;
    Ok(Some(Event::Data { volume, offset }))
}

/// Reads what follows the last entry of an archive, to the end of its last part: zeros, and what compression and encryption add.
fn end_archive(tar: &mut Tar<'_>, stored: &mut StoredBytes<'_>) -> Result<()> {
    tar.input().zeros_to_end()?;
    // Not every decompressor looks for the end of its input, and there is proof there.
    match stored.read(&mut [0; 64]) {
        Ok(0) => Ok(()),
        Ok(_) => Err(stored.damaged("something follows its end")),
        Err(error) => Err(error
            .downcast::<Error>()
            .unwrap_or_else(|_| stored.damaged("it does not end as it must"))),
    }
}

/// The bytes of a member before decompression. Its errors are those of the backup.
#[derive(Clone)]
struct StoredBytes<'a> {
    reader: Rc<RefCell<Box<dyn Read + 'a>>>,
    parts: Rc<RefCell<Parts<'a>>>,
    volume: Option<PathBuf>,
}

impl StoredBytes<'_> {
    fn damaged(&self, problem: &str) -> Error {
        let mut parts = self.parts.borrow_mut();
        let start = parts.input().offset();
        parts.damaged(start, self.volume.as_ref(), problem)
    }
}

impl Read for StoredBytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.reader.borrow_mut().read(buffer);
        read.map_err(|error| {
            if error.kind() == io::ErrorKind::InvalidData {
                io::Error::other(self.damaged(&error.to_string()))
            } else {
                error
            }
        })
    }
}

impl Backup for Qvm3<'_> {
    fn kind(&self) -> &'static str {
        "a backup of Qubes OS in version 3"
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            if self.member.is_some() {
                if let Some(event) = self.content(buffer)? {
                    return Ok(Some(event));
                }
                continue;
            }
            let next = if self.is_ended {
                None
            } else {
                self.parts.borrow_mut().peek()?.map(|part| part.member.clone())
            };
            let Some(member) = next else {
                self.is_ended = true;
                self.check_images()?;
                return Ok(None);
            };
            if let Some(event) = self.begin(member)? {
                return Ok(Some(event));
            }
        }
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
    }
}
