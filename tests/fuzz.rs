//! Goal: no bytes make a reader panic, hang or take unbounded memory. Method: a short, repeatable run of what the fuzzers in
//! `tests/fuzz` do without end (`cargo fuzz run archive` there): golden archives with bytes changed, lengths and counts made hostile, and
//! all hashes made right again, under an allocator that refuses what exceeds the stated limit.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    unsafe_code,
    reason = "a test that cannot go on has failed; an allocator is unsafe by its trait"
)]

#[path = "common/mod.rs"]
mod common;
#[path = "fuzz/harness.rs"]
mod harness;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::Random;

/// Bytes that reading an archive of some KiB may take in all: a record of the greatest size, decoded, and what it is made into.
const LIMIT_BYTES: usize = 256 << 20;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator unchanged; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(
            NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(),
            Ordering::Relaxed,
        );
        // SAFETY: the caller keeps the contract of the trait.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of the trait.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// The count is of the whole process: one test at a time.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const GOLDEN: &[u8] = include_bytes!("../testdata/archive-v1.vmfold");

/// Numbers that decoders must not believe.
const HOSTILE: [u64; 10] = [
    0,
    1,
    0x7f,
    0xffff,
    0x7fff_ffff,
    0xffff_fffe,
    0xffff_ffff,
    1 << 44,
    u64::MAX / 2,
    u64::MAX,
];

fn change(bytes: &mut [u8], random: &mut Random) {
    let at = usize::try_from(random.below(bytes.len() as u64 - 8)).unwrap();
    match random.below(6) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = u8::try_from(random.below(256)).unwrap(),
        2 => {
            let number = HOSTILE[usize::try_from(random.below(10)).unwrap()];
            bytes[at..at + 8].copy_from_slice(&number.to_le_bytes());
        }
        3 => {
            let number = HOSTILE[usize::try_from(random.below(10)).unwrap()];
            bytes[at..at + 4].copy_from_slice(&number.to_le_bytes()[..4]);
        }
        4 => {
            let from = usize::try_from(random.below(bytes.len() as u64 - 64)).unwrap();
            let piece = bytes[from..from + 64].to_vec();
            let end = (at + 64).min(bytes.len());
            bytes[at..end].copy_from_slice(&piece[..end - at]);
        }
        _ => bytes[at] = 0xff,
    }
}

#[test]
fn hostile_archives_end_in_errors() {
    let _turn = TURN.lock();
    let folder = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap();
    let mut random = Random(2026);
    for round in 0..1000 {
        let mut bytes = GOLDEN.to_vec();
        for _ in 0..=random.below(4) {
            change(&mut bytes, &mut random);
        }
        if round % 3 > 0 {
            harness::seal(&mut bytes);
        }
        if round % 50 == 0 {
            bytes.truncate(usize::try_from(random.below(bytes.len() as u64)).unwrap());
        }
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        harness::archive(&bytes, folder.path());
        harness::stream(&bytes);
        let took = PEAK.load(Ordering::Relaxed).saturating_sub(before);
        assert!(took < LIMIT_BYTES, "round {round} took {took} bytes");
    }
}

#[test]
fn hostile_payloads_end_in_errors() {
    let _turn = TURN.lock();
    let mut random = Random(2027);
    let mut at = 0;
    let mut bodies: Vec<Vec<u8>> = Vec::new();
    while at < GOLDEN.len() {
        let length = usize::try_from(u64::from_le_bytes(GOLDEN[at + 48..at + 56].try_into().unwrap())).unwrap();
        bodies.push(GOLDEN[at + 96..at + 96 + length].to_vec());
        at += 96 + length;
    }
    // Payloads as they are before compression: there the counts and lengths are.
    let commit = vmfold::archive::commit::Commit::decode(&bodies[9]).unwrap();
    let mut raw = commit.encode().unwrap();
    raw.truncate(200);
    bodies.push(raw);
    for plain in raw_payloads(&bodies) {
        bodies.push(plain);
    }
    for round in 0..20_000 {
        let body = &bodies[usize::try_from(random.below(bodies.len() as u64)).unwrap()];
        if body.len() < 80 {
            continue;
        }
        let mut bytes = body.clone();
        for _ in 0..=random.below(3) {
            change(&mut bytes, &mut random);
        }
        let before = NOW.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        harness::decoders(&bytes);
        let took = PEAK.load(Ordering::Relaxed).saturating_sub(before);
        assert!(took < LIMIT_BYTES, "round {round} took {took} bytes");
    }
}

/// Bodies of PLANs and COMMITs again, with their payload stored raw.
fn raw_payloads(bodies: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut found = Vec::new();
    for (fixed, encoding) in [(12, 5), (8, 0)] {
        for body in bodies.iter().filter(|body| body.len() > fixed && body[encoding] == 1) {
            if let Ok(plain) = zstd::bulk::decompress(&body[fixed..], 1 << 20) {
                let mut raw = body[..fixed].to_vec();
                raw[encoding] = 0;
                raw.extend(plain);
                found.push(raw);
            }
        }
    }
    assert!(!found.is_empty());
    found
}
