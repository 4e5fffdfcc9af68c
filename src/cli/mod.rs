//! The command line: arguments, progress, printing and exit codes. Reports and archives go to stdout, everything else to stderr.

mod args;
mod key;
mod key_args;
mod log;
mod man;
mod progress;
mod prompt;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use rustix::io::Errno;
use serde::Serialize;

use args::{Args, Command};
use progress::Terminal;

use crate::error::{Error, ErrorKind, Result, describe};
use crate::exec::compression::CompressionRequest;
use crate::exec::restore::RestoreOptions;
use crate::foreign::Limits;
use crate::frame::Packer;
use crate::index;
use crate::monitor::Monitor;
use crate::ops::diff::{ComparedWith, diff};
use crate::ops::export::{BackupExportOptions, ExportOptions, Revisions, Sealing, export, export_backup};
use crate::ops::import::qubes::{QubesOptions, import as import_into_qubes, write_skeleton};
use crate::ops::import::{ImportOptions, import};
use crate::ops::list::list_with;
use crate::ops::protect::{ProtectOptions, protect};
use crate::ops::reclaim::{ReclaimOptions, reclaim};
use crate::ops::repair::{RepairOptions, RepairTo, repair};
use crate::ops::report::{ReportOptions, report};
use crate::ops::scan::scan;
use crate::ops::verify::verify_sealed;
use crate::ops::{self, ArchivePlace, BackupAccess};
use crate::pool::{Covering, Skipped};
use crate::qubes::{SocketQubesd, Timeouts};
use crate::report::{Change, ReportView};
use crate::shown::shown;
use crate::store::FileStore;
use crate::sys::priority::give_way;
use crate::sys::stdout;

/// How a command ended. Scripts rely on the numbers: see `formats/scripting.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    /// The command did everything.
    Done = 0,
    /// The system refused something, or the report could not be printed.
    Failed = 1,
    /// The command asks for something that cannot be done.
    Usage = 2,
    /// The command did everything but for some images, or until its time was over.
    SomeSkipped = 3,
    /// The archive is damaged.
    Damaged = 4,
    /// `diff` found differences.
    Differs = 5,
    /// The user stopped it.
    Interrupted = 130,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(mut error) => {
            if error.kind() == clap::error::ErrorKind::UnknownArgument {
                // It would recommend to pass the option as a path.
                let _ = error.remove(clap::error::ContextKind::Suggested);
            }
            let printed = error.print().and_then(|()| std::io::stdout().flush());
            return match u8::try_from(error.exit_code()) {
                Ok(0) if printed.is_err() || stdout::was_closed() => Exit::Failed.into(),
                code => code.unwrap_or(Exit::Usage as u8).into(),
            };
        }
    };
    // Exports and imports allocate frames all the time, and get slower if each frame is a mapping of its own.
    if !matches!(args.command, Command::Export(_) | Command::Import(_)) {
        crate::sys::allocator::give_back_early();
    }
    crate::sys::signals::explain_sigbus();
    crate::sys::signals::ignore_sigxfsz();
    crate::sys::signals::ignore_sigio();
    // Only the user who runs vmfold may read the files that it makes: indexes, archives and donors hold the content of machines.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let terminal = Arc::new(Terminal::new(args.quiet));
    let outcome = check_stdout()
        .and_then(|()| log::begin(&args, &terminal))
        .and_then(|()| run(&args, &terminal));
    terminal.finish();
    match outcome {
        Ok(exit) => exit.into(),
        Err(error) => {
            if error.kind() != ErrorKind::Interrupted {
                print_error(&error, &args.command);
            }
            Exit::of(error.kind()).into()
        }
    }
}

impl Exit {
    /// The exit code of each kind of error.
    fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Usage | ErrorKind::InUse => Self::Usage,
            ErrorKind::Busy | ErrorKind::Refused | ErrorKind::NoSpace | ErrorKind::Io => Self::Failed,
            ErrorKind::Damaged => Self::Damaged,
            ErrorKind::Interrupted => Self::Interrupted,
        }
    }
}

/// Checks that stdout was not closed when vmfold began. Otherwise the report would be lost, and the exit code would say that all is well.
fn check_stdout() -> Result<()> {
    if stdout::was_closed() {
        return Err(Error::io("write to", Path::new("stdout"))(Errno::BADF));
    }
    Ok(())
}

/// Prints an error with its causes and a hint.
fn print_error(error: &Error, command: &Command) {
    let hint = hint(error, command)
        .map(|hint| format!(" ({hint})"))
        .unwrap_or_default();
    // If stderr cannot be written either, only the exit code is left to tell.
    let _ = writeln!(std::io::stderr(), "error: {}{hint}", describe(error));
}

/// What the user can do about an error of a command, if there is something. It does not recommend what was done.
fn hint(error: &Error, command: &Command) -> Option<&'static str> {
    match (error, command) {
        (Error::Damaged { range: None, .. }, Command::Import(import)) if import.partial => None,
        (Error::Damaged { .. }, Command::Import(import)) if import.partial => Some("vmfold verify tells what is lost"),
        (Error::DamagedBackup { .. }, Command::Import(import)) if import.partial => None,
        _ => error.hint(),
    }
}

/// Runs the command, and prints its report.
fn run(args: &Args, terminal: &Arc<Terminal>) -> Result<Exit> {
    if args.nice
        && let Err(errno) = give_way()
    {
        terminal.note(&format!(
            "Going on with the usual priority: {}",
            std::io::Error::from(errno)
        ));
    }
    check_archive(&args.command)?;
    let json = OutputFormat {
        json: args.json,
        is_short: args.quiet,
    };
    match &args.command {
        Command::Reclaim(command) => run_reclaim(command, json, terminal),
        Command::Report(command) => for_each_filesystem(command.options()?, |options| {
            let result = report(&options, &**terminal)?;
            terminal.finish();
            print("report", &result, json)?;
            Ok(exit_of_pool(terminal.interrupted(), !result.skipped.is_empty()))
        }),
        Command::Export(command) => run_export(command, json, terminal),
        Command::Import(command) => run_import(command, json, terminal),
        Command::List(command) => run_list(command, json, terminal),
        Command::Verify(command) => run_verify(command, json, terminal),
        Command::Protect(command) => {
            let result = protect(&command.options(terminal), &**terminal)?;
            terminal.finish();
            print("protect", &result, json)?;
            Ok(Exit::Done)
        }
        Command::Key(command) => key::run(command, json, terminal),
        Command::Repair(command) => {
            let result = repair(&command.options(), &**terminal)?;
            terminal.finish();
            print("repair", &result, json)?;
            Ok(exit_of_archive(result.damage.is_empty()))
        }
        Command::Diff(command) => run_diff(command, json, terminal),
        Command::Scan(command) => {
            let result = scan(&command.scope()?, &**terminal)?;
            terminal.finish();
            print("scan", &result, json)?;
            Ok(exit_of_pool(result.interrupted, !result.skipped.is_empty()))
        }
        Command::Status(command) => run_status(command, json, terminal),
        Command::Version => {
            let text = <Args as clap::CommandFactory>::command().render_version();
            write_stdout(&text)?;
            Ok(Exit::Done)
        }
        Command::Man(command) => {
            print("man", &man::write_man_pages(&command.folder)?, json)?;
            Ok(Exit::Done)
        }
    }
}

fn run_diff(command: &args::Diff, json: OutputFormat, terminal: &Arc<Terminal>) -> Result<Exit> {
    let (first, with) = command.sides();
    let has_backup = command.backup.is_some();
    let access = command.access.access(&command.archive, has_backup, terminal);
    let result = diff(&command.archive, first.as_deref(), &with, &access, &**terminal)?;
    terminal.finish();
    print("diff", &result, json)?;
    let same = result.images.iter().all(|image| image.change == Change::Same);
    Ok(if same { Exit::Done } else { Exit::Differs })
}

fn run_import(command: &args::Import, json: OutputFormat, terminal: &Arc<Terminal>) -> Result<Exit> {
    let options = command.options(terminal);
    if let Some(file) = &command.qubes.skeleton {
        let result = write_skeleton(&options, file, &**terminal)?;
        terminal.finish();
        print("skeleton", &result, json)?;
        return Ok(Exit::Done);
    }
    if command.qubes.qubes {
        return run_import_qubes(command, options, json, terminal);
    }
    let mut result = import(&options, &**terminal)?;
    terminal.finish();
    print("import", &result, json)?;
    if let Some(error) = result.failed.take() {
        return Err(error);
    }
    Ok(exit_of_archive(result.lost.is_empty() && !result.later_damage))
}

fn run_import_qubes(
    command: &args::Import,
    import: ImportOptions,
    json: OutputFormat,
    terminal: &Terminal,
) -> Result<Exit> {
    let options = QubesOptions {
        import,
        renamed: command.qubes.renamed.clone(),
        daemon: &SocketQubesd::new(&command.qubes.qubesd_socket, Timeouts::default()),
    };
    let mut result = import_into_qubes(&options, terminal)?;
    terminal.finish();
    print("qubes", &result, json)?;
    if let Some(error) = result.failed.take() {
        return Err(error);
    }
    let imported = result.imported.as_ref();
    Ok(exit_of_archive(imported.is_none_or(|imported| {
        imported.lost.is_empty() && !imported.later_damage
    })))
}

fn run_list(command: &args::List, json: OutputFormat, terminal: &Arc<Terminal>) -> Result<Exit> {
    if let Some(result) = ops::backup::list(
        &command.archive,
        &command.access.access(&command.archive, false, terminal),
        &**terminal,
    )? {
        check_no_commit(command.commit.as_deref())?;
        terminal.finish();
        print("backup", &result, json)?;
    } else {
        let keys = command.access.access(&command.archive, false, terminal).keys();
        print(
            "list",
            &list_with(&command.archive, command.commit.as_deref(), keys)?,
            json,
        )?;
    }
    Ok(Exit::Done)
}

fn run_verify(command: &args::Verify, json: OutputFormat, terminal: &Arc<Terminal>) -> Result<Exit> {
    if let Some(result) = ops::backup::verify(
        &command.archive,
        &command.access.access(&command.archive, false, terminal),
        &**terminal,
    )? {
        terminal.finish();
        print("backup", &result, json)?;
        return Ok(Exit::Done);
    }
    let keys = command.access.access(&command.archive, false, terminal).keys();
    let store = Arc::new(FileStore::open(&command.archive)?);
    let result = verify_sealed(store, keys, &**terminal)?;
    terminal.finish();
    print("verify", &result, json)?;
    Ok(exit_of_archive(result.damage.is_empty() && result.lost.is_empty()))
}

/// Refuses the name of a commit for a backup that another program made.
fn check_no_commit(commit: Option<&str>) -> Result<()> {
    match commit {
        None => Ok(()),
        Some(_) => Err(Error::Usage(
            "a backup that another program made has no commits: leave the commit out".into(),
        )),
    }
}

fn run_reclaim(command: &args::Reclaim, json: OutputFormat, terminal: &Terminal) -> Result<Exit> {
    for_each_filesystem(command.options()?, |options| {
        let mut result = reclaim(&options, terminal)?;
        terminal.finish();
        print("reclaim", &result, json)?;
        if let Some(error) = result.failed.take() {
            return Err(error);
        }
        let done = result.done.as_ref();
        let held = done.is_some_and(|done| done.counts.extents_still_held > 0);
        let some_left = counts(&result.skipped, command.ok_if_in_use) || held || result.out_of_time;
        Ok(exit_of_pool(result.interrupted, some_left))
    })
}

fn run_export(command: &args::Export, json: OutputFormat, terminal: &Arc<Terminal>) -> Result<Exit> {
    let archive = archive_place(&command.archive);
    let mut result = match &command.from {
        Some(from) => export_backup(&command.backup_options(from, terminal)?, &**terminal),
        None => export(&command.options(terminal)?, &**terminal),
    }
    .map_err(|error| command.nothing_chosen(error))?;
    terminal.finish();
    let to_stderr = archive == ArchivePlace::Pipe;
    print_to(json, to_stderr, "export", &result)?;
    if let Some(error) = result.failed.take() {
        return Err(error);
    }
    Ok(exit_of_pool(false, counts(&result.skipped, command.ok_if_in_use)))
}

/// Refuses what no archive can be: standard input where a file is read at any place, and a terminal where an archive is written.
///
/// # Errors
/// [`Error::Usage`].
fn check_archive(command: &Command) -> Result<()> {
    let is_pipe = |path: &Path| path.as_os_str() == "-";
    let (verb, archive) = match command {
        Command::Export(export) if is_pipe(&export.archive) && std::io::stdout().is_terminal() => {
            return Err(Error::Usage(
                "an archive is nothing for a terminal: send it to a program or a file, as by `> FILE`".into(),
            ));
        }
        Command::List(list) => ("list", &list.archive),
        Command::Verify(verify) => ("verify", &verify.archive),
        Command::Diff(diff) => ("diff", &diff.archive),
        Command::Protect(protect) => ("protect", &protect.archive),
        Command::Repair(repair) => ("repair", &repair.archive),
        _ => return Ok(()),
    };
    if is_pipe(archive) {
        return Err(Error::Usage(format!(
            "`{verb}` reads a file, and no pipe: save the archive first; `vmfold import - --dry-run` reads a pipe"
        )));
    }
    Ok(())
}

/// Whether any of the images that were left alone makes a command end with [`Exit::SomeSkipped`].
fn counts(skipped: &[Skipped], ok_if_in_use: bool) -> bool {
    skipped.iter().any(|image| !(ok_if_in_use && image.reason.is_in_use()))
}

fn run_status(command: &args::Status, json: OutputFormat, terminal: &Terminal) -> Result<Exit> {
    let indexes = index::all_in(&command.index, terminal)?;
    if indexes.is_empty() && !json.json {
        terminal.note(&format!(
            "There is no index in `{}` yet: run vmfold scan or reclaim",
            shown(&command.index)
        ));
    }
    print("status", &Statuses { indexes }, json)?;
    Ok(Exit::Done)
}

/// The exit code of a command that read an archive.
fn exit_of_archive(is_intact: bool) -> Exit {
    if is_intact { Exit::Done } else { Exit::Damaged }
}

/// Works on one filesystem after the other. The first one that fails or is interrupted is the last.
fn for_each_filesystem<T>(filesystems: Vec<T>, mut work: impl FnMut(T) -> Result<Exit>) -> Result<Exit> {
    let mut worst = Exit::Done;
    for filesystem in filesystems {
        match work(filesystem)? {
            Exit::Done => {}
            Exit::Interrupted => return Ok(Exit::Interrupted),
            exit => worst = exit,
        }
    }
    Ok(worst)
}

/// The exit code of a command that worked on a pool.
fn exit_of_pool(interrupted: bool, some_skipped: bool) -> Exit {
    match (interrupted, some_skipped) {
        (true, _) => Exit::Interrupted,
        (_, true) => Exit::SomeSkipped,
        _ => Exit::Done,
    }
}

/// The report of `status`.
#[derive(Serialize)]
struct Statuses {
    indexes: Vec<index::IndexStatus>,
}

impl std::fmt::Display for Statuses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.indexes.iter().try_for_each(|status| write!(f, "{status}"))
    }
}

/// A document of `--json`: its type, its version, and the report.
#[derive(Serialize)]
struct Document<'a, T> {
    #[serde(rename = "type")]
    kind: &'a str,
    version: u32,
    /// How many images it is about. Of some reports `images` is that number, and of others a list of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    image_count: Option<u64>,
    #[serde(flatten)]
    content: &'a T,
}

impl<'a, T: Serialize> Document<'a, T> {
    fn of(kind: &'a str, content: &'a T) -> serde_json::Result<Self> {
        let images = serde_json::to_value(content)?.get("images").cloned();
        let image_count = images.and_then(|images| match images {
            serde_json::Value::Array(images) => Some(images.len() as u64),
            other => other.as_u64(),
        });
        Ok(Self {
            kind,
            version: 1,
            image_count,
            content,
        })
    }
}

/// How a report is printed.
#[derive(Clone, Copy)]
struct OutputFormat {
    /// Whether it is printed as JSON.
    json: bool,
    /// Whether only its first line is printed, if it is text.
    is_short: bool,
}

/// Prints a report to stdout.
fn print<T: Serialize + std::fmt::Display>(kind: &str, content: &T, format: OutputFormat) -> Result<()> {
    print_to(format, false, kind, content)
}

/// Prints a report, to stderr if the archive goes to stdout.
fn print_to<T: Serialize + std::fmt::Display>(
    format: OutputFormat,
    to_stderr: bool,
    kind: &str,
    content: &T,
) -> Result<()> {
    let text = if format.json {
        let failed = Error::io("write JSON to", Path::new("stdout"));
        let document = Document::of(kind, content).and_then(|document| serde_json::to_string_pretty(&document));
        format!("{}\n", document.map_err(failed)?)
    } else if format.is_short {
        let text = content.to_string();
        text.lines().next().map(|line| format!("{line}\n")).unwrap_or_default()
    } else {
        content.to_string()
    };
    if to_stderr {
        return std::io::stderr()
            .write_all(text.as_bytes())
            .map_err(Error::io("write to", Path::new("stderr")));
    }
    write_stdout(&text)
}

/// Writes a text to stdout.
fn write_stdout(text: &str) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // The program that reads the report has read enough of it.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::io("write to", Path::new("stdout"))),
    }
}

impl args::Report {
    /// The options for each filesystem.
    fn options(&self) -> Result<Vec<ReportOptions>> {
        let filter: Vec<Covering> = self
            .filter
            .iter()
            .map(|one| Covering::new(one))
            .collect::<Result<_>>()?;
        let options = |scope| ReportOptions {
            reclaim_command: self.scope.reclaim_command(&scope),
            scope,
            plans: !self.no_plan,
            if_deleted: self.if_deleted.clone(),
            qubes_root: self.scope.qubes_root.clone(),
            view: ReportView {
                images: self.images,
                order: self.sort,
                top: (self.top > 0).then_some(self.top),
                filter: filter.clone(),
            },
        };
        Ok(self.scope.scopes()?.into_iter().map(options).collect())
    }
}

impl args::Reclaim {
    /// The options for each filesystem.
    fn options(&self) -> Result<Vec<ReclaimOptions>> {
        let blocks = self.min_run.div_ceil(crate::block::BLOCK_BYTES);
        let min_run_blocks = u32::try_from(blocks)
            .ok()
            .filter(|blocks| (1..=1 << 20).contains(blocks));
        let min_run_blocks =
            min_run_blocks.ok_or_else(|| Error::Usage("--min-run must be between 4K and 4G".into()))?;
        let compress = self.compress.map(|compression| match compression {
            args::CompressionArg::None => CompressionRequest::Undo,
            args::CompressionArg::Zstd(level) => CompressionRequest::Zstd {
                packer: Packer {
                    level,
                    min_gain: self.min_gain,
                },
                recompress: self.recompress,
            },
        });
        let options = |scope| ReclaimOptions {
            scope,
            compress,
            plan: crate::plan::PlanOptions {
                min_run_blocks,
                keep_zeros: self.keep_zeros,
                keep_preallocated: self.keep_prealloc,
                work_space_bytes: self.work_space,
                batch_bytes: crate::plan::BATCH_BYTES,
                references_max: self.max_references,
                references_per_gib_max: self.max_extents,
            },
            groups: self.group.clone(),
            dry_run: self.dry_run,
            reserve_bytes: self.reserve,
            time: self.max_seconds.map(std::time::Duration::from_secs),
        };
        Ok(self.scope.scopes()?.into_iter().map(options).collect())
    }
}

/// The place of an archive that is named on the command line.
fn archive_place(named: &Path) -> ArchivePlace {
    if named.as_os_str() == "-" {
        ArchivePlace::Pipe
    } else {
        ArchivePlace::File(named.to_owned())
    }
}

impl args::Export {
    /// The error for a choice that leaves no image, in the place of the one for folders without images.
    fn nothing_chosen(&self, error: Error) -> Error {
        let Error::NoImages { paths } = &error else {
            return error;
        };
        let mut choice: Vec<String> = self.only.iter().map(|only| format!("--only `{only}`")).collect();
        if self.revisions != Revisions::All {
            choice.push("--revisions".into());
        }
        if choice.is_empty() {
            return error;
        }
        let paths: Vec<String> = paths.iter().map(|path| format!("`{}`", shown(path))).collect();
        Error::Usage(format!(
            "no image in {} matches {}: vmfold report --images shows what there is",
            paths.join(", "),
            choice.join(" and ")
        ))
    }

    fn options(&self, terminal: &Arc<Terminal>) -> Result<ExportOptions> {
        Ok(ExportOptions {
            sealing: self.sealing(terminal)?,
            scope: self.scope.scope()?,
            only: self.only.clone(),
            revisions: self.revisions,
            archive: archive_place(&self.archive),
            level: self.level,
            trusts_archive: self.trust_archive,
            label: self.label.clone(),
            parity: self.parity,
        })
    }
}

impl args::Export {
    /// The options for the backup `from`.
    fn backup_options(&self, from: &Path, terminal: &Arc<Terminal>) -> Result<BackupExportOptions> {
        Ok(BackupExportOptions {
            sealing: self.sealing(terminal)?,
            from: archive_place(from),
            only: self.only.clone(),
            archive: archive_place(&self.archive),
            level: self.level,
            trusts_archive: self.trust_archive,
            label: self.label.clone(),
            parity: self.parity,
            folder: self.scope.index.clone(),
            access: self.access.access(from, false, terminal),
        })
    }
}

impl args::Protect {
    fn options(&self, terminal: &Arc<Terminal>) -> ProtectOptions {
        ProtectOptions {
            sealing: Sealing {
                unlock: Some(self.keys.unlock(&self.archive, false, terminal)),
                memory: self.keys.memory.memory(true, key::now(), terminal),
                ..Sealing::default()
            },
            archive: self.archive.clone(),
            percent: self.parity,
            again: self.again,
        }
    }
}

impl args::Repair {
    fn options(&self) -> RepairOptions {
        RepairOptions {
            archive: self.archive.clone(),
            to: match &self.to {
                Some(to) => RepairTo::Copy(to.clone()),
                None if self.in_place => RepairTo::InPlace,
                None => RepairTo::Nowhere,
            },
            from: self.from.clone(),
        }
    }
}

impl args::Import {
    fn options(&self, terminal: &Arc<Terminal>) -> ImportOptions {
        ImportOptions {
            archive: archive_place(&self.archive),
            commit: self.commit.clone(),
            restore: RestoreOptions {
                to: self.to.clone().unwrap_or_default(),
                only: self.only.clone(),
                replace: self.replace,
                resume: self.resume,
                partial: self.partial,
                as_revision: self.as_revision,
                numeric_owner: self.numeric_owner,
                preserve_special: self.preserve_special,
                compress: self.compress.is_some(),
                work_space_bytes: self.work_space,
            },
            seeds: self.seed.clone(),
            index: self.index.clone(),
            memory_bytes: self.memory,
            dry_run: self.dry_run,
            access: self.access.access(&self.archive, false, terminal),
        }
    }
}

impl args::Access {
    /// How an archive, or a backup in its place, is opened. `is_for_backup` says that a passphrase is that of a backup which is read beside it.
    fn access(&self, archive: &Path, is_for_backup: bool, terminal: &Arc<Terminal>) -> BackupAccess {
        BackupAccess {
            unlock: Some(self.keys.unlock(archive, is_for_backup, terminal)),
            memory: self.keys.memory.memory(false, key::now(), terminal),
            given: Some(Arc::new(self.keys.access())),
            prompt: prompt::passphrase,
            limits: Limits {
                kdf_memory_bytes: self.kdf_memory,
                ..Limits::default()
            },
            is_raw: self.raw,
            backing: self.backing.clone(),
        }
    }
}

impl args::Diff {
    /// The first commit, and what it is compared with.
    fn sides(&self) -> (Option<String>, ComparedWith) {
        if let Some(backup) = &self.backup {
            return (self.first.clone(), ComparedWith::Backup(backup.clone()));
        }
        if self.pool.is_empty() {
            let first = self.first.clone().or_else(|| Some("previous".into()));
            return (first, ComparedWith::Commit(self.second.clone()));
        }
        let scope = ops::Scope {
            paths: self.pool.clone(),
            exclude: Vec::new(),
            index: index::DEFAULT_FOLDER.into(),
            memory_bytes: None,
        };
        (self.first.clone(), ComparedWith::Pool(scope))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_error_has_the_exit_code_that_scripts_rely_on() {
        let codes = [
            (ErrorKind::Usage, 2),
            (ErrorKind::InUse, 2),
            (ErrorKind::Busy, 1),
            (ErrorKind::Refused, 1),
            (ErrorKind::Damaged, 4),
            (ErrorKind::NoSpace, 1),
            (ErrorKind::Interrupted, 130),
            (ErrorKind::Io, 1),
        ];
        for (kind, code) in codes {
            assert_eq!(Exit::of(kind) as u8, code, "{kind:?}");
        }
        let others = [(Exit::Done, 0), (Exit::SomeSkipped, 3), (Exit::Differs, 5)];
        for (exit, code) in others {
            assert_eq!(exit as u8, code, "{exit:?}");
        }
    }
}
