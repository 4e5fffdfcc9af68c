//! PACK: frames of stored blocks, each of which can be decoded alone.

use super::limits::{FRAME_BLOCKS_MAX, FRAMES_MAX, PACK_BLOCKS_MAX};
use super::manifest::store_block;
use super::record::{Hash, hash_of};
use crate::block::BLOCK_LEN;
use crate::codec::{Decoded, Decoder, RAW, ZSTD, unpack};
use crate::numbers::StoreBlock;

/// Bytes of a body before its table.
pub const FIXED_BYTES: usize = 16;
/// Bytes of a frame's line in the table.
/// Bytes of a line of the table, of which each frame has one.
pub const LINE_BYTES: usize = 48;

/// A frame as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Its blocks.
    pub blocks: u16,
    encoding: u8,
    stored: Vec<u8>,
    hash: Hash,
}

impl Frame {
    /// Compresses blocks, unless that does not make them smaller.
    ///
    /// # Errors
    /// Returns the error that zstd gave.
    pub fn compress(plain: &[u8], compressor: &mut zstd::bulk::Compressor<'_>) -> std::io::Result<Self> {
        /// What less than that saves is not worth decompressing.
        const GAIN: usize = 64;
        let mut packed = compressor.compress(plain)?;
        let (encoding, stored) = if packed.len() + plain.len() / GAIN < plain.len() {
            // It was allocated for the worst case, and a pack keeps many.
            packed.shrink_to_fit();
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

    /// Returns how many bytes it takes.
    pub fn stored_bytes(&self) -> usize {
        self.stored.len()
    }

    /// Returns its bytes as they are stored in an archive that is not sealed.
    pub fn stored(&self) -> &[u8] {
        &self.stored
    }

    /// Returns how many bytes it takes in memory.
    #[cfg(test)]
    pub fn allocated_bytes(&self) -> usize {
        self.stored.capacity()
    }
}

/// A frame and the place of its blocks in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedFrame {
    /// The store address of its first block.
    pub first: StoreBlock,
    /// The frame.
    pub frame: Frame,
}

impl PlacedFrame {
    /// Returns the store address after its last block.
    pub fn end(&self) -> StoreBlock {
        self.first + u32::from(self.frame.blocks)
    }
}

/// Where a frame is, and what it holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameInfo {
    /// The store address of its first block.
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
    /// Returns the store address after its last block.
    pub fn end(&self) -> StoreBlock {
        self.first + u32::from(self.blocks)
    }

    /// Returns its content.
    ///
    /// # Errors
    /// Says that the bytes are not those that were stored, or cannot be decoded.
    pub fn decode(&self, stored: &[u8]) -> Decoded<Vec<u8>> {
        if hash_of(stored) != self.hash {
            return Err("a frame does not match its hash".into());
        }
        unpack(self.encoding, stored, usize::from(self.blocks) * BLOCK_LEN)
    }

    /// Returns its bytes in a body.
    ///
    /// # Errors
    /// Says that it lies beyond the body.
    pub fn slice<'a>(&self, body: &'a [u8]) -> Decoded<&'a [u8]> {
        let start = usize::try_from(self.offset).unwrap_or(usize::MAX);
        let end = start.saturating_add(self.stored_bytes as usize);
        Ok(body.get(start..end).ok_or("a frame lies beyond its pack")?)
    }
}

/// What a PACK says of its frames.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackTable {
    /// The frames, by store address.
    pub frames: Vec<FrameInfo>,
    /// The store address of the first: in the lane that asks for it, or in the one that wrote it.
    pub first: StoreBlock,
    /// Blocks from the first to the last, gaps included.
    pub blocks: u32,
    /// BLAKE3 of the table, from which each frame is proved.
    pub hash: Hash,
    /// Where the frames end in the body. Only zeros follow.
    pub end: u64,
}

/// Returns the table of a PACK, with which its body begins, and the hash of that. There is a frame at least, and they are in order.
pub fn encode_table(frames: &[PlacedFrame]) -> (Vec<u8>, Hash) {
    let first = frames.first().map_or(StoreBlock(0), |placed| placed.first);
    let end = frames.last().map_or(first, PlacedFrame::end);
    let mut body = Vec::with_capacity(FIXED_BYTES + frames.len() * LINE_BYTES);
    body.extend(u64::from(first.0).to_le_bytes());
    body.extend(u32::try_from(frames.len()).unwrap_or(u32::MAX).to_le_bytes());
    body.extend((end - first).to_le_bytes());
    for PlacedFrame { first: block, frame } in frames {
        body.extend((*block - first).to_le_bytes());
        body.extend(u32::try_from(frame.stored.len()).unwrap_or(u32::MAX).to_le_bytes());
        body.extend(frame.blocks.to_le_bytes());
        body.extend([frame.encoding, 0, 0, 0, 0, 0]);
        body.extend(frame.hash);
    }
    let hash = hash_of(&body);
    (body, hash)
}

/// Returns the body of a PACK, and its table hash, as [`encode_table`] does.
pub fn encode(frames: &[PlacedFrame]) -> (Vec<u8>, Hash) {
    let (mut body, hash) = encode_table(frames);
    for PlacedFrame { frame, .. } in frames {
        body.extend_from_slice(&frame.stored);
    }
    (body, hash)
}

/// Returns how many bytes the table of a body takes that begins with these [`FIXED_BYTES`], those included.
///
/// # Errors
/// Says that the count is not allowed.
pub fn table_bytes(fixed: &[u8]) -> Decoded<usize> {
    let mut decoder = Decoder::new(fixed);
    decoder.take(8)?;
    match decoder.u32()? as usize {
        count @ 1..=FRAMES_MAX => Ok(FIXED_BYTES + count * LINE_BYTES),
        _ => Err("it has no frames, or too many".into()),
    }
}

/// Decodes the table of a PACK whose body has `body_bytes` in all, of which at least the table is given. Its frames get store addresses from
/// `first` on; if that is none, those of the lane that wrote it.
///
/// # Errors
/// Returns what is malformed.
pub fn decode_table(body: &[u8], body_bytes: u64, first: Option<StoreBlock>) -> Decoded<PackTable> {
    let length = table_bytes(body)?;
    let table = body.get(..length).ok_or("it ends too early")?;
    let mut decoder = Decoder::new(table);
    let home = decoder.u64()?;
    decoder.take(4)?;
    let span = decoder.u32()?;
    let first = first.map_or_else(|| store_block(home), Ok)?;
    let mut offset = length as u64;
    let mut frames = Vec::new();
    let mut end = 0;
    while decoder.left() > 0 {
        let (block, stored_bytes) = (decoder.u32()?, decoder.u32()?);
        let (blocks, encoding) = (decoder.u16()?, decoder.u8()?);
        decoder.zeros(5)?;
        if blocks == 0 || blocks > FRAME_BLOCKS_MAX || encoding > ZSTD {
            return Err("a frame is not as the format says".into());
        }
        let plain_bytes = usize::from(blocks) * BLOCK_LEN;
        if stored_bytes as usize > plain_bytes || (encoding == RAW && stored_bytes as usize != plain_bytes) {
            return Err("a frame has another length than what it holds".into());
        }
        if block < end || (frames.is_empty() && block != 0) {
            return Err("frames of a pack lie in each other".into());
        }
        end = block.checked_add(blocks.into()).ok_or(BEYOND)?;
        first
            .checked_add(end)
            .filter(|end| *end <= StoreBlock::END_MAX)
            .ok_or(BEYOND)?;
        frames.push(FrameInfo {
            first: first + block,
            blocks,
            offset,
            stored_bytes,
            encoding,
            hash: decoder.array()?,
        });
        offset += u64::from(stored_bytes);
    }
    if end > PACK_BLOCKS_MAX {
        return Err("it has more blocks than allowed".into());
    }
    if end != span {
        return Err("its frames hold other blocks than it says".into());
    }
    if offset > body_bytes {
        return Err("its frames lie beyond its end".into());
    }
    Ok(PackTable {
        frames,
        first,
        blocks: span,
        hash: hash_of(table),
        end: offset,
    })
}

const BEYOND: &str = "it holds blocks beyond the largest store";

/// Checks what stands behind the frames in a whole body.
///
/// # Errors
/// Says that it is not zeros.
pub fn check_padding(body: &[u8], table: &PackTable) -> Decoded<()> {
    let end = usize::try_from(table.end).unwrap_or(usize::MAX);
    match body.get(end..) {
        Some(padding) if padding.iter().all(|byte| *byte == 0) => Ok(()),
        _ => Err("what follows its frames is not zeros".into()),
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
        // The last one lies behind a gap of five blocks.
        let frames: Vec<PlacedFrame> = (plain.iter().zip([10, 13, 20]))
            .map(|(plain, first)| PlacedFrame {
                first: StoreBlock(first),
                frame: Frame::compress(plain, &mut compressor).unwrap(),
            })
            .collect();
        assert_eq!(
            frames.iter().map(|placed| placed.frame.encoding).collect::<Vec<_>>(),
            [ZSTD, RAW, ZSTD]
        );
        let (mut body, hash) = encode(&frames);
        assert_eq!(decode_table(&body, body.len() as u64, None).unwrap().hash, hash);
        body.extend([0; 5]);
        (body, plain)
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
        let table = decode_table(&body, body.len() as u64, Some(StoreBlock(100))).unwrap();
        assert_eq!((table.first, table.blocks), (StoreBlock(100), 11));
        assert_eq!(check_padding(&body, &table), Ok(()));
        let frames = table.frames;
        let found: Vec<_> = frames
            .iter()
            .map(|frame| frame.decode(frame.slice(&body).unwrap()).unwrap())
            .collect();
        assert_eq!(found, plain);
        assert_eq!(
            frames.iter().map(|frame| frame.first).collect::<Vec<_>>(),
            [100, 103, 110].map(StoreBlock)
        );
    }

    proptest! {
        #[test]
        fn no_byte_may_change(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let (mut body, plain) = some_pack();
            let at = at.index(body.len());
            body[at] ^= flip;
            // Either the table is refused or has another hash, or the frame that was hit is refused, or the padding is.
            let genuine = decode_table(&some_pack().0, body.len() as u64, None).unwrap();
            if let Ok(table) = decode_table(&body, body.len() as u64, None) && table.hash == genuine.hash {
                let good = table.frames.iter().zip(&plain).filter(|(frame, plain)| {
                    frame.slice(&body).and_then(|stored| frame.decode(stored)).as_ref() == Ok(*plain)
                });
                let bad = plain.len() - good.count() + usize::from(check_padding(&body, &table).is_err());
                prop_assert_eq!(bad, 1);
            }
        }

        #[test]
        fn nothing_is_too_strange(body: Vec<u8>, length: u64) {
            let _ = decode_table(&body, length, None);
        }
    }
}
