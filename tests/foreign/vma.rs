//! Writes archives as Proxmox's vzdump does, from the layout that is published.

use md5::{Digest, Md5};

use crate::common::Random;

const CLUSTER: usize = 65536;
const BLOCK: usize = 4096;

/// What an archive is made of, and what of it is not as it should be.
#[derive(Default)]
pub(crate) struct VmaMaker<'a> {
    /// Names and contents. A name ends where its bytes end.
    pub(crate) devices: Vec<(&'a [u8], Vec<u8>)>,
    pub(crate) configs: Vec<(&'a [u8], Vec<u8>)>,
    /// Clusters come in this order; 0 is that of the devices.
    pub(crate) order: u64,
    /// Clusters of an extent.
    pub(crate) per_extent: usize,
    /// The size that a device has in the header in place of its own, by the device's place.
    pub(crate) sizes: Vec<(usize, u64)>,
    /// Clusters that come once more, or not at all.
    pub(crate) doubled: Option<(usize, usize)>,
    pub(crate) dropped: Option<(usize, usize)>,
    /// Changes the header or an extent's header before it gets its hash.
    pub(crate) change: Option<fn(&mut [u8])>,
    pub(crate) change_extent: Option<fn(&mut [u8])>,
}

fn sealed(header: &mut [u8], at: usize) {
    header[at..at + 16].fill(0);
    let hash = Md5::digest(&*header);
    header[at..at + 16].copy_from_slice(&hash);
}

impl VmaMaker<'_> {
    fn header(&self, uuid: [u8; 16]) -> Vec<u8> {
        let mut blobs = vec![0u8];
        let mut put = |bytes: &[u8]| {
            let at = u32::try_from(blobs.len()).unwrap();
            blobs.extend(u16::try_from(bytes.len()).unwrap().to_le_bytes());
            blobs.extend(bytes);
            at
        };
        let named = |name: &[u8]| [name, &[0]].concat();
        let mut header = vec![0; 12288];
        header[..8].copy_from_slice(b"VMA\0\0\0\0\x01");
        header[8..24].copy_from_slice(&uuid);
        header[24..32].copy_from_slice(&1_700_000_000u64.to_be_bytes());
        for (number, (name, content)) in self.configs.iter().enumerate() {
            let (name_at, data_at) = (put(&named(name)), put(content));
            header[2044 + 4 * number..][..4].copy_from_slice(&name_at.to_be_bytes());
            header[3068 + 4 * number..][..4].copy_from_slice(&data_at.to_be_bytes());
        }
        for (number, (name, content)) in self.devices.iter().enumerate() {
            let at = 4096 + 32 * (number + 1);
            let told = self.sizes.iter().find(|(place, _)| *place == number);
            let size = told.map_or(content.len() as u64, |(_, size)| *size);
            header[at..at + 4].copy_from_slice(&put(&named(name)).to_be_bytes());
            header[at + 8..at + 16].copy_from_slice(&size.to_be_bytes());
        }
        let used = u32::try_from(blobs.len()).unwrap();
        header[48..52].copy_from_slice(&12288u32.to_be_bytes());
        header[52..56].copy_from_slice(&used.to_be_bytes());
        header.extend(&blobs);
        header.resize(header.len().next_multiple_of(512), 0);
        let length = u32::try_from(header.len()).unwrap();
        header[56..60].copy_from_slice(&length.to_be_bytes());
        if let Some(change) = self.change {
            change(&mut header);
        }
        sealed(&mut header, 32);
        header
    }

    /// The clusters, in the order in which they come.
    fn clusters(&self) -> Vec<(usize, usize)> {
        let all = self.devices.iter().enumerate();
        let mut clusters: Vec<(usize, usize)> = all
            .flat_map(|(device, (_, content))| (0..content.len().div_ceil(CLUSTER)).map(move |at| (device, at)))
            .filter(|one| self.dropped != Some(*one))
            .collect();
        clusters.extend(self.doubled);
        let mut random = Random(self.order);
        if self.order > 0 {
            for at in (1..clusters.len()).rev() {
                clusters.swap(at, usize::try_from(random.below(at as u64 + 1)).unwrap());
            }
        }
        clusters
    }

    pub(crate) fn make(&self) -> Vec<u8> {
        let uuid = *b"0123456789abcdef";
        let mut archive = self.header(uuid);
        for clusters in self.clusters().chunks(self.per_extent.max(1)) {
            let (mut header, mut data) = (vec![0u8; 512], Vec::<u8>::new());
            header[..4].copy_from_slice(b"VMAE");
            header[8..24].copy_from_slice(&uuid);
            for (entry, (device, number)) in clusters.iter().enumerate() {
                let mut content = self.devices[*device].1[number * CLUSTER..].to_vec();
                content.resize(CLUSTER, 0);
                let mut mask = 0u64;
                for (bit, block) in content.chunks(BLOCK).enumerate() {
                    if block.iter().any(|byte| *byte != 0) {
                        mask |= 1 << bit;
                        data.extend(block);
                    }
                }
                let info = mask << 48 | (*device as u64 + 1) << 32 | *number as u64;
                header[40 + 8 * entry..][..8].copy_from_slice(&info.to_be_bytes());
            }
            let blocks = u16::try_from(data.len() / BLOCK).unwrap();
            header[6..8].copy_from_slice(&blocks.to_be_bytes());
            if let Some(change) = self.change_extent {
                change(&mut header);
            }
            sealed(&mut header, 24);
            archive.extend(header);
            archive.extend(data);
        }
        archive
    }
}
