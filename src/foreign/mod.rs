//! Backups that other programs made. Each format has a reader, which makes a [`Backup`] of it: the volumes of the backup, and what they hold, in
//! the order in which that comes. A reader is recognised by the first bytes of the backup, never by its name. It reads in order and in bounded
//! memory, makes no file, and runs no program.
//!
//! To add a format, implement [`Backup`] in a file here and name its first bytes in [`is_backup`] and [`open`]. `tests/foreign.rs` has what each must stand.

mod bounded;
mod compression;
#[cfg(feature = "containers")]
mod container;
#[cfg(not(feature = "containers"))]
#[path = "no_container.rs"]
mod container;
mod input;
mod limits;
mod lz4;
mod lzop;
mod notes;
mod ova;
mod pool_tar;
mod qvm;
#[cfg_attr(
    not(feature = "containers"),
    allow(dead_code, reason = "only containers are read in any order")
)]
mod random;
mod raw;
mod tar;
mod vma;
mod volume_name;

use std::path::PathBuf;

pub use compression::Compression;
pub use input::Input;
pub use limits::Limits;
pub use qvm::{Machine, Skeleton, is_name, machines_of};

pub use crate::keys::Passphrase;

use bounded::Bounded;
use container::{ContainerKind, is_fixed_vhd, vmdk};
use notes::Notes;
use random::RandomInput;

use crate::content::FileTime;
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::store::Store;

/// A volume of a backup: what becomes an image, or a small file that belongs to one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    /// Its path in the folder that is restored to: components that no filesystem takes amiss.
    pub path: PathBuf,
    /// Its length in bytes, where that is known before its content.
    pub size: Option<u64>,
    /// When it was last changed or backed up, where the backup tells.
    pub time: Option<FileTime>,
}

/// What comes next in a backup. Volumes are numbered from 0, in the order in which they come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A volume, before anything of its content.
    Volume(Volume),
    /// Content of a volume, which is in the buffer. What no content comes for is zeros.
    Data {
        /// The number of the volume.
        volume: usize,
        /// The offset in the volume, in bytes. Offsets may come in any order, and none comes twice.
        offset: u64,
    },
    /// Another name of a volume that came before.
    Link {
        /// The number of the volume.
        volume: usize,
        /// The name, as in [`Volume::path`].
        path: PathBuf,
    },
    /// The end of a volume, once it is proved that all of it came.
    End {
        /// The number of the volume.
        volume: usize,
        /// Its length in bytes.
        size: u64,
    },
}

/// What a backup says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// What its program called it.
    pub name: Option<String>,
    /// When it was made.
    pub time: Option<FileTime>,
}

/// A backup that is read in order.
pub trait Backup {
    /// Returns what it is, for messages.
    fn kind(&self) -> &'static str;

    /// Returns what it says of itself.
    fn origin(&self) -> Origin {
        Origin::default()
    }

    /// Reads on. Content replaces that of the buffer. `None` means that the backup is whole. Nothing is read after an error.
    ///
    /// # Errors
    /// [`Error::DamagedBackup`], [`Error::RefusedBackup`], [`Error::Io`], [`Error::Interrupted`].
    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>>;

    /// Whether the end of a volume proves its content, also if something that comes later is damaged. Otherwise, nothing is proved before the
    /// end of the backup: hashes of a compressed stream come behind what they are of.
    fn proves_each_volume(&self) -> bool;

    /// Whether it holds blocks of its volumes as they are, in whole blocks of its own file, so that images can share them from there.
    fn holds_blocks_in_place(&self) -> bool {
        false
    }

    /// The machines of Qubes OS that it is of, with all of their images. Other backups have none.
    fn machines(&self) -> &[Machine] {
        &[]
    }

    /// Says that nothing of a volume is wanted. Its content, its links and its end may be left out from now on.
    fn leave_out(&mut self, volume: usize) {
        let _ = volume;
    }
}

/// Returns the passphrase of a backup. It is called once a backup has shown that it needs one.
pub type AskPassphrase<'a> = dyn Fn() -> Result<Passphrase> + 'a;

/// How a backup is opened.
pub struct OpenOptions<'a, 's> {
    /// What it must not exceed.
    pub limits: Limits,
    /// Asks for the passphrase, if the backup needs one.
    pub ask_passphrase: &'a AskPassphrase<'a>,
    /// Whether what is not handed out is checked as well.
    pub checks_all: bool,
    /// Whether it is a raw image, whatever it begins with.
    pub is_raw: bool,
    /// What a qcow2 image leaves to other files: its backing file, the backing file of that, and so on. What an image names is never opened.
    pub backing: &'s [Box<dyn Store>],
}

/// Whether something that begins with these bytes, 1536 of them or all there are, and ends with those of [`last_bytes`], is a backup that
/// [`open`] reads, or says why it does not.
pub fn is_backup(first: &[u8], last: &[u8]) -> bool {
    begins_as_backup(first) || is_fixed_vhd(last)
}

fn begins_as_backup(first: &[u8]) -> bool {
    Compression::of(first).is_some()
        || first.starts_with(vma::MAGIC)
        || pool_tar::is_tar(first)
        || vmdk::is_stream(first)
        || ContainerKind::of(first).is_some()
        || NOT_A_DISK.iter().any(|(magic, _)| first.starts_with(magic))
        || vmdk::is_descriptor(first)
}

/// The last bytes of a store that [`is_backup`] needs: 512, or none if the store has fewer, or is a pipe.
///
/// # Errors
/// [`Error::Io`].
pub fn last_bytes(store: &dyn Store) -> Result<Vec<u8>> {
    let failed = Error::io("read", store.path());
    let mut last = vec![0; LAST_BYTES];
    match store.length() {
        Ok(Some(length)) if length >= LAST_BYTES as u64 => {
            let read = store.read_exact_at(length - LAST_BYTES as u64, &mut last);
            read.map(|()| last).map_err(failed)
        }
        Ok(_) => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

/// Opens the backup that a store holds, whose first or last bytes are those of one.
///
/// # Errors
/// Those of [`Backup::next`].
pub fn open<'a>(
    store: &'a dyn Store,
    options: &OpenOptions<'_, 'a>,
    monitor: &'a dyn Monitor,
) -> Result<Box<dyn Backup + 'a>> {
    let backup = open_unbounded(store, options, monitor)?;
    Ok(Box::new(Bounded::new(backup, store.path(), options.limits, monitor)))
}

/// As [`open`]. What all readers have in common is not checked.
fn open_unbounded<'a>(
    store: &'a dyn Store,
    options: &OpenOptions<'_, 'a>,
    monitor: &'a dyn Monitor,
) -> Result<Box<dyn Backup + 'a>> {
    let mut input = Input::of_store(store, options.limits, monitor);
    let first = input.peek(MAGIC_BYTES)?;
    if options.is_raw {
        return open_raw(store, input, options.limits, monitor);
    }
    if is_fixed_vhd(&last_bytes(store)?) {
        // What a fixed disk begins with, its guest wrote, and perhaps also what something else ends with.
        if begins_as_backup(first) || first.starts_with(ARCHIVE_MAGIC) {
            return Err(input.refused(AMBIGUOUS));
        }
        let file = RandomInput::of_store(store, options.limits, monitor)?;
        let file = file.ok_or_else(|| input.refused("its length is not known"))?;
        return ContainerKind::Vhd.open(file, &[]);
    }
    let compression = Compression::of(first);
    if let Some(compression) = compression {
        input = input.decompressed(compression)?;
    }
    let first = input.peek(MAGIC_BYTES)?;
    if !options.backing.is_empty() && ContainerKind::of(first) != Some(ContainerKind::Qcow2) {
        return Err(input.refused("--backing names a file, and only a qcow2 image has a backing file"));
    }
    if first.starts_with(vma::MAGIC) {
        return Ok(Box::new(vma::Vma::open(input)?));
    }
    if qvm::begins_with_header(first) {
        let options = qvm_options(store, compression, options, monitor);
        return qvm::open(input, &options);
    }
    if qvm::begins_without_header(first) {
        return Err(input.damaged(0, 0, None, "its backup-header is missing"));
    }
    if pool_tar::is_tar(first) {
        return Ok(Box::new(pool_tar::PoolTar::open(input, monitor)?));
    }
    if vmdk::is_stream(first) {
        return vmdk::open_stream(input, compression);
    }
    if let Some(kind) = ContainerKind::of(first) {
        let file = RandomInput::of_store(store, options.limits, monitor)?.filter(|_| compression.is_none());
        let file = file.ok_or_else(|| {
            let name = kind.name();
            input.refused(format!(
                "it is {name}, which is read in any order: store it in a file, not compressed"
            ))
        })?;
        return kind.open(file, options.backing);
    }
    if let Some(problem) = why_not_read(first) {
        return Err(input.refused(problem));
    }
    match compression {
        Some(_) if Compression::of(first).is_none() => Ok(Box::new(raw::Raw::new(input, compression))),
        Some(_) => Err(input.refused("it is compressed twice")),
        None => Err(input.refused("it is of no kind that is known")),
    }
}

/// Opens a raw image, compressed or not.
fn open_raw<'a>(
    store: &'a dyn Store,
    mut input: Input<'a>,
    limits: Limits,
    monitor: &'a dyn Monitor,
) -> Result<Box<dyn Backup + 'a>> {
    if let Some(compression) = Compression::of(input.peek(MAGIC_BYTES)?) {
        let input = input.decompressed(compression)?;
        return Ok(Box::new(raw::Raw::new(input, Some(compression))));
    }
    Ok(Box::new(match RandomInput::of_store(store, limits, monitor)? {
        Some(file) => raw::Raw::of_file(file, input),
        None => raw::Raw::new(input, None),
    }))
}

/// Why something is not read that begins with these bytes, if it is known.
fn why_not_read(first: &[u8]) -> Option<&'static str> {
    let mut known = NOT_READ.iter().chain(&NOT_A_DISK);
    let known = known.find(|(magic, _)| first.starts_with(magic));
    let descriptor = || vmdk::is_descriptor(first).then(|| vmdk::why_not_a_disk(first));
    known.map(|(_, problem)| *problem).or_else(descriptor)
}

/// How a backup of Qubes OS is opened.
fn qvm_options<'a, 'b>(
    store: &'a dyn Store,
    compression: Option<Compression>,
    options: &OpenOptions<'b, '_>,
    monitor: &'a dyn Monitor,
) -> qvm::QvmOptions<'a, 'b> {
    // Only what is not compressed, and no pipe, is read out of order.
    let is_whole = compression.is_none() && store.length().is_ok_and(|length| length.is_some());
    qvm::QvmOptions {
        store: is_whole.then_some(store),
        ask_passphrase: options.ask_passphrase,
        kdf_memory_bytes: options.limits.kdf_memory_bytes(),
        checks_all: options.checks_all,
        keeps: false,
        monitor,
    }
}

/// Makes a skeleton of a backup of Qubes OS.
///
/// # Errors
/// [`Error::RefusedBackup`] if it is none; those of [`Backup::next`].
pub fn skeleton(store: &dyn Store, options: &OpenOptions<'_, '_>, monitor: &dyn Monitor) -> Result<Skeleton> {
    let mut input = Input::of_store(store, options.limits, monitor);
    let compression = Compression::of(input.peek(MAGIC_BYTES)?);
    if let Some(compression) = compression {
        input = input.decompressed(compression)?;
    }
    if !qvm::begins_with_header(input.peek(MAGIC_BYTES)?) {
        return Err(input.refused("it is no backup of Qubes OS"));
    }
    let options = qvm::QvmOptions {
        keeps: true,
        ..qvm_options(store, compression, options, monitor)
    };
    qvm::skeleton(input, &options)
}

/// Things of the same kind that the user is told of one backup, one by one.
const NOTES_MAX: usize = 20;
/// Bytes that tell what a stream holds, at most.
const MAGIC_BYTES: usize = 1536;
/// Bytes at its end that tell what a file is.
const LAST_BYTES: usize = 512;
const ARCHIVE_MAGIC: &[u8] = b"\x89vmfold\n";
/// What a file is refused with that begins as one kind of backup and ends as another.
const AMBIGUOUS: &str = "it begins as one kind of backup and ends as another, a fixed VHD, and a guest can make it look so: convert it into a raw image where it \
    comes from";

/// First bytes of what is no raw image, and what to say of it.
const NOT_READ: [(&[u8], &str); 2] = [
    (ARCHIVE_MAGIC, "it holds an archive of vmfold: decompress it first"),
    (
        b"LUKS\xba\xbe",
        "it holds an encrypted volume, of which nothing can be shared",
    ),
];

/// First bytes of disks that are known, and not read.
const NOT_A_DISK: [(&[u8], &str); 3] = [
    (
        b"QED\0",
        "it is a QED image, which is not read: convert it by qemu-img first",
    ),
    (
        b"\xbe\xba\xfe\xca\0\0\0\0",
        "it is a VMDK of the type seSparse, which belongs to a descriptor: convert the disk into one file first",
    ),
    (
        b"COWD",
        "it is a VMDK of the type vmfsSparse, which belongs to a descriptor: convert the disk into one file first",
    ),
];

/// Returns the bytes of a fixed length at an offset. There must be as many.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// Copies what of `content` was not handed out yet, from `at` on, as far as the buffer has room. Returns how many bytes that are.
fn hand_out(content: &[u8], at: &mut usize, buffer: &mut [u8]) -> usize {
    let rest = &content[*at..];
    let length = rest.len().min(buffer.len());
    buffer[..length].copy_from_slice(&rest[..length]);
    *at += length;
    length
}

/// The error for a backup whose content is wrong: where is in `input`, and of what, as far as it is known.
fn damaged_at(input: &Input<'_>, start: u64, length: u64, volume: Option<&Volume>, problem: &str) -> Error {
    input.damaged(start, length, volume.map(|volume| volume.path.clone()), problem)
}
