//! Parts of a pipe that are read before they are asked for, so that their keys are derived meanwhile. While one part is used, the next takes the
//! place of what was used of it, so that hardly more is held than one part. Once it is there as a whole, the header of the one after it is known.
//! So two keys are derived at a time where parts are large, and more where they are small.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};

use super::{PART_STORED_BYTES_MAX, Part, Parts};
use crate::error::{Error, Result};
use crate::foreign::qvm::EMPTY;
use crate::foreign::qvm::scrypt_file::{HEADER_BYTES, Header, Keys, TAG_BYTES, Wrong};
use crate::foreign::tar::BLOCK;

/// Bytes that are read at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// Bytes of parts that are held: those of one part, and of some that are small. Only then is the next one read on.
const HELD_BYTES_MAX: u64 = PART_STORED_BYTES_MAX + 4 * PIECE_BYTES;

/// What a part holds, in pieces.
pub(super) type Pieces = VecDeque<Vec<u8>>;

/// The key of a part.
enum Key {
    /// It cannot be derived.
    Wrong(Wrong),
    /// Nothing of it was done yet.
    Waits(Header),
    /// It is or was derived by a thread of its own.
    Derived(Header, Receiver<std::result::Result<Keys, Wrong>>),
}

/// A part that was begun to be read.
struct Waiting {
    part: Part,
    /// Where its content begins in the stream.
    start: u64,
    key: Key,
    /// What was read of it, without the header.
    pieces: Pieces,
    /// Bytes that were read and are to be read of that.
    held_bytes: u64,
    left_bytes: u64,
}

/// The keys that are being derived.
#[derive(Default)]
struct Deriving {
    count: AtomicUsize,
    /// Their memory.
    bytes: AtomicU64,
}

impl Deriving {
    fn begin(&self, bytes: u64) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
    }

    fn end(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::SeqCst);
        self.count.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether another key may be derived as well, which takes so much memory. One always may.
    fn has_room(&self, bytes: u64, bytes_max: u64) -> bool {
        let (count, busy_bytes) = (self.count.load(Ordering::SeqCst), self.bytes.load(Ordering::SeqCst));
        count == 0 || count < rayon::current_num_threads() && busy_bytes.saturating_add(bytes) <= bytes_max
    }
}

/// What was read of a pipe before it was asked for.
#[derive(Default)]
pub(super) struct ReadAhead {
    is_on: bool,
    /// In the order of the stream. All but the last are whole.
    queue: VecDeque<Waiting>,
    /// Bytes of the part that was opened last and was not used up yet.
    opened_bytes: u64,
    deriving: Arc<Deriving>,
    /// The error that ended reading ahead. What came before it is handed out first.
    failed: Option<Error>,
    /// The member of the part that was read last.
    member: String,
    /// Whether only parts of the same member are read ahead, because others may be left out.
    stays_in_member: bool,
}

impl ReadAhead {
    /// The part that comes next, if it was read ahead.
    pub(super) fn first(&self) -> Option<&Part> {
        self.queue.front().map(|waiting| &waiting.part)
    }

    /// Where the part that comes next begins, if it was read ahead.
    pub(super) fn start(&self) -> Option<u64> {
        self.queue.front().map(|waiting| waiting.start)
    }

    /// The error that comes behind all that was read.
    pub(super) fn take_error(&mut self) -> Option<Error> {
        self.failed.take()
    }

    fn held_bytes(&self) -> u64 {
        self.opened_bytes + self.queue.iter().map(|waiting| waiting.held_bytes).sum::<u64>()
    }
}

impl Parts<'_> {
    /// Reads ahead from now on, if parts come through a pipe.
    pub(in crate::foreign::qvm) fn read_ahead(&mut self) {
        self.pipe.is_on = self.ahead.is_none();
    }

    /// What the next part holds, once all of it is authenticated. `volume` is what it belongs to, for errors.
    pub(super) fn open_pieces(&mut self, volume: Option<&PathBuf>) -> Result<Pieces> {
        if !self.pipe.is_on {
            return Ok(VecDeque::from([self.open(volume)?]));
        }
        let mut waiting = match (self.pipe.queue.pop_front(), self.next.take()) {
            (Some(waiting), next) => {
                self.next = next;
                waiting
            }
            (None, Some(part)) => self.begin_part(part)?,
            (None, None) => return Ok(Pieces::new()),
        };
        while waiting.left_bytes > 0 {
            let read = self.pipe.failed.take().map_or(Ok(()), Err);
            read.and_then(|()| self.read_piece(&mut waiting))
                .map_err(|error| of_volume(error, volume))?;
        }
        self.pipe.opened_bytes = waiting.held_bytes;
        self.start(&mut waiting);
        self.fill();
        let end = waiting.start + waiting.part.stored_bytes;
        let passphrase = self.full_passphrase(&waiting.part.name, false);
        if let Err(wrong) = waiting.open(&passphrase) {
            let error = self.wrong(waiting.start, volume, wrong);
            return Err(ending_at(error, waiting.start, end));
        }
        Ok(waiting.pieces)
    }

    /// Says that so many bytes of the part that was opened last were used, so that others may take their place.
    pub(super) fn use_up(&mut self, bytes: usize) {
        self.pipe.opened_bytes = self.pipe.opened_bytes.saturating_sub(bytes as u64);
        self.fill();
    }

    /// Drops the next part, if it was read ahead.
    pub(super) fn skip_ahead(&mut self) -> Result<bool> {
        let Some(waiting) = self.pipe.queue.pop_front() else {
            return Ok(false);
        };
        self.pipe.stays_in_member = true;
        if waiting.left_bytes > 0 {
            if let Some(error) = self.pipe.failed.take() {
                return Err(error);
            }
            let padding = waiting.part.stored_bytes.wrapping_neg() % BLOCK as u64;
            self.input.skip(waiting.left_bytes + padding)?;
        }
        Ok(true)
    }

    /// Reads on as far as memory allows, and derives keys.
    fn fill(&mut self) {
        if self.pipe.is_on && self.pipe.failed.is_none() {
            self.pipe.failed = self.try_fill().err();
        }
        let mut queue = std::mem::take(&mut self.pipe.queue);
        for waiting in &mut queue {
            let Key::Waits(header) = &waiting.key else { continue };
            let bytes = header.parameters.memory_bytes();
            if !self.pipe.deriving.has_room(bytes, self.kdf_memory_bytes) {
                break;
            }
            self.start(waiting);
        }
        self.pipe.queue = queue;
    }

    fn try_fill(&mut self) -> Result<()> {
        loop {
            if let Some(mut last) = self.pipe.queue.pop_back() {
                let mut read = Ok(());
                let held_bytes = self.pipe.held_bytes();
                while last.left_bytes > 0 && held_bytes + last.held_bytes < HELD_BYTES_MAX && read.is_ok() {
                    read = self.read_piece(&mut last);
                }
                let is_whole = last.left_bytes == 0;
                self.pipe.queue.push_back(last);
                read?;
                if !is_whole {
                    return Ok(());
                }
            }
            if self.pipe.queue.len() >= rayon::current_num_threads() || !self.is_next_wanted()? {
                return Ok(());
            }
            let Some(part) = self.next.take() else { return Ok(()) };
            let waiting = self.begin_part(part)?;
            self.pipe.queue.push_back(waiting);
        }
    }

    /// Whether the part that comes next in the stream will be opened, as far as one can tell.
    fn is_next_wanted(&mut self) -> Result<bool> {
        let (current, stays) = (self.pipe.member.clone(), self.pipe.stays_in_member);
        let Some(part) = self.peek_stream()? else {
            return Ok(false);
        };
        let (folder, file) = part.member.split_once('/').unwrap_or_default();
        Ok(part.member == current || !stays && folder != "dom0-home" && file != EMPTY)
    }

    /// Reads the header of a part.
    fn begin_part(&mut self, part: Part) -> Result<Waiting> {
        let start = self.input.offset();
        let mut left_bytes = part.stored_bytes;
        self.pipe.member.clone_from(&part.member);
        let key = if left_bytes < (HEADER_BYTES + TAG_BYTES) as u64 {
            Key::Wrong(Wrong::Damaged("a part is too short"))
        } else {
            let mut bytes = [0; HEADER_BYTES];
            self.input.exact(&mut bytes, None)?;
            left_bytes -= HEADER_BYTES as u64;
            self.part_header(&bytes).map_or_else(Key::Wrong, Key::Waits)
        };
        Ok(Waiting {
            part,
            start,
            key,
            pieces: Pieces::new(),
            held_bytes: 0,
            left_bytes,
        })
    }

    /// Reads more of a part, and behind its end what pads it.
    fn read_piece(&mut self, waiting: &mut Waiting) -> Result<()> {
        let bytes = waiting.left_bytes.min(PIECE_BYTES);
        let mut piece = vec![0; usize::try_from(bytes).unwrap_or(0)];
        self.input.exact(&mut piece, None)?;
        waiting.pieces.push_back(piece);
        waiting.held_bytes += bytes;
        waiting.left_bytes -= bytes;
        if waiting.left_bytes == 0 {
            self.input
                .skip(waiting.part.stored_bytes.wrapping_neg() % BLOCK as u64)?;
        }
        Ok(())
    }

    /// Begins to derive the key of a part, if that was not begun yet.
    fn start(&self, waiting: &mut Waiting) {
        let Key::Waits(header) = &waiting.key else { return };
        let passphrase = self.full_passphrase(&waiting.part.name, false);
        let (bytes, its) = (header.parameters.memory_bytes(), header.clone());
        let deriving = Arc::clone(&self.pipe.deriving);
        let (sender, receiver) = channel();
        deriving.begin(bytes);
        // No thread of those that share other work: that would wait for it.
        let spawned = std::thread::Builder::new().spawn(move || {
            let keys = its.keys(&passphrase);
            deriving.end(bytes);
            // Nobody may be there any more to receive it.
            let _ = sender.send(keys);
        });
        match spawned {
            Ok(_) => waiting.key = Key::Derived(header.clone(), receiver),
            Err(_) => self.pipe.deriving.end(bytes),
        }
    }
}

impl Waiting {
    /// Waits for the key, authenticates the part, and decrypts it in its place. If no thread could be made, the key is derived here.
    fn open(&mut self, passphrase: &[u8]) -> std::result::Result<(), Wrong> {
        let (header, keys) = match std::mem::replace(&mut self.key, Key::Wrong(Wrong::Passphrase)) {
            Key::Wrong(wrong) => return Err(wrong),
            Key::Waits(header) => {
                let keys = header.keys(passphrase)?;
                (header, keys)
            }
            Key::Derived(header, receiver) => {
                let keys = receiver.recv();
                (
                    header,
                    keys.map_err(|_| Wrong::Refused("its keys cannot be derived".into()))??,
                )
            }
        };
        header.open_pieces(&keys, &mut self.pieces)
    }
}

/// An error that names the volume, if it names none.
fn of_volume(mut error: Error, its: Option<&PathBuf>) -> Error {
    if let Error::DamagedBackup { volume, .. } = &mut error {
        *volume = volume.take().or_else(|| its.cloned());
    }
    error
}

/// An error that is of these bytes of the stream.
fn ending_at(mut error: Error, start: u64, end: u64) -> Error {
    if let Error::DamagedBackup { range, .. } = &mut error {
        (range.start, range.length) = (start, end - start);
    }
    error
}
