// What the tests of the format have in common: a simulated pool that is exported into memory, archives that are read in both ways, and
// records that are replaced.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use vmfold::archive::record::{HEADER_BYTES, RecordHeader, RecordKind};
use vmfold::error::Error;
use vmfold::exec::restore::RestoreOptions;
use vmfold::fingerprint::FingerprintFunction;
use vmfold::fs::Filesystem;
use vmfold::index::MemoryIndex;
use vmfold::monitor::{Monitor, Silent};
use vmfold::ops::export::{ExportOptions, Revisions, Sealing, export_on};
use vmfold::ops::import::{ImportOptions, import_from, import_in_order};
use vmfold::ops::verify::verify_store;
use vmfold::ops::{ArchivePlace, BackupAccess, OpenPool, Scope};
use vmfold::report::{Exported, Imported, Verified};
use vmfold::store::{MemoryStore, Store};
use vmfold::testing::simulated::{BlockContent, INCOMPRESSIBLE, PLAIN, Simulated, block_of};

/// What images hold, by their names.
pub(crate) type Content = BTreeMap<PathBuf, Vec<u8>>;

/// A folder in memory, where there is one: everything is synced often.
pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

/// A monitor that keeps what it is told.
#[derive(Default)]
pub(crate) struct Listening(Mutex<Vec<String>>);

impl Listening {
    pub(crate) fn notes(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Monitor for Listening {
    fn phase(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, message: &str) {
        self.0.lock().unwrap().push(message.to_owned());
    }
    fn interrupted(&self) -> bool {
        false
    }
}

/// A pool on a simulated filesystem.
pub(crate) struct Scene {
    pub(crate) fs: Simulated,
    pub(crate) index: MemoryIndex,
    folder: tempfile::TempDir,
}

impl Scene {
    /// Two images that have much in common, with holes and zeros, of which some blocks can be compressed.
    pub(crate) fn new() -> Self {
        let scene = Self::empty();
        for number in 0..2u64 {
            let common = (0..24).map(|n| INCOMPRESSIBLE + n);
            let own = (0..6).map(|n| 1000 * (number + 1) + n);
            scene.add_image(common.chain([0; 4]).chain(own).collect());
        }
        scene
    }

    pub(crate) fn empty() -> Self {
        Self {
            fs: Simulated::default(),
            index: MemoryIndex::default(),
            folder: tempfile::tempdir().unwrap(),
        }
    }

    /// Adds an image of one extent, with a hole of two blocks behind it.
    pub(crate) fn add_image(&self, content: Vec<BlockContent>) {
        let blocks = content.len();
        let image = self.fs.add_image(true, blocks + 2);
        let extent = self.fs.allocate(PLAIN, content);
        self.fs.map(image, 0, extent, 0, u32::try_from(blocks).unwrap(), false);
    }

    /// Adds what a second commit has and the first has not.
    pub(crate) fn grow(&self) {
        let common = (8..20).map(|n| INCOMPRESSIBLE + n);
        self.add_image(common.chain((0..9).map(|n| INCOMPRESSIBLE + 500 + n)).collect());
    }

    pub(crate) fn options(&self) -> ExportOptions {
        ExportOptions {
            sealing: Sealing::default(),
            scope: Scope {
                paths: Vec::new(),
                exclude: Vec::new(),
                index: self.folder.path().to_owned(),
                memory_bytes: None,
            },
            only: Vec::new(),
            revisions: Revisions::All,
            archive: ArchivePlace::Pipe,
            level: 3,
            trusts_archive: false,
            label: String::new(),
            parity: None,
        }
    }

    /// The open pool, with its index or without one.
    pub(crate) fn pool(&self, has_index: bool) -> OpenPool<'_> {
        OpenPool::new(
            &self.fs,
            has_index.then(|| self.index.open(FingerprintFunction::Crc32c)),
        )
    }

    pub(crate) fn export_to(&self, store: Arc<dyn Store>, has_index: bool) -> Result<Exported, Error> {
        export_on(self.pool(has_index), &self.options(), store, &Silent::default())
    }

    /// Exports behind what an archive holds. Returns the archive.
    pub(crate) fn export(&self, before: &[u8]) -> Vec<u8> {
        let store = Arc::new(MemoryStore::of(before.to_vec()));
        self.export_to(Arc::clone(&store) as _, false).unwrap();
        std::fs::write(self.folder.path().join("last.vmfold"), store.to_vec()).unwrap();
        store.to_vec()
    }

    /// What the images hold.
    pub(crate) fn content(&self) -> Content {
        let named = self.fs.contents().into_iter().enumerate().map(|(number, blocks)| {
            let content = blocks.into_iter().flat_map(block_of).collect();
            (
                self.fs.image(vmfold::numbers::ImageId::at(number)).path.clone(),
                content,
            )
        });
        named.collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            crate::common::readers::agree_on_archives_below(self.folder.path());
        }
    }
}

/// An archive of two commits, and what each of them holds.
pub(crate) fn two_commits() -> (Vec<u8>, [Content; 2]) {
    let scene = Scene::new();
    let (one, first) = (scene.export(&[]), scene.content());
    scene.grow();
    (scene.export(&one), [first, scene.content()])
}

/// How an archive is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    File,
    Pipe,
}

pub(crate) const WAYS: [Way; 2] = [Way::File, Way::Pipe];

/// What a restore did.
pub(crate) struct Restored {
    pub(crate) done: Result<Imported, Error>,
    /// The files that it left.
    pub(crate) content: Content,
    pub(crate) notes: Vec<String>,
}

impl Restored {
    /// Whether it says that everything was restored.
    pub(crate) fn is_whole(&self) -> bool {
        self.done
            .as_ref()
            .is_ok_and(|done| done.lost.is_empty() && !done.later_damage)
    }
}

pub(crate) fn restore(bytes: &[u8], way: Way, commit: Option<&str>, partial: bool) -> Restored {
    restore_with(bytes, way, (commit, partial), BackupAccess::default())
}

/// Restores what may be sealed.
pub(crate) fn restore_with(
    bytes: &[u8],
    way: Way,
    (commit, partial): (Option<&str>, bool),
    access: BackupAccess,
) -> Restored {
    let folder = scratch();
    let to = folder.path().join("to");
    let options = ImportOptions {
        archive: ArchivePlace::Pipe,
        commit: commit.map(str::to_owned),
        restore: RestoreOptions {
            to: to.clone(),
            partial,
            ..RestoreOptions::default()
        },
        seeds: Vec::new(),
        index: folder.path().join("index"),
        memory_bytes: Some(64 << 20),
        dry_run: false,
        access,
    };
    let monitor = Listening::default();
    let store = Arc::new(MemoryStore::of(bytes.to_vec()));
    let done = match way {
        Way::File => import_from(store, &options, &monitor),
        Way::Pipe => import_in_order(&*store, &options, &monitor),
    };
    Restored {
        done,
        content: content_of(&to),
        notes: monitor.notes(),
    }
}

fn content_of(folder: &Path) -> Content {
    let files = walkdir::WalkDir::new(folder).into_iter().filter_map(Result::ok);
    files
        .filter(|entry| entry.file_type().is_file())
        .map(|entry| {
            let name = entry.path().strip_prefix(folder).unwrap().to_owned();
            (name, std::fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// Restores a commit, which must be what it was.
pub(crate) fn check_commit(bytes: &[u8], commit: &str, expected: &Content, case: &str) {
    let restored = restore(bytes, Way::File, Some(commit), false);
    let done = restored
        .done
        .unwrap_or_else(|error| panic!("{case}: commit {commit}: {error}"));
    assert_eq!(done.lost, [], "{case}: commit {commit}");
    assert!(
        restored.content == *expected,
        "{case}: commit {commit} has other images"
    );
}

/// Checks that no file has a wrong byte: an image is what it was, and what is left of one has zeros in the place of the rest.
pub(crate) fn check_bytes(restored: &Restored, expected: &Content, case: &str) {
    for (name, found) in &restored.content {
        let text = name.to_str().unwrap();
        match text.strip_suffix(".vmfold-partial") {
            // What lies in a work folder is no image.
            None if text.contains(".vmfold") => {}
            None => assert!(
                expected.get(name) == Some(found),
                "{case}: `{text}` is not what was stored"
            ),
            Some(whole) => {
                let expected = &expected[Path::new(whole)];
                let is_right = |(found, expected): (&u8, &u8)| found == expected || *found == 0;
                assert!(
                    found.len() == expected.len() && found.iter().zip(expected).all(is_right),
                    "{case}: `{text}` has wrong bytes: {:?}",
                    restored.done
                );
            }
        }
    }
    if restored.is_whole() {
        assert_eq!(restored.content.len(), expected.len(), "{case}: images are missing");
    }
}

pub(crate) fn verify(bytes: &[u8]) -> Result<Verified, Error> {
    verify_store(Arc::new(MemoryStore::of(bytes.to_vec())), &Silent::default())
}

/// Whether verification ends with exit code 0.
pub(crate) fn is_intact(verified: &Verified) -> bool {
    verified.damage.is_empty() && verified.lost.is_empty()
}

/// A record, and where it stands.
#[derive(Debug, Clone)]
pub(crate) struct Placed {
    pub(crate) range: Range<usize>,
    pub(crate) header: RecordHeader,
    /// Its body, without a mask.
    pub(crate) body: Vec<u8>,
}

impl Placed {
    /// The bytes of the record with another body, whose hash is right.
    pub(crate) fn with_body(&self, mut body: Vec<u8>) -> Vec<u8> {
        let RecordHeader {
            kind,
            lane,
            epoch,
            sequence,
            ..
        } = self.header;
        let header = RecordHeader::of_body(kind, lane, epoch, sequence, &mut body).unwrap();
        [&header.encode()[..], &body].concat()
    }
}

pub(crate) fn records(bytes: &[u8]) -> Vec<Placed> {
    let (mut at, mut found) = (0, Vec::new());
    while at < bytes.len() {
        let header = RecordHeader::decode(bytes[at..].first_chunk().unwrap()).unwrap();
        let end = at + HEADER_BYTES + usize::try_from(header.body_bytes).unwrap();
        let mut body = bytes[at + HEADER_BYTES..end].to_vec();
        header.apply_mask(0, &mut body);
        found.push(Placed {
            range: at..end,
            header,
            body,
        });
        at = end;
    }
    found
}

/// The last record of a kind.
pub(crate) fn last_of(bytes: &[u8], kind: RecordKind) -> Placed {
    let found = records(bytes).into_iter().rfind(|record| record.header.kind == kind);
    found.unwrap()
}

/// An archive with other bytes in the place of a range.
pub(crate) fn with(bytes: &[u8], range: Range<usize>, instead: &[u8]) -> Vec<u8> {
    [&bytes[..range.start], instead, &bytes[range.end..]].concat()
}
