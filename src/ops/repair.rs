//! `repair`: heals a damaged archive from its parity, and from another copy of it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::archive::open::{End, ends_in_leftovers_only, search};
use crate::archive::reader::{Archive, Damage, RecordReader};
use crate::archive::record::{HEADER_BYTES, RecordKind};
use crate::block::ByteRange;
use crate::error::{Error, Result};
use crate::exec::repair::{Healer, Healing, InPlace, refuse_pending, write_copy};
use crate::monitor::Monitor;
use crate::report::{DamagedPlace, Repaired};
use crate::store::{FileStore, Store};

/// Where a repaired archive is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RepairTo {
    /// To a new file.
    Copy(PathBuf),
    /// Into the archive itself.
    InPlace,
    /// Nowhere: it is only said what would heal.
    Nowhere,
}

/// Which archive is repaired, where to, and from what.
#[derive(Debug, Clone)]
pub struct RepairOptions {
    /// The archive.
    pub archive: PathBuf,
    /// Where the repaired one is written.
    pub to: RepairTo,
    /// Another copy of the archive, from which is taken what parity cannot heal.
    pub from: Option<PathBuf>,
}

/// Repairs an archive. What cannot be healed is no error: the result lists it.
///
/// # Errors
/// [`Error::NoSuchPath`], [`Error::NotAnArchive`], [`Error::Exists`]; [`Error::Usage`] if an interrupted repair in place is to be ended first;
/// [`Error::OfAnother`] if another user put something beside an archive that is repaired in place; [`Error::NoSpace`] or [`Error::Io`] if it cannot
/// be read or written; [`Error::Interrupted`]. After an error there is no copy, and an archive that is repaired in place is as it was, or
/// the next repair in place ends what was begun.
pub fn repair(options: &RepairOptions, monitor: &dyn Monitor) -> Result<Repaired> {
    let second = options.from.as_deref().map(FileStore::open).transpose()?;
    let second = second.map(|second| Arc::new(second) as Arc<dyn Store>);
    match &options.to {
        RepairTo::InPlace => repair_in_place(&options.archive, second, monitor),
        RepairTo::Copy(to) => {
            refuse_pending(&options.archive)?;
            repair_to(&options.archive, to, second, monitor)
        }
        RepairTo::Nowhere => {
            refuse_pending(&options.archive)?;
            let store = Arc::new(FileStore::open(&options.archive)?);
            let cells = tempfile::tempfile().map_err(Error::io("make a file in", &std::env::temp_dir()))?;
            let (view, healing) = Healer::new(store, second, cells, monitor)?.heal()?;
            let mut report = report_of(&options.archive, healing);
            report.dry_run = true;
            report.damage = left_in(view, monitor)?;
            Ok(report)
        }
    }
}

fn repair_to(path: &Path, to: &Path, second: Option<Arc<dyn Store>>, monitor: &dyn Monitor) -> Result<Repaired> {
    if to.symlink_metadata().is_ok() {
        return Err(Error::Exists {
            paths: vec![to.to_owned()],
        });
    }
    let parent = to
        .parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let store = Arc::new(FileStore::open(path)?);
    let cells = tempfile::tempfile_in(parent).map_err(Error::io("make a file in", parent))?;
    let (view, healing) = Healer::new(store, second, cells, monitor)?.heal()?;
    let mut report = report_of(path, healing);
    let mut damage = Vec::new();
    let mut check = |copy| {
        damage = left_in(copy, monitor)?;
        Ok(())
    };
    write_copy(&view, to, &mut check, monitor)?;
    report.damage = damage;
    report.to = Some(to.to_owned());
    Ok(report)
}

fn repair_in_place(path: &Path, second: Option<Arc<dyn Store>>, monitor: &dyn Monitor) -> Result<Repaired> {
    let in_place = InPlace::begin(path, monitor)?;
    let (view, healing) = Healer::new(in_place.store(), second, in_place.cells()?, monitor)?.heal()?;
    let mut report = report_of(path, healing);
    report.damage = left_in(Arc::clone(&view) as _, monitor)?;
    let was_pending = in_place.was_pending();
    report.in_place = in_place.write(&view)? || was_pending;
    Ok(report)
}

fn report_of(path: &Path, healing: Healing) -> Repaired {
    Repaired {
        archive: path.to_owned(),
        archive_bytes: healing.length,
        percent: healing.percent,
        protected_bytes: healing.protected_bytes,
        lost_bytes: healing.lost_bytes,
        moved_bytes: healing.moved_bytes,
        healed_bytes: healing.healed_bytes,
        taken_bytes: healing.taken_bytes,
        ..Repaired::default()
    }
}

/// Reads a repaired archive, and returns what of it is still damaged.
fn left_in(store: Arc<dyn Store>, monitor: &dyn Monitor) -> Result<Vec<DamagedPlace>> {
    monitor.phase("Checking records", 0);
    let mut damage = match Archive::open_any(Arc::clone(&store)) {
        Ok(archive) => damage_of(&archive)?,
        Err(error @ Error::Io { .. }) => return Err(error),
        // What this version cannot open, or nobody without a key, is proved by hashes all the same.
        Err(_) => damage_of_records(store)?,
    };
    damage.sort_by_key(|damage| (damage.range.start, damage.range.length));
    let places = damage.into_iter().map(|damage| DamagedPlace {
        range: damage.range,
        problem: damage.problem,
    });
    Ok(places.collect())
}

fn damage_of(archive: &Archive) -> Result<Vec<Damage>> {
    let mut damage = archive.look_for_damage()?;
    damage.append(&mut archive.stray_commits()?);
    if archive.has_leftovers_only()? {
        damage.retain(|damage| damage.range.start < archive.base().length);
    }
    if archive.last_of_main().is_none() {
        let all = ByteRange {
            start: 0,
            length: archive.length(),
        };
        damage.push(Damage::at(all, "none of its commits is intact"));
    }
    Ok(damage)
}

/// What a search finds of an archive that cannot be opened.
fn damage_of_records(store: Arc<dyn Store>) -> Result<Vec<Damage>> {
    let reader = RecordReader::new(store)?;
    let mut searched = search(&reader)?;
    let tells = |kind| matches!(kind, RecordKind::Commit | RecordKind::Tail);
    let last = searched.records.iter().rfind(|(header, _)| tells(header.kind));
    let end = last.map_or(0, |(header, at)| at + HEADER_BYTES as u64 + header.body_bytes);
    let leftovers = End {
        offset: end,
        ..End::default()
    };
    if end > 0 && ends_in_leftovers_only(&reader, leftovers)? {
        searched.damage.retain(|damage| damage.range.start < end);
    }
    if searched.records.is_empty() {
        return Err(reader.nothing_intact());
    }
    Ok(searched.damage)
}
