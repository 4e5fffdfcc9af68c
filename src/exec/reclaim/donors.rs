//! Writes donors: what extents that go leave over, contiguous, so that every reference to them can move there.

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

/// Extents that are compressed side by side.
const SIDE_BY_SIDE: usize = 64;

/// A donor that was written.
#[derive(Debug, Clone)]
pub(super) struct WrittenDonor {
    pub(super) id: DonorId,
    /// Blocks that it does not hold, since they could not be read.
    missing: Vec<Range<u32>>,
}

impl WrittenDonor {
    /// Whether a range of blocks is there.
    pub(super) fn has(&self, range: &Range<u32>) -> bool {
        !self
            .missing
            .iter()
            .any(|missing| missing.start < range.end && range.start < missing.end)
    }
}

/// What came of writing donors.
#[derive(Debug, Default)]
pub(super) struct WrittenDonors {
    pub(super) bytes: u64,
    /// What could not be read for them.
    pub(super) unreadable: Vec<Error>,
}

/// What donors are written for, and how.
#[derive(Clone, Copy)]
pub(super) struct DonorWriter<'a> {
    pub(super) facts: &'a Facts,
    pub(super) plan: &'a ReclaimPlan,
    pub(super) packer: Packer,
    pub(super) fs: &'a dyn Filesystem,
    pub(super) monitor: &'a dyn Monitor,
}

/// What an extent is to hold, and its frame if it is worth one.
struct Packed {
    content: Vec<u8>,
    frame: Option<Vec<u8>>,
}

impl DonorWriter<'_> {
    /// Writes one donor file. If the user asks to stop, it stays incomplete, and nothing will be shared with it.
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

    fn fill(self, file: &DonorFile, donor: &mut WrittenDonor, written: &mut WrittenDonors) -> Result<()> {
        let extent = |extent: &DonorExtentId| &self.plan.layout.donors()[extent.index()];
        let side_by_side = if packs(self.fs, file.class) { SIDE_BY_SIDE } else { 1 };
        let groups: Vec<&[DonorExtentId]> = file.extents.chunks(side_by_side).collect();
        let group = |number: usize| groups.get(number).copied().unwrap_or_default();
        let mut at = 0;
        let mut read = self.read(file.class, group(0));
        for number in 0..groups.len() {
            // While one group is written, the next is read, and the one after that asked for.
            for one in group(number + 2) {
                self.read_ahead(extent(one));
            }
            let mut extents = group(number).iter().map(extent).zip(read);
            let (next, appended) = rayon::join(
                || self.read(file.class, group(number + 1)),
                || extents.try_for_each(|one| self.append_read(one, &mut at, donor, written)),
            );
            appended?;
            if self.monitor.interrupted() {
                break;
            }
            read = next;
        }
        Ok(())
    }

    /// Appends what was read for an extent, which is to be at block `at`.
    fn append_read(
        self,
        (extent, read): (&DonorExtent, Result<Packed>),
        at: &mut u32,
        donor: &mut WrittenDonor,
        written: &mut WrittenDonors,
    ) -> Result<()> {
        let read = match read {
            // Others need what is around it. In its place are zeros, which nothing is shared with.
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

    /// Reads what extents are to hold, and makes their frames side by side.
    fn read(self, class: Class, extents: &[DonorExtentId]) -> Vec<Result<Packed>> {
        let read = |extent: &DonorExtentId| {
            let extent = &self.plan.layout.donors()[extent.index()];
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

    /// The error of the first block of what an extent takes over that cannot be read.
    fn first_unreadable(self, extent: &DonorExtent) -> Option<Error> {
        let pieces = self.plan.layout.pieces_of(extent).iter();
        let places = pieces.flat_map(|piece| self.facts.places_of(piece.clone()));
        places.into_iter().find_map(|(_, place)| {
            let file = SourceFile::Image(place.image);
            super::first_unreadable(self.fs, file, bytes(place.file_block), bytes(place.blocks))
        })
    }

    fn read_ahead(self, extent: &DonorExtent) {
        read_slots_ahead(self.facts, self.fs, self.plan.layout.pieces_of(extent));
    }

    fn pack(self, compressor: &mut std::io::Result<zstd::bulk::Compressor<'_>>, content: Vec<u8>) -> Result<Packed> {
        let failed = |error: &std::io::Error| {
            Error::io("compress blocks of", self.fs.path(ImageId(0)))(std::io::Error::other(error.to_string()))
        };
        let compressor = compressor.as_mut().map_err(|error| failed(error))?;
        let frame = self.packer.pack(compressor, &content).map_err(|error| failed(&error))?;
        Ok(Packed { content, frame })
    }

    /// Appends content that is no donor's of the plan.
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

/// Whether frames are made here, and not by the filesystem.
fn packs(fs: &dyn Filesystem, class: Class) -> bool {
    class.compression == Compression::Zstd && fs.takes_frames()
}
