//! Goal: every index remembers what [`ChunkIndex`] says, and believes nothing of another extent, archive or commit. Method: one
//! conformance suite for the index in sled and the one in memory, each opened anew for every step.
#![allow(
    clippy::unwrap_used,
    clippy::single_range_in_vec_init,
    missing_docs,
    reason = "tests"
)]

use std::ops::Range;

use vmfold::archive::commit::{Commit, CommitLocation};
use vmfold::archive::reader::Committed;
use vmfold::block::{BLOCK_BYTES, SlotSet};
use vmfold::chunk::{Chunk, Chunker};
use vmfold::content::{Content, KnownSlots};
use vmfold::facts::Facts;
use vmfold::fingerprint::FingerprintFunction;
use vmfold::index::{self, ChunkIndex, MemoryIndex, StoredSlots};
use vmfold::monitor::Silent;
use vmfold::numbers::{CommitNumber, ExtentId, Slot, StoreBlock};
use vmfold::range;
use vmfold::testing::simulated::one_image;

type Open<'a> = &'a dyn Fn() -> Box<dyn ChunkIndex>;

/// A pool of one image with extents at these blocks of the disk, and fingerprints of their own.
fn pool(places: &[Range<u32>], generation: u64, first_fingerprint: u32) -> Facts {
    let mut facts = one_image(places.iter().cloned(), 1);
    for extent in &mut facts.extents {
        extent.generation = generation;
    }
    let fingerprints = (0..facts.slots()).map(|slot| (first_fingerprint + slot).wrapping_mul(0x9e37_79b9));
    facts.fingerprints = fingerprints.collect::<Vec<_>>().into();
    facts
}

/// The same extents, of which no fingerprint is known yet.
fn unknown(facts: &Facts) -> Facts {
    let block = |address: u64| u32::try_from(address / BLOCK_BYTES).unwrap();
    let places = facts
        .extents
        .iter()
        .map(|extent| block(extent.address)..block(extent.address) + extent.blocks);
    let mut unknown = one_image(places, 1);
    for (extent, its) in unknown.extents.iter_mut().zip(&facts.extents) {
        (extent.generation, extent.class) = (its.generation, its.class);
    }
    unknown.fingerprints = vec![0; facts.slots() as usize].into();
    unknown
}

/// Enters a pool, of which nothing is known yet, but for some extents.
fn enter(open: Open<'_>, facts: &Facts, forgotten: &[u32]) {
    enter_with(open, facts, &[], forgotten);
}

/// Enters a pool whose extents have these digests.
fn enter_with(open: Open<'_>, facts: &Facts, digests: &[Option<u128>], forgotten: &[u32]) {
    let mut index = open();
    index.keep_plain();
    let mut found = SlotSet::new(facts.slots() as usize);
    index.look_up(&mut unknown(facts), digests, &mut found).unwrap();
    index.forget(&mut forgotten.iter().copied().map(ExtentId));
    index.update(facts, digests).unwrap();
    assert!(index.is_usable());
}

/// Which slots of a pool an index knows; it must know them as they are.
fn known(open: Open<'_>, facts: &Facts) -> Vec<Slot> {
    known_with(open, facts, &[])
}

/// Which slots of a pool whose extents have these digests an index knows.
fn known_with(open: Open<'_>, facts: &Facts, digests: &[Option<u128>]) -> Vec<Slot> {
    let (mut looked_up, mut found) = (unknown(facts), SlotSet::new(facts.slots() as usize));
    open().look_up(&mut looked_up, digests, &mut found).unwrap();
    let slots: Vec<Slot> = range::each(facts.all_slots())
        .filter(|slot| found.contains(*slot))
        .collect();
    for slot in &slots {
        let (is, should) = (looked_up.fingerprints.get(*slot), facts.fingerprints.get(*slot));
        assert_eq!(is, should, "slot {slot}");
    }
    slots
}

fn fingerprints_come_back(open: Open<'_>) {
    // Extents in several records.
    let places = [0..8, 8..16, 9000..9040, 40_000..40_004];
    let facts = pool(&places, 7, 1);
    assert!(known(open, &facts).is_empty());
    enter(open, &facts, &[1]);
    let all: Vec<Slot> = range::each(facts.all_slots()).collect();
    let but_the_forgotten: Vec<Slot> = all.iter().copied().filter(|slot| !(8..16).contains(&slot.0)).collect();
    assert_eq!(known(open, &facts), but_the_forgotten);
    enter(open, &facts, &[]);
    assert_eq!(known(open, &facts), all);
    // What is known already stays as it is.
    let mut partly = pool(&places, 7, 500);
    let mut found = SlotSet::new(partly.slots() as usize);
    found.insert(Slot(3));
    let before = partly.fingerprints.get(Slot(3));
    open().look_up(&mut partly, &[], &mut found).unwrap();
    assert_eq!(partly.fingerprints.get(Slot(3)), before);
    assert_eq!(partly.fingerprints.get(Slot(4)), facts.fingerprints.get(Slot(4)));
}

fn another_extent_is_not_taken_for_one(open: Open<'_>) {
    let facts = pool(&[0..8, 8..16, 16..24, 40..48], 7, 1);
    enter(open, &facts, &[]);
    assert!(
        known(open, &pool(&[0..8, 8..16], 8, 1)).is_empty(),
        "of another generation"
    );
    assert!(known(open, &pool(&[0..9], 7, 1)).is_empty(), "of another length");
    assert!(known(open, &pool(&[1..8], 7, 1)).is_empty(), "at another place");
    // What lies where extents were takes their place; the others stay.
    enter(open, &pool(&[4..12, 24..32], 9, 700), &[]);
    assert_eq!(known(open, &facts), (16..32).map(Slot).collect::<Vec<_>>());
    assert_eq!(known(open, &pool(&[4..12, 24..32], 9, 700)).len(), 16);
    let mut unchecked = pool(&[16..24], 7, 17);
    unchecked.extents[0].class.checksummed = false;
    assert!(
        known(open, &unchecked).is_empty(),
        "its address does not tell its content"
    );
}

fn other_checksums_are_those_of_another_extent(open: Open<'_>) {
    let facts = pool(&[0..8, 8..16, 16..24], 7, 1);
    let digests = [Some(1), Some(2), None];
    enter_with(open, &facts, &digests, &[]);
    assert_eq!(known_with(open, &facts, &digests).len(), 24);
    let kept = |digests: &[Option<u128>]| {
        let slots = known_with(open, &facts, digests);
        slots
            .iter()
            .map(|slot| slot.0 / 8)
            .collect::<std::collections::BTreeSet<u32>>()
    };
    assert_eq!(kept(&[Some(1), Some(9), None]), [0, 2].into());
    assert_eq!(kept(&[None, Some(2), Some(3)]), [1].into());
    assert_eq!(kept(&[]), [2].into());
    // The extent of a copy takes the place of the other one.
    let copy = pool(&[0..8, 8..16, 16..24], 7, 300);
    let digests = [Some(1), Some(9), None];
    enter_with(open, &copy, &digests, &[0, 2]);
    let own: Vec<Slot> = (8..16).map(Slot).collect();
    let mut looked_up = unknown(&copy);
    let mut found = SlotSet::new(24);
    open().look_up(&mut looked_up, &digests, &mut found).unwrap();
    for slot in own {
        assert_eq!(looked_up.fingerprints.get(slot), copy.fingerprints.get(slot));
    }
}

fn chunks_are_found_by_their_ids(open: Open<'_>) {
    let (one, other) = (pool(&[0..64], 7, 1), pool(&[100..164], 7, 5000));
    let mut index = open();
    // Fingerprints that the filesystem has are not remembered, chunks are.
    for facts in [&one, &other] {
        index.forget(&mut std::iter::empty());
        index.update(facts, &[]).unwrap();
    }
    drop(index);
    assert!(known(open, &one).is_empty());
    let mut ids = Vec::new();
    Chunker::default().cut(&one.fingerprints.range(Slot::range(0..64)), |chunk: Chunk| {
        ids.push(chunk.weak_id);
    });
    assert!(ids.len() > 2);
    let index = open();
    assert_eq!(index.extents_with(&|id| ids.contains(&id)).unwrap(), [0]);
    let both: Vec<u64> = index.extents_with(&|_| true).unwrap();
    assert_eq!(both, [0, 100 * BLOCK_BYTES]);
    assert!(index.extents_with(&|_| false).unwrap().is_empty());
}

fn commit(number: u32, hash: u8) -> Committed {
    Committed {
        commit: Commit {
            number: CommitNumber(number),
            store_end: StoreBlock(100),
            ..Commit::default()
        },
        location: CommitLocation {
            offset: 0,
            length: 1,
            body_hash: [hash; 32],
        },
        ..Committed::default()
    }
}

fn what_archives_hold_is_known_for_that_very_commit(open: Open<'_>) {
    const ARCHIVE: [u8; 16] = [3; 16];
    let facts = pool(&[0..8, 8..16, 40..48], 7, 1);
    let digests = [Some(1), Some(2), None];
    let stored = |content, slot| KnownSlots {
        slot: Slot(slot),
        blocks: 8,
        content,
    };
    let entered = [
        stored(Content::Stored(StoreBlock(50)), 0),
        stored(Content::Zeros, 8),
        stored(Content::Stored(StoreBlock(60)), 16),
    ];
    let remember = |is_news: bool| {
        let mut known = entered.iter().map(|slots| StoredSlots { slots: *slots, is_news });
        open()
            .remember_stored(&ARCHIVE, &commit(1, 1), &facts, &digests, &mut known)
            .unwrap();
    };
    let known = |archive: &[u8; 16], commits: &[Committed], digests: &[Option<u128>]| -> Vec<KnownSlots> {
        let known = open().stored(archive, commits, &facts, digests).unwrap();
        known.iter().copied().collect()
    };
    remember(false);
    assert_eq!(known(&ARCHIVE, &[commit(1, 1)], &digests), []);
    remember(true);
    // An extent without a digest may be another one.
    let all = [commit(0, 9), commit(1, 1)];
    assert_eq!(known(&ARCHIVE, &all, &digests), entered[..2]);
    assert_eq!(known(&ARCHIVE, &all, &[Some(1), Some(4), Some(5)]), entered[..1]);
    assert_eq!(known(&ARCHIVE, &[commit(1, 2)], &digests), [], "of another commit");
    assert_eq!(known(&ARCHIVE, &[commit(2, 1)], &digests), [], "of another number");
    assert_eq!(known(&[4; 16], &all, &digests), [], "of another archive");
}

#[test]
fn indexes_conform() {
    let checks: [fn(Open<'_>); 5] = [
        fingerprints_come_back,
        another_extent_is_not_taken_for_one,
        other_checksums_are_those_of_another_extent,
        chunks_are_found_by_their_ids,
        what_archives_hold_is_known_for_that_very_commit,
    ];
    for check in checks {
        let memory = MemoryIndex::default();
        check(&|| memory.open(FingerprintFunction::Crc32c));
        let folder = tempfile::tempdir().unwrap();
        check(&|| {
            index::open(
                folder.path(),
                [1; 16],
                Some(FingerprintFunction::Crc32c),
                &Silent::default(),
            )
            .unwrap()
        });
    }
}
