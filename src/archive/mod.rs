//! Archives, as `formats/archive-v1.md` specifies them: records and how they are written and read. Nothing here knows a
//! filesystem: [`crate::ops`] puts archives and images together.
//!
//! `record`, `head`, `manifest`, `pack`, `index` and `commit` are the records; `writer` puts
//! them one after the other; `stream` reads them in that order, from a pipe too, and gets over damage; `reader` finds them
//! in a store.

pub mod commit;
pub mod head;
pub mod index;
pub mod manifest;
pub mod pack;
pub mod reader;
pub mod record;
pub mod stream;
pub mod writer;
