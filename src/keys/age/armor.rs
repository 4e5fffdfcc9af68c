//! Files of `age` as text: base64 between two lines, as in PEM (RFC 7468).

use zeroize::Zeroizing;

use super::{Failure, base64};

const BEGIN: &str = "-----BEGIN AGE ENCRYPTED FILE-----";
const END: &str = "-----END AGE ENCRYPTED FILE-----";
/// The number of characters of a full line.
const LINE: usize = 64;

/// Whether a text is such a file.
pub(super) fn is_armored(text: &[u8]) -> bool {
    text.trim_ascii_start().starts_with(BEGIN.as_bytes())
}

/// Decodes such a file. Space around it does not count, and lines may end as on other systems.
pub(super) fn decode(text: &[u8]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    const MALFORMED: Failure = Failure::Malformed("its armor is malformed");
    let text = std::str::from_utf8(text.trim_ascii()).map_err(|_| MALFORMED)?;
    let mut lines = text.split('\n').map(|line| line.strip_suffix('\r').unwrap_or(line));
    if lines.next() != Some(BEGIN) || lines.next_back() != Some(END) {
        return Err(MALFORMED);
    }
    let lines: Vec<&str> = lines.collect();
    let (last, full) = lines.split_last().ok_or(MALFORMED)?;
    if full.iter().any(|line| line.len() != LINE) || last.is_empty() || last.len() > LINE || last.len() % 4 != 0 {
        return Err(MALFORMED);
    }
    // There are as many characters of padding as the last four lack.
    let padded = last.len() - last.trim_end_matches('=').len();
    let digits = [&full.concat(), &last[..last.len() - padded]].concat();
    let missing = digits.len().next_multiple_of(4) - digits.len();
    if missing != padded {
        return Err(MALFORMED);
    }
    base64::decode(digits.as_bytes()).ok_or(MALFORMED)
}
