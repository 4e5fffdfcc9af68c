//! Files that tell that a machine runs, or did when its host stopped.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::Skip;
use super::naming::{Kind, kind_of, machine_of, volume_of};

/// Where Qubes OS 4.3 notes which volumes are in use (qubes-core-admin, `qubes/storage/__init__.py`).
const QUBES_STATE: &str = "/run/qubes";

/// What was looked up so far: each folder is read once.
#[derive(Debug, Default)]
pub(super) struct Signs {
    folders: BTreeMap<PathBuf, Vec<PathBuf>>,
    running: Option<Vec<(String, PathBuf)>>,
}

impl Signs {
    /// Takes note of the names in a folder that was read, so that it is not looked up again.
    pub(super) fn note(&mut self, folder: &Path, names: &[OsString]) {
        self.folders.insert(folder.to_owned(), signs_among(folder, names));
    }

    /// The file that says that an image's machine runs, or that it is being imported, if there is one.
    pub(super) fn of(&mut self, image: &Path) -> Option<(Skip, PathBuf)> {
        let folder = image.parent()?;
        let files = self
            .folders
            .entry(folder.to_owned())
            .or_insert_with(|| signs_in(folder));
        // All of a Qubes machine's volumes lie in one folder; elsewhere it may hold many machines.
        let is_machine = machine_of(image) == folder;
        let sign = files
            .iter()
            .find(|sign| is_machine || volume_of(sign) == volume_of(image));
        if let Some(sign) = sign {
            let skip = match kind_of(sign) {
                Kind::Import => Skip::ImportInProgress,
                _ => Skip::Dirty,
            };
            return Some((skip, sign.clone()));
        }
        let state = state_of(image)?;
        let running = self
            .running
            .get_or_insert_with(|| running_volumes(Path::new(QUBES_STATE)));
        let found = running.iter().find(|(volume, _)| *volume == state);
        found.map(|(_, file)| (Skip::Running, file.clone()))
    }
}

/// Files in a folder that say so by their names.
fn signs_in(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names: Vec<OsString> = entries.map(|entry| entry.file_name()).collect();
    signs_among(folder, &names)
}

fn signs_among(folder: &Path, names: &[OsString]) -> Vec<PathBuf> {
    let is_sign =
        |name: &&OsString| name.as_bytes().ends_with(b"-dirty.img") || kind_of(Path::new(name)) == Kind::Import;
    let mut found: Vec<PathBuf> = names.iter().filter(is_sign).map(|name| folder.join(name)).collect();
    found.sort();
    found
}

/// What Qubes OS calls the volume of an image in names of state files: `appvms/work/private` with `-` for `/` and `--` for `-`.
fn state_of(image: &Path) -> Option<String> {
    let machine = machine_of(image);
    if machine == image {
        return None;
    }
    let (name, above) = (machine.file_name()?, machine.parent()?.file_name()?);
    let volume = Path::new(above).join(name).join(volume_of(image)?);
    Some(volume.to_str()?.replace('-', "--").replace('/', "-"))
}

/// Volumes that are in use, by those names, with the file that says so: `volume-running-POOL:VOLUME`.
fn running_volumes(folder: &Path) -> Vec<(String, PathBuf)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let volumes = entries.filter_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let volume = name.strip_prefix("volume-running-")?.split_once(':')?.1.to_owned();
        Some((volume, entry.path()))
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
    fn state_files_of_qubes() {
        assert_eq!(
            state_of(Path::new("/p/appvms/my-work/private.img.3@2026-01-01T00:00:00Z")).as_deref(),
            Some("appvms-my--work-private")
        );
        assert_eq!(state_of(Path::new("/images/a.img")), None);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("volume-running-varlibqubes:appvms-w-private"), "").unwrap();
        std::fs::write(folder.path().join("qubesd.sock"), "").unwrap();
        let found = running_volumes(folder.path());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, "appvms-w-private");
    }
}
