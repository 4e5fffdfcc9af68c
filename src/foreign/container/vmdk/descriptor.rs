//! The text that says what files a VMDK consists of.

/// What a descriptor begins with.
const BEGIN: &[u8] = b"# Disk DescriptorFile";

/// What a descriptor in a file of its own is refused with.
const NAMES_FILES: &str = "it is the descriptor of a VMDK, and what it names is not opened. A `-flat` file is a raw image: use that one. \
    Other disks must be converted into one file first";
const IS_SPLIT: &str =
    "it is the descriptor of a VMDK in several files (twoGbMaxExtent): convert it into one file first";
const IS_SNAPSHOT: &str =
    "it is the descriptor of a VMDK of the type seSparse or vmfsSparse: convert it into one file first";
const HAS_PARENT: &str = "it holds only what changed since another image, its parent: merge the two first";
const IS_PART: &str =
    "it is part of a VMDK in several files, or names other files: convert the disk into one file first";

/// Whether a file that begins with these bytes is a descriptor.
pub(in crate::foreign) fn is_descriptor(first: &[u8]) -> bool {
    first
        .get(..BEGIN.len())
        .is_some_and(|begin| begin.eq_ignore_ascii_case(BEGIN))
}

/// What a descriptor says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Descriptor {
    has_parent: bool,
    /// The type, in small letters.
    create_type: String,
    extents: usize,
    has_path: bool,
}

impl Descriptor {
    fn parse(text: &[u8]) -> Self {
        let mut descriptor = Self::default();
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        for line in text.split(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(line.trim_ascii());
            let word = line.split_ascii_whitespace().next().unwrap_or_default();
            if ["RW", "RDONLY", "NOACCESS"].contains(&word) {
                let name = line.split('"').nth(1).unwrap_or_default();
                descriptor.extents += 1;
                descriptor.has_path |= name.contains(['/', '\\']);
            } else if let Some((key, value)) = line.split_once('=')
                && !line.starts_with('#')
            {
                let value = value.trim().trim_matches('"').to_ascii_lowercase();
                match key.trim().to_ascii_lowercase().as_str() {
                    "parentcid" => descriptor.has_parent |= value != "ffffffff",
                    "parentfilenamehint" => descriptor.has_parent = true,
                    "createtype" => descriptor.create_type = value,
                    _ => {}
                }
            }
        }
        descriptor
    }
}

/// Why nothing is read of what begins with a descriptor, as far as these bytes of it tell.
pub(in crate::foreign) fn why_not_a_disk(first: &[u8]) -> &'static str {
    let descriptor = Descriptor::parse(first);
    match descriptor.create_type.as_str() {
        _ if descriptor.has_parent => HAS_PARENT,
        "twogbmaxextentsparse" | "twogbmaxextentflat" => IS_SPLIT,
        "sesparse" | "vmfssparse" => IS_SNAPSHOT,
        _ => NAMES_FILES,
    }
}

/// Why a disk is not read whose file has this descriptor inside, if that is so.
pub(super) fn why_not_alone(text: &[u8]) -> Option<&'static str> {
    let descriptor = Descriptor::parse(text);
    let is_one_file = ["", "monolithicsparse", "streamoptimized"].contains(&descriptor.create_type.as_str());
    if descriptor.has_parent {
        Some(HAS_PARENT)
    } else if !is_one_file || descriptor.extents > 1 || descriptor.has_path {
        Some(IS_PART)
    } else {
        None
    }
}

/// What a disk is refused with that has no descriptor inside.
pub(super) const WITHOUT: &str =
    "it is part of a VMDK in several files, whose descriptor is another file: convert the disk into one file first";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_in_several_files_are_refused_by_what_they_are() {
        let text = |create_type: &str, parent: &str, extents: &str| {
            format!(
                "# Disk DescriptorFile\r\nversion=1\r\nCID=1\r\nparentCID={parent}\r\ncreateType=\"{create_type}\"\r\n{extents}"
            )
        };
        for (create_type, parent, extents, is_alone) in [
            ("monolithicSparse", "ffffffff", "RW 8 SPARSE \"a.vmdk\"", true),
            ("streamOptimized", "FFFFFFFF", "RDONLY 8 SPARSE \"call me\"", true),
            ("monolithicSparse", "12345678", "RW 8 SPARSE \"a.vmdk\"", false),
            ("monolithicSparse", "ffffffff", "RW 8 SPARSE \"/etc/passwd\"", false),
            (
                "monolithicSparse",
                "ffffffff",
                "RW 8 FLAT \"a\" 0\nRW 8 FLAT \"b\" 0",
                false,
            ),
            ("monolithicFlat", "ffffffff", "RW 8 FLAT \"a-flat.vmdk\" 0", false),
            ("seSparse", "ffffffff", "RW 8 SESPARSE \"a.vmdk\"", false),
        ] {
            let text = text(create_type, parent, extents);
            assert!(is_descriptor(text.as_bytes()));
            assert_eq!(why_not_alone(text.as_bytes()).is_none(), is_alone, "{text}");
        }
        assert_eq!(
            why_not_a_disk(text("twoGbMaxExtentSparse", "ffffffff", "").as_bytes()),
            IS_SPLIT
        );
        assert_eq!(
            why_not_a_disk(text("monolithicFlat", "ffffffff", "").as_bytes()),
            NAMES_FILES
        );
        assert_eq!(why_not_a_disk(text("monolithicFlat", "1", "").as_bytes()), HAS_PARENT);
        assert!(!is_descriptor(b"# Disk"));
    }
}
