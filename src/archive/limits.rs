//! The limits of what records of `formats/archive-v1.md` hold; those of records themselves are in `record`. Readers refuse what exceeds them; writers keep them.

use crate::block::BLOCK_BYTES;

/// Bytes of a PLAN's or LIST's payload, decoded.
pub const PAYLOAD_BYTES_MAX: usize = 4 << 20;
/// Bytes of a COMMIT's payload, decoded.
pub const COMMIT_PAYLOAD_BYTES_MAX: usize = 96 << 10;
/// Records of a file. What is known of each takes about 150 bytes of memory.
pub const RECORDS_MAX: usize = 1 << 20;
/// LISTs of a commit.
pub const LISTS_MAX: usize = 1024;
/// Other lanes that a commit names.
pub const OTHER_LANES_MAX: usize = 64;
/// Runs of a commit: 200 MB, which may lie in files.
pub const RUNS_MAX: usize = 1 << 24;
/// Images and folders of a commit.
pub const IMAGES_MAX: usize = 1 << 18;
/// Bytes of all names and attributes of a commit, each counting [`TEXT_OVERHEAD`] more than it has.
pub const TEXT_BYTES_MAX: usize = 64 << 20;
/// What a name or attribute counts for beside its bytes: what it takes in memory.
pub const TEXT_OVERHEAD: usize = 64;
/// Names of an image, and attributes of an image or folder.
pub const NAMES_MAX: usize = 65_535;
/// Bytes of an extended attribute's value.
pub const XATTR_BYTES_MAX: usize = 64 << 10;
/// Bytes of a path.
pub const PATH_BYTES_MAX: usize = 4096;
/// Bytes of a component of a path, and of an extended attribute's name.
pub const NAME_BYTES_MAX: usize = 255;
/// Bytes of the name of a user or group.
pub const OWNER_BYTES_MAX: usize = 256;
/// Bytes of a label, a root, a host and a writer.
pub const LABEL_BYTES_MAX: usize = 4096;
/// Ranges of addresses that a commit uses.
pub const USES_MAX: usize = 1 << 22;
/// Blocks of all stored runs of a commit: 256 TiB of data, whose digests take a quarter of an hour.
pub const STORED_RUNS_BLOCKS_MAX: u64 = 1 << 36;
/// PACKs, or INDEXes, that have a store address.
pub const LAYERS_MAX: usize = 16;
/// Blocks of a PACK, gaps included.
pub const PACK_BLOCKS_MAX: u32 = 1 << 18;
/// Bytes of an image.
pub const IMAGE_BYTES_MAX: u64 = ((1 << 32) - 1) * BLOCK_BYTES;
/// Fingerprints of a PLAN.
pub const ANNOUNCED_BLOCKS_MAX: usize = 1 << 19;
/// Blocks of a chunk.
pub const CHUNK_BLOCKS_MAX: u8 = 16;
/// Frames of a PACK.
pub const FRAMES_MAX: usize = 8192;
/// Blocks of a frame.
pub const FRAME_BLOCKS_MAX: u16 = 1024;
/// Hashes of an INDEX.
pub const INDEX_BLOCKS_MAX: usize = 1 << 18;
