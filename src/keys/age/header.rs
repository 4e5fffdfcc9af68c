//! The header of a file of `age`: stanzas, each of which holds the key of the file for somebody, and a MAC over them.

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use super::{Failure, FileKey, base64, derive};

/// The first line.
pub(super) const VERSION: &[u8] = b"age-encryption.org/v1\n";
/// The number of characters of a full line of a body.
const LINE: usize = 64;
/// What begins the last line. The MAC covers all up to its end.
const LAST: &[u8] = b"---";

/// A stanza.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stanza {
    /// What stands in its first line: its type, and what belongs to that.
    pub(super) arguments: Vec<String>,
    /// Its bytes.
    pub(super) body: Vec<u8>,
}

impl Stanza {
    /// Makes a stanza.
    pub(super) fn new(arguments: &[&str], body: &[u8]) -> Self {
        Self {
            arguments: arguments.iter().map(|one| (*one).to_owned()).collect(),
            body: body.to_vec(),
        }
    }

    /// Its type.
    pub(super) fn kind(&self) -> &str {
        self.arguments.first().map_or("", String::as_str)
    }

    /// Appends it as it stands in a header.
    pub(super) fn put(&self, header: &mut Vec<u8>) {
        header.extend_from_slice(b"-> ");
        header.extend_from_slice(self.arguments.join(" ").as_bytes());
        header.push(b'\n');
        let body = base64::encode(&self.body);
        for line in body.as_bytes().chunks(LINE) {
            header.extend_from_slice(line);
            header.push(b'\n');
        }
        // The last line is shorter than the others, so that its end is known.
        if body.len().is_multiple_of(LINE) {
            header.push(b'\n');
        }
    }

    /// Parses a stanza of which the first line was read, up to its end. `line` returns the next line without its end, as often as the body has
    /// one.
    pub(super) fn parse<E: From<Failure>>(
        first: &[u8],
        mut line: impl FnMut() -> Result<Vec<u8>, E>,
    ) -> Result<Self, E> {
        const MALFORMED: Failure = Failure::Malformed("a stanza is malformed");
        let arguments = first.strip_prefix(b"-> ").ok_or(MALFORMED)?;
        let arguments = arguments.split(|byte| *byte == b' ').map(|argument| {
            let is_text = !argument.is_empty() && argument.iter().all(u8::is_ascii_graphic);
            let text = std::str::from_utf8(argument).ok().filter(|_| is_text);
            text.map(str::to_owned).ok_or(MALFORMED)
        });
        let arguments = arguments.collect::<Result<_, _>>()?;
        let mut body = Vec::new();
        loop {
            let next = line()?;
            if next.len() > LINE {
                return Err(MALFORMED.into());
            }
            body.extend_from_slice(&base64::decode(&next).ok_or(MALFORMED)?);
            if next.len() < LINE {
                return Ok(Self { arguments, body });
            }
        }
    }
}

/// A header that was parsed.
#[derive(Debug)]
pub(super) struct Header<'a> {
    /// Its stanzas.
    pub(super) stanzas: Vec<Stanza>,
    /// What the MAC covers.
    covered: &'a [u8],
    mac: Vec<u8>,
}

impl<'a> Header<'a> {
    /// Parses the header of a file. Returns what follows it, too.
    pub(super) fn parse(file: &'a [u8]) -> Result<(Self, &'a [u8]), Failure> {
        const SHORT: Failure = Failure::Malformed("its header ends too early");
        let mut rest = file
            .strip_prefix(VERSION)
            .ok_or(Failure::Malformed("it is no file of age, version 1"))?;
        let mut stanzas = Vec::new();
        loop {
            if let Some(last) = rest.strip_prefix(LAST) {
                let covered = &file[..file.len() - last.len()];
                let line = take_line(&mut rest).ok_or(SHORT)?;
                let mac = line.strip_prefix(b"--- ").and_then(base64::decode);
                let mac = mac.filter(|mac| mac.len() == 32);
                let mac = mac
                    .ok_or(Failure::Malformed("the MAC of its header is malformed"))?
                    .to_vec();
                if stanzas.is_empty() {
                    return Err(Failure::Malformed("it is for nobody"));
                }
                return Ok((Self { stanzas, covered, mac }, rest));
            }
            let first = take_line(&mut rest).ok_or(SHORT)?;
            let stanza = Stanza::parse(first, || take_line(&mut rest).map(<[u8]>::to_vec).ok_or(SHORT))?;
            stanzas.push(stanza);
        }
    }

    /// Checks the MAC.
    pub(super) fn check(&self, key: &FileKey) -> Result<(), Failure> {
        let its = mac_of(self.covered, key)?;
        its.verify_slice(&self.mac)
            .map_err(|_| Failure::Damaged("the MAC of its header is another one"))
    }
}

/// Makes the header of a file.
pub(super) fn make(stanzas: &[Stanza], key: &FileKey) -> Result<Vec<u8>, Failure> {
    let mut header = VERSION.to_vec();
    for stanza in stanzas {
        stanza.put(&mut header);
    }
    header.extend_from_slice(LAST);
    let mac = mac_of(&header, key)?.finalize().into_bytes();
    header.push(b' ');
    header.extend_from_slice(base64::encode(&mac).as_bytes());
    header.push(b'\n');
    Ok(header)
}

fn mac_of(covered: &[u8], key: &FileKey) -> Result<Hmac<Sha256>, Failure> {
    let key = derive(key.bytes(), &[], b"header");
    let mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key.bytes());
    let mut mac = mac.map_err(|_| Failure::Malformed("its key has another length"))?;
    mac.update(covered);
    Ok(mac)
}

fn take_line<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = memchr::memchr(b'\n', rest)?;
    let (line, behind) = rest.split_at(end);
    *rest = &behind[1..];
    Some(line)
}
