//! `/proc/meminfo` and the limits of control groups: how much memory this process may use, and how much of that is available.

use std::path::Path;

/// Where version 2 of control groups is mounted (kernel: Documentation/admin-guide/cgroup-v2.rst).
const GROUPS: &str = "/sys/fs/cgroup";

/// A limit of memory, and how much of it is left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// The limit in bytes.
    pub total_bytes: u64,
    /// Bytes that can be used without swapping.
    pub available_bytes: u64,
}

/// Returns every limit that this process is under: the machine's memory, and the limits of its control group and the groups around it. The
/// list is empty where the kernel does not say.
pub fn limits() -> Vec<Memory> {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let Some(machine) = read(Path::new("/proc/meminfo")).and_then(|text| of_machine(&text)) else {
        return Vec::new();
    };
    let mut limits = vec![machine];
    let groups = read(Path::new("/proc/self/cgroup")).unwrap_or_default();
    // The groups around a group limit it as well.
    for group in group_of(&groups).into_iter().flat_map(Path::ancestors) {
        let folder = Path::new(GROUPS).join(group);
        if let (Some(max), Some(current)) = (read(&folder.join("memory.max")), read(&folder.join("memory.current"))) {
            limits.extend(of_group(&max, &current));
        }
    }
    limits
}

/// Parses `/proc/meminfo`.
fn of_machine(text: &str) -> Option<Memory> {
    let bytes = |name: &str| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
        kibibytes.checked_mul(1024)
    };
    Some(Memory {
        total_bytes: bytes("MemTotal")?,
        available_bytes: bytes("MemAvailable")?,
    })
}

/// Returns the path of the version 2 group in `/proc/self/cgroup`, relative to the root group.
fn group_of(text: &str) -> Option<&Path> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(path))
}

/// Parses `memory.max` and `memory.current`; returns `None` for a group without a limit. The group's page cache counts as used, so that
/// less is reported as available than could be reclaimed.
fn of_group(max: &str, current: &str) -> Option<Memory> {
    let total_bytes: u64 = max.trim().parse().ok()?;
    let used: u64 = current.trim().parse().ok()?;
    Some(Memory {
        total_bytes,
        available_bytes: total_bytes.saturating_sub(used),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: &str =
        "MemTotal:        4018328 kB\nMemFree:          112640 kB\nMemAvailable:    2097152 kB\nSwapTotal: 0 kB\n";

    #[test]
    fn meminfo_tells_what_is_available() {
        let expected = Memory {
            total_bytes: 4_018_328 << 10,
            available_bytes: 2 << 30,
        };
        assert_eq!(of_machine(MEMINFO), Some(expected));
    }

    #[test]
    fn meminfo_that_says_nothing_is_no_limit() {
        let huge = format!("MemTotal: 1 kB\nMemAvailable: {} kB\n", u64::MAX);
        let others = ["", "MemTotal: 1 kB\n", "MemTotal: 1 kB\nMemAvailable: some kB\n", &huge];
        assert_eq!(others.map(of_machine), [None; 4]);
    }

    #[test]
    fn a_group_has_the_limit_that_it_is_given() {
        let memory = |total_bytes, available_bytes| {
            Some(Memory {
                total_bytes,
                available_bytes,
            })
        };
        assert_eq!(of_group("1073741824\n", "73741824\n"), memory(1 << 30, 1_000_000_000));
        // The limit was lowered below the memory in use.
        assert_eq!(of_group("4096\n", "8192\n"), memory(4096, 0));
        assert_eq!(of_group("max\n", "8192\n"), None);
    }

    #[test]
    fn the_group_is_the_one_of_version_2() {
        let text = "4:memory:/other\n0::/system.slice/vmfold.service\n";
        assert_eq!(group_of(text), Some(Path::new("system.slice/vmfold.service")));
        assert_eq!(group_of("4:memory:/other\n"), None);
    }

    #[test]
    fn this_machine_has_memory() {
        let limits = limits();
        assert!(!limits.is_empty());
        assert!(limits[0].available_bytes <= limits[0].total_bytes);
    }
}
