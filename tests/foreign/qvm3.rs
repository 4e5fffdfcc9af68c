//! Backups of Qubes OS in version 3, made with the tools that qvm-backup of R2 to R3.2 runs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmfold::foreign::{self, Passphrase};
use vmfold::monitor::Silent;
use vmfold::store::MemoryStore;

use super::common::Random;
use super::qvm3_maker::{Machine, Maker};
use super::{Notes, assert_nothing_wrong, content, open_options, piped, qvm, read, read_store};

fn machines() -> Vec<Machine> {
    let mut private = vec![0; 500_000];
    private[100_000..400_000].copy_from_slice(&content(41, 300_000));
    vec![
        (
            "appvms/work",
            "QubesAppVm",
            7,
            "template_qid=\"3\" private_img=\"private.img\" root_img=\"root.img\"",
            vec![
                ("private.img", private),
                ("firewall.xml", b"<firewall/>".to_vec()),
                ("apps.templates/editor.desktop", b"[Desktop Entry]\n".to_vec()),
                ("apps.templates/more/shell.desktop", b"[Desktop Entry]\n\n".to_vec()),
            ],
        ),
        (
            "appvms/windows",
            "QubesHVm",
            8,
            "template_qid=\"none\"",
            vec![("root.img", content(42, 200_000)), ("private.img", content(43, 512))],
        ),
        (
            "servicevms/firewallvm",
            "QubesProxyVm",
            2,
            "template_qid=\"3\"",
            vec![("private.img", vec![0; 20_000])],
        ),
        (
            "vm-templates/fedora-20-x64",
            "QubesTemplateVm",
            3,
            "template_qid=\"none\"",
            vec![
                ("root.img", content(44, 400_000)),
                ("private.img", vec![0; 50_000]),
                ("volatile.img", content(45, 100_000)),
                ("fedora-20-x64.conf", b"kernel\n".to_vec()),
                ("apps/editor.desktop", b"[Desktop Entry]\n".to_vec()),
            ],
        ),
    ]
}

/// What must come of them.
fn expected() -> BTreeMap<PathBuf, Vec<u8>> {
    let mut expected = BTreeMap::new();
    for (place, _, _, _, files) in machines() {
        let place = PathBuf::from(place.replace("servicevms", "appvms"));
        for (name, content) in files.into_iter().filter(|(name, _)| *name != "volatile.img") {
            expected.insert(place.join(name), content);
        }
    }
    let conf = expected[Path::new("vm-templates/fedora-20-x64/fedora-20-x64.conf")].clone();
    expected.insert("vm-templates/fedora-20-x64/link.conf".into(), conf);
    expected
}

#[test]
fn a_backup_comes_back_whatever_its_filter_its_parts_and_its_protection() {
    for maker in [
        Maker::new("gzip", 20_000, true),
        Maker::new("gzip", 20_000, false),
        Maker::new("bzip2", 20_000, true),
        Maker::new("bzip2", 20_000, false),
        Maker::new("none", 20_000, true),
        Maker::new("none", 20_000, false),
        Maker::new("xz", 104_857_600, true),
        Maker::new("lzma", 20_000, true),
        Maker {
            hash: "SHA256",
            ..Maker::new("gzip", 104_857_600, true)
        },
        Maker {
            hash: "sha384",
            ..Maker::new("gzip", 104_857_600, false)
        },
    ] {
        let what = format!("{} {} {} {}", maker.filter, maker.bytes, maker.is_encrypted, maker.hash);
        let backup = maker.make(&machines());
        let (notes, mut whole) = (Notes::default(), BTreeMap::new());
        read_store(&MemoryStore::of(backup), &[], &notes, &mut whole).unwrap_or_else(|error| panic!("{what}: {error}"));
        let expected = expected();
        assert!(whole == expected, "{what}: {:?}", whole.keys().collect::<Vec<_>>());
        let notes = notes.0.into_inner().unwrap().join("\n");
        for part in ["someone exchanged parts", "The home folder of dom0"] {
            assert!(notes.contains(part), "{what}: {notes}");
        }
    }
}

/// The oracle: what the project tells its users to do by hand, with the tools alone.
#[test]
fn the_emergency_procedure_reads_the_same_backups() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("backup"),
        Maker::new("gzip", 20_000, true).make(&machines()),
    )
    .unwrap();
    let procedure = format!(
        "set -e -o pipefail; cd '{}'; mkdir all out; tar -i -xf backup -C all; cd all
        for hash in $(find . -name '*.hmac'); do
          [ \"$(openssl dgst -sha512 -hmac secret < ${{hash%.hmac}})\" = \"$(cat $hash)\" ]
        done
        for member in vm7/private.img vm8/root.img vm3/.; do
          find ${{member%/*}} -maxdepth 1 -name \"${{member##*/}}.[0-9][0-9][0-9]\" | sort -V | xargs cat |
            openssl enc -d -aes-256-cbc -md MD5 -pass pass:secret 2>/dev/null | gzip -d | tar -x -C ../out
        done",
        folder.path().display()
    );
    piped(&procedure, b"");
    let expected = expected();
    for (from, to) in [
        ("vm7/private.img", "appvms/work/private.img"),
        ("vm8/root.img", "appvms/windows/root.img"),
        ("vm3/root.img", "vm-templates/fedora-20-x64/root.img"),
        (
            "vm3/apps/editor.desktop",
            "vm-templates/fedora-20-x64/apps/editor.desktop",
        ),
    ] {
        assert!(
            std::fs::read(folder.path().join("out").join(from)).unwrap() == expected[Path::new(to)],
            "{from}"
        );
    }
}

/// A file of the stream, as the tools write it.
fn file(name: &str, content: &[u8]) -> (String, Vec<u8>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, content).unwrap();
    let stream = piped(&format!("tar -cO --posix -C '{}' {name}", folder.path().display()), b"");
    let end = stream.iter().rposition(|byte| *byte != 0).unwrap() + 1;
    (name.to_owned(), stream[..end.next_multiple_of(512)].to_vec())
}

/// The hash of a file of the stream.
fn hash(name: &str, content: &[u8]) -> (String, Vec<u8>) {
    file(
        &format!("{name}.hmac"),
        &piped("openssl dgst -sha512 -hmac secret", content),
    )
}

fn assert_only_right(bytes: &[u8], part: &str, what: &str) {
    let (whole, result) = read(bytes);
    let text = result.expect_err(what).to_string();
    assert!(text.contains(part), "{what}: {text}");
    let expected = expected();
    for (path, content) in &whole {
        assert!(expected.get(path) == Some(content), "{what}: {}", path.display());
    }
}

#[test]
fn what_is_missing_is_found_and_named() {
    for (filter, is_encrypted) in [("gzip", true), ("none", true), ("gzip", false)] {
        let all = qvm::members(&Maker::new(filter, 20_000, is_encrypted).make(&machines()));
        assert!(read(&qvm::stream(&all)).1.is_ok());
        let (work, template) = if is_encrypted {
            ("vm7", "vm3")
        } else {
            ("appvms/work", "vm-templates/fedora-20-x64")
        };
        // Without a part goes its hash.
        let without = |is_dropped: &dyn Fn(&str) -> bool| {
            let kept = all
                .iter()
                .filter(|(name, _)| !is_dropped(name.trim_end_matches(".hmac")));
            qvm::stream(&kept.cloned().collect::<Vec<_>>())
        };
        let last = |begin: &str| {
            let part = all
                .iter()
                .rfind(|(name, _)| name.starts_with(begin) && name.strip_suffix(".hmac").is_none());
            part.unwrap().0.clone()
        };
        let (image, folder) = (format!("{work}/private.img."), format!("{template}/.."));
        let (last_of_image, last_of_folder) = (last(&image), last(&folder));
        assert!(!last_of_image.ends_with(".000") && !last_of_folder.ends_with(".001"));
        let middle = format!("{folder}001");
        for (bytes, part) in [
            (without(&|name| name == last_of_image), "in `appvms/work/private.img`"),
            (
                without(&|name| name == last_of_folder),
                "in `vm-templates/fedora-20-x64",
            ),
            (without(&|name| name == middle), "part 001 is missing, and 002 is there"),
            (
                without(&|name| name == format!("{folder}000")),
                "part 000 is missing, and 001 is there",
            ),
            (
                without(&|name| name.starts_with(&image)),
                "in `appvms/work/private.img`: it is not there, and its machine was backed up",
            ),
            (
                without(&|name| name.starts_with(&folder)),
                "in `vm-templates/fedora-20-x64/root.img`: it is not there, and its machine was backed up",
            ),
            (without(&|name| name == "qubes.xml.000"), "qubes.xml is missing"),
        ] {
            assert_only_right(&bytes, part, &format!("{filter} {is_encrypted} {part}"));
        }
        let alone = |dropped: &str| {
            let kept = all.iter().filter(|(name, _)| name != dropped);
            qvm::stream(&kept.cloned().collect::<Vec<_>>())
        };
        for (dropped, part) in [
            ("backup-header", "its backup-header is missing"),
            ("backup-header.hmac", "the hash of a part is missing"),
            (&*format!("{middle}.hmac"), "the hash of a part is missing"),
            (&*middle, "a name or a size that is not allowed"),
        ] {
            assert_only_right(&alone(dropped), part, dropped);
        }
        let twice = [all.clone(), all[2..4].to_vec()].concat();
        assert_only_right(&qvm::stream(&twice), "it has a member twice", "twice");
        let unknown = [
            all.clone(),
            vec![file("vm77/private.img.000", b""), hash("vm77/private.img.000", b"")],
        ]
        .concat();
        assert_only_right(
            &qvm::stream(&unknown),
            "a machine that its qubes.xml does not have",
            "unknown",
        );
    }
}

#[test]
fn empty_parts_may_follow_the_last_and_others_may_not() {
    let all = qvm::members(&Maker::new("gzip", 20_000, true).make(&machines()));
    let end = all
        .iter()
        .rposition(|(name, _)| name.starts_with("vm8/root.img."))
        .unwrap()
        + 1;
    let (count, begin) = (all[end - 1].0.as_str(), all[..end].to_vec());
    let number: u32 = count
        .trim_end_matches(".hmac")
        .rsplit_once('.')
        .unwrap()
        .1
        .parse()
        .unwrap();
    let with = |contents: &[&[u8]]| {
        let added = (number + 1..).zip(contents).flat_map(|(number, content)| {
            let name = format!("vm8/root.img.{number:03}");
            [file(&name, content), hash(&name, content)]
        });
        qvm::stream(&[begin.clone(), added.collect(), all[end..].to_vec()].concat())
    };
    for contents in [&[&b""[..]][..], &[b"", b""]] {
        let (whole, result) = read(&with(contents));
        result.unwrap();
        assert!(whole == expected());
    }
    for contents in [&[&b"more"[..]][..], &[b"", &[0; 16]]] {
        assert_only_right(&with(contents), "a part follows one that was the last", "more");
    }
}

#[test]
fn parts_that_were_exchanged_are_found_where_they_are_compressed() {
    let all = qvm::members(&Maker::new("gzip", 20_000, true).make(&machines()));
    // The content and the hash of a part get the names of another.
    let at = |name: &str| all.iter().position(|(one, _)| one == name).unwrap();
    let content_of = |name: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("one"), &all[at(name)].1).unwrap();
        piped(
            &format!("tar -xOf '{}/one' 2>/dev/null || true", folder.path().display()),
            b"",
        )
    };
    let swapped = |one: &str, other: &str| {
        let mut members = all.clone();
        for (to, from) in [(one, other), (other, one)] {
            for end in ["", ".hmac"] {
                let name = format!("{to}{end}");
                members[at(&name)] = file(&name, &content_of(&format!("{from}{end}")));
            }
        }
        qvm::stream(&members)
    };
    for (one, other) in [
        ("vm3/..001", "vm3/..002"),
        ("vm7/private.img.000", "vm8/private.img.000"),
        ("vm7/private.img.001", "vm3/..001"),
    ] {
        assert_only_right(&swapped(one, other), "", &format!("{one} {other}"));
    }
}

#[test]
fn a_damaged_backup_never_gives_a_wrong_byte() {
    let expected = expected();
    for maker in [Maker::new("gzip", 60_000, true), Maker::new("none", 60_000, false)] {
        let backup = maker.make(&machines());
        let mut random = Random(46);
        // Zeros at the end that belong to no part may be missing.
        let end = backup.iter().rposition(|byte| *byte != 0).unwrap();
        for round in 0..100 {
            let at = usize::try_from(random.below(end as u64)).unwrap();
            let cut = &backup[..at];
            if super::is_backup(cut) {
                let (whole, result) = read(cut);
                assert!(result.is_err(), "round {round}: cut at {at}");
                let mut whole = whole.iter();
                assert!(
                    whole.all(|(path, content)| expected.get(path) == Some(content)),
                    "cut at {at}"
                );
            }
        }
        // What is no zero is what is looked at: content, hashes and headers.
        let all: Vec<usize> = (0..end).filter(|at| backup[*at] != 0).collect();
        for round in 0..300 {
            let mut damaged = backup.clone();
            let at = match round % 3 {
                0 => usize::try_from(random.below(end as u64)).unwrap(),
                1 => all[usize::try_from(random.below(all.len() as u64)).unwrap()],
                _ => usize::try_from(random.below(20_480)).unwrap(),
            };
            damaged[at] ^= 1 << random.below(8);
            if super::is_backup(&damaged) {
                assert_nothing_wrong(
                    &damaged,
                    &expected,
                    &format!("{}: round {round}: byte {at}", maker.filter),
                );
            }
        }
    }
}

#[test]
fn a_flipped_bit_in_a_hash_a_part_or_the_header_is_found() {
    let backup = Maker::new("none", 60_000, false).make(&machines());
    let place = |text: &[u8]| backup.windows(text.len()).position(|window| window == text).unwrap();
    let part = place(b"vm-templates/fedora-20-x64/./root.img");
    for (at, problem) in [
        (part, "a part has another hash"),
        (
            place(b"es-256-cbc"),
            "the passphrase is another one, or its header is damaged",
        ),
        // The first hash is that of the header, behind what OpenSSL writes before it.
        (place(b"stdin)= ") + 20, ""),
    ] {
        let mut damaged = backup.clone();
        damaged[at] ^= 1;
        assert_only_right(&damaged, problem, &format!("byte {at}"));
    }
}

#[test]
fn a_wrong_passphrase_and_what_is_not_read_are_told() {
    let backup = Maker::new("gzip", 104_857_600, true).make(&machines());
    let open = |bytes: &[u8], passphrase: &'static str| {
        let (store, monitor) = (MemoryStore::of(bytes.to_vec()), Silent::default());
        let ask = || Ok(Passphrase::new(passphrase.into()));
        foreign::open(&store, &open_options(&ask), &monitor).map(drop)
    };
    assert!(open(&backup, "secret").is_ok());
    let text = open(&backup, "Secret").unwrap_err().to_string();
    assert!(
        text.contains("the passphrase is another one, or its header is damaged"),
        "{text}"
    );
    let all = qvm::members(&backup);
    for (header, problem) in [
        (
            "version=2\nhmac-algorithm=SHA512\n",
            "in version `2`, which is not read: see the emergency procedure",
        ),
        (
            "version=3\nhmac-algorithm=whirlpool\n",
            "it is protected by `whirlpool`, which is not read",
        ),
        (
            "version=3\nhmac-algorithm=SHA512\nencrypted=True\ncrypto-algorithm=bf-cbc\n",
            "it is encrypted by `bf-cbc`, which is not read",
        ),
        (
            "version=3\nhmac-algorithm=SHA512\nencrypted=False\ncompressed=True\ncompression-filter=sh\n",
            "it is compressed by `sh`",
        ),
        // The header tells that parts are not encrypted, and they are.
        (
            "version=3\nhmac-algorithm=SHA512\nencrypted=False\ncompressed=False\n",
            "",
        ),
        // They are encrypted, and not compressed.
        (
            "version=3\nhmac-algorithm=SHA512\nencrypted=True\ncrypto-algorithm=aes-256-cbc\ncompressed=False\n",
            "",
        ),
    ] {
        let mut changed = all.clone();
        changed[0] = file("backup-header", header.as_bytes());
        changed[1] = hash("backup-header", header.as_bytes());
        assert_only_right(&qvm::stream(&changed), problem, header);
    }
}

#[test]
fn it_is_listed_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("q"),
        Maker::new("gzip", 20_000, true).make(&machines()),
    )
    .unwrap();
    std::fs::write(folder.path().join("pass"), "secret\n").unwrap();
    let run = |verb: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(folder.path());
        let output = command.args([verb, "q", "--passphrase-file", "pass"]).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert!(output.status.success(), "{text}");
        text
    };
    let (listed, verified) = (run("list"), run("verify"));
    // Another name of a file is told by `list`.
    let paths = expected();
    for path in paths.keys().filter(|path| !path.ends_with("link.conf")) {
        let path = path.to_str().unwrap();
        assert!(listed.contains(path) && verified.contains(path), "{listed}{verified}");
    }
    assert!(!listed.contains("volatile.img") && !verified.contains("volatile.img"));
    assert!(verified.contains("whole, as far as its format tells"), "{verified}");
    assert!(verified.contains("someone exchanged parts"), "{verified}");
}
