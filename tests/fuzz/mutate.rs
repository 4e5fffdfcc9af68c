// Changes archives below their hashes: what a hostile writer could write, with hashes that are right from each frame to the COMMIT. What
// is changed is what stands in bodies once they are decompressed, and which records there are.

use std::collections::HashMap;
use std::sync::Arc;

use vmfold::archive::commit::{Commit, CommitLocation, encode_tail};
use vmfold::archive::list::{self, ImageSummary, Listed, RecordLocation};
use vmfold::archive::pack::{self, Frame, PlacedFrame};
use vmfold::archive::reader::Archive;
use vmfold::archive::record::{BlockHasher, EpochId, HEADER_BYTES, Hash, LaneId, RecordHeader, RecordKind, hash_of};
use vmfold::archive::seal::{KeySlot, Seal};
use vmfold::block::BLOCK_LEN;
use vmfold::codec::{Decoder, payload_body, payload_of, put_varint};
use vmfold::exec::hashes::digest;
use vmfold::monitor::Silent;
use vmfold::numbers::StoreBlock;
use vmfold::range;
use vmfold::spill::Budget;
use vmfold::store::MemoryStore;
use vmfold::testing::raw_archive::{RawArchive, RawRecord};

use crate::common::Random;

/// Numbers that decoders must not believe.
const HOSTILE: [u64; 16] = [
    0,
    1,
    2,
    3,
    0x7f,
    0x80,
    0xffff,
    0x7fff_ffff,
    0xffff_fffd,
    0xffff_fffe,
    0xffff_ffff,
    1 << 32,
    1 << 44,
    u64::MAX / 2,
    u64::MAX - 1,
    u64::MAX,
];

/// Bytes of a COMMIT before its payload.
const COMMIT_CLEAR: usize = 104;
/// Bytes of a payload before what it holds.
const PAYLOAD_FIXED: usize = 8;
/// Bytes that a mutated payload may grow to.
const PLAIN_MAX: usize = 4 << 20;

fn below(random: &mut Random, limit: usize) -> usize {
    usize::try_from(random.below(limit.max(1) as u64)).unwrap()
}

fn pick<'a, T>(items: &'a [T], random: &mut Random) -> Option<&'a T> {
    items.get(below(random, items.len()))
}

fn number(random: &mut Random) -> u64 {
    match random.below(3) {
        0 => random.below(300),
        _ => HOSTILE[below(random, HOSTILE.len())],
    }
}

/// A number near another, or any.
fn instead_of(old: u64, random: &mut Random) -> u64 {
    match random.below(4) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old.wrapping_add(random.below(64)).wrapping_sub(32),
        _ => number(random),
    }
}

/// Changes bytes wherever they stand.
pub(crate) fn change_bytes(bytes: &mut [u8], random: &mut Random) {
    if bytes.len() < 16 {
        for byte in bytes {
            *byte ^= (random.next() & 0xff) as u8;
        }
        return;
    }
    let at = below(random, bytes.len() - 8);
    match random.below(6) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = (random.next() & 0xff) as u8,
        2 => bytes[at..at + 8].copy_from_slice(&number(random).to_le_bytes()),
        3 => bytes[at..at + 4].copy_from_slice(&number(random).to_le_bytes()[..4]),
        4 => {
            let length = 64.min(bytes.len() / 2);
            let from = below(random, bytes.len() - length);
            let piece = bytes[from..from + length].to_vec();
            let end = (at + length).min(bytes.len());
            bytes[at..end].copy_from_slice(&piece[..end - at]);
        }
        _ => bytes[at] = 0xff,
    }
}

/// Replaces the varint at a place, whatever stands there, and may make the bytes longer or shorter.
fn change_varint(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let at = below(random, bytes.len());
    let mut decoder = Decoder::new(&bytes[at..]);
    let Ok(old) = decoder.varint() else {
        return change_bytes(bytes, random);
    };
    let length = bytes.len() - at - decoder.left();
    let mut new = Vec::new();
    put_varint(&mut new, instead_of(old, random));
    bytes.splice(at..at + length, new);
}

fn change_fields(bytes: &mut Vec<u8>, random: &mut Random) {
    match random.below(8) {
        0..4 => change_varint(bytes, random),
        4..6 => change_bytes(bytes, random),
        6 => bytes.truncate(below(random, bytes.len())),
        _ => {
            let at = below(random, bytes.len() + 1);
            let length = below(random, bytes.len() + 1 - at);
            let piece = bytes[at..at + length].to_vec();
            bytes.splice(at..at, piece);
        }
    }
}

/// Changes what stands between a fixed part and the end: entries of a tag, a length and so many bytes, if it can be told apart.
fn change_entries(plain: &mut Vec<u8>, fixed: usize, random: &mut Random) {
    let mut entries: Vec<(u8, Vec<u8>)> = Vec::new();
    let mut decoder = Decoder::new(plain.get(fixed..).unwrap_or_default());
    while decoder.left() > 0 {
        let (Ok(tag), Ok(fields)) = (decoder.u8(), decoder.string(usize::MAX)) else {
            return change_fields(plain, random);
        };
        entries.push((tag, fields.to_vec()));
    }
    if entries.is_empty() {
        return change_fields(plain, random);
    }
    let at = below(random, entries.len());
    let (mut wrong_length, other) = (0, below(random, entries.len()));
    match random.below(12) {
        0 => drop(entries.remove(at)),
        1 => entries.insert(other, entries[at].clone()),
        2 => entries.swap(at, other),
        3 => entries[at].0 = (random.next() & 0xff) as u8,
        4 => entries[at].0 ^= 0x80,
        5 => {
            let fields = entries[other].1.clone();
            entries[at].1 = fields;
        }
        6 => wrong_length = 1 + random.below(9),
        _ => change_fields(&mut entries[at].1, random),
    }
    plain.truncate(fixed);
    for (place, (tag, fields)) in entries.iter().enumerate() {
        plain.push(*tag);
        let extra = if place == at { wrong_length } else { 0 };
        put_varint(plain, fields.len() as u64 + extra);
        plain.extend(fields);
    }
}

/// Changes the payload that begins at a place of a body.
fn change_payload(body: &mut Vec<u8>, from: usize, fixed: usize, random: &mut Random) {
    if body.len() < from + PAYLOAD_FIXED || random.below(12) == 0 {
        return change_bytes(body, random);
    }
    let Ok((mut kind, mut plain)) = payload_of(&body[from..], PLAIN_MAX) else {
        return change_bytes(body, random);
    };
    match random.below(16) {
        0 => kind[below(random, 3)] = (random.next() & 3) as u8,
        1 if fixed > 0 && plain.len() >= fixed => change_bytes(&mut plain[..fixed], random),
        2 | 3 => change_fields(&mut plain, random),
        _ => change_entries(&mut plain, fixed, random),
    }
    body.truncate(from);
    if random.below(2) == 0 {
        body.extend(payload_body(kind, &plain).unwrap());
    } else {
        body.push(0);
        body.extend(kind);
        body.extend(u32::try_from(plain.len()).unwrap().to_le_bytes());
        body.extend(plain);
    }
}

/// Changes the body of a record, below its compression where it has one.
pub(crate) fn change_body(kind: RecordKind, body: &mut Vec<u8>, random: &mut Random) {
    match kind {
        RecordKind::Plan => change_payload(body, 0, 4, random),
        RecordKind::List => change_payload(body, 0, 0, random),
        RecordKind::Commit if body.len() > COMMIT_CLEAR && random.below(2) == 0 => {
            let mut clear = body[..COMMIT_CLEAR].to_vec();
            // Each of these begins a field.
            let field = [0, 8, 16, 20, 24, 32, 40, 72, 76, 80, 96];
            let at = *pick(&field, random).unwrap();
            let old = u64::from(u32::from_le_bytes(clear[at..at + 4].try_into().unwrap()));
            let bytes = if matches!(at, 16 | 20 | 72 | 76) { 4 } else { 8 };
            clear[at..at + bytes].copy_from_slice(&instead_of(old, random).to_le_bytes()[..bytes]);
            body[..COMMIT_CLEAR].copy_from_slice(&clear);
        }
        RecordKind::Commit => change_payload(body, COMMIT_CLEAR, 0, random),
        RecordKind::Pack => change_pack(body, random),
        _ if random.below(8) == 0 => body.truncate(below(random, body.len())),
        _ => change_bytes(body, random),
    }
}

/// The frames of a PACK with what they hold.
fn frames_of(body: &[u8]) -> Option<Vec<(StoreBlock, Vec<u8>)>> {
    let table = pack::decode_table(body, body.len() as u64, None).ok()?;
    let frames = table.frames.iter();
    frames
        .map(|frame| Some((frame.first, frame.decode(frame.slice(body).ok()?).ok()?)))
        .collect()
}

fn pack_of(frames: &[(StoreBlock, Vec<u8>)]) -> Vec<u8> {
    let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
    let placed = frames.iter().map(|(first, plain)| PlacedFrame {
        first: *first,
        frame: Frame::compress(plain, &mut compressor).unwrap(),
    });
    pack::encode(&placed.collect::<Vec<_>>()).0
}

/// A PACK of the first block of another, with other content.
pub(crate) fn with_first_block_changed(body: &[u8]) -> Vec<u8> {
    let (first, plain) = frames_of(body).unwrap().remove(0);
    let changed: Vec<u8> = plain[..BLOCK_LEN].iter().map(|byte| byte ^ 1).collect();
    pack_of(&[(first, changed)])
}

/// A PACK of the same addresses with other content.
pub(crate) fn with_content_changed(body: &[u8]) -> Vec<u8> {
    let mut frames = frames_of(body).unwrap();
    for (_, plain) in &mut frames {
        for byte in plain.iter_mut() {
            *byte ^= 1;
        }
    }
    pack_of(&frames)
}

/// A PACK whose blocks stand elsewhere.
pub(crate) fn with_home(body: &[u8], home: StoreBlock) -> Vec<u8> {
    let mut body = body.to_vec();
    body[..8].copy_from_slice(&u64::from(home.0).to_le_bytes());
    body
}

fn change_pack(body: &mut Vec<u8>, random: &mut Random) {
    const LINE: usize = 48;
    let table = pack::table_bytes(body).unwrap_or(0);
    if table == 0 || table > body.len() || random.below(10) == 0 {
        return change_bytes(body, random);
    }
    if random.below(3) == 0 {
        let line = 16 + below(random, (table - 16) / LINE) * LINE;
        let (at, bytes) = *pick(
            &[
                (0, 8),
                (8, 4),
                (12, 4),
                (line, 4),
                (line + 4, 4),
                (line + 8, 2),
                (line + 10, 1),
                (line + 11, 4),
            ],
            random,
        )
        .unwrap();
        let old = u64::from(body[at]);
        body[at..at + bytes].copy_from_slice(&instead_of(old, random).to_le_bytes()[..bytes]);
        return;
    }
    let Some(mut frames) = frames_of(body) else {
        return change_bytes(body, random);
    };
    let at = below(random, frames.len());
    let mut padding = 0;
    match random.below(7) {
        0 => {
            let plain = &mut frames[at].1;
            let block = below(random, plain.len() / BLOCK_LEN) * BLOCK_LEN;
            change_bytes(&mut plain[block..block + BLOCK_LEN], random);
        }
        1 if frames.len() > 1 => drop(frames.remove(at)),
        2 => {
            let more = u32::try_from(random.below(4)).unwrap();
            frames[at..]
                .iter_mut()
                .for_each(|(first, _)| *first = first.saturating_add(more));
        }
        3 => {
            let less = u32::try_from(random.below(40)).unwrap();
            frames[at..]
                .iter_mut()
                .for_each(|(first, _)| *first = StoreBlock(first.0.saturating_sub(less)));
        }
        4 => {
            let plain = frames[at].1.clone();
            let end = frames
                .last()
                .map_or(StoreBlock(0), |(first, plain)| end_of(*first, plain));
            frames.push((end, plain));
        }
        5 => {
            let kept = below(random, frames[at].1.len() / BLOCK_LEN);
            frames[at].1.truncate(kept.max(1) * BLOCK_LEN);
        }
        _ => padding = 1 + below(random, 5000),
    }
    // A pack whose frames lie in each other cannot be made.
    if frames.iter().is_sorted_by(|one, next| end_of(one.0, &one.1) <= next.0) {
        *body = pack_of(&frames);
        let byte = u8::from(random.below(4) == 0);
        body.resize(body.len() + padding, byte);
    }
}

fn end_of(first: StoreBlock, plain: &[u8]) -> StoreBlock {
    first.saturating_add(u32::try_from(plain.len() / BLOCK_LEN).unwrap())
}

/// Changes what a LIST lists, entry by entry.
fn change_list(archive: &mut RawArchive, random: &mut Random) {
    let places: Vec<usize> = places_of(archive, RecordKind::List);
    let (Some(&place), Some(&other)) = (pick(&places, random), pick(&places, random)) else {
        return;
    };
    let (mut listed, mut images) = (Listed::default(), Vec::new());
    let record = archive.records[place].clone();
    let Ok(part) = list::add_any(&mut listed, &mut images, &record.body, record.lane) else {
        return;
    };
    if part == list::PART_RECORDS {
        change_listed(&mut listed, random);
        // An entry of another LIST, of another epoch or lane maybe.
        let (mut from, source) = (Listed::default(), archive.records[other].clone());
        if random.below(4) == 0
            && list::add_any(&mut from, &mut Vec::new(), &source.body, source.lane).is_ok()
            && let Some(entry) = pick(&from.records, random)
        {
            let at = below(random, listed.records.len() + 1);
            listed.records.insert(at, *entry);
        }
    } else if !images.is_empty() {
        change_images(&mut images, random);
    }
    if let Some((_, body)) = list::encode(&listed, &images, record.lane)
        .unwrap_or_default()
        .into_iter()
        .next()
    {
        replace_copies(archive, place, &body);
    }
}

fn change_images(images: &mut Vec<ImageSummary>, random: &mut Random) {
    let (at, other) = (below(random, images.len()), below(random, images.len()));
    match random.below(7) {
        0 => drop(images.remove(at)),
        1 => images.push(images[at].clone()),
        2 => images[at].path = images[other].path.clone(),
        3 => images[at].digest = images[other].digest,
        4 => images[at].size = instead_of(images[at].size, random),
        5 => images[at].number = u32::try_from(instead_of(images[at].number.into(), random) & 0xffff_ffff).unwrap(),
        _ => images[at].data_blocks = number(random),
    }
}

fn change_listed(listed: &mut Listed, random: &mut Random) {
    let small = |random: &mut Random| u32::try_from(random.below(600)).unwrap();
    let records = &mut listed.records;
    if records.is_empty() {
        return;
    }
    let (at, other) = (below(random, records.len()), below(random, records.len()));
    match random.below(16) {
        0 => drop(records.remove(at)),
        1 => records.push(records[at]),
        2 => records.swap(at, other),
        3 => shift(&mut records[at], random),
        4 => records[at].first = StoreBlock(small(random)),
        5 => records[at].blocks = small(random),
        6 => records[at].part = (random.next() & 3) as u8,
        7 => records[at].sequence = instead_of(records[at].sequence, random) % (1 << 62),
        8 => records[at].kind = records[other].kind,
        9 => (records[at].sequence, records[at].lane) = (records[other].sequence, records[other].lane),
        10 => {
            // One that lies on another: a pack of the same addresses.
            (records[at].first, records[at].blocks) = (records[other].first, records[other].blocks);
        }
        11 => {
            let first = StoreBlock(small(random));
            listed.dead.push(first..first.saturating_add(small(random)));
        }
        12 => listed.uses.clear(),
        13 => listed.uses = vec![StoreBlock(0)..StoreBlock(small(random))],
        14 => listed.forgotten.push(records[at].body_hash),
        _ => listed.other_lanes.clear(),
    }
}

fn shift(record: &mut RecordLocation, random: &mut Random) {
    let by = u32::try_from(1 + random.below(20)).unwrap();
    record.first = if random.below(2) == 0 {
        record.first.saturating_add(by)
    } else {
        StoreBlock(record.first.0.saturating_sub(by))
    };
}

fn places_of(archive: &RawArchive, kind: RecordKind) -> Vec<usize> {
    let records = archive.records.iter().enumerate();
    records
        .filter(|(_, one)| one.kind == kind)
        .map(|(place, _)| place)
        .collect()
}

/// Gives a record another body, and its copies too.
fn replace_copies(archive: &mut RawArchive, place: usize, body: &[u8]) {
    let old = archive.records[place].clone();
    for record in &mut archive.records {
        if (record.kind, &record.body) == (old.kind, &old.body) {
            record.body = body.to_vec();
        }
    }
}

/// Drops, doubles, swaps or moves whole records, also to another epoch, lane or archive.
fn change_records(archive: &mut RawArchive, others: &[RawArchive], random: &mut Random) {
    let records = &mut archive.records;
    let (at, other) = (below(random, records.len()), below(random, records.len()));
    match random.below(12) {
        0 => drop(records.remove(at)),
        1 => records.insert(other, records[at].clone()),
        2 => records.swap(at, other),
        3 => {
            let record = records.remove(at);
            let to = below(random, records.len() + 1);
            records.insert(to, record);
        }
        4 => records[at].epoch = records[other].epoch,
        5 => records[at].lane = records[other].lane,
        6 => records[at].sequence = instead_of(records[at].sequence, random) % (1 << 62),
        7 => records[at].kind = records[other].kind,
        8 => (records[at].sequence, records[other].sequence) = (records[other].sequence, records[at].sequence),
        9 => records[at].lane = LaneId([(random.next() & 3) as u8; 16]),
        10 => records[at].epoch = EpochId(random.next()),
        _ => {
            let strange = pick(others, random).and_then(|archive| pick(&archive.records, random));
            if let Some(strange) = strange.cloned() {
                let own = records[at].clone();
                let (lane, epoch) = (own.lane, own.epoch);
                records.insert(other, RawRecord { lane, epoch, ..strange });
            }
        }
    }
}

/// Puts blocks of one epoch's PACK at the addresses of another's, and lists it there.
fn overlay(archive: &mut RawArchive, random: &mut Random) {
    let packs = places_of(archive, RecordKind::Pack);
    let (Some(&place), Some(&other)) = (pick(&packs, random), pick(&packs, random)) else {
        return;
    };
    let (Some(mut frames), Some(onto)) = (
        frames_of(&archive.records[place].body),
        frames_of(&archive.records[other].body),
    ) else {
        return;
    };
    let (first, plain) = &onto[below(random, onto.len())];
    let target = StoreBlock(first.0 + u32::try_from(below(random, plain.len() / BLOCK_LEN)).unwrap());
    let start = frames[0].0;
    for (first, _) in &mut frames {
        *first = target.saturating_add(*first - start);
    }
    let Some(last) = frames.last().map(|(first, plain)| end_of(*first, plain)) else {
        return;
    };
    let body = pack_of(&frames);
    let (lane, sequence) = (archive.records[place].lane, archive.records[place].sequence);
    archive.records[place].body = body;
    change_entry(archive, (lane, sequence), |entry| {
        (entry.first, entry.blocks) = (target, last - target);
    });
}

/// Changes the entry of a record in every LIST.
fn change_entry(archive: &mut RawArchive, record: (LaneId, u64), change: impl Fn(&mut RecordLocation)) {
    for list in archive.records.iter_mut().filter(|one| one.kind == RecordKind::List) {
        let mut listed = Listed::default();
        if listed.add(&list.body, list.lane).is_err() {
            continue;
        }
        let entries = listed.records.iter_mut();
        entries
            .filter(|entry| (entry.lane, entry.sequence) == record)
            .for_each(&change);
        if let Some((_, body)) = list::encode(&listed, &[], list.lane)
            .unwrap_or_default()
            .into_iter()
            .next()
        {
            list.body = body;
        }
    }
}

/// Makes the digests of LISTs those of what the images hold, as far as that can be told: so that an archive that is not what it was is
/// taken for intact.
pub(crate) fn with_right_digests(archive: &mut RawArchive) {
    let Ok(opened) = Archive::open_any(Arc::new(MemoryStore::of(archive.sealed()))) else {
        return;
    };
    let mut right: HashMap<(LaneId, EpochId), Vec<ImageSummary>> = HashMap::new();
    for committed in opened.commits() {
        let Ok((manifest, _)) = opened.manifest(committed, &Budget::default()) else {
            continue;
        };
        let mut hashes: HashMap<StoreBlock, Hash> = HashMap::new();
        for pack in opened.packs(committed, StoreBlock(0)..StoreBlock::END_MAX) {
            for located in opened.frames(&pack.location).unwrap_or_default() {
                let content = opened.frame(&located).unwrap_or_default();
                for (block, content) in range::from(located.frame.first).zip(content.chunks_exact(BLOCK_LEN)) {
                    hashes.entry(block).or_insert_with(|| hash_of(content));
                }
            }
        }
        let monitor = Silent::default();
        let mut images = Vec::new();
        for image in manifest.images.iter().filter(|image| image.image.size < 1 << 30) {
            let found = digest(
                &image.runs,
                image.image.size,
                (&BlockHasher::default(), &monitor),
                |first, blocks, digest| {
                    for block in range::each(first..first.saturating_add(blocks)) {
                        digest.update(&[hashes.get(&block).copied().unwrap_or_default()])?;
                    }
                    Ok(())
                },
            );
            images.push(ImageSummary {
                number: image.image.number,
                path: image.image.path().to_owned(),
                size: image.image.size,
                data_blocks: 1,
                new_blocks: 1,
                digest: found.unwrap_or_default(),
            });
        }
        right.insert((committed.lane, committed.epoch), images);
    }
    for record in archive.records.iter_mut().filter(|one| one.kind == RecordKind::List) {
        let Some(images) = right
            .get(&(record.lane, record.epoch))
            .filter(|images| !images.is_empty())
        else {
            continue;
        };
        if record.body.get(1) == Some(&list::PART_IMAGES) {
            record.body = list::encode(&Listed::default(), images, record.lane)
                .unwrap()
                .remove(0)
                .1;
        }
    }
}

/// Changes COMMITs as they are decoded.
fn change_commits(archive: &mut RawArchive, random: &mut Random) {
    let places = places_of(archive, RecordKind::Commit);
    let (Some(&place), Some(&other)) = (pick(&places, random), pick(&places, random)) else {
        return;
    };
    let other = Commit::decode(&archive.records[other].body);
    let (Ok(mut commit), Ok(other)) = (Commit::decode(&archive.records[place].body), other) else {
        return;
    };
    match random.below(8) {
        0 => commit.number.0 = u32::try_from(instead_of(commit.number.0.into(), random) & 0xffff_ffff).unwrap(),
        1 => {
            commit.store_end =
                StoreBlock(u32::try_from(instead_of(commit.store_end.0.into(), random) & 0xffff_ffff).unwrap());
        }
        2 => commit.previous = other.previous,
        3 => commit.lists.extend(other.lists),
        4 if !commit.lists.is_empty() => drop(commit.lists.remove(below(random, commit.lists.len()))),
        5 => commit.lists.reverse(),
        6 => commit.features_append = random.below(2),
        _ => commit.label = "1".into(),
    }
    if let Ok(body) = commit.encode() {
        replace_copies(archive, place, &body);
    }
}

/// Changes an archive below its hashes, and makes them right.
pub(crate) fn sealed(base: &RawArchive, others: &[RawArchive], random: &mut Random) -> Vec<u8> {
    let mut archive = base.clone();
    for _ in 0..=random.below(3) {
        if archive.records.is_empty() {
            break;
        }
        match random.below(10) {
            0 | 1 => change_records(&mut archive, others, random),
            2 | 3 => change_list(&mut archive, random),
            4 => overlay(&mut archive, random),
            5 => change_commits(&mut archive, random),
            _ => {
                let place = below(random, archive.records.len());
                let mut body = archive.records[place].body.clone();
                change_body(archive.records[place].kind, &mut body, random);
                if random.below(5) == 0 {
                    archive.records[place].body = body;
                } else {
                    replace_copies(&mut archive, place, &body);
                }
            }
        }
    }
    archive.keeps_previous = random.below(6) == 0;
    if random.below(3) == 0 {
        with_right_digests(&mut archive);
    }
    if random.below(4) > 0 {
        return archive.sealed();
    }
    // At last, also what sealing makes right.
    let (kinds, seed) = (
        [RecordKind::List, RecordKind::Commit, RecordKind::Tail, RecordKind::Pack],
        random.next(),
    );
    let wanted = kinds[below(random, kinds.len())];
    archive.sealed_with(|kind, body| {
        let hash = hash_of(body);
        // Copies stay copies.
        let mut random = Random(seed ^ u64::from_le_bytes(hash[..8].try_into().unwrap()));
        if kind == wanted && random.below(2) == 0 {
            change_body(kind, body, &mut random);
        }
    })
}

/// Damages bytes, cuts the end off, or puts something in: hashes stay as they are.
pub(crate) fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    if bytes.len() < 200 {
        return;
    }
    match random.below(8) {
        0 => bytes.truncate(below(random, bytes.len())),
        1 => bytes.extend(vec![0; below(random, 3000)]),
        2 => {
            let at = below(random, bytes.len());
            let end = bytes.len().min(at + below(random, 3000));
            bytes[at..end].fill(0);
        }
        3 => {
            let at = below(random, bytes.len());
            let end = bytes.len().min(at + below(random, 3000));
            bytes.drain(at..end);
        }
        4 => {
            let (from, to) = (below(random, bytes.len()), below(random, bytes.len()));
            let piece = bytes[from..bytes.len().min(from + 3000)].to_vec();
            bytes.splice(to..to, piece);
        }
        _ => (0..=random.below(3)).for_each(|_| change_bytes(bytes, random)),
    }
}

/// Changes the records of an archive as they are stored, without a key, and makes the hashes of headers and bodies right again.
pub(crate) fn stored_records(bytes: &[u8], random: &mut Random) -> Vec<u8> {
    let mut records = take_apart(bytes);
    for _ in 0..=random.below(3) {
        change_stored(&mut records, random);
    }
    let leads_right = random.below(2) == 0;
    let (mut out, mut last) = (Vec::new(), CommitLocation::default());
    for (mut header, mut body) in records {
        if header.kind == RecordKind::Tail && leads_right {
            body = encode_tail(&last);
        }
        let kind = (header.kind, header.seal);
        let Ok(made) = RecordHeader::of_stored(kind, header.lane, header.epoch, header.sequence, &mut body) else {
            continue;
        };
        header = made;
        if header.kind == RecordKind::Commit {
            last = CommitLocation {
                offset: out.len() as u64,
                length: (HEADER_BYTES + body.len()) as u64,
                body_hash: header.body_hash,
            };
        }
        out.extend(header.encode());
        out.extend(body);
    }
    out
}

type Stored = (RecordHeader, Vec<u8>);

/// The records of an archive, their bodies without masks.
fn take_apart(bytes: &[u8]) -> Vec<Stored> {
    let (mut records, mut at) = (Vec::new(), 0);
    while let Some(header) = bytes[at..]
        .first_chunk()
        .and_then(|header| RecordHeader::decode(header).ok())
    {
        let start = at + HEADER_BYTES;
        at = start + usize::try_from(header.body_bytes).unwrap();
        let mut body = bytes[start..at].to_vec();
        header.apply_mask(0, &mut body);
        records.push((header, body));
    }
    records
}

fn change_stored(records: &mut Vec<Stored>, random: &mut Random) {
    let (one, other) = (below(random, records.len()), below(random, records.len()));
    // What opens an archive is small, and chance would rarely meet it.
    let opens = |(header, _): &Stored| matches!(header.kind, RecordKind::Key | RecordKind::Commit | RecordKind::Tail);
    let chosen: Vec<usize> = (0..records.len()).filter(|place| opens(&records[*place])).collect();
    let one = match pick(&chosen, random) {
        Some(place) if random.below(2) == 0 => *place,
        _ => one,
    };
    match random.below(9) {
        0 | 1 => change_bytes(&mut records[one].1, random),
        2 => drop(records.remove(one)),
        3 => records.insert(other, records[one].clone()),
        4 => records.swap(one, other),
        5 => {
            let body = records[other].1.clone();
            records[one].1 = body;
        }
        6 => records[one].0.epoch = records[other].0.epoch,
        7 => records[one].0.kind = records[other].0.kind,
        _ => {
            let header = &mut records[one].0;
            match random.below(4) {
                0 => header.seal = None,
                1 => header.seal = Some(Seal::with(KeySlot::Metadata)),
                2 => header.lane.0[0] ^= 1,
                _ => header.sequence = instead_of(header.sequence, random) >> 1,
            }
        }
    }
}
