// What fuzzers and the runs in `tests/fuzz.rs` do with bytes that may be a backup of another program, and what must hold whatever these are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmfold::error::{Error, ErrorKind, Result, describe};
use vmfold::exec::restore::RestoreOptions;
use vmfold::foreign::{self, Event, Limits, OpenOptions, Passphrase};
use vmfold::keys::{GivenKeys, KeyAccess};
use vmfold::monitor::{Monitor, Silent};
use vmfold::ops::export::{BackupExportOptions, Sealing, export_backup};
use vmfold::ops::import::{ImportOptions, import};
use vmfold::ops::verify::verify_store;
use vmfold::ops::{ArchivePlace, BackupAccess, backup};
use vmfold::store::{FileStore, MemoryStore, Store};

/// What decrypts all backups here.
pub(crate) const PASSPHRASE: &[u8] = b"secret";
/// Bytes that a reader may take: a part of a backup of Qubes OS, and what a decompressor has.
const LIMIT_BYTES: usize = 192 << 20;
/// Bytes that a verb may take in all.
const VERB_LIMIT_BYTES: usize = 320 << 20;
/// What a reader may take of one core's time, and beside that, for so many bytes that it was given or has handed over. Without optimisation,
/// all takes longer.
const LIMIT_TIME: Duration = Duration::from_secs(2);
const BYTES_PER_SECOND: u64 = 20 << 20;
const SLOWNESS: u32 = if cfg!(debug_assertions) { 20 } else { 1 };
/// After this time, a reader is asked to stop, and after three times as much, the run ends.
const STOP_TIME: Duration = Duration::from_secs(20);
/// Content is kept for comparisons up to so many bytes.
const KEPT_BYTES_MAX: u64 = 64 << 20;
/// Notes of one backup, and bytes of each.
const NOTES_MAX: usize = 100;
const NOTE_BYTES_MAX: usize = 4096 * 6 + 200;

/// Limits that let readers go far, and are reached soon.
pub(crate) fn limits() -> Limits {
    Limits {
        volume_bytes: 1 << 40,
        volumes: 1 << 12,
        name_bytes: 1 << 16,
        window_bytes: 16 << 20,
        kdf_memory_bytes: Some(16 << 20),
    }
}

/// Counts what is noted, and asks to stop when it takes too long.
struct Watching {
    until: Instant,
    notes: Mutex<(usize, Option<String>)>,
}

impl Watching {
    fn new() -> Self {
        Self {
            until: Instant::now() + STOP_TIME * SLOWNESS,
            notes: Mutex::default(),
        }
    }
}

impl Monitor for Watching {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, message: &str) {
        let mut notes = self.notes.lock().unwrap();
        notes.0 += 1;
        if message.len() > NOTE_BYTES_MAX || message.chars().any(char::is_control) {
            notes.1 = Some(message.to_owned());
        }
    }
    fn interrupted(&self) -> bool {
        Instant::now() > self.until
    }
}

/// What came of a volume.
#[derive(Default)]
struct Came {
    path: PathBuf,
    size: Option<u64>,
    ended: Option<u64>,
    links: Vec<PathBuf>,
    /// Where content begins and ends.
    ranges: BTreeMap<u64, u64>,
    content: Vec<(u64, Vec<u8>)>,
}

impl Came {
    /// Notes a piece of content. Returns false if some of it came before.
    fn add(&mut self, start: u64, end: u64) -> bool {
        let before = self
            .ranges
            .range(..=start)
            .next_back()
            .map(|(start, end)| (*start, *end));
        let next = self.ranges.range(start..).next().map(|(start, _)| *start);
        if start == end {
            return true;
        }
        if before.is_some_and(|(_, before)| before > start) || next.is_some_and(|next| next < end) {
            return false;
        }
        match before {
            Some((first, before)) if before == start => self.ranges.insert(first, end),
            _ => self.ranges.insert(start, end),
        };
        true
    }

    fn end(&self) -> u64 {
        self.ranges.last_key_value().map_or(0, |(_, end)| *end)
    }

    /// All of it, if it is not too large.
    fn whole(&self) -> Option<Vec<u8>> {
        let size = self.ended.filter(|size| *size <= KEPT_BYTES_MAX)?;
        let mut whole = vec![0; usize::try_from(size).ok()?];
        for (offset, content) in &self.content {
            let at = usize::try_from(*offset).ok()?;
            whole.get_mut(at..at + content.len())?.copy_from_slice(content);
        }
        Some(whole)
    }
}

/// How a backup was read.
pub(crate) struct Read {
    /// Volumes that came whole, by all of their names. Large ones are `None`.
    pub(crate) whole: BTreeMap<PathBuf, Option<Vec<u8>>>,
    pub(crate) error: Option<Error>,
    /// Bytes that were handed over.
    pub(crate) bytes: u64,
    /// A hash of all events.
    trace: blake3::Hash,
    problems: Vec<String>,
}

/// Reads a backup to its end, and checks what is told.
fn read(store: &dyn Store, backing: &[Box<dyn Store>], limits: Limits, monitor: &dyn Monitor) -> Read {
    let mut problems = Vec::new();
    let (mut volumes, mut hasher, mut bytes): (Vec<Came>, _, u64) = (Vec::new(), blake3::Hasher::new(), 0);
    let mut proves = false;
    let result = read_events(store, backing, limits, monitor, |event, buffer, proves_each| {
        proves = proves_each;
        let mut text = String::new();
        let _ = write!(text, "{event:?}");
        hasher.update(text.as_bytes());
        if matches!(event, Event::Data { .. }) {
            hasher.update(buffer);
            bytes += buffer.len() as u64;
        }
        if let Err(problem) = take(&mut volumes, event, buffer, bytes <= KEPT_BYTES_MAX) {
            problems.push(problem);
        }
    });
    let error = result.err();
    hasher.update(
        error
            .as_ref()
            .map(|error| describe(error))
            .unwrap_or_default()
            .as_bytes(),
    );
    if bytes > limits.volume_bytes || volumes.len() > limits.volumes {
        problems.push(format!(
            "{} volumes of {bytes} bytes are more than allowed",
            volumes.len()
        ));
    }
    if error.is_none() && volumes.iter().any(|volume| volume.ended.is_none()) {
        problems.push("a volume has no end".into());
    }
    let is_kept = bytes <= KEPT_BYTES_MAX && (proves || error.is_none());
    let ended = volumes.iter().filter(|volume| volume.ended.is_some());
    let whole = ended.filter(|_| is_kept).flat_map(|volume| {
        let content = volume.whole();
        let names = [&volume.path].into_iter().chain(&volume.links);
        names.map(move |name| (name.clone(), content.clone()))
    });
    Read {
        whole: whole.collect(),
        trace: hasher.finalize(),
        error,
        bytes,
        problems,
    }
}

fn read_events(
    store: &dyn Store,
    backing: &[Box<dyn Store>],
    limits: Limits,
    monitor: &dyn Monitor,
    mut each: impl FnMut(&Event, &[u8], bool),
) -> Result<()> {
    let ask = || Ok(Passphrase::new(PASSPHRASE.to_vec()));
    let options = OpenOptions {
        limits,
        ask_passphrase: &ask,
        checks_all: false,
        is_raw: false,
        backing,
    };
    let mut backup = foreign::open(store, &options, monitor)?;
    let mut buffer = Vec::new();
    while let Some(event) = backup.next(&mut buffer)? {
        each(&event, &buffer, backup.proves_each_volume());
    }
    Ok(())
}

/// Takes an event, and says what is wrong with it.
fn take(volumes: &mut Vec<Came>, event: &Event, buffer: &[u8], keeps: bool) -> std::result::Result<(), String> {
    match event {
        Event::Volume(volume) => {
            check_path(&volume.path)?;
            volumes.push(Came {
                path: volume.path.clone(),
                size: volume.size,
                ..Came::default()
            });
        }
        Event::Link { volume, path } => {
            check_path(path)?;
            let volume = volumes.get_mut(*volume).ok_or("a link to no volume")?;
            volume.links.push(path.clone());
        }
        Event::Data { volume, offset } => {
            let volume = volumes.get_mut(*volume).ok_or("content of no volume")?;
            let end = offset.checked_add(buffer.len() as u64).ok_or("content ends nowhere")?;
            if volume.ended.is_some() || volume.size.is_some_and(|size| end > size) {
                return Err(format!(
                    "content up to {end} behind the end, {:?} {:?}",
                    volume.size, volume.ended
                ));
            }
            if !volume.add(*offset, end) {
                return Err(format!("content at {offset} comes twice"));
            }
            if keeps {
                volume.content.push((*offset, buffer.to_vec()));
            }
        }
        Event::End { volume, size } => {
            let volume = volumes.get_mut(*volume).ok_or("the end of no volume")?;
            let is_other = volume.size.is_some_and(|told| told != *size);
            if volume.ended.is_some() || volume.end() > *size || is_other {
                return Err(format!(
                    "an end at {size} that is none: {:?}, {}",
                    volume.size,
                    volume.end()
                ));
            }
            volume.ended = Some(*size);
        }
    }
    Ok(())
}

fn check_path(path: &Path) -> std::result::Result<(), String> {
    let is_safe = |component: Component<'_>| {
        let Component::Normal(name) = component else {
            return false;
        };
        let name = name.as_encoded_bytes();
        name.len() <= 255 && name[0] != b'.' && name[0] != b'-' && name.iter().all(|byte| (b' '..0x7f).contains(byte))
    };
    if path.as_os_str().is_empty() || !path.components().all(is_safe) {
        return Err(format!("the name {}", path.display().to_string().escape_debug()));
    }
    Ok(())
}

/// The time that this thread had on a core.
fn core_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let spent = text.split(' ').next().and_then(|nanoseconds| nanoseconds.parse().ok());
    Duration::from_nanos(spent.unwrap_or(0))
}

/// A backup that was changed, and what is known of it.
#[derive(Default)]
pub(crate) struct Case {
    pub(crate) bytes: Vec<u8>,
    /// The files that it lies on.
    pub(crate) backing: Vec<Vec<u8>>,
    /// What volumes hold, if whatever is told as whole must be that.
    pub(crate) expected: Option<BTreeMap<PathBuf, Vec<u8>>>,
    pub(crate) limits: Option<Limits>,
}

/// What is done with backups, and what came of it.
pub(crate) struct Backups<'a> {
    /// A folder that is on no disk.
    folder: &'a Path,
    peak_bytes: &'a dyn Fn() -> usize,
    /// How often something was done, how often that succeeded, and the longest time it took.
    pub(crate) counts: BTreeMap<String, (u64, u64, Duration)>,
    /// How the last backup ended, if not well, and how many notes there were.
    pub(crate) last_error: String,
    pub(crate) last_notes: usize,
    problems: Vec<String>,
    /// Since when something runs, in milliseconds, for the thread that ends what hangs; 0 while nothing does.
    running: Arc<AtomicU64>,
    begun: Instant,
}

impl<'a> Backups<'a> {
    pub(crate) fn new(folder: &'a Path, peak_bytes: &'a dyn Fn() -> usize) -> Self {
        std::fs::write(folder.join("passphrase"), PASSPHRASE).unwrap();
        let (running, begun) = (Arc::new(AtomicU64::new(0)), Instant::now());
        let watched = Arc::clone(&running);
        std::thread::spawn(move || {
            while Arc::strong_count(&watched) > 1 {
                std::thread::sleep(Duration::from_secs(1));
                let since = watched.load(Ordering::Relaxed);
                let now = u64::try_from(begun.elapsed().as_millis()).unwrap();
                if since > 0 && u128::from(now.saturating_sub(since)) > (STOP_TIME * 3 * SLOWNESS).as_millis() {
                    std::process::abort();
                }
            }
        });
        Self {
            folder,
            peak_bytes,
            counts: BTreeMap::new(),
            last_error: String::new(),
            last_notes: 0,
            problems: Vec::new(),
            running,
            begun,
        }
    }

    /// Runs something, and notes a panic, and too much time or memory. `bytes` tells how many bytes there were to work on.
    fn run<T>(
        &mut self,
        name: &str,
        limit_bytes: usize,
        call: impl FnOnce() -> T,
        bytes: impl Fn(&T) -> u64,
    ) -> Option<T> {
        (self.peak_bytes)();
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap();
        self.running.store(now + 1, Ordering::Relaxed);
        let begun = core_time();
        let done = catch_unwind(AssertUnwindSafe(call));
        let (took, memory) = (core_time().saturating_sub(begun), (self.peak_bytes)());
        self.running.store(0, Ordering::Relaxed);
        let count = self.counts.entry(name.to_owned()).or_default();
        count.0 += 1;
        count.2 = count.2.max(took);
        let Ok(done) = done else {
            self.problems.push(format!("{name} panicked"));
            return None;
        };
        let millis = bytes(&done).saturating_mul(1000) / BYTES_PER_SECOND;
        if took > (LIMIT_TIME + Duration::from_millis(millis)) * SLOWNESS {
            self.problems
                .push(format!("{name} took {took:?} for {} bytes", bytes(&done)));
        }
        if memory > limit_bytes {
            self.problems.push(format!("{name} took {memory} bytes of memory"));
        }
        Some(done)
    }

    /// Reads a backup, and returns what came of it with what is wrong.
    pub(crate) fn read(&mut self, format: &str, case: &Case, is_twice: bool) -> Option<Read> {
        let store = MemoryStore::of(case.bytes.clone());
        let backing: Vec<Box<dyn Store>> = case
            .backing
            .iter()
            .map(|bytes| Box::new(MemoryStore::of(bytes.clone())) as Box<dyn Store>)
            .collect();
        let limits = case.limits.unwrap_or_else(limits);
        let given = case.bytes.len() as u64;
        let monitor = Watching::new();
        let name = format!("{format} read");
        // What is kept for comparisons here is no memory of the reader.
        let kept_bytes = usize::try_from(KEPT_BYTES_MAX).unwrap();
        let read_once = || read(&store, &backing, limits, &monitor);
        let mut first = self.run(&name, LIMIT_BYTES + 3 * kept_bytes, read_once, |read| {
            read.bytes + given
        })?;
        let notes = monitor.notes.into_inner().unwrap();
        self.last_notes = notes.0;
        self.last_error = first.error.as_ref().map(|error| describe(error)).unwrap_or_default();
        if notes.0 > NOTES_MAX || notes.1.is_some() {
            self.problems.push(format!("{} notes, such as {:?}", notes.0, notes.1));
        }
        if is_twice {
            let second = read(&store, &backing, limits, &Silent::default());
            if second.trace != first.trace {
                self.problems.push("it reads differently when it is read again".into());
            }
        }
        self.problems.append(&mut first.problems);
        match &first.error {
            None => self.counts.entry(name).or_default().1 += 1,
            Some(error) if is_of_backup(error) => {
                if self.last_error.len() > NOTE_BYTES_MAX || self.last_error.chars().any(char::is_control) {
                    self.problems.push(format!("the error {:?}", self.last_error));
                }
            }
            Some(error) => self.problems.push(format!("{:?}: {}", error.kind(), describe(error))),
        }
        if let Some(expected) = &case.expected {
            for (path, content) in &first.whole {
                if content.is_some() && expected.get(path) != content.as_ref() {
                    self.problems
                        .push(format!("`{}` is told as whole, and is not", path.display()));
                }
            }
        }
        Some(first)
    }

    fn access(&self, case: &Case) -> BackupAccess {
        let backing = case.backing.iter().enumerate().map(|(number, bytes)| {
            let path = self.folder.join(format!("backing{number}"));
            std::fs::write(&path, bytes).unwrap();
            path
        });
        BackupAccess {
            given: Some(Arc::new(KeyAccess::new(GivenKeys {
                passphrase_file: Some(self.folder.join("passphrase")),
                ..GivenKeys::default()
            }))),
            limits: case.limits.unwrap_or_else(limits),
            backing: backing.collect(),
            ..BackupAccess::default()
        }
    }

    /// Does what the verbs do with a backup that was read already.
    fn verbs(&mut self, format: &str, case: &Case, read: &Read) {
        let path = self.folder.join("memory");
        std::fs::write(&path, &case.bytes).unwrap();
        let access = self.access(case);
        let work = read.bytes + case.bytes.len() as u64;
        let monitor = Watching::new();
        let list = || backup::list(&path, &access, &monitor);
        let listed = self.run(&format!("{format} list"), VERB_LIMIT_BYTES, list, |_| work);
        self.check_ended(format, "list", listed.as_ref());
        let verify = || backup::verify(&path, &access, &monitor);
        let verified = self.run(&format!("{format} verify"), VERB_LIMIT_BYTES, verify, |_| work);
        self.check_ended(format, "verify", verified.as_ref());
        if format.starts_with("qvm") {
            self.skeleton(format, case, work);
        }
        let to = self.folder.join("to");
        let options = ImportOptions {
            archive: ArchivePlace::File(path.clone()),
            commit: None,
            restore: RestoreOptions {
                to: to.clone(),
                ..RestoreOptions::default()
            },
            seeds: Vec::new(),
            index: self.folder.join("index"),
            memory_bytes: Some(1 << 20),
            dry_run: false,
            access: access.clone(),
        };
        let imported = self.run(
            &format!("{format} import"),
            VERB_LIMIT_BYTES,
            || import(&options, &monitor),
            |_| work,
        );
        self.check_ended(format, "import", imported.as_ref());
        let is_imported = imported.is_some_and(|imported| imported.is_ok());
        self.check_files(&to, read, is_imported);
        let archive = self.folder.join("exported.vmfold");
        let options = BackupExportOptions {
            sealing: Sealing::default(),
            from: ArchivePlace::File(path),
            only: Vec::new(),
            archive: ArchivePlace::File(archive.clone()),
            level: 1,
            trusts_archive: false,
            label: String::new(),
            parity: None,
            folder: self.folder.to_owned(),
            access,
        };
        let export = || export_backup(&options, &monitor);
        let exported = self.run(&format!("{format} export"), VERB_LIMIT_BYTES, export, |_| work);
        self.check_ended(format, "export", exported.as_ref());
        if exported.is_some_and(|exported| exported.is_ok()) {
            let store = FileStore::open(&archive).unwrap();
            match verify_store(Arc::new(store), &Silent::default()) {
                Ok(verified) if verified.damage.is_empty() && verified.lost.is_empty() => {}
                other => self
                    .problems
                    .push(format!("what was exported is not intact: {other:?}")),
            }
        }
        let _ = std::fs::remove_file(archive);
    }

    /// Makes a skeleton of a backup of Qubes OS, which must not be taken for a whole backup.
    fn skeleton(&mut self, format: &str, case: &Case, work: u64) {
        let (store, monitor) = (MemoryStore::of(case.bytes.clone()), Watching::new());
        let limits = case.limits.unwrap_or_else(limits);
        let ask = || Ok(Passphrase::new(PASSPHRASE.to_vec()));
        let options = OpenOptions {
            limits,
            ask_passphrase: &ask,
            checks_all: false,
            is_raw: false,
            backing: &[],
        };
        let make = || foreign::skeleton(&store, &options, &monitor);
        let made = self.run(&format!("{format} skeleton"), VERB_LIMIT_BYTES, make, |_| work);
        self.check_ended(format, "skeleton", made.as_ref());
        let Some(Ok(skeleton)) = made else { return };
        let has_images = skeleton.machines.iter().any(|machine| !machine.images.is_empty());
        let read = read(&MemoryStore::of(skeleton.bytes), &[], limits, &monitor);
        // What is copied is not looked at, and may be damaged.
        if has_images && read.error.is_none() {
            self.problems.push("a skeleton is not known as one".into());
        }
    }

    /// Counts how a verb ended, and notes an error that says nothing of the backup.
    fn check_ended<T>(&mut self, format: &str, verb: &str, done: Option<&Result<T>>) {
        let Some(done) = done else { return };
        let Err(error) = done else {
            self.counts.entry(format!("{format} {verb}")).or_default().1 += 1;
            return;
        };
        let is_allowed =
            |error: &Error| is_of_backup(error) || matches!(error.kind(), ErrorKind::Usage | ErrorKind::NoSpace);
        if !is_allowed(error) {
            self.problems
                .push(format!("{verb}: {:?}: {}", error.kind(), describe(error)));
        }
    }

    /// Checks that what was imported is what was read, and removes it.
    fn check_files(&mut self, to: &Path, read: &Read, is_imported: bool) {
        let entries = walkdir::WalkDir::new(to)
            .into_iter()
            .filter_map(std::result::Result::ok);
        let mut files = BTreeMap::new();
        for entry in entries.filter(|entry| entry.file_type().is_file()) {
            let name = entry.path().strip_prefix(to).unwrap().to_owned();
            if !name.to_string_lossy().starts_with(".vmfold-import-") {
                let is_small = entry.metadata().is_ok_and(|metadata| metadata.len() <= KEPT_BYTES_MAX);
                files.insert(name, is_small.then(|| std::fs::read(entry.path()).unwrap()));
            }
        }
        let _ = std::fs::remove_dir_all(to);
        if !is_imported && !files.is_empty() {
            self.problems.push(format!("import failed and left {:?}", files.keys()));
        }
        if is_imported && read.error.is_some() {
            self.problems.push("what cannot be read to its end was imported".into());
        }
        if is_imported && read.bytes <= KEPT_BYTES_MAX && files != read.whole {
            let names = (files.keys(), read.whole.keys());
            self.problems
                .push(format!("what was imported is not what was read: {names:?}"));
        }
    }

    /// Does everything with a backup as a tool made it, which must succeed, and returns what it holds.
    pub(crate) fn trust(&mut self, format: &str, bytes: &[u8], backing: &[Vec<u8>]) -> BTreeMap<PathBuf, Vec<u8>> {
        let case = Case {
            bytes: bytes.to_vec(),
            backing: backing.to_vec(),
            ..Case::default()
        };
        let read = self.read(format, &case, true).unwrap();
        assert!(read.error.is_none(), "{format}: {:?}", read.error);
        self.verbs(format, &case, &read);
        assert!(self.problems.is_empty(), "{format}: {:?}", self.problems);
        read.whole
            .into_iter()
            .map(|(path, content)| (path, content.unwrap()))
            .collect()
    }

    /// Does everything with a backup, and returns what is wrong with what came of it.
    pub(crate) fn check(&mut self, format: &str, case: &Case, has_verbs: bool, is_twice: bool) -> Vec<String> {
        self.problems.clear();
        if let Some(read) = self.read(format, case, is_twice)
            && has_verbs
            && read.bytes <= KEPT_BYTES_MAX
        {
            self.verbs(format, case, &read);
        }
        std::mem::take(&mut self.problems)
    }
}

/// Whether an error says something of the backup.
fn is_of_backup(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused)
}

/// Checks everything that is done with some bytes.
#[allow(dead_code, reason = "fuzzers use it")]
pub(crate) fn backup(bytes: &[u8], folder: &Path) {
    let case = Case {
        bytes: bytes.to_vec(),
        ..Case::default()
    };
    let problems = Backups::new(folder, &|| 0).check("any", &case, false, true);
    assert!(problems.is_empty(), "{problems:?}");
}
