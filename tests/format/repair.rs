// Goal: up to what parity promises, any damage heals byte for byte; beyond it, what is healed is what was, and what is not is said. Method: archives
// with parity, damaged in every way and at every place, repaired into a copy and in place.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use proptest::prelude::*;
use vmfold::archive::parity::{Group, ParityPlace, geometry_in};
use vmfold::archive::record::{RecordHeader, RecordKind};
use vmfold::error::Error;
use vmfold::exec::repair::Healer;
use vmfold::monitor::Silent;
use vmfold::ops::export::{ExportOptions, export_on};
use vmfold::ops::protect::{ProtectOptions, protect_on};
use vmfold::ops::repair::{RepairOptions, RepairTo, repair};
use vmfold::parity::geometry::Geometry;
use vmfold::report::Repaired;
use vmfold::store::{MemoryStore, Store};
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
        sealing: vmfold::ops::export::Sealing::default(),
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

/// A PARITY record with any body.
fn parity_record(like: &RecordHeader, sequence: u64, mut body: Vec<u8>) -> Vec<u8> {
    let header = RecordHeader::of_body(RecordKind::Parity, like.lane, like.epoch, sequence, &mut body).unwrap();
    [&header.encode()[..], &body].concat()
}

fn last_parity(bytes: &[u8]) -> (RecordHeader, Geometry) {
    let parity = records(bytes)
        .into_iter()
        .rfind(|record| record.header.kind == RecordKind::Parity)
        .unwrap();
    (parity.header, geometry_in(&parity.body).unwrap().0)
}

/// Geometries whose checksums are right and whose numbers are hostile, alone and very many together: nothing that is intact changes, and it takes
/// time in proportion.
#[test]
fn hostile_geometries_cost_nothing() {
    let was = archive(60, 5);
    let (header, good) = last_parity(&was);
    let hostile = [
        Geometry {
            place: good.place + (1 << 20),
            ..good
        },
        Geometry {
            offset: 4096,
            length: good.length - 4096,
            ..good
        },
        Geometry {
            length: 1 << 29,
            place: 1 << 30,
            ..good
        },
        Geometry {
            length: 1 << 29,
            place: 1 << 29,
            stored: 2048,
            ..good
        },
        Geometry {
            place: 1 << 61,
            sequence: 1 << 61,
            ..good
        },
        Geometry {
            stored: 2048,
            records: 64,
            ..good
        },
        Geometry {
            headers: 1 << 16,
            ..good
        },
        Geometry {
            percent: 100,
            stored: 1,
            records: 1,
            ..good
        },
        Geometry { commit: None, ..good },
        Geometry {
            lane: [9; 16],
            epoch: 3,
            ..good
        },
    ];
    let body = |geometry: &Geometry| {
        let mut body = Vec::new();
        geometry.put(0, &mut body);
        body.resize(20_000, 7);
        geometry.put(0, &mut body);
        body
    };
    let check = |bytes: &[u8], case: &str| {
        let (copy, _) = repaired(bytes);
        assert!(copy.starts_with(&was), "{case}");
    };
    let place = usize::try_from(good.length / 2).unwrap();
    let bad = damaged(&was, place..place + 3000, 1);
    for geometry in &hostile {
        let record = parity_record(&header, 1 << 40, body(geometry));
        check(&[&was[..], &record].concat(), &format!("{geometry:?}"));
        // What is damaged heals beside it.
        check(&[&bad[..], &record].concat(), &format!("damaged, {geometry:?}"));
    }
    let many = (0..300u64).flat_map(|number| {
        let geometry = Geometry {
            sequence: 1000 * number,
            ..hostile[usize::try_from(number % 10).unwrap()]
        };
        parity_record(&header, (1 << 40) + number, body(&geometry))
    });
    let bytes: Vec<u8> = was.iter().copied().chain(many).collect();
    check(&bytes, "many");
}

/// Parity of other bytes: it would heal what is intact into something else, and must not.
#[test]
fn an_intact_record_stays_whatever_parity_says() {
    let was = archive(60, 5);
    let (header, good) = last_parity(&was);
    let mut other = was.clone();
    other[8192..60_000].fill(0x33);
    let mut group = Group::of(&Geometry {
        length: good.length,
        ..good
    });
    group.push(&other[..usize::try_from(good.length).unwrap()]);
    let full = group.finish(Some(60)).unwrap();
    let place = ParityPlace {
        offset: was.len() as u64,
        sequence: 1 << 40,
        lane: header.lane,
        epoch: header.epoch,
        commit: None,
    };
    let geometry = full.geometry(&place);
    let mut forged = was.clone();
    for number in 0..geometry.records {
        forged.extend(parity_record(
            &header,
            place.sequence + u64::from(number),
            full.body(&geometry, number),
        ));
    }
    let (copy, _) = repaired(&forged);
    assert!(copy.starts_with(&was));
    // What is damaged heals by what is right.
    forged[20_000..20_100].fill(1);
    let (copy, _) = repaired(&forged);
    assert!(copy.starts_with(&was));
}

/// A store of which some bytes cannot be read, as a disk with bad sectors gives them.
#[derive(Debug)]
struct BadSectors {
    inner: MemoryStore,
    bad: Vec<u64>,
}

impl Store for BadSectors {
    fn path(&self) -> &Path {
        self.inner.path()
    }
    fn length(&self) -> std::io::Result<Option<u64>> {
        self.inner.length()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
        let sectors = offset / 4096..(offset + buffer.len() as u64).div_ceil(4096);
        if self.bad.iter().any(|sector| sectors.contains(sector)) {
            return Err(std::io::Error::from_raw_os_error(libc::EIO));
        }
        self.inner.read_at(offset, buffer)
    }
    fn append(&self, _: &[u8]) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
    fn settle(&self) -> std::io::Result<()> {
        Ok(())
    }
    fn truncate(&self, _: u64) -> std::io::Result<()> {
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn sectors_that_cannot_be_read_heal() {
    let was = archive(900, 5);
    let last = was.len() as u64 / 4096;
    let store = BadSectors {
        inner: MemoryStore::of(was.clone()),
        bad: vec![0, 17, 18, 400, 901, last - 3, last],
    };
    let silent = Silent::default();
    let healer = Healer::new(Arc::new(store), None, tempfile::tempfile().unwrap(), &silent).unwrap();
    let (view, healing) = healer.heal().unwrap();
    let mut healed = vec![0; usize::try_from(view.length()).unwrap()];
    view.read_exact_at(0, &mut healed).unwrap();
    assert!(healed == was, "{healing:?}");
}

#[test]
fn verify_says_what_parity_can_do() {
    let was = archive(900, 5);
    let state = verify(&was).unwrap().parity.unwrap();
    assert_eq!((state.percent, state.lost_bytes, state.heals), (5, 0, true));
    assert!(state.spare_bytes * 20 >= state.protected_bytes, "{state:?}");
    let mut bad = was.clone();
    bad[100_000..180_000].fill(1);
    let less = verify(&bad).unwrap().parity.unwrap();
    assert!(
        less.heals && less.lost_bytes >= 80_000 && less.spare_bytes < state.spare_bytes,
        "{less:?}"
    );
    bad[100_000..900_000].fill(1);
    let none = verify(&bad).unwrap().parity.unwrap();
    assert!(!none.heals && none.spare_bytes == 0, "{none:?}");
    assert!(verify(&crate::scene::two_commits().0).unwrap().parity.is_none());
}

/// What an interrupted repair in place left is removed, or ended, or refused if another put it there.
#[test]
fn what_an_interrupted_repair_left_is_seen() {
    let folder = scratch();
    let (path, journal) = (folder.path().join("a"), folder.path().join(".a.vmfold-repair"));
    let was = archive(60, 5);
    let mut bad = was.clone();
    bad[5000..6000].fill(3);
    let run = |to| {
        let options = RepairOptions {
            archive: path.clone(),
            to,
            from: None,
        };
        repair(&options, &Silent::default())
    };
    for left in [&b""[..], &[7; 10_000]] {
        std::fs::write(&path, &bad).unwrap();
        std::fs::write(&journal, left).unwrap();
        assert!(run(RepairTo::Nowhere).unwrap().damage.is_empty());
        assert!(run(RepairTo::InPlace).unwrap().in_place);
        assert!(std::fs::read(&path).unwrap() == was && !journal.exists());
    }
    std::os::unix::fs::symlink(&path, &journal).unwrap();
    assert!(run(RepairTo::InPlace).is_err());
    assert!(std::fs::read(&path).unwrap() == was && journal.is_symlink());
    std::fs::remove_file(&journal).unwrap();
    std::fs::write(&journal, "").unwrap();
    if std::os::unix::fs::chown(&journal, Some(12_345), None).is_ok() {
        assert!(matches!(run(RepairTo::InPlace), Err(Error::OfAnother { .. })));
        assert!(journal.exists());
    }
}
