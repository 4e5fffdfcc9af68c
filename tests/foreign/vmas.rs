//! VMA archives: whatever the order of their clusters, and what of them is missing.

use super::*;

#[test]
fn a_vma_archive_comes_back_whatever_the_order_of_its_clusters() {
    for order in [0, 3, 7] {
        for per_extent in [1, 2, 58, 59] {
            let maker = some_vma(order, per_extent);
            let (whole, result) = read(&maker.make());
            result.unwrap();
            assert!(
                whole == expected_of(&maker),
                "order {order}, {per_extent} clusters an extent"
            );
        }
    }
}

#[test]
fn what_is_missing_or_there_twice_is_named() {
    let problem = |maker: VmaMaker<'_>| read(&maker.make()).1.unwrap_err().to_string();
    let with = |change: fn(&mut VmaMaker<'static>)| {
        let mut maker = some_vma(0, 5);
        change(&mut maker);
        problem(maker)
    };
    for (text, part) in [
        (
            with(|maker| maker.dropped = Some((1, 3))),
            "in `drive-efidisk0.raw`: 1 of its clusters are missing, the first at byte 196608",
        ),
        (with(|maker| maker.doubled = Some((0, 2))), "a cluster that came before"),
        (
            with(|maker| maker.sizes = vec![(0, 600_000)]),
            "in `drive-scsi0.raw`: 2 of its clusters are missing",
        ),
        (
            with(|maker| maker.sizes = vec![(0, 4096)]),
            "a cluster behind the end of its device",
        ),
        (
            with(|maker| maker.sizes = vec![(0, u64::MAX)]),
            "more than vmfold takes",
        ),
        (
            with(|maker| maker.change = Some(|header| header[7] = 2)),
            "a version that is not known",
        ),
        (
            with(|maker| maker.change = Some(|header| header[56] = 0xff)),
            "a length that is not allowed",
        ),
        (
            with(|maker| maker.change = Some(|header| header[48] = 0xff)),
            "texts that lie elsewhere",
        ),
        (
            with(|maker| maker.change = Some(|header| header[4128] = 0xff)),
            "a device has no name",
        ),
        (
            with(|maker| maker.change = Some(|header| header[3068] = 0xff)),
            "a configuration lies elsewhere",
        ),
        (
            with(|maker| maker.change_extent = Some(|header| header[7] ^= 1)),
            "another number of blocks",
        ),
        (
            with(|maker| maker.change_extent = Some(|header| header[8] ^= 1)),
            "an extent of this archive should begin here",
        ),
        (
            with(|maker| maker.change_extent = Some(|header| header[43] = 200)),
            "a device that is not there",
        ),
    ] {
        assert!(text.contains(part), "{text}");
    }
}
