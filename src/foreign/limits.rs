//! What readers of foreign backups accept at most. Whoever made a backup may be an enemy.

/// The limits of one backup. All of its readers share them.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of all volumes together. What is known of them takes a bit for each 64 KiB at most.
    pub volume_bytes: u64,
    /// Bytes of memory that a decompressor takes at most for what it has decompressed last (its window or dictionary).
    pub window_bytes: u64,
    /// Bytes of memory that deriving keys takes at most, on all cores together.
    pub kdf_memory_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            volume_bytes: 32 << 40,
            window_bytes: 128 << 20,
            kdf_memory_bytes: 1 << 30,
        }
    }
}
