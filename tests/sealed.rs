//! Goal: a sealed archive gives nothing to who has no key, everything to who has one, and refuses by name whatever somebody else put into it.
//! Method: a simulated pool is exported into memory and sealed with fixed keys; archives are then changed, and read in both ways.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

mod common;
#[path = "format/scene.rs"]
#[allow(dead_code, reason = "other tests use another part")]
mod scene;
#[path = "format/vectors.rs"]
mod vectors;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use ed25519_dalek::Signer as _;
use scene::{Content, Placed, Restored, Scene, WAYS, Way, records, restore_with};
use vmfold::archive::keys::{ArchiveKeys, KeyringSecrets, Unlock};
use vmfold::archive::reader::Archive;
use vmfold::archive::record::{RecordHeader, RecordKind, find_magic};
use vmfold::archive::seal::{KeySlot, Salts, Seal, SealedPlace, SecretKey, seal_behind};
use vmfold::archive::sealed_end::SealedEnd;
use vmfold::error::Error;
use vmfold::monitor::Silent;
use vmfold::ops::BackupAccess;
use vmfold::ops::export::{ExportOptions, Sealing, export_on};
use vmfold::ops::repair::{RepairOptions, RepairTo, repair};
use vmfold::ops::verify::verify_sealed;
use vmfold::report::Verified;
use vmfold::store::MemoryStore;
use vmfold::testing::fixed_keys::FixedKeys;
use vmfold::testing::simulated::{INCOMPRESSIBLE, block_of};

const KEYS: FixedKeys = FixedKeys { name: 1, number: 1 };
/// Where a COMMIT has its signature.
const SIGNATURE: Range<usize> = 116..180;
const OTHER_KEYS: FixedKeys = FixedKeys { name: 2, number: 1 };

fn keys_of(keys: FixedKeys) -> Arc<ArchiveKeys> {
    Arc::new(ArchiveKeys::opened_by(Arc::new(keys)))
}

fn access_of(keys: Option<FixedKeys>) -> BackupAccess {
    BackupAccess {
        unlock: keys.map(|keys| Arc::new(keys) as _),
        ..BackupAccess::default()
    }
}

fn export(scene: &Scene, keys: FixedKeys, before: &[u8]) -> Result<Vec<u8>, Error> {
    export_with(scene, keys, before, None)
}

fn export_with(scene: &Scene, keys: FixedKeys, before: &[u8], parity: Option<u8>) -> Result<Vec<u8>, Error> {
    let store = Arc::new(MemoryStore::of(before.to_vec()));
    let options = ExportOptions {
        sealing: keys.sealing(),
        parity,
        ..scene.options()
    };
    export_on(scene.pool(false), &options, Arc::clone(&store) as _, &Silent::default())?;
    Ok(store.to_vec())
}

/// A sealed archive of two commits, and what each of them holds.
fn two_commits() -> (Vec<u8>, [Content; 2]) {
    let scene = Scene::new();
    let (one, first) = (export(&scene, KEYS, &[]).unwrap(), scene.content());
    scene.grow();
    (export(&scene, KEYS, &one).unwrap(), [first, scene.content()])
}

fn restore(bytes: &[u8], way: Way, commit: Option<&str>, keys: Option<FixedKeys>) -> Restored {
    restore_with(bytes, way, (commit, false), access_of(keys))
}

fn verify(bytes: &[u8], keys: Option<FixedKeys>) -> Result<Verified, Error> {
    let keys = keys.map_or_else(Arc::default, keys_of);
    verify_sealed(Arc::new(MemoryStore::of(bytes.to_vec())), keys, &Silent::default())
}

fn is_intact(verified: &Verified) -> bool {
    verified.damage.is_empty() && verified.lost.is_empty()
}

#[test]
fn who_has_the_key_gets_all_back() {
    let (bytes, contents) = two_commits();
    for way in WAYS {
        for (commit, content) in ["1", "2"].into_iter().zip(&contents) {
            let restored = restore(&bytes, way, Some(commit), Some(KEYS));
            assert!(restored.is_whole(), "{way:?} {commit}: {:?}", restored.done);
            assert!(restored.content == *content, "{way:?} {commit}");
        }
    }
    let verified = verify(&bytes, Some(KEYS)).unwrap();
    assert!(is_intact(&verified), "{verified:?}");
    assert_eq!(verified.commits, 2);
}

#[test]
fn a_sealed_archive_with_parity_opens_from_its_end() {
    let scene = Scene::new();
    let one = export_with(&scene, KEYS, &[], Some(5)).unwrap();
    scene.grow();
    let two = export_with(&scene, KEYS, &one, None).unwrap();
    for bytes in [&one, &two] {
        assert!(
            records(bytes)
                .iter()
                .any(|record| record.header.kind == RecordKind::Parity)
        );
        for way in WAYS {
            let restored = restore(bytes, way, None, Some(KEYS));
            assert!(restored.is_whole(), "{way:?}: {:?}", restored.done);
        }
        assert!(is_intact(&verify(bytes, Some(KEYS)).unwrap()));
        let archive = Archive::open_with(Arc::new(MemoryStore::of(bytes.clone())), keys_of(KEYS)).unwrap();
        assert!(!archive.was_searched());
    }
    assert_eq!(restore(&two, Way::File, None, Some(KEYS)).content, scene.content());
}

#[test]
fn records_are_verified_without_a_key() {
    let (bytes, _) = two_commits();
    let verified = verify(&bytes, None).unwrap();
    assert!(
        verified.is_without_key && verified.is_sealed && verified.is_ended,
        "{verified:?}"
    );
    assert_eq!((verified.commits, verified.damage.len()), (2, 0), "{verified:?}");
    let all = records(&bytes);
    for (number, record) in all.iter().enumerate() {
        // A flipped bit in each record, and each record left out.
        let mut bad = bytes.clone();
        bad[record.range.start + 97 % record.range.len()] ^= 1;
        let verified = verify(&bad, None).unwrap();
        assert!(!verified.damage.is_empty(), "{number}: {:?}", record.header);
        let less = scene::with(&bytes, record.range.clone(), &[]);
        let verified = verify(&less, None).unwrap();
        let is_told = !verified.damage.is_empty() || !verified.is_ended || number + 1 == all.len();
        assert!(is_told, "{number}: {:?}", record.header);
    }
}

#[test]
fn a_sealed_archive_heals_without_a_key() {
    let scene = Scene::new();
    let bytes = export_with(&scene, KEYS, &[], Some(20)).unwrap();
    let folder = scene::scratch();
    let (damaged, healed) = (folder.path().join("damaged"), folder.path().join("healed"));
    let length = bytes.len();
    for (what, range) in [
        ("the beginning", 0..20_000),
        ("the middle", length / 3..length / 3 + 20_000),
        ("the end", length - 9_000..length),
    ] {
        let mut bad = bytes.clone();
        bad[range].fill(0);
        std::fs::write(&damaged, &bad).unwrap();
        let options = RepairOptions {
            archive: damaged.clone(),
            to: RepairTo::Copy(healed.clone()),
            from: None,
        };
        let repaired = repair(&options, &Silent::default()).unwrap();
        assert!(repaired.damage.is_empty(), "{what}: {repaired:?}");
        assert!(std::fs::read(&healed).unwrap() == bytes, "{what}");
        std::fs::remove_file(&healed).unwrap();
    }
}

#[test]
fn the_second_export_stores_no_block_again() {
    let scene = Scene::new();
    let one = export(&scene, KEYS, &[]).unwrap();
    let two = export(&scene, KEYS, &one).unwrap();
    let packs = |bytes: &[u8]| {
        let found = records(bytes);
        found
            .iter()
            .filter(|record| record.header.kind == RecordKind::Pack)
            .count()
    };
    assert!(packs(&one) > 0);
    assert_eq!(packs(&one), packs(&two));
}

#[test]
fn who_has_no_key_gets_nothing() {
    let (bytes, _) = two_commits();
    for keys in [None, Some(OTHER_KEYS)] {
        for way in WAYS {
            let restored = restore(&bytes, way, None, keys);
            let is_refused = matches!(restored.done, Err(Error::NoKey { .. } | Error::WrongKey { .. }));
            assert!(is_refused, "{:?}", restored.done);
            assert!(restored.content.is_empty());
        }
    }
    let scene = Scene::new();
    assert!(matches!(
        export(&scene, OTHER_KEYS, &bytes),
        Err(Error::WrongKey { .. })
    ));
    // Neither content nor names stand in it.
    let block = block_of(INCOMPRESSIBLE + 3);
    assert!(memchr::memmem::find(&bytes, &block[100..164]).is_none());
    assert!(memchr::memmem::find(&bytes, b"image-").is_none());
    for record in records(&bytes) {
        let is_clear = matches!(
            record.header.kind,
            RecordKind::Head | RecordKind::Key | RecordKind::Tail | RecordKind::Note
        );
        assert_eq!(record.header.seal.is_none(), is_clear, "{:?}", record.header.kind);
    }
}

#[test]
fn an_archive_that_is_not_sealed_is_not_taken_for_one() {
    let scene = Scene::new();
    let plain = scene.export(&[]);
    for way in WAYS {
        let restored = restore(&plain, way, None, Some(KEYS));
        assert!(restored.done.is_err(), "{way:?}");
        assert!(restored.content.is_empty());
    }
    assert!(matches!(export(&scene, KEYS, &plain), Err(Error::NotSealed { .. })));
}

#[test]
fn an_archive_that_was_cut_off_does_not_get_an_export_in_clear() {
    let scene = Scene::new();
    let bytes = export(&scene, KEYS, &[]).unwrap();
    let ends = records(&bytes).into_iter().map(|record| record.range.end);
    for end in [0, 50, 96].into_iter().chain(ends.take(3)) {
        let store = Arc::new(MemoryStore::of(bytes[..end].to_vec()));
        let options = ExportOptions {
            sealing: Sealing {
                unlock: Some(Arc::new(KEYS)),
                ..Sealing::default()
            },
            ..scene.options()
        };
        let done = export_on(scene.pool(false), &options, Arc::clone(&store) as _, &Silent::default());
        if done.is_ok() {
            // Where the keyring is left, it goes on with that.
            assert!(
                restore(&store.to_vec(), Way::File, None, Some(KEYS)).is_whole(),
                "{end}"
            );
        } else {
            assert!(matches!(done, Err(Error::Usage(_))), "{end}: {done:?}");
            assert!(bytes.starts_with(&store.to_vec()), "{end}");
        }
    }
}

/// The bytes of a record with another header, whose hashes are right.
fn with_header(record: &Placed, change: impl FnOnce(&mut RecordHeader)) -> Vec<u8> {
    let mut header = record.header;
    header.mask = 0;
    change(&mut header);
    assert_eq!(find_magic(&record.body), None);
    [&header.encode()[..], &record.body].concat()
}

fn joined(records: &[Vec<u8>]) -> Vec<u8> {
    records.concat()
}

/// Restores, and checks that no wrong byte came out. Returns whether all came.
fn comes_out_right(bytes: &[u8], contents: &[Content; 2], case: &str) -> bool {
    let mut all = true;
    for way in WAYS {
        for (commit, content) in ["1", "2"].into_iter().zip(contents) {
            let restored = restore(bytes, way, Some(commit), Some(KEYS));
            for (name, found) in &restored.content {
                let is_image = !name.to_str().unwrap().contains(".vmfold");
                assert!(
                    !is_image || content.get(name) == Some(found),
                    "{case}: {way:?} {commit}"
                );
            }
            all &= restored.is_whole();
        }
    }
    all
}

#[test]
fn records_that_change_places_are_refused() {
    let (bytes, contents) = two_commits();
    let all: Vec<Placed> = records(&bytes);
    let stored: Vec<Vec<u8>> = all.iter().map(|record| bytes[record.range.clone()].to_vec()).collect();
    let (first, second) = (all[0].header.epoch, all.last().unwrap().header.epoch);
    for kind in [RecordKind::Pack, RecordKind::Plan, RecordKind::Index, RecordKind::List] {
        let of = |epoch| {
            all.iter()
                .position(|record| record.header.kind == kind && record.header.epoch == epoch)
        };
        let (Some(one), Some(other)) = (of(first), of(second)) else {
            panic!("{kind:?} is not in both epochs");
        };
        // A body of the other epoch, with the header that it would have there.
        let mut swapped = stored.clone();
        let copies = (0..all.len()).filter(|place| all[*place].header.body_hash == all[other].header.body_hash);
        for copy in copies {
            swapped[copy] = with_header(&all[one], |header| {
                header.epoch = all[copy].header.epoch;
                header.sequence = all[copy].header.sequence;
            });
        }
        let case = format!("{kind:?}");
        assert!(!comes_out_right(&joined(&swapped), &contents, &case), "{case}");
        let verified = verify(&joined(&swapped), Some(KEYS));
        assert!(!verified.is_ok_and(|verified| is_intact(&verified)), "{case}");
    }
}

#[test]
fn no_bit_of_a_header_may_flip() {
    let (bytes, contents) = two_commits();
    let pack = records(&bytes)
        .into_iter()
        .find(|record| record.header.kind == RecordKind::Pack)
        .unwrap();
    for bit in (0..96 * 8).step_by(11) {
        let mut bad = bytes.clone();
        bad[pack.range.start + bit / 8] ^= 1 << (bit % 8);
        let case = format!("bit {bit}");
        assert!(!comes_out_right(&bad, &contents, &case), "{case}");
    }
    // The same with hashes that are right: the header's own, which anyone can make.
    for (what, change) in [
        (
            "epoch",
            &(|header: &mut RecordHeader| header.epoch.0 ^= 1) as &dyn Fn(&mut RecordHeader),
        ),
        ("lane", &|header| header.lane.0[0] ^= 1),
        ("sealed", &|header| header.seal = None),
    ] {
        let bad = [
            &bytes[..pack.range.start],
            &with_header(&pack, change),
            &bytes[pack.range.end..],
        ]
        .concat();
        assert!(!comes_out_right(&bad, &contents, what), "{what}");
    }
}

#[test]
fn a_forged_commit_is_refused() {
    let (bytes, _) = two_commits();
    // Whoever can write and has no key makes an archive of his own, with the keyring of the genuine one.
    let forged = {
        let scene = Scene::new();
        let mine = export(&scene, OTHER_KEYS, &[]).unwrap();
        let genuine = records(&bytes);
        let keyring = genuine
            .iter()
            .find(|record| record.header.kind == RecordKind::Key)
            .unwrap();
        let parts = records(&mine).into_iter().map(|record| {
            if record.header.kind == RecordKind::Key {
                let (header, mut body) = (record.header, keyring.body.clone());
                let made =
                    RecordHeader::of_body(RecordKind::Key, header.lane, header.epoch, header.sequence, &mut body);
                [&made.unwrap().encode()[..], &body].concat()
            } else {
                mine[record.range.clone()].to_vec()
            }
        });
        joined(&parts.collect::<Vec<_>>())
    };
    for way in WAYS {
        let restored = restore(&forged, way, None, Some(KEYS));
        assert!(restored.done.is_err());
        assert!(restored.content.is_empty());
    }
    // Each byte of the clear part of a COMMIT is proved.
    let commit = scene::last_of(&bytes, RecordKind::Commit);
    for at in (0..2600).step_by(13) {
        let mut body = commit.body.clone();
        body[at] ^= 1;
        let header = commit.header;
        let changed = RecordHeader::of_stored(
            (RecordKind::Commit, header.seal),
            header.lane,
            header.epoch,
            header.sequence,
            &mut body,
        )
        .unwrap();
        let keys = keys_of(KEYS);
        let first = records(&bytes)
            .into_iter()
            .find(|record| record.header.kind == RecordKind::Key)
            .unwrap();
        let record = vmfold::archive::keys::KeyRecord::decode(&first.body).unwrap();
        keys.open(std::path::Path::new("a"), &record).unwrap();
        assert!(
            keys.open_body(std::path::Path::new("a"), 0, &changed, body).is_err(),
            "{at}"
        );
    }
}

#[test]
fn a_keyring_that_is_older_than_the_last_commit_is_refused() {
    let scene = Scene::new();
    let one = export(&scene, KEYS, &[]).unwrap();
    let newer = FixedKeys { number: 2, ..KEYS };
    let other = export(&scene, newer, &[]).unwrap();
    let old = records(&one)
        .into_iter()
        .find(|record| record.header.kind == RecordKind::Key)
        .unwrap();
    let parts = records(&other).into_iter().map(|record| {
        if record.header.kind != RecordKind::Key {
            return other[record.range.clone()].to_vec();
        }
        // The keys of the epoch stay; the keyring is the old one.
        let mut body = record.body.clone();
        body[4..8].copy_from_slice(&old.body[4..8]);
        let at = body.windows(2).rposition(|pair| pair == [1, 2]).unwrap();
        body[at..at + 2].copy_from_slice(&[1, 1]);
        let header = record.header;
        let made = RecordHeader::of_body(RecordKind::Key, header.lane, header.epoch, header.sequence, &mut body);
        [&made.unwrap().encode()[..], &body].concat()
    });
    let stale = joined(&parts.collect::<Vec<_>>());
    for way in WAYS {
        let restored = restore(&stale, way, None, Some(newer));
        assert!(restored.done.is_err(), "{way:?}");
    }
    let opened = Archive::open_with(Arc::new(MemoryStore::of(stale)), keys_of(newer));
    assert!(opened.unwrap_err().to_string().contains("older"));
}

/// An archive in which a record has another body, whose hash is right.
fn with_body(bytes: &[u8], number: usize, change: &dyn Fn(&mut [u8])) -> Vec<u8> {
    let record = &records(bytes)[number];
    let (header, mut body) = (record.header, record.body.clone());
    change(&mut body);
    let kind = (header.kind, header.seal);
    let made = RecordHeader::of_stored(kind, header.lane, header.epoch, header.sequence, &mut body).unwrap();
    scene::with(bytes, record.range.clone(), &[&made.encode()[..], &body].concat())
}

/// An archive with one record more behind another one.
fn with_record(bytes: &[u8], behind: &Placed, kind: (RecordKind, Option<Seal>), body: &[u8]) -> Vec<u8> {
    let (header, mut body) = (behind.header, body.to_vec());
    let made = RecordHeader::of_stored(kind, header.lane, header.epoch, header.sequence, &mut body).unwrap();
    let end = behind.range.end;
    scene::with(bytes, end..end, &[&made.encode()[..], &body].concat())
}

fn places_of(bytes: &[u8], kind: RecordKind) -> Vec<usize> {
    let all = records(bytes).into_iter().enumerate();
    let found = all.filter(|(_, record)| record.header.kind == kind);
    found.map(|(place, _)| place).collect()
}

/// Keys that nobody named: what opens keyrings is known, and there is nothing to open them with.
#[derive(Debug)]
struct NotGiven;

impl Unlock for NotGiven {
    fn is_given(&self) -> bool {
        false
    }

    fn check(&self, archive: &Path, keyring: &[u8]) -> Result<(), Error> {
        KEYS.check(archive, keyring)
    }

    fn unlock(&self, archive: &Path, _: &[u8]) -> Result<KeyringSecrets, Error> {
        Err(Error::NoKey {
            path: archive.to_owned(),
            slots: String::new(),
        })
    }
}

fn verify_without_key(bytes: &[u8]) -> Verified {
    let keys = Arc::new(ArchiveKeys::opened_by(Arc::new(NotGiven)));
    verify_sealed(Arc::new(MemoryStore::of(bytes.to_vec())), keys, &Silent::default()).unwrap()
}

fn has_problem(verified: &Verified, wanted: &str) -> bool {
    verified.damage.iter().any(|damage| damage.problem.contains(wanted))
}

/// What is changed in the body of a record.
type Change<'a> = &'a dyn Fn(&mut [u8]);

#[test]
fn verify_looks_at_every_key_record() {
    let (bytes, _) = two_commits();
    assert!(is_intact(&verify_without_key(&bytes)));
    let keys = places_of(&bytes, RecordKind::Key);
    assert_eq!(keys.len(), 4);
    let changes: [(&str, Change, bool); 8] = [
        ("padding", &|body| *body.last_mut().unwrap() = 1, true),
        ("number 0", &|body| body[4] = 0, true),
        ("greater number", &|body| body[4] = 9, false),
        ("keyring", &|body| body[8] = 3, true),
        ("keyring of others", &|body| body[2356] = 9, false),
        ("pair", &|body| body[12] ^= 1, false),
        ("data key", &|body| body[1170] ^= 1, false),
        ("metadata key", &|body| body[1500] ^= 1, false),
    ];
    for place in keys {
        for (what, change, is_told_without_key) in changes {
            let bad = with_body(&bytes, place, change);
            let verified = verify(&bad, Some(KEYS));
            let is_told = verified.as_ref().map_or(true, |verified| !verified.damage.is_empty());
            assert!(is_told, "{what} of {place}: {verified:?}");
            let verified = verify_without_key(&bad);
            assert!(!is_told_without_key || !verified.damage.is_empty(), "{what} of {place}");
        }
    }
}

#[test]
fn a_keyring_with_number_0_is_malformed_for_everyone() {
    let (bytes, contents) = two_commits();
    let last = *places_of(&bytes, RecordKind::Key).last().unwrap();
    let bad = with_body(&bytes, last, &|body| body[4..8].fill(0));
    assert!(matches!(
        SealedEnd::read(Arc::new(MemoryStore::of(bad.clone()))),
        Err(Error::Damaged { .. })
    ));
    // A file has other KEY records; in a pipe it is damage where it stands.
    let restored = restore(&bad, Way::File, None, Some(KEYS));
    assert!(restored.is_whole() && restored.content == contents[1]);
    let piped = restore(&bad, Way::Pipe, None, Some(KEYS));
    assert!(matches!(piped.done, Err(Error::Damaged { .. })), "{:?}", piped.done);
}

#[test]
fn what_stands_in_clear_or_is_sealed_and_should_not_is_damage() {
    let (bytes, _) = two_commits();
    let behind = &records(&bytes)[4];
    for kind in [RecordKind::Plan, RecordKind::List, RecordKind::Pack, RecordKind::Index] {
        let bad = with_record(&bytes, behind, (kind, None), &[1; 100]);
        for verified in [verify(&bad, Some(KEYS)).unwrap(), verify_without_key(&bad)] {
            assert!(has_problem(&verified, "not sealed"), "{kind:?}: {verified:?}");
        }
    }
    let seal = Some(Seal::with(KeySlot::Metadata));
    for kind in [RecordKind::Note, RecordKind::Key, RecordKind::Head, RecordKind::Parity] {
        let bad = with_record(&bytes, behind, (kind, seal), &[1; 100]);
        for verified in [verify(&bad, Some(KEYS)).unwrap(), verify_without_key(&bad)] {
            assert!(has_problem(&verified, "whose kind never is"), "{kind:?}: {verified:?}");
        }
    }
}

/// The body of a COMMIT as a signer of the archive would make it, with another byte among the wrapped keys.
fn resealed(keys: &ArchiveKeys, commit: &Placed, changed: usize) -> Vec<u8> {
    let header = commit.header;
    let mut clear = keys.open_body(Path::new("a"), 0, &header, commit.body.clone()).unwrap();
    let length = u32::from_le_bytes(*clear[72..].first_chunk().unwrap());
    let payload = clear.split_off(usize::try_from(length).unwrap());
    clear[SIGNATURE].fill(0);
    clear[changed] ^= 1;
    let epoch = keys.epoch(header.lane, header.epoch).unwrap();
    let (seal, place) = (header.seal.unwrap(), SealedPlace::of(&header));
    let mut salts = Salts::new(SecretKey::new([7; 32]));
    let mut body = seal_behind(&epoch, seal, place, &mut salts, &clear, &payload).unwrap();
    let mut signed = blake3::Hasher::new_derive_key("vmfold 2026 commit v1");
    signed.update(place.as_bytes()).update(&body);
    let key = ed25519_dalek::SigningKey::from_bytes(&KEYS.secrets().signing_seed);
    body[SIGNATURE].copy_from_slice(&key.sign(signed.finalize().as_bytes()).to_bytes());
    body
}

#[test]
fn wrapped_keys_of_a_commit_are_verified() {
    let (bytes, contents) = two_commits();
    let commit = scene::last_of(&bytes, RecordKind::Commit);
    let copies = places_of(&bytes, RecordKind::Commit);
    let copies = copies
        .into_iter()
        .filter(|place| records(&bytes)[*place].header.body_hash == commit.header.body_hash);
    let copies: Vec<usize> = copies.collect();
    let tail = *places_of(&bytes, RecordKind::Tail).last().unwrap();
    let keys = keys_of(KEYS);
    Archive::open_with(Arc::new(MemoryStore::of(bytes.clone())), Arc::clone(&keys)).unwrap();
    // The name of the pair, the data key, the metadata key.
    for changed in [180, 200, 1400] {
        let body = resealed(&keys, &commit, changed);
        let hash = *blake3::hash(&body).as_bytes();
        let mut bad = bytes.clone();
        for place in &copies {
            bad = with_body(&bad, *place, &|stored| stored.copy_from_slice(&body));
        }
        bad = with_body(&bad, tail, &|stored| {
            stored[16..48].copy_from_slice(&hash);
            stored[64..96].copy_from_slice(&hash);
        });
        // The keys in the KEY records of the epoch serve.
        let restored = restore(&bad, Way::File, None, Some(KEYS));
        assert!(
            restored.is_whole() && restored.content == contents[1],
            "{:?}",
            restored.done
        );
        let verified = verify(&bad, Some(KEYS)).unwrap();
        assert!(has_problem(&verified, "COMMIT record: "), "{changed}: {verified:?}");
    }
}

#[test]
fn an_archive_without_key_records_says_that_they_are_lost() {
    let (bytes, _) = two_commits();
    let kept = records(&bytes)
        .into_iter()
        .filter(|record| record.header.kind != RecordKind::Key);
    let bad: Vec<u8> = kept.flat_map(|record| bytes[record.range].to_vec()).collect();
    for verified in [verify(&bad, Some(KEYS)).unwrap(), verify_without_key(&bad)] {
        assert!(verified.has_lost_keys && verified.is_sealed);
        assert!(has_problem(&verified, "KEY records are lost"), "{verified:?}");
        assert!(verified.to_string().contains("KEY records are lost"));
    }
    for keys in [Some(KEYS), None] {
        for way in WAYS {
            let error = restore(&bad, way, None, keys).done.unwrap_err().to_string();
            assert!(error.contains("KEY records are lost"), "{way:?}: {error}");
        }
    }
    assert!(!verify_without_key(&bytes).has_lost_keys);
}
