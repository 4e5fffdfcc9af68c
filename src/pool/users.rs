//! Finds out who uses an image, as far as the host tells, for messages. Only a lease proves that nobody does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::mounts::{Mount, mounts, unescape};
use crate::shown::shown;
use crate::sys::byte_locks::is_locked;
use crate::sys::loop_status::file_of_loop;

/// A file, by device and inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId {
    /// The device number.
    pub device: u64,
    /// The inode number on it.
    pub inode: u64,
}

impl From<&std::fs::Metadata> for FileId {
    fn from(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }
}

impl From<&rustix::fs::Stat> for FileId {
    fn from(stat: &rustix::fs::Stat) -> Self {
        Self {
            device: stat.st_dev,
            inode: stat.st_ino,
        }
    }
}

/// Returns who uses each of some files: swapping, loop devices and their mounts, processes that have the file open or mapped.
pub fn users_of(files: &BTreeSet<FileId>) -> BTreeMap<FileId, Vec<String>> {
    let mut found: BTreeMap<FileId, Vec<String>> = BTreeMap::new();
    if files.is_empty() {
        return found;
    }
    let mut add = |file: FileId, user: String| {
        if files.contains(&file) {
            found.entry(file).or_default().push(user);
        }
    };
    for path in swap_files() {
        if let Ok(metadata) = path.metadata() {
            add((&metadata).into(), "used for swapping".into());
        }
    }
    let mounts = mounts();
    for (device, file) in loop_devices() {
        let mounted = mounted_on(&mounts, &device);
        let mounted = mounted.map(|folder| format!(", mounted on {}", shown(folder)));
        add(
            file,
            format!("{} has it{}", shown(&device), mounted.unwrap_or_default()),
        );
    }
    for (process, name) in processes() {
        let files: BTreeSet<FileId> = ["fd", "map_files"]
            .iter()
            .flat_map(|folder| entries(&process.join(folder)))
            .filter_map(|link| link.metadata().ok().map(|metadata| FileId::from(&metadata)))
            .collect();
        for file in files {
            add(file, format!("open in {name}"));
        }
    }
    found
}

/// Returns whose byte-range locks are on an open file. QEMU locks bytes 100 to 299 of its images (`block/file-posix.c`), and libvirt's lock
/// daemon byte 0.
pub fn locked_by(file: impl AsFd) -> Option<&'static str> {
    if is_locked(&file, 100, 200) {
        Some("locked as QEMU does")
    } else if is_locked(&file, 0, 1) {
        Some("locked as libvirt does")
    } else {
        None
    }
}

/// Returns how many times this process has a file open.
pub fn times_open_here(file: FileId) -> usize {
    entries(Path::new("/proc/self/fd"))
        .filter(|link| link.metadata().is_ok_and(|metadata| FileId::from(&metadata) == file))
        .count()
}

/// Returns the paths in a folder; none if it cannot be read.
fn entries(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
}

/// Returns the swap files. The kernel escapes spaces in their names as `\040`.
fn swap_files() -> Vec<PathBuf> {
    let swaps = std::fs::read("/proc/swaps").unwrap_or_default();
    let lines = swaps.split(|byte| *byte == b'\n').skip(1);
    let names = lines.filter_map(|line| line.split(u8::is_ascii_whitespace).next());
    names.filter(|name| !name.is_empty()).map(unescape).collect()
}

/// Returns the loop devices that have a backing file, with that file.
fn loop_devices() -> Vec<(PathBuf, FileId)> {
    let devices = entries(Path::new("/sys/block")).filter(|path| path.join("loop/backing_file").exists());
    devices
        .filter_map(|path| {
            let device = Path::new("/dev").join(path.file_name()?);
            let (on, inode) = file_of_loop(File::open(&device).ok()?).ok()?;
            Some((device, FileId { device: on, inode }))
        })
        .collect()
}

/// Returns where a device, or a partition of it, is mounted.
fn mounted_on<'a>(mounts: &'a [Mount], device: &Path) -> Option<&'a Path> {
    let is_it = |mount: &&Mount| {
        let (Some(source), Some(device)) = (mount.source.to_str(), device.to_str()) else {
            return false;
        };
        source
            .strip_prefix(device)
            .is_some_and(|partition| partition.is_empty() || partition.starts_with('p'))
    };
    mounts.iter().find(is_it).map(|mount| mount.folder.as_path())
}

/// Returns the folders of all other processes in `/proc`, with a name and number for each.
fn processes() -> Vec<(PathBuf, String)> {
    let own = std::process::id();
    let numbers = entries(Path::new("/proc")).filter_map(|path| {
        let number = path.file_name()?.to_str()?.parse::<u32>().ok()?;
        (number != own).then_some((path, number))
    });
    numbers
        .map(|(path, number)| {
            let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
            let name = format!("{} ({number})", shown(Path::new(name.trim_end())));
            (path, name)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_another_process_has_open_is_found() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let id = FileId::from(&file.as_file().metadata().unwrap());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .stdin(File::open(file.path()).unwrap())
            .spawn()
            .unwrap();
        let found = users_of(&[id].into());
        child.kill().unwrap();
        let number = child.id();
        child.wait().unwrap();
        // The name may still be that of the process before it executed the program.
        let number = format!("({number})");
        assert!(found[&id].iter().any(|user| user.ends_with(&number)), "{found:?}");
        // Children of other tests may have the file open for a moment; this child has ended.
        let after = users_of(&[id].into());
        assert!(
            !after.values().flatten().any(|user| user.ends_with(&number)),
            "{after:?}"
        );
    }

    #[test]
    fn mounts_are_told_from_devices_with_longer_names() {
        let mount = |folder: &str, source: &str| Mount {
            root: "/".into(),
            kind: "ext4".into(),
            folder: folder.into(),
            source: source.into(),
        };
        let mounts = [mount("/mnt/one", "/dev/loop11"), mount("/mnt/two", "/dev/loop1p3")];
        assert_eq!(
            mounted_on(&mounts, Path::new("/dev/loop1")),
            Some(Path::new("/mnt/two"))
        );
        assert_eq!(
            mounted_on(&mounts, Path::new("/dev/loop11")),
            Some(Path::new("/mnt/one"))
        );
        assert_eq!(mounted_on(&mounts, Path::new("/dev/loop2")), None);
    }

    #[test]
    fn no_locks_on_a_file_of_ours() {
        assert_eq!(locked_by(tempfile::tempfile().unwrap()), None);
    }
}
