//! One qcow2 file: its tables, and the clusters that they place. Tables are read in parts, of which the last one is kept, because a disk is read in
//! order.

use std::path::Path;

use flate2::{Decompress, FlushDecompress, Status};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

use super::super::PART_BYTES;
use super::Reading;
use super::header::{DiskState, Header};
use crate::error::Result;
use crate::foreign::array;
use crate::foreign::random::RandomInput;

/// Bytes of a table that are read at a time.
const TABLE_PART_BYTES: u64 = 64 << 10;
/// Subclusters of a cluster that is divided.
const SUBCLUSTERS: u64 = 32;
/// The offset in an entry of a table.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bits of an entry of an L2 table.
const COMPRESSED: u64 = 1 << 62;
const ZEROS: u64 = 1 << 0;
/// A frame of zstd for a cluster has a window of 2 MiB at most, since a cluster is no longer. Writers may leave some room.
const WINDOW_LOG_MAX: u32 = 23;

/// What a range of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// It comes from the backing file; zeros if there is none.
    Unallocated,
    Zeros,
    /// Bytes at an offset of the file.
    Data(u64),
    /// A part of the compressed cluster of this entry.
    Compressed(u64),
}

/// A range of a disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Extent {
    pub(super) what: What,
    /// In bytes, at least 1.
    pub(super) length: u64,
}

/// A part of a table that was read.
#[derive(Default)]
struct TablePart {
    /// Where it is, once there is one.
    at: Option<u64>,
    bytes: Vec<u8>,
}

impl TablePart {
    /// Reads another part, unless it is this one.
    fn load(&mut self, input: RandomInput<'_>, at: u64, length: u64, volume: &Path) -> Result<()> {
        if self.at == Some(at) && self.bytes.len() as u64 == length {
            return Ok(());
        }
        self.at = None;
        self.bytes.resize(usize::try_from(length).unwrap_or_default(), 0);
        input.exact_at(at, &mut self.bytes, Some(volume))?;
        self.at = Some(at);
        Ok(())
    }

    /// The number at an index, where a table of numbers of 64 bits begins with the part.
    fn number(&self, index: u64) -> u64 {
        let at = usize::try_from(index).unwrap_or(usize::MAX).saturating_mul(8);
        if at.saturating_add(8) > self.bytes.len() {
            return 0;
        }
        u64::from_be_bytes(array(&self.bytes, at))
    }
}

/// What is known of the volume that is read. All of it begins anew with another volume.
struct Progress {
    volume: usize,
    /// The last extent, and where in the disk it begins.
    last: Option<(u64, Extent)>,
    /// Where in the disk the last part of an L2 table begins.
    part: Option<u64>,
    /// Bytes of the file that the volume has taken so far.
    taken_bytes: u64,
}

impl Progress {
    fn of(volume: usize) -> Self {
        Self {
            volume,
            last: None,
            part: None,
            taken_bytes: 0,
        }
    }
}

/// A qcow2 file.
pub(super) struct Image<'a> {
    input: RandomInput<'a>,
    /// The disk, and its snapshots if they are wanted.
    disks: Vec<DiskState>,
    cluster_bits: u32,
    is_divided: bool,
    has_zero_clusters: bool,
    is_zstd: bool,
    l1: TablePart,
    l2: TablePart,
    progress: Progress,
}

/// The part of an L2 table that is loaded: where in the disk it begins, and how many units it places. A unit is a cluster or a subcluster.
#[derive(Clone, Copy)]
struct Units {
    start: u64,
    count: u64,
    bits: u32,
}

impl<'a> Image<'a> {
    /// The image with this header, and the states of its disk.
    pub(super) fn new(input: RandomInput<'a>, header: &Header, disks: Vec<DiskState>) -> Self {
        Self {
            input,
            disks,
            cluster_bits: header.cluster_bits,
            is_divided: header.is_divided,
            has_zero_clusters: header.has_zero_clusters,
            is_zstd: header.is_zstd,
            l1: TablePart::default(),
            l2: TablePart::default(),
            progress: Progress::of(0),
        }
    }

    /// The disk that a volume comes from. Below an image and its snapshots, that is always the same.
    pub(super) fn disk(&self, reading: Reading<'_>) -> DiskState {
        let disk = self.disks.get(reading.volume).or(self.disks.first());
        disk.copied().unwrap_or(DiskState {
            l1_at: 0,
            l1_entries: 0,
            size: 0,
        })
    }

    /// What is at an offset of the disk, which ends behind it, and how far that goes on, not behind the end.
    pub(super) fn extent(&mut self, at: u64, reading: Reading<'_>) -> Result<Extent> {
        if self.progress.volume != reading.volume {
            self.progress = Progress::of(reading.volume);
        }
        if let Some((start, last)) = self.progress.last
            && let Some(done) = at.checked_sub(start).filter(|done| *done < last.length)
        {
            return Ok(behind(last, done));
        }
        let extent = self.find(at, reading)?;
        self.progress.last = Some((at, extent));
        Ok(extent)
    }

    /// As [`Image::extent`], from the tables.
    fn find(&mut self, at: u64, reading: Reading<'_>) -> Result<Extent> {
        let disk = self.disk(reading);
        let room = disk.size - at;
        let cluster_bytes = 1u64 << self.cluster_bits;
        let table_bits = self.cluster_bits - if self.is_divided { 4 } else { 3 };
        let span_bits = self.cluster_bits + table_bits;
        let l1_index = at >> span_bits;
        let (entry, entry_at) = self.l1_entry(disk, l1_index, reading)?;
        let table_at = entry & OFFSET_MASK;
        if table_at == 0 {
            let end = self.l1_gap_end(l1_index).saturating_mul(1 << span_bits);
            return Ok(Extent {
                what: What::Unallocated,
                length: (end - at).min(room),
            });
        }
        if table_at & (cluster_bytes - 1) != 0 {
            return Err(self.damaged(entry_at, 8, reading, "a table begins in the middle of a cluster"));
        }
        let part_bytes = cluster_bytes.min(TABLE_PART_BYTES);
        let part_clusters = part_bytes >> if self.is_divided { 4 } else { 3 };
        let cluster = at >> self.cluster_bits;
        let part = (cluster & ((1 << table_bits) - 1)) / part_clusters;
        let start = (cluster / part_clusters * part_clusters) << self.cluster_bits;
        if self.progress.part != Some(start) {
            self.take(part_bytes, table_at, reading)?;
            self.progress.part = Some(start);
        }
        self.l2
            .load(self.input, table_at + part * part_bytes, part_bytes, reading.path)?;
        let per_cluster = if self.is_divided { SUBCLUSTERS } else { 1 };
        let units = Units {
            start,
            count: part_clusters * per_cluster,
            bits: self.cluster_bits - per_cluster.ilog2(),
        };
        let extent = self.run(at, units, reading)?;
        Ok(Extent {
            length: extent.length.min(room),
            ..extent
        })
    }

    /// An entry of the L1 table, and where it is in the file.
    fn l1_entry(&mut self, disk: DiskState, index: u64, reading: Reading<'_>) -> Result<(u64, u64)> {
        let table_bytes = u64::from(disk.l1_entries) * 8;
        if index >= u64::from(disk.l1_entries) {
            let problem = "the table of the first level is shorter than the disk";
            return Err(self.damaged(disk.l1_at, table_bytes, reading, problem));
        }
        let within = index * 8 / TABLE_PART_BYTES * TABLE_PART_BYTES;
        let length = (table_bytes - within).min(TABLE_PART_BYTES);
        let Some(part_at) = disk.l1_at.checked_add(within) else {
            return Err(self.damaged(disk.l1_at, table_bytes, reading, "it ends too early"));
        };
        self.l1.load(self.input, part_at, length, reading.path)?;
        let in_part = index - within / 8;
        Ok((self.l1.number(in_part), part_at.saturating_add(in_part * 8)))
    }

    /// The index behind the entries without a table from `index` on, as far as the part that is loaded tells.
    fn l1_gap_end(&self, index: u64) -> u64 {
        let part_entries = TABLE_PART_BYTES / 8;
        let first = index / part_entries * part_entries;
        let count = self.l1.bytes.len() as u64 / 8;
        let is_gap = |at: &u64| self.l1.number(*at) & OFFSET_MASK == 0;
        let end = (index - first..count).find(|at| !is_gap(at)).unwrap_or(count);
        first + end.max(index - first + 1)
    }

    /// What is at an offset of the disk, and how far that goes on in the part of the table that is loaded.
    fn run(&self, at: u64, units: Units, reading: Reading<'_>) -> Result<Extent> {
        let unit_bytes = 1u64 << units.bits;
        let first = (at - units.start) >> units.bits;
        let within = at & (unit_bytes - 1);
        let what = self.unit(first, reading)?;
        if let What::Compressed(_) = what {
            let cluster_bytes = 1u64 << self.cluster_bits;
            let length = cluster_bytes - (at & (cluster_bytes - 1));
            return Ok(Extent { what, length });
        }
        let mut last = first;
        while last + 1 < units.count {
            let length = (last + 1 - first) << units.bits;
            let goes_on = match (what, self.unit(last + 1, reading)) {
                // What is wrong is said once it is reached.
                (_, Err(_)) => false,
                (What::Data(offset), Ok(What::Data(next))) => {
                    next == offset + length && length < PART_BYTES as u64 + unit_bytes
                }
                (_, Ok(next)) => next == what,
            };
            if !goes_on {
                break;
            }
            last += 1;
        }
        let extent = Extent {
            what,
            length: (last + 1 - first) << units.bits,
        };
        Ok(behind(extent, within))
    }

    /// What a unit of the part that is loaded is.
    fn unit(&self, unit: u64, reading: Reading<'_>) -> Result<What> {
        let (index, subcluster) = if self.is_divided {
            (unit / SUBCLUSTERS * 2, unit % SUBCLUSTERS)
        } else {
            (unit, 0)
        };
        let entry = self.l2.number(index);
        if entry & COMPRESSED != 0 {
            return Ok(What::Compressed(entry));
        }
        let offset = entry & OFFSET_MASK;
        let wrong = |problem| {
            let at = self.l2.at.unwrap_or_default().saturating_add(index * 8);
            Err(self.damaged(at, 8, reading, problem))
        };
        if offset & ((1 << self.cluster_bits) - 1) != 0 {
            return wrong("a cluster begins in the middle of another");
        }
        if !self.is_divided {
            return Ok(if self.has_zero_clusters && entry & ZEROS != 0 {
                What::Zeros
            } else if offset == 0 {
                What::Unallocated
            } else {
                What::Data(offset)
            });
        }
        let bits = self.l2.number(index + 1);
        match (bits >> subcluster & 1 == 1, bits >> (32 + subcluster) & 1 == 1) {
            (true, true) => wrong("a part of a cluster is zeros and is not"),
            (true, false) if offset == 0 => wrong("a part of a cluster is in no cluster"),
            (true, false) => Ok(What::Data(
                offset + (subcluster << (self.cluster_bits - SUBCLUSTERS.ilog2())),
            )),
            (false, true) => Ok(What::Zeros),
            (false, false) => Ok(What::Unallocated),
        }
    }

    /// Notes that the volume takes so many bytes of the file. A volume uses none of them twice, so that tables that name the same place again and
    /// again come to an end.
    fn take(&mut self, bytes: u64, at: u64, reading: Reading<'_>) -> Result<()> {
        let taken_bytes = self.progress.taken_bytes.saturating_add(bytes);
        self.progress.taken_bytes = taken_bytes;
        if taken_bytes > self.input.length() {
            let problem = "its tables place more in the file than it has room for";
            return Err(self.damaged(at, bytes, reading, problem));
        }
        Ok(())
    }

    /// Reads data that is not compressed.
    pub(super) fn read(&mut self, offset: u64, buffer: &mut [u8], reading: Reading<'_>) -> Result<()> {
        self.take(buffer.len() as u64, offset, reading)?;
        self.input.exact_at(offset, buffer, Some(reading.path))
    }

    /// The offset in its cluster of an offset of the disk.
    pub(super) fn within_cluster(&self, at: u64) -> usize {
        usize::try_from(at & ((1 << self.cluster_bits) - 1)).unwrap_or_default()
    }

    /// The content of a compressed cluster. `layer` tells the images apart that share an unpacker.
    pub(super) fn unpacked<'u>(
        &mut self,
        entry: u64,
        layer: usize,
        reading: Reading<'_>,
        unpacker: &'u mut Unpacker,
    ) -> Result<&'u [u8]> {
        let cluster_bytes = 1usize << self.cluster_bits;
        if unpacker.unpacked_of == Some((layer, entry)) {
            return Ok(&unpacker.unpacked[..cluster_bytes]);
        }
        unpacker.unpacked_of = None;
        let offset_bits = 62 - (self.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> offset_bits) + 1;
        // The last sector may be one that the file does not have all of.
        let end = offset
            .saturating_add(sectors * 512 - offset % 512)
            .min(self.input.length());
        let Some(length) = end.checked_sub(offset).filter(|length| *length > 0) else {
            return Err(self.damaged(offset, sectors * 512, reading, "it ends too early"));
        };
        unpacker.packed.resize(usize::try_from(length).unwrap_or_default(), 0);
        self.input.exact_at(offset, &mut unpacker.packed, Some(reading.path))?;
        let Some(used) = unpacker.unpack(cluster_bytes, self.is_zstd) else {
            let problem = "a compressed cluster does not decompress to a cluster";
            return Err(self.damaged(offset, length, reading, problem));
        };
        self.take(used as u64, offset, reading)?;
        unpacker.unpacked_of = Some((layer, entry));
        Ok(&unpacker.unpacked[..cluster_bytes])
    }

    fn damaged(&self, at: u64, length: u64, reading: Reading<'_>, problem: &str) -> crate::error::Error {
        self.input.damaged(at, length, Some(reading.path.to_owned()), problem)
    }
}

/// What of an extent lies behind its first bytes, of which there are fewer than it has.
fn behind(extent: Extent, bytes: u64) -> Extent {
    Extent {
        what: match extent.what {
            What::Data(offset) => What::Data(offset + bytes),
            other => other,
        },
        length: extent.length - bytes,
    }
}

/// Decompresses clusters, and keeps the last one.
#[derive(Default)]
pub(super) struct Unpacker {
    /// The layer and the entry of the cluster that is kept.
    unpacked_of: Option<(usize, u64)>,
    packed: Vec<u8>,
    unpacked: Vec<u8>,
    deflate: Option<Decompress>,
    zstd: Option<Decoder<'static>>,
}

impl Unpacker {
    /// Decompresses a cluster of so many bytes. Returns how many bytes that took, or `None` if it gives more or less.
    fn unpack(&mut self, cluster_bytes: usize, is_zstd: bool) -> Option<usize> {
        // What is too long shows in one byte more.
        self.unpacked.resize(cluster_bytes + 1, 0);
        let (used, made) = if is_zstd { self.unzstd()? } else { self.inflate()? };
        (made == cluster_bytes).then_some(used)
    }

    /// Bytes that were taken and made, if the stream ends.
    fn inflate(&mut self) -> Option<(usize, usize)> {
        let deflate = self.deflate.get_or_insert_with(|| Decompress::new(false));
        deflate.reset(false);
        let status = deflate.decompress(&self.packed, &mut self.unpacked, FlushDecompress::Finish);
        matches!(status, Ok(Status::StreamEnd)).then_some(())?;
        let (used, made) = (deflate.total_in(), deflate.total_out());
        Some((usize::try_from(used).ok()?, usize::try_from(made).ok()?))
    }

    /// Bytes that were taken and made, if the frame ends.
    fn unzstd(&mut self) -> Option<(usize, usize)> {
        let decoder = match &mut self.zstd {
            Some(decoder) => decoder,
            none => {
                let mut decoder = Decoder::new().ok()?;
                decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).ok()?;
                none.insert(decoder)
            }
        };
        decoder.reinit().ok()?;
        let mut input = InBuffer::around(&self.packed);
        let mut output = OutBuffer::around(&mut self.unpacked[..]);
        loop {
            let before = (input.pos(), output.pos());
            let left = decoder.run(&mut input, &mut output).ok()?;
            let after = (input.pos(), output.pos());
            if left == 0 {
                return Some(after);
            }
            if before == after {
                return None;
            }
        }
    }
}
