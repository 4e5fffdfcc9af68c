//! Options that give keys of encrypted archives, and options that make them.

use std::path::PathBuf;
use std::sync::Arc;

use super::progress::Terminal;
use super::prompt;
use crate::archive::keys::Remember;
use crate::keys::manage::NewKeys;
use crate::keys::{GivenKeys, KeyAccess};
use crate::seen::{SeenArchives, Strictness};

/// What opens an encrypted archive, or a backup that needs a passphrase.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct KeyArgs {
    /// File whose first line is the passphrase
    ///
    /// It is the passphrase of an encrypted archive, or of a backup of Qubes OS. Without it, the passphrase is asked for on
    /// the terminal.
    #[arg(long, value_name = "FILE")]
    pub(super) passphrase_file: Option<PathBuf>,
    /// Descriptor from which the passphrase is read, up to the end of a line
    ///
    /// The shell opens it: `vmfold list archive --passphrase-fd 3 3<secret`.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(i32).range(0..), conflicts_with = "passphrase_file")]
    pub(super) passphrase_fd: Option<i32>,
    /// Command that prints the passphrase
    ///
    /// `sh -c` runs it, as the user that runs vmfold: under sudo, as root. The first line that it prints is the
    /// passphrase. If it fails, or prints more than 4 KiB, nothing is done.
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["passphrase_file", "passphrase_fd"])]
    pub(super) passphrase_command: Option<String>,
    /// File of age identities that open an encrypted archive; may be given more than once
    ///
    /// Lines are AGE-SECRET-KEY-1... or AGE-PLUGIN-..., or begin with `#`. The file may be encrypted with a passphrase, as
    /// age does it. The secret of a recovery sheet may be typed into a file with spaces and line breaks. A plugin is the
    /// program age-plugin-NAME in one of the folders of PATH.
    #[arg(long, value_name = "FILE")]
    pub(super) identity: Vec<PathBuf>,
    #[command(flatten)]
    pub(super) memory: MemoryArgs,
}

/// How encrypted archives are remembered, so that an older copy is noticed.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct MemoryArgs {
    /// Folder in which this host remembers what it has seen of encrypted archives
    ///
    /// An older copy of an archive opens as the newest does, and so does an archive that somebody else made for a recipient of
    /// yours. Who reads one is told. Whatever would write to it is refused. Without this option it is
    /// `/var/lib/vmfold` for root, and `vmfold` in the state folder of XDG for others.
    #[arg(long, value_name = "DIR", env = "VMFOLD_STATE")]
    pub(super) state: Option<PathBuf>,
    /// Go on with an encrypted archive that is older than this host has seen it, or is another one in its place
    ///
    /// It is remembered as it is now.
    #[arg(long)]
    pub(super) accept_rollback: bool,
}

impl MemoryArgs {
    /// What remembers archives; none if there is no place for it. `writes` says that what is older is refused.
    pub(super) fn memory(&self, writes: bool, now: u64, terminal: &Arc<Terminal>) -> Option<Arc<dyn Remember>> {
        let folder = self.state.clone().or_else(crate::seen::default_folder)?;
        let strictness = match (self.accept_rollback, writes) {
            (true, _) => Strictness::Accept,
            (false, true) => Strictness::Refuse,
            (false, false) => Strictness::Tell,
        };
        Some(Arc::new(SeenArchives::new(
            folder,
            strictness,
            now,
            Arc::clone(terminal) as _,
        )))
    }
}

impl KeyArgs {
    /// What they give.
    pub(super) fn access(&self) -> KeyAccess {
        KeyAccess::new(GivenKeys {
            passphrase_file: self.passphrase_file.clone(),
            passphrase_fd: self.passphrase_fd,
            passphrase_command: self.passphrase_command.clone(),
            identities: self.identity.clone(),
            prompt: prompt::ask,
            ..GivenKeys::default()
        })
    }
}

/// What keys a new archive gets.
#[derive(Debug, Clone, Default, clap::Args)]
pub(super) struct NewKeyArgs {
    /// Encrypt the archive
    ///
    /// It holds when the archive is made. Without a recipient, a passphrase opens it, which is asked for twice, or is given
    /// by --passphrase-file and its like. With recipients, a passphrase opens it besides if it is given so. Whoever loses
    /// every key of an archive loses all that is in it: nobody can restore it then.
    #[arg(long)]
    pub(super) encrypt: bool,
    /// Recipient of age whose identity opens the archive; may be given more than once
    ///
    /// It begins with `age1`. `age-keygen` makes an identity, and prints its recipient. Recipients of plugins are taken if the
    /// program age-plugin-NAME is in one of the folders of PATH.
    #[arg(long, value_name = "RECIPIENT", requires = "encrypt")]
    pub(super) recipient: Vec<String>,
    /// File of recipients, one a line; may be given more than once
    ///
    /// Lines that begin with `#` say something about them.
    #[arg(long, value_name = "FILE", requires = "encrypt")]
    pub(super) recipients_file: Vec<PathBuf>,
}

impl NewKeyArgs {
    /// What they name; none if the archive is not encrypted.
    pub(super) fn new_keys(&self) -> Option<NewKeys> {
        self.encrypt.then(|| NewKeys {
            recipients: self.recipient.clone(),
            recipients_files: self.recipients_file.clone(),
            ..NewKeys::default()
        })
    }
}
