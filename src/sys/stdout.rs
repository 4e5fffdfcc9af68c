//! Whether standard output was open when the process began. Rust's runtime puts `/dev/null` in the place of what is closed before
//! `main` begins, and a report or an archive that is written there is lost without an error.

use std::sync::atomic::{AtomicBool, Ordering};

static WAS_CLOSED: AtomicBool = AtomicBool::new(false);

extern "C" fn look() {
    // SAFETY: the call has no memory to do with; it fails with EBADF if there is no such descriptor.
    let closed = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_GETFD) } == -1;
    WAS_CLOSED.store(closed, Ordering::Relaxed);
}

// SAFETY: the loader calls what stands in this section without arguments, before Rust's runtime begins. `look` needs nothing of it.
#[used]
#[unsafe(link_section = ".init_array")]
static LOOK: extern "C" fn() = look;

/// Whether standard output was closed when the process began.
pub fn was_closed() -> bool {
    WAS_CLOSED.load(Ordering::Relaxed)
}
