//! The volumes that are to be filled, as they are before anything is done. Nothing is overwritten that the user did not name.

use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use super::Wanted;
use super::work::{Step, Work};
use crate::error::{Error, Result};
use crate::exec::restore::RestoreOptions;
use crate::fs::uuid_at;
use crate::qubes::{HALTED, MachineState, Qubesd, RESTORE_TAG, VolumeFiles};

/// A volume that is to be filled.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) wanted: Wanted,
    pub(super) files: VolumeFiles,
    /// Whether nobody has written to it yet.
    pub(super) is_blank: bool,
    /// Whether what it holds is kept as a revision when something else takes its place.
    pub(super) keeps_revisions: bool,
}

impl Target {
    /// How Qubes OS writes its name.
    pub(super) fn name(&self) -> String {
        format!("{}:{}", self.wanted.machine, self.wanted.volume)
    }
}

/// Looks at the volumes. All of their machines must exist and be shut down.
pub(super) fn look(daemon: &dyn Qubesd, machines: &[MachineState], wanted: Vec<Wanted>) -> Result<Vec<Target>> {
    let state_of = |name: &str| machines.iter().find(|machine| machine.name == name);
    let mut missing: Vec<&str> = wanted.iter().map(|wanted| wanted.machine.as_str()).collect();
    missing.retain(|name| state_of(name).is_none());
    missing.dedup();
    if !missing.is_empty() {
        return Err(Error::Usage(format!(
            "these machines do not exist here: {}; `vmfold import --qubes --skeleton FILE` writes what qvm-backup-restore makes them of",
            missing.join(", ")
        )));
    }
    for machine in wanted.iter().filter_map(|wanted| state_of(&wanted.machine)) {
        check_halted(&machine.name, &machine.state)?;
    }
    wanted.into_iter().map(|wanted| look_at(daemon, wanted)).collect()
}

fn look_at(daemon: &dyn Qubesd, wanted: Wanted) -> Result<Target> {
    let info = daemon.volume(&wanted.machine, &wanted.volume)?;
    let name = format!("{}:{}", wanted.machine, wanted.volume);
    if !info.is_kept {
        return Err(Error::Usage(format!(
            "`{name}` is not kept when its machine stops, so that nothing can be restored into it: the machine is of another class than the one \
             in the backup"
        )));
    }
    let Some(files) = info.files else {
        return Err(Error::Usage(format!(
            "`{name}` is in the pool `{}`, which is no file-reflink pool: qvm-backup-restore restores into others",
            crate::shown::shown(std::path::Path::new(&info.pool))
        )));
    };
    if files.dirty.symlink_metadata().is_ok() {
        return Err(Error::InUse {
            by: "its machine was not shut down in order: start it and shut it down".into(),
            path: files.dirty,
        });
    }
    // Who must not open it could not fill it either, and had better know before all is restored.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(&files.image, flags, Mode::empty()).map_err(Error::io("open", &files.image))?;
    Ok(Target {
        wanted,
        files,
        is_blank: info.used_bytes == 0,
        keeps_revisions: info.revisions > 0,
    })
}

/// Checks that nobody has written to a volume since it was looked at, so that it is no longer blank.
pub(super) fn check_unchanged(daemon: &dyn Qubesd, target: &Target) -> Result<()> {
    let now = look_at(daemon, target.wanted.clone())?;
    if now.files == target.files && (now.is_blank || !target.is_blank) {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "`{}` was blank before its image was restored, and is not any more: it is left as it is",
        target.name()
    )))
}

/// Checks that a machine is shut down.
pub(super) fn check_halted(machine: &str, state: &str) -> Result<()> {
    if state == HALTED {
        return Ok(());
    }
    Err(Error::InUse {
        path: machine.into(),
        by: format!("its state is {state}"),
    })
}

/// The folder of the pool that all of the volumes are in. Their blocks can be shared only within one.
pub(super) fn common_pool(targets: &[Target]) -> Result<PathBuf> {
    let mut pools: Vec<&PathBuf> = targets.iter().map(|target| &target.files.pool_folder).collect();
    pools.dedup();
    let [pool, rest @ ..] = &pools[..] else {
        return Err(Error::Usage("nothing is to be restored".into()));
    };
    if let Some(second) = rest.first() {
        return Err(Error::TwoFilesystems {
            first: (*pool).clone(),
            second: (*second).clone(),
        });
    }
    let Some(uuid) = uuid_at(pool) else {
        return Err(Error::NoSharing {
            path: (*pool).clone(),
            filesystem: "neither btrfs nor XFS".into(),
        });
    };
    let other = targets
        .iter()
        .find(|target| uuid_at(target.files.folder()) != Some(uuid));
    match other {
        Some(target) => Err(Error::TwoFilesystems {
            first: (*pool).clone(),
            second: target.files.folder().to_owned(),
        }),
        None => Ok((*pool).clone()),
    }
}

/// Checks that no other restore of the machines goes on, and that what is not blank may be replaced. What an earlier run has filled is left as
/// it is.
pub(super) fn check(
    daemon: &dyn Qubesd,
    targets: &[Target],
    work: Option<&Work>,
    restore: &RestoreOptions,
) -> Result<()> {
    for target in targets {
        let machine = &target.wanted.machine;
        let is_ours = work.is_some_and(|work| work.is_tagged(machine));
        if !is_ours && daemon.has_tag(machine, RESTORE_TAG)? {
            return Err(Error::Usage(format!(
                "`{machine}` is being restored by another program, or such a restore was killed: `qvm-tags {machine} del {RESTORE_TAG}` says \
                 that none goes on"
            )));
        }
    }
    let may_replace = |target: &Target| restore.replace && target.wanted.is_named;
    let mut taken = Vec::new();
    for target in targets {
        let is_done = match work.map(|work| work.step(&target.wanted.image)) {
            Some(Some(Step::Filled)) => true,
            Some(Some(Step::Ending)) => work.is_some_and(|work| work.holds(target)),
            _ => false,
        };
        if !is_done && !target.is_blank && !may_replace(target) {
            taken.push(format!("`{}`", target.name()));
        }
    }
    if taken.is_empty() {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "these volumes are not blank, and are left as they are: {}; --replace replaces those whose machines are named without a pattern, and --as \
         restores into a machine of another name",
        taken.join(", ")
    )))
}
