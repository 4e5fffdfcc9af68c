//! `verify`: checks every hash of an archive, and every reference of every manifest.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use crate::archive::head::Head;
use crate::archive::index;
use crate::archive::key_check;
use crate::archive::keys::ArchiveKeys;
use crate::archive::lane::ListedRecord;
use crate::archive::list::{ImageSummary, RecordLocation, by_path};
use crate::archive::manifest::{ImageRuns, Manifest, ManifestBuilder, PlanPart, PlanRecord};
use crate::archive::pack::FrameInfo;
use crate::archive::reader::{Archive, Committed, Damage, LocatedFrame, MISSING_RUNS, ProvedHash, note_damage};
use crate::archive::record::{BlockHasher, HEADER_BYTES, Hash, LaneId, RecordKind};
use crate::archive::seal::KeySlot;
use crate::archive::stream::{Stream, StreamEvent};
use crate::block::{BLOCK_LEN, ByteRange, bytes};
use crate::codec::{Decoded, Malformed};
use crate::content::Content;
use crate::error::{Error, Result};
use crate::exec::hashes::{StoredHashes, digest};
use crate::exec::repair::Healer;
use crate::monitor::Monitor;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::plan::restore::lost_ranges;
use crate::range;
use crate::report::{DamagedPlace, LostImage, LostIn, ParityState, Verified};
use crate::spill::{Budget, SpillVec};
use crate::store::{FileStore, Store, StoreReader};

mod without_key;

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
    verify_sealed(store, Arc::default(), monitor)
}

/// Whether the first records of a store are those of a sealed archive.
fn is_sealed(store: &dyn Store) -> Result<bool> {
    /// A damaged beginning hides it not, as long as a record is whole within so many bytes.
    const LOOKED_AT: u64 = 64 << 20;
    let failed = |error| Error::io("read", store.path())(error);
    let mut stream = Stream::new(StoreReader::new(store, 0).take(LOOKED_AT), 0);
    while let Some(event) = stream.next_event().map_err(failed)? {
        match event {
            StreamEvent::Record { header, body, .. } if header.kind == RecordKind::Head => {
                return Ok(Head::decode(&body).is_ok_and(|head| head.is_sealed));
            }
            StreamEvent::Record { header, .. } if header.kind == RecordKind::Key || header.seal.is_some() => {
                return Ok(true);
            }
            StreamEvent::Record { header, .. } if KeySlot::of(header.kind).is_some() => return Ok(false),
            _ => {}
        }
    }
    Ok(false)
}

/// Verifies the archive in a store, which may be sealed. If it is, and no key was named, its records are verified, and not what is in them.
///
/// # Errors
/// Those of [`verify`].
pub fn verify_sealed(store: Arc<dyn Store>, keys: Arc<ArchiveKeys>, monitor: &dyn Monitor) -> Result<Verified> {
    if keys.is_missing() && is_sealed(&*store)? {
        return without_key::verify_records(&store, &keys, monitor);
    }
    monitor.phase("Reading records", 0);
    let path = store.path().to_owned();
    let mut archive = Archive::open_any_with(Arc::clone(&store), keys)?;
    if archive.keys().ring().is_none() && is_sealed(&*store)? {
        // Its KEY records are lost, so that the key is of no use.
        return without_key::verify_records(&store, archive.keys(), monitor);
    }
    archive.check_listed_supported()?;
    let mut damage = damage_found(&archive)?;
    let end = archive.base().length;
    // Records behind the last commit that an export left which did not end are not part of the archive.
    let leftover_bytes = archive.length() - end;
    let has_leftovers_only = archive.has_leftovers_only()?;
    if has_leftovers_only {
        damage.retain(|damage| damage.range.start < end);
    } else {
        archive.salvage()?;
    }
    let mut result = Verified {
        archive: path,
        archive_bytes: archive.length(),
        commits: archive.commits().len() as u64,
        is_ended: archive.is_ended(),
        is_sealed: archive.keys().ring().is_some(),
        leftover_bytes: if has_leftovers_only { leftover_bytes } else { 0 },
        ..Verified::default()
    };
    let mut verifier = Verifier {
        archive: &archive,
        damage,
        stores: HashMap::new(),
        intact: HashMap::new(),
        budget: super::runs_budget(None),
        monitor,
    };
    result.verified_bytes = verifier.check_packs()? * bytes(1);
    monitor.phase("Verifying manifests", 0);
    for committed in archive.commits() {
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        if committed.salvaged {
            let problem = format!("the COMMIT of commit {} is lost", committed.commit.number);
            verifier.damage.push(Damage::at(ByteRange::default(), problem));
        }
        verifier.check_records(committed)?;
        verifier.check_commit(committed, &mut result)?;
    }
    for forgotten in archive.forgotten() {
        let (_, mut damage) = archive.images(forgotten)?;
        verifier.damage.append(&mut damage);
    }
    verifier.damage.append(&mut archive.stray_commits()?);
    verifier.damage.extend(nothing_intact(&archive));
    result.damage = places_of(verifier.damage);
    if archive.has_parity()? {
        result.parity = parity_of(store, monitor)?;
    }
    Ok(result)
}

/// The damage of an archive of which no commit is intact.
fn nothing_intact(archive: &Archive) -> Option<Damage> {
    let all = ByteRange {
        start: 0,
        length: archive.length(),
    };
    let is_lost = archive.commits().is_empty();
    is_lost.then(|| Damage::at(all, "none of its commits is intact"))
}

/// What a search finds, before records are decoded.
fn damage_found(archive: &Archive) -> Result<Vec<Damage>> {
    let mut damage = archive.look_for_damage()?;
    damage.append(&mut archive.stray_commits()?);
    damage.append(&mut key_check::check(archive)?);
    Ok(damage)
}

/// What the parity of an archive can do.
fn parity_of(store: Arc<dyn Store>, monitor: &dyn Monitor) -> Result<Option<ParityState>> {
    let cells = tempfile::tempfile().map_err(Error::io("make a file in", &std::env::temp_dir()))?;
    let healing = Healer::new(store, None, cells, monitor)?.look()?;
    Ok((healing.groups > 0).then_some(ParityState {
        percent: healing.percent,
        protected_bytes: healing.protected_bytes,
        unprotected_bytes: healing.length.saturating_sub(healing.protected_bytes),
        lost_bytes: healing.lost_bytes,
        heals: healing.spare_bytes.is_some(),
        spare_bytes: healing.spare_bytes.unwrap_or(0),
    }))
}

/// What PACKs were found to hold of a lane's store.
struct CheckedStore {
    /// Blocks that are intact, each with the first commit that it is proved for.
    held: Vec<(CommitNumber, Range<StoreBlock>)>,
    /// Hashes that were made of blocks which no INDEX proves for all commits that may use them, in the order of the blocks once all PACKs
    /// were read. What they are is proved by the digests of images.
    remade: SpillVec<(StoreBlock, Hash)>,
}

impl CheckedStore {
    fn new(budget: &Budget) -> Self {
        Self {
            held: Vec::new(),
            remade: SpillVec::new_in(budget),
        }
    }

    /// Puts what was made of blocks in order. Returns the blocks that are others in another PACK.
    fn sort_remade(&mut self) -> Vec<StoreBlock> {
        self.remade.sort_by_key(|(block, _)| *block);
        let pairs = self
            .remade
            .windows(2)
            .filter(|pair| pair[0].0 == pair[1].0 && pair[0].1 != pair[1].1);
        let mut disputed: Vec<StoreBlock> = pairs.map(|pair| pair[0].0).take(DISPUTED_MAX).collect();
        disputed.dedup();
        self.remade.dedup_by_key(|(block, _)| *block);
        disputed
    }

    /// The blocks of the store that a commit cannot get, a list.
    fn lost_for(&self, committed: &Committed) -> Vec<Range<StoreBlock>> {
        let held = self.held.iter().filter(|(from, _)| *from <= committed.commit.number);
        let held = range::joined(held.map(|(_, range)| range.clone()));
        range::without(
            std::slice::from_ref(&(StoreBlock(0)..committed.commit.store_end)),
            &held,
        )
    }
}

/// Blocks of which it is said that PACKs have different ones.
const DISPUTED_MAX: usize = 1000;

/// A verification in the making.
struct Verifier<'a> {
    archive: &'a Archive,
    damage: Vec<Damage>,
    stores: HashMap<LaneId, CheckedStore>,
    /// The addresses that each intact PACK holds in a lane, a list.
    intact: HashMap<(LaneId, Hash), Vec<Range<StoreBlock>>>,
    budget: Budget,
    monitor: &'a dyn Monitor,
}

impl Verifier<'_> {
    /// Checks all PACKs. Returns how many blocks are what was stored.
    fn check_packs(&mut self) -> Result<u64> {
        let archive = self.archive;
        // The last commit of a lane reaches all PACKs of it.
        let lanes: BTreeMap<LaneId, &Committed> = archive.commits().iter().map(|one| (one.lane, one)).collect();
        let of_lane = |last: &'_ &Committed| archive.packs(last, StoreBlock(0)..StoreBlock::END_MAX);
        let all: Vec<(&Committed, &ListedRecord)> = lanes
            .values()
            .flat_map(|last| of_lane(last).into_iter().map(|pack| (*last, pack)))
            .collect();
        let all_bytes = all
            .iter()
            .fold(0, |sum: u64, (_, pack)| sum.saturating_add(bytes(pack.location.blocks)));
        self.monitor.phase("Verifying blocks", all_bytes);
        let known = archive.commits().iter().chain(archive.forgotten());
        let mut ends: HashMap<LaneId, StoreEnds> = HashMap::new();
        for committed in known {
            let of_lane = ends.entry(committed.lane).or_default();
            of_lane.insert(committed.commit.number, committed.commit.store_end);
        }
        let checked = all.par_iter().map(|(last, pack)| {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let begun = CheckedPack::new(pack, &ends[&last.lane], archive.hasher(), &self.budget);
            let checked = check_pack(archive, last, begun);
            self.monitor.advance(bytes(pack.location.blocks));
            checked
        });
        let checked: Vec<Result<CheckedPack<'_>>> = checked.collect();
        let (mut blocks, mut damaged) = (0, Vec::new());
        for ((last, pack), checked) in all.into_iter().zip(checked) {
            let mut checked = checked?;
            blocks += checked.blocks;
            self.damage.append(&mut checked.contradictions);
            if checked.damage.is_empty() {
                // Whether it serves the commit that lists the other PACK, the digests of its images tell.
                let held = range::joined(checked.held.iter().map(|(_, range)| range.clone()));
                self.intact.insert((last.lane, pack.location.body_hash), held);
            } else {
                damaged.push((last, pack, std::mem::take(&mut checked.damage)));
            }
            let store = self
                .stores
                .entry(last.lane)
                .or_insert_with(|| CheckedStore::new(&self.budget));
            store.held.append(&mut checked.held);
            store.remade.extend(checked.remade);
        }
        self.note_needed(damaged);
        for store in self.stores.values_mut() {
            for block in store.sort_remade() {
                let problem = format!("block {block} of the store is another one than in another PACK");
                self.damage.push(Damage::at(ByteRange::default(), problem));
            }
        }
        Ok(blocks)
    }

    /// Notes the damage of PACKs, unless each address of the PACK is dead or in another one, of those that are intact.
    fn note_needed(&mut self, damaged: Vec<(&Committed, &ListedRecord, Vec<Damage>)>) {
        let mut replaced = HashSet::new();
        for (last, pack, mut damage) in damaged {
            if self.may_be_missing(last, &pack.location, |_| true) {
                replaced.insert(pack.location.body_hash);
            } else {
                self.damage.append(&mut damage);
            }
        }
        self.forget_damage_of(&replaced);
    }

    /// Whether each address of a record is dead, or in an intact PACK of the commit's lane that may serve in its place.
    fn may_be_missing(
        &self,
        committed: &Committed,
        record: &RecordLocation,
        may_serve: impl Fn(&ListedRecord) -> bool,
    ) -> bool {
        let wanted = record.first..record.end();
        let packs = self.archive.packs(committed, wanted.clone()).into_iter();
        let held = packs
            .filter(|pack| may_serve(pack))
            .filter_map(|pack| self.intact.get(&(committed.lane, pack.location.body_hash)))
            .flat_map(|held| range::overlap(held, wanted.clone()));
        let missing = range::without(std::slice::from_ref(&wanted), &range::joined(held));
        missing.iter().all(|range| self.archive.is_dead(committed, range))
    }

    /// Takes back the damage of records that may be missing.
    fn forget_damage_of(&mut self, records: &HashSet<Hash>) {
        self.damage
            .retain(|damage| damage.header.is_none_or(|header| !records.contains(&header.body_hash)));
    }

    /// Reads and decodes the records of a commit. PACKs have been read.
    fn check_records(&mut self, committed: &Committed) -> Result<()> {
        let mut planned = ManifestBuilder::new(&self.budget);
        let records = committed.listed.records.iter();
        let mut spared = HashSet::new();
        for location in records.filter(|location| location.kind != RecordKind::Pack) {
            let body = self.archive.body(location);
            let is_missing = location.kind == RecordKind::Index && matches!(body, Err(Error::Damaged { .. }));
            let is_of_another = |pack: &ListedRecord| pack.commit != committed.commit.number;
            if is_missing && self.may_be_missing(committed, location, is_of_another) {
                spared.insert(location.body_hash);
                continue;
            }
            let checked = body.and_then(|body| {
                check_body(&body, location, committed.commit.number, &mut planned)
                    .map_err(|malformed| self.malformed(location, malformed))
            });
            note_damage(checked, location.sought().range(), &mut self.damage)?;
        }
        self.forget_damage_of(&spared);
        let heads = committed
            .listed
            .records
            .iter()
            .filter(|one| one.kind == RecordKind::Head);
        let place = committed.location.sought().range();
        if heads.count() != 1 && !committed.salvaged {
            self.damage.push(Damage::at(place, "it does not list one HEAD"));
        }
        let has_orphans = planned.has_orphans();
        let finished = planned.finish().and_then(|planned| match committed.salvaged {
            _ if has_orphans => Err(MISSING_RUNS.into()),
            // What the store held after such a commit is not known.
            true => Ok(()),
            false => planned.check_below(committed.commit.store_end),
        });
        if let Err(malformed) = finished {
            self.damage
                .push(Damage::at(place, format!("planned images: {}", malformed.problem())));
        }
        Ok(())
    }

    fn malformed(&self, location: &RecordLocation, malformed: Malformed) -> Error {
        let path = self.archive.path().to_owned();
        match malformed {
            Malformed::Unsupported(problem) => Error::Unsupported { path, problem },
            Malformed::Damaged(problem) => Error::Damaged {
                path,
                range: Some(location.sought().range()),
                problem: format!("{} record: {problem}", location.kind.name()),
            },
        }
    }

    /// Reads the manifest of a commit, and where it is damaged. It is `None` if it cannot be read: then all images of the commit are lost.
    fn manifest_of(
        &mut self,
        committed: &Committed,
        summaries: &[ImageSummary],
        result: &mut Verified,
    ) -> Result<Option<(Manifest, Vec<Damage>)>> {
        match self.archive.manifest(committed, &self.budget) {
            Ok(read) => Ok(Some(read)),
            Err(error) => {
                note_damage(Err(error), ByteRange::default(), &mut self.damage)?;
                let number = committed.commit.number;
                let lost = summaries
                    .iter()
                    .map(|image| whole(number, image.path.clone(), image.size));
                result.lost.extend(lost);
                Ok(None)
            }
        }
    }

    /// Checks that each image of a commit can be restored, and says what of it cannot.
    fn check_commit(&mut self, committed: &Committed, result: &mut Verified) -> Result<()> {
        let (archive, number) = (self.archive, committed.commit.number);
        let (summaries, mut damage) = archive.images(committed)?;
        let Some((manifest, mut found)) = self.manifest_of(committed, &summaries, result)? else {
            return Ok(());
        };
        damage.append(&mut found);
        let doubtful = !damage.is_empty();
        self.damage.append(&mut damage);
        let store = self
            .stores
            .entry(committed.lane)
            .or_insert_with(|| CheckedStore::new(&self.budget));
        let lost_blocks = store.lost_for(committed);
        let made = range::where_true(store.remade.iter().map(|(block, _)| (*block, true)));
        let lost_to_digests = range::without(&lost_blocks, &made);
        let mut hashes =
            StoredHashes::new(Some((archive, committed)), committed.commit.store_end).with_made(&store.remade);
        let by_path = by_path(&summaries);
        let uses = if committed.salvaged {
            Vec::new()
        } else {
            archive.uses(committed)?
        };
        let mut listed: HashSet<&Path> = HashSet::new();
        for image in &manifest.images {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let path = image.image.path();
            let summary = by_path.get(path);
            // What no COMMIT lists is not part of it, unless that is not known.
            if summary.is_none() && !committed.salvaged && !doubtful {
                continue;
            }
            result.images += 1;
            listed.insert(path);
            let mut has_all = !image.is_incomplete();
            let made_with = (&archive.hasher(), self.monitor);
            let found = digest(&image.runs, image.image.size, made_with, |first, blocks, digest| {
                has_all &= hashes.add_to(digest, first, blocks)?;
                Ok(())
            })?;
            let differs = summary.is_some_and(|summary| {
                summary.digest != found || summary.size != image.image.size || summary.number != image.image.number
            });
            let is_mixed_up =
                (has_all && differs) || (!has_all && doubtful) || !ends_in_zeros(archive, committed, image)?;
            let is_proved = has_all && summary.is_some() && !differs;
            let lost = lost_of(
                image,
                is_mixed_up,
                if is_proved { &lost_to_digests } else { &lost_blocks },
            );
            result.lost.extend(lost.map(|lost| LostIn { commit: number, lost }));
            if !uses.is_empty() && !is_used(image, &uses) {
                let problem = format!("`{}` has blocks that its COMMIT does not list as used", path.display());
                self.damage.push(Damage::at(ByteRange::default(), problem));
            }
        }
        let missing = summaries
            .iter()
            .filter(|summary| !listed.contains(summary.path.as_path()));
        result
            .lost
            .extend(missing.map(|summary| whole(number, summary.path.clone(), summary.size)));
        Ok(())
    }
}

/// Whether what an image's last block holds behind its end is zeros, as far as that is there.
fn ends_in_zeros(archive: &Archive, committed: &Committed, image: &ImageRuns) -> Result<bool> {
    let Some((block, from)) = image.partial_block() else {
        return Ok(true);
    };
    let content = archive.block(committed, block)?;
    Ok(content.is_none_or(|content| content[from..].iter().all(|byte| *byte == 0)))
}

/// Whether all blocks that an image refers to are among those that its commit lists as used: a collector keeps no others.
fn is_used(image: &ImageRuns, uses: &[Range<StoreBlock>]) -> bool {
    image.runs.iter().all(|run| match run.content {
        Content::Stored(first) => {
            let blocks = first..first.saturating_add(run.blocks);
            range::count(&range::overlap(uses, blocks)) == u64::from(run.blocks)
        }
        _ => true,
    })
}

/// Decodes the body of a record.
fn check_body(
    body: &[u8],
    location: &RecordLocation,
    commit: CommitNumber,
    planned: &mut ManifestBuilder,
) -> Decoded<()> {
    match location.kind {
        RecordKind::Head => Head::decode(body).map(|_| ()),
        RecordKind::Plan => {
            let plan = PlanRecord::decode(body)?;
            if plan.part.number() != location.part {
                return Err("it is of another part than its COMMIT says".into());
            }
            if plan.commit != commit {
                return Err("it is of another commit".into());
            }
            match plan.part {
                PlanPart::Planned => planned.add(plan.content()),
                PlanPart::Blocks => plan.announced().map(|_| ()),
                // Reading the manifest decodes it.
                PlanPart::Final => Ok(()),
            }
        }
        RecordKind::Index => match index::hashes(body)? {
            hashes if hashes.len() == location.blocks as usize => Ok(()),
            _ => Err("it has other blocks than its COMMIT says".into()),
        },
        _ => Ok(()),
    }
}

/// The damaged places in the order of the archive, each once.
fn places_of(damage: Vec<Damage>) -> Vec<DamagedPlace> {
    let mut places: BTreeMap<(u64, u64), String> = BTreeMap::new();
    for Damage { range, problem, .. } in damage {
        places.entry((range.start, range.length)).or_insert(problem);
    }
    let places = places.into_iter().map(|((start, length), problem)| DamagedPlace {
        range: ByteRange { start, length },
        problem,
    });
    places.collect()
}

/// Decodes every frame of a pack and compares every block with its hash.
fn check_pack<'a>(archive: &Archive, last: &Committed, mut checked: CheckedPack<'a>) -> Result<CheckedPack<'a>> {
    let location = &checked.pack.location;
    checked.expected = archive.proved_hashes(last, location.first..location.end())?;
    match archive.whole_pack(location) {
        Ok((body, table)) => {
            let start = location.offset + HEADER_BYTES as u64;
            for frame in table.frames {
                let content = frame.slice(&body).and_then(|stored| frame.decode(stored));
                let offset = start.saturating_add(frame.offset);
                match content {
                    Ok(content) => checked.compare(&frame, offset, &content),
                    Err(malformed) => checked.damaged(&frame, offset, malformed.problem()),
                }
            }
        }
        Err(error) => {
            note_damage(Err(error), location.sought().range(), &mut checked.damage)?;
            // Each frame is proved by itself, so that what is intact of the PACK counts.
            match archive.frames(location) {
                Ok(frames) => {
                    for located in frames {
                        let LocatedFrame { offset, frame, .. } = located;
                        match archive.frame(&located) {
                            Ok(content) => checked.compare(&frame, offset, &content),
                            Err(error) => note_damage(Err(error), place_of(&frame, offset), &mut checked.damage)?,
                        }
                    }
                }
                Err(error) => note_damage(Err(error), location.sought().range(), &mut checked.damage)?,
            }
        }
    }
    // All that was found is kept until the last PACK was read.
    checked.expected = Vec::new();
    Ok(checked)
}

fn place_of(frame: &FrameInfo, offset: u64) -> ByteRange {
    ByteRange {
        start: offset,
        length: frame.stored_bytes.into(),
    }
}

/// The ends of a lane's store after its commits.
type StoreEnds = BTreeMap<CommitNumber, StoreBlock>;

/// What was found of a PACK.
struct CheckedPack<'a> {
    pack: &'a ListedRecord,
    ends: &'a StoreEnds,
    /// The hashes that INDEXes have of its blocks, gaps included.
    expected: Vec<Option<ProvedHash>>,
    /// Blocks that are what was stored.
    blocks: u64,
    hasher: BlockHasher,
    held: Vec<(CommitNumber, Range<StoreBlock>)>,
    remade: SpillVec<(StoreBlock, Hash)>,
    /// What of it cannot be read: no damage if other PACKs hold it.
    damage: Vec<Damage>,
    /// What of it is not what an INDEX says.
    contradictions: Vec<Damage>,
}

impl<'a> CheckedPack<'a> {
    fn new(pack: &'a ListedRecord, ends: &'a StoreEnds, hasher: BlockHasher, budget: &Budget) -> Self {
        Self {
            pack,
            ends,
            expected: Vec::new(),
            blocks: 0,
            hasher,
            held: Vec::new(),
            remade: SpillVec::new_in(budget),
            damage: Vec::new(),
            contradictions: Vec::new(),
        }
    }

    fn damaged(&mut self, frame: &FrameInfo, offset: u64, problem: &str) {
        self.damage.push(Damage::at(place_of(frame, offset), problem));
    }

    /// Compares the blocks of a frame with their hashes. If one is another, the whole frame is lost: import takes frames as a whole.
    fn compare(&mut self, frame: &FrameInfo, offset: u64, content: &[u8]) {
        let first = (frame.first - self.pack.location.first) as usize;
        let expected = self.expected.get(first..).unwrap_or_default();
        let hashes: Vec<Hash> = content
            .chunks_exact(BLOCK_LEN)
            .map(|block| self.hasher.of(block))
            .collect();
        let blocks = || range::from(frame.first).zip(&hashes).zip(expected);
        let is_other = |hash: &Hash, proved: &ProvedHash| proved.hash != *hash || proved.is_disputed;
        let wrong = blocks().filter(|((_, hash), expected)| expected.is_some_and(|proved| is_other(hash, &proved)));
        let problem = |block| format!("block {block} of the store is not the one that the INDEX says");
        let place = place_of(frame, offset);
        let mut wrong: Vec<Damage> = wrong.map(|((block, _), _)| Damage::at(place, problem(block))).collect();
        if !wrong.is_empty() {
            self.contradictions.append(&mut wrong);
            return;
        }
        for ((block, hash), expected) in blocks() {
            // Commits before that of the PACK take from it what their INDEXes prove, or the digests of their images.
            let proved_for = expected.map_or(self.pack.commit, |proved| self.pack.commit.min(proved.since));
            let end_before = self.ends.range(..proved_for).next_back().map(|(_, end)| *end);
            if expected.is_none() || end_before.is_some_and(|end| block < end) {
                self.remade.push((block, *hash));
            }
            self.blocks += 1;
            match self.held.last_mut() {
                Some((from, range)) if *from == proved_for && range.end == block => range.end = block + 1,
                _ => self.held.push((proved_for, block..block + 1)),
            }
        }
    }
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
