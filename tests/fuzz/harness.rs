// What fuzzers and the short run in `tests/fuzz.rs` have in common: everything that reads bytes of others.

use std::path::Path;

use vmfold::archive::commit::{Commit, decode_tail};
use vmfold::archive::head::Head;
use vmfold::archive::reader::Archive;
use vmfold::archive::record::{HEADER_BYTES, RecordHeader, hash_of};
use vmfold::archive::stream::{Stream, StreamEvent};
use vmfold::archive::{index, manifest, pack};
use vmfold::exec::restore::RestoreOptions;
use vmfold::monitor::Silent;
use vmfold::numbers::StoreBlock;
use vmfold::ops::ArchivePlace;
use vmfold::ops::import::{ImportOptions, import};
use vmfold::ops::verify::verify;
use vmfold::store::MemoryStore;

/// Gives the bytes to every decoder.
pub(crate) fn decoders(bytes: &[u8]) {
    if let Some(header) = bytes.first_chunk::<HEADER_BYTES>() {
        let _ = RecordHeader::decode(header);
    }
    let _ = Head::decode(bytes);
    if let Ok(plan) = manifest::decode(bytes) {
        let mut builder = manifest::ManifestBuilder::default();
        if builder.add(plan.part).is_ok() {
            let _ = builder.finish();
        }
    }
    if let Ok(frames) = pack::decode_table(bytes, bytes.len() as u64) {
        for frame in frames {
            let _ = frame.slice(bytes).and_then(|stored| frame.decode(stored));
        }
    }
    let _ = index::decode(bytes);
    let _ = Commit::decode(bytes);
    let _ = decode_tail(bytes);
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

/// Makes hashes right again, so that what is damaged reaches the decoders: of every record that can be told, its body's and its header's,
/// and of a PACK, its table's.
pub(crate) fn seal(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = bytes.get(at..at + HEADER_BYTES) {
        let length = header[48..56].try_into().map_or(0, u64::from_le_bytes);
        let Some(end) = usize::try_from(length)
            .ok()
            .and_then(|length| (at + HEADER_BYTES).checked_add(length))
        else {
            return;
        };
        if end > bytes.len() {
            return;
        }
        let body = at + HEADER_BYTES..end;
        if header[8] == 3 && body.len() > pack::FIXED_BYTES {
            let table = pack::table_bytes(&bytes[body.clone()]).unwrap_or(0).min(body.len());
            if table > 32 {
                let hash = hash_of(&bytes[body.start + 32..body.start + table]);
                bytes[body.start..body.start + 32].copy_from_slice(&hash);
            }
        }
        let hash = hash_of(&bytes[body]);
        bytes[at + 56..at + 88].copy_from_slice(&hash);
        let hash = hash_of(&bytes[at..at + 88]);
        bytes[at + 88..at + 96].copy_from_slice(&hash[..8]);
        at = end;
    }
}

/// Opens bytes as an archive in a folder, and does everything with it that does not write.
pub(crate) fn archive(bytes: &[u8], folder: &Path) {
    let path = folder.join("a.vmfold");
    if std::fs::write(&path, bytes).is_err() {
        return;
    }
    if let Ok(mut archive) = Archive::open_any(std::sync::Arc::new(MemoryStore::of(bytes.to_vec()))) {
        let _ = archive.salvage();
        for committed in archive.commits() {
            let _ = archive.manifest(committed);
            let _ = archive.announced(committed);
            for pack in archive.packs(StoreBlock(0), committed.commit.store_end.min(StoreBlock(1 << 20))) {
                for located in archive.frames(pack).unwrap_or_default() {
                    let _ = archive.frame(&located);
                }
            }
        }
        let _ = archive.ends_in_leftovers_only();
    }
    let _ = verify(&path, &Silent::default());
    for partial in [false, true] {
        let options = ImportOptions {
            archive: ArchivePlace::File(path.clone()),
            commit: None,
            restore: RestoreOptions {
                to: folder.join("to"),
                partial,
                ..RestoreOptions::default()
            },
            seeds: Vec::new(),
            index: folder.join("index"),
            memory_bytes: Some(1 << 20),
            dry_run: true,
        };
        let _ = import(&options, &Silent::default());
    }
}
