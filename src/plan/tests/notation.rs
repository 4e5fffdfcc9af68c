//! Pools and plans as text that a person can read, for the tests of planning.
//!
//! ```text
//! A  abcdefgh          an extent of eight blocks; equal letters are equal blocks, and 0 is a block of zeros
//! B  abcDefgh held     capitals are blocks that only look like their small letters: fingerprints are equal, contents are not
//! web  A               an image that maps all of A
//! db   B[0..4] -*2 A   another one: four blocks of B, a hole of two, all of A
//! log  ~A[0..2]        a preallocated range, which reads as zeros
//! ```
//! Words behind an extent say what is special about it: `nodatacow`, `held` (by a snapshot), `zstd` (it takes half its blocks on
//! disk), `group=N`.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::fmt::Write;
use std::ops::Range;

use proptest::prelude::*;

use crate::block::{BLOCK_LEN, bytes};
use crate::facts::{Class, Compression, Extent, Facts, Mapping, PinReason, Proof, Reference, proof_of};
use crate::numbers::{DonorFileId, ExtentId, ImageId, Slot};
use crate::plan::{Op, PlanOptions, ReclaimPlan, ShareSource, plan_proved};
use crate::range;
use crate::spill::SpillVec;

/// A pool that was written down.
#[derive(Debug)]
pub(in crate::plan) struct Pool {
    pub(in crate::plan) facts: Facts,
    /// What each slot holds.
    pub(in crate::plan) content: Vec<char>,
    images: Vec<String>,
}

/// What a block holds, as who reads it would hash it.
fn proof(content: char) -> Proof {
    if content == '0' {
        proof_of(&[0; BLOCK_LEN])
    } else {
        u64::from(u32::from(content)).to_le_bytes()
    }
}

/// The fingerprints of blocks.
fn fingerprints_of(content: &[char]) -> Vec<u32> {
    let fingerprint = |content: &char| match content {
        '0' => 0,
        content => u32::from(content.to_ascii_lowercase()),
    };
    content.iter().map(fingerprint).collect()
}

/// A part of an image, as it is written down.
struct Piece {
    /// None for holes.
    extent: Option<usize>,
    at: Range<u32>,
    preallocated: bool,
}

fn piece(word: &str, extents: &[Extent]) -> Piece {
    if let Some(hole) = word.strip_prefix('-') {
        let blocks = hole.strip_prefix('*').map_or(1, |blocks| blocks.parse().unwrap());
        return Piece {
            extent: None,
            at: 0..blocks,
            preallocated: false,
        };
    }
    let name = word.trim_start_matches('~');
    let extent = usize::from(name.as_bytes()[0] - b'A');
    let at = name
        .get(1..)
        .and_then(|range| range.strip_prefix('[')?.strip_suffix(']'));
    let at = at.map_or(0..extents[extent].blocks, |range| {
        let (start, end) = range.split_once("..").unwrap();
        start.parse().unwrap()..end.parse().unwrap()
    });
    assert!(at.end <= extents[extent].blocks, "{word} is beyond its extent");
    Piece {
        extent: Some(extent),
        at,
        preallocated: word.starts_with('~'),
    }
}

fn extent(content: &str, words: &[&str], place: u32, first_slot: Slot) -> Extent {
    let blocks = u32::try_from(content.len()).unwrap();
    let has = |word: &str| words.contains(&word);
    let group = words.iter().find_map(|word| word.strip_prefix("group="));
    let compression = if has("zstd") {
        Compression::Zstd
    } else {
        Compression::None
    };
    Extent {
        address: (u64::from(place) + 1) << 30,
        disk_bytes: if has("zstd") {
            bytes(blocks.div_ceil(2))
        } else {
            bytes(blocks)
        },
        generation: 1,
        first_slot,
        blocks,
        class: Class {
            checksummed: !has("nodatacow"),
            compression,
            groups: group.map_or(0, |group| 1 << group.parse::<u32>().unwrap()),
        },
        pinned: has("held").then_some(PinReason::HeldByOthers),
        compression_goal: None,
    }
}

impl Pool {
    /// Reads a pool.
    pub(in crate::plan) fn of(text: &str) -> Self {
        let (mut extents, mut content, mut images) = (Vec::new(), Vec::new(), Vec::new());
        let mut references = Vec::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let Some((name, words)) = words.split_first() else {
                continue;
            };
            if name.len() == 1 && name.starts_with(|c: char| c.is_ascii_uppercase()) {
                let place = u32::try_from(extents.len()).unwrap();
                assert_eq!(
                    u32::from(name.as_bytes()[0] - b'A'),
                    place,
                    "extents are named in order"
                );
                let first_slot = Slot(u32::try_from(content.len()).unwrap());
                extents.push(extent(words[0], &words[1..], place, first_slot));
                content.extend(words[0].chars());
                continue;
            }
            let mut file_block = 0;
            for piece in words.iter().map(|word| piece(word, &extents)) {
                let blocks = piece.at.end - piece.at.start;
                if let Some(extent) = piece.extent {
                    references.push(Reference {
                        image: ImageId::at(images.len()),
                        file_block,
                        slot: extents[extent].first_slot + piece.at.start,
                        blocks,
                        extent: ExtentId::at(extent),
                        preallocated: piece.preallocated,
                    });
                }
                file_block += blocks;
            }
            images.push((*name).to_owned());
        }
        let mut facts = Facts::new(extents.into_iter().collect(), references.into_iter().collect(), 0);
        facts.fingerprints = fingerprints_of(&content).into();
        Self { facts, content, images }
    }

    /// Makes some images something outside the pool: extents that only they hold are unknown, and those that they hold as well are pinned.
    pub(in crate::plan) fn leave_out(&mut self, is_left: impl Fn(ImageId) -> bool) {
        let mut numbers = BTreeMap::new();
        for image in self.images().filter(|image| !is_left(*image)) {
            numbers.insert(image, ImageId::at(numbers.len()));
        }
        let mut references: Vec<Reference> = self.facts.references().collect();
        let held: BTreeSet<(ExtentId, u32)> = references
            .iter()
            .filter(|one| is_left(one.image))
            .flat_map(|one| range::each(one.slots()).map(|slot| (one.extent, slot.0)))
            .collect();
        references.retain(|one| !is_left(one.image));
        let (mut extents, mut content, mut moved) = (Vec::new(), Vec::new(), BTreeMap::new());
        for (number, extent) in ExtentId::numbered(&self.facts.extents) {
            let is_known = |slot: Slot| references.iter().any(|one| one.slots().contains(&slot));
            let is_held = |slot: Slot| held.contains(&(number, slot.0));
            let whole = vec![extent.slots()];
            // Where blocks are freed one by one, what others hold of an extent is one of its own.
            let parts = if self.facts.frees_blocks {
                range::each(extent.slots()).map(|slot| slot..slot + 1).collect()
            } else {
                whole
            };
            for part in parts.into_iter().filter(|part| range::each(part.clone()).any(is_known)) {
                let first_slot = Slot(u32::try_from(content.len()).unwrap());
                for slot in range::each(part.clone()) {
                    moved.insert(
                        slot,
                        (ExtentId::at(extents.len()), Slot(u32::try_from(content.len()).unwrap())),
                    );
                    content.push(self.content[slot.index()]);
                }
                let pinned = range::each(part.clone())
                    .any(is_held)
                    .then_some(PinReason::HeldByOthers);
                extents.push(Extent {
                    address: extent.address + bytes(part.start - extent.first_slot),
                    disk_bytes: extent.disk_share(range::length(&part)),
                    first_slot,
                    blocks: range::length(&part),
                    pinned: extent.pinned.or(pinned),
                    ..extent.clone()
                });
            }
        }
        let single = references.iter().flat_map(|one| {
            range::each(one.slots())
                .zip(one.file_block..)
                .map(|(slot, file_block)| Reference {
                    image: numbers[&one.image],
                    file_block,
                    slot: moved[&slot].1,
                    blocks: 1,
                    extent: moved[&slot].0,
                    preallocated: one.preallocated,
                })
        });
        let mut facts = Facts::new(extents.into_iter().collect(), single.collect(), 0);
        facts.frees_blocks = self.facts.frees_blocks;
        facts.fingerprints = fingerprints_of(&content).into();
        (self.facts, self.content) = (facts, content);
    }

    /// Plans, and reads what is asked for.
    pub(in crate::plan) fn plan(&mut self, options: &PlanOptions) -> ReclaimPlan {
        let content = &self.content;
        let prove = |_: &Facts, slots: &[Slot]| {
            let proofs = slots.iter().map(|slot| (*slot, proof(content[slot.index()])));
            Ok::<SpillVec<_>, Infallible>(proofs.collect())
        };
        let Ok(plan) = plan_proved(&mut self.facts, options, &|| Ok(()), prove);
        plan
    }

    /// Remembers what all blocks hold, as if they had been read.
    pub(in crate::plan) fn prove_all(&mut self) {
        let proofs = range::from(Slot(0))
            .zip(&self.content)
            .map(|(slot, content)| (slot, proof(*content)));
        self.facts.add_proofs(proofs);
    }

    /// What an image maps: the slot of each block, unless it is a hole or preallocated.
    pub(in crate::plan) fn mapped(facts: &Facts, image: ImageId, blocks: usize) -> Vec<Option<Slot>> {
        let mut mapped = vec![None; blocks];
        for mapping in facts.mappings_of(image).iter().filter(|one| !one.preallocated) {
            let Mapping { slot, file_block, .. } = *mapping;
            for n in 0..mapping.blocks {
                mapped[(file_block + n) as usize] = Some(slot + n);
            }
        }
        mapped
    }

    /// Blocks of the longest image.
    pub(in crate::plan) fn image_blocks(&self) -> usize {
        let ends = self.facts.references().map(|one| one.file_block + one.blocks);
        ends.max().unwrap_or(0) as usize
    }

    /// The images.
    pub(in crate::plan) fn images(&self) -> impl ExactSizeIterator<Item = ImageId> + use<> {
        ImageId::first(u32::try_from(self.images.len()).unwrap())
    }

    /// What images hold, block by block; what reads as zeros is 0.
    pub(in crate::plan) fn texts(&self) -> Vec<String> {
        let blocks = self.image_blocks();
        let text = |image| {
            let mapped = Self::mapped(&self.facts, image, blocks).into_iter();
            mapped
                .map(|slot| slot.map_or('0', |slot| self.content[slot.index()]))
                .collect()
        };
        self.images().map(text).collect()
    }

    /// Plans, and prints the plan.
    pub(in crate::plan) fn planned(&mut self, options: &PlanOptions) -> String {
        let plan = self.plan(options);
        self.print(&plan)
    }

    fn name(extent: ExtentId) -> char {
        char::from(b'A' + u8::try_from(extent.0).unwrap())
    }

    /// A plan as a person reads it: what is freed and why, and, batch by batch, donors and the ops of each extent that goes.
    fn print(&self, plan: &ReclaimPlan) -> String {
        let mut text = String::new();
        let kib = |bytes: u64| format!("{} KiB", bytes >> 10);
        let freed = plan
            .freed
            .iter()
            .map(|(reason, bytes)| format!(", {reason:?} {}", kib(*bytes)));
        let freed: String = freed.collect();
        writeln!(text, "frees {} KiB{freed}", plan.freed_bytes() / 1024).unwrap();
        for (why, bytes) in &plan.pinned {
            writeln!(text, "pinned: {} {why:?}", kib(*bytes)).unwrap();
        }
        if plan.sampled > 1 {
            writeln!(text, "looks up one block in {}", plan.sampled).unwrap();
        }
        if plan.rewritten_bytes() > 0 {
            let (peak, needed) = (kib(plan.peak_bytes), kib(plan.needed_bytes));
            writeln!(
                text,
                "rewrites {}; donors hold {peak} at most, {needed} must be free",
                kib(plan.rewritten_bytes())
            )
            .unwrap();
        }
        for (number, batch) in plan.batches.iter().enumerate() {
            if batch.eliminations.is_empty() {
                continue;
            }
            writeln!(text, "batch {number}, {} compared", kib(batch.compared_bytes)).unwrap();
            for file in range::each(batch.donor_files.clone()) {
                writeln!(text, "  donor {file} = {}", self.donor(plan, file)).unwrap();
            }
            for one in &plan.eliminations[batch.eliminations.clone()] {
                let (name, freed) = (Self::name(one.extent), kib(one.freed_bytes));
                let costs = [
                    (one.rewritten_bytes, "rewrites"),
                    (one.grown_bytes, "grows"),
                    (one.metadata_bytes, "metadata"),
                ];
                write!(text, "  {name} goes, {:?}: frees {freed}", one.reason).unwrap();
                for (bytes, what) in costs.iter().filter(|cost| cost.0 > 0) {
                    write!(text, ", {what} {bytes}").unwrap();
                }
                text.push('\n');
                for op in plan.ops(&self.facts, one.extent) {
                    writeln!(text, "    {}", self.op(&op)).unwrap();
                }
            }
        }
        text
    }

    /// What a donor file holds; its extents are apart.
    pub(in crate::plan) fn donor(&self, plan: &ReclaimPlan, file: DonorFileId) -> String {
        let donors = plan.donor_files[file.index()].extents.iter();
        let donors = donors.map(|extent| &plan.layout.donors()[extent.index()]);
        let texts = donors.map(|donor| {
            let slots = plan.layout.pieces_of(donor).iter().cloned().flat_map(range::each);
            slots.map(|slot| self.content[slot.index()]).collect::<String>()
        });
        texts.collect::<Vec<_>>().join(" ")
    }

    fn op(&self, op: &Op) -> String {
        let range = |from: u32| format!("{from}..{}", from + op.blocks);
        let image = |image: ImageId| &self.images[image.index()];
        let source = match op.source {
            ShareSource::Image { image: of, block } => format!("{} {}", image(of), range(block)),
            ShareSource::Donor { file, block } => format!("donor {file} {}", range(block)),
            ShareSource::Hole => "hole".to_owned(),
        };
        format!("{} {} <- {source}", image(op.image), range(op.file_block))
    }
}

/// Contents of extents: stretches of the alphabet, so that runs recur, zeros, repetitions, and blocks that only look alike.
fn content() -> impl Strategy<Value = String> {
    let stretch = prop_oneof![
        6 => (b'a'..b'v', 1u8..12).prop_map(|(from, length)| (from..(from + length).min(b'z')).map(char::from).collect()),
        1 => (1usize..8).prop_map(|length| "0".repeat(length)),
        1 => ("[a-c]", 1usize..40).prop_map(|(letter, length)| letter.repeat(length)),
        2 => "[a-zA-Z]{1,4}",
    ];
    prop::collection::vec(stretch, 1..4).prop_map(|stretches: Vec<String>| stretches.concat())
}

/// Pools of any kind, as text: what a property does not hold for can be read, and written into a test.
pub(in crate::plan) fn pools() -> impl Strategy<Value = String> {
    let word = prop_oneof![
        12 => Just(""),
        1 => Just(" nodatacow"),
        1 => Just(" held"),
        1 => Just(" group=1"),
    ];
    let extents = prop::collection::vec((content(), word), 1..8);
    let index = any::<prop::sample::Index>;
    let piece = prop_oneof![
        6 => (Just(""), index(), index(), index(), Just(false)),
        4 => (Just(""), index(), index(), index(), Just(true)),
        1 => (Just("~"), index(), index(), index(), Just(false)),
        1 => (Just("-"), index(), index(), index(), Just(false)),
    ];
    let images = prop::collection::vec(prop::collection::vec(piece, 1..8), 1..5);
    (extents, images).prop_map(|(extents, images)| {
        let mut text = String::new();
        for ((content, word), name) in extents.iter().zip('A'..) {
            writeln!(text, "{name} {content}{word}").unwrap();
        }
        for (pieces, number) in images.iter().zip(1..) {
            write!(text, "vm{number}").unwrap();
            for (kind, extent, from, length, is_whole) in pieces {
                let place = extent.index(extents.len());
                let blocks = extents[place].0.len();
                let from = if *is_whole { 0 } else { from.index(blocks) };
                let end = if *is_whole {
                    blocks
                } else {
                    from + 1 + length.index(blocks - from)
                };
                match *kind {
                    "-" => write!(text, " -*{}", end - from).unwrap(),
                    kind => write!(
                        text,
                        " {kind}{}[{from}..{end}]",
                        char::from(b'A' + u8::try_from(place).unwrap())
                    )
                    .unwrap(),
                }
            }
            text.push('\n');
        }
        text
    })
}

/// What a user may choose.
pub(in crate::plan) fn options() -> impl Strategy<Value = PlanOptions> {
    let references = (
        prop_oneof![Just(1000u32), 1u32..6],
        prop_oneof![Just(1u32 << 18), 1000u32..200_000],
    );
    let space = prop_oneof![Just(1u64 << 30), 4096u64..200_000];
    (1u32..8, any::<bool>(), any::<bool>(), space, references).prop_map(
        |(
            min_run_blocks,
            keep_zeros,
            keep_preallocated,
            work_space_bytes,
            (references_max, references_per_gib_max),
        )| {
            PlanOptions {
                min_run_blocks,
                keep_zeros,
                keep_preallocated,
                work_space_bytes,
                batch_bytes: work_space_bytes / 3,
                references_max,
                references_per_gib_max,
            }
        },
    )
}
