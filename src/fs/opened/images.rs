//! Opens images, each with a lease that tells whether anyone else uses the image, at the time or later.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{IFlags, OFlags};
use rustix::io::Errno;

use super::watch::Watch;
use super::{Leases, Specifics};
use crate::block::BLOCK_BYTES;
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::fs::{ImageInfo, Purpose};
use crate::numbers::MachineId;
use crate::pool::users::{self, FileId};
use crate::pool::{FoundImage, Skip, Skipped};
use crate::shown::shown;
use crate::sys::beneath::reopen;
use crate::sys::inode_flags::inode_flags;
use crate::sys::lease::Lease;
use crate::sys::open_files::raise_file_limit;
use crate::sys::priority::Hurry;

/// `FS_VERITY_FL` (uapi/linux/fs.h): fs-verity makes the file's content immutable.
const VERITY: IFlags = IFlags::from_bits_retain(0x0010_0000);

impl Purpose {
    /// Returns the lease that is held on images meanwhile.
    fn lease(self) -> Option<Lease> {
        match self {
            Self::Look => None,
            Self::Read => Some(Lease::Writers),
            Self::Plan | Self::Change => Some(Lease::All),
        }
    }

    /// Whether the run shares extents, or tells what sharing them would do.
    pub(in crate::fs) fn shares(self) -> bool {
        self.lease() == Some(Lease::All)
    }
}

/// An open image.
#[derive(Debug)]
pub(in crate::fs) struct OpenImage {
    /// Its properties.
    pub(in crate::fs) known: ImageInfo,
    /// The tree id of its subvolume; 0 where there are no subvolumes.
    pub(in crate::fs) root: u64,
    /// Its inode number in the subvolume.
    pub(in crate::fs) inode: u64,
    /// The machine that it belongs to. Machines are numbered in the order of their first images.
    pub(in crate::fs) machine: MachineId,
    /// The group of images that it shares with, below 32.
    pub(in crate::fs) group: u8,
    /// Why its extents cannot be replaced, if they cannot. Other images may share them.
    pub(in crate::fs) fixed: Option<Skip>,
    pub(in crate::fs) file: Arc<File>,
    /// The same file, open for direct I/O where an image is read as a whole; `None` if the filesystem does not support it.
    pub(super) direct: Option<File>,
    stamp: Stamp,
    revoked: Arc<AtomicBool>,
}

/// The part of an inode's status that must not change during a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    id: FileId,
    size: u64,
    mtime: FileTime,
    ctime: FileTime,
    links: u64,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        let time = |seconds, nanoseconds| FileTime {
            seconds,
            nanoseconds: u32::try_from(nanoseconds).unwrap_or_default(),
        };
        Self {
            id: metadata.into(),
            size: metadata.len(),
            mtime: time(metadata.mtime(), metadata.mtime_nsec()),
            ctime: time(metadata.ctime(), metadata.ctime_nsec()),
            links: metadata.nlink(),
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
        }
    }
}

impl OpenImage {
    /// Whether nobody else has wanted the image since it was opened.
    pub(in crate::fs) fn may_touch(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }

    /// Returns the time of the inode's last change.
    pub(in crate::fs) fn changed_at(&self) -> FileTime {
        self.stamp.ctime
    }

    /// Returns a hash of the state in which it was opened: inode number, size and times.
    pub(in crate::fs) fn state_hash(&self) -> u64 {
        let Stamp {
            id, size, mtime, ctime, ..
        } = self.stamp;
        let parts = |time: FileTime| [time.seconds.cast_unsigned(), u64::from(time.nanoseconds)];
        let times = [mtime, ctime].into_iter().flat_map(parts);
        let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
        for number in [id.inode, size].into_iter().chain(times) {
            hash.update(&number.to_le_bytes());
        }
        hash.digest()
    }

    /// Whether size, times, links, mode and owner are unchanged since it was opened.
    pub(in crate::fs) fn is_unchanged(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }
}

/// The images that were opened, and those that were not.
#[derive(Debug)]
pub(super) struct OpenedImages {
    /// The open images, by their numbers.
    pub(super) images: Vec<OpenImage>,
    /// Images that are left alone, and images whose extents cannot be replaced.
    pub(super) skipped: Vec<Skipped>,
    /// The files of the images that are left alone.
    pub(super) left_alone: BTreeMap<FileId, PathBuf>,
    /// The thread that notices when someone opens one of them.
    pub(super) watch: Option<Watch>,
}

/// Opens images. `sync` is called between taking leases and reading metadata: it writes dirty data to disk, which the trees do not show
/// before.
pub(super) fn open(
    found: &[FoundImage],
    specifics: &Specifics<'_>,
    purpose: Purpose,
    sync: impl FnOnce() -> Result<()>,
) -> Result<OpenedImages> {
    // Every image stays open for the whole run, for its lease, and so do donors while images may be shared with them.
    raise_file_limit();
    // While a lease is being taken, whoever opens the image waits for this thread.
    let hurry = Hurry::begin();
    let watch = match purpose.lease() {
        Some(lease) => {
            let first = found.first().map_or(Path::new("/"), |image| &image.path);
            Some((Watch::start().map_err(Error::io("watch", first))?, lease))
        }
        None => None,
    };
    let (mut images, mut skipped) = (Vec::new(), Vec::new());
    // Machines that are in use, each with the image that shows it.
    let mut busy: BTreeMap<&PathBuf, &PathBuf> = BTreeMap::new();
    let (mut used, mut left_alone) = (BTreeMap::new(), BTreeMap::new());
    for image in found {
        let left = match open_one(image, specifics, purpose, watch.as_ref())? {
            Ok(opened) => {
                images.push((opened, image));
                continue;
            }
            Err(left) => left,
        };
        left_alone.insert(image.id, image.path.clone());
        if left.reason == Skip::InUse {
            used.insert(image.id, skipped.len());
        }
        if purpose.shares() && matches!(left.reason, Skip::InUse | Skip::Dirty | Skip::Running) {
            for machine in &image.machines {
                busy.entry(machine).or_insert(&image.path);
            }
        }
        skipped.push(left);
    }
    drop(hurry);
    sync()?;
    let images = with_flags(images, specifics, &mut left_alone, &mut skipped)?;
    name_users(&used, &mut skipped);
    let images = with_idle_machines(images, &busy, &mut left_alone, &mut skipped);
    let fixed = images
        .iter()
        .filter_map(|(image, _)| Some(Skipped::new(&image.known.path, image.fixed?)));
    skipped.extend(fixed);
    skipped.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(OpenedImages {
        images: number_machines(images),
        skipped,
        left_alone,
        watch: watch.map(|(watch, _)| watch),
    })
}

/// Returns the images whose machines are not in use. `busy` has the machines in use, each with the image that shows it.
fn with_idle_machines<'a>(
    images: Vec<(OpenImage, &'a FoundImage)>,
    busy: &BTreeMap<&PathBuf, &PathBuf>,
    left_alone: &mut BTreeMap<FileId, PathBuf>,
    skipped: &mut Vec<Skipped>,
) -> Vec<(OpenImage, &'a FoundImage)> {
    let mut idle = Vec::with_capacity(images.len());
    for (image, found) in images {
        let mut machines = found.machines.iter();
        let Some((machine, used)) = machines.find_map(|machine| busy.get_key_value(machine)) else {
            idle.push((image, found));
            continue;
        };
        left_alone.insert(found.id, image.known.path.clone());
        skipped.push(Skipped {
            detail: Some(who_keeps(machine, used)),
            ..Skipped::new(&image.known.path, Skip::MachineInUse)
        });
    }
    idle
}

/// Adds to images that are in use who uses them. `used` has their places in the list.
fn name_users(used: &BTreeMap<FileId, usize>, skipped: &mut [Skipped]) {
    for (file, users) in users::users_of(&used.keys().copied().collect()) {
        let detail = &mut skipped[used[&file]].detail;
        let locked = detail.take();
        *detail = Some(users.into_iter().chain(locked).collect::<Vec<_>>().join(", "));
    }
}

/// Numbers machines in the order of their first images.
fn number_machines(images: Vec<(OpenImage, &FoundImage)>) -> Vec<OpenImage> {
    let mut machines = BTreeMap::new();
    let numbered = images.into_iter().map(|(mut image, found)| {
        let next = MachineId::at(machines.len());
        image.machine = *machines.entry(found.machines.first()).or_insert(next);
        image
    });
    numbered.collect()
}

/// Formats which machine keeps an image from being worked on, and which of its images is in use.
fn who_keeps(machine: &Path, used: &Path) -> String {
    let name = machine.file_name().map_or(machine, Path::new);
    format!("{}: {}", shown(name), shown(used))
}

/// Reports that an image is left alone because a system call failed.
///
/// # Errors
/// Returns [`Error::Io`] if the reason does not lie in the image.
fn unreadable(path: &Path, operation: &'static str, errno: Errno) -> Result<Skipped> {
    if is_shortage(errno) {
        return Err(Error::io(operation, path)(errno));
    }
    Ok(Skipped {
        detail: Some(format!("cannot {operation} it: {}", std::io::Error::from(errno))),
        ..Skipped::new(path, Skip::Unreadable)
    })
}

/// Fills in whether the data of each image has checksums. Images of which that cannot be read are left alone.
fn with_flags<'a>(
    images: Vec<(OpenImage, &'a FoundImage)>,
    specifics: &Specifics<'_>,
    left_alone: &mut BTreeMap<FileId, PathBuf>,
    skipped: &mut Vec<Skipped>,
) -> Result<Vec<(OpenImage, &'a FoundImage)>> {
    let mut known = Vec::with_capacity(images.len());
    for (mut image, found) in images {
        match (specifics.is_checksummed)(&image.file, image.inode) {
            Ok(checksummed) => {
                image.known.checksummed = checksummed;
                known.push((image, found));
            }
            Err(errno) => {
                left_alone.insert(found.id, found.path.clone());
                skipped.push(unreadable(&found.path, "look at", errno)?);
            }
        }
    }
    Ok(known)
}

/// Whether an error says that this process has run out of a resource, so that it would meet every image.
fn is_shortage(errno: Errno) -> bool {
    matches!(errno, Errno::MFILE | Errno::NFILE | Errno::NOMEM)
}

/// Opens one image, or returns why it is left alone. Whatever is wrong with it, the others can be worked on.
fn open_one(
    found: &FoundImage,
    specifics: &Specifics<'_>,
    purpose: Purpose,
    watch: Option<&(Watch, Lease)>,
) -> Result<std::result::Result<OpenImage, Skipped>> {
    let path = &found.path;
    let leave = |reason| Ok(Err(Skipped::new(path, reason)));
    let leave_for = |reason, detail: Option<String>| Ok(Err(Skipped::new(path, reason).because(detail)));
    if let Some((reason, file)) = found.sign.as_ref().filter(|_| purpose.shares()) {
        return leave_for(*reason, Some(shown(file).to_string()));
    }
    let failed = |operation: &'static str, errno: Errno| unreadable(path, operation, errno).map(Err);
    let file = match open_without_trace(found) {
        Ok(file) => Arc::new(file),
        // Someone else, another run or a file server, has a lease and must give it up first.
        Err(Errno::AGAIN) => return leave(Skip::InUse),
        Err(Errno::NOENT | Errno::STALE | Errno::LOOP | Errno::NOTDIR) => return leave(Skip::Changed),
        Err(errno) => return failed("open", errno),
    };
    // The kernel must not read ahead: blocks are read at scattered places, and everything else is read ahead explicitly.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
    if !(specifics.contains)(file.as_fd()) {
        return leave(Skip::OtherFilesystem);
    }
    let fixed = match why_fixed(&file) {
        Ok(fixed) => fixed,
        Err(errno) => return failed("look at", errno),
    };
    // This comes before the lease, which would keep this process waiting as well.
    let direct = open_directly(&file, purpose);
    let revoked = match lease_on(&file, specifics.leases, watch) {
        Ok(revoked) => revoked,
        Err(Errno::AGAIN) => return leave_for(Skip::InUse, users::locked_by(&file).map(str::to_owned)),
        Err(errno) => return failed("take a lease on", errno),
    };
    let metadata = match file.metadata() {
        Ok(metadata) => metadata,
        Err(error) => return leave_for(Skip::Unreadable, Some(error.to_string())),
    };
    if u32::try_from(metadata.len().div_ceil(BLOCK_BYTES)).is_err() {
        return leave(Skip::TooLarge);
    }
    let root = match (specifics.root_of)(&file) {
        Ok(Some(root)) => root,
        Ok(None) => return leave(Skip::OtherFilesystem),
        // Without `CAP_SYS_ADMIN`, no image can be mapped.
        Err(Errno::PERM) => return Err(Error::io("read the extent map of", path)(Errno::PERM)),
        Err(errno) => return failed("look at", errno),
    };
    Ok(Ok(OpenImage {
        known: ImageInfo {
            path: path.clone(),
            size: metadata.len(),
            checksummed: true,
            stays_uncompressed: is_marked_uncompressed(&file),
        },
        root,
        inode: metadata.ino(),
        machine: MachineId::default(),
        group: found.group,
        fixed: fixed.filter(|_| purpose.shares()),
        direct,
        file,
        stamp: Stamp::of(&metadata),
        revoked,
    }))
}

/// Takes a lease on an image, if one is to be taken and the filesystem has them. Returns what tells that someone else has wanted the image.
fn lease_on(file: &Arc<File>, leases: Leases, watch: Option<&(Watch, Lease)>) -> rustix::io::Result<Arc<AtomicBool>> {
    let Some((watch, lease)) = watch.filter(|_| leases != Leases::None) else {
        return Ok(Arc::default());
    };
    match watch.add(file, *lease) {
        Err(Errno::INVAL | Errno::ACCESS | Errno::OPNOTSUPP) if leases == Leases::WherePossible => Ok(Arc::default()),
        other => other,
    }
}

/// Opens an image for reading, without changing its access time where that is permitted.
fn open_without_trace(found: &FoundImage) -> rustix::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    match found.open(flags | OFlags::NOATIME) {
        // Only the owner of a file may use `O_NOATIME`.
        Err(Errno::PERM) => found.open(flags),
        opened => opened,
    }
}

/// Opens an image that is read as a whole once more, for direct I/O, if the filesystem supports it.
fn open_directly(file: &File, purpose: Purpose) -> Option<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::NOATIME;
    (purpose == Purpose::Read).then(|| reopen(file, flags).ok()).flatten()
}

/// Returns why the extents of a file cannot be replaced, if they cannot.
fn why_fixed(file: &File) -> rustix::io::Result<Option<Skip>> {
    let flags = match inode_flags(file) {
        Ok(flags) => flags,
        // The filesystem has no inode flags, so that none is set.
        Err(Errno::NOTTY | Errno::OPNOTSUPP) => IFlags::empty(),
        Err(errno) => return Err(errno),
    };
    if flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND) {
        return Ok(Some(Skip::Immutable));
    }
    Ok(flags.contains(VERITY).then_some(Skip::Verity))
}

/// Whether the property `btrfs.compression` says that a file is not to be compressed. The inode flag (`chattr +m`) is not enough: the
/// filesystem sets it too, on files of which one range did not shrink (kernel: `BTRFS_INODE_NOCOMPRESS` in `compress_file_range`).
fn is_marked_uncompressed(file: &File) -> bool {
    let mut value = [0; 16];
    let length = rustix::fs::fgetxattr(file, "btrfs.compression", &mut value[..]).unwrap_or(0);
    matches!(&value[..length], b"none" | b"no")
}
