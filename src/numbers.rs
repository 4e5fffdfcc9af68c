//! The numbers that everything is told apart by, each a type of its own: none is taken for another, and none for a count of blocks. Each
//! has 32 bits, as files and archives keep it. No I/O.

/// Any of these numbers, for sets and ranges of them.
pub trait Number: Copy + Ord {
    /// The number that a bare one stands for.
    fn of(number: u32) -> Self;

    /// The bare number.
    fn bare(self) -> u32;
}

impl Number for u32 {
    #[inline]
    fn of(number: u32) -> Self {
        number
    }

    #[inline]
    fn bare(self) -> u32 {
        self
    }
}

/// A number with a meaning of its own, which is printed and serialised as the bare number.
macro_rules! number {
    ($(#[$docs:meta])* $name:ident) => {
        $(#[$docs])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize)]
        #[serde(transparent)]
        #[repr(transparent)]
        pub struct $name(
            /// The bare number.
            pub u32,
        );

        impl Number for $name {
            #[inline]
            fn of(number: u32) -> Self {
                Self(number)
            }

            #[inline]
            fn bare(self) -> u32 {
                self.0
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The number of a commit in its archive, from [`CommitNumber::FIRST`] to [`CommitNumber::LAST`]. 0, the default, stands for no commit.
    CommitNumber
}

impl CommitNumber {
    /// The number of an archive's first commit.
    pub const FIRST: Self = Self(1);
    /// The largest number that a commit can have.
    pub const LAST: Self = Self(u32::MAX - 1);

    /// Whether a commit can have it.
    pub fn is_allowed(self) -> bool {
        (Self::FIRST..=Self::LAST).contains(&self)
    }

    /// The number of the commit after this one; there may be none.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// The number of the commit before this one; 0 before the first.
    #[must_use]
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

/// What numbers do that are places in lists.
macro_rules! place {
    ($name:ident) => {
        impl $name {
            /// The number of what stands at a place of the list. There are never so many that the largest number would stand for two.
            #[inline]
            #[must_use]
            pub fn at(place: usize) -> Self {
                Self(u32::try_from(place).unwrap_or(u32::MAX))
            }

            /// Its place in the list.
            #[inline]
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }

            /// The numbers of the first `count` there are.
            pub fn first(count: u32) -> impl ExactSizeIterator<Item = Self> + Clone {
                (0..count).map(Self)
            }

            /// Items of the list, each with its number.
            pub fn numbered<I: IntoIterator>(items: I) -> impl Iterator<Item = (Self, I::Item)> {
                (0..).map(Self).zip(items)
            }
        }
    };
}

number! {
    /// An image, by its place in the list of images that a run works on.
    ImageId
}
place!(ImageId);

number! {
    /// A machine that images belong to, by its place among those of a run.
    MachineId
}
place!(MachineId);

number! {
    /// A set of images, by its place among those of a [`crate::facts::SharedList`].
    ImageSetId
}
place!(ImageSetId);

number! {
    /// An extent, by its place in [`crate::facts::Facts::extents`].
    ExtentId
}
place!(ExtentId);

number! {
    /// A donor extent, by its place in [`crate::plan::Layout::donors`].
    DonorExtentId
}
place!(DonorExtentId);

number! {
    /// A donor that was made, by its place among those of a filesystem.
    DonorId
}
place!(DonorId);

number! {
    /// A donor file of a plan, by its place in [`crate::plan::ReclaimPlan::donor_files`].
    DonorFileId
}
place!(DonorFileId);

/// What numbers do that blocks have one after the other: a number and blocks make a number, and two numbers are blocks apart.
macro_rules! block_number {
    ($name:ident) => {
        impl std::ops::Add<u32> for $name {
            type Output = Self;

            #[inline]
            fn add(self, blocks: u32) -> Self {
                Self(self.0 + blocks)
            }
        }

        impl std::ops::Sub<u32> for $name {
            type Output = Self;

            #[inline]
            fn sub(self, blocks: u32) -> Self {
                Self(self.0 - blocks)
            }
        }

        impl std::ops::AddAssign<u32> for $name {
            #[inline]
            fn add_assign(&mut self, blocks: u32) {
                self.0 += blocks;
            }
        }

        impl std::ops::Sub for $name {
            type Output = u32;

            #[inline]
            fn sub(self, from: Self) -> u32 {
                self.0 - from.0
            }
        }

        impl $name {
            /// The range from one bare number to another.
            #[inline]
            #[must_use]
            pub const fn range(numbers: std::ops::Range<u32>) -> std::ops::Range<Self> {
                Self(numbers.start)..Self(numbers.end)
            }

            /// The number so many blocks on; none if there is no such number.
            #[inline]
            #[must_use]
            pub fn checked_add(self, blocks: u32) -> Option<Self> {
                self.0.checked_add(blocks).map(Self)
            }

            /// The number so many blocks on, or the largest there is.
            #[inline]
            #[must_use]
            pub fn saturating_add(self, blocks: u32) -> Self {
                Self(self.0.saturating_add(blocks))
            }

            /// How many blocks it is beyond another number; 0 if it is not.
            #[inline]
            #[must_use]
            pub fn saturating_sub(self, from: Self) -> u32 {
                self.0.saturating_sub(from.0)
            }

            /// How many blocks it is beyond another number; none if it is before that.
            #[inline]
            #[must_use]
            pub fn checked_sub(self, from: Self) -> Option<u32> {
                self.0.checked_sub(from.0)
            }

            /// The number of the block before it; none before the first.
            #[inline]
            #[must_use]
            pub fn previous(self) -> Option<Self> {
                self.0.checked_sub(1).map(Self)
            }

            /// Its place in a list that has one item for each block.
            #[inline]
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

number! {
    /// A block's number in the store of an archive: its store address, in blocks.
    StoreBlock
}
block_number!(StoreBlock);

number! {
    /// A block of an extent, numbered across all extents of a pool: extent after extent, in the order of their addresses.
    ///
    /// 32 bits number 16 TiB of distinct extents; a pool with more is refused ([`crate::error::Error::TooLarge`]).
    Slot
}
block_number!(Slot);

impl StoreBlock {
    /// Where a store ends at most: at 16 TiB.
    pub const END_MAX: Self = Self(u32::MAX - 1);
}
