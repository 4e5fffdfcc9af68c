//! Notes about things of the same kind, of which a hostile backup can have very many.

use std::path::Path;

use super::NOTES_MAX;
use crate::monitor::Monitor;
use crate::shown::shown;

/// How many things of a kind there were.
#[derive(Debug, Default)]
pub(super) struct Notes {
    count: usize,
}

impl Notes {
    /// Tells the user of one more thing, as long as it is among the first ones; of the one behind these, only that there are more.
    pub(super) fn tell(&mut self, monitor: &dyn Monitor, note: impl FnOnce() -> String, more: &str) {
        self.count += 1;
        if self.count <= NOTES_MAX {
            monitor.note(&note());
        } else if self.count == NOTES_MAX + 1 {
            monitor.note(more);
        }
    }

    /// Tells the user of an entry that is neither a file nor a folder.
    pub(super) fn tell_left_out(&mut self, monitor: &dyn Monitor, path: &Path) {
        let note = || format!("`{}` is neither a file nor a folder, and is left out", shown(path));
        self.tell(
            monitor,
            note,
            "More is left out that is neither a file nor a folder, and is not named here",
        );
    }
}
