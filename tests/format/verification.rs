// Goal: verification finds what is wrong though all hashes of records are right.

use vmfold::archive::commit::Commit;
use vmfold::archive::list::{self, ImageSummary, Listed, PART_RECORDS, RecordLocation};
use vmfold::archive::manifest::PlanPart;
use vmfold::archive::pack::{self, Frame, PlacedFrame};
use vmfold::archive::record::{EpochId, RecordKind};
use vmfold::numbers::{CommitNumber, StoreBlock};
use vmfold::testing::raw_archive::{RawArchive, RawRecord};
use vmfold::testing::simulated::{INCOMPRESSIBLE, block_of};

use crate::scene::{WAYS, check_bytes, is_intact, restore, two_commits, verify};

fn last_epoch(archive: &RawArchive) -> EpochId {
    archive.records.last().unwrap().epoch
}

fn in_last(archive: &mut RawArchive) -> impl Iterator<Item = &mut RawRecord> {
    let last = last_epoch(archive);
    archive.records.iter_mut().filter(move |record| record.epoch == last)
}

/// Changes what the last commit lists, in all copies.
fn change_lists(archive: &mut RawArchive, change: impl Fn(&mut Listed, &mut Vec<ImageSummary>)) {
    for record in in_last(archive).filter(|record| record.kind == RecordKind::List) {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        let part = list::add_any(&mut listed, &mut images, &record.body, record.lane).unwrap();
        change(&mut listed, &mut images);
        let bodies = list::encode(&listed, &images, record.lane).unwrap();
        record.body = bodies.into_iter().find(|(of, _)| *of == part).unwrap().1;
    }
}

/// Adds a PACK to the last epoch with other blocks at the first addresses of the store.
fn add_other_pack(archive: &mut RawArchive) {
    let plain: Vec<u8> = (0..4).flat_map(|n| block_of(INCOMPRESSIBLE + 70_000 + n)).collect();
    let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
    let placed = PlacedFrame {
        first: StoreBlock(0),
        frame: Frame::compress(&plain, &mut compressor).unwrap(),
    };
    let last = last_epoch(archive);
    let place = archive.records.iter().position(|record| record.epoch == last).unwrap() + 1;
    let more = RawRecord {
        kind: RecordKind::Pack,
        sequence: 1 << 20,
        body: pack::encode(&[placed]).0,
        ..archive.records[place].clone()
    };
    change_lists(archive, |listed, _| {
        if let Some(known) = listed.records.iter().find(|record| record.kind == RecordKind::Pack) {
            let location = RecordLocation {
                sequence: more.sequence,
                first: StoreBlock(0),
                blocks: 4,
                ..*known
            };
            listed.records.push(location);
        }
    });
    archive.records.insert(place, more);
}

/// Removes all INDEX records, and what COMMITs say of those.
fn remove_indexes(archive: &mut RawArchive) {
    archive.records.retain(|record| record.kind != RecordKind::Index);
    for record in &mut archive.records {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        if record.kind == RecordKind::List
            && list::add_any(&mut listed, &mut images, &record.body, record.lane) == Ok(PART_RECORDS)
        {
            listed.records.retain(|record| record.kind != RecordKind::Index);
            record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
        }
    }
}

/// A body that has the right hash and cannot be decoded.
fn spoil(archive: &mut RawArchive, kind: RecordKind, part: Option<PlanPart>) {
    for record in in_last(archive).filter(|record| record.kind == kind) {
        if part.is_none_or(|part| record.body[1] == part.number()) {
            let middle = record.body.len() / 2;
            record.body.truncate(middle);
        }
    }
}

fn change_digests(images: &mut [ImageSummary]) {
    for image in images {
        image.digest[0] ^= 1;
    }
}

type Change = fn(&mut RawArchive);

const CHANGES: [(&str, Change); 10] = [
    ("an INDEX that cannot be decoded", |archive| {
        spoil(archive, RecordKind::Index, None);
    }),
    ("planned images that cannot be decoded", |archive| {
        spoil(archive, RecordKind::Plan, Some(PlanPart::Planned));
    }),
    ("announced blocks that cannot be decoded", |archive| {
        spoil(archive, RecordKind::Plan, Some(PlanPart::Blocks));
    }),
    ("final images that cannot be decoded", |archive| {
        spoil(archive, RecordKind::Plan, Some(PlanPart::Final));
    }),
    ("PACKs that contradict each other", add_other_pack),
    ("PACKs that contradict each other, without INDEX", |archive| {
        add_other_pack(archive);
        remove_indexes(archive);
    }),
    ("another commit number", |archive| {
        archive.keeps_previous = true;
        for record in in_last(archive).filter(|record| record.kind == RecordKind::Commit) {
            let mut commit = Commit::decode(&record.body).unwrap();
            commit.number = CommitNumber(7);
            record.body = commit.encode().unwrap();
        }
    }),
    ("the number of the commit before", |archive| {
        archive.keeps_previous = true;
        for record in in_last(archive).filter(|record| record.kind == RecordKind::Commit) {
            let mut commit = Commit::decode(&record.body).unwrap();
            commit.number = CommitNumber(1);
            record.body = commit.encode().unwrap();
        }
    }),
    ("another digest", |archive| {
        change_lists(archive, |_, images| {
            change_digests(images);
        });
    }),
    ("another digest, without INDEX", |archive| {
        change_lists(archive, |_, images| {
            change_digests(images);
        });
        remove_indexes(archive);
    }),
];

#[test]
fn verification_finds_what_hashes_do_not_tell() {
    let (bytes, [first, second]) = two_commits();
    let golden = RawArchive::read(&bytes);
    assert!(is_intact(&verify(&golden.sealed()).unwrap()));
    for (case, change) in CHANGES {
        let mut archive = golden.clone();
        change(&mut archive);
        let bytes = archive.sealed();
        assert!(bytes != golden.sealed(), "{case}: nothing was changed");
        let verified = verify(&bytes).unwrap();
        assert!(!is_intact(&verified), "{case}: {verified:?}");
        // Nor is anything wrong restored.
        for (way, partial) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
            let mut restored = restore(&bytes, way, None, partial);
            // A commit that proves two contents of a block gives one of them where the digest cannot decide: in an image that is named as lost.
            restored
                .content
                .retain(|name, _| name.extension().is_some_and(|end| end == "img"));
            let is_first = restored.done.as_ref().is_ok_and(|done| done.id == first_id(&golden));
            let expected = if is_first { &first } else { &second };
            check_bytes(&restored, expected, &format!("{case}, {way:?}, partial {partial}"));
        }
    }
}

fn first_id(golden: &RawArchive) -> String {
    let store = vmfold::store::MemoryStore::of(golden.sealed());
    vmfold::archive::reader::Archive::open(std::sync::Arc::new(store))
        .unwrap()
        .commits()[0]
        .id()
}

/// Without any INDEX, an archive whose digests are right is intact.
#[test]
fn an_archive_without_index_is_verified_by_its_digests() {
    let (bytes, [_, expected]) = two_commits();
    let mut archive = RawArchive::read(&bytes);
    remove_indexes(&mut archive);
    let bytes = archive.sealed();
    assert!(is_intact(&verify(&bytes).unwrap()));
    for way in WAYS {
        let restored = restore(&bytes, way, None, false);
        assert!(restored.is_whole() && restored.content == expected, "{way:?}");
    }
}
