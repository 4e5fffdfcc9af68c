//! Archives that Proxmox's vzdump makes of virtual machines: `vma_spec.txt` of pve-qemu, and where that differs from what is written, what is
//! written. Clusters come in any order. Each device has each of its clusters exactly once, those of zeros too, which proves that nothing is
//! missing: the format has no end. Hashes protect headers only; content is as sound as the compression around the archive says.

use md5::{Digest, Md5};

use super::{Backup, Event, Input, Origin, Volume, array, damaged_at, volume_name};
use crate::block::{BLOCK_LEN, NumberSet};
use crate::content::FileTime;
use crate::error::Result;

pub(super) const MAGIC: &[u8] = b"VMA\0";
const EXTENT_MAGIC: &[u8] = b"VMAE";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 12288;
/// Bytes of a header at most. Writers stay below half of that.
const HEADER_BYTES_MAX: u32 = 1 << 20;
const EXTENT_HEADER_BYTES: usize = 512;
/// Bits of a mask, each for a block of a cluster.
const CLUSTER_BLOCKS: usize = 16;
const CLUSTER_LEN: usize = CLUSTER_BLOCKS * BLOCK_LEN;
const CLUSTER_BYTES: u64 = CLUSTER_LEN as u64;
/// Clusters that an extent's header has room for.
const CLUSTERS_MAX: usize = 59;
const DEVICES: usize = 256;
const CONFIGS: usize = 256;
/// The name of a machine's memory, which is no volume.
const MEMORY: &[u8] = b"vmstate";

/// A volume that the header has, and what came of it.
struct Device {
    /// The number of its volume. The machine's memory has none.
    volume: Option<usize>,
    size: u64,
    /// The clusters that came.
    clusters: NumberSet<u32>,
    count: u64,
}

/// What is said before any content comes.
enum Known {
    Volume(Volume),
    /// A small file, whose content the header has.
    File(Volume, Vec<u8>),
}

/// What comes of a cluster's block list.
struct Cluster {
    device: usize,
    number: u32,
    mask: u16,
}

/// A VMA archive.
pub(super) struct Vma<'a> {
    input: Input<'a>,
    uuid: [u8; 16],
    time: FileTime,
    devices: Vec<Option<Device>>,
    volumes: Vec<Volume>,
    /// Events that come before anything is read, the first one last.
    first: Vec<(Event, Vec<u8>)>,
    /// Clusters of the extent whose content comes next, the first one last.
    clusters: Vec<Cluster>,
    /// Devices whose end was not told yet, once all extents were read.
    ended: Option<usize>,
}

impl<'a> Vma<'a> {
    /// Reads the header.
    pub(super) fn open(mut input: Input<'a>) -> Result<Self> {
        let mut header = vec![0; HEADER_BYTES];
        input.exact(&mut header, None)?;
        let whole = |input: &Input<'_>, problem: &str| damaged_at(input, 0, HEADER_BYTES as u64, None, problem);
        if u32::from_be_bytes(array(&header, 4)) != VERSION {
            return Err(input.refused("it is a VMA archive of a version that is not known"));
        }
        let bytes = u32::from_be_bytes(array(&header, 56));
        if bytes as usize <= HEADER_BYTES || bytes > HEADER_BYTES_MAX {
            return Err(whole(&input, "its header has a length that is not allowed"));
        }
        header.resize(bytes as usize, 0);
        input.exact(&mut header[HEADER_BYTES..], None)?;
        if !has_md5(&mut header, 32) {
            return Err(damaged_at(&input, 0, bytes.into(), None, "its header has another hash"));
        }
        let (blobs, blob_bytes) = (
            u32::from_be_bytes(array(&header, 48)) as usize,
            u32::from_be_bytes(array(&header, 52)) as usize,
        );
        let blobs = (blobs >= HEADER_BYTES)
            .then(|| header.get(blobs..blobs.checked_add(blob_bytes)?))
            .flatten()
            .ok_or_else(|| whole(&input, "its header has texts that lie elsewhere"))?;
        let time = FileTime {
            seconds: i64::from_be_bytes(array(&header, 24)),
            nanoseconds: 0,
        };
        let mut archive = Self {
            uuid: array(&header, 8),
            time,
            devices: Vec::new(),
            volumes: Vec::new(),
            first: Vec::new(),
            clusters: Vec::new(),
            ended: None,
            input,
        };
        archive.take_devices(&header, blobs, time)?;
        archive.take_configs(&header, blobs, time)?;
        archive.first.reverse();
        Ok(archive)
    }

    /// Takes the devices that a header names.
    fn take_devices(&mut self, header: &[u8], blobs: &[u8], time: FileTime) -> Result<()> {
        let mut all_bytes = 0u64;
        for device in 0..DEVICES {
            let at = 4096 + 32 * device;
            let (name, size) = (
                u32::from_be_bytes(array(header, at)),
                u64::from_be_bytes(array(header, at + 8)),
            );
            if name == 0 {
                self.devices.push(None);
                continue;
            }
            let damaged = |problem| damaged_at(&self.input, at as u64, 32, None, problem);
            let name = text(blobs, name).ok_or_else(|| damaged("a device has no name"))?;
            let clusters = size.div_ceil(CLUSTER_BYTES);
            all_bytes = all_bytes.saturating_add(size);
            if all_bytes > self.input.limits().volume_bytes || clusters > u64::from(u32::MAX) {
                let problem = format!("its devices have {all_bytes} bytes and more, which is more than vmfold takes");
                return Err(self.input.refused(problem));
            }
            let is_memory = name == MEMORY;
            let volume = (!is_memory).then(|| {
                self.known(Known::Volume(Volume {
                    path: volume_name::component(&[name, b".raw"].concat()),
                    size: Some(size),
                    time: Some(time),
                }))
            });
            self.devices.push(Some(Device {
                volume,
                size,
                clusters: NumberSet::new(if is_memory {
                    0
                } else {
                    usize::try_from(clusters).unwrap_or(usize::MAX)
                }),
                count: 0,
            }));
        }
        Ok(())
    }

    /// Takes the machine's configuration, which is kept as files beside its volumes.
    fn take_configs(&mut self, header: &[u8], blobs: &[u8], time: FileTime) -> Result<()> {
        for config in 0..CONFIGS {
            let (name_at, data_at) = (2044 + 4 * config, 3068 + 4 * config);
            let (name, data) = (
                u32::from_be_bytes(array(header, name_at)),
                u32::from_be_bytes(array(header, data_at)),
            );
            if name == 0 && data == 0 {
                continue;
            }
            let damaged = || damaged_at(&self.input, name_at as u64, 4, None, "a configuration lies elsewhere");
            let name = text(blobs, name).ok_or_else(damaged)?;
            let content = blob(blobs, data).ok_or_else(damaged)?;
            let base = name.rsplit(|byte| *byte == b'/').next().unwrap_or(name);
            let volume = Volume {
                path: volume_name::component(base),
                size: Some(content.len() as u64),
                time: Some(time),
            };
            self.known(Known::File(volume, content.to_vec()));
        }
        Ok(())
    }

    /// Notes what is known from the header. Returns the number of the volume.
    fn known(&mut self, known: Known) -> usize {
        let number = self.volumes.len();
        let mut told = |volume: &Volume| {
            self.volumes.push(volume.clone());
            self.first.push((Event::Volume(volume.clone()), Vec::new()));
        };
        match known {
            Known::Volume(volume) => told(&volume),
            Known::File(volume, content) => {
                told(&volume);
                let size = content.len() as u64;
                let data = Event::Data {
                    volume: number,
                    offset: 0,
                };
                self.first.push((data, content));
                let end = Event::End { volume: number, size };
                self.first.push((end, Vec::new()));
            }
        }
        number
    }

    /// Reads the header of the next extent. Returns false at the end of the archive.
    fn extent(&mut self) -> Result<bool> {
        let start = self.input.offset();
        let mut header = [0; EXTENT_HEADER_BYTES];
        let damaged =
            |input: &Input<'_>, problem: &str| damaged_at(input, start, EXTENT_HEADER_BYTES as u64, None, problem);
        match self.input.fill(&mut header)? {
            0 => return Ok(false),
            EXTENT_HEADER_BYTES => {}
            _ => return Err(damaged(&self.input, "it ends within an extent's header")),
        }
        if !header.starts_with(EXTENT_MAGIC) || array(&header, 8) != self.uuid {
            return Err(damaged(&self.input, "an extent of this archive should begin here"));
        }
        if !has_md5(&mut header, 24) {
            return Err(damaged(&self.input, "an extent's header has another hash"));
        }
        let mut blocks = 0;
        for entry in 0..CLUSTERS_MAX {
            let info = u64::from_be_bytes(array(&header, 40 + 8 * entry));
            let [mask_high, mask_low, _, device, cluster @ ..] = info.to_be_bytes();
            if device == 0 {
                continue;
            }
            let (mask, number) = (u16::from_be_bytes([mask_high, mask_low]), u32::from_be_bytes(cluster));
            blocks += mask.count_ones();
            let device = usize::from(device);
            if let Err(problem) = self.enter(device, number) {
                return Err(damaged(&self.input, problem));
            }
            self.clusters.push(Cluster { device, number, mask });
        }
        if blocks != u32::from(u16::from_be_bytes(array(&header, 6))) {
            return Err(damaged(
                &self.input,
                "an extent has another number of blocks than it says",
            ));
        }
        self.clusters.reverse();
        Ok(true)
    }

    /// Notes that a cluster came.
    fn enter(&mut self, device: usize, number: u32) -> std::result::Result<(), &'static str> {
        let device = self.devices.get_mut(device).and_then(Option::as_mut);
        let device = device.ok_or("an extent has a cluster of a device that is not there")?;
        if device.volume.is_none() {
            return Ok(());
        }
        if u64::from(number) >= device.size.div_ceil(CLUSTER_BYTES) {
            return Err("an extent has a cluster behind the end of its device");
        }
        if device.clusters.contains(number) {
            return Err("an extent has a cluster that came before");
        }
        device.clusters.insert(number);
        device.count += 1;
        Ok(())
    }

    /// Reads the content of a cluster, if it has any that belongs to a volume.
    fn cluster(&mut self, cluster: &Cluster, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        let stored = cluster.mask.count_ones() as usize * BLOCK_LEN;
        let device = self.devices.get(cluster.device).and_then(Option::as_ref);
        let volume = device.and_then(|device| device.volume);
        buffer.resize(stored, 0);
        let path = volume.map(|volume| self.volumes[volume].path.clone());
        self.input.exact(buffer, path.as_deref())?;
        let (Some(device), Some(volume)) = (device, volume.filter(|_| stored > 0)) else {
            return Ok(None);
        };
        let mut content = vec![0; CLUSTER_LEN];
        let mut blocks = buffer.chunks_exact(BLOCK_LEN);
        for bit in (0..CLUSTER_BLOCKS).filter(|bit| cluster.mask >> bit & 1 == 1) {
            if let Some(block) = blocks.next() {
                content[bit * BLOCK_LEN..(bit + 1) * BLOCK_LEN].copy_from_slice(block);
            }
        }
        let offset = u64::from(cluster.number) * CLUSTER_BYTES;
        let length = (device.size - offset).min(CLUSTER_BYTES);
        content.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        std::mem::swap(buffer, &mut content);
        Ok(Some(Event::Data { volume, offset }))
    }

    /// Tells the end of the next device, if all of it came.
    fn end_of(&self, device: usize) -> Result<Option<Event>> {
        let Some(device) = &self.devices[device] else {
            return Ok(None);
        };
        let Some(volume) = device.volume else {
            return Ok(None);
        };
        let clusters = device.size.div_ceil(CLUSTER_BYTES);
        if device.count < clusters {
            let end = u32::try_from(clusters).unwrap_or(u32::MAX);
            let missing = (0..end)
                .find(|number| !device.clusters.contains(*number))
                .unwrap_or(end);
            let problem = format!(
                "{} of its clusters are missing, the first at byte {} of the volume",
                clusters - device.count,
                u64::from(missing) * CLUSTER_BYTES
            );
            return Err(damaged_at(
                &self.input,
                self.input.offset(),
                0,
                Some(&self.volumes[volume]),
                &problem,
            ));
        }
        Ok(Some(Event::End {
            volume,
            size: device.size,
        }))
    }
}

/// Whether bytes have the MD5 that they tell at `at`, made with zeros in its place. These stay there.
fn has_md5(bytes: &mut [u8], at: usize) -> bool {
    let told: [u8; 16] = array(bytes, at);
    bytes[at..at + 16].fill(0);
    Md5::digest(bytes)[..] == told
}

/// A text of the header: its length as two bytes, little-endian, and the bytes.
fn blob(blobs: &[u8], at: u32) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    let length = u16::from_le_bytes(*blobs.get(at..)?.first_chunk()?);
    blobs.get(at + 2..)?.get(..usize::from(length))
}

/// A name of the header, which ends with a NUL.
fn text(blobs: &[u8], at: u32) -> Option<&[u8]> {
    let (0, name) = blob(blobs, at)?.split_last()? else {
        return None;
    };
    (!name.is_empty()).then_some(name)
}

impl Backup for Vma<'_> {
    fn kind(&self) -> &'static str {
        "an archive of Proxmox VE"
    }

    fn origin(&self) -> Origin {
        Origin {
            name: None,
            time: Some(self.time),
        }
    }

    fn proves_each_volume(&self) -> bool {
        !self.input.is_decompressed()
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        if let Some((event, content)) = self.first.pop() {
            *buffer = content;
            return Ok(Some(event));
        }
        while self.ended.is_none() {
            if let Some(cluster) = self.clusters.pop() {
                if let Some(event) = self.cluster(&cluster, buffer)? {
                    return Ok(Some(event));
                }
            } else if !self.extent()? {
                self.ended = Some(0);
            }
        }
        while let Some(device) = self.ended.filter(|device| *device < self.devices.len()) {
            self.ended = Some(device + 1);
            if let Some(event) = self.end_of(device)? {
                return Ok(Some(event));
            }
        }
        Ok(None)
    }
}
