//! The methods of [`Filesystem`] beyond sharing and reading, so that whole verbs run on the simulated filesystem.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, OnceLock};

use rustix::io::Errno;

use super::{BLOCK_LEN, BlockContent, DiskState, Simulated, block_at, fill};
use crate::block::{BLOCK_BYTES, SlotSet};
use crate::content::Metadata;
use crate::facts::{Compression, Extent, Facts, PinReason};
use crate::fingerprint::FingerprintFunction;
use crate::fs::{ImageInfo, PoolMap, SourceFile};
use crate::numbers::ImageId;
use crate::spill::SpillVec;

/// The function of its checksums: the default of btrfs.
pub(super) const FUNCTION: FingerprintFunction = FingerprintFunction::Crc32c;

/// Returns the bytes of a block with some content.
pub fn block_of(content: BlockContent) -> [u8; BLOCK_LEN] {
    let mut block = [0; BLOCK_LEN];
    fill(&mut block, content);
    block
}

/// The properties of images: a linked list that only grows, so that references into it stay valid.
#[derive(Debug, Default)]
pub(super) struct Known(OnceLock<Box<(ImageInfo, Known)>>);

impl Known {
    fn get(&self, place: ImageId, make: impl Fn(ImageId) -> ImageInfo) -> &ImageInfo {
        let mut at = self;
        let mut number = 0;
        loop {
            let (image, next) = &**at.0.get_or_init(|| Box::new((make(ImageId(number)), Self::default())));
            if number == place.0 {
                return image;
            }
            (at, number) = (next, number + 1);
        }
    }
}

impl Simulated {
    /// Returns the number of images.
    pub(super) fn count_images(&self) -> u32 {
        self.with(|state| u32::try_from(state.images.len()).unwrap_or(u32::MAX))
    }

    /// Returns the properties of an image.
    pub(super) fn known_image(&self, image: ImageId) -> &ImageInfo {
        self.known.get(image, |number| {
            let (checksummed, blocks) = self.with(|state| {
                let file = state.images.get(number.index());
                file.map_or((true, 0), |file| (file.checksummed, file.blocks.len() as u64))
            });
            ImageInfo {
                path: format!("image-{number}.img").into(),
                size: blocks * BLOCK_BYTES,
                checksummed,
                stays_uncompressed: false,
            }
        })
    }

    /// Returns the metadata that every file has.
    pub(super) fn plain_attributes() -> Metadata {
        Metadata {
            mode: 0o600,
            ..Metadata::default()
        }
    }

    /// Returns what mapping a pool finds before any fingerprint is known: the references of images, and not those of donors.
    pub(super) fn mapped(&self) -> PoolMap {
        let without_donors = Self {
            state: Mutex::new(self.with(|state| DiskState {
                donors: Vec::new(),
                ..state.clone()
            })),
            faults: self.faults.clone(),
            frees_blocks: self.frees_blocks,
            ..Self::default()
        };
        let mut facts = without_donors.facts();
        facts.fingerprints = vec![0; facts.slots() as usize].into();
        facts.zero_fingerprint = FUNCTION.of_zeros();
        PoolMap {
            facts,
            inline_bytes: 0,
            inline: Vec::new(),
            beyond: Vec::new(),
        }
    }

    /// Returns the bytes that are held from outside, under one name.
    pub(super) fn holders_of(facts: &Facts) -> BTreeMap<String, u64> {
        let held = facts
            .extents
            .iter()
            .filter(|extent| extent.pinned == Some(PinReason::HeldByOthers));
        let bytes: u64 = held.map(|extent| extent.disk_bytes).sum();
        (bytes > 0).then(|| ("outside".to_owned(), bytes)).into_iter().collect()
    }

    /// Returns the content of an extent's blocks.
    fn content_of(state: &DiskState, extent: &Extent) -> Vec<BlockContent> {
        let number = usize::try_from((extent.address >> 30) - 1).unwrap_or(usize::MAX);
        let first = block_at(extent.address - DiskState::address(number));
        state.allocations[number].content[first..first + extent.blocks as usize].to_vec()
    }

    /// Fills in the fingerprints of extents that are checksummed and not compressed.
    pub(super) fn fill_in_fingerprints(&self, facts: &mut Facts, known: &mut SlotSet) {
        let mut fingerprints = std::mem::take(&mut facts.fingerprints);
        self.with(|state| {
            for extent in &facts.extents {
                if extent.class.checksummed && extent.class.compression == Compression::None {
                    let blocks = Self::content_of(state, extent).into_iter().map(block_of);
                    let sums: Vec<u32> = blocks.map(|block| FUNCTION.of(&block)).collect();
                    fingerprints.write(extent.first_slot, &sums);
                    known.insert_range(extent.slots());
                }
            }
        });
        facts.fingerprints = fingerprints;
    }

    /// Returns a digest of the content of each extent that is checksummed; `None` where blocks are freed one by one.
    pub(super) fn digests(&self, facts: &Facts) -> SpillVec<Option<u128>> {
        let digest = |state: &DiskState, extent: &Extent| {
            let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
            for content in Self::content_of(state, extent) {
                hash.update(&content.to_le_bytes());
            }
            hash.digest128()
        };
        self.with(|state| {
            let extents = facts.extents.iter();
            let digests =
                extents.map(|extent| (extent.class.checksummed && !self.frees_blocks).then(|| digest(state, extent)));
            digests.collect()
        })
    }

    /// Copies a range of an image to a real file.
    pub(super) fn copy_to(
        &self,
        image: ImageId,
        offset: u64,
        file: &File,
        file_offset: u64,
        length: u64,
    ) -> rustix::io::Result<()> {
        let content: Vec<u8> = self.with(|state| {
            let source = state.file(SourceFile::Image(image));
            let blocks = (block_at(offset)..).take(block_at(length));
            blocks
                .flat_map(|block| block_of(source.map_or(0, |file| state.content(file, block))))
                .collect()
        });
        let written = file.write_all_at(&content, file_offset);
        written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
    }
}
