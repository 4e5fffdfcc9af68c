//! Disks that hypervisors keep in files of their own formats (containers): a table says where each piece of the disk lies in the file. Such a file is
//! read in any order, so it must be a file that is not compressed. No file that a container names is opened: the user names what it lies on.

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
use crate::store::Store;

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

    /// Opens a container. `backing` is what the user named for the parts that it leaves to other files.
    ///
    /// # Errors
    /// Those of [`super::open`].
    pub(super) fn open<'a>(
        self,
        input: RandomInput<'a>,
        backing: &'a [Box<dyn Store>],
    ) -> Result<Box<dyn Backup + 'a>> {
        Ok(match self {
            Self::Qcow2 => Box::new(Container::new(qcow2::Qcow2::open(input, backing)?)),
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

/// The name of the disk in a container: that of the file, with `.img` in the place of a suffix of this kind. The suffixes have no dots.
pub(super) fn image_name(path: &Path, suffixes: &[&str]) -> PathBuf {
    let whole = Path::new(path.file_name().unwrap_or(OsStr::new("image")));
    let has = |known: &[&str]| {
        let suffix = whole.extension().and_then(OsStr::to_str);
        suffix.is_some_and(|suffix| known.iter().any(|one| one.eq_ignore_ascii_case(suffix)))
    };
    let is_replaced = has(suffixes) || has(&["img"]);
    let name = whole.file_stem().filter(|_| is_replaced).unwrap_or(whole.as_os_str());
    volume_name::component(&[name.as_bytes(), b".img"].concat())
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

    fn holds_blocks_in_place(&self) -> bool {
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
    fn a_disk_is_called_as_its_file_and_always_ends_with_img() {
        for (path, expected) in [
            ("/a/disk.qcow2", "disk.img"),
            ("disk.QCOW", "disk.img"),
            ("disk.img", "disk.img"),
            ("disk.vdi", "disk.vdi.img"),
            ("disk", "disk.img"),
            (".qcow2", ".qcow2.img"),
            ("a\nb.qcow2", "a%0ab.img"),
        ] {
            assert_eq!(image_name(Path::new(path), &["qcow2", "qcow"]), Path::new(expected));
        }
        let long = image_name(Path::new(&("x".repeat(249) + ".qcow2")), &["qcow2"]);
        assert!(long.as_os_str().len() == 253 && long.extension() == Some(OsStr::new("img")));
    }
}
