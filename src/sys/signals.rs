//! Signal dispositions that the kernel's answers depend on.

use std::sync::Once;

/// Ignores `SIGIO`, which the kernel sends when someone opens a leased file and whose default is to end the process. Only the first
/// call has an effect: a handler that was installed since stays.
pub fn ignore_sigio() {
    static IGNORED: Once = Once::new();
    // SAFETY: SIG_IGN is a valid disposition for SIGIO, and no handler is installed yet.
    IGNORED.call_once(|| unsafe {
        libc::signal(libc::SIGIO, libc::SIG_IGN);
    });
}

/// Ignores `SIGXFSZ`, whose default is to end the process where a file would get larger than it may be: the call that writes fails with
/// `EFBIG` instead.
pub fn ignore_sigxfsz() {
    // SAFETY: SIG_IGN is a valid disposition for SIGXFSZ and no handler is installed.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Has the process say why it ends where a page of a file that lists lie in ([`super::spill`]) cannot be read or written: the kernel
/// sends `SIGBUS` then, and there is nothing to go on with.
pub fn explain_sigbus() {
    const WHY: &[u8] = b"error: what does not fit into memory lies in files beside the index, and one of them cannot be read or written \
        (the disk may be failing: see dmesg). No image is damaged, and the next run goes on from here\n";
    extern "C" fn explain(_: libc::c_int) {
        // SAFETY: both calls may be made in a handler (signal-safety(7)), and the text is there for good.
        unsafe {
            libc::write(libc::STDERR_FILENO, WHY.as_ptr().cast(), WHY.len());
            libc::_exit(1);
        }
    }
    let explain: extern "C" fn(libc::c_int) = explain;
    // SAFETY: the handler makes only such calls, and does not return.
    unsafe { libc::signal(libc::SIGBUS, explain as libc::sighandler_t) };
}
