//! What stands in the place of readers of containers in a build without the feature `containers`: they are recognised, and refused.

#![allow(
    clippy::needless_pass_by_value,
    clippy::unused_self,
    reason = "functions are called as those of the readers are"
)]

use std::convert::Infallible;
use std::path::PathBuf;

use super::random::RandomInput;
use super::{Backup, Input};
use crate::error::Result;
use crate::store::Store;

const PROBLEM: &str = "it is a disk in a container, and this vmfold was built without `containers`";

/// A container of whatever kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ContainerKind {
    Qcow2,
    /// Any other.
    Vhd,
}

impl ContainerKind {
    /// The container that begins with these bytes.
    pub(super) fn of(first: &[u8]) -> Option<Self> {
        const VDI_AT: usize = 64;
        let has = |at: usize, magic: &[u8]| first.get(at..).is_some_and(|rest| rest.starts_with(magic));
        if has(0, b"QFI\xfb") {
            return Some(Self::Qcow2);
        }
        let is_other = [&b"KDMV"[..], b"conectix", b"vhdxfile"]
            .iter()
            .any(|magic| has(0, magic));
        (is_other || has(VDI_AT, b"\x7f\x10\xda\xbe")).then_some(Self::Vhd)
    }

    /// Returns what it is, for messages.
    pub(super) fn name(self) -> &'static str {
        "a disk in a container"
    }

    /// Refuses it.
    pub(super) fn open<'a>(self, input: RandomInput<'a>, _: &'a [Box<dyn Store>]) -> Result<Box<dyn Backup + 'a>> {
        Err(input.refused(PROBLEM))
    }
}

/// Whether a file is a disk of fixed size with a footer. Without their reader it is taken for what it begins with.
pub(super) fn is_fixed_vhd(_: &[u8]) -> bool {
    false
}

pub(super) mod vmdk {
    use std::marker::PhantomData;

    use super::{Backup, Infallible, Input, PROBLEM, PathBuf, Result};
    use crate::foreign::Compression;

    pub(in crate::foreign) fn is_stream(first: &[u8]) -> bool {
        first.starts_with(b"KDMV")
    }

    pub(in crate::foreign) fn is_descriptor(_: &[u8]) -> bool {
        false
    }

    pub(in crate::foreign) fn why_not_a_disk(_: &[u8]) -> &'static str {
        PROBLEM
    }

    /// A disk that cannot be there.
    pub(in crate::foreign) struct Stream<'a> {
        never: Infallible,
        input: PhantomData<Input<'a>>,
    }

    impl<'a> Stream<'a> {
        pub(in crate::foreign) fn open(input: Input<'a>, _: PathBuf) -> Result<Self> {
            Err(input.refused(PROBLEM))
        }

        pub(in crate::foreign) fn size(&self) -> u64 {
            match self.never {}
        }

        pub(in crate::foreign) fn next_grain(&mut self, _: &mut Vec<u8>) -> Result<Option<u64>> {
            match self.never {}
        }
    }

    pub(in crate::foreign) fn open_stream(input: Input<'_>, _: Option<Compression>) -> Result<Box<dyn Backup + '_>> {
        Err(input.refused(PROBLEM))
    }
}
