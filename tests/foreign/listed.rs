//! `list` and `verify` of backups.

use super::qvm4::qubes_backup;
use super::*;

#[test]
fn backups_are_listed_and_verified() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    std::fs::write(path("q"), qubes_backup("gzip", 5000, "--sparse")).unwrap();
    std::fs::write(path("v"), some_vma(3, 50).make()).unwrap();
    std::fs::write(path("i"), piped("gzip", &content(9, 300_000))).unwrap();
    std::fs::write(path("pass"), "secret\n").unwrap();
    std::fs::write(path("wrong"), "other\n").unwrap();
    let run = |arguments: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(folder.path()).stdin(Stdio::null());
        let output = command.args(arguments.split_whitespace()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let code = output.status.code().unwrap();
        format!(
            "{}--- stderr\n{}--- exit {code}",
            text(&output.stdout),
            text(&output.stderr)
        )
    };
    insta::assert_snapshot!(run("list q --passphrase-file pass"), @r#"
        `q`, a backup of Qubes OS: 4 images in 180.0 KiB
               Size         Data  Image
                  -            -  vm-templates/debian-12/private.img
                  -            -  vm-templates/debian-12/root.img
                  -            -  appvms/work/firewall.xml
                  -            -  appvms/work/private.img
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("verify q --passphrase-file pass"), @r#"
        `q`, a backup of Qubes OS: 4 images in 180.0 KiB, 444.0 KiB distinct: whole, as far as its format tells
               Size         Data  Image
           48.8 KiB          0 B  vm-templates/debian-12/private.img
          390.6 KiB    356.0 KiB  vm-templates/debian-12/root.img
               11 B      4.0 KiB  appvms/work/firewall.xml
          683.6 KiB     92.0 KiB  appvms/work/private.img
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("verify q --passphrase-file wrong"), @r#"
    --- stderr
    error: the backup `q` cannot be read: the passphrase is another one
    --- exit 1
    "#);
    insta::assert_snapshot!(run("verify q --passphrase-file v"), @r#"
    --- stderr
    error: `v` holds no passphrase: its first line is it, of 4096 bytes at most
    --- exit 2
    "#);
    insta::assert_snapshot!(run("list v"), @r#"
        `v`, an archive of Proxmox VE: 4 images in 1.0 MiB
               Size         Data  Image
          488.3 KiB            -  drive-scsi0.raw
          528.0 KiB            -  drive-efidisk0.raw
               17 B            -  drive-tpmstate0-backup.raw
               11 B            -  qemu-server.conf
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("verify v"), @r#"
        `v`, an archive of Proxmox VE: 4 images in 1.0 MiB, 944.0 KiB distinct: whole, as far as its format tells
               Size         Data  Image
          488.3 KiB    432.0 KiB  drive-scsi0.raw
          528.0 KiB    508.0 KiB  drive-efidisk0.raw
               17 B      4.0 KiB  drive-tpmstate0-backup.raw
               11 B      4.0 KiB  qemu-server.conf
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("verify i"), @r#"
        `i`, a compressed raw image: 1 image in 48.4 KiB, 280.0 KiB distinct: whole, as far as its format tells
               Size         Data  Image
          293.0 KiB    280.0 KiB  i.img
        --- stderr
        --- exit 0
    "#);
    insta::assert_snapshot!(run("list v 1"), @r#"
    --- stderr
    error: a backup that another program made has no commits: leave the commit out
    --- exit 2
    "#);
}

#[test]
fn verify_finds_that_the_last_part_of_an_image_is_missing() {
    let folder = tempfile::tempdir().unwrap();
    let whole = qubes_backup("gzip", 5000, "--sparse");
    let members = qvm::members(&whole);
    let last = members
        .iter()
        .rposition(|(name, _)| name.starts_with("vm3/root"))
        .unwrap();
    let kept = members
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != last)
        .map(|(_, one)| one.clone());
    std::fs::write(folder.path().join("cut"), qvm::stream(&kept.collect::<Vec<_>>())).unwrap();
    std::fs::write(folder.path().join("pass"), "secret").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
    command.env_clear().current_dir(folder.path());
    let output = command
        .args(["verify", "cut", "--passphrase-file", "pass"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(text.contains("in `vm-templates/debian-12/root.img`"), "{text}");
}
