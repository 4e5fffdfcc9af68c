//! Goal: whoever can write to where an archive lies cannot make a host seal for somebody else, nor bring back keys that were removed.
//! Method: archives in files, with keyrings as people make them, are changed as such an attacker could, and written to again.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test that cannot go on has failed")]

mod common;
#[path = "format/scene.rs"]
#[allow(dead_code, reason = "other tests use another part")]
mod scene;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use scene::{Placed, Scene, Way, records, restore_with};
use vmfold::archive::index;
use vmfold::archive::keys::{ArchiveKeys, Remember};
use vmfold::archive::record::{Hash, RecordHeader, RecordKind};
use vmfold::archive::seal::{self, EpochKeys, KeySlot, Salts, Seal, SealedPlace, SecretKey};
use vmfold::error::Error;
use vmfold::keys::manage::{self, NewKeys};
use vmfold::keys::{GivenKeys, KeyAccess, WorkFactor};
use vmfold::monitor::Silent;
use vmfold::ops::BackupAccess;
use vmfold::ops::export::{ExportOptions, Sealing, export_on};
use vmfold::ops::key::{self, ArchiveKeyring, UserKeys};
use vmfold::ops::verify::verify_sealed;
use vmfold::report::Exported;
use vmfold::seen::{SeenArchives, Strictness};
use vmfold::store::{FileStore, MemoryStore};
use vmfold::testing::simulated::INCOMPRESSIBLE;

const NOW: u64 = 1_790_000_000;
/// An identity that anybody may know.
const IDENTITY: &str = include_str!("../testdata/encryption-v1/identity");
/// Its recipient.
const RECIPIENT: &str = "age1gk80dnzgk88k8m2uqk2qj5amj6mxcyh0ugdz44u3ms0c6nvwyguqdsa5k0";

/// A folder with an archive, and with what opens it.
struct Host {
    folder: tempfile::TempDir,
    scene: Scene,
    remembers: bool,
}

impl Host {
    fn new() -> Self {
        Self {
            folder: scene::scratch(),
            scene: Scene::new(),
            remembers: false,
        }
    }

    /// One that remembers the archives that it has seen.
    fn that_remembers() -> Self {
        Self {
            remembers: true,
            ..Self::new()
        }
    }

    fn memory(&self, strictness: Strictness) -> Option<Arc<dyn Remember>> {
        let monitor = Arc::new(Silent::default());
        let memory = SeenArchives::new(self.folder.path().join("state"), strictness, NOW, monitor);
        self.remembers.then(|| Arc::new(memory) as _)
    }

    fn remembering(&self, strictness: Strictness) -> Sealing {
        Sealing {
            memory: self.memory(strictness),
            ..Sealing::default()
        }
    }

    fn archive(&self) -> PathBuf {
        self.folder.path().join("vms.vmfold")
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.archive()).unwrap()
    }

    fn file(&self, name: &str, content: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// Who knows a passphrase.
    fn who(&self, passphrase: &str) -> KeyAccess {
        KeyAccess::new(GivenKeys {
            passphrase_file: Some(self.file(passphrase, passphrase)),
            work_factor: WorkFactor::new(2),
            ..GivenKeys::default()
        })
    }

    /// Who has the identity.
    fn who_has_the_identity(&self) -> KeyAccess {
        KeyAccess::new(GivenKeys {
            identities: vec![self.file("identity", IDENTITY)],
            work_factor: WorkFactor::new(2),
            ..GivenKeys::default()
        })
    }

    fn keys(&self, access: KeyAccess, recipients: &[&str]) -> Arc<UserKeys> {
        let new = NewKeys {
            recipients: recipients.iter().map(|one| (*one).to_owned()).collect(),
            ..NewKeys::default()
        };
        let keys = UserKeys::new(access, new, (self.archive(), NOW), Arc::new(Silent::default()));
        Arc::new(keys)
    }

    fn export(&self, access: KeyAccess, recipients: &[&str]) -> Result<(), Error> {
        self.export_to(&self.archive(), access, recipients)
    }

    fn export_to(&self, archive: &Path, access: KeyAccess, recipients: &[&str]) -> Result<(), Error> {
        let keys = self.keys(access, recipients);
        let sealing = Sealing {
            unlock: Some(Arc::clone(&keys) as _),
            new: (!archive.exists()).then_some(keys as _),
            ..self.remembering(Strictness::Refuse)
        };
        self.scene.grow();
        self.export_sealed(archive, sealing).map(drop)
    }

    fn export_sealed(&self, archive: &Path, sealing: Sealing) -> Result<Exported, Error> {
        let options = ExportOptions {
            sealing,
            ..self.scene.options()
        };
        let store = Arc::new(FileStore::append_to(archive)?);
        export_on(self.scene.pool(false), &options, store, &Silent::default())
    }

    /// Adds an image that has a part in common with those that are there, and nine blocks that none has.
    fn add_image(&self, number: u64) {
        let common = (8..20).map(|n| INCOMPRESSIBLE + n);
        let own = (0..9).map(|n| INCOMPRESSIBLE + 1000 * (number + 1) + n);
        self.scene.add_image(common.chain(own).collect());
    }

    /// Makes credentials of a host that may only write.
    fn add_host(&self, access: &KeyAccess, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        let mut place = ArchiveKeyring::open_to_change(&self.archive()).unwrap();
        key::add_host(&mut place, (name, &path), access, &Silent::default()).unwrap();
        path
    }

    /// Exports with such credentials.
    fn export_as(&self, credentials: &Path) -> Result<Exported, Error> {
        let sealing = Sealing {
            host: Some(key::host_of(credentials)?),
            ..self.remembering(Strictness::Refuse)
        };
        self.export_sealed(&self.archive(), sealing)
    }

    fn verifies(&self, access: KeyAccess) -> bool {
        let keys = Arc::new(ArchiveKeys::opened_by(self.keys(access, &[])));
        let store = Arc::new(MemoryStore::of(self.bytes()));
        let verified = verify_sealed(store, keys, &Silent::default()).unwrap();
        verified.damage.is_empty() && verified.lost.is_empty()
    }

    fn add(&self, access: &KeyAccess, passphrase: &str) -> Result<(), Error> {
        let new = NewKeys {
            passphrase_file: Some(self.file(passphrase, passphrase)),
            ..NewKeys::default()
        };
        let place = ArchiveKeyring::open_to_change(&self.archive())?;
        let mut place = place.remembered_by(self.memory(Strictness::Refuse));
        manage::add(&mut place, &new, access, NOW, &Silent::default()).map(drop)
    }

    fn rotate(&self, access: &KeyAccess) {
        let place = ArchiveKeyring::open_to_change(&self.archive()).unwrap();
        let mut place = place.remembered_by(self.memory(Strictness::Refuse));
        manage::rotate(&mut place, access, &Silent::default()).unwrap();
    }

    fn keyring_number(&self, access: &KeyAccess) -> Result<Option<u32>, Error> {
        let place = ArchiveKeyring::open(&self.archive())?;
        Ok(manage::list(&place, access, &Silent::default())?.number)
    }

    /// Whether somebody reads the last commit.
    fn can_read(&self, access: KeyAccess) -> bool {
        let access = BackupAccess {
            unlock: Some(self.keys(access, &[]) as _),
            ..BackupAccess::default()
        };
        let restored = restore_with(&self.bytes(), Way::File, (None, false), access);
        restored.done.is_ok() && restored.content == self.scene.content()
    }

    /// Appends a KEY record as it is, and then the end that the archive has: what needs no key.
    fn append_keys(&self, keys: &Placed) {
        let all = records(&self.bytes());
        let commit = all
            .iter()
            .rfind(|record| record.header.kind == RecordKind::Commit)
            .unwrap();
        let tail = all.last().unwrap();
        let mut sequence = tail.header.sequence;
        let mut file = OpenOptions::new().append(true).open(self.archive()).unwrap();
        for record in [keys, commit, tail] {
            sequence += 1;
            let header = RecordHeader {
                lane: tail.header.lane,
                mask: 0,
                sequence,
                ..record.header
            };
            let mut body = record.body.clone();
            let header = header.copied(sequence, &mut body).unwrap();
            file.write_all(&[&header.encode()[..], &body].concat()).unwrap();
        }
    }

    fn last_keys(&self) -> Placed {
        scene::last_of(&self.bytes(), RecordKind::Key)
    }
}

#[test]
fn an_older_keyring_behind_the_newest_does_not_come_back() {
    let host = Host::new();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    host.add(&owner(), "former").unwrap();
    let before = host.last_keys();
    host.rotate(&owner());
    host.append_keys(&before);
    // The end leads to the older keyring: what is written must not.
    assert_eq!(host.keyring_number(&owner()).unwrap(), Some(3));
    host.export(owner(), &[]).unwrap();
    assert!(host.can_read(owner()) && !host.can_read(host.who("former")));
    host.append_keys(&before);
    host.add(&owner(), "new").unwrap();
    assert_eq!(host.keyring_number(&host.who("new")).unwrap(), Some(4));
    host.export(host.who("new"), &[]).unwrap();
    assert!(host.can_read(owner()) && !host.can_read(host.who("former")));
}

#[test]
fn readers_find_the_keyring_that_the_end_has_lost() {
    let host = Host::new();
    host.export(host.who("owner"), &[]).unwrap();
    let before = host.last_keys();
    host.rotate(&host.who("owner"));
    host.export(host.who("owner"), &[]).unwrap();
    host.append_keys(&before);
    assert!(host.can_read(host.who("owner")));
}

#[test]
fn a_keyring_that_others_made_for_a_recipient_is_not_written_with() {
    let host = Host::new();
    let owner = || host.who_has_the_identity();
    host.export(owner(), &[RECIPIENT]).unwrap();
    // Whoever knows the recipient makes an archive of his own, and changes its keys so often that its number is greater.
    let other = Host::new();
    other.export(other.who("attacker"), &[RECIPIENT]).unwrap();
    for more in ["a", "b", "c"] {
        other.add(&other.who("attacker"), more).unwrap();
    }
    host.append_keys(&other.last_keys());
    let length = host.bytes().len();
    assert!(host.export(owner(), &[]).is_err());
    assert!(host.add(&owner(), "new").is_err());
    assert_eq!(host.bytes().len(), length);
}

#[test]
fn a_host_that_may_only_write_adds_and_shares_what_is_there() {
    let host = Host::new();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    let credentials = host.add_host(&owner(), "host");
    host.add_image(1);
    let first = host.export_as(&credentials).unwrap();
    assert_eq!(first.new_bytes, 9 * 4096, "{first:?}");
    assert!(host.can_read(owner()) && host.verifies(owner()));
    assert_eq!(host.export_as(&credentials).unwrap().new_bytes, 0);
    host.export(owner(), &[]).unwrap();
    assert!(host.can_read(owner()) && host.verifies(owner()));
}

/// What the credentials hold: 32 bytes from each place of what they encode.
fn secrets_in(credentials: &Path) -> Vec<SecretKey> {
    let text = std::fs::read_to_string(credentials).unwrap();
    let encoded = text.lines().last().unwrap().rsplit(' ').next().unwrap();
    let mut bits = Vec::new();
    for digit in encoded.bytes() {
        let digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let value = digits.iter().position(|one| *one == digit).unwrap();
        bits.extend((0..6).rev().map(|bit| value >> bit & 1 == 1));
    }
    let bytes: Vec<u8> = bits
        .chunks_exact(8)
        .map(|bits| bits.iter().fold(0, |byte, bit| byte << 1 | u8::from(*bit)))
        .collect();
    bytes
        .windows(32)
        .map(|key| SecretKey::new(key.try_into().unwrap()))
        .collect()
}

#[test]
fn credentials_of_a_host_open_nothing_but_hashes() {
    let host = Host::new();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    let credentials = host.add_host(&owner(), "host");
    host.add_image(1);
    host.export_as(&credentials).unwrap();
    let secrets = secrets_in(&credentials);
    let mut opened = Vec::new();
    for record in records(&host.bytes()) {
        let Some(seal) = record.header.seal else { continue };
        let opens = secrets.iter().any(|secret| {
            let keys = EpochKeys {
                data: secret.clone(),
                metadata: secret.clone(),
                index: secret.clone(),
            };
            seal::open_body(&keys, &record.header, seal, record.body.clone()).is_ok()
        });
        assert_eq!(opens, seal.slot == KeySlot::Index, "{:?}", record.header);
        opened.extend(opens.then_some(record));
    }
    // Of its own epoch and the owner's, it opens hashes and fingerprints of blocks: it can tell whether a block is there that it knows.
    let (_, ring) = key::host_of(&credentials).unwrap();
    let keys = ArchiveKeys::of_ring(Arc::clone(&ring));
    let indexes = opened.iter().filter(|record| record.header.kind == RecordKind::Index);
    let bodies = indexes.map(|record| {
        let body = keys.open_body(&host.archive(), 0, &record.header, record.body.clone());
        body.unwrap()
    });
    let hashes: Vec<Hash> = bodies
        .flat_map(|body| index::decode(&body).unwrap().1.to_vec())
        .collect();
    let known = |block: &[u8]| hashes.contains(&ring.hasher().of(block));
    let content = host.scene.content();
    let image = content.values().next().unwrap();
    let block = image
        .chunks_exact(4096)
        .find(|block| block.iter().any(|byte| *byte != 0));
    assert!(known(block.unwrap()));
    assert!(!known(&[0x5a; 4096]));
}

#[test]
fn what_another_host_wrote_is_not_referred_to() {
    let host = Host::new();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    let (one, other) = (host.add_host(&owner(), "one"), host.add_host(&owner(), "other"));
    host.add_image(1);
    assert_eq!(host.export_as(&one).unwrap().new_bytes, 9 * 4096);
    assert_eq!(host.export_as(&other).unwrap().new_bytes, 9 * 4096);
    assert_eq!(host.export_as(&other).unwrap().new_bytes, 0);
    assert!(host.can_read(owner()) && host.verifies(owner()));
}

#[test]
fn a_record_that_a_host_puts_into_the_epoch_of_another_is_not_used() {
    let host = Host::new();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    let credentials = host.add_host(&owner(), "host");
    let before = host.bytes();
    host.add_image(1);
    let honest = host.export_as(&credentials).unwrap();
    // An INDEX of the owner's epoch, which says that the new blocks stand where others do.
    let index = records(&before)
        .into_iter()
        .find(|record| record.header.kind == RecordKind::Index)
        .unwrap();
    let (_, ring) = key::host_of(&credentials).unwrap();
    let keys = ArchiveKeys::of_ring(Arc::clone(&ring));
    let body = keys
        .open_body(&host.archive(), 0, &index.header, index.body.clone())
        .unwrap();
    let (first, hashes) = index::decode(&body).unwrap();
    let content = host.scene.content();
    let new = content.values().flat_map(|image| image.chunks_exact(4096));
    let forged: Vec<Hash> = new.map(|block| ring.hasher().of(block)).take(hashes.len()).collect();
    let secret = secrets_in(&credentials).into_iter().find(|secret| {
        let keys = EpochKeys {
            data: secret.clone(),
            metadata: secret.clone(),
            index: secret.clone(),
        };
        seal::open_body(&keys, &index.header, Seal::with(KeySlot::Index), index.body.clone()).is_ok()
    });
    let secret = secret.unwrap();
    let keys = EpochKeys {
        data: secret.clone(),
        metadata: secret.clone(),
        index: secret,
    };
    let (lane, epoch, sequence) = (index.header.lane, index.header.epoch, 1 << 20);
    let place = SealedPlace::of_new(RecordKind::Index, Seal::with(KeySlot::Index), lane, epoch);
    let mut salts = Salts::new(SecretKey::new([1; 32]));
    let plain = index::encode(first, &forged);
    let mut body = seal::seal_body(&keys, Seal::with(KeySlot::Index), place, &mut salts, &plain).unwrap();
    let sealed_as = (RecordKind::Index, Some(Seal::with(KeySlot::Index)));
    let header = RecordHeader::of_stored(sealed_as, lane, epoch, sequence, &mut body).unwrap();
    let at = index.range.start;
    let poisoned = [&before[..at], &header.encode(), &body, &before[at..]].concat();
    std::fs::write(host.archive(), &poisoned).unwrap();
    // All of the owner's blocks are stored again: none of his hashes is believed.
    let wary = host.export_as(&credentials).unwrap();
    assert_eq!(honest.new_bytes, 9 * 4096);
    assert!(wary.new_bytes > honest.new_bytes, "{wary:?}");
    assert!(host.can_read(owner()));
}

#[test]
fn credentials_do_for_their_archive_until_its_keys_are_rotated() {
    let host = Host::new();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    let before = host.add_host(&owner(), "before");
    host.add(&owner(), "somebody").unwrap();
    host.export_as(&before).unwrap();
    host.rotate(&owner());
    let error = host.export_as(&before).unwrap_err();
    assert!(
        matches!(error, Error::Usage(_)) && error.to_string().contains("rotated"),
        "{error}"
    );
    let after = host.add_host(&owner(), "after");
    host.add_image(1);
    host.export_as(&after).unwrap();
    assert!(host.can_read(owner()) && host.verifies(owner()));
    let other = Host::new();
    assert!(
        matches!(other.export_as(&after), Err(Error::Usage(_))),
        "there is no archive"
    );
    std::fs::remove_file(other.archive()).unwrap();
    other.export(other.who("owner"), &[]).unwrap();
    assert!(other.export_as(&after).is_err(), "it is another archive");
}

fn is_rolled_back(result: &Result<(), Error>) -> bool {
    matches!(result, Err(Error::RolledBack { .. }))
}

#[test]
fn an_older_copy_is_not_written_to() {
    let host = Host::that_remembers();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    let credentials = host.add_host(&owner(), "host");
    let first = host.bytes();
    host.add_image(1);
    host.export(owner(), &[]).unwrap();
    let second = host.bytes();
    std::fs::write(host.archive(), &first).unwrap();
    assert!(is_rolled_back(&host.export(owner(), &[])));
    assert!(is_rolled_back(&host.add(&owner(), "new")));
    assert!(is_rolled_back(&host.export_as(&credentials).map(drop)));
    assert!(host.bytes() == first);
    // Who goes on with it all the same has another second commit then.
    let keys = host.keys(owner(), &[]);
    let sealing = Sealing {
        unlock: Some(keys as _),
        ..host.remembering(Strictness::Accept)
    };
    host.add_image(2);
    host.export_sealed(&host.archive(), sealing).unwrap();
    host.export(owner(), &[]).unwrap();
    std::fs::write(host.archive(), &second).unwrap();
    assert!(is_rolled_back(&host.export(owner(), &[])));
}

#[test]
fn keys_that_were_removed_do_not_come_back_with_an_older_copy() {
    let host = Host::that_remembers();
    let owner = || host.who("owner");
    host.export(owner(), &[]).unwrap();
    host.add(&owner(), "former").unwrap();
    let before = host.bytes();
    host.rotate(&owner());
    std::fs::write(host.archive(), &before).unwrap();
    assert!(is_rolled_back(&host.export(owner(), &[])));
    assert!(is_rolled_back(&host.add(&owner(), "new")));
}

#[test]
fn another_archive_in_the_place_of_one_is_not_written_to() {
    let host = Host::that_remembers();
    let owner = || host.who_has_the_identity();
    host.export(owner(), &[RECIPIENT]).unwrap();
    let other = Host::new();
    other.export(other.who("attacker"), &[RECIPIENT]).unwrap();
    std::fs::write(host.archive(), other.bytes()).unwrap();
    assert!(is_rolled_back(&host.export(owner(), &[])));
    assert!(is_rolled_back(&host.add(&owner(), "new")));
    // Nor is one in clear, which anybody can make, nor is one begun there in clear.
    let clear = host.scene.export(&[]);
    for bytes in [&clear[..], &[]] {
        std::fs::write(host.archive(), bytes).unwrap();
        let exported = host.export_sealed(&host.archive(), host.remembering(Strictness::Refuse));
        assert!(is_rolled_back(&exported.map(drop)));
        assert!(host.bytes() == bytes);
    }
    // A new archive may take its place.
    std::fs::remove_file(host.archive()).unwrap();
    host.export(owner(), &[RECIPIENT]).unwrap();
    host.export(owner(), &[]).unwrap();
}

#[test]
fn who_reads_an_older_copy_is_told_and_gets_it() {
    let host = Host::that_remembers();
    host.export(host.who("owner"), &[]).unwrap();
    let (first, content) = (host.bytes(), host.scene.content());
    host.export(host.who("owner"), &[]).unwrap();
    let listening = Arc::new(scene::Listening::default());
    let folder = host.folder.path().join("state");
    let memory = SeenArchives::new(folder.clone(), Strictness::Tell, NOW, Arc::clone(&listening) as _);
    std::fs::write(host.archive(), &first).unwrap();
    let access = BackupAccess {
        unlock: Some(host.keys(host.who("owner"), &[]) as _),
        memory: Some(Arc::new(memory)),
        ..BackupAccess::default()
    };
    let restored = restore_with(&first, Way::File, (None, false), access);
    assert!(restored.content == content);
    assert!(
        listening.notes().iter().any(|note| note.contains("has seen commit 2")),
        "{:?}",
        listening.notes()
    );
    // A memory that is damaged is none.
    std::fs::write(folder.join("seen.json"), "{").unwrap();
    host.export(host.who("owner"), &[]).unwrap();
}

#[test]
fn a_keyring_that_a_removed_reader_made_is_not_written_with() {
    let host = Host::that_remembers();
    let owner = || host.who_has_the_identity();
    host.export(owner(), &[RECIPIENT]).unwrap();
    host.add(&owner(), "former").unwrap();
    // He changes the keys of a copy until their number is greater. The owner's recipient stays.
    let copy = Host::new();
    std::fs::write(copy.archive(), host.bytes()).unwrap();
    copy.rotate(&copy.who("former"));
    for more in ["a", "b"] {
        copy.add(&copy.who("former"), more).unwrap();
    }
    host.rotate(&owner());
    let newest = host.last_keys();
    host.append_keys(&copy.last_keys());
    // It counts wherever it stands.
    for behind in [None, Some(newest)] {
        if let Some(keys) = &behind {
            host.append_keys(keys);
        }
        let length = host.bytes().len();
        assert!(is_rolled_back(&host.export(owner(), &[])));
        assert!(is_rolled_back(&host.add(&owner(), "new")));
        assert_eq!(host.bytes().len(), length);
    }
}

#[test]
fn what_others_can_write_to_is_no_memory() {
    use std::os::unix::fs::PermissionsExt as _;
    let host = Host::that_remembers();
    host.export(host.who("owner"), &[]).unwrap();
    let length = host.bytes().len();
    let state = host.folder.path().join("state");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o777)).unwrap();
    assert!(matches!(
        host.export(host.who("owner"), &[]),
        Err(Error::NotOurs { .. })
    ));
    assert!(matches!(
        host.add(&host.who("owner"), "new"),
        Err(Error::NotOurs { .. })
    ));
    assert_eq!(host.bytes().len(), length);
    // What it holds stays where it is, wherever its name leads.
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();
    std::fs::remove_file(state.join("seen.json")).unwrap();
    std::os::unix::fs::symlink(host.file("other", "other"), state.join("seen.json.new")).unwrap();
    host.export(host.who("owner"), &[]).unwrap();
    assert_eq!(std::fs::read(host.folder.path().join("other")).unwrap(), b"other");
}
