//! POSIX access control lists, as the kernel represents them in extended attributes (`uapi/linux/posix_acl_xattr.h`).

/// The attribute of a file's access control list.
pub const ACCESS: &[u8] = b"system.posix_acl_access";
/// The attribute of the list that entries of a folder inherit.
pub const DEFAULT: &[u8] = b"system.posix_acl_default";

const VERSION: u32 = 2;
const HEADER_BYTES: usize = 4;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// Returns what an access control list allows the file's own group: the permissions of its entry within the mask. The group bits of the
/// file's mode are the mask, which applies to everyone whom the list names; without the list they would give the group the permissions of
/// others. Returns `None` if the value is not a valid list.
pub fn group_permissions(value: &[u8]) -> Option<u32> {
    let (header, entries) = value.split_at_checked(HEADER_BYTES)?;
    let (entries, rest) = entries.as_chunks::<8>();
    if u32::from_le_bytes(header.try_into().ok()?) != VERSION || !rest.is_empty() {
        return None;
    }
    let (mut last, mut group, mut mask) = (None, None, None);
    let (mut tags, mut names_some) = (0u16, false);
    for [tag, tag_high, permissions, permissions_high, id @ ..] in entries {
        let tag = u16::from_le_bytes([*tag, *tag_high]);
        let permissions = u16::from_le_bytes([*permissions, *permissions_high]);
        let named = tag == USER || tag == GROUP;
        // Entries that name nobody have no id, whatever the field holds.
        let id = if named { u32::from_le_bytes(*id) } else { 0 };
        if permissions > 7 || (named && id == u32::MAX) || last.is_some_and(|last| last >= (tag, id)) {
            return None;
        }
        last = Some((tag, id));
        match tag {
            GROUP_OBJ => group = Some(permissions),
            MASK => mask = Some(permissions),
            USER_OBJ | OTHER => {}
            USER | GROUP => names_some = true,
            _ => return None,
        }
        tags |= tag;
    }
    let has_all = tags & (USER_OBJ | GROUP_OBJ | OTHER) == USER_OBJ | GROUP_OBJ | OTHER;
    if !has_all || (names_some && mask.is_none()) {
        return None;
    }
    Some(u32::from(group? & mask.unwrap_or(7)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut value = VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    }

    #[test]
    fn the_group_gets_no_more_than_its_entry_and_the_mask_allow() {
        const NONE: u32 = u32::MAX;
        let base = [(USER_OBJ, 6, NONE), (GROUP_OBJ, 6, NONE), (OTHER, 0, NONE)];
        assert_eq!(group_permissions(&list(&base)), Some(6));
        let named = [
            (USER_OBJ, 6, NONE),
            (USER, 6, 1000),
            (USER, 4, 1001),
            (GROUP_OBJ, 5, NONE),
            (MASK, 6, NONE),
            (OTHER, 0, NONE),
        ];
        assert_eq!(group_permissions(&list(&named)), Some(4));
        let without = |at: usize| {
            let mut less = named.to_vec();
            less.remove(at);
            list(&less)
        };
        for missing in [0, 3, 4, 5] {
            assert_eq!(group_permissions(&without(missing)), None, "{missing}");
        }
        let mut twice = named;
        twice[2].2 = 1000;
        let mut strange = named;
        strange[1].0 = 0x40;
        let mut wide = named;
        wide[1].1 = 8;
        let mut nobody = named;
        nobody[2].2 = NONE;
        for bad in [twice, strange, wide, nobody] {
            assert_eq!(group_permissions(&list(&bad)), None);
        }
        assert_eq!(group_permissions(&list(&named)[..20]), None);
        assert_eq!(group_permissions(b""), None);
        assert_eq!(group_permissions(&[&[1, 0, 0, 0], &list(&base)[4..]].concat()), None);
    }

    proptest! {
        #[test]
        fn nothing_is_too_strange(value: Vec<u8>) {
            let _ = group_permissions(&value);
        }
    }
}
