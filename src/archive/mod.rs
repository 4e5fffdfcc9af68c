//! Archives, as `formats/archive-v1.md` specifies them: records and how they are written and read. Nothing here knows a
//! filesystem: [`crate::ops`] puts archives and images together.
//!
//! `limits` has the limits of what records hold, and `record` those of records. `record`, `head`, `manifest` with `attributes` and `announced`, `pack`, `index`, `list` and `commit`
//! are the records, and `parity` what heals them; `writer` puts them one after the other; `stream` reads them in that order, from a pipe too, and gets over damage,
//! and `epoch` keeps what they say;
//! `open`, `salvage` and `reader` find them in a store, `lane` says which of them hold which blocks, and `protected` how much has parity; `key_check`
//! looks at all that opens a sealed one.

pub mod announced;
pub mod attributes;
pub mod commit;
pub mod epoch;
pub mod head;
pub mod index;
pub mod key_check;
pub mod keys;
pub mod lane;
pub mod limits;
pub mod list;
pub mod manifest;
pub mod newest_keys;
pub mod open;
pub mod pack;
pub mod parity;
pub mod protected;
pub mod reader;
pub mod record;
mod salvage;
pub mod seal;
pub mod sealed_end;
pub mod stream;
pub mod write_only;
pub mod writer;
