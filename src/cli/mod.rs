//! The command line: arguments, progress, printing, exit codes. Data goes to stdout, all else to stderr.

mod args;
mod log;
mod man;
mod progress;

use std::io::Write;
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
use crate::frame::Packer;
use crate::index;
use crate::monitor::Monitor;
use crate::ops::diff::{ComparedWith, diff};
use crate::ops::export::{ExportOptions, export};
use crate::ops::import::{ImportOptions, import};
use crate::ops::list::list;
use crate::ops::reclaim::{ReclaimOptions, reclaim};
use crate::ops::report::report;
use crate::ops::scan::scan;
use crate::ops::verify::verify;
use crate::ops::{self, ArchivePlace};
use crate::report::Change;
use crate::shown::shown;
use crate::sys::priority::give_way;
use crate::sys::stdout;

/// How a command ended; the numbers are part of what scripts rely on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exit {
    Done = 0,
    Failed = 1,
    Usage = 2,
    SomeSkipped = 3,
    Damaged = 4,
    Differs = 5,
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
        Err(error) => {
            let printed = error.print().and_then(|()| std::io::stdout().flush());
            return match u8::try_from(error.exit_code()) {
                Ok(0) if printed.is_err() || stdout::was_closed() => Exit::Failed.into(),
                code => code.unwrap_or(Exit::Usage as u8).into(),
            };
        }
    };
    // An export and an import make frames all the time, and take longer if each is a new mapping.
    if !matches!(args.command, Command::Export(_) | Command::Import(_)) {
        crate::sys::allocator::give_back_early();
    }
    crate::sys::signals::explain_sigbus();
    crate::sys::signals::ignore_sigxfsz();
    crate::sys::signals::ignore_sigio();
    // What vmfold makes, is for who runs it alone: indexes, archives and donors hold what machines hold.
    rustix::process::umask(rustix::fs::Mode::RWXG | rustix::fs::Mode::RWXO);
    let terminal = Arc::new(Terminal::new());
    let outcome = check_stdout()
        .and_then(|()| log::begin(&args, &terminal))
        .and_then(|()| run(&args, &terminal));
    terminal.finish();
    match outcome {
        Ok(exit) => exit.into(),
        Err(error) => {
            if error.kind() != ErrorKind::Interrupted {
                print_error(&error);
            }
            Exit::of(error.kind()).into()
        }
    }
}

impl Exit {
    /// The one table of what errors lead to.
    fn of(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::Usage | ErrorKind::InUse => Self::Usage,
            ErrorKind::Busy | ErrorKind::Refused | ErrorKind::NoSpace | ErrorKind::Io => Self::Failed,
            ErrorKind::Damaged => Self::Damaged,
            ErrorKind::Interrupted => Self::Interrupted,
        }
    }
}

/// Refuses to begin where what is found could not be told: nobody would see it, and the exit code would say that all is well.
fn check_stdout() -> Result<()> {
    if stdout::was_closed() {
        return Err(Error::io("write to", Path::new("stdout"))(Errno::BADF));
    }
    Ok(())
}

fn print_error(error: &Error) {
    let hint = error.hint().map(|hint| format!(" ({hint})")).unwrap_or_default();
    // Where even that cannot be written, the exit code has to do.
    let _ = writeln!(std::io::stderr(), "error: {}{hint}", describe(error));
}

fn run(args: &Args, terminal: &Terminal) -> Result<Exit> {
    if args.nice
        && let Err(errno) = give_way()
    {
        terminal.note(&format!(
            "Going on with the usual priority: {}",
            std::io::Error::from(errno)
        ));
    }
    let json = args.json;
    match &args.command {
        Command::Reclaim(command) => run_reclaim(command, json, terminal),
        Command::Report(command) => each(command.scopes()?, |scope| {
            let found = report(&scope, terminal)?;
            terminal.finish();
            print("report", &found, json)?;
            Ok(exit(terminal.interrupted(), !found.skipped.is_empty()))
        }),
        Command::Export(command) => run_export(command, json, terminal),
        Command::Import(command) => {
            let found = import(&command.options(), terminal)?;
            terminal.finish();
            print("import", &found, json)?;
            Ok(intact(found.lost.is_empty() && !found.later_damage))
        }
        Command::List(command) => {
            print("list", &list(&command.archive, command.commit.as_deref())?, json)?;
            Ok(Exit::Done)
        }
        Command::Verify(command) => {
            let found = verify(&command.archive, terminal)?;
            terminal.finish();
            print("verify", &found, json)?;
            Ok(intact(found.damage.is_empty() && found.lost.is_empty()))
        }
        Command::Diff(command) => {
            let (first, with) = command.sides();
            let found = diff(&command.archive, first.as_deref(), &with, terminal)?;
            terminal.finish();
            print("diff", &found, json)?;
            let same = found.images.iter().all(|image| image.change == Change::Same);
            Ok(if same { Exit::Done } else { Exit::Differs })
        }
        Command::Scan(command) => {
            let found = scan(&command.scope()?, terminal)?;
            terminal.finish();
            print("scan", &found, json)?;
            Ok(exit(found.interrupted, !found.skipped.is_empty()))
        }
        Command::Status(command) => run_status(command, json, terminal),
        Command::Man(command) => {
            print("man", &man::write_man_pages(&command.folder)?, json)?;
            Ok(Exit::Done)
        }
    }
}

fn run_reclaim(command: &args::Reclaim, json: bool, terminal: &Terminal) -> Result<Exit> {
    each(command.options()?, |options| {
        let mut found = reclaim(&options, terminal)?;
        terminal.finish();
        print("reclaim", &found, json)?;
        if let Some(error) = found.failed.take() {
            return Err(error);
        }
        let done = found.done.as_ref();
        let held = done.is_some_and(|done| done.counts.extents_still_held > 0);
        let some_left = !found.skipped.is_empty() || held || found.out_of_time;
        Ok(exit(found.interrupted, some_left))
    })
}

fn run_export(command: &args::Export, json: bool, terminal: &Terminal) -> Result<Exit> {
    let options = command.options()?;
    let found = export(&options, terminal)?;
    terminal.finish();
    let to_stderr = options.archive == ArchivePlace::Pipe;
    print_to(Text { json, to_stderr }, "export", &found)?;
    Ok(exit(false, !found.skipped.is_empty()))
}

fn run_status(command: &args::Status, json: bool, terminal: &Terminal) -> Result<Exit> {
    let found = index::all_in(&command.index, terminal)?;
    if found.is_empty() && !json {
        terminal.note(&format!(
            "There is no index in `{}` yet: run vmfold scan or reclaim",
            shown(&command.index)
        ));
    }
    print("status", &Statuses { indexes: found }, json)?;
    Ok(Exit::Done)
}

/// How a command ended that looked at an archive, or restored from it.
fn intact(intact: bool) -> Exit {
    if intact { Exit::Done } else { Exit::Damaged }
}

/// Works on one filesystem after the other. The first that fails or is interrupted is the last.
fn each<T>(all: Vec<T>, mut work: impl FnMut(T) -> Result<Exit>) -> Result<Exit> {
    let mut worst = Exit::Done;
    for one in all {
        match work(one)? {
            Exit::Done => {}
            Exit::Interrupted => return Ok(Exit::Interrupted),
            exit => worst = exit,
        }
    }
    Ok(worst)
}

fn exit(interrupted: bool, some_skipped: bool) -> Exit {
    match (interrupted, some_skipped) {
        (true, _) => Exit::Interrupted,
        (_, true) => Exit::SomeSkipped,
        _ => Exit::Done,
    }
}

#[derive(Serialize)]
struct Statuses {
    indexes: Vec<index::IndexStatus>,
}

impl std::fmt::Display for Statuses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.indexes.iter().try_for_each(|status| write!(f, "{status}"))
    }
}

/// A document of `--json`: which one, in which version, and what it says.
#[derive(Serialize)]
struct Document<'a, T> {
    #[serde(rename = "type")]
    kind: &'a str,
    version: u32,
    #[serde(flatten)]
    content: &'a T,
}

/// How and where a document is printed.
#[derive(Clone, Copy)]
struct Text {
    json: bool,
    /// Standard output has the archive.
    to_stderr: bool,
}

fn print<T: Serialize + std::fmt::Display>(kind: &str, content: &T, json: bool) -> Result<()> {
    let text = Text { json, to_stderr: false };
    print_to(text, kind, content)
}

fn print_to<T: Serialize + std::fmt::Display>(text: Text, kind: &str, content: &T) -> Result<()> {
    let Text { json, to_stderr } = text;
    let text = if json {
        let document = serde_json::to_string_pretty(&Document {
            kind,
            version: 1,
            content,
        });
        format!(
            "{}\n",
            document.map_err(Error::io("write JSON to", Path::new("stdout")))?
        )
    } else {
        content.to_string()
    };
    if to_stderr {
        return std::io::stderr()
            .write_all(text.as_bytes())
            .map_err(Error::io("write to", Path::new("stderr")));
    }
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        // Whoever reads us has enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::io("write to", Path::new("stdout"))),
    }
}

/// The options of a command as the library wants them.
impl args::Reclaim {
    /// Those for each filesystem.
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

/// Where an archive is that is named on the command line.
fn archive_place(named: &Path) -> ArchivePlace {
    if named.as_os_str() == "-" {
        ArchivePlace::Pipe
    } else {
        ArchivePlace::File(named.to_owned())
    }
}

impl args::Export {
    fn options(&self) -> Result<ExportOptions> {
        Ok(ExportOptions {
            scope: self.scope.scope()?,
            only: self.only.clone(),
            revisions: self.revisions,
            archive: archive_place(&self.archive),
            level: self.level,
            label: self.label.clone(),
        })
    }
}

impl args::Import {
    fn options(&self) -> ImportOptions {
        ImportOptions {
            archive: archive_place(&self.archive),
            commit: self.commit.clone(),
            restore: RestoreOptions {
                to: self.to.clone(),
                only: self.only.clone(),
                replace: self.replace,
                resume: self.resume,
                partial: self.partial,
                as_revision: self.as_revision,
                numeric_owner: self.numeric_owner,
                preserve_special: self.preserve_special,
            },
            seeds: self.seed.clone(),
            index: self.index.clone(),
            memory_bytes: self.memory,
            dry_run: self.dry_run,
        }
    }
}

impl args::Diff {
    fn sides(&self) -> (Option<String>, ComparedWith) {
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
