//! The log of decisions about images and ranges. Without `-v` and `--log-file`, events are not collected at all.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::Registry;

use super::args::Args;
use super::progress::{NOTES, Terminal};
use crate::error::{Error, Result};
use crate::named_folder::open_parent;

/// A destination of the log.
type LogLayer = Box<dyn Layer<Registry> + Send + Sync>;

/// Begins to log as the command line asks for.
///
/// # Errors
/// [`Error::Io`] if the log file cannot be opened or is not a regular file; [`Error::OfAnother`] if it belongs to another user.
pub(super) fn begin(args: &Args, terminal: &Arc<Terminal>) -> Result<()> {
    let mut layers: Vec<LogLayer> = Vec::new();
    let level = match args.verbose {
        0 => LevelFilter::OFF,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    if level != LevelFilter::OFF {
        let lines = lines(args.log_json, Stderr(Arc::clone(terminal)), false);
        let is_no_note = filter_fn(|event| event.target() != NOTES);
        layers.push(lines.with_filter(level).with_filter(is_no_note).boxed());
    }
    if let Some(path) = &args.log_file {
        let file = Arc::new(open(path)?);
        layers.push(lines(args.log_json, file, true).with_filter(LevelFilter::DEBUG).boxed());
    }
    if !layers.is_empty() {
        // This cannot fail: a process runs one command, so no other subscriber was set.
        let _ = tracing::subscriber::set_global_default(Registry::default().with(layers));
    }
    Ok(())
}

/// Writes one event a line, as text or as JSON.
fn lines<W>(json: bool, writer: W, has_time: bool) -> LogLayer
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_target(false);
    match (json, has_time) {
        (true, _) => layer.json().flatten_event(true).with_writer(writer).boxed(),
        (false, true) => layer.with_writer(writer).boxed(),
        (false, false) => layer.without_time().with_writer(writer).boxed(),
    }
}

/// Opens a log file to append to it. If others can write to its folder, another user may have put a file or a link under its name, so links and
/// files of others are refused.
fn open(path: &Path) -> Result<File> {
    let flags =
        OFlags::WRONLY | OFlags::APPEND | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let name = path.file_name().ok_or(Errno::ISDIR);
    let name = name.map_err(Error::io("open the log", path))?;
    let opened = rustix::fs::openat(open_parent(path)?, name, flags, Mode::RUSR | Mode::WUSR);
    let file = File::from(opened.map_err(Error::io("open the log", path))?);
    let stat = rustix::fs::fstat(&file).map_err(Error::io("look at", path))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(Error::io("write to", path)(io::Error::from(io::ErrorKind::Unsupported)));
    }
    if stat.st_uid != rustix::process::geteuid().as_raw() {
        return Err(Error::OfAnother {
            path: path.to_owned(),
            uid: stat.st_uid,
        });
    }
    Ok(file)
}

/// Standard error, without disturbing the progress that is shown there.
struct Stderr(Arc<Terminal>);

impl<'a> MakeWriter<'a> for Stderr {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line {
            terminal: &self.0,
            bytes: Vec::new(),
        }
    }
}

/// A line of the log. It is printed as a whole when it is dropped.
struct Line<'a> {
    terminal: &'a Terminal,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        self.terminal.print(&String::from_utf8_lossy(&self.bytes));
    }
}
