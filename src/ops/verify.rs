//! `verify`: checks every hash of an archive, and every reference of every manifest.

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::archive::commit::{RecordLocation, by_path};
use crate::archive::manifest::ImageRuns;
use crate::archive::reader::{Archive, Committed, Damage, LocatedFrame, range_of};
use crate::archive::record::{RecordKind, hash_of};
use crate::block::{BLOCK_LEN, ByteRange, bytes};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::exec::hashes::{StoredHashes, digest};
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::{lost_ranges, wanted};
use crate::range;
use crate::report::{DamagedPlace, LostImage, LostIn, Verified};
use crate::store::{FileStore, Store};

/// Verifies an archive.
///
/// # Errors
/// [`Error::NotAnArchive`]; [`Error::Unsupported`] if a newer version made it; [`Error::Io`] if it cannot be read; [`Error::Interrupted`].
/// Damage is not an error: the result lists it.
pub fn verify(path: &Path, monitor: &dyn Monitor) -> Result<Verified> {
    verify_store(Arc::new(FileStore::open(path)?), monitor)
}

/// Verifies the archive in a store.
///
/// # Errors
/// Those of [`verify`].
pub fn verify_store(store: Arc<dyn Store>, monitor: &dyn Monitor) -> Result<Verified> {
    monitor.phase("Reading records", 0);
    let path = store.path().to_owned();
    let path = path.as_path();
    let mut archive = Archive::open_any(store)?;
    let mut damage: Vec<Damage> = archive.look_for_damage()?.to_vec();
    let end = archive.base().length;
    // Records behind the last commit that an export left which did not end are not part of the archive.
    let leftover_bytes = archive.length() - end;
    let has_leftovers_only = leftover_bytes > 0 && !archive.commits().is_empty() && archive.ends_in_leftovers_only()?;
    if has_leftovers_only {
        damage.retain(|damage| damage.range.start < end);
    } else {
        archive.salvage()?;
    }
    let store_end = archive
        .commits()
        .iter()
        .map(|committed| committed.commit.store_end)
        .max()
        .unwrap_or(StoreBlock(0));
    let (lost_blocks, decoded_blocks) = check_packs(&archive, store_end, &mut damage, monitor)?;
    let mut result = Verified {
        archive: path.to_owned(),
        archive_bytes: archive.length(),
        commits: archive.commits().len() as u64,
        verified_bytes: decoded_blocks * bytes(1),
        leftover_bytes: if has_leftovers_only { leftover_bytes } else { 0 },
        ..Verified::default()
    };
    monitor.phase("Verifying manifests", 0);
    let mut last_number = 0u64;
    for committed in archive.commits() {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        if committed.salvaged || u64::from(committed.commit.number.0) != last_number + 1 {
            damage.push(Damage {
                range: ByteRange::default(),
                problem: format!("the COMMIT of commit {} is lost", last_number + 1),
            });
        }
        last_number = u64::from(committed.commit.number.0);
        check_records(&archive, committed, &mut damage)?;
        check_commit(&archive, committed, &lost_blocks, (&mut damage, &mut result), monitor)?;
    }
    if archive.commits().is_empty() {
        damage.push(Damage {
            range: ByteRange {
                start: 0,
                length: archive.length(),
            },
            problem: "none of its commits is intact".into(),
        });
    }
    result.damage = places_of(damage);
    Ok(result)
}

/// Checks all PACKs. Returns the ranges of the store that are lost, ascending and disjoint, and the number of blocks that were decoded.
fn check_packs(
    archive: &Archive,
    store_end: StoreBlock,
    damage: &mut Vec<Damage>,
    monitor: &dyn Monitor,
) -> Result<(Vec<Range<StoreBlock>>, u64)> {
    let packs: Vec<&RecordLocation> = archive.packs(StoreBlock(0), store_end).collect();
    let all_bytes = packs
        .iter()
        .fold(0, |sum: u64, pack| sum.saturating_add(bytes(pack.blocks)));
    monitor.phase("Verifying blocks", all_bytes);
    let check = |pack: &&RecordLocation| {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let checked = check_pack(archive, pack);
        monitor.advance(bytes(pack.blocks));
        checked
    };
    let checked: Vec<Result<CheckedPack>> = packs.par_iter().map(check).collect();
    let (mut lost, mut decoded_blocks) = (Vec::new(), 0u64);
    for checked in checked {
        let mut checked = checked?;
        decoded_blocks += u64::from(checked.decoded_blocks);
        lost.append(&mut checked.lost);
        damage.append(&mut checked.damage);
    }
    lost.extend(range::without(
        std::slice::from_ref(&(StoreBlock(0)..store_end)),
        &held(&packs),
    ));
    Ok((range::joined(lost), decoded_blocks))
}

/// Reads all records of a commit and compares their hashes, except for PACKs, which [`check_packs`] reads.
fn check_records(archive: &Archive, committed: &Committed, damage: &mut Vec<Damage>) -> Result<()> {
    let records = committed.commit.records.iter();
    for location in records.filter(|location| location.kind != RecordKind::Pack) {
        match archive.body(location) {
            Ok(_) => {}
            Err(Error::Damaged { range, problem, .. }) => damage.push(Damage {
                range: range.unwrap_or(range_of(location)),
                problem,
            }),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The damaged places in the order of the archive, each once.
fn places_of(damage: Vec<Damage>) -> Vec<DamagedPlace> {
    let mut places: BTreeMap<(u64, u64), String> = BTreeMap::new();
    for Damage { range, problem } in damage {
        places.entry((range.start, range.length)).or_insert(problem);
    }
    let places = places.into_iter().map(|((start, length), problem)| DamagedPlace {
        range: ByteRange { start, length },
        problem,
    });
    places.collect()
}

/// The ranges of the store that some PACKs hold, ascending.
fn held(packs: &[&RecordLocation]) -> Vec<Range<StoreBlock>> {
    let mut held: Vec<_> = packs.iter().map(|pack| pack.first..pack.first + pack.blocks).collect();
    held.sort_unstable_by_key(|range| range.start);
    held
}

/// What a check of a PACK found.
#[derive(Default)]
struct CheckedPack {
    /// The number of blocks whose frame could be decoded.
    decoded_blocks: u32,
    /// The blocks that are lost.
    lost: Vec<Range<StoreBlock>>,
    damage: Vec<Damage>,
}

impl CheckedPack {
    /// Notes [`Error::Damaged`], at `place` unless the error says where, and that blocks are lost. It returns any other error, which ends the
    /// verification.
    fn note(&mut self, error: Error, place: ByteRange, lost: Range<StoreBlock>) -> Result<()> {
        match error {
            Error::Damaged { range, problem, .. } => {
                self.damage.push(Damage {
                    range: range.unwrap_or(place),
                    problem,
                });
                self.lost.push(lost);
                Ok(())
            }
            other => Err(other),
        }
    }
}

/// Decodes every frame of a PACK and compares every block with its hash.
fn check_pack(archive: &Archive, pack: &RecordLocation) -> Result<CheckedPack> {
    /// Blocks whose hashes are read together. A frame has fewer.
    const HASHES_AT_ONCE: u32 = 1 << 13;
    let mut checked = CheckedPack::default();
    let pack_blocks = pack.first..pack.first + pack.blocks;
    let frames = match archive.frames(pack) {
        Ok(frames) => frames,
        Err(error) => {
            checked.note(error, range_of(pack), pack_blocks)?;
            return Ok(checked);
        }
    };
    let (mut hashed, mut hashes) = (pack_blocks.start..pack_blocks.start, Vec::new());
    for located in frames {
        let LocatedFrame { offset, frame } = located;
        let blocks = frame.first..frame.first + u32::from(frame.blocks);
        let place = ByteRange {
            start: offset,
            length: frame.stored_bytes.into(),
        };
        let content = match archive.frame(&located) {
            Ok(content) => content,
            Err(error) => {
                checked.note(error, place, blocks)?;
                continue;
            }
        };
        checked.decoded_blocks += u32::from(frame.blocks);
        if blocks.end > hashed.end {
            hashed = blocks.start..pack_blocks.end.min(blocks.start.saturating_add(HASHES_AT_ONCE));
            hashes = archive.hashes(hashed.start, hashed.end)?;
        }
        let expected = &hashes[(blocks.start - hashed.start) as usize..];
        for ((block, content), expected) in range::each(blocks).zip(content.chunks_exact(BLOCK_LEN)).zip(expected) {
            if expected.is_some_and(|expected| expected != hash_of(content)) {
                let problem = format!("block {block} of the store is not the one that the INDEX says");
                checked.damage.push(Damage { range: place, problem });
                checked.lost.push(block..block + 1);
            }
        }
    }
    Ok(checked)
}

/// Checks whether each image of a commit can be restored, and adds to the result the ranges that cannot.
fn check_commit(
    archive: &Archive,
    committed: &Committed,
    lost: &[Range<StoreBlock>],
    (damage, result): (&mut Vec<Damage>, &mut Verified),
    monitor: &dyn Monitor,
) -> Result<()> {
    let commit = &committed.commit;
    let (manifest, mut manifest_damage) = match archive.manifest(committed) {
        Ok(manifest) => manifest,
        Err(Error::Damaged { range, problem, .. }) => {
            damage.push(Damage {
                range: range.unwrap_or_default(),
                problem,
            });
            let lost = commit
                .images
                .iter()
                .map(|image| whole(commit.number, image.path.clone(), image.size));
            result.lost.extend(lost);
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    let is_doubtful = !manifest_damage.is_empty();
    damage.append(&mut manifest_damage);
    let mut hashes = StoredHashes::new(Some(archive), commit.store_end);
    let summaries = by_path(&commit.images);
    let mut listed: HashSet<&Path> = HashSet::new();
    for image in &manifest.images {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        result.images += 1;
        let path = image.image.path();
        listed.insert(path);
        let mut has_all = !image.runs.iter().any(|run| run.content == Content::Lost);
        let image_digest = digest(&image.runs, monitor, |first, blocks, digest| {
            has_all &= hashes.add_to(digest, first, blocks)?;
            Ok(())
        })?;
        let summary = summaries.get(path);
        let differs = summary.is_some_and(|summary| summary.digest != image_digest || summary.size != image.image.size);
        let is_mixed_up = (has_all && differs) || (!has_all && is_doubtful);
        let lost = lost_of(image, is_mixed_up, lost);
        result.lost.extend(lost.map(|lost| LostIn {
            commit: commit.number,
            lost,
        }));
    }
    for summary in &commit.images {
        if !listed.contains(summary.path.as_path()) {
            result
                .lost
                .push(whole(commit.number, summary.path.clone(), summary.size));
        }
    }
    // Blocks that no PACK holds are among the lost ones, and a manifest that refers to blocks beyond the store's end is refused.
    debug_assert!(
        wanted(manifest.images.iter().flat_map(|image| &image.runs))
            .last()
            .is_none_or(|range| range.end <= commit.store_end)
    );
    Ok(())
}

/// The ranges of an image that are lost, if any are. If the records of the image contradict each other (`is_mixed_up`), the whole image
/// is lost.
fn lost_of(image: &ImageRuns, is_mixed_up: bool, lost: &[Range<StoreBlock>]) -> Option<LostImage> {
    let (path, size) = (image.image.path().to_owned(), image.image.size);
    if is_mixed_up {
        return Some(LostImage::whole(path, size));
    }
    let ranges = lost_ranges(&image.runs, size, lost);
    let lost = LostImage {
        path,
        restored_as: None,
        ranges,
    };
    (!lost.ranges.is_empty()).then_some(lost)
}

/// An image of a commit that is lost as a whole.
fn whole(commit: CommitNumber, path: PathBuf, size: u64) -> LostIn {
    LostIn {
        commit,
        lost: LostImage::whole(path, size),
    }
}
