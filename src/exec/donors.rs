//! Writes donors: what extents that go leave over, contiguous, so that every reference to them can move there.

use rayon::prelude::*;

use crate::block::bytes;
use crate::compress::{Packer, read_slots};
use crate::error::{Error, Result};
use crate::facts::{Class, Compression, Facts};
use crate::fs::{Sharing, SourceFile};
use crate::monitor::Monitor;
use crate::plan::{COMPRESSED_BLOCKS_MAX, DonorExtent, DonorFile, Plan};

/// Extents that are compressed side by side.
const SIDE_BY_SIDE: usize = 64;

/// A donor that was written.
pub(super) struct Donor {
    pub(super) number: usize,
    pub(super) bytes: u64,
}

/// What donors are written for, and how.
#[derive(Clone, Copy)]
pub(super) struct Writer<'a> {
    pub(super) facts: &'a Facts,
    pub(super) plan: &'a Plan,
    pub(super) packer: Packer,
    pub(super) fs: &'a dyn Sharing,
    pub(super) monitor: &'a dyn Monitor,
}

/// What an extent is to hold, and its frame if it is worth one.
struct Packed {
    content: Vec<u8>,
    frame: Option<Vec<u8>>,
}

impl Writer<'_> {
    /// Writes one donor file. If the user asks to stop, it stays incomplete, and nothing will be shared with it.
    pub(super) fn write(self, file: &DonorFile) -> Result<Donor> {
        let mut donor = Donor {
            number: self.fs.create_donor(file.class)?,
            bytes: 0,
        };
        let written = self.fill(file, &mut donor);
        if let Err(error) = written.and_then(|()| self.fs.settle_donor(donor.number)) {
            self.fs.discard_donor(donor.number);
            return Err(error);
        }
        Ok(donor)
    }

    fn fill(self, file: &DonorFile, donor: &mut Donor) -> Result<()> {
        let extent = |place: &u32| &self.plan.layout.donors()[*place as usize];
        let side_by_side = if packs(self.fs, file.class) { SIDE_BY_SIDE } else { 1 };
        let mut groups = file.extents.chunks(side_by_side).peekable();
        while let Some(group) = groups.next() {
            groups
                .peek()
                .iter()
                .flat_map(|next| next.iter())
                .for_each(|place| self.read_ahead(extent(place)));
            let read = |place: &u32| read_slots(self.facts, self.fs, &extent(place).pieces);
            let packed: Result<Vec<Packed>> = if packs(self.fs, file.class) {
                let pack = |compressor: &mut _, place: &u32| self.pack(compressor, read(place)?);
                group.par_iter().map_init(|| self.packer.compressor(), pack).collect()
            } else {
                let plain = |place: &u32| {
                    Ok(Packed {
                        content: read(place)?,
                        frame: None,
                    })
                };
                group.iter().map(plain).collect()
            };
            for Packed { content, frame } in packed? {
                self.fs.append_to_donor(donor.number, &content, frame.as_deref())?;
                donor.bytes += content.len() as u64;
                self.monitor.advance(content.len() as u64);
            }
            if self.monitor.interrupted() {
                break;
            }
        }
        Ok(())
    }

    fn read_ahead(self, extent: &DonorExtent) {
        for (_, place) in extent
            .pieces
            .iter()
            .flat_map(|piece| self.facts.places_of(piece.clone()))
        {
            let file = SourceFile::Image(place.image);
            self.fs.read_ahead(file, bytes(place.file_block), bytes(place.blocks));
        }
    }

    fn pack(self, compressor: &mut std::io::Result<zstd::bulk::Compressor<'_>>, content: Vec<u8>) -> Result<Packed> {
        let failed = |error: &std::io::Error| {
            Error::io("compress blocks of", self.fs.path(0))(std::io::Error::other(error.to_string()))
        };
        let compressor = compressor.as_mut().map_err(|error| failed(error))?;
        let frame = self.packer.pack(compressor, &content).map_err(|error| failed(&error))?;
        Ok(Packed { content, frame })
    }

    /// Appends content that is no donor's of the plan.
    pub(super) fn append(self, donor: usize, class: Class, content: &[u8]) -> Result<()> {
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
fn packs(fs: &dyn Sharing, class: Class) -> bool {
    class.compression == Compression::Zstd && fs.takes_frames()
}
