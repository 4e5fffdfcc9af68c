//! Locks a filesystem against other runs of vmfold: opening an image would break the lease that another run has on it.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::geteuid;

use crate::error::{Error, Result};
use crate::fs::Purpose;
use crate::own_folder::own_folder;

/// Locks a filesystem for as long as the returned file is open. `path` is a path on it, for messages.
///
/// # Errors
/// Returns [`Error::Busy`] if another vmfold works on the filesystem, [`Error::NotOurs`] if others could tamper with the lock, and
/// [`Error::Io`] if a system call fails.
pub(super) fn lock_filesystem(uuid: [u8; 16], purpose: Purpose, path: &Path) -> Result<File> {
    let locks = folder_for_locks();
    let folder = own_folder(&locks)?;
    let name = crate::shown::hex(&uuid);
    let lock = locks.join(&name);
    let flags = OFlags::CREATE | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR)
        .map_err(Error::io("open the lock", &lock))?;
    let file = File::from(file);
    let locked = match purpose {
        Purpose::Look | Purpose::Read => file.try_lock_shared(),
        Purpose::Plan | Purpose::Change => file.try_lock(),
    };
    match locked {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Busy { path: path.to_owned() }),
        Err(TryLockError::Error(error)) => Err(Error::io("lock", &lock)(error)),
    }
}

/// Returns the folder of the locks, which is emptied at the next boot. Each user has one: runs of different users notice each other only by
/// their leases.
fn folder_for_locks() -> PathBuf {
    let user = geteuid();
    let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|folder| !user.is_root() && !folder.is_empty());
    match own {
        Some(folder) => Path::new(&folder).join("vmfold"),
        None if user.is_root() => "/run/vmfold".into(),
        None => std::env::temp_dir().join(format!("vmfold-{}", user.as_raw())),
    }
}
