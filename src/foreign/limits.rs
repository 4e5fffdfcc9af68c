//! What readers of foreign backups accept at most. Whoever made a backup may be an enemy.

use crate::sys::memory::limits;

/// The limits of one backup. All of its readers share them.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of a volume, and of the content of all volumes together. What is known of a volume takes a bit for each 64 KiB at most.
    pub volume_bytes: u64,
    /// Volumes of a backup, and their further names.
    pub volumes: usize,
    /// Bytes of all of their names together. These are kept several times, and each byte may take three when it is escaped.
    pub name_bytes: usize,
    /// Bytes of memory that a decompressor takes at most for what it has decompressed last (its window or dictionary).
    pub window_bytes: u64,
    /// Bytes of memory that deriving keys takes at most, on all cores together. `None` is 1 GiB, or half of what is available if that is less.
    pub kdf_memory_bytes: Option<u64>,
}

impl Limits {
    /// Bytes of memory that deriving keys takes at most, where that is not set.
    const KDF_MEMORY_BYTES: u64 = 1 << 30;

    /// Bytes of memory that deriving keys takes at most now.
    pub fn kdf_memory_bytes(&self) -> u64 {
        self.kdf_memory_bytes.unwrap_or_else(|| {
            let available = limits().into_iter().map(|memory| memory.available_bytes).min();
            available.map_or(Self::KDF_MEMORY_BYTES, |bytes| Self::KDF_MEMORY_BYTES.min(bytes / 2))
        })
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            volume_bytes: 32 << 40,
            volumes: 1 << 16,
            name_bytes: 8 << 20,
            window_bytes: 128 << 20,
            kdf_memory_bytes: None,
        }
    }
}
