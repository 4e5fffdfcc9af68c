// Goal: an image that holds an archive cannot take over the archive that holds the image.

use std::path::Path;
use std::sync::Arc;

use vmfold::archive::reader::Archive;
use vmfold::archive::record::{HEADER_BYTES, MAGIC, RecordKind};
use vmfold::fs::{Plain, Purpose};
use vmfold::monitor::Silent;
use vmfold::ops::OpenPool;
use vmfold::ops::export::export_on;
use vmfold::pool;
use vmfold::store::MemoryStore;
use vmfold::testing::simulated::INCOMPRESSIBLE;

use crate::scene::{Scene, WAYS, records, restore, scratch};

/// An archive that a guest keeps in its image, with one image that cannot be compressed.
fn archive_of_guest() -> Vec<u8> {
    let scene = Scene::empty();
    scene.add_image((0..400).map(|n| INCOMPRESSIBLE + 7000 + n).collect());
    scene.export(&[])
}

/// An archive of an image that has these bytes where a disk has its first partition.
fn archive_around(guest: &[u8]) -> Vec<u8> {
    let folder = scratch();
    let image = [&vec![0x5a; 4096][..], guest, &[0; 4096]].concat();
    std::fs::write(folder.path().join("disk.img"), image).unwrap();
    let found = pool::discover(&[folder.path().to_owned()], &[]).unwrap();
    let (fs, _) = Plain::open(&found.images, &found.named, Purpose::Read).unwrap();
    let store = Arc::new(MemoryStore::default());
    let options = Scene::empty().options();
    export_on(
        OpenPool::new(&fs, None),
        &options,
        Arc::clone(&store) as _,
        &Silent::default(),
    )
    .unwrap();
    store.to_vec()
}

#[test]
fn an_image_that_holds_an_archive_does_not_take_over() {
    let guest = archive_of_guest();
    let stranger = Archive::open(Arc::new(MemoryStore::of(guest.clone()))).unwrap();
    let (id, lane) = (stranger.commits()[0].id(), stranger.id());
    let bytes = archive_around(&guest);
    let all = records(&bytes);
    let magics = bytes.windows(MAGIC.len()).filter(|bytes| *bytes == MAGIC).count();
    assert_eq!(magics, all.len(), "no body has the magic");
    // Its data is stored raw, so that the archive in it is there byte by byte.
    let packs = all
        .iter()
        .filter(|record| record.header.kind == RecordKind::Pack && record.header.mask > 0);
    let held = packs.filter(|pack| pack.body.windows(4096).any(|part| guest.starts_with(part)));
    assert_eq!(held.count(), 1);
    let ends = all
        .iter()
        .flat_map(|record| [record.range.start, record.range.start + HEADER_BYTES]);
    let lengths: Vec<usize> = ends.chain([1, 8, 100, 512, 4096]).collect();
    let expected = |name: &Path, content: &[u8]| {
        name.extension().is_none_or(|end| end != "img")
            || (content.len() == guest.len() + 8192 && content[4096..][..guest.len()] == guest)
    };
    for length in lengths {
        let zeroed = [&vec![0; length][..], &bytes[length..]].concat();
        for (case, bytes) in [("cut", &bytes[length..]), ("zeroed", &zeroed)] {
            let case = format!("the first {length} bytes {case}");
            let store = Arc::new(MemoryStore::of(bytes.to_vec()));
            if let Ok(mut archive) = Archive::open_any(store) {
                archive.salvage().unwrap();
                assert_ne!(archive.id(), lane, "{case}");
                assert!(
                    archive.commits().iter().all(|one| one.id() != id && one.lane != lane),
                    "{case}"
                );
            }
            for (way, partial) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
                let restored = restore(bytes, way, None, partial);
                assert!(
                    restored.done.is_err() || restored.done.is_ok_and(|done| done.id != id),
                    "{case}"
                );
                for (name, content) in restored.content {
                    assert!(
                        expected(&name, &content),
                        "{case}, {way:?}, partial {partial}: {name:?}"
                    );
                }
            }
        }
    }
}
