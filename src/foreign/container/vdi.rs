//! Vdi.

use super::Disk;
use crate::error::Result;
use crate::foreign::Volume;
use crate::foreign::random::RandomInput;

pub(super) const MAGIC: &[u8] = b"\x7f\x10\xda\xbe";
pub(super) const MAGIC_AT: usize = 64;

pub(super) struct Vdi<'a> {
    input: RandomInput<'a>,
}

impl<'a> Vdi<'a> {
    pub(super) fn open(input: RandomInput<'a>) -> Result<Self> {
        Err(input.refused("it is a Vdi, which this version does not read"))
    }
}

impl Disk for Vdi<'_> {
    fn kind(&self) -> &'static str {
        "Vdi"
    }
    fn volumes(&self) -> Vec<Volume> {
        let _ = self.input.path();
        Vec::new()
    }
    fn content(&mut self, _: usize, _: u64, _: &mut Vec<u8>) -> Result<Option<u64>> {
        Ok(None)
    }
}
