//! Images on the disk that have blocks in common with what is restored.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;

use super::{Options, PROVED_BLOCKS, prove, proved};
use crate::archive::manifest::Announced;
use crate::block::{BLOCK_BYTES, BLOCK_LEN, SlotSet, bytes};
use crate::chunk::weak_id;
use crate::content::StoreBlock;
use crate::error::{Error, Result};
use crate::exec::hashes::StoredHashes;
use crate::exec::restore::staging::Staging;
use crate::fs::{Filesystem, Purpose, SourceFile, images_holding, may_find_holders, uuid_at};
use crate::index;
use crate::monitor::Monitor;
use crate::ops::{Prepared, Scope, prepare};
use crate::plan::import::{Seeded, find_seeds};
use crate::range;

/// Seeds that were opened and fingerprinted.
pub(super) struct Seeds {
    prepared: Prepared,
    /// The folder of indexes, where lists may lie.
    index: PathBuf,
}

impl Seeds {
    /// Opens the seeds that were named, or else images that the index knows to have wanted blocks; none if there are none, or
    /// extents cannot be shared.
    pub(super) fn open<'a>(
        options: &Options,
        shares: bool,
        wanted: &[Range<StoreBlock>],
        announced: impl Iterator<Item = &'a Announced>,
        monitor: &dyn Monitor,
    ) -> Result<Option<Self>> {
        if !shares {
            return Ok(None);
        }
        let paths = if options.seeds.is_empty() {
            known_images(options, wanted, announced, monitor).unwrap_or_default()
        } else {
            options.seeds.clone()
        };
        if paths.is_empty() {
            return Ok(None);
        }
        match Self::open_paths(options, &paths, monitor) {
            Err(error) if options.seeds.is_empty() => {
                monitor.note(&format!(
                    "Going on without what is here already: {}",
                    crate::error::describe(&error)
                ));
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn open_paths(options: &Options, paths: &[PathBuf], monitor: &dyn Monitor) -> Result<Self> {
        let scope = Scope {
            paths: paths.to_owned(),
            exclude: Vec::new(),
            index: options.index.clone(),
            memory_bytes: options.memory_bytes,
        };
        let prepared = prepare(&scope, Purpose::Look, monitor)?;
        if uuid_at(&options.to) != Some(prepared.fs.uuid()) {
            return Err(Error::TwoFilesystems {
                first: options.to.clone(),
                second: paths.first().cloned().unwrap_or_default(),
            });
        }
        Ok(Self {
            prepared,
            index: options.index.clone(),
        })
    }

    fn fs(&self) -> &dyn Filesystem {
        &*self.prepared.fs
    }

    /// Looks for wanted blocks by the fingerprints that the archive announces.
    pub(super) fn find<'a>(
        &self,
        wanted: &[Range<StoreBlock>],
        announced: impl Iterator<Item = &'a Announced>,
        monitor: &dyn Monitor,
    ) -> Result<Vec<Seeded>> {
        monitor.phase("Looking for blocks that are here already", 0);
        let end = wanted.last().map_or(0, |range| range.end) as usize;
        let facts = &self.prepared.facts;
        let (mut fingerprints, mut known) = (facts.fingerprints.alike(end), SlotSet::new(end));
        for one in announced.filter(|one| one.function == self.fs().function() && (one.first as usize) < end) {
            let length = end.saturating_sub(one.first as usize).min(one.fingerprints.len());
            fingerprints.write(one.first, &one.fingerprints[..length]);
            known.insert_range(one.first..one.first + u32::try_from(length).unwrap_or(0));
        }
        let found = find_seeds(facts, wanted, &fingerprints, |block| known.contains(block));
        for all in [&fingerprints, &facts.fingerprints] {
            all.check()
                .map_err(Error::io("use the file of fingerprints in", &self.index))?;
        }
        Ok(found.iter().flat_map(|seeded| self.without_tails(seeded)).collect())
    }

    /// What of a match can be cloned: the kernel clones the last, partial block of a file to the end of another only.
    fn without_tails(&self, seeded: &Seeded) -> Vec<Seeded> {
        let mut parts: Vec<Seeded> = Vec::new();
        for (slot, place) in self.prepared.facts.places_of(seeded.slot..seeded.slot + seeded.blocks) {
            let whole = self.fs().image(place.image).size / BLOCK_BYTES;
            let blocks = whole.saturating_sub(u64::from(place.file_block));
            let blocks = u32::try_from(blocks).unwrap_or(u32::MAX).min(place.blocks);
            match parts.last_mut() {
                Some(last) if last.slot + last.blocks == slot => last.blocks += blocks,
                _ => parts.push(Seeded {
                    first: seeded.first + (slot - seeded.slot),
                    blocks,
                    slot,
                }),
            }
        }
        parts.retain(|part| part.blocks > 0);
        parts
    }

    /// Reads what was found and keeps what has the hashes of the archive.
    pub(super) fn prove(
        &self,
        found: &[Seeded],
        hashes: &mut StoredHashes<'_>,
        monitor: &dyn Monitor,
    ) -> Result<Vec<Seeded>> {
        monitor.phase(
            "Checking blocks that are here already",
            found.iter().map(|one| bytes(one.blocks)).sum(),
        );
        let mut kept = Vec::new();
        for one in found {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            for part in range::parts(one.first..one.first + one.blocks, PROVED_BLOCKS) {
                let slot = one.slot + (part.start - one.first);
                let length = bytes(part.end - part.start);
                if let Ok(content) = self.content(slot, part.end - part.start) {
                    for range in proved(part.clone(), &content, hashes)? {
                        kept.push(Seeded {
                            first: range.start,
                            blocks: range.end - range.start,
                            slot: slot + (range.start - part.start),
                        });
                    }
                }
                monitor.advance(length);
            }
        }
        Ok(kept)
    }

    /// The content of some slots.
    pub(super) fn content(&self, slot: u32, blocks: u32) -> Result<Vec<u8>> {
        let mut content = vec![0; blocks as usize * BLOCK_LEN];
        let mut rest = &mut content[..];
        for (_, place) in self.prepared.facts.places_of(slot..slot + blocks) {
            let (part, after) = rest.split_at_mut(place.blocks as usize * BLOCK_LEN);
            let (file, offset) = (SourceFile::Image(place.image), bytes(place.file_block));
            self.fs().read_ahead(file, offset, part.len() as u64);
            self.fs().read(file, offset, part)?;
            self.fs().drop_behind(file, offset, part.len() as u64);
            rest = after;
        }
        Ok(content)
    }

    /// Makes the staging file share what was found, and proves it once more there. Returns the bytes that hold.
    pub(super) fn clone_into(
        &self,
        seeded: &Seeded,
        staging: &mut Staging,
        hashes: &mut StoredHashes<'_>,
        monitor: &dyn Monitor,
    ) -> Result<u64> {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let mut kept = 0;
        for part in range::parts(seeded.first..seeded.first + seeded.blocks, PROVED_BLOCKS) {
            if part.clone().all(|block| staging.has(block)) {
                continue;
            }
            let slot = seeded.slot + (part.start - seeded.first);
            if !self.share(slot, part.clone(), staging) {
                continue;
            }
            for range in prove(staging, part, hashes)? {
                kept += bytes(range.end - range.start);
                monitor.advance(bytes(range.end - range.start));
                staging.added(range)?;
            }
        }
        Ok(kept)
    }

    /// Makes a range of the staging file share some slots. False if the filesystem refuses: then the blocks are fetched.
    pub(super) fn share(&self, slot: u32, range: Range<StoreBlock>, staging: &Staging) -> bool {
        let slots = slot..slot + (range.end - range.start);
        self.prepared.facts.places_of(slots).all(|(at, place)| {
            let to = bytes(range.start + (at - slot));
            let (offset, length) = (bytes(place.file_block), bytes(place.blocks));
            self.fs()
                .clone_range(place.image, offset, staging.file(), to, length)
                .is_ok()
        })
    }
}

/// Whether there can be any seeds: some are named, or there is an index of the filesystem.
pub(super) fn are_possible(options: &Options) -> bool {
    let knows = |uuid| index::exists(&options.index, uuid);
    !options.seeds.is_empty() || uuid_at(&options.to).is_some_and(knows)
}

/// Images that the index knows to hold wanted chunks, those with most of them: of the subvolume that is restored to, or of the XFS. None
/// where the index or the filesystem cannot tell.
fn known_images<'a>(
    options: &Options,
    wanted: &[Range<StoreBlock>],
    announced: impl Iterator<Item = &'a Announced>,
    monitor: &dyn Monitor,
) -> Option<Vec<PathBuf>> {
    /// More of them would bring little.
    const IMAGES_MAX: usize = 64;
    let uuid = uuid_at(&options.to)?;
    if !index::exists(&options.index, uuid) || !may_find_holders(&options.to) {
        return None;
    }
    let ids = weak_ids(wanted, announced);
    let index = index::open(&options.index, uuid, None, monitor).ok()?;
    let addresses = index.extents_with(&|id| ids.contains(&id)).ok()?;
    drop(index);
    let mut chosen = images_holding(&options.to, addresses, monitor)?;
    chosen.sort_unstable_by(|a, b| b.cmp(a));
    chosen.truncate(IMAGES_MAX);
    Some(chosen.into_iter().map(|(_, path)| path).collect())
}

/// The weak ids of the chunks that have wanted blocks.
fn weak_ids<'a>(wanted: &[Range<StoreBlock>], announced: impl Iterator<Item = &'a Announced>) -> HashSet<u64> {
    let mut ids = HashSet::new();
    for one in announced {
        let mut at = 0;
        for blocks in &one.chunks {
            let (start, end) = (at, at + usize::from(*blocks));
            at = end;
            let first = one.first + u32::try_from(start).unwrap_or(0);
            let from = wanted.partition_point(|range| range.end <= first);
            if wanted
                .get(from)
                .is_some_and(|range| range.start < first + u32::from(*blocks))
            {
                ids.extend(one.fingerprints.get(start..end).map(weak_id));
            }
        }
    }
    ids
}
