//! Writes donors: what extents that go leave over, contiguous, so that every reference to them can move there.

use crate::block::{BLOCK_LEN, bytes};
use crate::error::Result;
use crate::facts::Facts;
use crate::fs::{Sharing, SourceFile};
use crate::monitor::Monitor;
use crate::plan::{DonorFile, Plan};

/// A donor that was written.
pub(super) struct Donor {
    pub(super) number: usize,
    pub(super) bytes: u64,
}

/// Writes one donor file. If the user asks to stop, it stays incomplete, and nothing will be shared with it.
pub(super) fn write(
    facts: &Facts,
    plan: &Plan,
    file: &DonorFile,
    fs: &dyn Sharing,
    monitor: &dyn Monitor,
) -> Result<Donor> {
    let mut donor = Donor {
        number: fs.create_donor(file.class)?,
        bytes: 0,
    };
    let written = fill(facts, plan, file, fs, monitor, &mut donor);
    if let Err(error) = written.and_then(|()| fs.settle_donor(donor.number)) {
        fs.discard_donor(donor.number);
        return Err(error);
    }
    Ok(donor)
}

fn fill(
    facts: &Facts,
    plan: &Plan,
    file: &DonorFile,
    fs: &dyn Sharing,
    monitor: &dyn Monitor,
    donor: &mut Donor,
) -> Result<()> {
    let extents = || {
        file.extents
            .iter()
            .map(|extent| &plan.layout.donors()[*extent as usize])
    };
    let places = |pieces: &[std::ops::Range<u32>]| {
        pieces
            .iter()
            .flat_map(|piece| facts.places_of(piece.clone()))
            .map(|(_, place)| place)
            .collect::<Vec<_>>()
    };
    let mut content = Vec::new();
    let mut next = extents().skip(1);
    for extent in extents() {
        for place in next.next().map(|next| places(&next.pieces)).unwrap_or_default() {
            fs.read_ahead(
                SourceFile::Image(place.image),
                bytes(place.file_block),
                bytes(place.blocks),
            );
        }
        content.resize(extent.blocks as usize * BLOCK_LEN, 0);
        let mut rest = &mut content[..];
        for place in places(&extent.pieces) {
            let (part, after) = rest.split_at_mut(place.blocks as usize * BLOCK_LEN);
            fs.read(SourceFile::Image(place.image), bytes(place.file_block), part)?;
            rest = after;
        }
        fs.append_to_donor(donor.number, &content)?;
        donor.bytes += content.len() as u64;
        monitor.advance(content.len() as u64);
        if monitor.interrupted() {
            break;
        }
    }
    Ok(())
}
