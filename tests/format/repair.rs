// Goal: up to what parity promises, any damage heals byte for byte; beyond it, what is healed is what was, and what is not is said. Method: archives
// with parity, damaged in every way and at every place, repaired into a copy and in place.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vmfold::archive::record::RecordKind;
use vmfold::error::Error;
use vmfold::monitor::Silent;
use vmfold::ops::export::{ExportOptions, export_on};
use vmfold::ops::protect::{ProtectOptions, protect_on};
use vmfold::ops::repair::{RepairOptions, RepairTo, repair};
use vmfold::report::Repaired;
use vmfold::store::MemoryStore;
use vmfold::testing::simulated::INCOMPRESSIBLE;

use crate::scene::{Scene, is_intact, records, scratch, verify};

/// An archive of one image of so many blocks that cannot be compressed, with parity.
fn archive(blocks: u64, percent: u8) -> Vec<u8> {
    let scene = Scene::empty();
    scene.add_image((0..blocks).map(|n| INCOMPRESSIBLE + n).collect());
    exported(&scene, &[], Some(percent))
}

fn exported(scene: &Scene, before: &[u8], parity: Option<u8>) -> Vec<u8> {
    let store = Arc::new(MemoryStore::of(before.to_vec()));
    let options = ExportOptions {
        parity,
        ..scene.options()
    };
    export_on(scene.pool(false), &options, Arc::clone(&store) as _, &Silent::default()).unwrap();
    store.to_vec()
}

fn protected(before: &[u8], percent: u8, again: bool) -> Vec<u8> {
    let store = Arc::new(MemoryStore::of(before.to_vec()));
    let options = ProtectOptions {
        sealing: Default::default(),
        archive: "memory".into(),
        percent,
        again,
    };
    protect_on(Arc::clone(&store) as _, &options, &Silent::default()).unwrap();
    store.to_vec()
}

/// Repairs an archive into a copy, and in place, which must give the same. Returns it, and what was said of it.
fn repaired_from(bytes: &[u8], second: Option<&[u8]>) -> (Vec<u8>, Repaired) {
    let folder = scratch();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("damaged"), bytes).unwrap();
    let from = second.map(|second| {
        std::fs::write(path("second"), second).unwrap();
        path("second")
    });
    let run = |to| {
        let options = RepairOptions {
            archive: path("damaged"),
            to,
            from: from.clone(),
        };
        repair(&options, &Silent::default()).unwrap()
    };
    let dry = run(RepairTo::Nowhere);
    let report = run(RepairTo::Copy(path("copy")));
    assert!(
        std::fs::read(path("damaged")).unwrap() == bytes,
        "the archive is only read"
    );
    let copy = std::fs::read(path("copy")).unwrap();
    assert_eq!(dry.damage, report.damage);
    let in_place = run(RepairTo::InPlace);
    assert_eq!(in_place.damage, report.damage);
    assert!(
        std::fs::read(path("damaged")).unwrap() == copy,
        "in place is another than the copy"
    );
    assert_eq!(in_place.in_place, copy != bytes);
    assert_eq!(
        names(folder.path()),
        if second.is_some() {
            vec!["copy", "damaged", "second"]
        } else {
            vec!["copy", "damaged"]
        }
    );
    (copy, report)
}

fn repaired(bytes: &[u8]) -> (Vec<u8>, Repaired) {
    repaired_from(bytes, None)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Damages a range in one of the ways that there are.
fn damaged(bytes: &[u8], range: Range<usize>, how: u8) -> Vec<u8> {
    let mut damaged = bytes.to_vec();
    match how {
        0 => damaged[range].iter_mut().for_each(|byte| *byte ^= 0x5a),
        1 => damaged[range].fill(0),
        2 => drop(damaged.drain(range)),
        _ => {
            let twice = damaged[range.clone()].to_vec();
            drop(damaged.splice(range.start..range.start, twice));
        }
    }
    damaged
}

fn check_heals(was: &[u8], damaged: &[u8], case: &str) {
    let (healed, report) = repaired(damaged);
    assert!(report.damage.is_empty(), "{case}: {report}");
    assert!(healed == *was, "{case}: it is not what it was: {report}");
}

#[test]
fn an_intact_archive_stays_as_it_is() {
    for percent in [5, 100] {
        let was = archive(40, percent);
        let (copy, report) = repaired(&was);
        assert!(copy == was && report.damage.is_empty());
        assert_eq!((report.lost_bytes, report.healed_bytes, report.moved_bytes), (0, 0, 0));
        assert_eq!(report.percent, percent);
    }
}

/// Each record, its header, its end, and each boundary between two: changed, zeroed, missing and doubled.
#[test]
fn damage_at_every_record_heals() {
    let was = archive(60, 5);
    for record in records(&was) {
        let Range { start, end } = record.range;
        let ranges = [
            start..start + 8,
            start + 90..start + 100,
            end - 5..end,
            start.saturating_sub(50)..start + 60,
        ];
        for (range, how) in ranges
            .iter()
            .flat_map(|range| (0..4).map(move |how| (range.clone(), how)))
        {
            let range = range.start..range.end.min(was.len());
            let case = format!("{:?} {range:?} {how}", record.header.kind);
            check_heals(&was, &damaged(&was, range, how), &case);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// Any one stretch of the percentage that was asked for.
    #[test]
    fn any_stretch_heals(at in any::<prop::sample::Index>(), length in any::<prop::sample::Index>(), how in 0u8..4, blocks in 1u64..400, percent in 1u8..30) {
        let was = archive(blocks, percent);
        let length_max = was.len() * usize::from(percent) / 100 / 2;
        let length = 1 + length.index(length_max.max(1));
        let at = at.index(was.len());
        let range = at..was.len().min(at + length);
        let case = format!("{range:?} of {} at {percent} %, way {how}", was.len());
        check_heals(&was, &damaged(&was, range, how), &case);
    }
}

/// The whole percentage at once, where it hurts most: across the group's end, its parity, and what follows.
#[test]
fn the_largest_stretch_heals_wherever_it_begins() {
    let was = archive(1500, 10);
    let parity: Vec<Range<usize>> = records(&was)
        .into_iter()
        .filter(|record| record.header.kind == RecordKind::Parity)
        .map(|record| record.range)
        .collect();
    let group = parity[0].start;
    let length = group / 10;
    let starts = [
        0,
        1,
        4095,
        4096,
        group / 2,
        group - length,
        group - length / 2,
        group - 5000,
        group,
        was.len() - length,
    ];
    for (start, how) in starts.into_iter().flat_map(|start| (0..3).map(move |how| (start, how))) {
        let range = start..start + length;
        check_heals(
            &was,
            &damaged(&was, range.clone(), how),
            &format!("{range:?} way {how}"),
        );
    }
}

#[test]
fn several_exports_and_groups_heal_together() {
    let scene = Scene::empty();
    scene.add_image((0..300).map(|n| INCOMPRESSIBLE + n).collect());
    let first = exported(&scene, &[], Some(10));
    scene.add_image((0..200).map(|n| INCOMPRESSIBLE + 1000 + n).collect());
    let second = exported(&scene, &first, None);
    scene.add_image((0..100).map(|n| INCOMPRESSIBLE + 2000 + n).collect());
    let was = exported(&scene, &second, None);
    let mut bad = was.clone();
    for at in [
        100,
        first.len() - 20_000,
        first.len() + 500,
        second.len() - 100,
        second.len() + 3000,
        was.len() - 150,
    ] {
        bad[at..at + 40].fill(0x77);
    }
    check_heals(&was, &bad, "flips in each");
    // Bytes that are missing in one, and stand twice in another.
    bad.drain(first.len() / 2..first.len() / 2 + 1000);
    let at = first.len() + 100_000;
    let twice = bad[at..at + 3000].to_vec();
    bad.splice(at..at, twice);
    check_heals(&was, &bad, "moved");
    bad.truncate(bad.len() - 300);
    check_heals(&was, &bad, "cut");
}

#[test]
fn what_has_no_parity_stays_and_is_said() {
    let scene = Scene::empty();
    scene.add_image((0..100).map(|n| INCOMPRESSIBLE + n).collect());
    let first = exported(&scene, &[], Some(5));
    scene.grow();
    let was = exported(&scene, &first, Some(0));
    let mut bad = was.clone();
    bad[5000..5100].fill(1);
    check_heals(&was, &bad, "before an export without parity");
    bad[first.len() + 5000] ^= 1;
    let (copy, report) = repaired(&bad);
    assert_eq!(report.damage.len(), 1, "{report}");
    assert!(copy[..first.len()] == was[..first.len()] && copy.len() == was.len());
    // Missing bytes in what has parity move what has none.
    let mut cut = was.clone();
    cut.drain(5000..6000);
    check_heals(&was, &cut, "moved");
    let none = exported(&scene, &[], None);
    let (copy, report) = repaired(&none);
    assert!(copy == none && report.percent == 0 && report.damage.is_empty());
}

#[test]
fn too_much_damage_is_said_and_makes_nothing_worse() {
    let was = archive(400, 5);
    let mut bad = was.clone();
    bad[100_000..400_000].fill(9);
    let (copy, report) = repaired(&bad);
    assert!(!report.damage.is_empty());
    assert!(copy[..100_000] == was[..100_000] && copy[400_000..] == was[400_000..]);
    assert!(!is_intact(&verify(&copy).unwrap()));
}

#[test]
fn another_percentage_over_the_same_bytes_heals_more() {
    let was = protected(&archive(400, 2), 20, true);
    let mut bad = was.clone();
    bad[100_000..300_000].fill(9);
    check_heals(&was, &bad, "by the second parity");
}

#[test]
fn another_copy_heals_what_parity_cannot() {
    let was = archive(400, 5);
    let (mut bad, mut second) = (was.clone(), was.clone());
    bad[100_000..700_000].fill(9);
    second[800_000..1_200_000].fill(3);
    second.drain(5000..5100);
    let (copy, report) = repaired_from(&bad, Some(&second));
    assert!(copy == was && report.damage.is_empty(), "{report}");
    // Without any parity, record by record.
    let scene = Scene::new();
    let was = exported(&scene, &[], None);
    scene.grow();
    let longer = exported(&scene, &was, None);
    for (was, second) in [(&was, &longer), (&longer, &longer), (&longer, &was)] {
        for record in records(&was[..was.len().min(second.len())]) {
            let mut bad = was.clone();
            bad[record.range.clone()].fill(7);
            let (copy, report) = repaired_from(&bad, Some(second));
            assert!(
                copy == *was && report.damage.is_empty(),
                "{:?}: {report}",
                record.header.kind
            );
        }
    }
}

#[test]
fn nothing_is_replaced_and_no_other_file_is_touched() {
    let folder = scratch();
    let (path, to) = (folder.path().join("a"), folder.path().join("b"));
    let was = archive(30, 5);
    std::fs::write(&path, &was).unwrap();
    std::fs::write(&to, "mine").unwrap();
    let run = |to| {
        let options = RepairOptions {
            archive: path.clone(),
            to,
            from: None,
        };
        repair(&options, &Silent::default())
    };
    assert!(matches!(run(RepairTo::Copy(to.clone())), Err(Error::Exists { .. })));
    assert_eq!(std::fs::read(&to).unwrap(), b"mine");
    std::fs::write(&path, "no archive at all").unwrap();
    for to in [
        RepairTo::Nowhere,
        RepairTo::InPlace,
        RepairTo::Copy(folder.path().join("c")),
    ] {
        assert!(matches!(run(to), Err(Error::NotAnArchive { .. })));
    }
    assert_eq!(names(folder.path()), ["a", "b"]);
}
