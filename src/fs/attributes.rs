//! The metadata of a file: mode, owner, times, extended attributes.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Gid, IFlags, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use super::acl;
use crate::content::{FileTime, Metadata, NODATACOW};
use crate::error::{Error, Result};
use crate::shown::shown;
use crate::sys::inode_flags::{add_inode_flags, inode_flags};

/// The largest extended attribute, and the longest list of their names, that the kernel returns (`XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;
/// Prefixes of attributes that the filesystem maintains itself, and that another one would refuse.
const XATTRS_LEFT_OUT: [&[u8]; 2] = [b"btrfs.", b"system."];
/// The set-user-ID, set-group-ID and sticky bits. By them, whoever writes an archive could make a program run as another user.
const SPECIAL_MODE: u32 = 0o7000;

/// Which metadata of a file in an archive is restored, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttributePolicy {
    /// Restore owners by number even if their names exist on this host.
    pub numeric_owner: bool,
    /// Restore the special mode bits, and attributes that give privileges or are for root.
    pub preserve_special: bool,
}

/// Metadata of a file that was not restored, in words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NotRestored {
    /// Metadata that could not be restored, with the reason.
    pub problems: Vec<String>,
    /// Metadata that the policy leaves out.
    pub left_out: Vec<String>,
}

/// Reads the metadata of an open file or folder; `path` is for messages.
///
/// # Errors
/// Returns [`Error::Io`] if a system call fails.
pub fn read(file: impl AsFd, path: &Path) -> Result<Metadata> {
    let stat = rustix::fs::fstat(&file).map_err(Error::io("look at", path))?;
    let name = |found: std::result::Result<Option<String>, nix::Error>| found.ok().flatten().unwrap_or_default();
    Ok(Metadata {
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        user: name(nix::unistd::User::from_uid(stat.st_uid.into()).map(|user| user.map(|user| user.name))),
        group: name(nix::unistd::Group::from_gid(stat.st_gid.into()).map(|group| group.map(|group| group.name))),
        mtime: FileTime {
            seconds: stat.st_mtime,
            nanoseconds: u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
        },
        xattrs: xattrs(&file, path)?,
    })
}

fn xattrs(file: impl AsFd, path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0u8; XATTR_BYTES_MAX];
    let length = match rustix::fs::flistxattr(&file, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(Error::io("list the attributes of", path)(errno)),
    };
    let mut found = Vec::new();
    if inode_flags(&file).is_ok_and(|flags| flags.contains(IFlags::NOCOW)) {
        found.push((NODATACOW.to_vec(), Vec::new()));
    }
    let mut value = vec![0u8; XATTR_BYTES_MAX];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let is_acl = name == acl::ACCESS || name == acl::DEFAULT;
        if !is_acl && XATTRS_LEFT_OUT.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        match rustix::fs::fgetxattr(&file, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => found.push((name.to_vec(), value[..length].to_vec())),
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(Error::io("read an attribute of", path)(errno)),
        }
    }
    found.sort();
    Ok(found)
}

/// Sets what must be set before a file has data. Returns what could not be set, with the reason.
pub fn prepare(file: &File, metadata: &Metadata) -> Option<String> {
    if !metadata.is_nodatacow() {
        return None;
    }
    let set = add_inode_flags(file, IFlags::NOCOW);
    set.err().map(|errno| format!("nodatacow: {errno}"))
}

/// Sets the rest of the metadata on an open file or folder: the owner, by name if that exists on this host and else by number; attributes;
/// mode and access control list; times last. At no moment does anyone have more permissions than in the end. Returns what was not set.
///
/// # Errors
/// Returns [`Error::Io`] if the mode or the times cannot be set.
pub fn apply(file: &File, path: &Path, metadata: &Metadata, policy: AttributePolicy) -> Result<NotRestored> {
    let mut not_restored = NotRestored::default();
    let by_name = |name: &str| !policy.numeric_owner && !name.is_empty();
    let uid = by_name(&metadata.user)
        .then(|| nix::unistd::User::from_name(&metadata.user).ok().flatten())
        .flatten()
        .map_or(metadata.uid, |user| user.uid.as_raw());
    let gid = by_name(&metadata.group)
        .then(|| nix::unistd::Group::from_name(&metadata.group).ok().flatten())
        .flatten()
        .map_or(metadata.gid, |group| group.gid.as_raw());
    // For `fchown`, all bits set means "leave it", which no archive may ask for.
    let owner = |id: u32| (id != u32::MAX).then_some(id);
    if let Err(errno) = rustix::fs::fchown(file, owner(uid).map(Uid::from_raw), owner(gid).map(Gid::from_raw)) {
        not_restored.problems.push(format!("owner: {errno}"));
    }
    let stat = rustix::fs::fstat(file).map_err(Error::io("look at", path))?;
    let has_ids = (stat.st_uid == uid, stat.st_gid == gid);
    for (name, value) in metadata.xattrs.iter().filter(|(name, _)| name.as_slice() != NODATACOW) {
        if name == acl::ACCESS || name == acl::DEFAULT {
            continue;
        }
        match may_restore(name, policy) {
            Some(true) => set_xattr(file, name, value, &mut not_restored),
            Some(false) => not_restored.left_out.push(named(name)),
            None => {}
        }
    }
    set_mode(file, path, metadata, policy, has_ids, &mut not_restored)?;
    let time = Timespec {
        tv_sec: metadata.mtime.seconds,
        tv_nsec: metadata.mtime.nanoseconds.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::futimens(file, &times).map_err(Error::io("set the time of", path))?;
    Ok(not_restored)
}

/// Whether an extended attribute is restored. It is `None` if it is left out without a word: a label of `SELinux` follows the policy of its
/// host, and this host's policy labels the file anew.
fn may_restore(name: &[u8], policy: AttributePolicy) -> Option<bool> {
    let special = name.starts_with(b"security.") || name.starts_with(b"trusted.");
    if name.starts_with(b"user.") || (policy.preserve_special && special) {
        return Some(true);
    }
    (name != b"security.selinux").then_some(false)
}

fn named(name: &[u8]) -> String {
    format!("attribute {}", shown(Path::new(OsStr::from_bytes(name))))
}

fn set_xattr(file: &File, name: &[u8], value: &[u8], not_restored: &mut NotRestored) {
    let set = CString::new(name)
        .map_err(|_| Errno::INVAL)
        .and_then(|name| rustix::fs::fsetxattr(file, name.as_c_str(), value, XattrFlags::empty()));
    if let Err(errno) = set {
        not_restored.problems.push(format!("{}: {errno}", named(name)));
    }
}

/// Sets the mode and the access control lists. At no moment does the group have permissions that only others on the list have.
fn set_mode(
    file: &File,
    path: &Path,
    metadata: &Metadata,
    policy: AttributePolicy,
    (has_uid, has_gid): (bool, bool),
    not_restored: &mut NotRestored,
) -> Result<()> {
    let access_list = list_of(metadata, acl::ACCESS);
    let set =
        |mode: u32| rustix::fs::fchmod(file, Mode::from_raw_mode(mode)).map_err(Error::io("set the mode of", path));
    let special = metadata.mode & SPECIAL_MODE;
    let mut mode = metadata.mode & 0o777;
    if policy.preserve_special && has_uid && has_gid {
        mode |= special;
    } else if policy.preserve_special && special != 0 {
        not_restored
            .problems
            .push(format!("mode bits {special:o}: it has another owner"));
    } else if special != 0 {
        not_restored.left_out.push(format!("mode bits {special:o}"));
    }
    // The file may have inherited a list from its folder. Then the group bits of the mode would be that list's mask.
    match rustix::fs::fremovexattr(file, OsStr::from_bytes(acl::ACCESS)) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(errno) => not_restored.problems.push(format!("{}: {errno}", named(acl::ACCESS))),
    }
    let others = mode & 0o007;
    let group = |permissions: u32| (mode & !0o070) | (mode & 0o070 & (permissions << 3));
    if !has_gid {
        // The file has another group than in the archive. It gets the permissions of others.
        set(group(others))?;
        if group(others) != mode {
            not_restored
                .problems
                .push("what its group may do: it has another group".into());
        }
        if access_list.is_some() {
            not_restored
                .problems
                .push(format!("{}: it has another group", named(acl::ACCESS)));
        }
        return Ok(());
    }
    match access_list {
        None => set(mode)?,
        Some(value) => {
            set(group(acl::group_permissions(value).unwrap_or(others)))?;
            let before = not_restored.problems.len();
            set_list(file, acl::ACCESS, value, not_restored);
            if not_restored.problems.len() == before && mode & SPECIAL_MODE != 0 {
                // Setting a list changes the mode's permission bits, and may clear special bits.
                let stat = rustix::fs::fstat(file).map_err(Error::io("look at", path))?;
                set((stat.st_mode & 0o777) | (mode & SPECIAL_MODE))?;
            }
        }
    }
    if let Some(value) = list_of(metadata, acl::DEFAULT) {
        set_list(file, acl::DEFAULT, value, not_restored);
    }
    Ok(())
}

/// Returns the access control list of this name, if there is one.
fn list_of<'a>(metadata: &'a Metadata, wanted: &[u8]) -> Option<&'a [u8]> {
    let mut lists = metadata.xattrs.iter().filter(|(name, _)| name == wanted);
    lists.next().map(|(_, value)| value.as_slice())
}

/// Sets an access control list if it is valid.
fn set_list(file: &File, name: &[u8], value: &[u8], not_restored: &mut NotRestored) {
    match acl::group_permissions(value) {
        Some(_) => set_xattr(file, name, value, not_restored),
        None => not_restored.problems.push(format!("{}: it is malformed", named(name))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAREFUL: AttributePolicy = AttributePolicy {
        numeric_owner: true,
        preserve_special: false,
    };

    fn own(mode: u32, xattrs: &[(&[u8], &[u8])]) -> Metadata {
        Metadata {
            mode,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            xattrs: xattrs
                .iter()
                .map(|(name, value)| (name.to_vec(), value.to_vec()))
                .collect(),
            ..Metadata::default()
        }
    }

    fn applied(metadata: &Metadata) -> (u32, NotRestored) {
        let file = tempfile::tempfile().unwrap();
        let not_restored = apply(&file, Path::new("a"), metadata, CAREFUL).unwrap();
        (rustix::fs::fstat(&file).unwrap().st_mode & 0o7777, not_restored)
    }

    #[test]
    fn a_malformed_access_list_gives_the_group_nothing() {
        for value in [&b""[..], b"\x02\0\0\0", &[0xff; 44]] {
            let (mode, not_restored) = applied(&own(0o664, &[(acl::ACCESS, value)]));
            assert_eq!(mode, 0o644);
            assert!(not_restored.problems[0].contains("malformed"), "{not_restored:?}");
        }
    }

    #[test]
    fn a_group_that_cannot_be_restored_gives_no_other_one_anything() {
        let strange = Metadata {
            gid: u32::MAX,
            ..own(0o2670, &[])
        };
        let (mode, not_restored) = applied(&strange);
        assert_eq!(mode, 0o600);
        assert!(
            not_restored
                .problems
                .iter()
                .any(|problem| problem.contains("another group")),
            "{not_restored:?}"
        );
    }

    #[test]
    fn what_is_left_out_is_said_on_one_line() {
        let (mode, not_restored) = applied(&own(
            0o6711,
            &[(b"trusted.\x1b[31m\n", b"x"), (b"security.selinux", b"x")],
        ));
        assert_eq!(mode, 0o711);
        assert_eq!(
            not_restored.left_out,
            ["attribute trusted.\\u{1b}[31m\\n", "mode bits 6000"]
        );
    }
}
