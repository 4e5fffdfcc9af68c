//! The text of `report`: what people ask, in the order in which they do, in 80 columns.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter, Result};
use std::path::{Path, PathBuf};

use super::left_alone::{self, in_use};
use super::text::{quoted, reason_name};
use super::{DeletedBytes, FamilyBytes, ImageBytes, MachineBytes, ReportOrder, Reported, RevisionBytes};
use crate::shown::{SizeUnit, columns, counted, shortened, shown};

/// Columns of a terminal.
const COLUMNS: usize = 80;

/// Columns of a name in the table of families.
const NAME_COLUMNS: usize = 37;

/// Columns of a bar that stands for all that is on disk.
const BAR_COLUMNS: u64 = 48;

/// A part of a pool that does not count, in percent of what is on disk.
const NOTHING_PERCENT: u64 = 1;

impl Display for Reported {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let unit = SizeUnit::for_total(self.pool.physical_bytes);
        self.write_head(f, unit)?;
        self.write_reclaim(f, unit)?;
        if self.view.images {
            self.write_images(f, unit)?;
        } else {
            self.write_families(f, unit)?;
            self.write_revisions(f, unit)?;
        }
        self.write_if_deleted(f, unit)?;
        self.write_in_use(f)?;
        self.write_held(f, unit)?;
        left_alone::write(f, &self.skipped)?;
        self.write_next(f)
    }
}

impl Reported {
    /// How much is on disk, and of what.
    fn write_head(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        let on_disk = format!("{} on disk", unit.size(self.pool.physical_bytes));
        let used = match in_use(&self.left_alone).len() {
            _ if self.planned.is_none() => String::new(),
            0 => ", none in use".to_owned(),
            used => format!(", {used} in use"),
        };
        let (images, machines) = (
            counted(self.image_count, "image"),
            counted(self.machine_count, "machine"),
        );
        let counts = format!("{images}, {machines}{used}");
        let root = shown(&self.root).to_string();
        let rest = |gap: &str| format!(" ({}){gap}{on_disk}{gap}{counts}", self.filesystem);
        let fits = |rest: &String| columns(rest) + columns(&root) <= COLUMNS;
        let rest = Some(rest("   ")).filter(fits).unwrap_or_else(|| rest("  "));
        let room = COLUMNS.saturating_sub(columns(&rest)).max(8);
        writeln!(f, "{}{rest}", shortened(&root, room))?;
        if self.pool.compressed_bytes > 0 {
            writeln!(
                f,
                "Compressed: {} on disk for {}",
                unit.size(self.pool.compressed_bytes),
                unit.size(self.pool.uncompressed_bytes)
            )?;
        }
        Ok(())
    }

    /// What a reclaim would free, by reason.
    fn write_reclaim(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        let Some(planned) = &self.planned else {
            return Ok(());
        };
        let on_disk = self.pool.physical_bytes;
        let Some(freed) = u64::try_from(planned.freed_bytes).ok().filter(|freed| *freed > 0) else {
            return writeln!(f, "\nReclaim would free nothing: what is equal is shared already.");
        };
        writeln!(
            f,
            "\nReclaim would free {} ({} %), leaving {}. Deletes nothing.",
            unit.size(freed),
            percent(freed, on_disk),
            unit.number(on_disk.saturating_sub(freed))
        )?;
        let mut reasons: Vec<_> = planned.freed_by_reason.iter().collect();
        reasons.sort_by_key(|(_, bytes)| Reverse(**bytes));
        for (reason, bytes) in reasons {
            let bar = bar(*bytes, on_disk);
            writeln!(f, "  {:12} {:>8} {bar}", reason_name(*reason), unit.number(*bytes))?;
        }
        if planned.sampled > 1 {
            writeln!(
                f,
                "  It looked up one block in {}: more --memory finds more.",
                planned.sampled
            )?;
        }
        Ok(())
    }

    /// Whether what is shown is limited to what a name or path matches.
    fn is_shown(&self, name: &str, path: &Path) -> bool {
        let filter = &self.view.filter;
        filter.is_empty() || filter.iter().any(|one| one.has(path) || one.has(Path::new(name)))
    }

    /// A key by which larger numbers come first, in the order that was asked for.
    fn rank(&self, deleted: &DeletedBytes) -> Reverse<u64> {
        Reverse(match self.view.order {
            ReportOrder::Disk => deleted.on_disk_bytes,
            ReportOrder::Now => deleted.frees_bytes,
            ReportOrder::After => deleted.frees_after_reclaim_bytes.unwrap_or(deleted.frees_bytes),
            ReportOrder::Name => 0,
        })
    }

    /// What deleting each family and each machine would free.
    fn write_families(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        let is_shown = |machine: &&MachineBytes| self.is_shown(&machine.name, &machine.path);
        let mut families: Vec<(&FamilyBytes, Vec<&MachineBytes>)> = self
            .families
            .iter()
            .map(|family| (family, family.machines.iter().filter(is_shown).collect()))
            .filter(|(_, machines): &(_, Vec<_>)| !machines.is_empty())
            .collect();
        if families.is_empty() {
            return Ok(());
        }
        families.sort_by_key(|(family, _)| (self.rank(&family.deleted), &family.name));
        let after = self.planned.is_some();
        let title = format!("Family / machine, {}", unit.name);
        writeln!(f, "\n{:NAME_COLUMNS$} {:>12}   {:>24}", "", "", "Deleting it frees")?;
        write!(f, "{title:NAME_COLUMNS$} {:>12} {:>12}", "On disk", "now")?;
        writeln!(f, "{}", if after { "   after reclaim" } else { "" })?;
        let top = self.view.top.unwrap_or(usize::MAX);
        for (family, machines) in families.iter().take(top) {
            let mut indent = 0;
            if family.machines.len() > 1 {
                write_row(f, unit, 0, &format!("{} family", family.name), &family.deleted)?;
                indent = 2;
            }
            let mut machines = machines.clone();
            // The one that the others derive from stays first if nothing else was asked for.
            if self.view.order != ReportOrder::Disk {
                machines.sort_by_key(|machine| (self.rank(&machine.deleted), &machine.name));
            }
            for machine in machines.iter().take(top) {
                write_row(f, unit, indent, &machine.name, &machine.deleted)?;
                if let Some(RevisionBytes { count, deleted }) = &machine.revisions {
                    write_row(f, unit, indent + 2, &counted(*count, "revision"), deleted)?;
                }
            }
            write_more(f, indent, machines.len().saturating_sub(top), "machine")?;
        }
        write_more(f, 0, families.len().saturating_sub(top), "family")
    }

    /// Whether revisions are worth deleting.
    fn write_revisions(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        let RevisionBytes { count, deleted } = &self.revisions;
        if *count == 0 {
            return Ok(());
        }
        let nothing = self.pool.physical_bytes / 100 * NOTHING_PERCENT;
        let (now, after) = (deleted.frees_bytes, deleted.frees_after_reclaim_bytes);
        match after {
            Some(after) if after <= nothing && now <= nothing => {
                writeln!(f, "Deleting revisions gains nothing: keep them.")
            }
            Some(after) if after <= nothing => writeln!(
                f,
                "Deleting revisions would free {} now, and next to nothing after a reclaim: keep them.",
                unit.size(now)
            ),
            Some(after) => writeln!(
                f,
                "Deleting all {} would free {} now, {} after a reclaim.",
                counted(*count, "revision"),
                unit.size(now),
                unit.number(after)
            ),
            None => writeln!(
                f,
                "Deleting all {} would free {}.",
                counted(*count, "revision"),
                unit.size(now)
            ),
        }
    }

    /// What each image takes, and what deleting it would free.
    fn write_images(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        let after = self.planned.is_some();
        let is_compressed = self.pool.compressed_bytes > 0;
        let mut images: Vec<(&ImageBytes, DeletedBytes)> = self
            .images
            .iter()
            .filter(|image| self.is_shown("", &image.path))
            .map(|image| (image, image.deleted()))
            .collect();
        images.sort_by_key(|(image, deleted)| (self.rank(deleted), &image.path));
        writeln!(f, "\n{:27}{:>18}", "", "Deleting it frees")?;
        write!(f, "{:>9}{:>9}{:>9}{:>9}", "Size", "Mapped", "On disk", "now")?;
        write!(f, "{}", if after { "    after" } else { "" })?;
        write!(f, "{}", if is_compressed { "   Packed     from" } else { "" })?;
        writeln!(f, "  Image, {}", unit.name)?;
        let top = self.view.top.unwrap_or(usize::MAX);
        for (image, deleted) in images.iter().take(top) {
            let mut numbers = vec![image.size, image.data_bytes, deleted.on_disk_bytes, deleted.frees_bytes];
            numbers.extend(deleted.frees_after_reclaim_bytes);
            if is_compressed {
                numbers.extend([image.compressed_bytes, image.uncompressed_bytes]);
            }
            let cells: Vec<String> = numbers
                .iter()
                .map(|bytes| format!("{:>9}", unit.number(*bytes)))
                .collect();
            let row = cells.concat();
            let path = image.path.strip_prefix(&self.root).unwrap_or(&image.path);
            let room = COLUMNS.saturating_sub(columns(&row) + 2);
            writeln!(f, "{row}  {}", shortened(&shown(path).to_string(), room))?;
        }
        write_more(f, 0, images.len().saturating_sub(top), "image")
    }

    /// What deleting the sets of images would free that the user asked for.
    fn write_if_deleted(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        for set in &self.if_deleted {
            let names: Vec<String> = set
                .patterns
                .iter()
                .map(|name| shown(Path::new(name)).to_string())
                .collect();
            write!(
                f,
                "If {} were deleted ({}): {} freed",
                names.join(" and "),
                counted(set.image_count, "image"),
                unit.size(set.deleted.frees_bytes)
            )?;
            match set.deleted.frees_after_reclaim_bytes {
                Some(after) => writeln!(f, " now, {} after a reclaim", unit.number(after))?,
                None => writeln!(f)?,
            }
        }
        Ok(())
    }

    /// What is in use, one line a machine.
    fn write_in_use(&self, f: &mut Formatter<'_>) -> Result {
        let used = in_use(&self.left_alone);
        if !used.is_empty() {
            writeln!(
                f,
                "\nIn use, so that a reclaim leaves them alone. Shut them down to include them:"
            )?;
        }
        for one in &used {
            let image = shown(one.shows.path.file_name().map_or(&one.shows.path, Path::new)).to_string();
            let why = one.shows.detail.as_deref().unwrap_or_else(|| one.shows.reason.name());
            let images = counted(one.images, "image");
            let line = if one.is_machine {
                format!("  {:20} {images:>10}   {image}: {why}", shortened(&one.name, 20))
            } else {
                format!("  {image}: {why}")
            };
            writeln!(f, "{}", shortened(&line, COLUMNS))?;
        }
        let used: BTreeSet<&PathBuf> = used.iter().map(|one| &one.shows.path).collect();
        let others = self.left_alone.iter().filter(|image| !used.contains(&image.path));
        let others: Vec<_> = others.filter(|image| !image.reason.is_in_use()).cloned().collect();
        left_alone::write(f, &others)
    }

    /// What others hold, one line a holder, and what to name to include them.
    fn write_held(&self, f: &mut Formatter<'_>, unit: SizeUnit) -> Result {
        /// Holders that are shown. The JSON has all of them.
        const HOLDERS_MAX: usize = 8;
        if self.held_bytes == 0 {
            return Ok(());
        }
        writeln!(
            f,
            "\nSnapshots or files outside hold {} of it, which nothing here can free:",
            unit.size(self.held_bytes)
        )?;
        let holders = self.holders();
        for (holder, bytes) in holders.iter().take(HOLDERS_MAX) {
            let name = shortened(&shown(&holder.path).to_string(), 60);
            writeln!(f, "  {name}  {} or less", unit.number(*bytes))?;
        }
        write_more(f, 2, holders.len().saturating_sub(HOLDERS_MAX), "holder")?;
        let reachable: Vec<&Path> = holders
            .iter()
            .filter(|(holder, _)| holder.is_reachable)
            .map(|(holder, _)| holder.path.as_path())
            .collect();
        if reachable.is_empty() || self.reclaim_command.is_empty() {
            return Ok(());
        }
        let more = reachable
            .iter()
            .take(HOLDERS_MAX)
            .map(|path| quoted(&path.to_string_lossy()));
        let command = self.command().into_iter().chain(more).collect::<Vec<_>>();
        writeln!(f, "To include them, name them as well: {}", command.join(" "))
    }

    /// Who holds parts of the pool, with the bytes that each holds at most. Of a copy of the pool, such as a snapshot, the folder counts.
    fn holders(&self) -> Vec<(Holder, u64)> {
        let relative = self
            .images
            .iter()
            .map(|image| image.path.strip_prefix(&self.root).unwrap_or(&image.path));
        let relative: BTreeSet<&Path> = relative.collect();
        let mut holders: BTreeMap<Holder, u64> = BTreeMap::new();
        for (name, bytes) in &self.held_by {
            *holders.entry(Holder::of(name, &relative)).or_default() += bytes;
        }
        let mut holders: Vec<_> = holders.into_iter().collect();
        holders.sort_by_key(|(_, bytes)| Reverse(*bytes));
        holders
    }

    /// The command that reclaims, quoted for a shell.
    fn command(&self) -> Vec<String> {
        self.reclaim_command.iter().map(|word| quoted(word)).collect()
    }

    /// The one next command.
    fn write_next(&self, f: &mut Formatter<'_>) -> Result {
        if self.reclaim_command.is_empty() {
            return Ok(());
        }
        if self.held_bytes > 0 || !self.left_alone.is_empty() || !self.skipped.is_empty() {
            writeln!(f)?;
        }
        let command = self.command().join(" ");
        match &self.planned {
            Some(planned) if planned.freed_bytes > 0 => writeln!(f, "Next: {command}"),
            Some(_) if !in_use(&self.left_alone).is_empty() => {
                writeln!(f, "Next, with those in use shut down: {command}")
            }
            Some(_) => writeln!(f, "Next, after updates of the machines: {command}"),
            None => writeln!(f, "Next: {command} --dry-run"),
        }
    }
}

impl ImageBytes {
    /// What the image takes, and what deleting it would free.
    fn deleted(&self) -> DeletedBytes {
        DeletedBytes {
            on_disk_bytes: self.exclusive_bytes + self.shared_bytes,
            frees_bytes: self.exclusive_bytes,
            frees_after_reclaim_bytes: self.exclusive_after_reclaim_bytes,
        }
    }
}

/// Something outside that holds parts of a pool.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Holder {
    /// Its path: of a copy of the pool, that of the folder; otherwise the file. It is a description where there is no path.
    path: PathBuf,
    /// Whether it can be named.
    is_reachable: bool,
}

impl Holder {
    /// The holder that a file is part of. `relative` has the paths of images below the pool's folder.
    fn of(name: &str, relative: &BTreeSet<&Path>) -> Self {
        let path = PathBuf::from(name);
        // What cannot be named has no path from the root, or a remark behind it.
        if !path.is_absolute() || name.ends_with(')') {
            return Self {
                path,
                is_reachable: false,
            };
        }
        let copy = path.ancestors().skip(1).collect::<Vec<_>>();
        // The longest end of the path that is an image of the pool tells which folder is a copy of the pool.
        let root = copy
            .into_iter()
            .rev()
            .find(|above| path.strip_prefix(above).is_ok_and(|below| relative.contains(below)));
        Self {
            path: root.map_or_else(|| path.clone(), Path::to_owned),
            is_reachable: true,
        }
    }
}

/// Writes a row of the table of families.
fn write_row(f: &mut Formatter<'_>, unit: SizeUnit, indent: usize, name: &str, deleted: &DeletedBytes) -> Result {
    let name = shown(Path::new(name)).to_string();
    let name = format!("{:indent$}{}", "", shortened(&name, NAME_COLUMNS - indent));
    let pad = NAME_COLUMNS.saturating_sub(columns(&name));
    write!(
        f,
        "{name}{:pad$} {:>12} {:>12}",
        "",
        unit.number(deleted.on_disk_bytes),
        unit.number(deleted.frees_bytes)
    )?;
    match deleted.frees_after_reclaim_bytes {
        Some(after) => writeln!(f, " {:>15}", unit.number(after)),
        None => writeln!(f),
    }
}

/// Writes how many more there are than are shown.
fn write_more(f: &mut Formatter<'_>, indent: usize, more: usize, thing: &str) -> Result {
    match more {
        0 => Ok(()),
        more => {
            let counted = counted(more as u64, thing).replacen(' ', " more ", 1);
            writeln!(f, "{:indent$}and {counted}", "")
        }
    }
}

/// A part of a whole in percent, rounded.
fn percent(part: u64, whole: u64) -> u64 {
    let whole = u128::from(whole.max(1));
    u64::try_from((u128::from(part) * 100 + whole / 2) / whole).unwrap_or(100)
}

/// A bar of blocks and eighths of one.
fn bar(part: u64, whole: u64) -> String {
    const EIGHTHS: [&str; 8] = [
        "", "\u{258f}", "\u{258e}", "\u{258d}", "\u{258c}", "\u{258b}", "\u{258a}", "\u{2589}",
    ];
    let eighths = u128::from(part) * u128::from(BAR_COLUMNS) * 8 / u128::from(whole.max(1));
    let eighths = usize::try_from(eighths).unwrap_or(0);
    format!("{}{}", "\u{2588}".repeat(eighths / 8), EIGHTHS[eighths % 8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::{Extent, Facts, Reference, SharedList};
    use crate::numbers::{ExtentId, ImageId, Slot};
    use crate::plan::{Holdings, Layers};
    use crate::report::families::{Machines, Views, all_revisions, families};
    use crate::report::{Planned, PoolBytes};
    use crate::testing::simulated::PLAIN;

    const MIB: u64 = 1 << 20;
    const IMAGES: u32 = 500;

    /// A pool of 1 TiB in extents of 1 MiB: 50 machines of ten images each. Every extent is of one machine, and of some of its revisions;
    /// every hundredth is of ten machines.
    fn large_pool() -> Facts {
        const EXTENTS: u32 = 1 << 20;
        const BLOCKS: u32 = 256;
        let extent = |number: u32| Extent {
            address: u64::from(number) * MIB,
            disk_bytes: MIB,
            generation: 1,
            first_slot: Slot(number * BLOCKS),
            blocks: BLOCKS,
            class: PLAIN,
            pinned: None,
            compression_goal: None,
        };
        let reference = |number: u32, image: u32| Reference {
            image: ImageId(image),
            file_block: number * BLOCKS,
            slot: Slot(number * BLOCKS),
            blocks: BLOCKS,
            extent: ExtentId(number),
            preallocated: false,
        };
        let references = (0..EXTENTS).flat_map(|number| {
            let machine = number % 50;
            let revisions = (number / 50) % 10 + 1;
            let step = if number % 100 == 0 { 50 } else { 1 };
            (0..revisions).map(move |revision| reference(number, (machine * 10 + revision * step) % IMAGES))
        });
        let mappings = SharedList::from_references_in(references, &crate::spill::Budget::default());
        Facts::new((0..EXTENTS).map(extent).collect(), mappings, 0)
    }

    /// A report on images with long names.
    fn report_on(facts: &Facts) -> Reported {
        let machine = |image: u32| {
            format!(
                "/var/lib/qubes/appvms/machine-of-a-user-who-likes-long-names-{:03}",
                image / 10
            )
        };
        let paths: Vec<PathBuf> = (0..IMAGES)
            .map(|image| match image % 10 {
                0 => format!("{}/private.img", machine(image)).into(),
                n => format!("{}/private.img.{n}@2026-01-02T03:04:05Z", machine(image)).into(),
            })
            .collect();
        let now = Holdings::of(facts);
        let layers = Layers::of(facts);
        let numbers: Vec<_> = (0..IMAGES / 2).map(|image| Some(ImageId(image))).collect();
        let after = layers.beside(&numbers, &layers);
        let views = Views {
            now: &now,
            after: Some(&after),
        };
        let machines = Machines::of(paths.iter().map(|path| BTreeSet::from([path.clone()])).collect());
        let root = PathBuf::from("/var/lib/qubes");
        let images = paths.into_iter().map(|path| ImageBytes {
            path,
            size: MIB << 20,
            exclusive_after_reclaim_bytes: Some(0),
            ..ImageBytes::default()
        });
        Reported {
            families: families(&machines, views, &root, &BTreeMap::new()),
            revisions: all_revisions(&machines, views),
            machine_count: machines.count(),
            image_count: u64::from(IMAGES),
            images: images.collect(),
            filesystem: "btrfs",
            pool: PoolBytes {
                physical_bytes: facts.extents.iter().map(|extent| extent.disk_bytes).sum(),
                compressed_bytes: MIB,
                ..PoolBytes::default()
            },
            planned: Some(Planned {
                freed_bytes: 1 << 38,
                freed_by_reason: [(crate::plan::EliminationReason::Duplicate, 1 << 38)].into(),
                ..Planned::default()
            }),
            root,
            ..Reported::default()
        }
    }

    #[test]
    fn a_large_pool_is_told_in_80_columns_and_in_time() {
        // Tests are not built for speed.
        const SECONDS_MAX: u64 = if cfg!(debug_assertions) { 20 } else { 2 };
        let facts = large_pool();
        let begin = std::time::Instant::now();
        let mut reported = report_on(&facts);
        let mut text = reported.to_string();
        reported.view.images = true;
        reported.view.top = Some(40);
        text += &reported.to_string();
        assert!(begin.elapsed().as_secs() < SECONDS_MAX, "{:?}", begin.elapsed());
        let wide: Vec<&str> = text.lines().filter(|line| columns(line) > COLUMNS).collect();
        assert!(wide.is_empty(), "{wide:#?}");
        assert!(text.starts_with("/var/lib/qubes (btrfs)  1024.0 GiB on disk  500 images, 50 machines, none in use"));
        assert!(text.contains("and 460 more images"), "{text}");
    }

    #[test]
    fn bars_are_told_in_eighths() {
        let bars = [0, 1, 48, 49, 96].map(|part| bar(part, 96));
        assert_eq!(
            bars,
            [
                "",
                "\u{258c}",
                &"\u{2588}".repeat(24),
                &format!("{}\u{258c}", "\u{2588}".repeat(24)),
                &"\u{2588}".repeat(48)
            ]
        );
        assert_eq!([percent(1, 3), percent(2, 3), percent(0, 0)], [33, 67, 0]);
    }

    #[test]
    fn a_copy_of_the_pool_is_one_holder() {
        let relative: BTreeSet<&Path> = ["appvms/w/private.img", "a.img"].into_iter().map(Path::new).collect();
        let holder = |name: &str| {
            let found = Holder::of(name, &relative);
            (found.path.display().to_string(), found.is_reachable)
        };
        assert_eq!(holder("/snap/1/appvms/w/private.img"), ("/snap/1".into(), true));
        assert_eq!(holder("/snap/1/a.img"), ("/snap/1".into(), true));
        assert_eq!(holder("/home/me/other"), ("/home/me/other".into(), true));
        let gone = "snap/a.img (in a subvolume that is not mounted)";
        assert_eq!(holder(gone), (gone.into(), false));
    }
}
