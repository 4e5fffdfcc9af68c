//! Mounts from `/proc/self/mountinfo` (proc(5)), and filesystems that are named by device or UUID.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// The part of the filesystem that is mounted: `/`, or a subvolume.
    pub(super) root: PathBuf,
    /// The mount point.
    pub(super) folder: PathBuf,
    /// The type of the filesystem.
    pub(super) kind: PathBuf,
    /// The device.
    pub(super) source: PathBuf,
}

/// A folder where part of a filesystem is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedAt {
    /// The part of the filesystem that is mounted: `/`, or a subvolume.
    pub root: PathBuf,
    /// The mount point.
    pub folder: PathBuf,
}

/// Returns the mounts of a filesystem of a type. `is_it` tells it from others of that type by an open folder.
pub fn mounted_at(kind: &str, is_it: impl Fn(&File) -> bool) -> Vec<MountedAt> {
    let mut matching = mounts();
    matching
        .retain(|mount| mount.kind == Path::new(kind) && File::open(&mount.folder).is_ok_and(|folder| is_it(&folder)));
    matching
        .into_iter()
        .map(|Mount { root, folder, .. }| MountedAt { root, folder })
        .collect()
}

/// Returns all mounts in this process's mount namespace.
pub(super) fn mounts() -> Vec<Mount> {
    parse(&std::fs::read("/proc/self/mountinfo").unwrap_or_default())
}

/// Parses fields 4 and 5 of each line, and the first two after the dash.
fn parse(text: &[u8]) -> Vec<Mount> {
    let mounts = text.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ').skip(3);
        let (root, folder) = (unescape(fields.next()?), unescape(fields.next()?));
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
        let (kind, source) = (unescape(rest.next()?), unescape(rest.next()?));
        Some(Mount {
            root,
            folder,
            kind,
            source,
        })
    });
    mounts.collect()
}

/// Undoes the octal escapes of `/proc/swaps` and `/proc/self/mountinfo`. Names may be any bytes.
pub(super) fn unescape(name: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = name;
    while let Some((first, after)) = rest.split_first() {
        let octal = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Whether a folder is on a filesystem that stores files, and not on one that the kernel or a program makes up (`/proc`, `/sys`, `/run`). A
/// search does not enter the latter where they are mounted below a named folder.
pub(super) fn is_on_disk(folder: impl AsFd) -> bool {
    /// Magic numbers, from uapi/linux/magic.h and the sources of XFS, ZFS, bcachefs, exFAT and NTFS.
    const ON_DISK: [i64; 14] = [
        0x9123_683e,
        0x5846_5342,
        0xef53,
        0xf2f5_2010,
        0x2fc1_2fc1,
        0xca45_1a4e,
        0x794c_7630,
        0x6969,
        0xff53_4d42,
        0xfe53_4d42,
        0x4d44,
        0x2011_bab0,
        0x7366_746e,
        0x6573_5546,
    ];
    rustix::fs::fstatfs(folder).is_ok_and(|found| ON_DISK.contains(&found.f_type))
}

/// Returns where the filesystem of a block device or a UUID is mounted. Any other path is returned as it is. If the whole filesystem is
/// mounted somewhere, that mount counts, or else all mounts, so that no subvolume is missed.
///
/// # Errors
/// Returns [`Error::NotMounted`] if the filesystem is not mounted.
pub(super) fn folders_of(named: &Path) -> Result<Vec<PathBuf>> {
    use std::os::unix::fs::FileTypeExt;
    let device = match device_of_uuid(named) {
        Some(device) => device,
        None if named
            .metadata()
            .is_ok_and(|metadata| metadata.file_type().is_block_device()) =>
        {
            named.to_owned()
        }
        None => return Ok(vec![named.to_owned()]),
    };
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let members = members_with(&real(&device));
    let mut matching = mounts();
    matching.retain(|mount| members.contains(&real(&mount.source)));
    if let Some(whole) = matching.iter().find(|mount| mount.root == Path::new("/")) {
        return Ok(vec![whole.folder.clone()]);
    }
    if matching.is_empty() {
        return Err(Error::NotMounted { path: named.to_owned() });
    }
    Ok(matching.into_iter().map(|mount| mount.folder).collect())
}

/// Returns the device with a UUID, which is given as `UUID=…` or alone.
fn device_of_uuid(named: &Path) -> Option<PathBuf> {
    let name = named.to_str()?;
    let uuid = name.strip_prefix("UUID=").unwrap_or(name);
    let is_uuid = uuid.len() == 36 && uuid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    if !is_uuid || (uuid == name && named.exists()) {
        return None;
    }
    let uuid = uuid.to_ascii_lowercase();
    let by_uuid = Path::new("/dev/disk/by-uuid").join(&uuid);
    if by_uuid.exists() {
        return Some(by_uuid);
    }
    // On a host without those links, btrfs itself lists its devices.
    let devices = std::fs::read_dir(Path::new("/sys/fs/btrfs").join(&uuid).join("devices"));
    let first = devices.ok().and_then(|mut devices| devices.next()?.ok());
    Some(first.map_or(by_uuid, |device| Path::new("/dev").join(device.file_name())))
}

/// Returns all devices of the btrfs that a device belongs to, or else the device alone.
fn members_with(device: &Path) -> Vec<PathBuf> {
    let Some(name) = device.file_name() else {
        return vec![device.to_owned()];
    };
    let filesystems = std::fs::read_dir("/sys/fs/btrfs").into_iter().flatten().flatten();
    let mut folders = filesystems.map(|entry| entry.path().join("devices"));
    let Some(devices) = folders.find(|devices| devices.join(name).exists()) else {
        return vec![device.to_owned()];
    };
    let devices = std::fs::read_dir(devices).into_iter().flatten().flatten();
    devices.map(|entry| Path::new("/dev").join(entry.file_name())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo() {
        let text =
            b"36 25 0:31 /@home /mnt/a\\040b rw,noatime shared:1 master:2 - btrfs /dev/loop1 rw,subvol=/@home\nshort\n\
            37 25 0:32 / /mnt/\xff - xfs /dev/\xfe rw\n";
        let name = |bytes: &[u8]| PathBuf::from(OsString::from_vec(bytes.to_vec()));
        let expected = [
            Mount {
                root: "/@home".into(),
                folder: "/mnt/a b".into(),
                kind: "btrfs".into(),
                source: "/dev/loop1".into(),
            },
            Mount {
                root: "/".into(),
                folder: name(b"/mnt/\xff"),
                kind: "xfs".into(),
                source: name(b"/dev/\xfe"),
            },
        ];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn what_the_kernel_makes_up_is_not_searched() {
        for folder in ["/proc", "/sys"] {
            assert!(!is_on_disk(File::open(folder).unwrap()));
        }
    }

    #[test]
    fn what_is_no_filesystem_stands_for_itself() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(folders_of(folder.path()).unwrap(), [folder.path()]);
        let absent = Path::new("UUID=00000000-1111-2222-3333-444444444444");
        assert!(matches!(folders_of(absent), Err(Error::NotMounted { .. })));
    }
}
