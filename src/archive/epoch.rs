//! What the records of an epoch say, in the order they come: from a pipe, which is read once. What came is compared with what its COMMIT lists.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use super::announced::AnnouncedBlocks;
use super::commit::Commit;
use super::head::Head;
use super::index;
use super::limits::{IMAGES_MAX, LISTS_MAX, RECORDS_MAX, TEXT_BYTES_MAX, TEXT_OVERHEAD, USES_MAX};
use super::list::{self, ImageSummary, Listed, RecordLocation};
use super::manifest::{Manifest, ManifestBuilder, PlanPart, PlanRecord};
use super::pack::{self, PackTable};
use super::record::{EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind};
use crate::codec::Decoded;
use crate::numbers::{CommitNumber, StoreBlock};
use crate::spill::Budget;

/// Blocks that seeds are searched for: 256 MiB of fingerprints, for 256 GiB of blocks. Those of later PLAN records are not searched for.
const ANNOUNCED_BLOCKS_MAX: usize = 1 << 26;

/// What the records of an epoch said so far.
#[derive(Debug)]
pub struct Epoch {
    id: Option<EpochId>,
    /// The commit that its PLANs are for.
    planned_for: Option<CommitNumber>,
    /// Images as they were planned.
    planned: ManifestBuilder,
    /// Images as they are.
    last: ManifestBuilder,
    /// Fingerprints of the blocks, [`ANNOUNCED_BLOCKS_MAX`] at most, if anyone uses them.
    announced: Vec<AnnouncedBlocks>,
    /// Whether anyone uses them.
    announces: bool,
    /// The number of blocks that were announced.
    announced_blocks: usize,
    /// The store address after the last block that was announced.
    announced_end: StoreBlock,
    /// Records of kinds that a COMMIT lists, by their numbers.
    came: BTreeMap<u64, CameRecord>,
    /// LISTs, by the hashes of their bodies.
    lists: HashMap<Hash, CameList>,
    /// How much these have.
    listed: CameTotal,
    /// Whether a PLAN may be damaged.
    doubtful: bool,
}

/// How much all LISTs of an epoch have. A COMMIT may list as much.
#[derive(Debug, Default)]
struct CameTotal {
    records: usize,
    uses: usize,
    images: usize,
    text_bytes: usize,
}

impl CameTotal {
    fn add(&mut self, listed: &Listed, images: &[ImageSummary]) -> Decoded<()> {
        self.records += listed.records.len() + listed.forgotten.len() + listed.dead.len();
        self.uses += listed.uses.len();
        self.images += images.len();
        let text_of = |image: &ImageSummary| image.path.as_os_str().len() + TEXT_OVERHEAD;
        self.text_bytes += images.iter().map(text_of).sum::<usize>();
        if self.records > RECORDS_MAX
            || self.uses > USES_MAX
            || self.images > IMAGES_MAX
            || self.text_bytes > TEXT_BYTES_MAX
        {
            return Err("its LISTs have more than allowed".into());
        }
        Ok(())
    }
}

/// A LIST that came.
#[derive(Debug)]
struct CameList {
    /// Bytes, header included.
    length: u64,
    part: u8,
    listed: Listed,
    images: Vec<ImageSummary>,
}

/// A record that came, to be compared with what its COMMIT lists.
#[derive(Debug)]
struct CameRecord {
    kind: RecordKind,
    /// Bytes, header included.
    length: u64,
    body_hash: Hash,
    content: CameContent,
}

/// What a record that came holds, as a COMMIT lists it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct CameContent {
    /// The part of a PLAN.
    part: u8,
    /// The store address that the blocks of a PACK or an INDEX were taken for.
    first: StoreBlock,
    /// Its blocks.
    blocks: u32,
    /// The hash of a PACK's table.
    table_hash: Hash,
}

/// Hashes that an INDEX has of blocks from one on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProvedBlocks<'a> {
    /// The store address of the first.
    pub first: StoreBlock,
    /// Their hashes.
    pub hashes: &'a [Hash],
}

/// What an epoch says once its COMMIT came.
#[derive(Debug)]
pub struct EndedEpoch {
    /// Its commit.
    pub commit: Commit,
    /// What that lists, but for its images.
    pub listed: Listed,
    /// The images that it lists.
    pub summaries: Vec<ImageSummary>,
    /// What these are, or what is wrong with that.
    pub manifest: Decoded<Manifest>,
    /// Whether a PLAN may be damaged.
    pub doubtful: bool,
    /// A record that is listed and did not come, if there is one.
    pub missing: Option<RecordLocation>,
}

impl Epoch {
    /// Begins an epoch. `announces` says whether fingerprints of its blocks are used; runs lie in files where they exceed the budget.
    pub fn new(id: Option<EpochId>, announces: bool, budget: &Budget) -> Self {
        Self {
            id,
            planned_for: None,
            planned: ManifestBuilder::new(budget),
            last: ManifestBuilder::new(budget),
            announced: Vec::new(),
            announces,
            announced_blocks: 0,
            announced_end: StoreBlock(0),
            came: BTreeMap::new(),
            lists: HashMap::new(),
            listed: CameTotal::default(),
            doubtful: false,
        }
    }

    /// Returns its identity; none before the first record.
    pub fn id(&self) -> Option<EpochId> {
        self.id
    }

    /// Returns whether PACKs of it came, and no COMMIT.
    pub fn has_packs(&self) -> bool {
        self.came.values().any(|came| came.kind == RecordKind::Pack)
    }

    /// Returns whether a PLAN may be damaged.
    pub fn is_doubtful(&self) -> bool {
        self.doubtful
    }

    /// Notes that a record is lost, of which the header may be known.
    pub fn lose(&mut self, header: Option<&RecordHeader>) {
        self.doubtful |= header.is_none_or(|header| header.kind == RecordKind::Plan);
    }

    /// Returns the images as they were planned.
    ///
    /// # Errors
    /// Returns what contradicts itself.
    pub fn planned(&self) -> Decoded<Manifest> {
        self.planned.clone().finish()
    }

    /// Returns what was announced of blocks, and the store address after the last of them.
    pub fn announced(&self) -> (&[AnnouncedBlocks], StoreBlock) {
        (&self.announced, self.announced_end)
    }

    /// Takes a record that is neither a PACK nor a COMMIT. Returns the hashes that it has of blocks, if it is an INDEX.
    ///
    /// # Errors
    /// Returns what is malformed, or what this version does not know and must not skip.
    pub fn take<'b>(&mut self, header: &RecordHeader, body: &'b [u8]) -> Decoded<Option<ProvedBlocks<'b>>> {
        match header.kind {
            RecordKind::Head => {
                Head::decode(body)?;
                self.note(header, CameContent::default())?;
            }
            RecordKind::Plan => self.take_plan(header, body)?,
            RecordKind::Index => {
                let (first, hashes) = index::decode(body)?;
                let content = CameContent {
                    first,
                    blocks: u32::try_from(hashes.len()).unwrap_or(u32::MAX),
                    ..CameContent::default()
                };
                self.note(header, content)?;
                return Ok(Some(ProvedBlocks { first, hashes }));
            }
            RecordKind::List => self.take_list(header, body)?,
            // No other record says anything of images.
            _ => {}
        }
        Ok(None)
    }

    fn take_plan(&mut self, header: &RecordHeader, body: &[u8]) -> Decoded<()> {
        let plan = PlanRecord::decode(body)?;
        if *self.planned_for.get_or_insert(plan.commit) != plan.commit {
            return Err("PLANs of two commits are in one epoch".into());
        }
        match plan.part {
            PlanPart::Blocks => self.announce(plan.announced()?),
            PlanPart::Planned => self.planned.add(plan.content())?,
            PlanPart::Final => self.last.add(plan.content())?,
        }
        let content = CameContent {
            part: plan.part.number(),
            ..CameContent::default()
        };
        self.note(header, content)
    }

    /// Takes a PACK, which may hold blocks before `end_max`. Returns its table.
    ///
    /// # Errors
    /// Returns what is malformed.
    pub fn take_pack(&mut self, header: &RecordHeader, body: &[u8], end_max: StoreBlock) -> Decoded<PackTable> {
        let table = pack::decode_table(body, body.len() as u64, None)?;
        pack::check_padding(body, &table)?;
        if table.first.saturating_add(table.blocks) > end_max {
            return Err("it has blocks beyond what the archive can hold".into());
        }
        let content = CameContent {
            part: 0,
            first: table.first,
            blocks: table.blocks,
            table_hash: table.hash,
        };
        self.note(header, content)?;
        Ok(table)
    }

    /// Ends the epoch by its COMMIT, once what came is compared with what that lists.
    ///
    /// # Errors
    /// Returns what is malformed, or says that something came that the COMMIT does not list: it may have been used, and is not what was
    /// committed. The epoch goes on then.
    pub fn end(&mut self, header: &RecordHeader, body: &[u8]) -> Decoded<EndedEpoch> {
        let commit = Commit::decode_of(body, header)?;
        let (listed, summaries) = self.listed(&commit)?;
        listed.check_below(commit.store_end)?;
        if self.planned_for.is_some_and(|number| number != commit.number) {
            return Err("a PLAN is of another commit".into());
        }
        let missing = self.compare(&listed, header.lane)?;
        self.doubtful |= missing.is_some_and(|missing| missing.kind == RecordKind::Plan);
        Ok(EndedEpoch {
            manifest: self.manifest(&summaries, commit.store_end),
            doubtful: self.doubtful,
            commit,
            listed,
            summaries,
            missing,
        })
    }

    /// Counts announced blocks. Their fingerprints are kept if anyone uses them and there is room for them.
    fn announce(&mut self, announced: AnnouncedBlocks) {
        self.announced_end = self.announced_end.max(announced.end());
        self.announced_blocks += announced.fingerprints.len();
        if self.announces && self.announced_blocks <= ANNOUNCED_BLOCKS_MAX {
            self.announced.push(announced);
        }
    }

    /// The images as they are; as they were planned, where records are lost.
    fn manifest(&mut self, summaries: &[ImageSummary], store_end: StoreBlock) -> Decoded<Manifest> {
        let mut manifest = self.last.take().finish()?;
        if self.doubtful
            && let Ok(mut planned) = self.planned.take().finish()
        {
            manifest.keep_as_listed(summaries, store_end);
            planned.keep_as_listed(summaries, store_end);
            manifest.complete_from(planned);
            manifest.check_names()?;
        }
        manifest.check_below(store_end)?;
        manifest.keep_listed(summaries);
        Ok(manifest)
    }

    /// Notes a record that its COMMIT should list.
    fn note(&mut self, header: &RecordHeader, content: CameContent) -> Decoded<()> {
        let came = CameRecord {
            kind: header.kind,
            length: header.body_bytes + HEADER_BYTES as u64,
            body_hash: header.body_hash,
            content,
        };
        if self.came.len() >= RECORDS_MAX {
            return Err("an epoch has more records than allowed".into());
        }
        if self.came.insert(header.sequence, came).is_some() {
            return Err("two records have one number".into());
        }
        Ok(())
    }

    fn take_list(&mut self, header: &RecordHeader, body: &[u8]) -> Decoded<()> {
        if self.lists.len() >= LISTS_MAX {
            return Err("it has more LISTs than allowed".into());
        }
        if let Entry::Vacant(place) = self.lists.entry(header.body_hash) {
            let (mut listed, mut images) = (Listed::default(), Vec::new());
            let part = list::add_any(&mut listed, &mut images, body, header.lane)?;
            self.listed.add(&listed, &images)?;
            let length = header.body_bytes + HEADER_BYTES as u64;
            place.insert(CameList {
                length,
                part,
                listed,
                images,
            });
        }
        Ok(())
    }

    /// What a COMMIT lists.
    fn listed(&mut self, commit: &Commit) -> Decoded<(Listed, Vec<ImageSummary>)> {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        for list in &commit.lists {
            let mut came = self
                .lists
                .remove(&list.body_hash)
                .ok_or("a LIST that its COMMIT names did not come")?;
            if (came.length, came.part) != (list.length, list.part) {
                return Err("a LIST came that is not the one that its COMMIT names".into());
            }
            listed.append(&mut came.listed);
            images.append(&mut came.images);
        }
        Ok((listed, images))
    }

    /// Compares what a COMMIT lists with what came. Returns a record that did not come, if there is one.
    ///
    /// # Errors
    /// Says that something came that the COMMIT does not list: it may have been used, and is not what was committed.
    fn compare(&mut self, listed: &Listed, lane: LaneId) -> Decoded<Option<RecordLocation>> {
        let mut missing = None;
        for record in &listed.records {
            let came = if record.lane == lane {
                self.came.remove(&record.sequence)
            } else {
                None
            };
            match came {
                Some(came) => {
                    let is_placed = record.kind.has_addresses();
                    let content = CameContent {
                        part: record.part,
                        first: if is_placed { record.first } else { StoreBlock(0) },
                        blocks: if is_placed { record.blocks } else { 0 },
                        table_hash: record.table_hash,
                    };
                    let what = (record.kind, record.length, record.body_hash);
                    if (came.kind, came.length, came.body_hash) != what || came.content != content {
                        return Err("a record came that is not the one that its COMMIT lists".into());
                    }
                }
                _ if matches!(
                    record.kind,
                    RecordKind::Other(_) | RecordKind::Parity | RecordKind::Note
                ) => {}
                _ => missing = Some(*record),
            }
        }
        if self.came.is_empty() {
            Ok(missing)
        } else {
            Err("a record came that its COMMIT does not list".into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::raw_archive::{RawArchive, RawRecord};

    const GOLDEN: &[u8] = include_bytes!("../../testdata/archive-v1.vmfold");

    /// Takes the records of the golden archive's first epoch, up to its COMMIT, but for those that `keeps` leaves out.
    fn ended(keeps: impl Fn(&RawRecord) -> bool, more: Option<RawRecord>) -> Decoded<EndedEpoch> {
        let archive = RawArchive::read(GOLDEN);
        let id = archive.records[0].epoch;
        let mut epoch = Epoch::new(Some(id), false, &Budget::default());
        let own = archive.records.into_iter().filter(|record| record.epoch == id);
        for record in more.into_iter().chain(own.filter(keeps)) {
            let mut body = record.body.clone();
            let header = RecordHeader::of_body(record.kind, record.lane, record.epoch, record.sequence, &mut body)?;
            match record.kind {
                RecordKind::Pack => drop(epoch.take_pack(&header, &record.body, StoreBlock::END_MAX)?),
                RecordKind::Commit => return epoch.end(&header, &record.body),
                _ => drop(epoch.take(&header, &record.body)?),
            }
        }
        Err("no COMMIT came".into())
    }

    #[test]
    fn what_came_is_what_its_commit_lists() {
        let all = ended(|_| true, None).unwrap();
        assert_eq!((all.missing, all.doubtful), (None, false));
        assert_eq!(all.manifest.unwrap().images.len(), all.summaries.len());
        for (kind, is_doubtful) in [
            (RecordKind::Pack, false),
            (RecordKind::Index, false),
            (RecordKind::Head, false),
        ] {
            let less = ended(|record| record.kind != kind, None).unwrap();
            assert_eq!(
                (less.missing.map(|one| one.kind), less.doubtful),
                (Some(kind), is_doubtful)
            );
        }
        let is_final =
            |record: &RawRecord| record.kind == RecordKind::Plan && record.body[1] == PlanPart::Final.number();
        let less = ended(|record| !is_final(record), None).unwrap();
        assert_eq!(
            (less.missing.map(|one| one.kind), less.doubtful),
            (Some(RecordKind::Plan), true)
        );
        // What was planned completes it.
        assert_eq!(less.manifest.unwrap().images.len(), less.summaries.len());
        let index = RawArchive::read(GOLDEN)
            .records
            .into_iter()
            .find(|record| record.kind == RecordKind::Index);
        let more = index.map(|record| RawRecord {
            sequence: 1 << 20,
            ..record
        });
        assert!(ended(|_| true, more).is_err());
        assert!(ended(|record| record.kind != RecordKind::List, None).is_err());
    }
}
