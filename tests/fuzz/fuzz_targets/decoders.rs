//! Every decoder and the stream of records, with any bytes.
#![no_main]

#[path = "../harness.rs"]
#[allow(dead_code, reason = "each target uses a part")]
mod harness;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    harness::decoders(bytes);
    harness::stream(bytes);
});
