//! An archive that can be read at any offset, as a source. It offers one commit, and reads only those frames that have missing blocks.

use std::cmp::Reverse;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::source::{BlockHashes, BlockSink, BlockSource, Delivered, Offer, SourceFrame};
use crate::archive::announced::AnnouncedBlocks;
use crate::archive::lane::ListedRecord;
use crate::archive::reader::{Archive, Committed, Damage, LocatedFrame};
use crate::archive::record::{BlockHasher, Hash, LaneId};
use crate::archive::writer::COPIES_BYTES;
use crate::block::BLOCK_LEN;
use crate::error::{Error, Result, describe};
use crate::exec::hashes::{Digest, StoredHashes};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::{CommitName, Contents};
use crate::range;
use crate::shown::size;
use crate::spill::Budget;

/// Blocks after which a batch of frames is handed over.
const BATCH_BLOCKS: u32 = 4096;

/// A commit of an archive, as a source of blocks.
pub struct ArchiveSource<'a> {
    archive: &'a Archive,
    committed: &'a Committed,
    /// Whether the last commit was asked for, and not one by its name.
    is_latest: bool,
    /// The images of the commit.
    contents: Arc<Contents>,
    /// Whether the commit was offered. It is offered once.
    is_offered: bool,
    hashes: ArchiveHashes<'a>,
    /// Whether the offer has fingerprints, by which seeds are searched.
    announces: bool,
    monitor: &'a dyn Monitor,
}

impl<'a> ArchiveSource<'a> {
    /// Opens a commit, which is named as for [`Archive::commit`]. With `announces`, its offer has the fingerprints of its blocks.
    ///
    /// # Errors
    /// [`Error::NoSuchCommit`]; [`Error::Damaged`] if the manifest is damaged and no image is left in it; [`Error::Io`] if the archive cannot
    /// be read.
    pub fn open(
        archive: &'a Archive,
        commit: Option<&str>,
        announces: bool,
        budget: &Budget,
        monitor: &'a dyn Monitor,
    ) -> Result<Self> {
        let committed = archive.commit(commit).map_err(|error| match error {
            Error::NoSuchCommit { path, .. } | Error::Damaged { path, .. } if archive.commits().is_empty() => {
                nothing_committed(path)
            }
            other => other,
        })?;
        if committed.salvaged {
            monitor.note("The COMMIT of what is restored is lost: its images are as the rest of the archive has them");
        }
        let (mut manifest, mut damage) = archive.manifest(committed, budget)?;
        let (summaries, mut lost_lists) = archive.images(committed)?;
        if lost_lists.is_empty() && !committed.salvaged {
            manifest.keep_listed(&summaries);
        }
        damage.append(&mut lost_lists);
        for Damage { range, problem, .. } in archive.damage().iter().chain(&damage) {
            monitor.note(&format!("The archive is damaged at {range}: {problem}"));
        }
        if !archive.is_ended() && archive.damage().is_empty() {
            monitor.note(&format!(
                "The archive does not end with a commit ({} follow the last one): an export did not end, or it was cut off",
                size(archive.length() - archive.base().length)
            ));
        }
        if let Some(Damage { range, problem, .. }) = damage.first()
            && (manifest.images.is_empty() || summaries.is_empty())
        {
            return Err(Error::damaged(
                archive.path(),
                range.start,
                range.length,
                problem.clone(),
            ));
        }
        let contents = Contents {
            manifest,
            summaries,
            commit: Some(CommitName {
                number: committed.commit.number,
                id: committed.id(),
                hash: committed.location.body_hash,
            }),
            doubtful: !damage.is_empty(),
            ..Contents::default()
        };
        Ok(Self {
            archive,
            committed,
            is_latest: commit.is_none_or(|name| name == "latest"),
            contents: Arc::new(contents),
            is_offered: false,
            hashes: ArchiveHashes {
                hasher: archive.hasher(),
                stored: StoredHashes::new(Some((archive, committed)), committed.commit.store_end),
                has_unproved: false,
            },
            announces,
            monitor,
        })
    }

    /// Fingerprints of the blocks of all commits. An intact archive announces each block once. What a hostile one announces beyond the
    /// number of the blocks is left out, so that memory stays bounded.
    fn announced(&self) -> Result<Vec<AnnouncedBlocks>> {
        let mut announced: Vec<AnnouncedBlocks> = Vec::new();
        if !self.announces {
            return Ok(announced);
        }
        let mut left = u64::from(self.committed.commit.store_end.0);
        let own = self
            .archive
            .commits()
            .iter()
            .filter(|one| one.lane == self.committed.lane);
        for committed in own {
            for part in self.archive.announced(committed)? {
                let blocks = part.fingerprints.len() as u64;
                if blocks <= left {
                    left -= blocks;
                    announced.push(part);
                }
            }
        }
        Ok(announced)
    }

    /// Returns where the commit ends, which is the last one: with its TAIL or, if that is damaged, where that must have been. What a commit has
    /// behind its COMMIT are copies and what keeps them apart.
    fn end(&self) -> u64 {
        let Committed { commit, location, .. } = self.committed;
        let known = self.archive.base().length;
        if self.archive.has_tail() {
            return known;
        }
        let lists = commit.lists.iter().map(|list| list.length);
        let copies = lists.fold(COPIES_BYTES.saturating_add(location.length), u64::saturating_add);
        known.max(location.offset.saturating_add(location.length).saturating_add(copies))
    }

    /// Hands a batch of frames over, and empties it. Frames that are damaged are noted and left out. Of those that a later commit lists, what
    /// no INDEX of this commit proves must be proved by the digests of images.
    fn hand_over(&mut self, batch: &mut Vec<(CommitNumber, LocatedFrame)>, sink: &mut dyn BlockSink) -> Result<()> {
        let remade: Mutex<Vec<(StoreBlock, Hash)>> = Mutex::new(Vec::new());
        let mut frames = Vec::with_capacity(batch.len());
        for (commit, located) in batch.drain(..) {
            let blocks = located.frame.first..located.frame.end();
            let expected = range::each(blocks.clone()).map(|block| self.hashes.get(block));
            let expected: Vec<Option<Hash>> = expected.collect::<Result<_>>()?;
            self.hashes.has_unproved |= commit > self.committed.commit.number && expected.iter().any(Option::is_none);
            let (archive, remade) = (self.archive, &remade);
            frames.push(SourceFrame {
                blocks,
                content: Box::new(move || content_of(archive, &located, &expected, remade)),
            });
        }
        for (_, error) in sink.take(&frames)? {
            self.monitor.note(&describe(&error));
        }
        drop(frames);
        self.hashes.stored.remember(remade.into_inner().unwrap_or_default());
        Ok(())
    }

    /// The PACK records that hold blocks of some ranges, each once: those that the commit proves in the order of their blocks, and then those
    /// of later commits.
    fn packs(&self, wanted: &[Range<StoreBlock>]) -> Vec<&'a ListedRecord> {
        let archive = self.archive;
        let mut packs: Vec<&ListedRecord> = wanted
            .iter()
            .flat_map(|range| archive.packs(self.committed, range.clone()))
            .collect();
        let order = |pack: &&ListedRecord| {
            let is_later = pack.commit > self.committed.commit.number;
            (
                is_later,
                pack.location.first,
                Reverse(pack.commit),
                pack.location.sequence,
            )
        };
        packs.sort_by_key(order);
        packs.dedup_by_key(|pack| std::ptr::from_ref(*pack));
        packs
    }
}

/// Reads the content of a frame, and compares each block with the hash that the INDEX has for it. Where it has none, the hash is added to
/// `remade`.
fn content_of(
    archive: &Archive,
    located: &LocatedFrame,
    expected: &[Option<Hash>],
    remade: &Mutex<Vec<(StoreBlock, Hash)>>,
) -> Result<Vec<u8>> {
    let content = archive.frame(located)?;
    let (first, hasher) = (located.frame.first, archive.hasher());
    for ((block, content), expected) in range::from(first).zip(content.chunks_exact(BLOCK_LEN)).zip(expected) {
        let hash = hasher.of(content);
        match expected {
            Some(expected) if *expected != hash => {
                let problem = "a block is not the one that the INDEX says";
                return Err(Error::damaged(
                    archive.path(),
                    located.offset,
                    located.frame.stored_bytes.into(),
                    problem,
                ));
            }
            Some(_) => {}
            None => {
                if let Ok(mut remade) = remade.lock() {
                    remade.push((block, hash));
                }
            }
        }
    }
    Ok(content)
}

impl BlockSource for ArchiveSource<'_> {
    fn path(&self) -> &Path {
        self.archive.path()
    }

    fn id(&self) -> LaneId {
        self.committed.lane
    }

    fn work_number(&self) -> CommitNumber {
        self.committed.commit.number
    }

    fn offer(&mut self) -> Result<Option<Offer>> {
        if std::mem::replace(&mut self.is_offered, true) {
            return Ok(None);
        }
        Ok(Some(Offer {
            contents: Arc::clone(&self.contents),
            announced: self.announced()?,
            known_end: StoreBlock(u32::MAX),
        }))
    }

    fn deliver(&mut self, wanted: &[Range<StoreBlock>], sink: &mut dyn BlockSink) -> Result<Delivered> {
        let missing: Vec<Range<StoreBlock>> = wanted.iter().flat_map(|range| sink.missing(range.clone())).collect();
        let (mut batch, mut blocks, mut batch_end) = (Vec::new(), 0, StoreBlock(0));
        for pack in self.packs(&missing) {
            // Of blocks that lie in two PACKs, the second is asked only for what the first did not bring.
            if pack.location.first < batch_end {
                self.hand_over(&mut batch, sink)?;
                blocks = 0;
            }
            batch_end = batch_end.max(pack.location.end());
            let frames = match self.archive.frames(&pack.location) {
                Ok(frames) => frames,
                Err(error @ Error::Damaged { .. }) => {
                    self.monitor.note(&describe(&error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            for located in frames {
                if sink.missing(located.frame.first..located.frame.end()).is_empty() {
                    continue;
                }
                blocks += u32::from(located.frame.blocks);
                batch.push((pack.commit, located));
                if blocks >= BATCH_BLOCKS {
                    self.hand_over(&mut batch, sink)?;
                    blocks = 0;
                }
            }
        }
        self.hand_over(&mut batch, sink)?;
        Ok(Delivered {
            committed: Some(Arc::clone(&self.contents)),
            is_last: true,
        })
    }

    fn hashes(&mut self) -> &mut dyn BlockHashes {
        &mut self.hashes
    }

    fn knows_hashes(&self) -> bool {
        true
    }

    fn nothing_committed(&self) -> Error {
        nothing_committed(self.path().to_owned())
    }

    fn has_unproved_blocks(&self) -> bool {
        self.hashes.has_unproved
    }

    fn has_later_damage(&self) -> bool {
        let is_later = |damage: &Damage| damage.range.start.saturating_add(damage.range.length) > self.end();
        self.is_latest
            && !self.committed.salvaged
            && self.archive.damage().iter().any(is_later)
            // What cannot be read may be anything.
            && !self.archive.ends_in_leftovers_only().unwrap_or(false)
    }
}

/// The error for an archive without any commit.
fn nothing_committed(path: PathBuf) -> Error {
    Error::Damaged {
        path,
        range: None,
        problem: "it ends before its first COMMIT, and nothing of it can be restored".into(),
    }
}

/// The hashes that the archive has.
struct ArchiveHashes<'a> {
    stored: StoredHashes<'a>,
    hasher: BlockHasher,
    /// Whether blocks were handed over that only digests can prove.
    has_unproved: bool,
}

impl BlockHashes for ArchiveHashes<'_> {
    fn hasher(&self) -> BlockHasher {
        self.hasher.clone()
    }

    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        self.stored.get(block)
    }

    fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool> {
        self.stored.add_to(digest, first, blocks)
    }
}
