//! What lzop writes, in the form that lzop 1.04 documents in its sources: a header, blocks of LZO1X, an end. Numbers are big-endian.

use std::io::{self, BufRead, Read};

const MAGIC: &[u8; 9] = b"\x89LZO\0\r\n\x1a\n";
/// The version from which on headers have a level, and the upper half of the time.
const VERSION_LEVEL: u16 = 0x0940;
const ADLER32_CONTENT: u32 = 1;
const ADLER32_STORED: u32 = 1 << 1;
const HAS_EXTRA: u32 = 1 << 6;
const CRC32_CONTENT: u32 = 1 << 8;
const CRC32_STORED: u32 = 1 << 9;
const IS_MULTIPART: u32 = 1 << 10;
const HAS_FILTER: u32 = 1 << 11;
const CRC32_HEADER: u32 = 1 << 12;
/// Bytes of a block, decompressed. lzop itself writes blocks of 256 KiB.
const BLOCK_BYTES_MAX: u32 = 64 << 20;
/// Bytes of an extra field of the header, which is skipped.
const EXTRA_BYTES_MAX: u32 = 64 << 10;

/// A reader of what lzop's files hold.
pub(super) struct Lzop<R> {
    input: R,
    /// The flags of the file that is being read.
    flags: Option<u32>,
    stored: Vec<u8>,
    content: Vec<u8>,
    /// Where in `content` the part begins that was not handed out yet.
    at: usize,
}

fn damaged(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

/// The bytes of a header, for its checksum.
struct Header<'a, R> {
    input: &'a mut R,
    bytes: Vec<u8>,
}

impl<R: Read> Header<'_, R> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        self.bytes.extend_from_slice(&bytes);
        Ok(bytes)
    }

    fn skip(&mut self, length: usize) -> io::Result<()> {
        let from = self.bytes.len();
        self.bytes.resize(from + length, 0);
        self.input.read_exact(&mut self.bytes[from..])
    }

    fn check(&mut self, flags: u32) -> io::Result<()> {
        let expected = checksum(flags & CRC32_HEADER != 0, &self.bytes);
        self.bytes.clear();
        if u32::from_be_bytes(self.take()?) != expected {
            return Err(damaged("a header has another checksum"));
        }
        self.bytes.clear();
        Ok(())
    }
}

fn checksum(is_crc: bool, bytes: &[u8]) -> u32 {
    if is_crc {
        crc32fast::hash(bytes)
    } else {
        adler2::adler32_slice(bytes)
    }
}

impl<R: BufRead> Lzop<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            flags: None,
            stored: Vec::new(),
            content: Vec::new(),
            at: 0,
        }
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.input.read_exact(&mut bytes)?;
        Ok(u32::from_be_bytes(bytes))
    }

    /// Begins the next file. Returns false at the end.
    fn begin(&mut self) -> io::Result<bool> {
        if self.input.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let mut magic = [0; MAGIC.len()];
        self.input.read_exact(&mut magic)?;
        if magic != *MAGIC {
            return Err(damaged("something else follows the end"));
        }
        let mut header = Header {
            input: &mut self.input,
            bytes: Vec::new(),
        };
        let version = u16::from_be_bytes(header.take()?);
        header.skip(2)?;
        if version >= VERSION_LEVEL {
            header.skip(2)?;
        }
        let [method] = header.take()?;
        if !(1..=3).contains(&method) {
            return Err(damaged("it is compressed by a method that is not known"));
        }
        if version >= VERSION_LEVEL {
            header.skip(1)?;
        }
        let flags = u32::from_be_bytes(header.take()?);
        if flags & (HAS_FILTER | IS_MULTIPART) != 0 {
            return Err(damaged("it needs a filter, or is one part of several"));
        }
        // The mode and the time of the file.
        header.skip(if version >= VERSION_LEVEL { 12 } else { 8 })?;
        let [name_bytes] = header.take()?;
        header.skip(name_bytes.into())?;
        header.check(flags)?;
        if flags & HAS_EXTRA != 0 {
            let length = u32::from_be_bytes(header.take()?);
            if length > EXTRA_BYTES_MAX {
                return Err(damaged("a header is longer than allowed"));
            }
            header.skip(length as usize)?;
            header.check(flags)?;
        }
        self.flags = Some(flags);
        Ok(true)
    }

    /// Reads the next block into `content`. Returns false at the end of the file.
    fn block(&mut self, flags: u32) -> io::Result<bool> {
        let length = self.u32()?;
        if length == 0 {
            self.flags = None;
            return Ok(false);
        }
        let stored_bytes = self.u32()?;
        if length > BLOCK_BYTES_MAX || stored_bytes == 0 || stored_bytes > length {
            return Err(damaged("a block is longer than allowed"));
        }
        let content_sums = self.sums(flags & ADLER32_CONTENT != 0, flags & CRC32_CONTENT != 0)?;
        let stored_sums = if stored_bytes < length {
            self.sums(flags & ADLER32_STORED != 0, flags & CRC32_STORED != 0)?
        } else {
            [None; 2]
        };
        self.stored.resize(stored_bytes as usize, 0);
        self.input.read_exact(&mut self.stored)?;
        check_sums(stored_sums, &self.stored)?;
        self.at = 0;
        if stored_bytes == length {
            std::mem::swap(&mut self.content, &mut self.stored);
        } else {
            self.content.resize(length as usize, 0);
            if lzo::decompress_into(&self.stored, &mut self.content) != Ok(length as usize) {
                self.content.clear();
                return Err(damaged("a block cannot be decompressed"));
            }
        }
        let checked = check_sums(content_sums, &self.content);
        if checked.is_err() {
            self.content.clear();
        }
        checked.map(|()| true)
    }

    /// Reads an Adler-32 and a CRC-32, as far as they are there.
    fn sums(&mut self, has_adler: bool, has_crc: bool) -> io::Result<[Option<u32>; 2]> {
        let adler = has_adler.then(|| self.u32()).transpose()?;
        let crc = has_crc.then(|| self.u32()).transpose()?;
        Ok([adler, crc])
    }
}

fn check_sums(sums: [Option<u32>; 2], bytes: &[u8]) -> io::Result<()> {
    for (is_crc, sum) in [false, true].into_iter().zip(sums) {
        if sum.is_some_and(|sum| sum != checksum(is_crc, bytes)) {
            return Err(damaged("a block has another checksum"));
        }
    }
    Ok(())
}

impl<R: BufRead> Read for Lzop<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.content.len() && !buffer.is_empty() {
            let has_more = match self.flags {
                Some(flags) => self.block(flags)? || self.begin()?,
                None => self.begin()?,
            };
            if !has_more {
                return Ok(0);
            }
        }
        Ok(super::hand_out(&self.content, &mut self.at, buffer))
    }
}
