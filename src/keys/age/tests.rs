//! Test vectors of the project that specifies `age` (<https://c2sp.org/CCTV/age>, 0BSD), and what they do not have.

use std::io::Read as _;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::*;
use crate::keys::{GivenKeys, KeyAccess};
use crate::monitor::Silent;

/// A vector: what is to come of it, and the file.
#[derive(Debug, Default)]
struct Vector {
    expect: String,
    payload: Option<String>,
    identities: Vec<Identity>,
    passphrases: Vec<Passphrase>,
    is_armored: bool,
    is_compressed: bool,
    file: Vec<u8>,
}

fn read(path: &Path) -> Vector {
    let bytes = std::fs::read(path).unwrap();
    let mut rest = &bytes[..];
    let mut vector = Vector::default();
    loop {
        let end = rest.iter().position(|byte| *byte == b'\n').unwrap();
        let line = std::str::from_utf8(&rest[..end]).unwrap();
        rest = &rest[end + 1..];
        let Some((key, value)) = line.split_once(": ") else {
            break;
        };
        match key {
            "expect" => vector.expect = value.into(),
            "payload" => vector.payload = Some(value.into()),
            "identity" => vector.identities.extend(Identity::parse_all(value).unwrap()),
            "passphrase" => vector.passphrases.push(Passphrase::new(value.into())),
            "armored" => vector.is_armored = value == "yes",
            "compressed" => vector.is_compressed = value == "zlib",
            "file key" | "comment" => {}
            other => panic!("{other}"),
        }
    }
    if vector.is_compressed {
        let mut decoder = flate2::read::ZlibDecoder::new(rest);
        decoder.read_to_end(&mut vector.file).unwrap();
    } else {
        vector.file = rest.to_vec();
    }
    vector
}

/// Opens a file by what the vector has: first by identities.
fn open(vector: &Vector) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let (access, monitor) = (KeyAccess::default(), Silent::default());
    let with = access.interaction(&monitor);
    let decoded = if vector.is_armored {
        armor::decode(&vector.file)?.to_vec()
    } else {
        vector.file.clone()
    };
    let mut failure = kind_of(&decoded).err().unwrap_or(Failure::OtherKey);
    for identity in &vector.identities {
        let files = [decoded.clone()];
        if let Some(plain) = open_one_of(&files, identity, &with, |problem| failure = problem)? {
            return Ok(plain);
        }
    }
    for passphrase in &vector.passphrases {
        match open_with(&decoded, passphrase, WorkFactor::DEFAULT) {
            Err(problem) => failure = problem,
            plain => return plain,
        }
    }
    Err(failure)
}

#[test]
fn the_vectors_of_age_end_as_they_should() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/age-v1");
    let (mut count, mut wrong) = (0, Vec::new());
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let vector = read(&path);
        count += 1;
        let opened = open(&vector);
        let is_right = match (&vector.expect[..], &opened) {
            ("success", Ok(plain)) => {
                let hash = Sha256::digest(plain)
                    .iter()
                    .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
                Some(hash) == vector.payload
            }
            // Files of other types or of too much work are for nobody here.
            ("no match", Err(Failure::OtherKey))
            | ("header failure", Err(Failure::Malformed(_) | Failure::TooMuchWork { .. }))
            | ("armor failure", Err(Failure::Malformed(_)))
            | ("HMAC failure" | "payload failure", Err(Failure::Damaged(_))) => true,
            _ => false,
        };
        if !is_right {
            wrong.push(format!("{}: {}, not {opened:?}", path.display(), vector.expect));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(count > 90, "only {count} vectors");
}

#[test]
fn what_is_sealed_comes_back_by_its_key_only() {
    let (access, monitor) = (KeyAccess::default(), Silent::default());
    let with = access.interaction(&monitor);
    let (secret, recipient) = generate().unwrap();
    assert_eq!(Recipient::parse(&recipient.to_string()), Ok(recipient.clone()));
    let [identity] = &Identity::parse_all(&secret).unwrap()[..] else {
        panic!("not one identity");
    };
    let other = Identity::parse_all(&generate().unwrap().0).unwrap();
    let passphrase = Passphrase::new(b"pass".to_vec());
    let work = WorkFactor::new(4);
    for length in [0, 1, 32, 65_535, 65_536] {
        let plain = vec![7; length];
        let files = [seal_to(&plain, &recipient, &with).unwrap()];
        let open = |identity: &Identity| open_one_of(&files, identity, &with, |failure| panic!("{failure}"));
        assert_eq!(open(identity).unwrap().unwrap()[..], plain[..]);
        assert_eq!(open(&other[0]).unwrap(), None);
        let file = seal_with(&plain, &passphrase, work).unwrap();
        assert_eq!(open_with(&file, &passphrase, work).unwrap()[..], plain[..]);
        for wrong in ["", "Pass", "pass ", "pass\n"] {
            let wrong = Passphrase::new(wrong.into());
            assert_eq!(open_with(&file, &wrong, work), Err(Failure::OtherKey));
        }
        assert!(matches!(
            open_with(&file, &passphrase, WorkFactor::new(3)),
            Err(Failure::TooMuchWork { asked: 4, allowed: 3 })
        ));
    }
    assert!(seal_to(&vec![7; 65_537], &recipient, &with).is_err());
}

#[test]
fn no_work_factor_is_above_the_most() {
    assert_eq!(WorkFactor::new(200), WorkFactor::MAX);
    let (access, monitor) = (GivenKeys::default(), Silent::default());
    assert_eq!((access.work_factor_max, monitor.stop()), (WorkFactor::DEFAULT, ()));
    for logarithm in ["21", "30", "63", "64", "255"] {
        let file = format!(
            "age-encryption.org/v1\n-> scrypt {} {logarithm}\n{}\n--- {}\n",
            base64::encode(&[1; 16]),
            base64::encode(&[2; 32]),
            base64::encode(&[3; 32])
        );
        let opened = open_with(file.as_bytes(), &Passphrase::new(b"pass".to_vec()), WorkFactor::MAX);
        assert!(
            matches!(opened, Err(Failure::TooMuchWork { .. })),
            "{logarithm}: {opened:?}"
        );
    }
}

#[test]
fn secrets_are_read_as_people_type_them() {
    let (secret, recipient) = generate().unwrap();
    let known = |text: &str| {
        let identities = Identity::parse_all(text);
        identities.map(|all| {
            all.iter()
                .map(|one| format!("{:?}", recipient_of(one)))
                .collect::<Vec<_>>()
        })
    };
    let right = Ok(vec![format!("{:?}", Some(recipient.clone()))]);
    let data = &secret["AGE-SECRET-KEY-1".len()..];
    let groups: Vec<&str> = (0..data.len())
        .step_by(4)
        .map(|at| &data[at..data.len().min(at + 4)])
        .collect();
    let looks_alike: String = data
        .chars()
        .map(|c| match c {
            '0' => 'O',
            'L' => '1',
            '8' => 'B',
            other => other,
        })
        .collect();
    for typed in [
        secret.to_string(),
        format!("# created: today\n# public key: {recipient}\n{}\n", *secret),
        format!("\r\n  {}  \r\n", secret.to_lowercase()),
        format!(
            "age-secret-key-1\n   {}\n{}",
            groups[..7].join(" "),
            groups[7..].join("\t")
        ),
        format!("AGE SECRET KEY 1 {}", groups.join("-")),
        format!("AGE-SECRET-KEY-1{looks_alike}"),
        format!("AGE-SECRET-KEY-1{}", looks_alike.replace('1', "i")),
    ] {
        assert_eq!(known(&typed), right, "{typed}");
    }
    assert_eq!(known(&secret.repeat(3)).unwrap().len(), 3);
    let (short, mut wrong) = (&secret[..secret.len() - 1], secret.to_string().into_bytes());
    let last = wrong.len() - 1;
    wrong[last] = if wrong[last] == b'Q' { b'P' } else { b'Q' };
    let wrong = String::from_utf8(wrong).unwrap();
    for bad in [
        "",
        "# nothing\n",
        "pass",
        short,
        &wrong,
        &format!("{}\nmore", *secret),
        &recipient.to_string(),
    ] {
        assert!(known(bad).is_err(), "{bad}");
    }
    // No error shows a secret.
    let wrongs = [known(short).unwrap_err(), known(&wrong).unwrap_err()];
    assert!(wrongs.iter().all(|error| !error.contains(&secret[20..30])));
}

fn recipient_of(identity: &Identity) -> Option<Recipient> {
    let Identity::X25519(secret) = identity else {
        return None;
    };
    let public = x25519_dalek::PublicKey::from(&x25519_dalek::StaticSecret::from(*secret.bytes()));
    Some(Recipient::X25519(public.to_bytes()))
}

#[test]
fn recipients_are_checked() {
    let (secret, recipient) = generate().unwrap();
    let text = recipient.to_string();
    assert_eq!(Recipient::parse(&format!(" {text}\n")), Ok(recipient.clone()));
    assert_eq!(Recipient::parse(&text.to_uppercase()), Ok(recipient));
    let plugin = bech32::encode("age1yubikey", &[7; 33]);
    assert!(matches!(Recipient::parse(&plugin), Ok(Recipient::Plugin { name, .. }) if name == "yubikey"));
    let long = bech32::encode("age", &[7; 31]);
    let slash = bech32::encode("age1../sh", &[7; 31]);
    let nameless = bech32::encode("age1", &[7; 31]);
    for bad in [
        "",
        "age1",
        &text[..20],
        &long,
        &slash,
        &nameless,
        &secret,
        "ssh-ed25519 AAAA",
        "-----",
    ] {
        assert!(Recipient::parse(bad).is_err(), "{bad}");
    }
}

#[test]
fn headers_of_any_bytes_are_refused_without_a_panic() {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    let piece = prop_oneof![
        Just("age-encryption.org/v1\n".to_owned()),
        Just("-> scrypt ".to_owned()),
        Just("-> X25519 ".to_owned()),
        Just("---".to_owned()),
        Just("\n".to_owned()),
        Just(base64::encode(&[1; 32])),
        Just(base64::encode(&[1; 16])),
        "[ -~]{0,70}",
        any::<String>(),
    ];
    let pieces = proptest::collection::vec(piece, 0..12);
    let mut runner = TestRunner::default();
    let run = runner.run(&pieces, |pieces| {
        let text = pieces.concat();
        for file in [text.clone(), format!("age-encryption.org/v1\n{text}")] {
            let _ = kind_of(file.as_bytes());
            let _ = Identity::parse_all(&file);
            let _ = Recipient::parse(&file);
            let _ = armor::decode(file.as_bytes());
        }
        Ok(())
    });
    run.unwrap();
}
