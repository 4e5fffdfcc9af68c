//! Carries out a restore: first every wanted block once into one file, the *staging file*, then the images from there, sharing its extents
//! where the filesystem can. The staging file goes, its extents stay as long as images refer to them.

pub mod folder;
pub mod names;
pub mod place;
pub mod staging;
pub mod standing;
