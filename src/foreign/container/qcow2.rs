//! Qcow2.

use super::Disk;
use crate::error::Result;
use crate::foreign::Volume;
use crate::foreign::random::RandomInput;

pub(super) const MAGIC: &[u8] = b"QFI\xfb";

pub(super) struct Qcow2<'a> {
    input: RandomInput<'a>,
}

impl<'a> Qcow2<'a> {
    pub(super) fn open(input: RandomInput<'a>) -> Result<Self> {
        Err(input.refused("it is a Qcow2, which this version does not read"))
    }
}

impl Disk for Qcow2<'_> {
    fn kind(&self) -> &'static str {
        "Qcow2"
    }
    fn volumes(&self) -> Vec<Volume> {
        let _ = self.input.path();
        Vec::new()
    }
    fn content(&mut self, _: usize, _: u64, _: &mut Vec<u8>) -> Result<Option<u64>> {
        Ok(None)
    }
}
