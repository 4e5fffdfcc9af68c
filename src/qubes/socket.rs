//! `qubesd` by its sockets. A call is one connection: `METHOD+ARGUMENT SOURCE name DESTINATION`, a zero byte, and the payload; then the side that
//! asks closes its half, and reads to the end. What `qubesd` answers is bounded, in length and in time.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{MachineState, Qubesd, VolumeInfo, answer};
use crate::error::{Error, Result};
use crate::shown::shown;

/// The folder of the sockets.
pub const SOCKETS: &str = "/var/run";
/// The socket of the Admin API.
const ADMIN: &str = "qubesd.sock";
/// The socket of the calls that programs of Qubes OS make, for root only.
const INTERNAL: &str = "qubesd.internal.sock";
/// Who calls.
const SOURCE: &str = "dom0";
/// Bytes of an answer. A list of machines has about 100 for each.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

/// How long answers may take.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// All but one.
    pub answer: Duration,
    /// The one after an image was put into its place: `qubesd` writes it to the disk and makes two copies of its extents before that.
    pub commit: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            answer: Duration::from_mins(1),
            commit: Duration::from_mins(30),
        }
    }
}

/// The sockets of `qubesd` in a folder.
#[derive(Debug, Clone)]
pub struct SocketQubesd {
    folder: PathBuf,
    timeouts: Timeouts,
}

/// A call.
#[derive(Clone, Copy)]
struct Call<'a> {
    method: &'static str,
    machine: &'a str,
    argument: &'a str,
    payload: &'a str,
    timeout: Duration,
}

impl SocketQubesd {
    /// The sockets in a folder, which is [`SOCKETS`] but in tests. Nothing is opened yet.
    pub fn new(folder: &Path, timeouts: Timeouts) -> Self {
        Self {
            folder: folder.to_owned(),
            timeouts,
        }
    }

    /// A call of the Admin API.
    fn query<'a>(&self, method: &'static str, machine: &'a str, argument: &'a str) -> Call<'a> {
        Call {
            method,
            machine,
            argument,
            payload: "",
            timeout: self.timeouts.answer,
        }
    }

    /// Makes a call, and takes its answer apart.
    fn call<T>(
        &self,
        socket: &str,
        call: Call<'_>,
        parse: impl FnOnce(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        let path = self.folder.join(socket);
        let answer = exchange(&path, call)?;
        answer::content(&answer)
            .and_then(parse)
            .map_err(|problem| failed(call, problem))
    }

    /// Makes a call that answers nothing.
    fn order(&self, socket: &str, call: Call<'_>) -> Result<()> {
        self.call(socket, call, |_| Ok(()))
    }

    /// Ends an import: with `ok`, or with `fail` and a reason.
    fn end_import(&self, machine: &str, volume: &str, payload: &str, timeout: Duration) -> Result<()> {
        let call = Call {
            payload,
            timeout,
            ..self.query("internal.vm.volume.ImportEnd", machine, volume)
        };
        self.order(INTERNAL, call)
    }
}

/// The error for a call that was not answered as it should be.
fn failed(call: Call<'_>, problem: String) -> Error {
    let target = if call.argument.is_empty() {
        call.machine.to_owned()
    } else {
        format!("{}:{}", call.machine, call.argument)
    };
    Error::Qubesd {
        call: call.method,
        target,
        problem,
    }
}

/// Makes a connection, asks, and returns the answer.
fn exchange(path: &Path, call: Call<'_>) -> Result<Vec<u8>> {
    let started = Instant::now();
    let left = || {
        call.timeout
            .checked_sub(started.elapsed())
            .filter(|left| !left.is_zero())
    };
    let too_late = || {
        let seconds = call.timeout.as_secs();
        failed(call, format!("it did not answer within {seconds} seconds"))
    };
    let broken = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => too_late(),
        _ => failed(call, format!("the connection broke: {error}")),
    };
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::Usage(format!(
            "nobody answers at `{}`: --qubes restores into a Qubes OS that runs, in its dom0",
            shown(path)
        )),
        _ => Error::io("connect to", path)(error),
    })?;
    stream.set_write_timeout(left()).map_err(broken)?;
    let Call {
        method,
        machine,
        argument,
        payload,
        ..
    } = call;
    let request = format!("{method}+{argument} {SOURCE} name {machine}\0{payload}");
    stream.write_all(request.as_bytes()).map_err(broken)?;
    stream.shutdown(Shutdown::Write).map_err(broken)?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        stream
            .set_read_timeout(Some(left().ok_or_else(too_late)?))
            .map_err(broken)?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(answer),
            Ok(read) => answer.extend(&buffer[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // It ends a connection that way after an error of its own.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(answer),
            Err(error) => return Err(broken(error)),
        }
        if answer.len() as u64 > ANSWER_BYTES_MAX {
            return Err(failed(call, "its answer is longer than vmfold takes".into()));
        }
    }
}

impl Qubesd for SocketQubesd {
    fn machines(&self) -> Result<Vec<MachineState>> {
        self.call(ADMIN, self.query("admin.vm.List", SOURCE, ""), answer::machines)
    }

    fn state(&self, machine: &str) -> Result<String> {
        self.call(ADMIN, self.query("admin.vm.CurrentState", machine, ""), answer::state)
    }

    fn volume(&self, machine: &str, volume: &str) -> Result<VolumeInfo> {
        self.call(
            ADMIN,
            self.query("admin.vm.volume.Info", machine, volume),
            answer::volume,
        )
    }

    fn has_tag(&self, machine: &str, tag: &str) -> Result<bool> {
        self.call(
            ADMIN,
            self.query("admin.vm.tag.Get", machine, tag),
            |content| match content {
                "1" => Ok(true),
                "0" => Ok(false),
                _ => Err("its answer makes no sense".into()),
            },
        )
    }

    fn set_tag(&self, machine: &str, tag: &str) -> Result<()> {
        self.order(ADMIN, self.query("admin.vm.tag.Set", machine, tag))
    }

    fn remove_tag(&self, machine: &str, tag: &str) -> Result<()> {
        self.order(ADMIN, self.query("admin.vm.tag.Remove", machine, tag))
    }

    fn begin_import(&self, machine: &str, volume: &str, size: u64) -> Result<PathBuf> {
        let payload = size.to_string();
        let call = Call {
            payload: &payload,
            ..self.query("internal.vm.volume.ImportBegin", machine, volume)
        };
        self.call(INTERNAL, call, |content| answer::import_path(content, size))
    }

    fn commit_import(&self, machine: &str, volume: &str) -> Result<()> {
        self.end_import(machine, volume, "ok", self.timeouts.commit)
    }

    fn drop_import(&self, machine: &str, volume: &str, reason: &str) {
        // The daemon takes ASCII only, and answers what it was told.
        let reason: String = reason
            .chars()
            .map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' })
            .collect();
        let _ = self.end_import(machine, volume, &format!("fail\n{reason}"), self.timeouts.answer);
    }
}
