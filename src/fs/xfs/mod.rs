//! XFS: it frees each block on its own, and keeps no checksums of data.

mod holders;
mod images_holding;
mod map;

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::OnceLock;

pub(super) use images_holding::images_holding;

use super::opened::{Leases, Opened, Specifics, reads_opened, shares_opened};
use super::{Filesystem, ImageInfo, PoolMap, Purpose, ShareOutcome, SourceFile, kernel};
use crate::content::Metadata;
use crate::error::Result;
use crate::facts::{Class, Facts};
use crate::numbers::{DonorId, ImageId};
use crate::pool::{FoundImage, NamedPath, Skipped};
use crate::spill::Budget;
use crate::sys::fs_info::{FsInfo, fs_info, is_realtime};

/// The open images of a pool on an XFS.
#[derive(Debug)]
pub(super) struct Xfs {
    info: FsInfo,
    /// Whether the filesystem keeps a reverse map.
    reverse_map: bool,
    opened: Opened,
    /// Whether the kernel named the owners of blocks when the pool was mapped.
    names_owners: OnceLock<bool>,
}

impl Xfs {
    /// Opens the images of a pool, and returns which of them are left alone.
    ///
    /// # Errors
    /// Returns the errors of [`Opened::open`].
    pub(super) fn open(
        found: &[FoundImage],
        first: &NamedPath,
        info: FsInfo,
        purpose: Purpose,
        reverse_map: bool,
    ) -> Result<(Self, Vec<Skipped>)> {
        let specifics = Specifics {
            uuid: info.uuid,
            verdict: kernel::with_xfs(kernel::release()),
            contains: &|file| fs_info(file).is_ok_and(|found| found == info),
            root_of: |file| is_realtime(file).map(|elsewhere| (!elsewhere).then_some(0)),
            is_checksummed: |_, _| Ok(true),
            set_up: |_, _| Ok(()),
            leases: Leases::Always,
        };
        let (opened, skipped) = Opened::open(found, first, purpose, &specifics, |_| ())?;
        let fs = Self {
            info,
            reverse_map,
            opened,
            names_owners: OnceLock::new(),
        };
        Ok((fs, skipped))
    }
}

impl Filesystem for Xfs {
    reads_opened!();

    shares_opened!();

    fn kind_name(&self) -> &'static str {
        "XFS"
    }

    fn uuid(&self) -> [u8; 16] {
        self.info.uuid
    }

    fn frees_blocks(&self) -> bool {
        true
    }

    fn shortcomings(&self) -> Vec<String> {
        let mut found: Vec<String> = kernel::with_xfs(kernel::release()).note().into_iter().collect();
        if !self.sees_all_holders() {
            let why = if self.reverse_map {
                "Without the capability CAP_SYS_ADMIN (run it as root),"
            } else {
                "This XFS has no reverse map (mkfs.xfs -m rmapbt=1):"
            };
            found.push(format!(
                "{why} blocks that other files share with several of the images look as if they could be freed; \
                 what was freed is then told by the filesystem's free space"
            ));
        }
        found
    }

    fn map(&self, budget: &Budget) -> Result<PoolMap> {
        self.read_map(budget)
    }

    fn sees_all_holders(&self) -> bool {
        self.names_owners.get().is_some_and(|named| *named)
    }

    fn names_of_holders(&self, facts: &Facts) -> Result<BTreeMap<String, u64>> {
        self.find_names_of_holders(facts)
    }
}
