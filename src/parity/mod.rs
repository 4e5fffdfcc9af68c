//! Parity: what is stored beside the bytes of an archive so that lost ones can be computed. Nothing here does I/O, and nothing here knows records
//! beyond the place where parity is put between them: see [`crate::archive::parity`].
//!
//! A *group* is a range of an archive's own bytes. It is cut into rows of [`ROW_BYTES`], and each row into [`COLUMNS`] cells of [`CELL_BYTES`]. The
//! cells of one column are a code of their own: any of them can be computed from as many others as there are rows, of those in the group and those of its
//! parity. `code` computes both; `geometry` says what a group is and where its parity lies; `tables` holds what tells intact cells from lost ones.

pub mod code;
pub mod geometry;
pub mod tables;

/// Bytes of a cell, in which bytes are lost together: a sector of a disk. Cells lie on multiples of it, counted from the beginning of the archive.
pub const CELL_BYTES: usize = 4096;
/// Cells of a row.
pub const COLUMNS: usize = 4;
/// Bytes of a row.
pub const ROW_BYTES: usize = CELL_BYTES * COLUMNS;
/// Rows of parity that the code has. Those of them that are not stored count as lost.
pub const CODE_ROWS: usize = 2048;
/// Rows of a group at most: so many beside [`CODE_ROWS`] has a code over a field of 2^16 elements.
pub const ROWS_MAX: usize = (1 << 16) - CODE_ROWS;
