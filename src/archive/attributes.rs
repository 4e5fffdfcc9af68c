//! What an archive keeps of the metadata of an image or a folder.

use super::limits::{NAME_BYTES_MAX, NAMES_MAX, OWNER_BYTES_MAX, TEXT_OVERHEAD, XATTR_BYTES_MAX};
use crate::codec::{Decoded, Decoder, next_entry, put_entry, put_string, put_varint, put_zigzag, skip_entry};
use crate::content::{FileTime, Metadata, NODATACOW};

/// The bits of a mode that are kept.
const MODE_MASK: u32 = 0o7777;

const TAG_MODE: u8 = 1;
const TAG_OWNER: u8 = 2;
const TAG_MTIME: u8 = 3;
const TAG_XATTR: u8 = 4;
const TAG_ACCESS_LIST: u8 = 5;
const TAG_DEFAULT_LIST: u8 = 6;
const TAG_NODATACOW: u8 = 7;
/// What a host knows of the image's machine. It is checked, and nothing uses it.
const TAG_MACHINE: u8 = 8;

/// The attributes that have tags of their own, and the names under which the system has their values.
const NAMED: [(u8, &[u8]); 3] = [
    (TAG_ACCESS_LIST, b"system.posix_acl_access"),
    (TAG_DEFAULT_LIST, b"system.posix_acl_default"),
    (TAG_NODATACOW, NODATACOW),
];

/// The attributes that an image or folder has once.
const SINGLE: [u8; 6] = [
    TAG_MODE,
    TAG_OWNER,
    TAG_MTIME,
    TAG_ACCESS_LIST,
    TAG_DEFAULT_LIST,
    TAG_NODATACOW,
];

/// Appends the attributes.
pub fn put(encoded: &mut Vec<u8>, metadata: &Metadata) {
    put_varint(encoded, 3 + metadata.xattrs.len() as u64);
    put_entry(encoded, TAG_MODE, |fields| {
        put_varint(fields, (metadata.mode & MODE_MASK).into());
    });
    put_entry(encoded, TAG_OWNER, |fields| {
        put_varint(fields, metadata.uid.into());
        put_varint(fields, metadata.gid.into());
        put_string(fields, metadata.user.as_bytes());
        put_string(fields, metadata.group.as_bytes());
    });
    put_entry(encoded, TAG_MTIME, |fields| {
        put_zigzag(fields, metadata.mtime.seconds);
        put_varint(fields, metadata.mtime.nanoseconds.into());
    });
    for (name, value) in &metadata.xattrs {
        match NAMED.iter().find(|(_, named)| named == name) {
            Some((tag, _)) => put_entry(encoded, *tag, |fields| fields.extend(value)),
            None => put_entry(encoded, TAG_XATTR, |fields| {
                put_string(fields, name);
                fields.extend(value);
            }),
        }
    }
}

/// Decodes the attributes. Adds to `text_bytes` what they count for among the names and attributes of a commit.
///
/// # Errors
/// Returns what is malformed, or what this version does not know and must not skip.
pub fn decode(decoder: &mut Decoder<'_>, text_bytes: &mut usize) -> Decoded<Metadata> {
    let count = decoder.count(2)?;
    if count > NAMES_MAX {
        return Err("there are too many attributes".into());
    }
    let mut metadata = Metadata::default();
    let mut seen = [false; TAG_NODATACOW as usize + 1];
    for _ in 0..count {
        let (tag, mut fields) = next_entry(decoder)?.ok_or("it ends too early")?;
        *text_bytes += fields.left() + TEXT_OVERHEAD;
        if SINGLE.contains(&tag)
            && let Some(seen) = seen.get_mut(usize::from(tag))
            && std::mem::replace(seen, true)
        {
            return Err("an attribute is there twice".into());
        }
        match tag {
            TAG_MODE => {
                metadata.mode = fields.varint32()?;
                if metadata.mode & !MODE_MASK != 0 {
                    return Err("a mode has bits that are not allowed".into());
                }
            }
            TAG_OWNER => {
                (metadata.uid, metadata.gid) = (fields.varint32()?, fields.varint32()?);
                metadata.user = fields.text(OWNER_BYTES_MAX)?;
                metadata.group = fields.text(OWNER_BYTES_MAX)?;
            }
            TAG_MTIME => metadata.mtime = file_time(&mut fields)?,
            TAG_XATTR => {
                let name = attribute_name(&mut fields)?.to_vec();
                if NAMED.iter().any(|(_, named)| *named == name) {
                    return Err("an attribute has a name that is another's".into());
                }
                metadata.xattrs.push((name, value(&mut fields)?));
            }
            TAG_MACHINE => {
                attribute_name(&mut fields)?;
                value(&mut fields)?;
            }
            tag => match NAMED.iter().find(|(named, _)| *named == tag) {
                Some((_, name)) => metadata.xattrs.push((name.to_vec(), value(&mut fields)?)),
                None => skip_entry(tag)?,
            },
        }
    }
    Ok(metadata)
}

fn attribute_name<'a>(fields: &mut Decoder<'a>) -> Decoded<&'a [u8]> {
    match fields.string(NAME_BYTES_MAX)? {
        name if name.is_empty() || name.contains(&0) => Err("an attribute has no proper name".into()),
        name => Ok(name),
    }
}

fn value(fields: &mut Decoder<'_>) -> Decoded<Vec<u8>> {
    if fields.left() > XATTR_BYTES_MAX {
        return Err("an attribute has a longer value than allowed".into());
    }
    Ok(fields.take(fields.left())?.to_vec())
}

/// Decodes a time.
///
/// # Errors
/// Returns what is malformed.
pub fn file_time(decoder: &mut Decoder<'_>) -> Decoded<FileTime> {
    let time = FileTime {
        seconds: decoder.zigzag()?,
        nanoseconds: decoder.varint32()?,
    };
    if time.nanoseconds >= 1_000_000_000 {
        return Err("a time has more than a second of nanoseconds".into());
    }
    Ok(time)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::codec::{CRITICAL, Malformed};
    use proptest::prelude::*;

    /// Any metadata that an archive can keep.
    pub(in crate::archive) fn metadata() -> impl Strategy<Value = Metadata> {
        (
            any::<(u32, u32, i64)>(),
            0u32..1_000_000_000,
            "[a-z]{0,8}",
            any::<Vec<u8>>(),
        )
            .prop_map(|((uid, gid, seconds), nanoseconds, user, value)| Metadata {
                mode: uid & MODE_MASK,
                uid,
                gid,
                user,
                group: String::new(),
                mtime: FileTime { seconds, nanoseconds },
                xattrs: vec![
                    (b"user.x".to_vec(), value.clone()),
                    (b"system.posix_acl_access".to_vec(), value),
                    (NODATACOW.to_vec(), Vec::new()),
                ],
            })
    }

    fn read(encoded: &[u8]) -> Decoded<Metadata> {
        decode(&mut Decoder::new(encoded), &mut 0)
    }

    proptest! {
        #[test]
        fn attributes_come_back(metadata in metadata(), strange: Vec<u8>) {
            let mut encoded = Vec::new();
            put(&mut encoded, &metadata);
            prop_assert_eq!(read(&encoded), Ok(metadata));
            let _ = read(&strange);
        }
    }

    #[test]
    fn attributes_have_limits() {
        let with = |tag: u8, fields: &[u8], count: u64| {
            let mut encoded = Vec::new();
            put_varint(&mut encoded, count);
            for _ in 0..count {
                put_entry(&mut encoded, tag, |encoded| encoded.extend(fields));
            }
            read(&encoded)
        };
        assert!(with(TAG_MODE, &[7], 1).is_ok());
        assert!(with(TAG_MODE, &[7], 2).is_err());
        assert!(with(TAG_MODE, &[0x80, 0x40], 1).is_err());
        assert!(with(TAG_NODATACOW, &[], 1).unwrap().is_nodatacow());
        assert!(with(TAG_XATTR, &[1, b'a', b'v'], 2).is_ok());
        assert!(with(TAG_XATTR, &[0, b'v'], 1).is_err());
        let mut long = vec![1, b'a'];
        long.resize(2 + XATTR_BYTES_MAX + 1, 0);
        assert!(with(TAG_XATTR, &long, 1).is_err());
        assert!(with(TAG_MACHINE, &long[..9], 2).is_ok());
        assert!(with(99, &[], 1).is_ok());
        assert!(matches!(with(CRITICAL | 0x63, &[], 1), Err(Malformed::Unsupported(_))));
        let mut named = vec![u8::try_from(NODATACOW.len()).unwrap()];
        named.extend(NODATACOW);
        assert!(with(TAG_XATTR, &named, 1).is_err());
    }
}
