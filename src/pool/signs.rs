//! Finds files that show that a machine runs, or ran when its host stopped.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::naming::{FileKind, kind_of, machine_of, volume_of};
use super::{Skip, qubes};

/// The folder where Qubes OS 4.3 notes the volumes in use (qubes-core-admin, `qubes/storage/__init__.py`).
const QUBES_STATE: &str = "/run/qubes";

/// The signs that were found so far: each folder is read once.
#[derive(Debug, Default)]
pub(super) struct Signs {
    folders: BTreeMap<PathBuf, Vec<PathBuf>>,
    running: Option<Vec<Running>>,
}

/// A volume that Qubes OS has noted to be in use.
#[derive(Debug)]
struct Running {
    /// Its name, as [`state_of`] returns it.
    volume: Vec<u8>,
    /// The folder of its pool; `None` if that is unknown.
    pool: Option<PathBuf>,
    /// The state file.
    file: PathBuf,
}

impl Signs {
    /// Notes the signs among the names in a folder that was read, so that the folder is not read again.
    pub(super) fn note(&mut self, folder: &Path, names: &[OsString]) {
        self.folders.insert(folder.to_owned(), signs_among(folder, names));
    }

    /// Returns the file that shows that an image's machine runs or is being imported, if there is one.
    pub(super) fn of(&mut self, image: &Path) -> Option<(Skip, PathBuf)> {
        let folder = image.parent()?;
        let files = self
            .folders
            .entry(folder.to_owned())
            .or_insert_with(|| signs_in(folder));
        // The folder of a Qubes machine holds only its volumes. Any other folder may hold images of many machines.
        let is_machine = machine_of(image) == folder;
        let sign = files
            .iter()
            .find(|sign| is_machine || volume_of(sign) == volume_of(image));
        if let Some(sign) = sign {
            let skip = match kind_of(sign) {
                FileKind::Import => Skip::ImportInProgress,
                _ => Skip::Dirty,
            };
            return Some((skip, sign.clone()));
        }
        let (pool, state) = state_of(image)?;
        let running = self
            .running
            .get_or_insert_with(|| running_volumes(Path::new(QUBES_STATE), &qubes::pools_of_this_machine()));
        // A volume of an unknown pool may be this image.
        let is_image =
            |running: &&Running| running.volume == state && running.pool.as_ref().is_none_or(|folder| *folder == pool);
        let found = running.iter().find(is_image);
        found.map(|running| (Skip::Running, running.file.clone()))
    }
}

/// Returns the files in a folder that are signs by their names.
fn signs_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<OsString> = entries.map(|entry| entry.file_name()).collect();
    signs_among(folder, &names)
}

fn signs_among(folder: &Path, names: &[OsString]) -> Vec<PathBuf> {
    let is_sign =
        |name: &&OsString| name.as_bytes().ends_with(b"-dirty.img") || kind_of(Path::new(name)) == FileKind::Import;
    let mut found: Vec<PathBuf> = names.iter().filter(is_sign).map(|name| folder.join(name)).collect();
    found.sort();
    found
}

/// Returns the folder of the Qubes pool that an image lies in, and the name of its volume in the names of state files:
/// `appvms/work/private` with `-` for `/` and `--` for `-`.
fn state_of(image: &Path) -> Option<(PathBuf, Vec<u8>)> {
    let machine = machine_of(image);
    if machine == image {
        return None;
    }
    let above = machine.parent()?;
    let parts = [
        above.file_name()?.as_bytes(),
        machine.file_name()?.as_bytes(),
        volume_of(image)?,
    ];
    let mut state = Vec::new();
    for (n, part) in parts.into_iter().enumerate() {
        state.extend((n > 0).then_some(b'-'));
        for byte in part {
            state.extend(std::iter::repeat_n(byte, if *byte == b'-' { 2 } else { 1 }));
        }
    }
    Some((above.parent()?.to_owned(), state))
}

/// Returns the volumes in use, which have state files `volume-running-POOL:VOLUME`. `pools` has the folders of pools by name.
fn running_volumes(folder: &Path, pools: &BTreeMap<String, PathBuf>) -> Vec<Running> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let volumes = entries.filter_map(|entry| {
        let name = entry.file_name();
        let pool_and_volume = name.as_bytes().strip_prefix(b"volume-running-")?;
        let colon = pool_and_volume.iter().position(|byte| *byte == b':')?;
        let pool = std::str::from_utf8(&pool_and_volume[..colon])
            .ok()
            .and_then(|name| pools.get(name));
        Some(Running {
            volume: pool_and_volume[colon + 1..].to_vec(),
            pool: pool.map(|folder| folder.canonicalize().unwrap_or_else(|_| folder.clone())),
            file: entry.path(),
        })
    });
    volumes.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_of_a_running_machine() {
        let pool = tempfile::tempdir().unwrap();
        let path = |name: &str| pool.path().join(name);
        for name in [
            "appvms/a/private.img",
            "appvms/a/private-dirty.img",
            "appvms/b/private.img",
            "appvms/c/root-import.img",
            "images/x.img",
            "images/y.img",
            "images/y-dirty.img",
        ] {
            std::fs::create_dir_all(path(name).parent().unwrap()).unwrap();
            std::fs::write(path(name), "").unwrap();
        }
        let mut signs = Signs::default();
        let dirty = |name| Some((Skip::Dirty, path(name)));
        assert_eq!(
            signs.of(&path("appvms/a/private.img")),
            dirty("appvms/a/private-dirty.img")
        );
        assert_eq!(
            signs.of(&path("appvms/a/root.img")),
            dirty("appvms/a/private-dirty.img")
        );
        assert_eq!(signs.of(&path("appvms/b/private.img")), None);
        assert!(matches!(
            signs.of(&path("appvms/c/private.img")),
            Some((Skip::ImportInProgress, _))
        ));
        assert_eq!(signs.of(&path("images/x.img")), None);
        assert_eq!(signs.of(&path("images/y.img")), dirty("images/y-dirty.img"));
    }

    #[test]
    fn signs_below_a_folder_that_is_not_utf_8() {
        let pool = tempfile::tempdir().unwrap();
        let machine = pool
            .path()
            .join("appvms")
            .join(std::ffi::OsStr::from_bytes(b"\xff\xfe"));
        std::fs::create_dir_all(&machine).unwrap();
        std::fs::write(machine.join("private-dirty.img"), "").unwrap();
        let found = Signs::default().of(&machine.join("private.img"));
        assert_eq!(found, Some((Skip::Dirty, machine.join("private-dirty.img"))));
    }

    #[test]
    fn state_files_of_qubes() {
        let state = |path: &str| state_of(Path::new(path));
        assert_eq!(
            state("/p/appvms/my-work/private.img.3@2026-01-01T00:00:00Z"),
            Some(("/p".into(), b"appvms-my--work-private".to_vec()))
        );
        assert_eq!(state("/images/a.img"), None);
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().canonicalize().unwrap().join(name);
        for name in [
            "run/volume-running-first:appvms-w-private",
            "run/volume-running-unknown:appvms-v-private",
            "run/qubesd.sock",
        ] {
            std::fs::create_dir_all(path("run")).unwrap();
            std::fs::write(path(name), "").unwrap();
        }
        let pools = BTreeMap::from([("first".to_owned(), path("one")), ("second".to_owned(), path("two"))]);
        let mut signs = Signs {
            running: Some(running_volumes(&path("run"), &pools)),
            ..Signs::default()
        };
        let mut runs = |name: &str| signs.of(&path(name)).is_some();
        assert!(runs("one/appvms/w/private.img") && runs("one/appvms/w/private.img.1@2026-01-01T00:00:00Z"));
        // A volume of the same name in another pool belongs to another machine.
        assert!(!runs("two/appvms/w/private.img") && !runs("one/appvms/x/private.img"));
        assert!(runs("one/appvms/v/private.img") && runs("two/appvms/v/private.img"));
    }
}
