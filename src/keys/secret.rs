//! Secrets in memory: wiped when they are dropped, kept out of swap where that is allowed, never printed, and compared in constant time.

use std::path::Path;

use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use zeroize::Zeroize;

use crate::error::{Error, Result};
use crate::sys::{memory_lock, random};

/// A secret of `N` bytes.
///
/// Its memory is locked if the system allows it. A user who may lock little memory gets secrets that could be swapped out: that is no error.
/// Making one takes a system call, so what is derived for each frame of an archive is better kept in one place and overwritten.
pub struct Secret<const N: usize>(Box<[u8; N]>);

impl<const N: usize> Secret<N> {
    /// Makes a secret whose bytes `fill` writes in place. They are 0 before.
    pub fn filled<E>(fill: impl FnOnce(&mut [u8; N]) -> std::result::Result<(), E>) -> std::result::Result<Self, E> {
        let mut secret = Self(Box::new([0; N]));
        // A limit on locked memory is common, and no reason to read no archive.
        let _ = memory_lock::lock(&secret.0[..]);
        fill(&mut secret.0)?;
        Ok(secret)
    }

    /// Copies a secret. Whoever has the bytes wipes them.
    pub fn of(bytes: &[u8; N]) -> Self {
        let copied = Self::filled(|own| {
            own.copy_from_slice(bytes);
            Ok::<_, std::convert::Infallible>(())
        });
        match copied {
            Ok(secret) => secret,
            Err(never) => match never {},
        }
    }

    /// Makes a random secret.
    ///
    /// # Errors
    /// [`Error::Io`] if the system gives no random bytes.
    pub fn random() -> Result<Self> {
        let failed = Error::io("get random bytes from", Path::new("/dev/urandom"));
        Self::filled(|bytes| random::fill(bytes)).map_err(failed)
    }

    /// Its bytes. They are not copied anywhere that is not wiped.
    pub fn bytes(&self) -> &[u8; N] {
        &self.0
    }
}

impl<const N: usize> Clone for Secret<N> {
    fn clone(&self) -> Self {
        Self::of(&self.0)
    }
}

impl<const N: usize> std::fmt::Debug for Secret<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl<const N: usize> PartialEq for Secret<N> {
    fn eq(&self, other: &Self) -> bool {
        let pairs = self.0.iter().zip(other.0.iter());
        // The black box keeps the compiler from ending the comparison at the first difference.
        pairs.fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b))) == 0
    }
}

impl<const N: usize> Eq for Secret<N> {}

impl<const N: usize> Drop for Secret<N> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// Keeps the memory of this process out of core dumps, and from debuggers of the same user. Programs that it runs dump no core either. It is
/// called before the first secret is read. A system that refuses it has dumps as before: that is no error.
pub fn forbid_core_dumps() {
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_compared_and_never_shown() {
        let one = Secret::of(&[7; 32]);
        assert_eq!(one, one.clone());
        for place in 0..32 {
            let mut bytes = [7; 32];
            bytes[place] ^= 0x80;
            assert_ne!(one, Secret::of(&bytes));
        }
        assert_eq!(format!("{one:?}"), "Secret");
        assert_ne!(Secret::<32>::random().unwrap(), Secret::random().unwrap());
    }

    #[test]
    fn a_process_with_secrets_dumps_no_core() {
        forbid_core_dumps();
        assert_eq!(rustix::process::dumpable_behavior(), Ok(DumpableBehavior::NotDumpable));
        assert_eq!(rustix::process::getrlimit(Resource::Core).maximum, Some(0));
    }
}
