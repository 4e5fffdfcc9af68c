//! PLAN: the images of a commit, and what each of their ranges holds.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::announced::AnnouncedBlocks;
use super::attributes;
pub use super::attributes::file_time;
use super::limits::{
    IMAGE_BYTES_MAX, IMAGES_MAX, NAME_BYTES_MAX, NAMES_MAX, PATH_BYTES_MAX, PAYLOAD_BYTES_MAX, RUNS_MAX,
    STORED_RUNS_BLOCKS_MAX, TEXT_BYTES_MAX, TEXT_OVERHEAD,
};
use super::list::{ImageSummary, by_number};
use crate::block::BLOCK_BYTES;
use crate::codec::{
    CRITICAL, Decoded, Decoder, Malformed, next_entry, payload_body, payload_of, put_entry, put_string, put_varint,
    put_zigzag, skip_entry,
};
use crate::content::{Content, Metadata, Run, push_run};
use crate::numbers::{CommitNumber, StoreBlock};
use crate::spill::{Budget, SpillVec};

/// Bytes after which a writer begins another record: little is lost with one.
const PAYLOAD_BYTES: usize = 1 << 20;
/// Bytes of an entry at most, its runs aside.
pub const ENTRY_BYTES_MAX: usize = 2 << 20;
/// Bytes of a payload before its content: the commit's number.
const NUMBER_BYTES: usize = 4;

const TAG_FOLDER: u8 = CRITICAL | 1;
const TAG_IMAGE: u8 = CRITICAL | 2;
const TAG_RUNS: u8 = CRITICAL | 3;

/// A part of a PLAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlanPart {
    /// Images as they were planned, before their blocks.
    Planned,
    /// Blocks that follow.
    Blocks,
    /// Images as they are.
    Final,
}

impl PlanPart {
    /// Returns its number in the format.
    pub fn number(self) -> u8 {
        match self {
            Self::Planned => 0,
            Self::Blocks => 1,
            Self::Final => 2,
        }
    }

    /// Returns the part with a number.
    ///
    /// # Errors
    /// Says that this version does not know it.
    pub fn of(number: u8) -> Decoded<Self> {
        [Self::Planned, Self::Blocks, Self::Final]
            .into_iter()
            .find(|part| part.number() == number)
            .ok_or(Malformed::Unsupported("it has PLANs that this version does not know"))
    }
}

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
    /// Returns the name it is called by.
    pub fn path(&self) -> &Path {
        self.names.first().map_or(Path::new(""), PathBuf::as_path)
    }

    /// Returns its length in blocks, the last of which may be a partial one.
    pub fn blocks(&self) -> u32 {
        u32::try_from(self.size.div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX)
    }
}

/// Returns the body of a PLAN.
///
/// # Errors
/// Returns the error that zstd gave.
pub fn encode(commit: CommitNumber, part: PlanPart, last: bool, content: &[u8]) -> std::io::Result<Vec<u8>> {
    let payload = [&commit.0.to_le_bytes()[..], content].concat();
    payload_body([part.number(), last.into(), 0], &payload)
}

/// A PLAN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlanRecord {
    /// The number of the commit it is for.
    pub commit: CommitNumber,
    /// What it holds.
    pub part: PlanPart,
    /// Whether it is the last of its part.
    pub last: bool,
    payload: Vec<u8>,
}

impl PlanRecord {
    /// Decodes the body of a PLAN, but for its content.
    ///
    /// # Errors
    /// Returns what is malformed.
    pub fn decode(body: &[u8]) -> Decoded<Self> {
        let ([part, last, reserved], payload) = payload_of(body, PAYLOAD_BYTES_MAX)?;
        if last > 1 || reserved != 0 {
            return Err("a flag is neither 0 nor 1".into());
        }
        let commit = CommitNumber(Decoder::new(&payload).u32()?);
        Ok(Self {
            commit,
            part: PlanPart::of(part)?,
            last: last == 1,
            payload,
        })
    }

    /// Returns a decoder of its content.
    pub fn content(&self) -> Decoder<'_> {
        Decoder::new(self.payload.get(NUMBER_BYTES..).unwrap_or_default())
    }

    /// Decodes its content where that announces blocks.
    ///
    /// # Errors
    /// Returns what is malformed.
    pub fn announced(&self) -> Decoded<AnnouncedBlocks> {
        AnnouncedBlocks::decode(self.content())
    }
}

/// Collects entries into contents of PLANs of a bearable size.
#[derive(Debug, Default)]
pub struct PlanContents {
    full: Vec<Vec<u8>>,
    current: Vec<u8>,
}

impl PlanContents {
    /// Appends a folder.
    pub fn folder(&mut self, folder: &ArchivedFolder) {
        put_entry(&mut self.current, TAG_FOLDER, |fields| {
            put_string(fields, folder.path.as_os_str().as_bytes());
            attributes::put(fields, &folder.metadata);
        });
        self.end_if_full();
    }

    /// Appends an image.
    pub fn image(&mut self, image: &ArchivedImage) {
        put_entry(&mut self.current, TAG_IMAGE, |fields| {
            put_varint(fields, image.number.into());
            put_varint(fields, image.size);
            put_varint(fields, image.names.len() as u64);
            for name in &image.names {
                put_string(fields, name.as_os_str().as_bytes());
            }
            attributes::put(fields, &image.metadata);
        });
        self.end_if_full();
    }

    /// Appends runs of an image, which follow each other from `first_block` on. Long lists are split.
    pub fn runs(&mut self, image: u32, first_block: u32, runs: &[Run]) {
        /// Runs in an entry: at most ten bytes each for both numbers.
        const RUNS: usize = 16 << 10;
        let mut first = first_block;
        for runs in runs.chunks(RUNS) {
            put_entry(&mut self.current, TAG_RUNS, |fields| {
                put_varint(fields, image.into());
                put_varint(fields, first.into());
                put_varint(fields, runs.len() as u64);
                put_runs(fields, runs);
            });
            first += runs.iter().map(|run| run.blocks).sum::<u32>();
            self.end_if_full();
        }
    }

    fn end_if_full(&mut self) {
        if self.current.len() >= PAYLOAD_BYTES {
            self.full.push(std::mem::take(&mut self.current));
        }
    }

    /// Takes the contents that are full. The last one is kept until [`PlanContents::finish`].
    pub fn take_full(&mut self) -> Vec<Vec<u8>> {
        std::mem::take(&mut self.full)
    }

    /// Returns the contents that were not taken yet.
    pub fn finish(mut self) -> Vec<Vec<u8>> {
        if !self.current.is_empty() {
            self.full.push(self.current);
        }
        self.full
    }
}

fn put_runs(encoded: &mut Vec<u8>, runs: &[Run]) {
    let mut predicted = 0i64;
    for run in runs {
        let kind = match run.content {
            Content::Hole | Content::Lost => 0,
            Content::Zeros => 1,
            Content::Unwritten => 2,
            Content::Stored(_) => 3,
        };
        put_varint(encoded, u64::from(run.blocks) << 2 | kind);
        if let Content::Stored(first) = run.content {
            put_zigzag(encoded, i64::from(first.0) - predicted);
            predicted = i64::from(first.0) + i64::from(run.blocks);
        }
    }
}

/// Decodes a run. `predicted` is where the last stored run ended.
fn run(decoder: &mut Decoder<'_>, predicted: &mut i64) -> Decoded<Run> {
    let head = decoder.varint()?;
    let blocks = u32::try_from(head >> 2).map_err(|_| "a run is longer than allowed")?;
    if blocks == 0 {
        return Err("a run is empty".into());
    }
    let content = match head & 3 {
        0 => Content::Hole,
        1 => Content::Zeros,
        2 => Content::Unwritten,
        _ => {
            let first = predicted.checked_add(decoder.zigzag()?).unwrap_or(-1);
            *predicted = first.saturating_add(i64::from(blocks));
            if first < 0 || *predicted > i64::from(StoreBlock::END_MAX.0) {
                return Err("a run refers to blocks that no store can hold".into());
            }
            Content::Stored(StoreBlock(u32::try_from(first).unwrap_or(u32::MAX)))
        }
    };
    Ok(Run { blocks, content })
}

/// Decodes a path, and refuses what could lead out of the folder it is restored to.
pub(super) fn path(decoder: &mut Decoder<'_>) -> Decoded<PathBuf> {
    let bytes = decoder.string(PATH_BYTES_MAX)?;
    if !is_safe(bytes) {
        return Err("a path is not allowed: absolute, with `..`, or with a NUL".into());
    }
    Ok(PathBuf::from(OsStr::from_bytes(bytes)))
}

/// Returns whether a path stays in the folder it is restored to.
pub fn is_safe(path: &[u8]) -> bool {
    let is_name = |name: &[u8]| !name.is_empty() && name.len() <= NAME_BYTES_MAX && name != b"." && name != b"..";
    !path.contains(&0) && path.len() <= PATH_BYTES_MAX && path.split(|byte| *byte == b'/').all(is_name)
}

/// Decodes a store address that this version can hold.
pub(super) fn store_block(number: u64) -> Decoded<StoreBlock> {
    u32::try_from(number)
        .ok()
        .map(StoreBlock)
        .filter(|block| *block <= StoreBlock::END_MAX)
        .ok_or_else(|| "a store address is larger than allowed".into())
}

/// An image and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRuns {
    /// The image.
    pub image: ArchivedImage,
    /// Its ranges, one after the other, to its end.
    pub runs: SpillVec<Run>,
}

impl ImageRuns {
    /// Returns whether all of its blocks lie below the end of the store.
    pub fn is_below(&self, store_end: StoreBlock) -> bool {
        self.runs.iter().all(|run| match run.content {
            Content::Stored(first) => first.checked_add(run.blocks).is_some_and(|end| end <= store_end),
            _ => true,
        })
    }

    /// Returns the store address of its last block and how many bytes of that belong to it, if it is stored and the image ends within it. What
    /// such a block holds behind the end is zeros.
    pub fn partial_block(&self) -> Option<(StoreBlock, usize)> {
        let bytes = usize::try_from(self.image.size % BLOCK_BYTES)
            .ok()
            .filter(|bytes| *bytes > 0)?;
        let last = self.runs.last()?;
        match last.content {
            Content::Stored(first) => Some((first + (last.blocks - 1), bytes)),
            _ => None,
        }
    }

    /// Returns whether what a range of it holds is lost.
    pub fn is_incomplete(&self) -> bool {
        self.runs.iter().any(|run| run.content == Content::Lost)
    }
}

/// The images of a commit.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Manifest {
    /// The folders.
    pub folders: Vec<ArchivedFolder>,
    /// The images.
    pub images: Vec<ImageRuns>,
}

impl Manifest {
    /// Keeps the images that a COMMIT lists: no others are part of it, and nothing says what they must be.
    pub fn keep_listed(&mut self, summaries: &[ImageSummary]) {
        let listed: HashSet<&Path> = summaries.iter().map(|summary| summary.path.as_path()).collect();
        self.images.retain(|image| listed.contains(image.image.path()));
    }

    /// Keeps the images whose number, size and first name are those that a COMMIT lists, and whose blocks lie below the end of the store.
    pub fn keep_as_listed(&mut self, summaries: &[ImageSummary], store_end: StoreBlock) {
        let listed = by_number(summaries);
        self.images.retain(|image| {
            let is_listed = listed.get(&image.image.number).is_some_and(|summary| {
                (summary.size, summary.path.as_path()) == (image.image.size, image.image.path())
            });
            is_listed && image.is_below(store_end)
        });
    }

    /// Checks that the blocks of all images lie below the end of the store.
    ///
    /// # Errors
    /// Says that some do not.
    pub fn check_below(&self, store_end: StoreBlock) -> Decoded<()> {
        if self.images.iter().all(|image| image.is_below(store_end)) {
            Ok(())
        } else {
            Err("a run refers to blocks that are not there".into())
        }
    }

    /// Checks that images and folders can stand beside each other.
    ///
    /// # Errors
    /// Says that two images have one name, or that a folder or an image lies in an image.
    pub fn check_names(&self) -> Decoded<()> {
        let images = self.images.iter().flat_map(|image| &image.image.names);
        let mut names: Vec<(&Path, bool)> = images.map(|name| (name.as_path(), false)).collect();
        names.extend(self.folders.iter().map(|folder| (folder.path.as_path(), true)));
        names.sort_unstable();
        // By components, what lies below an image follows it at once, and a folder of its name stands behind it.
        let mut last_image: Option<&Path> = None;
        for (name, is_folder) in names {
            if last_image.is_some_and(|image| name.starts_with(image)) {
                return Err("two images have one name, or something lies in an image".into());
            }
            if !is_folder {
                last_image = Some(name);
            }
        }
        Ok(())
    }

    /// Completes images of which something is lost, and those that are not there, with what was planned of them. Whether that is what they
    /// are, their digests must prove.
    pub fn complete_from(&mut self, planned: Self) {
        let places: HashMap<u32, usize> = (self.images.iter().enumerate())
            .map(|(place, image)| (image.image.number, place))
            .collect();
        for image in planned.images {
            match places.get(&image.image.number) {
                Some(place) if self.images[*place].is_incomplete() => {
                    if self.images[*place].image.size == image.image.size {
                        self.images[*place].runs = image.runs;
                    }
                }
                Some(_) => {}
                None => self.images.push(image),
            }
        }
        let known: HashSet<PathBuf> = self.folders.iter().map(|folder| folder.path.clone()).collect();
        let missing = planned
            .folders
            .into_iter()
            .filter(|folder| !known.contains(&folder.path));
        self.folders.extend(missing);
    }
}

/// Puts a manifest together from the PLANs of an epoch that are of one part, in the order they were written; some may be missing.
#[derive(Debug, Clone)]
pub struct ManifestBuilder {
    manifest: Manifest,
    places: HashMap<u32, usize>,
    /// The blocks of each image that its runs cover so far.
    covered: Vec<u32>,
    runs: usize,
    /// The blocks of stored runs so far.
    stored_blocks: u64,
    text_bytes: usize,
    /// Whether there are runs of an image that is not there.
    has_orphans: bool,
    budget: Budget,
}

impl ManifestBuilder {
    /// Begins a manifest whose runs lie in files where they exceed a budget.
    pub fn new(budget: &Budget) -> Self {
        Self {
            manifest: Manifest::default(),
            places: HashMap::new(),
            covered: Vec::new(),
            runs: 0,
            stored_blocks: 0,
            text_bytes: 0,
            has_orphans: false,
            budget: budget.clone(),
        }
    }

    /// Takes what was added, and begins anew.
    #[must_use]
    pub fn take(&mut self) -> Self {
        let anew = Self::new(&self.budget);
        std::mem::replace(self, anew)
    }

    /// Adds the content of a PLAN.
    ///
    /// # Errors
    /// Returns what is malformed, contradicts what was added before, or exceeds a limit.
    pub fn add(&mut self, mut content: Decoder<'_>) -> Decoded<()> {
        while let Some((tag, mut fields)) = next_entry(&mut content)? {
            // What exceeded a limit takes nothing more, whoever goes on after the error.
            self.check_limits()?;
            match tag {
                TAG_FOLDER => {
                    let path = path(&mut fields)?;
                    self.count_text(path.as_os_str().len());
                    let folder = ArchivedFolder {
                        path,
                        metadata: attributes::decode(&mut fields, &mut self.text_bytes)?,
                    };
                    self.manifest.folders.push(folder);
                }
                TAG_IMAGE => self.add_image(&mut fields)?,
                TAG_RUNS => self.add_runs(&mut fields)?,
                tag => skip_entry(tag)?,
            }
            self.check_limits()?;
        }
        Ok(())
    }

    fn check_limits(&self) -> Decoded<()> {
        if self.manifest.folders.len() + self.manifest.images.len() > IMAGES_MAX {
            return Err("it has more images and folders than allowed".into());
        }
        if self.text_bytes > TEXT_BYTES_MAX {
            return Err("it has more names and attributes than allowed".into());
        }
        Ok(())
    }

    fn count_text(&mut self, bytes: usize) {
        self.text_bytes += bytes + TEXT_OVERHEAD;
    }

    fn add_image(&mut self, fields: &mut Decoder<'_>) -> Decoded<()> {
        let (number, size) = (fields.varint32()?, fields.varint()?);
        if size > IMAGE_BYTES_MAX {
            return Err("an image is larger than allowed".into());
        }
        let count = fields.count(2)?;
        if count == 0 || count > NAMES_MAX {
            return Err("an image has no name, or too many".into());
        }
        let mut names = Vec::with_capacity(count);
        for _ in 0..count {
            let name = path(fields)?;
            self.count_text(name.as_os_str().len());
            names.push(name);
        }
        let image = ArchivedImage {
            number,
            names,
            size,
            metadata: attributes::decode(fields, &mut self.text_bytes)?,
        };
        if self.places.insert(number, self.manifest.images.len()).is_some() {
            return Err("two images have one number".into());
        }
        self.manifest.images.push(ImageRuns {
            image,
            runs: SpillVec::new_in(&self.budget),
        });
        self.covered.push(0);
        Ok(())
    }

    fn add_runs(&mut self, fields: &mut Decoder<'_>) -> Decoded<()> {
        let (number, first_block) = (fields.varint32()?, fields.varint32()?);
        let count = fields.count(1)?;
        self.runs += count;
        if self.runs > RUNS_MAX {
            return Err("it has more runs than allowed".into());
        }
        // Where the image's own entry was lost, so is this.
        let Some(place) = self.places.get(&number).copied() else {
            self.has_orphans = true;
            return Ok(());
        };
        let (image, covered) = (&mut self.manifest.images[place], &mut self.covered[place]);
        let gap = first_block.checked_sub(*covered).ok_or("runs of an image overlap")?;
        let (mut end, mut predicted) = (first_block, 0);
        push_run(&mut image.runs, lost(gap));
        for _ in 0..count {
            let run = run(fields, &mut predicted)?;
            end = end
                .checked_add(run.blocks)
                .filter(|end| *end <= image.image.blocks())
                .ok_or("runs go beyond the end of an image")?;
            if let Content::Stored(_) = run.content {
                self.stored_blocks += u64::from(run.blocks);
            }
            push_run(&mut image.runs, run);
        }
        if self.stored_blocks > STORED_RUNS_BLOCKS_MAX {
            return Err("its images have more blocks than allowed".into());
        }
        *covered = end;
        Ok(())
    }

    /// Returns whether there are runs of an image that is not there: then a record is missing.
    pub fn has_orphans(&self) -> bool {
        self.has_orphans
    }

    /// Returns the manifest. What no PLAN says of an image is lost.
    ///
    /// # Errors
    /// Says that two images have one name, or that a folder or an image lies in an image.
    pub fn finish(mut self) -> Decoded<Manifest> {
        for (image, covered) in self.manifest.images.iter_mut().zip(&self.covered) {
            let blocks = image.image.blocks().saturating_sub(*covered);
            push_run(&mut image.runs, lost(blocks));
        }
        self.manifest.check_names()?;
        Ok(self.manifest)
    }
}

fn lost(blocks: u32) -> Run {
    Run {
        blocks,
        content: Content::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::attributes::tests::metadata;
    use proptest::prelude::*;

    fn content() -> impl Strategy<Value = Content> {
        prop_oneof![
            Just(Content::Hole),
            Just(Content::Zeros),
            Just(Content::Unwritten),
            (0u32..1 << 30).prop_map(|first| Content::Stored(StoreBlock(first)))
        ]
    }

    fn joined(runs: &[Run]) -> SpillVec<Run> {
        let mut joined = SpillVec::default();
        for run in runs {
            push_run(&mut joined, *run);
        }
        joined
    }

    fn image(number: u32, names: &[&str], blocks: u64) -> ArchivedImage {
        ArchivedImage {
            number,
            names: names.iter().map(PathBuf::from).collect(),
            size: blocks * BLOCK_BYTES,
            metadata: Metadata::default(),
        }
    }

    fn built(contents: &[Vec<u8>]) -> Decoded<Manifest> {
        let mut builder = ManifestBuilder::new(&Budget::default());
        for content in contents {
            builder.add(Decoder::new(content))?;
        }
        builder.finish()
    }

    proptest! {
        #[test]
        fn images_come_back(metadata in metadata(), runs in prop::collection::vec((1u32..1000, content()), 0..50)) {
            let runs: Vec<Run> = runs.into_iter().map(|(blocks, content)| Run { blocks, content }).collect();
            let blocks: u64 = runs.iter().map(|run| u64::from(run.blocks)).sum();
            let folder = ArchivedFolder { path: "a".into(), metadata: metadata.clone() };
            let image = ArchivedImage { metadata, ..image(3, &["a/b", "a/c"], blocks) };
            let mut contents = PlanContents::default();
            contents.folder(&folder);
            contents.image(&image);
            contents.runs(3, 0, &runs);
            let records = contents.finish().into_iter().map(|content| {
                let record = PlanRecord::decode(&encode(CommitNumber(2), PlanPart::Final, true, &content).unwrap()).unwrap();
                assert_eq!((record.commit, record.part, record.last), (CommitNumber(2), PlanPart::Final, true));
                record.content().take(content.len()).unwrap().to_vec()
            });
            let manifest = built(&records.collect::<Vec<_>>()).unwrap();
            prop_assert_eq!(&manifest.folders, &[folder]);
            prop_assert_eq!(&manifest.images, &[ImageRuns { image, runs: joined(&runs) }]);
        }

        #[test]
        fn nothing_is_too_strange(content: Vec<u8>, part in 0u8..4, raw: Vec<u8>) {
            for body in [payload_body([part, 0, 0], &content).unwrap(), raw] {
                if let Ok(record) = PlanRecord::decode(&body) {
                    let _ = record.announced();
                    let _ = built(&[record.content().take(record.content().left()).unwrap().to_vec()]);
                }
            }
        }
    }

    #[test]
    fn what_a_lost_plan_said_is_known_to_be_lost() {
        let zeros = |blocks| {
            [Run {
                blocks,
                content: Content::Zeros,
            }]
        };
        let of = |images: &[ArchivedImage], runs: &[(u32, u32, u32)]| {
            let mut contents = PlanContents::default();
            for image in images {
                contents.image(image);
            }
            for (number, first, blocks) in runs {
                contents.runs(*number, *first, &zeros(*blocks));
            }
            built(&contents.finish())
        };
        let one = image(1, &["a"], 10);
        let found = of(std::slice::from_ref(&one), &[(1, 0, 2), (1, 5, 2), (2, 0, 1)]).unwrap();
        let blocks: Vec<_> = found.images[0]
            .runs
            .iter()
            .map(|run| (run.blocks, run.content))
            .collect();
        let (zeros, lost) = (Content::Zeros, Content::Lost);
        assert_eq!(blocks, [(2, zeros), (3, lost), (2, zeros), (3, lost)]);
        assert!(of(std::slice::from_ref(&one), &[(1, 0, 11)]).is_err());
        assert!(of(std::slice::from_ref(&one), &[(1, 0, 2), (1, 1, 2)]).is_err());
        assert!(of(&[one.clone(), image(1, &["b"], 1)], &[]).is_err());
        assert!(of(&[one, image(2, &["a"], 1)], &[]).is_err());
        assert!(of(&[image(1, &["a/b"], 1), image(2, &["c", "a"], 1)], &[]).is_err());
        assert!(of(&[image(1, &["a/b"], 1), image(2, &["a.c", "a/bc"], 1)], &[]).is_ok());
    }

    #[test]
    fn what_is_lost_is_completed_from_what_was_planned() {
        let stored = |first| Run {
            blocks: 4,
            content: Content::Stored(StoreBlock(first)),
        };
        let of = |images: &[(u32, &str, u32, bool)]| {
            let mut contents = PlanContents::default();
            for (number, name, first, has_runs) in images {
                contents.image(&image(*number, &[name], 4));
                if *has_runs {
                    contents.runs(*number, 0, &[stored(*first)]);
                }
            }
            built(&contents.finish()).unwrap()
        };
        let mut manifest = of(&[(1, "a", 10, true), (2, "b", 20, false)]);
        assert!(manifest.images[1].is_incomplete());
        manifest.complete_from(of(&[(1, "a", 50, true), (2, "b", 60, true), (3, "c", 70, true)]));
        let runs: Vec<Run> = manifest.images.iter().map(|image| image.runs[0]).collect();
        assert_eq!(runs, [stored(10), stored(60), stored(70)]);
    }

    /// As many as a manifest may have, in as many entries: each is looked at once.
    #[test]
    fn an_image_may_come_in_very_many_entries() {
        const ENTRIES: u32 = 1 << 20;
        let mut contents = PlanContents::default();
        contents.image(&image(1, &["a"], ENTRIES.into()));
        for first in 0..ENTRIES {
            let content = if first % 2 == 0 { Content::Zeros } else { Content::Hole };
            contents.runs(1, first, &[Run { blocks: 1, content }]);
        }
        assert_eq!(
            built(&contents.finish()).unwrap().images[0].runs.len(),
            ENTRIES as usize
        );
    }

    #[test]
    fn long_lists_of_runs_are_split_and_fit() {
        let runs: Vec<Run> = (0..100_000)
            .map(|n| Run {
                blocks: 1,
                content: Content::Stored(StoreBlock(n * 40_000)),
            })
            .collect();
        let mut contents = PlanContents::default();
        contents.image(&image(0, &["a"], 100_000));
        contents.runs(0, 0, &runs);
        let contents = contents.finish();
        assert!(
            contents
                .iter()
                .all(|content| content.len() + NUMBER_BYTES < PAYLOAD_BYTES_MAX)
        );
        assert_eq!(built(&contents).unwrap().images[0].runs[..], runs[..]);
    }

    #[test]
    fn a_manifest_has_limits() {
        let long = "x/".repeat(2000) + "x";
        let mut contents = PlanContents::default();
        for number in 0..20_000 {
            contents.folder(&ArchivedFolder {
                path: format!("{number}/{long}").into(),
                metadata: Metadata::default(),
            });
        }
        assert!(built(&contents.finish()).is_err());
        let mut unknown = Vec::new();
        put_entry(&mut unknown, 77, |_| ());
        assert!(built(&[unknown]).is_ok());
        let mut unknown = Vec::new();
        put_entry(&mut unknown, CRITICAL | 0x4d, |_| ());
        assert!(matches!(built(&[unknown]), Err(Malformed::Unsupported(_))));
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
