//! New files that hold secrets.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::error::{Error, Result};
use crate::shown::shown;

/// Writes a file that did not exist, and that only its owner can read. If this fails, what was begun is removed. `what` is what is written, for messages.
///
/// # Errors
/// [`Error::Usage`] if the file exists; [`Error::NoSpace`]; [`Error::Io`].
pub(super) fn write(path: &Path, content: &[u8], what: &str) -> Result<()> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(|error| match error.kind() {
        std::io::ErrorKind::AlreadyExists => Error::Usage(format!(
            "`{}` exists: {what} is written to a new file only",
            shown(path)
        )),
        _ => Error::writing("make", path)(error),
    })?;
    let written = file.write_all(content).and_then(|()| file.sync_all());
    written.map_err(|error| {
        let _ = std::fs::remove_file(path);
        Error::writing("write to", path)(error)
    })
}
