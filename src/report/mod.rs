//! What the verbs found and did, as data: for programs as JSON (`formats/report-v1.schema.json`), for people as text.

mod text;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::block::{ByteRange, bytes};
use crate::error::Error;
use crate::exec::fingerprints::Fingerprinted;
use crate::exec::reclaim::ReclaimCounts;
use crate::exec::restore::RestoreOutcome;
pub use crate::exec::restore::Restored;
use crate::facts::{Compression, Extent, Facts, PinReason};
use crate::fs::{Filesystem, images, physical_bytes};
use crate::numbers::CommitNumber;
use crate::plan::restore::RestorePlan;
pub use crate::plan::restore::{LostImage, RestoreBytes};
use crate::plan::{BytesByReason, ReclaimPlan};
use crate::pool::Skipped;

/// Totals of a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PoolBytes {
    /// Sizes of the images, holes included.
    pub logical_bytes: u64,
    /// What the images refer to, each reference counted.
    pub referenced_bytes: u64,
    /// The distinct extents they refer to, on disk.
    pub physical_bytes: u64,
    /// Of those, the compressed ones, on disk.
    pub compressed_bytes: u64,
    /// What those hold.
    pub uncompressed_bytes: u64,
    /// Distinct extents.
    pub extents: u64,
    /// References to them.
    pub references: u64,
}

impl PoolBytes {
    /// Adds a pool up.
    pub fn of(fs: &dyn Filesystem, facts: &Facts) -> Self {
        let is_compressed = |extent: &&Extent| extent.class.compression != Compression::None;
        let compressed = || facts.extents.iter().filter(is_compressed);
        Self {
            logical_bytes: images(fs).map(|image| image.size).sum(),
            referenced_bytes: facts.references().map(|reference| bytes(reference.blocks)).sum(),
            physical_bytes: physical_bytes(facts),
            compressed_bytes: compressed().map(|extent| extent.disk_bytes).sum(),
            uncompressed_bytes: compressed().map(|extent| bytes(extent.blocks)).sum(),
            extents: facts.extents.len() as u64,
            references: facts.references().count() as u64,
        }
    }
}

/// A plan's summary, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// What will be freed on disk, net. Negative if undoing compression takes more than is freed.
    pub freed_bytes: i64,
    /// The same, by why.
    pub freed_by_reason: BytesByReason,
    /// What will be copied to donors.
    pub rewritten_bytes: u64,
    /// Content of donors that are compressed.
    pub uncompressed_bytes: u64,
    /// What that is expected to take on disk.
    pub compressed_bytes: u64,
    /// What the new references are estimated to cost in metadata.
    pub metadata_bytes: u64,
    /// What donors take at most before what they replace is freed.
    pub peak_bytes: u64,
    /// What the kernel will compare.
    pub compared_bytes: u64,
    /// What was read to prove that blocks are equal.
    pub proved_bytes: u64,
    /// Extents that will go.
    pub extents: u64,
    /// One block in so many could be looked up; more than one where the pool is too large for the memory allowed.
    pub sampled: u32,
    /// What could be freed if nothing held it, by what does.
    pub pinned: BTreeMap<PinReason, u64>,
}

impl Planned {
    /// Sums a plan up.
    pub fn of(plan: &ReclaimPlan, proved_bytes: u64) -> Self {
        let donors = plan.layout.donors().iter();
        let (uncompressed_bytes, compressed_bytes) = donors
            .filter(|donor| donor.class.compression != Compression::None)
            .fold((0, 0), |(content, disk), donor| {
                (content + bytes(donor.blocks), disk + donor.disk_bytes)
            });
        Self {
            uncompressed_bytes,
            compressed_bytes,
            freed_bytes: plan.freed_bytes(),
            freed_by_reason: plan.freed.clone(),
            rewritten_bytes: plan.rewritten_bytes(),
            metadata_bytes: plan.metadata_bytes(),
            peak_bytes: plan.peak_bytes,
            compared_bytes: plan.batches.iter().map(|batch| batch.compared_bytes).sum(),
            proved_bytes,
            extents: plan.eliminations.len() as u64,
            sampled: plan.sampled,
            pinned: plan.pinned.clone(),
        }
    }
}

/// What a run did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// What was freed on disk: extents counted before and after. Negative if the pool grew.
    pub freed_bytes: i64,
    /// The pool afterwards.
    pub after: PoolBytes,
    /// Range by range.
    pub counts: ReclaimCounts,
}

/// What `reclaim` found and did.
#[derive(Debug, Default, Serialize)]
pub struct Reclaimed {
    /// Images worked on.
    pub images: u64,
    /// Images left alone.
    pub skipped: Vec<Skipped>,
    /// Machines that are running, or were when their host stopped.
    pub machines_in_use: u64,
    /// Nothing was to be changed.
    pub dry_run: bool,
    /// The user stopped it.
    pub interrupted: bool,
    /// It stopped in order because its time was over.
    pub out_of_time: bool,
    /// The pool before.
    pub pool: PoolBytes,
    /// Where fingerprints came from.
    pub fingerprinted: Fingerprinted,
    /// Images whose data lies in metadata, beside their inodes, and cannot be shared.
    pub inline_images: u64,
    /// Images without checksums (`nodatacow`) beside others that have them: each kind shares with its own only.
    pub unchecksummed_images: u64,
    /// What was planned.
    pub planned: Planned,
    /// What was done; none in a dry run.
    pub done: Option<Done>,
    /// Files outside the paths that hold extents, with the bytes they hold.
    pub held_by: BTreeMap<String, u64>,
    /// Why the run ended early, if it failed.
    #[serde(skip)]
    pub failed: Option<Error>,
}

/// What `scan` found.
#[derive(Debug, Default, Serialize)]
pub struct Scanned {
    /// Images read.
    pub images: u64,
    /// Images left alone.
    pub skipped: Vec<Skipped>,
    /// The pool.
    pub pool: PoolBytes,
    /// Where fingerprints came from.
    pub fingerprinted: Fingerprinted,
    /// The user stopped it.
    pub interrupted: bool,
}

/// An image's part of a pool, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ImageBytes {
    /// The image.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// Its size, holes included.
    pub size: u64,
    /// What it maps.
    pub data_bytes: u64,
    /// What deleting it would free on disk.
    pub exclusive_bytes: u64,
    /// Extents it has in common with others, on disk.
    pub shared_bytes: u64,
    /// Of both, those that are compressed, on disk.
    pub compressed_bytes: u64,
    /// What those hold.
    pub uncompressed_bytes: u64,
    /// Parts of its extents that nothing reaches, and that stay as long as the extents do.
    pub unreachable_bytes: u64,
}

/// What `report` found.
#[derive(Debug, Default, Serialize)]
pub struct Reported {
    /// The pool.
    pub pool: PoolBytes,
    /// Parts of extents that nothing reaches.
    pub unreachable_bytes: u64,
    /// Data that lies in metadata.
    pub inline_bytes: u64,
    /// Image by image.
    pub images: Vec<ImageBytes>,
    /// Images left out.
    pub skipped: Vec<Skipped>,
    /// Files outside the paths that hold extents, with the bytes they hold.
    pub held_by: BTreeMap<String, u64>,
}

/// What `export` did.
#[derive(Debug, Default, Serialize)]
pub struct Exported {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The commit's number.
    pub commit: CommitNumber,
    /// The commit's name.
    pub id: String,
    /// Images in it.
    pub images: u64,
    /// Their sizes, holes included.
    pub logical_bytes: u64,
    /// What they hold beside holes and zeros, each counted.
    pub data_bytes: u64,
    /// What was read of them.
    pub read_bytes: u64,
    /// What was known to be in the archive and not read.
    pub known_bytes: u64,
    /// New blocks, before compression.
    pub new_bytes: u64,
    /// What the archive grew by.
    pub written_bytes: u64,
    /// Blocks whose checksum was that of another block.
    pub corrected_bytes: u64,
    /// The archive's length.
    pub archive_bytes: u64,
    /// Images left out.
    pub skipped: Vec<Skipped>,
}

/// What `import` found and did.
#[derive(Debug, Default, Serialize)]
pub struct Imported {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The commit's number.
    pub commit: CommitNumber,
    /// The commit's name.
    pub id: String,
    /// The folder restored to.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub to: PathBuf,
    /// Nothing was to be written.
    pub dry_run: bool,
    /// What it takes.
    pub planned: RestoreBytes,
    /// Image by image, in a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<RestorePlan>,
    /// What was done; none in a dry run.
    pub done: Option<Restored>,
    /// Images that cannot be restored whole.
    pub lost: Vec<LostImage>,
    /// Whether a commit later than this one may be lost.
    pub later_damage: bool,
}

impl Imported {
    /// What came of a restore from an archive to a folder.
    pub fn of(archive: PathBuf, to: PathBuf, outcome: RestoreOutcome) -> Self {
        let commit = outcome.plan.contents.commit.as_ref();
        Self {
            archive,
            commit: commit.map_or_else(CommitNumber::default, |commit| commit.number),
            id: commit.map(|commit| commit.id.clone()).unwrap_or_default(),
            to,
            dry_run: false,
            planned: outcome.plan.bytes,
            plan: None,
            done: outcome.restored,
            lost: outcome.lost,
            later_damage: outcome.later_damage,
        }
    }

    /// The same of a restore that was only planned.
    pub fn planned(archive: PathBuf, to: PathBuf, outcome: RestoreOutcome) -> Self {
        let plan = Some(outcome.plan.clone());
        Self {
            dry_run: true,
            plan,
            ..Self::of(archive, to, outcome)
        }
    }
}

/// An image in an archive, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedImage {
    /// Its name.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// Its size, holes included.
    pub size: u64,
    /// What it holds beside holes and zeros.
    pub data_bytes: u64,
    /// What it brought that no image before it in this commit, and no commit before, had; before compression.
    pub added_bytes: u64,
}

/// A commit of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedCommit {
    /// Its number.
    pub number: CommitNumber,
    /// Its name.
    pub id: String,
    /// When it was made, in UTC.
    pub time: String,
    /// What the user called it.
    pub label: String,
    /// The folder that names are relative to.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub root: PathBuf,
    /// Sizes of its images, holes included.
    pub logical_bytes: u64,
    /// Blocks it added, before compression.
    pub added_bytes: u64,
    /// Bytes of the archive that it takes.
    pub stored_bytes: u64,
    /// Its images.
    pub images: Vec<ListedImage>,
}

/// What `list` found.
#[derive(Debug, Default, Serialize)]
pub struct Listed {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// Its length.
    pub archive_bytes: u64,
    /// Whether the text shows images too.
    #[serde(skip)]
    pub shows_images: bool,
    /// Its commits.
    pub commits: Vec<ListedCommit>,
}

/// A damaged place of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedPlace {
    /// Where.
    pub range: ByteRange,
    /// What is wrong.
    pub problem: String,
}

/// An image of a commit that cannot be restored whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LostIn {
    /// The commit's number.
    pub commit: CommitNumber,
    /// The image, and what of it is lost.
    #[serde(flatten)]
    pub lost: LostImage,
}

/// What `verify` found.
#[derive(Debug, Default, Serialize)]
pub struct Verified {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// Its length.
    pub archive_bytes: u64,
    /// Commits that could be read.
    pub commits: u64,
    /// Images in them.
    pub images: u64,
    /// Blocks that are what was stored.
    pub verified_bytes: u64,
    /// What an export that did not end left behind the last commit.
    pub leftover_bytes: u64,
    /// Places that are damaged.
    pub damage: Vec<DamagedPlace>,
    /// What cannot be restored for it.
    pub lost: Vec<LostIn>,
}

/// How an image differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// Not at all.
    Same,
    /// In some ranges.
    Differs,
    /// The second side does not have it.
    OnlyInFirst,
    /// The first side does not have it.
    OnlyInSecond,
}

/// An image that was compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiffedImage {
    /// Its name.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// How it differs.
    pub change: Change,
    /// In how many bytes.
    pub differing_bytes: u64,
    /// In which.
    pub ranges: Vec<ByteRange>,
}

/// What `diff` found.
#[derive(Debug, Default, Serialize)]
pub struct Diffed {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// What was compared.
    pub first: String,
    /// What with.
    pub second: String,
    /// Bytes that differ.
    pub differing_bytes: u64,
    /// Image by image.
    pub images: Vec<DiffedImage>,
}
