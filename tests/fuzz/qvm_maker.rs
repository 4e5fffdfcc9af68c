// Backups of Qubes OS that are made here, so that what is in them can be changed before it is encrypted. Archives inside are those of GNU tar.

use std::fmt::Write as _;
use std::io::Write;
use std::path::Path;

use aes::Aes256;
use cbc::cipher::BlockModeEncrypt;
use cbc::cipher::array::Array;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use hmac::{Hmac, KeyInit, Mac};
use md5::Md5;
use sha2::{Digest, Sha256, Sha384, Sha512};

use crate::backup_seeds::image;
use crate::common::sh;
use crate::qvm::{Machine, make_backup, write_machines, write_sparse};
use crate::qvm3_maker::Maker;

/// How a backup is protected.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protection {
    /// As version 4 has it: each part by a passphrase that has its name.
    Names,
    /// As version 3 has it: each part by a hash.
    Hashes {
        /// Whether members are encrypted.
        is_encrypted: bool,
    },
}

/// What a backup is made of.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) protection: Protection,
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
    /// The name that its passphrase has, or that its hash is called by.
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

fn header_3(filter: &str, hash: &str, is_encrypted: bool) -> String {
    let compression = if filter == "none" {
        "compressed=False".to_owned()
    } else {
        format!("compressed=True\ncompression-filter={filter}")
    };
    let encrypted = if is_encrypted { "True" } else { "False" };
    format!("version=3\nhmac-algorithm={hash}\ncrypto-algorithm=aes-256-cbc\nencrypted={encrypted}\n{compression}\n")
}

/// What `openssl enc -aes-256-cbc -md MD5` makes of some bytes.
fn encrypted_3(salt: &str, content: &[u8]) -> Vec<u8> {
    let salt = &Sha256::digest(salt.as_bytes())[..8];
    let mut derived = Vec::new();
    let mut last = Vec::new();
    while derived.len() < 48 {
        last = Md5::digest([&last[..], b"secret", salt].concat()).to_vec();
        derived.extend(&last);
    }
    let padding = 16 - content.len() % 16;
    let mut blocks = [content, &vec![u8::try_from(padding).unwrap(); padding]].concat();
    let (key, vector): ([u8; 32], [u8; 16]) = (derived[..32].try_into().unwrap(), derived[32..].try_into().unwrap());
    let mut encryptor = cbc::Encryptor::<Aes256>::new(&key.into(), &vector.into());
    encryptor.encrypt_blocks(Array::cast_slice_from_core_mut(blocks.as_chunks_mut::<16>().0));
    [b"Salted__", salt, &blocks].concat()
}

/// What `openssl dgst -hmac` says of some bytes.
fn hash_text(algorithm: &str, content: &[u8]) -> Vec<u8> {
    fn hash<M: Mac + KeyInit>(content: &[u8]) -> Vec<u8> {
        let mut mac = <M as KeyInit>::new_from_slice(b"secret").unwrap();
        mac.update(content);
        mac.finalize().into_bytes().to_vec()
    }
    let hash = match algorithm.to_ascii_lowercase().as_str() {
        "sha256" => hash::<Hmac<Sha256>>(content),
        "sha384" => hash::<Hmac<Sha384>>(content),
        _ => hash::<Hmac<Sha512>>(content),
    };
    let mut text = String::from("(stdin)= ");
    for byte in hash {
        let _ = write!(text, "{byte:02x}");
    }
    text.into_bytes()
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
        let is_encrypted = self.protection == Protection::Hashes { is_encrypted: true };
        let stored = if is_encrypted {
            encrypted_3(member, stored)
        } else {
            stored.to_vec()
        };
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
        let value = |key: &str| self.header.lines().find_map(|line| line.strip_prefix(key));
        let mut stream = Vec::new();
        if self.protection != Protection::Names {
            let algorithm = value("hmac-algorithm=").unwrap_or_default();
            let mut add = |name: &str, hash_name: &str, content: &[u8]| {
                add_file(&mut stream, name, content);
                add_file(
                    &mut stream,
                    &format!("{hash_name}.hmac"),
                    &hash_text(algorithm, content),
                );
            };
            add("backup-header", "backup-header", self.header.as_bytes());
            for part in parts {
                add(&part.name, &part.key_name, &part.plain);
            }
            return stream;
        }
        let id = value("backup-id=").unwrap_or(ID);
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
        protection: Protection::Names,
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

/// Writes what a backup in version 3 has, in folders of the names that members have there.
fn write_pool_3(folder: &Path, template: &str, work: &str) {
    let xml = format!(
        "<QubesVmCollection default_template=\"2\">\
         <QubesTemplateVm backup_content=\"True\" backup_path=\"{template}\" name=\"debian-12\" qid=\"2\" template_qid=\"none\"/>\
         <QubesAppVm backup_content=\"True\" backup_path=\"{work}\" name=\"work\" qid=\"7\" template_qid=\"2\" private_img=\"private.img\"/>\
         <QubesAppVm name=\"other\" qid=\"9\" template_qid=\"2\"/></QubesVmCollection>"
    );
    for (file, content) in [
        ("qubes.xml".to_owned(), xml.into_bytes()),
        (format!("{template}/root.img"), image(13, 60 * 4096)),
        (format!("{template}/private.img"), vec![0; 1 << 16]),
        (format!("{template}/volatile.img"), image(14, 9000)),
        (format!("{template}/a.conf"), b"a\n".to_vec()),
        (format!("{template}/apps/editor.desktop"), b"[Desktop Entry]\n".to_vec()),
        (format!("{work}/private.img"), image(15, 20_000)),
        (format!("{work}/firewall.xml"), b"<firewall/>".to_vec()),
        (
            format!("{work}/apps.templates/a.desktop"),
            b"[Desktop Entry]\n".to_vec(),
        ),
        (format!("{work}/volatile.img"), image(16, 9000)),
    ] {
        let path = folder.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        write_sparse(&path, &content);
    }
    sh(&format!(
        "cd '{}/{template}'; ln a.conf b.conf; ln -s a.conf link; mkfifo pipe",
        folder.display()
    ));
}

/// Backups in version 3 with each compressor, encrypted and not.
pub(crate) fn models_3(folder: &Path) -> Vec<Model> {
    let forms = ["--format=gnu --sparse", "--format=posix --sparse", "--format=gnu"];
    let hashes = ["SHA512", "sha256", "SHA384"];
    let made = ["gzip", "none", "bzip2", "none", "xz", "lzma", "gzip"]
        .into_iter()
        .enumerate();
    let made = made.map(|(number, filter)| {
        let is_encrypted = number < 3;
        let (template, work) = if is_encrypted {
            ("vm2", "vm7")
        } else {
            ("vm-templates/debian-12", "appvms/work")
        };
        let pool = folder.join(format!("pool{number}"));
        std::fs::create_dir(&pool).unwrap();
        write_pool_3(&pool, template, work);
        let files = ["apps.templates", "firewall.xml", "private.img", "volatile.img"];
        let members = ["qubes.xml".to_owned(), format!("{template}/.")];
        let members = members.into_iter().chain(files.map(|file| format!("{work}/{file}")));
        let archive = |member: String| {
            let form = forms[number % 3];
            sh(&format!(
                "cd '{}'; tar -c {form} --sort=name -f ../out {member}",
                pool.display()
            ));
            (member, std::fs::read(folder.join("out")).unwrap())
        };
        Model {
            protection: Protection::Hashes { is_encrypted },
            header: header_3(filter, hashes[number % 3], is_encrypted),
            filter,
            members: members.map(archive).collect(),
            part_bytes: [5000, 100_000][number % 2],
            parameters: (1, 8, 1),
        }
    });
    made.collect()
}

/// Backups in version 3 that the usual tools made.
pub(crate) fn genuine_3() -> Vec<Vec<u8>> {
    let machines = [
        (
            "vm-templates/debian-12",
            "QubesTemplateVm",
            2,
            "template_qid=\"none\"",
            vec![("root.img", image(17, 100_000)), ("private.img", vec![0; 10_000])],
        ),
        (
            "appvms/work",
            "QubesAppVm",
            7,
            "template_qid=\"2\"",
            vec![
                ("private.img", image(18, 100_000)),
                ("firewall.xml", b"<firewall/>".to_vec()),
            ],
        ),
    ];
    [true, false]
        .map(|is_encrypted| Maker::new("gzip", 30_000, is_encrypted).make(&machines))
        .to_vec()
}
