//! Stores a backup that another program made in an archive. Its blocks come once, and in no order that a plan could know before: each batch of new
//! ones is announced, written and indexed as it comes, and the images follow when all of them are known. Memory holds three batches.

use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use rayon::prelude::*;

use super::records::{FRAME_BYTES, INDEX_BLOCKS, PackWriter, RecordWriter, announce, compress};
use crate::archive::record::{BlockHasher, Hash};
use crate::block::BLOCK_LEN;
use crate::chunk::Chunker;
use crate::error::{Error, Result};
use crate::exec::restore::backup::BackupSource;
use crate::exec::restore::deliver_all;
use crate::exec::restore::source::{BlockSink, BlockSource, SourceFrame};
use crate::fingerprint::FingerprintFunction;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::plan::restore::Contents;

/// Bytes of new blocks that are announced, compressed and written together.
const BATCH_BYTES: usize = 16 << 20;

/// How the blocks of a backup are stored.
#[derive(Debug, Clone)]
pub struct BackupSettings {
    /// The address of the first new block.
    pub first_new: StoreBlock,
    /// The function of the fingerprints by which later exports find the blocks.
    pub function: FingerprintFunction,
    /// The compression level of zstd.
    pub level: i32,
    /// What hashes blocks in the archive.
    pub hasher: BlockHasher,
}

/// Reads a backup to its end, and stores its new blocks. Meanwhile the batch before is compressed and written. Returns what the backup holds.
///
/// # Errors
/// Those of reading the backup; what [`RecordWriter::failed`] makes of an error if the archive cannot be written.
pub fn store_backup(
    source: &mut BackupSource<'_>,
    settings: BackupSettings,
    records: &mut RecordWriter<'_>,
    monitor: &dyn Monitor,
) -> Result<Arc<Contents>> {
    let (sender, receiver) = sync_channel(1);
    let (read, written) = std::thread::scope(|scope| {
        let writer = scope.spawn(move || BatchWriter::new(settings, records).write_all(&receiver));
        let mut sink = BatchSink {
            batch: Vec::new(),
            sender: Some(sender),
            monitor,
        };
        let read = deliver_all(source, &mut sink, |_| Ok(()), monitor);
        let read = read.and_then(|contents| sink.send().map(|()| contents));
        sink.sender = None;
        let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (read, written)
    });
    // Reading stops where writing has failed.
    written?;
    let contents = read?;
    match source.stopped() {
        Some(stopped) => Err(stopped.error),
        None => Ok(contents),
    }
}

/// Collects new blocks, and hands full batches to the thread that writes them.
struct BatchSink<'a> {
    batch: Vec<u8>,
    /// It is `None` once no more comes.
    sender: Option<SyncSender<Vec<u8>>>,
    monitor: &'a dyn Monitor,
}

impl BatchSink<'_> {
    /// Hands over what was collected.
    fn send(&mut self) -> Result<()> {
        let batch = std::mem::take(&mut self.batch);
        if batch.is_empty() {
            return Ok(());
        }
        let sent = self.sender.as_ref().map(|sender| sender.send(batch));
        // The thread ends early only with an error, which is then returned in the place of this one.
        sent.and_then(std::result::Result::ok).ok_or(Error::Interrupted)
    }
}

impl BlockSink for BatchSink<'_> {
    fn missing(&self, range: Range<StoreBlock>) -> Vec<Range<StoreBlock>> {
        vec![range]
    }

    fn take(&mut self, frames: &[SourceFrame<'_>]) -> Result<Vec<(usize, Error)>> {
        if self.monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        for frame in frames {
            let content = (frame.content)()?;
            self.monitor.advance(content.len() as u64);
            self.batch.extend(content);
        }
        if self.batch.len() >= BATCH_BYTES {
            self.send()?;
        }
        Ok(Vec::new())
    }

    fn prove(&mut self, _: StoreBlock, _: &[Hash]) -> Result<bool> {
        Ok(true)
    }
}

/// Writes batches of new blocks.
struct BatchWriter<'a, 'b> {
    settings: BackupSettings,
    /// The hashes of the blocks from `first_hash` on, of which an INDEX is still to be written.
    hashes: Vec<Hash>,
    first_hash: StoreBlock,
    packer: PackWriter,
    chunker: Chunker,
    records: &'a mut RecordWriter<'b>,
}

impl<'a, 'b> BatchWriter<'a, 'b> {
    fn new(settings: BackupSettings, records: &'a mut RecordWriter<'b>) -> Self {
        Self {
            hashes: Vec::new(),
            first_hash: settings.first_new,
            packer: PackWriter::new(settings.first_new),
            chunker: Chunker::default(),
            settings,
            records,
        }
    }

    fn write_all(mut self, batches: &Receiver<Vec<u8>>) -> Result<()> {
        for batch in batches {
            self.write(&batch)?;
        }
        let (first, hashes) = (self.first_hash, &self.hashes);
        self.packer
            .finish(&|block, blocks| Ok(part_of(hashes, first, block, blocks)), self.records)
    }

    fn write(&mut self, batch: &[u8]) -> Result<()> {
        let first = self.first_hash + u32::try_from(self.hashes.len()).unwrap_or(u32::MAX);
        let (function, hasher) = (self.settings.function, &self.settings.hasher);
        let made: Vec<(Hash, u32)> = batch
            .par_chunks_exact(BLOCK_LEN)
            .map(|block| (hasher.of(block), function.of(block)))
            .collect();
        let (hashes, fingerprints): (Vec<Hash>, Vec<u32>) = made.into_iter().unzip();
        self.hashes.extend(hashes);
        let mut chunks = Vec::new();
        self.chunker.cut(&fingerprints, |chunk| {
            chunks.push(u8::try_from(chunk.blocks).unwrap_or(u8::MAX));
        });
        let announced = |block: StoreBlock, blocks: u32| {
            let at = (block - first) as usize;
            fingerprints[at..at + blocks as usize].to_vec()
        };
        announce(function, first, &chunks, announced, self.records)?;
        let frames = compress(self.settings.level, &frames_of(batch, &chunks)).map_err(self.records.failed)?;
        let (first, hashes) = (self.first_hash, &self.hashes);
        self.packer.add(
            frames,
            &|block, blocks| Ok(part_of(hashes, first, block, blocks)),
            self.records,
        )?;
        let indexed = self.packer.indexed_end() - self.first_hash;
        self.hashes.drain(..indexed as usize);
        self.first_hash += indexed;
        debug_assert!(self.hashes.len() <= INDEX_BLOCKS as usize + (1 << 18));
        Ok(())
    }
}

/// The hashes of blocks from an address on. `hashes` begins with that of `first`.
fn part_of(hashes: &[Hash], first: StoreBlock, block: StoreBlock, blocks: u32) -> Vec<Hash> {
    let at = (block - first) as usize;
    hashes[at..at + blocks as usize].to_vec()
}

/// Divides a batch into frames. Each ends with a chunk.
fn frames_of(batch: &[u8], chunks: &[u8]) -> Vec<Vec<u8>> {
    let mut frames: Vec<Vec<u8>> = Vec::new();
    let mut rest = batch;
    for blocks in chunks {
        let (chunk, after) = rest.split_at(usize::from(*blocks) * BLOCK_LEN);
        rest = after;
        match frames.last_mut() {
            Some(frame) if frame.len() < FRAME_BYTES => frame.extend_from_slice(chunk),
            _ => frames.push(chunk.to_vec()),
        }
    }
    frames
}
