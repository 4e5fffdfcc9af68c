//! Keys of sealed archives: secrets in memory, the keyring that holds them, and how people keep it, open it and share it.
//!
//! Nothing here knows of archives. A keyring is bytes in a [`KeyringPlace`]; what its secrets seal is the business of others.

mod access;
mod age;
mod host;
mod keyring;
pub mod manage;
mod passphrase;
mod program;
mod sealed;
mod secret;
mod sheet;

use std::path::Path;

pub use access::{GivenKeys, KeyAccess, Prompt};
pub use age::{Identity, Recipient, WorkFactor};
pub use host::HostCredentials;
pub use keyring::{Keyring, Pair, Signer, Slot, SlotKind};
pub use passphrase::{PASSPHRASE_BYTES_MAX, Passphrase};
pub use sealed::{Lock, NewSlot, SEALED_BYTES_MAX, SealedKeyring, Unlocked};
pub use secret::{Secret, forbid_core_dumps};
pub use sheet::{SHEET_LABEL, Sheet, SheetPlace};

use crate::error::Result;

/// Where a sealed keyring stands.
pub trait KeyringPlace {
    /// What people call the place, for messages: the path of an archive.
    fn path(&self) -> &Path;

    /// Reads the newest keyring: the bytes of [`SealedKeyring::encode`].
    ///
    /// # Errors
    /// Those of the place; [`crate::error::Error::Usage`] if it has none.
    fn read(&self) -> Result<Vec<u8>>;

    /// Puts another one in its place, which is sealed in `bytes`. Once this returns, it survives a power failure.
    ///
    /// # Errors
    /// Those of the place; [`crate::error::Error::Damaged`] if it does not come after the one that the place was used with last. The keyring that was there is
    /// then still the newest.
    fn replace(&mut self, keyring: &Keyring, bytes: &[u8]) -> Result<()>;
}

#[cfg(test)]
mod tests;
