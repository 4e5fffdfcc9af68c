//! Goal: a name is bytes, up to 255 of them and in no encoding, wherever one is taken. Method: pools, folders, archives and indexes of
//! such names on btrfs and XFS, through every command, and what is there afterwards compared byte by byte.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

mod common;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::{Mounted, Random, can_mount, sh};

/// As long as a name can be, in no encoding, with an escape sequence for terminals, and an end that is kept.
fn name(first: u8, end: &str) -> OsString {
    let mut bytes = vec![first, 0xff, 0xfe, b'\n', 0x1b, b'[', b'3', b'1', b'm'];
    bytes.resize(255 - end.len(), 0xc3);
    bytes.extend_from_slice(end.as_bytes());
    OsStr::from_bytes(&bytes).to_owned()
}

/// Runs vmfold, which must end well, and print nothing that a terminal obeys.
fn run(fs: &Mounted, arguments: &[&OsStr]) -> Output {
    let mut command: Command = fs.command();
    let output = command.args(arguments).output().unwrap();
    let said = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{arguments:?}: {text}");
    assert!(!said.contains(&0x1b), "{arguments:?}: {text}");
    output
}

fn content(folder: &Path) -> BTreeMap<PathBuf, blake3::Hash> {
    let entries = walkdir::WalkDir::new(folder).into_iter().map(Result::unwrap);
    let files = entries.filter(|entry| entry.file_type().is_file());
    files
        .map(|entry| {
            let below = entry.path().strip_prefix(folder).unwrap().to_owned();
            (below, blake3::hash(&std::fs::read(entry.path()).unwrap()))
        })
        .collect()
}

fn check(fs: &Mounted) {
    let [folder, machine] = [name(b'f', ""), name(b'm', "")];
    let pool = fs.mount.join(&folder);
    std::fs::create_dir_all(pool.join(&machine)).unwrap();
    let image = Random(1).data(2 << 20);
    for (at, path) in [
        pool.join(name(b'a', ".img")),
        pool.join(name(b'b', ".img")),
        pool.join(&machine).join(name(b'c', ".img")),
        pool.join(&machine).join("private.img"),
    ]
    .into_iter()
    .enumerate()
    {
        std::fs::write(&path, &image).unwrap();
        if at == 0 {
            std::fs::hard_link(&path, pool.join(&machine).join(name(b'd', ".img"))).unwrap();
        }
    }
    sh(&format!("sync -f {}", fs.mount.display()));
    let state = content(&pool);
    let [index, archive, to, list] = [name(b'i', ""), name(b'z', ".vmfold"), name(b't', ""), name(b'l', "")];
    let (pool_of, archive, to) = (folder.as_os_str(), archive.as_os_str(), to.as_os_str());
    let index = [OsStr::new("--index"), &index];
    let word = OsStr::new;
    for verb in [
        "report", "scan", "status", "reclaim", "export", "list", "diff", "verify", "import",
    ] {
        let mut arguments = vec![word(verb)];
        match verb {
            "diff" => arguments.extend([archive, word("--pool"), pool_of]),
            "export" => arguments.extend([archive, pool_of]),
            "status" => {}
            "list" | "verify" => arguments.push(archive),
            "import" => arguments.extend([archive, word("--to"), to]),
            _ => arguments.push(pool_of),
        }
        if !matches!(verb, "list" | "diff" | "verify") {
            arguments.extend(index);
        }
        for json in [false, true] {
            if verb == "import" && json {
                arguments.push(word("--replace"));
            }
            let mut arguments = arguments.clone();
            if json {
                arguments.push(word("--json"));
            }
            let output = run(fs, &arguments);
            if json {
                serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap();
            }
        }
        assert_eq!(content(&pool), state, "{verb}");
    }
    assert_eq!(content(&fs.mount.join(to)), state);
    // A list of paths is bytes as well, and a pattern matches what is no text.
    std::fs::write(fs.mount.join(&list), [pool_of.as_bytes(), b"\0"].concat()).unwrap();
    let listed = [word("reclaim"), word("--json"), word("--files-from"), list.as_os_str()];
    let done: serde_json::Value = serde_json::from_slice(&run(fs, &[&listed[..], &index].concat()).stdout).unwrap();
    assert_eq!(done["images"], 4, "{done}");
    let one = name(b'o', "");
    let chosen = [
        word("import"),
        archive,
        word("*/private.img"),
        word("--to"),
        one.as_os_str(),
    ];
    run(fs, &[&chosen[..], &index].concat());
    assert_eq!(content(&fs.mount.join(&one)).len(), 1);
    let left_out = [
        word("export"),
        word("part.vmfold"),
        pool_of,
        word("--exclude"),
        word("*/b*.img"),
    ];
    run(fs, &[&left_out[..], &index].concat());
    run(
        fs,
        &[
            &[word("import"), word("part.vmfold"), word("--to"), word("part")][..],
            &index,
        ]
        .concat(),
    );
    let mut without = state;
    without.remove(Path::new(&name(b'b', ".img")));
    assert_eq!(content(&fs.mount.join("part")), without);
}

#[test]
fn names_are_bytes_on_btrfs() {
    if can_mount() {
        check(&Mounted::btrfs());
    }
}

#[test]
fn names_are_bytes_on_xfs() {
    if can_mount() {
        check(&Mounted::new("mkfs.xfs -q -m reflink=1,rmapbt=1", "", 512));
    }
}
