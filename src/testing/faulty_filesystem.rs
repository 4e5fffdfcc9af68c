//! The simulated filesystem with faults: one kind of call fails, sectors cannot be read, or the disk is finite. It counts calls, so that a
//! test can make each of them fail in turn.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use rustix::io::Errno;

use super::simulated::{BlockContent, PLAIN, Simulated};
use crate::block::{BLOCK_BYTES, BLOCK_LEN, SlotSet};
use crate::content::Metadata;
use crate::error::{Error, Result};
use crate::facts::{Class, Facts};
use crate::fingerprint::FingerprintFunction;
use crate::fs::{ExtentReference, Filesystem, ImageInfo, PoolMap, ShareOutcome, SourceFile};
use crate::numbers::{DonorId, ImageId};
use crate::spill::{Budget, SpillVec};

/// The kinds of calls that can go wrong. Calls of one kind are counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FilesystemCall {
    /// [`Filesystem::may_touch`].
    MayTouch,
    /// [`Filesystem::read`].
    Read,
    /// [`Filesystem::free_bytes`].
    FreeBytes,
    /// [`Filesystem::create_donor`].
    CreateDonor,
    /// [`Filesystem::append_to_donor`].
    AppendToDonor,
    /// [`Filesystem::settle_donor`].
    SettleDonor,
    /// [`Filesystem::share`].
    Share,
    /// [`Filesystem::commit`].
    Commit,
    /// [`Filesystem::is_allocated`].
    IsAllocated,
    /// [`Filesystem::ranges_in`].
    RangesIn,
}

/// The ways in which a call goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilesystemFault {
    /// The call fails with this error.
    Fails(Errno),
    /// Someone else opens the image that [`FilesystemCall::MayTouch`] asks about, and keeps it open.
    Opened,
    /// Someone else writes the last block of the range just before [`FilesystemCall::Share`].
    Changed,
}

/// The content of a changed block, which no other block has.
pub const CHANGED: BlockContent = 0xc4a_96ed;

/// The simulated filesystem, with a fault.
#[derive(Debug)]
pub struct FaultyFilesystem<'a> {
    inner: &'a Simulated,
    call: FilesystemCall,
    /// The number of the first call that goes wrong.
    at: u64,
    fault: FilesystemFault,
    /// Whether all later calls of the kind go wrong too.
    lasts: bool,
    /// Blocks of extents that cannot be read through any file.
    pub unreadable: BTreeSet<(usize, u32)>,
    /// The size of the disk in bytes; `None` if it is infinite.
    pub disk_bytes: Option<u64>,
    calls: Mutex<BTreeMap<FilesystemCall, u64>>,
    opened: Mutex<BTreeSet<ImageId>>,
    changed: Mutex<BTreeSet<(ImageId, u32)>>,
}

impl<'a> FaultyFilesystem<'a> {
    /// Makes a filesystem whose call of this kind and number goes wrong, and all later ones too if the fault `lasts`.
    pub fn new(inner: &'a Simulated, call: FilesystemCall, at: u64, fault: FilesystemFault, lasts: bool) -> Self {
        Self {
            inner,
            call,
            at,
            fault,
            lasts,
            unreadable: BTreeSet::new(),
            disk_bytes: None,
            calls: Mutex::default(),
            opened: Mutex::default(),
            changed: Mutex::default(),
        }
    }

    /// Makes a filesystem that only counts calls.
    pub fn without_fault(inner: &'a Simulated) -> Self {
        Self::new(
            inner,
            FilesystemCall::Read,
            u64::MAX,
            FilesystemFault::Fails(Errno::IO),
            false,
        )
    }

    /// Returns the number of calls of each kind.
    pub fn calls(&self) -> BTreeMap<FilesystemCall, u64> {
        lock(&self.calls).clone()
    }

    /// Returns the blocks of images that someone else wrote.
    pub fn changed(&self) -> BTreeSet<(ImageId, u32)> {
        lock(&self.changed).clone()
    }

    /// Counts a call, and returns what goes wrong with it.
    fn meets(&self, call: FilesystemCall) -> Option<FilesystemFault> {
        let mut calls = lock(&self.calls);
        let next = calls.entry(call).or_default();
        let number = *next;
        *next += 1;
        let is_hit = call == self.call && (number == self.at || (self.lasts && number > self.at));
        is_hit.then_some(self.fault)
    }

    fn fails(&self, call: FilesystemCall) -> std::result::Result<(), Errno> {
        match self.meets(call) {
            Some(FilesystemFault::Fails(errno)) => Err(errno),
            _ => Ok(()),
        }
    }

    /// Whether part of a range is unreadable.
    fn has_unreadable(&self, file: SourceFile, offset: u64, length: u64) -> bool {
        let blocks = offset / BLOCK_BYTES..(offset + length).div_ceil(BLOCK_BYTES);
        let sector = |block| self.inner.sector_of(file, usize::try_from(block).ok()?);
        !self.unreadable.is_empty()
            && blocks
                .filter_map(sector)
                .any(|sector| self.unreadable.contains(&sector))
    }

    /// Writes a block as someone else would.
    fn change(&self, image: ImageId, file_block: u32) {
        let class = Class {
            checksummed: self.inner.image(image).checksummed,
            ..PLAIN
        };
        let extent = self.inner.allocate(class, vec![CHANGED]);
        self.inner.map(image, file_block, extent, 0, 1, false);
        lock(&self.changed).insert((image, file_block));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Filesystem for FaultyFilesystem<'_> {
    fn may_touch(&self, image: ImageId) -> bool {
        let mut opened = lock(&self.opened);
        if self.meets(FilesystemCall::MayTouch) == Some(FilesystemFault::Opened) {
            opened.insert(image);
        }
        !opened.contains(&image) && self.inner.may_touch(image)
    }

    fn image_count(&self) -> u32 {
        self.inner.image_count()
    }

    fn image(&self, image: ImageId) -> &ImageInfo {
        self.inner.image(image)
    }

    fn is_unchanged(&self, image: ImageId) -> bool {
        self.inner.is_unchanged(image)
    }

    fn attributes(&self, image: ImageId) -> Result<Metadata> {
        self.inner.attributes(image)
    }

    fn folder(&self) -> &Path {
        self.inner.folder()
    }

    fn uuid(&self) -> [u8; 16] {
        self.inner.uuid()
    }

    fn function(&self) -> FingerprintFunction {
        self.inner.function()
    }

    fn frees_blocks(&self) -> bool {
        self.inner.frees_blocks()
    }

    fn compresses(&self) -> bool {
        self.inner.compresses()
    }

    fn shortcomings(&self) -> Vec<String> {
        self.inner.shortcomings()
    }

    fn has_read_only_snapshots(&self) -> Result<bool> {
        self.inner.has_read_only_snapshots()
    }

    fn map(&self, budget: &Budget) -> Result<PoolMap> {
        Filesystem::map(self.inner, budget)
    }

    fn sees_all_holders(&self) -> bool {
        self.inner.sees_all_holders()
    }

    fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>> {
        self.inner.names_of_holders(facts)
    }

    fn has_usable_checksums(&self) -> bool {
        self.inner.has_usable_checksums()
    }

    fn fingerprints_from_checksums(&self, facts: &mut Facts, known: &mut SlotSet) -> Result<()> {
        self.inner.fingerprints_from_checksums(facts, known)
    }

    fn checksum_digests(&self, facts: &Facts) -> Result<SpillVec<Option<u128>>> {
        self.inner.checksum_digests(facts)
    }

    fn close_donors(&self) -> Result<()> {
        Filesystem::close_donors(self.inner)
    }

    fn clone_range(
        &self,
        image: ImageId,
        offset: u64,
        file: &File,
        file_offset: u64,
        length: u64,
    ) -> rustix::io::Result<()> {
        self.inner.clone_range(image, offset, file, file_offset, length)
    }

    fn read(&self, file: SourceFile, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let length = buffer.len() as u64;
        let readable = self.fails(FilesystemCall::Read).and_then(|()| {
            if self.has_unreadable(file, offset, length) {
                Err(Errno::IO)
            } else {
                Ok(())
            }
        });
        let failed = Error::unreadable(self.path(ImageId(0)), offset, length);
        readable.map_err(|errno| failed(errno.into()))?;
        self.inner.read(file, offset, buffer)
    }

    fn read_ahead(&self, file: SourceFile, offset: u64, length: u64) {
        self.inner.read_ahead(file, offset, length);
    }

    fn drop_behind(&self, file: SourceFile, offset: u64, length: u64) {
        self.inner.drop_behind(file, offset, length);
    }

    fn free_bytes(&self) -> Result<u64> {
        self.fails(FilesystemCall::FreeBytes)
            .map_err(Error::io("look at what is free on", self.path(ImageId(0))))?;
        let free = |disk_bytes: u64| disk_bytes.saturating_sub(self.inner.allocated_bytes());
        self.disk_bytes
            .map_or_else(|| self.inner.free_bytes(), |disk_bytes| Ok(free(disk_bytes)))
    }

    fn create_donor(&self, class: Class) -> Result<DonorId> {
        self.fails(FilesystemCall::CreateDonor)
            .map_err(Error::writing("make a donor in", self.path(ImageId(0))))?;
        self.inner.create_donor(class)
    }

    fn takes_frames(&self) -> bool {
        self.inner.takes_frames()
    }

    fn append_to_donor(&self, donor: DonorId, content: &[u8], frame: Option<&[u8]>) -> Result<()> {
        let taken = frame.map_or(content.len(), |frame| frame.len().next_multiple_of(BLOCK_LEN)) as u64;
        let fits = self
            .fails(FilesystemCall::AppendToDonor)
            .and_then(|()| match self.disk_bytes {
                Some(disk_bytes) if self.inner.allocated_bytes() + taken > disk_bytes => Err(Errno::NOSPC),
                _ => Ok(()),
            });
        fits.map_err(Error::writing("write a donor in", self.path(ImageId(0))))?;
        self.inner.append_to_donor(donor, content, frame)
    }

    fn discard_donor(&self, donor: DonorId) {
        self.inner.discard_donor(donor);
    }

    fn settle_donor(&self, donor: DonorId) -> Result<()> {
        self.fails(FilesystemCall::SettleDonor)
            .map_err(Error::writing("write a donor in", self.path(ImageId(0))))?;
        self.inner.settle_donor(donor)
    }

    fn share(&self, source: SourceFile, source_offset: u64, image: ImageId, offset: u64, length: u64) -> ShareOutcome {
        match self.meets(FilesystemCall::Share) {
            Some(FilesystemFault::Fails(errno)) => return ShareOutcome::Refused(errno),
            Some(FilesystemFault::Changed) => {
                let last = (offset + length) / BLOCK_BYTES - 1;
                self.change(image, u32::try_from(last).unwrap_or(u32::MAX));
            }
            _ => {}
        }
        // The kernel reads both sides to compare them.
        let sides = [(source, source_offset), (SourceFile::Image(image), offset)];
        if sides
            .iter()
            .any(|(file, offset)| self.has_unreadable(*file, *offset, length))
        {
            return ShareOutcome::Refused(Errno::IO);
        }
        self.inner.share(source, source_offset, image, offset, length)
    }

    fn commit(&self) -> Result<()> {
        self.fails(FilesystemCall::Commit)
            .map_err(Error::io("commit", self.path(ImageId(0))))?;
        self.inner.commit()
    }

    fn is_allocated(&self, address: u64, generation: u64) -> Result<bool> {
        self.fails(FilesystemCall::IsAllocated)
            .map_err(Error::io("read the metadata of", self.path(ImageId(0))))?;
        self.inner.is_allocated(address, generation)
    }

    fn ranges_in(&self, image: ImageId, addresses: &BTreeSet<u64>) -> Result<Vec<ExtentReference>> {
        self.fails(FilesystemCall::RangesIn)
            .map_err(Error::io("read the metadata of", self.path(ImageId(0))))?;
        self.inner.ranges_in(image, addresses)
    }

    fn path(&self, image: ImageId) -> &Path {
        self.inner.path(image)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::bytes;

    /// Returns a filesystem with an image of two blocks, and one that shares the first of them.
    fn pool() -> Simulated {
        let fs = Simulated::default();
        let extent = fs.allocate(PLAIN, vec![7, 8]);
        for (image, blocks) in [(fs.add_image(true, 2), 2), (fs.add_image(true, 2), 1)] {
            fs.map(image, 0, extent, 0, blocks, false);
        }
        fs
    }

    #[test]
    fn just_that_call_goes_wrong_or_all_from_there_on() {
        let fs = pool();
        for (lasts, expected) in [(false, [true, false, true]), (true, [true, false, false])] {
            let faulty = FaultyFilesystem::new(&fs, FilesystemCall::Read, 1, FilesystemFault::Fails(Errno::IO), lasts);
            let mut block = [0; BLOCK_LEN];
            let read = |()| faulty.read(SourceFile::Image(ImageId(0)), 0, &mut block).is_ok();
            assert_eq!([(); 3].map(read), expected);
            assert_eq!(faulty.calls(), BTreeMap::from([(FilesystemCall::Read, 3)]));
        }
    }

    #[test]
    fn a_sector_is_unreadable_through_every_file_and_the_others_are_not() {
        let fs = pool();
        let mut faulty = FaultyFilesystem::without_fault(&fs);
        faulty.unreadable.insert((0, 0));
        let read = |image, at| {
            let read = faulty.read(SourceFile::Image(image), bytes(at), &mut [0; BLOCK_LEN]);
            read.map_err(|error| matches!(error, Error::Unreadable { .. }))
        };
        assert_eq!(
            [read(ImageId(0), 0), read(ImageId(1), 0), read(ImageId(0), 1)],
            [Err(true), Err(true), Ok(())]
        );
        let share = |block| {
            faulty.share(
                SourceFile::Image(ImageId(0)),
                bytes(block),
                ImageId(0),
                bytes(block),
                bytes(1),
            )
        };
        assert_eq!(
            [share(0), share(1)],
            [ShareOutcome::Refused(Errno::IO), ShareOutcome::Shared]
        );
    }

    #[test]
    fn a_disk_is_full_at_its_end() {
        let fs = pool();
        let mut faulty = FaultyFilesystem::without_fault(&fs);
        faulty.disk_bytes = Some(bytes(3));
        assert_eq!(faulty.free_bytes().unwrap(), bytes(1));
        let donor = faulty.create_donor(PLAIN).unwrap();
        let full = faulty.append_to_donor(donor, &[1; 2 * BLOCK_LEN], None);
        assert!(matches!(full, Err(Error::NoSpace { .. })));
        faulty.append_to_donor(donor, &[1; BLOCK_LEN], None).unwrap();
        assert_eq!(faulty.free_bytes().unwrap(), 0);
    }

    #[test]
    fn an_image_that_someone_opened_stays_open() {
        let fs = pool();
        let faulty = FaultyFilesystem::new(&fs, FilesystemCall::MayTouch, 1, FilesystemFault::Opened, false);
        assert_eq!(
            [0, 1, 0, 1].map(|image| faulty.may_touch(ImageId(image))),
            [true, false, true, false]
        );
    }

    #[test]
    fn what_someone_wrote_differs() {
        let fs = pool();
        let faulty = FaultyFilesystem::new(&fs, FilesystemCall::Share, 0, FilesystemFault::Changed, false);
        let share = || faulty.share(SourceFile::Image(ImageId(0)), 0, ImageId(1), 0, bytes(1));
        assert_eq!([share(), share()], [ShareOutcome::Differs, ShareOutcome::Differs]);
        assert_eq!(faulty.changed(), BTreeSet::from([(ImageId(1), 0)]));
        assert_eq!(fs.contents(), [[7, 8], [CHANGED, 0]]);
    }
}
