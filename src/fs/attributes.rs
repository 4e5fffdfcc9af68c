//! What a file has beside its content: mode, owner, times, extended attributes.

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

/// Bytes of an extended attribute, and of a list of their names, that the kernel hands out at most (`XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;
/// What the filesystem itself made of a file and would refuse elsewhere.
const XATTRS_LEFT_OUT: [&[u8]; 2] = [b"btrfs.", b"system."];
/// Set-user-ID, set-group-ID and sticky bit: whoever writes an archive could make a program run as another user by them.
const SPECIAL_MODE: u32 = 0o7000;

/// What of the metadata that an archive has of a file is restored, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttributePolicy {
    /// Take owners by number even where their names are known here.
    pub numeric_owner: bool,
    /// Restore special mode bits, and attributes that give privileges or are for root.
    pub preserve_special: bool,
}

/// What was not restored of a file, in words.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NotRestored {
    /// What could not be.
    pub problems: Vec<String>,
    /// What was not to be.
    pub left_out: Vec<String>,
}

/// Reads those of an open file or folder; `path` is for messages.
///
/// # Errors
/// Those of the system calls.
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

/// Sets what must be set before a file has data. Returns what could not be set, in words.
pub fn prepare(file: &File, metadata: &Metadata) -> Option<String> {
    if !metadata.is_nodatacow() {
        return None;
    }
    let set = add_inode_flags(file, IFlags::NOCOW);
    set.err().map(|errno| format!("nodatacow: {errno}"))
}

/// Sets the rest on an open file or folder: owner by name where that is known here, else by number; attributes; mode and access control
/// list; times last. At no moment may anyone do more than in the end. Returns what was not set.
///
/// # Errors
/// If mode or times cannot be set.
pub fn apply(file: &File, path: &Path, metadata: &Metadata, policy: AttributePolicy) -> Result<NotRestored> {
    let mut not = NotRestored::default();
    let by_name = |name: &str| !policy.numeric_owner && !name.is_empty();
    let uid = by_name(&metadata.user)
        .then(|| nix::unistd::User::from_name(&metadata.user).ok().flatten())
        .flatten()
        .map_or(metadata.uid, |user| user.uid.as_raw());
    let gid = by_name(&metadata.group)
        .then(|| nix::unistd::Group::from_name(&metadata.group).ok().flatten())
        .flatten()
        .map_or(metadata.gid, |group| group.gid.as_raw());
    // All bits set means "leave it", which no archive may ask for.
    let owner = |id: u32| (id != u32::MAX).then_some(id);
    if let Err(errno) = rustix::fs::fchown(file, owner(uid).map(Uid::from_raw), owner(gid).map(Gid::from_raw)) {
        not.problems.push(format!("owner: {errno}"));
    }
    let stat = rustix::fs::fstat(file).map_err(Error::io("look at", path))?;
    let owned = (stat.st_uid == uid, stat.st_gid == gid);
    for (name, value) in metadata.xattrs.iter().filter(|(name, _)| name.as_slice() != NODATACOW) {
        if name == acl::ACCESS || name == acl::DEFAULT {
            continue;
        }
        match may_restore(name, policy) {
            Some(true) => set_xattr(file, name, value, &mut not),
            Some(false) => not.left_out.push(named(name)),
            None => {}
        }
    }
    set_mode(file, path, metadata, policy, owned, &mut not)?;
    let time = Timespec {
        tv_sec: metadata.mtime.seconds,
        tv_nsec: metadata.mtime.nanoseconds.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::futimens(file, &times).map_err(Error::io("set the time of", path))?;
    Ok(not)
}

/// Whether an extended attribute is restored. None for what is left out without a word: the label of `SELinux` says who may access a file
/// by the policy of the host it was on, and the file gets one by the policy of this host.
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

fn set_xattr(file: &File, name: &[u8], value: &[u8], not: &mut NotRestored) {
    let set = CString::new(name)
        .map_err(|_| Errno::INVAL)
        .and_then(|name| rustix::fs::fsetxattr(file, name.as_c_str(), value, XattrFlags::empty()));
    if let Err(errno) = set {
        not.problems.push(format!("{}: {errno}", named(name)));
    }
}

/// Sets mode and access control lists, so that at no moment the group may do what only others on the list may.
fn set_mode(
    file: &File,
    path: &Path,
    metadata: &Metadata,
    policy: AttributePolicy,
    (by_user, by_group): (bool, bool),
    not: &mut NotRestored,
) -> Result<()> {
    let access_list = list_of(metadata, acl::ACCESS);
    let set =
        |mode: u32| rustix::fs::fchmod(file, Mode::from_raw_mode(mode)).map_err(Error::io("set the mode of", path));
    let special = metadata.mode & SPECIAL_MODE;
    let mut mode = metadata.mode & 0o777;
    if policy.preserve_special && by_user && by_group {
        mode |= special;
    } else if policy.preserve_special && special != 0 {
        not.problems
            .push(format!("mode bits {special:o}: it has another owner"));
    } else if special != 0 {
        not.left_out.push(format!("mode bits {special:o}"));
    }
    // The folder may have given it a list of its own, whose mask the group bits of the mode would be.
    match rustix::fs::fremovexattr(file, OsStr::from_bytes(acl::ACCESS)) {
        Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(errno) => not.problems.push(format!("{}: {errno}", named(acl::ACCESS))),
    }
    let others = mode & 0o007;
    let group = |permissions: u32| (mode & !0o070) | (mode & 0o070 & (permissions << 3));
    if !by_group {
        // It has another group than it had: that may do what everyone may.
        set(group(others))?;
        if group(others) != mode {
            not.problems.push("what its group may do: it has another group".into());
        }
        if access_list.is_some() {
            not.problems
                .push(format!("{}: it has another group", named(acl::ACCESS)));
        }
        return Ok(());
    }
    match access_list {
        None => set(mode)?,
        Some(value) => {
            set(group(acl::group_permissions(value).unwrap_or(others)))?;
            let before = not.problems.len();
            set_list(file, acl::ACCESS, value, not);
            if not.problems.len() == before && mode & SPECIAL_MODE != 0 {
                // A list changes the mode's bits, and may take special ones away.
                let stat = rustix::fs::fstat(file).map_err(Error::io("look at", path))?;
                set((stat.st_mode & 0o777) | (mode & SPECIAL_MODE))?;
            }
        }
    }
    if let Some(value) = list_of(metadata, acl::DEFAULT) {
        set_list(file, acl::DEFAULT, value, not);
    }
    Ok(())
}

/// The access control list of this name, if there is one.
fn list_of<'a>(metadata: &'a Metadata, wanted: &[u8]) -> Option<&'a [u8]> {
    let mut lists = metadata.xattrs.iter().filter(|(name, _)| name == wanted);
    lists.next().map(|(_, value)| value.as_slice())
}

/// Sets an access control list that makes sense.
fn set_list(file: &File, name: &[u8], value: &[u8], not: &mut NotRestored) {
    match acl::group_permissions(value) {
        Some(_) => set_xattr(file, name, value, not),
        None => not.problems.push(format!("{}: it is malformed", named(name))),
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
        let not = apply(&file, Path::new("a"), metadata, CAREFUL).unwrap();
        (rustix::fs::fstat(&file).unwrap().st_mode & 0o7777, not)
    }

    #[test]
    fn a_malformed_access_list_gives_the_group_nothing() {
        for value in [&b""[..], b"\x02\0\0\0", &[0xff; 44]] {
            let (mode, not) = applied(&own(0o664, &[(acl::ACCESS, value)]));
            assert_eq!(mode, 0o644);
            assert!(not.problems[0].contains("malformed"), "{not:?}");
        }
    }

    #[test]
    fn a_group_that_cannot_be_restored_gives_no_other_one_anything() {
        let strange = Metadata {
            gid: u32::MAX,
            ..own(0o2670, &[])
        };
        let (mode, not) = applied(&strange);
        assert_eq!(mode, 0o600);
        assert!(
            not.problems.iter().any(|problem| problem.contains("another group")),
            "{not:?}"
        );
    }

    #[test]
    fn what_is_left_out_is_said_on_one_line() {
        let (mode, not) = applied(&own(
            0o6711,
            &[(b"trusted.\x1b[31m\n", b"x"), (b"security.selinux", b"x")],
        ));
        assert_eq!(mode, 0o711);
        assert_eq!(not.left_out, ["attribute trusted.\\u{1b}[31m\\n", "mode bits 6000"]);
    }
}
