//! `export`: images and revisions into an archive, each distinct block once.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::{Prepared, Scope, discover, prepare_found, root_of};
use crate::archive::commit::{Commit, CommitLocation, Summary};
use crate::archive::head::Head;
use crate::archive::manifest::{self, Entry, Folder, Image, PART_BLOCKS, PART_CORRECTIONS, PART_IMAGES, Payloads};
use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{HEADER_BYTES, MAGIC};
use crate::archive::writer::{Base, Sink, Writer};
use crate::block::{BLOCK_BYTES, SlotSet, bytes};
use crate::content::{Content, Run, StoreBlock, push_run};
use crate::error::{Error, Result};
use crate::exec::hashes::{HashLog, StoredHashes, digest};
use crate::exec::store::{How, Out, Stored, announce, store};
use crate::fs::attributes;
use crate::fs::volume::{Purpose, checksum_digests};
use crate::index::Index;
use crate::monitor::Monitor;
use crate::plan::export::{self, ExportPlan, Piece, Source, plan_export};
use crate::pool::{Found, Named, Revision, patterns, revision_of};
use crate::report::Exported;
use crate::spill::SpillVec;
use crate::sys::beneath;

/// Which revisions to export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revisions {
    /// All.
    All,
    /// So many of each image, the newest.
    Newest(usize),
    /// Revisions and nothing else.
    Only,
}

/// Where an archive is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A file, new or an archive to append to.
    File(PathBuf),
    /// Standard output.
    Pipe,
}

/// What to export, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// What to look at.
    pub scope: Scope,
    /// Patterns of images to choose; none means all.
    pub only: Vec<String>,
    /// Which revisions.
    pub revisions: Revisions,
    /// Where to.
    pub target: Target,
    /// Compression level of zstd.
    pub level: i32,
    /// What the commit is called.
    pub label: String,
}

/// Exports a pool.
///
/// # Errors
/// Those of reading and writing; [`Error::ChangedMeanwhile`] if an image changed. Whatever the error, the archive has the commits
/// it had before, and no more bytes.
pub fn export(options: &Options, monitor: &dyn Monitor) -> Result<Exported> {
    let mut found = discover(&options.scope, monitor)?;
    let root = root_of(&found.named);
    found.images = choose(found.images, options, &root)?;
    if found.images.is_empty() && found.skipped.is_empty() {
        return Err(Error::NoImages {
            paths: options.scope.paths.clone(),
        });
    }
    let mut opened = Opened::new(&options.target)?;
    let names: BTreeMap<PathBuf, BTreeSet<PathBuf>> = found
        .images
        .iter()
        .map(|image| (image.path.clone(), image.names.clone()))
        .collect();
    let named = found.named.clone();
    let run = || {
        let prepared = prepare_found(&options.scope, found, Purpose::Read, false, monitor)?;
        if monitor.interrupted() {
            return Err(Error::Interrupted);
        }
        let exporter = Exporter {
            options,
            prepared: &prepared,
            root: &root,
            named: &named,
            names: &names,
            monitor,
        };
        exporter.run(&mut opened)
    };
    let done = run();
    if done.is_err() {
        opened.undo(monitor);
    }
    done
}

/// The images that the options choose.
fn choose(images: Vec<Found>, options: &Options, root: &Path) -> Result<Vec<Found>> {
    let only = patterns(&options.only)?;
    let relative = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_owned();
    let mut chosen = images;
    if !options.only.is_empty() {
        chosen.retain(|image| {
            image
                .names
                .iter()
                .any(|name| only.is_match(relative(name)) || only.is_match(name))
        });
    }
    let mut newest: BTreeMap<PathBuf, Vec<(Option<u64>, String, PathBuf)>> = BTreeMap::new();
    for image in &chosen {
        if let Some(Revision {
            image: of,
            number,
            time,
        }) = revision_of(&image.path)
        {
            newest.entry(of).or_default().push((number, time, image.path.clone()));
        }
    }
    let kept: BTreeSet<PathBuf> = newest
        .into_values()
        .flat_map(|mut revisions| {
            revisions.sort();
            let count = match options.revisions {
                Revisions::Newest(count) => count.min(revisions.len()),
                Revisions::All | Revisions::Only => revisions.len(),
            };
            revisions.split_off(revisions.len() - count)
        })
        .map(|(_, _, path)| path)
        .collect();
    chosen.retain(|image| match revision_of(&image.path) {
        Some(_) => kept.contains(&image.path),
        None => options.revisions != Revisions::Only,
    });
    Ok(chosen)
}

/// The archive that is written to.
struct Opened {
    target: Target,
    archive: Option<Archive>,
    base: Base,
    sink: Option<Sink>,
    /// Kept for its lock, and to cut off what an export that failed wrote.
    file: Option<OpenFile>,
}

impl Opened {
    fn new(target: &Target) -> Result<Self> {
        let base = Base {
            archive: random()?,
            ..Base::default()
        };
        let mut opened = Self {
            target: target.clone(),
            archive: None,
            base,
            sink: None,
            file: None,
        };
        let Target::File(path) = target else {
            opened.sink = Some(Sink::Pipe(standard_output()?));
            return Ok(opened);
        };
        let file = OpenFile::open(path)?;
        match file.file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(Error::Usage(format!(
                    "another vmfold is writing to `{}`",
                    crate::shown::shown(path)
                )));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(Error::io("lock", path)(error)),
        }
        let length = file.file.metadata().map_err(Error::io("look at", path))?.len();
        let is_torn = is_torn_beginning(&file.file, length).map_err(Error::io("read", path))?;
        if is_torn {
            file.file.set_len(0).map_err(Error::io("write to", path))?;
        } else if length > 0 {
            let same = file.file.try_clone().map_err(Error::io("open", path))?;
            let found = Archive::in_file(same, path)?;
            if !found.head().may_append() {
                return Err(Error::Unsupported {
                    path: path.clone(),
                    problem: "it was made by another version, which cuts chunks in another way or knows more features",
                });
            }
            opened.base = found.base();
            if opened.base.length < found.length() {
                if !found.ends_in_leftovers_only()? {
                    let length = found.length() - opened.base.length;
                    let problem = "what follows its last intact commit is not just an export that did not end";
                    return Err(Error::damaged(path, opened.base.length, length, problem));
                }
                file.file
                    .set_len(opened.base.length)
                    .map_err(Error::io("write to", path))?;
            }
            opened.archive = (!found.commits().is_empty()).then_some(found);
        }
        let mut writes = file.file.try_clone().map_err(Error::io("open", path))?;
        writes
            .seek(SeekFrom::Start(opened.base.length))
            .map_err(Error::io("write to", path))?;
        opened.sink = Some(Sink::File(writes));
        opened.file = Some(file);
        Ok(opened)
    }

    fn path(&self) -> &Path {
        match &self.target {
            Target::File(path) => path,
            Target::Pipe => Path::new("stdout"),
        }
    }

    /// Takes back what was written: nothing of it counts without a commit.
    fn undo(&self, monitor: &dyn Monitor) {
        let Some(file) = &self.file else { return };
        let undone = if file.is_new {
            file.remove()
        } else {
            file.file.set_len(self.base.length)
        };
        if let Err(error) = undone {
            monitor.note(&format!("What was written so far could not be taken back: {error}"));
        }
    }
}

/// An archive's file, and where it has its name. What it holds is for who runs vmfold alone.
struct OpenFile {
    file: File,
    folder: beneath::Folder,
    name: OsString,
    is_new: bool,
}

impl OpenFile {
    /// Makes the file, or opens the one that is there, if that is no trap: it is a regular file, and was not put there by another user,
    /// who would read along.
    fn open(path: &Path) -> Result<Self> {
        /// Links followed to the file.
        const LINKS_MAX: u32 = 8;
        let mut at = path.to_owned();
        for _ in 0..LINKS_MAX {
            let name = at.file_name().ok_or_else(|| not_an_archive(path))?.to_owned();
            let parent = at.parent().filter(|parent| !parent.as_os_str().is_empty());
            let parent = parent.unwrap_or(Path::new("."));
            let folder = beneath::Folder::open(parent).map_err(Error::io("open", parent))?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            match rustix::fs::openat(&folder, &name, flags, Mode::RUSR | Mode::WUSR) {
                Ok(file) => {
                    return Ok(Self {
                        file: file.into(),
                        folder,
                        name,
                        is_new: true,
                    });
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(Error::io("make", path)(errno)),
            }
            let failed = |errno: Errno| Error::io("open", path)(errno);
            // What it is, is looked at before it is opened: to open a device can do something.
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let there = rustix::fs::openat(&folder, &name, flags, Mode::empty()).map_err(failed)?;
            let stat = rustix::fs::fstat(&there).map_err(failed)?;
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => {
                    refuse_if_of_another(&folder, &stat, path)?;
                    let file = beneath::reopen(&there, OFlags::RDWR | OFlags::NONBLOCK).map_err(failed)?;
                    return Ok(Self {
                        file,
                        folder,
                        name,
                        is_new: false,
                    });
                }
                FileType::Symlink => {
                    refuse_if_of_another(&folder, &stat, path)?;
                    let link = rustix::fs::readlinkat(&there, "", Vec::new()).map_err(failed)?;
                    at = parent.join(OsStr::from_bytes(link.to_bytes()));
                }
                _ => return Err(not_an_archive(path)),
            }
        }
        Err(Error::io("open", path)(Errno::LOOP))
    }

    /// Whether the file still has its name: else it is gone, or soon will be.
    fn has_its_name(&self) -> rustix::io::Result<bool> {
        let (stat, mine) = (self.folder.stat(&self.name)?, rustix::fs::fstat(&self.file)?);
        Ok((stat.st_dev, stat.st_ino) == (mine.st_dev, mine.st_ino))
    }

    /// Makes its name durable, and says where it has lost it.
    fn settle(&self, path: &Path) -> Result<()> {
        rustix::fs::fsync(&self.folder).map_err(Error::io("sync the folder of", path))?;
        match self.has_its_name() {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::io("find again", path)(Errno::STALE)),
            Err(errno) => Err(Error::io("find again", path)(errno)),
        }
    }

    fn remove(&self) -> std::io::Result<()> {
        if self.has_its_name()? {
            rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty())?;
        }
        Ok(())
    }
}

fn not_an_archive(path: &Path) -> Error {
    Error::NotAnArchive { path: path.to_owned() }
}

/// Refuses a file or link that neither the user of this process nor root made, in a folder where others can put one. Filesystems that
/// keep no owners, or have them from another host, cannot tell.
fn refuse_if_of_another(folder: &beneath::Folder, stat: &rustix::fs::Stat, path: &Path) -> Result<()> {
    /// vfat, exfat, ntfs3, cifs, smb2, nfs, 9p, fuse (linux/magic.h).
    const WITHOUT_OWNERS: [i64; 8] = [
        0x4d44,
        0x2011_bab0,
        0x7366_746e,
        0xff53_4d42,
        0xfe53_4d42,
        0x6969,
        0x0102_1997,
        0x6573_5546,
    ];
    let failed = Error::io("look at the folder of", path);
    let is_mine = |uid: u32| uid == 0 || uid == rustix::process::geteuid().as_raw();
    if is_mine(stat.st_uid) {
        return Ok(());
    }
    let of_folder = rustix::fs::fstat(folder).map_err(failed)?;
    let others_write = Mode::from_raw_mode(of_folder.st_mode).intersects(Mode::WGRP | Mode::WOTH);
    let magic = rustix::fs::fstatfs(folder).map_or(0, |found| found.f_type);
    if (is_mine(of_folder.st_uid) && !others_write) || WITHOUT_OWNERS.contains(&magic) {
        return Ok(());
    }
    Err(Error::OfAnother {
        path: path.to_owned(),
        uid: stat.st_uid,
    })
}

/// Whether a file is nothing but the beginning of the first record of an archive: what an export leaves that was killed at once.
fn is_torn_beginning(file: &File, length: u64) -> std::io::Result<bool> {
    let whole = HEADER_BYTES as u64 + Head::current().encode().len() as u64;
    if length == 0 || length >= whole {
        return Ok(false);
    }
    let mut start = [0; MAGIC.len()];
    let count = MAGIC.len().min(usize::try_from(length).unwrap_or(MAGIC.len()));
    std::os::unix::fs::FileExt::read_exact_at(file, &mut start[..count], 0)?;
    Ok(MAGIC.starts_with(&start[..count]))
}

/// A copy of the descriptor of standard output.
fn standard_output() -> Result<File> {
    let failed = Error::io("write to", Path::new("stdout"));
    rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 0)
        .map(File::from)
        .map_err(failed)
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())
            .map_err(Error::io("get random bytes from", Path::new("/dev/urandom")))?;
    }
    Ok(bytes)
}

struct Exporter<'a> {
    options: &'a Options,
    prepared: &'a Prepared,
    root: &'a Path,
    named: &'a [Named],
    names: &'a BTreeMap<PathBuf, BTreeSet<PathBuf>>,
    monitor: &'a dyn Monitor,
}

impl Exporter<'_> {
    fn run(&self, opened: &mut Opened) -> Result<Exported> {
        let (fs, facts) = (&self.prepared.fs, &self.prepared.facts);
        let path = opened.path().to_owned();
        let failed = |error: std::io::Error| Error::io("write to", &path)(error);
        let index = self.prepared.index.as_ref().filter(|_| opened.file.is_some());
        let digests = match index {
            Some(_) => checksum_digests(fs, facts)?,
            None => SpillVec::new(),
        };
        let plan = self.plan(opened, index, &digests)?;
        let first_new = plan.first_new;
        let (folders, images) = self.images()?;
        let sink = opened.sink.take().ok_or(Error::Interrupted)?;
        let epoch = u64::from_le_bytes(random()?);
        let mut writer = Writer::begin(sink, opened.base, epoch).map_err(failed)?;
        let mut out = Out {
            writer: &mut writer,
            failed: &failed,
        };
        let runs_of = |place: usize, pieces: &[Piece]| {
            let number = u32::try_from(place).unwrap_or(u32::MAX);
            export::runs_of(facts, pieces, number, images[place].blocks())
        };
        put_images(&folders, &images, |place| runs_of(place, &plan.pieces), &mut out)?;
        announce(
            fs.function(),
            plan.first_new,
            &plan.chunks,
            |first, blocks| plan.fingerprints.range(first..first + blocks),
            &mut out,
        )?;
        let old = |archive| StoredHashes::new(archive, first_new);
        let archive = opened.archive.as_ref();
        let log = HashLog::new(first_new, self.options.scope.index.clone());
        let stored = store(
            (fs, facts),
            &plan,
            self.how(),
            (old(archive), log),
            &mut out,
            self.monitor,
        )?;
        facts
            .fingerprints
            .check()
            .map_err(Error::io("use the file of fingerprints in", &self.options.scope.index))?;
        self.check_unchanged()?;
        let pieces = corrected(&plan, &stored.corrections);
        self.put_corrections(&stored, &mut out)?;
        self.monitor.phase("Committing", 0);
        let summaries = summaries(
            &images,
            |place| {
                let mut runs = runs_of(place, &pieces);
                if let Some((_, block)) = stored.inline.iter().find(|(image, _)| *image as usize == place) {
                    replace_first(&mut runs, *block);
                }
                runs
            },
            &stored.hashes,
            (&mut old(archive), &path),
            self.monitor,
        )?;
        let store_end = stored.hashes.end();
        let commit = self.commit(summaries, store_end);
        let before = opened.base;
        let (base, commit) = writer.finish(commit).map_err(failed)?;
        let committed = Committed {
            commit,
            location: base.last,
            salvaged: false,
        };
        // From here on the archive has the commit, whatever comes.
        opened.base = base;
        if let Some(file) = &mut opened.file {
            file.is_new = false;
            file.settle(&path)?;
        }
        if let Some(index) = index.filter(|index| index.is_usable()) {
            let known = pieces.iter().map(|piece| (piece.known(), piece.source.is_read()));
            let remembered = index.remember_stored(&base.archive, &committed, facts, &digests, known);
            if let Err(error) = remembered {
                self.monitor.note(&crate::error::describe(&error));
            }
        }
        Ok(self.exported(path, &committed, (before, base), &plan, &stored))
    }

    fn exported(
        &self,
        path: PathBuf,
        committed: &Committed,
        (before, after): (Base, Base),
        plan: &ExportPlan,
        stored: &Stored,
    ) -> Exported {
        let images = &committed.commit.images;
        let known = plan.pieces.iter().filter(|piece| !piece.source.is_read());
        Exported {
            archive: path,
            commit: committed.commit.number,
            id: committed.id(),
            images: images.len() as u64,
            logical_bytes: images.iter().map(|image| image.size).sum(),
            data_bytes: images.iter().map(|image| image.data_blocks * BLOCK_BYTES).sum(),
            read_bytes: stored.read_bytes,
            known_bytes: known.map(|piece| bytes(piece.blocks)).sum(),
            new_bytes: bytes(after.store_end - before.store_end),
            written_bytes: after.length - before.length,
            corrected_bytes: stored.corrections.len() as u64 * BLOCK_BYTES,
            archive_bytes: after.length,
            skipped: self.prepared.skipped.clone(),
        }
    }

    /// Which blocks are new to the archive.
    fn plan(&self, opened: &Opened, index: Option<&Index>, digests: &[Option<u128>]) -> Result<ExportPlan> {
        let (fs, facts) = (&self.prepared.fs, &self.prepared.facts);
        self.monitor.phase("Planning", 0);
        let known = match (index, &opened.archive) {
            (Some(index), Some(archive)) => index
                .stored(&archive.id(), archive.commits(), facts, digests)
                .unwrap_or_else(|error| {
                    // It is only a cache: then everything is read.
                    self.monitor.note(&crate::error::describe(&error));
                    SpillVec::new()
                }),
            _ => SpillVec::new(),
        };
        let first_new = opened.base.store_end;
        let room = first_new.checked_add(facts.slots()).ok_or(Error::TooLarge)?;
        let mut fingerprints = facts.fingerprints.alike(room as usize);
        if let Some(archive) = &opened.archive {
            for committed in archive.commits() {
                let usable = archive.announced(committed)?.into_iter();
                for announced in usable.filter(|one| one.function == fs.function() && one.end() <= first_new) {
                    fingerprints.write(announced.first, &announced.fingerprints);
                }
            }
        }
        plan_export(facts, &known, first_new, fingerprints).ok_or(Error::TooLarge)
    }

    fn how(&self) -> How<'_> {
        How {
            function: self.prepared.fs.function(),
            level: self.options.level,
            inline: &self.prepared.inline,
        }
    }

    /// A commit of these images; its writer adds the rest.
    fn commit(&self, images: Vec<Summary>, store_end: StoreBlock) -> Commit {
        Commit {
            number: 0,
            time: now(),
            label: self.options.label.clone(),
            root: self.root.to_owned(),
            previous: CommitLocation::default(),
            store_end,
            images,
            records: Vec::new(),
        }
    }

    fn check_unchanged(&self) -> Result<()> {
        let images = self.prepared.fs.images().iter();
        let changed: Vec<PathBuf> = images
            .filter(|image| !image.may_touch() || !image.is_unchanged())
            .map(|image| image.path.clone())
            .collect();
        match changed.len() {
            0 => Ok(()),
            _ => Err(Error::ChangedMeanwhile { paths: changed }),
        }
    }

    /// The images of the pool as the archive will have them, and the folders they lie in.
    fn images(&self) -> Result<(Vec<Folder>, Vec<Image>)> {
        let relative = |path: &Path| path.strip_prefix(self.root).unwrap_or(path).to_owned();
        let (mut folders, mut images) = (BTreeSet::new(), Vec::new());
        for (number, image) in (0u32..).zip(self.prepared.fs.images()) {
            let names = self.names.get(&image.path).cloned().unwrap_or_default();
            for name in &names {
                let path = relative(name);
                if !manifest::is_safe(path.as_os_str().as_bytes()) {
                    return Err(Error::Usage(format!(
                        "`{}` has too long a name",
                        crate::shown::shown(name)
                    )));
                }
                folders.extend(
                    path.ancestors()
                        .skip(1)
                        .filter(|folder| folder.parent().is_some())
                        .map(Path::to_owned),
                );
            }
            let metadata = attributes::read(image.file(), &image.path)?;
            let attributes: usize = metadata
                .xattrs
                .iter()
                .map(|(name, value)| name.len() + value.len())
                .sum();
            let names_bytes: usize = names.iter().map(|name| name.as_os_str().len()).sum();
            if attributes + names_bytes > manifest::ENTRY_BYTES_MAX / 2 {
                return Err(Error::Usage(format!(
                    "`{}` has more names or attributes than an archive can hold",
                    crate::shown::shown(&image.path)
                )));
            }
            images.push(Image {
                number,
                names: names.iter().map(|name| relative(name)).collect(),
                size: image.size,
                metadata,
            });
        }
        let folders = folders.into_iter().map(|path| {
            let full = self.root.join(&path);
            let folder = self.folder(&full).map_err(Error::io("open", &full))?;
            let metadata = attributes::read(&folder, &full)?;
            Ok(Folder { path, metadata })
        });
        Ok((folders.collect::<Result<_>>()?, images))
    }

    /// Opens a folder that images lie in: through what was named, for whoever owns a folder below can put a link in its place.
    fn folder(&self, full: &Path) -> rustix::io::Result<beneath::Folder> {
        let below = |one: &Named| Some(one.folder.folder(full.strip_prefix(&one.root).ok()?));
        match self.named.iter().find_map(below) {
            Some(opened) => opened,
            // It lies between what several that were named have in common and one of them.
            None => beneath::Folder::open(self.root)?.folder(full.strip_prefix(self.root).unwrap_or(full)),
        }
    }

    /// Writes what turned out otherwise than planned; a record without entries if nothing did.
    fn put_corrections(&self, stored: &Stored, out: &mut Out<'_>) -> Result<()> {
        let facts = &self.prepared.facts;
        let mut payloads = Payloads::default();
        if !stored.corrections.is_empty() {
            let slots: BTreeMap<u32, &Piece> = stored.corrections.iter().map(|piece| (piece.slot, piece)).collect();
            let images = 0..u32::try_from(self.prepared.fs.images().len()).unwrap_or(u32::MAX);
            let mappings = images.flat_map(|image| facts.mappings_of(image).into_iter().map(move |one| (image, one)));
            for (image, mapping) in mappings.filter(|(_, mapping)| !mapping.preallocated) {
                for (slot, piece) in slots.range(mapping.slots()) {
                    payloads.push(&Entry::Runs {
                        image,
                        first_block: mapping.file_block + (slot - mapping.slot),
                        runs: vec![Run {
                            blocks: 1,
                            content: piece.content_at(*slot),
                        }],
                    });
                }
            }
        }
        for (image, block) in &stored.inline {
            let content = block.map_or(Content::Zeros, Content::Stored);
            payloads.push(&Entry::Runs {
                image: *image,
                first_block: 0,
                runs: vec![Run { blocks: 1, content }],
            });
        }
        put_payloads(PART_CORRECTIONS, payloads, out)
    }
}

fn put_images(folders: &[Folder], images: &[Image], runs: impl Fn(usize) -> Vec<Run>, out: &mut Out<'_>) -> Result<()> {
    let mut payloads = Payloads::default();
    for folder in folders {
        payloads.push(&Entry::Folder(folder.clone()));
    }
    let mut count = 0;
    for (place, image) in images.iter().enumerate() {
        let runs = runs(place);
        count += runs.len();
        if count > manifest::RUNS_MAX / 2 {
            return Err(Error::Usage(
                "the images are too fragmented for one commit: export them in several".into(),
            ));
        }
        payloads.push(&Entry::Image(image.clone()));
        payloads.push(&Entry::Runs {
            image: image.number,
            first_block: 0,
            runs,
        });
    }
    put_payloads(PART_IMAGES, payloads, out)
}

fn put_payloads(part: u8, payloads: Payloads, out: &mut Out<'_>) -> Result<()> {
    let mut payloads = payloads.finish();
    if payloads.is_empty() {
        payloads.push(Vec::new());
    }
    let count = payloads.len();
    for (n, payload) in (1..).zip(payloads) {
        out.put_plan(part, n == count, (0, 0), &payload)?;
    }
    debug_assert_ne!(part, PART_BLOCKS);
    Ok(())
}

/// The plan's pieces with what turned out otherwise.
fn corrected(plan: &ExportPlan, corrections: &[Piece]) -> SpillVec<Piece> {
    let mut corrections = corrections.iter().peekable();
    let mut pieces = SpillVec::with_capacity(plan.pieces.len());
    for piece in &plan.pieces {
        let mut at = piece.slot;
        let part = |from: u32, to: u32| Piece {
            slot: from,
            blocks: to - from,
            source: match (piece.source, piece.content_at(from)) {
                (Source::Known(_), Content::Stored(first)) => Source::Known(first),
                (Source::Same(_), Content::Stored(first)) => Source::Same(first),
                (Source::New(_), Content::Stored(first)) => Source::New(first),
                (other, _) => other,
            },
        };
        while let Some(correction) = corrections.next_if(|correction| correction.slot < piece.end()) {
            if correction.slot > at {
                pieces.push(part(at, correction.slot));
            }
            pieces.push(*correction);
            at = correction.end();
        }
        if at < piece.end() {
            pieces.push(part(at, piece.end()));
        }
    }
    pieces
}

/// Makes the first block of an image what lies in its metadata.
fn replace_first(runs: &mut Vec<Run>, block: Option<StoreBlock>) {
    let content = block.map_or(Content::Zeros, Content::Stored);
    let mut replaced = vec![Run { blocks: 1, content }];
    let mut rest = runs.iter();
    if let Some(first) = rest.next() {
        push_run(
            &mut replaced,
            first.part(1.min(first.blocks), first.blocks.saturating_sub(1)),
        );
    }
    rest.for_each(|run| push_run(&mut replaced, *run));
    *runs = replaced;
}

fn summaries(
    images: &[Image],
    runs: impl Fn(usize) -> Vec<Run>,
    log: &HashLog,
    (old, archive): (&mut StoredHashes<'_>, &Path),
    monitor: &dyn Monitor,
) -> Result<Vec<Summary>> {
    /// Hashes read at a time: a run may be as long as the image.
    const PART: u32 = 1 << 16;
    let first_new = old.end();
    let mut counted = SlotSet::new((log.end() - first_new) as usize);
    let mut summaries = Vec::new();
    for (place, image) in images.iter().enumerate() {
        let (mut data, mut new) = (0u64, 0u64);
        let runs = runs(place);
        for run in &runs {
            if let Content::Stored(first) = run.content {
                data += u64::from(run.blocks);
                for block in first.max(first_new)..first + run.blocks {
                    if !counted.contains(block - first_new) {
                        counted.insert(block - first_new);
                        new += 1;
                    }
                }
            }
        }
        let digest = digest(&runs, monitor, |first, blocks, digest| {
            let before = first_new.saturating_sub(first).min(blocks);
            if !old.add_to(digest, first, before)? {
                return Err(Error::Damaged {
                    path: archive.to_owned(),
                    range: None,
                    problem: "hashes of blocks that its images refer to are lost".into(),
                });
            }
            let mut at = first + before;
            while at < first + blocks {
                let part = PART.min(first + blocks - at);
                digest.update(log.read(at, part)?.as_flattened())?;
                at += part;
            }
            Ok(())
        })?;
        summaries.push(Summary {
            path: image.path().to_owned(),
            size: image.size,
            data_blocks: data,
            new_blocks: new,
            digest,
        });
    }
    Ok(summaries)
}

fn now() -> (i64, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos())
}
