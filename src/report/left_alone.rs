//! Images that are left alone, grouped as people think of them: those of running machines by machine, and the others by reason.

use std::collections::BTreeMap;
use std::fmt::{Formatter, Result};
use std::path::{Path, PathBuf};

use crate::pool::{Skip, Skipped, machine_of};
use crate::shown::{counted, shown};

/// Names that a line tells. More are counted, and `-v` names them all.
const NAMES_MAX: usize = 8;

/// A machine, or an image that is none's, that someone uses.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct InUse<'a> {
    /// Its name.
    pub(super) name: String,
    /// How many of its images are left alone.
    pub(super) images: u64,
    /// The image that shows that it is in use.
    pub(super) shows: &'a Skipped,
    /// Whether it is a machine.
    pub(super) is_machine: bool,
}

/// The machines that are in use, by name.
pub(super) fn in_use(skipped: &[Skipped]) -> Vec<InUse<'_>> {
    let mut by_machine: BTreeMap<PathBuf, Vec<&Skipped>> = BTreeMap::new();
    for image in skipped.iter().filter(|image| image.reason.is_in_use()) {
        by_machine.entry(machine_of(&image.path)).or_default().push(image);
    }
    let machines = by_machine.into_iter().filter_map(|(machine, images)| {
        let first = images.iter().find(|image| image.reason != Skip::MachineInUse);
        Some(InUse {
            name: name_of(&machine),
            images: images.len() as u64,
            shows: first.or(images.first())?,
            is_machine: images.iter().all(|image| image.path != machine),
        })
    });
    machines.collect()
}

impl InUse<'_> {
    /// Its name in a list: if only one of its images is left alone, that one is named.
    fn listed_name(&self) -> String {
        if self.is_machine && self.images == 1 {
            format!("{}/{}", self.name, name_of(&self.shows.path))
        } else {
            self.name.clone()
        }
    }
}

/// The last part of a path, on one line.
fn name_of(path: &Path) -> String {
    let name = path.file_name().map_or(path, Path::new);
    shown(name).to_string()
}

/// Names with commas between them; those beyond [`NAMES_MAX`] are counted.
fn listed(names: &[String]) -> String {
    let text = names.iter().take(NAMES_MAX).cloned().collect::<Vec<_>>().join(", ");
    match names.len().checked_sub(NAMES_MAX) {
        Some(more @ 1..) => format!("{text} and {more} more"),
        _ => text,
    }
}

/// Writes which images are left alone: a line for those of running machines, one for single images in use, and one for each other reason.
pub(super) fn write(f: &mut Formatter<'_>, skipped: &[Skipped]) -> Result {
    let (machines, single): (Vec<_>, Vec<_>) = in_use(skipped).into_iter().partition(|one| one.is_machine);
    for (of, what) in [(machines, "running machine"), (single, "image in use")] {
        if of.is_empty() {
            continue;
        }
        let images = of.iter().map(|one| one.images).sum();
        let names: Vec<String> = of.iter().map(InUse::listed_name).collect();
        match what {
            "image in use" => write!(f, "{} left alone ({}", counted_in_use(images), listed(&names))?,
            _ => write!(
                f,
                "{} of {} left alone ({}",
                counted(images, "image"),
                counted(of.len() as u64, what),
                listed(&names)
            )?,
        }
        match (
            &of[..],
            of[0].shows.detail.as_deref().filter(|detail| !detail.is_empty()),
        ) {
            ([_], Some(detail)) => writeln!(f, "): {detail}")?,
            _ => writeln!(f, ")")?,
        }
    }
    let mut by_reason: BTreeMap<Skip, Vec<&Skipped>> = BTreeMap::new();
    for image in skipped.iter().filter(|image| !image.reason.is_in_use()) {
        by_reason.entry(image.reason).or_default().push(image);
    }
    for (reason, images) in by_reason {
        if let [image] = images[..] {
            writeln!(f, "1 image left alone: {image}")?;
            continue;
        }
        let names: Vec<String> = images.iter().map(|image| name_of(&image.path)).collect();
        let count = counted(images.len() as u64, "image");
        writeln!(f, "{count} left alone, {}: {}", reason.reason(), listed(&names))?;
    }
    Ok(())
}

/// A number of images in use, in words.
fn counted_in_use(images: u64) -> String {
    format!("{} in use", counted(images, "image"))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Written<'a>(&'a [Skipped]);

    impl std::fmt::Display for Written<'_> {
        fn fmt(&self, f: &mut Formatter<'_>) -> Result {
            write(f, self.0)
        }
    }

    #[test]
    fn images_in_use_are_grouped_by_machine() {
        let mut skipped = Vec::new();
        for machine in ["personal", "vault", "work"] {
            for (n, reason) in [
                Skip::MachineInUse,
                Skip::Running,
                Skip::MachineInUse,
                Skip::MachineInUse,
            ]
            .into_iter()
            .enumerate()
            {
                let path = format!("/p/appvms/{machine}/{n}.img");
                skipped.push(Skipped::new(Path::new(&path), reason).because(Some("/run/x".into())));
            }
        }
        assert_eq!(
            Written(&skipped).to_string(),
            "12 images of 3 running machines left alone (personal, vault, work)\n"
        );
        assert_eq!(
            Written(&skipped[1..2]).to_string(),
            "1 image of 1 running machine left alone (personal/1.img): /run/x\n"
        );
        let open = |name: &str| Skipped::new(Path::new(name), Skip::InUse).because(Some("open in qemu (5)".into()));
        assert_eq!(
            Written(&[open("/i/a.img")]).to_string(),
            "1 image in use left alone (a.img): open in qemu (5)\n"
        );
        let many: Vec<Skipped> = (10..30).map(|n| open(&format!("/i/{n}.img"))).collect();
        assert_eq!(
            Written(&many).to_string(),
            "20 images in use left alone (10.img, 11.img, 12.img, 13.img, 14.img, 15.img, 16.img, 17.img and 12 more)\n"
        );
        let fixed = ["a", "b"].map(|name| Skipped::new(&Path::new("/i").join(name), Skip::Volatile));
        assert_eq!(
            Written(&fixed).to_string(),
            "2 images left alone, it exists only while its machine runs: a, b\n"
        );
        assert_eq!(
            Written(&fixed[..1]).to_string(),
            "1 image left alone: /i/a: it exists only while its machine runs\n"
        );
    }
}
