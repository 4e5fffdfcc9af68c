//! Finds images, the machine that each belongs to, and the reasons to leave one alone.

mod mounts;
mod naming;
mod qubes;
mod signs;
pub mod users;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use globset::{Glob, GlobSet, GlobSetBuilder};
use rustix::fs::{FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

pub use mounts::{MountedAt, mounted_at};
pub use naming::{FileKind, Revision, kind_of, looks_like_image, machine_of, owner_of, revision_of};
pub use qubes::{qubes_folders, templates};

use crate::error::{Error, Result};
use crate::sys::beneath::{Folder, reopen};
use users::FileId;

/// An image that was found. It is not open; [`FoundImage::open`] makes sure that the same file is opened.
#[derive(Debug, Clone)]
pub struct FoundImage {
    /// Its path: the first in alphabetical order of its names below the named paths.
    pub path: PathBuf,
    /// All its names (hard links) below the named paths.
    pub names: BTreeSet<PathBuf>,
    /// Its device and inode number.
    pub id: FileId,
    /// The number of its hard links, wherever they are.
    pub links: u64,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// The machines that it belongs to, by its names: a running machine of Qubes OS has a hard link to its template's image. While one
    /// image of a machine is in use, all of them are left alone.
    pub machines: BTreeSet<PathBuf>,
    /// The group of images that it shares with, below 32.
    pub group: u8,
    /// A file that shows that one of the machines runs, or ran when its host stopped, with the reason for leaving the image alone.
    pub sign: Option<(Skip, PathBuf)>,
    /// A named folder, and the path of the image below it.
    place: (Folder, PathBuf),
}

impl FoundImage {
    /// Opens the image if its path still leads to the file that was found.
    ///
    /// # Errors
    /// Returns `ESTALE` if the path leads to another file, which is not opened since it may be a device, and otherwise the error of
    /// opening.
    pub fn open(&self, flags: OFlags) -> rustix::io::Result<File> {
        let (folder, below) = &self.place;
        let path_only = folder.open_file(below, OFlags::PATH)?;
        let stat = rustix::fs::fstat(&path_only)?;
        let is_file = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !is_file || FileId::from(&stat) != self.id {
            return Err(Errno::STALE);
        }
        reopen(&path_only, flags)
    }

    /// Whether it has names that are not below the named paths, so that it stays when all others are deleted.
    pub fn has_names_elsewhere(&self) -> bool {
        self.links > self.names.len() as u64
    }

    /// Opens the folder that the image lies in.
    ///
    /// # Errors
    /// Returns the error of opening: `ELOOP` or `ENOTDIR` if the folder was replaced by a symbolic link.
    pub fn open_folder(&self) -> rustix::io::Result<Folder> {
        let (folder, below) = &self.place;
        folder.folder(below.parent().unwrap_or(Path::new("")))
    }
}

/// A path that the user named, and its open folder.
#[derive(Debug, Clone)]
pub struct NamedPath {
    /// The path as the user named it, for messages.
    pub path: PathBuf,
    /// The path of `folder` without symbolic links.
    pub root: PathBuf,
    /// The named folder, or the folder that the named file lies in.
    pub folder: Folder,
    /// The name of a named file in `folder`, and its id; `None` if a folder was named.
    file: Option<(OsString, FileId)>,
}

impl NamedPath {
    /// Opens a named path. Symbolic links are followed.
    ///
    /// # Errors
    /// Returns [`Error::NoSuchPath`] if the path does not exist, [`Error::NotAnImage`] if it is neither a file nor a folder, and
    /// [`Error::Io`] if it cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |errno: Errno| match errno {
            Errno::NOENT => Error::NoSuchPath { path: path.to_owned() },
            errno => Error::io("look at", path)(errno),
        };
        let path_only = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(failed)?;
        let stat = rustix::fs::fstat(&path_only).map_err(failed)?;
        let full = std::fs::read_link(format!("/proc/self/fd/{}", path_only.as_raw_fd()))
            .map_err(Error::io("look at", path))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Ok(Self {
                path: path.to_owned(),
                root: full,
                folder: reopen(&path_only, OFlags::DIRECTORY)
                    .map(Folder::from)
                    .map_err(failed)?,
                file: None,
            }),
            FileType::RegularFile => {
                let root = full.parent().unwrap_or(Path::new("/")).to_owned();
                let name = full.file_name().unwrap_or_default().to_owned();
                Ok(Self {
                    path: path.to_owned(),
                    folder: Folder::open(&root).map_err(failed)?,
                    root,
                    file: Some((name, FileId::from(&stat))),
                })
            }
            _ => Err(Error::NotAnImage { path: path.to_owned() }),
        }
    }
}

/// The reason for leaving an image alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Skip {
    /// Someone has the image open: a running machine, a loop device, a backup.
    InUse,
    /// Another image of the same machine is in use.
    MachineInUse,
    /// A `-dirty.img` lies beside the image: its machine writes to that file while it runs, and leaves it behind when the host crashes.
    Dirty,
    /// Qubes OS has noted that the image's machine runs.
    Running,
    /// A restore or an import of its machine is in progress.
    ImportInProgress,
    /// The image exists only while its machine runs.
    Volatile,
    /// The file has `chattr +i` or `+a`, so that the kernel allows no change of its extents. Other images may share them.
    Immutable,
    /// The file is sealed by fs-verity. Other images may share its extents.
    Verity,
    /// The file is in use as swap space.
    SwapFile,
    /// `btrfs send` is reading its subvolume.
    BeingSent,
    /// The image lies below a read-only mount.
    ReadOnlyMount,
    /// The filesystem refused to share its extents, for an unknown reason.
    Refused,
    /// Someone opened the image during the run.
    OpenedMeanwhile,
    /// The image changed during the run.
    Changed,
    /// The image lies on another filesystem, which is mounted below the named path.
    OtherFilesystem,
    /// The image has more blocks than 32 bits can number.
    TooLarge,
    /// The image is in more pieces than an archive takes.
    TooFragmented,
    /// The image could not be opened or read.
    Unreadable,
}

impl Skip {
    /// Returns the reason in a few words.
    pub fn name(self) -> &'static str {
        match self {
            Self::InUse => "in use",
            Self::MachineInUse => "of a machine in use",
            Self::Dirty => "not shut down in order",
            Self::Running => "of a running machine",
            Self::ImportInProgress => "being imported",
            Self::Volatile => "volatile",
            Self::Immutable => "immutable",
            Self::Verity => "sealed",
            Self::SwapFile => "swapped to",
            Self::BeingSent => "being sent",
            Self::ReadOnlyMount => "not writable",
            Self::Refused => "refused by the filesystem",
            Self::OpenedMeanwhile => "opened meanwhile",
            Self::Changed => "changed meanwhile",
            Self::OtherFilesystem => "on another filesystem",
            Self::TooLarge => "too large",
            Self::TooFragmented => "too fragmented",
            Self::Unreadable => "unreadable",
        }
    }

    /// Whether an image is left alone because its machine runs, or because someone has it open.
    pub fn is_in_use(self) -> bool {
        matches!(
            self,
            Self::InUse | Self::MachineInUse | Self::Dirty | Self::Running | Self::OpenedMeanwhile
        )
    }

    /// Returns the reason as a text for the user.
    pub fn reason(self) -> &'static str {
        match self {
            Self::InUse => "in use: shut the machine down, detach the loop device, or turn swapping off",
            Self::MachineInUse => "another image of its machine is in use",
            Self::Dirty => {
                "its machine runs, or its host stopped while it did, and the newest data is in its -dirty.img"
            }
            Self::Running => "its machine runs",
            Self::ImportInProgress => "an import of its machine is in progress",
            Self::Volatile => "it exists only while its machine runs",
            Self::Immutable => "immutable or append-only, see lsattr: others may share its extents, but it keeps them",
            Self::Verity => "sealed by fs-verity: others may share its extents, but it keeps them",
            Self::SwapFile => "used for swapping",
            Self::BeingSent => "btrfs send is reading its subvolume: run again afterwards",
            Self::ReadOnlyMount => "below a mount that cannot be written",
            Self::Refused => "the filesystem refuses to share its extents",
            Self::OpenedMeanwhile => "someone opened it during the run",
            Self::Changed => "it changed during the run",
            Self::OtherFilesystem => "on another filesystem: run once for each",
            Self::TooLarge => "images of 16 TiB and more are left alone",
            Self::TooFragmented => "in more pieces than an archive takes: export it alone, or copy it first",
            Self::Unreadable => "what of it cannot be read stays as it is",
        }
    }
}

/// An image that is left alone, and the reason.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Skipped {
    /// The image.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// The reason.
    pub reason: Skip,
    /// More about the reason: who uses the image, which range cannot be read, and the like.
    pub detail: Option<String>,
}

impl Skipped {
    /// Makes the entry of an image without details.
    pub fn new(path: &Path, reason: Skip) -> Self {
        Self {
            path: path.to_owned(),
            reason,
            detail: None,
        }
    }

    /// Sets the details.
    #[must_use]
    pub fn because(self, detail: Option<String>) -> Self {
        Self { detail, ..self }
    }
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", crate::shown::shown(&self.path), self.reason.reason())?;
        self.detail.iter().try_for_each(|detail| write!(f, " ({detail})"))
    }
}

/// The images that were found below the named paths.
#[derive(Debug, Clone, Default)]
pub struct Pool {
    /// The named paths.
    pub named: Vec<NamedPath>,
    /// Images, in the order of their paths.
    pub images: Vec<FoundImage>,
    /// Images that are left alone because of their names or of files beside them.
    pub skipped: Vec<Skipped>,
    /// Folders and files that could not be read, with the error.
    pub unreadable: Vec<(PathBuf, String)>,
}

/// Returns the paths among some paths of images, existing or not, whose machines run, ran when their host stopped, or are being imported,
/// each with the file that shows it.
pub fn signs_of<'a>(images: impl IntoIterator<Item = &'a PathBuf>) -> Vec<(&'a PathBuf, PathBuf)> {
    let mut signs = signs::Signs::default();
    let found = images.into_iter().filter_map(|image| Some((image, signs.of(image)?.1)));
    found.collect()
}

/// Replaces devices and UUIDs among the named paths by the folders that their filesystems are mounted on.
///
/// # Errors
/// Returns [`Error::NotMounted`] if a filesystem is not mounted.
pub fn named_folders(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let folders: Result<Vec<_>> = paths.iter().map(|path| mounts::folders_of(path)).collect();
    Ok(folders?.concat())
}

/// Groups paths by filesystem, in the order of the first path of each. Paths that do not exist go into the first group.
pub fn by_filesystem(paths: Vec<PathBuf>) -> Vec<Vec<PathBuf>> {
    let mut groups: Vec<(Option<Vec<u8>>, Vec<PathBuf>)> = Vec::new();
    for path in paths {
        let id = filesystem_id(&path);
        match groups.iter_mut().find(|(known, _)| id.is_none() || *known == id) {
            Some((_, group)) => group.push(path),
            None => groups.push((id, vec![path])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// Returns an id of the filesystem of a path: the UUID and device number of a btrfs or XFS, or else the device number. All subvolumes of a
/// btrfs have the same id.
fn filesystem_id(path: &Path) -> Option<Vec<u8>> {
    let file = std::fs::File::open(path).ok()?;
    match crate::sys::fs_info::fs_info(&file) {
        Ok(info) => Some([&info.uuid[..], &info.device.to_le_bytes()].concat()),
        Err(_) => Some(file.metadata().ok()?.dev().to_le_bytes().to_vec()),
    }
}

/// Looks for images in files and folders. Folders are searched recursively, without following symbolic links; in them, a file counts by its
/// name. A file that is named itself always counts.
///
/// # Errors
/// Returns the errors of [`NamedPath::open`], [`Error::NoImages`] if nothing is found, [`Error::Usage`] if a pattern is invalid, and
/// [`Error::Io`] if a named file cannot be read.
pub fn discover(paths: &[PathBuf], exclude: &[String]) -> Result<Pool> {
    let mut search = Search {
        exclude: patterns(exclude)?,
        found: BTreeMap::new(),
        importing: BTreeSet::new(),
        dirty: Vec::new(),
        signs: signs::Signs::default(),
        pool: Pool::default(),
    };
    for path in paths {
        let named = NamedPath::open(path)?;
        match &named.file {
            Some((name, id)) => search.file(&named, name, *id)?,
            None => search.folder(&named),
        }
        search.pool.named.push(named);
    }
    let pool = search.end();
    if pool.images.is_empty() && pool.skipped.is_empty() {
        return Err(Error::NoImages { paths: paths.to_vec() });
    }
    Ok(pool)
}

/// A search for images, and what it has found so far.
struct Search {
    exclude: GlobSet,
    found: BTreeMap<FileId, FoundImage>,
    importing: BTreeSet<PathBuf>,
    /// The `-dirty.img` files that were found.
    dirty: Vec<DirtyImage>,
    signs: signs::Signs,
    pool: Pool,
}

/// A `-dirty.img` file, and the image that it is a newer state of.
struct DirtyImage {
    dirty: FileId,
    clean: FileId,
    /// The number of hard links of the clean image.
    clean_links: u64,
}

impl Search {
    /// Adds a named file.
    fn file(&mut self, named: &NamedPath, name: &OsStr, id: FileId) -> Result<()> {
        let stat = named.folder.stat(name).map_err(Error::io("look at", &named.path))?;
        if FileId::from(&stat) != id {
            return Err(Error::io("look at", &named.path)(Errno::STALE));
        }
        let names = named.folder.names().map_err(Error::io("look into", &named.root))?;
        self.signs.note(&named.root, &names);
        self.add(named, &named.folder, Path::new(name), &stat);
        Ok(())
    }

    /// Searches a named folder recursively. Files that are moved meanwhile may be missed or found twice; an image is identified by its
    /// inode.
    fn folder(&mut self, named: &NamedPath) {
        let mut devices = BTreeMap::new();
        // Paths are queued instead of open folders, since a tree may be deeper than the limit on open files.
        let mut folders = vec![PathBuf::new()];
        while let Some(below) = folders.pop() {
            let full = named.root.join(&below);
            let mut look = || {
                let folder = named.folder.folder(&below)?;
                // Filesystems that the kernel or programs make up, mounted below the folder, are not searched.
                let device = rustix::fs::fstat(&folder)?.st_dev;
                let is_named = below.as_os_str().is_empty();
                if !is_named && !*devices.entry(device).or_insert_with(|| mounts::is_on_disk(&folder)) {
                    return Ok(None);
                }
                devices.insert(device, true);
                Ok(Some((folder.names()?, folder)))
            };
            let (names, folder) = match look() {
                Ok(Some(found)) => found,
                Ok(None) => continue,
                Err(errno) => {
                    self.unreadable(full, errno);
                    continue;
                }
            };
            self.signs.note(&full, &names);
            let below = names.iter().map(|name| below.join(name));
            let inner: Vec<PathBuf> = below.filter_map(|below| self.entry(named, &folder, below)).collect();
            folders.extend(inner.into_iter().rev());
        }
    }

    /// Adds an entry of a folder if it is an image. Returns its path if it is a folder to search.
    fn entry(&mut self, named: &NamedPath, folder: &Folder, below: PathBuf) -> Option<PathBuf> {
        let full = named.root.join(&below);
        if self.exclude.is_match(&below) || self.exclude.is_match(&full) {
            return None;
        }
        match folder.stat(below.file_name()?) {
            Ok(stat) => match FileType::from_raw_mode(stat.st_mode) {
                FileType::Directory => return Some(below),
                FileType::RegularFile if naming::looks_like_image(&full, size_of(&stat)) => {
                    self.add(named, folder, &below, &stat);
                }
                _ => {}
            },
            // The file was removed since the folder was read.
            Err(Errno::NOENT) => {}
            Err(errno) => self.unreadable(full, errno),
        }
        None
    }

    /// Notes a file or folder that could not be read.
    fn unreadable(&mut self, path: PathBuf, errno: Errno) {
        let problem = std::io::Error::from(errno).to_string();
        self.pool.unreadable.push((path, problem));
    }

    /// Adds a file that has an image's name or was named, and that lies in `folder`.
    fn add(&mut self, named: &NamedPath, folder: &Folder, below: &Path, stat: &Stat) {
        let path = named.root.join(below);
        if let Some(clean) = path.file_name().and_then(naming::clean_of)
            && let Ok(clean) = folder.stat(&clean)
        {
            self.dirty.push(DirtyImage {
                dirty: stat.into(),
                clean: (&clean).into(),
                clean_links: clean.st_nlink,
            });
        }
        let machine = machine_of(&path);
        match kind_of(&path) {
            FileKind::Image => {
                let id = FileId::from(stat);
                let known = self.found.entry(id).or_insert_with(|| FoundImage {
                    path: path.clone(),
                    names: BTreeSet::new(),
                    id,
                    links: stat.st_nlink,
                    size: size_of(stat),
                    machines: BTreeSet::new(),
                    group: 0,
                    sign: None,
                    place: (named.folder.clone(), below.to_owned()),
                });
                known.machines.insert(machine);
                if path < known.path {
                    path.clone_into(&mut known.path);
                    known.place = (named.folder.clone(), below.to_owned());
                }
                known.names.insert(path);
            }
            FileKind::Import => {
                self.importing.insert(machine);
                self.pool.skipped.push(Skipped::new(&path, Skip::ImportInProgress));
            }
            FileKind::Volatile => self.pool.skipped.push(Skipped::new(&path, Skip::Volatile)),
            FileKind::Temporary => {}
        }
    }

    /// Ends the search: sorts the images, and notes the signs that machines run.
    fn end(mut self) -> Pool {
        let mut pool = self.pool;
        for DirtyImage {
            dirty,
            clean,
            clean_links: links,
        } in self.dirty
        {
            // A machine of Qubes OS whose root volume is its template's has a hard link to that image, and discards what it wrote itself.
            // If the template is not among the named paths, only a root volume is sure to be such a link.
            let (machines, names) = self
                .found
                .get(&clean)
                .map_or((0, 0), |clean| (clean.machines.len(), clean.names.len() as u64));
            if let Some(image) = self.found.get(&dirty)
                && (machines > 1 || (names < links && links > 1 && naming::volume_of(&image.path) == Some(b"root")))
                && image.names.iter().all(|name| machine_of(name) != *name)
            {
                pool.skipped.push(Skipped::new(&image.path, Skip::Volatile));
                self.found.remove(&dirty);
            }
        }
        for mut image in self.found.into_values() {
            let sign = image.names.iter().find_map(|name| self.signs.of(name));
            if !self.importing.is_disjoint(&image.machines) || matches!(sign, Some((Skip::ImportInProgress, _))) {
                pool.skipped.push(Skipped::new(&image.path, Skip::ImportInProgress));
            } else {
                image.sign = sign;
                pool.images.push(image);
            }
        }
        pool.images.sort_by(|a, b| a.path.cmp(&b.path));
        pool
    }
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

/// Assigns each image to the group of the first pattern that matches one of its names. Groups count from 1; images that no pattern matches
/// are in group 0.
///
/// # Errors
/// Returns [`Error::Usage`] if a pattern is invalid, or if there are more than 31.
pub fn group(images: &mut [FoundImage], groups: &[String]) -> Result<()> {
    /// The number of bits of [`crate::facts::Class::groups`], less one for group 0.
    const GROUPS_MAX: usize = 31;
    if groups.len() > GROUPS_MAX {
        return Err(Error::Usage(format!("--group can be given {GROUPS_MAX} times at most")));
    }
    for (number, pattern) in (1..).zip(groups) {
        let covering = Covering::new(pattern)?;
        for image in images.iter_mut().filter(|image| image.group == 0) {
            if image.names.iter().any(|name| covering.has(name)) {
                image.group = number;
            }
        }
    }
    Ok(())
}

/// A pattern that stands for what it matches and, where that is a folder, for all that is in it. A relative pattern such as `appvms/vault-*`
/// matches at any depth, whatever folder was named.
#[derive(Debug, Clone)]
pub struct Covering(GlobSet);

impl Covering {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// Returns [`Error::Usage`] if it is invalid.
    pub fn new(pattern: &str) -> Result<Self> {
        Ok(Self(patterns(&[pattern.to_owned(), format!("**/{pattern}")])?))
    }

    /// Whether it stands for a file.
    pub fn has(&self, path: &Path) -> bool {
        path.ancestors().any(|part| self.0.is_match(part))
    }
}

/// Compiles patterns of paths.
///
/// # Errors
/// Returns [`Error::Usage`] if a pattern is invalid.
pub fn patterns(patterns: &[String]) -> Result<GlobSet> {
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let bad = |error: globset::Error| {
            let problem = format!("`{pattern}` is no pattern: {error}");
            Error::Usage(crate::shown::shown(Path::new(&problem)).to_string())
        };
        set.add(Glob::new(pattern).map_err(bad)?);
        // A pattern without a slash matches at any depth, as with other tools.
        if !pattern.contains('/') {
            set.add(Glob::new(&format!("**/{pattern}")).map_err(bad)?);
        }
    }
    set.build()
        .map_err(|error| Error::Usage(format!("the patterns make no sense: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pool: &Pool, root: &Path) -> Vec<String> {
        pool.images
            .iter()
            .map(|image| image.path.strip_prefix(root).unwrap().display().to_string())
            .collect()
    }

    #[test]
    fn what_a_crashed_machine_throws_away_is_no_image() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        for name in [
            "vm-templates/t/root.img",
            "appvms/w/root-dirty.img",
            "appvms/w/private.img",
            "appvms/w/private-dirty.img",
            "appvms/standalone/root.img",
            "appvms/standalone/root-dirty.img",
            "appvms/no-revisions/private-dirty.img",
        ] {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "x").unwrap();
        }
        std::fs::hard_link(root.join("vm-templates/t/root.img"), root.join("appvms/w/root.img")).unwrap();
        for named in [root.clone(), root.join("appvms")] {
            let pool = discover(std::slice::from_ref(&named), &[]).unwrap();
            let skipped: Vec<_> = pool
                .skipped
                .iter()
                .map(|skipped| (skipped.path.clone(), skipped.reason))
                .collect();
            assert_eq!(skipped, [(root.join("appvms/w/root-dirty.img"), Skip::Volatile)]);
            let dirty = names(&pool, &root)
                .into_iter()
                .filter(|name| name.ends_with("-dirty.img"));
            assert_eq!(
                dirty.collect::<Vec<_>>(),
                [
                    "appvms/no-revisions/private-dirty.img",
                    "appvms/standalone/root-dirty.img",
                    "appvms/w/private-dirty.img"
                ]
            );
        }
    }

    #[test]
    fn finds_images_and_leaves_out_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        for (name, size) in [
            ("appvms/work/private.img", 5),
            ("appvms/work/private.img.3@2026-01-02T03:04:05Z", 5),
            ("appvms/work/private.img~abc", 5),
            ("appvms/work/volatile-dirty.img", 5),
            ("appvms/new/private.img", 5),
            ("appvms/new/private-import.img", 5),
            ("appvms/work/firewall.xml", 5),
            ("images/100/vm-100-disk-0.raw", 5),
            ("images/100/empty.raw", 0),
            ("notes.txt", 5),
        ] {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, vec![1; size]).unwrap();
        }
        std::fs::hard_link(
            root.join("appvms/work/private.img"),
            root.join("appvms/work/private2.img"),
        )
        .unwrap();
        let pool = discover(std::slice::from_ref(&root), &[]).unwrap();
        assert_eq!(
            names(&pool, &root),
            [
                "appvms/work/private.img",
                "appvms/work/private.img.3@2026-01-02T03:04:05Z",
                "images/100/empty.raw",
                "images/100/vm-100-disk-0.raw"
            ]
        );
        let skipped: Vec<_> = pool.skipped.iter().map(|skipped| skipped.reason).collect();
        assert_eq!(
            skipped,
            [Skip::ImportInProgress, Skip::Volatile, Skip::ImportInProgress]
        );
        let fewer = discover(std::slice::from_ref(&root), &["*.img*".into()]).unwrap();
        assert_eq!(
            names(&fewer, &root),
            ["images/100/empty.raw", "images/100/vm-100-disk-0.raw"]
        );
        let fewer = discover(std::slice::from_ref(&root), &["appvms/**".into()]).unwrap();
        assert_eq!(
            names(&fewer, &root),
            ["images/100/empty.raw", "images/100/vm-100-disk-0.raw"]
        );
        assert_eq!(
            names(&discover(&[root.join("notes.txt")], &[]).unwrap(), &root),
            ["notes.txt"]
        );
        assert!(matches!(
            discover(&[root.join("absent")], &[]),
            Err(Error::NoSuchPath { .. })
        ));
        assert!(matches!(
            discover(std::slice::from_ref(&root), &["*".into()]),
            Err(Error::NoImages { .. })
        ));
        assert!(matches!(discover(&[root], &["[".into()]), Err(Error::Usage(_))));
    }
}
