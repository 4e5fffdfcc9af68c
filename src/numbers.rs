//! The numbers that everything is told apart by, each a type of its own: none is taken for another, and none for a count of blocks. Each
//! has 32 bits, as files and archives keep it. No I/O.

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
    /// An extent, by its place in [`crate::facts::Facts::extents`].
    ExtentId
}
place!(ExtentId);
