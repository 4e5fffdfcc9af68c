//! How much memory planning may take for each block of a pool.

use super::table::BYTES_PER_BLOCK;

/// Bytes for each slot: its fingerprint, twice, since planning looks at the pool as it would be as well.
const FINGERPRINT_BYTES: u64 = 8;

/// Memory for tables of blocks, in bytes, unless the user says otherwise: 32 MiB, and 48 MiB more for each TiB of extents.
pub fn memory_bytes(slots: u32) -> u64 {
    const SLOTS_PER_MIB: u64 = (1 << 28) / 48;
    (32 + u64::from(slots) / SLOTS_PER_MIB) << 20
}

/// Memory for lists of extents, of what images map, and of what is to be done, in bytes, beside tables of so many: as much again. What is
/// more of them lies in files.
pub fn lists_bytes(memory_bytes: u64) -> u64 {
    memory_bytes
}

/// Whether the fingerprints of so many slots fit into `memory_bytes`, beside a block table of all of them. If they do not, they belong
/// into a file, and [`table_slots_max`] of the slots can be looked up.
pub fn fingerprints_fit(slots: u32, memory_bytes: u64) -> bool {
    u64::from(slots) * (FINGERPRINT_BYTES + BYTES_PER_BLOCK) <= memory_bytes
}

/// The slots that a block table of `memory_bytes` can hold.
pub fn table_slots_max(memory_bytes: u64) -> usize {
    usize::try_from(memory_bytes / BYTES_PER_BLOCK).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_grows_with_the_pool() {
        const TIB_SLOTS: u32 = 1 << 28;
        assert_eq!(memory_bytes(0), 32 << 20);
        assert_eq!(memory_bytes(TIB_SLOTS) >> 20, 32 + 48);
        assert_eq!(memory_bytes(8 * TIB_SLOTS) >> 20, 32 + 8 * 48);
    }

    #[test]
    fn what_fits_can_be_looked_up_as_a_whole() {
        for slots in [1, 1000, 1 << 28] {
            let least = u64::from(slots) * (FINGERPRINT_BYTES + BYTES_PER_BLOCK);
            assert!(fingerprints_fit(slots, least) && !fingerprints_fit(slots, least - 1));
            assert!(table_slots_max(least) >= slots as usize);
        }
    }
}
