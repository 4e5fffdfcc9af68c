//! `list`: shows the commits and images of an archive.

use std::path::Path;
use std::sync::Arc;

use crate::archive::keys::ArchiveKeys;
use crate::archive::reader::{Archive, Committed, Damage, RecordReader};
use crate::archive::writer::COPIES_BYTES;
use crate::block::BLOCK_BYTES;
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::numbers::StoreBlock;
use crate::report::{Listed, ListedCommit, ListedImage};
use crate::store::FileStore;

/// Lists the commits of an archive, or one of them.
///
/// # Errors
/// Those of [`FileStore::open`], [`Archive::open`] and [`Archive::commit`].
pub fn list(path: &Path, commit: Option<&str>) -> Result<Listed> {
    list_with(path, commit, Arc::default())
}

/// Lists the commits of an archive that may be sealed, or one of them.
///
/// # Errors
/// Those of [`list`] and [`Archive::open_with`].
pub fn list_with(path: &Path, commit: Option<&str>, keys: Arc<ArchiveKeys>) -> Result<Listed> {
    let store = Arc::new(FileStore::open(path)?);
    let archive = Archive::open_with(Arc::clone(&store) as _, keys)?;
    let all = archive.commits();
    let places = match commit {
        Some(name) => {
            let wanted = archive.commit(Some(name))?;
            let place = all.iter().position(|one| std::ptr::eq(one, wanted)).unwrap_or(0);
            place..place + 1
        }
        None => 0..all.len(),
    };
    Ok(Listed {
        archive: path.to_owned(),
        archive_bytes: archive.length(),
        commit_count: all.len() as u64,
        is_damaged: !archive.damage().is_empty() || !archive.is_ended() || begins_with_another(&archive, store)?,
        shows_images: places.len() == 1,
        // Commits are ordered by lane and number.
        commits: places
            .map(|place| listed(&archive, &all[place], place.checked_sub(1).map(|before| &all[before])))
            .collect::<Result<_>>()?,
    })
}

/// Whether the file begins with an archive that none of these commits is of: someone appended one to another.
fn begins_with_another(archive: &Archive, store: Arc<FileStore>) -> Result<bool> {
    let first = match RecordReader::new(store)?.header_at(0) {
        Err(Error::Damaged { .. } | Error::NotAnArchive { .. }) => return Ok(true),
        first => first?,
    };
    let mut commits = archive.commits().iter().chain(archive.forgotten());
    Ok(!commits.any(|one| one.lane == first.lane))
}

/// What a commit holds, and what it added to the archive.
fn listed(archive: &Archive, committed: &Committed, before: Option<&Committed>) -> Result<ListedCommit> {
    let commit = &committed.commit;
    let is_before = |one: &&Committed| one.lane == committed.lane && one.commit.number == commit.number.previous();
    let first_new = before
        .filter(is_before)
        .map_or(StoreBlock(0), |one| one.commit.store_end);
    let (summaries, damage) = archive.images(committed)?;
    if let Some(Damage { range, problem, .. }) = damage.into_iter().next() {
        return Err(Error::damaged(archive.path(), range.start, range.length, problem));
    }
    let images = summaries.iter().map(|image| ListedImage {
        path: image.path.clone(),
        size: image.size,
        data_bytes: image.data_blocks.saturating_mul(BLOCK_BYTES),
        added_bytes: image.new_blocks.saturating_mul(BLOCK_BYTES),
    });
    Ok(ListedCommit {
        number: commit.number,
        id: committed.id(),
        time: time(commit.time),
        label: commit.label.clone(),
        root: commit.root.clone(),
        logical_bytes: summaries.iter().map(|image| image.size).fold(0, u64::saturating_add),
        added_bytes: u64::from(commit.store_end.saturating_sub(first_new)) * BLOCK_BYTES,
        stored_bytes: stored_bytes(committed),
        image_count: summaries.len() as u64,
        images: images.collect(),
    })
}

/// Bytes that a commit takes in the archive: its records, and what it lists twice.
fn stored_bytes(committed: &Committed) -> u64 {
    let records = committed.listed.records.iter().map(|record| record.length);
    let lists = committed.commit.lists.iter().map(|list| list.length);
    let twice = lists
        .chain([committed.location.length])
        .fold(0, u64::saturating_add)
        .saturating_mul(2);
    records.fold(twice.saturating_add(COPIES_BYTES), u64::saturating_add)
}

/// A time in UTC, to the second.
fn time(time: FileTime) -> String {
    let seconds = time.seconds;
    jiff::Timestamp::from_second(seconds).map_or_else(
        |_| format!("{seconds} seconds since 1970"),
        |time| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
    )
}
