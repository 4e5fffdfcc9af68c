//! Disks that hypervisors keep in files of their own formats (containers): a table says where each piece of the disk lies in the file. Such a file is
//! read in any order, so it must be a file that is not compressed. No file that a container names is opened.

mod one_disk;
mod qcow2;
mod vdi;
mod vhd;
mod vhdx;
pub(super) mod vmdk;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use self::one_disk::OneDisk;
pub(super) use self::vhd::is_fixed as is_fixed_vhd;
use super::random::RandomInput;
use super::{Backup, Event, Volume, volume_name};
use crate::error::Result;

/// Bytes that are handed over at a time, at most.
const PART_BYTES: usize = 1 << 20;

/// A disk in a container, with its earlier states where the container keeps them.
trait Disk {
    /// Returns what it is, for messages.
    fn kind(&self) -> &'static str;

    /// The disk, and behind it its earlier states. Each has a size.
    fn volumes(&self) -> Vec<Volume>;

    /// Finds the first content of a volume at `from` or behind it, and puts it into the buffer: [`PART_BYTES`] at most, none behind the end of
    /// the volume. Returns its offset, or `None` if there are only zeros up to the end.
    ///
    /// # Errors
    /// [`crate::error::Error::DamagedBackup`]; those of reading.
    fn content(&mut self, volume: usize, from: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>>;
}

/// A kind of container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerKind {
    Qcow2,
    Vdi,
    Vhd,
    Vhdx,
    Vmdk,
}

impl ContainerKind {
    /// The container that begins with these bytes.
    pub(super) fn of(first: &[u8]) -> Option<Self> {
        let has = |at: usize, magic: &[u8]| first.get(at..).is_some_and(|rest| rest.starts_with(magic));
        let kinds = [
            (Self::Qcow2, has(0, qcow2::MAGIC)),
            (Self::Vdi, has(vdi::MAGIC_AT, vdi::MAGIC)),
            (Self::Vhd, has(0, vhd::MAGIC)),
            (Self::Vhdx, has(0, vhdx::MAGIC)),
            (Self::Vmdk, has(0, vmdk::MAGIC) && !vmdk::is_stream(first)),
        ];
        kinds.into_iter().find_map(|(kind, has)| has.then_some(kind))
    }

    /// Returns its name, for messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qcow2 => "a qcow2 image",
            Self::Vdi => "a VDI image",
            Self::Vhd => vhd::KIND,
            Self::Vhdx => vhdx::KIND,
            Self::Vmdk => vmdk::KIND,
        }
    }

    /// Opens a container.
    ///
    /// # Errors
    /// Those of [`super::open`].
    pub(super) fn open(self, input: RandomInput<'_>) -> Result<Box<dyn Backup + '_>> {
        Ok(match self {
            Self::Qcow2 => Box::new(Container::new(qcow2::Qcow2::open(input)?)),
            Self::Vdi => Box::new(Container::new(vdi::Vdi::open(input)?)),
            Self::Vhd => Box::new(Container::new(vhd::Vhd::open(input)?)),
            Self::Vhdx => Box::new(Container::new(vhdx::Vhdx::open(input)?)),
            Self::Vmdk => Box::new(Container::new(OneDisk::new(
                vmdk::KIND,
                &vmdk::SUFFIXES,
                vmdk::Sparse::open(input)?,
            ))),
        })
    }
}

/// The name of an image whose container has this path: with `.img` in the place of the container's suffix, if it is one of these.
pub(super) fn image_name(path: &Path, suffixes: &[&str]) -> PathBuf {
    let name = path.file_name().unwrap_or(OsStr::new("image"));
    let whole = Path::new(name);
    let is_suffix = |suffix: &OsStr| {
        let suffix = suffix.as_bytes();
        suffixes.iter().any(|one| one.as_bytes().eq_ignore_ascii_case(suffix))
    };
    let stem = match (whole.extension(), whole.file_stem()) {
        (Some(suffix), Some(stem)) if is_suffix(suffix) => stem,
        _ => name,
    };
    volume_name::component(&[stem.as_bytes(), b".img"].concat())
}

/// A container as a backup: its volumes one after the other, each in the order of its bytes.
struct Container<D> {
    disk: D,
    volumes: Vec<Volume>,
    /// Volumes that were told.
    told: usize,
    /// Volumes of which nothing is wanted.
    left_out: Vec<bool>,
    /// The volume whose content comes, and the offset of what was not looked at.
    at: (usize, u64),
}

impl<D: Disk> Container<D> {
    fn new(disk: D) -> Self {
        let volumes = disk.volumes();
        Self {
            left_out: vec![false; volumes.len()],
            disk,
            volumes,
            told: 0,
            at: (0, 0),
        }
    }
}

impl<D: Disk> Backup for Container<D> {
    fn kind(&self) -> &'static str {
        self.disk.kind()
    }

    fn proves_each_volume(&self) -> bool {
        true
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        if let Some(volume) = self.volumes.get(self.told) {
            self.told += 1;
            return Ok(Some(Event::Volume(volume.clone())));
        }
        let (mut volume, from) = self.at;
        while self.left_out.get(volume).copied().unwrap_or_default() {
            volume += 1;
        }
        let Some(size) = self.volumes.get(volume).map(|volume| volume.size.unwrap_or_default()) else {
            return Ok(None);
        };
        let from = if volume == self.at.0 { from } else { 0 };
        if from < size
            && let Some(offset) = self.disk.content(volume, from, buffer)?
        {
            self.at = (volume, offset + buffer.len() as u64);
            return Ok(Some(Event::Data { volume, offset }));
        }
        self.at = (volume + 1, 0);
        Ok(Some(Event::End { volume, size }))
    }

    fn leave_out(&mut self, volume: usize) {
        if let Some(left_out) = self.left_out.get_mut(volume) {
            *left_out = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_as_its_container() {
        for (path, expected) in [
            ("/a/disk.vmdk", "disk.img"),
            ("disk.1.VMDK", "disk.1.img"),
            ("disk.qcow2", "disk.qcow2.img"),
            ("stdin", "stdin.img"),
            (".vmdk", "%2evmdk.img"),
            ("..", "image.img"),
        ] {
            assert_eq!(image_name(Path::new(path), &["vmdk"]), Path::new(expected));
        }
    }
}
