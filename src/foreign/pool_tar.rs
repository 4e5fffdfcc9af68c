//! A tar archive of files, such as one of a pool. All files are taken. Folders are made as they are needed, and what is neither is left out.

use std::collections::HashMap;
use std::path::PathBuf;

use super::tar::{EntryKind, Stored, Tar};
use super::{Backup, Event, Input, Volume, volume_name};
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

/// A tar archive of files.
pub(super) struct PoolTar<'a> {
    tar: Tar<'a>,
    /// The numbers of the volumes by the names that they have in the archive.
    volumes: HashMap<Vec<u8>, usize>,
    /// The file whose content comes: its number, its length, and what of it is to come, the first last.
    current: Option<(usize, u64, Vec<Stored>)>,
    /// Names that were told, and their bytes.
    names: usize,
    name_bytes: usize,
    is_decompressed: bool,
    monitor: &'a dyn Monitor,
}

impl<'a> PoolTar<'a> {
    pub(super) fn new(input: Input<'a>, monitor: &'a dyn Monitor) -> Self {
        Self {
            is_decompressed: input.is_decompressed(),
            tar: Tar::new(input),
            volumes: HashMap::new(),
            current: None,
            names: 0,
            name_bytes: 0,
            monitor,
        }
    }

    /// The next content of the current file, or its end.
    fn content(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        let Some((volume, size, stored)) = &mut self.current else {
            return Ok(None);
        };
        let volume = *volume;
        let Some(range) = stored.last_mut() else {
            let size = *size;
            self.current = None;
            return Ok(Some(Event::End { volume, size }));
        };
        let (offset, length) = (range.offset, range.length.min(PART_BYTES));
        range.offset += length;
        range.length -= length;
        if range.length == 0 {
            stored.pop();
        }
        self.tar.content(buffer, length)?;
        Ok(Some(Event::Data { volume, offset }))
    }

    /// The next entry that is told, or `None` behind the last.
    fn entry(&mut self) -> Result<Option<Event>> {
        loop {
            let start = self.tar.input().offset();
            let Some(entry) = self.tar.next_entry()? else {
                self.tar.input().zeros_to_end()?;
                return Ok(None);
            };
            self.count(&entry.name)?;
            let path = path_of(&entry.name);
            match (entry.kind, path) {
                (EntryKind::Folder, _) => {}
                // Before there was a letter for folders, a slash at the end said so.
                (EntryKind::File, _) if entry.name.ends_with(b"/") && entry.size == 0 => {}
                (EntryKind::File, Some(path)) => {
                    if entry.size > self.tar.input().limits().volume_bytes {
                        return Err(self.tar.input().refused("a file is larger than vmfold takes"));
                    }
                    let volume = self.volumes.len();
                    if self.volumes.insert(entry.name, volume).is_some() {
                        return Err(self.damaged(start, "it has a file twice"));
                    }
                    let mut stored = entry.stored;
                    stored.reverse();
                    self.current = Some((volume, entry.size, stored));
                    return Ok(Some(Event::Volume(Volume {
                        path,
                        size: Some(entry.size),
                        time: entry.time,
                    })));
                }
                (EntryKind::HardLink, Some(path)) => {
                    let volume = self.volumes.get(&entry.link);
                    let volume = *volume.ok_or_else(|| self.damaged(start, "a link leads to no file before it"))?;
                    return Ok(Some(Event::Link { volume, path }));
                }
                (EntryKind::Other(_), Some(path)) => {
                    let path = shown(&path).to_string();
                    self.monitor
                        .note(&format!("`{path}` is neither a file nor a folder, and is left out"));
                }
                (_, None) => return Err(self.damaged(start, "a file has no name")),
            }
        }
    }

    /// Counts a name, and refuses more than the limits allow.
    fn count(&mut self, name: &[u8]) -> Result<()> {
        self.names += 1;
        self.name_bytes += name.len();
        let limits = *self.tar.input().limits();
        if self.names > limits.volumes || self.name_bytes > limits.name_bytes {
            return Err(self
                .tar
                .input()
                .refused("it has more files than vmfold takes, or longer names"));
        }
        Ok(())
    }

    fn damaged(&self, start: u64, problem: &str) -> Error {
        self.tar.damaged(start, problem)
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
        "a tar archive"
    }

    fn proves_each_volume(&self) -> bool {
        !self.is_decompressed
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
    use std::path::Path;

    #[test]
    fn names_stay_below_the_folder() {
        for (name, expected) in [
            (&b"./appvms/work/private.img"[..], Some("appvms/work/private.img")),
            (b"/var/lib/qubes/a.img", Some("var/lib/qubes/a.img")),
            (b"../../a", Some("%2e./%2e./a")),
            (b"a//b/", Some("a/b")),
            (b"./", None),
            (b"", None),
        ] {
            assert_eq!(path_of(name).as_deref(), expected.map(Path::new));
        }
    }
}
