//! Which filesystem it is: the one place that asks.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{Filesystem, Purpose, btrfs, xfs};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::sys::fs_info::{FilesystemKind, FsInfo, fs_info};

/// Opens the images of a pool, and says which it leaves alone. Data in flight is on disk afterwards.
///
/// # Errors
/// Off btrfs and XFS with reflinks, on btrfs without root, or where images lie on two filesystems.
pub fn open(
    found: &[FoundImage],
    named: &[NamedPath],
    purpose: Purpose,
    monitor: &dyn Monitor,
) -> Result<(Box<dyn Filesystem>, Vec<Skipped>)> {
    let (info, first) = same_filesystem(named)?;
    match info.kind {
        FilesystemKind::Btrfs {
            checksum_type,
            checksum_bytes,
        } => {
            let checksums = (checksum_type, checksum_bytes);
            let (fs, skipped) = btrfs::Btrfs::open(found, first, info, purpose, checksums, monitor)?;
            Ok((Box::new(fs), skipped))
        }
        FilesystemKind::Xfs { reverse_map, .. } => {
            let (fs, skipped) = xfs::Xfs::open(found, first, info, purpose, reverse_map)?;
            Ok((Box::new(fs), skipped))
        }
    }
}

/// The UUID of the filesystem that a path is or will be on; none if it is neither btrfs nor XFS.
pub fn uuid_at(path: &Path) -> Option<[u8; 16]> {
    filesystem_at(path).map(|(_, info)| info.uuid)
}

/// Whether this process may look for the images that hold extents of the filesystem that a path is or will be on.
pub fn may_find_holders(path: &Path) -> bool {
    // Only root may ask btrfs who holds an extent.
    filesystem_at(path).is_some_and(|(_, info)| match info.kind {
        FilesystemKind::Btrfs { .. } => rustix::process::geteuid().is_root(),
        FilesystemKind::Xfs { .. } => true,
    })
}

/// An image that holds extents.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HoldingImage {
    /// How many of those that are looked for.
    pub extents: usize,
    /// Its path.
    pub path: PathBuf,
}

/// The images that hold extents at these addresses: of the subvolume that a path is or will be in, or of its
/// XFS. None where the filesystem cannot tell, or the user stops it.
pub fn images_holding(path: &Path, addresses: Vec<u64>, monitor: &dyn Monitor) -> Option<Vec<HoldingImage>> {
    let (folder, info) = filesystem_at(path)?;
    match info.kind {
        FilesystemKind::Btrfs { .. } => btrfs::images_holding(path, &folder, &addresses),
        FilesystemKind::Xfs { .. } => xfs::images_holding(path, addresses, monitor),
    }
}

/// What exists of the way to a path, and its filesystem.
fn filesystem_at(path: &Path) -> Option<(File, FsInfo)> {
    let folder = File::open(existing(path)).ok()?;
    let info = fs_info(&folder).ok()?;
    Some((folder, info))
}

/// What exists of the way to a folder.
pub fn existing(to: &Path) -> &Path {
    // A path without folders lies in the current one.
    let exists = to
        .ancestors()
        .find(|folder| !folder.as_os_str().is_empty() && folder.exists());
    exists.unwrap_or(Path::new("."))
}

/// Checks that all that was named lies on one filesystem that vmfold can work on.
fn same_filesystem(named: &[NamedPath]) -> Result<(FsInfo, &NamedPath)> {
    let mut first: Option<(&NamedPath, FsInfo)> = None;
    for one in named {
        let path = &one.path;
        let info = match fs_info(&one.folder) {
            Ok(FsInfo {
                kind: FilesystemKind::Xfs { reflinks: false, .. },
                ..
            }) => return Err(Error::NoReflinks { path: path.clone() }),
            Ok(info) => info,
            Err(Errno::NOTTY | Errno::INVAL | Errno::OPNOTSUPP) => {
                let magic = rustix::fs::fstatfs(&one.folder)
                    .map_err(Error::io("look at", path))?
                    .f_type;
                return Err(Error::NoSharing {
                    path: path.clone(),
                    filesystem: name_of_magic(magic),
                });
            }
            Err(errno) => return Err(Error::io("look at the filesystem of", path)(errno)),
        };
        if info.block_bytes != 4096 {
            return Err(Error::SectorSize {
                path: path.clone(),
                block_bytes: info.block_bytes,
            });
        }
        match first {
            Some((other, known)) if known != info => {
                return Err(Error::TwoFilesystems {
                    first: other.path.clone(),
                    second: path.clone(),
                });
            }
            Some(_) => {}
            None => first = Some((one, info)),
        }
    }
    first
        .map(|(named, info)| (info, named))
        .ok_or_else(|| Error::Usage("name at least one path".into()))
}

/// Names of filesystems by their magic number (linux/magic.h), for messages.
fn name_of_magic(magic: i64) -> String {
    match magic {
        0xef53 => "ext4".into(),
        0x0102_1994 => "tmpfs".into(),
        0x2fc1_2fc1 => "ZFS".into(),
        0x6969 => "NFS".into(),
        0x794c_7630 => "overlayfs".into(),
        0xca45_1a4e => "bcachefs".into(),
        other => format!("a filesystem with magic number {other:#x}"),
    }
}
