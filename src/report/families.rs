//! Machines, and families of them: a template and what derives from it, or machines that have most of their data in common.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::numbers::ImageId;
use crate::plan::{Holdings, Share};
use crate::pool::{Covering, owner_of, revision_of};

/// What a set of images takes on disk, and what deleting it would free.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DeletedBytes {
    /// Bytes on disk of all that any image of the set holds.
    pub on_disk_bytes: u64,
    /// Bytes on disk that deleting all images of the set would free now.
    pub frees_bytes: u64,
    /// Bytes on disk that deleting them would free after a reclaim. It is `None` if no reclaim was planned.
    pub frees_after_reclaim_bytes: Option<u64>,
}

impl DeletedBytes {
    fn of(now: Share, after: Option<Share>) -> Self {
        Self {
            on_disk_bytes: now.on_disk_bytes,
            frees_bytes: now.freed_bytes,
            frees_after_reclaim_bytes: after.map(|after| after.freed_bytes),
        }
    }
}

/// The revisions of a machine, or of a pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct RevisionBytes {
    /// How many there are.
    pub count: u64,
    /// What deleting all of them would free.
    #[serde(flatten)]
    pub deleted: DeletedBytes,
}

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MachineBytes {
    /// Its name: that of its folder or image, with folders before it where two machines have the same.
    pub name: String,
    /// Its folder, or its image.
    #[serde(serialize_with = "crate::shown::serialize")]
    pub path: PathBuf,
    /// The number of its images, revisions included.
    pub image_count: u64,
    /// What deleting all of them would free.
    #[serde(flatten)]
    pub deleted: DeletedBytes,
    /// Its revisions, if it has any.
    pub revisions: Option<RevisionBytes>,
}

/// A family of machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FamilyBytes {
    /// The name of the machine that the others derive from.
    pub name: String,
    /// What deleting all machines of the family would free.
    #[serde(flatten)]
    pub deleted: DeletedBytes,
    /// Its machines. The first is the one that the others derive from.
    pub machines: Vec<MachineBytes>,
}

/// What deleting a set of images would free that the user named.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct IfDeleted {
    /// The patterns that name the set.
    pub patterns: Vec<String>,
    /// The number of its images.
    pub image_count: u64,
    /// What deleting them would free.
    #[serde(flatten)]
    pub deleted: DeletedBytes,
}

/// A machine, by its place in [`Machines::folders`].
type Machine = usize;

/// The machines of a pool, and the images of each.
#[derive(Debug, Default)]
pub(crate) struct Machines {
    /// The folder of each machine, or its image.
    folders: Vec<PathBuf>,
    /// The machines of each image, ascending. An image of several has names in each.
    of_image: Vec<Vec<Machine>>,
    /// The names of each image.
    names: Vec<BTreeSet<PathBuf>>,
}

impl Machines {
    /// The machines of images with these names.
    pub(crate) fn of(names: Vec<BTreeSet<PathBuf>>) -> Self {
        let owners: Vec<BTreeSet<PathBuf>> = names
            .iter()
            .map(|names| names.iter().map(|name| owner_of(name)).collect())
            .collect();
        let all: BTreeSet<&PathBuf> = owners.iter().flatten().collect();
        let folders: Vec<PathBuf> = all.into_iter().cloned().collect();
        let of_image = owners
            .iter()
            .map(|owners| {
                owners
                    .iter()
                    .filter_map(|owner| folders.binary_search(owner).ok())
                    .collect()
            })
            .collect();
        Self {
            folders,
            of_image,
            names,
        }
    }

    /// How many machines there are.
    pub(crate) fn count(&self) -> u64 {
        self.folders.len() as u64
    }

    fn machines_of(&self, image: ImageId) -> &[Machine] {
        self.of_image.get(image.index()).map_or(&[], Vec::as_slice)
    }

    fn is_revision(&self, image: ImageId) -> bool {
        let names = self.names.get(image.index());
        names.is_some_and(|names| !names.is_empty() && names.iter().all(|name| revision_of(name).is_some()))
    }

    fn images(&self) -> impl Iterator<Item = ImageId> + use<'_> {
        ImageId::numbered(&self.of_image).map(|(image, _)| image)
    }

    /// The name of each machine: the last part of its path, with more of it where two have the same.
    fn short_names(&self, root: &Path) -> Vec<String> {
        let last = |folder: &Path| {
            folder
                .file_name()
                .map_or_else(String::new, |name| name.to_string_lossy().into())
        };
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        for folder in &self.folders {
            *counts.entry(last(folder)).or_default() += 1;
        }
        let name = |folder: &PathBuf| match counts.get(&last(folder)) {
            Some(1) => last(folder),
            _ => folder
                .strip_prefix(root)
                .unwrap_or(folder)
                .to_string_lossy()
                .into_owned(),
        };
        self.folders.iter().map(name).collect()
    }

    /// Whether templates lie in the folder that a machine lies in, as the hosts name it.
    fn is_template(&self, machine: Machine) -> bool {
        let folder = &self.folders[machine];
        let is_below_templates = folder.parent().is_some_and(|above| above.ends_with("vm-templates"));
        is_below_templates
            || folder
                .file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("base-"))
    }
}

/// Machines that belong together.
struct Union(Vec<Machine>);

impl Union {
    fn root(&mut self, machine: Machine) -> Machine {
        let mut at = machine;
        while self.0[at] != at {
            self.0[at] = self.0[self.0[at]];
            at = self.0[at];
        }
        at
    }

    fn join(&mut self, one: Machine, other: Machine) {
        let (one, other) = (self.root(one), self.root(other));
        self.0[one.max(other)] = one.min(other);
    }
}

/// The family of each machine, by the number of one of its machines. What machines have in common shows best after a reclaim, if one was
/// planned.
fn families_of(
    machines: &Machines,
    templates: &BTreeMap<String, String>,
    holdings: &Holdings,
    names: &[String],
) -> Vec<Machine> {
    /// Machines that share a range. What more of them share tells nothing of who derives from whom, and there are many pairs among them.
    const SHARERS_MAX: usize = 32;
    let mut union = Union((0..machines.folders.len()).collect());
    for of_image in &machines.of_image {
        of_image.windows(2).for_each(|pair| union.join(pair[0], pair[1]));
    }
    // Where Qubes OS tells the template of a machine, what the machine shares with others says nothing more.
    let numbers: BTreeMap<&str, Machine> = names.iter().map(String::as_str).zip(0..).collect();
    let mut is_told = vec![false; machines.folders.len()];
    for (machine, template) in templates {
        if let (Some(machine), Some(template)) = (numbers.get(machine.as_str()), numbers.get(template.as_str())) {
            union.join(*machine, *template);
            (is_told[*machine], is_told[*template]) = (true, true);
        }
    }
    let on_disk = holdings.shares(|image| machines.machines_of(image).to_vec());
    let mut shared: BTreeMap<(Machine, Machine), u64> = BTreeMap::new();
    for (images, bytes) in holdings.sets() {
        let sharers: BTreeSet<Machine> = images
            .iter()
            .flat_map(|image| machines.machines_of(*image).iter().copied())
            .filter(|machine| !is_told[*machine])
            .take(SHARERS_MAX * SHARERS_MAX)
            .collect();
        if sharers.len() > SHARERS_MAX {
            continue;
        }
        let mut rest = sharers.iter();
        while let Some(one) = rest.next() {
            for other in rest.clone() {
                *shared.entry((*one, *other)).or_default() += bytes.alone_bytes + bytes.held_bytes;
            }
        }
    }
    let bytes_of = |machine: Machine| on_disk.get(&machine).map_or(0, |share| share.on_disk_bytes);
    for ((one, other), bytes) in shared {
        let smaller = bytes_of(one).min(bytes_of(other));
        // A clone has most of its data in common with what it was cloned from.
        if smaller > 0 && bytes * 2 >= smaller {
            union.join(one, other);
        }
    }
    (0..machines.folders.len()).map(|machine| union.root(machine)).collect()
}

/// What the pool holds now and, if a reclaim was planned, after it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Views<'a> {
    /// Now.
    pub(crate) now: &'a Holdings,
    /// After a reclaim.
    pub(crate) after: Option<&'a Holdings>,
}

impl Views<'_> {
    /// What each owner's images take and free.
    fn deleted_by<O: Ord + Copy>(self, owners_of: impl Fn(ImageId) -> Vec<O>) -> BTreeMap<O, DeletedBytes> {
        let after = self.after.map(|after| after.shares(&owners_of));
        let now = self.now.shares(&owners_of).into_iter();
        let with_after = now.map(|(owner, share)| {
            let after = after
                .as_ref()
                .map(|after| after.get(&owner).copied().unwrap_or_default());
            (owner, DeletedBytes::of(share, after))
        });
        with_after.collect()
    }

    /// What one set of images takes and frees.
    fn deleted(self, is_in: impl Fn(ImageId) -> bool) -> DeletedBytes {
        DeletedBytes::of(self.now.share(&is_in), self.after.map(|after| after.share(&is_in)))
    }

    /// Nothing.
    fn nothing(self) -> DeletedBytes {
        DeletedBytes::of(Share::default(), self.after.map(|_| Share::default()))
    }
}

/// The families of a pool, the largest first. `templates` has the template of machines by name, as far as it is known.
pub(crate) fn families(
    machines: &Machines,
    views: Views<'_>,
    root: &Path,
    templates: &BTreeMap<String, String>,
) -> Vec<FamilyBytes> {
    let names = machines.short_names(root);
    let family_of = families_of(machines, templates, views.after.unwrap_or(views.now), &names);
    let by_machine = views.deleted_by(|image| machines.machines_of(image).to_vec());
    let by_family = views.deleted_by(|image| {
        let families: BTreeSet<Machine> = machines.machines_of(image).iter().map(|one| family_of[*one]).collect();
        families.into_iter().collect()
    });
    let by_revisions = views.deleted_by(|image| {
        if machines.is_revision(image) {
            machines.machines_of(image).to_vec()
        } else {
            Vec::new()
        }
    });
    let mut counts: BTreeMap<Machine, (u64, u64)> = BTreeMap::new();
    for image in machines.images() {
        for machine in machines.machines_of(image) {
            let (images, revisions) = counts.entry(*machine).or_default();
            *images += 1;
            *revisions += u64::from(machines.is_revision(image));
        }
    }
    let deleted = |of: &BTreeMap<Machine, DeletedBytes>, machine| of.get(&machine).copied().unwrap_or(views.nothing());
    let mut members: BTreeMap<Machine, Vec<(bool, MachineBytes)>> = BTreeMap::new();
    for (machine, path) in machines.folders.iter().enumerate() {
        let (image_count, count) = counts.get(&machine).copied().unwrap_or_default();
        let row = MachineBytes {
            name: names[machine].clone(),
            path: path.clone(),
            image_count,
            deleted: deleted(&by_machine, machine),
            revisions: (count > 0).then(|| RevisionBytes {
                count,
                deleted: deleted(&by_revisions, machine),
            }),
        };
        let is_parent = templates.values().any(|template| *template == row.name) || machines.is_template(machine);
        members.entry(family_of[machine]).or_default().push((is_parent, row));
    }
    let mut families: Vec<FamilyBytes> = members
        .into_iter()
        .map(|(family, mut machines)| {
            machines.sort_by_key(|(is_parent, row)| (!is_parent, std::cmp::Reverse(row.deleted.on_disk_bytes)));
            let machines: Vec<MachineBytes> = machines.into_iter().map(|(_, row)| row).collect();
            FamilyBytes {
                name: machines.first().map(|row| row.name.clone()).unwrap_or_default(),
                deleted: deleted(&by_family, family),
                machines,
            }
        })
        .collect();
    families.sort_by_key(|family| std::cmp::Reverse(family.deleted.on_disk_bytes));
    families
}

/// All revisions of a pool.
pub(crate) fn all_revisions(machines: &Machines, views: Views<'_>) -> RevisionBytes {
    let is_revision: Vec<bool> = machines.images().map(|image| machines.is_revision(image)).collect();
    RevisionBytes {
        count: is_revision.iter().filter(|is| **is).count() as u64,
        deleted: views.deleted(|image| is_revision[image.index()]),
    }
}

/// What deleting images would free that some patterns name: one set for each pattern, and one for all of them. An image goes only with all of
/// its names.
pub(crate) fn if_deleted(machines: &Machines, views: Views<'_>, patterns: &[(String, Covering)]) -> Vec<IfDeleted> {
    let of = |patterns: &[(String, Covering)]| {
        let has = |name: &PathBuf| patterns.iter().any(|(_, pattern)| pattern.has(name));
        let is_in: Vec<bool> = machines
            .names
            .iter()
            .map(|names| !names.is_empty() && names.iter().all(has))
            .collect();
        IfDeleted {
            patterns: patterns.iter().map(|(text, _)| text.clone()).collect(),
            image_count: is_in.iter().filter(|is| **is).count() as u64,
            deleted: views.deleted(|image| is_in[image.index()]),
        }
    };
    let mut sets: Vec<IfDeleted> = patterns.iter().map(|one| of(std::slice::from_ref(one))).collect();
    if patterns.len() > 1 {
        sets.push(of(patterns));
    }
    sets
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// The families of images, each written as its names, with what sets of them hold in MiB.
    fn families_of(images: &[&[&str]], sets: &[(&[u32], u64)], templates: &[(&str, &str)]) -> Vec<FamilyBytes> {
        let names = images
            .iter()
            .map(|names| names.iter().map(PathBuf::from).collect())
            .collect();
        let mut now = Holdings::default();
        for (members, mib) in sets {
            let members: Vec<ImageId> = members.iter().copied().map(ImageId).collect();
            now.add(&members, mib * MIB, false);
        }
        let views = Views { now: &now, after: None };
        let templates = templates
            .iter()
            .map(|(one, other)| ((*one).to_owned(), (*other).to_owned()))
            .collect();
        families(&Machines::of(names), views, Path::new("/p"), &templates)
    }

    /// Families as text: the name, what it takes and frees, and its machines likewise, in MiB.
    fn text(families: &[FamilyBytes]) -> Vec<String> {
        let bytes = |of: &DeletedBytes| format!("{}/{}", of.on_disk_bytes / MIB, of.frees_bytes / MIB);
        let machine = |one: &MachineBytes| {
            let revisions = one
                .revisions
                .map(|all| format!("+{} {}", all.count, bytes(&all.deleted)));
            format!("{} {}{}", one.name, bytes(&one.deleted), revisions.unwrap_or_default())
        };
        let family = |one: &FamilyBytes| {
            let machines: Vec<String> = one.machines.iter().map(machine).collect();
            format!("{} {}: {}", one.name, bytes(&one.deleted), machines.join(", "))
        };
        families.iter().map(family).collect()
    }

    #[test]
    fn clones_and_what_qubes_says_derive_from_a_template_are_families() {
        let images: [&[&str]; 5] = [
            &["/p/vm-templates/debian/root.img"],
            &["/p/vm-templates/debian/root.img.1@2026-01-01T00:00:00Z"],
            &["/p/appvms/work/private.img"],
            &["/p/appvms/clone/root.img"],
            &["/p/appvms/lone/private.img"],
        ];
        let sets: [(&[u32], u64); 6] = [
            (&[0, 1, 3], 60),
            (&[0, 1], 10),
            (&[1], 5),
            (&[2], 20),
            (&[3, 4], 4),
            (&[4], 6),
        ];
        assert_eq!(
            text(&families_of(&images, &sets, &[])),
            [
                "debian 79/75: debian 75/15+1 75/5, clone 64/0",
                "work 20/20: work 20/20",
                "lone 10/6: lone 10/6",
            ]
        );
        let told = families_of(&images, &sets, &[("work", "debian"), ("clone", "debian")]);
        assert_eq!(told[0].machines.len(), 3);
        assert_eq!(told[0].name, "debian");
    }

    #[test]
    fn an_image_of_two_machines_goes_with_both() {
        let images: [&[&str]; 1] = [&["/p/appvms/work/root.img", "/p/vm-templates/t/root.img"]];
        assert_eq!(
            text(&families_of(&images, &[(&[0], 8)], &[])),
            ["t 8/8: t 8/0, work 8/0"]
        );
    }

    #[test]
    fn machines_of_one_name_are_told_apart() {
        let images: [&[&str]; 3] = [
            &["/p/a/disk.img"],
            &["/p/b/disk.img"],
            &["/p/b/disk.img.1@2026-01-01T00:00:00Z"],
        ];
        let sets: [(&[u32], u64); 2] = [(&[0], 3), (&[1, 2], 2)];
        assert_eq!(
            text(&families_of(&images, &sets, &[])),
            ["a/disk.img 3/3: a/disk.img 3/3", "b/disk.img 2/2: b/disk.img 2/2+1 2/0"]
        );
    }
}
