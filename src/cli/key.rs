//! `key`: the keys of encrypted archives, and what opens and seals these for other commands.

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::args::{Export, Key, KeyCommand};
use super::key_args::KeyArgs;
use super::progress::Terminal;
use super::{Exit, print};
use crate::archive::keys::Unlock;
use crate::error::Result;
use crate::keys::SheetPlace;
use crate::keys::manage::{self, NewKeys};
use crate::ops::export::{MakeKeyring, Sealing};
use crate::ops::key::{ArchiveKeyring, UserKeys, add_host, host_of};

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl KeyArgs {
    /// What opens an archive. `is_for_backup` says that a passphrase is that of a backup which is read beside it.
    pub(super) fn unlock(&self, archive: &Path, is_for_backup: bool, terminal: &Arc<Terminal>) -> Arc<dyn Unlock> {
        Arc::new(self.user_keys(archive, NewKeys::default(), is_for_backup, terminal))
    }

    fn user_keys(&self, archive: &Path, new: NewKeys, is_for_backup: bool, terminal: &Arc<Terminal>) -> UserKeys {
        let access = if is_for_backup {
            self.without_passphrase()
        } else {
            self.access()
        };
        UserKeys::new(access, new, (archive.to_owned(), now()), Arc::clone(terminal) as _)
    }

    fn without_passphrase(&self) -> crate::keys::KeyAccess {
        Self {
            identity: self.identity.clone(),
            ..Self::default()
        }
        .access()
    }
}

impl Export {
    /// How the archive is sealed.
    ///
    /// # Errors
    /// Those of [`host_of`].
    pub(super) fn sealing(&self, terminal: &Arc<Terminal>) -> Result<Sealing> {
        if let Some(credentials) = &self.write_only {
            return Ok(Sealing {
                host: Some(host_of(credentials)?),
                memory: self.access.keys.memory.memory(true, now(), terminal),
                ..Sealing::default()
            });
        }
        let is_for_backup = self.from.is_some();
        let new = self.new_keys.new_keys();
        let keys = Arc::new(self.access.keys.user_keys(
            &self.archive,
            new.clone().unwrap_or_default(),
            is_for_backup,
            terminal,
        ));
        Ok(Sealing {
            unlock: Some(Arc::clone(&keys) as _),
            new: new.map(|_| keys as Arc<dyn MakeKeyring>),
            host: None,
            memory: self.access.keys.memory.memory(true, now(), terminal),
        })
    }
}

/// Runs a command of `key`.
pub(super) fn run(command: &Key, json: super::OutputFormat, terminal: &Arc<Terminal>) -> Result<Exit> {
    if let KeyCommand::List(of) = &command.command {
        let place = ArchiveKeyring::open(&of.archive)?;
        let result = manage::list(&place, &of.keys.access(), &**terminal)?;
        print("keys", &result, json)?;
        return Ok(Exit::Done);
    }
    let of = match &command.command {
        KeyCommand::List(of) | KeyCommand::Rotate(of) => of,
        KeyCommand::Add(add) => &add.of,
        KeyCommand::Remove(remove) => &remove.of,
        KeyCommand::Sheet(sheet) => &sheet.of,
        KeyCommand::Host(host) => &host.of,
    };
    let memory = of.keys.memory.memory(true, now(), terminal);
    let terminal: &Terminal = terminal;
    let mut place = ArchiveKeyring::open_to_change(&of.archive)?.remembered_by(memory);
    let access = of.keys.access();
    let result = match &command.command {
        KeyCommand::Add(add) => {
            let new = NewKeys {
                recipients: add.recipient.clone(),
                recipients_files: add.recipients_file.clone(),
                passphrase_file: add.new_passphrase_file.clone(),
                label: add.label.clone(),
            };
            manage::add(&mut place, &new, &access, now(), terminal)?
        }
        KeyCommand::Remove(remove) => manage::remove(&mut place, &remove.which, &access, terminal)?,
        KeyCommand::Sheet(sheet) => {
            let to = match &sheet.to {
                Some(file) => SheetPlace::File(file.clone()),
                None => SheetPlace::Terminal,
            };
            let about = place.lane()?.to_string();
            manage::sheet(&mut place, &to, &about, &access, now(), terminal)?
        }
        KeyCommand::Host(host) => add_host(&mut place, (&host.name, &host.to), &access, terminal)?,
        KeyCommand::List(_) | KeyCommand::Rotate(_) => manage::rotate(&mut place, &access, terminal)?,
    };
    terminal.finish();
    print("key", &result, json)?;
    Ok(Exit::Done)
}
