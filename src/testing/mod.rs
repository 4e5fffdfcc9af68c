//! What only tests use: filesystems and stores in memory, and stores that fail. It is not in the binary.

pub mod faulty_filesystem;
pub mod faulty_store;
pub mod simulated;
