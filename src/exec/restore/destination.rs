//! What is found of the folder that is restored to, for plans.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::fill::can_share;
use super::folder::{Place, Root};
use super::replaced::ReplacedFiles;
use super::staging::Journal;
use crate::error::Result;
use crate::plan::restore::{Destination, MachineSign, NameState, RestoredImage, RevisionToName, RevisionsThere};
use crate::pool::{revision_of, signs_of};
use crate::sys::open_files::raise_file_limit;

/// What an interrupted restore has left, and which restore goes on from there: see [`crate::plan::restore::RestorePlan::identity`].
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Interrupted<'a> {
    pub(super) noted: Option<&'a Journal>,
    pub(super) identity: Option<&'a str>,
}

impl Interrupted<'_> {
    /// Whether what stands at a place is what the interrupted restore made of an image, and has not been written to since.
    pub(super) fn is_ours(&self, image: usize, place: &Place) -> bool {
        let is_ours = |noted: &Journal| {
            let found = place.state();
            found.is_some_and(|found| noted.is_ours(self.identity, image, &found))
        };
        self.noted.is_some_and(is_ours)
    }
}

/// Looks at the folder, and at what stands under the names of images.
///
/// # Errors
/// Those of the system calls, and names that lead out of the folder.
pub(super) fn look(root: &Root, images: &[RestoredImage], interrupted: Interrupted<'_>) -> Result<Destination> {
    let mut names = BTreeMap::new();
    for (image, name) in names_of(images) {
        names.insert(name.clone(), state_of(root, image, name, interrupted)?);
    }
    let free = rustix::fs::fstatvfs(root.file());
    Ok(Destination {
        path: root.path().to_owned(),
        shares: can_share(root.file()),
        free_bytes: free.map_or(u64::MAX, |found| found.f_bavail.saturating_mul(found.f_frsize)),
        staged_bytes: interrupted.noted.map_or(0, Journal::staged_bytes),
        names,
        signs: signs(root, images),
    })
}

fn names_of(images: &[RestoredImage]) -> impl Iterator<Item = (&RestoredImage, &PathBuf)> {
    images
        .iter()
        .flat_map(|image| image.names.iter().map(move |name| (image, name)))
}

fn state_of(root: &Root, image: &RestoredImage, name: &Path, interrupted: Interrupted<'_>) -> Result<NameState> {
    let Some(place) = root.place(name, false, |_| {})? else {
        return Ok(NameState::Free);
    };
    let Some(stat) = place.stat()? else {
        return Ok(NameState::Free);
    };
    Ok(if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        NameState::Folder
    } else if interrupted.is_ours(image.image, &place) {
        NameState::Ours
    } else {
        NameState::Taken
    })
}

/// Images that a machine runs from, or would take for its own after a crash: the driver of Qubes OS renames what it finds in a `-dirty.img`
/// over the image, even where there is none yet.
fn signs(root: &Root, images: &[RestoredImage]) -> Vec<MachineSign> {
    let paths: BTreeSet<PathBuf> = names_of(images).map(|(_, name)| root.path().join(name)).collect();
    let signs = signs_of(&paths).into_iter();
    // What is restored as a whole replaces the sign as well, unless someone may have written to it already.
    signs
        .filter(|(path, sign)| !paths.contains(sign) || path.symlink_metadata().is_ok())
        .map(|(path, sign)| MachineSign {
            image: path.clone(),
            sign,
        })
        .collect()
}

/// Refuses to restore what a machine runs from. Images that are restored as revisions are no machine's yet.
///
/// # Errors
/// [`crate::error::Error::InUse`].
pub(super) fn check_signs(root: &Root, images: &[RestoredImage], as_revision: bool) -> Result<()> {
    let found = Destination {
        signs: signs(root, images),
        ..Destination::default()
    };
    found.check_names(true, as_revision)
}

/// Looks for revisions that stand beside the images that others are to become revisions of.
///
/// # Errors
/// Those of the system calls.
pub(super) fn revisions(
    root: &Root,
    order: &[RevisionToName],
    images: &[RestoredImage],
    noted: Option<&Journal>,
) -> Result<BTreeMap<PathBuf, RevisionsThere>> {
    let mut images_of: BTreeMap<&Path, Vec<usize>> = BTreeMap::new();
    for RevisionToName { of, at, .. } in order {
        images_of.entry(of).or_default().push(images[*at].image);
    }
    let there = images_of.into_iter().map(|(of, images)| {
        let there = revisions_of(root, of, &images, noted)?;
        Ok((of.to_owned(), there))
    });
    there.collect()
}

fn revisions_of(root: &Root, of: &Path, images: &[usize], noted: Option<&Journal>) -> Result<RevisionsThere> {
    let mut there = RevisionsThere::default();
    let Some(place) = root.place(of, false, |_| {})? else {
        return Ok(there);
    };
    let wanted = of.file_name().map(Path::new);
    for name in place.siblings()? {
        let Some(revision) = revision_of(Path::new(&name)).filter(|found| Some(found.image.as_path()) == wanted) else {
            continue;
        };
        there.greatest = there.greatest.max(revision.number.unwrap_or(0));
        let Some((noted, state)) = noted.zip(place.beside(name.clone()).state()) else {
            continue;
        };
        for image in images.iter().filter(|image| noted.is_ours(None, **image, &state)) {
            there.given.entry(*image).or_insert_with(|| of.with_file_name(&name));
        }
    }
    Ok(there)
}

/// Refuses to go on if someone uses what may be replaced. What is open in this process cannot be told from what others use: seeds are not
/// open yet, or closed again.
///
/// # Errors
/// [`crate::error::Error::InUse`].
pub(super) fn check_use(root: &Root, images: &[RestoredImage], destination: &Destination, replace: bool) -> Result<()> {
    raise_file_limit();
    let mut places = Vec::new();
    for (_, name) in names_of(images) {
        let may_be_given = destination
            .names
            .get(name)
            .is_some_and(|state| state.may_be_given(replace));
        if may_be_given && let Some(place) = root.place(name, false, |_| {})? {
            places.push(place);
        }
    }
    ReplacedFiles::lease(places.iter()).map(drop)
}
