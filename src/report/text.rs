//! Reports as text for people.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter, Result};
use std::path::Path;

use super::left_alone;
use super::{
    Change, Diffed, Done, Exported, FilledVolume, Imported, Listed, ListedBackup, LostImage, ParityState, Planned,
    PoolBytes, Protected, QubesImport, Reclaimed, Repaired, Scanned, Verified, WrittenSkeleton,
};
use crate::block::ByteRange;
use crate::facts::PinReason;
use crate::index::IndexStatus;
use crate::plan::EliminationReason;
use crate::shown::{counted, shown, size};

/// The name of a reason in the text.
pub(super) fn reason_name(reason: EliminationReason) -> &'static str {
    match reason {
        EliminationReason::Duplicate => "duplicates",
        EliminationReason::Zeros => "zeros",
        EliminationReason::Unreachable => "unreachable",
        EliminationReason::Preallocated => "preallocated",
        EliminationReason::Compressed => "compression",
    }
}

impl Display for PoolBytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "{} on disk for {} mapped, {} with holes ({}, {})",
            size(self.physical_bytes),
            size(self.referenced_bytes),
            size(self.logical_bytes),
            counted(self.extents, "extent"),
            counted(self.references, "reference")
        )?;
        if self.compressed_bytes > 0 {
            write!(
                f,
                ", {} of it compressed from {}",
                size(self.compressed_bytes),
                size(self.uncompressed_bytes)
            )?;
        }
        Ok(())
    }
}

impl Display for Exported {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(
            f,
            "Commit {} ({}) of `{}`: {}, {} of data in {}",
            self.commit,
            self.id,
            shown(&self.archive),
            counted(self.images, "image"),
            size(self.data_bytes),
            size(self.logical_bytes)
        )?;
        writeln!(
            f,
            "Read {}, {} known from before; {} new, stored in {}; the archive has {}",
            size(self.read_bytes),
            size(self.known_bytes),
            size(self.new_bytes),
            size(self.written_bytes),
            size(self.archive_bytes)
        )?;
        if self.parity_bytes > 0 {
            writeln!(f, "Parity: {} of what was written", size(self.parity_bytes))?;
        }
        left_alone::write(f, &self.skipped)
    }
}

impl Display for Protected {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        if self.was_protected {
            return writeln!(
                f,
                "All of `{}` has parity already, of {} %: nothing was written",
                shown(&self.archive),
                self.percent
            );
        }
        writeln!(
            f,
            "{} of `{}` got parity of {} %, which takes {}; the archive has {}",
            size(self.protected_bytes),
            shown(&self.archive),
            self.percent,
            size(self.parity_bytes),
            size(self.archive_bytes)
        )
    }
}

/// Ranges as text, with commas between them.
fn joined<'a>(ranges: impl Iterator<Item = &'a ByteRange>) -> String {
    ranges.map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

impl Display for LostImage {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "Lost: {}: {}", shown(&self.path), joined(self.ranges.iter()))?;
        if let Some(name) = &self.restored_as {
            write!(f, "; the rest of it is `{}`", shown(name))?;
        }
        writeln!(f)
    }
}

impl Display for Imported {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.write_result(f)?;
        self.write_content(f)?;
        if self.later_damage {
            f.write_str(match self.kind {
                Some(_) => "The backup is damaged: what came behind the damage is lost\n",
                None => "The archive is damaged behind this commit: a later one may be lost\n",
            })?;
        }
        self.lost.iter().try_for_each(|lost| write!(f, "{lost}"))?;
        let mut left_out = self.left_out.iter();
        left_out.try_for_each(|path| writeln!(f, "Left out for lack of space: `{}`", shown(path)))?;
        if self.failed.is_some() {
            writeln!(
                f,
                "Left out as well: what comes behind that in the backup, if anything does"
            )?;
        }
        self.revisions.iter().try_for_each(|revision| {
            write!(
                f,
                "{} {} `{}`",
                shown(&revision.path),
                if self.dry_run { "would become" } else { "is now" },
                shown(&revision.name)
            )?;
            if revision.command.is_empty() {
                return writeln!(f);
            }
            let words: Vec<String> = revision.command.iter().map(|word| quoted(word)).collect();
            writeln!(f, "; to go back to it: {}", words.join(" "))
        })
    }
}

impl Imported {
    /// Writes what was done, or would be.
    fn write_result(&self, f: &mut Formatter<'_>) -> Result {
        let to = shown(&self.to);
        let Some(done) = &self.done else {
            if self.dry_run {
                return writeln!(
                    f,
                    "Would restore {} to `{to}`: {} written, {} shared with what is there",
                    counted(self.planned.images, "image"),
                    size(self.planned.new_bytes),
                    size(self.planned.seeded_bytes)
                );
            }
            if !self.lost.is_empty() {
                writeln!(f, "Nothing was restored: --partial restores what is intact")?;
            }
            return Ok(());
        };
        writeln!(
            f,
            "Restored {} to `{to}`: {} written, {} shared with what was there{}",
            counted(done.images, "image"),
            size(done.written_bytes + done.copied_bytes),
            size(done.seeded_bytes),
            match done.resumed_bytes {
                0 => String::new(),
                resumed => format!(", {} from the interrupted import", size(resumed)),
            }
        )
    }

    /// Writes what it came from, and what that holds.
    fn write_content(&self, f: &mut Formatter<'_>) -> Result {
        let planned = &self.planned;
        match self.kind {
            Some(kind) => write!(f, "`{}`, {kind}", shown(&self.archive))?,
            None if self.id.is_empty() => write!(f, "What is left of `{}`", shown(&self.archive))?,
            None => write!(f, "Commit {} ({}) of `{}`", self.commit, self.id, shown(&self.archive))?,
        }
        writeln!(
            f,
            ": {}, {} of data in {}",
            counted(planned.images, "image"),
            size(planned.data_bytes),
            size(planned.logical_bytes)
        )?;
        write!(
            f,
            "{} distinct: {} new, {} on this disk already",
            size(planned.distinct_bytes),
            size(planned.new_bytes),
            size(planned.seeded_bytes)
        )?;
        // What an image that was left out took is not in the plan.
        if self.failed.is_none() {
            let (needed, free) = (size(planned.needed_bytes), size(planned.free_bytes));
            write!(f, "; takes up to {needed}, {free} free")?;
        }
        writeln!(f)
    }
}

impl Display for QubesImport {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        if let Some(imported) = &self.imported {
            imported.fmt(f)?;
        }
        self.filled.iter().try_for_each(|filled| {
            let replaced = if filled.replaced {
                ", in the place of what it held"
            } else {
                ""
            };
            let FilledVolume { machine, volume, .. } = filled;
            writeln!(f, "Filled `{machine}:{volume}`: {}{replaced}", size(filled.size))
        })
    }
}

impl Display for WrittenSkeleton {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(
            f,
            "`{}` has what `{}` holds beside images",
            shown(&self.skeleton),
            shown(&self.archive)
        )?;
        let words: Vec<String> = self.command.iter().map(|word| quoted(word)).collect();
        writeln!(
            f,
            "This makes its machines: {}\nThen `vmfold import --qubes` fills their volumes",
            words.join(" ")
        )
    }
}

/// A word as a shell takes it.
pub(super) fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./+@:".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", shown(Path::new(&word.replace('\'', "'\\''"))))
}

impl Display for Listed {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(
            f,
            "`{}`: {} in {}",
            shown(&self.archive),
            counted(self.commit_count, "commit"),
            size(self.archive_bytes)
        )?;
        if self.is_damaged {
            writeln!(f, "It is damaged, or holds more than these: vmfold verify tells what")?;
        }
        writeln!(
            f,
            "{:>6}  {:8}  {:23}  {:>6}  {:>11}  {:>11}  {:>11}  Label",
            "Commit", "Name", "Time", "Images", "Size", "Added", "Stored"
        )?;
        for commit in &self.commits {
            writeln!(
                f,
                "{:>6}  {:8}  {:23}  {:>6}  {:>11}  {:>11}  {:>11}  {}",
                commit.number,
                commit.id,
                commit.time,
                commit.images.len(),
                size(commit.logical_bytes),
                size(commit.added_bytes),
                size(commit.stored_bytes),
                shown(std::path::Path::new(&commit.label))
            )?;
        }
        if self.shows_images {
            for commit in &self.commits {
                writeln!(f, "\n{:>11} {:>11} {:>11}  Image", "Size", "Data", "Added")?;
                for image in &commit.images {
                    writeln!(
                        f,
                        "{:>11} {:>11} {:>11}  {}",
                        size(image.size),
                        size(image.data_bytes),
                        size(image.added_bytes),
                        shown(&image.path)
                    )?;
                }
            }
        }
        Ok(())
    }
}

impl Display for ListedBackup {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "`{}`, {}: {} in {}",
            shown(&self.archive),
            self.kind,
            counted(self.volumes.len() as u64, "image"),
            size(self.archive_bytes)
        )?;
        match self.distinct_bytes.filter(|_| self.is_verified) {
            Some(distinct) => writeln!(f, ", {} distinct: whole, as far as its format tells", size(distinct))?,
            None => writeln!(f)?,
        }
        let told = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), size);
        writeln!(f, "{:>11}  {:>11}  Image", "Size", "Data")?;
        for volume in &self.volumes {
            let (size, data) = (told(volume.size), told(volume.data_bytes));
            writeln!(f, "{size:>11}  {data:>11}  {}", shown(&volume.path))?;
        }
        Ok(())
    }
}

impl Display for Verified {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.write_result(f)?;
        for place in &self.damage {
            writeln!(f, "Damaged: {}: {}", place.range, place.problem)?;
        }
        for lost in &self.lost {
            write!(f, "Commit {}: {}", lost.commit, lost.lost)?;
        }
        if self.leftover_bytes > 0 {
            writeln!(
                f,
                "An export that did not end left {} behind the last commit: the next one removes it",
                size(self.leftover_bytes)
            )?;
        } else if !self.is_ended {
            writeln!(
                f,
                "It does not end with its last commit: an export did not end, or it was cut off"
            )?;
        }
        match &self.parity {
            Some(parity) => parity.fmt(f),
            None => Ok(()),
        }
    }
}

impl Verified {
    /// Writes what was verified, and whether it is intact.
    fn write_result(&self, f: &mut Formatter<'_>) -> Result {
        if self.is_without_key {
            return writeln!(
                f,
                "{} in {}, encrypted: {}. What is in them was not verified, because {}",
                counted(self.commits, "commit"),
                size(self.archive_bytes),
                if self.damage.is_empty() {
                    "every record is intact"
                } else {
                    "damaged"
                },
                if self.has_lost_keys {
                    crate::archive::keys::KEYS_LOST
                } else {
                    "no key was given"
                }
            );
        }
        writeln!(
            f,
            "{} with {}, {} of blocks in {}: {}",
            counted(self.commits, "commit"),
            counted(self.images, "image"),
            size(self.verified_bytes),
            size(self.archive_bytes),
            match (self.damage.is_empty(), self.lost.is_empty()) {
                (true, true) => "all intact",
                (false, true) if self.commits > 0 => "damaged, but every image can be restored",
                _ => "damaged",
            }
        )
    }
}

impl Display for ParityState {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(
            f,
            "Parity of {} % for {}, none for {}: ",
            self.percent,
            size(self.protected_bytes),
            size(self.unprotected_bytes)
        )?;
        if !self.heals {
            return writeln!(f, "{} are lost, more than it can heal", size(self.lost_bytes));
        }
        match self.lost_bytes {
            0 => write!(f, "nothing is lost there")?,
            lost => write!(f, "{} are lost, and would heal by vmfold repair", size(lost))?,
        }
        writeln!(f, "; {} more would still heal, at any place", size(self.spare_bytes))
    }
}

impl Display for Repaired {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.write_result(f)?;
        for place in &self.damage {
            writeln!(f, "Damaged: {}: {}", place.range, place.problem)?;
        }
        match self.percent {
            0 => writeln!(f, "It has no parity")?,
            percent => writeln!(
                f,
                "Parity of {percent} % for {}: {} lost, {} computed, {} moved",
                size(self.protected_bytes),
                size(self.lost_bytes),
                size(self.healed_bytes),
                size(self.moved_bytes)
            )?,
        }
        if self.taken_bytes > 0 {
            writeln!(f, "Taken from the other copy: {}", size(self.taken_bytes))?;
        }
        Ok(())
    }
}

impl Repaired {
    /// Writes what was written, and whether all of it is intact.
    fn write_result(&self, f: &mut Formatter<'_>) -> Result {
        let state = match self.damage.len() {
            0 => "all intact".to_owned(),
            1 => "one place is still damaged".to_owned(),
            places => format!("{places} places are still damaged"),
        };
        match &self.to {
            Some(to) => writeln!(f, "`{}`, {}: {state}", shown(to), size(self.archive_bytes)),
            None if self.dry_run => writeln!(f, "A repair would give {}: {state}", size(self.archive_bytes)),
            None if self.in_place => writeln!(f, "Repaired in place, {}: {state}", size(self.archive_bytes)),
            None => writeln!(f, "Nothing was written: {state}"),
        }
    }
}

impl Display for Diffed {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        /// Ranges that are shown. The JSON has all of them.
        const RANGES_MAX: usize = 8;
        let same = self.images.iter().filter(|image| image.change == Change::Same).count();
        writeln!(
            f,
            "{same} of {} {} the same in {} and {}",
            counted(self.images.len() as u64, "image"),
            if self.images.len() == 1 { "is" } else { "are" },
            self.first,
            self.second
        )?;
        for image in &self.images {
            match image.change {
                Change::Same => {}
                Change::OnlyInFirst => writeln!(f, "Only in {}: {}", self.first, shown(&image.path))?,
                Change::OnlyInSecond => writeln!(f, "Only in {}: {}", self.second, shown(&image.path))?,
                Change::Differs => {
                    write!(
                        f,
                        "Differs in {}: {}: {}",
                        size(image.differing_bytes),
                        shown(&image.path),
                        joined(image.ranges.iter().take(RANGES_MAX))
                    )?;
                    match image.ranges.len().checked_sub(RANGES_MAX) {
                        Some(more @ 1..) => writeln!(f, ", and {more} more ranges")?,
                        _ => writeln!(f)?,
                    }
                }
            }
        }
        Ok(())
    }
}

/// Writes the files outside the pool that hold the most of it.
fn write_holders(f: &mut Formatter<'_>, held_by: &BTreeMap<String, u64>) -> Result {
    /// Names that are shown. The JSON has all of them.
    const NAMES_MAX: usize = 8;
    let mut names: Vec<_> = held_by.iter().collect();
    names.sort_by_key(|(_, bytes)| std::cmp::Reverse(**bytes));
    names
        .iter()
        .take(NAMES_MAX)
        .try_for_each(|(name, bytes)| writeln!(f, "Held by: {}: {}", shown(std::path::Path::new(name)), size(**bytes)))
}

/// Bytes that a plan or a run frees, or takes more, in words.
fn freed_or_taken(bytes: i64, frees: &str, takes: &str) -> String {
    let verb = if bytes < 0 { takes } else { frees };
    format!("{verb} {}", size(bytes.unsigned_abs()))
}

/// Writes what a plan frees by reason, and what it takes.
fn write_plan(f: &mut Formatter<'_>, planned: &Planned, dry_run: bool) -> Result {
    let reasons = planned
        .freed_by_reason
        .iter()
        .map(|(reason, bytes)| format!("{} {}", reason_name(*reason), size(*bytes)));
    let reasons = reasons.collect::<Vec<_>>().join(", ");
    if !reasons.is_empty() {
        let in_extents = counted(planned.extents, "extent");
        if dry_run {
            writeln!(f, "In {in_extents}: {reasons}")?;
        } else {
            let planned = freed_or_taken(planned.freed_bytes, "Planned", "Planned to take more:");
            writeln!(f, "{planned} in {in_extents}: {reasons}")?;
        }
    }
    if planned.extents > 0 {
        writeln!(
            f,
            "To do so: {} compared, {} rewritten, about {} of metadata, up to {} of extra space on the way",
            size(planned.compared_bytes),
            size(planned.rewritten_bytes),
            size(planned.metadata_bytes),
            size(planned.peak_bytes)
        )?;
    }
    if planned.uncompressed_bytes > 0 {
        writeln!(
            f,
            "Of what is rewritten, {} of data are compressed to about {}",
            size(planned.uncompressed_bytes),
            size(planned.compressed_bytes)
        )?;
    }
    if planned.sampled > 1 {
        writeln!(
            f,
            "Looked up one block in {}: the pool is large for the memory allowed; more --memory finds shorter runs",
            planned.sampled
        )?;
    }
    Ok(())
}

/// Writes the bytes that cannot be freed, and why.
fn write_pinned(f: &mut Formatter<'_>, pinned: &BTreeMap<PinReason, u64>) -> Result {
    for (reason, bytes) in pinned {
        let holders = match reason {
            PinReason::HeldByOthers => {
                "files or snapshots outside the given paths, or images that were left alone, hold"
            }
            PinReason::UnalignedTail => "images whose size is not a multiple of 4 KiB hold",
            PinReason::Fixed => "images whose extents cannot change hold",
            PinReason::Preallocated => "preallocated ranges that are to stay hold",
            PinReason::Unreadable => "extents hold that cannot be read",
        };
        writeln!(f, "Not freed: {} that {holders}", size(*bytes))?;
    }
    Ok(())
}

/// Writes what a run could not share.
fn write_done(f: &mut Formatter<'_>, done: &Done) -> Result {
    let counts = &done.counts;
    if counts.differing_bytes > 0 {
        writeln!(
            f,
            "{} looked equal and were not; they were left as they are",
            size(counts.differing_bytes)
        )?;
    }
    for (error, bytes) in &counts.refused_bytes {
        writeln!(f, "The filesystem refused to share {}: {error}", size(*bytes))?;
    }
    if counts.extents_still_held > 0 {
        writeln!(
            f,
            "{} could not be freed; run it again later",
            counted(counts.extents_still_held, "extent")
        )?;
    }
    Ok(())
}

impl Reclaimed {
    /// Writes what was freed, or would be.
    fn write_result(&self, f: &mut Formatter<'_>) -> Result {
        if let Some(done) = &self.done {
            let freed = freed_or_taken(done.freed_bytes, "Freed", "Took more:");
            return writeln!(f, "{freed}: now {}", done.after);
        }
        if self.dry_run {
            let freed = freed_or_taken(self.planned.freed_bytes, "Would free", "Would take more:");
            return writeln!(f, "{freed}. Nothing was changed");
        }
        Ok(())
    }

    /// Writes how many images are not as others, and how.
    fn write_kinds(&self, f: &mut Formatter<'_>) -> Result {
        if self.inline_images > 0 {
            writeln!(
                f,
                "{} so small that all data lies in metadata, which cannot be shared",
                is_or_are(self.inline_images, "image")
            )?;
        }
        if self.unchecksummed_images > 0 {
            writeln!(
                f,
                "{} without checksums (nodatacow): such images share among themselves only",
                is_or_are(self.unchecksummed_images, "image")
            )?;
        }
        Ok(())
    }
}

/// A number of things, and the verb for them.
fn is_or_are(count: u64, thing: &str) -> String {
    format!("{} {}", counted(count, thing), if count == 1 { "is" } else { "are" })
}

impl Display for Reclaimed {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        self.write_result(f)?;
        let before = if self.done.is_some() { ", before" } else { "" };
        writeln!(f, "{}{before}: {}", counted(self.images, "image"), self.pool)?;
        write_plan(f, &self.planned, self.dry_run)?;
        write_pinned(f, &self.planned.pinned)?;
        write_holders(f, &self.held_by)?;
        if let Some(done) = &self.done {
            write_done(f, done)?;
        }
        self.write_kinds(f)?;
        if self.interrupted || self.out_of_time {
            writeln!(
                f,
                "Stopped before the end{}: every image is intact, and the next run goes on from here",
                if self.out_of_time { ", the time being over" } else { "" }
            )?;
        }
        left_alone::write(f, &self.skipped)
    }
}

impl Display for Scanned {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "{}: {}", counted(self.images, "image"), self.pool)?;
        let sources = &self.fingerprinted;
        writeln!(
            f,
            "Fingerprints: {} from the filesystem's checksums, {} from the index, {} read",
            size(sources.from_checksums),
            size(sources.from_index),
            size(sources.read)
        )?;
        left_alone::write(f, &self.skipped)
    }
}

impl Display for IndexStatus {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        writeln!(f, "{}", shown(&self.folder))?;
        writeln!(
            f,
            "  {}, {} of blocks, {} of them with fingerprints that had to be read",
            counted(self.extents, "extent"),
            size(self.bytes),
            size(self.fingerprint_bytes)
        )?;
        writeln!(
            f,
            "  {}, about {} different",
            counted(self.chunks, "chunk"),
            self.distinct_chunks
        )?;
        writeln!(f, "  {} on disk ({})", size(self.disk_bytes), self.name)
    }
}
