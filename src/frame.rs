//! zstd frames that btrfs stores as they are.
//!
//! A frame holds at most 128 KiB of content, as the kernel's own do (kernel: `BTRFS_MAX_UNCOMPRESSED`). It takes whole blocks on disk, so
//! what counts is how many blocks it saves.

use std::io;

use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use crate::block::BLOCK_BYTES;

/// Compresses content into frames, and says which frames are worth storing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packer {
    /// The zstd level, 1 to 19.
    pub level: i32,
    /// Percentage of the content's blocks that a frame must save.
    pub min_gain: u8,
}

impl Default for Packer {
    /// Returns what btrfs does itself: level 3, and every frame that saves a block is stored.
    fn default() -> Self {
        Self { level: 3, min_gain: 0 }
    }
}

impl Packer {
    /// `log2` of the largest window that the kernel decodes (kernel: `ZSTD_BTRFS_MAX_WINDOWLOG`).
    const WINDOW_LOG: u32 = 17;

    /// Makes a compressor for [`Packer::pack`]. It takes up to 100 MiB of memory at the highest levels.
    ///
    /// # Errors
    /// Returns the error that zstd gave.
    pub fn compressor(self) -> io::Result<Compressor<'static>> {
        let mut compressor = Compressor::new(self.level)?;
        compressor.set_parameter(CParameter::WindowLog(Self::WINDOW_LOG))?;
        compressor.set_parameter(CParameter::ChecksumFlag(false))?;
        Ok(compressor)
    }

    /// Compresses content into a frame. Returns `None` if the frame does not save enough blocks.
    ///
    /// # Errors
    /// Returns the error that zstd gave.
    pub fn pack(self, compressor: &mut Compressor<'_>, content: &[u8]) -> io::Result<Option<Vec<u8>>> {
        let frame = compressor.compress(content)?;
        Ok(self
            .is_worth(on_disk(frame.len()), content.len() as u64)
            .then_some(frame))
    }

    /// Whether it is worthwhile to replace `old` bytes on disk by `new` bytes.
    pub fn is_worth(self, new: u64, old: u64) -> bool {
        new < old && new.saturating_mul(100) <= old.saturating_mul(100u64.saturating_sub(self.min_gain.into()))
    }
}

/// Returns the bytes that a frame of `frame` bytes takes on disk.
pub fn on_disk(frame: usize) -> u64 {
    (frame as u64).next_multiple_of(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::BLOCK_LEN;
    use proptest::prelude::*;

    #[test]
    fn frames_keep_to_the_kernels_window() {
        let content: Vec<u8> = (0..131_072u32)
            .map(|n| (n.wrapping_mul(0x9e37_79b9) >> 28) as u8)
            .collect();
        for level in 1..=19 {
            let packer = Packer { level, min_gain: 10 };
            let frame = packer
                .pack(&mut packer.compressor().unwrap(), &content)
                .unwrap()
                .unwrap();
            let mut decoder = zstd::bulk::Decompressor::new().unwrap();
            decoder.window_log_max(Packer::WINDOW_LOG).unwrap();
            assert_eq!(decoder.decompress(&frame, content.len()).unwrap(), content);
        }
    }

    #[test]
    fn what_gains_too_little_is_left_as_it_is() {
        let packer = Packer { level: 3, min_gain: 10 };
        // 32 blocks must become 28 at most.
        assert!(packer.is_worth(28 * 4096, 32 * 4096));
        assert!(!packer.is_worth(29 * 4096, 32 * 4096));
        assert!(Packer::default().is_worth(31 * 4096, 32 * 4096));
        assert!(!Packer::default().is_worth(4096, 4096));
    }

    proptest! {
        #[test]
        fn frames_come_back_as_they_were(content in prop::collection::vec(any::<u8>(), 1..40), blocks in 1usize..33) {
            let content: Vec<u8> = content.into_iter().cycle().take(blocks * BLOCK_LEN).collect();
            let packer = Packer::default();
            if let Some(frame) = packer.pack(&mut packer.compressor().unwrap(), &content).unwrap() {
                prop_assert_eq!(zstd::bulk::decompress(&frame, content.len()).unwrap(), content);
            } else {
                prop_assert_eq!(blocks, 1);
            }
        }
    }
}
