//! Tar archives: every form of sparse files, names, and what is hostile.

use super::*;

/// How tar writes files, sparse or not.
const TAR_FORMS: [&str; 9] = [
    "--format=gnu --sparse",
    "--format=oldgnu --sparse",
    "--format=posix --sparse --sparse-version=0.0",
    "--format=posix --sparse --sparse-version=0.1",
    "--format=posix --sparse --sparse-version=1.0",
    "--format=posix",
    "--format=gnu",
    "--format=ustar",
    "--format=v7",
];

/// A folder of images as a pool has them: holes at either end and in between, pieces of any length, long names, hard links, nothing at all.
fn pool_of_files() -> (tempfile::TempDir, BTreeMap<PathBuf, Vec<u8>>) {
    let folder = tempfile::tempdir().unwrap();
    let long = "n".repeat(90);
    let mut random = Random(21);
    let mut files: BTreeMap<PathBuf, Vec<u8>> = BTreeMap::new();
    for (name, length, pieces) in [
        ("appvms/work/root.img", 1 << 20, 60),
        ("appvms/work/private.img", 300_000 + 512, 5),
        ("hole.img", 1 << 20, 0),
        ("empty.img", 0, 0),
        ("small.conf", 777, 1),
    ] {
        let mut content = vec![0; length];
        for _ in 0..pieces {
            let at = usize::try_from(random.below(length as u64)).unwrap() / 4096 * 4096;
            let piece = random.data((length - at).min(6000));
            content[at..at + piece.len()].copy_from_slice(&piece);
        }
        let name = PathBuf::from(if name == "hole.img" {
            format!("{long}/{long}.img")
        } else {
            name.to_owned()
        });
        files.insert(name, content);
    }
    for (name, content) in &files {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        qvm::write_sparse(&path, content);
    }
    std::fs::hard_link(
        folder.path().join("appvms/work/root.img"),
        folder.path().join("z-link.img"),
    )
    .unwrap();
    std::os::unix::fs::symlink("root.img", folder.path().join("appvms/work/link.img")).unwrap();
    let root = files[Path::new("appvms/work/root.img")].clone();
    files.insert(PathBuf::from("z-link.img"), root);
    (folder, files)
}

#[test]
fn a_tar_archive_comes_back_in_whatever_form_sparse_files_are_in_it() {
    let (folder, files) = pool_of_files();
    for form in TAR_FORMS {
        // Old forms have no room for such names.
        let without = if form.contains("v7") || form.contains("ustar") {
            "--exclude=nnn*"
        } else {
            ""
        };
        let bytes = piped(
            &format!(
                "cd '{}'; tar -c {form} {without} -f - --sort=name .",
                folder.path().display()
            ),
            b"",
        );
        if form.contains("v7") {
            assert!(!is_backup(&bytes), "nothing tells it from other bytes");
            continue;
        }
        let (whole, result) = read(&bytes);
        result.unwrap_or_else(|error| panic!("{form}: {error}"));
        let mut expected = files.clone();
        expected.retain(|path, _| without.is_empty() || !path.starts_with("n".repeat(90)));
        assert!(whole == expected, "{form}: {:?}", whole.keys().collect::<Vec<_>>());
        assert!(whole.len() > 4, "{form}");
        // Cut anywhere, it is damaged.
        let mut random = Random(22);
        // Two blocks of zeros are the end, and what tar puts behind them is no part of the archive.
        let end = bytes.iter().rposition(|byte| *byte != 0).unwrap().next_multiple_of(512) as u64 + 1024;
        for _ in 0..100 {
            let at = usize::try_from(random.below(end)).unwrap();
            let cut = &bytes[..at];
            if is_backup(cut) {
                let (whole, result) = read(cut);
                assert!(result.is_err(), "{form}: cut at {at}");
                assert!(
                    whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
                    "{form}"
                );
            }
        }
    }
}

#[test]
fn hostile_tar_archives_end_in_errors() {
    let (folder, _) = pool_of_files();
    let mut random = Random(23);
    for form in TAR_FORMS.iter().filter(|form| !form.contains("v7")) {
        let files = "appvms small.conf empty.img";
        let bytes = piped(
            &format!("cd '{}'; tar -c {form} -f - {files}", folder.path().display()),
            b"",
        );
        let headers: Vec<usize> = (0..bytes.len() / 512)
            .map(|block| block * 512)
            .filter(|at| bytes[at + 257..].starts_with(b"ustar"))
            .collect();
        for round in 0..2000 {
            let mut changed = bytes.clone();
            let at = headers[usize::try_from(random.below(headers.len() as u64)).unwrap()];
            // A header, what follows it (maps and pax records), or both.
            for _ in 0..=random.below(3) {
                let byte = usize::try_from(random.below(if round % 2 == 0 { 512 } else { 1536 })).unwrap();
                let value = match random.below(4) {
                    0 => 0x80,
                    1 => 0xff,
                    2 => b'9',
                    _ => u8::try_from(random.below(256)).unwrap(),
                };
                if let Some(place) = changed.get_mut(at + byte) {
                    *place = value;
                }
            }
            let sum: u32 = changed[at..at + 512]
                .iter()
                .enumerate()
                .map(|(place, byte)| {
                    if (148..156).contains(&place) {
                        32
                    } else {
                        u32::from(*byte)
                    }
                })
                .sum();
            changed[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            if is_backup(&changed)
                && let Err(error) = events(&changed)
            {
                assert!(
                    matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Refused),
                    "{error:?}"
                );
            }
        }
    }
}

#[test]
fn more_files_or_longer_names_than_memory_has_room_for_are_refused() {
    let header = |name: &str, bytes: usize, kind: u8| {
        let mut header = [0u8; 512];
        header[..name.len().min(100)].copy_from_slice(&name.as_bytes()[..name.len().min(100)]);
        header[124..135].copy_from_slice(format!("{bytes:011o}").as_bytes());
        header[156] = kind;
        header[257..265].copy_from_slice(b"ustar  \0");
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    };
    let files = |count: usize, name_bytes: usize| {
        let mut archive = Vec::new();
        for number in 0..count {
            let mut name = format!("{number:08}").into_bytes();
            name.resize(name_bytes.max(8), b'x');
            if name_bytes > 100 {
                archive.extend(header("././@LongLink", name.len(), b'L'));
                archive.extend(&name);
                archive.resize(archive.len().next_multiple_of(512), 0);
            }
            archive.extend(header(std::str::from_utf8(&name[..8]).unwrap(), 0, b'0'));
        }
        archive.extend([0; 1024]);
        archive
    };
    assert_eq!(read(&files(2000, 200)).0.len(), 2000);
    for (count, name_bytes) in [((1 << 16) + 1, 8), (2100, 4096)] {
        let text = read(&files(count, name_bytes)).1.unwrap_err().to_string();
        assert!(
            text.contains("it has more files than vmfold takes, or longer names"),
            "{text}"
        );
    }
}

#[test]
fn names_lead_nowhere() {
    let name = |name: &'static [u8]| {
        let maker = VmaMaker {
            devices: vec![(name, content(1, 5000))],
            per_extent: 5,
            ..VmaMaker::default()
        };
        read(&maker.make()).0.into_keys().next().unwrap()
    };
    assert_eq!(name(b"../../etc/shadow"), Path::new("..%2f..%2fetc%2fshadow.raw"));
    assert_eq!(name(b"\xff\x1b[31m"), Path::new("%ff%1b[31m.raw"));
    assert!(name(&[b'x'; 255]).as_os_str().len() <= 255);
}

#[test]
fn names_that_are_shortened_are_noted_up_to_twenty_times() {
    let archive = |files: usize| {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..files {
            std::fs::write(folder.path().join(format!("{}{number}.img", "\n".repeat(200))), b"a").unwrap();
        }
        std::fs::write(folder.path().join("short.img"), b"a").unwrap();
        piped(&format!("tar -cO -C '{}' .", folder.path().display()), b"")
    };
    for (files, notes) in [(0, 0), (1, 1), (20, 20), (30, 21)] {
        let noted = Notes::of(&MemoryStore::of(archive(files)));
        assert_eq!(noted.len(), notes, "{noted:?}");
        assert!(
            noted
                .iter()
                .take(20)
                .all(|note| note.contains("has a longer name in the backup"))
        );
    }
}
