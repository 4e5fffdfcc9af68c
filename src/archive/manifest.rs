//! PLAN: the images of a commit, what each of their ranges holds, and the blocks that are about to follow.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::block::BLOCK_BYTES;
use crate::codec::{Decoded, Decoder, pack_payload, put_string, put_varint, put_zigzag, unpack_payload};
use crate::content::{Content, FileTime, Metadata, Run, push_run};
use crate::fingerprint::FingerprintFunction;
use crate::numbers::{CommitNumber, StoreBlock};

/// Bytes of a payload at most, decoded.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;
/// Bytes after which a writer begins another record: little is lost with one.
const PAYLOAD_BYTES: usize = 1 << 20;
/// Blocks that one record announces at most.
pub const ANNOUNCED_BLOCKS_MAX: usize = 1 << 19;
/// Runs of a commit at most, its corrections included: 200 MB of memory.
pub const RUNS_MAX: usize = 1 << 24;
/// Bytes of an entry at most, its runs aside.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// Bytes of an image at most.
pub const IMAGE_BYTES_MAX: u64 = ((1 << 32) - 1) * BLOCK_BYTES;
const PATH_BYTES_MAX: usize = 4096;
const NAME_BYTES_MAX: usize = 255;
const NAMES_MAX: usize = 1024;
const XATTR_BYTES_MAX: usize = 64 << 10;
const XATTRS_MAX: usize = 1024;
const OWNER_BYTES_MAX: usize = 256;
/// The bits of a mode that are kept.
const MODE_MASK: u32 = 0o7777;
const CHUNK_BLOCKS_MAX: u8 = 16;
/// What an entry that is no list of runs counts for among [`RUNS_MAX`].
const ENTRY_RUNS: usize = 64;

/// The part of a PLAN that holds images.
pub const PART_IMAGES: u8 = 0;
/// The part of a PLAN that announces blocks.
pub const PART_BLOCKS: u8 = 1;
/// The part of a PLAN that holds corrections.
pub const PART_CORRECTIONS: u8 = 2;

const TAG_FOLDER: u8 = 1;
const TAG_IMAGE: u8 = 2;
const TAG_RUNS: u8 = 3;

/// A folder that images lie in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedFolder {
    /// Its path, relative.
    pub path: PathBuf,
    /// What is kept of it.
    pub metadata: Metadata,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ArchivedImage {
    /// Its number in the commit.
    pub number: u32,
    /// All its names, relative; the first is the one it is called by.
    pub names: Vec<PathBuf>,
    /// Bytes.
    pub size: u64,
    /// What is kept of it.
    pub metadata: Metadata,
}

impl ArchivedImage {
    /// The name it is called by.
    pub fn path(&self) -> &Path {
        self.names.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Its length in blocks, the last of which may be a partial one.
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.size.div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)
    }
}

/// An entry of the payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ManifestEntry {
    /// A folder.
    Folder(ArchivedFolder),
    /// An image; its runs follow.
    Image(ArchivedImage),
    /// Runs of an image.
    Runs {
        /// The image's number.
        image: u32,
        /// The first block they cover.
        first_block: u32,
        /// They follow each other.
        runs: Vec<Run>,
    },
}

/// Chunks of new blocks, and the fingerprints that they were found by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnnouncedBlocks {
    /// Store address of the first.
    pub first: StoreBlock,
    /// What the fingerprints are.
    pub function: FingerprintFunction,
    /// Blocks of each chunk.
    pub chunks: Vec<u8>,
    /// Of each block.
    pub fingerprints: Vec<u32>,
}

impl AnnouncedBlocks {
    /// The address after the last.
    pub fn end(&self) -> StoreBlock {
        self.first + u32::try_from(self.fingerprints.len()).unwrap_or(0)
    }
}

/// What a PLAN holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlanPart {
    /// Folders and images.
    Images(Vec<ManifestEntry>),
    /// Blocks that follow.
    Blocks(AnnouncedBlocks),
    /// Runs that replace others.
    Corrections(Vec<ManifestEntry>),
}

impl PlanPart {
    /// Its number in the format.
    pub fn number(&self) -> u8 {
        match self {
            Self::Images(_) => PART_IMAGES,
            Self::Blocks(_) => PART_BLOCKS,
            Self::Corrections(_) => PART_CORRECTIONS,
        }
    }
}

/// Writes the body of a PLAN.
///
/// # Errors
/// Those of zstd.
pub fn encode(commit: CommitNumber, part: u8, last: bool, payload: &[u8]) -> std::io::Result<Vec<u8>> {
    let (encoding, stored) = pack_payload(payload)?;
    let mut out = commit.0.to_le_bytes().to_vec();
    out.extend([part, encoding, last.into(), 0]);
    out.extend(u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(stored);
    Ok(out)
}

/// A PLAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRecord {
    /// The number of the commit it is for.
    pub commit: CommitNumber,
    /// Whether it is the last of its part.
    pub last: bool,
    /// What it holds.
    pub part: PlanPart,
}

/// Reads the body of a PLAN.
///
/// # Errors
/// Where it is not as the format says.
pub fn decode(body: &[u8]) -> Decoded<PlanRecord> {
    let mut decoder = Decoder::new(body);
    let commit = CommitNumber(decoder.u32()?);
    let (part, encoding) = (decoder.u8()?, decoder.u8()?);
    let last = match decoder.u8()? {
        last @ 0..=1 => last == 1,
        _ => return Err("a flag is neither 0 nor 1"),
    };
    decoder.zeros(1)?;
    let plain_length = usize::try_from(decoder.u32()?).unwrap_or(usize::MAX);
    let stored = decoder.take(decoder.left())?;
    let payload = unpack_payload(encoding, stored, plain_length, PAYLOAD_BYTES_MAX)?;
    let part = match part {
        PART_IMAGES => PlanPart::Images(decode_entries(&payload, false)?),
        PART_BLOCKS => PlanPart::Blocks(decode_announced(&payload)?),
        PART_CORRECTIONS => PlanPart::Corrections(decode_entries(&payload, true)?),
        _ => return Err("it is of a part not known"),
    };
    Ok(PlanRecord { commit, last, part })
}

/// Collects entries into payloads of a bearable size.
#[derive(Debug, Default)]
pub struct Payloads {
    full: Vec<Vec<u8>>,
    current: Vec<u8>,
}

impl Payloads {
    /// Appends an entry; long lists of runs are split.
    pub fn push(&mut self, entry: &ManifestEntry) {
        match entry {
            ManifestEntry::Folder(folder) => {
                self.current.push(TAG_FOLDER);
                put_string(&mut self.current, folder.path.as_os_str().as_bytes());
                put_metadata(&mut self.current, &folder.metadata);
            }
            ManifestEntry::Image(image) => {
                self.current.push(TAG_IMAGE);
                put_varint(&mut self.current, image.number.into());
                put_varint(&mut self.current, image.size);
                put_varint(&mut self.current, image.names.len() as u64);
                for name in &image.names {
                    put_string(&mut self.current, name.as_os_str().as_bytes());
                }
                put_metadata(&mut self.current, &image.metadata);
            }
            ManifestEntry::Runs {
                image,
                first_block,
                runs,
            } => {
                /// Runs in an entry: at most ten bytes each for both numbers.
                const RUNS: usize = 16 << 10;
                let mut first = *first_block;
                for runs in runs.chunks(RUNS) {
                    self.current.push(TAG_RUNS);
                    put_varint(&mut self.current, (*image).into());
                    put_varint(&mut self.current, first.into());
                    put_varint(&mut self.current, runs.len() as u64);
                    put_runs(&mut self.current, runs);
                    first += runs.iter().map(|run| run.blocks).sum::<u32>();
                    self.end_if_full();
                }
            }
        }
        self.end_if_full();
    }

    fn end_if_full(&mut self) {
        if self.current.len() >= PAYLOAD_BYTES {
            self.full.push(std::mem::take(&mut self.current));
        }
    }

    /// The payloads.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        if !self.current.is_empty() {
            self.full.push(self.current);
        }
        self.full
    }
}

fn put_runs(out: &mut Vec<u8>, runs: &[Run]) {
    let mut predicted = 0i64;
    for run in runs {
        let kind = match run.content {
            Content::Hole | Content::Lost => 0,
            Content::Zeros => 1,
            Content::Unwritten => 2,
            Content::Stored(_) => 3,
        };
        put_varint(out, u64::from(run.blocks) << 2 | kind);
        if let Content::Stored(first) = run.content {
            put_zigzag(out, i64::from(first.0) - predicted);
            predicted = i64::from(first.0) + i64::from(run.blocks);
        }
    }
}

fn put_metadata(out: &mut Vec<u8>, metadata: &Metadata) {
    for number in [metadata.mode & MODE_MASK, metadata.uid, metadata.gid] {
        put_varint(out, number.into());
    }
    put_string(out, metadata.user.as_bytes());
    put_string(out, metadata.group.as_bytes());
    put_zigzag(out, metadata.mtime.seconds);
    put_varint(out, metadata.mtime.nanoseconds.into());
    put_varint(out, metadata.xattrs.len() as u64);
    for (name, value) in &metadata.xattrs {
        put_string(out, name);
        put_string(out, value);
    }
}

fn decode_entries(payload: &[u8], only_runs: bool) -> Decoded<Vec<ManifestEntry>> {
    let mut decoder = Decoder::new(payload);
    let mut entries = Vec::new();
    while decoder.left() > 0 {
        entries.push(match decoder.u8()? {
            TAG_FOLDER if !only_runs => ManifestEntry::Folder(ArchivedFolder {
                path: path(&mut decoder)?,
                metadata: metadata(&mut decoder)?,
            }),
            TAG_IMAGE if !only_runs => ManifestEntry::Image(image(&mut decoder)?),
            TAG_RUNS => runs(&mut decoder)?,
            _ => return Err("an entry is of a kind not known"),
        });
    }
    Ok(entries)
}

fn image(decoder: &mut Decoder<'_>) -> Decoded<ArchivedImage> {
    let (number, size) = (decoder.varint32()?, decoder.varint()?);
    if size > IMAGE_BYTES_MAX {
        return Err("an image is larger than allowed");
    }
    let count = decoder.count(2)?;
    if count == 0 || count > NAMES_MAX {
        return Err("an image has no name, or too many");
    }
    let names = (0..count).map(|_| path(decoder)).collect::<Decoded<_>>()?;
    Ok(ArchivedImage {
        number,
        names,
        size,
        metadata: metadata(decoder)?,
    })
}

fn runs(decoder: &mut Decoder<'_>) -> Decoded<ManifestEntry> {
    let (image, first_block) = (decoder.varint32()?, decoder.varint32()?);
    let count = decoder.count(1)?;
    let mut runs = Vec::with_capacity(count);
    let (mut predicted, mut end) = (0i64, first_block);
    for _ in 0..count {
        let head = decoder.varint()?;
        let blocks = u32::try_from(head >> 2).map_err(|_| "a run is longer than allowed")?;
        end = end.checked_add(blocks).ok_or("runs go beyond the largest image")?;
        if blocks == 0 {
            return Err("a run is empty");
        }
        let content = match head & 3 {
            0 => Content::Hole,
            1 => Content::Zeros,
            2 => Content::Unwritten,
            _ => {
                let first = predicted.checked_add(decoder.zigzag()?).unwrap_or(-1);
                predicted = first.saturating_add(i64::from(blocks));
                if first < 0 || predicted > i64::from(StoreBlock::END_MAX.0) {
                    return Err("a run refers to blocks that no store can hold");
                }
                Content::Stored(StoreBlock(u32::try_from(first).unwrap_or(u32::MAX)))
            }
        };
        runs.push(Run { blocks, content });
    }
    Ok(ManifestEntry::Runs {
        image,
        first_block,
        runs,
    })
}

/// Reads a path and refuses what could lead out of the folder it is restored to.
fn path(decoder: &mut Decoder<'_>) -> Decoded<PathBuf> {
    let bytes = decoder.string(PATH_BYTES_MAX)?;
    if !is_safe(bytes) {
        return Err("a path is not allowed: absolute, with `..`, or with a NUL");
    }
    Ok(PathBuf::from(OsStr::from_bytes(bytes)))
}

/// Whether a path stays in the folder it is restored to.
pub fn is_safe(path: &[u8]) -> bool {
    let is_name = |name: &[u8]| !name.is_empty() && name.len() <= NAME_BYTES_MAX && name != b"." && name != b"..";
    !path.contains(&0) && path.len() <= PATH_BYTES_MAX && path.split(|byte| *byte == b'/').all(is_name)
}

fn metadata(decoder: &mut Decoder<'_>) -> Decoded<Metadata> {
    let mode = decoder.varint32()?;
    if mode & !MODE_MASK != 0 {
        return Err("a mode has bits that are not allowed");
    }
    let (uid, gid) = (decoder.varint32()?, decoder.varint32()?);
    let (user, group) = (decoder.text(OWNER_BYTES_MAX)?, decoder.text(OWNER_BYTES_MAX)?);
    let mtime = file_time(decoder)?;
    if mtime.nanoseconds >= 1_000_000_000 {
        return Err("a time has more than a second of nanoseconds");
    }
    let count = decoder.count(2)?;
    if count > XATTRS_MAX {
        return Err("there are too many extended attributes");
    }
    let mut xattrs = Vec::new();
    for _ in 0..count {
        let name = decoder.string(NAME_BYTES_MAX)?.to_vec();
        if name.is_empty() || name.contains(&0) {
            return Err("an extended attribute has no proper name");
        }
        xattrs.push((name, decoder.string(XATTR_BYTES_MAX)?.to_vec()));
    }
    Ok(Metadata {
        mode,
        uid,
        gid,
        user,
        group,
        mtime,
        xattrs,
    })
}

/// Writes the payload that announces blocks.
pub fn encode_announced(announced: &AnnouncedBlocks) -> Vec<u8> {
    let mut out = u64::from(announced.first.0).to_le_bytes().to_vec();
    let function = match announced.function {
        FingerprintFunction::Crc32c => 0,
        FingerprintFunction::Xxhash64 => 1,
    };
    out.extend([function, 0, 0, 0]);
    out.extend(u32::try_from(announced.chunks.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend(&announced.chunks);
    for fingerprint in &announced.fingerprints {
        out.extend(fingerprint.to_le_bytes());
    }
    out
}

fn decode_announced(payload: &[u8]) -> Decoded<AnnouncedBlocks> {
    let mut decoder = Decoder::new(payload);
    let first = store_block(decoder.u64()?)?;
    let function = match decoder.u8()? {
        0 => FingerprintFunction::Crc32c,
        1 => FingerprintFunction::Xxhash64,
        _ => return Err("its fingerprints are of a kind not known"),
    };
    decoder.zeros(3)?;
    let count = usize::try_from(decoder.u32()?).unwrap_or(usize::MAX);
    let chunks = decoder.take(count)?.to_vec();
    if chunks.iter().any(|blocks| *blocks == 0 || *blocks > CHUNK_BLOCKS_MAX) {
        return Err("a chunk is empty or longer than allowed");
    }
    let blocks: usize = chunks.iter().map(|blocks| usize::from(*blocks)).sum();
    if blocks > ANNOUNCED_BLOCKS_MAX || u64::from(first.0) + blocks as u64 > u64::from(StoreBlock::END_MAX.0) {
        return Err("it announces more blocks than allowed");
    }
    let fingerprints = decoder.take(blocks * 4)?.as_chunks().0;
    decoder.end()?;
    Ok(AnnouncedBlocks {
        first,
        function,
        chunks,
        fingerprints: fingerprints.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(),
    })
}

pub(super) fn file_time(decoder: &mut Decoder<'_>) -> Decoded<FileTime> {
    Ok(FileTime {
        seconds: decoder.zigzag()?,
        nanoseconds: decoder.varint32()?,
    })
}

/// A store address that this version can hold.
pub(super) fn store_block(number: u64) -> Decoded<StoreBlock> {
    u32::try_from(number)
        .ok()
        .map(StoreBlock)
        .filter(|block| *block <= StoreBlock::END_MAX)
        .ok_or("a store address is larger than allowed")
}

/// An image and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRuns {
    /// The image.
    pub image: ArchivedImage,
    /// Its ranges, one after the other, to its end.
    pub runs: Vec<Run>,
}

/// The images of a commit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Folders.
    pub folders: Vec<ArchivedFolder>,
    /// Images, by number.
    pub images: Vec<ImageRuns>,
}

/// Puts a manifest together from the PLANs of an epoch, in the order they were written; some may be missing.
#[derive(Debug, Clone, Default)]
pub struct ManifestBuilder {
    manifest: Manifest,
    places: HashMap<u32, usize>,
    /// Blocks of each image that its runs cover so far.
    covered: Vec<u32>,
    corrections: HashMap<u32, Vec<(u32, Run)>>,
    /// Runs and entries so far.
    entries: usize,
}

impl ManifestBuilder {
    /// Adds what a PLAN says of images.
    ///
    /// # Errors
    /// Where entries contradict each other.
    pub fn add(&mut self, part: PlanPart) -> Decoded<()> {
        let (entries, correcting) = match part {
            PlanPart::Images(entries) => (entries, false),
            PlanPart::Corrections(entries) => (entries, true),
            PlanPart::Blocks(_) => return Ok(()),
        };
        for entry in entries {
            self.entries += match &entry {
                ManifestEntry::Runs { runs, .. } => runs.len(),
                // An entry with its names takes as much memory as some runs.
                ManifestEntry::Folder(_) | ManifestEntry::Image(_) => ENTRY_RUNS,
            };
            if self.entries > RUNS_MAX {
                return Err("it has more runs and images than allowed");
            }
            match entry {
                ManifestEntry::Folder(folder) => self.manifest.folders.push(folder),
                ManifestEntry::Image(image) => {
                    if self.places.insert(image.number, self.manifest.images.len()).is_some() {
                        return Err("two images have one number");
                    }
                    self.manifest.images.push(ImageRuns {
                        image,
                        runs: Vec::new(),
                    });
                    self.covered.push(0);
                }
                ManifestEntry::Runs {
                    image,
                    first_block,
                    runs,
                } if correcting => {
                    let corrections = self.corrections.entry(image).or_default();
                    let mut at = first_block;
                    for run in runs {
                        corrections.push((at, run));
                        at = at.checked_add(run.blocks).ok_or("runs go beyond the largest image")?;
                    }
                }
                ManifestEntry::Runs {
                    image,
                    first_block,
                    runs,
                } => {
                    // Where the image's own entry was lost, so is this.
                    let Some(known) = self.places.get(&image) else { continue };
                    let (image, covered) = (&mut self.manifest.images[*known], &mut self.covered[*known]);
                    let gap = first_block.checked_sub(*covered).ok_or("runs of an image overlap")?;
                    let length = checked_length_of(&runs).and_then(|length| first_block.checked_add(length));
                    *covered = length
                        .filter(|end| *end <= image.image.blocks())
                        .ok_or("runs go beyond the end of an image")?;
                    let lost = Run {
                        blocks: gap,
                        content: Content::Lost,
                    };
                    std::iter::once(lost)
                        .chain(runs)
                        .for_each(|run| push_run(&mut image.runs, run));
                }
            }
        }
        Ok(())
    }

    /// The manifest.
    ///
    /// # Errors
    /// Where two images have one name, or what is a folder's name for one is an image's for another.
    pub fn finish(mut self) -> Decoded<Manifest> {
        for (image, covered) in self.manifest.images.iter_mut().zip(&self.covered) {
            let lost = Run {
                blocks: image.image.blocks() - covered,
                content: Content::Lost,
            };
            push_run(&mut image.runs, lost);
            if let Some(corrections) = self.corrections.get_mut(&image.image.number) {
                image.runs = correct(&image.runs, corrections)?;
            }
        }
        let mut names: Vec<&Path> = self
            .manifest
            .images
            .iter()
            .flat_map(|image| &image.image.names)
            .map(PathBuf::as_path)
            .collect();
        names.sort_unstable();
        // By components, what lies in a folder follows it at once.
        if names.windows(2).any(|pair| pair[1].starts_with(pair[0])) {
            return Err("two images have one name, or one lies in the other");
        }
        Ok(self.manifest)
    }
}

/// Blocks that runs cover; none if no image is as long.
fn checked_length_of(runs: &[Run]) -> Option<u32> {
    runs.iter().try_fold(0u32, |sum, run| sum.checked_add(run.blocks))
}

/// Runs with some ranges replaced.
fn correct(runs: &[Run], corrections: &mut [(u32, Run)]) -> Decoded<Vec<Run>> {
    corrections.sort_by_key(|(at, _)| *at);
    let mut corrected = Vec::with_capacity(runs.len() + 2 * corrections.len());
    let mut corrections = corrections.iter().peekable();
    let (mut at, mut skip) = (0u32, 0u32);
    for run in runs {
        // What of this run an earlier correction replaced already.
        let mut from = skip.min(run.blocks);
        skip -= from;
        while let Some((first, correction)) = corrections.next_if(|(first, _)| *first < at + run.blocks) {
            let keep = first.checked_sub(at + from).ok_or("corrections overlap")?;
            push_run(&mut corrected, run.part(from, keep));
            push_run(&mut corrected, *correction);
            let end = from + keep + correction.blocks;
            from = end.min(run.blocks);
            skip = end - from;
        }
        push_run(&mut corrected, run.part(from, run.blocks - from));
        at += run.blocks;
    }
    if skip == 0 && corrections.next().is_none() {
        Ok(corrected)
    } else {
        Err("a correction goes beyond the end of an image")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn content() -> impl Strategy<Value = Content> {
        prop_oneof![
            Just(Content::Hole),
            Just(Content::Zeros),
            Just(Content::Unwritten),
            (0u32..1 << 30).prop_map(|first| Content::Stored(StoreBlock(first)))
        ]
    }

    fn runs() -> impl Strategy<Value = Vec<Run>> {
        let run = (1u32..1000, content()).prop_map(|(blocks, content)| Run { blocks, content });
        prop::collection::vec(run, 0..50)
    }

    fn metadata() -> impl Strategy<Value = Metadata> {
        (
            any::<(u32, u32, i64)>(),
            0u32..1_000_000_000,
            "[a-z]{0,8}",
            any::<Vec<u8>>(),
        )
            .prop_map(|((uid, gid, seconds), nanoseconds, user, value)| Metadata {
                mode: uid & MODE_MASK,
                uid,
                gid,
                user,
                group: String::new(),
                mtime: FileTime { seconds, nanoseconds },
                xattrs: vec![(b"user.x".to_vec(), value)],
            })
    }

    proptest! {
        #[test]
        fn images_come_back(metadata in metadata(), runs in runs(), size in 0..IMAGE_BYTES_MAX) {
            let entries = vec![
                ManifestEntry::Folder(ArchivedFolder { path: "a".into(), metadata: metadata.clone() }),
                ManifestEntry::Image(ArchivedImage { number: 3, names: vec!["a/b".into(), "a/c".into()], size, metadata }),
                ManifestEntry::Runs { image: 3, first_block: 5, runs },
            ];
            let mut payloads = Payloads::default();
            for entry in &entries {
                payloads.push(entry);
            }
            let mut found = Vec::new();
            for payload in payloads.finish() {
                let PlanRecord { commit, last, part } = decode(&encode(CommitNumber(2), 0, true, &payload).unwrap()).unwrap();
                prop_assert_eq!((commit, last), (CommitNumber(2), true));
                let PlanPart::Images(entries) = part else { panic!() };
                found.extend(entries);
            }
            let entries: Vec<_> = entries
                .into_iter()
                .filter(|entry| !matches!(entry, ManifestEntry::Runs { runs, .. } if runs.is_empty()))
                .collect();
            prop_assert_eq!(found, entries);
        }

        #[test]
        fn blocks_come_back(chunks in prop::collection::vec(1u8..=16, 0..100), first in 0u32..1000) {
            let blocks: u32 = chunks.iter().map(|n| u32::from(*n)).sum();
            let announced = AnnouncedBlocks { first: StoreBlock(first), function: FingerprintFunction::Xxhash64, chunks, fingerprints: (0..blocks).collect() };
            let body = encode(CommitNumber(1), 1, false, &encode_announced(&announced)).unwrap();
            prop_assert_eq!(decode(&body), Ok(PlanRecord { commit: CommitNumber(1), last: false, part: PlanPart::Blocks(announced) }));
        }

        #[test]
        fn nothing_is_too_strange(payload: Vec<u8>, part in 0u8..4, raw: Vec<u8>) {
            let _ = decode(&encode(CommitNumber(1), part, false, &payload).unwrap());
            let _ = decode(&raw);
        }
    }

    proptest! {
        #[test]
        fn corrections_replace_just_their_blocks(runs in runs(), places in prop::collection::btree_map(0u32..3000, 1u32..20, 0..30)) {
            let each = |runs: &[Run]| -> Vec<Content> {
                runs.iter().flat_map(|run| (0..run.blocks).map(|n| run.part(n, 1).content)).collect()
            };
            let mut expected = each(&runs);
            let mut joined = Vec::new();
            for run in &runs {
                push_run(&mut joined, *run);
            }
            let mut corrections = Vec::new();
            let mut end = 0;
            for (at, blocks) in places {
                if at >= end && ((at + blocks) as usize) <= expected.len() {
                    end = at + blocks;
                    corrections.push((at, Run { blocks, content: Content::Stored(StoreBlock(at * 7)) }));
                    for n in 0..blocks {
                        expected[(at + n) as usize] = Content::Stored(StoreBlock(at * 7 + n));
                    }
                }
            }
            prop_assert_eq!(each(&correct(&joined, &mut corrections).unwrap()), expected);
        }

        #[test]
        fn no_corrections_are_too_strange(runs in runs(), corrections in prop::collection::vec((any::<u32>(), 1u32..1000), 0..9)) {
            let mut corrections: Vec<_> = corrections
                .into_iter()
                .map(|(at, blocks)| (at % 60_000, Run { blocks, content: Content::Zeros }))
                .collect();
            let _ = correct(&runs, &mut corrections);
        }
    }

    #[test]
    fn what_a_lost_plan_said_is_known_to_be_lost() {
        let image = |number, names: &[&str]| {
            ManifestEntry::Image(ArchivedImage {
                number,
                names: names.iter().map(PathBuf::from).collect(),
                size: 10 * BLOCK_BYTES,
                metadata: Metadata::default(),
            })
        };
        let runs = |image, first_block, blocks| ManifestEntry::Runs {
            image,
            first_block,
            runs: vec![Run {
                blocks,
                content: Content::Zeros,
            }],
        };
        let built = |entries: Vec<ManifestEntry>| {
            let mut builder = ManifestBuilder::default();
            builder.add(PlanPart::Images(entries))?;
            builder.finish()
        };
        let found = built(vec![image(1, &["a"]), runs(1, 0, 2), runs(1, 5, 2), runs(2, 0, 1)]).unwrap();
        let blocks: Vec<_> = found.images[0]
            .runs
            .iter()
            .map(|run| (run.blocks, run.content))
            .collect();
        let (zeros, lost) = (Content::Zeros, Content::Lost);
        assert_eq!(blocks, [(2, zeros), (3, lost), (2, zeros), (3, lost)]);
        assert!(built(vec![image(1, &["a"]), runs(1, 0, 11)]).is_err());
        assert!(built(vec![image(1, &["a"]), runs(1, 0, 2), runs(1, 1, 2)]).is_err());
        assert!(built(vec![image(1, &["a"]), image(1, &["b"])]).is_err());
        assert!(built(vec![image(1, &["a"]), image(2, &["a"])]).is_err());
        assert!(built(vec![image(1, &["a/b"]), image(2, &["c", "a"])]).is_err());
        assert!(built(vec![image(1, &["a/b"]), image(2, &["a.c", "a/bc"])]).is_ok());
    }

    /// As many as an archive may have, in as many entries: each is looked at once.
    #[test]
    fn an_image_may_come_in_very_many_entries() {
        const ENTRIES: u32 = 1 << 20;
        let image = ManifestEntry::Image(ArchivedImage {
            number: 1,
            names: vec!["a".into()],
            size: u64::from(ENTRIES) * BLOCK_BYTES,
            metadata: Metadata::default(),
        });
        let runs = (0..ENTRIES).map(|first_block| ManifestEntry::Runs {
            image: 1,
            first_block,
            runs: vec![Run {
                blocks: 1,
                content: if first_block % 2 == 0 {
                    Content::Zeros
                } else {
                    Content::Hole
                },
            }],
        });
        let mut builder = ManifestBuilder::default();
        builder
            .add(PlanPart::Images(std::iter::once(image).chain(runs).collect()))
            .unwrap();
        assert_eq!(builder.finish().unwrap().images[0].runs.len(), ENTRIES as usize);
    }

    #[test]
    fn long_lists_of_runs_are_split_and_fit() {
        let runs: Vec<Run> = (0..100_000)
            .map(|n| Run {
                blocks: 1,
                content: Content::Stored(StoreBlock(n * 40_000)),
            })
            .collect();
        let mut payloads = Payloads::default();
        payloads.push(&ManifestEntry::Runs {
            image: 0,
            first_block: 0,
            runs: runs.clone(),
        });
        let mut found = Vec::new();
        for payload in payloads.finish() {
            assert!(payload.len() < PAYLOAD_BYTES_MAX);
            for entry in decode_entries(&payload, true).unwrap() {
                let ManifestEntry::Runs { first_block, runs, .. } = entry else {
                    panic!()
                };
                assert_eq!(first_block as usize, found.len());
                found.extend(runs);
            }
        }
        assert_eq!(found, runs);
    }

    #[test]
    fn paths_that_lead_out_are_refused() {
        for bad in [
            "",
            "/a",
            "a/",
            "..",
            "a/../b",
            "./a",
            "a//b",
            "a\0b",
            &"x".repeat(256),
            &"x/".repeat(3000),
        ] {
            assert!(!is_safe(bad.as_bytes()), "{bad}");
        }
        for good in ["a", "a/b..c", "private.img.3@2026-01-01T00:00:00Z", "...", "\u{202e}"] {
            assert!(is_safe(good.as_bytes()), "{good}");
        }
    }
}
