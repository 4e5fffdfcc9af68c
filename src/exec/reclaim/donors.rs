//! Writes donors. A donor takes over blocks of extents that go and that are found nowhere else. They lie in it contiguously, and all references
//! to them move there.

use std::ops::Range;

use rayon::prelude::*;

use crate::block::{BLOCK_LEN, bytes};
use crate::error::{Error, Result};
use crate::facts::{Class, Compression, Facts};
use crate::frame::Packer;
use crate::fs::{Filesystem, SourceFile, read_slots, read_slots_ahead};
use crate::monitor::Monitor;
use crate::numbers::{DonorExtentId, DonorId, ImageId};
use crate::plan::{COMPRESSED_BLOCKS_MAX, DonorExtent, DonorFile, ReclaimPlan};

/// Extents that are compressed at the same time.
const COMPRESSED_AT_ONCE: usize = 64;

/// A donor that was written.
#[derive(Debug, Clone)]
pub(super) struct WrittenDonor {
    /// The number by which the filesystem knows it.
    pub(super) id: DonorId,
    /// Ranges of its blocks that hold zeros, because the blocks that belong there could not be read.
    missing: Vec<Range<u32>>,
}

impl WrittenDonor {
    /// Whether it holds all blocks of a range.
    pub(super) fn has(&self, range: &Range<u32>) -> bool {
        !self
            .missing
            .iter()
            .any(|missing| missing.start < range.end && range.start < missing.end)
    }
}

/// The counts of donors that were written.
#[derive(Debug, Default)]
pub(super) struct WrittenDonors {
    /// Bytes of blocks, uncompressed.
    pub(super) bytes: u64,
    /// The errors of blocks that could not be read.
    pub(super) unreadable: Vec<Error>,
}

/// Writes the donors of a plan.
#[derive(Clone, Copy)]
pub(super) struct DonorWriter<'a> {
    pub(super) facts: &'a Facts,
    pub(super) plan: &'a ReclaimPlan,
    /// Makes the frames of compressed donors.
    pub(super) packer: Packer,
    pub(super) fs: &'a dyn Filesystem,
    pub(super) monitor: &'a dyn Monitor,
}

/// The content of a donor's extent, and its compressed frame if it shrinks enough.
struct Packed {
    content: Vec<u8>,
    frame: Option<Vec<u8>>,
}

impl DonorWriter<'_> {
    /// Writes one donor file. If the user asks to stop, it stays incomplete, and the run ends before anything is shared with it.
    pub(super) fn write(self, file: &DonorFile, written: &mut WrittenDonors) -> Result<WrittenDonor> {
        let mut donor = WrittenDonor {
            id: self.fs.create_donor(file.class)?,
            missing: Vec::new(),
        };
        let filled = self.fill(file, &mut donor, written);
        if let Err(error) = filled.and_then(|()| self.fs.settle_donor(donor.id)) {
            self.fs.discard_donor(donor.id);
            return Err(error);
        }
        Ok(donor)
    }

    /// Appends all extents of a donor file.
    fn fill(self, file: &DonorFile, donor: &mut WrittenDonor, written: &mut WrittenDonors) -> Result<()> {
        let extent = |id: &DonorExtentId| &self.plan.layout.donors()[id.index()];
        let group_len = if packs(self.fs, file.class) {
            COMPRESSED_AT_ONCE
        } else {
            1
        };
        let groups: Vec<&[DonorExtentId]> = file.extents.chunks(group_len).collect();
        let group = |number: usize| groups.get(number).copied().unwrap_or_default();
        let mut at = 0;
        let mut read = self.read(file.class, group(0));
        for number in 0..groups.len() {
            // While this group is written, the next one is read, and the one after that is read ahead.
            for id in group(number + 2) {
                self.read_ahead(extent(id));
            }
            let mut extents = group(number).iter().map(extent).zip(read);
            let (next, appended) = rayon::join(
                || self.read(file.class, group(number + 1)),
                || extents.try_for_each(|extent| self.append_read(extent, &mut at, donor, written)),
            );
            appended?;
            if self.monitor.interrupted() {
                break;
            }
            read = next;
        }
        Ok(())
    }

    /// Appends the content of an extent, which begins at the donor's block `at`. Zeros take the place of content that could not be read.
    fn append_read(
        self,
        (extent, read): (&DonorExtent, Result<Packed>),
        at: &mut u32,
        donor: &mut WrittenDonor,
        written: &mut WrittenDonors,
    ) -> Result<()> {
        let read = match read {
            // The extents around it are needed. Nothing is shared with the zeros.
            Err(error @ Error::Unreadable { .. }) => {
                written.unreadable.push(self.first_unreadable(extent).unwrap_or(error));
                donor.missing.push(*at..*at + extent.blocks);
                Packed {
                    content: vec![0; extent.blocks as usize * BLOCK_LEN],
                    frame: None,
                }
            }
            read => read?,
        };
        self.fs
            .append_to_donor(donor.id, &read.content, read.frame.as_deref())?;
        *at += extent.blocks;
        written.bytes += bytes(extent.blocks);
        self.monitor.advance(bytes(extent.blocks));
        Ok(())
    }

    /// Reads the content of extents, and makes their frames on all cores if the class asks for them.
    fn read(self, class: Class, extents: &[DonorExtentId]) -> Vec<Result<Packed>> {
        let read = |id: &DonorExtentId| {
            let extent = &self.plan.layout.donors()[id.index()];
            read_slots(self.facts, self.fs, self.plan.layout.pieces_of(extent))
        };
        if packs(self.fs, class) {
            let pack = |compressor: &mut _, extent: &DonorExtentId| self.pack(compressor, read(extent)?);
            return extents.par_iter().map_init(|| self.packer.compressor(), pack).collect();
        }
        let plain = |extent: &DonorExtentId| {
            Ok(Packed {
                content: read(extent)?,
                frame: None,
            })
        };
        extents.iter().map(plain).collect()
    }

    /// The error of reading the first block that an extent takes over and that cannot be read.
    fn first_unreadable(self, extent: &DonorExtent) -> Option<Error> {
        let pieces = self.plan.layout.pieces_of(extent).iter();
        let places = pieces.flat_map(|piece| self.facts.places_of(piece.clone()));
        places.into_iter().find_map(|(_, place)| {
            let file = SourceFile::Image(place.image);
            super::first_unreadable(self.fs, file, bytes(place.file_block), bytes(place.blocks))
        })
    }

    /// Asks the filesystem to read the content of an extent into the page cache.
    fn read_ahead(self, extent: &DonorExtent) {
        read_slots_ahead(self.facts, self.fs, self.plan.layout.pieces_of(extent));
    }

    /// Makes the frame of an extent.
    fn pack(self, compressor: &mut std::io::Result<zstd::bulk::Compressor<'_>>, content: Vec<u8>) -> Result<Packed> {
        let failed = |error: &std::io::Error| {
            Error::io("compress blocks of", self.fs.path(ImageId(0)))(std::io::Error::other(error.to_string()))
        };
        let compressor = compressor.as_mut().map_err(|error| failed(error))?;
        let frame = self.packer.pack(compressor, &content).map_err(|error| failed(&error))?;
        Ok(Packed { content, frame })
    }

    /// Appends content to a donor that the plan does not have.
    pub(super) fn append(self, donor: DonorId, class: Class, content: &[u8]) -> Result<()> {
        if !packs(self.fs, class) {
            return self.fs.append_to_donor(donor, content, None);
        }
        let mut compressor = self.packer.compressor();
        for part in content.chunks(usize::try_from(bytes(COMPRESSED_BLOCKS_MAX)).unwrap_or(usize::MAX)) {
            let Packed { content, frame } = self.pack(&mut compressor, part.to_vec())?;
            self.fs.append_to_donor(donor, &content, frame.as_deref())?;
        }
        Ok(())
    }
}

/// Whether vmfold compresses the donors of a class itself. Otherwise the filesystem does, if the class is compressed at all.
fn packs(fs: &dyn Filesystem, class: Class) -> bool {
    class.compression == Compression::Zstd && fs.takes_frames()
}
