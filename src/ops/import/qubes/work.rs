//! The folder in the pool that images are restored to before volumes are filled, and a note of what was done. Only the user can write there.

use std::collections::BTreeSet;
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::targets::Target;
use crate::error::{Error, Result};
use crate::own_folder::own_folder;
use crate::sys::beneath::Folder;

/// The folder of images in it.
pub(super) const IMAGES: &str = "images";
/// The note, and the name that it has while it is written.
const NOTE: &str = "done.json";
const NEW_NOTE: &str = "done.json~";
/// Bytes of the note. It has about 200 for each volume.
const NOTE_BYTES_MAX: u64 = 64 << 20;
/// Bytes that are compared at a time.
const COMPARED_BYTES: usize = 1 << 20;

/// How far a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum Step {
    /// Its image lies in the folder.
    Restored,
    /// The daemon was told to put the image into its place. Whether it has done so is not known.
    Ending,
    /// The volume holds the image.
    Filled,
}

/// What is noted of a volume.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct NotedVolume {
    /// The image in the backup.
    image: PathBuf,
    size: u64,
    step: Step,
}

/// What is noted.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Note {
    /// The volumes, once all images are restored.
    volumes: Vec<NotedVolume>,
    /// The machines that were given the tag of a restore, and may have it still.
    tagged: BTreeSet<String>,
}

/// The folder, which no other run uses meanwhile.
#[derive(Debug)]
pub(super) struct Work {
    path: PathBuf,
    folder: Folder,
    /// The open folder, which is locked.
    _lock: File,
    note: Note,
}

impl Work {
    /// Opens the folder, if it exists.
    ///
    /// # Errors
    /// [`Error::Restoring`] if another run uses it; [`Error::NotOurs`]; [`Error::Io`].
    pub(super) fn look(path: &Path) -> Result<Option<Self>> {
        match path.symlink_metadata() {
            Ok(_) => Self::make(path).map(Some),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("look at", path)(error)),
        }
    }

    /// Opens the folder, and makes it if it does not exist.
    ///
    /// # Errors
    /// Those of [`Work::look`].
    pub(super) fn make(path: &Path) -> Result<Self> {
        let folder = own_folder(path)?;
        let lock = folder.as_fd().try_clone_to_owned().map_err(Error::io("open", path))?;
        let lock = File::from(lock);
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Restoring { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
        let note_path = path.join(NOTE);
        let note = match folder.open_file(Path::new(NOTE), OFlags::RDONLY) {
            Ok(file) => {
                let mut text = String::new();
                file.take(NOTE_BYTES_MAX)
                    .read_to_string(&mut text)
                    .map_err(Error::io("read", &note_path))?;
                serde_json::from_str(&text)
                    .map_err(|error| Error::io("read", &note_path)(std::io::Error::from(error)))?
            }
            Err(rustix::io::Errno::NOENT) => Note::default(),
            Err(errno) => return Err(Error::io("open", &note_path)(errno)),
        };
        Ok(Self {
            path: path.to_owned(),
            folder,
            _lock: lock,
            note,
        })
    }

    /// Whether all images were restored.
    pub(super) fn is_restored(&self) -> bool {
        !self.note.volumes.is_empty()
    }

    /// Notes that all images are restored.
    ///
    /// # Errors
    /// [`Error::Io`] if one is not there.
    pub(super) fn restored(&mut self, targets: &[Target]) -> Result<()> {
        let mut volumes = Vec::new();
        for target in targets {
            let image = target.wanted.image.clone();
            let size = self.image(&image)?.1;
            volumes.push(NotedVolume {
                image,
                size,
                step: Step::Restored,
            });
        }
        self.note.volumes = volumes;
        self.save()
    }

    /// How far the volume of an image is; `None` if the image is not restored yet.
    pub(super) fn step(&self, image: &Path) -> Option<Step> {
        let found = self.note.volumes.iter().find(|volume| volume.image == image);
        found.map(|volume| volume.step)
    }

    /// The size of an image that was restored.
    pub(super) fn size(&self, image: &Path) -> u64 {
        let found = self.note.volumes.iter().find(|volume| volume.image == image);
        found.map_or(0, |volume| volume.size)
    }

    /// Notes how far the volume of an image is.
    pub(super) fn set_step(&mut self, image: &Path, step: Step) -> Result<()> {
        for volume in self.note.volumes.iter_mut().filter(|volume| volume.image == image) {
            volume.step = step;
        }
        self.save()
    }

    /// Whether a machine was given the tag of a restore by an earlier run, and may have it still.
    pub(super) fn is_tagged(&self, machine: &str) -> bool {
        self.note.tagged.contains(machine)
    }

    /// Notes whether a machine may have the tag.
    pub(super) fn set_tagged(&mut self, machine: &str, is_tagged: bool) -> Result<()> {
        if is_tagged {
            self.note.tagged.insert(machine.to_owned());
        } else {
            self.note.tagged.remove(machine);
        }
        self.save()
    }

    /// Writes the note, which then is on the disk.
    fn save(&self) -> Result<()> {
        let path = self.path.join(NEW_NOTE);
        let text =
            serde_json::to_vec(&self.note).map_err(|error| Error::io("write", &path)(std::io::Error::from(error)))?;
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, NEW_NOTE, flags, Mode::RUSR | Mode::WUSR);
        let mut file = File::from(file.map_err(Error::io("make", &path))?);
        file.write_all(&text)
            .and_then(|()| file.sync_all())
            .map_err(Error::writing("write", &path))?;
        rustix::fs::renameat(&self.folder, NEW_NOTE, &self.folder, NOTE)
            .and_then(|()| rustix::fs::fsync(&self.folder))
            .map_err(Error::io("write", &path))
    }

    /// Opens an image that was restored, and returns its size as well.
    pub(super) fn image(&self, image: &Path) -> Result<(File, u64)> {
        let path = self.path.join(IMAGES).join(image);
        let file = self.folder.open_file(&Path::new(IMAGES).join(image), OFlags::RDONLY);
        let file = file.map_err(Error::io("open", &path))?;
        let size = file.metadata().map_err(Error::io("look at", &path))?.len();
        Ok((file, size))
    }

    /// Removes an image that its volume holds now.
    pub(super) fn remove_image(&self, image: &Path) -> Result<()> {
        let path = Path::new(IMAGES).join(image);
        match rustix::fs::unlinkat(&self.folder, &path, AtFlags::empty()) {
            Ok(()) | Err(rustix::io::Errno::NOENT) => Ok(()),
            Err(errno) => Err(Error::io("remove", &self.path.join(path))(errno)),
        }
    }

    /// Whether a volume holds its image, byte for byte. What cannot be read is another.
    pub(super) fn holds(&self, target: &Target) -> bool {
        let open = || -> std::io::Result<bool> {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let there = File::from(rustix::fs::open(&target.files.image, flags, Mode::empty())?);
            let (ours, size) = self.image(&target.wanted.image).map_err(std::io::Error::other)?;
            let metadata = there.metadata()?;
            if !metadata.is_file() || metadata.size() != size {
                return Ok(false);
            }
            let (mut one, mut other) = (vec![0; COMPARED_BYTES], vec![0; COMPARED_BYTES]);
            let mut at = 0;
            while at < size {
                let length = usize::try_from(size - at).unwrap_or(usize::MAX).min(COMPARED_BYTES);
                ours.read_exact_at(&mut one[..length], at)?;
                there.read_exact_at(&mut other[..length], at)?;
                if one[..length] != other[..length] {
                    return Ok(false);
                }
                at += length as u64;
            }
            Ok(true)
        };
        open().unwrap_or(false)
    }

    /// Removes the folder if nothing was restored to it that another run can use.
    pub(super) fn remove_if_unused(&self) {
        // An empty folder that stays does no harm: the next run uses it.
        let _ = std::fs::remove_dir(&self.path);
    }

    /// Removes the folder, with all that is left in it.
    pub(super) fn remove(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.path).map_err(Error::io("remove", &self.path))
    }
}
