//! Goal: what was wrong with archives before their format was frozen stays right: a commit proves all that a reader uses; writers keep the
//! limits of readers; an image cannot pass for the archive that holds it; what a reader does not know is refused in every epoch; memory is
//! bounded; a kill at any write, and damage, cost no commit that is intact; verification finds what it should. Method: archives of a simulated
//! pool, written, cut, torn, changed and sealed again, and read from a file and from a pipe.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

mod common;

#[path = "format/scene.rs"]
mod scene;

#[path = "format/writing.rs"]
mod writing;

#[path = "format/proof.rs"]
mod proof;

#[path = "format/limits.rs"]
mod limits;

#[path = "format/guest.rs"]
mod guest;

#[path = "format/unknown.rs"]
mod unknown;

#[path = "format/crash.rs"]
mod crash;

#[path = "format/verification.rs"]
mod verification;

#[path = "format/memory.rs"]
mod memory;

#[path = "format/parity.rs"]
mod parity;

#[path = "format/repair.rs"]
mod repair;
