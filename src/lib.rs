//! vmfold gives people who keep virtual machines as image files their disk back: what images and revisions have in common
//! becomes shared extents, and what nothing needs any more is really freed.
//!
//! # The way of the data
//! ```text
//! pool      which files are images, and why one is left alone
//! fs        what they map (extents, references) and how to read, share and count; btrfs, XFS, and a simulated one
//! fingerprint, chunk, index
//!           a fingerprint of every block; content-defined chunks of them; both remembered across runs
//! plan      pure: from facts to a list of ops, each with its reason and what it frees and costs
//! compress  frames for compressed extents, and what samples of extents would become
//! archive   records of archives: what they hold, writing, reading
//! exec      runs a plan, decides nothing
//! ops       one verb a file: reclaim, report, scan, status
//! report    what the verbs found, as data
//! cli       arguments, progress, printing
//! spill     lists of millions, in memory as far as it goes and in files beyond that
//! sys       every `unsafe` line
//! ```
//! # Rules of the house
//! An image is changed by `FIDEDUPERANGE` and nothing else. The index is a cache: nothing in it is believed unchecked.
//! Planning does no I/O; executing makes no decision. What is reported was counted, before and after.
//! The library never prints: it talks to a [`monitor::Monitor`].

pub mod archive;
pub mod block;
pub mod chunk;
pub mod cli;
pub mod compress;
pub mod error;
pub mod exec;
pub mod facts;
pub mod fingerprint;
pub mod fs;
pub mod index;
pub mod monitor;
pub mod ops;
pub mod plan;
pub mod pool;
pub mod report;
pub mod shown;
pub mod spill;
pub mod sys;
