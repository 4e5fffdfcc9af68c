//! How much memory planning may take for each block.

use std::io::Result;

use super::table::Table;
use crate::block::Slot;
use crate::facts::Facts;
use crate::fingerprint::Fingerprints;

/// Bytes for each slot: its fingerprint, twice, since planning looks at the pool as it would be as well.
const FINGERPRINT_BYTES: u64 = 8;

/// Memory for tables of blocks, in bytes, unless someone says otherwise: 32 MiB, and 48 MiB more for each TiB of extents.
pub fn memory_bytes(slots: Slot) -> u64 {
    const SLOTS_PER_MIB: u64 = (1 << 28) / 48;
    (32 + u64::from(slots) / SLOTS_PER_MIB) << 20
}

/// Memory for lists of extents, of what images map, and of what is to be done, in bytes, beside tables of so many: as much again. What is
/// more of them lies in files.
pub fn lists_bytes(memory_bytes: u64) -> u64 {
    memory_bytes
}

/// Whether a pool's fingerprints fit in, beside a block table of all its slots. If not, they are kept in a file, and as many slots as
/// fit can be looked up.
fn fits(facts: &Facts, memory_bytes: u64) -> bool {
    u64::from(facts.slots()) * (FINGERPRINT_BYTES + Table::SLOT_BYTES) <= memory_bytes
}

/// Makes room for a pool's fingerprints within `memory_bytes`, with a file where its budget has them if they do not fit, and says how large
/// a block table may be.
///
/// # Errors
/// If there can be no such file.
pub fn make_room(facts: &mut Facts, memory_bytes: u64) -> Result<()> {
    let slots = facts.slots() as usize;
    facts.table_slots_max = usize::try_from(memory_bytes / Table::SLOT_BYTES).unwrap_or(usize::MAX);
    facts.fingerprints = if fits(facts, memory_bytes) {
        Fingerprints::in_memory(slots)
    } else {
        Fingerprints::in_file(slots, facts.budget())?
    };
    Ok(())
}
