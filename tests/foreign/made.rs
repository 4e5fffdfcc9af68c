//! Disks as other programs than qemu-img write them, from published layouts.

use std::io::Write;

use flate2::Compression;
use flate2::write::ZlibEncoder;

use crate::common::Random;

pub(crate) const SECTOR: usize = 512;

/// What of a stream of grains is not as it should be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    WithoutEnd,
    WithoutFooter,
    WithoutDirectory,
    WithoutTable,
    Dropped,
    Doubled,
    Moved,
    /// The header tells so many sectors in the place of those of the image.
    Capacity(u64),
}

/// A stream of grains as `VMware` writes it: tables behind the grains, and a footer. Grains come in any order.
pub(crate) fn footer_stream(image: &[u8], grain: usize, order: u64, fault: Fault) -> Vec<u8> {
    let text = b"# Disk DescriptorFile\nversion=1\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\nRDONLY 1 SPARSE \"x.vmdk\"\n";
    let header = |directory: u64| {
        let mut header = vec![0; SECTOR];
        header[..4].copy_from_slice(b"KDMV");
        header[4] = 3;
        header[8..12].copy_from_slice(&0x30001u32.to_le_bytes());
        header[44..48].copy_from_slice(&512u32.to_le_bytes());
        let capacity = match fault {
            Fault::Capacity(capacity) => capacity,
            _ => (image.len() / SECTOR) as u64,
        };
        for (at, value) in [
            (12, capacity),
            (20, grain as u64),
            (28, 1),
            (36, 1),
            (56, directory),
            (64, 16),
        ] {
            header[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        header[73..79].copy_from_slice(b"\n \r\n\x01\0");
        header
    };
    let mut stream = header(u64::MAX);
    stream.extend(text);
    stream.resize(16 * SECTOR, 0);
    let marker = |stream: &mut Vec<u8>, sectors: u64, kind: u32| {
        let place = u32::try_from(stream.len() / SECTOR + 1).unwrap();
        stream.extend(sectors.to_le_bytes());
        stream.extend(0u32.to_le_bytes());
        stream.extend(kind.to_le_bytes());
        stream.resize(stream.len().next_multiple_of(SECTOR), 0);
        place
    };
    let mut grains: Vec<(usize, &[u8])> = image.chunks(grain * SECTOR).enumerate().collect();
    let mut tables = vec![vec![0u8; 2048]; grains.len().div_ceil(512)];
    grains.retain(|(_, content)| content.iter().any(|byte| *byte != 0));
    let mut random = Random(order);
    for last in (1..grains.len()).rev().filter(|_| order > 0) {
        grains.swap(last, usize::try_from(random.below(last as u64 + 1)).unwrap());
    }
    for (at, (number, content)) in grains.iter().enumerate() {
        let place = u32::try_from(stream.len() / SECTOR).unwrap();
        tables[number / 512][number % 512 * 4..][..4].copy_from_slice(&place.to_le_bytes());
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(content).unwrap();
        let compressed = encoder.finish().unwrap();
        let lba = (number * grain + usize::from(fault == Fault::Moved && at == 1)) as u64;
        let times = match fault {
            Fault::Dropped if at == 2 => 0,
            Fault::Doubled if at == 2 => 2,
            _ => 1,
        };
        for _ in 0..times {
            stream.extend(lba.to_le_bytes());
            stream.extend(u32::try_from(compressed.len()).unwrap().to_le_bytes());
            stream.extend(&compressed);
            stream.resize(stream.len().next_multiple_of(SECTOR), 0);
        }
    }
    let mut directory = Vec::new();
    for (number, table) in tables.iter().enumerate() {
        let is_empty = table.iter().all(|byte| *byte == 0);
        let place = if is_empty { 0 } else { marker(&mut stream, 4, 1) };
        directory.extend(place.to_le_bytes());
        if !is_empty && fault == Fault::WithoutTable && number == 0 {
            stream.truncate(stream.len() - SECTOR);
        } else if !is_empty {
            stream.extend(table);
        }
    }
    if let Fault::Capacity(capacity) = fault {
        directory.resize(usize::try_from(capacity.div_ceil(grain as u64 * 512) * 4).unwrap(), 0);
    }
    directory.resize(directory.len().next_multiple_of(SECTOR), 0);
    let mut place = u32::MAX;
    if fault != Fault::WithoutDirectory {
        place = marker(&mut stream, (directory.len() / SECTOR) as u64, 2);
        stream.extend(directory);
    }
    if fault != Fault::WithoutFooter {
        marker(&mut stream, 1, 3);
        stream.extend(header(place.into()));
    }
    if fault != Fault::WithoutEnd {
        marker(&mut stream, 0, 0);
    }
    stream
}

pub(crate) fn sum_at(bytes: &mut [u8], at: usize) {
    bytes[at..at + 4].fill(0);
    let sum: u32 = bytes.iter().map(|byte| u32::from(*byte)).sum();
    bytes[at..at + 4].copy_from_slice(&(!sum).to_be_bytes());
}

pub(crate) fn crc_at(bytes: &mut [u8]) {
    bytes[4..8].fill(0);
    let checksum = crc32c::crc32c(bytes);
    bytes[4..8].copy_from_slice(&checksum.to_le_bytes());
}

/// A log of a VHDX, which is to be filled.
pub(crate) struct LogMaker {
    pub(crate) guid: [u8; 16],
    /// Where the log lies, and its bytes.
    pub(crate) place: usize,
    pub(crate) bytes: usize,
    pub(crate) file_bytes: u64,
    /// The first sectors of the table of blocks, by their offsets.
    pub(crate) table: Vec<(u64, Vec<u8>)>,
}

impl LogMaker {
    /// An entry at a place of the log, with the place of the oldest one that belongs to it, a number, and what it writes.
    pub(crate) fn entry(&self, at: usize, tail: usize, sequence: u64, writes: &[(u64, Vec<u8>)]) -> (usize, Vec<u8>) {
        let is_zeros = |content: &[u8]| content.iter().all(|byte| *byte == 0);
        let mut entry = b"loge\0\0\0\0\0\0\0\0".to_vec();
        entry.extend(u32::try_from(tail).unwrap().to_le_bytes());
        entry.extend(sequence.to_le_bytes());
        entry.extend(u32::try_from(writes.len()).unwrap().to_le_bytes());
        entry.extend([0; 4]);
        entry.extend(self.guid);
        entry.extend(self.file_bytes.to_le_bytes());
        entry.extend(self.file_bytes.to_le_bytes());
        for (offset, content) in writes {
            if is_zeros(content) {
                entry.extend(b"zero\0\0\0\0");
                entry.extend((content.len() as u64).to_le_bytes());
            } else {
                entry.extend(b"desc");
                entry.extend(&content[4092..]);
                entry.extend(&content[..8]);
            }
            entry.extend(offset.to_le_bytes());
            entry.extend(sequence.to_le_bytes());
        }
        entry.resize(entry.len().next_multiple_of(4096), 0);
        for (_, content) in writes.iter().filter(|(_, content)| !is_zeros(content)) {
            let number = sequence.to_le_bytes();
            entry.extend(b"data");
            entry.extend(&number[4..]);
            entry.extend(&content[8..4092]);
            entry.extend(&number[..4]);
        }
        let length = u32::try_from(entry.len()).unwrap();
        entry[8..12].copy_from_slice(&length.to_le_bytes());
        crc_at(&mut entry);
        (at, entry)
    }
}

/// A VHDX whose table of blocks is in its log only, in the entries that `make` gives.
pub(crate) fn with_log(disk: &[u8], make: impl FnOnce(&LogMaker) -> Vec<(usize, Vec<u8>)>) -> Vec<u8> {
    let mut disk = disk.to_vec();
    let small = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let number = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let header = if number(&disk, 65_544) > number(&disk, 131_080) {
        65_536
    } else {
        131_072
    };
    let regions = (0..2).map(|entry| 196_608 + 16 + entry * 32);
    let table = regions
        .into_iter()
        .find(|at| disk[*at..].starts_with(&[0x66, 0x77, 0xc2, 0x2d]))
        .unwrap();
    let table = usize::try_from(number(&disk, table + 16)).unwrap();
    let mut log = LogMaker {
        guid: *b"0123456789abcdef",
        place: usize::try_from(number(&disk, header + 72)).unwrap(),
        bytes: small(&disk, header + 68),
        file_bytes: disk.len() as u64,
        table: Vec::new(),
    };
    let sectors = (table..table + 65_536).step_by(4096);
    for at in sectors.filter(|at| disk[*at..at + 4096].iter().any(|byte| *byte != 0)) {
        log.table.push((at as u64, disk[at..at + 4096].to_vec()));
    }
    assert!(!log.table.is_empty());
    disk[table..table + 65_536].fill(0);
    disk[header + 48..header + 64].copy_from_slice(&log.guid);
    crc_at(&mut disk[header..header + 4096]);
    disk[log.place..log.place + log.bytes].fill(0);
    for (at, entry) in make(&log) {
        for (sector, content) in entry.chunks(4096).enumerate() {
            let at = log.place + (at + sector * 4096) % log.bytes;
            disk[at..at + 4096].copy_from_slice(content);
        }
    }
    disk
}
