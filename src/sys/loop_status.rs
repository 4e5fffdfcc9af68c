//! `LOOP_GET_STATUS64`: tells the file behind a loop device.

use std::os::fd::AsFd;

use linux_raw_sys::loop_device::loop_info64;
use rustix::io::Result;
use rustix::ioctl::{Getter, Opcode, ioctl};

/// `LOOP_GET_STATUS64` (uapi/linux/loop.h).
const LOOP_GET_STATUS64: Opcode = 0x4c05;

/// Returns the file behind a loop device as (device, inode), even if it was renamed or removed since.
///
/// # Errors
/// Returns `ENXIO` if the device has no file.
pub fn file_of_loop(fd: impl AsFd) -> Result<(u64, u64)> {
    // SAFETY: the kernel fills exactly this structure of plain integers.
    let info: loop_info64 = unsafe { ioctl(fd, Getter::<LOOP_GET_STATUS64, _>::new()) }?;
    Ok((info.lo_device, info.lo_inode))
}
