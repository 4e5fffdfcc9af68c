//! Goal: what a plan does to a pool can be read. Method: small pools in a text notation, and their plans as snapshots.

pub(super) mod notation;

use insta::assert_snapshot;
use notation::{Pool, options, pools};
use proptest::prelude::*;

use super::{BATCH_BYTES, METADATA_BYTES_PER_REFERENCE, PlanOptions, REFERENCES_MAX, apply};
use crate::range;

/// What users get unless they choose otherwise; but images of a few blocks would not be allowed a second reference.
const USUAL: PlanOptions = PlanOptions {
    min_run_blocks: 2,
    keep_zeros: false,
    keep_preallocated: false,
    work_space_bytes: 1 << 30,
    batch_bytes: BATCH_BYTES,
    references_max: REFERENCES_MAX,
    references_per_gib_max: u32::MAX,
};

fn planned(pool: &str) -> String {
    Pool::of(pool).planned(&USUAL)
}

#[test]
fn of_two_equal_images_the_later_one_shares_with_the_first() {
    let plan = planned(
        "
        A  abcdefgh
        B  abcdefgh
        one  A
        two  B",
    );
    assert_snapshot!(plan, @r"
    frees 32 KiB, Duplicate 32 KiB
    batch 0, 32 KiB compared
      B goes, Duplicate: frees 32 KiB
        two 0..8 <- one 0..8
    ");
}

#[test]
fn what_a_clone_changed_goes_to_a_donor() {
    let plan = planned(
        "
        A  abcdefgh
        B  abcdxfgh
        template  A
        clone     B",
    );
    assert_snapshot!(plan, @r"
    frees 28 KiB, Duplicate 28 KiB
    rewrites 4 KiB; donors hold 4 KiB at most, 4 KiB must be free
    batch 1, 32 KiB compared
      donor 0 = x
      B goes, Duplicate: frees 28 KiB, rewrites 4096, metadata 512
        clone 0..4 <- template 0..4
        clone 4..5 <- donor 0 0..1
        clone 5..8 <- template 5..8
    ");
}

#[test]
fn zeros_become_holes() {
    let plan = planned(
        "
        A  abcd0000efgh
        one  A",
    );
    assert_snapshot!(plan, @r"
    frees 16 KiB, Zeros 16 KiB
    rewrites 32 KiB; donors hold 32 KiB at most, 32 KiB must be free
    batch 1, 48 KiB compared
      donor 0 = abcdefgh
      A goes, Zeros: frees 16 KiB, rewrites 32768, metadata 512
        one 0..4 <- donor 0 0..4
        one 4..8 <- hole
        one 8..12 <- donor 0 4..8
    ");
}

#[test]
fn zeros_that_are_to_stay_are_shared_only_with_what_they_are_amid() {
    let options = PlanOptions {
        keep_zeros: true,
        ..USUAL
    };
    let mut pool = Pool::of(
        "
        A  ab00cd
        B  ab00cd
        C  00000000
        one  A C
        two  B",
    );
    assert_snapshot!(pool.planned(&options), @r"
    frees 24 KiB, Duplicate 24 KiB
    batch 0, 24 KiB compared
      B goes, Duplicate: frees 24 KiB
        two 0..6 <- one 0..6
    ");
}

const PREALLOCATED: &str = "
        A  aaaaaaaa
        B  bcde
        C  bcde
        one  A[0..2] ~A[2..8] B
        two  ~C";

#[test]
fn preallocated_ranges_are_given_back() {
    assert_snapshot!(planned(PREALLOCATED), @r"
    frees 40 KiB, Preallocated 40 KiB
    rewrites 8 KiB; donors hold 8 KiB at most, 0 KiB must be free
    batch 0, 16 KiB compared
      C goes, Preallocated: frees 16 KiB
        two 0..4 <- hole
    batch 1, 32 KiB compared
      donor 0 = aa
      A goes, Preallocated: frees 24 KiB, rewrites 8192
        one 0..2 <- donor 0 0..2
        one 2..8 <- hole
    ");
}

#[test]
fn preallocated_ranges_that_are_to_stay_pin_their_extents() {
    let options = PlanOptions {
        keep_preallocated: true,
        ..USUAL
    };
    assert_snapshot!(Pool::of(PREALLOCATED).planned(&options), @r"
    frees 0 KiB
    pinned: 40 KiB Preallocated
    ");
}

#[test]
fn blocks_that_no_image_reaches_are_freed_once_the_others_moved() {
    let plan = planned(
        "
        A  abcdefghijklmnop
        one  A[0..2] -*12 A[14..16]
        two  A[0..2]",
    );
    assert_snapshot!(plan, @r"
    frees 48 KiB, Unreachable 48 KiB
    rewrites 16 KiB; donors hold 16 KiB at most, 16 KiB must be free
    batch 1, 24 KiB compared
      donor 0 = abop
      A goes, Unreachable: frees 48 KiB, rewrites 16384
        one 0..2 <- donor 0 0..2
        two 0..2 <- donor 0 0..2
        one 14..16 <- donor 0 2..4
    ");
}

#[test]
fn files_without_checksums_share_among_themselves_only() {
    let plan = planned(
        "
        A  abcdefgh
        B  abcdefgh nodatacow
        C  abcdefgh nodatacow
        one    A
        two    B
        three  C",
    );
    assert_snapshot!(plan, @r"
    frees 32 KiB, Duplicate 32 KiB
    batch 0, 32 KiB compared
      C goes, Duplicate: frees 32 KiB
        three 0..8 <- two 0..8
    ");
}

#[test]
fn groups_share_among_themselves_only() {
    let plan = planned(
        "
        A  abcdefgh group=1
        B  abcdefgh group=2
        C  abcdefgh group=2
        one    A
        two    B
        three  C",
    );
    assert_snapshot!(plan, @r"
    frees 32 KiB, Duplicate 32 KiB
    batch 0, 32 KiB compared
      C goes, Duplicate: frees 32 KiB
        three 0..8 <- two 0..8
    ");
}

#[test]
fn what_a_snapshot_holds_stays_and_others_share_with_it() {
    let plan = planned(
        "
        A  abcdefgh
        B  abcdefgh held
        C  abcdefgh held
        one    A
        two    B
        three  C",
    );
    assert_snapshot!(plan, @r"
    frees 32 KiB, Duplicate 32 KiB
    pinned: 32 KiB HeldByOthers
    batch 0, 32 KiB compared
      A goes, Duplicate: frees 32 KiB
        one 0..8 <- three 0..8
    ");
}

const FOUR_ALIKE: &str = "
        A  abcdefgh
        B  abcdefgh
        C  abcdefgh
        D  abcdefgh
        one    A
        two    B
        three  C
        four   D";

#[test]
fn an_extent_gets_no_more_references_than_it_may_have() {
    let options = PlanOptions {
        references_max: 2,
        ..USUAL
    };
    assert_snapshot!(Pool::of(FOUR_ALIKE).planned(&options), @r"
    frees 64 KiB, Duplicate 64 KiB
    batch 0, 64 KiB compared
      B goes, Duplicate: frees 32 KiB
        two 0..8 <- one 0..8
      D goes, Duplicate: frees 32 KiB
        four 0..8 <- three 0..8
    ");
}

#[test]
fn an_image_gets_no_more_references_than_it_may_have() {
    let mut pool = Pool::of(
        "
        A  abcdefgh
        B  abcdijklmnopefgh
        one  A
        two  B",
    );
    let limited = |references: u32| PlanOptions {
        // The second image has 16 blocks.
        references_per_gib_max: references * (1 << 18) / 16,
        ..USUAL
    };
    assert_snapshot!(pool.planned(&limited(3)), @r"
    frees 32 KiB, Duplicate 32 KiB
    batch 0, 32 KiB compared
      A goes, Duplicate: frees 32 KiB, metadata 256
        one 0..4 <- two 0..4
        one 4..8 <- two 12..16
    ");
    assert_snapshot!(pool.planned(&limited(2)), @"frees 0 KiB");
}

#[test]
fn where_blocks_are_freed_one_by_one_the_rest_of_an_extent_stays() {
    let mut pool = Pool::of(
        "
        A  abcdefgh
        B  abcdxfgh
        template  A
        clone     B",
    );
    pool.facts.frees_blocks = true;
    assert_snapshot!(pool.planned(&USUAL), @r"
    frees 28 KiB, Duplicate 28 KiB
    batch 0, 32 KiB compared
      B goes, Duplicate: frees 28 KiB, metadata 256
        clone 0..4 <- template 0..4
        clone 5..8 <- template 5..8
    ");
}

const LEAVES_MUCH: &str = "
        A  abcdefgh
        B  abcdrstu
        C  abcdvwxy
        one    A
        two    B
        three  C";

#[test]
fn donors_are_written_in_batches_that_fit() {
    let options = PlanOptions {
        work_space_bytes: 32 << 10,
        ..USUAL
    };
    assert_snapshot!(Pool::of(LEAVES_MUCH).planned(&options), @r"
    frees 32 KiB, Duplicate 32 KiB
    rewrites 32 KiB; donors hold 32 KiB at most, 16 KiB must be free
    batch 1, 32 KiB compared
      donor 0 = rstu
      B goes, Duplicate: frees 16 KiB, rewrites 16384, metadata 256
        two 0..4 <- one 0..4
        two 4..8 <- donor 0 0..4
    batch 2, 32 KiB compared
      donor 1 = vwxy
      C goes, Duplicate: frees 16 KiB, rewrites 16384, metadata 256
        three 0..4 <- one 0..4
        three 4..8 <- donor 1 0..4
    ");
}

#[test]
fn what_leaves_more_than_the_work_space_takes_stays() {
    let options = PlanOptions {
        work_space_bytes: 31 << 10,
        ..USUAL
    };
    assert_snapshot!(Pool::of(LEAVES_MUCH).planned(&options), @"frees 0 KiB");
}

#[test]
fn short_runs_that_only_look_alike_are_read_and_stay() {
    let plan = planned(
        "
        A  abcdefgh
        B  cDxyef
        one  A
        two  B",
    );
    assert_snapshot!(plan, @r"
    frees 12 KiB, Duplicate 12 KiB
    rewrites 12 KiB; donors hold 12 KiB at most, 12 KiB must be free
    batch 1, 24 KiB compared
      donor 0 = Dxy
      B goes, Duplicate: frees 12 KiB, rewrites 12288, metadata 512
        two 0..1 <- one 2..3
        two 1..4 <- donor 0 0..3
        two 4..6 <- one 4..6
    ");
}

#[test]
fn long_runs_are_taken_at_their_fingerprints_word_but_for_one_block() {
    let plan = planned(
        "
        A  abcdefghijklmnopqrst
        B  abCdefghijklmnopqrst
        one  A
        two  B",
    );
    assert_snapshot!(plan, @r"
    frees 80 KiB, Duplicate 80 KiB
    batch 0, 80 KiB compared
      B goes, Duplicate: frees 80 KiB
        two 0..20 <- one 0..20
    ");
}

#[test]
fn what_one_round_leaves_over_another_may_find() {
    let plan = planned(
        "
        A  abcdefghij
        B  klmnabcdefghij
        C  opklmnabcdefghijop
        one    A
        two    B
        three  C C",
    );
    assert_snapshot!(plan, @r"
    frees 104 KiB, Duplicate 104 KiB
    rewrites 64 KiB; donors hold 64 KiB at most, 64 KiB must be free
    batch 1, 240 KiB compared
      donor 0 = opklmnabcdefghij
      C goes, Duplicate: frees 8 KiB, rewrites 65536, metadata 512
        three 0..16 <- donor 0 0..16
        three 16..18 <- donor 0 0..2
        three 18..34 <- donor 0 0..16
        three 34..36 <- donor 0 0..2
      A goes, Duplicate: frees 40 KiB
        one 0..10 <- donor 0 6..16
      B goes, Duplicate: frees 56 KiB
        two 0..14 <- donor 0 2..16
    ");
}

#[test]
fn compressed_extents_share_with_others_and_count_what_they_take() {
    let plan = planned(
        "
        A  abcdefgh
        B  abcdefgh zstd
        C  abcdrstu zstd
        one    A
        two    B
        three  C",
    );
    assert_snapshot!(plan, @r"
    frees 24 KiB, Duplicate 24 KiB
    rewrites 8 KiB; donors hold 8 KiB at most, 0 KiB must be free
    batch 0, 32 KiB compared
      B goes, Duplicate: frees 16 KiB
        two 0..8 <- one 0..8
    batch 1, 32 KiB compared
      donor 0 = rstu
      C goes, Duplicate: frees 8 KiB, rewrites 8192, metadata 256
        three 0..4 <- one 0..4
        three 4..8 <- donor 0 0..4
    ");
}

#[test]
fn what_someone_asks_for_sets_what_runs_are_worth() {
    let with = |min_run_blocks| PlanOptions {
        min_run_blocks,
        ..USUAL
    };
    // Half of the shortest run for each of the two references that it adds; metadata alone where any run counts.
    assert_eq!(
        [1, 2, 16].map(|n| with(n).bytes_per_reference()),
        [METADATA_BYTES_PER_REFERENCE, 2048, 16 << 10]
    );
    // A 32nd at the default, and no more than all of it from 256 KiB on.
    assert_eq!([1, 2, 64, 1000].map(|n| with(n).rewrite_weight()), [4, 8, 256, 256]);
}

fn without_blocks_that_look_alike(text: &str) -> String {
    let line = |line: &str| {
        let (name, rest) = line.split_once(' ').unwrap();
        let is_extent = name.starts_with(|c: char| c.is_ascii_uppercase());
        format!(
            "{name} {}\n",
            if is_extent {
                rest.to_lowercase()
            } else {
                rest.to_owned()
            }
        )
    };
    text.lines().map(line).collect()
}

proptest! {
    /// Whatever a pool is like: what a plan leaves of it needs no plan.
    #[test]
    fn a_second_plan_has_nothing_to_do(text in pools(), options in options(), frees_blocks: bool) {
        // Long runs of blocks that only look alike are found out by the kernel, and there is none here.
        let mut pool = Pool::of(&without_blocks_that_look_alike(&text));
        pool.facts.frees_blocks = frees_blocks;
        let plan = pool.plan(&options);
        let applied = apply(&mut pool.facts, &plan.layout);
        let content = range::each(applied.facts.all_slots()).map(|slot| pool.content[applied.origins().slot(slot).index()]);
        (pool.content, pool.facts) = (content.collect(), applied.facts);
        let again = pool.plan(&options);
        prop_assert_eq!(&again.eliminations[..], &[]);
    }

    /// A plan is the same every time.
    #[test]
    fn plans_are_the_same_every_time(text in pools(), options in options()) {
        let planned = || Pool::of(&text).planned(&options);
        prop_assert_eq!(planned(), planned());
    }
}
