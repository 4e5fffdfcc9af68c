//! Finds out which filesystem paths lie on. This is the only file that matches on the kind of filesystem.

use std::fs::File;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use super::{Filesystem, Plain, Purpose, btrfs, xfs};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::sys::existing::existing;
use crate::sys::fs_info::{FilesystemKind, FsInfo, fs_info};

/// Opens the images of a pool, and returns which of them are left alone. Dirty data of the filesystem is on disk afterwards. What is only read
/// as a whole may lie on any filesystem.
///
/// # Errors
/// Otherwise it returns [`Error::NoSharing`] on a filesystem other than btrfs and XFS, [`Error::NoReflinks`] on an XFS without reflinks,
/// [`Error::SectorSize`] if blocks are not 4 KiB, [`Error::NotRoot`] on btrfs without root, [`Error::TwoFilesystems`] if paths lie on two,
/// and the errors of opening.
pub fn open(
    found: &[FoundImage],
    named: &[NamedPath],
    purpose: Purpose,
    monitor: &dyn Monitor,
) -> Result<(Box<dyn Filesystem>, Vec<Skipped>)> {
    if purpose == Purpose::Read && are_on_plain(named)? {
        let (fs, skipped) = Plain::open(found, named, purpose)?;
        return Ok((Box::new(fs), skipped));
    }
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

/// Returns the UUID of the filesystem that a path is or will be on; `None` if that is neither btrfs nor XFS.
pub fn uuid_at(path: &Path) -> Option<[u8; 16]> {
    filesystem_at(path).map(|(_, info)| info.uuid)
}

/// Whether the filesystem that a file lies on compresses what is written to a file that says so.
pub fn compresses_files(file: &File) -> bool {
    fs_info(file).is_ok_and(|info| matches!(info.kind, FilesystemKind::Btrfs { .. }))
}

/// Whether this process may look for the images that hold extents of the filesystem that a path is or will be on.
pub fn may_find_holders(path: &Path) -> bool {
    // btrfs tells only root which files hold an extent.
    filesystem_at(path).is_some_and(|(_, info)| match info.kind {
        FilesystemKind::Btrfs { .. } => rustix::process::geteuid().is_root(),
        FilesystemKind::Xfs { .. } => true,
    })
}

/// An image that holds extents.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct HoldingImage {
    /// The number of the extents asked for that it holds.
    pub extents: usize,
    /// Its path.
    pub path: PathBuf,
}

/// Returns the images that hold extents at these addresses: images of the subvolume that a path is or will be in, or of its XFS. It is
/// `None` if the filesystem cannot tell, or if the user stops the search.
pub fn images_holding(path: &Path, addresses: Vec<u64>, monitor: &dyn Monitor) -> Option<Vec<HoldingImage>> {
    let (folder, info) = filesystem_at(path)?;
    match info.kind {
        FilesystemKind::Btrfs { .. } => btrfs::images_holding(path, &folder, &addresses),
        FilesystemKind::Xfs { .. } => xfs::images_holding(path, addresses, monitor),
    }
}

/// Opens the nearest existing ancestor of a path, and identifies its filesystem.
fn filesystem_at(path: &Path) -> Option<(File, FsInfo)> {
    let folder = File::open(existing(path)).ok()?;
    let info = fs_info(&folder).ok()?;
    Some((folder, info))
}

/// Whether the named paths lie on a filesystem that cannot share extents, as far as vmfold knows.
///
/// # Errors
/// Returns [`Error::TwoFilesystems`] if they lie on several filesystems and one of them is such.
fn are_on_plain(named: &[NamedPath]) -> Result<bool> {
    let mut devices = Vec::with_capacity(named.len());
    let mut some_plain = false;
    for one in named {
        let stat = rustix::fs::fstat(&one.folder).map_err(Error::io("look at", &one.path))?;
        devices.push(stat.st_dev);
        some_plain |= match fs_info(&one.folder) {
            Ok(info) => matches!(info.kind, FilesystemKind::Xfs { reflinks: false, .. }),
            Err(errno) => IS_NEITHER.contains(&errno),
        };
    }
    let other = devices.iter().position(|device| *device != devices[0]);
    match other.filter(|_| some_plain) {
        Some(other) => Err(Error::TwoFilesystems {
            first: named[0].path.clone(),
            second: named[other].path.clone(),
        }),
        None => Ok(some_plain),
    }
}

/// The errors by which [`fs_info`] says that a filesystem is neither btrfs nor XFS.
const IS_NEITHER: [Errno; 3] = [Errno::NOTTY, Errno::INVAL, Errno::OPNOTSUPP];

/// Checks that all named paths lie on one filesystem that vmfold can work on.
fn same_filesystem(named: &[NamedPath]) -> Result<(FsInfo, &NamedPath)> {
    let mut first: Option<(&NamedPath, FsInfo)> = None;
    for named_path in named {
        let path = &named_path.path;
        let info = match fs_info(&named_path.folder) {
            Ok(FsInfo {
                kind: FilesystemKind::Xfs { reflinks: false, .. },
                ..
            }) => return Err(Error::NoReflinks { path: path.clone() }),
            Ok(info) => info,
            Err(errno) if IS_NEITHER.contains(&errno) => {
                let magic = rustix::fs::fstatfs(&named_path.folder)
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
            Some((first_path, first_info)) if first_info != info => {
                return Err(Error::TwoFilesystems {
                    first: first_path.path.clone(),
                    second: path.clone(),
                });
            }
            Some(_) => {}
            None => first = Some((named_path, info)),
        }
    }
    first
        .map(|(named, info)| (info, named))
        .ok_or_else(|| Error::Usage("name at least one path".into()))
}

/// Returns the name of a filesystem by its magic number (linux/magic.h), for messages.
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
