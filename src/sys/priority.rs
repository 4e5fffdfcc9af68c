//! `ioprio_set` and `sched_setscheduler`: let a run yield to all other processes, except while somebody waits for it.

use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, Result};

/// `IOPRIO_WHO_PROCESS` and classes (uapi/linux/ioprio.h).
const WHO_PROCESS: libc::c_int = 1;
const CLASS_NONE: libc::c_int = 0;
const CLASS_IDLE: libc::c_int = 3 << 13;

/// Whether the process was put into the idle classes.
static GIVES_WAY: AtomicBool = AtomicBool::new(false);

/// Puts this thread, and the threads that it starts later, into the idle classes of the processor and the disk.
///
/// # Errors
/// Returns the error of the call that failed.
pub fn give_way() -> Result<()> {
    GIVES_WAY.store(true, Ordering::Release);
    set(0, libc::SCHED_IDLE, CLASS_IDLE)
}

/// Keeps the calling thread out of the idle classes until it is dropped, for work that others may have to wait for. Where the process lacks
/// the permission, the class stays as it is.
#[derive(Debug)]
pub struct Hurry {
    /// The guard must be dropped by the thread that made it.
    _thread: std::marker::PhantomData<*const ()>,
}

impl Hurry {
    /// Takes the calling thread out of the idle classes.
    pub fn begin() -> Self {
        if GIVES_WAY.load(Ordering::Acquire) {
            let _ = set(0, libc::SCHED_OTHER, CLASS_NONE);
        }
        Self {
            _thread: std::marker::PhantomData,
        }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if GIVES_WAY.load(Ordering::Acquire) {
            let _ = set(0, libc::SCHED_IDLE, CLASS_IDLE);
        }
    }
}

/// Lifts the threads of this process out of the idle classes while somebody waits for what they hold: a thread that does not get the
/// processor in the middle of a call keeps an image locked. Where the process lacks the permission, the classes stay as they are.
#[derive(Debug)]
pub struct Urgency {
    is_raised: std::cell::Cell<bool>,
}

impl Urgency {
    /// Takes the calling thread, which must be the one that notices who waits, out of the idle classes for good.
    pub fn of_this_thread() -> Self {
        // Without the drop, the thread stays out of the idle classes.
        std::mem::forget(Hurry::begin());
        Self {
            is_raised: std::cell::Cell::new(false),
        }
    }

    /// Lifts the other threads, since somebody waits.
    pub fn raise(&self) {
        self.change(true);
    }

    /// Puts the other threads back, since nobody waits.
    pub fn settle(&self) {
        self.change(false);
    }

    fn change(&self, raise: bool) {
        if !GIVES_WAY.load(Ordering::Acquire) || self.is_raised.replace(raise) == raise {
            return;
        }
        let own = rustix::thread::gettid().as_raw_nonzero().get();
        let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
        let numbers = threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        for thread in numbers.filter(|thread| *thread != own) {
            let _ = if raise {
                set(thread, libc::SCHED_OTHER, CLASS_NONE)
            } else {
                set(thread, libc::SCHED_IDLE, CLASS_IDLE)
            };
        }
    }
}

/// Sets the scheduling policy and the I/O class of a thread; 0 is the calling thread.
fn set(thread: libc::pid_t, policy: libc::c_int, io_class: libc::c_int) -> Result<()> {
    // SAFETY: both calls take plain integers, and a structure that outlives the call.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        check(libc::c_long::from(libc::sched_setscheduler(
            thread,
            policy,
            &raw const parameters,
        )))?;
        check(libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, thread, io_class))
    }
}

fn check(result: libc::c_long) -> Result<()> {
    if result == 0 {
        return Ok(());
    }
    let errno = std::io::Error::last_os_error().raw_os_error();
    Err(errno.map_or(Errno::IO, Errno::from_raw_os_error))
}
