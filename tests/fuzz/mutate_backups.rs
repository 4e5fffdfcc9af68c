// Changes backups of other programs: what a hostile maker of them could write, with checksums that are right again, and damage.

use md5::{Digest, Md5};
use xxhash_rust::xxh32::xxh32;

use crate::backup_seeds::{Format, Seed};
use crate::backups::{Case, limits};
use crate::common::Random;
use crate::made::{crc_at, sum_at};
use crate::qvm_maker::{Model, Part, compress};

fn below(random: &mut Random, limit: usize) -> usize {
    usize::try_from(random.below(limit.max(1) as u64)).unwrap()
}

fn pick<T: Clone>(items: &[T], random: &mut Random) -> T {
    items[below(random, items.len())].clone()
}

/// Whether a sector has only a few words that differ from each other: then it says where things lie.
fn is_metadata(sector: &[u8]) -> bool {
    let words = sector.chunks(4);
    let filler = words.clone().filter(|word| word.iter().all(|byte| *byte == 0)).count();
    let ones = words
        .clone()
        .filter(|word| word.iter().all(|byte| *byte == 0xff))
        .count();
    filler < words.len() && filler + ones >= words.len() / 3
}

/// Offsets of all words that are no zeros, in sectors that say where things lie, and of those behind them.
pub(crate) fn metadata_places(bytes: &[u8]) -> Vec<usize> {
    let sectors = (0..bytes.len()).step_by(512).filter(|at| {
        let sector = &bytes[*at..bytes.len().min(at + 512)];
        *at == 0 || is_metadata(sector)
    });
    let words = sectors.flat_map(|at| (at..bytes.len().min(at + 512)).step_by(4));
    let mut places: Vec<usize> = words
        .filter(|at| {
            bytes[at.saturating_sub(4)..bytes.len().min(at + 4)]
                .iter()
                .any(|byte| *byte != 0)
        })
        .collect();
    // Long tables of entries that are alike count little.
    if places.len() > 4096 {
        let (first, rest) = places.split_at(2048);
        places = first
            .iter()
            .chain(rest.iter().step_by(rest.len() / 2048 + 1))
            .copied()
            .collect();
    }
    places
}

/// A number that readers must not believe, for a file of so many bytes.
fn number(random: &mut Random, length: usize) -> u64 {
    const HOSTILE: [u64; 24] = [
        0,
        1,
        2,
        7,
        8,
        9,
        511,
        512,
        4095,
        4096,
        0xffff,
        0x1_0000,
        0x10_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 32,
        1 << 40,
        1 << 44,
        1 << 54,
        1 << 62,
        u64::MAX / 2,
        u64::MAX - 1,
        u64::MAX,
    ];
    let place = random.below(length.max(1) as u64);
    match random.below(9) {
        0 => place,
        1 => place / 512 * 512,
        2 => place / 65_536 * 65_536,
        3 => place / 512,
        4 => (length as u64 + random.below(3)).wrapping_sub(1),
        5 => length as u64 / 512 + random.below(2),
        6 => 1 << random.below(64),
        _ => pick(&HOSTILE, random),
    }
}

/// Puts a number at a place, in any width and order.
fn put(bytes: &mut [u8], at: usize, random: &mut Random) {
    let width = pick(&[1usize, 2, 4, 4, 8, 8], random).min(bytes.len().saturating_sub(at));
    let value = match random.below(3) {
        0 if at + 8 <= bytes.len() => {
            let old = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
            let by = pick(&[1u64, 2, 512, 65_536, 1 << 32, 1 << 63, 1 << 62], random);
            if random.below(2) == 0 {
                old.wrapping_add(by)
            } else {
                old.wrapping_sub(by)
            }
        }
        _ => number(random, bytes.len()),
    };
    let order = if random.below(2) == 0 {
        value.to_be_bytes()[8 - width..].to_vec()
    } else {
        value.to_le_bytes()[..width].to_vec()
    };
    bytes[at..at + width].copy_from_slice(&order);
}

/// Changes some bytes in their places.
fn change(bytes: &mut [u8], places: &[usize], random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let anywhere = below(random, bytes.len());
    let known = if places.is_empty() {
        anywhere
    } else {
        pick(places, random).min(bytes.len() - 1)
    };
    let at = if random.below(5) == 0 { anywhere } else { known };
    match random.below(10) {
        0 => bytes[at] ^= 1 << random.below(8),
        1 => bytes[at] = (random.next() & 0xff) as u8,
        2 => {
            let end = bytes.len().min(at + below(random, 64));
            let value = pick(&[0, 0xff, b'0', b'9', 0x80], random);
            bytes[at..end].fill(value);
        }
        3 => {
            let from = pick(if places.is_empty() { &[0] } else { places }, random).min(bytes.len() - 1);
            let length = pick(&[4usize, 8, 16, 32], random).min(bytes.len() - at.max(from));
            bytes.copy_within(from..from + length, at);
        }
        _ => put(bytes, at, random),
    }
}

/// Makes bytes longer or shorter, or puts some of another backup in.
fn splice(bytes: &mut Vec<u8>, others: &[Seed], random: &mut Random) {
    let unit = pick(&[1usize, 512, 4096, 65_536], random);
    let at = below(random, bytes.len() + 1) / unit * unit;
    let length = below(random, bytes.len() + 1 - at).min(unit * (1 + below(random, 64)));
    match random.below(6) {
        0 => bytes.truncate(at),
        1 => drop(bytes.drain(at..at + length)),
        2 => {
            let piece = bytes[at..at + length].to_vec();
            let to = below(random, bytes.len() + 1) / unit * unit;
            bytes.splice(to..to, piece);
        }
        3 => {
            let piece = bytes[at..at + length].to_vec();
            bytes.extend(piece);
        }
        4 => {
            let other = &others[below(random, others.len())].bytes;
            let from = at.min(other.len());
            let until = (from + length).min(other.len());
            bytes.splice(at..at, other[from..until].iter().copied());
        }
        _ => bytes.resize(bytes.len() + below(random, 5000), u8::from(random.below(4) == 0)),
    }
}

/// Gives a header of tar its checksum.
pub(crate) fn seal_header(header: &mut [u8]) {
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Where headers of tar are, or things that look so.
fn tar_headers(bytes: &[u8]) -> Vec<usize> {
    (0..bytes.len() / 512)
        .map(|block| block * 512)
        .filter(|at| bytes[at + 257..].starts_with(b"ustar"))
        .collect()
}

/// Writes a number into a field of a header.
fn put_field(field: &mut [u8], value: u64, random: &mut Random) {
    let digits = format!("{value:0width$o}", width = field.len() - 1);
    if random.below(2) == 0 && digits.len() < field.len() {
        field[..digits.len()].copy_from_slice(digits.as_bytes());
    } else if field.len() >= 9 {
        field.fill(0);
        field[0] = 0x80;
        let from = field.len() - 8;
        field[from..].copy_from_slice(&value.to_be_bytes());
    }
}

/// A record of a pax header.
fn pax_record(key: &str, value: &str) -> String {
    let rest = key.len() + value.len() + 3;
    let length = (1..4)
        .map(|digits| rest + digits)
        .find(|length| length.to_string().len() + rest == *length);
    format!("{} {key}={value}\n", length.unwrap_or(rest + 4))
}

/// A pax header with records that change what follows.
fn pax_header(random: &mut Random) -> Vec<u8> {
    let mut records = String::new();
    for _ in 0..=random.below(6) {
        let small = random.below(9) * 4096;
        let value = if random.below(2) == 0 {
            small
        } else {
            number(random, 100_000)
        };
        let (key, value) = match random.below(12) {
            0 => (
                "path",
                pick(
                    &["a/../../b", "x", "", "/a//b/./c", "small.conf", "a\n\u{1b}[31m"],
                    random,
                )
                .to_owned(),
            ),
            1 => ("linkpath", pick(&["small.conf", "x", ""], random).to_owned()),
            2 => ("size", value.to_string()),
            3 => (
                "mtime",
                pick(
                    &[
                        "1.5",
                        "-9223372036854775808.5",
                        "x",
                        "99999999999999999999",
                        "1.+5",
                        "-0.1",
                    ],
                    random,
                )
                .to_owned(),
            ),
            4 => ("GNU.sparse.major", random.below(3).to_string()),
            5 => ("GNU.sparse.minor", random.below(2).to_string()),
            6 => ("GNU.sparse.realsize", value.to_string()),
            7 => ("GNU.sparse.size", value.to_string()),
            8 => ("GNU.sparse.offset", value.to_string()),
            9 => ("GNU.sparse.numbytes", value.to_string()),
            10 => ("GNU.sparse.map", format!("0,{small},{value},{}", random.below(5000))),
            _ => ("GNU.sparse.name", "other".to_owned()),
        };
        records += &pax_record(key, &value);
    }
    let mut header = vec![0; 512];
    header[..4].copy_from_slice(b"pax\0");
    header[124..135].copy_from_slice(format!("{:011o}", records.len()).as_bytes());
    header[156] = pick(b"xxxgX", random);
    header[257..265].copy_from_slice(b"ustar\x0000");
    seal_header(&mut header);
    header.extend(records.into_bytes());
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

/// Changes an archive of tar, and makes the checksums of its headers right.
fn change_tar(bytes: &mut Vec<u8>, random: &mut Random) {
    let headers = tar_headers(bytes);
    if headers.is_empty() {
        return;
    }
    let at = pick(&headers, random);
    match random.below(10) {
        0 => {
            let header = pax_header(random);
            bytes.splice(at..at, header);
        }
        1 => bytes[at + 156] = pick(b"0\x007S1256xgLKXDMV", random),
        2 => {
            // A name or what a link leads to.
            let from = pick(&headers, random) + pick(&[0usize, 157], random);
            let to = at + pick(&[0usize, 157], random);
            bytes.copy_within(from..from + 100, to);
        }
        3..6 => {
            let (field, length) = pick(
                &[
                    (124usize, 12usize),
                    (124, 12),
                    (136, 12),
                    (386, 12),
                    (398, 12),
                    (410, 12),
                    (422, 12),
                    (483, 12),
                    (482, 1),
                    (345, 8),
                ],
                random,
            );
            let value = if random.below(2) == 0 {
                random.below(9) * 4096
            } else {
                number(random, bytes.len())
            };
            put_field(&mut bytes[at + field..at + field + length], value, random);
        }
        6 => {
            // What follows a header: maps and records.
            let end = bytes.len().min(at + 2048);
            let digits: Vec<usize> = (at + 512..end).filter(|at| bytes[*at].is_ascii_digit()).collect();
            if !digits.is_empty() {
                let at = pick(&digits, random);
                bytes[at] = pick(b"0123456789\n,\x80", random);
            }
        }
        7 => {
            // A whole entry once more, or in another place.
            let end = headers.iter().copied().find(|next| *next > at).unwrap_or(bytes.len());
            let entry = bytes[at..end].to_vec();
            let to = pick(&headers, random);
            bytes.splice(to..to, entry);
        }
        _ => {
            let places: Vec<usize> = (at..bytes.len().min(at + 1536)).collect();
            change(bytes, &places, random);
        }
    }
    seal_tar(bytes);
}

fn seal_tar(bytes: &mut [u8]) {
    for at in tar_headers(bytes) {
        seal_header(&mut bytes[at..at + 512]);
    }
}

fn number_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).map_or([0; N], |found| found.try_into().unwrap())
}

/// Gives the headers of a VMA archive their hashes, and perhaps the number of blocks.
fn seal_vma(bytes: &mut [u8], random: &mut Random) {
    let end = (u32::from_be_bytes(number_at(bytes, 56)) as usize).min(bytes.len());
    let seal = |header: &mut [u8], at: usize| {
        header[at..at + 16].fill(0);
        let hash = Md5::digest(&*header);
        header[at..at + 16].copy_from_slice(&hash);
    };
    if end >= 64 {
        seal(&mut bytes[..end], 32);
    }
    let counts = random.below(2) == 0;
    for at in (0..bytes.len() / 512).map(|block| block * 512) {
        let extent = &mut bytes[at..at + 512];
        if !extent.starts_with(b"VMAE") {
            continue;
        }
        if counts {
            let entries = extent[40..].chunks_exact(8).filter(|entry| entry[3] != 0);
            let blocks: u32 = entries.map(|entry| entry[0].count_ones() + entry[1].count_ones()).sum();
            extent[6..8].copy_from_slice(&u16::try_from(blocks & 0xffff).unwrap().to_be_bytes());
        }
        seal(extent, 24);
    }
}

/// Changes an extent's header of a VMA archive, or a device.
fn change_vma(bytes: &mut Vec<u8>, random: &mut Random) {
    let extents: Vec<usize> = (0..bytes.len() / 512)
        .map(|block| block * 512)
        .filter(|at| bytes[*at..].starts_with(b"VMAE"))
        .collect();
    if extents.is_empty() || random.below(3) == 0 {
        let device = 4096 + 32 * (1 + below(random, 5));
        let at = pick(&[48, 52, 56, 2044, 2048, 3068, 3072, device, device + 8, 24], random);
        if at + 8 <= bytes.len() {
            put(bytes, at, random);
        }
        return;
    }
    let at = pick(&extents, random);
    let entry = at + 40 + 8 * below(random, 59);
    let from = pick(&extents, random) + 40 + 8 * below(random, 6);
    match random.below(5) {
        0 => bytes.copy_within(from..from + 8, entry),
        1 => bytes[entry + 3] = pick(&[0, 1, 2, 3, 4, 5, 6], random),
        2 => bytes[entry..entry + 2].copy_from_slice(&[(random.next() & 0xff) as u8; 2]),
        3 => {
            // A whole extent once more.
            let end = extents.iter().copied().find(|next| *next > at).unwrap_or(bytes.len());
            let extent = bytes[at..end].to_vec();
            let to = pick(&extents, random);
            bytes.splice(to..to, extent);
        }
        _ => put(bytes, at + 4 * below(random, 128), random),
    }
}

/// Gives the footers and the header of a VHD their checksums.
fn seal_vhd(bytes: &mut [u8], random: &mut Random) {
    if bytes.len() < 2048 {
        return;
    }
    let end = bytes.len() - 512;
    match random.below(4) {
        0 if bytes.starts_with(b"conectix") => bytes.copy_within(..512, end),
        1 if bytes.starts_with(b"conectix") && bytes[end..].starts_with(b"conectix") => bytes.copy_within(end.., 0),
        _ => {}
    }
    for at in (0..bytes.len() / 512).map(|block| block * 512) {
        if bytes[at..].starts_with(b"conectix") {
            sum_at(&mut bytes[at..at + 512], 64);
        } else if bytes[at..].starts_with(b"cxsparse") && at + 1024 <= bytes.len() {
            sum_at(&mut bytes[at..at + 1024], 36);
        }
    }
}

/// Gives all parts of a VHDX their checksums.
fn seal_vhdx(bytes: &mut [u8]) {
    for at in (0..bytes.len() / 4096).map(|page| page * 4096) {
        let length = match &bytes[at..at + 4] {
            b"head" => 4096,
            b"regi" => 65_536,
            b"loge" => u32::from_le_bytes(number_at(bytes, at + 8)) as usize,
            _ => continue,
        };
        if (8..=bytes.len() - at).contains(&length) {
            crc_at(&mut bytes[at..at + length]);
        }
    }
}

/// Gives the first header of a compressed stream its checksum, if it has one.
fn seal_stream(bytes: &mut [u8]) {
    if bytes.starts_with(b"\x04\x22\x4d\x18") && bytes.len() > 15 {
        let length = if bytes[4] & 8 == 0 { 2 } else { 10 };
        bytes[4 + length] = xxh32(&bytes[4..4 + length], 0).to_le_bytes()[1];
    }
    if bytes.starts_with(b"\x89LZO") && bytes.len() > 300 {
        let end = 34 + usize::from(bytes[33]);
        let sum = if u32::from_be_bytes(number_at(bytes, 17)) & (1 << 12) == 0 {
            adler2::adler32_slice(&bytes[9..end])
        } else {
            crc32fast::hash(&bytes[9..end])
        };
        bytes[end..end + 4].copy_from_slice(&sum.to_be_bytes());
    }
}

/// Makes checksums right again, where a format has any.
fn seal(format: &str, bytes: &mut [u8], random: &mut Random) {
    match format {
        "tar" | "ova" => seal_tar(bytes),
        "vma" => seal_vma(bytes, random),
        "vhd" => seal_vhd(bytes, random),
        "vhdx" => seal_vhdx(bytes),
        "lz4" | "lzop" => seal_stream(bytes),
        _ => {}
    }
}

/// Whether a format has a hash of all that it holds.
fn is_hashed(format: &str) -> bool {
    ["gzip", "bzip2", "xz", "zstd", "lz4", "lzop", "qvm", "qvm3"].contains(&format)
}

/// A backup of a format that was changed.
pub(crate) fn mutated(format: &Format, random: &mut Random) -> Case {
    let seed = &format.seeds[below(random, format.seeds.len())];
    let mut case = if let Some(model) = seed.model.as_ref().filter(|_| random.below(8) > 0) {
        Case {
            bytes: change_model(model, random),
            ..Case::default()
        }
    } else if is_hashed(format.name) && random.below(3) > 0 {
        // What is only damaged is never told as whole, unless it still is.
        let mut bytes = seed.bytes.clone();
        damage(&mut bytes, random);
        Case {
            bytes,
            expected: Some(seed.expected.clone()),
            ..Case::default()
        }
    } else {
        changed(format, seed, random)
    };
    if random.below(10) == 0 {
        let mut limits = limits();
        limits.volume_bytes = 1 << (10 + random.below(20));
        limits.volumes = 1 + below(random, 8);
        limits.name_bytes = 1 << random.below(12);
        case.limits = Some(limits);
    }
    case
}

/// Damages a stream so that it cannot be another one that is whole.
fn damage(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = below(random, bytes.len());
    match random.below(6) {
        0 => bytes.truncate(at),
        1 => {
            let end = bytes.len().min(at + 1 + below(random, 300));
            let value = (random.next() & 0xff) as u8;
            bytes[at..end].fill(value);
        }
        2 => {
            let end = bytes.len().min(at + 1 + below(random, 3000));
            bytes.drain(at..end);
        }
        3 => put(bytes, at, random),
        _ => (0..=random.below(3)).for_each(|_| {
            let at = below(random, bytes.len());
            bytes[at] ^= 1 << random.below(8);
        }),
    }
}

/// Changes the bytes of a backup, and makes its checksums right most of the time.
fn changed(format: &Format, seed: &Seed, random: &mut Random) -> Case {
    let mut case = Case {
        bytes: seed.bytes.clone(),
        backing: seed.backing.clone(),
        ..Case::default()
    };
    let bytes = &mut case.bytes;
    for _ in 0..=random.below(4) {
        match format.name {
            "tar" | "ova" if random.below(4) > 0 => change_tar(bytes, random),
            "vma" if random.below(2) == 0 => change_vma(bytes, random),
            _ => change(bytes, &seed.places, random),
        }
    }
    if random.below(4) == 0 {
        splice(bytes, &format.seeds, random);
    }
    if random.below(8) > 0 {
        seal(format.name, bytes, random);
    }
    if let Some(below_it) = case.backing.first_mut().filter(|_| random.below(4) == 0) {
        let places = metadata_places(below_it);
        change(below_it, &places, random);
    }
    let in_order = ["tar", "ova", "vma", "stream"].contains(&format.name);
    if in_order && random.below(8) == 0 {
        case.bytes = compress(pick(&["gzip", "zstd"], random), &case.bytes);
    }
    case
}

/// Changes what a backup of Qubes OS is made of, before it is encrypted.
fn change_model(model: &Model, random: &mut Random) -> Vec<u8> {
    let mut model = model.clone();
    for _ in 0..=random.below(2) {
        let at = below(random, model.members.len());
        match random.below(10) {
            0 => change_text(&mut model, random),
            1 => change_xml(&mut model.members[0].1, random),
            2 => drop(model.members.remove(at)),
            3 => {
                let other = below(random, model.members.len());
                model.members.swap(at, other);
            }
            4 => {
                let other = pick(&model.members, random);
                model.members[at].1 = other.1;
            }
            5 => model.part_bytes = 1 + below(random, 200_000).max(300),
            _ => change_tar(&mut model.members[at].1, random),
        }
        if model.members.is_empty() {
            break;
        }
    }
    let mut parts = Vec::new();
    let damaged = below(random, model.members.len() * 3);
    for (number, (name, archive)) in model.members.iter().enumerate() {
        let mut stored = compress(model.filter, archive);
        if number == damaged && !stored.is_empty() {
            match random.below(4) {
                0 => stored = compress(pick(&["gzip", "zstd", "xz", "lzma", "none"], random), archive),
                1 => stored.extend(compress(model.filter, archive)),
                _ => damage(&mut stored, random),
            }
        }
        model.add_parts(&mut parts, name, &stored);
    }
    if random.below(3) == 0 {
        change_parts(&mut parts, random);
    }
    let mut bytes = model.make_of(&parts);
    if random.below(8) == 0 {
        damage(&mut bytes, random);
        seal_tar(&mut bytes);
    }
    bytes
}

/// Changes which parts there are, and how they are encrypted.
fn change_parts(parts: &mut Vec<Part>, random: &mut Random) {
    if parts.is_empty() {
        return;
    }
    let (at, other) = (below(random, parts.len()), below(random, parts.len()));
    match random.below(9) {
        0 => drop(parts.remove(at)),
        1 => parts.insert(other, parts[at].clone()),
        2 => parts.swap(at, other),
        3 => parts[at].name = parts[other].name.clone(),
        4 => parts[at].key_name = parts[other].key_name.clone(),
        5 => {
            let names = [
                "vm7/private.img.999",
                "vm7/../x.000",
                "vm99/root.img.000",
                "dom0-home/user.000",
                "qubes.xml.001",
                "vm7/a b.000",
                "vm2/x.000",
                "vm2/empty.000",
                "vm2/..999",
                "vm7/..000",
                "vm7/volatile.img.000",
                "appvms/work/root.img.000",
                "servicevms/work/x.000",
            ];
            let name = pick(&names, random).to_owned();
            (parts[at].name, parts[at].key_name) = (name.clone(), name);
        }
        6 => parts[at].plain.clear(),
        7 => {
            parts[at].parameters = (
                pick(&[0u8, 1, 2, 5, 8, 22, 63, 255], random),
                pick(&[0u32, 1, 8, 32, 33, u32::MAX], random),
                pick(&[0u32, 1, 2, 1024, u32::MAX], random),
            );
        }
        _ => {
            let length = below(random, parts[at].plain.len() + 1);
            parts[at].plain.truncate(length);
        }
    }
}

/// Changes the header, which is a text.
fn change_text(model: &mut Model, random: &mut Random) {
    let mut lines: Vec<String> = model.header.lines().map(str::to_owned).collect();
    let at = below(random, lines.len());
    let new = [
        "version=3",
        "version=4",
        "version=",
        "encrypted=False",
        "encrypted=True",
        "crypto-algorithm=bf-cbc",
        "hmac-algorithm=sha256",
        "hmac-algorithm=whirlpool",
        "compressed=False",
        "compression-filter=sh",
        "compression-filter=xz",
        "backup-id=-",
        "a=b=c",
        "",
        "hmac-algorithm=sha512",
        "x=\u{1b}",
    ];
    match random.below(3) {
        0 => pick(&new, random).clone_into(&mut lines[at]),
        1 => lines.push(pick(&new, random).to_owned()),
        _ => drop(lines.remove(at)),
    }
    model.header = lines.join("\n");
}

/// Changes the text of `qubes.xml` in its archive.
fn change_xml(archive: &mut Vec<u8>, random: &mut Random) {
    let Some(end) = archive.iter().rposition(|byte| *byte == b'>') else {
        return;
    };
    let text = String::from_utf8_lossy(&archive[512..=end.max(512)]).into_owned();
    let tokens = [
        "backup-content",
        "True",
        "vm7/",
        "vm2/",
        "work",
        "debian-12",
        "private",
        "root",
        "</domain>",
        "<domain class=\"AppVM\">",
        "save_on_stop",
        "backup_content",
        "backup_path",
        "template_qid",
        "QubesTemplateVm",
        "private.img",
    ];
    let from = pick(&tokens, random);
    let to = pick(
        &[
            "",
            "x",
            "vm2/",
            "../../a",
            "<a>",
            "&lt;",
            "&a;",
            "work",
            "vm7",
            "dom0-home/x",
            "<!DOCTYPE a>",
            "\u{1b}[0m",
            "root",
            "none",
            "vm-templates/debian-12",
            "appvms/../x",
        ],
        random,
    );
    let text = if random.below(2) == 0 {
        text.replacen(from, to, 1)
    } else {
        text.replace(from, to)
    };
    archive.clear();
    crate::qvm_maker::add_file(archive, "qubes.xml", text.as_bytes());
    archive.resize(archive.len().next_multiple_of(10_240), 0);
}
