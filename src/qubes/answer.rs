//! The answers of `qubesd`, as its Admin API has them: a digit and a zero byte, and then the content, or an exception. None is trusted to be of the
//! form that it should have.

use std::path::{Component, Path, PathBuf};

use super::{MachineState, VolumeFiles, VolumeInfo};

/// Characters of an exception that are shown.
const SHOWN_MAX: usize = 300;

/// The content of an answer, or what to say of it.
pub(super) fn content(answer: &[u8]) -> Result<&str, String> {
    match answer {
        [b'0', 0, content @ ..] => std::str::from_utf8(content).map_err(|_| "its answer is no text".into()),
        [b'2', 0, exception @ ..] => Err(exception_text(exception)),
        [] => Err("it closed the connection without an answer".into()),
        _ => Err("its answer makes no sense".into()),
    }
}

/// The type and the message of an exception. A stack trace between them is left out; values that belong into the message follow it.
fn exception_text(exception: &[u8]) -> String {
    let text = String::from_utf8_lossy(exception);
    let mut fields = text.split('\0');
    let kind = fields.next().unwrap_or_default();
    let rest = fields.skip(1).filter(|field| !field.is_empty());
    let mut message = rest.fold(String::from(kind), |message, field| {
        let before = if message.contains(": ") { ", " } else { ": " };
        message + before + field
    });
    if let Some((at, _)) = message.char_indices().nth(SHOWN_MAX) {
        message.truncate(at);
        message.push('…');
    }
    crate::shown::shown(Path::new(&message)).to_string()
}

/// The machines of an answer: lines of a name and `key=value`.
pub(super) fn machines(content: &str) -> Result<Vec<MachineState>, String> {
    let lines = content.lines().map(|line| {
        let mut words = line.split(' ');
        let name = words.next().filter(|name| !name.is_empty())?;
        let state = words.find_map(|word| word.strip_prefix("state="))?;
        Some(MachineState {
            name: name.to_owned(),
            state: state.to_owned(),
        })
    });
    lines
        .collect::<Option<_>>()
        .ok_or_else(|| "its list of machines makes no sense".into())
}

/// The state in an answer of `key=value` words.
pub(super) fn state(content: &str) -> Result<String, String> {
    let state = content.split(' ').find_map(|word| word.strip_prefix("power_state="));
    let is_plain = |state: &&str| !state.is_empty() && state.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let state = state.filter(is_plain).ok_or("its answer has no state")?;
    Ok(state.to_owned())
}

/// What an answer says of a volume: lines of `key=value`.
pub(super) fn volume(content: &str) -> Result<VolumeInfo, String> {
    let value = |key: &str| {
        let mut pairs = content.lines().filter_map(|line| line.split_once('='));
        let found = pairs.find(|(name, _)| *name == key).map(|(_, value)| value);
        found.ok_or_else(|| format!("its answer has no `{key}`"))
    };
    let wrong = |key: &str| format!("its answer has a `{key}` that makes no sense");
    Ok(VolumeInfo {
        pool: value("pool")?.to_owned(),
        used_bytes: value("usage")?.parse().map_err(|_| wrong("usage"))?,
        is_kept: match value("save_on_stop")? {
            "True" => true,
            "False" => false,
            _ => return Err(wrong("save_on_stop")),
        },
        revisions: value("revisions_to_keep")?
            .parse()
            .map_err(|_| wrong("revisions_to_keep"))?,
        files: files_of(value("path")?, value("vid")?),
    })
}

/// Where the images of a volume lie whose running image is `path`: `POOL/VID-dirty.img`. Pools of other drivers have other paths.
fn files_of(path: &str, vid: &str) -> Option<VolumeFiles> {
    let pool_folder = path.strip_suffix("-dirty.img")?.strip_suffix(vid)?.strip_suffix('/')?;
    let is_plain = |path: &Path| {
        path.components()
            .all(|part| matches!(part, Component::Normal(_) | Component::RootDir))
    };
    let (path, pool_folder, vid) = (Path::new(path), Path::new(pool_folder), Path::new(vid));
    let is_below = vid.is_relative() && vid.components().count() > 1;
    if !path.is_absolute() || !is_plain(path) || !is_plain(vid) || !is_below || !pool_folder.is_absolute() {
        return None;
    }
    let mut image = pool_folder.join(vid).into_os_string();
    image.push(".img");
    Some(VolumeFiles {
        pool_folder: pool_folder.to_owned(),
        image: image.into(),
        dirty: path.to_owned(),
    })
}

/// The file of an answer: the size that was asked for, a space, and a path.
pub(super) fn import_path(content: &str, size: u64) -> Result<PathBuf, String> {
    let (bytes, path) = content.split_once(' ').ok_or("its answer has no path")?;
    if bytes.parse() != Ok(size) {
        return Err("it takes another size than it was asked for".into());
    }
    if !path.starts_with('/') {
        return Err("its answer has no path".into());
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn answers_are_taken_apart() {
        assert_eq!(content(b"0\0"), Ok(""));
        assert_eq!(content(b"0\0abc"), Ok("abc"));
        assert_eq!(
            content(b"2\0QubesVMNotHaltedError\0\0Domain is not powered off: 'work'\0"),
            Err("QubesVMNotHaltedError: Domain is not powered off: 'work'".into())
        );
        assert_eq!(
            content(b"2\0A\0trace\0no %s\0b\0").unwrap_err(),
            "A: no %s, b",
            "values follow the message"
        );
        assert_eq!(content(b"2\0A\0\0x\x1b[31m\n\0").unwrap_err(), "A: x\\u{1b}[31m\\n");
        for wrong in [&b""[..], b"0", b"1\0", b"3\0", b"00", b"0\0\xff"] {
            assert!(content(wrong).is_err(), "{wrong:?}");
        }
        assert!(content(&[&b"2\0"[..], &[b'a'; 5000]].concat()).unwrap_err().len() < 400);
        let list = "dom0 class=AdminVM state=Running uuid=0\nwork class=AppVM state=Halted\n";
        let names: Vec<String> = machines(list)
            .unwrap()
            .into_iter()
            .map(|one| one.name + &one.state)
            .collect();
        assert_eq!(names, ["dom0Running", "workHalted"]);
        assert!(machines("work class=AppVM\n").is_err());
        assert_eq!(state("mem=0 cputime=0 power_state=Halted").unwrap(), "Halted");
        assert!(state("mem=0").is_err());
        assert!(state("power_state=\x1b").is_err());
        assert_eq!(import_path("17 /a/b", 17), Ok("/a/b".into()));
        for wrong in ["17", "18 /a", "17 a", "", "-1 /a"] {
            assert!(import_path(wrong, 17).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_volume_has_files_where_its_driver_keeps_them_in_a_folder() {
        let info = |vid: &str, path: &str| {
            volume(&format!(
                "pool=varlibqubes\nvid={vid}\nsize=10\nusage=0\nrw=True\nsource=\npath={path}\nsave_on_stop=True\n\
                 snap_on_start=False\nrevisions_to_keep=2\nephemeral=False\nis_outdated=False\n"
            ))
        };
        let found = info("appvms/work/private", "/var/lib/qubes/appvms/work/private-dirty.img").unwrap();
        let files = found.files.unwrap();
        assert_eq!((found.used_bytes, found.revisions, found.is_kept), (0, 2, true));
        assert_eq!(files.pool_folder, Path::new("/var/lib/qubes"));
        assert_eq!(files.image, Path::new("/var/lib/qubes/appvms/work/private.img"));
        assert_eq!(files.folder(), Path::new("/var/lib/qubes/appvms/work"));
        for (vid, path) in [
            ("qubes_dom0/vm-work-private", "/dev/qubes_dom0/vm-work-private"),
            ("appvms/work/private", "/var/lib/qubes/appvms/other/private-dirty.img"),
            ("../x/private", "/var/lib/qubes/../x/private-dirty.img"),
            ("private", "/private-dirty.img"),
            ("a/private", "/a/private-dirty.img"),
            ("", "/a/-dirty.img"),
        ] {
            assert_eq!(info(vid, path).unwrap().files, None, "{path}");
        }
        assert!(volume("pool=a\n").is_err());
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_fail(bytes: Vec<u8>, text: String) {
            let _ = content(&bytes);
            let _ = exception_text(&bytes);
            let _ = machines(&text);
            let _ = state(&text);
            let _ = volume(&text);
            let _ = import_path(&text, 0);
            let _ = files_of(&text, &text);
        }
    }
}
