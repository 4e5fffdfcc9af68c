//! Shows progress on a terminal, and handles Ctrl-C.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::monitor::Monitor;

/// The target of events that are notes. They go to stderr in any case, so the log does not repeat them there.
pub(super) const NOTES: &str = "note";

/// Shows phases on stderr if that is a terminal. The first Ctrl-C asks to stop. The second one ends the process at once, which is safe as
/// well.
pub(super) struct Terminal {
    /// The progress of the current phase.
    bar: Mutex<Option<ProgressBar>>,
    /// Whether the user has asked to stop.
    interrupted: Arc<AtomicBool>,
    /// Whether progress is shown, which it is if stderr is a terminal.
    shows_progress: bool,
    /// Whether notes are printed.
    shows_notes: bool,
}

impl Terminal {
    /// `is_quiet` leaves notes and progress out.
    pub(super) fn new(is_quiet: bool) -> Self {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The order matters: handlers run in it, so only the second signal finds the flag set. If a handler cannot be installed, the
            // signal ends the process, as it would without one.
            let _ = signal_hook::flag::register_conditional_shutdown(signal, 130, interrupted.clone());
            let _ = signal_hook::flag::register(signal, interrupted.clone());
        }
        Self {
            bar: Mutex::new(None),
            interrupted,
            shows_progress: !is_quiet && std::io::stderr().is_terminal(),
            shows_notes: !is_quiet,
        }
    }

    /// Prints whole lines on stderr, without disturbing the progress.
    pub(super) fn print(&self, lines: &str) {
        let bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        let print = || {
            // If stderr cannot be written, there is nowhere to report that.
            let _ = std::io::stderr().write_all(lines.as_bytes());
        };
        match &*bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Removes the progress.
    pub(super) fn finish(&self) {
        if let Some(bar) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }
}

impl Monitor for Terminal {
    fn phase(&self, name: &str, total_bytes: u64) {
        self.finish();
        if !self.shows_progress {
            return;
        }
        let (bar, template) = if total_bytes == 0 {
            (ProgressBar::new_spinner(), "{spinner} {msg} {elapsed}")
        } else {
            let template =
                "{msg} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
            (ProgressBar::new(total_bytes), template)
        };
        bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(250));
        *self.bar.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar);
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            bar.inc(bytes);
        }
    }

    fn note(&self, message: &str) {
        tracing::info!(target: NOTES, "{message}");
        if self.shows_notes {
            self.print(&format!("note: {message}\n"));
        }
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}
