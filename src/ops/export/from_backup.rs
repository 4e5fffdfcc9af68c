//! Exports a backup that another program made, as a commit of its own.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::images::{Summarizer, put_images};
use super::{check_label, commit_of, to_place};
use crate::archive::manifest::PlanPart;
use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{Hash, LaneId};
use crate::block::{BLOCK_BYTES, bytes};
use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::exec::export::RecordWriter;
use crate::exec::export::backup::{BackupSettings, store_backup};
use crate::exec::hashes::StoredHashes;
use crate::exec::restore::backup::{BackupOptions, BackupSource, EarlierBlocks, NoEarlierBlocks};
use crate::fingerprint::FingerprintFunction;
use crate::foreign;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::ops::open_archive::{OpenArchive, Sealing, held};
use crate::ops::{ArchivePlace, BackupAccess, is_backup, open_backup, runs_budget};
use crate::plan::restore::chooser;
use crate::range;
use crate::report::Exported;
use crate::spill::SpillVec;
use crate::store::{FileStore, InputPipe, PeekedStore, Store};

/// Which backup is exported, where to, and how.
#[derive(Debug, Clone)]
pub struct BackupExportOptions {
    /// The backup.
    pub from: ArchivePlace,
    /// Patterns that choose its images. If it is empty, all are exported.
    pub only: Vec<String>,
    /// The archive, as in [`super::ExportOptions`].
    pub archive: ArchivePlace,
    /// The compression level of zstd.
    pub level: i32,
    /// Whether what the archive holds is referred to without being read first.
    pub trusts_archive: bool,
    /// The label of the commit. If it is empty, the backup's own name is taken, or that of its file.
    pub label: String,
    /// Parity, as in [`super::ExportOptions`].
    pub parity: Option<u8>,
    /// The folder for files that hold what memory does not.
    pub folder: PathBuf,
    /// How the backup is opened.
    pub access: BackupAccess,
    /// How the archive is sealed.
    pub sealing: Sealing,
}

/// Exports a backup.
///
/// # Errors
/// [`Error::DamagedBackup`] and [`Error::RefusedBackup`]; [`Error::Usage`] if it is no backup, or if none of its images is chosen; those of
/// [`super::export()`]. Whatever the error, the archive keeps the commits it had, and a file is no longer than before.
pub fn export_backup(options: &BackupExportOptions, monitor: &dyn Monitor) -> Result<Exported> {
    check_label(&options.label)?;
    match &options.from {
        ArchivePlace::File(path) => {
            let store = FileStore::open(path)?;
            let time = store.modified().map_err(Error::io("look at", path))?;
            export_from(&store, Some(time), options, monitor)
        }
        ArchivePlace::Pipe => {
            let pipe = InputPipe::new(monitor).map_err(Error::io("read", Path::new("stdin")))?;
            export_from(&pipe, None, options, monitor)
        }
    }
}

/// Exports the backup that a store holds, which was last written at `time`.
fn export_from(
    store: &dyn Store,
    time: Option<FileTime>,
    options: &BackupExportOptions,
    monitor: &dyn Monitor,
) -> Result<Exported> {
    let peeked = PeekedStore::new(store).map_err(|error| {
        if monitor.interrupted() {
            Error::Interrupted
        } else {
            Error::io("read", store.path())(error)
        }
    })?;
    if !is_backup(&peeked, &options.access)? {
        return Err(Error::RefusedBackup {
            path: store.path().to_owned(),
            problem: "it is no backup of another program".into(),
        });
    }
    // Asks for the passphrase, and looks at the header, before the archive is made.
    let backing = options.access.open_backing()?;
    let backup = open_backup(&peeked, &backing, &options.access, false, monitor)?;
    let run = |open: &mut dyn FnMut() -> Result<Arc<dyn Store>>| {
        let mut opened = OpenArchive::new(open()?, &options.sealing)?;
        let exporter = BackupExporter {
            options,
            path: store.path(),
            time,
            monitor,
        };
        let result = exporter.run(backup, &mut opened);
        if result.is_err() {
            opened.undo(monitor);
        }
        result
    };
    to_place(&options.archive, run, monitor)
}

/// One export of a backup.
struct BackupExporter<'a> {
    options: &'a BackupExportOptions,
    /// The path of the backup.
    path: &'a Path,
    /// When its file was last written.
    time: Option<FileTime>,
    monitor: &'a dyn Monitor,
}

impl<'a> BackupExporter<'a> {
    /// Writes all records, and commits.
    fn run(&self, backup: Box<dyn foreign::Backup + 'a>, opened: &mut OpenArchive) -> Result<Exported> {
        let path = opened.store.path().to_owned();
        let failed = |error: std::io::Error| Error::io("write to", &path)(error);
        let base = opened.base;
        let budget = runs_budget(Some(&self.options.folder));
        let mut writer = opened.begin_epoch(self.options.parity, &budget, self.monitor)?;
        let mut records = RecordWriter {
            writer: &mut writer,
            failed: &failed,
        };
        let options = BackupOptions {
            takes: Box::new(chooser(&self.options.only)?),
            partial: false,
            id: LaneId::default(),
            folder: self.options.folder.clone(),
            budget,
            earlier: self.earlier(opened),
            hasher: opened.hasher(),
        };
        let mut source = BackupSource::new(backup, self.path, options, self.monitor);
        source.find_earlier()?;
        let settings = BackupSettings {
            first_new: base.store_end,
            function: function_of(opened),
            level: self.options.level,
            hasher: opened.hasher(),
        };
        let contents = store_backup(&mut source, settings, &mut records, self.monitor)?;
        let images = &contents.manifest.images;
        if images.is_empty() {
            return Err(Error::Usage("no image of this backup matches".into()));
        }
        self.monitor.phase("Committing", 0);
        let archived: Vec<_> = images.iter().map(|one| one.image.clone()).collect();
        let runs_of = |place: usize| copy_of(&images[place].runs);
        let none = BTreeSet::new();
        put_images(PlanPart::Final, (&[], &archived), &none, runs_of, &mut records)?;
        let hasher = opened.hasher();
        let old_hashes = StoredHashes::new(opened.last(), base.store_end);
        let summarizer = Summarizer::new(source.new_hashes(), old_hashes, &path, (&hasher, self.monitor));
        let (summaries, uses) = summarizer.all(&archived, &none, runs_of)?;
        let listed = opened.listed(uses);
        let mut commit = commit_of(self.label(&source), self.root(), source.new_hashes().end());
        commit.time = source.origin().time.or(self.time).unwrap_or(commit.time);
        let (new_base, committed) = writer.finish(commit, listed, &summaries).map_err(failed)?;
        drop(source);
        opened.committed(new_base, &committed, self.monitor);
        let parity = opened.protect(&mut writer, self.monitor);
        let data_bytes = summaries.iter().map(|image| image.data_blocks * BLOCK_BYTES).sum();
        Ok(Exported {
            archive: path,
            commit: committed.commit.number,
            id: committed.id(),
            images: summaries.len() as u64,
            logical_bytes: summaries.iter().map(|image| image.size).sum(),
            data_bytes,
            read_bytes: data_bytes,
            known_bytes: 0,
            new_bytes: bytes(new_base.store_end - base.store_end),
            written_bytes: opened.base.length - base.length,
            corrected_bytes: 0,
            archive_bytes: opened.base.length,
            parity_bytes: writer.parity_bytes(),
            skipped: Vec::new(),
            failed: parity.err(),
        })
    }

    /// The blocks of the archive that the backup's are looked for among.
    fn earlier<'o>(&self, opened: &'o OpenArchive) -> Box<dyn EarlierBlocks + 'o>
    where
        'a: 'o,
    {
        match opened.last() {
            None => Box::new(NoEarlierBlocks),
            Some((archive, last)) => Box::new(ArchivedBlocks {
                archive,
                last,
                hashes: RefCell::new(StoredHashes::new(Some((archive, last)), last.commit.store_end)),
                is_trusted: opened.is_trusted(self.options.trusts_archive),
                checked: RefCell::default(),
                monitor: self.monitor,
            }),
        }
    }

    /// What the commit tells as the place of its images: the backup.
    fn root(&self) -> PathBuf {
        let whole = std::path::absolute(self.path).ok().filter(|_| self.time.is_some());
        whole.unwrap_or_else(|| self.path.to_owned())
    }

    /// The label of the commit: the one that was named, or the backup's own name, or that of its file.
    fn label(&self, source: &BackupSource<'_>) -> String {
        if !self.options.label.is_empty() {
            return self.options.label.clone();
        }
        let file_name = || {
            let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            check_label(&name).is_ok().then_some(name)
        };
        source.origin().name.or_else(file_name).unwrap_or_default()
    }
}

/// The function of the fingerprints that the archive has, so that later exports of images find all of its blocks.
fn function_of(opened: &OpenArchive) -> FingerprintFunction {
    let known = opened.last().and_then(|(archive, last)| archive.announced(last).ok());
    let first = known.as_ref().and_then(|announced| announced.first());
    first.map_or(FingerprintFunction::Crc32c, |announced| announced.function)
}

fn copy_of<T: Copy>(items: &SpillVec<T>) -> SpillVec<T> {
    let mut copy = SpillVec::with_capacity_in(items.len(), items.budget());
    items.iter().for_each(|item| copy.push(*item));
    copy
}

/// The blocks of an archive. A PACK is read, once, before anything refers to its blocks, unless the archive is trusted.
struct ArchivedBlocks<'a> {
    archive: &'a Archive,
    last: &'a Committed,
    hashes: RefCell<StoredHashes<'a>>,
    is_trusted: bool,
    /// PACKs that were read, by their first blocks.
    checked: RefCell<BTreeMap<StoreBlock, CheckedPack>>,
    monitor: &'a dyn Monitor,
}

/// What was found of the blocks of a PACK.
struct CheckedPack {
    end: StoreBlock,
    /// The blocks that it or another PACK holds, a list.
    held: Vec<Range<StoreBlock>>,
}

impl EarlierBlocks for ArchivedBlocks<'_> {
    fn end(&self) -> StoreBlock {
        self.last.commit.store_end
    }

    fn hashes(&self, first: StoreBlock, blocks: u32) -> Result<Vec<Option<Hash>>> {
        self.hashes.borrow_mut().read(first, blocks)
    }

    fn is_intact(&self, block: StoreBlock) -> Result<bool> {
        if self.is_trusted {
            return Ok(true);
        }
        let mut checked = self.checked.borrow_mut();
        let is_held = |pack: &CheckedPack| !range::overlap(&pack.held, block..block + 1).is_empty();
        if let Some((_, pack)) = checked.range(..=block).next_back()
            && block < pack.end
        {
            return Ok(is_held(pack));
        }
        let packs = self.archive.packs(self.last, block..block + 1);
        let Some(first) = packs.iter().map(|pack| pack.location.first).min() else {
            return Ok(false);
        };
        let end = packs.iter().map(|pack| pack.location.end()).max().unwrap_or(first);
        let range = first..end;
        let held = held(self.archive, self.last, &[range], self.monitor)?;
        let pack = CheckedPack { end, held };
        let is_held = is_held(&pack);
        checked.insert(first, pack);
        Ok(is_held)
    }
}
