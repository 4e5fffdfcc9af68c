//! Goal: `formats/archive.ksy` describes what is written. Method: compile it with the Kaitai Struct compiler, and read the golden
//! archives with what comes of it; damaged ones are refused. `forgotten` is not among them: a PACK of it is zeros, as the specification
//! allows, and the description has no word for what may be missing.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

mod common;

use std::path::Path;

use common::readers::described;

#[test]
fn the_description_fits_the_golden_archives() {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let Some((is_described, text)) = described(&[]) else {
        return;
    };
    assert!(is_described, "{text}");
    let check = |archive: &Path| described(&[archive]).unwrap();
    for name in [
        "plain",
        "lanes",
        "relocated",
        "skippable",
        "unchanged",
        "critical-kind",
        "critical-sealed",
    ] {
        let (is_described, text) = check(&checkout.join(format!("testdata/archive-v1-{name}.vmfold")));
        assert!(is_described, "{name}: {text}");
        assert!(text.contains("COMMIT"), "{name}: {text}");
    }
    check_sealed(&check, folder.path());
    let golden = checkout.join("testdata/archive-v1-plain.vmfold");
    let bytes = std::fs::read(&golden).unwrap();
    let mut other_version = bytes.clone();
    other_version[9] = 2;
    for damaged in [
        &other_version[..],
        &bytes[..bytes.len() - 10],
        &bytes[..bytes.len() - 192],
    ] {
        let path = folder.path().join("damaged.vmfold");
        std::fs::write(&path, damaged).unwrap();
        let (is_described, text) = check(&path);
        assert!(!is_described, "{text}");
    }
}

/// What is clear of a sealed archive is described, and each KEY record.
fn check_sealed(check: &dyn Fn(&Path) -> (bool, String), folder: &Path) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/encryption-v1/archive.vmfold");
    let (is_described, text) = check(&golden);
    assert!(is_described, "{text}");
    let keys: Vec<usize> = text
        .lines()
        .filter(|line| line.contains(" KEY ") && !line.contains("not described"))
        .map(|line| line.split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert!(keys.len() > 2, "{text}");
    let is_left_out = |line: &&str| line.contains("not described") && !line.contains(" NOTE ");
    assert_eq!(text.lines().find(is_left_out), None);
    let bytes = std::fs::read(&golden).unwrap();
    // The version, the number 0, a keyring that is too long, and padding that is not zeros.
    for (at, changed) in [(0, 2), (4, 0), (10, 1), (16_383, 1)] {
        let mut bad = bytes.clone();
        bad[keys[0] + 96 + at] = changed;
        let path = folder.join("sealed.vmfold");
        std::fs::write(&path, &bad).unwrap();
        let (is_described, text) = check(&path);
        assert!(!is_described, "{at}: {text}");
    }
}
