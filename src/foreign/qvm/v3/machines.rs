//! The machines of a backup in version 3, as the `qubes.xml` of R2 to R3.2 describes them: an element for each, whose attributes say all
//! (qubes-core-admin, `core-modules/000QubesVm.py`).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use roxmltree::Node;

use crate::foreign::qvm::machines::{Machine, document_of, is_name};

/// Folders that machines are in.
const PARENTS: [&str; 3] = ["appvms", "servicevms", "vm-templates"];

/// The machines that a description says were backed up. Dom0 is none of them.
///
/// # Errors
/// Says what makes no sense.
pub(super) fn parse(xml: &str) -> Result<Vec<Machine>, String> {
    let document = document_of(xml)?;
    let elements = document.root_element().children().filter(Node::is_element);
    let mut machines: Vec<Machine> = Vec::new();
    let mut known = HashSet::new();
    for element in elements.filter(|element| element.attribute("backup_content") == Some("True")) {
        let folder = element.attribute("backup_path").unwrap_or_default();
        if element.attribute("qid") == Some("0") || folder.starts_with("dom0-home") {
            continue;
        }
        let folder = folder.trim_end_matches('/');
        if !is_folder(folder) {
            return Err("its qubes.xml has a machine in a folder that is not allowed".into());
        }
        let name = element.attribute("name").unwrap_or_default();
        if !is_name(name) {
            return Err("its qubes.xml has a machine with a name that is not allowed".into());
        }
        let parent = if is_template(element) { "vm-templates" } else { "appvms" };
        let machine = Machine {
            name: name.to_owned(),
            folder: folder.to_owned(),
            path: Path::new(parent).join(name),
            images: images_of(element),
        };
        // A folder of the backup may have the same name as one of a pool.
        if !known.insert((true, PathBuf::from(folder))) || !known.insert((false, machine.path.clone())) {
            return Err("its qubes.xml has two machines in the same folder, or of the same name".into());
        }
        machines.push(machine);
    }
    Ok(machines)
}

/// Whether machines may be in a folder of this name: `vm7` in encrypted backups, and in others the folder that the machine had.
pub(super) fn is_folder(folder: &str) -> bool {
    if let Some((parent, name)) = folder.split_once('/') {
        return PARENTS.contains(&parent) && is_name(name);
    }
    let number = folder.strip_prefix("vm").unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_template(element: Node<'_, '_>) -> bool {
    matches!(element.tag_name().name(), "QubesTemplateVm" | "QubesTemplateHVm")
}

/// The images that a backup of a machine has: what it keeps for itself, and the root of a template or of a machine without one.
fn images_of(element: Node<'_, '_>) -> Vec<&'static str> {
    let is_none = |name| {
        element
            .attribute(name)
            .is_some_and(|value| value.eq_ignore_ascii_case("none"))
    };
    let has_root = is_template(element) || is_none("template_qid");
    let images = [
        ("root.img", has_root && !is_none("root_img")),
        ("private.img", !is_none("private_img")),
    ];
    images
        .into_iter()
        .filter(|(_, is_there)| *is_there)
        .map(|(name, _)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xml(machines: &str) -> String {
        format!("<QubesVmCollection default_template=\"1\">{machines}</QubesVmCollection>")
    }

    fn machine(class: &str, name: &str, folder: &str, more: &str) -> String {
        format!("<{class} backup_content=\"True\" backup_path=\"{folder}\" name=\"{name}\" qid=\"7\" {more}/>")
    }

    #[test]
    fn machines_have_folders_and_images() {
        let machines = parse(&xml(&[
            machine(
                "QubesAppVm",
                "work",
                "vm7",
                "template_qid=\"1\" private_img=\"private.img\"",
            ),
            machine("QubesHVm", "windows", "appvms/windows", "template_qid=\"none\""),
            machine(
                "QubesTemplateVm",
                "fedora-20-x64",
                "vm-templates/fedora-20-x64",
                "template_qid=\"none\"",
            ),
            machine(
                "QubesProxyVm",
                "firewallvm",
                "servicevms/firewallvm",
                "template_qid=\"1\"",
            ),
            machine("QubesHVm", "old", "vm9", "template_qid=\"none\" private_img=\"None\""),
            "<QubesAppVm backup_content=\"False\" name=\"other\" qid=\"8\"/><QubesAppVm name=\"another\" qid=\"9\"/>"
                .into(),
            "<QubesAdminVm backup_content=\"True\" backup_path=\"dom0-home/user\" name=\"dom0\" qid=\"0\"/>".into(),
        ]
        .concat()))
        .unwrap();
        let found: Vec<(&str, &str, String)> = machines
            .iter()
            .map(|machine| {
                (
                    machine.folder.as_str(),
                    machine.path.to_str().unwrap(),
                    machine.images.join(" "),
                )
            })
            .collect();
        let expected = [
            ("vm7", "appvms/work", "private.img"),
            ("appvms/windows", "appvms/windows", "root.img private.img"),
            (
                "vm-templates/fedora-20-x64",
                "vm-templates/fedora-20-x64",
                "root.img private.img",
            ),
            ("servicevms/firewallvm", "appvms/firewallvm", "private.img"),
            ("vm9", "appvms/old", "root.img"),
        ];
        assert_eq!(
            found,
            expected.map(|(folder, path, images)| (folder, path, images.to_owned()))
        );
    }

    #[test]
    fn names_and_folders_that_lead_elsewhere_are_refused() {
        for (name, folder) in [
            ("../x", "vm7"),
            ("", "vm7"),
            ("dom0", "vm7"),
            ("a/b", "vm7"),
            (&"x".repeat(32)[..], "vm7"),
            ("work", "vm"),
            ("work", ""),
            ("work", "../vm7"),
            ("work", "appvms"),
            ("work", "appvms/"),
            ("work", "appvms/.."),
            ("work", "appvms/a/b"),
            ("work", "etc/work"),
            ("work", "/appvms/work"),
        ] {
            assert!(
                parse(&xml(&machine("QubesAppVm", name, folder, ""))).is_err(),
                "{name} {folder}"
            );
        }
        let two = |other: String| parse(&xml(&[machine("QubesAppVm", "work", "vm7", ""), other].concat()));
        assert!(two(machine("QubesAppVm", "work", "vm8", "")).is_err());
        assert!(two(machine("QubesAppVm", "other", "vm7", "")).is_err());
        assert!(two(machine("QubesTemplateVm", "work", "vm8", "")).is_ok());
    }
}
