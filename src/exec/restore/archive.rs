//! An archive that can be read at any offset, as a source. It offers one commit, and reads only those frames that have missing blocks.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::source::{BlockHashes, BlockSink, BlockSource, Delivered, Offer, SourceFrame};
use crate::archive::commit::RecordLocation;
use crate::archive::manifest::AnnouncedBlocks;
use crate::archive::reader::{Archive, Committed, Damage, LocatedFrame};
use crate::archive::record::{Hash, hash_of};
use crate::block::BLOCK_LEN;
use crate::error::{Error, Result, describe};
use crate::exec::hashes::{Digest, StoredHashes};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::{CommitName, Contents};
use crate::range;

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
    pub fn open(archive: &'a Archive, commit: Option<&str>, announces: bool, monitor: &'a dyn Monitor) -> Result<Self> {
        let committed = archive.commit(commit)?;
        if committed.salvaged {
            monitor.note("The COMMIT of what is restored is lost: its images are as the rest of the archive has them");
        }
        let (manifest, damage) = archive.manifest(committed)?;
        for Damage { range, problem } in archive.damage().iter().chain(&damage) {
            monitor.note(&format!("The archive is damaged at {range}: {problem}"));
        }
        let summaries = &committed.commit.images;
        if let Some(Damage { range, problem }) = damage.first()
            && manifest.images.is_empty()
            && summaries.is_empty()
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
            summaries: summaries.clone(),
            commit: Some(CommitName {
                number: committed.commit.number,
                id: committed.id(),
                hash: committed.location.body_hash,
            }),
            doubtful: !damage.is_empty(),
        };
        Ok(Self {
            archive,
            committed,
            is_latest: commit.is_none_or(|name| name == "latest"),
            contents: Arc::new(contents),
            is_offered: false,
            hashes: ArchiveHashes(StoredHashes::new(Some(archive), committed.commit.store_end)),
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
        for committed in self.archive.commits() {
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

    /// Hands a batch of frames over, and empties it. Frames that are damaged are noted and left out.
    fn hand_over(&mut self, batch: &mut Vec<LocatedFrame>, sink: &mut dyn BlockSink) -> Result<()> {
        let mut frames = Vec::with_capacity(batch.len());
        for located in batch.drain(..) {
            let frame = located.frame;
            let blocks = frame.first..frame.first + u32::from(frame.blocks);
            let expected = range::each(blocks.clone()).map(|block| self.hashes.get(block));
            let expected: Vec<Option<Hash>> = expected.collect::<Result<_>>()?;
            let archive = self.archive;
            frames.push(SourceFrame {
                blocks,
                content: Box::new(move || content_of(archive, &located, &expected)),
            });
        }
        for (_, error) in sink.take(&frames)? {
            self.monitor.note(&describe(&error));
        }
        Ok(())
    }
}

/// Reads the content of a frame, and compares each block with the hash that the INDEX has for it, if it has one.
fn content_of(archive: &Archive, located: &LocatedFrame, expected: &[Option<Hash>]) -> Result<Vec<u8>> {
    let content = archive.frame(located)?;
    for (block, expected) in content.chunks_exact(BLOCK_LEN).zip(expected) {
        if expected.is_some_and(|expected| expected != hash_of(block)) {
            let problem = "a block is not the one that the INDEX says";
            return Err(Error::damaged(
                archive.path(),
                located.offset,
                located.frame.stored_bytes.into(),
                problem,
            ));
        }
    }
    Ok(content)
}

/// The PACK records that hold blocks of some ranges, which are in ascending order. Each PACK comes once.
fn packs_of<'a>(archive: &'a Archive, ranges: &'a [Range<StoreBlock>]) -> impl Iterator<Item = &'a RecordLocation> {
    let mut last = None;
    let packs = ranges.iter().flat_map(|range| archive.packs(range.start, range.end));
    packs.filter(move |pack| last.replace(pack.sequence) != Some(pack.sequence))
}

impl BlockSource for ArchiveSource<'_> {
    fn path(&self) -> &Path {
        self.archive.path()
    }

    fn id(&self) -> [u8; 16] {
        self.archive.id()
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
        let (mut batch, mut blocks) = (Vec::new(), 0);
        for pack in packs_of(self.archive, &missing) {
            let frames = match self.archive.frames(pack) {
                Ok(frames) => frames,
                Err(error @ Error::Damaged { .. }) => {
                    self.monitor.note(&describe(&error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            for located in frames {
                let frame = located.frame;
                if sink
                    .missing(frame.first..frame.first + u32::from(frame.blocks))
                    .is_empty()
                {
                    continue;
                }
                blocks += u32::from(frame.blocks);
                batch.push(located);
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
        Error::NoSuchCommit {
            path: self.path().to_owned(),
            commit: "latest".into(),
        }
    }

    fn has_later_damage(&self) -> bool {
        /// Bytes of a TAIL record. A lost epoch with its COMMIT takes more.
        const TAIL_BYTES: u64 = 192;
        let end = self.committed.location.offset + self.committed.location.length;
        let is_later = |damage: &Damage| damage.range.start >= end && damage.range.length > TAIL_BYTES;
        self.is_latest && !self.committed.salvaged && self.archive.damage().iter().any(is_later)
    }
}

/// The hashes that the archive has.
struct ArchiveHashes<'a>(StoredHashes<'a>);

impl BlockHashes for ArchiveHashes<'_> {
    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        self.0.get(block)
    }

    fn add_to(&mut self, digest: &mut Digest<'_>, first: StoreBlock, blocks: u32) -> Result<bool> {
        self.0.add_to(digest, first, blocks)
    }
}
