//! A backup that another program made, as a source. Its blocks get store addresses as they come: each distinct block one, proved by its hash. What
//! the images hold is known at the end. Memory holds the table of distinct blocks, one batch of blocks, and runs up to a budget.

mod assembler;
mod distinct;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use self::assembler::{Assembler, Piece};
use self::distinct::{DistinctBlocks, Placed, runs};
pub use self::distinct::{EarlierBlocks, NoEarlierBlocks};
use super::source::{BlockHashes, BlockSink, BlockSource, Delivered, Offer, SourceFrame, Stopped};
use crate::archive::limits::{IMAGE_BYTES_MAX, RUNS_MAX};
use crate::archive::manifest::{ArchivedImage, ImageRuns, Manifest};
use crate::archive::record::{BlockHasher, Hash, LaneId};
use crate::block::{BLOCK_LEN, bytes};
use crate::content::{Content, FileTime, Metadata, Run, push_run};
use crate::error::{Error, ErrorKind, Result, describe};
use crate::exec::hashes::{Digest, HashLog, digest};
use crate::foreign::{Backup, Event, Origin, Volume};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::{CommitName, Contents};
use crate::range;
use crate::shown::shown;
use crate::spill::{Budget, SpillVec};

/// Blocks that are handed to the sink as one frame.
const FRAME_BLOCKS: u32 = 256;
/// Volumes of a backup at most.
const VOLUMES_MAX: usize = 1 << 16;
/// Digits of a hash that name a backup.
const NAME_DIGITS: usize = 8;

/// What is restored of a backup, and how.
pub struct BackupOptions<'a> {
    /// Whether a volume is restored, by its path.
    pub takes: Box<dyn Fn(&Path) -> bool + 'a>,
    /// Whether what came whole before damage is restored.
    pub partial: bool,
    /// What tells the backup from others, for the name of the work folder.
    pub id: LaneId,
    /// The folder for a file of hashes.
    pub folder: PathBuf,
    /// Memory for runs.
    pub budget: Budget,
    /// Blocks that are there before.
    pub earlier: Box<dyn EarlierBlocks + 'a>,
    /// What hashes blocks, as those that are there before are hashed.
    pub hasher: BlockHasher,
}

/// A run of a volume, and the block it begins with.
#[derive(Debug, Clone, Copy)]
struct PlacedRun {
    first: u32,
    run: Run,
}

/// A volume, and what came of it.
struct VolumeState {
    volume: Volume,
    /// Further names of it.
    links: Vec<PathBuf>,
    is_taken: bool,
    /// In the order in which they came.
    runs: SpillVec<PlacedRun>,
    /// Its length, once all of it came.
    ended: Option<u64>,
    /// Whether all of its blocks are with the sink.
    is_handed_over: bool,
    /// Whether it is not restored for lack of space.
    is_left_out: bool,
}

impl VolumeState {
    /// Whether it is restored, and all of it is with the sink.
    fn is_whole(&self) -> bool {
        self.is_taken && self.is_handed_over
    }
}

/// A backup as a source of blocks.
pub struct BackupSource<'a> {
    backup: Box<dyn Backup + 'a>,
    path: PathBuf,
    options: BackupOptions<'a>,
    volumes: Vec<VolumeState>,
    /// All names.
    names: BTreeSet<PathBuf>,
    /// The numbers of volumes that have got a name since the last offer.
    renamed: BTreeSet<usize>,
    assembler: Assembler,
    distinct: DistinctBlocks<'a>,
    /// An event that was read and is not used yet. Its content is in `buffer`.
    pending: Option<Event>,
    buffer: Vec<u8>,
    /// Runs of all volumes.
    runs: usize,
    is_ended: bool,
    is_damaged: bool,
    /// The error of the sink, where volumes had come whole before it.
    stopped: Option<Error>,
    monitor: &'a dyn Monitor,
}

impl<'a> BackupSource<'a> {
    /// Makes a source of a backup that nothing was read of yet. `path` is that of the backup.
    pub fn new(
        backup: Box<dyn Backup + 'a>,
        path: &Path,
        mut options: BackupOptions<'a>,
        monitor: &'a dyn Monitor,
    ) -> Self {
        let earlier = std::mem::replace(&mut options.earlier, Box::new(NoEarlierBlocks));
        Self {
            backup,
            path: path.to_owned(),
            volumes: Vec::new(),
            names: BTreeSet::new(),
            renamed: BTreeSet::new(),
            assembler: Assembler::default(),
            distinct: DistinctBlocks::new(earlier, options.folder.clone()),
            pending: None,
            buffer: Vec::new(),
            runs: 0,
            is_ended: false,
            is_damaged: false,
            stopped: None,
            options,
            monitor,
        }
    }

    /// What the backup says of itself.
    pub fn origin(&self) -> Origin {
        self.backup.origin()
    }

    /// Looks for the blocks of the backup among the earlier ones, too.
    ///
    /// # Errors
    /// Those of [`EarlierBlocks::hashes`]; [`Error::Interrupted`].
    pub fn find_earlier(&mut self) -> Result<()> {
        self.distinct.enter_earlier(self.monitor)
    }

    /// The hashes of new blocks, by store address.
    pub fn new_hashes(&self) -> &HashLog {
        self.distinct.log()
    }

    /// The hashes of new blocks, of which no more come.
    pub fn into_new_hashes(self) -> HashLog {
        self.distinct.into_log()
    }

    /// The next event, or `None` at the end. With [`BackupOptions::partial`], damage is an end.
    fn next_event(&mut self) -> Result<Option<Event>> {
        if let Some(event) = self.pending.take() {
            return Ok(Some(event));
        }
        if self.is_ended {
            return Ok(None);
        }
        match self.backup.next(&mut self.buffer) {
            Ok(Some(event)) => Ok(Some(event)),
            Ok(None) => {
                self.is_ended = true;
                Ok(None)
            }
            Err(error @ Error::DamagedBackup { .. }) if self.options.partial => {
                self.monitor.note(&describe(&error));
                (self.is_ended, self.is_damaged) = (true, true);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Notes a name, which must not be another's or lie below it.
    fn add_name(&mut self, name: &Path) -> Result<()> {
        let is_below = name.ancestors().any(|ancestor| self.names.contains(ancestor));
        // Paths are ordered by their components, so that those below one follow it.
        let next = self.names.range(name.to_owned()..).next();
        if is_below || next.is_some_and(|next| next.starts_with(name)) {
            return Err(self.refused(&format!(
                "two of its volumes have the name `{}`, or one lies below the other",
                shown(name)
            )));
        }
        if self.names.len() >= VOLUMES_MAX {
            return Err(self.refused("it has more volumes than vmfold takes"));
        }
        self.names.insert(name.to_owned());
        Ok(())
    }

    /// Notes another name of a volume.
    fn add_link(&mut self, volume: usize, path: PathBuf) -> Result<()> {
        self.add_name(&path)?;
        if !(self.options.takes)(&path) {
            return Ok(());
        }
        match self.volumes.get_mut(volume) {
            Some(state) if state.is_taken => {
                state.links.push(path);
                self.renamed.insert(volume);
                Ok(())
            }
            Some(state) => Err(Error::Usage(format!(
                "`{}` is another name of `{}`, whose content came before: choose that as well",
                shown(&path),
                shown(&state.volume.path)
            ))),
            None => Err(self.refused("a name is that of no volume")),
        }
    }

    /// Notes a volume.
    fn add_volume(&mut self, volume: Volume) -> Result<()> {
        self.add_name(&volume.path)?;
        let is_taken = (self.options.takes)(&volume.path);
        if is_taken {
            self.renamed.insert(self.volumes.len());
        } else {
            self.backup.leave_out(self.volumes.len());
        }
        self.volumes.push(VolumeState {
            is_taken,
            volume,
            links: Vec::new(),
            runs: SpillVec::new_in(&self.options.budget),
            ended: None,
            is_handed_over: false,
            is_left_out: false,
        });
        Ok(())
    }

    /// Whether something can be restored if nothing more comes.
    fn has_proved_volumes(&self) -> bool {
        self.backup.proves_each_volume() && self.volumes.iter().any(VolumeState::is_whole)
    }

    fn refused(&self, problem: &str) -> Error {
        Error::RefusedBackup {
            path: self.path.clone(),
            problem: problem.into(),
        }
    }

    /// Hands over what comes up to the next name, which is to be looked at first. Returns whether the end was reached.
    fn deliver_next(&mut self, sink: &mut dyn BlockSink) -> Result<bool> {
        while let Some(event) = self.next_event()? {
            match event {
                Event::Data { volume, offset } => self.take_data(volume, offset, sink)?,
                Event::End { volume, size } => {
                    self.assembler.end(volume);
                    if let Some(state) = self.volumes.get_mut(volume) {
                        state.ended = Some(size);
                    }
                }
                name @ (Event::Volume(_) | Event::Link { .. }) => {
                    self.pending = Some(name);
                    return Ok(false);
                }
            }
        }
        for volume in 0..self.volumes.len() {
            self.assembler.end(volume);
        }
        self.hand_over(sink)?;
        Ok(true)
    }

    /// Takes content of a volume.
    fn take_data(&mut self, volume: usize, offset: u64, sink: &mut dyn BlockSink) -> Result<()> {
        if !self.volumes.get(volume).is_some_and(|state| state.is_taken) {
            return Ok(());
        }
        if !self.assembler.add(volume, offset, &self.buffer) {
            return Err(self.refused("a volume is larger than an image may be"));
        }
        if self.assembler.is_full() {
            self.hand_over(sink)?;
        }
        Ok(())
    }

    /// Gives the blocks that wait their addresses, and hands those over that did not come before.
    fn hand_over(&mut self, sink: &mut dyn BlockSink) -> Result<()> {
        let (content, pieces) = self.assembler.take();
        if !content.is_empty() {
            self.place(&content, &pieces, sink)?;
        }
        for state in &mut self.volumes {
            state.is_handed_over |= state.ended.is_some();
        }
        Ok(())
    }

    fn place(&mut self, content: &[u8], pieces: &[Piece], sink: &mut dyn BlockSink) -> Result<()> {
        if !self.distinct.has_room(content.len() / BLOCK_LEN) {
            return Err(self.refused("it has more distinct blocks than vmfold takes"));
        }
        let hasher = &self.options.hasher;
        let hashes: Vec<Option<Hash>> = content
            .par_chunks_exact(BLOCK_LEN)
            .map(|block| (!is_zeros(block)).then(|| hasher.of(block)))
            .collect();
        let placed = self.distinct.place(&hashes)?;
        let new = placed.iter().zip(content.chunks_exact(BLOCK_LEN));
        let new = new.filter_map(|(placed, block)| match placed {
            Placed::New(at) => Some((*at, block)),
            _ => None,
        });
        let mut first = None;
        let mut fresh: Vec<u8> = Vec::new();
        for (at, block) in new {
            first.get_or_insert(at);
            fresh.extend_from_slice(block);
        }
        if let Some(first) = first {
            Self::hand_over_new(first, &fresh, sink)?;
        }
        self.note_runs(pieces, &placed)
    }

    /// Hands over new blocks, from an address on.
    fn hand_over_new(first: StoreBlock, content: &[u8], sink: &mut dyn BlockSink) -> Result<()> {
        let end = first + u32::try_from(content.len() / BLOCK_LEN).unwrap_or(u32::MAX);
        let frames = range::parts(first..end, FRAME_BLOCKS).map(|blocks| {
            let from = (blocks.start - first) as usize * BLOCK_LEN;
            let content = &content[from..from + range::length(&blocks) as usize * BLOCK_LEN];
            SourceFrame {
                blocks,
                content: Box::new(|| Ok(content.to_vec())),
            }
        });
        let frames: Vec<SourceFrame<'_>> = frames.collect();
        match sink.take(&frames)?.into_iter().next() {
            Some((_, error)) => Err(error),
            None => Ok(()),
        }
    }

    /// Notes where the blocks of volumes were placed.
    fn note_runs(&mut self, pieces: &[Piece], placed: &[Placed]) -> Result<()> {
        let mut at = 0;
        for piece in pieces {
            let mut first = piece.first;
            let its = &placed[at..at + piece.blocks as usize];
            at += piece.blocks as usize;
            let list = &mut self.volumes[piece.volume].runs;
            for (blocks, stored) in runs(its) {
                let content = stored.map_or(Content::Zeros, |range| Content::Stored(range.start));
                let run = Run { blocks, content };
                let is_next = list
                    .last()
                    .is_some_and(|last| last.first.checked_add(last.run.blocks) == Some(first));
                if !(is_next && list.last_mut().is_some_and(|last| last.run.absorb(run))) {
                    list.push(PlacedRun { first, run });
                    self.runs += 1;
                }
                first = first.saturating_add(blocks);
            }
        }
        if self.runs > RUNS_MAX {
            return Err(self.refused("its volumes are in more pieces than vmfold takes"));
        }
        Ok(())
    }

    /// The images that have got a name since the last offer, without their runs.
    fn news(&mut self) -> Result<Contents> {
        let mut manifest = Manifest::default();
        for volume in std::mem::take(&mut self.renamed) {
            manifest.images.push(ImageRuns {
                image: self.image(volume)?,
                runs: SpillVec::default(),
            });
        }
        Ok(Contents {
            manifest,
            kind: Some(self.backup.kind()),
            grows: true,
            ..Contents::default()
        })
    }

    /// A volume as an image.
    fn image(&self, volume: usize) -> Result<ArchivedImage> {
        let state = &self.volumes[volume];
        let size = state.ended.or(state.volume.size).unwrap_or_else(|| came(&state.runs));
        if size > IMAGE_BYTES_MAX {
            return Err(self.refused("a volume is larger than an image may be"));
        }
        Ok(ArchivedImage {
            number: u32::try_from(volume).unwrap_or(u32::MAX),
            names: [&state.volume.path].into_iter().chain(&state.links).cloned().collect(),
            size,
            metadata: metadata_of(state.volume.time),
        })
    }

    /// The images with all that came of them.
    fn committed(&mut self) -> Result<Contents> {
        for state in &mut self.volumes {
            state.runs.sort_unstable_by_key(|placed| placed.first);
        }
        let mut manifest = Manifest::default();
        let mut hasher = blake3::Hasher::new();
        for (volume, state) in self.volumes.iter().enumerate().filter(|(_, state)| state.is_taken) {
            let image = self.image(volume)?;
            let runs = self.runs_of(state, &image)?;
            let distinct = &self.distinct;
            let made_with = (&self.options.hasher, self.monitor);
            let image_digest = digest(&runs, image.size, made_with, |first, blocks, digest| {
                for part in range::parts(first..first + blocks, FRAME_BLOCKS) {
                    let hashes = distinct.hashes(part.start, range::length(&part))?;
                    digest.update(&hashes.into_iter().flatten().collect::<Vec<_>>())?;
                }
                Ok(())
            })?;
            hasher.update(image.path().as_os_str().as_encoded_bytes());
            hasher.update(&[0]);
            hasher.update(&image_digest);
            manifest.images.push(ImageRuns { image, runs });
        }
        let hash = *hasher.finalize().as_bytes();
        let name = CommitName {
            number: CommitNumber::FIRST,
            id: blake3::Hash::from_bytes(hash).to_hex()[..NAME_DIGITS].to_owned(),
            hash,
        };
        Ok(Contents {
            manifest,
            commit: Some(name),
            kind: Some(self.backup.kind()),
            ..Contents::default()
        })
    }

    /// The runs of an image from its beginning to its end. What nothing came of is a hole, or lost if not all came.
    fn runs_of(&self, state: &VolumeState, image: &ArchivedImage) -> Result<SpillVec<Run>> {
        let gap = if state.ended.is_some() {
            Content::Hole
        } else {
            Content::Lost
        };
        let mut runs = SpillVec::new_in(&self.options.budget);
        let mut at = 0;
        let fill_up_to = |runs: &mut SpillVec<Run>, first: u32, at: u32| {
            let blocks = first.checked_sub(at)?;
            push_run(runs, Run { blocks, content: gap });
            Some(())
        };
        for placed in &state.runs {
            if fill_up_to(&mut runs, placed.first, at).is_none() {
                return Err(self.refused("a volume has two contents for the same place"));
            }
            push_run(&mut runs, placed.run);
            at = placed.first.saturating_add(placed.run.blocks);
        }
        if fill_up_to(&mut runs, image.blocks(), at).is_none() {
            return Err(self.refused("a volume has content behind its end"));
        }
        Ok(runs)
    }
}

/// Bytes up to the end of what came.
fn came(runs: &[PlacedRun]) -> u64 {
    let ends = runs.iter().map(|placed| placed.first.saturating_add(placed.run.blocks));
    bytes(ends.max().unwrap_or(0))
}

fn is_zeros(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// The metadata of an image that a backup says nothing of but its time: only its owner can read it, who is the user that restores it.
fn metadata_of(time: Option<FileTime>) -> Metadata {
    Metadata {
        mode: 0o600,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        mtime: time.unwrap_or_else(now),
        ..Metadata::default()
    }
}

/// The time of the system's clock.
fn now() -> FileTime {
    let now = jiff::Timestamp::now();
    FileTime {
        seconds: now.as_second(),
        nanoseconds: u32::try_from(now.subsec_nanosecond()).unwrap_or(0),
    }
}

impl BlockSource for BackupSource<'_> {
    fn path(&self) -> &Path {
        &self.path
    }

    fn id(&self) -> LaneId {
        self.options.id
    }

    fn work_number(&self) -> CommitNumber {
        CommitNumber::FIRST
    }

    /// Offers the volumes whose names came since the last offer, before their content.
    fn offer(&mut self) -> Result<Option<Offer>> {
        while let Some(event) = self.next_event()? {
            match event {
                Event::Volume(volume) => self.add_volume(volume)?,
                Event::Link { volume, path } => self.add_link(volume, path)?,
                other => {
                    self.pending = Some(other);
                    break;
                }
            }
        }
        if self.volumes.is_empty() {
            return Ok(None);
        }
        Ok(Some(Offer {
            contents: Arc::new(self.news()?),
            announced: Vec::new(),
            known_end: StoreBlock(0),
        }))
    }

    fn deliver(&mut self, _: &[std::ops::Range<StoreBlock>], sink: &mut dyn BlockSink) -> Result<Delivered> {
        match self.deliver_next(sink) {
            Ok(true) => {}
            Ok(false) => {
                return Ok(Delivered {
                    committed: None,
                    is_last: false,
                });
            }
            Err(error) if error.kind() == ErrorKind::NoSpace && self.has_proved_volumes() => {
                for state in self.volumes.iter_mut().filter(|state| !state.is_whole()) {
                    state.is_left_out = state.is_taken;
                    state.is_taken = false;
                }
                self.stopped = Some(error);
            }
            Err(error) => return Err(error),
        }
        Ok(Delivered {
            committed: Some(Arc::new(self.committed()?)),
            is_last: true,
        })
    }

    fn hashes(&mut self) -> &mut dyn BlockHashes {
        self
    }

    fn knows_hashes(&self) -> bool {
        false
    }

    fn announces(&self) -> bool {
        false
    }

    fn nothing_committed(&self) -> Error {
        self.refused("it holds no volumes")
    }

    fn is_doubtful(&self, _: &Path) -> bool {
        self.is_damaged && !self.backup.proves_each_volume()
    }

    fn stopped(&mut self) -> Option<Stopped> {
        let left_out = self.volumes.iter().filter(|state| state.is_left_out);
        Some(Stopped {
            error: self.stopped.take()?,
            left_out: left_out.map(|state| state.volume.path.clone()).collect(),
        })
    }

    fn has_later_damage(&self) -> bool {
        self.is_damaged
    }
}

impl BlockHashes for BackupSource<'_> {
    fn hasher(&self) -> BlockHasher {
        self.options.hasher.clone()
    }

    fn get(&mut self, block: StoreBlock) -> Result<Option<Hash>> {
        if block >= self.distinct.log().end() {
            return Ok(None);
        }
        Ok(self.distinct.hashes(block, 1)?.first().copied().flatten())
    }

    fn add_to(&mut self, _: &mut Digest<'_>, _: StoreBlock, _: u32) -> Result<bool> {
        Ok(false)
    }
}
