// Goal: a kill at any write, and damage, cost no commit that is intact, and the next export goes on.

use std::collections::BTreeSet;
use std::sync::Arc;

use vmfold::archive::record::{HEADER_BYTES, RecordKind, hash_of};
use vmfold::numbers::CommitNumber;
use vmfold::store::{MemoryStore, Store};
use vmfold::testing::faulty_store::{FaultyStore, StoreCall, StoreFault};

use crate::scene::{
    Content, Scene, WAYS, Way, check_bytes, check_commit, is_intact, last_of, records, restore, verify, with,
};

/// What a kill or a power cut leaves.
struct Crash {
    case: String,
    bytes: Vec<u8>,
}

/// Everything that may be left of an export that made `after` of `before` with these calls. What was settled is there; of every other write,
/// any part may be missing or zeros.
fn crashes(before: &[u8], after: &[u8], calls: &[StoreCall]) -> Vec<Crash> {
    let mut found = Vec::new();
    let (mut at, mut settled, mut last_write) = (before.len(), before.len(), before.len());
    for (number, call) in calls.iter().enumerate() {
        match *call {
            StoreCall::Truncate(length) => {
                at = usize::try_from(length).unwrap();
                settled = at;
            }
            StoreCall::Settle => settled = at,
            StoreCall::Append(length) => {
                let mut left = |what: &str, bytes: Vec<u8>| {
                    let case = format!("call {number}, {length} bytes at {at}: {what}");
                    found.push(Crash { case, bytes });
                };
                let (old, new) = (&after[..at], &after[at..at + length]);
                let middle = [HEADER_BYTES / 2, HEADER_BYTES - 3, HEADER_BYTES, length / 2];
                for cut in [0, 1, length - 1, length].into_iter().chain(middle) {
                    left(&format!("cut after {cut}"), [old, &new[..cut]].concat());
                    left(
                        &format!("zeros after {cut}"),
                        [old, &new[..cut], &vec![0; length - cut]].concat(),
                    );
                }
                // No part that a disk writes at once ends in the first bytes of a record without taking the end of the one before.
                for cut in middle.into_iter().chain([8, length - 8]) {
                    left(
                        &format!("zeros before {cut}"),
                        [old, &vec![0; cut], &new[cut..]].concat(),
                    );
                }
                for from in [settled, last_write.max(settled)] {
                    let (kept, zeros) = (&old[..from], vec![0; at - from]);
                    left(&format!("zeros from {from} to it"), [kept, &zeros, new].concat());
                    left(
                        &format!("zeros from {from} on"),
                        [kept, &zeros, &vec![0; length]].concat(),
                    );
                }
                last_write = at;
                at += length;
            }
            StoreCall::Length | StoreCall::Read(..) => {}
        }
    }
    assert_eq!(at, after.len());
    // A cut behind one write is one before the next.
    let mut seen = BTreeSet::new();
    found.retain(|crash| seen.insert(hash_of(&crash.bytes)));
    found
}

/// Whether a COMMIT of the last epoch is whole in what is left.
fn is_committed(left: &[u8], after: &[u8]) -> bool {
    let hash = last_of(after, RecordKind::Commit).header.body_hash;
    let mut copies = records(after)
        .into_iter()
        .filter(|record| record.header.body_hash == hash);
    copies.any(|copy| left.get(copy.range.clone()) == Some(&after[copy.range]))
}

/// Exports the scene behind `before`, which has commits with these contents, crashes at every write, and goes on.
fn check_crashes(scene: &Scene, before: &[u8], commits: &[Content]) -> usize {
    let store = Arc::new(FaultyStore::new(
        MemoryStore::of(before.to_vec()),
        u64::MAX,
        StoreFault::Dies,
    ));
    scene.export_to(Arc::clone(&store) as Arc<dyn Store>, false).unwrap();
    let after = store.inner().to_vec();
    let mut all = commits.to_vec();
    all.push(scene.content());
    let crashes = crashes(before, &after, &store.calls());
    for Crash { case, bytes } in &crashes {
        let count = commits.len() + usize::from(is_committed(bytes, &after));
        check_truth(case, bytes, &all[..count], &scene.content());
        // The next export succeeds, and so does a restore of everything that was committed.
        let again = Arc::new(MemoryStore::of(bytes.clone()));
        let made = scene.export_to(Arc::clone(&again) as Arc<dyn Store>, false);
        let made = made.unwrap_or_else(|error| panic!("{case}: {}", vmfold::error::describe(&error)));
        assert_eq!(made.commit, CommitNumber(u32::try_from(count).unwrap() + 1), "{case}");
        let bytes = again.to_vec();
        for (number, expected) in (1..).zip(&all[..count]) {
            check_commit(&bytes, &format!("{number}"), expected, case);
        }
        check_commit(&bytes, "latest", &scene.content(), case);
        let verified = verify(&bytes).unwrap();
        assert!(is_intact(&verified) && verified.is_ended, "{case}: {verified:?}");
        assert_eq!(verified.commits, count as u64 + 1, "{case}");
    }
    crashes.len()
}

/// Verification says what is there, and a restore of what is intact gives the last commit that is.
fn check_truth(case: &str, bytes: &[u8], commits: &[Content], now: &Content) {
    let partial = restore(bytes, Way::File, None, true);
    let Some(expected) = commits.last() else {
        // Where there is nothing else, an epoch whose images are all there is better than nothing.
        check_bytes(&partial, now, case);
        assert!(verify(bytes).map_or(true, |verified| !is_intact(&verified)), "{case}");
        return;
    };
    let verified = verify(bytes).unwrap();
    assert!(is_intact(&verified), "{case}: {verified:?}");
    assert_eq!(verified.commits, commits.len() as u64, "{case}");
    check_bytes(&partial, expected, case);
    let done = partial.done.unwrap();
    assert_eq!((done.commit.0 as usize, done.lost.len()), (commits.len(), 0), "{case}");
    assert!(partial.content == *expected, "{case}");
}

#[test]
fn a_kill_at_any_write_costs_no_commit_and_no_later_export() {
    let scene = Scene::new();
    let tried = check_crashes(&scene, &[], &[]);
    assert!(tried > 200, "{tried}");
    let (one, first) = (scene.export(&[]), scene.content());
    scene.grow();
    let tried = check_crashes(&scene, &one, &[first]);
    assert!(tried > 200, "{tried}");
}

/// Damages the body of a PACK, of which nothing but its own hash tells.
fn with_damaged_pack(bytes: &[u8], place: usize) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    let packs: Vec<_> = records(bytes)
        .into_iter()
        .filter(|record| record.header.kind == RecordKind::Pack)
        .collect();
    damaged[packs[place].range.end - 5] ^= 1;
    damaged
}

/// What is lost is stored anew, whatever an index or an INDEX says: a commit never refers to what is damaged.
#[test]
fn blocks_of_a_damaged_pack_are_stored_anew() {
    for (has_index, grows) in [(false, false), (false, true), (true, false), (true, true)] {
        let case = format!("index {has_index}, grows {grows}");
        let scene = Scene::new();
        let store = Arc::new(MemoryStore::default());
        scene.export_to(Arc::clone(&store) as _, has_index).unwrap();
        let damaged = with_damaged_pack(&store.to_vec(), 0);
        if grows {
            scene.grow();
        }
        let store = Arc::new(MemoryStore::of(damaged.clone()));
        let made = scene.export_to(Arc::clone(&store) as _, has_index).unwrap();
        assert!(made.new_bytes > 0, "{case}: {made:?}");
        let bytes = store.to_vec();
        check_commit(&bytes, "2", &scene.content(), &case);
        check_commit(&bytes, "latest", &scene.content(), &case);
        let verified = verify(&bytes).unwrap();
        assert!(
            verified.lost.iter().all(|lost| lost.commit == CommitNumber(1)),
            "{case}: {verified:?}"
        );
        assert!(
            !verified.damage.is_empty() && !verified.lost.is_empty(),
            "{case}: {verified:?}"
        );
        // Once is enough.
        let made = scene.export_to(Arc::clone(&store) as _, has_index).unwrap();
        assert_eq!(made.new_bytes, 0, "{case}");
        check_commit(&store.to_vec(), "3", &scene.content(), &case);
    }
}

/// An index may know more of an archive than is left of it.
#[test]
fn an_index_that_knows_a_lost_commit_costs_nothing() {
    let scene = Scene::new();
    let store = Arc::new(MemoryStore::default());
    scene.export_to(Arc::clone(&store) as _, true).unwrap();
    let one = store.to_vec();
    scene.grow();
    scene.export_to(Arc::clone(&store) as _, true).unwrap();
    let two = store.to_vec();
    for length in [one.len(), one.len() + (two.len() - one.len()) / 2] {
        let store = Arc::new(MemoryStore::of(two[..length].to_vec()));
        scene.export_to(Arc::clone(&store) as _, true).unwrap();
        check_commit(&store.to_vec(), "2", &scene.content(), &format!("cut at {length}"));
    }
}

/// Whoever gets an older commit than was asked for is told, unless the archive ends as it did when that commit was the last.
#[test]
fn a_cut_archive_says_that_it_was_cut() {
    let scene = Scene::new();
    let one = scene.export(&[]);
    scene.grow();
    let bytes = scene.export(&one);
    for record in records(&bytes)
        .iter()
        .filter(|record| record.range.start > one.len() / 2)
    {
        let cut = record.range.end;
        for way in WAYS {
            let case = format!("cut behind {} at {cut}, {way:?}", record.header.kind.name());
            let restored = restore(&bytes[..cut], way, None, false);
            let Ok(done) = &restored.done else {
                assert!(cut < one.len() || way == Way::Pipe, "{case}: {:?}", restored.done);
                continue;
            };
            let is_of_archive = |note: &String| note.contains("archive");
            let is_silent = !restored.notes.iter().any(is_of_archive) && !done.later_damage;
            let is_older = done.commit == CommitNumber(1) && cut > one.len();
            assert!(!is_older || !is_silent, "{case}: nothing was said");
            assert!(
                record.header.kind != RecordKind::Tail || is_silent,
                "{case}: {:?}",
                restored.notes
            );
        }
    }
}

/// A commit that was there and is damaged is not the beginning of an export that did not end.
#[test]
fn a_commit_whose_copies_are_damaged_is_told() {
    let scene = Scene::new();
    let one = scene.export(&[]);
    scene.grow();
    let bytes = scene.export(&one);
    let last = records(&bytes).last().unwrap().header.epoch;
    for damages_tail in [false, true] {
        let mut damaged = bytes.clone();
        let of_last = records(&bytes).into_iter().filter(|record| record.header.epoch == last);
        for record in of_last.filter(|record| {
            record.header.kind == RecordKind::Commit || (damages_tail && record.header.kind == RecordKind::Tail)
        }) {
            damaged[record.range.start + HEADER_BYTES + 30] ^= 1;
        }
        for way in WAYS {
            let restored = restore(&damaged, way, None, false);
            assert!(
                !restored.is_whole(),
                "{way:?}, TAIL {damages_tail}: {:?}",
                restored.done
            );
        }
        assert!(!is_intact(&verify(&damaged).unwrap()));
    }
}

/// A TAIL that another end of the archive had, at its end or in its middle.
#[test]
fn a_stale_tail_hides_no_commit() {
    let scene = Scene::new();
    let (one, first) = (scene.export(&[]), scene.content());
    scene.grow();
    let two = scene.export(&one);
    let stale = last_of(&one, RecordKind::Tail);
    let stale = &one[stale.range];
    let tail = last_of(&two, RecordKind::Tail);
    let instead = with(&two, tail.range.clone(), stale);
    for (case, bytes) in [("behind it", [&two[..], stale].concat()), ("in its place", instead)] {
        check_commit(&bytes, "1", &first, case);
        check_commit(&bytes, "latest", &scene.content(), case);
        let verified = verify(&bytes).unwrap();
        assert!(is_intact(&verified) && verified.commits == 2, "{case}: {verified:?}");
        let next = scene.export(&bytes);
        check_commit(&next, "3", &scene.content(), case);
        check_commit(&next, "2", &scene.content(), case);
    }
}
