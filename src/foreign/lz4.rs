//! LZ4 frames, as `lz4` writes them: `lz4_Frame_format.md` 1.6.4 of the lz4 project. A stream ends well only behind a whole frame. Legacy
//! frames are not read: nothing tells their end from a cut.

use std::io::{self, BufRead, Read};
use std::ops::Range;

use lz4_flex::block::decompress_into_with_dict;
use xxhash_rust::xxh32::{Xxh32, xxh32};

const MAGIC: u32 = 0x184d_2204;
/// Frames that are skipped have one of sixteen numbers, of which this is the first.
const SKIPPED_MAGIC: u32 = 0x184d_2a50;
/// Bytes before a block that it may refer to.
const WINDOW_BYTES: usize = 64 << 10;
/// The bit of a block's length that says that the block is not compressed.
const STORED_BIT: u32 = 1 << 31;

/// A frame that is being read, and what its descriptor says.
struct Frame {
    block_bytes_max: usize,
    are_blocks_linked: bool,
    has_block_checksums: bool,
    /// The bytes that are to come, if it says how many.
    left: Option<u64>,
    /// The hash of the content so far, if it ends with one.
    hash: Option<Xxh32>,
}

/// A reader of what LZ4 frames hold.
pub(super) struct Lz4<R> {
    input: R,
    frame: Option<Frame>,
    /// What a block may refer to, behind it the last block, and behind that room, which is not cleared for each block.
    content: Vec<u8>,
    /// Where in `content` the part begins that was not handed out yet.
    at: usize,
    /// Where in `content` the last block ends.
    end: usize,
    stored: Vec<u8>,
}

fn damaged(problem: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

impl<R: BufRead> Lz4<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            frame: None,
            content: Vec::new(),
            at: 0,
            end: 0,
            stored: Vec::new(),
        }
    }

    fn u32(&mut self) -> io::Result<u32> {
        let mut bytes = [0; 4];
        self.input.read_exact(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// Begins the next frame. Returns false at the end.
    fn begin(&mut self) -> io::Result<bool> {
        (self.at, self.end) = (0, 0);
        loop {
            if self.input.fill_buf()?.is_empty() {
                return Ok(false);
            }
            match self.u32()? {
                MAGIC => {
                    self.frame = Some(self.descriptor()?);
                    return Ok(true);
                }
                magic if magic & !0xf == SKIPPED_MAGIC => {
                    let length = u64::from(self.u32()?);
                    if io::copy(&mut self.input.by_ref().take(length), &mut io::sink())? < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                _ => return Err(damaged("something else follows a frame")),
            }
        }
    }

    /// Reads a frame's descriptor.
    fn descriptor(&mut self) -> io::Result<Frame> {
        let mut descriptor = vec![0; 2];
        self.input.read_exact(&mut descriptor)?;
        let (flags, block) = (descriptor[0], descriptor[1]);
        let has = |bit: u8| flags >> bit & 1 == 1;
        if flags >> 6 != 1 || has(1) || block & 0x8f != 0 || block >> 4 < 4 {
            return Err(damaged("a frame is of a version that is not known"));
        }
        if has(0) {
            return Err(damaged("a frame needs a dictionary"));
        }
        if has(3) {
            descriptor.resize(2 + 8, 0);
            self.input.read_exact(&mut descriptor[2..])?;
        }
        let mut checksum = [0];
        self.input.read_exact(&mut checksum)?;
        if xxh32(&descriptor, 0).to_le_bytes()[1] != checksum[0] {
            return Err(damaged("a frame's descriptor has another checksum"));
        }
        Ok(Frame {
            block_bytes_max: 1 << (8 + 2 * (block >> 4)),
            are_blocks_linked: !has(5),
            has_block_checksums: has(4),
            left: has(3).then(|| u64::from_le_bytes(super::array(&descriptor, 2))),
            hash: has(2).then(|| Xxh32::new(0)),
        })
    }

    /// Reads the next block of a frame into `content`. Returns false at the end of the frame.
    fn block(&mut self) -> io::Result<bool> {
        let Some(mut frame) = self.frame.take() else {
            return Ok(false);
        };
        let is_more = self.block_of(&mut frame)?;
        self.frame = is_more.then_some(frame);
        Ok(is_more)
    }

    fn block_of(&mut self, frame: &mut Frame) -> io::Result<bool> {
        let length = self.u32()?;
        if length == 0 {
            if frame.left.is_some_and(|left| left > 0) {
                return Err(damaged("a frame has less content than it says"));
            }
            if let Some(hash) = &frame.hash
                && self.u32()? != hash.digest()
            {
                return Err(damaged("a frame's content has another checksum"));
            }
            return Ok(false);
        }
        let stored_bytes = (length & !STORED_BIT) as usize;
        if stored_bytes > frame.block_bytes_max {
            return Err(damaged("a block is longer than allowed"));
        }
        self.read_stored(stored_bytes)?;
        if frame.has_block_checksums && self.u32()? != xxh32(&self.stored, 0) {
            return Err(damaged("a block has another checksum"));
        }
        let block = self.unpack(frame, length & STORED_BIT != 0)?;
        let block = &self.content[block];
        if let Some(left) = &mut frame.left {
            *left = left
                .checked_sub(block.len() as u64)
                .ok_or_else(|| damaged("a frame has more content than it says"))?;
        }
        if let Some(hash) = &mut frame.hash {
            hash.update(block);
        }
        Ok(true)
    }

    /// Puts what the stored bytes of a block stand for behind what it may refer to. Returns where that is.
    fn unpack(&mut self, frame: &Frame, is_stored: bool) -> io::Result<Range<usize>> {
        let kept = if frame.are_blocks_linked {
            self.end.min(WINDOW_BYTES)
        } else {
            0
        };
        self.content.copy_within(self.end - kept..self.end, 0);
        let room = kept + frame.block_bytes_max;
        if self.content.len() < room {
            self.content.resize(room, 0);
        }
        let (window, block) = self.content[..room].split_at_mut(kept);
        let length = if is_stored {
            block[..self.stored.len()].copy_from_slice(&self.stored);
            self.stored.len()
        } else {
            decompress_into_with_dict(&self.stored, block, window)
                .map_err(|_| damaged("a block cannot be decompressed"))?
        };
        (self.at, self.end) = (kept, kept + length);
        Ok(self.at..self.end)
    }

    fn read_stored(&mut self, length: usize) -> io::Result<()> {
        self.stored.resize(length, 0);
        self.input.read_exact(&mut self.stored)
    }
}

impl<R: BufRead> Read for Lz4<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.at == self.end && !buffer.is_empty() {
            let has_more = if self.frame.is_some() {
                self.block()? || self.begin()?
            } else {
                self.begin()?
            };
            if !has_more {
                return Ok(0);
            }
        }
        Ok(super::hand_out(&self.content[..self.end], &mut self.at, buffer))
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// A block says in a few bytes that it may be 4 MiB long. Room for that is not cleared for each of many.
    #[test]
    fn many_short_blocks_are_read_soon() {
        const BLOCKS: usize = 20_000;
        let descriptor = [0x40, 0x70];
        let mut stream = MAGIC.to_le_bytes().to_vec();
        stream.extend(descriptor);
        stream.push(xxh32(&descriptor, 0).to_le_bytes()[1]);
        for _ in 0..BLOCKS {
            // One literal.
            stream.extend([2, 0, 0, 0, 0x10, b'a']);
        }
        stream.extend([0; 4]);
        let begun = Instant::now();
        let mut content = Vec::new();
        Lz4::new(&stream[..]).read_to_end(&mut content).unwrap();
        assert!(content == vec![b'a'; BLOCKS]);
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    }
}
