//! `RLIMIT_NOFILE`: the limit on the number of open files.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit on open files to its hard limit: the usual soft limit of 1024 is too low for a large pool. Returns the limit that
/// applies then; `None` is no limit. If the limit cannot be raised, opening a file fails later and reports it.
pub fn raise_file_limit() -> Option<u64> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    let _ = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    );
    getrlimit(Resource::Nofile).current
}
