//! A single raw image, which may be compressed as a whole.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::compression::Compression;
use super::container::is_fixed_vhd;
use super::random::RandomInput;
use super::{Backup, Event, Input, LAST_BYTES, Volume, volume_name};
use crate::block::BLOCK_BYTES;
use crate::error::Result;
use crate::shown::shown;

/// Bytes that are handed over at a time.
const PART_BYTES: usize = 1 << 20;

/// A raw image. If it does not lie in a file as it is, its size shows at its end.
pub(super) struct Raw<'a> {
    input: Input<'a>,
    /// The file, if it lies in one as it is. Then its holes are not read.
    file: Option<RandomInput<'a>>,
    /// The offset of what comes next in the file.
    at: u64,
    /// The volume, until it was told.
    volume: Option<Volume>,
    name: PathBuf,
    /// The last bytes that came.
    last: Vec<u8>,
    is_ended: bool,
}

impl<'a> Raw<'a> {
    /// The image that the rest of an input holds, which may have been compressed.
    pub(super) fn new(input: Input<'a>, compression: Option<Compression>) -> Self {
        let name = name_of(input.path(), compression);
        let volume = Volume {
            path: name.clone(),
            size: None,
            time: None,
        };
        Self {
            input,
            file: None,
            at: 0,
            volume: Some(volume),
            name,
            last: Vec::new(),
            is_ended: false,
        }
    }

    /// The image that a file is.
    pub(super) fn of_file(file: RandomInput<'a>, input: Input<'a>) -> Self {
        let mut raw = Self::new(input, None);
        if let Some(volume) = &mut raw.volume {
            volume.size = Some(file.length());
        }
        raw.file = Some(file);
        raw
    }

    /// The next content of a file, or its end.
    fn next_of_file(&mut self, file: RandomInput<'_>, buffer: &mut Vec<u8>) -> Result<Event> {
        let (from, size) = (file.data_from(self.at), file.length());
        if size > file.limits().volume_bytes {
            return Err(self.input.refused("it has more bytes than an image may have"));
        }
        if from >= size {
            self.is_ended = true;
            self.last
                .resize(LAST_BYTES.min(usize::try_from(size).unwrap_or(usize::MAX)), 0);
            file.exact_at(size - self.last.len() as u64, &mut self.last, None)?;
            self.note_footer();
            return Ok(Event::End { volume: 0, size });
        }
        // Images are made of whole blocks.
        let offset = (from - from % BLOCK_BYTES).max(self.at);
        let length = (size - offset).min(PART_BYTES as u64);
        buffer.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        file.exact_at(offset, buffer, None)?;
        self.at = offset + length;
        Ok(Event::Data { volume: 0, offset })
    }

    /// Keeps the last of the bytes that came.
    fn keep_last(&mut self, came: &[u8]) {
        let came = &came[came.len().saturating_sub(LAST_BYTES)..];
        let too_many = (self.last.len() + came.len()).saturating_sub(LAST_BYTES);
        self.last.drain(..too_many);
        self.last.extend_from_slice(came);
    }

    /// Tells the user of a footer, which is not cut off: the guest of a raw image may have written it, and the image keeps the name of a disk that
    /// has one.
    fn note_footer(&self) {
        if is_fixed_vhd(&self.last) {
            let name = shown(&self.name);
            self.input.note(&format!(
                "`{name}` ends with the footer of a fixed VHD. If it is one, its last {LAST_BYTES} bytes are no part of the disk: out of a file that is not \
                 compressed, it is read without them"
            ));
        }
    }
}

/// The name of an image whose file has this path: without what says that it is compressed, and with what says that it is an image.
fn name_of(path: &Path, compression: Option<Compression>) -> PathBuf {
    let name = path.file_name().unwrap_or(OsStr::new("image"));
    let whole = Path::new(name);
    let is_suffix = |suffix: &OsStr| {
        let known = compression.map_or(&[][..], Compression::suffixes);
        suffix
            .to_str()
            .is_some_and(|suffix| known.iter().any(|one| one.eq_ignore_ascii_case(suffix)))
    };
    match (whole.extension(), whole.file_stem()) {
        (Some(_), _) if compression.is_none() => volume_name::component(name.as_bytes()),
        (Some(suffix), Some(stem)) if is_suffix(suffix) => volume_name::component(stem.as_bytes()),
        _ => volume_name::component(&[name.as_bytes(), b".img"].concat()),
    }
}

impl Backup for Raw<'_> {
    fn kind(&self) -> &'static str {
        if self.input.is_decompressed() {
            "a compressed raw image"
        } else {
            "a raw image"
        }
    }

    fn proves_each_volume(&self) -> bool {
        false
    }

    fn next(&mut self, buffer: &mut Vec<u8>) -> Result<Option<Event>> {
        if let Some(volume) = self.volume.take() {
            return Ok(Some(Event::Volume(volume)));
        }
        if self.is_ended {
            return Ok(None);
        }
        if let Some(file) = self.file {
            return self.next_of_file(file, buffer).map(Some);
        }
        let offset = self.input.offset();
        buffer.resize(PART_BYTES, 0);
        let read = self.input.fill(buffer)?;
        buffer.truncate(read);
        if self.input.offset() > self.input.limits().volume_bytes {
            return Err(self.input.refused("it decompresses to more than an image may have"));
        }
        if read == 0 {
            self.is_ended = true;
            self.note_footer();
            return Ok(Some(Event::End {
                volume: 0,
                size: offset,
            }));
        }
        self.keep_last(buffer);
        Ok(Some(Event::Data { volume: 0, offset }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_as_its_file_without_the_compression() {
        for (path, expected) in [
            ("/a/root.img.zst", "root.img"),
            ("disk.raw.GZ", "disk.raw"),
            ("disk.tgz", "disk.tgz.img"),
            ("stdin", "stdin.img"),
            (".zst", ".zst.img"),
            ("...zst", "%2e."),
        ] {
            let compression = if path.ends_with("GZ") {
                Compression::Gzip
            } else {
                Compression::Zstd
            };
            assert_eq!(name_of(Path::new(path), Some(compression)), Path::new(expected));
        }
        for (path, expected) in [("/a/disk.raw", "disk.raw"), ("stdin", "stdin.img"), ("a.gz", "a.gz")] {
            assert_eq!(name_of(Path::new(path), None), Path::new(expected));
        }
    }
}
