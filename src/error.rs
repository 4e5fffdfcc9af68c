//! Every error of the crate. An error names the operation that failed, the path, and the range where it is known.

use std::path::{Path, PathBuf};

use crate::block::ByteRange;
use crate::shown::{shown, size};

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// The kind of an error: what the user has to do about it. Exit codes follow from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The command line is wrong: it names something that does not exist, or asks for something impossible.
    Usage,
    /// A file that would be replaced or written to is in use.
    InUse,
    /// Another process is working on the same thing; waiting helps.
    Busy,
    /// The filesystem, the kernel, a permission or a limit of vmfold does not allow it.
    Refused,
    /// An archive does not hold what was written to it.
    Damaged,
    /// There is too little free space, or a quota is used up.
    NoSpace,
    /// The user stopped the run.
    Interrupted,
    /// A system call failed, or its result makes no sense.
    Io,
}

/// The resource that a failed write used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exhausted {
    /// The space of the filesystem: `ENOSPC`.
    Space,
    /// A quota: `EDQUOT`.
    Quota,
}

impl Exhausted {
    /// Returns what is used up if the kind of an I/O error says that something is.
    pub fn of(kind: std::io::ErrorKind) -> Option<Self> {
        match kind {
            std::io::ErrorKind::StorageFull => Some(Self::Space),
            std::io::ErrorKind::QuotaExceeded => Some(Self::Quota),
            _ => None,
        }
    }
}

/// An error, with its kind in [`Error::kind`] and what there is to do about it in [`Error::hint`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call failed.
    #[error("cannot {operation} `{}`{}", shown(path), range.map(|range| format!(", {range}")).unwrap_or_default())]
    Io {
        /// The operation that failed, as a verb phrase that the path completes.
        operation: &'static str,
        /// The file that it failed on.
        path: PathBuf,
        /// The range that it failed on, if it did not concern the whole file.
        range: Option<ByteRange>,
        /// The system's error.
        source: std::io::Error,
    },
    /// A range of an image, or of a file that shares its blocks, cannot be read. Only [`Error::unreadable`] makes this error.
    #[error("cannot read `{}`, {range}", shown(path))]
    Unreadable {
        /// The image.
        path: PathBuf,
        /// The range that could not be read.
        range: ByteRange,
        /// The system's error.
        source: std::io::Error,
    },
    /// A path that was named does not exist.
    #[error("`{}` does not exist", shown(path))]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// The user named a device or a UUID whose filesystem is not mounted.
    #[error("the filesystem of `{}` is not mounted", shown(path))]
    NotMounted {
        /// The device or UUID.
        path: PathBuf,
    },
    /// A path that was named is a device, a pipe or a socket.
    #[error("`{}` is neither a file nor a folder", shown(path))]
    NotAnImage {
        /// The path.
        path: PathBuf,
    },
    /// No images were found.
    #[error("no images found in {}", list(paths))]
    NoImages {
        /// The paths that were searched.
        paths: Vec<PathBuf>,
    },
    /// The paths lie on two filesystems; extents can be shared within one only.
    #[error("`{}` and `{}` are on two filesystems", shown(first), shown(second))]
    TwoFilesystems {
        /// One path.
        first: PathBuf,
        /// A path on another filesystem.
        second: PathBuf,
    },
    /// The filesystem cannot share extents.
    #[error("`{}` is on {filesystem}, where vmfold cannot share extents", shown(path))]
    NoSharing {
        /// The path.
        path: PathBuf,
        /// Name or magic number of the filesystem.
        filesystem: String,
    },
    /// The filesystem is an XFS without reflinks, whose files cannot share blocks.
    #[error("`{}` is on an XFS without reflinks", shown(path))]
    NoReflinks {
        /// The path.
        path: PathBuf,
    },
    /// The filesystem's block size is not 4 KiB.
    #[error("`{}` is on a filesystem with blocks of {block_bytes} bytes", shown(path))]
    SectorSize {
        /// The path.
        path: PathBuf,
        /// Its block size in bytes.
        block_bytes: u32,
    },
    /// Compression was asked for on a filesystem that does not compress.
    #[error("`{}` is on XFS, which cannot compress", shown(path))]
    NoCompression {
        /// The path.
        path: PathBuf,
    },
    /// Decompressing takes more space than is free.
    #[error(
        "what is compressed at `{}` takes {} more when it is not, and {} are free beyond the reserve",
        shown(path),
        size(*grows_bytes),
        size(*free_bytes)
    )]
    Grows {
        /// The path of an image.
        path: PathBuf,
        /// The bytes that decompressing takes.
        grows_bytes: u64,
        /// The bytes that are free beyond the reserve.
        free_bytes: u64,
    },
    /// The filesystem is mounted read-only.
    #[error("`{}` is on a filesystem that is mounted read-only", shown(path))]
    ReadOnly {
        /// The path.
        path: PathBuf,
    },
    /// Another vmfold works on the same filesystem.
    #[error("another vmfold is working on the filesystem of `{}`", shown(path))]
    Busy {
        /// A path there.
        path: PathBuf,
    },
    /// Another import restores to the same folder.
    #[error("another import is restoring to `{}`", shown(path))]
    Restoring {
        /// The folder.
        path: PathBuf,
    },
    /// Another process appends to the same archive.
    #[error("another vmfold is writing to `{}`", shown(path))]
    Appending {
        /// The archive.
        path: PathBuf,
    },
    /// An error occurred while images were being replaced, and the replacements could not be undone.
    #[error(
        "{source}; replaced before that: {}; left as they were: {}",
        list_or_none(replaced),
        list_or_none(kept)
    )]
    HalfReplaced {
        /// The error that stopped the replacing.
        source: Box<Error>,
        /// Names that now refer to a restored image.
        replaced: Vec<PathBuf>,
        /// Names that still refer to the image they referred to before.
        kept: Vec<PathBuf>,
    },
    /// A folder that only this user may write to belongs to another user, or others can write to it.
    #[error("`{}` is not a folder that you alone can write to", shown(path))]
    NotOurs {
        /// The folder.
        path: PathBuf,
    },
    /// The running kernel has bugs that make sharing extents on this filesystem unsafe.
    #[error("Linux {}.{} has bugs that sharing extents on btrfs runs into", release.0, release.1)]
    Kernel {
        /// Its release: major and minor number.
        release: (u32, u32),
    },
    /// The process lacks `CAP_SYS_ADMIN`, which reading extent maps requires.
    #[error("reading the filesystem's extent maps takes root")]
    NotRoot,
    /// The pool has more distinct extents than 32-bit slot numbers can address.
    #[error("the images hold more than 16 TiB of distinct extents")]
    TooLarge,
    /// The index cannot be used.
    #[error("cannot use the index `{}`: {problem}", shown(path))]
    Index {
        /// Its folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The filesystem ran out of space, or a quota was used up. Images are intact, as at every moment of a run.
    #[error(
        "cannot {operation} `{}`: {}; every image is intact",
        shown(path),
        if *is_quota { "a quota is used up" } else { "no space is left on its filesystem" }
    )]
    NoSpace {
        /// Whether a quota was used up, rather than the filesystem's space.
        is_quota: bool,
        /// The operation that failed, as in [`Error::Io`].
        operation: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// Metadata of the filesystem makes no sense.
    #[error("the filesystem's metadata of `{}` is not as expected: {problem}", shown(path))]
    Metadata {
        /// The image, or a path on the filesystem.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A file that was named as an archive is not one.
    #[error("`{}` is not an archive of vmfold", shown(path))]
    NotAnArchive {
        /// The file.
        path: PathBuf,
    },
    /// What was named as an archive or a backup is no regular file.
    #[error("`{}` is not a regular file, which an archive or a backup must be", shown(path))]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// A file that would be written to was created by another user.
    #[error(
        "`{}` belongs to another user (uid {uid}), in a folder that is not yours alone",
        shown(path)
    )]
    OfAnother {
        /// The file.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// A path to write to leads through a symbolic link that another user can have put there.
    #[error("`{}` is a symbolic link in a folder that others can write to", shown(path))]
    SharedLink {
        /// The link.
        path: PathBuf,
    },
    /// An archive does not hold what was written to it.
    #[error("the archive `{}` is damaged{}: {problem}", shown(path), range.map(|range| format!(" at {range}")).unwrap_or_default())]
    Damaged {
        /// The archive.
        path: PathBuf,
        /// The damaged range of the archive, if it is known.
        range: Option<ByteRange>,
        /// What is wrong.
        problem: String,
    },
    /// A key was given for an archive that is not sealed.
    #[error(
        "`{}` is not encrypted, though a key was given for it: it may not be the archive that you mean",
        shown(path)
    )]
    NotSealed {
        /// The archive.
        path: PathBuf,
    },
    /// A keyring is sealed, and the user gave nothing that could open it.
    #[error("`{}` is encrypted, and no key was given: it opens by {slots}", shown(path))]
    NoKey {
        /// The archive.
        path: PathBuf,
        /// What opens it.
        slots: String,
    },
    /// Nothing that the user gave opens a keyring.
    #[error(
        "the key is wrong: `{}` opens by {slots}, and by none of what was given{}",
        shown(path),
        problem.as_ref().map(|problem| format!(" ({problem})")).unwrap_or_default()
    )]
    WrongKey {
        /// The archive.
        path: PathBuf,
        /// What opens it.
        slots: String,
        /// Why something was not tried.
        problem: Option<String>,
    },
    /// A sealed keyring is not what was written.
    #[error("the keyring of `{}` is damaged: {problem}", shown(path))]
    DamagedKeyring {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A program that was to give a key failed.
    #[error("no key came from `{}`: {problem}", shown(Path::new(program)))]
    KeyProgram {
        /// The command, or the name of the program.
        program: String,
        /// What went wrong.
        problem: String,
    },
    /// An archive uses a feature that this version does not support.
    #[error("the archive `{}` cannot be used: {problem}", shown(path))]
    Unsupported {
        /// The archive.
        path: PathBuf,
        /// The feature, as the rest of the message.
        problem: &'static str,
    },
    /// A backup that another program made does not hold what was written to it.
    #[error(
        "the backup `{}` is damaged at {range}{}{}: {problem}",
        shown(path),
        if *decompressed { " after decompression" } else { "" },
        volume.as_ref().map(|volume| format!(", in `{}`", shown(volume))).unwrap_or_default()
    )]
    DamagedBackup {
        /// The backup.
        path: PathBuf,
        /// The range of the backup that is wrong, or where it was read to.
        range: ByteRange,
        /// Whether the range is one of what decompressing the backup gives.
        decompressed: bool,
        /// The volume that is damaged, if it is known.
        volume: Option<PathBuf>,
        /// What is wrong.
        problem: String,
    },
    /// A backup that another program made is of a kind that is not read, or exceeds a limit.
    #[error("the backup `{}` cannot be read: {problem}", shown(path))]
    RefusedBackup {
        /// The backup.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// A sealed archive is not what this host has seen of it.
    #[error("`{}`: {problem}", shown(path))]
    RolledBack {
        /// The archive.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// An archive does not have the commit that was asked for.
    #[error("the archive `{}` has no commit `{}`", shown(path), shown(Path::new(commit)))]
    NoSuchCommit {
        /// The archive.
        path: PathBuf,
        /// The commit, as the user named it.
        commit: String,
    },
    /// Images changed while they were read.
    #[error("changed while it was read: {}", list(paths))]
    ChangedMeanwhile {
        /// The images.
        paths: Vec<PathBuf>,
    },
    /// No image of a commit or a backup matches what was asked for.
    #[error("no image of {whole} matches{}", in_others(others))]
    NoMatch {
        /// The commit or the backup, in words.
        whole: String,
        /// Other commits of the archive that have such an image, in words.
        others: Vec<String>,
    },
    /// There is too little free space to restore the images.
    #[error(
        "restoring takes {} at `{}`, with {} that stay free, and {} are free",
        size(*needed_bytes),
        shown(path),
        size(*reserve_bytes),
        size(*free_bytes)
    )]
    DoesNotFit {
        /// The folder.
        path: PathBuf,
        /// The bytes that restoring takes, metadata and the reserve included.
        needed_bytes: u64,
        /// The bytes of them that stay free.
        reserve_bytes: u64,
        /// The bytes that are free.
        free_bytes: u64,
    },
    /// A restore needs more space than it was allowed.
    #[error("a restore to `{}` takes more than --work-space allows, which is {}", shown(path), size(*allowed_bytes))]
    WorkSpace {
        /// The folder that is restored to.
        path: PathBuf,
        /// The bytes that it may take.
        allowed_bytes: u64,
    },
    /// Going on would leave less free space than the reserve.
    #[error(
        "the filesystem of `{}` is nearly full: {reserve_bytes} bytes are to stay free",
        shown(path)
    )]
    Reserve {
        /// A path on the filesystem.
        path: PathBuf,
        /// The reserve in bytes.
        reserve_bytes: u64,
    },
    /// Files exist under the names of images to be restored.
    #[error("exists already: {}", list(paths))]
    Exists {
        /// The paths.
        paths: Vec<PathBuf>,
    },
    /// An image that is to be replaced is in use.
    #[error("in use, and not to be replaced: `{}` ({by})", shown(path))]
    InUse {
        /// The image.
        path: PathBuf,
        /// The process that uses it, or the evidence that it is in use.
        by: String,
    },
    /// A folder stands where an image is to be restored.
    #[error("there is a folder in the way: `{}`", shown(path))]
    FolderInTheWay {
        /// The folder.
        path: PathBuf,
    },
    /// The daemon of Qubes OS refused a call, or its answer makes no sense.
    #[error("qubesd does not do `{call}` for `{target}`: {problem}")]
    Qubesd {
        /// The call.
        call: &'static str,
        /// The machine, or a volume or tag of it.
        target: String,
        /// Why.
        problem: String,
    },
    /// The user stopped the run.
    #[error("interrupted")]
    Interrupted,
    /// The caller asked for something that makes no sense. The text is the whole message.
    #[error("{0}")]
    Usage(String),
}

fn list(paths: &[PathBuf]) -> String {
    paths
        .iter()
        .map(|path| format!("`{}`", shown(path)))
        .collect::<Vec<_>>()
        .join(", ")
}

fn list_or_none(paths: &[PathBuf]) -> String {
    if paths.is_empty() { "none".into() } else { list(paths) }
}

/// Formats an error and its causes on one line.
pub fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Returns what the user can do about an error of a system call, if there is something.
fn hint_of(error: &std::io::Error) -> Option<&'static str> {
    Some(match Exhausted::of(error.kind()) {
        Some(Exhausted::Space) => "free some space and run it again",
        Some(Exhausted::Quota) => QUOTA_HINT,
        None => match error.raw_os_error()? {
            libc::EIO => {
                "the disk or a checksum failed: restore the image from a backup, or leave it out with --exclude"
            }
            libc::EFBIG => "no file may be that large: see ulimit -f, and what the filesystem allows",
            _ => return None,
        },
    })
}

/// The hint for a quota that is used up.
const QUOTA_HINT: &str = "raise the quota or free some space, and run it again";

impl Error {
    /// Makes an [`Error::Io`] for a whole file: `.map_err(Error::io("open", path))`.
    pub fn io<E: Into<std::io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            operation,
            path: path.to_owned(),
            range: None,
            source: source.into(),
        }
    }

    /// Makes an [`Error::NoSpace`] if a write failed for lack of space or quota, and an [`Error::Io`] otherwise.
    pub fn writing<E: Into<std::io::Error>>(operation: &'static str, path: &Path) -> impl Fn(E) -> Self {
        move |error| {
            let error = error.into();
            match Exhausted::of(error.kind()) {
                Some(exhausted) => Self::NoSpace {
                    is_quota: exhausted == Exhausted::Quota,
                    operation,
                    path: path.to_owned(),
                },
                None => Self::io(operation, path)(error),
            }
        }
    }

    /// Makes an [`Error::Io`] for a range of a file.
    pub fn io_at<E: Into<std::io::Error>>(
        operation: &'static str,
        path: &Path,
        start: u64,
        length: u64,
    ) -> impl FnOnce(E) -> Self {
        let range = Some(ByteRange { start, length });
        move |source| Self::Io {
            operation,
            path: path.to_owned(),
            range,
            source: source.into(),
        }
    }

    /// Makes an [`Error::Unreadable`]. Every failed read of an image is reported through this function.
    pub fn unreadable(path: &Path, start: u64, length: u64) -> impl FnOnce(std::io::Error) -> Self {
        let range = ByteRange { start, length };
        move |source| Self::Unreadable {
            path: path.to_owned(),
            range,
            source,
        }
    }

    /// Makes an [`Error::Damaged`].
    pub fn damaged(path: &Path, start: u64, length: u64, problem: impl Into<String>) -> Self {
        Self::Damaged {
            path: path.to_owned(),
            range: Some(ByteRange { start, length }),
            problem: problem.into(),
        }
    }

    /// Returns the kind of the error.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage(_)
            | Self::NoSuchPath { .. }
            | Self::NotMounted { .. }
            | Self::NotAnImage { .. }
            | Self::NoImages { .. }
            | Self::TwoFilesystems { .. }
            | Self::NotAnArchive { .. }
            | Self::NoKey { .. }
            | Self::NotAFile { .. }
            | Self::NoSuchCommit { .. }
            | Self::NoMatch { .. }
            | Self::Exists { .. }
            | Self::FolderInTheWay { .. } => ErrorKind::Usage,
            Self::InUse { .. } | Self::Appending { .. } => ErrorKind::InUse,
            Self::Busy { .. } | Self::Restoring { .. } | Self::ChangedMeanwhile { .. } => ErrorKind::Busy,
            Self::NoSharing { .. }
            | Self::NoReflinks { .. }
            | Self::SectorSize { .. }
            | Self::NoCompression { .. }
            | Self::ReadOnly { .. }
            | Self::NotOurs { .. }
            | Self::OfAnother { .. }
            | Self::SharedLink { .. }
            | Self::Kernel { .. }
            | Self::NotRoot
            | Self::TooLarge
            | Self::Unsupported { .. }
            | Self::RefusedBackup { .. }
            | Self::WrongKey { .. }
            | Self::NotSealed { .. }
            | Self::RolledBack { .. }
            | Self::KeyProgram { .. }
            | Self::Qubesd { .. } => ErrorKind::Refused,
            Self::Damaged { .. } | Self::DamagedBackup { .. } | Self::DamagedKeyring { .. } => ErrorKind::Damaged,
            Self::NoSpace { .. }
            | Self::Grows { .. }
            | Self::DoesNotFit { .. }
            | Self::WorkSpace { .. }
            | Self::Reserve { .. } => ErrorKind::NoSpace,
            Self::Interrupted => ErrorKind::Interrupted,
            Self::Io { source, .. } if Exhausted::of(source.kind()).is_some() => ErrorKind::NoSpace,
            // Whatever stopped the replacing, the user must learn that it could not be undone.
            Self::Io { .. }
            | Self::Unreadable { .. }
            | Self::HalfReplaced { .. }
            | Self::Index { .. }
            | Self::Metadata { .. } => ErrorKind::Io,
        }
    }

    /// Returns what the user can do about the error, if there is something.
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::NoSuchPath { .. } => "check the path",
            Self::NotMounted { .. } => "mount it, and run again",
            Self::NotAnImage { .. } => "name image files and folders",
            Self::NoImages { .. } => {
                "name image files, or folders that hold .img, .raw, .qcow2, .vmdk, .vdi or .vhdx files and their revisions"
            }
            Self::TwoFilesystems { .. } => "run once for each filesystem",
            Self::NoSharing { .. } => "vmfold works on btrfs and on XFS",
            Self::NoReflinks { .. } => "blocks can be shared on an XFS that was made with mkfs.xfs -m reflink=1 only",
            Self::SectorSize { .. } => "vmfold supports blocks of 4096 bytes only",
            Self::NoCompression { .. } => "leave --compress out: reclaim and export work on XFS",
            Self::Grows { .. } => "free some space, or name fewer images",
            Self::ReadOnly { .. } => "remount it read-write, or use --dry-run or report",
            Self::Busy { .. } | Self::Restoring { .. } | Self::Appending { .. } => "wait until it has ended",
            Self::HalfReplaced { source, .. } => return source.hint(),
            Self::NotOurs { path } if is_work_folder(path) => "remove it, or restore to a folder of yours",
            Self::NotOurs { .. } => "name a folder of yours: for the index by --index, for locks by XDG_RUNTIME_DIR",
            Self::Kernel { .. } => "use Linux 5.4 or later",
            Self::NotRoot => "run it with sudo",
            Self::TooLarge => "run once for each folder",
            Self::Index { .. } => "name another folder with --index, or delete this one: it is only a cache",
            Self::NoSpace { is_quota: true, .. } => QUOTA_HINT,
            Self::NoSpace { .. } => "free some space, and run it again",
            Self::Metadata { .. } => "run btrfs check or xfs_repair -n on the unmounted filesystem",
            Self::Io { source, .. } | Self::Unreadable { source, .. } => return hint_of(source),
            Self::NotAnArchive { .. } => "name a file that vmfold export wrote; with --raw, import takes a raw image",
            Self::NotAFile { .. } => "name a file, or give a pipe as standard input, which `-` stands for",
            Self::OfAnother { .. } => {
                "whoever owns it could read what is written, or lead it elsewhere: name another place, or one of your own"
            }
            Self::RolledBack { .. } => "if you put it there yourself, say so with --accept-rollback",
            Self::SharedLink { .. } => "they could lead it elsewhere: name what it leads to",
            Self::Damaged { .. } => "vmfold verify tells what is lost; vmfold import --partial restores the rest",
            Self::Unsupported { .. } => "use a later version of vmfold",
            Self::NoKey { .. } => {
                "give it by --passphrase-file, --passphrase-fd or --passphrase-command, or name the file of an identity by --identity"
            }
            Self::WrongKey { .. } => "check what was given; vmfold key list tells who holds a key",
            Self::NotSealed { .. } => "if it is, leave the key out",
            Self::DamagedKeyring { .. } => "no key opens it as it is: take another copy of the archive",
            Self::NoMatch { others, .. } if !others.is_empty() => "name the commit by --commit",
            Self::NoSuchCommit { .. } | Self::NoMatch { .. } => "vmfold list shows what there is",
            Self::ChangedMeanwhile { .. } => "nothing was added to the archive; shut the machine down and run it again",
            Self::WorkSpace { .. } => "allow more, or choose fewer images",
            Self::DoesNotFit { .. } => {
                "free some space, choose fewer images, or name images that are like them with --seed"
            }
            Self::Reserve { .. } => {
                "free some space, or choose another --reserve, and run again: it goes on from there"
            }
            Self::InUse { .. } => "shut its machine down, or restore to another folder",
            Self::FolderInTheWay { .. } => "restore to another folder, or move it away",
            Self::Exists { .. } => "restore to another folder, or replace them with --replace",
            Self::Qubesd { .. } => "journalctl -u qubesd has more; run it again to go on",
            Self::DamagedBackup { .. } => "vmfold import --partial restores what came before the damage",
            Self::Interrupted | Self::Usage(_) | Self::RefusedBackup { .. } | Self::KeyProgram { .. } => return None,
        })
    }
}

/// Which other commits have an image, as the end of a message.
fn in_others(others: &[String]) -> String {
    match others {
        [] => String::new(),
        [one] => format!(", but one of {one} does"),
        [.., last] => format!(", but one of {last} does, and of {} more", others.len() - 1),
    }
}

/// Whether a folder has the name of one that imports work in, beside the images.
fn is_work_folder(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.starts_with(b".vmfold-")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn from_system(number: i32) -> std::io::Error {
        std::io::Error::from_raw_os_error(number)
    }

    fn with(make: fn(PathBuf) -> Error) -> Error {
        make(PathBuf::from("a"))
    }

    fn of_usage() -> Vec<Error> {
        vec![
            Error::Usage(String::new()),
            with(|path| Error::NoSuchPath { path }),
            with(|path| Error::NotMounted { path }),
            with(|path| Error::NotAnImage { path }),
            with(|path| Error::NoImages { paths: vec![path] }),
            with(|path| Error::TwoFilesystems {
                first: path.clone(),
                second: path,
            }),
            with(|path| Error::NotAnArchive { path }),
            with(|path| Error::NoKey {
                path,
                slots: String::new(),
            }),
            with(|path| Error::NotAFile { path }),
            with(|path| Error::NoSuchCommit {
                path,
                commit: String::new(),
            }),
            with(|_| Error::NoMatch {
                whole: "commit 2".into(),
                others: Vec::new(),
            }),
            with(|path| Error::Exists { paths: vec![path] }),
            with(|path| Error::FolderInTheWay { path }),
        ]
    }

    fn of_refusal() -> Vec<Error> {
        vec![
            with(|path| Error::NotSealed { path }),
            with(|path| Error::RolledBack {
                path,
                problem: String::new(),
            }),
            Error::Qubesd {
                call: "admin.vm.List",
                target: "work".into(),
                problem: "it is not there".into(),
            },
            with(|path| Error::NoSharing {
                path,
                filesystem: String::new(),
            }),
            with(|path| Error::NoReflinks { path }),
            with(|path| Error::SectorSize {
                path,
                block_bytes: 65536,
            }),
            with(|path| Error::NoCompression { path }),
            with(|path| Error::ReadOnly { path }),
            with(|path| Error::NotOurs { path }),
            with(|path| Error::OfAnother { path, uid: 1 }),
            with(|path| Error::WrongKey {
                path,
                slots: String::new(),
                problem: None,
            }),
            Error::KeyProgram {
                program: "pass show vmfold".into(),
                problem: "it failed".into(),
            },
            with(|path| Error::SharedLink { path }),
            Error::Kernel { release: (5, 3) },
            Error::NotRoot,
            Error::TooLarge,
            with(|path| Error::Unsupported { path, problem: "" }),
            with(|path| Error::RefusedBackup {
                path,
                problem: String::new(),
            }),
        ]
    }

    fn of_damage() -> Vec<Error> {
        vec![
            Error::damaged(Path::new("a"), 0, 1, ""),
            with(|path| Error::DamagedKeyring {
                path,
                problem: String::new(),
            }),
            with(|path| Error::DamagedBackup {
                path,
                range: ByteRange { start: 0, length: 1 },
                decompressed: false,
                volume: None,
                problem: String::new(),
            }),
        ]
    }

    fn of_space() -> Vec<Error> {
        vec![
            Error::writing("write to", Path::new("a"))(from_system(libc::ENOSPC)),
            with(|path| Error::Grows {
                path,
                grows_bytes: 1,
                free_bytes: 0,
            }),
            with(|path| Error::DoesNotFit {
                path,
                needed_bytes: 1,
                reserve_bytes: 1,
                free_bytes: 0,
            }),
            with(|path| Error::WorkSpace { path, allowed_bytes: 1 }),
            with(|path| Error::Reserve { path, reserve_bytes: 1 }),
        ]
    }

    fn of_system() -> Vec<Error> {
        vec![
            Error::io("open", Path::new("a"))(from_system(libc::EPERM)),
            Error::unreadable(Path::new("a"), 0, 4096)(from_system(libc::EIO)),
            with(|path| Error::HalfReplaced {
                source: Box::new(Error::Interrupted),
                replaced: vec![path],
                kept: vec![],
            }),
            with(|path| Error::Index {
                path,
                problem: String::new(),
            }),
            with(|path| Error::Metadata {
                path,
                problem: String::new(),
            }),
        ]
    }

    /// Returns an error of each variant, by the kind that it must have.
    fn one_of_each() -> Vec<(ErrorKind, Vec<Error>)> {
        let in_use = vec![
            with(|path| Error::InUse {
                path,
                by: String::new(),
            }),
            with(|path| Error::Appending { path }),
        ];
        let busy = vec![
            with(|path| Error::Busy { path }),
            with(|path| Error::Restoring { path }),
            with(|path| Error::ChangedMeanwhile { paths: vec![path] }),
        ];
        vec![
            (ErrorKind::Usage, of_usage()),
            (ErrorKind::InUse, in_use),
            (ErrorKind::Busy, busy),
            (ErrorKind::Refused, of_refusal()),
            (ErrorKind::Damaged, of_damage()),
            (ErrorKind::NoSpace, of_space()),
            (ErrorKind::Interrupted, vec![Error::Interrupted]),
            (ErrorKind::Io, of_system()),
        ]
    }

    /// Returns the names of the variants, from the source of this file.
    fn variants() -> BTreeSet<String> {
        let source = include_str!("error.rs").split("pub enum Error {").nth(1).unwrap();
        let lines = source.split("\n}").next().unwrap().lines();
        let variants = lines.filter_map(|line| line.strip_prefix("    "));
        variants
            .filter(|line| line.starts_with(char::is_uppercase))
            .map(first_word)
            .collect()
    }

    fn first_word(text: &str) -> String {
        let word = text.split(|c: char| !c.is_alphanumeric()).next();
        word.unwrap_or_default().to_owned()
    }

    #[test]
    fn every_variant_has_its_kind() {
        let mut seen = BTreeSet::new();
        for (kind, errors) in one_of_each() {
            for error in errors {
                assert_eq!(error.kind(), kind, "{error:?}");
                assert!(
                    seen.insert(first_word(&format!("{error:?}"))),
                    "{error:?} is there twice"
                );
            }
        }
        assert_eq!(seen, variants());
    }

    #[test]
    fn a_full_disk_and_a_quota_are_told_from_other_errors() {
        let path = Path::new("a");
        for (number, quota) in [(libc::ENOSPC, false), (libc::EDQUOT, true)] {
            let error = Error::writing("write to", path)(from_system(number));
            assert!(
                matches!(error, Error::NoSpace { is_quota, .. } if is_quota == quota),
                "{error:?}"
            );
            let error = Error::io("write to", path)(from_system(number));
            assert_eq!(error.kind(), ErrorKind::NoSpace, "{error:?}");
        }
        for number in [libc::EIO, libc::EFBIG, libc::EROFS] {
            let error = Error::writing("write to", path)(from_system(number));
            assert_eq!(error.kind(), ErrorKind::Io, "{error:?}");
        }
    }

    #[test]
    fn what_a_full_disk_a_quota_and_a_limit_ask_for_is_said() {
        let hint = |number| Error::io("write to", Path::new("a"))(from_system(number)).hint();
        for number in [libc::ENOSPC, libc::EDQUOT, libc::EFBIG] {
            assert!(hint(number).is_some(), "{number}");
        }
        assert_eq!(hint(libc::EPERM), None);
    }

    #[test]
    fn what_cannot_be_read_is_named_with_its_range() {
        let error = Error::unreadable(Path::new("a"), 4096, 8192)(from_system(libc::EIO));
        let plain = Error::io_at("read", Path::new("a"), 4096, 8192)(from_system(libc::EIO));
        assert_eq!(describe(&error), describe(&plain));
        assert_eq!(error.hint(), plain.hint());
    }
}
