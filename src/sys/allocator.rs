//! `mallopt`: makes the C library's allocator return freed memory to the system.

/// From this size on, an allocation is a mapping of its own, which is unmapped when it is freed.
#[cfg(target_env = "gnu")]
const MAPPED_BYTES: libc::c_int = 128 << 10;

/// Makes the allocator return large allocations to the system as soon as they are freed. By default glibc raises the mmap threshold to the
/// size of whatever was freed (up to 32 MiB) and the trim threshold to twice that (mallopt(3)), which is a lot on a host with a few
/// gigabytes.
pub fn give_back_early() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes plain integers, and is allowed at any time (mallopt(3)).
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, MAPPED_BYTES);
        libc::mallopt(libc::M_MMAP_MAX, 1 << 20);
    }
}
