//! What a file's name and place tell: Qubes OS file-reflink pools, Proxmox, libvirt.

use std::path::{Path, PathBuf};

/// What a file is, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An image or a revision.
    Image,
    /// The target of a Qubes import that is going on.
    Import,
    /// A Qubes volume that is made at start and removed at shutdown.
    Volatile,
    /// A file that the Qubes driver is writing and will rename or remove.
    Temporary,
}

/// File types that hold a disk, by their extension.
const EXTENSIONS: [&str; 10] = [
    "img", "raw", "qcow2", "qcow", "vmdk", "vdi", "vhd", "vhdx", "hdd", "iso",
];

/// Bytes from which a file without extension is taken for an image, as libvirt names them: smaller disks are not worth it.
const NAMELESS_BYTES_MIN: u64 = 16 << 20;

/// What a file is. Qubes names: qubes-core-admin, `qubes/storage/reflink.py`.
pub fn kind_of(path: &Path) -> Kind {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.contains(".img~") {
        Kind::Temporary
    } else if name.ends_with("-import.img") {
        Kind::Import
    } else if name == "volatile.img" || name == "volatile-dirty.img" {
        Kind::Volatile
    } else {
        Kind::Image
    }
}

/// Whether a file in a folder is an image: by extension, also before a revision's number (`private.img.7@…`) or a snapshot's
/// (`private.img.wyng1`), or, without any, by size.
pub(super) fn looks_like_image(path: &Path, size: u64) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let mut parts = name.split(['.', '@', '~']).skip(1).peekable();
    if parts.peek().is_none() {
        return size >= NAMELESS_BYTES_MIN && size.is_multiple_of(512);
    }
    parts.any(|part| EXTENSIONS.contains(&part))
}

/// What an image belongs to: the folder of a Qubes machine or of a Proxmox guest, or else the image alone.
pub fn machine_of(path: &Path) -> PathBuf {
    let is = |folder: &Path, names: &[&str]| {
        folder
            .file_name()
            .is_some_and(|name| names.iter().any(|known| name == std::ffi::OsStr::new(known)))
    };
    for folder in path.ancestors().skip(1) {
        let Some(above) = folder.parent() else { break };
        let number = folder
            .file_name()
            .is_some_and(|name| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()));
        if is(above, &["appvms", "vm-templates"]) || (number && is(above, &["images"])) {
            return folder.to_owned();
        }
    }
    path.to_owned()
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
