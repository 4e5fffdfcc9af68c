//! Goal: `formats/archive.ksy` describes what is written. Method: compile it with the Kaitai Struct compiler, and read the golden
//! archives with what comes of it; damaged ones are refused. `forgotten` is not among them: a PACK of it is zeros, as the specification
//! allows, and the description has no word for what may be missing.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a test that cannot go on has failed"
)]

use std::path::Path;
use std::process::{Command, Output};

fn run(folder: &Path, program: &str, arguments: &[&str]) -> std::io::Result<Output> {
    Command::new(program).args(arguments).current_dir(folder).output()
}

#[test]
fn the_description_fits_the_golden_archives() {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    if run(folder.path(), "npm", &["--version"]).is_err() || run(folder.path(), "node", &["--version"]).is_err() {
        assert!(std::env::var_os("CI").is_none(), "node and npm are not installed");
        println!("NOT RUN: node and npm are not installed");
        return;
    }
    for name in ["package.json", "package-lock.json", "check.js"] {
        std::fs::copy(checkout.join("tests/ksy").join(name), folder.path().join(name)).unwrap();
    }
    let text = |output: &Output| String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
    let installed = run(folder.path(), "npm", &["ci", "--no-audit", "--no-fund", "--silent"]).unwrap();
    assert!(installed.status.success(), "{}", text(&installed));
    let description = checkout.join("formats/archive.ksy");
    let check = |archive: &Path| {
        let arguments = ["check.js", description.to_str().unwrap(), archive.to_str().unwrap()];
        run(folder.path(), "node", &arguments).unwrap()
    };
    for name in [
        "plain",
        "lanes",
        "relocated",
        "skippable",
        "unchanged",
        "critical-kind",
        "critical-sealed",
    ] {
        let read = check(&checkout.join(format!("testdata/archive-v1-{name}.vmfold")));
        assert!(read.status.success(), "{name}: {}", text(&read));
        assert!(text(&read).contains("COMMIT"), "{name}: {}", text(&read));
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
        let read = check(&path);
        assert!(!read.status.success(), "{}", text(&read));
    }
}
