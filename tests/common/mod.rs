//! What tests on real filesystems have in common: loop devices, image data, and what must not change.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "each test binary uses a part"
)]

pub mod readers;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use sha2::Digest as _;

/// Whether tests on real filesystems can run here. Where they cannot, they say so, and fail if this is a CI run.
pub fn can_mount() -> bool {
    let missing = [
        "mkfs.btrfs",
        "mkfs.ext4",
        "mkfs.xfs",
        "btrfs",
        "losetup",
        "filefrag",
        "setfattr",
        "qemu-io",
    ]
    .into_iter()
    .find(|tool| {
        !Command::new("sh")
            .args(["-c", &format!("command -v {tool}")])
            .output()
            .is_ok_and(|found| found.status.success())
    });
    let problem = match missing {
        Some(tool) => format!("{tool} is not installed"),
        None if !rustix::process::geteuid().is_root() => "it takes root".to_owned(),
        None => return true,
    };
    assert!(
        std::env::var_os("CI").is_none(),
        "tests on real filesystems cannot run: {problem}"
    );
    println!("NOT RUN: {problem}");
    false
}

/// Unmounts a filesystem. For a moment it may still be busy: while a test beside this one starts a command, the child has copies of all
/// files that are open here.
pub fn unmount(mount: &Path) {
    const TRIES: u32 = 100;
    let unmounted = |_| {
        let status = Command::new("umount").arg(mount).status().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(if status.success() { 0 } else { 100 }));
        status.success()
    };
    assert!((0..TRIES).any(unmounted), "`{}` stays busy", mount.display());
}

/// Runs a command that must succeed, and returns what it printed.
pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// A filesystem in a file, mounted; gone with the value.
pub struct Mounted {
    folder: tempfile::TempDir,
    pub mount: PathBuf,
}

impl Mounted {
    pub fn new(mkfs: &str, options: &str, mib: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (image, mount) = (folder.path().join("fs"), folder.path().join("mnt"));
        File::create(&image).unwrap().set_len(mib << 20).unwrap();
        std::fs::create_dir(&mount).unwrap();
        sh(&format!("{mkfs} {} 2>&1", image.display()));
        sh(&format!(
            "mount -o loop{options} {} {}",
            image.display(),
            mount.display()
        ));
        let mounted = Self { folder, mount };
        std::fs::create_dir(mounted.pool()).unwrap();
        mounted
    }

    pub fn btrfs() -> Self {
        Self::new("mkfs.btrfs -q", "", 2048)
    }

    /// Where the images are.
    pub fn pool(&self) -> PathBuf {
        self.mount.join("pool")
    }

    /// The file that holds it.
    pub fn device(&self) -> PathBuf {
        self.folder.path().join("fs")
    }

    /// Where the index of this filesystem is kept.
    pub fn index(&self) -> PathBuf {
        self.folder.path().join("index")
    }

    /// Bytes of data in use, as the filesystem counts them.
    pub fn used(&self) -> u64 {
        let mount = self.mount.display();
        let text = sh(&format!(
            "sync -f {mount}; btrfs filesystem sync {mount} >/dev/null; btrfs filesystem df -b {mount}"
        ));
        let data = text.lines().find(|line| line.starts_with("Data")).unwrap();
        data.split("used=").nth(1).unwrap().trim().parse().unwrap()
    }

    /// Runs vmfold on the pool.
    pub fn vmfold(&self, arguments: &str) -> Output {
        let mut command = self.command();
        command
            .args(arguments.split_whitespace())
            .arg("--index")
            .arg(self.index())
            .arg(self.pool());
        command.output().unwrap()
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmfold"));
        command.env_clear().current_dir(&self.mount);
        command
    }

    /// Runs vmfold on the pool and returns its JSON document.
    pub fn vmfold_json(&self, arguments: &str) -> serde_json::Value {
        let output = self.vmfold(&format!("--json {arguments}"));
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {} {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    /// Overwrites the second block of an image on the device, behind the filesystem's back.
    pub fn corrupt(&self, image: &Path) {
        let mut block = vec![0; 4096];
        File::open(image).unwrap().read_exact_at(&mut block, 4096).unwrap();
        let (mount, device) = (self.mount.display(), self.folder.path().join("fs"));
        unmount(&self.mount);
        let all = std::fs::read(&device).unwrap();
        let at = all.chunks(4096).position(|candidate| candidate == block).unwrap() as u64 * 4096;
        File::options()
            .write(true)
            .open(&device)
            .unwrap()
            .write_all_at(&[0xa5; 4096], at)
            .unwrap();
        sh(&format!("mount -o loop {} {mount}", device.display()));
    }

    /// Unmounts and checks that the filesystem is sound, checksums included.
    pub fn check(&self) {
        sh(&format!("btrfs scrub start -B {}", self.mount.display()));
        unmount(&self.mount);
        sh(&format!("btrfs check {} 2>&1", self.folder.path().join("fs").display()));
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            readers::check_archives_below(&self.mount);
        }
        // A test that failed may leave it mounted; one that called `check` has not.
        let _ = Command::new("umount").arg("-q").arg(&self.mount).output();
    }
}

/// The SHA-256 of a file, in hexadecimal digits. It is made here because `sha256sum` takes five times as long where processors have
/// instructions for it, and tests hash much.
pub fn sha256_of(path: &Path) -> String {
    let mut file = std::fs::File::open(path).unwrap();
    let (mut hasher, mut buffer) = (sha2::Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return hex(&hasher.finalize()),
            count => hasher.update(&buffer[..count]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// Everything about images that must stay as it is.
pub fn state_of(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut state = BTreeMap::new();
    for entry in walkdir::WalkDir::new(folder)
        .into_iter()
        .map(Result::unwrap)
        .filter(|entry| entry.file_type().is_file())
    {
        let metadata = entry.metadata().unwrap();
        let rest = format!(
            "{} mtime {}.{} ctime {}.{} inode {} links {} mode {:o} owner {}:{} size {}",
            sha256_of(entry.path()),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
            metadata.ino(),
            metadata.nlink(),
            metadata.mode(),
            metadata.uid(),
            metadata.gid(),
            metadata.len()
        );
        state.insert(entry.path().to_owned(), rest);
    }
    state
}

/// A repeatable source of numbers (`SplitMix64`).
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Data of which about half can be compressed.
    pub fn data(&mut self, length: usize) -> Vec<u8> {
        let mut data = Vec::with_capacity(length);
        for n in 0..length / 8 {
            let number = if n / 256 % 2 == 0 { self.next() } else { n as u64 % 7 };
            data.extend_from_slice(&number.to_le_bytes());
        }
        data
    }
}

const MIB: u64 = 1 << 20;

/// Files of a guest: a population from which images take what they need, at places of their own.
pub fn population(random: &mut Random) -> Vec<Vec<u8>> {
    (0..120)
        .map(|_| {
            let blocks = 1 + random.below(60);
            random.data(usize::try_from(blocks * 4096).unwrap())
        })
        .collect()
}

/// Writes an image: files of the population in an order of its own, some free blocks between them, data of its own.
pub fn write_image(path: &Path, random: &mut Random, population: &[Vec<u8>], mib: u64) {
    let file = OpenOptions::new().create_new(true).write(true).open(path).unwrap();
    file.set_len(mib * MIB).unwrap();
    let mut at = 0;
    while at < mib * MIB * 3 / 4 {
        let length = usize::try_from(4096 * (1 + random.below(40))).unwrap();
        let content = match random.below(10) {
            0 => random.data(length),
            1 => vec![0; length],
            _ => population[usize::try_from(random.below(population.len() as u64)).unwrap()].clone(),
        };
        file.write_all_at(&content, at).unwrap();
        at += content.len() as u64 + 4096 * random.below(3);
    }
    file.sync_all().unwrap();
}

/// Changes an image here and there, as a machine that ran does.
pub fn churn(path: &Path, random: &mut Random, population: &[Vec<u8>], writes: u64) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let blocks = file.metadata().unwrap().len() / 4096;
    for _ in 0..writes {
        let content = match random.below(3) {
            0 => random.data(4096),
            _ => population[usize::try_from(random.below(population.len() as u64)).unwrap()].clone(),
        };
        let at = random.below(blocks - content.len() as u64 / 4096) * 4096;
        file.write_all_at(&content, at).unwrap();
        if random.below(8) == 0 {
            file.sync_all().unwrap();
        }
    }
    file.sync_all().unwrap();
}

pub fn reflink(from: &Path, to: &Path) {
    sh(&format!("cp --reflink=always '{}' '{}'", from.display(), to.display()));
}

/// Builds a pool as Qubes has it: two templates, a restored copy, homes with revisions.
pub fn build_pool(pool: &Path, seed: u64) {
    let mut random = Random(seed);
    let population = population(&mut random);
    for folder in ["vm-templates/a", "vm-templates/b", "standalones", "appvms/work"] {
        std::fs::create_dir_all(pool.join(folder)).unwrap();
    }
    let template = pool.join("vm-templates/a/root.img");
    write_image(&template, &mut random, &population, 48);
    reflink(&template, &pool.join("vm-templates/a/root.img.3@2026-01-01T00:00:00Z"));
    churn(&template, &mut random, &population, 60);
    write_image(&pool.join("vm-templates/b/root.img"), &mut random, &population, 40);
    let restored = pool.join("standalones/restored.img");
    sh(&format!(
        "dd if='{}' of='{}' bs=1M conv=sparse status=none",
        template.display(),
        restored.display()
    ));
    let home = pool.join("appvms/work/private.img");
    write_image(&home, &mut random, &population, 32);
    for revision in 1..4 {
        reflink(
            &home,
            &pool.join(format!(
                "appvms/work/private.img.{revision}@2026-01-0{revision}T00:00:00Z"
            )),
        );
        churn(&home, &mut random, &population, 25);
    }
    sh(&format!("fallocate -o 33554432 -l 4194304 '{}'", home.display()));
    reflink(&home, &pool.join("appvms/work/private-precache.img"));
    std::fs::hard_link(&template, pool.join("appvms/work/root.img")).unwrap();
    sh(&format!("sync -f '{}'", pool.display()));
}
