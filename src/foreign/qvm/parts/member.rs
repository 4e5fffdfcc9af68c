//! What a member holds, part by part.

use std::cell::RefCell;
use std::io::{self, Read};
use std::path::PathBuf;
use std::rc::Rc;

use super::ahead::Pieces;
use super::{PART_BYTES, Parts};
use crate::error::Result;
use crate::foreign::hand_out;

/// What the parts of a member hold, one after the other.
pub(in crate::foreign::qvm) struct MemberReader<'a> {
    parts: Rc<RefCell<Parts<'a>>>,
    member: String,
    volume: Option<PathBuf>,
    number: u32,
    /// What of the part that was opened last was not handed out, and how much was of the first piece.
    plain: Pieces,
    at: usize,
    /// The length of the first part, which all but the last have.
    first_bytes: Option<usize>,
    last_bytes: usize,
}

impl<'a> MemberReader<'a> {
    /// The member whose first part comes next.
    pub(in crate::foreign::qvm) fn new(
        parts: &Rc<RefCell<Parts<'a>>>,
        member: String,
        volume: Option<PathBuf>,
    ) -> Self {
        Self {
            parts: Rc::clone(parts),
            member,
            volume,
            number: 0,
            plain: Pieces::new(),
            at: 0,
            first_bytes: None,
            last_bytes: 0,
        }
    }

    /// Opens the next part. Returns false at the end of the member.
    fn next_part(&mut self) -> Result<bool> {
        let mut parts = self.parts.borrow_mut();
        let start = parts.position();
        let number = match parts.peek()? {
            Some(part) if part.member == self.member => part.number,
            _ => {
                // The writer begins another part after a full one, if need be an empty one.
                if self.last_bytes == PART_BYTES {
                    return Err(parts.damaged(start, self.volume.as_ref(), "its last part is missing"));
                }
                return Ok(false);
            }
        };
        if number != self.number {
            let problem = format!("part {:03} is missing, and {number:03} is there", self.number);
            return Err(parts.damaged(start, self.volume.as_ref(), &problem));
        }
        if self.first_bytes.is_some_and(|first| first != self.last_bytes) {
            return Err(parts.damaged(start, self.volume.as_ref(), "a part follows one that was the last"));
        }
        self.plain = parts.open_pieces(self.volume.as_ref())?;
        self.at = 0;
        self.number += 1;
        self.last_bytes = self.plain.iter().map(Vec::len).sum();
        self.first_bytes.get_or_insert(self.last_bytes);
        Ok(true)
    }
}

impl Read for MemberReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            if let Some(piece) = self.plain.front() {
                if self.at < piece.len() {
                    return Ok(hand_out(piece, &mut self.at, buffer));
                }
                let used = self.plain.pop_front().map_or(0, |piece| piece.len());
                self.at = 0;
                self.parts.borrow_mut().use_up(used);
            } else if !self.next_part().map_err(io::Error::other)? {
                break;
            }
        }
        Ok(0)
    }
}
