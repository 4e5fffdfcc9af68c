//! Backups of Qubes OS that come through a pipe: parts are read ahead there, and nothing else may differ from a backup in a file.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use vmfold::error::{Error, ErrorKind, Result};
use vmfold::monitor::Silent;
use vmfold::store::{MemoryStore, Store};

use super::common::Random;
use super::qvm4::{qubes_backup, qubes_expected};
use super::{qvm, read, read_store};

/// A store that is read in order, and whose length nobody knows.
#[derive(Debug)]
struct Pipe(MemoryStore);

impl Store for Pipe {
    fn path(&self) -> &Path {
        self.0.path()
    }
    fn length(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buffer)
    }
    fn append(&self, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }
    fn truncate(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn read_pipe(bytes: &[u8]) -> (BTreeMap<PathBuf, Vec<u8>>, Result<()>) {
    let mut whole = BTreeMap::new();
    let store = Pipe(MemoryStore::of(bytes.to_vec()));
    let result = read_store(&store, &[], &Silent::default(), &mut whole);
    (whole, result)
}

#[test]
fn a_backup_through_a_pipe_comes_back() {
    for (filter, bytes) in [("gzip", 5000), ("gzip", 104_857_600), ("none", 20_000), ("lzma", 5000)] {
        let (whole, result) = read_pipe(&qubes_backup(filter, bytes, "--sparse"));
        result.unwrap_or_else(|error| panic!("{filter} {bytes}: {error}"));
        assert!(whole == qubes_expected(), "{filter} {bytes}");
    }
}

#[test]
fn what_is_missing_in_a_pipe_is_told_as_in_a_file() {
    let all = qvm::members(&qubes_backup("gzip", 5000, "--sparse"));
    for dropped in 0..all.len() {
        let kept = all.iter().enumerate().filter(|(at, _)| *at != dropped);
        let bytes = qvm::stream(&kept.map(|(_, one)| one.clone()).collect::<Vec<_>>());
        // Files of a machine that are no images may be missing.
        if all[dropped].0.starts_with("vm7/firewall") || !super::is_backup(&bytes) {
            continue;
        }
        let ((piped, pipe), (_, file)) = (read_pipe(&bytes), read(&bytes));
        let problem = |result: Result<()>| result.expect_err(&all[dropped].0).to_string();
        let (pipe, file) = (problem(pipe), problem(file));
        // Of a file, all parts are known from the beginning.
        let end = |text: &str| text.rsplit_once(": ").map(|(_, end)| end.to_owned());
        assert!(end(&pipe) == end(&file), "{}: {pipe} instead of {file}", all[dropped].0);
        let expected = qubes_expected();
        assert!(piped.iter().all(|(path, content)| expected.get(path) == Some(content)));
    }
}

#[test]
fn a_pipe_that_is_damaged_never_gives_a_wrong_byte() {
    let backup = qubes_backup("gzip", 20_000, "--sparse");
    let expected = qubes_expected();
    let mut random = Random(51);
    let end = backup.iter().rposition(|byte| *byte != 0).unwrap() as u64;
    for round in 0..400 {
        let at = usize::try_from(random.below(end)).unwrap();
        let damaged = if round % 4 == 0 {
            backup[..at].to_vec()
        } else {
            let mut damaged = backup.clone();
            damaged[at] ^= 1 << random.below(8);
            damaged
        };
        if !super::is_backup(&damaged) {
            continue;
        }
        let ((piped, pipe), (whole, file)) = (read_pipe(&damaged), read(&damaged));
        for (path, content) in &piped {
            assert!(expected.get(path) == Some(content), "byte {at}: {}", path.display());
        }
        // What came before the damage is not lost by reading ahead. Of a file, what is missing is known before anything comes.
        // Where the header behind a volume is cut, a pipe cannot tell whether that was the volume's last part.
        let is_cut_behind = match &pipe {
            Err(Error::DamagedBackup { range, problem, .. }) => range.length < 512 && problem == "it ends too early",
            _ => false,
        };
        assert!(
            piped.len() + usize::from(is_cut_behind) >= whole.len(),
            "byte {at}: {pipe:?} instead of {file:?}"
        );
        match (pipe, file) {
            (Ok(()), Ok(())) => {}
            (Err(pipe), Err(_)) => assert!(matches!(pipe.kind(), ErrorKind::Damaged | ErrorKind::Refused)),
            (pipe, file) => panic!("byte {at}: {pipe:?} instead of {file:?}"),
        }
    }
}
