// Goal: a commit vouches for all that a reader uses.

use vmfold::archive::index;
use vmfold::archive::list::{self, Listed};
use vmfold::archive::pack::{self, Frame, PlacedFrame};
use vmfold::archive::reader::Archive;
use vmfold::archive::record::{HEADER_BYTES, RecordHeader, RecordKind, hash_of};
use vmfold::block::BLOCK_LEN;
use vmfold::error::Error;
use vmfold::numbers::StoreBlock;
use vmfold::store::MemoryStore;
use vmfold::testing::raw_archive::{RawArchive, RawRecord};
use vmfold::testing::simulated::{INCOMPRESSIBLE, block_of};

use crate::scene::{Placed, WAYS, Way, check_bytes, last_of, records, restore, two_commits, verify, with};

/// The body of a PACK that holds other blocks at the same addresses, with a table that fits them. It is as long as the genuine one.
fn forged_pack(genuine: &[u8], is_packed: bool) -> Vec<u8> {
    let table = pack::decode_table(genuine, genuine.len() as u64, None).unwrap();
    let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
    let content =
        |block: StoreBlock| block_of(if is_packed { 7 } else { INCOMPRESSIBLE } + 90_000 + u64::from(block.0));
    let frames = table.frames.iter().map(|frame| {
        let plain: Vec<u8> = (frame.first.0..frame.end().0)
            .flat_map(|block| content(StoreBlock(block)))
            .collect();
        PlacedFrame {
            first: frame.first,
            frame: Frame::compress(&plain, &mut compressor).unwrap(),
        }
    });
    let (mut body, _) = pack::encode(&frames.collect::<Vec<_>>());
    body.resize(body.len().max(genuine.len()), 0);
    body
}

/// The body of an INDEX that fits the blocks of a forged PACK.
fn forged_index(genuine: &[u8], pack: &[u8]) -> Vec<u8> {
    let (first, hashes) = index::decode(genuine).unwrap();
    let mut hashes = hashes.to_vec();
    let table = pack::decode_table(pack, pack.len() as u64, None).unwrap();
    for frame in table.frames {
        let plain = frame.decode(frame.slice(pack).unwrap()).unwrap();
        for (at, block) in ((frame.first - first) as usize..).zip(plain.chunks_exact(BLOCK_LEN)) {
            hashes[at] = hash_of(block);
        }
    }
    index::encode(first, &hashes)
}

/// The records of a forged PACK: with a header that is its own, and with one that says the genuine hash.
fn forged_records(pack: &Placed, body: Vec<u8>) -> [Vec<u8>; 2] {
    let claimed = RecordHeader {
        body_bytes: body.len() as u64,
        ..pack.header
    };
    let claims = [&claimed.encode()[..], &body].concat();
    [pack.with_body(body), claims]
}

/// What becomes of the INDEX beside a forged PACK.
const INDEX_CASES: [&str; 4] = ["whole", "spoiled", "missing", "forged"];

fn with_index(bytes: &[u8], index: &Placed, case: &str, pack: &[u8]) -> Vec<u8> {
    match case {
        "spoiled" => {
            let mut bytes = bytes.to_vec();
            bytes[index.range.start + HEADER_BYTES + 20] ^= 1;
            bytes
        }
        "missing" => with(bytes, index.range.clone(), &[]),
        "forged" => with(
            bytes,
            index.range.clone(),
            &index.with_body(forged_index(&index.body, pack)),
        ),
        _ => bytes.to_vec(),
    }
}

#[test]
fn a_forged_pack_under_a_genuine_commit_restores_nothing_else() {
    let (bytes, [_, expected]) = two_commits();
    let genuine = Archive::open(std::sync::Arc::new(MemoryStore::of(bytes.clone()))).unwrap();
    let id = genuine.commits()[1].id();
    let all = records(&bytes);
    let of_kind = |kind| all.iter().filter(move |record| record.header.kind == kind);
    let mut tried = 0;
    for (number, (pack, index)) in of_kind(RecordKind::Pack).zip(of_kind(RecordKind::Index)).enumerate() {
        for is_packed in [true, false] {
            let forged = forged_pack(&pack.body, is_packed);
            for (own, record) in forged_records(pack, forged.clone()).into_iter().enumerate() {
                for index_case in INDEX_CASES {
                    // What stands behind is changed first.
                    let bytes = with_index(&bytes, index, index_case, &forged);
                    let bytes = with(&bytes, pack.range.clone(), &record);
                    let opened = Archive::open(std::sync::Arc::new(MemoryStore::of(bytes.clone()))).unwrap();
                    assert_eq!(opened.commits()[1].id(), id);
                    let case = format!("PACK {number}, packed {is_packed}, header {own}, INDEX {index_case}");
                    for (way, partial) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
                        let case = format!("{case}, {way:?}, partial {partial}");
                        let restored = restore(&bytes, way, None, partial);
                        check_bytes(&restored, &expected, &case);
                        assert!(!restored.is_whole(), "{case}: nobody noticed");
                        tried += 1;
                    }
                    let verified = verify(&bytes).unwrap();
                    assert!(
                        !verified.damage.is_empty() && !verified.lost.is_empty(),
                        "{case}: {verified:?}"
                    );
                }
            }
        }
    }
    assert_eq!(tried, 2 * 2 * 2 * 4 * 4);
}

/// Without an INDEX, blocks are hashed as they are read: a COMMIT that lists another PACK with right hashes has digests that do not match.
#[test]
fn without_an_index_digests_are_checked() {
    let (bytes, [_, expected]) = two_commits();
    for (is_forged, is_listed) in [(false, false), (false, true), (true, false), (true, true)] {
        let mut archive = RawArchive::read(&bytes);
        let last = archive.records.last().unwrap().epoch;
        for record in archive.records.iter_mut().filter(|record| record.epoch == last) {
            match record.kind {
                RecordKind::Pack if is_forged => record.body = forged_pack(&record.body, false),
                RecordKind::List if !is_listed => without_index(record),
                _ => {}
            }
        }
        archive
            .records
            .retain(|record| is_listed || record.kind != RecordKind::Index || record.epoch != last);
        let mut bytes = archive.sealed();
        if is_listed {
            let index = last_of(&bytes, RecordKind::Index);
            bytes = with(&bytes, index.range, &[]);
        }
        let case = format!("forged {is_forged}, INDEX listed {is_listed}");
        for (way, partial) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
            let case = format!("{case}, {way:?}, partial {partial}");
            let restored = restore(&bytes, way, None, partial);
            check_bytes(&restored, &expected, &case);
            // A pipe that ends before what is listed came is damaged, unless what is intact is asked for.
            let may_be_whole = !is_forged && (way == Way::File || !is_listed || partial);
            assert_eq!(restored.is_whole(), may_be_whole, "{case}: {:?}", restored.done);
        }
        let verified = verify(&bytes).unwrap();
        assert_eq!(!verified.lost.is_empty(), is_forged, "{case}: {verified:?}");
        assert_eq!(!verified.damage.is_empty(), is_listed, "{case}: {verified:?}");
    }
}

fn without_index(record: &mut RawRecord) {
    let (mut listed, mut images) = (Listed::default(), Vec::new());
    if list::add_any(&mut listed, &mut images, &record.body, record.lane).unwrap() == list::PART_RECORDS {
        listed.records.retain(|record| record.kind != RecordKind::Index);
        record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
    }
}

/// A record that came and is not listed may have been used, and one that is listed and did not come may be needed.
#[test]
fn a_pipe_brings_what_its_commit_lists_and_nothing_else() {
    let (bytes, [_, expected]) = two_commits();
    let all = records(&bytes);
    let last = all.last().unwrap().header;
    let of_epoch = |kind| {
        let mut records = all.iter().filter(|record| record.header.epoch == last.epoch);
        records.find(|record| record.header.kind == kind).unwrap()
    };
    let mut cases: Vec<(String, Vec<u8>)> = Vec::new();
    let first_list = of_epoch(RecordKind::List);
    for kind in [RecordKind::Head, RecordKind::Plan, RecordKind::Pack, RecordKind::Index] {
        let record = of_epoch(kind);
        cases.push((format!("no {}", kind.name()), with(&bytes, record.range.clone(), &[])));
        // The same once more, with a number that no record has, before what is listed ends.
        let mut more = record.clone();
        more.header.sequence = last.sequence + 5;
        let more = more.with_body(record.body.clone());
        let at = first_list.range.start;
        cases.push((format!("one more {}", kind.name()), with(&bytes, at..at, &more)));
        let mut body = record.body.clone();
        *body.last_mut().unwrap() ^= 1;
        let changed = record.with_body(body);
        cases.push((
            format!("another {}", kind.name()),
            with(&bytes, record.range.clone(), &changed),
        ));
    }
    for (case, bytes) in &cases {
        let restored = restore(bytes, Way::Pipe, None, false);
        check_bytes(&restored, &expected, case);
        assert!(!restored.is_whole(), "{case}: nobody noticed");
        let partial = restore(bytes, Way::Pipe, None, true);
        check_bytes(&partial, &expected, case);
    }
}

/// What is damaged at the beginning of an epoch belongs to that epoch, and not to the one before it.
#[test]
fn an_epoch_whose_beginning_is_damaged_is_told_as_damage() {
    let (bytes, _) = two_commits();
    let last = last_of(&bytes, RecordKind::Head).header.epoch;
    for headers in [false, true] {
        let mut damaged = bytes.clone();
        for record in records(&bytes)
            .iter()
            .filter(|record| record.header.epoch == last)
            .take(2)
        {
            let at = record.range.start + if headers { 20 } else { HEADER_BYTES + 20 };
            damaged[at] ^= 1;
        }
        let restored = restore(&damaged, Way::Pipe, None, true);
        let is_told = match &restored.done {
            Ok(done) => done.later_damage || !done.lost.is_empty(),
            Err(error) => matches!(error, Error::Damaged { .. }),
        };
        assert!(is_told, "{headers}: {:?}", restored.done);
    }
}
