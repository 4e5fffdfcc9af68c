// What fuzzers and the runs in `tests/fuzz.rs` have in common: everything that reads bytes of others, and what must hold whatever these are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmfold::archive::attributes;
use vmfold::archive::commit::{Commit, decode_tail};
use vmfold::archive::head::Head;
use vmfold::archive::keys::Unlock;
use vmfold::archive::list::{self, ImageSummary, Listed};
use vmfold::archive::manifest;
use vmfold::archive::parity::geometry_in;
use vmfold::archive::reader::Archive;
use vmfold::archive::record::{BlockHasher, HEADER_BYTES, Hash, LaneId, RecordHeader};
use vmfold::archive::stream::{Stream, StreamEvent};
use vmfold::archive::{index, pack};
use vmfold::block::BLOCK_LEN;
use vmfold::codec::Decoder;
use vmfold::error::{Error, ErrorKind, describe};
use vmfold::exec::hashes::Digest;
use vmfold::exec::restore::RestoreOptions;
use vmfold::fingerprint::FingerprintFunction;
use vmfold::index::MemoryIndex;
use vmfold::monitor::Silent;
use vmfold::numbers::StoreBlock;
use vmfold::ops::diff::{ComparedWith, diff};
use vmfold::ops::export::{ExportOptions, Revisions, Sealing, export_on};
use vmfold::ops::import::{ImportOptions, import_from, import_in_order};
use vmfold::ops::list::list_with;
use vmfold::ops::verify::{verify_sealed, verify_store};
use vmfold::ops::{ArchivePlace, BackupAccess, OpenPool, Scope};
use vmfold::report::{Change, Imported, Verified};
use vmfold::spill::Budget;
use vmfold::store::{MemoryStore, Store};
use vmfold::testing::simulated::{BlockContent, INCOMPRESSIBLE, PLAIN, Simulated};

/// Bytes that a verb may take in all for an archive of some KiB: a record of the greatest size, decoded, and what it is made into.
const LIMIT_BYTES: usize = 256 << 20;
/// What a verb may take at most for an archive of some KiB.
const LIMIT_TIME: Duration = Duration::from_secs(20);
/// Images that are larger are not read again.
const COMPARED_BYTES_MAX: u64 = 64 << 20;
/// Images are not restored where they have more data than this.
const DATA_BYTES_MAX: u64 = 64 << 20;

/// Gives the bytes to every decoder.
pub(crate) fn decoders(bytes: &[u8]) {
    if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let _ = RecordHeader::decode(header);
    }
    let _ = Head::decode(bytes);
    if let Ok(plan) = manifest::PlanRecord::decode(bytes) {
        let _ = plan.announced();
        images(plan.content());
    }
    images(Decoder::new(bytes));
    let _ = attributes::decode(&mut Decoder::new(bytes), &mut 0);
    for first in [None, Some(StoreBlock(u32::MAX))] {
        if let Ok(table) = pack::decode_table(bytes, bytes.len() as u64, first) {
            let _ = pack::check_padding(bytes, &table);
            for frame in table.frames {
                let _ = frame.slice(bytes).and_then(|stored| frame.decode(stored));
            }
        }
    }
    let _ = index::decode(bytes);
    if let Some((geometry, _)) = geometry_in(bytes) {
        geometry.layouts(96);
    }
    let _ = Commit::decode(bytes);
    let _ = decode_tail(bytes);
    let _ = list::add_any(&mut Listed::default(), &mut Vec::new(), bytes, LaneId([1; 16]));
}

fn images(content: Decoder<'_>) {
    let mut builder = manifest::ManifestBuilder::new(&Budget::default());
    if builder.add(content).is_ok() {
        let _ = builder.finish();
    }
}

/// Reads bytes as a stream of records.
pub(crate) fn stream(bytes: &[u8]) {
    let mut stream = Stream::new(bytes, 0);
    while let Ok(Some(event)) = stream.next_event() {
        if matches!(event, StreamEvent::Unsupported(_)) {
            return;
        }
    }
}

/// What a verb does with an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Verb {
    /// Opens it, and reads what its commits say.
    Read,
    /// `list`.
    List,
    /// `verify`.
    Verify,
    /// `diff`.
    Diff,
    /// `import` from a file.
    Import,
    /// `import` from a pipe.
    Pipe,
    /// `export` that appends.
    Export,
}

/// Files by their paths.
pub(crate) type Files = BTreeMap<PathBuf, Vec<u8>>;

/// What is done with archives, and what is known of them.
pub(crate) struct Harness<'a> {
    /// A folder that is on no disk.
    pub(crate) folder: &'a Path,
    /// What commits hold that are what was written, by their ids.
    pub(crate) genuine: HashMap<String, Files>,
    /// Returns the most memory that was taken since it was asked last.
    pub(crate) peak_bytes: &'a dyn Fn() -> usize,
    /// How often each verb was run, how often it succeeded, and the longest time it took.
    pub(crate) counts: BTreeMap<Verb, (u64, u64, Duration)>,
    /// What opens archives, if they are sealed.
    pub(crate) unlock: Option<Arc<dyn Unlock>>,
    /// What hashes blocks in these archives.
    pub(crate) hasher: BlockHasher,
    /// What is wrong with the archive that is worked on.
    problems: Vec<String>,
    pool: Pool,
}

/// Images that are exported.
struct Pool {
    fs: Simulated,
    index: MemoryIndex,
    files: Files,
}

/// What a commit says of its images.
struct Promised {
    id: String,
    summaries: Vec<ImageSummary>,
    /// The image of each name, by its place among the summaries.
    names: BTreeMap<PathBuf, Option<usize>>,
    is_salvaged: bool,
    has_all_lists: bool,
}

fn scope(folder: &Path) -> Scope {
    Scope {
        paths: vec![folder.join("to")],
        exclude: Vec::new(),
        index: folder.join("index"),
        memory_bytes: Some(1 << 20),
    }
}

impl Pool {
    fn new(own_from: BlockContent) -> Self {
        let fs = Simulated::default();
        for number in 0..3u64 {
            let common = (1..60).map(|n| INCOMPRESSIBLE + n);
            let own = (0..20).map(|n| own_from + 100 * number + n);
            let content: Vec<BlockContent> = common.chain(own).chain([0; 4]).chain(1..9).collect();
            let image = fs.add_image(true, 100);
            for (first, part) in (0u32..).step_by(32).zip(content.chunks(32)) {
                let extent = fs.allocate(PLAIN, part.to_vec());
                fs.map(image, first, extent, 0, u32::try_from(part.len()).unwrap(), false);
            }
        }
        Self {
            fs,
            index: MemoryIndex::default(),
            files: Files::new(),
        }
    }

    fn export(
        &self,
        store: Arc<dyn Store>,
        folder: &Path,
        unlock: Option<Arc<dyn Unlock>>,
    ) -> Result<vmfold::report::Exported, Error> {
        let options = ExportOptions {
            sealing: Sealing {
                unlock,
                ..Sealing::default()
            },
            scope: scope(folder),
            only: Vec::new(),
            revisions: Revisions::All,
            archive: ArchivePlace::Pipe,
            level: 1,
            trusts_archive: false,
            label: String::new(),
            parity: None,
        };
        let pool = OpenPool::new(&self.fs, Some(self.index.open(FingerprintFunction::Crc32c)));
        export_on(pool, &options, store, &Silent::default())
    }
}

/// An archive of two commits of simulated images.
pub(crate) fn simulated_archive(folder: &Path) -> Vec<u8> {
    let store = Arc::new(MemoryStore::default());
    for own_from in [5000, 6000] {
        Pool::new(own_from).export(store.clone(), folder, None).unwrap();
    }
    store.to_vec()
}

impl<'a> Harness<'a> {
    /// Makes a harness. Archives, and the folders that are restored to, lie in a folder.
    pub(crate) fn new(folder: &'a Path, peak_bytes: &'a dyn Fn() -> usize) -> Self {
        let mut harness = Self {
            folder,
            genuine: HashMap::new(),
            peak_bytes,
            counts: BTreeMap::new(),
            unlock: None,
            hasher: BlockHasher::default(),
            problems: Vec::new(),
            pool: Pool::new(6000),
        };
        let store = Arc::new(MemoryStore::default());
        harness.pool.export(store.clone(), folder, None).unwrap();
        let imported = import_from(store, &harness.options(None, false), &Silent::default()).unwrap();
        assert!(imported.lost.is_empty());
        harness.pool.files = harness.take_files();
        harness
    }

    /// Notes what the commits of an archive hold that is what was written.
    pub(crate) fn trust(&mut self, bytes: &[u8]) {
        let store = || Arc::new(MemoryStore::of(bytes.to_vec()));
        let Ok(archive) = Archive::open_with(store(), self.access().keys()) else {
            return;
        };
        for committed in archive.commits() {
            let options = self.options(Some(committed.id()), false);
            let imported = match import_from(store(), &options, &Silent::default()) {
                // Some golden archives are there to be refused.
                Err(Error::Unsupported { .. }) => continue,
                imported => imported.unwrap(),
            };
            assert!(imported.lost.is_empty());
            let files = self.take_files();
            self.genuine.insert(committed.id(), files);
        }
    }

    /// Does everything with an archive that the verbs say, and returns what is wrong with what came of it.
    pub(crate) fn check(&mut self, bytes: &[u8], verbs: &[Verb]) -> Vec<String> {
        self.problems.clear();
        let path = self.folder.join("a.vmfold");
        std::fs::write(&path, bytes).unwrap();
        let has = |verb| verbs.contains(&verb);
        let mut promised = Vec::new();
        if has(Verb::Read) || has(Verb::Import) || has(Verb::Pipe) {
            promised = self.read(bytes).unwrap_or_default();
        }
        let store = || Arc::new(MemoryStore::of(bytes.to_vec()));
        if has(Verb::List) {
            for commit in [None, Some("1"), Some("latest"), Some("previous")] {
                let keys = self.access().keys();
                self.run(Verb::List, || list_with(&path, commit, keys));
            }
        }
        let mut verified = None;
        if has(Verb::Verify) || has(Verb::Import) || has(Verb::Export) {
            verified = self.verify(store());
            if self.unlock.is_some() {
                self.run(Verb::Verify, || verify_store(store(), &Silent::default()));
            }
        }
        let is_intact = verified.as_ref().is_some_and(is_intact);
        if has(Verb::Import) {
            self.import(bytes, &promised, is_intact);
        }
        if has(Verb::Pipe) {
            for partial in [false, true] {
                let options = self.options(None, partial);
                let done = self.run(Verb::Pipe, || import_in_order(&*store(), &options, &Silent::default()));
                self.check_restored("pipe", done.as_ref(), &promised, partial);
            }
        }
        if has(Verb::Diff) {
            for (first, second) in [(None, Some("1")), (Some("1"), None), (Some("previous"), None)] {
                let with = ComparedWith::Commit(second.map(str::to_owned));
                let access = self.access();
                self.run(Verb::Diff, || diff(&path, first, &with, &access, &Silent::default()));
            }
        }
        if has(Verb::Export) {
            self.export(bytes, is_intact);
        }
        std::mem::take(&mut self.problems)
    }

    fn access(&self) -> BackupAccess {
        BackupAccess {
            unlock: self.unlock.clone(),
            ..BackupAccess::default()
        }
    }

    fn verify(&mut self, store: Arc<dyn Store>) -> Option<Verified> {
        let keys = self.access().keys();
        self.run(Verb::Verify, || verify_sealed(store, keys, &Silent::default()))
    }

    fn options(&self, commit: Option<String>, partial: bool) -> ImportOptions {
        ImportOptions {
            commit,
            access: self.access(),
            ..import_options(&self.folder.join("to"), self.folder, partial)
        }
    }

    /// Runs something, and notes a panic, too much time or memory, and an error of a kind that says nothing of the archive.
    fn run<T>(&mut self, verb: Verb, call: impl FnOnce() -> Result<T, Error>) -> Option<T> {
        (self.peak_bytes)();
        let begun = Instant::now();
        let done = catch_unwind(AssertUnwindSafe(call));
        let (took, bytes) = (begun.elapsed(), (self.peak_bytes)());
        let count = self.counts.entry(verb).or_default();
        count.0 += 1;
        count.2 = count.2.max(took);
        if took > LIMIT_TIME {
            self.problems.push(format!("{verb:?} took {took:?}"));
        }
        if bytes > LIMIT_BYTES {
            self.problems.push(format!("{verb:?} took {bytes} bytes"));
        }
        match done {
            Ok(Ok(done)) => {
                self.counts.entry(verb).or_default().1 += 1;
                Some(done)
            }
            Ok(Err(error)) => {
                let is_allowed = match error.kind() {
                    ErrorKind::Damaged | ErrorKind::Refused | ErrorKind::Usage => true,
                    ErrorKind::NoSpace | ErrorKind::InUse => matches!(verb, Verb::Import | Verb::Pipe),
                    // What it would write is more than a reader takes.
                    ErrorKind::Io => verb == Verb::Export && describe(&error).contains("the archive "),
                    ErrorKind::Busy | ErrorKind::Interrupted => false,
                };
                if !is_allowed {
                    self.problems
                        .push(format!("{verb:?}: {:?}: {}", error.kind(), describe(&error)));
                }
                None
            }
            Err(_) => {
                self.problems.push(format!("{verb:?} panicked"));
                None
            }
        }
    }

    /// Reads what commits say, and all frames.
    fn read(&mut self, bytes: &[u8]) -> Option<Vec<Promised>> {
        let store = Arc::new(MemoryStore::of(bytes.to_vec()));
        let mut promised = Vec::new();
        let keys = self.access().keys();
        let read = || {
            let mut archive = Archive::open_any_with(store, keys)?;
            archive.salvage()?;
            for committed in archive.commits() {
                let (summaries, lost_lists) = archive.images(committed)?;
                let manifest = archive.manifest(committed, &Budget::default());
                let _ = archive.announced(committed);
                for pack in archive.packs(committed, StoreBlock(0)..committed.commit.store_end) {
                    for located in archive.frames(&pack.location).unwrap_or_default() {
                        let _ = archive.frame(&located);
                    }
                }
                let images = manifest.map(|(manifest, _)| manifest.images).unwrap_or_default();
                let place_of = |path: &Path| summaries.iter().position(|summary| summary.path == path);
                let names = images.iter().flat_map(|image| {
                    let place = place_of(image.image.path());
                    image.image.names.iter().map(move |name| (name.clone(), place))
                });
                promised.push(Promised {
                    id: committed.id(),
                    names: names.collect(),
                    summaries,
                    is_salvaged: committed.salvaged,
                    has_all_lists: lost_lists.is_empty(),
                });
            }
            let _ = archive.ends_in_leftovers_only();
            Ok(())
        };
        self.run(Verb::Read, read)?;
        Some(promised)
    }

    /// Restores each commit from a file.
    fn import(&mut self, bytes: &[u8], promised: &[Promised], is_intact: bool) {
        let store = || Arc::new(MemoryStore::of(bytes.to_vec()));
        let mut commits: Vec<Option<String>> = vec![None];
        let whole = promised.iter().filter(|one| !one.is_salvaged);
        commits.extend(whole.map(|one| Some(one.id.clone())).take(5));
        for commit in commits {
            for partial in [false, true] {
                if partial && commit.is_some() {
                    continue;
                }
                let mut options = self.options(commit.clone(), partial);
                options.dry_run = true;
                let planned = self.run(Verb::Import, || import_from(store(), &options, &Silent::default()));
                if planned.is_some_and(|planned| planned.planned.data_bytes > DATA_BYTES_MAX) {
                    continue;
                }
                options.dry_run = false;
                let done = self.run(Verb::Import, || {
                    let done = import_from(store(), &options, &Silent::default());
                    match &done {
                        Err(error) if is_intact && !excuses(error) => Err(Error::Index {
                            path: PathBuf::from("intact"),
                            problem: describe(error),
                        }),
                        _ => done,
                    }
                });
                if let Some(done) = done.as_ref().filter(|done| is_intact && !done.lost.is_empty()) {
                    self.problems.push(format!(
                        "{commit:?}: verify says that it is intact, and import lost {:?}",
                        done.lost
                    ));
                }
                if let Some(done) = done.as_ref().filter(|done| !partial && done.done.is_some()) {
                    let (path, with) = (self.folder.join("a.vmfold"), ComparedWith::Pool(scope(self.folder)));
                    let access = self.access();
                    let compared = self.run(Verb::Diff, || {
                        diff(&path, Some(&done.id), &with, &access, &Silent::default())
                    });
                    let images = compared.map(|compared| compared.images).unwrap_or_default();
                    for image in images.iter().filter(|image| image.change == Change::Differs) {
                        self.problems.push(format!("what was restored differs: {image:?}"));
                    }
                }
                self.check_restored("file", done.as_ref(), promised, partial);
            }
        }
    }

    /// Checks that what was restored is what the commit promises, and removes it.
    fn check_restored(&mut self, from: &str, done: Option<&Imported>, promised: &[Promised], partial: bool) {
        let files = self.take_files();
        let hasher = self.hasher.clone();
        let mut note = |problem: String| self.problems.push(format!("{from}, partial {partial}: {problem}"));
        let Some(done) = done else {
            if !files.is_empty() {
                note(format!("it failed and left {:?}", files.keys()));
            }
            return;
        };
        if done.done.is_none() && !files.is_empty() {
            note(format!("{:?} lost, and it left {:?}", done.lost, files.keys()));
        }
        let partials: BTreeSet<&PathBuf> = done.lost.iter().filter_map(|lost| lost.restored_as.as_ref()).collect();
        let one = promised.iter().find(|one| one.id == done.id);
        if let Some(one) = one.filter(|one| !one.is_salvaged) {
            for (name, content) in files.iter().filter(|(name, _)| !partials.contains(name)) {
                let named = one.names.get(name).copied().flatten();
                let place = named.or_else(|| one.summaries.iter().position(|summary| summary.path == *name));
                let summary = place.map(|place| &one.summaries[place]);
                match summary {
                    // Where a LIST is lost, what the PLANs say counts. Other names of an image only PLANs have.
                    None if (partial && !one.has_all_lists) || one.names.is_empty() => {}
                    None => note(format!("{} lists no `{}`", done.id, name.display())),
                    Some(summary) if content.is_empty() && summary.size > 0 => {}
                    // What a hostile archive has in the last block behind the image's end is in the digest, and is not restored.
                    Some(summary)
                        if !content.len().is_multiple_of(BLOCK_LEN) && summary.size == content.len() as u64 => {}
                    Some(summary)
                        if summary.digest != digest_of(content, &hasher) || summary.size != content.len() as u64 =>
                    {
                        note(format!("{}: `{}` is not what its digest says", done.id, name.display()));
                    }
                    Some(_) => {}
                }
            }
            let all = one.summaries.iter().map(|summary| &summary.path);
            let missing =
                all.filter(|path| !files.contains_key(*path) && !done.lost.iter().any(|lost| lost.path == **path));
            for path in missing.filter(|_| done.done.is_some()) {
                note(format!("{}: nothing was said of `{}`", done.id, path.display()));
            }
        }
        let Some(genuine) = self.genuine.get(&done.id) else {
            return;
        };
        let lost_of = |name: &PathBuf| done.lost.iter().find(|lost| lost.restored_as.as_ref() == Some(name));
        for (name, content) in &files {
            let lost = lost_of(name);
            let Some(right) = genuine.get(lost.map_or(name, |lost| &lost.path)) else {
                note(format!("{} never held `{}`", done.id, name.display()));
                continue;
            };
            let is_lost = |at: u64| {
                let mut ranges = lost.iter().flat_map(|lost| &lost.ranges);
                ranges.any(|range| range.start <= at && at < range.start + range.length)
            };
            let mut pairs = (0u64..).zip(content.iter().zip(right));
            let wrong = pairs.find(|(at, (found, right))| found != right && !(**found == 0 && is_lost(*at)));
            if content.len() != right.len() || wrong.is_some() {
                note(format!("{}: `{}` has a wrong byte: {wrong:?}", done.id, name.display()));
            }
        }
        if done.done.is_some() && !partial && files.len() != genuine.len() {
            note(format!("{}: {:?} are not all of its files", done.id, files.keys()));
        }
    }

    /// Appends to the archive.
    fn export(&mut self, bytes: &[u8], was_intact: bool) {
        let store = Arc::new(MemoryStore::of(bytes.to_vec()));
        let before = self.problems.len();
        let pool = std::mem::replace(&mut self.pool, Pool::new(0));
        let folder = self.folder;
        let unlock = self.unlock.clone();
        let done = self.run(Verb::Export, || pool.export(store.clone(), folder, unlock));
        self.pool = pool;
        let after = store.to_vec();
        let Some(done) = done else {
            if !bytes.starts_with(&after) {
                self.problems.push("an export that failed changed the archive".into());
            }
            return;
        };
        let store = || Arc::new(MemoryStore::of(after.clone()));
        let verified = self.verify(store());
        if was_intact && !verified.as_ref().is_some_and(is_intact) {
            self.problems
                .push(format!("it is not intact after an export: {verified:?}"));
        }
        let options = self.options(Some(done.id.clone()), false);
        let imported = self.run(Verb::Import, || import_from(store(), &options, &Silent::default()));
        let files = self.take_files();
        match imported {
            Some(imported) if imported.lost.is_empty() && files == self.pool.files => {}
            other => self
                .problems
                .push(format!("what was exported is not restored: {other:?}")),
        }
        if self.problems.len() > before {
            let _ = std::fs::write(self.folder.join("exported.vmfold"), &after);
        }
    }

    /// Removes what was restored, and returns it. Files that are too large are returned as empty ones.
    fn take_files(&self) -> Files {
        let to = self.folder.join("to");
        let entries = walkdir::WalkDir::new(&to).into_iter().filter_map(Result::ok);
        let files = entries.filter(|entry| entry.file_type().is_file());
        let files = files.filter_map(|entry| {
            let name = entry.path().strip_prefix(&to).ok()?.to_owned();
            // What an import that failed keeps.
            if name.to_string_lossy().starts_with(".vmfold-import-") {
                return None;
            }
            let is_small = entry
                .metadata()
                .is_ok_and(|metadata| metadata.len() <= COMPARED_BYTES_MAX);
            Some((
                name,
                if is_small {
                    std::fs::read(entry.path()).ok()?
                } else {
                    Vec::new()
                },
            ))
        });
        let files = files.collect();
        let _ = std::fs::remove_dir_all(&to);
        files
    }
}

/// Options for an import of the last commit.
pub(crate) fn import_options(to: &Path, folder: &Path, partial: bool) -> ImportOptions {
    ImportOptions {
        archive: ArchivePlace::Pipe,
        commit: None,
        restore: RestoreOptions {
            to: to.to_owned(),
            partial,
            ..RestoreOptions::default()
        },
        seeds: Vec::new(),
        index: folder.join("index"),
        memory_bytes: Some(1 << 20),
        dry_run: false,
        access: BackupAccess::default(),
    }
}

fn is_intact(verified: &Verified) -> bool {
    verified.damage.is_empty() && verified.lost.is_empty()
}

/// Whether an intact archive may fail in this way all the same: the disk is too small, or names cannot be given here.
fn excuses(error: &Error) -> bool {
    let is_empty = matches!(error, Error::Usage(problem) if problem.starts_with("no image"));
    is_empty
        || matches!(error.kind(), ErrorKind::NoSpace | ErrorKind::InUse)
        || matches!(error, Error::NoSuchCommit { .. })
}

/// The digest of a file, by the words of the format.
fn digest_of(content: &[u8], hasher: &BlockHasher) -> Hash {
    let monitor = Silent::default();
    let mut digest = Digest::new(&monitor);
    let mut block = [0; BLOCK_LEN];
    for part in content.chunks(BLOCK_LEN) {
        block.fill(0);
        block[..part.len()].copy_from_slice(part);
        digest.update(&[hasher.of(&block)]).unwrap();
    }
    digest.finish(content.len() as u64)
}

/// Opens bytes as an archive, made right as far as that can be told, and checks everything that is done with it.
pub(crate) fn archive(bytes: &[u8], folder: &Path) {
    let sealed = vmfold::testing::raw_archive::RawArchive::read(bytes).sealed();
    let mut harness = Harness::new(folder, &|| 0);
    for bytes in [bytes, &sealed] {
        let problems = harness.check(bytes, &ALL);
        assert!(problems.is_empty(), "{problems:?}");
    }
}

/// All verbs.
pub(crate) const ALL: [Verb; 7] = [
    Verb::Read,
    Verb::List,
    Verb::Verify,
    Verb::Diff,
    Verb::Import,
    Verb::Pipe,
    Verb::Export,
];
