// Backups of Qubes OS that are made here, so that what is in them can be changed before it is encrypted. Archives inside are those of GNU tar.

use std::io::Write;
use std::path::Path;

use aes::Aes256;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};

use crate::backup_seeds::image;
use crate::common::sh;
use crate::qvm::{Machine, make_backup, write_machines};

/// What a backup is made of.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) header: String,
    /// The program that compresses members; none if they are not compressed.
    pub(crate) filter: &'static str,
    /// Names of members and the archives that they hold.
    pub(crate) members: Vec<(String, Vec<u8>)>,
    /// Bytes of a part.
    pub(crate) part_bytes: usize,
    /// How keys are derived: the logarithm of N, r, and p.
    pub(crate) parameters: (u8, u32, u32),
}

/// A part before it is encrypted.
#[derive(Clone)]
pub(crate) struct Part {
    /// Its name in the stream, without `.enc`.
    pub(crate) name: String,
    /// The name that its passphrase has.
    pub(crate) key_name: String,
    pub(crate) plain: Vec<u8>,
    pub(crate) parameters: (u8, u32, u32),
}

const ID: &str = "20260101T000000-4242";

fn header(filter: &str) -> String {
    let (compressed, filter) = if filter == "none" {
        ("False", "gzip")
    } else {
        ("True", filter)
    };
    format!(
        "version=4\nencrypted=True\ncompressed={compressed}\ncompression-filter={filter}\nhmac-algorithm=scrypt\nbackup-id={ID}\n"
    )
}

/// Compresses some bytes as a program does.
pub(crate) fn compress(filter: &str, bytes: &[u8]) -> Vec<u8> {
    match filter {
        "gzip" => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        "bzip2" => {
            let mut encoder = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        "xz" => {
            let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        "lzma" => {
            let options = lzma_rust2::LzmaOptions::with_preset(0);
            let mut encoder = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        "zstd" => zstd::stream::encode_all(bytes, 1).unwrap(),
        _ => bytes.to_vec(),
    }
}

/// What `scrypt enc` makes of some bytes.
fn encrypted(parameters: (u8, u32, u32), passphrase: &str, content: &[u8]) -> Vec<u8> {
    let (log_n, r, p) = parameters;
    let salt = Sha256::digest(passphrase.as_bytes());
    let mut keys = [0; 64];
    // Parameters that are not taken are still told.
    if let Ok(parameters) = scrypt::Params::new(log_n.min(10), r.min(32), p.min(8)) {
        scrypt::scrypt(passphrase.as_bytes(), &salt, &parameters, &mut keys).unwrap();
    }
    let mac = |bytes: &[u8]| {
        let mut mac: Hmac<Sha256> = KeyInit::new_from_slice(&keys[32..]).unwrap();
        mac.update(bytes);
        mac.finalize().into_bytes()
    };
    let mut file = b"scrypt\0".to_vec();
    file.push(log_n);
    file.extend(r.to_be_bytes());
    file.extend(p.to_be_bytes());
    file.extend(salt);
    let hash = Sha256::digest(&file);
    file.extend(&hash[..16]);
    file.extend(mac(&file));
    file.extend(content);
    let key: [u8; 32] = keys[..32].try_into().unwrap();
    Ctr128BE::<Aes256>::new(&key.into(), &[0; 16].into()).apply_keystream(&mut file[96..]);
    file.extend(mac(&file));
    file
}

/// Adds an archive of one file, as `tar --format=ustar` writes it.
pub(crate) fn add_file(stream: &mut Vec<u8>, name: &str, content: &[u8]) {
    let mut header = [0u8; 512];
    let name = &name.as_bytes()[..name.len().min(100)];
    header[..name.len()].copy_from_slice(name);
    header[100..107].copy_from_slice(b"0000600");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[136..147].copy_from_slice(b"00000000001");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    crate::mutate_backups::seal_header(&mut header);
    stream.extend(header);
    stream.extend(content);
    stream.resize(stream.len().next_multiple_of(512) + 1024, 0);
}

impl Model {
    /// The parts, in their order.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let mut parts = Vec::new();
        for (name, archive) in &self.members {
            self.add_parts(&mut parts, name, &compress(self.filter, archive));
        }
        parts
    }

    /// Cuts what a member holds into parts.
    pub(crate) fn add_parts(&self, parts: &mut Vec<Part>, member: &str, stored: &[u8]) {
        for (number, plain) in stored.chunks(self.part_bytes.max(1)).enumerate() {
            let name = format!("{member}.{number:03}");
            parts.push(Part {
                key_name: name.clone(),
                name,
                plain: plain.to_vec(),
                parameters: self.parameters,
            });
        }
    }

    /// The backup of these parts.
    pub(crate) fn make_of(&self, parts: &[Part]) -> Vec<u8> {
        let mut stream = Vec::new();
        let id = self
            .header
            .lines()
            .find_map(|line| line.strip_prefix("backup-id="))
            .unwrap_or(ID);
        add_file(&mut stream, "backup-header", self.header.as_bytes());
        let copy = encrypted(self.parameters, "backup-header!secret", self.header.as_bytes());
        add_file(&mut stream, "backup-header.hmac", &copy);
        for part in parts {
            let file = encrypted(part.parameters, &format!("{id}!{}!secret", part.key_name), &part.plain);
            add_file(&mut stream, &format!("{}.enc", part.name), &file);
        }
        stream
    }

    pub(crate) fn make(&self) -> Vec<u8> {
        self.make_of(&self.parts())
    }
}

fn write_pool(folder: &Path) {
    let machines = [
        Machine {
            folder: "vm2",
            class: "TemplateVM",
            name: "debian-12",
            files: vec![("root.img", image(11, 60 * 4096)), ("private.img", vec![0; 1 << 16])],
        },
        Machine {
            folder: "vm7",
            class: "AppVM",
            name: "work",
            files: vec![
                ("private.img", image(12, 20_000)),
                ("firewall.xml", b"<firewall/>".to_vec()),
                ("empty", Vec::new()),
            ],
        },
    ];
    write_machines(folder, &machines);
}

/// Backups with each compressor. The archives of images are of the three forms that they have.
pub(crate) fn models(folder: &Path) -> Vec<Model> {
    let pool = folder.join("qubes");
    write_pool(&pool);
    let forms = ["--format=gnu --sparse", "--format=posix --sparse", "--format=gnu"];
    let filters = ["none", "gzip", "bzip2", "xz", "lzma", "zstd"];
    let members = [
        "qubes.xml",
        "vm2/private.img",
        "vm2/root.img",
        "vm7/empty",
        "vm7/firewall.xml",
        "vm7/private.img",
    ];
    let archive = |member: &&str, form: &str| {
        sh(&format!("cd '{}'; tar -c {form} -f ../out {member}", pool.display()));
        ((*member).to_owned(), std::fs::read(folder.join("out")).unwrap())
    };
    let made = filters.iter().enumerate().map(|(number, filter)| Model {
        header: header(filter),
        filter,
        members: members
            .iter()
            .map(|member| archive(member, forms[number % 3]))
            .collect(),
        part_bytes: [5000, 100_000][number % 2],
        parameters: (1 + u8::try_from(number % 4).unwrap(), 8, 1),
    });
    made.collect()
}

/// A backup that the usual tools made.
pub(crate) fn genuine(folder: &Path) -> Vec<u8> {
    let (pool, out) = (folder.join("qubes"), folder.join("genuine"));
    make_backup(&pool, &out, "gzip", 60_000, "--sparse");
    std::fs::read(out).unwrap()
}
