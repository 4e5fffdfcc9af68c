//! What holds of each backup, whatever its format: it has no more volumes, longer names or more content than the limits allow. The user is told
//! which names are not those that the backup has.

use std::path::{Path, PathBuf};

use super::volume_name::{self, Changed};
use super::{Backup, Event, Limits, Machine, Notes, Origin};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::shown::shown;

/// Components of a name. Each costs a look at all names that are known.
const COMPONENTS_MAX: usize = 64;

/// A backup that keeps to its limits.
pub(super) struct Bounded<'a> {
    backup: Box<dyn Backup + 'a>,
    path: PathBuf,
    limits: Limits,
    /// Names that were told, and their bytes.
    names: usize,
    name_bytes: usize,
    /// Names that are not those that the backup has.
    changed: Notes,
    /// Bytes of content that were handed over.
    content_bytes: u64,
    monitor: &'a dyn Monitor,
}

impl<'a> Bounded<'a> {
    /// The backup of this path with these limits.
    pub(super) fn new(backup: Box<dyn Backup + 'a>, path: &Path, limits: Limits, monitor: &'a dyn Monitor) -> Self {
        Self {
            backup,
            path: path.to_owned(),
            limits,
            names: 0,
            name_bytes: 0,
            changed: Notes::default(),
            content_bytes: 0,
            monitor,
        }
    }

    /// Counts a name.
    fn take_name(&mut self, name: &Path) -> Result<()> {
        self.names += 1;
        self.name_bytes += name.as_os_str().len();
        if self.names > self.limits.volumes || self.name_bytes > self.limits.name_bytes {
            return Err(self.refused("it has more files than vmfold takes, or longer names"));
        }
        if name.components().nth(COMPONENTS_MAX).is_some() {
            return Err(self.refused("a file lies in more folders than vmfold takes"));
        }
        if let Some(changed) = volume_name::changed(name) {
            self.note_changed(name, changed);
        }
        Ok(())
    }

    /// Tells the user of a name that is not the one that the backup has.
    fn note_changed(&mut self, name: &Path, changed: Changed) {
        let name = shown(name);
        let note = || match changed {
            Changed::Shortened => {
                format!("`{name}` has a longer name in the backup, which is cut: the digits tell it from others")
            }
            Changed::Escaped => format!(
                "`{name}` has another name in the backup, which no file may have here: `%` and two digits stand for a byte"
            ),
        };
        let more = "More names are others in the backup, and are not shown here";
        self.changed.tell(self.monitor, note, more);
    }

    fn refused(&self, problem: &str) -> Error {
        Error::RefusedBackup {
            path: self.path.clone(),
            problem: problem.into(),
        }
    }
}

impl Backup for Bounded<'_> {
    fn kind(&self) -> &'static str {
        self.backup.kind()
    }

    fn origin(&self) -> Origin {
        self.backup.origin()
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        let event = self.backup.next(buffer)?;
        match &event {
            Some(Event::Volume(volume)) => self.take_name(&volume.path)?,
            Some(Event::Link { path, .. }) => self.take_name(path)?,
            Some(Event::Data { .. }) => {
                self.content_bytes = self.content_bytes.saturating_add(buffer.len() as u64);
                if self.content_bytes > self.limits.volume_bytes {
                    return Err(self.refused("it has more content than vmfold takes"));
                }
            }
            Some(Event::End { .. }) | None => {}
        }
        Ok(event)
    }

    fn proves_each_volume(&self) -> bool {
        self.backup.proves_each_volume()
    }

    fn holds_blocks_in_place(&self) -> bool {
        self.backup.holds_blocks_in_place()
    }

    fn machines(&self) -> &[Machine] {
        self.backup.machines()
    }

    fn leave_out(&mut self, volume: usize) {
        self.backup.leave_out(volume);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::foreign::Volume;
    use crate::monitor::Silent;

    /// A backup of these events.
    struct Told(Vec<(Event, Vec<u8>)>);

    impl Backup for Told {
        fn kind(&self) -> &'static str {
            "told"
        }
        fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
            Ok(self.0.pop().map(|(event, content)| {
                *buffer = content;
                event
            }))
        }
        fn proves_each_volume(&self) -> bool {
            true
        }
    }

    /// Why a backup of these events is refused, with 3 names of 100 bytes and 100 bytes of content.
    fn refusal(mut events: Vec<(Event, Vec<u8>)>) -> Option<String> {
        let limits = Limits {
            volumes: 3,
            name_bytes: 1000,
            volume_bytes: 100,
            ..Limits::default()
        };
        events.reverse();
        let monitor = Silent::default();
        let mut backup = Bounded::new(Box::new(Told(events)), Path::new("told"), limits, &monitor);
        loop {
            match backup.next(&mut Vec::new()) {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(error) => return Some(error.to_string()),
            }
        }
    }

    #[test]
    fn what_is_more_than_the_limits_allow_is_refused() {
        let volume = |path: &str| {
            let path = path.into();
            let volume = Volume {
                path,
                size: None,
                time: None,
            };
            (Event::Volume(volume), Vec::new())
        };
        let data = |volume, bytes| (Event::Data { volume, offset: 0 }, vec![1; bytes]);
        let link = |path: &str| {
            let path = path.into();
            (Event::Link { volume: 0, path }, Vec::new())
        };
        let nested = |folders: usize| "a/".repeat(folders) + "b";
        for (events, problem) in [
            (
                vec![volume("a"), data(0, 60), volume("b"), data(1, 40), link("c")],
                None,
            ),
            (
                vec![volume("a"), data(0, 60), volume("b"), data(1, 41)],
                Some("more content"),
            ),
            (vec![volume("a"), link("b"), link("c"), link("d")], Some("more files")),
            (vec![volume("a"), volume(&"x".repeat(1000))], Some("longer names")),
            (vec![volume(&nested(63))], None),
            (vec![volume(&nested(64))], Some("more folders")),
        ] {
            let refusal = refusal(events);
            assert_eq!(refusal.is_some(), problem.is_some(), "{refusal:?}");
            assert!(refusal.unwrap_or_default().contains(problem.unwrap_or_default()));
        }
    }
}
