//! Carries out an [`ExportPlan`]. It reads each extent that the archive does not have, once, and hashes every block. The hashes prove
//! which blocks are equal, as the plan supposed. New blocks are written as PACK and INDEX records.

pub mod backup;
mod records;

use std::collections::HashMap;

use rayon::prelude::*;

use self::records::{FRAME_BYTES, INDEX_BLOCKS, PACK_BYTES, PackWriter, compress};
pub use self::records::{RecordWriter, announce};
use super::hashes::{HashLog, StoredHashes};
use crate::archive::pack::PlacedFrame;
use crate::archive::record::{BlockHasher, Hash};
use crate::block::{BLOCK_LEN, bytes};
use crate::chunk::Chunker;
use crate::error::{Error, Result};
use crate::facts::Facts;
use crate::fingerprint::FingerprintFunction;
use crate::fs::{Filesystem, SourceFile, drop_slots_behind, read_slots_ahead, read_slots_into};
use crate::monitor::Monitor;
use crate::numbers::{ImageId, Slot, StoreBlock};
use crate::plan::export::{ExportPiece, ExportPlan, ExportSource};
use crate::range;
use crate::spill::{Budget, SpillVec};

/// Bytes of images that are read as one batch. Meanwhile the batch before it is compressed, and the one before that is written.
const BATCH_BYTES: u64 = 8 << 20;
/// Threads that are started in addition to one for each core. Threads that wait for the disk then do not keep cores idle.
const WAITING_THREADS: usize = 2;
/// The largest read, in blocks.
const READ_BLOCKS: u32 = 256;
/// Corrected blocks whose hashes are kept in memory, so that equal ones are stored once. Later ones may be stored more than once.
const CORRECTIONS_REMEMBERED: usize = 1 << 16;

/// What an export stored, as far as the plan does not say it.
#[derive(Debug)]
pub struct ExportOutcome {
    /// Ranges of slots whose blocks are not those that the plan supposed, with what they are instead. They are in the order of slots.
    pub corrections: SpillVec<ExportPiece>,
    /// The first block of each image whose data lies in metadata.
    pub inline: Vec<InlineBlock>,
    /// Hashes of all new blocks, including corrected ones and inline ones.
    pub hashes: HashLog,
    /// Bytes that were read from extents.
    pub read_bytes: u64,
}

/// The first block of an image whose data lies in metadata. No extent holds this block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InlineBlock {
    /// The image.
    pub image: ImageId,
    /// The block's store address. It is `None` if the block is all zeros.
    pub block: Option<StoreBlock>,
}

/// Settings that hold for all blocks of an export, and the images whose data lies in no extent.
#[derive(Debug, Clone, Copy)]
pub struct ExportSettings<'a> {
    /// The function that makes the fingerprints of this filesystem.
    pub function: FingerprintFunction,
    /// The compression level of zstd.
    pub level: i32,
    /// Images whose first block lies in metadata. No extent holds this block.
    pub inline: &'a [ImageId],
    /// What hashes blocks in the archive.
    pub hasher: &'a BlockHasher,
}

/// A range of slots of one extent that is read at once.
struct ReadTask {
    /// The first slot.
    slot: Slot,
    /// The length in blocks, [`READ_BLOCKS`] at most.
    blocks: u32,
    /// The indexes of the plan's pieces that the range has a part of.
    pieces: std::ops::Range<usize>,
}

impl ReadTask {
    fn slots(&self) -> std::ops::Range<Slot> {
        self.slot..self.slot + self.blocks
    }
}

/// A buffer whose address is a multiple of the block size, as direct I/O (`O_DIRECT`) requires.
#[derive(Default)]
struct AlignedBuffer {
    allocated: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// Sets the length, and returns the bytes. Their content is not specified.
    fn resize(&mut self, length: usize) -> &mut [u8] {
        if self.allocated.len() < length + BLOCK_LEN {
            self.allocated = vec![0; length + BLOCK_LEN];
        }
        self.start = self.allocated.as_ptr().align_offset(BLOCK_LEN).min(BLOCK_LEN);
        self.length = length;
        &mut self.allocated[self.start..self.start + length]
    }

    fn bytes(&self) -> &[u8] {
        &self.allocated[self.start..self.start + self.length]
    }
}

/// The blocks of a [`ReadTask`] once they are read.
#[derive(Default)]
struct ReadBlocks {
    content: AlignedBuffer,
    /// The hash of each block. It is `None` for a block of zeros where the plan says zeros.
    hashes: Vec<Option<Hash>>,
}

/// Carries a plan out. `old_hashes` has the hashes of the blocks that the archive holds already. `log` is empty, and takes those of the
/// new blocks.
///
/// # Errors
/// [`Error::Unreadable`] with path and range if an image cannot be read; what [`RecordWriter::failed`] makes of an error if the archive
/// cannot be written; [`Error::NoSpace`] or [`Error::Io`] if hashes cannot be kept in a file; [`Error::TooLarge`] if the store would get
/// too many blocks; [`Error::Interrupted`].
pub fn store_blocks(
    (fs, facts): (&dyn Filesystem, &Facts),
    plan: &ExportPlan,
    settings: ExportSettings<'_>,
    (mut old_hashes, log): (StoredHashes<'_>, HashLog),
    records: &mut RecordWriter<'_>,
    monitor: &dyn Monitor,
) -> Result<ExportOutcome> {
    let tasks = tasks(facts, plan);
    let total_bytes: u64 = tasks.iter().map(|task| bytes(task.blocks)).sum();
    monitor.phase("Reading images", total_bytes);
    let mut assembler = Assembler::new(plan, log, settings.function);
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(rayon::current_num_threads() + WAITING_THREADS)
        .build()
        .map_err(|error| {
            Error::io("start threads for", std::path::Path::new("export"))(std::io::Error::other(error))
        })?;
    let mut packer = PackWriter::new(plan.first_new);
    let mut compressed = Vec::new();
    let mut batches = batches(&tasks).peekable();
    let mut current_blocks: Vec<ReadBlocks> = Vec::new();
    let mut current_tasks: &[ReadTask] = &[];
    let mut spare_blocks: Vec<ReadBlocks> = Vec::new();
    read_ahead(fs, facts, batches.peek().copied());
    loop {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let next_tasks = batches.next();
        read_ahead(fs, facts, batches.peek().copied());
        for (task, read) in current_tasks.iter().zip(&current_blocks) {
            assembler.take(task, read, &mut old_hashes)?;
        }
        spare_blocks.append(&mut current_blocks);
        let frames = std::mem::take(&mut assembler.ready);
        let buffers = std::mem::take(&mut spare_blocks);
        let to_write = std::mem::take(&mut compressed);
        let log = |first, blocks| assembler.log.read(first, blocks);
        let (added, (new_compressed, next_blocks)) = pool.install(|| {
            rayon::join(
                || packer.add(to_write, &log, records),
                || {
                    rayon::join(
                        || compress(settings.level, &frames),
                        || {
                            next_tasks
                                .map(|tasks| read_batch((fs, facts), plan, tasks, buffers, (settings.hasher, monitor)))
                        },
                    )
                },
            )
        });
        added?;
        compressed = new_compressed.map_err(records.failed)?;
        assembler.corrected.write(settings.level, false, records)?;
        match (next_tasks, next_blocks) {
            (Some(tasks), Some(blocks)) => (current_tasks, current_blocks) = (tasks, blocks?),
            _ if assembler.ready.is_empty() && current_tasks.is_empty() && compressed.is_empty() => break,
            _ => {
                current_tasks = &[];
                assembler.end_frame();
            }
        }
    }
    packer.finish(&|first, blocks| assembler.log.read(first, blocks), records)?;
    let inline = assembler.take_inline(fs, settings, &mut old_hashes)?;
    assembler.finish(inline, total_bytes, settings.level, records)
}

fn is_zero(block: &[u8]) -> bool {
    block
        .as_chunks::<16>()
        .0
        .iter()
        .all(|part| u128::from_le_bytes(*part) == 0)
}

/// The ranges that are read, in the order of their slots, which is their order on disk. No range goes beyond an extent.
fn tasks(facts: &Facts, plan: &ExportPlan) -> SpillVec<ReadTask> {
    let mut tasks: SpillVec<ReadTask> = SpillVec::new_in(facts.budget());
    let mut extent_end = Slot(0);
    for (number, piece) in plan
        .pieces
        .iter()
        .enumerate()
        .filter(|(_, piece)| piece.source.is_read())
    {
        let mut at = piece.slot;
        while at < piece.end() {
            if at >= extent_end {
                extent_end = facts.extents[facts.extent_of(at).index()].slots().end;
            }
            let end = piece.end().min(extent_end);
            if let Some(last) = tasks.last_mut()
                && last.slot + last.blocks == at
                && last.blocks < READ_BLOCKS
                && facts.extent_of(last.slot) == facts.extent_of(at)
            {
                let more = (end - at).min(READ_BLOCKS - last.blocks);
                last.blocks += more;
                last.pieces.end = number + 1;
                at += more;
            } else {
                let blocks = (end - at).min(READ_BLOCKS);
                tasks.push(ReadTask {
                    slot: at,
                    blocks,
                    pieces: number..number + 1,
                });
                at += blocks;
            }
        }
    }
    tasks
}

/// Divides tasks into batches of [`BATCH_BYTES`] or a little more.
fn batches(tasks: &[ReadTask]) -> impl Iterator<Item = &[ReadTask]> {
    let mut rest = tasks;
    std::iter::from_fn(move || {
        let (mut count, mut total) = (0, 0);
        while count < rest.len() && total < BATCH_BYTES {
            total += bytes(rest[count].blocks);
            count += 1;
        }
        let (batch, after) = rest.split_at(count);
        rest = after;
        (!batch.is_empty()).then_some(batch)
    })
}

/// Asks the filesystem to read the blocks of tasks into the page cache.
fn read_ahead(fs: &dyn Filesystem, facts: &Facts, tasks: Option<&[ReadTask]>) {
    for task in tasks.into_iter().flatten() {
        read_slots_ahead(facts, fs, &[task.slots()]);
    }
}

/// Reads and hashes the blocks of some tasks, on all threads. The buffers in `spare` are used again.
fn read_batch(
    (fs, facts): (&dyn Filesystem, &Facts),
    plan: &ExportPlan,
    tasks: &[ReadTask],
    mut spare: Vec<ReadBlocks>,
    (hasher, monitor): (&BlockHasher, &dyn Monitor),
) -> Result<Vec<ReadBlocks>> {
    spare.resize_with(tasks.len(), ReadBlocks::default);
    tasks
        .par_iter()
        .zip(spare)
        .map(|(task, mut read)| {
            let slots = [task.slots()];
            let buffer = read.content.resize(task.blocks as usize * BLOCK_LEN);
            read_slots_into(facts, fs, &slots, buffer)?;
            drop_slots_behind(facts, fs, &slots);
            read.hashes.clear();
            let mut blocks = read.content.bytes().chunks_exact(BLOCK_LEN);
            for piece in &plan.pieces[task.pieces.clone()] {
                let (from, to) = part_of(task, piece);
                for block in blocks.by_ref().take((to - from) as usize) {
                    let is_proved = piece.source == ExportSource::Zeros && is_zero(block);
                    read.hashes.push((!is_proved).then(|| hasher.of(block)));
                }
            }
            monitor.advance(bytes(task.blocks));
            Ok(read)
        })
        .collect()
}

/// The first slot of a piece that a task covers, and the slot after the last.
fn part_of(task: &ReadTask, piece: &ExportPiece) -> (Slot, Slot) {
    (piece.slot.max(task.slot), piece.end().min(task.slot + task.blocks))
}

/// Puts new blocks into frames, and corrects the plan where a block is not the one that the plan supposed.
struct Assembler<'a> {
    plan: &'a ExportPlan,
    /// Hashes of the new blocks that the plan has, as far as they were read.
    log: HashLog,
    corrected: CorrectedBlocks,
    corrections: SpillVec<ExportPiece>,
    /// The blocks of the frame that is being filled.
    frame: Vec<u8>,
    /// Frames that are full, not compressed yet.
    ready: Vec<Vec<u8>>,
    /// Lengths in blocks of the chunks that are still to come.
    chunks: std::slice::Iter<'a, u8>,
    /// Blocks of the current chunk that are still to come.
    chunk_left: u8,
}

impl<'a> Assembler<'a> {
    fn new(plan: &'a ExportPlan, log: HashLog, function: FingerprintFunction) -> Self {
        Self {
            plan,
            log,
            corrected: CorrectedBlocks::new(plan.end, function, plan.pieces.budget()),
            corrections: SpillVec::new_in(plan.pieces.budget()),
            frame: Vec::new(),
            ready: Vec::new(),
            chunks: plan.chunks.iter(),
            chunk_left: 0,
        }
    }

    /// Writes the corrected blocks that are not written yet, with their INDEX and PLAN records, and returns what was stored.
    fn finish(
        mut self,
        inline: Vec<InlineBlock>,
        read_bytes: u64,
        level: i32,
        records: &mut RecordWriter<'_>,
    ) -> Result<ExportOutcome> {
        self.corrected.write(level, true, records)?;
        let Self {
            mut log,
            corrected,
            corrections,
            ..
        } = self;
        log.extend(&corrected.hashes)?;
        corrected.announce(records)?;
        Ok(ExportOutcome {
            corrections,
            inline,
            hashes: log,
            read_bytes,
        })
    }

    /// Takes the blocks of a task: appends new ones to frames, and compares the others with what the plan supposed.
    fn take(&mut self, task: &ReadTask, read: &ReadBlocks, old_hashes: &mut StoredHashes<'_>) -> Result<()> {
        for piece in &self.plan.pieces[task.pieces.clone()] {
            let (from, to) = part_of(task, piece);
            let at = (from - task.slot) as usize;
            let count = (to - from) as usize;
            let content = &read.content.bytes()[at * BLOCK_LEN..][..count * BLOCK_LEN];
            let hashes = &read.hashes[at..at + count];
            match piece.source {
                ExportSource::New(_) => {
                    let hashes: Vec<Hash> = hashes.iter().flatten().copied().collect();
                    self.log.extend(&hashes)?;
                    self.append(content);
                }
                ExportSource::Same(first) => {
                    let first = first + (from - piece.slot);
                    let expected = self.hashes_of(first, to - from, old_hashes)?;
                    for (n, ((hash, expected), block)) in
                        (0u32..).zip(hashes.iter().zip(&expected).zip(content.chunks_exact(BLOCK_LEN)))
                    {
                        if hash != expected {
                            self.correct(from + n, block, *hash)?;
                        }
                    }
                }
                ExportSource::Zeros => {
                    for (n, (hash, block)) in (0u32..).zip(hashes.iter().zip(content.chunks_exact(BLOCK_LEN))) {
                        if hash.is_some() {
                            self.correct(from + n, block, *hash)?;
                        }
                    }
                }
                ExportSource::Known(_) | ExportSource::KnownZeros => {}
            }
        }
        Ok(())
    }

    /// The hashes of some blocks of the store, of which some may be of earlier commits. A hash that the archive has lost is `None`.
    fn hashes_of(
        &self,
        first: StoreBlock,
        blocks: u32,
        old_hashes: &mut StoredHashes<'_>,
    ) -> Result<Vec<Option<Hash>>> {
        let before = old_hashes.end().saturating_sub(first).min(blocks);
        let mut hashes = Vec::with_capacity(blocks as usize);
        for block in range::each(first..first + before) {
            hashes.push(old_hashes.get(block)?);
        }
        if blocks > before {
            hashes.extend(self.log.read(first + before, blocks - before)?.into_iter().map(Some));
        }
        Ok(hashes)
    }

    /// Notes that a slot does not hold what the plan supposed, and stores its block unless it is all zeros.
    fn correct(&mut self, slot: Slot, block: &[u8], hash: Option<Hash>) -> Result<()> {
        let source = match hash {
            Some(hash) if !is_zero(block) => ExportSource::New(self.corrected.add(block, hash)?),
            _ => ExportSource::Zeros,
        };
        self.corrections.push(ExportPiece {
            slot,
            blocks: 1,
            source,
        });
        Ok(())
    }

    /// Reads the blocks that lie in metadata, and stores those that no earlier commit has stored.
    fn take_inline(
        &mut self,
        fs: &dyn Filesystem,
        settings: ExportSettings<'_>,
        old_hashes: &mut StoredHashes<'_>,
    ) -> Result<Vec<InlineBlock>> {
        let mut inline = Vec::new();
        let mut by_fingerprint: HashMap<u32, Vec<usize>> = HashMap::new();
        let mut blocks = Vec::new();
        for image in settings.inline {
            let mut block = vec![0; BLOCK_LEN];
            fs.read(SourceFile::Image(*image), 0, &mut block)?;
            if !is_zero(&block) {
                by_fingerprint
                    .entry(settings.function.of(&block))
                    .or_default()
                    .push(inline.len());
            }
            inline.push(InlineBlock {
                image: *image,
                block: None,
            });
            blocks.push(block);
        }
        let search_end = if by_fingerprint.is_empty() {
            StoreBlock(0)
        } else {
            self.plan.first_new
        };
        for block in range::each(StoreBlock(0)..search_end) {
            for place in by_fingerprint
                .get(&self.plan.fingerprints.get(block))
                .into_iter()
                .flatten()
            {
                if old_hashes.get(block)? == Some(settings.hasher.of(&blocks[*place])) {
                    inline[*place].block = Some(block);
                }
            }
        }
        for (inline, block) in inline.iter_mut().zip(&blocks) {
            if inline.block.is_none() && !is_zero(block) {
                inline.block = Some(self.corrected.add(block, settings.hasher.of(block))?);
            }
        }
        Ok(inline)
    }

    /// Appends new blocks to the frame. A full frame ends where a chunk ends.
    fn append(&mut self, content: &[u8]) {
        for block in content.chunks_exact(BLOCK_LEN) {
            if self.chunk_left == 0 {
                if self.frame.len() >= FRAME_BYTES {
                    self.end_frame();
                }
                self.chunk_left = self.chunks.next().copied().unwrap_or(1);
            }
            self.frame.extend_from_slice(block);
            self.chunk_left -= 1;
        }
    }

    /// Ends the frame that is being filled, if it has any blocks.
    fn end_frame(&mut self) {
        if !self.frame.is_empty() {
            let empty = Vec::with_capacity(self.frame.len());
            self.ready.push(std::mem::replace(&mut self.frame, empty));
        }
    }
}

/// Blocks that are not what the plan supposed. They are stored behind all blocks that the plan has addresses for.
struct CorrectedBlocks {
    function: FingerprintFunction,
    /// The store address of the first of them.
    first: StoreBlock,
    /// The hash of each.
    hashes: SpillVec<Hash>,
    /// The fingerprint of each.
    fingerprints: SpillVec<u32>,
    /// The addresses of the first [`CORRECTIONS_REMEMBERED`] of them, by hash.
    known: HashMap<Hash, StoreBlock>,
    /// The content of those that are not written yet.
    content: Vec<u8>,
    /// The address after the last one that is written.
    written_end: StoreBlock,
}

impl CorrectedBlocks {
    fn new(first: StoreBlock, function: FingerprintFunction, budget: &Budget) -> Self {
        Self {
            function,
            first,
            hashes: SpillVec::new_in(budget),
            fingerprints: SpillVec::new_in(budget),
            known: HashMap::new(),
            content: Vec::new(),
            written_end: first,
        }
    }

    /// Adds a block, unless an equal one is known, and returns its store address.
    fn add(&mut self, block: &[u8], hash: Hash) -> Result<StoreBlock> {
        if let Some(known) = self.known.get(&hash) {
            return Ok(*known);
        }
        let address = u32::try_from(self.hashes.len())
            .ok()
            .and_then(|count| self.first.checked_add(count))
            .filter(|address| *address < StoreBlock::END_MAX)
            .ok_or(Error::TooLarge)?;
        self.content.extend_from_slice(block);
        self.hashes.push(hash);
        self.fingerprints.push(self.function.of(block));
        if self.known.len() < CORRECTIONS_REMEMBERED {
            self.known.insert(hash, address);
        }
        Ok(address)
    }

    /// Writes a PACK once there are enough blocks for one. With `all` it writes whatever there is.
    fn write(&mut self, level: i32, all: bool, records: &mut RecordWriter<'_>) -> Result<()> {
        if self.content.is_empty() || !all && self.content.len() < PACK_BYTES {
            return Ok(());
        }
        let plain: Vec<Vec<u8>> = self.content.chunks(FRAME_BYTES).map(<[u8]>::to_vec).collect();
        let mut placed = Vec::with_capacity(plain.len());
        for frame in compress(level, &plain).map_err(records.failed)? {
            let first = self.written_end;
            self.written_end += u32::from(frame.blocks);
            placed.push(PlacedFrame { first, frame });
        }
        records.put_frames(&placed, false)?;
        self.content.clear();
        Ok(())
    }

    /// Writes the PLAN records that announce the blocks, and the INDEX records that have their hashes.
    fn announce(&self, records: &mut RecordWriter<'_>) -> Result<()> {
        if self.hashes.is_empty() {
            return Ok(());
        }
        let mut chunks = Vec::new();
        Chunker::default().cut(&self.fingerprints, |chunk| {
            chunks.push(u8::try_from(chunk.blocks).unwrap_or(u8::MAX));
        });
        announce(
            self.function,
            self.first,
            &chunks,
            |first, blocks| {
                let at = (first - self.first) as usize;
                self.fingerprints[at..at + blocks as usize].to_vec()
            },
            records,
        )?;
        for (number, hashes) in (0u32..).zip(self.hashes.chunks(INDEX_BLOCKS as usize)) {
            records.put_index(self.first + number * INDEX_BLOCKS, hashes)?;
        }
        Ok(())
    }
}
