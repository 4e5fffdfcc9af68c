//! What is compressed as a whole, and raw images.

use super::*;

/// How tools compress, with what they put into the stream that not all of them do.
const COMPRESSORS: [&str; 19] = [
    "zstd -q",
    "zstd -q -19 --long=27",
    r"(printf '\x53\x2a\x4d\x18\x04\0\0\0abcd'; zstd -q)",
    "(head -c 200000 | zstd -q; zstd -q --no-check)",
    "gzip -n",
    "gzip -9 -N",
    "(head -c 200000 | gzip; gzip)",
    "bzip2",
    "(head -c 200000 | bzip2; bzip2)",
    "xz",
    "xz --check=sha256 --x86 --lzma2=dict=1MiB",
    "(head -c 200000 | xz --block-size=65536; xz)",
    "lz4 -q",
    r"(printf '\x50\x2a\x4d\x18\x04\0\0\0abcd'; lz4 -q)",
    "lz4 -q -B4 -BD -BX --content-size",
    "(head -c 200000 | lz4 -q -9 -B5; lz4 -q --no-frame-crc)",
    "lzop",
    "lzop -9 --crc32 -C",
    "(head -c 200000 | lzop; lzop -F)",
];

#[test]
fn what_tools_compress_is_read_and_so_is_what_they_wrote_one_after_the_other() {
    let maker = some_vma(5, 40);
    let (archive, expected) = (maker.make(), expected_of(&maker));
    let image = content(9, 300_001);
    for command in COMPRESSORS {
        let (whole, result) = read(&piped(command, &archive));
        result.unwrap_or_else(|error| panic!("{command}: {error}"));
        assert!(whole == expected, "{command}");
        let (whole, result) = read(&piped(command, &image));
        result.unwrap_or_else(|error| panic!("{command}: {error}"));
        let paths: Vec<&PathBuf> = whole.keys().collect();
        assert_eq!(whole.values().collect::<Vec<_>>(), [&image], "{command}: {paths:?}");
    }
}

#[test]
fn what_asks_for_too_much_memory_or_is_no_image_is_refused() {
    let image = content(9, 300_000);
    let huge_window = piped(
        "zstd -q --ultra -22 --long=31",
        &[image.clone(), vec![1; 200 << 20]].concat(),
    );
    let huge_dictionary = piped("xz --lzma2=preset=0,dict=1GiB", &image);
    for (bytes, part) in [
        (huge_window, "needs more memory than vmfold takes, which is 128.0 MiB"),
        (
            huge_dictionary,
            "needs more memory than vmfold takes, which is 128.0 MiB",
        ),
        (piped("gzip | gzip", &image), "it is compressed twice"),
        (piped("gzip", b"\x89vmfold\nand so on"), "an archive of vmfold"),
        (piped("gzip", b"LUKS\xba\xbe and so on"), "an encrypted volume"),
    ] {
        let text = read(&bytes).1.unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn a_raw_image_is_one_whatever_its_guest_wrote_to_its_beginning() {
    if !can_mount() {
        return;
    }
    let scene = Scene::new();
    // A guest made its disk look like an archive of Proxmox VE.
    sh(&format!(
        "cd '{}' && cp a.vma disk.raw && truncate -s +100K disk.raw && gzip -k disk.raw",
        scene.fs.mount.display()
    ));
    let expected = std::fs::read(scene.fs.mount.join("disk.raw")).unwrap();
    for source in ["disk.raw", "disk.raw.gz"] {
        let output = scene.import(&format!("{source} --to wrong-{source}"));
        assert_eq!(output.status.code(), Some(4), "{source}: {output:?}");
        scene.import_json(&format!("{source} --raw --to right-{source}"));
        let restored = scene.fs.mount.join(format!("right-{source}")).join("disk.raw");
        assert!(std::fs::read(restored).unwrap() == expected, "{source}");
    }
    let mut pipe = scene.fs.command();
    pipe.args(["import", "-", "--raw", "--to", "piped", "--index"])
        .arg(scene.fs.index());
    let image = std::fs::File::open(scene.fs.mount.join("disk.raw")).unwrap();
    let output = pipe.stdin(image).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(std::fs::read(scene.fs.mount.join("piped/stdin.img")).unwrap() == expected);
}
