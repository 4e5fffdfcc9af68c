//! `list`: shows the commits and images of an archive.

use std::path::Path;

use crate::archive::reader::{Archive, Committed};
use crate::block::BLOCK_BYTES;
use crate::content::FileTime;
use crate::error::Result;
use crate::numbers::StoreBlock;
use crate::report::{Listed, ListedCommit, ListedImage};
use crate::store::FileStore;

/// Lists the commits of an archive, or one of them.
///
/// # Errors
/// Those of [`FileStore::open`], [`Archive::open`] and [`Archive::commit`].
pub fn list(path: &Path, commit: Option<&str>) -> Result<Listed> {
    let archive = Archive::open(std::sync::Arc::new(FileStore::open(path)?))?;
    let commits: Vec<&Committed> = match commit {
        Some(name) => vec![archive.commit(Some(name))?],
        None => archive.commits().iter().collect(),
    };
    Ok(Listed {
        archive: path.to_owned(),
        archive_bytes: archive.length(),
        shows_images: commits.len() == 1,
        commits: commits
            .into_iter()
            .map(|committed| listed(&archive, committed))
            .collect(),
    })
}

/// What a commit holds, and what it added to the archive.
fn listed(archive: &Archive, committed: &Committed) -> ListedCommit {
    let commit = &committed.commit;
    let commits = archive.commits();
    let first_new = commits
        .binary_search_by_key(&commit.number.previous(), |committed| committed.commit.number)
        .map_or(StoreBlock(0), |place| commits[place].commit.store_end);
    let images = commit.images.iter().map(|image| ListedImage {
        path: image.path.clone(),
        size: image.size,
        data_bytes: image.data_blocks.saturating_mul(BLOCK_BYTES),
        added_bytes: image.new_blocks.saturating_mul(BLOCK_BYTES),
    });
    ListedCommit {
        number: commit.number,
        id: committed.id(),
        time: time(commit.time),
        label: commit.label.clone(),
        root: commit.root.clone(),
        logical_bytes: commit
            .images
            .iter()
            .map(|image| image.size)
            .fold(0, u64::saturating_add),
        added_bytes: u64::from(commit.store_end.saturating_sub(first_new)) * BLOCK_BYTES,
        stored_bytes: commit
            .records
            .iter()
            .map(|record| record.length)
            .fold(committed.location.length, u64::saturating_add),
        images: images.collect(),
    }
}

/// A time in UTC, to the second.
fn time(time: FileTime) -> String {
    let seconds = time.seconds;
    jiff::Timestamp::from_second(seconds).map_or_else(
        |_| format!("{seconds} seconds since 1970"),
        |time| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
    )
}
