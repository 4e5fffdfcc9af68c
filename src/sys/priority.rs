//! `ioprio_set` and `sched_setscheduler`: to give way to everyone else.

use rustix::io::{Errno, Result};

/// `IOPRIO_WHO_PROCESS` and `IOPRIO_CLASS_IDLE` (uapi/linux/ioprio.h).
const WHO_PROCESS: libc::c_int = 1;
const CLASS_IDLE: libc::c_int = 3 << 13;

/// Puts this thread, and those it starts from now on, into the idle classes for the processor and the disk.
///
/// # Errors
/// Those of the system calls.
pub fn give_way() -> Result<()> {
    // SAFETY: both calls take plain integers, and a structure that outlives the call.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        check(libc::c_long::from(libc::sched_setscheduler(
            0,
            libc::SCHED_IDLE,
            &raw const parameters,
        )))?;
        check(libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0, CLASS_IDLE))
    }
}

fn check(result: libc::c_long) -> Result<()> {
    if result == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(errno.map_or(Errno::IO, Errno::from_raw_os_error))
}
