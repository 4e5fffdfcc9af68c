//! Does what plans say and decides nothing: every range is handled as planned, or skipped and counted.

pub mod compression;
pub mod export;
pub mod fingerprints;
pub mod hashes;
pub mod reclaim;
pub mod restore;
