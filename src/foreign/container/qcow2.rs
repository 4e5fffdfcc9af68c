//! qcow2 images of versions 2 and 3 (QEMU, `docs/interop/qcow2.txt`): the disk, and its internal snapshots as revisions. What an image leaves to a
//! backing file comes from files that the user named, in their order. The name that an image has for its backing file is shown, and never opened.

mod header;
mod image;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use self::header::{Backing, Header, Snapshot};
use self::image::{Extent, Image, Unpacker, What};
use super::{ContainerKind, Disk, PART_BYTES, image_name};
use crate::content::FileTime;
use crate::error::Result;
use crate::foreign::random::RandomInput;
use crate::foreign::{NOTES_MAX, Volume};
use crate::shown::shown;
use crate::store::Store;

pub(super) const MAGIC: &[u8] = b"QFI\xfb";

/// What names of such files end with.
const SUFFIXES: [&str; 2] = ["qcow2", "qcow"];

/// Backing files at most, one below the other.
const BACKING_MAX: usize = 16;

/// The volume that is read: its number and its name.
#[derive(Clone, Copy)]
struct Reading<'v> {
    volume: usize,
    path: &'v Path,
}

/// An image, or a file that it leaves parts of its disk to.
enum Layer<'a> {
    Qcow2(Box<Image<'a>>),
    /// A disk as it is.
    Raw(RandomInput<'a>),
}

impl Layer<'_> {
    /// The length of the disk in bytes.
    fn size(&self, reading: Reading<'_>) -> u64 {
        match self {
            Self::Qcow2(image) => image.disk(reading).size,
            Self::Raw(input) => input.length(),
        }
    }

    /// What is at an offset of the disk, which ends behind it, and how far that goes on.
    fn extent(&mut self, at: u64, reading: Reading<'_>) -> Result<Extent> {
        match self {
            Self::Qcow2(image) => image.extent(at, reading),
            Self::Raw(input) => Ok(Extent {
                what: What::Data(at),
                length: input.length().saturating_sub(at),
            }),
        }
    }
}

/// A part of the disk that one layer has.
struct Piece {
    layer: usize,
    extent: Extent,
}

/// A qcow2 image, and what it lies on.
pub(super) struct Qcow2<'a> {
    volumes: Vec<Volume>,
    /// The image, its backing file, the backing file of that, and so on.
    layers: Vec<Layer<'a>>,
    unpacker: Unpacker,
}

impl<'a> Qcow2<'a> {
    /// Opens an image, with the backing files that the user named.
    pub(super) fn open(input: RandomInput<'a>, backing: &'a [Box<dyn Store>]) -> Result<Self> {
        let header = Header::read(input)?;
        let snapshots = header.snapshots(input)?;
        let name = image_name(input.path(), &SUFFIXES);
        let volumes = volumes(input, &name, &header, &snapshots)?;
        let mut below = header.backing.clone();
        let snapshot_disks = snapshots.iter().map(|snapshot| snapshot.disk);
        let disks = [header.disk].into_iter().chain(snapshot_disks).collect();
        let mut layers = vec![Layer::Qcow2(Box::new(Image::new(input, &header, disks)))];
        let mut above = input;
        for store in backing {
            let Some(named) = below.take() else {
                return Err(above.refused("it has no backing file, and --backing names one"));
            };
            if layers.len() > BACKING_MAX {
                return Err(input.refused(format!("it lies on more than {BACKING_MAX} backing files")));
            }
            let file = input.of_other(&**store)?;
            let file = file.ok_or_else(|| input.refused("its backing file is no regular file"))?;
            if is_qcow2(file, above, &named)? {
                let header = Header::read(file)?;
                below.clone_from(&header.backing);
                layers.push(Layer::Qcow2(Box::new(Image::new(file, &header, vec![header.disk]))));
            } else {
                layers.push(Layer::Raw(file));
            }
            above = file;
        }
        if let Some(named) = below {
            let (name, more) = (named.shown_name(), if layers.len() > 1 { " one more" } else { "" });
            return Err(above.refused(format!(
                "it leaves parts of its disk to a backing file, which it calls `{name}`: name that with{more} --backing FILE"
            )));
        }
        Ok(Self {
            volumes,
            layers,
            unpacker: Unpacker::default(),
        })
    }

    /// What is at an offset of a volume. It ends at `end` at the latest.
    fn piece(&mut self, at: u64, end: u64, reading: Reading<'_>) -> Result<Piece> {
        let mut length = end.saturating_sub(at);
        for (layer, content) in self.layers.iter_mut().enumerate() {
            let room = content.size(reading).saturating_sub(at);
            if room == 0 {
                // A backing file may be shorter than what lies on it.
                break;
            }
            let extent = content.extent(at, reading)?;
            length = length.min(room).min(extent.length);
            if !matches!(extent.what, What::Unallocated) {
                let extent = Extent { length, ..extent };
                return Ok(Piece { layer, extent });
            }
        }
        Ok(Piece {
            layer: 0,
            extent: Extent {
                what: What::Zeros,
                length,
            },
        })
    }

    /// Appends the first bytes of a piece that is no zeros, which begins at an offset of the volume.
    fn append(
        &mut self,
        piece: &Piece,
        at: u64,
        length: usize,
        reading: Reading<'_>,
        buffer: &mut Vec<u8>,
    ) -> Result<()> {
        let start = buffer.len();
        match (&mut self.layers[piece.layer], piece.extent.what) {
            (Layer::Qcow2(image), What::Compressed(entry)) => {
                let cluster = image.unpacked(entry, piece.layer, reading, &mut self.unpacker)?;
                let within = image.within_cluster(at);
                buffer.extend_from_slice(&cluster[within..within + length]);
            }
            (Layer::Qcow2(image), What::Data(offset)) => {
                buffer.resize(start + length, 0);
                image.read(offset, &mut buffer[start..], reading)?;
            }
            (Layer::Raw(input), What::Data(offset)) => {
                buffer.resize(start + length, 0);
                input.exact_at(offset, &mut buffer[start..], Some(reading.path))?;
            }
            _ => buffer.resize(start + length, 0),
        }
        Ok(())
    }

    /// As [`Disk::content`], of a volume of this size.
    fn content_of(&mut self, reading: Reading<'_>, from: u64, size: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        let mut at = from;
        while at < size && buffer.len() < PART_BYTES {
            let piece = self.piece(at, size, reading)?;
            if matches!(piece.extent.what, What::Zeros) {
                if !buffer.is_empty() {
                    break;
                }
                at += piece.extent.length;
                continue;
            }
            let room = PART_BYTES - buffer.len();
            let length = usize::try_from(piece.extent.length).map_or(room, |length| length.min(room));
            self.append(&piece, at, length, reading, buffer)?;
            at += length as u64;
        }
        Ok((!buffer.is_empty()).then(|| at - buffer.len() as u64))
    }
}

impl Disk for Qcow2<'_> {
    fn kind(&self) -> &'static str {
        ContainerKind::Qcow2.name()
    }

    fn volumes(&self) -> Vec<Volume> {
        self.volumes.clone()
    }

    fn content(&mut self, volume: usize, from: u64, buffer: &mut Vec<u8>) -> Result<Option<u64>> {
        buffer.clear();
        let Some(Volume { path, size, .. }) = self.volumes.get(volume).cloned() else {
            return Ok(None);
        };
        let reading = Reading { volume, path: &path };
        self.content_of(reading, from, size.unwrap_or_default(), buffer)
    }
}

/// The disk and its snapshots as volumes. A snapshot is called as Qubes OS calls revisions; its own name is told to the user.
fn volumes(input: RandomInput<'_>, name: &Path, header: &Header, snapshots: &[Snapshot]) -> Result<Vec<Volume>> {
    let mut order: Vec<usize> = (0..snapshots.len()).collect();
    order.sort_by_key(|at| snapshots[*at].time);
    let mut names = vec![PathBuf::new(); snapshots.len()];
    for (number, at) in order.into_iter().enumerate() {
        let snapshot = &snapshots[at];
        let time = jiff::Timestamp::from_second(snapshot.time.seconds).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let time = time.strftime("%Y-%m-%dT%H:%M:%SZ");
        let mut revision = name.as_os_str().to_owned();
        revision.push(format!(".{}@{time}", number + 1));
        names[at] = PathBuf::from(revision);
        if number < NOTES_MAX {
            let own_name = Path::new(OsStr::from_bytes(&snapshot.name));
            let revision = shown(&names[at]);
            input.note(&format!("`{revision}` is the snapshot `{}`", shown(own_name)));
        }
    }
    if let Some(more) = snapshots.len().checked_sub(NOTES_MAX).filter(|more| *more > 0) {
        input.note(&format!("The names of {more} more snapshots are not shown"));
    }
    let volume = |path: &Path, size: u64, time: Option<FileTime>| Volume {
        path: path.to_owned(),
        size: Some(size),
        time,
    };
    let revisions = names.iter().zip(snapshots);
    let revisions = revisions.map(|(name, snapshot)| volume(name, snapshot.disk.size, Some(snapshot.time)));
    let volumes: Vec<Volume> = [volume(name, header.disk.size, None)]
        .into_iter()
        .chain(revisions)
        .collect();
    let sizes = volumes.iter().map(|volume| volume.size.unwrap_or_default());
    let all_bytes = sizes.fold(0, u64::saturating_add);
    let limit = input.limits().volume_bytes;
    if all_bytes > limit {
        let problem = format!(
            "its disk and the snapshots of it have {all_bytes} bytes, which is more than vmfold takes, {limit} at most: `qemu-img convert` makes an \
             image of the disk alone, and with -l of a snapshot"
        );
        return Err(input.refused(problem));
    }
    Ok(volumes)
}

/// Whether a backing file is a qcow2 image rather than a raw one. `above` is what lies on it.
fn is_qcow2(file: RandomInput<'_>, above: RandomInput<'_>, named: &Backing) -> Result<bool> {
    let mut first = vec![0; usize::try_from(file.length().min(512)).unwrap_or_default()];
    file.exact_at(0, &mut first, None)?;
    let kind = ContainerKind::of(&first);
    match named.format.as_deref() {
        Some(b"raw") => Ok(false),
        Some(b"qcow2") if kind == Some(ContainerKind::Qcow2) => Ok(true),
        Some(b"qcow2") => Err(file.refused(format!(
            "`{}` says that its backing file is a qcow2 image, and this is none",
            shown(above.path())
        ))),
        Some(other) => {
            let format = shown(Path::new(OsStr::from_bytes(other)));
            Err(above.refused(format!(
                "its backing file is of the format `{format}`, and only qcow2 and raw ones are read"
            )))
        }
        None => match kind {
            Some(ContainerKind::Qcow2) => {
                let (above, path) = (shown(above.path()), shown(file.path()));
                file.note(&format!(
                    "`{above}` does not say what its backing file is: `{path}` is read as a qcow2 image, since it begins as one"
                ));
                Ok(true)
            }
            Some(other) => {
                let name = other.name();
                Err(file.refused(format!("it is {name}, and only qcow2 and raw backing files are read")))
            }
            None => Ok(false),
        },
    }
}
