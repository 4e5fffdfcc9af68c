//! One pass over a damaged archive: which records are intact, where headers stand, and what its PARITY records say of themselves.

use std::collections::HashMap;
use std::io::Read;

use crate::archive::parity::geometry_in;
use crate::archive::record::{HEADER_BYTES, RecordHeader, RecordKind};
use crate::archive::stream::{Stream, StreamEvent};
use crate::error::{Error, Result};
use crate::monitor::Monitor;
use crate::parity::geometry::{GEOMETRY_BYTES, Geometry};
use crate::store::{Store, StoreReader};

/// Headers that are kept, twice as many as an archive has records: what is known of each takes 56 bytes of memory.
const HEADERS_MAX: usize = 1 << 21;
/// Groups that are kept.
const GROUPS_MAX: usize = 1 << 16;

/// The last bytes of a header, its own hash.
pub(super) type HeaderHash = [u8; 8];

/// A place in the archive as it was, and where what belongs there stands in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Anchor {
    /// As it was.
    pub(super) origin: u64,
    /// In the file.
    pub(super) at: u64,
}

/// A record that matches its hash, in a file.
#[derive(Debug, Clone, Copy)]
pub(super) struct FoundRecord {
    pub(super) at: u64,
    pub(super) length: u64,
    pub(super) hash: HeaderHash,
}

/// What a pass over a file found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Bytes of the file.
    pub(super) length: u64,
    /// The headers whose hashes are right, by these hashes, and where they stand.
    pub(super) headers: Vec<(HeaderHash, u64)>,
    /// The records that are intact, in the order they stand.
    pub(super) records: Vec<FoundRecord>,
    /// The groups, and where their geometries stand.
    pub(super) groups: HashMap<Geometry, Vec<Anchor>>,
}

impl Scan {
    /// Reads all of a file.
    ///
    /// # Errors
    /// Returns the error of reading, or says that there are more headers than allowed; [`Error::Interrupted`].
    pub(super) fn new(store: &dyn Store, length: u64, monitor: &dyn Monitor) -> Result<Self> {
        monitor.phase("Reading records", length);
        let failed = |error| Error::io("read", store.path())(error);
        let mut scan = Self {
            length,
            ..Self::default()
        };
        let mut stream = Stream::new(StoreReader::new(store, 0).take(length), 0);
        loop {
            let at = stream.offset();
            let event = stream.next_event().map_err(failed)?;
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            monitor.advance(stream.offset() - at);
            // What ends here may be a PARITY record, whatever its header has become.
            scan.take_trailer(store, at).map_err(failed)?;
            match event {
                None => break,
                Some(StreamEvent::Record { header, offset, body }) => scan.take_record(&header, offset, &body),
                Some(StreamEvent::Damage { header: None, .. }) => {
                    scan.take_front(store, at, None).map_err(failed)?;
                }
                Some(StreamEvent::Damage {
                    header: Some(header), ..
                }) => {
                    scan.take_header(store, at).map_err(failed)?;
                    if header.kind == RecordKind::Parity {
                        scan.take_front(store, at, Some(&header)).map_err(failed)?;
                    }
                }
                Some(StreamEvent::Unsupported(_)) => scan.take_header(store, at).map_err(failed)?,
            }
            if scan.headers.len() > HEADERS_MAX {
                let problem = "it has more records than allowed";
                return Err(Error::damaged(store.path(), at, length - at, problem));
            }
        }
        scan.headers.sort_unstable();
        Ok(scan)
    }

    fn take_record(&mut self, header: &RecordHeader, at: u64, body: &[u8]) {
        let encoded = header.encode();
        let hash = hash_of(&encoded);
        self.headers.push((hash, at));
        self.records.push(FoundRecord {
            at,
            length: (HEADER_BYTES + body.len()) as u64,
            hash,
        });
        if header.kind == RecordKind::Parity {
            self.note(geometry_in(body), at, true);
        }
    }

    /// Takes a header whose body is damaged, or cannot be read by this version.
    fn take_header(&mut self, store: &dyn Store, at: u64) -> std::io::Result<()> {
        let mut bytes = [0; HEADER_BYTES];
        if at + bytes.len() as u64 <= self.length {
            store.read_exact_at(at, &mut bytes)?;
            self.headers.push((hash_of(&bytes), at));
        }
        Ok(())
    }

    /// Looks for the geometry at the beginning of a record whose header stands, or stood, at a place.
    fn take_front(&mut self, store: &dyn Store, at: u64, header: Option<&RecordHeader>) -> std::io::Result<()> {
        let body = at + HEADER_BYTES as u64;
        if let Some(mut bytes) = self.bytes_at(store, body)? {
            if let Some(header) = header {
                header.apply_mask(0, &mut bytes);
            }
            self.note(geometry_in(&bytes), at, true);
        }
        Ok(())
    }

    /// Looks for the geometry that ends a record at a place.
    fn take_trailer(&mut self, store: &dyn Store, end: u64) -> std::io::Result<()> {
        if let Some(at) = end.checked_sub(GEOMETRY_BYTES as u64)
            && let Some(bytes) = self.bytes_at(store, at)?
        {
            self.note(geometry_in(&bytes), at, false);
        }
        Ok(())
    }

    fn bytes_at(&self, store: &dyn Store, at: u64) -> std::io::Result<Option<[u8; GEOMETRY_BYTES]>> {
        let mut bytes = [0; GEOMETRY_BYTES];
        if at.saturating_add(bytes.len() as u64) > self.length {
            return Ok(None);
        }
        store.read_exact_at(at, &mut bytes)?;
        Ok(Some(bytes))
    }

    /// Notes a geometry, and where the record begins that it is in, or the geometry that ends it.
    fn note(&mut self, found: Option<(Geometry, u8)>, at: u64, is_front: bool) {
        let Some((geometry, number)) = found else { return };
        if self.groups.len() >= GROUPS_MAX && !self.groups.contains_key(&geometry) {
            return;
        }
        let layouts = geometry.layouts(HEADER_BYTES as u64);
        if let Some(layout) = layouts.get(usize::from(number)) {
            let origin = if is_front { layout.start } else { layout.trailer };
            let anchors = self.groups.entry(geometry).or_default();
            // What stands twice has its geometry twice.
            if anchors.len() < 8 * layouts.len() {
                anchors.push(Anchor { origin, at });
            }
        }
    }

    /// Returns where headers with a hash stand.
    pub(super) fn places_of(&self, hash: HeaderHash) -> impl Iterator<Item = u64> {
        let first = self.headers.partition_point(|(known, _)| *known < hash);
        let same = self.headers[first..]
            .iter()
            .take_while(move |(known, _)| *known == hash);
        same.map(|(_, at)| *at)
    }
}

/// The hash at the end of a header.
pub(super) fn hash_of(header: &[u8; HEADER_BYTES]) -> HeaderHash {
    let mut hash = [0; 8];
    hash.copy_from_slice(&header[HEADER_BYTES - 8..]);
    hash
}
