//! The numbers by which commits, images, extents and blocks of a store are told apart. Each is a type of its own, so that none is taken for
//! another or for a count. Each has 32 bits, as archives and the index store it. Nothing here does I/O.

/// A number that sets and ranges can hold.
pub trait Number: Copy + Ord {
    /// Makes the number from a bare one.
    fn of(number: u32) -> Self;

    /// Returns the bare number.
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

/// Defines a type of number, which is printed and serialised as the bare number.
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

    /// Returns the number of the commit after this one. [`CommitNumber::is_allowed`] says whether a commit can have it.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }

    /// Returns the number of the commit before this one; 0 for the first.
    #[must_use]
    pub fn previous(self) -> Self {
        Self(self.0.saturating_sub(1))
    }
}

/// Adds the methods of a number that is an item's index in a list.
macro_rules! place {
    ($name:ident) => {
        impl $name {
            /// Returns the number of the item at an index. The largest number stands for every index that 32 bits cannot hold; lists are
            /// limited so that none is reached.
            #[inline]
            #[must_use]
            pub fn at(place: usize) -> Self {
                Self(u32::try_from(place).unwrap_or(u32::MAX))
            }

            /// Returns its index in the list.
            #[inline]
            #[must_use]
            pub const fn index(self) -> usize {
                self.0 as usize
            }

            /// Returns the numbers of the first `count` items.
            pub fn first(count: u32) -> impl ExactSizeIterator<Item = Self> + Clone {
                (0..count).map(Self)
            }

            /// Returns the items of a list, each with its number.
            pub fn numbered<I: IntoIterator>(items: I) -> impl Iterator<Item = (Self, I::Item)> {
                (0..).map(Self).zip(items)
            }
        }
    };
}

number! {
    /// An image. The number is its index in the list of images that a run works on.
    ImageId
}
place!(ImageId);

number! {
    /// A machine that images belong to. The machines of a run are numbered in the order of their first images.
    MachineId
}
place!(MachineId);

number! {
    /// A set of images that have items of a [`crate::facts::SharedList`] in common. The number is its index among the sets of that list.
    ImageSetId
}
place!(ImageSetId);

number! {
    /// An extent of the pool. The number is its index in [`crate::facts::Facts::extents`].
    ExtentId
}
place!(ExtentId);

number! {
    /// An extent that a plan writes to a donor. The number is its index in [`crate::plan::Layout::donors`].
    DonorExtentId
}
place!(DonorExtentId);

number! {
    /// A donor that [`crate::fs::Filesystem::create_donor`] made. A filesystem numbers its donors in the order in which it makes them.
    DonorId
}
place!(DonorId);

number! {
    /// A donor file that a plan asks for. The number is its index in [`crate::plan::ReclaimPlan::donor_files`].
    DonorFileId
}
place!(DonorFileId);

/// Adds the arithmetic of a number that counts blocks: a number plus a count of blocks is a number, and the difference of two numbers is a
/// count of blocks.
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
            /// Returns the range between two bare numbers.
            #[inline]
            #[must_use]
            pub const fn range(numbers: std::ops::Range<u32>) -> std::ops::Range<Self> {
                Self(numbers.start)..Self(numbers.end)
            }

            /// Returns the number `blocks` blocks further on; `None` if 32 bits cannot hold it.
            #[inline]
            #[must_use]
            pub fn checked_add(self, blocks: u32) -> Option<Self> {
                self.0.checked_add(blocks).map(Self)
            }

            /// Returns the number `blocks` blocks further on, or the largest number if 32 bits cannot hold it.
            #[inline]
            #[must_use]
            pub fn saturating_add(self, blocks: u32) -> Self {
                Self(self.0.saturating_add(blocks))
            }

            /// Returns how many blocks it lies beyond `from`; 0 if it does not.
            #[inline]
            #[must_use]
            pub fn saturating_sub(self, from: Self) -> u32 {
                self.0.saturating_sub(from.0)
            }

            /// Returns how many blocks it lies beyond `from`; `None` if it lies before it.
            #[inline]
            #[must_use]
            pub fn checked_sub(self, from: Self) -> Option<u32> {
                self.0.checked_sub(from.0)
            }

            /// Returns the number of the block before it; `None` for the first.
            #[inline]
            #[must_use]
            pub fn previous(self) -> Option<Self> {
                self.0.checked_sub(1).map(Self)
            }

            /// Returns its index in a list that has one item for each block.
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
    /// A block of an extent. Slots are numbered across all extents of a pool, in the order of the extents' addresses.
    ///
    /// 32 bits number 16 TiB of distinct extents; a pool with more is refused ([`crate::error::Error::TooLarge`]).
    Slot
}
block_number!(Slot);

impl StoreBlock {
    /// The largest end that a store can have, at 16 TiB.
    pub const END_MAX: Self = Self(u32::MAX - 1);
}
