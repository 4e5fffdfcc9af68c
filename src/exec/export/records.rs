//! Writes what an export stores as records: frames in PACKs, hashes in INDEX records, and what PLAN records say of both.

use rayon::prelude::*;

use crate::archive::announced::AnnouncedBlocks;
use crate::archive::limits::{FRAMES_MAX, PACK_BLOCKS_MAX};
use crate::archive::manifest::{PlanContents, PlanPart};
use crate::archive::pack::{Frame, PlacedFrame};
use crate::archive::record::Hash;
use crate::archive::writer::ArchiveWriter;
use crate::error::{Error, Result};
use crate::fingerprint::FingerprintFunction;
use crate::numbers::StoreBlock;

/// Uncompressed bytes after which a frame ends. It ends with a chunk, so its last chunk may go beyond.
pub(super) const FRAME_BYTES: usize = 1 << 20;
/// Compressed bytes after which a PACK ends in an archive that is not sealed. A PACK of corrected blocks ends after as many uncompressed bytes.
pub(super) const PACK_BYTES: usize = 8 << 20;
/// Frames after which a PACK ends, however small they are: then it covers a GiB of blocks.
const PACK_FRAMES: usize = 1024;
const _: () = assert!(PACK_FRAMES <= FRAMES_MAX);
/// Blocks that an INDEX covers. The last one may cover fewer.
pub(super) const INDEX_BLOCKS: u32 = 1 << 16;

/// Writes records, and makes errors of writing those of the library.
pub struct RecordWriter<'a> {
    /// The writer of the archive.
    pub writer: &'a mut ArchiveWriter,
    /// Makes an [`Error`] that names the archive from an I/O error.
    pub failed: &'a (dyn Fn(std::io::Error) -> Error + Sync),
}

impl RecordWriter<'_> {
    /// Writes the PLAN records of images that are full. With `all` it writes whatever there is, and ends the part.
    ///
    /// # Errors
    /// What `failed` makes of an error of [`ArchiveWriter::put_images`].
    pub fn put_images(&mut self, part: PlanPart, contents: &mut PlanContents, all: bool) -> Result<()> {
        let mut full = if all {
            std::mem::take(contents).finish()
        } else {
            contents.take_full()
        };
        if all && full.is_empty() {
            full.push(Vec::new());
        }
        let count = full.len();
        for (number, content) in (1..).zip(full) {
            let last = all && number == count;
            self.writer.put_images(part, last, &content).map_err(self.failed)?;
        }
        Ok(())
    }

    /// Writes a PACK. `is_full` says that no other frame fits into it.
    pub(super) fn put_frames(&mut self, frames: &[PlacedFrame], is_full: bool) -> Result<()> {
        self.writer.put_pack(frames, is_full).map_err(self.failed)
    }

    pub(super) fn put_index(&mut self, first: StoreBlock, hashes: &[Hash]) -> Result<()> {
        self.writer.put_index(first, hashes).map_err(self.failed)
    }
}

/// Writes PLAN records that announce new blocks, from `first` on: the lengths of their chunks, and their fingerprints.
///
/// # Errors
/// What `failed` makes of an error of [`ArchiveWriter::put_announced`].
pub fn announce(
    function: FingerprintFunction,
    mut first: StoreBlock,
    chunks: &[u8],
    fingerprints: impl Fn(StoreBlock, u32) -> Vec<u32>,
    records: &mut RecordWriter<'_>,
) -> Result<()> {
    /// Blocks after which a record ends. It ends with a chunk, so its last chunk may go beyond.
    const BLOCKS: u32 = 1 << 18;
    let mut rest = chunks;
    while !rest.is_empty() {
        let (mut count, mut blocks) = (0, 0);
        while count < rest.len() && blocks < BLOCKS {
            blocks += u32::from(rest[count]);
            count += 1;
        }
        let (chunks, after) = rest.split_at(count);
        rest = after;
        let announced = AnnouncedBlocks {
            first,
            function,
            chunks: chunks.to_vec(),
            fingerprints: fingerprints(first, blocks),
        };
        records.writer.put_announced(&announced).map_err(records.failed)?;
        first += blocks;
    }
    Ok(())
}

/// Compresses frames on all cores.
pub(super) fn compress(level: i32, frames: &[Vec<u8>]) -> std::io::Result<Vec<Frame>> {
    frames
        .par_iter()
        .map_init(
            || zstd::bulk::Compressor::new(level),
            |compressor, frame| match compressor {
                Ok(compressor) => Frame::compress(frame, compressor),
                Err(error) => Err(std::io::Error::other(error.to_string())),
            },
        )
        .collect()
}

/// Gives the hashes of new blocks, so many from an address on.
pub(super) type HashesOf<'a> = dyn Fn(StoreBlock, u32) -> Result<Vec<Hash>> + Sync + 'a;

/// Writes compressed frames as PACK records, and the hashes of their blocks as INDEX records.
pub(super) struct PackWriter {
    /// The frames of the PACK that is being filled.
    frames: Vec<PlacedFrame>,
    /// The compressed bytes of these frames.
    stored_bytes: usize,
    /// The store address after the last block that is in a PACK.
    packed_end: StoreBlock,
    /// The store address after the last block of the frames.
    end: StoreBlock,
    /// The store address after the last block that an INDEX covers.
    indexed_end: StoreBlock,
}

impl PackWriter {
    pub(super) fn new(first: StoreBlock) -> Self {
        Self {
            frames: Vec::new(),
            stored_bytes: 0,
            packed_end: first,
            end: first,
            indexed_end: first,
        }
    }

    /// Adds frames, and writes each PACK that is full and each INDEX whose blocks are all in a PACK.
    pub(super) fn add(
        &mut self,
        frames: Vec<Frame>,
        hashes: &HashesOf<'_>,
        records: &mut RecordWriter<'_>,
    ) -> Result<()> {
        for frame in frames {
            if (self.end - self.packed_end) + u32::from(frame.blocks) > PACK_BLOCKS_MAX {
                self.end_pack(false, records)?;
            }
            if (records.writer).is_pack_full(self.frames.len(), self.stored_bytes, frame.stored_bytes()) {
                self.end_pack(true, records)?;
            }
            self.stored_bytes += frame.stored_bytes();
            let first = self.end;
            self.end += u32::from(frame.blocks);
            self.frames.push(PlacedFrame { first, frame });
            let is_long = self.stored_bytes >= PACK_BYTES || self.frames.len() >= PACK_FRAMES;
            if is_long && !records.writer.is_sealed() || self.frames.len() >= FRAMES_MAX {
                self.end_pack(false, records)?;
            }
        }
        while self.packed_end - self.indexed_end >= INDEX_BLOCKS {
            self.put_index(INDEX_BLOCKS, hashes, records)?;
        }
        Ok(())
    }

    /// The store address after the last block that an INDEX covers.
    pub(super) fn indexed_end(&self) -> StoreBlock {
        self.indexed_end
    }

    /// Writes the PACK that is being filled, if it has any frames. `is_full` says that another one would make it too long.
    fn end_pack(&mut self, is_full: bool, records: &mut RecordWriter<'_>) -> Result<()> {
        records.put_frames(&self.frames, is_full)?;
        self.frames.clear();
        self.stored_bytes = 0;
        self.packed_end = self.end;
        Ok(())
    }

    /// Writes an INDEX for the next blocks.
    fn put_index(&mut self, blocks: u32, hashes: &HashesOf<'_>, records: &mut RecordWriter<'_>) -> Result<()> {
        records.put_index(self.indexed_end, &hashes(self.indexed_end, blocks)?)?;
        self.indexed_end += blocks;
        Ok(())
    }

    /// Writes the last PACK and the INDEX records that are still missing.
    pub(super) fn finish(&mut self, hashes: &HashesOf<'_>, records: &mut RecordWriter<'_>) -> Result<()> {
        self.end_pack(false, records)?;
        while self.end > self.indexed_end {
            self.put_index(INDEX_BLOCKS.min(self.end - self.indexed_end), hashes, records)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::archive::record::{HEADER_BYTES, RecordHeader, RecordKind, find_magic};
    use crate::archive::writer::EpochBase;
    use crate::archive::{pack, record::EpochId};
    use crate::block::BLOCK_LEN;
    use crate::exec::hashes::HashLog;
    use crate::spill::Budget;
    use crate::store::Store;

    /// A store that keeps nothing but the headers of records, and what PACKs say of themselves.
    #[derive(Debug, Default)]
    struct Headers {
        packs: Mutex<Vec<(u32, u32)>>,
        index_blocks: Mutex<Vec<u64>>,
    }

    impl Store for Headers {
        fn path(&self) -> &Path {
            Path::new("headers")
        }

        fn length(&self) -> io::Result<Option<u64>> {
            Ok(Some(0))
        }

        fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<usize> {
            Ok(0)
        }

        fn append(&self, bytes: &[u8]) -> io::Result<()> {
            if find_magic(bytes) != Some(0) {
                return Ok(());
            }
            let header = RecordHeader::decode(bytes.first_chunk().unwrap()).unwrap();
            match header.kind {
                RecordKind::Pack => {
                    let body = &bytes[HEADER_BYTES..];
                    let table = pack::decode_table(body, header.body_bytes, None).unwrap();
                    self.packs
                        .lock()
                        .unwrap()
                        .push((u32::try_from(table.frames.len()).unwrap(), table.blocks));
                }
                RecordKind::Index => self.index_blocks.lock().unwrap().push(header.body_bytes / 32),
                _ => {}
            }
            Ok(())
        }

        fn settle(&self) -> io::Result<()> {
            Ok(())
        }

        fn truncate(&self, _: u64) -> io::Result<()> {
            Ok(())
        }
    }

    /// Packs so many equal frames of so many blocks of zeros, and returns the frames and blocks of each PACK.
    fn packed(frames: u32, blocks: u32) -> Vec<(u32, u32)> {
        let store = Arc::new(Headers::default());
        let begun = ArchiveWriter::begin(
            Arc::clone(&store) as _,
            EpochBase::default(),
            EpochId(1),
            &Budget::default(),
        );
        let mut writer = begun.unwrap();
        let failed = |error: io::Error| Error::io("write to", Path::new("headers"))(error);
        let mut records = RecordWriter {
            writer: &mut writer,
            failed: &failed,
        };
        let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
        let frame = Frame::compress(&vec![0; blocks as usize * BLOCK_LEN], &mut compressor).unwrap();
        let mut log = HashLog::new(StoreBlock(0), std::env::temp_dir());
        let hashes = vec![[7; 32]; blocks as usize];
        let mut packer = PackWriter::new(StoreBlock(0));
        for _ in 0..frames {
            log.extend(&hashes).unwrap();
            let hashes_of = |first, blocks| log.read(first, blocks);
            packer.add(vec![frame.clone()], &hashes_of, &mut records).unwrap();
            assert!(
                packer.frames.len() <= PACK_FRAMES,
                "a PACK has as many frames as it may"
            );
        }
        packer
            .finish(&|first, blocks| log.read(first, blocks), &mut records)
            .unwrap();
        let index_blocks = store.index_blocks.lock().unwrap();
        assert!(index_blocks.iter().all(|blocks| *blocks <= u64::from(INDEX_BLOCKS) + 1));
        store.packs.lock().unwrap().clone()
    }

    #[test]
    fn packs_keep_their_limits_however_well_frames_are_compressed() {
        // 12 GiB in frames of a usual size, and frames of one block.
        for (frames, blocks) in [(12 << 10, 256), (11_000, 272), (10_752, 1), (700, 1024)] {
            let packs = packed(frames, blocks);
            assert_eq!(packs.iter().map(|(_, blocks)| blocks).sum::<u32>(), frames * blocks);
            for pack in packs {
                let is_allowed = pack.0 as usize <= FRAMES_MAX && pack.1 <= PACK_BLOCKS_MAX;
                assert!(is_allowed, "{frames} frames of {blocks} blocks: {pack:?}");
            }
        }
    }

    #[test]
    fn a_frame_keeps_what_it_holds() {
        let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
        let frame = Frame::compress(&vec![0; FRAME_BYTES], &mut compressor).unwrap();
        assert!(frame.allocated_bytes() < 4096, "{}", frame.allocated_bytes());
    }
}
