//! Progress on a terminal, and Ctrl-C.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::monitor::Monitor;

/// What the log calls notes: stderr has them in any case.
pub(super) const NOTES: &str = "note";

/// Shows phases on stderr if that is a terminal. The first Ctrl-C asks to stop; the second ends the process at once, which is
/// safe as well.
pub(super) struct Terminal {
    bar: Mutex<Option<ProgressBar>>,
    interrupted: Arc<AtomicBool>,
    shows: bool,
}

impl Terminal {
    pub(super) fn new() -> Self {
        let interrupted = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // The order matters: the second signal finds the flag set. Where a handler cannot be installed, the signal ends
            // the process, as it would without.
            let _ = signal_hook::flag::register_conditional_shutdown(signal, 130, interrupted.clone());
            let _ = signal_hook::flag::register(signal, interrupted.clone());
        }
        Self {
            bar: Mutex::new(None),
            interrupted,
            shows: std::io::stderr().is_terminal(),
        }
    }

    /// Prints whole lines on stderr, beside the progress.
    pub(super) fn print(&self, lines: &str) {
        let bar = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        let print = || {
            // There is nowhere else to say that it could not be said.
            let _ = std::io::stderr().write_all(lines.as_bytes());
        };
        match &*bar {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    /// Takes the progress away.
    pub(super) fn finish(&self) {
        if let Some(bar) = self.bar.lock().unwrap_or_else(PoisonError::into_inner).take() {
            bar.finish_and_clear();
        }
    }
}

impl Monitor for Terminal {
    fn phase(&self, name: &str, total_bytes: u64) {
        self.finish();
        if !self.shows {
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
        self.print(&format!("note: {message}\n"));
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}
