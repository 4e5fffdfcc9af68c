//! Carries out an export's plan: reads each new extent once, hashes every block of it, proves what the plan took for equal,
//! and writes what is new as PACKs and INDEXes.

use std::collections::HashMap;

use rayon::prelude::*;

use super::hashes::{HashLog, StoredHashes};
use crate::archive::index;
use crate::archive::manifest::{self, AnnouncedBlocks};
use crate::archive::pack::{self, Frame};
use crate::archive::record::{Hash, RecordKind, hash_of};
use crate::archive::writer::ArchiveWriter;
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
use crate::spill::SpillVec;

/// Bytes of images read at a time, while those before are compressed, and those before that are written.
const BATCH_BYTES: u64 = 8 << 20;
/// Threads beside one for each core.
const WAITING_THREADS: usize = 2;
/// Blocks of one read at most.
const READ_BLOCKS: u32 = 256;
/// Bytes of blocks in a frame, unless its last chunk has more.
const FRAME_BYTES: usize = 1 << 20;
/// Bytes of frames that make a pack.
const PACK_BYTES: usize = 8 << 20;
/// Blocks that an INDEX covers, unless it is the last.
const INDEX_BLOCKS: u32 = 1 << 16;
/// Hashes of corrected blocks remembered, so that equal ones are stored once.
const CORRECTIONS_REMEMBERED: usize = 1 << 16;

/// What was stored beside what was planned.
#[derive(Debug)]
pub struct Stored {
    /// Ranges that turned out to be other blocks than planned, and what they are. By slot.
    pub corrections: Vec<ExportPiece>,
    /// First blocks of images that lie in metadata.
    pub inline: Vec<InlineBlock>,
    /// Hashes of all new blocks, corrected ones included.
    pub hashes: HashLog,
    /// Bytes of images read.
    pub read_bytes: u64,
}

/// The first block of an image that lies in metadata, where no extent has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InlineBlock {
    /// The image.
    pub image: ImageId,
    /// Where the store has the block; none if it is zeros.
    pub block: Option<StoreBlock>,
}

/// What of an export is the same for all of its blocks, and what lies in no extent.
#[derive(Debug, Clone, Copy)]
pub struct ExportSettings<'a> {
    /// What the fingerprints are.
    pub function: FingerprintFunction,
    /// Compression level of zstd.
    pub level: i32,
    /// Images whose first block lies in metadata, so that no extent has it.
    pub inline: &'a [ImageId],
}

/// A range of slots read at once, and the pieces it is made of.
struct ReadTask {
    slot: Slot,
    blocks: u32,
    pieces: std::ops::Range<usize>,
}

impl ReadTask {
    fn slots(&self) -> std::ops::Range<Slot> {
        self.slot..self.slot + self.blocks
    }
}

/// Bytes that begin at a multiple of a block, as direct reading asks for.
#[derive(Default)]
struct AlignedBuffer {
    allocated: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// Makes it so long; what it holds is anything.
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

/// What was read of a task.
#[derive(Default)]
struct ReadBlocks {
    content: AlignedBuffer,
    /// Of each block; none for zeros where zeros were planned.
    hashes: Vec<Option<Hash>>,
}

/// Carries a plan out. `log` is empty; `old` has the hashes of what the archive holds already.
///
/// # Errors
/// Those of reading images, with path and range, and of writing; [`Error::Interrupted`].
pub fn store_blocks(
    (fs, facts): (&dyn Filesystem, &Facts),
    plan: &ExportPlan,
    settings: ExportSettings<'_>,
    (mut old, log): (StoredHashes<'_>, HashLog),
    out: &mut RecordWriter<'_>,
    monitor: &dyn Monitor,
) -> Result<Stored> {
    let tasks = tasks(facts, plan);
    let total: u64 = tasks.iter().map(|task| bytes(task.blocks)).sum();
    monitor.phase("Reading images", total);
    let mut assembler = Assembler::new(plan, log, settings.function);
    // Threads that wait for the disk do not keep the cores busy.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(rayon::current_num_threads() + WAITING_THREADS)
        .build()
        .map_err(|error| {
            Error::io("start threads for", std::path::Path::new("export"))(std::io::Error::other(error))
        })?;
    let mut packer = PackWriter::new(plan.first_new);
    let mut compressed = Vec::new();
    let mut batches = batches(&tasks).peekable();
    let mut ahead: Vec<ReadBlocks> = Vec::new();
    let mut current: &[ReadTask] = &[];
    let mut spare: Vec<ReadBlocks> = Vec::new();
    read_ahead(fs, facts, batches.peek().copied());
    loop {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let next = batches.next();
        read_ahead(fs, facts, batches.peek().copied());
        for (task, read) in current.iter().zip(&ahead) {
            assembler.take(task, read, &mut old)?;
        }
        spare.append(&mut ahead);
        let frames = std::mem::take(&mut assembler.ready);
        let recycled = std::mem::take(&mut spare);
        let to_write = std::mem::take(&mut compressed);
        let log = &assembler.log;
        let (added, (now_compressed, read)) = pool.install(|| {
            rayon::join(
                || packer.add(to_write, log, out),
                || {
                    rayon::join(
                        || compress(settings.level, &frames),
                        || next.map(|tasks| read_batch(fs, facts, plan, tasks, recycled, monitor)),
                    )
                },
            )
        });
        added?;
        compressed = now_compressed.map_err(out.failed)?;
        assembler.corrected.write(settings.level, false, out)?;
        match (next, read) {
            (Some(tasks), Some(read)) => (current, ahead) = (tasks, read?),
            _ if assembler.ready.is_empty() && current.is_empty() && compressed.is_empty() => break,
            _ => {
                current = &[];
                assembler.end();
            }
        }
    }
    packer.finish(&assembler.log, out)?;
    let inline = assembler.take_inline(fs, settings, &mut old)?;
    assembler.finish(inline, total, settings.level, out)
}

fn is_zero(block: &[u8]) -> bool {
    block
        .as_chunks::<16>()
        .0
        .iter()
        .all(|part| u128::from_le_bytes(*part) == 0)
}

/// The ranges to be read, in the order they lie on disk.
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

fn read_ahead(fs: &dyn Filesystem, facts: &Facts, tasks: Option<&[ReadTask]>) {
    for task in tasks.into_iter().flatten() {
        read_slots_ahead(facts, fs, &[task.slots()]);
    }
}

fn read_batch(
    fs: &dyn Filesystem,
    facts: &Facts,
    plan: &ExportPlan,
    tasks: &[ReadTask],
    mut spare: Vec<ReadBlocks>,
    monitor: &dyn Monitor,
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
                    let proved = piece.source == ExportSource::Zeros && is_zero(block);
                    read.hashes.push((!proved).then(|| hash_of(block)));
                }
            }
            monitor.advance(bytes(task.blocks));
            Ok(read)
        })
        .collect()
}

/// The slots of a piece that a task covers.
fn part_of(task: &ReadTask, piece: &ExportPiece) -> (Slot, Slot) {
    (piece.slot.max(task.slot), piece.end().min(task.slot + task.blocks))
}

/// Puts new blocks into frames, and finds what was taken for another block.
struct Assembler<'a> {
    plan: &'a ExportPlan,
    log: HashLog,
    corrected: Corrected,
    corrections: Vec<ExportPiece>,
    frame: Vec<u8>,
    ready: Vec<Vec<u8>>,
    chunks: std::slice::Iter<'a, u8>,
    chunk_left: u8,
}

impl<'a> Assembler<'a> {
    fn new(plan: &'a ExportPlan, log: HashLog, function: FingerprintFunction) -> Self {
        Self {
            plan,
            log,
            corrected: Corrected::new(plan.end, function),
            corrections: Vec::new(),
            frame: Vec::new(),
            ready: Vec::new(),
            chunks: plan.chunks.iter(),
            chunk_left: 0,
        }
    }

    /// Writes what is left of corrections, and says what was stored.
    fn finish(
        mut self,
        inline: Vec<InlineBlock>,
        read_bytes: u64,
        level: i32,
        out: &mut RecordWriter<'_>,
    ) -> Result<Stored> {
        self.corrected.write(level, true, out)?;
        let Self {
            mut log,
            corrected,
            corrections,
            ..
        } = self;
        log.extend(&corrected.hashes)?;
        corrected.announce(out)?;
        Ok(Stored {
            corrections,
            inline,
            hashes: log,
            read_bytes,
        })
    }

    fn take(&mut self, task: &ReadTask, read: &ReadBlocks, old: &mut StoredHashes<'_>) -> Result<()> {
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
                    let expected = self.hashes_of(first, to - from, old)?;
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

    fn hashes_of(&self, first: StoreBlock, blocks: u32, old: &mut StoredHashes<'_>) -> Result<Vec<Option<Hash>>> {
        let before = old.end().saturating_sub(first).min(blocks);
        let mut hashes = Vec::with_capacity(blocks as usize);
        for block in range::each(first..first + before) {
            hashes.push(old.get(block)?);
        }
        if blocks > before {
            hashes.extend(self.log.read(first + before, blocks - before)?.into_iter().map(Some));
        }
        Ok(hashes)
    }

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

    /// Stores the blocks that lie in metadata, unless the store has them.
    fn take_inline(
        &mut self,
        fs: &dyn Filesystem,
        settings: ExportSettings<'_>,
        old: &mut StoredHashes<'_>,
    ) -> Result<Vec<InlineBlock>> {
        let mut inline = Vec::new();
        let mut wanted: HashMap<u32, Vec<usize>> = HashMap::new();
        let mut blocks = Vec::new();
        for image in settings.inline {
            let mut block = vec![0; BLOCK_LEN];
            fs.read(SourceFile::Image(*image), 0, &mut block)?;
            if !is_zero(&block) {
                wanted
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
        let known = if wanted.is_empty() {
            StoreBlock(0)
        } else {
            self.plan.first_new
        };
        for block in range::each(StoreBlock(0)..known) {
            for at in wanted.get(&self.plan.fingerprints.get(block)).into_iter().flatten() {
                if old.get(block)? == Some(hash_of(&blocks[*at])) {
                    inline[*at].block = Some(block);
                }
            }
        }
        for (stored, block) in inline.iter_mut().zip(&blocks) {
            if stored.block.is_none() && !is_zero(block) {
                stored.block = Some(self.corrected.add(block, hash_of(block))?);
            }
        }
        Ok(inline)
    }

    /// Appends new blocks; frames end where chunks do.
    fn append(&mut self, content: &[u8]) {
        for block in content.chunks_exact(BLOCK_LEN) {
            if self.chunk_left == 0 {
                if self.frame.len() >= FRAME_BYTES {
                    self.end();
                }
                self.chunk_left = self.chunks.next().copied().unwrap_or(1);
            }
            self.frame.extend_from_slice(block);
            self.chunk_left -= 1;
        }
    }

    fn end(&mut self) {
        if !self.frame.is_empty() {
            let next = Vec::with_capacity(self.frame.len());
            self.ready.push(std::mem::replace(&mut self.frame, next));
        }
    }
}

/// Blocks that were not what the plan took them for: stored behind all that was planned.
struct Corrected {
    function: FingerprintFunction,
    first: StoreBlock,
    hashes: Vec<Hash>,
    fingerprints: Vec<u32>,
    known: HashMap<Hash, StoreBlock>,
    /// Blocks not written yet, and the address of the first.
    content: Vec<u8>,
    written: StoreBlock,
}

impl Corrected {
    fn new(first: StoreBlock, function: FingerprintFunction) -> Self {
        Self {
            function,
            first,
            hashes: Vec::new(),
            fingerprints: Vec::new(),
            known: HashMap::new(),
            content: Vec::new(),
            written: first,
        }
    }

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

    /// Writes a pack if there is enough for one, or anything and `all`.
    fn write(&mut self, level: i32, all: bool, out: &mut RecordWriter<'_>) -> Result<()> {
        if self.content.is_empty() || !all && self.content.len() < PACK_BYTES {
            return Ok(());
        }
        let plain: Vec<Vec<u8>> = self.content.chunks(FRAME_BYTES).map(<[u8]>::to_vec).collect();
        let frames = compress(level, &plain).map_err(out.failed)?;
        let blocks = u32::try_from(self.content.len() / BLOCK_LEN).unwrap_or(u32::MAX);
        out.put(
            RecordKind::Pack,
            0,
            (self.written, blocks),
            &pack::encode(self.written, &frames),
        )?;
        self.written += blocks;
        self.content.clear();
        Ok(())
    }

    /// Writes what a PLAN and an INDEX say of the blocks.
    fn announce(&self, out: &mut RecordWriter<'_>) -> Result<()> {
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
            out,
        )?;
        for (n, hashes) in (0u32..).zip(self.hashes.chunks(INDEX_BLOCKS as usize)) {
            put_index(self.first + n * INDEX_BLOCKS, hashes, out)?;
        }
        Ok(())
    }
}

/// Where records go, and what an error of that is called.
pub struct RecordWriter<'a> {
    /// Writes them.
    pub writer: &'a mut ArchiveWriter,
    /// Makes an error of one of writing.
    pub failed: &'a (dyn Fn(std::io::Error) -> Error + Sync),
}

impl RecordWriter<'_> {
    /// Writes a record.
    ///
    /// # Errors
    /// Those of writing.
    pub fn put(&mut self, kind: RecordKind, part: u8, store: (StoreBlock, u32), body: &[u8]) -> Result<()> {
        self.writer.put(kind, part, store, body).map_err(self.failed)
    }

    /// Writes a PLAN.
    ///
    /// # Errors
    /// Those of writing.
    pub fn put_plan(&mut self, part: u8, last: bool, store: (StoreBlock, u32), payload: &[u8]) -> Result<()> {
        let body = manifest::encode(self.writer.commit_number(), part, last, payload).map_err(self.failed)?;
        self.put(RecordKind::Plan, part, store, &body)
    }
}

/// Writes PLANs that announce blocks, from `first` on, in these chunks.
///
/// # Errors
/// Those of writing.
pub fn announce(
    function: FingerprintFunction,
    mut first: StoreBlock,
    chunks: &[u8],
    fingerprints: impl Fn(StoreBlock, u32) -> Vec<u32>,
    out: &mut RecordWriter<'_>,
) -> Result<()> {
    /// Blocks announced in a record, unless its last chunk has more.
    const BLOCKS: u32 = 1 << 18;
    let mut rest = chunks;
    while !rest.is_empty() {
        let (mut count, mut blocks) = (0, 0);
        while count < rest.len() && blocks < BLOCKS {
            blocks += u32::from(rest[count]);
            count += 1;
        }
        let (these, after) = rest.split_at(count);
        rest = after;
        let announced = AnnouncedBlocks {
            first,
            function,
            chunks: these.to_vec(),
            fingerprints: fingerprints(first, blocks),
        };
        let payload = manifest::encode_announced(&announced);
        out.put_plan(manifest::PART_BLOCKS, false, (first, blocks), &payload)?;
        first += blocks;
    }
    Ok(())
}

fn put_index(first: StoreBlock, hashes: &[Hash], out: &mut RecordWriter<'_>) -> Result<()> {
    let blocks = u32::try_from(hashes.len()).unwrap_or(u32::MAX);
    out.put(RecordKind::Index, 0, (first, blocks), &index::encode(first, hashes))
}

/// Compresses blocks on all cores.
fn compress(level: i32, plain: &[Vec<u8>]) -> std::io::Result<Vec<Frame>> {
    plain
        .par_iter()
        .map_init(
            || zstd::bulk::Compressor::new(level),
            |compressor, plain| match compressor {
                Ok(compressor) => Frame::compress(plain, compressor),
                Err(error) => Err(std::io::Error::other(error.to_string())),
            },
        )
        .collect()
}

/// Writes frames in packs.
struct PackWriter {
    /// Frames of the pack that is being filled.
    frames: Vec<Frame>,
    stored_bytes: usize,
    /// Store address of its first block, and after its last.
    first: StoreBlock,
    end: StoreBlock,
    /// Blocks before this one are in an INDEX.
    indexed: StoreBlock,
}

impl PackWriter {
    fn new(first: StoreBlock) -> Self {
        Self {
            frames: Vec::new(),
            stored_bytes: 0,
            first,
            end: first,
            indexed: first,
        }
    }

    fn add(&mut self, frames: Vec<Frame>, log: &HashLog, out: &mut RecordWriter<'_>) -> Result<()> {
        for frame in frames {
            self.stored_bytes += frame.stored_bytes();
            self.end += u32::from(frame.blocks);
            self.frames.push(frame);
            if self.stored_bytes >= PACK_BYTES {
                self.end_pack(out)?;
            }
        }
        while self.first - self.indexed >= INDEX_BLOCKS {
            self.put_index(INDEX_BLOCKS, log, out)?;
        }
        Ok(())
    }

    fn end_pack(&mut self, out: &mut RecordWriter<'_>) -> Result<()> {
        if !self.frames.is_empty() {
            let body = pack::encode(self.first, &self.frames);
            out.put(RecordKind::Pack, 0, (self.first, self.end - self.first), &body)?;
            self.frames.clear();
            self.stored_bytes = 0;
            self.first = self.end;
        }
        Ok(())
    }

    fn put_index(&mut self, blocks: u32, log: &HashLog, out: &mut RecordWriter<'_>) -> Result<()> {
        put_index(self.indexed, &log.read(self.indexed, blocks)?, out)?;
        self.indexed += blocks;
        Ok(())
    }

    fn finish(&mut self, log: &HashLog, out: &mut RecordWriter<'_>) -> Result<()> {
        self.end_pack(out)?;
        while self.end > self.indexed {
            self.put_index(INDEX_BLOCKS.min(self.end - self.indexed), log, out)?;
        }
        Ok(())
    }
}
