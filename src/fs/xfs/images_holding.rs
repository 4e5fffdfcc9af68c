//! Finds the images of an XFS that map given blocks, by their names.

use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use walkdir::WalkDir;

use crate::fs::HoldingImage;
use crate::monitor::Monitor;
use crate::pool;
use crate::sys::beneath::Folder;
use crate::sys::existing::existing;
use crate::sys::fiemap::fiemap;

/// Returns the images on the XFS that map the addresses where extents begin. XFS cannot be asked who holds an extent, so that images are
/// looked for by name and their maps are read. It is `None` if the user stops the search.
pub(in crate::fs) fn images_holding(
    path: &Path,
    mut addresses: Vec<u64>,
    monitor: &dyn Monitor,
) -> Option<Vec<HoldingImage>> {
    /// Files and folders to look at, at most: a filesystem with more holds much else than images.
    const ENTRIES_MAX: usize = 1 << 20;
    if addresses.is_empty() {
        return Some(Vec::new());
    }
    addresses.sort_unstable();
    addresses.dedup();
    let top = top_of_mount(path)?;
    let folder = Folder::open(&top).ok()?;
    let mut found = Vec::new();
    let entries = WalkDir::new(&top).same_file_system(true).into_iter();
    for entry in entries.take(ENTRIES_MAX).filter_map(std::result::Result::ok) {
        if monitor.interrupted() {
            return None;
        }
        let is_image = entry.file_type().is_file()
            && pool::kind_of(entry.path()) == pool::FileKind::Image
            && entry
                .metadata()
                .is_ok_and(|metadata| pool::looks_like_image(entry.path(), metadata.len()));
        let Ok(below) = entry.path().strip_prefix(&top) else {
            continue;
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK;
        let Some(file) = is_image.then(|| folder.open_file(below, flags).ok()).flatten() else {
            continue;
        };
        let mut held = 0;
        let mapped = fiemap(&file, |mapping| {
            if !mapping.unwritten {
                let end = mapping.address.saturating_add(mapping.length);
                let from = addresses.partition_point(|address| *address < mapping.address);
                held += addresses[from..].partition_point(|address| *address < end);
            }
        });
        if mapped.is_ok() && held > 0 {
            found.push(HoldingImage {
                extents: held,
                path: entry.into_path(),
            });
        }
    }
    Some(found)
}

/// Returns the topmost folder above a path that is on the same filesystem.
fn top_of_mount(path: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let existing = existing(path).canonicalize().ok()?;
    let device = existing.metadata().ok()?.dev();
    let on_device = existing
        .ancestors()
        .take_while(|folder| folder.metadata().is_ok_and(|metadata| metadata.dev() == device));
    on_device.last().map(Path::to_owned)
}
