//! The outside reader of sealed archives, and the vectors that it made of one: `testdata/encryption-v1`. What vmfold makes of the same bytes and keys must
//! be the same.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::is_intact;
use crate::common::readers;
use crate::scene::records;
use vmfold::archive::keys::{ArchiveKeys, KeyRecord};
use vmfold::archive::record::{HEADER_BYTES, RecordHeader, RecordKind};
use vmfold::archive::seal;
use vmfold::keys::manage::NewKeys;
use vmfold::keys::{GivenKeys, KeyAccess, SealedKeyring};
use vmfold::monitor::Silent;
use vmfold::ops::key::UserKeys;
use vmfold::ops::verify::verify_sealed;
use vmfold::store::MemoryStore;

fn path_of(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("testdata/encryption-v1")
        .join(name)
}

fn archive() -> Vec<u8> {
    std::fs::read(path_of("archive.vmfold")).unwrap()
}

fn vectors() -> Value {
    serde_json::from_slice(&std::fs::read(path_of("vectors.json")).unwrap()).unwrap()
}

fn bytes_of(value: &Value) -> Vec<u8> {
    let digits = value.as_str().unwrap().as_bytes();
    let pairs = digits.chunks_exact(2).map(|pair| std::str::from_utf8(pair).unwrap());
    pairs.map(|pair| u8::from_str_radix(pair, 16).unwrap()).collect()
}

fn array_of<const N: usize>(value: &Value) -> [u8; N] {
    bytes_of(value).try_into().unwrap()
}

fn each(value: &Value) -> std::slice::Iter<'_, Value> {
    value.as_array().unwrap().iter()
}

/// The file that has the identity, or the one that has the passphrase.
fn access(with_identity: bool) -> KeyAccess {
    KeyAccess::new(GivenKeys {
        identities: if with_identity {
            vec![path_of("identity")]
        } else {
            Vec::new()
        },
        passphrase_file: (!with_identity).then(|| path_of("passphrase")),
        ..GivenKeys::default()
    })
}

/// Keys for which the archive was opened, and found intact.
fn opened(bytes: &[u8]) -> Arc<ArchiveKeys> {
    let path = path_of("archive.vmfold");
    let user = UserKeys::new(access(true), NewKeys::default(), (path, 0), Arc::new(Silent::default()));
    let keys = Arc::new(ArchiveKeys::opened_by(Arc::new(user)));
    let store = Arc::new(MemoryStore::of(bytes.to_vec()));
    let verified = verify_sealed(store, Arc::clone(&keys), &Silent::default()).unwrap();
    assert!(is_intact(&verified), "{verified:?}");
    assert_eq!(verified.commits, 3);
    keys
}

/// A few rounds of what `tests/format/check_sealed.py` does: damage, forgeries, and its own look at the vectors.
#[test]
fn the_outside_reader_opens_sealed_archives() {
    if let Some((is_right, text)) = readers::python("check_sealed.py", &["4", "1"]) {
        assert!(is_right, "{text}");
    }
}

#[test]
fn keyrings_are_those_of_the_vectors() {
    let vectors = vectors();
    let wanted = &vectors["keyring"];
    let sealed = SealedKeyring::decode(Path::new("a"), &bytes_of(&wanted["sealed"])).unwrap();
    sealed.check_slots().unwrap();
    assert_eq!(sealed.slot_kinds().count(), each(&wanted["slots"]).count());
    for with_identity in [true, false] {
        let unlocked = sealed.unlock(&access(with_identity), &Silent::default()).unwrap();
        let keyring = &unlocked.keyring;
        assert_eq!(u64::from(keyring.number), wanted["number"].as_u64().unwrap());
        assert_eq!(keyring.pairs.len() as u64, wanted["pairs"].as_u64().unwrap());
        for (key, name) in [(&keyring.index_key, "index_key"), (&keyring.id_key, "id_key")] {
            assert_eq!(key.bytes(), &array_of::<32>(&wanted[name]), "{name}");
        }
        let signing = ed25519_dalek::SigningKey::from_bytes(keyring.signing_seed.bytes());
        assert_eq!(
            signing.verifying_key().to_bytes(),
            array_of::<32>(&wanted["signing_key"])
        );
        let (newest, pair) = (&keyring.pairs[0], &vectors["pair"]);
        assert_eq!(newest.data_seed.bytes(), &array_of::<32>(&pair["data_seed"]));
        assert_eq!(newest.meta_seed.bytes(), &array_of::<32>(&pair["meta_seed"]));
    }
}

#[test]
fn epoch_keys_and_hashes_of_blocks_are_those_of_the_vectors() {
    let (bytes, vectors) = (archive(), vectors());
    let keys = opened(&bytes);
    let wrapped: Vec<&Value> = each(&vectors["wrapped_keys"]).collect();
    let record = records(&bytes)
        .into_iter()
        .find(|record| {
            let header = record.header;
            let is_of_epoch = header.epoch.0.to_le_bytes() == array_of::<8>(&wrapped[0]["epoch"]);
            header.kind == RecordKind::Key && is_of_epoch
        })
        .unwrap();
    // The name of the pair, and both wrapped keys, where a KEY has them.
    let pair = array_of::<8>(&vectors["pair"]["pair"]);
    assert_eq!(KeyRecord::decode(&record.body).unwrap().wraps.pair, pair);
    let stored: Vec<u8> = wrapped.iter().flat_map(|one| bytes_of(&one["wrapped"])).collect();
    assert!(record.body[20..].starts_with(&stored));
    let header = record.header;
    assert_eq!(header.lane.0, array_of::<16>(&wrapped[0]["archive"]));
    let epoch = keys.epoch(header.lane, header.epoch).unwrap();
    assert_eq!(*epoch.data, array_of::<32>(&wrapped[0]["key"]));
    assert_eq!(*epoch.metadata, array_of::<32>(&wrapped[1]["key"]));
    for (byte, block) in (0..).zip(each(&vectors["block_hashes"])) {
        assert_eq!(
            keys.hasher().of(&[byte; 4096]),
            array_of::<32>(&block["hash"]),
            "{block}"
        );
    }
}

#[test]
fn records_open_to_what_the_vectors_say() {
    let (bytes, vectors) = (archive(), vectors());
    let keys = opened(&bytes);
    for wanted in each(&vectors["records"]) {
        let kind = wanted["kind"].as_str().unwrap();
        let at = usize::try_from(wanted["offset"].as_u64().unwrap()).unwrap();
        let header = RecordHeader::decode(&array_of::<HEADER_BYTES>(&wanted["header"])).unwrap();
        assert_eq!(bytes[at..at + HEADER_BYTES], header.encode(), "{kind}");
        let record = records(&bytes).into_iter().find(|record| record.range.start == at);
        let stored = record.unwrap().body;
        let opened = keys.open_body(Path::new("a"), 0, &header, stored.clone()).unwrap();
        let plain: Vec<u8> = each(&wanted["segments"])
            .flat_map(|segment| bytes_of(&segment["plain"]))
            .collect();
        if header.kind == RecordKind::Pack {
            assert!(opened == plain, "{kind}");
            continue;
        }
        // A length, the body, and zeros.
        let (length, rest) = plain.split_first_chunk().unwrap();
        let body = &rest[..usize::try_from(u32::from_le_bytes(*length)).unwrap()];
        let clear = opened.len() - body.len();
        assert!(opened[clear..] == *body, "{kind}");
        if header.kind == RecordKind::Commit {
            assert_eq!(seal::clear_bytes(&stored).unwrap(), clear);
            assert_eq!(stored[super::SIGNATURE], bytes_of(&wanted["signature"]));
        } else {
            assert_eq!(clear, 0, "{kind}");
        }
    }
    for pair in each(&vectors["padme"]) {
        let [length, padded] = [0, 1].map(|place| usize::try_from(pair[place].as_u64().unwrap()).unwrap());
        assert_eq!(seal::padme(length), padded, "{length}");
    }
}
