//! `mallopt`: the C library's allocator, told to give memory back.

/// Bytes from which an allocation is a mapping of its own, which is given back as a whole.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Has large allocations given back to the system as soon as they are freed. By default glibc raises the size from which on it does
/// so to that of whatever was freed (up to 32 MiB), and keeps twice as much at hand: on a host of few gigabytes that is a lot.
pub fn give_back_early() {
    #[cfg(target_env = "gnu")]
    // SAFETY: plain integers; allowed at any time (mallopt(3)).
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_MMAP_MAX, 1 << 20);
    }
}
