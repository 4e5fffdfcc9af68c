//! How the library tells whoever called it what it is doing, and asks whether to go on. The library never prints.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A listener. Every method may be called from any thread.
pub trait Monitor: Sync {
    /// A phase begins; `total_bytes` is what [`Monitor::advance`] will add up to, or 0 where that is not known.
    fn phase(&self, name: &str, total_bytes: u64);
    /// So many bytes more are done.
    fn advance(&self, bytes: u64);
    /// Something that is not an error of the run, but that the user should know.
    fn note(&self, message: &str);
    /// Whether the user asked to stop. Looked at between system calls.
    fn interrupted(&self) -> bool;
    /// What is left of the time that the user gave; none if there is no limit.
    fn time_left(&self) -> Option<Duration> {
        None
    }
}

/// Asks to stop once a time is over, and passes everything else on.
pub struct Deadline<'a> {
    inner: &'a dyn Monitor,
    until: Option<Instant>,
}

impl<'a> Deadline<'a> {
    /// So long from now on; none for as long as it takes.
    pub fn new(inner: &'a dyn Monitor, time: Option<Duration>) -> Self {
        Self {
            inner,
            until: time.and_then(|time| Instant::now().checked_add(time)),
        }
    }

    /// Whether the time is over.
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

/// Says nothing; can be told to stop.
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
