//! The folder on the filesystem where donors are made. Donors have no names.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;

use super::lock;
use crate::error::{Error, Result};
use crate::facts::{Class, Compression};
use crate::numbers::DonorId;
use crate::sys::beneath::Folder;
use crate::sys::encoded_write::write_frame;
use crate::sys::readahead::write_out;

/// Sets up a new, empty file so that its blocks can be shared with files of a class, and are stored alike.
pub(in crate::fs) type SetUp = fn(&File, Class) -> rustix::io::Result<()>;

/// The scratch folder, and the files in it.
#[derive(Debug)]
pub(in crate::fs) struct Scratch {
    folder: Folder,
    /// The folder's path, for messages.
    path: PathBuf,
    set_up: SetUp,
    /// Size of the longest image in bytes, rounded up to whole blocks.
    longest: u64,
    donors: Mutex<Vec<ScratchDonor>>,
    holes: Mutex<[Option<Arc<File>>; 2]>,
}

#[derive(Debug)]
struct ScratchDonor {
    file: Arc<File>,
    length: u64,
    compression: Compression,
}

impl Scratch {
    pub(super) fn new(folder: Folder, path: PathBuf, longest: u64, set_up: SetUp) -> Self {
        Self {
            folder,
            path,
            set_up,
            longest,
            donors: Mutex::default(),
            holes: Mutex::default(),
        }
    }

    /// Returns the open folder.
    pub(in crate::fs) fn folder(&self) -> &Folder {
        &self.folder
    }

    /// Returns the folder's path, for messages.
    pub(in crate::fs) fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a file without a name, which vanishes when it is closed.
    pub(in crate::fs) fn unnamed_file(&self) -> Result<File> {
        unnamed_file_in(&self.folder).map_err(|errno| self.donor_error(errno.into()))
    }

    /// Writes all dirty data and metadata of the filesystem to disk.
    pub(in crate::fs) fn sync(&self) -> Result<()> {
        rustix::fs::syncfs(&self.folder).map_err(Error::io("sync the filesystem of", &self.path))
    }

    pub(in crate::fs) fn free_bytes(&self) -> Result<u64> {
        let free = rustix::fs::fstatvfs(&self.folder).map_err(Error::io("look at", &self.path))?;
        Ok(free.f_bavail.saturating_mul(free.f_frsize))
    }

    /// Returns a file without data that is as long as the longest image.
    pub(super) fn hole(&self, checksummed: bool) -> Result<Arc<File>> {
        let mut holes = lock(&self.holes);
        let slot = &mut holes[usize::from(checksummed)];
        if let Some(file) = slot {
            return Ok(file.clone());
        }
        let file = self.new_file(Class {
            checksummed,
            compression: Compression::None,
            groups: 0,
        })?;
        file.set_len(self.longest)
            .map_err(Error::io("make a donor in", &self.path))?;
        Ok(slot.insert(Arc::new(file)).clone())
    }

    fn new_file(&self, class: Class) -> Result<File> {
        let file = self.unnamed_file()?;
        (self.set_up)(&file, class).map_err(Error::io("make a donor in", &self.path))?;
        Ok(file)
    }

    /// Returns a donor's file.
    pub(super) fn donor(&self, donor: DonorId) -> Arc<File> {
        lock(&self.donors)[donor.index()].file.clone()
    }

    pub(in crate::fs) fn create_donor(&self, class: Class) -> Result<DonorId> {
        let file = self.new_file(class)?;
        let mut donors = lock(&self.donors);
        donors.push(ScratchDonor {
            file: Arc::new(file),
            length: 0,
            compression: class.compression,
        });
        Ok(DonorId::at(donors.len() - 1))
    }

    pub(in crate::fs) fn append_to_donor(
        &self,
        donor: DonorId,
        content: &[u8],
        frame: Option<&[u8]>,
        takes_frames: impl FnOnce() -> bool,
    ) -> Result<()> {
        let length = content.len() as u64;
        let (file, at, compression) = {
            let mut donors = lock(&self.donors);
            let donor = &mut donors[donor.index()];
            let at = donor.length;
            donor.length += length;
            (donor.file.clone(), at, donor.compression)
        };
        let by_frames = compression == Compression::Zstd && takes_frames();
        if let Some(frame) = frame.filter(|_| by_frames) {
            return write_frame(&*file, at, frame, length).map_err(|errno| self.donor_error(errno.into()));
        }
        // A commit, which another thread may make at any time, writes out what is dirty as an extent of its own. A preallocated range is
        // one extent from the start, and is never compressed.
        if by_frames || compression == Compression::None {
            match rustix::fs::fallocate(&*file, FallocateFlags::empty(), at, length) {
                Ok(()) | Err(Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(self.donor_error(errno.into())),
            }
        }
        let written = file
            .write_all_at(content, at)
            .and_then(|()| write_out(&*file, at, length, false));
        written.map_err(|error| self.donor_error(error))
    }

    pub(in crate::fs) fn discard_donor(&self, donor: DonorId) {
        // If this fails, the space is free at the end of the run.
        let _ = lock(&self.donors)[donor.index()].file.set_len(0);
    }

    pub(in crate::fs) fn settle_donor(&self, donor: DonorId) -> Result<()> {
        self.donor(donor).sync_data().map_err(|error| self.donor_error(error))
    }

    pub(in crate::fs) fn close_donors(&self) {
        lock(&self.donors).clear();
    }

    pub(in crate::fs) fn donor_error(&self, error: std::io::Error) -> Error {
        Error::writing("write a donor in", &self.path)(error)
    }
}

pub(super) fn unnamed_file_in(folder: &Folder) -> rustix::io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::openat(folder, ".", flags, Mode::RUSR | Mode::WUSR).map(File::from)
}
