//! Parts of a store that can be read anywhere: where they lie is known from the beginning, so that keys are derived on all cores.

use std::io;

use rayon::prelude::*;

use super::{PARTS_MAX, Part, Parts, part_of};
use crate::error::{Error, Result};
use crate::foreign::Input;
use crate::foreign::qvm::scrypt_file::{HEADER_BYTES, Header, Keys, TAG_BYTES};
use crate::foreign::qvm::stream::{StreamHeader, stream_header};
use crate::foreign::tar::BLOCK;
use crate::store::Store;

/// Where parts of a stream lie that can be read anywhere.
pub(super) struct Located {
    pub(super) part: Part,
    offset: u64,
}

impl Parts<'_> {
    /// The keys of a part, if they can be derived ahead: together with those of the parts that follow, on all cores.
    pub(super) fn key_of(&mut self, part: &Part) -> Option<(Header, Keys)> {
        if let Some(known) = self.keys.remove(&part.name) {
            return Some(known);
        }
        let (store, located) = self.ahead.as_mut()?;
        let store = *store;
        // Parts come in the order in which they were found.
        let at = located.iter().rposition(|one| one.part == *part)?;
        located.truncate(at + 1);
        let (_, located) = self.ahead.as_ref()?;
        let (mut chosen, mut memory_bytes) = (Vec::new(), 0u64);
        for one in located
            .iter()
            .rev()
            .filter(|one| !self.skipped.contains(&one.part.member))
        {
            let mut bytes = [0; HEADER_BYTES];
            if one.part.stored_bytes < (HEADER_BYTES + TAG_BYTES) as u64
                || store.read_exact_at(one.offset, &mut bytes).is_err()
            {
                break;
            }
            let Ok(header) = Header::read(&bytes, self.kdf_memory_bytes) else {
                break;
            };
            memory_bytes = memory_bytes.saturating_add(header.parameters.memory_bytes());
            let is_enough = chosen.len() >= rayon::current_num_threads() || memory_bytes > self.kdf_memory_bytes;
            if is_enough && !chosen.is_empty() {
                break;
            }
            if !self.is_cost_allowed(&header) {
                break;
            }
            chosen.push((
                one.part.name.clone(),
                header,
                self.full_passphrase(&one.part.name, false),
            ));
        }
        // Where there are none, the part itself tells why.
        let made: Vec<(String, (Header, Keys))> = chosen
            .into_par_iter()
            .filter_map(|(name, header, passphrase)| {
                let keys = header.keys(&passphrase).ok()?;
                Some((name, (header, keys)))
            })
            .collect();
        self.keys.extend(made);
        self.keys.remove(&part.name)
    }
}

/// Finds all parts of a store that can be read anywhere, by their headers.
pub(super) fn walk(store: &dyn Store, input: &Input<'_>) -> Result<Vec<Located>> {
    let (mut located, mut at) = (Vec::new(), 0u64);
    loop {
        if input.interrupted() {
            return Err(Error::Interrupted);
        }
        let mut header = [0; BLOCK];
        match store.read_exact_at(at, &mut header) {
            Ok(()) => {}
            // Where it is cut off, reading it says so.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(located),
            Err(error) => return Err(Error::io("read", input.path())(error)),
        }
        at += BLOCK as u64;
        let Ok(header) = stream_header(&header) else {
            return Ok(located);
        };
        let bytes = match header {
            StreamHeader::Zeros => 0,
            StreamHeader::Pax(bytes) => bytes,
            StreamHeader::File { name, bytes } => {
                if let Some(part) = part_of(&name, bytes) {
                    located.push(Located { part, offset: at });
                }
                if located.len() > PARTS_MAX {
                    return Err(input.refused("it has more parts than vmfold takes"));
                }
                bytes
            }
        };
        at = at.saturating_add(bytes.checked_next_multiple_of(BLOCK as u64).unwrap_or(u64::MAX));
    }
}
