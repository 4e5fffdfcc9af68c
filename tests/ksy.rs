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
