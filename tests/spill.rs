//! Lists that lie in files: they hold what they would hold in memory, and plans made with them are the same.

mod common;

use std::convert::Infallible;
use std::path::PathBuf;

use common::{Mounted, can_mount};
use proptest::prelude::*;
use vmfold::block::bytes;
use vmfold::facts::{Extent, Facts, Proof, Reference, SharedList};
use vmfold::fingerprint::Fingerprints;
use vmfold::numbers::{ExtentId, ImageId, Slot};
use vmfold::plan::{PlanOptions, ReclaimPlan, plan_proved};
use vmfold::spill::{Budget, SpillMap, SpillVec};
use vmfold::testing::simulated::PLAIN;

/// Large enough that few make a list that may lie in a file.
type Item = [u64; 1024];

/// Does something with so many bytes of lists in memory.
fn limited<T>(bytes: usize, does: impl FnOnce(&Budget, &tempfile::TempDir) -> T) -> T {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    does(&Budget::new(bytes, folder.path().to_owned()), &folder)
}

#[derive(Debug, Clone)]
enum Change {
    Push(u64),
    Extend(usize, u64),
    Truncate(usize),
    Shrink,
    Clone,
    Sort,
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        4 => any::<u64>().prop_map(Change::Push),
        4 => (0usize..400, any::<u64>()).prop_map(|(count, value)| Change::Extend(count, value)),
        2 => (0usize..800).prop_map(Change::Truncate),
        2 => Just(Change::Shrink),
        1 => Just(Change::Clone),
        1 => Just(Change::Sort),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_list_holds_what_it_would_in_memory(changes in prop::collection::vec(change(), 1..30), limit_mib in 0usize..6) {
        limited(limit_mib << 20, |budget, _| {
            let (mut list, mut expected): (SpillVec<Item>, Vec<Item>) = (SpillVec::new_in(budget), Vec::new());
            for change in changes {
                match change {
                    Change::Push(value) => {
                        list.push([value; 1024]);
                        expected.push([value; 1024]);
                    }
                    Change::Extend(count, value) => {
                        let all = (value >> 1..).take(count).map(|value| [value; 1024]);
                        list.extend(all.clone());
                        expected.extend(all);
                    }
                    Change::Truncate(count) => {
                        list.truncate(count);
                        expected.truncate(count);
                    }
                    Change::Shrink => {
                        list.shrink_to_fit();
                        expected.shrink_to_fit();
                    }
                    Change::Clone => list = list.clone(),
                    Change::Sort => {
                        list.sort_unstable();
                        expected.sort_unstable();
                    }
                }
                // In one comparison: printing what differs would take longer than anything else.
                prop_assert!(list[..] == expected[..]);
            }
            Ok(())
        })?;
    }
}

#[test]
fn what_is_beyond_the_limit_lies_in_files() {
    limited(4 << 20, |budget, folder| {
        let small: SpillVec<u8> = SpillVec::of_in(1, 3 << 20, budget);
        assert_eq!(budget.bytes_in_files(), 0);
        let large: SpillVec<u8> = SpillVec::of_in(2, 3 << 20, budget);
        assert_eq!(budget.bytes_in_files(), 3 << 20);
        // One that grows over it moves.
        let mut growing: SpillVec<u8> = SpillVec::with_capacity_in(1 << 20, budget);
        growing.resize(1 << 20, 3);
        assert_eq!(budget.bytes_in_files(), 3 << 20);
        growing.reserve_exact(1 << 20);
        assert_eq!(budget.bytes_in_files(), 5 << 20);
        let mut map: SpillMap<u32, u64> = SpillMap::new_in(budget.clone());
        map.extend((0..200_000).map(|number| (number, u64::from(number) * 3)));
        assert!(budget.bytes_in_files() > 5 << 20);
        assert!((0..200_000).all(|number| map.get(&number) == Some(&(u64::from(number) * 3))));
        assert!(small.iter().all(|byte| *byte == 1) && large.iter().all(|byte| *byte == 2));
        assert!(growing.len() == 1 << 20 && growing.iter().all(|byte| *byte == 3));
        // They have no name that someone else could come by.
        assert_eq!(std::fs::read_dir(folder.path()).expect("the folder").count(), 0);
        drop((small, large, growing, map));
        assert_eq!(budget.bytes_in_files(), 0);
    });
}

#[test]
fn without_a_folder_everything_is_in_memory() {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    std::fs::write(folder.path().join("file"), "").expect("a file");
    let budget = Budget::new(0, folder.path().join("file/no folder"));
    let mut list: SpillVec<u8> = SpillVec::of_in(7, 2 << 20, &budget);
    list.resize(5 << 20, 7);
    assert_eq!(budget.bytes_in_files(), 0);
    assert!(list.len() == 5 << 20 && list.iter().all(|byte| *byte == 7));
}

#[test]
fn each_run_has_a_budget_of_its_own() {
    limited(0, |files, _| {
        limited(usize::MAX, |memory, _| {
            let [one, other] = [files, memory].map(|budget| SpillVec::of_in(1u8, 2 << 20, budget));
            let counts = || (files.bytes_in_files(), memory.bytes_in_files());
            assert_eq!(counts(), (2 << 20, 0));
            // A copy is made from the same one, and what there is stays where it is.
            memory.set_bytes(0);
            let copy = other.clone();
            assert_eq!(counts(), (2 << 20, 2 << 20));
            assert!(one == other && one == copy);
            drop((one, copy));
            assert_eq!(counts(), (0, 0));
        });
    });
}

/// On btrfs, where writing to a page again takes room that there may not be, and where what images need comes first.
#[test]
fn files_have_their_room_and_leave_most_of_it() {
    if !can_mount() {
        return;
    }
    let btrfs = Mounted::new("mkfs.btrfs -q", "", 1024);
    let budget = Budget::new(0, btrfs.pool());
    let list: SpillVec<u8> = SpillVec::of_in(1, 2 << 20, &budget);
    assert_eq!(budget.bytes_in_files(), 2 << 20);
    let is_ours = |file: &PathBuf| std::fs::read_link(file).is_ok_and(|target| target.starts_with(btrfs.pool()));
    let files = std::fs::read_dir("/proc/self/fd").expect("the open files");
    let mut files = files.map(|file| file.expect("an open file").path()).filter(is_ours);
    let file = std::fs::File::open(files.next().expect("the file")).expect("the file, opened once more");
    let flags = vmfold::sys::inode_flags::inode_flags(&file).expect("its flags");
    assert!(flags.contains(rustix::fs::IFlags::NOCOW));
    // A quarter of what is free is too much.
    let most: SpillVec<u8> = SpillVec::with_capacity_in(512 << 20, &budget);
    assert_eq!(budget.bytes_in_files(), 2 << 20);
    drop((list, most));
}

/// Loses the files of lists and fingerprints, as a failing disk would have it, and reads on.
fn lose(what: &str) {
    const SLOTS: usize = 2 << 20;
    vmfold::sys::signals::explain_sigbus();
    limited(0, |budget, _| {
        let list: SpillVec<u8> = SpillVec::of_in(1, 2 << 20, budget);
        let fingerprints = Fingerprints::in_file(SLOTS, budget).expect("a file");
        for file in std::fs::read_dir("/proc/self/fd").expect("the open files") {
            let file = file.expect("an open file").path();
            let target = std::fs::read_link(&file).unwrap_or_default();
            if target.to_string_lossy().ends_with(" (deleted)") {
                let file = std::fs::File::options()
                    .write(true)
                    .open(file)
                    .expect("a file of its own");
                file.set_len(0).expect("a file that can be cut");
            }
        }
        let sum: u64 = match what {
            LIST => list.iter().map(|byte| u64::from(*byte)).sum(),
            _ => fingerprints.get(Slot(1 << 20)).into(),
        };
        panic!("they are still there: {sum}");
    });
}

const LIST: &str = "list";

#[test]
fn who_loses_what_does_not_fit_into_memory_says_so() {
    const LOSE: &str = "VMFOLD_TEST_LOSES";
    if let Ok(what) = std::env::var(LOSE) {
        return lose(&what);
    }
    for what in [LIST, "fingerprints"] {
        // It ends the process, so it has one of its own: this test once more.
        let output = std::process::Command::new(std::env::current_exe().expect("this program"))
            .args([
                "--exact",
                "who_loses_what_does_not_fit_into_memory_says_so",
                "--nocapture",
            ])
            .env(LOSE, what)
            .output()
            .expect("a process of its own");
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{what}: {stderr}");
        assert!(
            stderr.contains("error: what does not fit into memory lies in files beside the index"),
            "{what}: {stderr}"
        );
    }
}

/// A plan for enough extents that lists of them may lie in files, and how many bytes did on the way. Of every fourth, half is like the one
/// before.
fn plan(budget: &Budget) -> (ReclaimPlan, usize) {
    const EXTENTS: u32 = 40_000;
    const BLOCKS: u32 = 16;
    let number_of = |slot: u32| {
        let (extent, block) = (slot / BLOCKS, slot % BLOCKS);
        (extent - u32::from(extent % 4 == 3 && block < BLOCKS / 2)) * BLOCKS + block
    };
    let extents = (0..EXTENTS).map(|extent| Extent {
        address: u64::from(extent) * bytes(BLOCKS),
        disk_bytes: bytes(BLOCKS),
        generation: 1,
        first_slot: Slot(extent * BLOCKS),
        blocks: BLOCKS,
        class: PLAIN,
        pinned: None,
        compression_goal: None,
    });
    let references = (0..EXTENTS).map(|extent| Reference {
        image: ImageId(extent % 3),
        file_block: extent * BLOCKS,
        slot: Slot(extent * BLOCKS),
        blocks: BLOCKS,
        extent: ExtentId(extent),
        preallocated: false,
    });
    let mut facts = Facts::new(
        SpillVec::from_iter_in(extents, budget),
        SharedList::from_references_in(references, budget),
        0,
    );
    let fingerprint = |slot| (number_of(slot) + 1).wrapping_mul(0x9e37_79b9);
    facts.fingerprints = (0..EXTENTS * BLOCKS).map(fingerprint).collect::<Vec<_>>().into();
    let mut in_files = 0;
    let prove = |_: &Facts, slots: &[Slot]| {
        in_files = budget.bytes_in_files();
        let proof = |slot: &Slot| (*slot, Proof::from(u64::from(number_of(slot.0)).to_le_bytes()));
        Ok::<_, Infallible>(slots.iter().map(proof).collect())
    };
    let Ok(plan) = plan_proved(&mut facts, &PlanOptions::default(), &|| Ok(()), prove);
    (plan, in_files)
}

#[test]
fn plans_are_the_same_wherever_lists_lie() {
    let (in_memory, none) = limited(usize::MAX, |budget, _| plan(budget));
    let (in_files, bytes) = limited(0, |budget, _| plan(budget));
    assert!(none == 0 && bytes > 1 << 20, "{none} and {bytes} bytes in files");
    assert!(
        in_memory.eliminations.len() > 9000,
        "{} extents go",
        in_memory.eliminations.len()
    );
    assert_eq!(format!("{in_memory:?}"), format!("{in_files:?}"));
}
