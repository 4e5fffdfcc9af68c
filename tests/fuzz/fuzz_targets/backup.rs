//! A backup of another program, of any kind. Seed it with files that their tools make: small ones, of one kind at a time.
#![no_main]

#[path = "../backups.rs"]
#[allow(dead_code, reason = "each target uses a part")]
mod backups;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Ok(folder) = tempfile::tempdir_in("/dev/shm") else { return };
    backups::backup(bytes, folder.path());
});
