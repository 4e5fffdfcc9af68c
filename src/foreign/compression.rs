//! Streams that a program compressed as a whole, recognised by their first bytes.

use std::io::{self, BufRead, Read};

use super::lz4::Lz4;
use super::lzop::Lzop;

/// How a stream is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952, of one member or several.
    Gzip,
    /// bzip2, of one stream or several, as pbzip2 writes them.
    Bzip2,
    /// The xz file format 1.2, of one stream or several.
    Xz,
    /// RFC 8878, of one frame or several.
    Zstd,
    /// The LZ4 frame format 1.6, of one frame or several.
    Lz4,
    /// What lzop writes, of one file or several.
    Lzop,
    /// What LZMA Utils wrote before xz. Nothing at its beginning tells it from other bytes.
    Lzma,
}

/// The first bytes of each.
const MAGICS: [(&[u8], Compression); 6] = [
    (b"\x1f\x8b\x08", Compression::Gzip),
    (b"BZh", Compression::Bzip2),
    (b"\xfd7zXZ\0", Compression::Xz),
    (b"\x28\xb5\x2f\xfd", Compression::Zstd),
    (b"\x04\x22\x4d\x18", Compression::Lz4),
    (b"\x89LZO\0\r\n\x1a\n", Compression::Lzop),
];

impl Compression {
    /// The compression of a stream that begins with these bytes. What zstd and LZ4 skip at its beginning is skipped. If that is all there is, it is
    /// taken for zstd.
    pub fn of(first: &[u8]) -> Option<Self> {
        let mut rest = first;
        while let Some(header) = rest.first_chunk::<8>().filter(|header| is_skipped(**header)) {
            let length = u32::from_le_bytes(super::array(header, 4)) as usize;
            match rest.get(8 + length..).filter(|rest| rest.len() >= 4) {
                Some(behind) => rest = behind,
                None => return Some(Self::Zstd),
            }
        }
        let (_, compression) = MAGICS.iter().find(|(magic, _)| rest.starts_with(magic))?;
        let may_begin_with_skipped = matches!(compression, Self::Zstd | Self::Lz4);
        (may_begin_with_skipped || rest.len() == first.len()).then_some(*compression)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Lzop => "lzop",
            Self::Lzma => "lzma",
        }
    }

    /// What names of such files end with, behind a dot.
    pub fn suffixes(self) -> &'static [&'static str] {
        match self {
            Self::Gzip => &["gz"],
            Self::Bzip2 => &["bz2"],
            Self::Xz => &["xz"],
            Self::Zstd => &["zst", "zstd"],
            Self::Lz4 => &["lz4"],
            Self::Lzop => &["lzo"],
            Self::Lzma => &["lzma"],
        }
    }

    /// A reader of what decompressing gives. It takes `window_bytes` of memory at most for what it has decompressed last, and 32 MiB beside
    /// that. It reads its input to the end, and fails where that is cut off or goes on with something else.
    ///
    /// # Errors
    /// The error of zstd if it has no memory, and of what lzma begins with.
    pub fn decoder<'a>(self, input: Box<dyn BufRead + 'a>, window_bytes: u64) -> io::Result<Box<dyn Read + 'a>> {
        Ok(match self {
            Self::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Self::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(input)),
            Self::Xz => {
                let kib = u32::try_from(window_bytes >> 10).unwrap_or(u32::MAX);
                Box::new(lzma_rust2::XzReader::new_mem_limit(input, true, kib))
            }
            Self::Lzma => {
                let kib = u32::try_from(window_bytes >> 10).unwrap_or(u32::MAX);
                Box::new(lzma_rust2::LzmaReader::new_mem_limit(input, kib, None)?)
            }
            Self::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
                decoder.window_log_max(window_bytes.max(1).ilog2())?;
                Box::new(decoder)
            }
            Self::Lz4 => Box::new(Lz4::new(input)),
            Self::Lzop => Box::new(Lzop::new(input)),
        })
    }
}

/// Whether something begins with a frame that zstd and LZ4 skip: with one of sixteen numbers (RFC 8878, 3.1.2), and behind it its length.
fn is_skipped(header: [u8; 8]) -> bool {
    matches!(header, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skipped(length: u32) -> Vec<u8> {
        let content = vec![7; length as usize];
        [&b"\x53\x2a\x4d\x18"[..], &length.to_le_bytes(), &content].concat()
    }

    #[test]
    fn frames_that_are_skipped_tell_nothing() {
        let zstd = zstd::encode_all(&b"content"[..], 1).unwrap();
        for (before, behind, expected) in [
            (vec![skipped(4)], &zstd[..], Some(Compression::Zstd)),
            (vec![skipped(0), skipped(900)], &zstd, Some(Compression::Zstd)),
            (vec![skipped(4)], b"\x04\x22\x4d\x18", Some(Compression::Lz4)),
            (vec![skipped(5000)], b"", Some(Compression::Zstd)),
            (vec![skipped(4)], b"\x1f\x8b\x08\0", None),
            (vec![skipped(4)], b"what else", None),
            (vec![], b"\x53\x2a\x4d\x19\0\0\0\0", None),
        ] {
            let stream = [before.concat(), behind.to_vec()].concat();
            assert_eq!(Compression::of(&stream[..stream.len().min(1536)]), expected);
        }
    }

    #[test]
    fn frames_that_are_skipped_are_skipped() {
        for length in [0, 4, 100_000] {
            let zstd = zstd::encode_all(&b"content"[..], 1).unwrap();
            let stream = [skipped(length), zstd, skipped(length)].concat();
            let mut decoder = Compression::Zstd.decoder(Box::new(&stream[..]), 1 << 20).unwrap();
            let mut content = Vec::new();
            decoder.read_to_end(&mut content).unwrap();
            assert_eq!(content, b"content");
        }
    }
}
