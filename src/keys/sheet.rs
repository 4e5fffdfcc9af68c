//! Recovery sheets: a secret on paper, as text and as a QR code, with what it is for.

use std::fmt::Write as _;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use qrcode::{Color, EcLevel, QrCode};
use zeroize::Zeroizing;

use super::age::{Recipient, generate};
use crate::error::{Error, Result};
use crate::new_file::NewFile;
use crate::shown::shown;

/// What people call the slot of a sheet, where they say nothing else.
pub const SHEET_LABEL: &str = "recovery sheet";
const TERMINAL: &str = "/dev/tty";
/// The number of light modules around a code, which readers need.
const MARGIN: usize = 4;
/// The number of characters that are read and typed at a time, and of such groups in a line.
const GROUP: usize = 4;
const GROUPS: usize = 5;

/// Where a sheet goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SheetPlace {
    /// The terminal of this process.
    Terminal,
    /// A file that does not exist yet. Its user alone can read it.
    File(PathBuf),
}

/// A secret, and what is printed of it.
pub struct Sheet {
    recipient: Recipient,
    secret: Zeroizing<String>,
    archive: String,
    date: String,
}

impl std::fmt::Debug for Sheet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sheet")
    }
}

impl Sheet {
    /// Makes a new secret for a sheet. `archive` is the path of the archive, `about` what else tells it from others, such as the id of its lane.
    /// `now` is in seconds since 1970.
    ///
    /// # Errors
    /// [`Error::Io`] if the system gives no random bytes.
    pub fn new(archive: &Path, about: &str, now: u64) -> Result<Self> {
        let (secret, recipient) = generate()?;
        Ok(Self {
            recipient,
            secret,
            archive: format!("{} ({})", shown(archive), shown(Path::new(about))),
            date: date_of(now),
        })
    }

    /// Who the slot of the sheet is for.
    pub fn recipient(&self) -> &Recipient {
        &self.recipient
    }

    /// The text of the sheet, which is a file of an identity as it stands.
    fn text(&self, place: &SheetPlace) -> Zeroizing<String> {
        // A string that grew would leave copies of the secret behind.
        let mut text = Zeroizing::new(String::with_capacity(64 << 10));
        let recipient = &self.recipient;
        let (archive, date) = (&self.archive, &self.date);
        let _ = write!(
            text,
            "# Recovery sheet of vmfold\n\
             #\n\
             # Archive:    {archive}\n\
             # Made on:    {date}\n\
             # Recipient:  {recipient}\n\
             #\n\
             # Whoever has this sheet can read the archive, without a passphrase. Keep it on paper,\n\
             # in a safe place, and not beside the archive. If somebody else has seen it, remove\n\
             # its key by vmfold key remove, and run vmfold key rotate.\n\
             #\n\
             # To restore, scan the code into a file, or type the secret below into one. Spaces,\n\
             # line breaks and small letters do not matter. Then run\n\
             #     vmfold import ARCHIVE --to FOLDER --identity FILE\n\
             #\n"
        );
        let (begin, data) = self.secret.split_at(self.secret.find('1').map_or(0, |end| end + 1));
        text.push_str(begin);
        for (number, group) in data.as_bytes().chunks(GROUP).enumerate() {
            text.push_str(if number % GROUPS == 0 { "\n    " } else { " " });
            text.extend(group.iter().map(|byte| char::from(*byte)));
        }
        text.push_str("\n#\n");
        self.put_code(&mut text, place);
        text
    }

    /// Appends the QR code, two rows of modules in each line. On a terminal, colours make sure that what is dark is dark.
    fn put_code(&self, text: &mut String, place: &SheetPlace) {
        // There is room for so many characters in a code of any level.
        let Ok(code) = QrCode::with_error_correction_level(self.secret.as_bytes(), EcLevel::M) else {
            return;
        };
        let (width, colors) = (code.width(), Zeroizing::new(dark(code.to_colors())));
        let end = width + 2 * MARGIN;
        let is_dark = |row: usize, column: usize| {
            let (row, column) = (row.wrapping_sub(MARGIN), column.wrapping_sub(MARGIN));
            row < width && column < width && colors[row * width + column]
        };
        let (before, after) = match place {
            SheetPlace::Terminal => ("#  \x1b[30;107m", "\x1b[0m\n"),
            SheetPlace::File(_) => ("#  ", "\n"),
        };
        for row in (0..end).step_by(2) {
            text.push_str(before);
            text.extend(
                (0..end).map(|column| match (is_dark(row, column), is_dark(row + 1, column)) {
                    (true, true) => '█',
                    (true, false) => '▀',
                    (false, true) => '▄',
                    (false, false) => ' ',
                }),
            );
            text.push_str(after);
        }
    }

    /// Writes the sheet. If this fails, a file that was begun is removed. Returns the file, if it is one.
    ///
    /// # Errors
    /// [`Error::Usage`] if there is no terminal, or the file exists; [`Error::NoSpace`]; [`Error::Io`].
    pub fn write(&self, place: &SheetPlace) -> Result<Option<NewFile>> {
        let text = self.text(place);
        let SheetPlace::File(path) = place else {
            let path = Path::new(TERMINAL);
            let terminal = OpenOptions::new().write(true).open(path);
            let mut terminal = terminal.map_err(|_| {
                Error::Usage("there is no terminal to print the sheet on: name a new file for it".into())
            })?;
            let printed = terminal.write_all(text.as_bytes());
            return printed.map(|()| None).map_err(Error::io("write to", path));
        };
        NewFile::write(path, text.as_bytes()).map(Some)
    }
}

fn dark(colors: Vec<Color>) -> Vec<bool> {
    colors.into_iter().map(|color| color == Color::Dark).collect()
}

/// The day of a time in seconds since 1970, in UTC.
pub(super) fn date_of(seconds: u64) -> String {
    let time = i64::try_from(seconds)
        .ok()
        .and_then(|seconds| jiff::Timestamp::from_second(seconds).ok());
    time.map_or_else(|| "an unknown day".into(), |time| time.strftime("%Y-%m-%d").to_string())
}
