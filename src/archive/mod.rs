//! Archives, as `formats/archive-v1.md` specifies them: records and how they are written and read. Nothing here knows a
//! filesystem: [`crate::ops`] puts archives and images together.
//!
//! `bytes` reads and writes fields; `record`, `head`, `manifest`, `pack`, `index` and `commit` are the records; `writer` puts
//! them one after the other; `stream` reads them in that order, from a pipe too, and gets over damage; `reader` finds them
//! in a file.

pub mod bytes;
pub mod commit;
pub mod head;
pub mod index;
pub mod manifest;
pub mod pack;
pub mod reader;
pub mod record;
pub mod stream;
pub mod writer;

/// A block's number in the store of an archive.
pub type StoreBlock = u32;

/// Blocks of a store at most: 16 TiB.
pub const STORE_BLOCKS_MAX: StoreBlock = u32::MAX - 1;
