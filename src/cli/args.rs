//! Arguments.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

use crate::error::{Error, Result};
use crate::index::DEFAULT_FOLDER;
use crate::ops::Scope;
use crate::ops::export::Revisions;
use crate::plan::{REFERENCES_MAX, REFERENCES_PER_GIB_MAX};
use crate::pool::{by_filesystem, named_folders, qubes_folders};
use crate::shown::shown;

/// Gives virtual machine images their disk back: what images and revisions have in common becomes shared extents
///
/// Works on the images of shut-down machines on btrfs. Images keep every byte, their times, inodes, links, mode and owner;
/// images that someone has open are left alone.
///
/// Exit codes: 0 done, 1 failed, 2 usage, 3 done but some images were left alone, 4 the archive is damaged, 5 diff found
/// differences, 130 interrupted.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, propagate_version = true)]
pub(super) struct Args {
    /// Print one JSON document instead of text
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Give way to all other work on the processor and the disk
    #[arg(long, global = true)]
    pub(super) nice: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Share what images have in common, and free the rest
    Reclaim(Reclaim),
    /// Show what each image holds, and what deleting it would free
    Report(Named),
    /// Write images and revisions to an archive, each distinct block once
    Export(Export),
    /// Restore images from an archive, sharing what they have in common
    Import(Import),
    /// Show the commits and images of an archive
    List(List),
    /// Check every hash and reference of an archive
    Verify(Verify),
    /// Show what differs between two commits, or between one and images on disk
    Diff(Diff),
    /// Fill the index only
    Scan(Named),
    /// Show what the index knows
    Status(Status),
}

#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// Image files, and folders to search for images, all on one filesystem; or a whole filesystem, by device or UUID
    #[arg(required_unless_present_any = ["files_from", "qubes"], value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Read more paths from a file, one a line or ended by NUL; `-` for standard input
    #[arg(long, value_name = "FILE")]
    files_from: Option<PathBuf>,
    /// All file-reflink pools of Qubes OS, by qubes.xml or qvm-pool
    #[arg(long)]
    pub(super) qubes: bool,
    /// Where dom0's root filesystem is mounted, in a rescue system
    #[arg(long, value_name = "DIR", default_value = "/", requires = "qubes")]
    qubes_root: PathBuf,
    /// Leave out what matches this pattern; may be given more than once
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Folder for the index, which is only a cache
    #[arg(long, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    index: PathBuf,
    /// Memory for tables of blocks, and as much again for lists; 32 MiB, and 48 MiB more for each TiB of extents, if not said
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
}

impl Named {
    pub(super) fn scope(&self) -> Result<Scope> {
        Ok(self.scope_of(self.all_paths()?))
    }

    /// A scope for each filesystem on which there is something named.
    pub(super) fn scopes(&self) -> Result<Vec<Scope>> {
        let paths = self.all_paths()?;
        if !self.qubes {
            return Ok(vec![self.scope_of(paths)]);
        }
        let groups = by_filesystem(paths).into_iter();
        Ok(groups.map(|paths| self.scope_of(paths)).collect())
    }

    fn scope_of(&self, paths: Vec<PathBuf>) -> Scope {
        Scope {
            paths,
            exclude: self.exclude.clone(),
            index: self.index.clone(),
            memory_bytes: self.memory,
        }
    }

    fn all_paths(&self) -> Result<Vec<PathBuf>> {
        let mut paths = self.paths.clone();
        if let Some(list) = &self.files_from {
            paths.extend(read_list(list)?);
        }
        if self.qubes {
            paths.extend(qubes_folders(&self.qubes_root)?);
        }
        if paths.is_empty() {
            return Err(Error::Usage("the list of paths is empty".into()));
        }
        named_folders(&paths)
    }
}

/// The paths in a list: ended by NUL if there is one in it, else one a line.
fn read_list(list: &Path) -> Result<Vec<PathBuf>> {
    use std::os::unix::ffi::OsStringExt;
    /// Longer lists are none, and what is cut off could be part of a path.
    const BYTES_MAX: u64 = 16 << 20;
    let mut bytes = Vec::new();
    let read = if list.as_os_str() == "-" {
        std::io::stdin().lock().take(BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        let file = File::open(list).map_err(Error::io("open", list))?;
        file.take(BYTES_MAX + 1).read_to_end(&mut bytes)
    };
    if read.map_err(Error::io("read", list))? as u64 > BYTES_MAX {
        return Err(Error::Usage(format!(
            "`{}` is longer than a list of paths may be: {BYTES_MAX} bytes",
            shown(list)
        )));
    }
    let end = if bytes.contains(&0) { 0 } else { b'\n' };
    let names = bytes.split(|byte| *byte == end).filter(|name| !name.is_empty());
    Ok(names
        .map(|name| PathBuf::from(OsString::from_vec(name.to_vec())))
        .collect())
}

#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub(super) struct Reclaim {
    #[command(flatten)]
    pub(super) scope: Named,
    /// Only say what would be done
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Shortest run of equal data worth sharing: less frees more, and makes more fragments
    #[arg(long, value_name = "SIZE", default_value = "8KiB", value_parser = parse_size)]
    pub(super) min_run: u64,
    /// Compress what gains by it, with `zstd` or `zstd:LEVEL` (1 to 19, 3 if not said), sharing it all the same; `none` undoes it
    #[arg(long, value_name = "HOW", value_parser = parse_compression)]
    pub(super) compress: Option<Compression>,
    /// What must be gained to compress something, in hundredths of its size
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=99))]
    pub(super) min_gain: u8,
    /// Compress what is compressed already once more where that gains as much again
    #[arg(long, requires = "compress")]
    pub(super) recompress: bool,
    /// Leave blocks of zeros as data instead of making them holes
    #[arg(long)]
    pub(super) keep_zeros: bool,
    /// Leave preallocated ranges allocated instead of making them holes
    #[arg(long)]
    pub(super) keep_prealloc: bool,
    /// Extra disk space that may be used on the way
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub(super) work_space: u64,
    /// Keep images that match this pattern among themselves: they share with no others. May be given more than once; what
    /// matches none shares with what matches none
    #[arg(long, value_name = "GLOB")]
    pub(super) group: Vec<String>,
    /// References that one extent may get
    #[arg(long, value_name = "N", default_value_t = REFERENCES_MAX, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) max_references: u32,
    /// References to extents that an image may get for each GiB of its data
    #[arg(long, value_name = "N", default_value_t = REFERENCES_PER_GIB_MAX)]
    pub(super) max_extents: u32,
    /// Disk space that stays free whatever happens
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = parse_size)]
    pub(super) reserve: u64,
    /// Stop in order after so many seconds; the next run goes on from there
    #[arg(long, value_name = "N")]
    pub(super) max_seconds: Option<u64>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Export {
    /// Archive file, new or to be appended to; `-` for standard output
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    #[command(flatten)]
    pub(super) scope: Named,
    /// Choose images that match this pattern; may be given more than once
    #[arg(long, value_name = "GLOB")]
    pub(super) only: Vec<String>,
    /// Which revisions: `all`, `none`, `only` (revisions and nothing else), or how many of each image, the newest
    #[arg(long, value_name = "WHICH", default_value = "all", value_parser = parse_revisions)]
    pub(super) revisions: Revisions,
    /// Compression level of zstd, 1 to 19
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(super) level: i32,
    /// A name for this commit
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(super) label: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Archive file
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Show this commit with its images: its number, label or name
    #[arg(value_name = "COMMIT")]
    pub(super) commit: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// Archive file
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Diff {
    /// Archive file
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// A commit; the one before the last, or with --pool the last, if not said
    #[arg(value_name = "COMMIT")]
    pub(super) first: Option<String>,
    /// The commit to compare it with; the last if not said
    #[arg(value_name = "COMMIT", conflicts_with = "pool")]
    pub(super) second: Option<String>,
    /// Compare with images on disk: the paths that were exported
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(super) pool: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub(super) struct Import {
    /// Archive file; `-` for standard input
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Images to restore, by pattern or folder; all if none is named
    #[arg(value_name = "GLOB")]
    pub(super) only: Vec<String>,
    /// Folder to restore to; it is made if it does not exist
    #[arg(long, value_name = "DIR")]
    pub(super) to: PathBuf,
    /// Which commit: its number, label or name; the last if not said
    #[arg(long, value_name = "COMMIT")]
    pub(super) commit: Option<String>,
    /// Images, and folders of images, on the same filesystem, to share blocks with; may be given more than once
    #[arg(long, value_name = "PATH")]
    pub(super) seed: Vec<PathBuf>,
    /// Put images in the place of existing ones
    #[arg(long)]
    pub(super) replace: bool,
    /// Go on with an import that was interrupted
    #[arg(long)]
    pub(super) resume: bool,
    /// Restore what is intact of a damaged archive
    #[arg(long)]
    pub(super) partial: bool,
    /// Only say what would be done
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Restore images as revisions of Qubes OS, with the next free number
    #[arg(long)]
    pub(super) as_revision: bool,
    /// Take owners by number even where their names are known here
    #[arg(long)]
    pub(super) numeric_owner: bool,
    /// Restore what can give privileges: set-user-ID, set-group-ID and sticky bits, attributes of security.* and trusted.*
    #[arg(long)]
    pub(super) preserve_special: bool,
    /// Folder for the index, which is only a cache
    #[arg(long, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    pub(super) index: PathBuf,
    /// Memory for tables of blocks, and as much again for lists; 32 MiB, and 48 MiB more for each TiB of extents, if not said
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) memory: Option<u64>,
}

/// What `--compress` can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Zstd(i32),
}

fn parse_compression(text: &str) -> std::result::Result<Compression, String> {
    match text.split_once(':') {
        None if text == "none" => Ok(Compression::None),
        None if text == "zstd" => Ok(Compression::Zstd(3)),
        Some(("zstd", level)) => match level.parse() {
            Ok(level @ 1..=19) => Ok(Compression::Zstd(level)),
            _ => Err("levels of zstd are 1 to 19".into()),
        },
        _ => Err("it is `zstd`, `zstd:LEVEL` or `none`".into()),
    }
}

fn parse_revisions(text: &str) -> std::result::Result<Revisions, String> {
    Ok(match text {
        "all" => Revisions::All,
        "none" => Revisions::Newest(0),
        "only" => Revisions::Only,
        number => Revisions::Newest(
            number
                .parse()
                .map_err(|_| format!("`{text}` is neither `all`, `none`, `only` nor a number"))?,
        ),
    })
}

#[derive(Debug, clap::Args)]
pub(super) struct Status {
    /// Folder of the index
    #[arg(long, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    pub(super) index: PathBuf,
}

/// A size as people write it. As with other tools that count blocks, `16K` and `16k` mean 16 KiB.
fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.').trim();
    let binary = match unit.to_ascii_uppercase().as_str() {
        "K" | "M" | "G" | "T" => format!("{text}iB"),
        _ => text.to_owned(),
    };
    binary
        .parse::<bytesize::ByteSize>()
        .map(|size| size.as_u64())
        .map_err(|_| format!("`{text}` is no size such as 16K or 1GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_is_sound() {
        <Args as clap::CommandFactory>::command().debug_assert();
    }

    #[test]
    fn compression_has_a_level() {
        for (text, parsed) in [
            ("zstd", Some(Compression::Zstd(3))),
            ("zstd:15", Some(Compression::Zstd(15))),
            ("none", Some(Compression::None)),
            ("zstd:0", None),
            ("zstd:20", None),
            ("zstd:", None),
            ("none:3", None),
            ("lzo", None),
        ] {
            assert_eq!(parse_compression(text).ok(), parsed, "{text}");
        }
    }

    #[test]
    fn sizes_are_binary() {
        for (text, bytes) in [
            ("16K", 16384),
            ("4k", 4096),
            ("1GiB", 1 << 30),
            ("2 M", 2 << 20),
            ("4096", 4096),
            ("16KB", 16000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        assert!(parse_size("lots").is_err());
    }
}
