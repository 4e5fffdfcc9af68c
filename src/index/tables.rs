//! The storage of an index: tables of keys and records.

/// An error of tables.
#[derive(Debug)]
pub(super) enum Problem {
    /// Another process has the tables open.
    Busy,
    /// Reading or writing them failed.
    Io(std::io::Error),
    /// The tables are damaged.
    Damaged(String),
    /// The tables do not respond, or were given up after an earlier error.
    GivenUp,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Busy => f.write_str("another vmfold uses it"),
            Self::Io(error) => write!(f, "{error}"),
            Self::Damaged(problem) => f.write_str(problem),
            Self::GivenUp => f.write_str("it does not respond"),
        }
    }
}

/// The result of a request.
pub(super) type Answer<T> = Result<T, Problem>;

/// A key and its record.
pub(super) type TableRow = (Vec<u8>, Vec<u8>);

/// Tables by name; a missing table counts as empty. After an error they may be unusable: see [`Tables::is_usable`].
pub(super) trait Tables: std::fmt::Debug + Send + Sync {
    /// Returns the records at some keys.
    fn get(&self, table: &[u8], keys: Vec<Vec<u8>>) -> Answer<Vec<Option<Vec<u8>>>>;

    /// Returns up to `count` records in the order of their keys, from the first after `key` or from the very first.
    fn after(&self, table: &[u8], key: Option<Vec<u8>>, count: usize) -> Answer<Vec<TableRow>>;

    /// Inserts all of the records, or none.
    fn put(&self, table: &[u8], records: Vec<TableRow>) -> Answer<()>;

    /// Makes everything durable.
    fn flush(&self) -> Answer<()>;

    /// Whether the tables can still be used.
    fn is_usable(&self) -> bool;
}
