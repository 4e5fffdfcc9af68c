//! The header of a qcow2 image, and its table of snapshots. All numbers are big-endian.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::foreign::array;
use crate::foreign::random::RandomInput;
use crate::shown::shown;

/// Length of the header of version 2.
const HEADER_BYTES_V2: usize = 72;
/// Length of the header of version 3 without the fields that came later.
const HEADER_BYTES_V3: usize = 104;
/// Where version 3 says how clusters are compressed, if its header goes that far.
const COMPRESSION_AT: usize = 104;

/// Powers of two of a cluster's bytes.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// The same, if clusters are divided: a subcluster has as many bytes as the smallest cluster.
const DIVIDED_CLUSTER_BITS: std::ops::RangeInclusive<u32> = 14..=21;

/// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// The header extension that says what the backing file is.
const BACKING_FORMAT: u32 = 0xe279_2aca;

/// Limits of QEMU: entries of an L1 table (32 MiB of them), bytes of a name, bytes of what a snapshot has in addition.
const L1_ENTRIES_MAX: u32 = (32 << 20) / 8;
const BACKING_NAME_BYTES_MAX: u32 = 1023;
const FORMAT_BYTES_MAX: usize = 15;
const EXTRA_BYTES_MAX: u32 = 1024;

/// A state of the disk: where its L1 table is, and its size in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct DiskState {
    pub(super) l1_at: u64,
    pub(super) l1_entries: u32,
    pub(super) size: u64,
}

/// What an image says of its backing file.
#[derive(Debug, Clone)]
pub(super) struct Backing {
    name: Vec<u8>,
    /// What it is, where the image says it.
    pub(super) format: Option<Vec<u8>>,
}

impl Backing {
    /// Its name, for messages.
    pub(super) fn shown_name(&self) -> String {
        shown(Path::new(OsStr::from_bytes(&self.name))).to_string()
    }
}

/// An internal snapshot.
#[derive(Debug)]
pub(super) struct Snapshot {
    pub(super) disk: DiskState,
    pub(super) time: FileTime,
    /// The name that the user gave it, or else its id.
    pub(super) name: Vec<u8>,
}

/// What the header says.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) cluster_bits: u32,
    /// Whether clusters are divided into 32 subclusters.
    pub(super) is_divided: bool,
    /// Whether an entry of an L2 table can say that a cluster is zeros.
    pub(super) has_zero_clusters: bool,
    /// Whether clusters are compressed by zstd, and not by deflate.
    pub(super) is_zstd: bool,
    pub(super) disk: DiskState,
    pub(super) backing: Option<Backing>,
    snapshots: u32,
    snapshots_at: u64,
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

/// The error for a field of the header.
fn wrong(input: RandomInput<'_>, at: u64, length: u64, problem: &str) -> Error {
    input.damaged(at, length, None, problem)
}

/// What version 3 adds.
struct Features {
    header_bytes: usize,
    is_divided: bool,
    is_zstd: bool,
}

impl Features {
    /// Those of a header, of which `head` are the first bytes.
    fn read(input: RandomInput<'_>, version: u32, head: &[u8]) -> Result<Self> {
        if version == 2 {
            return Ok(Self {
                header_bytes: HEADER_BYTES_V2,
                is_divided: false,
                is_zstd: false,
            });
        }
        let bits = be64(head, 72);
        let unknown = bits & !(DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION | EXTENDED_L2);
        if unknown != 0 {
            let bit = unknown.trailing_zeros();
            return Err(input.refused(format!("it has a feature that is not known (bit {bit})")));
        }
        if bits & CORRUPT != 0 {
            return Err(input.refused("it is marked as corrupt: qemu-img check -r all repairs it"));
        }
        if bits & EXTERNAL_DATA != 0 {
            return Err(input.refused("its data lies in another file, which is not read"));
        }
        if bits & DIRTY != 0 {
            input.note(&format!(
                "`{}` was not closed: its machine runs, or ended all of a sudden",
                shown(input.path())
            ));
        }
        let header_bytes = be32(head, 100) as usize;
        if header_bytes < HEADER_BYTES_V3 || !header_bytes.is_multiple_of(8) {
            return Err(wrong(input, 100, 4, "its header has a length that is not allowed"));
        }
        let compression = if header_bytes > COMPRESSION_AT {
            head[COMPRESSION_AT]
        } else {
            0
        };
        if compression > 1 {
            return Err(input.refused(format!(
                "its clusters are compressed in a way that is not known ({compression})"
            )));
        }
        if (compression != 0) != (bits & COMPRESSION != 0) {
            let problem = "its header says two things of how clusters are compressed";
            return Err(wrong(input, COMPRESSION_AT as u64, 1, problem));
        }
        Ok(Self {
            header_bytes,
            is_divided: bits & EXTENDED_L2 != 0,
            is_zstd: compression == 1,
        })
    }
}

impl Header {
    /// Reads the header of an image.
    pub(super) fn read(input: RandomInput<'_>) -> Result<Self> {
        let mut head = vec![0; HEADER_BYTES_V2];
        input.exact_at(0, &mut head, None)?;
        let version = be32(&head, 4);
        match version {
            2 => {}
            3 => {
                // Up to the end of the last field that matters, which older images do not have.
                let length = input.length().clamp(HEADER_BYTES_V3 as u64, 112);
                head.resize(usize::try_from(length).unwrap_or_default(), 0);
                input.exact_at(0, &mut head, None)?;
                head.resize(112, 0);
            }
            1 => return Err(input.refused("it is a qcow image of version 1, which is not read")),
            other => return Err(input.refused(format!("it is a qcow2 image of version {other}, which is not known"))),
        }
        match be32(&head, 32) {
            0 => {}
            1 => return Err(input.refused("it is encrypted (AES), and nothing of it can be shared")),
            2 => return Err(input.refused("it is encrypted (LUKS), and nothing of it can be shared")),
            other => return Err(input.refused(format!("it is encrypted in a way that is not known ({other})"))),
        }
        let features = Features::read(input, version, &head)?;
        let cluster_bits = be32(&head, 20);
        let allowed = if features.is_divided {
            DIVIDED_CLUSTER_BITS
        } else {
            CLUSTER_BITS
        };
        if !allowed.contains(&cluster_bits) {
            return Err(wrong(input, 20, 4, "its clusters have a size that is not allowed"));
        }
        if features.header_bytes > 1 << cluster_bits {
            return Err(wrong(input, 100, 4, "its header is longer than a cluster"));
        }
        let disk = DiskState {
            l1_at: be64(&head, 40),
            l1_entries: be32(&head, 36),
            size: be64(&head, 24),
        };
        if disk.l1_entries > L1_ENTRIES_MAX {
            return Err(wrong(
                input,
                36,
                4,
                "its table of the first level is longer than any may be",
            ));
        }
        Ok(Self {
            cluster_bits,
            is_divided: features.is_divided,
            has_zero_clusters: version >= 3,
            is_zstd: features.is_zstd,
            disk,
            backing: backing(input, &head, cluster_bits, features.header_bytes)?,
            snapshots: be32(&head, 60),
            snapshots_at: be64(&head, 64),
        })
    }

    /// Reads the snapshots, in the order of their table.
    pub(super) fn snapshots(&self, input: RandomInput<'_>) -> Result<Vec<Snapshot>> {
        let limits = input.limits();
        if self.snapshots as usize >= limits.volumes {
            let count = self.snapshots;
            return Err(input.refused(format!("it has {count} snapshots, which is more than vmfold takes")));
        }
        let (mut snapshots, mut at) = (Vec::new(), self.snapshots_at);
        for _ in 0..self.snapshots {
            let (snapshot, end) = self.snapshot(input, at)?;
            snapshots.push(snapshot);
            if end - self.snapshots_at > limits.name_bytes as u64 {
                return Err(input.refused("the names of its snapshots are longer than vmfold takes"));
            }
            at = end;
        }
        Ok(snapshots)
    }

    /// Reads the snapshot whose entry begins at an offset. Returns where the next one begins.
    fn snapshot(&self, input: RandomInput<'_>, at: u64) -> Result<(Snapshot, u64)> {
        let mut fixed = [0; 40];
        input.exact_at(at, &mut fixed, None)?;
        let wrong = |problem| wrong(input, at, 40, problem);
        let (id_bytes, name_bytes) = (array::<2>(&fixed, 12), array::<2>(&fixed, 14));
        let (id_bytes, name_bytes) = (u16::from_be_bytes(id_bytes), u16::from_be_bytes(name_bytes));
        let extra_bytes = be32(&fixed, 36);
        if extra_bytes > EXTRA_BYTES_MAX {
            return Err(wrong("a snapshot has more beside it than any may have"));
        }
        let l1_entries = be32(&fixed, 8);
        if l1_entries > L1_ENTRIES_MAX {
            return Err(wrong("the table of a snapshot is longer than any may be"));
        }
        let (extra_bytes, id_bytes, name_bytes) = (extra_bytes as usize, id_bytes as usize, name_bytes as usize);
        let mut rest = vec![0; extra_bytes + id_bytes + name_bytes];
        // The fixed part was read, so that its end is no overflow.
        input.exact_at(at + 40, &mut rest, None)?;
        let (id, name) = rest[extra_bytes..].split_at(id_bytes);
        let snapshot = Snapshot {
            disk: DiskState {
                l1_at: be64(&fixed, 0),
                l1_entries,
                // Images of version 2 may not say it; their disks had one size only.
                size: if extra_bytes >= 16 {
                    be64(&rest, 8)
                } else {
                    self.disk.size
                },
            },
            time: FileTime {
                seconds: i64::from(be32(&fixed, 16)),
                nanoseconds: Some(be32(&fixed, 20))
                    .filter(|part| *part < 1_000_000_000)
                    .unwrap_or_default(),
            },
            name: if name.is_empty() { id } else { name }.to_vec(),
        };
        let end = at + 40 + rest.len() as u64;
        Ok((snapshot, end.next_multiple_of(8)))
    }
}

/// What an image says of its backing file, if it has one. `head` are its first bytes.
fn backing(input: RandomInput<'_>, head: &[u8], cluster_bits: u32, header_bytes: usize) -> Result<Option<Backing>> {
    let (name_at, name_bytes) = (be64(head, 8), be32(head, 16));
    let cluster_bytes = 1u64 << cluster_bits;
    if name_at == 0 || name_bytes == 0 {
        return Ok(None);
    }
    if name_bytes > BACKING_NAME_BYTES_MAX {
        return Err(wrong(
            input,
            16,
            4,
            "the name of its backing file is longer than any may be",
        ));
    }
    if name_at
        .checked_add(u64::from(name_bytes))
        .is_none_or(|end| end > cluster_bytes)
    {
        return Err(wrong(input, 8, 8, "the name of its backing file lies elsewhere"));
    }
    let mut name = vec![0; name_bytes as usize];
    input.exact_at(name_at, &mut name, None)?;
    // Extensions lie between the header and the name.
    let mut extensions = vec![
        0;
        usize::try_from(name_at)
            .unwrap_or_default()
            .saturating_sub(header_bytes)
    ];
    input.exact_at(header_bytes as u64, &mut extensions, None)?;
    let format = backing_format(&extensions).ok_or_else(|| {
        let length = extensions.len() as u64;
        wrong(
            input,
            header_bytes as u64,
            length,
            "an extension of its header goes too far",
        )
    })?;
    Ok(Some(Backing { name, format }))
}

/// The format of the backing file according to the extensions of the header. It is `None` if one of them does not end.
#[expect(
    clippy::option_option,
    reason = "extensions that are wrong, and no format in them, are two things"
)]
fn backing_format(mut extensions: &[u8]) -> Option<Option<Vec<u8>>> {
    while extensions.len() >= 8 {
        let (kind, length) = (be32(extensions, 0), be32(extensions, 4) as usize);
        if kind == 0 {
            break;
        }
        let data = extensions[8..].get(..length)?;
        if kind == BACKING_FORMAT {
            return (length <= FORMAT_BYTES_MAX).then(|| Some(data.to_vec()));
        }
        let next = 8 + length.next_multiple_of(8);
        extensions = extensions.get(next..).unwrap_or_default();
    }
    Some(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_of_a_backing_file_is_found_behind_other_extensions() {
        let extension = |kind: u32, length: u32, data: &[u8]| {
            let mut bytes = [&kind.to_be_bytes()[..], &length.to_be_bytes(), data].concat();
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes
        };
        let other = extension(0x6803_f857, 5, b"other");
        let raw = extension(BACKING_FORMAT, 3, b"raw");
        let end = [0; 8];
        let format = |parts: &[&[u8]]| backing_format(&parts.concat());
        assert_eq!(format(&[&other, &raw, &end]), Some(Some(b"raw".to_vec())));
        assert_eq!(format(&[&other, &end, &raw]), Some(None));
        assert_eq!(format(&[]), Some(None));
        assert_eq!(format(&[&extension(1, u32::MAX, b"")]), None);
        assert_eq!(format(&[&extension(BACKING_FORMAT, 16, &[b'x'; 16])]), None);
    }
}
