//! Fills volumes, machine by machine. While one is filled, it has a tag that keeps Qubes OS from starting it.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

use super::targets::{Target, check_halted, check_unchanged};
use super::work::{Step, Work};
use crate::error::{Error, Result, describe};
use crate::monitor::Monitor;
use crate::qubes::{Qubesd, RESTORE_TAG};
use crate::report::FilledVolume;
use crate::shown::shown;
use crate::sys::beneath::Folder;
use crate::sys::clone::clone_range;

/// Fills volumes.
pub(super) struct Filling<'a> {
    daemon: &'a dyn Qubesd,
    work: &'a mut Work,
    monitor: &'a dyn Monitor,
    filled: Vec<FilledVolume>,
}

impl<'a> Filling<'a> {
    pub(super) fn new(daemon: &'a dyn Qubesd, work: &'a mut Work, monitor: &'a dyn Monitor) -> Self {
        Self {
            daemon,
            work,
            monitor,
            filled: Vec::new(),
        }
    }

    /// The volumes that were filled.
    pub(super) fn into_filled(self) -> Vec<FilledVolume> {
        self.filled
    }

    /// Fills all volumes. The first that fails is the last.
    ///
    /// # Errors
    /// [`Error::Qubesd`]; [`Error::InUse`] if a machine was started; [`Error::Io`] if an image cannot be cloned; [`Error::Interrupted`].
    pub(super) fn fill(&mut self, targets: &[Target]) -> Result<()> {
        let sizes = targets.iter().map(|target| self.work.size(&target.wanted.image));
        self.monitor.phase("Filling volumes", sizes.sum());
        for target in targets {
            let image = &target.wanted.image;
            // An earlier run may have been stopped between what the daemon did and the note of it.
            if self.work.step(image) == Some(Step::Ending) && !target.is_blank && self.work.holds(target) {
                self.note_filled(target)?;
            }
        }
        let mut machines: Vec<&str> = targets.iter().map(|target| target.wanted.machine.as_str()).collect();
        machines.dedup();
        for machine in machines {
            let left = targets.iter().filter(|target| {
                target.wanted.machine == machine && self.work.step(&target.wanted.image) != Some(Step::Filled)
            });
            let left: Vec<&Target> = left.collect();
            if !left.is_empty() || self.work.is_tagged(machine) {
                self.fill_machine(machine, &left)?;
            }
        }
        Ok(())
    }

    /// Fills the volumes of a machine, which has the tag meanwhile, and loses it also if that fails.
    fn fill_machine(&mut self, machine: &str, targets: &[&Target]) -> Result<()> {
        self.work.set_tagged(machine, true)?;
        let tagged = self.daemon.set_tag(machine, RESTORE_TAG);
        let result = match &tagged {
            Ok(()) => self.fill_volumes(machine, targets),
            Err(_) => Ok(()),
        };
        let removed = self.daemon.remove_tag(machine, RESTORE_TAG);
        // A machine that was not given the tag need not lose it.
        if removed.is_ok() || tagged.is_err() {
            self.work.set_tagged(machine, false)?;
        }
        if let (Ok(()), Err(error)) = (&tagged, &removed) {
            self.monitor.note(&format!(
                "`{machine}` does not start until it loses a tag: qvm-tags {machine} del {RESTORE_TAG} ({})",
                describe(error)
            ));
        }
        tagged.and(result).and(removed)
    }

    fn fill_volumes(&mut self, machine: &str, targets: &[&Target]) -> Result<()> {
        // From here on it cannot be started any more.
        check_halted(machine, &self.daemon.state(machine)?)?;
        for target in targets {
            if self.monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            check_unchanged(self.daemon, target)?;
            self.fill_volume(target)?;
        }
        Ok(())
    }

    /// Fills a volume: the daemon makes a file, which is made a clone of the image, and puts it into its place.
    fn fill_volume(&mut self, target: &Target) -> Result<()> {
        let (machine, volume) = (&target.wanted.machine, &target.wanted.volume);
        let image = &target.wanted.image;
        let (source, size) = self.work.image(image)?;
        let path = self.daemon.begin_import(machine, volume, size)?;
        let cloned = clone_into(&source, size, &path, target);
        if let Err(error) = cloned.and_then(|()| self.work.set_step(image, Step::Ending)) {
            self.daemon.drop_import(machine, volume, &describe(&error));
            return Err(error);
        }
        if !target.is_blank && !target.keeps_revisions {
            self.monitor.note(&format!(
                "What `{}` held before is gone: no revisions of it are kept",
                target.name()
            ));
        }
        self.daemon.commit_import(machine, volume)?;
        self.filled.push(FilledVolume {
            machine: machine.clone(),
            volume: volume.clone(),
            image: image.clone(),
            size,
            replaced: !target.is_blank,
        });
        self.note_filled(target)
    }

    /// Notes that a volume holds its image, and removes the image.
    fn note_filled(&mut self, target: &Target) -> Result<()> {
        let image = &target.wanted.image;
        self.work.set_step(image, Step::Filled)?;
        self.monitor.advance(self.work.size(image));
        tracing::info!(volume = %target.name(), image = %shown(image), "filled");
        self.work.remove_image(image)
    }
}

/// Makes a file that the daemon has made a clone of an image. It must be a new file beside the volume's image, of the right size, with nothing in
/// it: so nothing that anyone has written is overwritten, whatever path the daemon answers.
fn clone_into(source: &File, size: u64, path: &Path, target: &Target) -> Result<()> {
    let wrong = |problem: &str| Error::Qubesd {
        call: "internal.vm.volume.ImportBegin",
        target: target.name(),
        problem: format!("it hands out `{}`, which {problem}", shown(path)),
    };
    let folder = target.files.folder();
    let name = path.file_name().filter(|_| path.parent() == Some(folder));
    let name = name.ok_or_else(|| wrong("is not beside the volume's image"))?;
    let opened = Folder::open(folder).map_err(Error::io("open", folder))?;
    let flags = OFlags::RDWR | OFlags::NONBLOCK;
    let file = match opened.open_file(&PathBuf::from(name), flags) {
        Err(rustix::io::Errno::LOOP | rustix::io::Errno::NXIO | rustix::io::Errno::ISDIR) => {
            return Err(wrong("is no file"));
        }
        other => other.map_err(Error::io("open", path))?,
    };
    let is_new = |file: &File| {
        let metadata = file.metadata().map_err(Error::io("look at", path))?;
        Ok::<_, Error>(metadata.is_file() && metadata.nlink() == 1 && metadata.len() == size && metadata.blocks() == 0)
    };
    if !is_new(&file)? {
        return Err(wrong("is no new file of the image's size"));
    }
    clone_range(source, 0, &file, 0, size).map_err(Error::writing("share blocks with", path))?;
    file.sync_all().map_err(Error::writing("write", path))?;
    let length = file.metadata().map_err(Error::io("look at", path))?.len();
    if length == size {
        Ok(())
    } else {
        Err(wrong("got another size meanwhile"))
    }
}
