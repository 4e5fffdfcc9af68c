//! Vhdx.

use super::Disk;
use crate::error::Result;
use crate::foreign::Volume;
use crate::foreign::random::RandomInput;

pub(super) const MAGIC: &[u8] = b"vhdxfile";

pub(super) struct Vhdx<'a> {
    input: RandomInput<'a>,
}

impl<'a> Vhdx<'a> {
    pub(super) fn open(input: RandomInput<'a>) -> Result<Self> {
        Err(input.refused("it is a Vhdx, which this version does not read"))
    }
}

impl Disk for Vhdx<'_> {
    fn kind(&self) -> &'static str {
        "Vhdx"
    }
    fn volumes(&self) -> Vec<Volume> {
        let _ = self.input.path();
        Vec::new()
    }
    fn content(&mut self, _: usize, _: u64, _: &mut Vec<u8>) -> Result<Option<u64>> {
        Ok(None)
    }
}
