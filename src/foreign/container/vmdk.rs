//! Vmdk.

use super::Disk;
use crate::error::Result;
use crate::foreign::Volume;
use crate::foreign::random::RandomInput;

pub(super) const MAGIC: &[u8] = b"KDMV";

pub(super) struct Vmdk<'a> {
    input: RandomInput<'a>,
}

impl<'a> Vmdk<'a> {
    pub(super) fn open(input: RandomInput<'a>) -> Result<Self> {
        Err(input.refused("it is a Vmdk, which this version does not read"))
    }
}

impl Disk for Vmdk<'_> {
    fn kind(&self) -> &'static str {
        "Vmdk"
    }
    fn volumes(&self) -> Vec<Volume> {
        let _ = self.input.path();
        Vec::new()
    }
    fn content(&mut self, _: usize, _: u64, _: &mut Vec<u8>) -> Result<Option<u64>> {
        Ok(None)
    }
}
