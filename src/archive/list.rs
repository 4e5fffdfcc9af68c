//! LIST: what a COMMIT lists, split over as many records as it takes.

use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use std::collections::HashMap;

use super::commit::CommitLocation;
use super::limits::{
    IMAGES_MAX, OTHER_LANES_MAX, PAYLOAD_BYTES_MAX, RECORDS_MAX, TEXT_BYTES_MAX, TEXT_OVERHEAD, USES_MAX,
};
use super::manifest::{PlanPart, path, store_block};
use super::record::{Hash, LaneId, RecordKind, SEQUENCES, SoughtRecord};
use crate::codec::{
    CRITICAL, Decoded, Decoder, Malformed, next_entry, payload_body, payload_of, put_entry, put_string, put_varint,
    skip_entry,
};
use crate::numbers::{CommitNumber, StoreBlock};

/// The part of a LIST that holds records and what else is the same for all images.
pub const PART_RECORDS: u8 = 0;
/// The part of a LIST that holds images.
pub const PART_IMAGES: u8 = 1;

/// Bytes after which a writer begins another LIST.
const PAYLOAD_BYTES: usize = 2 << 20;

const TAG_RECORD: u8 = CRITICAL | 1;
const TAG_FORGOTTEN: u8 = CRITICAL | 2;
const TAG_DEAD: u8 = CRITICAL | 3;
const TAG_USES: u8 = 4;
const TAG_OTHER_LANE: u8 = 5;
const TAG_IMAGE: u8 = CRITICAL | 1;

const FLAG_CRITICAL: u8 = 1;
const FLAG_OTHER_LANE: u8 = 2;

/// Where a record is, and what it must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordLocation {
    /// What it holds.
    pub kind: RecordKind,
    /// The part of a PLAN; 0 for any other kind.
    pub part: u8,
    /// The lane that wrote it.
    pub lane: LaneId,
    /// Its number in that lane.
    pub sequence: u64,
    /// Where it begins, in bytes from the beginning of the file. A hint.
    pub offset: u64,
    /// Bytes, header included.
    pub length: u64,
    /// The first store address of a PACK, an INDEX and a PLAN of blocks, in the lane that lists it.
    pub first: StoreBlock,
    /// The blocks from there on that it is about.
    pub blocks: u32,
    /// BLAKE3 of its body, which is its identity.
    pub body_hash: Hash,
    /// BLAKE3 of a PACK's table; 0 for any other kind.
    pub table_hash: Hash,
}

impl RecordLocation {
    /// Returns what it is looked for by.
    pub fn sought(&self) -> SoughtRecord {
        SoughtRecord {
            kind: self.kind,
            offset: self.offset,
            length: self.length,
            body_hash: self.body_hash,
        }
    }

    /// Returns the store address after its last.
    pub fn end(&self) -> StoreBlock {
        self.first + self.blocks
    }
}

/// The last commit of another lane that a writer saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtherLane {
    /// The lane.
    pub lane: LaneId,
    /// The commit's number there.
    pub number: CommitNumber,
    /// Where its COMMIT is.
    pub location: CommitLocation,
}

/// What a commit lists beside its images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Listed {
    /// The records of its epoch but LISTs, COMMITs, TAIL and NOTE, and those of other lanes.
    pub records: Vec<RecordLocation>,
    /// Earlier commits whose images are no longer asked for, by the hashes of their COMMITs.
    pub forgotten: Vec<Hash>,
    /// Store addresses that no PACK need hold.
    pub dead: Vec<Range<StoreBlock>>,
    /// Store addresses that the commit's images refer to, ascending, or more.
    pub uses: Vec<Range<StoreBlock>>,
    /// Other lanes.
    pub other_lanes: Vec<OtherLane>,
}

/// An image in a commit, in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// Its number in the manifest.
    pub number: u32,
    /// The name it is called by.
    pub path: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Blocks that are neither holes nor zeros.
    pub data_blocks: u64,
    /// Blocks that this commit added to the store for it.
    pub new_blocks: u64,
    /// The digest of its content, as the format defines it.
    pub digest: Hash,
}

/// Returns images by the names they are called by; of several with one name, the first.
pub fn by_path(images: &[ImageSummary]) -> HashMap<&Path, &ImageSummary> {
    images.iter().rev().map(|image| (image.path.as_path(), image)).collect()
}

/// Returns images by their numbers in the manifest.
pub fn by_number(images: &[ImageSummary]) -> HashMap<u32, &ImageSummary> {
    images.iter().map(|image| (image.number, image)).collect()
}

/// Returns the bodies of the LISTs, each with its part. `lane` is the lane of the commit.
///
/// # Errors
/// Returns the error that zstd gave.
pub fn encode(listed: &Listed, images: &[ImageSummary], lane: LaneId) -> std::io::Result<Vec<(u8, Vec<u8>)>> {
    let mut records = Payloads::default();
    for record in &listed.records {
        records.push(TAG_RECORD, |fields| put_record(fields, record, lane));
    }
    for hash in &listed.forgotten {
        records.push(TAG_FORGOTTEN, |fields| fields.extend(hash));
    }
    for dead in &listed.dead {
        records.push(TAG_DEAD, |fields| {
            put_varint(fields, dead.start.0.into());
            put_varint(fields, (dead.end - dead.start).into());
        });
    }
    // An entry of a bearable size each, and ascending.
    let ascending = listed.uses.chunk_by(|one, next| one.end <= next.start);
    for uses in ascending.flat_map(|uses| uses.chunks(1 << 16)) {
        records.push(TAG_USES, |fields| {
            put_varint(fields, uses.len() as u64);
            let mut before = StoreBlock(0);
            for range in uses {
                put_varint(fields, (range.start - before).into());
                put_varint(fields, (range.end - range.start).into());
                before = range.end;
            }
        });
    }
    for other in &listed.other_lanes {
        records.push(TAG_OTHER_LANE, |fields| {
            fields.extend(other.lane.0);
            put_varint(fields, other.number.0.into());
            put_varint(fields, other.location.offset);
            put_varint(fields, other.location.length);
            fields.extend(other.location.body_hash);
        });
    }
    let mut summaries = Payloads::default();
    for image in images {
        summaries.push(TAG_IMAGE, |fields| {
            for number in [image.number.into(), image.size, image.data_blocks, image.new_blocks] {
                put_varint(fields, number);
            }
            fields.extend(image.digest);
            put_string(fields, image.path.as_os_str().as_bytes());
        });
    }
    let mut bodies = Vec::new();
    for (part, payloads) in [(PART_RECORDS, records), (PART_IMAGES, summaries)] {
        for payload in payloads.finish() {
            bodies.push((part, payload_body([part, 0, 0], &payload)?));
        }
    }
    Ok(bodies)
}

fn put_record(fields: &mut Vec<u8>, record: &RecordLocation, lane: LaneId) {
    let is_other = record.lane != lane;
    let flags = if record.kind.is_critical() { FLAG_CRITICAL } else { 0 } | if is_other { FLAG_OTHER_LANE } else { 0 };
    fields.extend([record.kind.number(), flags, record.part]);
    for number in [
        record.sequence,
        record.offset,
        record.length,
        record.first.0.into(),
        record.blocks.into(),
    ] {
        put_varint(fields, number);
    }
    fields.extend(record.body_hash);
    if record.kind == RecordKind::Pack {
        fields.extend(record.table_hash);
    }
    if is_other {
        fields.extend(record.lane.0);
    }
}

/// Entries put together to payloads of a bearable size.
#[derive(Default)]
struct Payloads {
    full: Vec<Vec<u8>>,
    current: Vec<u8>,
}

impl Payloads {
    fn push(&mut self, tag: u8, put: impl FnOnce(&mut Vec<u8>)) {
        put_entry(&mut self.current, tag, put);
        if self.current.len() >= PAYLOAD_BYTES {
            self.full.push(std::mem::take(&mut self.current));
        }
    }

    fn finish(mut self) -> Vec<Vec<u8>> {
        if !self.current.is_empty() {
            self.full.push(self.current);
        }
        self.full
    }
}

impl Listed {
    /// Checks that nothing lies behind the end of the lane's store.
    ///
    /// # Errors
    /// Says that something does.
    pub fn check_below(&self, store_end: StoreBlock) -> Decoded<()> {
        let placed = self.records.iter().filter(|record| record.kind.has_addresses());
        let mut ends = placed
            .map(RecordLocation::end)
            .chain(self.uses.iter().map(|range| range.end));
        if ends.any(|end| end > store_end) {
            return Err("a commit lists blocks beyond the end of its store".into());
        }
        Ok(())
    }

    /// Adds what another has.
    pub fn append(&mut self, other: &mut Self) {
        self.records.append(&mut other.records);
        self.forgotten.append(&mut other.forgotten);
        self.dead.append(&mut other.dead);
        self.uses.append(&mut other.uses);
        self.other_lanes.append(&mut other.other_lanes);
    }

    /// Adds what a LIST of records says. `lane` is the lane of the commit.
    ///
    /// # Errors
    /// Returns what is malformed, or exceeds a limit.
    pub fn add(&mut self, body: &[u8], lane: LaneId) -> Decoded<()> {
        let payload = payload_part(body, PART_RECORDS)?;
        let mut decoder = Decoder::new(&payload);
        while let Some((tag, mut fields)) = next_entry(&mut decoder)? {
            match tag {
                TAG_RECORD => self.records.push(record(&mut fields, lane)?),
                TAG_FORGOTTEN => self.forgotten.push(fields.array()?),
                TAG_DEAD => {
                    let (first, blocks) = (store_block(fields.varint()?)?, fields.varint32()?);
                    self.dead.push(first..end_of(first, blocks)?);
                }
                TAG_USES => self.add_uses(&mut fields)?,
                TAG_OTHER_LANE => self.other_lanes.push(OtherLane {
                    lane: LaneId(fields.array()?),
                    number: CommitNumber(fields.varint32()?),
                    location: CommitLocation {
                        offset: fields.varint()?,
                        length: fields.varint()?,
                        body_hash: fields.array()?,
                    },
                }),
                tag => skip_entry(tag)?,
            }
            let lengths = [self.records.len(), self.forgotten.len(), self.dead.len()];
            if lengths.into_iter().any(|length| length > RECORDS_MAX)
                || self.uses.len() > USES_MAX
                || self.other_lanes.len() > OTHER_LANES_MAX
            {
                return Err("it lists more than allowed".into());
            }
        }
        Ok(())
    }

    fn add_uses(&mut self, fields: &mut Decoder<'_>) -> Decoded<()> {
        let mut end = StoreBlock(0);
        for _ in 0..fields.count(2)? {
            let first = end_of(end, fields.varint32()?)?;
            end = end_of(first, fields.varint32()?)?;
            self.uses.push(first..end);
        }
        Ok(())
    }
}

fn end_of(first: StoreBlock, blocks: u32) -> Decoded<StoreBlock> {
    first
        .checked_add(blocks)
        .filter(|end| *end <= StoreBlock::END_MAX)
        .ok_or_else(|| "a range lies beyond the largest store".into())
}

fn payload_part(body: &[u8], wanted: u8) -> Decoded<Vec<u8>> {
    match payload_of(body, PAYLOAD_BYTES_MAX)? {
        ([part, 0, 0], payload) if part == wanted => Ok(payload),
        _ => Err("a LIST is of another part than its COMMIT says".into()),
    }
}

fn record(fields: &mut Decoder<'_>, lane: LaneId) -> Decoded<RecordLocation> {
    let (kind, flags, part) = (RecordKind::of(fields.u8()?), fields.u8()?, fields.u8()?);
    check_kind(kind, flags, part)?;
    let mut location = RecordLocation {
        kind,
        part,
        lane,
        sequence: fields.varint()?,
        offset: fields.varint()?,
        length: fields.varint()?,
        first: store_block(fields.varint()?)?,
        blocks: fields.varint32()?,
        body_hash: fields.array()?,
        table_hash: [0; 32],
    };
    end_of(location.first, location.blocks)?;
    if location.sequence >= SEQUENCES {
        return Err("a record has a number larger than allowed".into());
    }
    if location.offset.checked_add(location.length).is_none() {
        return Err("a record lies beyond the archive's end".into());
    }
    if kind == RecordKind::Pack {
        location.table_hash = fields.array()?;
    }
    if flags & FLAG_OTHER_LANE != 0 {
        location.lane = LaneId(fields.array()?);
        if location.lane == lane || !kind.has_addresses() {
            return Err("a record of another lane is none".into());
        }
    }
    Ok(location)
}

/// Checks whether a COMMIT may list a record of a kind with such flags, as a part of a PLAN.
fn check_kind(kind: RecordKind, flags: u8, part: u8) -> Decoded<()> {
    let is_critical = flags & FLAG_CRITICAL != 0;
    if matches!(kind, RecordKind::Other(_)) && is_critical {
        return Err(Malformed::Unsupported(
            "it has records of a kind that this version does not know",
        ));
    }
    if flags & !(FLAG_CRITICAL | FLAG_OTHER_LANE) != 0 {
        return Err(Malformed::Unsupported(
            "it has records with flags that this version does not know",
        ));
    }
    if kind == RecordKind::Plan {
        PlanPart::of(part)?;
    }
    let is_named_elsewhere = matches!(
        kind,
        RecordKind::Commit | RecordKind::Tail | RecordKind::Note | RecordKind::List
    );
    if is_named_elsewhere || is_critical != kind.is_critical() || (part != 0 && kind != RecordKind::Plan) {
        return Err("a LIST names a record that it should not, or not as it should".into());
    }
    Ok(())
}

/// Adds what a LIST has, whatever its part. Returns the part.
///
/// # Errors
/// Returns what is malformed, or exceeds a limit.
pub fn add_any(listed: &mut Listed, images: &mut Vec<ImageSummary>, body: &[u8], lane: LaneId) -> Decoded<u8> {
    match body.get(1) {
        Some(&PART_RECORDS) => listed.add(body, lane).map(|()| PART_RECORDS),
        Some(&PART_IMAGES) => add_images(images, body).map(|()| PART_IMAGES),
        _ => Err(Malformed::Unsupported("it has LISTs that this version does not know")),
    }
}

/// Adds the images that a LIST of images has.
///
/// # Errors
/// Returns what is malformed, or exceeds a limit.
pub fn add_images(images: &mut Vec<ImageSummary>, body: &[u8]) -> Decoded<()> {
    let payload = payload_part(body, PART_IMAGES)?;
    let text_of = |image: &ImageSummary| image.path.as_os_str().len() + TEXT_OVERHEAD;
    let mut text_bytes: usize = images.iter().map(text_of).sum();
    let mut decoder = Decoder::new(&payload);
    while let Some((tag, mut fields)) = next_entry(&mut decoder)? {
        if tag != TAG_IMAGE {
            skip_entry(tag)?;
            continue;
        }
        text_bytes += images.last().map_or(0, text_of);
        if images.len() >= IMAGES_MAX || text_bytes > TEXT_BYTES_MAX {
            return Err("it has more images than allowed".into());
        }
        images.push(ImageSummary {
            number: fields.varint32()?,
            size: fields.varint()?,
            data_blocks: fields.varint()?,
            new_blocks: fields.varint()?,
            digest: fields.array()?,
            path: path(&mut fields)?,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LANE: LaneId = LaneId([1; 16]);

    fn decoded(bodies: &[(u8, Vec<u8>)]) -> (Listed, Vec<ImageSummary>) {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        for (part, body) in bodies {
            match *part {
                PART_RECORDS => listed.add(body, LANE).unwrap(),
                _ => add_images(&mut images, body).unwrap(),
            }
        }
        (listed, images)
    }

    proptest! {
        #[test]
        fn lists_come_back(
            records in prop::collection::vec(any::<(u8, u64, u32, bool)>(), 0..20),
            paths in prop::collection::vec("[a-z]{1,9}(/[a-z]{1,9})?", 0..5),
            uses in prop::collection::vec((0u32..1000, 1u32..1000), 0..20),
        ) {
            let records = records.into_iter().map(|(kind, number, blocks, is_other)| {
                let kinds = [RecordKind::Head, RecordKind::Plan, RecordKind::Pack, RecordKind::Index, RecordKind::Other(99)];
                let kind = kinds[usize::from(kind) % kinds.len()];
                RecordLocation {
                    kind,
                    part: u8::from(kind == RecordKind::Plan),
                    lane: if is_other && kind.has_addresses() { LaneId([2; 16]) } else { LANE },
                    sequence: number / 2,
                    offset: number / 2,
                    length: 100,
                    first: StoreBlock(7),
                    blocks: blocks / 2,
                    body_hash: [3; 32],
                    table_hash: if kind == RecordKind::Pack { [4; 32] } else { [0; 32] },
                }
            });
            let mut end = StoreBlock(0);
            let uses = uses.into_iter().map(|(gap, blocks)| {
                let first = end + gap;
                end = first + blocks;
                first..end
            });
            let listed = Listed {
                records: records.collect(),
                forgotten: vec![[5; 32]],
                dead: vec![StoreBlock(3)..StoreBlock(9)],
                uses: uses.collect(),
                other_lanes: vec![OtherLane { lane: LaneId([2; 16]), number: CommitNumber(4), location: CommitLocation::default() }],
            };
            let images: Vec<ImageSummary> = paths.iter().map(|path| ImageSummary {
                number: 8, path: path.into(), size: 5, data_blocks: 4, new_blocks: 3, digest: [9; 32],
            }).collect();
            prop_assert_eq!(decoded(&encode(&listed, &images, LANE).unwrap()), (listed, images));
        }

        #[test]
        fn nothing_is_too_strange(body: Vec<u8>, payload: Vec<u8>) {
            for body in [body, payload_body([0; 3], &payload).unwrap(), payload_body([1, 0, 0], &payload).unwrap()] {
                let _ = Listed::default().add(&body, LANE);
                let _ = add_images(&mut Vec::new(), &body);
            }
        }
    }

    /// They shrink by more than any ratio that one would believe.
    #[test]
    fn very_many_images_that_are_alike_can_be_read() {
        let image = |n: u32| ImageSummary {
            number: n,
            path: format!("machine/private.img.{n}@2026-01-01T00:00:00Z").into(),
            size: 4096,
            data_blocks: 1,
            new_blocks: 0,
            digest: [7; 32],
        };
        let images: Vec<_> = (0..100_000).map(image).collect();
        let bodies = encode(&Listed::default(), &images, LANE).unwrap();
        assert!(bodies.len() > 2);
        assert_eq!(decoded(&bodies).1, images);
    }

    #[test]
    fn a_critical_record_that_is_not_known_is_refused() {
        let mut record = RecordLocation {
            kind: RecordKind::Other(99),
            part: 0,
            lane: LANE,
            sequence: 1,
            offset: 0,
            length: 96,
            first: StoreBlock(0),
            blocks: 0,
            body_hash: [0; 32],
            table_hash: [0; 32],
        };
        let mut fields = Vec::new();
        put_record(&mut fields, &record, LANE);
        let read = |fields: &[u8]| super::record(&mut Decoder::new(fields), LANE);
        assert_eq!(read(&fields), Ok(record));
        fields[1] = FLAG_CRITICAL;
        assert!(matches!(read(&fields), Err(Malformed::Unsupported(_))));
        fields[1] = 4;
        assert!(matches!(read(&fields), Err(Malformed::Unsupported(_))));
        record.offset = u64::MAX - 5;
        let mut fields = Vec::new();
        put_record(&mut fields, &record, LANE);
        assert!(read(&fields).is_err());
    }
}
