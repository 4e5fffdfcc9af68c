//! Makes backups as qvm-backup of Qubes OS does, with the tools that it runs, and changes them.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::sh;

/// A machine of a backup.
pub(crate) struct Machine {
    pub(crate) folder: &'static str,
    pub(crate) class: &'static str,
    pub(crate) name: &'static str,
    /// Its images, and what else there is of it.
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
}

/// Writes what the maker of backups takes: `qubes.xml`, and a folder for each machine.
pub(crate) fn write_machines(folder: &Path, machines: &[Machine]) {
    let mut xml = String::from("<?xml version=\"1.0\"?><qubes><domains>");
    for Machine {
        folder: place,
        class,
        name,
        files,
    } in machines
    {
        let images = files.iter().filter_map(|(name, _)| name.strip_suffix(".img"));
        let volumes = images.map(|name| format!("<volume name=\"{name}\" save_on_stop=\"True\"/>"));
        let domain = format!(
            "<domain class=\"{class}\"><properties><property name=\"name\">{name}</property></properties>\
             <features><feature name=\"backup-content\">True</feature><feature name=\"backup-path\">{place}/</feature></features>\
             <volume-config>{}<volume name=\"volatile\" save_on_stop=\"False\"/></volume-config></domain>",
            volumes.collect::<String>()
        );
        xml += &domain;
        std::fs::create_dir_all(folder.join(place)).unwrap();
        for (name, content) in files {
            write_sparse(&folder.join(place).join(name), content);
        }
    }
    // A machine that was not backed up.
    xml.push_str("<domain class=\"AppVM\"><properties><property name=\"name\">other</property></properties></domain></domains></qubes>");
    std::fs::write(folder.join("qubes.xml"), xml).unwrap();
}

/// Writes a file with holes where it has blocks of zeros.
pub(crate) fn write_sparse(path: &Path, content: &[u8]) {
    let file = std::fs::File::create(path).unwrap();
    file.set_len(content.len() as u64).unwrap();
    let blocks = content.chunks(4096).enumerate();
    for (at, block) in blocks.filter(|(_, block)| block.iter().any(|byte| *byte != 0)) {
        std::os::unix::fs::FileExt::write_all_at(&file, block, at as u64 * 4096).unwrap();
    }
}

/// Makes a backup of such a folder, whose members are cut after so many bytes.
pub(crate) fn make_backup(folder: &Path, out: &Path, filter: &str, bytes: u64, tar_options: &str) {
    let maker = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/foreign/make-qvm-backup");
    let output = Command::new("bash")
        .arg(maker)
        .arg(out)
        .args([filter, &bytes.to_string()])
        .arg(folder)
        .args(tar_options.split_whitespace())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// The members of a backup's stream, each with its name and the bytes that it has there, headers included.
pub(crate) fn members(backup: &[u8]) -> Vec<(String, Vec<u8>)> {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("backup");
    std::fs::write(&path, backup).unwrap();
    let names = sh(&format!("tar -itf '{}' | sort -u -V", path.display()));
    let text = |header: &[u8]| String::from_utf8_lossy(header.split(|byte| *byte == 0).next().unwrap()).into_owned();
    let (mut found, mut at, mut begin) = (Vec::new(), 0, 0);
    while at < backup.len() {
        let header = &backup[at..at + 512];
        if header.iter().all(|byte| *byte == 0) {
            at += 512;
            continue;
        }
        let size = usize::from_str_radix(text(&header[124..136]).trim(), 8).unwrap();
        at += 512 + size.next_multiple_of(512);
        if header[156] == b'0' {
            found.push((text(&header[..100]), backup[begin..at].to_vec()));
            begin = at;
        } else {
            // What comes before a file belongs to it; zeros before that do not.
            begin = at - 512 - size.next_multiple_of(512);
        }
    }
    assert_eq!(found.len(), names.lines().count());
    found
}

/// A stream of such members.
pub(crate) fn stream(members: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut stream = Vec::new();
    for (_, bytes) in members {
        stream.extend(bytes);
        stream.resize(stream.len().next_multiple_of(10_240), 0);
    }
    stream
}
