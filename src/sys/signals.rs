//! Signal dispositions that the kernel's answers depend on.

/// Ignores `SIGIO`, which the kernel sends when someone opens a leased file and whose default is to end the process.
/// The lease is asked instead ([`super::lease::is_held`]).
pub fn ignore_sigio() {
    // SAFETY: SIG_IGN is a valid disposition for SIGIO and no handler is installed.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
}
