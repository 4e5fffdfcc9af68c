//! Finds the folders where Qubes OS keeps the images of its machines.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::{Error, Result};
use crate::shown::shown;

/// Folders of a file-reflink pool that hold images: those of machines, those of templates, and `modules.img` of kernels.
const FOLDERS: [&str; 3] = ["appvms", "vm-templates", "vm-kernels"];

/// The file with the machines and pools of Qubes OS, below the root folder.
const XML: &str = "var/lib/qubes/qubes.xml";

/// The limit of that file in bytes: it is enough for thousands of machines.
const XML_BYTES_MAX: u64 = 64 << 20;

/// Returns the folders of all file-reflink pools that `qubes.xml` below `root` lists, or else those that `qvm-pool` lists. `root` is where
/// dom0's root filesystem is mounted: `/`, unless in a rescue system.
///
/// # Errors
/// Returns [`Error::Usage`] if neither exists, if `qubes.xml` cannot be parsed, or if there is no file-reflink pool, and [`Error::Io`] if
/// the file cannot be read.
pub fn qubes_folders(root: &Path) -> Result<Vec<PathBuf>> {
    let path = root.join(XML);
    let pools = match path.metadata() {
        Ok(metadata) if metadata.len() <= XML_BYTES_MAX => {
            let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
            let pools = pools_in(&text)
                .map_err(|problem| Error::Usage(format!("cannot understand `{}`: {problem}", shown(&path))))?;
            pools.into_iter().map(|(_, folder)| folder).collect()
        }
        _ => pools_of_command().ok_or_else(|| {
            Error::Usage(format!(
                "there is no `{}` and no qvm-pool here: name the pool's folder instead of --qubes",
                shown(&path)
            ))
        })?,
    };
    let pools = pools
        .iter()
        .map(|pool| root.join(pool.strip_prefix("/").unwrap_or(pool)));
    let mut folders: Vec<PathBuf> = pools
        .flat_map(|pool| FOLDERS.map(|folder| pool.join(folder)))
        .filter(|folder| folder.is_dir())
        .collect();
    folders.sort();
    folders.dedup();
    if folders.is_empty() {
        return Err(Error::Usage(
            "Qubes OS has no file-reflink pool here: only those lie on btrfs or XFS".into(),
        ));
    }
    Ok(folders)
}

/// Returns the folders of the file-reflink pools of this host by their names, as far as `qubes.xml` tells.
pub(super) fn pools_of_this_machine() -> BTreeMap<String, PathBuf> {
    let path = Path::new("/").join(XML);
    let is_short = path.metadata().is_ok_and(|metadata| metadata.len() <= XML_BYTES_MAX);
    let text = is_short.then(|| std::fs::read_to_string(&path).ok()).flatten();
    let pools = text.and_then(|text| pools_in(&text).ok()).unwrap_or_default();
    pools
        .into_iter()
        .filter_map(|(name, folder)| Some((name?, folder)))
        .collect()
}

/// Returns the names and folders in `<pool driver="file-reflink" name="…" dir_path="…">` (qubes-core-admin, `qubes/storage/__init__.py`).
fn pools_in(text: &str) -> std::result::Result<Vec<(Option<String>, PathBuf)>, roxmltree::Error> {
    let document = roxmltree::Document::parse(text)?;
    let pools = document
        .descendants()
        .filter(|node| node.has_tag_name("pool") && node.attribute("driver") == Some("file-reflink"));
    Ok(pools
        .filter_map(|pool| {
            Some((
                pool.attribute("name").map(str::to_owned),
                pool.attribute("dir_path")?.into(),
            ))
        })
        .collect())
}

/// Returns the template of each machine of Qubes OS that has one, by name, as far as `qubes.xml` below `root` tells.
pub fn templates(root: &Path) -> BTreeMap<String, String> {
    let path = root.join(XML);
    let is_short = path.metadata().is_ok_and(|metadata| metadata.len() <= XML_BYTES_MAX);
    let text = is_short.then(|| std::fs::read_to_string(&path).ok()).flatten();
    text.and_then(|text| templates_in(&text).ok()).unwrap_or_default()
}

/// Returns the template of each machine in `<domain id="domain-5">`, by name. A property refers to its machine by `ref`, with the name, or in
/// some versions with the id (qubes-core-admin, `qubes/vm/__init__.py`).
fn templates_in(text: &str) -> std::result::Result<BTreeMap<String, String>, roxmltree::Error> {
    let document = roxmltree::Document::parse(text)?;
    let domains = || document.descendants().filter(|node| node.has_tag_name("domain"));
    let property = |domain: roxmltree::Node<'_, '_>, name: &str| {
        let is_it =
            |node: &roxmltree::Node<'_, '_>| node.has_tag_name("property") && node.attribute("name") == Some(name);
        let found = domain.descendants().find(is_it)?;
        let value = found.attribute("ref").or_else(|| found.text())?;
        Some(value.trim().to_owned())
    };
    let names: BTreeMap<&str, String> = domains()
        .filter_map(|domain| Some((domain.attribute("id")?, property(domain, "name")?)))
        .collect();
    let templates = domains().filter_map(|domain| {
        let template = property(domain, "template")?;
        let template = names.get(template.as_str()).cloned().unwrap_or(template);
        Some((property(domain, "name")?, template))
    });
    Ok(templates.filter(|(_, template)| !template.is_empty()).collect())
}

/// Returns the folders that `qvm-pool` lists; `None` if it cannot be run.
fn pools_of_command() -> Option<Vec<PathBuf>> {
    let output = |arguments: &[&str]| {
        let output = Command::new("qvm-pool").args(arguments).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let list = output(&["list"])?;
    let folders = reflink_pools(&list).filter_map(|name| folder_in(&output(&["info", name])?));
    Some(folders.collect())
}

/// Returns the names of file-reflink pools in the output of `qvm-pool list`, which has `NAME DRIVER` on each line.
fn reflink_pools(list: &str) -> impl Iterator<Item = &str> {
    list.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let name = words.next()?;
        (words.next() == Some("file-reflink")).then_some(name)
    })
}

/// Returns the folder in the output of `qvm-pool info`, which has `KEY VALUE` on each line.
fn folder_in(info: &str) -> Option<PathBuf> {
    let mut lines = info
        .lines()
        .filter_map(|line| line.trim().split_once(char::is_whitespace));
    lines
        .find(|(key, _)| *key == "dir_path")
        .map(|(_, folder)| PathBuf::from(folder.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_by_name() {
        let text = r#"<qubes><domains>
            <domain id="domain-1" class="TemplateVM"><properties><property name="name">debian-12</property></properties></domain>
            <domain id="domain-2" class="AppVM"><properties>
                <property name="name">work</property><property name="template" ref="domain-1"/></properties></domain>
            <domain id="domain-3" class="AppVM"><properties>
                <property name="name">vault</property><property name="template" ref="debian-12"/></properties></domain>
            </domains></qubes>"#;
        let pairs = ["vault", "work"].map(|machine| (machine.to_owned(), "debian-12".to_owned()));
        assert_eq!(templates_in(text).unwrap(), BTreeMap::from(pairs));
        assert!(templates_in("<qubes").is_err());
    }

    const DOCUMENT: &str = r#"<?xml version="1.0" encoding="utf-8"?>
        <qubes version="3.0"><pools>
          <pool driver="file-reflink" dir_path="/var/lib/qubes" name="varlibqubes" revisions_to_keep="1"/>
          <pool driver="linux-kernel" dir_path="/var/lib/qubes/vm-kernels" name="linux-kernel"/>
          <pool driver="lvm_thin" name="lvm" volume_group="qubes_dom0" thin_pool="vm-pool"/>
          <pool driver="file-reflink" dir_path="/mnt/second" name="second"/>
        </pools><domains/></qubes>"#;

    #[test]
    fn pools_of_the_right_driver() {
        assert_eq!(
            pools_in(DOCUMENT).unwrap(),
            [("varlibqubes", "/var/lib/qubes"), ("second", "/mnt/second")]
                .map(|(name, folder)| (Some(name.to_owned()), PathBuf::from(folder)))
        );
        assert!(pools_in("<qubes><pools>").is_err());
    }

    #[test]
    fn what_qvm_pool_says() {
        let list = "NAME          DRIVER\nvarlibqubes   file-reflink\nlinux-kernel  linux-kernel\nsecond        file-reflink\n";
        assert_eq!(reflink_pools(list).collect::<Vec<_>>(), ["varlibqubes", "second"]);
        let info = "name               second\ndir_path           /mnt/a b\ndriver             file-reflink\n";
        assert_eq!(folder_in(info), Some("/mnt/a b".into()));
        assert_eq!(folder_in("name  x\n"), None);
    }

    #[test]
    fn folders_below_another_root() {
        let root = tempfile::tempdir().unwrap();
        let below = |path: &str| root.path().join(path);
        std::fs::create_dir_all(below("var/lib/qubes/appvms")).unwrap();
        std::fs::create_dir_all(below("mnt/second/vm-templates")).unwrap();
        std::fs::write(below("var/lib/qubes/qubes.xml"), DOCUMENT).unwrap();
        assert_eq!(
            qubes_folders(root.path()).unwrap(),
            [below("mnt/second/vm-templates"), below("var/lib/qubes/appvms")]
        );
        std::fs::write(below("var/lib/qubes/qubes.xml"), "<qubes/>").unwrap();
        assert!(matches!(qubes_folders(root.path()), Err(Error::Usage(_))));
    }
}
