//! Dispositions of the signals that system calls of a run may raise.

use std::sync::Once;

/// Ignores `SIGIO`, which the kernel sends when someone opens a leased file, and which would end the process by default. Only the first
/// call has an effect, so that a handler that was installed since stays.
pub fn ignore_sigio() {
    static IGNORED: Once = Once::new();
    // SAFETY: SIG_IGN is a valid disposition for SIGIO, and no handler is installed yet.
    IGNORED.call_once(|| unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
    });
}

/// Ignores `SIGXFSZ`, which would end the process where a file would exceed its size limit. The write fails with `EFBIG` instead.
pub fn ignore_sigxfsz() {
    // SAFETY: SIG_IGN is a valid disposition for SIGXFSZ and no handler is installed.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Installs a handler that says why the process ends when a page of a mapped spill file ([`super::spill`]) cannot be read or written. The
/// kernel then sends `SIGBUS`, after which the process cannot continue.
pub fn explain_sigbus() {
    const WHY: &[u8] = b"error: what does not fit into memory lies in files beside the index, and one of them cannot be read or written \
        (the disk may be failing: see dmesg). No image is damaged, and the next run goes on from here\n";
    extern "C" fn explain(_: libc::c_int) {
        // SAFETY: both functions are async-signal-safe (signal-safety(7)), and the text is static.
        unsafe {
            libc::write(libc::STDERR_FILENO, WHY.as_ptr().cast(), WHY.len());
            libc::_exit(1);
        }
    }
    let explain: extern "C" fn(libc::c_int) = explain;
    // SAFETY: the handler calls only async-signal-safe functions, and does not return.
    unsafe { libc::signal(libc::SIGBUS, explain as libc::sighandler_t) };
}
