//! What an export writes of images: their runs before and after their blocks were read, and what a COMMIT lists of them.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use crate::archive::list::ImageSummary;
use crate::archive::manifest::{ArchivedFolder, ArchivedImage, PlanContents, PlanPart};
use crate::archive::record::BlockHasher;
use crate::block::NumberSet;
use crate::content::{Content, Run, push_run};
use crate::error::{Error, Result};
use crate::exec::export::{ExportOutcome, RecordWriter};
use crate::exec::hashes::{HashLog, StoredHashes, digest};
use crate::monitor::Monitor;
use crate::numbers::{ImageId, Slot, StoreBlock};
use crate::plan::export::{ExportPiece, ExportPlan, ExportSource, UsedBlocks};
use crate::range;
use crate::spill::SpillVec;

/// The runs of an image. If its data lies in metadata, its first block is put into them.
pub(super) fn with_inline(mut runs: SpillVec<Run>, place: usize, outcome: &ExportOutcome) -> SpillVec<Run> {
    let image = ImageId::at(place);
    if let Some(inline) = outcome.inline.iter().find(|inline| inline.image == image) {
        replace_first(&mut runs, inline.block);
    }
    runs
}

/// The plan's pieces, with corrections in the place of what the plan supposed.
pub(super) fn corrected(plan: &ExportPlan, corrections: &[ExportPiece]) -> SpillVec<ExportPiece> {
    let mut corrections = corrections.iter().peekable();
    let mut pieces = SpillVec::with_capacity_in(plan.pieces.len(), plan.pieces.budget());
    for piece in &plan.pieces {
        let mut at = piece.slot;
        let part = |from: Slot, to: Slot| ExportPiece {
            slot: from,
            blocks: to - from,
            source: match (piece.source, piece.content_at(from)) {
                (ExportSource::Known(_), Content::Stored(first)) => ExportSource::Known(first),
                (ExportSource::Same(_), Content::Stored(first)) => ExportSource::Same(first),
                (ExportSource::New(_), Content::Stored(first)) => ExportSource::New(first),
                (other, _) => other,
            },
        };
        while let Some(correction) = corrections.next_if(|correction| correction.slot < piece.end()) {
            if correction.slot > at {
                pieces.push(part(at, correction.slot));
            }
            pieces.push(*correction);
            at = correction.end();
        }
        if at < piece.end() {
            pieces.push(part(at, piece.end()));
        }
    }
    pieces
}

/// Replaces the first block in the runs of an image by a block of the store, or by zeros.
fn replace_first(runs: &mut SpillVec<Run>, block: Option<StoreBlock>) {
    let content = block.map_or(Content::Zeros, Content::Stored);
    let mut replaced = SpillVec::new_in(runs.budget());
    replaced.push(Run { blocks: 1, content });
    let mut rest = runs.iter();
    if let Some(first) = rest.next() {
        push_run(
            &mut replaced,
            first.part(1.min(first.blocks), first.blocks.saturating_sub(1)),
        );
    }
    rest.for_each(|run| push_run(&mut replaced, *run));
    *runs = replaced;
}

/// Writes images and their runs, those of `left_out` excepted, as a part of a PLAN. Returns how many runs each of them has.
pub(super) fn put_images(
    part: PlanPart,
    (folders, images): (&[ArchivedFolder], &[ArchivedImage]),
    left_out: &BTreeSet<usize>,
    runs_of: impl Fn(usize) -> SpillVec<Run>,
    records: &mut RecordWriter<'_>,
) -> Result<()> {
    let mut contents = PlanContents::default();
    for folder in folders {
        contents.folder(folder);
    }
    for (place, image) in images.iter().enumerate().filter(|(place, _)| !left_out.contains(place)) {
        contents.image(image);
        contents.runs(image.number, 0, &runs_of(place));
        records.put_images(part, &mut contents, false)?;
    }
    records.put_images(part, &mut contents, true)
}

/// Makes the summary of each image for the COMMIT.
pub(super) struct Summarizer<'a> {
    /// The hashes of new blocks.
    log: &'a HashLog,
    /// The hashes of blocks of earlier commits.
    old_hashes: StoredHashes<'a>,
    /// New blocks that belong to an image so far.
    counted: NumberSet<u32>,
    /// The addresses that images refer to.
    used: UsedBlocks,
    /// The archive, for messages.
    archive: &'a Path,
    hasher: &'a BlockHasher,
    monitor: &'a dyn Monitor,
}

impl<'a> Summarizer<'a> {
    pub(super) fn new(
        log: &'a HashLog,
        old_hashes: StoredHashes<'a>,
        archive: &'a Path,
        (hasher, monitor): (&'a BlockHasher, &'a dyn Monitor),
    ) -> Self {
        Self {
            counted: NumberSet::new((log.end() - old_hashes.end()) as usize),
            used: UsedBlocks::new(log.end()),
            log,
            old_hashes,
            archive,
            hasher,
            monitor,
        }
    }

    /// The summaries of all images but those of `left_out`, and the store addresses that they refer to.
    pub(super) fn all(
        mut self,
        images: &[ArchivedImage],
        left_out: &BTreeSet<usize>,
        runs_of: impl Fn(usize) -> SpillVec<Run>,
    ) -> Result<(Vec<ImageSummary>, Vec<Range<StoreBlock>>)> {
        let mut summaries = Vec::new();
        for (place, image) in images.iter().enumerate().filter(|(place, _)| !left_out.contains(place)) {
            summaries.push(self.summary(image, &runs_of(place))?);
        }
        if summaries.is_empty() && !images.is_empty() {
            return Err(Error::Usage(
                "every image is in more pieces than an archive takes".into(),
            ));
        }
        Ok((summaries, self.used.ranges()))
    }

    /// How much data an image has, how much of that is new to the archive, and its digest.
    fn summary(&mut self, image: &ArchivedImage, runs: &[Run]) -> Result<ImageSummary> {
        /// Hashes that are read at a time, because a run may be as long as the image.
        const PART_BLOCKS: u32 = 1 << 16;
        let first_new = self.old_hashes.end();
        let (mut data_blocks, mut new_blocks) = (0u64, 0u64);
        for run in runs {
            if let Content::Stored(first) = run.content {
                data_blocks += u64::from(run.blocks);
                self.used.add(first..first + run.blocks);
                for block in range::each(first.max(first_new)..first + run.blocks) {
                    if !self.counted.contains(block - first_new) {
                        self.counted.insert(block - first_new);
                        new_blocks += 1;
                    }
                }
            }
        }
        let (log, old_hashes, archive) = (self.log, &mut self.old_hashes, self.archive);
        let made_with = (self.hasher, self.monitor);
        let digest = digest(runs, image.size, made_with, |first, blocks, digest| {
            let old_blocks = first_new.saturating_sub(first).min(blocks);
            if !old_hashes.add_to(digest, first, old_blocks)? {
                return Err(Error::Damaged {
                    path: archive.to_owned(),
                    range: None,
                    problem: "hashes of blocks that its images refer to are lost".into(),
                });
            }
            let mut at = first + old_blocks;
            while at < first + blocks {
                let part = PART_BLOCKS.min(first + blocks - at);
                digest.update(&log.read(at, part)?)?;
                at += part;
            }
            Ok(())
        })?;
        Ok(ImageSummary {
            number: image.number,
            path: image.path().to_owned(),
            size: image.size,
            data_blocks,
            new_blocks,
            digest,
        })
    }
}
