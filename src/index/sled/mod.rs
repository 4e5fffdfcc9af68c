//! Indexes in sled, one folder for each filesystem. All knowledge of sled is in this folder.

mod database;

use std::path::{Path, PathBuf};

use rustix::fs::Mode;

use database::Database;

use super::recorded::{Recorded, TREE_PREFIX, error_of, tree_name};
use super::tables::{Answer, Problem};
use super::{ChunkIndex, IndexStatus};
use crate::block::BLOCK_BYTES;
use crate::error::{Error, Result};
use crate::fingerprint::FingerprintFunction;
use crate::monitor::Monitor;
use crate::named_folder::NamedFolder;
use crate::own_folder::own_folder;
use crate::shown::{hex, shown};

/// Opens the index of the filesystem with this UUID for fingerprints of a function, and creates it if it does not exist. Without a
/// function, it opens the table that exists. A damaged index is removed and created again, with a note to the monitor.
///
/// # Errors
/// Returns [`Error::Busy`] if another process uses the index, [`Error::NotOurs`] if others can write to its folder, [`Error::Index`] if it
/// does not respond, and [`Error::Io`] if it cannot be read or written.
pub fn open(
    folder: &Path,
    uuid: [u8; 16],
    function: Option<FingerprintFunction>,
    monitor: &dyn Monitor,
) -> Result<Box<dyn ChunkIndex>> {
    Ok(Box::new(open_recorded(folder, &uuid, function, monitor)?))
}

fn open_recorded(
    folder: &Path,
    uuid: &[u8; 16],
    function: Option<FingerprintFunction>,
    monitor: &dyn Monitor,
) -> Result<Recorded<Database>> {
    let folder = folder_of(folder, uuid)?;
    let problem = match open_in(&folder, function) {
        Err(Problem::Damaged(problem)) => problem,
        opened => return opened.map_err(|problem| error_of(&folder, problem)),
    };
    monitor.note(&format!(
        "The index `{}` is damaged and is made anew: {problem}",
        shown(&folder)
    ));
    std::fs::remove_dir_all(&folder).map_err(Error::io("remove the damaged index", &folder))?;
    own_folder(&folder)?;
    open_in(&folder, function).map_err(|problem| error_of(&folder, problem))
}

/// Opens the database of a folder. Without a function, it uses the table that exists.
fn open_in(folder: &Path, function: Option<FingerprintFunction>) -> Answer<Recorded<Database>> {
    // Tables for other chunk parameters or functions are useless, and are dropped.
    let keep = function.map(|function| tree_name(function).into_bytes());
    let database = Database::open(folder, TREE_PREFIX, keep.clone())?;
    let tree = if let Some(tree) = keep {
        tree
    } else {
        let mut trees = database.trees()?.into_iter();
        let present = trees.find(|name| name.starts_with(TREE_PREFIX.as_bytes()));
        present.unwrap_or_else(|| TREE_PREFIX.into())
    };
    Ok(Recorded::new(folder, database, tree))
}

/// Whether an index of the filesystem with this UUID exists.
pub fn exists(folder: &Path, uuid: [u8; 16]) -> bool {
    folder.join(hex(&uuid)).join("sled").is_dir()
}

/// Computes the statistics of an index.
fn status_of(index: &Recorded<Database>) -> Result<IndexStatus> {
    /// One in this many ids is remembered, to estimate the number of distinct ones.
    const SAMPLE: u64 = 64;
    let disk_bytes = index.tables().disk_bytes().map_err(|problem| index.error(problem))?;
    let (folder, name) = index.name();
    let mut status = IndexStatus {
        folder: folder.to_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        extents: 0,
        bytes: 0,
        fingerprint_bytes: 0,
        chunks: 0,
        distinct_chunks: 0,
        disk_bytes,
    };
    let mut seen = std::collections::HashSet::new();
    index.for_each(|entry| {
        let blocks = entry.chunks.iter().map(|chunk| u64::from(chunk.blocks));
        status.extents += 1;
        status.bytes += blocks.sum::<u64>() * BLOCK_BYTES;
        let remembered = entry.fingerprints().map(|(run, _)| u64::from(run.end - run.start));
        status.fingerprint_bytes += remembered.sum::<u64>() * BLOCK_BYTES;
        status.chunks += entry.chunks.len() as u64;
        let ids = entry.chunks.iter().map(|chunk| chunk.weak_id);
        seen.extend(ids.filter(|id| id % SAMPLE == 0));
    })?;
    status.distinct_chunks = (seen.len() as u64 * SAMPLE).min(status.chunks);
    Ok(status)
}

/// Returns the statistics of all indexes in a folder.
///
/// # Errors
/// Returns [`Error::Io`] if the folder cannot be read, and the errors of [`open`].
pub fn all_in(folder: &Path, monitor: &dyn Monitor) -> Result<Vec<IndexStatus>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(error) => return Err(Error::io("look into", folder)(error)),
    };
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    names.sort();
    for name in names {
        let Some(uuid) = parse_hex(&name) else { continue };
        found.push(status_of(&open_recorded(folder, &uuid, None, monitor)?)?);
    }
    Ok(found)
}

/// Returns the folder of a filesystem's index, and creates it if it does not exist. Files in it are trusted, and written to by name, so
/// that no other user may be able to put a file or another folder there.
fn folder_of(indexes: &Path, uuid: &[u8; 16]) -> Result<PathBuf> {
    let not_ours = || Error::NotOurs {
        path: indexes.to_owned(),
    };
    let named = NamedFolder::look(indexes)?;
    if !named.is_ours_all_the_way() {
        return Err(not_ours());
    }
    let made = named.make(Mode::RWXU, |_, _| {})?;
    let stat = rustix::fs::fstat(&made).map_err(Error::io("look at", indexes))?;
    let mode = Mode::from_raw_mode(stat.st_mode);
    let is_mine = stat.st_uid == 0 || stat.st_uid == rustix::process::geteuid().as_raw();
    let others_move = mode.intersects(Mode::WGRP | Mode::WOTH) && !mode.contains(Mode::SVTX);
    if !is_mine || others_move {
        return Err(not_ours());
    }
    let folder = indexes.join(hex(uuid));
    own_folder(&folder)?;
    Ok(folder)
}

fn parse_hex(name: &str) -> Option<[u8; 16]> {
    let mut uuid = [0; 16];
    if name.len() != 32 || !name.is_ascii() {
        return None;
    }
    for (at, byte) in uuid.iter_mut().enumerate() {
        *byte = u8::from_str_radix(name.get(2 * at..2 * at + 2)?, 16).ok()?;
    }
    Some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;

    use crate::block::SlotSet;
    use crate::facts::Facts;
    use crate::range;
    use crate::testing::simulated::one_image;

    const EXTENT_BLOCKS: u32 = 32 << 10;
    const EXTENTS: u32 = 100;

    fn facts(fingerprints: Vec<u32>) -> Facts {
        let extent = |number| number * EXTENT_BLOCKS..(number + 1) * EXTENT_BLOCKS;
        let mut facts = one_image((0..EXTENTS).map(extent), 1);
        facts.fingerprints = fingerprints.into();
        facts
    }

    fn open(folder: &Path) -> Recorded<Database> {
        open_recorded(
            folder,
            &[1; 16],
            Some(FingerprintFunction::Crc32c),
            &crate::monitor::Silent::default(),
        )
        .unwrap()
    }

    #[test]
    fn what_lies_where_an_extent_was_takes_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let mut index = open(folder.path());
        index.keep_plain();
        let mut enter = |places: &[Range<u32>]| {
            let slots: u32 = places.iter().map(|place| place.end - place.start).sum();
            let mut facts = one_image(places.iter().cloned(), 1);
            facts.fingerprints = (0..slots).collect::<Vec<_>>().into();
            index
                .look_up(&mut facts, &[], &mut SlotSet::new(slots as usize))
                .unwrap();
            index.update(&facts, &[]).unwrap();
            let entries = index.read(0).unwrap().into_iter();
            entries.map(|entry| entry.address / BLOCK_BYTES).collect::<Vec<_>>()
        };
        assert_eq!(enter(&[0..8, 8..16, 16..24, 40..48]), [0, 8, 16, 40]);
        assert_eq!(enter(&[4..12, 24..32]), [4, 16, 24, 40]);
        assert_eq!(enter(&[12..16, 20..44]), [4, 12, 20]);
    }

    #[test]
    fn nothing_is_lost_when_it_is_closed_and_opened_again_on_the_way() {
        let folder = tempfile::tempdir().unwrap();
        let open = || open(folder.path());
        let all: Vec<u32> = (0..EXTENTS * EXTENT_BLOCKS)
            .map(|slot| slot.wrapping_mul(0x9e37_79b9))
            .collect();
        assert!(all.len() * 4 > database::OPEN_BYTES, "or it is never closed");
        let known = || SlotSet::new(all.len());
        {
            let mut index = open();
            index.keep_plain();
            let mut facts = facts(all.clone());
            index.look_up(&mut facts, &[], &mut known()).unwrap();
            index.update(&facts, &[]).unwrap();
        }
        let mut found = facts(vec![0; all.len()]);
        let mut known = known();
        open().look_up(&mut found, &[], &mut known).unwrap();
        assert!(range::each(found.all_slots()).all(|slot| known.contains(slot)));
        assert_eq!(found.fingerprints.range(found.all_slots()), all);
    }
}
