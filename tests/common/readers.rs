//! The independent readers of archives, and what they make of every archive that a test leaves.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The readers, installed.
struct Readers {
    python: PathBuf,
    /// The folder with `check.js` and what it needs.
    ksy: PathBuf,
}

/// Runs a command. Returns what it printed, and whether it ended well.
fn run(command: &mut Command) -> (bool, String) {
    match command.output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&[&output.stdout[..], &output.stderr].concat()).into_owned();
            (output.status.success(), text)
        }
        Err(error) => (false, error.to_string()),
    }
}

fn checkout() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Installs the readers once for all tests.
fn install() -> Result<Readers, String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("readers");
    std::fs::create_dir_all(&folder).unwrap();
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    lock.lock().unwrap();
    let (python, ksy) = (folder.join("venv/bin/python"), folder.join("ksy"));
    let step = |command: &mut Command| match run(command) {
        (true, _) => Ok(()),
        (false, text) => Err(format!("{command:?}: {text}")),
    };
    let imports = ["-c", "import blake3, zstandard, cryptography"];
    if !run(Command::new(&python).args(imports)).0 {
        step(
            Command::new("python3")
                .args(["-m", "venv", "--clear"])
                .arg(folder.join("venv")),
        )?;
        let packages = ["blake3==1.0.11", "zstandard==0.25.0", "cryptography==50.0.2"];
        let install = ["-m", "pip", "install", "--quiet"];
        step(Command::new(&python).args(install).args(packages))?;
    }
    std::fs::create_dir_all(&ksy).unwrap();
    let names = ["package.json", "package-lock.json", "check.js"];
    let read = |path: PathBuf| std::fs::read(path).ok();
    let source = checkout().join("tests/ksy");
    let is_there = ksy.join("node_modules/yaml").exists()
        && names[..2]
            .iter()
            .all(|name| read(ksy.join(name)) == read(source.join(name)));
    for name in names {
        std::fs::copy(source.join(name), ksy.join(name)).unwrap();
    }
    if !is_there {
        let arguments = ["ci", "--no-audit", "--no-fund", "--silent"];
        step(Command::new("npm").args(arguments).current_dir(&ksy))?;
    }
    Ok(Readers { python, ksy })
}

/// The readers. Where they cannot be installed, it says so, and fails if this is a CI run.
fn readers() -> Option<&'static Readers> {
    static READERS: OnceLock<Option<Readers>> = OnceLock::new();
    let readers = READERS.get_or_init(|| match install() {
        Ok(readers) => Some(readers),
        Err(problem) => {
            assert!(
                std::env::var_os("CI").is_none(),
                "the independent readers cannot run: {problem}"
            );
            println!("NOT RUN: the independent readers: {problem}");
            None
        }
    });
    readers.as_ref()
}

/// Runs a script of `tests/format` by Python. Returns what it printed, and whether it ended well; `None` where it cannot run.
pub fn python(script: &str, arguments: &[impl AsRef<OsStr>]) -> Option<(bool, String)> {
    let mut command = Command::new(&readers()?.python);
    // Python would keep what it compiled in the checkout.
    command
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .env("TMPDIR", env!("CARGO_TARGET_TMPDIR"));
    Some(run(command
        .arg(checkout().join("tests/format").join(script))
        .args(arguments)))
}

/// Reads archives with what is made of `formats/archive.ksy`. Returns what it printed, and whether they are as it describes.
pub fn described(archives: &[&Path]) -> Option<(bool, String)> {
    let mut command = Command::new("node");
    command
        .current_dir(&readers()?.ksy)
        .arg("check.js")
        .arg(checkout().join("formats/archive.ksy"));
    Some(run(command.args(archives)))
}

/// Has both readers verify each archive below a folder: they must agree on whether it is intact, and on what is lost. Returns those that are
/// intact.
pub fn agree_on_archives_below(folder: &Path) -> Vec<PathBuf> {
    let files = walkdir::WalkDir::new(folder)
        .max_depth(2)
        .into_iter()
        .filter_map(Result::ok);
    let is_archive = |path: &Path| path.extension().is_some_and(|extension| extension == "vmfold");
    let archives: Vec<PathBuf> = files
        .filter(|entry| entry.file_type().is_file() && is_archive(entry.path()))
        .map(walkdir::DirEntry::into_path)
        .collect();
    if archives.is_empty() {
        return archives;
    }
    let arguments = [OsStr::new(env!("CARGO_BIN_EXE_vmfold")), OsStr::new("--over")];
    let arguments: Vec<&OsStr> = arguments
        .into_iter()
        .chain(archives.iter().map(|path| path.as_os_str()))
        .collect();
    let Some((agree, text)) = python("differential.py", &arguments) else {
        return Vec::new();
    };
    assert!(agree, "{text}");
    let is_intact = |number: usize| text.lines().any(|line| line == format!("{number}: intact"));
    let numbered = archives.into_iter().enumerate();
    numbered
        .filter(|(number, _)| is_intact(*number))
        .map(|(_, path)| path)
        .collect()
}

/// Has both readers verify each archive below a folder, which vmfold wrote alone. What is intact is as `formats/archive.ksy` describes it: it
/// has no word for damage.
pub fn check_archives_below(folder: &Path) {
    // Node takes names as text.
    let links = tempfile::tempdir().unwrap();
    let mut intact = Vec::new();
    for (number, path) in agree_on_archives_below(folder).iter().enumerate() {
        let link = links.path().join(number.to_string());
        std::os::unix::fs::symlink(path, &link).unwrap();
        intact.push(link);
    }
    let intact: Vec<&Path> = intact.iter().map(PathBuf::as_path).collect();
    if let Some((is_right, text)) = described(&intact).filter(|_| !intact.is_empty()) {
        assert!(is_right, "{text}");
    }
}
