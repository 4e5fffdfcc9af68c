//! What a restore does: which images it makes and under which names, which blocks of the store they need, which of those the disk has, and
//! what that takes. Pure: what stands in the folder that is restored to comes as a [`Destination`].

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::METADATA_BYTES_PER_REFERENCE;
use super::seeds::SeedMatch;
use crate::archive::list::ImageSummary;
use crate::archive::manifest::{ImageRuns, Manifest};
use crate::archive::record::Hash;
use crate::block::{ByteRange, bytes};
use crate::content::{Content, Run};
use crate::error::{Error, Result};
use crate::numbers::{CommitNumber, StoreBlock};
use crate::pool::{Revision, patterns, revision_of};
use crate::range;
use crate::shown::shown;

/// Bytes that a restore leaves free for the filesystem's own needs.
pub const RESERVE_BYTES: u64 = 16 << 20;
/// What the names of images end with that are restored in part.
const PARTIAL: &str = ".vmfold-partial";
/// Bytes of a name at most (`NAME_MAX` of linux/limits.h).
const NAME_BYTES_MAX: usize = 255;
/// Hexadecimal digits that tell long names from each other.
const HASH_DIGITS: usize = 16;

/// A commit, as messages and journals call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommitName {
    /// Its number.
    pub number: CommitNumber,
    /// The first digits of its hash.
    pub id: String,
    /// The hash of its record; zeros where that is lost.
    pub hash: Hash,
}

/// Images that can be restored together: those of a commit.
#[derive(Debug, Default)]
pub struct Contents {
    /// Folders, images, and what each range of an image holds.
    pub manifest: Manifest,
    /// What the COMMIT says of each image; empty as long as it is not known.
    pub summaries: Vec<ImageSummary>,
    /// The commit, once it is known.
    pub commit: Option<CommitName>,
    /// Whether something that says what images hold is damaged.
    pub doubtful: bool,
    /// What they come from, if that is a backup that another program made.
    pub kind: Option<&'static str>,
    /// Whether more images may follow, and more of what these hold.
    pub grows: bool,
}

/// An image that is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredImage {
    /// Its place in the manifest.
    pub image: usize,
    /// The name it is called by in the archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// The names it gets, relative to the folder that is restored to: the first is made, the others are links to it.
    #[serde(serialize_with = "crate::shown::serialize_all")]
    pub names: Vec<PathBuf>,
    /// Bytes, holes included.
    pub size: u64,
}

impl RestoredImage {
    /// The name that what is left of it gets if it is damaged. A number tells it from others that are in the way: the first has none.
    fn partial_name(&self, number: usize) -> PathBuf {
        let first = self.names.first().map_or(Path::new("image"), PathBuf::as_path);
        let name = first.file_name().unwrap_or_default().as_bytes();
        let suffix = match number {
            1 => PARTIAL.to_owned(),
            _ => format!(".{number}{PARTIAL}"),
        };
        let mut partial = name.to_vec();
        if name.len() + suffix.len() > NAME_BYTES_MAX {
            // Others may begin in the same way.
            let hash = blake3::hash(name).to_hex();
            partial.truncate(NAME_BYTES_MAX - suffix.len() - HASH_DIGITS - 1);
            partial.push(b'.');
            partial.extend_from_slice(&hash.as_bytes()[..HASH_DIGITS]);
        }
        partial.extend_from_slice(suffix.as_bytes());
        first.with_file_name(OsStr::from_bytes(&partial))
    }
}

/// The names that what is left of damaged images gets, by their places in the manifest. None is a name of another image, or of a folder that one
/// lies in: someone may have stored what an earlier restore left.
pub fn partial_names(images: &[RestoredImage], damaged: &BTreeSet<usize>) -> BTreeMap<usize, PathBuf> {
    let mut given = BTreeMap::new();
    if damaged.is_empty() {
        return given;
    }
    let names = images.iter().flat_map(|image| &image.names);
    let mut taken: BTreeSet<PathBuf> = names.flat_map(|name| name.ancestors()).map(Path::to_owned).collect();
    for image in images.iter().filter(|image| damaged.contains(&image.image)) {
        let mut number = 1;
        while !taken.insert(image.partial_name(number)) {
            number += 1;
        }
        given.insert(image.image, image.partial_name(number));
    }
    given
}

/// The images that were asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selected {
    /// Those that the manifest has.
    pub images: Vec<RestoredImage>,
    /// Names of those that the commit has and the manifest has lost.
    pub missing: Vec<PathBuf>,
}

/// Chooses images by patterns; none means all, and one that means a folder means everything in it. Of an image with several names, only those
/// are restored that match.
///
/// # Errors
/// [`Error::Usage`] if a pattern makes no sense; [`Error::NoMatch`].
pub fn select(contents: &Contents, only: &[String]) -> Result<Selected> {
    let takes = chooser(only)?;
    let images = &contents.manifest.images;
    let chosen = images.iter().enumerate().filter_map(|(place, one)| {
        // A name that was not asked for could stand for another file.
        let names: Vec<PathBuf> = one.image.names.iter().filter(|name| takes(name)).cloned().collect();
        (!names.is_empty()).then(|| RestoredImage {
            image: place,
            path: one.image.path().to_owned(),
            names,
            size: one.image.size,
        })
    });
    let known: BTreeSet<&Path> = images.iter().map(|one| one.image.path()).collect();
    let paths = contents.summaries.iter().map(|summary| summary.path.as_path());
    let missing = paths.filter(|path| !known.contains(path) && takes(path));
    let selected = Selected {
        images: chosen.collect(),
        missing: missing.map(Path::to_owned).collect(),
    };
    if selected.images.is_empty() && selected.missing.is_empty() && !contents.grows {
        let whole = match (&contents.kind, &contents.commit) {
            (Some(_), _) => "this backup".to_owned(),
            (None, Some(commit)) => format!("commit {} ({})", commit.number, commit.id),
            (None, None) => "this commit".to_owned(),
        };
        return Err(Error::NoMatch {
            whole,
            others: Vec::new(),
        });
    }
    Ok(selected)
}

impl Selected {
    /// Leaves out images that are revisions already, unless all are.
    pub fn leave_revisions_out(&mut self) {
        let is_revision = |image: &RestoredImage| revision_of(&image.path).is_some();
        if !self.images.iter().all(is_revision) {
            self.images.retain(|image| !is_revision(image));
        }
    }
}

/// What tells whether patterns choose a path, as [`select`] does.
///
/// # Errors
/// [`Error::Usage`] if a pattern makes no sense.
pub fn chooser(only: &[String]) -> Result<impl Fn(&Path) -> bool + use<>> {
    let trimmed = only.iter().map(|pattern| pattern.trim_end_matches('/'));
    let all: Vec<String> = trimmed
        .flat_map(|pattern| [pattern.to_owned(), format!("{pattern}/**")])
        .collect();
    let (set, takes_all) = (patterns(&all)?, only.is_empty());
    Ok(move |path: &Path| takes_all || set.is_match(path))
}

/// An image that is to become a revision of another name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct RevisionToName {
    /// The image that it will be a revision of, relative.
    pub of: PathBuf,
    /// Its number in the archive, if it is a revision there.
    number: Option<u64>,
    time: String,
    /// Its place among the images that are restored.
    pub at: usize,
}

/// Revisions of an image that stand in the folder already.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RevisionsThere {
    /// The greatest of their numbers; 0 if there are none.
    pub greatest: u64,
    /// The names of those that the interrupted restore made, by the image's place in the manifest.
    pub given: BTreeMap<usize, PathBuf>,
}

/// Whose revisions images become that are restored as revisions of Qubes OS, in the order in which they get their numbers: that of their
/// numbers in the archive, then of the times they were last written.
///
/// # Errors
/// [`Error::Usage`] for an image that can have no revisions.
pub fn revisions_to_name(contents: &Contents, images: &[RestoredImage]) -> Result<Vec<RevisionToName>> {
    let mut order = Vec::new();
    for (at, restored) in images.iter().enumerate() {
        let image = &contents.manifest.images[restored.image].image;
        let path = restored.names.first().map_or(image.path(), PathBuf::as_path);
        let (of, number, time) = match revision_of(path) {
            Some(Revision { image, number, time }) => (image, number, time),
            None => (path.to_owned(), None, time_of(image.metadata.mtime.seconds)),
        };
        if of.extension().is_none_or(|extension| extension != "img") {
            return Err(Error::Usage(format!(
                "--as-revision names revisions of .img files, and `{}` is none",
                shown(path)
            )));
        }
        order.push(RevisionToName { of, number, time, at });
    }
    order.sort();
    Ok(order)
}

/// Gives images the names of revisions: the next free number, and the time the image was last written; or the name that the interrupted
/// restore gave. The driver sorts by number and refuses names of any other form (qubes-core-admin, `qubes/storage/reflink.py`).
///
/// # Errors
/// [`Error::Usage`] where there is no greater number.
pub fn name_as_revisions(
    images: &mut [RestoredImage],
    order: &[RevisionToName],
    there: &BTreeMap<PathBuf, RevisionsThere>,
) -> Result<()> {
    let mut taken: BTreeMap<&Path, u64> = BTreeMap::new();
    for RevisionToName { of, time, at, .. } in order {
        let image = &mut images[*at];
        let there = there.get(of);
        if let Some(name) = there.and_then(|there| there.given.get(&image.image)) {
            image.names = vec![name.clone()];
            continue;
        }
        let taken = taken
            .entry(of.as_path())
            .or_insert_with(|| there.map_or(0, |there| there.greatest));
        let number = taken.checked_add(1).ok_or_else(|| {
            Error::Usage(format!(
                "`{}` has a revision of the number {taken}, and there is no greater one for another",
                shown(of)
            ))
        })?;
        *taken = number;
        let mut name = of.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{number}@{time}"));
        image.names = vec![of.with_file_name(name)];
    }
    Ok(())
}

fn time_of(seconds: i64) -> String {
    let time = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// What stands under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameState {
    /// Nothing.
    Free,
    /// What the interrupted restore has put there, unchanged since.
    Ours,
    /// A file, a link or a device.
    Taken,
    /// A folder.
    Folder,
}

impl NameState {
    /// What stands there, in words.
    pub fn text(self) -> &'static str {
        match self {
            Self::Free => "nothing",
            Self::Ours => "what the interrupted restore made",
            Self::Taken => "a file",
            Self::Folder => "a folder",
        }
    }

    /// Whether an image may get the name; `replace` is the user's wish to replace what is there.
    pub fn may_be_given(self, replace: bool) -> bool {
        match self {
            Self::Free | Self::Ours => true,
            Self::Taken => replace,
            Self::Folder => false,
        }
    }
}

/// What was found of the folder that is restored to.
#[derive(Debug, Clone, Default)]
pub struct Destination {
    /// The folder.
    pub path: PathBuf,
    /// Whether files there can share extents.
    pub shares: bool,
    /// Bytes that are free.
    pub free_bytes: u64,
    /// Bytes on disk of what the interrupted restore has staged.
    pub staged_bytes: u64,
    /// What stands under the names that images get.
    pub names: BTreeMap<PathBuf, NameState>,
    /// Images whose machine runs, or would replace them by another file after a crash.
    pub signs: Vec<MachineSign>,
}

/// An image that a machine runs from or would run from, and the file that is the sign of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineSign {
    /// The absolute path of the image.
    pub image: PathBuf,
    /// The absolute path of the sign.
    pub sign: PathBuf,
}

impl Destination {
    /// Refuses to go on if a name is taken that may not be replaced, or if a machine runs from what is restored. Images that are restored
    /// as revisions are no machine's yet.
    ///
    /// # Errors
    /// [`Error::FolderInTheWay`], [`Error::Exists`], [`Error::InUse`].
    pub fn check_names(&self, replace: bool, as_revision: bool) -> Result<()> {
        let path_of = |name: &Path| self.path.join(name);
        if let Some((name, _)) = self.names.iter().find(|(_, state)| **state == NameState::Folder) {
            return Err(Error::FolderInTheWay { path: path_of(name) });
        }
        let taken = self.names.iter().filter(|(_, state)| !state.may_be_given(replace));
        let taken: Vec<PathBuf> = taken.map(|(name, _)| path_of(name)).collect();
        if !taken.is_empty() {
            return Err(Error::Exists { paths: taken });
        }
        match self.signs.first().filter(|_| !as_revision) {
            Some(MachineSign { image, sign }) => Err(Error::InUse {
                path: image.clone(),
                by: shown(sign).to_string(),
            }),
            None => Ok(()),
        }
    }
}

/// What a restore takes, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct RestoreBytes {
    /// Images.
    pub images: u64,
    /// Their sizes, holes included.
    pub logical_bytes: u64,
    /// What they hold beside holes and zeros, each counted.
    pub data_bytes: u64,
    /// Distinct blocks of that.
    pub distinct_bytes: u64,
    /// Distinct blocks that are on this disk already, and are shared from there.
    pub seeded_bytes: u64,
    /// Distinct blocks that are written.
    pub new_bytes: u64,
    /// Space that it takes at most, metadata included.
    pub needed_bytes: u64,
    /// Space that is free.
    pub free_bytes: u64,
    /// Whether the filesystem can share extents.
    pub shares: bool,
}

/// A restore that nobody has carried out yet.
#[derive(Debug, Clone, Serialize)]
pub struct RestorePlan {
    /// What it restores.
    #[serde(skip)]
    pub contents: Arc<Contents>,
    /// The images that are made.
    pub images: Vec<RestoredImage>,
    /// Images of the commit that its manifest has lost.
    #[serde(serialize_with = "crate::shown::serialize_all")]
    pub missing: Vec<PathBuf>,
    /// The blocks of the store that the images refer to, a list of ranges.
    pub wanted: Vec<Range<StoreBlock>>,
    /// Those of them that the disk holds, as far as is known, by their beginnings.
    pub seeded: Vec<SeedMatch>,
    /// What it takes; a report has that beside the plan.
    #[serde(skip)]
    pub bytes: RestoreBytes,
}

impl RestorePlan {
    /// A plan for images that have their names. `seeded` is what the disk holds of the blocks that they want.
    pub fn new(
        contents: Arc<Contents>,
        Selected { images, missing }: Selected,
        seeded: Vec<SeedMatch>,
        destination: &Destination,
    ) -> Self {
        let wanted = wanted_by(&contents, &images);
        let bytes = bytes_of(&contents, &images, (&wanted, &seeded), destination);
        Self {
            contents,
            images,
            missing,
            wanted,
            seeded,
            bytes,
        }
    }

    /// The plan where so many bytes of its blocks are on the disk already, and it is not known which.
    #[must_use]
    pub fn with_seeded_bytes(mut self, seeded_bytes: u64) -> Self {
        let bytes = &mut self.bytes;
        bytes.seeded_bytes = seeded_bytes.min(bytes.distinct_bytes);
        let written_bytes = bytes.distinct_bytes - bytes.seeded_bytes;
        bytes.needed_bytes = bytes
            .needed_bytes
            .saturating_sub(bytes.new_bytes.saturating_sub(written_bytes));
        bytes.new_bytes = written_bytes;
        self
    }

    /// What the manifest says of an image.
    pub fn runs_of(&self, image: &RestoredImage) -> &ImageRuns {
        &self.contents.manifest.images[image.image]
    }

    /// The blocks that images without copy on write refer to. The filesystem lets those share blocks with no others.
    pub fn nodatacow_blocks(&self) -> Vec<Range<StoreBlock>> {
        nodatacow_blocks(&self.contents, &self.images)
    }

    /// What tells it from other restores: see [`identity_of`].
    pub fn identity(&self, as_revision: bool) -> Option<String> {
        identity_of(&self.contents, as_revision)
    }

    /// Refuses a restore that does not fit.
    ///
    /// # Errors
    /// [`Error::DoesNotFit`].
    pub fn check_space(&self, destination: &Path) -> Result<()> {
        let needed_bytes = self.bytes.needed_bytes.saturating_add(RESERVE_BYTES);
        if needed_bytes > self.bytes.free_bytes {
            return Err(Error::DoesNotFit {
                path: destination.to_owned(),
                needed_bytes,
                reserve_bytes: RESERVE_BYTES,
                free_bytes: self.bytes.free_bytes,
            });
        }
        Ok(())
    }
}

/// What tells a restore from others to the same work folder: the commit, by its hash, since copies of an archive go on in different ways, and
/// how images are named. Digits and letters; none before the commit is known.
pub fn identity_of(contents: &Contents, as_revision: bool) -> Option<String> {
    let naming = if as_revision { "revision" } else { "" };
    let digits = contents.commit.as_ref()?.hash.iter().map(|byte| format!("{byte:02x}"));
    Some(digits.chain([naming.to_owned()]).collect())
}

/// The blocks of the store that images refer to, a list of ranges.
pub fn wanted_by(contents: &Contents, images: &[RestoredImage]) -> Vec<Range<StoreBlock>> {
    wanted(runs(contents, images))
}

fn runs<'a>(contents: &'a Contents, images: &'a [RestoredImage]) -> impl Iterator<Item = &'a Run> {
    images
        .iter()
        .flat_map(|image| &contents.manifest.images[image.image].runs)
}

fn nodatacow_blocks(contents: &Contents, images: &[RestoredImage]) -> Vec<Range<StoreBlock>> {
    let of = |image: &RestoredImage| &contents.manifest.images[image.image];
    let without = images.iter().map(of).filter(|one| one.image.metadata.is_nodatacow());
    wanted(without.flat_map(|one| &one.runs))
}

fn bytes_of(
    contents: &Contents,
    images: &[RestoredImage],
    (wanted, seeded): (&[Range<StoreBlock>], &[SeedMatch]),
    destination: &Destination,
) -> RestoreBytes {
    let stored = || runs(contents, images).filter(|run| matches!(run.content, Content::Stored(_)));
    let data_bytes: u64 = stored().map(|run| bytes(run.blocks)).sum();
    let distinct_bytes = range::count(wanted) * bytes(1);
    let seeded_bytes: u64 = seeded.iter().map(|one| bytes(one.blocks)).sum();
    let new_bytes = distinct_bytes.saturating_sub(seeded_bytes);
    let copied_bytes = if destination.shares {
        range::count(&nodatacow_blocks(contents, images)) * bytes(1)
    } else {
        data_bytes
    };
    let metadata_bytes = stored().count() as u64 * METADATA_BYTES_PER_REFERENCE + images.len() as u64 * bytes(1);
    RestoreBytes {
        images: images.len() as u64,
        logical_bytes: images.iter().map(|image| image.size).sum(),
        data_bytes,
        distinct_bytes,
        seeded_bytes,
        new_bytes,
        needed_bytes: (new_bytes + copied_bytes + metadata_bytes).saturating_sub(destination.staged_bytes),
        free_bytes: destination.free_bytes,
        shares: destination.shares,
    }
}

/// The store addresses that the runs of images refer to.
pub fn wanted<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Vec<Range<StoreBlock>> {
    range::joined(runs.into_iter().filter_map(|run| match run.content {
        Content::Stored(first) => Some(first..first + run.blocks),
        _ => None,
    }))
}

/// An image that cannot be restored whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LostImage {
    /// Its name in the archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// The name of what is left of it, if that was restored.
    #[serde(serialize_with = "crate::shown::serialize_some")]
    pub restored_as: Option<PathBuf>,
    /// What of it is lost.
    pub ranges: Vec<ByteRange>,
}

impl LostImage {
    /// An image of so many bytes of which nothing is left.
    pub fn whole(path: PathBuf, size: u64) -> Self {
        Self {
            path,
            restored_as: None,
            ranges: vec![ByteRange { start: 0, length: size }],
        }
    }
}

/// The ranges of an image of so many bytes with these runs that are lost, in bytes. `lost` are blocks of the store.
pub fn lost_ranges(runs: &[Run], size: u64, lost: &[Range<StoreBlock>]) -> Vec<ByteRange> {
    let mut ranges: Vec<ByteRange> = Vec::new();
    let mut at = 0u64;
    let mut add = |start: u64, blocks: u32| {
        let end = (start + bytes(blocks)).min(size);
        match ranges.last_mut() {
            Some(last) if last.start + last.length == start => last.length = end - last.start,
            _ => ranges.push(ByteRange {
                start,
                length: end.saturating_sub(start),
            }),
        }
    };
    for run in runs {
        match run.content {
            Content::Lost => add(at, run.blocks),
            Content::Stored(first) => {
                for range in range::overlap(lost, first..first + run.blocks) {
                    add(at + bytes(range.start - first), range.end - range.start);
                }
            }
            _ => {}
        }
        at += bytes(run.blocks);
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::NameState::{Folder, Free, Ours, Taken};
    use super::*;
    use crate::archive::manifest::ArchivedImage;
    use crate::content::Metadata;
    use crate::numbers::Slot;

    /// A commit of images with these names; each holds a hole, and `blocks` blocks of the store from the end of the one before.
    fn contents(images: &[(&[&str], u32)]) -> Contents {
        let mut next = 0;
        let mut manifest = Manifest::default();
        for (number, (names, blocks)) in (0u32..).zip(images) {
            let hole = Run {
                blocks: 2,
                content: Content::Hole,
            };
            let stored = Run {
                blocks: *blocks,
                content: Content::Stored(StoreBlock(next)),
            };
            next += blocks;
            manifest.images.push(ImageRuns {
                image: ArchivedImage {
                    number,
                    names: names.iter().map(PathBuf::from).collect(),
                    size: bytes(blocks + 2),
                    metadata: Metadata::default(),
                },
                runs: [hole, stored].into_iter().collect(),
            });
        }
        Contents {
            manifest,
            ..Contents::default()
        }
    }

    fn names(selected: &Selected) -> Vec<&str> {
        let names = selected.images.iter().flat_map(|image| &image.names);
        names.map(|name| name.to_str().unwrap()).collect()
    }

    #[test]
    fn a_pattern_chooses_names_and_folders_as_a_whole() {
        let contents = contents(&[
            (&["a/root.img", "b/root.img"], 1),
            (&["a/private.img"], 1),
            (&["c.img"], 1),
        ]);
        let select = |only: &[&str]| {
            let only: Vec<String> = only.iter().map(|one| (*one).to_owned()).collect();
            select(&contents, &only)
        };
        assert_eq!(select(&[]).unwrap().images.len(), 3);
        assert_eq!(names(&select(&["b/"]).unwrap()), ["b/root.img"]);
        assert_eq!(select(&["a"]).unwrap().images.len(), 2);
        assert_eq!(names(&select(&["c.img"]).unwrap()), ["c.img"]);
        assert!(matches!(select(&["d"]), Err(Error::NoMatch { .. })));
        assert!(matches!(select(&["["]), Err(Error::Usage(_))));
    }

    #[test]
    fn an_image_that_only_the_commit_knows_is_missing() {
        let mut contents = contents(&[(&["a.img"], 1)]);
        contents.summaries = ["a.img", "b.img"]
            .map(|path| ImageSummary {
                number: 0,
                path: path.into(),
                size: 5,
                data_blocks: 0,
                new_blocks: 0,
                digest: [0; 32],
            })
            .into();
        assert_eq!(select(&contents, &[]).unwrap().missing, [Path::new("b.img")]);
        let selected = select(&contents, &["b.img".into()]).unwrap();
        assert_eq!((selected.images.len(), selected.missing.len()), (0, 1));
    }

    #[test]
    fn revisions_get_the_next_numbers_or_the_names_they_have() {
        let contents = contents(&[
            (&["m/private.img"], 1),
            (&["m/private.img.9@2026-01-01T00:00:00Z"], 1),
            (&["m/private.img.10@2026-01-02T00:00:00Z"], 1),
            (&["n/private.img"], 1),
        ]);
        let mut images = select(&contents, &[]).unwrap().images;
        let order = revisions_to_name(&contents, &images).unwrap();
        let there = RevisionsThere {
            greatest: 41,
            given: [(2, PathBuf::from("m/private.img.40@2026-01-02T00:00:00Z"))].into(),
        };
        let there: BTreeMap<PathBuf, RevisionsThere> = [("m/private.img".into(), there)].into();
        name_as_revisions(&mut images, &order, &there).unwrap();
        let names: Vec<&Path> = images.iter().map(|image| image.names[0].as_path()).collect();
        assert_eq!(
            names,
            [
                Path::new("m/private.img.42@1970-01-01T00:00:00Z"),
                Path::new("m/private.img.43@2026-01-01T00:00:00Z"),
                Path::new("m/private.img.40@2026-01-02T00:00:00Z"),
                Path::new("n/private.img.1@1970-01-01T00:00:00Z"),
            ]
        );
        let last = RevisionsThere {
            greatest: u64::MAX,
            ..RevisionsThere::default()
        };
        let full = name_as_revisions(&mut images, &order, &[("n/private.img".into(), last)].into());
        assert!(matches!(full, Err(Error::Usage(_))));
        let other = super::tests::contents(&[(&["disk.raw"], 1)]);
        let images = select(&other, &[]).unwrap().images;
        assert!(matches!(revisions_to_name(&other, &images), Err(Error::Usage(_))));
    }

    #[test]
    fn names_are_refused_that_are_taken_or_in_use() {
        let check = |state, sign: bool, replace, as_revision| {
            let destination = Destination {
                path: "/to".into(),
                names: [("a.img".into(), state)].into(),
                signs: if sign {
                    vec![MachineSign {
                        image: "/to/a.img".into(),
                        sign: "/to/a-dirty.img".into(),
                    }]
                } else {
                    Vec::new()
                },
                ..Destination::default()
            };
            destination.check_names(replace, as_revision)
        };
        for (state, replace) in [(Free, false), (Ours, false), (Ours, true), (Taken, true)] {
            assert!(check(state, false, replace, false).is_ok(), "{state:?} {replace}");
        }
        assert!(matches!(check(Taken, false, false, false), Err(Error::Exists { .. })));
        for replace in [false, true] {
            assert!(matches!(
                check(Folder, false, replace, false),
                Err(Error::FolderInTheWay { .. })
            ));
            assert!(matches!(check(Free, true, replace, false), Err(Error::InUse { .. })));
            assert!(check(Free, true, replace, true).is_ok());
        }
    }

    #[test]
    fn a_plan_counts_what_is_new_what_is_here_and_what_is_staged() {
        let contents = Arc::new(contents(&[(&["a.img"], 100), (&["b.img"], 50)]));
        let seeded = || {
            vec![SeedMatch {
                first: StoreBlock(10),
                blocks: 20,
                slot: Slot(7),
            }]
        };
        let plan = |destination: &Destination| {
            let selected = select(&contents, &[]).unwrap();
            RestorePlan::new(Arc::clone(&contents), selected, seeded(), destination)
        };
        let destination = Destination {
            shares: true,
            free_bytes: bytes(135) + RESERVE_BYTES,
            ..Destination::default()
        };
        let found = plan(&destination);
        assert_eq!(found.wanted, [StoreBlock::range(0..150)]);
        let metadata = 2 * METADATA_BYTES_PER_REFERENCE + 2 * bytes(1);
        assert_eq!(
            found.bytes,
            RestoreBytes {
                images: 2,
                logical_bytes: bytes(154),
                data_bytes: bytes(150),
                distinct_bytes: bytes(150),
                seeded_bytes: bytes(20),
                new_bytes: bytes(130),
                needed_bytes: bytes(130) + metadata,
                free_bytes: destination.free_bytes,
                shares: true,
            }
        );
        assert!(found.check_space(Path::new("/to")).is_ok());
        let staged = plan(&Destination {
            staged_bytes: bytes(30),
            ..destination.clone()
        });
        assert_eq!(staged.bytes.needed_bytes, found.bytes.needed_bytes - bytes(30));
        let copied = plan(&Destination {
            shares: false,
            ..destination
        });
        assert_eq!(copied.bytes.needed_bytes, found.bytes.needed_bytes + bytes(150));
        assert!(matches!(
            copied.check_space(Path::new("/to")),
            Err(Error::DoesNotFit { .. })
        ));
    }

    #[test]
    fn what_tells_restores_apart_is_the_commit_and_the_naming() {
        let mut contents = contents(&[(&["a.img"], 1)]);
        assert_eq!(identity_of(&contents, false), None);
        let mut named = |hash: u8, as_revision| {
            contents.commit = Some(CommitName {
                number: CommitNumber(1),
                id: String::new(),
                hash: [hash; 32],
            });
            identity_of(&contents, as_revision).unwrap()
        };
        assert_ne!(named(1, false), named(2, false));
        assert_ne!(named(1, false), named(1, true));
        assert!(named(1, true).bytes().all(|byte| byte.is_ascii_alphanumeric()));
    }

    /// The names that what is left of images in a folder gets, of which those are damaged.
    fn partial_names_of(names: &[&str], damaged: &[usize]) -> Vec<String> {
        let restored = |(image, name): (usize, &&str)| RestoredImage {
            image,
            path: PathBuf::new(),
            names: vec![Path::new("folder").join(name)],
            size: 0,
        };
        let images: Vec<RestoredImage> = names.iter().enumerate().map(restored).collect();
        let given = partial_names(&images, &damaged.iter().copied().collect());
        let names = given.values().map(|name| name.strip_prefix("folder").unwrap());
        names.map(|name| name.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn partial_names_are_no_longer_than_a_name_may_be() {
        let (one, other) = ("a".repeat(254) + "b", "a".repeat(254) + "c");
        let given = partial_names_of(&[&one, &other], &[0, 1]);
        assert!(given.iter().all(|name| name.len() <= NAME_BYTES_MAX), "{given:?}");
        assert_ne!(given[0], given[1]);
        let again = partial_names_of(&[&one, &other, &given[0]], &[0]);
        assert!(again[0].len() <= NAME_BYTES_MAX && again[0] != given[0], "{again:?}");
    }

    #[test]
    fn partial_names_are_no_names_of_others() {
        for (names, damaged, expected) in [
            (&["a.img", "b.img"][..], &[0][..], &["a.img.vmfold-partial"][..]),
            (&["a.img", "b.img"], &[], &[]),
            (&["a.img", "a.img.vmfold-partial"], &[0], &["a.img.2.vmfold-partial"]),
            (
                &["a.img", "a.img.vmfold-partial", "a.img.2"],
                &[0, 1, 2],
                &[
                    "a.img.2.vmfold-partial",
                    "a.img.vmfold-partial.vmfold-partial",
                    "a.img.2.2.vmfold-partial",
                ],
            ),
            (
                &["a.img", "a.img.vmfold-partial/b.img"],
                &[0],
                &["a.img.2.vmfold-partial"],
            ),
        ] {
            assert_eq!(partial_names_of(names, damaged), expected, "{names:?}");
        }
    }

    #[test]
    fn times_are_as_the_driver_writes_them() {
        assert_eq!(time_of(1_767_323_045), "2026-01-02T03:04:05Z");
        assert_eq!(time_of(i64::MAX), "1970-01-01T00:00:00Z");
    }
}
