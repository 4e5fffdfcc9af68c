//! Images on the disk that have blocks in common with what is restored.

use std::ops::Range;

use super::{Options, parts, prove, proved};
use crate::archive::StoreBlock;
use crate::archive::manifest::Announced;
use crate::block::{BLOCK_LEN, SlotSet, bytes};
use crate::error::{Error, Result};
use crate::exec::hashes::StoredHashes;
use crate::exec::restore::staging::Staging;
use crate::fs::btrfs::{Btrfs, Purpose};
use crate::fs::{Sharing, SourceFile};
use crate::monitor::Monitor;
use crate::ops::{Prepared, Scope, prepare};
use crate::plan::import::{Seeded, find_seeds};

/// Seeds that were opened and fingerprinted.
pub(super) struct Seeds {
    prepared: Prepared,
}

impl Seeds {
    /// Opens the seeds that were named; none if there are none, or extents cannot be shared.
    pub(super) fn open(options: &Options, shares: bool, monitor: &dyn Monitor) -> Result<Option<Self>> {
        if options.seeds.is_empty() || !shares {
            return Ok(None);
        }
        let scope = Scope {
            paths: options.seeds.clone(),
            exclude: Vec::new(),
            index: options.index.clone(),
            memory_bytes: options.memory_bytes,
        };
        let prepared = prepare(&scope, Purpose::Look, monitor)?;
        let existing = options
            .to
            .ancestors()
            .find(|folder| folder.exists())
            .unwrap_or(&options.to);
        let (_, here) =
            Btrfs::open(&[], &[existing.to_owned()], Purpose::Look).map(|(fs, skipped)| (skipped, fs.uuid()))?;
        if here != prepared.fs.uuid() {
            return Err(Error::TwoFilesystems {
                first: options.to.clone(),
                second: options.seeds.first().cloned().unwrap_or_default(),
            });
        }
        Ok(Some(Self { prepared }))
    }

    fn fs(&self) -> &Btrfs {
        &self.prepared.fs
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
        for one in announced.filter(|one| one.function == self.fs().function()) {
            let length = end.saturating_sub(one.first as usize).min(one.fingerprints.len());
            fingerprints.write(one.first, &one.fingerprints[..length]);
            known.insert_range(one.first..one.first + u32::try_from(length).unwrap_or(0));
        }
        let found = find_seeds(facts, wanted, &fingerprints, |block| known.contains(block));
        for all in [&fingerprints, &facts.fingerprints] {
            all.check()
                .map_err(|error| Error::Usage(format!("the file of fingerprints failed: {error}")))?;
        }
        Ok(found)
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
            for part in parts(one.first..one.first + one.blocks) {
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
        for part in parts(seeded.first..seeded.first + seeded.blocks) {
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
                .clone_from_image(place.image, offset, staging.file(), to, length)
                .is_ok()
        })
    }
}
