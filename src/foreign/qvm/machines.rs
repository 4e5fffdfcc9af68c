//! The machines of a backup of Qubes OS, as its `qubes.xml` describes them (qubes-core-admin, `qubes/app.py`).

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use roxmltree::{Document, Node, ParsingOptions};

use crate::shown::shown;

/// Elements and texts of a `qubes.xml`.
const NODES_MAX: u32 = 1 << 20;
/// Bytes of an element's tag and the text behind it: the parser compares the attributes of an element pair by pair.
const ELEMENT_BYTES_MAX: usize = 16 << 10;
/// Bytes of a machine's name (`qubes.vm.validate_name`).
const NAME_BYTES_MAX: usize = 31;

/// Characters of what the parser says.
const PROBLEM_CHARS_MAX: usize = 200;

/// A machine that was backed up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Its name, of letters, digits, `_`, `.` and `-`.
    pub name: String,
    /// Its folder in the backup, such as `vm7`, or in version 3 also `appvms/work`.
    pub(super) folder: String,
    /// Its folder in a pool, such as `appvms/work`.
    pub path: PathBuf,
    /// The names of its images, which must be there: `root.img`, `private.img`.
    pub images: Vec<&'static str>,
}

/// The machines that a description says were backed up. Dom0 is none of them.
///
/// # Errors
/// Says what makes no sense.
pub fn machines_of(xml: &str) -> Result<Vec<Machine>, String> {
    let document = document_of(xml)?;
    let domains = document.descendants().filter(|node| node.has_tag_name("domain"));
    let mut machines: Vec<Machine> = Vec::new();
    let mut known = HashSet::new();
    for domain in domains {
        if value_of(domain, "features", "feature", "backup-content").is_none_or(|value| value != "True") {
            continue;
        }
        let folder = value_of(domain, "features", "feature", "backup-path")
            .unwrap_or_default()
            .trim_end_matches('/');
        if folder.starts_with("dom0-home") {
            continue;
        }
        let number = folder.strip_prefix("vm").filter(|number| !number.is_empty());
        if !number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit())) {
            return Err("its qubes.xml has a machine in a folder that is not allowed".into());
        }
        let name = value_of(domain, "properties", "property", "name").unwrap_or_default();
        if !is_name(name) {
            return Err("its qubes.xml has a machine with a name that is not allowed".into());
        }
        let parent = if domain.attribute("class") == Some("TemplateVM") {
            "vm-templates"
        } else {
            "appvms"
        };
        let machine = Machine {
            name: name.to_owned(),
            folder: folder.to_owned(),
            path: Path::new(parent).join(name),
            images: images_of(domain)?,
        };
        if !known.insert(PathBuf::from(folder)) || !known.insert(machine.path.clone()) {
            return Err("its qubes.xml has two machines in the same folder, or of the same name".into());
        }
        machines.push(machine);
    }
    Ok(machines)
}

/// Parses a description, within limits.
pub(super) fn document_of(xml: &str) -> Result<Document<'_>, String> {
    let mut elements = xml.split('<');
    // It has no namespaces, and finding out which of many is meant takes long.
    if xml.contains("xmlns") || elements.any(|element| element.len() > ELEMENT_BYTES_MAX) {
        return Err("its qubes.xml has elements that are not allowed".into());
    }
    let options = ParsingOptions {
        nodes_limit: NODES_MAX,
        ..ParsingOptions::default()
    };
    Document::parse_with_options(xml, options).map_err(|error| {
        // The parser tells what it found in the place of something else.
        let found: String = error.to_string().chars().take(PROBLEM_CHARS_MAX).collect();
        format!("its qubes.xml makes no sense: {}", shown(Path::new(&found)))
    })
}

/// The value of a child of a child, by its name.
fn value_of<'a>(domain: Node<'a, '_>, list: &str, item: &str, name: &str) -> Option<&'a str> {
    let lists = domain.children().filter(|node| node.has_tag_name(list));
    let mut items = lists
        .flat_map(|node| node.children())
        .filter(|node| node.has_tag_name(item));
    items.find(|node| node.attribute("name") == Some(name))?.text()
}

/// The images that a backup of a machine has: those of the volumes that are kept when it stops.
fn images_of(domain: Node<'_, '_>) -> Result<Vec<&'static str>, String> {
    let configs = domain.children().filter(|node| node.has_tag_name("volume-config"));
    let volumes = configs
        .flat_map(|node| node.children())
        .filter(|node| node.has_tag_name("volume"));
    let kept = volumes.filter(|volume| volume.attribute("save_on_stop") == Some("True"));
    kept.map(|volume| match volume.attribute("name") {
        Some("root") => Ok("root.img"),
        Some("private") => Ok("private.img"),
        _ => Err("its qubes.xml has a volume with a name that is not known".into()),
    })
    .collect()
}

/// Whether a machine may have this name.
pub fn is_name(name: &str) -> bool {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-');
    name.len() <= NAME_BYTES_MAX
        && name.starts_with(|first: char| first.is_ascii_alphabetic())
        && name.bytes().all(is_allowed)
        && !name.ends_with("-dm")
        && !["none", "Domain-0", "dom0"].contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xml(name: &str, folder: &str, more: &str) -> String {
        format!(
            "<qubes><domains><domain class=\"AppVM\"><properties><property name=\"name\">{name}</property></properties>\
             <features><feature name=\"backup-content\">True</feature><feature name=\"backup-path\">{folder}</feature></features>\
             <volume-config><volume name=\"private\" save_on_stop=\"True\"/><volume name=\"root\" save_on_stop=\"False\"/></volume-config>\
             </domain>{more}</domains></qubes>"
        )
    }

    #[test]
    fn machines_have_folders_and_images() {
        let others =
            "<domain class=\"AppVM\"><properties><property name=\"name\">other</property></properties></domain>";
        let machines = machines_of(&xml("work", "vm7/", others)).unwrap();
        let expected = Machine {
            name: "work".into(),
            folder: "vm7".into(),
            path: "appvms/work".into(),
            images: vec!["private.img"],
        };
        assert_eq!(machines, [expected]);
        assert_eq!(machines_of("<qubes/>").unwrap(), []);
    }

    #[test]
    fn names_and_folders_that_lead_elsewhere_are_refused() {
        for (name, folder) in [
            ("../x", "vm7/"),
            ("", "vm7/"),
            ("dom0", "vm7/"),
            ("a/b", "vm7/"),
            (&"x".repeat(32)[..], "vm7/"),
            ("work", "vm/"),
            ("work", "../vm7/"),
            ("work", "vm7/../vm8"),
            ("work", ""),
        ] {
            assert!(machines_of(&xml(name, folder, "")).is_err(), "{name} {folder}");
        }
        let twice = machines_of(&xml(
            "work",
            "vm7/",
            xml("work", "vm8/", "")
                .trim_start_matches("<qubes><domains>")
                .split("</domains>")
                .next()
                .unwrap(),
        ));
        assert!(twice.is_err());
        assert!(machines_of("<!DOCTYPE a [<!ENTITY b \"c\">]><qubes>&b;</qubes>").is_err());
        assert!(machines_of("<qubes>").is_err());
        let long = format!("<{0}></a{0}>", "x".repeat(9000));
        for xml in ["<qubes/\u{1b}", "<qubes a=\u{1b}", long.as_str()] {
            let problem = machines_of(xml).unwrap_err();
            assert!(
                problem.len() < 300 && !problem.chars().any(char::is_control),
                "{problem:?}"
            );
        }
        assert!(machines_of("<qubes xmlns:a=\"b\"/>").is_err());
        let many: Vec<String> = (0..5000).map(|number| format!(" a{number}=\"\"")).collect();
        assert!(machines_of(&format!("<qubes{}/>", many.concat())).is_err());
    }
}
