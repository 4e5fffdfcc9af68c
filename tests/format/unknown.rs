// Goal: what a reader must know and does not is refused, in whatever epoch it stands.

use vmfold::archive::commit::{Commit, CommitLocation, encode_tail};
use vmfold::archive::list::{self, Listed, PART_RECORDS, RecordLocation};
use vmfold::archive::record::{EpochId, HEADER_BYTES, RecordHeader, RecordKind, hash_of};
use vmfold::codec::{Decoder, next_entry, payload_body, payload_of, put_entry, put_varint};
use vmfold::error::Error;
use vmfold::ops::list::list as list_archive;
use vmfold::store::MemoryStore;
use vmfold::testing::raw_archive::{RawArchive, RawRecord};

use crate::scene::{Placed, Scene, WAYS, Way, last_of, records, restore, scratch, two_commits, verify, with};

/// Every verb must refuse it by the reason that it is not known, and appending must leave it as it is.
fn check_refused(case: &str, bytes: &[u8]) {
    let is_refused = |verb: &str, error: Option<Error>| {
        assert!(
            matches!(error, Some(Error::Unsupported { .. })),
            "{case}: {verb}: {error:?}"
        );
    };
    let folder = scratch();
    let path = folder.path().join("a.vmfold");
    std::fs::write(&path, bytes).unwrap();
    is_refused("list", list_archive(&path, None).err());
    is_refused("verify", verify(bytes).err());
    for (way, partial) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let restored = restore(bytes, way, None, partial);
        is_refused(&format!("{way:?}, partial {partial}"), restored.done.err());
        assert!(
            restored
                .content
                .keys()
                .all(|name| name.extension().is_none_or(|end| end != "img")),
            "{case}"
        );
    }
    check_not_appended(case, bytes);
}

fn check_not_appended(case: &str, bytes: &[u8]) {
    let store = std::sync::Arc::new(MemoryStore::of(bytes.to_vec()));
    let error = Scene::new().export_to(std::sync::Arc::clone(&store) as _, false).err();
    assert!(
        matches!(error, Some(Error::Unsupported { .. })),
        "{case}: append: {error:?}"
    );
    assert!(store.to_vec() == bytes, "{case}: appending changed it");
}

/// The archive with the bodies of the last epoch's records of a kind changed, and sealed again.
fn with_last(bytes: &[u8], kind: RecordKind, change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut archive = RawArchive::read(bytes);
    let last = archive.records.last().unwrap().epoch;
    let is_it = |epoch: EpochId, one: RecordKind| (epoch, one) == (last, kind);
    for record in archive
        .records
        .iter_mut()
        .filter(|record| is_it(record.epoch, record.kind))
    {
        change(&mut record.body);
    }
    archive.sealed()
}

/// The archive with other COMMITs in the last epoch, and a TAIL that leads to them.
fn with_commits(bytes: &[u8], change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut changed = bytes.to_vec();
    let commit = last_of(bytes, RecordKind::Commit);
    let mut body = commit.body.clone();
    change(&mut body);
    assert_eq!(body.len(), commit.body.len());
    let copies: Vec<Placed> = records(bytes)
        .into_iter()
        .filter(|record| record.header.body_hash == commit.header.body_hash)
        .collect();
    let mut first = None;
    for copy in &copies {
        let record = copy.with_body(body.clone());
        let header = RecordHeader::decode(record.first_chunk().unwrap()).unwrap();
        first.get_or_insert(CommitLocation {
            offset: copy.range.start as u64,
            length: copy.range.len() as u64,
            body_hash: header.body_hash,
        });
        changed[copy.range.clone()].copy_from_slice(&record);
    }
    assert_eq!(copies.len(), 2);
    let tail = last_of(bytes, RecordKind::Tail);
    with(
        &changed,
        tail.range.clone(),
        &tail.with_body(encode_tail(&first.unwrap())),
    )
}

/// A record of a kind that is not known and may be skipped, and whose COMMIT names it.
fn with_unknown_record(bytes: &[u8]) -> Vec<u8> {
    let mut archive = RawArchive::read(bytes);
    let last = archive.records.last().unwrap().epoch;
    let head = archive.records.iter().position(|record| record.epoch == last).unwrap();
    let more = RawRecord {
        kind: RecordKind::Other(77),
        sequence: 1 << 20,
        body: vec![1, 2, 3],
        ..archive.records[head].clone()
    };
    for record in archive
        .records
        .iter_mut()
        .filter(|record| record.epoch == last && record.kind == RecordKind::List)
    {
        let (mut listed, mut images) = (Listed::default(), Vec::new());
        if list::add_any(&mut listed, &mut images, &record.body, record.lane).unwrap() == PART_RECORDS {
            let location = RecordLocation {
                kind: more.kind,
                sequence: more.sequence,
                ..listed.records[0]
            };
            listed.records.push(location);
            record.body = list::encode(&listed, &[], record.lane).unwrap().remove(0).1;
        }
    }
    archive.records.insert(head + 1, more);
    archive.sealed()
}

/// A record of a kind that is not known, in a LIST of records.
fn name_unknown(body: &mut Vec<u8>, flags: u8) {
    if body[1] != PART_RECORDS {
        return;
    }
    let (kind, mut payload) = payload_of(body, 1 << 22).unwrap();
    put_entry(&mut payload, 0x81, |fields| {
        fields.extend([77, flags, 0]);
        for number in [1 << 20, 0, 0, 0, 0] {
            put_varint(fields, number);
        }
        fields.extend([9; 32]);
    });
    *body = payload_body(kind, &payload).unwrap();
}

#[test]
fn what_must_be_known_is_refused_in_every_epoch() {
    let (bytes, _) = two_commits();
    check_refused(
        "a feature in HEAD",
        &with_last(&bytes, RecordKind::Head, |body| body[8] |= 0x80),
    );
    check_refused(
        "another major version",
        &with_last(&bytes, RecordKind::Head, |body| body[0] = 2),
    );
    check_refused(
        "other blocks",
        &with_last(&bytes, RecordKind::Head, |body| body[5] = 0x20),
    );
    check_refused("a feature in COMMIT", &with_commits(&bytes, |body| body[7] |= 0x80));
    check_refused(
        "a critical record that COMMIT names",
        &with_last(&bytes, RecordKind::List, |body| name_unknown(body, 1)),
    );
    check_refused(
        "a record with a flag that COMMIT names",
        &with_last(&bytes, RecordKind::List, |body| name_unknown(body, 4)),
    );
    let entry = |body: &mut Vec<u8>, tag: u8| {
        let (kind, mut payload) = payload_of(body, 1 << 22).unwrap();
        put_entry(&mut payload, tag, |fields| fields.extend([1, 2, 3]));
        *body = payload_body(kind, &payload).unwrap();
    };
    check_refused(
        "a critical entry of a LIST",
        &with_last(&bytes, RecordKind::List, |body| entry(body, 0xff)),
    );
    let head = last_of(&bytes, RecordKind::Head);
    check_refused(
        "a record that COMMIT needs",
        &with(
            &bytes,
            head.range.start..head.range.start + HEADER_BYTES,
            &with_flags(&head.header, FLAGS_UNKNOWN),
        ),
    );
}

/// Flags of a critical record, with one that is not known.
const FLAGS_UNKNOWN: u8 = 0x11;

/// A header with other flags, and the hash that fits.
fn with_flags(header: &RecordHeader, flags: u8) -> [u8; HEADER_BYTES] {
    let mut bytes = header.encode();
    bytes[10] = flags;
    let hash = hash_of(&bytes[..HEADER_BYTES - 8]);
    bytes[HEADER_BYTES - 8..].copy_from_slice(&hash[..8]);
    bytes
}

/// A record that no COMMIT leads to keeps nobody from what there is, who does not read it: not even where the archive must be searched.
#[test]
fn what_nothing_leads_to_is_refused_from_a_pipe_only() {
    let (bytes, [_, expected]) = two_commits();
    let head = last_of(&bytes, RecordKind::Head);
    let stray = RecordHeader {
        sequence: 1 << 20,
        body_bytes: 0,
        body_hash: hash_of(&[]),
        ..head.header
    };
    // Nothing behind it is where lists say, so that the archive is searched.
    let bytes = with(
        &bytes,
        head.range.end..head.range.end,
        &with_flags(&stray, FLAGS_UNKNOWN),
    );
    let restored = restore(&bytes, Way::File, None, false);
    assert!(
        restored.is_whole() && restored.content == expected,
        "{:?}",
        restored.done
    );
    let restored = restore(&bytes, Way::Pipe, None, false);
    assert!(matches!(restored.done, Err(Error::Unsupported { .. })));
    let verified = verify(&bytes).unwrap();
    assert!(verified.lost.is_empty() && verified.damage.is_empty(), "{verified:?}");
    let scene = Scene::new();
    let restored = restore(&scene.export(&bytes), Way::File, None, false);
    assert!(restored.is_whole() && restored.content == scene.content());
}

/// Where the last COMMIT is not known, a COMMIT or TAIL that must be refused may be it.
#[test]
fn a_commit_that_is_not_known_is_refused() {
    let (bytes, _) = two_commits();
    let copies = records(&bytes)
        .into_iter()
        .filter(|record| record.header.kind == RecordKind::Commit);
    let (mut sealed, mut behind) = (bytes.clone(), Vec::new());
    for copy in copies.skip(2) {
        let header = with_flags(&copy.header, FLAGS_UNKNOWN);
        sealed = with(&sealed, copy.range.start..copy.range.start + HEADER_BYTES, &header);
        behind = [&bytes[..], &header, &copy.body].concat();
    }
    check_refused("the last COMMIT", &sealed);
    check_refused("a COMMIT behind the TAIL", &behind);
}

/// Takes what a LIST tells of uses out of it.
fn forget_uses(body: &mut Vec<u8>) {
    const TAG_USES: u8 = 4;
    let (kind, payload) = payload_of(body, 1 << 22).unwrap();
    let (mut decoder, mut kept) = (Decoder::new(&payload), Vec::new());
    while let Some((tag, mut fields)) = next_entry(&mut decoder).unwrap() {
        if tag != TAG_USES || kind[0] != PART_RECORDS {
            let its = fields.take(fields.left()).unwrap();
            put_entry(&mut kept, tag, |entry| entry.extend(its));
        }
    }
    *body = payload_body(kind, &kept).unwrap();
}

#[test]
fn what_may_be_skipped_is_skipped() {
    let (bytes, [_, expected]) = two_commits();
    let entry = |body: &mut Vec<u8>| {
        let (kind, mut payload) = payload_of(body, 1 << 22).unwrap();
        put_entry(&mut payload, 0x7f, |fields| fields.extend([1, 2, 3]));
        *body = payload_body(kind, &payload).unwrap();
    };
    let cases = [
        (
            "a feature that may be ignored",
            with_last(&bytes, RecordKind::Head, |body| body[24] |= 0x80),
        ),
        (
            "a longer HEAD",
            with_last(&bytes, RecordKind::Head, |body| body.extend([1; 9])),
        ),
        ("a record that COMMIT names", with_unknown_record(&bytes)),
        ("no uses", with_last(&bytes, RecordKind::List, forget_uses)),
        ("an entry of a LIST", with_last(&bytes, RecordKind::List, entry)),
        (
            "an entry of a PLAN",
            with_last(&bytes, RecordKind::Plan, |body| {
                if body[1] != 1 {
                    entry(body);
                }
            }),
        ),
    ];
    for (case, bytes) in cases {
        for way in WAYS {
            let restored = restore(&bytes, way, None, false);
            assert!(
                restored.is_whole() && restored.content == expected,
                "{case}, {way:?}: {:?}",
                restored.done
            );
        }
        let verified = verify(&bytes).unwrap();
        assert!(
            verified.lost.is_empty() && verified.damage.is_empty(),
            "{case}: {verified:?}"
        );
    }
}

/// What only a writer must know is read, and not appended to.
#[test]
fn what_a_writer_must_know_is_not_appended_to() {
    let (bytes, [_, expected]) = two_commits();
    let cases = [
        ("HEAD", with_last(&bytes, RecordKind::Head, |body| body[16] |= 1)),
        ("other chunks", with_last(&bytes, RecordKind::Head, |body| body[38] = 9)),
        ("COMMIT", with_commits(&bytes, |body| body[8] |= 1)),
    ];
    for (case, bytes) in cases {
        let last = last_of(&bytes, RecordKind::Commit);
        assert!(Commit::decode(&last.body).is_ok());
        for way in WAYS {
            let restored = restore(&bytes, way, None, false);
            assert!(
                restored.is_whole() && restored.content == expected,
                "{case}, {way:?}: {:?}",
                restored.done
            );
        }
        check_not_appended(case, &bytes);
    }
}
