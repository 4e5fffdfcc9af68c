//! Carries out plans, and decides nothing: it handles every range as planned, or skips and counts it.

pub mod compression;
pub mod export;
pub mod fingerprints;
pub mod hashes;
pub mod reclaim;
pub mod repair;
pub mod restore;
