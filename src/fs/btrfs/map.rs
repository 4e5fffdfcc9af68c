//! Reads what images map: file extents from their subvolumes' trees, reference counts from the extent tree, and other holders from back
//! references.

use std::collections::{BTreeSet, HashSet};

use super::holders::SubvolumeFile;
use super::{Btrfs, EXTENT_DATA, EXTENT_ITEM, EXTENT_TREE, ROOT_ITEM, ROOT_TREE};
use crate::block::BLOCK_BYTES;
use crate::error::{Error, Result};
use crate::facts::{Class, Collector, Compression, Extent, Facts, Mapping, PinReason, SharedList};
use crate::fs::opened::OpenImage;
use crate::fs::{BeyondEnd, ExtentReference, Filesystem, HeldRange, PoolMap, blocks, kernel};
use crate::numbers::{ExtentId, ImageId, Slot};
use crate::spill::{Budget, SpillVec};
use crate::sys::logical_ino;
use crate::sys::tree_search::{Key, MANY, tree_search};

/// A file extent item, `struct btrfs_file_extent_item` (`uapi/linux/btrfs_tree.h`).
#[derive(Debug, Clone, Copy)]
struct FileExtent {
    file_offset: u64,
    address: u64,
    disk_bytes: u64,
    ram_bytes: u64,
    offset: u64,
    length: u64,
    compression: Compression,
    preallocated: bool,
}

/// The kinds of a file extent item.
#[derive(Clone, Copy)]
enum Item {
    Data(FileExtent),
    Hole,
    Inline(u64),
}

/// Reads a little-endian `u64` of an item.
pub(super) fn number(item: &[u8], at: usize) -> Option<u64> {
    item.get(at..at + 8)?.try_into().ok().map(u64::from_le_bytes)
}

fn parse(file_offset: u64, item: &[u8]) -> std::result::Result<Item, &'static str> {
    const SHORT: &str = "a file extent item is too short";
    let [compression, encryption, encoding, encoding_high, kind] = *item.get(16..21).ok_or(SHORT)? else {
        return Err(SHORT);
    };
    if encryption != 0 || encoding != 0 || encoding_high != 0 {
        return Err("a file extent item has an unknown encoding");
    }
    let compression = match compression {
        0 => Compression::None,
        1 => Compression::Zlib,
        2 => Compression::Lzo,
        3 => Compression::Zstd,
        _ => return Err("a file extent item has an unknown compression"),
    };
    let ram_bytes = number(item, 8).ok_or(SHORT)?;
    if kind == 0 {
        return Ok(Item::Inline(ram_bytes));
    }
    let field = |at| number(item, at).ok_or(SHORT);
    let (address, disk_bytes, offset, length) = (field(21)?, field(29)?, field(37)?, field(45)?);
    if address == 0 {
        return Ok(Item::Hole);
    }
    let preallocated = kind == 2;
    // If an extent is not compressed, `ram_bytes` may be stale after it was split; its length on disk counts.
    let ram_bytes = if compression == Compression::None {
        disk_bytes
    } else {
        ram_bytes
    };
    let is_aligned = [file_offset, disk_bytes, ram_bytes, offset, length]
        .iter()
        .all(|number| number.is_multiple_of(BLOCK_BYTES));
    if !is_aligned || length == 0 || offset.checked_add(length).is_none_or(|end| end > ram_bytes) {
        return Err("a file extent item reaches beyond its extent");
    }
    Ok(Item::Data(FileExtent {
        file_offset,
        address,
        disk_bytes,
        ram_bytes,
        offset,
        length,
        compression,
        preallocated,
    }))
}

/// Calls `visit` with each file extent of an image.
fn file_extents(image: &OpenImage, mut visit: impl FnMut(Item) -> Result<()>) -> Result<()> {
    let key = |offset| Key {
        object: image.inode,
        kind: EXTENT_DATA,
        offset,
    };
    let mut problem = None;
    tree_search::<MANY>(&*image.file, 0, key(0), key(u64::MAX), |key, item| {
        let parsed = parse(key.offset, item);
        let result = parsed
            .map_err(|problem| Error::Metadata {
                path: image.known.path.clone(),
                problem: format!("{problem} at byte {}", key.offset),
            })
            .and_then(&mut visit);
        if let Err(error) = result {
            problem.get_or_insert(error);
        }
        None
    })
    .map_err(Error::io("read the extent map of", &image.known.path))?;
    problem.map_or(Ok(()), Err)
}

/// Returns the ranges of an image that refer to any of some extents, each with the extent's address.
pub(super) fn ranges_in(image: &OpenImage, addresses: &BTreeSet<u64>) -> Result<Vec<ExtentReference>> {
    let mut ranges = Vec::new();
    file_extents(image, |item| {
        if let Item::Data(extent) = item
            && addresses.contains(&extent.address)
        {
            let range = HeldRange {
                file_block: blocks(extent.file_offset)?,
                extent_block: blocks(extent.offset)?,
                blocks: blocks(extent.length)?,
                preallocated: extent.preallocated,
            };
            ranges.push(ExtentReference {
                address: extent.address,
                range,
            });
        }
        Ok(())
    })?;
    Ok(ranges)
}

/// An item of the extent tree, `struct btrfs_extent_item`.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExtentItem {
    references: u64,
    pub(super) generation: u64,
}

/// Parses an item of the extent tree; `None` if it is not a data extent's.
pub(super) fn extent_item(item: &[u8]) -> Option<ExtentItem> {
    const FLAG_DATA: u64 = 1;
    (number(item, 16)? & FLAG_DATA != 0).then_some(ExtentItem {
        references: number(item, 0)?,
        generation: number(item, 8)?,
    })
}

/// An extent as images refer to it, and the number of their references.
struct SeenExtent {
    extent: Extent,
    references: u64,
    /// The first image that refers to it.
    image: ImageId,
}

/// Merges what was seen of the same extent.
///
/// # Errors
/// Returns the image that disagrees with another one about an extent.
fn merge(seen: &mut SpillVec<SeenExtent>) -> std::result::Result<(), ImageId> {
    seen.sort_unstable_by_key(|seen| (seen.extent.address, seen.image));
    let mut result = Ok(());
    seen.dedup_by(|next, kept| {
        if next.extent.address != kept.extent.address {
            return false;
        }
        if (next.extent.disk_bytes, next.extent.blocks) != (kept.extent.disk_bytes, kept.extent.blocks) {
            result = Err(next.image);
        }
        kept.references += next.references;
        kept.extent.class.groups |= next.extent.class.groups;
        kept.extent.pinned = kept.extent.pinned.or(next.extent.pinned);
        true
    });
    result
}

/// Returns the extents that only one image refers to, and only beyond its end. `beyond` has the address of each extent that an image refers
/// to beyond its end, and the image.
fn beyond_ends(facts: &Facts, mut beyond: Vec<(u64, ImageId)>) -> Vec<BeyondEnd> {
    beyond.sort_unstable();
    beyond.dedup();
    let alone = beyond
        .chunk_by(|left, right| left.0 == right.0)
        .filter_map(|of_extent| {
            let [(address, image)] = of_extent else { return None };
            let place = facts
                .extents
                .binary_search_by_key(address, |extent| extent.address)
                .ok()?;
            let extent = &facts.extents[place];
            let is_mapped = facts.mappings_to(ExtentId::at(place)).next().is_some();
            let is_held = extent.pinned == Some(PinReason::HeldByOthers);
            (!is_mapped && !is_held).then_some(BeyondEnd {
                image: *image,
                disk_bytes: extent.disk_bytes,
            })
        });
    alone.collect()
}

/// What the items of images tell, before all extents are known.
struct Reading {
    seen: SpillVec<SeenExtent>,
    /// The number of seen extents from which duplicates are merged.
    merge_at: usize,
    /// The references of images, before all extents are known.
    references: Collector<ExtentReference>,
    inline_bytes: u64,
    inline: Vec<ImageId>,
    /// Extents that images refer to beyond their ends.
    beyond: Vec<(u64, ImageId)>,
}

impl Reading {
    /// The least number of seen extents that are merged at once.
    const WAITING_MIN: usize = 1 << 16;

    fn new_in(budget: &Budget) -> Self {
        Self {
            seen: SpillVec::new_in(budget),
            merge_at: Self::WAITING_MIN,
            references: Collector::new_in(budget),
            inline_bytes: 0,
            inline: Vec::new(),
            beyond: Vec::new(),
        }
    }

    /// Records an item of an image.
    fn take(&mut self, number: ImageId, image: &OpenImage, item: Item) -> Result<()> {
        let extent = match item {
            Item::Data(extent) => extent,
            Item::Hole => return Ok(()),
            Item::Inline(bytes) => {
                self.inline_bytes += bytes;
                self.inline.push(number);
                return Ok(());
            }
        };
        self.seen.push(SeenExtent {
            extent: Extent {
                address: extent.address,
                disk_bytes: extent.disk_bytes,
                generation: 0,
                first_slot: Slot::default(),
                blocks: blocks(extent.ram_bytes)?,
                class: Class {
                    checksummed: image.known.checksummed,
                    compression: extent.compression,
                    groups: 1 << image.group,
                },
                pinned: pinned(image, extent.file_offset + extent.length),
                compression_goal: None,
            },
            references: 1,
            image: number,
        });
        let image_end = end_of(image);
        if extent.file_offset >= image_end {
            self.beyond.push((extent.address, number));
            return Ok(());
        }
        let reference = ExtentReference {
            address: extent.address,
            range: HeldRange {
                file_block: blocks(extent.file_offset)?,
                extent_block: blocks(extent.offset)?,
                blocks: blocks(extent.length.min(image_end - extent.file_offset))?,
                preallocated: extent.preallocated,
            },
        };
        self.references.push(reference, number);
        Ok(())
    }
}

/// Returns the end of the last block of an image.
fn end_of(image: &OpenImage) -> u64 {
    image.known.size.next_multiple_of(BLOCK_BYTES)
}

/// Returns why an extent must stay, if an image that maps part of it up to byte `end` requires it.
fn pinned(image: &OpenImage, end: u64) -> Option<PinReason> {
    if image.fixed.is_some() {
        Some(PinReason::Fixed)
    } else if end > end_of(image) {
        // No call can reach what is preallocated beyond the end of a file.
        Some(PinReason::Preallocated)
    } else {
        // `FIDEDUPERANGE` shares the last, partial block of a file only with the last block of another.
        (end > image.known.size).then_some(PinReason::UnalignedTail)
    }
}

/// Assigns slots to the extents.
fn with_slots(seen: SpillVec<SeenExtent>) -> Result<SpillVec<Extent>> {
    let mut slot = Slot::default();
    let mut extents: SpillVec<Extent> = SpillVec::with_capacity_in(seen.len(), seen.budget());
    for mut extent in seen.into_iter().map(|seen| seen.extent) {
        extent.first_slot = slot;
        slot = slot.checked_add(extent.blocks).ok_or(Error::TooLarge)?;
        extents.push(extent);
    }
    Ok(extents)
}

/// Finds the extents that the references lead to.
fn mappings(references: SharedList<ExtentReference>, extents: &[Extent]) -> SharedList<Mapping> {
    let mut place = 0;
    references.flat_map(|ExtentReference { address, range }| {
        // Both are in the order of addresses.
        place += extents[place..].partition_point(|extent| extent.address < address);
        Some(Mapping {
            extent: ExtentId::at(place),
            slot: extents[place].first_slot + range.extent_block,
            file_block: range.file_block,
            blocks: range.blocks,
            preallocated: range.preallocated,
        })
    })
}

impl Btrfs {
    /// Reads the extent maps of all images.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the metadata cannot be read, [`Error::Metadata`] if it makes no sense, and [`Error::TooLarge`] if there are
    /// more blocks than slots.
    pub(super) fn read_map(&self, budget: &Budget) -> Result<PoolMap> {
        let disagree = |image: ImageId| Error::Metadata {
            path: self.path(image).to_owned(),
            problem: "items disagree about the length of an extent".into(),
        };
        let mut reading = Reading::new_in(budget);
        for (number, image) in ImageId::numbered(&self.opened.images) {
            file_extents(image, |item| reading.take(number, image, item))?;
            if reading.seen.len() >= reading.merge_at {
                merge(&mut reading.seen).map_err(disagree)?;
                reading.merge_at = Reading::WAITING_MIN.max(2 * reading.seen.len());
            }
        }
        merge(&mut reading.seen).map_err(disagree)?;
        self.count_references(&mut reading.seen, budget)?;
        let extents = with_slots(reading.seen)?;
        let mappings = mappings(reading.references.finish(), &extents);
        let mut facts = Facts::new(extents, mappings, self.function().of_zeros());
        facts.machines = self.opened.images.iter().map(|image| image.machine).collect();
        facts.partial_blocks = self.opened.partial_blocks();
        Ok(PoolMap {
            beyond: beyond_ends(&facts, reading.beyond),
            facts,
            inline_bytes: reading.inline_bytes,
            inline: reading.inline,
        })
    }

    /// Fills in generations, and pins the extents that something outside the pool refers to.
    fn count_references(&self, seen: &mut [SeenExtent], budget: &Budget) -> Result<()> {
        let (Some(first), Some(last)) = (seen.first(), seen.last()) else {
            return Ok(());
        };
        let key = |object, offset| Key {
            object,
            kind: EXTENT_ITEM,
            offset,
        };
        let (first, last) = (key(first.extent.address, 0), key(last.extent.address, u64::MAX));
        let mut at = 0;
        // An extent without an item is not understood, and is pinned.
        let mut total = SpillVec::of_in(u64::MAX, seen.len(), budget);
        self.search(EXTENT_TREE, first, last, |found, item| {
            while seen.get(at).is_some_and(|seen| seen.extent.address < found.object) {
                at += 1;
            }
            if let Some(seen) = seen.get_mut(at)
                && seen.extent.address == found.object
                && found.kind == EXTENT_ITEM
                && let Some(item) = extent_item(item)
            {
                seen.extent.generation = item.generation;
                total[at] = item.references;
                at += 1;
            }
            seen.get(at).map(|seen| key(seen.extent.address, 0))
        })?;
        let snapshots = self.have_snapshots()?;
        let cannot_tell = snapshots && kernel::misses_holders(kernel::release());
        let own_files = self.own_files();
        for (seen, total) in seen.iter_mut().zip(total) {
            if total > seen.references
                || cannot_tell
                || (snapshots && self.is_held_elsewhere(seen.extent.address, &own_files)?)
            {
                seen.extent.pinned = Some(PinReason::HeldByOthers);
            }
        }
        Ok(())
    }

    /// Whether a snapshot was ever taken of a subvolume that images lie in. Without snapshots, the extent tree counts every reference to an
    /// extent. With them, whole leaves of references may be shared and count only once.
    fn have_snapshots(&self) -> Result<bool> {
        /// The offset of `last_snapshot` in `struct btrfs_root_item`, after the inode item (160 bytes) and five numbers.
        const LAST_SNAPSHOT_AT: usize = 200;
        let roots: HashSet<u64> = self.opened.images.iter().map(|image| image.root).collect();
        let mut snapshots = false;
        for root in roots {
            let key = |offset| Key {
                object: root,
                kind: ROOT_ITEM,
                offset,
            };
            self.search(ROOT_TREE, key(0), key(u64::MAX), |_, item| {
                snapshots |= number(item, LAST_SNAPSHOT_AT).is_none_or(|transaction| transaction != 0);
                None
            })?;
        }
        Ok(snapshots)
    }

    /// Whether there are read-only snapshots of subvolumes that images lie in. They may be sources of `btrfs send`.
    pub(super) fn have_read_only_snapshots(&self) -> Result<bool> {
        /// The first and the last tree id of a subvolume (`BTRFS_FIRST_FREE_OBJECTID`, `BTRFS_LAST_FREE_OBJECTID`).
        const SUBVOLUMES: (u64, u64) = (256, u64::MAX - 255);
        /// The offsets of `flags`, `uuid` and `parent_uuid` in `struct btrfs_root_item`, and the flag `BTRFS_ROOT_SUBVOL_RDONLY`.
        const FLAGS_AT: usize = 208;
        const READ_ONLY: u64 = 1;
        const UUID_AT: usize = 247;
        const PARENT_AT: usize = 263;
        let key = |object, offset| Key {
            object,
            kind: ROOT_ITEM,
            offset,
        };
        let roots: HashSet<u64> = self.opened.images.iter().map(|image| image.root).collect();
        let (mut uuids, mut parents) = (HashSet::new(), HashSet::new());
        let (first, last) = (key(SUBVOLUMES.0, 0), key(SUBVOLUMES.1, u64::MAX));
        self.search(ROOT_TREE, first, last, |found, item| {
            let uuid = |at: usize| item.get(at..at + 16).map(<[u8]>::to_vec);
            if found.kind == ROOT_ITEM {
                if roots.contains(&found.object) {
                    uuids.extend(uuid(UUID_AT));
                }
                if number(item, FLAGS_AT).is_some_and(|flags| flags & READ_ONLY != 0) {
                    parents.extend(uuid(PARENT_AT));
                }
            }
            None
        })?;
        Ok(!uuids.is_disjoint(&parents))
    }

    /// Whether anything but the images refers to an extent. Where the kernel cannot tell, since the extent was freed meanwhile or has too
    /// many references to list, it counts as held.
    fn is_held_elsewhere(&self, address: u64, own_files: &HashSet<SubvolumeFile>) -> Result<bool> {
        match logical_ino::holders(self.opened.scratch.folder(), address) {
            Ok(Some(holders)) => Ok(holders.iter().any(|holder| !own_files.contains(&holder.into()))),
            Err(errno @ rustix::io::Errno::PERM) => Err(Error::io(
                "look for holders of extents of",
                self.opened.scratch.path(),
            )(errno)),
            Ok(None) | Err(_) => Ok(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns an item as the kernel lays it out.
    fn item(compression: u8, kind: u8, numbers: [u64; 4]) -> Vec<u8> {
        let mut item = [7u64.to_le_bytes(), 8192u64.to_le_bytes()].concat();
        item.extend([compression, 0, 0, 0, kind]);
        for number in numbers {
            item.extend(number.to_le_bytes());
        }
        item
    }

    #[test]
    fn items_that_make_no_sense_are_refused() {
        assert!(matches!(
            parse(0, &item(0, 1, [4096, 8192, 0, 8192])),
            Ok(Item::Data(_))
        ));
        assert!(matches!(parse(0, &item(0, 1, [0, 0, 0, 8192])), Ok(Item::Hole)));
        assert!(matches!(parse(0, &item(0, 0, [0; 4])), Ok(Item::Inline(8192))));
        // A stale `ram_bytes` of an uncompressed extent does not matter.
        assert!(matches!(
            parse(0, &item(0, 1, [4096, 16384, 8192, 8192])),
            Ok(Item::Data(FileExtent { ram_bytes: 16384, .. }))
        ));
        for bad in [
            item(9, 1, [4096, 8192, 0, 8192]),
            item(0, 1, [4096, 8192, 4096, 8192]),
            item(0, 1, [4096, 8192, u64::MAX - 4095, 8192]),
            item(0, 1, [4096, 8192, 0, 100]),
            vec![0; 20],
        ] {
            assert!(parse(0, &bad).is_err());
        }
    }

    proptest::proptest! {
        #[test]
        fn no_item_is_too_strange(offset: u64, bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..60)) {
            let _ = parse(offset, &bytes);
            let _ = extent_item(&bytes);
        }
    }
}
