//! Backups of Qubes OS in version 4, made with the tools that qvm-backup of R4.0 and later runs.

use super::*;

/// Two machines and a template, with something that is no image.
fn qubes_machines() -> Vec<Machine> {
    let mut private = vec![0; 700_000];
    private[300_000..400_000].copy_from_slice(&content(31, 100_000));
    vec![
        Machine {
            folder: "vm3",
            class: "TemplateVM",
            name: "debian-12",
            files: vec![("root.img", content(32, 400_000)), ("private.img", vec![0; 50_000])],
        },
        Machine {
            folder: "vm7",
            class: "AppVM",
            name: "work",
            files: vec![("private.img", private), ("firewall.xml", b"<firewall/>".to_vec())],
        },
    ]
}

pub(super) fn qubes_expected() -> BTreeMap<PathBuf, Vec<u8>> {
    let machines = qubes_machines().into_iter().flat_map(|machine| {
        let parent = if machine.class == "TemplateVM" {
            "vm-templates"
        } else {
            "appvms"
        };
        let path = move |file: &str| Path::new(parent).join(machine.name).join(file);
        machine
            .files
            .into_iter()
            .map(move |(file, content)| (path(file), content))
    });
    machines.collect()
}

/// A backup of these machines.
pub(super) fn qubes_backup(filter: &str, bytes: u64, tar_options: &str) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    qvm::write_machines(folder.path(), &qubes_machines());
    let out = folder.path().join("backup");
    qvm::make_backup(folder.path(), &out, filter, bytes, tar_options);
    std::fs::read(out).unwrap()
}

#[test]
fn a_backup_of_qubes_comes_back_whatever_its_filter_and_its_parts() {
    for (filter, bytes, tar_options) in [
        ("gzip", 20_000, "--sparse"),
        ("none", 20_000, "--sparse"),
        ("zstd", 104_857_600, "--sparse"),
        ("xz", 5000, "--sparse"),
        ("bzip2", 50_000, "--sparse"),
        ("lzma", 50_000, "--sparse"),
        // Pools on LVM.
        ("gzip", 20_000, "--format=posix --sparse"),
        ("gzip", 20_000, "--format=gnu"),
    ] {
        let backup = qubes_backup(filter, bytes, tar_options);
        let (whole, result) = read(&backup);
        result.unwrap_or_else(|error| panic!("{filter}: {error}"));
        assert!(
            whole == qubes_expected(),
            "{filter}: {:?}",
            whole.keys().collect::<Vec<_>>()
        );
    }
}

#[test]
fn what_is_missing_of_a_backup_of_qubes_is_found_and_named() {
    let backup = qubes_backup("gzip", 5000, "--sparse");
    let all = qvm::members(&backup);
    assert!(read(&qvm::stream(&all)).1.is_ok());
    let named = |name: &str| all.iter().position(|(one, _)| one == name).unwrap();
    let last_of = |member: &str| all.iter().rposition(|(one, _)| one.starts_with(member)).unwrap();
    let without = |at: &[usize]| {
        let kept = all.iter().enumerate().filter(|(place, _)| !at.contains(place));
        qvm::stream(&kept.map(|(_, one)| one.clone()).collect::<Vec<_>>())
    };
    let swapped = |one: usize, other: usize| {
        let mut members = all.clone();
        // The content changes places, and the headers do not.
        let (a, b) = (members[one].1.clone(), members[other].1.clone());
        let header = |bytes: &[u8]| {
            let at = bytes.windows(6).position(|window| window == b"scrypt").unwrap();
            bytes[..at].to_vec()
        };
        let body = |bytes: &[u8]| bytes[header(bytes).len()..].to_vec();
        members[one].1 = [header(&a), body(&b)].concat();
        members[other].1 = [header(&b), body(&a)].concat();
        qvm::stream(&members)
    };
    let root = "vm3/root.img.";
    let parts = all.iter().filter(|(name, _)| name.starts_with(root)).count();
    assert!(parts > 3, "{parts}");
    let all_of: Vec<usize> = (0..all.len()).filter(|at| all[*at].0.starts_with(root)).collect();
    for (what, bytes, part) in [
        (
            "the last part",
            without(&[last_of(root)]),
            "in `vm-templates/debian-12/root.img`",
        ),
        (
            "a middle part",
            without(&[named("vm3/root.img.001.enc")]),
            "part 001 is missing, and 002 is there",
        ),
        (
            "the first part",
            without(&[named("vm3/root.img.000.enc")]),
            "part 000 is missing, and 001 is there",
        ),
        (
            "all parts",
            without(&all_of),
            "in `vm-templates/debian-12/root.img`: it is not there, and its machine was backed up",
        ),
        (
            "the header",
            without(&[named("backup-header")]),
            "its backup-header is missing",
        ),
        (
            "qubes.xml",
            without(&[named("qubes.xml.000.enc")]),
            "qubes.xml is missing",
        ),
        (
            "the header's copy",
            without(&[named("backup-header.hmac")]),
            "its header is missing",
        ),
        (
            "parts in another order",
            swapped(named("vm3/root.img.000.enc"), named("vm3/root.img.001.enc")),
            "a part is not the one of its name",
        ),
        (
            "parts of two machines",
            swapped(named("vm3/root.img.000.enc"), named("vm7/private.img.000.enc")),
            "a part is not the one of its name",
        ),
        (
            "a member twice",
            qvm::stream(&[all.clone(), vec![all[last_of("vm7/firewall")].clone()]].concat()),
            "",
        ),
    ] {
        let (whole, result) = read(&bytes);
        let text = result.expect_err(what).to_string();
        assert!(text.contains(part), "{what}: {text}");
        let expected = qubes_expected();
        assert!(
            whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
            "{what}"
        );
    }
}

#[test]
fn a_damaged_backup_of_qubes_never_gives_a_wrong_byte() {
    let backup = qubes_backup("gzip", 60_000, "--sparse");
    let expected = qubes_expected();
    let mut random = Random(33);
    // Zeros at the end that belong to no part may be missing.
    let end = backup.iter().rposition(|byte| *byte != 0).unwrap();
    for round in 0..100 {
        let at = usize::try_from(random.below(end as u64)).unwrap();
        let cut = &backup[..at];
        if is_backup(cut) {
            let (whole, result) = read(cut);
            assert!(result.is_err(), "round {round}: cut at {at}");
            assert!(
                whole.iter().all(|(path, content)| expected.get(path) == Some(content)),
                "cut at {at}"
            );
        }
    }
    for round in 0..1000 {
        let mut damaged = backup.clone();
        let at = usize::try_from(random.below(end as u64)).unwrap();
        damaged[at] ^= 1 << random.below(8);
        if is_backup(&damaged) {
            assert_nothing_wrong(&damaged, &expected, &format!("round {round}: byte {at}"));
        }
    }
}

#[test]
fn a_wrong_passphrase_is_told_from_damage_and_forged_parameters_are_refused() {
    let backup = qubes_backup("gzip", 60_000, "--sparse");
    let open = |bytes: &[u8], passphrase: &'static str, kdf_memory_bytes: u64| {
        let (store, monitor) = (MemoryStore::of(bytes.to_vec()), Silent::default());
        let ask = || Ok(Passphrase::new(passphrase.into()));
        let mut options = open_options(&ask);
        options.limits.kdf_memory_bytes = Some(kdf_memory_bytes);
        foreign::open(&store, &options, &monitor).map(drop)
    };
    assert!(open(&backup, "secret", 1 << 30).is_ok());
    let text = open(&backup, "Secret", 1 << 30).unwrap_err().to_string();
    assert!(text.contains("the passphrase is another one"), "{text}");
    let text = open(&backup, "secret", 1 << 19).unwrap_err().to_string();
    assert!(
        text.contains("deriving its keys takes 1.0 MiB of memory, and 512.0 KiB are allowed: see --kdf-memory"),
        "{text}"
    );
    // The header's hash needs no key, so that anyone can forge it.
    let headers: Vec<usize> = (0..backup.len() - 6)
        .filter(|at| backup[*at..].starts_with(b"scrypt\0"))
        .collect();
    assert!(headers.len() > 5);
    for at in headers.into_iter().take(4) {
        for (log_n, r, p) in [
            (63u8, 8u32, 1u32),
            (10, 0x10000, 0x10000),
            (14, 8, 1 << 20),
            (22, 32, 1024),
            (10, 0, 0),
            (18, 8, 8),
        ] {
            let mut forged = backup.clone();
            forged[at + 7] = log_n;
            forged[at + 8..at + 12].copy_from_slice(&r.to_be_bytes());
            forged[at + 12..at + 16].copy_from_slice(&p.to_be_bytes());
            let hash = <sha2::Sha256 as sha2::Digest>::digest(&forged[at..at + 48]);
            forged[at + 48..at + 64].copy_from_slice(&hash[..16]);
            let (_, result) = read(&forged);
            assert!(result.is_err(), "{log_n} {r} {p}");
        }
    }
}
