//! `BTRFS_IOC_TREE_SEARCH_V2`: reads items of any btrfs tree, in key order.

use std::os::fd::AsFd;

use linux_raw_sys::btrfs::btrfs_ioctl_search_key;
use rustix::io::{Errno, Result};
use rustix::ioctl::{Opcode, Updater, ioctl};

const BTRFS_IOC_TREE_SEARCH_V2: Opcode = linux_raw_sys::ioctl::BTRFS_IOC_TREE_SEARCH_V2 as Opcode;
/// Buffer size for calls that return many items.
pub const MANY: usize = 256 << 10;
/// Buffer size for calls that return few items, since the kernel faults all of it in first. No item that vmfold looks for is longer than a
/// quarter of the largest leaf.
pub const FEW: usize = 16 << 10;
/// `struct btrfs_ioctl_search_header`: transid, objectid, offset, type, length.
const HEADER_BYTES: usize = 32;

#[repr(C)]
struct SearchArgs<const BYTES: usize> {
    key: btrfs_ioctl_search_key,
    buf_size: u64,
    buf: [u8; BYTES],
}

/// A key of a btrfs tree; keys are ordered by object, then type, then offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    /// The object that the item belongs to: an inode, a logical address, or the like.
    pub object: u64,
    /// The item's type.
    pub kind: u8,
    /// A number whose meaning depends on the type: a file offset, a length, or the like.
    pub offset: u64,
}

impl Key {
    fn successor(self) -> Option<Self> {
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Self { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_add(1) {
            return Some(Self {
                kind,
                offset: 0,
                ..self
            });
        }
        self.object.checked_add(1).map(|object| Self {
            object,
            kind: 0,
            offset: 0,
        })
    }
}

/// Calls `visit` with each item of tree `tree` from `first` to `last`, both included. Tree 0 is the subvolume that `fd` lies in.
///
/// `BYTES` is the size of the buffer: [`MANY`] or [`FEW`].
///
/// `visit` returns the key to continue from, or `None` for the next one: a caller that looks for few items in a large tree skips the
/// others.
///
/// # Errors
/// Returns `EPERM` without `CAP_SYS_ADMIN`, `ENOENT` if the tree does not exist, and `ENOTTY` on other filesystems.
pub fn tree_search<const BYTES: usize>(
    fd: impl AsFd,
    tree: u64,
    first: Key,
    last: Key,
    mut visit: impl FnMut(Key, &[u8]) -> Option<Key>,
) -> Result<()> {
    // SAFETY: the structure is plain integers, for which all zeros are valid; it is made on the heap by the allocator.
    let mut args = unsafe { Box::<SearchArgs<BYTES>>::new_zeroed().assume_init() };
    let mut next = Some(first);
    while let Some(from) = next.filter(|from| *from <= last) {
        args.key.tree_id = tree;
        (args.key.min_objectid, args.key.max_objectid) = (from.object, last.object);
        (args.key.min_type, args.key.max_type) = (u32::from(from.kind), u32::from(last.kind));
        (args.key.min_offset, args.key.max_offset) = (from.offset, last.offset);
        (args.key.min_transid, args.key.max_transid) = (0, u64::MAX);
        args.key.nr_items = u32::MAX;
        args.buf_size = BYTES as u64;
        // SAFETY: the opcode takes a pointer to this header, followed by `buf_size` bytes to write to.
        unsafe { ioctl(&fd, Updater::<BTRFS_IOC_TREE_SEARCH_V2, _>::new(&mut *args)) }?;
        if args.key.nr_items == 0 {
            return Ok(());
        }
        let (mut rest, mut reached, mut jump) = (&args.buf[..], from, None);
        for _ in 0..args.key.nr_items {
            let (key, data, after) = split_item(rest).ok_or(Errno::IO)?;
            (reached, rest) = (key, after);
            if jump.is_some_and(|to| key < to) {
                continue;
            }
            jump = visit(key, data);
        }
        next = jump.filter(|to| *to > reached).or_else(|| reached.successor());
    }
    Ok(())
}

#[expect(
    clippy::host_endian_bytes,
    reason = "the kernel hands the header over as a C structure"
)]
fn split_item(buffer: &[u8]) -> Option<(Key, &[u8], &[u8])> {
    let (header, rest) = buffer.split_at_checked(HEADER_BYTES)?;
    let u64_at = |at: usize| Some(u64::from_ne_bytes(header.get(at..at + 8)?.try_into().ok()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(header.get(at..at + 4)?.try_into().ok()?));
    let key = Key {
        object: u64_at(8)?,
        kind: u8::try_from(u32_at(24)?).ok()?,
        offset: u64_at(16)?,
    };
    let (data, rest) = rest.split_at_checked(u32_at(28)? as usize)?;
    Some((key, data, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn successor_carries_into_type_and_object() {
        let key = Key {
            object: 5,
            kind: 255,
            offset: u64::MAX,
        };
        assert_eq!(
            key.successor(),
            Some(Key {
                object: 6,
                kind: 0,
                offset: 0
            })
        );
        assert_eq!(
            Key {
                object: u64::MAX,
                ..key
            }
            .successor(),
            None
        );
    }
}
