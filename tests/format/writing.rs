// Archives that are written record by record, as an export does, of images that no pool has.

use std::path::PathBuf;
use std::sync::Arc;

use vmfold::archive::commit::Commit;
use vmfold::archive::list::{ImageSummary, Listed};
use vmfold::archive::manifest::{ArchivedImage, PlanContents, PlanPart};
use vmfold::archive::pack::{Frame, PlacedFrame};
use vmfold::archive::record::{BlockHasher, EpochId, Hash, LaneId, hash_of};
use vmfold::archive::writer::{ArchiveWriter, EpochBase};
use vmfold::block::{BLOCK_BYTES, BLOCK_LEN};
use vmfold::content::{Content, Metadata, Run};
use vmfold::exec::hashes::digest;
use vmfold::monitor::Silent;
use vmfold::numbers::StoreBlock;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;
use vmfold::testing::simulated::{BlockContent, block_of};

/// An archive that is being written.
pub(crate) struct Writing {
    pub(crate) writer: ArchiveWriter,
    pub(crate) store: Arc<MemoryStore>,
}

impl Writing {
    pub(crate) fn new(budget: &Budget) -> Self {
        let store = Arc::new(MemoryStore::default());
        let base = EpochBase {
            lane: LaneId([3; 16]),
            ..EpochBase::default()
        };
        let writer = ArchiveWriter::begin(Arc::clone(&store) as _, base, EpochId(4), budget).unwrap();
        Self { writer, store }
    }

    /// Writes blocks from the beginning of the store on, as a PACK and an INDEX. Returns their hashes.
    pub(crate) fn put_blocks(&mut self, blocks: &[BlockContent]) -> Vec<Hash> {
        let plain: Vec<u8> = blocks.iter().flat_map(|content| block_of(*content)).collect();
        let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
        let placed = PlacedFrame {
            first: StoreBlock(0),
            frame: Frame::compress(&plain, &mut compressor).unwrap(),
        };
        let hashes: Vec<Hash> = plain.chunks_exact(BLOCK_LEN).map(hash_of).collect();
        self.writer.put_pack(&[placed], false).unwrap();
        self.writer.put_index(StoreBlock(0), &hashes).unwrap();
        hashes
    }

    /// Writes images and their runs.
    pub(crate) fn put_images(&mut self, part: PlanPart, images: &[(ArchivedImage, Vec<Run>)]) {
        let mut contents = PlanContents::default();
        for (image, runs) in images {
            contents.image(image);
            contents.runs(image.number, 0, runs);
        }
        let parts = contents.finish();
        for (number, content) in (1..).zip(&parts) {
            self.writer.put_images(part, number == parts.len(), content).unwrap();
        }
    }

    /// Commits images, which were written. Returns the archive, or why it was not committed.
    pub(crate) fn finish(
        mut self,
        commit: Commit,
        images: &[(ArchivedImage, Vec<Run>)],
        hashes: &[Hash],
    ) -> std::io::Result<Vec<u8>> {
        let summaries: Vec<ImageSummary> = images
            .iter()
            .map(|(image, runs)| summary(image, runs, hashes))
            .collect();
        let listed = Listed {
            uses: vec![StoreBlock(0)..commit.store_end],
            ..Listed::default()
        };
        self.writer.finish(commit, listed, &summaries)?;
        Ok(self.store.to_vec())
    }
}

/// Returns an archive of images whose runs refer to these blocks. `more` writes what it has beside them.
pub(crate) fn written(
    images: &[(ArchivedImage, Vec<Run>)],
    blocks: &[BlockContent],
    more: impl FnOnce(&mut ArchiveWriter),
) -> Vec<u8> {
    let mut writing = Writing::new(&Budget::default());
    writing.put_images(PlanPart::Planned, images);
    let hashes = writing.put_blocks(blocks);
    more(&mut writing.writer);
    writing.put_images(PlanPart::Final, images);
    let commit = Commit {
        store_end: StoreBlock(u32::try_from(blocks.len()).unwrap()),
        ..Commit::default()
    };
    writing.finish(commit, images, &hashes).unwrap()
}

/// An image of so many blocks.
pub(crate) fn image(number: u32, blocks: u32) -> ArchivedImage {
    ArchivedImage {
        number,
        names: vec![PathBuf::from(format!("f{}/{number}.img", number % 100))],
        size: u64::from(blocks) * BLOCK_BYTES,
        metadata: Metadata::default(),
    }
}

fn summary(image: &ArchivedImage, runs: &[Run], hashes: &[Hash]) -> ImageSummary {
    let stored = |run: &&Run| matches!(run.content, Content::Stored(_));
    let of_store = |first: StoreBlock, blocks: u32, digest: &mut vmfold::exec::hashes::Digest<'_>| {
        let hashes = hashes.iter().skip(first.index()).take(blocks as usize).copied();
        digest.update(&hashes.collect::<Vec<_>>())
    };
    ImageSummary {
        number: image.number,
        path: image.path().to_owned(),
        size: image.size,
        data_blocks: runs.iter().filter(stored).map(|run| u64::from(run.blocks)).sum(),
        new_blocks: 0,
        digest: digest(
            runs,
            image.size,
            (&BlockHasher::default(), &Silent::default()),
            of_store,
        )
        .unwrap(),
    }
}
