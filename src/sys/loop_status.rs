//! `LOOP_GET_STATUS64`: which file a loop device has.

use std::os::fd::AsFd;

use linux_raw_sys::loop_device::loop_info64;
use rustix::io::Result;
use rustix::ioctl::{Getter, Opcode, ioctl};

/// `LOOP_GET_STATUS64` (uapi/linux/loop.h).
const LOOP_GET_STATUS64: Opcode = 0x4c05;

/// The file behind a loop device, as (device, inode), also when it was renamed or removed since.
///
/// # Errors
/// `ENXIO` if it has none.
pub fn file_of_loop(fd: impl AsFd) -> Result<(u64, u64)> {
    // SAFETY: the kernel fills exactly this structure of plain integers.
    let info: loop_info64 = unsafe { ioctl(fd, Getter::<LOOP_GET_STATUS64, _>::new()) }?;
    Ok((info.lo_device, info.lo_inode))
}
