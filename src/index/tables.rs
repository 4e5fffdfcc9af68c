//! Where the records of an index lie: tables of keys and what is at them.

/// What is wrong with tables.
#[derive(Debug)]
pub(super) enum Problem {
    /// Another process has them open.
    Busy,
    /// Their disk.
    Io(std::io::Error),
    /// What they hold makes no sense.
    Damaged(String),
    /// They do not answer, or did not some time ago.
    GivenUp,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Busy => f.write_str("another vmfold uses it"),
            Self::Io(error) => write!(f, "{error}"),
            Self::Damaged(problem) => f.write_str(problem),
            Self::GivenUp => f.write_str("it does not answer any more"),
        }
    }
}

/// What is asked for, or what is wrong.
pub(super) type Answer<T> = Result<T, Problem>;

/// A key and what is there.
pub(super) type TableRow = (Vec<u8>, Vec<u8>);

/// Tables, by name; one that is not there is empty. After an error they may not answer any more: see [`Tables::is_usable`].
pub(super) trait Tables: std::fmt::Debug + Send + Sync {
    /// What is at some keys.
    fn get(&self, table: &[u8], keys: Vec<Vec<u8>>) -> Answer<Vec<Option<Vec<u8>>>>;

    /// Up to `count` records, in the order of their keys, behind a key or from the first on.
    fn after(&self, table: &[u8], key: Option<Vec<u8>>, count: usize) -> Answer<Vec<TableRow>>;

    /// Puts records in, all or none.
    fn put(&self, table: &[u8], records: Vec<TableRow>) -> Answer<()>;

    /// Makes everything durable.
    fn flush(&self) -> Answer<()>;

    /// Whether they still answer.
    fn is_usable(&self) -> bool;
}
