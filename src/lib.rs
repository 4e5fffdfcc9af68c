//! vmfold frees disk space for people who keep virtual machines as image files: what images and revisions have in common becomes shared
//! extents, and what nothing refers to is freed.
//!
//! # The map
//! A line may use the lines below it, and no other; `tests/tidy.rs` checks that. A name without an explanation is one file.
//! ```text
//! testing     what only tests use: a simulated filesystem, stores that fail
//! cli         arguments, progress, printing, man pages
//! ops         one verb a file; no verb uses another
//! report      what the verbs found, as data and as text
//! exec        carries plans out and decides nothing: fingerprints, reclaim, export, restore (import)
//! plan        pure: what reclaim shares, what an export stores, what a restore needs
//! index       what earlier runs learnt, in sled or in memory; a cache
//! fs          what a filesystem can do, behind one trait: btrfs, XFS, and plain ones that share nothing
//! pool        which files are images, and why one is left alone
//! qubes       a running Qubes OS: what its daemon is asked
//! foreign     backups that other programs made: what they hold, reading
//! archive     records of archives: what they hold, writing, reading
//! parity      what is stored so that lost bytes of an archive can be computed
//! seen        what this host has seen of sealed archives
//! keys        keys of sealed archives: secrets, the keyring, how people keep it and open it
//! store       where archives live: files, pipes, memory
//! facts       extents and references, as plans see them
//! frame       zstd frames that btrfs stores as they are
//! chunk       content-defined chunks
//! fingerprint fingerprints of blocks
//! named_folder  folders that the user named, without links of others on the way
//! new_file    new files that only this user can read
//! own_folder  folders that nobody else can write to
//! monitor     the caller's progress and interruption, as a trait
//! error       every error, with its kind and its hint
//! spill       lists of millions of items, in memory up to a budget and in files beyond it
//! content     what images hold, as archives keep it
//! codec       numbers and strings as bytes, and back, with limits
//! shown       names and sizes as people read them
//! range       arithmetic of ranges
//! block       blocks, and sets of numbers
//! numbers     types of numbers: commits, images, extents, slots, donors, blocks of a store
//! sys         every `unsafe` line
//! ```
//! # Rules of the house
//! An image is changed by `FIDEDUPERANGE` and nothing else. The index is a cache: nothing in it is trusted unchecked. Planning does no I/O;
//! executing makes no decision. Reported numbers are counted before and after a run. The library never prints: it reports to a
//! [`monitor::Monitor`].
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
pub mod foreign;
pub mod frame;
pub mod fs;
pub mod index;
pub mod keys;
pub mod monitor;
pub mod named_folder;
pub mod new_file;
pub mod numbers;
pub mod ops;
pub mod own_folder;
pub mod parity;
pub mod plan;
pub mod pool;
pub mod qubes;
pub mod range;
pub mod report;
pub mod seen;
pub mod shown;
pub mod spill;
pub mod store;
pub mod sys;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
