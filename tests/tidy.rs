//! Goal: the order of the code's folders stays what it is, so that a change belongs to one place. Method: the imports in the sources.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Files and folders of `src`, the lowest first: each may use those before it, and nothing else.
const ORDER: [&str; 33] = [
    "sys",
    "numbers",
    "block",
    "range",
    "shown",
    "codec",
    "spill",
    "content",
    "error",
    "named_folder",
    "new_file",
    "own_folder",
    "monitor",
    "fingerprint",
    "chunk",
    "frame",
    "facts",
    "store",
    "parity",
    "keys",
    "archive",
    "seen",
    "foreign",
    "qubes",
    "pool",
    "fs",
    "index",
    "plan",
    "exec",
    "report",
    "ops",
    "cli",
    "testing",
];
/// What is above all of them.
const TOP: [&str; 2] = ["lib", "main"];

fn sources() -> Vec<(PathBuf, String)> {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let entries = walkdir::WalkDir::new(&src).sort_by_file_name().into_iter();
    let files = entries
        .map(|entry| entry.unwrap().into_path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    files
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            (path.strip_prefix(&src).unwrap().to_owned(), code_of(&text))
        })
        .collect()
}

/// A source without comments and without its tests.
fn code_of(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let lines = code.lines().map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// The file or folder of `src` that a source belongs to.
fn folder_of(path: &Path) -> String {
    let first = path.components().next().unwrap();
    let name = Path::new(&first).with_extension("");
    name.to_str().unwrap().to_owned()
}

/// The names that follow some words, as `crate::` in an import.
fn names_after<'a>(code: &'a str, words: &'a str) -> impl Iterator<Item = &'a str> {
    code.match_indices(words).map(move |(at, _)| {
        let rest = &code[at + words.len()..];
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        &rest[..end]
    })
}

fn level_of(name: &str) -> Option<usize> {
    ORDER.iter().position(|one| *one == name)
}

#[test]
fn no_arrow_points_back() {
    let mut wrong = Vec::new();
    let mut arrows = 0;
    for (path, code) in sources() {
        let folder = folder_of(&path);
        if TOP.contains(&folder.as_str()) {
            continue;
        }
        let level =
            level_of(&folder).unwrap_or_else(|| panic!("{folder} has no place in the order: {}", path.display()));
        for used in names_after(&code, "crate::").filter(|used| *used != folder) {
            arrows += 1;
            if level_of(used).is_none_or(|its| its >= level) {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(arrows > 300, "only {arrows} imports were found");
}

/// The words of a source: names, and what else is made of the same characters.
fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_')
}

/// Plans follow from facts alone: nothing below `plan` opens, reads, compresses, asks the kernel or looks at a clock.
#[test]
fn plans_are_pure() {
    /// What plans are made of.
    const USED: [&str; 12] = [
        "archive",
        "block",
        "chunk",
        "content",
        "error",
        "facts",
        "fingerprint",
        "numbers",
        "pool",
        "range",
        "shown",
        "spill",
    ];
    /// Modules of the standard library that reach outside the process, or another thread.
    const OUTSIDE: [&str; 7] = ["env", "fs", "io", "net", "process", "thread", "time"];
    /// Names of what does.
    const IMPURE: [&str; 21] = [
        "Archive",
        "File",
        "OpenOptions",
        "canonicalize",
        "discover",
        "exists",
        "fs",
        "in_file",
        "libc",
        "memmap2",
        "rayon",
        "read_dir",
        "read_link",
        "rustix",
        "signs_of",
        "symlink_metadata",
        "sled",
        "sys",
        "tempfile",
        "walkdir",
        "zstd",
    ];
    let (mut wrong, mut files) = (Vec::new(), 0);
    for (path, code) in sources() {
        if !path.starts_with("plan") || path.starts_with("plan/tests") {
            continue;
        }
        files += 1;
        let imports = names_after(&code, "crate::").filter(|used| !USED.contains(used));
        let modules = names_after(&code, "std::").filter(|used| OUTSIDE.contains(used));
        let names = words(&code).filter(|word| IMPURE.contains(word));
        for used in imports.chain(modules).chain(names) {
            wrong.push(format!("{} uses {used}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(files >= 10, "only {files} sources were found");
}

/// A function is seen at a glance: below so many lines, from its name to its last brace.
const FUNCTION_LINES: usize = 70;

/// The functions of a source that rustfmt formatted, each with its number of lines.
fn functions(code: &str) -> Vec<(&str, usize)> {
    let lines: Vec<&str> = code.lines().collect();
    let mut functions = Vec::new();
    for (first, line) in lines.iter().enumerate() {
        let indent = &line[..line.len() - line.trim_start().len()];
        let Some(name) = names_after(line, "fn ").next().filter(|name| !name.is_empty()) else {
            continue;
        };
        // What is declared only has no brace before it ends.
        let close = format!("{indent}}}");
        let end = lines[first..]
            .iter()
            .position(|line| line.trim_end() == close || line.ends_with(';') && !line[indent.len()..].starts_with(' '));
        functions.push((name, end.map_or(0, |end| end + 1)));
    }
    functions
}

#[test]
fn functions_stay_short() {
    let (mut long, mut count) = (BTreeSet::new(), 0);
    for (path, code) in sources() {
        for (name, lines) in functions(&code) {
            count += 1;
            if lines >= FUNCTION_LINES {
                long.insert((path.to_str().unwrap().to_owned(), name.to_owned()));
            }
        }
    }
    assert!(long.is_empty(), "to be split: {long:?}");
    assert!(count > 1000, "only {count} functions were found");
}

#[test]
fn no_verb_uses_another() {
    let mut wrong = Vec::new();
    let verbs = [
        "backup", "diff", "export", "import", "key", "list", "protect", "reclaim", "repair", "report", "scan",
        "status", "verify",
    ];
    for (path, code) in sources() {
        let Ok(below) = path.strip_prefix("ops") else { continue };
        let verb = folder_of(below);
        if verb == "mod" {
            continue;
        }
        let is_inside = below.components().count() > 1;
        let ways = ["crate::ops::", if is_inside { "super::super::" } else { "super::" }];
        for used in ways.into_iter().flat_map(|way| names_after(&code, way)) {
            if verbs.contains(&used) && used != verb {
                wrong.push(format!("{} uses {used}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// The papers, with the folder that each lies in.
fn papers() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["", "src", "formats", "tests", "tests/bench"].map(|folder| root.join(folder));
    let entries = folders
        .iter()
        .flat_map(|folder| std::fs::read_dir(folder).unwrap())
        .map(|entry| entry.unwrap().path());
    let papers = entries.filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    papers
        .map(|path| {
            (
                path.parent().unwrap().to_owned(),
                std::fs::read_to_string(&path).unwrap(),
            )
        })
        .collect()
}

/// What stands in a text between two others.
fn between<'a>(text: &'a str, begin: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
    let parts = text.split(begin).skip(1);
    parts.filter_map(move |part| Some(part.split_once(end)?.0))
}

#[test]
fn papers_name_what_exists() {
    const TYPES: [&str; 7] = [".rs", ".md", ".sh", ".ksy", ".json", ".svg", ".txt"];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut missing, mut found) = (Vec::new(), 0);
    for (folder, text) in papers() {
        let links = between(&text, "](", ")").filter(|link| !link.starts_with("http"));
        let links = links.filter_map(|link| link.split('#').next()).map(|path| (path, true));
        let quoted = text.split('`').skip(1).step_by(2);
        let quoted = quoted.filter(|path| {
            let is_path = path.contains('/') && !path.contains(char::is_whitespace) && !path.contains("NAME");
            is_path && !path.starts_with('/') && TYPES.iter().any(|end| path.ends_with(end))
        });
        for (path, is_link) in links.chain(quoted.map(|path| (path, false))) {
            found += 1;
            if !folder.join(path).exists() && (is_link || !root.join(path).exists()) {
                missing.push(format!("{}: {path}", folder.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
    assert!(found > 50, "only {found} names were found");
}

#[test]
fn the_paper_on_tests_names_tests_that_exist() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let paper = std::fs::read_to_string(folder.join("README.md")).unwrap();
    let mut functions = Vec::new();
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "rs") {
            let name = path.file_name().unwrap().to_str().unwrap();
            if !paper.contains(&format!("`{name}`")) {
                wrong.push(format!("{name} is not in the paper"));
            }
            let text = std::fs::read_to_string(&path).unwrap();
            functions.extend(names_after(&text, "\nfn ").map(str::to_owned));
        }
    }
    for entry in std::fs::read_dir(folder.join("format")).unwrap() {
        let text = std::fs::read_to_string(entry.unwrap().path()).unwrap_or_default();
        functions.extend(names_after(&text, "\nfn ").map(str::to_owned));
    }
    let (_, situations) = paper.split_once("## Situations").unwrap();
    let named = situations.split('`').skip(1).step_by(2);
    // Long names are cut, with dots in the place of the rest.
    let named = named.filter(|name| {
        name.matches('_').count() > 1 && name.chars().all(|c| c.is_lowercase() || "_…0123456789".contains(c))
    });
    for name in named {
        let is_it = |function: &String| match name.strip_suffix('…') {
            Some(begin) => function.starts_with(begin),
            None => function == name,
        };
        if !functions.iter().any(is_it) {
            wrong.push(format!("{name} is no test"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn which_filesystem_it_is_matters_in_one_folder() {
    let (mut wrong, mut seen) = (Vec::new(), false);
    for (path, code) in sources() {
        let folder = folder_of(&path);
        let asks = ["Kind::Btrfs", "Kind::Xfs"].iter().any(|kind| code.contains(kind));
        seen |= asks && folder == "fs";
        if asks && !["fs", "sys"].contains(&folder.as_str()) {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen, "nobody asks");
}
