//! A tar archive of files, such as one of a pool. All files are taken. Folders are made as they are needed, and what is neither is left out. In an
//! OVA, disks become images; in other archives, each file stays what it is.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use super::container::vmdk::Stream;
use super::ova::{self, DiskForm, Hash, Manifest, MemberReader, Members};
use super::tar::{Entry, EntryKind, Stored, Tar};
use super::{Backup, Event, Input, Notes, Volume, volume_name};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::shown::shown;

/// Bytes that are handed over at a time.
const PART_BYTES: u64 = 1 << 20;
/// What stands in the first block of a header of the kinds that are read, and where.
const MAGIC_AT: usize = 257;
const MAGIC: &[u8] = b"ustar";
/// Whether an archive begins with these bytes.
pub(super) fn is_tar(first: &[u8]) -> bool {
    first.get(MAGIC_AT..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// The content of a file that is to come.
enum Content<'a> {
    /// What of the file is stored, the first last.
    Ranges(Vec<Stored>),
    /// A file of an OVA from this offset on.
    Whole(Input<'a>, u64),
    /// A manifest, which was read already.
    Text(Vec<u8>),
    Disk(Box<Stream<'a>>),
}

/// The file whose content comes.
struct Current<'a> {
    volume: usize,
    size: u64,
    name: Vec<u8>,
    content: Content<'a>,
}

/// A tar archive of files.
pub(super) struct PoolTar<'a> {
    members: Rc<RefCell<Members<'a>>>,
    /// The first entry, if there is one, until it was told.
    first: Option<Entry>,
    /// Whether no entry was told yet.
    is_at_first: bool,
    is_ova: bool,
    /// What manifests say, once one came, and the hashes of the files that came before it.
    manifest: Option<Manifest>,
    hashes: HashMap<Vec<u8>, Hash>,
    /// The numbers of the volumes by the names that they have in the archive.
    volumes: HashMap<Vec<u8>, usize>,
    current: Option<Current<'a>>,
    /// Entries that came, and the bytes of their names.
    names: usize,
    name_bytes: usize,
    /// Entries that were left out.
    left_out: Notes,
    /// Bytes of manifests.
    manifest_bytes: u64,
    /// Manifests with hashes that are not checked.
    unchecked_manifests: usize,
    is_decompressed: bool,
    monitor: &'a dyn Monitor,
}

impl<'a> PoolTar<'a> {
    /// Reads the header of the first entry.
    pub(super) fn open(input: Input<'a>, monitor: &'a dyn Monitor) -> Result<Self> {
        let is_decompressed = input.is_decompressed();
        let mut tar = Tar::new(input);
        let first = tar.next_entry()?;
        Ok(Self {
            is_ova: first.as_ref().is_some_and(ova::is_ova),
            members: Rc::new(RefCell::new(Members::new(tar))),
            first,
            is_at_first: true,
            manifest: None,
            hashes: HashMap::new(),
            volumes: HashMap::new(),
            current: None,
            names: 0,
            name_bytes: 0,
            left_out: Notes::default(),
            manifest_bytes: 0,
            unchecked_manifests: 0,
            is_decompressed,
            monitor,
        })
    }

    /// The next content of the current file, or its end.
    fn content(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        let Some(current) = &mut self.current else {
            return Ok(None);
        };
        let volume = current.volume;
        let offset = match &mut current.content {
            Content::Ranges(stored) => match stored.last_mut() {
                None => None,
                Some(range) => {
                    let (offset, length) = (range.offset, range.length.min(PART_BYTES));
                    range.offset += length;
                    range.length -= length;
                    if range.length == 0 {
                        stored.pop();
                    }
                    self.members.borrow_mut().tar.content(buffer, length)?;
                    Some(offset)
                }
            },
            Content::Whole(input, offset) => {
                buffer.resize(usize::try_from(PART_BYTES).unwrap_or(usize::MAX), 0);
                let read = input.fill(buffer)?;
                buffer.truncate(read);
                let start = *offset;
                *offset += read as u64;
                (read > 0).then_some(start)
            }
            Content::Text(text) => {
                *buffer = std::mem::take(text);
                (!buffer.is_empty()).then_some(0)
            }
            Content::Disk(stream) => stream.next_grain(buffer)?,
        };
        match offset {
            Some(offset) => Ok(Some(Event::Data { volume, offset })),
            None => self.end().map(Some),
        }
    }

    /// The end of the current file, if it has the hash that it must have.
    fn end(&mut self) -> Result<Event> {
        let Some(current) = self.current.take() else {
            return Err(self.damaged(0, "a file ends that did not begin"));
        };
        if self.is_ova && !matches!(current.content, Content::Ranges(_) | Content::Text(_)) {
            let hash = self.members.borrow_mut().take_hash();
            match &self.manifest {
                Some(manifest) if !manifest.allows(&current.name, &hash) => {
                    return Err(self.other_hash(&current.name));
                }
                Some(_) => {}
                None => {
                    self.hashes.insert(current.name, hash);
                }
            }
        }
        Ok(Event::End {
            volume: current.volume,
            size: current.size,
        })
    }

    /// The next entry that is told, or `None` behind the last.
    fn entry(&mut self) -> Result<Option<Event>> {
        loop {
            if !self.is_at_first {
                self.members.borrow_mut().tar.skip_rest()?;
            }
            let start = self.offset();
            let entry = if std::mem::take(&mut self.is_at_first) {
                self.first.take()
            } else {
                self.members.borrow_mut().tar.next_entry()?
            };
            let Some(entry) = entry else {
                self.members.borrow_mut().tar.input().zeros_to_end()?;
                return self.check_names().map(|()| None);
            };
            self.count(&entry.name)?;
            let path = path_of(&entry.name);
            match (entry.kind, path) {
                (EntryKind::Folder, _) => {}
                // Before there was a letter for folders, a slash at the end said so.
                (EntryKind::File, _) if entry.name.ends_with(b"/") && entry.size == 0 => {}
                (EntryKind::File, Some(path)) => return self.file(entry, path).map(Some),
                (EntryKind::HardLink, Some(path)) => {
                    let volume = self.volumes.get(&entry.link);
                    let volume = *volume.ok_or_else(|| self.damaged(start, "a link leads to no file before it"))?;
                    return Ok(Some(Event::Link { volume, path }));
                }
                (EntryKind::Other(_), Some(path)) => self.left_out.tell_left_out(self.monitor, &path),
                (_, None) => return Err(self.damaged(start, "a file has no name")),
            }
        }
    }

    /// Begins a file.
    fn file(&mut self, entry: Entry, path: PathBuf) -> Result<Event> {
        if entry.size > self.limits().volume_bytes {
            return Err(self.refused("a file is larger than vmfold takes"));
        }
        let volume = self.volumes.len();
        if self.volumes.insert(entry.name.clone(), volume).is_some() {
            // tar would restore the last one. The first one may have been restored by then.
            return Err(self.refused(&format!(
                "it has `{}` twice: extract it, and choose one of the two",
                shown(&path)
            )));
        }
        let is_whole = entry.stored
            == [Stored {
                offset: 0,
                length: entry.size,
            }];
        let (path, size, content) = if self.is_ova && is_whole {
            self.member(&entry, path)?
        } else {
            let mut stored = entry.stored;
            stored.reverse();
            (path, entry.size, Content::Ranges(stored))
        };
        self.current = Some(Current {
            volume,
            size,
            name: entry.name,
            content,
        });
        Ok(Event::Volume(Volume {
            path,
            size: Some(size),
            time: entry.time,
        }))
    }

    /// The path, the length and the content of a file of an OVA. Disks in other forms stay what they are.
    fn member(&mut self, entry: &Entry, path: PathBuf) -> Result<(PathBuf, u64, Content<'a>)> {
        // What was left of the file before is no part of this one.
        self.members.borrow_mut().take_hash();
        if ova::is_manifest(&entry.name) {
            let text = self.read_manifest(entry)?;
            return Ok((path, entry.size, Content::Text(text)));
        }
        let limits = self.limits();
        let backup = self.members.borrow_mut().tar.input().path().to_owned();
        let reader = MemberReader::new(&self.members);
        let mut input = Input::of_member(&backup, Box::new(reader), Some(path.clone()), limits, self.monitor);
        let Some(form) = ova::disk_form(&mut input)? else {
            return Ok((path, entry.size, Content::Whole(input, 0)));
        };
        if let DiskForm::Compressed(compression) = form {
            input = input.decompressed(compression)?;
        }
        let path = path_of(&ova::image_name(&entry.name, form)).unwrap_or(path);
        let stream = Stream::open(input, path.clone())?;
        let size = stream.size();
        Ok((path, size, Content::Disk(Box::new(stream))))
    }

    /// Reads a manifest, and checks the files that came before it.
    fn read_manifest(&mut self, entry: &Entry) -> Result<Vec<u8>> {
        let start = self.offset();
        self.manifest_bytes = self.manifest_bytes.saturating_add(entry.size);
        if self.manifest_bytes > ova::MANIFEST_BYTES_MAX {
            return Err(self.refused("its manifest is longer than allowed"));
        }
        let mut text = Vec::new();
        self.members.borrow_mut().tar.content(&mut text, entry.size)?;
        let mut manifest = self.manifest.take().unwrap_or_default();
        let other = manifest.take(&text).map_err(|problem| self.damaged(start, problem))?;
        self.unchecked_manifests += usize::from(other.is_some());
        if let Some(kind) = other.filter(|_| self.unchecked_manifests == 1) {
            let kind = shown(Path::new(&kind)).to_string();
            self.monitor.note(&format!(
                "the manifest of the OVA has hashes of the kind {kind}, which are not checked"
            ));
        }
        let hashes = std::mem::take(&mut self.hashes);
        let others = hashes.iter().filter(|(name, hash)| !manifest.allows(name, hash));
        if let Some(name) = others.map(|(name, _)| name).min() {
            return Err(self.other_hash(name));
        }
        self.manifest = Some(manifest);
        Ok(text)
    }

    /// Checks that each file came that manifests name.
    fn check_names(&self) -> Result<()> {
        let missing = self.manifest.as_ref().and_then(|manifest| {
            let is_there = |name: &[u8]| self.volumes.contains_key(name);
            manifest.missing(is_there)
        });
        match missing {
            None => Ok(()),
            Some(name) => {
                let name = String::from_utf8_lossy(&name[..name.len().min(200)]).into_owned();
                let name = shown(Path::new(&name)).to_string();
                Err(self.damaged(self.offset(), &format!("`{name}` is missing, which its manifest names")))
            }
        }
    }

    /// Counts a name, and refuses more than the limits allow.
    fn count(&mut self, name: &[u8]) -> Result<()> {
        self.names += 1;
        self.name_bytes += name.len();
        let limits = self.limits();
        if self.names > limits.volumes || self.name_bytes > limits.name_bytes {
            return Err(self.refused("it has more files than vmfold takes, or longer names"));
        }
        Ok(())
    }

    fn offset(&self) -> u64 {
        self.members.borrow_mut().tar.input().offset()
    }

    fn limits(&self) -> super::Limits {
        *self.members.borrow_mut().tar.input().limits()
    }

    fn damaged(&self, start: u64, problem: &str) -> Error {
        self.members.borrow().tar.damaged(start, problem)
    }

    fn refused(&self, problem: &str) -> Error {
        self.members.borrow_mut().tar.input().refused(problem)
    }

    fn other_hash(&self, name: &[u8]) -> Error {
        let at = self.offset();
        ova::has_other_hash(&self.members.borrow().tar, at, name)
    }
}

/// The path of a name in an archive, below the folder that is restored to. It is `None` for a name without a component.
fn path_of(name: &[u8]) -> Option<PathBuf> {
    let components = name.split(|byte| *byte == b'/');
    let components = components.filter(|component| !component.is_empty() && component != b".");
    let path: PathBuf = components.map(volume_name::component).collect();
    (!path.as_os_str().is_empty()).then_some(path)
}

impl Backup for PoolTar<'_> {
    fn kind(&self) -> &'static str {
        if self.is_ova { "an OVA" } else { "a tar archive" }
    }

    fn proves_each_volume(&self) -> bool {
        // A manifest may come behind the files that it proves.
        !self.is_decompressed && (!self.is_ova || self.manifest.is_some())
    }

    fn leave_out(&mut self, volume: usize) {
        if self.current.as_ref().is_some_and(|current| current.volume == volume) {
            self.current = None;
        }
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        match self.content(buffer)? {
            Some(event) => Ok(Some(event)),
            None => self.entry(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_below_the_folder() {
        for (name, expected) in [
            (&b"./appvms/work/private.img"[..], Some("appvms/work/private.img")),
            (b"/var/lib/qubes/a.img", Some("var/lib/qubes/a.img")),
            (b"../../a", Some("%2e./%2e./a")),
            (b"disk (1).img", Some("disk (1).img")),
            (b"a//b/", Some("a/b")),
            (b"./", None),
            (b"", None),
        ] {
            assert_eq!(path_of(name).as_deref(), expected.map(Path::new));
        }
    }
}
