//! Importing from a pipe: records are used as they come, and memory holds the manifests and one pack.
