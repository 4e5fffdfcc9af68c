//! Interprets the names and places of files: Qubes OS file-reflink pools, Proxmox, libvirt.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The kind of a file, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// An image or a revision.
    Image,
    /// The target of a Qubes import that is in progress.
    Import,
    /// A Qubes volume that is created when its machine starts, and removed when it shuts down.
    Volatile,
    /// A file that the Qubes driver or an import of vmfold writes, and then renames or removes.
    Temporary,
}

/// Extensions of disk images.
const EXTENSIONS: [&str; 10] = [
    "img", "raw", "qcow2", "qcow", "vmdk", "vdi", "vhd", "vhdx", "hdd", "iso",
];

/// The least size of a file without extension, as libvirt names images, that counts as an image; sharing smaller ones is not worthwhile.
const NAMELESS_BYTES_MIN: u64 = 16 << 20;

/// Returns the kind of a file. The names are those of Qubes OS: qubes-core-admin, `qubes/storage/reflink.py`.
pub fn kind_of(path: &Path) -> FileKind {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    // The driver removes files that match `*.img*~*`.
    let is_temporary = name.split_once(".img").is_some_and(|(_, end)| end.contains('~'));
    if is_temporary || is_of_import(path) {
        FileKind::Temporary
    } else if name.ends_with("-import.img") {
        FileKind::Import
    } else if name == "volatile.img" || name == "volatile-dirty.img" {
        FileKind::Volatile
    } else {
        FileKind::Image
    }
}

/// Whether an import writes, or has left behind, a file: `.vmfold-0123456789abcdef~`, a file in the work folder
/// `.vmfold-import-01234567-1` or anywhere below `.vmfold-qubes-01234567-89abcdef`, and `.NAME.vmfold-import` of earlier versions.
fn is_of_import(path: &Path) -> bool {
    let is_hex = |digits: &[u8], length: usize| digits.len() == length && digits.iter().all(u8::is_ascii_hexdigit);
    let is_work = |folder: &Path| {
        let tag = folder
            .file_name()
            .and_then(|name| name.as_bytes().strip_prefix(b".vmfold-import-"));
        let mut parts = tag.into_iter().flat_map(|tag| tag.splitn(2, |byte| *byte == b'-'));
        parts.next().is_some_and(|tag| is_hex(tag, 8))
            && parts.next().is_some_and(|number| number.iter().all(u8::is_ascii_digit))
    };
    let is_qubes_work = |folder: &Path| {
        let tag = folder
            .file_name()
            .and_then(|name| name.as_bytes().strip_prefix(b".vmfold-qubes-"));
        tag.is_some_and(|tag| tag.len() == 17 && tag[8] == b'-' && is_hex(&tag[..8], 8) && is_hex(&tag[9..], 8))
    };
    let name = path.file_name().unwrap_or_default().as_bytes();
    let digits = name.strip_prefix(b".vmfold-").and_then(|rest| rest.strip_suffix(b"~"));
    let is_of_earlier_version =
        name.starts_with(b".") && (name.ends_with(b".vmfold-import") || name.ends_with(b".vmfold-link"));
    digits.is_some_and(|digits| is_hex(digits, 16))
        || is_of_earlier_version
        || path.parent().is_some_and(is_work)
        || path.ancestors().skip(1).any(is_qubes_work)
}

/// Returns the volume that a file of a Qubes pool belongs to, by the beginning of its name: `private` for `private-dirty.img` and for
/// `private.img.7@…`. It is `None` for other names.
pub(super) fn volume_of(path: &Path) -> Option<&[u8]> {
    let name = path.file_name()?.as_bytes();
    let end = name.windows(4).position(|part| part == b".img")?;
    let volume = &name[..end];
    let ends: [&[u8]; 3] = [b"-dirty", b"-precache", b"-import"];
    Some(ends.iter().find_map(|end| volume.strip_suffix(*end)).unwrap_or(volume))
}

/// Returns the name of the image that a `-dirty.img` is a newer state of.
pub(super) fn clean_of(dirty: &OsStr) -> Option<OsString> {
    let volume = dirty.as_bytes().strip_suffix(b"-dirty.img")?;
    Some(OsString::from_vec([volume, b".img"].concat()))
}

/// A revision of an image, as its name describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revision {
    /// The image that it is a revision of.
    pub image: PathBuf,
    /// Its number, which grows with each revision; `None` in the old form of names.
    pub number: Option<u64>,
    /// The time when it was made, as in the name: `2026-01-02T03:04:05Z`.
    pub time: String,
}

/// Parses the name of a revision: `private.img.7@2026-01-02T03:04:05Z`, or the old form `private.img@2026-01-02T03:04:05Z`.
pub fn revision_of(path: &Path) -> Option<Revision> {
    let name = path.file_name()?.to_str()?;
    let is_img = |name: &str| Path::new(name).extension().is_some_and(|extension| extension == "img");
    let (before, time) = name.rsplit_once('@')?;
    let digits_at = |range: std::ops::Range<usize>| {
        time.get(range)
            .is_some_and(|part| part.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let is_time = time.len() == 20
        && [0..4, 5..7, 8..10, 11..13, 14..16, 17..19].into_iter().all(digits_at)
        && time.bytes().enumerate().all(|(at, byte)| match at {
            4 | 7 => byte == b'-',
            10 => byte == b'T',
            13 | 16 => byte == b':',
            19 => byte == b'Z',
            _ => true,
        });
    let (image, number) = match before.rsplit_once('.') {
        Some((image, number)) if is_img(image) => (image, Some(number.parse().ok()?)),
        _ => (before, None),
    };
    (is_time && is_img(image)).then(|| Revision {
        image: path.with_file_name(image),
        number,
        time: time.to_owned(),
    })
}

/// Whether a file in a folder is an image. It is one by its extension, which may stand before a revision's number (`private.img.7@…`) or a
/// snapshot's (`private.img.wyng1`). Without an extension, it is one by its size.
pub fn looks_like_image(path: &Path, size: u64) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut parts = name.split(['.', '@', '~']).skip(1).peekable();
    if parts.peek().is_none() {
        return size >= NAMELESS_BYTES_MIN && size.is_multiple_of(512);
    }
    parts.any(|part| EXTENSIONS.contains(&part))
}

/// Returns the machine that an image belongs to: the folder of a Qubes machine or of a Proxmox guest, or else the image itself.
pub fn machine_of(path: &Path) -> PathBuf {
    let is_named = |folder: &Path, names: &[&str]| {
        folder
            .file_name()
            .is_some_and(|name| names.iter().any(|known| name == std::ffi::OsStr::new(known)))
    };
    for folder in path.ancestors().skip(1) {
        let Some(above) = folder.parent() else { break };
        let number = folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
        if is_named(above, &["appvms", "vm-templates"]) || (number && is_named(above, &["images"])) {
            return folder.to_owned();
        }
    }
    path.to_owned()
}

/// Returns what an image is counted with: its machine, as [`machine_of`] has it, and for a revision of an image that is a machine of its own,
/// that image.
pub fn owner_of(path: &Path) -> PathBuf {
    let machine = machine_of(path);
    match revision_of(path) {
        Some(revision) if machine == path => revision.image,
        _ => machine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_of_known_layouts() {
        let machine = |path: &str| machine_of(Path::new(path)).display().to_string();
        assert_eq!(
            machine("/var/lib/qubes/appvms/work/private.img"),
            "/var/lib/qubes/appvms/work"
        );
        assert_eq!(
            machine("/var/lib/vz/images/100/vm-100-disk-0.raw"),
            "/var/lib/vz/images/100"
        );
        assert_eq!(
            machine("/mnt/images/101/vm-101-disk-0@snap/disk.raw"),
            "/mnt/images/101"
        );
        assert_eq!(
            machine("/var/lib/libvirt/images/debian.qcow2"),
            "/var/lib/libvirt/images/debian.qcow2"
        );
    }

    #[test]
    fn a_revision_belongs_to_its_image() {
        let owner = |path: &str| owner_of(Path::new(path)).display().to_string();
        assert_eq!(owner("/i/a.img.2@2026-01-02T03:04:05Z"), "/i/a.img");
        assert_eq!(owner("/i/a.img"), "/i/a.img");
        assert_eq!(
            owner("/p/appvms/work/private.img.2@2026-01-02T03:04:05Z"),
            "/p/appvms/work"
        );
    }

    #[test]
    fn names_of_revisions() {
        let revision = |name: &str| revision_of(Path::new(name));
        let time = "2026-01-02T03:04:05Z".to_owned();
        let image = PathBuf::from("a/private.img");
        assert_eq!(
            revision("a/private.img.7@2026-01-02T03:04:05Z"),
            Some(Revision {
                image: image.clone(),
                number: Some(7),
                time: time.clone()
            })
        );
        assert_eq!(
            revision("a/private.img@2026-01-02T03:04:05Z"),
            Some(Revision {
                image,
                number: None,
                time
            })
        );
        for none in [
            "a/private.img",
            "private.img.x@2026-01-02T03:04:05Z",
            "private.img.7@2026",
            "x@2026-01-02T03:04:05Z",
        ] {
            assert_eq!(revision(none), None, "{none}");
        }
    }

    #[test]
    fn what_the_driver_is_writing() {
        for name in [
            "private.img~abc",
            "private.img.77@2026-01-02T03:04:05Z~k3jx9q",
            "private-dirty.img~x",
            ".vmfold-0123456789abcdef~",
            ".private.img.vmfold-import",
            ".root.img.vmfold-link",
            "a/.vmfold-import-0123abcd-12/blocks",
            "a/.vmfold-qubes-0123abcd-4567ef89/images/appvms/work/private.img",
        ] {
            assert_eq!(kind_of(Path::new(name)), FileKind::Temporary, "{name}");
        }
        for name in [
            "private.img",
            "a~b.img",
            "private.img.77@2026-01-02T03:04:05Z",
            "private.img.vmfold-partial",
            ".vmfold-0123456789abcde~",
            "a/.vmfold-import/blocks",
            "a/.vmfold-qubes-0123abcd/images/private.img",
        ] {
            assert_eq!(kind_of(Path::new(name)), FileKind::Image, "{name}");
        }
        assert_eq!(clean_of(OsStr::new("root-dirty.img")), Some("root.img".into()));
        assert_eq!(clean_of(OsStr::new("root.img")), None);
    }

    #[test]
    fn names_of_images() {
        for name in [
            "a.img",
            "a.img.7@2026-01-02T03:04:05Z",
            "root.img@2018-01-01T00:00:00Z",
            "a.IMG.wyng1",
            "disk.raw",
            "x.qcow2",
            "base-100-disk-0.raw",
        ] {
            assert!(looks_like_image(Path::new(name), 4096), "{name}");
        }
        for name in ["a.xml", "img", "a.txt", "a.imgx"] {
            assert!(!looks_like_image(Path::new(name), 4096), "{name}");
        }
        assert!(looks_like_image(Path::new("debian12"), 1 << 30));
    }
}
