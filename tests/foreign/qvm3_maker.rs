//! Makes backups in version 3 as qvm-backup of Qubes OS R2 to R3.2 does, with the tools that it runs.

use std::process::Command;

use crate::qvm::write_sparse;

/// Where a machine is, how `qubes.xml` tells it: its class, number and attributes; and what it holds.
pub(crate) type Machine = (
    &'static str,
    &'static str,
    u32,
    &'static str,
    Vec<(&'static str, Vec<u8>)>,
);

/// How a backup is made.
pub(crate) struct Maker {
    /// The program that compresses members, or `none`.
    pub(crate) filter: &'static str,
    /// Bytes of a part.
    pub(crate) bytes: u64,
    pub(crate) is_encrypted: bool,
    /// What parts are protected by.
    pub(crate) hash: &'static str,
}

impl Maker {
    pub(crate) fn new(filter: &'static str, bytes: u64, is_encrypted: bool) -> Self {
        Self {
            filter,
            bytes,
            is_encrypted,
            hash: "SHA512",
        }
    }

    /// Makes a backup of machines. A template's configuration has a second name there.
    pub(crate) fn make(&self, machines: &[Machine]) -> Vec<u8> {
        let folder = tempfile::tempdir().unwrap();
        let mut xml = String::from("<?xml version=\"1.0\"?><QubesVmCollection default_template=\"3\">");
        for (place, class, qid, more, files) in machines {
            let backup_path = if self.is_encrypted {
                format!("vm{qid}")
            } else {
                (*place).to_owned()
            };
            let (_, name) = place.split_once('/').unwrap();
            let element = format!(
                "<{class} backup_content=\"True\" backup_path=\"{backup_path}\" name=\"{name}\" qid=\"{qid}\" dir_path=\"/var/lib/qubes/{place}\" {more}/>"
            );
            xml += &element;
            for (name, content) in files {
                let path = folder.path().join(place).join(name);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                write_sparse(&path, content);
            }
            std::fs::write(folder.path().join(place).join(".qid"), qid.to_string()).unwrap();
        }
        xml += "<QubesAppVm name=\"other\" qid=\"9\" template_qid=\"3\"/>\
            <QubesAdminVm backup_content=\"True\" backup_path=\"dom0-home/user\" name=\"dom0\" qid=\"0\"/></QubesVmCollection>";
        std::fs::write(folder.path().join("qubes.xml"), xml).unwrap();
        let template = folder.path().join("vm-templates/fedora-20-x64");
        if template.exists() {
            std::fs::hard_link(template.join("fedora-20-x64.conf"), template.join("link.conf")).unwrap();
        }
        std::fs::create_dir_all(folder.path().join("dom0-home/user")).unwrap();
        std::fs::write(folder.path().join("dom0-home/user/.bashrc"), "umask 022\n").unwrap();
        let out = folder.path().join("backup");
        let output = Command::new("bash")
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/foreign/make-qvm-backup-3"))
            .arg(&out)
            .args([self.filter, &self.bytes.to_string()])
            .arg(folder.path())
            .arg(if self.is_encrypted { "yes" } else { "no" })
            .env("HASH", self.hash)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::read(out).unwrap()
    }
}
