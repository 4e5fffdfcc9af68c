//! The sled database, and workarounds for sled.
//!
//! sled runs in a thread of its own, and callers wait for an answer only up to a deadline: if its disk fills up or fails, sled may block
//! for ever, above all in its destructor, which returns only once everything is written. After an error the database is therefore leaked
//! instead of dropped, and the run does without the index. Its threads end with the process.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::index::tables::{Answer, Problem, TableRow, Tables};

/// The capacity of sled's page cache in bytes.
const CACHE_BYTES: u64 = 8 << 20;
/// Bytes of records after which sled is closed and opened again. Only then does it free the memory of its pages, which otherwise grows to a
/// hundred megabytes and more, whatever the capacity of its cache.
pub(super) const OPEN_BYTES: usize = 8 << 20;
/// The deadline of a request. A busy disk takes seconds.
const DEADLINE: Duration = Duration::from_mins(1);
/// The deadline of opening, which reads every record.
const OPENING_DEADLINE: Duration = Duration::from_mins(10);
/// The prefix of the thread's name, which sled's own threads have too.
const THREAD: &str = "sled-index";

impl From<sled::Error> for Problem {
    fn from(error: sled::Error) -> Self {
        match error {
            sled::Error::Io(error) if error.to_string().contains("could not acquire lock") => Self::Busy,
            // Errors that sled's checks find are of these kinds, too.
            sled::Error::Io(error)
                if !matches!(
                    error.kind(),
                    std::io::ErrorKind::InvalidData | std::io::ErrorKind::UnexpectedEof | std::io::ErrorKind::Other
                ) =>
            {
                Self::Io(error)
            }
            error => Self::Damaged(error.to_string()),
        }
    }
}

type Work = Box<dyn FnOnce(&mut DatabaseState) + Send>;

/// An open database.
#[derive(Debug)]
pub(super) struct Database {
    folder: PathBuf,
    /// The thread; `None` once it was given up.
    connection: Mutex<Option<Connection>>,
}

/// The thread that has the database open, and the channel to it.
#[derive(Debug)]
struct Connection {
    requests: Sender<Work>,
    thread: JoinHandle<()>,
}

/// Folders of databases that this process has leaked, whose locks it still holds.
static FORGOTTEN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Database {
    /// Opens the database in a folder, and creates it if it does not exist. It reads every record once, so that a damaged page shows at
    /// once and not in the middle of a run. Of the trees whose names begin with `prefix`, only the one named `keep` stays; without `keep`,
    /// all stay.
    pub(super) fn open(folder: &Path, prefix: &'static str, keep: Option<Vec<u8>>) -> Answer<Self> {
        be_quiet();
        if lock(&FORGOTTEN).contains(folder) {
            return Err(Problem::GivenUp);
        }
        let (requests, work) = channel::<Work>();
        let state = DatabaseState {
            folder: folder.to_owned(),
            db: None,
            touched_bytes: 0,
        };
        let thread = std::thread::Builder::new()
            .name(THREAD.into())
            .spawn(move || state.run(&work))
            .map_err(Problem::Io)?;
        let opened = Self {
            folder: folder.to_owned(),
            connection: Mutex::new(Some(Connection { requests, thread })),
        };
        match opened.ask_within(OPENING_DEADLINE, move |state| state.open(prefix, keep.as_deref())) {
            Ok(()) => Ok(opened),
            Err(Problem::GivenUp) => Err(Problem::GivenUp),
            Err(problem) => {
                // The caller may remove a damaged database and open a new one.
                lock(&FORGOTTEN).remove(folder);
                Err(problem)
            }
        }
    }

    /// Returns the names of its trees.
    pub(super) fn trees(&self) -> Answer<Vec<Vec<u8>>> {
        self.ask(|state| Ok(state.db()?.tree_names().iter().map(|name| name.to_vec()).collect()))
    }

    /// Returns its size on disk in bytes.
    pub(super) fn disk_bytes(&self) -> Answer<u64> {
        self.ask(|state| Ok(state.db()?.size_on_disk()?))
    }

    fn ask<T: Send + 'static>(&self, work: impl FnOnce(&mut DatabaseState) -> Answer<T> + Send + 'static) -> Answer<T> {
        self.ask_within(DEADLINE, work)
    }

    fn ask_within<T: Send + 'static>(
        &self,
        deadline: Duration,
        work: impl FnOnce(&mut DatabaseState) -> Answer<T> + Send + 'static,
    ) -> Answer<T> {
        let (answer, answered) = sync_channel(1);
        let mut connection = lock(&self.connection);
        let requests = connection.as_ref().map(|connection| &connection.requests);
        let sent = requests.ok_or(Problem::GivenUp)?.send(Box::new(move |state| {
            let result = catch_unwind(AssertUnwindSafe(|| work(state)));
            let result = result.unwrap_or_else(|_| Err(Problem::Damaged("its pages make no sense".into())));
            if result.is_err() {
                state.forget();
            }
            // The caller may have stopped waiting.
            let _ = answer.send(result);
        }));
        let result = match sent {
            Ok(()) => answered.recv_timeout(deadline).unwrap_or(Err(Problem::GivenUp)),
            Err(_) => Err(Problem::GivenUp),
        };
        if result.is_err() {
            // No more requests are sent.
            *connection = None;
            lock(&FORGOTTEN).insert(self.folder.clone());
        }
        result
    }
}

impl Tables for Database {
    fn get(&self, tree: &[u8], keys: Vec<Vec<u8>>) -> Answer<Vec<Option<Vec<u8>>>> {
        let tree = tree.to_vec();
        self.ask(move |state| {
            let tree = state.db()?.open_tree(tree)?;
            let mut found = Vec::with_capacity(keys.len());
            for key in keys {
                found.push(tree.get(key)?.map(|record| record.to_vec()));
            }
            drop(tree);
            state.touched(found.iter().flatten().map(Vec::len).sum())?;
            Ok(found)
        })
    }

    fn after(&self, tree: &[u8], key: Option<Vec<u8>>, count: usize) -> Answer<Vec<TableRow>> {
        use std::ops::Bound::{Excluded, Unbounded};
        let tree = tree.to_vec();
        self.ask(move |state| {
            let tree = state.db()?.open_tree(tree)?;
            let start = key.map_or(Unbounded, Excluded);
            let mut found = Vec::new();
            for record in tree.range((start, Unbounded)).take(count) {
                let (key, record) = record?;
                found.push((key.to_vec(), record.to_vec()));
            }
            drop(tree);
            state.touched(found.iter().map(|(_, record)| record.len()).sum())?;
            Ok(found)
        })
    }

    fn put(&self, tree: &[u8], records: Vec<TableRow>) -> Answer<()> {
        let tree = tree.to_vec();
        self.ask(move |state| {
            let bytes = records.iter().map(|(_, record)| record.len()).sum();
            let mut batch = sled::Batch::default();
            for (key, record) in records {
                batch.insert(key, record);
            }
            state.db()?.open_tree(tree)?.apply_batch(batch)?;
            state.touched(bytes)
        })
    }

    fn flush(&self) -> Answer<()> {
        self.ask(|state| {
            state.db()?.flush()?;
            Ok(())
        })
    }

    fn is_usable(&self) -> bool {
        lock(&self.connection).is_some()
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        // Closing takes no time if everything is on disk; otherwise the database is leaked.
        if self.ask(DatabaseState::close).is_ok()
            && let Some(Connection { requests, thread }) = lock(&self.connection).take()
        {
            drop(requests);
            let _ = thread.join();
        }
    }
}

/// The state of the thread.
struct DatabaseState {
    folder: PathBuf,
    /// The database; `None` before it is opened, and after it was closed or leaked.
    db: Option<sled::Db>,
    /// Bytes of records that were read and written since it was opened.
    touched_bytes: usize,
}

impl DatabaseState {
    fn run(mut self, work: &Receiver<Work>) {
        for request in work {
            request(&mut self);
        }
        // The caller has closed the channel, perhaps because the database blocks.
        self.forget();
    }

    fn db(&self) -> Answer<&sled::Db> {
        self.db.as_ref().ok_or(Problem::GivenUp)
    }

    /// Leaks the database, without waiting for anything to be written.
    fn forget(&mut self) {
        std::mem::forget(self.db.take());
    }

    fn open(&mut self, prefix: &str, keep: Option<&[u8]>) -> Answer<()> {
        self.db = Some(open_db(&self.folder)?);
        let db = self.db()?;
        for name in db.tree_names() {
            let is_other = keep.is_some_and(|keep| *keep != name[..]);
            if is_other && name.starts_with(prefix.as_bytes()) {
                db.drop_tree(name)?;
            }
        }
        let mut bytes = 0;
        for name in db.tree_names() {
            if name.starts_with(prefix.as_bytes()) {
                for record in &db.open_tree(name)? {
                    bytes += record?.1.len();
                }
            }
        }
        self.touched(bytes)
    }

    /// Counts bytes that were read or written, and reopens the database once they are many.
    fn touched(&mut self, bytes: usize) -> Answer<()> {
        self.touched_bytes += bytes;
        if self.touched_bytes > OPEN_BYTES {
            self.close()?;
            self.db = Some(open_db_again(&self.folder)?);
        }
        Ok(())
    }

    fn close(&mut self) -> Answer<()> {
        self.db()?.flush()?;
        drop(self.db.take());
        self.touched_bytes = 0;
        Ok(())
    }
}

fn open_db(folder: &Path) -> sled::Result<sled::Db> {
    sled::Config::new()
        .path(folder.join("sled"))
        .cache_capacity(CACHE_BYTES)
        .flush_every_ms(None)
        .mode(sled::Mode::LowSpace)
        .open()
}

/// Opens a database that was open until now. sled's threads may hold its lock for another moment.
fn open_db_again(folder: &Path) -> Answer<sled::Db> {
    const TRIES: u32 = 1000;
    const BETWEEN: Duration = Duration::from_millis(10);
    for _ in 0..TRIES {
        match open_db(folder).map_err(Problem::from) {
            Err(Problem::Busy) => std::thread::sleep(BETWEEN),
            opened => return opened,
        }
    }
    Ok(open_db(folder)?)
}

/// Suppresses the messages of panics in sled's threads, by which some of its checks fail. The panics become errors.
fn be_quiet() {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let default_hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !std::thread::current()
                .name()
                .is_some_and(|name| name.starts_with("sled"))
            {
                default_hook(panic);
            }
        }));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_waits_until_it_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let open = open_db(folder.path()).unwrap();
        assert!(matches!(
            open_db(folder.path()).map_err(Problem::from),
            Err(Problem::Busy)
        ));
        std::thread::scope(|scope| {
            let again = scope.spawn(|| open_db_again(folder.path()).is_ok());
            std::thread::sleep(Duration::from_millis(50));
            drop(open);
            assert!(again.join().unwrap());
        });
    }

    #[test]
    fn what_does_not_answer_is_given_up() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::open(folder.path(), "t", None).unwrap();
        database.put(b"t", vec![(vec![1], vec![2])]).unwrap();
        let late = database.ask_within(Duration::from_millis(50), |_| {
            std::thread::sleep(Duration::from_secs(2));
            Ok(())
        });
        assert!(matches!(late, Err(Problem::GivenUp)));
        assert!(matches!(database.flush(), Err(Problem::GivenUp)));
        drop(database);
        assert!(matches!(
            Database::open(folder.path(), "t", None),
            Err(Problem::GivenUp)
        ));
    }

    #[test]
    fn an_error_is_the_last_thing_it_says() {
        let folder = tempfile::tempdir().unwrap();
        let database = Database::open(folder.path(), "t", None).unwrap();
        let failed: Answer<()> = database.ask(|_| panic!("as sled does"));
        assert!(matches!(failed, Err(Problem::Damaged(_))));
        assert!(matches!(database.get(b"t", vec![vec![1]]), Err(Problem::GivenUp)));
    }
}
