//! What filesystems have in common whose images are open files: leases, reading, sharing, and the scratch folder with donors.

mod images;
mod locks;
mod scratch;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use rustix::fs::Advice;
use rustix::io::Errno;

pub(super) use images::OpenImage;
pub(super) use scratch::{Scratch, SetUp};

use super::kernel::{self, Verdict};
use super::{ImageInfo, Purpose, ShareOutcome, SourceFile, attributes};
use crate::block::{BLOCK_BYTES, BLOCK_LEN};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::numbers::ImageId;
use crate::pool::users::FileId;
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::sys::beneath::Folder;
use crate::sys::dedupe::{Deduped, dedupe_range};
use crate::sys::readahead::readahead;

/// What opening images must know of their filesystem.
pub(super) struct Specifics<'a> {
    /// Its UUID.
    pub(super) uuid: [u8; 16],
    /// The verdict on the running kernel's release.
    pub(super) verdict: Verdict,
    /// Whether a file lies on it.
    pub(super) contains: &'a dyn Fn(BorrowedFd<'_>) -> bool,
    /// Returns the tree that a file's inode lies in, 0 where there is only one; `None` if its data lies where it cannot be shared.
    pub(super) root_of: fn(&File) -> rustix::io::Result<Option<u64>>,
    /// Whether an inode's data has checksums.
    pub(super) is_checksummed: fn(&File, u64) -> rustix::io::Result<bool>,
    /// Sets up a new donor.
    pub(super) set_up: SetUp,
    /// The leases that it has.
    pub(super) leases: Leases,
}

/// Whether images of a filesystem are opened with a lease. Without one, a change is noticed afterwards, by the times of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Leases {
    /// With a lease, or not at all.
    Always,
    /// With a lease where the filesystem has them and the user may take them.
    WherePossible,
    /// Without.
    None,
}

/// The open images of a pool, and the operations on them that are the same on all filesystems.
#[derive(Debug)]
pub(super) struct Opened {
    pub(super) images: Vec<OpenImage>,
    /// Files that were found, and are left alone.
    pub(super) left_alone: BTreeMap<FileId, PathBuf>,
    pub(super) scratch: Scratch,
    _watch: Option<watch::Watch>,
    _run_lock: File,
}

impl Opened {
    /// Opens the images of a pool, and returns which of them are left alone. Dirty data of the filesystem is on disk afterwards. If extents
    /// are to be shared, `settle` is called once the filesystem is locked, with whether it is writable.
    ///
    /// # Errors
    /// Returns [`Error::Kernel`] or [`Error::ReadOnly`] if extents cannot be shared, [`Error::Busy`] if another vmfold works on the
    /// filesystem, [`Error::NotOurs`] if others could tamper with the lock, and [`Error::Io`] if a system call fails for a reason that does
    /// not lie in one image.
    pub(super) fn open(
        found: &[FoundImage],
        first: &NamedPath,
        purpose: Purpose,
        specifics: &Specifics<'_>,
        settle: impl FnOnce(bool),
    ) -> Result<(Self, Vec<Skipped>)> {
        let mount = rustix::fs::fstatvfs(&first.folder).map_err(Error::io("look at", &first.root))?;
        let is_writable = !mount.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY);
        if purpose == Purpose::Change {
            if specifics.verdict == Verdict::Refuse {
                return Err(Error::Kernel {
                    release: kernel::release(),
                });
            }
            if !is_writable {
                return Err(Error::ReadOnly {
                    path: first.root.clone(),
                });
            }
        }
        // The lock is taken before any image is opened, since opening one would break the leases of another run.
        let run_lock = locks::lock_filesystem(specifics.uuid, purpose, &first.root)?;
        if purpose.shares() {
            settle(is_writable);
        }
        let opened = images::open(found, specifics, purpose, || {
            rustix::fs::syncfs(&first.folder).map_err(Error::io("sync the filesystem of", &first.root))
        })?;
        let for_donors = (purpose == Purpose::Change)
            .then(|| folder_for_donors(found, &opened.images, specifics))
            .flatten();
        let (folder, path) = for_donors.unwrap_or_else(|| (first.folder.clone(), first.root.clone()));
        let sizes = opened.images.iter().map(|image| image.known.size);
        let longest = sizes.max().unwrap_or(0).next_multiple_of(BLOCK_BYTES);
        let opened_images = Self {
            scratch: Scratch::new(folder, path, longest, specifics.set_up),
            images: opened.images,
            left_alone: opened.left_alone,
            _watch: opened.watch,
            _run_lock: run_lock,
        };
        Ok((opened_images, opened.skipped))
    }

    /// Returns the last block of each image whose size is not a multiple of 4 KiB.
    pub(super) fn partial_blocks(&self) -> BTreeMap<ImageId, u32> {
        let numbered = ImageId::numbered(&self.images);
        let odd = numbered.filter(|(_, image)| !image.known.size.is_multiple_of(BLOCK_BYTES));
        let last =
            odd.filter_map(|(number, image)| Some((number, u32::try_from(image.known.size / BLOCK_BYTES).ok()?)));
        last.collect()
    }

    /// Returns an image by its number.
    pub(super) fn image(&self, image: ImageId) -> &OpenImage {
        &self.images[image.index()]
    }

    /// Returns the properties of an image.
    pub(super) fn known(&self, image: ImageId) -> &ImageInfo {
        &self.image(image).known
    }

    pub(super) fn attributes(&self, image: ImageId) -> Result<Metadata> {
        let image = self.image(image);
        attributes::read(&*image.file, &image.known.path)
    }

    pub(super) fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        if let SourceFile::Image(image) = file
            && let Some(direct) = &self.image(image).direct
            && offset.is_multiple_of(BLOCK_BYTES)
            && buffer.as_ptr().addr().is_multiple_of(BLOCK_LEN)
            && direct.read_at(buffer, offset).is_ok_and(|read| read == buffer.len())
        {
            return Ok(());
        }
        // Everything else goes through the page cache, and so does what direct I/O cannot read or finds damaged.
        self.with_file(file, |file, path| {
            // The last block of an image may be partial; the rest of it reads as zeros.
            let mut done = 0;
            while done < buffer.len() {
                let position = offset + done as u64;
                match file.read_at(&mut buffer[done..], position) {
                    Ok(0) => break,
                    Ok(read) => done += read,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(Error::unreadable(path, position, offset + length - position)(error)),
                }
            }
            buffer[done..].fill(0);
            Ok(())
        })
    }

    pub(super) fn read_ahead(&self, file: SourceFile, offset: u64, length: u64) {
        if let SourceFile::Image(image) = file
            && self.image(image).direct.is_some()
        {
            return;
        }
        let _ = self.with_file(file, |file, _| {
            readahead(file, offset, length);
            Ok(())
        });
    }

    pub(super) fn drop_behind(&self, file: SourceFile, offset: u64, length: u64) {
        let _ = self.with_file(file, |file, _| {
            let _ = rustix::fs::fadvise(file, offset, std::num::NonZeroU64::new(length), Advice::DontNeed);
            Ok(())
        });
    }

    pub(super) fn share(
        &self,
        source: SourceFile,
        source_offset: u64,
        image: ImageId,
        offset: u64,
        length: u64,
    ) -> ShareOutcome {
        let destination = &self.image(image).file;
        let called = self.with_file(source, |file, path| {
            dedupe_range(file, source_offset, destination, offset, length).map_err(Error::io("share blocks of", path))
        });
        match called {
            // Without progress, a success would make the caller ask for the range for ever.
            Ok(Deduped::Same(0)) => ShareOutcome::Refused(Errno::IO),
            Ok(Deduped::Same(_)) => ShareOutcome::Shared,
            Ok(Deduped::Differs) => ShareOutcome::Differs,
            Ok(Deduped::Refused(errno)) => ShareOutcome::Refused(errno),
            Err(error) => ShareOutcome::Refused(errno_of(&error)),
        }
    }

    fn with_file<T>(&self, file: SourceFile, work: impl FnOnce(&File, &Path) -> Result<T>) -> Result<T> {
        match file {
            SourceFile::Image(image) => {
                let image = self.image(image);
                work(&image.file, &image.known.path)
            }
            SourceFile::Donor(donor) => work(&self.scratch.donor(donor), self.scratch.path()),
            SourceFile::Hole { checksummed } => work(&*self.scratch.hole(checksummed)?, self.scratch.path()),
        }
    }
}

/// Returns the first folder of an image where a donor can be made, with its path. In a read-only snapshot none can.
fn folder_for_donors(
    found: &[FoundImage],
    images: &[OpenImage],
    specifics: &Specifics<'_>,
) -> Option<(Folder, PathBuf)> {
    use std::os::fd::AsFd;
    let by_path: BTreeMap<&Path, &FoundImage> = found.iter().map(|found| (found.path.as_path(), found)).collect();
    let mut tried = BTreeSet::new();
    let mut folders = images.iter().filter_map(|image| {
        let path = image.known.path.parent()?;
        let folder = by_path.get(image.known.path.as_path())?;
        tried.insert(path.to_owned()).then_some((folder, path))
    });
    folders.find_map(|(found, path)| {
        let folder = found.open_folder().ok()?;
        // A folder that was moved since may lie on another filesystem.
        let is_on_filesystem = (specifics.contains)(folder.as_fd());
        (is_on_filesystem && scratch::unnamed_file_in(&folder).is_ok()).then(|| (folder, path.to_owned()))
    })
}

/// Formats the name of a file that holds extents, for messages.
pub(super) fn name_of_holder(path: &Path, is_left_alone: bool) -> String {
    let note = if is_left_alone { " (left alone)" } else { "" };
    format!("{}{note}", path.to_string_lossy())
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn errno_of(error: &Error) -> Errno {
    match error {
        Error::Io { source, .. } => source.raw_os_error().map_or(Errno::IO, Errno::from_raw_os_error),
        _ => Errno::IO,
    }
}

/// The methods of [`super::Filesystem`] that inspect and read images, for a filesystem with a field `opened`.
macro_rules! reads_opened {
    () => {
        fn image_count(&self) -> u32 {
            u32::try_from(self.opened.images.len()).unwrap_or(u32::MAX)
        }

        fn image(&self, image: ImageId) -> &ImageInfo {
            self.opened.known(image)
        }

        fn may_touch(&self, image: ImageId) -> bool {
            self.opened.image(image).may_touch()
        }

        fn is_unchanged(&self, image: ImageId) -> bool {
            self.opened.image(image).is_unchanged()
        }

        fn attributes(&self, image: ImageId) -> Result<Metadata> {
            self.opened.attributes(image)
        }

        fn folder(&self) -> &Path {
            self.opened.scratch.path()
        }

        fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
            self.opened.read(file, offset, buffer)
        }

        fn read_ahead(&self, file: SourceFile, offset: u64, length: u64) {
            self.opened.read_ahead(file, offset, length);
        }

        fn drop_behind(&self, file: SourceFile, offset: u64, length: u64) {
            self.opened.drop_behind(file, offset, length);
        }

        fn free_bytes(&self) -> Result<u64> {
            self.opened.scratch.free_bytes()
        }

        fn commit(&self) -> Result<()> {
            self.opened.scratch.sync()
        }
    };
}

/// The methods of [`super::Filesystem`] that share extents of images, for a filesystem with a field `opened`.
macro_rules! shares_opened {
    () => {
        fn create_donor(&self, class: Class) -> Result<DonorId> {
            self.opened.scratch.create_donor(class)
        }

        fn append_to_donor(&self, donor: DonorId, content: &[u8], frame: Option<&[u8]>) -> Result<()> {
            let by_frames = || self.takes_frames();
            self.opened
                .scratch
                .append_to_donor(donor, content, frame, by_frames)
        }

        fn discard_donor(&self, donor: DonorId) {
            self.opened.scratch.discard_donor(donor);
        }

        fn settle_donor(&self, donor: DonorId) -> Result<()> {
            self.opened.scratch.settle_donor(donor)
        }

        fn close_donors(&self) -> Result<()> {
            self.opened.scratch.close_donors();
            self.commit()
        }

        fn share(
            &self,
            source: SourceFile,
            source_offset: u64,
            image: ImageId,
            offset: u64,
            length: u64,
        ) -> ShareOutcome {
            self.opened.share(source, source_offset, image, offset, length)
        }

        fn clone_range(
            &self,
            image: ImageId,
            offset: u64,
            file: &File,
            file_offset: u64,
            length: u64,
        ) -> rustix::io::Result<()> {
            let source = &*self.opened.image(image).file;
            crate::sys::clone::clone_range(source, offset, file, file_offset, length)
        }
    };
}

pub(super) use {reads_opened, shares_opened};
