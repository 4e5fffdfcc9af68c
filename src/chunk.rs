//! Content-defined chunks of blocks: `FastCDC` over the stream of fingerprints.
//!
//! Cuts fall on blocks, because a cut inside a block could not be shared, and depend on fingerprints alone, so that equal
//! runs of blocks are cut alike wherever they lie. Each fingerprint is spread over 64 bytes of the stream that `FastCDC`
//! sees, the window of its hash, so that the block at a cut decides it and no data is read.

use fastcdc::v2020::FastCDC;

/// The minimum, average and maximum number of blocks in a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
pub struct Parameters {
    /// Minimum length. Only the last chunk of a stream may be shorter.
    pub min_blocks: u16,
    /// Average length, a power of two.
    pub average_blocks: u16,
    /// Maximum length.
    pub max_blocks: u16,
}

/// The parameters of every verb: chunks of 16 KiB on average.
pub const PARAMETERS: Parameters = Parameters {
    min_blocks: 1,
    average_blocks: 4,
    max_blocks: 16,
};

/// Version of the cut points. It is raised whenever the same blocks would be cut at other places.
pub const VERSION: u32 = 1;

const STREAM_BYTES: usize = 64;

/// A chunk: its length, and a weak hash of its fingerprints to look it up by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Length in blocks.
    pub blocks: u16,
    /// xxh3 of the fingerprints in little-endian order. Equal blocks have equal ids; blocks with equal ids are only likely to be equal.
    pub weak_id: u64,
}

/// Cuts a stream of fingerprints into chunks.
#[derive(Debug, Default)]
pub struct Chunker {
    stream: Vec<u8>,
}

impl Chunker {
    /// Calls `emit` with each chunk of `fingerprints`, in order. The lengths of the chunks add up to the number of fingerprints.
    pub fn cut(&mut self, fingerprints: &[u32], mut emit: impl FnMut(Chunk)) {
        self.stream.clear();
        self.stream.reserve(fingerprints.len() * STREAM_BYTES);
        for fingerprint in fingerprints {
            let mut state = u64::from(*fingerprint);
            for _ in 0..STREAM_BYTES / 8 {
                self.stream.extend_from_slice(&split_mix(&mut state).to_le_bytes());
            }
        }
        let stream_bytes = |blocks: u16| usize::from(blocks) * STREAM_BYTES;
        let cdc = FastCDC::new(
            &self.stream,
            stream_bytes(PARAMETERS.min_blocks),
            stream_bytes(PARAMETERS.average_blocks),
            stream_bytes(PARAMETERS.max_blocks),
        );
        let mut start = 0;
        while start < fingerprints.len() {
            let from = start * STREAM_BYTES;
            let (_, cut) = cdc.cut(from, self.stream.len() - from);
            let end = cut.div_ceil(STREAM_BYTES).clamp(start + 1, fingerprints.len());
            let blocks = u16::try_from(end - start).unwrap_or(PARAMETERS.max_blocks);
            emit(Chunk {
                blocks,
                weak_id: weak_id(&fingerprints[start..end]),
            });
            start = end;
        }
    }
}

/// Returns the weak id of a chunk whose blocks have these fingerprints.
pub fn weak_id(fingerprints: &[u32]) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
    for fingerprint in fingerprints {
        hash.update(&fingerprint.to_le_bytes());
    }
    hash.digest()
}

/// Returns the fingerprints whose cut points `testdata/cuts-v1.txt` holds, so that a test notices any change of the cut points.
pub fn golden_stream() -> Vec<u32> {
    let mut state = 42;
    #[expect(clippy::cast_possible_truncation, reason = "any 32 bits will do")]
    (0..4000).map(|_| split_mix(&mut state) as u32).collect()
}

/// Advances the state of `SplitMix64` and returns its next number, which spreads a fingerprint's bits over the stream (Steele, Lea, Flood
/// 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn lengths(fingerprints: &[u32]) -> Vec<u16> {
        let mut lengths = Vec::new();
        Chunker::default().cut(fingerprints, |chunk| lengths.push(chunk.blocks));
        lengths
    }

    /// The cut points are part of what an index and an archive mean: `testdata/cuts-v1.txt` holds them for a fixed stream.
    #[test]
    fn cut_points_are_the_golden_ones() {
        let found = lengths(&golden_stream())
            .iter()
            .map(u16::to_string)
            .collect::<Vec<_>>()
            .join(" ");
        assert_eq!(found, include_str!("../testdata/cuts-v1.txt").trim());
    }

    /// Cuts as `formats/cutting-v1.md` says it in words.
    fn cut_as_specified(fingerprints: &[u32], gear: &[u64]) -> Vec<u16> {
        let mut stream = Vec::new();
        for fingerprint in fingerprints {
            let mut state = u64::from(*fingerprint);
            (0..8).for_each(|_| stream.extend(split_mix(&mut state).to_le_bytes()));
        }
        let (mut start, mut lengths) = (0, Vec::new());
        while start < stream.len() {
            let end = (stream.len() - start).min(1024);
            let mut hash = 0u64;
            let is_cut = |i: &usize| {
                hash = (hash << 1).wrapping_add(gear[usize::from(stream[start + i])]);
                hash & if *i < 256 { 0x0000_0190_0035_3000 } else { 0x1803_5100 } == 0
            };
            let length = (64..end).find(is_cut).unwrap_or(end).div_ceil(64);
            lengths.push(u16::try_from(length).unwrap());
            start += length * 64;
        }
        lengths
    }

    #[test]
    fn cuts_are_as_the_format_says() {
        let gear: Vec<u64> = include_str!("../testdata/gear-v1.txt")
            .split_whitespace()
            .map(|number| u64::from_str_radix(number, 16).unwrap())
            .collect();
        assert_eq!(gear.len(), 256);
        for count in [0, 1, 2, 5, 16, 17, 4000] {
            let stream = &golden_stream()[..count];
            assert_eq!(cut_as_specified(stream, &gear), lengths(stream), "{count}");
        }
    }

    proptest! {
        #[test]
        fn chunks_cover_the_stream_within_their_limits(stream in prop::collection::vec(0u32..50, 0..600)) {
            let lengths = lengths(&stream);
            prop_assert_eq!(lengths.iter().map(|n| usize::from(*n)).sum::<usize>(), stream.len());
            prop_assert!(lengths.iter().all(|n| *n >= 1 && *n <= PARAMETERS.max_blocks));
        }

        #[test]
        fn a_shifted_stream_is_cut_alike_again(stream in prop::collection::vec(any::<u32>(), 200..400), insert in 1usize..20) {
            let shifted: Vec<u32> = (0..insert).map(|n| u32::try_from(n).unwrap()).chain(stream.iter().copied()).collect();
            let ends = |lengths: Vec<u16>| lengths.iter().scan(0usize, |at, n| { *at += usize::from(*n); Some(*at) }).collect::<std::collections::BTreeSet<_>>();
            let (plain, moved) = (ends(lengths(&stream)), ends(lengths(&shifted)));
            let common = plain.iter().filter(|end| moved.contains(&(**end + insert))).count();
            prop_assert!(common * 2 > plain.len(), "{} of {}", common, plain.len());
        }
    }
}
