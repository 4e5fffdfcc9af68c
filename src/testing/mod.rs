//! What only tests use: filesystems and stores in memory, and stores that fail. It is not in the binary.

mod faulty;
pub mod simulated;

pub use faulty::{Call, Fault, Faulty};
