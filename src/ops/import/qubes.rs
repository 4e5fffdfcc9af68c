//! `import --qubes`: restores a backup of Qubes OS into the running one. Machines are made by its own tool, from a skeleton of the backup. Their
//! volumes are filled by the transaction that its daemon has for restores. First all images are restored to a folder in the pool, as any import
//! does it. Then each is cloned into the file that the daemon makes for it, so that what the images share stays shared. A run that was stopped is
//! gone on with: what it has done is noted in that folder.

mod fill;
mod targets;
mod work;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use self::fill::Filling;
use self::targets::Target;
use self::work::Work;
use super::{ImportOptions, id_of, import_opened};
use crate::archive::record::hash_of;
use crate::error::{Error, Result};
use crate::exec::restore::RestoreOptions;
use crate::foreign::{self, Machine};
use crate::monitor::Monitor;
use crate::new_file::{NewFile, already_there};
use crate::ops::{ArchivePlace, BackupAccess, is_backup, open_backup, open_options};
use crate::plan::restore::chooser;
use crate::qubes::Qubesd;
use crate::report::{QubesImport, WrittenSkeleton};
use crate::shown::{hex, shown};
use crate::store::{FileStore, InputPipe, PeekedStore, Store};

/// What is restored, and into which machines.
pub struct QubesOptions<'a> {
    /// The backup, and how it is restored. Of the restore, these count: the patterns, which choose machines by name or images by path, and whether
    /// volumes may be replaced.
    pub import: ImportOptions,
    /// Machines of the backup that have another name here: the old one and the new one.
    pub renamed: Vec<(String, String)>,
    /// The daemon of Qubes OS.
    pub daemon: &'a dyn Qubesd,
}

/// An image that is to be restored, and the volume that is to hold it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    /// The image in the backup, such as `appvms/work/private.img`.
    image: PathBuf,
    /// The machine here.
    machine: String,
    /// The name of the volume.
    volume: String,
    /// Whether the user named the machine, and not only a pattern.
    is_named: bool,
}

/// Restores machines of a backup into the running Qubes OS.
///
/// # Errors
/// [`Error::Usage`] if a machine does not exist, or a volume must not be replaced; [`Error::InUse`] if a machine is not shut down; those of
/// [`Qubesd`] and of [`super::import_backup`]. After an error in [`QubesImport::failed`], another run goes on.
pub fn import(options: &QubesOptions<'_>, monitor: &dyn Monitor) -> Result<QubesImport> {
    // Whether there is a daemon is found out before a passphrase is asked for.
    let machines = options.daemon.machines()?;
    with_backup(&options.import.archive, &options.import.access, monitor, |store| {
        let backup = open_backup(store, &[], &options.import.access, false, monitor)?;
        let wanted = choose(backup.machines(), &options.import.restore.only, &options.renamed)?;
        let targets = targets::look(options.daemon, &machines, wanted)?;
        let pool = targets::common_pool(&targets)?;
        let path = pool.join(work_name(store, &targets));
        let mut report = QubesImport {
            archive: store.path().to_owned(),
            pool,
            dry_run: options.import.dry_run,
            imported: None,
            filled: Vec::new(),
            failed: None,
        };
        let import = restored_to(&path, &options.import, &targets);
        let work = Work::look(&path)?;
        targets::check(options.daemon, &targets, work.as_ref(), &options.import.restore)?;
        if options.import.dry_run {
            report.imported = Some(import_opened(backup, store, &[], &import, monitor)?);
            return Ok(report);
        }
        let mut work = work.map_or_else(|| Work::make(&path), Ok)?;
        if !work.is_restored() {
            let imported = import_opened(backup, store, &[], &import, monitor);
            let imported = imported.inspect_err(|_| work.remove_if_unused())?;
            let is_whole = imported.done.is_some() && imported.lost.is_empty() && imported.failed.is_none();
            report.imported = Some(imported);
            if !is_whole {
                // What is whole would take space that the next run needs.
                work.remove()?;
                return Ok(without_images(report, monitor));
            }
            work.restored(&targets)?;
        }
        let mut filling = Filling::new(options.daemon, &mut work, monitor);
        let result = filling.fill(&targets);
        report.filled = filling.into_filled();
        report.failed = result.and_then(|()| work.remove()).err();
        if report.failed.is_some() {
            let path = shown(&path);
            monitor.note(&format!(
                "What is restored is kept in `{path}`: running the same again goes on from there"
            ));
        }
        Ok(report)
    })
}

/// The report of a run that could not restore all images, so that no volume was touched.
fn without_images(mut report: QubesImport, monitor: &dyn Monitor) -> QubesImport {
    report.failed = report.imported.as_mut().and_then(|imported| imported.failed.take());
    monitor.note("No volume was filled, because not all images could be restored");
    report
}

/// Writes the skeleton of a backup to a new file that only the user can read. It has all machines; those that the patterns choose are named in
/// the command that makes them.
///
/// # Errors
/// [`Error::Usage`] if there is such a file; those of [`foreign::skeleton`] and [`super::import_backup`].
pub fn write_skeleton(options: &ImportOptions, file: &Path, monitor: &dyn Monitor) -> Result<WrittenSkeleton> {
    // What exists is found out before a long time is spent.
    if file.symlink_metadata().is_ok() {
        return Err(already_there(file));
    }
    with_backup(&options.archive, &options.access, monitor, |store| {
        let ask_passphrase = || options.access.passphrase(store.path(), monitor);
        let skeleton = foreign::skeleton(store, &open_options(&options.access, &ask_passphrase), monitor)?;
        let chooser = Chooser::new(&options.restore.only)?;
        let machines = skeleton
            .machines
            .iter()
            .filter(|machine| chooser.takes_machine(machine));
        let chosen: BTreeSet<String> = machines.map(|machine| machine.name.clone()).collect();
        if chosen.is_empty() {
            return Err(none_chosen());
        }
        NewFile::write(file, &skeleton.bytes)?;
        let mut command = vec!["qvm-backup-restore".to_owned(), "--ignore-missing".to_owned()];
        if skeleton.lacks_home {
            command.push("--skip-dom0-home".into());
        }
        command.push(file.to_string_lossy().into_owned());
        if !options.restore.only.is_empty() {
            command.extend(chosen.iter().cloned());
        }
        Ok(WrittenSkeleton {
            archive: store.path().to_owned(),
            skeleton: file.to_owned(),
            machines: chosen.into_iter().collect(),
            command,
        })
    })
}

/// Opens the file or the pipe of a backup.
fn with_backup<T>(
    place: &ArchivePlace,
    access: &BackupAccess,
    monitor: &dyn Monitor,
    work: impl FnOnce(&PeekedStore<'_>) -> Result<T>,
) -> Result<T> {
    let work = |store: &dyn Store| {
        let peeked = PeekedStore::new(store).map_err(|error| {
            if monitor.interrupted() {
                Error::Interrupted
            } else {
                Error::io("read", store.path())(error)
            }
        })?;
        if is_backup(&peeked, access)? {
            return work(&peeked);
        }
        let path = shown(store.path());
        Err(Error::Usage(format!(
            "`{path}` is no backup of Qubes OS, and --qubes restores nothing else"
        )))
    };
    match place {
        ArchivePlace::File(path) => work(&FileStore::open(path)?),
        ArchivePlace::Pipe => work(&InputPipe::new(monitor).map_err(Error::io("read", Path::new("stdin")))?),
    }
}

/// What takes a path.
type Takes = Box<dyn Fn(&Path) -> bool>;

/// What patterns choose: machines by name, and images by path. A pattern without a slash is one of names.
struct Chooser {
    by_name: Takes,
    by_path: Takes,
    /// The patterns, without a slash at the end.
    patterns: Vec<String>,
}

impl Chooser {
    fn new(only: &[String]) -> Result<Self> {
        let trimmed = only.iter().map(|pattern| pattern.trim_end_matches('/').to_owned());
        let patterns: Vec<String> = trimmed.collect();
        let (paths, names): (Vec<String>, Vec<String>) =
            patterns.iter().cloned().partition(|pattern| pattern.contains('/'));
        let choose = |some: &[String]| -> Result<Takes> {
            if some.is_empty() && !only.is_empty() {
                return Ok(Box::new(|_| false));
            }
            Ok(Box::new(chooser(some)?))
        };
        Ok(Self {
            by_name: choose(&names)?,
            by_path: choose(&paths)?,
            patterns,
        })
    }

    fn takes_image(&self, machine: &Machine, image: &Path) -> bool {
        (self.by_name)(Path::new(&machine.name)) || (self.by_path)(image)
    }

    fn takes_machine(&self, machine: &Machine) -> bool {
        let mut images = machine.images.iter().map(|image| machine.path.join(image));
        (self.by_name)(Path::new(&machine.name)) || images.any(|image| (self.by_path)(&image))
    }

    /// Whether a pattern is the name of a machine, or the path of the machine or its image, without wildcards.
    fn names(&self, machine: &Machine, image: &Path) -> bool {
        let mut patterns = self.patterns.iter().map(Path::new);
        patterns.any(|pattern| pattern == Path::new(&machine.name) || pattern == machine.path || pattern == image)
    }
}

/// The error where nothing is chosen.
fn none_chosen() -> Error {
    Error::Usage("no machine of the backup is chosen: `vmfold list` shows what there is".into())
}

/// The images of the machines that patterns choose. All are chosen if there are no patterns.
fn choose(machines: &[Machine], only: &[String], renamed: &[(String, String)]) -> Result<Vec<Wanted>> {
    if machines.is_empty() {
        return Err(no_machines());
    }
    let chooser = Chooser::new(only)?;
    let mut wanted = Vec::new();
    for machine in machines {
        let new_name = renamed.iter().find(|(old, _)| *old == machine.name);
        for image in &machine.images {
            let path = machine.path.join(image);
            if chooser.takes_image(machine, &path) {
                wanted.push(Wanted {
                    machine: new_name.map_or(&machine.name, |(_, new)| new).clone(),
                    volume: image.trim_end_matches(".img").to_owned(),
                    is_named: new_name.is_some() || chooser.names(machine, &path),
                    image: path,
                });
            }
        }
    }
    if wanted.is_empty() {
        return Err(none_chosen());
    }
    check_names(&wanted, machines, renamed)?;
    Ok(wanted)
}

/// The error for a backup of something else.
fn no_machines() -> Error {
    Error::Usage("the backup has no machines of Qubes OS, and --qubes restores nothing else".into())
}

/// Checks that new names are names, of machines that are restored, and that no two machines have the same.
fn check_names(wanted: &[Wanted], machines: &[Machine], renamed: &[(String, String)]) -> Result<()> {
    for (old, new) in renamed {
        let of = machines.iter().find(|machine| machine.name == *old);
        let is_chosen = of.is_some_and(|machine| wanted.iter().any(|wanted| wanted.image.starts_with(&machine.path)));
        if !is_chosen {
            let old = shown(Path::new(old)).to_string();
            return Err(Error::Usage(format!(
                "--as names `{old}`, and no image of such a machine is chosen"
            )));
        }
        if !foreign::is_name(new) {
            let new = shown(Path::new(new)).to_string();
            return Err(Error::Usage(format!("--as: no machine can have the name `{new}`")));
        }
    }
    let mut volumes = BTreeSet::new();
    match wanted.iter().find(|one| !volumes.insert((&one.machine, &one.volume))) {
        Some(twice) => Err(Error::Usage(format!(
            "two machines of the backup would be restored into `{}`",
            twice.machine
        ))),
        None => Ok(()),
    }
}

/// The name of the folder that images are restored to. It is the same for the same images of the same backup, and the same machines.
fn work_name(store: &PeekedStore<'_>, targets: &[Target]) -> String {
    let mut list: Vec<String> = targets
        .iter()
        .map(|target| format!("{}\0{}\n", shown(&target.wanted.image), target.wanted.machine))
        .collect();
    list.sort();
    let mut id = [0; 16];
    id.copy_from_slice(&hash_of(list.concat().as_bytes())[..16]);
    let (backup, list) = (hex(&id_of(store).0), hex(&id));
    format!(".vmfold-qubes-{}-{}", &backup[..8], &list[..8])
}

/// How the images are restored to the folder. What an interrupted run has left there is its own.
fn restored_to(folder: &Path, options: &ImportOptions, targets: &[Target]) -> ImportOptions {
    let images = targets.iter().map(|target| target.wanted.image.display().to_string());
    ImportOptions {
        restore: RestoreOptions {
            to: folder.join(work::IMAGES),
            only: images.collect(),
            replace: true,
            resume: true,
            ..RestoreOptions::default()
        },
        ..options.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machines() -> Vec<Machine> {
        let xml = ["work", "vault"].iter().enumerate().map(|(number, name)| {
            format!(
                "<domain class=\"StandaloneVM\"><properties><property name=\"name\">{name}</property></properties>\
                 <features><feature name=\"backup-content\">True</feature><feature name=\"backup-path\">vm{number}/</feature></features>\
                 <volume-config><volume name=\"root\" save_on_stop=\"True\"/><volume name=\"private\" save_on_stop=\"True\"/></volume-config>\
                 </domain>"
            )
        });
        foreign::machines_of(&format!(
            "<qubes><domains>{}</domains></qubes>",
            xml.collect::<String>()
        ))
        .unwrap()
    }

    fn chosen(only: &[&str], renamed: &[(&str, &str)]) -> Result<Vec<(String, bool)>> {
        let only: Vec<String> = only.iter().map(|one| (*one).to_owned()).collect();
        let renamed: Vec<_> = renamed
            .iter()
            .map(|(old, new)| ((*old).to_owned(), (*new).to_owned()))
            .collect();
        let wanted = choose(&machines(), &only, &renamed)?;
        Ok(wanted
            .into_iter()
            .map(|one| (format!("{}:{}", one.machine, one.volume), one.is_named))
            .collect())
    }

    #[test]
    fn machines_are_chosen_by_name_and_by_path_and_named_without_a_pattern() {
        let list = |names: &[&str], is_named| {
            names
                .iter()
                .map(|name| ((*name).to_owned(), is_named))
                .collect::<Vec<_>>()
        };
        let all = ["work:root", "work:private", "vault:root", "vault:private"];
        assert_eq!(chosen(&[], &[]).unwrap(), list(&all, false));
        assert_eq!(chosen(&["*"], &[]).unwrap(), list(&all, false));
        assert_eq!(chosen(&["work"], &[]).unwrap(), list(&all[..2], true));
        assert_eq!(chosen(&["w*k"], &[]).unwrap(), list(&all[..2], false));
        assert_eq!(
            chosen(&["a*"], &[]).err().map(|error| error.to_string()),
            Some(none_chosen().to_string())
        );
        assert_eq!(chosen(&["*/private.img"], &[]).unwrap().len(), 2);
        assert_eq!(chosen(&["appvms/work/"], &[]).unwrap(), list(&all[..2], true));
        assert_eq!(
            chosen(&["appvms/work/private.img"], &[]).unwrap(),
            list(&all[1..2], true)
        );
        assert_eq!(
            chosen(&["vault"], &[("vault", "vault-1")]).unwrap(),
            list(&["vault-1:root", "vault-1:private"], true)
        );
        for (only, renamed) in [
            (&["none"][..], &[][..]),
            (&["work"], &[("vault", "x")]),
            (&[], &[("other", "x")]),
            (&[], &[("work", "vault")]),
            (&[], &[("work", "a b")]),
            (&[], &[("work", "dom0")]),
        ] {
            assert!(
                matches!(chosen(only, renamed), Err(Error::Usage(_))),
                "{only:?} {renamed:?}"
            );
        }
    }
}
