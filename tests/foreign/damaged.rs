//! Backups of several formats that are cut off, or in which bits are flipped.

use super::*;

#[test]
fn a_backup_that_is_cut_off_anywhere_is_damaged() {
    let maker = some_vma(5, 40);
    let (archive, expected) = (maker.make(), expected_of(&maker));
    let mut random = Random(11);
    for command in ["cat", "zstd -q", "gzip", "bzip2", "xz", "lz4 -q", "lzop"] {
        let bytes = piped(command, &archive);
        for round in 0..100 {
            let at = if round < 20 {
                round
            } else {
                usize::try_from(random.below(bytes.len() as u64)).unwrap()
            };
            let (whole, result) = read(&bytes[..at]);
            let error = result.expect_err(&format!("{command}: cut at {at} of {}", bytes.len()));
            assert!(
                matches!(error, Error::DamagedBackup { .. } | Error::RefusedBackup { .. }),
                "{command}: {error:?}"
            );
            assert!(
                whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
                "{command}: cut at {at}"
            );
        }
    }
}

#[test]
fn a_flipped_bit_is_found_or_changes_nothing() {
    let maker = VmaMaker {
        devices: vec![(b"drive-scsi0", content(1, 100_000)), (b"drive-scsi1", content(4, 17))],
        ..some_vma(5, 40)
    };
    let (archive, expected) = (maker.make(), expected_of(&maker));
    let mut random = Random(12);
    for command in ["zstd -q", "gzip", "bzip2", "xz", "lz4 -q", "lzop"] {
        let bytes = piped(command, &archive);
        for round in 0..1000 {
            let mut damaged = bytes.clone();
            let at = if round < 200 {
                round / 8
            } else {
                usize::try_from(random.below(bytes.len() as u64)).unwrap()
            };
            let bit = if round < 200 {
                round % 8
            } else {
                usize::try_from(random.below(8)).unwrap()
            };
            damaged[at] ^= 1 << bit;
            if is_backup(&damaged) {
                assert_nothing_wrong(&damaged, &expected, &format!("{command}: bit {bit} of byte {at}"));
            }
        }
    }
    // Without a compression around it, only the headers of a VMA archive are protected.
    for at in 0..12_288 + 512 {
        let mut damaged = archive.clone();
        damaged[at] ^= 1 << (at % 8);
        assert!(
            !is_backup(&damaged) || read(&damaged).1.is_err(),
            "byte {at} of the header"
        );
    }
}
