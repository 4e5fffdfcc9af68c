//! A running Qubes OS: what vmfold asks of `qubesd`, the daemon that owns machines and their volumes. An image gets into a volume by a transaction
//! that `qubesd` has for restores: it makes an empty file, which the caller fills, and puts it into the volume's place. The image that the volume
//! had before becomes a revision.

mod answer;
mod socket;

use std::path::{Path, PathBuf};

pub use socket::{SOCKETS, SocketQubesd, Timeouts};

use crate::error::Result;

/// The tag of a machine that is being restored. Qubes OS does not start such a machine.
pub const RESTORE_TAG: &str = "backup-restore-in-progress";
/// The state of a machine that is shut down.
pub const HALTED: &str = "Halted";

/// A machine, as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineState {
    /// Its name.
    pub name: String,
    /// Its state, such as [`HALTED`].
    pub state: String,
}

/// A volume of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeInfo {
    /// The name of its pool.
    pub pool: String,
    /// Bytes that it takes on the disk. It takes none as long as nobody has written to it.
    pub used_bytes: u64,
    /// Whether it is kept when the machine stops. Others cannot be restored.
    pub is_kept: bool,
    /// How many revisions of it are kept. Where there are none, what it held is lost when something else is put into its place.
    pub revisions: i64,
    /// Where its images lie, if it is of a pool that keeps each in a file of its own.
    pub files: Option<VolumeFiles>,
}

/// Where the images of a volume lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeFiles {
    /// The folder of the pool.
    pub pool_folder: PathBuf,
    /// The image while the machine is shut down.
    pub image: PathBuf,
    /// The image while the machine runs, or when it was not shut down in order.
    pub dirty: PathBuf,
}

impl VolumeFiles {
    /// The folder of the machine's images.
    pub fn folder(&self) -> &Path {
        self.image.parent().unwrap_or(&self.pool_folder)
    }
}

/// What vmfold asks of `qubesd`. Each call is an error if `qubesd` refuses it or answers something that makes no sense: [`Error::Qubesd`].
///
/// [`Error::Qubesd`]: crate::error::Error::Qubesd
pub trait Qubesd {
    /// All machines, with their states.
    fn machines(&self) -> Result<Vec<MachineState>>;

    /// The state of a machine.
    fn state(&self, machine: &str) -> Result<String>;

    /// What a volume of a machine is.
    fn volume(&self, machine: &str, volume: &str) -> Result<VolumeInfo>;

    /// Whether a machine has a tag.
    fn has_tag(&self, machine: &str, tag: &str) -> Result<bool>;

    /// Gives a machine a tag.
    fn set_tag(&self, machine: &str, tag: &str) -> Result<()>;

    /// Takes a tag from a machine.
    fn remove_tag(&self, machine: &str, tag: &str) -> Result<()>;

    /// Begins to import so many bytes into a volume. Returns the empty file that is to be filled. An import that was begun before is dropped.
    fn begin_import(&self, machine: &str, volume: &str, size: u64) -> Result<PathBuf>;

    /// Puts the filled file into the volume's place.
    fn commit_import(&self, machine: &str, volume: &str) -> Result<()>;

    /// Drops the file, for a reason that goes into the log of `qubesd`. Its answer is an exception in any case, and tells nothing.
    fn drop_import(&self, machine: &str, volume: &str, reason: &str);
}
