//! The reports of the verbs: as data, which programs get as JSON (`formats/report-v1.schema.json`), and as text for people.

pub mod families;
mod left_alone;
mod overview;
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
pub use families::{DeletedBytes, FamilyBytes, IfDeleted, MachineBytes, RevisionBytes};

use crate::pool::{Covering, Skipped};

/// The totals of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PoolBytes {
    /// The sizes of the images, holes included.
    pub logical_bytes: u64,
    /// Bytes that the images map. A block with several references counts as often.
    pub referenced_bytes: u64,
    /// Bytes that their distinct extents take on disk.
    pub physical_bytes: u64,
    /// Bytes that the compressed ones of these extents take on disk.
    pub compressed_bytes: u64,
    /// Bytes that the compressed extents hold.
    pub uncompressed_bytes: u64,
    /// The number of distinct extents.
    pub extents: u64,
    /// The number of references to them.
    pub references: u64,
}

impl PoolBytes {
    /// Adds up the totals of a pool.
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

/// The summary of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Planned {
    /// Bytes on disk that are freed, less those that donors take. It is negative if undoing compression takes more than is freed.
    pub freed_bytes: i64,
    /// These bytes by reason.
    pub freed_by_reason: BytesByReason,
    /// Bytes that are copied to donors.
    pub rewritten_bytes: u64,
    /// Bytes of content in compressed donors.
    pub uncompressed_bytes: u64,
    /// Bytes that compressed donors are expected to take on disk.
    pub compressed_bytes: u64,
    /// An estimate of the bytes of metadata that new references take.
    pub metadata_bytes: u64,
    /// The most bytes that donors take before the extents that they replace are freed.
    pub peak_bytes: u64,
    /// Bytes that the kernel compares.
    pub compared_bytes: u64,
    /// Bytes that were read to prove that blocks are equal.
    pub proved_bytes: u64,
    /// Extents that go.
    pub extents: u64,
    /// One block in so many could be looked up. It is more than 1 if the pool is too large for the memory allowed.
    pub sampled: u32,
    /// Bytes that could be freed if they were not held, by the reason why they are.
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

/// The result of a plan that was carried out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Done {
    /// Bytes on disk that were freed: the difference of the extents before and after. It is negative if the pool grew.
    pub freed_bytes: i64,
    /// The pool afterwards.
    pub after: PoolBytes,
    /// The counts of ranges.
    pub counts: ReclaimCounts,
}

/// The report of `reclaim`.
#[derive(Debug, Default, Serialize)]
pub struct Reclaimed {
    /// The number of images that were worked on.
    pub images: u64,
    /// Images that were left alone.
    pub skipped: Vec<Skipped>,
    /// The number of machines that are running, or were running when their host stopped.
    pub machines_in_use: u64,
    /// Whether only a plan was made.
    pub dry_run: bool,
    /// Whether the user stopped it.
    pub interrupted: bool,
    /// Whether it stopped in order because its time was over.
    pub out_of_time: bool,
    /// The pool before the run.
    pub pool: PoolBytes,
    /// The sources of fingerprints.
    pub fingerprinted: Fingerprinted,
    /// The number of images whose data lies in metadata, beside their inodes. It cannot be shared.
    pub inline_images: u64,
    /// The number of images without checksums (`nodatacow`), if others have them. Each kind shares only with its own.
    pub unchecksummed_images: u64,
    /// The plan.
    pub planned: Planned,
    /// The result. It is `None` in a dry run, and if the run stopped before the plan was carried out.
    pub done: Option<Done>,
    /// Files outside the pool that hold extents of it, with the bytes that they hold.
    pub held_by: BTreeMap<String, u64>,
    /// The error that ended the run early, if it failed.
    #[serde(skip)]
    pub failed: Option<Error>,
}

/// The report of `scan`.
#[derive(Debug, Default, Serialize)]
pub struct Scanned {
    /// The number of images that were scanned.
    pub images: u64,
    /// Images that were left alone.
    pub skipped: Vec<Skipped>,
    /// The pool.
    pub pool: PoolBytes,
    /// The sources of fingerprints.
    pub fingerprinted: Fingerprinted,
    /// Whether the user stopped it.
    pub interrupted: bool,
}

/// The part of a pool that an image holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ImageBytes {
    /// The image.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Bytes that it maps.
    pub data_bytes: u64,
    /// Bytes on disk that its deletion would free.
    pub exclusive_bytes: u64,
    /// Bytes on disk that its deletion would free after a reclaim. It is `None` if no reclaim was planned.
    pub exclusive_after_reclaim_bytes: Option<u64>,
    /// Bytes on disk that it has in common with others.
    pub shared_bytes: u64,
    /// Bytes that its compressed extents take on disk, exclusive and shared ones.
    pub compressed_bytes: u64,
    /// Bytes that its compressed extents hold.
    pub uncompressed_bytes: u64,
    /// Bytes on disk of those parts of its extents that nothing maps. They stay as long as the extents do.
    pub unreachable_bytes: u64,
}

/// The order of what `report` shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ReportOrder {
    /// What takes most on disk comes first.
    #[default]
    Disk,
    /// What frees most now comes first.
    Now,
    /// What frees most after a reclaim comes first.
    After,
    /// By name.
    Name,
}

/// What the text of `report` shows. The JSON has everything.
#[derive(Debug, Clone, Default)]
pub struct ReportView {
    /// Images instead of families and machines.
    pub images: bool,
    /// Their order.
    pub order: ReportOrder,
    /// How many are shown; all if it is `None`.
    pub top: Option<usize>,
    /// Only what matches one of these, if there are any.
    pub filter: Vec<Covering>,
}

/// The report of `report`.
#[derive(Debug, Default, Serialize)]
pub struct Reported {
    /// The deepest folder that all named paths lie in.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub root: PathBuf,
    /// The kind of the filesystem.
    pub filesystem: &'static str,
    /// The pool.
    pub pool: PoolBytes,
    /// The number of images. The document has it as every other.
    #[serde(skip)]
    pub image_count: u64,
    /// The number of machines.
    pub machine_count: u64,
    /// Bytes on disk of those parts of extents that nothing maps.
    pub unreachable_bytes: u64,
    /// Bytes of data that lie in metadata.
    pub inline_bytes: u64,
    /// What a reclaim would free, as its dry run says. It is `None` if none was planned.
    pub planned: Option<Planned>,
    /// Families of machines, the largest first.
    pub families: Vec<FamilyBytes>,
    /// All revisions.
    pub revisions: RevisionBytes,
    /// What deleting the images would free that the user asked for.
    pub if_deleted: Vec<IfDeleted>,
    /// The part of each image.
    pub images: Vec<ImageBytes>,
    /// Images that were left out.
    pub skipped: Vec<Skipped>,
    /// Images that are told of, and that a reclaim would leave alone.
    pub left_alone: Vec<Skipped>,
    /// Bytes on disk that files outside the pool hold, too.
    pub held_bytes: u64,
    /// Files outside the pool that hold extents of it, with the bytes that they hold.
    pub held_by: BTreeMap<String, u64>,
    /// The command that reclaims, word by word.
    pub reclaim_command: Vec<String>,
    /// What the text shows.
    #[serde(skip)]
    pub view: ReportView,
}

/// The report of `export`.
#[derive(Debug, Default, Serialize)]
pub struct Exported {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The number of the commit.
    pub commit: CommitNumber,
    /// The name of the commit: the first digits of its hash.
    pub id: String,
    /// The number of its images.
    pub images: u64,
    /// The sizes of its images, holes included.
    pub logical_bytes: u64,
    /// Bytes of its images that are neither holes nor zeros. A block that several images hold counts as often.
    pub data_bytes: u64,
    /// Bytes of extents that were read.
    pub read_bytes: u64,
    /// Bytes of extents that the index knew to be in the archive, so that they were not read.
    pub known_bytes: u64,
    /// Bytes of new blocks, before compression.
    pub new_bytes: u64,
    /// Bytes by which the archive grew.
    pub written_bytes: u64,
    /// Bytes of blocks that the plan took for others, because their fingerprints are the same.
    pub corrected_bytes: u64,
    /// The length of the archive in bytes.
    pub archive_bytes: u64,
    /// Bytes of parity that were written.
    pub parity_bytes: u64,
    /// Images that were left out.
    pub skipped: Vec<Skipped>,
    /// The error that parity could not be written for, after the commit was.
    #[serde(skip)]
    pub failed: Option<Error>,
}

/// The report of `protect`.
#[derive(Debug, Default, Serialize)]
pub struct Protected {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// Percent of it that can be lost and still heal.
    pub percent: u8,
    /// Whether all of it had parity before, so that nothing was written.
    pub was_protected: bool,
    /// Bytes of it that got parity.
    pub protected_bytes: u64,
    /// Bytes of parity that were written.
    pub parity_bytes: u64,
    /// The length of the archive in bytes.
    pub archive_bytes: u64,
}

/// An image that was restored as a revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct RestoredRevision {
    /// The name it is called by in the archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// The name that it has, relative to the folder that was restored to.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub name: PathBuf,
    /// The command by which Qubes OS makes it current, word by word; empty if it is not in a pool of Qubes OS.
    pub command: Vec<String>,
}

/// The report of `import`.
#[derive(Debug, Default, Serialize)]
pub struct Imported {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// What it is, if another program made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// The number of the commit.
    pub commit: CommitNumber,
    /// The name of the commit: the first digits of its hash. For a backup that another program made, those of a hash of all that it holds.
    pub id: String,
    /// The folder that was restored to.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub to: PathBuf,
    /// Whether only a plan was made.
    pub dry_run: bool,
    /// The totals of the plan.
    pub planned: RestoreBytes,
    /// The plan, in a dry run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plan: Option<RestorePlan>,
    /// The counts of what was done. It is `None` in a dry run, and if images are lost and only whole ones were asked for.
    pub done: Option<Restored>,
    /// Images that cannot be restored as a whole.
    pub lost: Vec<LostImage>,
    /// Images that became revisions, or would.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub revisions: Vec<RestoredRevision>,
    /// Whether the archive is damaged behind this commit, so that a later one may be lost.
    pub later_damage: bool,
    /// Images that were not restored for lack of space, as far as they are known.
    #[serde(
        serialize_with = "crate::shown::serialize_all",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub left_out: Vec<PathBuf>,
    /// The error that stopped the restore, after which only images that were whole before it were restored.
    #[serde(skip)]
    pub failed: Option<Error>,
}

impl Imported {
    /// The report on a restore from an archive to a folder.
    pub fn of(archive: PathBuf, to: PathBuf, outcome: RestoreOutcome) -> Self {
        let commit = outcome.plan.contents.commit.as_ref();
        let stopped = outcome.stopped.map(|stopped| (stopped.error, stopped.left_out)).unzip();
        Self {
            archive,
            kind: outcome.plan.contents.kind,
            commit: commit.map_or_else(CommitNumber::default, |commit| commit.number),
            id: commit.map(|commit| commit.id.clone()).unwrap_or_default(),
            to,
            dry_run: false,
            planned: outcome.plan.bytes,
            plan: None,
            done: outcome.restored,
            lost: outcome.lost,
            revisions: Vec::new(),
            later_damage: outcome.later_damage,
            failed: stopped.0,
            left_out: stopped.1.unwrap_or_default(),
        }
    }

    /// The report on a restore that was only planned.
    pub fn planned(archive: PathBuf, to: PathBuf, outcome: RestoreOutcome) -> Self {
        let plan = Some(outcome.plan.clone());
        Self {
            dry_run: true,
            plan,
            ..Self::of(archive, to, outcome)
        }
    }
}

/// A volume of a machine of Qubes OS that holds what was restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FilledVolume {
    /// The machine.
    pub machine: String,
    /// The name of the volume.
    pub volume: String,
    /// The image of the backup that it holds.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub image: PathBuf,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it held something else before.
    pub replaced: bool,
}

/// The report of `import --qubes`.
#[derive(Debug, Serialize)]
pub struct QubesImport {
    /// The backup.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The folder of the pool.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub pool: PathBuf,
    /// Whether only a plan was made.
    pub dry_run: bool,
    /// How the images were restored, from which the volumes are filled. It is `None` if an earlier run has done it.
    pub imported: Option<Imported>,
    /// The volumes that were filled.
    pub filled: Vec<FilledVolume>,
    /// The error that stopped it.
    #[serde(skip)]
    pub failed: Option<Error>,
}

/// The report of `import --skeleton`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct WrittenSkeleton {
    /// The backup.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The file that was written.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub skeleton: PathBuf,
    /// The machines that were chosen. The skeleton has all of the backup.
    pub machines: Vec<String>,
    /// The command that makes these machines, word by word.
    pub command: Vec<String>,
}

/// An image in an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedImage {
    /// Its name.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// Its size in bytes, holes included.
    pub size: u64,
    /// Bytes of it that are neither holes nor zeros.
    pub data_bytes: u64,
    /// Bytes of blocks, before compression, that neither an earlier commit nor an earlier image of this commit holds.
    pub added_bytes: u64,
}

/// A commit of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListedCommit {
    /// Its number.
    pub number: CommitNumber,
    /// Its name: the first digits of its hash.
    pub id: String,
    /// The time when it was made, in UTC.
    pub time: String,
    /// Its label, which may be empty.
    pub label: String,
    /// The folder that the names of its images are relative to.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub root: PathBuf,
    /// The sizes of its images, holes included.
    pub logical_bytes: u64,
    /// Bytes of the blocks that it added, before compression.
    pub added_bytes: u64,
    /// Bytes of the archive that its records take.
    pub stored_bytes: u64,
    /// The number of its images.
    pub image_count: u64,
    /// Its images.
    pub images: Vec<ListedImage>,
}

/// The report of `list`.
#[derive(Debug, Default, Serialize)]
pub struct Listed {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// Its length in bytes.
    pub archive_bytes: u64,
    /// The number of its commits.
    pub commit_count: u64,
    /// Whether something of it cannot be read, or stands behind the last commit.
    pub is_damaged: bool,
    /// Whether the text shows the images of commits as well.
    #[serde(skip)]
    pub shows_images: bool,
    /// Its commits, or the one that was asked for.
    pub commits: Vec<ListedCommit>,
}

/// A volume of a backup that another program made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BackedUpVolume {
    /// The name that it gets when it is restored.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// Its size in bytes, holes included. `list` does not know it where only the content tells.
    pub size: Option<u64>,
    /// Bytes of it that are neither holes nor zeros, which only `verify` knows.
    pub data_bytes: Option<u64>,
}

/// The report of `list` and `verify` on a backup that another program made.
#[derive(Debug, Serialize)]
pub struct ListedBackup {
    /// The backup.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// Its length in bytes.
    pub archive_bytes: u64,
    /// What it is.
    pub kind: &'static str,
    /// Whether all of it was read, and nothing of it is missing or damaged.
    pub is_verified: bool,
    /// Bytes of the distinct blocks that it holds, which only `verify` knows.
    pub distinct_bytes: Option<u64>,
    /// Its volumes.
    pub volumes: Vec<BackedUpVolume>,
}

/// A damaged place of an archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DamagedPlace {
    /// The place in the archive.
    pub range: ByteRange,
    /// The problem, in words.
    pub problem: String,
}

/// An image of a commit that cannot be restored as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LostIn {
    /// The number of the commit.
    pub commit: CommitNumber,
    /// The image, and the ranges that are lost.
    #[serde(flatten)]
    pub lost: LostImage,
}

/// The report of `verify`.
#[derive(Debug, Default, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Verified {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// Its length in bytes.
    pub archive_bytes: u64,
    /// The number of commits that could be read.
    pub commits: u64,
    /// The number of images in them.
    pub images: u64,
    /// Bytes of blocks that were decoded and compared with their hashes. Blocks that differ are among `damage`.
    pub verified_bytes: u64,
    /// Bytes that an export which did not end left behind the last commit.
    pub leftover_bytes: u64,
    /// Whether it ends as an export that ended leaves it. Otherwise it may have been cut off.
    pub is_ended: bool,
    /// Whether it is encrypted.
    pub is_sealed: bool,
    /// Whether its records were verified without a key, and what is in them was not.
    pub is_without_key: bool,
    /// Whether it is encrypted, and none of its KEY records is intact, so that no key opens it.
    pub has_lost_keys: bool,
    /// The damaged places.
    pub damage: Vec<DamagedPlace>,
    /// Images that cannot be restored as a whole for it.
    pub lost: Vec<LostIn>,
    /// Its parity, if it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parity: Option<ParityState>,
}

/// What the parity of an archive can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ParityState {
    /// Percent of the last group that heal.
    pub percent: u8,
    /// Bytes of the archive that have parity.
    pub protected_bytes: u64,
    /// Bytes of it that have none. Those of the last parity itself, and what follows that, can be made again.
    pub unprotected_bytes: u64,
    /// Bytes that are lost where there is parity, in whole sectors.
    pub lost_bytes: u64,
    /// Whether all of these would heal.
    pub heals: bool,
    /// Bytes of any one stretch of each group that could be lost besides, and still heal.
    pub spare_bytes: u64,
}

/// The report of `repair`.
#[derive(Debug, Default, Serialize)]
pub struct Repaired {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The new file that it was written to, if it was.
    #[serde(
        serialize_with = "crate::shown::serialize_some",
        skip_serializing_if = "Option::is_none"
    )]
    pub to: Option<PathBuf>,
    /// Whether it was written into the archive itself.
    pub in_place: bool,
    /// Whether it was only said what would heal.
    pub dry_run: bool,
    /// The length of the repaired archive in bytes.
    pub archive_bytes: u64,
    /// Percent of it that can be lost and still heal; 0 if it has no parity.
    pub percent: u8,
    /// Bytes of it that have parity.
    pub protected_bytes: u64,
    /// Bytes that were lost where there is parity, in whole sectors.
    pub lost_bytes: u64,
    /// Bytes that stood elsewhere, because others are missing or stand twice.
    pub moved_bytes: u64,
    /// Bytes that were computed from parity.
    pub healed_bytes: u64,
    /// Bytes of records that were taken from another copy.
    pub taken_bytes: u64,
    /// What is still damaged.
    pub damage: Vec<DamagedPlace>,
}

/// Whether an image differs between the two sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// It is the same on both sides.
    Same,
    /// It differs in some ranges.
    Differs,
    /// Only the first side has it.
    OnlyInFirst,
    /// Only the second side has it.
    OnlyInSecond,
}

/// An image that was compared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DiffedImage {
    /// Its name.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// Whether it differs.
    pub change: Change,
    /// The number of bytes in the ranges that differ.
    pub differing_bytes: u64,
    /// The ranges that differ, in whole blocks but for the end of the image.
    pub ranges: Vec<ByteRange>,
}

/// The report of `diff`.
#[derive(Debug, Default, Serialize)]
pub struct Diffed {
    /// The archive.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub archive: PathBuf,
    /// The first side, in words.
    pub first: String,
    /// The second side, in words.
    pub second: String,
    /// The number of bytes in the ranges that differ.
    pub differing_bytes: u64,
    /// All images of both sides.
    pub images: Vec<DiffedImage>,
}
