//! A whole archive as it is, and with all of its hashes made right. Seed it with the golden archives in `testdata/`.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code, reason = "each target uses a part")]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
    harness::archive(bytes, folder.path());
});
