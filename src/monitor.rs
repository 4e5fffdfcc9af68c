//! Reports progress to the caller, and asks the caller whether to go on. The library never prints.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The caller's side of a run. Every method may be called from any thread.
pub trait Monitor: Sync {
    /// Reports that a phase begins. `total_bytes` is the sum that the calls of [`Monitor::advance`] will reach, or 0 where it is unknown.
    fn phase(&self, name: &str, total_bytes: u64);
    /// Reports that `bytes` more bytes of the phase are done.
    fn advance(&self, bytes: u64);
    /// Reports something that is no error, but that the user should know.
    fn note(&self, message: &str);
    /// Whether the user asked to stop. It is called between system calls.
    fn interrupted(&self) -> bool;
    /// Returns what is left of the user's time limit; `None` if there is no limit.
    fn time_left(&self) -> Option<Duration> {
        None
    }
}

/// A monitor that asks to stop once a time limit is over, and forwards everything else.
pub struct Deadline<'a> {
    inner: &'a dyn Monitor,
    until: Option<Instant>,
}

impl<'a> Deadline<'a> {
    /// Makes a monitor whose time limit begins now; `None` is no limit.
    pub fn new(inner: &'a dyn Monitor, time: Option<Duration>) -> Self {
        Self {
            inner,
            until: time.and_then(|time| Instant::now().checked_add(time)),
        }
    }

    /// Whether the time limit is over.
    pub fn has_passed(&self) -> bool {
        self.until.is_some_and(|until| Instant::now() >= until)
    }
}

impl Monitor for Deadline<'_> {
    fn phase(&self, name: &str, total_bytes: u64) {
        self.inner.phase(name, total_bytes);
    }
    fn advance(&self, bytes: u64) {
        self.inner.advance(bytes);
    }
    fn note(&self, message: &str) {
        self.inner.note(message);
    }
    fn interrupted(&self) -> bool {
        self.has_passed() || self.inner.interrupted()
    }
    fn time_left(&self) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(Instant::now()))
    }
}

/// A monitor that reports nothing. It can be told to stop.
#[derive(Debug, Default)]
pub struct Silent {
    stop: AtomicBool,
}

impl Silent {
    /// Makes [`Monitor::interrupted`] true.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Monitor for Silent {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
