//! The arguments of the command line. The doc comments of commands and options are their help, which is the reference.

use super::key_args::{KeyArgs, NewKeyArgs};
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
use crate::qubes::SOCKETS;
use crate::report::ReportOrder;
use crate::shown::shown;

/// Gives virtual machine images their disk back: what images and revisions have in common becomes shared extents
///
/// vmfold works on the images of machines that are shut down, on btrfs and on XFS with reflinks. It shares what images
/// have in common, frees the rest, and keeps images in archives. Images keep every byte, their times, inodes, links,
/// mode and owner. An image that someone has open is left alone and named. On btrfs it takes root.
///
/// Exit codes: 0 done; 1 failed; 2 wrong usage; 3 done, but some images were left alone or the time was over; 4 the
/// archive is damaged; 5 diff found differences; 130 interrupted. What each means for each command stands in
/// `formats/scripting.md`.
///
/// Sizes are bytes, or have a unit: 16K and 16KiB are 16384 bytes, 16KB are 16000. Patterns are globs as in a shell:
/// `*` stands for any text, also across slashes, and `?` for one character. A pattern without a slash holds at any
/// depth. Quote patterns, or the shell expands them.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, propagate_version = true)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub(super) struct Args {
    /// Print one JSON document instead of text
    ///
    /// The document goes to standard output when the command has ended, and has the form of
    /// `formats/report-v1.schema.json`. `export -` prints it to standard error, since the archive goes to standard
    /// output. `--qubes` prints one document for each filesystem.
    #[arg(long, global = true)]
    pub(super) json: bool,
    /// Give way to all other work on the processor and the disk
    ///
    /// vmfold runs in the idle classes of the scheduler and of the disk. It leaves them for as long as somebody waits
    /// for an image it holds.
    #[arg(long, global = true)]
    pub(super) nice: bool,
    /// Say on standard error what is decided about each image, and with -vv about each range
    ///
    /// Once: which images are worked on, which are left alone and why, what is planned, what names restored images get.
    /// Twice: also each range that is not shared or cannot be read, with the reason, and each extent that goes.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(super) verbose: u8,
    /// Print only the first line of a report, and neither notes nor progress
    ///
    /// Errors are printed all the same. It is for timers, which mail what is printed. It changes no JSON document.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub(super) quiet: bool,
    /// Append a log of all decisions to a file
    ///
    /// The file gets what -vv says, with times, and the notes. It is made if it does not exist, for its user alone. A
    /// file that belongs to another user, and a link, are refused.
    #[arg(long, global = true, value_name = "FILE")]
    pub(super) log_file: Option<PathBuf>,
    /// Write the lines of -v and --log-file as JSON
    ///
    /// Each line is one object, with the level, the message, and what it is about.
    #[arg(long, global = true)]
    pub(super) log_json: bool,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Share what images have in common, and free the rest
    ///
    /// It frees blocks that are equal anywhere in any image, zeros, space that was allocated and never written, and
    /// parts of extents that nothing can reach. The kernel compares the bytes of both sides, under lock, before it
    /// shares them; nothing else touches an image. No image and no revision is deleted. vmfold counts extents before
    /// and after, and reports the difference as freed.
    ///
    /// Shut the machines down first, and name what is to share: images, folders, or a whole filesystem. Extents that
    /// snapshots or files outside these paths use too stay; vmfold says how much that is, and who holds them. It can be
    /// killed at any moment: images stay as they are, and the next run goes on from there.
    Reclaim(Reclaim),
    /// Tell what takes space, what a reclaim would free, and what deleting would free
    ///
    /// It tells how much is on disk; what `reclaim` would free, as its dry run says, and why; what deleting each machine,
    /// its revisions, and each family of machines would free, now and after a reclaim; what is in use or held by
    /// snapshots; and the next command. A family is a template and what derives from it, or machines that have most of
    /// their data in common. It changes no image. On XFS the first report reads all data, as the first reclaim does.
    Report(Report),
    /// Write images and revisions to an archive, each distinct block once
    ///
    /// An export adds a commit to an archive, which is made if it does not exist. It stores each distinct block once,
    /// compressed. A later export to the same archive reads and stores only what changed. An image that is written to
    /// meanwhile makes the export fail, by name, and the archive stays as it was. Names in the archive are relative to
    /// the folder that was named.
    Export(Export),
    /// Restore images from an archive or another backup, sharing what they have in common
    ///
    /// An import writes each distinct block once, and makes the images from these by sharing, so that a disk needs room
    /// for the distinct blocks only. Where the filesystem cannot share, images become plain sparse files. What does not
    /// fit is refused before anything is written. Every block is proved by its hash. No image gets its name before all
    /// are complete and on disk. An image that exists is not replaced, unless --replace is given.
    Import(Import),
    /// Show the commits and images of an archive
    ///
    /// Without a commit it shows all commits: number, name, time, images, sizes, and what each added. With one it shows
    /// its images.
    List(List),
    /// Check every hash and reference of an archive
    ///
    /// It reads the whole archive. For each damaged place it names the images and the byte ranges that are lost.
    Verify(Verify),
    /// Give an archive parity, from which lost bytes of it can be computed
    ///
    /// It reads what has no parity yet, and appends it. Nothing that is written changes. `export --parity` does the same
    /// while it writes, without reading anything again. `vmfold repair` heals damage, and `verify` says how much
    /// more would still heal.
    Protect(Protect),
    /// List, add, remove and rotate the keys of an encrypted archive, and print one on paper
    ///
    /// `export --encrypt` makes an archive that is encrypted. Any one of its keys opens it: a passphrase, or an identity of
    /// age. Changes of keys are appended, and what the archive holds is not read for them.
    Key(Key),
    /// Heal a damaged archive from its parity
    ///
    /// It heals bytes that were changed, zeroed or cannot be read, and such that are missing or stand twice, as far as parity
    /// reaches, into a copy or in place. No key is needed. What parity cannot heal is taken from another copy, if one is
    /// named. All that is healed is proved by the hashes of records before anything is written. The exit code is 0
    /// only if all of the archive is intact then; otherwise it says what is left.
    Repair(Repair),
    /// Show what differs between two commits, or between one and images on disk
    ///
    /// It compares by hash, and shows which byte ranges of which images differ. The exit code is 5 if anything does.
    Diff(Diff),
    /// Fill the index only
    ///
    /// A later run need not read again what a scan has read. It pays on XFS, and on btrfs where blocks have no checksum
    /// that serves: compressed extents, and filesystems with SHA-256 or BLAKE2 checksums.
    Scan(Named),
    /// Show what the index knows
    ///
    /// For each filesystem: how many extents and chunks the index holds, how many fingerprints it keeps, and what it
    /// takes on disk.
    Status(Status),
    /// Write man pages into a folder
    ///
    /// It writes `vmfold.1` and one page for each command, such as `vmfold-reclaim.1`, with the text of the long help.
    /// Pages that are there already are replaced. It prints the paths of the pages.
    #[command(hide = true)]
    Man(Man),
    /// Print the version
    ///
    /// It is what `--version` prints.
    #[command(hide = true)]
    Version,
}

#[derive(Debug, clap::Args)]
pub(super) struct Named {
    /// Image files, and folders to search for images, all on one filesystem; or a whole filesystem, by device or UUID
    ///
    /// A folder is searched at all depths, without following symbolic links. Images on other filesystems that are
    /// mounted below it are left alone. In a folder, those files count whose names say that they are images (.img,
    /// .raw, .qcow2, .qcow, .vmdk, .vdi, .vhd, .vhdx, .hdd, .iso) or revisions of one, and files of 16 MiB and more
    /// without an extension. A file that is named itself always counts. A whole filesystem with all its subvolumes is
    /// named by its mount point, its device, or its UUID. Images share blocks only with others that are named in the
    /// same run.
    #[arg(required_unless_present_any = ["files_from", "qubes"], value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Read more paths from a file, one a line or ended by NUL; `-` for standard input
    ///
    /// If there is a NUL in the file, each path ends with one; otherwise each line is a path. Empty ones are skipped. A
    /// list may have 16 MiB.
    #[arg(long, value_name = "FILE")]
    files_from: Option<PathBuf>,
    /// All file-reflink pools of Qubes OS, by qubes.xml or qvm-pool
    ///
    /// It takes the folders `appvms`, `vm-templates` and `vm-kernels` of each pool whose driver is file-reflink.
    /// `reclaim` and `report` work on pools on different filesystems one after the other; other commands refuse them.
    #[arg(long)]
    pub(super) qubes: bool,
    /// Where dom0's root filesystem is mounted, in a rescue system
    ///
    /// qubes.xml and the folders of the pools are looked for below this folder.
    #[arg(long, value_name = "DIR", default_value = "/", requires = "qubes")]
    pub(super) qubes_root: PathBuf,
    /// Leave out what matches this pattern; may be given more than once
    ///
    /// It holds for what is found in folders, by the path below the folder that was named or by the full path. A folder
    /// that matches is not searched. A pattern without a slash holds at any depth.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Folder for the index, which is only a cache
    ///
    /// It remembers what was read. Delete it at any time: the next run then reads more. What of a large pool does not
    /// fit into memory lies in unnamed files here while vmfold runs. Nobody else may be able to write to the folder.
    /// Where it cannot be used, the run goes on without an index and says so.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    pub(super) index: PathBuf,
    /// Memory for tables of blocks, and as much again for lists; 32 MiB, and 48 MiB more for each TiB of extents, if
    /// not said
    ///
    /// In all, vmfold takes at most twice this, 48 MiB more, and 32 MiB more for each TiB of extents, whatever is in
    /// the pool.
    ///
    /// A pool with more blocks keeps their fingerprints in a file beside the index. One with more still looks up a
    /// sample of its blocks, from which matches grow in both directions; vmfold says so, and names the sample. The rest
    /// of long lists lies in unnamed files beside the index, which take a quarter of what is free there at most. The
    /// kernel keeps pages of these files in memory while nobody else needs it.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
}

impl Named {
    /// The scope of a command that works on one filesystem.
    pub(super) fn scope(&self) -> Result<Scope> {
        Ok(self.scope_of(self.all_paths()?))
    }

    /// One scope for each filesystem that named paths lie on. Without `--qubes`, all paths are one scope.
    pub(super) fn scopes(&self) -> Result<Vec<Scope>> {
        let paths = self.all_paths()?;
        if !self.qubes {
            return Ok(vec![self.scope_of(paths)]);
        }
        let groups = by_filesystem(paths).into_iter();
        Ok(groups.map(|paths| self.scope_of(paths)).collect())
    }

    /// The command that reclaims the paths of a scope, word by word.
    pub(super) fn reclaim_command(&self, scope: &Scope) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        if rustix::process::geteuid().is_root() {
            words.push("sudo".into());
        }
        words.extend(["vmfold", "reclaim"].map(str::to_owned));
        for pattern in &self.exclude {
            words.extend(["--exclude".to_owned(), pattern.clone()]);
        }
        let mut add = |path: &Path| words.push(path.to_string_lossy().into_owned());
        if self.index.as_os_str() != DEFAULT_FOLDER {
            add(Path::new("--index"));
            add(&self.index);
        }
        if self.qubes {
            add(Path::new("--qubes"));
        }
        if self.qubes_root != Path::new("/") {
            add(Path::new("--qubes-root"));
            add(&self.qubes_root);
        }
        match &self.files_from {
            Some(list) => {
                add(Path::new("--files-from"));
                add(list);
                self.paths.iter().for_each(|path| add(path));
            }
            None if self.qubes => self.paths.iter().for_each(|path| add(path)),
            None => scope.paths.iter().for_each(|path| add(path)),
        }
        words
    }

    fn scope_of(&self, paths: Vec<PathBuf>) -> Scope {
        Scope {
            paths,
            exclude: self.exclude.clone(),
            index: self.index.clone(),
            memory_bytes: self.memory,
        }
    }

    /// All paths that were named, on the command line, in a list, or by `--qubes`.
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

/// Reads the paths of a list. If there is a NUL in it, each path ends with one. Otherwise each line is a path.
fn read_list(list: &Path) -> Result<Vec<PathBuf>> {
    use std::os::unix::ffi::OsStringExt;
    /// The longest list, in bytes. A longer one is refused, because a part of it could end in the middle of a path.
    const BYTES_MAX: u64 = 16 << 20;
    let mut bytes = Vec::new();
    let result = if list.as_os_str() == "-" {
        std::io::stdin().lock().take(BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        let file = File::open(list).map_err(Error::io("open", list))?;
        file.take(BYTES_MAX + 1).read_to_end(&mut bytes)
    };
    if result.map_err(Error::io("read", list))? as u64 > BYTES_MAX {
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
pub(super) struct Report {
    #[command(flatten)]
    pub(super) scope: Named,
    /// Tell what deleting the images would free that match this pattern; may be given more than once
    ///
    /// A pattern stands for what it matches, and a folder for all that is in it: `appvms/work`, `*.img.*@2025*`. With
    /// several, it also tells what deleting all of them would free. That is exact, and more than the sum, since what
    /// two images share is freed with the second one.
    #[arg(long, value_name = "GLOB")]
    pub(super) if_deleted: Vec<String>,
    /// Show a row for each image instead of families and machines
    ///
    /// For each image: its size; what it maps, each block as often as it does; what it takes on disk, shared or not; and
    /// what deleting it would free.
    #[arg(long)]
    pub(super) images: bool,
    /// What comes first: what takes most on disk, what frees most now or after a reclaim, or by name
    ///
    /// `disk` is what takes most on disk, `now` and `after` are what deleting frees.
    #[arg(long, value_name = "ORDER", default_value = "disk", value_parser = parse_order)]
    pub(super) sort: ReportOrder,
    /// Show so many rows, machines of a family and families each; 0 for all
    ///
    /// How many more there are is told. It does not change the JSON document.
    #[arg(long, value_name = "N", default_value_t = 20)]
    pub(super) top: usize,
    /// Show only what matches this pattern; may be given more than once
    ///
    /// It is compared with names of machines, and with paths of machines and images. Sizes of families stay those of all
    /// their machines. It does not change the JSON document.
    #[arg(long, value_name = "GLOB")]
    pub(super) filter: Vec<String>,
    /// Do not plan a reclaim
    ///
    /// Then it only reads extent maps. It does not tell what a reclaim would free, nor what deleting would free after one.
    #[arg(long)]
    pub(super) no_plan: bool,
}

/// Parses the value of `--sort`.
fn parse_order(text: &str) -> std::result::Result<ReportOrder, String> {
    match text {
        "disk" => Ok(ReportOrder::Disk),
        "now" => Ok(ReportOrder::Now),
        "after" => Ok(ReportOrder::After),
        "name" => Ok(ReportOrder::Name),
        _ => Err("it is `disk`, `now`, `after` or `name`".into()),
    }
}

#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub(super) struct Reclaim {
    #[command(flatten)]
    pub(super) scope: Named,
    /// Only say what would be done
    ///
    /// It makes the whole plan and changes no image. Where the filesystem has checksums, that takes seconds. It works
    /// on a filesystem that is mounted read-only, too. It also fills the index.
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Shortest run of equal data worth sharing: less frees more, and makes more fragments
    ///
    /// The size holds where two revisions have the place. Half of it is enough where no revision shares the place, and
    /// half as much again is needed where three or more do. 4K shares whatever frees more than it takes of metadata,
    /// and makes most fragments. 64K or more makes the fewest: reading, `cp --reflink` and `btrfs send` then cost the
    /// least, and somewhat less is freed. It is 4K at least and 4G at most.
    #[arg(long, value_name = "SIZE", default_value = "8KiB", value_parser = parse_size)]
    pub(super) min_run: u64,
    /// Compress what gains by it, with `zstd` or `zstd:LEVEL` (1 to 19, 3 if not said), sharing it all the same; `none`
    /// undoes it
    ///
    /// Each distinct extent is rewritten once, as zstd frames of up to 128 KiB that are made on all cores. The kernel
    /// then moves every reference there, after it has compared the bytes. `btrfs filesystem defragment -czstd` would
    /// copy the data of each image and each revision for itself, and so undo all sharing on the way.
    ///
    /// What does not shrink by --min-gain stays where it is: in each extent one part in eight is tried before anything
    /// is rewritten, then each frame on its own. What is compressed already stays too, unless --recompress is given.
    /// What guests write later is not compressed, unless the filesystem is mounted so; the next run does it. `none`
    /// undoes all compression, if there is room for that.
    ///
    /// `btrfs property set IMAGE compression none` keeps an image as it is, and with it what it shares. `chattr +m`
    /// does not: btrfs sets the same mark by itself on any file of which one part did not shrink. Images without
    /// checksums (nodatacow) cannot be compressed, and neither can any on XFS. Linux before 5.18 takes no frames: there
    /// btrfs compresses itself, at its own level.
    ///
    /// Use it for what is kept rather than run: revisions, templates, machines that are seldom up, a disk that is too
    /// small. Leave it for machines that read at random a lot: to read 4 KiB, up to 128 KiB are decompressed. Levels
    /// cost time to compress, and none to read.
    #[arg(long, value_name = "HOW", value_parser = parse_compression)]
    pub(super) compress: Option<CompressionArg>,
    /// What must be gained to compress something, in hundredths of its size
    ///
    /// Higher values leave more data uncompressed, which reads faster.
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u8).range(1..=99))]
    pub(super) min_gain: u8,
    /// Compress what is compressed already once more where that gains as much again
    ///
    /// btrfs does not keep the level that something was compressed with. So it is tried, and goes by what is gained:
    /// --min-gain, once more.
    #[arg(long, requires = "compress")]
    pub(super) recompress: bool,
    /// Leave blocks of zeros as data instead of making them holes
    ///
    /// A hole takes no space until the guest writes there again. With this option zeros stay as data.
    #[arg(long)]
    pub(super) keep_zeros: bool,
    /// Leave preallocated ranges allocated instead of making them holes
    ///
    /// A preallocated range is space that was reserved, as by `fallocate`, and never written.
    #[arg(long)]
    pub(super) keep_prealloc: bool,
    /// Extra disk space that may be used on the way
    ///
    /// Donors take it: files without names that blocks are copied to before what they replace is freed. It rarely takes
    /// more than 256 MiB. With --compress, what less than that leaves may take more than one run.
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = parse_size)]
    pub(super) work_space: u64,
    /// Keep images that match this pattern among themselves; may be given more than once
    ///
    /// They share blocks with no others. Images that match no pattern share with each other. The first pattern that
    /// matches an image, or a folder it lies in, counts; there may be 31 patterns. Extents that groups share already
    /// stay shared.
    ///
    /// Sharing reveals something: a guest can in principle tell by the time a write takes that one of its blocks was
    /// shared, and so that another guest has the same block. Groups keep trust domains apart.
    #[arg(long, value_name = "GLOB")]
    pub(super) group: Vec<String>,
    /// References that one extent may get
    ///
    /// `btrfs send` clones only extents that have 1024 references at most, counted over all snapshots. Where each image
    /// lies in two snapshots, say 400 if you send them. With a lower limit less is freed, and what is left may take
    /// more than one run.
    #[arg(long, value_name = "N", default_value_t = REFERENCES_MAX, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) max_references: u32,
    /// References to extents that an image may get for each GiB of its data
    ///
    /// The default is one for each 32 KiB on average. The limit keeps reading in order and `cp --reflink` fast.
    /// Metadata is limited besides: no extent goes that would free less than its new references take. Compressed
    /// extents are 128 KiB at most, so that there are 8192 to the GiB at least, whatever this says. With --compress,
    /// what this limit leaves may take more than one run.
    #[arg(long, value_name = "N", default_value_t = REFERENCES_PER_GIB_MAX)]
    pub(super) max_extents: u32,
    /// Disk space that stays free whatever happens
    ///
    /// No donor is written that would leave less. What would take more waits for the next run.
    #[arg(long, value_name = "SIZE", default_value = "128MiB", value_parser = parse_size)]
    pub(super) reserve: u64,
    /// Stop in order after so many seconds; the next run goes on from there
    ///
    /// The call that is going on ends first. The exit code is then 3.
    #[arg(long, value_name = "N")]
    pub(super) max_seconds: Option<u64>,
    /// End with 0 if nothing but images in use was left alone
    ///
    /// It is for timers, to which a running machine is no failure. The images are told all the same.
    #[arg(long)]
    pub(super) ok_if_in_use: bool,
}

#[derive(Debug, clap::Args)]
#[command(mut_arg("paths", |paths| paths.required_unless_present("from")))]
pub(super) struct Export {
    /// Archive file, new or to be appended to; `-` for standard output
    ///
    /// An archive that is appended to is never rewritten: an export that is interrupted leaves it as it was. Only one
    /// export writes to it at a time.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Export a backup that another program made, in the place of images; `-` for standard input
    ///
    /// It takes the backups that `import` takes. Their blocks are stored as those of images are, each once, so that full
    /// backups of one machine take little more than one of them. Each makes a commit, with the backup's own time and,
    /// if no --label is given, its own name or that of its file. The backup is read once, and nothing of it is kept
    /// if anything of it is missing or damaged.
    #[arg(long, value_name = "BACKUP", conflicts_with_all = ["paths", "files_from", "qubes", "exclude", "revisions"])]
    pub(super) from: Option<PathBuf>,
    #[command(flatten)]
    pub(super) access: Access,
    #[command(flatten)]
    pub(super) new_keys: NewKeyArgs,
    /// Add to an encrypted archive with the credentials of a host that cannot read it
    ///
    /// `vmfold key host` makes them. The archive is not read before it is added to, as it cannot be: see --trust-archive.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["encrypt", "identity"])]
    pub(super) write_only: Option<PathBuf>,
    #[command(flatten)]
    pub(super) scope: Named,
    /// Choose images that match this pattern; may be given more than once
    ///
    /// It is compared with the name in the archive and with the full path. Without it, all images are exported.
    #[arg(long, value_name = "GLOB")]
    pub(super) only: Vec<String>,
    /// Which revisions: `all`, `none`, `only` (revisions and nothing else), or how many of each image, the newest
    ///
    /// Revisions are what Qubes OS keeps of earlier states: `private.img.7@2026-01-02T03:04:05Z`.
    #[arg(long, value_name = "WHICH", default_value = "all", value_parser = parse_revisions)]
    pub(super) revisions: Revisions,
    /// Compression level of zstd, 1 to 19
    ///
    /// Higher levels make the archive smaller and take more time. They cost nothing when it is read.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(i32).range(1..=19))]
    pub(super) level: i32,
    /// A name for this commit
    ///
    /// `list`, `import` and `diff` find the commit by it. Of several with one label they take the last.
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub(super) label: String,
    /// Percent of the archive that may be lost and still heal, 1 to 100; 0 for none
    ///
    /// Parity is written beside the commit, and covers all of the archive that has none yet. It takes somewhat more of the archive than this
    /// percentage, and 128 MiB of memory. Any one lost stretch of so many percent of it heals, and as much in bad sectors here and there: see
    /// `vmfold repair`. Without this option, an export that adds to an archive goes on as the last commit has it: with the same percentage, or
    /// without. `vmfold protect` gives parity to an archive that has none.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
    pub(super) parity: Option<u8>,
    /// Refer to what the archive holds without reading it first
    ///
    /// An export that adds to an archive reads the packs that the images have blocks in common with, and stores blocks anew
    /// whose pack is damaged. That takes as long as reading these packs. With this option, it believes the archive: where it is
    /// damaged, the new commit is too, and `verify` tells.
    #[arg(long)]
    pub(super) trust_archive: bool,
    /// End with 0 if nothing but images in use was left out
    ///
    /// It is for timers, to which a running machine is no failure. The images are told all the same, and they are not in the
    /// commit.
    #[arg(long)]
    pub(super) ok_if_in_use: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct Key {
    #[command(subcommand)]
    pub(super) command: KeyCommand,
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum KeyCommand {
    /// Show the keys of an archive
    ///
    /// Without a key, it shows of what kinds they are.
    List(KeyedArchive),
    /// Add a key: a recipient of age or, without one, a new passphrase
    Add(KeyAdd),
    /// Remove a key
    ///
    /// Whoever had it can still read what is in the archive now, and what is exported later until the keys are rotated.
    Remove(KeyRemove),
    /// Encrypt what is exported from now on with new keys
    ///
    /// What was exported before stays as it is. Recipients keep their keys. So does the passphrase that is given; others are
    /// dropped, and have to be added again.
    Rotate(KeyedArchive),
    /// Make credentials for a host that adds to the archive and cannot read it
    ///
    /// `export --write-only FILE` takes them. The host shares what the archive holds already, as far as it was exported by who
    /// has a key, or by the host itself; what other hosts wrote is stored again. Whoever steals the credentials can read
    /// nothing, not even what the host exported. He can add commits, and can tell whether a block that he knows is in the
    /// archive. After `key rotate`, hosts need new credentials.
    Host(KeyHost),
    /// Print a key on paper: a recovery sheet, with a text to type and a QR code
    Sheet(KeySheet),
}

#[derive(Debug, clap::Args)]
pub(super) struct KeyedArchive {
    /// Encrypted archive
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    #[command(flatten)]
    pub(super) keys: KeyArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct KeyAdd {
    #[command(flatten)]
    pub(super) of: KeyedArchive,
    /// Recipient of age whose identity shall open the archive: age1...; may be given more than once
    #[arg(long, value_name = "RECIPIENT")]
    pub(super) recipient: Vec<String>,
    /// File of recipients, one a line; may be given more than once
    #[arg(long, value_name = "FILE")]
    pub(super) recipients_file: Vec<PathBuf>,
    /// File whose first line is the new passphrase
    #[arg(long, value_name = "FILE")]
    pub(super) new_passphrase_file: Option<PathBuf>,
    /// What the key is called
    #[arg(long, value_name = "TEXT")]
    pub(super) label: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(super) struct KeyRemove {
    #[command(flatten)]
    pub(super) of: KeyedArchive,
    /// Which key: its number in `key list`, its name, or its recipient
    #[arg(value_name = "KEY")]
    pub(super) which: String,
}

#[derive(Debug, clap::Args)]
pub(super) struct KeyHost {
    #[command(flatten)]
    pub(super) of: KeyedArchive,
    /// What the host is called, for people
    #[arg(value_name = "NAME")]
    pub(super) name: String,
    /// File to write the credentials to, which must not exist
    #[arg(long, value_name = "FILE")]
    pub(super) to: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct KeySheet {
    #[command(flatten)]
    pub(super) of: KeyedArchive,
    /// File to write the sheet to, which must not exist; without it, it is printed on the terminal
    #[arg(long, value_name = "FILE")]
    pub(super) to: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct List {
    /// Archive file, or a backup that another program made
    ///
    /// It is read from a file only: a pipe cannot be listed. Of a backup of Qubes OS, the sizes of images are in what
    /// is encrypted, and only `verify` tells them.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Show this commit with its images: its number, label or name
    ///
    /// A commit is named by the first hexadecimal digits of its hash, four at least. `latest` is the last one,
    /// `previous` the one before.
    #[arg(value_name = "COMMIT")]
    pub(super) commit: Option<String>,
    #[command(flatten)]
    pub(super) access: Access,
}

#[derive(Debug, clap::Args)]
pub(super) struct Verify {
    /// Archive file, or a backup that another program made
    ///
    /// It is read from a file only, from its beginning to its end. Of a backup that another program made, verify proves
    /// that nothing is missing, and that nothing is damaged as far as the backup has hashes: that of Qubes OS has them
    /// for all of it, an archive of Proxmox VE for its headers, and the compression around it for its content. The
    /// first thing that is wrong is told.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    #[command(flatten)]
    pub(super) access: Access,
}

#[derive(Debug, clap::Args)]
pub(super) struct Protect {
    /// Archive file
    ///
    /// One that is encrypted needs its key, since parity follows its last commit.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Percent of the archive that may be lost and still heal, 1 to 100
    ///
    /// Parity takes somewhat more of the archive than this percentage. Any one lost stretch of so many percent of it heals, and
    /// as much in bad sectors here and there.
    #[arg(long, value_name = "PERCENT", default_value_t = 5, value_parser = clap::value_parser!(u8).range(1..=100))]
    pub(super) parity: u8,
    /// Give parity also to what has some already
    ///
    /// It takes as much space again. It is for another percentage, or after bytes were healed from elsewhere.
    #[arg(long)]
    pub(super) again: bool,
    #[command(flatten)]
    pub(super) keys: KeyArgs,
}

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("target").required(true).args(["to", "in_place", "dry_run"])))]
pub(super) struct Repair {
    /// Archive file
    ///
    /// It may be encrypted: no key is needed.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Write the repaired archive to this new file
    ///
    /// It has its name once it is complete and on disk. The archive is only read.
    #[arg(long, value_name = "COPY")]
    pub(super) to: Option<PathBuf>,
    /// Write what was healed into the archive itself
    ///
    /// A journal beside the archive, `.NAME.vmfold-repair`, first gets all that is to be written. A repair that is
    /// killed is ended by the next one. A disk that loses sectors is better left alone: use --to.
    #[arg(long)]
    pub(super) in_place: bool,
    /// Only say what would heal
    #[arg(
        long,
        short = 'n',
        long_help = "Only say what would heal\n\nAll of it is computed and proved. Nothing is written."
    )]
    pub(super) dry_run: bool,
    /// Take what parity cannot heal from this other copy of the archive
    ///
    /// It may be damaged too, and have fewer or other commits at its end. Records are found in it by their hashes, and proved
    /// by them.
    #[arg(long, value_name = "SECOND_COPY")]
    pub(super) from: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(super) struct Diff {
    /// Archive file, or a backup that another program made
    ///
    /// It is read from a file only. A backup is compared with --pool or --backup.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// A commit; the one before the last, or with --pool the last, if not said
    ///
    /// It is given by its number, its label, or its name. `latest` is the last one, `previous` the one before.
    #[arg(value_name = "COMMIT")]
    pub(super) first: Option<String>,
    /// The commit to compare it with; the last if not said
    ///
    /// It is given as the first one is.
    #[arg(value_name = "COMMIT", conflicts_with = "pool")]
    pub(super) second: Option<String>,
    /// Compare with images on disk: the paths that were exported
    ///
    /// The images are read and compared by hash. Names are compared relative to the folder that is named.
    #[arg(long, value_name = "PATH", num_args = 1..)]
    pub(super) pool: Vec<PathBuf>,
    /// Compare with a backup that another program made
    ///
    /// Images are compared that have the same name in both: those that `list` shows. All of the backup is read.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["pool", "second"])]
    pub(super) backup: Option<PathBuf>,
    #[command(flatten)]
    pub(super) access: Access,
}

#[derive(Debug, clap::Args)]
pub(super) struct Access {
    #[command(flatten)]
    pub(super) keys: KeyArgs,
    /// Memory for deriving the keys of a backup of Qubes OS, on all cores together; 1 GiB, or half of what is available
    ///
    /// Each part of 100 MiB has a key of its own, which takes as much memory as the host had to spare that made the
    /// backup: up to an eighth of its memory. A backup that asks for more than this is refused. With more of it, keys of
    /// several parts are derived at once.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) kdf_memory: Option<u64>,
    /// Backing file of a qcow2 image; may be given more than once
    ///
    /// A qcow2 image that was made on top of another leaves parts of its disk to that one, its backing file, and names
    /// it. Such a name is shown and never followed, since whoever made the image chose it. Name the backing file here,
    /// and by another --backing what that one was made on top of. It is a regular file and no link, qcow2 or raw, as the
    /// image says of it. If the image does not say, it is qcow2 if it begins as one, and raw otherwise.
    #[arg(long, value_name = "FILE")]
    pub(super) backing: Vec<PathBuf>,
    /// Take the file for a raw image, compressed or not, whatever it begins with
    ///
    /// What a file is, its first bytes tell, and those of a raw image are its guest's. With this option they do not count.
    /// It also takes a raw image that is not compressed, which otherwise only a pool has.
    #[arg(long)]
    pub(super) raw: bool,
}

#[derive(Debug, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "one for each switch")]
pub(super) struct Import {
    /// Archive file, or a backup that another program made; `-` for standard input
    ///
    /// A pipe is read once and in order. Backups are those of Qubes OS (qvm-backup in version 4, of R4.0 and later, and in
    /// version 3, of R2 to R3.2, which protects neither names nor order of its parts), archives of Proxmox VE (.vma), tar
    /// archives and compressed raw images. All of them may be compressed by gzip, bzip2, xz, zstd, lz4 or lzop. Machines
    /// of Qubes OS are named as in a pool: `appvms/work/private.img`. Sparse files of a tar archive are read in every
    /// form, and its links that lead to files; owners and modes are not taken over. What a backup is shows in its content,
    /// whatever its name. It is read once: what it takes is known at the end, and a dry run reads all of it. If the disk
    /// is too small for it, the images that came whole before are restored, and the exit code is 1; of a backup that is
    /// compressed as a whole none are, because its checksum comes last. An image has the name of its volume, as far as a
    /// file can have it: a control character, or a byte that is no UTF-8, becomes `%` and two hexadecimal digits, and a
    /// name of more than 255 bytes is cut, which is said. It is readable by its owner alone, and belongs to who restores
    /// it. Of a compressed raw image, nothing tells how long it should be: if it was compressed in several parts and some
    /// are missing, what is there is restored.
    ///
    /// A disk in a file of qcow2, VDI, VHD, VHDX or VMDK becomes a raw one, `NAME.img`, which shares the clusters of that
    /// file if both are on one filesystem. A VMDK stream and an OVA may also come through a pipe or compressed. Internal snapshots of a qcow2 image become revisions of it, `NAME.img.N@TIME`, numbered in the
    /// order of their time; what they are called is said. The memory of a machine in a snapshot is left out.
    #[arg(value_name = "ARCHIVE")]
    pub(super) archive: PathBuf,
    /// Images to restore, by pattern or folder; all if none is named
    ///
    /// The names are those that `list` shows. A folder stands for everything in it. Of an image
    /// with several names, those are restored that match.
    #[arg(value_name = "GLOB")]
    pub(super) only: Vec<String>,
    /// Folder to restore to; it is made if it does not exist
    ///
    /// Nothing is written outside it, whatever names an archive holds. On the way to it, no link is followed that another
    /// user can have put there. While an import runs, it keeps its blocks in `.vmfold-import-…` in this folder. Images can
    /// share blocks on btrfs and on XFS with reflinks; elsewhere they become plain sparse files.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["qubes", "skeleton"])]
    pub(super) to: Option<PathBuf>,
    #[command(flatten)]
    pub(super) qubes: ImportQubes,
    /// Which commit: its number, label or name; the last if not said
    ///
    /// A commit is named by the first hexadecimal digits of its hash, four at least. `latest` is the last one,
    /// `previous` the one before, which only a file has: a pipe is read once.
    #[arg(long, value_name = "COMMIT")]
    pub(super) commit: Option<String>,
    /// Images, and folders of images, on the same filesystem, to share blocks with; may be given more than once
    ///
    /// What they have in common with what is restored is shared instead of written. Each block is proved by its hash,
    /// before and after. Without this option, images serve that the index knows because `scan`, `reclaim` or `export`
    /// has seen them: those of the subvolume that is restored to, or of the whole XFS, whose images are then looked for
    /// by name.
    #[arg(long, value_name = "PATH")]
    pub(super) seed: Vec<PathBuf>,
    /// Put images in the place of existing ones
    ///
    /// All of them are replaced or none, once all are complete and on disk. An image that anyone has open is not
    /// replaced, nor is any other then. The same holds if the kernel cannot tell whether it is open: it cannot be read,
    /// or it is leased.
    #[arg(long)]
    pub(super) replace: bool,
    /// Go on with an import that was interrupted
    ///
    /// Only what its journal proves to be unchanged since then is not made anew. What is read in order, which is a pipe or
    /// a backup of another program, is read again as a whole.
    #[arg(long)]
    pub(super) resume: bool,
    /// Restore what is intact of a damaged archive
    ///
    /// It lists what is not. What is left of a damaged image becomes a file `NAME.vmfold-partial`.
    #[arg(long)]
    pub(super) partial: bool,
    /// Only say what would be done
    ///
    /// It says how much would be written, how much is on this disk already, and how much space that takes at most. It
    /// writes nothing to the folder.
    #[arg(long, short = 'n')]
    pub(super) dry_run: bool,
    /// Restore images as revisions of Qubes OS, with the next free number
    ///
    /// `private.img` becomes `private.img.N@TIME`, which `qvm-volume revert` accepts; the names are told, and the commands
    /// that go back to them. Without a GLOB, revisions that the archive has are left out. It works beside a machine
    /// that has only a `-dirty.img`.
    #[arg(long)]
    pub(super) as_revision: bool,
    /// Take owners by number even where their names are known here
    ///
    /// Without it, an owner and a group are looked up by name first.
    #[arg(long)]
    pub(super) numeric_owner: bool,
    /// Restore what can give privileges: set-user-ID, set-group-ID and sticky bits, attributes of security.* and
    /// trusted.*
    ///
    /// Without it only permissions, attributes of user.*, access control lists and `nodatacow` come back, and what is
    /// left out is said. Labels (`security.selinux`) are left out without a word: the policy of this host gives them.
    /// Users and groups in access control lists are numbers. Where there can be no such list, or the group cannot be
    /// restored, the group gets less, never more. Images that are `nodatacow` share blocks with each other, and with
    /// nothing that has checksums.
    #[arg(long)]
    pub(super) preserve_special: bool,
    /// Space on the disk that the import may take at most; all that is free but 16 MiB, if not said
    ///
    /// It counts the distinct blocks that are written. An archive that needs more is refused before anything is written.
    /// Of a backup that is read once, the images that came whole before are restored, and the exit code is 1.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) work_space: Option<u64>,
    /// Compress what is written: `zstd`, on btrfs
    ///
    /// Each distinct block is compressed once, by btrfs and at its own level, and images share the compressed extents.
    /// What does not fit as it is may fit then: the import begins, and if the disk is too small after all, it ends before
    /// the disk is full. What is shared with images on the disk stays as it is. `reclaim --compress` compresses those.
    #[arg(long, value_name = "HOW", value_parser = ["zstd"])]
    pub(super) compress: Option<String>,
    #[command(flatten)]
    pub(super) access: Access,
    /// Folder for the index, which is only a cache
    ///
    /// The index knows which images on this disk may have blocks in common with what is restored.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    pub(super) index: PathBuf,
    /// Memory for tables of blocks, and as much again for lists; 32 MiB, and 48 MiB more for each TiB of extents, if
    /// not said
    ///
    /// The extents are those of the seeds.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(super) memory: Option<u64>,
}

#[derive(Debug, clap::Args)]
pub(super) struct ImportQubes {
    /// Restore a backup of Qubes OS into the machines of the Qubes OS that runs here, in dom0
    ///
    /// The machines are made first: see --skeleton. They must be shut down. A pattern without a slash chooses them by
    /// name, such as `work`; one with a slash chooses images by path. Images are restored to `.vmfold-qubes-…` in the
    /// pool, and each then becomes the volume of its machine by way of the daemon of Qubes OS: it shares what it has in
    /// common with the others, and with --seed. If anyone has written to one of the volumes, nothing is done. With
    /// --replace such a volume is replaced, if its machine is named without wildcards; what it held becomes a revision
    /// if it keeps any. While a machine is filled, it has the tag `backup-restore-in-progress`, with which Qubes OS does
    /// not start it. Running the same again goes on with what was stopped. It takes a file-reflink pool, and root.
    #[arg(long, conflicts_with_all = ["to", "commit", "partial", "as_revision"])]
    pub(super) qubes: bool,
    /// Write a backup without images to this new file, of which qvm-backup-restore makes the machines
    ///
    /// It holds what the backup has beside images: properties, firewall rules and notes, as they are, protected by the
    /// same passphrase; of a template in version 3 only properties. The command that makes the machines of it is
    /// printed. They have blank volumes, which --qubes fills. Nothing else is written, and no root is needed.
    #[arg(long, value_name = "FILE", requires = "qubes", conflicts_with_all = ["dry_run", "renamed"])]
    pub(super) skeleton: Option<PathBuf>,
    /// Restore the machine OLD of the backup into the machine NEW; may be given more than once
    ///
    /// `qvm-backup-restore --rename-conflicting` gives a machine another name if there is one of its name.
    #[arg(long = "as", value_name = "OLD=NEW", requires = "qubes", value_parser = parse_renaming)]
    pub(super) renamed: Vec<(String, String)>,
    /// Folder of the sockets of qubesd
    ///
    /// It is for tests.
    #[arg(long, value_name = "DIR", hide = true, requires = "qubes", default_value = SOCKETS)]
    pub(super) qubesd_socket: PathBuf,
}

/// Parses the value of `--as`.
fn parse_renaming(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((old, new)) if !old.is_empty() && !new.is_empty() => Ok((old.to_owned(), new.to_owned())),
        _ => Err("it is the name in the backup, `=`, and the name here".into()),
    }
}

/// The value of `--compress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CompressionArg {
    None,
    Zstd(i32),
}

/// Parses the value of `--compress`.
fn parse_compression(text: &str) -> std::result::Result<CompressionArg, String> {
    match text.split_once(':') {
        None if text == "none" => Ok(CompressionArg::None),
        None if text == "zstd" => Ok(CompressionArg::Zstd(3)),
        Some(("zstd", level)) => match level.parse() {
            Ok(level @ 1..=19) => Ok(CompressionArg::Zstd(level)),
            _ => Err("levels of zstd are 1 to 19".into()),
        },
        _ => Err("it is `zstd`, `zstd:LEVEL` or `none`".into()),
    }
}

/// Parses the value of `--revisions`.
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
    ///
    /// It has one folder for each filesystem, named by its UUID.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    pub(super) index: PathBuf,
}

#[derive(Debug, clap::Args)]
pub(super) struct Man {
    /// Folder for the pages, such as `/usr/local/share/man/man1`
    ///
    /// It has to exist.
    #[arg(value_name = "FOLDER")]
    pub(super) folder: PathBuf,
}

/// Parses a size. As in other tools that count blocks, `16K` and `16k` mean 16 KiB.
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
    fn every_command_and_option_has_a_long_help() {
        let command = <Args as clap::CommandFactory>::command();
        let mut short = Vec::new();
        for command in std::iter::once(&command).chain(command.get_subcommands()) {
            if command.get_long_about().is_none() {
                short.push(command.get_name().to_owned());
            }
            let arguments = command
                .get_arguments()
                .filter(|argument| argument.get_long_help().is_none());
            short.extend(arguments.map(|argument| format!("{} {}", command.get_name(), argument.get_id())));
        }
        assert!(short.is_empty(), "{short:?}");
    }

    #[test]
    fn compression_has_a_level() {
        for (text, parsed) in [
            ("zstd", Some(CompressionArg::Zstd(3))),
            ("zstd:15", Some(CompressionArg::Zstd(15))),
            ("none", Some(CompressionArg::None)),
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
