//! vmfold gives people who keep virtual machines as image files their disk back: what images and revisions have in common
//! becomes shared extents, and what nothing needs any more is really freed.
//!
//! # The map
//! Each line may use those below it, and no other; `tests/tidy.rs` holds that. Names without an explanation are one file.
//! ```text
//! testing     what only tests use: a simulated filesystem, stores that fail
//! cli         arguments, progress, printing, man pages
//! ops         one verb a file; no verb uses another
//! report      what the verbs found, as data and as text
//! exec        does what plans say and decides nothing: fingerprints, reclaim, export, restore (import)
//! plan        pure: what reclaim shares, what an export stores, what a restore needs
//! index       what earlier runs learnt, in sled or in memory; a cache
//! fs          what a filesystem can do, behind one trait: btrfs, XFS, and plain ones that share nothing
//! pool        which files are images, and why one is left alone
//! archive     records of archives: what they hold, writing, reading
//! store       where archives live: files, pipes, memory
//! facts       extents and references, as plans see them
//! spill       lists of millions, in memory as far as it goes and in files beyond that
//! frame       zstd frames that btrfs takes as they are
//! chunk       content-defined chunks
//! fingerprint fingerprints of blocks
//! own_folder  folders that nobody else can write to
//! monitor     whom the library tells what it does, and who may stop it
//! error
//! content     what images hold, as archives keep it
//! codec       numbers and strings as bytes, and back, with limits
//! shown       names and sizes as people read them
//! range       arithmetic of ranges
//! block       blocks and slots
//! numbers     types of numbers: commits, images, extents, blocks of a store
//! sys         every `unsafe` line
//! ```
//! # Rules of the house
//! An image is changed by `FIDEDUPERANGE` and nothing else. The index is a cache: nothing in it is believed unchecked.
//! Planning does no I/O; executing makes no decision. What is reported was counted, before and after.
//! The library never prints: it talks to a [`monitor::Monitor`].
//!
//! `src/README.md` says how data flows, what is trusted, and which files a change touches.

pub mod archive;
pub mod block;
pub mod chunk;
pub mod cli;
pub mod codec;
pub mod content;
pub mod error;
pub mod exec;
pub mod facts;
pub mod fingerprint;
pub mod frame;
pub mod fs;
pub mod index;
pub mod monitor;
pub mod numbers;
pub mod ops;
pub mod own_folder;
pub mod plan;
pub mod pool;
pub mod range;
pub mod report;
pub mod shown;
pub mod spill;
pub mod store;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
