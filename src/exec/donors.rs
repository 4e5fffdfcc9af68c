//! Writes donors: what extents that go leave over, contiguous, so that every reference to them can move there.

use super::Run;
use crate::block::{BLOCK_LEN, bytes};
use crate::error::Result;
use crate::fs::SourceFile;
use crate::plan::DonorFile;

/// Writes one donor file and returns the donor's number.
pub(super) fn write(run: &mut Run<'_>, file: &DonorFile) -> Result<usize> {
    let donor = run.fs.create_donor(file.class)?;
    let extents = || file.extents.iter().map(|extent| &run.plan.layout.donors()[*extent as usize]);
    let pieces = |pieces: &[std::ops::Range<u32>]| {
        pieces.iter().flat_map(|piece| run.facts.places_of(piece.clone())).map(|(_, place)| place).collect::<Vec<_>>()
    };
    let mut content = Vec::new();
    let mut ahead = extents().peekable();
    let _ = ahead.next();
    for extent in extents() {
        if let Some(next) = ahead.next() {
            for place in pieces(&next.pieces) {
                run.fs.read_ahead(SourceFile::Image(place.image), bytes(place.file_block), bytes(place.blocks));
            }
        }
        content.resize(extent.blocks as usize * BLOCK_LEN, 0);
        let mut rest = &mut content[..];
        for place in pieces(&extent.pieces) {
            let (part, after) = rest.split_at_mut(place.blocks as usize * BLOCK_LEN);
            run.fs.read(SourceFile::Image(place.image), bytes(place.file_block), part)?;
            rest = after;
        }
        run.fs.append_to_donor(donor, &content)?;
        run.ran.counts.written_bytes += content.len() as u64;
        run.monitor.advance(content.len() as u64);
        if run.monitor.interrupted() {
            break;
        }
    }
    run.fs.settle_donor(donor)?;
    Ok(donor)
}
