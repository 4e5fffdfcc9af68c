//! What a file has beside its content: mode, owner, times, extended attributes.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Gid, Mode, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::Errno;

use crate::archive::manifest::Metadata;
use crate::error::{Error, Result};

/// Bytes of an extended attribute, and of a list of their names, that the kernel hands out at most (`XATTR_SIZE_MAX`).
const XATTR_BYTES_MAX: usize = 64 << 10;
/// What the filesystem itself made of a file and would refuse elsewhere.
const XATTRS_LEFT_OUT: [&[u8]; 2] = [b"btrfs.", b"system."];

/// Reads them.
///
/// # Errors
/// Those of the system calls.
pub fn read(path: &Path) -> Result<Metadata> {
    let metadata = path.symlink_metadata().map_err(Error::io("look at", path))?;
    let name = |found: std::result::Result<Option<String>, nix::Error>| found.ok().flatten().unwrap_or_default();
    Ok(Metadata {
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        user: name(nix::unistd::User::from_uid(metadata.uid().into()).map(|user| user.map(|user| user.name))),
        group: name(nix::unistd::Group::from_gid(metadata.gid().into()).map(|group| group.map(|group| group.name))),
        mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap_or(0)),
        xattrs: xattrs(path)?,
    })
}

fn xattrs(path: &Path) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut names = vec![0u8; XATTR_BYTES_MAX];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(Errno::OPNOTSUPP) => 0,
        Err(errno) => return Err(Error::io("list the attributes of", path)(errno)),
    };
    let mut found = Vec::new();
    let mut value = vec![0u8; XATTR_BYTES_MAX];
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        if XATTRS_LEFT_OUT.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => found.push((name.to_vec(), value[..length].to_vec())),
            Err(Errno::NODATA) => {}
            Err(errno) => return Err(Error::io("read an attribute of", path)(errno)),
        }
    }
    found.sort();
    Ok(found)
}

/// Sets them on an open file or folder: owner by name where that is known here, else by number; mode; attributes; times last.
/// Returns what could not be set, in words.
///
/// # Errors
/// If mode or times cannot be set.
pub fn apply(file: &File, path: &Path, metadata: &Metadata, numeric_owner: bool) -> Result<Vec<String>> {
    let mut problems = Vec::new();
    let by_name = |name: &str| !numeric_owner && !name.is_empty();
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
        problems.push(format!("owner: {errno}"));
    }
    for (name, value) in &metadata.xattrs {
        let set = CString::new(name.clone())
            .map_err(|_| Errno::INVAL)
            .and_then(|name| rustix::fs::fsetxattr(file, name.as_c_str(), value, XattrFlags::empty()));
        if let Err(errno) = set {
            problems.push(format!("attribute {}: {errno}", String::from_utf8_lossy(name)));
        }
    }
    rustix::fs::fchmod(file, Mode::from_raw_mode(metadata.mode & 0o7777))
        .map_err(Error::io("set the mode of", path))?;
    let time = Timespec {
        tv_sec: metadata.mtime.0,
        tv_nsec: metadata.mtime.1.into(),
    };
    let times = Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::futimens(file, &times).map_err(Error::io("set the time of", path))?;
    Ok(problems)
}
