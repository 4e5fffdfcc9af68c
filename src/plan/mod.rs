//! Planning: from what is known of a pool to what is to be done with it. Pure: no I/O, no clock, the same every time.
//!
//! btrfs frees an extent only whole, so a plan is made extent by extent. Extents are looked at in an order that does not
//! depend on where they lie; each is matched, block by block, against what is to stay (`greedy`). Where eliminating it frees
//! more than it costs, its references move: to equal blocks that stay (*homes*), to holes, and what is found nowhere else is
//! *left over* and goes to a donor. That is done again on the pool as it would then be, until nothing more is found, so
//! that a second run has nothing to do.

mod apply;
pub mod export;
mod greedy;
mod holdings;
mod layout;
mod memory;
mod ops;
pub mod restore;
pub mod sample;
pub mod seeds;
mod table;

use std::collections::BTreeMap;

pub use apply::{Origins, PlannedPool, apply};
pub use holdings::{HeldBytes, Holdings, Layers, Share};
pub use layout::{BlockDestination, COMPRESSED_BLOCKS_MAX, DonorExtent, Layout};
pub use memory::{fingerprints_fit, lists_bytes, memory_bytes, table_slots_max};
pub use ops::{Batch, DonorFile, Op, ShareSource};

use crate::block::bytes;
use crate::facts::{Facts, PinReason, Proof};
use crate::numbers::{ExtentId, Slot};
use crate::spill::SpillVec;

/// Bytes of metadata that one more reference costs: a file extent item with its key (78) and its inline back reference
/// (37, rounded up for half-filled leaves), in two copies as btrfs keeps metadata by default.
pub const METADATA_BYTES_PER_REFERENCE: u64 = 256;

/// Longest run that a fingerprint alone does not prove: guests keep blocks that end in their own CRC32C, and all of
/// those have the same checksum. Two neighbours of that kind happen; more do not.
pub const UNPROVED_BLOCKS: u32 = 2;

/// Longest run that a fingerprint alone does not prove if two of its blocks look alike: ext4 keeps copies of its superblock and group
/// descriptors, which have two checksums among them, and once they were put together in a donor they make longer runs.
const UNPROVED_BLOCKS_ALIKE: u32 = 16;

/// References to one extent: every look at who holds it takes time with their number. `btrfs send` clones only what has 1024 at
/// most (kernel: `SEND_MAX_EXTENT_REFS`), but keeping to that leaves a twentieth of what can be freed, and planning takes longer.
pub const REFERENCES_MAX: u32 = 16 << 10;

/// References for each GiB of an image, 32 KiB each on average: beyond that, reading it in order and `cp --reflink` get slow.
pub const REFERENCES_PER_GIB_MAX: u32 = 32 << 10;

/// Rounds of looking again at the pool as it would be. Each frees more than the one before left. Three are usual, and six with
/// compression; extents of one block each that lie side by side, and whose home is at its limit of references, go one in a round.
const ROUNDS_MAX: usize = 256;

/// The generation of donors that exist only in a plan.
const PLANNED_GENERATION: u64 = u64::MAX;

/// Usual size of a batch of donors: little enough that they are still in memory when they are compared, and that little extra space
/// is needed.
pub const BATCH_BYTES: u64 = 128 << 20;

/// What the user may choose about a reclaim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Shortest run of blocks worth sharing amid other data, where two revisions have the place. It is weighed by the references that it
    /// adds: half of it is enough where only one reference maps the place, and half where it follows another run; half as much again is
    /// needed where there are three references or more.
    pub min_run_blocks: u32,
    /// Leave blocks of zeros as data.
    pub keep_zeros: bool,
    /// Leave preallocated ranges allocated.
    pub keep_preallocated: bool,
    /// Bytes on disk that donors may take before the extents that they replace are freed.
    pub work_space_bytes: u64,
    /// Bytes on disk that the donors of one batch may take, unless one extent alone leaves more over.
    pub batch_bytes: u64,
    /// References that one extent may get. Those that have more keep them.
    pub references_max: u32,
    /// References that an image may get for each GiB of its data. Those that have more keep them.
    pub references_per_gib_max: u32,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            min_run_blocks: 2,
            keep_zeros: false,
            keep_preallocated: false,
            work_space_bytes: 1 << 30,
            batch_bytes: BATCH_BYTES,
            references_max: REFERENCES_MAX,
            references_per_gib_max: REFERENCES_PER_GIB_MAX,
        }
    }
}

impl PlanOptions {
    /// Bytes that a run must free for each reference that it adds. Amid other data one adds two for each reference to the place; at the
    /// shortest run there is, only what those take counts.
    fn bytes_per_reference(&self) -> u64 {
        if self.min_run_blocks == 1 {
            METADATA_BYTES_PER_REFERENCE
        } else {
            bytes(self.min_run_blocks) / 4
        }
    }

    /// Bytes that must be freed for each byte that is rewritten, in 1/256. At the default of 8 KiB this is a 32nd. It falls with
    /// the shortest run: a user who accepts shorter runs accepts more rewriting.
    fn rewrite_weight(&self) -> u64 {
        u64::from(self.min_run_blocks.min(64)) * 4
    }
}

/// Why an extent is eliminated, by what most of it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EliminationReason {
    /// Its blocks are found elsewhere.
    Duplicate,
    /// Its blocks are zeros.
    Zeros,
    /// No image reaches it.
    Unreachable,
    /// It was allocated and never written.
    Preallocated,
    /// Its blocks take less when they are compressed.
    Compressed,
}

/// Bytes on disk, by the reason for which they are freed.
pub type BytesByReason = BTreeMap<EliminationReason, u64>;

/// An extent that is to be eliminated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elimination {
    /// Which.
    pub extent: ExtentId,
    /// What most of the freed bytes are.
    pub reason: EliminationReason,
    /// Bytes on disk that are freed, net of what is rewritten.
    pub freed_bytes: u64,
    /// Bytes on disk that its blocks take more than before. This is not zero only where compression is undone.
    pub grown_bytes: u64,
    /// Bytes on disk that are copied to a donor.
    pub rewritten_bytes: u64,
    /// Bytes of metadata that the references it leaves behind cost more than those it had.
    pub metadata_bytes: u64,
}

/// What a reclaim is to do: data that follows from [`Facts`] and [`PlanOptions`] alone, and that `exec` carries out without a
/// decision of its own.
#[derive(Debug, Clone, Default)]
pub struct ReclaimPlan {
    /// Where every block is to be.
    pub layout: Layout,
    /// Extents to eliminate, in the order of their batches.
    pub eliminations: SpillVec<Elimination>,
    /// Steps that are carried out one after the other, each within the work space.
    pub batches: Vec<Batch>,
    /// Donor files to write, by batch.
    pub donor_files: Vec<DonorFile>,
    /// The place of each donor extent.
    donor_places: SpillVec<ops::DonorPlace>,
    /// Bytes on disk that will be freed, by reason.
    pub freed: BytesByReason,
    /// Bytes on disk that could be freed if their extents were not pinned, by why they are.
    pub pinned: BTreeMap<PinReason, u64>,
    /// One in this many blocks could be looked up in the block table: 1 unless the pool is larger than the table.
    pub sampled: u32,
    /// Greatest number of bytes that donors take before what they replace is freed.
    pub peak_bytes: u64,
    /// Bytes on disk that must be free at the beginning. This is less than all donors take, since later donors may take what
    /// earlier batches freed.
    pub needed_bytes: u64,
}

impl ReclaimPlan {
    /// Bytes on disk that will be freed, net. Negative if undoing compression takes more than is freed.
    pub fn freed_bytes(&self) -> i64 {
        let signed = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
        let grown = self
            .eliminations
            .iter()
            .map(|elimination| elimination.grown_bytes)
            .sum();
        signed(self.freed.values().sum()) - signed(grown)
    }

    /// Bytes on disk that will be rewritten.
    pub fn rewritten_bytes(&self) -> u64 {
        self.eliminations
            .iter()
            .map(|elimination| elimination.rewritten_bytes)
            .sum()
    }

    /// Bytes of metadata that the new references are estimated to cost.
    pub fn metadata_bytes(&self) -> u64 {
        self.eliminations
            .iter()
            .map(|elimination| elimination.metadata_bytes)
            .sum()
    }
}

/// Makes a plan that rests on no short run that was not proved: `prove` reads slots and says what they hold. `go_on` is asked often, and
/// ends planning with its error.
///
/// # Errors
/// Whatever `prove` or `go_on` fails with.
pub fn plan_proved<E>(
    facts: &mut Facts,
    options: &PlanOptions,
    go_on: &dyn Fn() -> Result<(), E>,
    mut prove: impl FnMut(&Facts, &[Slot]) -> Result<SpillVec<(Slot, Proof)>, E>,
) -> Result<ReclaimPlan, E> {
    /// Proofs change decisions, which raise new questions, fewer each time; after these, what is unproved does not count.
    const QUESTIONS_MAX: usize = 64;
    let mut layout = Layout::new_in(facts.budget());
    let (mut rounds, mut questions) = (0, 0);
    let mut pinned = BTreeMap::new();
    while rounds < ROUNDS_MAX {
        let ask = questions < QUESTIONS_MAX;
        let round = if rounds == 0 {
            Round::first(facts, options, ask, go_on)?
        } else {
            Round::next(facts, options, ask, &mut layout, go_on)?
        };
        if ask && !round.unproved.is_empty() {
            questions += 1;
            let unproved = round.unproved();
            let proofs = prove(facts, &unproved)?;
            facts.add_proofs(proofs);
            if layout.is_refuted(facts, &unproved) {
                (layout, rounds) = (Layout::new_in(facts.budget()), 0);
                continue;
            }
            if round.is_refuted(facts) {
                continue;
            }
        }
        if rounds == 0 {
            pinned = round.pinned;
        }
        if round.gone.is_empty() {
            break;
        }
        layout.compose(facts, &round.gone, &round.runs, round.origins.as_ref());
        rounds += 1;
    }
    layout.place_leftovers(facts, options);
    let mut plan = ReclaimPlan {
        sampled: table::sampled(facts.slots() as usize, facts.table_slots_max),
        layout,
        pinned,
        eliminations: SpillVec::new_in(facts.budget()),
        ..ReclaimPlan::default()
    };
    ops::schedule(facts, &mut plan);
    Ok(plan)
}

/// What one pass over the whole pool decided.
struct Round {
    gone: SpillVec<ExtentId>,
    runs: SpillVec<layout::DedupRun>,
    /// Slots that must be read before these decisions count, in order.
    unproved: SpillVec<Slot>,
    pinned: BTreeMap<PinReason, u64>,
    /// Where the slots of the planned pool come from; none if the pass looked at the pool as it is.
    origins: Option<Origins>,
}

impl Round {
    /// Makes a pass over the pool as it is.
    fn first<E>(facts: &Facts, options: &PlanOptions, ask: bool, go_on: &dyn Fn() -> Result<(), E>) -> Result<Self, E> {
        let decisions = greedy::decide(facts, options, ask, |_| false, go_on)?;
        Ok(Self::of(decisions, None))
    }

    /// Makes a pass over the planned pool: the pool as a layout would leave it.
    fn next<E>(
        facts: &mut Facts,
        options: &PlanOptions,
        ask: bool,
        layout: &mut Layout,
        go_on: &dyn Fn() -> Result<(), E>,
    ) -> Result<Self, E> {
        layout.place_leftovers(facts, options);
        let applied = apply(facts, layout);
        let is_planned = |extent| applied.origins().extent(extent).is_none();
        let decisions = greedy::decide(&applied.facts, options, ask, is_planned, go_on);
        let origins = applied.undo(facts);
        Ok(Self::of(decisions?, Some(origins)))
    }

    fn of(mut decisions: greedy::Decisions, origins: Option<Origins>) -> Self {
        decisions.unproved.sort_unstable();
        decisions.unproved.dedup();
        Self {
            gone: decisions.gone,
            runs: decisions.runs,
            unproved: decisions.unproved,
            pinned: decisions.pinned,
            origins,
        }
    }

    /// The slot of the pool as it is that a slot of the pass stands for.
    fn origin(&self, slot: Slot) -> Slot {
        self.origins.as_ref().map_or(slot, |origins| origins.slot(slot))
    }

    /// The slots that must be read before these decisions count, as slots of the pool as it is, in order.
    fn unproved(&self) -> SpillVec<Slot> {
        let slots = self.unproved.iter().map(|slot| self.origin(*slot));
        let mut slots: SpillVec<Slot> = SpillVec::from_iter_in(slots, self.unproved.budget());
        slots.sort_unstable();
        slots.dedup();
        slots
    }

    /// Whether what was read refutes a run that counted on it.
    fn is_refuted(&self, facts: &Facts) -> bool {
        self.runs
            .iter()
            .any(|run| run.is_refuted(facts, &self.unproved, |slot| self.origin(slot)))
    }
}

#[cfg(test)]
mod tests;
