//! Opening images, each with a lease that tells whether anyone else uses it, now or later.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fs::IFlags;
use rustix::io::Errno;

use super::INODE_ITEM;
use crate::error::{Error, Result};
use crate::pool::{Found, Skip, Skipped, users};
use crate::shown::shown;
use crate::sys::fs_info::{FsInfo, Kind, fs_info, is_realtime};
use crate::sys::inode_flags::inode_flags;
use crate::sys::lease::{self, Lease};
use crate::sys::tree_search::{FEW, Key, tree_search};
use crate::sys::{logical_ino, signals};

/// How often leases are looked at. Whoever opens an image waits no longer than this, and one system call.
const LEASE_POLL: Duration = Duration::from_millis(20);

/// `FS_VERITY_FL` (uapi/linux/fs.h): the file is sealed by fs-verity.
const VERITY: IFlags = IFlags::from_bits_retain(0x0010_0000);

/// What images are opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// To read extent maps and data only; whoever else uses them does not matter.
    Look,
    /// To read them as a whole: only images that nobody has open for writing.
    Read,
    /// To say what sharing extents would do: only images that nobody else has open.
    Plan,
    /// To share extents: the same, on a filesystem that can be written.
    Change,
}

impl Purpose {
    /// Whom a lease keeps off meanwhile.
    fn lease(self) -> Option<Lease> {
        match self {
            Self::Look => None,
            Self::Read => Some(Lease::Writers),
            Self::Plan | Self::Change => Some(Lease::All),
        }
    }

    /// Whether extents are to be shared, or it is to be said what that would do.
    pub(super) fn shares(self) -> bool {
        self.lease() == Some(Lease::All)
    }
}

/// An open image.
#[derive(Debug)]
pub struct Image {
    /// Its path.
    pub path: PathBuf,
    /// Bytes, holes included.
    pub size: u64,
    /// The subvolume's tree; 0 where there are no subvolumes.
    pub root: u64,
    /// Its inode there.
    pub inode: u64,
    /// Whether the filesystem keeps checksums of its data. Where it keeps none of any file, all are alike, and this is true.
    pub checksummed: bool,
    /// The number of the machine it belongs to, by its first name.
    pub machine: u32,
    /// The group it shares within, below 64.
    pub group: u8,
    /// Why it keeps its extents, if it does: others may share them.
    pub fixed: Option<Skip>,
    /// Whether its owner wants it not to be compressed.
    pub stays_uncompressed: bool,
    pub(super) file: Arc<File>,
    /// The same file, to be read past the page cache, where everything is read once.
    pub(super) direct: Option<File>,
    stamp: Stamp,
    revoked: Arc<AtomicBool>,
}

/// What must stay as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
    links: u64,
    mode: u32,
    owner: (u32, u32),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            inode: (metadata.dev(), metadata.ino()),
            size: metadata.len(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
            links: metadata.nlink(),
            mode: metadata.mode(),
            owner: (metadata.uid(), metadata.gid()),
        }
    }
}

impl Image {
    /// Whether nobody else wanted it since it was opened.
    pub fn may_touch(&self) -> bool {
        !self.revoked.load(Ordering::Acquire)
    }

    /// When it was changed last, as its inode says.
    pub(super) fn changed_at(&self) -> (i64, i64) {
        self.stamp.ctime
    }

    /// Tells the state that it was opened in from others: inode, size and times.
    pub(super) fn state_hash(&self) -> u64 {
        let Stamp {
            inode,
            size,
            mtime,
            ctime,
            ..
        } = self.stamp;
        let numbers = [inode.1, size];
        let times = [mtime.0, mtime.1, ctime.0, ctime.1].map(i64::cast_unsigned);
        let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
        for number in numbers.into_iter().chain(times) {
            hash.update(&number.to_le_bytes());
        }
        hash.digest()
    }

    /// Whether size, times, links, mode and owner are what they were when it was opened.
    pub fn is_unchanged(&self) -> bool {
        self.file
            .metadata()
            .is_ok_and(|metadata| Stamp::of(&metadata) == self.stamp)
    }
}

/// Opens images; those that are left alone are returned with the reason.
pub(super) fn open(
    found: &[Found],
    info: &FsInfo,
    purpose: Purpose,
) -> Result<(Vec<Image>, Vec<Skipped>, Option<LeaseKeeper>)> {
    raise_file_limit();
    signals::ignore_sigio();
    let (mut images, mut skipped, mut busy) = (Vec::new(), Vec::new(), BTreeSet::new());
    let mut used = BTreeMap::new();
    for image in found {
        match open_one(image, info, purpose)? {
            Ok(opened) => images.push((opened, &image.machines)),
            Err(one) => {
                if one.reason == Skip::InUse
                    && let Ok(metadata) = image.path.metadata()
                {
                    used.insert(users::file_id(&metadata), skipped.len());
                }
                if purpose.shares() && matches!(one.reason, Skip::InUse | Skip::Dirty | Skip::Running) {
                    busy.extend(&image.machines);
                }
                skipped.push(one);
            }
        }
    }
    for (file, users) in users::users_of(&used.keys().copied().collect()) {
        let detail = &mut skipped[used[&file]].detail;
        let locked = detail.take();
        *detail = Some(users.into_iter().chain(locked).collect::<Vec<_>>().join(", "));
    }
    let (images, idle): (Vec<_>, Vec<_>) = images
        .into_iter()
        .partition(|(_, machines)| machines.iter().all(|machine| !busy.contains(machine)));
    let idle = idle
        .iter()
        .map(|(image, _)| Skipped::new(&image.path, Skip::MachineInUse));
    skipped.extend(idle);
    let fixed = images
        .iter()
        .filter_map(|(image, _)| Some(Skipped::new(&image.path, image.fixed?)));
    skipped.extend(fixed);
    skipped.sort_by(|a, b| a.path.cmp(&b.path));
    let mut machines = BTreeMap::new();
    let numbered = images.into_iter().map(|(mut image, names)| {
        let next = u32::try_from(machines.len()).unwrap_or(u32::MAX);
        image.machine = *machines.entry(names.first()).or_insert(next);
        image
    });
    let images: Vec<Image> = numbered.collect();
    let keeper = purpose.lease().map(|lease| LeaseKeeper::new(&images, lease));
    Ok((images, skipped, keeper))
}

fn open_one(found: &Found, info: &FsInfo, purpose: Purpose) -> Result<std::result::Result<Image, Skipped>> {
    let path = &found.path;
    let leave = |reason| Ok(Err(Skipped::new(path, reason)));
    if let Some((reason, file)) = found.sign.as_ref().filter(|_| purpose.shares()) {
        return Ok(Err(Skipped {
            detail: Some(shown(file).to_string()),
            ..Skipped::new(path, *reason)
        }));
    }
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(libc::O_NOATIME | libc::O_NONBLOCK | libc::O_NOFOLLOW);
    let file = match options.open(path) {
        Ok(file) => file,
        // Someone else holds a lease and must give it up first: a second run, or a file server.
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return leave(Skip::InUse),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return leave(Skip::Changed),
        Err(error) => return Err(Error::io("open", path)(error)),
    };
    // Only what is asked for is read: blocks to be proved lie anywhere, and all else is read ahead by asking.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random);
    if !fs_info(&file).is_ok_and(|its| its == *info) {
        return leave(Skip::OtherFilesystem);
    }
    let metadata = file.metadata().map_err(Error::io("look at", path))?;
    if !metadata.is_file() {
        return leave(Skip::Changed);
    }
    let flags = inode_flags(&file).map_err(Error::io("look at", path))?;
    let fixed = if flags.intersects(IFlags::IMMUTABLE | IFlags::APPEND) {
        Some(Skip::Immutable)
    } else {
        flags.contains(VERITY).then_some(Skip::Verity)
    };
    if let Some(lease) = purpose.lease() {
        match lease::take(&file, lease) {
            Ok(()) => {}
            Err(Errno::AGAIN) => {
                return Ok(Err(Skipped {
                    detail: users::locked_by(&file).map(str::to_owned),
                    ..Skipped::new(path, Skip::InUse)
                }));
            }
            Err(errno) => return Err(Error::io("take a lease on", path)(errno)),
        }
    }
    let (root, checksummed) = match info.kind {
        Kind::Btrfs { .. } => (
            logical_ino::subvolume_of(&file).map_err(Error::io("look at the subvolume of", path))?,
            !has_no_checksums(&file, metadata.ino(), path)?,
        ),
        Kind::Xfs { .. } => (0, true),
    };
    if matches!(info.kind, Kind::Xfs { .. }) && is_realtime(&file).map_err(Error::io("look at", path))? {
        return leave(Skip::OtherFilesystem);
    }
    Ok(Ok(Image {
        path: path.clone(),
        size: metadata.len(),
        root,
        inode: metadata.ino(),
        checksummed,
        machine: 0,
        group: found.group,
        fixed: fixed.filter(|_| purpose.shares()),
        stays_uncompressed: is_marked_uncompressed(&file),
        direct: if purpose == Purpose::Read {
            open_direct(&file)
        } else {
            None
        },
        file: Arc::new(file),
        stamp: Stamp::of(&metadata),
        revoked: Arc::default(),
    }))
}

/// Whether someone said on purpose that a file is not to be compressed: by the property. The inode's mark (`chattr +m`) does not tell
/// that, since the filesystem sets it as well, on files of which one range did not shrink (kernel: `BTRFS_INODE_NOCOMPRESS` in
/// `compress_file_range`).
fn is_marked_uncompressed(file: &File) -> bool {
    let mut value = [0; 16];
    let length = rustix::fs::fgetxattr(file, "btrfs.compression", &mut value[..]).unwrap_or(0);
    matches!(&value[..length], b"none" | b"no")
}

/// Opens a file once more, for direct reading. None where that cannot be: then it is read through the page cache.
fn open_direct(file: &File) -> Option<File> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_DIRECT | libc::O_NOATIME);
    options.open(path).ok()
}

/// Whether the inode has `BTRFS_INODE_NODATASUM` (bit 0 of the inode item's flags, at byte 64 of the item).
fn has_no_checksums(file: &File, inode: u64, path: &std::path::Path) -> Result<bool> {
    const FLAGS_AT: usize = 64;
    let key = Key {
        object: inode,
        kind: INODE_ITEM,
        offset: 0,
    };
    let mut flags = None;
    tree_search::<FEW>(file, 0, key, key, |_, item| {
        flags = item
            .get(FLAGS_AT..FLAGS_AT + 8)
            .and_then(|bytes| bytes.try_into().ok())
            .map(u64::from_le_bytes);
        None
    })
    .map_err(Error::io("read the extent map of", path))?;
    let flags = flags.ok_or_else(|| Error::Metadata {
        path: path.to_owned(),
        problem: "no inode item".into(),
    })?;
    Ok(flags & 1 != 0)
}

/// Every image stays open for the whole run, for its lease, and donors as long as images may be shared with them; the usual
/// limit of 1024 files is too low for a large pool.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Where this fails, opening fails and says so.
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
}

/// Looks after the leases: gives one back as soon as someone waits for it.
#[derive(Debug)]
pub(super) struct LeaseKeeper {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl LeaseKeeper {
    fn new(images: &[Image], lease: Lease) -> Self {
        let mut held: Vec<_> = images
            .iter()
            .map(|image| (image.file.clone(), image.revoked.clone()))
            .collect();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Acquire) {
                held.retain(|(file, revoked)| {
                    let mine = lease::is_held(&**file, lease);
                    if !mine {
                        // First no call begins any more, then the opener goes on.
                        revoked.store(true, Ordering::Release);
                        let _ = lease::release(&**file);
                    }
                    mine
                });
                std::thread::park_timeout(LEASE_POLL);
            }
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }
}

impl Drop for LeaseKeeper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}
