//! PACK: frames of stored blocks, each of which can be decoded alone.

use super::manifest::store_block;
use super::record::{Hash, hash_of};
use crate::block::BLOCK_LEN;
use crate::codec::{Decoded, Decoder};
use crate::numbers::StoreBlock;

/// Frames in a pack at most.
const FRAMES_MAX: u32 = 8192;
/// Blocks in a frame at most.
pub const FRAME_BLOCKS_MAX: u16 = 1024;
/// Bytes of a body before its table.
pub const FIXED_BYTES: usize = 48;
/// Bytes of a frame's line in the table.
const LINE_BYTES: usize = 40;
const HASH_BYTES: usize = 32;
const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// A frame as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its blocks.
    pub blocks: u16,
    encoding: u8,
    /// Its bytes.
    stored: Vec<u8>,
    hash: Hash,
}

impl Frame {
    /// Compresses blocks, unless that does not make them smaller.
    ///
    /// # Errors
    /// Those of zstd.
    pub fn compress(plain: &[u8], compressor: &mut zstd::bulk::Compressor<'_>) -> std::io::Result<Self> {
        /// What less than that saves is not worth decompressing.
        const GAIN: usize = 64;
        let packed = compressor.compress(plain)?;
        let (encoding, stored) = if packed.len() + plain.len() / GAIN < plain.len() {
            (ZSTD, packed)
        } else {
            (RAW, plain.to_vec())
        };
        Ok(Self {
            blocks: u16::try_from(plain.len() / BLOCK_LEN).unwrap_or(u16::MAX),
            encoding,
            hash: hash_of(&stored),
            stored,
        })
    }

    /// Bytes it takes.
    pub fn stored_bytes(&self) -> usize {
        self.stored.len()
    }
}

/// Where a frame is, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameInfo {
    /// Store address of its first block.
    pub first: StoreBlock,
    /// Its blocks.
    pub blocks: u16,
    /// Where its bytes begin in the body.
    pub offset: u64,
    /// Its bytes.
    pub stored_bytes: u32,
    encoding: u8,
    hash: Hash,
}

impl FrameInfo {
    /// Its content.
    ///
    /// # Errors
    /// Where the bytes are not those that were stored.
    pub fn decode(&self, stored: &[u8]) -> Decoded<Vec<u8>> {
        if hash_of(stored) != self.hash {
            return Err("a frame does not match its hash");
        }
        let length = usize::from(self.blocks) * BLOCK_LEN;
        let plain = match self.encoding {
            RAW => stored.to_vec(),
            _ => zstd::bulk::decompress(stored, length).map_err(|_| "a frame cannot be decompressed")?,
        };
        if plain.len() == length {
            Ok(plain)
        } else {
            Err("a frame has another length than it says")
        }
    }

    /// Its bytes in a body.
    pub fn slice<'a>(&self, body: &'a [u8]) -> Decoded<&'a [u8]> {
        let start = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(self.stored_bytes as usize);
        body.get(start..end).ok_or("a frame lies beyond its pack")
    }
}

/// Writes the body of a PACK.
pub fn encode(first: StoreBlock, frames: &[Frame]) -> Vec<u8> {
    let data: usize = frames.iter().map(Frame::stored_bytes).sum();
    let mut out = vec![0; HASH_BYTES];
    out.reserve(FIXED_BYTES + frames.len() * LINE_BYTES + data);
    out.extend(u64::from(first.0).to_le_bytes());
    out.extend(u32::try_from(frames.len()).unwrap_or(u32::MAX).to_le_bytes());
    out.extend([0; 4]);
    for frame in frames {
        out.extend(u32::try_from(frame.stored.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(frame.blocks.to_le_bytes());
        out.extend([frame.encoding, 0]);
        out.extend(frame.hash);
    }
    let hash = hash_of(&out[HASH_BYTES..]);
    out[..HASH_BYTES].copy_from_slice(&hash);
    for frame in frames {
        out.extend_from_slice(&frame.stored);
    }
    out
}

/// How many bytes the table of a body takes that begins with these [`FIXED_BYTES`], those included.
///
/// # Errors
/// Where the count is not allowed.
pub fn table_bytes(fixed: &[u8]) -> Decoded<usize> {
    let mut decoder = Decoder::new(fixed);
    decoder.take(HASH_BYTES + 8)?;
    match decoder.u32()? {
        count @ 1..=FRAMES_MAX => Ok(FIXED_BYTES + count as usize * LINE_BYTES),
        _ => Err("it has no frames, or too many"),
    }
}

/// Reads the table of a PACK whose body has `body_bytes` in all, of which at least the table is given.
///
/// # Errors
/// Where it is not as the format says.
pub fn decode_table(body: &[u8], body_bytes: u64) -> Decoded<Vec<FrameInfo>> {
    let length = table_bytes(body)?;
    let table = body.get(..length).ok_or("it ends too early")?;
    let (hash, table) = table.split_at(HASH_BYTES);
    if hash_of(table) != hash {
        return Err("its table does not match its hash");
    }
    let mut decoder = Decoder::new(table);
    let mut first = store_block(decoder.u64()?)?;
    decoder.take(4)?;
    decoder.zeros(4)?;
    let mut offset = length as u64;
    let mut frames = Vec::new();
    while decoder.left() > 0 {
        let stored_bytes = decoder.u32()?;
        let (blocks, encoding) = (decoder.u16()?, decoder.u8()?);
        decoder.zeros(1)?;
        if blocks == 0 || blocks > FRAME_BLOCKS_MAX || encoding > ZSTD {
            return Err("a frame is not as the format says");
        }
        if stored_bytes as usize > usize::from(blocks) * BLOCK_LEN {
            return Err("a frame is longer than what it holds");
        }
        frames.push(FrameInfo {
            first,
            blocks,
            offset,
            stored_bytes,
            encoding,
            hash: decoder.array()?,
        });
        offset += u64::from(stored_bytes);
        first = first
            .checked_add(blocks.into())
            .filter(|end| *end <= StoreBlock::END_MAX)
            .ok_or("it holds blocks beyond the largest store")?;
    }
    if offset == body_bytes {
        Ok(frames)
    } else {
        Err("its frames do not fill it")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn some_pack() -> (Vec<u8>, Vec<Vec<u8>>) {
        let plain: Vec<Vec<u8>> = vec![
            vec![1; BLOCK_LEN * 3],
            blake3::Hasher::new().finalize_xof().take_vec(BLOCK_LEN * 2),
            vec![7; BLOCK_LEN],
        ];
        let mut compressor = zstd::bulk::Compressor::new(3).unwrap();
        let frames: Vec<Frame> = plain
            .iter()
            .map(|plain| Frame::compress(plain, &mut compressor).unwrap())
            .collect();
        assert_eq!(
            frames.iter().map(|frame| frame.encoding).collect::<Vec<_>>(),
            [ZSTD, RAW, ZSTD]
        );
        (encode(StoreBlock(10), &frames), plain)
    }

    trait TakeVec {
        fn take_vec(self, length: usize) -> Vec<u8>;
    }

    impl TakeVec for blake3::OutputReader {
        fn take_vec(mut self, length: usize) -> Vec<u8> {
            let mut out = vec![0; length];
            self.fill(&mut out);
            out
        }
    }

    #[test]
    fn packs_come_back() {
        let (body, plain) = some_pack();
        let frames = decode_table(&body, body.len() as u64).unwrap();
        let found: Vec<_> = frames
            .iter()
            .map(|frame| frame.decode(frame.slice(&body).unwrap()).unwrap())
            .collect();
        assert_eq!(found, plain);
        assert_eq!(
            frames.iter().map(|frame| frame.first).collect::<Vec<_>>(),
            [10, 13, 15].map(StoreBlock)
        );
    }

    proptest! {
        #[test]
        fn no_byte_may_change(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let (mut body, plain) = some_pack();
            let at = at.index(body.len());
            body[at] ^= flip;
            // Either the table is refused, or exactly the frame that was hit.
            if let Ok(frames) = decode_table(&body, body.len() as u64) {
                let good = frames.iter().zip(&plain).filter(|(frame, plain)| {
                    frame.slice(&body).and_then(|stored| frame.decode(stored)).as_ref() == Ok(*plain)
                });
                prop_assert_eq!(good.count(), plain.len() - 1);
            }
        }

        #[test]
        fn nothing_is_too_strange(body: Vec<u8>, length: u64) {
            let _ = decode_table(&body, length);
        }
    }
}
