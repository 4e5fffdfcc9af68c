//! Looks at the folder that is restored to, for plans: what stands under names, which machines use images, and what can be shared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::fill::can_share;
use super::folder::{Place, Places, Root};
use super::replaced::ReplacedFiles;
use super::staging::Journal;
use crate::error::Result;
use crate::plan::restore::{Destination, MachineSign, NameState, RestoredImage, RevisionToName, RevisionsThere};
use crate::pool::{revision_of, signs_of};
use crate::sys::open_files::raise_file_limit;

/// An interrupted restore, and the restore that resumes it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Interrupted<'a> {
    /// The journal of the interrupted restore, if there was one.
    pub(super) journal: Option<&'a Journal>,
    /// The [`crate::plan::restore::RestorePlan::identity`] of the restore that resumes it.
    pub(super) identity: Option<&'a str>,
}

impl Interrupted<'_> {
    /// Whether the file at a place is the one that the interrupted restore made of an image, and was not written to since.
    pub(super) fn is_ours(&self, image: usize, place: &Place) -> bool {
        let is_ours = |journal: &Journal| {
            let state = place.state();
            state.is_some_and(|state| journal.is_ours(self.identity, image, &state))
        };
        self.journal.is_some_and(is_ours)
    }
}

/// Looks at the folder, and at the files that stand under the names of images.
///
/// # Errors
/// [`crate::error::Error::Usage`] if a name leads out of the folder; [`crate::error::Error::Io`] if the folder cannot be read.
pub(super) fn look(root: &Root, images: &[RestoredImage], interrupted: Interrupted<'_>) -> Result<Destination> {
    let mut names = BTreeMap::new();
    for (image, name) in names_of(images) {
        names.insert(name.clone(), state_of(root, image, name, interrupted)?);
    }
    let space = rustix::fs::fstatvfs(root.file());
    Ok(Destination {
        path: root.path().to_owned(),
        shares: can_share(root.file()),
        free_bytes: space.map_or(u64::MAX, |space| space.f_bavail.saturating_mul(space.f_frsize)),
        staged_bytes: interrupted.journal.map_or(0, Journal::staged_bytes),
        names,
        signs: signs(root, images),
    })
}

/// All names of all images.
fn names_of(images: &[RestoredImage]) -> impl Iterator<Item = (&RestoredImage, &PathBuf)> {
    images
        .iter()
        .flat_map(|image| image.names.iter().map(move |name| (image, name)))
}

/// What stands under a name that an image is to get.
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

/// Images that a machine runs from, each with the file that is the sign of it. That includes images that do not exist and have a
/// `-dirty.img`: the driver of Qubes OS renames that file over the image after a crash.
fn signs(root: &Root, images: &[RestoredImage]) -> Vec<MachineSign> {
    let paths: BTreeSet<PathBuf> = names_of(images).map(|(_, name)| root.path().join(name)).collect();
    let signs = signs_of(&paths).into_iter();
    // If the sign is a name that is restored as well, it is replaced together with the image. It counts only if the image exists, because
    // a machine may then have written to it.
    signs
        .filter(|(path, sign)| !paths.contains(sign) || path.symlink_metadata().is_ok())
        .map(|(path, sign)| MachineSign {
            image: path.clone(),
            sign,
        })
        .collect()
}

/// Refuses to replace an image that a machine runs from. With `as_revision` nothing is refused: no machine runs from a revision.
///
/// # Errors
/// [`crate::error::Error::InUse`].
pub(super) fn check_signs(root: &Root, images: &[RestoredImage], as_revision: bool) -> Result<()> {
    let destination = Destination {
        signs: signs(root, images),
        ..Destination::default()
    };
    destination.check_names(true, as_revision)
}

/// Finds the revisions that stand beside those images that restored ones become revisions of.
///
/// # Errors
/// [`crate::error::Error::Usage`] if a name leads out of the folder; [`crate::error::Error::Io`] if a folder cannot be read.
pub(super) fn revisions(
    root: &Root,
    order: &[RevisionToName],
    images: &[RestoredImage],
    journal: Option<&Journal>,
) -> Result<BTreeMap<PathBuf, RevisionsThere>> {
    let mut images_of: BTreeMap<&Path, Vec<usize>> = BTreeMap::new();
    for RevisionToName { of, at, .. } in order {
        images_of.entry(of).or_default().push(images[*at].image);
    }
    let revisions = images_of.into_iter().map(|(of, images)| {
        let revisions = revisions_of(root, of, &images, journal)?;
        Ok((of.to_owned(), revisions))
    });
    revisions.collect()
}

/// The revisions of one image. Those that an interrupted restore made of `images` are in `given`.
fn revisions_of(root: &Root, of: &Path, images: &[usize], journal: Option<&Journal>) -> Result<RevisionsThere> {
    let mut revisions = RevisionsThere::default();
    let Some(place) = root.place(of, false, |_| {})? else {
        return Ok(revisions);
    };
    let image_name = of.file_name().map(Path::new);
    for name in place.siblings()? {
        let Some(revision) =
            revision_of(Path::new(&name)).filter(|revision| Some(revision.image.as_path()) == image_name)
        else {
            continue;
        };
        revisions.greatest = revisions.greatest.max(revision.number.unwrap_or(0));
        let Some((journal, state)) = journal.zip(place.beside(name.clone()).state()) else {
            continue;
        };
        for image in images.iter().filter(|image| journal.is_ours(None, **image, &state)) {
            revisions
                .given
                .entry(*image)
                .or_insert_with(|| of.with_file_name(&name));
        }
    }
    Ok(revisions)
}

/// Checks that nobody uses a file that may be replaced. A file that this process has open looks as if others used it, so no seed may be
/// open.
///
/// # Errors
/// [`crate::error::Error::InUse`].
pub(super) fn check_use(root: &Root, images: &[RestoredImage], destination: &Destination, replace: bool) -> Result<()> {
    raise_file_limit();
    let (mut folders, mut places) = (Places::default(), Vec::new());
    for (_, name) in names_of(images) {
        let may_be_given = destination
            .names
            .get(name)
            .is_some_and(|state| state.may_be_given(replace));
        if may_be_given && let Some(place) = folders.place(root, name, false, |_| {})? {
            places.push(place);
        }
    }
    ReplacedFiles::lease(places.iter()).map(drop)
}
