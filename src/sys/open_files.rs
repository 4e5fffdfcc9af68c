//! How many files may be open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Has this process open as many files as it may: the usual limit of 1024 is too low for a large pool. Returns how many that are; none
/// for no limit. Where the limit cannot be raised, opening fails and says so.
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
