//! One side of a comparison: images whose blocks are known by hash.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::archive::manifest::ImageRuns;
use crate::archive::reader::{Archive, Committed, Damage};
use crate::archive::record::{BlockHasher, Hash, LaneId};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::exec::hashes::{HashLog, StoredHashes, zero_hash};
use crate::exec::restore::backup::{BackupOptions, BackupSource, NoEarlierBlocks};
use crate::exec::restore::read_all;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::ops::{BackupAccess, is_backup, open_backup, runs_budget};
use crate::store::{FileStore, PeekedStore, Store};

/// The images of a commit, or of a backup that another program made.
pub(super) struct Side<'a> {
    /// The images by their paths.
    pub(super) images: BTreeMap<PathBuf, ImageRuns>,
    /// The lane that store addresses belong to. In two sides of one lane, an address is the same block.
    pub(super) lane: Option<LaneId>,
    path: PathBuf,
    hashes: Hashes<'a>,
    /// What made these.
    pub(super) hasher: BlockHasher,
    zero_hash: Hash,
}

/// The hashes of blocks, by store address.
enum Hashes<'a> {
    Archive(StoredHashes<'a>),
    Backup {
        log: HashLog,
        /// The page that was read last.
        page: (StoreBlock, Vec<Hash>),
    },
}

impl<'a> Side<'a> {
    /// The images of a commit. A damaged manifest is an error, since its images may be incomplete.
    pub(super) fn of_commit(archive: &'a Archive, committed: &'a Committed) -> Result<Self> {
        let (manifest, damage) = archive.manifest(committed, &runs_budget(None))?;
        if let Some(Damage { range, problem, .. }) = damage.first() {
            return Err(Error::damaged(
                archive.path(),
                range.start,
                range.length,
                problem.clone(),
            ));
        }
        Ok(Self {
            images: by_path(manifest.images),
            lane: Some(committed.lane),
            path: archive.path().to_owned(),
            zero_hash: zero_hash(&archive.hasher()),
            hasher: archive.hasher(),
            hashes: Hashes::Archive(StoredHashes::new(
                Some((archive, committed)),
                committed.commit.store_end,
            )),
        })
    }

    /// The images of a backup, all of which is read. Its blocks are hashed as those of the other side.
    pub(super) fn of_backup(
        store: &FileStore,
        access: &BackupAccess,
        hasher: BlockHasher,
        monitor: &dyn Monitor,
    ) -> Result<Self> {
        let path = store.path().to_owned();
        let peeked = PeekedStore::new(store).map_err(Error::io("read", &path))?;
        if !is_backup(&peeked, access)? {
            return Err(Error::RefusedBackup {
                path,
                problem: "it is no backup of another program".into(),
            });
        }
        let options = BackupOptions {
            takes: Box::new(|_| true),
            partial: false,
            id: LaneId::default(),
            folder: std::env::temp_dir(),
            budget: runs_budget(None),
            earlier: Box::new(NoEarlierBlocks),
            hasher: hasher.clone(),
        };
        let backing = access.open_backing()?;
        let backup = open_backup(&peeked, &backing, access, false, monitor)?;
        let mut source = BackupSource::new(backup, &path, options, monitor);
        let (contents, _) = read_all(&mut source, None, |_| Ok(()), monitor)?;
        let contents = Arc::into_inner(contents).ok_or_else(|| lost(&path))?;
        Ok(Self {
            images: by_path(contents.manifest.images),
            lane: None,
            path,
            zero_hash: zero_hash(&hasher),
            hasher,
            hashes: Hashes::Backup {
                log: source.into_new_hashes(),
                page: (StoreBlock(0), Vec::new()),
            },
        })
    }

    /// The hash of the block that is `skipped` blocks behind the first one of a run. It is `None` for zeros, stored ones too.
    pub(super) fn hash_at(&mut self, content: Content, skipped: u32) -> Result<Option<Hash>> {
        let Content::Stored(first) = content else {
            return Ok(None);
        };
        let (hash, zero) = (self.hashes.get(first + skipped)?, self.zero_hash);
        hash.map(|hash| Some(hash).filter(|hash| *hash != zero))
            .ok_or_else(|| lost(&self.path))
    }
}

fn lost(path: &Path) -> Error {
    Error::Damaged {
        path: path.to_owned(),
        range: None,
        problem: "hashes of its blocks are lost".into(),
    }
}

impl Hashes<'_> {
    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        /// Hashes that are read together, because blocks are mostly asked for in their order.
        const PAGE_BLOCKS: u32 = 256;
        match self {
            Self::Archive(hashes) => hashes.get(block),
            Self::Backup { log, page } => {
                let known = |page: &(StoreBlock, Vec<Hash>)| {
                    let at = block.checked_sub(page.0)?;
                    page.1.get(at as usize).copied()
                };
                if known(page).is_none() && block < log.end() {
                    *page = (block, log.read(block, PAGE_BLOCKS.min(log.end() - block))?);
                }
                Ok(known(page))
            }
        }
    }
}

fn by_path(images: Vec<ImageRuns>) -> BTreeMap<PathBuf, ImageRuns> {
    let images = images.into_iter();
    images.map(|image| (image.image.path().to_owned(), image)).collect()
}
