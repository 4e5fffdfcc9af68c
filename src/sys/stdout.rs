//! Tells whether standard output was open when the process began. Before `main`, Rust's runtime opens `/dev/null` in place of closed
//! standard descriptors, so that a report or an archive written there would be lost without an error.

use std::sync::atomic::{AtomicBool, Ordering};

static WAS_CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: the call takes plain integers and fails with EBADF if the descriptor is closed.
    let closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
    WAS_CLOSED.store(closed, Ordering::Relaxed);
}

// SAFETY: the loader calls the functions in this section without arguments, before Rust's runtime begins. `look` needs nothing of the
// runtime.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether standard output was closed when the process began.
pub fn was_closed() -> bool {
    WAS_CLOSED.load(Ordering::Relaxed)
}
