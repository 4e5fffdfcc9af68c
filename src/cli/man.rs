//! Man pages: the long help of every verb, in the format that `man` reads.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_mangen::Man;
use rustix::fs::{AtFlags, Mode, OFlags};
use serde::Serialize;

use super::args::Args;
use crate::error::{Error, Result};
use crate::named_folder::NamedFolder;
use crate::shown::shown;
use crate::sys::beneath::Folder;

/// The pages that were written, in the order of the verbs.
#[derive(Serialize)]
pub(super) struct ManPages {
    #[serde(serialize_with = "crate::shown::serialize_all")]
    pages: Vec<PathBuf>,
}

impl std::fmt::Display for ManPages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.pages.iter().try_for_each(|page| writeln!(f, "{}", shown(page)))
    }
}

/// Writes a page for vmfold and one for each of its verbs into a folder.
///
/// # Errors
/// [`Error::NoSuchPath`] if there is no such folder; [`Error::Io`] or [`Error::NoSpace`], with the path, if it cannot be opened or a page
/// cannot be written. The pages before that one are in place then.
pub(super) fn write_man_pages(path: &Path) -> Result<ManPages> {
    let named = NamedFolder::look(path)?;
    if !named.exists() {
        return Err(Error::NoSuchPath { path: path.to_owned() });
    }
    let folder = named.nearest();
    let mut command = Args::command().disable_help_subcommand(true);
    command.build();
    let verbs = command.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned();
    let mut pages = Vec::new();
    for command in std::iter::once(command.clone()).chain(verbs) {
        let man = Man::new(command);
        let page = path.join(man.get_filename());
        write_page(folder, &man).map_err(Error::writing("write", &page))?;
        pages.push(page);
    }
    Ok(ManPages { pages })
}

/// Writes one page as a new file with a temporary name, and renames it. So a reader sees the old page or the new one as a whole, and
/// a link under the page's name is replaced and not followed.
fn write_page(folder: &Folder, man: &Man) -> std::io::Result<()> {
    let mut number = [0; 8];
    rustix::rand::getrandom(&mut number, rustix::rand::GetRandomFlags::empty())?;
    let temporary = format!(".vmfold-man-{:016x}", u64::from_le_bytes(number));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file = rustix::fs::openat(folder, &temporary, flags, Mode::RUSR | Mode::WUSR)?;
    let written = fill_page(&mut File::from(file), man)
        .and_then(|()| Ok(rustix::fs::renameat(folder, &temporary, folder, man.get_filename())?));
    if written.is_err() {
        // The error that is reported is the first one: what is left is one small file.
        let _ = rustix::fs::unlinkat(folder, &temporary, AtFlags::empty());
    }
    written
}

/// Writes the text of a page. Every user may read it, in spite of the umask.
fn fill_page(file: &mut File, man: &Man) -> std::io::Result<()> {
    let mut text = Vec::new();
    man.render(&mut text)?;
    file.write_all(&text)?;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    Ok(rustix::fs::fchmod(file, mode)?)
}
