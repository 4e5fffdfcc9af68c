//! Kernel releases on which sharing extents has known faults. The table for btrfs is that of bees, `docs/btrfs-kernel.md`.

use std::fs::File;
use std::io::Read;

/// A kernel's release, as (major, minor).
pub(super) type Release = (u32, u32);

/// How vmfold treats a kernel release.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The release has no known faults.
    Fine,
    /// Sharing extents may damage data or metadata.
    Refuse,
    /// Sharing extents works, with a fault that the user should know of.
    Warn(&'static str),
}

/// Returns the verdict on a release for XFS.
pub(super) fn with_xfs(release: Release) -> Verdict {
    // Until 4.20, blocks beyond the end of files could be shared (kernel commit dceeb47b0ed6).
    if release < (4, 20) {
        Verdict::Refuse
    } else {
        Verdict::Fine
    }
}

/// Returns the verdict on a release for btrfs.
pub(super) fn with_btrfs(release: Release) -> Verdict {
    match release {
        // Ranges at the end of files are truncated until 4.20; metadata and compressed extents can be corrupted until 5.3.
        (..=4, _) | (5, ..=3) => Verdict::Refuse,
        (5, 4..=6) => Verdict::Warn("looking for who holds an extent is slow on it"),
        (6, 10 | 11) => Verdict::Warn(
            "many changes of references at once can make it remount btrfs read-only (kernel commit 7d493a5ecc26); nothing is lost by that",
        ),
        _ => Verdict::Fine,
    }
}

impl Verdict {
    /// Returns a note for the user, if there is something to know.
    pub(super) fn note(self) -> Option<String> {
        match self {
            Self::Warn(fault) => Some(format!("This kernel has a known fault: {fault}")),
            Self::Fine | Self::Refuse => None,
        }
    }
}

/// Whether the kernel fails to report some holders of an extent: 6.2 and 6.3, fixed by kernel commit 0cad8f14d70c.
pub(super) fn misses_holders(release: Release) -> bool {
    matches!(release, (6, 2 | 3))
}

/// Returns the release of the running kernel.
pub(super) fn release() -> Release {
    let mut text = String::new();
    let _ = File::open("/proc/sys/kernel/osrelease").and_then(|mut file| file.read_to_string(&mut text));
    parse(&text)
}

fn parse(text: &str) -> Release {
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_with_known_faults() {
        for release in ["4.19.0-27-amd64", "5.3.18", "nonsense"] {
            assert_eq!(with_btrfs(parse(release)), Verdict::Refuse, "{release}");
        }
        for release in ["5.4.0", "5.6.19", "6.10.3-1.qubes", "6.11.0"] {
            assert!(matches!(with_btrfs(parse(release)), Verdict::Warn(_)), "{release}");
        }
        for release in ["5.10.0-30-amd64", "6.1.0", "6.6.54-1.qubes.fc37", "6.12.9", "7.0.1"] {
            assert_eq!(with_btrfs(parse(release)), Verdict::Fine, "{release}");
        }
        assert_eq!(with_xfs(parse("4.19.0-27-amd64")), Verdict::Refuse);
        assert_eq!(with_xfs(parse("5.3.18")), Verdict::Fine);
        assert!(misses_holders(parse("6.2.16")) && !misses_holders(parse("6.4.0")));
    }
}
