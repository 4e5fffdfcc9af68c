//! Puts whole blocks together of content that comes in pieces of any length, at any offset.

use crate::block::{BLOCK_BYTES, BLOCK_LEN};

/// Bytes that are collected before they are handled.
const BATCH_BYTES: usize = 8 << 20;
/// Blocks of which only a part came that are kept, at most. Beyond that, the rest of the oldest is taken to be zeros.
const PARTIAL_MAX: usize = 64;

/// A block of a volume, by its place there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The number of the volume.
    pub(super) volume: usize,
    /// The first block.
    pub(super) first: u32,
    /// Length in blocks.
    pub(super) blocks: u32,
}

/// A block of which not all came yet.
#[derive(Debug)]
struct PartialBlock {
    volume: usize,
    block: u32,
    content: Vec<u8>,
    /// Bytes that came.
    length: usize,
}

/// Whole blocks that wait to be handled.
#[derive(Debug, Default)]
pub(super) struct Assembler {
    content: Vec<u8>,
    pieces: Vec<Piece>,
    partial: Vec<PartialBlock>,
}

impl Assembler {
    /// Takes a piece of a volume. What it has of a block is kept until the rest comes. Returns false if it lies where no image can have it.
    #[must_use]
    pub(super) fn add(&mut self, volume: usize, offset: u64, mut content: &[u8]) -> bool {
        let end = offset.saturating_add(content.len() as u64);
        if end > u64::from(u32::MAX) * BLOCK_BYTES {
            return false;
        }
        let mut offset = offset;
        while !content.is_empty() {
            let block = u32::try_from(offset / BLOCK_BYTES).unwrap_or(u32::MAX);
            let within = usize::try_from(offset % BLOCK_BYTES).unwrap_or(0);
            let whole = content.len() / BLOCK_LEN * BLOCK_LEN;
            let length = if within == 0 && whole > 0 {
                self.whole(volume, block, &content[..whole]);
                whole
            } else {
                let length = content.len().min(BLOCK_LEN - within);
                self.part(volume, block, within, &content[..length]);
                length
            };
            content = &content[length..];
            offset += length as u64;
        }
        true
    }

    fn whole(&mut self, volume: usize, first: u32, content: &[u8]) {
        self.content.extend_from_slice(content);
        let blocks = u32::try_from(content.len() / BLOCK_LEN).unwrap_or(u32::MAX);
        match self.pieces.last_mut() {
            Some(last) if last.volume == volume && last.first.checked_add(last.blocks) == Some(first) => {
                last.blocks += blocks;
            }
            _ => self.pieces.push(Piece { volume, first, blocks }),
        }
    }

    fn part(&mut self, volume: usize, block: u32, within: usize, content: &[u8]) {
        let is_it = |one: &PartialBlock| one.volume == volume && one.block == block;
        let at = self.partial.iter().rposition(is_it).unwrap_or_else(|| {
            self.partial.push(PartialBlock {
                volume,
                block,
                content: vec![0; BLOCK_LEN],
                length: 0,
            });
            self.partial.len() - 1
        });
        let partial = &mut self.partial[at];
        partial.content[within..within + content.len()].copy_from_slice(content);
        partial.length += content.len();
        if partial.length >= BLOCK_LEN {
            self.emit(at);
        } else if self.partial.len() > PARTIAL_MAX {
            self.emit(0);
        }
    }

    /// Takes a partial block for whole.
    fn emit(&mut self, at: usize) {
        let partial = self.partial.remove(at);
        self.whole(partial.volume, partial.block, &partial.content);
    }

    /// Takes the partial blocks of a volume for whole: nothing more comes of it.
    pub(super) fn end(&mut self, volume: usize) {
        while let Some(at) = self.partial.iter().position(|one| one.volume == volume) {
            self.emit(at);
        }
    }

    /// Whether so much waits that it should be handled.
    pub(super) fn is_full(&self) -> bool {
        self.content.len() >= BATCH_BYTES
    }

    /// Takes the whole blocks out: their content, and where it belongs.
    pub(super) fn take(&mut self) -> (Vec<u8>, Vec<Piece>) {
        (std::mem::take(&mut self.content), std::mem::take(&mut self.pieces))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// A volume that comes in pieces of any length, in order or not, is put together as it was.
        #[test]
        fn pieces_make_the_volume(
            lengths in prop::collection::vec(1usize..9000, 1..40),
            order in any::<prop::sample::Index>(),
        ) {
            let total: usize = lengths.iter().sum();
            let volume: Vec<u8> = (0..total).map(|at| u8::try_from(at % 251).unwrap()).collect();
            let mut pieces = Vec::new();
            let mut at = 0;
            for length in &lengths {
                pieces.push((at, &volume[at..at + length]));
                at += length;
            }
            let turn = order.index(pieces.len());
            pieces.rotate_left(turn);
            let mut assembler = Assembler::default();
            for (at, content) in pieces {
                prop_assert!(assembler.add(3, at as u64, content));
            }
            assembler.end(3);
            let (content, found) = assembler.take();
            let mut made = vec![0; total.div_ceil(BLOCK_LEN) * BLOCK_LEN];
            let mut from = 0;
            for piece in found {
                let (start, length) = (piece.first as usize * BLOCK_LEN, piece.blocks as usize * BLOCK_LEN);
                made[start..start + length].copy_from_slice(&content[from..from + length]);
                from += length;
            }
            prop_assert_eq!(&made[..total], &volume[..]);
            prop_assert!(made[total..].iter().all(|byte| *byte == 0));
        }
    }

    #[test]
    fn nothing_lies_behind_what_an_image_can_have() {
        let mut assembler = Assembler::default();
        assert!(!assembler.add(0, u64::MAX - 1, &[1, 2]));
        assert!(!assembler.add(0, u64::from(u32::MAX) * BLOCK_BYTES, &[1]));
        assert!(assembler.add(0, u64::from(u32::MAX) * BLOCK_BYTES - 1, &[1]));
    }
}
