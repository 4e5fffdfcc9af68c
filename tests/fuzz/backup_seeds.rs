// Backups that genuine tools make, small ones, to be changed. They are made once in each run.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::common::{Random, sh};
use crate::made::{Fault, footer_stream, with_log};
use crate::mutate_backups::metadata_places;
use crate::qvm::write_sparse;
use crate::qvm_maker::Model;
use crate::vma::VmaMaker;

/// A backup as a tool made it.
pub(crate) struct Seed {
    pub(crate) bytes: Vec<u8>,
    /// The files that it lies on.
    pub(crate) backing: Vec<Vec<u8>>,
    /// What it holds. It is filled in by reading it.
    pub(crate) expected: BTreeMap<PathBuf, Vec<u8>>,
    /// Offsets of what says where things lie.
    pub(crate) places: Vec<usize>,
    /// What it is made of, if it is made here.
    pub(crate) model: Option<Model>,
}

impl Seed {
    fn new(bytes: Vec<u8>) -> Self {
        Self {
            places: metadata_places(&bytes),
            bytes,
            backing: Vec::new(),
            expected: BTreeMap::new(),
            model: None,
        }
    }
}

/// The backups of a format.
pub(crate) struct Format {
    pub(crate) name: &'static str,
    pub(crate) seeds: Vec<Seed>,
}

/// The names of all formats.
pub(crate) const FORMATS: [&str; 17] = [
    "gzip", "bzip2", "xz", "zstd", "lz4", "lzop", "tar", "ova", "vma", "qvm", "qvm3", "qcow2", "vdi", "vhd", "vhdx",
    "vmdk", "stream",
];

/// An image of blocks that are full, and of holes.
pub(crate) fn image(seed: u64, length: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let mut image = vec![0; length];
    for block in image.chunks_mut(4096) {
        match random.below(4) {
            0 | 1 => {}
            2 => block
                .iter_mut()
                .for_each(|byte| *byte = (random.next() & 0xff) as u8 | 1),
            _ => {
                let text = format!("line {} of {seed}\n", random.below(9)).into_bytes();
                block
                    .iter_mut()
                    .zip(text.iter().cycle())
                    .for_each(|(byte, from)| *byte = *from);
            }
        }
    }
    image
}

/// What a command writes, which is run in a folder that has `a.raw`.
fn made(folder: &Path, command: &str, file: &str) -> Vec<u8> {
    sh(&format!("cd '{}'; rm -f out; {command}", folder.display()));
    std::fs::read(folder.join(file)).unwrap()
}

fn converted(folder: &Path, forms: &[&str]) -> Vec<Seed> {
    let make = |form: &&str| made(folder, &format!("qemu-img convert -f raw -O {form} a.raw out"), "out");
    forms.iter().map(make).map(Seed::new).collect()
}

/// How files are compressed. Each has a hash of all that it holds.
fn compressed(folder: &Path, name: &str) -> Vec<Seed> {
    let commands: &[&str] = match name {
        "gzip" => &["gzip -n", "gzip -9 -N"],
        "bzip2" => &["bzip2 -1", "bzip2 -9"],
        "xz" => &[
            "xz -0",
            "xz --check=sha256 --x86 --lzma2=dict=1MiB",
            "xz -0 --check=crc32 --block-size=65536",
        ],
        "zstd" => &["zstd -q", "zstd -q -19 --long=24"],
        "lz4" => &["lz4 -q", "lz4 -q -B4 -BD -BX --content-size", "lz4 -q -9 -B5"],
        _ => &["lzop", "lzop -9 --crc32 -C"],
    };
    let make = |command: &&str| made(folder, &format!("{command} <a.raw >out"), "out");
    commands.iter().map(make).map(Seed::new).collect()
}

/// A folder of files with holes, long names, links and nothing at all.
fn tree(folder: &Path) {
    let pool = folder.join("pool");
    std::fs::create_dir_all(pool.join("appvms/work")).unwrap();
    write_sparse(&pool.join("appvms/work/root.img"), &image(3, 300_000));
    write_sparse(&pool.join("appvms/work/private.img"), &image(4, 40 * 8192));
    let mut holes = vec![0; 80 * 8192];
    holes
        .chunks_mut(8192)
        .step_by(2)
        .for_each(|block| block[..4096].fill(7));
    write_sparse(&pool.join("holes.img"), &holes);
    std::fs::write(pool.join("small.conf"), b"a=1\n").unwrap();
    std::fs::write(pool.join("empty.img"), b"").unwrap();
    std::fs::write(pool.join("n".repeat(150)), b"long").unwrap();
    sh(&format!(
        "cd '{}'; ln appvms/work/root.img z.img; ln -s z.img link.img; mkfifo pipe",
        pool.display()
    ));
}

fn tars(folder: &Path) -> Vec<Seed> {
    tree(folder);
    let forms = [
        "--format=gnu --sparse",
        "--format=oldgnu --sparse",
        "--format=posix --sparse --sparse-version=0.0",
        "--format=posix --sparse --sparse-version=0.1",
        "--format=posix --sparse --sparse-version=1.0",
        "--format=posix",
        "--format=ustar --exclude=nnn*",
    ];
    let make = |form: &&str| {
        made(
            folder,
            &format!("cd pool; tar -c {form} --sort=name -f ../out ."),
            "out",
        )
    };
    forms.iter().map(make).map(Seed::new).collect()
}

fn ovas(folder: &Path) -> Vec<Seed> {
    let vmdk =
        "qemu-img convert -f raw -O vmdk -o subformat=streamOptimized a.raw disk.vmdk; echo '<Envelope/>' >a.ovf";
    let footer = footer_stream(&image(5, 200_192), 8, 3, Fault::None);
    std::fs::write(folder.join("other.vmdk"), footer).unwrap();
    [
        "sha256sum --tag a.ovf disk.vmdk | sed 's/ = /= /; s/ (/(/' >a.mf; tar -c --format=ustar -f out a.ovf a.mf disk.vmdk",
        "sha256sum --tag other.vmdk a.ovf | sed 's/ = /= /; s/ (/(/' >a.mf; tar -c --format=ustar -f out a.ovf other.vmdk a.mf",
        "gzip -kf disk.vmdk; tar -c --format=ustar -f out a.ovf disk.vmdk.gz other.vmdk",
    ]
    .iter()
    .map(|command| Seed::new(made(folder, &format!("{vmdk}; {command}"), "out")))
    .collect()
}

fn vmas() -> Vec<Seed> {
    let maker = |order, per_extent| VmaMaker {
        devices: vec![
            (b"drive-scsi0", image(6, 400_000)),
            (b"drive-efidisk0", image(7, 540_672)),
            (b"vmstate", image(8, 131_072)),
            (b"drive-tpmstate0-backup", image(9, 4097)),
        ],
        configs: vec![(b"qemu-server.conf", b"name: work\n".to_vec())],
        order,
        per_extent,
        ..VmaMaker::default()
    };
    [maker(0, 5), maker(3, 59)]
        .iter()
        .map(|maker| Seed::new(maker.make()))
        .collect()
}

fn qcow2s(folder: &Path) -> Vec<Seed> {
    let mut seeds = converted(
        folder,
        &[
            "qcow2 -o compat=0.10",
            "qcow2 -c -o compat=0.10,cluster_size=512",
            "qcow2",
            "qcow2 -o cluster_size=512",
            "qcow2 -c",
            "qcow2 -c -o compression_type=zstd",
            "qcow2 -o extended_l2=on,cluster_size=16384",
            "qcow2 -c -o extended_l2=on",
        ],
    );
    let base = std::fs::read(folder.join("a.raw")).unwrap();
    for form in [
        "compat=1.1",
        "extended_l2=on,cluster_size=16384",
        "compat=0.10,cluster_size=4096",
    ] {
        let command = format!(
            "qemu-img create -q -f qcow2 -o {form} -b a.raw -F raw out 400k; qemu-io -f qcow2 -c 'write -P 3 10k 70k' -c 'write -z 100k 90k' out
             qemu-img snapshot -c one out; qemu-io -f qcow2 -c 'write -P 4 40k 9k' out; qemu-img snapshot -c two out"
        );
        seeds.push(Seed {
            backing: vec![base.clone()],
            ..Seed::new(made(folder, &format!("({command}) >/dev/null"), "out"))
        });
    }
    // One that lies on another.
    let last = seeds.last().unwrap().bytes.clone();
    std::fs::write(folder.join("middle"), &last).unwrap();
    let command =
        "qemu-img create -q -f qcow2 -b middle -F qcow2 out; qemu-io -f qcow2 -c 'write -P 9 0 9k' out >/dev/null";
    seeds.push(Seed {
        backing: vec![last, base],
        ..Seed::new(made(folder, command, "out"))
    });
    seeds
}

fn vhdxs(folder: &Path) -> Vec<Seed> {
    let mut seeds = converted(
        folder,
        &["vhdx -o block_size=1M", "vhdx -o subformat=fixed,block_size=1M"],
    );
    let plain = seeds[0].bytes.clone();
    let with_log = with_log(&plain, |log| {
        let zeros = vec![(log.table[0].0, vec![0; 8192])];
        vec![log.entry(0, 0, 7, &zeros), log.entry(4096, 0, 8, &log.table)]
    });
    seeds.push(Seed::new(with_log));
    seeds
}

/// The backups of a format, which are made in a folder.
pub(crate) fn seeds(name: &'static str, folder: &Path) -> Format {
    let content = image(1, 250_368);
    std::fs::write(folder.join("a.raw"), &content).unwrap();
    let mut seeds = match name {
        "tar" => tars(folder),
        "ova" => ovas(folder),
        "vma" => vmas(),
        "qvm" => crate::qvm_maker::models(folder).into_iter().map(of_model).collect(),
        "qvm3" => crate::qvm_maker::models_3(folder).into_iter().map(of_model).collect(),
        "qcow2" => qcow2s(folder),
        "vdi" => converted(folder, &["vdi", "vdi -o static=on"]),
        "vhd" => converted(
            folder,
            &["vpc -o force_size=on", "vpc", "vpc -o subformat=fixed,force_size=on"],
        ),
        "vhdx" => vhdxs(folder),
        "vmdk" => converted(
            folder,
            &["vmdk -o subformat=monolithicSparse", "vmdk -o zeroed_grain=on"],
        ),
        "stream" => {
            let mut seeds = converted(folder, &["vmdk -o subformat=streamOptimized"]);
            let image = image(2, 300_032);
            seeds.extend(
                [(128, 0), (8, 3)].map(|(grain, order)| Seed::new(footer_stream(&image, grain, order, Fault::None))),
            );
            seeds
        }
        _ => compressed(folder, name),
    };
    match name {
        "qvm" => seeds.push(Seed::new(crate::qvm_maker::genuine(folder))),
        "qvm3" => seeds.extend(crate::qvm_maker::genuine_3().into_iter().map(Seed::new)),
        _ => {}
    }
    Format { name, seeds }
}

fn of_model(model: Model) -> Seed {
    Seed {
        bytes: model.make(),
        model: Some(model),
        ..Seed::new(Vec::new())
    }
}
