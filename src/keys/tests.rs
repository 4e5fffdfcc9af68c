//! Keyrings that are made, opened, changed, damaged and forged, over a place in memory.

use std::cell::RefCell;
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::manage::{KeyChange, NewKeys};
use super::*;
use crate::error::{Error, ErrorKind, describe};
use crate::monitor::Silent;

const NOW: u64 = 1_790_000_000;

/// A place in memory.
struct Memory {
    bytes: RefCell<Vec<u8>>,
    fails: bool,
}

impl KeyringPlace for Memory {
    fn path(&self) -> &Path {
        Path::new("vms.vmfold")
    }
    fn read(&self) -> Result<Vec<u8>> {
        Ok(self.bytes.borrow().clone())
    }
    fn replace(&mut self, _: &Keyring, bytes: &[u8]) -> Result<()> {
        if self.fails {
            return Err(Error::Interrupted);
        }
        *self.bytes.borrow_mut() = bytes.to_vec();
        Ok(())
    }
}

/// What is given, with passphrases that cost little.
fn given() -> GivenKeys {
    GivenKeys {
        work_factor: WorkFactor::new(4),
        ..GivenKeys::default()
    }
}

/// A folder with files that hold keys.
struct Files(tempfile::TempDir);

impl Files {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    fn passphrase(&self, passphrase: &str) -> KeyAccess {
        KeyAccess::new(GivenKeys {
            passphrase_file: Some(self.file("passphrase", passphrase.as_bytes())),
            ..given()
        })
    }

    /// An identity in a file, and its recipient.
    fn identity(&self, name: &str) -> (KeyAccess, String) {
        let (secret, recipient) = age::generate().unwrap();
        let access = self.identity_of(name, &secret);
        (access, recipient.to_string())
    }

    fn identity_of(&self, name: &str, text: &str) -> KeyAccess {
        KeyAccess::new(GivenKeys {
            identities: vec![self.file(name, text.as_bytes())],
            ..given()
        })
    }
}

fn to(recipients: &[&str]) -> NewKeys {
    NewKeys {
        recipients: recipients.iter().map(|one| (*one).to_owned()).collect(),
        ..NewKeys::default()
    }
}

fn create(new: &NewKeys, access: &KeyAccess) -> (Memory, Keyring) {
    let monitor = Silent::default();
    let (sealed, unlocked) = manage::create(Path::new("vms.vmfold"), new, access, NOW, &monitor).unwrap();
    let place = Memory {
        bytes: RefCell::new(sealed.encode()),
        fails: false,
    };
    (place, unlocked.keyring)
}

fn unlock(place: &Memory, access: &KeyAccess) -> Result<Keyring> {
    let sealed = SealedKeyring::decode(place.path(), &place.read()?)?;
    assert_eq!(sealed.encode(), place.read()?);
    sealed
        .unlock(access, &Silent::default())
        .map(|unlocked| unlocked.keyring)
}

fn error_of(place: &Memory, access: &KeyAccess) -> String {
    describe(&unlock(place, access).unwrap_err())
}

#[test]
fn each_key_opens_the_keyring_and_no_other_does() {
    let files = Files::new();
    let (alice, recipient) = files.identity("alice");
    let (eve, _) = files.identity("eve");
    let (place, keyring) = create(&to(&[&recipient]), &files.passphrase("open sesame\n"));
    assert_eq!((keyring.number, keyring.pairs.len(), keyring.slots.len()), (1, 1, 2));
    assert_eq!(unlock(&place, &alice).unwrap(), keyring);
    for same in ["open sesame", "open sesame\n", "open sesame\nmore\n"] {
        assert_eq!(unlock(&place, &files.passphrase(same)).unwrap(), keyring);
    }
    let wrong =
        "the key is wrong: `vms.vmfold` opens by a passphrase, or an identity of age, and by none of what was given";
    assert_eq!(error_of(&place, &eve), wrong);
    for other in ["open sesam", "open sesame ", "Open sesame\n", "open sesame\r\n"] {
        assert_eq!(error_of(&place, &files.passphrase(other)), wrong, "{other:?}");
    }
    let none = unlock(&place, &KeyAccess::new(given())).unwrap_err();
    assert_eq!(
        (none.kind(), describe(&none)),
        (
            ErrorKind::Usage,
            "`vms.vmfold` is encrypted, and no key was given: it opens by a passphrase, or an identity of age".into()
        )
    );
    let both = KeyAccess::new(GivenKeys {
        passphrase_file: Some(files.file("right", b"open sesame")),
        ..eve.given().clone()
    });
    assert_eq!(unlock(&place, &both).unwrap(), keyring);
}

#[test]
fn a_user_is_asked_only_if_nothing_was_given() {
    #[expect(clippy::unnecessary_wraps, reason = "a prompt may fail")]
    fn typed(_: &dyn crate::monitor::Monitor, question: &str) -> Result<Option<Passphrase>> {
        assert!(
            [
                "New passphrase: ",
                "The same once more: ",
                "Passphrase of `vms.vmfold`: "
            ]
            .contains(&question)
        );
        Ok(Some(Passphrase::new(b"typed".to_vec())))
    }
    #[expect(clippy::unnecessary_wraps, reason = "a prompt may fail")]
    fn differs(_: &dyn crate::monitor::Monitor, question: &str) -> Result<Option<Passphrase>> {
        Ok(Some(Passphrase::new(question.into())))
    }
    let files = Files::new();
    let asking = |prompt: Prompt| KeyAccess::new(GivenKeys { prompt, ..given() });
    let (place, keyring) = create(&NewKeys::default(), &asking(typed));
    assert_eq!(unlock(&place, &asking(typed)).unwrap(), keyring);
    assert!(matches!(unlock(&place, &asking(differs)), Err(Error::WrongKey { .. })));
    let monitor = Silent::default();
    let made = manage::create(Path::new("a"), &NewKeys::default(), &asking(differs), NOW, &monitor);
    assert_eq!(
        describe(&made.unwrap_err()),
        "what was typed first is not what was typed then"
    );
    let nobody = manage::create(
        Path::new("a"),
        &NewKeys::default(),
        &KeyAccess::new(given()),
        NOW,
        &monitor,
    );
    assert!(matches!(nobody, Err(Error::Usage(_))));
    // An identity was given, and a keyring without passphrases has nothing to ask for.
    let (mut wrong, recipient) = files.identity("other");
    wrong = KeyAccess::new(GivenKeys {
        prompt: |_, _| panic!("the user was asked"),
        ..wrong.given().clone()
    });
    assert!(matches!(unlock(&place, &wrong), Err(Error::WrongKey { .. })));
    let (place, _) = create(&to(&[&recipient]), &KeyAccess::new(given()));
    assert!(matches!(
        unlock(&place, &asking(|_, _| panic!("asked"))),
        Err(Error::NoKey { .. })
    ));
}

#[test]
fn keys_come_and_go() {
    let (files, monitor) = (Files::new(), Silent::default());
    let (alice, for_alice) = files.identity("alice");
    let (bob, for_bob) = files.identity("bob");
    let owner = files.passphrase("owner");
    let (mut place, first) = create(&NewKeys::default(), &owner);
    // Nobody's passphrase but that of who adds is needed, and the secrets stay.
    let new = NewKeys {
        label: Some("Alice's laptop".into()),
        ..to(&[&for_alice])
    };
    manage::add(&mut place, &new, &owner, NOW, &monitor).unwrap();
    manage::add(&mut place, &to(&[&for_bob]), &alice, NOW, &monitor).unwrap();
    let spare = NewKeys {
        passphrase_file: Some(files.file("spare", b"spare\n")),
        label: Some("spare".into()),
        ..NewKeys::default()
    };
    let added = manage::add(&mut place, &spare, &bob, NOW, &monitor).unwrap();
    assert_eq!(
        added.to_string(),
        "Added key 4: a passphrase, `spare`, added on 2026-09-21\nThere are 4 keys now.\n"
    );
    let second = unlock(&place, &files.passphrase("spare")).unwrap();
    assert_eq!(
        (second.number, &second.pairs, &second.id_key),
        (4, &first.pairs, &first.id_key)
    );
    let twice = manage::add(&mut place, &to(&[&for_bob]), &alice, NOW, &monitor);
    assert!(matches!(twice, Err(Error::Usage(_))));
    // Bob leaves, and what he kept is of no use for what comes.
    let removed = manage::remove(&mut place, &for_bob, &alice, &monitor).unwrap();
    assert_eq!((removed.keys, removed.removed[0].number), (3, 3));
    assert!(
        removed
            .to_string()
            .contains("Whoever had it can still read what is in the archive now")
    );
    assert!(matches!(unlock(&place, &bob), Err(Error::WrongKey { .. })));
    let owner = files.passphrase("owner");
    let rotated = manage::rotate(&mut place, &owner, &monitor).unwrap();
    let labels: Vec<_> = rotated.removed.iter().map(|key| key.label.clone().unwrap()).collect();
    assert_eq!((rotated.keys, labels), (2, vec!["spare".to_owned()]));
    assert!(
        rotated
            .to_string()
            .contains("A passphrase that was not given could not be kept")
    );
    let third = unlock(&place, &alice).unwrap();
    assert_eq!(unlock(&place, &files.passphrase("owner")).unwrap(), third);
    assert_eq!((third.pairs.len(), &third.pairs[1..]), (2, &first.pairs[..]));
    assert_ne!(third.pairs[0], first.pairs[0]);
    for gone in [bob, files.passphrase("spare")] {
        assert!(matches!(unlock(&place, &gone), Err(Error::WrongKey { .. })));
    }
    // The last key cannot be removed, nor lost by a rotation.
    manage::remove(&mut place, "1", &alice, &monitor).unwrap();
    let last = manage::remove(&mut place, "Alice's laptop", &alice, &monitor);
    assert!(describe(&last.unwrap_err()).starts_with("this is the only key"));
    assert_eq!(unlock(&place, &alice).unwrap().slots.len(), 1);
}

#[test]
fn a_rotation_that_would_leave_no_key_changes_nothing() {
    let (files, monitor) = (Files::new(), Silent::default());
    let (place, keyring) = create(&NewKeys::default(), &files.passphrase("owner"));
    let mut sealed = SealedKeyring::decode(place.path(), &place.read().unwrap()).unwrap();
    let before = sealed.clone();
    let mut unlocked = sealed.unlock(&files.passphrase("owner"), &monitor).unwrap();
    let rotated = sealed.rotate(
        &mut unlocked,
        Pair::random().unwrap(),
        &KeyAccess::new(given()),
        &monitor,
    );
    assert!(matches!(rotated, Err(Error::Usage(_))));
    assert_eq!((sealed, unlocked.keyring), (before, keyring));
}

#[test]
fn keys_are_listed_with_their_names_for_who_has_one() {
    let (files, monitor) = (Files::new(), Silent::default());
    let (alice, recipient) = files.identity("alice");
    let (place, _) = create(&to(&[&recipient]), &files.passphrase("owner"));
    let nobody = manage::list(&place, &KeyAccess::new(given()), &monitor).unwrap();
    assert_eq!(
        nobody.to_string(),
        "1: a passphrase\n2: an identity of age\nGive one of these keys to see what they are called\n"
    );
    let known = manage::list(&place, &alice, &monitor).unwrap().to_string();
    let label = &recipient[..16];
    assert_eq!(
        known,
        format!(
            "1: a passphrase, `passphrase`, added on 2026-09-21\n\
             2: an identity of age, `{label}`, added on 2026-09-21, {recipient}\n"
        )
    );
}

#[test]
fn a_sheet_opens_the_archive_as_a_file_and_as_it_is_typed() {
    let (files, monitor) = (Files::new(), Silent::default());
    let owner = files.passphrase("owner");
    let (mut place, _) = create(&NewKeys::default(), &owner);
    let path = files.0.path().join("sheet");
    let to = SheetPlace::File(path.clone());
    let changed = manage::sheet(&mut place, &to, "lane 0123", &owner, NOW, &monitor).unwrap();
    assert_eq!(
        (changed.keys, changed.added[0].label.as_deref()),
        (2, Some(SHEET_LABEL))
    );
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(
        std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&path).unwrap()) & 0o777,
        0o600
    );
    assert!(
        text.contains("# Archive:    vms.vmfold (lane 0123)\n# Made on:    2026-09-21\n"),
        "{text}"
    );
    assert!(unlock(&place, &files.identity_of("as it is", &text)).is_ok());
    let typed: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .collect::<Vec<_>>()
        .join("\n");
    assert!(typed.lines().count() == 4, "{typed}");
    assert!(unlock(&place, &files.identity_of("typed", &typed.to_lowercase())).is_ok());
    // A file that exists is not written to, and no key is added then.
    let again = manage::sheet(&mut place, &to, "lane 0123", &files.passphrase("owner"), NOW, &monitor);
    assert!(matches!(again, Err(Error::Usage(_))));
    assert_eq!(unlock(&place, &files.passphrase("owner")).unwrap().slots.len(), 2);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
}

#[test]
fn a_place_that_fails_keeps_its_keyring() {
    let (files, monitor) = (Files::new(), Silent::default());
    let (_, recipient) = files.identity("alice");
    let (mut place, _) = create(&NewKeys::default(), &files.passphrase("owner"));
    place.fails = true;
    let before = place.read().unwrap();
    let owner = || files.passphrase("owner");
    assert!(manage::add(&mut place, &to(&[&recipient]), &owner(), NOW, &monitor).is_err());
    let path = files.0.path().join("sheet");
    assert!(manage::sheet(&mut place, &SheetPlace::File(path.clone()), "", &owner(), NOW, &monitor).is_err());
    assert_eq!(place.read().unwrap(), before);
    assert!(!path.exists(), "a sheet without a key is left");
}

#[test]
fn damage_is_told_from_a_wrong_key() {
    let files = Files::new();
    let (alice, recipient) = files.identity("alice");
    let (place, _) = create(&to(&[&recipient]), &files.passphrase("owner"));
    let bytes = place.read().unwrap();
    let decode = |bytes: &[u8]| SealedKeyring::decode(place.path(), bytes);
    for end in 0..bytes.len() {
        assert!(
            matches!(decode(&bytes[..end]), Err(Error::DamagedKeyring { .. })),
            "{end}"
        );
    }
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(matches!(decode(&flipped), Err(Error::DamagedKeyring { .. })), "{bit}");
    }
    assert!(decode(&[&bytes[..], b"\0"].concat()).is_err());
    assert!(matches!(
        decode(&vec![0; SEALED_BYTES_MAX + 1]),
        Err(Error::DamagedKeyring { .. })
    ));
    // Whoever changes it can make the hash fit. No change is taken for the keyring.
    for bit in 0..(bytes.len() - 16) * 8 {
        let mut content = bytes[..bytes.len() - 16].to_vec();
        content[bit / 8] ^= 1 << (bit % 8);
        let forged = with_check(&content);
        match decode(&forged).and_then(|sealed| sealed.unlock(&alice, &Silent::default())) {
            Err(Error::DamagedKeyring { .. } | Error::WrongKey { .. } | Error::Unsupported { .. }) => {}
            other => panic!("{bit}: {other:?}"),
        }
    }
}

fn with_check(content: &[u8]) -> Vec<u8> {
    let check = blake3::hash(content);
    [content, &check.as_bytes()[..16]].concat()
}

/// A sealed keyring with these slots, whose hash fits.
fn forged(slots: &[&[u8]]) -> Vec<u8> {
    let mut content = vec![1, u8::try_from(slots.len()).unwrap()];
    for slot in slots {
        content.extend(u16::try_from(slot.len()).unwrap().to_le_bytes());
        content.extend_from_slice(slot);
    }
    content.extend([0; 16 + 200]);
    with_check(&content)
}

#[test]
fn slots_that_cannot_be_parsed_are_found_without_a_key() {
    let files = Files::new();
    let (_, recipient) = files.identity("alice");
    let (place, _) = create(&to(&[&recipient]), &files.passphrase("owner"));
    let sealed = SealedKeyring::decode(place.path(), &place.read().unwrap()).unwrap();
    sealed.check_slots().unwrap();
    let bad = SealedKeyring::decode(Path::new("a"), &forged(&[b"no file of age"])).unwrap();
    assert!(matches!(bad.check_slots(), Err(Error::DamagedKeyring { .. })));
}

#[test]
fn a_hostile_keyring_costs_little() {
    let files = Files::new();
    let slow = |work: u8| {
        let salt = "AAAAAAAAAAAAAAAAAAAAAA";
        let body = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        format!("age-encryption.org/v1\n-> scrypt {salt} {work}\n{body}\n--- {body}\n").into_bytes()
    };
    let decode = |bytes: &[u8]| SealedKeyring::decode(Path::new("a"), bytes);
    let begun = Instant::now();
    for work in [19, 20, 21, 40, 63, 255] {
        let slot = slow(work);
        let sealed = decode(&forged(&[&slot[..]; 8])).unwrap();
        let access = files.passphrase("pass");
        let error = sealed.unlock(&access, &Silent::default()).unwrap_err();
        assert!(
            describe(&error).ends_with(&format!(
                "(its passphrase asks for a work factor of 2^{work}, and 2^18 is allowed)"
            )),
            "{error:?}"
        );
    }
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert!(
        decode(&forged(&[&slow(1)[..]; 9])).is_err(),
        "too many passphrases to try"
    );
    assert!(decode(&forged(&[])).is_err());
    assert!(decode(&forged(&[&b"x"[..]; 65])).is_err());
    assert!(decode(&forged(&[&[b'x'; 8193]])).is_err());
    // Slots of many stanzas, and of nothing at all.
    let mut many = b"age-encryption.org/v1\n".to_vec();
    while many.len() < 8000 {
        many.extend_from_slice(b"-> a\n\n");
    }
    many.extend_from_slice(b"--- AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\n");
    let (alice, _) = files.identity("alice");
    let sealed = decode(&forged(&[&many, b"", b"age-encryption.org/v1\n"])).unwrap();
    let error = sealed.unlock(&alice, &Silent::default()).unwrap_err();
    assert!(matches!(error, Error::DamagedKeyring { .. }), "{error:?}");
    for end in 0..many.len().min(200) {
        let _ = decode(&forged(&[&many[..end]]))
            .unwrap()
            .unlock(&alice, &Silent::default());
    }
}

#[test]
fn the_limits_of_a_keyring_are_kept_by_who_makes_it() {
    let (files, monitor) = (Files::new(), Silent::default());
    let owner = files.passphrase("owner");
    let (mut place, _) = create(&NewKeys::default(), &owner);
    let mut refused = None;
    for number in 0..100 {
        let (_, recipient) = files.identity("one");
        let before = place.read().unwrap();
        match manage::add(&mut place, &to(&[&recipient]), &owner, NOW, &monitor) {
            Ok(change) => assert_eq!(change.keys, number + 2),
            Err(error) => {
                refused = Some((number, describe(&error)));
                assert_eq!(place.read().unwrap(), before);
                break;
            }
        }
    }
    let (number, error) = refused.unwrap();
    assert_eq!(number, 63, "{error}");
    assert!(error.starts_with("the keyring would hold more than it can"), "{error}");
    let (mut place, _) = create(&NewKeys::default(), &owner);
    let long = NewKeys {
        label: Some("a".repeat(129)),
        passphrase_file: Some(files.file("new", b"new")),
        ..NewKeys::default()
    };
    assert!(manage::add(&mut place, &long, &owner, NOW, &monitor).is_err());
    let of = |number: usize| NewKeys {
        passphrase_file: Some(files.file("new", format!("new {number}").as_bytes())),
        ..NewKeys::default()
    };
    let added = (0..10).take_while(|number| manage::add(&mut place, &of(*number), &owner, NOW, &monitor).is_ok());
    assert_eq!(added.count(), 7, "eight passphrases are the most");
    let mut count = 0;
    while manage::rotate(&mut place, &owner, &monitor).is_ok() {
        count += 1;
    }
    assert_eq!(count, 63, "each rotation adds a pair");
}

#[test]
fn a_passphrase_comes_from_a_descriptor() {
    let place = create(&NewKeys::default(), &Files::new().passphrase("from a pipe")).0;
    let access = |number: i32| {
        KeyAccess::new(GivenKeys {
            passphrase_fd: Some(number),
            ..given()
        })
    };
    for text in ["from a pipe", "from a pipe\n", "from a pipe\nmore"] {
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(text.as_bytes()).unwrap();
        drop(writer);
        assert!(unlock(&place, &access(reader.as_raw_fd())).is_ok(), "{text}");
    }
    let zeros = std::fs::File::open("/dev/zero").unwrap();
    let full = std::io::pipe().unwrap();
    let mut writer = full.1.try_clone().unwrap();
    writer.write_all(&[b'a'; 8192]).unwrap();
    for endless in [zeros.as_raw_fd(), full.0.as_raw_fd()] {
        assert!(matches!(unlock(&place, &access(endless)), Err(Error::Usage(_))));
    }
    assert!(matches!(unlock(&place, &access(9_999)), Err(Error::Io { .. })));
    // A descriptor that says nothing is waited for until the user has enough.
    let silent = std::io::pipe().unwrap();
    let monitor = Silent::default();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            monitor.stop();
        });
        let waited = access(silent.0.as_raw_fd()).passphrase("", &monitor).map(|_| ());
        assert!(matches!(waited, Err(Error::Interrupted)));
    });
}

#[test]
fn a_passphrase_comes_from_a_command_that_is_run_once() {
    let files = Files::new();
    let (place, keyring) = create(&NewKeys::default(), &files.passphrase("from a command"));
    let access = |command: &str| {
        KeyAccess::new(GivenKeys {
            passphrase_command: Some(command.to_owned()),
            ..given()
        })
    };
    let runs = files.0.path().join("runs");
    let counted = access(&format!("echo >> {}; echo from a command; echo more", runs.display()));
    for _ in 0..3 {
        assert_eq!(unlock(&place, &counted).unwrap(), keyring);
    }
    assert_eq!(std::fs::read(&runs).unwrap(), b"\n");
    let begun = Instant::now();
    for (command, problem) in [
        ("echo from a command; exit 3", "it failed: exit status: 3"),
        ("echo from a command; kill -9 $$", "it failed: signal: 9 (SIGKILL)"),
        ("yes", "it printed more than 4096 bytes"),
        ("head -c 5000 /dev/zero; sleep 60", "it printed more than 4096 bytes"),
        ("true", "it printed no passphrase: its first line is it"),
        (
            "echo; echo from a command",
            "it printed no passphrase: its first line is it",
        ),
        ("/nonexistent/command 2>/dev/null", "it failed: exit status: 127"),
    ] {
        let error = unlock(&place, &access(command)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert_eq!(describe(&error), format!("no key came from `{command}`: {problem}"));
    }
    // Standard input is not the command's.
    assert!(unlock(&place, &access("cat; echo from a command")).is_ok());
    let monitor = Silent::default();
    monitor.stop();
    assert!(matches!(
        access("sleep 60").passphrase("", &monitor),
        Err(Error::Interrupted)
    ));
    assert!(begun.elapsed() < Duration::from_secs(20));
}

#[test]
fn an_identity_may_be_encrypted_itself() {
    let files = Files::new();
    let (secret, recipient) = age::generate().unwrap();
    let sealed = age::seal_with(
        secret.as_bytes(),
        &Passphrase::new(b"of the file".to_vec()),
        WorkFactor::new(4),
    );
    let file = files.file("identity.age", &sealed.unwrap());
    let (place, keyring) = create(&to(&[&recipient.to_string()]), &KeyAccess::new(given()));
    let access = |passphrase: &str| {
        KeyAccess::new(GivenKeys {
            identities: vec![file.clone()],
            ..files.passphrase(passphrase).given().clone()
        })
    };
    assert_eq!(unlock(&place, &access("of the file")).unwrap(), keyring);
    assert!(error_of(&place, &access("another")).ends_with("identity.age` cannot be opened: it is for another key"));
    let big = files.identity_of("big", &"#\n".repeat(40_000));
    assert!(matches!(unlock(&place, &big), Err(Error::Usage(_))));
    let missing = KeyAccess::new(GivenKeys {
        identities: vec!["/nonexistent".into()],
        ..given()
    });
    assert!(matches!(unlock(&place, &missing), Err(Error::Io { .. })));
}

/// A plugin of `age` in Python. Its key is the name of the identity or recipient: it wraps nothing but turns bits.
const PLUGIN: &str = r#"#!/usr/bin/env python3
import base64, sys
def b64(b): return base64.b64encode(b).decode().rstrip("=")
def say(head, body=b""):
    text = b64(body)
    lines = [text[i:i+64] for i in range(0, len(text), 64)]
    if len(text) % 64 == 0: lines.append("")
    sys.stdout.write("-> " + head + "\n" + "\n".join(lines) + "\n"); sys.stdout.flush()
def hear():
    head, text = sys.stdin.readline().rstrip("\n")[3:].split(" "), ""
    while True:
        line = sys.stdin.readline().rstrip("\n"); text += line
        if len(line) < 64: return head, base64.b64decode(text + "=" * (-len(text) % 4))
turn = lambda body: bytes(b ^ 0x55 for b in body)
said = []
while not said or said[-1][0] != ["done"]: said.append(hear())
def ask(head, body=b""):
    say(head, body); return hear()
if ask("grease 1 2", b"x" * 48)[0] != ["unsupported"]: sys.exit(1)
if ask("msg", b"touch it\x1b[31m")[0] != ["ok"]: sys.exit(1)
if ask("request-secret", b"PIN") != (["ok"], b"1234"): ask("error internal", b"wrong PIN")
elif sys.argv[1].endswith("recipient-v1"):
    key = [body for head, body in said if head == ["wrap-file-key"]][0]
    ask("recipient-stanza 0 test", turn(key))
else:
    for head, body in said:
        if head[0] == "recipient-stanza" and head[2] == "test": ask("file-key " + head[1], turn(body)); break
say("done")
"#;

#[test]
#[expect(clippy::print_stdout, reason = "a test that does not run says so")]
fn a_plugin_holds_a_key() {
    use std::os::unix::fs::PermissionsExt;
    #[expect(clippy::unnecessary_wraps, reason = "a prompt may fail")]
    fn pin(_: &dyn crate::monitor::Monitor, question: &str) -> Result<Option<Passphrase>> {
        assert_eq!(question, "age-plugin-test: PIN: ");
        Ok(Some(Passphrase::new(b"1234".to_vec())))
    }
    if std::process::Command::new("python3").arg("--version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "python3 is not installed");
        println!("NOT RUN: python3 is not installed");
        return;
    }
    let files = Files::new();
    let program = files.file("age-plugin-test", PLUGIN.as_bytes());
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o700)).unwrap();
    let (recipient, identity) = age::texts_of_plugin("test");
    let access = |prompt: Prompt, folders: Vec<PathBuf>| {
        KeyAccess::new(GivenKeys {
            identities: vec![files.file("identity", identity.as_bytes())],
            plugin_folders: folders,
            prompt,
            ..given()
        })
    };
    let (other, for_other) = files.identity("other");
    let with = access(pin, vec![files.0.path().to_owned()]);
    let (mut place, keyring) = create(&to(&[&for_other, &recipient]), &with);
    assert_eq!(keyring.slots[1].kind, SlotKind::Plugin);
    assert_eq!(unlock(&place, &with).unwrap(), keyring);
    assert_eq!(unlock(&place, &other).unwrap(), keyring);
    assert_eq!(manage::rotate(&mut place, &with, &Silent::default()).unwrap().keys, 2);
    assert!(unlock(&place, &with).is_ok());
    let wrong_pin = access(|_, _| Ok(None), vec![files.0.path().to_owned()]);
    assert_eq!(
        error_of(&place, &wrong_pin),
        "no key came from `age-plugin-test`: wrong PIN"
    );
    // What lies in the working folder is not run.
    for folders in [vec![], vec![PathBuf::from(".")], vec![PathBuf::new()]] {
        assert_eq!(
            error_of(&place, &access(pin, folders)),
            "no key came from `age-plugin-test`: it is not installed"
        );
    }
    for (script, problem) in [
        ("#!/bin/sh\nexit 1\n", "it ended too early"),
        ("#!/bin/sh\nyes aaaaaaa\n", "a stanza is malformed"),
        ("#!/bin/sh\ntr '\\0' a </dev/zero\n", "it says too much"),
        (
            "#!/bin/sh\nprintf -- '-> done\\n\\n'; exec cat >/dev/null\n",
            "it wrapped no key",
        ),
    ] {
        std::fs::write(&program, script).unwrap();
        let monitor = Silent::default();
        let made = manage::create(Path::new("a"), &to(&[&recipient]), &with, NOW, &monitor);
        let error = describe(&made.unwrap_err());
        assert!(error.contains(problem), "{script}: {error}");
    }
}

#[test]
fn a_change_says_what_it_means() {
    let rotated = KeyChange {
        rotated: true,
        keys: 1,
        ..KeyChange::default()
    };
    assert_eq!(
        rotated.to_string(),
        "What is exported from now on is protected by new keys. What was exported before stays as it is: whoever had a key until now can \
         still read that in any copy of the archive, and can still tell whether a block that he knows is in it.\n\
         There is one key now. If it is lost, everything in the archive is lost.\n"
    );
}
