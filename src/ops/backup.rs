//! What `list` and `verify` do with backups that other programs made.

use std::path::Path;

use super::{BackupAccess, is_backup, open_backup};
use crate::archive::record::{BlockHasher, LaneId};
use crate::block::bytes;
use crate::content::Content;
use crate::error::{Error, Result};
use crate::exec::restore::backup::{BackupOptions, BackupSource, NoEarlierBlocks};
use crate::exec::restore::read_all;
use crate::foreign::Event;
use crate::monitor::Monitor;
use crate::report::{BackedUpVolume, ListedBackup};
use crate::store::{FileStore, PeekedStore, Store};

/// Lists the volumes of a backup, as far as its headers tell. It returns `None` if the file is no backup of another program.
///
/// # Errors
/// Those of [`FileStore::open`] and [`foreign::open`], and of reading the backup.
pub fn list(path: &Path, access: &BackupAccess, monitor: &dyn Monitor) -> Result<Option<ListedBackup>> {
    let store = FileStore::open(path)?;
    let peeked = PeekedStore::new(&store).map_err(Error::io("read", path))?;
    if !is_backup(&peeked, access)? {
        return Ok(None);
    }
    monitor.phase("Reading the backup", 0);
    let backing = access.open_backing()?;
    let mut backup = open_backup(&peeked, &backing, access, false, monitor)?;
    let mut volumes: Vec<BackedUpVolume> = Vec::new();
    let mut buffer = Vec::new();
    while let Some(event) = backup.next(&mut buffer)? {
        match event {
            Event::Volume(volume) => {
                backup.leave_out(volumes.len());
                volumes.push(BackedUpVolume {
                    path: volume.path,
                    size: volume.size,
                    data_bytes: None,
                });
            }
            Event::Link { volume, path } => {
                let size = volumes.get(volume).and_then(|volume| volume.size);
                volumes.push(BackedUpVolume {
                    path,
                    size,
                    data_bytes: None,
                });
            }
            Event::End { volume, size } => {
                if let Some(volume) = volumes.get_mut(volume) {
                    volume.size = Some(size);
                }
            }
            Event::Data { .. } => {}
        }
    }
    Ok(Some(ListedBackup {
        archive: path.to_owned(),
        archive_bytes: length_of(&store)?,
        kind: backup.kind(),
        is_verified: false,
        distinct_bytes: None,
        volumes,
    }))
}

/// Reads all of a backup, and checks that nothing of it is missing or damaged, as far as its format tells. It returns `None` if the file is no
/// backup of another program.
///
/// # Errors
/// [`Error::DamagedBackup`]; those of [`list`].
pub fn verify(path: &Path, access: &BackupAccess, monitor: &dyn Monitor) -> Result<Option<ListedBackup>> {
    let store = FileStore::open(path)?;
    let peeked = PeekedStore::new(&store).map_err(Error::io("read", path))?;
    if !is_backup(&peeked, access)? {
        return Ok(None);
    }
    let backing = access.open_backing()?;
    let backup = open_backup(&peeked, &backing, access, true, monitor)?;
    let kind = backup.kind();
    let options = BackupOptions {
        takes: Box::new(|_| true),
        partial: false,
        id: LaneId::default(),
        folder: std::env::temp_dir(),
        budget: super::runs_budget(None),
        earlier: Box::new(NoEarlierBlocks),
        hasher: BlockHasher::default(),
    };
    let mut source = BackupSource::new(backup, path, options, monitor);
    let (contents, counts) = read_all(&mut source, None, |_| Ok(()), monitor)?;
    let volumes = contents.manifest.images.iter().map(|one| BackedUpVolume {
        path: one.image.path().to_owned(),
        size: Some(one.image.size),
        data_bytes: Some(
            one.runs
                .iter()
                .filter(|run| matches!(run.content, Content::Stored(_)))
                .map(|run| bytes(run.blocks))
                .sum(),
        ),
    });
    Ok(Some(ListedBackup {
        archive: path.to_owned(),
        archive_bytes: length_of(&store)?,
        kind,
        is_verified: true,
        distinct_bytes: Some(counts.written_bytes),
        volumes: volumes.collect(),
    }))
}

fn length_of(store: &FileStore) -> Result<u64> {
    let length = store.length().map_err(Error::io("look at", store.path()))?;
    Ok(length.unwrap_or_default())
}
