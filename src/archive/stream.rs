//! Reads records in the order they were written, from any store, and gets over what is damaged.

use std::io::{self, Read};

use super::record::{DecodedHeader, HEADER_BYTES, MAGIC, RecordHeader, UnsupportedRecord, find_magic, hash_of};
use crate::block::ByteRange;

/// Bytes asked for at a time while looking for a record.
const SEARCH_BYTES: usize = 64 << 10;
/// Bytes in which there must be a record, or it is no archive: a pipe may never end.
const FIRST_RECORD_BYTES: u64 = 256 << 20;

/// What comes next.
#[derive(Debug)]
pub enum StreamEvent {
    /// A whole record.
    Record {
        /// Its header.
        header: RecordHeader,
        /// Where it begins.
        offset: u64,
        /// Its body without its mask; as it is stored, it matches its hash.
        body: Vec<u8>,
    },
    /// Bytes that are no record, or a damaged one.
    Damage {
        /// Where.
        range: ByteRange,
        /// What is wrong.
        problem: &'static str,
        /// The header of the record that was there, if that is whole.
        header: Option<RecordHeader>,
    },
    /// A record that must be refused where it is needed. Its end is not known: what comes next is behind it.
    Unsupported(UnsupportedRecord),
}

/// A stream of records. It holds one record at a time in memory, twice, of at most 33 MiB.
#[derive(Debug)]
pub struct Stream<R> {
    input: R,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are done with.
    done: usize,
    /// Where the buffer begins in the archive.
    base: u64,
    at_end: bool,
    /// Nothing more is looked for.
    gave_up: bool,
    /// Whether there was a whole record.
    has_records: bool,
}

impl<R: Read> Stream<R> {
    /// Begins at the input's next byte, which is at `offset` in the archive.
    pub fn new(input: R, offset: u64) -> Self {
        Self {
            input,
            buffer: Vec::new(),
            done: 0,
            base: offset,
            at_end: false,
            gave_up: false,
            has_records: false,
        }
    }

    /// What it reads from.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Where the next record begins.
    pub fn offset(&self) -> u64 {
        self.base + self.done as u64
    }

    /// Makes so many bytes available, or all that there are.
    fn fill(&mut self, length: usize) -> io::Result<()> {
        if self.buffer.len() - self.done >= length || self.at_end {
            return Ok(());
        }
        // Bytes are moved only where more of them are done with: so each is moved once at most.
        if self.done > self.buffer.len() / 2 {
            self.buffer.drain(..self.done);
            self.base += self.done as u64;
            self.done = 0;
        }
        let missing = length - (self.buffer.len() - self.done);
        // Grows with what is really there, whatever a header says.
        let read = (&mut self.input).take(missing as u64).read_to_end(&mut self.buffer)?;
        self.at_end = read < missing;
        Ok(())
    }

    /// Makes a body of so many bytes available behind the header, or as much as there is. Returns whether the magic is in it, which is in
    /// no body: so a length that is wrong costs no more than the way to the next record.
    fn fill_body(&mut self, length: usize) -> io::Result<bool> {
        let mut checked = HEADER_BYTES;
        while checked < length {
            let end = length.min(checked + SEARCH_BYTES);
            self.fill(end)?;
            let part = self
                .available()
                .get(checked + 1 - MAGIC.len()..end.min(self.available().len()));
            if part.is_some_and(|part| find_magic(part).is_some()) {
                return Ok(true);
            }
            if self.available().len() < end {
                return Ok(false);
            }
            checked = end;
        }
        Ok(false)
    }

    fn available(&self) -> &[u8] {
        &self.buffer[self.done..]
    }

    /// The next record or damage; none at the end.
    ///
    /// # Errors
    /// Those of reading.
    pub fn next_event(&mut self) -> io::Result<Option<StreamEvent>> {
        self.fill(HEADER_BYTES)?;
        if self.available().is_empty() || self.gave_up {
            return Ok(None);
        }
        let Some(bytes) = self.available().first_chunk::<HEADER_BYTES>() else {
            return self.skip("the archive ends in the middle of a record", None).map(Some);
        };
        let header = match RecordHeader::decode_any(bytes) {
            Ok(DecodedHeader::Known(header)) => header,
            Ok(DecodedHeader::Unsupported(record)) => {
                self.has_records = true;
                self.skip(record.problem, None)?;
                return Ok(Some(StreamEvent::Unsupported(record)));
            }
            Err(malformed) => return self.skip(malformed.problem(), None).map(Some),
        };
        let offset = self.offset();
        let length = record_bytes(&header);
        if self.fill_body(length)? {
            return self
                .skip("a record holds the beginning of another", Some(header))
                .map(Some);
        }
        let Some(body) = self.available().get(HEADER_BYTES..length) else {
            return self
                .skip("the archive ends in the middle of a record", Some(header))
                .map(Some);
        };
        let mut body = body.to_vec();
        header.apply_mask(0, &mut body);
        if hash_of(&body) != header.body_hash {
            return self.skip("a record does not match its hash", Some(header)).map(Some);
        }
        self.has_records = true;
        self.done += length;
        Ok(Some(StreamEvent::Record { header, offset, body }))
    }

    /// Goes on to what looks like the next record.
    fn skip(&mut self, problem: &'static str, header: Option<RecordHeader>) -> io::Result<StreamEvent> {
        let start = self.offset();
        self.done += 1;
        loop {
            if let Some(at) = find_magic(self.available()) {
                self.done += at;
                return Ok(self.damage(start, problem, header));
            }
            if self.at_end || (!self.has_records && self.offset() > FIRST_RECORD_BYTES) {
                self.gave_up = true;
                self.done = self.buffer.len();
                return Ok(self.damage(start, problem, header));
            }
            self.done = self.buffer.len() - (MAGIC.len() - 1).min(self.available().len());
            self.fill(SEARCH_BYTES)?;
        }
    }

    fn damage(&self, start: u64, problem: &'static str, header: Option<RecordHeader>) -> StreamEvent {
        StreamEvent::Damage {
            range: ByteRange {
                start,
                length: self.offset() - start,
            },
            problem,
            header,
        }
    }
}

/// Bytes of a record with its header, whatever the header says.
fn record_bytes(header: &RecordHeader) -> usize {
    HEADER_BYTES + usize::try_from(header.body_bytes.min(header.kind.body_bytes_max())).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::record::{EpochId, LaneId, RecordKind};
    use proptest::prelude::*;

    fn header(sequence: u64, body: &mut [u8]) -> RecordHeader {
        RecordHeader::of_body(RecordKind::Other(30), LaneId([1; 16]), EpochId(2), sequence, body).unwrap()
    }

    fn records(count: u8) -> Vec<Vec<u8>> {
        (0..count)
            .map(|n| {
                let mut body = vec![n; usize::from(n) * 50];
                let header = header(n.into(), &mut body);
                [&header.encode()[..], &body].concat()
            })
            .collect()
    }

    fn read(bytes: &[u8]) -> (Vec<u64>, u64) {
        let mut stream = Stream::new(bytes, 0);
        let (mut whole, mut damaged, mut last) = (Vec::new(), 0, 0);
        while let Some(event) = stream.next_event().unwrap() {
            assert!(stream.offset() > last, "it goes on");
            last = stream.offset();
            match event {
                StreamEvent::Record { header, .. } => whole.push(header.sequence),
                StreamEvent::Damage { range, .. } => damaged += range.length,
                StreamEvent::Unsupported(record) => panic!("{}", record.problem),
            }
        }
        (whole, damaged)
    }

    #[test]
    fn whole_records_are_read() {
        assert_eq!(read(&records(5).concat()), (vec![0, 1, 2, 3, 4], 0));
        assert_eq!(read(b""), (vec![], 0));
        assert_eq!(read(b"no archive at all"), (vec![], 17));
    }

    #[test]
    fn lengths_in_headers_are_not_believed() {
        for (kind, length) in [
            (RecordKind::Other(200), u64::MAX),
            (RecordKind::Other(200), u64::MAX - 96),
            (RecordKind::Pack, u64::MAX),
        ] {
            let mut header = RecordHeader {
                kind,
                ..header(7, &mut [])
            };
            header.body_bytes = length;
            let bytes = [&header.encode()[..], &records(2).concat()].concat();
            assert_eq!(read(&bytes), (vec![0, 1], HEADER_BYTES as u64), "{length}");
        }
    }

    #[test]
    fn headers_that_overlap_do_not_take_for_ever() {
        let mut header = RecordHeader {
            kind: RecordKind::Pack,
            ..header(7, &mut [])
        };
        header.body_bytes = RecordKind::Pack.body_bytes_max() - 1;
        let bytes = [&header.encode().repeat(10_000)[..], &vec![0; 34 << 20]].concat();
        let mut stream = Stream::new(&bytes[..], 0);
        let mut events = 0;
        while stream.next_event().unwrap().is_some() {
            events += 1;
        }
        assert_eq!(events, 10_000);
    }

    proptest! {
        /// One place is changed, cut out or doubled: all records but those it hit are found.
        #[test]
        fn damage_is_confined(at in any::<prop::sample::Index>(), length in 1usize..300, how in 0u8..4) {
            let records = records(8);
            let mut bytes = records.concat();
            let at = at.index(bytes.len());
            let end = (at + length).min(bytes.len());
            match how {
                0 => bytes[at..end].iter_mut().for_each(|byte| *byte ^= 0x5a),
                1 => { bytes.drain(at..end); }
                2 => { let doubled = bytes[at..end].to_vec(); bytes.splice(at..at, doubled); }
                _ => bytes[at..end].fill(0),
            }
            let (whole, _) = read(&bytes);
            let mut offset = 0;
            for (n, record) in (0u64..).zip(&records) {
                let hit = at < offset + record.len() && end > offset;
                offset += record.len();
                prop_assert!(hit || whole.contains(&n), "{} of {:?}", n, whole);
            }
        }

        #[test]
        fn nothing_is_too_strange(bytes: Vec<u8>) {
            read(&bytes);
        }
    }
}
