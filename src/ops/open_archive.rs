//! The archive that a verb appends to.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rayon::prelude::*;
use zeroize::Zeroizing;

use crate::archive::head::Head;
use crate::archive::keys::{ArchiveKeys, EpochSealer, KeyringSecrets, Remember, Ring, Unlock};
use crate::archive::lane::ListedRecord;
use crate::archive::list::Listed;
use crate::archive::parity::ParityMaker;
use crate::archive::reader::{Archive, Committed};
use crate::archive::record::{BlockHasher, EpochId, HEADER_BYTES, LaneId, MAGIC, RecordHeader, hash_of};
use crate::archive::writer::{ArchiveWriter, EpochBase, EpochOptions};
use crate::error::{Error, Result};
use crate::exec::hashes::StoredHashes;
use crate::monitor::Monitor;
use crate::numbers::StoreBlock;
use crate::range;
use crate::shown::shown;
use crate::spill::Budget;
use crate::store::Store;

/// How an archive that is written to is sealed.
#[derive(Debug, Clone, Default)]
pub struct Sealing {
    /// What opens the keyring of an archive that is sealed already.
    pub unlock: Option<Arc<dyn Unlock>>,
    /// What makes the keyring of one that has no commit yet; none if that is not to be sealed.
    pub new: Option<Arc<dyn MakeKeyring>>,
    /// What a host has that may only write, and to which archive. Then nothing else opens that.
    pub host: Option<(LaneId, Arc<Ring>)>,
    /// What remembers archives, if anything does.
    pub memory: Option<Arc<dyn Remember>>,
}

impl Sealing {
    fn keys(&self) -> Arc<ArchiveKeys> {
        let Some(unlock) = self.unlock.clone() else {
            return Arc::default();
        };
        Arc::new(ArchiveKeys::opened_by(unlock).remembered_by(self.memory.clone()))
    }
}

/// Makes the keyring of a new archive. It is asked once there is one to make.
pub trait MakeKeyring: std::fmt::Debug + Send + Sync {
    /// Makes it.
    ///
    /// # Errors
    /// Says that there is nobody whom the archive could be sealed for, or that the user broke off.
    fn make(&self) -> Result<NewKeyring>;
}

/// A keyring that was made, and how it stands in KEY records.
#[derive(Debug)]
pub struct NewKeyring {
    /// What it holds.
    pub secrets: KeyringSecrets,
    /// Its bytes, sealed for those whom the archive is for.
    pub keyring: Vec<u8>,
}

/// What a sealed archive is sealed with.
struct Seals {
    ring: Arc<Ring>,
    /// The number of the keyring.
    number: u32,
    /// The keyring as it stands in KEY records.
    keyring: Vec<u8>,
}

/// The archive that is written to.
pub(crate) struct OpenArchive {
    pub(crate) store: Arc<dyn Store>,
    /// The archive as it is read. It is `None` if there is no commit in it yet.
    pub(crate) archive: Option<Archive>,
    /// The end of the archive, which the export continues.
    pub(crate) base: EpochBase,
    /// What opens and seals records.
    keys: Arc<ArchiveKeys>,
    /// What remembers archives.
    memory: Option<Arc<dyn Remember>>,
    /// What a sealed archive is sealed with.
    seals: Option<Seals>,
    /// Whether nothing that is sealed can be read, but what the index key seals.
    is_write_only: bool,
    /// Bytes behind it that an export left which did not end.
    leftover_bytes: u64,
    /// Whether anything was written or cut off.
    is_changed: bool,
}

impl OpenArchive {
    /// Opens the archive in a store, and removes from its end what an export that did not end left there.
    pub(crate) fn new(store: Arc<dyn Store>, sealing: &Sealing) -> Result<Self> {
        let opened = Self::open(store, sealing)?;
        match &opened.memory {
            Some(memory) if opened.seals.is_none() => memory.met_in_clear(opened.store.path())?,
            _ => {}
        }
        Ok(opened)
    }

    fn open(store: Arc<dyn Store>, sealing: &Sealing) -> Result<Self> {
        let path = store.path().to_owned();
        let mut opened = Self {
            store: Arc::clone(&store),
            archive: None,
            keys: sealing.keys(),
            memory: sealing.memory.clone(),
            seals: None,
            is_write_only: sealing.host.is_some(),
            base: EpochBase {
                lane: LaneId(random()?),
                ..EpochBase::default()
            },
            leftover_bytes: 0,
            is_changed: false,
        };
        let length = store.length().map_err(Error::io("look at", &path))?.unwrap_or(0);
        if let Some((lane, ring)) = &sealing.host {
            if length == 0 {
                let problem = format!("`{}` is no archive yet: who has its key makes it", shown(&path));
                return Err(Error::Usage(problem));
            }
            let (archive, keys) = Archive::open_to_add(store, ring, sealing.memory.clone())?;
            if archive.id() != *lane {
                let problem = format!("the credentials of this host are not of `{}`", shown(&path));
                return Err(Error::Usage(problem));
            }
            opened.seals = Some(Seals {
                ring: Arc::clone(ring),
                number: keys.number,
                keyring: keys.keyring,
            });
            return opened.with(archive);
        }
        if length == 0 {
            opened.seal_new(sealing)?;
            return Ok(opened);
        }
        if is_torn_beginning(&*store, length).map_err(Error::io("read", &path))? {
            opened.leftover_bytes = length;
            opened.seal_new(sealing)?;
            return Ok(opened);
        }
        let archive = Archive::open_any_with(store, Arc::clone(&opened.keys))?;
        let mut opened = opened.with(archive)?;
        if let Some(archive) = &opened.archive {
            archive.open_newest_keys()?;
        }
        if let (Some(ring), Some(record)) = (opened.keys.ring(), opened.keys.key_record()) {
            opened.seals = Some(Seals {
                ring,
                number: record.number,
                keyring: record.keyring.clone(),
            });
        } else if opened.archive.is_none() {
            opened.seal_new(sealing)?;
        } else if sealing.new.is_some() {
            let problem = format!(
                "`{}` is not sealed, and cannot be sealed later: export to another archive with --encrypt",
                shown(&path)
            );
            return Err(Error::Usage(problem));
        }
        Ok(opened)
    }

    /// Takes an archive to append to, if that is possible.
    fn with(mut self, archive: Archive) -> Result<Self> {
        if !archive.may_append() {
            return Err(Error::Unsupported {
                path: archive.path().to_owned(),
                problem: "it was made by another version, which cuts chunks in another way or knows more features",
            });
        }
        // A disk image that holds an archive is none, whatever it holds.
        if !archive.begins_with_record()? {
            let problem = "it does not begin with a record: copy what is intact of it by import and export";
            return Err(Error::damaged(archive.path(), 0, archive.length(), problem));
        }
        self.base = archive.base();
        self.leftover_bytes = archive.length() - self.base.length;
        if self.leftover_bytes > 0 && !archive.ends_in_leftovers_only()? {
            let problem = "what follows its last intact commit is not just an export that did not end";
            return Err(Error::damaged(
                archive.path(),
                self.base.length,
                self.leftover_bytes,
                problem,
            ));
        }
        self.archive = archive.last_of_main().is_some().then_some(archive);
        Ok(self)
    }

    /// Makes the keyring of an archive that is to be sealed, and has no commit yet.
    fn seal_new(&mut self, sealing: &Sealing) -> Result<()> {
        let Some(new) = &sealing.new else {
            // Whoever can cut the archive off could otherwise have the next export written in clear.
            return match &sealing.unlock {
                Some(unlock) if unlock.is_given() => Err(Error::Usage(format!(
                    "`{}` has no commit yet, and would not be encrypted though a key was given: add --encrypt, or leave the key out",
                    shown(self.store.path())
                ))),
                _ => Ok(()),
            };
        };
        let NewKeyring { secrets, keyring } = new.make()?;
        let ring = Ring::new(&secrets).map_err(|problem| Error::Usage(problem.problem().into()))?;
        self.seals = Some(Seals {
            number: ring.number(),
            ring: Arc::new(ring),
            keyring,
        });
        Ok(())
    }

    /// Returns what hashes blocks in the archive.
    pub(super) fn hasher(&self) -> BlockHasher {
        self.seals
            .as_ref()
            .map_or_else(BlockHasher::default, |seals| seals.ring.hasher())
    }

    /// Returns what seals the records of a new epoch; none if the archive is not sealed.
    ///
    /// # Errors
    /// [`Error::Io`] if there are no random bytes.
    pub(super) fn sealer(&self, epoch: EpochId) -> Result<Option<EpochSealer>> {
        let Some(seals) = &self.seals else {
            return Ok(None);
        };
        let random = Zeroizing::new(random()?);
        let keyring = (seals.number, seals.keyring.clone());
        let sealer = EpochSealer::new(&seals.ring, keyring, (self.base.lane, epoch), &random);
        let sealer = sealer.map_err(|problem| Error::Usage(problem.problem().into()))?;
        Ok(Some(sealer))
    }

    /// Returns the commit that an export goes on from, with its archive.
    pub(crate) fn last(&self) -> Option<(&Archive, &Committed)> {
        let archive = self.archive.as_ref()?;
        Some((archive, archive.last_of_main()?))
    }

    /// What a commit lists beside its records and images: the store addresses that it uses, and the other lanes.
    pub(crate) fn listed(&self, uses: Vec<Range<StoreBlock>>) -> Listed {
        Listed {
            uses,
            other_lanes: self.archive.as_ref().map_or_else(Vec::new, Archive::other_lanes),
            ..Listed::default()
        }
    }

    /// Returns whether what the archive holds is referred to without being read first: as the user wants it, or because it cannot be read.
    pub(crate) fn is_trusted(&self, trusts_archive: bool) -> bool {
        trusts_archive || self.is_write_only
    }

    /// Returns which of some store addresses are lost: those without a hash, and those of PACKs that are damaged, all of which are read unless
    /// the archive is trusted. Whoever refers to them would not get them back.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read; [`Error::Interrupted`].
    pub(crate) fn lost(
        &self,
        wanted: &[Range<StoreBlock>],
        is_trusted: bool,
        monitor: &dyn Monitor,
    ) -> Result<Vec<Range<StoreBlock>>> {
        let Some((archive, last)) = self.last() else {
            return Ok(Vec::new());
        };
        let mut lost = StoredHashes::new(Some((archive, last)), last.commit.store_end).lost(wanted)?;
        if !self.is_trusted(is_trusted) {
            lost.extend(range::without(wanted, &held(archive, last, wanted, monitor)?));
        }
        Ok(range::joined(lost))
    }

    /// Cuts off what an export left that did not end. From here on, the archive is written to.
    ///
    /// # Errors
    /// [`Error::Io`] if that fails.
    pub(crate) fn begin(&mut self, monitor: &dyn Monitor) -> Result<()> {
        self.is_changed = true;
        if self.leftover_bytes > 0 {
            monitor.note(&format!(
                "Removes {} behind the last commit, which an export left that did not end",
                crate::shown::size(self.leftover_bytes)
            ));
            let cut = self.store.truncate(self.base.length);
            cut.map_err(Error::io("write to", self.store.path()))?;
        }
        Ok(())
    }

    /// Begins an epoch behind the last commit, sealed as the archive is, and with parity as [`OpenArchive::parity`] has it.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read or written, or there are no random bytes.
    pub(crate) fn begin_epoch(
        &mut self,
        parity: Option<u8>,
        budget: &Budget,
        monitor: &dyn Monitor,
    ) -> Result<ArchiveWriter> {
        let epoch = EpochId(u64::from_le_bytes(random()?));
        let options = EpochOptions {
            sealer: self.sealer(epoch)?,
            parity: self.parity(parity)?,
        };
        self.begin(monitor)?;
        let begun = ArchiveWriter::begin_with(Arc::clone(&self.store), self.base, epoch, options, budget);
        begun.map_err(Error::io("write to", self.store.path()))
    }

    /// What makes parity of so many percent, 0 for none, from where the archive has none. Without a percentage, it goes on as the last commit has it.
    ///
    /// # Errors
    /// [`Error::Io`] if the archive cannot be read.
    pub(crate) fn parity(&self, wanted: Option<u8>) -> Result<Option<ParityMaker>> {
        let Some(archive) = &self.archive else {
            let percent = wanted.filter(|percent| *percent > 0);
            return Ok(percent.map(|percent| ParityMaker::new(percent, 0)));
        };
        let mut known = archive.last_parity()?;
        let percent = wanted.unwrap_or(known.percent);
        if percent == 0 {
            return Ok(None);
        }
        if known.percent == 0 {
            known = archive.searched_parity()?;
        }
        Ok(Some(ParityMaker::new(percent, known.end)))
    }

    /// Takes a commit that was made, behind which another epoch would begin at `base`.
    pub(crate) fn committed(&mut self, base: EpochBase, committed: &Committed, monitor: &dyn Monitor) {
        self.base = base;
        let Some(seals) = &self.seals else { return };
        let keys = ArchiveKeys::of_ring(Arc::clone(&seals.ring)).remembered_by(self.memory.clone());
        let number = (Some(seals.number), true);
        if let Err(error) = keys.met(self.store.path(), std::slice::from_ref(committed), number) {
            // It was met before, as it had to be.
            monitor.note(&crate::error::describe(&error));
        }
    }

    /// Writes the parity that is still missing once a commit is written. If that fails, what was written of it is cut off, and the commit stays.
    ///
    /// # Errors
    /// Returns the error of writing; [`Error::Interrupted`].
    pub(crate) fn protect(&mut self, writer: &mut ArchiveWriter, monitor: &dyn Monitor) -> Result<()> {
        monitor.phase("Writing parity", 0);
        match writer.protect(None, &mut |_| Ok(())) {
            Ok(base) => {
                self.base = base.unwrap_or(self.base);
                Ok(())
            }
            Err(error) => {
                self.undo(monitor);
                Err(Error::io("write to", self.store.path())(error))
            }
        }
    }

    /// Truncates the archive to its last commit, if it was written to. What an export wrote after it is of no use without a commit.
    pub(crate) fn undo(&self, monitor: &dyn Monitor) {
        if !self.is_changed {
            return;
        }
        match self.store.truncate(self.base.length) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
            Err(error) => monitor.note(&format!("What was written so far could not be taken back: {error}")),
        }
    }
}

/// Reads the PACKs that have some store addresses. Returns the addresses that those of them hold which are intact, a list.
pub(crate) fn held(
    archive: &Archive,
    last: &Committed,
    wanted: &[Range<StoreBlock>],
    monitor: &dyn Monitor,
) -> Result<Vec<Range<StoreBlock>>> {
    let mut packs: BTreeMap<StoreBlock, Vec<&ListedRecord>> = BTreeMap::new();
    for pack in wanted.iter().flat_map(|range| archive.packs(last, range.clone())) {
        let known = packs.entry(pack.location.first).or_default();
        if !known.contains(&pack) {
            known.push(pack);
        }
    }
    let packs: Vec<&ListedRecord> = packs.into_values().flatten().collect();
    let lengths = packs.iter().map(|pack| pack.location.length);
    monitor.phase("Checking the archive", lengths.fold(0, u64::saturating_add));
    let intact: Vec<Result<Vec<Range<StoreBlock>>>> = packs
        .par_iter()
        .map(|pack| {
            if monitor.interrupted() {
                return Err(Error::Interrupted);
            }
            let intact = archive.held_by(last, &pack.location);
            monitor.advance(pack.location.length);
            match intact {
                Err(Error::Damaged { .. }) => Ok(Vec::new()),
                other => other,
            }
        })
        .collect();
    let mut held = Vec::new();
    for intact in intact {
        held.extend(intact?);
    }
    Ok(range::joined(held))
}

/// Whether a store holds nothing but a part of an archive's first record, and zeros in the place of the rest. That is what an export leaves
/// that was killed at once.
fn is_torn_beginning(store: &dyn Store, length: u64) -> std::io::Result<bool> {
    /// A longer file of zeros is rather the image of a disk, which was named by mistake.
    const ZEROS_MAX: u64 = 1 << 20;
    let body = Head::current().encode();
    let record_bytes = HEADER_BYTES + body.len();
    if length > ZEROS_MAX {
        return Ok(false);
    }
    let mut start = vec![0; record_bytes.min(usize::try_from(length).unwrap_or(usize::MAX))];
    store.read_exact_at(0, &mut start)?;
    if start.len() < record_bytes && start.starts_with(&MAGIC) {
        return Ok(true);
    }
    let is_whole = start.first_chunk().is_some_and(|header| {
        let header = RecordHeader::decode(header);
        header.is_ok_and(|header| header.body_hash == hash_of(&start[HEADER_BYTES..]))
    });
    // Its magic and its body are known. What is not there of them is zeros.
    let known = MAGIC.iter().zip(0..).chain(body.iter().zip(HEADER_BYTES..));
    let is_torn = |(byte, at): (&u8, usize)| start.get(at).is_none_or(|found| *found == 0 || found == byte);
    Ok(!is_whole && known.into_iter().all(is_torn) && are_zeros(store, start.len() as u64, length)?)
}

/// Whether a store holds nothing but zeros from one offset to another.
fn are_zeros(store: &dyn Store, from: u64, to: u64) -> std::io::Result<bool> {
    const PART_BYTES: usize = 1 << 20;
    let mut part = vec![0; PART_BYTES];
    let mut at = from;
    while at < to {
        let length = usize::try_from(to - at).unwrap_or(usize::MAX).min(PART_BYTES);
        store.read_exact_at(at, &mut part[..length])?;
        if part[..length].iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        at += length as u64;
    }
    Ok(true)
}

/// Random bytes of the kernel.
pub(crate) fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    crate::sys::random::fill(&mut bytes).map_err(Error::io("get random bytes from", Path::new("/dev/urandom")))?;
    Ok(bytes)
}
