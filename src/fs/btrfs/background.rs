//! What goes on inside a btrfs and holds extents for a while: subvolumes that were deleted and are not cleaned away yet, and balances.

use std::time::{Duration, Instant};

use super::ROOT_TREE;
use crate::monitor::Monitor;
use crate::shown::hex;
use crate::sys::beneath::Folder;
use crate::sys::commit::commit;
use crate::sys::tree_search::{FEW, Key, tree_search};

/// So long it is waited for the next deleted subvolume to be gone. One of some gigabytes takes a second or two.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOKS_EVERY: Duration = Duration::from_millis(100);

/// Waits for the kernel to clean away deleted subvolumes, as long as it goes on with that, and notes what is still in the way. Where the
/// filesystem is mounted read-only, nothing is cleaned, and nothing waited for.
pub(super) fn settle(folder: &Folder, uuid: [u8; 16], is_writable: bool, monitor: &dyn Monitor) {
    let mut left = deleted_subvolumes(folder);
    if left > 0 && is_writable {
        monitor.phase("Waiting for deleted subvolumes to be cleaned away", 0);
        // Also wakes the kernel's thread for it, which otherwise looks every 30 seconds.
        let _ = commit(folder);
        // Someone may keep one of them open: waiting is not to take all the time there is.
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

/// Subvolumes that have no name any more, and still hold what they held: each has an orphan item in the tree of roots
/// (kernel: `btrfs_insert_orphan_item`, called when one is deleted). What cannot be asked counts as none.
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

/// What moves extents about on a filesystem, as the kernel calls it: a balance, or the removal of a device. Kernels before 5.10 do not tell.
fn operation(uuid: [u8; 16]) -> Option<String> {
    let hex = hex(&uuid);
    let uuid = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    let text = std::fs::read_to_string(format!("/sys/fs/btrfs/{uuid}/exclusive_operation")).ok()?;
    let operation = text.trim();
    // One that is paused moves nothing.
    matches!(operation, "balance" | "device remove" | "resize").then(|| operation.to_owned())
}
