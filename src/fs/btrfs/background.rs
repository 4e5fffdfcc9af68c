//! Background work of a btrfs that holds extents for a while: the cleaning of deleted subvolumes, and balances.

use std::time::{Duration, Instant};

use super::ROOT_TREE;
use crate::monitor::Monitor;
use crate::shown::hex;
use crate::sys::beneath::Folder;
use crate::sys::commit::commit;
use crate::sys::tree_search::{FEW, Key, tree_search};

/// How long the run waits for the next deleted subvolume to be cleaned. One of some gigabytes takes a second or two.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOKS_EVERY: Duration = Duration::from_millis(100);

/// Waits for the kernel to clean deleted subvolumes for as long as it makes progress, and notes what is still in the way. On a read-only
/// mount nothing is cleaned, and there is no wait.
pub(super) fn settle(folder: &Folder, uuid: [u8; 16], is_writable: bool, monitor: &dyn Monitor) {
    let mut left = deleted_subvolumes(folder);
    if left > 0 && is_writable {
        monitor.phase("Waiting for deleted subvolumes to be cleaned away", 0);
        // A commit also wakes the kernel thread that cleans, which otherwise runs every 30 seconds.
        let _ = commit(folder);
        // Someone may keep a deleted subvolume open, so that the wait must not use up the time limit.
        let patience = monitor.time_left().map_or(PATIENCE, |left| PATIENCE.min(left / 8));
        let mut since = Instant::now();
        while left > 0 && since.elapsed() < patience && !monitor.interrupted() {
            std::thread::sleep(LOOKS_EVERY);
            let now = deleted_subvolumes(folder);
            if now < left {
                since = Instant::now();
            }
            left = now;
        }
    }
    if left > 0 {
        monitor.note(&format!(
            "Deleted subvolumes are not all cleaned away yet ({left} are left): what they hold is not freed before that. `btrfs subvolume sync` waits for it"
        ));
    }
    if let Some(operation) = operation(uuid) {
        monitor.note(&format!(
            "`{operation}` runs on this filesystem: what it moves at the moment is not freed. Run vmfold again when it is over"
        ));
    }
}

/// Returns the number of subvolumes that are deleted and not cleaned yet: each has an orphan item in the root tree (kernel:
/// `btrfs_insert_orphan_item`). An error counts as none.
fn deleted_subvolumes(folder: &Folder) -> usize {
    /// `BTRFS_ORPHAN_OBJECTID`: -5.
    const ORPHANS: u64 = u64::MAX - 4;
    const ORPHAN_ITEM: u8 = 48;
    let key = |offset| Key {
        object: ORPHANS,
        kind: ORPHAN_ITEM,
        offset,
    };
    let mut found = 0;
    let searched = tree_search::<FEW>(folder, ROOT_TREE, key(0), key(u64::MAX), |_, _| {
        found += 1;
        None
    });
    searched.map_or(0, |()| found)
}

/// Returns the operation that moves extents on a filesystem, as the kernel names it: a balance, the removal of a device, or a resize.
/// Kernels before 5.10 do not tell.
fn operation(uuid: [u8; 16]) -> Option<String> {
    let hex = hex(&uuid);
    let uuid = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    let text = std::fs::read_to_string(format!("/sys/fs/btrfs/{uuid}/exclusive_operation")).ok()?;
    let operation = text.trim();
    // A paused balance has another name, and moves nothing.
    matches!(operation, "balance" | "device remove" | "resize").then(|| operation.to_owned())
}
