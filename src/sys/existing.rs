//! Paths of which only a part exists.

use std::path::Path;

/// Returns the nearest existing ancestor of a path, which may be the path itself.
pub fn existing(path: &Path) -> &Path {
    // The last ancestor of a relative path is empty; it stands for the current folder.
    let exists = path
        .ancestors()
        .find(|folder| !folder.as_os_str().is_empty() && folder.exists());
    exists.unwrap_or(Path::new("."))
}
